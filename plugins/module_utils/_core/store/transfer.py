# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy all records to another, empty database: from SQLite to PostgreSQL or back. All or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..clock import SystemClock
from ..database_address import SQLITE, Address, parse
from ..errors import InvalidInput, StoreError, StoreUnavailable
from .open import open_database
from .port import Connection, Engine
from .records import Records
from .sqlite import latest

# Table -> key, ordered so that referenced rows are copied first. Claims are not copied, because they end with their
# holders.
TABLES = {
    "sandboxes": "uuid",
    "events": "id",
    "operations": "id",
    "workspaces": "id",
    "workspace_events": "id",
    "runs": "id",
    "placements": "sandbox_uuid",
}
# Tables whose ids the engine generates.
COUNTED = ("events", "operations", "workspace_events")
# Rows of meta about one host's clocks and the engine's schema version. They are not copied.
_LOCAL_NOTES = ("clock", "schema_version")
_PAGE = 2000

Query = Callable[[str, Sequence[Any]], Sequence[Any]]


@dataclass(slots=True)
class Copied:
    """The number of rows in each table, and the checksum over all rows. Both are equal on either side."""

    counts: dict[str, int]
    source_checksum: str
    target_checksum: str


def copy_records(source: str, target: str, passwords: tuple[str | None, str | None] = (None, None)) -> Copied:
    """Copy all records from ``source`` to ``target`` and return the counts.

    Raises StoreError, and writes nothing, when the source is in use or the target is not empty.
    """
    addresses = parse(source), parse(target)
    if _are_same(*addresses):
        raise InvalidInput(
            f"--copy-records: FROM {addresses[0].text} and TO {addresses[1].text} are the same database; nothing was "
            "copied. Name an empty database as TO"
        )
    if addresses[0].engine == SQLITE and not os.path.isfile(addresses[0].text):
        problem = "is no file" if os.path.exists(addresses[0].text) else "does not exist"
        raise InvalidInput(
            f"--copy-records: FROM {addresses[0].text} {problem}; nothing was copied. Give the SQLite file of the "
            "records, such as /var/lib/agentlab/agentlab.db"
        )
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for side, address, password in zip(("FROM", "TO"), addresses, passwords, strict=True):
            if side == "TO":
                # Check FROM before creating TO: a source in use is the usual reason for a refusal.
                _refuse_in_use(engines[0])
                if address.engine == SQLITE and not os.path.lexists(address.text):
                    stack.push(_NewFile(address.text).remove_after_failure)
            try:
                engines.append(open_database(address.text, password=password or address.password))
            except StoreUnavailable as error:
                raise StoreError(f"--copy-records: {side}: {error.explain_once('nothing was copied')}") from error
            stack.callback(engines[-1].close)
        try:
            return _copy_rows(*engines)
        except StoreUnavailable as error:
            fate = (
                "the copy is written as a whole or not at all: where it was carried out, the next run says that TO is "
                "not empty"
            )
            raise StoreError(f"--copy-records: {error.explain_once(fate)}") from error


class _NewFile:
    """A SQLite file that a copy is about to create, and the missing folders above the file."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._missing_folders: list[str] = []
        folder = os.path.dirname(self._path)
        while not os.path.isdir(folder):
            self._missing_folders.append(folder)
            folder = os.path.dirname(folder)

    def remove_after_failure(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        """Remove the file and the created folders when an exception ends the copy. A file that holds records stays."""
        if kind is None or (os.path.exists(self._path) and not self._is_empty()):
            return
        for name in (self._path, f"{self._path}-wal", f"{self._path}-shm", latest.make_note_path(self._path)):
            with contextlib.suppress(OSError):
                os.unlink(name)
        for folder in self._missing_folders:
            # A folder that another program has used meanwhile is not empty, and stays.
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _is_empty(self) -> bool:
        """Return whether the file holds no record. A file that cannot be read counts as not empty."""
        try:
            database = open_database(self._path)
        except StoreError:
            return False
        try:
            return not any(database.read(f"SELECT 1 FROM {table} LIMIT 1") for table in TABLES)
        except StoreError:
            return False
        finally:
            database.close()


def _are_same(source: Address, target: Address) -> bool:
    """Return whether both addresses are one database: the same text, or one file by two paths."""
    if source.text == target.text:
        return True
    try:
        return source.engine == target.engine == SQLITE and os.path.samefile(source.text, target.text)
    except OSError:
        # At least one of the two files does not exist.
        return False


def _copy_rows(source: Engine, target: Engine) -> Copied:
    """Copy the rows in one transaction, and compare the checksums before its commit. Raises StoreError."""
    with source.freeze():
        # A run may have begun since the first check.
        _refuse_in_use(source)

        def work(conn: Connection) -> Copied:
            def read_target(sql: str, values: Sequence[Any]) -> Sequence[Any]:
                return conn.execute(sql, values).fetchall()

            for table in TABLES:
                if read_target(f"SELECT 1 FROM {table} LIMIT 1", ()):
                    raise StoreError(
                        f"database {target.path}: it is not empty (table {table}); records are copied into an empty "
                        "database only. Nothing was copied"
                    )
            counts: dict[str, int] = {}
            for table, key in TABLES.items():
                counts[table] = 0
                for rows in _read_pages(_make_reader(source), table, key):
                    names = list(rows[0].keys())
                    places = ", ".join("?" * len(names))
                    conn.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})", map(tuple, rows))
                    counts[table] += len(rows)
            for key, value in _read_notes(_make_reader(source)):
                conn.execute(
                    "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = "
                    "excluded.value",
                    (key, value),
                )
            target.set_counters(conn, _read_counters(source))
            copied = Copied(counts, _compute_checksum(_make_reader(source)), _compute_checksum(read_target))
            if copied.source_checksum != copied.target_checksum:
                raise StoreError(
                    f"database {target.path}: the copy differs from {source.path}; nothing was written. Please report "
                    "this"
                )
            return copied

        return target.write(work)


def _refuse_in_use(source: Engine) -> None:
    """Raise StoreError when an operation is under way on the source."""
    records = Records(source, source.choose_clock(SystemClock()), "copy")
    under_way, _interrupted = records.list_unfinished()
    if under_way:
        raise StoreError(
            f"database {source.path}: {len(under_way)} operation(s) are under way ({under_way[0].kind} by "
            f"{under_way[0].actor}); end every controller of these records first. Nothing was copied"
        )


def _make_reader(database: Engine) -> Query:
    """Return a function that runs a query with its values on the database."""
    return lambda sql, values: database.read(sql, *values)


def _read_pages(read: Query, table: str, key: str) -> Iterator[Sequence[Any]]:
    """Yield the rows of a table in parts of _PAGE rows, in the order of the key."""
    rows = read(f"SELECT * FROM {table} ORDER BY {key} LIMIT ?", (_PAGE,))
    while rows:
        yield rows
        rows = read(f"SELECT * FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT ?", (rows[-1][key], _PAGE))


def _read_notes(read: Query) -> list[tuple[str, str]]:
    """Return the rows of the table meta that are copied."""
    rows = read("SELECT key, value FROM meta", ())
    return sorted((row["key"], row["value"]) for row in rows if row["key"].partition(":")[0] not in _LOCAL_NOTES)


def _read_counters(database: Engine) -> dict[str, int]:
    """Return the greatest id that each table with generated ids has had."""
    counters = {}
    for table in COUNTED:
        counters[table] = int(database.read(f"SELECT COALESCE(max(id), 0) FROM {table}")[0][0])
    counters["events"] = max(counters["events"], database.read_latest_event())
    return counters


def _compute_checksum(read: Query) -> str:
    """Return a checksum over all rows that ignores their order, because engines sort text differently."""
    total = 0
    for table, key in TABLES.items():
        for rows in _read_pages(read, table, key):
            for row in rows:
                total += _compute_digest([table, sorted(dict(row).items())])
    total += sum(_compute_digest(["meta", note]) for note in _read_notes(read))
    return f"{total % 2**256:064x}"


def _compute_digest(value: Any) -> int:
    """Return the SHA-256 of the value's JSON as a whole number."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest(), "big")
