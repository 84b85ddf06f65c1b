# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Configurations of VMs in the Proxmox double: reads, writes, disks that come and go, pending changes.

How a test switches each of them on (``pve`` is the double):

- **A guest that does not let a disk go**: ``pve.unplug_refused = True`` (or a set of VMIDs): a config PUT that takes
  a disk off a running VM is 400 `hotplug problem - error on hot-unplugging device ...` after ``pve.unplug_seconds``
  real seconds. The delete stays pending: `GET config` lacks the disk, `GET config?current=1` shows it, the next start
  carries it out. (``pve.hotplug = False`` is a VM with hot-plugging switched off: such changes are 200 and stay
  pending.)
"""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web
from fakepve import FakePve, PveError, TaskError
from fakepve import schema as pve_schema
from fakepve.lxc import format_size, parse_size
from fakepve.qemu import DRIVE_KEY, NEW_DISK, drives_of, is_cdrom, join_drive, split_drive, volume_ref, with_mac
from fakepve.routing import param_error
from fakepve.server import params as request_params

from support.proxmox_power import STATE_KEYS
from support.proxmox_storage import volume_owner
from support.proxmox_texts import tell_no_config, tell_no_quorum

HOTPLUGGED = re.compile(r"(scsi|virtio)\d+$")
UNPLUGGED = re.compile(r"(scsi|virtio|net)\d+$")


class ConfigRules(FakePve):
    """How the double keeps configurations. The module's docstring says how tests use it."""

    def _reset_config(self) -> None:
        """Set everything that tests switch in this part."""
        # False: running guests take no disk and let none go; the change stays pending until the next start.
        self.hotplug = True
        self.unplug_refused: bool | set[int] = False
        self.unplug_seconds = 0.0

    def _routes_config(self) -> list[tuple[str, str, Any]]:
        return [("PUT", "/nodes/{node}/qemu/{vmid}/resize", self._qm_resize)]

    async def _config_get(self, request: web.Request) -> web.Response:
        """Return the configuration as the next start would have it, or as it is (current=1)."""
        vm = self._vm(request, "VM.Audit")
        values = await request_params(request)
        config = dict(vm.config)
        if str(values.get("current", "0")) not in ("1", "true"):
            for key, value in vm.pending.items():
                if value is None:
                    config.pop(key, None)
                else:
                    config[key] = value
        if "memory" in config:
            config["memory"] = str(config["memory"])
        config["digest"] = vm.digest()
        return web.json_response({"data": config})

    async def _apply_config(self, vm: Any, user: str, p: dict[str, Any]) -> None:
        """Carry out one write of a configuration, or refuse it."""
        updates = dict(p)
        if updates.get("skiplock") and user != "root@pam":
            raise param_error(skiplock="Only root may use this option.")
        if not {key for key in updates if key not in ("digest", "skiplock")}:
            raise PveError(500, "no options specified")
        known = pve_schema.load().paths["/nodes/{node}/qemu/{vmid}/config"]["PUT"]["parameters"]["properties"]
        for key in [key for key in str(updates.get("delete") or "").split(",") if key]:
            if re.sub(r"\d+$", "[n]", key) not in known and key not in known and key not in ("vmstate", "lock"):
                raise param_error(delete=f"unknown option '{key}'")
        if not self.quorate:
            raise PveError(500, tell_no_quorum(vm.node, vm.vmid))
        wanted = [key for key in str(updates.get("delete") or "").split(",") if key]
        if "vmstate" in wanted:
            self._delete_state(vm, user, updates)
            updates["delete"] = ",".join(key for key in wanted if key not in (*STATE_KEYS, "lock"))
        if "tags" in updates:
            self._check_tags(user, vm.config.get("tags"), updates["tags"])
            updates["tags"] = ";".join(
                sorted({tag.lower() for tag in re.split(r"[;, ]+", str(updates["tags"])) if tag})
            )
        elif "tags" in str(updates.get("delete") or "").split(","):
            self._check_tags(user, vm.config.get("tags"), "")
        if "description" in updates:
            updates["description"] = str(updates["description"]).rstrip()
        for key, priv in ((key, self._config_priv(key)) for key in updates if DRIVE_KEY.match(key)):
            if not is_cdrom(*split_drive(updates[key])):
                self.require(user, f"/vms/{vm.vmid}", priv)
        if not updates.get("digest") or updates["digest"] == vm.digest():
            self._check_lock(vm)
            for key in [key for key in updates if DRIVE_KEY.match(key)]:
                updates[key] = self._complete_drive(vm, user, key, updates[key])
        for key in [key for key in updates if re.fullmatch(r"net\d+", key)]:
            # An interface without a MAC address gets one.
            updates[key] = with_mac(updates[key])
        reverts = [key for key in str(updates.pop("revert", None) or "").split(",") if key]
        if not updates.get("digest") or updates["digest"] == vm.digest():
            for key in reverts:
                vm.pending.pop(key, None)
        deletes = [key for key in str(updates.get("delete") or "").split(",") if key]
        before = {key: vm.config.get(key) for key in deletes}
        await super()._apply_config(vm, user, updates)
        await self._refuse_unplug(vm, deletes)
        for key in [key for key in updates if HOTPLUGGED.match(key) and vm.pending.get(key) and self.hotplug]:
            vm.config[key] = vm.pending.pop(key)
        for key in deletes:
            self._put_disk_aside(vm, key, before[key], bool(updates.get("force")))
        missing = self._describe_missing_snippet(vm) if "cicustom" in updates and vm.status == "running" else None
        if missing:
            raise PveError(500, missing)

    def _complete_drive(self, vm: Any, user: str, key: str, value: str) -> str:
        """Return what the configuration says of a drive once its volume is made or looked up."""
        volume, props = split_drive(value)
        if volume.endswith(":cloudinit"):
            return join_drive(self.add_cloudinit_volume(volume_ref(volume)[0], vm.vmid), dict(props, media="cdrom"))
        if not volume or volume in ("none", "cdrom"):
            return value
        if NEW_DISK.match(volume):
            self._qm_check_drive(user, vm.vmid, None, key, value, None)
            return self._qm_new_drive(vm.vmid, key, value, None)[0]
        sid, name = volume_ref(volume)
        if sid is None:
            return value
        store = self._store(sid)
        known = self._volumes(sid).get(name)
        if known is None or not self._on_node(volume, vm.node):
            raise PveError(500, f"volume '{volume}' does not exist")
        if volume_owner(volume) != vm.vmid:
            vtype, owner, _format = self._parse_volname(store, name)
            self._check_access(user, sid, vtype, owner, volume)
        return join_drive(volume, dict(props, size=format_size(int(known["size"])))) if known.get("size") else value

    def _put_disk_aside(self, vm: Any, key: str, value: Any, force: bool) -> None:
        """Take the volume of a deleted disk off the VM.

        The VM's own volume becomes unusedN; it is freed with force, or when it was unused already. A volume of another
        owner just leaves the configuration.
        """
        # What is put aside is no device of the guest's: it goes at once.
        if key in vm.pending and (key.startswith("unused") or (HOTPLUGGED.match(key) and self.hotplug)):
            vm.pending.pop(key)
            vm.config.pop(key, None)
        if value is None or key in vm.config or not re.match(r"(ide|sata|scsi|virtio|unused)\d+$", key):
            return
        volume, props = split_drive(value)
        if is_cdrom(volume, props) or volume_owner(volume) != vm.vmid:
            return
        if force or key.startswith("unused"):
            self._qm_free(volume)
            return
        number = next(n for n in range(256) if f"unused{n}" not in vm.config)
        vm.config[f"unused{number}"] = volume

    async def _refuse_unplug(self, vm: Any, deletes: list[str]) -> None:
        """Answer a PUT whose guest does not let a disk go. The pending delete stays."""
        refused = self.unplug_refused
        if vm.status != "running" or not (vm.vmid in refused if isinstance(refused, set) else refused):
            return
        held = [
            key for key in deletes if UNPLUGGED.match(key) and key in vm.config and not is_cdrom_key(vm.config, key)
        ]
        if not held:
            return
        await self._sleep(self.unplug_seconds)
        device = re.sub(r"^scsi", "virtioscsi", held[0])
        problem = f"hotplug problem - error on hot-unplugging device '{device}' - still busy in guest?\n"
        raise PveError(400, "Parameter verification failed.", {held[0]: problem})

    async def _qm_resize(self, v: dict[str, Any], user: str) -> str:
        """Enlarge a disk: always a task, which finds out what is wrong."""
        node, vmid, key = v["node"], v["vmid"], v["disk"]

        async def body() -> None:
            vm = self.vm(int(vmid))
            if vm is None or vm.node != node:
                raise TaskError(tell_no_config(node, vmid))
            if v.get("digest") and v["digest"] != vm.digest():
                raise TaskError("checksum mismatch (file change by other user?)")
            if vm.lock:
                raise TaskError(f"VM is locked ({vm.lock})")
            if key not in vm.config:
                raise TaskError(f"disk '{key}' does not exist")
            volume, props = split_drive(vm.config[key])
            if is_cdrom(volume, props):
                raise TaskError("can't resize a cdrom")
            known = self._qm_volume(volume)
            size = int((known or {}).get("size") or parse_size(props.get("size", "0")) or 0)
            wanted = parse_size(str(v["size"]).lstrip("+")) + (size if str(v["size"]).startswith("+") else 0)
            if wanted < size:
                raise TaskError("shrinking disks is not supported")
            if known is not None:
                # The image is enlarged before the configuration is written: without quorum only the former happens.
                known["size"] = wanted
            if not self.quorate:
                raise TaskError(tell_no_quorum(node, vmid))
            vm.config[key] = join_drive(volume, dict(props, size=format_size(wanted)))

        return await self.task(node, "resize", vmid, user, body, vm=self.vm(int(vmid)))


def is_cdrom_key(config: dict[str, Any], key: str) -> bool:
    """Return whether a key of a configuration is a CD-ROM drive."""
    return any(name == key and is_cdrom(volume, props) for name, volume, props in drives_of(config))
