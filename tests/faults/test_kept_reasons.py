# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A reason for leaving a sandbox alone counts alike for destroy, check mode, prune, cleanup rules and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import reasons
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import make_failure
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ClaimLost, Kept, TaskFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

from support.daemon import in_daemon
from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.create("a1")
    yield one_lab


@pytest.mark.parametrize("reason", reasons.KEPT)
def test_each_reason_is_kept_by_every_way_of_destroying(lab: Lab, reason: str) -> None:
    def refuse(_current: Sandbox) -> None:
        raise Kept(reason, f"left alone: {reason}")

    ctx = lab.context()
    sandbox = ctx.records.find_all()[0]
    single = destroy.run(ctx, [(sandbox, destroy.Request(force=True, recheck=refuse))])[0]
    assert (single.outcome, single.reason, single.failed, single.changed) == ("kept", reason, True, False)
    report = prune.PruneResult()
    prune.execute(ctx, [sandbox], report, allowed=refuse)
    assert [(item.outcome, item.reason, item.failed) for item in report.kept] == [("kept", reason, False)]
    assert not report.failed and not report.pruned
    assert make_failure(sandbox, Kept(reason, "left alone")).outcome == "kept"


def test_check_mode_and_the_run_call_a_protected_and_a_locked_sandbox_the_same(lab: Lab) -> None:
    made = lab.create("protected", protected=True)
    locked = lab.create("locked")
    lab.pve.vm(locked.vmid).config["lock"] = "backup"
    claimed = lab.create("claimed")
    claim = lab.context().records.claim(claimed.uuid, "stop")
    kept = [("kept", "protected", True), ("kept", "locked", True), ("kept", "busy", True)]
    try:
        # Check mode takes no claim, so that the other run's claim is met by the run alone.
        for dry_run, sandboxes in ((True, [made, locked]), (False, [made, locked, claimed])):
            ctx = lab.context(dry_run=dry_run, claim_timeout=0)
            outcomes = destroy.destroy_several(ctx, sandboxes, True)
            told = [(outcome.outcome, outcome.reason, outcome.failed) for outcome in outcomes]
            assert told == kept[: len(sandboxes)], dry_run
    finally:
        lab.context().records.release(claim)


def test_what_failed_is_not_called_kept(lab: Lab) -> None:
    sandbox = lab.context().records.find_all()[0]
    for error in (ClaimLost("lost"), TaskFailed("the task failed")):
        assert make_failure(sandbox, error).outcome == "failed"


def test_the_metrics_count_an_error_and_an_outcome_of_the_same_reason_alike() -> None:
    code = """
import importlib, json, pkgutil
import agentlab_core
from agentlab_core import reasons
from agentlab_core.context import make_failure
from agentlab_core.errors import AgentlabError, Kept
from agentlab_core.model import Sandbox
from agentlab_core.store.schema import VERSION
from agentlabd.metrics import Metrics, classify_outcome
from agentlabd.statuses import get_status

for module in pkgutil.walk_packages(agentlab_core.__path__, "agentlab_core."):
    importlib.import_module(module.name)

def descendants(kind):
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)

sandbox = Sandbox(uuid="a", vmid=1000, name="a1", state="RUNNING")
errors = {reason: Kept(reason, "left alone") for reason in reasons.KEPT}
for kind in descendants(AgentlabError):
    if kind is not Kept and kind.code not in errors:
        try:
            errors[kind.code] = kind("what happened")
        except TypeError:
            continue
rows = {}
for reason, error in errors.items():
    metrics = Metrics()
    metrics.count_refusal("destroy", error)
    counted = [sample.labels["result"] for family in metrics.operations.collect() for sample in family.samples
               if sample.name.endswith("_total") and sample.value]
    outcome = make_failure(sandbox, error)
    rows[reason] = [outcome.outcome, classify_outcome(outcome), counted, get_status(reason), reason in reasons.KEPT]
print(json.dumps(rows))
"""
    rows: dict[str, list[Any]] = in_daemon(code)
    assert len(rows) > len(reasons.KEPT) + 10, json.dumps(rows)
    refused = {"state_conflict", "guard", "frozen"}
    for reason, (outcome, result, counted, status, is_kept) in rows.items():
        assert outcome == ("kept" if is_kept else "failed"), reason
        assert result == ("kept" if is_kept or reason in refused else "failed"), reason
        # An invalid request is no operation, and counts nowhere.
        assert counted in ([result], []) and (counted or status in (400, 404)), (reason, counted, result)
        assert status == 409 or not is_kept, reason
