# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an engine must offer: connections, transactions and the few places where dialects differ.

All SQL of the records stands in this room once, in the common subset of the engines: ``?`` for a value, whole numbers
and texts as column types, ``ON CONFLICT`` for upserts. An engine translates nothing but the placeholder.
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
        """How many rows the statement changed."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the rows that are left."""


class Connection(Protocol):
    """A connection inside a transaction: what the functions given to ``Engine.write`` work with."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement with its values."""

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Any:
        """Run one statement once for each row of values."""


class Engine(Protocol):
    """The records' database, opened. Every method may raise StoreError, whose message names the database."""

    # The path or URI, without a password.
    path: str
    # "sqlite" or "postgresql", and the schema of the opened records.
    kind: str
    # Since when a write waits for other processes to finish theirs (monotonic seconds), or None.
    waits_since: float | None
    # What a statement raises that breaks a unique index.
    conflicts: tuple[type[Exception], ...]
    # The name of this process in the table of heartbeats; None for an engine without heartbeats.
    controller: str | None
    # How often a connection was replaced, and a transaction repeated.
    reconnects: int
    retries: int
    # How many claims this process took over from holders that had died.
    takeovers: int

    def clock(self, own: Clock) -> Clock:
        """Return the clock that leases, ages and heartbeats are compared by: this host's own, or the server's."""

    def wall_time(self) -> float:
        """Return the wall time of that clock, with fractions of a second."""

    def clock_difference(self) -> float:
        """Return the seconds by which this host's wall clock is ahead of the one that leases are compared by."""

    def read(self, sql: str, *values: Any) -> list[Any]:
        """Return the rows of a query, outside any transaction of a writer."""

    def read_as(self, make: Callable[[Any], T], sql: str, *values: Any) -> list[T]:
        """Return what ``make`` makes of each row."""

    def write(self, work: Callable[[Any], T], *, checked: bool = False) -> T:
        """Run ``work`` in a transaction; return its value once that is durable. What it raises undoes its own writes.

        ``work`` may be called again after a conflict with another writer, so it changes nothing but the records.
        ``checked``: it refuses, if at all, before its first write.
        """

    def together(self) -> AbstractContextManager[None]:
        """Group all writes of this thread into one transaction. Report nothing as done until the block has ended."""

    def freeze(self) -> AbstractContextManager[None]:
        """Keep every other writer out, for as long as it takes: for a copy of all records."""

    def set_counters(self, conn: Any, counters: dict[str, int]) -> None:
        """Let the next id of each table be greater than this number. Called in a transaction."""

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        """Return whether the heartbeat of a claim's holder has ended. ``read`` runs a query in the caller's place."""

    def keep_alive(self) -> None:
        """Begin the heartbeat of this process: from now on it holds claims."""

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        """Run a statement when the database answers again; an engine whose claims end with the process forgets it."""

    def lead(self, job: str) -> bool:
        """Return whether this process is the one that does ``job`` now. On one host there is no other."""

    def replaced(self) -> str | None:
        """Return the sentence for a database that is not the one that was opened, or None."""

    def latest_event(self) -> int:
        """Return the id of the newest event that these records ever had, 0 without one."""

    def noted_event(self) -> int | None:
        """Return the newest event that this host noted beside the records; None where it keeps no such note."""

    def note_event(self, event: int) -> None:
        """Note the newest event beside the records, where this host keeps such a note."""

    def limit_cache(self, kib: int) -> None:
        """Let each connection keep at most so many KiB, for a process that lives long."""

    def integrity(self) -> str:
        """Return ``ok``, or what the engine's own check found."""

    def close(self) -> None:
        """Close the connections."""
