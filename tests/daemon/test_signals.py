# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Signals to the daemon: its end, reload, a storm of them, a kill in the middle of work."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from support.daemon import CLEANUP_RULES, Make, ask, free_port
from support.lab import Lab


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


def test_a_reload_takes_good_files_and_keeps_the_old_values_over_broken_ones(daemon: Make, tmp_path: Path) -> None:
    one = daemon(metrics_listen=f"127.0.0.1:{free_port()}")

    def status() -> Any:
        return one.good("GET", "/v1/status")

    assert status()["cleanup"]["enabled"] is False and one.metric("agentlab_config_last_reload_successful") == 1
    one.cleanup_file.write_text(CLEANUP_RULES)
    one.reload()
    one.wait_for(lambda: status()["cleanup"]["enabled"], "the rules are in force")
    one.wait_for(lambda: status()["cleanup"]["next_run"], "the next run is planned")
    # A broken file: the old rules stay, and log, status and metric say why.
    one.cleanup_file.write_text(CLEANUP_RULES.replace("TIMEOUT", "TIMEOUTS"))
    one.reload()
    error = one.wait_for(lambda: status()["config"]["error"], "the error is told")
    assert "line 4: states: 'TIMEOUTS' is not valid" in error
    assert error in one.log() and "the old configuration stays in force" in one.log()
    assert one.metric("agentlab_config_last_reload_successful") == 0
    assert status()["cleanup"]["enabled"] is True
    one.cleanup_file.write_text(CLEANUP_RULES.replace("interval: 1h", "mode: shadow"))
    one.write_config(max_ttl="1h", socket=str(tmp_path / "other.sock"))
    one.reload()
    one.wait_for(lambda: status()["cleanup"]["mode"] == "shadow", "the new rules are in force")
    assert status()["config"]["error"] is None and one.metric("agentlab_config_last_reload_successful") == 1
    assert "a change of socket needs a restart" in one.log()
    refused = one.post("/v1/sandboxes", {"name": "a1", "ttl": "2h"})
    assert (refused.status, refused.body["error"]) == (400, "ttl: '2h' is longer than the maximum of 1h")


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
