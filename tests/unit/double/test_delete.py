# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: deleting VMs and detaching disks."""

from __future__ import annotations

from typing import Any

from support.double_api import clone_template, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_delete_without_quorum_loses_the_disks_and_keeps_the_configuration(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    assert pve.volumes_of(101) == ["local-lvm:vm-101-cloudinit", "local-lvm:vm-101-disk-0"]
    pve.lose_quorum()
    assert "Permission denied" in exit_status(api, api.nodes("pve1").qemu(101).delete(purge=1))
    assert pve.volumes_of(101) == [] and pve.vm(101).disks_lost
    assert "scsi0" in api.nodes("pve1").qemu(101).config.get()
    pve.regain_quorum()
    assert exit_status(api, api.nodes("pve1").qemu(101).status.start.post()) != "OK"


def test_a_locked_protected_or_running_vm_is_not_deleted(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, lock="clone")
    pve.add_guest(102, config={"protection": 1})
    pve.add_guest(103, status="running")
    assert exit_status(api, api.nodes("pve1").qemu(101).delete()) == "VM is locked (clone)"
    assert pve.volumes_of(101)
    assert "can't remove VM 102 - protection mode enabled" in refusal_of(api.nodes("pve1").qemu(102).delete)[1]
    assert "VM 103 is running - destroy failed" in refusal_of(api.nodes("pve1").qemu(103).delete)[1]


def test_delete_of_a_template_with_linked_clones_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    assert "is still in use by linked clone" in exit_status(api, api.nodes("pve1").qemu(9000).delete())
    clone_template(api, 102, full=1)
    assert exit_status(api, api.nodes("pve1").qemu(101).delete()) == "OK"
    assert exit_status(api, api.nodes("pve1").qemu(9000).delete()) == "OK"


def test_volume_of_another_owner_outlives_the_vm(api: Any, pve: ProxmoxDouble) -> None:
    volume = api.nodes("pve1").storage("local-lvm").content.post(vmid=999001, filename="vm-999001-disk-0", size="1G")
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.status.start.post()
    vm.config.put(scsi1=volume)
    assert vm.config.get()["scsi1"] == f"{volume},size=1G"
    vm.config.put(delete="scsi1")
    assert not {"scsi1", "unused0"} & set(vm.config.get())
    vm.config.put(scsi1=volume)
    vm.status.stop.post()
    assert exit_status(api, vm.delete(**{"purge": 1, "destroy-unreferenced-disks": 1})) == "OK"
    assert pve.volumes_of(999001) == [volume] and pve.volumes_of(101) == []


def test_own_disk_taken_off_stays_as_unused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(delete="scsi0")
    assert vm.config.get()["unused0"] == "local-lvm:vm-101-disk-0"
    vm.config.put(delete="unused0")
    assert pve.volumes_of(101) == []


def test_a_guest_can_keep_a_disk_that_is_taken_off(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")
    pve.add_disk("local-lvm", "vm-800-disk-0", 800, 1024**3)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(scsi5="local-lvm:vm-800-disk-0")
    pve.unplug_refused = {101}
    status, text = refusal_of(lambda: vm.config.put(delete="scsi5"))
    assert (
        status == 400
        and "hotplug problem - error on hot-unplugging device 'virtioscsi5' - still busy in guest?" in text
    )
    assert "scsi5" not in vm.config.get() and "scsi5" in vm.config.get(current=1)
    assert next(row for row in vm.pending.get() if row["key"] == "scsi5")["delete"] == 1
    vm.config.put(description="the next write succeeds")
    vm.status.stop.post()
    vm.status.start.post()
    assert "scsi5" not in vm.config.get(current=1)
