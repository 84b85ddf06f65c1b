# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the faults of commands share: a controller that is killed at a point, and what goes wrong with an agent."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.https import Https

from support.lab import Lab

FAULTS: dict[str, Callable[[Any], None]] = {
    "frozen": lambda guest: guest.freeze(0.5),
    "restarted": lambda guest: guest.restart(),
    "frozen after its ping": lambda guest: guest.freeze_after_ping(7),
}


def child(lab: Lab, work: Callable[[Any], Any], point: int, moment: str, place: str) -> int:
    """Do the work in a process that ends itself before or after its nth request or commit; return its exit status."""
    ctx = lab.context()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 3
    try:
        counter = itertools.count(1)

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **values: Any) -> Any:
                number = next(counter)
                if number == point and moment == "before":
                    os._exit(9)
                answer = real(*args, **values)
                if number == point:
                    os._exit(9)
                return answer

            return call

        if place == "request":
            Https.send = dying(Https.send)  # type: ignore[method-assign]
        else:
            database: Any = ctx.records.db
            database.write = dying(database.write)
        work(ctx)
        status = 0
    finally:
        os._exit(status)
