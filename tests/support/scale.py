# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records with a long history, and the work that must not read it: what is done at every tick, and what a list asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, rules, timeguard
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup, prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, overview
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.views import info

from .double import EMPTY_CONFIG

LIVE, HISTORY = 1000, 20_000
POLICY = rules.parse(
    """auto_cleanup:
  rules: [{name: old, match: {states: [TIMEOUT, STOPPED]}, after: 7d, action: destroy}]
  retention: {destroyed_records: 90d}
""",
    "rules",
)


def fill_records(database: str, destroyed: int, folder: Path) -> Context:
    """Return a run on a new database of either engine, with live records among destroyed ones.

    Half of the live records are TIMEOUT. Each record has an event, and all VMIDs have had many sandboxes.
    """
    ctx = Context(
        config.load({"database": database, "config_file": ""}, {"AGENTLAB_CONFIG": EMPTY_CONFIG}),
        actor="test",
    )
    now = int(time.time())

    def work(conn: Any) -> None:
        names = "uuid, vmid, name, state, node, lease_expires_at, created_at, updated_at, state_changed_at, smbios_uuid"
        marks = ", ".join("?" * 10)
        conn.executemany(
            f"INSERT INTO sandboxes ({names}) VALUES ({marks})",
            (
                (
                    f"gone-{n}",
                    1000 + n % LIVE,
                    f"old-{n}",
                    "DESTROYED",
                    "pve1",
                    now - 9000,
                    now - 9000,
                    now - 5000,
                    now - 5000,
                    f"s-{n}",
                )
                for n in range(destroyed)
            ),
        )
        conn.executemany(
            f"INSERT INTO sandboxes ({names}) VALUES ({marks})",
            (
                (
                    f"live-{n}",
                    1000 + n,
                    f"a-{n}",
                    "TIMEOUT" if n % 2 else "RUNNING",
                    "pve1",
                    now + 3600,
                    now - 60,
                    now - 60,
                    now - 60,
                    f"t-{n}",
                )
                for n in range(LIVE)
            ),
        )
        conn.execute(
            "INSERT INTO events (at, sandbox_uuid, vmid, operation, actor, outcome) "
            "SELECT created_at, uuid, vmid, 'create', 'test', 'done' FROM sandboxes ORDER BY uuid"
        )

    ctx.database.write(work)
    # Notes the clocks, as the first tick does.
    timeguard.explain_pause(ctx)
    return ctx


WORK: dict[str, Callable[[Context], object]] = {
    "when the next lease ends": lambda ctx: overview.read_next_lease_end(ctx.records),
    "leases that are over": lambda ctx: lease.expire(ctx, stop_vms=False),
    "a run of the cleanup rules": lambda ctx: cleanup.run(ctx, POLICY),
    "planning a prune": lambda ctx: prune.select(ctx, prune.Selection(older_than=86400)),
    "what was interrupted": lambda ctx: (ctx.records.list_unfinished(), overview.drop_dead_claims(ctx.records)),
    "whether cleanup is frozen": timeguard.read_freeze,
    "a list": lambda ctx: [sandbox.public() for sandbox in info.find(ctx, info.Filter())],
    "a list of one state": lambda ctx: info.find(ctx, info.Filter(states=["TIMEOUT"])),
    "one sandbox": lambda ctx: ctx.select_sandbox(1500),
    "a name": lambda ctx: ctx.select_sandbox(name="a-500"),
    "the last events of a VMID": lambda ctx: history.read_events(ctx.database, vmid=1500, tail=20),
    "the events of a sandbox": lambda ctx: history.read_events(ctx.database, uuid="live-500"),
}
