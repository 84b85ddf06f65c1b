# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The same run_id again, when the guest has no folder of the run: hours later, after a reboot, after several faults."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import OutcomeUnknown
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import access, command
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import events, run
from support.lab import FakeClock, Lab
from support.proxmox_guest import Guest

HOUR, DAY = 3600, 86400


class Counted:
    """A command with an id of its own, which leaves a byte in a file of the guest whenever it runs."""

    def __init__(self, guest: Guest, text: str = "echo ran", **values: Any) -> None:
        # Outside of /run, which a reboot empties.
        self.file = guest.folder / f"count-{uuid.uuid4().hex}"
        self.file.touch()
        self.file.chmod(0o666)
        self.folder: Path = guest.folder / "run" / "agentlab" / (run_id := uuid.uuid4().hex)
        self.spec = CommandSpec(argv=["sh", "-c", f"printf x >>{self.file}; {text}"], run_id=run_id, **values)

    @property
    def runs(self) -> int:
        return len(self.file.read_text())

    def run(self, ctx: Context, sandbox: Sandbox) -> command.CommandResult:
        return command.run_command(ctx, sandbox, self.spec)


def let_pass(lab: Lab, guest: Guest, seconds: int) -> None:
    """Make all runs of the journal and their folders in the guest older, as if that time had passed."""
    lab.context().database.write(
        lambda conn: conn.execute("UPDATE runs SET started_at = started_at - ?", (seconds,)) and None
    )
    for folder in (guest.folder / "run" / "agentlab").iterdir():
        then = folder.stat().st_mtime - seconds
        os.utime(folder, (then, then))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["told and forgotten", "detached", "rebooted"])
def test_a_result_in_the_records_is_told_when_the_guest_has_it_no_more(
    lab: Lab, sandbox: Sandbox, guest: Guest, how: str
) -> None:
    """The guest removes the folder of a told result after an hour, and that of any run after a day."""
    counted = Counted(guest, "echo ran; exit 3")
    if how == "detached":
        command.start_command(lab.context(), sandbox, counted.spec)
        assert command.wait_command(lab.context(), sandbox, str(counted.spec.run_id)).rc == 3
        let_pass(lab, guest, DAY + HOUR)
    else:
        assert counted.run(lab.context(), sandbox).rc == 3
        run(lab, sandbox, "true")
        let_pass(lab, guest, HOUR + 120)
    if how == "rebooted":
        guest.reboot()
    else:
        run(lab, sandbox, "true")
        wait_until(lambda: not counted.folder.exists())
    again = counted.run(lab.context(), sandbox)
    assert (again.state, again.rc, again.stdout) == ("ended", 3, b"") and "forgotten" in str(again.message)
    read = command.read_run(lab.context(), sandbox, str(counted.spec.run_id))
    waited = command.wait_command(lab.context(), sandbox, str(counted.spec.run_id))
    killed = command.kill_command(lab.context(), sandbox, str(counted.spec.run_id))
    assert [(result.state, result.rc) for result in (read, waited, killed)] == [("ended", 3)] * 3
    assert counted.runs == 1
    assert len([event for event in events(lab.context(), sandbox) if event["evidence"].get("rc") == 3]) == 1


def test_a_skipped_command_stays_skipped(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    counted = Counted(guest, creates="/etc/passwd")
    first = counted.run(lab.context(), sandbox)
    run(lab, sandbox, "true")
    again = counted.run(lab.context(), sandbox)
    assert (again.state, again.changed, again.message) == ("skipped", False, first.message)
    assert "/etc/passwd exists (creates)" in str(again.message) and counted.runs == 0


@pytest.mark.parametrize("age, begins", [(HOUR // 2, True), (HOUR, False), (2 * DAY, False)])
def test_a_run_that_may_have_begun_an_hour_ago_begins_no_more(
    lab: Lab, sandbox: Sandbox, guest: Guest, age: int, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller was killed before its first request, so the records know nothing of the run but its id."""
    counted = Counted(guest)

    def end(_guest: access.Guest, _script: str) -> int:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(access.Guest, "send_script", end)
        with pytest.raises(SystemExit):
            counted.run(lab.context(), sandbox)
    run(lab, sandbox, "true")
    let_pass(lab, guest, age)
    if begins:
        assert counted.run(lab.context(), sandbox).stdout == b"ran\n"
    else:
        with pytest.raises(OutcomeUnknown, match="more than 50 minutes ago. Whether the command ran is not known"):
            counted.run(lab.context(), sandbox)
    assert counted.runs == int(begins)


def test_a_damaged_repeat_does_not_make_the_lost_attempt_forgotten(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    """Three faults: the answer to the first request is lost, the second arrives cut off, then the guest reboots.

    The guest refuses a request that is cut off before it looks for the run's folder.
    """
    counted = Counted(guest, "echo ran; sleep 5")
    lab.pve.fault("POST", "/agent/exec", "cut-after")

    def say_cut(_answer: dict[str, Any]) -> dict[str, Any]:
        guest.lie = None
        wait_until(lambda: counted.runs == 1)
        guest.reboot()
        return {"exited": 1, "exitcode": 0, "out-data": "agentlab1 cut\n", "out-truncated": 0}

    guest.lie = say_cut
    with pytest.raises(OutcomeUnknown, match="started anew"):
        command.run_command(lab.context(), sandbox, counted.spec, cancel=lambda: False)
    with pytest.raises(OutcomeUnknown, match="started anew"):
        counted.run(lab.context(), sandbox)
    assert guest.lie is None and counted.runs == 1


def test_a_refused_repeat_is_no_proof_that_the_lost_attempt_did_not_begin(
    lab: Lab, sandbox: Sandbox, guest: Guest
) -> None:
    counted = Counted(guest)
    lab.pve.fault("POST", "/agent/exec", "cut-after")

    def say_cut(_answer: dict[str, Any]) -> dict[str, Any]:
        return {"exited": 1, "exitcode": 0, "out-data": "agentlab1 cut\n", "out-truncated": 0}

    guest.lie = say_cut
    with pytest.raises(OutcomeUnknown, match="may have begun"):
        counted.run(lab.context(), sandbox)
    guest.lie = None
    assert [entry["state"] for entry in command.list_runs(lab.context(), sandbox)] == ["sent"]
    guest.reboot()
    with pytest.raises(OutcomeUnknown, match="started anew"):
        counted.run(lab.context(), sandbox)
    assert counted.runs == 1


def test_a_controller_that_slept_knows_how_old_its_request_is(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller's host sleeps for half an hour after the first request; the guest reboots meanwhile."""
    counted = Counted(guest)
    clock = FakeClock()
    naps = [1800]

    def sleep(_method: str, path: str) -> None:
        if path.endswith("/agent/exec") and naps:
            wait_until(lambda: counted.runs == 1)
            clock.asleep(naps.pop())
            guest.reboot()
            # It has been up for a while.
            guest.booted -= 1200

    monkeypatch.setattr(lab, "clock", clock)
    lab.pve.fault("POST", "/agent/exec", "cut-after")
    lab.pve.after = sleep
    with pytest.raises(OutcomeUnknown, match="started anew"):
        counted.run(lab.context(), sandbox)
    assert not naps and counted.runs == 1


def test_a_wall_clock_that_was_set_back_leaves_the_age_unknown(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller was killed after its first request, and the guest has rebooted since."""
    counted = Counted(guest)
    real = access.Guest.send_script

    def end(of: access.Guest, script: str) -> int:
        real(of, script)
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(access.Guest, "send_script", end)
        with pytest.raises(SystemExit):
            counted.run(lab.context(), sandbox)
    wait_until(lambda: counted.runs == 1)
    guest.reboot()
    guest.booted -= 1200
    monkeypatch.setattr(lab, "clock", FakeClock(int(time.time()) - 2 * HOUR))
    with pytest.raises(OutcomeUnknown, match="Whether the command ran is not known"):
        counted.run(lab.context(), sandbox)
    assert counted.runs == 1


def test_a_refusal_says_nothing_of_what_another_controller_began(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second controller asks with the same id, begins the command and is killed; then the first one is refused."""
    counted = Counted(guest)
    real = access.Guest.send_script
    calls: list[str] = []

    def send(of: access.Guest, script: str) -> int:
        calls.append(script)
        if len(calls) == 1:
            with pytest.raises(SystemExit):
                counted.run(lab.context(), sandbox)
            wait_until(lambda: counted.runs == 1)
            guest.blocked.add("guest-exec")
        pid = real(of, script)
        if len(calls) == 2:
            raise SystemExit
        return pid

    with monkeypatch.context() as patched:
        patched.setattr(access.Guest, "send_script", send)
        with pytest.raises(GuestRefused):
            counted.run(lab.context(), sandbox)
    guest.blocked.clear()
    guest.reboot()
    with pytest.raises(OutcomeUnknown, match="started anew"):
        counted.run(lab.context(), sandbox)
    assert len(calls) == 2 and counted.runs == 1
