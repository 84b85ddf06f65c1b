# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Proxmox says of a VM's power counts: a VM that somebody else switched, paused or hibernated is brought to
what is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    ApiError,
    Kept,
    StateConflict,
    TaskFailed,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

from support.lab import Lab

pytestmark = pytest.mark.faults

NOTHING_LEFT = {"claims": [], "operations": []}
RUNNING, PAUSED, STOPPED, HIBERNATED = "running", "paused", "stopped", "hibernated"
FOUND = {RUNNING: "RUNNING", PAUSED: "SUSPENDED", STOPPED: "STOPPED", HIBERNATED: "SUSPENDED"}
WANTED = {"start": "RUNNING", "stop": "STOPPED", "suspend": "SUSPENDED"}


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    yield one_lab
    one_lab.check_promises()
    assert one_lab.leftovers() == NOTHING_LEFT


def switch(lab: Lab, vmid: int, to: str) -> None:
    """Somebody else brings the VM there; the record knows nothing of it."""
    vm = lab.pve.vm(vmid)
    if to == HIBERNATED:
        lab.pve.hibernate(vmid)
    else:
        lab.pve.power(vmid, STOPPED if to == STOPPED else RUNNING)
        vm.qmpstatus = "paused" if to == PAUSED else vm.status


def power_of(lab: Lab, vmid: int) -> str:
    vm = lab.pve.vm(vmid)
    return HIBERNATED if vm.lock == "suspended" else PAUSED if vm.qmpstatus == "paused" else str(vm.status)


def sandbox(lab: Lab, record: str, vm: str) -> int:
    made = lab.create()
    if record in ("STOPPED", "SUSPENDED"):
        lab.power("stop" if record == "STOPPED" else "suspend", made.vmid)
    switch(lab, made.vmid, vm)
    lab.pve.counted.clear()
    lab.pve.requests.clear()
    return made.vmid


@pytest.mark.parametrize("operation", ["start", "stop", "suspend"])
@pytest.mark.parametrize("vm", [RUNNING, PAUSED, STOPPED, HIBERNATED])
@pytest.mark.parametrize("record", ["RUNNING", "SUSPENDED", "STOPPED"])
def test_the_vm_is_brought_to_what_is_asked_and_the_record_with_it(
    lab: Lab, record: str, vm: str, operation: str
) -> None:
    vmid = sandbox(lab, record, vm)
    before = len(lab.events(lab.record(vmid)))
    if operation == "suspend" and vm == STOPPED:
        # There is no way there but through a start that nobody asked for.
        with pytest.raises(
            StateConflict, match="cannot suspend sandbox in STOPPED state. Valid states: READY, RUNNING, SUSPENDED"
        ):
            lab.power(operation, vmid)
        assert lab.record(vmid).state == "STOPPED" and power_of(lab, vmid) == STOPPED and lab.pve.touched(vmid) == []
        return
    if operation == "stop" and vm == HIBERNATED:
        with pytest.raises(Kept, match="is hibernated") as refused:
            lab.power(operation, vmid)
        assert refused.value.remedy == "discard_memory"
        assert power_of(lab, vmid) == HIBERNATED and lab.pve.touched(vmid) == []
        assert lab.record(vmid).state == "SUSPENDED"
        done = lab.power(operation, vmid, force=True)
        assert not [name for name in lab.pve.vm(vmid).config if name in ("vmstate", "lock", "runningmachine")]
    else:
        done = lab.power(operation, vmid)
    wanted = WANTED[operation]
    assert lab.record(vmid).state == wanted == FOUND[power_of(lab, vmid)]
    nothing = record == wanted == FOUND[vm]
    past = {"start": "started", "stop": "stopped", "suspend": "suspended"}[operation]
    assert done.changed is not nothing and done.outcome == ("unchanged" if nothing else past)
    events = lab.events(lab.record(vmid))[before:]
    if FOUND[vm] != record:
        assert next(one["reason"] for one in events if one["from_state"] != one["to_state"]) == "external"
    if nothing:
        assert sum(lab.pve.counted.values()) == 2 and not events
    elif FOUND[vm] == wanted:
        assert lab.pve.touched(vmid) == []
    # Again: nothing is to be done, by two requests.
    lab.pve.counted.clear()
    assert lab.power(operation, vmid).outcome == "unchanged"
    assert sum(lab.pve.counted.values()) == 2


@pytest.mark.parametrize("record", ["RUNNING", "STOPPED"])
@pytest.mark.parametrize("run_state", ["paused", "suspended", "prelaunch", "io-error"])
def test_a_guest_that_stands_still_is_suspended(lab: Lab, record: str, run_state: str) -> None:
    """QEMU stands still, and a resume lets it go on; Proxmox VE calls its status ``running`` and its start fails."""
    vmid = sandbox(lab, record, RUNNING)
    lab.pve.vm(vmid).qmpstatus = run_state
    if record == "STOPPED":
        plain = lab.destroy(vmid)[0]
        assert plain.failed and "cannot destroy sandbox in SUSPENDED state" in str(plain.message)
    assert lab.power("suspend", vmid).state == "SUSPENDED" and lab.pve.touched(vmid) == []
    lab.force_state(vmid, record)
    assert lab.power("start", vmid).state == "RUNNING" and lab.pve.vm(vmid).qmpstatus == "running"
    lab.pve.vm(vmid).qmpstatus = run_state
    assert lab.power("stop", vmid).state == "STOPPED" and power_of(lab, vmid) == STOPPED


@pytest.mark.parametrize("lock", ["backup", "suspending"])
def test_a_lock_that_bars_an_operation_does_not_bar_the_record(lab: Lab, lock: str) -> None:
    vmid = sandbox(lab, "STOPPED", RUNNING)
    lab.pve.vm(vmid).lock = lab.pve.vm(vmid).config["lock"] = lock
    with pytest.raises(Kept, match=f"lock.*{lock}"):
        lab.power("stop", vmid)
    assert lab.record(vmid).state == "RUNNING" and lab.pve.touched(vmid) == []


@pytest.mark.parametrize("record", ["COMPLETED", "FAILED", "TIMEOUT"])
@pytest.mark.parametrize("vm", [RUNNING, PAUSED, STOPPED])
def test_a_job_that_ended_is_stopped_however_its_vm_is(lab: Lab, record: str, vm: str) -> None:
    vmid = sandbox(lab, "RUNNING", vm)
    lab.force_state(vmid, record)
    with pytest.raises(StateConflict, match=f"cannot start sandbox in {record} state"):
        lab.power("start", vmid)
    assert lab.power("stop", vmid).state == "STOPPED" and power_of(lab, vmid) == STOPPED
    assert lab.power("start", vmid).state == "RUNNING"


@pytest.mark.parametrize("operation", ["start", "stop", "suspend"])
def test_check_mode_looks_and_writes_nothing(lab: Lab, operation: str) -> None:
    vmid = sandbox(
        lab,
        {"start": "RUNNING", "stop": "STOPPED", "suspend": "SUSPENDED"}[operation],
        STOPPED if operation == "start" else RUNNING,
    )
    done = lab.power(operation, vmid, dry_run=True)
    assert done.outcome == f"would_{operation}" and done.changed and lab.pve.touched(vmid) == []


@pytest.mark.parametrize("operation", ["start", "stop", "suspend"])
def test_a_stranger_at_the_vmid_is_left_alone(lab: Lab, operation: str) -> None:
    vmid = sandbox(lab, {"start": "RUNNING", "stop": "STOPPED", "suspend": "SUSPENDED"}[operation], RUNNING)
    foreign = lab.swap(vmid, running=True)
    with pytest.raises(Kept, match="now belongs to another VM"):
        lab.power(operation, vmid)
    lab.untouched(foreign, status="running")


def test_a_vm_that_moved_is_found(lab: Lab) -> None:
    vmid = sandbox(lab, "RUNNING", STOPPED)
    lab.pve.move_vm(vmid, "pve2")
    assert lab.power("start", vmid).state == "RUNNING"
    assert lab.record(vmid).node == "pve2" and power_of(lab, vmid) == RUNNING


@pytest.mark.parametrize(
    "answer", ['{"data": {}}', '{"data": {"status": "unknown"}}', '{"data": {"status": null}}', '{"data": []}']
)
def test_a_power_state_that_is_not_known_changes_nothing(lab: Lab, answer: str) -> None:
    vmid = sandbox(lab, "RUNNING", RUNNING)
    lab.pve.fault("GET", "/status/current", "answer", status=200, body=answer, times=9)
    with pytest.raises(Kept) as kept:
        lab.power("start", vmid)
    assert kept.value.reason == "unknown" and lab.record(vmid).state == "RUNNING" and lab.pve.touched(vmid) == []


# ---- plain destroy ----


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("vm", [RUNNING, PAUSED, HIBERNATED])
def test_a_plain_destroy_is_refused_in_the_words_for_the_state_the_vm_is_in(lab: Lab, vm: str, dry_run: bool) -> None:
    vmid = sandbox(lab, "STOPPED", vm)
    ctx = lab.context(dry_run=dry_run)
    done = destroy.destroy_several(ctx, [ctx.select_sandbox(vmid)], False)[0]
    assert done.failed and done.reason == "state_conflict"
    assert done.message == f"cannot destroy sandbox in {FOUND[vm]} state. Valid states: STOPPED, DESTROYED"
    assert done.remedy == "force"
    assert lab.record(vmid).state == "STOPPED" and power_of(lab, vmid) == vm and lab.pve.touched(vmid) == []
    assert lab.destroy(vmid, force=True)[0].state == "DESTROYED"
    assert lab.pve.vm(vmid) is None and lab.pve.volumes_of(vmid) == []


def test_a_vm_that_is_started_directly_before_its_delete_is_not_stopped_by_a_plain_destroy(lab: Lab) -> None:
    vmid = sandbox(lab, "STOPPED", STOPPED)

    def start(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{vmid}/config"):
            lab.pve.before = None
            lab.pve.power(vmid, "running")

    lab.pve.before = start
    done = lab.destroy(vmid)[0]
    assert done.failed and "cannot destroy sandbox in RUNNING state" in str(done.message)
    assert power_of(lab, vmid) == RUNNING
    assert lab.destroy(vmid, force=True)[0].state == "DESTROYED"


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "TIMEOUT"])
def test_a_hibernated_vm_is_destroyed_with_its_saved_memory(lab: Lab, state: str) -> None:
    vmid = sandbox(lab, "RUNNING", HIBERNATED)
    lab.force_state(vmid, state)
    if state == "TIMEOUT":
        assert [one.reason for one in lab.prune().pruned] == ["destroyed"]
    else:
        assert lab.destroy(vmid, force=True)[0].state == "DESTROYED"
    assert lab.pve.vm(vmid) is None and lab.pve.volumes_of(vmid) == []


# ---- hibernation ----


def test_a_save_that_failed_names_the_way_out(lab: Lab) -> None:
    vmid = sandbox(lab, "RUNNING", RUNNING)
    vm = lab.pve.vm(vmid)
    vm.lock = vm.config["lock"] = "suspending"
    assert lab.power("start", vmid).outcome == "unchanged"
    for work in (lambda: lab.power("stop", vmid), lambda: lab.power("suspend", vmid)):
        with pytest.raises(Kept, match=f"only root can take the lock away \\(qm unlock {vmid}"):
            work()
    assert f"qm unlock {vmid}" in str(lab.destroy(vmid, force=True)[0].message)
    vm.lock = None
    del vm.config["lock"]
    assert lab.destroy(vmid, force=True)[0].state == "DESTROYED"


def test_the_lease_of_a_hibernated_sandbox_ends_like_any_other(lab: Lab) -> None:
    vmid = sandbox(lab, "RUNNING", HIBERNATED)
    lab.force_state(vmid, "RUNNING", lease_expires_at=1)
    assert [one.message for one in lab.expire().expired] == [None]
    assert lab.record(vmid).state == "TIMEOUT" and power_of(lab, vmid) == HIBERNATED


def test_the_lease_of_a_paused_sandbox_ends_like_any_other(lab: Lab) -> None:
    vmid = sandbox(lab, "RUNNING", PAUSED)
    lab.force_state(vmid, "RUNNING", lease_expires_at=1)
    assert [one.message for one in lab.expire().expired] == [None]
    assert power_of(lab, vmid) == STOPPED


@pytest.mark.parametrize(
    ("record", "vm", "state"),
    [
        ("RUNNING", HIBERNATED, "SUSPENDED"),
        ("STOPPED", HIBERNATED, "SUSPENDED"),
        ("SUSPENDED", HIBERNATED, "SUSPENDED"),
        ("SUSPENDED", STOPPED, "STOPPED"),
        ("SUSPENDED", RUNNING, "RUNNING"),
        ("SUSPENDED", PAUSED, "SUSPENDED"),
    ],
)
def test_reconcile_and_verify_know_hibernation(lab: Lab, record: str, vm: str, state: str) -> None:
    vmid = sandbox(lab, record, vm)
    told = next(one for one in lab.info()["sandboxes"] if one["vmid"] == vmid)
    assert told["vm_status"] == (HIBERNATED if vm == HIBERNATED else STOPPED if vm == STOPPED else RUNNING)
    if vm in (HIBERNATED, STOPPED):
        assert bool(told["drift"]) is (record != state)
    drifts = lab.reconcile()
    assert [one.applied for one in drifts] == ([] if record == state else [True])
    assert lab.record(vmid).state == state and lab.pve.touched(vmid) == []
    assert lab.reconcile() == []


# ---- what is refused leaves nothing to finish ----


@pytest.mark.parametrize("operation", ["start", "stop", "suspend"])
@pytest.mark.parametrize("how", ["refused", "failed"])
def test_a_request_that_is_refused_leaves_nothing_unfinished(lab: Lab, operation: str, how: str) -> None:
    vmid = sandbox(lab, "STOPPED" if operation == "start" else "RUNNING", STOPPED if operation == "start" else RUNNING)
    action = {"start": "start", "stop": "shutdown", "suspend": "suspend"}[operation]
    if how == "refused":
        lab.pve.fail("POST", f"/nodes/pve1/qemu/{vmid}/status/{action}", 500, "cluster not ready - no quorum?", times=9)
    else:
        lab.pve.next_task(
            {"suspend": "qmpause"}.get(action, f"qm{action}"),
            "fail",
            text="MAX 2 vcpus allowed per VM on this node",
            times=9,
        )
    with pytest.raises((ApiError, TaskFailed)) as refused:
        lab.power(operation, vmid)
    if (operation, how) == ("start", "refused"):
        assert "the cluster has no quorum" in refused.value.message
    assert lab.leftovers() == NOTHING_LEFT
    assert lab.events(lab.record(vmid))[-1]["outcome"] == "failed"
    lab.calm()
    lab.pve.clear_faults()
    lab.power(operation, vmid)


def test_several_starts_at_once_start_the_vm_once(lab: Lab) -> None:
    vmid = sandbox(lab, "RUNNING", STOPPED)
    ctx: Any = lab.context()
    done = ctx.run_each(lambda _n: lab.power("start", vmid, claim_timeout="20s"), [1, 2, 3])
    assert sorted(one.outcome for one in done) == ["started", "unchanged", "unchanged"]
    assert len([line for line in lab.pve.touched(vmid) if line.startswith("POST")]) == 1


# ---- a lease that ends over a VM that is not there ----


@pytest.mark.parametrize("how", ["gone", "stranger"])
def test_a_pass_that_repairs_all_there_is_reports_no_failure(lab: Lab, how: str) -> None:
    vmid = sandbox(lab, "RUNNING", RUNNING)
    foreign = lab.swap(vmid, running=True) if how == "stranger" else lab.pve.remove_vm(vmid)
    lab.force_state(vmid, "RUNNING", lease_expires_at=1)
    drifts = lab.reconcile()
    assert drifts and all(one.applied and one.error is None for one in drifts), drifts
    lab.reconcile()
    assert lab.record(vmid).state == "DESTROYED"
    if how == "stranger":
        lab.untouched(foreign, status="running")
