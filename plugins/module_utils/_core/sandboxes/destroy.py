# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Destroy sandboxes: destroy, force, prune, cleanup rules and failed creations all use this pipeline.

removal.py deletes the VMs. This file then proves their absence, for all sandboxes of a run together, and closes the
records.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from .. import states
from ..context import Context, make_failure
from ..errors import AgentlabError, Busy, Kept, ProxmoxError, StateConflict
from ..model import Outcome, Sandbox
from ..proxmox import identity
from ..store.records import Ending
from ..vm import power
from ..vm.locate import Located, locate, refuse_guarded, refuse_not_ours
from ..workspaces import workspace_disk
from . import leftovers
from .removal import Gone, Removal, Request, abandon_removal, check, locate_own, refuse_running, was_never_cloned

__all__ = ["Request", "check", "destroy_several", "plan", "run"]

# Reasons that prove by themselves that no VM of ours is left.
_PROVEN = ("vmid_reused", "never_created")


@dataclass(frozen=True, slots=True)
class Plan:
    """The effect that a destroy would have now. With ``deletes_vm`` false only the record is closed."""

    deletes_vm: bool
    reason: str
    message: str | None = None


def plan(ctx: Context, sandbox: Sandbox, *, force: bool = True) -> Plan:
    """Return what the pipeline would do now. Reads everything that a run reads, and writes nothing.

    Raises Kept for a sandbox that would be kept, and StateConflict for a running VM without force.
    """
    unfinished = ctx.records.find_journal_entry(sandbox.uuid)
    created = unfinished.creation if unfinished else None
    if was_never_cloned(sandbox, created):
        return Plan(False, "never_created", "no clone of ours was ever made for it")
    located = locate_own(ctx, sandbox, None, created)
    if located.node is None:
        presence = ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid]
        if presence.absent:
            return Plan(False, "vm_absent", presence.why)
        raise Kept("unknown", f"sandbox {sandbox.vmid}: {presence.why}")
    if located.verdict and located.verdict.identity == identity.FOREIGN:
        ctx.cluster.require_quorum()
        ctx.cluster.confirm()
        return Plan(False, "vmid_reused", "the VMID belongs to another VM now, which is left alone")
    refuse_not_ours(sandbox, located)
    refuse_guarded(sandbox, located)
    if not force:
        refuse_running(ctx, sandbox, located)
    workspace_disk.refuse_planned(ctx, sandbox, located)
    ctx.cluster.require_quorum()
    return Plan(True, "destroyed")


def run(ctx: Context, items: list[tuple[Sandbox, Request]]) -> list[Outcome]:
    """Destroy several sandboxes at once, and return one outcome for each item in the order of ``items``.

    The failure of an item stops no other item. Absence is proven for all items together at the end.
    """
    claimed: list[Gone] = []
    try:
        return _remove_and_close(ctx, items, claimed)
    except BaseException:
        # Also when the process is told to stop. Closed sandboxes have already given up their claim.
        for gone in claimed:
            ctx.records.release(gone.claim)
        raise


def _remove_and_close(ctx: Context, items: list[tuple[Sandbox, Request]], claimed: list[Gone]) -> list[Outcome]:
    """Do the work of ``run``. Append to ``claimed`` each sandbox whose VM is gone while its claim is held."""

    def remove_vm(item: tuple[Sandbox, Request]) -> Outcome | Gone:
        sandbox, request = item
        try:
            result = Removal(ctx, sandbox, request).run()
            if isinstance(result, Outcome):
                return result
            claimed.append(result)
            # Close a record with a proof of its own at once. Waiting for the other items could take long.
            return _close_or_keep(ctx, result, {}) if result.reason in _PROVEN else result
        except Kept as error:
            return Outcome.of(
                "kept",
                _read_current(ctx, sandbox),
                previous_state=sandbox.state,
                reason=error.reason,
                message=error.message,
                remedy=error.remedy,
                failed=True,
            )
        except AgentlabError as error:
            return make_failure(_read_current(ctx, sandbox), error)

    if len(items) == 1 and items[0][0].state == states.STOPPED and items[0][0].node:
        # Look on the sandbox's own node first: that saves the request for the list.
        ctx.cluster.expect_stopped(items[0][0].vmid, items[0][0].node)
    else:
        # An unreadable list is reported with each item later.
        with contextlib.suppress(ProxmoxError):
            ctx.cluster.survey([sandbox.vmid for sandbox, _request in items])
    results = ctx.run_each(remove_vm, items)
    gone = [result for result in results if isinstance(result, Gone)]
    if not gone:
        return [result for result in results if isinstance(result, Outcome)]
    proofs = ctx.cluster.prove_absent(
        [vm.sandbox.vmid for vm in gone], anew=not all(vm.untouched_since_list for vm in gone)
    )
    proven = [vm for vm in gone if proofs[vm.sandbox.vmid].absent]
    closing = set(map(id, proven))
    unproven = [vm for vm in gone if id(vm) not in closing]
    outcomes = [
        *_close_records(ctx, proven, proofs),
        *ctx.run_each(lambda vm: _close_or_keep(ctx, vm, proofs), unproven),
    ]
    finished = dict(zip(map(id, [*proven, *unproven]), outcomes, strict=True))
    return [finished[id(result)] if isinstance(result, Gone) else result for result in results]


def destroy_several(ctx: Context, sandboxes: list[Sandbox], force: bool) -> list[Outcome]:
    """Destroy the sandboxes that the rules allow (in check mode: plan it); return an outcome for each, in order."""
    outcomes: dict[str, Outcome] = {}
    todo: list[Sandbox] = []
    for sandbox in sandboxes:
        try:
            if not check(ctx, sandbox, force):
                outcomes[sandbox.uuid] = Outcome.of("unchanged", sandbox, reason=sandbox.reason)
            elif ctx.dry_run:
                outcomes[sandbox.uuid] = _plan_outcome(ctx, sandbox, force)
            else:
                todo.append(sandbox)
        except AgentlabError as error:
            outcomes[sandbox.uuid] = make_failure(sandbox, error)
    destroyed = run(ctx, [(sandbox, Request(force=force)) for sandbox in todo]) if todo else []
    outcomes.update(zip((sandbox.uuid for sandbox in todo), destroyed, strict=True))
    return [outcomes[sandbox.uuid] for sandbox in sandboxes]


def _plan_outcome(ctx: Context, sandbox: Sandbox, force: bool) -> Outcome:
    """Return the outcome of check mode."""
    try:
        planned = plan(ctx, sandbox, force=force)
        return Outcome.of(
            "would_destroy" if planned.deletes_vm else "would_mark_destroyed",
            sandbox,
            state=states.DESTROYED,
            reason=planned.reason,
            message=planned.message,
            changed=True,
        )
    except (Kept, Busy, StateConflict) as error:
        return make_failure(sandbox, error)


def _read_current(ctx: Context, sandbox: Sandbox) -> Sandbox:
    """Return the present record, or the given one if the record cannot be read."""
    try:
        return ctx.records.get(sandbox.uuid)
    except AgentlabError:
        return sandbox


def _close_records(ctx: Context, proven: list[Gone], proofs: dict[int, Any]) -> list[Outcome]:
    """Close the records of all VMs proven to be gone, in one transaction and without a request to Proxmox."""
    try:
        with ctx.database.group_writes():
            return _close_together(ctx, proven, proofs)
    except AgentlabError as error:
        for gone in proven:
            ctx.records.release(gone.claim)
        return [make_failure(_read_current(ctx, gone.sandbox), error) for gone in proven]


def _close_together(ctx: Context, proven: list[Gone], proofs: dict[int, Any]) -> list[Outcome]:
    """Close these records in the transaction of the caller, with few statements for all of them.

    ``_close_or_keep`` settles each record that cannot be closed so, and says why.
    """
    cleared: dict[str, Gone] = {}
    for gone in proven:
        with contextlib.suppress(AgentlabError):
            leftovers.clear(ctx, gone.claim, ctx.records.get(gone.sandbox.uuid))
            cleared[gone.claim.uuid] = gone
    endings = [
        Ending(
            gone.claim,
            gone.reason,
            {**gone.evidence, **proofs[gone.sandbox.vmid].evidence},
            gone.upids,
            _measure_ms(ctx, gone),
        )
        for gone in cleared.values()
    ]
    records = dict(zip(cleared, ctx.records.finish_all(endings, "destroy", states.DESTROYED), strict=True))
    outcomes = []
    for gone in proven:
        closed = records.get(gone.claim.uuid)
        outcomes.append(
            _close_or_keep(ctx, gone, proofs) if closed is None else _make_destroyed_outcome(gone, closed, gone.reason)
        )
    return outcomes


def _measure_ms(ctx: Context, gone: Gone) -> int:
    return int((ctx.clock.monotonic() - gone.began) * 1000)


def _make_destroyed_outcome(gone: Gone, closed: Sandbox, reason: str) -> Outcome:
    """Return the outcome of a sandbox whose record was closed with that reason."""
    return Outcome.of(
        "destroyed",
        closed,
        previous_state=gone.before.state,
        reason=reason,
        message=_explain_fate(closed.vmid, reason),
        changed=True,
        upids=gone.upids,
        warnings=gone.warnings,
    )


def _explain_kept(ctx: Context, gone: Gone) -> Kept:
    """Return why a record is kept whose VM was deleted or is missing, although its VMID is still in use."""
    vmid = gone.sandbox.vmid
    if not gone.upids and vmid not in ctx.cluster.list_vms():
        return Kept("unknown", f"sandbox {vmid}: {ctx.cluster.explain_in_use(vmid)}")
    was = "deleted" if gone.upids else "not to be seen"
    return Kept(
        "unknown",
        f"sandbox {vmid}: a VM with that VMID is still there although it was {was} (VMID {vmid} is in use; hidden from "
        "these credentials?); run again",
    )


# Sentences for a VM that this run did not delete, by reason.
_FATES = {
    "vm_absent": "its VM was already gone",
    "vmid_reused": "its VM was already gone; VMID {vmid} is somebody else's VM now, and was left alone",
    "never_created": "its VM was never made",
}


def _explain_fate(vmid: int, reason: str) -> str | None:
    """Return the sentence for a VM that this run did not delete; None when this run deleted it."""
    text = _FATES.get(reason)
    return f"sandbox {vmid}: {text.format(vmid=vmid)}" if text else None


def _close_or_keep(ctx: Context, gone: Gone, proofs: dict[int, Any]) -> Outcome:
    """Set the record to DESTROYED if absence is proven. Otherwise keep record and journal for the next run."""
    sandbox = gone.sandbox
    try:
        evidence = dict(gone.evidence)
        reason = gone.reason
        if reason not in _PROVEN:
            proof = proofs[sandbox.vmid]
            if proof.absent is False:
                # A VM has the VMID: ours (it moved, or the delete had no effect), or already somebody else's. Only its
                # configuration can tell.
                ctx.cluster.list_vms(fresh=True)
                again = locate(ctx, sandbox) if sandbox.smbios_uuid else Located(None, {}, None)
                if again.verdict is None or again.verdict.identity != identity.FOREIGN:
                    raise _explain_kept(ctx, gone)
                reason, evidence = "vmid_reused", again.verdict.evidence
            elif proof.absent is None:
                raise Kept("unknown", f"sandbox {sandbox.vmid}: it is not proven that its VM is gone: {proof.why}")
            else:
                evidence.update(proof.evidence)
        leftovers.clear(ctx, gone.claim, ctx.records.get(sandbox.uuid))
        closed = power.settle(
            ctx,
            gone.claim,
            ctx.records.get(sandbox.uuid),
            "destroy",
            to=states.DESTROYED,
            reason=reason,
            evidence=evidence,
            upids=gone.upids,
            duration_ms=_measure_ms(ctx, gone),
            finish=True,
        )
        return _make_destroyed_outcome(gone, closed, reason)
    except Kept as error:
        abandon_removal(
            ctx, gone.claim, sandbox, Request(), error, sent=gone.doubtful or bool(gone.upids), stopped=False
        )
        return Outcome.of(
            "kept",
            _read_current(ctx, sandbox),
            previous_state=gone.before.state,
            reason=error.reason,
            message=error.message,
            remedy=error.remedy,
            failed=True,
            upids=gone.upids,
        )
    except AgentlabError as error:
        ctx.records.release(gone.claim)
        now = _read_current(ctx, sandbox)
        if now.state == states.DESTROYED:
            # Another run took over the claim and finished the destroy.
            return Outcome.of(
                "destroyed",
                now,
                previous_state=gone.before.state,
                reason=now.reason,
                changed=True,
                upids=gone.upids,
                warnings=gone.warnings,
            )
        return make_failure(now, error)
