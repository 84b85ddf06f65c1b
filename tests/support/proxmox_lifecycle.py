# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How VMs of the Proxmox double come, go back and go: clone, snapshot, rollback, delete."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from fakepve import FakePve, PveError, TaskError
from fakepve.qemu import drives_of, is_cdrom, join_drive, split_drive, volume_ref

from support.proxmox_storage import volume_owner
from support.proxmox_texts import tell_no_quorum, tell_no_vm

CLONE_DESCRIPTION = "qmclone temporary file"


class LifecycleRules(FakePve):
    """How the double clones and deletes VMs."""

    def _reset_lifecycle(self) -> None:
        """Set everything that tests switch in this part."""
        # True: a clone to another node is refused where a disk lies on local storage, as Proxmox VE does.
        self.strict_targets = False
        self._clone: dict[str, Any] = {}

    # ------------------------------------------------------------------ clone

    async def _qm_clone(self, v: dict[str, Any], user: str) -> str:
        """Refuse a clone as Proxmox VE does, or start its task."""
        node, vmid, newid = v["node"], int(v["vmid"]), int(v["newid"])
        self._qm_check_pool(v.get("pool"))
        self._qm_perm(user, newid, v.get("pool"), "VM.Allocate")
        src = self.vm(vmid)
        if src is None or src.node != node:
            raise PveError(500, tell_no_vm(vmid, node))
        target = v.get("target")
        if v.get("snapname") and v["snapname"] not in src.snapshots:
            raise PveError(500, f"snapshot '{v['snapname']}' does not exist")
        if self.strict_targets and target and target != node and not self._is_shared(src):
            raise PveError(500, f"can't clone VM to node '{target}' (VM uses local storage)")
        for key in sorted(src.config):
            bridge = re.search(r"bridge=([^,]+)", str(src.config[key])) if re.match(r"net\d+$", key) else None
            if bridge:
                self.require(user, "/sdn/zones/localnetwork/" + bridge[1], "SDN.Use")
        self.need_quorum()
        taken = self.guest(newid)
        if taken is not None and taken.node != node:
            text = f"close (rename) atomic file '/etc/pve/nodes/{node}/qemu-server/{newid}.conf' failed: File exists"
            return await self._start_failing_task(node, "qmclone", vmid, user, text)
        full = v.get("full")
        self._clone = {"source": dict(src.config), "linked": src.template and not full}
        if v.get("description"):
            v = dict(v, description=str(v["description"]).rstrip())
        return await super()._qm_clone(v, user)

    def _is_shared(self, vm: Any) -> bool:
        """Return whether every disk of a VM lies on shared storage."""
        stores = [volume_ref(volume)[0] for _key, volume, _props in drives_of(vm.config) if ":" in volume]
        return all(self.storages.get(sid, {}).get("shared") for sid in stores)

    def _around_qmclone(self, body: Any, new: Any, undo: list[Callable[[], None]]) -> Any:
        """Give the new VM Proxmox's own description and nothing else until its clone task ends."""
        source, linked = self._clone["source"], self._clone["linked"]
        config, name = new.config, new.name
        new.config = {"description": CLONE_DESCRIPTION, "lock": "clone"}
        new.name = f"VM {new.vmid}"
        self._born[new.vmid] = time.time()

        def remove() -> None:
            if new in self.vms:
                self.vms.remove(new)

        undo.append(remove)

        async def run() -> Any:
            new.config, new.name = config, name
            note = await body()
            for key, volume, props in drives_of(new.config):
                if is_cdrom(volume, props) and re.search(r"vm-\d+-cloudinit", volume):
                    new.config[key] = join_drive(self.add_cloudinit_volume(volume_ref(volume)[0], new.vmid), props)
                elif linked and key in source and self._qm_volume(volume):
                    self._qm_volume(volume)["base"] = split_drive(source[key])[0]
            return note

        return run

    # ------------------------------------------------------------------ snapshots

    async def _qm_snapshot(self, v: dict[str, Any], user: str) -> str:
        """Start a snapshot, whose task fails while the cluster has no quorum."""
        if self.quorate:
            return await super()._qm_snapshot(v, user)
        self.find(v["node"], v["vmid"])
        return await self._start_failing_task(
            v["node"], "qmsnapshot", v["vmid"], user, tell_no_quorum(v["node"], v["vmid"])
        )

    def _around_qmrollback(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
        """Give the VM a new generation id after a rollback."""

        async def run() -> Any:
            note = await body()
            if vm.config.get("vmgenid"):
                vm.config["vmgenid"] = str(uuid.uuid4())
            return note

        return run

    # ------------------------------------------------------------------ delete

    def _around_qmdestroy(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
        """Free the VM's own volumes alone, and refuse what Proxmox VE refuses in the task of a delete."""

        async def run() -> Any:
            if vm.lock == "suspended":
                # A hibernated VM is deleted like a stopped one; the saved state goes too.
                self._forget_state(vm)
            if not vm.lock:
                own = {volume for _key, volume, _props in drives_of(vm.config) if volume_owner(volume) == vm.vmid}
                for store in self.storages.values():
                    for volume in store.get("volumes", {}).values():
                        if volume.get("base") in own:
                            raise TaskError(f"base volume '{volume['base']}' is still in use by linked cloned")
                if not self.quorate:
                    # The configuration file cannot be removed, the disks can, and they go first.
                    for volume in own:
                        self._qm_free(volume)
                    vm.disks_lost = True
                    raise TaskError(tell_no_quorum(vm.node, vm.vmid))
            foreign = self._list_foreign_volumes(vm)
            note = await body()
            for sid, name, volume in foreign:
                store = self.storages[sid]
                if name not in store["volumes"]:
                    store["volumes"][name] = volume
                    if "avail" in store:
                        store["avail"] -= int(volume.get("size") or 0)
            return note

        return run
