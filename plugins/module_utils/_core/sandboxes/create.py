# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Create a sandbox: reserve the record, clone with our marker, bind, configure, start, wait for the address.

Each step writes the record and its decision before it sends the request. A failure leaves one of three things:

- Proxmox VE refused a request, or a task failed: the destroy pipeline removes the VM that our own clone made.
- The outcome is unknown (lost answer, timeout, killed run): nothing is removed. The next run resumes from the journal.
- cloud-init ended with errors: the sandbox becomes FAILED, and its VM stays so that the cause can be examined.
"""

from __future__ import annotations

import contextlib
import re
import uuid as uuid_module
from typing import Any, cast

from .. import states
from ..context import Context, refuse_cut_off
from ..errors import (
    AccessDenied,
    AgentlabError,
    ApiError,
    ClaimLost,
    CreationFailed,
    InvalidInput,
    Kept,
    OutcomeUnknown,
    ProxmoxError,
    RecordChanged,
    StoreError,
    TaskFailed,
    TaskTimeout,
    TaskUnknown,
    Unreachable,
)
from ..guest import cloud_init, snippets
from ..model import Outcome, Sandbox
from ..proxmox import identity
from ..proxmox.answers import not_begun
from ..store.records import AWAITED, Claim
from ..vm import address, binding, power
from ..vm.locate import Located, locate, match_if_readable, require_match, write_with_digest
from ..workspaces import workspace_disk
from . import destroy, place, refusals, update, vm_config
from . import template as templates
from .spec import Spec

# Attempts at a clone whose template is locked, one second apart.
_CLONE_TRIES = 3
# Seconds to look for a clone whose answer was cut. Proxmox VE lists a new VM within a second of the request.
_CUT_SECONDS = 5.0


def existing(ctx: Context, spec: Spec) -> Sandbox | None:
    """Return the live sandbox with the VMID or the name of the spec, or None.

    Raises InvalidInput when VMID and name belong to different sandboxes.
    """
    by_vmid = ctx.records.live_by_vmid(spec.vmid) if spec.vmid is not None else None
    by_name = ctx.records.live_by_name(spec.name) if spec.name is not None else None
    if spec.vmid is not None and spec.name is not None:
        if by_vmid and by_vmid.name != spec.name:
            raise InvalidInput(
                f"name: sandbox {spec.vmid} is named {by_vmid.name!r}, not {spec.name!r}; give one of the two",
                option="name",
            )
        if by_name and by_name.vmid != spec.vmid:
            raise InvalidInput(
                f"vmid: the sandbox named {spec.name!r} is {by_name.vmid}, not {spec.vmid}; give one of the two",
                option="vmid",
            )
    return by_vmid or by_name


def run(ctx: Context, spec: Spec) -> Outcome:
    """Make sure that the sandbox exists, and return the outcome.

    An existing sandbox keeps its power state. An interrupted creation is finished. Raises CreationFailed when an
    earlier creation of this sandbox failed.
    """
    spec.check()
    found = existing(ctx, spec)
    if found is None:
        return _create(ctx, spec)
    if found.state in states.CREATING or _almost_done(ctx, found):
        if ctx.dry_run:
            return Outcome.of("would_create", found, changed=True, state=states.RUNNING)
        claim = ctx.records.claim(found.uuid, "create", wait=ctx.config.claim_timeout)
        now = ctx.records.get(found.uuid)
        left = claim.interrupted
        if now.state in states.CREATING or (
            left and (left.kind == "destroy" or (left.kind == "create" and now.state == states.READY))
        ):
            try:
                return _carry_on(ctx, claim, spec, now)
            except CreationFailed as error:
                node = error.detail.get("failed_node")
                if node is None:
                    raise
                return _create(ctx, spec, {node: error.message})
        # While this run waited for the claim, another run finished the creation or gave it up. Decide again.
        ctx.records.release(claim)
        return run(ctx, spec)
    if found.state == states.FAILED and (
        found.smbios_uuid is None or found.reason in ("creation_failed", "creation_interrupted", "cloud_init_failed")
    ):
        raise CreationFailed(
            f"sandbox {found.vmid} could not be created earlier ({found.reason}) and is in FAILED state",
            vmid=found.vmid,
            remedy="remove",
        )
    return _renewed(ctx, found, spec)


def _renewed(ctx: Context, sandbox: Sandbox, spec: Spec) -> Outcome:
    """Update an existing sandbox where the options allow, and warn of each given option that is not in force."""
    outcome = amend(ctx, sandbox, protected=spec.protected or None, keepalive=spec.keepalive or None)
    if spec.update:
        applied = update.apply(ctx, outcome.sandbox or sandbox, spec)
        if applied.changed:
            for part in ("after", "before"):
                applied.extra[part] = {**outcome.extra.get(part, {}), **applied.extra[part]}
            outcome = applied
    differences = update.different(ctx, outcome.sandbox or sandbox, spec)
    if spec.update:
        differences = {name: values for name, values in differences.items() if name not in update.APPLICABLE}
    outcome.advice += update.advise(sandbox, differences)
    return outcome


def _almost_done(ctx: Context, found: Sandbox) -> bool:
    """Return whether the sandbox is READY only because its creation was killed before the last step."""
    left = ctx.records.under_way(found.uuid) if found.state == states.READY else None
    return left is not None and left.kind == "create"


def amend(ctx: Context, found: Sandbox, **wanted: bool | None) -> Outcome:
    """Set the options that concern only the record (protected, keepalive) where they differ, and return the outcome."""
    new = {name: value for name, value in wanted.items() if value is not None and value != getattr(found, name)}
    if not new:
        return Outcome.of("unchanged", found)
    before = {name: getattr(found, name) for name in new}
    if ctx.dry_run:
        return Outcome.of("would_update", found, changed=True, extra={"after": new, "before": before})
    done = ctx.records.amend(found, "update", **new)
    return Outcome.of("updated", done, previous_state=found.state, changed=True, extra={"after": new, "before": before})


def _create(ctx: Context, spec: Spec, failed: dict[str, str] | None = None) -> Outcome:
    """Create the sandbox. Where the node is ours to choose and fails, try the next best node.

    ``failed`` maps each node that already failed this creation to the reason.
    """
    failed = dict(failed or {})
    while True:
        try:
            outcome = _create_once(ctx, spec, failed)
        except CreationFailed as error:
            node = error.detail.get("failed_node")
            if node is None or node in failed:
                raise _with_history(error, failed) from None
            failed[node] = error.message
            continue
        outcome.warnings[:0] = [
            f"node {node} failed the creation and was left for "
            f"{outcome.sandbox.node if outcome.sandbox else 'another'}: {why}"
            for node, why in failed.items()
        ]
        return outcome


def _with_history(error: CreationFailed, failed: dict[str, str]) -> CreationFailed:
    """Return the error, extended by the reasons why the nodes tried before failed."""
    if not failed or error.detail.get("placement") is not None:
        # The error of a placement decision already lists the failed nodes.
        return error
    tried = "; ".join(f"{node}: {why}" for node, why in failed.items())
    return CreationFailed(f"{error.message}. Tried before: {tried}", **error.detail)


def _create_once(ctx: Context, spec: Spec, failed: dict[str, str]) -> Outcome:
    first, last = ctx.config.workspace_owner_range
    if spec.vmid is not None and first <= spec.vmid <= last:
        raise InvalidInput(
            f"vmid: {spec.vmid} is in workspace_owner_range ({first}-{last}), whose VMIDs own the volumes of "
            "workspaces: Proxmox VE deletes with a VM what its VMID owns. Take one outside of it",
            option="vmid",
            value=spec.vmid,
        )
    disk = workspace_disk.select(ctx, spec.workspace) if spec.workspace is not None else None
    # This one request reads all nodes and all VMs.
    nodes = ctx.cluster.capacity().nodes
    choice = place.NodeChoice(ctx, spec, disk, failed) if place.is_open(ctx, spec, disk, nodes) else None
    if choice is not None:
        node, template = None, None
        if choice.look().node is None:
            raise choice.no_node()
    else:
        # A workspace on local storage binds the sandbox to the node of that storage.
        wanted_node = spec.node or (disk.node if disk else None) or ctx.config.node
        try:
            template = templates.find(ctx, spec.template or ctx.config.template, wanted_node)
        except InvalidInput:
            # A missing or offline node has no templates. Then report the node, not the template.
            if wanted_node is not None:
                with contextlib.suppress(AccessDenied):
                    _check_node(ctx, wanted_node)
            raise
        node = wanted_node or template.node
        if node != template.node or template.config is None:
            # In the other case the node is known to be up: it has just returned the template's configuration.
            _check_node(ctx, node)
        templates.check(ctx, spec, template, node)
        if disk is not None:
            workspace_disk.check_usable(ctx, disk, node)
        if spec.cloud_init_user_data is not None:
            cloud_init.check_place(ctx, node)
    known = ctx.cluster.vms()
    if spec.vmid is not None and spec.vmid in known:
        raise _occupied(spec.vmid, str(known[spec.vmid].get("name") or "unnamed"))
    ctx.cluster.confirm(creating=True)
    uid = str(uuid_module.uuid4())
    name = spec.name or f"sandbox-{uid[:8]}"
    now = ctx.clock.now()
    sandbox = Sandbox(
        uuid=uid,
        vmid=spec.vmid or 0,
        name=name,
        state=states.REQUESTED,
        profile=spec.profile,
        node=node,
        tags=sorted(set(spec.tags)),
        protected=spec.protected,
        keepalive=spec.keepalive,
        ttl_seconds=spec.ttl,
        lease_expires_at=now + spec.ttl,
        lease_max_seconds=spec.lease_maximum,
    )
    journal: dict[str, Any] = {}

    def write(reservation: Any) -> Claim:
        return ctx.records.reserve(
            sandbox,
            vmid=spec.vmid,
            vmid_range=ctx.config.vmid_range,
            occupied=set(known),
            journal=journal,
            place=reservation,
        )

    if choice is not None:

        def note_choice() -> None:
            # Each node may have its own template, so the journal can only be completed once the node is chosen.
            chosen = cast(templates.Template, choice.template)
            journal.update(_clone_note(ctx, spec, chosen, sandbox.node), chosen=True)

        claim = choice.reserve(sandbox, write, note_choice)
    else:
        named = cast(templates.Template, template)
        journal.update(_clone_note(ctx, spec, named, node))
        claim = write(place.fixed(ctx, spec, named, str(node)))
    decision = choice.decision if choice is not None else None
    if ctx.dry_run:
        outcome = Outcome.of("would_create", sandbox, previous_state=None, state=states.RUNNING, changed=True)
    else:
        outcome = _carry_on(ctx, claim, spec, sandbox, journal)
    if decision is not None:
        outcome.extra["placement"] = decision.public()
    return outcome


def _check_node(ctx: Context, node: str) -> None:
    """Raise InvalidInput for a node that is offline or not in the cluster."""
    nodes = ctx.cluster.nodes()
    if node not in nodes:
        raise InvalidInput(
            f"node: {node!r} is not a node of this cluster. Nodes: {', '.join(sorted(nodes))}",
            option="node",
            value=node,
        )
    if not nodes[node]:
        raise InvalidInput(
            f"node: {node!r} is offline; choose another, or wait until it is back", option="node", value=node
        )


def _clone_note(ctx: Context, spec: Spec, template: templates.Template, node: str | None) -> dict[str, Any]:
    """Return the journal fields from which this run, or a later one, can send the clone request."""
    full, storage = templates.clone_mode(ctx, spec, template)
    return {
        "template": template.vmid,
        "template_name": template.name,
        "template_node": template.node,
        "node": node,
        "full": full,
        "storage": storage,
    }


def _carry_on(
    ctx: Context, claim: Claim, spec: Spec, sandbox: Sandbox, journal: dict[str, Any] | None = None
) -> Outcome:
    """Resume the creation at its current step and bring the sandbox to RUNNING.

    On a definite failure remove the VM that our own clone made, and raise CreationFailed. On an unknown outcome keep
    the journal and raise the error.
    """
    began = ctx.clock.monotonic()
    upids: list[str] = []
    warnings: list[str] = []
    noted: dict[str, Any] = {}
    try:
        left = claim.interrupted
        # A destroy has replaced our journal entry: we no longer know how far the creation got, and a delete may be
        # running.
        refuse_cut_off(claim, sandbox)
        if left and left.kind == "create" and sandbox.state == states.READY:
            sandbox = ctx.records.change(claim, sandbox, "create", to=states.RUNNING, reason="ready", finish=True)
            return Outcome.of("created", sandbox, previous_state=states.READY, changed=True)
        noted.update(journal if journal is not None else (left.detail if left else {}))
        disk = workspace_disk.of_creation(ctx, claim, sandbox, spec.workspace)
        sandbox = cloud_init.provide(ctx, claim, sandbox, spec.cloud_init_user_data)
        cloned: Located | None = None
        if sandbox.smbios_uuid is None:
            phase = left.phase if left else "reserved"
            sandbox, cloned = _clone(
                ctx, claim, spec, sandbox, noted, phase, left.updated_at if left else 0, upids, warnings
            )
        if sandbox.state != states.BOOTING:
            sandbox = ctx.records.change(
                claim,
                sandbox,
                "create",
                to=states.BOOTING,
                reason="cloned",
                upids=upids,
                journal=("configuring", noted),
            )
        found = _configure(ctx, claim, spec, sandbox, cloned or require_match(ctx, sandbox), noted, warnings)
        if disk is not None:
            found = require_match(ctx, sandbox)
            workspace_disk.attach(ctx, claim, sandbox, found, disk)
            sandbox = ctx.records.get(sandbox.uuid)
        done, warned = (power.start_new if cloned else power.start)(ctx, sandbox, found)
        upids += done
        warnings += warned
        if spec.wait_for_ip:
            sandbox = _await_ip(ctx, claim, sandbox, found, noted)
        if spec.wait_for_cloud_init:
            cloud_init.wait(ctx, sandbox)
        sandbox = ctx.records.change(
            claim, sandbox, "create", to=states.READY, reason="started", upids=done, journal=("ready", noted)
        )
        took = int((ctx.clock.monotonic() - began) * 1000)
        sandbox = ctx.records.change(
            claim, sandbox, "create", to=states.RUNNING, reason="ready", duration_ms=took, finish=True
        )
        return Outcome.of("created", sandbox, previous_state=None, changed=True, upids=upids, warnings=warnings)
    except (StoreError, ClaimLost, OutcomeUnknown, TaskTimeout, TaskUnknown, Kept) as error:
        # The outcome is unknown, or another run decides it. Keep the journal, so that the next run resumes here.
        if isinstance(error, RecordChanged) and ctx.records.get(sandbox.uuid).state == states.TIMEOUT:
            raise CreationFailed(
                f"sandbox {sandbox.vmid}: its lease ran out before it was ready; prune removes it, use a longer ttl",
                vmid=sandbox.vmid,
            ) from None
        error.detail.setdefault("vmid", sandbox.vmid)
        if isinstance(error, OutcomeUnknown) and str(error.detail.get("path") or "").endswith("/clone"):
            now = ctx.records.get(sandbox.uuid)
            error.message = (
                f"sandbox {now.vmid} ({now.state}): whether its clone was begun is not known; run again in "
                f"{ctx.config.doubt_window} s, or reconcile settles it ({error.message})"
            )
        if (
            isinstance(error, TaskTimeout) or (isinstance(error, Kept) and error.reason == "changed")
        ) and sandbox.smbios_uuid is not None:
            # The error tells the caller to run again. AWAITED keeps reconcile from failing the sandbox before that.
            ctx.records.journal(claim, "create", AWAITED, noted)
        elif isinstance(error, TaskTimeout) and noted.get("upid"):
            # The clone task still runs, and the next run resumes it. ``awaited`` keeps reconcile from touching it.
            ctx.records.journal(claim, "create", "waiting", {**noted, "awaited": True})
        raise
    except cloud_init.CloudInitFailed as error:
        # Keep the VM so that the cause can be examined. Remove the snippet, because user data may hold secrets.
        snippets.remove(ctx, sandbox)
        ctx.records.change(
            claim,
            sandbox,
            "create",
            to=states.FAILED,
            outcome="failed",
            reason=error.code,
            evidence={"message": error.message},
            finish=True,
        )
        raise
    except AgentlabError as error:
        told = refusals.explain(ctx, spec, sandbox.node, noted.get("template"), error)
        failure = _clean_up(ctx, claim, sandbox, error, told or error.message, noted)
        clean = failure.detail.pop("clean", False)
        if noted.get("chosen") and clean and refusals.blames_node(error):
            failure.detail["failed_node"] = sandbox.node
        raise failure from None
    finally:
        ctx.records.release(claim)


def _clone(
    ctx: Context,
    claim: Claim,
    spec: Spec,
    sandbox: Sandbox,
    noted: dict[str, Any],
    phase: str,
    at: int,
    upids: list[str],
    warnings: list[str],
) -> tuple[Sandbox, Located | None]:
    """Clone the template, or resume the clone of a killed run, and bind the record to the new VM.

    ``phase`` and ``at`` (seconds since the epoch) come from the journal of the killed run. Returns the record, and the
    VM with its verdict from after the clone task; None instead of the VM when an earlier run sent the clone.
    """
    template = noted.get("template")
    if template is None:
        noted.update(
            _clone_note(
                ctx, spec, templates.find(ctx, spec.template or ctx.config.template, sandbox.node), sandbox.node
            )
        )
        template = noted["template"]
    resumed = phase in ("cloning", "waiting")
    before = {**noted, "phase": phase, "at": at}
    # An earlier run sent a clone request and lost the answer: Proxmox may still carry the clone out.
    doubt = before if resumed and not noted.get("upid") else None
    tries = 0
    occupied: set[int] = set()
    while True:
        upid = noted.get("upid")
        if resumed and not upid:
            found = _await_doubt(ctx, claim, sandbox, doubt or noted)
            if found.match:
                return ctx.records.get(sandbox.uuid), None
            if found.node is not None and found.verdict and found.verdict.identity != identity.FOREIGN:
                raise _not_certain(sandbox)
            resumed = False
        try:
            if not upid:
                upid = _send_clone(ctx, claim, spec, sandbox, noted)
                upids.append(upid)
            warnings += ctx.tasks.wait(upid, f"clone template {template} to VM {sandbox.vmid}", ctx.wait_timeout)
            break
        except OutcomeUnknown as error:
            # pveproxy sometimes cuts the answers of a password login, but still carries the request out.
            if not error.detail.get("cut") or not _clone_appears(ctx, claim, sandbox, noted):
                raise
            return ctx.records.get(sandbox.uuid), None
        except TaskUnknown as error:
            if upids:
                raise
            # The result of an earlier run's task is lost. Decide by the VM that stands at the VMID now.
            found = binding.locate_unbound(ctx, sandbox, claim, before)
            if found.match:
                return ctx.records.get(sandbox.uuid), None
            foreign = found.verdict is not None and found.verdict.identity == identity.FOREIGN
            if not foreign and (
                found.node is not None or not ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid].absent
            ):
                raise Kept(
                    "ambiguous",
                    f"sandbox {sandbox.vmid}: {error.message}. Whether VM {sandbox.vmid} is its clone is not certain, "
                    "so it was left alone",
                    vmid=sandbox.vmid,
                    remedy="remove",
                ) from None
            noted.pop("upid", None)
            resumed = False
            ctx.records.journal(claim, "create", "reserved", noted)
        except (ApiError, TaskFailed) as error:
            tries += 1
            if (
                isinstance(error, TaskFailed)
                and not_begun(error.exitstatus)
                and tries < _CLONE_TRIES
                and ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid].absent
            ):
                # The template is locked for a moment (another clone, a backup), and Proxmox made nothing.
                noted.pop("upid", None)
                ctx.records.journal(claim, "create", "reserved", noted)
                ctx.clock.sleep(1.0)
                continue
            taken, another = _in_the_way(error)
            if taken and doubt:
                # The VMID may be taken by our own earlier clone, whose answer was lost. Check before choosing another
                # VMID.
                found, doubt = _await_doubt(ctx, claim, sandbox, doubt), None
                if found.match:
                    return ctx.records.get(sandbox.uuid), None
                if found.verdict is None or found.verdict.identity != identity.FOREIGN:
                    raise _not_certain(sandbox) from None
            if taken or (isinstance(error, ApiError) and not noted.get("upid")):
                # Proxmox refused the request, so no clone of ours can appear at this VMID later.
                noted.pop("upid", None)
                ctx.records.journal(claim, "create", "reserved", noted)
            if taken and spec.vmid is not None:
                raise _occupied(sandbox.vmid, "one that these credentials may not see, or a container") from None
            if not taken and not (
                another and spec.vmid is None and ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid].absent
            ):
                raise
            if not taken:
                noted.pop("upid", None)
                ctx.records.journal(claim, "create", "reserved", noted)
            occupied |= {sandbox.vmid, *ctx.cluster.vms(fresh=True)}
            # Also changes the caller's record: its error messages must not name the VMID of somebody else's VM.
            ctx.records.renumber(claim, sandbox, vmid_range=ctx.config.vmid_range, occupied=occupied)
    # Look on the clone's node first. Reading the VM list would cost one more request.
    ctx.cluster.add_vm(sandbox.vmid, sandbox.node)
    found = locate(ctx, sandbox)
    if found.node is None:
        raise Kept(
            "unknown",
            f"sandbox {sandbox.vmid}: the clone ended well, but no VM with that VMID is to be seen (removed "
            "meanwhile, or hidden from these credentials?)",
            remedy="remove",
        )
    smbios = identity.smbios_uuid(found.config)
    if found.verdict is None or found.verdict.identity != identity.UNBOUND or smbios is None:
        raise Kept(
            "ambiguous",
            f"sandbox {sandbox.vmid}: the clone ended well, but the VM now at that VMID does not carry its marker; it "
            "was left alone",
            remedy="remove",
            evidence=found.verdict.evidence if found.verdict else None,
        )
    ctx.cluster.seen_ours(sandbox.vmid)
    bound = binding.bind(ctx, claim, sandbox, smbios, found)
    # Judge the same configuration again, now against the SMBIOS UUID that the record has just stored.
    found.verdict = identity.judge(bound.uuid, bound.smbios_uuid, found.config)
    return bound, found if upids else None


def _in_the_way(error: ApiError | TaskFailed) -> tuple[bool, bool]:
    """Return (taken, exists) for a refused clone.

    ``taken``: another VM has the VMID, so nothing of ours is there. ``exists``: a VM, or a leftover volume of that
    name, is in the way; another VMID avoids both.
    """
    text = error.text if isinstance(error, ApiError) else error.exitstatus
    exists = "already exists" in text or "File exists" in text
    # In a task "exists" may also mean a volume, and then the task has already begun to make the VM.
    taken = exists and (
        isinstance(error, ApiError) or re.search(r"config file|\.conf\b|\b(VM|CT) \d+ already exists", text) is not None
    )
    return taken, exists


def _not_certain(sandbox: Sandbox) -> Kept:
    return Kept(
        "ambiguous",
        f"sandbox {sandbox.vmid}: whether VM {sandbox.vmid} is the clone that was begun is not certain; it was left "
        "alone. Look at it, and remove it by hand if it is to go",
    )


def _send_clone(ctx: Context, claim: Claim, spec: Spec, sandbox: Sandbox, noted: dict[str, Any]) -> str:
    if sandbox.state == states.REQUESTED:
        done = ctx.records.change(
            claim,
            sandbox,
            "create",
            to=states.PROVISIONING,
            outcome="decided",
            reason="clone",
            evidence={
                "template": noted["template"],
                "template_name": noted.get("template_name"),
                "options": update.remembered(spec),
            },
            journal=("cloning", noted),
        )
        for name in ("state", "generation", "state_changed_at", "updated_at", "reason"):
            setattr(sandbox, name, getattr(done, name))
    else:
        ctx.records.journal(claim, "create", "cloning", noted)
    if "full" not in noted:
        # Journals of earlier releases lack these fields.
        noted.update(_clone_note(ctx, spec, templates.find(ctx, str(noted["template"])), sandbox.node))
    try:
        upid = _post_clone(ctx, spec, sandbox, noted)
    except ApiError as error:
        if (
            "Linked clone feature is not supported" not in error.text
            or noted["full"] is not None
            or not ctx.config.storage
        ):
            raise
        # Proxmox made nothing. The configured storage is the template's own, and that storage supports full clones
        # only.
        noted.update(full=True, storage=ctx.config.storage)
        ctx.records.journal(claim, "create", "cloning", noted)
        upid = _post_clone(ctx, spec, sandbox, noted)
    except Unreachable:
        # The connection was refused, so the request was certainly not carried out.
        ctx.records.journal(claim, "create", "reserved", noted)
        raise
    if not isinstance(upid, str):
        raise OutcomeUnknown(
            f"clone to VM {sandbox.vmid}: Proxmox answered without a task id; run again to find out what became of it"
        )
    noted["upid"] = upid
    ctx.records.journal(claim, "create", "waiting", noted)
    return upid


def _post_clone(ctx: Context, spec: Spec, sandbox: Sandbox, noted: dict[str, Any]) -> Any:
    return ctx.client.post(
        f"nodes/{noted['template_node']}/qemu/{noted['template']}/clone",
        newid=sandbox.vmid,
        name=sandbox.name,
        description=identity.described(
            {"description": identity.marker(sandbox.uuid, ctx.records.database_id())}, spec.description or ""
        ),
        pool=spec.pool or ctx.config.pool,
        storage=noted["storage"],
        target=sandbox.node if sandbox.node != noted["template_node"] else None,
        full=None if noted["full"] is None else int(noted["full"]),
    )


def _clone_appears(ctx: Context, claim: Claim, sandbox: Sandbox, noted: dict[str, Any]) -> bool:
    """Return whether the clone appears whose answer was just cut. If so, bind the record to it.

    Looks for _CUT_SECONDS, and longer while a VM is being cloned to that VMID. False leaves the outcome unknown, as
    after a killed run: Proxmox may still carry the request out.
    """
    created = {**noted, "phase": "cloning", "at": ctx.clock.now()}
    patience = min(_CUT_SECONDS, ctx.config.doubt_window / 4)
    now = ctx.clock.monotonic()
    last, deadline = now + ctx.wait_timeout, now + patience
    while ctx.clock.monotonic() <= min(deadline, last):
        row: dict[str, Any] = {}
        try:
            row = ctx.cluster.vms(fresh=True).get(sandbox.vmid) or {}
            if row and binding.locate_unbound(ctx, sandbox, claim, created).match:
                return True
        except (Kept, ProxmoxError):
            # The VM is being cloned, or cannot be read at the moment.
            pass
        if row.get("lock"):
            deadline = ctx.clock.monotonic() + patience
        ctx.clock.sleep(min(0.5, patience))
    return False


def _await_doubt(ctx: Context, claim: Claim, sandbox: Sandbox, created: dict[str, Any]) -> Located:
    """Wait until it is certain whether Proxmox carried out the clone of a killed run, and return the VM as found."""
    deadline = ctx.clock.monotonic() + ctx.wait_timeout
    while True:
        ctx.cluster.vms(fresh=True)
        try:
            found = binding.locate_unbound(ctx, sandbox, claim, created)
            if not (found.verdict and found.verdict.identity == identity.UNKNOWN):
                return found
        except Kept as error:
            if error.reason not in ("unknown", "locked") or ctx.clock.monotonic() > deadline:
                raise
        if ctx.clock.monotonic() > deadline:
            raise Kept(
                "locked",
                f"sandbox {sandbox.vmid}: the clone that an earlier run began has not ended within {ctx.wait_timeout} "
                "s (wait_timeout)",
            )
        ctx.clock.sleep(1.0)


def _configure(
    ctx: Context, claim: Claim, spec: Spec, sandbox: Sandbox, found: Located, noted: dict[str, Any], warnings: list[str]
) -> Located:
    """Write the options that the clone call cannot carry, then resize the disk.

    Each write carries the digest of the configuration that was judged. Returns the VM with its last verdict.
    """
    refused: set[str] = set()

    def write(located: Located) -> None:
        changes = vm_config.desired_config(ctx, spec, sandbox, located.config)
        if located is not found:
            # The configuration changed since the clone, so a set protection is a person's wish and not the template's.
            changes.pop("protection", None)
        if changes:
            vm_config.write_config(ctx, located, changes, refused)

    write_with_digest(ctx, sandbox, found, write)
    warnings += vm_config.tag_warnings(sandbox, refused, vm_config.split_tags(found.config.get("tags")))
    if spec.firewall_group:
        vm_config.join_firewall_group(ctx, sandbox, found, spec.firewall_group)
        found = require_match(ctx, sandbox)
    if spec.disk_size:
        disk = vm_config.boot_disk(found.config)
        if disk is None:
            raise InvalidInput("disk_size: the template has no disk to resize", option="disk_size")
        size = spec.disk_size
        if size.startswith("+"):
            # Write the target size to the journal before the request. Disks never shrink, so a resumed run must not add
            # the same amount again.
            if "disk_size" not in noted:
                noted["disk_size"] = vm_config.grown(str(found.config[disk]), size)
                ctx.records.journal(claim, "create", "configuring", noted)
            size = noted["disk_size"]
        found = require_match(ctx, sandbox)
        write_with_digest(
            ctx,
            sandbox,
            found,
            lambda located: power.resize(ctx, located, disk, size, f"resize disk {disk} of VM {sandbox.vmid}"),
        )
    return found


def _await_ip(ctx: Context, claim: Claim, sandbox: Sandbox, found: Located, noted: dict[str, Any]) -> Sandbox:
    """Wait for the address that the guest agent reports, and store it in the record."""
    # ``found`` dates from before the configuration was written. Read again to see the static address of ipconfig0.
    ip = address.wait(ctx, sandbox, match_if_readable(ctx, sandbox) or found)
    return ctx.records.change(
        claim,
        sandbox,
        "create",
        ip=ip,
        ip_seen_at=ctx.clock.now(),
        reason="address",
        evidence={"ip": ip},
        journal=("configuring", noted),
    )


def _occupied(vmid: int, by: str) -> CreationFailed:
    return CreationFailed(
        f"vmid: {vmid} is occupied by a VM that is not ours ({by}); it was not touched. Choose another vmid, or leave "
        "vmid out",
        vmid=vmid,
        option="vmid",
    )


def _clean_up(
    ctx: Context, claim: Claim, sandbox: Sandbox, error: AgentlabError, told: str, noted: dict[str, Any]
) -> CreationFailed:
    """Set the record to FAILED and remove the VM of our own clone through the destroy pipeline.

    Returns the error for the caller. Its message says what was removed and what is left.
    """
    clean = False
    remedy = None
    try:
        now = ctx.records.get(sandbox.uuid)
        if states.can_follow(now.state, states.FAILED):
            now = ctx.records.change(
                claim,
                now,
                "create",
                to=states.FAILED,
                outcome="failed",
                reason="creation_failed",
                evidence={"message": error.message},
            )
        ctx.records.release(claim)
        # The cached list dates from before the clone. Decide by the VM that stands at the VMID now.
        ctx.cluster.vms(fresh=True)
        outcome = destroy.run(ctx, [(now, destroy.Request(operation="clean-up", force=True, clean_up=True))])[0]
        clean = outcome.state == states.DESTROYED
        if clean:
            # An accepted clone request leaves its task id in the journal.
            made = sandbox.smbios_uuid is not None or sandbox.snippet is not None or noted.get("upid") is not None
            rest = "what was made for it has been removed" if made else "nothing was made for it"
        else:
            rest = f"its record is in {outcome.state} state: {outcome.message}"
            remedy = "remove"
    except AgentlabError as second:
        rest = f"and cleaning up failed too: {second.message}"
    try:
        # Remove the snippet even when the VM could not be removed, because it may hold secrets.
        snippets.remove(ctx, ctx.records.get(sandbox.uuid))
    except AgentlabError as third:
        clean = False
        rest += f"; {third.message}"
    return CreationFailed(
        f"sandbox {sandbox.vmid} could not be created: {told}; {rest}",
        vmid=sandbox.vmid,
        cause=error.as_dict(),
        clean=clean,
        remedy=remedy,
    )
