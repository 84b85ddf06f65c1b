# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs of the Proxmox double that a test puts there, and what others do to VMs behind our back."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from fakepve import FakePve
from fakepve.lxc import format_size

from support.proxmox_thread import on_loop


class VmRules(FakePve):
    """What tests do to VMs without a request."""

    @on_loop
    def add_template(
        self, vmid: int = 9000, name: str = "debian-13", storage: str = "local-lvm", node: str = "pve1", **config: Any
    ) -> Any:
        """Add a cloud image's template: base disk, cloud-init drive, NIC on vmbr0, agent on."""
        size = 3 * 1024**3
        base = self.add_disk(storage, f"base-{vmid}-disk-0", vmid, size)
        settings = {
            "name": name,
            "template": 1,
            "agent": "1",
            "boot": "order=scsi0",
            "cores": 2,
            "memory": "2048",
            "ostype": "l26",
            "scsihw": "virtio-scsi-single",
            "serial0": "socket",
            "scsi0": f"{base},size={format_size(size)}",
            "ide2": f"{self.add_cloudinit_volume(storage, vmid)},media=cdrom",
            "net0": "virtio=BC:24:11:00:90:00,bridge=vmbr0",
            "smbios1": f"uuid={uuid.uuid4()}",
            "vmgenid": str(uuid.uuid4()),
            "meta": "creation-qemu=10.0.2,ctime=1700000000",
        }
        return self.add_vm(vmid, name, node=node, template=True, config=dict(settings, **config))

    @on_loop
    def add_guest(
        self,
        vmid: int,
        name: str = "somebody-elses",
        node: str = "pve1",
        storage: str = "local-lvm",
        smbios: bool = True,
        **kw: Any,
    ) -> Any:
        """Add an ordinary VM with a disk of its own and an identity.

        kw go to FakeVm (status, lock, pool, template, ...), config is merged.
        """
        size = kw.pop("size", 8 * 1024**3)
        disk = self.add_disk(storage, f"{'base' if kw.get('template') else 'vm'}-{vmid}-disk-0", vmid, size)
        config = {
            "name": name,
            "cores": 1,
            "memory": "1024",
            "scsi0": f"{disk},size={format_size(size)}",
            "net0": f"virtio={_make_mac()},bridge=vmbr0",
            "vmgenid": str(uuid.uuid4()),
        }
        if smbios:
            config["smbios1"] = f"uuid={uuid.uuid4()}"
        config.update(kw.pop("config", {}))
        if kw.get("template"):
            config["template"] = 1
        if kw.get("lock"):
            config["lock"] = kw["lock"]
        return self.add_vm(vmid, name, node=node, config=config, **kw)

    @on_loop
    def remove_vm(self, vmid: int) -> Any:
        """Delete a VM behind our back, with its volumes and its pool membership.

        Returns the VM, or None if there was none.
        """
        gone = self.vm(vmid)
        if gone is not None:
            self.vms.remove(gone)
            self._pool_leave(vmid)
            for volume in self.volumes_of(vmid):
                self._qm_free(volume)
        return gone

    @on_loop
    def make_foreign(
        self,
        vmid: int,
        *,
        same_name: bool = False,
        same_tags: bool = False,
        copy_description: bool = False,
        copy_smbios: bool = False,
        running: bool = False,
        template: bool = False,
        smbios: bool = True,
        protection: bool = False,
        lock: str | None = None,
        node: str | None = None,
        name: str = "somebody-elses",
        description: str | None = None,
    ) -> Any:
        """Put a VM of somebody else in the place of whatever has the VMID.

        The new VM is like the old one in what is asked for, and in nothing else.
        """
        old = self.remove_vm(vmid)
        before = old.config if old else {}
        config: dict[str, Any] = {}
        copied = [("tags", same_tags), ("description", copy_description), ("smbios1", copy_smbios)]
        config.update((key, before[key]) for key, wanted in copied if wanted and key in before)
        if description is not None:
            config["description"] = description
        if protection:
            config["protection"] = 1
        return self.add_guest(
            vmid,
            str(before.get("name", name)) if same_name else name,
            node=node or (old.node if old else "pve1"),
            smbios=smbios,
            status="running" if running else "stopped",
            template=template,
            lock=lock,
            config=config,
        )

    @on_loop
    def move_vm(self, vmid: int, node: str) -> None:
        """Move a VM to another node, as a migration does."""
        self.nodes.setdefault(node, {"online": True})
        self.vm(vmid).node = node

    @on_loop
    def power(self, vmid: int, status: str) -> None:
        """Start, stop or pause a VM behind our back: no task tells of it."""
        vm = self.vm(vmid)
        if status in ("running", "paused"):
            vm.status, vm.qmpstatus = "running", status
            vm.started_at = vm.started_at or time.time()
        else:
            self._power_off(vm)


def _make_mac() -> str:
    return "BC:24:11:" + ":".join(f"{b:02X}" for b in os.urandom(3))
