# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Logging to standard error: with priorities for the journal, with a time for anything else.

One message is one line.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from agentlab_core.escapes import escape_controls

log = logging.getLogger("agentlabd")

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
# Lines of one kind that clients or libraries can cause: one in so many seconds; the next one says how many there were.
SELDOM_SECONDS = 60.0
# Lines of requests that changed nothing, for each who asks, in so many seconds. What changes something is always
# logged.
IDLE_LINES = 60
# Kinds that are remembered; names of loggers and of places in the code, so there are few.
_KINDS = 1000


class _Journal(logging.Formatter):
    """systemd reads the priority from the beginning of each line."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in _lines(super().format(record), record))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(_lines(super().format(record), record))


def _lines(text: str, record: logging.LogRecord) -> list[str]:
    """The lines of a message, of which only a traceback has several: a name with a line feed must not look like a
    line of ours.
    """
    lines = text.split("\n") if record.exc_info else [text.replace("\r", " ").replace("\n", " ")]
    return [escape_controls(line, "\t") for line in lines]


class _Seldom(logging.Filter):
    """Let one line of a kind pass each minute, or as many as ``seldom`` allows, and count the rest.

    A kind is named by ``seldom``, or is a library's logger and text, or the place of an exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # Kind -> when its minute began, how many lines passed in it, and how many were held back.
        self._passed: dict[str, tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "kind", None) or self._kind(record)
        if kind is None:
            return True
        now = time.monotonic()
        with self._lock:
            began, passed, held = self._passed.get(kind, (-SELDOM_SECONDS, 0, 0))
            if now - began < SELDOM_SECONDS:
                allowed = passed < getattr(record, "allowed", 1)
                self._passed[kind] = (began, passed + allowed, held + (not allowed))
                return allowed
            if len(self._passed) >= _KINDS:
                self._passed.clear()
            self._passed[kind] = (now, 1, 0)
        if held:
            record.msg, record.args = f"{record.getMessage()} ({held} more of these since the last such line)", ()
        return True

    @staticmethod
    def _kind(record: logging.LogRecord) -> str | None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            return (
                f"{type(error).__name__} in {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
                if place
                else type(error).__name__
            )
        # Lines of our own are about somebody's request or about a job, and each is needed.
        return None if record.name.startswith(log.name) else f"{record.name} {str(record.msg)[:80]}"


def seldom(level: int, kind: str, text: str, *values: object, allowed: int = 1) -> None:
    """Log a line of which a client can cause very many: ``allowed`` of the kind a minute, the rest is counted."""
    log.log(level, text, *values, extra={"kind": kind, "allowed": allowed})


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
    handler.addFilter(_Seldom())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Requests that are no HTTP are answered with 400; they are not worth a trace each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
