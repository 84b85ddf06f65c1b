# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""TLS that breaks before, during and after a request: what is known of the request then, and what follows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    OutcomeUnknown,
    Unreachable,
)

from faults.attack_support import marked, two_nodes
from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    with two_nodes(one_lab):
        yield one_lab


class Breaker:
    """A relay before the double that lets a request through and then puts something else in place of the encrypted
    answer.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.armed: bytes | None = None
        self.broken = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.upstream))
            self._open += [client, server]
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                server.sendall(data)
        except OSError:
            pass

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(65536):
                if self.armed is not None:
                    # Armed by the double when it has the request: this is the answer.
                    self.broken += 1
                    client.sendall(self.armed)
                    self.armed = None
                    client.close()
                    return
                client.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()


BREAKS = {
    "plain text": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
    "broken record": b"\x17\x03\x03\x00\x20" + b"x" * 32,
    "alert": b"\x15\x03\x03\x00\x02\x02\x14",
    "half a record": b"\x17\x03\x03\x40\x00abc",
}


@pytest.fixture
def breaker(lab: Lab) -> Iterator[Breaker]:
    made = Breaker(lab.server.port)
    yield made
    made.close()


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("fresh", [True, False])
def test_tls_broken_in_mid_connection_is_an_unknown_outcome(lab: Lab, breaker: Breaker, kind: str, fresh: bool) -> None:
    ours = lab.create()
    ctx = lab.context(api_port=breaker.port)
    if not fresh:
        ctx.client.get("cluster/status")

    def arm(method: str, path: str) -> None:
        breaker.armed = BREAKS[kind] if method == "POST" else None

    lab.pve.before = arm
    with pytest.raises(OutcomeUnknown):
        ctx.client.post(f"nodes/pve1/qemu/{ours.vmid}/status/stop")
    assert breaker.broken == 1
    # And so it was: the request had been carried out (or is, while the connection breaks).
    end = time.monotonic() + 10
    while lab.pve.vm(ours.vmid).status != "stopped" and time.monotonic() < end:
        time.sleep(0.05)
    assert lab.pve.vm(ours.vmid).status == "stopped"


def test_a_port_without_tls_was_certainly_not_asked(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _address = listener.accept()
            client.recv(4096)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(Unreachable):
            lab.context(api_port=listener.getsockname()[1]).client.get("cluster/status")


@pytest.mark.parametrize("kind", sorted(set(BREAKS) - {"half a record"}))
def test_a_clone_whose_answer_broke_in_tls_is_neither_lost_nor_made_twice(
    lab: Lab, breaker: Breaker, kind: str
) -> None:
    def arm(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone"):
            breaker.armed = BREAKS[kind]

    lab.pve.before = arm
    # The clone is looked for at once, and taken up.
    lab.create(options={"api_port": breaker.port})
    assert breaker.broken == 1
    lab.pve.before = breaker.armed = None
    made = lab.create()
    assert made.state == "RUNNING" and marked(lab, made) == [made.vmid] and len(lab.records()) == 1


@pytest.mark.parametrize("kind", BREAKS)
def test_a_clone_that_cannot_be_looked_for_either_is_taken_up_by_the_next_run(
    lab: Lab, breaker: Breaker, kind: str
) -> None:
    cloned = threading.Event()

    def arm(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone"):
            cloned.set()
        breaker.armed = BREAKS[kind] if cloned.is_set() else None

    lab.pve.before = arm
    with pytest.raises(AgentlabError):
        lab.create(options={"api_port": breaker.port})
    # Half a record is a time-out: the request may still be at work, so nothing is looked for.
    assert breaker.broken == 1 if kind == "half a record" else breaker.broken > 1
    lab.pve.before = breaker.armed = None
    time.sleep(1.1)
    made = lab.create()
    assert made.state == "RUNNING" and marked(lab, made) == [made.vmid] and len(lab.records()) == 1
