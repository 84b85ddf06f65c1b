# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every state in which an operation can be left has a way out: the doctor names it, and it works.

Each operation is killed at each of its requests and commits. Whatever new entry of the journal (or unfinished
workspace) that leaves, the doctor is asked and what it says is done, nothing else. In the end nothing is unfinished.
The phases met are held to those that the code writes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor, host
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

from faults.crash_support import BYSTANDER, Rig
from faults.test_crash import CASES, Case
from support.lab import Lab

pytestmark = pytest.mark.faults

RECONCILE = "agentlab sandbox reconcile --apply"
DESTROY = re.compile(r"agentlab sandbox destroy --force ((?:\d+ ?)+)")
DETACH = "agentlab workspace detach does"
RUN_AGAIN = "run the same task again"
# Operations of test_crash.py that leave each entry which a killed run can leave, and the phases that each leaves at
# least.
KILLED: dict[str, set[tuple[str, str]]] = {
    "create": {("create", phase) for phase in ("reserved", "cloning", "waiting", "configuring", "ready")},
    "create_workspace": {("create", "configuring")},
    "stop": {("stop", "requested")},
    "start": {("start", "requested")},
    "suspend": {("suspend", "requested")},
    "force": {("destroy", phase) for phase in ("verifying", "stopping", "deleting", "waiting")},
    "force_half": {("destroy", "deleting")},
    "force_workspace": {("destroy", "detaching"), ("destroy", "deleting")},
    "workspace_create": {("workspace", "CREATING")},
    "workspace_attach": {("workspace", "ATTACHING")},
    "workspace_detach": {("workspace", "DETACHING")},
    "workspace_absent": {("workspace", "DELETING")},
}
# What a run leaves by itself when its time is up.
TIMED_OUT = {("create", "awaited"), ("create", "waiting")}


def examine_work(settings: config.Config) -> list[doctor.Finding]:
    """Return what the doctor says of work left over."""
    one = doctor.Doctor(settings)
    try:
        return [finding for finding in one._run_check("work", host.check_work) if finding.status != "ok"]
    finally:
        one.close()


class Follower:
    """Does what the doctor says, and nothing else."""

    def __init__(
        self,
        examine: Callable[[], list[doctor.Finding]],
        reconcile: Callable[[], Any],
        destroy: Callable[[int], str],
        run_again: Callable[[], Any] | None = None,
        detach: Callable[[str], Any] | None = None,
    ) -> None:
        self.examine, self.reconcile, self.destroy, self.run_again = examine, reconcile, destroy, run_again
        self.detach = detach

    def follow(self, by_hand: Callable[[int], Any]) -> list[str]:
        """Return what was said and done; AssertionError for advice that leads nowhere."""
        told: list[str] = []
        for _round in range(5):
            findings = self.examine()
            if not findings:
                return told
            for finding in findings:
                advice = str(finding.advice)
                told.append(f"{finding.meaning}: {advice}")
                forced = DESTROY.search(advice)
                if RUN_AGAIN in advice and self.run_again is not None:
                    self.run_again()
                elif RECONCILE in advice:
                    self.reconcile()
                    if DETACH in advice and self.detach is not None:
                        for name in re.findall(r"(\w+) \([A-Z]+\)", finding.meaning):
                            if any(f"{name} (" in other.meaning for other in self.examine()):
                                self.detach(name)
                    if "again after doubt_window" in advice:
                        # The doubt_window of these laboratories is one second.
                        time.sleep(1.2)
                elif forced:
                    for vmid in map(int, forced[1].split()):
                        message = self.destroy(vmid)
                        if "remove it by hand" in message:
                            by_hand(vmid)
                else:
                    raise AssertionError(f"nothing to do in: {advice}")
        raise AssertionError(f"no end: {told}")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.foreign(BYSTANDER, name="bystander", running=True)
    yield made
    made.stop()


def unfinished(rig: Rig) -> list[tuple[str, str, str]]:
    """Return (kind, phase, what else decides) of everything in the journal, and of workspaces."""
    entries = [
        (
            row["kind"],
            row["phase"],
            f"{row['state']} bound={row['smbios_uuid'] is not None} task={'upid' in row['detail']} "
            f"create={'create' in row['detail']}",
        )
        for row in rig.sql(
            "SELECT o.*, s.state, s.smbios_uuid FROM operations o JOIN sandboxes s ON s.uuid = o.sandbox_uuid"
        )
    ]
    disks = rig.sql("SELECT * FROM workspaces WHERE state IN ('CREATING', 'ATTACHING', 'DETACHING', 'DELETING')")
    return entries + [("workspace", row["state"], str(row["sandbox_uuid"] is not None)) for row in disks]


def follower(rig: Rig) -> Follower:
    settings = config.load({}, rig.env)

    def destroy(vmid: int) -> str:
        answer = rig.do("destroy", vmids=[vmid], force=True)["result"]
        return str(answer.get("message") or [one["message"] for one in answer.get("outcomes", ())])

    def detach(name: str) -> Any:
        return rig.do("workspace", word="detached", name=name)

    return Follower(lambda: examine_work(settings), lambda: rig.do("reconcile"), destroy, detach=detach)


@pytest.mark.parametrize("name", KILLED)
def test_what_the_doctor_says_ends_what_a_killed_run_left(rig: Rig, name: str) -> None:
    case: Case = CASES[name]
    case.prepare(rig)
    rig.keep()
    if case.ready:
        case.ready(rig)
    points = rig.do(case.op, **case.args)["result"]["points"]
    met: set[tuple[str, str, str]] = set()
    wrong: list[str] = []
    for number, point in enumerate(points, 1):
        # Between a commit and the next nothing but what was carried out at Proxmox VE differs.
        if not re.match("after (commit|POST|PUT|DELETE)", point):
            continue
        rig.restore()
        if case.ready:
            case.ready(rig)
        rig.do(case.op, kill=number, **case.args)
        entries = unfinished(rig)
        seen = {(kind, phase, f"{more} {point.split()[1]}") for kind, phase, more in entries}
        if seen <= met:
            continue
        met |= seen
        # A workspace counts as left over once its doubt_window is over.
        time.sleep(1.2 if any(kind == "workspace" for kind, _phase, _more in entries) else 0)
        rig.well()
        try:
            told = follower(rig).follow(lambda vmid: rig.in_loop(lambda: rig.pve.remove_vm(vmid)))
            if not told:
                wrong.append(f"{number} {entries}: the doctor says nothing")
        except AssertionError as error:
            wrong.append(f"{number} {entries}: {error}")
        left = unfinished(rig)
        if left:
            wrong.append(f"{number} {entries}: {left} is left")
        wrong += [f"{number} {entries}: {problem}" for problem in rig.broken(settled=False)]
    assert not wrong, "\n".join(wrong)
    assert {(kind, phase) for kind, phase, _more in met} >= KILLED[name], met


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.check_promises()
    made.stop()


def time_out_cloning(lab: Lab) -> tuple[str, str]:
    lab.pve.next_task("qmclone", "slow", seconds=2.5)
    return "create", "waiting"


def time_out_waiting_for_the_address(lab: Lab) -> tuple[str, str]:
    lab.pve.agent_default = False
    return "create", "awaited"


@pytest.mark.parametrize("way", ["run again", "destroy"])
@pytest.mark.parametrize("time_out", [time_out_cloning, time_out_waiting_for_the_address])
def test_what_the_doctor_says_ends_what_timed_out(
    lab: Lab, time_out: Callable[[Lab], tuple[str, str]], way: str
) -> None:
    expected = time_out(lab)
    with pytest.raises(AgentlabError, match="un again"):
        lab.create("a1", wait_for_ip=True, options={"wait_timeout": "1s"})
    assert [(row["kind"], row["phase"]) for row in lab.leftovers()["operations"]] == [expected]
    lab.pve.agent_default = True
    if expected[1] == "awaited":
        # The guest agent is up at last.
        lab.pve.start_agent(lab.pve.vm(1000))
    if way == "destroy":
        # A destroy of a clone that runs says when to come again.
        time.sleep(2)
    settings = config.load({**lab.options, "database": lab.database}, lab.server.environment(lab.folder))
    told = Follower(
        lambda: examine_work(settings),
        lab.reconcile,
        lambda vmid: str(lab.destroy(vmid, force=True)[0].message),
        (lambda: lab.create("a1", wait_for_ip=True, options={"wait_timeout": "30s"})) if way == "run again" else None,
    ).follow(lab.pve.remove_vm)
    assert told and RUN_AGAIN in told[0]
    assert lab.leftovers() == {"claims": [], "operations": []}
    assert lab.records()[0].state == ("RUNNING" if way == "run again" else "DESTROYED")


def test_every_phase_of_the_journal_is_walked() -> None:
    """Each phase that store/journal.py names is met above (tests/repository/test_journal_phases.py: it names all)."""
    walked = {phase for phases in KILLED.values() for kind, phase in phases if kind != "workspace"}
    walked |= {phase for _kind, phase in TIMED_OUT}
    assert {word for name, word in vars(journal).items() if name.isupper() and isinstance(word, str)} == walked
    # Kinds: creation, destroy, and the operations of power.
    kinds = {kind for phases in KILLED.values() for kind, _phase in phases}
    assert set(power.TARGETS) - {"complete", "fail"} <= kinds and {"create", "destroy"} <= kinds
