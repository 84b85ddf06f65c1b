# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workspaces outlive every way a sandbox can end, are attached once at most, and are deleted only when that is asked
for and proven to be safe.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    InvalidInput,
    Kept,
    NotFound,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.workspaces import Workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace, workspace_disk
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.double import TOKEN_ID
from support.lab import BYSTANDER, FakeClock, Lab

pytestmark = pytest.mark.faults

STORAGES = ("local-lvm", "local", "shared")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, storage=None)
    made.pve.add_node("pve2")
    made.pve.storages["local"]["content"] = "iso,images"
    made.pve.storages["shared"] = {
        "type": "nfs",
        "active": 1,
        "content": "images",
        "shared": 1,
        "files": set(),
        "volumes": {},
    }
    yield made
    made.stop()


def make(lab: Lab, name: str = "w1", storage: str = "local-lvm", **values: Any) -> Workspace:
    found = workspace.present(lab.context(), name, size=values.pop("size", "8G"), storage=storage, **values).workspace
    assert found is not None
    return found


def attach(lab: Lab, name: str, vmid: int, ttl: int | None = None, **options: Any) -> workspace.Done:
    ctx = lab.context(**options)
    return workspace.attached(ctx, name, ctx.select(vmid), ttl)


def detach(lab: Lab, name: str, **options: Any) -> workspace.Done:
    return workspace.detached(lab.context(**options), name)


def now(lab: Lab, name: str = "w1") -> Workspace:
    found = workspace.records(lab.context()).find(name)
    assert found is not None
    return found


def kept_whole(lab: Lab, found: Workspace) -> None:
    """The volume is there, under its name, and no VM has it."""
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    assert not any(found.volume in str(value) for vm in lab.pve.vms for value in vm.config.values())
    again = now(lab, found.name)
    assert (again.state, again.sandbox_uuid, again.slot, again.vmid) == ("DETACHED", None, None, None)


def in_vm(lab: Lab, found: Workspace) -> list[str]:
    return [f"{vm.vmid}:{key}" for vm in lab.pve.vms for key, value in vm.config.items() if found.volume in str(value)]


# ---- its own life ----


@pytest.mark.parametrize("storage", STORAGES)
def test_a_life(lab: Lab, storage: str) -> None:
    found = make(lab, storage=storage)
    assert found.owner_vmid == 990000 and f"vm-990000-ws-{found.id}" in found.volume and found.size == 8 * 1024**3
    assert found.node == (None if storage == "shared" else "pve1")
    assert workspace.present(lab.context(), "w1", size="8G").outcome == "unchanged"
    made = lab.create("a1", workspace="w1")
    assert made.workspace_id == found.id and now(lab).state == "ATTACHED"
    key = in_vm(lab, found)[0].partition(":")[2]
    drive = lab.pve.vm(made.vmid).config[key]
    assert "backup=0" in drive and "replicate=0" in drive and f"serial={found.serial}" in drive
    assert lab.events(made)[-1]["reason"] == "ready"
    assert workspace.present(lab.context(), "w1", size="12G").outcome == "grown" and now(lab).size == 12 * 1024**3
    with pytest.raises(WorkspaceRefused, match="w1' is ATTACHED to sandbox"):
        workspace.absent(lab.context(), "w1", force=True)
    assert detach(lab, "w1").changed and not detach(lab, "w1").changed
    assert lab.record(made).workspace_id is None
    kept_whole(lab, found)
    assert attach(lab, "w1", made.vmid).outcome == "attached" and attach(lab, "w1", made.vmid).outcome == "unchanged"
    lab.destroy(made.vmid, force=True)
    kept_whole(lab, found)
    with pytest.raises(WorkspaceRefused, match="holds 12G of data .* would be lost") as refused:
        workspace.absent(lab.context(), "w1", force=False)
    assert refused.value.remedy == "delete_workspace"
    assert workspace.absent(lab.context(), "w1", force=True).outcome == "deleted"
    assert workspace.absent(lab.context(), "w1", force=True).outcome == "not_found"
    assert lab.pve.volumes_of(found.owner_vmid) == []
    # Another of the same name is another one, under another owner.
    assert make(lab, storage=storage).owner_vmid == 990001


def test_a_configuration_that_somebody_changes_meanwhile_is_judged_anew(lab: Lab) -> None:
    found = make(lab)
    vmid = lab.create("a1").vmid
    steps: list[tuple[str, Any, str]] = [
        ("/config", lambda: attach(lab, "w1", vmid), "attached"),
        ("/resize", lambda: workspace.present(lab.context(), "w1", size="12G"), "grown"),
        ("/config", lambda: detach(lab, "w1"), "detached"),
    ]
    for ending, act, outcome in steps:
        edited = lab.edited_before(ending)
        assert act().outcome == outcome and edited == [vmid]
    assert lab.pve.vm(vmid).config["description"].count("edited") == 3 and now(lab).size == 12 * 1024**3
    kept_whole(lab, found)


def test_a_slot_that_somebody_takes_meanwhile_is_not_taken_from_him(lab: Lab) -> None:
    found = make(lab)
    vmid = lab.create("a1").vmid

    def edit(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/config"):
            lab.pve.vm(vmid).config.setdefault("scsi30", "local-lvm:vm-1-disk-9,size=1G")

    lab.pve.before = edit
    with pytest.raises(Kept, match=f"another disk was put into sandbox {vmid} as scsi30 meanwhile; run again"):
        attach(lab, "w1", vmid)
    assert lab.pve.vm(vmid).config["scsi30"] == "local-lvm:vm-1-disk-9,size=1G" and in_vm(lab, found) == []
    lab.pve.before = None
    assert attach(lab, "w1", vmid).outcome == "attached" and in_vm(lab, found) == [f"{vmid}:scsi29"]


def test_a_workspace_stays_as_long_as_its_sandbox_unless_it_was_given_for_another_time(lab: Lab) -> None:
    lab.clock = FakeClock()
    make(lab)
    make(lab, "w2")
    first, second, third = (
        lab.create("a1", workspace="w1", ttl=3600),
        lab.create("b1", ttl=3600),
        lab.create("c1", ttl=36000),
    )
    attach(lab, "w2", second.vmid, 1800)
    for holder in (first, second):
        lab.renew(holder.vmid, 36000)
    assert now(lab).lease_expires_at == lab.record(first).lease_expires_at
    lab.clock.pass_time(3700)
    for holder in (first, second):
        lab.power("stop", holder.vmid)
    with pytest.raises(WorkspaceRefused, match="w1' is ATTACHED to sandbox"):
        attach(lab, "w1", third.vmid)
    assert attach(lab, "w2", third.vmid).outcome == "attached"


def test_a_workspace_that_is_renewed_before_it_is_taken_over_stays(lab: Lab) -> None:
    lab.clock = FakeClock()
    make(lab)
    holder, other = lab.create("a1", workspace="w1", ttl=3600), lab.create("b1", ttl=36000)
    lab.power("stop", holder.vmid)
    lab.clock.pass_time(3700)
    renewed: list[str] = []

    class Records:
        """Renews between the first look and the claim, as another run might."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def claim(self, uuid: str, operation: str, **values: Any) -> Any:
            if operation == "detach_workspace" and not renewed:
                renewed.append(attach(lab, "w1", holder.vmid, 7200).outcome)
            return self._real.claim(uuid, operation, **values)

    ctx = lab.context()
    ctx.records = Records(ctx.records)  # type: ignore[assignment]
    with pytest.raises(WorkspaceRefused, match="w1' is ATTACHED to sandbox"):
        workspace.attached(ctx, "w1", ctx.select(other.vmid))
    assert renewed == ["renewed"] and now(lab).vmid == holder.vmid


def test_no_disk_is_pulled_out_of_a_machine_that_runs_again(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    lab.edited_before("/config", times=99)
    assert lab.destroy(made.vmid, force=True)[0].reason == "changed" and now(lab).state == "DETACHING"
    lab.pve.before = None
    lab.power("start", made.vmid)
    time.sleep(2.1)
    drift = lab.reconcile()
    assert [one.error for one in drift if one.error] and "which runs; detach it, or stop the sandbox" in str(
        [one.error for one in drift]
    )
    assert len(in_vm(lab, found)) == 1 and now(lab).state == "DETACHING"
    detach(lab, "w1")
    kept_whole(lab, found)


def test_what_is_refused_before_anything_is_made(lab: Lab) -> None:
    for values, message in (
        ({"size": None}, "size: missing"),
        ({"size": "8"}, "size: '8' is not valid"),
        ({"size": "0G"}, "size: '0G' is not valid"),
        ({"storage": "nowhere"}, "storage: 'nowhere' is not a storage of node pve1"),
        ({"node": "pve9"}, "node: 'pve9' is not a node"),
        ({"name": "a b"}, "name: 'a b' is not valid"),
    ):
        with pytest.raises(InvalidInput, match=message):
            make(lab, **values)
    lab.pve.storages["local"]["content"] = "iso"
    with pytest.raises(InvalidInput, match="storage: 'local' holds no disk images"):
        make(lab, storage="local")
    with pytest.raises(InvalidInput, match="workspace_owner_range: 1500-1600 overlaps vmid_range"):
        lab.context(workspace_owner_range="1500-1600")
    with pytest.raises(NotFound, match=r"workspace not found \('w9'\). Workspaces: none"):
        lab.create("a1", workspace="w9")
    make(lab)
    with pytest.raises(InvalidInput, match="size: workspace 'w1' has 8G, and workspaces only grow"):
        workspace.present(lab.context(), "w1", size="4G")
    with pytest.raises(WorkspaceRefused, match="attach it to a sandbox, then let it grow"):
        workspace.present(lab.context(), "w1", size="9G")
    with pytest.raises(InvalidInput, match="never moved"):
        workspace.present(lab.context(), "w1", storage="shared")
    assert lab.records() == [] and len(workspace.records(lab.context()).find_all()) == 1


def test_an_owner_that_a_vm_has_or_that_owns_something_is_not_taken(lab: Lab) -> None:
    lab.pve.add_guest(990000)
    assert make(lab).owner_vmid == 990001
    lab.pve._disk("local-lvm", "vm-990002-disk-0", 990002, 1024**3)
    with pytest.raises(WorkspaceRefused, match="has a volume of VMID 990002 already"):
        make(lab, "w2")
    assert make(lab, "w2").owner_vmid == 990003
    # Hidden from the list, but Proxmox says that it is taken.
    lab.pve.add_guest(990004)
    lab.pve.before = lambda method, path: None
    rows = lab.context().cluster.vms()
    assert 990004 in rows
    assert lab.pve.volumes_of(990002) == ["local-lvm:vm-990002-disk-0"]


def test_files_that_belong_to_no_vm_are_not_taken_for_volumes_of_the_owner(lab: Lab, tmp_path: Path) -> None:
    """A directory storage lists its snippets for every VMID that is asked for."""
    (tmp_path / "snippets").mkdir()
    (tmp_path / "snippets" / "agentlab-x.yaml").write_text("#cloud-config")
    lab.pve.hold_snippets(str(tmp_path / "snippets"))
    lab.pve.storages["local"]["content"] += ",images"
    assert make(lab, storage="local").state == "DETACHED"


def test_a_sandbox_gets_no_vmid_that_owns_a_workspace(lab: Lab) -> None:
    """Proxmox VE deletes with a VM what its VMID owns, and an unused disk of its own for good."""
    found = make(lab)
    for vmid in (found.owner_vmid, 990999):
        with pytest.raises(InvalidInput, match=rf"vmid: {vmid} is in workspace_owner_range \(990000-990999\)"):
            lab.create("a1", vmid=vmid)
    assert lab.records() == [] and lab.pve.vm(found.owner_vmid) is None
    kept_whole(lab, found)


def test_a_workspace_that_its_sandbox_owns_is_never_taken_off(lab: Lab) -> None:
    """The range was another one when the sandbox was made: Proxmox VE would keep the disk as an unused one of the
    VM's own, and then delete it.
    """
    found = make(lab)
    vmid = lab.create("a1", vmid=found.owner_vmid, options={"workspace_owner_range": "991000-991999"}).vmid
    attach(lab, "w1", vmid)
    before = in_vm(lab, found)
    with pytest.raises(Kept, match=f"owned by the VMID of sandbox {vmid} itself"):
        detach(lab, "w1")
    assert in_vm(lab, found) == before and before


def test_a_volume_that_comes_into_being_late_is_its_own(lab: Lab) -> None:
    """The answer was lost, and the request is carried out between the two looks of the next run."""
    lab.pve.fault("POST", "/content", "cut-before")
    with pytest.raises(AgentlabError):
        make(lab)
    reserved = now(lab)
    looks: list[str] = []

    def late(method: str, where: str) -> None:
        if method == "GET" and where.endswith("/content"):
            looks.append(where)
            if len(looks) == 2:
                lab.pve._disk("local-lvm", reserved.volume.rpartition(":")[2], reserved.owner_vmid, reserved.size)

    lab.pve.before = late
    with contextlib.suppress(AgentlabError):
        workspace.present(lab.context(), "w1", size="8G", storage="local-lvm")
    lab.pve.before = None
    assert len(looks) >= 2
    assert now(lab).state in ("CREATING", "DETACHED")
    done = workspace.present(lab.context(), "w1", size="8G", storage="local-lvm").workspace
    assert done is not None and done.id == reserved.id
    kept_whole(lab, done)


# ---- once at most ----


def test_a_second_attachment_is_refused_by_the_records(lab: Lab) -> None:
    found = make(lab)
    one, two = lab.create("a1", workspace="w1"), lab.create("a2")
    with pytest.raises(
        WorkspaceRefused,
        match=f"is ATTACHED to sandbox {one.vmid} .a1., whose lease on it lasts until .*Z; detach it first",
    ):
        attach(lab, "w1", two.vmid)
    with pytest.raises(WorkspaceRefused, match="is ATTACHED to sandbox"):
        lab.create("a3", workspace="w1")
    assert len(in_vm(lab, found)) == 1 and len(lab.records()) == 2
    make(lab, "w2")
    with pytest.raises(WorkspaceRefused, match="has workspace 'w1' already"):
        attach(lab, "w2", one.vmid)


def test_a_foreign_attachment_is_refused_and_left_alone(lab: Lab) -> None:
    found = make(lab)
    lab.pve.vm(BYSTANDER).config["scsi7"] = f"{found.volume},size=8G"
    before = dict(lab.pve.vm(BYSTANDER).config)
    made = lab.create("a1")
    with pytest.raises(
        WorkspaceRefused, match=f"VM {BYSTANDER} has its volume .* attached, though by no record of ours"
    ):
        attach(lab, "w1", made.vmid)
    with pytest.raises(CreationFailed, match="what was made for it has been removed"):
        lab.create("a2", workspace="w1")
    with pytest.raises(WorkspaceRefused, match=f"VM {BYSTANDER} has its volume"):
        workspace.absent(lab.context(), "w1", force=True)
    assert lab.pve.vm(BYSTANDER).config == before and now(lab).state == "DETACHED"
    assert in_vm(lab, found) == [f"{BYSTANDER}:scsi7"]


def test_a_vm_that_cannot_be_read_may_have_it(lab: Lab) -> None:
    found = make(lab, storage="shared")
    made = lab.create("a1")
    lab.pve.add_guest(700, node="pve2")
    lab.pve.set_node_offline("pve2")
    with pytest.raises(Kept, match="whether VM 700 has it attached cannot be read"):
        attach(lab, "w1", made.vmid)
    assert in_vm(lab, found) == []


def test_a_lease_that_is_over_is_taken_over_only_from_a_vm_that_is_stopped(lab: Lab) -> None:
    found = make(lab)
    one, two = lab.create("a1", workspace="w1"), lab.create("a2")
    lab.context().database.write(lambda conn: conn.execute("UPDATE workspaces SET lease_expires_at = 1") and None)
    with pytest.raises(WorkspaceRefused, match="its VM still runs; stop it first"):
        attach(lab, "w1", two.vmid)
    lab.power("stop", one.vmid)
    assert attach(lab, "w1", two.vmid, ttl=600).outcome == "attached"
    assert [where.partition(":")[0] for where in in_vm(lab, found)] == [str(two.vmid)]
    assert lab.record(one).workspace_id is None and lab.record(two).workspace_id == found.id
    assert attach(lab, "w1", two.vmid, ttl=6000).outcome == "renewed"


@pytest.mark.parametrize("storage", STORAGES)
def test_two_nodes(lab: Lab, storage: str) -> None:
    found = make(lab, storage=storage, node="pve2")
    lab.pve.add_template(9001, "debian-pve2", node="pve2", storage="local-lvm")
    here = lab.create("here")
    if storage == "shared":
        attach(lab, "w1", here.vmid)
        lab.destroy(here.vmid, force=True)
    else:
        with pytest.raises(
            WorkspaceRefused,
            match=r"is on node pve2 \(storage .* is local\), and the sandbox is on pve1; create the sandbox with node=pve2",
        ):
            attach(lab, "w1", here.vmid)
        with pytest.raises(WorkspaceRefused, match="is on node pve2"):
            lab.create("no", workspace="w1", node="pve1")
    kept_whole(lab, found)
    # Without a node, the workspace's own is taken.
    there = lab.create(
        "there", workspace="w1", template="debian-pve2", **({"node": "pve2"} if storage == "shared" else {})
    )
    assert there.node == "pve2"
    lab.destroy(there.vmid, force=True)
    kept_whole(lab, found)


# ---- every way a sandbox ends ----


@pytest.mark.parametrize(
    "way",
    ["destroy", "force", "prune", "vm_absent", "vmid_reused", "reconcile external", "failed start", "failed clone"],
)
@pytest.mark.parametrize("storage", ["local-lvm", "shared"])
def test_it_outlives_every_way_out(lab: Lab, way: str, storage: str) -> None:
    found = make(lab, storage=storage)
    if way.startswith("failed"):
        if way == "failed start":
            lab.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
        else:
            lab.pve.next_task("qmclone", "fail", text="no space left")
        with pytest.raises(CreationFailed):
            lab.create("a1", workspace="w1")
    else:
        made = lab.create("a1", workspace="w1")
        vm = lab.pve.vm(made.vmid)
        if way == "destroy":
            lab.power("stop", made.vmid)
            lab.destroy(made.vmid)
        elif way == "force":
            lab.destroy(made.vmid, force=True)
        elif way == "prune":
            lab.force_state(made.vmid, "TIMEOUT", age=10, lease_expires_at=int(time.time()) - 10)
            assert lab.prune().pruned
        elif way == "vm_absent":
            lab.pve.vms.remove(vm)
            lab.destroy(made.vmid, force=True)
        elif way == "vmid_reused":
            lab.pve.make_foreign(made.vmid)
            lab.destroy(made.vmid, force=True)
        else:
            lab.pve.vms.remove(vm)
            lab.reconcile()
            lab.reconcile()
    assert lab.records()[0].state == "DESTROYED" and lab.records()[0].workspace_id is None
    kept_whole(lab, found)
    lab.calm()
    assert lab.create("next", workspace="w1").workspace_id == found.id


def test_a_reused_vmid_that_has_the_volume_keeps_it_from_everybody_else(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    slot = in_vm(lab, found)[0].partition(":")[2]
    drive = lab.pve.vm(made.vmid).config[slot]
    lab.pve.vms.remove(lab.pve.vm(made.vmid))
    foreign = lab.pve.make_foreign(made.vmid)
    foreign.config[slot] = drive
    before = dict(foreign.config)
    assert lab.destroy(made.vmid, force=True)[0].reason == "vmid_reused"
    other = lab.create("a2")
    with pytest.raises(WorkspaceRefused, match=f"VM {made.vmid} has its volume"):
        attach(lab, "w1", other.vmid)
    assert lab.pve.vm(made.vmid).config == before


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
        destroy.plan(ctx, ctx.select(made.vmid))
    del lab.pve.vm(made.vmid).config["scsi5"]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    kept_whole(lab, found)


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
    slot = in_vm(lab, found)[0].partition(":")[2]
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
        match="snapshot 'before' of VM .* contains it .rolling back would roll it back too.; delete the snapshot first",
    ):
        detach(lab, "w1")
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "workspace_in_snapshot")
    assert now(lab).state == "ATTACHED" and lab.pve.vm(made.vmid) is not None
    vm.snapshots.clear()
    del vm.config["parent"]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    kept_whole(lab, found)


def test_a_guest_that_does_not_take_or_release_a_disk(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.hotplug = False
    with pytest.raises(WorkspaceRefused, match="did not take the disk"):
        attach(lab, "w1", made.vmid)
    kept_whole(lab, found)
    assert not lab.pve.vm(made.vmid).pending
    lab.pve.hotplug = True
    attach(lab, "w1", made.vmid)
    lab.pve.hotplug = False
    with pytest.raises(Kept, match="the running guest does not let it go"):
        detach(lab, "w1", wait_timeout="1s")
    assert now(lab).state == "DETACHING"
    lab.pve.hotplug = True
    assert detach(lab, "w1").changed
    kept_whole(lab, found)


@pytest.mark.parametrize("hidden", ["volume", "storage"])
def test_a_volume_that_these_credentials_do_not_see_is_not_called_gone(lab: Lab, hidden: str) -> None:
    """Proxmox's list leaves out what they may not see, with the status of a success."""
    found = make(lab)
    lab.pve.add_vm(2000, "theirs")

    def grant(*volume: str) -> None:
        lab.pve.acl = {TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", *volume})]}

    grant("Datastore.Audit" if hidden == "volume" else "VM.Config.Disk")
    for dry_run in (True, False):
        with pytest.raises(
            Kept, match="would not if it were there: .* Grant Datastore.Allocate, .* together on /storage/local-lvm"
        ):
            workspace.absent(lab.context(dry_run=dry_run), "w1", force=True)
    told = workspace.show(lab.context(), verify=True)["workspaces"][0]
    assert told["volume_present"] is None and told["attached_to"] == [] and "may not see it" in told["unknown"][0]
    assert now(lab).state == "DETACHED" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    grant("Datastore.Audit", "VM.Config.Disk")
    # Somebody removed it: with rights to see it, that is known.
    lab.pve.storages["local-lvm"]["volumes"].clear()
    told = workspace.show(lab.context(), verify=True)["workspaces"][0]
    assert told["volume_present"] is False and told["unknown"] == []
    assert workspace.absent(lab.context(), "w1", force=True).outcome == "deleted"


def test_rights_lost_between_deleting_and_looking_leave_it_deleting(lab: Lab) -> None:
    found = make(lab)
    lab.pve.fault("DELETE", r"/content/.*", "cut-before")

    def revoke(method: str, path: str) -> None:
        if method == "DELETE":
            lab.pve.acl = {
                TOKEN_ID: [
                    ("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})
                ]
            }

    lab.pve.before = revoke
    with pytest.raises(AgentlabError):
        workspace.absent(lab.context(), "w1", force=True)
    lab.pve.before = None
    assert now(lab).state == "DELETING"
    with pytest.raises(Kept, match="may not see it"):
        workspace.finish(lab.context(), now(lab))
    assert now(lab).state == "DELETING" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.acl = None
    workspace.finish(lab.context(), now(lab))
    assert lab.pve.volumes_of(found.owner_vmid) == [] and workspace.records(lab.context()).find("w1") is None


def test_a_creation_that_was_cut_off_is_given_up_only_where_its_volume_would_be_seen(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-after")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.acl = {
        TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})]
    }
    with pytest.raises(Kept, match="may not see it"):
        workspace.finish(lab.context(), found)
    lab.pve.acl = None
    assert workspace.finish(lab.context(), found).state == "DETACHED"


def test_a_volume_that_the_storage_does_not_list_for_now_is_not_called_gone(lab: Lab) -> None:
    """Proxmox lists only content types that the storage has now."""
    found = make(lab)
    lab.pve.storages["local-lvm"]["content"] = "rootdir"
    lab.pve.fault("GET", "/content", "answer", status=200, body='{"data": []}', times=9)
    with pytest.raises(Kept, match="has no content type 'images'"):
        workspace.absent(lab.context(), "w1", force=True)
    assert now(lab).state == "DETACHED" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]


def test_a_right_that_is_granted_between_two_looks_gives_nothing_up(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-after")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    lab.pve.acl = {
        TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})]
    }

    def grant(_method: str, path: str) -> None:
        if path.endswith("/access/permissions"):
            lab.pve.acl = None

    lab.pve.before = grant
    assert workspace.finish(lab.context(), found).state == "DETACHED"
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]


def test_a_second_try_to_make_a_volume_is_in_doubt_from_then_on(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-before")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    lab.options["doubt_window"] = "20s"
    lab.clock = FakeClock()
    lab.clock.pass_time(30)
    assert [one.name for one in workspace_disk.unfinished(lab.context())] == ["w1"]
    lab.pve.fault("POST", "/content", "hang", seconds=2, carry_out="late")
    with pytest.raises(AgentlabError):
        workspace.present(lab.context(api_timeout=1), "w1", size="8G", storage="local-lvm")
    assert workspace_disk.unfinished(lab.context()) == []
    with pytest.raises(Kept, match="may still be carried out"):
        workspace.absent(lab.context(), "w1", force=True)
    time.sleep(2.5)
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    assert workspace.present(lab.context(), "w1", size="8G").changed
    kept_whole(lab, found)


@pytest.mark.parametrize("size", ["1T", "1024G", "524288M", "3M"])
def test_every_size_that_is_accepted_can_be_made(lab: Lab, size: str) -> None:
    found = make(lab, size=size)
    assert found.size == workspace.parse_size(size)
    assert workspace.present(lab.context(), "w1", size=size).outcome == "unchanged"


def test_a_destroy_that_cannot_see_its_workspace_stops_nothing_and_names_the_right(lab: Lab) -> None:
    found = make(lab)
    made, other = lab.create("a1", workspace="w1"), lab.create("a2")
    lab.pve.vm(other.vmid).config["scsi5"] = f"local-lvm:vm-{other.vmid}-disk-7,size=1G"
    lab.pve.acl = {
        TOKEN_ID: [
            (
                "/",
                {
                    "Sys.Audit",
                    "VM.Audit",
                    "VM.Allocate",
                    "VM.PowerMgmt",
                    "VM.Config.Options",
                    "VM.Config.Disk",
                    "Datastore.AllocateSpace",
                },
            )
        ]
    }
    for vmid in (made.vmid, other.vmid, made.vmid):
        outcome = lab.destroy(vmid, force=True)[0]
        assert (outcome.outcome, outcome.reason) == ("kept", "unknown") and "Grant Datastore.Allocate" in str(
            outcome.message
        )
        assert lab.pve.vm(vmid).status == "running"
    assert now(lab).state == "ATTACHED" and len(in_vm(lab, found)) == 1
    lab.pve.acl = None
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    kept_whole(lab, found)


def test_one_storage_that_cannot_be_read_leaves_the_others_told(lab: Lab) -> None:
    make(lab)
    make(lab, "w2", storage="shared")
    lab.pve.fault("GET", "/storage/local-lvm/content", "answer", status=595, body="", times=99)
    one, two = workspace.show(lab.context(), verify=True)["workspaces"]
    assert one["volume_present"] is None and one["attached_to"] == [] and "595" in one["unknown"][0]
    assert (two["volume_present"], two["attached_to"], two["unknown"]) == (True, [], [])


def test_a_workspace_that_is_put_aside_in_a_vm_is_attached_once_it_is_taken_off_as_the_message_says(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.vm(made.vmid).config["unused0"] = found.volume
    for _time in range(2):
        with pytest.raises(WorkspaceRefused, match=f"qm set {made.vmid} --delete unused0"):
            attach(lab, "w1", made.vmid)
        assert now(lab).state == "DETACHED"
    del lab.pve.vm(made.vmid).config["unused0"]
    assert attach(lab, "w1", made.vmid).outcome == "attached"


def test_what_was_taken_off_by_hand_is_not_called_attached(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    assert attach(lab, "w1", made.vmid).outcome == "unchanged"
    vm = lab.pve.vm(made.vmid)
    slot = now(lab).slot
    assert slot is not None
    drive = vm.config.pop(slot)
    with pytest.raises(WorkspaceRefused, match="does not have it attached any more"):
        attach(lab, "w1", made.vmid)
    # Put aside is not attached either.
    vm.config["unused0"] = found.volume
    with pytest.raises(WorkspaceRefused, match="does not have it attached any more"):
        attach(lab, "w1", made.vmid, ttl=7200)
    with pytest.raises(WorkspaceRefused, match="does not have it attached any more"):
        workspace.present(lab.context(), "w1", size="12G")
    assert detach(lab, "w1").changed
    kept_whole(lab, found)
    assert attach(lab, "w1", made.vmid).outcome == "attached"
    assert vm.config[str(now(lab).slot)] == drive


def test_a_disk_that_is_only_pending_after_a_lost_answer_is_not_called_attached(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.hotplug = False
    lab.pve.fault("PUT", f"/qemu/{made.vmid}/config", "cut-after")
    with pytest.raises(AgentlabError):
        attach(lab, "w1", made.vmid)
    assert now(lab).state == "ATTACHING" and lab.pve.vm(made.vmid).pending
    with pytest.raises(AgentlabError, match="did not take the disk"):
        attach(lab, "w1", made.vmid)
    assert now(lab).state != "ATTACHED" and not lab.pve.vm(made.vmid).pending
    lab.pve.hotplug = True
    assert attach(lab, "w1", made.vmid).outcome == "attached"
    assert len(in_vm(lab, found)) == 1


# ---- lost answers ----


@pytest.mark.parametrize("kind", ["cut-before", "cut-after"])
@pytest.mark.parametrize(("method", "suffix"), [("POST", "/content"), ("PUT", "/config"), ("DELETE", r"/content/.*")])
def test_a_lost_answer_is_settled_by_the_next_run(lab: Lab, kind: str, method: str, suffix: str) -> None:
    if method == "POST":
        lab.pve.fault(method, suffix, kind)
        with pytest.raises(AgentlabError):
            make(lab)
        found = make(lab)
        kept_whole(lab, found)
        return
    found = make(lab)
    made = lab.create("a1")
    if method == "PUT":
        # A write that was carried out is recognised in the configuration; one that was not is left to the next run.
        lab.pve.fault(method, suffix, kind)
        if kind == "cut-before":
            with pytest.raises(AgentlabError):
                attach(lab, "w1", made.vmid)
            assert now(lab).state == "ATTACHING"
        assert attach(lab, "w1", made.vmid).outcome == "attached"
        assert len(in_vm(lab, found)) == 1
        lab.pve.fault(method, suffix, kind)
        if kind == "cut-before":
            with pytest.raises(AgentlabError):
                detach(lab, "w1")
        assert detach(lab, "w1").changed
        kept_whole(lab, found)
    else:
        lab.pve.fault(method, suffix, kind)
        with pytest.raises(AgentlabError):
            workspace.absent(lab.context(), "w1", force=True)
        assert now(lab).state == "DELETING"
        with pytest.raises(WorkspaceRefused, match="is DELETING"):
            attach(lab, "w1", made.vmid)
        assert workspace.absent(lab.context(), "w1", force=True).outcome == "deleted"
        assert lab.pve.volumes_of(found.owner_vmid) == []


# ---- a stranger in the place of the VM, while a workspace is worked on ----


def stranger_with(lab: Lab, vmid: int, config: dict[str, str], *, running: bool = True) -> Any:
    """Somebody else's VM in place of ours, with these keys in its configuration."""
    foreign = lab.pve.make_foreign(vmid, running=running)
    foreign.config.update(config)
    return foreign


@pytest.mark.parametrize("moment", ["PUT /resize", "GET /pending"])
def test_growing_changes_no_stranger_that_took_the_vmid(lab: Lab, moment: str) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    slot = in_vm(lab, found)[0].partition(":")[2]
    drive = lab.pve.vm(made.vmid).config[slot]
    method, suffix = moment.split()
    swapped: list[Any] = []

    def swap(asked: str, path: str) -> None:
        if asked == method and path.endswith(f"/qemu/{made.vmid}{suffix}") and not swapped:
            swapped.append(stranger_with(lab, made.vmid, {slot: drive}))
            swapped.append(dict(swapped[0].config))

    lab.pve.before = swap
    with pytest.raises(AgentlabError):
        workspace.present(lab.context(), "w1", size="12G")
    assert swapped and swapped[0] in lab.pve.vms and swapped[0].config == swapped[1]


@pytest.mark.parametrize("moment", ["GET /pending", "PUT /config", "GET /config"])
def test_an_attachment_that_is_undone_touches_no_stranger_that_took_the_vmid(lab: Lab, moment: str) -> None:
    """The guest did not take the disk; before that is undone the VMID is somebody else's, whose VM has the volume
    (or just the slot) in its configuration.
    """
    found = make(lab)
    made = lab.create("a1")
    lab.pve.hotplug = False
    method, suffix = moment.split()
    asked: list[str] = []
    swapped: list[Any] = []

    def swap(verb: str, path: str) -> None:
        if not path.endswith((f"/qemu/{made.vmid}/config", f"/qemu/{made.vmid}/pending")):
            return
        if (verb, path.rpartition("/")[2]) == (method, suffix.strip("/")) and "PUT" in asked and not swapped:
            swapped.append(stranger_with(lab, made.vmid, {"scsi30": f"{found.volume},size=8G"}))
            swapped[0].pending["scsi30"] = f"{found.volume},size=9G"
            swapped.extend((dict(swapped[0].config), dict(swapped[0].pending)))
        asked.append(verb)

    lab.pve.before = swap
    with contextlib.suppress(AgentlabError):
        # Seen after the write with the volume in it, the VM passes for ours until it is next judged.
        assert attach(lab, "w1", made.vmid).outcome == "attached" and moment == "GET /pending"
    assert swapped and swapped[0] in lab.pve.vms and (swapped[0].config, swapped[0].pending) == (swapped[1], swapped[2])


def test_a_refusal_after_a_lost_answer_does_not_free_what_may_still_be_attached(lab: Lab) -> None:
    """The request of the first try is carried out late; meanwhile the second is refused.

    Nobody else may get the workspace before that is over.
    """
    found = make(lab)
    one, two = lab.create("a1"), lab.create("a2")
    lab.options["doubt_window"] = "30s"
    lab.pve.fault("PUT", f"/qemu/{one.vmid}/config", "hang", seconds=3, carry_out="late")
    with pytest.raises(AgentlabError):
        attach(lab, "w1", one.vmid, api_timeout=1)
    # The second try is refused before it asks for anything: somebody's VM has the volume for a moment.
    bystander = lab.pve.vm(BYSTANDER)
    bystander.config["scsi7"] = f"{found.volume},size=8G"
    with pytest.raises(AgentlabError):
        attach(lab, "w1", one.vmid)
    del bystander.config["scsi7"]
    with pytest.raises(AgentlabError):
        attach(lab, "w1", two.vmid)
    time.sleep(3.5)
    assert [where.partition(":")[0] for where in in_vm(lab, found)] in ([], [str(one.vmid)])
    assert now(lab).sandbox_uuid == one.uuid


# ---- what is looked at before anything is given up ----


def test_a_snapshot_counts_also_when_the_configuration_stands_on_none(lab: Lab) -> None:
    """Snapshots aa and bb, back to aa, aa deleted: Proxmox notes no parent any more, and bb is still there."""
    make(lab)
    made = lab.create("a1", workspace="w1")
    vm = lab.pve.vm(made.vmid)
    vm.snapshots["bb"] = {**vm.config, "snaptime": 1}
    assert "parent" not in vm.config
    with pytest.raises(Kept, match="snapshot 'bb' of VM .* contains it"):
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
                ctx.records.amend(ctx.select(made.vmid), "update", protected=True)

        lab.pve.before = protect
    outcome = lab.destroy(made.vmid, force=True)[0]
    lab.pve.before = None
    assert outcome.outcome == "kept" and outcome.reason == {
        "another workspace": "workspace",
        "snapshot": "workspace_in_snapshot",
    }.get(why, why)
    assert now(lab).state == "ATTACHED" and now(lab).sandbox_uuid == made.uuid and len(in_vm(lab, found)) == 1
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
                ctx.records.amend(ctx.select(made.vmid), "update", protected=True)
            said.append(caught.value.reason)

    lab.pve.before = protect
    assert lab.destroy(made.vmid, force=True)[0].outcome == "destroyed" and said == ["busy"]


@pytest.mark.parametrize("times", [1, 9])
def test_a_vm_that_migrates_while_it_is_asked_may_have_it(lab: Lab, times: int) -> None:
    """ "Does not exist" from one node says only that the VM is not there."""
    found = make(lab, storage="shared")
    made = lab.create("a1")
    holder = lab.pve.add_guest(700, node="pve1", config={"scsi7": f"{found.volume},size=8G"})
    moves: list[int] = []

    def migrate(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/qemu/700/pending") and len(moves) < times:
            moves.append(1)
            holder.node = "pve1" if holder.node == "pve2" else "pve2"

    lab.pve.before = migrate
    with pytest.raises(AgentlabError, match="VM 700 has (its volume|it attached cannot be read)"):
        attach(lab, "w1", made.vmid)
    with pytest.raises(AgentlabError, match="VM 700 has (its volume|it attached cannot be read)"):
        workspace.absent(lab.context(), "w1", force=True)
    lab.pve.before = None
    assert in_vm(lab, found) == ["700:scsi7"] and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.remove_vm(700)


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
    kept_whole(lab, found)


def test_what_a_message_advises_frees_the_vm_from_a_disk_that_no_record_tells_of(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.vm(made.vmid).config["scsi5"] = f"{found.volume},size=8G"
    outcome = lab.destroy(made.vmid, force=True)[0]
    advised = re.search(r"qm set (\d+) --delete (\w+)", str(outcome.message))
    assert advised is not None and "agentlab_workspace" not in str(outcome.message)
    del lab.pve.vm(int(advised[1])).config[advised[2]]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    kept_whole(lab, found)


@pytest.mark.parametrize("moment", ["/snapshot", "/content"])
def test_a_vm_that_is_swapped_while_its_workspace_is_looked_at_is_not_stopped(lab: Lab, moment: str) -> None:
    """What is asked about workspaces before a destroy takes its time: whose VM it is is looked at once more before
    it is stopped.
    """
    make(lab)
    made = lab.create("a1", workspace="w1")
    lab.pve.vm(made.vmid).config["scsi5"] = f"local-lvm:vm-{made.vmid}-disk-7,size=1G"
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "GET" and path.endswith(moment) and not swapped:
            swapped.append(lab.pve.make_foreign(made.vmid, running=True))
            lab.pve.requests.clear()

    lab.pve.before = swap
    outcome = lab.destroy(made.vmid, force=True)[0]
    lab.pve.before = None
    assert (outcome.outcome, outcome.reason) == ("destroyed", "vmid_reused")
    lab.untouched(swapped[0], status="running")


def test_a_vm_that_is_swapped_while_it_gets_its_workspace_is_not_started(lab: Lab) -> None:
    found = make(lab)
    swapped: list[Any] = []
    written: list[str] = []

    def swap(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/qemu/1000/pending") and written and not swapped:
            swapped.append(stranger_with(lab, 1000, {"scsi30": f"{found.volume},size=8G"}, running=False))
            lab.pve.requests.clear()
        if method == "PUT" and in_vm(lab, found) == [] and now(lab).slot is not None:
            written.append(path)

    lab.pve.before = swap
    with pytest.raises(AgentlabError):
        lab.create("a1", workspace="w1")
    lab.pve.before = None
    lab.untouched(swapped[0], status="stopped")


def test_a_guest_that_does_not_let_the_disk_go_leaves_a_clear_state(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    workspace.present(ctx, "w1", size="1G", storage="local-lvm")
    workspace.attached(ctx, "w1", ctx.select(made.vmid))
    lab.pve.unplug_refused = True
    try:
        with pytest.raises(Kept, match="does not let it go. Stop the sandbox, then detach it"):
            workspace.detached(lab.context(), "w1")
        assert now(lab).state == "ATTACHED" and not lab.pve.vm(made.vmid).pending
        lab.power("stop", made.vmid)
        assert workspace.detached(lab.context(), "w1").outcome == "detached"
    finally:
        lab.pve.unplug_refused = False


def test_a_vm_that_the_list_calls_stopped_is_stopped_before_its_disk_is_taken_off(lab: Lab) -> None:
    """The list lags by up to ten seconds; the guest of this VM would not let the disk go."""
    made = lab.create()
    ctx = lab.context()
    workspace.present(ctx, "w1", size="1G", storage="local-lvm")
    workspace.attached(ctx, "w1", ctx.select(made.vmid))
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
