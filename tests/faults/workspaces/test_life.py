# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life of a workspace: made, attached, renewed, grown, deleted, and what is refused before anything is made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    InvalidInput,
    Kept,
    NotFound,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.lab import FakeClock, Lab
from support.workspaces import STORAGES, assert_kept_whole, attach, detach, list_mentions, make, now

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("storage", STORAGES)
def test_a_workspace_lives_on_each_kind_of_storage(lab: Lab, storage: str) -> None:
    found = make(lab, storage=storage)
    assert found.owner_vmid == 990000 and f"vm-990000-ws-{found.id}" in found.volume and found.size == 8 * 1024**3
    assert found.node == (None if storage == "shared" else "pve1")
    assert workspace.ensure_present(lab.context(), "w1", size="8G").outcome == "unchanged"
    made = lab.create("a1", workspace="w1")
    assert made.workspace_id == found.id and now(lab).state == "ATTACHED"
    key = list_mentions(lab, found)[0].partition(":")[2]
    drive = lab.pve.vm(made.vmid).config[key]
    assert "backup=0" in drive and "replicate=0" in drive and f"serial={found.serial}" in drive
    assert lab.events(made)[-1]["reason"] == "ready"
    assert (
        workspace.ensure_present(lab.context(), "w1", size="12G").outcome == "grown" and now(lab).size == 12 * 1024**3
    )
    with pytest.raises(WorkspaceRefused, match="w1' is ATTACHED to sandbox"):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    assert detach(lab, "w1").changed and not detach(lab, "w1").changed
    assert lab.record(made).workspace_id is None
    assert_kept_whole(lab, found)
    assert attach(lab, "w1", made.vmid).outcome == "attached" and attach(lab, "w1", made.vmid).outcome == "unchanged"
    lab.destroy(made.vmid, force=True)
    assert_kept_whole(lab, found)
    with pytest.raises(WorkspaceRefused, match="holds 12G of data .* would be lost") as refused:
        workspace.ensure_absent(lab.context(), "w1", force=False)
    assert refused.value.remedy == "delete_workspace"
    assert workspace.ensure_absent(lab.context(), "w1", force=True).outcome == "deleted"
    assert workspace.ensure_absent(lab.context(), "w1", force=True).outcome == "not_found"
    assert lab.pve.volumes_of(found.owner_vmid) == []
    # Another of the same name is another one, under another owner.
    assert make(lab, storage=storage).owner_vmid == 990001


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
        workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(other.vmid))
    assert renewed == ["renewed"] and now(lab).vmid == holder.vmid


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
    with pytest.raises(InvalidInput, match="storage: 'local' is not a storage of node pve1 for disks of VMs"):
        make(lab, storage="local")
    with pytest.raises(InvalidInput, match="workspace_owner_range: 1500-1600 overlaps vmid_range"):
        lab.context(workspace_owner_range="1500-1600")
    with pytest.raises(NotFound, match=r"workspace not found \('w9'\). Workspaces: none"):
        lab.create("a1", workspace="w9")
    make(lab)
    with pytest.raises(InvalidInput, match="size: workspace 'w1' has 8G, and workspaces only grow"):
        workspace.ensure_present(lab.context(), "w1", size="4G")
    with pytest.raises(WorkspaceRefused, match="Attach the workspace to a sandbox, then run again"):
        workspace.ensure_present(lab.context(), "w1", size="9G")
    with pytest.raises(InvalidInput, match="never moved"):
        workspace.ensure_present(lab.context(), "w1", storage="shared")
    assert lab.records() == [] and len(workspace.open_records(lab.context()).find_all()) == 1


def test_an_owner_that_a_vm_has_or_that_owns_something_is_not_taken(lab: Lab) -> None:
    lab.pve.add_guest(990000)
    assert make(lab).owner_vmid == 990001
    lab.pve.add_disk("local-lvm", "vm-990002-disk-0", 990002, 1024**3)
    with pytest.raises(WorkspaceRefused, match="has a volume of VMID 990002 already"):
        make(lab, "w2")
    assert make(lab, "w2").owner_vmid == 990003
    # Hidden from the list, but Proxmox says that it is taken.
    lab.pve.add_guest(990004)
    lab.pve.before = lambda method, path: None
    rows = lab.context().cluster.list_vms()
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
    assert_kept_whole(lab, found)


def test_a_workspace_that_its_sandbox_owns_is_never_taken_off(lab: Lab) -> None:
    """The range was another one when the sandbox was made: Proxmox VE would keep the disk as an unused one of the
    VM's own, and then delete it.
    """
    found = make(lab)
    vmid = lab.create("a1", vmid=found.owner_vmid, options={"workspace_owner_range": "991000-991999"}).vmid
    attach(lab, "w1", vmid)
    before = list_mentions(lab, found)
    with pytest.raises(Kept, match=f"owned by the VMID of sandbox {vmid} itself"):
        detach(lab, "w1")
    assert list_mentions(lab, found) == before and before


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
                lab.pve.add_disk("local-lvm", reserved.volume.rpartition(":")[2], reserved.owner_vmid, reserved.size)

    lab.pve.before = late
    with contextlib.suppress(AgentlabError):
        workspace.ensure_present(lab.context(), "w1", size="8G", storage="local-lvm")
    lab.pve.before = None
    assert len(looks) >= 2
    assert now(lab).state in ("CREATING", "DETACHED")
    done = workspace.ensure_present(lab.context(), "w1", size="8G", storage="local-lvm").workspace
    assert done is not None and done.id == reserved.id
    assert_kept_whole(lab, done)


@pytest.mark.parametrize("size", ["1T", "1024G", "524288M", "3M"])
def test_every_size_that_is_accepted_can_be_made(lab: Lab, size: str) -> None:
    found = make(lab, size=size)
    assert found.size == workspace.parse_size(size)
    assert workspace.ensure_present(lab.context(), "w1", size=size).outcome == "unchanged"
