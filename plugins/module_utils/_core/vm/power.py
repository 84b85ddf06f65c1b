# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start, stop and suspend sandboxes, and record how a job ended.

The VM's real power state counts, not the recorded one. So an operation also works on a VM that a person has started,
stopped, paused or hibernated, and corrects the record.
"""

from __future__ import annotations

from typing import Any

from .. import states, waiting
from ..context import Context, refuse_cut_off
from ..errors import (
    ApiError,
    ClaimLost,
    InvalidInput,
    Kept,
    OutcomeUnknown,
    RecordChanged,
    StateConflict,
    StoreError,
    TaskFailed,
    TaskTimeout,
    TaskUnknown,
)
from ..model import Outcome, Sandbox
from ..proxmox.answers import LOCK_PAUSE, is_not_begun
from ..store.journal import REQUESTED
from ..store.records import Claim
from . import address
from .locate import (
    HIBERNATED,
    Located,
    is_hibernated,
    is_paused,
    read_power_state,
    read_vm_and_state,
    refuse_locked,
    require_fresh_match,
    require_match,
    write_with_digest,
)

_LOCK_TRIES = 3
# Operation -> the state that it leads to.
TARGETS = {
    "start": states.RUNNING,
    "stop": states.STOPPED,
    "suspend": states.SUSPENDED,
    "complete": states.COMPLETED,
    "fail": states.FAILED,
}


# In these states the record tells the VM's power state, so the VM itself is read. The other states tell the result of a
# job.
_FOLLOW_THE_VM = (states.READY, states.RUNNING, states.SUSPENDED, states.STOPPED)


def run(ctx: Context, sandbox: Sandbox, operation: str, *, force: bool = False) -> Outcome:
    """Do one of the operations of TARGETS on one sandbox, and return the outcome. Check mode only plans it.

    ``start``, ``stop`` and ``suspend`` read the VM's power state, correct the record by it, and act on the VM.
    ``complete`` and ``fail`` change only the record. ``force`` lets ``stop`` discard the saved memory of a hibernated
    VM. Raises StateConflict, Kept, and the errors of the request and its task.
    """
    if operation in ("complete", "fail"):
        return _report_end(ctx, sandbox, operation)
    unfinished = ctx.records.find_journal_entry(sandbox.uuid)
    if unfinished is not None and unfinished.kind == "destroy":
        # The VM may be gone already. So refuse the interrupted destroy before reading the VM.
        with ctx.claim_sandbox(sandbox, operation) as (claim, sandbox):
            refuse_cut_off(claim, sandbox)
    if sandbox.state not in _FOLLOW_THE_VM:
        states.check_operation(operation, sandbox.state)
    located, vm_state = read_vm_and_state(ctx, sandbox)
    actual = _read_actual_state(sandbox, vm_state)
    satisfied = states.OPERATIONS[operation].satisfied
    if sandbox.state in satisfied and actual in satisfied:
        return Outcome.of("unchanged", sandbox, reason=f"already {sandbox.state}")
    if ctx.dry_run:
        if states.check_operation(operation, actual):
            _refuse_lock(ctx, sandbox, located, operation, force)
        return Outcome.of("would_" + operation, sandbox, state=TARGETS[operation], changed=True)
    with ctx.claim_sandbox(sandbox, operation) as (claim, current):
        if current.generation != sandbox.generation:
            # Another run has changed the sandbox meanwhile.
            if current.state not in _FOLLOW_THE_VM:
                states.check_operation(operation, current.state)
            located, vm_state = read_vm_and_state(ctx, current)
            actual = _read_actual_state(current, vm_state)
        # The journal entry of this operation would replace that of an interrupted creation or destroy.
        refuse_cut_off(claim, current)
        if current.state in satisfied and actual in satisfied:
            return Outcome.of("unchanged", current, reason=f"already {current.state}")
        try:
            todo = states.check_operation(operation, actual)
        except StateConflict:
            # The refusal names the VM's real state, so write that state to the record.
            follow_vm(ctx, claim, current, operation, actual, located)
            raise
        if not todo:
            followed = follow_vm(ctx, claim, current, operation, actual, located)
            return Outcome.of(
                _get_past_tense(operation), followed, previous_state=sandbox.state, changed=True, reason="external"
            )
        # Correct the record first, because a refusal may follow.
        current = follow_vm(ctx, claim, current, operation, actual, located)
        _refuse_lock(ctx, current, located, operation, force)
        outcome = _send_operation(ctx, claim, current, operation, located, vm_state)
        outcome.previous_state = sandbox.state
        return outcome


def _report_end(ctx: Context, sandbox: Sandbox, operation: str) -> Outcome:
    """Record how the sandbox's job ended. Sends no request."""
    target = TARGETS[operation]
    if not states.check_operation(operation, sandbox.state):
        return Outcome.of("unchanged", sandbox, reason=f"already {sandbox.state}")
    if ctx.dry_run:
        return Outcome.of("would_" + operation, sandbox, state=target, changed=True)
    with ctx.claim_sandbox(sandbox, operation) as (claim, current):
        if not states.check_operation(operation, current.state):
            return Outcome.of("unchanged", current, reason=f"already {current.state}")
        refuse_cut_off(claim, current)
        reported = ctx.records.change(claim, current, operation, to=target, reason="reported", finish=True)
        return Outcome.of(
            _get_past_tense(operation), reported, previous_state=current.state, changed=True, reason="reported"
        )


def _read_actual_state(sandbox: Sandbox, vm_state: str) -> str:
    """Return the state that decides whether the operation is allowed.

    That is the VM's state if the record's state only tells the power state, and the record's state otherwise.
    """
    if sandbox.state not in _FOLLOW_THE_VM or (vm_state == states.RUNNING and sandbox.state in states.POWERED):
        return sandbox.state
    return vm_state


def follow_vm(ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, actual: str, located: Located) -> Sandbox:
    """Correct the record's state to the VM's, with an event for each step, and return the record."""
    if sandbox.state == actual:
        return sandbox
    evidence = {"vm": actual, "record": sandbox.state, "node": located.node, "lock": located.config.get("lock")}
    steps = [actual] if states.can_follow(sandbox.state, actual) else [states.RUNNING, actual]
    for step in steps:
        values: dict[str, Any] = {"node": located.node}
        if step == states.RUNNING:
            # A person has started the VM, and DHCP may have given the guest another address.
            values["ip_seen_at"] = None
        sandbox = settle(ctx, claim, sandbox, operation, to=step, reason="external", evidence=evidence, **values)
    return sandbox


def _refuse_lock(ctx: Context, sandbox: Sandbox, located: Located, operation: str, force: bool) -> None:
    """Raise Kept for a lock that prevents the operation.

    The lock of a hibernated VM prevents no start, and prevents a stop only without ``force``.
    """
    if is_hibernated(located.config) and operation == "stop" and not force:
        raise Kept(
            "hibernated",
            f"sandbox {sandbox.vmid} is hibernated: its memory is saved on a disk, and stopping it throws that away. "
            "Start it to take it up again",
            remedy="discard_memory",
        )
    refuse_locked(sandbox, located, but=HIBERNATED if operation in ("start", "stop") else None)


def _send_operation(
    ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, located: Located, vm_state: str
) -> Outcome:
    began = ctx.clock.monotonic()
    target = TARGETS[operation]
    ctx.records.write_journal(claim, operation, REQUESTED, {"node": located.node})
    upids: list[str] = []
    warnings: list[str] = []
    try:
        if operation == "stop":
            if is_hibernated(located.config):
                discard_saved_memory(ctx, sandbox, located)
            elif vm_state != states.STOPPED:
                hard = states.SUSPENDED in (vm_state, sandbox.state)
                upids, warnings = stop(ctx, sandbox, located, hard=hard)
        elif operation == "start":
            upids, warnings = _start_or_resume(ctx, sandbox, located, vm_state)
        else:
            upids, warnings = _run_task(ctx, sandbox, located, f"suspend VM {sandbox.vmid}", "status/suspend")
    except (ApiError, TaskFailed, Kept) as error:
        _close_refused(ctx, claim, sandbox, operation, error)
        raise
    except TaskUnknown as error:
        # The message quotes the end of the task's log, because the node may soon delete the log.
        ctx.records.note(
            sandbox,
            operation,
            outcome="failed",
            reason=error.code,
            evidence={"message": error.message},
            upids=[str(error.detail["upid"])] if error.detail.get("upid") else [],
        )
        raise
    took = int((ctx.clock.monotonic() - began) * 1000)
    values: dict[str, Any] = {"to": target, "upids": upids, "duration_ms": took, "finish": True, "node": located.node}
    if operation == "start":
        values.update(address.compute_columns_after_start(ctx, sandbox, located))
    settled = settle(ctx, claim, sandbox, operation, **values)
    return Outcome.of(
        _get_past_tense(operation), settled, previous_state=sandbox.state, changed=True, upids=upids, warnings=warnings
    )


def _close_refused(
    ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, error: ApiError | TaskFailed | Kept
) -> None:
    """Close the journal of a request that Proxmox refused or that certainly failed, because nothing is left to finish.

    After the error of a read the entry stays, because the outcome of the request before it is unknown.
    """
    if isinstance(error, ApiError) and error.detail.get("method") == "GET":
        return
    upid = error.detail.get("upid")
    try:
        ctx.records.change(
            claim,
            sandbox,
            operation,
            outcome="failed",
            reason=error.code,
            evidence={"message": error.message},
            upids=[upid] if upid else [],
            finish=True,
        )
    except (ClaimLost, StoreError):
        # Leave the entry. The next run or a reconcile closes it.
        pass


def discard_saved_memory(ctx: Context, sandbox: Sandbox, located: Located) -> Located:
    """Discard the saved memory of a hibernated VM, which is then switched off. Return the VM with a new verdict.

    Proxmox VE's stop reports OK for a hibernated VM and does nothing. A config write, guarded by the digest, removes
    the saved memory and the lock.
    """
    write_with_digest(
        ctx, sandbox, located, lambda now: ctx.client.put(f"{now.path}/config", delete="vmstate", digest=now.digest)
    )
    now = require_match(ctx, sandbox)
    refuse_locked(sandbox, now)
    return now


def settle(ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, *, to: str, **values: Any) -> Sandbox:
    """Write the new state, and return the record.

    A lease that was renewed or expired meanwhile does not matter. Raises RecordChanged after any other change.
    """
    try:
        return ctx.records.change(claim, sandbox, operation, to=to, **values)
    except RecordChanged:
        now = ctx.records.get(sandbox.uuid)
        if now.state != sandbox.state and not states.can_follow(now.state, to):
            raise
        return ctx.records.change(claim, now, operation, to=to, **values)


def stop(ctx: Context, sandbox: Sandbox, located: Located, *, hard: bool) -> tuple[list[str], list[str]]:
    """Stop a VM that was just judged to be ours, and return the tasks and their warnings.

    ``hard``: switch it off at once. Otherwise shut it down, and switch it off after ``shutdown_timeout`` seconds.
    """
    # The list lags by ten seconds, and shows a VM without figures, such as a new one, as "unknown".
    if str(located.row.get("status")) != "running":
        now = read_status(ctx, located)
        # That status counts only if the VM is still ours.
        located = require_match(ctx, sandbox)
        if now.get("status") == "stopped":
            return [], []
    action = f"stop VM {sandbox.vmid}"
    if hard or not ctx.config.shutdown_timeout:
        upids, warnings = _run_task(ctx, sandbox, located, action, "status/stop")
    else:
        try:
            # forceStop: Proxmox VE switches off a guest that has not shut down within the timeout.
            upids, warnings = _run_task(
                ctx, sandbox, located, action, "status/shutdown", timeout=ctx.config.shutdown_timeout, forceStop=1
            )
        except ApiError as error:
            if "not running" in error.text:
                return [], []
            if "is paused" not in error.text:
                raise
            # A paused guest cannot shut itself down.
            upids, warnings = _run_task(ctx, sandbox, located, action, "status/stop")
    if located.row.get("hastate"):
        # The HA manager's task ends when it has accepted the request, not when the VM has stopped.
        _await_status(ctx, located, "stopped", action)
    return upids, warnings


def start(ctx: Context, sandbox: Sandbox, located: Located) -> tuple[list[str], list[str]]:
    """Start or resume a VM that was judged to be ours, and return the tasks and their warnings.

    Reads the power state, then judges the VM again.
    """
    now = read_status(ctx, located)
    located = require_match(ctx, sandbox)
    return _start_or_resume(ctx, sandbox, located, read_power_state(sandbox, now, located.config))


def start_new(ctx: Context, sandbox: Sandbox, located: Located) -> tuple[list[str], list[str]]:
    """Start a VM that this run has cloned and never started. Judges the VM again directly before.

    Does not read the power state: if a person has started the VM since, the start task reports that.
    """
    return _start_or_resume(ctx, sandbox, located, states.STOPPED)


def _start_or_resume(ctx: Context, sandbox: Sandbox, located: Located, vm_state: str) -> tuple[list[str], list[str]]:
    """Start or resume a VM that was judged to be ours and found in that state."""
    if vm_state == states.RUNNING:
        return [], []
    action = f"start VM {sandbox.vmid}"
    hibernated = is_hibernated(located.config)
    if vm_state == states.SUSPENDED and not hibernated:
        return _run_task(ctx, sandbox, located, f"resume VM {sandbox.vmid}", "status/resume")
    try:
        upids, warnings = _run_task(ctx, sandbox, located, action, "status/start")
    except TaskFailed as error:
        if "already running" in error.exitstatus:
            return [], []
        if hibernated:
            raise TaskFailed(
                f"{error.message}. Its saved memory may not fit any more: throw that away, then it starts afresh",
                **{**error.detail, "remedy": "discard_memory"},
            ) from None
        raise
    except ApiError as error:
        if "no quorum" in error.text:
            raise ApiError(
                f"sandbox {sandbox.vmid} was not started: the cluster has no quorum, and Proxmox VE starts nothing "
                "without it; bring the other nodes back (pvecm status), then run again",
                **error.detail,
            ) from None
        raise
    if located.row.get("hastate"):
        _await_status(ctx, located, "running", action)
    return upids, warnings


def _run_task(
    ctx: Context, sandbox: Sandbox, located: Located, label: str, action: str, **params: Any
) -> tuple[list[str], list[str]]:
    """Send a request that starts a task, and return the tasks and their warnings.

    A request that did not begin because of a lock is sent up to _LOCK_TRIES times. The VM is judged again before each.
    Raises OutcomeUnknown for an answer without a task, and the errors of the request and of the task.
    """
    upids: list[str] = []
    tries = 0
    while True:
        tries += 1
        try:
            with ctx.client.reserve_place(located.path) as waited:
                located = require_fresh_match(ctx, sandbox, located, waited)
                upid = ctx.client.post(f"{located.path}/{action}", **params)
            if not isinstance(upid, str):
                raise OutcomeUnknown(
                    f"{label}: Proxmox answered without a task id; whether it was done is not known, run again"
                )
            upids.append(upid)
            return upids, ctx.tasks.wait(upid, label, ctx.wait_timeout)
        except (ApiError, TaskFailed) as error:
            # The task did not begin: Proxmox VE's clean-up after a stop may hold the VM's lock for up to 30 s.
            if tries >= _LOCK_TRIES or not is_not_begun(
                error.text if isinstance(error, ApiError) else error.exitstatus
            ):
                raise
        ctx.clock.sleep(LOCK_PAUSE)


def resize(ctx: Context, located: Located, disk: str, size: str, label: str) -> None:
    """Grow a disk to an absolute size, and wait for the task. Idempotent."""
    answer = ctx.client.put(f"{located.path}/resize", disk=disk, size=size, digest=located.digest)
    if isinstance(answer, str) and answer.startswith("UPID:"):
        ctx.tasks.wait(answer, label, ctx.wait_timeout)


def read_status(ctx: Context, located: Located) -> dict[str, Any]:
    """Return the VM's ``status/current``."""
    return ctx.client.get_dict(f"{located.path}/status/current")


def is_running(ctx: Context, located: Located) -> bool:
    """Return whether the VM runs and is not paused, read from the VM itself."""
    now = read_status(ctx, located)
    return now.get("status") == "running" and not is_paused(now)


def _await_status(ctx: Context, located: Located, wanted_status: str, label: str) -> None:
    """Wait until the VM has the wanted status. Raises TaskTimeout when wait_timeout is over."""

    def look() -> bool | None:
        return read_status(ctx, located).get("status") == wanted_status or None

    if waiting.wait_for_result(ctx.clock, ctx.wait_timeout, look, longest=2.0) is None:
        raise TaskTimeout(
            f"{label}: the HA manager did not bring it to {wanted_status} within {ctx.wait_timeout} s (wait_timeout); "
            "run again"
        )


def _get_past_tense(operation: str) -> str:
    """Return the word of the outcome for an operation."""
    return {
        "start": "started",
        "stop": "stopped",
        "suspend": "suspended",
        "complete": "completed",
        "fail": "failed_reported",
    }[operation]


OPERATION_OF_STATE = {
    "started": "start",
    "stopped": "stop",
    "suspended": "suspend",
    "completed": "complete",
    "failed": "fail",
}


def get_operation(state: str) -> str:
    """Return the operation for a module's ``state``. Raises InvalidInput for another word."""
    try:
        return OPERATION_OF_STATE[state]
    except KeyError:
        raise InvalidInput(
            f"state: {state!r} is not valid. Valid: {', '.join(OPERATION_OF_STATE)}", option="state"
        ) from None
