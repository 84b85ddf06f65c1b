# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start, stop, suspend, and reporting a job's end. Each: state rule, claim, identity, the request, its task, the record."""

from __future__ import annotations

from typing import Any

from .. import states
from ..errors import ApiError, InvalidInput, OutcomeUnknown, RecordChanged, TaskFailed, TaskTimeout, TaskUnknown
from ..model import Outcome, Sandbox
from ..proxmox.client import not_begun
from ..store.records import Claim
from .context import Context, refuse_cut_off
from .verify import Located, just_judged, refuse_locked, require_match

_LOCK_TRIES = 3
# What is asked of Proxmox, and the state it leads to.
TARGETS = {"start": states.RUNNING, "stop": states.STOPPED, "suspend": states.SUSPENDED, "complete": states.COMPLETED, "fail": states.FAILED}


def plan(ctx: Context, sandbox: Sandbox, operation: str) -> bool:
    """Whether there is something to do; StateConflict when the state does not allow it."""
    return states.check(operation, sandbox.state, ctx.force_hint)


def run(ctx: Context, sandbox: Sandbox, operation: str) -> Outcome:
    """Carry one of TARGETS out on one sandbox (in check mode: say what would be done)."""
    target = TARGETS[operation]
    if not plan(ctx, sandbox, operation):
        return Outcome.of("unchanged", sandbox, reason=f"already {sandbox.state}")
    if ctx.dry_run:
        # The full reads of the real run: what would be refused there is refused here.
        if operation not in ("complete", "fail"):
            refuse_locked(sandbox, require_match(ctx, sandbox))
        return Outcome.of("would_" + operation, sandbox, state=target, changed=True)
    with ctx.claimed(sandbox, operation) as (claim, current):
        if not plan(ctx, current, operation):
            return Outcome.of("unchanged", current, reason=f"already {current.state}")
        # Its journal would be gone with this one.
        refuse_cut_off(claim, current)
        if operation in ("complete", "fail"):
            done = ctx.records.change(claim, current, operation, to=target, reason="reported", finish=True)
            return Outcome.of(_past(operation), done, previous_state=current.state, changed=True, reason="reported")
        try:
            return _request(ctx, claim, current, operation, target)
        except (TaskFailed, TaskUnknown) as error:
            # The message has the end of the task's log, which may be gone from the node when somebody looks.
            ctx.records.note(current, operation, outcome="failed", reason=error.code, evidence={"message": error.message},
                             upids=[str(error.detail["upid"])] if error.detail.get("upid") else [])
            raise


def _request(ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, target: str) -> Outcome:
    began = ctx.clock.monotonic()
    found = require_match(ctx, sandbox)
    refuse_locked(sandbox, found)
    ctx.records.journal(claim, operation, "requested", {"node": found.node})
    if operation == "stop":
        upids, warnings = stop(ctx, sandbox, found, hard=sandbox.state == states.SUSPENDED)
    elif operation == "start":
        upids, warnings = start(ctx, sandbox, found)
    else:
        upids, warnings = _task(ctx, sandbox, found, f"suspend VM {sandbox.vmid}", "status/suspend")
    took = int((ctx.clock.monotonic() - began) * 1000)
    values: dict[str, Any] = {"to": target, "upids": upids, "duration_ms": took, "finish": True, "node": found.node}
    done = settle(ctx, claim, sandbox, operation, **values)
    return Outcome.of(_past(operation), done, previous_state=sandbox.state, changed=True, upids=upids, warnings=warnings)


def settle(ctx: Context, claim: Claim, sandbox: Sandbox, operation: str, *, to: str, **values: Any) -> Sandbox:
    """Write the new state; a lease that was renewed or ran out meanwhile is taken into account, anything else is RecordChanged."""
    try:
        return ctx.records.change(claim, sandbox, operation, to=to, **values)
    except RecordChanged:
        now = ctx.records.get(sandbox.uuid)
        if now.state != sandbox.state and not states.can_follow(now.state, to):
            raise
        return ctx.records.change(claim, now, operation, to=to, **values)


def stop(ctx: Context, sandbox: Sandbox, found: Located, *, hard: bool) -> tuple[list[str], list[str]]:
    """Stop a VM that was just judged to be ours; gracefully with a hard end after shutdown_timeout, or hard at once."""
    if str(found.row.get("status")) == "stopped":
        now = status(ctx, found)
        # Believed only if that was said of our VM.
        found = require_match(ctx, sandbox)
        if now.get("status") == "stopped":
            return [], []
    what = f"stop VM {sandbox.vmid}"
    if hard or not ctx.config.shutdown_timeout:
        upids, warnings = _task(ctx, sandbox, found, what, "status/stop")
    else:
        try:
            # forceStop: a guest that does not answer is switched off when its time is over.
            upids, warnings = _task(ctx, sandbox, found, what, "status/shutdown", timeout=ctx.config.shutdown_timeout, forceStop=1)
        except ApiError as error:
            if "not running" not in error.text:
                raise
            return [], []
    if found.row.get("hastate"):
        # The HA manager's task ends when the request is taken, not when the VM has stopped.
        _await_status(ctx, found, "stopped", what)
    return upids, warnings


def start(ctx: Context, sandbox: Sandbox, found: Located) -> tuple[list[str], list[str]]:
    """Start or resume a VM that was judged to be ours; it is judged once more, after its power state was read."""
    now = status(ctx, found)
    found = require_match(ctx, sandbox)
    what = f"start VM {sandbox.vmid}"
    if now.get("status") == "running":
        if now.get("qmpstatus") in ("paused", "suspended"):
            return _task(ctx, sandbox, found, f"resume VM {sandbox.vmid}", "status/resume")
        return [], []
    try:
        upids, warnings = _task(ctx, sandbox, found, what, "status/start")
    except TaskFailed as error:
        if "already running" not in error.exitstatus:
            raise
        return [], []
    if found.row.get("hastate"):
        _await_status(ctx, found, "running", what)
    return upids, warnings


def _task(ctx: Context, sandbox: Sandbox, found: Located, what: str, action: str, **params: Any) -> tuple[list[str], list[str]]:
    upids: list[str] = []
    tries = 0
    while True:
        tries += 1
        try:
            with ctx.client.held(found.path) as waited:
                found = just_judged(ctx, sandbox, found, waited)
                upid = ctx.client.post(f"{found.path}/{action}", **params)
            if not isinstance(upid, str):
                raise OutcomeUnknown(f"{what}: Proxmox answered without a task id; whether it was done is not known, run again")
            upids.append(upid)
            return upids, ctx.tasks.wait(upid, what, ctx.wait_timeout)
        except (ApiError, TaskFailed) as error:
            # The clean-up after a stop may hold the VM's lock for up to 30 s: the task did not begin.
            if tries >= _LOCK_TRIES or not not_begun(error.text if isinstance(error, ApiError) else error.exitstatus):
                raise
        ctx.clock.sleep(1.0)


def resize(ctx: Context, located: Located, disk: str, size: str, what: str) -> None:
    """To an absolute size: asking twice is asking once."""
    answer = ctx.client.put(f"{located.path}/resize", disk=disk, size=size, digest=located.digest)
    if isinstance(answer, str) and answer.startswith("UPID:"):
        ctx.tasks.wait(answer, what, ctx.wait_timeout)


def status(ctx: Context, found: Located) -> dict[str, Any]:
    return ctx.client.get_dict(f"{found.path}/status/current")


def runs(ctx: Context, found: Located) -> bool:
    """Whether the VM is running and not suspended, as it says itself."""
    now = status(ctx, found)
    return now.get("status") == "running" and now.get("qmpstatus") not in ("paused", "suspended")


def _await_status(ctx: Context, found: Located, wanted: str, what: str) -> None:
    deadline = ctx.clock.monotonic() + ctx.wait_timeout
    pause = 0.2
    while status(ctx, found).get("status") != wanted:
        if ctx.clock.monotonic() > deadline:
            raise TaskTimeout(f"{what}: the HA manager did not bring it to {wanted} within {ctx.wait_timeout} s (wait_timeout); run again")
        ctx.clock.sleep(pause)
        pause = min(pause * 1.5, 2.0)


def _past(operation: str) -> str:
    return {"start": "started", "stop": "stopped", "suspend": "suspended", "complete": "completed", "fail": "failed_reported"}[operation]


OPERATION_OF_STATE = {"started": "start", "stopped": "stop", "suspended": "suspend", "completed": "complete", "failed": "fail"}


def operation_for(state: str) -> str:
    """The operation behind a module's ``state``."""
    try:
        return OPERATION_OF_STATE[state]
    except KeyError:
        raise InvalidInput(f"state: {state!r} is not valid. Valid: {', '.join(OPERATION_OF_STATE)}", option="state") from None
