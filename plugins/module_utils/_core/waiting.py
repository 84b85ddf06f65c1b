# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one waiter: look again and again, until there is a result or the time is over.

Other loops with pauses do more than look, and their docstrings say what: the task waiter shares one poll between
threads, a command in a guest is polled at the pace of its running time, and a write that a lock refused is judged anew
before it is sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .clock import Clock

T = TypeVar("T")

# Each pause is longer than the one before by this factor.
_GROWTH = 1.5


def until(
    clock: Clock, timeout: float, look: Callable[[], T | None], *, pause: float = 0.2, longest: float = 3.0
) -> T | None:
    """Call ``look`` until it returns a result, and return that; None when ``timeout`` seconds are over.

    Looks at least once, and the last look begins after the time is over: a slow look does not end the wait. ``pause``
    is the first pause and ``longest`` the longest, in seconds. What ``look`` raises ends the wait.
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
