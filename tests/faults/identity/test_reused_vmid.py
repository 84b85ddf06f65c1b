# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VMID that a stranger has now: no operation in any state touches his VM."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

from support.lab import Lab
from support.strangers import EVERYDAY, STRANGERS, strangers, try_everything

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("stranger", strangers(way=1))
def test_prune_of_a_reused_vmid_marks_the_record_and_leaves_the_stranger(lab: Lab, stranger: str) -> None:
    ours = lab.timed_out()
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    report = lab.prune()
    assert (
        [(one.vmid, one.reason) for one in report.pruned] == [(ours.vmid, "vmid_reused")]
        and not report.kept
        and not report.failed
    )
    assert lab.record(ours).state == "DESTROYED" and lab.record(ours).reason == "vmid_reused"
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")
    assert lab.leftovers() == {"claims": [], "operations": []}


@pytest.mark.parametrize("stranger", strangers(way=2))
def test_force_on_a_reused_vmid_marks_the_record_and_leaves_the_stranger(lab: Lab, stranger: str) -> None:
    ours = lab.create()
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason, outcome.failed) == ("destroyed", "vmid_reused", False)
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")


def test_check_mode_announces_no_destroy_of_a_strangers_vm(lab: Lab) -> None:
    ours, other = lab.create("a1"), lab.create("a2")
    lab.swap(ours.vmid, **STRANGERS[EVERYDAY])
    ctx = lab.context(dry_run=True)
    planned = destroy.destroy_several(ctx, [ctx.select_sandbox(ours.vmid), ctx.select_sandbox(other.vmid)], force=True)
    assert [(item.outcome, item.reason, item.state) for item in planned] == [
        ("would_mark_destroyed", "vmid_reused", "DESTROYED"),
        ("would_destroy", "destroyed", "DESTROYED"),
    ]
    assert lab.record(ours).state == "RUNNING"


@pytest.mark.parametrize("stranger", strangers(way=3))
def test_lease_expiry_of_a_reused_vmid_stops_nobody(lab: Lab, stranger: str) -> None:
    ours = lab.create()
    lab.force_state(ours.vmid, "RUNNING", lease_expires_at=int(time.time()) - 5)
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    found = lab.expire()
    assert [one.state for one in found.expired] == ["TIMEOUT"] and "another VM" in (found.expired[0].message or "")
    lab.reconcile()
    lab.prune()
    assert lab.record(ours).state == "DESTROYED"
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")


@pytest.mark.parametrize("state", ["READY", "RUNNING", "SUSPENDED", "COMPLETED", "FAILED", "TIMEOUT", "STOPPED"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_no_operation_in_any_state_touches_a_stranger(lab: Lab, state: str, stranger: str) -> None:
    ours = lab.create()
    lab.force_state(ours.vmid, state, lease_expires_at=int(time.time()) - 5)
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    before = dict(vm.config)
    try_everything(lab, ours)
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")
    assert vm.config == before
    assert lab.record(ours).state == "DESTROYED"
    assert lab.leftovers() == {"claims": [], "operations": []}


@pytest.mark.parametrize("phase", ["reserved", "cloning", "waiting", None])
@pytest.mark.parametrize("state", ["REQUESTED", "PROVISIONING"])
@pytest.mark.parametrize("stranger", strangers(way=4))
def test_start_up_sweep_over_a_stale_creation_whose_vmid_was_reused(
    lab: Lab, state: str, phase: str | None, stranger: str
) -> None:
    ours = lab.create()
    lab.force_state(ours.vmid, state, age=7200, smbios_uuid=None)
    journal(lab, ours, phase, at=int(time.time()) - 7200)
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    lab.reconcile()
    lab.reconcile()
    assert lab.record(ours).state == "FAILED"
    lab.untouched(vm)
    try_everything(lab, ours)
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")


def journal(lab: Lab, sandbox: Sandbox, phase: str | None, *, at: int, **detail: Any) -> None:
    """As a killed creation would have left it: with a journal entry, or (None) without."""
    import json

    detail = {"template": 9000, "template_node": "pve1", "node": "pve1", **detail}
    ctx = lab.context()

    def work(conn: Any) -> None:
        conn.execute("DELETE FROM operations WHERE sandbox_uuid = ?", (sandbox.uuid,))
        if phase:
            conn.execute(
                "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) VALUES (?, "
                "'create', ?, ?, 'x', ?, ?)",
                (sandbox.uuid, phase, json.dumps(detail), at, at),
            )

    ctx.database.write(work)


def test_every_request_that_changes_a_vm_names_one_of_ours(lab: Lab) -> None:
    """A whole life of three sandboxes among strangers: nothing but their own VMIDs is ever written to."""
    for vmid in (1001, 1003):
        lab.pve.make_foreign(vmid, running=True, tags="agentlab")
    made = [lab.create(f"b{n}") for n in range(3)]
    lab.power("stop", made[0].vmid)
    lab.power("start", made[0].vmid)
    lab.destroy(*(one.vmid for one in made), force=True)
    lab.prune()
    lab.reconcile()
    written = {
        int(found[1])
        for method, path, _dummy in lab.pve.requests
        if method != "GET" and (found := re.search(r"/qemu/(\d+)", path))
    }
    assert written == {9000, *(one.vmid for one in made)}
    assert {
        path.rpartition("/")[2]
        for method, path, _dummy in lab.pve.requests
        if method != "GET" and "/qemu/9000/" in path
    } == {"clone"}


def test_two_databases_on_one_cluster_leave_each_other_in_peace(lab: Lab) -> None:
    """Each has a vmid_range of its own; the marker of a VM names the database with its record."""

    def use(name: str) -> dict[str, Any]:
        lab.database = os.path.join(lab.folder, f"{name}-{uuid.uuid4()}", "agentlab.db")
        return {"vmid_range": {"one": "1000-1099", "two": "1100-1199"}[name]}

    first_range = use("one")
    first_database = lab.database
    first = lab.create("a1", options=first_range)
    second_range = use("two")
    second_database = lab.database
    second = lab.create("a1", options=second_range)
    assert (first.vmid, second.vmid) == (1000, 1100)
    ids = []
    for database, vmid_range, own in ((first_database, first_range, first), (second_database, second_range, second)):
        lab.database = database
        assert lab.reconcile(**vmid_range) == []
        ids.append(lab.context().records.read_database_id())
        assert [shown["identity"] for shown in lab.info()["sandboxes"]] == ["MATCH"] and lab.record(
            own
        ).state == "RUNNING"
    assert len(set(ids)) == 2 and None not in ids
    # Each still sees what it lost itself, wherever that is, and what is in its range.
    lab.database = first_database
    config = dict(lab.pve.vm(first.vmid).config)
    lab.pve.add_vm(777, "restored", config={**config, "smbios1": "uuid=33333333-1111-4111-8111-111111111111"})
    lab.pve.add_vm(
        1050, "lost", config={**lab.pve.vm(second.vmid).config, "smbios1": "uuid=33333333-1111-4111-8111-111111111112"}
    )
    drifts = {drift.vmid: drift for drift in lab.reconcile(**first_range)}
    assert sorted(drifts) == [777, 1050] and {drift.kind for drift in drifts.values()} == {"unrecorded"}
    assert drifts[777].evidence["databases"] == [] and drifts[1050].evidence["databases"] == [ids[1]]
    assert (
        "another database made this VM" not in drifts[777].action
        and "another database made this VM" in drifts[1050].action
    )
    lab.database = second_database
    assert [drift.vmid for drift in lab.reconcile(**second_range)] == [1050]
    # Markers of older releases name no database: nobody knows whose the VM is, so both report it.
    lab.pve.remove_vm(777)
    lab.pve.remove_vm(1050)
    lab.pve.add_vm(778, "older", config={"description": identity.make_marker(first.uuid), "tags": "agentlab"})
    assert [drift.vmid for drift in lab.reconcile(**second_range)] == [778]
    lab.destroy(second.vmid, force=True, **second_range)
    assert lab.pve.vm(first.vmid) is not None and lab.pve.vm(second.vmid) is None
    lab.pve.remove_vm(778)
