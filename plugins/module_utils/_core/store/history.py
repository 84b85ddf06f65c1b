# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the events of sandboxes, and apply the retention of destroyed records."""

from __future__ import annotations

import json
from typing import Any

from .port import Connection, Engine, Row
from .records import Records


def read_events(
    database: Engine,
    *,
    uuid: str | None = None,
    vmid: int | None = None,
    after: int = 0,
    tail: int | None = None,
    limit: int = 1000,
) -> list[dict[str, Any]]:
    """Return events, oldest first: of one sandbox, of every sandbox that a VMID has had, or of all sandboxes."""
    where, value = (
        ("sandbox_uuid = ?", uuid) if uuid is not None else ("vmid = ?", vmid) if vmid is not None else ("1 = ?", 1)
    )
    count = limit if tail is None else min(tail, limit)
    order = "DESC" if tail is not None else "ASC"
    rows = database.read(
        f"SELECT * FROM events WHERE {where} AND id > ? ORDER BY id {order} LIMIT ?", value, after, count
    )
    selected = [
        dict(
            row,
            at=row["at"] if isinstance(row["at"], int) else None,
            evidence=parse_json(row, "events", "evidence"),
            upids=parse_json(row, "events", "upids", list),
        )
        for row in rows
    ]
    return selected[::-1] if tail is not None else selected


def read_owners(database: Engine) -> dict[str, str]:
    """Return the creator of each live sandbox, as {UUID: actor of its first event ``create``}."""
    rows = database.read(
        "SELECT s.uuid, e.actor FROM sandboxes s JOIN events e ON e.id = "
        "(SELECT min(id) FROM events WHERE sandbox_uuid = s.uuid AND operation = 'create') WHERE s.state <> 'DESTROYED'"
    )
    return {row["uuid"]: str(row["actor"]) for row in rows}


def parse_json(row: Row, table: str, column: str, kind: type = dict) -> Any:
    """Return the parsed JSON of a column. For damaged JSON return {"damaged": text}, or [] where a list is expected."""
    try:
        value = json.loads(row[column])
    except (ValueError, TypeError):
        value = None
    if isinstance(value, kind):
        return value
    return {"damaged": f"{table}.{column} of id {row['id']} is not JSON"} if kind is dict else []


def read_evidence(database: Engine, uuid: str, reasons: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the evidence of a sandbox's events with one of these reasons, oldest first."""
    places = ", ".join("?" for _reason in reasons)
    rows = database.read(
        f"SELECT id, evidence FROM events WHERE sandbox_uuid = ? AND reason IN ({places}) ORDER BY id", uuid, *reasons
    )
    return [parse_json(row, "events", "evidence") for row in rows]


def count_forgettable(records: Records, older_than: int) -> int:
    """Return how many records ``forget`` would remove. ``older_than`` is in seconds."""
    count: int = records.db.read(
        "SELECT count(*) FROM sandboxes WHERE state = 'DESTROYED' AND state_changed_at < ?",
        records.clock.now() - older_than,
    )[0][0]
    return count


def forget(records: Records, older_than: int, most: int = 2**62) -> int:
    """Remove DESTROYED records and their events that are older than ``older_than`` seconds, at most ``most`` records.

    Returns how many records were removed.
    """
    limit = records.clock.now() - older_than

    def work(conn: Connection) -> int:
        return conn.execute(
            "DELETE FROM sandboxes WHERE uuid IN (SELECT uuid FROM sandboxes WHERE state = 'DESTROYED' AND "
            "state_changed_at < ? ORDER BY state_changed_at LIMIT ?)",
            (limit, most),
        ).rowcount

    return records.db.write(work)
