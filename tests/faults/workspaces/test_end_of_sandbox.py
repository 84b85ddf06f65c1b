# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A workspace outlives every way in which its sandbox can end."""

from __future__ import annotations

import time

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import CreationFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.lab import Lab
from support.workspaces import assert_kept_whole, attach, list_mentions, make

pytestmark = pytest.mark.faults


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
    assert_kept_whole(lab, found)
    lab.calm()
    assert lab.create("next", workspace="w1").workspace_id == found.id


def test_a_reused_vmid_that_has_the_volume_keeps_it_from_everybody_else(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    slot = list_mentions(lab, found)[0].partition(":")[2]
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
