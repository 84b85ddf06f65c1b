# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A laboratory for tests of the core: a Proxmox double over HTTPS, records of its own, and a fresh Context for every
run.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from contextlib import closing
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome, Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy, lease
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.views import info
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

from support.double import Server

BYSTANDER = 500
# As a user would set them for impatient tests; options of a run override them.
IMPATIENT = {
    "template": "debian-13",
    "claim_timeout": "1s",
    "wait_timeout": "5s",
    "shutdown_timeout": "1s",
    "doubt_window": "1s",
    "api_timeout": 5,
    "connections": 4,
}


class Hurried(SystemClock):
    """Real time, but the pauses between tries are short."""

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.05))


class FakeClock:
    """Time that a test moves. ``jump`` moves the wall clock alone, ``pass_time`` (and ``sleep``) everything."""

    def __init__(self, now: int | None = None) -> None:
        self.wall = float(now if now is not None else int(time.time()))
        self.mono = 1000.0
        self.boot = 5000.0

    def now(self) -> int:
        return int(self.wall)

    def monotonic(self) -> float:
        return self.mono

    def since_boot(self) -> float:
        return self.boot

    def sleep(self, seconds: float) -> None:
        # A little real time too: the double works in another thread.
        time.sleep(min(seconds, 0.002))
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds
        self.boot += seconds

    def asleep(self, seconds: float) -> None:
        """The host sleeps: CLOCK_MONOTONIC stands still, CLOCK_BOOTTIME and the wall clock go on."""
        self.wall += seconds
        self.boot += seconds

    def jump(self, seconds: float) -> None:
        self.wall += seconds


class Lab:
    """One double and one database.

    Every operation below is a run of its own: nothing is remembered from the one before.
    """

    def __init__(self, folder: Any, *, time_scale: float = 0, **options: Any) -> None:
        self.folder = str(folder)
        self.server = Server(self.folder, time_scale=time_scale)
        self.pve = self.server.pve
        self.options = {**IMPATIENT, **options}
        self.clock: Any = Hurried()
        self._contexts: list[Context] = []
        self._number = 0
        self.database = os.path.join(self.folder, "agentlab.db")
        self.reset()

    # ---- set up and tear down ----

    def reset(self) -> None:
        """An empty cluster with the template and a bystander, and an empty database."""
        self.calm()
        self.close_contexts()
        pve = self.pve
        pve.vms.clear()
        pve.tasklog.clear()
        pve.tasks.clear()
        for store in pve.storages.values():
            store.pop("volumes", None)
        pve.add_template()
        pve.add_vm(
            BYSTANDER,
            "bystander",
            status="running",
            config={
                "cores": 1,
                "smbios1": "uuid=11111111-1111-4111-8111-111111111111",
                "tags": "agentlab",
                "description": "not ours",
            },
        )
        self.bystander = dict(pve.vm(BYSTANDER).config)
        pve.requests.clear()
        pve.counted.clear()
        pve.disks_lost.clear()
        pve.hook_errors.clear()
        self._number += 1
        self.database = os.path.join(self.folder, f"records-{self._number}", "agentlab.db")

    def calm(self) -> None:
        """No faults any more."""
        pve = self.pve
        pve.faults.clear()
        pve.failures.clear()
        pve.task_endings.clear()
        pve.task_warnings.clear()
        pve.spoiled.clear()
        pve.before = pve.after = None
        pve.acl = pve.access = None
        pve.no_access.clear()
        pve.tag_access = "free"
        pve.registered_tags.clear()
        pve.regain_quorum()
        for node in pve.nodes:
            pve.nodes[node]["online"] = True

    def close_contexts(self) -> None:
        for one in self._contexts:
            one.close()
        self._contexts.clear()

    def back_up(self, to: Any) -> None:
        """Copy the SQLite records to the file ``to``, as the manual does."""
        with closing(sqlite3.connect(self.database)) as records, closing(sqlite3.connect(to)) as copy:
            records.backup(copy)

    def stop(self) -> None:
        self.close_contexts()
        self.server.stop()

    def context(
        self, *, dry_run: bool = False, actor: str = "test", server: Server | None = None, **options: Any
    ) -> Context:
        """A new run: nothing shared with any other but the database and the cluster."""
        found = config.load(
            {**self.options, "database": self.database, **options}, (server or self.server).environment(self.folder)
        )
        made = Context(found, actor=actor, dry_run=dry_run, clock=self.clock)
        self._contexts.append(made)
        if len(self._contexts) > 40:
            self._contexts.pop(0).close()
        return made

    # ---- operations, each a run of its own ----

    def create(self, name: str = "a1", *, ttl: int = 3600, vmid: int | None = None, **values: Any) -> Sandbox:
        options = values.pop("options", {})
        outcome = create.run(self.context(**options), create.Spec(name=name, ttl=ttl, vmid=vmid, **values))
        assert outcome.sandbox is not None
        return outcome.sandbox

    def power(self, operation: str, vmid: int, *, force: bool = False, **options: Any) -> Outcome:
        ctx = self.context(**options)
        return power.run(ctx, ctx.select(vmid), operation, force=force)

    def destroy(self, *vmids: int, force: bool = False, **options: Any) -> list[Outcome]:
        ctx = self.context(**options)
        return destroy.run(ctx, [(ctx.select(vmid), destroy.Request(force=force)) for vmid in vmids])

    def renew(self, vmid: int, ttl: int, **values: Any) -> Outcome:
        ctx = self.context()
        return lease.renew(ctx, ctx.select(vmid), ttl, **values)

    def expire(self, **options: Any) -> lease.Expiry:
        return lease.expire(self.context(**options))

    def prune(
        self, *, dry_run: bool = False, options: dict[str, Any] | None = None, **wanted: Any
    ) -> prune.PruneResult:
        return prune.run(self.context(dry_run=dry_run, **(options or {})), prune.Selection(**wanted))

    def reconcile(self, *, apply: bool = True, **options: Any) -> list[reconcile.Drift]:
        return reconcile.run(self.context(**options), apply=apply)

    def info(self, *, verify: bool = True) -> dict[str, Any]:
        return info.show(self.context(), info.Filter(include_destroyed=True), verify=verify)

    # ---- sandboxes in a certain state, without waiting for it ----

    def force_state(self, vmid: int, state: str, *, age: int = 0, **values: Any) -> Sandbox:
        """Write a state into the record, as if it had been entered ``age`` seconds ago."""
        ctx = self.context()
        record = ctx.select(vmid)
        now = ctx.clock.now() - age
        values = {"state": state, "state_changed_at": now, **values}
        names = ", ".join(f"{name} = ?" for name in values)
        ctx.database.write(
            lambda conn: (
                conn.execute(f"UPDATE sandboxes SET {names} WHERE uuid = ?", (*values.values(), record.uuid)) and None
            )
        )
        return ctx.records.get(record.uuid)

    def timed_out(self, name: str = "a1", *, stopped: bool = True, **values: Any) -> Sandbox:
        """A sandbox in TIMEOUT, its VM stopped or still running."""
        made = self.create(name, **values)
        if stopped:
            vm = self.pve.vm(made.vmid)
            vm.status = vm.qmpstatus = "stopped"
        self.pve.requests.clear()
        return self.force_state(made.vmid, states.TIMEOUT, age=10, lease_expires_at=int(time.time()) - 10)

    # ---- looking ----

    def record(self, which: Sandbox | int) -> Sandbox:
        ctx = self.context()
        return ctx.select(which) if isinstance(which, int) else ctx.records.get(which.uuid)

    def records(self) -> list[Sandbox]:
        return self.context().records.find_all(include_destroyed=True)

    def events(self, sandbox: Sandbox) -> list[dict[str, Any]]:
        return history.events(self.context().database, uuid=sandbox.uuid)

    def leftovers(self) -> dict[str, list[dict[str, Any]]]:
        """Claims and journal entries that nobody removed."""
        ctx = self.context()
        return {
            table: [dict(row) for row in ctx.database.read(f"SELECT * FROM {table}")]
            for table in ("claims", "operations")
        }

    def ours(self) -> dict[str, int]:
        """Sandbox UUID -> VMID of every VM on the cluster whose clone call we made (by the marker)."""
        return {uuid: vm.vmid for vm in list(self.pve.vms) for uuid in identity.markers(vm.config)}

    def unrecorded(self) -> list[int]:
        """VMs with our marker that no live record has."""
        live = {one.uuid for one in self.records() if one.live}
        return [vmid for uuid, vmid in self.ours().items() if uuid not in live]

    def check_promises(self) -> None:
        """What holds at every moment: no DESTROYED record while its VM exists, and the bystander is as it was."""
        # A hook that failed did not do what the test thinks it did.
        assert not self.pve.hook_errors, self.pve.hook_errors
        smbios = {identity.smbios_uuid(vm.config) for vm in list(self.pve.vms)}
        ours = self.ours()
        for one in self.records():
            if not one.live:
                assert one.uuid not in ours, f"{one.vmid} says DESTROYED ({one.reason}), but its VM is there"
                assert one.smbios_uuid is None or one.smbios_uuid not in smbios, (
                    f"{one.vmid} says DESTROYED, but its VM is there"
                )
        assert self.pve.touched(BYSTANDER) == [], "the bystander was touched"
        assert self.pve.vm(BYSTANDER) is not None and self.pve.vm(BYSTANDER).config == self.bystander
        assert self.pve.vm(BYSTANDER).status == "running"

    def swap(self, vmid: int, **values: Any) -> Any:
        """Somebody else's VM in place of ours, from now on watched: returns it."""
        found = self.pve.make_foreign(vmid, **values)
        self.pve.requests.clear()
        return found

    def edited_before(self, ending: str, times: int = 1) -> list[int]:
        """Somebody changes the VM's configuration just before each of so many PUTs whose path ends so: the VMIDs,
        once it happened.
        """
        edited: list[int] = []

        def edit(method: str, path: str) -> None:
            if method == "PUT" and path.endswith(ending) and len(edited) < times:
                edited.append(int(re.search(r"/qemu/(\d+)", path)[1]))  # type: ignore[index]
                self.pve.vm(edited[-1]).config["description"] += f"edited {len(edited)}\n"

        self.pve.before = edit
        return edited

    def untouched(self, vm: Any, *, status: str | None = None) -> None:
        """The foreign VM is there, unchanged, and nobody asked for anything but to read it."""
        assert self.pve.touched(vm.vmid) == [], "a stranger's VM was touched"
        assert vm in self.pve.vms, "a stranger's VM is gone"
        if status is not None:
            assert vm.status == status


@contextlib.contextmanager
def lab(folder: Any, **options: Any) -> Any:
    made = Lab(folder, **options)
    try:
        yield made
    finally:
        made.stop()
