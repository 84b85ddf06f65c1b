# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Metrics that are read during a scrape: states of sandboxes, conditions, requests to Proxmox."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agentlab_core.store import overview

from .conditions import PARTS
from .service import Service

METHODS = ("GET", "POST", "PUT", "DELETE")
ERRORS = ("api", "access", "unreachable", "unknown", "task")


class Scrape:
    """Collect the present values from the indexes of the records, and from memory."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        # prometheus_client asks for this at registration. Values are read at the first scrape, not before.
        return []

    def collect(self) -> Iterator[Metric]:
        service = self._service
        by_state = GaugeMetricFamily("agentlab_sandboxes", "Records by state", labels=["state"])
        for state, count in overview.count_by_state(service.base.records).items():
            by_state.add_metric([state], count)
        yield by_state
        under_way, interrupted = service.base.records.list_unfinished()
        yield GaugeMetricFamily(
            "agentlab_operations_in_progress", "Operations that are under way", value=len(under_way)
        )
        database = service.base.database
        yield CounterMetricFamily(
            "agentlab_database_reconnects", "Connections to the records that were replaced", value=database.reconnects
        )
        yield CounterMetricFamily(
            "agentlab_database_retries", "Transactions of the records that were repeated", value=database.retries
        )
        leader = GaugeMetricFamily(
            "agentlab_leader", "1 when this daemon does that duty, 0 when another controller does", labels=["duty"]
        )
        for job in ("reconcile", "cleanup"):
            leader.add_metric([job], int(service.leads.get(job, database.controller is None)))
        yield leader
        takeovers = CounterMetricFamily(
            "agentlab_takeovers",
            "Claims and duties of other controllers that were taken over, because those had died",
            labels=["what"],
        )
        for duty, count in (("claim", database.takeovers), *service.takeovers.items()):
            takeovers.add_metric([duty], count)
        yield takeovers
        started = [operation.started_at for operation in (*under_way, *interrupted)]
        age = max(0, int(database.read_wall_time()) - min(started)) if started else 0
        yield GaugeMetricFamily(
            "agentlab_oldest_operation_age_seconds", "Age of the oldest operation that is not finished", value=age
        )
        yield GaugeMetricFamily(
            "agentlab_prune_frozen", "1 while cleanup is frozen", value=int(service.read_freeze() is not None)
        )
        present = service.conditions.list_present()
        condition_gauge = GaugeMetricFamily(
            "agentlab_condition", "1 while a part of the daemon rests, waits or fails", labels=["part"]
        )
        since_gauge = GaugeMetricFamily(
            "agentlab_condition_since_timestamp_seconds", "When that began; 0 while all is as usual", labels=["part"]
        )
        for part in PARTS:
            began = [condition.since or 0 for condition in present if condition.part == part]
            condition_gauge.add_metric([part], int(bool(began)))
            since_gauge.add_metric([part], min(began, default=0))
        yield condition_gauge
        yield since_gauge
        yield GaugeMetricFamily(
            "agentlab_unrecorded_vms",
            "VMs with our marker that have no record, at the last reconcile",
            value=len(service.unrecorded),
        )
        yield GaugeMetricFamily(
            "agentlab_prune_enabled", "1 when the cleanup rules run by themselves", value=int(service.policy.enabled)
        )
        statistics = service.base.client.statistics
        requests = CounterMetricFamily("agentlab_proxmox_requests", "Requests to Proxmox", labels=["method"])
        by_method: dict[str, int] = dict.fromkeys(METHODS, 0)
        for name, count in list(statistics.requests.items()):
            by_method[name.partition(" ")[0]] += count
        for method, count in by_method.items():
            requests.add_metric([method], count)
        yield requests
        errors = CounterMetricFamily("agentlab_proxmox_errors", "Requests and tasks that failed", labels=["kind"])
        for kind in ERRORS:
            errors.add_metric([kind], statistics.errors[kind])
        yield errors
