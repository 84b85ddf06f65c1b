# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The SQLite engine: open, migrate and write a file. It knows transactions and files, and nothing about sandboxes.

Writes of many threads are committed together (group_commit), each in its own savepoint.
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
from ...errors import StoreError, is_out_of_descriptors
from .. import schema
from ..group_commit import GroupCommit, QueuedWrite
from . import latest

T = TypeVar("T")

BUSY_SECONDS = 60.0
# SQLite's own wait in a statement that _retry_while_locked repeats. A longer one would add to BUSY_SECONDS.
_STEP_SECONDS = 1.0
LIBRARY = sqlite3.sqlite_version


def explain(path: str, error: Exception) -> StoreError:
    """Return SQLite's error as a StoreError that names the file and says what to do."""
    text = str(error)
    low = text.lower()
    unreadable = _why_unreadable(path) or _why_no_file(path) or _why_no_file_beside(path)
    if unreadable:
        return StoreError(f"database {path}: {text}: {unreadable}", path=path)
    if ("unable to open" in low or "disk i/o" in low) and is_out_of_descriptors():
        advice = (
            "this process has no file descriptor left; nothing was written. Raise its limit (ulimit -n; LimitNOFILE= "
            "of the unit), then run again"
        )
    elif "readonly" in low or "read-only" in low:
        closed = _name_unwritable(path)
        advice = "the file or its folder is read-only for this user; run as the owner or mend the permissions" + (
            f" ({closed})" if closed else ""
        )
    elif "full" in low:
        advice = "the disk is full; free some space and run again (nothing was written)"
    elif "not a database" in low or "malformed" in low or "corrupt" in low:
        advice = (
            "the file is damaged or not an agentlab database; restore a backup, or move it away to begin with an "
            "empty one"
        )
    elif "unable to open" in low or isinstance(error, PermissionError):
        advice = "the folder is missing or not accessible for this user; create it or set another database"
    elif "disk i/o" in low or getattr(error, "errno", None) == errno.EIO:
        advice = (
            "the disk or its file system failed to read or write; nothing was written. Look at dmesg and at the disk "
            "(df, smartctl), then run again, or restore a backup on another disk (docs/troubleshooting.md, Backups)"
        )
    elif "locked" in low or "busy" in low:
        from .locker import name_locker

        advice = (
            f"another process has kept it locked for {BUSY_SECONDS:.0f} seconds ({name_locker(path)}); nothing was "
            "written. End that process, or wait until it has done, then run again"
        )
    elif "out of memory" in low or "nomem" in low:
        advice = (
            "this process got no memory; nothing was written. End other processes of this host (free -m), or raise "
            "the limit (ulimit -v; MemoryMax= of the unit), then run again"
        )
    elif "interrupted" in low:
        advice = "this process was told to stop while it waited; nothing was written. Run again"
    elif "locking protocol" in low:
        from .locker import name_locker

        advice = (
            "the locks of its file system do not work, or other processes took them for too long "
            f"({name_locker(path)}); nothing was written. Put the file on a local disk, never on NFS, then run again"
        )
    elif "no such table" in low or "no such column" in low or "schema has changed" in low:
        advice = (
            "its tables are not as this release made them: somebody changed them, or two releases use the file; "
            "nothing was written. Use one release for all, run agentlab_doctor (agentlab doctor), or restore a backup "
            "(docs/troubleshooting.md, Backups)"
        )
    elif "rolled back" in low:
        advice = "nothing was written; look at the disk (df), then run again"
    elif "too big" in low or "too large" in low:
        advice = "a value is larger than SQLite takes; nothing was written. Give a smaller one"
    else:
        advice = (
            f"nothing was written; look at {path} and its folder (ls -l, df), then run agentlab_doctor "
            "(agentlab doctor)"
        )
    return StoreError(f"database {path}: {text}: {advice}", path=path)


def _why_no_file(path: str) -> str | None:
    """Return the message for a path at which there can be no file of records; None where there can be one."""
    if os.path.isdir(path):
        return f"it is a folder; set database to a file, such as {os.path.join(path, 'agentlab.db')}"
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is a device, a pipe or a socket; set database to a file of its own"
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if os.path.isfile(folder):
        return f"{folder} is a file and not a folder; set database to a path in a folder"
    return None


def _why_no_file_beside(path: str) -> str | None:
    """Return the message for something beside the file that is no file but has a name that SQLite needs, else None."""
    for name in (f"{path}-wal", f"{path}-shm", f"{path}-journal"):
        if os.path.lexists(name) and not os.path.isfile(name):
            what = "a link that leads nowhere" if os.path.islink(name) else "a folder or a device"
            return (
                f"{name} is {what}, and SQLite needs a file of that name; nothing was written. Move it away, then run "
                "again"
            )
    return None


def _name_unwritable(path: str) -> str:
    """Return the names of the file, of those beside it and of their folder that this user may not write."""
    names = (path, f"{path}-wal", f"{path}-shm", os.path.dirname(os.path.abspath(path)))
    return ", ".join(name for name in names if os.path.exists(name) and not os.access(name, os.W_OK))


def _why_unreadable(path: str) -> str | None:
    """Return the message for a file (or its -wal, -shm) that this user may not read, or a folder on the way to it that
    this user may not enter; None when all are readable.
    """
    folder = os.path.dirname(os.path.abspath(path))
    folders = [folder]
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        folders.insert(0, folder)
    wanted = [(name, os.X_OK, "enter", "u+x") for name in folders]
    wanted += [(name, os.R_OK, "read", "0600") for name in (path, f"{path}-wal", f"{path}-shm")]
    for name, right, verb, mode in wanted:
        try:
            if os.access(name, right):
                continue
            status = os.stat(name)
        except OSError:
            continue
        try:
            owner = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            owner = str(status.st_uid)
        return (
            f"this user may not {verb} {name} (mode {stat.S_IMODE(status.st_mode):04o}, owner {owner}); run as "
            f"{owner}, or mend its owner and mode (chown, chmod {mode})"
        )
    return None


class Database(GroupCommit):
    """One SQLite file. ``read`` returns rows, ``write`` runs a function in a durable transaction."""

    kind = "sqlite"
    conflicts: tuple[type[Exception], ...] = (sqlite3.IntegrityError,)
    # A claim ends with its process, and every process of this host can see whether that process lives.
    controller: str | None = None
    reconnects = 0
    retries = 0
    takeovers = 0
    migrated = False

    def __init__(self, path: str, *, group_mode: bool = False, dry_run: bool = False) -> None:
        super().__init__()
        self.path = path
        self._together: int | None = None
        # The error that rolled the bulk transaction back before its end.
        self._broken: sqlite3.Error | None = None
        # Check mode before the first write: the file is read directly, and nothing can be written to it.
        self._untouched = False
        self._reader_lock = threading.Lock()
        # Time since which a write has been waiting for other processes (monotonic seconds), or None.
        self.waits_since: float | None = None
        self._wrote = False
        # Device and inode of the file and of its -wal as this process opened them; None when no file is open for
        # writing.
        self._opened: tuple[Any, Any] | None = None
        if os.path.islink(path) and not os.path.exists(path):
            # SQLite would follow the link and create the file with the mode of the umask.
            raise StoreError(
                f"database {path}: it is a link to {os.path.realpath(path)}, which does not exist; mount or create "
                "what the link leads to, or remove the link to begin with an empty file",
                path=path,
            )
        no_file = None if path == ":memory:" else _why_no_file(path)
        if no_file:
            # SQLite would open a device, and _narrow_mode would then change the mode of /dev/null for the whole host.
            raise StoreError(f"database {path}: {no_file}", path=path)
        # All steps of opening together wait no longer than BUSY_SECONDS.
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            if dry_run:
                self._reader_lock = self._writer_lock
                self._writer = self._reader = self._open_for_check_mode(deadline)
            else:
                self._create_file(group_mode)
                before = _read_file_identity(path)
                self._writer = self._connect(path, deadline)
                # Change the mode only now, after the file was recognised as ours.
                self._narrow_mode()
                self._migrate(self._writer, deadline)
                self._reader = self._connect(path, deadline)
                # Reads are not repeated, so SQLite itself waits for them.
                self._reader.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
                # SQLite creates the -wal at the first read, and deletes it when the last connection closes.
                self._opened = (before, _read_file_identity(f"{path}-wal"))
                self._refuse_replaced()
        except (sqlite3.Error, OSError) as error:
            raise explain(path, error) from error

    # ---- opening ----

    @staticmethod
    def _connect(path: str, deadline: float | None = None) -> sqlite3.Connection:
        """Return a connection. ``deadline`` (monotonic seconds) ends the wait for a locked file."""
        conn = sqlite3.connect(path, timeout=_STEP_SECONDS, isolation_level=None, check_same_thread=False)
        conn.row_factory = sqlite3.Row
        conn.execute("PRAGMA foreign_keys = ON")
        if path != ":memory:":
            # Check for a foreign file before the first pragma that writes: switching it to WAL would change it.
            _retry_while_locked(lambda: Database._refuse_foreign(path, conn), deadline)
            _retry_while_locked(lambda: conn.execute("PRAGMA journal_mode = WAL"), deadline)
            # FULL puts each commit on the disk before Proxmox receives the request that the commit announces.
            _retry_while_locked(lambda: conn.execute("PRAGMA synchronous = FULL"), deadline)
        return conn

    def _create_file(self, group_mode: bool) -> None:
        """Create the file with mode 0600 (0660 with ``group_mode``) if it is missing, and its missing folders."""
        folder = os.path.dirname(os.path.abspath(self.path))
        os.makedirs(folder, mode=0o750 if group_mode else 0o700, exist_ok=True)
        mode = 0o660 if group_mode else 0o600
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        except FileExistsError:
            return
        os.fchmod(fd, mode)
        os.close(fd)

    def _narrow_mode(self) -> None:
        """Remove access for others. A person may have widened the mode, or restored the file from a backup."""
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with contextlib.suppress(PermissionError, FileNotFoundError):
                mode = os.stat(path).st_mode & 0o777
                if mode & 0o007:
                    os.chmod(path, mode & ~0o007)

    def _open_for_check_mode(self, deadline: float) -> sqlite3.Connection:
        """Return the connection for check mode, which creates, migrates and writes no file.

        Check mode reads the file directly. The first write switches to an in-memory copy.
        """
        # A file in a folder that this user may not enter seems to be missing.
        unreadable = _why_unreadable(self.path)
        if unreadable:
            raise StoreError(f"database {self.path}: {unreadable}", path=self.path)
        if not os.path.exists(self.path) or not os.path.getsize(self.path):
            memory = self._connect(":memory:")
            self._migrate(memory)
            return memory
        source = sqlite3.connect(
            f"file:{_quote(self.path)}?mode=ro",
            uri=True,
            timeout=_STEP_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        source.row_factory = sqlite3.Row
        try:
            _retry_while_locked(lambda: self._refuse_foreign(self.path, source), deadline)
            source.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
            if source.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION:
                self._untouched = True
                return source
        except BaseException:
            source.close()
            raise
        return self._copy_to_memory(source)

    def _copy_to_memory(self, source: sqlite3.Connection) -> sqlite3.Connection:
        """Return a connection to an in-memory copy of the source, migrated. Closes the source."""
        memory = self._connect(":memory:")
        try:
            source.backup(memory)
        finally:
            source.close()
        self._migrate(memory)
        return memory

    def _begin_writing(self) -> None:
        """Switch check mode to an in-memory copy, before its first write.

        Called with the writer's lock held.
        """
        if self._untouched:
            self._writer = self._reader = self._copy_to_memory(self._reader)
            self._untouched = False

    @staticmethod
    def _refuse_foreign(path: str, conn: sqlite3.Connection) -> None:
        """Raise StoreError for the file of another program, or of a newer release."""
        # Read the tables first and the id second. Our first step writes both at once, so a reader that sees our tables
        # sees our id as well, even while another run creates them.
        tables = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = conn.execute("PRAGMA application_id").fetchone()[0]
        if tables and application != schema.APPLICATION_ID:
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

    def _migrate(self, conn: sqlite3.Connection, deadline: float | None = None) -> None:
        versions: list[int] = []
        _retry_while_locked(lambda: versions.append(conn.execute("PRAGMA user_version").fetchone()[0]), deadline)
        if versions[-1] == schema.VERSION:
            return
        for number, step in enumerate(schema.MIGRATIONS, 1):
            with _transaction(conn, deadline):
                # Read the version again inside the transaction: another process may have migrated the file meanwhile.
                if conn.execute("PRAGMA user_version").fetchone()[0] >= number:
                    continue
                for statement in step:
                    conn.execute(statement)
                conn.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
                conn.execute(f"PRAGMA user_version = {number}")
                self.migrated = True

    # ---- functions that only an engine on a server needs ----

    def choose_clock(self, own: Clock) -> Clock:
        return own

    def read_wall_time(self) -> float:
        return time.time()

    def read_clock_difference(self) -> float:
        return 0.0

    def lock_sandbox(self, conn: Any, uuid: str) -> None:
        """Do nothing: a transaction that has begun has the lock of the file."""

    def name_locker(self) -> str:
        from .locker import name_locker

        return name_locker(self.path)

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        return False

    def freeze(self) -> contextlib.AbstractContextManager[None]:
        return self.group_writes()

    def set_counters(self, conn: sqlite3.Connection, counters: dict[str, int]) -> None:
        for table, number in counters.items():
            conn.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (number, table))

    def keep_alive(self) -> None:
        """Do nothing: on one host a claim needs no heartbeat."""

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        """Do nothing: a claim that could not be released ends with this process."""

    def lead(self, job: str) -> bool:
        return True

    def run_alone(self, job: str, wait: float) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # ---- use ----

    def explain_replacement(self) -> str | None:
        """Return the message for a file that was deleted, moved or replaced since it was opened, or whose folder was
        closed to this user; None otherwise.

        SQLite keeps using the file that it opened. A commit succeeds, but no process that opens the path can read it.
        """
        if self._opened is None:
            return None
        # Two calls of stat cost microseconds, far less than the sync of a commit.
        for path, opened in zip((self.path, f"{self.path}-wal"), self._opened, strict=True):
            if opened is not None and _read_file_identity(path) != opened:
                closed = None if os.path.exists(path) else _why_unreadable(path)
                if closed:
                    return f"database {self.path}: {closed}; nothing was written, and nothing is until then"
                return (
                    f"database {self.path}: {path} was deleted, moved or replaced while this process had it open; "
                    "nothing is written any more. End everything that uses the records, put the right file in place "
                    "(docs/troubleshooting.md, Backups), and start it again"
                )
        return None

    def _refuse_replaced(self) -> None:
        """Raise StoreError if the file was deleted, moved or replaced since it was opened, or cannot be reached."""
        sentence = self.explain_replacement()
        if sentence:
            raise StoreError(sentence, path=self.path)

    @contextlib.contextmanager
    def _transact(self) -> Iterator[None]:
        """Run one transaction of the writer.

        Raises StoreError if the file at the path changed before begin or commit.
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
        """Return the rows of a query, read outside any write transaction."""
        return self.read_as(lambda row: row, sql, *values)

    def read_as(self, make: Callable[[sqlite3.Row], T], sql: str, *values: Any) -> list[T]:
        """Return ``make(row)`` for each row. Converts row by row, so that a long result is not held twice in memory."""
        try:
            if self._together == threading.get_ident():
                return list(map(make, self._writer.execute(sql, values)))
            with self._reader_lock:
                return list(map(make, self._reader.execute(sql, values)))
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    def write(self, work: Callable[[sqlite3.Connection], T], *, checked: bool = False) -> T:
        """Run ``work`` in a transaction and return its value once that is on the disk.

        An exception rolls its writes back.

        ``checked``: ``work`` raises only before its first write, so no savepoint is needed (savepoints copy each page
        that they touch).
        """
        if self._together == threading.get_ident():
            try:
                return self._run_checked(work) if checked else self._run_in_savepoint(work)
            except sqlite3.Error as error:
                if not self._writer.in_transaction:
                    self._broken = self._broken or error
                raise explain(self.path, error) from error
        try:
            return self.enqueue(work)
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    @contextlib.contextmanager
    def group_writes(self) -> Iterator[None]:
        """Group all writes of this thread into one transaction. Report nothing as done until the block has ended.

        If the commit fails, or SQLite aborts a write halfway, nothing was written. A refused write rolls back only
        itself. Other writers wait meanwhile, so make no network calls inside.
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
                    self._refuse_rolled_back()
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    def _run_checked(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a write that raises only before its first statement that writes, so it needs no savepoint."""
        self._refuse_rolled_back()
        before = self._writer.total_changes
        try:
            return work(self._writer)
        except BaseException:
            # Only the database itself stops a checked write halfway (on a full disk, for example). Half of the write
            # must not stay, so roll the whole transaction back.
            if self._writer.in_transaction and self._writer.total_changes != before:
                self._writer.execute("ROLLBACK")
            raise

    def _refuse_rolled_back(self) -> None:
        """Raise the error that rolled the transaction back before its end, if there was one."""
        if not self._writer.in_transaction:
            raise self._broken or sqlite3.OperationalError("the transaction was rolled back")

    def _run_in_savepoint(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a write in a savepoint of its own. An exception rolls back only this write."""
        self._refuse_rolled_back()
        self._writer.execute("SAVEPOINT job")
        try:
            return work(self._writer)
        except Exception:
            # On a full disk SQLite may already have rolled the transaction back, and the savepoint with it.
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
                    # A single write needs no savepoint: the whole transaction is rolled back with it.
                    job.value = self._run_in_savepoint(job.work) if len(batch) > 1 else job.work(self._writer)
                except Exception as error:
                    job.error = error
                    if len(batch) == 1 or not self._writer.in_transaction:
                        raise

    def make_interruption_error(self) -> Exception:
        return sqlite3.OperationalError("interrupted")

    def limit_cache(self, kib: int) -> None:
        """Limit the page cache of each connection to ``kib`` KiB, for a long-lived process.

        The kernel caches the file's pages as well.
        """
        for lock, conn in ((self._reader_lock, self._reader), (self._writer_lock, self._writer)):
            with lock:
                conn.execute(f"PRAGMA cache_size = -{int(kib)}")

    def check_integrity(self) -> str:
        """Return ``ok``, or the result of SQLite's own check."""
        return "; ".join(str(row[0]) for row in self.read("PRAGMA quick_check"))

    def read_latest_event(self) -> int:
        """Return the id of the newest event that these records ever had, 0 without one."""
        # SQLite's own counter stays when retention removes events.
        rows = self.read("SELECT c.seq FROM sqlite_sequence AS c WHERE c.name = 'events'")
        return int(rows[0][0]) if rows and isinstance(rows[0][0], int) else 0

    def has_lost_commits(self) -> bool:
        return False

    def forget_lost_commits(self) -> None:
        """Do nothing: a file loses no commits while a process has it open."""

    def read_noted_event(self) -> int | None:
        return None if self.path == ":memory:" else latest.read_note(self.path) or 0

    def note_event(self, event: int) -> None:
        latest.write_note(self.path, event)

    def close(self) -> None:
        if self._wrote and self._opened is not None and not self.explain_replacement():
            with contextlib.suppress(StoreError):
                event = self.read_latest_event()
                # Do not lower the note for an older copy of the file before timeguard has detected that copy.
                if event >= (latest.read_note(self.path) or 0):
                    latest.write_note(self.path, event)
        for conn in (self._reader, self._writer):
            with contextlib.suppress(sqlite3.Error):
                conn.close()


def _retry_while_locked(call: Callable[[], Any], deadline: float | None = None) -> None:
    """Run ``call``, and repeat it while the database is locked, until ``deadline`` or for BUSY_SECONDS.

    ``deadline`` is in monotonic seconds. SQLite's busy_timeout does not cover every case: the switch to WAL, the
    recovery of a WAL, a schema just changed.
    """
    deadline = time.monotonic() + BUSY_SECONDS if deadline is None else deadline
    while True:
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if ("locked" not in str(error) and "busy" not in str(error)) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def _transaction(conn: sqlite3.Connection, deadline: float | None = None) -> Iterator[None]:
    """Commit when the block ends, and roll back after an exception. ``deadline`` is in monotonic seconds."""
    _retry_while_locked(lambda: conn.execute("BEGIN IMMEDIATE"), deadline)
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise


def _read_file_identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file that the path leads to now, or None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _quote(path: str) -> str:
    from urllib.parse import quote

    return quote(os.path.abspath(path))
