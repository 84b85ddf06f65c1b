# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every unfinished operation has a way out where a daemon runs: the commands that ``agentlab doctor`` prints are run as
they stand there, by the real command line.

Each kind and phase of the journal is there once with each of the VMs. What becomes of tasks is walked in
tests/unit/test_way_out.py.
"""

from __future__ import annotations

import json
import re
import shlex
import time

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal

from support.cli import agentlab
from support.daemon import Daemon, Make
from support.journal_states import World
from support.lab import Lab

ROUNDS = 12


def advise(agentlabd: Daemon) -> list[str]:
    """Return the advice of the doctor on work that was left over."""
    told = agentlab("doctor", "--json", socket=agentlabd.socket, timeout=120)
    findings = json.loads(told.stdout)["findings"]
    return [str(row["advice"]) for row in findings if row["check"] == "work" and row["status"] != "ok"]


def obey(world: World, output: str) -> None:
    """Do what the command line's messages ask a person for."""
    for vmid in map(int, re.findall(r"sandbox (\d+): [^\n]*by hand", output)):
        world.remove_by_hand(vmid)
    if "doubt_window" in output:
        time.sleep(1.2)


def test_the_commands_that_the_doctor_prints_end_every_unfinished_operation(daemon: Make, lab: Lab) -> None:
    seen: set[tuple[str, str, str]] = set()

    def choose(case: object) -> bool:
        key = (case.kind, case.phase, case.vm)  # type: ignore[attr-defined]
        chosen = key not in seen and case.task != "running"  # type: ignore[attr-defined]
        seen.update({key} if chosen else ())
        return chosen

    world = World(lab, choose)
    assert {key[:2] for key in seen} == {(kind, phase) for kind, phases in journal.PHASES.items() for phase in phases}
    agentlabd = daemon(absent_guard=100, reconcile_interval="1h", wait_timeout="2s")
    commands: list[str] = []
    for _round in range(ROUNDS):
        advice = advise(agentlabd)
        if not advice:
            break
        for text in advice:
            for command in re.findall(r"\((agentlab sandbox [^)]*)\)", text):
                commands.append(command)
                told = agentlab(*shlex.split(command)[1:], socket=agentlabd.socket, timeout=120)
                obey(world, told.stdout + told.stderr)
    assert advise(agentlabd) == [] and not world.unfinished(), "\n".join([*world.unfinished(), *commands])
    assert any(command.startswith("agentlab sandbox destroy --force ") for command in commands)
    world.check_strangers()
    assert "Traceback" not in agentlabd.log()
