# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A daemon that gives no usable answer: not running, not permitted, another release, nonsense, too late."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from support.cli import PYTHON, ROOT, StandIn, agentlab, environment, start
from support.programs import require_unnamed_files


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_copy_that_is_ended_leaves_no_file(daemon: StandIn, tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes while the daemon fetches the file from the guest."""
    require_unnamed_files(tmp_path)
    asked, ended = threading.Event(), threading.Event()

    def hold(_daemon: StandIn) -> tuple[int, Any]:
        asked.set()
        ended.wait(60)
        return 0, b""

    daemon.replies["GET", "/v1/sandboxes/1000/files?path=%2Fvar%2Flog%2Fsyslog"] = hold
    (tmp_path / "syslog").write_text("old")
    with start("sandbox", "cp", "1000:/var/log/syslog", tmp_path, socket=daemon.path) as process:
        assert asked.wait(60)
        process.send_signal(number)
        status = process.wait(60)
        ended.set()
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    assert os.listdir(tmp_path) == ["syslog"] and (tmp_path / "syslog").read_text() == "old"


def serve_file(daemon: StandIn, data: bytes, mode: str = "0640") -> None:
    digest = hashlib.sha256(data).hexdigest()
    head = f"Content-Length: {len(data)}\r\nX-Agentlab-Sha256: {digest}\r\nX-Agentlab-Mode: {mode}\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\n" + head.encode() + data
    daemon.replies["GET", "/v1/sandboxes/1000/files?path=%2Fsrv%2Freport"] = (0, answer)


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_copy_replaces_the_file_as_a_whole(daemon: StandIn, tmp_path: Path, before: bytes | None) -> None:
    serve_file(daemon, b"new\n" * 50_000)
    target = tmp_path / "report"
    if before is not None:
        target.write_bytes(before)
    copied = agentlab("sandbox", "cp", "1000:/srv/report", tmp_path, socket=daemon.path)
    assert (copied.returncode, copied.stderr) == (0, "") and "195 KiB" in copied.stdout
    assert target.read_bytes() == b"new\n" * 50_000 and target.stat().st_mode & 0o7137 == 0
    assert os.listdir(tmp_path) == ["report"]


def test_a_pipe_is_written_to_and_not_replaced(daemon: StandIn, tmp_path: Path) -> None:
    """As root, a copy to /dev/null would put a file into its place for everybody."""
    serve_file(daemon, b"new\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Open for both, so that neither side waits for the other.
    reader = os.open(pipe, os.O_RDWR)
    copied = agentlab("sandbox", "cp", "1000:/srv/report", pipe, socket=daemon.path)
    assert copied.returncode == 0, copied.stderr
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.read(reader, 100) == b"new\n"
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(daemon: StandIn, tmp_path: Path) -> None:
    """As root, a copy to /dev/stdout would put a file in the place of that link, for everybody."""
    serve_file(daemon, b"new\n")
    target, link = tmp_path / "folder" / "report", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old, and longer")
    link.symlink_to(target)
    copied = agentlab("sandbox", "cp", "1000:/srv/report", link, socket=daemon.path)
    assert copied.returncode == 0, copied.stderr
    assert link.is_symlink() and target.read_bytes() == b"new\n" and os.listdir(target.parent) == ["report"]


def test_a_target_that_cannot_be_replaced_is_named(daemon: StandIn, tmp_path: Path) -> None:
    serve_file(daemon, b"new\n")
    (tmp_path / "report").mkdir()
    refused = agentlab("sandbox", "cp", "1000:/srv/report", tmp_path, socket=daemon.path)
    assert refused.returncode == 1 and f"Error: {tmp_path}/report: Is a directory" in refused.stderr
    missing = agentlab("sandbox", "cp", "1000:/srv/report", tmp_path / "no" / "report", socket=daemon.path)
    assert missing.returncode == 1 and "no/report: No such file or directory" in missing.stderr
    assert os.listdir(tmp_path) == ["report"] and os.listdir(tmp_path / "report") == []


@pytest.mark.parametrize("lacks", ["files without a name", "names for them"])
def test_where_files_need_a_name_a_copy_has_a_hidden_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.syspath_prepend(ROOT / "roles/agentlabd/files")
    local_file = importlib.import_module("agentlab_cli.local_file")

    def refuse(*_values: Any, **_named: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    modes = []
    copy = shutil.copyfileobj

    def note(source: IO[bytes], file: IO[bytes]) -> None:
        modes.append(os.fstat(file.fileno()).st_mode & 0o777)
        copy(source, file)

    monkeypatch.setattr(shutil, "copyfileobj", note)
    if lacks == "names for them":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.delattr(os, "O_TMPFILE")
    target = tmp_path / "report"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), local_file.Replacement(str(target)) as replacement:
        replacement.file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["report"]
    with local_file.Replacement(str(target)) as replacement:
        replacement.file.write(b"new")
        replacement.install(0o640)
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o7137 == 0
    assert os.listdir(tmp_path) == ["report"]
    # Until it is complete, a copy is its owner's alone.
    assert modes == ([0o600] if lacks == "names for them" else [])
