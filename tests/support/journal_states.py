# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every state in which a killed run can leave an operation.

A state is kind and phase of the journal, what became of its task, and what is at the VMID. All of them are made at
once, in one cluster and one database, without running anything.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal

from support.double import TOKEN_ID
from support.lab import Lab

FIRST_VMID = 1000
_FIRST_TEMPLATE = 20000
# What is at the VMID: our VM, nothing, somebody else's, or a VM of which only one of the two marks is ours.
VMS = ("ours", "gone", "stranger's", "edited")
# What became of the task: its id was never noted, or it runs, ended well, failed, or is known to nobody.
TASKS = ("none", "running", "OK", "failed", "unknown")
# Kind and phase -> states of the record that such an entry goes with, and whether the VM was bound by then.
RECORDS: dict[tuple[str, str], list[tuple[str, bool]]] = {
    ("create", journal.RESERVED): [(states.REQUESTED, False), (states.FAILED, False)],
    ("create", journal.CLONING): [(states.PROVISIONING, False), (states.FAILED, False), (states.TIMEOUT, False)],
    ("create", journal.WAITING): [(states.PROVISIONING, False), (states.FAILED, False), (states.TIMEOUT, False)],
    ("create", journal.CONFIGURING): [(states.PROVISIONING, True), (states.BOOTING, True), (states.TIMEOUT, True)],
    ("create", journal.STARTED): [(states.READY, True), (states.TIMEOUT, True)],
    ("create", journal.AWAITED): [(states.BOOTING, True), (states.TIMEOUT, True)],
    **{
        ("destroy", phase): [(states.RUNNING, True), (states.TIMEOUT, True), (states.FAILED, False)]
        for phase in journal.PHASES["destroy"]
    },
    ("start", journal.REQUESTED): [(states.STOPPED, True), (states.SUSPENDED, True)],
    ("stop", journal.REQUESTED): [(states.RUNNING, True), (states.TIMEOUT, True)],
    ("suspend", journal.REQUESTED): [(states.RUNNING, True)],
}
# Phases whose request starts a task. A phase that waits for it has noted its id.
_WITH_TASK = {
    ("create", journal.CLONING): ("none", "running", "OK", "failed"),
    ("create", journal.WAITING): TASKS[1:],
    ("destroy", journal.DELETING): ("none",),
    ("destroy", journal.WAITING): TASKS[1:],
}
# Who asked for a destroy, and with which right to end a VM that runs.
_ASKED = (("destroy", True), ("destroy", False), ("prune", True), ("cleanup", True), ("clean-up", True))


@dataclass(frozen=True)
class Case:
    """One such state. ``awaited``: the caller of the creation was told to run again."""

    vmid: int
    kind: str
    phase: str
    state: str
    bound: bool
    task: str
    vm: str
    operation: str = "destroy"
    force: bool = True
    awaited: bool = False

    @property
    def title(self) -> str:
        """Return a sentence that names this case in the messages of tests."""
        asked = f" ({self.operation}, force={self.force})" if self.kind == "destroy" else ""
        return (
            f"{self.vmid}: {self.kind}{asked}, {self.phase}{', awaited' if self.awaited else ''}, record {self.state}, "
            f"bound {self.bound}, task {self.task}, VM {self.vm}"
        )


def cases() -> list[Case]:
    """Return every case. A kind or phase that RECORDS does not know raises KeyError."""
    vmids = itertools.count(FIRST_VMID)
    asked = itertools.cycle(_ASKED)
    made = []
    for kind, phases in journal.PHASES.items():
        for phase in phases:
            for (state, bound), task, vm in itertools.product(
                RECORDS[kind, phase], _WITH_TASK.get((kind, phase), ("none",)), VMS
            ):
                operation, force = next(asked) if kind == "destroy" else ("destroy", True)
                made.append(Case(next(vmids), kind, phase, state, bound, task, vm, operation, force))
                if (kind, phase, state) == ("create", journal.WAITING, states.PROVISIONING):
                    made.append(Case(next(vmids), kind, phase, state, bound, task, vm, awaited=True))
    return made


class World:
    """All cases in the laboratory, or those that ``chosen`` is true for."""

    def __init__(self, lab: Lab, chosen: Callable[[Case], bool] = lambda _case: True) -> None:
        self.lab = lab
        self.cases = {case.vmid: case for case in cases() if chosen(case)}
        # Somebody else's VMs, as they were: nobody may touch them.
        self.strangers: dict[int, dict[str, Any]] = {}
        self.running: list[str] = []
        # The first creation notes which cluster the records belong to.
        lab.create("first", vmid=1999)
        context = lab.context()
        database = context.records.read_database_id()
        now = context.clock.now() - 5
        rows: list[tuple[Any, ...]] = []
        entries: list[tuple[Any, ...]] = []
        for case in self.cases.values():
            own, smbios = str(uuid.uuid4()), str(uuid.uuid4())
            self._make_vm(case, identity.make_marker(own, database), smbios)
            template = _FIRST_TEMPLATE + case.vmid
            upid = self._make_task(case, template, now)
            creation: dict[str, Any] = {"template": template, "template_name": "t", "template_node": "pve1"}
            creation.update(node="pve1", full=None, storage=None)
            if case.kind == "create" and case.phase != journal.CLONING and upid:
                creation["upid"] = upid
            if case.awaited:
                creation["awaited"] = True
            detail: dict[str, Any] = {"node": "pve1"}
            if case.kind == "create":
                detail = creation
            elif case.kind == "destroy":
                detail = {"operation": case.operation, "force": case.force}
                if case.phase in journal.POINT_OF_NO_RETURN:
                    detail["since"] = now
                if upid:
                    detail["upid"] = upid
                if not case.bound:
                    detail["create"] = {**creation, "phase": journal.CLONING, "at": now}
            row = (own, case.vmid, f"vm{case.vmid}", case.state, "pve1", 3600, now + 86400, now, now, now)
            rows.append((*row, smbios if case.bound else None))
            entries.append((own, case.kind, case.phase, json.dumps(detail), "killed", now, now))

        def write(conn: Any) -> None:
            conn.executemany(
                "INSERT INTO sandboxes (uuid, vmid, name, state, node, ttl_seconds, lease_expires_at, created_at, "
                "updated_at, state_changed_at, smbios_uuid) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            conn.executemany(
                "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                entries,
            )

        context.database.write(write)
        lab.close_contexts()

    def _make_vm(self, case: Case, marker: str, smbios: str) -> None:
        pve = self.lab.pve
        status = "running" if case.state in (states.RUNNING, states.READY, states.TIMEOUT) else "stopped"
        if case.vm == "stranger's":
            vm = pve.make_foreign(case.vmid, running=status == "running")
            self.strangers[case.vmid] = {"config": dict(vm.config), "status": vm.status}
        elif case.vm != "gone":
            text = marker if case.vm == "ours" else "edited by hand"
            # An unbound VM is recognised by its marker alone, so its other mark is the wrong one.
            pve.add_guest(
                case.vmid,
                f"vm{case.vmid}",
                node="pve1",
                status=status,
                config={
                    "description": text if case.bound or case.vm == "ours" else f"{marker}-x",
                    "smbios1": f"uuid={smbios}",
                },
            )

    def _make_task(self, case: Case, template: int, now: int) -> str | None:
        """Make the task in the cluster's list, and return its id; None where there is none."""
        if case.task == "none":
            return None
        kind, vmid = ("qmclone", template) if case.kind == "create" else ("qmdestroy", case.vmid)
        number = 100_000 + case.vmid
        upid = f"UPID:pve1:{number:08X}:{number:08X}:{now:08X}:{kind}:{vmid}:{TOKEN_ID}:"
        record: dict[str, Any] = {"upid": upid, "node": "pve1", "pid": number, "pstart": number, "starttime": now}
        record.update(type=kind, id=str(vmid), user=TOKEN_ID, status="running", log=[])
        if case.task == "running":
            self.running.append(upid)
        elif case.task != "unknown":
            record.update(status="stopped", endtime=now, exitstatus="OK" if case.task == "OK" else "it failed")
        if case.task != "unknown":
            self.lab.pve.tasks[upid] = record
            self.lab.pve.tasklog.append(record)
        return upid

    def end_tasks(self) -> None:
        """Stop the tasks that hang, as the messages say."""
        for upid in self.running:
            self.lab.pve.tasks[upid].update(
                status="stopped", exitstatus="interrupted by signal", endtime=int(time.time())
            )
        self.running.clear()

    def remove_by_hand(self, vmid: int) -> None:
        """Remove a VM that only a person may judge. Nobody's stranger is ever removed."""
        assert vmid not in self.strangers, f"somebody else's VM {vmid} is to be removed"
        if self.lab.pve.vm(vmid) is not None:
            self.lab.pve.remove_vm(vmid)

    def check_strangers(self) -> None:
        """Assert that every stranger's VM is as it was, and that no request touched it."""
        for vmid, before in self.strangers.items():
            vm = self.lab.pve.vm(vmid)
            assert vm is not None and {"config": vm.config, "status": vm.status} == before, self.cases[vmid].title
            assert self.lab.pve.touched(vmid) == [], self.cases[vmid].title

    def unfinished(self) -> list[str]:
        """Return the titles of all cases whose operation is still in the journal."""
        rows = self.lab.context().database.read(
            "SELECT s.vmid FROM operations o JOIN sandboxes s ON s.uuid = o.sandbox_uuid ORDER BY s.vmid"
        )
        return [self.cases[row["vmid"]].title for row in rows]
