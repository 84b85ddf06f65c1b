# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The SQLite store: opening, refusing, migrating, group commit, claims and compare-and-set."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    Busy,
    ClaimLost,
    InvalidInput,
    NotFound,
    RecordChanged,
    StoreError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, holders, records, schema
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.port import Connection
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite import engine
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database, explain

from support.engines import ENGINES, new_address
from support.lab import FakeClock

RANGE = (1000, 1099)
CHILD = """
import sys
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
path, me = sys.argv[1], sys.argv[2]
store = Records(open_database(path), SystemClock(), "child " + me)
"""


def child(path: Path | str, me: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(path), me],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def new(number: int, state: str = "REQUESTED") -> Sandbox:
    return Sandbox(
        uuid=f"00000000-0000-4000-8000-{number:012d}", vmid=0, name=f"s{number}", state=state, lease_expires_at=10**10
    )


def reserve(store: Records, number: int = 1, vmid: int | None = None) -> tuple[Claim, Sandbox]:
    sandbox = new(number)
    claim = store.reserve(sandbox, vmid=vmid, vmid_range=RANGE, occupied=set(), journal={"a": 1})
    return claim, store.get(sandbox.uuid)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "agentlab.db"


@pytest.fixture(params=ENGINES)
def address(request: pytest.FixtureRequest, path: Path) -> str:
    """Where empty records are, on each engine in turn."""
    return new_address(request.param, str(path))


@pytest.fixture
def store(address: str) -> Iterator[Records]:
    database = open_database(address)
    yield Records(database, SystemClock(), "tester")
    database.close()


# ---- files ----


def test_new_file_is_for_its_owner_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        Database(str(path))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_group_access_where_configured(path: Path) -> None:
    old = os.umask(0o077)
    try:
        Database(str(path), group_mode=True)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o660


def test_the_files_beside_it_are_no_wider(path: Path) -> None:
    old = os.umask(0)
    try:
        reserve(Records(Database(str(path)), SystemClock(), "x"))
        for one in path.parent.iterdir():
            assert one.stat().st_mode & 0o007 == 0, one
    finally:
        os.umask(old)


def test_a_widened_file_is_narrowed(path: Path) -> None:
    Database(str(path)).close()
    path.chmod(0o644)
    Database(str(path)).close()
    assert path.stat().st_mode & 0o007 == 0


def test_the_mode_of_a_file_that_is_not_ours_stays(path: Path) -> None:
    path.parent.mkdir()
    text = path.parent / "motd"
    text.write_text("Welcome to this host, where everybody may read this.\n" * 30, encoding="utf-8")
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (a)")
    conn.close()
    for found in (text, path):
        found.chmod(0o644)
        before = found.read_bytes()
        with pytest.raises(StoreError):
            Database(str(found))
        assert found.stat().st_mode & 0o777 == 0o644 and found.read_bytes() == before


def test_settings_that_promises_stand_on(path: Path) -> None:
    database = Database(str(path))
    assert database.read("PRAGMA journal_mode")[0][0] == "wal"
    for conn in (database._writer, database._reader):
        assert conn.execute("PRAGMA foreign_keys").fetchone()[0] == 1
        assert conn.execute("PRAGMA synchronous").fetchone()[0] == 2
    # Reads wait in SQLite. Writes wait in our own loop: see the next test.
    assert database._reader.execute("PRAGMA busy_timeout").fetchone()[0] >= 30000 and engine.BUSY_SECONDS >= 30


@pytest.mark.parametrize("step", ["open", "look only", "migrate", "write"])
def test_the_wait_for_a_locked_file_is_bounded_once(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """No wait within a wait: SQLite's own timeout would be added to that of our loop, for each statement."""
    Database(str(path)).close()
    waits: list[float] = []
    connect = sqlite3.connect

    def spy(*args: Any, **options: Any) -> sqlite3.Connection:
        waits.append(options["timeout"])
        return connect(*args, **options)

    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.3)
    monkeypatch.setattr(engine, "_STEP_SECONDS", 0.05)
    monkeypatch.setattr(sqlite3, "connect", spy)
    database = Database(str(path)) if step == "write" else None
    with contextlib.closing(connect(path, isolation_level=None)) as other:
        if step == "migrate":
            other.execute("PRAGMA user_version = 1")
        if step in ("open", "look only"):
            # With an exclusive locking mode not even a read is let in.
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE meta SET value = value")
        began = time.monotonic()
        with pytest.raises(StoreError, match="kept it busy"):
            if database:
                database.write(lambda conn: None)
            else:
                Database(str(path), dry_run=step == "look only")
        assert time.monotonic() - began > 0.25 and waits and max(waits) <= 0.05


# ---- migrations ----


def test_new_file_has_the_newest_schema(path: Path) -> None:
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert database.read("PRAGMA application_id")[0][0] == schema.APPLICATION_ID
    assert database.integrity() == "ok"


def test_an_older_file_is_brought_up_and_keeps_its_records(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(Records(Database(str(path)), SystemClock(), "x"))
    monkeypatch.setattr(
        schema,
        "MIGRATIONS",
        (*schema.MIGRATIONS, ("ALTER TABLE sandboxes ADD COLUMN extra TEXT", "CREATE TABLE more (a)")),
    )
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert database.read("SELECT extra, name FROM sandboxes")[0]["name"] == "s1"


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database(str(path)).close()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE half (a)", "CREATE TABLE broken (")))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(StoreError):
            Database(str(path))
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert not database.read("SELECT 1 FROM sqlite_master WHERE name = 'half'")


def test_many_processes_may_create_it_at_once(address: str) -> None:
    children = [child(address, str(n), "store.set_meta('k' + me, me)") for n in range(4)]
    for one in children:
        assert one.communicate(timeout=60)[1] == "" and one.returncode == 0
    assert len(open_database(address).read("SELECT * FROM meta WHERE key LIKE 'k%'")) == 4


def test_records_of_the_first_schema_are_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as old:
        old.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        old.setattr(schema, "VERSION", 1)
        first = Database(str(path))
        first.write(
            lambda conn: (
                conn.execute(
                    "INSERT INTO sandboxes (uuid, vmid, name, state, created_at, updated_at) "
                    "VALUES ('u', 1000, 'old', 'RUNNING', 1, 2)"
                )
                and None
            )
        )
        first.close()
    now = Database(str(path))
    assert now.read("PRAGMA user_version")[0][0] == schema.VERSION > 1
    kept = Records(now, SystemClock(), "test").get("u")
    assert (kept.vmid, kept.name, kept.state, kept.created_at, kept.lease_max_seconds) == (
        1000,
        "old",
        "RUNNING",
        1,
        None,
    )
    now.close()


# ---- what is refused ----


def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    Database(str(path)).close()
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA user_version = 99")
    conn.close()
    before = path.read_bytes()
    for dry_run in (False, True):
        with pytest.raises(
            StoreError,
            match="schema version 99 is newer than the \\d+ that this release knows; upgrade agentlab.proxmox",
        ):
            Database(str(path), dry_run=dry_run)
    assert path.read_bytes() == before


def test_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (a)")
    conn.close()
    path.chmod(0o600)
    before = path.read_bytes()
    for dry_run in (False, True):
        with pytest.raises(StoreError, match="the SQLite file of another program; set database to a path of its own"):
            Database(str(path), dry_run=dry_run)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("damage", ["text", "header", "middle"])
def test_damaged_file_is_named(path: Path, damage: str, dry_run: bool) -> None:
    store = Records(Database(str(path)), SystemClock(), "x")
    for number in range(40):
        reserve(store, number)
    store.db.write(lambda conn: None)
    store.db._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.db.close()
    content = bytearray(path.read_bytes())
    if damage == "text":
        content = bytearray(b"this is no database, but long enough to be looked at by anyone who wants to\n" * 20)
    elif damage == "header":
        content[:16] = b"x" * 16
    else:
        content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(bytes(content))
    for beside in ("-wal", "-shm"):
        Path(f"{path}{beside}").unlink(missing_ok=True)
    with pytest.raises(StoreError) as caught:
        Records(Database(str(path), dry_run=dry_run), SystemClock(), "x").find_all()
    assert str(path) in caught.value.message and "damaged" in caught.value.message


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Database(str(tmp_path / "file" / "agentlab.db"))
    with pytest.raises(StoreError):
        Database(str(tmp_path))


def test_read_only_file_is_explained(path: Path) -> None:
    database = Database(str(path))
    database._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="read-only for this user; run as the owner or mend the permissions"):
        database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('a', 'b')") and None)


@contextlib.contextmanager
def as_another_user(folder: Path) -> Iterator[None]:
    """Be a user who may enter the folder and owns nothing in it (as root; else the files are taken from ourselves)."""
    if os.geteuid() != 0:
        yield
        return
    folder.chmod(0o777)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_that_this_user_may_not_read_is_told_with_mode_and_owner(suffix: str, dry_run: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "agentlab.db"
        store = Records(Database(str(path)), SystemClock(), "test")
        closed = Path(f"{path}{suffix}")
        path.chmod(0o666)
        Path(f"{path}-shm").chmod(0o666)
        closed.chmod(0o200)
        owner = pwd.getpwuid(closed.stat().st_uid).pw_name
        with as_another_user(Path(name)), pytest.raises(StoreError) as caught:
            Database(str(path), dry_run=dry_run).read("SELECT count(*) FROM meta")
        sentence = (
            f"this user may not read {closed} (mode 0200, owner {owner}); run as {owner}, or mend its owner and mode"
        )
        assert sentence in caught.value.message, caught.value.message
        store.db.close()


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("disk I/O error"),
        OSError(errno.EIO, "Input/output error"),
        sqlite3.DatabaseError("something new"),
    ],
)
def test_each_error_of_the_disk_has_a_next_step(path: Path, error: Exception) -> None:
    Database(str(path)).close()
    message = explain(str(path), error).message
    assert message.startswith(f"database {path}: {error}: ") and "nothing was written" in message
    assert ("dmesg" in message and "df" in message) if "something new" not in message else "agentlab doctor" in message


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_database_behind_a_dangling_link_is_not_created(tmp_path: Path, dry_run: bool) -> None:
    target, link = tmp_path / "target.db", tmp_path / "link.db"
    link.symlink_to(target)
    with pytest.raises(StoreError) as caught:
        Database(str(link), dry_run=dry_run)
    assert f"database {link}: it is a link to {target}, which does not exist; mount or create" in caught.value.message
    assert not target.exists()
    # A link to records that are there is a path like any other.
    Database(str(target)).close()
    Database(str(link), dry_run=dry_run).close()


def test_full_disk_is_explained_and_nothing_is_written(path: Path) -> None:
    store = Records(Database(str(path)), SystemClock(), "x")
    claim, sandbox = reserve(store)
    pages = store.db._writer.execute("PRAGMA page_count").fetchone()[0]
    store.db._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="the disk is full"):
        store.db.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('big', ?)", ("x" * 1000000,)) and None)
    store.db._writer.execute("PRAGMA max_page_count = 1073741823")
    assert store.meta("big") is None
    store.release(claim)
    assert store.get(sandbox.uuid).state == "REQUESTED"


# ---- check mode ----


def test_check_mode_writes_no_file(path: Path) -> None:
    store = Records(Database(str(path), dry_run=True), SystemClock(), "x")
    _dummy, sandbox = reserve(store)
    assert store.get(sandbox.uuid).name == "s1"
    assert not path.parent.exists()


def test_check_mode_works_on_a_copy(path: Path) -> None:
    first = Records(Database(str(path)), SystemClock(), "x")
    claim, sandbox = reserve(first)
    first.release(claim)
    first.db.close()
    before = {one.name: one.read_bytes() for one in path.parent.iterdir() if not one.name.endswith(("-shm", "-wal"))}
    copy = Records(Database(str(path), dry_run=True), SystemClock(), "x")
    assert copy.get(sandbox.uuid).name == "s1"
    claim = copy.claim(sandbox.uuid, "create")
    copy.change(claim, sandbox, "create", to="PROVISIONING")
    reserve(copy, 2)
    copy.db.close()
    assert {
        one.name: one.read_bytes() for one in path.parent.iterdir() if not one.name.endswith(("-shm", "-wal"))
    } == before
    assert [one.state for one in Records(Database(str(path)), SystemClock(), "x").find_all()] == ["REQUESTED"]


def test_check_mode_reads_the_file_itself_until_something_is_written(path: Path) -> None:
    """A million records are not copied to say what would be pruned; nor can anything of it reach the file."""
    real = Records(Database(str(path)), SystemClock(), "real")
    reserve(real, 1)
    store = Records(Database(str(path), dry_run=True), SystemClock(), "check")
    reserve(real, 2)
    assert [one.name for one in store.find_all()] == ["s1", "s2"]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.db._writer.execute("DELETE FROM sandboxes")
    store.set_meta("tried", "1")
    reserve(real, 3)
    assert [one.name for one in store.find_all()] == ["s1", "s2"] and store.meta("tried") == "1"
    with store.db.together():
        store.set_meta("tried", "2")
    assert store.meta("tried") == "2" and real.meta("tried") is None and len(real.find_all()) == 3


def test_check_mode_sees_what_is_still_in_the_log(path: Path) -> None:
    first = Records(Database(str(path)), SystemClock(), "x")
    reserve(first)
    assert len(Records(Database(str(path), dry_run=True), SystemClock(), "x").find_all()) == 1


# ---- group commit ----


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


def moved(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def replaced_by_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def all_deleted(path: Path) -> None:
    for one in path.parent.glob("agentlab.db*"):
        one.unlink()


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, moved, replaced_by_a_copy, all_deleted, lambda path: Path(f"{path}-wal").unlink()],
    ids=["deleted", "moved", "replaced", "deleted with its -wal", "only -wal deleted"],
)
def test_nothing_is_written_once_another_file_stands_at_the_path(path: Path, damage: Callable[[Path], None]) -> None:
    store = Records(Database(str(path)), SystemClock(), "test")
    claim, sandbox = reserve(store)
    assert store.db.replaced() is None
    damage(path)
    sentence = store.db.replaced()
    assert (
        sentence
        and sentence.startswith(f"database {path}: {path}")
        and "was deleted, moved or replaced while this process had it open" in sentence
    )
    before = everything(store)
    writes: list[Callable[[], object]] = [
        lambda: store.set_meta("a", "1"),
        lambda: store.claim(sandbox.uuid, "stop"),
        lambda: store.journal(claim, "create", "x", {}),
        lambda: store.change(claim, sandbox, "create", to="PROVISIONING"),
        lambda: store.expire(sandbox, 10**10),
        lambda: reserve(store, 2),
    ]
    for write in writes:
        with pytest.raises(StoreError) as refused:
            write()
        assert refused.value.message == sentence
    with pytest.raises(StoreError) as refused, store.db.together():
        raise AssertionError("the bulk run was begun")
    assert refused.value.message == sentence
    assert everything(store) == before


def test_a_file_that_is_replaced_in_the_middle_of_a_transaction_takes_its_commit_along(path: Path) -> None:
    store = Records(Database(str(path)), SystemClock(), "test")
    with pytest.raises(StoreError, match="was deleted, moved or replaced"), store.db.together():
        store.set_meta("a", "1")
        moved(path)
    assert store.meta("a") is None


def test_a_link_to_the_records_that_leads_elsewhere_is_noticed(path: Path, tmp_path: Path) -> None:
    Database(str(path)).close()
    link = tmp_path / "link.db"
    link.symlink_to(path)
    database = Database(str(link))
    database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('a', '1')") and None)
    other = tmp_path / "other.db"
    Database(str(other)).close()
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(StoreError, match="was deleted, moved or replaced"):
        database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('b', '1')") and None)


def test_together_is_one_commit_and_reads_its_own_writes(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    other = Records(open_database(address), SystemClock(), "other")
    with store.db.together():
        store.set_meta("a", "1")
        with pytest.raises(StoreError):
            store.db.write(
                lambda conn: (
                    conn.execute("INSERT INTO meta VALUES ('b', '1')")
                    and conn.execute("INSERT INTO nothing VALUES (1)")
                )
            )
        store.set_meta("c", "1")
        assert store.meta("a") == store.meta("c") == "1" and store.meta("b") is None
        assert other.meta("a") is None
    assert other.meta("a") == other.meta("c") == "1" and other.meta("b") is None


def test_together_writes_all_or_nothing(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    with pytest.raises(RuntimeError), store.db.together():
        store.set_meta("a", "1")
        raise RuntimeError
    assert store.meta("a") is None
    with pytest.raises(StoreError, match="rolled back"), store.db.together():
        store.set_meta("a", "1")
        # As SQLite does by itself when the disk is full.
        store.db._writer.execute("ROLLBACK")
        store.set_meta("b", "1")
    assert store.meta("a") is None and store.meta("b") is None
    store.set_meta("d", "1")
    assert store.meta("d") == "1"


def everything(store: Records, *tables: str) -> list[list[tuple[object, ...]]]:
    """All rows of these tables, or of all that a step of an operation writes to."""
    return [
        [tuple(row) for row in store.db.read(f"SELECT * FROM {table} ORDER BY 1")]
        for table in tables or ("sandboxes", "events", "claims", "operations")
    ]


def test_a_step_that_is_refused_in_a_bulk_run_leaves_nothing_and_spoils_no_other(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "test")
    (first, one), (stale, two), (lost, three), (last, four) = (reserve(store, number) for number in (1, 2, 3, 4))
    store.amend(two, "update", keepalive=1)
    lost.fence -= 1
    with store.db.together():
        store.change(first, one, "create", to="FAILED", finish=True)
        before = everything(store)
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
        assert everything(store) == before
        store.change(last, four, "create", to="FAILED", finish=True)
    assert [found.state for found in store.find_all()] == ["FAILED", "REQUESTED", "REQUESTED", "FAILED"]
    assert [found.sandbox_uuid for found in store.unfinished()[0]] == [two.uuid, three.uuid]
    # The claims of those that were refused are still held, and good for another try.
    store.change(stale, store.get(two.uuid), "create", to="FAILED", finish=True)


def test_a_step_that_the_database_breaks_off_halfway_leaves_no_half(path: Path) -> None:
    """As a full disk does: after the record was written, and before its event was."""
    store = Records(Database(str(path)), SystemClock(), "test")
    (first, one), (second, two), (third, three) = (reserve(store, number) for number in (1, 2, 3))
    before = everything(store)
    store.db._writer.execute(
        f"CREATE TEMP TRIGGER broken BEFORE INSERT ON main.events WHEN NEW.sandbox_uuid = '{two.uuid}' "
        "BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
    )
    with pytest.raises(StoreError, match="disk is full"):
        store.change(second, two, "create", to="FAILED", finish=True)
    assert everything(store) == before
    with pytest.raises(StoreError, match="disk is full"), store.db.together():
        store.change(first, one, "create", to="FAILED", finish=True)
        with pytest.raises(StoreError, match="disk is full"):
            store.change(second, two, "create", to="FAILED", finish=True)
        # Nobody is told that it was written: neither those before it nor those after it were.
        with pytest.raises(StoreError, match="disk is full"):
            store.change(third, three, "create", to="FAILED", finish=True)
    assert everything(store) == before
    store.db._writer.execute("DROP TRIGGER broken")
    with store.db.together():
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
    with store.db.together():
        begun.set()
        store.set_meta("first", "1")
    for one in threads:
        one.join(10)
    assert all(store.meta(f"k{number}") == "1" for number in range(20)) and store.meta("first") == "1"


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
print(store.meta("later"), store.meta("mine"))
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
    assert database.integrity() == "ok"


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


# ---- records ----


def test_vmid_and_name_are_unique_among_live_records_only(store: Records) -> None:
    claim, sandbox = reserve(store, 1, vmid=1005)
    with pytest.raises(InvalidInput, match="vmid: 1005 already belongs to a live sandbox"):
        reserve(store, 2, vmid=1005)
    twin = new(3)
    twin.name = "s1"
    with pytest.raises(InvalidInput, match="name: 's1' is the name of the live sandbox 1005"):
        store.reserve(twin, vmid=None, vmid_range=RANGE, occupied=set(), journal={})
    store.change(claim, sandbox, "destroy", to="DESTROYED", finish=True)
    reserve(store, 2, vmid=1005)
    store.reserve(twin, vmid=1006, vmid_range=RANGE, occupied=set(), journal={})
    assert [(one.vmid, one.state) for one in store.find_all(include_destroyed=True)] == [
        (1005, "DESTROYED"),
        (1005, "REQUESTED"),
        (1006, "REQUESTED"),
    ]
    assert store.last_by_vmid(1005).name == "s2"


def test_a_freed_vmid_is_not_the_next_one_taken_and_the_range_wraps(store: Records) -> None:
    given = []
    for number in range(3):
        sandbox = new(number)
        claim = store.reserve(
            sandbox, vmid=None, vmid_range=(1000, 1002), occupied={1001} if number == 1 else set(), journal={}
        )
        given.append(sandbox.vmid)
        store.change(claim, store.get(sandbox.uuid), "destroy", to="DESTROYED", finish=True)
    assert given == [1000, 1002, 1000]


def test_full_range_is_refused(store: Records) -> None:
    with pytest.raises(InvalidInput, match="vmid_range: all VMIDs of 1000-1000 are taken"):
        store.reserve(new(1), vmid=None, vmid_range=(1000, 1000), occupied={1000}, journal={})
    assert store.find_all() == []


def test_change_is_a_compare_and_set(store: Records) -> None:
    claim, old = reserve(store)
    now = store.change(claim, old, "create", to="PROVISIONING", reason="clone")
    assert (now.state, now.generation) == ("PROVISIONING", old.generation + 1)
    with pytest.raises(RecordChanged, match="was changed by another run meanwhile"):
        store.change(claim, old, "create", to="FAILED")
    with pytest.raises(RecordChanged, match="no transition from PROVISIONING to STOPPED"):
        store.change(claim, now, "create", to="STOPPED")
    assert store.get(old.uuid).state == "PROVISIONING"
    assert [
        (row["from_state"], row["to_state"], row["outcome"]) for row in history.events(store.db, uuid=old.uuid)
    ] == [(None, "REQUESTED", "decided"), ("REQUESTED", "PROVISIONING", "done")]


def test_a_refused_change_leaves_no_event(store: Records) -> None:
    claim, old = reserve(store)
    store.change(claim, old, "create", protected=1)
    count = len(history.events(store.db, uuid=old.uuid))
    for _dummy in range(2):
        with pytest.raises(RecordChanged):
            store.amend(old, "update", protected=0)
    assert len(history.events(store.db, uuid=old.uuid)) == count and store.get(old.uuid).protected


def test_what_a_change_answers_is_what_is_stored(store: Records) -> None:
    claim, old = reserve(store)
    now = store.amend(old, "update", protected=1, keepalive=1, absent_seen_at=7)
    assert now == store.get(old.uuid) and now.protected is True and now.keepalive is True
    for values in (
        {"to": "PROVISIONING", "reason": "clone"},
        {"tags": ["a", "b"]},
        {"node": "pve1", "ip": "192.0.2.7", "protected": 0},
        {"outcome": "kept", "journal": ("cloning", {})},
        {"to": "BOOTING", "smbios_uuid": new(1).uuid, "snippet": "/x"},
    ):
        now = store.change(claim, now, "create", **values)
        assert now == store.get(old.uuid), values
    assert now.protected is False and now.tags == ["a", "b"] and now.absent_seen_at is None
    over = store.expire(now, now.lease_expires_at)
    assert over == store.get(old.uuid) and (over.state, over.reason, over.generation) == (
        "TIMEOUT",
        "lease_expired",
        now.generation + 1,
    )


def test_each_write_to_a_record_raises_its_generation() -> None:
    """A change answers the columns that it does not write as they were read, at that generation."""
    sources = [path.read_text(encoding="utf-8") for path in Path(records.__file__).parent.glob("*.py")]
    found = [statement for source in sources for statement in source.split("UPDATE sandboxes")[1:]]
    assert len(found) >= 3
    # These concern no other run, so they must not make another run's write fail: that a file is gone from its host, and
    # when an address was seen again.
    quiet = [
        statement.split("WHERE")[0].strip()
        for statement in found
        if "generation = generation + 1" not in statement.split("WHERE")[0]
    ]
    assert quiet == ["SET snippet_host = NULL", "SET ip_seen_at = ?"]


def test_destroyed_is_final(store: Records) -> None:
    claim, old = reserve(store)
    gone = store.change(claim, old, "destroy", to="DESTROYED", finish=True)
    claim = store.claim(gone.uuid, "create")
    for state in ("REQUESTED", "RUNNING", "STOPPED", "FAILED", "TIMEOUT"):
        with pytest.raises(RecordChanged):
            store.change(claim, gone, "create", to=state)


def test_finish_removes_journal_and_claim_with_the_change(store: Records) -> None:
    claim, old = reserve(store)
    assert store.under_way(old.uuid).phase == "reserved"
    store.change(claim, old, "create", to="FAILED", finish=True)
    assert store.under_way(old.uuid) is None and store.db.read("SELECT * FROM claims") == []


def test_retention_removes_old_destroyed_records_with_their_events_and_no_others(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    for number in (1, 2, 3):
        claim, one = reserve(store, number)
        if number < 3:
            store.change(claim, one, "destroy", to="DESTROYED", finish=True)
        clock.pass_time(100)
    assert history.forget(store, 250) == 1
    assert [one.name for one in store.find_all(include_destroyed=True)] == ["s2", "s3"]
    assert store.db.read("SELECT count(*) FROM events WHERE sandbox_uuid LIKE '%1'")[0][0] == 0
    with pytest.raises(NotFound):
        store.get(new(1).uuid)


# ---- claims ----


def test_a_lost_fence_writes_nothing_more(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    claim, sandbox = reserve(store)
    clock.pass_time(store.claim_seconds)
    second = Records(store.db, clock, "second")
    newer = second.claim(sandbox.uuid, "destroy")
    assert newer.fence > claim.fence and newer.interrupted is not None and newer.interrupted.phase == "reserved"
    for write in (
        lambda: store.journal(claim, "create", "cloning", {}),
        lambda: store.change(claim, sandbox, "create", to="PROVISIONING"),
        lambda: store.fenced(claim, lambda conn: None),
    ):
        with pytest.raises(ClaimLost, match="lost to another run"):
            write()
    store.release(claim)
    assert store.get(sandbox.uuid).state == "REQUESTED" and store.under_way(sandbox.uuid).phase == "reserved"
    assert len(store.db.read("SELECT * FROM claims")) == 1, (
        "the release of a lost claim must not release the other run's"
    )


def test_writing_extends_the_claim(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    claim, _dummy = reserve(store)
    clock.pass_time(records.CLAIM_SECONDS - 1)
    store.journal(claim, "create", "cloning", {})
    clock.pass_time(records.CLAIM_SECONDS - 1)
    with pytest.raises(Busy):
        Records(store.db, clock, "second").claim(claim.uuid, "stop")


def test_a_dead_process_claim_is_taken_over_at_once(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "heir")
    killed = child(
        address,
        "1",
        """
import os, signal
one = Sandbox(uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED")
claim = store.reserve(one, vmid=None, vmid_range=(1000, 1999), occupied=set(), journal={"a": 1})
store.journal(claim, "create", "cloning", {"a": 2})
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    killed.communicate(timeout=30)
    assert killed.returncode == -9
    assert [one.phase for one in store.interrupted()] == ["cloning"]
    claim = store.claim(new(1).uuid, "create", wait=0)
    assert claim.interrupted is not None and claim.interrupted.detail == {"a": 2}


def test_a_live_process_claim_is_busy_and_names_the_holder(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "second")
    living = child(
        address,
        "AWX job 7",
        """
one = Sandbox(uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED")
store.reserve(one, vmid=1044, vmid_range=(1000, 1999), occupied=set(), journal={})
print("ready", flush=True)
sys.stdin.readline()
""",
    )
    try:
        assert living.stdout.readline() == "ready\n"
        with pytest.raises(Busy, match="sandbox 1044 is being worked on: create by child AWX job 7 for") as caught:
            store.claim(new(1).uuid, "stop", wait=0.2)
        assert caught.value.detail["holder"] == "child AWX job 7" and caught.value.detail["operation"] == "create"
        assert store.interrupted() == []
    finally:
        living.communicate("\n", timeout=30)
    assert store.claim(new(1).uuid, "stop", wait=5).operation == "stop"


def test_a_claim_that_cannot_be_given_back_keeps_its_own_process_waiting_for_nothing(path: Path) -> None:
    """After a full disk the next module in this process (a loop, a retry) or the daemon's next pass goes on.

    Another process still waits.
    """
    store = Records(Database(str(path)), SystemClock(), "tester")
    claim, sandbox = reserve(store)
    store.db._writer.execute("PRAGMA query_only = ON")
    store.release(claim)
    store.db._writer.execute("PRAGMA query_only = OFF")
    run = child(
        path,
        "b",
        f"from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Busy\n"
        f"try: store.claim({sandbox.uuid!r}, 'stop')\nexcept Busy: print('busy')",
    )
    assert run.communicate() == ("busy\n", "")
    assert [one.kind for one in store.interrupted()] == ["create"]
    again = Records(Database(str(path)), SystemClock(), "tester").claim(sandbox.uuid, "create")
    assert again.fence > claim.fence and again.interrupted is not None
    with pytest.raises(Busy):
        store.claim(sandbox.uuid, "create")


def test_a_claim_that_cannot_be_given_back_ends_no_claim_in_another_database(path: Path) -> None:
    """The fence begins with the time, so two databases may give out the same one in the same second."""
    clock = FakeClock()
    first = Records(Database(str(path)), clock, "tester")
    second = Records(Database(str(path.with_name("second.db"))), clock, "tester")
    lost, held = reserve(first)[0], reserve(second)[0]
    assert (lost.uuid, lost.fence) == (held.uuid, held.fence)
    first.db._writer.execute("PRAGMA query_only = ON")
    first.release(lost)
    first.db._writer.execute("PRAGMA query_only = OFF")
    with pytest.raises(Busy):
        second.claim(held.uuid, "stop")


def test_waiting_for_a_claim_is_bounded_and_succeeds_when_it_is_given_back(store: Records) -> None:
    claim, sandbox = reserve(store)
    other = Records(store.db, SystemClock(), "other")
    timer = threading.Timer(0.2, store.release, (claim,))
    timer.start()
    assert other.claim(sandbox.uuid, "stop", wait=5).operation == "stop"
    timer.join()


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"started": "['1']"}, True),
        ({"pid": 2**22 + 5}, True),
        ({"boot": "another"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "boot": "another"}, False),
        ({"ns": "pid:[1]", "pid": 2**22 + 5}, False),
        ({"boot": ""}, False),
    ],
)
def test_only_certain_death_counts(change: dict[str, object], dead: bool) -> None:
    found = {**json.loads(holders.identity()), **change}
    assert holders.is_dead(json.dumps(found)) is dead


@pytest.mark.parametrize(
    "written, machine, dead",
    [("before this boot", None, True), ("after this boot", None, False), ("before this boot", "other", False)],
)
def test_another_boot_of_this_name_is_dead_only_if_it_was_this_machine(
    written: str, machine: str | None, dead: bool
) -> None:
    """A second host with the same name, also one made from the same image, keeps its claims while it works."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    holder = {
        **json.loads(holders.identity()),
        "boot": "another",
        "at": booted + (-5 if written == "before this boot" else 5),
    }
    if machine:
        holder["machine"] = machine
    assert holders.is_dead(json.dumps(holder)) is dead


def test_a_renewal_that_waited_over_the_end_of_the_lease_is_refused(address: str) -> None:
    """The second in which it began and the wait, each rounded down, are less than the time that has passed."""
    clock = FakeClock()
    clock.wall = 1000000000.9
    store = Records(open_database(address), clock, "x")
    _claim, sandbox = reserve(store)
    store.db.write(
        lambda conn: conn.execute("UPDATE sandboxes SET state = 'RUNNING', lease_expires_at = 1000000001") and None
    )
    sandbox = store.get(sandbox.uuid)
    write = store.db.write

    def late(work: Callable[[Connection], object], *, checked: bool = False) -> object:
        clock.pass_time(0.5)
        return write(work, checked=checked)

    store.db.write = late  # type: ignore[method-assign, assignment]
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 1000003600, clock.now())


@pytest.mark.parametrize("text", ["", "x", "{}", "[]", "null", '{"host": 1}'])
def test_a_holder_that_cannot_be_read_counts_as_alive(text: str) -> None:
    assert holders.is_dead(text) is False


# ---- renewal against expiry ----


def running(store: Records, lease: int) -> Sandbox:
    _dummy, sandbox = reserve(store)
    store.db.write(
        lambda conn: conn.execute("UPDATE sandboxes SET state = 'RUNNING', lease_expires_at = ?", (lease,)) and None
    )
    return store.get(sandbox.uuid)


def test_renewal_and_expiry_exclude_each_other(store: Records) -> None:
    sandbox = running(store, 1000)
    with pytest.raises(RecordChanged):
        store.expire(sandbox, 999)
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 5000, 1000)
    renewed = store.renew(sandbox, 5000, 999)
    assert renewed.lease_expires_at == 5000
    with pytest.raises(RecordChanged):
        store.expire(sandbox, 1000)
    over = store.expire(renewed, 5000)
    assert over.state == "TIMEOUT"
    with pytest.raises(RecordChanged):
        store.renew(over, 9000, 4000)


def test_a_destroy_under_way_beats_a_renewal(store: Records) -> None:
    sandbox = running(store, 10**10)
    store.db.write(lambda conn: conn.execute("UPDATE operations SET kind = 'destroy'") and None)
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 2 * 10**10, 5)


def test_keepalive_renews_what_is_over_but_never_what_is_being_destroyed(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "x")
    sandbox = running(store, 10)
    store.db.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    renewed = store.renew(sandbox, 5000, 1000, keepalive=True)
    assert renewed.lease_expires_at == 5000
    claim = store.claim(sandbox.uuid, "destroy")
    store.journal(claim, "destroy", "verifying", {})
    with pytest.raises(RecordChanged):
        store.renew(renewed, 9000, 6000, keepalive=True)
    assert store.get(sandbox.uuid).lease_expires_at == 5000


def test_an_event_that_repeats_the_last_one_is_not_written(store: Records) -> None:
    _claim, sandbox = reserve(store)
    before = len(history.events(store.db, uuid=sandbox.uuid))

    def count(**changes: Any) -> int:
        values = {"outcome": "kept", "reason": "locked", "evidence": {"lock": "backup"}, **changes}
        store.note(sandbox, str(values.pop("operation", "cleanup")), **values)
        return len(history.events(store.db, uuid=sandbox.uuid)) - before

    assert [count(), count(), count(evidence={"lock": "migrate"}), count(outcome="failed")] == [1, 1, 2, 3]
    # Another operation in between changes nothing; something that was done does.
    assert [count(operation="destroy"), count(outcome="failed"), count(operation="destroy")] == [4, 4, 4]
    assert [count(outcome="done"), count(outcome="done"), count(outcome="failed")] == [5, 6, 7]
    store.actor = "somebody else"
    assert [count(outcome="failed"), count(outcome="failed")] == [8, 8]


def test_each_closed_journal_of_a_killed_run_has_its_event(store: Records) -> None:
    claim, sandbox = reserve(store)
    sandbox = store.change(claim, sandbox, "create", finish=True)
    for _run in range(4):
        claim = store.claim(sandbox.uuid, "stop")
        store.journal(claim, "stop", "requested", {})
        sandbox = store.change(claim, sandbox, "stop", outcome="interrupted", reason="requested", finish=True)
    outcomes = [row["outcome"] for row in history.events(store.db, uuid=sandbox.uuid)]
    assert outcomes.count("interrupted") == 4
