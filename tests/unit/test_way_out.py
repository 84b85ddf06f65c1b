# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every unfinished operation has a way out, without a daemon: each kind and phase of the journal, whatever became of
its task and of its VM. What the doctor says is done to the letter, and a message that it leads to is followed too.

With a daemon, and by the command line: tests/daemon/test_way_out.py. Runs that are really killed:
tests/faults/test_unfinished.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import host
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal

from support.journal_states import World, cases
from support.lab import FakeClock, Lab

# Rounds of asking the doctor and doing what it says, until nothing is left.
ROUNDS = 16


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, absent_guard=100, connections=8)
    made.clock = FakeClock()
    yield made
    made.check_promises()
    made.stop()


def obey(world: World, vmid: int | None, message: str) -> bool:
    """Do what a message asks a person for; return whether it asks for anything known."""
    if "run again in" in message and "doubt_window" in message:
        world.lab.clock.pass_time(2)
    elif "or stop it" in message:
        world.end_tasks()
    elif "by hand" in message and vmid is not None:
        world.remove_by_hand(vmid)
    else:
        return False
    return True


def follow(world: World) -> list[str]:
    """Do what the doctor says until it says nothing more; return what was said."""
    lab = world.lab
    told: list[str] = []
    for _round in range(ROUNDS):
        examination = cast(Any, SimpleNamespace(context=lab.context()))
        findings = [found for found in host.check_work(examination) if found.status != "ok"]
        if not findings:
            return told
        for finding in findings:
            told.append(f"{finding.meaning}: {finding.advice}")
            commands = re.findall(r"\((agentlab sandbox [^)]*)\)", str(finding.advice))
            assert commands, told[-1]
            for command in commands:
                messages: list[tuple[int | None, str]] = []
                if command == "agentlab sandbox reconcile --apply":
                    messages = [
                        (drift.sandbox.vmid if drift.sandbox else None, str(drift.error)) for drift in lab.reconcile()
                    ]
                else:
                    forced = re.fullmatch(r"agentlab sandbox destroy --force ([\d ]+)", command)
                    assert forced, command
                    vmids = list(map(int, forced[1].split()))
                    messages = [(outcome.vmid, str(outcome.message)) for outcome in lab.destroy(*vmids, force=True)]
                for vmid, message in messages:
                    obey(world, vmid, message)
    return told


def test_what_the_doctor_says_ends_every_unfinished_operation(lab: Lab) -> None:
    world = World(lab)
    assert len(world.unfinished()) == len(world.cases)
    told = follow(world)
    assert not world.unfinished(), "\n".join([*world.unfinished(), *told[-4:]])
    world.check_strangers()


def test_the_walk_has_every_kind_and_phase_with_every_vm() -> None:
    walked = {(case.kind, case.phase, case.vm) for case in cases()}
    assert {(kind, phase) for kind, phase, _vm in walked} == {
        (kind, phase) for kind, phases in journal.PHASES.items() for phase in phases
    }
    assert len(walked) == 4 * sum(map(len, journal.PHASES.values()))


def test_a_destroy_that_is_given_up_much_later_leaves_what_tells_its_vm(lab: Lab) -> None:
    """A plain destroy of a creation that failed was killed before it looked at the rules."""
    sandbox = lab.create("a1")
    context = lab.context()
    now = context.clock.now()
    created = {"template": 9000, "template_node": "pve1", "node": "pve1", "phase": journal.CLONING, "at": now}
    detail = json.dumps({"operation": "destroy", "force": False, "create": created})

    def write(conn: Any) -> None:
        conn.execute("UPDATE sandboxes SET state = 'FAILED', smbios_uuid = NULL")
        conn.execute(
            "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
            "VALUES (?, 'destroy', ?, ?, 'killed', ?, ?)",
            (sandbox.uuid, journal.VERIFYING, detail, now, now),
        )

    context.database.write(write)
    lab.clock.pass_time(4000)
    given_up = lab.reconcile()[0]
    assert given_up.applied and given_up.action.startswith("destroy given up: cannot destroy sandbox in FAILED state")
    assert lab.reconcile() == []
    assert [(row["kind"], row["phase"]) for row in lab.leftovers()["operations"]] == [("create", journal.CLONING)]
    outcome = lab.destroy(sandbox.vmid, force=True)[0]
    assert (outcome.state, outcome.reason) == ("DESTROYED", "destroyed"), outcome
    assert lab.pve.vm(sandbox.vmid) is None
