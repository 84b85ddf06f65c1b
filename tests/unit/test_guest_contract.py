# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The real qemu-guest-agent of Debian, on a unix socket without a VM: it answers as the double says, and runs our
wrapper.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command, files, wrapper
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec

from support.lab import Lab
from support.programs import require, require_program
from support.real_agent import PROGRAM, RealAgent, RealGuest


@pytest.fixture(scope="module", autouse=True)
def real_agent() -> None:
    require(PROGRAM is not None, "qemu-ga is not installed: apt-get install qemu-guest-agent")


@pytest.fixture(scope="module")
def agent() -> Iterator[RealAgent]:
    real = RealAgent()
    yield real
    real.close()


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
    work = wrapper.compose_shell_text(argv)
    common: dict[str, Any] = {"id": run_id, "age": -1, "w": 10, "limit": 30, "grace": 1, "max": 100000, "lim": 65536}
    common |= {"part": 0, "oo": 0, "eo": 0, "acks": "", "user": "", "pieces": "", "gz": 0, "insum": ""}
    common |= {"nraw": len(data), "nlast": len(data), "nwork": len(work), **values}
    return wrapper.compose_request(operation, common, {"work": work, "input": data})


@pytest.mark.parametrize("shell", ["/bin/sh", "dash", "bash"])
def test_the_wrapper_runs_behind_the_real_agent(agent: RealAgent, shell: str) -> None:
    program = require_program(shell)
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


# ---- the double with the real agent ----


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("real"))
    yield made
    made.pve.close_machines()
    made.stop()


def test_commands_and_files_work_through_the_real_agent(lab: Lab) -> None:
    """The whole core, the double's API, and the real agent: one request begins a command and nothing is lost."""
    sandbox = lab.create()
    guest = lab.pve.machines[sandbox.vmid] = RealGuest(sandbox.vmid)
    ctx = lab.context()
    every = bytes(range(1, 256))
    for number in range(5):
        argv = ["sh", "-c", f'printf %s "$1"; cat >&2; exit {number}', "x", every]
        result = command.run_command(ctx, sandbox, CommandSpec(argv=argv, stdin=b"in\0put"))
        assert (result.rc, result.stdout, result.stderr) == (number, every, b"in\0put")
    assert len(guest.started) == 5
    killed = command.run_command(ctx, sandbox, CommandSpec(argv=["sh", "-c", "kill -9 $$"]))
    assert killed.signal == 9
    large = command.run_command(
        ctx, sandbox, CommandSpec(argv=["head", "-c", "3000000", "/dev/urandom"], max_output=4000000)
    )
    assert len(large.stdout) == 3_000_000
    data = os.urandom(400_000)
    path = str(guest.folder / "run" / "file ä")
    files.put_file(ctx, sandbox, data, path)
    target = io.BytesIO()
    files.fetch_file(ctx, sandbox, path, target)
    assert target.getvalue() == data == Path(path).read_bytes()
