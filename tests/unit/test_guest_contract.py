# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The real qemu-guest-agent of Debian, on a unix socket without a VM: it answers as the double says, and runs our
wrapper.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import wrapper

from support.proxmox_guest import NOBODY

PROGRAM = shutil.which("qemu-ga", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="qemu-ga is not installed: apt-get install qemu-guest-agent")


class RealAgent:
    """One qemu-ga as an ordinary user. As Proxmox does, every request opens the socket anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ga.sock"
        root = os.geteuid() == 0
        self.process = subprocess.Popen(
            [
                str(PROGRAM),
                "--method=unix-listen",
                f"--path={self.path}",
                f"--statedir={folder}",
                f"--pidfile={folder}/pid",
            ],
            cwd="/",
            stderr=subprocess.DEVNULL,
            **({"user": NOBODY, "group": NOBODY, "extra_groups": []} if root else {}),
        )
        deadline = time.monotonic() + 20
        while not self.path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, "qemu-ga does not listen"
            time.sleep(0.05)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request on a connection of its own, and return the whole answer."""
        deadline = time.monotonic() + 20
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                try:
                    sock.connect(str(self.path))
                    sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                    data = b""
                    while not data.endswith(b"\n"):
                        block = sock.recv(65536)
                        if not block:
                            break
                        data += block
                except OSError:
                    data = b""
            if data:
                answer: dict[str, Any] = json.loads(data)
                return answer
            assert time.monotonic() < deadline, "qemu-ga does not answer"
            time.sleep(0.1)

    def end_of(self, pid: int) -> dict[str, Any]:
        """Ask until a program has ended, and return that answer."""
        deadline = time.monotonic() + 30
        while True:
            status: dict[str, Any] = self.ask("guest-exec-status", pid=pid)["return"]
            if status["exited"]:
                return status
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def run(self, *argv: str, data: bytes = b"") -> dict[str, Any]:
        values = {"input-data": base64.b64encode(data).decode()} if data else {}
        answer = self.ask("guest-exec", path=argv[0], arg=list(argv[1:]), **values, **{"capture-output": True})
        return self.end_of(answer["return"]["pid"])


@pytest.fixture(scope="module")
def agent() -> Iterator[RealAgent]:
    folder = Path(tempfile.mkdtemp(prefix="qemu-ga-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    real = RealAgent(folder)
    yield real
    real.process.terminate()
    real.process.wait(10)
    shutil.rmtree(folder, ignore_errors=True)


def decoded(status: dict[str, Any], name: str) -> bytes:
    return base64.b64decode(status.get(f"{name}-data", ""))


def test_output_is_missing_when_nothing_was_written(agent: RealAgent) -> None:
    status = agent.run("true")
    assert status == {"exited": True, "exitcode": 0}


def test_a_signal_has_no_exit_status(agent: RealAgent) -> None:
    status = agent.run("sh", "-c", "kill -9 $$")
    assert status["exited"] and status["signal"] == 9 and "exitcode" not in status


def test_the_output_is_handed_out_once(agent: RealAgent) -> None:
    pid = agent.ask("guest-exec", path="echo", arg=["x"], **{"capture-output": True})["return"]["pid"]
    assert decoded(agent.end_of(pid), "out") == b"x\n"
    again = agent.ask("guest-exec-status", pid=pid)
    # qemu-ga 10, and 7.2.
    assert re.fullmatch(r"PID \S+ does not exist|Invalid parameter 'pid'", again["error"]["desc"])
    never = agent.ask("guest-exec-status", pid=999999)
    assert never["error"]["desc"] == again["error"]["desc"]


def test_a_child_with_the_output_open_keeps_the_program_running(agent: RealAgent) -> None:
    pid = agent.ask("guest-exec", path="sh", arg=["-c", "sleep 2 & echo x"], **{"capture-output": True})["return"][
        "pid"
    ]
    time.sleep(0.7)
    assert not agent.ask("guest-exec-status", pid=pid)["return"]["exited"]
    assert decoded(agent.end_of(pid), "out") == b"x\n"


def test_a_program_that_is_not_there_is_an_error(agent: RealAgent) -> None:
    assert "error" in agent.ask("guest-exec", path="/nonsense", arg=[])


def request(operation: str, run_id: str, argv: list[bytes], data: bytes = b"", **values: Any) -> str:
    work = wrapper.shell_text(argv)
    common: dict[str, Any] = {"id": run_id, "age": -1, "w": 10, "limit": 30, "grace": 1, "max": 100000, "lim": 65536}
    common |= {"part": 0, "oo": 0, "eo": 0, "acks": "", "user": "", "pieces": "", "gz": 0, "insum": ""}
    common |= {"nraw": len(data), "nlast": len(data), "nwork": len(work), **values}
    return wrapper.request(operation, common, {"work": work, "input": data})


@pytest.mark.parametrize("shell", ["/bin/sh", "dash", "bash"])
def test_the_wrapper_runs_behind_the_real_agent(agent: RealAgent, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    run_id = os.urandom(16).hex()
    every = bytes(range(1, 256))
    script = request("begin", run_id, [b"sh", b"-c", b'printf %s "$1"; cat >&2; exit 3', b"x", every], b"in\0put")
    status = agent.run(program, "-c", wrapper.BOOT, "agentlab", str(len(script)), data=script.encode())
    head, _feed, body = decoded(status, "out").partition(b"\n")
    assert head.startswith(f"agentlab1 {run_id} state=ended rc=3 sig=0 ".encode())
    assert body == every + b"in\0put"
    # The same request again begins nothing, and gives the same answer.
    again = agent.run(program, "-c", wrapper.BOOT, "agentlab", str(len(script)), data=script.encode())
    assert decoded(again, "out") == decoded(status, "out")


def test_a_script_that_was_cut_runs_nothing(agent: RealAgent, tmp_path: Path) -> None:
    script = request("begin", os.urandom(16).hex(), [b"touch", bytes(tmp_path / "made")])
    for length in (len(script) - 1, len(script) // 2, 10):
        status = agent.run("/bin/sh", "-c", wrapper.BOOT, "agentlab", str(len(script)), data=script[:length].encode())
        assert decoded(status, "out") == b"agentlab1 cut\n"


def test_info_tells_what_is_blocked(agent: RealAgent) -> None:
    commands = {entry["name"]: entry["enabled"] for entry in agent.ask("guest-info")["return"]["supported_commands"]}
    assert commands["guest-exec"] and commands["guest-file-read"]
