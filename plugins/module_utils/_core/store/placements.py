# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What new sandboxes take on their nodes before Proxmox VE's figures show it: reservations that controllers share.

A reservation stands beside its sandbox from the decision on. It counts in full while the creation is under way, and
as a young sandbox afterwards. It counts no more when the sandbox failed or is gone, when the run that made it is dead,
or when it is old.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .. import states
from ..placement import Load, Reservation
from .port import Connection
from .records import LIVE, Records

# States in which the VM may take up its memory.
_RUNNING = (states.READY, states.RUNNING, states.COMPLETED)
# So many VMIDs in one query; SQLite takes 999 variables at the least.
_CHUNK = 500


def own(records: Records, vmids: Collection[int]) -> set[int]:
    """Return those of the VMIDs that belong to live sandboxes of these records."""
    wanted = sorted(vmids)
    found: set[int] = set()
    for first in range(0, len(wanted), _CHUNK):
        part = wanted[first : first + _CHUNK]
        marks = ", ".join("?" * len(part))
        found.update(
            row["vmid"]
            for row in records.db.read(f"SELECT vmid FROM sandboxes WHERE {LIVE} AND vmid IN ({marks})", *part)
        )
    return found


def read_load(
    records: Records, settle: int, affinity: str | None = None, profile: str | None = None, tags: Iterable[str] = ()
) -> Load:
    """Return what the records know of each node. ``settle`` in seconds; the rest chooses what anti-affinity counts."""
    return _load(records, records.db.read, settle, affinity, profile, frozenset(tags))


def reserve(
    records: Records,
    settle: int,
    affinity: str | None,
    profile: str | None,
    tags: Iterable[str],
    decide: Callable[[Load], Reservation],
) -> Callable[[Connection], Callable[[Connection, str], None]]:
    """Return what decides within the transaction of a new record: it takes the connection, and returns what then writes
    the reservation, which takes the connection and the sandbox's UUID.

    An engine has one writer at a time. So the creations of all controllers decide one after the other, each with the
    reservations of those before it.
    """
    wanted_tags = frozenset(tags)

    def work(conn: Connection) -> Callable[[Connection, str], None]:
        load = _load(
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


def _load(
    records: Records,
    read: Callable[..., Iterable[Any]],
    settle: int,
    affinity: str | None,
    profile: str | None,
    tags: frozenset[str],
) -> Load:
    now = records.clock.now()

    def ask(query: str, values: Sequence[Any]) -> list[Any]:
        # Within a transaction another connection must not be asked: when only that one is lost, nothing is repeated.
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
            counts = young if row["process"] is None else not records._given_up(row, ask)
        else:
            counts = young and row["state"] in _RUNNING
        if counts:
            reservations.append(
                Reservation(
                    row["vmid"], str(row["node"]), int(row["memory"]), row["storage"], int(row["disk"]), creating
                )
            )
    return Load(sandboxes, _same(read, affinity, profile, tags), tuple(reservations))


def _same(
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
