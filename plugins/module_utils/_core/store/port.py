# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Define what an engine must offer: connections, transactions, and the few differences between the dialects.

All SQL of the records is in this room, in the common subset of the engines: ``?`` for a value, whole numbers and text
as column types, ``ON CONFLICT`` for upserts. An engine translates only the placeholder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from ..clock import Clock

T = TypeVar("T")


class Row(Protocol):
    """One row. A column is read by its name or its position; ``dict(row)`` and ``tuple(row)`` work."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return the value of a column."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the values."""

    def keys(self) -> Iterable[str]:
        """Return the names of the columns, in their order."""


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """Return how many rows the statement changed."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchall(self) -> list[Any]:
        """Return the remaining rows."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the remaining rows."""


class Connection(Protocol):
    """A connection inside a transaction, as the functions given to ``Engine.write`` receive it."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement with its values."""

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Cursor:
        """Run one statement once for each row of values. ``rowcount`` is the sum; an engine sends all rows at once."""


class Engine(Protocol):
    """The opened database of the records. Every method may raise StoreError, whose message names the database."""

    # The path or URI, without a password.
    path: str
    # "sqlite" or "postgresql", and the schema of the opened records.
    kind: str
    # Time since which a write has not come to its end (monotonic seconds), or None. On SQLite that is the wait for its
    # lock; on a server, statements may wait as well.
    waits_since: float | None
    # Exceptions raised by a statement that violates a unique index.
    conflicts: tuple[type[Exception], ...]
    # The id of this process in the table of heartbeats; None on an engine without heartbeats.
    controller: str | None
    # Number of replaced connections, and of repeated transactions.
    reconnects: int
    retries: int
    # Number of claims that this process took over from dead holders.
    takeovers: int
    # Whether this process created or updated the tables when it opened the records.
    migrated: bool

    def choose_clock(self, own: Clock) -> Clock:
        """Return the clock for leases, ages and heartbeats: this host's own, or the server's."""

    def read_wall_time(self) -> float:
        """Return the wall time of that clock in seconds since the epoch, with fractions."""

    def read_clock_difference(self) -> float:
        """Return by how many seconds this host's wall clock is ahead of the clock for leases."""

    def read(self, sql: str, *values: Any) -> list[Any]:
        """Return the rows of a query, read outside any write transaction."""

    def read_as(self, make: Callable[[Any], T], sql: str, *values: Any) -> list[T]:
        """Return ``make(row)`` for each row."""

    def write(self, work: Callable[[Any], T], *, checked: bool = False) -> T:
        """Run ``work`` in a transaction and return its value once that is durable. An exception rolls its writes back.

        ``work`` may be called again after a conflict with another writer, so its only side effects are writes to the
        records. ``checked``: ``work`` raises only before its first write, so it needs no savepoint.
        """

    def group_writes(self) -> AbstractContextManager[None]:
        """Group all writes of this thread into one transaction. Report nothing as done until the block has ended."""

    def freeze(self) -> AbstractContextManager[None]:
        """Keep all other writers out until the block ends, for a copy of all records."""

    def set_counters(self, conn: Any, counters: dict[str, int]) -> None:
        """Make the next id of each table greater than the given number. Called within a transaction."""

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        """Return whether the heartbeat of a claim's holder has stopped.

        ``read`` runs a query on the caller's connection.
        """

    def keep_alive(self) -> None:
        """Start the heartbeat of this process, because it holds claims from now on."""

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        """Run a statement once the database answers again. Engines whose claims end with the process do nothing."""

    def lock_sandbox(self, conn: Any, uuid: str) -> None:
        """Wait for everything that can keep the transaction from writing this sandbox's record, before a clock is read.

        Does nothing on an engine on which a transaction that has begun waits for nobody.
        """

    def name_locker(self) -> str:
        """Return who keeps writers of the records waiting, as far as that can be seen from here."""

    def lead(self, job: str) -> bool:
        """Return whether this process is the one that does ``job`` now. Always True on an engine for a single host."""

    def run_alone(self, job: str, wait: float) -> AbstractContextManager[None]:
        """Keep other controllers from running ``job`` until the block ends, whoever asked for it.

        Raises Busy, which names the host that runs it, after waiting ``wait`` seconds. Does nothing on an engine for a
        single host.
        """

    def explain_replacement(self) -> str | None:
        """Return the error text if the opened database was replaced by another or cannot be reached; else None."""

    def has_lost_commits(self) -> bool:
        """Return whether the server lacks commits of this process that were confirmed, as after a failover to an
        asynchronous standby. Always False on an engine without a server.
        """

    def forget_lost_commits(self) -> None:
        """Return False from ``has_lost_commits`` again, because the leases are held."""

    def read_latest_event(self) -> int:
        """Return the id of the newest event that these records ever had; 0 without one."""

    def read_noted_event(self) -> int | None:
        """Return the newest event id noted beside the records on this host; None on an engine without such a note."""

    def note_event(self, event: int) -> None:
        """Write the newest event id beside the records, on an engine with such a note."""

    def limit_cache(self, kib: int) -> None:
        """Limit the page cache of each connection to ``kib`` KiB, for a long-lived process."""

    def check_integrity(self) -> str:
        """Return ``ok``, or the result of the engine's own check."""

    def close(self) -> None:
        """Close the connections."""
