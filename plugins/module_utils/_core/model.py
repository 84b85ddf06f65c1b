# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The record of a sandbox, and the outcome of an operation on it."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import clock, states
from .errors import Advice, AgentlabError, DamagedRecord, add_remedy


@dataclass(slots=True)
class Sandbox:
    """One record.

    Times are whole seconds since the epoch; ``smbios_uuid`` is Proxmox's own mark of the VM (None until read).
    """

    uuid: str
    vmid: int
    name: str
    state: str
    generation: int = 0
    profile: str | None = None
    node: str | None = None
    ip: str | None = None
    workspace_id: str | None = None
    tags: list[str] = field(default_factory=list)
    protected: bool = False
    keepalive: bool = False
    ttl_seconds: int = 0
    lease_expires_at: int | None = None
    created_at: int = 0
    updated_at: int = 0
    state_changed_at: int | None = None
    smbios_uuid: str | None = None
    absent_seen_at: int | None = None
    reason: str | None = None
    # The longest lease that its profile grants, in seconds.
    lease_max_seconds: int | None = None
    # Path of its cloud-init snippet on ``snippet_host``.
    snippet: str | None = None
    # When the guest agent last reported ``ip``. None: not since the sandbox was started, so the address may be stale.
    ip_seen_at: int | None = None
    # The host that wrote the snippet, as store/holders.py names it.
    snippet_host: str | None = None

    @classmethod
    def from_row(cls, row: Any) -> Sandbox:
        """Return the record of a row with COLUMNS in their order. Raises DamagedRecord for an invalid value."""
        sandbox = cls(*row)
        # A column of SQLite takes a value of any type. Most rows have the same types, so each valid combination of
        # types is checked once.
        kinds = tuple(map(type, row))
        if kinds not in _sound_kinds:
            for name, kind in zip(COLUMNS, kinds, strict=True):
                if kind not in _KINDS[name]:
                    raise sandbox.make_damage_error(name, _VALID[_KINDS[name][0]])
            _sound_kinds.add(kinds)
        for name in _TIMES:
            value = getattr(sandbox, name)
            if value is not None and not 0 <= value <= _LAST_SECOND:
                raise sandbox.make_damage_error(name, "a time in seconds since 1970")
        if sandbox.state not in states.STATES:
            raise sandbox.make_damage_error("state", f"a state ({', '.join(states.STATES)})")
        # Until here ``tags`` is the JSON text of the column.
        text: Any = sandbox.tags
        try:
            sandbox.tags = json.loads(text) if text and text != "[]" else []
        except ValueError:
            raise sandbox.make_damage_error("tags", "a JSON list of texts") from None
        if not isinstance(sandbox.tags, list) or not all(isinstance(tag, str) for tag in sandbox.tags):
            raise sandbox.make_damage_error("tags", "a JSON list of texts")
        sandbox.protected, sandbox.keepalive = bool(sandbox.protected), bool(sandbox.keepalive)
        return sandbox

    def make_damage_error(self, column: str, valid: str) -> DamagedRecord:
        """Return the error for a column of this record. ``valid`` describes a valid value."""
        return DamagedRecord("sandboxes", f"sandbox {self.vmid} (uuid {self.uuid})", column, valid)

    def copy_with(self, values: dict[str, Any]) -> Sandbox:
        """Return a copy of this record with these columns and the next generation.

        dataclasses.replace would take five times as long.
        """
        after = Sandbox(*_values(self))
        after.generation += 1
        for name, value in values.items():
            setattr(after, name, value)
        after.protected, after.keepalive = bool(after.protected), bool(after.keepalive)
        return after

    @property
    def live(self) -> bool:
        return self.state != states.DESTROYED

    def has_expired(self, now: int) -> bool:
        """Return whether the lease is over, and can expire in this state. ``now``: seconds since the epoch."""
        return (
            self.lease_expires_at is not None
            and self.lease_expires_at <= now
            and self.state in states.OPERATIONS["expire"].allowed
        )

    def public(self) -> dict[str, Any]:
        """Return the sandbox in the shape of every answer: absent values are null, times are UTC."""
        return {
            "uuid": self.uuid,
            "vmid": self.vmid,
            "name": self.name,
            "profile": self.profile,
            "state": self.state,
            "node": self.node,
            "ip": self.ip,
            "ip_seen_at": clock.format_utc(self.ip_seen_at),
            "workspace_id": self.workspace_id,
            "tags": list(self.tags),
            "protected": self.protected,
            "keepalive": self.keepalive,
            "lease_expires_at": clock.format_utc(self.lease_expires_at),
            "created_at": clock.format_utc(self.created_at),
            "updated_at": clock.format_utc(self.updated_at),
            "state_changed_at": clock.format_utc(self.state_changed_at),
        }


COLUMNS = tuple(Sandbox.__dataclass_fields__)
_TIMES = ("lease_expires_at", "created_at", "updated_at", "state_changed_at", "absent_seen_at", "ip_seen_at")
# The end of the year 9999, the last that can be written as a date.
_LAST_SECOND = 253402300799
_OF_ANNOTATION: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (int,),
    "list[str]": (str,),
}
_KINDS = {name: _OF_ANNOTATION[str(field.type)] for name, field in Sandbox.__dataclass_fields__.items()}
_VALID: dict[type, str] = {str: "a text", int: "a whole number"}
# The combinations of types that a row may have.
_sound_kinds: set[tuple[type, ...]] = set()
_values = operator.attrgetter(*COLUMNS)


@dataclass(slots=True)
class Outcome:
    """The outcome of one item.

    ``outcome`` is one word, ``reason`` tells why. ``changed``: the operation changed Proxmox VE or the records.
    """

    outcome: str
    vmid: int | None = None
    uuid: str | None = None
    name: str | None = None
    previous_state: str | None = None
    state: str | None = None
    reason: str | None = None
    message: str | None = None
    # The name of a remedy (errors.REMEDIES).
    remedy: str | None = None
    changed: bool = False
    failed: bool = False
    upids: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Warnings with a remedy.
    advice: list[Advice] = field(default_factory=list)
    sandbox: Sandbox | None = None
    # The error of a failed creation, with all its facts.
    error: AgentlabError | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, outcome: str, sandbox: Sandbox, **values: Any) -> Outcome:
        values.setdefault("previous_state", sandbox.state)
        values.setdefault("state", sandbox.state)
        return cls(outcome, vmid=sandbox.vmid, uuid=sandbox.uuid, name=sandbox.name, sandbox=sandbox, **values)

    def explain(self, words: Mapping[str, str] | None) -> str | None:
        """Return the message for one interface. ``words`` are its sentences for the remedies."""
        return self.message and add_remedy(self.message, self.remedy, words)

    def explain_warnings(self, words: Mapping[str, str] | None) -> list[str]:
        """Return all warnings for one interface. ``words`` are its sentences for the remedies."""
        return [*self.warnings, *(add_remedy(advice.message, advice.remedy, words) for advice in self.advice)]

    def public(self, words: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the outcome for answers. ``words`` are the interface's sentences for the remedies."""
        out: dict[str, Any] = {
            "vmid": self.vmid,
            "uuid": self.uuid,
            "name": self.name,
            "outcome": self.outcome,
            "previous_state": self.previous_state,
            "state": self.state,
            "reason": self.reason,
            "message": self.explain(words),
            "upids": list(self.upids),
            "changed": self.changed,
            "failed": self.failed,
        }
        if self.remedy:
            out["remedy"] = self.remedy
        if self.warnings or self.advice:
            out["warnings"] = self.explain_warnings(words)
        out.update(self.extra)
        return out
