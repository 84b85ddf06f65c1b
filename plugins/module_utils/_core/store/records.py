# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The records: sandboxes, their events, the claims on them and the journal of what is under way.

Every change of state is a compare-and-set on state and generation, in the same transaction as its event. Every write of
an operation is fenced by its claim: a run that lost its claim cannot write any more.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import states
from ..clock import Clock
from ..errors import Busy, ClaimLost, DamagedRecord, InvalidInput, Kept, NotFound, RecordChanged, Stopping, StoreError
from ..model import COLUMNS, Sandbox
from . import holders
from .port import Connection, Engine, Row

T = TypeVar("T")

# At the least; every journal entry extends a claim. Between two of them lie at most six waits (a creation: resize,
# three tries to start, the HA manager, the guest agent), and some requests.
CLAIM_SECONDS = 3600
_WAITS = 8
# Digits of the largest number that SQLite counts to.
_LONGEST_FENCE = len(str(2**63 - 1))
# Phases of a destroy after which the VM may already be gone.
POINT_OF_NO_RETURN = ("deleting", "waiting")
# The phase of a creation that ended waiting, and that its next run goes on with.
AWAITED = "awaited"
# From the first of these on it is too late to protect a sandbox; a destroy that was cut off in it is still judged anew
# by the rules.
_TOO_LATE_TO_PROTECT = ("detaching", *POINT_OF_NO_RETURN)
LIVE = "state <> 'DESTROYED'"
SELECT = f"SELECT {', '.join(COLUMNS)} FROM sandboxes"
# Notes in the table meta, and what raises ValueError, TypeError or KeyError for one that is damaged.
_NOTES: dict[str, Callable[[str], object]] = {
    "clock": lambda text: float(json.loads(text)["offset"]),
    "cleanup_frozen": lambda text: json.loads(text)["reason"],
    "cleanup_last_run": int,
    "cluster": lambda text: json.loads(text)["authority"],
    "last_vmid": int,
}
# What a journal entry's detail holds that is worked with, and of which type; an entry without the key is sound.
_DETAIL_KINDS: dict[str, tuple[type, str]] = {
    "upid": (str, "a text"),
    "phase": (str, "a text"),
    "template_node": (str, "a text"),
    "disk_size": (str, "a text"),
    "since": (int, "a whole number"),
    "at": (int, "a whole number"),
    "create": (dict, "an object"),
}
DATABASE_ID = re.compile(r"[0-9a-f]{32}")
# Claims (sandbox, fence) that this process was done with and could not give back: nobody here waits for them.
_unreturned: set[tuple[str, int]] = set()
# Per thread, the claims that it holds on records with heartbeats: they are confirmed before each change in Proxmox.
_held = threading.local()


@dataclass(slots=True)
class Claim:
    """The right to work on one sandbox. ``interrupted`` is the journal entry a killed run left behind, if any."""

    uuid: str
    fence: int
    operation: str
    interrupted: JournalEntry | None = None
    # Whether its holder before had died.
    taken_over: bool = False


@dataclass(slots=True)
class JournalEntry:
    """A journal entry: what is under way on a sandbox, and how far it has come."""

    sandbox_uuid: str
    kind: str
    phase: str
    detail: dict[str, Any]
    actor: str
    started_at: int
    updated_at: int

    @classmethod
    def from_row(cls, row: Row) -> JournalEntry:
        """Return the entry of a row of the table operations; DamagedRecord names a value that cannot be one."""
        try:
            detail = json.loads(row["detail"])
        except (ValueError, TypeError):
            detail = None
        wrong: str | None = None if isinstance(detail, dict) else "a JSON object"
        wrong = wrong or _wrong_detail(detail) or _wrong_detail(detail.get("create") or {})
        if wrong:
            raise DamagedRecord("operations", f"sandbox_uuid {row['sandbox_uuid']}", "detail", wrong)
        for name in ("started_at", "updated_at"):
            if not isinstance(row[name], int):
                raise DamagedRecord("operations", f"sandbox_uuid {row['sandbox_uuid']}", name, "a whole number")
        return cls(
            row["sandbox_uuid"], row["kind"], row["phase"], detail, row["actor"], row["started_at"], row["updated_at"]
        )


def _wrong_detail(detail: dict[str, Any]) -> str | None:
    """Return what a journal entry's detail would have to be, or None for one that is sound."""
    for name, (kind, valid) in _DETAIL_KINDS.items():
        if name in detail and (detail[name] is not None or kind is int) and not isinstance(detail[name], kind):
            return f"a JSON object whose {name} is {valid}"
    return None


def sound_sandbox(row: Row) -> Sandbox | None:
    """Return the record of a row, or None for a damaged one.

    A list goes on with the other rows; ``Records.damage`` names the damaged ones.
    """
    try:
        return Sandbox.from_row(row)
    except DamagedRecord:
        return None


def sound_operations(rows: Iterable[Row]) -> list[JournalEntry]:
    """Return the journal entries of these rows, without the damaged ones."""
    entries = []
    for row in rows:
        try:
            entries.append(JournalEntry.from_row(row))
        except DamagedRecord:
            continue
    return entries


def _json(value: list[Any] | dict[str, Any]) -> str:
    """Most are empty, and a bulk run writes thousands."""
    return json.dumps(value) if value else "{}" if isinstance(value, dict) else "[]"


@functools.lru_cache(64)
def _update(names: tuple[str, ...]) -> str:
    return (
        f"UPDATE sandboxes SET {' = ?, '.join(names)} = ?, generation = generation + 1 "
        "WHERE uuid = ? AND state = ? AND generation = ?"
    )


class Records:
    """Reads and writes of records on one database."""

    def __init__(
        self,
        database: Engine,
        clock: Clock,
        actor: str,
        longest_wait: int = 0,
        stopping: threading.Event | None = None,
    ) -> None:
        self.claim_seconds = max(CLAIM_SECONDS, _WAITS * longest_wait)
        self.db = database
        self.clock = clock
        self.actor = actor
        self._process = holders.identity()
        if database.controller is not None:
            self._process = f'{self._process[:-1]}, "controller": "{database.controller}"}}'
        self._stopping = stopping

    # ---- reading ----

    def get(self, uuid: str) -> Sandbox:
        rows = self.db.read(f"{SELECT} WHERE uuid = ?", uuid)
        if not rows:
            raise NotFound("sandbox not found", uuid=uuid)
        return Sandbox.from_row(rows[0])

    def live_by_vmid(self, vmid: int) -> Sandbox | None:
        rows = self.db.read(f"{SELECT} WHERE vmid = ? AND {LIVE}", vmid)
        return Sandbox.from_row(rows[0]) if rows else None

    def live_by_name(self, name: str) -> Sandbox | None:
        rows = self.db.read(f"{SELECT} WHERE name = ? AND {LIVE}", name)
        return Sandbox.from_row(rows[0]) if rows else None

    def last_by_vmid(self, vmid: int) -> Sandbox | None:
        """The live record of that VMID, or else the newest destroyed one."""
        live = self.live_by_vmid(vmid)
        if live:
            return live
        rows = self.db.read(
            f"{SELECT} WHERE vmid = ? AND state = 'DESTROYED' ORDER BY state_changed_at DESC, created_at DESC LIMIT 1",
            vmid,
        )
        return Sandbox.from_row(rows[0]) if rows else None

    def last_by_name(self, name: str) -> Sandbox | None:
        live = self.live_by_name(name)
        if live:
            return live
        rows = self.db.read(
            f"{SELECT} WHERE name = ? AND state = 'DESTROYED' ORDER BY state_changed_at DESC LIMIT 1", name
        )
        return Sandbox.from_row(rows[0]) if rows else None

    def find_all(self, wanted: Iterable[str] | None = None, *, include_destroyed: bool = False) -> list[Sandbox]:
        """Sandboxes in the order of their VMIDs; the live ones unless asked otherwise."""
        names = list(wanted) if wanted is not None else None
        where, values = ("1 = 1", []) if include_destroyed else (LIVE, [])
        if names is not None:
            where += f" AND state IN ({', '.join('?' * len(names))})"
            values = list(names)
        rows = self.db.read_as(sound_sandbox, f"{SELECT} WHERE {where} ORDER BY vmid, created_at", *values)
        if None not in rows:
            return rows  # type: ignore[return-value]
        return [sandbox for sandbox in rows if sandbox is not None]

    def damage(self) -> list[DamagedRecord]:
        """Return what is damaged in live records, in the journal and in the notes about all of them."""
        errors: list[DamagedRecord] = []
        for make, query in (
            (Sandbox.from_row, f"{SELECT} WHERE {LIVE}"),
            (JournalEntry.from_row, "SELECT * FROM operations"),
        ):

            def judge(row: Row, make: Callable[[Row], object] = make) -> None:
                try:
                    make(row)
                except DamagedRecord as error:
                    errors.append(error)

            self.db.read_as(judge, query)
        for row in self.db.read(
            "SELECT id FROM operations WHERE sandbox_uuid NOT IN (SELECT uuid FROM sandboxes) ORDER BY id"
        ):
            errors.append(DamagedRecord("operations", f"id {row['id']}", "sandbox_uuid", "the uuid of a sandbox"))
        for key, check in _NOTES.items():
            for row in self.db.read("SELECT key, value FROM meta WHERE key = ? OR key LIKE ?", key, f"{key}:%"):
                try:
                    check(row["value"])
                except (ValueError, TypeError, KeyError):
                    errors.append(DamagedRecord("meta", f"key {row['key']}", "value", "what this program wrote there"))
        return errors

    def unfinished(self) -> tuple[list[JournalEntry], list[JournalEntry]]:
        """The journal: what is under way, and what was interrupted."""
        stale = {one.sandbox_uuid: one for one in self.interrupted()}
        rows = self.db.read("SELECT * FROM operations ORDER BY id")
        return sound_operations(row for row in rows if row["sandbox_uuid"] not in stale), list(stale.values())

    def under_way(self, uuid: str) -> JournalEntry | None:
        """The journal entry of a sandbox, if an operation on it is unfinished."""
        rows = self.db.read("SELECT * FROM operations WHERE sandbox_uuid = ?", uuid)
        return JournalEntry.from_row(rows[0]) if rows else None

    def is_worked_on(self, uuid: str) -> bool:
        """Return whether a sandbox has a journal entry or a claim, alive or not."""
        query = "SELECT 1 FROM operations WHERE sandbox_uuid = ? UNION SELECT 1 FROM claims WHERE sandbox_uuid = ?"
        return bool(self.db.read(query, uuid, uuid))

    def interrupted(self) -> list[JournalEntry]:
        """Journal entries whose run is dead or whose claim is gone: what the next run has to finish."""
        rows = self.db.read(
            "SELECT o.*, c.fence, c.process, c.expires_at FROM operations o "
            "LEFT JOIN claims c USING (sandbox_uuid) ORDER BY o.id"
        )
        return sound_operations(row for row in rows if row["process"] is None or self._given_up(row))

    def interrupted_sandboxes(self) -> list[tuple[JournalEntry, Sandbox]]:
        """Return what the next run has to finish, with its sandbox; ``damage`` names those whose row is not sound."""
        pairs = []
        for entry in self.interrupted():
            with contextlib.suppress(DamagedRecord, NotFound):
                pairs.append((entry, self.get(entry.sandbox_uuid)))
        return pairs

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        return self.db.read(sql, *values)

    def _given_up(self, claim: Row, read: Callable[[str, Sequence[Any]], list[Any]] | None = None) -> bool:
        """Return whether the holder of a claim is gone.

        ``read`` asks inside a transaction; without it any connection is used.
        """
        return (
            (claim["sandbox_uuid"], claim["fence"]) in _unreturned
            or holders.is_over(claim["process"], claim["expires_at"], self.clock.now(), self.clock.since_boot())
            or holders.is_dead(claim["process"])
            or self.db.is_abandoned(claim["process"], read or self._read)
        )

    def _claim_holder(self) -> str:
        """Return which process holds a claim, when it said so, and until when by the time since boot (JSON)."""
        until = float(self.clock.since_boot() + self.claim_seconds)
        return f'{self._process[:-1]}, "at": {self.clock.now()}, "until": {until!r}}}'

    def meta(self, key: str) -> str | None:
        rows = self.db.read("SELECT value FROM meta WHERE key = ?", key)
        return rows[0]["value"] if rows else None

    def database_id(self) -> str | None:
        """Return the name of these records in the marker of their VMs (32 hexadecimal digits); None if it was lost."""
        value = self.meta("database_id")
        return value if isinstance(value, str) and DATABASE_ID.fullmatch(value) else None

    def set_meta(self, key: str, value: str | None) -> None:
        def work(conn: Connection) -> None:
            if value is None:
                conn.execute("DELETE FROM meta WHERE key = ?", (key,))
            else:
                conn.execute(
                    "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    (key, value),
                )

        self.db.write(work)

    # ---- a new record ----

    def reserve(
        self,
        sandbox: Sandbox,
        *,
        vmid: int | None,
        vmid_range: tuple[int, int],
        occupied: set[int],
        journal: dict[str, Any],
        place: Callable[[Connection], Callable[[Connection, str], None]] | None = None,
    ) -> Claim:
        """Write a REQUESTED record under a VMID that no live record has.

        Its claim and its journal entry are written in the same transaction.
        ``place(connection)`` sets the node of the sandbox, and returns what writes the reservation on that node.
        Without ``vmid`` the range is walked on from the last one given out, so that a freed VMID is not the next one
        taken.
        """
        self._refuse_new()

        def work(conn: Connection) -> Claim:
            reserve_node = place(conn) if place is not None else None
            now = self.clock.now()
            clash = conn.execute(f"SELECT vmid FROM sandboxes WHERE name = ? AND {LIVE}", (sandbox.name,)).fetchone()
            if clash:
                raise InvalidInput(
                    f"name: {sandbox.name!r} is the name of the live sandbox {clash['vmid']}",
                    option="name",
                    value=sandbox.name,
                )
            sandbox.created_at = sandbox.updated_at = sandbox.state_changed_at = now
            sandbox.state = states.REQUESTED
            taken = {row["vmid"] for row in conn.execute(f"SELECT vmid FROM sandboxes WHERE {LIVE}")}
            if vmid is not None:
                sandbox.vmid = vmid
                if vmid in taken or not self._insert(conn, sandbox):
                    raise InvalidInput(f"vmid: {vmid} already belongs to a live sandbox", option="vmid", value=vmid)
            else:
                self._insert_free(conn, sandbox, vmid_range, taken | occupied)
            if reserve_node is not None:
                reserve_node(conn, sandbox.uuid)
            claim = self._take(conn, sandbox.uuid, "create", now)
            self._event(conn, sandbox, None, states.REQUESTED, "create", outcome="decided", reason="requested")
            self._journal(conn, sandbox.uuid, "create", "reserved", journal, now)
            return claim

        return self._hold(self.db.write(work))

    def _insert_free(self, conn: Connection, sandbox: Sandbox, vmid_range: tuple[int, int], occupied: set[int]) -> None:
        """Insert the record under the next free VMID after the one that was given out last."""
        first, last = vmid_range
        row = conn.execute("SELECT value FROM meta WHERE key = 'last_vmid'").fetchone()
        last_vmid = int(row["value"]) if row and str(row["value"]).isdecimal() else 0
        begin = last_vmid + 1 if first <= last_vmid < last else first
        for number in (*range(begin, last + 1), *range(first, begin)):
            if number in occupied:
                continue
            sandbox.vmid = number
            if self._insert(conn, sandbox):
                conn.execute(
                    "INSERT INTO meta VALUES ('last_vmid', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    (str(number),),
                )
                return
        raise InvalidInput(
            f"vmid_range: all VMIDs of {first}-{last} are taken; destroy or prune sandboxes, or configure a larger "
            "range",
            option="vmid_range",
            value=f"{first}-{last}",
        )

    def _insert(self, conn: Connection, sandbox: Sandbox) -> bool:
        """Insert a record; False when the unique index says that a live record has its VMID."""
        values = [json.dumps(sandbox.tags) if name == "tags" else getattr(sandbox, name) for name in COLUMNS]
        conn.execute("SAVEPOINT reserved_vmid")
        try:
            conn.execute(
                f"INSERT INTO sandboxes ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", values
            )
        except self.db.conflicts:
            conn.execute("ROLLBACK TO reserved_vmid")
            conn.execute("RELEASE reserved_vmid")
            return False
        conn.execute("RELEASE reserved_vmid")
        return True

    def renumber(self, claim: Claim, sandbox: Sandbox, *, vmid_range: tuple[int, int], occupied: set[int]) -> None:
        """Give a REQUESTED record another VMID of the range: Proxmox said that the first is occupied."""

        def work(conn: Connection) -> int:
            taken = {row["vmid"] for row in conn.execute(f"SELECT vmid FROM sandboxes WHERE {LIVE}")}
            first, last = vmid_range
            found = next((n for n in range(first, last + 1) if n not in taken and n not in occupied), 0)
            if not found:
                raise InvalidInput(
                    f"vmid_range: all VMIDs of {first}-{last} are taken, some by VMs that are not ours; configure "
                    "another range",
                    option="vmid_range",
                    value=f"{first}-{last}",
                )
            self._set(conn, sandbox, {"vmid": found})
            self._event(
                conn,
                sandbox,
                sandbox.state,
                sandbox.state,
                "create",
                outcome="done",
                reason="vmid_occupied",
                evidence={"was": sandbox.vmid},
            )
            return found

        sandbox.vmid = self.fenced(claim, work)
        sandbox.generation += 1

    # ---- claims ----

    def claim(self, uuid: str, operation: str, *, wait: float = 0) -> Claim:
        """Take the claim on a sandbox; waits up to ``wait`` seconds for another run, then says who holds it (Busy)."""
        deadline = self.clock.monotonic() + wait
        pause = 0.05
        while True:
            self._refuse_new()
            try:
                return self._hold(self.db.write(lambda conn: self._take(conn, uuid, operation, self.clock.now())))
            except Busy:
                left = deadline - self.clock.monotonic()
                if left <= 0:
                    raise
                self.clock.sleep(min(pause, left))
                pause = min(pause * 1.5, 1.0)

    def _hold(self, claim: Claim) -> Claim:
        """Remember a claim that was taken, where it lives by a heartbeat; count those that were taken over."""
        if claim.taken_over:
            self.db.takeovers += 1
        if self.db.controller is not None:
            self.db.keep_alive()
            vars(_held).setdefault("claims", {})[claim.fence] = claim.uuid
        return claim

    def confirm_claims(self) -> None:
        """Raise ClaimLost when a claim of this thread is another's by now, StoreError when that cannot be asked.

        Called directly before a request that changes Proxmox. A process that was paused may come back after its claim
        was
        taken over. Where claims live by their process alone (SQLite), nothing is asked.
        """
        if self.db.controller is None:
            return
        claims = dict(vars(_held).get("claims", {}))
        if not claims:
            self.db.read("SELECT 1")
        for fence, uuid in claims.items():
            if not self.db.read("SELECT 1 FROM claims WHERE sandbox_uuid = ? AND fence = ?", uuid, fence):
                raise ClaimLost(
                    f"the claim on sandbox {uuid} was lost to another controller; nothing more was done here", uuid=uuid
                )

    def _refuse_new(self) -> None:
        if self._stopping is not None and self._stopping.is_set():
            raise Stopping("agentlabd is stopping: this was not begun, and nothing was changed; ask again when it runs")

    def _take(self, conn: Connection, uuid: str, operation: str, now: int) -> Claim:
        row = conn.execute("SELECT * FROM claims WHERE sandbox_uuid = ?", (uuid,)).fetchone()
        if row and not self._given_up(row, lambda sql, values: conn.execute(sql, values).fetchall()):
            sandbox = conn.execute("SELECT vmid FROM sandboxes WHERE uuid = ?", (uuid,)).fetchone()
            since = row["acquired_at"] if isinstance(row["acquired_at"], int) else now
            raise Busy(
                f"sandbox {sandbox['vmid'] if sandbox else uuid} is being worked on: {row['operation']} by "
                f"{row['holder']} "
                f"for {max(0, now - since)} s; wait for it or run again",
                holder=row["holder"],
                operation=row["operation"],
            )
        # Never below the time in milliseconds: a database restored from a backup hands out no fence that somebody may
        # still hold.
        last = conn.execute("SELECT value FROM meta WHERE key = 'fence'").fetchone()["value"]
        fence = now * 1000
        # A damaged note beyond what SQLite counts to is left out of account.
        if str(last).isdecimal() and len(str(last)) < _LONGEST_FENCE:
            fence = max(int(last) + 1, fence)
        conn.execute("UPDATE meta SET value = ? WHERE key = 'fence'", (str(fence),))
        conn.execute(
            "INSERT INTO claims (sandbox_uuid, fence, operation, holder, process, acquired_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sandbox_uuid) DO UPDATE SET fence = excluded.fence, "
            "operation = excluded.operation, holder = excluded.holder, process = excluded.process, "
            "acquired_at = excluded.acquired_at, expires_at = excluded.expires_at",
            (uuid, fence, operation, self.actor, self._claim_holder(), now, now + self.claim_seconds),
        )
        left = conn.execute("SELECT * FROM operations WHERE sandbox_uuid = ?", (uuid,)).fetchone()
        taken_over = row is not None and (uuid, row["fence"]) not in _unreturned
        return Claim(uuid, fence, operation, JournalEntry.from_row(left) if left else None, taken_over)

    def fenced(self, claim: Claim, work: Callable[[Connection], T], *, finish: bool = False) -> T:
        """Run a write only while the claim is still ours, and extend it; ``finish``: end it, if the write is done."""

        def inner(conn: Connection) -> T:
            # The claim is read first and written last: what is refused here or by the work has written nothing yet.
            if not conn.execute(
                "SELECT 1 FROM claims WHERE sandbox_uuid = ? AND fence = ?", (claim.uuid, claim.fence)
            ).fetchone():
                raise ClaimLost(
                    f"the claim on sandbox {claim.uuid} was lost to another run; nothing more was done here",
                    uuid=claim.uuid,
                )
            value = work(conn)
            if finish:
                conn.execute("DELETE FROM claims WHERE sandbox_uuid = ? AND fence = ?", (claim.uuid, claim.fence))
            else:
                conn.execute(
                    "UPDATE claims SET expires_at = ?, process = ? WHERE sandbox_uuid = ? AND fence = ?",
                    (self.clock.now() + self.claim_seconds, self._claim_holder(), claim.uuid, claim.fence),
                )
            return value

        value = self.db.write(inner, checked=True)
        if finish:
            vars(_held).get("claims", {}).pop(claim.fence, None)
        return value

    def release(self, claim: Claim) -> None:
        """Give the claim back; the journal entry stays if the operation is not finished.

        On a full disk nothing is written: other processes take the claim over when this process has ended.
        """
        query, values = "DELETE FROM claims WHERE sandbox_uuid = ? AND fence = ?", (claim.uuid, claim.fence)
        vars(_held).get("claims", {}).pop(claim.fence, None)
        try:
            self.db.write(lambda conn: conn.execute(query, values) and None, checked=True)
        except StoreError:
            _unreturned.add((claim.uuid, claim.fence))
            self.db.write_later(query, values)

    # ---- journal ----

    def _journal(self, conn: Connection, uuid: str, kind: str, phase: str, detail: dict[str, Any], now: int) -> None:
        conn.execute(
            "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (sandbox_uuid) DO UPDATE SET kind = excluded.kind, phase = excluded.phase, "
            "detail = excluded.detail, "
            "actor = excluded.actor, updated_at = excluded.updated_at",
            (uuid, kind, phase, json.dumps(detail), self.actor, now, now),
        )

    def journal(
        self, claim: Claim, kind: str, phase: str, detail: dict[str, Any], *, unprotected: bool = False
    ) -> None:
        """Write the phase that is about to begin into the journal, before its first request.

        ``unprotected``: raise Kept when the sandbox was protected meanwhile.
        """

        def work(conn: Connection) -> None:
            if unprotected:
                row = conn.execute("SELECT vmid, protected FROM sandboxes WHERE uuid = ?", (claim.uuid,)).fetchone()
                if row["protected"]:
                    raise Kept(
                        "protected",
                        f"sandbox {row['vmid']} was protected while it was to be destroyed; it was not deleted",
                        vmid=row["vmid"],
                    )
            self._journal(conn, claim.uuid, kind, phase, detail, self.clock.now())

        self.fenced(claim, work)

    def drop_journal(self, claim: Claim) -> None:
        """Remove the journal entry of a sandbox: what it announced is over."""
        query = "DELETE FROM operations WHERE sandbox_uuid = ?"
        self.fenced(claim, lambda conn: conn.execute(query, (claim.uuid,)) and None)

    # ---- changes ----

    def _set(self, conn: Connection, sandbox: Sandbox, values: dict[str, Any]) -> Sandbox:
        """Compare-and-set of some columns on state and generation; the record as it is now."""
        new = {**values, "updated_at": self.clock.now()}
        row = {**new, "tags": json.dumps(new["tags"])} if "tags" in new else new
        done = conn.execute(_update(tuple(row)), (*row.values(), sandbox.uuid, sandbox.state, sandbox.generation))
        if done.rowcount != 1:
            found = conn.execute("SELECT state FROM sandboxes WHERE uuid = ?", (sandbox.uuid,)).fetchone()
            raise RecordChanged(
                f"sandbox {sandbox.vmid} was changed by another run meanwhile (now "
                f"{found['state'] if found else 'gone'}); run again",
                vmid=sandbox.vmid,
            )
        # Whatever writes to a record raises its generation. That was still the one that was read, so the other columns
        # were too.
        return sandbox.written(new)

    def _state(self, conn: Connection, sandbox: Sandbox) -> str:
        found = conn.execute("SELECT state FROM sandboxes WHERE uuid = ?", (sandbox.uuid,)).fetchone()
        return str(found["state"]) if found else sandbox.state

    def _event(
        self,
        conn: Connection,
        sandbox: Sandbox,
        old: str | None,
        new: str | None,
        operation: str,
        *,
        outcome: str,
        reason: str | None = None,
        evidence: dict[str, Any] | None = None,
        upids: Iterable[str] = (),
        duration_ms: int | None = None,
    ) -> None:
        conn.execute(
            "INSERT INTO events (at, sandbox_uuid, vmid, from_state, to_state, operation, actor, reason, evidence, "
            "upids, duration_ms, outcome) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.clock.now(),
                sandbox.uuid,
                sandbox.vmid,
                old,
                new,
                operation,
                self.actor,
                reason,
                _json(evidence or {}),
                _json(list(upids)),
                duration_ms,
                outcome,
            ),
        )

    def change(
        self,
        claim: Claim,
        sandbox: Sandbox,
        operation: str,
        *,
        to: str | None = None,
        outcome: str = "done",
        reason: str | None = None,
        evidence: dict[str, Any] | None = None,
        upids: Iterable[str] = (),
        duration_ms: int | None = None,
        finish: bool = False,
        journal: tuple[str, dict[str, Any]] | None = None,
        **values: Any,
    ) -> Sandbox:
        """Write one fenced step of an operation, a transition or new column values or both, with its event.

        Return the new record.

        ``finish`` removes the journal entry and the claim in the same transaction; ``journal`` is the next phase to
        note in it.
        """
        target = to or sandbox.state
        if to is not None and to != sandbox.state and not states.can_follow(sandbox.state, to):
            raise RecordChanged(
                f"sandbox {sandbox.vmid}: no transition from {sandbox.state} to {to}", vmid=sandbox.vmid
            )

        def work(conn: Connection) -> Sandbox:
            new = dict(values)
            if target != sandbox.state:
                new.update(state=target, state_changed_at=self.clock.now(), absent_seen_at=None, reason=reason)
            before = sandbox
            if new:
                after = self._set(conn, sandbox, new)
            else:
                # Nothing is set, so nothing was compared: the lease may have run out since the record was read.
                before = after = Sandbox.from_row(conn.execute(f"{SELECT} WHERE uuid = ?", (sandbox.uuid,)).fetchone())
            self._event(
                conn,
                sandbox,
                before.state,
                after.state,
                operation,
                outcome=outcome,
                reason=reason,
                evidence=evidence,
                upids=upids,
                duration_ms=duration_ms,
            )
            if finish:
                conn.execute("DELETE FROM operations WHERE sandbox_uuid = ?", (sandbox.uuid,))
            elif journal:
                self._journal(conn, sandbox.uuid, operation, journal[0], journal[1], self.clock.now())
            return after

        return self.fenced(claim, work, finish=finish)

    def renew(
        self,
        sandbox: Sandbox,
        expires_at: int,
        now: int,
        *,
        keepalive: bool = False,
        over: bool = False,
        evidence: dict[str, Any] | None = None,
    ) -> Sandbox:
        """Renew the lease by one conditional UPDATE.

        Its conditions: the state is RUNNING, the lease is not over, the generation is unchanged, no destroy is under
        way.

        Raises RecordChanged when another write came first. docs/safety.md, way 11, tells which accident this prevents.

        ``keepalive`` is the expiry pass itself, which renews what is over instead of expiring it; ``over``: leases
        rest, and it is known to be over.
        """
        began = self.clock.monotonic()
        # A caller whose ``now`` is another clock's is taken at its word; a second of difference is rounding.
        apart = now - self.clock.now()
        apart = apart if abs(apart) > 1 else 0

        def work(conn: Connection) -> Sandbox:
            # Waiting for the writer's lock may have taken this past the end of the lease. The clock is read here: the
            # second in which this began and the seconds of waiting, each rounded down, would add up to a second too
            # little. (It may be set back meanwhile.)
            latest = (
                -1 if keepalive or over else max(self.clock.now() + apart, now + int(self.clock.monotonic() - began))
            )
            done = conn.execute(
                "UPDATE sandboxes SET lease_expires_at = ?, updated_at = ?, generation = generation + 1 "
                "WHERE uuid = ? AND state = 'RUNNING' AND lease_expires_at > ? AND generation = ? "
                # A destroy under way wins: a renewal is never a success on a dying VM.
                "AND NOT EXISTS (SELECT 1 FROM operations WHERE sandbox_uuid = uuid AND kind = 'destroy')",
                (expires_at, now, sandbox.uuid, latest, sandbox.generation),
            )
            if done.rowcount != 1:
                raise RecordChanged(
                    f"sandbox {sandbox.vmid} was changed or expired while its lease was renewed", vmid=sandbox.vmid
                )
            # A workspace is the sandbox's as long as its lease, unless it was given for another time.
            conn.execute(
                "UPDATE workspaces SET lease_expires_at = ?, updated_at = ? "
                "WHERE sandbox_uuid = ? AND lease_expires_at = ?",
                (expires_at, now, sandbox.uuid, sandbox.lease_expires_at),
            )
            self._event(
                conn,
                sandbox,
                sandbox.state,
                sandbox.state,
                "keepalive" if keepalive else "renew_lease",
                outcome="done",
                evidence=evidence,
            )
            return Sandbox.from_row(conn.execute(f"{SELECT} WHERE uuid = ?", (sandbox.uuid,)).fetchone())

        return self.db.write(work, checked=True)

    def expire(self, sandbox: Sandbox, now: int) -> Sandbox:
        """Set TIMEOUT, only while the lease is over and nothing has changed: the other side of the race with ``renew``.

        Raise RecordChanged when the renewal won.

        Needs no claim, so that a busy sandbox expires on time; a creation or a stop under way meets the new state at
        its next step.
        """

        def work(conn: Connection) -> Sandbox:
            new = {
                "state": states.TIMEOUT,
                "state_changed_at": now,
                "updated_at": now,
                "absent_seen_at": None,
                "reason": "lease_expired",
            }
            done = conn.execute(
                f"{_update(tuple(new))} AND lease_expires_at <= ?",
                (*new.values(), sandbox.uuid, sandbox.state, sandbox.generation, now),
            )
            if done.rowcount != 1:
                raise RecordChanged(
                    f"sandbox {sandbox.vmid} was renewed or changed before it expired", vmid=sandbox.vmid
                )
            self._event(conn, sandbox, sandbox.state, states.TIMEOUT, "expire", outcome="done", reason="lease_expired")
            return sandbox.written(new)

        return self.db.write(work, checked=True)

    def amend(self, sandbox: Sandbox, operation: str, **values: Any) -> Sandbox:
        """Change columns that concern no VM (protected, keepalive, absent_seen_at) with an event; needs no claim.

        Kept (busy) when it is to be protected and its delete is already decided: the other side of the check in
        ``journal``.
        """

        def work(conn: Connection) -> Sandbox:
            if values.get("protected"):
                row = conn.execute(
                    "SELECT phase FROM operations WHERE sandbox_uuid = ? AND kind = 'destroy'", (sandbox.uuid,)
                ).fetchone()
                if row and row["phase"] in _TOO_LATE_TO_PROTECT:
                    raise Kept(
                        "busy", f"cannot protect sandbox {sandbox.vmid}: it is being destroyed", vmid=sandbox.vmid
                    )
            done = self._set(conn, sandbox, values)
            self._event(conn, sandbox, sandbox.state, sandbox.state, operation, outcome="done", evidence=values)
            return done

        return self.db.write(work, checked=True)

    def confirm_address(self, sandbox: Sandbox) -> Sandbox:
        """Note that the guest agent named the recorded address again; return the record.

        There is no event and no new generation, because nothing changed for any other run.
        """
        query = "UPDATE sandboxes SET ip_seen_at = ? WHERE uuid = ? AND ip = ?"
        values = (self.clock.now(), sandbox.uuid, sandbox.ip)
        self.db.write(lambda conn: conn.execute(query, values) and None, checked=True)
        return self.get(sandbox.uuid)

    def note(
        self,
        sandbox: Sandbox,
        operation: str,
        *,
        outcome: str,
        reason: str | None = None,
        evidence: dict[str, Any] | None = None,
        upids: Iterable[str] = (),
    ) -> None:
        """An event without a change: something was looked at, refused or left alone."""

        def work(conn: Connection) -> None:
            self.write_event(conn, sandbox, operation, outcome=outcome, reason=reason, evidence=evidence, upids=upids)

        self.db.write(work, checked=True)

    def write_event(self, conn: Connection, sandbox: Sandbox, operation: str, **values: Any) -> None:
        """Write an event that changes no state, within a transaction of the caller's; ``values`` as in ``note``."""
        state = self._state(conn, sandbox)
        self._event(conn, sandbox, state, state, operation, **values)
