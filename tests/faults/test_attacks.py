# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The core read as an attacker would: each test is a hole that was suspected.

Those that were holes failed before they were mended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import model
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    Busy,
    CreationFailed,
    Kept,
    OutcomeUnknown,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy

from faults.attack_support import NOTHING_LEFT, marked, try_all, two_nodes
from support.double import TOKEN_ID
from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    with two_nodes(one_lab):
        yield one_lab


# ---- what the list says ----


@pytest.mark.parametrize("kind", [None, "", "storage", "openvz", 1])
def test_an_entry_of_the_list_that_is_neither_vm_nor_container_concludes_nothing(lab: Lab, kind: Any) -> None:
    ours = lab.timed_out()
    row = {"vmid": ours.vmid, "node": "pve1", "status": "running", **({} if kind is None else {"type": kind})}
    lab.pve.fault("GET", "/cluster/resources", "answer", status=200, body=json.dumps({"data": [row]}), times=999)
    try_all(lab, ours.vmid)
    assert lab.record(ours).state == "TIMEOUT" and lab.pve.touched(ours.vmid) == []
    lab.calm()
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_a_list_that_calls_our_vm_a_container_concludes_nothing(lab: Lab) -> None:
    ours = lab.timed_out()
    row = {"vmid": str(ours.vmid), "node": "pve1", "status": "running", "type": "lxc"}
    lab.pve.fault("GET", "/cluster/resources", "answer", status=200, body=json.dumps({"data": [row]}), times=999)
    try_all(lab, ours.vmid)
    assert lab.record(ours).state == "TIMEOUT" and lab.pve.touched(ours.vmid) == []


def test_a_container_on_an_offline_node_is_not_read_and_ends_no_record(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.vms.remove(lab.pve.vm(ours.vmid))
    container = lab.pve.add_ct(ours.vmid, "theirs", status="running", node="pve2")
    lab.pve.set_node_offline("pve2")
    try:
        assert [one.reason for one in lab.prune().kept] == ["node_offline"]
        assert lab.record(ours).state == "TIMEOUT"
        lab.pve.set_node_offline("pve2", offline=False)
        assert [one.reason for one in lab.prune().pruned] == ["vmid_reused"]
        assert container in lab.pve.cts and container.status == "running"
    finally:
        lab.pve.cts.remove(container)


def test_vmids_and_flags_as_text_are_understood(lab: Lab) -> None:
    lab.timed_out()
    listed = lab.pve._resources

    async def resources(request: Any) -> Any:
        response = await listed(request)
        data = json.loads(response.text)["data"]
        return web.json_response(
            {"data": [{**item, "vmid": str(item.get("vmid"))} if "vmid" in item else item for item in data]}
        )

    lab.pve._resources = resources
    try:
        assert [one.reason for one in lab.prune().pruned] == ["destroyed"]
    finally:
        lab.pve._resources = listed


# ---- what the configuration says ----


@pytest.mark.parametrize("lock", ["create", "clone"])
def test_a_vm_that_is_just_being_made_at_our_vmid_is_not_judged_yet(lab: Lab, lock: str) -> None:
    """While a restore or a clone runs the configuration holds nothing yet: it may become our own VM, restored from
    its backup.
    """
    ours = lab.timed_out()
    whole = dict(lab.pve.vm(ours.vmid).config)
    vm = lab.swap(ours.vmid, lock=lock)
    vm.config = {"lock": lock}
    for _dummy in range(2):
        try_all(lab, ours.vmid)
        assert [one.reason for one in lab.prune().kept] == ["locked"]
    assert lab.record(ours).state == "TIMEOUT"
    lab.untouched(vm)
    vm.config, vm.lock = whole, None
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


@pytest.mark.parametrize("change", ["crlf", "upper_smbios", "base64", "blanks", "notes_around", "upper_marker"])
def test_our_vm_is_known_however_it_is_written(lab: Lab, change: str) -> None:
    ours = lab.timed_out()
    config = lab.pve.vm(ours.vmid).config
    if change == "crlf":
        config["description"] = config["description"].replace("\n", "\r\n") + "\r\nadded in the web interface\r\n"
    elif change == "upper_smbios":
        config["smbios1"] = f"uuid={str(ours.smbios_uuid).upper()}"
    elif change == "base64":
        config["smbios1"] = f"base64=1,manufacturer=QWdlbnRMYWI=,serial=dXVpZD1u,uuid={ours.smbios_uuid},product=eA=="
    elif change == "blanks":
        config["description"] = "  \n\n" + config["description"]
    elif change == "notes_around":
        config["description"] = f"# Notes\n* [link](https://example.org)\n{config['description']}\n* 100 % ours; a&b=c"
    else:
        config["description"] = config["description"].replace(ours.uuid, ours.uuid.upper())
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_a_description_with_the_markers_of_two_records_is_nobodys(lab: Lab) -> None:
    first, second = lab.timed_out("a1"), lab.timed_out("a2")
    for one in (first, second):
        lab.pve.vm(one.vmid).config["description"] = (
            identity.make_marker(first.uuid) + "\n" + identity.make_marker(second.uuid)
        )
    lab.pve.requests.clear()
    try_all(lab, first.vmid, second.vmid)
    assert [one.reason for one in lab.prune().kept] == ["ambiguous"] * 2
    assert [lab.record(one).state for one in (first, second)] == ["TIMEOUT"] * 2
    assert lab.pve.touched(first.vmid) == lab.pve.touched(second.vmid) == []


def test_two_records_whose_vms_changed_places_are_both_left_alone(lab: Lab) -> None:
    first, second = lab.timed_out("a1"), lab.timed_out("a2")
    one, two = lab.pve.vm(first.vmid), lab.pve.vm(second.vmid)
    one.config, two.config = two.config, one.config
    lab.pve.requests.clear()
    report = lab.prune()
    # Each VM is ours, but neither is where its record says: both records end, and reconcile reports the VMs.
    assert [one.reason for one in report.pruned] == ["vmid_reused"] * 2
    assert lab.pve.touched(first.vmid) == lab.pve.touched(second.vmid) == []
    assert one in lab.pve.vms and two in lab.pve.vms
    lab.pve.vms.remove(one), lab.pve.vms.remove(two)


def test_a_description_over_the_limit_keeps_its_marker(lab: Lab) -> None:
    """An administrator wrote more into the configuration file than the API takes, and our line stands at its end."""
    ours = lab.timed_out()
    lab.pve.vm(ours.vmid).config["description"] = "x" * 9000 + "\n" + identity.make_marker(ours.uuid)
    lab.pve.fail("DELETE", f"/qemu/{ours.vmid}", 500, "storage is on fire", times=9)
    lab.prune()
    assert marked(lab, ours) == [ours.vmid], "the mark before the delete cost the VM its marker"
    assert len(lab.pve.vm(ours.vmid).config["description"]) <= 8192
    lab.calm()
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


@pytest.mark.parametrize("value", [1, "1", True, "on", "yes", "true"])
@pytest.mark.parametrize("key", ["protection", "template"])
def test_protection_and_template_are_respected_however_they_are_written(lab: Lab, key: str, value: Any) -> None:
    ours = lab.timed_out()
    lab.pve.vm(ours.vmid).config[key] = value
    lab.pve.requests.clear()
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.destroy(ours.vmid, force=True)[0].reason == "protected"
    assert lab.pve.touched(ours.vmid) == [] and lab.pve.vm(ours.vmid) is not None


@pytest.mark.parametrize("when", ["PUT", "DELETE"])
def test_a_vm_locked_for_its_backup_in_the_middle_is_kept_as_locked(lab: Lab, when: str) -> None:
    ours = lab.timed_out()

    def lock(method: str, path: str) -> None:
        if method == when and path.rstrip("/config").endswith(f"/qemu/{ours.vmid}"):
            lab.pve.snapshot_lock(ours.vmid, "backup")

    lab.pve.before = lock
    report = lab.prune()
    found = report.kept + report.failed
    assert not report.pruned and "backup" in (found[0].message or ""), found
    assert lab.record(ours).state == "TIMEOUT" and lab.pve.vm(ours.vmid) is not None
    assert lab.leftovers() == NOTHING_LEFT
    lab.pve.before = None
    assert [one.reason for one in lab.prune().kept] == ["locked"]
    lab.pve.unlock(ours.vmid)
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_a_vm_made_a_template_between_judging_and_deleting_is_kept(lab: Lab) -> None:
    ours = lab.timed_out()

    def convert(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config"):
            vm = lab.pve.vm(ours.vmid)
            vm.template, vm.config["template"] = True, 1

    lab.pve.before = convert
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.pve.vm(ours.vmid) is not None


# ---- creations ----


def test_a_clone_that_came_late_is_not_left_behind_for_another_vmid(lab: Lab) -> None:
    """The first clone request was lost and is carried out after all, just before the second: one sandbox must not
    become two VMs.
    """
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create()
    ours = lab.records()[0]
    late: list[Any] = []

    def come(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone") and not late:
            late.append(lab.pve.add_guest(ours.vmid, "a1", config={"description": identity.make_marker(ours.uuid)}))

    time.sleep(1.1)
    lab.pve.before = come
    for _dummy in range(3):
        try:
            lab.create()
        except AgentlabError as error:
            assert error.message
    lab.pve.before = None
    assert late and marked(lab, ours) == [ours.vmid]
    assert lab.record(ours).vmid == ours.vmid and lab.record(ours).live


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("vmid", [None, 1000])
def test_a_volume_that_exists_already_is_no_word_on_the_vmid(lab: Lab, left: bool, vmid: int | None) -> None:
    text = (
        "clone failed: lvcreate 'pve/vm-1000-disk-0' error: "
        'Logical Volume "vm-1000-disk-0" already exists in volume group "pve"'
    )
    lab.pve.next_task("qmclone", "fail", text=text, carry_out=left)
    try:
        made = lab.create(vmid=vmid)
    except AgentlabError as error:
        made = None
        assert "already exists in volume group" in error.message and "not ours" not in error.message
    ours = lab.records()[-1]
    # What the failed clone made is not lost from sight: it is there and in the record, or it is not there.
    assert set(marked(lab, ours)) <= {lab.record(ours).vmid}
    if left:
        assert made is None and lab.record(ours).live and lab.record(ours).state == "FAILED"
        # The operator looks, removes it by hand, and the record can go.
        lab.pve.remove_vm(ours.vmid)
        assert lab.destroy(ours.vmid, force=True)[0].outcome == "destroyed"
    assert lab.leftovers() == NOTHING_LEFT


# ---- protection of our own ----


@pytest.mark.parametrize("moment", ["POST /status/stop", "PUT /config", "DELETE ", "GET /config"])
def test_a_sandbox_protected_in_the_middle_of_its_destroy_is_kept_or_told_too_late(lab: Lab, moment: str) -> None:
    ours = lab.create()
    said: list[str] = []
    asked, _blank, suffix = moment.partition(" ")

    async def protect(method: str, path: str) -> None:
        if method == asked and path.endswith(suffix or f"/{ours.vmid}") and f"/qemu/{ours.vmid}" in path and not said:
            said.append("asked")

            def work() -> None:
                try:
                    create.amend(lab.context(actor="owner"), lab.record(ours), protected=True)
                    said.append("protected")
                except AgentlabError as error:
                    said.append(error.code)

            await asyncio.to_thread(work)

    lab.pve.before = protect
    outcome = lab.destroy(ours.vmid, force=True)[0]
    lab.pve.before = None
    assert len(said) == 2
    if said[1] == "protected":
        assert (
            outcome.failed
            and outcome.reason == "protected"
            and lab.pve.vm(ours.vmid) is not None
            and lab.record(ours).live
        ), (said, outcome)
    else:
        # Protected too late: the delete was decided before, and that is what was said.
        assert outcome.outcome == "destroyed" and said[1] == "kept", (said, outcome)


# ---- quorum, and who stopped it ----


def test_without_quorum_reconcile_writes_no_drift(lab: Lab) -> None:
    """The minority's copy of the configuration may be old: the VM may run on the other side by now."""
    down, moved = lab.create("down"), lab.create("moved")
    lab.pve.power(down.vmid, "stopped")
    lab.pve.vm(moved.vmid).node = "pve2"
    lab.pve.lose_quorum()
    drifts = lab.reconcile()
    assert {one.kind for one in drifts} == {"unknown"} and not any(one.applied for one in drifts)
    assert all("quorum" in str(one.evidence) for one in drifts)
    assert (lab.record(down).state, lab.record(moved).node) == ("RUNNING", "pve1")
    lab.pve.regain_quorum()
    lab.reconcile()
    assert (lab.record(down).state, lab.record(moved).node) == ("FAILED", "pve2")


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("task", [True, False])
def test_a_vm_stopped_by_somebody_else_is_no_failure_unless_that_is_known(lab: Lab, task: bool, sees: bool) -> None:
    ours = lab.create()
    lab.pve.grant(TOKEN_ID, "/vms", "VM.Audit", "VM.PowerMgmt", "VM.Config.Options", "VM.Allocate")
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit", propagate=False)
    if sees:
        lab.pve.grant(TOKEN_ID, "/nodes", "Sys.Audit")
    vm = lab.pve.vm(ours.vmid)
    if task:
        lab.server.call(lab.pve._do_stop, vm, "admin@pam", {})
    else:
        lab.pve.power(ours.vmid, "stopped")
    assert vm.status == "stopped"
    drift = lab.reconcile()[0]
    # A stop task that is seen explains it; no stop task explains nothing, unless everybody's tasks can be seen.
    expected = "FAILED" if sees and not task else "STOPPED"
    assert (lab.record(ours).state, drift.kind) == (expected, "stopped")
    if not sees:
        assert "Sys.Audit" in str(drift.evidence)


# ---- a clone that was refused, and is there all the same ----


@pytest.mark.parametrize("locked", [True, False])
def test_the_look_before_a_record_is_closed_as_never_created(lab: Lab, locked: bool) -> None:
    """Proxmox said no, so nothing of ours can be there; should a VM with our marker (or one being cloned) stand
    there, its record stays.
    """
    lab.pve.fail("POST", "/clone", 500, "clone failed: no space left on device")
    ours: list[model.Sandbox] = []

    def appear(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone") and not ours:
            ours.append(lab.records()[0])
            vm = lab.pve.add_guest(
                ours[0].vmid,
                "a1",
                config={"description": identity.make_marker(ours[0].uuid)},
                lock="clone" if locked else None,
            )
            if locked:
                vm.config = {"lock": "clone", "description": "qmclone temporary file"}

    lab.pve.after = appear
    with pytest.raises(CreationFailed, match="a VM that may be that clone is there now"):
        lab.create()
    lab.pve.after = None
    lab.calm()
    assert lab.record(ours[0]).state == "FAILED"
    vm = lab.pve.vm(ours[0].vmid)
    lab.pve.requests.clear()
    try_all(lab, ours[0].vmid)
    assert vm in lab.pve.vms and lab.pve.touched(vm.vmid) == [] and lab.record(ours[0]).live
    # The operator removes it by hand, and then the record goes.
    lab.pve.remove_vm(vm.vmid)
    assert lab.destroy(vm.vmid, force=True)[0].outcome == "destroyed" and lab.leftovers() == NOTHING_LEFT


def test_busy_is_told_with_the_name_of_who_holds_it(lab: Lab) -> None:
    made = lab.create()
    lab.context(actor="the night shift").records.claim(made.uuid, "stop")
    with pytest.raises(Busy, match="stop by the night shift"):
        lab.context().records.claim(made.uuid, "destroy", wait=0)


def test_kept_is_never_success(lab: Lab) -> None:
    """Every reason to keep a VM is a failure of the destroy that was asked for, with a sentence."""
    ours = lab.create()
    lab.pve.vm(ours.vmid).config["protection"] = 1
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert outcome.failed and outcome.message and not outcome.changed
    with pytest.raises(Kept):
        destroy.plan(lab.context(dry_run=True), lab.record(ours))


@pytest.mark.parametrize("moment", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("how", ["gone", "moved"])
def test_a_vm_that_goes_or_moves_under_a_destroy_is_looked_for_again(lab: Lab, moment: str, how: str) -> None:
    """As by the delete of a killed run that is still under way, or by a migration."""
    ours = lab.create()
    done: list[int] = []

    def happen(method: str, path: str) -> None:
        if method == moment and f"/qemu/{ours.vmid}" in path and not done:
            done.append(1)
            if how == "gone":
                lab.pve.remove_vm(ours.vmid)
            else:
                lab.pve.move_vm(ours.vmid, "pve2")

    lab.pve.before = happen
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert done and outcome.outcome == "destroyed", outcome.message
    assert lab.pve.vm(ours.vmid) is None and lab.leftovers() == NOTHING_LEFT
