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
from dataclasses import dataclass
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
        """Do not wait."""


@dataclass(frozen=True)
class Shape:
    """What is odd about a certificate: from which day to which it is valid (days from now), and for which address.

    ``authority_days``: another certificate signs it, which is valid until then; None: it is its own authority.
    """

    begin: float = -90
    end: float = 30
    address: str = "127.0.0.1"
    authority_days: float | None = None


def certificate(folder: Path, shape: Shape = Shape()) -> tuple[str, str, str]:
    """Return the files of a certificate, of its key, and of its authority."""
    folder.mkdir(exist_ok=True)

    def make(name: str, end: float, signer: tuple[Any, Any] | None) -> tuple[Any, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(signer[0].subject if signer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=shape.begin))
            .not_valid_after(now + datetime.timedelta(days=end))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(shape.address))]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(signer[1] if signer else key, hashes.SHA256())
        )
        return built, key

    authority = None if shape.authority_days is None else make("authority", shape.authority_days, None)
    built, key = make(shape.address, shape.end, authority)
    files = [folder / name for name in ("cert.pem", "key.pem", "ca.pem")]
    files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files[2].write_bytes((authority or (built,))[0].public_bytes(serialization.Encoding.PEM))
    return str(files[0]), str(files[1]), str(files[2])


class Canned:
    """A TLS server on loopback. ``answer`` is called for each request with the socket and the request's head."""

    def __init__(
        self, folder: Path, answer: Answer, *, broken: int = 0, days: int = 30, shape: Shape | None = None
    ) -> None:
        shape = shape or Shape(end=days)
        self.certfile, keyfile, self.cafile = certificate(folder / f"canned-{abs(hash(shape))}", shape)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certfile, keyfile)
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
        """Close the port."""
        self._listener.close()

    def dates(self) -> dict[str, str]:
        """Return the days on which the certificate begins and ends, and on which its authority ends."""
        own, authority = (
            x509.load_pem_x509_certificate(Path(file).read_bytes()) for file in (self.certfile, self.cafile)
        )
        days = {
            "begin": own.not_valid_before_utc,
            "end": own.not_valid_after_utc,
            "authority_end": authority.not_valid_after_utc,
        }
        return {name: f"{day:%Y-%m-%d}" for name, day in days.items()}

    def client(self, **changes: Any) -> ProxmoxClient:
        """Return a client of this server. ``changes`` replace settings."""
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
