# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A command in a sandbox runs at most once, and its result is found again; detached runs."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    InvalidInput,
    NotFound,
    OutcomeUnknown,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import run
from support.lab import Lab
from support.proxmox_guest import Guest


def began(guest: Guest) -> int:
    """Return how many commands were sent to the guest (not looks and pieces)."""
    return sum("\nbegin" in data[-10:] for _argv, data in guest.started)


# ---- once ----


@pytest.fixture
def count_file(guest: Guest) -> Path:
    """A file that every run of the command makes longer by one byte."""
    return guest.folder / "run" / "count"


def counting(path: Path) -> list[str]:
    return ["sh", "-c", f"printf x >>{path}; echo ran"]


LOST = {
    "frozen after its ping": lambda lab, guest: guest.freeze_after_ping(7),
    "answer of exec cut": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "cut-after"),
    "596 for exec": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "answer", status=596),
    "answer of exec half": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "truncate"),
    "status timed out": lambda lab, guest: guest.lose_status(),
    "answer of status cut": lambda lab, guest: lab.pve.fault("GET", "/agent/exec-status", "cut-after"),
    "another 500": lambda lab, guest: lab.pve.fault(
        "POST", "/agent/exec", "answer", status=500, body='{"message":"odd"}'
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_answer_never_runs_the_command_twice(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path, how: str
) -> None:
    LOST[how](lab, guest)
    result = run(lab, sandbox, *counting(count_file))
    assert (result.rc, result.stdout) == (0, b"ran\n")
    assert count_file.read_text() == "x"


@pytest.mark.parametrize("text", ["PID ld does not exist", "Invalid parameter 'pid'"])
def test_an_agent_that_is_restarted_loses_no_result(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path, text: str
) -> None:
    guest.unknown_pid = text
    lab.pve.after = lambda method, path: guest.restart() if path.endswith("/agent/exec") and began(guest) == 1 else None
    assert run(lab, sandbox, *counting(count_file)).stdout == b"ran\n"
    assert count_file.read_text() == "x"


def test_a_run_id_given_again_gets_the_result_and_begins_nothing(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path
) -> None:
    run_id = str(uuid.uuid4())
    first = run(lab, sandbox, *counting(count_file), run_id=run_id)
    again = run(lab, sandbox, *counting(count_file), run_id=run_id)
    assert first.stdout == again.stdout == b"ran\n" and count_file.read_text() == "x"
    # Another command tells the guest that the result is safe; the exit status stays in the journal.
    run(lab, sandbox, "true")
    later = run(lab, sandbox, *counting(count_file), run_id=run_id)
    assert (later.rc, later.stdout) == (0, b"") and "forgotten" in str(later.message)
    assert count_file.read_text() == "x"
    with pytest.raises(InvalidInput, match="another command"):
        run(lab, sandbox, "true", run_id=run_id)


def test_a_repeat_that_meets_a_refused_attempt_runs_the_command(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path
) -> None:
    """The attempt before has made the folder of the run, is refused (by damaged input, say), and removes the folder."""
    run(lab, sandbox, "true")
    run_id = uuid.uuid4().hex
    folder = guest.folder / "run" / "agentlab" / run_id
    folder.mkdir(mode=0o700)
    os.chown(folder, folder.parent.stat().st_uid, folder.parent.stat().st_gid)
    polls = iter(range(1, 1000))

    def remove(_method: str, path: str) -> None:
        if path.endswith("/agent/exec-status") and next(polls) == 2:
            folder.rmdir()

    lab.pve.before = remove
    result = run(lab, sandbox, *counting(count_file), run_id=run_id)
    assert (result.rc, result.stdout) == (0, b"ran\n") and next(polls) > 2
    assert count_file.read_text() == "x"


def test_after_a_reboot_nobody_can_know(lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path) -> None:
    """/run is empty then: without the age of the request mkdir alone would run the command again."""
    count = guest.folder / "count"
    count.touch()
    count.chmod(0o666)
    run_id = str(uuid.uuid4())

    def reboot(method: str, path: str) -> None:
        if path.endswith("/agent/exec") and began(guest) == 1:
            deadline = time.monotonic() + 10
            while not count.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            guest.reboot()

    lab.pve.after = reboot
    with pytest.raises(OutcomeUnknown, match="started anew"):
        run(lab, sandbox, *counting(count), run_id=run_id)
    with pytest.raises(OutcomeUnknown, match="started anew"):
        run(lab, sandbox, *counting(count), run_id=run_id)
    assert count.read_text() == "x"


def test_a_supervisor_that_was_killed_is_lost_and_not_run_again(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path
) -> None:
    started = command.start_command(
        lab.context(), sandbox, CommandSpec(argv=[*counting(count_file)[:2], f"printf x >>{count_file}; sleep 60"])
    )
    guest.kill_all()
    with pytest.raises(OutcomeUnknown, match="was killed"):
        command.wait_command(lab.context(), sandbox, started.run_id)
    assert count_file.read_text() == "x"


# ---- detached ----


def test_a_detached_run_is_followed_and_ended(lab: Lab, sandbox: Sandbox) -> None:
    started = command.start_command(
        lab.context(), sandbox, CommandSpec(cmd="echo 1; sleep 2; echo 2; exit 4", timeout=0)
    )
    assert started.state == "running"
    ended = command.wait_command(lab.context(), sandbox, started.run_id)
    assert (ended.state, ended.rc, ended.stdout) == ("ended", 4, b"1\n2\n")
    assert command.read_run(lab.context(), sandbox, started.run_id, stdout_offset=2).stdout == b"2\n"
    other = command.start_command(lab.context(), sandbox, CommandSpec(argv=["sleep", "80"], timeout=0))
    assert command.wait_command(lab.context(), sandbox, other.run_id, timeout=0).state == "running"
    killed = command.kill_command(lab.context(), sandbox, other.run_id)
    assert (killed.state, killed.rc, killed.killed) == ("ended", 143, True)
    listed = {run["run_id"]: run for run in command.list_runs(lab.context(), sandbox)}
    assert listed[started.run_id]["rc"] == 4 and listed[other.run_id]["state"] == "ended"
    with pytest.raises(NotFound, match="run not found"):
        command.read_run(lab.context(), sandbox, uuid.uuid4().hex)
