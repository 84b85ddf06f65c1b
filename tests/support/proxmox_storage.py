# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Storages of the Proxmox double: volumes, whose they are by their names, on which node they lie, and snippets.

How a test uses it (``pve`` is the double):

- **Volumes**: ``pve.volumes_of(vmid)`` lists those whose names say that VMID.
- **Snippets**: ``pve.snippets`` are volume ids. ``pve.hold_snippets(folder)`` lets a storage hold those that are files
  of a folder of this machine.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from fakepve import FakePve
from fakepve.qemu import drives_of, split_drive, volume_ref

from support.proxmox_thread import on_loop

OWNER = re.compile(r"(?:^|/)(?:vm|base)-(\d+)-")


def volume_owner(volume: str) -> int | None:
    """Return the VMID in the name of a volume. Proxmox VE knows no other owner."""
    match = OWNER.search(volume.partition(":")[2])
    return int(match[1]) if match else None


class StorageRules(FakePve):
    """What lies on the double's storages. The module's docstring says how tests use it."""

    def _reset_storage(self) -> None:
        """Set everything that tests switch in this part."""
        # Volume ids of the snippets that there are; cicustom may name no other.
        self.snippets: set[str] = set()
        # Storage -> (folder of this machine with its snippets, the node that has it or None for all): a file there is a
        # snippet.
        self.snippet_folders: dict[str, tuple[str, str | None]] = {}

    # ------------------------------------------------------------------ volumes

    def volumes_of(self, vmid: int) -> list[str]:
        """Return the ids of the volumes that belong to a VMID by their names, on every storage."""
        return sorted(
            f"{sid}:{name}"
            for sid, store in self.storages.items()
            for name in store.get("volumes", {})
            if volume_owner(f"{sid}:{name}") == vmid
        )

    def add_disk(self, sid: str, name: str, vmid: int, size: int) -> str:
        """Add a volume of ``size`` bytes to a storage, and return its id."""
        store = self.storages[sid]
        kind = "raw"
        if store.get("type") in ("dir", "nfs", "cifs") and "/" not in name:
            name, kind = f"{vmid}/{name}.qcow2", "qcow2"
        store.setdefault("volumes", {})[name] = {
            "content": "images",
            "format": kind,
            "size": size,
            "vmid": vmid,
            "ctime": int(time.time()),
        }
        return f"{sid}:{name}"

    def add_cloudinit_volume(self, sid: str, vmid: int) -> str:
        """Return the id of a VM's cloud-init volume, which is made if it does not exist."""
        store = self.storages[sid]
        name = (
            f"{vmid}/vm-{vmid}-cloudinit.qcow2"
            if store.get("type") in ("dir", "nfs", "cifs")
            else f"vm-{vmid}-cloudinit"
        )
        store.setdefault("volumes", {}).setdefault(
            name,
            {
                "content": "images",
                "format": "qcow2" if "." in name else "raw",
                "size": 4 * 1024**2,
                "vmid": vmid,
                "ctime": int(time.time()),
            },
        )
        return f"{sid}:{name}"

    def _list_foreign_volumes(self, vm: Any) -> list[tuple[str, str, dict[str, Any]]]:
        """Return the volumes of a VM's configuration and snapshots that belong to another VMID.

        A delete leaves them alone.
        """
        foreign = []
        for config in (vm.config, *vm.snapshots.values()):
            values = [volume for _key, volume, _props in drives_of(config)]
            values += [split_drive(value)[0] for key, value in config.items() if re.match(r"unused\d+$", key)]
            for volume in values:
                known = self._qm_volume(volume)
                if known is not None and volume_owner(volume) != vm.vmid:
                    foreign.append((*volume_ref(volume), known))
        return foreign

    def _on_node(self, volume: str, node: str) -> bool:
        """Return whether a node sees a volume. A volume on local storage is seen by its node alone."""
        known = self._qm_volume(volume)
        return known is None or known.get("node") in (None, node)

    # ------------------------------------------------------------------ snippets

    @on_loop
    def hold_snippets(self, folder: str, storage: str = "local", node: str | None = "pve1") -> None:
        """Let a storage hold snippets, in that folder of this machine; node None: shared by all."""
        store = self.storages[storage]
        store["content"] = ",".join(sorted({*str(store.get("content") or "").split(","), "snippets"} - {""}))
        store["shared"] = int(node is None)
        self.snippet_folders[storage] = (folder, node)

    def _describe_missing_snippet(self, vm: Any) -> str | None:
        """Return the refusal of a cicustom that names a snippet which does not exist; None if there is none."""
        named = [part.partition("=")[2] for part in str(vm.config.get("cicustom") or "").split(",") if part]
        missing = [
            volume
            for volume in named
            if volume not in self.snippets and volume not in self._list_snippet_files(vm.node)
        ]
        return f"volume '{missing[0]}' does not exist" if missing else None

    def _list_snippet_files(self, node: str) -> dict[str, str]:
        """Return volume id -> path of the snippets that are files of this machine, as that node sees them."""
        return {
            f"{sid}:snippets/{name}": os.path.join(folder, name)
            for sid, (folder, owner) in self.snippet_folders.items()
            if owner in (None, node) and os.path.isdir(folder)
            for name in os.listdir(folder)
        }

    # ------------------------------------------------------------------ requests

    async def _content_create(self, v: dict[str, Any], user: str) -> str:
        """Allocate a volume, which only its node sees on local storage."""
        volume = await super()._content_create(v, user)
        if not self.storages[v["storage"]].get("shared"):
            self._qm_volume(volume)["node"] = v["node"]
        return volume

    async def _content_list(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        """Return the volumes of a storage that its node sees, snippets included where the caller may see those."""
        rows = [row for row in await super()._content_list(v, user) if self._on_node(row["volid"], v["node"])]
        for row in rows:
            if row.get("content") == "images" and self.storages[v["storage"]].get("type") in ("dir", "nfs", "cifs"):
                row.setdefault("parent", None)
                row.setdefault("used", row.get("size", 0))
        if (
            # Proxmox VE lists them for every VMID that is asked for.
            v.get("content") in (None, "snippets")
            and self.allowed(user, f"/storage/{v['storage']}", "Datastore.Allocate")
        ):
            rows += [
                {
                    "volid": volume,
                    "content": "snippets",
                    "format": "snippet",
                    "size": os.path.getsize(path),
                    "ctime": int(os.path.getmtime(path)),
                }
                for volume, path in self._list_snippet_files(v["node"]).items()
                if volume.startswith(v["storage"] + ":")
            ]
        return rows
