# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The fake Proxmox the tests and the demo run against: fakepve, corrected where it differs from a real Proxmox VE 9, with faults on demand.

Everything here stands on fakepve as published; what a real Proxmox does otherwise is said at each correction.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections import Counter
from typing import Any

from aiohttp import web
from fakepve import FakePve
from fakepve.certs import make_cert
from fakepve.model import PveError, TaskError

TOKEN_ID = "agentlab@pve!tests"
TOKEN_SECRET = "7d0c1a52-made-up-for-tests-9f3b"
TEMPLATE = 9000


def template_of(path: str) -> str:
    """The kind of a request: names and numbers replaced."""
    path = re.sub(r"^/api2/json", "", path)
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path)
    path = re.sub(r"^/nodes/[^/]+", "/nodes/{node}", path)
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", path)


class Double(FakePve):
    """FakePve as a real Proxmox VE behaves; ``clones_answer`` makes clones answer the guest agent once started."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ca_fingerprint = "AA:" + uuid.uuid4().hex.upper()
        self.clones_answer = True
        self.counted: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self.hidden_tasks: set[str] = set()
        self.task_warnings: Counter[str] = Counter()
        self.task_endings: dict[str, str] = {}
        self.disks_lost: set[int] = set()
        self.before: Any = None
        self.after: Any = None

    # ---- setting up ----

    def add_template(self, vmid: int = TEMPLATE, name: str = "debian-13", node: str = "pve1") -> Any:
        self.storages["local-lvm"].setdefault("volumes", {})[f"base-{vmid}-disk-0"] = {
            "content": "images", "format": "raw", "size": 8 * 1024**3, "vmid": vmid, "ctime": int(time.time())}
        return self.add_vm(vmid, name, node=node, template=True, config={
            "template": 1, "scsi0": f"local-lvm:base-{vmid}-disk-0,size=8G", "boot": "order=scsi0", "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            "smbios1": f"uuid={uuid.uuid4()}", "vmgenid": str(uuid.uuid4()), "agent": "1", "cores": 2, "memory": 2048,
            "ide2": f"local-lvm:vm-{vmid}-cloudinit,media=cdrom"})

    def make_foreign(self, vmid: int, *, name: str = "somebody-elses", running: bool = False, tags: str | None = None, description: str | None = None,
                     template: bool = False, smbios: bool = True, node: str | None = None) -> Any:
        """Put somebody else's VM at a VMID, in place of what is there."""
        old = self.vm(vmid)
        if old is not None:
            self.vms.remove(old)
        config: dict[str, Any] = {"cores": 1, "memory": 512}
        if smbios:
            config["smbios1"] = f"uuid={uuid.uuid4()}"
        if tags:
            config["tags"] = tags
        if description:
            config["description"] = description
        if template:
            config["template"] = 1
        return self.add_vm(vmid, name, node=node or (old.node if old else "pve1"), status="running" if running else "stopped", config=config, template=template)

    # ---- counting and looking ----

    def touched(self, vmid: int) -> list[str]:
        """Every request that changes something and names that VM in its path."""
        return [f"{method} {path}" for method, path, _ in self.requests
                if method != "GET" and re.search(rf"/qemu/{vmid}(/|$)", path)]

    def count(self) -> int:
        return sum(self.counted.values())

    # ---- faults ----

    def fault(self, method: str, suffix: str, kind: str, *, times: int = 1, **values: Any) -> None:
        """The next requests that end in ``suffix``: cut-before, cut-after, truncate, answer (status, body), hang (seconds, carry_out)."""
        self.faults.append({"method": method, "suffix": suffix, "kind": kind, "times": times, **values})

    def _fault_for(self, method: str, path: str) -> dict[str, Any] | None:
        for fault in self.faults:
            if fault["method"] == method and re.search(fault["suffix"] + "$", path):
                fault["times"] -= 1
                if fault["times"] <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    @web.middleware
    async def _extjs(self, request: Any, handler: Any) -> Any:
        # The outermost middleware of fakepve: here requests are counted and broken.
        path = request.path
        if path == "/count":
            found = dict(self.counted)
            if request.method == "DELETE":
                self.counted.clear()
            return web.json_response(found)
        self.counted[f"{request.method} {template_of(path)}"] += 1
        if self.before:
            self.before(request.method, path)
        fault = self._fault_for(request.method, path)
        if fault and fault["kind"] == "cut-before":
            request.transport.close()
            raise ConnectionResetError
        if fault and fault["kind"] == "answer":
            return web.Response(status=fault["status"], text=fault.get("body", ""), content_type=fault.get("type", "application/json"),
                                headers=fault.get("headers"))
        if fault and fault["kind"] == "hang" and not fault.get("carry_out"):
            await asyncio.sleep(fault["seconds"])
            request.transport.close()
            raise ConnectionResetError
        response = await super()._extjs(request, handler)
        if self.after:
            self.after(request.method, path)
        if fault and fault["kind"] in ("cut-after", "hang"):
            if fault["kind"] == "hang":
                await asyncio.sleep(fault["seconds"])
            request.transport.close()
            raise ConnectionResetError
        if fault and fault["kind"] == "truncate":
            return web.Response(status=200, text=response.text[: len(response.text) // 2], content_type="application/json")
        return response

    # ---- where a real Proxmox does otherwise ----


    async def _failing_task(self, node: str, kind: str, vmid: Any, user: str, text: str) -> str:
        async def body() -> None:
            raise TaskError(text)

        return await self.task(node, kind, vmid, user, body)

    async def task(self, node: str, ttype: str, tid: Any, user: str, body: Any, vm: Any = None, lock: bool = True, log: Any = ()) -> Any:
        """As fakepve, and a kind of task can be made to end otherwise: ``task_endings`` (exit status) and ``task_warnings``."""
        upid = await super().task(node, ttype, tid, user, body, vm=vm, lock=lock, log=log)
        record = self.tasks[upid]

        async def spoil() -> None:
            while record["status"] == "running":
                await asyncio.sleep(0.01)
            if ttype in self.task_endings:
                record["exitstatus"] = self.task_endings[ttype]
            elif self.task_warnings[ttype] and record["exitstatus"] == "OK":
                record["exitstatus"] = "WARNINGS: 1"

        if self.task_endings.get(ttype) == "hang":
            record["status"] = "running"
            record.pop("exitstatus", None)
            record.pop("endtime", None)
        elif ttype in self.task_endings or self.task_warnings[ttype]:
            await spoil() if not self.time_scale else asyncio.ensure_future(spoil())
        return upid

    async def _status_action(self, request: Any) -> Any:
        # A VM that is not there: start, stop and shutdown answer 200 with a task, and only the task fails.
        action, vmid, node = request.match_info["action"], int(request.match_info["vmid"]), request.match_info["node"]
        vm = self.vm(vmid)
        from fakepve.server import USER

        if action in ("start", "stop", "shutdown") and (vm is None or vm.node != node):
            text = f"Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist"
            return web.json_response({"data": await self._failing_task(node, "qm" + action, vmid, request[USER], text)})
        response = await super()._status_action(request)
        return response

    async def _qm_destroy(self, v: Any, user: str) -> Any:
        vm = self.find(v["node"], v["vmid"])
        if not self.quorate and vm.status != "running" and str(vm.config.get("protection", "0")) != "1":
            # Without quorum: 200, the disks go, then the task fails and the configuration stays.
            self.disks_lost.add(vm.vmid)
            return await self._failing_task(vm.node, "qmdestroy", vm.vmid, user, "unable to remove config: Permission denied")
        return await super()._qm_destroy(v, user)

    def _require_writable(self) -> None:
        if not self.quorate:
            raise PveError(500, "unable to open file '/etc/pve/nodes/pve1/qemu-server/100.conf.tmp' - Permission denied")

    async def _apply_config(self, vm: Any, user: str, p: Any) -> None:
        self._require_writable()
        await super()._apply_config(vm, user, p)

    async def _qm_clone(self, v: Any, user: str) -> Any:
        newid = int(v["newid"])
        taken = self.vm(newid)
        if taken is not None and taken.node != v["node"]:
            self.need_quorum()
            self.find(v["node"], v["vmid"])
            return await self._failing_task(v["node"], "qmclone", v["vmid"], user,
                                            f"unable to create VM {newid}: open '/etc/pve/nodes/{v['node']}/qemu-server/{newid}.conf': File exists")
        upid = await super()._qm_clone(v, user)
        new = self.vm(newid)
        if new is not None:
            if self.clones_answer:
                new.agent = {}
            if new.lock == "clone":
                # Until it is done the description is Proxmox's own; the last write of the clone sets ours and takes the lock away.
                new.wanted_description = new.config.pop("description", None)
                new.config["description"] = f"clone of VM {v['vmid']}"
        return upid

    @staticmethod
    def _qm_lock(vm: Any, lock: str | None) -> None:
        FakePve._qm_lock(vm, lock)
        if lock is None and hasattr(vm, "wanted_description"):
            vm.config.pop("description", None)
            if vm.wanted_description:
                vm.config["description"] = vm.wanted_description
            del vm.wanted_description

    async def _task_list(self, request: Any) -> Any:
        from fakepve.server import USER

        node, user, query = request.match_info["node"], request[USER], request.query
        audit = self.allowed(user, "/nodes/" + node, "Sys.Audit")
        rows = []
        for one in sorted(self.tasklog, key=lambda t: -t["starttime"]):
            if one["node"] != node or not (audit or self._task_owner(user, one)) or one["upid"] in self.hidden_tasks:
                continue
            running = one["status"] == "running"
            source = query.get("source", "archive")
            if (source == "active" and not running) or (source == "archive" and running):
                continue
            if query.get("typefilter") not in (None, one["type"]) or query.get("vmid") not in (None, one["id"]):
                continue
            if one["starttime"] < int(query.get("since", 0)):
                continue
            row = self._task_view(one, True)
            if running:
                row["status"] = "RUNNING"
            rows.append(row)
        start = int(query.get("start", 0))
        return web.json_response({"data": rows[start:start + int(query.get("limit", 50))]})

    async def _task_status(self, request: Any) -> Any:
        upid = request.match_info["upid"]
        if upid in self.hidden_tasks or upid not in self.tasks:
            return web.json_response({"data": None, "message": "no such task\n"}, status=400, reason="no such task")
        return await super()._task_status(request)

    async def _generic(self, request: Any) -> Any:
        path = request.path.removeprefix("/api2/json")
        if re.fullmatch(r"/nodes/[^/]+/certificates/info", path):
            return web.json_response({"data": [{"filename": "pve-root-ca.pem", "fingerprint": self.ca_fingerprint}, {"filename": "pve-ssl.pem", "fingerprint": "BB"}]})
        found = re.fullmatch(r"/nodes/([^/]+)/qemu/(\d+)/resize", path)
        if found and request.method == "PUT":
            vm = self.find(found[1], found[2])
            values = await request.post()
            vm.config[values["disk"]] = re.sub(r"size=[^,]+", f"size={values['size']}", str(vm.config[values["disk"]]))
            return web.json_response({"data": None})
        return await super()._generic(request)


class Server:
    """A Double on an event loop of its own, listening on loopback."""

    def __init__(self, folder: str, *, time_scale: float = 0, port: int = 0) -> None:
        self.cafile, keyfile, _ = make_cert(folder, hosts=("127.0.0.1", "localhost"))
        self.pve = Double(host="127.0.0.1", port=port)
        self.pve.time_scale = time_scale
        self.pve.apitokens[TOKEN_ID] = TOKEN_SECRET
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait(self.pve.start(self.cafile, keyfile))

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def environment(self, folder: str) -> dict[str, str]:
        """What a user would set to reach it, with records in ``folder``."""
        return {
            "PROXMOX_HOST": "127.0.0.1", "PROXMOX_PORT": str(self.pve.port), "PROXMOX_TOKEN_ID": TOKEN_ID, "PROXMOX_TOKEN_SECRET": TOKEN_SECRET,
            "PROXMOX_CA_PATH": self.cafile, "PROXMOX_VALIDATE_CERTS": "true", "AGENTLAB_DATABASE": f"{folder}/agentlab.db",
            "AGENTLAB_CONFIG": f"{folder}/config.yaml"}

    def stop(self) -> None:
        self._wait(self.pve.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
