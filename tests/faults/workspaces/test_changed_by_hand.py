# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""People change VMs and disks by hand meanwhile: nothing of theirs is taken, and the records say what is so."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.lab import Lab
from support.workspaces import assert_kept_whole, attach, detach, list_mentions, make, now

pytestmark = pytest.mark.faults


def test_a_configuration_that_somebody_changes_meanwhile_is_judged_anew(lab: Lab) -> None:
    found = make(lab)
    vmid = lab.create("a1").vmid
    steps: list[tuple[str, Any, str]] = [
        ("/config", lambda: attach(lab, "w1", vmid), "attached"),
        ("/resize", lambda: workspace.ensure_present(lab.context(), "w1", size="12G"), "grown"),
        ("/config", lambda: detach(lab, "w1"), "detached"),
    ]
    for ending, act, outcome in steps:
        edited = lab.edited_before(ending)
        assert act().outcome == outcome and edited == [vmid]
    assert lab.pve.vm(vmid).config["description"].count("edited") == 3 and now(lab).size == 12 * 1024**3
    assert_kept_whole(lab, found)


def test_a_slot_that_somebody_takes_meanwhile_is_not_taken_from_him(lab: Lab) -> None:
    found = make(lab)
    vmid = lab.create("a1").vmid

    def edit(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/config"):
            lab.pve.vm(vmid).config.setdefault("scsi30", "local-lvm:vm-1-disk-9,size=1G")

    lab.pve.before = edit
    with pytest.raises(Kept, match=f"another disk was put into sandbox {vmid} as scsi30 meanwhile; run again"):
        attach(lab, "w1", vmid)
    assert lab.pve.vm(vmid).config["scsi30"] == "local-lvm:vm-1-disk-9,size=1G" and list_mentions(lab, found) == []
    lab.pve.before = None
    assert attach(lab, "w1", vmid).outcome == "attached" and list_mentions(lab, found) == [f"{vmid}:scsi29"]


def test_no_disk_is_pulled_out_of_a_machine_that_runs_again(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    lab.edited_before("/config", times=99)
    assert lab.destroy(made.vmid, force=True)[0].reason == "changed" and now(lab).state == "DETACHING"
    lab.pve.before = None
    lab.power("start", made.vmid)
    time.sleep(2.1)
    drift = lab.reconcile()
    assert [
        one.error for one in drift if one.error
    ] and "and the sandbox runs; detach the workspace again, or stop the sandbox" in str([one.error for one in drift])
    assert len(list_mentions(lab, found)) == 1 and now(lab).state == "DETACHING"
    detach(lab, "w1")
    assert_kept_whole(lab, found)


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
    with pytest.raises(WorkspaceRefused, match="does not have its volume attached any more"):
        attach(lab, "w1", made.vmid)
    # Put aside is not attached either.
    vm.config["unused0"] = found.volume
    with pytest.raises(WorkspaceRefused, match="does not have its volume attached any more"):
        attach(lab, "w1", made.vmid, ttl=7200)
    with pytest.raises(WorkspaceRefused, match="does not have its volume attached any more"):
        workspace.ensure_present(lab.context(), "w1", size="12G")
    assert detach(lab, "w1").changed
    assert_kept_whole(lab, found)
    assert attach(lab, "w1", made.vmid).outcome == "attached"
    assert vm.config[str(now(lab).slot)] == drive


def test_what_a_message_advises_frees_the_vm_from_a_disk_that_no_record_tells_of(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.vm(made.vmid).config["scsi5"] = f"{found.volume},size=8G"
    outcome = lab.destroy(made.vmid, force=True)[0]
    advised = re.search(r"qm set (\d+) --delete (\w+)", str(outcome.message))
    assert advised is not None and "agentlab_workspace" not in str(outcome.message)
    del lab.pve.vm(int(advised[1])).config[advised[2]]
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert_kept_whole(lab, found)
