# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Dry runs on the connections of another engine: read as usual, and roll each write back at once.

This needs no copy of the records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..clock import Clock
from .port import Engine

T = TypeVar("T")


class Rehearsal:
    """An engine for check mode on another engine's connections. ``owner``: close that engine as well."""

    waits_since: float | None = None
    reconnects = 0
    retries = 0
    takeovers = 0
    migrated = False

    def __init__(self, database: Engine, *, owner: bool = False) -> None:
        self.path = database.path
        self.kind = database.kind
        self.conflicts = database.conflicts
        self.controller = database.controller
        self._database = database
        self._owner = owner

    def choose_clock(self, own: Clock) -> Clock:
        return self._database.choose_clock(own)

    def read_wall_time(self) -> float:
        return self._database.read_wall_time()

    def read_clock_difference(self) -> float:
        return self._database.read_clock_difference()

    def read(self, sql: str, *values: Any) -> list[Any]:
        return self._database.read(sql, *values)

    def read_as(self, make: Callable[[Any], T], sql: str, *values: Any) -> list[T]:
        return self._database.read_as(make, sql, *values)

    def write(self, work: Callable[[Any], T], *, checked: bool = False) -> T:
        """Run ``work``, roll its savepoint back, and return its value.

        The savepoint is needed even when ``checked``.
        """

        def run_and_undo(conn: Any) -> None:
            raise _Undone(work(conn))

        try:
            self._database.write(run_and_undo)
        except _Undone as outcome:
            value: T = outcome.args[0]
            return value
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def group_writes(self) -> Iterator[None]:
        yield

    def freeze(self) -> contextlib.AbstractContextManager[None]:
        return self._database.freeze()

    def set_counters(self, conn: Any, counters: dict[str, int]) -> None:
        self._database.set_counters(conn, counters)

    def lock_sandbox(self, conn: Any, uuid: str) -> None:
        self._database.lock_sandbox(conn, uuid)

    def name_locker(self) -> str:
        return self._database.name_locker()

    def is_abandoned(self, process: str, read: Callable[[str, Sequence[Any]], Sequence[Any]]) -> bool:
        return self._database.is_abandoned(process, read)

    def keep_alive(self) -> None:
        """Do nothing: a dry run holds no claim."""

    def write_later(self, sql: str, values: Sequence[Any]) -> None:
        """Do nothing: a dry run writes nothing."""

    def lead(self, job: str) -> bool:
        return self._database.lead(job)

    def run_alone(self, job: str, wait: float) -> contextlib.AbstractContextManager[None]:
        """Do nothing: a dry run only reads."""
        return contextlib.nullcontext()

    def explain_replacement(self) -> str | None:
        return self._database.explain_replacement()

    def has_lost_commits(self) -> bool:
        return self._database.has_lost_commits()

    def forget_lost_commits(self) -> None:
        """Do nothing: a dry run holds no leases."""

    def read_latest_event(self) -> int:
        return self._database.read_latest_event()

    def read_noted_event(self) -> int | None:
        return self._database.read_noted_event()

    def note_event(self, event: int) -> None:
        """Do nothing: a dry run writes nothing."""

    def limit_cache(self, kib: int) -> None:
        """Do nothing: the connections belong to the other engine."""

    def check_integrity(self) -> str:
        return self._database.check_integrity()

    def close(self) -> None:
        if self._owner:
            self._database.close()


class _Undone(Exception):
    pass
