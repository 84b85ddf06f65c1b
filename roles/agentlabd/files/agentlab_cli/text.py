# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Format text for people: safe for their terminal, with readable durations and ages, and in tables."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"(\d{1,9}(?:\.\d{1,6})?)"
_DURATION = re.compile(rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?", re.ASCII)
# Names, addresses and messages may come from a guest, and must not control the terminal. Categories of Unicode:
# control (ESC, DEL), format (U+202E, U+00AD), surrogates, and the separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def clean_text(text: object) -> str:
    """Return the text with control and format characters as escapes (``\\x1b``). Line feeds and tabs stay."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _UNSEEN else _escape_character(ord(char))
        for char in text
    )


def _escape_character(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def join_lines(text: object) -> str:
    """Return the text on one line and without control characters, so that a name cannot forge a line."""
    return " ".join(clean_text(text).split())


def format_cell(value: object) -> str:
    """Return a value on one line: a list with commas, nothing as a hyphen."""
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={format_cell(item)}" for name, item in value.items())
    return join_lines(value)


def parse_duration(text: str) -> float:
    """Return the seconds of ``30`` (seconds), ``1500ms``, ``90s``, ``1.5h`` or ``1h30m``.

    Raises ValueError for anything else, and for empty text.
    """
    if re.fullmatch(_NUMBER, text, re.ASCII):
        total = float(text)
    else:
        parts = _DURATION.fullmatch(text)
        if parts is None:
            raise ValueError(text)
        total = sum(
            float(part) * size for part, size in zip(parts.groups(), (*_UNITS.values(), 0.001), strict=True) if part
        )
    if not 0 < total < 10**9:
        raise ValueError(text)
    return int(total) if total == int(total) else round(total, 3)


def format_duration(length: float) -> str:
    """Return a time in seconds as text with at most two units: ``1d4h``, ``3m``, ``12s``."""
    remainder, parts = max(0, int(length)), []
    for unit, size in _UNITS.items():
        count, remainder = divmod(remainder, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def format_size(count: float) -> str:
    """Return a number of bytes in readable form: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def format_time_limit(length: float) -> str:
    """Return a time limit in seconds as text with its fraction: ``1.5s``, ``2h``."""
    return format_duration(length) if length == int(length) else f"{length:.10g}s"


def format_time_left(value: object, now: datetime | None = None) -> str:
    """Return the time until a moment: ``1h58m``, ``over`` for a past moment, a hyphen without one."""
    moment = _parse_moment(value)
    if moment is None:
        return format_cell(value)
    remaining = (moment - (now or datetime.now(UTC))).total_seconds()
    return format_duration(remaining) if remaining > 0 else "over"


def format_age(value: object, now: datetime | None = None) -> str:
    """Return the time since a moment: ``1h58m``, a hyphen without one."""
    moment = _parse_moment(value)
    return (
        format_cell(value) if moment is None else format_duration(((now or datetime.now(UTC)) - moment).total_seconds())
    )


def _parse_moment(text: object) -> datetime | None:
    """Return a time of an answer (UTC); None for any other text."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def format_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, width: int | None = None, droppable: Sequence[str] = ()
) -> str:
    """Return columns of text for people. No cell breaks its line.

    ``width`` is in characters. While a line is longer, the columns in ``droppable`` are left out one after the other.
    """
    columns = [
        [header, *column]
        for header, column in zip(
            headers, zip(*([format_cell(value) for value in row] for row in rows), strict=True), strict=True
        )
    ]
    widths = {column[0]: max(map(len, column)) for column in columns}
    for header in droppable if width is not None else ():
        if sum(widths.values()) + 2 * (len(widths) - 1) <= (width or 0):
            break
        widths.pop(header, None)
    shown = [[text.ljust(widths[column[0]]) for text in column] for column in columns if column[0] in widths]
    return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))


def read_terminal_width() -> int | None:
    """Return the number of columns of the terminal, or None if standard output is no terminal."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def format_pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """Return names and values, one pair on each line."""
    shown = [(name, format_cell(value)) for name, value in rows]
    width = max((len(name) for name, _value in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)
