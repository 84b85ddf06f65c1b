# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM whose deletion would take a workspace along is kept, and all is checked before anything is given up."""

from __future__ import annotations

import json

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.lab import Lab
from support.workspaces import assert_kept_whole, detach, list_mentions, make, now

pytestmark = pytest.mark.faults


# ---- a VM whose deletion would take it along is not deleted ----


def test_a_volume_that_is_there_again_when_the_vm_is_deleted_keeps_the_vm(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    # Somebody put it there by hand; no record says so.
    lab.pve.vm(made.vmid).config["scsi5"] = f"{found.volume},size=8G"
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "workspace") and "names local-lvm:vm-990000" in str(
        outcome.message
    )
    assert lab.pve.vm(made.vmid) is not None and not any(
        entry.startswith("DELETE") for entry in lab.pve.touched(made.vmid)
    )
    ctx = lab.context(dry_run=True)
    with pytest.raises(Kept, match="the VM was not deleted"):
        destroy.plan(ctx, ctx.select_sandbox(made.vmid))
    del lab.pve.vm(made.vmid).config["scsi5"]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert_kept_whole(lab, found)


def test_a_volume_put_there_between_judging_and_deleting_keeps_the_vm(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")

    def sneak(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{made.vmid}/config"):
            lab.pve.vm(made.vmid).config["scsi5"] = f"{found.volume},size=8G"

    lab.pve.before = sneak
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "workspace")
    assert lab.pve.vm(made.vmid) is not None and lab.pve.volumes_of(found.owner_vmid) == [found.volume]


@pytest.mark.parametrize("to", ["itself", "another"])
def test_a_volume_that_was_given_to_a_vm_keeps_that_vm(lab: Lab, to: str) -> None:
    """move_disk with target-vmid renames the volume: it would die with that VM."""
    found = make(lab)
    made, other = lab.create("a1", workspace="w1"), lab.create("a2")
    slot = list_mentions(lab, found)[0].partition(":")[2]
    target = made if to == "itself" else other
    volumes = lab.pve.storages["local-lvm"]["volumes"]
    moved = f"vm-{target.vmid}-disk-7"
    volumes[moved] = dict(volumes.pop(found.volume.partition(":")[2]), vmid=target.vmid)
    lab.pve.vm(made.vmid).config.pop(slot)
    lab.pve.vm(target.vmid).config["scsi9"] = f"local-lvm:{moved},size=8G"
    for one in (made, other):
        outcome = lab.destroy(one.vmid, force=True)[0]
        if one is target or one is made:
            assert (outcome.outcome, outcome.reason) == ("kept", "workspace"), outcome
    assert moved in volumes and lab.pve.vm(target.vmid) is not None


def test_a_snapshot_that_contains_it_bars_detaching_and_deleting(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    vm = lab.pve.vm(made.vmid)
    vm.snapshots["before"] = {**vm.config, "snaptime": 1}
    vm.config["parent"] = "before"
    with pytest.raises(
        Kept,
        match="snapshot 'before' of VM .* contains the workspace .a rollback would roll it back, too.; delete",
    ):
        detach(lab, "w1")
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "workspace_in_snapshot")
    assert now(lab).state == "ATTACHED" and lab.pve.vm(made.vmid) is not None
    vm.snapshots.clear()
    del vm.config["parent"]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert_kept_whole(lab, found)


# ---- what is looked at before anything is given up ----


def test_a_snapshot_counts_also_when_the_configuration_stands_on_none(lab: Lab) -> None:
    """Snapshots aa and bb, back to aa, aa deleted: Proxmox notes no parent any more, and bb is still there."""
    make(lab)
    made = lab.create("a1", workspace="w1")
    vm = lab.pve.vm(made.vmid)
    vm.snapshots["bb"] = {**vm.config, "snaptime": 1}
    assert "parent" not in vm.config
    with pytest.raises(Kept, match="snapshot 'bb' of VM .* contains the workspace"):
        detach(lab, "w1")
    assert lab.destroy(made.vmid, force=True)[0].reason == "workspace_in_snapshot"
    # Not its own, but one that somebody had attached by hand when the snapshot was made.
    other, w2 = lab.create("a2"), make(lab, "w2")
    lab.pve.vm(other.vmid).snapshots["cc"] = {
        **lab.pve.vm(other.vmid).config,
        "scsi9": f"{w2.volume},size=8G",
        "snaptime": 1,
    }
    outcome = lab.destroy(other.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "workspace") and "snapshot 'cc'" in str(outcome.message)
    assert now(lab).state == "ATTACHED" and lab.pve.vm(made.vmid) is not None and lab.pve.vm(other.vmid) is not None


@pytest.mark.parametrize("why", ["another workspace", "protected", "snapshot"])
def test_a_destroy_that_is_refused_keeps_the_workspace_attached_and_the_vm_running(lab: Lab, why: str) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    vm = lab.pve.vm(made.vmid)
    if why == "another workspace":
        vm.config["scsi5"] = f"{make(lab, 'w2').volume},size=8G"
    elif why == "snapshot":
        vm.snapshots["before"] = {**vm.config, "snaptime": 1}
    else:

        def protect(method: str, path: str) -> None:
            if method == "POST" and path.endswith("/status/stop"):
                ctx = lab.context()
                ctx.records.amend(ctx.select_sandbox(made.vmid), "update", protected=True)

        lab.pve.before = protect
    outcome = lab.destroy(made.vmid, force=True)[0]
    lab.pve.before = None
    assert outcome.outcome == "kept" and outcome.reason == {
        "another workspace": "workspace",
        "snapshot": "workspace_in_snapshot",
    }.get(why, why)
    assert now(lab).state == "ATTACHED" and now(lab).sandbox_uuid == made.uuid and len(list_mentions(lab, found)) == 1
    assert lab.leftovers() == {"claims": [], "operations": []}
    if why != "protected":
        assert vm.status == "running" and lab.record(made).state == "RUNNING"
        assert not lab.pve.touched(made.vmid)[-1:] or "status/stop" not in " ".join(lab.pve.touched(made.vmid))


def test_protection_comes_too_late_once_the_workspace_is_being_taken_off(lab: Lab) -> None:
    make(lab)
    made = lab.create("a1", workspace="w1")
    said: list[str] = []

    def protect(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{made.vmid}/config") and not said:
            ctx = lab.context()
            with pytest.raises(Kept, match="cannot protect sandbox .*: it is being destroyed") as caught:
                ctx.records.amend(ctx.select_sandbox(made.vmid), "update", protected=True)
            said.append(caught.value.reason)

    lab.pve.before = protect
    assert lab.destroy(made.vmid, force=True)[0].outcome == "destroyed" and said == ["busy"]


@pytest.mark.parametrize("look", [1, 2])
def test_a_vm_that_goes_while_its_workspace_is_looked_at_is_looked_for_again(lab: Lab, look: int) -> None:
    """By the delete of a killed run, which is carried out late: gone is what it was to be."""
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    lab.power("stop", made.vmid)
    looks: list[str] = []

    def remove(method: str, where: str) -> None:
        if where.endswith(f"/qemu/{made.vmid}/snapshot"):
            looks.append(method)
            if len(looks) == look:
                lab.pve.vms.remove(lab.pve.vm(made.vmid))

    lab.pve.before = remove
    outcome = lab.destroy(made.vmid, force=True)[0]
    lab.pve.before = None
    assert (outcome.failed, outcome.state) == (False, "DESTROYED"), outcome.message
    assert lab.leftovers() == {"claims": [], "operations": []}
    assert_kept_whole(lab, found)


def test_a_guest_that_does_not_let_the_disk_go_leaves_a_clear_state(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    workspace.ensure_present(ctx, "w1", size="1G", storage="local-lvm")
    workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(made.vmid))
    lab.pve.unplug_refused = True
    try:
        with pytest.raises(Kept, match="does not release it. Stop the sandbox, then detach the workspace"):
            workspace.ensure_detached(lab.context(), "w1")
        assert now(lab).state == "ATTACHED" and not lab.pve.vm(made.vmid).pending
        lab.power("stop", made.vmid)
        assert workspace.ensure_detached(lab.context(), "w1").outcome == "detached"
    finally:
        lab.pve.unplug_refused = False


def test_a_vm_that_the_list_calls_stopped_is_stopped_before_its_disk_is_taken_off(lab: Lab) -> None:
    """The list lags by up to ten seconds; the guest of this VM would not let the disk go."""
    made = lab.create()
    ctx = lab.context()
    workspace.ensure_present(ctx, "w1", size="1G", storage="local-lvm")
    workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(made.vmid))
    rows = {
        "data": [
            {
                "vmid": vm.vmid,
                "type": "qemu",
                "node": vm.node,
                "status": "stopped",
                "name": vm.name,
                "template": int(vm.template),
            }
            for vm in lab.pve.vms
        ]
    }
    lab.pve.unplug_refused = True
    lab.pve.fault("GET", "/cluster/resources", "answer", status=200, body=json.dumps(rows), times=2)
    try:
        assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    finally:
        lab.pve.unplug_refused = False
        lab.calm()
    assert now(lab).state == "DETACHED"
