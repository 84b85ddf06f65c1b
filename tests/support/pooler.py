# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A pooler before a PostgreSQL server, as pgbouncer is: it drops the settings of a connection's start, and gives its
clients sessions of its own, by session or by transaction.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading

# Requests for encryption, which a client sends before its startup message. The pooler refuses them.
_ENCRYPTION = (80877103, 80877104)
# Messages of a client after which the server says that it is ready for the next query: Query, Sync, FunctionCall.
_ANSWERED = b"QSF"


class Pooler:
    """Listens on a loopback port and logs in to the server as one user. ``mode``: session or transaction."""

    def __init__(self, server_port: int, user: str, mode: str) -> None:
        self._server_port, self._user, self._mode = server_port, user, mode
        self._free: dict[bytes, list[_Stream]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End the pooler and its sessions."""
        self._closed = True
        # An accept that waits ends when the socket is shut down, not when it is closed.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for stream in [stream for streams in self._free.values() for stream in streams]:
                stream.socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _peer = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(_Stream(client),), daemon=True).start()

    def _serve(self, client: _Stream) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(client.socket):
            request = client.read_startup()
            while struct.unpack("!i", request[:4])[0] in _ENCRYPTION:
                client.socket.sendall(b"N")
                request = client.read_startup()
            words = request[4:].split(b"\0")
            database = dict(zip(words[::2], words[1::2], strict=False))[b"database"]
            server = self._take(database)
            # The process and the secret that a client is told are not those of a session of the server.
            client.socket.sendall(
                b"R" + struct.pack("!ii", 8, 0) + server.greeting + b"K" + struct.pack("!iii", 12, 1, 1) + b"Z\0\0\0\5I"
            )
            if self._mode == "transaction":
                self._give_back(database, server)
                self._relay_transactions(client, database)
            else:
                self._relay(client, server, until_idle=False)

    def _relay_transactions(self, client: _Stream, database: bytes) -> None:
        while True:
            select.select([client.socket], [], [])
            server = self._take(database)
            if not self._relay(client, server, until_idle=True):
                return
            self._give_back(database, server)

    def _relay(self, client: _Stream, server: _Stream, *, until_idle: bool) -> bool:
        """Pass messages on, until the transaction is over if ``until_idle``. Return whether the session is usable."""
        waiting, status, sent = 0, b"I", False
        while not (until_idle and sent and waiting == 0 and status == b"I"):
            readable = select.select([client.socket, server.socket], [], [])[0]
            if client.socket in readable:
                for kind, message in client.read_messages():
                    if kind == b"X":
                        server.socket.close()
                        return False
                    sent = True
                    waiting += kind in _ANSWERED
                    server.socket.sendall(message)
            if server.socket in readable:
                for kind, message in server.read_messages():
                    client.socket.sendall(message)
                    if kind == b"Z":
                        waiting, status = waiting - 1, message[5:6]
        return True

    def _take(self, database: bytes) -> _Stream:
        with self._lock:
            if self._free.get(database):
                return self._free[database].pop()
        stream = _Stream(socket.create_connection(("127.0.0.1", self._server_port)))
        body = struct.pack("!i", 196608) + b"user\0" + self._user.encode() + b"\0database\0" + database + b"\0\0"
        stream.socket.sendall(struct.pack("!i", len(body) + 4) + body)
        while True:
            for kind, message in stream.read_messages():
                if kind == b"S":
                    stream.greeting += message
                elif kind == b"Z":
                    return stream

    def _give_back(self, database: bytes, server: _Stream) -> None:
        with self._lock:
            self._free.setdefault(database, []).append(server)


class _Stream:
    """One connection, read message by message."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        # The parameters that the server told when it let us in.
        self.greeting = b""
        self._rest = b""

    def read_startup(self) -> bytes:
        """Return the first message of a client without its length."""
        length = struct.unpack("!i", self._read_exactly(4))[0]
        return self._read_exactly(length - 4)

    def _read_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def read_messages(self) -> list[tuple[bytes, bytes]]:
        """Return the kind and the bytes of each message that is complete."""
        part = self.socket.recv(65536)
        if not part:
            raise EOFError
        self._rest += part
        messages = []
        while len(self._rest) >= 5:
            length = 1 + struct.unpack("!i", self._rest[1:5])[0]
            if len(self._rest) < length:
                break
            messages.append((self._rest[:1], self._rest[:length]))
            self._rest = self._rest[length:]
        return messages
