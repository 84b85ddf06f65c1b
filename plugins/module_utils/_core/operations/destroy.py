# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one destroy pipeline: destroy, force, prune, cleanup rules and failed creations all go through it.

claim, verify identity, stop, mark (which verifies again by the digest), delete, wait, prove absence, commit. Each phase is journaled before
the request it announces, so a run killed at any point is finished by the next. Identity is never skipped, force or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import clock as clock_module
from .. import states
from ..errors import (
    AgentlabError,
    ApiError,
    Busy,
    ClaimLost,
    Kept,
    OutcomeUnknown,
    ProxmoxError,
    StateConflict,
    StoreError,
    TaskFailed,
    TaskTimeout,
    TaskUnknown,
)
from ..model import Outcome, Sandbox
from ..proxmox import identity
from ..proxmox.client import changed, not_begun
from ..store.records import POINT_OF_NO_RETURN, Claim, Operation
from . import create_recovery, power, remains, workspace_disk
from .context import Context, failure
from .verify import Located, locate, refuse_guarded, refuse_not_ours

# Times the VM may change between judging and marking before it is left alone.
_MARK_TRIES = 3
# Reasons that are a proof in themselves.
_PROVEN = ("vmid_reused", "never_created")


@dataclass(slots=True)
class Request:
    """What is asked for. ``recheck`` is run on the record once the claim is held: what was planned must still be true."""

    operation: str = "destroy"
    force: bool = False
    # A failed creation removes its own remains, also when the sandbox was to be protected.
    clean_up: bool = False
    claim_wait: float | None = None
    recheck: Callable[[Sandbox], None] | None = None


@dataclass(slots=True)
class _Gone:
    """Deleted (or found missing), absence still to be proven. Holds the claim."""

    claim: Claim
    sandbox: Sandbox
    before: Sandbox
    reason: str
    evidence: dict[str, Any]
    began: float
    upids: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Nothing was ever done about it since the list was read, by us or by another run: that list may prove its absence.
    quiet: bool = False
    # The delete of a killed run may still be carried out: while absence is not proven, that stays in the journal.
    doubtful: bool = False


def check(ctx: Context, sandbox: Sandbox, force: bool, clean_up: bool = False) -> bool:
    """State rule and protection, from the record alone: whether there is something to do."""
    todo = states.check("force_destroy" if force else "destroy", sandbox.state, ctx.force_hint)
    if todo and sandbox.protected and not clean_up:
        raise Kept("protected", f"sandbox {sandbox.vmid} is protected; set protected=false first (force does not skip this)")
    return todo


def plan(ctx: Context, sandbox: Sandbox) -> tuple[str, str, str | None]:
    """What the pipeline would do now, by full reads and no writes: (action, reason, message); raises Kept for what would be kept."""
    left = ctx.records.under_way(sandbox.uuid)
    created = _creation_of(left) if left else None
    if never_cloned(sandbox, created):
        return "mark", "never_created", "no clone of ours was ever made for it"
    found = _locate(ctx, sandbox, None, {"create": created})
    if found.node is None:
        presence = ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid]
        if presence.absent:
            return "mark", "vm_absent", presence.why
        raise Kept("unknown", f"sandbox {sandbox.vmid}: {presence.why}")
    if found.verdict and found.verdict.identity == identity.FOREIGN:
        ctx.cluster.require_quorum()
        ctx.cluster.confirm()
        return "mark", "vmid_reused", "the VMID belongs to another VM now, which is left alone"
    refuse_not_ours(sandbox, found)
    refuse_guarded(sandbox, found)
    workspace_disk.refuse_planned(ctx, sandbox, found)
    ctx.cluster.require_quorum()
    return "destroy", "destroyed", None


def run(ctx: Context, items: list[tuple[Sandbox, Request]]) -> list[Outcome]:
    """Destroy several sandboxes at once; an item's failure stops no other. Absence is proven for all together at the end."""

    def first(item: tuple[Sandbox, Request]) -> Outcome | _Gone:
        sandbox, request = item
        try:
            found = _until_gone(ctx, sandbox, request)
            # What is a proof in itself is one now: it is not kept until the others, which may take long, are done.
            return _finish(ctx, found, {}) if isinstance(found, _Gone) and found.reason in _PROVEN else found
        except Kept as error:
            return Outcome.of("kept", _now(ctx, sandbox), previous_state=sandbox.state, reason=error.reason, message=error.message, failed=True)
        except AgentlabError as error:
            return failure(_now(ctx, sandbox), error)

    # What cannot be read is told item by item.
    with contextlib.suppress(ProxmoxError):
        ctx.cluster.survey([sandbox.vmid for sandbox, _request in items])
    results = ctx.each(first, items)
    gone = [found for found in results if isinstance(found, _Gone)]
    if gone:
        try:
            proofs = ctx.cluster.prove_absent([found.sandbox.vmid for found in gone], anew=not all(found.quiet for found in gone))
        except AgentlabError:
            for found in gone:
                give_back(ctx, found.claim)
            raise
        sure = [found for found in gone if proofs[found.sandbox.vmid].absent]
        closing = set(map(id, sure))
        rest = [found for found in gone if id(found) not in closing]
        outcomes = [*_close(ctx, sure, proofs), *ctx.each(lambda found: _finish(ctx, found, proofs), rest)]
        finished = dict(zip(map(id, [*sure, *rest]), outcomes, strict=True))
        return [finished[id(found)] if isinstance(found, _Gone) else found for found in results]
    return [found for found in results if isinstance(found, Outcome)]


def several(ctx: Context, found: list[Sandbox], force: bool) -> list[Outcome]:
    """Destroy what the rules allow of these (in check mode: plan it); an outcome for each, in their order."""
    outcomes: dict[str, Outcome] = {}
    todo: list[Sandbox] = []
    for one in found:
        try:
            if not check(ctx, one, force):
                outcomes[one.uuid] = Outcome.of("unchanged", one, reason=one.reason)
            elif ctx.dry_run:
                outcomes[one.uuid] = _planned(ctx, one)
            else:
                todo.append(one)
        except AgentlabError as error:
            outcomes[one.uuid] = failure(one, error)
    done = run(ctx, [(one, Request(force=force)) for one in todo]) if todo else []
    outcomes.update(zip((one.uuid for one in todo), done, strict=True))
    return [outcomes[one.uuid] for one in found]


def _planned(ctx: Context, sandbox: Sandbox) -> Outcome:
    try:
        _action, reason, message = plan(ctx, sandbox)
        return Outcome.of("would_destroy", sandbox, state=states.DESTROYED, reason=reason, message=message, changed=True)
    except (Kept, Busy) as error:
        return failure(sandbox, error)


def never_cloned(sandbox: Sandbox, created: dict[str, Any] | None) -> bool:
    """True when the journal says that no clone request of ours is or was under way: whatever is at the VMID, it is not ours."""
    return sandbox.smbios_uuid is None and created is not None and created.get("phase") == "reserved"


def _creation_of(left: Operation) -> dict[str, Any] | None:
    """What the creation noted, from its own journal entry or from the destroy's that took it over."""
    if left.kind == "create":
        return {**left.detail, "phase": left.phase, "at": left.updated_at}
    found = left.detail.get("create")
    return found if isinstance(found, dict) else None


def _look_before_closing(ctx: Context, sandbox: Sandbox) -> None:
    """A refused clone leaves nothing behind; should a VM with our marker (or one just being cloned) stand there all the same, it is kept."""
    try:
        found = locate(ctx, sandbox)
    except (Kept, ProxmoxError):
        return
    if found.verdict and found.verdict.identity != identity.FOREIGN:
        raise Kept("ambiguous", f"sandbox {sandbox.vmid}: Proxmox refused its clone, but a VM that may be that clone is there now; it was left alone. "
                   "Look at it, and remove it by hand if it is to go", evidence=found.verdict.evidence)


def _now(ctx: Context, sandbox: Sandbox) -> Sandbox:
    try:
        return ctx.records.get(sandbox.uuid)
    except AgentlabError:
        return sandbox


def give_back(ctx: Context, claim: Claim) -> None:
    # Also when the disk is full: then the claim ends with this process.
    with contextlib.suppress(StoreError, ClaimLost):
        ctx.records.release(claim)


def _until_gone(ctx: Context, planned: Sandbox, request: Request) -> Outcome | _Gone:
    began = ctx.clock.monotonic()
    claim = ctx.records.claim(planned.uuid, "destroy", wait=ctx.config.claim_timeout if request.claim_wait is None else request.claim_wait)
    left = claim.interrupted
    # The journal entry of a killed run whose delete may have been sent, and may still be carried out; None for a new try.
    cut_off = left if left and left.kind == "destroy" and left.phase in POINT_OF_NO_RETURN else None
    sent = cut_off is not None
    since = 0
    stopped = False
    current = planned
    try:
        current = ctx.records.get(planned.uuid)
        if current.state == states.DESTROYED:
            give_back(ctx, claim)
            return Outcome.of("unchanged", current, reason=current.reason)
        if cut_off is None:
            if request.recheck:
                request.recheck(current)
            check(ctx, current, request.force, request.clean_up)
        elif current.protected:
            check(ctx, current, True, request.clean_up)
        detail: dict[str, Any] = {"operation": request.operation, "force": request.force}
        if left:
            # What the creation noted is needed to tell an unbound VM, until it is bound.
            detail["create"] = _creation_of(left)
        if cut_off:
            if cut_off.detail.get("upid"):
                detail["upid"] = cut_off.detail["upid"]
            # However often it is asked again: the doubt ends some time after the delete may have been sent, not after the last look.
            detail["since"] = since = int(cut_off.detail.get("since", cut_off.updated_at))
        before = current
        if current.generation != planned.generation:
            # Another run worked on it while we waited: what was read of the cluster before says nothing about it.
            ctx.cluster.vms(fresh=True)
        ctx.records.journal(claim, "destroy", cut_off.phase if cut_off else "verifying", detail)
        upids: list[str] = []
        warnings: list[str] = []
        if never_cloned(current, detail.get("create")):
            _look_before_closing(ctx, current)
            return _Gone(claim, current, before, "never_created", {"creation": "the clone was never asked for, or refused"}, began)
        if cut_off:
            try:
                warnings += _await_cut_off(ctx, current, cut_off)
            except TaskTimeout:
                # It goes on, or hangs. If its VM is gone that is to be proven all the same; else nothing is done beside it.
                if _locate(ctx, current, claim, detail).node is not None:
                    raise
        for attempt in range(_MARK_TRIES):
            # Needed after the VM was judged, and not to be read between that and the stop. What it says (or why it does not) counts then.
            no_quorum: AgentlabError | None = None
            try:
                ctx.cluster.require_quorum()
            except (ProxmoxError, Kept) as error:
                no_quorum = error
            found = _locate(ctx, current, claim, detail)
            current = ctx.records.get(current.uuid) if current.smbios_uuid is None else current
            if found.node is None:
                quiet = not upids and left is None and current.generation == planned.generation and not attempt
                doubtful = cut_off is not None and ctx.clock.now() - since <= ctx.config.doubt_window
                return _Gone(claim, current, before, "vm_absent", {}, began, upids, warnings, quiet, doubtful)
            if found.verdict and found.verdict.identity == identity.FOREIGN:
                if no_quorum is not None:
                    raise no_quorum
                ctx.cluster.confirm()
                return _Gone(claim, current, before, "vmid_reused", found.verdict.evidence, began, upids, warnings)
            refuse_not_ours(current, found)
            if cut_off and ctx.clock.now() - since > ctx.config.doubt_window:
                # The VM is there, and no delete of a killed run can be under way any more: from here on this is a new try.
                sent, cut_off = False, None
                del detail["since"]
            refuse_guarded(current, found)
            # What will be kept in the end is not stopped, and does not lose its workspace.
            try:
                asked = workspace_disk.refuse_planned(ctx, current, found)
            except ApiError as error:
                if not _vanished(ctx, error, attempt):
                    raise
                continue
            if no_quorum is not None:
                raise no_quorum
            if asked:
                # That took its time, and a stop has no precondition: whose VM it is now is looked at directly before it.
                again = _locate(ctx, current, claim, detail)
                if not again.match:
                    ctx.cluster.vms(fresh=True)
                    continue
                found = again
            if str(found.row.get("status")) != "stopped" and not stopped:
                ctx.records.journal(claim, "destroy", cut_off.phase if cut_off else "stopping", detail)
                try:
                    done, warned = power.stop(ctx, current, found, hard=request.force or current.state in (states.TIMEOUT, states.SUSPENDED))
                except (ApiError, TaskFailed) as error:
                    if not _vanished(ctx, error, attempt):
                        raise
                    continue
                upids += done
                warnings += warned
                stopped = True
            own = workspace_disk.records(ctx).of_sandbox(current.uuid)
            if own is not None:
                # From here on it is too late to protect the sandbox: it would be kept without its workspace.
                ctx.records.journal(claim, "destroy", cut_off.phase if cut_off else "detaching", detail, unprotected=not request.clean_up)
                try:
                    workspace_disk.off(ctx, claim, current, found, own, sure=True)
                except ApiError as error:
                    if not _vanished(ctx, error, attempt):
                        raise
                # The configuration is another one now: judged anew before anything else is done.
                current = ctx.records.get(current.uuid)
                continue
            try:
                workspace_disk.refuse_listed(ctx, current, found)
            except ApiError as error:
                if not _vanished(ctx, error, attempt):
                    raise
                continue
            ctx.records.journal(claim, "destroy", "deleting", detail, unprotected=not request.clean_up)
            with ctx.client.held(found.path):
                try:
                    _mark(ctx, request, found)
                except ApiError as error:
                    sent = cut_off is not None
                    if _vanished(ctx, error, attempt):
                        continue
                    if changed(error.text):
                        raise Kept("changed", f"sandbox {current.vmid}: its VM's configuration keeps changing; it was left alone, run again") from None
                    raise Kept("locked" if "is locked" in error.text else "unknown" if error.status == 500 else "denied",
                               f"sandbox {current.vmid}: the VM was not deleted, because it cannot be marked: {error.message}") from None
                sent = True
                if cut_off:
                    # Another one, whose time counts.
                    ctx.records.journal(claim, "destroy", "deleting", {**detail, "since": ctx.clock.now()})
                try:
                    upid = ctx.client.delete(found.path, purge=1)
                except ApiError as error:
                    sent = _only_the_first(ctx, claim, cut_off, detail)
                    if "is running" in error.text and attempt + 1 < _MARK_TRIES:
                        # The list said stopped (it lags), or it was started meanwhile: judge it again, then stop it.
                        ctx.cluster.vms(fresh=True).get(current.vmid, {})["status"] = "running"
                        stopped = False
                        continue
                    if "does not exist" in error.text:
                        ctx.cluster.vms(fresh=True)
                        continue
                    if not_begun(error.text) and attempt + 1 < _MARK_TRIES:
                        ctx.clock.sleep(1.0)
                        continue
                    raise
            if not isinstance(upid, str):
                raise OutcomeUnknown(f"delete VM {current.vmid}: Proxmox answered without a task id; whether it was done is not known, run again")
            upids.append(upid)
            ctx.records.journal(claim, "destroy", "waiting", {**detail, "upid": upid, "since": ctx.clock.now()})
            try:
                warnings += ctx.tasks.wait(upid, f"delete VM {current.vmid}", ctx.wait_timeout)
            except TaskFailed as error:
                if "does not exist" not in error.exitstatus:
                    # A definite end: the configuration is still there (its disks perhaps not), and the next run begins anew.
                    sent = _only_the_first(ctx, claim, cut_off, detail)
                    raise
            return _Gone(claim, current, before, "destroyed", found.verdict.evidence if found.verdict else {}, began, upids, warnings)
        raise Kept("changed", f"sandbox {current.vmid}: its VM keeps changing; it was left alone, run again")
    except AgentlabError as error:
        _abandon(ctx, claim, current, request, error, sent=sent, stopped=stopped)
        raise
    except BaseException:
        give_back(ctx, claim)
        raise


def _only_the_first(ctx: Context, claim: Claim, cut_off: Operation | None, detail: dict[str, Any]) -> bool:
    """The delete of this run was not carried out; whether that of a killed run before it still may be."""
    if cut_off is not None:
        ctx.records.journal(claim, "destroy", cut_off.phase, detail)
    return cut_off is not None


def _await_cut_off(ctx: Context, sandbox: Sandbox, left: Operation) -> list[str]:
    """Wait for the delete of a killed run, if its task is known. However it ended, what is there now is judged anew."""
    upid = left.detail.get("upid")
    if not upid:
        return []
    try:
        return ctx.tasks.wait(upid, f"delete VM {sandbox.vmid}", ctx.wait_timeout)
    except (TaskFailed, TaskUnknown):
        return []


def _locate(ctx: Context, sandbox: Sandbox, claim: Claim | None = None, detail: dict[str, Any] | None = None) -> Located:
    """As verify.locate, and for a VM whose SMBIOS UUID was never stored: find out whether our own clone made it."""
    if sandbox.smbios_uuid is not None:
        return locate(ctx, sandbox)
    return create_recovery.locate_unbound(ctx, sandbox, claim, (detail or {}).get("create"))


def _vanished(ctx: Context, error: ApiError | TaskFailed, attempt: int) -> bool:
    """Whether the VM moved, changed, or was deleted for a killed run, since it was judged, so that it is to be looked for and judged again."""
    if attempt + 1 >= _MARK_TRIES or not ("does not exist" in error.message or changed(error.message)):
        return False
    ctx.cluster.vms(fresh=True)
    return True


def _mark(ctx: Context, request: Request, found: Located) -> None:
    """The config write that carries the digest of what was judged: it fails if anything changed, or if the cluster takes no writes."""
    verdict = found.verdict
    if verdict is None or verdict.digest is None:
        raise Kept("unknown", "Proxmox gave no digest with the VM's configuration; without it nothing is deleted")
    note = identity.deletion_note(verdict.config or {}, request.operation, clock_module.iso(ctx.clock.now()))
    ctx.client.put(f"{found.path}/config", description=note, digest=verdict.digest)


def _abandon(ctx: Context, claim: Claim, sandbox: Sandbox, request: Request, error: AgentlabError, *, sent: bool, stopped: bool) -> None:
    """Leave a truthful record behind: why nothing more was done; the journal stays only when the delete may have been carried out."""
    reason = error.reason if isinstance(error, Kept) else error.code
    evidence = {"message": error.message, **{k: v for k, v in error.detail.items() if isinstance(v, (str, int, dict))}}
    try:
        uncertain = sent
        now = ctx.records.get(sandbox.uuid)
        to = states.STOPPED if stopped and now.state in (states.READY, states.RUNNING, states.SUSPENDED) else None
        unbound = now.smbios_uuid is None and claim.interrupted is not None
        creation = _cut_off_creation(claim, now) if to is None and not uncertain and not unbound else None
        if isinstance(error, StateConflict) or (isinstance(error, Kept) and reason == "protected" and not stopped):
            # Refused by the rules: not worth an event each time it is asked.
            if not unbound and not uncertain:
                _drop_journal(ctx, claim)
        else:
            ctx.records.change(claim, now, request.operation, to=to, outcome="kept" if isinstance(error, Kept) else "failed", reason=reason,
                               evidence=evidence, finish=not uncertain and not unbound and creation is None)
        if creation is not None:
            # It is as far as it was: what it has done already is not to be done twice.
            ctx.records.journal(claim, "create", str(creation.pop("phase")), creation)
    except (StoreError, ClaimLost):
        pass
    finally:
        give_back(ctx, claim)


def _cut_off_creation(claim: Claim, now: Sandbox) -> dict[str, Any] | None:
    """What a creation had noted that was cut off before this destroy, and that can still be gone on with."""
    if claim.interrupted is None or not (now.state in states.CREATING or now.state == states.READY):
        return None
    found = _creation_of(claim.interrupted)
    if found is not None:
        found.pop("at", None)
    return found


def _drop_journal(ctx: Context, claim: Claim) -> None:
    left = claim.interrupted
    # A destroy that was cut off, and that is refused now, is over: it must not bar everything else for good. Whether its delete may still be carried
    # out is certain by now (the callers ask for that first).
    if left is None or left.kind == "destroy":
        ctx.records.fenced(claim, lambda conn: conn.execute("DELETE FROM operations WHERE sandbox_uuid = ?", (claim.uuid,)) and None)


def _close(ctx: Context, proven: list[_Gone], proofs: dict[int, Any]) -> list[Outcome]:
    """Finish those that are proven to be gone, in one transaction: nobody is asked anything any more."""
    try:
        with ctx.database.together():
            return [_finish(ctx, found, proofs) for found in proven]
    except AgentlabError as error:
        for found in proven:
            give_back(ctx, found.claim)
        return [failure(_now(ctx, found.sandbox), error) for found in proven]


def _finish(ctx: Context, found: _Gone, proofs: dict[int, Any]) -> Outcome:
    """Commit DESTROYED once absence is proven; otherwise the record stays as it is, and the journal tells the next run."""
    sandbox = found.sandbox
    try:
        evidence = dict(found.evidence)
        reason = found.reason
        if reason not in _PROVEN:
            proof = proofs[sandbox.vmid]
            if proof.absent is False:
                # Something is at the VMID: ours after all (moved, or the delete did nothing), or already somebody else's.
                # Without a word from its configuration nothing is concluded.
                ctx.cluster.vms(fresh=True)
                again = locate(ctx, sandbox) if sandbox.smbios_uuid else Located(None, {}, None)
                if again.verdict is None or again.verdict.identity != identity.FOREIGN:
                    raise Kept("unknown", f"sandbox {sandbox.vmid}: a VM with that VMID is still there although it was "
                               f"{'deleted' if found.upids else 'not to be seen'} ({proof.why}; hidden from these credentials?); run again")
                reason, evidence = "vmid_reused", again.verdict.evidence
            elif proof.absent is None:
                raise Kept("unknown", f"sandbox {sandbox.vmid}: it is not proven that its VM is gone: {proof.why}")
            else:
                evidence.update(proof.evidence)
        remains.clear(ctx, found.claim, ctx.records.get(sandbox.uuid))
        took = int((ctx.clock.monotonic() - found.began) * 1000)
        done = power.settle(ctx, found.claim, ctx.records.get(sandbox.uuid), "destroy", to=states.DESTROYED, reason=reason, evidence=evidence,
                            upids=found.upids, duration_ms=took, finish=True)
        return Outcome.of("destroyed", done, previous_state=found.before.state, reason=reason, changed=True, upids=found.upids, warnings=found.warnings)
    except Kept as error:
        _abandon(ctx, found.claim, sandbox, Request(), error, sent=found.doubtful or bool(found.upids), stopped=False)
        return Outcome.of("kept", _now(ctx, sandbox), previous_state=found.before.state, reason=error.reason, message=error.message, failed=True,
                          upids=found.upids)
    except AgentlabError as error:
        give_back(ctx, found.claim)
        now = _now(ctx, sandbox)
        if now.state == states.DESTROYED:
            # The claim was lost to a run that brought this to its end.
            return Outcome.of("destroyed", now, previous_state=found.before.state, reason=now.reason, changed=True, upids=found.upids, warnings=found.warnings)
        return failure(now, error)
