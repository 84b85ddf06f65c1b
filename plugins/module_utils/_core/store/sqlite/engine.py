# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The SQLite engine: open, migrate and write a file. It knows transactions and files; it knows nothing of sandboxes.

Writes of many threads are committed together (group_commit), each in a savepoint of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...clock import Clock
from ...errors import StoreError, out_of_descriptors
from .. import schema
from ..group_commit import GroupCommit, QueuedWrite
from . import latest

T = TypeVar("T")

BUSY_SECONDS = 60.0
LIBRARY = sqlite3.sqlite_version


def explain(path: str, error: Exception) -> StoreError:
    """SQLite's error as a sentence that names the file and says what to do."""
    text = str(error)
    low = text.lower()
    unreadable = _why_unreadable(path)
    if unreadable:
        return StoreError(f"database {path}: {text}: {unreadable}", path=path)
    if ("unable to open" in low or "disk i/o" in low) and out_of_descriptors():
        advice = (
            "this process has no file descriptor left; nothing was written. Raise its limit (ulimit -n; LimitNOFILE= "
            "of the unit), then run again"
        )
    elif "readonly" in low or "read-only" in low:
        advice = "the file or its folder is read-only for this user; run as the owner or mend the permissions"
    elif "full" in low:
        advice = "the disk is full; free some space and run again (nothing was written)"
    elif "not a database" in low or "malformed" in low or "corrupt" in low:
        advice = (
            "the file is damaged or not an agentlab database; restore a backup, or move it away to begin with an "
            "empty one"
        )
    elif "unable to open" in low:
        advice = "the folder is missing or not accessible for this user; create it or set another database"
    elif "disk i/o" in low or getattr(error, "errno", None) == errno.EIO:
        advice = (
            "the disk or its file system failed to read or write; nothing was written. Look at dmesg and at the disk "
            "(df, smartctl), then run again, or restore a backup on another disk (docs/troubleshooting.md, Backups)"
        )
    elif "locked" in low or "busy" in low:
        advice = f"other runs kept it busy for {BUSY_SECONDS:.0f} seconds; run again"
    else:
        advice = (
            f"nothing was written; look at {path} and its folder (ls -l, df), then run agentlab_doctor "
            "(agentlab doctor)"
        )
    return StoreError(f"database {path}: {text}: {advice}", path=path)


def _why_unreadable(path: str) -> str | None:
    """Return the sentence for a file (or its -wal, -shm) that this user may not read; None where all can be read."""
    for name in (path, f"{path}-wal", f"{path}-shm"):
        try:
            if os.access(name, os.R_OK):
                continue
            status = os.stat(name)
        except OSError:
            continue
        try:
            owner = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            owner = str(status.st_uid)
        return (
            f"this user may not read {name} (mode {stat.S_IMODE(status.st_mode):04o}, owner {owner}); run as {owner}, "
            "or mend its owner and mode (chown, chmod 0600)"
        )
    return None


class Database(GroupCommit):
    """One SQLite file. ``read`` gives rows, ``write`` runs a function inside a durable transaction."""

    kind = "sqlite"
    conflicts: tuple[type[Exception], ...] = (sqlite3.IntegrityError,)
    # Claims end with their process, which any other process of this host can see.
    controller: str | None = None
    reconnects = 0
    retries = 0
    takeovers = 0

    def __init__(self, path: str, *, group_mode: bool = False, dry_run: bool = False) -> None:
        super().__init__()
        self.path = path
        self._together: int | None = None
        # What rolled the bulk transaction back before its end.
        self._broken: sqlite3.Error | None = None
        # Check mode: the file itself is read, and nothing can be written to it.
        self._untouched = False
        self._reader_lock = threading.Lock()
        # Since when a write waits for other processes to finish theirs (monotonic seconds), or None.
        self.waits_since: float | None = None
        self._wrote = False
        # Device and inode of the file and of its -wal, as this process opened them; None where no file is open for
        # writing.
        self._opened: tuple[Any, Any] | None = None
        if os.path.islink(path) and not os.path.exists(path):
            # SQLite would follow the link and create the file with the mode of the umask.
            raise StoreError(
                f"database {path}: it is a link to {os.path.realpath(path)}, which does not exist; mount or create "
                "what the link leads to, or remove the link to begin with an empty file",
                path=path,
            )
        try:
            if dry_run:
                self._reader_lock = self._writer_lock
                self._writer = self._reader = self._look_only()
            else:
                self._create_file(group_mode)
                before = _file_identity(path)
                self._writer = self._connect(path)
                # Judged to be ours by now: the mode of a file that is not is not ours to change.
                self._narrow()
                self._migrate(self._writer)
                self._reader = self._connect(path)
                # The -wal exists from the first read on, until the last connection closes.
                self._opened = (before, _file_identity(f"{path}-wal"))
                self._refuse_replaced()
        except (sqlite3.Error, OSError) as error:
            raise explain(path, error) from error

    # ---- opening ----

    @staticmethod
    def _connect(path: str) -> sqlite3.Connection:
        conn = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        conn.row_factory = sqlite3.Row
        conn.execute("PRAGMA foreign_keys = ON")
        if path != ":memory:":
            # A file that is not ours must not be turned into WAL: look before the first pragma that writes.
            _patiently(lambda: Database._refuse_foreign(path, conn))
            _patiently(lambda: conn.execute("PRAGMA journal_mode = WAL"))
            # FULL: a commit is on the disk before Proxmox is asked to do what it announces.
            conn.execute("PRAGMA synchronous = FULL")
        return conn

    def _create_file(self, group_mode: bool) -> None:
        folder = os.path.dirname(os.path.abspath(self.path))
        os.makedirs(folder, mode=0o750 if group_mode else 0o700, exist_ok=True)
        mode = 0o660 if group_mode else 0o600
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        except FileExistsError:
            return
        os.fchmod(fd, mode)
        os.close(fd)

    def _narrow(self) -> None:
        """Somebody widened it (or restored it from a backup): nobody but the owner and the group may ever read it."""
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with contextlib.suppress(PermissionError, FileNotFoundError):
                found = os.stat(path).st_mode & 0o777
                if found & 0o007:
                    os.chmod(path, found & ~0o007)

    def _look_only(self) -> sqlite3.Connection:
        """For check mode: no file is created, migrated or written.

        What is there is read as it is; not before something is written, to try what would come of it, are the records
        copied into memory.
        """
        if not os.path.exists(self.path) or not os.path.getsize(self.path):
            memory = self._connect(":memory:")
            self._migrate(memory)
            return memory
        unreadable = _why_unreadable(self.path)
        if unreadable:
            raise StoreError(f"database {self.path}: {unreadable}", path=self.path)
        source = sqlite3.connect(
            f"file:{_quote(self.path)}?mode=ro",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        source.row_factory = sqlite3.Row
        try:
            self._refuse_foreign(self.path, source)
            if source.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION:
                self._untouched = True
                return source
        except BaseException:
            source.close()
            raise
        return self._copy(source)

    def _copy(self, source: sqlite3.Connection) -> sqlite3.Connection:
        memory = self._connect(":memory:")
        try:
            source.backup(memory)
        finally:
            source.close()
        self._migrate(memory)
        return memory

    def _begin_writing(self) -> None:
        """In check mode, before the first write: from now on everything happens in a copy.

        Called with the writer's lock held.
        """
        if self._untouched:
            self._writer = self._reader = self._copy(self._reader)
            self._untouched = False

    @staticmethod
    def _refuse_foreign(path: str, conn: sqlite3.Connection) -> None:
        # In this order: our first step writes both at once, so whoever sees our tables sees our id too, also while
        # another run creates them.
        tables = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        found = conn.execute("PRAGMA application_id").fetchone()[0]
        if tables and found != schema.APPLICATION_ID:
            raise StoreError(
                f"database {path}: this is the SQLite file of another program; set database to a path of its own",
                path=path,
            )
        version = conn.execute("PRAGMA user_version").fetchone()[0]
        if version > schema.VERSION:
            raise StoreError(
                f"database {path}: its schema version {version} is newer than the {schema.VERSION} that this release "
                "knows; upgrade agentlab.proxmox, or restore the backup made before the upgrade",
                path=path,
            )

    def _migrate(self, conn: sqlite3.Connection) -> None:
        if conn.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION:
            return
        for number, step in enumerate(schema.MIGRATIONS, 1):
            with _transaction(conn):
                # Read again inside the transaction: another process may have been faster.
                if conn.execute("PRAGMA user_version").fetchone()[0] >= number:
                    continue
                for statement in step:
                    conn.execute(statement)
                conn.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
                conn.execute(f"PRAGMA user_version = {number}")

    # ---- what another engine would do over a network ----

    def clock(self, own: Clock) -> Clock:
        return own

    def wall_time(self) -> float:
        return time.time()

    def clock_difference(self) -> float:
        return 0.0

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        return False

    def freeze(self) -> contextlib.AbstractContextManager[None]:
        return self.together()

    def set_counters(self, conn: sqlite3.Connection, counters: dict[str, int]) -> None:
        for table, number in counters.items():
            conn.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (number, table))

    def keep_alive(self) -> None:
        """Claims need no heartbeat on one host."""

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        """A claim that could not be given back ends with this process."""

    def lead(self, job: str) -> bool:
        return True

    # ---- use ----

    def replaced(self) -> str | None:
        """Return the sentence for a file that was deleted, moved or replaced since this process opened it; None
        while it is the same.

        SQLite goes on with the file that it opened: a commit succeeds, and nobody who opens the path reads it.
        """
        if self._opened is None:
            return None
        # Two calls of stat, a few microseconds: nothing beside the sync of a commit.
        for path, opened in zip((self.path, f"{self.path}-wal"), self._opened, strict=True):
            if opened is not None and _file_identity(path) != opened:
                return (
                    f"database {self.path}: {path} was deleted, moved or replaced while this process had it open; "
                    "nothing is written any more. End everything that uses the records, put the right file in place "
                    "(docs/troubleshooting.md, Backups), and start it again"
                )
        return None

    def _refuse_replaced(self) -> None:
        sentence = self.replaced()
        if sentence:
            raise StoreError(sentence, path=self.path, replaced=True)

    @contextlib.contextmanager
    def _transact(self) -> Iterator[None]:
        """One transaction of the writer, on the file that stands at the path when it begins and when it is
        committed.
        """
        self.waits_since = time.monotonic()
        try:
            with _transaction(self._writer):
                self.waits_since = None
                self._refuse_replaced()
                yield
                self._refuse_replaced()
                self._wrote = True
        finally:
            self.waits_since = None

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Rows of a query, outside any transaction of a writer."""
        return self.read_as(lambda row: row, sql, *values)

    def read_as(self, make: Callable[[sqlite3.Row], T], sql: str, *values: Any) -> list[T]:
        """What is made of each row, as it comes: of very many only one of the two is there at once."""
        try:
            if self._together == threading.get_ident():
                return list(map(make, self._writer.execute(sql, values)))
            with self._reader_lock:
                return list(map(make, self._reader.execute(sql, values)))
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    def write(self, work: Callable[[sqlite3.Connection], T], *, checked: bool = False) -> T:
        """Run ``work`` in a transaction and return its value once that is on the disk; what it raises undoes only
        its own writes.

        ``checked``: what it refuses, it refuses before its first write. So there is nothing to undo then, and in a bulk
        run no savepoint is taken, into which SQLite would copy each page that it touches.
        """
        if self._together == threading.get_ident():
            try:
                return self._checked(work) if checked else self._in_savepoint(work)
            except sqlite3.Error as error:
                if not self._writer.in_transaction:
                    self._broken = self._broken or error
                raise explain(self.path, error) from error
        try:
            return self.enqueue(work)
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Commit all that this thread writes within in one transaction.

        Nothing of it is on the disk, and nothing may be said of it, before the end; when that fails, or the database
        breaks off a write halfway, nothing of it was written. What is refused within undoes only itself. For work that
        asks nobody else: other writers wait meanwhile.
        """
        try:
            with self._writer_lock:
                self._begin_writing()
                self._broken = None
                with self._transact():
                    self._together = threading.get_ident()
                    try:
                        yield
                    finally:
                        self._together = None
                    self._still_open()
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    def _checked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._still_open()
        before = self._writer.total_changes
        try:
            return work(self._writer)
        except BaseException:
            # Not refused, but broken off halfway, which only the database does (a full disk, say): half of it must not
            # stay, so nothing does.
            if self._writer.in_transaction and self._writer.total_changes != before:
                self._writer.execute("ROLLBACK")
            raise

    def _still_open(self) -> None:
        if not self._writer.in_transaction:
            raise self._broken or sqlite3.OperationalError("the transaction was rolled back")

    def _in_savepoint(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._still_open()
        self._writer.execute("SAVEPOINT job")
        try:
            return work(self._writer)
        except Exception:
            # A full disk may already have rolled everything back: then the savepoint is gone with it.
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK TO job")
            raise
        finally:
            if self._writer.in_transaction:
                self._writer.execute("RELEASE job")

    def run_batch(self, batch: list[QueuedWrite]) -> None:
        self._begin_writing()
        with self._transact():
            for job in batch:
                try:
                    # One alone needs no savepoint: the transaction is undone with it.
                    job.value = self._in_savepoint(job.work) if len(batch) > 1 else job.work(self._writer)
                except Exception as error:
                    job.error = error
                    if len(batch) == 1 or not self._writer.in_transaction:
                        raise

    def interrupted(self) -> Exception:
        return sqlite3.OperationalError("interrupted")

    def limit_cache(self, kib: int) -> None:
        """Let each connection keep at most so many KiB of pages, for a process that lives long: the system's own
        cache holds them too.
        """
        for lock, conn in ((self._reader_lock, self._reader), (self._writer_lock, self._writer)):
            with lock:
                conn.execute(f"PRAGMA cache_size = -{int(kib)}")

    def integrity(self) -> str:
        """``ok``, or what SQLite's own check found."""
        return "; ".join(str(row[0]) for row in self.read("PRAGMA quick_check"))

    def latest_event(self) -> int:
        """Return the id of the newest event that these records ever had, 0 without one."""
        # Two rows: SQLite's own counters, which stay when retention removes events.
        rows = self.read("SELECT c.seq FROM sqlite_sequence AS c WHERE c.name = 'events'")
        return int(rows[0][0]) if rows and isinstance(rows[0][0], int) else 0

    def noted_event(self) -> int | None:
        return None if self.path == ":memory:" else latest.read(self.path) or 0

    def note_event(self, event: int) -> None:
        latest.write(self.path, event)

    def close(self) -> None:
        if self._wrote and self._opened is not None and not self.replaced():
            with contextlib.suppress(StoreError):
                event = self.latest_event()
                # An older copy stays one until timeguard has seen it.
                if event >= (latest.read(self.path) or 0):
                    latest.write(self.path, event)
        for conn in (self._reader, self._writer):
            with contextlib.suppress(sqlite3.Error):
                conn.close()


def _patiently(call: Callable[[], Any]) -> None:
    """busy_timeout does not cover every case (the switch to WAL, a WAL being recovered, a schema just changed): go
    on until the bound.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if ("locked" not in str(error) and "busy" not in str(error)) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def _transaction(conn: sqlite3.Connection) -> Iterator[None]:
    _patiently(lambda: conn.execute("BEGIN IMMEDIATE"))
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise


def _file_identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file that the path leads to now, or None without one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _quote(path: str) -> str:
    from urllib.parse import quote

    return quote(os.path.abspath(path))
