# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Delete one sandbox's VM.

Steps: claim the record; prove the VM is ours; stop it; detach the workspace; write a mark guarded by the config digest;
delete; wait for the task. The journal names each step before its request is sent, so the next run can finish after a
kill. Identity is proven with and without force. ``destroy.py`` then proves that the VM is gone, and closes the record.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import clock as clock_module
from .. import states
from ..context import Context
from ..errors import (
    AgentlabError,
    ApiError,
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
from ..proxmox.answers import LOCK_PAUSE, is_config_changed, is_not_begun
from ..store.journal import (
    DELETING,
    DETACHING,
    RESERVED,
    STOPPING,
    VERIFYING,
    WAITING,
    CreationNote,
    DestroyNote,
    JournalEntry,
)
from ..store.records import Claim
from ..vm import binding, power
from ..vm.locate import Located, is_hibernated, locate, read_power_state, refuse_guarded, refuse_not_ours
from ..workspaces import workspace_disk

# Rounds in which the VM may change between verdict and mark. After the last round the VM is left alone.
_MARK_TRIES = 3


@dataclass(slots=True)
class Request:
    """A request to remove a sandbox's VM.

    ``recheck`` runs on the record once the claim is held, and raises when the plan no longer holds.
    """

    operation: str = "destroy"
    force: bool = False
    # A failed creation may remove its own VM even when the sandbox was to be protected.
    clean_up: bool = False
    claim_wait: float | None = None
    recheck: Callable[[Sandbox], None] | None = None


@dataclass(slots=True)
class Gone:
    """A VM that was deleted or is missing, before its absence is proven. The claim is still held."""

    claim: Claim
    sandbox: Sandbox
    before: Sandbox
    reason: str
    evidence: dict[str, Any]
    began: float
    upids: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # No run has acted on this VM since the VM list was read, so that list is enough to prove it is gone.
    untouched_since_list: bool = False
    # The delete of a killed run may still be carried out. The journal keeps that until absence is proven.
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class PendingDelete:
    """A delete that may have been sent, and that Proxmox may still carry out."""

    # When it was sent, at the latest (seconds since the epoch).
    since: int
    # The journal entry of the killed run that sent it; None for a delete of this run.
    entry: JournalEntry | None = None


class Next(enum.Enum):
    """What follows a step of a removal."""

    # Take the next step.
    GO_ON = "go on"
    # The VM moved, changed or vanished after its verdict: locate and judge it again.
    LOOK_AGAIN = "look again"


def check(ctx: Context, sandbox: Sandbox, force: bool, clean_up: bool = False) -> bool:
    """Apply the state rule and the protection to the record; return whether there is anything to destroy.

    Raises StateConflict for a state that forbids it, and Kept for a protected sandbox.
    """
    todo = states.check_operation("force_destroy" if force else "destroy", sandbox.state)
    if todo and sandbox.protected and not clean_up:
        raise Kept("protected", f"sandbox {sandbox.vmid} is protected", remedy="unprotect")
    return todo


class Removal:
    """The removal of one sandbox's VM, from the claim to the end of the delete task."""

    def __init__(self, ctx: Context, planned: Sandbox, request: Request) -> None:
        self._ctx, self._planned, self._request = ctx, planned, request
        self._began = ctx.clock.monotonic()
        self._claim = ctx.records.claim(
            planned.uuid, "destroy", wait=ctx.config.claim_timeout if request.claim_wait is None else request.claim_wait
        )
        interrupted = self._interrupted = self._claim.interrupted
        self._pending = find_pending_delete(interrupted) if interrupted else None
        self._stopped = False
        self._sandbox = self._before = planned
        self._note = DestroyNote(request.operation, request.force)
        self._upids: list[str] = []
        self._warnings: list[str] = []
        self._round = 0
        # The VM as it was judged last.
        self._vm: Located | None = None

    def run(self) -> Outcome | Gone:
        """Remove the VM. Gone still holds the claim; an Outcome or an error has released it."""
        try:
            ended = self._begin_removal()
            if ended is not None:
                return ended
            for self._round in range(_MARK_TRIES):
                result = self._judge_and_delete()
                if isinstance(result, Gone):
                    return result
            raise Kept("changed", f"sandbox {self._sandbox.vmid}: its VM keeps changing; it was left alone, run again")
        except AgentlabError as error:
            sent = self._pending is not None
            abandon_removal(
                self._ctx, self._claim, self._sandbox, self._request, error, sent=sent, stopped=self._stopped
            )
            raise
        except BaseException:
            self._ctx.records.release(self._claim)
            raise

    # ---- the steps ----

    def _begin_removal(self) -> Outcome | Gone | None:
        """Check the record under the claim, and settle what a killed run left.

        Returns an Outcome or Gone when the removal ends here, and None when the VM has to be located.
        """
        ctx, request, interrupted, pending = self._ctx, self._request, self._interrupted, self._pending
        current = self._sandbox = ctx.records.get(self._planned.uuid)
        if current.state == states.DESTROYED:
            ctx.records.release(self._claim)
            return Outcome.of("unchanged", current, reason=current.reason)
        if pending is None:
            if request.recheck:
                request.recheck(current)
            check(ctx, current, request.force, request.clean_up)
        elif current.protected:
            check(ctx, current, True, request.clean_up)
        if interrupted:
            # An unbound VM is recognised by the creation's journal, so keep that journal until the VM is bound.
            self._note.creation = interrupted.creation
            if pending:
                # Keep the time of the first delete. Retrying must not restart doubt_window.
                self._note.upid, self._note.since = interrupted.destroy.upid, pending.since
        self._before = current
        if current.generation != self._planned.generation:
            # Another run changed the sandbox while we waited, so the cached VM list is out of date.
            ctx.cluster.list_vms(fresh=True)
        self._write_journal(VERIFYING)
        if was_never_cloned(current, self._note.creation):
            _look_before_closing(ctx, current)
            return self._make_gone("never_created", {"creation": "the clone was never asked for, or refused"})
        if interrupted and pending:
            try:
                self._warnings += _await_cut_off_delete(ctx, current, interrupted)
            except TaskTimeout:
                # The delete task still runs, or hangs. A missing VM can still be proven absent. While the VM is there,
                # start nothing beside that task.
                if self._locate_vm().node is not None:
                    raise
        return None

    def _judge_and_delete(self) -> Gone | Next:
        """Take all steps on the VM as it is now. Returns LOOK_AGAIN when the VM changes before the end."""
        result = self._judge_vm()
        if not isinstance(result, Located):
            return result
        self._vm = result
        for step in (self._refuse_running, self._stop_vm, self._detach_workspace, self._mark_and_delete):
            if step(self._vm) is Next.LOOK_AGAIN:
                return Next.LOOK_AGAIN
        return self._make_gone("destroyed", self._vm.verdict.evidence if self._vm.verdict else {})

    def _judge_vm(self) -> Located | Gone | Next:
        """Return our VM if it may be deleted, or Gone if no VM of ours is there. Raises the reason for keeping it."""
        ctx = self._ctx
        # Read quorum before the verdict, so that no request stands between verdict and stop. Raise its error
        # afterwards, because the verdict may make quorum unnecessary.
        mark_is_first = self._is_mark_first()
        no_quorum = None if mark_is_first else self._explain_no_quorum()
        located = self._locate_vm()
        if mark_is_first and (is_hibernated(located.config) or not self._is_mark_first()):
            # The VM is not as the records or the list had it: a stop, or the loss of its saved memory, would be first.
            no_quorum = self._explain_no_quorum()
        if self._sandbox.smbios_uuid is None:
            self._sandbox = ctx.records.get(self._sandbox.uuid)
        if located.node is None:
            return self._make_gone(
                "vm_absent",
                {},
                untouched_since_list=not self._upids
                and self._interrupted is None
                and not self._round
                and self._sandbox.generation == self._planned.generation,
                doubtful=self._pending is not None and not self._is_over(self._pending),
            )
        if located.verdict and located.verdict.identity == identity.FOREIGN:
            if no_quorum is not None:
                raise no_quorum
            ctx.cluster.require_quorum()
            ctx.cluster.confirm()
            return self._make_gone("vmid_reused", located.verdict.evidence)
        refuse_not_ours(self._sandbox, located)
        if self._pending and self._is_over(self._pending):
            # doubt_window is over: no delete of the killed run can still be running. This is a new attempt.
            self._pending = None
            self._note.since = None
        refuse_guarded(self._sandbox, located)
        # Refuse before the stop, so that a sandbox that is kept is neither stopped nor loses its workspace.
        try:
            reads_sent = workspace_disk.refuse_planned(ctx, self._sandbox, located)
        except (ApiError, TaskFailed) as error:
            return self._look_again_or_raise(error)
        if no_quorum is not None:
            raise no_quorum
        if reads_sent:
            # Those requests took time, and a stop takes no digest. Judge the VM again directly before it.
            located = self._locate_vm()
            if not located.match:
                ctx.cluster.list_vms(fresh=True)
                return Next.LOOK_AGAIN
        return located

    def _explain_no_quorum(self) -> AgentlabError | None:
        """Return the error of a missing quorum, or None with quorum."""
        try:
            self._ctx.cluster.require_quorum()
        except (ProxmoxError, Kept) as error:
            return error
        return None

    def _is_mark_first(self) -> bool:
        """Return whether the mark is the first write. Then the mark proves quorum, and no request for quorum is needed.

        True only over pvesh, where each request is slow, for a VM that is switched off and has no workspace. Without
        quorum the mark fails and changes nothing.
        """
        return (
            self._ctx.client.awaits_tasks
            and not self._stopped
            and str((self._ctx.cluster.find(self._sandbox.vmid) or {}).get("status")) == "stopped"
            and workspace_disk.open_records(self._ctx).find_of_sandbox(self._sandbox.uuid) is None
        )

    def _refuse_running(self, located: Located) -> Next:
        """Raise StateConflict when a plain destroy meets a running VM, whatever state the record has. Needs force."""
        if self._request.force or self._request.operation != "destroy" or self._pending is not None:
            return Next.GO_ON
        try:
            refuse_running(self._ctx, self._sandbox, located)
        except (ApiError, TaskFailed) as error:
            return self._look_again_or_raise(error)
        return Next.GO_ON

    def _stop_vm(self, located: Located) -> Next:
        """Switch the VM off, or discard the saved memory of a hibernated VM.

        The VM list lags by ten seconds, so the VM itself is asked before a disk is detached. A delete needs no such
        question: Proxmox refuses to delete a running VM.
        """
        if is_hibernated(located.config):
            self._write_journal(STOPPING)
            try:
                self._vm = power.discard_saved_memory(self._ctx, self._sandbox, located)
            except (ApiError, TaskFailed) as error:
                return self._look_again_or_raise(error)
            return Next.GO_ON
        if self._stopped:
            return Next.GO_ON
        if (
            str(located.row.get("status")) == "stopped"
            and workspace_disk.open_records(self._ctx).find_of_sandbox(self._sandbox.uuid) is None
        ):
            return Next.GO_ON
        self._write_journal(STOPPING)
        try:
            upids, warnings = power.stop(
                self._ctx,
                self._sandbox,
                located,
                hard=self._request.force or self._sandbox.state in (states.TIMEOUT, states.SUSPENDED),
            )
        except (ApiError, TaskFailed) as error:
            return self._look_again_or_raise(error)
        self._upids += upids
        self._warnings += warnings
        self._stopped = True
        return Next.GO_ON

    def _detach_workspace(self, located: Located) -> Next:
        """Take the sandbox's workspace off the VM, and refuse a VM that still names a workspace.

        By Proxmox VE's rule a DELETE removes the volumes that the configuration names and that are named after this
        VMID. Every other volume stays. A workspace's volume is named after a VMID in workspace_owner_range, so it would
        stay, too. We do not rely on that alone: a volume may have been renamed or reassigned to the VM by hand.
        Returns LOOK_AGAIN after a workspace was taken off. Raises Kept for a VM that names another one.
        """
        ctx = self._ctx
        own = workspace_disk.open_records(ctx).find_of_sandbox(self._sandbox.uuid)
        if own is not None:
            # Protecting the sandbox from here on is too late: it would be kept without its workspace.
            self._write_journal(DETACHING, unprotected=True)
            try:
                workspace_disk.detach_volume(ctx, self._claim, self._sandbox, located, own, sure=True)
            except ApiError as error:
                if not self._has_moved_on(error):
                    raise
            # The detach changed the configuration: judge it again before any other step.
            self._sandbox = ctx.records.get(self._sandbox.uuid)
            return Next.LOOK_AGAIN
        try:
            workspace_disk.refuse_listed(ctx, self._sandbox, located)
        except (ApiError, TaskFailed) as error:
            return self._look_again_or_raise(error)
        return Next.GO_ON

    def _mark_and_delete(self, located: Located) -> Next:
        """Write the mark, send the delete, and wait for its task.

        Both requests share one place among the requests in flight, so no other request of ours comes between them.
        """
        ctx = self._ctx
        ctx.records.write_journal(
            self._claim, "destroy", DELETING, self._note.format_detail(), unprotected=not self._request.clean_up
        )
        with ctx.client.reserve_place(located.path):
            try:
                _write_mark(ctx, self._request, located)
            except ApiError as error:
                return self._handle_refused_mark(error)
            if self._pending is None:
                self._pending = PendingDelete(ctx.clock.now())
            else:
                # We send a new delete: doubt_window starts again now.
                again = replace(self._note, since=ctx.clock.now())
                ctx.records.write_journal(self._claim, "destroy", DELETING, again.format_detail())
            try:
                # ``purge`` takes the VM out of backup jobs, replication and HA. Volumes that its configuration does not
                # name stay: ``destroy-unreferenced-disks`` is not sent.
                upid = ctx.client.delete(located.path, purge=1)
            except ApiError as error:
                self._note_failed_delete()
                return self._handle_refused_delete(error)
        if not isinstance(upid, str):
            raise OutcomeUnknown(
                f"delete VM {self._sandbox.vmid}: Proxmox answered without a task id; whether it was done is not "
                "known, run again"
            )
        self._await_delete(upid)
        return Next.GO_ON

    def _await_delete(self, upid: str) -> None:
        """Write the delete task to the journal, and wait for its end. A missing VM counts as deleted."""
        ctx = self._ctx
        self._upids.append(upid)
        sent = replace(self._note, upid=upid, since=ctx.clock.now())
        ctx.records.write_journal(self._claim, "destroy", WAITING, sent.format_detail())
        try:
            self._warnings += ctx.tasks.wait(upid, f"delete VM {self._sandbox.vmid}", ctx.wait_timeout)
        except TaskFailed as error:
            if "does not exist" not in error.exitstatus:
                # The delete has failed for certain. The configuration still exists (the disks perhaps not), so the next
                # run starts a new attempt.
                self._note_failed_delete()
                raise
        else:
            # Mark and delete were written to the cluster file system, which accepts writes only with quorum. Over https
            # the task may have taken long and quorum is cheap to read, so read quorum again there.
            if ctx.client.awaits_tasks:
                ctx.cluster.note_deleted(self._sandbox.vmid, upid)

    # ---- answers to a step ----

    def _handle_refused_mark(self, error: ApiError) -> Next:
        """Return LOOK_AGAIN for a VM that moved or changed. Raises Kept otherwise."""
        vmid = self._sandbox.vmid
        if self._has_moved_on(error):
            return Next.LOOK_AGAIN
        if is_config_changed(error.text):
            raise Kept(
                "changed", f"sandbox {vmid}: its VM's configuration keeps changing; it was left alone, run again"
            ) from None
        if error.status == 500 and "is locked" not in error.text:
            # Raises the error about quorum where a missing quorum is the cause.
            self._ctx.cluster.require_quorum()
        raise Kept(
            "locked" if "is locked" in error.text else "unknown" if error.status == 500 else "denied",
            f"sandbox {vmid}: the VM was not deleted, because it cannot be marked: {error.message}",
        ) from None

    def _handle_refused_delete(self, error: ApiError) -> Next:
        """Return LOOK_AGAIN for a VM that runs, vanished or is locked for a moment. Raises the error otherwise."""
        ctx = self._ctx
        if "is running" in error.text and not self._last:
            # The list lags, or a person started the VM meanwhile: judge it again, then stop it.
            ctx.cluster.list_vms(fresh=True).get(self._sandbox.vmid, {})["status"] = "running"
            self._stopped = False
            return Next.LOOK_AGAIN
        if "does not exist" in error.text:
            ctx.cluster.list_vms(fresh=True)
            return Next.LOOK_AGAIN
        if is_not_begun(error.text) and not self._last:
            ctx.clock.sleep(LOCK_PAUSE)
            return Next.LOOK_AGAIN
        raise error

    def _note_failed_delete(self) -> None:
        """Record that this run's delete was not carried out. The delete of a killed run may still be running."""
        if self._pending is not None and self._pending.entry is not None:
            self._ctx.records.write_journal(
                self._claim, "destroy", self._pending.entry.phase, self._note.format_detail()
            )
        else:
            self._pending = None

    @property
    def _last(self) -> bool:
        return self._round + 1 >= _MARK_TRIES

    def _has_moved_on(self, error: ApiError | TaskFailed) -> bool:
        """Return whether the VM moved, changed or was deleted since its verdict. Always False in the last round."""
        # Proxmox refuses a request with the first text. A task whose VM vanished meanwhile fails with the second.
        vanished = "does not exist" in error.message or "unable to find configuration file" in error.message
        if self._last or not (vanished or is_config_changed(error.message)):
            return False
        self._ctx.cluster.list_vms(fresh=True)
        return True

    def _look_again_or_raise(self, error: ApiError | TaskFailed) -> Next:
        """Return LOOK_AGAIN for an error that says that the VM has vanished or changed. Raises every other error."""
        if self._has_moved_on(error):
            return Next.LOOK_AGAIN
        raise error

    def _is_over(self, pending: PendingDelete) -> bool:
        return self._ctx.clock.now() - pending.since > self._ctx.config.doubt_window

    def _locate_vm(self) -> Located:
        return locate_own(self._ctx, self._sandbox, self._claim, self._note.creation)

    def _write_journal(self, phase: str, *, unprotected: bool = False) -> None:
        """Write the phase to the journal.

        While a killed run's delete may be carried out, keep that run's phase instead.
        """
        self._ctx.records.write_journal(
            self._claim,
            "destroy",
            self._pending.entry.phase if self._pending and self._pending.entry else phase,
            self._note.format_detail(),
            unprotected=unprotected and not self._request.clean_up,
        )

    def _make_gone(
        self, reason: str, evidence: dict[str, Any], *, untouched_since_list: bool = False, doubtful: bool = False
    ) -> Gone:
        return Gone(
            self._claim,
            self._sandbox,
            self._before,
            reason,
            evidence,
            self._began,
            self._upids,
            self._warnings,
            untouched_since_list,
            doubtful,
        )


def find_pending_delete(interrupted: JournalEntry) -> PendingDelete | None:
    """Return the delete that a killed run may have sent and that may still be carried out; else None."""
    if not interrupted.is_sent_delete:
        return None
    since = interrupted.destroy.since
    return PendingDelete(interrupted.updated_at if since is None else since, interrupted)


def refuse_running(ctx: Context, sandbox: Sandbox, located: Located) -> None:
    """Raise StateConflict unless the VM is switched off. The message names the VM's real state, not the record's."""
    vm_state = read_power_state(sandbox, power.read_status(ctx, located), located.config)
    if vm_state != states.STOPPED:
        raise states.make_conflict("destroy", vm_state)


def was_never_cloned(sandbox: Sandbox, created: CreationNote | None) -> bool:
    """Return whether the journal rules out that we ever sent a clone request. Then no VM at the VMID is ours."""
    return sandbox.smbios_uuid is None and created is not None and created.phase == RESERVED


def _look_before_closing(ctx: Context, sandbox: Sandbox) -> None:
    """Raise Kept when a VM that may be ours stands at the VMID, although Proxmox refused the clone.

    That is a VM with our marker, or a VM that is just being cloned.
    """
    try:
        located = locate(ctx, sandbox)
    except (Kept, ProxmoxError):
        return
    if located.verdict and located.verdict.identity != identity.FOREIGN:
        raise Kept(
            "ambiguous",
            f"sandbox {sandbox.vmid}: Proxmox refused its clone, but a VM that may be that clone is there now; it was "
            "left alone. Look at it, and remove it by hand if it is to go",
            evidence=located.verdict.evidence,
        )


def _await_cut_off_delete(ctx: Context, sandbox: Sandbox, entry: JournalEntry) -> list[str]:
    """Wait for the delete task of a killed run if its id is known, and return its warnings.

    The result of the task does not matter: the VM is judged again afterwards.
    """
    upid = entry.destroy.upid
    if not upid:
        return []
    try:
        return ctx.tasks.wait(upid, f"delete VM {sandbox.vmid}", ctx.wait_timeout)
    except (TaskFailed, TaskUnknown):
        return []


def locate_own(
    ctx: Context, sandbox: Sandbox, claim: Claim | None = None, created: CreationNote | None = None
) -> Located:
    """Locate the sandbox's VM as ``locate`` does.

    Without a stored SMBIOS UUID find out whether our clone made the VM.
    """
    if sandbox.smbios_uuid is not None:
        return locate(ctx, sandbox)
    return binding.locate_unbound(ctx, sandbox, claim, created)


def _write_mark(ctx: Context, request: Request, located: Located) -> None:
    """Write the deletion mark, guarded by the digest of the judged configuration.

    The write fails if the configuration changed since, or if the cluster accepts no writes.
    """
    verdict = located.verdict
    if verdict is None or verdict.digest is None:
        raise Kept("unknown", "Proxmox gave no digest with the VM's configuration; without it nothing is deleted")
    note = identity.add_deletion_note(verdict.config or {}, request.operation, clock_module.format_utc(ctx.clock.now()))
    ctx.client.put(f"{located.path}/config", description=note, digest=verdict.digest)


def abandon_removal(
    ctx: Context, claim: Claim, sandbox: Sandbox, request: Request, error: AgentlabError, *, sent: bool, stopped: bool
) -> None:
    """Record why the removal ended, and release the claim.

    ``sent``: the delete may have been carried out, so the journal entry stays. ``stopped``: the VM was switched off.
    """
    reason = error.reason if isinstance(error, Kept) else error.code
    evidence = {"message": error.message, **{k: v for k, v in error.detail.items() if isinstance(v, (str, int, dict))}}
    try:
        uncertain = sent
        now = ctx.records.get(sandbox.uuid)
        to = states.STOPPED if stopped and now.state in (states.READY, states.RUNNING, states.SUSPENDED) else None
        unbound = now.smbios_uuid is None and claim.interrupted is not None
        creation = _find_cut_off_creation(claim, now) if to is None and not uncertain and not unbound else None
        if isinstance(error, StateConflict) or (isinstance(error, Kept) and reason == "protected" and not stopped):
            # The rules refused the request. Repeated refusals would only fill the list of events.
            if not unbound and not uncertain:
                _drop_journal(ctx, claim)
        else:
            ctx.records.change(
                claim,
                now,
                request.operation,
                to=to,
                outcome="kept" if isinstance(error, Kept) else "failed",
                reason=reason,
                evidence=evidence,
                finish=not uncertain and not unbound and creation is None,
            )
        if creation is not None:
            # Put the creation's journal back, so that the creation resumes and repeats no finished step.
            ctx.records.write_journal(claim, "create", creation.phase, creation.format_detail_put_back())
    except (StoreError, ClaimLost):
        pass
    finally:
        ctx.records.release(claim)


def _find_cut_off_creation(claim: Claim, now: Sandbox) -> CreationNote | None:
    """Return the note of a creation that this destroy interrupted and that can be resumed; else None."""
    if claim.interrupted is None or not (now.state in states.CREATING or now.state == states.READY):
        return None
    return claim.interrupted.creation


def _drop_journal(ctx: Context, claim: Claim) -> None:
    """Remove the journal entry of a destroy that the rules refused; that of another operation stays."""
    interrupted = claim.interrupted
    # An interrupted destroy that is refused now has ended. Its entry would otherwise block the sandbox for ever. The
    # callers have already made sure that its delete is no longer running.
    if interrupted is None or interrupted.kind == "destroy":
        ctx.records.drop_journal(claim)
