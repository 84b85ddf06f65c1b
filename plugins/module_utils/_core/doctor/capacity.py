# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the placement: the load of each node, and whether a node has room for a new sandbox."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CreationFailed, InvalidInput
from ..nodes import AUTO
from ..placement import Decision
from ..sandboxes import place
from ..sandboxes.spec import Spec
from .examination import Examination
from .findings import OK, PROBLEM, WARNING, Finding


def check_placement(exam: Examination) -> Iterable[Finding]:
    """Choose a node for a sandbox of the configured template. Yield nothing if the configuration fixes the node."""
    chosen = exam.config.node == AUTO or (exam.config.node is None and len(exam.nodes) > 1)
    if not chosen or exam.template is None:
        return
    try:
        decision = place.NodeChoice(
            exam.context, Spec(template=exam.config.template or str(exam.template[0]))
        ).preview_decision()
    except (CreationFailed, InvalidInput) as error:
        yield Finding("placement", PROBLEM, error.message, "correct what the message names")
        return
    facts = decision.public()
    if decision.node is None:
        yield Finding(
            "placement",
            PROBLEM,
            f"no node can take a new sandbox: {decision.explain_none()}",
            "free room on a node, or change the rules (placement in the configuration)",
            facts,
        )
        return
    bare = [verdict.node for verdict in decision.verdicts if verdict.free is None and verdict.reason != "offline"]
    if bare:
        yield Finding(
            "placement",
            WARNING,
            f"{', '.join(bare)} show no figures to {exam.config.proxmox.login}, so a node is chosen by the number of "
            f"its sandboxes. {_describe_load(decision)}",
            "grant Sys.Audit on /nodes to compare free memory",
            facts,
        )
        return
    yield Finding(
        "placement", OK, f"the next sandbox would go to {decision.node}. {_describe_load(decision)}", None, facts
    )


def _describe_load(decision: Decision) -> str:
    """Return the load of each node, in one sentence."""
    rows = []
    for verdict in decision.public()["nodes"]:
        memory = "" if verdict["free_memory"] is None else f", {verdict['free_memory']} MiB free"
        rows.append(f"{verdict['node']}: {verdict['sandboxes']} sandboxes{memory}")
    return "; ".join(rows)
