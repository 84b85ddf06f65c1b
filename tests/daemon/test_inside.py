# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands and files inside a sandbox by the API and the command line, in the double's guest, which really runs
them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.cli import agentlab, start
from support.daemon import Daemon
from support.lab import Lab


@pytest.fixture
def one(daemon: Callable[..., Daemon], lab: Lab) -> Daemon:
    """A daemon with sandbox 1000, whose guest runs commands."""
    lab.server.pve.agent_default = True
    lab.create("a1", wait_for_ip=True)
    return daemon()


def guest_folder(one: Daemon) -> str:
    """A folder of the guest that the commands may write to."""
    run = one.good("POST", "/v1/sandboxes/1000/exec", {"cmd": "mktemp -d"})
    return str(run["stdout"].strip())


def test_the_api_runs_a_command_once(one: Daemon, tmp_path: Path) -> None:
    body = {"argv": ["sh", "-c", "printf 'ä\\0'; cat >&2; exit 3"], "stdin": "in €"}
    answer = one.post("/v1/sandboxes/1000/exec", body)
    assert answer.status == 200, answer
    run = answer.body
    assert (run["state"], run["rc"], run["stdout"], run["stderr"]) == ("ended", 3, "ä\0", "in €")
    assert run["vmid"] == 1000 and run["changed"] and not run["truncated"]
    data = bytes(range(256))
    again = one.post(
        "/v1/sandboxes/1000/exec",
        {"argv": ["cat"], "stdin": base64.b64encode(data).decode(), "encoding": "base64"},
    ).body
    assert base64.b64decode(again["stdout"]) == data
    listed = one.get("/v1/sandboxes/1000/exec").body["runs"]
    assert {run["run_id"], again["run_id"]} <= {entry["run_id"] for entry in listed}


def test_a_run_id_that_is_given_again_runs_nothing_again(one: Daemon, lab: Lab, tmp_path: Path) -> None:
    body = {"cmd": "echo $$; cat /proc/sys/kernel/random/uuid", "run_id": "0123456789abcdef" * 2}
    first = one.good("POST", "/v1/sandboxes/1000/exec", body)
    second = one.good("POST", "/v1/sandboxes/1000/exec", body)
    assert first["stdout"] and first["stdout"] == second["stdout"]
    other = one.post("/v1/sandboxes/1000/exec", {**body, "cmd": "true"})
    assert other.status == 400 and "run_id" in other.body["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ("argv", "no command is given", "cmd")),
        ({"argv": ["true"], "cmd": "true"}, ("argv", "both given", "not both")),
        ({"argv": []}, ("argv",)),
        ({"argv": ["true"], "timeout": 0}, ("timeout", "detach=true")),
        ({"argv": ["true"], "timeout": 100000}, ("timeout", "detach=true")),
        ({"argv": ["cat"], "stdin": "?", "encoding": "base64"}, ("stdin", "base64")),
        ({"argv": ["true"], "environment": {"a b": "x"}}, ("environment", "letters")),
        ({"argv": ["true"], "environment": ["x"]}, ("environment",)),
        ({"argv": ["true"], "user": "a b"}, ("user", "letters, digits")),
        ({"argv": [1]}, ("argv", "'1' is not valid", "a text in quotes")),
        ({"argv": ["true"], "run_id": "x"}, ("run_id", "'x'")),
        ({"argv": ["tr\0ue"]}, ("argv",)),
        ({"comand": "true"}, ("comand", "unknown key")),
    ],
)
def test_requests_that_make_no_sense_are_refused_by_name(one_daemon: Daemon, body: Any, words: tuple[str, ...]) -> None:
    answer = one_daemon.post("/v1/sandboxes/1000/exec", body)
    assert answer.status == 400, answer
    for word in words:
        assert word in answer.body["error"], answer.body


def test_files_go_in_and_out_byte_for_byte(one: Daemon, tmp_path: Path) -> None:
    data = random.Random(20).randbytes(3_000_000)
    path = f"{guest_folder(one)}/some file ä"
    target = f"/v1/sandboxes/1000/files?path={quote(path)}"
    put = one.request("PUT", f"{target}&mode=0640", data)
    assert put.status == 200, put
    assert put.body == {
        "vmid": 1000,
        "path": path,
        "size": len(data),
        "mode": "0640",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    connection = one.connection()
    connection.request("GET", target)
    answer = connection.getresponse()
    assert answer.read() == data
    assert answer.getheader("X-Agentlab-Mode") == "0640"
    assert answer.getheader("X-Agentlab-Sha256") == put.body["sha256"]
    assert answer.getheader("Content-Type") == "application/octet-stream"
    connection.close()
    missing = one.get(f"/v1/sandboxes/1000/files?path={quote(path + '-not')}")
    assert missing.status >= 400 and "not" in missing.body["error"], missing
    for wrong in ("", "?path=", "?path=relative", "?path=/a&mode=9"):
        assert one.request("PUT", f"/v1/sandboxes/1000/files{wrong}", b"x").status == 400, wrong


def test_no_such_sandbox_and_no_such_run(one_daemon: Daemon) -> None:
    assert one_daemon.post("/v1/sandboxes/1999/exec", {"argv": ["true"]}).status == 404
    assert one_daemon.get("/v1/sandboxes/1999/exec").status == 404
    looked = one_daemon.get(f"/v1/sandboxes/1000/exec/{'0' * 32}")
    killed = one_daemon.post(f"/v1/sandboxes/1000/exec/{'0' * 32}/kill", {})
    for answer in (looked, killed):
        # The sandbox is there: its absence must not be told.
        assert answer.status == 404 and answer.body["error"].startswith("run not found"), answer
        assert "exec list 1000" in answer.body["error"] and "sandbox not found" not in answer.body["error"], answer
    for word in ("status", "logs", "wait", "kill"):
        told = agentlab("sandbox", "exec", word, f"1000/{'0' * 32}", socket=one_daemon.socket)
        assert told.returncode == 1 and told.stderr.startswith("Error: run not found"), told
    assert one_daemon.request("PUT", "/v1/sandboxes/1999/files?path=/x", b"x").status == 404


# ---- the command line ----


def test_exec_shows_output_and_passes_the_exit_status_on(one: Daemon) -> None:
    said = agentlab("sandbox", "exec", "1000", "--", "sh", "-c", "echo out; echo err >&2; exit 7", socket=one.socket)
    assert (said.returncode, said.stdout, said.stderr) == (7, "out\n", "err\n")
    fine = agentlab(
        *("sandbox", "exec", "--stdin", "-e", "X=a b", "--chdir", "/", "1000", "--"),
        *("sh", "-c", 'cat; echo "$X"; pwd'),
        stdin="in\n",
        socket=one.socket,
    )
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "in\na b\n/\n", "")
    killed = agentlab("sandbox", "exec", "1000", "--", "sh", "-c", "kill -9 $$", socket=one.socket)
    assert killed.returncode == 128 + 9


def until(path: str) -> str:
    """Shell words that wait until there is a file."""
    return f"while [ ! -e {path} ]; do sleep 0.1; done"


def test_exec_shows_what_has_come_so_far(one: Daemon) -> None:
    go = f"{guest_folder(one)}/go"
    words = ("sh", "-c", f"echo one; {until(go)}; echo two")
    with start("sandbox", "exec", "1000", "--", *words, socket=one.socket) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        Path(go).touch()
        assert process.stdout.readline() == "two\n"
        assert process.wait(60) == 0


def test_control_c_ends_the_command_in_the_guest(one: Daemon) -> None:
    mark = f"{guest_folder(one)}/ended"
    words = ("sh", "-c", f"trap 'echo bye >{mark}; exit 0' TERM; echo begun; while :; do sleep 0.1; done")
    with start("sandbox", "exec", "1000", "--", *words, socket=one.socket) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    read = agentlab("sandbox", "exec", "1000", "--", "cat", mark, socket=one.socket)
    assert read.stdout == "bye\n", read


def test_a_command_that_goes_on_by_itself(one: Daemon) -> None:
    go = f"{guest_folder(one)}/go"
    words = ("sh", "-c", f"echo one; {until(go)}; echo two; exit 5")
    begun = agentlab("sandbox", "exec", "--detach", "1000", "--", *words, socket=one.socket)
    assert begun.returncode == 0 and begun.stdout.startswith("1000/"), begun
    run = begun.stdout.strip()
    assert agentlab("sandbox", "exec", "logs", run, socket=one.socket).stdout == "one\n"
    assert f"command {run} runs" in agentlab("sandbox", "exec", "status", run, socket=one.socket).stdout
    Path(go).touch()
    followed = agentlab("sandbox", "exec", "logs", "--follow", run, socket=one.socket)
    assert followed.stdout == "one\ntwo\n" and followed.returncode == 0
    waited = agentlab("sandbox", "exec", "wait", run, socket=one.socket)
    assert waited.returncode == 5 and f"command {run} ended with exit status 5" in waited.stdout
    assert run in agentlab("sandbox", "exec", "list", "1000", socket=one.socket).stdout
    long = agentlab("sandbox", "exec", "-d", "1000", "--", "sleep", "600", socket=one.socket).stdout.strip()
    killed = agentlab("sandbox", "exec", "kill", long, socket=one.socket)
    assert killed.returncode == 0 and f"command {long} ended with exit status 143" in killed.stdout, killed
    wrong = agentlab("sandbox", "exec", "status", "3f2a", socket=one.socket)
    assert wrong.returncode == 2 and "<vmid>/<id>" in wrong.stderr
    for_json = agentlab("--json", "sandbox", "exec", "1000", "--", "true", socket=one.socket)
    assert json.loads(for_json.stdout)["vmid"] == 1000


def test_what_a_guest_says_does_not_steer_the_terminal(one: Daemon) -> None:
    from support.cli import on_terminal

    words = ("sandbox", "exec", "1000", "--", "printf", r"\033]0;title\007ok\n")
    status, shown = on_terminal(*words, socket=one.socket)
    assert status == 0 and "\\x1b]0;title\\x07ok" in shown and "\x1b]0" not in shown
    status, shown = on_terminal(*words[:2], "--raw", *words[2:], socket=one.socket)
    assert status == 0 and "\x1b]0;title\x07ok" in shown
    # In a pipe a program gets the very bytes.
    assert agentlab(*words, socket=one.socket).stdout == "\x1b]0;title\x07ok\n"


def test_cp_copies_in_and_out(one: Daemon, tmp_path: Path) -> None:
    data = random.Random(21).randbytes(300_000)
    source = tmp_path / "source.bin"
    source.write_bytes(data)
    source.chmod(0o640)
    folder = guest_folder(one)
    done = agentlab("sandbox", "cp", source, f"1000:{folder}/", socket=one.socket)
    assert done.returncode == 0 and f"to 1000:{folder}/source.bin" in done.stdout, done
    (tmp_path / "back").mkdir()
    done = agentlab("sandbox", "cp", f"1000:{folder}/source.bin", tmp_path / "back", socket=one.socket)
    back = tmp_path / "back/source.bin"
    assert done.returncode == 0 and back.read_bytes() == data and stat.S_IMODE(back.stat().st_mode) == 0o640
    piped = agentlab("sandbox", "cp", "-", f"1000:{folder}/piped", stdin="text ä\n", socket=one.socket)
    assert piped.returncode == 0, piped
    shown = agentlab("sandbox", "cp", f"1000:{folder}/piped", "-", socket=one.socket)
    assert shown.returncode == 0 and shown.stdout == "text ä\n" and not shown.stderr
    failed = agentlab("sandbox", "cp", f"1000:{folder}/missing", back, socket=one.socket)
    assert failed.returncode == 1 and "missing" in failed.stderr
    # What was there stays as it was, and nothing else lies about.
    assert back.read_bytes() == data and os.listdir(back.parent) == ["source.bin"]
    for words in (("a", "b"), ("1000:/a", "1001:/b")):
        assert agentlab("sandbox", "cp", *words, socket=one.socket).returncode == 2


def test_ssh_goes_to_the_address_in_the_record(one: Daemon, lab: Lab, tmp_path: Path) -> None:
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    address = one.good("GET", "/v1/sandboxes/1000")["ip"]
    assert address
    said = agentlab("sandbox", "ssh", "--user", "root", "1000", "--", "uptime", socket=one.socket, env=path)
    assert said.stdout.endswith(f"|-l|root|{address}|uptime|"), said
    no_address = lab.create("a2")
    lab.context().database.write(
        lambda conn: conn.execute("UPDATE sandboxes SET ip = NULL WHERE uuid = ?", (no_address.uuid,)) and None
    )
    said = agentlab("sandbox", "ssh", str(no_address.vmid), socket=one.socket, env=path)
    assert said.returncode == 1 and "has no address in its record (RUNNING)" in said.stderr
    assert f"agentlab sandbox exec {no_address.vmid} -- <command>" in said.stderr
    said = agentlab("sandbox", "ssh", "1999", socket=one.socket, env=path)
    assert said.returncode == 1 and "sandbox not found" in said.stderr


@pytest.mark.parametrize("how", ["STOPPED in the record", "switched off from outside", "its lease is over"])
def test_cp_to_and_from_a_sandbox_that_does_not_run_says_what_to_do(
    one: Daemon, lab: Lab, tmp_path: Path, how: str
) -> None:
    source, target = tmp_path / "here", tmp_path / "back"
    source.write_text("x")
    if how == "STOPPED in the record":
        one.good("POST", "/v1/sandboxes/1000/stop", {})
        words = [
            ("in STOPPED state. Valid states: READY, RUNNING. Start the sandbox first", "agentlab sandbox start 1000")
        ]
    elif how == "switched off from outside":
        lab.pve.vm(1000).status = "stopped"
        # The daemon may have noticed it meanwhile.
        words = [
            ("its VM does not run", "Start the sandbox (state: started), then try again"),
            ("in FAILED state. Valid states: READY, RUNNING", "Create a new sandbox"),
        ]
    else:
        lab.context().database.write(lambda conn: conn.execute("UPDATE sandboxes SET lease_expires_at = 1") and None)
        words = [
            ("its lease expired at", "Create a new sandbox"),
            ("in TIMEOUT state. Valid states: READY, RUNNING", "Create a new sandbox"),
        ]
    for direction, pair in (("into", (source, "1000:/tmp/x")), ("out of", ("1000:/etc/passwd", target))):
        said = agentlab("sandbox", "cp", *pair, socket=one.socket)
        assert said.returncode == 1 and said.stdout == "", said
        assert any(all(word in said.stderr for word in choice) for choice in words), said.stderr
        assert "its VM does not run" in said.stderr or f"cannot copy a file {direction} sandbox" in said.stderr
    assert not target.exists() and lab.pve.machine(1000).started == []


def test_a_large_file_goes_in_and_out_by_cp(one: Daemon, tmp_path: Path) -> None:
    """AGENTLAB_LARGE_FILE_MIB sets the size; 100 MiB take minutes."""
    data = random.Random(22).randbytes(int(os.environ.get("AGENTLAB_LARGE_FILE_MIB", "4")) * 1024 * 1024)
    (tmp_path / "large").write_bytes(data)
    path = f"1000:{guest_folder(one)}/large"
    said = agentlab("--timeout", "30m", "sandbox", "cp", tmp_path / "large", path, socket=one.socket, timeout=1800)
    assert said.returncode == 0, said
    said = agentlab("--timeout", "30m", "sandbox", "cp", path, tmp_path / "back", socket=one.socket, timeout=1800)
    assert said.returncode == 0, said
    assert (tmp_path / "back").read_bytes() == data
