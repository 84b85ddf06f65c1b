# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A workspace is attached once at most, and taken over only from a VM that is stopped."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, CreationFailed, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.lab import BYSTANDER, Lab
from support.workspaces import STORAGES, assert_kept_whole, attach, detach, list_mentions, make, now

pytestmark = pytest.mark.faults


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
    assert len(list_mentions(lab, found)) == 1 and len(lab.records()) == 2
    make(lab, "w2")
    with pytest.raises(WorkspaceRefused, match="has workspace 'w1' already"):
        attach(lab, "w2", one.vmid)


def test_a_foreign_attachment_is_refused_and_left_alone(lab: Lab) -> None:
    found = make(lab)
    lab.pve.vm(BYSTANDER).config["scsi7"] = f"{found.volume},size=8G"
    before = dict(lab.pve.vm(BYSTANDER).config)
    made = lab.create("a1")
    with pytest.raises(WorkspaceRefused, match=f"VM {BYSTANDER} has its volume .* attached, without a record of ours"):
        attach(lab, "w1", made.vmid)
    with pytest.raises(CreationFailed, match="what was made for it has been removed"):
        lab.create("a2", workspace="w1")
    with pytest.raises(WorkspaceRefused, match=f"VM {BYSTANDER} has its volume"):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    assert lab.pve.vm(BYSTANDER).config == before and now(lab).state == "DETACHED"
    assert list_mentions(lab, found) == [f"{BYSTANDER}:scsi7"]


def test_a_vm_that_cannot_be_read_may_have_it(lab: Lab) -> None:
    found = make(lab, storage="shared")
    made = lab.create("a1")
    lab.pve.add_guest(700, node="pve2")
    lab.pve.set_node_offline("pve2")
    with pytest.raises(Kept, match="whether VM 700 has its volume attached cannot be read"):
        attach(lab, "w1", made.vmid)
    assert list_mentions(lab, found) == []


def test_a_lease_that_is_over_is_taken_over_only_from_a_vm_that_is_stopped(lab: Lab) -> None:
    found = make(lab)
    one, two = lab.create("a1", workspace="w1"), lab.create("a2")
    lab.context().database.write(lambda conn: conn.execute("UPDATE workspaces SET lease_expires_at = 1") and None)
    with pytest.raises(WorkspaceRefused, match="its VM still runs; stop the sandbox first"):
        attach(lab, "w1", two.vmid)
    lab.power("stop", one.vmid)
    assert attach(lab, "w1", two.vmid, ttl=600).outcome == "attached"
    assert [where.partition(":")[0] for where in list_mentions(lab, found)] == [str(two.vmid)]
    assert lab.record(one).workspace_id is None and lab.record(two).workspace_id == found.id
    assert attach(lab, "w1", two.vmid, ttl=6000).outcome == "renewed"


@pytest.mark.parametrize("storage", STORAGES)
def test_a_workspace_moves_between_nodes_only_on_shared_storage(lab: Lab, storage: str) -> None:
    found = make(lab, storage=storage, node="pve2")
    lab.pve.add_template(9001, "debian-pve2", node="pve2", storage="local-lvm")
    here = lab.create("here")
    if storage == "shared":
        attach(lab, "w1", here.vmid)
        lab.destroy(here.vmid, force=True)
    else:
        with pytest.raises(
            WorkspaceRefused,
            match=r"is on node pve2 \(storage .* is local\), and the sandbox is on pve1; "
            "create the sandbox with node=pve2",
        ):
            attach(lab, "w1", here.vmid)
        with pytest.raises(WorkspaceRefused, match="is on node pve2"):
            lab.create("no", workspace="w1", node="pve1")
    assert_kept_whole(lab, found)
    # Without a node, the workspace's own is taken.
    there = lab.create(
        "there", workspace="w1", template="debian-pve2", **({"node": "pve2"} if storage == "shared" else {})
    )
    assert there.node == "pve2"
    lab.destroy(there.vmid, force=True)
    assert_kept_whole(lab, found)


def test_a_guest_that_does_not_take_or_release_a_disk(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.hotplug = False
    with pytest.raises(WorkspaceRefused, match="did not take the disk"):
        attach(lab, "w1", made.vmid)
    assert_kept_whole(lab, found)
    assert not lab.pve.vm(made.vmid).pending
    lab.pve.hotplug = True
    attach(lab, "w1", made.vmid)
    lab.pve.hotplug = False
    with pytest.raises(Kept, match="the running guest does not release it"):
        detach(lab, "w1", wait_timeout="1s")
    assert now(lab).state == "DETACHING"
    lab.pve.hotplug = True
    assert detach(lab, "w1").changed
    assert_kept_whole(lab, found)


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
    with pytest.raises(AgentlabError, match="VM 700 has its volume"):
        attach(lab, "w1", made.vmid)
    with pytest.raises(AgentlabError, match="VM 700 has its volume"):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    lab.pve.before = None
    assert list_mentions(lab, found) == ["700:scsi7"] and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.remove_vm(700)
