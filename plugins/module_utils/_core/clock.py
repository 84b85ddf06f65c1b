# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The clocks of the core: wall time for leases and ages, monotonic time for waiting. Neither replaces the other."""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """The interface of a clock. Tests have an implementation that they can move."""

    def now(self) -> int:
        """Return the wall time in whole seconds since the epoch (UTC)."""

    def monotonic(self) -> float:
        """Return seconds that never go back, for timeouts."""

    def since_boot(self) -> float:
        """Return the seconds since boot, sleep included. A jump of the wall clock is detected by them."""

    def sleep(self, seconds: float) -> None:
        """Pause this thread for so many seconds."""


class SystemClock:
    """The clocks of this host."""

    def now(self) -> int:
        return int(time.time())

    def monotonic(self) -> float:
        return time.monotonic()

    def since_boot(self) -> float:
        # CLOCK_BOOTTIME goes on while the host sleeps, CLOCK_MONOTONIC does not. So sleep is no clock jump.
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


# Repeated lists of sandboxes have the same times, four for each sandbox.
@functools.lru_cache(4096)
def format_utc(seconds: int | None) -> str | None:
    """Return seconds since the epoch as ``2026-01-30T02:45:00Z``; None for None."""
    if seconds is None:
        return None
    return f"{datetime.fromtimestamp(int(seconds), UTC).isoformat()[:19]}Z"
