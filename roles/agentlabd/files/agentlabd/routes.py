# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The API as one table: what is served, what a request may hold, and what answers it. The OpenAPI document is made from the same table.

Handlers run in worker threads; they know nothing of HTTP but the status of their answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agentlab_core import durations, patterns, profiles, states
from agentlab_core.context import Context, failure
from agentlab_core.errors import AgentlabError, InvalidInput, ProxmoxError, StateConflict
from agentlab_core.maintenance import cleanup, prune, reconcile
from agentlab_core.model import Outcome, Sandbox
from agentlab_core.sandboxes import create, destroy, lease, wanted
from agentlab_core.store import history
from agentlab_core.views import info
from agentlab_core.vm import address, power
from agentlab_core.workspaces import workspace, workspace_disk

from . import lookup, openapi, upstream
from .answers import Answer, of_item, of_items
from .shapes import Field

if TYPE_CHECKING:
    from .service import Service

_VMID = Field("integer", "VMID of the sandbox", low=100, high=999999999)
_DISCARD = Field("boolean", "throw the saved memory of a hibernated VM away")
_FORCE = Field("boolean", "destroy it whatever its state; identity and protection are judged all the same")


@dataclass(slots=True)
class Call:
    """One request, checked: who asks, and what for."""

    service: Service
    actor: str
    vmid: int | None = None
    # Of a workspace: its id or name.
    ident: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)

    def described(self, route: Route) -> str:
        """What is asked, for the log."""
        which = [self.vmid, self.ident or None, *self.body.get("vmids", ())[:20]]
        return " ".join([route.name, *(str(one) for one in which if one is not None)])

    def context(self, dry_run: bool = False) -> Context:
        return self.service.context(self.actor, dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class Route:
    """One request: ``quick`` ones are answered from the records alone, the others ask Proxmox and have threads of their own."""

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[[Call], Answer]
    answers: Mapping[int, str]
    quick: bool = False
    # It has a thread of its own, however many others wait for Proxmox.
    apart: bool = False
    # What it is counted as.
    operation: str | None = None
    query: Mapping[str, Field] = field(default_factory=dict)
    body: Mapping[str, Field] | None = None
    # What the body's fields must be to each other, as JSON schema; the handler refuses the rest.
    together: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        return self.method != "GET"


# ---- the daemon itself ----


def healthz(call: Call) -> Answer:
    return Answer({"status": "ok"})


def status(call: Call) -> Answer:
    service = call.service
    events = history.events(service.base.database, tail=upstream.EVENTS_LOOKED_THROUGH)
    return Answer(upstream.describe_status(service.status(), events, metrics=service.config.metrics_listen is not None))


def describe(call: Call) -> Answer:
    return Answer(openapi.document(ROUTES))


# ---- sandboxes: reading ----


def list_sandboxes(call: Call) -> Answer:
    which = info.Wanted(
        states=call.query.get("state"),
        profile=call.query.get("profile"),
        tags=call.query.get("tag", ()),
        include_destroyed=call.query.get("include_destroyed", False),
    )
    return Answer({"sandboxes": [one.public() for one in info.find(call.context(), which)]})


def show_sandbox(call: Call) -> Answer:
    ctx = call.context()
    sandbox = ctx.select(call.vmid)
    if address.is_due(sandbox, ctx.clock.now()):
        lookup.look_up_address(ctx, sandbox, call.service.work_pool)
    return Answer(sandbox.public())


def events(call: Call) -> Answer:
    ctx = call.context()
    ctx.select(call.vmid)
    after = call.query.get("after", 0)
    found = history.events(
        ctx.database, vmid=call.vmid, after=after, tail=call.query.get("tail"), limit=call.query.get("limit", 1000)
    )
    return Answer(
        {"events": [upstream.describe_event(row) for row in found], "last_id": found[-1]["id"] if found else after}
    )


# ---- sandboxes: one ----


def create_sandbox(call: Call) -> Answer:
    ctx = call.context()
    _check_limits(ctx, call.body)
    outcome = create.run(ctx, wanted.spec(ctx, _creation(call.body)))
    if call.body.get("wait_for_ip") and outcome.outcome in ("unchanged", "updated"):
        outcome = address.with_address(ctx, outcome, started=False)
    call.service.lease_changed()
    return of_item(outcome, 201 if outcome.outcome == "created" else 200)


def _check_limits(ctx: Context, body: Mapping[str, Any]) -> None:
    """Raise InvalidInput for what the configuration keeps from clients of the API.

    Only what the request itself names is judged: profiles and configuration are the operator's own.
    """
    config = ctx.config
    low, high = config.vmid_range
    vmid, template, pool = body.get("vmid"), body.get("template"), body.get("pool")
    if config.api_vmid_range_only and vmid is not None and not low <= vmid <= high:
        raise InvalidInput(
            f"vmid: {vmid} is outside the range that clients may use (api_vmid_range_only). Valid: {low} to {high}, or leave it out",
            option="vmid",
        )
    if config.api_pools is not None and pool is not None and pool not in config.api_pools:
        raise InvalidInput(
            f"pool: {patterns.quoted(pool)} is not for clients (api_pools). Valid: {', '.join(config.api_pools) or 'none, leave it out'}",
            option="pool",
        )
    if config.api_templates is not None and template is not None and template not in config.api_templates:
        # One list may have the name, the request the VMID, or the other way round.
        names = {
            str(found): str(row.get("name") or "") for found, row in ctx.cluster.vms().items() if row.get("template")
        }
        allowed = {
            found for found, name in names.items() if found in config.api_templates or name in config.api_templates
        }
        asked = {found for found, name in names.items() if template in (found, name)}
        if not asked or not asked <= allowed:
            raise InvalidInput(
                f"template: {patterns.quoted(template)} is not for clients (api_templates). "
                f"Valid: {', '.join(config.api_templates) or 'none, leave it out'}",
                option="template",
            )


def _creation(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a creation, each under its own name."""
    given = dict(body)
    minutes = given.pop("ttl_minutes", None)
    if minutes is not None:
        if "ttl" in given:
            raise InvalidInput("ttl_minutes: give ttl or ttl_minutes, not both", option="ttl_minutes")
        given["ttl"] = minutes
    by_id = given.pop("workspace_id", None)
    if by_id is not None:
        if "workspace" in given:
            raise InvalidInput("workspace_id: give workspace or workspace_id, not both", option="workspace_id")
        given["workspace"] = by_id
    return given


def destroy_sandbox(call: Call) -> Answer:
    ctx = call.context()
    sandbox = ctx.select(call.vmid)
    force = call.body.get("force", False)
    # Refused here the answer names the valid states.
    destroy.check(ctx, sandbox, force)
    return of_item(destroy.several(ctx, [sandbox], force)[0])


def _power(operation: str) -> Callable[[Call], Answer]:
    def handler(call: Call) -> Answer:
        ctx = call.context()
        return of_item(power.run(ctx, ctx.select(call.vmid), operation))

    return handler


# A sandbox in TIMEOUT that becomes STOPPED would be out of prune's sight for ever. The daemon stops the VM itself.
_STOPPABLE = tuple(
    state
    for state in (*states.OPERATIONS["stop"].allowed, *states.OPERATIONS["stop"].satisfied)
    if state != states.TIMEOUT
)


def _refuse_stop(sandbox: Sandbox) -> None:
    """Raise StateConflict for a sandbox in TIMEOUT, as the original daemon does. (A module may stop it.)"""
    if sandbox.state == states.TIMEOUT:
        raise StateConflict(
            f"cannot stop sandbox in {states.TIMEOUT} state. Valid states: {', '.join(_STOPPABLE)}. "
            "Its lease is over and its VM is stopped by the daemon: prune it, or destroy it with --force",
            operation="stop",
            state=sandbox.state,
            valid=_STOPPABLE,
        )


def stop_sandbox(call: Call) -> Answer:
    ctx = call.context()
    sandbox = ctx.select(call.vmid)
    _refuse_stop(sandbox)
    return of_item(power.run(ctx, sandbox, "stop", force=call.body.get("force", False)))


def resume_sandbox(call: Call) -> Answer:
    ctx = call.context()
    sandbox = ctx.select(call.vmid)
    valid = (states.SUSPENDED, *states.OPERATIONS["start"].satisfied)
    if sandbox.state not in valid:
        raise StateConflict(
            f"cannot resume sandbox in {sandbox.state} state. Valid states: {', '.join(valid)}",
            operation="start",
            state=sandbox.state,
            valid=valid,
        )
    return of_item(power.run(ctx, sandbox, "start"))


def stop_all_sandboxes(call: Call) -> Answer:
    """Stop every sandbox that is meant to run; the rest is named as skipped. A failure stops no other."""
    ctx = call.context()
    sandboxes = ctx.records.find_all()

    def stop(sandbox: Sandbox) -> Outcome | None:
        if sandbox.state not in (*states.POWERED, states.SUSPENDED):
            return None
        try:
            return power.run(ctx, sandbox, "stop")
        except AgentlabError as error:
            return failure(sandbox, error)

    outcomes = ctx.each(stop, sandboxes)
    results = [upstream.describe_stop(sandbox, outcome) for sandbox, outcome in zip(sandboxes, outcomes, strict=True)]
    counts = {word: sum(result["result"] == word for result in results) for word in ("stopped", "skipped", "failed")}
    return Answer(
        {"total": len(results), **counts, "results": results},
        207 if counts["failed"] else 200,
        [outcome for outcome in outcomes if outcome is not None],
    )


def _amend(call: Call, **values: bool) -> Answer:
    ctx = call.context()
    sandbox = ctx.select(call.vmid)
    if not sandbox.live:
        raise StateConflict(
            f"cannot change sandbox in {sandbox.state} state. Valid states: every other one",
            operation="update",
            state=sandbox.state,
        )
    answer = of_item(create.amend(ctx, sandbox, **values))
    call.service.lease_changed()
    return answer


def _protect(protected: bool) -> Callable[[Call], Answer]:
    return lambda call: _amend(call, protected=protected)


def set_keepalive(call: Call) -> Answer:
    return _amend(call, keepalive=call.body["keepalive"])


def validate_plan(call: Call) -> Answer:
    """Say what a creation would do and what is wrong with it; nothing is made."""
    ctx = call.context(dry_run=True)
    plan = {name: call.body.get(name) for name in ("name", "profile", "ttl_minutes", "workspace_id", "vmid", "tags")}
    plan["keepalive"] = call.body.get("keepalive", False)
    errors: list[dict[str, str]] = []
    warnings: list[str] = []
    try:
        _check_limits(ctx, call.body)
        outcome = create.run(ctx, wanted.spec(ctx, _creation(call.body)))
        warnings = outcome.warnings
        if outcome.outcome == "unchanged":
            warnings = [*warnings, f"sandbox {outcome.vmid} ({outcome.name}) is there already and stays as it is"]
    except ProxmoxError:
        # Whether the plan is sound is not known.
        raise
    except AgentlabError as error:
        option = error.detail.get("option") or ("workspace" if "workspace" in error.detail else "")
        errors = [{"code": error.code, "field": str(option), "message": error.message}]
    return Answer(
        {
            "ok": not errors,
            "errors": errors,
            "plan": plan,
            "warnings": [{"code": "warning", "field": "", "message": text} for text in warnings],
        }
    )


def list_inventory(call: Call) -> Answer:
    ctx = call.context()
    return Answer(
        {"sandboxes": upstream.inventory(ctx.records.find_all(), ctx.cluster.vms(fresh=True), ctx.config.vmid_range)}
    )


def renew_lease(call: Call) -> Answer:
    ctx = call.context()
    options = [name for name in ("ttl_minutes", "ttl") if name in call.body]
    if len(options) != 1:
        raise InvalidInput(
            "ttl_minutes: give ttl or ttl_minutes, not both"
            if options
            else "ttl_minutes is required: minutes, or ttl as a duration",
            option="ttl_minutes",
        )
    ttl = ctx.config.parse_ttl(call.body[options[0]], options[0])
    shortest = lease.check_min_remaining(call.body.get("min_remaining"))
    outcome = lease.renew(
        ctx, ctx.select(call.vmid), ttl, min_remaining=shortest, allow_shorten=call.body.get("allow_shorten", False)
    )
    call.service.lease_changed()
    call.service.metrics.renewed(outcome)
    return Answer(
        {
            "vmid": outcome.vmid,
            **{name: outcome.extra[name] for name in ("lease_expires_at", "granted_seconds", "capped")},
            "changed": outcome.changed,
        },
        outcomes=[outcome],
    )


# ---- sandboxes: many ----


def destroy_sandboxes(call: Call) -> Answer:
    ctx = call.context()
    # All ids are looked up before anything is done.
    found: list[Sandbox] = [ctx.select(vmid) for vmid in dict.fromkeys(call.body["vmids"])]
    return of_items(destroy.several(ctx, found, call.body.get("force", False)))


def prune_sandboxes(call: Call) -> Answer:
    dry_run = call.body.get("dry_run", False)
    older = call.body.get("older_than")
    which = prune.Wanted(
        states=call.body.get("states") or (states.TIMEOUT,),
        older_than=None if older is None else durations.parse(older, "older_than", zero=True),
        tags=call.body.get("tags", ()),
        max_count=call.body.get("max_count"),
    )
    metrics = call.service.metrics
    try:
        report = prune.run(call.context(dry_run), which)
    except AgentlabError as error:
        if not dry_run and not isinstance(error, InvalidInput):
            metrics.prune_stopped(error)
        raise
    if not dry_run:
        metrics.pruned("prune", report.pruned, report.kept, report.failed, report.count + len(report.failed))
    body = {
        "count": report.count,
        "dry_run": dry_run,
        **{name: [one.public() for one in getattr(report, name)] for name in ("pruned", "kept", "failed")},
    }
    return Answer(body, 207 if report.failed else 200, [*report.pruned, *report.kept, *report.failed])


def reconcile_sandboxes(call: Call) -> Answer:
    if "apply" in call.body and call.body.get("dry_run") == call.body["apply"]:
        raise InvalidInput("dry_run: contradicts apply; give one of the two", option="dry_run")
    apply = call.body.get("apply", not call.body.get("dry_run", True))
    adopt = call.body.get("adopt_cluster", False)
    if adopt and not apply:
        raise InvalidInput("adopt_cluster: has an effect together with apply only", option="adopt_cluster")
    ctx = call.context(dry_run=not apply)
    checked = len(ctx.records.find_all())
    found = reconcile.run(ctx, apply=apply, adopt_cluster=adopt)
    if apply:
        call.service.metrics.reconciled(found)
        call.service.lease_changed()
    return Answer(upstream.describe_drift(found, checked, applied=apply))


# ---- workspaces ----


def _of_workspace(done: workspace.Done) -> Answer:
    shown = upstream.describe_workspace(done.workspace.public()) if done.workspace else {}
    return Answer(
        {**shown, "outcome": done.outcome, "changed": done.changed}, 201 if done.outcome == "created" else 200
    )


def list_workspaces(call: Call) -> Answer:
    found = workspace.show(
        call.context(), states=call.query.get("state"), include_deleted=call.query.get("include_deleted", False)
    )
    return Answer({"workspaces": [upstream.describe_workspace(shown) for shown in found["workspaces"]]})


def show_workspace(call: Call) -> Answer:
    return Answer(upstream.describe_workspace(workspace_disk.select(call.context(), call.ident).public()))


def create_workspace(call: Call) -> Answer:
    given = call.body
    size = given.get("size")
    if given.get("size_gb") is not None:
        if size is not None:
            raise InvalidInput("size_gb: give size or size_gb, not both", option="size_gb")
        size = f"{given['size_gb']}G"
    return _of_workspace(
        workspace.present(
            call.context(), given["name"], size=size, storage=given.get("storage"), node=given.get("node")
        )
    )


def rebind_workspace(call: Call) -> Answer:
    """Move a workspace into a new sandbox; the old one is stopped first, so that nothing is written while the disk is moved."""
    ctx = call.context()
    disk = workspace_disk.select(ctx, call.ident)
    given: dict[str, Any] = {name: call.body[name] for name in ("profile", "ttl_minutes") if name in call.body}
    # What is wrong with the new sandbox is said before the old one loses its disk.
    spec = wanted.spec(ctx, _creation({**given, "workspace_id": disk.id}))
    old = ctx.records.get(disk.sandbox_uuid) if disk.sandbox_uuid else None
    if old is not None and old.live:
        if not call.body.get("keep_old", False):
            destroy.check(ctx, old, force=True)
        if old.state in (*states.POWERED, states.SUSPENDED):
            power.run(ctx, old, "stop")
    workspace.detached(ctx, disk.id)
    created = create.run(ctx, spec)
    call.service.lease_changed()
    answer = of_item(created)
    if created.failed or created.sandbox is None:
        return answer
    outcomes = [created]
    if old is not None and old.live and not call.body.get("keep_old", False):
        outcomes += destroy.several(ctx, [ctx.records.get(old.uuid)], force=True)
    moved = workspace_disk.select(ctx, disk.id)
    body = {
        "workspace": upstream.describe_workspace(moved.public()),
        "sandbox": created.sandbox.public(),
        "old_vmid": old.vmid if old is not None else None,
    }
    if any(outcome.failed for outcome in outcomes):
        return Answer(
            {**body, "warnings": [str(outcome.message or outcome.reason) for outcome in outcomes if outcome.failed]},
            207,
            outcomes,
        )
    return Answer({**body, "warnings": []}, 200, outcomes)


def attach_workspace(call: Call) -> Answer:
    ctx = call.context()
    ttl = call.body.get("ttl")
    return _of_workspace(
        workspace.attached(
            ctx, call.ident, ctx.select(call.body["vmid"]), None if ttl is None else ctx.config.parse_ttl(ttl)
        )
    )


def detach_workspace(call: Call) -> Answer:
    return _of_workspace(workspace.detached(call.context(), call.ident))


def destroy_workspace(call: Call) -> Answer:
    ctx = call.context()
    # The module is asked for absence, and is content with it; here somebody names a thing.
    return _of_workspace(
        workspace.absent(ctx, workspace_disk.select(ctx, call.ident).id, force=call.body.get("force", False))
    )


# ---- profiles and cleanup ----


def list_profiles(call: Call) -> Answer:
    found = profiles.load_all(call.service.config.profiles_dir)
    return Answer(
        {
            "profiles": [
                upstream.describe_profile(profile.public(), profile.path) for _name, profile in sorted(found.items())
            ]
        }
    )


def run_cleanup(call: Call) -> Answer:
    if not call.service.policy.rules:
        raise StateConflict(f"there are no cleanup rules: {call.service.config.cleanup_file} is missing or names none")
    report = call.service.clean(call.actor, dry_run=call.body.get("dry_run", False))
    return Answer(
        report.public(),
        207 if report.failed and not report.dry_run else 200,
        [*report.pruned, *report.marked, *report.failed],
    )


def freeze_cleanup(call: Call) -> Answer:
    return Answer({"frozen": cleanup.freeze(call.context(), call.body["reason"])})


def release_cleanup(call: Call) -> Answer:
    return Answer({"frozen": None, "released": cleanup.release(call.context())})


# ---- the doctor ----


def examine(call: Call) -> Answer:
    # Here, and not above: it is seldom asked for, and large.
    from agentlab_core.doctor import doctor

    found = doctor.Doctor(call.service.config)
    try:
        report = found.examine(doctor.Wanted(template=call.query.get("template")))
        made = (
            doctor.bundle(found, report, hosts=call.query.get("bundle_hosts", False))
            if call.query.get("bundle")
            else None
        )
        return Answer({**doctor.shown(found, report), "bundle": made})
    finally:
        found.close()


# ---- the table ----


def _tags(_name: str, value: Any) -> list[str]:
    return patterns.split_tags(value)


_LIFETIME = {
    "ttl_minutes": Field("integer", "lease in minutes", low=1, high=5256000),
    "ttl": Field("duration", "lease as minutes or a duration such as 2h"),
}
CREATION: dict[str, Field] = {
    "name": Field("string", "name, unique among live sandboxes; made up when left out", longest=253),
    "vmid": Field("integer", "VMID; from the configured range when left out", low=100, high=999999999),
    "profile": Field("string", "profile it is made from", longest=100),
    **_LIFETIME,
    "keepalive": Field("boolean", "renew its lease by itself when it is over, up to max_lifetime"),
    "protected": Field("boolean", "refuse to destroy it"),
    "template": Field("string", "template to clone, by VMID or name", longest=100),
    "node": Field("string", "node it shall run on", longest=100),
    "full_clone": Field("boolean", "full instead of linked clone"),
    "storage": Field("string", "storage of a full clone", longest=100),
    "pool": Field("string", "pool it belongs to", longest=100),
    "cores": Field("integer", "CPU cores", low=1, high=512),
    "cpu_type": Field("string", "CPU type, such as host or x86-64-v2-AES", longest=200),
    "memory": Field("integer", "memory in MiB", low=16, high=16777216),
    "disk_size": Field("string", "size of the boot disk, 20G or +10G", longest=20),
    "bridge": Field("string", "bridge of the first network card", longest=100),
    "network_model": Field("string", "model of the first network card", valid=patterns.MODELS),
    "vlan_tag": Field("integer", "VLAN of the first network card", low=1, high=4094),
    "second_bridge": Field(
        "string", "bridge of the second network card, which is made where the template has none", longest=100
    ),
    "second_vlan_tag": Field("integer", "VLAN of the second network card", low=1, high=4094),
    "second_ip_config": Field("string", "address of the second network card, as ip_config", longest=200),
    "firewall": Field("boolean", "firewall of the first network card"),
    "firewall_group": Field("string", "security group of its firewall", longest=100),
    "cloud_init_user": Field("string", "user that cloud-init makes", longest=100),
    "cloud_init_password": Field(
        "string", "password of that user; Proxmox VE keeps its hash", longest=1000, secret=True
    ),
    "cloud_init_upgrade": Field("boolean", "whether cloud-init upgrades the packages at the first start"),
    "cloud_init_vendor_data": Field(
        "string", "snippet with vendor data that is there, such as local:snippets/vendor.yaml", longest=300
    ),
    "ip_config": Field("string", "address, ip=dhcp or ip=192.0.2.10/24,gw=192.0.2.1", longest=200),
    "nameserver": Field("string", "DNS servers, separated by blanks or commas", longest=200),
    "searchdomain": Field("string", "DNS search domain", longest=255),
    "ssh_public_keys": Field(
        "strings",
        "public keys of its user, as a list, or as a text with one a line",
        longest=10000,
        split=patterns.split_keys,
    ),
    "cloud_init_user_data": Field(
        "string",
        "user data for cloud-init; it needs a daemon that can write the node's snippets",
        longest=524288,
        lines=True,
        secret=True,
    ),
    "workspace": Field("string", "workspace it gets before it starts, by name or id", longest=100),
    "workspace_id": Field("string", "the same", longest=100),
    "tags": Field(
        "strings", "tags, as a list, or as a text with commas or blanks between them", longest=100, split=_tags
    ),
    "description": Field("string", "text for the notes of the VM", longest=4000, lines=True),
    "update": Field(
        "boolean", "of a sandbox that is there: apply cores, memory, tags and description where they differ"
    ),
    "allow_restart": Field(
        "boolean", "whether update may stop and start the VM, which cores and memory of a VM that runs need"
    ),
    "wait_for_cloud_init": Field("boolean", "wait until cloud-init has ended; FAILED when it ended with errors"),
    "wait_for_ip": Field("boolean", "wait until the guest agent names an address"),
}
_OLD = Field("duration", "only what entered its state longer ago than this", low=0)

_GIVEN: dict[str, Any] = {"not": {"type": "null"}}
_NOT_BOTH: dict[str, Any] = {
    "not": {"required": ["ttl", "ttl_minutes"], "properties": {"ttl": _GIVEN, "ttl_minutes": _GIVEN}}
}
_ONE_OF_THEM: dict[str, Any] = {
    "anyOf": [{"required": [name], "properties": {name: _GIVEN}} for name in ("ttl", "ttl_minutes")]
}
_ADOPT_APPLIED: dict[str, Any] = {
    "not": {
        "required": ["adopt_cluster"],
        "properties": {"adopt_cluster": {"const": True}, "apply": {"enum": [False, None]}},
    }
}

ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/healthz", "healthz", "Whether the daemon answers", healthz, {200: "Health"}, quick=True),
    Route(
        "GET",
        "/v1/status",
        "status",
        "What the daemon does, when it did it last, and what stands in its way",
        status,
        {200: "Status"},
        quick=True,
    ),
    Route(
        "GET",
        "/v1/doctor",
        "doctor",
        "Look at everything sandboxes depend on, and say what to do; reads only",
        examine,
        {200: "Doctor"},
        apart=True,
        query={
            "template": Field(
                "string", "VMID or name of a template to look at, instead of the configured one", longest=100
            ),
            "bundle": Field("boolean", "add a bundle for a bug report, without secrets"),
            "bundle_hosts": Field("boolean", "leave names and addresses of hosts, nodes and VMs in the bundle"),
        },
    ),
    Route("GET", "/v1/openapi.json", "openapi", "This document", describe, {200: "OpenApi"}, quick=True),
    Route(
        "GET",
        "/v1/sandboxes",
        "list_sandboxes",
        "Sandboxes in the order of their VMIDs",
        list_sandboxes,
        {200: "Sandboxes"},
        quick=True,
        query={
            "state": Field("strings", "only these states", valid=states.STATES, most=20),
            "profile": Field("string", "only this profile", longest=100),
            "tag": Field("strings", "only those with one of these tags", longest=100, most=20, split=_tags),
            "include_destroyed": Field("boolean", "destroyed ones too"),
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes",
        "create_sandbox",
        "Create and start a sandbox; one of that name or VMID stays as it is",
        create_sandbox,
        {201: "Item", 200: "Item"},
        operation="create",
        body=CREATION,
        together=_NOT_BOTH,
    ),
    Route(
        "POST",
        "/v1/sandboxes/destroy",
        "destroy_sandboxes",
        "Destroy several; each item has its own outcome",
        destroy_sandboxes,
        {200: "Results", 207: "Results"},
        operation="destroy",
        body={"vmids": Field("integers", "VMIDs", required=True, low=100, high=999999999, most=10000), "force": _FORCE},
    ),
    Route(
        "POST",
        "/v1/sandboxes/prune",
        "prune_sandboxes",
        "Destroy what is over, say for each thing kept why",
        prune_sandboxes,
        {200: "Prune", 207: "Prune"},
        operation="prune",
        body={
            "older_than": _OLD,
            "dry_run": Field("boolean", "say what would be done, do nothing"),
            "states": Field("strings", "states to prune, TIMEOUT unless set", valid=states.PRUNABLE, most=10),
            "tags": Field("strings", "only those with one of these tags", longest=100, split=_tags),
            "max_count": Field("integer", "do nothing at all if more than this would be pruned", low=0, high=1000000),
        },
    ),
    Route(
        "POST",
        "/v1/sandboxes/reconcile",
        "reconcile_sandboxes",
        "Compare the records with Proxmox; repair drift if asked to",
        reconcile_sandboxes,
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
        "Stop every sandbox that runs or is paused",
        stop_all_sandboxes,
        {200: "StopAll", 207: "StopAll"},
        operation="stop",
        body={"force": Field("boolean", "taken and without effect: no job holds a sandbox")},
    ),
    Route(
        "POST",
        "/v1/sandboxes/validate-plan",
        "validate_plan",
        "Say what is wrong with a creation, and make nothing",
        validate_plan,
        {200: "ValidatedPlan"},
        body=CREATION,
        together=_NOT_BOTH,
    ),
    Route(
        "GET",
        "/v1/sandboxes/inventory",
        "list_inventory",
        "Sandboxes beside Proxmox's VM list, and VMs of the range without a record",
        list_inventory,
        {200: "Inventory"},
    ),
    Route(
        "GET",
        "/v1/sandboxes/{vmid}",
        "show_sandbox",
        "The live sandbox of that VMID, or else the last destroyed one",
        show_sandbox,
        {200: "Sandbox"},
        quick=True,
    ),
    Route(
        "GET",
        "/v1/sandboxes/{vmid}/events",
        "list_events",
        "What happened to the sandboxes of that VMID, oldest first",
        events,
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
        destroy_sandbox,
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
            body={"force": _DISCARD} if verb == "stop" else {},
        )
        for verb, operation, text, handler in (
            ("start", "start", "Start or resume its VM", _power("start")),
            ("stop", "stop", "Shut its VM down, switch it off when it does not answer", stop_sandbox),
            ("suspend", "suspend", "Pause its VM", _power("suspend")),
            ("pause", "suspend", "The same as suspend", _power("suspend")),
            ("resume", "start", "Resume its VM after a pause", resume_sandbox),
        )
    ),
    *(
        Route(
            "POST",
            f"/v1/sandboxes/{{vmid}}/{verb}",
            f"{verb}_sandbox",
            text,
            _protect(value),
            {200: "Item"},
            quick=True,
            body={},
        )
        for verb, value, text in (
            ("protect", True, "Let nothing destroy it, forced or not"),
            ("unprotect", False, "Let it be destroyed again"),
        )
    ),
    Route(
        "POST",
        "/v1/sandboxes/{vmid}/keepalive",
        "set_keepalive",
        "Renew its lease by itself when it is over, or no more",
        set_keepalive,
        {200: "Item"},
        quick=True,
        body={"keepalive": Field("boolean", "true or false", required=True)},
    ),
    Route(
        "POST",
        "/v1/sandboxes/{vmid}/lease/renew",
        "renew_lease",
        "Set the lease to now plus the time given",
        renew_lease,
        {200: "Lease"},
        quick=True,
        body={
            **_LIFETIME,
            "min_remaining": Field("duration", "renew only when less than this is left"),
            "allow_shorten": Field("boolean", "let the lease become shorter"),
        },
        together={**_NOT_BOTH, **_ONE_OF_THEM},
    ),
    Route(
        "GET",
        "/v1/workspaces",
        "list_workspaces",
        "Disks that outlive sandboxes, by their names",
        list_workspaces,
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
        "Create one, or let one grow that is attached",
        create_workspace,
        {201: "WorkspaceItem", 200: "WorkspaceItem"},
        body={
            "name": Field(
                "string",
                "a name of letters, digits and . - _",
                required=True,
                longest=63,
                pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
            ),
            "size": Field("string", "size, such as 20G", longest=7, pattern=r"^[1-9][0-9]{0,5}[MGT]$"),
            "size_gb": Field("integer", "the same in GiB", low=1, high=999999),
            "storage": Field("string", "storage of a new one", longest=100),
            "node": Field("string", "node of a new one on local storage", longest=100),
        },
    ),
    Route(
        "GET",
        "/v1/workspaces/{id}",
        "show_workspace",
        "One workspace, by id or name",
        show_workspace,
        {200: "Workspace"},
        quick=True,
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/attach",
        "attach_workspace",
        "Give it to a sandbox; one has it at a time",
        attach_workspace,
        {200: "WorkspaceItem"},
        body={
            "vmid": replace(_VMID, required=True),
            "ttl": Field("duration", "how long it has it; as long as the sandbox's lease unless given"),
        },
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/detach",
        "detach_workspace",
        "Take it off; unmount it in a running guest first",
        detach_workspace,
        {200: "WorkspaceItem"},
        body={},
    ),
    Route(
        "POST",
        "/v1/workspaces/{id}/rebind",
        "rebind_workspace",
        "Give it to a new sandbox; the one that has it is stopped, and destroyed after",
        rebind_workspace,
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
        "Delete it and the data on it",
        destroy_workspace,
        {200: "WorkspaceItem"},
        body={"force": Field("boolean", "must be true: the data is lost")},
    ),
    Route(
        "GET",
        "/v1/profiles",
        "list_profiles",
        "Kinds of sandboxes that the operator has described",
        list_profiles,
        {200: "Profiles"},
        quick=True,
    ),
    Route(
        "POST",
        "/v1/cleanup/run",
        "run_cleanup",
        "Run the cleanup rules now",
        run_cleanup,
        {200: "Cleanup", 207: "Cleanup"},
        operation="cleanup",
        body={"dry_run": Field("boolean", "say what would be done, do nothing")},
    ),
    Route(
        "POST",
        "/v1/cleanup/freeze",
        "freeze_cleanup",
        "Let no rule act until it is released, also after a restart",
        freeze_cleanup,
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
        "Let the rules act again",
        release_cleanup,
        {200: "Frozen"},
        quick=True,
        body={},
    ),
)
