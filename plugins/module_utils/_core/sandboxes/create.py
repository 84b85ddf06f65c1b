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
import uuid as uuid_module
from dataclasses import replace
from typing import Any, cast

from .. import states
from ..context import Context, refuse_cut_off
from ..errors import (
    AccessDenied,
    AgentlabError,
    ClaimLost,
    CreationFailed,
    InvalidInput,
    Kept,
    OutcomeUnknown,
    RecordChanged,
    StoreError,
    TaskTimeout,
    TaskUnknown,
)
from ..guest import cloud_init, snippets
from ..model import Outcome, Sandbox
from ..store.journal import AWAITED, CLONING, CONFIGURING, STARTED, WAITING, CreationNote
from ..store.records import Claim
from ..vm import address, power
from ..vm.locate import Located, match_if_readable, require_match, write_with_digest
from ..workspaces import workspace_disk
from . import clone, destroy, place, refusals, update, vm_config
from . import template as templates
from .clone import Creation
from .spec import Spec

# Reasons for leaving a VM alone that pass by themselves, so that the creation can go on.
_PASSING = ("changed", "unknown", "locked", "node_offline")


def find_existing(ctx: Context, spec: Spec) -> Sandbox | None:
    """Return the live sandbox with the VMID or the name of the spec, or None.

    Raises InvalidInput when VMID and name belong to different sandboxes.
    """
    by_vmid = ctx.records.find_live_by_vmid(spec.vmid) if spec.vmid is not None else None
    by_name = ctx.records.find_live_by_name(spec.name) if spec.name is not None else None
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
    sandbox = find_existing(ctx, spec)
    if sandbox is None:
        try:
            return _create_sandbox(ctx, spec)
        except InvalidInput:
            if find_existing(ctx, spec) is None:
                raise
        # Another run has reserved the name or the VMID meanwhile. Decide again.
        return run(ctx, spec)
    if sandbox.state in states.CREATING or _is_almost_done(ctx, sandbox):
        if ctx.dry_run:
            return Outcome.of("would_create", sandbox, changed=True, state=states.RUNNING)
        claim = ctx.records.claim(sandbox.uuid, "create", wait=ctx.config.claim_timeout)
        now = ctx.records.get(sandbox.uuid)
        unfinished = claim.interrupted
        if now.state in states.CREATING or (
            unfinished and (unfinished.kind == "destroy" or (unfinished.kind == "create" and now.state == states.READY))
        ):
            try:
                return _resume_creation(ctx, claim, spec, now)
            except CreationFailed as error:
                node = error.detail.get("failed_node")
                if node is None:
                    raise
                return _create_sandbox(ctx, spec, {node: error.message})
        # While this run waited for the claim, another run finished the creation or gave it up. Decide again.
        ctx.records.release(claim)
        return run(ctx, spec)
    if sandbox.state == states.FAILED and (
        sandbox.smbios_uuid is None
        or sandbox.reason in ("creation_failed", "creation_interrupted", "cloud_init_failed")
    ):
        raise CreationFailed(
            f"sandbox {sandbox.vmid} could not be created earlier ({sandbox.reason}) and is in FAILED state",
            vmid=sandbox.vmid,
            remedy="remove",
        )
    return _update_existing(ctx, sandbox, spec)


def _update_existing(ctx: Context, sandbox: Sandbox, spec: Spec) -> Outcome:
    """Update an existing sandbox where the options allow, and warn of each given option that is not in force."""
    # The update goes first: it may be refused, and then the record keeps its settings too.
    outcome = update.apply(ctx, sandbox, spec) if spec.update else Outcome.of("unchanged", sandbox)
    amended = amend(ctx, outcome.sandbox or sandbox, protected=spec.protected or None, keepalive=spec.keepalive or None)
    if amended.changed:
        outcome = add_outcome(outcome, amended)
    differences = update.find_differences(ctx, outcome.sandbox or sandbox, spec)
    if spec.update:
        differences = {name: values for name, values in differences.items() if name not in update.APPLICABLE}
    outcome.advice += update.advise(sandbox, differences)
    return outcome


def add_outcome(first: Outcome, second: Outcome) -> Outcome:
    """Return the second outcome, extended by what the first did to the same sandbox."""
    second.warnings, second.advice, second.upids = first.warnings, first.advice, first.upids
    for part in ("after", "before"):
        second.extra[part] = {**first.extra.get(part, {}), **second.extra[part]}
    return second


def _is_almost_done(ctx: Context, sandbox: Sandbox) -> bool:
    """Return whether the sandbox is READY only because its creation was killed before the last step."""
    unfinished = ctx.records.find_journal_entry(sandbox.uuid) if sandbox.state == states.READY else None
    return unfinished is not None and unfinished.kind == "create"


def amend(ctx: Context, sandbox: Sandbox, **settings: bool | None) -> Outcome:
    """Set the options that concern only the record (protected, keepalive) where they differ, and return the outcome."""
    new = {name: value for name, value in settings.items() if value is not None and value != getattr(sandbox, name)}
    if not new:
        return Outcome.of("unchanged", sandbox)
    before = {name: getattr(sandbox, name) for name in new}
    if ctx.dry_run:
        return Outcome.of("would_update", sandbox, changed=True, extra={"after": new, "before": before})
    amended = ctx.records.amend(sandbox, "update", **new)
    return Outcome.of(
        "updated", amended, previous_state=sandbox.state, changed=True, extra={"after": new, "before": before}
    )


def _create_sandbox(ctx: Context, spec: Spec, failed: dict[str, str] | None = None) -> Outcome:
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
                raise _add_history(error, failed) from None
            failed[node] = error.message
            continue
        outcome.warnings[:0] = [
            f"node {node} failed the creation and was left for "
            f"{outcome.sandbox.node if outcome.sandbox else 'another'}: {why}"
            for node, why in failed.items()
        ]
        return outcome


def _add_history(error: CreationFailed, failed: dict[str, str]) -> CreationFailed:
    """Return the error, extended by the reasons why the nodes tried before failed."""
    if not failed or error.detail.get("placement") is not None:
        # The error of a placement decision already lists the failed nodes.
        return error
    tried = "; ".join(f"{node}: {why}" for node, why in failed.items())
    return CreationFailed(f"{error.message}. Tried before: {tried}", **error.detail)


def _create_once(ctx: Context, spec: Spec, failed: dict[str, str]) -> Outcome:
    """Reserve the record and create the sandbox on one node. Check mode only makes the decisions.

    ``failed``: as for ``_create_sandbox``. Raises CreationFailed, with ``failed_node`` where another node may succeed.
    """
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
    nodes = ctx.cluster.read_capacity().nodes
    choice = place.NodeChoice(ctx, spec, disk, failed) if place.is_open(ctx, spec, disk, nodes) else None
    if choice is not None:
        node, template = None, None
        if choice.preview_decision().node is None:
            raise choice.make_no_node_error()
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
    known = ctx.cluster.list_vms()
    if spec.vmid is not None and spec.vmid in known:
        raise refusals.make_occupied_error(spec.vmid, str(known[spec.vmid].get("name") or "unnamed"))
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
    note = CreationNote()
    journal: dict[str, Any] = {}

    def write(reservation: Any) -> Claim:
        return ctx.records.reserve(
            sandbox,
            vmid=spec.vmid,
            vmid_range=ctx.config.vmid_range,
            occupied={*known, *ctx.named_vmids},
            journal=journal,
            place=reservation,
        )

    if choice is not None:

        def note_choice() -> None:
            # Each node may have its own template, so the journal can only be completed once the node is chosen.
            chosen = cast(templates.Template, choice.template)
            clone.note_request(note, ctx, spec, chosen, sandbox.node)
            note.chosen = True
            journal.update(note.format_detail())

        claim = choice.reserve_node(sandbox, write, note_choice)
    else:
        named = cast(templates.Template, template)
        clone.note_request(note, ctx, spec, named, node)
        journal.update(note.format_detail())
        claim = write(place.make_fixed_place(ctx, spec, named, str(node)))
    decision = choice.decision if choice is not None else None
    if ctx.dry_run:
        outcome = Outcome.of("would_create", sandbox, previous_state=None, state=states.RUNNING, changed=True)
    else:
        outcome = _resume_creation(ctx, claim, spec, sandbox, note)
    if decision is not None:
        outcome.extra["placement"] = decision.public()
    return outcome


def _check_node(ctx: Context, node: str) -> None:
    """Raise InvalidInput for a node that is offline or not in the cluster."""
    nodes = ctx.cluster.list_nodes()
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


def _resume_creation(
    ctx: Context, claim: Claim, spec: Spec, sandbox: Sandbox, note: CreationNote | None = None
) -> Outcome:
    """Resume the creation at its current step and bring the sandbox to RUNNING.

    ``note``: what this run has just written to the journal; None to read what a killed run wrote. On a definite failure
    remove the VM that our own clone made, and raise CreationFailed. On an unknown outcome keep the journal and raise
    the error.
    """
    creation = Creation(ctx, claim, spec, sandbox, note or CreationNote())
    try:
        return _take_steps(creation)
    except (StoreError, ClaimLost, OutcomeUnknown, TaskTimeout, TaskUnknown, Kept) as error:
        # The outcome is unknown, or another run decides it. Keep the journal, so that the next run resumes here.
        sandbox = creation.sandbox
        if isinstance(error, RecordChanged) and ctx.records.get(sandbox.uuid).state == states.TIMEOUT:
            raise CreationFailed(
                f"sandbox {sandbox.vmid}: its lease ran out before it was ready; prune removes it, use a longer ttl",
                vmid=sandbox.vmid,
            ) from None
        error.detail.setdefault("vmid", sandbox.vmid)
        if isinstance(error, OutcomeUnknown) and str(error.detail.get("path") or "").endswith("/clone"):
            now = ctx.records.get(sandbox.uuid)
            error.message = (
                f"sandbox {now.vmid} ({now.state}): its clone did not end within {ctx.wait_timeout} s (wait_timeout); "
                "it goes on, run again to take it up"
                if _outlasts_pvesh(creation, error)
                else f"sandbox {now.vmid} ({now.state}): whether its clone was begun is not known; run again in "
                f"{ctx.config.doubt_window} s, or reconcile settles it ({error.message})"
            )
        _leave_to_next_run(creation, error)
        raise
    except cloud_init.CloudInitFailed as error:
        # Keep the VM so that the cause can be examined. Remove the snippet, because user data may hold secrets.
        snippets.remove(ctx, creation.sandbox)
        ctx.records.change(
            claim,
            creation.sandbox,
            "create",
            to=states.FAILED,
            outcome="failed",
            reason=error.code,
            evidence={"message": error.message},
            finish=True,
        )
        raise
    except AgentlabError as error:
        explanation = refusals.explain(ctx, spec, creation.sandbox.node, creation.note.template, error)
        failure = _remove_failed(creation, error, explanation or error.message)
        clean = failure.detail.pop("clean", False)
        if creation.note.chosen and clean and refusals.blames_node(error):
            failure.detail["failed_node"] = creation.sandbox.node
        raise failure from None
    finally:
        ctx.records.release(claim)


def _leave_to_next_run(creation: Creation, error: AgentlabError) -> None:
    """Keep a creation for the caller's next run where that run can finish it, and have the error say so.

    Reconcile leaves such a creation alone. Otherwise it would be FAILED before the caller has run again.
    """
    sandbox, note, spec = creation.sandbox, creation.note, creation.spec
    lost = isinstance(error, (OutcomeUnknown, TaskTimeout, TaskUnknown))
    passing = isinstance(error, Kept) and error.reason in _PASSING and error.remedy is None
    if not (lost or passing):
        return
    if sandbox.smbios_uuid is not None:
        creation.journal(AWAITED)
    elif note.upid and (
        isinstance(error, TaskTimeout)
        # A later run in doubt keeps the time of its entry, by which the doubt ends.
        or (creation.claim.interrupted is None and not isinstance(error, TaskUnknown))
    ):
        # The id of the clone task is known. ``awaited`` keeps reconcile from touching what the task makes.
        note.awaited = True
        creation.journal(WAITING)
    elif _outlasts_pvesh(creation, error):
        note.awaited = True
        creation.journal(CLONING)
    else:
        # The error of a lost clone request says what to do. A clone that died is settled by reconcile.
        return
    if "run again" not in error.message.lower():
        error.message += f"; run again to go on with sandbox {sandbox.vmid}"
    if spec.name is None and spec.vmid is None:
        error.message += f". Give its name then ({sandbox.name}): a run without a name makes another sandbox"


def _outlasts_pvesh(creation: Creation, error: AgentlabError) -> bool:
    """Return whether pvesh still waits for the clone task, whose id it prints only at the end."""
    path = str(error.detail.get("path") or "")
    return path.endswith("/clone") and bool(error.detail.get("timed_out")) and creation.ctx.client.awaits_tasks


def _take_steps(creation: Creation) -> Outcome:
    """Take the steps that are left, each written down before it is done, and return the outcome."""
    ctx, claim, spec = creation.ctx, creation.claim, creation.spec
    began = ctx.clock.monotonic()
    unfinished = claim.interrupted
    # A destroy has replaced our journal entry: we no longer know how far the creation got, and a delete may be
    # running.
    refuse_cut_off(claim, creation.sandbox)
    if unfinished and unfinished.kind == "create" and creation.sandbox.state == states.READY:
        sandbox = ctx.records.change(claim, creation.sandbox, "create", to=states.RUNNING, reason="ready", finish=True)
        return Outcome.of("created", sandbox, previous_state=states.READY, changed=True)
    if unfinished and unfinished.creation:
        # Phase and time belong to the entry of the earlier run, not to what this run notes.
        creation.note = replace(unfinished.creation, phase="", at=0)
    disk = workspace_disk.assign_to_creation(ctx, claim, creation.sandbox, spec.workspace)
    creation.sandbox = cloud_init.provide_snippet(ctx, claim, creation.sandbox, spec.cloud_init_user_data)
    cloned = clone.make_vm(creation) if creation.sandbox.smbios_uuid is None else None
    if creation.sandbox.state != states.BOOTING:
        creation.sandbox = ctx.records.change(
            claim,
            creation.sandbox,
            "create",
            to=states.BOOTING,
            reason="cloned",
            upids=creation.upids,
            journal=(CONFIGURING, creation.note.format_detail()),
        )
    located = _configure_vm(creation, cloned or require_match(ctx, creation.sandbox))
    if disk is not None:
        located = require_match(ctx, creation.sandbox)
        workspace_disk.attach(ctx, claim, creation.sandbox, located, disk)
        creation.sandbox = ctx.records.get(creation.sandbox.uuid)
    upids, warnings = (power.start_new if cloned else power.start)(ctx, creation.sandbox, located)
    creation.upids += upids
    creation.warnings += warnings
    if spec.wait_for_ip:
        creation.sandbox = _await_ip(creation, located)
    if spec.wait_for_cloud_init:
        cloud_init.wait_for_end(ctx, creation.sandbox)
    creation.sandbox = ctx.records.change(
        claim,
        creation.sandbox,
        "create",
        to=states.READY,
        reason="started",
        upids=upids,
        journal=(STARTED, creation.note.format_detail()),
    )
    took = int((ctx.clock.monotonic() - began) * 1000)
    creation.sandbox = ctx.records.change(
        claim, creation.sandbox, "create", to=states.RUNNING, reason="ready", duration_ms=took, finish=True
    )
    return Outcome.of(
        "created",
        creation.sandbox,
        previous_state=None,
        changed=True,
        upids=creation.upids,
        warnings=creation.warnings,
    )


def _configure_vm(creation: Creation, new: Located) -> Located:
    """Write the options that the clone call cannot carry, then resize the disk.

    ``new``: the VM as it was judged after the clone. Each write carries the digest of the configuration that was
    judged. Returns the VM with its last verdict.
    """
    ctx, spec, sandbox, note = creation.ctx, creation.spec, creation.sandbox, creation.note
    refused: set[str] = set()

    def write(located: Located) -> None:
        changes = vm_config.compute_changes(ctx, spec, sandbox, located.config)
        if located is not new:
            # The configuration changed since the clone, so a set protection is a person's wish and not the template's.
            changes.pop("protection", None)
        if changes:
            vm_config.write_config(ctx, located, changes, refused)

    write_with_digest(ctx, sandbox, new, write)
    creation.warnings += vm_config.compose_tag_warnings(sandbox, refused, vm_config.split_tags(new.config.get("tags")))
    current = new
    if spec.firewall_group:
        vm_config.join_firewall_group(ctx, sandbox, current, spec.firewall_group)
        current = require_match(ctx, sandbox)
    if spec.disk_size:
        disk = vm_config.find_boot_disk(current.config)
        if disk is None:
            raise InvalidInput("disk_size: the template has no disk to resize", option="disk_size")
        size = spec.disk_size
        if size.startswith("+"):
            # Write the target size to the journal before the request. Disks never shrink, so a resumed run must not add
            # the same amount again.
            if note.disk_size is None:
                note.disk_size = vm_config.compute_grown_size(str(current.config[disk]), size)
                creation.journal(CONFIGURING)
            size = note.disk_size
        current = require_match(ctx, sandbox)
        write_with_digest(
            ctx,
            sandbox,
            current,
            lambda located: power.resize(ctx, located, disk, size, f"resize disk {disk} of VM {sandbox.vmid}"),
        )
    return current


def _await_ip(creation: Creation, located: Located) -> Sandbox:
    """Wait for the address that the guest agent reports, store it, and return the new record."""
    ctx, sandbox = creation.ctx, creation.sandbox
    # ``located`` dates from before the configuration was written. Read again to see the static address of ipconfig0.
    ip = address.wait_for_address(ctx, sandbox, match_if_readable(ctx, sandbox) or located)
    return ctx.records.change(
        creation.claim,
        sandbox,
        "create",
        ip=ip,
        ip_seen_at=ctx.clock.now(),
        reason="address",
        evidence={"ip": ip},
        journal=(CONFIGURING, creation.note.format_detail()),
    )


def _remove_failed(creation: Creation, error: AgentlabError, explanation: str) -> CreationFailed:
    """Set the record to FAILED and remove the VM of our own clone through the destroy pipeline.

    Returns the error for the caller. Its message says what was removed and what is left.
    """
    ctx, claim, sandbox = creation.ctx, creation.claim, creation.sandbox
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
        ctx.cluster.list_vms(fresh=True)
        outcome = destroy.run(ctx, [(now, destroy.Request(operation="clean-up", force=True, clean_up=True))])[0]
        clean = outcome.state == states.DESTROYED
        if clean:
            # An accepted clone request leaves its task id in the journal.
            has_leftovers = (
                sandbox.smbios_uuid is not None or sandbox.snippet is not None or creation.note.upid is not None
            )
            remainder = "what was made for it has been removed" if has_leftovers else "nothing was made for it"
        else:
            remainder = f"its record is in {outcome.state} state: {outcome.message}"
            remedy = "remove"
    except AgentlabError as second:
        remainder = f"and cleaning up failed too: {second.message}"
    try:
        # Remove the snippet even when the VM could not be removed, because it may hold secrets.
        snippets.remove(ctx, ctx.records.get(sandbox.uuid))
    except AgentlabError as third:
        clean = False
        remainder += f"; {third.message}"
    return CreationFailed(
        f"sandbox {sandbox.vmid} could not be created: {explanation}; {remainder}",
        vmid=sandbox.vmid,
        cause=error.as_dict(),
        clean=clean,
        remedy=remedy,
    )
