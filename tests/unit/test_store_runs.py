# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""On both engines: reservations on nodes (placements.py) and the journal of commands (runs.py), by several
controllers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    DamagedRecord,
    InvalidInput,
    NotFound,
    StoreError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.placement import Load, Reservation
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, placements, runs
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records

from support.engines import ENGINES, move_to_host, new_address

SETTLE = 60
Connect = Callable[..., Records]


class MovedClock(SystemClock):
    """A clock that a test sets forward. ``behind`` is a clock of the records, which goes on."""

    def __init__(self, behind: Any = None) -> None:
        self.ahead = 0
        self.behind = behind

    def now(self) -> int:
        return int((self.behind.now() if self.behind else super().now()) + self.ahead)


@pytest.fixture(params=ENGINES)
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Open controllers on the same records; each as one on another host would be: its process cannot be looked at."""
    address = new_address(request.param, str(tmp_path / "agentlab.db"))
    opened: list[Any] = []

    def make(actor: str = "tester") -> Records:
        database = open_database(address)
        opened.append(database)
        return move_to_host(
            Records(database, MovedClock(database.choose_clock(SystemClock())), actor), "elsewhere", actor
        )

    yield make
    for database in opened:
        database.close()


def new(number: int, **values: Any) -> Sandbox:
    uuid = f"00000000-0000-4000-8000-{number:012d}"
    return Sandbox(uuid=uuid, vmid=0, name=f"s{number}", state="REQUESTED", lease_expires_at=10**10, **values)


def place(
    records: Records,
    number: int,
    decide: Callable[[Load], Reservation] | None = None,
    affinity: str | None = None,
    **values: Any,
) -> tuple[Claim, Sandbox]:
    """Reserve a record and room on node ``a``; return its claim and the record."""
    sandbox = new(number, **{"node": "a", **values})

    def default(_load: Load) -> Reservation:
        return Reservation(0, "a", 1024, "local", 2048)

    work = placements.prepare_reservation(records, SETTLE, affinity, sandbox.profile, sandbox.tags, decide or default)
    claim = records.reserve(sandbox, vmid=None, vmid_range=(1000, 1099), occupied=set(), journal={}, place=work)
    return claim, records.get(sandbox.uuid)


def reserved(records: Records) -> list[int]:
    return sorted(one.vmid for one in placements.read_load(records, SETTLE).reservations)


# ---- reservations ----


def test_a_reservation_of_another_controller_counts_in_full_while_its_creation_is_under_way(connect: Connect) -> None:
    first, second = connect("first"), connect("second")
    _claim, sandbox = place(first, 1)
    load = placements.read_load(second, SETTLE)
    assert load.sandboxes == {"a": 1}
    assert load.reservations == (Reservation(sandbox.vmid, "a", 1024, "local", 2048, True),)


def test_each_creation_decides_with_the_reservations_before_it(connect: Connect) -> None:
    """Six controllers at once: each one sees another number of reservations."""
    seen: list[int] = []
    errors: list[BaseException] = []

    def create(number: int) -> None:
        def decide(load: Load) -> Reservation:
            seen.append(len(load.reservations))
            return Reservation(0, "a", 1024)

        try:
            place(connect(f"c{number}"), number, decide)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and sorted(seen) == list(range(6))


def test_the_reservation_of_a_dead_controller_counts_no_more(connect: Connect) -> None:
    first, second = connect("first"), connect("second")
    place(first, 1)
    assert reserved(second) == [1000]
    if second.db.kind == "postgresql":
        first.db.close()
    else:
        second.db.write(lambda conn: conn.execute("UPDATE claims SET expires_at = 1") and None)
    assert reserved(second) == []


def test_a_decision_reads_within_its_own_transaction_only(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whether the holder of another creation lives: a second connection may be lost, or full."""
    first, second = connect("first"), connect("second")
    place(first, 1)
    seen: list[Load] = []

    def refuse(sql: str, *_values: Any) -> list[Any]:
        raise StoreError(f"asked outside of the transaction: {sql}")

    def decide(load: Load) -> Reservation:
        seen.append(load)
        return Reservation(0, "a")

    sandbox = new(2, node="a")
    work = placements.prepare_reservation(second, SETTLE, None, None, (), decide)
    with monkeypatch.context() as patched:
        patched.setattr(second.db, "read", refuse)
        second.reserve(sandbox, vmid=None, vmid_range=(1000, 1099), occupied=set(), journal={}, place=work)
    assert [one.vmid for one in seen[0].reservations] == [1000]


def test_a_finished_creation_counts_as_young_until_it_has_settled(connect: Connect) -> None:
    records = connect()
    claim, sandbox = place(records, 1)
    for state in ("PROVISIONING", "BOOTING", "READY"):
        sandbox = records.change(claim, sandbox, "create", to=state, finish=state == "READY")
    (young,) = placements.read_load(records, SETTLE).reservations
    assert not young.creating and young.memory == 1024
    records.clock.ahead = SETTLE + 1  # type: ignore[attr-defined]
    assert placements.read_load(records, SETTLE).reservations == ()


@pytest.mark.parametrize("state", ["FAILED", "DESTROYED"])
def test_a_creation_that_failed_or_went_counts_no_more(connect: Connect, state: str) -> None:
    records = connect()
    claim, sandbox = place(records, 1)
    records.change(claim, sandbox, "create", to=state, finish=True)
    assert reserved(records) == []


def test_a_refused_decision_leaves_nothing(connect: Connect) -> None:
    records = connect()

    def refuse(_load: Load) -> Reservation:
        raise InvalidInput("node: no node has room")

    with pytest.raises(InvalidInput, match="no node has room"):
        place(records, 1, refuse)
    for table in ("sandboxes", "placements", "claims", "operations", "events"):
        assert records.db.read(f"SELECT * FROM {table}") == [], table


def test_old_reservations_are_removed_with_the_next_one(connect: Connect) -> None:
    records = connect()
    place(records, 1)
    records.clock.ahead = SETTLE + records.claim_seconds + 1  # type: ignore[attr-defined]
    place(records, 2)
    assert [row["sandbox_uuid"] for row in records.db.read("SELECT sandbox_uuid FROM placements")] == [new(2).uuid]


def test_sandboxes_of_the_same_kind_are_counted_on_each_node(connect: Connect) -> None:
    records = connect()
    place(records, 1, profile="ci", tags=["x", "y"])
    place(records, 2, profile="ci", tags=["z"], node="b")
    claim, gone = place(records, 3, profile="ci", tags=["x"])
    records.change(claim, gone, "create", to="DESTROYED", finish=True)
    for affinity, profile, tags, expected in (
        ("profile", "ci", (), {"a": 1, "b": 1}),
        ("profile", "other", (), {}),
        ("tag", None, ("x", "z"), {"a": 1, "b": 1}),
        ("tag", None, ("y",), {"a": 1}),
        (None, "ci", ("x",), {}),
    ):
        assert placements.read_load(records, SETTLE, affinity, profile, tags).same == expected, affinity


def test_only_live_sandboxes_of_these_records_are_their_own(connect: Connect) -> None:
    records = connect()
    _claim, live = place(records, 1)
    claim, gone = place(records, 2)
    records.change(claim, gone, "create", to="DESTROYED", finish=True)
    assert placements.find_own_vmids(records, range(900, 2100)) == {live.vmid}
    assert placements.find_own_vmids(records, ()) == set()


# ---- commands in guests ----


def begin(records: Records, sandbox: Sandbox, run_id: str, fingerprint: str = "f", detached: bool = False) -> Any:
    return runs.begin(records, sandbox, run_id, fingerprint=fingerprint, program="sh", detached=detached)


def finish(records: Records, sandbox: Sandbox, run: runs.Run, state: str, acks: list[str] | None = None) -> None:
    evidence = {"run_id": run.id}
    runs.finish(records, sandbox, run, state, detail={"rc": 0}, evidence=evidence, outcome="done", acks=acks)


def exec_events(records: Records) -> list[str]:
    return [event["evidence"]["run_id"] for event in history.read_events(records.db) if event["operation"] == "exec"]


def test_one_of_two_controllers_begins_a_run(connect: Connect) -> None:
    first, second = connect("first"), connect("second")
    _claim, sandbox = place(first, 1)
    barrier = threading.Barrier(2)
    begun: list[runs.Run] = []

    def work(records: Records) -> None:
        barrier.wait(20)
        begun.append(begin(records, sandbox, "r1")[0])

    threads = [threading.Thread(target=work, args=(records,)) for records in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.is_new for run in begun) == [False, True]
    assert {run.actor for run in begun} == {next(run.actor for run in begun if run.is_new)}
    with pytest.raises(InvalidInput, match="run_id: r1 belongs to another command or sandbox"):
        begin(second, sandbox, "r1", "other")
    _claim, other = place(first, 2)
    with pytest.raises(InvalidInput, match="belongs to another command or sandbox"):
        begin(second, other, "r1")
    with pytest.raises(NotFound, match="run not found"):
        runs.get(second, other, "r1")


def test_a_refused_run_may_be_begun_again(connect: Connect) -> None:
    records = connect()
    _claim, sandbox = place(records, 1)
    run, _acks = begin(records, sandbox, "r1")
    finish(records, sandbox, run, runs.REFUSED)
    again, _acks = begin(records, sandbox, "r1")
    assert again.is_new and again.state == runs.SENT
    assert runs.get(records, sandbox, "r1").state == runs.SENT
    finish(records, sandbox, again, runs.REFUSED)
    assert begin(records, sandbox, "r1")[0].is_new


@pytest.mark.parametrize("late", [runs.LOST, runs.REFUSED, runs.ENDED])
def test_a_known_end_stays_whatever_another_controller_says_later(connect: Connect, late: str) -> None:
    """A run that ended and is called refused would be run once more under its id."""
    first, second = connect("first"), connect("second")
    _claim, sandbox = place(first, 1)
    mine, _acks = begin(first, sandbox, "r1")
    theirs, _acks = begin(second, sandbox, "r1")
    finish(second, sandbox, theirs, runs.ENDED)
    finish(first, sandbox, mine, late)
    assert runs.get(first, sandbox, "r1").state == mine.state == runs.ENDED
    assert exec_events(first) == ["r1"]
    assert not begin(first, sandbox, "r1")[0].is_new


def test_a_refusal_does_not_close_a_run_that_another_controller_asked_for(connect: Connect) -> None:
    """The other one may have begun it, and a refused run begins again."""
    first, second = connect("first"), connect("second")
    _claim, sandbox = place(first, 1)
    mine, _acks = begin(first, sandbox, "r1")
    theirs, _acks = begin(second, sandbox, "r1")
    finish(first, sandbox, mine, runs.REFUSED)
    assert runs.get(first, sandbox, "r1").state == mine.state == runs.SENT and exec_events(first) == []
    assert not begin(first, sandbox, "r1")[0].is_new
    runs.set_state(second, theirs, runs.RUNNING)
    finish(first, sandbox, mine, runs.REFUSED)
    finish(second, sandbox, theirs, runs.ENDED)
    assert runs.get(first, sandbox, "r1").state == runs.ENDED and exec_events(first) == ["r1"]


def test_a_result_of_the_guest_replaces_an_end_without_one(connect: Connect) -> None:
    first, second = connect("first"), connect("second")
    _claim, sandbox = place(first, 1)
    mine, _acks = begin(first, sandbox, "r1")
    theirs, _acks = begin(second, sandbox, "r1")
    finish(first, sandbox, mine, runs.LOST)
    runs.set_state(second, theirs, runs.RUNNING)
    assert runs.get(first, sandbox, "r1").state == runs.LOST, "an end is not taken back"
    finish(second, sandbox, theirs, runs.ENDED)
    stored = runs.get(first, sandbox, "r1")
    assert stored.state == runs.ENDED and stored.detail == {"rc": 0}
    assert exec_events(first) == ["r1", "r1"]


def test_results_are_forgotten_in_the_guest_once_they_are_written_down(connect: Connect) -> None:
    records = connect()
    _claim, sandbox = place(records, 1)
    ended, _acks = begin(records, sandbox, "r1")
    kept, _acks = begin(records, sandbox, "r2", detached=True)
    under_way, _acks = begin(records, sandbox, "r3")
    assert begin(records, sandbox, "r4")[1] == []
    finish(records, sandbox, ended, runs.ENDED)
    finish(records, sandbox, kept, runs.ENDED)
    run, acks = begin(records, sandbox, "r5")
    assert acks == ["r1"], "neither a detached run nor one that is under way"
    finish(records, sandbox, run, runs.ENDED, acks)
    assert begin(records, sandbox, "r6")[1] == ["r5"]
    assert under_way.state == runs.SENT
    listed = [(one.id, one.state, one.acked, one.detached) for one in runs.list_runs(records, sandbox)]
    assert ("r1", runs.ENDED, True, False) in listed and ("r2", runs.ENDED, False, True) in listed
    assert len(runs.list_runs(records, sandbox, 2)) == 2


def test_a_damaged_run_is_named(connect: Connect) -> None:
    records = connect()
    _claim, sandbox = place(records, 1)
    begin(records, sandbox, "r1")
    records.db.write(lambda conn: conn.execute("UPDATE runs SET detail = 'x'") and None)
    with pytest.raises(DamagedRecord, match="r1"):
        runs.get(records, sandbox, "r1")


def test_runs_and_reservations_go_with_their_sandbox(connect: Connect) -> None:
    """Retention removes the record; nothing of it is left in another table."""
    records = connect()
    claim, sandbox = place(records, 1)
    begin(records, sandbox, "r1")
    records.change(claim, sandbox, "create", to="DESTROYED", finish=True)
    records.clock.ahead = 400 * 86400  # type: ignore[attr-defined]
    assert history.forget(records, 86400) == 1
    assert records.db.read("SELECT * FROM runs") == [] and records.db.read("SELECT * FROM placements") == []
