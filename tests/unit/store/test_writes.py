# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes of many threads and processes: group commit, all or nothing in group_writes(), nothing lost."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    ClaimLost,
    InvalidInput,
    RecordChanged,
    StoreError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.port import Connection
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.records import child, read_all_rows, reserve


@pytest.mark.parametrize("checked", [False, True])
def test_one_refused_write_spoils_no_other(address: str, checked: bool) -> None:
    database = open_database(address)
    results: dict[int, object] = {}
    # Held, so that all of them queue up and are committed together.
    database._writer_lock.acquire()

    def work(number: int) -> Callable[[Connection], int]:
        def inner(conn: Connection) -> int:
            conn.execute("INSERT INTO meta VALUES (?, '1')", (f"job{number}",))
            if number % 3 == 0:
                raise InvalidInput(f"refused {number}")
            if number % 5 == 0:
                conn.execute("INSERT INTO nowhere VALUES (1)")
            return number

        return inner

    def run(number: int) -> None:
        try:
            results[number] = database.write(work(number), checked=checked)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 31)]
    for one in threads:
        one.start()
    while len(database._queue) < 30:
        pass
    database._writer_lock.release()
    for one in threads:
        one.join(30)
    for number, result in results.items():
        if number % 3 == 0:
            assert isinstance(result, InvalidInput) and result.message == f"refused {number}"
        elif number % 5 == 0:
            assert isinstance(result, StoreError)
        else:
            assert result == number
    stored = {row["key"] for row in database.read("SELECT key FROM meta WHERE key LIKE 'job%'")}
    assert stored == {f"job{n}" for n in range(1, 31) if n % 3 and n % 5}


def test_a_failed_commit_fails_every_job_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(str(path))

    def work(conn: sqlite3.Connection) -> None:
        conn.execute("INSERT INTO meta VALUES ('a', '1')")
        conn.execute("ROLLBACK")

    with pytest.raises(StoreError):
        database.write(work)
    assert database.read("SELECT * FROM meta WHERE key = 'a'") == []
    database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('b', '1')") and None)
    assert database.read("SELECT value FROM meta WHERE key = 'b'")[0][0] == "1"


def test_an_interrupted_commit_is_told_to_every_job_of_it(address: str) -> None:
    """Ctrl-C in the thread that commits for the others."""
    database = open_database(address)
    told: dict[str, BaseException] = {}

    def interrupted(conn: Connection) -> None:
        raise KeyboardInterrupt

    def run(name: str, work: Callable[[Connection], None]) -> None:
        try:
            database.write(work)
        except BaseException as error:
            told[name] = error

    threads = [
        threading.Thread(target=run, args=("leader", interrupted)),
        threading.Thread(
            target=run, args=("other", lambda conn: conn.execute("INSERT INTO meta VALUES ('a', '1')") and None)
        ),
    ]
    # Held, so that the second one queues up behind the first.
    with database._writer_lock:
        for number, one in enumerate(threads, 1):
            one.start()
            while len(database._queue) < number:
                pass
    for one in threads:
        one.join(30)
    assert isinstance(told["leader"], KeyboardInterrupt) and isinstance(told["other"], StoreError)
    assert database.read("SELECT * FROM meta WHERE key = 'a'") == []
    database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('b', '1')") and None)


def test_together_is_one_commit_and_reads_its_own_writes(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    other = Records(open_database(address), SystemClock(), "other")
    with store.db.group_writes():
        store.set_meta("a", "1")
        with pytest.raises(StoreError):
            store.db.write(
                lambda conn: (
                    conn.execute("INSERT INTO meta VALUES ('b', '1')")
                    and conn.execute("INSERT INTO nothing VALUES (1)")
                )
            )
        store.set_meta("c", "1")
        assert store.read_meta("a") == store.read_meta("c") == "1" and store.read_meta("b") is None
        assert other.read_meta("a") is None
    assert other.read_meta("a") == other.read_meta("c") == "1" and other.read_meta("b") is None


def test_together_writes_all_or_nothing(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    with pytest.raises(RuntimeError), store.db.group_writes():
        store.set_meta("a", "1")
        raise RuntimeError
    assert store.read_meta("a") is None
    with pytest.raises(StoreError, match="rolled back"), store.db.group_writes():
        store.set_meta("a", "1")
        # As SQLite does by itself when the disk is full.
        store.db._writer.execute("ROLLBACK")
        store.set_meta("b", "1")
    assert store.read_meta("a") is None and store.read_meta("b") is None
    store.set_meta("d", "1")
    assert store.read_meta("d") == "1"


def test_a_step_that_is_refused_in_a_bulk_run_leaves_nothing_and_spoils_no_other(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    (first, one), (stale, two), (lost, three), (last, four) = (reserve(store, number) for number in (1, 2, 3, 4))
    store.amend(two, "update", keepalive=1)
    lost.fence -= 1
    with store.db.group_writes():
        store.change(first, one, "create", to="FAILED", finish=True)
        before = read_all_rows(store)
        for finish in (True, False):
            with pytest.raises(RecordChanged, match="changed by another run"):
                store.change(stale, two, "create", to="FAILED", finish=finish, journal=("late", {}))
            with pytest.raises(ClaimLost):
                store.change(lost, three, "create", to="FAILED", finish=finish, journal=("late", {}))
            with pytest.raises(ClaimLost):
                store.change(lost, three, "create", outcome="kept", finish=finish, journal=("late", {}))
        for refused in (
            lambda: store.renew(three, 10**11, 5),
            lambda: store.expire(three, 5),
            lambda: store.amend(two, "update", protected=1),
        ):
            with pytest.raises(RecordChanged):
                refused()
        assert read_all_rows(store) == before
        store.change(last, four, "create", to="FAILED", finish=True)
    assert [found.state for found in store.find_all()] == ["FAILED", "REQUESTED", "REQUESTED", "FAILED"]
    assert [found.sandbox_uuid for found in store.list_unfinished()[0]] == [two.uuid, three.uuid]
    # The claims of those that were refused are still held, and good for another try.
    store.change(stale, store.get(two.uuid), "create", to="FAILED", finish=True)


def test_a_step_that_the_database_breaks_off_halfway_leaves_no_half(path: Path) -> None:
    """As a full disk does: after the record was written, and before its event was."""
    store = Records(Database(str(path)), SystemClock(), "test")
    (first, one), (second, two), (third, three) = (reserve(store, number) for number in (1, 2, 3))
    before = read_all_rows(store)
    store.db._writer.execute(
        f"CREATE TEMP TRIGGER broken BEFORE INSERT ON main.events WHEN NEW.sandbox_uuid = '{two.uuid}' "
        "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
    )
    with pytest.raises(StoreError, match="disk is full"):
        store.change(second, two, "create", to="FAILED", finish=True)
    assert read_all_rows(store) == before
    with pytest.raises(StoreError, match="disk is full"), store.db.group_writes():
        store.change(first, one, "create", to="FAILED", finish=True)
        with pytest.raises(StoreError, match="disk is full"):
            store.change(second, two, "create", to="FAILED", finish=True)
        # Nobody is told that it was written: neither those before it nor those after it were.
        with pytest.raises(StoreError, match="disk is full"):
            store.change(third, three, "create", to="FAILED", finish=True)
    assert read_all_rows(store) == before
    store.db._writer.execute("DROP TRIGGER broken")
    with store.db.group_writes():
        for claim, sandbox in ((first, one), (second, two), (third, three)):
            store.change(claim, sandbox, "create", to="FAILED", finish=True)
    assert {found.state for found in store.find_all()} == {"FAILED"} and store.db.read("SELECT * FROM claims") == []


def test_others_wait_for_together_and_lose_nothing(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    begun = threading.Event()
    threads = [
        threading.Thread(target=lambda number=number: begun.wait() and store.set_meta(f"k{number}", "1"))
        for number in range(20)
    ]
    for one in threads:
        one.start()
    with store.db.group_writes():
        begun.set()
        store.set_meta("first", "1")
    for one in threads:
        one.join(10)
    assert all(store.read_meta(f"k{number}") == "1" for number in range(20)) and store.read_meta("first") == "1"


def test_a_writer_that_is_interrupted_while_it_waits_keeps_nobody_waiting(address: str) -> None:
    """Ctrl-C in the thread whose turn comes next: the others are written all the same."""
    code = """
import signal, threading, time
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
db = store.db
held = threading.Event()
def hold():
    def work(conn):
        held.set()
        time.sleep(1.0)
    db.write(work)
threads = [threading.Thread(target=hold)]
threads[0].start()
held.wait()
signal.setitimer(signal.ITIMER_REAL, 0.3)
later = threading.Thread(target=lambda: (time.sleep(0.1), store.set_meta("later", "1")))
later.start()
try:
    store.set_meta("mine", "1")
except KeyboardInterrupt:
    print("interrupted")
threads[0].join(); later.join(20)
print(store.read_meta("later"), store.read_meta("mine"))
"""
    done = child(address, "a", code)
    out, err = done.communicate(timeout=60)
    assert out.split("\n")[:2] == ["interrupted", "1 None"], out + err


def test_writers_in_separate_processes_lose_nothing(address: str) -> None:
    open_database(address).close()
    code = """
import threading
def work(part):
    for n in range(10):
        store.db.write(lambda conn: conn.execute("INSERT INTO meta VALUES (?, ?)", (f"{me}-{part}-{n}", "1")) and None)
        store.db.write(lambda conn: conn.execute(
            "UPDATE meta SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT) WHERE key = 'fence'") and None)
threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
[one.start() for one in threads]; [one.join() for one in threads]
"""
    children = [child(address, str(n), code) for n in range(4)]
    for one in children:
        assert one.communicate(timeout=60)[1] == "" and one.returncode == 0
    database = open_database(address)
    assert len(database.read("SELECT 1 FROM meta WHERE key LIKE '%-%-%'")) == 80
    assert database.read("SELECT value FROM meta WHERE key = 'fence'")[0][0] == "80"
    assert database.check_integrity() == "ok"


def test_processes_that_reserve_at_once_get_different_vmids(address: str) -> None:
    open_database(address).close()
    code = """
import uuid
for n in range(8):
    one = Sandbox(uuid=str(uuid.uuid4()), vmid=0, name=f"c{me}-{n}", state="REQUESTED")
    store.reserve(one, vmid=None, vmid_range=(1000, 1999), occupied=set(), journal={})
    print(one.vmid)
"""
    children = [child(address, str(n), code) for n in range(4)]
    vmids = []
    for one in children:
        out, err = one.communicate(timeout=60)
        assert err == ""
        vmids += out.split()
    assert len(vmids) == len(set(vmids)) == 32
