# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Poll a function until it has a result or the time is over.

Three other loops with pauses do more, and their docstrings say so: the task waiter shares one poll between threads; a
command in a guest is polled at the pace of its running time; a write that a lock refused is checked again before it is
sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .clock import Clock

T = TypeVar("T")

# Each pause is longer than the one before by this factor.
_GROWTH = 1.5


def wait_for_result(
    clock: Clock, timeout: float, look: Callable[[], T | None], *, pause: float = 0.2, longest: float = 3.0
) -> T | None:
    """Call ``look`` until it returns a result, and return that; None when ``timeout`` seconds are over.

    ``look`` is called at least once. The last call begins after the time is over, so a slow call does not end the wait.
    ``pause`` is the first pause and ``longest`` the longest, in seconds. An error of ``look`` ends the wait.
    """
    deadline = clock.monotonic() + timeout
    while True:
        begun = clock.monotonic()
        result = look()
        if result is not None:
            return result
        if begun > deadline:
            return None
        clock.sleep(pause)
        pause = min(pause * _GROWTH, longest)
