# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The process: its sockets and who may use them, signals, the service manager, a kill in the middle of work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.daemon import PYTHON, Daemon, ask, free_port
from support.lab import Lab

Make = Callable[..., Daemon]
NOBODY = 65534
RULES = (
    "auto_cleanup:\n  interval: 1h\n  rules:\n"
    "    - {name: timeouts, match: {states: [TIMEOUT]}, after: 1h, action: destroy}\n"
)


def as_nobody(one: Daemon, group: int, method: str, path: str, body: Any = None) -> str:
    """What another user with that group gets: the status, or the name of the error."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        # Only what cannot fail in a strange way: this is a copy of the test's process.
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(NOBODY)
            told = str(one.request(method, path, body).status)
        except BaseException as error:
            told = type(error).__name__
        os.write(write_end, told.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


# ---- who may ask ----


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_socket_is_for_its_group_alone(daemon: Make) -> None:
    one = daemon()
    assert stat.S_IMODE(os.stat(one.socket).st_mode) == 0o660
    assert as_nobody(one, NOBODY, "GET", "/v1/healthz") == "PermissionError"
    assert as_nobody(one, os.getgid(), "GET", "/v1/healthz") == "200"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_actor_of_every_event_is_who_the_kernel_says_it_is(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    one = daemon()
    assert as_nobody(one, os.getgid(), "POST", "/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 300}) == "200"
    assert lab.events(made)[-1]["actor"] == f"nobody (uid {NOBODY}) via API"
    assert f"renew_lease 1000 by nobody (uid {NOBODY}) via API: 1000 renewed" in one.log()


def test_tcp_needs_the_token_and_metrics_need_none(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    lab.create("a1")
    token = tmp_path / "token"
    token.write_text("a-long-token-of-the-tests-77aa\n")
    token.chmod(0o640)
    port, metrics = free_port(), free_port()
    one = daemon(listen=f"127.0.0.1:{port}", listen_token_file=str(token), metrics_listen=f"127.0.0.1:{metrics}")

    def get(path: str, **headers: str) -> Any:
        import http.client

        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            return ask(connection, "GET", path, None, headers)

    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "a-long-token-of-the-tests-77aa"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff\xfe"},
    ):
        answer = get("/v1/sandboxes", **headers)
        assert (answer.status, answer.body["error"]) == (401, "a valid bearer token is required")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert (
        get("/v1/sandboxes", Authorization="Bearer a-long-token-of-the-tests-77aa").body["sandboxes"][0]["vmid"] == 1000
    )
    text = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20).read().decode()
    assert 'agentlab_sandboxes{state="RUNNING"} 1.0' in text
    assert "a-long-token" not in one.log() + text


def test_a_reload_takes_the_new_token_and_refuses_a_file_that_cannot_be_used(daemon: Make, tmp_path: Path) -> None:
    old, new = "the-old-token-of-the-tests-0001", "the-new-token-of-the-tests-0002"
    token = tmp_path / "token"
    token.write_text(old)
    token.chmod(0o640)
    port = free_port()
    one = daemon(listen=f"127.0.0.1:{port}", listen_token_file=str(token))

    def status(value: str) -> int:
        import http.client

        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            return ask(connection, "GET", "/v1/sandboxes", None, {"Authorization": f"Bearer {value}"}).status

    assert (status(old), status(new)) == (200, 401)
    token.write_text(new)
    one.reload()
    one.wait_for(lambda: status(new) == 200, "the new token is in force")
    assert status(old) == 401
    # Each of these is told, and the token before it stays in force.
    fifo, other = tmp_path / "fifo", tmp_path / "other"
    os.mkfifo(fifo, 0o600)
    other.write_text("third-token-of-the-tests-000003")
    other.chmod(0o600)
    token.chmod(0o644)
    for path, problem in (
        (token, "can be read by every user"),
        (tmp_path / "none", "No such file or directory"),
        (fifo, "must hold one token"),
    ):
        one.write_config(listen_token_file=str(path))
        one.reload()
        error = one.wait_for(lambda: one.good("GET", "/v1/status")["config"]["error"], "the error is told")
        one.wait_for(
            lambda wanted=problem: wanted in (one.good("GET", "/v1/status")["config"]["error"] or ""),
            f"it says {problem}",
        )
        assert str(error).startswith("listen_token_file: ")
        assert (status(new), status(old)) == (200, 401)
    one.write_config(listen_token_file=str(other))
    one.reload()
    one.wait_for(lambda: status("third-token-of-the-tests-000003") == 200, "another file is taken")
    assert old not in one.log() and new not in one.log()


def test_the_last_line_of_a_daemon_that_cannot_start_says_what_to_do(daemon: Make, tmp_path: Path) -> None:
    """systemd gives up after some of these: the end of the journal is all that an operator has."""
    one = daemon(start=False, listen="127.0.0.1:9820", listen_token_file=str(tmp_path / "none"))
    ended = subprocess.run(one.command(), env=one.environment, capture_output=True, text=True, timeout=30, check=False)
    cause, last = ended.stderr.splitlines()[-2:]
    assert (
        ended.returncode == 1
        and "Error: listen_token_file: " in cause
        and "agentlabd ends; the lines before say why" in last
    )
    assert "systemctl reset-failed agentlabd" in last


def test_a_scrape_that_fails_says_why_here_and_there(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    lab.create("a1")
    metrics = free_port()
    one = daemon(metrics_listen=f"127.0.0.1:{metrics}")
    with contextlib.closing(sqlite3.connect(lab.database)) as conn:
        conn.execute("ALTER TABLE sandboxes RENAME TO elsewhere")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20)
    with contextlib.closing(sqlite3.connect(lab.database)) as conn:
        conn.execute("ALTER TABLE elsewhere RENAME TO sandboxes")
    said = refused.value.read().decode()
    assert refused.value.code == 503 and "no such table" in said and "Traceback" not in said
    assert f"metrics: {said.strip()}" in one.log() and "Traceback" not in one.log()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"listen": "0.0.0.0:9820"}, "listen: '0.0.0.0:9820' is not valid. Valid: a loopback address and a port"),
        ({"metrics_listen": "192.0.2.1:9820"}, "metrics_listen: '192.0.2.1:9820' is not valid"),
        ({"listen": "127.0.0.1:9820"}, "listen_token_file: missing, but listen is set"),
        ({"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/open"}, "can be read by every user"),
        (
            {"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/short"},
            "must hold one token of at least 16 characters",
        ),
        ({"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/long"}, "and at most 4096"),
        (
            {"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/none"},
            "listen_token_file: {tmp}/none: No such file or directory",
        ),
        ({"sokcet": "/run/x"}, "has the unknown key 'sokcet'"),
        ({"expire_interval": "0s"}, "expire_interval: '0s' is zero"),
    ],
)
def test_check_refuses_what_the_start_would_refuse(
    daemon: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    for name, mode, text in (("open", 0o644, "x" * 40), ("short", 0o600, "x"), ("long", 0o600, "x" * 4097)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    one = daemon(start=False, **{name: value.replace("{tmp}", str(tmp_path)) for name, value in options.items()})
    for more in (["--check"], []):
        done = subprocess.run(
            one.command(*more), env=one.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 1 and words.replace("{tmp}", str(tmp_path)) in done.stderr, done
        assert "Traceback" not in done.stderr


def test_check_of_good_files_and_of_rules_that_are_not_in_place_yet(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    one = daemon(start=False, cleanup=RULES)
    done = subprocess.run(
        one.command("--check"), env=one.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "agentlabd: the configuration can be used\n")
    assert not os.path.exists(lab.database), "a check opens no database"
    other = tmp_path / "new.yaml"
    other.write_text(RULES.replace("action", "aktion"))
    done = subprocess.run(
        one.command("--check", "--cleanup-file", str(other)),
        env=one.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1 and "line 4: unknown key 'aktion'" in done.stderr
    version = subprocess.run(
        [PYTHON, "-m", "agentlabd", "--version"],
        env=one.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert version.stdout.startswith("agentlabd 1.")


def test_one_socket_has_one_daemon_and_a_killed_one_leaves_no_obstacle(daemon: Make) -> None:
    first = daemon()
    second = subprocess.run(
        first.command(), env=first.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode == 1 and "is served by another agentlabd" in second.stderr
    assert first.good("GET", "/v1/healthz") == {"status": "ok"}
    first.kill()
    assert os.path.exists(first.socket)
    assert first.start().good("GET", "/v1/healthz") == {"status": "ok"}


# ---- many at once ----


def test_two_clients_destroy_the_same_sandbox(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: one.post("/v1/sandboxes/1000/destroy", {"force": True}), range(2)))
    assert [answer.status for answer in both] == [200, 200]
    assert sorted(answer.body["changed"] for answer in both) == [False, True]
    assert len([request for request in lab.pve.requests if request[0] == "DELETE"]) == 1


def test_hundreds_of_requests_at_once(daemon: Make, lab: Lab) -> None:
    for number in range(4):
        lab.create(f"a{number}")
    one = daemon()
    paths = ["/v1/sandboxes", "/v1/status", "/v1/sandboxes/1001", "/v1/sandboxes/1002/events"]

    def work(number: int) -> int:
        if number % 10 == 9:
            return one.post("/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 300 + number}).status
        return one.get(paths[number % 4]).status

    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(work, range(400)))
    assert set(found) == {200}


def test_a_slow_proxmox_holds_up_no_list(daemon: Make, lab: Lab) -> None:
    for number in range(3):
        lab.create(f"a{number}")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    release = threading.Event()
    waiting = threading.Event()

    async def hold(method: str, path: str) -> None:
        if method == "DELETE":
            import asyncio

            waiting.set()
            while not release.is_set():
                await asyncio.sleep(0.01)

    lab.pve.before = hold
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(one.post, "/v1/sandboxes/1000/destroy", {"force": True})
        assert waiting.wait(10)
        took = []
        for _attempt in range(20):
            began = time.monotonic()
            assert one.get("/v1/sandboxes").status == 200
            took.append(time.monotonic() - began)
        assert one.get("/v1/status").body["operations"]["in_progress"] == 1
        assert one.post("/v1/sandboxes/1001/lease/renew", {"ttl_minutes": 300}).status == 200
        assert not slow.done()
        release.set()
        assert slow.result(20).status == 200
    # Generous for a loaded machine: waiting for Proxmox would have taken for ever.
    assert sorted(took)[10] < 0.5, took


def test_a_kept_alive_connection_serves_many_requests(daemon: Make) -> None:
    one = daemon()
    with contextlib.closing(one.connection()) as connection:
        for _attempt in range(5):
            assert ask(connection, "GET", "/v1/healthz").status == 200
            assert connection.sock is not None


# ---- signals ----


def test_sigterm_lets_what_is_under_way_end_and_begins_nothing_new(daemon: Make, lab: Lab) -> None:
    for number in range(12):
        lab.create(f"a{number}")
    lab.pve.real_secs["qmdestroy"] = 1.0
    one = daemon(connections=4)
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    with ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(one.post, "/v1/sandboxes/destroy", {"vmids": list(range(1000, 1012)), "force": True})
        one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"] >= 1, "the first delete was sent")
        assert one.stop() == 0
        answer = bulk.result(20)
    assert answer.status == 207
    by_reason = {item["vmid"]: item["reason"] for item in answer.body["results"] if item["failed"]}
    assert by_reason and set(by_reason.values()) == {"stopping"}
    states = {record.vmid: record.state for record in lab.records()}
    for item in answer.body["results"]:
        assert states[item["vmid"]] == ("RUNNING" if item["failed"] else "DESTROYED")
    assert lab.leftovers() == {"claims": [], "operations": []}, "nothing is left to be finished"
    assert not os.path.exists(one.socket)


def test_a_request_that_is_never_sent_to_its_end_holds_up_no_stop(daemon: Make) -> None:
    one = daemon(stop_timeout="2s")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as half:
        half.connect(one.socket)
        half.sendall(
            b"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
            b"100\r\n\r\n{"
        )
        assert one.get("/v1/healthz").status == 200
        began = time.monotonic()
        assert one.stop() == 0
        assert time.monotonic() - began < 10
    assert not os.path.exists(one.socket) and one.log().rstrip().endswith("agentlabd stopped")


def test_no_storm_of_signals_hides_the_one_that_ends_it(daemon: Make, lab: Lab) -> None:
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    for _time in range(20000):
        one.reload()
    assert one.stop() == 0
    assert one.log().rstrip().endswith("agentlabd stopped")
    assert "Exception" not in one.log()


def test_signals_that_come_while_it_ends_do_not_kill_it(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    assert one.process is not None
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) * 2000:
        if one.process.poll() is not None:
            break
        one.signal(number)
        time.sleep(0.002)
    assert one.stop() == 0
    assert one.log().rstrip().endswith("agentlabd stopped")


def test_what_does_not_end_in_time_is_abandoned_and_taken_up_by_the_next_start(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.pve.real_secs["qmdestroy"] = 4.0
    one = daemon(stop_timeout="1s")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")

    def ask_and_be_left() -> None:
        with contextlib.suppress(OSError, Exception):
            one.post("/v1/sandboxes/1000/destroy", {"force": True})

    client = threading.Thread(target=ask_and_be_left)
    client.start()
    one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"], "the delete was sent")
    began = time.monotonic()
    assert one.stop() == 0
    assert time.monotonic() - began < 4
    client.join(10)
    assert (
        "stopping: destroy_sandbox 1000 did not end within stop_timeout; what was begun is journaled, the next start "
        "takes it up" in one.log()
    )
    assert [entry["kind"] for entry in lab.leftovers()["operations"]] == ["destroy"]
    one.start()
    one.wait_for(lambda: lab.record(1000).state == "DESTROYED", "the next start finishes the destroy", 20)
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_what_waits_for_a_thread_is_answered_when_the_daemon_stops_and_was_not_begun(daemon: Make, lab: Lab) -> None:
    for number in range(3):
        lab.create(f"a{number}")
    lab.pve.real_secs["qmdestroy"] = 4.0
    one = daemon(connections=1, stop_timeout="1s")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(one.post, "/v1/sandboxes/1000/destroy", {"force": True})
        one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"], "the delete was sent")
        waiting = [pool.submit(one.post, f"/v1/sandboxes/{vmid}/destroy", {"force": True}) for vmid in (1001, 1002)]
        one.wait_for(lambda: one.get("/v1/healthz").status == 200, "they wait")
        time.sleep(0.5)
        assert one.stop() == 0
        for asked in waiting:
            answer = asked.result(20)
            assert (answer.status, answer.body["code"]) == (503, "stopping"), answer
        with contextlib.suppress(OSError, Exception):
            first.result(20)
    assert (
        "stopping: destroy_sandbox 1000 did not end within stop_timeout" in one.log() and "Traceback" not in one.log()
    )
    assert [entry["kind"] for entry in lab.leftovers()["operations"]] == ["destroy"]
    assert [lab.record(vmid).state for vmid in (1001, 1002)] == ["RUNNING", "RUNNING"]


def test_the_doctor_comes_also_when_all_threads_wait(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.pve.real_secs["qmdestroy"] = 5.0
    one = daemon(connections=1)
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    with ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(one.post, "/v1/sandboxes/1000/destroy", {"force": True})
        one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"], "the delete was sent")
        assert one.get("/v1/doctor").body["findings"] and not bulk.done()
        assert bulk.result(20).status == 200


def test_a_start_that_fails_leaves_no_socket(daemon: Make) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        one = daemon(start=False, metrics_listen=where)
        found = subprocess.run(
            one.command(), env=one.environment, capture_output=True, text=True, timeout=30, check=False
        )
    assert (
        found.returncode != 0
        and f"metrics_listen: {where}: Address already in use; give another address or port" in found.stderr
    ), found
    assert not os.path.exists(one.socket)


def test_the_log_says_what_was_asked(daemon: Make, lab: Lab) -> None:
    one = daemon()
    one.post("/v1/sandboxes", {"name": "a1"})
    one.post("/v1/workspaces", {"name": "w1", "size": "1G", "storage": "local-lvm"})
    one.post("/v1/workspaces/w1/attach", {"vmid": 1000})
    one.post("/v1/sandboxes/destroy", {"vmids": [1000, 1999], "force": True})
    one.post("/v1/cleanup/freeze", {"reason": "the storage is being moved"})
    one.post("/v1/sandboxes/reconcile", {"apply": True})
    for line in (
        'create_sandbox name="a1" by ',
        'create_workspace name="w1" by ',
        "attach_workspace w1 vmid=1000 by ",
        "destroy_sandboxes 1000 1999 force=true by ",
        'freeze_cleanup reason="the storage is being moved" by ',
        "reconcile_sandboxes apply=true by ",
    ):
        assert line in one.log(), line


def test_a_kill_in_the_middle_of_a_bulk_destroy_converges(daemon: Make, lab: Lab) -> None:
    for number in range(10):
        lab.create(f"a{number}")
    lab.pve.real_secs["qmdestroy"] = 0.5
    foreign = lab.swap(1009)
    one = daemon(connections=4)
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")

    def ask_and_be_left() -> None:
        with contextlib.suppress(Exception):
            one.post("/v1/sandboxes/destroy", {"vmids": list(range(1000, 1009)), "force": True})

    client = threading.Thread(target=ask_and_be_left)
    client.start()
    one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"] >= 2, "deletes were sent")
    one.kill()
    client.join(10)
    left = lab.leftovers()["operations"]
    assert left, "the kill came in the middle of something"
    one.start()
    one.wait_for(lambda: not lab.leftovers()["operations"], "the next start finishes what was begun", 20)
    # What the killed run had begun is gone, what it had not begun is as it was.
    begun = {entry["sandbox_uuid"] for entry in left}
    for record in lab.records():
        if record.uuid in begun:
            assert record.state == "DESTROYED"
    again = one.good("POST", "/v1/sandboxes/destroy", {"vmids": list(range(1000, 1009)), "force": True})
    assert again["failed_count"] == 0
    assert {record.state for record in lab.records() if record.vmid != 1009} == {"DESTROYED"}
    lab.untouched(foreign)


def test_reload_good_and_broken(daemon: Make, tmp_path: Path) -> None:
    one = daemon(metrics_listen=f"127.0.0.1:{free_port()}")

    def status() -> Any:
        return one.good("GET", "/v1/status")

    assert status()["cleanup"]["enabled"] is False and one.metric("agentlab_config_last_reload_successful") == 1
    one.cleanup_file.write_text(RULES)
    one.reload()
    one.wait_for(lambda: status()["cleanup"]["enabled"], "the rules are in force")
    one.wait_for(lambda: status()["cleanup"]["next_run"], "the next run is planned")
    # A broken file: the old rules stay, and log, status and metric say why.
    one.cleanup_file.write_text(RULES.replace("TIMEOUT", "TIMEOUTS"))
    one.reload()
    error = one.wait_for(lambda: status()["config"]["error"], "the error is told")
    assert "line 4: states: 'TIMEOUTS' is not valid" in error
    assert error in one.log() and "the old configuration stays in force" in one.log()
    assert one.metric("agentlab_config_last_reload_successful") == 0
    assert status()["cleanup"]["enabled"] is True
    one.cleanup_file.write_text(RULES.replace("interval: 1h", "mode: shadow"))
    one.write_config(max_ttl="1h", socket=str(tmp_path / "other.sock"))
    one.reload()
    one.wait_for(lambda: status()["cleanup"]["mode"] == "shadow", "the new rules are in force")
    assert status()["config"]["error"] is None and one.metric("agentlab_config_last_reload_successful") == 1
    assert "a change of socket needs a restart" in one.log()
    refused = one.post("/v1/sandboxes", {"name": "a1", "ttl": "2h"})
    assert (refused.status, refused.body["error"]) == (400, "ttl: '2h' is longer than the maximum of 1h")


# ---- the service manager ----


def test_what_the_service_manager_is_told(daemon: Make, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        path = f"/tmp/agentlabd-notify-{os.getpid()}-{id(manager)}"
        manager.bind(path)
        manager.settimeout(20)
        try:
            one = daemon(start=False)
            one.start(NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
            heard: list[str] = []

            def hear(word: str) -> str:
                while True:
                    text = manager.recv(4096).decode()
                    heard.append(text)
                    if word in text:
                        return text

            assert f"STATUS=serving {one.socket}" in hear("READY=1")
            hear("WATCHDOG=1")
            hear("WATCHDOG=1")
            one.reload()
            assert "MONOTONIC_USEC=" in hear("RELOADING=1")
            hear("READY=1")
            one.write_config(nonsense=1)
            one.reload()
            hear("RELOADING=1")
            assert "not reloaded" in hear("READY=1")
            one.signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert one.stop() == 0
        finally:
            os.unlink(path)


def test_the_log_has_priorities_when_it_goes_to_the_journal(daemon: Make) -> None:
    one = daemon(start=False)
    one.log_file.touch()
    found = one.log_file.stat()
    one.start(JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    one.write_config(nonsense=1)
    one.reload()
    one.wait_for(lambda: "not reloaded" in one.log(), "the broken file is told")
    lines = one.log().splitlines()
    assert lines[0].startswith("<6>agentlabd 1."), lines
    assert lines[-1].startswith("<3>not reloaded")


def test_no_secret_is_told(daemon: Make, lab: Lab) -> None:
    from support.double import TOKEN_SECRET

    lab.create("a1")
    one = daemon(environment={"PROXMOX_TOKEN_SECRET": TOKEN_SECRET + "-wrong"})
    answer = one.post("/v1/sandboxes/1000/stop")
    assert answer.status == 502 and answer.body["code"] == "proxmox_access"
    told = json.dumps([answer.body, one.good("GET", "/v1/status")]) + one.log()
    assert TOKEN_SECRET not in told
    assert "refuses the credentials" in told
    assert one.process is not None
    assert TOKEN_SECRET not in Path(f"/proc/{one.process.pid}/cmdline").read_text()
