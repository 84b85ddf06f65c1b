# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Power states, hibernation, hot-unplug, quorum and node figures of the Proxmox double.

How a test switches each of them on (``pve`` is the double, ``vm`` is ``pve.vm(vmid)``):

- **Power from outside**: ``pve.power(vmid, "running" | "stopped" | "paused")``. A pause is `status: running` with
  `qmpstatus: paused`.
- **Hibernated**: ``pve.hibernate(vmid)`` puts the VM to disk at once: stopped, `lock: suspended`, a `vmstate` volume.
  start and resume wake it (``vm.start_error = "start failed: QEMU exited with code 1"``: the state cannot be loaded,
  lock and state stay), stop and shutdown say OK and change nothing, config writes and clones are refused with 500,
  `delete=vmstate` throws the state away, DELETE works.
- **A hibernation that fails**: ``pve.hibernation_error = "..."`` makes the next `todisk` suspends end with that text;
  the VM runs on with `lock: suspending`, which only root can take away (``pve.unlock(vmid)``).
- **A guest that does not let a disk go**: ``pve.unplug_refused = True`` (or a set of VMIDs): a config PUT that takes
  a disk off a running VM is 400 `hotplug problem - error on hot-unplugging device ...` after ``pve.unplug_seconds``
  real seconds. The delete stays pending: `GET config` lacks the disk, `GET config?current=1` shows it, the next start
  carries it out. (``pve.hotplug = False`` is a VM with hot-plugging switched off: such changes are 200 and stay
  pending.)
- **Quorum**: ``pve.lose_quorum()`` and ``pve.regain_quorum()`` are the truth. ``pve.cached_quorate = 0`` (or 1) is
  what GET /cluster/status says whatever the truth is; the row `quorum` of GET /cluster/ha/status/current tells the
  truth. ``pve.stale_quorum = True``: both go on saying quorate, as for seven seconds of a cut.
- **Lists that lag**: ``pve.status_lag = 10.0``: status, name and template flag in /cluster/resources are as they were
  up to that many real seconds ago, as the real broadcast every ten seconds. Tags, lock and node are told at once.
  ``pve.listing_lag`` concerns new VMs alone.
- **Nodes**: ``pve.node_figures["pve1"] = {"maxcpu": 2, "mem": ..., "maxmem": ...}``; a VM with more vcpus than
  `maxcpu` does not start (`MAX 2 vcpus allowed per VM on this node`). ``pve.maintenance.add("pve2")`` is HA
  maintenance. Who lacks Sys.Audit on /nodes/NAME gets no figures.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from aiohttp import web
from fakepve import PveError, TaskError
from fakepve.qemu import drives_of, is_cdrom
from fakepve.server import USER
from fakepve.server import params as request_params

STATE_KEYS = ("vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu")
UNPLUGGED = re.compile(r"(scsi|virtio|net)\d+$")


class PowerRules:
    """Mixin of ProxmoxDouble. The module's docstring says how tests use it."""

    def _reset_power(self) -> None:
        self.hibernation_error = ""
        self.unplug_refused: bool | set[int] = False
        self.unplug_seconds = 0.0
        self.cached_quorate: int | None = None
        self.stale_quorum = False
        self.status_lag = 0.0
        self.node_figures: dict[str, dict[str, Any]] = {}
        self.maintenance: set[str] = set()
        self._broadcast: tuple[float, dict[int, dict[str, Any]]] = (0.0, {})

    async def _status_current(self, request: web.Request) -> web.Response:
        """Return a VM's status with the keys that a real one has: figures of devices only while it runs."""
        response = await super()._status_current(request)  # type: ignore[misc]
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
        volume = vm.config.get("vmstate")
        if volume:
            self._qm_free(volume)
        for key in (*STATE_KEYS, "lock"):
            vm.config.pop(key, None)
        vm.lock = None

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
        if vm.lock != "suspended" and vm.status != "running":
            raise PveError(500, f"VM {vm.vmid} not running")

        async def body() -> None:
            if vm.lock == "suspended":
                await self._wake(vm)
            vm.qmpstatus = "running"

        return await self.task(vm.node, "qmresume", vm.vmid, user, body, vm=vm)

    async def _wake(self, vm: Any) -> None:
        """Start a hibernated VM from its state: the state is gone afterwards."""
        await self.pause(vm.start_secs)
        if vm.start_error:
            raise TaskError(vm.start_error)
        self._forget_state(vm)
        vm.status = vm.qmpstatus = "running"
        vm.started_at = time.time()
        self._agent_up(vm)

    async def _do_shutdown_refusals(self, vm: Any) -> None:
        if vm.status == "running" and vm.qmpstatus in ("paused", "suspended", "prelaunch"):
            raise PveError(500, "VM is paused - cannot shutdown")

    def _check_vcpus(self, vm: Any) -> None:
        """Refuse a start, in its task, of a VM with more vcpus than its node has."""
        allowed = int(self._figures(vm.node)["maxcpu"])
        if int(vm.config.get("cores", 1)) * int(vm.config.get("sockets", 1)) > allowed:
            raise TaskError(f"MAX {allowed} vcpus allowed per VM on this node")

    # ------------------------------------------------------------------ configuration of running VMs

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

    # ------------------------------------------------------------------ quorum, nodes, lists

    def _routes_ha(self) -> list[Any]:
        return [("GET", "/cluster/ha/status/current", self._ha_status)]

    async def _ha_status(self, values: dict[str, Any], user: str) -> list[dict[str, Any]]:
        self.require(user, "/", "Sys.Audit")
        asked = sorted(self.nodes)[0]
        quorate = int(self.quorate or self.stale_quorum)
        now = int(time.time())
        rows: list[dict[str, Any]] = [
            {
                "id": "quorum",
                "type": "quorum",
                "node": asked,
                "quorate": quorate,
                "status": "OK" if quorate else f"No quorum on node '{asked}'!",
            }
        ]
        if not self.standalone:
            rows += [
                {"id": "master", "type": "master", "node": asked, "timestamp": now, "status": f"{asked} (idle)"},
                {
                    "id": "fencing",
                    "type": "fencing",
                    "node": asked,
                    "armed-state": "standby",
                    "status": "standby (CRM watchdog standby)",
                },
            ]
        for node in sorted(self.nodes):
            state = "maintenance mode" if node in self.maintenance else "idle"
            rows.append(
                {
                    "id": f"lrm:{node}",
                    "type": "lrm",
                    "node": node,
                    "timestamp": now,
                    "status": f"{node} ({state}, watchdog standby)",
                }
            )
        rows += [
            {
                "id": f"service:vm:{vm.vmid}",
                "sid": f"vm:{vm.vmid}",
                "type": "service",
                "node": vm.node,
                "state": vm.ha_state,
                "request_state": vm.ha_state,
                "crm_state": vm.ha_state,
                "status": f"vm:{vm.vmid} ({vm.node}, {vm.ha_state})",
            }
            for vm in self.vms
            if vm.ha_managed
        ]
        return rows

    def _figures(self, node: str) -> dict[str, Any]:
        # Room for as many sandboxes as a test likes; whoever tests a full node sets node_figures.
        stats = {**super()._node_stats(True), "maxmem": 512 * 1024**3}  # type: ignore[misc]
        return {**stats, **self.node_figures.get(node, {})}

    async def _nodes(self, request: web.Request) -> web.Response:
        response = await super()._nodes(request)  # type: ignore[misc]
        return web.json_response(
            {"data": [self._node_row(row, request[USER]) for row in json.loads(response.text)["data"]]}
        )

    def _node_row(self, row: dict[str, Any], user: str) -> dict[str, Any]:
        """Return a node as a list tells it: without figures where the user has no Sys.Audit or the node is offline."""
        figures = super()._node_stats(True)  # type: ignore[misc]
        bare = {key: value for key, value in row.items() if key not in figures}
        if row["status"] != "online" or not self.allowed(user, "/nodes/" + row["node"], "Sys.Audit"):
            return bare
        return {**bare, **self._figures(row["node"])}

    def _snap_broadcast(self) -> None:
        """Renew what lists tell of every VM, unless the last broadcast is younger than status_lag."""
        now = time.monotonic()
        if self.status_lag and now - self._broadcast[0] >= self.status_lag:
            self._broadcast = (
                now,
                {vm.vmid: {"status": vm.status, "name": vm.name, "template": int(vm.template)} for vm in self.vms},
            )

    def _as_broadcast(self, item: dict[str, Any]) -> None:
        """Set back a row of /cluster/resources to the last broadcast."""
        if not self.status_lag:
            return
        told = self._broadcast[1].get(item["vmid"])
        if told is None:
            item["status"] = "unknown"
            item.pop("template", None)
        elif item["status"] != "unknown":
            item.update(told)


def is_cdrom_key(config: dict[str, Any], key: str) -> bool:
    """Return whether a key of a configuration is a CD-ROM drive."""
    return any(name == key and is_cdrom(volume, props) for name, volume, props in drives_of(config))
