# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every error that Proxmox can give, to every request that every operation makes.

The requests are those that a good run was seen to make; the errors are those that the double knows for each of them, and what a network
does. After each: the answer is an error with a sentence or success, no record says DESTROYED while its VM exists, nobody else was touched,
and without the fault the next runs bring everything to its end.

There are thousands of combinations. ``AGENTLAB_FAULTS=all`` runs them all; otherwise every n-th of each request's errors is taken (a fixed
stride, beginning at another place for each request, so that together they still cover each kind).
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome

from support.lab import Lab

pytestmark = pytest.mark.faults

STATUSES = (400, 401, 403, 404, 500, 501, 502, 503, 504, 595, 596, 599)
BROKEN = ("cut-before", "cut-after", "truncate", "html", "null", "hang", "hang-and-do")
ENDINGS = ("fails", "unexpected status", "WARNINGS: 1", "vanished", "hang")
VMID = 1000
# Cases of one operation and request that are run (of those there are).
SAMPLE = 10**9 if os.environ.get("AGENTLAB_FAULTS") == "all" else 7


def template_of(path: str) -> str:
    """The kind of a request: names and numbers replaced."""
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path.removeprefix("/api2/json"))
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", re.sub(r"^/nodes/[^/]+", "/nodes/{node}", path))


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
    return lab.pve.vm(VMID) is None and all(one.state == "DESTROYED" for one in lab.records())


def create_again(lab: Lab) -> Any:
    """As a play that is run again would: what failed for good is removed first."""
    for one in lab.records():
        if one.live and one.state == "FAILED":
            lab.destroy(one.vmid, force=True)
    return lab.create(memory=1024, disk_size="20G", wait_for_ip=True)


OPERATIONS = {
    "create": Operation(lambda lab: None, create_again, state("RUNNING", power="running")),
    "stop": Operation(lambda lab: lab.create(), lambda lab: lab.power("stop", VMID), state("STOPPED", power="stopped")),
    "start": Operation(lambda lab: (lab.create(), lab.power("stop", VMID)), lambda lab: lab.power("start", VMID), state("RUNNING", power="running")),
    "suspend": Operation(lambda lab: lab.create(), lambda lab: lab.power("suspend", VMID), state("SUSPENDED")),
    "resume": Operation(lambda lab: (lab.create(), lab.power("suspend", VMID)), lambda lab: lab.power("start", VMID), state("RUNNING", power="running")),
    "destroy": Operation(lambda lab: lab.create(), lambda lab: lab.destroy(VMID, force=True), gone),
    "prune": Operation(lambda lab: lab.timed_out(), lambda lab: lab.prune(), gone),
    "expire": Operation(lambda lab: (lab.create(), lab.force_state(VMID, "RUNNING", lease_expires_at=int(time.time()) - 5)), lambda lab: lab.expire(),
                        state("TIMEOUT", power="stopped")),
    "reconcile": Operation(lambda lab: (lab.create(), lab.create("b1"), drift(lab)), lambda lab: lab.reconcile(), state("STOPPED", "FAILED")),
    "info": Operation(lambda lab: (lab.create(), lab.create("b1"), drift(lab)), lambda lab: lab.info(), state("RUNNING")),
}


def drift(lab: Lab) -> None:
    vm = lab.pve.vm(VMID)
    vm.status = vm.qmpstatus = "stopped"
    lab.pve.vms.remove(lab.pve.vm(VMID + 1))


@functools.cache
def good_requests() -> dict[str, list[tuple[str, str]]]:
    """(method, path) of one request of each kind that a good run of each operation makes, in their order."""
    found: dict[str, list[tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder)
        try:
            for name, operation in OPERATIONS.items():
                lab.reset()
                operation.prepare(lab)
                lab.pve.requests.clear()
                operation.run(lab)
                assert operation.done(lab), name
                kinds: dict[str, tuple[str, str]] = {}
                for method, path, _dummy in lab.pve.requests:
                    kinds.setdefault(f"{method} {template_of(path)}", (method, path.removeprefix("/api2/json")))
                found[name] = list(kinds.values())
        finally:
            lab.stop()
    return found


def faults_for(lab: Lab, method: str, path: str) -> list[tuple[str, str]]:
    """(kind, value) of everything that can go wrong with such a request."""
    found = [("error", one["name"]) for one in lab.pve.errors_for(method, path)]
    found += [("status", str(status)) for status in STATUSES]
    found += [("broken", kind) for kind in BROKEN]
    if method in ("POST", "DELETE"):
        found += [("task", ending) for ending in ENDINGS]
    return found


def inject(lab: Lab, method: str, path: str, kind: str, value: str, times: int) -> None:
    suffix = re.escape(re.sub(r"/tasks/.*", "/status", path)) if "/tasks/" in path else re.escape(path)
    if kind == "error":
        # A task's path has its id in it, which every run makes anew: by the end of the path then.
        lab.pve.fail(method, "/status" if "/tasks/" in path else path, error=value, times=times)
    elif kind == "status":
        lab.pve.fault(method, ".*/status" if "/tasks/" in path else suffix, "answer", status=int(value), body='{"data":null,"message":"injected"}', times=times)
    elif kind == "broken":
        where = ".*/status" if "/tasks/" in path else suffix
        if value == "html":
            lab.pve.fault(method, where, "answer", status=200, body="<html>Login</html>", type="text/html", times=times)
        elif value == "null":
            lab.pve.fault(method, where, "answer", status=200, body='{"data":null}', times=times)
        elif value.startswith("hang"):
            lab.pve.fault(method, where, "hang", seconds=1.3, carry_out=value == "hang-and-do", times=1)
        else:
            lab.pve.fault(method, where, value, times=times)
    else:
        kinds = {"clone": "qmclone", "start": "qmstart", "stop": "qmstop", "shutdown": "qmshutdown", "suspend": "qmsuspend", "resume": "qmresume"}
        task = kinds.get(path.rpartition("/")[2], "qmdestroy")
        if value == "WARNINGS: 1":
            lab.pve.task_warnings[task] = 1
        elif value == "vanished":
            def vanish(method_: str, path_: str) -> None:
                for upid in [one["upid"] for one in lab.pve.tasklog if one["type"] == task]:
                    lab.pve.forget_task(upid)
                    lab.pve.spoiled.add(upid)

            lab.pve.after = vanish
        else:
            # What failed, died or hangs here has done its work all the same: the worst case for whoever believes the status alone.
            lab.pve.task_endings[task] = "the disk is on fire" if value == "fails" else value


def failures(found: Any) -> list[Outcome]:
    """What an answer says has failed."""
    items = found if isinstance(found, list) else [found]
    out = [one for one in items if isinstance(one, Outcome) and one.failed]
    for name in ("failed", "kept"):
        out += [one for one in getattr(found, name, []) or [] if isinstance(one, Outcome)] if not isinstance(found, Outcome) else []
    return out


def attempt(work: Callable[[], Any], problems: list[str], what: str) -> None:
    """Success, a failed outcome with a sentence, or one of our errors with a sentence: nothing else."""
    try:
        for one in failures(work()):
            if not one.message:
                problems.append(f"{what}: {one.outcome} without a message")
    except AgentlabError as error:
        if not error.message:
            problems.append(f"{what}: {type(error).__name__} without a message")
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {error}")


def one_case(lab: Lab, operation: Operation, method: str, path: str, kind: str, value: str, times: int, met: list[bool]) -> list[str]:
    """Run the operation under the fault (``met``: whether it came to that), then without it until it is done; what was not as promised."""
    problems: list[str] = []
    lab.reset()
    operation.prepare(lab)
    inject(lab, method, path, kind, value, times)
    if value.startswith("hang") or kind == "task":
        lab.options.update(api_timeout=1, wait_timeout="1s")
    try:
        attempt(lambda: operation.run(lab), problems, "under the fault")
        promises(lab, problems, "under the fault")
        met.append(bool(lab.pve.spoiled) if kind == "task" else all((one["times"] or 0) < times for one in (*lab.pve.faults, *lab.pve.failures.values())))
    finally:
        lab.options.update(api_timeout=5, wait_timeout="5s")
    lab.calm()
    for number in range(3):
        attempt(lambda: operation.run(lab), problems, f"run {number + 1} after")
        promises(lab, problems, f"run {number + 1} after")
        if operation.done(lab) and settled(lab):
            return problems
        time.sleep(0.4 if number else 1.05)
        attempt(lab.reconcile, problems, f"reconcile {number + 1}")
        promises(lab, problems, f"reconcile {number + 1}")
        if operation.done(lab) and settled(lab):
            return problems
    seen = [(one.name, one.state, one.reason) for one in lab.records()]
    problems.append(f"did not converge: {seen}, left {lab.leftovers()}, unrecorded {lab.unrecorded()}")
    return problems


def settled(lab: Lab) -> bool:
    return lab.leftovers() == {"claims": [], "operations": []} and not lab.unrecorded()


def promises(lab: Lab, problems: list[str], what: str) -> None:
    try:
        lab.check_promises()
    except AssertionError as error:
        problems.append(f"{what}: {error}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.stop()


@pytest.mark.parametrize("times", [1, 99], ids=["once", "lasting"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_error_to_every_request(lab: Lab, request: pytest.FixtureRequest, name: str, times: int) -> None:
    requests = good_requests()[name]
    assert requests
    bad: list[str] = []
    row: Counter[str]
    for place, (method, path) in enumerate(requests):
        known = faults_for(lab, method, path)
        stride = max(1, -(-len(known) // SAMPLE))
        chosen = known[(place + (times > 1) * stride // 2) % stride::stride]
        row = Counter(known=len(known), cases=0, met=0, passed=0)
        for kind, value in chosen:
            met: list[bool] = []
            problems = one_case(lab, OPERATIONS[name], method, path, kind, value, times, met)
            row["cases"] += 1
            row["met"] += all(met)
            row["passed"] += not problems
            bad += [f"{method} {path} {kind} {value}: {problem}" for problem in problems]
        # For the table at the end of the run.
        request.node.user_properties.append(("faults", [f"{name} ({'once' if times == 1 else 'lasting'}): {method} {template_of(path)}", dict(row)]))
    assert not bad, f"{len(bad)} problems\n" + "\n".join(bad)
