# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Count the daemon's work for Prometheus, in a registry of its own.

No label names a single VM, and all values of a label exist from the start. ``scrape`` adds values read during a scrape.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

# The creation time of each counter is useless, and would double the number of series.
os.environ.setdefault("PROMETHEUS_DISABLE_CREATED_SERIES", "true")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agentlab_core import placement, reasons
from agentlab_core.errors import AgentlabError, CreationFailed, Frozen, GuardTripped, Kept, StateConflict
from agentlab_core.maintenance.reconcile import Drift
from agentlab_core.model import Outcome
from agentlab_core.sandboxes.lease import Expiry

from . import __version__
from .statuses import get_status

COUNTED_OPERATIONS = (
    *("create", "destroy", "start", "stop", "suspend", "expire", "prune", "cleanup", "reconcile"),
    # Inside a sandbox.
    *("exec", "exec_kill", "fetch", "put"),
)
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Reason of a destroy -> kind of orphan that it removed.
_ORPHANS = {"vm_absent": "vm_absent", "vmid_reused": "vmid_reused", "destroyed": "lease_over"}
# Codes of errors by which our own rules refuse a request; reasons.KEPT has those that leave a sandbox alone.
_REFUSALS = {StateConflict.code, GuardTripped.code, Frozen.code}
_MISMATCHES = {"foreign": "FOREIGN", "vmid_reused": "FOREIGN", "ambiguous": "AMBIGUOUS"}


class Metrics:
    """Count the daemon's work."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make_counter(name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
            metric = Counter(f"agentlab_{name}", text, [label] if label else [], registry=self.registry)
            for value in values:
                metric.labels(value)
            return metric

        def make_gauge(name: str, text: str) -> Gauge:
            return Gauge(f"agentlab_{name}", text, registry=self.registry)

        self.leases = make_counter(
            "leases",
            "Leases by what became of them",
            "result",
            ("renewed", "kept_alive", "expired", "capped", "refused"),
        )
        self.prune_runs = make_counter(
            "prune_runs",
            "Runs of prune and of the cleanup rules",
            "result",
            ("ok", "failed", "guard", "frozen", "shadow"),
        )
        self.prune_items = make_counter(
            "prune_items", "Sandboxes those runs looked at", "result", ("pruned", "kept", "failed", "would_prune")
        )
        self.prune_kept = make_counter("prune_kept", "Sandboxes that were kept, by reason", "reason", reasons.KEPT)
        self.prune_candidates = make_gauge("prune_candidates", "Sandboxes that the last run wanted to destroy")
        self.prune_success = make_gauge(
            "prune_last_success_timestamp_seconds", "When a run of prune or cleanup last ended well"
        )
        self.creations = make_counter("creations", "Sandboxes that were created, by node", "node")
        self.passed_over = make_counter(
            "placement_passed_over",
            "Times that a node was passed over for a new sandbox, by reason",
            "reason",
            placement.REASONS,
        )
        self.guard_trips = make_counter("prune_guard_trips", "Runs of the cleanup rules that their guard stopped")
        self.orphans = make_counter(
            "orphans_found", "Orphans found, by kind", "kind", ("vm_absent", "vmid_reused", "lease_over", "unrecorded")
        )
        self.mismatches = make_counter(
            "identity_mismatches",
            "VMs at a sandbox's VMID that were not proven to be ours",
            "verdict",
            ("FOREIGN", "AMBIGUOUS"),
        )
        self.unknown = make_counter("unknown_absences", "Times that the absence of a VM could not be proven")
        self.operations = Counter(
            "agentlab_operations",
            "Sandboxes worked on, by operation and result",
            ["operation", "result"],
            registry=self.registry,
        )
        self.durations = Histogram(
            "agentlab_operation_duration_seconds",
            "From the request to the end of an operation; a bulk call is one",
            ["operation"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        for operation in COUNTED_OPERATIONS:
            if operation != "expire":
                self.durations.labels(operation)
            for result in ("ok", "failed", "kept"):
                self.operations.labels(operation, result)
        self.reconcile_success = make_gauge(
            "reconcile_last_success_timestamp_seconds", "When records and Proxmox were last compared"
        )
        self.expiry_success = make_gauge(
            "expiry_last_success_timestamp_seconds", "When leases that are over were last looked for"
        )
        self.reload = make_gauge(
            "config_last_reload_successful", "1 when the configuration in force is that of the files"
        )
        self.reload.set(1)
        Gauge("agentlab_build_info", "The version that runs", ["version"], registry=self.registry).labels(
            __version__
        ).set(1)
        # Orphans of the last pass that still exist, by kind, so that each is counted only once.
        self._still_there: dict[str, set[int | None]] = {}

    def render(self) -> bytes:
        return generate_latest(self.registry)

    # ---- operations ----

    def count_outcomes(self, operation: str, outcomes: Iterable[Outcome]) -> None:
        """Count the outcomes of an operation."""
        for outcome in outcomes:
            self.operations.labels(operation, classify_outcome(outcome)).inc()
            self._count_identity(outcome.reason)
            if operation == "create" and outcome.outcome == "created" and outcome.sandbox is not None:
                self.creations.labels(outcome.sandbox.node).inc()
            self._count_passed_over_nodes(outcome.extra.get("placement"))

    def _count_passed_over_nodes(self, decision: dict[str, Any] | None) -> None:
        """Count the nodes that a placement decision passed over."""
        for node in (decision or {}).get("nodes", ()):
            if not node["chosen"]:
                self.passed_over.labels(node["reason"]).inc()

    def count_refusal(self, operation: str, error: AgentlabError) -> None:
        """Count an operation that ended with an error. An invalid request does not count."""
        self._count_passed_over_nodes(error.detail.get("placement"))
        result = _classify_failure(error.reason if isinstance(error, Kept) else error.code)
        if isinstance(error, CreationFailed) and error.detail.get("option"):
            result = "kept"
        elif get_status(error.code) < 500 and get_status(error.code) != 409:
            return
        self.operations.labels(operation, result).inc()
        self._count_identity(error.reason if isinstance(error, Kept) else None)

    def count_internal_error(self, operation: str) -> None:
        """Count an operation that ended with an internal error."""
        self.operations.labels(operation, "failed").inc()

    def _count_identity(self, reason: str | None) -> None:
        """Count a VM that was not proven to be ours, or whose absence could not be proven."""
        if reason in _MISMATCHES:
            self.mismatches.labels(_MISMATCHES[reason]).inc()
        elif reason == "unknown":
            self.unknown.inc()

    # ---- leases ----

    def count_renewal(self, outcome: Outcome) -> None:
        if outcome.changed:
            self.leases.labels("capped" if outcome.extra.get("capped") else "renewed").inc()

    def count_expiry(self, expiry: Expiry) -> None:
        self.leases.labels("expired").inc(len(expiry.expired))
        self.leases.labels("kept_alive").inc(sum(not outcome.failed for outcome in expiry.renewed))
        self.count_outcomes("expire", expiry.expired)

    # ---- prune and cleanup ----

    def count_prune(
        self,
        operation: str,
        pruned: list[Outcome],
        kept: list[Outcome],
        failed: list[Outcome],
        candidates: int,
        *,
        shadow: bool = False,
    ) -> None:
        """Count a completed run of prune or of the cleanup rules."""
        self.prune_candidates.set(candidates)
        self.prune_runs.labels("shadow" if shadow else "failed" if failed else "ok").inc()
        self.prune_items.labels("would_prune" if shadow else "pruned").inc(len(pruned))
        self.prune_items.labels("kept").inc(len(kept))
        self.prune_items.labels("failed").inc(len(failed))
        for outcome in kept:
            self.prune_kept.labels(outcome.reason if outcome.reason in reasons.KEPT else "changed").inc()
        if not failed:
            self.prune_success.set(time.time())
        if not shadow:
            self.count_outcomes(operation, [*pruned, *kept, *failed])
            for outcome in pruned:
                if outcome.reason in _ORPHANS:
                    self.orphans.labels(_ORPHANS[outcome.reason]).inc()

    def count_stopped_prune(self, error: AgentlabError, *, by_rules: bool = False) -> None:
        """Count a run that did nothing or was aborted.

        ``by_rules``: a run of the cleanup rules. The limit of a single prune by a person is no alarm.
        """
        if isinstance(error, GuardTripped):
            if by_rules:
                self.guard_trips.inc()
            self.prune_candidates.set(int(error.detail.get("count") or 0))
        self.prune_runs.labels(
            "guard" if isinstance(error, GuardTripped) else "frozen" if isinstance(error, Frozen) else "failed"
        ).inc()

    # ---- reconcile ----

    def count_reconcile(self, drifts: list[Drift]) -> None:
        """Count a completed pass that has repaired what it could."""
        self.reconcile_success.set(time.time())
        self.operations.labels("reconcile", "ok").inc()
        for drift in drifts:
            self._count_identity(drift.kind)
            if drift.kind == "vmid_reused" and drift.applied:
                self.orphans.labels("vmid_reused").inc()
            elif drift.kind == "absent" and drift.applied and drift.action.startswith("noted"):
                self.orphans.labels("vm_absent").inc()
        for kind, label in (("unrecorded", "unrecorded"), ("still_running", "lease_over")):
            present = {
                drift.sandbox.vmid if drift.sandbox else drift.vmid: drift.applied
                for drift in drifts
                if drift.kind == kind
            }
            self.orphans.labels(label).inc(len(present.keys() - self._still_there.get(kind, set())))
            self._still_there[kind] = {vmid for vmid, settled in present.items() if not settled}


def classify_outcome(outcome: Outcome) -> str:
    """Return ok, failed, or kept (one of our rules left the sandbox alone)."""
    if outcome.outcome == "kept":
        return "kept"
    return _classify_failure(outcome.reason or "error") if outcome.failed else "ok"


def _classify_failure(reason: str) -> str:
    """Return kept or failed, by the reason of an outcome or the code of an error."""
    return "kept" if reason in reasons.KEPT or reason in _REFUSALS else "failed"
