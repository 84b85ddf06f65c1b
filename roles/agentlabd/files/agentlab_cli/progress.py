# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Show progress of long work: one line on the terminal that is overwritten. In a pipe nothing is shown."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from .errors import Problem
from .text import format_duration, join_lines

# Seconds. Answers that come sooner need no progress.
_SHOW_AFTER = 0.4
_EVERY = 1.0


class Progress:
    """Show ``look()`` and the elapsed time until the block ends.

    Its own requests to the daemon run in parallel to the request of the block.
    """

    def __init__(self, look: Callable[[], str], *, enabled: bool = True) -> None:
        self._look = look
        self._on = (
            enabled and sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        )
        self._end = threading.Event()
        self._drawing = threading.Lock()
        self._shown = False
        self._thread = threading.Thread(target=self._draw_until_end, daemon=True)

    def __enter__(self) -> None:
        if self._on:
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The lock keeps the thread from drawing after the line is cleared. The thread is not joined, because its own
        # request may hang, and that would delay the answer.
        with self._drawing:
            self._end.set()
            if self._shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _draw_until_end(self) -> None:
        """Draw the line about every second, in a thread."""
        begun, wait = time.monotonic(), _SHOW_AFTER
        while not self._end.wait(wait):
            wait = _EVERY
            try:
                text = self._look()
            except (Problem, KeyError, TypeError):
                # Ignore an unusable answer here. The command itself reports an error that matters.
                continue
            line = f"{join_lines(text)} ({format_duration(time.monotonic() - begun)})"[: _read_terminal_width() - 1]
            with self._drawing:
                if not self._end.is_set():
                    self._shown = True
                    sys.stderr.write(f"\r{line}\x1b[K")
                    sys.stderr.flush()


def _read_terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
