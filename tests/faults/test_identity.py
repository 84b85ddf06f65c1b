# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No stranger's VM is ever stopped, changed or deleted. Each of these destroyed one in some existing tool."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    Kept,
    OutcomeUnknown,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

from support.double import TOKEN_ID
from support.lab import Lab

pytestmark = pytest.mark.faults

ALL_PRIVS = (
    "VM.Audit",
    "VM.Allocate",
    "VM.PowerMgmt",
    "VM.Clone",
    "VM.Config.Options",
    "VM.Config.HWType",
    "VM.Config.Network",
    "VM.Config.Disk",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Cloudinit",
    "VM.GuestAgent.Audit",
    "VM.Monitor",
)


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    yield one_lab
    one_lab.check_promises()
    one_lab.reset()


def hidden_from_token(lab: Lab, *hidden: int) -> None:
    """The token may do everything, except that it sees nothing of these VMIDs."""
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")
    lab.pve.grant(TOKEN_ID, "/storage", "Datastore.AllocateSpace", "Datastore.Audit")
    lab.pve.grant(TOKEN_ID, "/sdn", "SDN.Use")
    for vmid in {9000, 500, *range(1000, 1010)} - set(hidden):
        lab.pve.grant(TOKEN_ID, f"/vms/{vmid}", *ALL_PRIVS)
    for vmid in hidden:
        lab.pve.grant(TOKEN_ID, f"/vms/{vmid}", "VM.Allocate")


def try_everything(lab: Lab, sandbox: Sandbox) -> list[str]:
    """Every operation that could hurt, one after another; what each answered."""
    words: list[str] = []

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            found = work()
            found = found[0] if isinstance(found, list) and found else found
            words.append(f"{name}: {getattr(found, 'outcome', 'done')} {getattr(found, 'reason', None)}")
        except AgentlabError as error:
            assert error.message
            words.append(f"{name}: {error.code}")

    for operation in ("stop", "suspend", "start"):
        attempt(operation, lambda operation=operation: lab.power(operation, sandbox.vmid))
    attempt("expire", lab.expire)
    attempt("check mode", lambda: lab.prune(dry_run=True))
    attempt("destroy", lambda: lab.destroy(sandbox.vmid))
    attempt("prune", lab.prune)
    attempt("force", lambda: lab.destroy(sandbox.vmid, force=True))
    attempt("reconcile", lab.reconcile)
    attempt("reconcile", lab.reconcile)
    attempt("force", lambda: lab.destroy(sandbox.vmid, force=True))
    return words


# ---- reused VMIDs ----

STRANGERS: dict[str, dict[str, Any]] = {
    "stopped": {},
    "running": {"running": True},
    "same_name": {"name": "a1"},
    "same_tags": {"tags": "agentlab"},
    "same_name_and_tags_running": {"name": "a1", "tags": "agentlab", "running": True},
    "template": {"template": True},
    "no_smbios": {"smbios": False},
    "other_node": {"node": "pve2"},
    "marker_of_another_sandbox": {"description": f"agentlab-sandbox: {uuid.uuid4()}", "running": True},
}
# The everyday run takes the one that is most like ours.
EVERYDAY = "same_name_and_tags_running"


def strangers(way: int) -> list[Any]:
    """All of STRANGERS, for the test of one of the thirteen ways (docs/safety.md); one of them every day."""
    return [pytest.param(one, marks=pytest.mark.way(way)) if one == EVERYDAY else one for one in STRANGERS]


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
    planned = destroy.several(ctx, [ctx.select(ours.vmid), ctx.select(other.vmid)], force=True)
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


# ---- copies of our marks ----


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("state", ["RUNNING", "TIMEOUT", "STOPPED", "FAILED"])
def test_copied_description_at_our_vmid_is_ambiguous_and_kept(lab: Lab, state: str, running: bool) -> None:
    ours = lab.create()
    description = lab.pve.vm(ours.vmid).config["description"]
    lab.force_state(ours.vmid, state)
    vm = lab.swap(ours.vmid, name="a1", tags="agentlab", description=description, running=running)
    words = try_everything(lab, ours)
    lab.untouched(vm, status="running" if running else "stopped")
    assert lab.record(ours).state == state
    assert "force: kept ambiguous" in words
    if state == "TIMEOUT":
        assert [one.reason for one in lab.prune().kept] == ["ambiguous"]


def test_hand_made_clone_of_our_sandbox_at_another_vmid_is_left_alone(lab: Lab) -> None:
    ours = lab.timed_out()
    source = lab.pve.vm(ours.vmid)
    copy = lab.pve.add_vm(
        777,
        "copy-of-a1",
        status="running",
        config={**source.config, "name": "copy-of-a1", "smbios1": f"uuid={uuid.uuid4()}"},
    )
    report = lab.prune()
    assert [one.reason for one in report.pruned] == ["destroyed"] and lab.pve.vm(ours.vmid) is None
    drifts = lab.reconcile()
    assert [(one.kind, one.vmid, one.applied) for one in drifts] == [("unrecorded", 777, False)]
    assert lab.pve.touched(777) == [] and copy in lab.pve.vms and copy.status == "running"
    lab.pve.vms.remove(copy)


def test_hand_made_clone_of_our_sandbox_at_our_vmid_is_kept(lab: Lab) -> None:
    ours = lab.create()
    source = dict(lab.pve.vm(ours.vmid).config)
    vm = lab.swap(ours.vmid, running=True)
    vm.config.update({**source, "smbios1": f"uuid={uuid.uuid4()}"})
    try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).state == "RUNNING"


def test_vm_restored_from_a_backup_of_ours_over_ours_is_still_ours(lab: Lab) -> None:
    # A restore in place keeps SMBIOS UUID and description: it is the same VM, and may go.
    ours = lab.timed_out()
    lab.pve.vm(ours.vmid).config["vmgenid"] = str(uuid.uuid4())
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_vm_restored_as_unique_from_a_backup_of_ours_is_kept(lab: Lab) -> None:
    # qmrestore --unique gives new MAC addresses; where the SMBIOS UUID is new as well, the description alone is no
    # proof.
    ours = lab.timed_out()
    config = lab.pve.vm(ours.vmid).config
    vm = lab.swap(ours.vmid)
    vm.config.update({**config, "smbios1": f"uuid={uuid.uuid4()}"})
    assert [one.reason for one in lab.prune().kept] == ["ambiguous"]
    lab.untouched(vm)


def test_vm_restored_from_a_strangers_backup_over_ours_is_left_alone(lab: Lab) -> None:
    ours = lab.timed_out()
    vm = lab.pve.vm(ours.vmid)
    vm.config = {"name": "their-database", "smbios1": f"uuid={uuid.uuid4()}", "cores": 4}
    vm.status = "running"
    lab.pve.requests.clear()
    assert [one.reason for one in lab.prune().pruned] == ["vmid_reused"]
    lab.untouched(vm, status="running")


def test_our_smbios_uuid_without_our_marker_is_ambiguous_and_kept(lab: Lab) -> None:
    # Somebody emptied the description, or imported the VM's disk and SMBIOS settings as their own.
    ours = lab.timed_out()
    vm = lab.pve.vm(ours.vmid)
    vm.config["description"] = "now mine"
    lab.pve.requests.clear()
    assert [one.reason for one in lab.prune().kept] == ["ambiguous"]
    assert lab.destroy(ours.vmid, force=True)[0].reason == "ambiguous"
    lab.untouched(vm)


def test_our_vm_made_a_template_is_kept_even_with_force(lab: Lab) -> None:
    ours = lab.timed_out()
    vm = lab.pve.vm(ours.vmid)
    vm.template, vm.config["template"] = True, 1
    lab.pve.requests.clear()
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.destroy(ours.vmid, force=True)[0].reason == "protected"
    lab.untouched(vm)


def test_our_vm_with_proxmox_protection_is_kept_even_with_force(lab: Lab) -> None:
    ours = lab.timed_out()
    vm = lab.pve.vm(ours.vmid)
    vm.config["protection"] = 1
    lab.pve.requests.clear()
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.destroy(ours.vmid, force=True)[0].reason == "protected"
    lab.untouched(vm)


def test_container_at_our_vmid_is_left_alone(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.vms.remove(lab.pve.vm(ours.vmid))
    container = lab.pve.add_ct(ours.vmid, "theirs", status="running")
    try:
        lab.pve.requests.clear()
        assert [one.reason for one in lab.prune().pruned] == ["vmid_reused"]
        assert not [line for line in lab.pve.requests if line[0] != "GET"]
        assert container in lab.pve.cts and container.status == "running"
    finally:
        lab.pve.cts.remove(container)


# ---- between verification and deletion ----


@pytest.mark.parametrize("stranger", STRANGERS)
def test_swap_right_before_the_mark_is_caught_by_the_digest(lab: Lab, stranger: str) -> None:
    ours = lab.timed_out()
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config") and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, **STRANGERS[stranger]))

    lab.pve.before = swap
    report = lab.prune()
    vm = swapped[0]
    before = dict(vm.config)
    # The one write that reached the stranger was the guarded one, and it was refused: its configuration is as it was.
    assert [line for line in lab.pve.touched(ours.vmid) if not line.startswith("PUT")] == []
    assert vm in lab.pve.vms and vm.config == before and "agentlab-delete" not in str(vm.config.get("description"))
    assert vm.status == ("running" if STRANGERS[stranger].get("running") else "stopped")
    assert [one.reason for one in report.pruned] == ["vmid_reused"] or [
        one.reason for one in report.kept + report.failed
    ]
    lab.pve.before = None
    lab.pve.requests.clear()
    lab.prune()
    lab.reconcile()
    assert lab.record(ours).state == "DESTROYED" and lab.record(ours).reason == "vmid_reused"
    lab.untouched(vm)


def test_change_of_our_vm_right_before_the_mark_is_judged_again(lab: Lab) -> None:
    ours = lab.timed_out()
    changes: list[int] = []

    def change(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config") and not changes:
            changes.append(1)
            lab.pve.vm(ours.vmid).config["cores"] = 7

    lab.pve.before = change
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_configuration_that_keeps_changing_is_left_alone(lab: Lab) -> None:
    ours = lab.timed_out()

    def change(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config"):
            lab.pve.vm(ours.vmid).config["memory"] = int(lab.pve.vm(ours.vmid).config.get("memory", 1)) + 1

    lab.pve.before = change
    assert [one.reason for one in lab.prune().kept] == ["changed"]
    assert lab.record(ours).state == "TIMEOUT" and lab.pve.vm(ours.vmid) is not None
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_protection_set_right_before_the_mark_is_respected(lab: Lab) -> None:
    ours = lab.timed_out()

    def protect(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config"):
            lab.pve.vm(ours.vmid).config["protection"] = 1

    lab.pve.before = protect
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.pve.vm(ours.vmid) is not None


def test_swap_while_it_is_being_stopped_is_seen_before_the_delete(lab: Lab) -> None:
    ours = lab.timed_out(stopped=False)
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "GET" and "/tasks/" in path and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, name="theirs"))

    lab.pve.before = swap
    lab.destroy(ours.vmid, force=True)
    assert swapped
    assert swapped[0] in lab.pve.vms and "agentlab-delete" not in str(swapped[0].config.get("description"))
    assert not [line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")]


# ---- records that are over ----


@pytest.mark.parametrize("stranger", strangers(way=5))
def test_destroyed_record_is_never_revived(lab: Lab, stranger: str) -> None:
    ours = lab.create()
    lab.destroy(ours.vmid, force=True)
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    try_everything(lab, ours)
    lab.info()
    assert lab.record(ours).state == "DESTROYED" and len(lab.records()) == 1
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")


def test_destroyed_record_is_not_revived_by_its_own_vm_coming_back(lab: Lab) -> None:
    # Somebody restores a backup of a sandbox that is gone: reported, never adopted, never deleted.
    ours = lab.create()
    config = dict(lab.pve.vm(ours.vmid).config)
    lab.destroy(ours.vmid, force=True)
    vm = lab.pve.add_vm(ours.vmid, "a1", status="running", config={**config, "smbios1": f"uuid={uuid.uuid4()}"})
    lab.pve.requests.clear()
    drifts = lab.reconcile()
    assert [one.kind for one in drifts] == ["unrecorded"]
    assert lab.record(ours).state == "DESTROYED"
    lab.untouched(vm, status="running")
    lab.pve.vms.remove(vm)


# ---- creations that fail because the VMID is taken ----


@pytest.mark.parametrize("stranger", strangers(way=6))
def test_creation_at_a_taken_vmid_says_so_and_cleans_up_nothing(lab: Lab, stranger: str) -> None:
    vm = lab.swap(1005, **STRANGERS[stranger])
    with pytest.raises(CreationFailed, match="vmid: 1005 is occupied by a VM that is not ours"):
        lab.create(vmid=1005)
    lab.untouched(vm)
    lab.reconcile()
    lab.untouched(vm)
    assert lab.leftovers() == {"claims": [], "operations": []}


@pytest.mark.way(6)
@pytest.mark.parametrize("node", ["pve1", "pve2"])
@pytest.mark.parametrize("running", [True, False])
def test_creation_at_the_vmid_of_a_vm_the_token_cannot_see(lab: Lab, node: str, running: bool) -> None:
    vm = lab.swap(1005, node=node, running=running)
    hidden_from_token(lab, 1005)
    with pytest.raises(CreationFailed, match="1005") as caught:
        lab.create(vmid=1005)
    assert "occupied by a VM that is not ours" in caught.value.message
    lab.untouched(vm, status="running" if running else "stopped")
    assert all(not one.live or one.state == "FAILED" for one in lab.records())
    for _dummy in range(3):
        lab.reconcile()
    lab.prune()
    for one in lab.records():
        lab.destroy(one.vmid, force=True)
    lab.untouched(vm, status="running" if running else "stopped")


@pytest.mark.parametrize("node", ["pve1", "pve2"])
def test_creation_without_vmid_passes_over_what_the_token_cannot_see(lab: Lab, node: str) -> None:
    vm = lab.swap(1000, node=node, running=True)
    hidden_from_token(lab, 1000)
    made = lab.create()
    assert made.vmid != 1000 and made.state == "RUNNING"
    lab.untouched(vm, status="running")


@pytest.mark.parametrize("node", ["pve1", "pve2"])
def test_vmid_taken_between_the_list_and_the_clone(lab: Lab, node: str) -> None:
    found: list[Any] = []

    def take(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone") and not found:
            found.append(lab.pve.make_foreign(1005, running=True, node=node))

    lab.pve.before = take
    with pytest.raises(CreationFailed, match="occupied"):
        lab.create(vmid=1005)
    lab.pve.before = None
    lab.reconcile()
    lab.untouched(found[0], status="running")


@pytest.mark.parametrize("fault", ["cut-before", "cut-after"])
def test_clone_whose_answer_was_lost_and_a_stranger_at_its_vmid(lab: Lab, fault: str) -> None:
    strangers_vm = []

    def swap(method: str, path: str) -> None:
        # Before the clone is looked for, which happens at once.
        if method == "GET" and path.endswith("/cluster/resources") and lab.pve.vm(1005) is not None:
            lab.pve.before = None
            strangers_vm.append(lab.swap(1005, running=True))

    lab.pve.fault("POST", "/clone", fault)
    lab.pve.before = swap
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    lab.pve.before = None
    vm = strangers_vm[0] if strangers_vm else lab.swap(1005, running=True)
    assert bool(strangers_vm) is (fault == "cut-after")
    time.sleep(1.1)
    for _dummy in range(3):
        lab.reconcile()
    lab.untouched(vm, status="running")
    try_everything(lab, lab.records()[0])
    lab.untouched(vm, status="running")


# ---- records that were brought in from elsewhere ----


@pytest.mark.parametrize("state", ["READY", "RUNNING", "TIMEOUT", "STOPPED", "FAILED"])
@pytest.mark.parametrize("stranger", strangers(way=13))
def test_an_imported_record_without_a_uuid_adopts_nobody(lab: Lab, state: str, stranger: str) -> None:
    """As a list of VMIDs from another tool would be written into the database: name and VMID fit, and that proves
    nothing.
    """
    ours = lab.create()
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    lab.force_state(ours.vmid, state, smbios_uuid=None, lease_expires_at=int(time.time()) - 5)
    before = dict(vm.config)
    words = try_everything(lab, ours)
    assert not [word for word in words if word.startswith(("start: started", "stop: stopped", "suspend: suspended"))], (
        words
    )
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")
    assert vm.config == before
    now = lab.record(ours)
    assert now.smbios_uuid is None and (now.state, now.reason) == ("DESTROYED", "vmid_reused")


@pytest.mark.way(13)
@pytest.mark.parametrize("state", ["RUNNING", "TIMEOUT", "STOPPED"])
def test_an_imported_record_without_a_uuid_is_not_bound_by_a_copied_marker(lab: Lab, state: str) -> None:
    ours = lab.create()
    lab.force_state(ours.vmid, state, smbios_uuid=None)
    vm = lab.swap(ours.vmid, running=True, name="a1", tags="agentlab", description=identity.marker(ours.uuid))
    before = dict(vm.config)
    words = try_everything(lab, ours)
    assert "force: kept ambiguous" in words
    lab.untouched(vm, status="running")
    assert vm.config == before and lab.record(ours).smbios_uuid is None and lab.record(ours).state == state


@pytest.mark.way(13)
def test_asking_for_a_sandbox_by_the_vmid_or_name_of_a_stranger_adopts_nobody(lab: Lab) -> None:
    vm = lab.swap(1005, name="wanted", tags="agentlab", running=True)
    with pytest.raises(CreationFailed, match="occupied by a VM that is not ours"):
        lab.create("wanted", vmid=1005)
    made = lab.create("wanted")
    assert made.vmid != 1005
    lab.destroy(made.vmid, force=True)
    lab.untouched(vm, status="running")


# ---- time-outs, and what the next run finds ----


@pytest.mark.way(7)
@pytest.mark.parametrize("operation", ["stop", "destroy", "prune", "expire"])
def test_time_out_while_stopping_then_the_vmid_is_somebody_elses(lab: Lab, operation: str) -> None:
    ours = lab.create()
    if operation in ("prune", "expire"):
        lab.force_state(
            ours.vmid, "TIMEOUT" if operation == "prune" else "RUNNING", lease_expires_at=int(time.time()) - 5
        )
    lab.pve.task_endings.update(qmstop="hang", qmshutdown="hang")
    runs: dict[str, Callable[[], Any]] = {
        "stop": lambda: lab.power("stop", ours.vmid, wait_timeout=1),
        "destroy": lambda: lab.destroy(ours.vmid, force=True, wait_timeout=1),
        "prune": lambda: lab.prune(options={"wait_timeout": 1}),
        "expire": lambda: lab.expire(wait_timeout=1),
    }
    try:
        runs[operation]()
    except AgentlabError as error:
        assert error.message
    lab.pve.task_endings.clear()
    vm = lab.swap(ours.vmid, running=True, tags="agentlab", name="a1")
    for _dummy in range(2):
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).state == "DESTROYED"


@pytest.mark.parametrize("fault", ["cut-before", "cut-after"])
def test_delete_whose_answer_was_lost_then_the_vmid_is_somebody_elses(lab: Lab, fault: str) -> None:
    ours = lab.timed_out()
    lab.pve.fault("DELETE", f"/qemu/{ours.vmid}", fault)
    report = lab.prune()
    assert len(report.failed) == 1
    vm = lab.swap(ours.vmid, running=True, tags="agentlab", name="a1")
    for _dummy in range(2):
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).state == "DESTROYED"
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_resumed_create_does_not_take_a_stranger_for_its_clone(lab: Lab) -> None:
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    vm = lab.swap(1005, running=True, name="a1", tags="agentlab")
    time.sleep(1.1)
    with pytest.raises(AgentlabError) as caught:
        lab.create(vmid=1005)
    assert isinstance(caught.value, (CreationFailed, Kept)) and caught.value.message
    lab.untouched(vm, status="running")


def test_copied_marker_is_not_bound_without_our_own_clone_task(lab: Lab) -> None:
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    ours = lab.records()[0]
    lab.pve.tasklog.clear()
    vm = lab.swap(1005, running=True, description=identity.marker(ours.uuid))
    time.sleep(1.1)
    for _dummy in range(2):
        with pytest.raises(AgentlabError):
            lab.create(vmid=1005)
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).smbios_uuid is None and lab.record(ours).live


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
        ids.append(lab.context().records.database_id())
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
    assert "another database made it" not in drifts[777].action and "another database made it" in drifts[1050].action
    lab.database = second_database
    assert [drift.vmid for drift in lab.reconcile(**second_range)] == [1050]
    # Markers of older releases name no database: nobody knows whose the VM is, so both report it.
    lab.pve.remove_vm(777)
    lab.pve.remove_vm(1050)
    lab.pve.add_vm(778, "older", config={"description": identity.marker(first.uuid), "tags": "agentlab"})
    assert [drift.vmid for drift in lab.reconcile(**second_range)] == [778]
    lab.destroy(second.vmid, force=True, **second_range)
    assert lab.pve.vm(first.vmid) is not None and lab.pve.vm(second.vmid) is None
    lab.pve.remove_vm(778)
