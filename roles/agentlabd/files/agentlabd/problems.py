# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Remember what the daemon's jobs could not do for single sandboxes, until a later run of the job does it.

A job that fails as a whole shows in its own state. Without this file the failure of one sandbox among many would be a
line in the log, and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from agentlab_core.maintenance.reconcile import Drift
from agentlab_core.model import Outcome

# Reasons that usually pass by themselves. They are shown only if they last longer than PASSING_SECONDS.
_PASSING = ("locked", "node_offline", "unknown", "busy", "changed")
PASSING_SECONDS = 3600
# Texts in the message of a cause that lasts until a person removes it (a missing privilege, lost quorum). Problems with
# such a cause are shown at once.
_LASTING = ("grant ", "has no quorum")
# Reasons for which nothing has to be done, or which other conditions show.
_ORDINARY = ("too_young", "protected", "foreign", "rule", "clock_jumped", "restored")
# Kinds of drift that reconcile leaves to a person, or to a later pass.
_LEFT_ALONE = ("ambiguous", "denied", "running", "locked", "node_offline", "unknown")


@dataclass(slots=True)
class Problem:
    """A sandbox or workspace for which a job could not do its work.

    ``what`` names it; ``uuid`` is None for a workspace. ``passing``: the cause usually ends by itself. ``since`` is in
    seconds since the epoch; ``met_at`` is the last time that the job met the problem, by the clock of the records.
    """

    what: str
    why: str
    uuid: str | None = None
    passing: bool = False
    since: int = 0
    met_at: float = 0.0


class Problems:
    """The problems of the last run of each job. Safe to use from several threads."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        # Job -> name of the sandbox or workspace -> problem.
        self._jobs: dict[str, dict[str, Problem]] = {}

    def replace(self, job: str, problems: Iterable[Problem]) -> None:
        """Set the problems of a run that has looked at everything. A problem that lasts keeps its beginning."""
        with self._lock:
            before = self._jobs.get(job, {})
            self._jobs[job] = {}
            for problem in problems:
                problem.since = self._find_beginning(before.get(problem.what), problem)
                self._jobs[job][problem.what] = problem

    def add_problem(self, job: str, problem: Problem) -> None:
        """Add the problem of one sandbox."""
        with self._lock:
            problem.since = self._find_beginning(self._jobs.setdefault(job, {}).get(problem.what), problem)
            self._jobs[job][problem.what] = problem

    def forget_met_before(
        self, job: str, read_time: Callable[[], float | None], settled: Container[str | None] = ()
    ) -> None:
        """Drop the problems of a job that were last met before a time, and those of the ``settled`` sandboxes (UUIDs).

        The time is read only if there is a problem.
        """
        with self._lock:
            problems = dict(self._jobs.get(job, {}))
        at = read_time() if problems else None
        if at is None:
            return
        with self._lock:
            kept = self._jobs[job]
            for what, problem in problems.items():
                if (problem.met_at < at or problem.uuid in settled) and kept.get(what) is problem:
                    del kept[what]

    def _find_beginning(self, known: Problem | None, problem: Problem) -> int:
        """Return when a problem began, which the same problem at the last run may know."""
        # A new sandbox may have the VMID of an earlier one.
        return known.since if known and known.uuid == problem.uuid else int(self._now())

    def list_lasting(self, live: Callable[[], Iterable[str]]) -> list[tuple[str, Problem]]:
        """Return (job, problem) of everything that a person should know, oldest first.

        ``live`` returns the UUIDs of the live sandboxes. It is called only if there is a problem.
        """
        with self._lock:
            problems = [(job, problem) for job, each in self._jobs.items() for problem in each.values()]
        now = self._now()
        problems = [
            (job, problem) for job, problem in problems if not problem.passing or now - problem.since >= PASSING_SECONDS
        ]
        if not problems:
            return []
        present = set(live())
        problems = [(job, problem) for job, problem in problems if problem.uuid is None or problem.uuid in present]
        return sorted(problems, key=lambda entry: (entry[1].since, entry[1].what))


def extract_from_outcomes(outcomes: Iterable[Outcome]) -> list[Problem]:
    """Return the problems among the outcomes of the cleanup rules: failures, and sandboxes kept for a person."""
    return [
        Problem(
            f"sandbox {outcome.vmid}",
            outcome.message or str(outcome.reason),
            outcome.uuid,
            passing=_is_passing(outcome.reason, outcome.message),
        )
        for outcome in outcomes
        if outcome.reason not in _ORDINARY
    ]


def extract_from_drift(drifts: Iterable[Drift]) -> list[Problem]:
    """Return the problems among the drift of a pass of reconcile that has repaired what it could."""
    problems = []
    for drift in drifts:
        if drift.error is None and (drift.applied or drift.kind not in _LEFT_ALONE):
            continue
        sandbox = drift.sandbox
        subject = f"sandbox {sandbox.vmid}" if sandbox else f"workspace {drift.evidence.get('workspace')}"
        why = drift.error or _explain_drift(drift)
        passing = drift.error is None and _is_passing(drift.kind, why)
        problems.append(Problem(subject, why, sandbox.uuid if sandbox else None, passing))
    return problems


def _is_passing(reason: str | None, why: str | None) -> bool:
    """Return whether a problem usually passes by itself."""
    return reason in _PASSING and not any(text in str(why) for text in _LASTING)


def _explain_drift(drift: Drift) -> str:
    """Return why reconcile left the sandbox or workspace alone."""
    evidence = drift.evidence
    if drift.kind == "ambiguous":
        return "only one of the two marks of its VM is ours; look at the VM, and remove it by hand if it is to go"
    if drift.kind == "node_offline":
        return f"node {evidence.get('node')} is offline"
    if drift.kind == "locked":
        return str(evidence.get("why") or f"its VM is locked ({evidence.get('lock')})")
    return str(evidence.get("why") or drift.action.removeprefix("none: "))
