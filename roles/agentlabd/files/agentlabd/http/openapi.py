# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the OpenAPI document from the table of routes.

This file describes the form of the answers. Tests compare the daemon's answers with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentlab_core import patterns, states
from agentlab_core.errors import REMEDIES

from .. import __version__
from .fields import compose_object_schema
from .route import Route

_TEXT: dict[str, Any] = {"type": "string"}
_MAYBE: dict[str, Any] = {"type": ["string", "null"]}
_WHOLE: dict[str, Any] = {"type": "integer"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_ANY: dict[str, Any] = {"type": "object"}
_STATE: dict[str, Any] = {"type": "string", "enum": list(states.STATES)}
_TIME: dict[str, Any] = {
    "type": ["string", "null"],
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$",
    "description": "UTC",
}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _object(properties: dict[str, Any], optional: Sequence[str] = (), *, more: bool = False) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": more,
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_SANDBOX: dict[str, Any] = {
    "uuid": _TEXT,
    "vmid": _WHOLE,
    "name": _TEXT,
    "profile": _MAYBE,
    "state": _STATE,
    "node": _MAYBE,
    "ip": _MAYBE,
    "ip_seen_at": _TIME,
    "workspace_id": _MAYBE,
    "tags": _list(_TEXT),
    "protected": _FLAG,
    "keepalive": _FLAG,
    "lease_expires_at": _TIME,
    "created_at": _TIME,
    "updated_at": _TIME,
    "state_changed_at": _TIME,
}
_OUTCOME: dict[str, Any] = {
    "previous_state": _MAYBE,
    "outcome": _TEXT,
    "changed": _FLAG,
    "reason": _MAYBE,
    "message": _MAYBE,
    "upids": _list(_TEXT),
    "warnings": _list(_TEXT),
}
_RESULT: dict[str, Any] = {
    **_OUTCOME,
    "vmid": {"type": ["integer", "null"]},
    "uuid": _MAYBE,
    "name": _MAYBE,
    "state": _MAYBE,
    "failed": _FLAG,
}
_WORKSPACE: dict[str, Any] = {
    "id": _TEXT,
    "name": _TEXT,
    "state": _TEXT,
    "size": {**_WHOLE, "description": "bytes"},
    "storage": _TEXT,
    "node": _MAYBE,
    "volume": _TEXT,
    "owner_vmid": _WHOLE,
    "vmid": {"type": ["integer", "null"]},
    "sandbox": _MAYBE,
    "sandbox_uuid": _MAYBE,
    "device": _TEXT,
    "lease_expires_at": _TIME,
    "created_at": _TIME,
    "updated_at": _TIME,
    "state_changed_at": _TIME,
    "reason": _MAYBE,
    # Names that the original command line reads.
    "size_gb": {**_WHOLE, "description": "size in GiB, rounded up"},
    "volid": _TEXT,
    "attached_vmid": {"type": ["integer", "null"]},
}
_EVENT: dict[str, Any] = {
    "id": _WHOLE,
    "at": _TIME,
    "sandbox_uuid": _TEXT,
    "vmid": _WHOLE,
    "from_state": _MAYBE,
    "to_state": _MAYBE,
    "operation": _TEXT,
    "actor": _TEXT,
    "reason": _MAYBE,
    "evidence": _ANY,
    "upids": _list(_TEXT),
    "duration_ms": {"type": ["integer", "null"]},
    "outcome": _TEXT,
    # Names that the original command line reads.
    "ts": _TIME,
    "kind": _TEXT,
    "sandbox_vmid": _WHOLE,
    "job_id": {"type": "null"},
    "msg": _TEXT,
    "json": _ANY,
}
_ENTRY: dict[str, Any] = {
    "vmid": _WHOLE,
    "name": _TEXT,
    "managed": _FLAG,
    "profile": _MAYBE,
    "agentlab_state": _MAYBE,
    "proxmox_status": _MAYBE,
    "agentlab_ip": _MAYBE,
    "tags": _list(_TEXT),
    "drift": _list(_TEXT),
}
_COUNTS: dict[str, Any] = {"type": "object", "additionalProperties": _WHOLE}
_ISSUES: dict[str, Any] = _list(_object({"code": _TEXT, "field": _TEXT, "message": _TEXT}))
_FINDING: dict[str, Any] = {"type": "string", "enum": ["ok", "warning", "problem", "unknown"]}
_JOB: dict[str, Any] = {"last_run": _TIME, "next_run": _TIME, "last_error": _MAYBE}

SCHEMAS: dict[str, Any] = {
    "Error": _object(
        {
            "error": {**_TEXT, "description": "one sentence"},
            "code": {**_TEXT, "description": "a stable word"},
            "remedy": {"type": "string", "enum": sorted(REMEDIES), "description": "what can be done about it"},
        },
        ("remedy",),
        more=True,
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Sandbox": _object(_SANDBOX),
    # The owner (the creator) is shown only on request.
    "ListedSandbox": _object({**_SANDBOX, "owner": _MAYBE, "connection": _MAYBE}, ("owner", "connection")),
    "Sandboxes": _object({"sandboxes": _list(_ref("ListedSandbox"))}),
    "Item": _object({**_SANDBOX, **_OUTCOME, "placement": _ANY}, ("placement",)),
    "Result": _object(_RESULT, ("warnings",), more=True),
    "Results": _object({"results": _list(_ref("Result")), "failed_count": _WHOLE}),
    "Lease": _object(
        {"vmid": _WHOLE, "lease_expires_at": _TIME, "granted_seconds": _WHOLE, "capped": _FLAG, "changed": _FLAG}
    ),
    "Prune": _object(
        {"count": _WHOLE, "dry_run": _FLAG, **{name: _list(_ref("Result")) for name in ("pruned", "kept", "failed")}}
    ),
    "Drift": _object(
        {
            "drift": _list(
                _object(
                    {
                        "kind": _TEXT,
                        "action": _TEXT,
                        "vmid": {"type": ["integer", "null"]},
                        "uuid": _MAYBE,
                        "state": _MAYBE,
                        "evidence": _ANY,
                        "applied": _FLAG,
                        "error": _MAYBE,
                    }
                )
            ),
            "count": _WHOLE,
            "applied": _FLAG,
            "dry_run": _FLAG,
            "checked": _WHOLE,
            "drifted": _WHOLE,
            "reconciled": _WHOLE,
            "results": _list(_object(_ENTRY)),
        }
    ),
    "Events": _object({"events": _list(_object(_EVENT)), "last_id": _WHOLE}),
    "Inventory": _object({"sandboxes": _list(_object(_ENTRY))}),
    "StopAll": _object(
        {
            "total": _WHOLE,
            "stopped": _WHOLE,
            "skipped": _WHOLE,
            "failed": _WHOLE,
            "results": _list(
                _object(
                    {
                        "vmid": _WHOLE,
                        "name": _TEXT,
                        "profile": _MAYBE,
                        "state": _STATE,
                        "result": {"type": "string", "enum": ["stopped", "skipped", "failed"]},
                        "error": _MAYBE,
                    }
                )
            ),
        }
    ),
    "ValidatedPlan": _object({"ok": _FLAG, "errors": _ISSUES, "warnings": _ISSUES, "plan": _ANY}),
    "Rebound": _object(
        {
            "workspace": _ref("Workspace"),
            "sandbox": _ref("Sandbox"),
            "old_vmid": {"type": ["integer", "null"]},
            "warnings": _list(_TEXT),
        }
    ),
    "Workspace": _object(_WORKSPACE),
    "Workspaces": _object({"workspaces": _list(_ref("Workspace"))}),
    "WorkspaceItem": _object({**_WORKSPACE, "outcome": _TEXT, "changed": _FLAG}),
    "Profiles": _object(
        {
            "profiles": _list(
                _object(
                    {
                        "name": _TEXT,
                        "description": _MAYBE,
                        "template_vmid": {**_WHOLE, "description": "0 for a template that is named"},
                        "updated_at": _TIME,
                    },
                    more=True,
                )
            )
        }
    ),
    "Cleanup": _object(
        {
            "count": _WHOLE,
            "dry_run": _FLAG,
            "candidates": _WHOLE,
            "forgotten": _WHOLE,
            "guard": _MAYBE,
            **{name: _list(_ref("Result")) for name in ("pruned", "marked", "kept", "failed")},
        }
    ),
    "Freeze": _object(
        {"reason": _TEXT, "at": _MAYBE, "actor": _MAYBE, "leases": {**_FLAG, "description": "leases rest, too"}}
    ),
    "Frozen": _object(
        {
            "frozen": {"anyOf": [_ref("Freeze"), {"type": "null"}]},
            "released": {"anyOf": [_ref("Freeze"), {"type": "null"}]},
        },
        ("released",),
    ),
    "Status": _object(
        {
            "version": _TEXT,
            "started_at": _TIME,
            "uptime_seconds": _WHOLE,
            "database": _object(
                {"path": _TEXT, "schema": _WHOLE, "by_state": {"type": "object", "additionalProperties": _WHOLE}}
            ),
            "proxmox": _object(
                {"where": _TEXT, "reachable": {"type": ["boolean", "null"]}, "last_error": _MAYBE, "requests": _WHOLE}
            ),
            "expiry": _object(_JOB),
            "reconcile": _object(_JOB),
            "cleanup": _object(
                {
                    "enabled": _FLAG,
                    "mode": _TEXT,
                    **_JOB,
                    "last_result": {"type": ["object", "null"]},
                    "frozen": {"anyOf": [_ref("Freeze"), {"type": "null"}]},
                }
            ),
            "operations": _object({"in_progress": _WHOLE, "interrupted": _WHOLE}),
            "unrecorded": _list(_object({"vmid": _WHOLE, "name": _MAYBE, "node": _MAYBE})),
            "conditions": {
                **_list(
                    _object(
                        {
                            "part": _TEXT,
                            "condition": {"enum": ["rests", "waits", "fails"]},
                            "since": _MAYBE,
                            "why": _TEXT,
                            "todo": _TEXT,
                        }
                    )
                ),
                "description": "what does not do its work: how, since when, why, and what to do; empty when all is as "
                "usual",
            },
            "config": _object({"path": _MAYBE, "loaded_at": _TIME, "error": _MAYBE}),
            "api_schema_version": _WHOLE,
            "event_schema_version": _WHOLE,
            "sandboxes": _COUNTS,
            "jobs": _COUNTS,
            "network_modes": _COUNTS,
            "artifacts": _ANY,
            "metrics": _object({"enabled": _FLAG}),
            "recent_failures": _list(_object(_EVENT)),
        }
    ),
    "Doctor": _object(
        {
            "status": _FINDING,
            "problems": _WHOLE,
            "pveum": {**_list(_TEXT), "description": "commands for a token with the least privileges"},
            "findings": _list(
                _object({"check": _TEXT, "status": _FINDING, "meaning": _TEXT, "advice": _MAYBE, "facts": _ANY})
            ),
            "bundle": {"type": ["object", "null"]},
        }
    ),
    "Run": _object(
        {
            "vmid": _WHOLE,
            "run_id": _TEXT,
            "state": {"type": "string", "enum": ["ended", "running", "skipped"]},
            "rc": {
                "type": ["integer", "null"],
                "description": "exit status; 128 and the signal's number after a signal",
            },
            "signal": {"type": ["integer", "null"]},
            "stdout": _TEXT,
            "stderr": _TEXT,
            "encoding": {"type": "string", "enum": ["utf-8", "base64"]},
            "stdout_bytes": {**_WHOLE, "description": "bytes that the guest holds"},
            "stderr_bytes": _WHOLE,
            "truncated": _FLAG,
            "timed_out": _FLAG,
            "killed": _FLAG,
            "duration_ms": _WHOLE,
            "message": _MAYBE,
            "changed": _FLAG,
        }
    ),
    "Runs": _object({"vmid": _WHOLE, "runs": _list(_object({"run_id": _TEXT, "state": _TEXT}, more=True))}),
    "File": _object({"vmid": _WHOLE, "path": _TEXT, "size": _WHOLE, "mode": _TEXT, "sha256": _TEXT}),
    "OpenApi": _object({"openapi": _TEXT}, more=True),
}
_FILE_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_WHY = {
    400: "The request makes no sense",
    404: "sandbox (or workspace) not found",
    409: "The state of things forbids it",
    413: "The body is too large",
    502: "Proxmox refused, or its task failed",
    503: "Proxmox cannot be reached, or the daemon is stopping",
    504: "Proxmox did not answer in time",
}


def compose_document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the whole document."""
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe_operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentlabd",
            "version": __version__,
            "description": "Throw-away VMs with leases on Proxmox VE.",
            "license": {"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _describe_operation(route: Route) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = []
    if "{vmid}" in route.path:
        parameters.append(
            {
                "name": "vmid",
                "in": "path",
                "required": True,
                "schema": {"type": "integer", "minimum": patterns.MIN_VMID, "maximum": patterns.MAX_VMID},
            }
        )
    if "{id}" in route.path:
        parameters.append(
            {
                "name": "id",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"}
                if "{vmid}" in route.path
                else {"type": "string", "minLength": 1, "maxLength": 100},
            }
        )
    for name, field in route.query.items():
        schema = {key: value for key, value in field.compose_schema().items() if key != "description"}
        parameters.append(
            {"name": name, "in": "query", "required": field.required, "description": field.text, "schema": schema}
        )
    operation: dict[str, Any] = {"operationId": route.name, "summary": route.summary, "parameters": parameters}
    if route.body is not None:
        operation["requestBody"] = {
            # A body is needed too where one of several fields is: no single one is required then.
            "required": any(field.required for field in route.body.values())
            or bool({"anyOf", "oneOf"} & route.together.keys()),
            "content": {"application/json": {"schema": {**compose_object_schema(route.body), **route.together}}},
        }
    if route.receives_file:
        operation["requestBody"] = {"required": True, "content": _FILE_CONTENT}
    errors = [400]
    if "{" in route.path or route.name == "destroy_sandboxes":
        errors.append(404)
    if route.changes:
        errors += [409, 413]
        if not route.quick:
            errors += [502, 504]
    elif route.inside:
        errors += [409, 502, 504]
    errors.append(503)
    operation["responses"] = {
        str(status): _describe_response(_describe_status(status), schema) for status, schema in route.answers.items()
    }
    if route.sends_file:
        operation["responses"]["200"] = {"description": _describe_status(200), "content": _FILE_CONTENT}
    operation["responses"].update({str(status): _describe_response(_WHY[status], "Error") for status in errors})
    operation["responses"]["default"] = _describe_response("Any other error", "Error")
    return operation


def _describe_status(status: int) -> str:
    return {
        200: "Done",
        201: "Created",
        202: "Begun; it goes on by itself",
        207: "Some items failed; each has its own outcome",
    }[status]


def _describe_response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}
