# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Controllers that meet in PostgreSQL: the claim that a dead one left, real deadlocks and serialization failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError, StoreUnavailable
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.group_commit import QueuedWrite
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine

from support.engines import open_controllers, require_postgresql, server


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def connect() -> Iterator[Any]:
    """Open the records as one of several controllers, each on a host of its own."""
    with open_controllers() as open_controller:
        yield open_controller


def test_a_claim_with_a_journal_entry_is_left_to_whoever_finishes_the_operation(uri: str, connect: Any) -> None:
    """The takeover of a claim is counted. A claim that was removed before cannot be taken over."""
    first, second = connect(uri), connect(uri)
    sandbox = Sandbox(
        uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED", lease_expires_at=10**10
    )
    first.reserve(sandbox, vmid=None, vmid_range=(1000, 1099), occupied=set(), journal={})
    first.db.close()
    overview.drop_dead_claims(second)
    assert [entry.sandbox_uuid for entry in second.list_interrupted()] == [sandbox.uuid]
    assert second.claim(sandbox.uuid, "destroy").taken_over and second.db.takeovers == 1


def test_confirmed_commits_that_the_server_no_longer_has_are_noticed(uri: str, connect: Any) -> None:
    """As after a failover to an asynchronous standby. The next commit of the process must not hide it."""
    records = connect(uri)
    database = uri.rpartition("/")[2]
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    assert not records.db.has_lost_commits()
    records.set_meta("k", "1")
    server().execute(cut)
    records.set_meta("k", "2")
    assert not records.db.has_lost_commits(), "a lost connection is no lost commit"
    for lose in ("UPDATE controllers SET commits = commits - 1", "DELETE FROM controllers"):
        server().execute(lose, database)
        server().execute(cut)
        records.set_meta("k", "3")
        assert records.db.has_lost_commits()
        records.db.forget_lost_commits()
        assert not records.db.has_lost_commits()
        records.set_meta("k", "4")
        server().execute(lose, database)
        assert records.db.has_lost_commits(), "a process that only reads notices it too"
        records.db.forget_lost_commits()
        records.set_meta("k", "5")
        assert not records.db.has_lost_commits()


def test_a_process_whose_row_was_removed_after_a_long_silence_lost_nothing(
    uri: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = connect(uri)
    records.set_meta("k", "1")
    server().execute("DELETE FROM controllers", uri.rpartition("/")[2])
    real = engine.read_boot_seconds
    monkeypatch.setattr(engine, "read_boot_seconds", lambda: real() + engine._FORGET_SECONDS)
    assert not records.db.has_lost_commits()


@pytest.mark.parametrize("writes", [1, 2])
def test_a_real_deadlock_is_repeated_inside_the_store(uri: str, connect: Any, writes: int) -> None:
    """Two sessions lock two rows in opposite order. The server ends the transaction of the store."""
    import psycopg

    records = connect(uri)
    database = records.db
    for key in "ab":
        records.set_meta(key, "0")
    with psycopg.connect(uri) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SET deadlock_timeout = '1h'")
        other.execute("UPDATE meta SET value = value || '1' WHERE key = 'b'")
        failures: list[str | None] = []
        calls: list[Any] = []

        def update_other_row() -> None:
            other.execute("UPDATE meta SET value = value || '1' WHERE key = 'a'")
            other.commit()

        def work(conn: Any) -> str:
            conn.execute("SET LOCAL deadlock_timeout = '20ms'")
            conn.execute("UPDATE meta SET value = value || '2' WHERE key = 'a'")
            if not calls:
                calls.append(pool.submit(update_other_row))
                wait_for_lock(other.info.backend_pid)
            try:
                conn.execute("UPDATE meta SET value = value || '2' WHERE key = 'b'")
            except psycopg.Error as error:
                failures.append(error.sqlstate)
                raise
            return "written"

        batch = [QueuedWrite(work)]
        if writes == 2:
            batch.insert(0, QueuedWrite(lambda conn: conn.execute("INSERT INTO meta VALUES ('c', '1')") and None))
        with database._writer_lock:
            database.run_batch(batch)
        calls[0].result(60)
    assert failures == ["40P01"] and database.retries == 1
    assert [queued.error for queued in batch] == [None] * writes and batch[-1].value == "written"
    assert (records.read_meta("a"), records.read_meta("b")) == ("012", "012"), "each session wrote once"
    assert records.read_meta("c") == ("1" if writes == 2 else None)


def wait_for_lock(pid: int) -> None:
    """Wait until the session waits for a lock."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'"
    deadline = time.monotonic() + 60
    while server().execute(query) != [(1,)]:
        assert time.monotonic() < deadline, "the other session never waited"
        time.sleep(0.01)


@pytest.mark.parametrize("conflicts", [1, 99])
def test_a_real_serialization_failure_is_repeated_and_then_refused(uri: str, connect: Any, conflicts: int) -> None:
    """The URI may set a stricter isolation level. Then another session may change a row that this one has read."""
    import psycopg

    open_database(uri).close()
    records = connect(f"{uri}?options=-c%20default_transaction_isolation%3Dserializable")
    records.set_meta("a", "0")
    failures: list[str | None] = []

    def work(conn: Any) -> None:
        if len(failures) < conflicts:
            server().execute("UPDATE meta SET value = value || '1' WHERE key = 'a'", uri.rpartition("/")[2])
        try:
            conn.execute("UPDATE meta SET value = value || '2' WHERE key = 'a'")
        except psycopg.Error as error:
            failures.append(error.sqlstate)
            raise

    if conflicts == 1:
        records.db.write(work)
        assert records.read_meta("a") == "012"
    else:
        with pytest.raises(
            StoreError, match="other sessions changed the same rows .*nothing was written; run again"
        ) as e:
            records.db.write(work)
        assert not isinstance(e.value, StoreUnavailable), "the server is there"
        assert records.read_meta("a") == "0" + "1" * 5
    assert failures == ["40001"] * min(conflicts, 5) and records.db.retries == min(conflicts, 4)
