# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Time as the core sees it. Wall time for leases and ages, a monotonic clock for waiting, never one for the other."""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Port to time, so that tests can move it."""

    def now(self) -> int:
        """Wall time in whole seconds since the epoch (UTC)."""

    def monotonic(self) -> float:
        """Seconds that never go back; for time-outs."""

    def since_boot(self) -> float:
        """Seconds since boot, sleep included: what the wall clock is checked against."""

    def sleep(self, seconds: float) -> None:
        """Pause this thread."""


class SystemClock:
    """The real one."""

    def now(self) -> int:
        return int(time.time())

    def monotonic(self) -> float:
        return time.monotonic()

    def since_boot(self) -> float:
        # CLOCK_BOOTTIME goes on while the host sleeps, CLOCK_MONOTONIC does not: waking up late is no clock jump.
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


# A list that is asked for again and again has the same times each time, four a sandbox.
@functools.lru_cache(4096)
def iso(seconds: int | None) -> str | None:
    """``2026-01-30T02:45:00Z``, or None."""
    if seconds is None:
        return None
    return f"{datetime.fromtimestamp(int(seconds), UTC).isoformat()[:19]}Z"
