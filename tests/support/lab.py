# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A laboratory for tests of the core: a Proxmox double, records of its own, and a fresh Context for every run."""

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
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy, lease, wanted
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
    """The real clock, whose pauses between tries last 0.05 seconds at most."""

    def sleep(self, seconds: float) -> None:
        """Wait ``seconds``, or 0.05 seconds if those are fewer."""
        time.sleep(min(seconds, 0.05))


class FakeClock:
    """A clock that a test moves. ``jump`` moves the wall clock alone, ``pass_time`` (and ``sleep``) all three clocks.

    All times are seconds; ``now`` is the start of the wall clock, the present if it is not given.
    """

    def __init__(self, now: int | None = None) -> None:
        self.wall = float(now if now is not None else int(time.time()))
        self.mono = 1000.0
        self.boot = 5000.0

    def now(self) -> int:
        """Return the wall clock's time, in whole seconds since 1970."""
        return int(self.wall)

    def monotonic(self) -> float:
        """Return the seconds of CLOCK_MONOTONIC, which stands still while the host sleeps."""
        return self.mono

    def since_boot(self) -> float:
        """Return the seconds of CLOCK_BOOTTIME, which goes on while the host sleeps."""
        return self.boot

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass at once."""
        # A little real time too: the double works in another thread.
        time.sleep(min(seconds, 0.002))
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        """Move all clocks by ``seconds``."""
        self.wall += seconds
        self.mono += seconds
        self.boot += seconds

    def asleep(self, seconds: float) -> None:
        """Put the host to sleep for ``seconds``: CLOCK_MONOTONIC stands still, the other clocks go on."""
        self.wall += seconds
        self.boot += seconds

    def jump(self, seconds: float) -> None:
        """Move the wall clock alone by ``seconds``, as somebody who sets the clock."""
        self.wall += seconds


class Lab:
    """One double and one database, in ``folder``.

    Each operation below is a run of its own, which remembers nothing of the run before. ``time_scale`` is the number
    of real seconds in which a task of the double passes one second (0: at once). ``options`` are configuration keys
    of all runs.
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
        """Empty the cluster but for the template and a bystander, and begin a new database."""
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
        pve.hook_errors.clear()
        self._number += 1
        self.database = os.path.join(self.folder, f"records-{self._number}", "agentlab.db")

    def calm(self) -> None:
        """Take back all faults, restrictions and lost quorum of the double."""
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
        """Close all runs, so that no process holds the database open."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()

    def back_up(self, to: Any) -> None:
        """Copy the SQLite records to the file ``to``, as the manual does."""
        with closing(sqlite3.connect(self.database)) as records, closing(sqlite3.connect(to)) as copy:
            records.backup(copy)

    def stop(self) -> None:
        """Close all runs and stop the double."""
        self.close_contexts()
        self.server.stop()

    def context(
        self, *, dry_run: bool = False, actor: str = "test", server: Server | None = None, **options: Any
    ) -> Context:
        """Return a new run, which shares nothing with another run but the database and the cluster.

        ``server`` is another double to talk to; ``options`` are configuration keys of this run.
        """
        settings = config.load(
            {**self.options, "database": self.database, **options}, (server or self.server).environment(self.folder)
        )
        context = Context(settings, actor=actor, dry_run=dry_run, clock=self.clock)
        self._contexts.append(context)
        if len(self._contexts) > 40:
            self._contexts.pop(0).close()
        return context

    # ---- operations, each a run of its own ----

    def create(self, name: str = "a1", *, ttl: int = 3600, vmid: int | None = None, **values: Any) -> Sandbox:
        """Create a sandbox with a lease of ``ttl`` seconds and return its record.

        ``values`` are fields of create.Spec, and ``options`` configuration keys of the run.
        """
        options = values.pop("options", {})
        outcome = create.run(self.context(**options), create.Spec(name=name, ttl=ttl, vmid=vmid, **values))
        assert outcome.sandbox is not None
        return outcome.sandbox

    def present(self, name: str = "a1", *, dry_run: bool = False, options: Any = None, **values: Any) -> Outcome:
        """Ask for a sandbox as a module does, by its options, and return the whole outcome.

        ``options`` are configuration keys of the run.
        """
        ctx = self.context(dry_run=dry_run, **(options or {}))
        return create.run(ctx, wanted.make_spec(ctx, {"name": name, **values}))

    def power(self, operation: str, vmid: int, *, force: bool = False, **options: Any) -> Outcome:
        """Start, stop or suspend a sandbox (or mark it complete or failed) and return the outcome."""
        ctx = self.context(**options)
        return power.run(ctx, ctx.select_sandbox(vmid), operation, force=force)

    def destroy(self, *vmids: int, force: bool = False, **options: Any) -> list[Outcome]:
        """Destroy sandboxes in one run and return one outcome for each."""
        ctx = self.context(**options)
        return destroy.run(ctx, [(ctx.select_sandbox(vmid), destroy.Request(force=force)) for vmid in vmids])

    def interrupt_destroy(self, sandbox: Sandbox, operation: str = "destroy", phase: str = "stopping") -> None:
        """Leave the journal entry of a destroy that was killed before its delete was decided."""
        ctx = self.context()
        claim = ctx.records.claim(sandbox.uuid, "destroy", wait=0)
        ctx.records.write_journal(claim, "destroy", phase, {"operation": operation, "force": True})
        ctx.records.release(claim)

    def pass_whole_life(self) -> None:
        """Take a sandbox through creation, stop, start and destroy, so that each kind of request is sent once."""
        made = self.create(cores=3, memory=1024, disk_size="20G", bridge="vmbr1", ip_config="ip=dhcp", wait_for_ip=True)
        self.power("stop", made.vmid)
        self.power("start", made.vmid)
        outcome = self.destroy(made.vmid, force=True)[0]
        assert outcome.state == "DESTROYED", outcome.message

    def renew(self, vmid: int, ttl: int, **values: Any) -> Outcome:
        """Renew the lease of a sandbox to ``ttl`` seconds from now."""
        ctx = self.context()
        return lease.renew(ctx, ctx.select_sandbox(vmid), ttl, **values)

    def expire(self, **options: Any) -> lease.Expiry:
        """Expire all leases that are over, and return what was stopped and what was not."""
        return lease.expire(self.context(**options))

    def prune(
        self, *, dry_run: bool = False, options: dict[str, Any] | None = None, **wanted: Any
    ) -> prune.PruneResult:
        """Prune as ``wanted`` selects (fields of prune.Selection)."""
        return prune.run(self.context(dry_run=dry_run, **(options or {})), prune.Selection(**wanted))

    def reconcile(self, *, apply: bool = True, **options: Any) -> list[reconcile.Drift]:
        """Compare records and cluster, correct the records if ``apply``, and return the differences."""
        return reconcile.run(self.context(**options), apply=apply)

    def info(self, *, verify: bool = True) -> dict[str, Any]:
        """Return what agentlab_sandbox_info returns of all sandboxes; ``verify`` asks Proxmox VE too."""
        return info.show(self.context(), info.Filter(include_destroyed=True), verify=verify)

    # ---- sandboxes in a certain state, without waiting for it ----

    def force_state(self, vmid: int, state: str, *, age: int = 0, **values: Any) -> Sandbox:
        """Write a state into the record, as if it had been entered ``age`` seconds ago, and return the record."""
        ctx = self.context()
        record = ctx.select_sandbox(vmid)
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
        """Create a sandbox and return its record in TIMEOUT; its VM is stopped unless ``stopped`` is false."""
        made = self.create(name, **values)
        if stopped:
            vm = self.pve.vm(made.vmid)
            vm.status = vm.qmpstatus = "stopped"
        self.pve.requests.clear()
        return self.force_state(made.vmid, states.TIMEOUT, age=10, lease_expires_at=int(time.time()) - 10)

    # ---- looking ----

    def record(self, which: Sandbox | int) -> Sandbox:
        """Return the record as it is now, by the live sandbox's VMID or by a sandbox of any state."""
        ctx = self.context()
        return ctx.select_sandbox(which) if isinstance(which, int) else ctx.records.get(which.uuid)

    def records(self) -> list[Sandbox]:
        """Return all records, DESTROYED records included."""
        return self.context().records.find_all(include_destroyed=True)

    def events(self, sandbox: Sandbox) -> list[dict[str, Any]]:
        """Return the events of a sandbox, oldest first."""
        return history.read_events(self.context().database, uuid=sandbox.uuid)

    def leftovers(self) -> dict[str, list[dict[str, Any]]]:
        """Return claims and journal entries that nobody removed, by table."""
        ctx = self.context()
        return {
            table: [dict(row) for row in ctx.database.read(f"SELECT * FROM {table}")]
            for table in ("claims", "operations")
        }

    def ours(self) -> dict[str, int]:
        """Return sandbox UUID -> VMID of every VM on the cluster that has our marker."""
        return {uuid: vm.vmid for vm in list(self.pve.vms) for uuid in identity.read_markers(vm.config)}

    def unrecorded(self) -> list[int]:
        """Return the VMIDs of VMs with our marker that belong to no live record."""
        live = {sandbox.uuid for sandbox in self.records() if sandbox.live}
        return [vmid for uuid, vmid in self.ours().items() if uuid not in live]

    def check_promises(self) -> None:
        """Assert what holds at every moment: no DESTROYED record has a VM, and the bystander is as it was."""
        # A hook that failed did not do what the test thinks it did.
        assert not self.pve.hook_errors, self.pve.hook_errors
        smbios = {identity.read_smbios_uuid(vm.config) for vm in list(self.pve.vms)}
        ours = self.ours()
        for sandbox in self.records():
            if not sandbox.live:
                problem = f"{sandbox.vmid} says DESTROYED ({sandbox.reason}), but its VM is there"
                assert sandbox.uuid not in ours, problem
                assert sandbox.smbios_uuid is None or sandbox.smbios_uuid not in smbios, problem
        assert self.pve.touched(BYSTANDER) == [], "the bystander was touched"
        assert self.pve.vm(BYSTANDER) is not None and self.pve.vm(BYSTANDER).config == self.bystander
        assert self.pve.vm(BYSTANDER).status == "running"

    def swap(self, vmid: int, **values: Any) -> Any:
        """Put a stranger's VM in the place of ours, forget all requests until now, and return the stranger's VM."""
        stranger = self.pve.make_foreign(vmid, **values)
        self.pve.requests.clear()
        return stranger

    def edited_before(self, ending: str, times: int = 1) -> list[int]:
        """Let somebody change the VM's configuration just before each of ``times`` PUTs whose path ends so.

        Return a list to which each VMID is appended when its configuration is changed.
        """
        edited: list[int] = []

        def edit(method: str, path: str) -> None:
            if method == "PUT" and path.endswith(ending) and len(edited) < times:
                edited.append(int(re.search(r"/qemu/(\d+)", path)[1]))  # type: ignore[index]
                self.pve.vm(edited[-1]).config["description"] += f"edited {len(edited)}\n"

        self.pve.before = edit
        return edited

    def untouched(self, vm: Any, *, status: str | None = None) -> None:
        """Assert that the stranger's VM exists and that nobody sent a request to change it."""
        assert self.pve.touched(vm.vmid) == [], "a stranger's VM was touched"
        assert vm in self.pve.vms, "a stranger's VM is gone"
        if status is not None:
            assert vm.status == status


@contextlib.contextmanager
def lab(folder: Any, **options: Any) -> Any:
    """Yield a laboratory in ``folder``, and stop it at the end."""
    made = Lab(folder, **options)
    try:
        yield made
    finally:
        made.stop()
