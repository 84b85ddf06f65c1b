# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Logging to standard error: with priorities for the journal, with a time for anything else. One message is one line."""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger("agentlabd")

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Journal(logging.Formatter):
    """systemd reads the priority from the beginning of each line."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        # A name or a message from elsewhere may hold line feeds: it must not look like a line of ours.
        lines = super().format(record).replace("\r", " ").split("\n")
        if record.exc_info:
            return "\n".join(prefix + line for line in lines)
        return prefix + " ".join(lines)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.exc_info else " ".join(text.splitlines())


def to_journal() -> bool:
    """Whether standard error is the journal's socket: JOURNAL_STREAM names its device and inode."""
    try:
        device, _colon, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
        found = os.fstat(sys.stderr.fileno())
        return (int(device), int(inode)) == (found.st_dev, found.st_ino)
    except (ValueError, OSError):
        return False


def setup(verbose: bool) -> None:
    """Send everything of ours (and warnings of the libraries) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Journal("%(message)s") if to_journal() else _Plain("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Requests that are no HTTP are answered with 400; they are not worth a trace each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
