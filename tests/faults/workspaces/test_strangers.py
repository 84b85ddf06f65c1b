# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stranger in the place of the VM, while a workspace is worked on, is not changed, stopped or started."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.lab import Lab
from support.workspaces import attach, list_mentions, make, now

pytestmark = pytest.mark.faults


def stranger_with(lab: Lab, vmid: int, config: dict[str, str], *, running: bool = True) -> Any:
    """Somebody else's VM in place of ours, with these keys in its configuration."""
    foreign = lab.pve.make_foreign(vmid, running=running)
    foreign.config.update(config)
    return foreign


@pytest.mark.parametrize("moment", ["PUT /resize", "GET /pending"])
def test_growing_changes_no_stranger_that_took_the_vmid(lab: Lab, moment: str) -> None:
    found = make(lab)
    made = lab.create("a1", workspace="w1")
    slot = list_mentions(lab, found)[0].partition(":")[2]
    drive = lab.pve.vm(made.vmid).config[slot]
    method, suffix = moment.split()
    swapped: list[Any] = []

    def swap(asked: str, path: str) -> None:
        if asked == method and path.endswith(f"/qemu/{made.vmid}{suffix}") and not swapped:
            swapped.append(stranger_with(lab, made.vmid, {slot: drive}))
            swapped.append(dict(swapped[0].config))

    lab.pve.before = swap
    with pytest.raises(AgentlabError):
        workspace.ensure_present(lab.context(), "w1", size="12G")
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
        if method == "PUT" and list_mentions(lab, found) == [] and now(lab).slot is not None:
            written.append(path)

    lab.pve.before = swap
    with pytest.raises(AgentlabError):
        lab.create("a1", workspace="w1")
    lab.pve.before = None
    lab.untouched(swapped[0], status="stopped")
