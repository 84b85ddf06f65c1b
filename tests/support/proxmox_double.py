# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Proxmox VE cluster for tests: fakepve, corrected where it differs from what the real API was seen to do, plus
faults.

ProxmoxDouble is the cluster, DoubleServer runs one over HTTPS on a thread of its own. State may be read and changed
from the test's thread; whatever has to happen at one moment goes through DoubleServer.call().
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web
from fakepve import FakePve, FakeVm, PveError, TaskError
from fakepve import schema as pve_schema
from fakepve.certs import make_cert
from fakepve.lxc import format_size, parse_size
from fakepve.qemu import DRIVE_KEY, NEW_DISK, drives_of, is_cdrom, join_drive, split_drive, volume_ref, with_mac
from fakepve.routing import param_error
from fakepve.server import API, USER
from fakepve.server import params as request_params

from support.proxmox_access import AccessRules
from support.proxmox_guest import GuestRules
from support.proxmox_http import HttpRules
from support.proxmox_power import STATE_KEYS, PowerRules
from support.proxmox_tasks import TaskRules
from support.proxmox_texts import no_config, no_quorum, not_found
from support.proxmox_thread import on_loop

HOST = "127.0.0.1"
CLONE_DESCRIPTION = "qmclone temporary file"
OWNER = re.compile(r"(?:^|/)(?:vm|base)-(\d+)-")
HOTPLUGGED = re.compile(r"(scsi|virtio)\d+$")
CLOUDINIT_KEY = re.compile(
    r"(ciuser|cipassword|citype|ciupgrade|cicustom|sshkeys|nameserver|searchdomain|ipconfig\d+)$"
)
CONFIG_PRIVS = (
    "VM.Config.Disk",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.HWType",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
)
# What the product needs on its own VMs; the template, the storage and the bridge come beside it.
SANDBOX_PRIVS = (
    "VM.Audit",
    "VM.Allocate",
    "VM.PowerMgmt",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Disk",
    "VM.Config.Network",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
    "VM.GuestAgent.Audit",
)
# Requests that a guest of ours answers (proxmox_guest.py); all others are fakepve's.
GUEST_COMMANDS = ("ping", "info", "exec", "exec-status", "file-read", "file-write")


def volume_owner(volume: str) -> int | None:
    """The VMID in the name of a volume: Proxmox knows no other owner."""
    found = OWNER.search(volume.partition(":")[2])
    return int(found[1]) if found else None


class ProxmoxDouble(HttpRules, TaskRules, AccessRules, PowerRules, GuestRules, FakePve):
    """FakePve with the real API's manners. Attributes that tests set are described beside their defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("host", HOST)
        kwargs.setdefault("port", 0)
        super().__init__(*args, **kwargs)
        self._reset_http()
        self._reset_tasks()
        self._reset_access()
        self._reset_power()
        self._reset_machines()
        self.ca_fingerprint = _fingerprint()
        # Answered as one node that was never part of a cluster: /cluster/status has no entry for a cluster.
        self.standalone = False
        # True: a clone to another node is refused where a disk lies on local storage, as Proxmox VE does.
        self.strict_targets = False
        # Real seconds for which a new VM is listed as `unknown` and without a name.
        self.listing_lag = 0.0
        # Node -> its bridges and vnets; vmbr0 and vmbr1 where nothing is said.
        self.bridges: dict[str, list[str]] = {}
        # (node, storage) -> maxdisk and disk as the list of resources tells them.
        self.storage_figures: dict[tuple[str, str], dict[str, int]] = {}
        # Seconds by which the nodes' clocks are ahead of this host's.
        self.clock_offset = 0.0
        # Volume ids of the snippets that there are; cicustom may name no other.
        self.snippets: set[str] = set()
        # False: running guests take no disk and let none go; the change stays pending until the next start.
        self.hotplug = True
        # Storage -> (folder of this machine with its snippets, the node that has it or None for all): a file there is a
        # snippet.
        self.snippet_folders: dict[str, tuple[str, str | None]] = {}
        # What a started guest's cloud-init will have reported (texts of errors), after cloud_init_delay real seconds;
        # None: it never ends.
        self.cloud_init_errors: list[str] | None = []
        self.cloud_init_delay = 0.0
        # True: a started VM whose config has agent=1 answers the guest agent with an address in 192.0.2.0/24,
        # after agent_delay real seconds.
        self.agent_default = False
        self.agent_delay = 0.0
        self._clone: dict[str, Any] = {}
        self._born: dict[int, float] = {}
        self._addresses: dict[int, str] = {}

    def _routes_double(self) -> list[tuple[str, str, Any]]:
        return [
            ("PUT", "/nodes/{node}/qemu/{vmid}/resize", self._qm_resize),
            ("GET", "/nodes/{node}/certificates/info", self._certificates),
            ("GET", "/nodes/{node}/network", self._network),
            ("GET", "/nodes/{node}/time", self._node_time),
        ]

    async def _node_time(self, v: dict[str, Any], user: str) -> dict[str, Any]:
        now = int(time.time() + self.clock_offset)
        return {"time": now, "localtime": now, "timezone": "UTC"}

    async def _network(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        return [
            {"iface": name, "type": "bridge", "active": 1, "method": "manual", "priority": number}
            for number, name in enumerate(self.bridges.get(v["node"], ["vmbr0", "vmbr1"]), 3)
        ]

    async def _certificates(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        def entry(name: str, fingerprint: str, subject: str) -> dict[str, Any]:
            return {
                "filename": name,
                "fingerprint": fingerprint,
                "subject": subject,
                "issuer": "/CN=Proxmox Virtual Environment",
                "san": [],
                "notbefore": 1700000000,
                "notafter": 2015360000,
                "public-key-type": "rsaEncryption",
                "public-key-bits": 4096,
                "pem": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
            }

        # The node's own certificate differs from node to node, the root's does not.
        node = ":".join(f"{b:02X}" for b in uuid.uuid5(uuid.NAMESPACE_DNS, self.ca_fingerprint + v["node"]).bytes * 2)
        return [
            entry("pve-root-ca.pem", self.ca_fingerprint, "/CN=Proxmox Virtual Environment"),
            entry("pve-ssl.pem", node, f"/CN={v['node']}.example.org"),
        ]

    # ------------------------------------------------------------------ listings and status

    async def _resources(self, request: web.Request) -> web.Response:
        response = await super()._resources(request)
        data = json.loads(response.text)["data"]
        now = time.time()
        data = [
            item for item in data if item["type"] != "storage" or self._sees_storage(request[USER], item["storage"])
        ]
        for item in data:
            if item["type"] == "storage":
                item.update(self.storage_figures.get((item["node"], item["storage"]), {}))
            if item["type"] == "node":
                row = self._node_row(item, request[USER])
                item.clear()
                item.update(row, hastate="maintenance" if row["node"] in self.maintenance else "online")
                item["cgroup-mode"] = 2
            if item["type"] != "qemu":
                continue
            self._as_broadcast(item)
            if now - self._born.get(item["vmid"], 0) < self.listing_lag:
                item["status"] = "unknown"
                item.pop("template", None)
            if item["status"] == "unknown":
                item.pop("name", None)
        return web.json_response({"data": data})

    def _sees_storage(self, user: str, sid: str) -> bool:
        return any(
            self.allowed(user, f"/storage/{sid}", priv) for priv in ("Datastore.Audit", "Datastore.AllocateSpace")
        )

    async def _cluster_status(self, request: web.Request) -> web.Response:
        if self.acl is not None:
            self.require(request[USER], "/", "Sys.Audit")
        response = await super()._cluster_status(request)
        data = json.loads(response.text)["data"]
        if self.standalone:
            data = [item for item in data if item["type"] != "cluster"]
        for item in data:
            if item["type"] == "cluster":
                item.pop("online", None)
                live = int(self.quorate or self.stale_quorum)
                item["quorate"] = live if self.cached_quorate is None else self.cached_quorate
        return web.json_response({"data": data})

    # ------------------------------------------------------------------ permissions

    def grant_least(
        self,
        user: str,
        template: int = 9000,
        pool: str | None = None,
        vmids: tuple[int, ...] = (),
        storage: str = "local-lvm",
        bridge: str = "vmbr0",
    ) -> None:
        """What the product needs and no more, for a user or token: on /vms, on a pool (made here), or on single VMIDs.

        Permissions count for everybody from now on.
        """
        if pool is not None and pool not in self.pools:
            self.pools[pool] = set()
            self._pool_meta(pool)
        where = [f"/pool/{pool}"] if pool else [f"/vms/{vmid}" for vmid in vmids] or ["/vms"]
        for path in where:
            self.grant(user, path, *SANDBOX_PRIVS)
        if pool:
            self.grant(user, f"/pool/{pool}", "Pool.Audit")
        self.grant(user, f"/vms/{template}", "VM.Audit", "VM.Clone")
        self.grant(user, f"/storage/{storage}", "Datastore.AllocateSpace", "Datastore.Audit")
        self.grant(user, f"/sdn/zones/localnetwork/{bridge}", "SDN.Use")

    def _config_priv(self, key: str) -> str:
        return "VM.Config.Cloudinit" if CLOUDINIT_KEY.match(key) else super()._config_priv(key)

    def _vm(self, request: web.Request, priv: str | None = None) -> Any:
        """Rights are looked at before the VM is: without them one that is not there answers 403 as well."""
        path = "/vms/" + request.match_info["vmid"]
        if request.match_info["vmid"].isdigit():
            if priv:
                self.require(request[USER], path, priv)
            elif not any(self.allowed(request[USER], path, name) for name in CONFIG_PRIVS):
                raise PveError(403, f"Permission check failed ({path}, {'|'.join(CONFIG_PRIVS)})")
        return super()._vm(request, priv)

    # ------------------------------------------------------------------ power

    async def _status_action(self, request: web.Request) -> web.StreamResponse:
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
                    raise PveError(500, not_found(vmid, node))
                text = not_found(vmid, node)
                if action == "start":
                    self.need_quorum()
                    text = no_config(node, vmid)
                return web.json_response({"data": await self._failing(node, "qm" + action, vmid, user, text)})
            if not self.quorate and action in ("stop", "shutdown", "suspend", "resume"):
                # Only what writes a configuration or begins a VM asks for quorum.
                data = await getattr(self, "_do_" + action)(vm, user, await request_params(request))
                return web.json_response({"data": data})
        return await super()._status_action(request)

    async def _do_stop(self, vm: Any, user: str, p: dict[str, Any]) -> str:
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
        vm.status = vm.qmpstatus = "stopped"
        vm.started_at = None
        if getattr(vm, "agent_by_default", False):
            vm.agent, vm.agent_by_default = None, False

    def _around_qmstart(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
        async def run() -> Any:
            if getattr(vm, "disks_lost", False):
                raise TaskError(
                    "no such logical volume " + ", ".join(volume for _key, volume, _props in drives_of(vm.config, True))
                )
            if vm.lock == "suspended":
                await self._wake(vm)
                return None
            missing = self._missing_snippet(vm)
            if missing and vm.status != "running":
                raise TaskError(missing)
            if vm.status != "running" and not vm.template and not vm.lock:
                self._check_vcpus(vm)
            note = await body()
            self._agent_up(vm)
            return note

        return run

    _around_qmreboot = _around_qmstart

    def _agent_up(self, vm: Any) -> None:
        enabled = re.match(r"(enabled=)?(1|yes|on|true)\b", str(vm.config.get("agent", "0")))
        if not (self.agent_default and enabled and vm.agent is None):
            return
        mac = re.search(r"([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5})", str(vm.config.get("net0", "")))
        answer = {
            "interfaces": [
                {
                    "name": "lo",
                    "hardware-address": "00:00:00:00:00:00",
                    "ip-addresses": [
                        {"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8},
                        {"ip-address": "::1", "ip-address-type": "ipv6", "prefix": 128},
                    ],
                },
                {
                    "name": "eth0",
                    "hardware-address": mac[1].lower() if mac else "bc:24:11:00:00:01",
                    "ip-addresses": [
                        {"ip-address": "fe80::1", "ip-address-type": "ipv6", "prefix": 64},
                        {"ip-address": self.address_of(vm.vmid), "ip-address-type": "ipv4", "prefix": 24},
                    ],
                },
            ]
        }

        def up() -> None:
            if vm.status == "running" and vm.agent is None:
                vm.agent, vm.agent_by_default = answer, True
                asyncio.get_running_loop().call_later(
                    self.cloud_init_delay, ended
                ) if self.cloud_init_delay else ended()

        def ended() -> None:
            if vm.agent is answer and self.cloud_init_errors is not None:
                told = {"v1": {"datasource": "DataSourceNoCloud", "errors": list(self.cloud_init_errors)}}
                answer["files"] = {"/run/cloud-init/result.json": json.dumps(told)}

        if self.agent_delay:
            asyncio.get_running_loop().call_later(self.agent_delay, up)
        else:
            up()

    def address_of(self, vmid: int) -> str:
        """The address a started VM's agent answers: the one in ipconfig0, or one of 192.0.2.0/24 that stays with the
        VMID.
        """
        vm = self.vm(vmid)
        static = re.search(r"ip=(\d+\.\d+\.\d+\.\d+)", str(vm.config.get("ipconfig0", ""))) if vm else None
        return static[1] if static else self._addresses.setdefault(vmid, f"192.0.2.{10 + len(self._addresses) % 240}")

    # ------------------------------------------------------------------ configuration

    async def _apply_config(self, vm: Any, user: str, p: dict[str, Any]) -> None:
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
            raise PveError(500, no_quorum(vm.node, vm.vmid))
        wanted = [key for key in str(updates.get("delete") or "").split(",") if key]
        if "vmstate" in wanted:
            self._check_state_delete(vm, user, updates)
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
                updates[key] = self._drive_value(vm, user, key, updates[key])
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
            self._detached(vm, key, before[key], bool(updates.get("force")))
        missing = self._missing_snippet(vm) if "cicustom" in updates and vm.status == "running" else None
        if missing:
            raise PveError(500, missing)

    def _check_state_delete(self, vm: Any, user: str, updates: dict[str, Any]) -> None:
        """Throw a hibernated VM's state away: the one write that the lock `suspended` lets through."""
        if updates.get("digest") and updates["digest"] != vm.digest():
            raise PveError(500, "checksum mismatch (file change by other user?)")
        for priv in ("VM.Config.Disk", "VM.PowerMgmt"):
            self.require(user, f"/vms/{vm.vmid}", priv)
        if vm.lock not in (None, "suspended"):
            raise PveError(500, f"VM is locked ({vm.lock})")
        self._forget_state(vm)
        updates.pop("digest", None)

    def _drive_value(self, vm: Any, user: str, key: str, value: str) -> str:
        """What the configuration says once the volume is made or found."""
        volume, props = split_drive(value)
        if volume.endswith(":cloudinit"):
            return join_drive(self._cloudinit_volume(volume_ref(volume)[0], vm.vmid), dict(props, media="cdrom"))
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

    def _detached(self, vm: Any, key: str, value: Any, force: bool) -> None:
        """A disk taken off: the VM's own becomes unusedN (or goes, when it was unused or with force), another
        owner's just goes away.
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

    def _missing_snippet(self, vm: Any) -> str | None:
        named = [part.partition("=")[2] for part in str(vm.config.get("cicustom") or "").split(",") if part]
        missing = [
            volume for volume in named if volume not in self.snippets and volume not in self._snippet_files(vm.node)
        ]
        return f"volume '{missing[0]}' does not exist" if missing else None

    def _snippet_files(self, node: str) -> dict[str, str]:
        """Volume id -> path of the snippets that are files of this machine, as that node sees them."""
        return {
            f"{sid}:snippets/{name}": os.path.join(folder, name)
            for sid, (folder, owner) in self.snippet_folders.items()
            if owner in (None, node) and os.path.isdir(folder)
            for name in os.listdir(folder)
        }

    @on_loop
    def hold_snippets(self, folder: str, storage: str = "local", node: str | None = "pve1") -> None:
        """Let a storage hold snippets, in that folder of this machine; node None: shared by all."""
        store = self.storages[storage]
        store["content"] = ",".join(sorted({*str(store.get("content") or "").split(","), "snippets"} - {""}))
        store["shared"] = int(node is None)
        self.snippet_folders[storage] = (folder, node)

    def _on_node(self, volume: str, node: str) -> bool:
        """Whether a node sees a volume: one on local storage is on the node that allocated it alone."""
        known = self._qm_volume(volume)
        return known is None or known.get("node") in (None, node)

    async def _content_create(self, v: dict[str, Any], user: str) -> str:
        volume = await super()._content_create(v, user)
        if not self.storages[v["storage"]].get("shared"):
            self._qm_volume(volume)["node"] = v["node"]
        return volume

    async def _content_list(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        found = [row for row in await super()._content_list(v, user) if self._on_node(row["volid"], v["node"])]
        for row in found:
            if row.get("content") == "images" and self.storages[v["storage"]].get("type") in ("dir", "nfs", "cifs"):
                row.setdefault("parent", None)
                row.setdefault("used", row.get("size", 0))
        if (
            # Proxmox VE lists them for every VMID that is asked for.
            v.get("content") in (None, "snippets")
            and self.allowed(user, f"/storage/{v['storage']}", "Datastore.Allocate")
        ):
            found += [
                {
                    "volid": volume,
                    "content": "snippets",
                    "format": "snippet",
                    "size": os.path.getsize(path),
                    "ctime": int(os.path.getmtime(path)),
                }
                for volume, path in self._snippet_files(v["node"]).items()
                if volume.startswith(v["storage"] + ":")
            ]
        return found

    async def _agent_call(self, match: Any, values: dict[str, Any]) -> Any:
        vm = self.find(values["node"], values["vmid"])
        command = match.template.rsplit("/", 1)[1]
        if vm.status != "running":
            raise PveError(500, f"VM {vm.vmid} is not running")
        if "agent" not in vm.config:
            raise PveError(500, "No QEMU guest agent configured")
        if vm.agent is not None and command in getattr(vm, "agent_blocks", ()):
            name = {"file-read": "guest-file-open"}.get(command, f"guest-{command}")
            text = f"Agent error: Command {name} has been disabled: the command is not allowed"
            raise PveError(500, text)
        if vm.qmpstatus == "paused":
            raise PveError(500, "QEMU guest agent is not running")
        known = (vm.agent or {}).get("files") or {}
        if (
            vm.agent is not None
            and not vm.agent_hangs
            and command in GUEST_COMMANDS
            and values.get("file") not in known
        ):
            return await self._agent_request(vm, command, values)
        answer = await super()._agent_call(match, values)
        if command == "file-read":
            return self._file_read(vm, values["file"])
        return answer

    @staticmethod
    def _file_read(vm: Any, path: str) -> dict[str, Any]:
        files = (vm.agent or {}).get("files") or {}
        if path not in files:
            raise PveError(500, f"Agent error: failed to open file '{path}' (mode: 'r'): No such file or directory")
        content = str(files[path])
        return {"content": content, "bytes-read": len(content)}

    async def _qm_resize(self, v: dict[str, Any], user: str) -> str:
        """Enlarge a disk: always a task, which finds out what is wrong."""
        node, vmid, key = v["node"], v["vmid"], v["disk"]

        async def body() -> None:
            vm = self.vm(int(vmid))
            if vm is None or vm.node != node:
                raise TaskError(no_config(node, vmid))
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
                raise TaskError(no_quorum(node, vmid))
            vm.config[key] = join_drive(volume, dict(props, size=format_size(wanted)))

        return await self.task(node, "resize", vmid, user, body, vm=self.vm(int(vmid)))

    async def _qm_snapshot(self, v: dict[str, Any], user: str) -> str:
        if self.quorate:
            return await super()._qm_snapshot(v, user)
        self.find(v["node"], v["vmid"])
        return await self._failing(v["node"], "qmsnapshot", v["vmid"], user, no_quorum(v["node"], v["vmid"]))

    def _around_qmrollback(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
        async def run() -> Any:
            note = await body()
            if vm.config.get("vmgenid"):
                vm.config["vmgenid"] = str(uuid.uuid4())
            return note

        return run

    # ------------------------------------------------------------------ clone

    async def _qm_clone(self, v: dict[str, Any], user: str) -> str:
        node, vmid, newid = v["node"], int(v["vmid"]), int(v["newid"])
        self._qm_check_pool(v.get("pool"))
        self._qm_perm(user, newid, v.get("pool"), "VM.Allocate")
        src = self.vm(vmid)
        if src is None or src.node != node:
            raise PveError(500, not_found(vmid, node))
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
            return await self._failing(node, "qmclone", vmid, user, text)
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
        """While it runs the target has Proxmox's own description and nothing else; what was asked for stands there
        at the end.
        """
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
                    new.config[key] = join_drive(self._cloudinit_volume(volume_ref(volume)[0], new.vmid), props)
                elif linked and key in source and self._qm_volume(volume):
                    self._qm_volume(volume)["base"] = split_drive(source[key])[0]
            return note

        return run

    def _cloudinit_volume(self, sid: str, vmid: int) -> str:
        """Make (or find) the cloud-init volume of a VM; returns its volume id."""
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

    # ------------------------------------------------------------------ delete

    def _around_qmdestroy(self, body: Any, vm: Any, undo: list[Callable[[], None]]) -> Any:
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
                    raise TaskError(no_quorum(vm.node, vm.vmid))
            foreign = self._foreign_volumes(vm)
            note = await body()
            for sid, name, volume in foreign:
                store = self.storages[sid]
                if name not in store["volumes"]:
                    store["volumes"][name] = volume
                    if "avail" in store:
                        store["avail"] -= int(volume.get("size") or 0)
            return note

        return run

    def _foreign_volumes(self, vm: Any) -> list[tuple[str, str, dict[str, Any]]]:
        """Volumes in the VM's configuration (and snapshots) whose name says another owner: a delete leaves them
        alone.
        """
        found = []
        for config in (vm.config, *vm.snapshots.values()):
            values = [volume for _key, volume, _props in drives_of(config)]
            values += [split_drive(value)[0] for key, value in config.items() if re.match(r"unused\d+$", key)]
            for volume in values:
                known = self._qm_volume(volume)
                if known is not None and volume_owner(volume) != vm.vmid:
                    found.append((*volume_ref(volume), known))
        return found

    def volumes_of(self, vmid: int) -> list[str]:
        """Volume ids that belong to a VMID by their names, on every storage."""
        return sorted(
            f"{sid}:{name}"
            for sid, store in self.storages.items()
            for name in store.get("volumes", {})
            if volume_owner(f"{sid}:{name}") == vmid
        )

    # ------------------------------------------------------------------ what there is

    def _disk(self, sid: str, name: str, vmid: int, size: int) -> str:
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

    @on_loop
    def add_template(
        self, vmid: int = 9000, name: str = "debian-13", storage: str = "local-lvm", node: str = "pve1", **config: Any
    ) -> Any:
        """A cloud image's template: base disk, cloud-init drive, NIC on vmbr0, agent on."""
        size = 3 * 1024**3
        base = self._disk(storage, f"base-{vmid}-disk-0", vmid, size)
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
            "ide2": f"{self._cloudinit_volume(storage, vmid)},media=cdrom",
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
        """An ordinary VM with a disk of its own and an identity; kw go to FakeVm (status, lock, pool, template,
        ...), config is merged.
        """
        size = kw.pop("size", 8 * 1024**3)
        disk = self._disk(storage, f"{'base' if kw.get('template') else 'vm'}-{vmid}-disk-0", vmid, size)
        config = {
            "name": name,
            "cores": 1,
            "memory": "1024",
            "scsi0": f"{disk},size={format_size(size)}",
            "net0": f"virtio={_mac()},bridge=vmbr0",
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
        """Somebody deleted it behind our back: VM, its volumes and its pool membership; returns what it was (None:
        nothing).
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
        """Whatever is at the VMID goes; a VM of somebody else stands there instead, alike in what is asked for and
        in nothing else.
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
        """The VM lives on another node from now on, as after a migration."""
        self.nodes.setdefault(node, {"online": True})
        self.vm(vmid).node = node

    @on_loop
    def power(self, vmid: int, status: str) -> None:
        """Somebody else started, stopped or paused the VM (no task tells of it)."""
        vm = self.vm(vmid)
        if status in ("running", "paused"):
            vm.status, vm.qmpstatus = "running", status
            vm.started_at = vm.started_at or time.time()
        else:
            self._power_off(vm)


def _fingerprint() -> str:
    return ":".join(f"{b:02X}" for b in os.urandom(32))


def _mac() -> str:
    return "BC:24:11:" + ":".join(f"{b:02X}" for b in os.urandom(3))


class DoubleServer:
    """A ProxmoxDouble on loopback, on an event loop and thread of its own.

    Use as a context manager, or start() and stop().

    setup(pve) runs before it listens. The certificate in cafile is for the host and the further names.
    """

    def __init__(
        self,
        time_scale: float = 0.0,
        port: int = 0,
        setup: Callable[[ProxmoxDouble], Any] | None = None,
        double: type[ProxmoxDouble] = ProxmoxDouble,
        host: str = HOST,
        names: tuple[str, ...] = (),
    ) -> None:
        self.pve = double(host=host, port=port)
        self._names = (host, *names)
        self.pve.time_scale = time_scale
        self._setup = setup
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxmox-double", daemon=True)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.cafile = ""

    @property
    def url(self) -> str:
        return self.pve.url

    @property
    def port(self) -> int:
        return self.pve.port

    @property
    def host(self) -> str:
        return self.pve.host

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def start(self) -> DoubleServer:
        self._folder = tempfile.TemporaryDirectory(prefix="proxmox-double-")
        self.cafile, keyfile, _der = make_cert(self._folder.name, hosts=self._names)
        if self._setup is not None:
            self._setup(self.pve)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.pve.start(self.cafile, keyfile), self._loop).result(30)
        except BaseException:
            self._halt()
            raise
        return self

    def stop(self) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self.pve.stop(), self._loop).result(30)
        finally:
            self._halt()

    def _halt(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        if not self._thread.is_alive():
            self._loop.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> DoubleServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function (or coroutine function) on the server's thread, between requests; returns what it returns."""

        async def run() -> Any:
            found = fn(*args, **kwargs)
            return await found if inspect.isawaitable(found) else found

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)


__all__ = [
    "CLONE_DESCRIPTION",
    "DoubleServer",
    "FakeVm",
    "ProxmoxDouble",
    "PveError",
    "TaskError",
    "pve_schema",
    "volume_owner",
]
