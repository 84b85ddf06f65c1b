# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The core read as an attacker would: each test is a hole that was suspected.

Those that were holes failed before they were mended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import model
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    Busy,
    ClaimLost,
    CreationFailed,
    Kept,
    OutcomeUnknown,
    Unreachable,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

from support.double import TOKEN_ID, Server
from support.lab import FakeClock, Lab

pytestmark = pytest.mark.faults

NOTHING_LEFT = {"claims": [], "operations": []}


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    one_lab.pve.add_node("pve2")
    clock = one_lab.clock
    yield one_lab
    one_lab.clock = clock
    one_lab.check_promises()
    one_lab.pve.nodes.pop("pve2", None)
    one_lab.reset()


def try_all(lab: Lab, *vmids: int) -> None:
    """Whatever could stop, delete or write off something; errors are ours and have a sentence."""
    works: list[Callable[[], Any]] = [
        lab.expire,
        lambda: lab.prune(dry_run=True),
        lab.prune,
        lambda: lab.destroy(*vmids, force=True),
        lab.reconcile,
        lab.reconcile,
    ]
    for work in works:
        try:
            work()
        except AgentlabError as error:
            assert error.message


def marked(lab: Lab, sandbox: model.Sandbox) -> list[int]:
    """VMIDs of the VMs that carry this sandbox's marker."""
    return [vm.vmid for vm in lab.pve.vms if sandbox.uuid in identity.markers(vm.config)]


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
        lab.pve.vm(one.vmid).config["description"] = identity.marker(first.uuid) + "\n" + identity.marker(second.uuid)
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
    lab.pve.vm(ours.vmid).config["description"] = "x" * 9000 + "\n" + identity.marker(ours.uuid)
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


# ---- between two tries of the same thing ----


@pytest.mark.parametrize("operation", ["stop", "force", "suspend"])
def test_a_second_try_to_stop_judges_anew(lab: Lab, operation: str) -> None:
    """The first try failed for a lock and took its time; whoever has the VMID by then is not stopped."""
    ours = lab.create()
    task = {"stop": "qmshutdown", "force": "qmstop", "suspend": "qmpause"}[operation]
    lab.pve.next_task(
        task,
        "fail",
        text=f"can't lock file '/var/lock/qemu-server/lock-{ours.vmid}.conf' - got timeout",
        carry_out=False,
    )
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "GET" and "/tasks" in path and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, running=True))
            lab.pve.requests.clear()

    lab.pve.after = swap
    try:
        lab.destroy(ours.vmid, force=True) if operation == "force" else lab.power(operation, ours.vmid)
    except AgentlabError as error:
        assert error.message
    assert swapped
    lab.pve.after = None
    lab.untouched(swapped[0], status="running")


@pytest.mark.parametrize(
    "said",
    [
        "got no worker upid - start worker failed",
        "can't lock file '/var/lock/qemu-server/lock-1000.conf' - got timeout",
    ],
)
def test_a_second_try_to_delete_judges_and_marks_anew(lab: Lab, said: str) -> None:
    ours = lab.timed_out()
    swapped: list[Any] = []
    lab.pve.fail("DELETE", f"/qemu/{ours.vmid}", 500, said, times=1)

    def swap(method: str, path: str) -> None:
        if method == "DELETE" and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, running=False))
            lab.pve.requests.clear()

    lab.pve.after = swap
    lab.prune()
    assert swapped
    lab.pve.after = None
    assert swapped[0] in lab.pve.vms, "the second DELETE was sent without looking again"
    assert [line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")] == []
    assert "agentlab-delete" not in str(swapped[0].config.get("description"))


def test_a_mark_that_met_a_change_is_set_anew_however_proxmox_spells_it(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.fail("PUT", "/config", 500, "checksum missmatch (file change by other user?)", times=1)
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"] and lab.record(ours).state == "DESTROYED"


def test_a_delete_that_was_not_begun_is_tried_again(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.fail("DELETE", f"/qemu/{ours.vmid}", 500, "got no worker upid - start worker failed", times=2)
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def swapped_at(lab: Lab, method: str, ending: str, moment: str = "after", **options: Any) -> Any:
    """The stranger that takes a creation's VMID at its first request of that kind; the creation has failed."""
    swapped: list[Any] = []

    def swap(asked: str, path: str) -> None:
        if asked == method and path.endswith(ending) and not swapped:
            vmid = int(re.search(r"/qemu/(\d+)", path)[1])  # type: ignore[index]
            swapped.append(lab.pve.make_foreign(vmid))
            lab.pve.requests.clear()

    setattr(lab.pve, moment, swap)
    with pytest.raises(AgentlabError):
        lab.create(**options)
    setattr(lab.pve, moment, None)
    return swapped[0]


@pytest.mark.parametrize("act", ["force", "prune"])
def test_a_vm_swapped_while_the_quorum_is_looked_at_is_not_stopped(lab: Lab, act: str) -> None:
    ours = lab.create() if act == "force" else lab.timed_out(stopped=False)
    swapped: list[Any] = []

    def swap(_method: str, path: str) -> None:
        if path.endswith("/ha/status/current") and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, running=True))
            lab.pve.requests.clear()

    lab.pve.before = swap
    if act == "force":
        lab.destroy(ours.vmid, force=True)
    else:
        lab.prune()
    lab.untouched(swapped[0], status="running")


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("operation", ["start", "stop"])
def test_a_vm_swapped_while_its_power_state_is_looked_at_is_left_alone(lab: Lab, operation: str, runs: bool) -> None:
    """And what was said of the stranger's power is not written down as the sandbox's."""
    ours = lab.create()
    if operation == "start":
        lab.power("stop", ours.vmid)
    ctx = lab.context()
    # The list lags.
    ctx.cluster.vms()[ours.vmid]["status"] = "stopped"
    swapped: list[Any] = []

    def swap(_method: str, path: str) -> None:
        if path.endswith("/status/current") and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, running=runs))
            lab.pve.requests.clear()

    lab.pve.before = swap
    with pytest.raises(Kept, match="now belongs to another VM"):
        power.run(ctx, ctx.select(ours.vmid), operation)
    lab.untouched(swapped[0], status="running" if runs else "stopped")
    assert lab.record(ours).state == ("STOPPED" if operation == "start" else "RUNNING")


@pytest.mark.parametrize("limits", [{"node_connections": 1}, {"connections": 1}])
def test_no_queue_of_ours_lies_between_judging_and_acting(tmp_path: Path, limits: dict[str, Any]) -> None:
    """The others' slow reads take the only place; whoever acts waits for it before the VM is judged."""
    lab = Lab(tmp_path, storage=None)
    try:
        made = [lab.create(name) for name in ("a1", "b1", "c1")]
        seen: dict[int, list[tuple[str, float]]] = {one.vmid: [] for one in made}

        def note(method: str, path: str) -> None:
            found = re.search(r"/qemu/(\d+)(.*)", path)
            if found and int(found[1]) in seen and "/tasks/" not in path:
                seen[int(found[1])].append((f"{method} {found[2]}", time.monotonic()))

        lab.pve.before = note
        for one in made:
            lab.pve.fault("GET", f"/qemu/{one.vmid}/config", "hang", seconds=0.7, carry_out=True, times=20)
        base = lab.context(**limits)
        with ThreadPoolExecutor(3) as pool:

            def away(vmid: int) -> Any:
                ctx = base.derive(actor="x")
                return destroy.run(ctx, [(ctx.select(vmid), destroy.Request(force=True))])[0].outcome

            assert list(pool.map(away, seen)) == ["destroyed"] * 3
        for requests in seen.values():
            for (before, _at), (what, at) in itertools.pairwise(requests):
                if what in ("POST /status/stop", "DELETE "):
                    last = max(
                        moment for asked, moment in requests if moment < at and asked in ("GET /config", "PUT /config")
                    )
                    # The read itself hangs for 0.7 s.
                    assert before in ("GET /config", "PUT /config") and at - last < 1.2, requests
    finally:
        lab.stop()


def test_a_disk_is_resized_only_while_the_vm_is_what_it_was_judged_to_be(lab: Lab) -> None:
    stranger = swapped_at(lab, "PUT", "/config", disk_size="20G")
    lab.untouched(stranger, status="stopped")
    try_all(lab, stranger.vmid)
    lab.untouched(stranger, status="stopped")


def test_a_vm_swapped_while_its_disk_is_resized_is_not_started(lab: Lab) -> None:
    lab.untouched(swapped_at(lab, "PUT", "/resize", disk_size="20G"), status="stopped")


@pytest.mark.parametrize("moment", ["rules", "options"])
def test_a_vm_swapped_while_its_firewall_is_set_gets_no_rule(lab: Lab, moment: str) -> None:
    lab.untouched(swapped_at(lab, "GET", f"/firewall/{moment}", "before", firewall_group="agents"), status="stopped")


@pytest.mark.parametrize("done", [True, False])
def test_a_delete_task_that_hangs_ends_with_its_vm(lab: Lab, done: bool) -> None:
    """Its work done, the proof that the VM is gone is enough; not done, nothing is deleted beside it until somebody
    has stopped it.
    """
    made = lab.create()
    if done:
        lab.pve.task_endings["qmdestroy"] = "hang"
    else:
        lab.pve.next_task("qmdestroy", "hang")
    assert "stop it there if it hangs" in str(lab.destroy(made.vmid, force=True, wait_timeout="1s")[0].message)
    lab.pve.task_endings.clear()
    lab.pve.requests.clear()
    outcome = lab.destroy(made.vmid, force=True, wait_timeout="1s")[0]
    if not done:
        assert (
            outcome.failed and "stop it there if it hangs" in str(outcome.message) and lab.pve.touched(made.vmid) == []
        )
        lab.pve.kill_task(lab.pve.running_tasks("qmdestroy")[0])
        outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.outcome == "destroyed" and lab.pve.vm(made.vmid) is None and lab.leftovers() == NOTHING_LEFT


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
            late.append(lab.pve.add_guest(ours.vmid, "a1", config={"description": identity.marker(ours.uuid)}))

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


# ---- claims, clocks and copies of the database ----


def test_a_claim_of_a_live_run_survives_any_jump_of_the_clock(lab: Lab) -> None:
    lab.clock = FakeClock()
    made = lab.create()
    lab.context().records.claim(made.uuid, "stop")
    lab.clock.jump(30 * 86400)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].reason == "busy"
    assert lab.context().records.interrupted() == []
    lab.clock.jump(-60 * 86400)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].reason == "busy"
    # Real time passes: nobody holds a claim for ever.
    lab.clock.pass_time(lab.context().records.claim_seconds + 1)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].outcome == "destroyed"


def test_a_claim_is_longer_than_all_waits_between_two_writes(lab: Lab) -> None:
    # Resize, three tries to start, the HA manager and the guest agent, each as long as wait_timeout.
    ctx = lab.context(wait_timeout="12h")
    assert ctx.records.claim_seconds >= 6 * 12 * 3600


def test_a_fence_is_not_handed_out_twice_when_an_old_database_is_restored(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    ctx.records.claim(made.uuid, "look")
    ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    kept = ctx.records.meta("fence")
    claim = ctx.records.claim(made.uuid, "stop")

    def restore(conn: Any) -> None:
        conn.execute("DELETE FROM claims")
        conn.execute("UPDATE meta SET value = ? WHERE key = 'fence'", (kept,))

    ctx.database.write(restore)
    time.sleep(1.1)
    second = lab.context().records.claim(made.uuid, "destroy")
    assert second.fence != claim.fence
    with pytest.raises(ClaimLost):
        ctx.records.journal(claim, "stop", "requested", {})


def test_a_destroy_whose_claim_was_taken_over_is_no_failure_when_it_is_done(lab: Lab) -> None:
    """Another run finished it meanwhile: the sandbox is DESTROYED, and that is what the answer says."""
    ours = lab.timed_out()
    took: list[Any] = []

    async def take_over(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/cluster/nextid") and not took:
            took.append(None)

            def work() -> None:
                ctx = lab.context(actor="other")
                ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
                took.append(reconcile.run(ctx, apply=True))

            await asyncio.to_thread(work)

    lab.pve.before = take_over
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert len(took) == 2 and lab.record(ours).state == "DESTROYED"
    assert not outcome.failed and outcome.state == "DESTROYED", outcome


def test_an_old_copy_of_the_database_whose_vmid_is_another_sandboxs_by_now(lab: Lab, tmp_path: Any) -> None:
    old = lab.create("old")
    lab.close_contexts()
    with closing(sqlite3.connect(lab.database)) as source, closing(sqlite3.connect(tmp_path / "copy.db")) as target:
        source.backup(target)
    lab.destroy(old.vmid, force=True)
    new = lab.create("new", vmid=old.vmid)
    lab.close_contexts()
    database, lab.database = lab.database, str(tmp_path / "copy.db")
    vm = lab.pve.vm(new.vmid)
    before = dict(vm.config)
    lab.pve.requests.clear()
    lab.force_state(old.vmid, "RUNNING", lease_expires_at=int(time.time()) - 5)
    try_all(lab, old.vmid)
    # The old record ends as what it is; the sandbox that this copy knows nothing of is reported and left alone.
    assert lab.record(old).state == "DESTROYED" and lab.record(old).reason == "vmid_reused"
    assert vm in lab.pve.vms and vm.config == before and vm.status == "running" and lab.pve.touched(new.vmid) == []
    drifts = lab.reconcile()
    assert [(one.kind, one.vmid, one.applied) for one in drifts] == [("unrecorded", new.vmid, False)]
    lab.close_contexts()
    lab.database = database
    assert lab.record(new).state == "RUNNING"


def test_an_old_copy_of_the_database_with_a_half_done_destroy_of_what_is_gone(lab: Lab, tmp_path: Any) -> None:
    """Its journal says `delete sent`: the VMID is another sandbox's by now, and the old task id says nothing of it."""
    old = lab.timed_out("old")
    lab.pve.fault("GET", "/tasks/.*", "answer", status=596, body="", times=999)
    lab.destroy(old.vmid, force=True, wait_timeout="1s")
    lab.calm()
    lab.close_contexts()
    with closing(sqlite3.connect(lab.database)) as source, closing(sqlite3.connect(tmp_path / "copy.db")) as target:
        source.backup(target)
    lab.destroy(old.vmid, force=True)
    new = lab.create("new", vmid=old.vmid)
    lab.close_contexts()
    lab.database = str(tmp_path / "copy.db")
    vm = lab.pve.vm(new.vmid)
    lab.pve.requests.clear()
    try_all(lab, old.vmid)
    assert lab.record(old).state == "DESTROYED"
    assert vm in lab.pve.vms and vm.status == "running" and lab.pve.touched(new.vmid) == []
    lab.pve.vms.remove(vm)


def test_two_databases_on_one_cluster_touch_only_their_own(lab: Lab, tmp_path: Any) -> None:
    first = [lab.timed_out("a1"), lab.timed_out("a2")]
    one = lab.database
    two = str(tmp_path / "second.db")
    lab.database = two
    second = lab.create("a1")
    assert second.vmid not in {made.vmid for made in first}
    lab.pve.requests.clear()
    try_all(lab, second.vmid)
    assert lab.record(second).state == "DESTROYED"
    for made in first:
        assert lab.pve.touched(made.vmid) == [] and lab.pve.vm(made.vmid) is not None
    lab.close_contexts()
    lab.database = one
    third = [made.reason for made in lab.prune().pruned]
    assert third == ["destroyed"] * 2 and lab.leftovers() == NOTHING_LEFT


@pytest.fixture
def other(tmp_path: Any) -> Iterator[Server]:
    made = Server(str(tmp_path))
    made.pve.add_template()
    yield made
    made.stop()


@pytest.mark.parametrize("first", [True, False])
def test_another_cluster_with_a_restored_copy_of_one_of_ours_says_nothing_of_the_others(
    lab: Lab, other: Server, first: bool
) -> None:
    """A test cluster into which a sandbox's backup was restored: that VM carries both marks, and is still no proof
    that this is our cluster.
    """
    ours = [lab.timed_out(f"b{number}") for number in range(5)]
    copied = ours[0] if first else ours[-1]
    other.pve.add_vm(copied.vmid, copied.name, status="stopped", config=dict(lab.pve.vm(copied.vmid).config))
    gone = {one.uuid for one in ours} - {copied.uuid}
    prune.run(lab.context(server=other), prune.Selection())
    for _dummy in range(2):
        try:
            reconcile.run(lab.context(server=other), apply=True)
        except AgentlabError as error:
            assert error.message
    rest = [one for one in ours if one.uuid in gone]
    destroy.run(lab.context(server=other), [(one, destroy.Request(force=True)) for one in rest])
    assert {lab.record(one).state for one in rest} == {"TIMEOUT"}
    assert all(lab.pve.vm(one.vmid) is not None for one in ours)
    # The copy itself may have gone (both its marks are ours); the original has not, so its record is not to be trusted
    # with that.
    lab.pve.vms.remove(lab.pve.vm(copied.vmid))


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


# ---- TLS ----


class Breaker:
    """A relay before the double that lets a request through and then puts something else in place of the encrypted
    answer.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.armed: bytes | None = None
        self.broken = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.upstream))
            self._open += [client, server]
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                server.sendall(data)
        except OSError:
            pass

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(65536):
                if self.armed is not None:
                    # Armed by the double when it has the request: this is the answer.
                    self.broken += 1
                    client.sendall(self.armed)
                    self.armed = None
                    client.close()
                    return
                client.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()
        for one in self._open:
            one.close()


BREAKS = {
    "plain text": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
    "broken record": b"\x17\x03\x03\x00\x20" + b"x" * 32,
    "alert": b"\x15\x03\x03\x00\x02\x02\x14",
    "half a record": b"\x17\x03\x03\x40\x00abc",
}


@pytest.fixture
def breaker(lab: Lab) -> Iterator[Breaker]:
    made = Breaker(lab.server.port)
    yield made
    made.close()


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("fresh", [True, False])
def test_tls_broken_in_mid_connection_is_an_unknown_outcome(lab: Lab, breaker: Breaker, kind: str, fresh: bool) -> None:
    ours = lab.create()
    ctx = lab.context(api_port=breaker.port)
    if not fresh:
        ctx.client.get("cluster/status")

    def arm(method: str, path: str) -> None:
        breaker.armed = BREAKS[kind] if method == "POST" else None

    lab.pve.before = arm
    with pytest.raises(OutcomeUnknown):
        ctx.client.post(f"nodes/pve1/qemu/{ours.vmid}/status/stop")
    assert breaker.broken == 1
    # And so it was: the request had been carried out (or is, while the connection breaks).
    end = time.monotonic() + 10
    while lab.pve.vm(ours.vmid).status != "stopped" and time.monotonic() < end:
        time.sleep(0.05)
    assert lab.pve.vm(ours.vmid).status == "stopped"


def test_a_port_without_tls_was_certainly_not_asked(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _address = listener.accept()
            client.recv(4096)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(Unreachable):
            lab.context(api_port=listener.getsockname()[1]).client.get("cluster/status")


@pytest.mark.parametrize("kind", sorted(set(BREAKS) - {"half a record"}))
def test_a_clone_whose_answer_broke_in_tls_is_neither_lost_nor_made_twice(
    lab: Lab, breaker: Breaker, kind: str
) -> None:
    def arm(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone"):
            breaker.armed = BREAKS[kind]

    lab.pve.before = arm
    # The clone is looked for at once, and taken up.
    lab.create(options={"api_port": breaker.port})
    assert breaker.broken == 1
    lab.pve.before = breaker.armed = None
    made = lab.create()
    assert made.state == "RUNNING" and marked(lab, made) == [made.vmid] and len(lab.records()) == 1


@pytest.mark.parametrize("kind", BREAKS)
def test_a_clone_that_cannot_be_looked_for_either_is_taken_up_by_the_next_run(
    lab: Lab, breaker: Breaker, kind: str
) -> None:
    cloned = threading.Event()

    def arm(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone"):
            cloned.set()
        breaker.armed = BREAKS[kind] if cloned.is_set() else None

    lab.pve.before = arm
    with pytest.raises(AgentlabError):
        lab.create(options={"api_port": breaker.port})
    # Half a record is a time-out: the request may still be at work, so nothing is looked for.
    assert breaker.broken == 1 if kind == "half a record" else breaker.broken > 1
    lab.pve.before = breaker.armed = None
    time.sleep(1.1)
    made = lab.create()
    assert made.state == "RUNNING" and marked(lab, made) == [made.vmid] and len(lab.records()) == 1


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
                config={"description": identity.marker(ours[0].uuid)},
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
