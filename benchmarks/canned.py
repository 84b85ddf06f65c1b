# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve a canned Proxmox VE to measure clients with: one process, and a dictionary and some JSON as all of its work.

The server speaks HTTPS, keeps connections alive, and closes a connection after 100 requests or an error. The cluster
behind it (canned_cluster.py) counts requests by kind, and takes as long for a task, and for an answer, as the settings
say.

    python benchmarks/canned.py FOLDER

It prints {"port", "ca", "fingerprint"} as one line of JSON, and ends when its standard input does. FOLDER gets the
certificates. Beside the API of Proxmox VE, ``POST /control`` with JSON (canned_cluster.Settings) starts a new cluster,
and ``GET /counts`` returns the requests since then by kind.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import re
import ssl
import sys
from typing import Any
from urllib.parse import parse_qsl, unquote

from canned_cluster import Cluster, RequestRefused, Settings

HOST = "127.0.0.1"
# After so many requests Proxmox VE closes a connection, and after so many seconds without one.
REQUESTS_A_CONNECTION = 100
IDLE_SECONDS = 5.0
PREFIX = "/api2/json/"


# ---- HTTP ----


class Connection(asyncio.Protocol):
    """A kept-alive connection, whose requests are answered one after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.buffer = b""
        self.served = 0
        self.transport: Any = None
        self.queue: asyncio.Queue[tuple[str, str, bytes] | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to answer requests."""
        self.transport = transport
        self.task = asyncio.ensure_future(self.serve_requests())

    def connection_lost(self, _error: Exception | None) -> None:
        """End the task that answers requests."""
        self.queue.put_nowait(None)

    def data_received(self, data: bytes) -> None:
        """Take each complete request from what was received."""
        self.buffer += data
        while True:
            head, blank, rest = self.buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            length_header = re.search(rb"(?i)^content-length: *(\d+)", head, re.M)
            length = int(length_header[1]) if length_header else 0
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            method, target, _version = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            self.queue.put_nowait((method, target, rest[:length]))

    async def serve_requests(self) -> None:
        """Answer the requests of the connection until it is lost, idle, used up, or answered with an error."""
        while True:
            try:
                request = await asyncio.wait_for(self.queue.get(), IDLE_SECONDS)
            except TimeoutError:
                request = None
            if request is None:
                self.transport.close()
                return
            self.served += 1
            status, reason, body = await self.answer_request(*request)
            close = status >= 400 or self.served >= REQUESTS_A_CONNECTION
            head = (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json;charset=UTF-8\r\nContent-Length: "
                f"{len(body)}\r\nConnection: {'close' if close else 'Keep-Alive'}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            if close:
                self.transport.close()
                return

    async def answer_request(self, method: str, target: str, body: bytes) -> tuple[int, str, bytes]:
        """Carry a request out, and return status, reason and body of the answer."""
        path, _mark, query = target.partition("?")
        if path == "/control":
            self.cluster.reset(Settings(**json.loads(body)))
            return 200, "OK", b"{}"
        if path == "/counts":
            counts = {
                "counts": self.cluster.counts,
                "most_tasks": self.cluster.most_tasks,
                "vms": len(self.cluster.vms),
            }
            return 200, "OK", json.dumps(counts).encode()
        if self.cluster.settings.delay:
            await asyncio.sleep(self.cluster.settings.delay)
        values = dict(parse_qsl(query, keep_blank_values=True))
        if method in ("POST", "PUT"):
            values.update(json.loads(body) if body[:1] == b"{" else parse_qsl(body.decode(), keep_blank_values=True))
        try:
            return 200, "OK", self.cluster.answer_request(method, unquote(path.removeprefix(PREFIX)), values)
        except RequestRefused as error:
            return error.status, error.text, json.dumps({"data": None, "message": error.text}).encode()


# ---- TLS ----


def make_certificates(folder: str) -> tuple[str, str, str, str]:
    """Make a certificate authority and a server certificate signed by it, as a cluster has them.

    Returns the paths of the CA's certificate, of the server's certificate and of its key, and the CA's fingerprint.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)

    def sign_certificate(name: str, key: Any, issuer: Any, signer: Any, *extensions: tuple[Any, bool]) -> Any:
        """Return a certificate of ``key``, signed by the key ``signer``; without ``issuer`` it is its own issuer."""
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
    ca = sign_certificate(
        "Benchmark CA",
        ca_key,
        None,
        ca_key,
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
    )
    certificate = sign_certificate(
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


async def serve_cluster(folder: str) -> None:
    """Serve a canned cluster on a free port until standard input ends. ``folder`` gets the certificates."""
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
    asyncio.run(serve_cluster(sys.argv[1]))
