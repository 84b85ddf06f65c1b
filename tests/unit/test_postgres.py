# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What only the PostgreSQL engine does: heartbeats, the server's clock, lost connections and commits, migration,
rights.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    Busy,
    ClaimLost,
    InvalidInput,
    StoreError,
    StoreUnavailable,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import (
    history,
    overview,
    placements,
    schema,
    transfer,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.transfer import copy_records

from support.engines import move_to_host, require_postgresql, server
from support.postgres import PostgresServer

RANGE = (1000, 1099)


def new(number: int) -> Sandbox:
    return Sandbox(
        uuid=f"00000000-0000-4000-8000-{number:012d}",
        vmid=0,
        name=f"s{number}",
        state="REQUESTED",
        lease_expires_at=10**10,
    )


def reserve(store: Records, number: int = 1) -> tuple[Claim, Sandbox]:
    sandbox = new(number)
    claim = store.reserve(sandbox, vmid=None, vmid_range=RANGE, occupied=set(), journal={"a": 1})
    return claim, store.get(sandbox.uuid)


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def connect() -> Iterator[Any]:
    """Open controllers on a database; each as one on another host would be: its process cannot be looked at."""
    opened: list[Any] = []

    def make(uri: str, actor: str = "tester", host: str = "elsewhere") -> Records:
        database = open_database(uri)
        opened.append(database)
        return move_to_host(Records(database, database.choose_clock(SystemClock()), actor), host, actor)

    yield make
    for database in opened:
        database.close()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that the test may stop."""
    require_postgresql()
    running = PostgresServer().create()
    yield running
    running.destroy()


def database_of(uri: str) -> str:
    return uri.rpartition("/")[2]


# ---- placement ----


def test_the_node_of_one_controllers_creation_counts_for_the_next(uri: str, connect: Any) -> None:
    """Three controllers create at once: each decides with the reservations of those before it."""
    controllers = [connect(uri, f"controller {number}") for number in range(3)]
    loads: list[int] = []
    failures: list[BaseException] = []

    def create(number: int) -> None:
        store = controllers[number % 3]
        sandbox = new(number)

        def decide(load: placements.Load) -> placements.Reservation:
            loads.append(sum(reservation.memory for reservation in load.reservations))
            sandbox.node = f"pve{len(load.reservations) % 3 + 1}"
            return placements.Reservation(0, sandbox.node, memory=10)

        place = placements.prepare_reservation(store, 600, None, None, (), decide)
        try:
            store.reserve(sandbox, vmid=None, vmid_range=RANGE, occupied=set(), journal={}, place=place)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=lambda turn=turn: [create(turn + n * 3) for n in range(4)]) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(loads) == [number * 10 for number in range(12)]
    nodes = [row["node"] for row in controllers[0].db.read("SELECT node FROM sandboxes")]
    assert {name: nodes.count(name) for name in set(nodes)} == {"pve1": 4, "pve2": 4, "pve3": 4}


# ---- claims and heartbeats ----


def test_a_claim_lives_as_long_as_its_heartbeat(uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = connect(uri, "first"), connect(uri, "second")
    claim, sandbox = reserve(first)
    with pytest.raises(Busy, match="being worked on: create by first"):
        second.claim(sandbox.uuid, "destroy")
    real = second.db.read_server_time
    monkeypatch.setattr(second.db, "read_server_time", lambda: real() + 25)
    with pytest.raises(Busy):
        second.claim(sandbox.uuid, "destroy")
    monkeypatch.setattr(second.db, "read_server_time", lambda: real() + 35)
    taken = second.claim(sandbox.uuid, "destroy")
    assert taken.interrupted is not None and taken.fence > claim.fence
    assert (first.db.takeovers, second.db.takeovers) == (0, 1), "counted once, by who took over"
    second.release(taken)
    second.release(second.claim(sandbox.uuid, "destroy"))
    assert second.db.takeovers == 1, "a claim that was given back is not taken over"
    with pytest.raises(ClaimLost):
        first.write_journal(claim, "create", "cloning", {})
    with pytest.raises(ClaimLost, match="lost to another controller"):
        first.confirm_claims()


def test_a_claim_in_another_database_is_not_asked_of_this_one(uri: str, connect: Any) -> None:
    other = connect(uri)
    reserve(other)
    here = connect(server().uri())
    claim, _sandbox = reserve(here, 2)
    here.confirm_claims()
    other.confirm_claims()
    here.db.write(lambda conn: conn.execute("DELETE FROM claims WHERE fence = ?", (claim.fence,)) and None)
    with pytest.raises(ClaimLost):
        here.confirm_claims()
    other.confirm_claims()


def test_a_heartbeat_that_ended_is_told_by_the_clock_of_the_server(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = connect(uri, "first"), connect(uri, "second")
    reserve(first)
    row = second.db.read("SELECT * FROM claims")[0]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert not second.is_holder_gone(row), "a wall clock that is wrong by decades kills nobody"
    monkeypatch.setattr(type(second.db), "read_server_time", lambda _self: 1e12)
    assert second.is_holder_gone(row)


def test_a_controller_that_ended_by_itself_has_no_claim_any_more(uri: str, connect: Any) -> None:
    first, second = connect(uri, "first"), connect(uri, "second")
    _claim, sandbox = reserve(first)
    first.db.close()
    assert second.claim(sandbox.uuid, "destroy").interrupted is not None


def test_a_claim_without_a_journal_entry_is_removed_once_its_heartbeat_has_ended(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller may die between its claim and its first journal entry, and no other run looks at that sandbox."""
    first, second = connect(uri, "first"), connect(uri, "second")
    claim, sandbox = reserve(first)
    first.change(claim, sandbox, "create", to="FAILED", finish=True)
    first.claim(sandbox.uuid, "stop")
    overview.drop_dead_claims(second)
    assert len(second.db.read("SELECT * FROM claims")) == 1
    real = second.db.read_server_time
    monkeypatch.setattr(second.db, "read_server_time", lambda: real() + 35)
    overview.drop_dead_claims(second)
    assert second.db.read("SELECT * FROM claims") == []


def test_the_heartbeat_goes_on_without_writes(uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine

    monkeypatch.setattr(engine, "HEARTBEAT_SECONDS", 0.05)
    records = connect(uri)
    reserve(records)
    before = records.db.read("SELECT seen_at FROM controllers")[0][0]
    deadline = time.monotonic() + 20
    while records.db.read("SELECT seen_at FROM controllers")[0][0] == before:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.05)


def test_a_claim_that_could_not_be_given_back_is_given_back_later(
    own_server: PostgresServer, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine

    monkeypatch.setattr(engine, "HEARTBEAT_SECONDS", 0.2)
    records = connect(own_server.uri())
    claim, sandbox = reserve(records)
    own_server.stop()
    with pytest.raises(StoreUnavailable, match="cannot be reached.*Nothing is changed in Proxmox VE"):
        records.write_journal(claim, "create", "cloning", {})
    with pytest.raises(StoreUnavailable):
        records.confirm_claims()
    records.release(claim)
    own_server.start()
    deadline = time.monotonic() + 30
    while records.db.read("SELECT * FROM claims"):
        assert time.monotonic() < deadline, "the claim was never given back"
        time.sleep(0.1)
    assert records.claim(sandbox.uuid, "destroy").interrupted is not None


# ---- the server's clock ----


def test_leases_and_ages_are_compared_by_the_clock_of_the_server(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = connect(uri)
    now = int(time.time())
    monkeypatch.setattr(time, "time", lambda: now + 3600.0)
    assert abs(records.clock.now() - now) < 30
    _claim, sandbox = reserve(records)
    assert abs(sandbox.created_at - now) < 30
    assert 3500 < records.db.read_clock_difference() < 3700


# ---- losing the server ----


def test_connections_that_were_cut_are_made_anew(uri: str, connect: Any) -> None:
    records = connect(uri)
    claim, sandbox = reserve(records)
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database_of(uri)}'"
    server().execute(cut)
    assert records.get(sandbox.uuid).vmid == 1000
    server().execute(cut)
    records.write_journal(claim, "create", "cloning", {})
    assert records.find_journal_entry(sandbox.uuid).phase == "cloning"
    assert records.db.reconnects >= 2


def test_a_connection_cut_in_the_middle_of_a_transaction_repeats_it(uri: str, connect: Any) -> None:
    records = connect(uri)
    calls = []

    def work(conn: Any) -> None:
        conn.execute("INSERT INTO meta VALUES ('k', '1')", ())
        calls.append(1)
        if len(calls) == 1:
            pid = conn.execute("SELECT pg_backend_pid()", ()).fetchone()[0]
            server().execute(f"SELECT pg_terminate_backend({pid})")

    records.db.write(work)
    assert len(calls) == 2 and records.read_meta("k") == "1"


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_commit_whose_answer_is_lost_is_looked_up_before_it_is_repeated(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    import psycopg

    records = connect(uri)
    reserve(records)
    lost = []
    real = psycopg.Connection.execute

    def execute(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        if not lost and "; COMMIT" in str(query) and "INSERT INTO controllers" in str(query):
            lost.append(1)
            if carried_out:
                real(self, query, *arguments, **options)
            self.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return real(self, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    calls = []
    records.db.write(lambda conn: calls.append(1) or (conn.execute("INSERT INTO meta VALUES ('k', '1')", ()) and None))
    assert lost and len(calls) == (1 if carried_out else 2)
    assert records.read_meta("k") == "1"


def test_a_server_that_is_away_is_one_sentence_and_comes_back_without_a_restart(
    own_server: PostgresServer, connect: Any
) -> None:
    uri = own_server.uri()
    records = connect(uri)
    _claim, sandbox = reserve(records)
    own_server.stop()
    for ask in (lambda: records.get(sandbox.uuid), lambda: records.set_meta("k", "1"), lambda: open_database(uri)):
        with pytest.raises(StoreUnavailable, match="^database postgresql://tester@.*cannot be reached"):
            ask()
    own_server.start()
    records.set_meta("k", "1")
    assert records.get(sandbox.uuid).vmid == 1000


def test_failover_to_a_standby_needs_no_restart(own_server: PostgresServer, connect: Any) -> None:
    uri = own_server.uri()
    standby = own_server.standby()
    try:
        both = uri.replace(f"127.0.0.1:{own_server.port}", f"127.0.0.1:{own_server.port},127.0.0.1:{standby.port}")
        records = connect(both)
        claim, sandbox = reserve(records)
        replayed = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()"
        deadline = time.monotonic() + 20
        while own_server.execute(replayed)[0][0] == 0:
            assert time.monotonic() < deadline, "the standby did not follow"
            time.sleep(0.1)
        assert records.db.lead("reconcile")
        own_server.stop()
        standby.promote()
        records.write_journal(claim, "create", "cloning", {})
        assert records.get(sandbox.uuid).vmid == 1000
        with pytest.raises(StoreUnavailable):
            records.db.lead("reconcile")
        assert records.db.lead("reconcile")
    finally:
        standby.destroy()


# ---- one writer ----


def test_ids_of_events_are_handed_out_in_the_order_of_commits(uri: str, connect: Any) -> None:
    """A reader that goes on after the last id it saw misses none."""
    connect(uri)
    seen: list[int] = []
    end = threading.Event()
    reader = connect(uri, "reader").db

    def read() -> None:
        while True:
            last = end.is_set()
            seen.extend(row["id"] for row in history.read_events(reader, after=seen[-1] if seen else 0))
            if last:
                return

    def write(name: str) -> None:
        records = connect(uri, name)
        sandbox = reserve(records, int(name))[1]
        for _turn in range(40):
            records.note(sandbox, "look", outcome="done")

    threads = [threading.Thread(target=write, args=(str(number),)) for number in (1, 2, 3)]
    watch = threading.Thread(target=read)
    for thread in (*threads, watch):
        thread.start()
    for thread in threads:
        thread.join()
    end.set()
    watch.join()
    assert len(seen) == 3 * 41 and seen == sorted(set(seen))


def test_a_vmid_that_somebody_else_took_is_passed_over(uri: str, connect: Any) -> None:
    """The unique index decides, not what was read before."""
    records = connect(uri)
    real = records._insert

    def insert(conn: Any, sandbox: Sandbox) -> bool:
        if sandbox.vmid == 1000:
            # A writer that takes no lock: a person with psql.
            columns = "uuid, vmid, name, state, created_at, updated_at"
            server().execute(
                f"INSERT INTO sandboxes ({columns}) VALUES ('u', 1000, 'psql', 'REQUESTED', 1, 1) ON CONFLICT DO "
                "NOTHING",
                database_of(uri),
            )
        return real(conn, sandbox)

    records._insert = insert  # type: ignore[method-assign]
    assert reserve(records)[1].vmid == 1001


def test_a_writer_that_is_paused_inside_a_transaction_holds_up_nobody_for_long(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine

    monkeypatch.setattr(engine, "_IDLE_SECONDS", 1)
    paused, other = connect(uri, "paused"), connect(uri, "other")
    entered = threading.Event()
    calls = []

    def work(conn: Any) -> None:
        conn.execute("INSERT INTO meta VALUES ('paused', '1')", ())
        calls.append(1)
        entered.set()
        if len(calls) == 1:
            time.sleep(3)

    thread = threading.Thread(target=paused.db.write, args=(work,))
    thread.start()
    entered.wait(20)
    began = time.monotonic()
    other.set_meta("other", "1")
    assert time.monotonic() - began < 2.9
    thread.join()
    assert len(calls) == 2 and other.read_meta("paused") == "1"


# ---- schema and rights ----


def test_an_older_release_refuses_a_newer_schema_at_its_next_write(uri: str, connect: Any) -> None:
    records = connect(uri)
    reserve(records)
    server().execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'", database_of(uri))
    with pytest.raises(StoreError, match="schema version 99 is newer than the"):
        records.set_meta("k", "1")
    with pytest.raises(StoreError, match="schema version 99 is newer than the"):
        open_database(uri)
    assert server().execute("SELECT count(*) FROM meta WHERE key = 'k'", database_of(uri)) == [(0,)]


def test_many_that_open_an_empty_database_migrate_it_once(uri: str, connect: Any) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            connect(uri)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert connect(uri).read_meta("schema_version") == str(schema.VERSION)


def test_a_later_step_is_added_to_what_is_there(uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", steps[:3])
    monkeypatch.setattr(schema, "VERSION", 3)
    open_database(uri).close()
    monkeypatch.setattr(schema, "MIGRATIONS", steps)
    monkeypatch.setattr(schema, "VERSION", len(steps))
    records = connect(uri)
    assert reserve(records)[1].vmid == 1000 and records.read_database_id() is not None


def test_check_mode_changes_nothing(uri: str) -> None:
    with pytest.raises(StoreError, match="check mode does not change them"):
        open_database(uri, dry_run=True)
    assert server().execute("SELECT to_regclass('meta')", database_of(uri)) == [(None,)]
    open_database(uri).close()
    dry = open_database(uri, dry_run=True)
    Records(dry, SystemClock(), "dry").set_meta("k", "1")
    dry.close()
    assert server().execute("SELECT count(*) FROM meta WHERE key = 'k'", database_of(uri)) == [(0,)]


def test_a_wrong_password_is_told_and_not_shown(uri: str) -> None:
    running = server()
    hba = running.data / "pg_hba.conf"
    before = hba.read_text()
    running.execute("CREATE ROLE guarded LOGIN PASSWORD 'right-7y'")
    hba.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + before)
    running.execute("SELECT pg_reload_conf()")
    try:
        where = uri.replace("tester@", "guarded@")
        deadline = time.monotonic() + 20
        while True:
            with pytest.raises(StoreError) as caught:
                open_database(where, password="wrong-7y")
            if "authentication failed" in str(caught.value) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert "database_password" in str(caught.value) and "7y" not in str(caught.value)
    finally:
        hba.write_text(before)
        running.execute("SELECT pg_reload_conf()")


# ---- moving ----


@pytest.mark.parametrize("number", [300])
def test_records_move_to_postgresql_and_back_unchanged(uri: str, tmp_path: Path, number: int) -> None:
    """100,000 records take minutes on a slow machine: AGENTLAB_COPY_RECORDS=100000 runs it so."""
    number = int(os.environ.get("AGENTLAB_COPY_RECORDS", number))
    first, back = str(tmp_path / "first.db"), str(tmp_path / "back.db")
    database = open_database(first)
    records = Records(database, SystemClock(), "tester")
    claim, sandbox = reserve(records)
    records.release(claim)
    with database.group_writes():
        for count in range(number):
            records.note(sandbox, "look", outcome="done", evidence={"count": count, "text": "ä 'quoted' %s ? \\"})
    copies = "INSERT INTO sandboxes (uuid, vmid, name, state, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)"
    rows = [(f"old-{count}", 2000 + count, f"old{count}", "DESTROYED", count, count) for count in range(number)]
    database.write(lambda conn: conn.executemany(copies, rows) and None)
    name = records.read_database_id()
    database.close()
    there = copy_records(first, uri)
    assert there.counts["events"] == number + 1 and there.counts["sandboxes"] == number + 1
    assert there.source_checksum == there.target_checksum
    moved = open_database(uri)
    assert Records(moved, SystemClock(), "x").read_database_id() == name
    Records(moved, SystemClock(), "x").note(sandbox, "look", outcome="done")
    assert [row["id"] for row in history.read_events(moved, tail=1)] == [number + 2]
    moved.close()
    again = copy_records(uri, back)
    assert again.counts["events"] == number + 2 and again.source_checksum == again.target_checksum
    with pytest.raises(StoreError, match="it is not empty"):
        copy_records(first, uri)
    with pytest.raises(
        InvalidInput, match=r"FROM .*none\.db does not exist; nothing was copied\. Give the SQLite file"
    ):
        copy_records(str(tmp_path / "none.db"), uri)
    with pytest.raises(InvalidInput, match="is no file; nothing was copied"):
        copy_records(str(tmp_path), uri)


def test_a_file_is_not_copied_to_itself_by_another_path(tmp_path: Path) -> None:
    path = tmp_path / "first.db"
    open_database(str(path)).close()
    (tmp_path / "link.db").symlink_to(path)
    for other in (path, tmp_path / "link.db", tmp_path / ".." / tmp_path.name / "first.db"):
        with pytest.raises(InvalidInput, match="are the same database; nothing was copied. Name an empty database"):
            copy_records(str(path), str(other))


def test_every_table_is_copied() -> None:
    tables = set(re.findall(r"CREATE TABLE (\w+)", " ".join(" ".join(step) for step in schema.MIGRATIONS)))
    assert set(transfer.TABLES) == tables - {"meta", "claims"}


def test_records_in_use_are_not_copied(uri: str, tmp_path: Path) -> None:
    path = str(tmp_path / "first.db")
    database = open_database(path)
    reserve(Records(database, SystemClock(), "somebody"))
    with pytest.raises(StoreError, match=r"1 operation\(s\) are under way \(create by somebody\)"):
        copy_records(path, uri)
    database.close()


# ---- rights ----


def test_the_run_time_role_can_work_and_cannot_change_the_tables(uri: str, tmp_path: Path) -> None:
    sql = (Path(__file__).resolve().parents[2] / "roles/agentlabd/files/postgresql/roles.sql").read_text()
    name = database_of(uri)
    server().execute(sql.replace(":DATABASE", name), name)
    try:
        run = uri.replace("tester@", "agentlab@")
        with pytest.raises(StoreError, match="Run agentlabd --migrate-records with the migration role"):
            open_database(run)
        open_database(uri.replace("tester@", "agentlab_owner@")).close()
        database = open_database(run)
        records = Records(database, database.choose_clock(SystemClock()), "tester")
        claim, sandbox = reserve(records)
        records.release(claim)
        assert records.get(sandbox.uuid).vmid == 1000 and database.read_latest_event() == 1
        with pytest.raises(StoreError, match="may not set the counter of events .*Copy as agentlab_owner"):
            database.write(lambda conn: database.set_counters(conn, {"events": 5}))
        for forbidden in ("DROP TABLE events", "ALTER TABLE events ADD COLUMN x int", "CREATE TABLE x (y int)"):
            with pytest.raises(StoreError, match="grant the run-time role|must be owner"):
                database.write(lambda conn, sql=forbidden: conn.execute(sql, ()) and None)
        database.close()
    finally:
        for role in ("agentlab", "agentlab_owner"):
            server().execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}", name)
