# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Crash anywhere: every operation is killed (SIGKILL) before and after each of its requests and commits, and then
simply run again.

A dry pass counts the points; each is then tried on the same starting position. Afterwards the promises must hold
(Rig.broken): no VM of ours without a live record, none that is recorded as DESTROYED and there, nothing of anybody else
touched, no claim or journal entry left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import SEED
from faults.crash_support import BYSTANDER, Rig
from support.engines import require_postgresql, server
from support.postgres import PostgresServer

pytestmark = pytest.mark.faults

GHOST = 1009
SAMPLE = 60
# Ends all other connections to the database.
CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    "pg_backend_pid()"
)
WHOLE = {
    "name": "crash",
    "ttl": 3600,
    "wait_for_ip": True,
    "cores": 4,
    "tags": ["x"],
    "bridge": "vmbr1",
    "disk_size": "20G",
}

USER_DATA = {"name": "crash", "ttl": 3600, "cloud_init_user_data": "#cloud-config\nhostname: crash\n"}

WITH_DISK = {"name": "crash", "ttl": 3600, "workspace": "w"}


class Case:
    """A starting position, the operation to kill in it, and what must be true once it was run again."""

    def __init__(
        self,
        prepare: Callable[[Rig], None],
        op: str,
        args: dict[str, Any],
        *,
        states: dict[str, str] | None = None,
        ready: Callable[[Rig], None] | None = None,
        after: Callable[[Rig], None] | None = None,
        ok: bool = True,
        again: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        self.prepare, self.op, self.args = prepare, op, args
        self.again = again or (op, args)
        self.states, self.ready, self.after, self.ok = states, ready, after, ok


def _empty(rig: Rig) -> None:
    rig.must("reconcile")


def _made(*names: str, states: dict[str, str] | None = None, **values: Any) -> Callable[[Rig], None]:
    """These sandboxes running; then moved on as a user would."""

    def prepare(rig: Rig) -> None:
        for name in names:
            rig.must("create", name=name, ttl=3600, vmid=GHOST if name == "ghost" else None, **values)
        for name, operation in (states or {}).items():
            rig.must("power", vmid=_vmid(rig, name), operation=operation)
        if "ghost" in names:
            # Removed by hand; somebody else's VM has its VMID since.
            rig.foreign(GHOST, name="ghost", running=True, tags="agentlab")

    return prepare


def _vmid(rig: Rig, name: str) -> int:
    return next(row["vmid"] for row in rig.records() if row["name"] == name and row["state"] != "DESTROYED")


def _over(rig: Rig) -> None:
    rig.sql("UPDATE sandboxes SET lease_expires_at = ?", int(time.time()) - 5)


def _timed_out(rig: Rig) -> None:
    _made("a", "b", "gone", "ghost")(rig)
    _over(rig)
    rig.must("expire")
    rig.in_loop(lambda: rig.pve.vms.remove(rig.pve.vm(_vmid(rig, "gone"))))


def _drifted(rig: Rig) -> None:
    """Everything that a reconcile has to mend, at once."""
    _made("down", "moved", "gone", "late", "cut", "ghost")(rig)
    rig.sql("UPDATE sandboxes SET lease_expires_at = ? WHERE name = 'late'", int(time.time()) - 5)
    cut = _vmid(rig, "cut")
    points = rig.do("destroy", vmids=[cut], force=True, kill=10**6)["result"]["points"]
    rig.must("create", name="cut", ttl=3600)
    cut = _vmid(rig, "cut")
    rig.do(
        "destroy",
        vmids=[cut],
        force=True,
        kill=next(i for i, label in enumerate(points, 1) if label.startswith("before DELETE")),
    )
    rig.do("create", name="half", ttl=3600, kill=_point(rig, "after POST", "create", name="half-dry", ttl=3600))
    down, moved, gone = (_vmid(rig, name) for name in ("down", "moved", "gone"))

    def work() -> None:
        rig.pve.add_node("pve2")
        rig.pve.vm(down).status = rig.pve.vm(down).qmpstatus = "stopped"
        rig.pve.vm(moved).node = "pve2"
        rig.pve.vms.remove(rig.pve.vm(gone))

    rig.in_loop(work)


def _point(rig: Rig, beginning: str, op: str, **args: Any) -> int:
    """The number of the first point of that kind, by a dry pass."""
    found = rig.must(op, **args)["points"]
    return next(number for number, label in enumerate(found, 1) if label.startswith(beginning))


def _one_vm(rig: Rig) -> None:
    ours = [vm.vmid for vm in rig.pve.vms if vm.vmid not in rig.bystanders and not vm.template]
    assert len(ours) == 1, f"not exactly one VM: {ours}"


def _stopped(*names: str) -> Callable[[Rig], None]:
    def look(rig: Rig) -> None:
        for name in names:
            vm = rig.pve.vm(_vmid(rig, name))
            assert vm.status == "stopped", f"{name} is {vm.status}"

    return look


def _taken(rig: Rig) -> None:
    """Somebody takes the chosen VMID between our look and our clone."""

    def before(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone") and rig.pve.vm(1001) is None:
            vm = rig.pve.make_foreign(1001, name="faster")
            rig.bystanders[1001] = {"config": dict(vm.config), "status": vm.status, "node": vm.node}

    rig.pve.before = before


def _start_fails(rig: Rig) -> None:
    rig.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"


def _half(rig: Rig) -> None:
    """A creation killed after its clone was carried out, before its task id was noted."""
    rig.do("create", name="crash", ttl=3600, kill=_point(rig, "after POST", "create", name="half-dry", ttl=3600))
    rig.must("destroy", vmids=[1001], force=True)


def _wait_for_doubt(rig: Rig) -> None:
    # A clone that was asked for may still appear for doubt_window; until then the answer is "run again in a second".
    if rig.sql("SELECT 1 FROM operations"):
        time.sleep(1.5)
        rig.must("reconcile")


def _settled(rig: Rig) -> None:
    """Given up (FAILED), finished or never begun: nothing in between.

    What is FAILED can be removed, and then created.
    """
    _wait_for_doubt(rig)
    for row in rig.records():
        assert row["state"] in ("FAILED", "RUNNING"), row["state"]
    _clear(rig)
    _once_more(rig)


def _once_more(rig: Rig) -> None:
    _wait_for_doubt(rig)
    rig.must("create", name="crash", ttl=3600)
    _one_vm(rig)


def _clear(rig: Rig) -> None:
    """What is left FAILED is removed by its owner."""
    rig.pve.task_endings.clear()
    for row in rig.records():
        if row["state"] in ("FAILED", "RUNNING"):
            rig.must("destroy", vmids=[row["vmid"]], force=True)


def _reconciled(rig: Rig) -> None:
    found = {row["name"]: row["state"] for row in rig.records() if not row["name"].startswith("half-dry")}
    assert found["half"] in ("FAILED",), found
    _stopped("late")(rig)
    rig.must("destroy", vmids=[_vmid(rig, "half")], force=True)


def _with_disk(*names: str, **values: Any) -> Callable[[Rig], None]:
    """A workspace, and these sandboxes."""

    def prepare(rig: Rig) -> None:
        rig.must("reconcile")
        rig.must("workspace", word="present", name="w", size="1G", storage="local-lvm")
        _made(*names, **values)(rig)

    return prepare


def _disk(state: str) -> Callable[[Rig], None]:
    """The workspace is in that state once what was begun on it is settled."""

    def look(rig: Rig) -> None:
        if rig.sql("SELECT 1 FROM workspaces WHERE state IN ('CREATING', 'ATTACHING', 'DETACHING', 'DELETING')"):
            time.sleep(1.5)
            rig.must("reconcile")
        found = rig.sql("SELECT state FROM workspaces WHERE reason IS NULL OR reason <> 'creation_interrupted'")
        assert [row["state"] for row in found] == [state], found

    return look


def _disk_settled(rig: Rig) -> None:
    _settled(rig)
    _clear(rig)
    _disk("DETACHED")(rig)


def _disk_cleared(rig: Rig) -> None:
    _clear(rig)
    _disk("DETACHED")(rig)


CASES = {
    "create": Case(_empty, "create", WHOLE, states={"crash": "RUNNING"}, after=_one_vm),
    "create_user_data": Case(_empty, "create", USER_DATA, states={"crash": "RUNNING"}, after=_one_vm),
    "create_user_data_reconciled": Case(_empty, "create", USER_DATA, again=("reconcile", {}), after=_settled),
    "create_user_data_failing": Case(_empty, "create", USER_DATA, ready=_start_fails, after=_clear, ok=False),
    "force_user_data": Case(
        _made("a", cloud_init_user_data="#cloud-config\n"),
        "destroy",
        {"vmids": [1001], "force": True},
        states={"a": "DESTROYED"},
    ),
    "workspace_create": Case(
        _empty,
        "workspace",
        {"word": "present", "name": "w", "size": "1G", "storage": "local-lvm"},
        after=_disk("DETACHED"),
    ),
    "workspace_attach": Case(
        _with_disk("a"), "workspace", {"word": "attached", "name": "w", "vmid": 1001}, after=_disk("ATTACHED")
    ),
    "workspace_detach": Case(
        _with_disk("a", workspace="w"), "workspace", {"word": "detached", "name": "w"}, after=_disk("DETACHED")
    ),
    "workspace_absent": Case(
        _with_disk(), "workspace", {"word": "absent", "name": "w", "force": True}, after=_disk("DELETED")
    ),
    "create_workspace": Case(_with_disk(), "create", WITH_DISK, states={"crash": "RUNNING"}, after=_disk("ATTACHED")),
    "create_workspace_reconciled": Case(
        _with_disk(), "create", WITH_DISK, again=("reconcile", {}), after=_disk_settled
    ),
    "create_workspace_failing": Case(
        _with_disk(), "create", WITH_DISK, ready=_start_fails, after=_disk_cleared, ok=False
    ),
    "force_workspace": Case(
        _with_disk("a", workspace="w"),
        "destroy",
        {"vmids": [1001], "force": True},
        states={"a": "DESTROYED"},
        after=_disk("DETACHED"),
    ),
    "force_workspace_ghost": Case(
        _with_disk("ghost", workspace="w"),
        "destroy",
        {"vmids": [GHOST], "force": True},
        states={"ghost": "DESTROYED"},
        after=_disk("DETACHED"),
    ),
    "create_taken": Case(
        _empty, "create", {"name": "crash", "ttl": 3600}, states={"crash": "RUNNING"}, ready=_taken, after=_one_vm
    ),
    "create_failing": Case(
        _empty, "create", {"name": "crash", "ttl": 3600}, ready=_start_fails, after=_clear, ok=False
    ),
    "force_half": Case(
        _half,
        "destroy",
        {"vmids": [1002], "force": True},
        again=("create", {"name": "crash", "ttl": 3600}),
        after=_once_more,
        ok=False,
    ),
    "create_reconciled": Case(
        _empty, "create", {"name": "crash", "ttl": 3600}, again=("reconcile", {}), after=_settled
    ),
    "stop": Case(
        _made("a"), "power", {"vmid": 1001, "operation": "stop"}, states={"a": "STOPPED"}, after=_stopped("a")
    ),
    "start": Case(
        _made("a", states={"a": "stop"}), "power", {"vmid": 1001, "operation": "start"}, states={"a": "RUNNING"}
    ),
    "suspend": Case(_made("a"), "power", {"vmid": 1001, "operation": "suspend"}, states={"a": "SUSPENDED"}),
    "destroy": Case(_made("a", states={"a": "stop"}), "destroy", {"vmids": [1001]}, states={"a": "DESTROYED"}),
    "force": Case(_made("a"), "destroy", {"vmids": [1001], "force": True}, states={"a": "DESTROYED"}),
    "force_ghost": Case(_made("ghost"), "destroy", {"vmids": [GHOST], "force": True}, states={"ghost": "DESTROYED"}),
    "bulk": Case(
        _made("a", "b", "c", "ghost"),
        "destroy",
        {"vmids": [1001, 1002, 1003], "force": True},
        states={"a": "DESTROYED", "b": "DESTROYED", "c": "DESTROYED"},
    ),
    "renew": Case(_made("a"), "renew", {"vmid": 1001, "ttl": 7200}, states={"a": "RUNNING"}),
    "expire": Case(
        _made("a", "b", "ghost"),
        "expire",
        {},
        ready=_over,
        states={"a": "TIMEOUT", "b": "TIMEOUT"},
        after=_stopped("a", "b"),
    ),
    "prune": Case(
        _timed_out, "prune", {}, states={"a": "DESTROYED", "b": "DESTROYED", "gone": "DESTROYED", "ghost": "DESTROYED"}
    ),
    "reconcile": Case(
        _drifted,
        "reconcile",
        {},
        states={
            "gone": "DESTROYED",
            "cut": "DESTROYED",
            "ghost": "DESTROYED",
            "late": "TIMEOUT",
            "moved": "RUNNING",
            "down": "FAILED",
        },
        after=_reconciled,
    ),
}


# On PostgreSQL too: what a lease or a VM hangs on.
ON_BOTH_ENGINES = ("create", "force", "renew", "expire")


@pytest.fixture
def engine() -> str:
    return "sqlite"


@pytest.fixture
def rig(tmp_path: Path, engine: str) -> Iterator[Rig]:
    made = Rig(tmp_path, engine=engine)
    made.foreign(BYSTANDER, name="bystander", running=True)
    yield made
    made.stop()


def try_case(
    rig: Rig,
    case: Case,
    number: int | None,
    how: Any = "kill",
    fail: dict[str, Any] | None = None,
    mend: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[str]]:
    """Run the case once, killed or failing at that point (and mended afterwards), then again, and judge the end."""
    rig.restore()
    if case.ready:
        case.ready(rig)
    first = rig.do(case.op, kill=number, how=how, fail=fail, **case.args)
    mend()
    wrong = []
    if number is not None or fail:
        # As a user would: the same once more; and what a scheduler does anyway.
        again = rig.do(case.again[0], **case.again[1])
        if not (again["result"] or {}).get("ok") and case.ok:
            wrong.append(f"the second run failed: {again}")
    for _dummy in range(2):
        found = rig.do("reconcile")
        if not (found["result"] or {}).get("ok"):
            wrong.append(f"reconcile failed: {found}")
    try:
        if case.after:
            case.after(rig)
        last = {row["name"]: row["state"] for row in rig.records()}
        for name, state in (case.states or {}).items():
            if last.get(name) != state:
                wrong.append(f"{name} is {last.get(name)}, not {state}")
    except (AssertionError, StopIteration, AttributeError) as error:
        wrong.append(f"{type(error).__name__}: {error}")
    return first, wrong + rig.broken()


@pytest.mark.parametrize(
    ("name", "engine"),
    [*((name, "sqlite") for name in CASES), *((name, "postgresql") for name in ON_BOTH_ENGINES)],
)
def test_killed_anywhere_and_run_again(rig: Rig, name: str, record_property: Any) -> None:
    case = CASES[name]
    case.prepare(rig)
    rig.keep()
    began = time.monotonic()
    dry, wrong = try_case(rig, case, None)
    assert not wrong, wrong
    assert dry["result"]["ok"] or not case.ok, dry
    points = dry["result"]["points"]
    numbers = list(range(1, len(points) + 1))
    if len(numbers) > SAMPLE:
        # Several at once: which point a number is differs from run to run anyway.
        numbers = sorted(random.Random(name).sample(numbers, SAMPLE)) if name == "bulk" else numbers
    failures = {}
    killed = 0
    for number in numbers:
        first, wrong = try_case(rig, case, number)
        killed += first["signal"] == 9
        if wrong:
            failures[
                f"{number}/{len(points)} {points[number - 1]} (after {points[max(0, number - 4) : number - 1]})"
            ] = wrong
    summary = (
        f"{name} on {rig.engine}: {len(points)} points, {len(numbers)} tried, {killed} killed, "
        f"{len(numbers) - len(failures)} passed, {time.monotonic() - began:.0f} s"
    )
    record_property(
        "faults",
        (
            f"killed: {name}",
            {"known": len(points), "cases": len(numbers), "met": killed, "passed": len(numbers) - len(failures)},
        ),
    )
    print("\n" + summary)
    assert killed > len(numbers) * 0.8, "the kills do not happen"
    assert not failures, summary + "".join(
        f"\n{where}:\n    " + "\n    ".join(map(str, what)) for where, what in failures.items()
    )


@pytest.mark.parametrize("how", ["connections cut", "answer lost", "server killed"])
@pytest.mark.parametrize("engine", ["postgresql"])
@pytest.mark.parametrize("name", ON_BOTH_ENGINES)
def test_the_database_is_lost_around_each_commit(
    tmp_path: Path, name: str, how: str, engine: str, record_property: Any
) -> None:
    """What was not committed is repeated or told, and what was committed is not repeated."""
    require_postgresql()
    own = PostgresServer().create() if how == "server killed" else server()
    rig = Rig(tmp_path, engine=engine, address=own.uri())
    rig.foreign(BYSTANDER, name="bystander", running=True)
    try:
        case = CASES[name]
        case.prepare(rig)
        rig.keep()
        points = try_case(rig, case, None)[0]["result"]["points"]
        label = "after commit" if how == "answer lost" else "before commit"
        numbers = [number for number, point in enumerate(points, 1) if point == label]
        assert numbers, points
        known = len(numbers)
        if how == "server killed":
            # A restart takes a second: other commits each day.
            numbers = random.Random(f"{SEED} {name}").sample(numbers, min(3, known))
        loss = {
            "answer lost": "lose",
            "connections cut": own.command(
                "psql", "-h", "127.0.0.1", "-p", str(own.port), "-U", own.user, "-c", CUT, rig.env["AGENTLAB_DATABASE"]
            ),
            "server killed": own.restart_command(),
        }[how]
        failures = {}
        for number in numbers:
            first, wrong = try_case(rig, case, number, loss)
            # Several steps in one transaction are not repeated by the store; the next run goes on with them.
            told = how != "answer lost" and "cannot be reached" in str(first["result"])
            if not (first["result"] or {}).get("ok") and not told:
                wrong.append(f"the operation neither went on nor said why: {first}")
            if wrong:
                failures[number] = wrong
        record_property(
            "faults",
            (
                f"{how}: {name}",
                {"known": known, "cases": len(numbers), "met": len(numbers), "passed": len(numbers) - len(failures)},
            ),
        )
        assert not failures, failures
    finally:
        rig.stop()
        if own is not server():
            own.destroy()
