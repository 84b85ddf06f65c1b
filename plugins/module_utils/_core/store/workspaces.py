# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The records of workspaces. The state is the journal: it is written before the request that it announces.

A workspace belongs to at most one sandbox. The run that moves it from DETACHED to ATTACHING owns it. From then on only
the holder of that sandbox's claim may continue.
"""

from __future__ import annotations

import contextlib
import json
import uuid as uuid_module
from dataclasses import dataclass
from typing import Any

from .. import clock as clock_module
from ..errors import DamagedRecord, InvalidInput, NotFound, RecordChanged
from .history import parse_json
from .port import Connection, Row
from .records import Claim, Records

CREATING = "CREATING"
DETACHED = "DETACHED"
ATTACHING = "ATTACHING"
ATTACHED = "ATTACHED"
DETACHING = "DETACHING"
DELETING = "DELETING"
DELETED = "DELETED"
STATES = (CREATING, DETACHED, ATTACHING, ATTACHED, DETACHING, DELETING, DELETED)
# States of an operation that has started and has to be finished.
UNFINISHED = (CREATING, ATTACHING, DETACHING, DELETING)
_LIVE = "state <> 'DELETED'"


@dataclass(slots=True)
class Workspace:
    """One record of a workspace; sizes are in bytes.

    ``volume`` is Proxmox's volume id, and ``owner_vmid`` the VMID in its name. ``node`` is None on shared storage.
    """

    id: str
    name: str
    state: str
    storage: str
    owner_vmid: int
    volume: str
    size: int
    generation: int = 0
    node: str | None = None
    sandbox_uuid: str | None = None
    slot: str | None = None
    lease_expires_at: int | None = None
    created_at: int = 0
    updated_at: int = 0
    state_changed_at: int = 0
    reason: str | None = None
    # Not columns: VMID and name of the sandbox that holds the workspace.
    vmid: int | None = None
    sandbox: str | None = None

    @property
    def live(self) -> bool:
        return self.state != DELETED

    @property
    def serial(self) -> str:
        """Return the disk's serial number in the guest. Proxmox allows 20 characters."""
        return f"agentlab-{self.id[:8]}"

    @property
    def title(self) -> str:
        return f"workspace {self.name!r}"

    def public(self) -> dict[str, Any]:
        """Return the workspace for answers. Missing values are null, times are UTC.

        ``device`` is the path of the disk in the guest.
        """
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state,
            "size": self.size,
            "storage": self.storage,
            "node": self.node,
            "volume": self.volume,
            "owner_vmid": self.owner_vmid,
            "vmid": self.vmid,
            "sandbox": self.sandbox,
            "sandbox_uuid": self.sandbox_uuid,
            "device": f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{self.serial}",
            "lease_expires_at": clock_module.format_utc(self.lease_expires_at),
            "created_at": clock_module.format_utc(self.created_at),
            "updated_at": clock_module.format_utc(self.updated_at),
            "state_changed_at": clock_module.format_utc(self.state_changed_at),
            "reason": self.reason,
        }


COLUMNS = tuple(name for name in Workspace.__dataclass_fields__ if name not in ("vmid", "sandbox"))
_SELECT = (
    f"SELECT {', '.join('w.' + name for name in COLUMNS)}, s.vmid, s.name AS sandbox FROM workspaces w "
    "LEFT JOIN sandboxes s ON s.uuid = w.sandbox_uuid"
)


_NUMBERS = ("size", "owner_vmid", "generation", "created_at", "updated_at", "state_changed_at")


def _read_sound(row: Row) -> Workspace:
    """Return the workspace in a row. Raises DamagedRecord, which names an invalid value."""
    for name in _NUMBERS:
        if not isinstance(row[name], int) or not 0 <= row[name] <= 2**53:
            raise DamagedRecord("workspaces", f"id {row['id']}", name, "a whole number")
    if row["lease_expires_at"] is not None and not isinstance(row["lease_expires_at"], int):
        raise DamagedRecord("workspaces", f"id {row['id']}", "lease_expires_at", "a time in seconds since 1970")
    if row["state"] not in STATES:
        raise DamagedRecord("workspaces", f"id {row['id']}", "state", f"a state ({', '.join(STATES)})")
    return Workspace(**dict(row))


class Workspaces:
    """Read and write workspaces in the database of the records."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._db = records.db

    # ---- reading ----

    def get(self, ident: str) -> Workspace:
        rows = self._read_rows("w.id = ?", ident)
        if not rows:
            raise NotFound("workspace not found", id=ident)
        return rows[0]

    def find(self, which: str) -> Workspace | None:
        """Return the live workspace with that name or id, or None."""
        rows = self._read_rows(f"(w.id = ? OR w.name = ?) AND w.{_LIVE} ORDER BY w.id = ? DESC", which, which, which)
        return rows[0] if rows else None

    def find_all(self, *, include_deleted: bool = False) -> list[Workspace]:
        where = "1 = 1" if include_deleted else f"w.{_LIVE}"
        workspaces = []
        for row in self._db.read(f"{_SELECT} WHERE {where} ORDER BY w.created_at"):
            with contextlib.suppress(DamagedRecord):
                workspaces.append(_read_sound(row))
        # PostgreSQL sorts text by the locale of its database, SQLite by code points.
        return sorted(workspaces, key=lambda workspace: str(workspace.name))

    def list_damage(self) -> list[DamagedRecord]:
        """Return the damage in the records of live workspaces."""
        errors = []
        for row in self._db.read(f"{_SELECT} WHERE w.{_LIVE}"):
            try:
                _read_sound(row)
            except DamagedRecord as error:
                errors.append(error)
        return errors

    def find_of_sandbox(self, sandbox_uuid: str) -> Workspace | None:
        """Return the sandbox's live workspace, or None. Raises DamagedRecord for a damaged row."""
        rows = self._read_rows(f"w.sandbox_uuid = ? AND w.{_LIVE}", sandbox_uuid)
        return rows[0] if rows else None

    def _read_rows(self, where: str, *values: Any) -> list[Workspace]:
        """Return the workspaces that the condition selects. Raises DamagedRecord for a damaged row."""
        # Do not skip a damaged row: its sandbox must not be destroyed as if it had no workspace.
        return [_read_sound(row) for row in self._db.read(f"{_SELECT} WHERE {where}", *values)]

    def read_events(self, ident: str, limit: int) -> list[dict[str, Any]]:
        """Return the newest ``limit`` events of a workspace, oldest first."""
        rows = self._db.read(
            "SELECT * FROM workspace_events WHERE workspace_id = ? ORDER BY id DESC LIMIT ?", ident, limit
        )
        return [
            dict(
                row,
                at=clock_module.format_utc(row["at"]) if isinstance(row["at"], int) else None,
                evidence=parse_json(row, "workspace_events", "evidence"),
                upids=parse_json(row, "workspace_events", "upids", list),
            )
            for row in rows
        ][::-1]

    # ---- writing ----

    def reserve(
        self,
        name: str,
        *,
        size: int,
        storage: str,
        node: str | None,
        owners: tuple[int, int],
        occupied: set[int],
        suffix: str,
        folder: bool,
    ) -> Workspace:
        """Write a CREATING record under an owner VMID of the range that is free and not in ``occupied``."""

        def work(conn: Connection) -> Workspace:
            now = self._records.clock.now()
            if conn.execute(f"SELECT 1 FROM workspaces WHERE name = ? AND {_LIVE}", (name,)).fetchone():
                raise RecordChanged(f"workspace {name!r} was created by another run meanwhile; run again")
            # Prefer an owner VMID that no record has, not even a deleted one. Otherwise a lost volume that reappears
            # could be taken for the volume of another workspace.
            used_vmids = {row["owner_vmid"] for row in conn.execute("SELECT owner_vmid FROM workspaces")}
            first, last = owners
            owner = next((n for n in range(first, last + 1) if n not in used_vmids and n not in occupied), None)
            if owner is None:
                live = {row["owner_vmid"] for row in conn.execute(f"SELECT owner_vmid FROM workspaces WHERE {_LIVE}")}
                owner = next((n for n in range(first, last + 1) if n not in live and n not in occupied), None)
            if owner is None:
                raise InvalidInput(
                    f"workspace_owner_range: all VMIDs of {first}-{last} are taken; remove workspaces, or configure a "
                    "larger range",
                    option="workspace_owner_range",
                    value=f"{first}-{last}",
                )
            ident = str(uuid_module.uuid4())
            file = f"vm-{owner}-ws-{ident}{suffix}"
            workspace = Workspace(
                ident,
                name,
                CREATING,
                storage,
                owner,
                f"{storage}:{owner}/{file}" if folder else f"{storage}:{file}",
                size,
                node=node,
                created_at=now,
                updated_at=now,
                state_changed_at=now,
                reason="requested",
            )
            conn.execute(
                f"INSERT INTO workspaces ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})",
                [getattr(workspace, column) for column in COLUMNS],
            )
            self._insert_event(
                conn,
                workspace,
                None,
                "create",
                outcome="decided",
                reason="requested",
                evidence={"volume": workspace.volume, "size": size},
            )
            return workspace

        return self._db.write(work)

    def change(
        self,
        workspace: Workspace,
        operation: str,
        *,
        to: str | None = None,
        claim: Claim | None = None,
        outcome: str = "done",
        reason: str | None = None,
        evidence: dict[str, Any] | None = None,
        upids: tuple[str, ...] = (),
        **values: Any,
    ) -> Workspace:
        """Write one step by compare-and-set on state and generation, with its event.

        ``claim``: the claim on the sandbox, which fences the write. Updates the sandbox's record in the same
        transaction. Raises RecordChanged when another run came first.
        """
        target = to or workspace.state

        def work(conn: Connection) -> Workspace:
            now = self._records.clock.now()
            new: dict[str, Any] = {**values, "updated_at": now, "reason": reason}
            if target != workspace.state:
                new.update(state=target, state_changed_at=now)
            names = ", ".join(f"{name} = ?" for name in new)
            try:
                update = conn.execute(
                    f"UPDATE workspaces SET {names}, generation = generation + 1 WHERE id = ? AND state = ? AND "
                    "generation = ?",
                    (*new.values(), workspace.id, workspace.state, workspace.generation),
                )
            except self._db.conflicts:
                raise RecordChanged(f"{workspace.title}: the sandbox has another workspace already") from None
            if update.rowcount != 1:
                raise RecordChanged(
                    f"{workspace.title} was changed by another run meanwhile; run again", id=workspace.id
                )
            after = Workspace(**dict(conn.execute(f"{_SELECT} WHERE w.id = ?", (workspace.id,)).fetchone()))
            self._insert_event(
                conn, after, workspace.state, operation, outcome=outcome, reason=reason, evidence=evidence, upids=upids
            )
            self._update_sandbox(conn, workspace, after, now)
            return after

        return self._records.run_fenced(claim, work) if claim is not None else self._db.write(work)

    def _update_sandbox(self, conn: Connection, before: Workspace, after: Workspace, now: int) -> None:
        """Write into the sandbox's record which workspace is attached to it."""
        for uuid in {before.sandbox_uuid, after.sandbox_uuid} - {None}:
            shown = after.id if after.sandbox_uuid == uuid and after.state in (ATTACHED, DETACHING) else None
            conn.execute(
                "UPDATE sandboxes SET workspace_id = ?, updated_at = ?, generation = generation + 1 "
                "WHERE uuid = ? AND COALESCE(workspace_id, '') <> ?",
                (shown, now, uuid, shown or ""),
            )

    def _insert_event(
        self,
        conn: Connection,
        workspace: Workspace,
        before: str | None,
        operation: str,
        *,
        outcome: str,
        reason: str | None = None,
        evidence: dict[str, Any] | None = None,
        upids: tuple[str, ...] = (),
    ) -> None:
        conn.execute(
            "INSERT INTO workspace_events (at, workspace_id, sandbox_uuid, from_state, to_state, operation, actor, "
            "reason, evidence, upids, outcome) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._records.clock.now(),
                workspace.id,
                workspace.sandbox_uuid,
                before,
                workspace.state,
                operation,
                self._records.actor,
                reason,
                json.dumps(evidence or {}),
                json.dumps(list(upids)),
                outcome,
            ),
        )
