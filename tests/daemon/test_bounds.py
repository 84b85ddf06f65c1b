# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bounds: clients that hold connections, send half of something, or very much, stop neither the daemon's work nor
other clients.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import select
import shutil
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from support.daemon import Daemon, Make, ask, free_port
from support.lab import Lab

HALF = b"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def enough_descriptors() -> Iterator[None]:
    """This process holds the client's end of all those connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 4096), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def with_descriptors(one: Daemon, count: int) -> Daemon:
    """Start it with that many descriptors, as LimitNOFILE does."""
    ordinary = one.command
    one.command = lambda *arguments: ["prlimit", f"--nofile={count}:{count}", *ordinary(*arguments)]  # type: ignore[method-assign]
    return one.start()


def connect(one: Daemon, option: str = "socket") -> socket.socket:
    if option == "socket":
        made = socket.socket(socket.AF_UNIX)
        made.connect(one.socket)
    else:
        host, _colon, port = one.options[option].rpartition(":")
        made = socket.create_connection((host, int(port)), 20)
    made.settimeout(90)
    return made


def flood(one: Daemon, option: str, count: int, what: bytes, held: contextlib.ExitStack) -> list[socket.socket]:
    """So many connections that send this and no more; those that are refused or cut off are none of its failures."""
    made = []
    for _number in range(count):
        client = held.enter_context(contextlib.closing(connect(one, option)))
        made.append(client)
        with contextlib.suppress(OSError):
            client.sendall(what)
    return made


def read_all(client: socket.socket) -> bytes:
    """What the daemon sends until it ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def refusal(raw: bytes) -> tuple[int, str]:
    """Status and word of an answer."""
    head, _blank, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), str(json.loads(body)["code"])


@pytest.mark.parametrize(
    "option, half",
    [
        ("metrics_listen", b""),
        ("metrics_listen", b"GET /metrics HTTP/1.1\r\nX"),
        ("socket", b""),
        ("socket", HALF),
        ("listen", HALF),
    ],
    ids=["idle scrapes", "half scrapes", "idle", "half heads", "half heads over TCP"],
)
def test_a_flood_of_connections_stops_no_work_and_no_other_client(
    daemon: Make, lab: Lab, tmp_path: Any, option: str, half: bytes
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    lab.create("a1", ttl=6)
    one = with_descriptors(
        daemon(
            start=False,
            metrics_listen=f"127.0.0.1:{free_port()}",
            listen=f"127.0.0.1:{free_port()}",
            listen_token_file=str(token),
            connections=4,
        ),
        400,
    )
    with contextlib.ExitStack() as held:
        flood(one, option, 700, half, held)
        assert one.get("/v1/healthz").status == 200
        one.wait_for(lambda: lab.record(1000).state == "TIMEOUT", "the lease ends on time", 30)
        one.wait_for(lambda: lab.pve.vm(1000).status == "stopped", "its VM is stopped", 30)
        assert one.metric('agentlab_leases_total{result="expired"}') == 1
        assert one.get("/v1/sandboxes/1000").status == 200
    assert "cannot be reached" not in one.log() and "descriptor" not in one.log(), one.log()
    assert len(one.log().splitlines()) < 20, one.log()


def test_each_part_of_a_request_has_its_time(daemon: Make) -> None:
    """The head ten seconds, the body thirty, nothing at all ten; a connection that is kept alive between requests
    has a minute.
    """
    one = daemon()
    began = time.monotonic()
    with contextlib.ExitStack() as held:
        silent, head, body, kept = (held.enter_context(contextlib.closing(connect(one))) for _number in range(4))
        head.sendall(HALF)
        body.sendall(HALF + b"Content-Length: 100\r\n\r\n{")
        kept.sendall(b"GET /v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        # A byte now and then is no progress.
        head.settimeout(1)
        told = b""
        while not told and time.monotonic() - began < 60:
            try:
                told = head.recv(65536)
            except TimeoutError:
                head.sendall(b"X")
        assert refusal(told) == (408, "too_slow")
        assert read_all(silent) == b""
        assert 9 < time.monotonic() - began < 25
        assert refusal(read_all(body)) == (408, "too_slow")
        assert 29 < time.monotonic() - began < 50
        kept.sendall(b"GET /v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
    assert one.get("/v1/healthz").status == 200 and "Traceback" not in one.log()


def test_large_bodies_that_are_held_open_are_bounded_together(daemon: Make) -> None:
    one = daemon()
    one.get("/v1/sandboxes")
    before = one.rss()
    with contextlib.ExitStack() as held:
        clients = flood(one, "socket", 40, HALF + b"Content-Length: 1000000\r\n\r\n", held)
        for client in clients:
            client.settimeout(5)
            with contextlib.suppress(OSError):
                client.sendall(b"x" * 900000)
        refused = 0
        for client in clients:
            client.settimeout(0.2)
            try:
                refused += refusal(client.recv(65536)) == (503, "too_much")
            except (TimeoutError, ConnectionError, IndexError):
                continue
        assert refused >= 25, "eight of them fit"
        assert one.rss() - before < 30 * 1024
        # Small ones pass all the while.
        assert one.post("/v1/sandboxes/1999/stop").status == 404
        assert one.post("/v1/sandboxes/destroy", {"vmids": [1999]}).status == 404
    one.wait_for(lambda: one.post("/v1/sandboxes", {"name": "x" * 500000}).status == 400, "a large one is taken again")


def test_two_hundred_clients_that_are_answered_at_the_same_time_are_all_answered(daemon: Make) -> None:
    one = daemon()
    with contextlib.ExitStack() as held:
        clients = flood(one, "socket", 200, b"GET /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\n", held)
        for client in clients:
            client.sendall(b"\r\n")
        assert {client.recv(65536).split()[1] for client in clients} == {b"200"}


def test_answers_that_nobody_reads_are_bounded_together(daemon: Make, lab: Lab) -> None:
    """Sixty clients leave two megabytes each; those who read get theirs whole."""
    lab.create("a1")
    tags = json.dumps([f"tag-{number}-" + "x" * 40 for number in range(16)])
    columns = "uuid, vmid, name, state, tags, lease_expires_at, created_at, updated_at, state_changed_at"
    now = int(time.time())
    with contextlib.closing(sqlite3.connect(lab.database)) as records:
        records.executemany(
            f"INSERT INTO sandboxes ({columns}) VALUES (?, ?, ?, 'RUNNING', ?, ?, ?, ?, ?)",
            [(str(uuid.uuid4()), vmid, f"b{vmid}", tags, now + 9999, now, now, now) for vmid in range(200000, 202000)],
        )
        records.commit()
    one = daemon(start=False)
    # As the unit has it: what is freed goes back to the kernel.
    one.environment.update(MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="131072")
    one.start()
    for _time in range(3):
        assert len(one.good("GET", "/v1/sandboxes")["sandboxes"]) == 2001
    before = one.rss()
    with contextlib.ExitStack() as held:
        clients = flood(one, "socket", 60, b"GET /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4, held)
        # A request that is made later is answered later: those sixty have their answers by then.
        for _time in range(5):
            assert len(one.good("GET", "/v1/sandboxes")["sandboxes"]) == 2001
        time.sleep(1.5)
        one.good("GET", "/v1/sandboxes")
        grown = one.rss() - before
        poll = select.poll()
        for client in clients:
            poll.register(client, 0)
        ended = sum(1 for _client, events in poll.poll(0) if events & select.POLLHUP)
    assert ended >= 35, f"33554432 bytes are the answers of some 18 clients; {60 - ended} hold theirs"
    assert grown < 110 * 1024, f"{grown} KiB"
    assert "Traceback" not in one.log(), one.log()


def test_a_head_that_never_ends_is_refused_for_its_size(daemon: Make) -> None:
    one = daemon()
    with contextlib.closing(connect(one)) as client:
        client.sendall(HALF)
        with contextlib.suppress(OSError):
            for number in range(200):
                client.sendall(b"X-%d: %s\r\n" % (number, b"a" * 4000))
        assert refusal(read_all(client))[0] in (400, 431)
    assert one.get("/v1/healthz").status == 200


@pytest.mark.parametrize(
    "sent",
    [HALF, HALF + b"Content-Length: 100\r\n\r\n{", HALF + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"],
    ids=["in the head", "in the body", "in a chunk"],
)
def test_a_client_that_breaks_off_is_no_error(daemon: Make, sent: bytes) -> None:
    one = daemon()
    for _time in range(20):
        with contextlib.closing(connect(one)) as client:
            client.sendall(sent)
            time.sleep(0.02)
    assert one.get("/v1/healthz").status == 200
    assert len(one.log().splitlines()) == 1, one.log()


def test_a_body_that_arrives_in_one_piece_with_its_head_may_be_large(daemon: Make) -> None:
    one = daemon()
    body = json.dumps({"name": "x" * 700000}).encode()
    with contextlib.closing(connect(one)) as client:
        client.sendall(HALF + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
        # The same connection goes on.
        client.sendall(b"GET /v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 2:
            part = client.recv(65536)
            assert part, answers
            answers += part


@pytest.mark.parametrize(
    "body, words",
    [
        (b"[" * 300000, "more than 16 deep"),
        (b'{"a":' * 100000, "more than 16 deep"),
        (b'{"vmids": ' + b"[" * 17 + b"]" * 17 + b"}", "more than 16 deep"),
        (b"[" + b"{}," * 340000 + b"{}]", "holds more than 20000 values"),
        (b'{"vmids": [' + b"1," * 500000 + b"1]}", "holds more than 20000 values"),
        # A text without an end is read once, however many quotes and backslashes it has.
        (b'{"name": "' + b'\\"' * 500000, "not valid JSON"),
        ('{"vmids": []}'.encode("utf-16"), "not valid JSON"),
        (b'{"name": "\xff"}', "not valid JSON"),
    ],
    ids=["lists", "objects", "a little too deep", "many objects", "many numbers", "no end", "UTF-16", "no text"],
)
def test_a_body_beyond_the_bounds_of_json_is_refused(daemon: Make, body: bytes, words: str) -> None:
    one = daemon()
    before = one.rss()
    began = time.monotonic()
    refused = one.request("POST", "/v1/sandboxes/destroy", body)
    assert refused.status == 400 and words in refused.body["error"], refused
    assert time.monotonic() - began < 10 and one.rss() - before < 16 * 1024
    # Brackets within a text are counted by nobody.
    assert one.post("/v1/cleanup/freeze", {"reason": "[" * 100 + '\\"{' * 10}).status == 200


def test_requests_that_change_nothing_do_not_fill_the_log(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    with contextlib.closing(one.connection()) as connection:
        for _number in range(300):
            assert ask(connection, "POST", "/v1/sandboxes/1009/destroy").status == 404
    assert one.log().count("destroy_sandbox 1009") == 60, one.log()
    # What changes something is always told.
    assert one.post("/v1/sandboxes/1000/stop").status == 200
    assert "stop_sandbox 1000" in one.log()


# ---- the socket's file, the metrics' host, the log ----


def test_a_socket_that_is_deleted_is_made_anew(daemon: Make) -> None:
    one = daemon()
    os.unlink(one.socket)
    one.wait_for(one.serving, "it serves at the same path again")
    one.wait_for(lambda: f"{one.socket} was deleted; it was made anew" in one.log(), "the log says so")
    assert oct(os.stat(one.socket).st_mode)[-3:] == "660"
    assert one.stop() == 0 and not os.path.exists(one.socket)


@pytest.mark.parametrize("back", [True, False], ids=["it comes back", "it is made anew"])
def test_a_socket_whose_folder_was_away_serves_again(daemon: Make, back: bool) -> None:
    """Nothing can be made in a folder that is not there; the daemon tries again until it can."""
    agentlabd = daemon()
    folder = os.path.dirname(agentlabd.socket)
    away = f"{folder}.away"
    os.rename(folder, away)
    try:
        agentlabd.wait_for(lambda: "cannot be made anew" in agentlabd.log(), "the daemon misses it", 40)
    finally:
        if back:
            os.rename(away, folder)
        else:
            os.mkdir(folder, 0o755)

    def serves() -> bool:
        with contextlib.suppress(OSError):
            return agentlabd.get("/v1/healthz").status == 200
        return False

    agentlabd.wait_for(serves, "it serves again", 40)
    if not back:
        shutil.rmtree(away)


def test_what_somebody_else_put_in_the_place_of_the_socket_is_told_and_left_alone(daemon: Make) -> None:
    one = daemon()
    os.unlink(one.socket)
    with open(one.socket, "w", encoding="ascii") as file:
        file.write("mine")
    one.wait_for(lambda: "something else was put in its place" in one.log(), "the log says so")
    time.sleep(3)
    assert one.log().count("something else was put in its place") == 1
    assert one.stop() == 0
    with open(one.socket, encoding="ascii") as file:
        assert file.read() == "mine"


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("localhost", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example", 421),
    ],
)
def test_metrics_are_told_to_who_asks_this_host(daemon: Make, host: str, status: int) -> None:
    port = free_port()
    one = daemon(metrics_listen=f"127.0.0.1:{port}")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/metrics", headers={"Host": host.format(port=port)})
        answer = connection.getresponse()
        assert answer.status == status
        assert (b"agentlab_sandboxes" in answer.read()) == (status == 200)
    assert one.get("/v1/healthz").status == 200


def test_no_control_character_reaches_the_log(daemon: Make, lab: Lab) -> None:
    one = daemon()
    one.post("/v1/cleanup/freeze", {"reason": "red \x1b[31m, bell \x07, reversed \u202e, hidden \u200b"})
    lab.timed_out("a1", stopped=False)
    lab.pve.vm(1000).config["description"] = "x"
    lab.pve.vm(1000).config["name"] = "evil\x1b]0;title\x07\u202ename"
    told = json.dumps(one.post("/v1/sandboxes/1000/destroy", {"force": True}).body, ensure_ascii=False)
    told += one.get("/v1/%1b%5b31m%07%e2%80%ae%e2%80%8bx").body["error"]
    one.wait_for(lambda: "destroy_sandbox 1000" in one.log(), "it is told")
    for text in (one.log(), json.loads(json.dumps(told))):
        assert not [char for char in text if char in "\x1b\x07\u202e\u200b"], text
