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

import functools
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.workspaces import UNFINISHED, Workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from faults.conftest import SEED
from support.lab import Lab

pytestmark = pytest.mark.faults

STATUSES = (400, 401, 403, 404, 500, 501, 502, 503, 504, 595, 596, 599)
BROKEN = ("cut-before", "cut-after", "truncate", "html", "null", "hang", "hang-and-do")
ENDINGS = ("fails", "unexpected status", "WARNINGS: 1", "vanished", "hang")
TASKS = {
    "clone": "qmclone",
    "start": "qmstart",
    "stop": "qmstop",
    "shutdown": "qmshutdown",
    "suspend": "qmpause",
    "resume": "qmresume",
}
VMID = 1000
ALL = os.environ.get("AGENTLAB_FAULTS") == "all"
# Cases of one operation and request that are run (of those there are), and random combinations of one operation.
SAMPLE = 10**9 if ALL else 3
TOGETHER = 60 if ALL else 5
SLOW = 40 if ALL else 3
# The requests of one operation are divided among so many tests, so that several processes have something to do.
PARTS = 3
NOTHING_LEFT = {"claims": [], "operations": []}
USER_DATA = "#cloud-config\nhostname: a1\n"


def template_of(path: str) -> str:
    """The kind of a request: names and numbers replaced."""
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path.removeprefix("/api2/json"))
    path = re.sub(r"/content/[^/]+", "/content/{volume}", path)
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", re.sub(r"^/nodes/[^/]+", "/nodes/{node}", path))


# ---- the operations ----


@dataclass
class Operation:
    """How to get there, what to do, and what is so when it was done."""

    prepare: Callable[[Lab], Any]
    run: Callable[[Lab], Any]
    done: Callable[[Lab], bool]


def state(*wanted: str, power: str | None = None) -> Callable[[Lab], bool]:
    def done(lab: Lab) -> bool:
        found = [one for one in lab.records() if one.name == "a1"]
        vm = lab.pve.vm(found[-1].vmid) if found else None
        # The record alone is not enough: the VM must be so too.
        return vm is not None and found[-1].state in wanted and power in (None, vm.qmpstatus)

    return done


def gone(lab: Lab) -> bool:
    return all(one.state == "DESTROYED" and lab.pve.vm(one.vmid) is None for one in lab.records())


def create_again(lab: Lab, **values: Any) -> Any:
    """As a play that is run again would: what failed for good is removed first."""
    for one in lab.records():
        if one.live and one.state == "FAILED":
            left = lab.destroy(one.vmid, force=True)
            if left[0].failed:
                return left
    return lab.create(**{"memory": 1024, "disk_size": "20G", "wait_for_ip": True, **values})


def several(make: Callable[[Lab, str], Any]) -> Callable[[Lab], Any]:
    return lambda lab: [make(lab, name) for name in ("a1", "b1", "c1")]


def drift(lab: Lab) -> None:
    vm = lab.pve.vm(VMID)
    vm.status = vm.qmpstatus = "stopped"
    lab.pve.vms.remove(lab.pve.vm(VMID + 1))


CLEANUP = rules.Policy(enabled=True, rules=(rules.CleanupRule("over", rules.DESTROY, states=("TIMEOUT",)),))


def disk(lab: Lab) -> Workspace | None:
    return workspace.records(lab.context()).find("w1")


def disk_is(*wanted: str) -> Callable[[Lab], bool]:
    def done(lab: Lab) -> bool:
        found = disk(lab)
        return (found.state if found else None) in wanted

    return done


def make_disk(lab: Lab) -> Any:
    return workspace.present(lab.context(), "w1", size="1G", storage="local-lvm")


def attach(lab: Lab) -> Any:
    ctx = lab.context()
    return workspace.attached(ctx, "w1", ctx.select(name="a1"))


def grown(lab: Lab) -> bool:
    found = disk(lab)
    return found is not None and found.size == 2 * 1024**3


OPERATIONS = {
    "create": Operation(lambda lab: None, create_again, state("RUNNING", power="running")),
    "create with user data": Operation(
        lambda lab: None,
        lambda lab: create_again(lab, cloud_init_user_data=USER_DATA, wait_for_cloud_init=True),
        state("RUNNING", power="running"),
    ),
    "create with a workspace": Operation(
        make_disk,
        lambda lab: create_again(lab, workspace="w1"),
        lambda lab: state("RUNNING", power="running")(lab) and disk_is("ATTACHED")(lab),
    ),
    "stop": Operation(lambda lab: lab.create(), lambda lab: lab.power("stop", VMID), state("STOPPED", power="stopped")),
    "start": Operation(
        lambda lab: (lab.create(), lab.power("stop", VMID)),
        lambda lab: lab.power("start", VMID),
        state("RUNNING", power="running"),
    ),
    "suspend": Operation(lambda lab: lab.create(), lambda lab: lab.power("suspend", VMID), state("SUSPENDED")),
    "resume": Operation(
        lambda lab: (lab.create(), lab.power("suspend", VMID)),
        lambda lab: lab.power("start", VMID),
        state("RUNNING", power="running"),
    ),
    "destroy": Operation(lambda lab: lab.create(), lambda lab: lab.destroy(VMID, force=True), gone),
    "destroy several": Operation(
        several(lambda lab, name: lab.create(name)), lambda lab: lab.destroy(VMID, VMID + 1, VMID + 2, force=True), gone
    ),
    "destroy with user data and workspace": Operation(
        lambda lab: (make_disk(lab), lab.create(cloud_init_user_data=USER_DATA, workspace="w1")),
        lambda lab: lab.destroy(VMID, force=True),
        lambda lab: gone(lab) and disk_is("DETACHED")(lab),
    ),
    "prune": Operation(lambda lab: lab.timed_out(), lambda lab: lab.prune(), gone),
    "prune several": Operation(several(lambda lab, name: lab.timed_out(name)), lambda lab: lab.prune(), gone),
    "cleanup": Operation(
        several(lambda lab, name: lab.timed_out(name)), lambda lab: cleanup.run(lab.context(), CLEANUP), gone
    ),
    "expire": Operation(
        lambda lab: (lab.create(), lab.force_state(VMID, "RUNNING", lease_expires_at=int(time.time()) - 5)),
        lambda lab: lab.expire(),
        state("TIMEOUT", power="stopped"),
    ),
    "reconcile": Operation(
        lambda lab: (lab.create(), lab.create("b1"), drift(lab)),
        lambda lab: lab.reconcile(),
        state("STOPPED", "FAILED"),
    ),
    "info": Operation(
        lambda lab: (lab.create(), lab.create("b1"), drift(lab)), lambda lab: lab.info(), state("RUNNING")
    ),
    "workspace present": Operation(lambda lab: lab.create(), make_disk, disk_is("DETACHED")),
    "workspace attached": Operation(lambda lab: (make_disk(lab), lab.create()), attach, disk_is("ATTACHED")),
    "workspace grown": Operation(
        lambda lab: (make_disk(lab), lab.create(workspace="w1")),
        lambda lab: workspace.present(lab.context(), "w1", size="2G"),
        grown,
    ),
    "workspace detached": Operation(
        lambda lab: (make_disk(lab), lab.create(workspace="w1")),
        lambda lab: workspace.detached(lab.context(), "w1"),
        disk_is("DETACHED"),
    ),
    "workspace absent": Operation(
        make_disk, lambda lab: workspace.absent(lab.context(), "w1", force=True), disk_is(None)
    ),
}


# ---- the requests and what can go wrong with them ----


@dataclass(frozen=True)
class Asked:
    """A request of a good run: the ``number``-th of its method and path (0 is the first)."""

    method: str
    path: str
    number: int

    @property
    def kind(self) -> str:
        return f"{self.method} {template_of(self.path)}"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request, and how often from then on."""

    asked: Asked
    kind: str
    value: str
    times: int

    def __str__(self) -> str:
        return f"{self.asked.method} {self.asked.path} #{self.asked.number + 1} {self.kind} {self.value} x{self.times}"


@functools.cache
def good_requests() -> dict[str, list[Asked]]:
    """Every request that a good run of each operation makes, in their order."""
    found: dict[str, list[Asked]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = laboratory(Path(folder))
        try:
            for name, operation in OPERATIONS.items():
                reset(lab)
                operation.prepare(lab)
                lab.pve.requests.clear()
                operation.run(lab)
                assert operation.done(lab) and settled(lab), name
                seen: Counter[tuple[str, str]] = Counter()
                found[name] = []
                for method, path, _dummy in lab.pve.requests:
                    place = (method, where(path.removeprefix("/api2/json")))
                    found[name].append(Asked(method, path.removeprefix("/api2/json"), seen[place]))
                    seen[place] += 1
        finally:
            lab.stop()
    return found


def one_of_each(asked: list[Asked]) -> list[Asked]:
    """The first of each kind, and each write to a configuration: those are different requests with one path."""
    kinds: dict[Any, Asked] = {}
    for one in asked:
        kinds.setdefault(
            (one.kind, one.number if one.kind.startswith("PUT") and f"/qemu/{VMID}/config" in one.path else 0), one
        )
    return list(kinds.values())


def where(path: str) -> str:
    """A pattern of the end of the path: a task's has its id in it, which every run makes anew, and a volume's name
    its workspace's.
    """
    return r"/tasks/[^/]+/status" if "/tasks/" in path else re.sub(r"ws\\-[0-9a-f\\-]{8,}", ".*", re.escape(path))


def faults_for(lab: Lab, asked: Asked) -> list[tuple[str, str]]:
    """(kind, value) of everything that can go wrong with such a request."""
    found = [("error", one["name"]) for one in lab.pve.errors_for(asked.method, asked.path)]
    found += [("status", str(status)) for status in STATUSES]
    found += [("broken", kind) for kind in BROKEN]
    if asked.method in ("POST", "DELETE") and "/qemu/" in asked.path:
        found += [("task", ending) for ending in ENDINGS]
    return found


def task_of(path: str) -> str:
    return TASKS.get(path.rpartition("/")[2], "qmdestroy")


class Injector:
    """Waits for the requests whose turn it is to go wrong, and knows which of the faults came to pass."""

    def __init__(self, lab: Lab, faults: list[Fault]) -> None:
        self.pve = lab.pve
        self.waiting = list(faults)
        self.seen: Counter[tuple[str, str]] = Counter()
        self.met: dict[Fault, Callable[[], bool]] = {}
        self.vanishing: set[str] = set()
        self.pve.before, self.pve.after = self.before, self.vanish

    def before(self, method: str, path: str) -> None:
        path = path.removeprefix("/api2/json")
        for fault in list(self.waiting):
            if fault.asked.method == method and re.search(where(fault.asked.path) + "$", path):
                place = (method, where(fault.asked.path))
                if self.seen[place] >= fault.asked.number:
                    self.waiting.remove(fault)
                    self.met[fault] = self.arm(fault, path)
        for place in {(one.asked.method, where(one.asked.path)) for one in self.waiting}:
            if place[0] == method and re.search(place[1] + "$", path):
                self.seen[place] += 1

    def arm(self, fault: Fault, path: str) -> Callable[[], bool]:
        method, suffix, times = fault.asked.method, where(fault.asked.path), fault.times
        if fault.kind == "error":
            self.pve.fail(method, path, error=fault.value, times=times)
            return lambda: ((self.pve.failures.get((method, path)) or {"times": 0})["times"] or 0) < times
        if fault.kind == "task":
            return self.arm_task(task_of(path), fault.value)
        values: dict[str, Any] = {"kind": fault.value, "times": times}
        if fault.kind == "status":
            values.update(kind="answer", status=int(fault.value), body='{"data":null,"message":"injected"}')
        elif fault.value == "html":
            values.update(kind="answer", status=200, body="<html>Login</html>", type="text/html")
        elif fault.value == "null":
            values.update(kind="answer", status=200, body='{"data":null}')
        elif fault.value.startswith("hang"):
            values.update(kind="hang", seconds=1.3, carry_out=fault.value == "hang-and-do", times=1)
        entry = self.pve.fault(method, suffix, **values)
        return lambda: entry["times"] < values["times"]

    def arm_task(self, kind: str, value: str) -> Callable[[], bool]:
        if value == "WARNINGS: 1":
            self.pve.task_warnings[kind] = 1
        elif value == "vanished":
            self.vanishing.add(kind)
        else:
            # What failed, died or hangs here has done its work all the same: the worst case for whoever believes the
            # status alone.
            self.pve.task_endings[kind] = "the disk is on fire" if value == "fails" else value
        return lambda: any(self.pve.tasks[upid]["type"] == kind for upid in self.pve.spoiled if upid in self.pve.tasks)

    def vanish(self, _method: str, _path: str) -> None:
        for upid in [one["upid"] for one in self.pve.tasklog if one["type"] in self.vanishing]:
            self.pve.forget_task(upid)
            self.pve.spoiled.add(upid)

    def any_met(self) -> bool:
        return any(met() for met in self.met.values())


# ---- one case ----


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
                r"its clone task (UPID:\S+) is still running|clone template .* task (UPID:\S+) on node .* stop it there if it hangs",
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


def settled(lab: Lab) -> bool:
    ctx = lab.context()
    if any(one.state in UNFINISHED for one in workspace.records(ctx).find_all()):
        return False
    wanted = {os.path.basename(one.snippet) for one in lab.records() if one.live and one.snippet}
    return (
        lab.leftovers() == NOTHING_LEFT
        and not lab.unrecorded()
        and set(os.listdir(lab.options["snippets_dir"])) == wanted
    )


def laboratory(folder: Path) -> Lab:
    snippets = folder / "snippets"
    snippets.mkdir(mode=0o755)
    made = Lab(folder, snippets_dir=str(snippets))
    made.pve.hold_snippets(str(snippets))
    return made


def reset(lab: Lab) -> None:
    lab.reset()
    for name in os.listdir(lab.options["snippets_dir"]):
        os.unlink(os.path.join(lab.options["snippets_dir"], name))


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
def test_every_error_to_every_request(lab: Lab, table: Table, name: str, times: int, part: int) -> None:
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
def test_several_errors_at_once(lab: Lab, table: Table, name: str) -> None:
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
def test_errors_while_tasks_are_slow(lab: Lab, table: Table, name: str) -> None:
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
