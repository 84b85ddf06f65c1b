# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Waiting for tasks.

Many waiters share one poll a node: the list of its tasks, instead of one request a task a tick.
"""

from __future__ import annotations

import threading
from typing import Any

from ..clock import Clock
from ..errors import ApiError, InvalidInput, OutcomeUnknown, ProxmoxError, TaskFailed, TaskTimeout, TaskUnknown
from . import answers
from .client import ProxmoxClient

# The first task of its kind is looked at soon and then ever more rarely; from then on it is known how long such a task
# takes at the least.
LONGEST_POLL = 2.0
_LIST_LIMIT = 5000
_LOST_AFTER = 10
# Of a failed task's log: how much is read (a full clone writes a line for each percent), and how much of it is told.
_LOG_READ = 10_000
_LOG_LINES = 5
_LOG_LINE_CHARS = 300


def node_of(upid: str) -> str:
    """The node a task runs on; it must be asked for there. UPID:node:pid:pstart:starttime:type:id:user:"""
    parts = upid.split(":")
    if len(parts) < 9 or parts[0] != "UPID" or not parts[1]:
        raise OutcomeUnknown(
            f"Proxmox answered {upid[:80]!r} where a task id was expected; whether anything was done is not known"
        )
    return parts[1]


def kind_of(upid: str) -> str:
    """What kind of task it is, such as ``qmdestroy``."""
    return upid.split(":")[5]


def started_at(upid: str) -> int:
    """The node's wall time at the task's start, seconds."""
    try:
        return int(upid.split(":")[4], 16)
    except (IndexError, ValueError):
        return 0


class TaskWaiter:
    """Waits for task ids; use one for a whole run, from any number of threads.

    Looks at a node's tasks at most every ``interval`` seconds.
    """

    def __init__(self, client: ProxmoxClient, clock: Clock, interval: float) -> None:
        self._client = client
        self._clock = clock
        self._interval = interval
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: dict[str, dict[str, float]] = {}
        self._polling: set[str] = set()
        self._ended: dict[str, str] = {}
        self._errors: dict[str, ProxmoxError] = {}
        self._last_problem: dict[str, str] = {}
        # Kind of task -> the shortest time that one took.
        self._shortest: dict[str, float] = {}

    def wait(self, upid: Any, what: str, timeout: float) -> list[str]:
        """Return the warnings ([] for none) once the task has ended well; ``timeout`` is in seconds.

        Raises TaskFailed with Proxmox's text and the end of the task's log, TaskTimeout when the task goes on,
        TaskUnknown when its outcome cannot be read.
        """
        try:
            upid = str(upid)
            node = node_of(upid)
            return self._judge(upid, what, node, self._await(upid, what, node, timeout))
        except ProxmoxError as error:
            self._client.statistics.failed(error)
            raise

    def _await(self, upid: str, what: str, node: str, timeout: float) -> str:
        """Return the exit status of a task once it has ended."""
        begun = self._clock.monotonic()
        deadline = begun + timeout
        with self._lock:
            self._waiting.setdefault(node, {})[upid] = begun
        try:
            # pvesh has waited for the task already, so one look before any pause is enough.
            if self._client.awaits_tasks:
                if self._client.ended_well(upid):
                    return "OK"
                status = self._look(upid, node)
                if status is not None:
                    return status
            while True:
                with self._lock:
                    if upid in self._ended:
                        return self._ended.pop(upid)
                    if upid in self._errors:
                        raise self._errors.pop(upid)
                    left = deadline - self._clock.monotonic()
                    if left <= 0:
                        raise TaskTimeout(
                            f"{what}: task {upid} on node {node} did not end within {timeout:g} s (wait_timeout); it "
                            "goes on there, run again to take it up, or stop it there if it "
                            f"hangs{self._last_problem.get(node, '')}",
                            upid=upid,
                            node=node,
                            timeout=timeout,
                        )
                    if node in self._polling:
                        self._changed.wait(min(left, 0.5))
                        continue
                    self._polling.add(node)
                    pause = min(left, self._pause(node))
                try:
                    self._clock.sleep(pause)
                    with self._lock:
                        awaited = dict(self._waiting[node])
                    ended, errors = self._poll(node, awaited)
                finally:
                    with self._lock:
                        self._polling.discard(node)
                        self._changed.notify_all()
                with self._lock:
                    self._learn(awaited, ended)
                    # Drop results of waiters that timed out, or this dict grows forever.
                    self._ended.update((one, how) for one, how in ended.items() if one in self._waiting[node])
                    self._errors.update((one, error) for one, error in errors.items() if one in self._waiting[node])
                    self._changed.notify_all()
        finally:
            with self._lock:
                self._waiting[node].pop(upid, None)

    def _pause(self, node: str) -> float:
        """Until the first of the node's tasks can have ended; for one that is overdue a share of its delay, so that
        long tasks cost few looks.
        """
        now = self._clock.monotonic()
        late = [now - since - self._shortest.get(kind_of(upid), 0.0) for upid, since in self._waiting[node].items()]
        return max(
            self._interval, min(LONGEST_POLL, *(seconds * 0.25 if seconds > 0 else -seconds for seconds in late))
        )

    def _learn(self, awaited: dict[str, float], ended: dict[str, str]) -> None:
        now = self._clock.monotonic()
        for upid in ended:
            took, kind = now - awaited[upid], kind_of(upid)
            # Forgets slowly: when all take longer than one once did, the looks in between are for nothing.
            self._shortest[kind] = min(took, self._shortest.get(kind, took) * 1.1)

    def _poll(self, node: str, awaited: dict[str, float]) -> tuple[dict[str, str], dict[str, ProxmoxError]]:
        """Exit statuses of those that ended. A failed poll is tolerated until the waiter's own time-out."""
        ended: dict[str, str] = {}
        errors: dict[str, ProxmoxError] = {}
        single = list(awaited) if len(awaited) == 1 else []
        try:
            if not single:
                since = min(map(started_at, awaited)) - 1
                rows = self._client.get_list(
                    f"nodes/{node}/tasks", source="all", since=max(since, 0), limit=_LIST_LIMIT
                )
                listed = {str(row.get("upid")): row for row in rows}
                now = self._clock.monotonic()
                for upid, since_ in awaited.items():
                    row = listed.get(upid)
                    if row is None:
                        # New tasks may be listed a moment late; old ones that are missing are asked for by themselves.
                        if now - since_ > _LOST_AFTER:
                            single.append(upid)
                    elif row.get("endtime") or row.get("status") not in (None, "", "RUNNING", "running"):
                        ended[upid] = str(row.get("status") or "unexpected status")
        except ApiError as error:
            if error.status == 403:
                single = list(awaited)
        except ProxmoxError as error:
            self._last_problem[node] = f" (the last look at it failed: {error.message})"
            return ended, errors
        for upid in single:
            try:
                found = self._client.get_dict(f"nodes/{node}/tasks/{upid}/status")
                if found.get("status") == "stopped":
                    ended[upid] = str(found.get("exitstatus") or "unexpected status")
            except ApiError as error:
                if (
                    "no such task" in error.text
                    or "unable to parse worker upid" in error.text
                    or error.status in (400, 403, 404)
                ):
                    errors[upid] = TaskUnknown(
                        f"the outcome of task {upid} cannot be read ({error.status} {error.text}); look at it on node "
                        f"{node} and run again",
                        upid=upid,
                        node=node,
                    )
            except (ProxmoxError, InvalidInput) as error:
                self._last_problem[node] = f" (the last look at it failed: {error.message})"
        return ended, errors

    def _look(self, upid: str, node: str) -> str | None:
        """Return the exit status of one task that has ended, None when it runs or cannot be read."""
        try:
            task = self._client.get_dict(f"nodes/{node}/tasks/{upid}/status")
        except (ProxmoxError, InvalidInput):
            # The loop of the waiter looks again, and says what is wrong.
            return None
        return str(task.get("exitstatus") or "unexpected status") if task.get("status") == "stopped" else None

    def _judge(self, upid: str, what: str, node: str, status: str) -> list[str]:
        """Return the warnings of a task that ended well; raise TaskFailed or TaskUnknown for another exit status."""
        if status == "OK":
            return []
        if status.startswith("WARNINGS"):
            return [f"{what}: task {upid} ended with {status}; see its log on node {node}"]
        # A lock that was not got is tried again by the caller, and its log says no more than the status.
        log = "" if answers.not_begun(status) else self._end_of_log(upid, node, status)
        if status == "unexpected status":
            raise TaskUnknown(
                f"{what}: the worker of task {upid} on node {node} died (unexpected status); what it did is not "
                f"known, run again{log}",
                upid=upid,
                node=node,
            )
        raise TaskFailed(
            f"{what}: task {upid} on node {node} failed: "
            f"{answers.clean(status)}{log}{answers.room_advice(status + log)}",
            upid=upid,
            node=node,
            exitstatus=status,
        )

    def _end_of_log(self, upid: str, node: str, status: str) -> str:
        """Return the last lines of a failed task's log for its message; the cause often stands only there."""
        try:
            rows = self._client.get_list(f"nodes/{node}/tasks/{upid}/log", limit=_LOG_READ)
        except (ProxmoxError, InvalidInput) as error:
            said = (
                f"{error.detail['status']} {error.detail.get('text')}" if error.detail.get("status") else error.message
            )
            return f" (its log cannot be read: {said})"
        lines = [answers.clean(row.get("t"), self._client.settings) for row in rows if row.get("t")]
        if lines and lines[0].startswith("unable to open file"):
            # Proxmox answers so, with status 200, when the file of the log is gone.
            return f" (its log cannot be read: {lines[0][:_LOG_LINE_CHARS]})"
        told = [line[:_LOG_LINE_CHARS] for line in lines if line != f"TASK ERROR: {answers.clean(status)}"]
        return f". Its log ends: {' | '.join(told[-_LOG_LINES:])}" if told else ""
