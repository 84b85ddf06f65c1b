# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Escape control characters in text from outside (a VM's name, a path, an answer of Proxmox VE).

Such text may be shown on a terminal or written into a log.
"""

from __future__ import annotations

import unicodedata

# The Unicode categories that control a terminal, or hide or reorder text: control (ESC, BEL), format (U+202E,
# U+200B), surrogates, and the separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def escape_controls(text: str, keep: str = "\n\t") -> str:
    """Return the text with every control and formatting character but those of ``keep`` written as an escape.

    ESC becomes ``\\x1b``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in _UNSEEN else _escape(ord(char)) for char in text
    )


def _escape(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
