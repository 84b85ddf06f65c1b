# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Locks that another session (psql, a tool) holds: no renewal after the end of its lease, no takeover of a claim whose
holder lives, and whoever waits learns for whom.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Busy, RecordChanged, StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.engines import open_controllers, require_postgresql, server

UUID = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def connect(uri: str) -> Iterator[Any]:
    """Open the records as one of several controllers, each on a host of its own."""
    with open_controllers() as open_controller:
        yield lambda: open_controller(uri)


@pytest.fixture
def psql(uri: str) -> Iterator[Any]:
    """Return a session of another program with a transaction of its own."""
    import psycopg

    with psycopg.connect(uri, application_name="psql") as connection:
        yield connection


def make_running(records: Records, lease: float) -> Sandbox:
    """Return a running sandbox whose lease ends after that many seconds, at the beginning of a second."""
    time.sleep(1.05 - records.db.read_wall_time() % 1)
    end = int(records.db.read_wall_time()) + int(lease)
    records.db.write(
        lambda conn: conn.execute(
            "INSERT INTO sandboxes (uuid, vmid, name, node, state, created_at, updated_at, lease_expires_at, "
            "generation) VALUES (?, 1000, 'a1', 'pve1', 'RUNNING', ?, ?, ?, 1)",
            (UUID, end - 100, end - 100, end),
        )
    )
    return records.get(UUID)


@pytest.mark.parametrize(
    "lock",
    [
        "SELECT 1 FROM sandboxes FOR UPDATE",
        "UPDATE sandboxes SET name = name",
        "LOCK TABLE sandboxes IN SHARE MODE",
        "LOCK TABLE sandboxes IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE events IN EXCLUSIVE MODE",
        "LOCK TABLE controllers IN EXCLUSIVE MODE",
        "SELECT 1 FROM controllers FOR UPDATE",
        "SELECT pg_advisory_xact_lock(1634492770, 1)",
    ],
)
def test_a_renewal_that_waited_for_a_lock_beyond_the_end_of_its_lease_is_refused(
    connect: Any, psql: Any, lock: str
) -> None:
    records = connect()
    sandbox = make_running(records, 2)
    end = sandbox.lease_expires_at or 0
    psql.execute(lock)
    timer = threading.Timer(end + 0.4 - records.db.read_wall_time(), psql.rollback)
    timer.start()
    with pytest.raises(RecordChanged):
        records.renew(sandbox, end + 1000, int(records.db.read_wall_time()))
    timer.join()
    assert records.get(UUID).lease_expires_at == end
    assert records.db.read_wall_time() > end


def test_a_renewal_that_waited_for_a_lock_within_its_lease_holds(connect: Any, psql: Any) -> None:
    records = connect()
    sandbox = make_running(records, 30)
    psql.execute("UPDATE sandboxes SET name = name")
    timer = threading.Timer(1.0, psql.rollback)
    timer.start()
    renewed = records.renew(sandbox, (sandbox.lease_expires_at or 0) + 1000, int(records.db.read_wall_time()))
    timer.join()
    assert renewed.lease_expires_at == (sandbox.lease_expires_at or 0) + 1000


@pytest.mark.parametrize(
    "lock",
    [
        "LOCK TABLE controllers IN EXCLUSIVE MODE",
        "SELECT 1 FROM controllers WHERE host LIKE 'this%' OR true FOR UPDATE",
        "SELECT 1 FROM controllers WHERE id = '{holder}' FOR UPDATE",
    ],
)
def test_a_holder_whose_heartbeat_waits_for_a_lock_keeps_its_claim(
    connect: Any, psql: Any, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """Heartbeats of 0.2 s that count for 1 s, and a lock of 2 s."""
    monkeypatch.setattr(engine, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(engine, "DEAD_SECONDS", 1.0)
    first, second = connect(), connect()
    sandbox = make_running(first, 1000)
    claim = first.claim(sandbox.uuid, "stop")
    time.sleep(0.6)
    psql.execute(lock.format(holder=first.db.controller))
    timer = threading.Timer(2.0, psql.rollback)
    timer.start()
    time.sleep(1.5)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        with pytest.raises(Busy):
            second.claim(sandbox.uuid, "destroy")
    timer.join()
    first.write_journal(claim, "stop", "stopping", {})
    first.release(claim)


def test_a_holder_that_is_gone_loses_its_claim_after_a_lock_too(
    connect: Any, psql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(engine, "DEAD_SECONDS", 1.0)
    first, second = connect(), connect()
    sandbox = make_running(first, 1000)
    first.claim(sandbox.uuid, "stop")
    # It dies without a word.
    first.db._closed.set()
    first.db._beating.join()
    psql.execute("LOCK TABLE controllers IN EXCLUSIVE MODE")
    timer = threading.Timer(1.0, psql.rollback)
    timer.start()
    until = time.monotonic() + 30
    while True:
        try:
            assert second.claim(sandbox.uuid, "destroy").taken_over
            break
        except Busy:
            assert time.monotonic() < until, "the claim was never taken over"
    timer.join()


@pytest.mark.parametrize(
    "lock",
    [
        "UPDATE sandboxes SET name = name",
        "LOCK TABLE sandboxes IN EXCLUSIVE MODE",
        "SELECT pg_advisory_xact_lock(1634492770, 1)",
    ],
)
def test_a_write_that_waits_names_the_session_and_how_to_end_it(
    connect: Any, psql: Any, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    records = connect()
    sandbox = make_running(records, 1000)
    with records.db._transact() as session:
        session.execute("SELECT 1")
    records.db._writer.execute("SET lock_timeout = '1s'")
    psql.execute(lock)
    pid = psql.info.backend_pid
    # Somebody who only reads keeps nobody waiting, though its transaction is older.
    told: list[str] = []
    looker = threading.Timer(0.5, lambda: told.append(f"{records.db.name_locker()} {records.db.waits_since}"))
    looker.start()
    with pytest.raises(StoreError) as caught:
        records.renew(sandbox, 10**10, int(records.db.read_wall_time()))
    looker.join()
    sentence = rf"session {pid} of role tester, psql on [\d.]+, in a transaction since 20\S+Z"
    assert re.search(rf"\({sentence}\); nothing was written. End it \(SELECT pg_terminate_backend", str(caught.value))
    assert re.match(sentence, told[0]) and not told[0].endswith("None"), told
    assert records.db.waits_since is None


def test_a_read_of_a_locked_table_ends_soon_and_names_the_session(connect: Any, psql: Any) -> None:
    records = connect()
    psql.execute("LOCK TABLE sandboxes IN ACCESS EXCLUSIVE MODE")
    for _again in range(2):
        began = time.monotonic()
        with pytest.raises(StoreError, match=f"session {psql.info.backend_pid} of role tester"):
            records.find_all()
        assert time.monotonic() - began < 9
    psql.rollback()
    assert records.find_all() == []


def test_a_long_write_of_this_process_is_not_named_as_the_session_to_end(connect: Any) -> None:
    """The status would advise to terminate the daemon's own session."""
    own, other = connect(), connect()
    begun, looked = threading.Event(), threading.Event()

    def work(conn: Any) -> None:
        conn.execute("UPDATE meta SET value = value")
        begun.set()
        looked.wait(30)

    writer = threading.Thread(target=own.db.write, args=(work,))
    writer.start()
    assert begun.wait(30)
    process = f"session {own.db._writer.info.backend_pid} "
    named = {"own": own.db.name_locker(), "other": other.db.name_locker()}
    looked.set()
    writer.join()
    assert process in named["other"] and process not in named["own"], named


def test_a_lock_of_any_table_is_found(connect: Any, psql: Any) -> None:
    records = connect()
    tables = [row[0] for row in records.db.read("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    assert {"runs", "placements", "workspace_events"} < set(tables)
    unseen = []
    for table in tables:
        psql.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")
        if f"session {psql.info.backend_pid} " not in records.db.name_locker():
            unseen.append(table)
        psql.rollback()
    assert unseen == []
