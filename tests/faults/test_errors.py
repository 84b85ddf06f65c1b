# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every error that Proxmox can give, to every request that every operation makes: one at a time, several at once,
and while tasks are slow.

The requests are those that a good run was seen to make; the errors are those that the double knows for each of them,
and what a network does. After each: the answer is an error with a sentence or success, no record says DESTROYED while
its VM exists, nobody else was touched, no workspace is lost or in two VMs, and without the fault the next runs bring
everything to its end - at most with what a message told the operator to do by hand, which is done to the letter and
counted.

There are thousands of combinations. ``AGENTLAB_FAULTS=all`` runs them all; otherwise every n-th of each request's
errors is taken (a fixed stride, beginning at another place for each request and each day, so that together they still
cover each kind). The day is the seed, which the table at the end names; ``AGENTLAB_FAULTS_SEED`` replays it.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome

from faults.conftest import SEED
from faults.error_support import (
    OPERATIONS,
    VMID,
    Fault,
    Injector,
    disk,
    faults_for,
    good_requests,
    laboratory,
    one_of_each,
    reset,
    settled,
    task_of,
)
from support.lab import Lab

pytestmark = pytest.mark.faults

ALL = os.environ.get("AGENTLAB_FAULTS") == "all"

# Cases of one operation and request that are run (of those there are), and random combinations of one operation.
SAMPLE = 10**9 if ALL else 3
TOGETHER = 60 if ALL else 5
SLOW = 40 if ALL else 3

# The requests of one operation are divided among so many tests, so that several processes have something to do.
PARTS = 3


def messages(found: Any) -> list[Outcome]:
    """What an answer says has failed or was kept."""
    items = found if isinstance(found, list) else [found]
    out = [one for one in items if isinstance(one, Outcome) and one.failed]
    for name in ("failed", "kept"):
        out += (
            [one for one in getattr(found, name, []) or [] if isinstance(one, Outcome)]
            if not isinstance(found, Outcome)
            else []
        )
    return out


class Trial:
    """One starting position, one operation, and what was not as promised."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name, self.operation = lab, name, OPERATIONS[name]
        self.problems: list[str] = []
        self.said: list[str] = []
        self.by_hand = 0
        reset(lab)
        self.operation.prepare(lab)
        self.disk = disk(lab)

    def attempt(self, work: Callable[[], Any], what: str) -> None:
        """Success, a failed outcome with a sentence, or one of our errors with a sentence: nothing else."""
        try:
            for one in messages(work()):
                self.said.append(one.message or "")
                if not one.message:
                    self.problems.append(f"{what}: {one.outcome} without a message")
        except AgentlabError as error:
            self.said.append(error.message)
            if not error.message:
                self.problems.append(f"{what}: {type(error).__name__} without a message")
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
        try:
            self.lab.check_promises()
            self.check_disk()
        except AssertionError as error:
            self.problems.append(f"{what}: {error}")

    def check_disk(self) -> None:
        if self.disk is not None:
            users = [
                vm.vmid
                for vm in self.lab.pve.vms
                if any(self.disk.volume in str(value) for value in vm.config.values())
            ]
            assert len(users) < 2, f"the workspace is in two VMs: {users}"
            if self.name != "workspace absent":
                assert self.lab.pve.volumes_of(self.disk.owner_vmid) == [self.disk.volume], "the workspace is lost"

    def finished(self) -> bool:
        return self.operation.done(self.lab) and settled(self.lab)

    def run(self, what: str) -> bool:
        self.attempt(lambda: self.operation.run(self.lab), what)
        return self.finished()

    def converge(self) -> None:
        """Without the fault: run it again as its user would, and reconcile; then, if a message says so, by hand."""
        for stage in range(3):
            for number in range(3):
                if self.run(f"run {number + 1} after"):
                    return
                time.sleep(0.4 if number else 1.05)
                self.attempt(self.lab.reconcile, f"reconcile {number + 1}")
                if self.finished():
                    return
            if stage == 2 or not self.as_told():
                break
        seen = [(one.name, one.state, one.reason) for one in self.lab.records()]
        self.problems.append(
            f"did not converge: {seen}, left {self.lab.leftovers()}, unrecorded {self.lab.unrecorded()}, said "
            f"{self.said[-2:]}"
        )

    def as_told(self) -> bool:
        """Do what the last messages tell the operator to do by hand; whether there was something."""
        told = "\n".join(self.said[-4:])
        done = False
        for upid in set(
            re.findall(
                r"its clone task (UPID:\S+) is still running|"
                r"clone template .* task (UPID:\S+) on node .* stop the task there if it hangs",
                told,
            )
        ):
            upid = upid[0] or upid[1]
            # It will never end by itself: stopped in Proxmox's own interface.
            if self.lab.pve.tasks[upid]["status"] == "running":
                self.lab.pve.tasks[upid].update(
                    status="stopped", exitstatus="interrupted by signal", endtime=int(time.time())
                )
                done = True
        for vmid in set(re.findall(r"not certain that VM (\d+) .*remove it by hand if it is to go", told)):
            done = self.lab.pve.remove_vm(int(vmid)) is not None or done
        self.by_hand += done
        return done


def one_case(trial: Trial, faults: list[Fault], *, impatient: bool = False) -> bool:
    """Run the operation under these faults, then without them until it is done; whether any of them came to pass."""
    lab = trial.lab
    injector = Injector(lab, faults)
    if impatient or any(fault.value.startswith("hang") or fault.kind == "task" for fault in faults):
        lab.options.update(api_timeout=1, wait_timeout="1s")
    try:
        trial.run("under the fault")
        met = injector.any_met()
        if met and len(faults) == 1 and f"/qemu/{VMID}" in faults[0].asked.path and lab.options["api_timeout"] > 1:
            # What went wrong with one item stopped no other.
            for one in lab.records() if trial.name in ("destroy several", "prune several", "cleanup") else []:
                if one.vmid != VMID and one.live:
                    trial.problems.append(f"under the fault: {one.name} was not destroyed")
    finally:
        lab.options.update(api_timeout=5, wait_timeout="5s")
    lab.calm()
    trial.converge()
    if trial.by_hand and not any(fault.kind == "task" and fault.asked.path.endswith("/clone") for fault in faults):
        # Only a clone that was made although Proxmox says that it was not is nobody's but the operator's to judge.
        trial.problems.append(f"needed the operator: {trial.said[-4:]}")
    return met


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = laboratory(tmp_path_factory.mktemp("lab"))
    yield made
    made.stop()


class Table:
    """The rows of the table at the end, and everything that went wrong."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request
        self.bad: list[str] = []

    def try_out(
        self, lab: Lab, name: str, title: str, cases: list[tuple[list[Fault], dict[str, float]]], known: int = 0
    ) -> None:
        row: Counter[str] = Counter({"known": known, "cases": 0, "met": 0, "passed": 0, "by hand": 0})
        for faults, slow in cases:
            trial = Trial(lab, name)
            for kind, seconds in slow.items():
                lab.pve.next_task(kind, "slow", seconds=seconds, times=99)
            met = one_case(trial, faults, impatient=bool(slow))
            row.update(cases=1, met=met, passed=not trial.problems, **{"by hand": trial.by_hand > 0})
            self.bad += [f"{name}: {', '.join(map(str, faults))} {slow or ''}: {problem}" for problem in trial.problems]
        self.request.node.user_properties.append(("faults", [title, dict(row)]))

    def check(self) -> None:
        assert not self.bad, f"AGENTLAB_FAULTS_SEED={SEED}: {len(self.bad)} problems\n" + "\n".join(self.bad)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return Table(request)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("times", [1, 99], ids=["once", "lasting"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_error_to_every_request_keeps_the_promises(
    lab: Lab, table: Table, name: str, times: int, part: int
) -> None:
    requests = one_of_each(good_requests()[name])
    assert requests
    for place, asked in list(enumerate(requests))[part::PARTS]:
        known = faults_for(lab, asked)
        stride = max(1, -(-len(known) // SAMPLE))
        chosen = known[(place + SEED + (times > 1) * stride // 2) % stride :: stride]
        table.try_out(
            lab,
            name,
            f"{name} ({'once' if times == 1 else 'lasting'}): {asked.kind}",
            known=len(known),
            cases=[([Fault(asked, kind, value, times)], {}) for kind, value in chosen],
        )
    table.check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_several_errors_at_once_keep_the_promises(lab: Lab, table: Table, name: str) -> None:
    """Two to four of them, at any of the requests that a good run makes, some once and some lasting."""
    dice = random.Random(f"{SEED} {name}")
    table.try_out(
        lab,
        name,
        f"{name} (several at once)",
        [(_some(lab, dice, name, dice.randint(2, 4)), {}) for _dummy in range(TOGETHER)],
    )
    table.check()


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in ("info", "workspace present", "workspace absent")]
)
def test_errors_while_tasks_are_slow_keep_the_promises(lab: Lab, table: Table, name: str) -> None:
    """Tasks that take a while, or longer than is waited for them, and one error or two besides."""
    dice = random.Random(f"{SEED} slow {name}")
    kinds = sorted(
        {
            task_of(asked.path)
            for asked in good_requests()[name]
            if asked.method in ("POST", "DELETE") and "/qemu/" in asked.path
        }
    )
    cases = [
        (_some(lab, dice, name, dice.randint(1, 2)), {kind: dice.choice((0.2, 1.4)) for kind in kinds})
        for _dummy in range(SLOW)
    ]
    table.try_out(lab, name, f"{name} (slow tasks and errors)", cases)
    table.check()


def _some(lab: Lab, dice: random.Random, name: str, count: int) -> list[Fault]:
    asked = dice.sample(good_requests()[name], min(count, len(good_requests()[name])))
    return [Fault(one, *dice.choice(faults_for(lab, one)), times=dice.choice((1, 1, 2, 99))) for one in asked]
