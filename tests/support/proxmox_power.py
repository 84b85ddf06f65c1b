# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Power states and hibernation of the VMs of the Proxmox double.

How a test switches each of them on (``pve`` is the double, ``vm`` is ``pve.vm(vmid)``):

- **Power from outside**: ``pve.power(vmid, "running" | "stopped" | "paused")``. A pause is `status: running` with
  `qmpstatus: paused`.
- **Hibernated**: ``pve.hibernate(vmid)`` puts the VM to disk at once: stopped, `lock: suspended`, a `vmstate` volume.
  start and resume wake it (``vm.start_error = "start failed: QEMU exited with code 1"``: the state cannot be loaded,
  lock and state stay), stop and shutdown say OK and change nothing, config writes and clones are refused with 500,
  `delete=vmstate` throws the state away, DELETE works.
- **A hibernation that fails**: ``pve.hibernation_error = "..."`` makes the next `todisk` suspends end with that text;
  the VM runs on with `lock: suspending`, which only root can take away (``pve.unlock(vmid)``).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web
from fakepve import FakePve, PveError, TaskError
from fakepve import schema as pve_schema
from fakepve.qemu import drives_of
from fakepve.routing import param_error
from fakepve.server import API, USER
from fakepve.server import params as request_params

from support.proxmox_texts import tell_no_config, tell_no_vm

STATE_KEYS = ("vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu")


class PowerRules(FakePve):
    """How the double starts and stops VMs. The module's docstring says how tests use it."""

    def _reset_power(self) -> None:
        """Set everything that tests switch in this part."""
        self.hibernation_error = ""

    async def _status_current(self, request: web.Request) -> web.Response:
        """Return a VM's status with the keys that a real one has: figures of devices only while it runs."""
        response = await super()._status_current(request)
        data = json.loads(response.text)["data"]
        vm = self.vm(data["vmid"])
        if vm.status != "running":
            for key in ("balloon", "diskread", "diskwrite"):
                data.pop(key, None)
        else:
            nics = [key[3:] for key in vm.config if re.fullmatch(r"net\d+", key)]
            data["nics"] = {f"tap{vm.vmid}i{number}": {"netin": 0, "netout": 0} for number in nics}
        if "vga" not in vm.config:
            data.pop("clipboard", None)
        for key in ("agent", "serial"):
            if not data.get(key):
                data.pop(key, None)
        return web.json_response({"data": data})

    # ------------------------------------------------------------------ start and stop

    async def _status_action(self, request: web.Request) -> web.StreamResponse:
        """Check a start, stop, shutdown, reboot, suspend or resume, and start its task."""
        node, action, user = request.match_info["node"], request.match_info["action"], request[USER]
        vmid = request.match_info["vmid"]
        if vmid.isdigit() and action in ("start", "stop", "shutdown", "reboot", "suspend", "resume"):
            info = self.resolve(request, API).methods["POST"]
            values, errors = pve_schema.validate(
                info.get("parameters"), {**await request_params(request), "node": node, "vmid": vmid}
            )
            if errors:
                raise param_error(**errors)
            if values.get("skiplock") and user != "root@pam":
                raise param_error(skiplock="Only root may use this option.")
            self.require(user, "/vms/" + vmid, "VM.PowerMgmt")
            vm = self.vm(int(vmid))
            if vm is None or vm.node != node:
                if action in ("reboot", "suspend", "resume"):
                    raise PveError(500, tell_no_vm(vmid, node))
                text = tell_no_vm(vmid, node)
                if action == "start":
                    self.need_quorum()
                    text = tell_no_config(node, vmid)
                return web.json_response(
                    {"data": await self._start_failing_task(node, "qm" + action, vmid, user, text)}
                )
            if not self.quorate and action in ("stop", "shutdown", "suspend", "resume"):
                # Only what writes a configuration or begins a VM asks for quorum.
                data = await getattr(self, "_do_" + action)(vm, user, await request_params(request))
                return web.json_response({"data": data})
        return await super()._status_action(request)

    async def _do_stop(self, vm: Any, user: str, p: dict[str, Any]) -> str:
        """Stop a VM in a task, whatever its guest does."""
        if vm.ha_managed:
            return await super()._do_stop(vm, user, p)

        async def body() -> None:
            if vm.status != "running":
                return
            if vm.lock and not p.get("skiplock"):
                raise TaskError(f"VM is locked ({vm.lock})")
            await self.pause(vm.stop_secs)
            self._power_off(vm)

        return await self.task(vm.node, "qmstop", vm.vmid, user, body, vm=vm)

    async def _do_shutdown(self, vm: Any, user: str, p: dict[str, Any]) -> str:
        """Shut a VM down in a task, if its guest answers."""
        if vm.ha_managed:
            return await super()._do_shutdown(vm, user, p)
        if vm.status == "running" and vm.qmpstatus in ("paused", "suspended", "prelaunch"):
            raise PveError(500, "VM is paused - cannot shutdown")

        async def body() -> Any:
            if vm.status != "running":
                return None
            if vm.lock and not p.get("skiplock"):
                raise TaskError(f"VM is locked ({vm.lock})")
            note = await self._powerdown(vm, p)
            self._power_off(vm)
            return note

        return await self.task(vm.node, "qmshutdown", vm.vmid, user, body, vm=vm)

    @staticmethod
    def _power_off(vm: Any) -> None:
        """Set what a VM is when it is stopped."""
        vm.status = vm.qmpstatus = "stopped"
        vm.started_at = None
        if getattr(vm, "agent_by_default", False):
            vm.agent, vm.agent_by_default = None, False

    def _around_qmstart(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
        """Fail a start in its task as Proxmox VE does; let the agent come up after a start that worked."""

        async def run() -> Any:
            if getattr(vm, "disks_lost", False):
                raise TaskError(
                    "no such logical volume " + ", ".join(volume for _key, volume, _props in drives_of(vm.config, True))
                )
            if vm.lock == "suspended":
                await self._wake_vm(vm)
                return None
            missing = self._describe_missing_snippet(vm)
            if missing and vm.status != "running":
                raise TaskError(missing)
            if vm.status != "running" and not vm.template and not vm.lock:
                self._check_vcpus(vm)
            note = await body()
            self.start_agent(vm)
            return note

        return run

    _around_qmreboot = _around_qmstart

    # ------------------------------------------------------------------ hibernation

    def hibernate(self, vmid: int, storage: str = "local") -> None:
        """Put a VM to disk at once, as a successful suspend with todisk=1 leaves it."""
        vm = self.vm(vmid)
        day = time.strftime("%Y-%m-%d")
        memory = int(str(vm.config.get("memory", 512)).rsplit("=", maxsplit=1)[-1])
        name = f"{vmid}/vm-{vmid}-state-suspend-{day}.raw"
        self.storages[storage].setdefault("volumes", {})[name] = {
            "content": "images",
            "format": "raw",
            "vmid": vmid,
            "ctime": int(time.time()),
            "size": (2 * memory + 500) * 1024**2,
        }
        vm.config.update(
            {
                "lock": "suspended",
                "vmstate": f"{storage}:{name}",
                "runningmachine": "pc-i440fx-10.0+pve0",
                "runningcpu": "qemu64,enforce,+kvm_pv_eoi,+kvm_pv_unhalt",
            }
        )
        vm.lock = "suspended"
        self._power_off(vm)

    def unlock(self, vmid: int) -> None:
        """Take a VM's lock away, as `qm unlock` of root does."""
        vm = self.vm(vmid)
        vm.lock = None
        vm.config.pop("lock", None)

    def _forget_state(self, vm: Any) -> None:
        """Free the volume of a hibernated VM's state, and take its lock away."""
        volume = vm.config.get("vmstate")
        if volume:
            self._qm_free(volume)
        for key in (*STATE_KEYS, "lock"):
            vm.config.pop(key, None)
        vm.lock = None

    def _delete_state(self, vm: Any, user: str, updates: dict[str, Any]) -> None:
        """Throw a hibernated VM's state away: the one write that the lock `suspended` lets through."""
        if updates.get("digest") and updates["digest"] != vm.digest():
            raise PveError(500, "checksum mismatch (file change by other user?)")
        for priv in ("VM.Config.Disk", "VM.PowerMgmt"):
            self.require(user, f"/vms/{vm.vmid}", priv)
        if vm.lock not in (None, "suspended"):
            raise PveError(500, f"VM is locked ({vm.lock})")
        self._forget_state(vm)
        updates.pop("digest", None)

    def _check_suspend(self, vm: Any, user: str, values: dict[str, Any]) -> bool:
        """Refuse what a suspend refuses before its task begins. Return whether the state goes to disk."""
        if vm.status != "running":
            raise PveError(500, f"VM {vm.vmid} not running")
        todisk = str(values.get("todisk", "0")) in ("1", "true", "True")
        if todisk:
            if vm.ha_managed:
                raise PveError(500, "Cannot suspend HA managed VM to disk")
            self.require(user, f"/vms/{vm.vmid}", "VM.Config.Disk")
            self.require(user, f"/storage/{values.get('statestorage') or 'local'}", "Datastore.AllocateSpace")
        return todisk

    async def _do_suspend(self, vm: Any, user: str, values: dict[str, Any]) -> str:
        """Pause a VM in a task, or put it to disk."""
        todisk = self._check_suspend(vm, user, values)

        async def body() -> None:
            if vm.lock and (todisk or vm.lock != "backup"):
                raise TaskError(f"VM is locked ({vm.lock})")
            if not todisk:
                vm.qmpstatus = "paused"
                return
            storage = str(values.get("statestorage") or "local")
            if storage not in self.storages:
                raise TaskError(f"storage '{storage}' does not exist")
            if self.hibernation_error:
                vm.lock = vm.config["lock"] = "suspending"
                raise TaskError(self.hibernation_error)
            self.hibernate(vm.vmid, storage)

        return await self.task(vm.node, "qmsuspend" if todisk else "qmpause", vm.vmid, user, body, vm=vm)

    async def _do_resume(self, vm: Any, user: str, values: dict[str, Any]) -> str:
        """Let a paused VM go on in a task, or start a hibernated one."""
        if vm.lock != "suspended" and vm.status != "running":
            raise PveError(500, f"VM {vm.vmid} not running")

        async def body() -> None:
            if vm.lock == "suspended":
                await self._wake_vm(vm)
            vm.qmpstatus = "running"

        return await self.task(vm.node, "qmresume", vm.vmid, user, body, vm=vm)

    async def _wake_vm(self, vm: Any) -> None:
        """Start a hibernated VM from its state: the state is gone afterwards."""
        await self.pause(vm.start_secs)
        if vm.start_error:
            raise TaskError(vm.start_error)
        self._forget_state(vm)
        vm.status = vm.qmpstatus = "running"
        vm.started_at = time.time()
        self.start_agent(vm)

    def _check_vcpus(self, vm: Any) -> None:
        """Refuse a start, in its task, of a VM with more vcpus than its node has."""
        allowed = int(self._read_figures(vm.node)["maxcpu"])
        if int(vm.config.get("cores", 1)) * int(vm.config.get("sockets", 1)) > allowed:
            raise TaskError(f"MAX {allowed} vcpus allowed per VM on this node")
