# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The API as one table: the routes, the fields of their requests, and their handlers.

The OpenAPI document is made from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentlab_core import patterns, states
from agentlab_core.workspaces import workspace

from . import creation, doctor, inside, maintenance, openapi, sandboxes, status, workspaces
from .answers import Answer
from .creation import CREATION, LIFETIME, split_tags
from .fields import Field
from .route import Call, Route


def describe_api(call: Call) -> Answer:
    """Return the OpenAPI document of this table."""
    return Answer(openapi.compose_document(ROUTES))


_VMID = Field("integer", "VMID of the sandbox", low=patterns.MIN_VMID, high=patterns.MAX_VMID)


_DISCARD = Field("boolean", "throw the saved memory of a hibernated VM away")


_FORCE = Field("boolean", "destroy it whatever its state; identity and protection are judged all the same")


_OLD = Field("duration", "only what entered its state longer ago than this", low=0)


_NOT_NULL: dict[str, Any] = {"not": {"type": "null"}}


_NOT_BOTH: dict[str, Any] = {
    "not": {"required": ["ttl", "ttl_minutes"], "properties": {"ttl": _NOT_NULL, "ttl_minutes": _NOT_NULL}}
}


_ONE_OF_THEM: dict[str, Any] = {
    "anyOf": [{"required": [name], "properties": {name: _NOT_NULL}} for name in ("ttl", "ttl_minutes")]
}


_ADOPT_APPLIED: dict[str, Any] = {
    "not": {
        "required": ["adopt_cluster"],
        "properties": {"adopt_cluster": {"const": True}, "apply": {"enum": [False, None]}},
    }
}


ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/healthz", "healthz", "Whether the daemon answers", status.healthz, {200: "Health"}, quick=True),
    Route(
        "GET",
        "/v1/status",
        "status",
        "Show the state of the daemon, its last and next runs, and what blocks them",
        status.status,
        {200: "Status"},
        quick=True,
    ),
    Route(
        "GET",
        "/v1/doctor",
        "doctor",
        "Check configuration, records, Proxmox VE and daemon, and name the remedies; reads only",
        doctor.examine,
        {200: "Doctor"},
        apart=True,
        query={
            "template": Field(
                "string", "VMID or name of the template to check, instead of the configured one", longest=100
            ),
            "bundle": Field("boolean", "add a bundle for a bug report, without secrets"),
            "bundle_hosts": Field("boolean", "keep names and addresses of hosts, nodes and VMs in the bundle"),
        },
    ),
    Route("GET", "/v1/openapi.json", "openapi", "This document", describe_api, {200: "OpenApi"}, quick=True),
    Route(
        "GET",
        "/v1/sandboxes",
        "list_sandboxes",
        "List sandboxes by VMID",
        sandboxes.list_sandboxes,
        {200: "Sandboxes"},
        quick=True,
        query={
            "state": Field("strings", "only these states", valid=states.STATES, most=20),
            "profile": Field("string", "only this profile", longest=100),
            "tag": Field("strings", "only those with one of these tags", longest=100, most=20, split=split_tags),
            "include_destroyed": Field("boolean", "destroyed ones too"),
            "owner": Field(
                "boolean", "tell of each live one who created it, and the connection plugin that its profile names"
            ),
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes",
        "create_sandbox",
        "Create and start a sandbox; an existing one of that name or VMID stays as it is",
        creation.create_sandbox,
        {201: "Item", 200: "Item"},
        operation="create",
        body={**CREATION, "dry_run": Field("boolean", "only say what would be made, and on which node")},
        together=_NOT_BOTH,
    ),
    Route(
        "POST",
        "/v1/sandboxes/destroy",
        "destroy_sandboxes",
        "Destroy several sandboxes; each has its own outcome",
        sandboxes.destroy_sandboxes,
        {200: "Results", 207: "Results"},
        operation="destroy",
        body={
            "vmids": Field(
                "integers", "VMIDs", required=True, low=patterns.MIN_VMID, high=patterns.MAX_VMID, most=10000
            ),
            "force": _FORCE,
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes/prune",
        "prune_sandboxes",
        "Destroy sandboxes whose lease has ended; name each that is kept, with the reason",
        maintenance.prune_sandboxes,
        {200: "Prune", 207: "Prune"},
        operation="prune",
        body={
            "older_than": _OLD,
            "dry_run": Field("boolean", "say what would be done, do nothing"),
            "states": Field("strings", "states to prune, TIMEOUT unless set", valid=states.PRUNABLE, most=10),
            "tags": Field("strings", "only those with one of these tags", longest=100, split=split_tags),
            "max_count": Field("integer", "do nothing at all if more than this would be pruned", low=0, high=1000000),
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes/reconcile",
        "reconcile_sandboxes",
        "Compare the records with Proxmox; repair drift if asked to",
        maintenance.reconcile_sandboxes,
        {200: "Drift"},
        operation="reconcile",
        body={
            "apply": Field("boolean", "repair what can be repaired"),
            "dry_run": Field("boolean", "false is the same as apply; give one of the two"),
            "adopt_cluster": Field("boolean", "with apply: note this cluster as the one the records belong to"),
        },
        together=_ADOPT_APPLIED,
    ),
    Route(
        "POST",
        "/v1/sandboxes/stop_all",
        "stop_all_sandboxes",
        "Stop every running or paused sandbox",
        sandboxes.stop_all_sandboxes,
        {200: "StopAll", 207: "StopAll"},
        operation="stop",
        body={"force": Field("boolean", "taken and without effect: no job holds a sandbox")},
    ),
    Route(
        "POST",
        "/v1/sandboxes/validate-plan",
        "validate_plan",
        "Check the options of a creation, and create nothing",
        creation.validate_plan,
        {200: "ValidatedPlan"},
        body=CREATION,
        together=_NOT_BOTH,
    ),
    Route(
        "GET",
        "/v1/sandboxes/inventory",
        "list_inventory",
        "Sandboxes beside Proxmox's VM list, and VMs of the range without a record",
        sandboxes.list_inventory,
        {200: "Inventory"},
    ),
    Route(
        "GET",
        "/v1/sandboxes/{vmid}",
        "show_sandbox",
        "The live sandbox of that VMID, or else the last destroyed one",
        sandboxes.show_sandbox,
        {200: "Sandbox"},
        quick=True,
    ),
    Route(
        "GET",
        "/v1/sandboxes/{vmid}/events",
        "list_events",
        "List the events of the sandboxes of that VMID, oldest first",
        sandboxes.list_events,
        {200: "Events"},
        quick=True,
        query={
            "tail": Field("integer", "only the last so many", low=0, high=1000),
            "after": Field("integer", "only those with a higher id", low=0, high=2**62),
            "limit": Field("integer", "at most so many", low=1, high=1000),
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes/{vmid}/destroy",
        "destroy_sandbox",
        "Destroy a sandbox",
        sandboxes.destroy_sandbox,
        {200: "Item"},
        operation="destroy",
        body={"force": _FORCE},
    ),
    *(
        Route(
            "POST",
            f"/v1/sandboxes/{{vmid}}/{verb}",
            f"{verb}_sandbox",
            text,
            handler,
            {200: "Item"},
            operation=operation,
            body={"force": _DISCARD}
            if verb == "stop"
            else {"wait_for_ip": CREATION["wait_for_ip"]}
            if operation == "start"
            else {},
        )
        for verb, operation, text, handler in (
            ("start", "start", "Start or resume the VM", sandboxes.start_sandbox),
            (
                "stop",
                "stop",
                "Shut down the VM; switch it off if it does not shut down in time",
                sandboxes.stop_sandbox,
            ),
            ("suspend", "suspend", "Pause the VM", sandboxes.make_power_handler("suspend")),
            ("pause", "suspend", "The same as suspend", sandboxes.make_power_handler("suspend")),
            ("resume", "start", "Resume the VM after a pause", sandboxes.resume_sandbox),
        )
    ),
    *(
        Route(
            "POST",
            f"/v1/sandboxes/{{vmid}}/{verb}",
            f"{verb}_sandbox",
            text,
            sandboxes.make_protection_handler(value),
            {200: "Item"},
            quick=True,
            body={},
        )
        for verb, value, text in (
            ("protect", True, "Protect the sandbox from every destroy, with or without force"),
            ("unprotect", False, "Remove the protection of the sandbox"),
        )
    ),
    Route(
        "POST",
        "/v1/sandboxes/{vmid}/keepalive",
        "set_keepalive",
        "Switch automatic renewal of the lease on or off",
        sandboxes.set_keepalive,
        {200: "Item"},
        quick=True,
        body={"keepalive": Field("boolean", "true or false", required=True)},
    ),
    Route(
        "POST",
        "/v1/sandboxes/{vmid}/lease/renew",
        "renew_lease",
        "Set the end of the lease to now plus the given time",
        sandboxes.renew_lease,
        {200: "Lease"},
        quick=True,
        body={
            **LIFETIME,
            "min_remaining": Field("duration", "renew only when less than this is left"),
            "allow_shorten": Field("boolean", "let the lease become shorter"),
        },
        together={**_NOT_BOTH, **_ONE_OF_THEM},
    ),
    Route(
        "GET",
        "/v1/workspaces",
        "list_workspaces",
        "List workspaces (disks that outlive sandboxes) by name",
        workspaces.list_workspaces,
        {200: "Workspaces"},
        quick=True,
        query={
            "state": Field("strings", "only these states", valid=workspace.STATES, most=20),
            "include_deleted": Field("boolean", "deleted ones too"),
        },
    ),
    Route(
        "POST",
        "/v1/workspaces",
        "create_workspace",
        "Create a workspace, or enlarge an attached one",
        workspaces.create_workspace,
        {201: "WorkspaceItem", 200: "WorkspaceItem"},
        body={
            "name": Field(
                "string",
                "a name of letters, digits and . - _",
                required=True,
                longest=63,
                pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
            ),
            "size": Field(
                "string", "size, such as 20G", longest=10, pattern=r"^[1-9][0-9]{0,5} ?[MGTmgt]([Ii]?[Bb])?$"
            ),
            "size_gb": Field("integer", "the same in GiB", low=1, high=999999),
            "storage": Field("string", "storage of a new one", longest=100),
            "node": Field("string", "node of a new one on local storage", longest=100),
        },
    ),
    Route(
        "GET",
        "/v1/workspaces/{id}",
        "show_workspace",
        "Show one workspace, by id or name",
        workspaces.show_workspace,
        {200: "Workspace"},
        quick=True,
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/attach",
        "attach_workspace",
        "Attach the workspace to a sandbox; one sandbox has it at a time",
        workspaces.attach_workspace,
        {200: "WorkspaceItem"},
        body={
            "vmid": replace(_VMID, required=True),
            "ttl": Field("duration", "time for which the sandbox has it; by default the lease of the sandbox"),
        },
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/detach",
        "detach_workspace",
        "Detach the workspace; unmount it first if the guest runs",
        workspaces.detach_workspace,
        {200: "WorkspaceItem"},
        body={},
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/rebind",
        "rebind_workspace",
        "Attach the workspace to a new sandbox; the previous one is stopped, then destroyed",
        workspaces.rebind_workspace,
        {200: "Rebound", 207: "Rebound"},
        operation="create",
        body={
            "profile": Field("string", "profile of the new sandbox", required=True, longest=100),
            "ttl_minutes": Field("integer", "lease of the new sandbox in minutes", low=1, high=5256000),
            "keep_old": Field("boolean", "keep the old sandbox, stopped"),
        },
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/destroy",
        "destroy_workspace",
        "Delete the workspace and the data on it",
        workspaces.destroy_workspace,
        {200: "WorkspaceItem"},
        body={"force": Field("boolean", "must be true: the data is lost")},
    ),
    Route(
        "GET",
        "/v1/profiles",
        "list_profiles",
        "List the profiles",
        creation.list_profiles,
        {200: "Profiles"},
        quick=True,
    ),
    Route(
        "POST",
        "/v1/cleanup/run",
        "run_cleanup",
        "Run the cleanup rules now",
        maintenance.run_cleanup,
        {200: "Cleanup", 207: "Cleanup"},
        operation="cleanup",
        body={"dry_run": Field("boolean", "say what would be done, do nothing")},
    ),
    Route(
        "POST",
        "/v1/cleanup/freeze",
        "freeze_cleanup",
        "Pause the scheduled cleanup until it is released, also after a restart",
        maintenance.freeze_cleanup,
        {200: "Frozen"},
        quick=True,
        body={
            "reason": Field(
                "string", "why, in some words", required=True, longest=500, pattern=r"[^\s\x1c-\x1f\x85\ufeff]"
            )
        },
    ),
    Route(
        "POST",
        "/v1/cleanup/release",
        "release_cleanup",
        "Resume the scheduled cleanup",
        maintenance.release_cleanup,
        {200: "Frozen"},
        quick=True,
        body={},
    ),
    *inside.ROUTES,
)
