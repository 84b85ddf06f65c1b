# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compare the records with Proxmox in one pass, report the drift, and repair the drift with ``apply``.

The report names each repair and its reason, and ``apply`` does these repairs. If a node is unreachable, its sandboxes
keep their records as they are. A VM without a record is reported and never adopted. If a large share of the sandboxes
is absent at once, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import states, timeguard
from ..context import Context
from ..errors import AgentlabError, DamagedRecord, GuardTripped, Kept, ProxmoxError, RecordChanged, StateConflict
from ..guest import snippets
from ..model import Sandbox
from ..proxmox import identity
from ..sandboxes import destroy, lease, leftovers, removal
from ..store import holders, overview
from ..store.journal import JournalEntry
from ..store.records import Claim
from ..vm import address, binding, power
from ..vm.locate import Located, is_hibernated, locate, read_power_state
from ..workspaces import workspace, workspace_disk

# Kinds of drift in which the VM of the record is gone.
_ABSENT = ("absent", "vmid_reused")
# The guard against mass absence ignores fewer absences than this.
_GUARD_FROM = 5
_STOPS = ("qmstop", "qmshutdown", "qmsuspend", "hastop", "stopall", "qmreboot")
_STARTS = ("qmstart", "qmresume", "hastart", "startall")
# Seconds after which the configuration of a running VM is read again.
KNOWN_SECONDS = 3600
# Seconds by which the uptime in the VM list may be wrong. The list lags by ten seconds, and by more on a busy node.
_LAG_SECONDS = 60


@dataclass(slots=True)
class Drift:
    """One difference between the records and Proxmox: its kind, the action on it, and the evidence."""

    kind: str
    action: str
    evidence: dict[str, Any]
    sandbox: Sandbox | None = None
    vmid: int | None = None
    applied: bool = False
    error: str | None = None
    repair: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def would_change(self) -> bool:
        return self.repair is not None or self.kind in ("interrupted", "lease_expired", "still_running", "workspace")

    def public(self) -> dict[str, Any]:
        sandbox = self.sandbox
        return {
            "kind": self.kind,
            "action": self.action,
            "vmid": sandbox.vmid if sandbox else self.vmid,
            "uuid": sandbox.uuid if sandbox else None,
            "state": sandbox.state if sandbox else None,
            "evidence": self.evidence,
            "applied": self.applied,
            "error": self.error,
        }


class KnownVms:
    """A cache of the VMs that earlier passes of a daemon judged to be ours, so that not every pass reads them again.

    If a VM has run without a break since it was judged, its VMID cannot have gone to another VM. An edited
    configuration goes unnoticed for at most KNOWN_SECONDS. No operation relies on this cache: each operation judges the
    VM again before it acts.
    """

    def __init__(self) -> None:
        # UUID of the sandbox -> time (seconds since boot) directly before its configuration was read.
        self._judged_at: dict[str, float] = {}

    def note(self, sandbox: Sandbox, at: float) -> None:
        """Note that a sandbox's VM was read without drift. ``at`` is the time of the reading, in seconds since boot."""
        self._judged_at[sandbox.uuid] = at

    def keep_only(self, sandboxes: list[Sandbox]) -> None:
        """Drop all other sandboxes from the cache, or it grows forever."""
        live = {sandbox.uuid for sandbox in sandboxes}
        self._judged_at = {uuid: at for uuid, at in self._judged_at.items() if uuid in live}

    def covers(self, sandbox: Sandbox, row: dict[str, Any], now: float) -> bool:
        """Return whether the VM in this row of the VM list needs no reading. ``now`` is in seconds since boot.

        The VM must run on the node and in the state of the record, and must have run since it was judged.
        """
        at = self._judged_at.get(sandbox.uuid)
        if at is None or sandbox.state not in (states.READY, states.RUNNING) or sandbox.absent_seen_at is not None:
            return False
        if (row.get("type"), row.get("status"), row.get("node")) != ("qemu", "running", sandbox.node):
            return False
        uptime, age = row.get("uptime"), now - at
        return isinstance(uptime, int) and not row.get("lock") and age < KNOWN_SECONDS and uptime > age + _LAG_SECONDS


def run(ctx: Context, *, apply: bool, adopt_cluster: bool = False, known_vms: KnownVms | None = None) -> list[Drift]:
    """Run one pass over all live records, and return the drift. ``apply``: repair the drift.

    ``adopt_cluster``: store the present cluster as the cluster of the records before. ``known_vms``: the cache of
    earlier passes; without the cache, every configuration is read.

    With ``apply``, raises GuardTripped before the first write if too many sandboxes are absent at once, and Busy while
    another controller reconciles.
    """
    if apply:
        with ctx.run_alone("reconcile"):
            return _run_pass(ctx, True, adopt_cluster, known_vms)
    return _run_pass(ctx, False, adopt_cluster, known_vms)


def _run_pass(ctx: Context, apply: bool, adopt_cluster: bool, known_vms: KnownVms | None) -> list[Drift]:
    writing = apply and not ctx.dry_run
    ctx.records.in_pass = True
    if adopt_cluster:
        ctx.cluster.adopt()
    live = ctx.records.find_all()
    before, count = {record.uuid: record.generation for record in live}, len(live)
    looks = address.Looks(ctx, live)
    if known_vms is not None:
        known_vms.keep_only(live)
    drifts, unrecorded = _survey_records(ctx, live, looks, known_vms)
    del live
    if apply:
        # Check before any write. On the wrong cluster this pass must not finish or expire anything either.
        _refuse_mass_absence(ctx, [*drifts.values(), *unrecorded], count)
    settled: list[Drift] = []
    if writing:
        settled += _finish_interrupted(ctx)
    else:
        for entry, sandbox in ctx.records.list_interrupted_sandboxes():
            if not binding.stays_unfinished(ctx, sandbox, entry):
                evidence = {"operation": entry.kind, "phase": entry.phase, "actor": entry.actor}
                settled.append(Drift("interrupted", "finish the operation", evidence, sandbox))
    settled += _expire_leases(ctx, writing)
    if writing:
        # Compare again the sandboxes that those two steps changed. The other results stay valid.
        now = overview.read_generations(ctx.records)
        changed = {uuid for uuid, generation in now.items() if before.get(uuid) != generation}
        if settled:
            # Those steps may have taken long. Compare each sandbox again before its repair.
            changed |= {uuid for uuid, drift in drifts.items() if drift.repair and uuid in now}
        again: dict[str, Drift] = {}
        if changed:
            ctx.cluster.list_vms(fresh=True)
            records = [sandbox for sandbox in ctx.records.find_all() if sandbox.uuid in changed]
            again, _more = _survey_records(ctx, records, looks, None, unrecorded=False)
        drifts = {uuid: drift for uuid, drift in drifts.items() if uuid in now and uuid not in changed} | again
        for drift in drifts.values():
            _apply_drift(drift)
        looks.store_addresses()
    settled += _finish_workspaces(ctx, writing)
    return settled + list(drifts.values()) + unrecorded


def finish_own_files(ctx: Context) -> list[Drift]:
    """Finish operations that other controllers could not finish because a snippet is on this host; return the drift.

    Another controller cannot remove a snippet file of this host. So when that controller destroys such a sandbox, gives
    up its creation or finds its VM gone, the record stays (reason ``snippet``). This pass looks at no other sandbox, so
    it may run beside the controller that reconciles.
    """
    ctx.records.in_pass = True
    waiting = overview.list_waiting_for_snippet(ctx.records, holders.read_host_name())
    if not waiting:
        return []
    drifts = _finish_interrupted(ctx, {sandbox.uuid for sandbox in waiting})
    remaining = overview.list_waiting_for_snippet(ctx.records, holders.read_host_name())
    if not remaining:
        return drifts
    differences, _unrecorded_vms = _survey_records(
        ctx, remaining, address.Looks(ctx, remaining), None, unrecorded=False
    )
    absent = [drift for drift in differences.values() if drift.kind in _ABSENT]
    _refuse_mass_absence(ctx, absent, len(ctx.records.find_all()))
    for drift in absent:
        _apply_drift(drift)
    return drifts + absent


def _refuse_mass_absence(ctx: Context, drifts: list[Drift], live: int) -> None:
    """Raise GuardTripped if more than ``absent_guard`` percent of the live sandboxes are absent at once."""
    absent = sum(drift.kind in _ABSENT for drift in drifts)
    if absent >= _GUARD_FROM and absent * 100 > ctx.config.absent_guard * live:
        raise GuardTripped(
            f"{absent} of {live} sandboxes are absent at once (absent_guard is {ctx.config.absent_guard} %); "
            "nothing was written. Check that api_host leads to the right cluster, then prune or destroy the sandboxes "
            "whose VMs are really gone",
            drift=[drift.public() for drift in drifts],
            count=len(drifts),
        )


def _finish_workspaces(ctx: Context, writing: bool) -> list[Drift]:
    """Finish or undo the operations of killed runs on workspaces, and free the workspaces of destroyed sandboxes.

    Returns the drift; without ``writing``, only the drift.
    """
    drifts = []
    for disk in workspace_disk.list_unfinished(ctx):
        drift = Drift(
            "workspace", "finish or undo the operation", {"workspace": disk.name, "state": disk.state}, vmid=disk.vmid
        )
        if writing:
            try:
                finished = workspace.finish(ctx, disk)
                drift.action, drift.applied = finished.state, finished.generation != disk.generation
            except AgentlabError as error:
                drift.error = error.message
        drifts.append(drift)
    return drifts


def _survey_records(
    ctx: Context,
    records: list[Sandbox],
    looks: address.Looks,
    known_vms: KnownVms | None,
    *,
    unrecorded: bool = True,
) -> tuple[dict[str, Drift], list[Drift]]:
    """Compare these records with Proxmox, without any write.

    Returns (drift by the sandbox's UUID, drift of VMs that have our marker but no record). Without ``unrecorded`` the
    second part is empty.
    """
    if not records and not unrecorded:
        return {}, []
    rows = ctx.cluster.survey([sandbox.vmid for sandbox in records])
    missing = [sandbox for sandbox in records if sandbox.vmid not in rows and sandbox.smbios_uuid is not None]
    proofs = ctx.cluster.prove_absent([sandbox.vmid for sandbox in missing], anew=False) if missing else {}

    def compare(sandbox: Sandbox) -> Drift | None:
        if known_vms is None:
            return _compare_sandbox(ctx, sandbox, rows, proofs, looks)
        row, now = rows.get(sandbox.vmid), ctx.clock.since_boot()
        if row is not None and not looks.has_chosen(sandbox) and known_vms.covers(sandbox, row, now):
            node = str(row.get("node"))
            return None if ctx.cluster.is_node_online(node) else Drift("node_offline", "none", {"node": node}, sandbox)
        drift = _compare_sandbox(ctx, sandbox, rows, proofs, looks)
        if drift is None and sandbox.smbios_uuid is not None:
            known_vms.note(sandbox, now)
        return drift

    compared = ctx.run_each(compare, records)
    drifts = {sandbox.uuid: drift for sandbox, drift in zip(records, compared, strict=True) if drift is not None}
    if not unrecorded:
        return drifts, []
    # A reused VMID may hold another VM of ours: after a restore of the records, that VM is newer than they are.
    reused = {
        uuid
        for uuid, drift in drifts.items()
        if drift.kind == "vmid_reused" and drift.evidence.get("marker") == "other"
    }
    return drifts, _find_unrecorded(ctx, rows, [sandbox for sandbox in records if sandbox.uuid not in reused])


def _apply_drift(drift: Drift) -> None:
    """Do the repair of a drift, and note in the drift whether the repair succeeded."""
    if drift.repair is None:
        return
    try:
        drift.repair()
        drift.applied = True
    except AgentlabError as error:
        drift.error = error.message


def _expire_leases(ctx: Context, apply: bool) -> list[Drift]:
    """Return the drift of expired leases; ``apply``: expire them. A running daemon also expires leases by itself."""
    if not apply:
        pause_reason = timeguard.explain_pause(ctx)
        if pause_reason:
            return []
        now = ctx.clock.now()
        over = overview.list_expired(ctx.records, now)
        drifts = [
            Drift(
                "lease_expired",
                "renew (keepalive)" if lease.is_kept_alive(ctx, sandbox, now) else "expire",
                {"lease_expires_at": sandbox.public()["lease_expires_at"]},
                sandbox,
            )
            for sandbox in over
        ]
        return drifts + [Drift("still_running", "stop", {}, sandbox) for sandbox in lease.find_leftovers(ctx)]
    passed = lease.expire(ctx)
    drifts = [
        Drift(
            "lease_expired",
            "expired",
            _add_note({"previous_state": outcome.previous_state}, outcome.message),
            outcome.sandbox,
            applied=True,
            error=_explain_failure(outcome.message),
        )
        for outcome in passed.expired
    ]
    drifts += [
        Drift(
            "lease_expired",
            "renewed (keepalive)",
            {},
            outcome.sandbox,
            applied=not outcome.failed,
            error=outcome.message,
        )
        for outcome in passed.renewed
    ]
    if timeguard.hold_leases(ctx):
        # After a restore of the records, leases are over by the older copy. They may have been renewed since that copy.
        return drifts
    known = {outcome.uuid for outcome in passed.expired if outcome.uuid}
    drifts += [
        Drift(
            "still_running",
            "stop",
            _add_note({}, problem),
            sandbox,
            applied=_explain_failure(problem) is None and problem != lease.UNDER_WAY,
            error=_explain_failure(problem),
        )
        for sandbox, problem in lease.stop_leftovers(ctx, known)
    ]
    return drifts


def _explain_failure(problem: str | None) -> str | None:
    """Return the problem if the VM could not be stopped. None if there is no VM of ours, or another run stops it."""
    return None if problem in (lease.NO_VM, lease.ANOTHER_VM, lease.UNDER_WAY) else problem


def _add_note(evidence: dict[str, Any], problem: str | None) -> dict[str, Any]:
    """Return the evidence, with a problem that is no failure (see _explain_failure) as ``note``."""
    return {**evidence, "note": problem} if problem is not None and _explain_failure(problem) is None else evidence


def _finish_interrupted(ctx: Context, only: set[str] | None = None) -> list[Drift]:
    """Finish the operations of killed runs, and return them as drift. ``only``: UUIDs of the sandboxes; None: all.

    A destroy continues. A creation becomes FAILED, and its VM is bound if the VM is ours. For other operations the
    journal entry is closed, and the pass compares the sandbox.
    """
    drifts = []
    overview.drop_dead_claims(ctx.records)
    for entry, sandbox in ctx.records.list_interrupted_sandboxes():
        if only is not None and sandbox.uuid not in only:
            continue
        drift = Drift("interrupted", "", {"operation": entry.kind, "phase": entry.phase, "actor": entry.actor}, sandbox)
        try:
            if entry.kind == "destroy" and sandbox.live:
                _finish_destroy(ctx, entry, sandbox, drift)
            elif binding.stays_unfinished(ctx, sandbox, entry):
                continue
            elif entry.kind == "create" and sandbox.state in states.CREATING:
                drift.action = "creation given up: FAILED"
                give_up_creation(ctx, sandbox)
                drift.applied = True
            else:
                drift.action = "journal closed"
                with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
                    if entry.kind == "create":
                        current = _finish_creation(ctx, claim, current, drift)
                    elif entry.kind == "start":
                        current = _finish_start(ctx, claim, current, drift)
                    ctx.records.change(
                        claim, current, entry.kind, outcome="interrupted", reason=entry.phase, finish=True
                    )
                drift.applied = True
        except AgentlabError as error:
            drift.error = error.message
        drifts.append(drift)
    return drifts


def _finish_destroy(ctx: Context, entry: JournalEntry, sandbox: Sandbox, drift: Drift) -> None:
    """Continue a destroy. Give it up if the present rules refuse it and its delete was not decided yet."""
    drift.action = "destroy finished"
    request = destroy.Request(
        operation=entry.destroy.operation,
        force=entry.destroy.force,
        claim_wait=0,
        clean_up=entry.destroy.operation == "clean-up",
    )
    if not entry.is_sent_delete:
        # The delete was not decided yet, so no delete can be under way. Check the request by the present rules.
        try:
            _refuse_chosen(ctx, entry)
            if not destroy.check(ctx, sandbox, request.force):
                return
        except (Kept, StateConflict) as refused:
            drift.action = f"destroy given up: {refused.message}"
            with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
                # Only the creation's journal entry identifies an unbound VM, and a later destroy needs that entry.
                creation = entry.creation if current.smbios_uuid is None else None
                ctx.records.change(
                    claim, current, "destroy", outcome="interrupted", reason=entry.phase, finish=creation is None
                )
                if creation is not None:
                    ctx.records.write_journal(claim, "create", creation.phase, creation.format_detail_put_back())
            drift.applied = True
            return
    outcome = destroy.run(ctx, [(sandbox, request)])[0]
    drift.sandbox = outcome.sandbox or sandbox
    drift.applied, drift.error = not outcome.failed, outcome.message if outcome.failed else None


def _finish_creation(ctx: Context, claim: Claim, sandbox: Sandbox, drift: Drift) -> Sandbox:
    """Set a READY sandbox to RUNNING, and return the record. Its VM was started; only this last step was missing."""
    if sandbox.state != states.READY:
        return sandbox
    drift.action = "creation finished"
    return ctx.records.change(claim, sandbox, "create", to=states.RUNNING, reason="ready")


def _finish_start(ctx: Context, claim: Claim, sandbox: Sandbox, drift: Drift) -> Sandbox:
    """Set a sandbox to RUNNING if its VM runs although the answer to its start was lost. Returns the record.

    Only the lease of a RUNNING sandbox stops a running VM.
    """
    if sandbox.state not in (states.STOPPED, states.SUSPENDED) or sandbox.smbios_uuid is None:
        return sandbox
    located = locate(ctx, sandbox)
    # The status request names only the VMID. So the VM must be ours both before and after the request.
    if not (located.match and power.is_running(ctx, located) and locate(ctx, sandbox).match):
        return sandbox
    drift.action = "start finished"
    return ctx.records.change(claim, sandbox, "start", to=states.RUNNING, reason="started", ip_seen_at=None)


def _refuse_chosen(ctx: Context, entry: JournalEntry) -> None:
    """Raise Kept if a cleanup rule or a prune chose this destroy, whose delete is not decided yet.

    Since then the rules may have been changed or frozen, or the clock may have jumped.
    """
    if entry.destroy.operation == "cleanup":
        raise Kept("rule", "a cleanup rule had chosen the sandbox; the next run of the rules decides again")
    if entry.destroy.operation == "prune" and (pause_reason := timeguard.explain_pause(ctx)):
        raise Kept("clock_jumped", pause_reason)


def give_up_creation(ctx: Context, sandbox: Sandbox, evidence: dict[str, Any] | None = None) -> Sandbox:
    """Set a creation that no run works on to FAILED, bind its VM if the VM is ours, and return the record.

    ``evidence`` is stored in the event. Raises Busy while a run works on the sandbox, and Kept if its state changed.
    """
    with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
        if current.state != sandbox.state:
            raise Kept("changed", f"sandbox {sandbox.vmid} was {sandbox.state} and is {current.state} now; run again")
        unfinished = claim.interrupted
        created = unfinished.creation if unfinished else None
        bound = current.smbios_uuid is not None or removal.was_never_cloned(current, created)
        if not bound:
            bound = binding.locate_unbound(ctx, current, claim, created).match
            current = ctx.records.get(current.uuid)
            bound = bound or (unfinished is not None and binding.has_left_nothing(ctx, current, unfinished))
        snippets.remove(ctx, current)
        # Keep the journal entry if the VM is not bound: only that entry tells a later destroy which VM is ours.
        return ctx.records.change(
            claim,
            current,
            "create",
            to=states.FAILED,
            outcome="failed",
            reason="creation_interrupted",
            evidence=evidence,
            finish=bound,
        )


def _compare_sandbox(
    ctx: Context, sandbox: Sandbox, rows: dict[int, dict[str, Any]], proofs: dict[int, Any], looks: address.Looks
) -> Drift | None:
    """Return the drift of one sandbox, or None. ``rows`` is the VM list, ``proofs`` the absences, both by VMID."""
    if sandbox.smbios_uuid is None:
        return _find_stale_creation(ctx, sandbox)
    row = rows.get(sandbox.vmid)
    if row is None:
        proof = proofs.get(sandbox.vmid)
        if proof is None or not proof.absent:
            return Drift("unknown", "none", {"why": proof.why if proof else "not in the list"}, sandbox)
        return _find_absence_drift(ctx, sandbox, "absent", proof.evidence)
    node = str(row.get("node"))
    if not ctx.cluster.is_node_online(node):
        return Drift("node_offline", "none", {"node": node}, sandbox)
    try:
        located = locate(ctx, sandbox)
    except Kept as error:
        return Drift(error.reason, "none", {"why": error.message}, sandbox)
    except ProxmoxError as error:
        return Drift("unknown", "none", {"why": error.message}, sandbox)
    if located.verdict is None:
        return Drift("unknown", "none", {"why": "the VM vanished from the list while it was read"}, sandbox)
    if located.verdict.identity == identity.FOREIGN:
        return _find_absence_drift(ctx, sandbox, "vmid_reused", located.verdict.evidence)
    if located.verdict.identity == identity.UNKNOWN:
        return Drift("locked", "none", located.verdict.evidence, sandbox)
    if not located.match:
        return Drift("ambiguous", "none", located.verdict.evidence, sandbox)
    try:
        drift = _find_power_drift(ctx, sandbox, located)
    except ProxmoxError as error:
        # Since the list was read, the VM may have vanished, or its node may have stopped answering. Report this sandbox
        # as unknown, and continue with the others.
        return Drift("unknown", "none", {"why": error.message}, sandbox)
    if drift is not None:
        try:
            ctx.cluster.require_quorum()
        except Kept as error:
            # Without quorum this node's copy of the configuration may be old: the VM may have been started on the other
            # side of a network partition.
            return Drift("unknown", "none", {**drift.evidence, "why": error.message}, sandbox)
        return drift
    return _find_address_drift(ctx, sandbox, looks.look_up(sandbox, located))


def _find_address_drift(ctx: Context, sandbox: Sandbox, ip: str | None) -> Drift | None:
    """Return the drift if the guest reports another address than the record has, else None."""
    if ip is None or sandbox.ip in (None, ip):
        # Looks.remember stores a first address, so a first address is no drift.
        return None
    return Drift(
        "address",
        f"address updated to {ip}",
        {"ip": ip, "was": sandbox.ip},
        sandbox,
        repair=_make_amendment(ctx, sandbox, ip=ip, ip_seen_at=ctx.clock.now()),
    )


def _find_absence_drift(ctx: Context, sandbox: Sandbox, kind: str, evidence: dict[str, Any]) -> Drift:
    """Return the drift of a VM that is gone. ``kind``: ``absent``, or ``vmid_reused`` if another VM has the VMID.

    An absence is only noted in the first pass. The second pass in a row sets the sandbox to DESTROYED. A reused VMID
    does so at once.
    """
    if kind == "absent" and sandbox.absent_seen_at is None:
        return Drift(
            kind,
            "noted; DESTROYED if it is absent in the next pass too",
            evidence,
            sandbox,
            repair=_make_amendment(ctx, sandbox, absent_seen_at=ctx.clock.now()),
        )

    def mark() -> None:
        ctx.cluster.require_quorum()
        ctx.cluster.confirm()
        with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
            if (current.state, current.generation) != (sandbox.state, sandbox.generation):
                raise RecordChanged(f"sandbox {sandbox.vmid} was changed by another run meanwhile; run again")
            try:
                leftovers.clear(ctx, claim, current)
            except Kept as kept:
                # The controller on the snippet's host reads this event (finish_own_files).
                ctx.records.note(current, "reconcile", outcome="kept", reason=kept.reason)
                raise
            current = ctx.records.get(current.uuid)
            reason = "external" if kind == "absent" else "vmid_reused"
            ctx.records.change(
                claim, current, "reconcile", to=states.DESTROYED, reason=reason, evidence=evidence, finish=True
            )

    return Drift(kind, "DESTROYED", evidence, sandbox, repair=mark)


def _find_power_drift(ctx: Context, sandbox: Sandbox, located: Located) -> Drift | None:
    """Return the drift of a VM that is ours: in its power state, its node, or a noted absence; None without drift."""
    evidence: dict[str, Any] = {"node": located.node, "vm_status": located.row.get("status")}
    vm_state = _read_vm_state(ctx, sandbox, located)
    if vm_state is not None:
        evidence["vm_status"] = "hibernated" if is_hibernated(located.config) else vm_state.lower()
    if sandbox.state in states.POWERED and vm_state == states.STOPPED:
        explained = _find_stop_task(ctx, sandbox, str(located.node))
        evidence.update(stop_task=explained)
        target = states.STOPPED
        if not explained:
            hidden = _explain_hidden_tasks(ctx, str(located.node))
            # FAILED means that nobody stopped the VM. If tasks may be hidden, only "stopped" is certain.
            target = states.STOPPED if hidden else states.FAILED
            if hidden:
                evidence["why"] = hidden
        return Drift(
            "stopped", target, evidence, sandbox, repair=_make_move(ctx, sandbox, target, evidence, node=located.node)
        )
    if vm_state == states.STOPPED and sandbox.state == states.SUSPENDED:
        return Drift("stopped", vm_state, evidence, sandbox, repair=_make_follow(ctx, sandbox, vm_state, located))
    if vm_state == states.SUSPENDED and sandbox.state in (*states.POWERED, states.STOPPED):
        return Drift("suspended", vm_state, evidence, sandbox, repair=_make_follow(ctx, sandbox, vm_state, located))
    if vm_state == states.RUNNING and sandbox.state == states.SUSPENDED:
        return Drift("running", vm_state, evidence, sandbox, repair=_make_follow(ctx, sandbox, vm_state, located))
    if located.node != sandbox.node:
        evidence["was"] = sandbox.node
        return Drift(
            "moved",
            f"node updated to {located.node}",
            evidence,
            sandbox,
            repair=_make_amendment(ctx, sandbox, node=located.node),
        )
    if sandbox.absent_seen_at is not None:
        return Drift(
            "back", "absence note removed", evidence, sandbox, repair=_make_amendment(ctx, sandbox, absent_seen_at=None)
        )
    if sandbox.state == states.STOPPED and vm_state == states.RUNNING:
        return Drift(
            "running",
            "none: somebody started the VM, and no lease ends it; start the sandbox, then stop it or renew its lease",
            evidence,
            sandbox,
        )
    return None


def _read_vm_state(ctx: Context, sandbox: Sandbox, located: Located) -> str | None:
    """Return the power state that the VM itself reports, if the VM list disagrees with the record.

    The list lags, so a disagreement is checked at the VM. Returns None if list and record agree, or if the record's
    state says nothing about power.
    """
    listed = located.row.get("status")
    agrees = {states.READY: "running", states.RUNNING: "running", states.STOPPED: "stopped"}
    if sandbox.state not in (*agrees, states.SUSPENDED):
        return None
    if listed == agrees.get(sandbox.state) and not is_hibernated(located.config):
        return None
    if sandbox.state == states.SUSPENDED and listed == "stopped" and is_hibernated(located.config):
        return None
    try:
        return read_power_state(sandbox, power.read_status(ctx, located), located.config)
    except Kept:
        return None


def _make_follow(ctx: Context, sandbox: Sandbox, vm_state: str, located: Located) -> Callable[[], None]:
    """Return the repair that sets the record to the power state of the VM."""

    def work() -> None:
        with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
            if (current.state, current.generation) != (sandbox.state, sandbox.generation):
                raise RecordChanged(f"sandbox {sandbox.vmid} was changed by another run meanwhile; run again")
            power.follow_vm(ctx, claim, current, "reconcile", vm_state, located)

    return work


def _make_amendment(ctx: Context, sandbox: Sandbox, **values: Any) -> Callable[[], None]:
    """Return the repair that sets these values of the record, without a change of state."""

    def work() -> None:
        ctx.records.amend(sandbox, "reconcile", **values)

    return work


def _make_move(
    ctx: Context, sandbox: Sandbox, target: str, evidence: dict[str, Any], **values: Any
) -> Callable[[], None]:
    """Return the repair that moves the sandbox to the state ``target``, and sets these values of the record."""

    def work() -> None:
        with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
            if (current.state, current.generation) != (sandbox.state, sandbox.generation):
                raise RecordChanged(f"sandbox {sandbox.vmid} was changed by another run meanwhile; run again")
            ctx.records.change(
                claim, current, "reconcile", to=target, reason="external", evidence=evidence, finish=True, **values
            )

    return work


def _find_stop_task(ctx: Context, sandbox: Sandbox, node: str) -> str | None:
    """Return the id of the task that stopped the VM, or None.

    The newest start or stop task since the sandbox entered its state decides. Only a stop explains a stopped VM.
    """
    for row in ctx.client.get_list(
        f"nodes/{node}/tasks",
        vmid=sandbox.vmid,
        source="all",
        limit=50,
        since=max(0, (sandbox.state_changed_at or 0) - 60),
    ):
        if row.get("type") in (*_STOPS, *_STARTS) and str(row.get("status") or "").startswith(("OK", "WARNINGS")):
            # A stop before the last start explains nothing. That task may even belong to an earlier VM with this VMID.
            return str(row.get("upid")) if row.get("type") in _STOPS else None
    return None


def _explain_hidden_tasks(ctx: Context, node: str) -> str | None:
    """Return why Proxmox may hide tasks of other users on this node; None if these credentials see all tasks.

    If tasks may be hidden, a missing stop task proves nothing.
    """
    path = f"/nodes/{node}"
    try:
        if ctx.cluster.has_privilege(path, "Sys.Audit"):
            return None
    except ProxmoxError as error:
        return f"whether these credentials may see the tasks of others is not known: {error.message}"
    return f"these credentials see only their own tasks; grant Sys.Audit on {path} to tell a stop from a crash"


def _find_stale_creation(ctx: Context, sandbox: Sandbox) -> Drift | None:
    """Return the drift of a creation that no run works on and that has no journal entry. Its repair sets FAILED."""
    if sandbox.state not in states.CREATING:
        return None
    if ctx.records.is_worked_on(sandbox.uuid):
        return None
    evidence = {"why": "no creation is under way"}
    return Drift("stale", states.FAILED, evidence, sandbox, repair=_make_move(ctx, sandbox, states.FAILED, evidence))


def _find_unrecorded(ctx: Context, rows: dict[int, dict[str, Any]], live: list[Sandbox]) -> list[Drift]:
    """Return the drift of VMs that have our marker but no live record. Such VMs are never adopted.

    A VM of another database is no drift outside our own vmid_range.
    """
    database = ctx.records.read_database_id()
    known = {sandbox.vmid for sandbox in live}
    suspects = [
        (vmid, row)
        for vmid, row in sorted(rows.items())
        if vmid not in known
        and row.get("type") == "qemu"
        and ("agentlab" in str(row.get("tags") or "").replace(",", ";").split(";") or _is_in_range(ctx, vmid))
    ]

    def look(suspect: tuple[int, dict[str, Any]]) -> Drift | None:
        vmid, row = suspect
        try:
            config = ctx.client.get_dict(f"nodes/{row.get('node')}/qemu/{vmid}/config")
        except ProxmoxError:
            return None
        marks = identity.read_markers(config)
        other_databases = identity.read_other_databases(config, database)
        if other_databases and not _is_in_range(ctx, vmid):
            # The other database has the VM's record. Inside our own range, report the VM: our records may be lost.
            return None
        try:
            now = ctx.records.find_live_by_vmid(vmid)
        except DamagedRecord:
            # The VM has a record. Other code reports the damage of that record.
            return None
        if not marks or (now is not None and now.uuid in marks):
            # A VM without a marker is not ours. A VM with a record now was created after the records were read.
            return None
        return Drift(
            "unrecorded",
            "none: another database made this VM, inside our vmid_range; give each database a range of its own. Only "
            "if that database is lost, look at the VM, and remove it by hand if nobody needs it"
            if other_databases
            else "none: look at the VM, and remove it by hand if nobody needs it",
            {
                "node": row.get("node"),
                "name": row.get("name"),
                "markers": sorted(marks),
                "databases": sorted(other_databases),
            },
            vmid=vmid,
        )

    return [drift for drift in ctx.run_each(look, suspects) if drift is not None]


def _is_in_range(ctx: Context, vmid: int) -> bool:
    first, last = ctx.config.vmid_range
    return first <= vmid <= last
