# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Collect what is held, waiting or failing at the moment, as one list for status, log and metrics.

Each condition is collected again from the daemon's own data, without a request to Proxmox VE. Only the beginning of
each condition is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agentlab_core import clock as clock_module
from agentlab_core import timeguard
from agentlab_core.errors import AgentlabError
from agentlab_core.store import overview

from .logs import log

RESTS, WAITS, FAILS = "rests", "waits", "fails"
# Parts that can have a condition. They are label values of the metric, so all exist from the start.
PARTS = (
    "expiry",
    "reconcile",
    "cleanup",
    "proxmox",
    "token",
    "records",
    "damage",
    "clock",
    "restore",
    "unrecorded",
    "sandboxes",
    "operations",
    "configuration",
    "socket",
)
# Seconds of waiting before a wait is reported.
WAIT_SECONDS = 5.0
_JOB_SECONDS = 60.0
# The next reconcile resumes an interrupted operation. After this many seconds a person has to remove the cause.
_INTERRUPTED_SECONDS = 3600
# Sandboxes with a problem that are named in one condition.
_MOST_NAMED = 3


@dataclass(slots=True)
class Condition:
    """A part of the daemon that does not do its work.

    ``condition`` is RESTS, WAITS or FAILS. ``todo`` is what a person can do. ``since`` is in seconds since the epoch.
    """

    part: str
    condition: str
    why: str
    todo: str
    since: int | None = None

    def public(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "condition": self.condition,
            "since": clock_module.format_utc(self.since),
            "why": self.why,
            "todo": self.todo,
        }


class Conditions:
    """Collect the conditions, remember when each began, and log the beginning and end of each once."""

    def __init__(self, service: Any) -> None:
        # The Service that owns this object.
        self._service = service
        # Set by the event loop after its last look at the socket's file.
        self.socket_problem: str | None = None
        self._since: dict[tuple[str, str], int] = {}
        self._logged: dict[str, str] = {}

    def list_present(self) -> list[Condition]:
        """Return all present conditions, each with its beginning."""
        conditions = list(self._collect())
        keys = {(condition.part, condition.condition) for condition in conditions}
        for key in set(self._since) - keys:
            self._since.pop(key, None)
        for condition in conditions:
            known = self._since.setdefault((condition.part, condition.condition), condition.since or int(time.time()))
            condition.since = condition.since or known
        return conditions

    def log_changes(self) -> None:
        """Log the conditions that began or ended since the last call."""
        first_by_part: dict[str, Condition] = {}
        for condition in self.list_present():
            first_by_part.setdefault(condition.part, condition)
        for part, condition in first_by_part.items():
            if self._logged.get(part) != condition.condition:
                # The scheduler logs failures of jobs itself.
                if part not in ("reconcile", "cleanup", "configuration"):
                    log.warning("%s %s: %s. %s", part, condition.condition, condition.why, condition.todo)
                self._logged[part] = condition.condition
        for part in set(self._logged) - set(first_by_part):
            del self._logged[part]
            log.info("%s: as usual again", part)

    # ---- collecting ----

    def _collect(self) -> Iterator[Condition]:
        """Yield the present conditions, without the beginnings that only this object remembers."""
        try:
            yield from self._check_records()
        except AgentlabError as error:
            yield Condition("records", FAILS, error.message, "the message says what to look at; run agentlab doctor")
        yield from self._check_jobs()
        yield from self._check_proxmox()
        service = self._service
        if service.config_error:
            yield Condition(
                "configuration",
                FAILS,
                f"it could not be reloaded, the one before it is in force: {service.config_error}",
                "correct the file, then systemctl reload agentlabd",
            )
        if self.socket_problem:
            yield Condition("socket", FAILS, self.socket_problem, "the message says what to do")

    def _check_records(self) -> Iterator[Condition]:
        service = self._service
        database = service.base.database
        replaced = database.explain_replacement()
        if replaced:
            yield Condition(
                "records",
                FAILS,
                replaced,
                "systemctl stop agentlabd; mend what the message says; systemctl start agentlabd",
            )
            return
        waits = database.waits_since
        if waits is not None and time.monotonic() - waits > WAIT_SECONDS:
            began = int(time.time() - (time.monotonic() - waits))
            yield Condition(
                "records",
                WAITS,
                f"a write waits for the records, which another process has locked ({database.name_locker()})",
                "end that process (on PostgreSQL: SELECT pg_terminate_backend(PID)), or wait until it has done",
                began,
            )
            # The other reads would wait as well.
            return
        damaged = service.find_damage()
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            yield Condition("damage", FAILS, damaged[0] + more, "run agentlab doctor, which says how to mend it")
        frozen = service.read_freeze()
        if frozen and frozen["leases"]:
            yield Condition(
                "restore",
                RESTS,
                f"{frozen['reason']}; no lease ends and nothing is cleaned up",
                "look at agentlab sandbox reconcile and list, renew what is still needed, then agentlab cleanup "
                "release",
                _parse_time(frozen["at"]),
            )
        elif frozen:
            yield Condition(
                "cleanup",
                RESTS,
                f"cleanup is frozen by {frozen['actor'] or 'somebody'}: {frozen['reason']}",
                "look at agentlab cleanup run --dry-run, then agentlab cleanup release",
                _parse_time(frozen["at"]),
            )
        seconds_ahead = database.read_clock_difference()
        if abs(seconds_ahead) > timeguard.JUMP_SECONDS:
            yield Condition(
                "clock",
                FAILS,
                f"the clock of this host is {abs(int(seconds_ahead))} seconds "
                f"{'ahead of' if seconds_ahead > 0 else 'behind'} that of the database server, by which leases end",
                "set the clock of this host (timedatectl), or that of the server",
            )
        until = timeguard.find_pause_end(service.base)
        if until is not None:
            yield Condition(
                "clock",
                RESTS,
                f"the wall clock jumped, or its note was lost; expiry and cleanup rest until "
                f"{clock_module.format_utc(until)}",
                "look at the clock (timedatectl); they go on by themselves (clock_jump_pause)",
                until - service.config.clock_jump_pause,
            )
        stuck = [
            operation
            for operation in service.base.records.list_interrupted()
            if operation.updated_at < service.base.clock.now() - _INTERRUPTED_SECONDS
        ]
        if stuck:
            yield Condition(
                "operations",
                WAITS,
                f"{len(stuck)} operation(s) were cut off and could not be finished since; the oldest: {stuck[0].kind} "
                f"by {stuck[0].actor}",
                "run agentlab doctor, which names them and what ends them",
                min(operation.updated_at for operation in stuck),
            )
        unrecorded = service.unrecorded
        if unrecorded:
            some = ", ".join(f"{vm['vmid']} ({vm['name']} on {vm['node']})" for vm in unrecorded[:5]) + (
                ", ..." if len(unrecorded) > 5 else ""
            )
            yield Condition(
                "unrecorded",
                FAILS,
                f"{len(unrecorded)} VM(s) carry our marker and have no record here, so no lease ends them: {some}",
                "after a restore: they were created since the copy; look at each, and remove by hand what nobody "
                "needs (qm destroy)",
            )
        yield from self._check_sandboxes()

    def _check_sandboxes(self) -> Iterator[Condition]:
        service = self._service
        service.problems.forget_met_before("expiry", service.read_last_pass)
        problems = service.problems.list_lasting(lambda: overview.read_generations(service.base.records))
        if problems:
            some = "; ".join(f"{problem.what} ({job}): {problem.why}" for job, problem in problems[:_MOST_NAMED])
            more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
            yield Condition(
                "sandboxes",
                FAILS,
                f"something could not be done for {len(problems)} of them: {some}{more}",
                "each message says what to look at; agentlab sandbox reconcile tells all. It is tried again by itself",
                problems[0][1].since,
            )

    def _check_jobs(self) -> Iterator[Condition]:
        for name, job in self._service.jobs.items():
            if job.last_error:
                yield Condition(
                    name,
                    FAILS,
                    job.last_error,
                    "the message says what to look at; it is tried again by itself",
                    job.failing_since,
                )
            elif job.running_since is not None and time.time() - job.running_since > _JOB_SECONDS:
                yield Condition(
                    name,
                    WAITS,
                    "this turn has not ended yet; it waits for Proxmox VE or for the records",
                    "see the other conditions, or wait",
                    job.running_since,
                )

    def _check_proxmox(self) -> Iterator[Condition]:
        statistics = self._service.base.client.statistics
        if statistics.reachable is False:
            yield Condition(
                "proxmox",
                FAILS,
                statistics.last_error or "it is not reached",
                "the message says what to look at; leases end all the same, and their VMs are stopped once it answers",
            )
        elif statistics.refused:
            yield Condition(
                "token",
                FAILS,
                statistics.refused,
                "give agentlabd a token that is in force, or grant what is missing: agentlab doctor says what",
            )


def _parse_time(text: str | None) -> int | None:
    """Return a time of an answer in seconds since the epoch; None for a damaged one."""
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp())
    except ValueError:
        return None
