# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read all live records at once: expired leases, counts, changes since an earlier read.

Passes and metrics use this. Work on a single sandbox does not.
"""

from __future__ import annotations

from .. import states
from ..model import Sandbox
from .port import Connection
from .records import LIVE, SELECT, Records, read_sound_sandbox


def list_expired(records: Records, now: int) -> list[Sandbox]:
    """Return the live sandboxes whose lease is over. ``now`` is in seconds since the epoch."""
    rows = records.db.read_as(
        read_sound_sandbox, f"{SELECT} WHERE {LIVE} AND lease_expires_at <= ? ORDER BY lease_expires_at", now
    )
    return [sandbox for sandbox in rows if sandbox is not None and sandbox.has_expired(now)]


def read_next_lease_end(records: Records) -> int | None:
    """Return when the next lease ends, in seconds since the epoch (possibly in the past); None without live leases."""
    names = states.OPERATIONS["expire"].allowed
    rows = records.db.read(
        f"SELECT min(lease_expires_at) FROM sandboxes WHERE {LIVE} AND state IN ({', '.join('?' * len(names))})", *names
    )
    end = rows[0][0]
    # SQLite sorts text behind every number. Text can only be there if a person wrote it.
    return end if isinstance(end, int) else None


def count_by_state(records: Records) -> dict[str, int]:
    """Return the number of records in each state. Reads only indexes."""
    counts = dict.fromkeys(states.STATES, 0)
    counts.update(
        (row[0], row[1])
        for row in records.db.read(f"SELECT state, count(*) FROM sandboxes WHERE {LIVE} GROUP BY state")
    )
    counts[states.DESTROYED] = records.db.read("SELECT count(*) FROM sandboxes WHERE state = 'DESTROYED'")[0][0]
    return counts


def read_generations(records: Records) -> dict[str, int]:
    """Return the generation of each live sandbox by UUID. A changed generation shows a write since an earlier read."""
    return dict(records.db.read_as(tuple, f"SELECT uuid, generation FROM sandboxes WHERE {LIVE}"))


def list_waiting_for_snippet(records: Records, host: str) -> list[Sandbox]:
    """Return the live sandboxes whose snippet on that host keeps their record open.

    A killed run left the snippet, or a run on another host could not remove the file. Only that host can close the
    record.
    """
    rows = records.db.read_as(
        read_sound_sandbox, f"{SELECT} WHERE {LIVE} AND snippet IS NOT NULL AND snippet_host = ? ORDER BY vmid", host
    )
    sandboxes = [sandbox for sandbox in rows if sandbox is not None]
    if not sandboxes:
        return []
    kept = "SELECT 1 FROM events WHERE sandbox_uuid = ? AND reason = 'snippet' AND outcome = 'kept' LIMIT 1"
    interrupted = {entry.sandbox_uuid for entry in records.list_interrupted()}
    return [sandbox for sandbox in sandboxes if sandbox.uuid in interrupted or records.db.read(kept, sandbox.uuid)]


def drop_dead_claims(records: Records) -> None:
    """Remove the claims of holders that are gone: dead processes, ended heartbeats. Their journal entries stay.

    On PostgreSQL a claim with a journal entry stays too (``Records.list_abandoned_claims``).
    """
    if not records.list_abandoned_claims():
        return

    def work(conn: Connection) -> None:
        # Check the holders again: a holder that was cut off may have come back while this write waited for its turn.
        dead = records.list_abandoned_claims(lambda sql, values: conn.execute(sql, values).fetchall())
        if dead:
            conn.executemany("DELETE FROM claims WHERE sandbox_uuid = ? AND fence = ?", dead)

    records.db.write(work)
