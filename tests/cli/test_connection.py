# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A daemon that gives no usable answer: not running, not permitted, another release, nonsense, too late."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import PYTHON, ROOT, StandIn, agentlab, environment, start


def check_unreachable(found: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr.startswith("Error: ")
    assert "Traceback" not in found.stderr
    for part in parts:
        assert part in found.stderr


def test_a_daemon_that_does_not_run_is_told_with_the_commands_to_start_it(short_path: Path) -> None:
    what_to_do = ("systemctl status agentlabd", "systemctl start agentlabd", "journalctl -u agentlabd")
    check_unreachable(
        agentlab("sandbox", "list", socket=short_path / "none.sock"),
        "the daemon is not running: there is no socket",
        *what_to_do,
    )
    stand_in = StandIn(short_path / "d.sock").__enter__()
    (short_path / "d.sock").rename(short_path / "left.sock")
    stand_in.__exit__()
    check_unreachable(
        agentlab("sandbox", "list", socket=short_path / "left.sock"),
        "the daemon is not running: nothing listens",
        *what_to_do,
    )


def test_the_option_wins_over_the_environment(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": []})
    for args in (["--socket", daemon.path, "sandbox", "list"], ["sandbox", "list", "--socket", daemon.path]):
        assert agentlab(*args, socket="/nonexistent").returncode == 0
    check_unreachable(agentlab("status", env={"AGENTLAB_SOCKET": ""}), "/run/agentlab/agentlabd.sock")


def test_a_socket_that_refuses_the_user_is_told_with_its_group(daemon: StandIn, short_path: Path) -> None:
    """Asked by another user, as the mode of the socket is meant to refuse."""
    if os.geteuid() != 0:
        daemon.path.chmod(0o000)
        found = agentlab("sandbox", "list", socket=daemon.path)
    else:
        # The checkout may lie where that user may not look: the code is copied.
        short_path.chmod(0o755)
        daemon.path.chmod(0o660)
        shutil.copytree(ROOT / "roles/agentlabd/files/agentlab_cli", short_path / "agentlab_cli")
        code = (
            "import os, sys, agentlab_cli.app as app, http.client; import agentlab_cli.text, agentlab_cli.client, "
            "encodings.idna; os.setgroups([]); os.setgid(65534); os.setuid(65534); app.main()"
        )
        found = subprocess.run(
            [PYTHON, "-c", code, "sandbox", "list"],
            capture_output=True,
            text=True,
            check=False,
            env={**environment(daemon.path), "PYTHONPATH": str(short_path)},
        )
    check_unreachable(found, "may not use the socket", "sudo usermod -aG agentlab", "log in again")
    assert daemon.asked == []


def test_a_path_that_cannot_be_a_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_unreachable(agentlab("status", socket=tmp_path / "file"), "is not a socket", "--socket")
    check_unreachable(agentlab("status", socket=tmp_path / "file" / "d.sock"), "there is no socket")
    check_unreachable(agentlab("status", socket=f"/{'x' * 200}"), "cannot be the path of a socket")


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((200, b"<html>hello</html>"), "makes no sense"),
        ((200, b""), "makes no sense"),
        ((200, b"[]"), "makes no sense"),
        ((502, b"Bad Gateway"), "makes no sense"),
        ((500, {"detail": "x"}), "makes no sense"),
        ((0, b""), "ended the connection"),
        ((0, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"), "ended the connection"),
        ((0, b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak HTTP"),
        ((404, b"404: Not Found"), "does not know GET /v1/sandboxes"),
        ((200, {"sandboxes": [{"vmid": 1}]}), "different versions"),
        (
            (503, {"error": "agentlabd is stopping; ask again when it runs", "code": "stopping"}),
            "Error: agentlabd is stopping; ask again when it runs\n",
        ),
    ],
)
def test_an_answer_that_is_none_is_told_as_unusable(daemon: StandIn, reply: Any, part: str) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = reply
    check_unreachable(agentlab("sandbox", "list", socket=daemon.path), part)


def test_a_daemon_of_another_release_is_told_with_both_versions(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/status"] = (200, {"version": "0.9.0"})
    check_unreachable(
        agentlab("profile", "list", socket=daemon.path),
        "the daemon (version 0.9.0) does not know GET /v1/profiles",
        "Upgrade the older",
    )


def test_an_answer_that_comes_too_late_is_told_as_still_going_on(daemon: StandIn) -> None:
    over = threading.Event()

    def slow(_it: StandIn) -> tuple[int, Any]:
        over.wait(60)
        return 200, {}

    daemon.replies["POST", "/v1/sandboxes/1000/stop"] = slow
    # It ends while the daemon is still at it: here it is waited for no longer than half of that.
    found = agentlab("--timeout", "1", "sandbox", "stop", 1000, socket=daemon.path)
    over.set()
    check_unreachable(found, "did not answer within 1s (--timeout)", "goes on")
    for wrong in ("-1", "1x", "", "1.5.5", "1h1d", "ms"):
        found = agentlab("--timeout", wrong, "status", socket=daemon.path)
        assert found.returncode == 2
        assert (
            "is not a time to wait. Valid: seconds as a number (30), or a duration such as 90s, 30m, 2h" in found.stderr
        )
    for right in ("90s", "1h30m", "2d", "0", "1.5", "1500ms", "1.5h"):
        assert "is not a time" not in agentlab("--timeout", right, "status", socket=daemon.path).stderr


def test_a_socket_without_permission_is_the_sentence_about_the_group(daemon: StandIn, short_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may use every socket; tests/daemon/test_cli.py does it as another user")
    os.chmod(daemon.path, 0)
    found = agentlab("--socket", daemon.path, "status")
    assert found.returncode == 3 and "group agentlab" in found.stderr


def test_the_time_out_is_of_the_whole_answer(daemon: StandIn) -> None:
    """A daemon that sends a byte now and then is not waited for any longer."""
    path = daemon.path.with_name("slow.sock")
    over = threading.Event()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()

        def drip() -> None:
            caller, _address = listening.accept()
            with caller, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
                    if over.wait(0.2):
                        return
                    caller.sendall(bytes([byte]))

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        begun = time.monotonic()
        found = agentlab("--timeout", "1500ms", "sandbox", "list", socket=path)
        took = time.monotonic() - begun
        over.set()
        thread.join(10)
    assert took < 20 and found.returncode == 3 and "did not answer within 1.5s (--timeout)" in found.stderr, (
        found.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_copy_that_is_ended_leaves_no_file(daemon: StandIn, tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes while the daemon fetches the file from the guest."""
    asked, ended = threading.Event(), threading.Event()

    def hold(_daemon: StandIn) -> tuple[int, Any]:
        asked.set()
        ended.wait(60)
        return 0, b""

    daemon.replies["GET", "/v1/sandboxes/1000/files?path=%2Fvar%2Flog%2Fsyslog"] = hold
    (tmp_path / "syslog").write_text("old")
    with start("sandbox", "cp", "1000:/var/log/syslog", tmp_path, socket=daemon.path) as process:
        assert asked.wait(60)
        begun = os.listdir(tmp_path)
        process.send_signal(number)
        status = process.wait(60)
        ended.set()
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert len(begun) == 2 and status == 128 + number
    assert os.listdir(tmp_path) == ["syslog"] and (tmp_path / "syslog").read_text() == "old"
