# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Log to standard error, one line for each message: with a priority if the journal reads it, else with a time."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from agentlab_core.escapes import escape_controls

log = logging.getLogger("agentlabd")

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
# Seconds in which one line of a kind passes, for kinds that clients or libraries can cause. The next line of the kind
# counts the suppressed ones.
SELDOM_SECONDS = 60.0
# Lines in SELDOM_SECONDS for each client about requests that changed nothing. Changes are always logged.
IDLE_LINES = 60
# Kinds to remember. They are names of loggers and places in the code, so there are few.
_KINDS = 1000


class _Journal(logging.Formatter):
    """Put the priority at the beginning of each line, where systemd reads it."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in _split_lines(super().format(record), record))


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(_split_lines(super().format(record), record))


def _split_lines(text: str, record: logging.LogRecord) -> list[str]:
    """Return the lines of a message.

    Only a traceback may have several: a name with a line feed must not forge a line.
    """
    lines = text.split("\n") if record.exc_info else [text.replace("\r", " ").replace("\n", " ")]
    return [escape_controls(line, "\t") for line in lines]


class _Seldom(logging.Filter):
    """Let one line of a kind pass each minute, or as many as ``log_seldom`` allows, and count the others.

    A kind is the name given to ``log_seldom``, or a library's logger and text, or the place of an exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # Kind -> beginning of its minute (monotonic seconds), lines passed in it, lines suppressed in it.
        self._passed: dict[str, tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "kind", None) or self._identify_kind(record)
        if kind is None:
            return True
        now = time.monotonic()
        with self._lock:
            began, passed, suppressed = self._passed.get(kind, (-SELDOM_SECONDS, 0, 0))
            if now - began < SELDOM_SECONDS:
                allowed = passed < getattr(record, "allowed", 1)
                self._passed[kind] = (began, passed + allowed, suppressed + (not allowed))
                return allowed
            if len(self._passed) >= _KINDS:
                self._passed.clear()
            self._passed[kind] = (now, 1, 0)
        if suppressed:
            record.msg, record.args = f"{record.getMessage()} ({suppressed} more of these since the last such line)", ()
        return True

    @staticmethod
    def _identify_kind(record: logging.LogRecord) -> str | None:
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
        # Our own lines are about a request or a job, and each is needed.
        return None if record.name.startswith(log.name) else f"{record.name} {str(record.msg)[:80]}"


def log_seldom(level: int, kind: str, text: str, *values: object, allowed: int = 1) -> None:
    """Log a line that a client can cause very often: ``allowed`` lines of the kind a minute. Count the others."""
    log.log(level, text, *values, extra={"kind": kind, "allowed": allowed})


def is_journal() -> bool:
    """Return whether standard error is the journal's socket. JOURNAL_STREAM names its device and inode."""
    try:
        device, _colon, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
        stream = os.fstat(sys.stderr.fileno())
        return (int(device), int(inode)) == (stream.st_dev, stream.st_ino)
    except (ValueError, OSError):
        return False


def set_up_logging(verbose: bool) -> None:
    """Send our log, and warnings of libraries, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Journal("%(message)s") if is_journal() else _Plain("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_Seldom())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Requests that are not HTTP get a 400. They are not worth a traceback each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
