# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read and write the records: sandboxes, their events, claims, and the journal of unfinished operations.

Every state change is a compare-and-set on state and generation, in the same transaction as its event. Every write of an
operation is fenced by its claim: a run that has lost its claim cannot write.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import states
from ..clock import Clock
from ..errors import Busy, ClaimLost, DamagedRecord, InvalidInput, Kept, NotFound, RecordChanged, Stopping, StoreError
from ..model import COLUMNS, Sandbox
from . import holders
from .journal import RESERVED, TOO_LATE_TO_PROTECT, JournalEntry
from .port import Connection, Engine, Row

T = TypeVar("T")

# Minimum life of a claim; every journal entry extends it. Between two entries an operation makes at most six waits (a
# creation: resize, three attempts to start, the HA manager, the guest agent) and some requests.
CLAIM_SECONDS = 3600
_WAITS = 8
# Digits of the largest integer in SQLite.
_LONGEST_FENCE = len(str(2**63 - 1))
_INSERT_EVENT = (
    "INSERT INTO events (at, sandbox_uuid, vmid, from_state, to_state, operation, actor, reason, evidence, upids, "
    "duration_ms, outcome) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
# Sandboxes in one statement of a bulk change. psycopg prepares only statements of less than 4,096 characters.
_AT_ONCE = 100
# Outcomes of events that changed nothing.
_WITHOUT_EFFECT = ("kept", "failed", "interrupted")
LIVE = "state <> 'DESTROYED'"
SELECT = f"SELECT {', '.join(COLUMNS)} FROM sandboxes"
# Keys of the table meta. The function raises ValueError, TypeError or KeyError for a damaged value.
_NOTES: dict[str, Callable[[str], object]] = {
    "clock": lambda text: float(json.loads(text)["offset"]),
    "cleanup_frozen": lambda text: json.loads(text)["reason"],
    "cleanup_last_run": int,
    "cluster": lambda text: json.loads(text)["authority"],
    "last_vmid": int,
}
DATABASE_ID = re.compile(r"[0-9a-f]{32}")
# Claims (database, sandbox, fence) that this process has finished with but could not release. Its own threads do not
# wait for them.
_unreturned: set[tuple[str, str, int]] = set()
# The claims that a thread holds on records with heartbeats, by database. They are confirmed before each change in
# Proxmox.
_held = threading.local()


@dataclass(slots=True)
class Claim:
    """The right to work on one sandbox. ``interrupted`` is the journal entry that a killed run left, if any."""

    uuid: str
    fence: int
    operation: str
    interrupted: JournalEntry | None = None
    # True when the claim was taken from a dead holder.
    taken_over: bool = False


@dataclass(slots=True)
class Ending:
    """The last step of one operation in a bulk change: its claim, and the content of its event."""

    claim: Claim
    reason: str
    evidence: dict[str, Any]
    upids: Sequence[str] = ()
    duration_ms: int | None = None


def read_sound_sandbox(row: Row) -> Sandbox | None:
    """Return the record in a row, or None for a damaged one.

    Lists skip damaged rows; ``Records.list_damage`` names them.
    """
    try:
        return Sandbox.from_row(row)
    except DamagedRecord:
        return None


def read_sound_entries(rows: Iterable[Row]) -> list[JournalEntry]:
    """Return the journal entries in these rows, without damaged ones."""
    entries = []
    for row in rows:
        try:
            entries.append(JournalEntry.from_row(row))
        except DamagedRecord:
            continue
    return entries


def _format_json(value: list[Any] | dict[str, Any]) -> str:
    """Return the value as JSON. Empty values skip the encoder, because a bulk run writes thousands of them."""
    return json.dumps(value) if value else "{}" if isinstance(value, dict) else "[]"


@functools.lru_cache(64)
def _make_update(names: tuple[str, ...]) -> str:
    """Return the statement that sets these columns by compare-and-set on state and generation."""
    return (
        f"UPDATE sandboxes SET {' = ?, '.join(names)} = ?, generation = generation + 1 "
        "WHERE uuid = ? AND state = ? AND generation = ?"
    )


def _split_values(values: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """Yield the values in parts, one part for each statement, with the placeholders of the part."""
    for begin in range(0, len(values), _AT_ONCE):
        part = values[begin : begin + _AT_ONCE]
        yield part, ", ".join("?" * len(part))


class Records:
    """Read and write the records in one database."""

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
        self._process = holders.describe_process()
        if database.controller is not None:
            self._process = f'{self._process[:-1]}, "controller": "{database.controller}"}}'
        self._stopping = stopping
        # Set by a pass over many sandboxes (reconcile, rules, expiry), because each pass meets the same sandboxes.
        self.in_pass = False

    # ---- reading ----

    def get(self, uuid: str) -> Sandbox:
        """Return the record with that UUID. Raises NotFound, and DamagedRecord for a damaged row."""
        rows = self.db.read(f"{SELECT} WHERE uuid = ?", uuid)
        if not rows:
            raise NotFound("sandbox not found", uuid=uuid)
        return Sandbox.from_row(rows[0])

    def find_live_by_vmid(self, vmid: int) -> Sandbox | None:
        rows = self.db.read(f"{SELECT} WHERE vmid = ? AND {LIVE}", vmid)
        return Sandbox.from_row(rows[0]) if rows else None

    def find_live_by_name(self, name: str) -> Sandbox | None:
        rows = self.db.read(f"{SELECT} WHERE name = ? AND {LIVE}", name)
        return Sandbox.from_row(rows[0]) if rows else None

    def find_last_by_vmid(self, vmid: int) -> Sandbox | None:
        """Return the live record with that VMID, else the newest destroyed one, else None."""
        live = self.find_live_by_vmid(vmid)
        if live:
            return live
        rows = self.db.read(
            f"{SELECT} WHERE vmid = ? AND state = 'DESTROYED' ORDER BY state_changed_at DESC, created_at DESC LIMIT 1",
            vmid,
        )
        return Sandbox.from_row(rows[0]) if rows else None

    def find_last_by_name(self, name: str) -> Sandbox | None:
        live = self.find_live_by_name(name)
        if live:
            return live
        rows = self.db.read(
            f"{SELECT} WHERE name = ? AND state = 'DESTROYED' ORDER BY state_changed_at DESC LIMIT 1", name
        )
        return Sandbox.from_row(rows[0]) if rows else None

    def find_all(self, states: Iterable[str] | None = None, *, include_destroyed: bool = False) -> list[Sandbox]:
        """Return sandboxes in the order of their VMIDs.

        ``states``: only sandboxes in these states (None: any state). Destroyed sandboxes need ``include_destroyed``.
        """
        names = list(states) if states is not None else None
        where, values = ("1 = 1", []) if include_destroyed else (LIVE, [])
        if names is not None:
            where += f" AND state IN ({', '.join('?' * len(names))})"
            values = list(names)
        rows = self.db.read_as(read_sound_sandbox, f"{SELECT} WHERE {where} ORDER BY vmid, created_at", *values)
        if None not in rows:
            return rows  # type: ignore[return-value]
        return [sandbox for sandbox in rows if sandbox is not None]

    def list_damage(self) -> list[DamagedRecord]:
        """Return the damage in live records, in the journal and in the table meta."""
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

    def list_unfinished(self) -> tuple[list[JournalEntry], list[JournalEntry]]:
        """Return the journal as (operations under way, interrupted operations)."""
        stale = {entry.sandbox_uuid: entry for entry in self.list_interrupted()}
        rows = self.db.read("SELECT * FROM operations ORDER BY id")
        return read_sound_entries(row for row in rows if row["sandbox_uuid"] not in stale), list(stale.values())

    def find_journal_entry(self, uuid: str) -> JournalEntry | None:
        """Return the journal entry of a sandbox's unfinished operation, or None."""
        rows = self.db.read("SELECT * FROM operations WHERE sandbox_uuid = ?", uuid)
        return JournalEntry.from_row(rows[0]) if rows else None

    def is_worked_on(self, uuid: str) -> bool:
        """Return whether a sandbox has a journal entry or a claim. The holder may be alive or dead."""
        query = "SELECT 1 FROM operations WHERE sandbox_uuid = ? UNION SELECT 1 FROM claims WHERE sandbox_uuid = ?"
        return bool(self.db.read(query, uuid, uuid))

    def list_interrupted(self) -> list[JournalEntry]:
        """Return the journal entries whose run is dead or has lost its claim. The next run has to finish them."""
        rows = self.db.read(
            "SELECT o.*, c.fence, c.process, c.expires_at FROM operations o "
            "LEFT JOIN claims c USING (sandbox_uuid) ORDER BY o.id"
        )
        return read_sound_entries(row for row in rows if row["process"] is None or self.is_holder_gone(row))

    def list_interrupted_sandboxes(self) -> list[tuple[JournalEntry, Sandbox]]:
        """Return each interrupted operation with its sandbox. Sandboxes with a damaged row are left out."""
        pairs = []
        for entry in self.list_interrupted():
            with contextlib.suppress(DamagedRecord, NotFound):
                pairs.append((entry, self.get(entry.sandbox_uuid)))
        return pairs

    def _read_rows(self, sql: str, values: Sequence[Any]) -> list[Any]:
        return self.db.read(sql, *values)

    def is_holder_gone(self, claim: Row, read: Callable[[str, Sequence[Any]], list[Any]] | None = None) -> bool:
        """Return whether the holder of a claim is gone.

        ``read`` runs the query inside a transaction; without it any connection is used.
        """
        return (
            (self.db.path, claim["sandbox_uuid"], claim["fence"]) in _unreturned
            or holders.is_over(claim["process"], claim["expires_at"], self.clock.now(), self.clock.since_boot())
            or holders.is_dead(claim["process"])
            or self.db.is_abandoned(claim["process"], read or self._read_rows)
        )

    def list_abandoned_claims(
        self, read: Callable[[str, Sequence[Any]], list[Any]] | None = None
    ) -> list[tuple[str, int]]:
        """Return the sandbox's UUID and the fence of each claim whose holder is gone.

        ``read`` is the same as in ``is_holder_gone``.
        Where claims depend on heartbeats, a claim whose sandbox has a journal entry is left out: the run that finishes
        the operation takes the claim over, and that is counted.
        """
        query = "SELECT sandbox_uuid, fence, process, expires_at FROM claims"
        if self.db.controller is not None:
            query += " WHERE sandbox_uuid NOT IN (SELECT sandbox_uuid FROM operations)"
        rows = (read or self._read_rows)(query, ())
        return [(row["sandbox_uuid"], row["fence"]) for row in rows if self.is_holder_gone(row, read)]

    def _describe_holder(self) -> str:
        """Return the holder of a claim as JSON: the process, the time, and the end by the time since boot."""
        until = float(self.clock.since_boot() + self.claim_seconds)
        return f'{self._process[:-1]}, "at": {self.clock.now()}, "until": {until!r}}}'

    def read_meta(self, key: str) -> str | None:
        rows = self.db.read("SELECT value FROM meta WHERE key = ?", key)
        return rows[0]["value"] if rows else None

    def read_database_id(self) -> str | None:
        """Return the id of these records in the marker of their VMs (32 hexadecimal digits); None if it was lost."""
        value = self.read_meta("database_id")
        return value if isinstance(value, str) and DATABASE_ID.fullmatch(value) else None

    def set_meta(self, key: str, value: str | None) -> None:
        """Store a value in the table meta. None removes the key."""

        def work(conn: Connection) -> None:
            if value is None:
                conn.execute("DELETE FROM meta WHERE key = ?", (key,))
            else:
                conn.execute(
                    "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    (key, value),
                )

        self.db.write(work)

    # ---- new records ----

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
        """Write a REQUESTED record under a VMID that no live record has, and return its claim.

        Claim and journal entry are written in the same transaction. ``place(connection)`` sets the sandbox's node and
        returns the function that writes the reservation on that node. Without ``vmid`` the search starts after the VMID
        given out last, so that a freed VMID is not reused at once.
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
            used_vmids = {row["vmid"] for row in conn.execute(f"SELECT vmid FROM sandboxes WHERE {LIVE}")}
            if vmid is not None:
                sandbox.vmid = vmid
                if vmid in used_vmids or not self._insert(conn, sandbox):
                    raise InvalidInput(f"vmid: {vmid} already belongs to a live sandbox", option="vmid", value=vmid)
            else:
                self._insert_free(conn, sandbox, vmid_range, used_vmids | occupied)
            if reserve_node is not None:
                reserve_node(conn, sandbox.uuid)
            claim = self._take_claim(conn, sandbox.uuid, "create", now)
            self._insert_event(conn, sandbox, None, states.REQUESTED, "create", outcome="decided", reason="requested")
            self._insert_journal(conn, sandbox.uuid, "create", RESERVED, journal, now)
            return claim

        return self._remember_claim(self.db.write(work))

    def _insert_free(self, conn: Connection, sandbox: Sandbox, vmid_range: tuple[int, int], occupied: set[int]) -> None:
        """Insert the record under the next free VMID after the one given out last."""
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
        """Insert a record. Returns False when the unique index reports that a live record has its VMID."""
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

    def renumber(self, claim: Claim, sandbox: Sandbox, *, vmid_range: tuple[int, int], occupied: set[int]) -> Sandbox:
        """Give the record of a creation another VMID of the range, because Proxmox reported the first as occupied.

        Returns the new record. Raises InvalidInput when no VMID of the range is free.
        """

        def work(conn: Connection) -> Sandbox:
            used_vmids = {row["vmid"] for row in conn.execute(f"SELECT vmid FROM sandboxes WHERE {LIVE}")}
            first, last = vmid_range
            vmid = next((n for n in range(first, last + 1) if n not in used_vmids and n not in occupied), 0)
            if not vmid:
                raise InvalidInput(
                    f"vmid_range: all VMIDs of {first}-{last} are taken, some by VMs that are not ours; configure "
                    "another range",
                    option="vmid_range",
                    value=f"{first}-{last}",
                )
            renumbered = self._update_sandbox(conn, sandbox, {"vmid": vmid})
            self._insert_event(
                conn,
                sandbox,
                sandbox.state,
                sandbox.state,
                "create",
                outcome="done",
                reason="vmid_occupied",
                evidence={"was": sandbox.vmid},
            )
            return renumbered

        return self.run_fenced(claim, work)

    # ---- claims ----

    def claim(self, uuid: str, operation: str, *, wait: float = 0) -> Claim:
        """Take the claim on a sandbox.

        Raises Busy, which names the holder, after waiting ``wait`` seconds for another run.
        """
        deadline = self.clock.monotonic() + wait
        pause = 0.05
        while True:
            self._refuse_new()
            try:
                return self._remember_claim(
                    self.db.write(lambda conn: self._take_claim(conn, uuid, operation, self.clock.now()))
                )
            except Busy:
                remaining = deadline - self.clock.monotonic()
                if remaining <= 0:
                    raise
                self.clock.sleep(min(pause, remaining))
                pause = min(pause * 1.5, 1.0)

    def _remember_claim(self, claim: Claim) -> Claim:
        """Remember a claim that depends on heartbeats, and count it if it was taken over."""
        if claim.taken_over:
            self.db.takeovers += 1
        if self.db.controller is not None:
            self.db.keep_alive()
            self._held_claims()[claim.fence] = claim.uuid
        return claim

    def confirm_claims(self) -> None:
        """Raise ClaimLost when another run has taken a claim of this thread, and StoreError when the records do not
        answer.

        Called directly before each request that changes Proxmox, because a paused process may resume after its claim
        was taken over. On SQLite a claim ends only with its process, so nothing is read.
        """
        if self.db.controller is None:
            return
        claims = dict(self._held_claims())
        if not claims:
            self.db.read("SELECT 1")
        for fence, uuid in claims.items():
            if not self.db.read("SELECT 1 FROM claims WHERE sandbox_uuid = ? AND fence = ?", uuid, fence):
                raise ClaimLost(
                    f"the claim on sandbox {uuid} was lost to another controller; nothing more was done here", uuid=uuid
                )

    def _held_claims(self) -> dict[int, str]:
        """Return the claims that this thread holds in this database: the sandbox's UUID by fence."""
        claims: dict[int, str] = vars(_held).setdefault(self.db.path, {})
        return claims

    def _refuse_new(self) -> None:
        if self._stopping is not None and self._stopping.is_set():
            raise Stopping("agentlabd is stopping: this was not begun, and nothing was changed; ask again when it runs")

    def _take_claim(self, conn: Connection, uuid: str, operation: str, now: int) -> Claim:
        row = conn.execute("SELECT * FROM claims WHERE sandbox_uuid = ?", (uuid,)).fetchone()
        if row and not self.is_holder_gone(row, lambda sql, values: conn.execute(sql, values).fetchall()):
            sandbox = conn.execute("SELECT vmid FROM sandboxes WHERE uuid = ?", (uuid,)).fetchone()
            since = row["acquired_at"] if isinstance(row["acquired_at"], int) else now
            raise Busy(
                f"sandbox {sandbox['vmid'] if sandbox else uuid} is being worked on: {row['operation']} by "
                f"{row['holder']} "
                f"for {max(0, now - since)} s; wait for it or run again",
                holder=row["holder"],
                operation=row["operation"],
            )
        # A fence is never below the time in milliseconds. So a database restored from a backup gives out no fence that
        # a process may still hold.
        last = conn.execute("SELECT value FROM meta WHERE key = 'fence'").fetchone()["value"]
        fence = now * 1000
        # Ignore a damaged value that exceeds SQLite's integers.
        if str(last).isdecimal() and len(str(last)) < _LONGEST_FENCE:
            fence = max(int(last) + 1, fence)
        conn.execute("UPDATE meta SET value = ? WHERE key = 'fence'", (str(fence),))
        conn.execute(
            "INSERT INTO claims (sandbox_uuid, fence, operation, holder, process, acquired_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sandbox_uuid) DO UPDATE SET fence = excluded.fence, "
            "operation = excluded.operation, holder = excluded.holder, process = excluded.process, "
            "acquired_at = excluded.acquired_at, expires_at = excluded.expires_at",
            (uuid, fence, operation, self.actor, self._describe_holder(), now, now + self.claim_seconds),
        )
        entry = conn.execute("SELECT * FROM operations WHERE sandbox_uuid = ?", (uuid,)).fetchone()
        taken_over = row is not None and (self.db.path, uuid, row["fence"]) not in _unreturned
        return Claim(uuid, fence, operation, JournalEntry.from_row(entry) if entry else None, taken_over)

    def run_fenced(self, claim: Claim, work: Callable[[Connection], T], *, finish: bool = False) -> T:
        """Run a write only while the claim is ours, and extend the claim. ``finish``: release it with the write."""

        def run_if_held(conn: Connection) -> T:
            # Check the claim first and extend it last. A refusal, here or in ``work``, so happens before the first
            # write.
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
                    (self.clock.now() + self.claim_seconds, self._describe_holder(), claim.uuid, claim.fence),
                )
            return value

        value = self.db.write(run_if_held, checked=True)
        if finish:
            self._held_claims().pop(claim.fence, None)
        return value

    def release(self, claim: Claim) -> None:
        """Release the claim. The journal entry of an unfinished operation stays.

        On a full disk the claim stays in the database. Other processes take it over once this process has ended.
        """
        query, values = "DELETE FROM claims WHERE sandbox_uuid = ? AND fence = ?", (claim.uuid, claim.fence)
        self._held_claims().pop(claim.fence, None)
        try:
            self.db.write(lambda conn: conn.execute(query, values) and None, checked=True)
        except StoreError:
            _unreturned.add((self.db.path, claim.uuid, claim.fence))
            self.db.write_later(query, values)

    # ---- journal ----

    def _insert_journal(
        self, conn: Connection, uuid: str, kind: str, phase: str, detail: dict[str, Any], now: int
    ) -> None:
        conn.execute(
            "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (sandbox_uuid) DO UPDATE SET kind = excluded.kind, phase = excluded.phase, "
            "detail = excluded.detail, "
            "actor = excluded.actor, updated_at = excluded.updated_at",
            (uuid, kind, phase, json.dumps(detail), self.actor, now, now),
        )

    def write_journal(
        self, claim: Claim, kind: str, phase: str, detail: dict[str, Any], *, unprotected: bool = False
    ) -> None:
        """Write the next phase to the journal, before the first request of that phase.

        ``unprotected``: raise Kept when the sandbox has been protected meanwhile.
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
            self._insert_journal(conn, claim.uuid, kind, phase, detail, self.clock.now())

        self.run_fenced(claim, work)

    def drop_journal(self, claim: Claim) -> None:
        """Remove the journal entry of a sandbox, because its operation has ended."""
        query = "DELETE FROM operations WHERE sandbox_uuid = ?"
        self.run_fenced(claim, lambda conn: conn.execute(query, (claim.uuid,)) and None)

    # ---- changes ----

    def _update_sandbox(self, conn: Connection, sandbox: Sandbox, values: dict[str, Any]) -> Sandbox:
        """Set columns by compare-and-set on state and generation, and return the new record. Raises RecordChanged."""
        new = {**values, "updated_at": self.clock.now()}
        row = {**new, "tags": json.dumps(new["tags"])} if "tags" in new else new
        written = conn.execute(
            _make_update(tuple(row)), (*row.values(), sandbox.uuid, sandbox.state, sandbox.generation)
        )
        if written.rowcount != 1:
            current = conn.execute("SELECT state FROM sandboxes WHERE uuid = ?", (sandbox.uuid,)).fetchone()
            raise RecordChanged(
                f"sandbox {sandbox.vmid} was changed by another run meanwhile (now "
                f"{current['state'] if current else 'gone'}); run again",
                vmid=sandbox.vmid,
            )
        # Every write raises the generation. The generation was unchanged, so all other columns were unchanged too.
        return sandbox.copy_with(new)

    def _read_state(self, conn: Connection, sandbox: Sandbox) -> str:
        row = conn.execute("SELECT state FROM sandboxes WHERE uuid = ?", (sandbox.uuid,)).fetchone()
        return str(row["state"]) if row else sandbox.state

    def _insert_event(
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
        always: bool = False,
    ) -> None:
        """Write an event.

        A pass writes no event that only repeats its last event on the sandbox, unless ``always``. The events of other
        operations are always written: each request of a user is a fact of its own.
        """
        facts = (old, new, reason, _format_json(evidence or {}), _format_json(list(upids)), outcome)
        may_repeat = self.in_pass and not always and outcome in _WITHOUT_EFFECT and old == new
        if may_repeat and self._is_repeated(conn, sandbox.uuid, operation, facts):
            return
        conn.execute(_INSERT_EVENT, self._make_event_row(sandbox, operation, facts, duration_ms))

    def _make_event_row(
        self, sandbox: Sandbox, operation: str, facts: tuple[Any, ...], duration_ms: int | None = None
    ) -> tuple[Any, ...]:
        """Return the values of an event. ``facts``: old and new state, reason, evidence, task ids, outcome."""
        old, new, reason, evidence, upids, outcome = facts
        return (
            self.clock.now(),
            sandbox.uuid,
            sandbox.vmid,
            old,
            new,
            operation,
            self.actor,
            reason,
            evidence,
            upids,
            duration_ms,
            outcome,
        )

    def _is_repeated(self, conn: Connection, uuid: str, operation: str, facts: tuple[Any, ...]) -> bool:
        """Return whether this actor's last event of the operation says the same, and nothing happened since.

        A sandbox that waits for a person is looked at in each pass. The first event stays, with its time.
        """
        columns = ("from_state", "to_state", "reason", "evidence", "upids", "outcome")
        last = conn.execute(
            f"SELECT id, {', '.join(columns)} FROM events "
            "WHERE sandbox_uuid = ? AND operation = ? AND actor = ? ORDER BY id DESC LIMIT 1",
            (uuid, operation, self.actor),
        ).fetchone()
        if last is None or tuple(last[name] for name in columns) != facts:
            return False
        places = ", ".join("?" for _word in _WITHOUT_EFFECT)
        return not conn.execute(
            f"SELECT 1 FROM events WHERE sandbox_uuid = ? AND id > ? AND (outcome NOT IN ({places}) "
            "OR coalesce(from_state, '') <> coalesce(to_state, '')) LIMIT 1",
            (uuid, last["id"], *_WITHOUT_EFFECT),
        ).fetchone()

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
        """Write one fenced step of an operation (a transition, new column values, or both) with its event.

        Returns the new record. ``finish`` removes journal entry and claim in the same transaction. ``journal`` is the
        next phase and its detail, written in the same transaction.
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
                after = self._update_sandbox(conn, sandbox, new)
            else:
                # No column was set, so nothing was compared. Read again: the lease may have expired since the record
                # was read.
                before = after = Sandbox.from_row(conn.execute(f"{SELECT} WHERE uuid = ?", (sandbox.uuid,)).fetchone())
            self._insert_event(
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
                # Always write this event: each closed journal entry stands for another killed run.
                always=finish and outcome == "interrupted",
            )
            if finish:
                conn.execute("DELETE FROM operations WHERE sandbox_uuid = ?", (sandbox.uuid,))
            elif journal:
                self._insert_journal(conn, sandbox.uuid, operation, journal[0], journal[1], self.clock.now())
            return after

        return self.run_fenced(claim, work, finish=finish)

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
        """Renew the lease by one conditional UPDATE, and return the new record.

        The conditions: the state is RUNNING, the lease is not over, the generation is unchanged, no destroy is under
        way. Raises RecordChanged when another write came first. docs/safety.md, way 11, describes the accident that
        this prevents.

        ``expires_at`` and ``now`` are seconds since the epoch. ``keepalive``: the expiry pass renews an expired lease.
        ``over``: leases are held after a restore, and the caller knows that this one has expired.
        """
        began = self.clock.monotonic()
        # The caller's ``now`` may come from another clock. Keep that difference; a second is rounding.
        apart = now - self.clock.now()
        apart = apart if abs(apart) > 1 else 0

        def work(conn: Connection) -> Sandbox:
            # Waiting for locks may have taken us past the end of the lease, so read the clock again after them.
            self.db.lock_sandbox(conn, sandbox.uuid)
            # The sum of the start time and the waiting time, each rounded down, could be a second too small. The larger
            # of both counts, because the clock may have been set back meanwhile.
            latest = (
                -1 if keepalive or over else max(self.clock.now() + apart, now + int(self.clock.monotonic() - began))
            )
            update = conn.execute(
                "UPDATE sandboxes SET lease_expires_at = ?, updated_at = ?, generation = generation + 1 "
                "WHERE uuid = ? AND state = 'RUNNING' AND lease_expires_at > ? AND generation = ? "
                # A destroy under way wins: a renewal must not succeed on a dying VM.
                "AND NOT EXISTS (SELECT 1 FROM operations WHERE sandbox_uuid = uuid AND kind = 'destroy')",
                (expires_at, now, sandbox.uuid, latest, sandbox.generation),
            )
            if update.rowcount != 1:
                raise RecordChanged(
                    f"sandbox {sandbox.vmid} was changed or expired while its lease was renewed", vmid=sandbox.vmid
                )
            # A workspace belongs to the sandbox for as long as the lease, unless its own end was given.
            conn.execute(
                "UPDATE workspaces SET lease_expires_at = ?, updated_at = ? "
                "WHERE sandbox_uuid = ? AND lease_expires_at = ?",
                (expires_at, now, sandbox.uuid, sandbox.lease_expires_at),
            )
            self._insert_event(
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
        """Set TIMEOUT if the lease is over and the record is unchanged. Return the new record.

        Raises RecordChanged when a renewal (``renew``) came first. Needs no claim, so that a busy sandbox expires on
        time. A creation or stop under way notices the new state at its next step.
        """

        moved = self.expire_all([sandbox], now)[0]
        if moved is None:
            raise RecordChanged(f"sandbox {sandbox.vmid} was renewed or changed before it expired", vmid=sandbox.vmid)
        return moved

    # ---- many at once ----

    def expire_all(self, sandboxes: Sequence[Sandbox], now: int) -> list[Sandbox | None]:
        """Set TIMEOUT, as ``expire`` does, and return the new records; None for each one that was changed meanwhile.

        One statement serves many sandboxes. On a server, statements for each sandbox would wait for thousands of
        answers.
        """
        new = self._make_transition(states.TIMEOUT, "lease_expired", now)

        def work(conn: Connection) -> list[Sandbox | None]:
            query = f"SELECT uuid, state, generation FROM sandboxes WHERE {LIVE} AND lease_expires_at <= ?"
            over = {tuple(row) for row in conn.execute(query, (now,))}
            moved: list[Sandbox | None] = [
                sandbox.copy_with(new) if (sandbox.uuid, sandbox.state, sandbox.generation) in over else None
                for sandbox in sandboxes
            ]
            before = [sandbox for sandbox, after in zip(sandboxes, moved, strict=True) if after is not None]
            self._update_sandboxes(conn, before, new)
            conn.executemany(
                _INSERT_EVENT,
                [
                    self._make_event_row(
                        sandbox, "expire", (sandbox.state, states.TIMEOUT, "lease_expired", "{}", "[]", "done")
                    )
                    for sandbox in before
                ],
            )
            return moved

        return self.db.write(work, checked=True)

    def finish_all(self, endings: Sequence[Ending], operation: str, to: str) -> list[Sandbox | None]:
        """End these operations in state ``to``, each with its event, and remove their journal entries and claims.

        The effect is that of ``change`` with ``finish``, from any present state, with the few statements of
        ``expire_all``. Returns the new records; None for each record whose claim was lost, or that cannot enter ``to``.
        """

        def work(conn: Connection) -> list[Sandbox | None]:
            now = self.clock.now()
            before = self._read_claimed(conn, [ending.claim for ending in endings])
            moved: list[Sandbox | None] = []
            by_reason: dict[str, list[Sandbox]] = {}
            rows = []
            for ending in endings:
                sandbox = before.get(ending.claim.uuid)
                if sandbox is None or not states.can_follow(sandbox.state, to):
                    moved.append(None)
                    continue
                moved.append(sandbox.copy_with(self._make_transition(to, ending.reason, now)))
                by_reason.setdefault(ending.reason, []).append(sandbox)
                texts = _format_json(ending.evidence), _format_json(list(ending.upids))
                facts = (sandbox.state, to, ending.reason, *texts, "done")
                rows.append(self._make_event_row(sandbox, operation, facts, ending.duration_ms))
            for reason, sandboxes in by_reason.items():
                self._update_sandboxes(conn, sandboxes, self._make_transition(to, reason, now))
                for part, places in _split_values([sandbox.uuid for sandbox in sandboxes]):
                    conn.execute(f"DELETE FROM operations WHERE sandbox_uuid IN ({places})", part)
                    conn.execute(f"DELETE FROM claims WHERE sandbox_uuid IN ({places})", part)
            conn.executemany(_INSERT_EVENT, rows)
            return moved

        moved = self.db.write(work, checked=True)
        for ending, after in zip(endings, moved, strict=True):
            if after is not None:
                self._held_claims().pop(ending.claim.fence, None)
        return moved

    def _read_claimed(self, conn: Connection, claims: Sequence[Claim]) -> dict[str, Sandbox]:
        """Return, by UUID, the records whose claim is still held."""
        sandboxes: dict[str, Sandbox] = {}
        fences = {claim.uuid: claim.fence for claim in claims}
        for part, places in _split_values(list(fences)):
            query = f"SELECT sandbox_uuid, fence FROM claims WHERE sandbox_uuid IN ({places})"
            held = {tuple(row) for row in conn.execute(query, part)}
            for row in conn.execute(f"{SELECT} WHERE uuid IN ({places})", part):
                sandbox = read_sound_sandbox(row)
                if sandbox is not None and (sandbox.uuid, fences[sandbox.uuid]) in held:
                    sandboxes[sandbox.uuid] = sandbox
        return sandboxes

    @staticmethod
    def _make_transition(state: str, reason: str, now: int) -> dict[str, Any]:
        """Return the columns that a transition to ``state`` sets."""
        return {
            "state": state,
            "state_changed_at": now,
            "updated_at": now,
            "absent_seen_at": None,
            "reason": reason,
        }

    @staticmethod
    def _update_sandboxes(conn: Connection, sandboxes: Sequence[Sandbox], new: dict[str, Any]) -> None:
        """Set the same columns of many sandboxes, which this transaction has read, by compare-and-set.

        Raises StoreError, which rolls the transaction back, when a writer without the writer's lock changed one.
        """
        for begin in range(0, len(sandboxes), _AT_ONCE):
            part = sandboxes[begin : begin + _AT_ONCE]
            compared = [value for sandbox in part for value in (sandbox.uuid, sandbox.state, sandbox.generation)]
            rows = ", ".join(["(?, ?, ?)"] * len(part))
            update = conn.execute(
                f"UPDATE sandboxes SET {' = ?, '.join(new)} = ?, generation = generation + 1 "
                f"WHERE (uuid, state, generation) IN (VALUES {rows})",
                (*new.values(), *compared),
            )
            if update.rowcount != len(part):
                raise StoreError(
                    "another program changed the records while they were written, and did not wait for its turn (a "
                    "person with psql?); nothing was written. Run again"
                )

    def forget_snippet_host(self, uuid: str) -> None:
        """Write that the sandbox's snippet is on no host any more. Needs no claim: only a removed file is forgotten."""
        query = "UPDATE sandboxes SET snippet_host = NULL WHERE uuid = ?"
        self.db.write(lambda conn: conn.execute(query, (uuid,)) and None, checked=True)

    def amend(self, sandbox: Sandbox, operation: str, **values: Any) -> Sandbox:
        """Change columns that do not concern the VM (protected, keepalive, absent_seen_at), with an event.

        Needs no claim.

        Raises Kept (busy) when the sandbox is to be protected but its delete is already decided. ``write_journal`` has
        the other side of this check.
        """

        def work(conn: Connection) -> Sandbox:
            if values.get("protected"):
                row = conn.execute(
                    "SELECT phase FROM operations WHERE sandbox_uuid = ? AND kind = 'destroy'", (sandbox.uuid,)
                ).fetchone()
                if row and row["phase"] in TOO_LATE_TO_PROTECT:
                    raise Kept(
                        "busy", f"cannot protect sandbox {sandbox.vmid}: it is being destroyed", vmid=sandbox.vmid
                    )
            amended = self._update_sandbox(conn, sandbox, values)
            self._insert_event(conn, sandbox, sandbox.state, sandbox.state, operation, outcome="done", evidence=values)
            return amended

        return self.db.write(work, checked=True)

    def confirm_address(self, sandbox: Sandbox) -> Sandbox:
        """Store that the guest agent reported the recorded address again, and return the record.

        Writes no event and no new generation, because nothing changed for other runs.
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
        """Write an event without a change: an object was looked at, refused or left alone."""

        def work(conn: Connection) -> None:
            self.write_event(conn, sandbox, operation, outcome=outcome, reason=reason, evidence=evidence, upids=upids)

        self.db.write(work, checked=True)

    def write_event(self, conn: Connection, sandbox: Sandbox, operation: str, **values: Any) -> None:
        """Write an event without a state change, in the caller's transaction; ``values`` as in ``note``."""
        state = self._read_state(conn, sandbox)
        self._insert_event(conn, sandbox, state, state, operation, **values)
