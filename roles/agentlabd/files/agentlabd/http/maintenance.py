# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve prune, reconcile and cleanup, which act on many sandboxes chosen by age or rule."""

from __future__ import annotations

from agentlab_core import durations, states
from agentlab_core.errors import AgentlabError, InvalidInput, StateConflict
from agentlab_core.maintenance import cleanup, prune, reconcile

from . import upstream
from .answers import REMEDIES, Answer
from .route import Call


def prune_sandboxes(call: Call) -> Answer:
    dry_run = call.body.get("dry_run", False)
    older = call.body.get("older_than")
    selection = prune.Selection(
        states=call.body.get("states") or (states.TIMEOUT,),
        older_than=None if older is None else durations.parse(older, "older_than", zero=True),
        tags=call.body.get("tags", ()),
        max_count=call.body.get("max_count"),
    )
    metrics = call.service.metrics
    try:
        report = prune.run(call.make_context(dry_run), selection)
    except AgentlabError as error:
        if not dry_run and not isinstance(error, InvalidInput):
            metrics.count_stopped_prune(error)
        raise
    if not dry_run:
        metrics.count_prune("prune", report.pruned, report.kept, report.failed, report.count + len(report.failed))
    body = {
        "count": report.count,
        "dry_run": dry_run,
        **{
            name: [outcome.public(REMEDIES) for outcome in getattr(report, name)]
            for name in ("pruned", "kept", "failed")
        },
    }
    return Answer(body, 207 if report.failed else 200, [*report.pruned, *report.kept, *report.failed])


def reconcile_sandboxes(call: Call) -> Answer:
    if "apply" in call.body and call.body.get("dry_run") == call.body["apply"]:
        raise InvalidInput("dry_run: contradicts apply; give one of the two", option="dry_run")
    apply = call.body.get("apply", not call.body.get("dry_run", True))
    adopt = call.body.get("adopt_cluster", False)
    if adopt and not apply:
        raise InvalidInput("adopt_cluster: has an effect together with apply only", option="adopt_cluster")
    ctx = call.make_context(dry_run=not apply)
    checked = len(ctx.records.find_all())
    began = ctx.database.read_wall_time()
    drifts = reconcile.run(ctx, apply=apply, adopt_cluster=adopt)
    if apply:
        call.service.note_reconciled(drifts, began)
        call.service.note_lease_change()
    return Answer(upstream.describe_drift(drifts, checked, applied=apply))


def run_cleanup(call: Call) -> Answer:
    if not call.service.policy.rules:
        raise StateConflict(f"there are no cleanup rules: {call.service.config.cleanup_file} is missing or names none")
    report = call.service.clean_up(call.actor, dry_run=call.body.get("dry_run", False))
    return Answer(
        report.public(),
        207 if report.failed and not report.dry_run else 200,
        [*report.pruned, *report.marked, *report.failed],
    )


def freeze_cleanup(call: Call) -> Answer:
    return Answer({"frozen": cleanup.freeze(call.make_context(), call.body["reason"])})


def release_cleanup(call: Call) -> Answer:
    return Answer({"frozen": None, "released": cleanup.release(call.make_context())})
