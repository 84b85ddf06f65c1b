# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the daemon's own jobs: expire leases on time, reconcile, clean up.

Each job has a loop that only waits; threads do the work. So a VM that stops slowly delays no other lease, and a slow
Proxmox VE delays only the loop that asks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from agentlab_core import clock as clock_module
from agentlab_core import rules, timeguard
from agentlab_core.context import Context
from agentlab_core.errors import AgentlabError, Busy, Stopping, make_host_error
from agentlab_core.maintenance import reconcile
from agentlab_core.model import Sandbox
from agentlab_core.sandboxes import lease
from agentlab_core.store import holders, overview

from .logs import log, log_seldom
from .problems import Problem
from .service import Service

T = TypeVar("T")

# Seconds until the first retry after a failure. The pauses grow up to the interval.
_FIRST_RETRY = 15.0
# On PostgreSQL: seconds between two checks whether this daemon reconciles and cleans up, and whether a dead controller
# left work. A job is taken over within 10 seconds; the server needs up to 7 of them to notice a vanished host
# (store/postgres/engine.py).
_TURN_SECONDS = 1.0
# On PostgreSQL: seconds between two checks whether another controller keeps a record because of a file on this host.
_OWN_FILES_SECONDS = 5.0
# Seconds to wait after the host ran out of descriptors, threads or memory.
_HOST_PAUSE_SECONDS = 5.0
_LAST_CLEANUP = "cleanup_last_run"


@dataclass(slots=True)
class Job:
    """The last run of a job, the next one, and its last error (None: no error)."""

    last_run: int | None = None
    next_run: int | None = None
    last_error: str | None = None
    # Beginning of the failures, and of the present run (seconds since the epoch); None: no failure, no run.
    failing_since: int | None = None
    running_since: int | None = None

    def public(self) -> dict[str, Any]:
        return {
            "last_run": clock_module.format_utc(self.last_run),
            "next_run": clock_module.format_utc(self.next_run),
            "last_error": self.last_error,
        }

    def note_success(self, name: str) -> None:
        if self.last_error:
            log.info("%s works again", name)
        self.last_run, self.last_error, self.failing_since = int(time.time()), None, None

    def forget_plans(self) -> None:
        """Forget errors and plans: another controller does the job now."""
        self.next_run, self.last_error, self.failing_since = None, None, None

    def note_failure(self, name: str, error: AgentlabError) -> None:
        # Log an error once, not at every retry.
        if error.message != self.last_error:
            log.warning("%s: %s", name, error.message)
        self.last_error = error.message
        self.failing_since = self.failing_since or int(time.time())


class Scheduler:
    """Run the three loops: expiry, reconcile, cleanup."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.expiry = Job()
        self.reconcile = Job()
        self.cleanup = Job()
        self._expiry_event = asyncio.Event()
        self._cleanup_event = asyncio.Event()
        self._reconcile_event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._jobs = ThreadPoolExecutor(4, "job")
        self._stops = ThreadPoolExecutor(service.config.proxmox.connections, "stop")
        self.tasks: list[asyncio.Task[None]] = []
        # Jobs that another controller was doing at the last check.
        self._done_elsewhere: set[str] = set()
        # Sandboxes with an interrupted operation at the last check.
        self._interrupted: set[str] = set()
        # Sandboxes that waited for this host's files at the last check, and when that was tried (monotonic seconds).
        self._waiting: set[str] = set()
        self._tried_at = 0.0
        service.wake_expiry = self._wake_expiry
        service.jobs = {"expiry": self.expiry, "reconcile": self.reconcile, "cleanup": self.cleanup}

    def start(self) -> None:
        loops: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            self._expire_forever,
            self._reconcile_forever,
            self._clean_forever,
        )
        if self.service.base.database.controller is not None:
            loops = (*loops, self._finish_own_files_forever)
        self.tasks = [asyncio.create_task(begin()) for begin in loops]

    def _wake_expiry(self) -> None:
        self._loop.call_soon_threadsafe(self._expiry_event.set)

    def apply_reload(self) -> None:
        """Apply new intervals and rules after a reload."""
        for event in (self._expiry_event, self._cleanup_event, self._reconcile_event):
            event.set()

    def stop(self) -> None:
        """Start no further job."""
        for task in self.tasks:
            task.cancel()

    async def _run_in_thread(self, work: Callable[[], T], name: str) -> T:
        """Run ``work`` in a thread and return its value. Cancelling the loop does not end the work called ``name``.

        A lack of descriptors, threads or memory on this host is retried for work that is no job.
        """
        job = self.service.jobs.get(name)

        def run_timed() -> T:
            if job is None:
                return work()
            job.running_since = int(time.time())
            try:
                return work()
            finally:
                job.running_since = None

        while True:
            try:
                return await asyncio.shield(self.service.begin_work(self._jobs, run_timed, name))
            except Exception as error:
                # A lack of descriptors, threads or memory ends no job for good, because it may pass.
                lack = make_host_error(error)
                if lack is None:
                    raise
                if job is not None:
                    raise lack from None
                log_seldom(60, "host", "%s: %s", name, lack.message)
            await asyncio.sleep(_HOST_PAUSE_SECONDS)

    # ---- leases ----

    async def _expire_forever(self) -> None:
        await self._run_in_thread(self._note_clock, "a look at the clock")
        while True:
            self._expiry_event.clear()
            try:
                pause = await self._run_in_thread(self._expire_leases, "expiry")
                self.expiry.note_success("expiry")
                self.service.metrics.expiry_success.set(time.time())
            except Stopping:
                return
            except AgentlabError as error:
                self.expiry.note_failure("expiry", error)
                pause = float(self.service.config.expire_interval)
            self.expiry.next_run = int(time.time() + pause)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._expiry_event.wait(), pause)

    def _note_clock(self) -> None:
        """Store the time, because a jump of the clock can only be detected from a time stored before it."""
        with contextlib.suppress(AgentlabError):
            timeguard.explain_pause(self.service.make_context("agentlabd"))

    def _expire_leases(self) -> float:
        """Expire leases, and return the seconds to sleep. Reads only the records."""
        longest = float(self.service.config.expire_interval)
        ctx = self.service.make_context("agentlabd")
        # Also stores the newest event, and detects an older copy of the records.
        timeguard.hold_leases(ctx)
        due = overview.read_next_lease_end(ctx.records)
        if due is not None and due <= ctx.clock.now():
            expiry = lease.expire(ctx, stop_vms=False)
            if expiry.suspended:
                log_seldom(30, "expiry rests", "expiry rests: %s", expiry.suspended)
                return longest
            self.service.metrics.count_expiry(expiry)
            for outcome in expiry.renewed:
                if not outcome.failed:
                    log.info("lease of sandbox %s renewed (keepalive)", outcome.vmid)
            for outcome in expiry.expired:
                log.info("lease of sandbox %s is over: %s -> TIMEOUT", outcome.vmid, outcome.previous_state)
                if outcome.sandbox is not None:
                    self._stop_vm(ctx, outcome.sandbox)
            if not expiry.expired and all(outcome.failed for outcome in expiry.renewed):
                # Other runs work on these sandboxes, and may have ended in a second.
                return min(longest, 1.0) if not expiry.failed else longest
            due = overview.read_next_lease_end(ctx.records)
        return longest if due is None else min(longest, max(0.05, due - ctx.database.read_wall_time()))

    def _stop_vm(self, ctx: Context, sandbox: Sandbox) -> None:
        """Stop the VM of an expired sandbox in a thread of its own."""

        def stop_vm() -> None:
            problem = lease.stop_expired(ctx, sandbox)
            if problem and problem != lease.UNDER_WAY:
                log.warning("sandbox %s is TIMEOUT, but its VM was not stopped: %s", sandbox.vmid, problem)
                if problem in (lease.NO_VM, lease.ANOTHER_VM):
                    return
                why = f"its lease is over, but its VM was not stopped: {problem}"
                met_at = self.service.base.database.read_wall_time()
                self.service.problems.add_problem(
                    "expiry", Problem(f"sandbox {sandbox.vmid}", why, sandbox.uuid, met_at=met_at)
                )

        self._loop.call_soon_threadsafe(
            self.service.begin_work, self._stops, stop_vm, f"the stop of expired sandbox {sandbox.vmid}"
        )

    # ---- reconcile ----

    async def _reconcile_forever(self) -> None:
        retry = _FIRST_RETRY
        while True:
            await self._wait_for_turn("reconcile")
            began = time.monotonic()
            try:
                # The first pass finishes operations in which an earlier daemon was killed.
                drifts = await self._run_in_thread(self._reconcile_records, "reconcile")
                self.reconcile.note_success("reconcile")
                self._log_drifts(drifts)
                self._expiry_event.set()
                longest, retry = math.inf, _FIRST_RETRY
            except Stopping:
                return
            except Busy as error:
                # A person has begun a pass on another controller.
                log.info("reconcile: %s", error.message)
                longest = _FIRST_RETRY
            except AgentlabError as error:
                self.reconcile.note_failure("reconcile", error)
                self.service.metrics.count_refusal("reconcile", error)
                longest, retry = retry, retry * 2
            self.service.metrics.durations.labels("reconcile").observe(time.monotonic() - began)
            await self._sleep_until_next_pass(longest)

    def _reconcile_records(self) -> list[reconcile.Drift]:
        """Make one pass over records and VMs, and note its result."""
        began = self.service.base.database.read_wall_time()
        drifts = reconcile.run(self.service.make_context("agentlabd"), apply=True, known_vms=self.service.known_vms)
        self.service.note_reconciled(drifts, began)
        return drifts

    async def _sleep_until_next_pass(self, longest: float) -> None:
        """Sleep for the interval, which a reload may change, or for ``longest`` seconds if that is shorter."""
        began = time.monotonic()
        shared = self.service.base.database.controller is not None
        while (remaining := began + min(longest, float(self.service.config.reconcile_interval)) - time.monotonic()) > 0:
            self._reconcile_event.clear()
            self.reconcile.next_run = int(time.time() + remaining)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._reconcile_event.wait(), min(remaining, _TURN_SECONDS) if shared else remaining
                )
            if shared and await self._run_in_thread(self._is_work_left, "a look at work left behind"):
                return

    async def _wait_for_turn(self, job: str) -> None:
        """Wait until this daemon does the job, which is at once where no other daemon shares the records."""
        while not await self._run_in_thread(
            functools.partial(self._try_to_lead, job), f"a look at whose turn {job} is"
        ):
            await asyncio.sleep(_TURN_SECONDS)

    def _try_to_lead(self, job: str) -> bool:
        """Return whether this daemon does the job now. False also while the database does not answer."""
        try:
            leads = self.service.base.database.lead(job)
        except AgentlabError as error:
            log_seldom(60, f"turn {job}", "%s: whether it is this daemon's turn is not known: %s", job, error.message)
            self.service.leads[job] = False
            return False
        if leads != self.service.leads.get(job, True):
            log.info("%s: %s", job, "done by this daemon from now on" if leads else "done by another controller")
        self.service.leads[job] = leads
        if not leads:
            self._done_elsewhere.add(job)
            # The controller that does the job shows its problems.
            self.service.problems.replace(job, ())
            self.service.jobs[job].forget_plans()
            if job == "reconcile":
                self.service.unrecorded = []
        elif job in self._done_elsewhere:
            self._done_elsewhere.remove(job)
            self.service.takeovers[job] += 1
        return leads

    def _is_work_left(self) -> bool:
        """Return whether a dead controller has left new work since the last check, or this daemon has lost its turn."""
        if not self._try_to_lead("reconcile"):
            return True
        try:
            interrupted = {operation.sandbox_uuid for operation in self.service.base.records.list_interrupted()}
        except AgentlabError:
            return False
        fresh = bool(interrupted - self._interrupted)
        self._interrupted = interrupted
        return fresh

    # ---- files of this host ----

    async def _finish_own_files_forever(self) -> None:
        """Close the records that another controller keeps because of a snippet on this host.

        The daemon that reconciles does this in its own passes.
        """
        while True:
            await asyncio.sleep(_OWN_FILES_SECONDS)
            if self.service.leads.get("reconcile", True):
                continue
            try:
                await self._run_in_thread(self._finish_own_files, "a look at files of this host")
            except Stopping:
                return
            except AgentlabError as error:
                log_seldom(60, "own files", "files of this host: %s", error.message)

    def _finish_own_files(self) -> None:
        """Close the records that wait for a snippet on this host, if there are new ones or the interval is over."""
        waiting = {
            sandbox.uuid
            for sandbox in overview.list_waiting_for_snippet(self.service.base.records, holders.read_host_name())
        }
        now = time.monotonic()
        # Retry an unfinished record only as often as a reconcile would.
        if waiting - self._waiting or (waiting and now - self._tried_at >= self.service.config.reconcile_interval):
            self._tried_at = now
            self._log_drifts(reconcile.finish_own_files(self.service.make_context("agentlabd")))
        self._waiting = waiting

    @staticmethod
    def _log_drifts(drifts: list[reconcile.Drift]) -> None:
        for drift in drifts:
            if drift.applied or drift.error:
                vmid = drift.sandbox.vmid if drift.sandbox else drift.vmid
                log.log(
                    30 if drift.error else 20,
                    "reconcile: %s %s: %s%s",
                    vmid,
                    drift.kind,
                    drift.action,
                    f": {drift.error}" if drift.error else "",
                )

    # ---- cleanup ----

    async def _clean_forever(self) -> None:
        while True:
            self._cleanup_event.clear()
            policy = self.service.policy
            due = await self._run_in_thread(
                functools.partial(self._plan_cleanup, policy), "a look at the cleanup's plan"
            )
            self.cleanup.next_run = due
            pause = None if due is None else max(0.0, due - self.service.base.database.read_wall_time())
            try:
                await asyncio.wait_for(self._cleanup_event.wait(), pause)
                # Rules and interval have changed.
                continue
            except TimeoutError:
                pass
            if not await self._run_in_thread(
                functools.partial(self._try_to_lead, "cleanup"), "a look at whose turn cleanup is"
            ):
                await asyncio.sleep(_TURN_SECONDS)
                continue
            with contextlib.suppress(Stopping):
                await self._run_in_thread(self._clean_up, "cleanup")

    def _plan_cleanup(self, policy: rules.Policy) -> int | None:
        """Return the time of the next run of the rules: an interval and some jitter after the last one.

        The time of the last run is in the records, so that a restart does not forget it.
        """
        if not policy.enabled:
            return None
        try:
            text = self.service.base.records.read_meta(_LAST_CLEANUP)
        except AgentlabError:
            text = None
        now = int(self.service.base.database.read_wall_time())
        # A damaged value counts as "never": the run is due.
        last = int(text) if text and text.isdecimal() else None
        jitter = random.randint(0, policy.jitter)
        if last is None or not now - policy.interval <= last <= now:
            # On the first run, or when overdue, let the start finish first.
            return now + min(policy.interval, 10) + jitter
        return last + policy.interval + jitter

    def _clean_up(self) -> None:
        """Run the rules, log the result, and store the time of this run."""
        began = time.monotonic()
        try:
            report = self.service.clean_up("agentlabd")
            self.cleanup.note_success("cleanup")
            summary = (
                f"{len(report.pruned)} {'would be ' if report.dry_run else ''}destroyed, {len(report.marked)} marked "
                f"FAILED, {len(report.kept)} kept, {len(report.failed)} failed, {report.forgotten} old records removed"
            )
            log.log(
                30 if report.failed else 20 if report.pruned or report.marked or report.forgotten else 10,
                "cleanup: %s",
                summary,
            )
            if report.guard:
                log.warning("cleanup (shadow): %s", report.guard)
        except Busy as error:
            log.info("cleanup: %s", error.message)
        except AgentlabError as error:
            self.cleanup.note_failure("cleanup", error)
            self.cleanup.last_run = int(time.time())
        self.service.metrics.durations.labels("cleanup").observe(time.monotonic() - began)
        with contextlib.suppress(AgentlabError):
            self.service.base.records.set_meta(_LAST_CLEANUP, str(int(self.service.base.database.read_wall_time())))
