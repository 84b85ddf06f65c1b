# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The operations that errors are tried on, their requests, the errors of each request, and their injection."""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.workspaces import UNFINISHED, Workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.lab import Lab

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
NOTHING_LEFT = {"claims": [], "operations": []}
USER_DATA = "#cloud-config\nhostname: a1\n"


def template_of(path: str) -> str:
    """The kind of a request: names and numbers replaced."""
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path.removeprefix("/api2/json"))
    path = re.sub(r"/content/[^/]+", "/content/{volume}", path)
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", re.sub(r"^/nodes/[^/]+", "/nodes/{node}", path))


@dataclass
class Operation:
    """How to get there, what to do, and what is so when it was done."""

    prepare: Callable[[Lab], Any]
    run: Callable[[Lab], Any]
    done: Callable[[Lab], bool]


def state(*wanted: str, power: str | None = None) -> Callable[[Lab], bool]:
    """Return a check: the newest sandbox a1 has one of these states, and its VM that power state (None: any)."""

    def done(lab: Lab) -> bool:
        sandboxes = [sandbox for sandbox in lab.records() if sandbox.name == "a1"]
        vm = lab.pve.vm(sandboxes[-1].vmid) if sandboxes else None
        # The record alone is not enough: the VM must be so too.
        return vm is not None and sandboxes[-1].state in wanted and power in (None, vm.qmpstatus)

    return done


def gone(lab: Lab) -> bool:
    """Return whether all records are DESTROYED and have no VM."""
    return all(sandbox.state == "DESTROYED" and lab.pve.vm(sandbox.vmid) is None for sandbox in lab.records())


def create_again(lab: Lab, **values: Any) -> Any:
    """As a play that is run again would: what failed for good is removed first."""
    for sandbox in lab.records():
        if sandbox.live and sandbox.state == "FAILED":
            outcomes = lab.destroy(sandbox.vmid, force=True)
            if outcomes[0].failed:
                return outcomes
    return lab.create(**{"memory": 1024, "disk_size": "20G", "wait_for_ip": True, **values})


def several(make: Callable[[Lab, str], Any]) -> Callable[[Lab], Any]:
    """Return a preparation that calls ``make`` for three sandboxes."""
    return lambda lab: [make(lab, name) for name in ("a1", "b1", "c1")]


def drift(lab: Lab) -> None:
    """Switch off the sandbox's VM and remove the VM with the next VMID, unknown to the records."""
    vm = lab.pve.vm(VMID)
    vm.status = vm.qmpstatus = "stopped"
    lab.pve.vms.remove(lab.pve.vm(VMID + 1))


CLEANUP = rules.Policy(enabled=True, rules=(rules.CleanupRule("over", rules.DESTROY, states=("TIMEOUT",)),))


def disk(lab: Lab) -> Workspace | None:
    """Return the record of the workspace w1, or None."""
    return workspace.open_records(lab.context()).find("w1")


def disk_is(*wanted: str) -> Callable[[Lab], bool]:
    """Return a check: the workspace w1 has one of these states (None: it has no record)."""

    def done(lab: Lab) -> bool:
        volume = disk(lab)
        return (volume.state if volume else None) in wanted

    return done


def make_disk(lab: Lab) -> Any:
    """Create the workspace w1."""
    return workspace.ensure_present(lab.context(), "w1", size="1G", storage="local-lvm")


def attach(lab: Lab) -> Any:
    """Attach the workspace w1 to the sandbox."""
    ctx = lab.context()
    return workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(name="a1"))


def grown(lab: Lab) -> bool:
    """Return whether the workspace w1 has grown to 2 GiB."""
    volume = disk(lab)
    return volume is not None and volume.size == 2 * 1024**3


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
        lambda lab: workspace.ensure_present(lab.context(), "w1", size="2G"),
        grown,
    ),
    "workspace detached": Operation(
        lambda lab: (make_disk(lab), lab.create(workspace="w1")),
        lambda lab: workspace.ensure_detached(lab.context(), "w1"),
        disk_is("DETACHED"),
    ),
    "workspace absent": Operation(
        make_disk, lambda lab: workspace.ensure_absent(lab.context(), "w1", force=True), disk_is(None)
    ),
}


@dataclass(frozen=True)
class Asked:
    """A request of a good run: the ``number``-th of its method and path (0 is the first)."""

    method: str
    path: str
    number: int

    @property
    def kind(self) -> str:
        """Return method and path with names and numbers replaced."""
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
    requests: dict[str, list[Asked]] = {}
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
                requests[name] = []
                for method, path, _dummy in lab.pve.requests:
                    place = (method, where(path.removeprefix("/api2/json")))
                    requests[name].append(Asked(method, path.removeprefix("/api2/json"), seen[place]))
                    seen[place] += 1
        finally:
            lab.stop()
    return requests


def one_of_each(asked: list[Asked]) -> list[Asked]:
    """The first of each kind, and each write to a configuration: those are different requests with one path."""
    kinds: dict[Any, Asked] = {}
    for request in asked:
        kinds.setdefault(
            (
                request.kind,
                request.number if request.kind.startswith("PUT") and f"/qemu/{VMID}/config" in request.path else 0,
            ),
            request,
        )
    return list(kinds.values())


def where(path: str) -> str:
    """A pattern of the end of the path: a task's has its id in it, which every run makes anew, and a volume's name
    its workspace's.
    """
    return r"/tasks/[^/]+/status" if "/tasks/" in path else re.sub(r"ws\\-[0-9a-f\\-]{8,}", ".*", re.escape(path))


def faults_for(lab: Lab, asked: Asked) -> list[tuple[str, str]]:
    """(kind, value) of everything that can go wrong with such a request."""
    faults = [("error", error["name"]) for error in lab.pve.errors_for(asked.method, asked.path)]
    faults += [("status", str(status)) for status in STATUSES]
    faults += [("broken", kind) for kind in BROKEN]
    if asked.method in ("POST", "DELETE") and "/qemu/" in asked.path:
        faults += [("task", ending) for ending in ENDINGS]
    return faults


def task_of(path: str) -> str:
    """Return the type of the task that a request begins."""
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
        """Arm each fault whose request comes now. The double calls this before each request."""
        path = path.removeprefix("/api2/json")
        for fault in list(self.waiting):
            if fault.asked.method == method and re.search(where(fault.asked.path) + "$", path):
                place = (method, where(fault.asked.path))
                if self.seen[place] >= fault.asked.number:
                    self.waiting.remove(fault)
                    self.met[fault] = self.arm(fault, path)
        for place in {(fault_ahead.asked.method, where(fault_ahead.asked.path)) for fault_ahead in self.waiting}:
            if place[0] == method and re.search(place[1] + "$", path):
                self.seen[place] += 1

    def arm(self, fault: Fault, path: str) -> Callable[[], bool]:
        """Let this request go wrong, and return a function that says whether the fault came to pass."""
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
        """Let the next tasks of a type end as ``value`` says, and return whether one did."""
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
        """Let the double forget finished tasks of the types that are to vanish."""
        for upid in [task["upid"] for task in self.pve.tasklog if task["type"] in self.vanishing]:
            self.pve.forget_task(upid)
            self.pve.spoiled.add(upid)

    def any_met(self) -> bool:
        """Return whether any fault came to pass."""
        return any(met() for met in self.met.values())


def settled(lab: Lab) -> bool:
    """Return whether nothing is unfinished: no claim, no journal entry, no unfinished workspace, no stray snippet."""
    ctx = lab.context()
    if any(row.state in UNFINISHED for row in workspace.open_records(ctx).find_all()):
        return False
    wanted = {os.path.basename(row.snippet) for row in lab.records() if row.live and row.snippet}
    return (
        lab.leftovers() == NOTHING_LEFT
        and not lab.unrecorded()
        and set(os.listdir(lab.options["snippets_dir"])) == wanted
    )


def laboratory(folder: Path) -> Lab:
    """Return a laboratory in ``folder`` that has everything the operations need."""
    snippets = folder / "snippets"
    snippets.mkdir(mode=0o755)
    made = Lab(folder, snippets_dir=str(snippets))
    made.pve.hold_snippets(str(snippets))
    return made


def reset(lab: Lab) -> None:
    """Put the laboratory back to its start."""
    lab.reset()
    for name in os.listdir(lab.options["snippets_dir"]):
        os.unlink(os.path.join(lab.options["snippets_dir"], name))
