# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Large bodies and answers that many clients hold open: bounded memory, bounded descriptors, healthy clients served."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from support.daemon import Daemon, Make, in_daemon
from support.lab import Lab

KIB = 1024
JSON_HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n\r\n"
FILE = f"/tmp/agentlab-held-open-{os.getpid()}"
FILES = f"/v1/sandboxes/1000/files?path={FILE}"


def start_as_the_unit(make: Make) -> Daemon:
    """Start a daemon with the allocator's settings of the unit: freed memory goes back to the kernel."""
    agentlabd = make(start=False)
    agentlabd.environment.update(MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="131072")
    agentlabd.start()
    return agentlabd


def connect(agentlabd: Daemon) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(agentlabd.socket)
    return client


def descriptors(agentlabd: Daemon) -> int:
    assert agentlabd.process is not None
    return len(os.listdir(f"/proc/{agentlabd.process.pid}/fd"))


def one_length(body: bytes, request: str) -> bytes:
    return f"{request}{JSON_HEAD}Content-Length: 1000000\r\n\r\n".encode() + body


def tiny_chunks(body: bytes, request: str) -> bytes:
    """Return a request whose body comes in chunks of two bytes."""
    parts = (b"2\r\n" + body[at : at + 2] + b"\r\n" for at in range(0, len(body) & ~1, 2))
    return f"{request}{JSON_HEAD}{CHUNKED}".encode() + b"".join(parts)


def one_chunk(body: bytes, request: str) -> bytes:
    return f"{request}{JSON_HEAD}{CHUNKED}".encode() + b"%x\r\n" % 1000000 + body


POST_SANDBOX = "POST /v1/sandboxes HTTP/1.1\r\n"
POST_EXEC = "POST /v1/sandboxes/1000/exec HTTP/1.1\r\n"
PUT_FILE = f"PUT {FILES} HTTP/1.1\r\n"
LARGE = b'{"cmd": "cat", "stdin": "' + b"x" * 900000


class Healthy:
    """A client that asks all the while, and keeps the longest time of an answer in seconds."""

    def __init__(self, agentlabd: Daemon) -> None:
        self.slowest = 0.0
        self.statuses: set[int] = set()
        self._agentlabd = agentlabd
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self.statuses.add(self._agentlabd.get("/v1/sandboxes/1000").status)
            self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.05)

    def __enter__(self) -> Healthy:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(
    "request_bytes",
    [
        one_length(LARGE, POST_EXEC),
        one_chunk(LARGE, POST_SANDBOX),
        tiny_chunks(LARGE[:40000], POST_EXEC),
        one_length(LARGE, PUT_FILE),
        tiny_chunks(LARGE[:40000], PUT_FILE),
    ],
    ids=["exec", "one chunk", "tiny chunks", "file", "file in tiny chunks"],
)
def test_bodies_that_are_never_complete_are_bounded(daemon: Make, lab: Lab, request_bytes: bytes) -> None:
    lab.create("a1")
    agentlabd = start_as_the_unit(daemon)
    agentlabd.good("GET", "/v1/sandboxes")
    before, open_before = agentlabd.rss(), descriptors(agentlabd)
    with contextlib.ExitStack() as stack, Healthy(agentlabd) as healthy:
        for _number in range(60):
            client = stack.enter_context(contextlib.closing(connect(agentlabd)))
            with contextlib.suppress(OSError):
                client.sendall(request_bytes)
        time.sleep(0.5)
        grown = agentlabd.rss() - before
    agentlabd.wait_for(lambda: descriptors(agentlabd) <= open_before + 2, "all descriptors are free again", 30)
    assert healthy.statuses == {200} and healthy.slowest < 20
    assert grown < 30 * KIB
    assert agentlabd.rss() - before < 25 * KIB
    assert "Traceback" not in agentlabd.log(), agentlabd.log()


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        f"{POST_SANDBOX}Host: localhost\r\n{CHUNKED}zz\r\n".encode(),
        f"{POST_SANDBOX}Host: localhost\r\n{CHUNKED}2\r\n{{}}\r\n0\r\n".encode() + b"x: y\r\n" * 2000,
    ],
    ids=["after a request", "no header", "no chunk", "trailers"],
)
def test_what_cannot_be_parsed_is_not_kept(daemon: Make, lab: Lab, beginning: bytes) -> None:
    """aiohttp quotes it in its error, several times over: 1.6 MB for each connection that goes on sending."""
    agentlabd = start_as_the_unit(daemon)
    agentlabd.good("GET", "/v1/sandboxes")
    before = agentlabd.rss()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(connect(agentlabd))) for _number in range(120)]
        for client in clients:
            client.settimeout(0.02)
        for _round in range(12):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall((beginning if not _round else b"") + b"x" * 200000)
        grown = agentlabd.rss() - before
    assert grown < 60 * KIB
    assert agentlabd.get("/v1/healthz").status == 200 and "Traceback" not in agentlabd.log(), agentlabd.log()


def test_clients_that_were_answered_and_go_on_sending_keep_nobody_out(daemon: Make, lab: Lab) -> None:
    agentlabd = start_as_the_unit(daemon)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(connect(agentlabd))) for _number in range(256)]
        for client in clients:
            client.sendall(one_length(b"x" * 1000, "POST /v1/nothing HTTP/1.1\r\n"))
        for client in clients:
            assert client.recv(100).startswith(b"HTTP/1.1 404")
        assert [agentlabd.get("/v1/sandboxes").status for _number in range(3)] == [200] * 3


@pytest.fixture
def with_file(daemon: Make, lab: Lab) -> Iterator[Daemon]:
    """Return a daemon whose sandbox 1000 has a file of 8 MB at FILE of its guest."""
    lab.server.pve.agent_default = True
    lab.create("a1", wait_for_ip=True)
    agentlabd = start_as_the_unit(daemon)
    agentlabd.good("POST", "/v1/sandboxes/1000/exec", {"cmd": f"head -c 8000000 /dev/zero >{FILE}"})
    yield agentlabd
    agentlabd.good("POST", "/v1/sandboxes/1000/exec", {"cmd": f"rm {FILE}"})


def test_a_client_that_leaves_in_the_middle_of_a_file_is_no_error(with_file: Daemon) -> None:
    open_before = descriptors(with_file)
    for _number in range(6):
        with contextlib.closing(connect(with_file)) as client:
            client.settimeout(60)
            client.sendall(f"GET {FILES} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    with_file.wait_for(lambda: descriptors(with_file) <= open_before, "all descriptors are free again", 30)
    assert with_file.get(FILES.replace("held", "no")).status != 503, "no place is taken"
    assert "Traceback" not in with_file.log() and "internal error" not in with_file.log(), with_file.log()


def test_a_client_that_sends_or_takes_a_byte_now_and_then_loses_its_place() -> None:
    """The bound is a minute in the daemon; the same code is run with a fraction of a second."""
    code = """
import asyncio, json, time
from agentlabd.http import spool
spool.STALL_SECONDS, spool.SLOWEST_BYTES = 1.0, 1000

class Slow:
    def __init__(self, part, pause, count):
        self.part, self.pause, self.count = part, pause, count
    async def readany(self):
        await asyncio.sleep(self.pause)
        self.count -= 1
        return self.part if self.count >= 0 else b""

async def receive(*kind):
    began = time.monotonic()
    try:
        with await spool.receive_file(Slow(*kind), lambda seconds: None) as file:
            return len(file.read()), time.monotonic() - began
    except spool.TooSlow as error:
        return str(error), time.monotonic() - began

async def main():
    print(json.dumps(await asyncio.gather(
        receive(b"x", 0.05, 1000), receive(b"x" * 5000, 0.05, 40), receive(b"x", 100, 1),
    )))
asyncio.run(main())
"""
    trickle, quick, silent = in_daemon(code)
    assert trickle[0] == "the file came more slowly than 1000 bytes a second" and trickle[1] < 20
    assert quick[0] == 200000
    assert silent[0] == "nothing of the file came for 1 s"


def test_a_client_that_takes_nothing_of_a_file_is_closed_without_an_answer_in_it(daemon: Make, lab: Lab) -> None:
    code = """
import asyncio, json, tempfile
from aiohttp import web
from agentlabd.http import spool
spool.STALL_SECONDS = 0.5

async def main():
    done = asyncio.Event()
    async def handle(request):
        file = spool.make_file()
        file.write(b"x" * 30000000)
        with file:
            answer = await spool.send_file(request, file, {})
        done.set()
        return answer
    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    path = tempfile.mkdtemp() + "/socket"
    await web.UnixSite(runner, path).start()
    reader, writer = await asyncio.open_unix_connection(path, limit=1000)
    writer.write(b"GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
    await asyncio.wait_for(done.wait(), 60)
    taken = b""
    try:
        while part := await asyncio.wait_for(reader.read(65536), 60):
            taken += part
    except ConnectionError:
        pass
    writer.close()
    await runner.cleanup()
    print(json.dumps([taken.count(b"HTTP/1.1"), len(taken) < 30000000]))
asyncio.run(main())
"""
    assert in_daemon(code) == [1, True]
