# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Apply the cleanup rules through the destroy pipeline.

A guard stops a run that would destroy too many sandboxes, and freezes all later runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .. import clock as clock_module
from .. import rules, states, timeguard
from ..context import Context, make_failure
from ..durations import show
from ..errors import AgentlabError, Busy, Frozen, GuardTripped, Kept
from ..model import Outcome, Sandbox
from ..store import history
from ..store.freeze import FROZEN
from . import prune, reconcile

# The guard's percentage applies only to this number of candidates or more.
GUARD_FROM = 5
# Records to remove in one transaction. Other writers wait for its end.
_FORGET_AT_ONCE = 500


@dataclass(slots=True)
class CleanupResult:
    """The outcomes of a run or a dry run, in the same shape.

    ``guard``: in a dry run, the reason why the guard would stop the run. ``candidates``: sandboxes chosen for destroy.
    ``forgotten``: records of destroyed sandboxes that were removed.
    """

    pruned: list[Outcome] = field(default_factory=list)
    marked: list[Outcome] = field(default_factory=list)
    kept: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    candidates: int = 0
    forgotten: int = 0
    guard: str | None = None
    dry_run: bool = False

    def public(self) -> dict[str, Any]:
        return {
            "count": len(self.pruned),
            "dry_run": self.dry_run,
            "candidates": self.candidates,
            "forgotten": self.forgotten,
            "guard": self.guard,
            **{
                name: [outcome.public() for outcome in getattr(self, name)]
                for name in ("pruned", "marked", "kept", "failed")
            },
        }


# ---- freezing ----


def freeze(ctx: Context, reason: str) -> dict[str, Any]:
    """Freeze all rules until a person releases them, and return the freeze.

    The freeze outlives restarts. If the rules are frozen already, the first freeze and its reason stay.
    """
    known = timeguard.read_freeze(ctx)
    if known:
        return known
    freeze_note = {
        "reason": reason,
        "at": clock_module.format_utc(ctx.clock.now()),
        "actor": ctx.actor,
        "leases": False,
    }
    ctx.records.set_meta(FROZEN, json.dumps(freeze_note))
    return freeze_note


def release(ctx: Context) -> dict[str, Any] | None:
    """Release the rules, and return the freeze that was in force, or None."""
    known = timeguard.read_freeze(ctx)
    if known:
        ctx.records.set_meta(FROZEN, None)
    return known


# ---- a run ----


def run(ctx: Context, policy: rules.Policy) -> CleanupResult:
    """Run the rules once, and return the outcomes. A dry run and shadow mode read everything and write nothing.

    Raises Frozen if cleanup is frozen, GuardTripped if this run exceeded the guard and froze cleanup, and Busy while
    another controller runs the rules.
    """
    with ctx.run_alone("cleanup"):
        return _run_rules(ctx, policy)


def _run_rules(ctx: Context, policy: rules.Policy) -> CleanupResult:
    """Choose the sandboxes, check the guard, and apply the rules; in a dry run, only plan them."""
    looking = ctx.dry_run
    stopped = timeguard.read_freeze(ctx)
    if stopped and not looking:
        raise Frozen(
            f"cleanup is frozen since {stopped['at'] or 'an unknown time'} ({stopped['reason']}); look at what the "
            "rules would do (dry run), then release cleanup",
            **stopped,
        )
    report = CleanupResult(dry_run=looking)
    pause_reason = timeguard.find_pause(ctx)
    live = ctx.records.find_all()
    chosen = _choose_rules(ctx, policy, live, pause_reason, report)
    doomed = [sandbox for rule, sandbox in chosen if rule.action == rules.DESTROY]
    report.candidates = len(doomed)
    too_many = _find_exceeded_guard(policy, len(doomed), len(live))
    if looking or too_many:
        planned = prune.PruneResult()
        prune.plan(ctx, doomed, planned)
        too_many = _find_exceeded_guard(policy, planned.count, len(live))
        if looking:
            _add_outcomes(report, planned)
            report.guard = too_many
            report.marked = [
                Outcome.of("would_fail", sandbox, state=states.FAILED, reason=rule.name, changed=True)
                for rule, sandbox in chosen
                if rule.action == rules.FAIL
            ]
            if policy.keep_destroyed is not None and not pause_reason:
                report.forgotten = history.count_forgettable(ctx.records, policy.keep_destroyed)
            return report
        # Destroy only what the guard has counted: other sandboxes may have become eligible meanwhile.
        counted = {sandbox.uuid for sandbox in planned.pruned}
        chosen = [
            (rule, sandbox) for rule, sandbox in chosen if rule.action != rules.DESTROY or sandbox.uuid in counted
        ]
        planned.pruned = []
        _add_outcomes(report, planned)
    if too_many:
        freeze(ctx, too_many)
        raise GuardTripped(
            f"{too_many}; nothing was destroyed, and cleanup is frozen until it is released. Look at what the rules "
            "would do (dry run), then release cleanup",
            count=report.candidates,
        )
    for rule in policy.rules:
        mine = [sandbox for other, sandbox in chosen if other is rule]
        if mine:
            _apply_rule(ctx, rule, mine, report)
    if policy.keep_destroyed is not None and not pause_reason:
        report.forgotten = _forget_destroyed(ctx, policy.keep_destroyed)
    return report


def _choose_rules(
    ctx: Context, policy: rules.Policy, live: list[Sandbox], pause_reason: tuple[str, str] | None, report: CleanupResult
) -> list[tuple[rules.CleanupRule, Sandbox]]:
    """Return (rule, sandbox) for each sandbox on which a rule acts now, judged by the records alone.

    If a rule matches a sandbox but does not act yet, the sandbox is added to the report as kept, with the reason.
    """
    now = ctx.clock.now()
    chosen = []
    for sandbox in live:
        rule = policy.find_rule(sandbox)
        if rule is None:
            continue
        if rule.action == rules.KEEP:
            report.kept.append(
                Outcome.of("kept", sandbox, reason="rule", message=f"rule {rule.name!r} keeps sandbox {sandbox.vmid}")
            )
            continue
        why = (
            prune.explain_too_young(sandbox, rule.after, now)
            if rule.action == rules.FAIL
            else prune.explain_sparing(sandbox, rule.after, now)
        )
        if why is None and pause_reason:
            why = pause_reason
        if why:
            report.kept.append(Outcome.of("kept", sandbox, reason=why[0], message=f"rule {rule.name!r}: {why[1]}"))
        else:
            chosen.append((rule, sandbox))
    return chosen


def _find_exceeded_guard(policy: rules.Policy, count: int, live: int) -> str | None:
    """Return why the guard stops a run that would destroy ``count`` of ``live`` sandboxes, or None."""
    if count > policy.guard_count:
        return f"{count} sandboxes would be destroyed at once, more than guard count={policy.guard_count}"
    if count >= GUARD_FROM and count * 100 > policy.guard_percent * live:
        return f"{count} of {live} sandboxes would be destroyed at once, more than guard percent={policy.guard_percent}"
    return None


def _apply_rule(ctx: Context, rule: rules.CleanupRule, chosen: list[Sandbox], report: CleanupResult) -> None:
    """Apply one rule to the sandboxes chosen for it, and add the outcomes to the report."""
    # Events name the rule as part of the actor.
    acting = ctx.derive(actor=f"{ctx.actor} (cleanup rule {rule.name})")
    acting.records.in_pass = True
    if rule.action == rules.DESTROY:
        pruned = prune.PruneResult()
        prune.execute(
            acting, chosen, pruned, operation="cleanup", allowed=lambda sandbox: _refuse_frozen(acting, sandbox)
        )
        _add_outcomes(report, pruned)
        return
    for outcome in acting.run_each(lambda sandbox: _give_creation_up(acting, rule, sandbox), chosen):
        {"failed": report.failed, "kept": report.kept}.get(outcome.outcome, report.marked).append(outcome)


def _refuse_frozen(ctx: Context, sandbox: Sandbox) -> None:
    """Raise Kept when a person has frozen cleanup during the run."""
    if timeguard.read_freeze(ctx):
        raise Kept("changed", f"sandbox {sandbox.vmid}: cleanup was frozen during this run; release cleanup to go on")


def _give_creation_up(ctx: Context, rule: rules.CleanupRule, planned: Sandbox) -> Outcome:
    """Set a creation that no run works on to FAILED, and return the outcome.

    If the creation has a VM, the VM is bound to the record, and a later rule destroys both.
    """
    try:
        _refuse_frozen(ctx, planned)
        given_up = reconcile.give_up_creation(ctx, planned, {"rule": rule.name, "after": show(rule.after)})
        return Outcome.of("failed_reported", given_up, previous_state=planned.state, reason=rule.name, changed=True)
    except (Kept, Busy) as error:
        return Outcome.of(
            "kept", planned, reason=error.reason if isinstance(error, Kept) else "busy", message=error.message
        )
    except AgentlabError as error:
        return make_failure(planned, error)


def _add_outcomes(report: CleanupResult, more: prune.PruneResult) -> None:
    report.pruned += more.pruned
    report.kept += more.kept
    report.failed += more.failed


def _forget_destroyed(ctx: Context, older_than: int) -> int:
    """Remove the records of sandboxes destroyed over ``older_than`` seconds ago, and return their number."""
    deleted = 0
    while True:
        count = history.forget(ctx.records, older_than, _FORGET_AT_ONCE)
        deleted += count
        if count < _FORGET_AT_ONCE:
            return deleted
