# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copies of our marks: clones by hand, restored backups, templates, containers, protection are left alone."""

from __future__ import annotations

import uuid

import pytest

from support.lab import Lab
from support.strangers import try_everything

pytestmark = pytest.mark.faults


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
