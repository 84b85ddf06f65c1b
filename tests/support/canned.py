# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A small TLS server on loopback that answers as a test says, byte for byte, with a certificate of its own."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.config import ProxmoxSettings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support.double import TOKEN_ID, TOKEN_SECRET

Answer = Callable[[ssl.SSLSocket, bytes], None]


class Hurried(SystemClock):
    """Does not wait between tries."""

    def sleep(self, seconds: float) -> None:
        pass


def certificate(folder: Path, days: int = 30) -> tuple[str, str]:
    """Return the files of a certificate for 127.0.0.1, which is its own authority, and of its key; it ends in so
    many days.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=90))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


class Canned:
    """A TLS server on loopback. ``answer`` is called for each request with the socket and the request's head."""

    def __init__(self, folder: Path, answer: Answer, *, broken: int = 0, days: int = 30) -> None:
        self.cafile, keyfile = certificate(folder / f"canned-{days}", days)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.cafile, keyfile)
        self._answer = answer
        # So many connections end before their handshake does.
        self.broken = broken
        self.connections = 0
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _address = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        if self.broken > 0:
            self.broken -= 1
            plain.recv(1)
            plain.close()
            return
        with contextlib.suppress(OSError), plain, self._context.wrap_socket(plain, server_side=True) as sock:
            head = b""
            while b"\r\n\r\n" not in head:
                more = sock.recv(65536)
                if not more:
                    return
                head += more
            top, _end, body = head.partition(b"\r\n\r\n")
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in top.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ),
                0,
            )
            while len(body) < length:
                body += sock.recv(65536)
            self.requests.append(top + b"\r\n\r\n" + body)
            self._answer(sock, head)

    def stop(self) -> None:
        self._listener.close()

    def client(self, **changes: Any) -> ProxmoxClient:
        values: dict[str, Any] = {
            "api_host": "127.0.0.1",
            "api_port": self.port,
            "api_token_id": TOKEN_ID,
            "api_token_secret": TOKEN_SECRET,
            "ca_path": self.cafile,
            "api_timeout": 10,
            **changes,
        }
        return ProxmoxClient(ProxmoxSettings(**values), Hurried())
