# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The journal of unfinished operations: the phases of each, and what a creation and a destroy note in it.

A phase is written before the first request of that phase is sent. So the entry that a killed run leaves names the
request that may have been carried out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import DamagedRecord
from .port import Row

# ---- phases of a creation ----

# No clone request is under way: none was sent, or Proxmox made nothing.
RESERVED = "reserved"
# The clone request may have been sent.
CLONING = "cloning"
# The VM is bound; its options are being written.
CONFIGURING = "configuring"
# The VM was started.
STARTED = "ready"
# The creation ended while waiting; the next run resumes it.
AWAITED = "awaited"

# ---- phases of a destroy ----

VERIFYING = "verifying"
STOPPING = "stopping"
DETACHING = "detaching"
# The delete request may have been sent.
DELETING = "deleting"

# ---- phases of several operations ----

# A creation or a destroy waits for its task, whose id is noted.
WAITING = "waiting"
# A start, a stop or a suspend may have been sent.
REQUESTED = "requested"

# Each kind of operation, and the phases in which a killed run can leave it.
PHASES = {
    "create": (RESERVED, CLONING, WAITING, CONFIGURING, STARTED, AWAITED),
    "destroy": (VERIFYING, STOPPING, DETACHING, DELETING, WAITING),
    "start": (REQUESTED,),
    "stop": (REQUESTED,),
    "suspend": (REQUESTED,),
}

# Phases of a creation in which Proxmox may still carry the clone out.
CLONE_SENT = (CLONING, WAITING)
# Phases of a destroy in which the VM may already be deleted.
POINT_OF_NO_RETURN = (DELETING, WAITING)
# From the first of these phases on, protecting the sandbox is too late. An interrupted destroy in that phase is still
# checked against the rules again.
TOO_LATE_TO_PROTECT = (DETACHING, *POINT_OF_NO_RETURN)

# Keys of an entry's detail that the code relies on, with their types. A missing key is valid.
_DETAIL_KINDS: dict[str, tuple[type, str]] = {
    "upid": (str, "a text"),
    "phase": (str, "a text"),
    "template_node": (str, "a text"),
    "disk_size": (str, "a text"),
    "since": (int, "a whole number"),
    "at": (int, "a whole number"),
    "create": (dict, "an object"),
}


@dataclass(slots=True)
class CreationNote:
    """What a creation notes: for the run that resumes it, and for the destroy that has to tell its VM."""

    # VMID, name and node of the template.
    template: int | None = None
    template_name: str | None = None
    template_node: str | None = None
    # The node on which the VM is made.
    node: str | None = None
    # False in entries of earlier releases, which lack ``full`` and ``storage``.
    knows_mode: bool = False
    # A full clone (True), a linked one (False), or whichever Proxmox makes of that template (None).
    full: bool | None = None
    storage: str | None = None
    # The node was ours to choose.
    chosen: bool = False
    # The clone task.
    upid: str | None = None
    # The size to which the disk is to grow.
    disk_size: str | None = None
    # The clone task outlasted wait_timeout, and the caller was told to run again.
    awaited: bool = False
    # Phase of the entry, and when it was written (seconds since the epoch). The entry has columns for them.
    phase: str = ""
    at: int = 0

    @classmethod
    def read(cls, detail: dict[str, Any], phase: str, at: int) -> CreationNote:
        """Return the note in an entry's detail."""
        return cls(
            template=detail.get("template"),
            template_name=detail.get("template_name"),
            template_node=detail.get("template_node"),
            node=detail.get("node"),
            knows_mode="full" in detail,
            full=detail.get("full"),
            storage=detail.get("storage"),
            chosen=bool(detail.get("chosen")),
            upid=detail.get("upid") or None,
            disk_size=detail.get("disk_size"),
            awaited=bool(detail.get("awaited")),
            phase=phase,
            at=at,
        )

    def format_detail(self) -> dict[str, Any]:
        """Return the note as the detail of an entry, without phase and time."""
        detail: dict[str, Any] = {
            "template": self.template,
            "template_name": self.template_name,
            "template_node": self.template_node,
            "node": self.node,
        }
        if self.knows_mode:
            detail.update(full=self.full, storage=self.storage)
        present = {"chosen": self.chosen, "upid": self.upid, "disk_size": self.disk_size, "awaited": self.awaited}
        detail.update({name: value for name, value in present.items() if value})
        return detail

    def format_detail_put_back(self) -> dict[str, Any]:
        """Return the note as the detail of an entry that takes the place of a destroy, with the creation's own time."""
        return {**self.format_detail(), "at": self.at}

    @property
    def clone_sent(self) -> bool:
        """Return whether Proxmox may still carry the clone out."""
        return self.phase in CLONE_SENT


@dataclass(slots=True)
class DestroyNote:
    """What a destroy notes: the request, and what the next run needs to finish it."""

    operation: str = "destroy"
    force: bool = False
    # The note of the creation whose entry this one replaced. By it an unbound VM is recognised.
    creation: CreationNote | None = None
    # The delete task.
    upid: str | None = None
    # When the delete was sent, at the latest (seconds since the epoch); None before that.
    since: int | None = None

    @classmethod
    def read(cls, detail: dict[str, Any]) -> DestroyNote:
        """Return the note in an entry's detail."""
        created = detail.get("create")
        return cls(
            operation=str(detail.get("operation") or "destroy"),
            force=bool(detail.get("force")),
            creation=CreationNote.read(created, str(created.get("phase") or ""), int(created.get("at") or 0))
            if isinstance(created, dict)
            else None,
            upid=detail.get("upid") or None,
            since=detail.get("since"),
        )

    def format_detail(self) -> dict[str, Any]:
        """Return the note as the detail of an entry."""
        detail: dict[str, Any] = {"operation": self.operation, "force": self.force}
        if self.creation is not None:
            detail["create"] = {**self.creation.format_detail(), "phase": self.creation.phase, "at": self.creation.at}
        if self.upid is not None:
            detail["upid"] = self.upid
        if self.since is not None:
            detail["since"] = self.since
        return detail


@dataclass(slots=True)
class JournalEntry:
    """A journal entry: the unfinished operation on a sandbox, and its phase."""

    sandbox_uuid: str
    kind: str
    phase: str
    detail: dict[str, Any]
    actor: str
    started_at: int
    updated_at: int

    @classmethod
    def from_row(cls, row: Row) -> JournalEntry:
        """Return the entry in a row of the table operations. Raises DamagedRecord, which names an invalid value."""
        try:
            detail = json.loads(row["detail"])
        except (ValueError, TypeError):
            detail = None
        wrong: str | None = None if isinstance(detail, dict) else "a JSON object"
        wrong = wrong or _describe_wrong_detail(detail) or _describe_wrong_detail(detail.get("create") or {})
        if wrong:
            raise DamagedRecord("operations", f"sandbox_uuid {row['sandbox_uuid']}", "detail", wrong)
        for name in ("started_at", "updated_at"):
            if not isinstance(row[name], int):
                raise DamagedRecord("operations", f"sandbox_uuid {row['sandbox_uuid']}", name, "a whole number")
        return cls(
            row["sandbox_uuid"], row["kind"], row["phase"], detail, row["actor"], row["started_at"], row["updated_at"]
        )

    @property
    def creation(self) -> CreationNote | None:
        """Return the creation's note, from its own entry or the destroy entry that replaced it; None without one."""
        if self.kind == "create":
            # An entry that a destroy has put back was written later than the creation's own.
            return CreationNote.read(self.detail, self.phase, self.detail.get("at", self.updated_at))
        return self.destroy.creation

    @property
    def destroy(self) -> DestroyNote:
        """Return the note of a destroy."""
        return DestroyNote.read(self.detail)

    @property
    def is_sent_delete(self) -> bool:
        """Return whether this is a destroy whose VM may already be deleted."""
        return self.kind == "destroy" and self.phase in POINT_OF_NO_RETURN


def _describe_wrong_detail(detail: dict[str, Any]) -> str | None:
    """Return what is wrong with an entry's detail, or None for a valid one."""
    for name, (kind, valid) in _DETAIL_KINDS.items():
        if name in detail and (detail[name] is not None or kind is int) and not isinstance(detail[name], kind):
            return f"a JSON object whose {name} is {valid}"
    return None
