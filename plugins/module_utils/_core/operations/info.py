# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Showing sandboxes: from the records alone, or verified against Proxmox."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import clock as clock_module
from .. import states
from ..errors import AgentlabError, NotFound
from ..model import Sandbox
from ..proxmox import identity
from .context import Context
from .verify import locate


@dataclass(slots=True)
class Wanted:
    """Which sandboxes to show; a filter that is not given passes all (an empty list of ids passes none)."""

    ids: list[dict[str, Any]] | None = None
    states: Sequence[str] | None = None
    profile: str | None = None
    tags: Sequence[str] = ()
    expired: bool | None = None
    include_destroyed: bool = False


def find(ctx: Context, wanted: Wanted) -> list[Sandbox]:
    """The sandboxes, in the order of their VMIDs."""
    destroyed = wanted.include_destroyed or states.DESTROYED in (wanted.states or ())
    if wanted.ids is not None:
        found = []
        for which in wanted.ids:
            try:
                one = ctx.select(**which)
            except NotFound:
                continue
            if one.live or destroyed:
                found.append(one)
    else:
        found = ctx.records.find_all(wanted.states, include_destroyed=destroyed)
    now = ctx.clock.now()
    return [one for one in found
            if (wanted.states is None or one.state in wanted.states)
            and (wanted.profile is None or one.profile == wanted.profile)
            and (not wanted.tags or set(wanted.tags) & set(one.tags))
            and (wanted.expired is None or one.expired(now) == wanted.expired)]


def show(ctx: Context, wanted: Wanted, *, events: int = 0, verify: bool = False) -> dict[str, Any]:
    """``sandboxes``, ``count`` and ``by_state``."""
    found = find(ctx, wanted)
    shown = [one.public() for one in found]
    if events > 0:
        for one, answer in zip(found, shown, strict=True):
            answer["events"] = [event(row) for row in ctx.records.events(uuid=one.uuid, tail=events)]
    if verify and found:
        for answer, extra in zip(shown, verified(ctx, found), strict=True):
            answer.update(extra)
    return {"sandboxes": shown, "count": len(shown), "by_state": dict(Counter(one.state for one in found))}


def event(row: dict[str, Any]) -> dict[str, Any]:
    """An event as answers show it: time in UTC."""
    return {**row, "at": clock_module.iso(row["at"])}


def verified(ctx: Context, found: list[Sandbox]) -> list[dict[str, Any]]:
    """For each: vm_status, identity and drift. The list is read once; a VM's configuration only where there is a VM."""
    rows = ctx.cluster.survey([one.vmid for one in found if one.live])
    absent = [one.vmid for one in found if one.live and one.vmid not in rows]
    proofs = ctx.cluster.prove_absent(absent, anew=False) if absent else {}

    def one(sandbox: Sandbox) -> dict[str, Any]:
        row = rows.get(sandbox.vmid)
        if not sandbox.live:
            return {"vm_status": None, "identity": None, "drift": None}
        if row is None:
            proof = proofs[sandbox.vmid]
            if proof.absent:
                return {"vm_status": "absent", "identity": None, "drift": "its VM is gone; prune or reconcile closes the record"}
            return {"vm_status": None, "identity": identity.UNKNOWN, "drift": f"not known: {proof.why}"}
        try:
            located = locate(ctx, sandbox)
        except AgentlabError as error:
            return {"vm_status": row.get("status"), "identity": identity.UNKNOWN, "drift": f"not known: {error.message}"}
        judged = located.verdict.identity if located.verdict else identity.UNKNOWN
        return {"vm_status": row.get("status"), "identity": judged, "drift": _drift(sandbox, row, judged)}

    return ctx.each(one, found)


def _drift(sandbox: Sandbox, row: dict[str, Any], judged: str) -> str | None:
    if judged == identity.FOREIGN:
        return "the VMID belongs to another VM now; prune or reconcile closes the record and leaves that VM alone"
    if judged != identity.MATCH:
        return f"it is not certain that the VM is ours ({judged}); it is left alone"
    if sandbox.state in states.POWERED and row.get("status") == "stopped":
        return f"the record says {sandbox.state}, the VM is stopped; reconcile corrects the record"
    if sandbox.state in (states.STOPPED, states.TIMEOUT) and row.get("status") == "running":
        return f"the record says {sandbox.state}, the VM is running"
    if row.get("node") != sandbox.node:
        return f"the VM moved from {sandbox.node} to {row.get('node')}; reconcile corrects the record"
    return None
