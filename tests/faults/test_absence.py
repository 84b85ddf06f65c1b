# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Absence is proven, never inferred: what cannot be seen is not gone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.double import TOKEN_ID, Server
from support.lab import FakeClock, Lab
from support.proxmox_access import SANDBOX_PRIVS

pytestmark = pytest.mark.faults

NOTHING_LEFT = {"claims": [], "operations": []}


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    one_lab.pve.add_node("pve2")
    yield one_lab
    one_lab.check_promises()
    assert one_lab.pve.disks_lost == set()
    one_lab.pve.nodes.pop("pve2", None)
    one_lab.reset()


def everything(lab: Lab, sandbox: Sandbox, **options: Any) -> list[str]:
    """Whatever could conclude that the VM is gone; what each said."""
    said: list[str] = []
    works: list[Callable[[], Any]] = [
        lambda: lab.prune(dry_run=True, options=options),
        lambda: lab.prune(options=options),
        lambda: lab.destroy(sandbox.vmid, force=True, **options),
        partial(lab.reconcile, apply=False, **options),
        *[partial(lab.reconcile, **options)] * 3,
        partial(lab.expire, **options),
    ]
    for work in works:
        try:
            work()
        except AgentlabError as error:
            assert error.message
            said.append(error.message)
    return said


def unchanged(lab: Lab, before: Sandbox) -> None:
    """The record is as it was, and nothing at all was written to its VM."""
    now = lab.record(before)
    ignored = {"generation", "updated_at"}
    assert {k: v for k, v in dataclasses.asdict(now).items() if k not in ignored} == {
        k: v for k, v in dataclasses.asdict(before).items() if k not in ignored
    }
    assert lab.pve.touched(before.vmid) == []


def hide(lab: Lab, *hidden: int) -> None:
    for vmid in {9000, 500, *range(1000, 1010)} - set(hidden):
        lab.pve.grant(
            TOKEN_ID, f"/vms/{vmid}", "VM.Audit", "VM.Allocate", "VM.PowerMgmt", "VM.Config.Options", "VM.Clone"
        )
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")


# ---- hidden ----


def test_vm_hidden_by_permissions_is_not_gone(lab: Lab) -> None:
    ours = lab.timed_out()
    hide(lab, ours.vmid)
    report = lab.prune()
    assert [one.reason for one in report.kept] == ["unknown"] and not report.pruned
    assert "these credentials may not see VM 1000: grant VM.Audit on /vms" in (report.kept[0].message or "")
    everything(lab, ours)
    unchanged(lab, ours)
    lab.calm()
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]
    assert lab.leftovers() == NOTHING_LEFT


def test_many_vms_hidden_by_permissions_are_not_gone(lab: Lab) -> None:
    # More than a few are looked up in the list, which is trusted only if the token may see every VM.
    ours = [lab.timed_out(f"b{n}") for n in range(5)]
    hide(lab, *(one.vmid for one in ours))
    report = lab.prune()
    assert [one.reason for one in report.kept] == ["unknown"] * 5
    lab.reconcile()
    lab.reconcile()
    for one in ours:
        unchanged(lab, one)


def test_list_that_lost_entries_although_the_token_may_see_all(lab: Lab) -> None:
    ours = [lab.timed_out(f"b{n}") for n in range(5)]
    body = json.dumps({"data": [{"vmid": 500, "type": "qemu", "node": "pve1", "status": "running", "id": "qemu/500"}]})
    lab.pve.fault("GET", "/cluster/resources", "answer", status=200, body=body, times=99)
    report = lab.prune()
    assert [one.reason for one in report.kept] == ["unknown"] * 5 and not report.pruned
    lab.reconcile()
    lab.reconcile()
    for one in ours:
        unchanged(lab, one)


# ---- nodes ----


@pytest.mark.way(9)
@pytest.mark.parametrize("state", ["TIMEOUT", "RUNNING", "STOPPED"])
def test_vm_on_an_offline_node_is_kept_as_it_is(lab: Lab, state: str) -> None:
    ours = lab.timed_out()
    ours = lab.force_state(ours.vmid, state, lease_expires_at=int(time.time()) + 999)
    lab.pve.vm(ours.vmid).node = "pve2"
    lab.pve.set_node_offline("pve2")
    before = lab.record(ours)
    if state == "TIMEOUT":
        assert [one.reason for one in lab.prune(dry_run=True).kept] == ["node_offline"]
        assert [one.reason for one in lab.prune().kept] == ["node_offline"]
    assert lab.destroy(ours.vmid, force=True)[0].reason == "node_offline"
    assert [one.kind for one in lab.reconcile()] == ["node_offline"]
    everything(lab, ours)
    unchanged(lab, before)
    assert lab.leftovers() == NOTHING_LEFT
    lab.pve.set_node_offline("pve2", offline=False)
    assert lab.destroy(ours.vmid, force=True)[0].outcome == "destroyed"


@pytest.mark.way(8)
def test_migrated_vm_is_found_and_destroyed_where_it_is(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.vm(ours.vmid).node = "pve2"
    lab.pve.vm(9000).node = "pve1"
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]
    assert any("/nodes/pve2/" in line for line in lab.pve.touched(ours.vmid))


@pytest.mark.way(8)
def test_migrated_vm_updates_the_node_and_nothing_else(lab: Lab) -> None:
    ours = lab.create()
    lab.pve.requests.clear()
    lab.pve.vm(ours.vmid).node = "pve2"
    assert [(one.kind, one.applied) for one in lab.reconcile()] == [("moved", True)]
    now = lab.record(ours)
    assert (now.node, now.state, now.lease_expires_at) == ("pve2", "RUNNING", ours.lease_expires_at)
    assert lab.pve.touched(ours.vmid) == [] and lab.reconcile() == []


@pytest.mark.parametrize("path", ["/qemu/1000/config", "/status/stop", "PUT"])
def test_vm_that_migrates_in_the_middle_of_a_destroy(lab: Lab, path: str) -> None:
    ours = lab.create()
    moved: list[int] = []

    def move(method: str, where: str) -> None:
        if (method == path or (path != "PUT" and where.endswith(path))) and not moved:
            moved.append(1)
            lab.pve.vm(ours.vmid).node = "pve2"

    lab.pve.before = move
    outcome = lab.destroy(ours.vmid, force=True)[0]
    lab.check_promises()
    lab.pve.before = None
    if outcome.failed:
        assert lab.record(ours).live and outcome.message
        assert lab.destroy(ours.vmid, force=True)[0].outcome == "destroyed"
    assert lab.pve.vm(ours.vmid) is None and lab.leftovers() == NOTHING_LEFT


def test_vm_that_goes_while_reconcile_looks_at_it(lab: Lab) -> None:
    """It was there, and ours, when it was judged: nothing is concluded in this pass, and the others are looked at
    all the same.
    """
    gone, down = lab.create("gone"), lab.create("down")
    for one in (gone, down):
        lab.pve.power(one.vmid, "stopped")

    def remove(_method: str, where: str) -> None:
        if where.endswith(f"/qemu/{gone.vmid}/status/current") and lab.pve.vm(gone.vmid) is not None:
            lab.pve.remove_vm(gone.vmid)

    lab.pve.before = remove
    drifts = {one.sandbox.vmid: one for one in lab.reconcile() if one.sandbox}
    lab.pve.before = None
    assert (drifts[gone.vmid].kind, drifts[gone.vmid].applied) == ("unknown", False) and "does not exist" in str(
        drifts[gone.vmid].evidence
    )
    assert (lab.record(gone).state, lab.record(down).state) == ("RUNNING", "FAILED")
    lab.reconcile()
    lab.reconcile()
    assert lab.record(gone).state == "DESTROYED"


# ---- quorum ----


@pytest.mark.way(10)
@pytest.mark.parametrize("state", ["TIMEOUT", "RUNNING", "STOPPED"])
@pytest.mark.parametrize("there", [True, False])
def test_without_quorum_nothing_is_deleted_and_nothing_is_gone(lab: Lab, state: str, there: bool) -> None:
    ours = lab.timed_out(stopped=state != "RUNNING")
    ours = lab.force_state(ours.vmid, state, lease_expires_at=int(time.time()) + 999)
    if not there:
        lab.pve.vms.remove(lab.pve.vm(ours.vmid))
    before = lab.record(ours)
    lab.pve.lose_quorum()
    if state == "TIMEOUT":
        assert [one.reason for one in lab.prune().kept] == ["unknown"]
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert outcome.failed and "quorum" in (outcome.message or "")
    lab.reconcile(), lab.reconcile(), lab.prune(dry_run=True)
    assert [
        line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")
    ] == [] and lab.pve.disks_lost == set()
    now = lab.record(ours)
    assert (now.state, now.reason, now.absent_seen_at) == (before.state, before.reason, None)
    lab.pve.regain_quorum()
    assert lab.destroy(ours.vmid, force=True)[0].outcome == "destroyed"
    assert lab.leftovers() == NOTHING_LEFT


def test_reused_vmid_without_quorum_concludes_nothing(lab: Lab) -> None:
    ours = lab.timed_out()
    vm = lab.swap(ours.vmid)
    lab.pve.lose_quorum()
    assert [one.reason for one in lab.prune().kept] == ["unknown"]
    lab.reconcile()
    unchanged(lab, ours)
    lab.untouched(vm)


@pytest.mark.way(10)
def test_quorum_lost_while_the_status_still_says_quorate(lab: Lab) -> None:
    # For 24 seconds a real cluster says so: only the config write tells, and it comes before the delete.
    ours = lab.timed_out()

    def lose(method: str, path: str) -> None:
        lab.pve.quorate = path == "/api2/json/cluster/ha/status/current"

    lab.pve.before = lose
    report = lab.prune()
    assert not report.pruned and [one.reason for one in report.kept] == ["unknown"]
    assert "cannot be marked" in (report.kept[0].message or "")
    assert lab.pve.disks_lost == set() and not [
        line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")
    ]
    assert lab.record(ours).state == "TIMEOUT"
    lab.calm()
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


@pytest.mark.parametrize("cached", [0, 1])
def test_quorum_is_read_where_it_is_live(lab: Lab, cached: int) -> None:
    """/cluster/status comes from a cache: after `pvecm expected 1` it says 0 for minutes, after a cut it may say 1."""
    ours = lab.timed_out()
    lab.pve.cached_quorate = cached
    try:
        if cached:
            lab.pve.lose_quorum()
            assert [one.reason for one in lab.prune().kept] == ["unknown"]
            assert lab.pve.touched(ours.vmid) == []
        else:
            assert [one.reason for one in lab.prune().pruned] == ["destroyed"]
    finally:
        lab.pve.cached_quorate = None


# ---- the wrong cluster ----


@pytest.mark.way(12)
@pytest.mark.parametrize("count", [1, 5])
def test_records_of_another_cluster_conclude_nothing(lab: Lab, other_cluster: Server, count: int) -> None:
    ours = [lab.timed_out(f"b{n}") for n in range(count)]
    ctx = lab.context(server=other_cluster)
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy

    report = prune.run(ctx, prune.Selection())
    assert [one.reason for one in report.kept] == [
        "unknown"
    ] * count and "another cluster than that of these records" in (report.kept[0].message or "")
    for _dummy in range(2):
        assert not [one for one in reconcile.run(lab.context(server=other_cluster), apply=True) if one.applied]
    outcome = destroy.run(lab.context(server=other_cluster), [(ours[0], destroy.Request(force=True))])[0]
    assert outcome.failed and "another cluster than that of these records" in (outcome.message or "")
    with pytest.raises(Kept, match="another cluster than that of these records"):
        create.run(lab.context(server=other_cluster), create.Spec(name="new", ttl=60))
    for one in ours:
        unchanged(lab, one)
    assert not [line for line in other_cluster.pve.requests if line[0] != "GET"]


def test_stranger_at_our_vmid_on_another_cluster_does_not_end_the_record(lab: Lab, other_cluster: Server) -> None:
    ours = lab.timed_out()
    vm = other_cluster.pve.add_vm(
        ours.vmid, "theirs", status="running", config={"smbios1": "uuid=22222222-1111-4111-8111-111111111111"}
    )
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease

    assert [one.reason for one in prune.run(lab.context(server=other_cluster), prune.Selection()).kept] == ["unknown"]
    assert not [
        one
        for one in reconcile.run(lab.context(server=other_cluster), apply=True)
        if one.applied and one.kind != "still_running"
    ]
    lease.expire(lab.context(server=other_cluster))
    unchanged(lab, ours)
    assert other_cluster.pve.touched(vm.vmid) == [] and vm in other_cluster.pve.vms and vm.status == "running"


def test_cluster_without_a_readable_authority_is_not_ours(lab: Lab, other_cluster: Server) -> None:
    ours = lab.timed_out()
    other_cluster.pve.fail("GET", "/certificates/info", 403, "Permission check failed")
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune

    assert [one.reason for one in prune.run(lab.context(server=other_cluster), prune.Selection()).kept] == ["unknown"]
    unchanged(lab, ours)


# ---- broken answers ----

BROKEN = {
    "empty_list": {"body": '{"data":[]}'},
    "null": {"body": '{"data":null}'},
    "html": {"body": "<html>Login</html>", "type": "text/html"},
    "empty": {"body": ""},
    "object": {"body": '{"data":{}}'},
    "text": {"body": '{"data":"ok"}'},
    "numbers": {"body": '{"data":[1,2]}'},
    "other_rows": {"body": '{"data":[{"id":"x"}]}'},
    "no_data": {"body": "{}"},
    "bad_gateway": {"body": "<html>", "status": 502},
    "not_found": {"body": "<html>Not Found</html>", "status": 404},
    "forbidden": {"body": "", "status": 403},
    "gone": {"body": '{"data":null}', "status": 410},
    "does_not_exist": {"body": '{"data":null,"message":"Configuration file does not exist"}', "status": 500},
}
PATHS = [
    "/cluster/resources",
    "/ha/status/current",
    "/cluster/nextid",
    "/access/permissions",
    "/certificates/info",
    "/qemu/1000/config",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "broken", [pytest.param(one, marks=pytest.mark.way(12)) if one == "empty_list" else one for one in BROKEN]
)
def test_broken_answer_about_a_vm_that_is_there(lab: Lab, broken: str, path: str) -> None:
    ours = lab.timed_out()
    before = lab.record(ours)
    lab.pve.fault("GET", path, "answer", **{"status": 200, **BROKEN[broken]}, times=9999)
    for work in (lambda: lab.prune(dry_run=True), lab.reconcile, lab.reconcile):
        try:
            work()
        except AgentlabError as error:
            assert error.message
    # Without the list, the status or the configuration nothing may happen; a broken proof may at most delay what was
    # ours to delete.
    if path in ("/cluster/resources", "/ha/status/current", "/qemu/1000/config"):
        everything(lab, ours)
        assert lab.record(ours).state == before.state and lab.pve.touched(ours.vmid) == []
    else:
        try:
            lab.prune()
        except AgentlabError as error:
            assert error.message
        lab.check_promises()
    lab.calm()
    if lab.record(ours).live:
        lab.destroy(ours.vmid, force=True)
    assert lab.record(ours).state == "DESTROYED" and lab.pve.vm(ours.vmid) is None and lab.leftovers() == NOTHING_LEFT


@pytest.mark.parametrize("path", PATHS[:5])
@pytest.mark.parametrize("kind", ["truncate", "cut-before", "cut-after"])
@pytest.mark.parametrize("count", [1, 4])
def test_cut_answer_about_vms_that_are_there(lab: Lab, kind: str, path: str, count: int) -> None:
    ours = [lab.timed_out(f"b{n}") for n in range(count)]
    hide(lab, *(one.vmid for one in ours))
    lab.pve.fault("GET", path, kind, times=9999)
    for work in (lab.prune, lab.reconcile, lab.reconcile):
        try:
            work()
        except AgentlabError as error:
            assert error.message
    for one in ours:
        unchanged(lab, one)


@pytest.mark.parametrize("broken", BROKEN)
def test_nextid_that_answers_nonsense_proves_nothing(lab: Lab, broken: str) -> None:
    ours = lab.timed_out()
    hide(lab, ours.vmid)
    lab.pve.fault("GET", "/cluster/nextid", "answer", **{"status": 200, **BROKEN[broken]}, times=9999)
    everything(lab, ours)
    unchanged(lab, ours)


@pytest.mark.parametrize(
    "body", ['{"data":"1001"}', '{"data":100}', '{"data":true}', '{"data":"1000 "}', '{"data":["1000"]}']
)
def test_nextid_of_another_number_proves_nothing(lab: Lab, body: str) -> None:
    ours = lab.timed_out()
    hide(lab, ours.vmid)
    lab.pve.fault("GET", "/cluster/nextid", "answer", status=200, body=body, times=9999)
    everything(lab, ours)
    unchanged(lab, ours)


# ---- what is proven ----


@pytest.mark.parametrize("count", [1, 5])
def test_vm_that_is_really_gone_is_marked_by_prune(lab: Lab, count: int) -> None:
    ours = [lab.timed_out(f"b{n}") for n in range(count)]
    for one in ours:
        lab.pve.vms.remove(lab.pve.vm(one.vmid))
    lab.pve.counted.clear()
    assert [one.reason for one in lab.prune().pruned] == ["vm_absent"] * count
    # Quorum, the list, which cluster it is, whether the token sees everything (it may not), and each absence.
    assert lab.pve.count() <= 4 + count, dict(lab.pve.counted)
    assert lab.leftovers() == NOTHING_LEFT


def test_live_record_needs_two_passes_in_a_row(lab: Lab) -> None:
    ours = lab.create()
    vm = lab.pve.vm(ours.vmid)
    lab.pve.vms.remove(vm)
    lab.reconcile()
    assert lab.record(ours).state == "RUNNING" and lab.record(ours).absent_seen_at
    lab.pve.vms.append(vm)
    lab.reconcile()
    assert lab.record(ours).absent_seen_at is None
    lab.pve.vms.remove(vm)
    lab.reconcile()
    assert lab.record(ours).live
    lab.reconcile()
    assert (lab.record(ours).state, lab.record(ours).reason) == ("DESTROYED", "external")


@pytest.mark.parametrize("kind", ["absent", "vmid_reused", "stopped"])
def test_a_vm_that_is_restored_while_the_pass_is_busy_is_not_written_off(lab: Lab, kind: str) -> None:
    """The pass finds it gone, then stops a VM whose lease is over, which takes its time; what it found before that
    is looked at anew.
    """
    ours, late = lab.create("a1"), lab.create("late")
    vm = lab.pve.vm(ours.vmid)
    if kind == "stopped":
        lab.pve.power(ours.vmid, "stopped")
    else:
        lab.pve.vms.remove(vm)
    if kind == "absent":
        lab.reconcile()
        assert lab.record(ours).absent_seen_at
    elif kind == "vmid_reused":
        lab.pve.make_foreign(ours.vmid)
    lab.force_state(late.vmid, "RUNNING", lease_expires_at=int(time.time()) - 5)

    def restore(method: str, path: str) -> None:
        if method == "POST" and f"/qemu/{late.vmid}/status/" in path:
            if vm not in lab.pve.vms:
                lab.pve.remove_vm(ours.vmid)
                lab.pve.vms.append(vm)
            vm.status = vm.qmpstatus = "running"

    lab.pve.before = restore
    lab.reconcile()
    lab.pve.before = None
    assert vm in lab.pve.vms and lab.record(late).state == "TIMEOUT"
    lab.check_promises()
    assert lab.record(ours).state == "RUNNING"


def test_an_absence_is_not_proven_by_a_list_from_before_a_long_wait(lab: Lab) -> None:
    """Five that are gone, and one whose stop takes a minute and then fails: meanwhile somebody restores one of the
    five.
    """
    ours, late = [lab.timed_out(f"b{number}") for number in range(5)], lab.timed_out("late", stopped=False)
    lab.pve.grant(TOKEN_ID, "/", "VM.Audit", "Sys.Audit")
    lab.pve.grant(TOKEN_ID, "/vms", *SANDBOX_PRIVS)
    vm = lab.pve.vm(ours[2].vmid)
    for one in ours:
        lab.pve.vms.remove(lab.pve.vm(one.vmid))
    lab.pve.task_endings["qmstop"] = "the disk is on fire"
    before, clock = lab.clock, FakeClock()

    def restore(method: str, path: str) -> None:
        if method == "POST" and "/status/stop" in path and vm not in lab.pve.vms:
            clock.pass_time(60)
            lab.pve.vms.append(vm)

    lab.pve.before, lab.clock = restore, clock
    try:
        report = lab.prune()
    finally:
        lab.pve.before, lab.clock = None, before
    assert vm in lab.pve.vms and {one.vmid for one in report.pruned} == {one.vmid for one in ours} - {vm.vmid}, report
    assert lab.record(ours[2]).live and lab.record(late).live
    lab.calm()
    assert [one.outcome for one in lab.destroy(vm.vmid, late.vmid, force=True)] == ["destroyed"] * 2 and lab.pve.vm(
        vm.vmid
    ) is None


def test_a_reused_vmid_is_written_down_when_it_is_seen_and_not_when_others_are_done(lab: Lab) -> None:
    ours, slow = lab.create("a1"), lab.create("slow")
    lab.swap(ours.vmid)
    seen: list[str] = []
    lab.pve.before = lambda method, path: (
        seen.append(lab.record(ours).state) if method == "POST" and "/status/stop" in path else None
    )
    assert [one.reason for one in lab.destroy(ours.vmid, slow.vmid, force=True, connections=1)] == [
        "vmid_reused",
        "destroyed",
    ]
    assert seen == ["DESTROYED"]


def test_many_absences_at_once_write_nothing(lab: Lab) -> None:
    ours = [lab.create(f"b{n}") for n in range(6)]
    for one in ours:
        lab.pve.vms.remove(lab.pve.vm(one.vmid))
    for _dummy in range(2):
        with pytest.raises(AgentlabError, match="6 of 6 sandboxes are absent at once"):
            lab.reconcile()
    assert all(lab.record(one).state == "RUNNING" and lab.record(one).absent_seen_at is None for one in ours)
