# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Answers of a daemon, as the tests of the command line give them to the stand-in."""

from __future__ import annotations

from typing import Any

from support.cli import StandIn

REFUSED = "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use --force to bypass"


def bulk(daemon: StandIn, status: int, *results: dict[str, Any]) -> None:
    """Let the daemon answer a destroy of several with this status and these results."""
    daemon.replies["POST", "/v1/sandboxes/destroy"] = (
        status,
        {"results": list(results), "failed_count": sum(1 for result in results if result["failed"])},
    )


def event(number: int, operation: str, before: str | None, after: str | None) -> dict[str, Any]:
    """Return an event as the API shows it. ``before`` and ``after`` are states."""
    return {
        "id": number,
        "at": "2026-01-30T00:45:07Z",
        "sandbox_uuid": "u",
        "vmid": 1000,
        "from_state": before,
        "to_state": after,
        "operation": operation,
        "actor": "alice",
        "reason": None,
        "evidence": {},
        "upids": [],
        "duration_ms": 5,
        "outcome": "ok",
    }


def workspace(name: str) -> dict[str, Any]:
    """Return a detached workspace as the API shows it."""
    return {
        "id": "7b1f",
        "name": name,
        "state": "DETACHED",
        "size": 10 * 1024**3,
        "storage": "local-lvm",
        "node": "pve1",
        "volume": "local-lvm:x",
        "owner_vmid": 990000,
        "vmid": None,
        "sandbox": None,
        "sandbox_uuid": None,
        "device": "scsi1",
        "lease_expires_at": None,
        "created_at": "2026-01-30T00:45:00Z",
        "updated_at": "2026-01-30T00:45:00Z",
        "state_changed_at": "2026-01-30T00:45:00Z",
        "reason": None,
        "size_gb": 10,
        "volid": "local-lvm:x",
        "attached_vmid": None,
    }
