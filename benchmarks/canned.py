# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A canned Proxmox VE to measure clients with: one loop, one process, no more work a request than a dictionary and
some JSON.

It speaks HTTPS with kept-alive connections, closes one after 100 requests or an error, takes as long for a task (and
for an answer) as it is told, counts requests by kind, and answers as Proxmox VE does for what a sandbox's end needs.
Rights, locks and most parameters it ignores: whether a client is *right* is what the tests' double is for.

    python benchmarks/canned.py FOLDER      # prints {"port", "ca", "fingerprint"} as one line of JSON, ends when
    standard input does

Beside the API: ``POST /control`` with JSON (Settings) makes a new cluster, ``GET /counts`` tells the requests since
then by kind.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import re
import ssl
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

HOST = "127.0.0.1"
REQUESTS_A_CONNECTION = 100
IDLE_SECONDS = 5.0
TEMPLATE = 9000
GIB = 2**30
PREFIX = "/api2/json/"


def sandbox_uuid(vmid: int) -> str:
    """The UUID that the record of a canned VM has."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"agentlab-benchmark-{vmid}"))


def smbios_uuid(vmid: int) -> str:
    """The SMBIOS UUID of a canned VM."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"smbios-{vmid}"))


@dataclass
class Settings:
    """What the cluster is like. ``vms`` of them from VMID ``first`` on, spread over ``nodes``; times in seconds."""

    vms: int = 0
    first: int = 1000
    nodes: int = 1
    status: str = "stopped"
    # Kind of task -> how long it takes; "" for those not named.
    tasks: dict[str, float] = field(default_factory=lambda: {"": 0.2})
    delay: float = 0.0
    # Whether there is a template to clone, with VMID TEMPLATE, on the first node.
    template: bool = False


@dataclass
class Task:
    upid: str
    node: str
    kind: str
    vmid: int
    started: int
    ended: int | None = None
    status: str | None = None

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {
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
        return {**found, "endtime": self.ended, "status": self.status} if self.ended else {**found, "status": "RUNNING"}


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Cluster:
    """The state, and what each kind of request answers."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.reset(Settings())

    def reset(self, settings: Settings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.tasks: dict[str, Task] = {}
        self.most_tasks = self.running = 0
        self.nodes = [f"pve{number + 1}" for number in range(settings.nodes)]
        self.vms = {vmid: self.made(vmid) for vmid in range(settings.first, settings.first + settings.vms)}
        # Somebody else's: a list is never empty.
        self.vms[100] = {**self.made(100), "description": "not ours", "name": "bystander", "status": "running"}
        if settings.template:
            options = {"template": 1, "ide2": f"local-lvm:vm-{TEMPLATE}-cloudinit,media=cdrom"}
            template = {"name": "base", "node": "pve1", "status": "stopped", "options": options}
            self.vms[TEMPLATE] = {**self.made(TEMPLATE), **template, "description": "A template."}
        self.listed: bytes | None = None

    def made(self, vmid: int) -> dict[str, Any]:
        return {
            "vmid": vmid,
            "name": f"bench-{vmid}",
            "node": self.nodes[vmid % len(self.nodes)],
            "status": self.settings.status,
            "edits": 0,
            "description": f"agentlab-sandbox: {sandbox_uuid(vmid)}\nThrow-away VM of agentlab.proxmox.",
        }

    # ---- requests ----

    def answer(self, method: str, path: str, values: dict[str, str]) -> bytes:
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
        found = _KINDS.get(kind)
        if found is None:
            raise Refused(501, f"Method '{method} /{path}' not implemented")
        answer = found(self, parts, values)
        return answer if isinstance(answer, bytes) else json.dumps({"data": answer}).encode()

    def status(self, _parts: list[str], _values: dict[str, str]) -> Any:
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

    def ha_status(self, _parts: list[str], _values: dict[str, str]) -> Any:
        return [{"id": "quorum", "type": "quorum", "node": "pve1", "quorate": 1, "status": "OK"}]

    def resources(self, _parts: list[str], values: dict[str, str]) -> Any:
        if values.get("type") != "vm":
            return [*(_node_row(name) for name in self.nodes), *(_row(vm) for vm in self.vms.values())]
        if self.listed is None:
            self.listed = json.dumps({"data": [_row(vm) for vm in self.vms.values()]}).encode()
        return self.listed

    def node_vms(self, parts: list[str], _values: dict[str, str]) -> Any:
        return [_row(vm) for vm in self.vms.values() if vm["node"] == parts[1]]

    def nextid(self, _parts: list[str], values: dict[str, str]) -> Any:
        vmid = int(values.get("vmid") or next(number for number in range(100, 10**6) if number not in self.vms))
        if vmid in self.vms:
            raise Refused(400, f"VM {vmid} already exists")
        return str(vmid)

    def permissions(self, _parts: list[str], _values: dict[str, str]) -> Any:
        see = {"VM.Audit": 1, "Sys.Audit": 1}
        run = {**see, "VM.Allocate": 1, "VM.PowerMgmt": 1, "VM.Config.Options": 1}
        return {
            **dict.fromkeys(("/", "/access", "/access/groups", "/nodes", "/sdn", "/storage"), see),
            "/vms": run,
            "/pool": run,
        }

    def acl(self, _parts: list[str], _values: dict[str, str]) -> Any:
        return [
            {"path": "/", "type": "user", "ugid": "bench@pve", "roleid": "See", "propagate": 1},
            {"path": "/vms", "type": "user", "ugid": "bench@pve", "roleid": "Run", "propagate": 1},
        ]

    def certificates(self, _parts: list[str], _values: dict[str, str]) -> Any:
        return [
            {"filename": "pve-root-ca.pem", "fingerprint": self.fingerprint},
            {"filename": "pve-ssl.pem", "fingerprint": "00"},
        ]

    def vm(self, parts: list[str]) -> dict[str, Any]:
        found = self.vms.get(int(parts[3]))
        if found is None or found["node"] != parts[1]:
            raise Refused(500, f"Configuration file 'nodes/{parts[1]}/qemu-server/{parts[3]}.conf' does not exist")
        return found

    def config(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)
        return {
            "name": vm["name"],
            "description": vm["description"] + "\n",
            "smbios1": f"uuid={vm.get('smbios', smbios_uuid(vm['vmid']))}",
            "cores": 1,
            "memory": "512",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            "scsi0": f"local-lvm:vm-{vm['vmid']}-disk-0,size=8G",
            "boot": "order=scsi0",
            "scsihw": "virtio-scsi-single",
            "agent": "1",
            **vm.get("options", {}),
            "digest": _digest(vm),
        }

    def configure(self, parts: list[str], values: dict[str, str]) -> Any:
        vm = self.vm(parts)
        if values.get("digest") not in (None, _digest(vm)):
            raise Refused(500, "checksum mismatch (file change by other user?)")
        vm.update(description=values.get("description", vm["description"]), edits=vm["edits"] + 1)
        options = {key: value for key, value in values.items() if key not in ("description", "digest", "delete")}
        vm["options"] = {**vm.get("options", {}), **options}
        return None

    def clone(self, parts: list[str], values: dict[str, str]) -> Any:
        source, vmid = self.vm(parts), int(values["newid"])
        if vmid in self.vms:
            raise Refused(500, f"unable to create VM {vmid}: config file already exists")
        options = {key: value for key, value in source.get("options", {}).items() if key != "template"}
        made = {**self.made(vmid), "node": source["node"], "status": "stopped", "smbios": str(uuid.uuid4())}
        made["name"] = values.get("name") or f"Copy-of-VM-{source['name']}"
        made["description"] = values.get("description", source["description"])
        made["options"] = {**options, "lock": "clone"}
        self.vms[vmid], self.listed = made, None

        def done() -> str:
            made["options"].pop("lock")
            return "OK"

        return self.begin(made, "qmclone", done)

    def resize(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)
        vm["edits"] += 1
        return self.begin(vm, "resize", lambda: "OK")

    def current(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)
        return {
            "vmid": vm["vmid"],
            "name": vm["name"],
            "status": vm["status"],
            "qmpstatus": vm["status"],
            "uptime": 0,
            "cpus": 1,
            "maxmem": 536870912,
        }

    def stop(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)

        def done() -> str:
            vm["status"] = "stopped"
            return "OK"

        return self.begin(vm, "qmstop", done)

    def start(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)

        def done() -> str:
            vm["status"] = "running"
            return "OK"

        return self.begin(vm, "qmstart", done)

    def delete(self, parts: list[str], _values: dict[str, str]) -> Any:
        vm = self.vm(parts)
        if vm["status"] != "stopped":
            raise Refused(500, f"VM {vm['vmid']} is running - destroy failed")

        def done() -> str:
            return "OK" if self.vms.pop(vm["vmid"], None) else "does not exist"

        return self.begin(vm, "qmdestroy", done)

    def begin(self, vm: dict[str, Any], kind: str, done: Callable[[], str]) -> str:
        started = int(time.time())
        number = len(self.tasks)
        upid = f"UPID:{vm['node']}:{number + 1:08X}:{number:08X}:{started:08X}:{kind}:{vm['vmid']}:bench@pve!bench:"
        task = self.tasks[upid] = Task(upid, vm["node"], kind, vm["vmid"], started)
        self.running += 1
        self.most_tasks = max(self.most_tasks, self.running)

        def end() -> None:
            if self.tasks.get(upid) is task:
                task.status, task.ended = done(), int(time.time())
                self.running -= 1
                self.listed = None

        seconds = self.settings.tasks.get(kind, self.settings.tasks.get("", 0.0))
        asyncio.get_running_loop().call_later(seconds, end)
        return upid

    def task_list(self, parts: list[str], values: dict[str, str]) -> Any:
        source, since, limit = (
            values.get("source", "archive"),
            int(values.get("since", 0)),
            int(values.get("limit", 50)),
        )
        mine = [task for task in reversed(self.tasks.values()) if task.node == parts[1] and task.started >= since]
        active = [task.row() for task in mine if task.ended is None] if source != "archive" else []
        ended = [task.row() for task in mine if task.ended is not None] if source != "active" else []
        return (active + ended)[:limit]

    def task_status(self, parts: list[str], _values: dict[str, str]) -> Any:
        task = self.tasks.get(parts[3])
        if task is None:
            raise Refused(400, "no such task")
        row = {**task.row(), "status": "stopped" if task.ended else "running"}
        return {**row, "exitstatus": task.status} if task.ended else row

    def all_nodes(self, _parts: list[str], _values: dict[str, str]) -> Any:
        return [{"node": name, "type": "node", "status": "online"} for name in self.nodes]


_KINDS: dict[str, Callable[[Cluster, list[str], dict[str, str]], Any]] = {
    "GET /cluster/status": Cluster.status,
    "GET /cluster/ha/status/current": Cluster.ha_status,
    "GET /cluster/resources": Cluster.resources,
    "GET /cluster/nextid": Cluster.nextid,
    "GET /access/permissions": Cluster.permissions,
    "GET /access/acl": Cluster.acl,
    "POST /access/ticket": lambda cluster, parts, values: {
        "ticket": "PVE:bench",
        "CSRFPreventionToken": "x",
        "username": values.get("username"),
    },
    "GET /version": lambda cluster, parts, values: {"version": "9.2.0", "release": "9.2", "repoid": "0"},
    "GET /nodes": Cluster.all_nodes,
    "GET /nodes/{node}/certificates/info": Cluster.certificates,
    "GET /nodes/{node}/qemu": Cluster.node_vms,
    "GET /nodes/{node}/lxc": lambda cluster, parts, values: [],
    "GET /nodes/{node}/tasks": Cluster.task_list,
    "GET /nodes/{node}/tasks/{upid}/status": Cluster.task_status,
    "GET /nodes/{node}/qemu/{vmid}/config": Cluster.config,
    "PUT /nodes/{node}/qemu/{vmid}/config": Cluster.configure,
    "GET /nodes/{node}/qemu/{vmid}/status/current": Cluster.current,
    "POST /nodes/{node}/qemu/{vmid}/clone": Cluster.clone,
    "PUT /nodes/{node}/qemu/{vmid}/resize": Cluster.resize,
    "POST /nodes/{node}/qemu/{vmid}/status/stop": Cluster.stop,
    "POST /nodes/{node}/qemu/{vmid}/status/shutdown": Cluster.stop,
    "POST /nodes/{node}/qemu/{vmid}/status/start": Cluster.start,
    "DELETE /nodes/{node}/qemu/{vmid}": Cluster.delete,
}


def _row(vm: dict[str, Any]) -> dict[str, Any]:
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
        # As those of field.seed(), which were made two hours ago.
        "uptime": 7200 if vm["status"] == "running" else 0,
        "tags": "agentlab",
    }


def _node_row(name: str) -> dict[str, Any]:
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


def _digest(vm: dict[str, Any]) -> str:
    return hashlib.sha1(f"{vm['vmid']} {vm['edits']} {vm['description']}".encode(), usedforsecurity=False).hexdigest()


# ---- HTTP ----


class Connection(asyncio.Protocol):
    """One kept-alive connection: requests one after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.buffer = b""
        self.served = 0
        self.transport: Any = None
        self.queue: asyncio.Queue[tuple[str, str, bytes] | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.task = asyncio.ensure_future(self.serve())

    def connection_lost(self, _error: Exception | None) -> None:
        self.queue.put_nowait(None)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            head, blank, rest = self.buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            found = re.search(rb"(?i)^content-length: *(\d+)", head, re.M)
            length = int(found[1]) if found else 0
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            method, target, _version = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            self.queue.put_nowait((method, target, rest[:length]))

    async def serve(self) -> None:
        while True:
            try:
                request = await asyncio.wait_for(self.queue.get(), IDLE_SECONDS)
            except TimeoutError:
                request = None
            if request is None:
                self.transport.close()
                return
            self.served += 1
            status, reason, body = await self.handle(*request)
            close = status >= 400 or self.served >= REQUESTS_A_CONNECTION
            head = (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json;charset=UTF-8\r\nContent-Length: "
                f"{len(body)}\r\nConnection: {'close' if close else 'Keep-Alive'}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            if close:
                self.transport.close()
                return

    async def handle(self, method: str, target: str, body: bytes) -> tuple[int, str, bytes]:
        path, _mark, query = target.partition("?")
        if path == "/control":
            self.cluster.reset(Settings(**json.loads(body)))
            return 200, "OK", b"{}"
        if path == "/counts":
            return (
                200,
                "OK",
                json.dumps(
                    {"counts": self.cluster.counts, "most_tasks": self.cluster.most_tasks, "vms": len(self.cluster.vms)}
                ).encode(),
            )
        if self.cluster.settings.delay:
            await asyncio.sleep(self.cluster.settings.delay)
        values = dict(parse_qsl(query, keep_blank_values=True))
        if method in ("POST", "PUT"):
            values.update(json.loads(body) if body[:1] == b"{" else parse_qsl(body.decode(), keep_blank_values=True))
        try:
            return 200, "OK", self.cluster.answer(method, unquote(path.removeprefix(PREFIX)), values)
        except Refused as error:
            return error.status, error.text, json.dumps({"data": None, "message": error.text}).encode()


# ---- TLS ----


def make_certificates(folder: str) -> tuple[str, str, str, str]:
    """A certificate authority and a server certificate made by it, as a cluster has them: (ca, certificate, key,
    fingerprint of the ca).
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)

    def made(name: str, key: Any, issuer: Any, signer: Any, *extensions: tuple[Any, bool]) -> Any:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = made(
        "Benchmark CA",
        ca_key,
        None,
        ca_key,
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
    )
    import ipaddress

    certificate = made(
        "canned",
        key,
        ca,
        ca_key,
        (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    )
    paths = [os.path.join(folder, name) for name in ("pve-root-ca.pem", "pve-ssl.pem", "pve-ssl.key")]
    for path, data in zip(
        paths,
        (
            ca.public_bytes(serialization.Encoding.PEM),
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        ),
        strict=True,
    ):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
    fingerprint = ca.fingerprint(hashes.SHA256()).hex(":").upper()
    return paths[0], paths[1], paths[2], fingerprint


async def _serve(folder: str) -> None:
    ca, certificate, key, fingerprint = make_certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    cluster = Cluster(fingerprint)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(cluster), HOST, 0, ssl=context, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1], "ca": ca, "fingerprint": fingerprint}), flush=True)
    ended = asyncio.Event()
    loop.add_reader(0, lambda: ended.set() if not os.read(0, 4096) else None)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
