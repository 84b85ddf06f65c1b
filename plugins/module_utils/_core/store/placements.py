# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep reservations: the memory and disk of new sandboxes that Proxmox VE's figures do not show yet.

All controllers share them. A reservation exists from the decision on. It counts in full during the creation, and then
as a young sandbox. It ends when the sandbox fails or is gone, when the run that made it is dead, or when it is old.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .. import states
from ..placement import Load, Reservation
from .port import Connection
from .records import LIVE, Records

# States in which the VM may still be taking up its memory.
_RUNNING = (states.READY, states.RUNNING, states.COMPLETED)
# VMIDs in one query: SQLite guarantees only 999 variables.
_CHUNK = 500


def find_own_vmids(records: Records, vmids: Collection[int]) -> set[int]:
    """Return those VMIDs that belong to live sandboxes of these records."""
    sorted_vmids = sorted(vmids)
    own_vmids: set[int] = set()
    for first in range(0, len(sorted_vmids), _CHUNK):
        part = sorted_vmids[first : first + _CHUNK]
        marks = ", ".join("?" * len(part))
        own_vmids.update(
            row["vmid"]
            for row in records.db.read(f"SELECT vmid FROM sandboxes WHERE {LIVE} AND vmid IN ({marks})", *part)
        )
    return own_vmids


def read_load(
    records: Records, settle: int, affinity: str | None = None, profile: str | None = None, tags: Iterable[str] = ()
) -> Load:
    """Return the number of sandboxes on each node, and the reservations that count now.
    ``settle`` is in seconds. ``affinity``, ``profile`` and ``tags`` select the sandboxes that anti-affinity counts.
    """
    return _query_load(records, records.db.read, settle, affinity, profile, frozenset(tags))


def prepare_reservation(
    records: Records,
    settle: int,
    affinity: str | None,
    profile: str | None,
    tags: Iterable[str],
    decide: Callable[[Load], Reservation],
) -> Callable[[Connection], Callable[[Connection, str], None]]:
    """Return a function that decides within the transaction of a new record.

    It takes the connection, and returns the function that writes the reservation (given connection and sandbox UUID).
    An engine has one writer at a time, so the creations of all controllers decide one after the other, and each
    decision sees the reservations of the earlier ones.
    """
    wanted_tags = frozenset(tags)

    def work(conn: Connection) -> Callable[[Connection, str], None]:
        load = _query_load(
            records,
            lambda query, *values: conn.execute(query, values).fetchall(),
            settle,
            affinity,
            profile,
            wanted_tags,
        )
        reservation = decide(load)

        def write(conn: Connection, uuid: str) -> None:
            now = records.clock.now()
            conn.execute("DELETE FROM placements WHERE at < ?", (now - settle - records.claim_seconds,))
            conn.execute(
                "INSERT INTO placements (sandbox_uuid, memory, storage, disk, at) VALUES (?, ?, ?, ?, ?)",
                (uuid, reservation.memory, reservation.storage, reservation.disk, now),
            )

        return write

    return work


def _query_load(
    records: Records,
    read: Callable[..., Iterable[Any]],
    settle: int,
    affinity: str | None,
    profile: str | None,
    tags: frozenset[str],
) -> Load:
    """Return the load, read with ``read`` (query, values) on the caller's connection."""
    now = records.clock.now()

    def ask(query: str, values: Sequence[Any]) -> list[Any]:
        # Read on the transaction's own connection. If only a second connection were lost, the transaction would not be
        # retried.
        return list(read(query, *values))

    sandboxes = {
        str(row["node"]): int(row["number"])
        for row in read(f"SELECT node, count(*) AS number FROM sandboxes WHERE {LIVE} GROUP BY node")
    }
    rows = read(
        "SELECT s.vmid, s.node, s.state, p.memory, p.storage, p.disk, p.at, c.sandbox_uuid, c.fence, c.process, "
        "c.expires_at FROM placements p JOIN sandboxes s ON s.uuid = p.sandbox_uuid "
        "LEFT JOIN claims c ON c.sandbox_uuid = p.sandbox_uuid WHERE p.at > ? AND s.state <> 'DESTROYED'",
        now - settle - records.claim_seconds,
    )
    reservations = []
    for row in rows:
        creating = row["state"] in states.CREATING
        young = row["at"] > now - settle
        if creating:
            counts = young if row["process"] is None else not records.is_holder_gone(row, ask)
        else:
            counts = young and row["state"] in _RUNNING
        if counts:
            reservations.append(
                Reservation(
                    row["vmid"], str(row["node"]), int(row["memory"]), row["storage"], int(row["disk"]), creating
                )
            )
    return Load(sandboxes, _count_same_kind(read, affinity, profile, tags), tuple(reservations))


def _count_same_kind(
    read: Callable[..., Iterable[Any]], affinity: str | None, profile: str | None, tags: frozenset[str]
) -> dict[str, int]:
    """Return how many sandboxes of the same kind each node has; empty without anti-affinity."""
    counts: dict[str, int] = {}
    if affinity == "profile" and profile is not None:
        rows = read(
            f"SELECT node, count(*) AS number FROM sandboxes WHERE {LIVE} AND profile = ? GROUP BY node", profile
        )
        counts = {str(row["node"]): int(row["number"]) for row in rows}
    elif affinity == "tag" and tags:
        import json

        for row in read(f"SELECT node, tags FROM sandboxes WHERE {LIVE} AND tags <> '[]'"):
            try:
                same = tags.intersection(json.loads(row["tags"]))
            except (ValueError, TypeError):
                continue
            if same:
                counts[str(row["node"])] = counts.get(str(row["node"]), 0) + 1
    return counts
