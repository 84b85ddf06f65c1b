# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Destroy expired sandboxes, and give the reason for each kept sandbox.

The real run, check mode and the dry run use the same planner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .. import reasons, states, timeguard
from ..context import Context
from ..durations import show
from ..errors import AgentlabError, Busy, GuardTripped, InvalidInput, Kept
from ..model import Outcome, Sandbox
from ..sandboxes import destroy


@dataclass(slots=True)
class PruneResult:
    """The outcomes of a prune or a dry run, in the same shape."""

    pruned: list[Outcome] = field(default_factory=list)
    kept: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.pruned)


@dataclass(slots=True)
class Selection:
    """The records to select: by state, by minimum age in seconds, and by tag (any of ``tags``).

    ``max_count`` is a guard: a run with more candidates prunes nothing.
    """

    states: Sequence[str] = (states.TIMEOUT,)
    older_than: int | None = None
    tags: Sequence[str] = ()
    max_count: int | None = None

    def check(self) -> None:
        """Raise InvalidInput for a state that cannot be pruned, and for a negative ``max_count``."""
        for state in self.states:
            if state not in states.PRUNABLE:
                raise InvalidInput(
                    f"states: {state!r} cannot be pruned. Valid: {', '.join(states.PRUNABLE)}",
                    option="states",
                    value=state,
                )
        if self.max_count is not None and self.max_count < 0:
            raise InvalidInput(
                f"max_count: {self.max_count} is negative. Valid: 0 or more", option="max_count", value=self.max_count
            )


def select(ctx: Context, selection: Selection) -> tuple[list[Sandbox], list[Outcome]]:
    """Return (candidates, outcomes of kept sandboxes with their reason), judged by the records alone."""
    selection.check()
    now = ctx.clock.now()
    candidates: list[Sandbox] = []
    kept: list[Outcome] = []
    pause_reason = timeguard.find_pause(ctx)
    for sandbox in ctx.records.find_all(list(dict.fromkeys(selection.states))):
        if selection.tags and not set(selection.tags) & set(sandbox.tags):
            continue
        why = explain_sparing(sandbox, selection.older_than, now)
        if why is None and pause_reason:
            why = pause_reason
        if why:
            kept.append(Outcome.of("kept", sandbox, reason=why[0], message=why[1]))
        else:
            candidates.append(sandbox)
    return candidates, kept


def explain_sparing(sandbox: Sandbox, older_than: int | None, now: int) -> tuple[str, str] | None:
    """Return (reason, sentence) if the record alone keeps the sandbox, else None.

    ``older_than`` is the minimum age in seconds, ``now`` the time in seconds since the epoch.
    """
    if sandbox.protected:
        return "protected", f"sandbox {sandbox.vmid} is protected"
    return None if older_than is None else explain_too_young(sandbox, older_than, now)


def explain_too_young(sandbox: Sandbox, older_than: int, now: int) -> tuple[str, str] | None:
    """Return (reason, sentence) for a sandbox that is too young, else None.

    The age counts from the time at which the sandbox entered its state, and must exceed ``older_than`` seconds. A
    sandbox without that time is too young.
    """
    if sandbox.state_changed_at is None:
        return (
            "too_young",
            f"the record of sandbox {sandbox.vmid} has no time at which the sandbox entered {sandbox.state}",
        )
    age = now - sandbox.state_changed_at
    return (
        None
        if age > older_than
        else (
            "too_young",
            f"sandbox {sandbox.vmid} is in {sandbox.state} for {show(age)}, not longer than {show(older_than)}",
        )
    )


def run(ctx: Context, selection: Selection) -> PruneResult:
    """Prune the selected sandboxes, and return the outcomes.

    Raises GuardTripped, and prunes nothing, if more than ``max_count`` sandboxes would be pruned.
    """
    ctx.records.in_pass = True
    candidates, kept = select(ctx, selection)
    report = PruneResult(kept=kept)
    if not candidates:
        return report
    if ctx.dry_run or (selection.max_count is not None and len(candidates) > selection.max_count):
        plan(ctx, candidates, report)
        if selection.max_count is not None and report.count > selection.max_count:
            count = report.count
            raise GuardTripped(
                f"max_count: {count} sandbox(es) would be pruned, more than max_count={selection.max_count}; nothing "
                "was pruned. Look at them (a dry run, check mode), then raise max_count",
                would_prune=[outcome.public() for outcome in report.pruned],
                count=count,
                max_count=selection.max_count,
            )
        if ctx.dry_run:
            return report
        chosen = {outcome.uuid for outcome in report.pruned}
        report.pruned = []
        report.failed = []
        candidates = [sandbox for sandbox in candidates if sandbox.uuid in chosen]
    execute(ctx, candidates, report)
    return report


def execute(
    ctx: Context,
    candidates: list[Sandbox],
    report: PruneResult,
    operation: str = "prune",
    allowed: Callable[[Sandbox], None] | None = None,
) -> None:
    """Destroy the candidates, and add the outcomes to the report. A candidate that has changed its state is kept.

    ``operation`` names the run in the journal and in messages. ``allowed`` is called before each destroy, and raises
    Kept if no more may be started.
    """

    def make_request(planned: Sandbox) -> destroy.Request:
        def recheck(current: Sandbox) -> None:
            if allowed:
                allowed(current)
            if current.state != planned.state or current.state_changed_at != planned.state_changed_at:
                raise Kept(
                    "changed",
                    f"sandbox {current.vmid} was {planned.state} when the {operation} was planned and is "
                    f"{current.state} now; run again",
                )

        return destroy.Request(operation=operation, force=True, claim_wait=0, recheck=recheck)

    for outcome in destroy.run(ctx, [(sandbox, make_request(sandbox)) for sandbox in candidates]):
        _sort_outcome(report, outcome)


def _sort_outcome(report: PruneResult, outcome: Outcome) -> None:
    """Add an outcome to the pruned, kept or failed sandboxes of the report."""
    if outcome.state == states.DESTROYED and not outcome.failed:
        (report.pruned if outcome.changed else report.kept).append(outcome)
        if not outcome.changed:
            outcome.outcome, outcome.reason = "kept", "changed"
    elif outcome.reason in reasons.KEPT:
        outcome.outcome, outcome.failed = "kept", False
        report.kept.append(outcome)
    else:
        report.failed.append(outcome)


def plan(ctx: Context, candidates: list[Sandbox], report: PruneResult) -> None:
    """Add the outcomes of a run to the report, from all reads of the destroy pipeline and none of its writes."""
    if not candidates:
        return
    absent: list[Sandbox] = []
    listed = ctx.cluster.survey([sandbox.vmid for sandbox in candidates])

    def plan_sandbox(sandbox: Sandbox) -> Outcome | None:
        if sandbox.vmid not in listed and sandbox.smbios_uuid is not None:
            absent.append(sandbox)
            return None
        try:
            planned = destroy.plan(ctx, sandbox)
            return Outcome.of(
                "would_prune",
                sandbox,
                state=states.DESTROYED,
                reason=planned.reason,
                message=planned.message,
                changed=True,
            )
        except Kept as error:
            return Outcome.of("kept", sandbox, reason=error.reason, message=error.message, failed=True)
        except Busy as error:
            return Outcome.of("kept", sandbox, reason="busy", message=error.message, failed=True)
        except AgentlabError as error:
            return Outcome.of("failed", sandbox, reason=error.code, message=error.message, failed=True)

    planned = ctx.run_each(plan_sandbox, candidates)
    proofs = ctx.cluster.prove_absent([sandbox.vmid for sandbox in absent], anew=False) if absent else {}
    for sandbox, outcome in zip(candidates, planned, strict=True):
        if outcome is None:
            proof = proofs[sandbox.vmid]
            outcome = (
                Outcome.of(
                    "would_prune", sandbox, state=states.DESTROYED, reason="vm_absent", message=proof.why, changed=True
                )
                if proof.absent
                else Outcome.of(
                    "kept", sandbox, reason="unknown", message=f"sandbox {sandbox.vmid}: {proof.why}", failed=True
                )
            )
        if outcome.outcome == "would_prune":
            report.pruned.append(outcome)
        else:
            _sort_outcome(report, outcome)
