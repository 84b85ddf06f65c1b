# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Notify the service manager: ready, reloading, stopping, alive."""

from __future__ import annotations

import os
import time

import sdnotify


class Manager:
    """Send notifications to systemd. Without systemd nothing is sent."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()

    def notify_ready(self, status: str) -> None:
        self._notifier.notify(f"READY=1\nSTATUS={status}")

    def notify_reloading(self) -> None:
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def notify_stopping(self, status: str) -> None:
        self._notifier.notify(f"STOPPING=1\nSTATUS={status}")

    def notify_alive(self) -> None:
        self._notifier.notify("WATCHDOG=1")


def read_watchdog_seconds() -> float | None:
    """Return the seconds within which systemd expects a notification (WatchdogSec), or None without a watchdog."""
    try:
        period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        meant = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return period if period > 0 and meant == os.getpid() else None
