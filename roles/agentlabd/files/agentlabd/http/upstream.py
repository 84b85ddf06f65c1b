# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Add the field names that the original command line (written in Go) reads.

Answers only gain fields; none of ours is renamed. Clients of both kinds ignore fields that they do not know.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from agentlab_core import clock, states
from agentlab_core.maintenance.reconcile import Drift
from agentlab_core.model import Outcome, Sandbox
from agentlab_core.views import info

from .answers import REMEDIES

# Schema versions in the numbering of the original.
API_SCHEMA_VERSION = 1
EVENT_SCHEMA_VERSION = 1
GIB = 1024**3
# Number of events to search for failures, and of failures to show.
EVENTS_LOOKED_THROUGH = 200
RECENT_FAILURES = 10
# The original's words for differences in its inventory.
MISSING = "missing_in_proxmox"
UNMANAGED = "unmanaged_proxmox_vm"
STOPPED = "stopped_while_marked_running"
RUNNING = "proxmox_running_state_mismatch"
_ENDS = {"done": "completed", "failed": "failed"}
_OPERATIONS = {"suspend": "pause"}


def describe_workspace(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Add ``size_gb`` (whole GiB, rounded up), ``volid`` and ``attached_vmid`` to a workspace."""
    if "size" not in shown:
        return dict(shown)
    return {**shown, "size_gb": -(-int(shown["size"]) // GIB), "volid": shown["volume"], "attached_vmid": shown["vmid"]}


def describe_event(row: dict[str, Any]) -> dict[str, Any]:
    """Add ``ts``, ``kind``, ``sandbox_vmid``, ``msg``, ``json`` and ``job_id`` to an event of the records."""
    event = info.format_event(row)
    operation, outcome = str(row["operation"]), str(row["outcome"])
    moved = (
        f"{row['from_state']} -> {row['to_state']}"
        if row["to_state"] and row["to_state"] != row["from_state"]
        else outcome
    )
    because = f" ({row['reason']})" if row["reason"] else ""
    return {
        **event,
        "ts": event["at"],
        "sandbox_vmid": row["vmid"],
        "job_id": None,
        "kind": f"sandbox.{_OPERATIONS.get(operation, operation)}.{_ENDS.get(outcome, outcome)}",
        "msg": f"{operation}: {moved}{because}, by {row['actor']}",
        "json": {name: row[name] for name in ("from_state", "to_state", "reason", "evidence", "upids", "duration_ms")},
    }


def describe_status(status: Mapping[str, Any], events: Iterable[dict[str, Any]], *, metrics: bool) -> dict[str, Any]:
    """Add the original's summary to a status. ``events`` are the latest events of all sandboxes, oldest first."""
    failures = [describe_event(row) for row in events if row["outcome"] == "failed"]
    return {
        **status,
        "api_schema_version": API_SCHEMA_VERSION,
        "event_schema_version": EVENT_SCHEMA_VERSION,
        "sandboxes": dict(status["database"]["by_state"]),
        "metrics": {"enabled": metrics},
        "recent_failures": failures[::-1][:RECENT_FAILURES],
        # Here jobs are playbooks, their files go to the controller, and there are no network modes.
        "jobs": {},
        "artifacts": {},
        "network_modes": {},
    }


def describe_profile(shown: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Add ``template_vmid`` (0 for a template given by name) and ``updated_at`` (the time of its file) to a profile."""
    template = str(shown.get("template") or "")
    try:
        written = clock.format_utc(int(os.stat(path).st_mtime))
    except OSError:
        # The file was removed after it was read.
        written = None
    return {
        **shown,
        "template_vmid": int(template) if template.isascii() and template.isdecimal() else 0,
        "updated_at": written,
    }


def describe_stop(sandbox: Sandbox, outcome: Outcome | None) -> dict[str, Any]:
    """Return the answer for one sandbox of stop_all. ``outcome`` None: the sandbox did not need to be stopped."""
    result = (
        "skipped" if outcome is None or outcome.outcome == "unchanged" else "failed" if outcome.failed else "stopped"
    )
    return {
        "vmid": sandbox.vmid,
        "name": sandbox.name,
        "profile": sandbox.profile,
        "state": outcome.state if outcome else sandbox.state,
        "result": result,
        "error": (outcome.explain(REMEDIES) or outcome.reason) if outcome and outcome.failed else None,
    }


def _describe_entry(
    sandbox: Sandbox | None, vmid: int, row: Mapping[str, Any] | None, drift: list[str]
) -> dict[str, Any]:
    return {
        "vmid": vmid,
        "name": sandbox.name if sandbox else str((row or {}).get("name") or ""),
        "managed": sandbox is not None,
        "profile": sandbox.profile if sandbox else None,
        "agentlab_state": sandbox.state if sandbox else None,
        "proxmox_status": str(row["status"]) if row and row.get("status") else None,
        "agentlab_ip": sandbox.ip if sandbox else None,
        "tags": list(sandbox.tags) if sandbox else [],
        "drift": drift,
    }


def _find_drift(sandbox: Sandbox, row: Mapping[str, Any] | None) -> list[str]:
    """Return the differences between a sandbox's state and its row of the VM list, in the original's words."""
    if row is None:
        # A creation that has just begun has no VM yet.
        return [] if sandbox.state == states.REQUESTED else [MISSING]
    status = str(row.get("status"))
    if status == "stopped" and sandbox.state in states.POWERED:
        return [STOPPED]
    return [RUNNING] if status == "running" and sandbox.state == states.STOPPED else []


def describe_inventory(
    sandboxes: Iterable[Sandbox], rows: Mapping[int, Mapping[str, Any]], vmid_range: tuple[int, int]
) -> list[dict[str, Any]]:
    """Return the live sandboxes with their row of the VM list, and the VMs in the configured range without a record."""
    by_vmid = {sandbox.vmid: sandbox for sandbox in sandboxes}
    low, high = vmid_range
    entries = [
        _describe_entry(sandbox, vmid, rows.get(vmid), _find_drift(sandbox, rows.get(vmid)))
        for vmid, sandbox in by_vmid.items()
    ]
    entries += [
        _describe_entry(None, vmid, row, [UNMANAGED])
        for vmid, row in rows.items()
        if low <= vmid <= high and vmid not in by_vmid and not row.get("template")
    ]
    return sorted(entries, key=lambda entry: int(entry["vmid"]))


def describe_drift(drifts: list[Drift], checked: int, *, applied: bool) -> dict[str, Any]:
    """Return the answer to a reconcile: our fields, and the original's.

    The original's are ``dry_run``, ``checked``, ``drifted``, ``reconciled`` and ``results``.
    """
    results = []
    for drift in drifts:
        if drift.sandbox is not None or drift.vmid is not None:
            vmid = drift.sandbox.vmid if drift.sandbox else int(drift.vmid or 0)
            results.append({**_describe_entry(drift.sandbox, vmid, None, [drift.kind])})
    return {
        "drift": [drift.public() for drift in drifts],
        "count": len(drifts),
        "applied": applied,
        "dry_run": not applied,
        "checked": checked,
        "drifted": len(drifts),
        # The first absence is only noted, so it does not count.
        "reconciled": sum(drift.applied and not drift.action.startswith("noted") for drift in drifts),
        "results": results,
    }
