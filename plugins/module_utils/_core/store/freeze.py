# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The freeze: the note in the records that cleanup rests, and after a restore that leases rest too."""

from __future__ import annotations

import json
from typing import Any

from .. import clock as clock_module
from .records import Records

# The note of a freeze, in the table meta.
FROZEN = "cleanup_frozen"


def read_freeze(records: Records) -> dict[str, Any] | None:
    """Return why, since when and by whom cleanup is frozen, and whether leases rest too; None while it is not."""
    text = records.read_meta(FROZEN)
    if not text:
        return None
    try:
        note = json.loads(text)
        return {**{name: str(note[name]) for name in ("reason", "at", "actor")}, "leases": bool(note.get("leases"))}
    except (ValueError, TypeError, KeyError, AttributeError):
        # A person or a pass froze cleanup. Cleanup stays frozen although the reason is lost.
        return {
            "reason": f"its reason cannot be read (meta.value of key {FROZEN} is damaged)",
            "at": None,
            "actor": None,
            "leases": False,
        }


def freeze_for_older_copy(records: Records, event: int, noted_event: int) -> None:
    """Freeze cleanup and leases, because the newest event is older than the one noted before (ids of events)."""
    _write_freeze(
        records,
        f"the records were replaced by an older copy (its last event is {event}, {noted_event} was the last one "
        "before)",
    )
    records.db.note_event(event)


def freeze_for_lost_commits(records: Records) -> None:
    """Freeze cleanup and leases, because the database server lost commits of this process."""
    _write_freeze(
        records, "the server lost commits that it had confirmed, as after a failover to an asynchronous standby"
    )
    records.db.forget_lost_commits()


def _write_freeze(records: Records, reason: str) -> None:
    """Write the note of a freeze that also holds leases. The reason of an earlier freeze stays in front."""
    known = read_freeze(records)
    if known:
        reason = f"{known['reason']}; and {reason}"
    at = clock_module.format_utc(records.clock.now())
    note = {"reason": reason, "at": at, "actor": records.actor, "leases": True}
    records.set_meta(FROZEN, json.dumps(note))


def detect_older_copy(records: Records) -> None:
    """Freeze cleanup and leases if the records that were just opened are an older copy.

    Call this before the first event of a run. After some events an older copy looks as new as the replaced records.
    """
    noted_event = records.db.read_noted_event()
    if noted_event and (event := records.db.read_latest_event()) < noted_event:
        freeze_for_older_copy(records, event, noted_event)
