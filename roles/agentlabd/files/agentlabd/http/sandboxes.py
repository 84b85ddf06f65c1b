# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Answer for single sandboxes: show, destroy, start and stop, protect, renew."""

from __future__ import annotations

from collections.abc import Callable

from agentlab_core import states
from agentlab_core.context import Context, make_failure
from agentlab_core.errors import AgentlabError, InvalidInput, StateConflict
from agentlab_core.model import Outcome, Sandbox
from agentlab_core.sandboxes import create, destroy, lease
from agentlab_core.store import history
from agentlab_core.views import info
from agentlab_core.vm import address, power

from . import lookup, upstream
from .answers import Answer, answer_item, answer_items
from .route import Call


def list_sandboxes(call: Call) -> Answer:
    selection = info.Filter(
        states=call.query.get("state"),
        profile=call.query.get("profile"),
        tags=call.query.get("tag", ()),
        include_destroyed=call.query.get("include_destroyed", False),
    )
    shown = info.show(call.make_context(), selection, owner=call.query.get("owner", False))
    return Answer({"sandboxes": shown["sandboxes"]})


def show_sandbox(call: Call) -> Answer:
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    if address.is_due(sandbox, ctx.clock.now()):
        lookup.look_up_address(ctx, sandbox, call.service.work_pool)
    return Answer(sandbox.public())


def list_events(call: Call) -> Answer:
    ctx = call.make_context()
    ctx.select_sandbox(call.vmid)
    after = call.query.get("after", 0)
    events = history.read_events(
        ctx.database, vmid=call.vmid, after=after, tail=call.query.get("tail"), limit=call.query.get("limit", 1000)
    )
    return Answer(
        {"events": [upstream.describe_event(row) for row in events], "last_id": events[-1]["id"] if events else after}
    )


def list_inventory(call: Call) -> Answer:
    ctx = call.make_context()
    return Answer(
        {
            "sandboxes": upstream.describe_inventory(
                ctx.records.find_all(), ctx.cluster.list_vms(fresh=True), ctx.config.vmid_range
            )
        }
    )


def destroy_sandbox(call: Call) -> Answer:
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    force = call.body.get("force", False)
    # Refusing here gives an answer that names the valid states.
    destroy.check(ctx, sandbox, force)
    return answer_item(destroy.destroy_several(ctx, [sandbox], force)[0])


def destroy_sandboxes(call: Call) -> Answer:
    ctx = call.make_context()
    # Look up all ids before anything is done.
    sandboxes: list[Sandbox] = [ctx.select_sandbox(vmid) for vmid in dict.fromkeys(call.body["vmids"])]
    return answer_items(destroy.destroy_several(ctx, sandboxes, call.body.get("force", False)))


def make_power_handler(operation: str) -> Callable[[Call], Answer]:
    """Return the handler of a route that does one operation of vm/power.py."""

    def handler(call: Call) -> Answer:
        ctx = call.make_context()
        return answer_item(power.run(ctx, ctx.select_sandbox(call.vmid), operation))

    return handler


# prune would never see a TIMEOUT sandbox that became STOPPED. The daemon itself stops the VM of such a sandbox.
_STOPPABLE = tuple(
    state
    for state in (*states.OPERATIONS["stop"].allowed, *states.OPERATIONS["stop"].satisfied)
    if state != states.TIMEOUT
)


def _refuse_stop(sandbox: Sandbox) -> None:
    """Raise StateConflict for a sandbox in TIMEOUT, as the original daemon does. Only a module may stop it."""
    if sandbox.state == states.TIMEOUT:
        raise StateConflict(
            f"cannot stop sandbox in {states.TIMEOUT} state. Valid states: {', '.join(_STOPPABLE)}. "
            "Its lease is over and its VM is stopped by the daemon: prune it, or destroy it with --force",
            operation="stop",
            state=sandbox.state,
            valid=_STOPPABLE,
        )


def stop_sandbox(call: Call) -> Answer:
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    _refuse_stop(sandbox)
    return answer_item(power.run(ctx, sandbox, "stop", force=call.body.get("force", False)))


def _start_vm(ctx: Context, sandbox: Sandbox, call: Call) -> Answer:
    """Start or resume the VM, and with ``wait_for_ip`` wait for its address, which may have changed."""
    outcome = power.run(ctx, sandbox, "start")
    return answer_item(address.add_address(ctx, outcome, started=True) if call.body.get("wait_for_ip") else outcome)


def start_sandbox(call: Call) -> Answer:
    ctx = call.make_context()
    return _start_vm(ctx, ctx.select_sandbox(call.vmid), call)


def resume_sandbox(call: Call) -> Answer:
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    valid = (states.SUSPENDED, *states.OPERATIONS["start"].satisfied)
    if sandbox.state not in valid:
        raise StateConflict(
            f"cannot resume sandbox in {sandbox.state} state. Valid states: {', '.join(valid)}",
            operation="start",
            state=sandbox.state,
            valid=valid,
        )
    return _start_vm(ctx, sandbox, call)


def stop_all_sandboxes(call: Call) -> Answer:
    """Stop every sandbox whose VM runs or is paused; list the others as skipped. A failure does not end the run."""
    ctx = call.make_context()
    sandboxes = ctx.records.find_all()

    def stop_vm(sandbox: Sandbox) -> Outcome | None:
        if sandbox.state not in (*states.POWERED, states.SUSPENDED):
            return None
        try:
            return power.run(ctx, sandbox, "stop")
        except AgentlabError as error:
            return make_failure(sandbox, error)

    outcomes = ctx.run_each(stop_vm, sandboxes)
    results = [upstream.describe_stop(sandbox, outcome) for sandbox, outcome in zip(sandboxes, outcomes, strict=True)]
    counts = {word: sum(result["result"] == word for result in results) for word in ("stopped", "skipped", "failed")}
    return Answer(
        {"total": len(results), **counts, "results": results},
        207 if counts["failed"] else 200,
        [outcome for outcome in outcomes if outcome is not None],
    )


def _amend_record(call: Call, **values: bool) -> Answer:
    """Set options that concern only the record. Raises StateConflict for a destroyed sandbox."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    if not sandbox.live:
        raise StateConflict(
            f"cannot change sandbox in {sandbox.state} state. Valid states: every other one",
            operation="update",
            state=sandbox.state,
        )
    answer = answer_item(create.amend(ctx, sandbox, **values))
    call.service.note_lease_change()
    return answer


def make_protection_handler(protected: bool) -> Callable[[Call], Answer]:
    """Return the handler of a route that sets or removes the protection."""
    return lambda call: _amend_record(call, protected=protected)


def set_keepalive(call: Call) -> Answer:
    return _amend_record(call, keepalive=call.body["keepalive"])


def renew_lease(call: Call) -> Answer:
    ctx = call.make_context()
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
        ctx,
        ctx.select_sandbox(call.vmid),
        ttl,
        min_remaining=shortest,
        allow_shorten=call.body.get("allow_shorten", False),
    )
    call.service.note_lease_change()
    call.service.metrics.count_renewal(outcome)
    return Answer(
        {
            "vmid": outcome.vmid,
            **{name: outcome.extra[name] for name in ("lease_expires_at", "granted_seconds", "capped")},
            "changed": outcome.changed,
        },
        outcomes=[outcome],
    )
