# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Signals that reach the event loop, each of them.

``loop.add_signal_handler`` hands over a byte for each signal through a pipe. While the pipe is full, as in a storm of SIGHUP, the
byte of a SIGTERM is dropped and nothing ends the process. Here the pipe only wakes the loop up: what came is kept beside it.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping
from types import FrameType


class Signals:
    """Calls ``actions[number]`` in the running event loop after the signal came; once for any number that came meanwhile.

    To be made in the main thread. From ``close`` on they are ignored.
    """

    def __init__(self, actions: Mapping[signal.Signals, Callable[[], object]]) -> None:
        self._actions = actions
        self._came: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._loop.add_reader(self._woken, self._act)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in actions:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._came.add(number)

    def _act(self) -> None:
        # First the pipe, then the set: what comes in between leaves another byte.
        self._woken.recv(4096)
        for number, action in self._actions.items():
            if number in self._came:
                self._came.discard(number)
                action()

    def close(self) -> None:
        for number in self._actions:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._loop.remove_reader(self._woken)
        self._woken.close()
        self._waker.close()
