# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The journal of commands in sandboxes. A run is written before its command is sent, and closed with its event."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import DamagedRecord, InvalidInput, NotFound
from ..model import Sandbox
from .port import Connection, Row
from .records import Records

# The command may have started; nothing more is known.
SENT = "sent"
RUNNING = "running"
ENDED = "ended"
# The command certainly did not start.
REFUSED = "refused"
# The command started, and its result can no longer be known.
LOST = "lost"
STATES = (SENT, RUNNING, ENDED, REFUSED, LOST)
_SELECT = (
    "SELECT id, sandbox_uuid, state, fingerprint, program, actor, detached, acked, started_at, updated_at, detail "
    "FROM runs"
)
# Number of results whose deletion in the guest is requested along with the next request.
_MOST_ACKS = 40
# The detail of a run that was sent, and that a second caller asked for.
_SHARED = '{"shared": true}'
# Seconds for which a guest without room is not asked again to keep files.
_FULL_SECONDS = 3600


@dataclass(slots=True)
class Run:
    """One command. Times are whole seconds since the epoch. ``detail`` holds what is known of the end."""

    id: str
    sandbox_uuid: str
    state: str
    fingerprint: str
    program: str
    actor: str
    detached: bool
    acked: bool
    started_at: int
    updated_at: int
    detail: dict[str, Any] = field(default_factory=dict)
    # True when this call wrote the row, or took a refused one. Then no earlier request can have started the command.
    is_new: bool = False


def _read_run(row: Row) -> Run:
    """Return the run in a row. Raises DamagedRecord for an invalid value."""
    values = tuple(row)
    try:
        detail = json.loads(values[10])
    except (ValueError, TypeError):
        detail = None
    if not isinstance(detail, dict) or not isinstance(values[8], int) or values[2] not in STATES:
        raise DamagedRecord("runs", f"id {values[0]}", "detail, started_at or state", "what this program wrote there")
    run = Run(*values[:10])
    run.detail = detail
    run.detached, run.acked = bool(run.detached), bool(run.acked)
    return run


def begin(
    records: Records, sandbox: Sandbox, run_id: str, *, fingerprint: str, program: str, detached: bool
) -> tuple[Run, list[str]]:
    """Write a run to the journal before it is sent. Returns it, and the ids of results that the guest may delete.

    A known run with that id is returned unchanged. Raises InvalidInput when it belongs to another sandbox or command.
    """

    def work(conn: Connection) -> tuple[Run, list[str]]:
        now = records.clock.now()
        row = conn.execute(f"{_SELECT} WHERE id = ?", (run_id,)).fetchone()
        if row is not None:
            run = _read_run(row)
            if run.sandbox_uuid != sandbox.uuid or run.fingerprint != fingerprint:
                raise InvalidInput(
                    f"run_id: {run_id} belongs to another command or sandbox; leave it out, or give a new one",
                    option="run_id",
                    value=run_id,
                )
            if run.state == REFUSED:
                conn.execute(
                    "UPDATE runs SET state = ?, started_at = ?, updated_at = ?, detail = '{}' WHERE id = ?",
                    (SENT, now, now, run_id),
                )
                run.state, run.started_at, run.detail, run.is_new = SENT, now, {}, True
            elif run.state == SENT:
                conn.execute("UPDATE runs SET detail = ? WHERE id = ?", (_SHARED, run_id))
        else:
            run = Run(
                run_id, sandbox.uuid, SENT, fingerprint, program, records.actor, detached, False, now, now, {}, True
            )
            conn.execute(
                "INSERT INTO runs (id, sandbox_uuid, state, fingerprint, program, actor, detached, started_at, "
                "updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (run_id, sandbox.uuid, SENT, fingerprint, program, records.actor, int(detached), now, now),
            )
        acks = conn.execute(
            "SELECT id FROM runs WHERE sandbox_uuid = ? AND state = ? AND acked = 0 AND detached = 0 AND id <> ? "
            "ORDER BY started_at LIMIT ?",
            (sandbox.uuid, ENDED, run_id, _MOST_ACKS),
        ).fetchall()
        return run, [row["id"] for row in acks]

    return records.db.write(work)


def get(records: Records, sandbox: Sandbox, run_id: str) -> Run:
    """Return a run of a sandbox. Raises NotFound when the journal has no run with that id."""
    rows = records.db.read(f"{_SELECT} WHERE id = ? AND sandbox_uuid = ?", run_id, sandbox.uuid)
    if not rows:
        raise NotFound(
            f"run not found (run_id: {run_id}, sandbox {sandbox.vmid}). 'agentlab sandbox exec list {sandbox.vmid}' "
            f"and GET /v1/sandboxes/{sandbox.vmid}/exec show the runs of that sandbox",
            run_id=run_id,
        )
    return _read_run(rows[0])


def list_runs(records: Records, sandbox: Sandbox, limit: int = 1000) -> list[Run]:
    """Return the newest ``limit`` runs of a sandbox, oldest first."""
    rows = records.db.read(
        f"{_SELECT} WHERE sandbox_uuid = ? ORDER BY started_at DESC, id LIMIT ?", sandbox.uuid, limit
    )
    return [_read_run(row) for row in rows][::-1]


def read_guest_memory(
    records: Records, sandbox: Sandbox, kind: str, limit: int = 200
) -> tuple[set[str], float | None, bool]:
    """Return what the newest ``limit`` runs tell about a sandbox's guest.

    That is: the names of the files that it keeps; the shortest time in seconds that one of the last three runs of this
    kind took (None: there was none); and whether it has room for files, as far as is known.
    """
    names: set[str] = set()
    times: list[float] = []
    has_room = True
    rows = records.db.read(
        "SELECT detail, started_at FROM runs WHERE sandbox_uuid = ? AND state = ? ORDER BY started_at DESC, id LIMIT ?",
        sandbox.uuid,
        ENDED,
        limit,
    )
    for row in rows:
        try:
            detail = json.loads(row["detail"])
            if detail.get("full"):
                # The guest has removed the files that it kept. ``names`` already has the files of later runs.
                has_room = records.clock.now() - int(row["started_at"]) > _FULL_SECONDS
                break
            names.update(str(name) for name in detail.get("kept", ()))
            if detail.get("kind") == kind and len(times) < 3:
                times.append(float(detail["duration_ms"]) / 1000)
        except (ValueError, TypeError, AttributeError, KeyError):
            # Ignore a damaged row here: it costs one more transfer. A request for that run reports the damage.
            continue
    return names, min(times, default=None), has_room


def set_state(records: Records, run: Run, state: str) -> None:
    """Store the state of a run. A stored end stays."""

    def work(conn: Connection) -> None:
        conn.execute(
            "UPDATE runs SET state = ?, updated_at = ? WHERE id = ? AND state IN (?, ?)",
            (state, records.clock.now(), run.id, SENT, RUNNING),
        )

    records.db.write(work, checked=True)
    run.state = state


def finish(
    records: Records,
    sandbox: Sandbox,
    run: Run,
    state: str,
    *,
    detail: dict[str, Any],
    evidence: dict[str, Any],
    outcome: str,
    reason: str | None = None,
    duration_ms: int | None = None,
    acks: list[str] | None = None,
) -> None:
    """Close a run with its event, in one transaction, and update ``run``.

    ``acks`` are the results that the guest has been told to delete. Several callers may wait for one run: the first
    stored end stays, with one event. Only a result reported by the guest replaces an end without a result.
    """
    replaced: tuple[str, ...] = (SENT, RUNNING, REFUSED, LOST) if state == ENDED else (SENT, RUNNING)
    only = ""
    if state == REFUSED:
        # A refused run starts again when its id is used again. So a run that has ended, or that another caller may
        # have started, must not become REFUSED.
        replaced, only = (SENT,), f"AND detail <> '{_SHARED}'"

    def work(conn: Connection) -> Run | None:
        if acks:
            conn.execute(f"UPDATE runs SET acked = 1 WHERE id IN ({', '.join('?' * len(acks))})", acks)
        closed = conn.execute(
            f"UPDATE runs SET state = ?, detail = ?, updated_at = ? WHERE id = ? AND state IN "
            f"({', '.join('?' * len(replaced))}) {only}",
            (state, json.dumps(detail), records.clock.now(), run.id, *replaced),
        )
        if closed.rowcount != 1:
            row = conn.execute(f"{_SELECT} WHERE id = ?", (run.id,)).fetchone()
            return None if row is None else _read_run(row)
        records.write_event(
            conn, sandbox, "exec", outcome=outcome, reason=reason, evidence=evidence, duration_ms=duration_ms
        )
        return None

    written = records.db.write(work)
    run.state, run.detail = (state, detail) if written is None else (written.state, written.detail)
