# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No command runs twice: each shape of a command, each fault of the agent and each end of the controller, at each
request and commit. They take long, so they run with AGENTLAB_FAULTS=all only.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import OutcomeUnknown
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from faults.command_support import FAULTS, child
from support.ansible_input import module
from support.lab import Lab

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.environ.get("AGENTLAB_FAULTS") != "all", reason="long: make test-faults-all strikes them"),
]


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    yield one_lab
    one_lab.calm()
    one_lab.pve.close_machines()
    one_lab.reset()


# Commands that take other requests: input in pieces, input that the guest keeps, output beyond one answer, looks.
SHAPES: dict[str, tuple[str, bytes, bool]] = {
    "short": ("echo ran", b"", False),
    "input in pieces": ("cksum", Random(1).randbytes(150_000), False),
    "input that is kept": ("cksum", module(), False),
    "large output": ("head -c 300000 /dev/zero | tr '\\0' x", b"", False),
    "watched": ("sleep 1.5; echo ran", b"", True),
}
AGENT_FAULTS: dict[str, Callable[[Any], None]] = {
    **FAULTS,
    "killed": lambda guest: guest.restart(kill=True),
    "rebooted": lambda guest: guest.reboot(),
}


class Cell:
    """One command with an id of its own, which leaves a byte in a file of the guest whenever it runs."""

    def __init__(self, lab: Lab, sandbox: Sandbox, shape: str) -> None:
        text, data, watched = SHAPES[shape]
        self.lab, self.sandbox, self.text, self.data = lab, sandbox, text, data
        guest = lab.pve.machine(sandbox.vmid)
        # Outside of /run, which a reboot empties.
        self.count = guest.folder / f"count-{uuid.uuid4().hex}"
        self.count.touch()
        self.count.chmod(0o666)
        argv = ["sh", "-c", f"printf x >>{self.count}; {text}"]
        self.spec = CommandSpec(argv=argv, stdin=data, run_id=uuid.uuid4().hex, wait_for_agent=20)
        self.watch: dict[str, Any] = {"on_output": lambda out, err: None} if watched else {}

    def run(self, ctx: Any) -> command.CommandResult:
        return command.run_command(ctx, self.sandbox, self.spec, **self.watch)

    def judge(self) -> bool:
        """Run the command, and fail unless what is told is the command's own; return whether a result was told."""
        try:
            result = self.run(self.lab.context())
        except (OutcomeUnknown, GuestRefused):
            return False
        finally:
            assert len(self.count.read_text()) <= 1, "the command ran twice"
        assert self.count.read_text() == "x", "a result of a command that never ran"
        if "forgotten" not in str(result.message):
            shown = subprocess.run(["sh", "-c", self.text], input=self.data, capture_output=True, check=True).stdout
            assert (result.rc, result.stdout) == (0, shown)
        return True


def points(requests: list[str]) -> list[int]:
    """Return the requests to strike at, from 1 on: all, but of many polls in a row the first two and the last."""
    polls = [path.endswith("/agent/exec-status") for path in requests]
    return [at + 1 for at in range(len(polls)) if at < 2 or not all(polls[at - 2 : at + 2]) or at + 1 == len(polls)]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("fault", AGENT_FAULTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_fault_of_the_agent_runs_a_command_twice(lab: Lab, shape: str, fault: str, moment: str) -> None:
    """A fault comes right before a request to the agent, or right after it was carried out."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    seen = [0, 0]
    requests: list[str] = []

    def strike(_method: str, path: str) -> None:
        if "/agent/" in path:
            requests.append(path)
            seen[0] += 1
            if seen[0] == seen[1]:
                AGENT_FAULTS[fault](guest)

    setattr(lab.pve, moment, strike)
    assert Cell(lab, sandbox, shape).judge()
    assert len(requests) >= 2
    for point in points(list(requests)):
        # A run may ask fewer times for the status than the one that was counted.
        for seen[1] in range(point, 0, -1):
            seen[0] = 0
            guest.reboot()
            # A guest that started a moment ago cannot know of a command that may have begun before.
            guest.booted -= 86400
            cell = Cell(lab, sandbox, shape)
            told = cell.judge()
            came = seen[0] >= seen[1]
            seen[0], seen[1] = 0, 0
            again = cell.judge()
            # What was told once stays told; only an end of the guest's processes may leave a result unknown.
            assert again if told else fault in ("killed", "rebooted"), point
            if came:
                break
        assert came, "the fault did not come"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("place", ["request", "commit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_end_of_the_controller_runs_a_command_twice(lab: Lab, shape: str, place: str, moment: str) -> None:
    """The controller is killed at a request or a commit; another one gets the result by the same id."""
    sandbox = lab.create()
    killed = 0
    for point in itertools.count(1):
        cell = Cell(lab, sandbox, shape)
        status = child(lab, cell.run, point, moment, place)
        assert cell.judge() and cell.count.read_text() == "x", point
        killed += status == 9
        if status != 9:
            break
    assert killed
