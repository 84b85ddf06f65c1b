# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A model of Proxmox VE for tests of the records: VMs by VMID, and who changed them."""

from __future__ import annotations

import contextlib
import copy
import threading
import uuid
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity


@dataclass
class Vm:
    """A VM: its configuration, and the UUID of the sandbox that it belongs to; None for a stranger's VM."""

    config: dict[str, Any]
    owner: str | None

    def __post_init__(self) -> None:
        self.config["digest"] = uuid.uuid4().hex


class Cluster:
    """VMs by VMID, and what was done to them that should not have been."""

    def __init__(self, path: str) -> None:
        self.vms: dict[int, Vm] = {}
        self.fences: dict[str, int] = {}
        self.double: list[str] = []
        self.strangers: list[str] = []
        self._lock = threading.Lock()
        self._listener = Listener(path, "AF_UNIX", backlog=100)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        # A killed controller ends its connection.
        with contextlib.suppress(EOFError, OSError), connection:
            while True:
                word, *values = connection.recv()
                connection.send(getattr(self, word)(*values))

    def config(self, vmid: int) -> dict[str, Any] | None:
        """Return the configuration of a VM, or None if there is none."""
        with self._lock:
            return copy.copy(self.vms[vmid].config) if vmid in self.vms else None

    def clone(self, vmid: int, owner: str, database: str, fence: int) -> str | None:
        """Make the VM and return its SMBIOS UUID; None when the VMID is taken."""
        with self._lock:
            self._judge_fence(owner, fence, f"clone to {vmid}")
            if vmid in self.vms:
                return None
            if any(vm.owner == owner for vm in self.vms.values()):
                self.double.append(f"{owner} has a second VM, {vmid}")
            smbios = str(uuid.uuid4())
            self.vms[vmid] = Vm(
                {"description": identity.make_marker(owner, database), "smbios1": f"uuid={smbios}"}, owner
            )
            return smbios

    def change(self, vmid: int, owner: str, digest: str, fence: int, delete: bool) -> bool:
        """Start, stop or delete a VM whose configuration is still the one that was judged; else False."""
        with self._lock:
            self._judge_fence(owner, fence, f"change of {vmid}")
            vm = self.vms.get(vmid)
            if vm is None or vm.config["digest"] != digest:
                return False
            if vm.owner != owner:
                self.strangers.append(f"VM {vmid} of {vm.owner or 'a stranger'} was changed for {owner}")
            if delete:
                del self.vms[vmid]
            else:
                vm.config["digest"] = uuid.uuid4().hex
            return True

    def _judge_fence(self, owner: str, fence: int, what: str) -> None:
        """Note a request with an older fence than an earlier request about the same sandbox."""
        if fence < self.fences.get(owner, 0):
            self.double.append(f"{what} of {owner} with fence {fence}, after {self.fences[owner]}")
        self.fences[owner] = max(fence, self.fences.get(owner, 0))

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def add_stranger(self, vmid: int) -> bool:
        """Put somebody else's VM there, in the place of ours if there is one. Returns whether it took a place."""
        with self._lock:
            taken = vmid in self.vms
            self.vms[vmid] = Vm({"description": "not ours", "smbios1": f"uuid={uuid.uuid4()}"}, None)
            return taken
