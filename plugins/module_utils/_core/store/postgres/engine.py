# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The PostgreSQL engine: connections, transactions, heartbeats, and the loss of the server.

One writer at a time, as on SQLite: every write transaction first takes an advisory lock and holds it until its commit.
So the rules of the records, which assume one writer, hold unchanged; ids of events are given out in commit order; two
controllers cannot deadlock. Threads of one process share transactions (group_commit). The server ends the transaction
of a paused writer after ``_IDLE_SECONDS``.

Each commit also writes its number to the table ``controllers``. When the answer to a COMMIT is lost, that number shows
whether the commit was carried out, before anything is repeated.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from ...clock import Clock
from ...errors import Busy, StoreError, StoreUnavailable
from .. import holders, schema
from ..group_commit import GroupCommit, QueuedWrite
from . import refusals
from . import schema as own_schema

try:
    import psycopg
    from psycopg import conninfo, errors
except ImportError:
    # Reported when records on PostgreSQL are opened. A host with records on SQLite needs no psycopg.
    INSTALLED = False
    _CONFLICTS: tuple[type[Exception], ...] = ()
    _LOST: tuple[type[Exception], ...] = ()
    _TAKEN: tuple[type[Exception], ...] = ()
else:
    INSTALLED = True
    # Errors after which a repeated transaction may succeed: another writer won, or the server was away and is back.
    _CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
    _TAKEN = (errors.UniqueViolation,)
    _LOST = (
        psycopg.OperationalError,
        psycopg.InterfaceError,
        errors.ReadOnlySqlTransaction,
        errors.IdleInTransactionSessionTimeout,
    )

T = TypeVar("T")

# Keys of advisory locks: "alab", and what the lock is for.
_LOCK_SPACE = 0x616C6162
_WRITER, _MIGRATION = 1, 2
# The session that keeps others waiting for the records and waits for nobody itself; the oldest first. Readers keep
# nobody waiting.
_LOCKER = f"""
SELECT pid, usename, application_name, host(client_addr),
    to_char(xact_start AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND pid <> %s AND cardinality(pg_blocking_pids(pid)) = 0 AND pid IN (
    SELECT pid FROM pg_locks LEFT JOIN pg_class ON pg_class.oid = relation
    WHERE granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ((locktype = 'advisory' AND classid = {_LOCK_SPACE} AND objid IN ({_WRITER}, {_MIGRATION}))
        OR (mode <> 'AccessShareLock' AND relname IN ({own_schema.quote_tables()}))))
ORDER BY xact_start NULLS LAST LIMIT 1
"""
# Numbers of the locks of jobs start here; add the job's position in JOBS. The first lock says which daemon does the job
# on schedule, and is held as long as that daemon lives. The second is held during one pass.
JOBS = ("reconcile", "cleanup")
_FIRST_JOB, _FIRST_PASS = 10, 20

HEARTBEAT_SECONDS = 10.0
DEAD_SECONDS = 30.0
# Rows of processes that ended without closing are kept this long, because a claim may still refer to them.
_FORGET_SECONDS = 86400
_IDLE_SECONDS = 15
_LOCK_SECONDS = 60
# Readers wait only for whoever keeps all others off a table.
_READ_LOCK_SECONDS = 5
_CONNECT_SECONDS = 5
_ATTEMPTS = 5
# Maximum age in seconds of the last reading of the server's clock.
_CLOCK_SECONDS = 10.0

# SQL_ASCII stores the bytes of UTF-8 as they are.
_ENCODINGS = ("UTF8", "SQL_ASCII")

_EPOCH = "extract(epoch FROM clock_timestamp())::float8"
_SHORT_WAIT = f"SET lock_timeout = '{_READ_LOCK_SECONDS}s'"
_OPENING = (
    f"SELECT {_EPOCH}, (SELECT value FROM meta WHERE key = '{own_schema.VERSION_KEY}'), "
    "pg_is_in_recovery(), current_setting('server_version')"
)
# A setting of no effect that only our sessions have. The others may be those of a role or database.
_MARK = "agentlab.session"
# The process of the server that answers, and whether it has our settings. A pooler may drop them.
_SESSION = f"pg_backend_pid(), coalesce(current_setting('{_MARK}', true), '') <> ''"
# The tables that a renewal writes. Their locks are taken before the clock is read: another session (psql, a tool) may
# keep them for longer than a lease lasts.
_LOCKED = "LOCK TABLE sandboxes, workspaces, operations, events, controllers IN ROW EXCLUSIVE MODE"
_BEGIN = f"BEGIN; SELECT pg_advisory_xact_lock({_LOCK_SPACE}, {_WRITER}); {_LOCKED}; {_OPENING}"


class NamedRow(tuple[Any, ...]):
    """A row that is read by name or by position, as SQLite's rows are."""

    __slots__ = ()
    names: dict[str, int]

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.names[key] if isinstance(key, str) else key)

    def keys(self) -> Iterable[str]:
        return self.names


@lru_cache(256)
def _make_row_class(names: tuple[str, ...]) -> type[NamedRow]:
    """Return the class of rows with these columns."""
    positions = {name: number for number, name in enumerate(names)}
    return type("NamedRow", (NamedRow,), {"__slots__": (), "names": positions})


def _make_rows(cursor: Any) -> Callable[[Sequence[Any]], NamedRow]:
    """Return the class for the rows of a cursor, as a row factory of psycopg does."""
    description = cursor.description
    if description is None:
        return NamedRow
    return _make_row_class(tuple(column.name for column in description))


@lru_cache(512)
def translate(sql: str) -> str:
    """Return the statement with psycopg's placeholders. No statement of ours has a question mark inside a text."""
    return sql.replace("%", "%%").replace("?", "%s")


class Session:
    """A connection inside a transaction, with the interface that the records use."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self._connection.execute(translate(sql), _adapt(values))

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> Any:
        """Run the statement for all rows in psycopg's pipeline mode: the server answers once for all of them."""
        cursor = self._connection.cursor()
        cursor.executemany(translate(sql), list(map(_adapt, rows)))
        return cursor


def _adapt(values: Sequence[Any]) -> list[Any]:
    """Return the values as PostgreSQL takes them: it does not accept true and false for an integer column."""
    return [int(value) if isinstance(value, bool) else value for value in values]


class ServerClock:
    """The server's wall time, combined with this host's clocks for waiting."""

    def __init__(self, database: PostgresDatabase, own: Clock) -> None:
        self._database = database
        self.own = own

    def now(self) -> int:
        return int(self._database.read_server_time())

    def monotonic(self) -> float:
        return self.own.monotonic()

    def since_boot(self) -> float:
        return self.own.since_boot()

    def sleep(self, seconds: float) -> None:
        self.own.sleep(seconds)


def read_boot_seconds() -> float:
    """Return the seconds since boot, including sleep, so that a host that slept does not take old answers for new."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class PostgresDatabase(GroupCommit):
    """One PostgreSQL database.

    ``uri`` contains no password. With ``password`` None libpq looks for it (PGPASSWORD, a passfile).
    """

    kind = "postgresql"
    conflicts: tuple[type[Exception], ...] = _TAKEN

    def __init__(self, uri: str, password: str | None = None, *, dry_run: bool = False) -> None:
        super().__init__()
        self.path = uri
        self.waits_since: float | None = None
        self.controller: str | None = uuid.uuid4().hex
        self.server_version = ""
        # Counters for the daemon's metrics.
        self.reconnects = 0
        self.retries = 0
        self.takeovers = 0
        self.migrated = False
        if not INSTALLED:
            raise StoreError(
                "database: records on PostgreSQL need the Python library psycopg 3 where this runs: install "
                "python3-psycopg (Debian), or psycopg[binary] with pip into the environment of this interpreter"
            )
        self._parameters = self._read_uri(uri, password)
        self._dry_run = dry_run
        # Whether a pooler drops the settings of a connection's start, so that each session sets them itself.
        self._settings_dropped = False
        self._reader_lock = threading.RLock()
        self._reader: Any = None
        self._writer: Any = None
        self._leader: Any = None
        self._leader_lock = threading.Lock()
        self._leads: set[str] = set()
        self._together: int | None = None
        self._commits = 0
        # The number of the last commit that the server confirmed, and the seconds since boot at that moment.
        self._confirmed = (0, 0.0)
        self._lost_commits = False
        # Seconds since boot until which nobody's heartbeat counts as stopped.
        self._trusts_heartbeats_at = 0.0
        self._registered = False
        self._closed = threading.Event()
        self._beating: threading.Thread | None = None
        self._later: list[tuple[str, Sequence[Any]]] = []
        # The server's time minus this host's time since boot, and the time since boot of that reading.
        self._offset: tuple[float, float] | None = None
        self._open()

    # ---- connections ----

    def _read_uri(self, uri: str, password: str | None) -> dict[str, Any]:
        try:
            parameters = dict(conninfo.conninfo_to_dict(uri))
        except psycopg.Error as error:
            raise StoreError(
                f"database {uri}: {_take_first_line(error)} (libpq {psycopg.pq.version() // 10000}). Correct the URI",
                path=uri,
            ) from None
        if password is not None:
            parameters["password"] = password
        parameters.setdefault("application_name", f"agentlab {holders.read_host_name().partition('/')[0]}"[:60])
        # Skip a standby after a failover: it would refuse the first write.
        parameters.setdefault("target_session_attrs", "read-write")
        parameters.setdefault("connect_timeout", _CONNECT_SECONDS)
        # Whatever PGCLIENTENCODING and the database say. With SQL_ASCII psycopg would return bytes.
        parameters["client_encoding"] = "UTF8"
        # With these, client and server both notice a vanished peer within seconds. The server then frees the locks.
        for name, value in (("keepalives_idle", 4), ("keepalives_interval", 1), ("keepalives_count", 3)):
            parameters.setdefault(name, value)
        parameters.setdefault("tcp_user_timeout", 10000)
        settings = [(name, value.replace(" ", "\\ ")) for name, value in self._settings().items()]
        options = " ".join(f"-c {name}={value}" for name, value in settings)
        parameters["options"] = f"{options} {parameters.get('options') or ''}".strip()
        return parameters

    def _settings(self) -> dict[str, str]:
        """Return the server's settings for each session of ours."""
        return {
            "idle_in_transaction_session_timeout": f"{_IDLE_SECONDS}s",
            "lock_timeout": f"{_LOCK_SECONDS}s",
            "tcp_keepalives_idle": "4",
            "tcp_keepalives_interval": "1",
            "tcp_keepalives_count": "3",
            # Keepalives pause while an answer is unacknowledged. Without this the server would hold the locks for
            # minutes.
            "tcp_user_timeout": "7000",
            "default_transaction_isolation": "read committed",
            _MARK: "1",
        }

    def _connect(self) -> Any:
        connection = psycopg.connect(**self._parameters, autocommit=True)
        connection.row_factory = _make_rows
        if self._settings_dropped:
            connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in self._settings().items()))
        return connection

    def _examine_session(self, connection: Any, process: int, settings: bool) -> Any:
        """Return the connection to use. Refuse a pooler that gives each transaction another session of the server.

        The locks of jobs belong to a session. ``process`` and ``settings`` are what ``_SESSION`` returned.
        """
        if process != connection.info.backend_pid:
            with contextlib.closing(self._connect()) as other:
                for _attempt in range(3):
                    # In transaction pooling the session of the first connection is free now, and serves the second.
                    process = connection.execute("SELECT pg_backend_pid()").fetchone()[0]
                    with other.transaction():
                        if other.execute("SELECT pg_backend_pid()").fetchone()[0] == process:
                            raise StoreError(
                                f"database {self.path}: a pooler before the server gives each transaction another "
                                "session (transaction pooling), which loses the locks of controllers. Let it pool by "
                                "session (pgbouncer: pool_mode = session), or name the server itself in the URI. "
                                "Nothing was written",
                                path=self.path,
                            )
        if settings:
            return connection
        connection.close()
        self._settings_dropped = True
        return self._connect()

    def _open(self) -> None:
        with self._reader_lock, self._explain_errors():
            connection = self._connect()
            try:
                try:
                    row = connection.execute(f"{_OPENING}, {_SESSION}").fetchone()
                    session = row[-2:]
                except errors.UndefinedTable:
                    row = None
                    session = connection.execute(f"SELECT {_SESSION}").fetchone()
                connection = self._examine_session(connection, *session)
            except BaseException:
                connection.close()
                raise
            self._reader = connection
            version = self._learn_server(row) if row is not None else 0
            if version < schema.VERSION:
                if self._dry_run:
                    raise StoreError(
                        f"database {self.path}: its tables are missing or of an older release (schema {version}, this "
                        f"release has {schema.VERSION}); check mode does not change them. Run once without check mode",
                        path=self.path,
                    )
                self._migrate(connection)
            connection.execute(_SHORT_WAIT)

    def _learn_server(self, row: Any) -> int:
        """Store the server's clock and version, and return the schema's version.

        Raises StoreError for an unknown version.
        """
        self._offset = (float(row[0]) - read_boot_seconds(), read_boot_seconds())
        self.server_version = str(row[3])
        version = int(row[1]) if row[1] is not None and str(row[1]).isdecimal() else 0
        if version > schema.VERSION:
            raise StoreError(
                f"database {self.path}: its schema version {version} is newer than the {schema.VERSION} that this "
                "release knows; upgrade agentlab.proxmox here too. Nothing was written",
                path=self.path,
            )
        return version

    def _migrate(self, connection: Any) -> None:
        """Bring the tables to the present version. The first process that opens the database does this once."""
        try:
            with connection.transaction():
                connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK_SPACE}, {_MIGRATION})")
                # Keep writers out meanwhile. A process of the older release sees the new version at its next write, and
                # stops.
                connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK_SPACE}, {_WRITER})")
                version = 0
                # to_regclass finds the first such table on the search path.
                if connection.execute("SELECT to_regclass('meta')").fetchone()[0] is not None:
                    version = self._learn_server(connection.execute(_OPENING).fetchone())
                encoding = connection.info.parameter_status("server_encoding")
                if version == 0 and encoding not in _ENCODINGS:
                    raise StoreError(
                        f"database {self.path}: its encoding is {encoding}, which cannot store every text. Valid: "
                        "UTF8. Make the database again: createdb --encoding=UTF8 --locale=C --template=template0 NAME",
                        path=self.path,
                    )
                if version < schema.VERSION:
                    for statement in own_schema.list_statements(version):
                        connection.execute(statement)
                    connection.execute(
                        "INSERT INTO meta (key, value) VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = "
                        "excluded.value",
                        [own_schema.VERSION_KEY, str(schema.VERSION)],
                    )
                    self.migrated = True
        except errors.InsufficientPrivilege as error:
            raise StoreError(
                f"database {self.path}: its tables are missing or of an older release, and this role may not change "
                f"them ({_take_first_line(error)}). Run agentlabd --migrate-records with the migration role "
                "(docs/controllers.md)",
                path=self.path,
            ) from None
        self._learn_server(connection.execute(_OPENING).fetchone())

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn every error of psycopg in the block into a StoreError."""
        try:
            yield
        except psycopg.Error as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> StoreError:
        """Return PostgreSQL's error as a StoreError that names the database and says what to do."""
        failures = refusals.describe(error)
        text = "; ".join(failures)
        if isinstance(error, errors.LockNotAvailable):
            advice = (
                f"another session kept the records locked for too long ({self.name_locker()}); nothing was written. "
                "End it (SELECT pg_terminate_backend(PID)), or wait until it has done, then run again"
            )
        elif isinstance(error, _CONFLICTS):
            advice = (
                f"other sessions changed the same rows in each of {_ATTEMPTS} attempts; nothing was written; run again"
            )
        else:
            state = getattr(error, "sqlstate", None)
            step = refusals.judge_passfile(text, self._parameters) or refusals.next_step(state, failures)
            if isinstance(error, _LOST) and (step is None or step.passing):
                answers = step is not None and (state is not None or "FATAL" in text or "read-only" in text)
                return StoreUnavailable.of(self.path, text, step.advice if step else None, answers=answers)
            advice = (
                f"{step.advice}. Nothing was written"
                if step
                else "nothing was written; look at the log of the server, then run agentlab_doctor (agentlab doctor)"
            )
        return StoreError(f"database {self.path}: {text}: {advice}", path=self.path)

    # ---- the server's clock ----

    def choose_clock(self, own: Clock) -> Clock:
        return ServerClock(self, own)

    def read_server_time(self) -> float:
        """Return the server's time in seconds since the epoch. Without an answer, extrapolate from the last reading."""
        if self._offset is None:
            raise StoreError("the server's time was not read when the records were opened")
        offset, read_at = self._offset
        if read_boot_seconds() - read_at > _CLOCK_SECONDS:
            with contextlib.suppress(StoreError):
                self._learn_server(self.read(_OPENING)[0])
                offset = self._offset[0]
        return read_boot_seconds() + offset

    def read_wall_time(self) -> float:
        return self.read_server_time()

    def read_clock_difference(self) -> float:
        """Return by how many seconds this host's wall clock is ahead of the server's."""
        return time.time() - self.read_server_time()

    # ---- reading ----

    def read(self, sql: str, *values: Any) -> list[Any]:
        return self.read_as(lambda row: row, sql, *values)

    def read_as(self, make: Callable[[Any], T], sql: str, *values: Any) -> list[T]:
        """Return ``make(row)`` for each row. Replaces a lost connection once."""
        if self._together == threading.get_ident():
            with self._explain_errors():
                return list(map(make, Session(self._writer).execute(sql, values)))
        with self._reader_lock, self._explain_errors():
            for last in (False, True):
                try:
                    if self._reader is None or self._reader.closed:
                        self._reader = self._connect()
                        self._reader.execute(_SHORT_WAIT)
                    return list(map(make, Session(self._reader).execute(sql, values)))
                except errors.LockNotAvailable:
                    raise
                except _LOST:
                    self._reader = self._drop_connection(self._reader)
                    if last:
                        raise
        raise AssertionError("unreachable")

    def _drop_connection(self, connection: Any) -> Any:
        """Close a broken connection, and return None to store in its place."""
        self.reconnects += 1
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()
        return None

    # ---- writing ----

    def write(self, work: Callable[[Any], T], *, checked: bool = False) -> T:
        """Run ``work`` in a transaction and return its value once that is committed.

        May call ``work`` more than once.
        """
        if self._together == threading.get_ident():
            with self._explain_errors():
                self._refuse_ended()
                session = Session(self._writer)
                # A checked ``work`` raises only before its first write, so it needs no savepoint.
                return work(session) if checked else self._run_in_savepoint(session, work)
        with self._explain_errors():
            return self.enqueue(work)

    def _run_in_savepoint(self, session: Session, work: Callable[[Any], T]) -> T:
        """Run a write in a savepoint of its own. An exception rolls back only this write."""
        session.execute("SAVEPOINT queued_write")
        try:
            value = work(session)
        except Exception:
            if not self._writer.closed:
                session.execute("ROLLBACK TO queued_write")
            raise
        session.execute("RELEASE queued_write")
        return value

    def make_interruption_error(self) -> Exception:
        return psycopg.OperationalError("interrupted")

    def run_batch(self, batch: list[QueuedWrite]) -> None:
        """Commit these writes together. Retries conflicts. After a lost commit it first looks up the outcome."""
        for attempt in range(1, _ATTEMPTS + 1):
            for queued in batch:
                queued.error = queued.value = None
            try:
                with self._transact() as session:
                    for queued in batch:
                        try:
                            queued.value = (
                                self._run_in_savepoint(session, queued.work) if len(batch) > 1 else queued.work(session)
                            )
                        except (*_CONFLICTS, *_LOST):
                            raise
                        except Exception as error:
                            queued.error = error
                            if len(batch) == 1:
                                raise
                return
            except (*_CONFLICTS, *_LOST) as error:
                # Do not wait a second time for a server that does not answer at all.
                if attempt == _ATTEMPTS or isinstance(error, errors.LockNotAvailable) or _is_refused(error):
                    raise
                self.retries += 1
                time.sleep(random.uniform(0.01, 0.05) * 2**attempt)

    @contextlib.contextmanager
    def _transact(self) -> Iterator[Session]:
        """Run one transaction under the writer's lock. Called with this process's own writer lock held."""
        self.waits_since = time.monotonic()
        try:
            connection = self._begin_transaction()
            try:
                yield Session(connection)
                self._refuse_ended()
            except BaseException:
                self._roll_back(connection)
                raise
            self._commit_connection(connection)
        finally:
            if time.monotonic() - self.waits_since > HEARTBEAT_SECONDS:
                # Whatever kept this process from writing kept others from their heartbeats.
                self._trusts_heartbeats_at = read_boot_seconds() + DEAD_SECONDS
            self.waits_since = None

    def _begin_transaction(self) -> Any:
        """Begin a transaction, take the writer's lock, and return the connection. Raises StoreError."""
        if self._writer is None or self._writer.closed:
            self._writer = self._connect_writer()
        try:
            cursor = self._writer.execute(_BEGIN)
            # Of these statements only the last one's rows count.
            while cursor.nextset():
                pass
            version = self._learn_server(cursor.fetchone())
            if version < schema.VERSION:
                raise StoreError(f"database {self.path}: its tables were replaced by older ones; run again")
        except BaseException:
            self._roll_back(self._writer)
            raise
        return self._writer

    def _connect_writer(self) -> Any:
        """Return a new connection for writing. Check first whether the server still has this process's commits.

        The next commit of this process overwrites its number of commits, and with it the proof of a loss.
        """
        connection = self._connect()
        try:
            self._compare_commits(lambda sql, *values: connection.execute(translate(sql), values).fetchall())
        except BaseException:
            connection.close()
            raise
        return connection

    def _compare_commits(self, read: Callable[..., Sequence[Any]]) -> None:
        """Remember if the server lacks commits of this process that a server confirmed."""
        number, at = self._confirmed
        if not number or self._lost_commits:
            return
        rows = read("SELECT commits FROM controllers WHERE id = ?", self.controller)
        # Other controllers remove the row of a process that was silent for long.
        missing = not rows and read_boot_seconds() - at < _FORGET_SECONDS / 2
        if missing or (rows and int(rows[0][0]) < number):
            self._lost_commits = True

    def _roll_back(self, connection: Any) -> None:
        """Roll the transaction back. A broken connection is closed, and its server rolls back."""
        try:
            if not connection.closed:
                connection.execute("ROLLBACK")
        except psycopg.Error:
            pass
        else:
            if not connection.closed:
                return
        self._writer = self._drop_connection(connection)

    def _refuse_ended(self) -> None:
        """Raise when the server ended the transaction before its commit. Its writes are then rolled back."""
        if self._writer.info.transaction_status != psycopg.pq.TransactionStatus.INTRANS:
            raise psycopg.InternalError("the transaction was rolled back")

    def _commit_connection(self, connection: Any) -> None:
        """Commit. When the answer is lost, look up whether the commit was carried out."""
        number = self._commits = self._commits + 1
        host = holders.read_host_name().replace("'", "")
        try:
            cursor = connection.execute(
                f"INSERT INTO controllers VALUES ('{self.controller}', '{host}', {number}, {_EPOCH}) ON CONFLICT (id) "
                f"DO UPDATE SET commits = {number}, seen_at = {_EPOCH}; COMMIT".replace("%", "%%")
            )
            while cursor.nextset():
                pass
            if cursor.statusmessage != "COMMIT":
                raise psycopg.OperationalError("the server rolled the transaction back")
        except _LOST:
            self._roll_back(connection)
            if not self._was_committed(number):
                raise
        self._registered = True
        self._confirmed = (number, read_boot_seconds())

    def _was_committed(self, number: int) -> bool:
        """Return whether a commit without an answer was carried out. Raises when the server does not answer."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._writer = self._connect_writer()
                # The lost transaction holds the writer's lock until it has ended either way, so wait for that lock.
                cursor = self._writer.execute(
                    f"BEGIN; SELECT pg_advisory_xact_lock({_LOCK_SPACE}, {_WRITER}); "
                    f"SELECT max(commits) FROM controllers WHERE id = '{self.controller}'; COMMIT"
                )
                cursor.nextset()
                cursor.nextset()
                last = cursor.fetchone()[0]
                return last is not None and last >= number
            except _LOST:
                self._writer = self._drop_connection(self._writer)
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def group_writes(self) -> Iterator[None]:
        """Group all writes of this thread into one transaction. Report nothing as done until the block has ended."""
        with self._explain_errors(), self._writer_lock, self._transact():
            self._together = threading.get_ident()
            try:
                yield
            finally:
                self._together = None

    @contextlib.contextmanager
    def freeze(self) -> Iterator[None]:
        with self.group_writes():
            # The transaction is idle while the other database writes.
            self._writer.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield

    def set_counters(self, conn: Session, counters: dict[str, int]) -> None:
        for table, number in counters.items():
            query = "SELECT setval(pg_get_serial_sequence(?, 'id'), ?, ? = 1)"
            try:
                conn.execute(query, (table, max(1, number), number > 0))
            except errors.InsufficientPrivilege as error:
                raise StoreError(
                    f"database {self.path}: this role may not set the counter of {table} "
                    f"({_take_first_line(error)}). Copy as agentlab_owner, the owner of the tables "
                    "(docs/controllers.md). Nothing was written",
                    path=self.path,
                ) from None

    # ---- heartbeats ----

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        """Return whether the holder's heartbeat is older than DEAD_SECONDS by the server's clock, or was ended."""
        try:
            controller = json.loads(process)["controller"]
        except (ValueError, KeyError, TypeError):
            # A claim written on SQLite names no controller. Its process can only be checked on its host.
            return False
        if controller == self.controller:
            return False
        # After a restart of the server give every controller time for a new heartbeat.
        began = "extract(epoch FROM pg_postmaster_start_time())::float8"
        rows = list(read(f"SELECT greatest(seen_at, {began}) FROM controllers WHERE id = ?", [controller]))
        if not rows:
            return True
        if self._must_wait_for_heartbeats() or float(rows[0][0]) >= self.read_server_time() - DEAD_SECONDS:
            return False
        # A row that is locked may be a heartbeat that waits; it needs some time once the lock is gone.
        free = bool(list(read("SELECT 1 FROM controllers WHERE id = ? FOR UPDATE SKIP LOCKED", [controller])))
        if not free:
            self._trusts_heartbeats_at = read_boot_seconds() + DEAD_SECONDS
        return free

    def _must_wait_for_heartbeats(self) -> bool:
        """Return whether a lock kept this process from writing, a moment ago or in the present transaction.

        Such a lock also keeps the heartbeats of others from being written.
        """
        waits = self.waits_since
        waited = waits is not None and time.monotonic() - waits > HEARTBEAT_SECONDS
        return waited or read_boot_seconds() < self._trusts_heartbeats_at

    def keep_alive(self) -> None:
        with self._reader_lock:
            if self._beating is None and not self._closed.is_set():
                self._beating = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)
                self._beating.start()

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        self._later.append((sql, values))

    def _send_heartbeats(self) -> None:
        """Renew this process's heartbeat until it closes, and run the statements of ``write_later``."""
        connection: Any = None
        pause = HEARTBEAT_SECONDS
        while not self._closed.wait(pause):
            try:
                if connection is None or connection.closed:
                    connection = self._connect()
                    # A heartbeat may be lost in a crash of the server, so do not wait for the disk.
                    connection.execute("SET synchronous_commit = off")
                connection.execute(f"UPDATE controllers SET seen_at = {_EPOCH} WHERE id = %s", [self.controller])
                while self._later:
                    sql, values = self._later[0]
                    Session(connection).execute(sql, values)
                    self._later.pop(0)
                connection.execute(f"DELETE FROM controllers WHERE seen_at < {_EPOCH} - %s", [_FORGET_SECONDS])
                pause = HEARTBEAT_SECONDS
            except psycopg.Error:
                connection = self._drop_connection(connection)
                pause = 1.0
        if connection is not None:
            self._drop_connection(connection)

    # ---- jobs that one controller does ----

    def lead(self, job: str) -> bool:
        """Return whether this process does ``job`` now, that is, holds the job's lock on a session of its own."""
        query = f"SELECT pg_try_advisory_lock({_LOCK_SPACE}, {_FIRST_JOB + JOBS.index(job)})"
        with self._leader_lock, self._explain_errors():
            try:
                if self._leader is None or self._leader.closed:
                    self._leads.clear()
                    self._leader = self._connect()
                # Ask the server in either case: a lost session holds no lock.
                if job in self._leads:
                    self._leader.execute("SELECT 1")
                elif self._leader.execute(query).fetchone()[0]:
                    self._leads.add(job)
            except _LOST:
                self._leads.clear()
                self._leader = self._drop_connection(self._leader)
                raise
            return job in self._leads

    @contextlib.contextmanager
    def run_alone(self, job: str, wait: float) -> Iterator[None]:
        """Hold the lock of a pass on a session of its own. The server frees the lock when this process dies."""
        lock = f"{_LOCK_SPACE}, {_FIRST_PASS + JOBS.index(job)}"
        deadline = time.monotonic() + wait
        with self._explain_errors():
            connection = self._connect()
        with contextlib.closing(connection):
            with self._explain_errors():
                while not connection.execute(f"SELECT pg_try_advisory_lock({lock})").fetchone()[0]:
                    if time.monotonic() >= deadline:
                        raise Busy(self._name_runner(connection, job))
                    time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
            yield

    def _name_runner(self, connection: Any, job: str) -> str:
        """Return the sentence that names the controller that holds the lock of a pass."""
        rows = connection.execute(
            "SELECT application_name, host(client_addr) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE "
            "locktype = 'advisory' AND classid = %s AND objid = %s AND granted "
            # The view has the locks of every database of the server.
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            [_LOCK_SPACE, _FIRST_PASS + JOBS.index(job)],
        ).fetchall()
        names = [f"{name.removeprefix('agentlab ')} ({address})" for name, address in rows if name]
        return (
            f"{job} is being run by another controller{' on ' + ' and '.join(names) if names else ''}; wait until it "
            "has ended, then run again"
        )

    # ---- the rest of the port ----

    def lock_sandbox(self, conn: Session, uuid: str) -> None:
        conn.execute(
            "WITH own AS (SELECT 1 FROM controllers WHERE id = ? FOR UPDATE), "
            "sandbox AS (SELECT 1 FROM sandboxes WHERE uuid = ? FOR UPDATE) "
            "SELECT (SELECT count(*) FROM own), (SELECT count(*) FROM sandbox)",
            (self.controller, uuid),
        )

    def name_locker(self) -> str:
        unknown = "which one cannot be seen from here: SELECT pid, usename, query FROM pg_stat_activity"
        try:
            with contextlib.closing(self._connect()) as connection:
                # This process waits for others, not for the session of its own long write.
                writer = self._writer
                own = writer.info.backend_pid if writer is not None and not writer.closed else 0
                rows = connection.execute(_LOCKER, [own]).fetchall()
        except psycopg.Error:
            return unknown
        if not rows:
            return unknown
        pid, role, program, address, began = rows[0]
        where = f", {program or 'a program'} on {address or 'the server'}" if program or address else ""
        since = f", in a transaction since {began}" if began else ""
        return f"session {pid} of role {role}{where}{since}"

    def explain_replacement(self) -> str | None:
        return None

    def has_lost_commits(self) -> bool:
        self._compare_commits(self.read)
        return self._lost_commits

    def forget_lost_commits(self) -> None:
        self._lost_commits, self._confirmed = False, (0, 0.0)

    def read_latest_event(self) -> int:
        # The sequence stays when retention removes events. Without the right to read it use the newest event.
        rows = self.read(
            "SELECT COALESCE(pg_sequence_last_value(pg_get_serial_sequence('events', 'id')), (SELECT max(id) FROM "
            "events), 0)"
        )
        return int(rows[0][0])

    def read_noted_event(self) -> int | None:
        return None

    def note_event(self, event: int) -> None:
        """Do nothing: a database on a server has no file to write a note beside."""

    def limit_cache(self, kib: int) -> None:
        """Do nothing: the server caches the pages."""

    def check_integrity(self) -> str:
        return "ok"

    def close(self) -> None:
        self._closed.set()
        if self._beating is not None and self._beating is not threading.current_thread():
            self._beating.join(2.0)
        if self._registered and not self._later:
            with contextlib.suppress(psycopg.Error):
                if self._writer is not None and not self._writer.closed:
                    # Release the claims that this process still holds.
                    self._writer.execute("SET synchronous_commit = off")
                    self._writer.execute("DELETE FROM controllers WHERE id = %s", [self.controller])
        for connection in (self._reader, self._writer, self._leader):
            if connection is not None:
                with contextlib.suppress(psycopg.Error):
                    connection.close()


def _is_refused(error: Exception) -> bool:
    """Return whether no connection was made at all: no server listens, or no server accepts writes."""
    return (
        isinstance(error, psycopg.OperationalError)
        and error.sqlstate is None
        and "connection" in str(error)
        # "idle-in-transaction timeout" is the end of a connection that was there.
        and ("refused" in str(error) or "timeout expired" in str(error) or "could not translate" in str(error))
    )


def _take_first_line(error: Exception) -> str:
    return refusals.describe(error)[0]
