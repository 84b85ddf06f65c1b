# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""All live records at once: whose lease is over, how many there are, which changed.

For passes and metrics; work on one sandbox needs none of it.
"""

from __future__ import annotations

from .. import states
from ..model import Sandbox
from . import holders
from .records import LIVE, SELECT, Records, sound_sandbox


def over(records: Records, now: int) -> list[Sandbox]:
    """Live sandboxes whose lease is over."""
    rows = records.db.read_as(
        sound_sandbox, f"{SELECT} WHERE {LIVE} AND lease_expires_at <= ? ORDER BY lease_expires_at", now
    )
    return [sandbox for sandbox in rows if sandbox is not None and sandbox.expired(now)]


def next_lease_end(records: Records) -> int | None:
    """When the next lease is over (it may be so already), or None; from the index of live leases."""
    names = states.OPERATIONS["expire"].allowed
    rows = records.db.read(
        f"SELECT min(lease_expires_at) FROM sandboxes WHERE {LIVE} AND state IN ({', '.join('?' * len(names))})", *names
    )
    end = rows[0][0]
    # A text, which somebody wrote into the column, sorts behind every number.
    return end if isinstance(end, int) else None


def by_state(records: Records) -> dict[str, int]:
    """How many records there are in each state, from the indexes alone."""
    found = dict.fromkeys(states.STATES, 0)
    found.update(
        (row[0], row[1])
        for row in records.db.read(f"SELECT state, count(*) FROM sandboxes WHERE {LIVE} GROUP BY state")
    )
    found[states.DESTROYED] = records.db.read("SELECT count(*) FROM sandboxes WHERE state = 'DESTROYED'")[0][0]
    return found


def generations(records: Records) -> dict[str, int]:
    """UUID -> generation of each live sandbox: which of them were changed since they were read."""
    return dict(records.db.read_as(tuple, f"SELECT uuid, generation FROM sandboxes WHERE {LIVE}"))


def drop_dead_claims(records: Records) -> None:
    """Remove the claims of processes that are certainly dead; what they left in the journal stays."""
    dead = [
        row
        for row in records.db.read("SELECT sandbox_uuid, fence, process FROM claims")
        if holders.is_dead(row["process"])
    ]
    if dead:
        records.db.write(
            lambda conn: (
                conn.executemany(
                    "DELETE FROM claims WHERE sandbox_uuid = ? AND fence = ?",
                    [(row["sandbox_uuid"], row["fence"]) for row in dead],
                )
                and None
            )
        )
