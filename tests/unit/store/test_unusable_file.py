# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A file that cannot be used is refused, named and left alone: newer, foreign, damaged, unreadable, on a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database, explain

from support.records import reserve


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


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
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


@pytest.fixture
def records_in_a_folder() -> Iterator[Path]:
    """Return the path of records whose folder every user can reach."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "records" / "agentlab.db"
        Database(str(path)).close()
        yield path


@contextlib.contextmanager
def close_folder(folder: Path) -> Iterator[str]:
    """Be a user who may not enter the folder. Gives what is told of that."""
    owner = pwd.getpwuid(folder.stat().st_uid).pw_name
    folder.chmod(0)
    try:
        with as_another_user(folder.parent):
            yield f"this user may not enter {folder} (mode 0000, owner {owner}); run as {owner}, or mend its owner and"
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("dry_run", [False, True])
def test_records_in_a_folder_that_this_user_may_not_enter_are_not_taken_for_missing(
    records_in_a_folder: Path, dry_run: bool
) -> None:
    """Check mode would answer from empty records."""
    path = records_in_a_folder
    with close_folder(path.parent) as sentence, pytest.raises(StoreError) as caught:
        Database(str(path), dry_run=dry_run)
    assert f"database {path}: " in caught.value.message and sentence in caught.value.message, caught.value.message


def test_a_folder_that_is_closed_under_a_running_process_is_told_and_not_taken_for_another_file(
    records_in_a_folder: Path,
) -> None:
    database = Database(str(records_in_a_folder))

    def write() -> None:
        database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('a', 'b')") and None)

    with close_folder(records_in_a_folder.parent) as sentence:
        told = database.explain_replacement()
        with pytest.raises(StoreError) as caught:
            write()
    assert told == caught.value.message and sentence in told and "nothing was written" in told, told
    assert "moved or replaced" not in told
    assert database.explain_replacement() is None
    write()
    database.close()


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


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("out of memory", "MemoryMax="),
        ("interrupted", "told to stop"),
        ("locking protocol", "on a local disk, never on NFS"),
        ("no such table: events", "Use one release for all"),
        ("database schema has changed", "Use one release for all"),
        ("string or blob too big", "Give a smaller one"),
        ("the transaction was rolled back", "look at the disk (df)"),
    ],
)
def test_each_error_of_sqlite_has_the_next_step_of_its_cause(path: Path, text: str, step: str) -> None:
    Database(str(path)).close()
    message = explain(str(path), sqlite3.OperationalError(text)).message
    assert message.startswith(f"database {path}: {text}: ") and step in message, message
    assert "nothing was written" in message and "ls -l" not in message, message


def test_a_table_that_somebody_removed_is_told_with_the_next_step(path: Path) -> None:
    database = Database(str(path))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE events")
        other.commit()
    with pytest.raises(StoreError, match="no such table: events: its tables are not as this release made them"):
        database.read("SELECT count(*) FROM events")
    database.close()


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
    assert store.read_meta("big") is None
    store.release(claim)
    assert store.get(sandbox.uuid).state == "REQUESTED"


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_stands_in_the_place_of_a_file_beside_the_records_is_named(path: Path, suffix: str, kind: str) -> None:
    Database(str(path)).close()
    beside = Path(f"{path}{suffix}")
    if kind == "folder":
        beside.mkdir()
    else:
        beside.symlink_to(path.parent / "nowhere" / "file")
    told = str(explain(str(path), sqlite3.OperationalError("unable to open database file")))
    assert f"{beside} is a " in told and "Move it away, then run again" in told, told
    if kind == "folder":
        with pytest.raises(StoreError, match="SQLite needs a file of that name"):
            reserve(Records(Database(str(path)), SystemClock(), "x"), 1)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_the_file_that_may_not_be_written_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    store = Records(Database(str(path)), SystemClock(), "x")
    reserve(store, 1)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda name, mode: real(name, mode) and (name, mode) != (f"{path}{suffix}", os.W_OK)
    )
    told = str(explain(str(path), sqlite3.OperationalError("attempt to write a readonly database")))
    assert told.endswith(f"mend the permissions ({path}{suffix})"), told
