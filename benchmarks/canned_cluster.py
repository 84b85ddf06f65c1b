# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cluster of the canned Proxmox VE: nodes, VMs and tasks, and the answer to each kind of request.

Rights, locks and most parameters are ignored: whether a client is *right* is tested with the double of tests/support.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TEMPLATE = 9000
GIB = 2**30


def make_sandbox_uuid(vmid: int) -> str:
    """Return the UUID that the record of a canned VM has."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"agentlab-benchmark-{vmid}"))


def make_smbios_uuid(vmid: int) -> str:
    """Return the SMBIOS UUID of a canned VM."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"smbios-{vmid}"))


@dataclass
class Settings:
    """A new cluster: ``vms`` VMs with VMIDs from ``first`` on, spread over ``nodes`` nodes, all with one status."""

    vms: int = 0
    first: int = 1000
    nodes: int = 1
    status: str = "stopped"
    # Kind of task -> its seconds; "" for the kinds not named.
    tasks: dict[str, float] = field(default_factory=lambda: {"": 0.2})
    # Seconds before each answer.
    delay: float = 0.0
    # Whether there is a template to clone, with VMID TEMPLATE, on the first node.
    template: bool = False


@dataclass
class Task:
    """A task of Proxmox VE: it runs until ``ended`` is set. Times are in seconds since 1970."""

    upid: str
    node: str
    kind: str
    vmid: int
    started: int
    ended: int | None = None
    status: str | None = None

    def make_row(self) -> dict[str, Any]:
        """Return the task as a row of Proxmox VE's task list."""
        row: dict[str, Any] = {
            "upid": self.upid,
            "node": self.node,
            "type": self.kind,
            "id": str(self.vmid),
            "user": "bench@pve",
            "tokenid": "bench",
            "starttime": self.started,
            "pid": 1,
            "pstart": 1,
        }
        return {**row, "endtime": self.ended, "status": self.status} if self.ended else {**row, "status": "RUNNING"}


class RequestRefused(Exception):
    """An answer with an HTTP status that means an error, and its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Cluster:
    """Nodes, VMs and tasks, and a method for each kind of request.

    ``fingerprint``: that of the cluster's CA. Such a method gets the parts of the path and the values of the request,
    and returns the data of the answer, or the whole answer as bytes. It raises RequestRefused.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.reset(Settings())

    def reset(self, settings: Settings) -> None:
        """Start a new cluster, and count requests from zero."""
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.tasks: dict[str, Task] = {}
        self.most_tasks = self.running = 0
        self.nodes = [f"pve{number + 1}" for number in range(settings.nodes)]
        self.vms = {vmid: self.make_vm(vmid) for vmid in range(settings.first, settings.first + settings.vms)}
        # A VM of somebody else: the list of a real cluster is never empty.
        self.vms[100] = {**self.make_vm(100), "description": "not ours", "name": "bystander", "status": "running"}
        if settings.template:
            options = {"template": 1, "ide2": f"local-lvm:vm-{TEMPLATE}-cloudinit,media=cdrom"}
            template = {"name": "base", "node": "pve1", "status": "stopped", "options": options}
            self.vms[TEMPLATE] = {**self.make_vm(TEMPLATE), **template, "description": "A template."}
        # The answer with all VMs, until a VM changes.
        self.vm_list: bytes | None = None

    def make_vm(self, vmid: int) -> dict[str, Any]:
        """Return a VM of ours as the settings have it."""
        return {
            "vmid": vmid,
            "name": f"bench-{vmid}",
            "node": self.nodes[vmid % len(self.nodes)],
            "status": self.settings.status,
            "edits": 0,
            "description": f"agentlab-sandbox: {make_sandbox_uuid(vmid)}\nThrow-away VM of agentlab.proxmox.",
        }

    def answer_request(self, method: str, path: str, values: dict[str, str]) -> bytes:
        """Count a request by its kind, carry it out, and return the body of the answer.

        ``path`` begins after /api2/json/. Raises RequestRefused.
        """
        parts = path.split("/")
        if parts[0] == "nodes" and len(parts) > 3 and parts[2] == "qemu":
            kind = f"{method} /nodes/{{node}}/qemu/{{vmid}}{''.join('/' + part for part in parts[4:])}"
        elif parts[0] == "nodes" and len(parts) > 3 and parts[2] == "tasks":
            kind = f"{method} /nodes/{{node}}/tasks/{{upid}}/{parts[4]}"
        elif parts[0] == "nodes" and len(parts) > 1:
            kind = f"{method} /nodes/{{node}}{''.join('/' + part for part in parts[2:])}"
        else:
            kind = f"{method} /{path}"
        self.counts[kind] += 1
        answer_kind = _KINDS.get(kind)
        if answer_kind is None:
            raise RequestRefused(501, f"Method '{method} /{path}' not implemented")
        answer = answer_kind(self, parts, values)
        return answer if isinstance(answer, bytes) else json.dumps({"data": answer}).encode()

    # ---- the cluster ----

    def list_cluster_status(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the rows of the cluster and of its nodes, all online and with quorum."""
        rows = [
            {"type": "cluster", "id": "cluster", "name": "bench", "quorate": 1, "nodes": len(self.nodes), "version": 3}
        ]
        return rows + [
            {
                "type": "node",
                "id": f"node/{name}",
                "name": name,
                "online": 1,
                "local": int(name == "pve1"),
                "nodeid": number,
            }
            for number, name in enumerate(self.nodes, 1)
        ]

    def list_ha_status(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the row of the high availability manager that says that the cluster has quorum."""
        return [{"id": "quorum", "type": "quorum", "node": "pve1", "quorate": 1, "status": "OK"}]

    def list_resources(self, _parts: list[str], values: dict[str, str]) -> Any:
        """Return the rows of all VMs, and those of the nodes unless only VMs are wanted."""
        if values.get("type") != "vm":
            return [*(_make_node_row(name) for name in self.nodes), *(_make_vm_row(vm) for vm in self.vms.values())]
        if self.vm_list is None:
            self.vm_list = json.dumps({"data": [_make_vm_row(vm) for vm in self.vms.values()]}).encode()
        return self.vm_list

    def list_nodes(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the rows of the nodes."""
        return [{"node": name, "type": "node", "status": "online"} for name in self.nodes]

    def list_certificates(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the certificates of a node; the first has the fingerprint of the cluster's CA."""
        return [
            {"filename": "pve-root-ca.pem", "fingerprint": self.fingerprint},
            {"filename": "pve-ssl.pem", "fingerprint": "00"},
        ]

    def choose_vmid(self, _parts: list[str], values: dict[str, str]) -> Any:
        """Return a free VMID: the one of the request, or the lowest from 100 on."""
        vmid = int(values.get("vmid") or next(number for number in range(100, 10**6) if number not in self.vms))
        if vmid in self.vms:
            raise RequestRefused(400, f"VM {vmid} already exists")
        return str(vmid)

    # ---- access ----

    def list_permissions(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the privileges of the token by path."""
        audit = {"VM.Audit": 1, "Sys.Audit": 1}
        manage = {**audit, "VM.Allocate": 1, "VM.PowerMgmt": 1, "VM.Config.Options": 1}
        return {
            **dict.fromkeys(("/", "/access", "/access/groups", "/nodes", "/sdn", "/storage"), audit),
            "/vms": manage,
            "/pool": manage,
        }

    def list_acl(self, _parts: list[str], _values: dict[str, str]) -> Any:
        """Return the access control entries of the token's user."""
        return [
            {"path": "/", "type": "user", "ugid": "bench@pve", "roleid": "See", "propagate": 1},
            {"path": "/vms", "type": "user", "ugid": "bench@pve", "roleid": "Run", "propagate": 1},
        ]

    # ---- VMs ----

    def find_vm(self, parts: list[str]) -> dict[str, Any]:
        """Return the VM of a path /nodes/{node}/qemu/{vmid}; refuse the request when the node has no such VM."""
        vm = self.vms.get(int(parts[3]))
        if vm is None or vm["node"] != parts[1]:
            raise RequestRefused(
                500, f"Configuration file 'nodes/{parts[1]}/qemu-server/{parts[3]}.conf' does not exist"
            )
        return vm

    def list_node_vms(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Return the rows of a node's VMs."""
        return [_make_vm_row(vm) for vm in self.vms.values() if vm["node"] == parts[1]]

    def read_config(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Return the configuration of a VM, with its digest."""
        vm = self.find_vm(parts)
        return {
            "name": vm["name"],
            "description": vm["description"] + "\n",
            "smbios1": f"uuid={vm.get('smbios', make_smbios_uuid(vm['vmid']))}",
            "cores": 1,
            "memory": "512",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            "scsi0": f"local-lvm:vm-{vm['vmid']}-disk-0,size=8G",
            "boot": "order=scsi0",
            "scsihw": "virtio-scsi-single",
            "agent": "1",
            **vm.get("options", {}),
            "digest": _compute_digest(vm),
        }

    def write_config(self, parts: list[str], values: dict[str, str]) -> Any:
        """Write options to the configuration of a VM, unless the request has the digest of another configuration."""
        vm = self.find_vm(parts)
        if values.get("digest") not in (None, _compute_digest(vm)):
            raise RequestRefused(500, "checksum mismatch (file change by other user?)")
        vm.update(description=values.get("description", vm["description"]), edits=vm["edits"] + 1)
        options = {key: value for key, value in values.items() if key not in ("description", "digest", "delete")}
        vm["options"] = {**vm.get("options", {}), **options}
        return None

    def clone_vm(self, parts: list[str], values: dict[str, str]) -> Any:
        """Make a VM from another, locked until the task ends, and return the task id."""
        source, vmid = self.find_vm(parts), int(values["newid"])
        if vmid in self.vms:
            raise RequestRefused(500, f"unable to create VM {vmid}: config file already exists")
        options = {key: value for key, value in source.get("options", {}).items() if key != "template"}
        clone = {**self.make_vm(vmid), "node": source["node"], "status": "stopped", "smbios": str(uuid.uuid4())}
        clone["name"] = values.get("name") or f"Copy-of-VM-{source['name']}"
        clone["description"] = values.get("description", source["description"])
        clone["options"] = {**options, "lock": "clone"}
        self.vms[vmid], self.vm_list = clone, None

        def unlock() -> str:
            clone["options"].pop("lock")
            return "OK"

        return self.begin_task(clone, "qmclone", unlock)

    def resize_disk(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Begin a task that resizes a disk, and return the task id. Only the digest of the VM changes."""
        vm = self.find_vm(parts)
        vm["edits"] += 1
        return self.begin_task(vm, "resize", lambda: "OK")

    def read_current_status(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Return whether a VM runs, and its size."""
        vm = self.find_vm(parts)
        return {
            "vmid": vm["vmid"],
            "name": vm["name"],
            "status": vm["status"],
            "qmpstatus": vm["status"],
            "uptime": 0,
            "cpus": 1,
            "maxmem": 536870912,
        }

    def stop_vm(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Begin a task that stops a VM, and return the task id."""
        return self._begin_status_task(parts, "qmstop", "stopped")

    def start_vm(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Begin a task that starts a VM, and return the task id."""
        return self._begin_status_task(parts, "qmstart", "running")

    def _begin_status_task(self, parts: list[str], kind: str, status: str) -> str:
        """Begin a task at whose end the VM has another status, and return the task id."""
        vm = self.find_vm(parts)

        def set_status() -> str:
            vm["status"] = status
            return "OK"

        return self.begin_task(vm, kind, set_status)

    def delete_vm(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Begin a task that deletes a stopped VM, and return the task id."""
        vm = self.find_vm(parts)
        if vm["status"] != "stopped":
            raise RequestRefused(500, f"VM {vm['vmid']} is running - destroy failed")

        def remove() -> str:
            return "OK" if self.vms.pop(vm["vmid"], None) else "does not exist"

        return self.begin_task(vm, "qmdestroy", remove)

    # ---- tasks ----

    def begin_task(self, vm: dict[str, Any], kind: str, work: Callable[[], str]) -> str:
        """Begin a task on a VM, and return its id.

        At the end of the task's time ``work`` carries the task out, and returns its exit status.
        """
        started = int(time.time())
        number = len(self.tasks)
        upid = f"UPID:{vm['node']}:{number + 1:08X}:{number:08X}:{started:08X}:{kind}:{vm['vmid']}:bench@pve!bench:"
        task = self.tasks[upid] = Task(upid, vm["node"], kind, vm["vmid"], started)
        self.running += 1
        self.most_tasks = max(self.most_tasks, self.running)

        def end_task() -> None:
            # A reset may have dropped the task.
            if self.tasks.get(upid) is task:
                task.status, task.ended = work(), int(time.time())
                self.running -= 1
                self.vm_list = None

        seconds = self.settings.tasks.get(kind, self.settings.tasks.get("", 0.0))
        asyncio.get_running_loop().call_later(seconds, end_task)
        return upid

    def list_tasks(self, parts: list[str], values: dict[str, str]) -> Any:
        """Return the rows of a node's tasks, the newest first: running, ended or all ones, as ``source`` says."""
        source, since, limit = (
            values.get("source", "archive"),
            int(values.get("since", 0)),
            int(values.get("limit", 50)),
        )
        tasks = [task for task in reversed(self.tasks.values()) if task.node == parts[1] and task.started >= since]
        active = [task.make_row() for task in tasks if task.ended is None] if source != "archive" else []
        ended = [task.make_row() for task in tasks if task.ended is not None] if source != "active" else []
        return (active + ended)[:limit]

    def read_task_status(self, parts: list[str], _values: dict[str, str]) -> Any:
        """Return the status of a task, with its exit status once it has ended."""
        task = self.tasks.get(parts[3])
        if task is None:
            raise RequestRefused(400, "no such task")
        row = {**task.make_row(), "status": "stopped" if task.ended else "running"}
        return {**row, "exitstatus": task.status} if task.ended else row


_KINDS: dict[str, Callable[[Cluster, list[str], dict[str, str]], Any]] = {
    "GET /cluster/status": Cluster.list_cluster_status,
    "GET /cluster/ha/status/current": Cluster.list_ha_status,
    "GET /cluster/resources": Cluster.list_resources,
    "GET /cluster/nextid": Cluster.choose_vmid,
    "GET /access/permissions": Cluster.list_permissions,
    "GET /access/acl": Cluster.list_acl,
    "POST /access/ticket": lambda cluster, parts, values: {
        "ticket": "PVE:bench",
        "CSRFPreventionToken": "x",
        "username": values.get("username"),
    },
    "GET /version": lambda cluster, parts, values: {"version": "9.2.0", "release": "9.2", "repoid": "0"},
    "GET /nodes": Cluster.list_nodes,
    "GET /nodes/{node}/certificates/info": Cluster.list_certificates,
    "GET /nodes/{node}/qemu": Cluster.list_node_vms,
    "GET /nodes/{node}/lxc": lambda cluster, parts, values: [],
    "GET /nodes/{node}/tasks": Cluster.list_tasks,
    "GET /nodes/{node}/tasks/{upid}/status": Cluster.read_task_status,
    "GET /nodes/{node}/qemu/{vmid}/config": Cluster.read_config,
    "PUT /nodes/{node}/qemu/{vmid}/config": Cluster.write_config,
    "GET /nodes/{node}/qemu/{vmid}/status/current": Cluster.read_current_status,
    "POST /nodes/{node}/qemu/{vmid}/clone": Cluster.clone_vm,
    "PUT /nodes/{node}/qemu/{vmid}/resize": Cluster.resize_disk,
    "POST /nodes/{node}/qemu/{vmid}/status/stop": Cluster.stop_vm,
    "POST /nodes/{node}/qemu/{vmid}/status/shutdown": Cluster.stop_vm,
    "POST /nodes/{node}/qemu/{vmid}/status/start": Cluster.start_vm,
    "DELETE /nodes/{node}/qemu/{vmid}": Cluster.delete_vm,
}


def _make_vm_row(vm: dict[str, Any]) -> dict[str, Any]:
    """Return a VM as a row of Proxmox VE's list of resources."""
    return {
        "id": f"qemu/{vm['vmid']}",
        "type": "qemu",
        "vmid": vm["vmid"],
        "name": vm["name"],
        "node": vm["node"],
        "status": vm["status"],
        "template": vm.get("options", {}).get("template", 0),
        "cpu": 0,
        "maxcpu": 1,
        "mem": 0,
        "maxmem": 536870912,
        "disk": 0,
        "maxdisk": 8589934592,
        "diskread": 0,
        "diskwrite": 0,
        "netin": 0,
        "netout": 0,
        # The sandboxes of field.create_database() were created two hours ago.
        "uptime": 7200 if vm["status"] == "running" else 0,
        "tags": "agentlab",
    }


def _make_node_row(name: str) -> dict[str, Any]:
    """Return a node as a row of Proxmox VE's list of resources."""
    return {
        "id": f"node/{name}",
        "type": "node",
        "node": name,
        "status": "online",
        "cpu": 0,
        "maxcpu": 64,
        "mem": 8 * GIB,
        "maxmem": 512 * GIB,
        "disk": 0,
        "maxdisk": 100 * GIB,
    }


def _compute_digest(vm: dict[str, Any]) -> str:
    """Return the digest of a VM's configuration; each write changes it."""
    return hashlib.sha1(f"{vm['vmid']} {vm['edits']} {vm['description']}".encode(), usedforsecurity=False).hexdigest()
