# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Wait for tasks of Proxmox.

All waiters of a node share one poll, which reads the node's list of tasks instead of the status of each task.
"""

from __future__ import annotations

import threading
from typing import Any

from ..clock import Clock
from ..errors import ApiError, InvalidInput, OutcomeUnknown, ProxmoxError, TaskFailed, TaskTimeout, TaskUnknown
from . import answers
from .client import ProxmoxClient

# Longest pause in seconds between two polls. The pauses grow until the first task of a kind has ended. From then on the
# shortest duration of that kind is known.
LONGEST_POLL = 2.0
# Tasks to list in one poll.
_LIST_LIMIT = 5000
# Seconds after which a task that the list lacks is asked for by itself.
_LOST_AFTER = 10
# Lines of a failed task's log to read (a full clone writes one for each percent), and lines to quote.
_LOG_READ = 10_000
_LOG_LINES = 5
_LOG_LINE_CHARS = 300


def read_node(upid: str) -> str:
    """Return the node that runs a task. Only that node knows the task's status.

    A task id is ``UPID:node:pid:pstart:starttime:type:id:user:``. Raises OutcomeUnknown for any other text.
    """
    parts = upid.split(":")
    if len(parts) < 9 or parts[0] != "UPID" or not parts[1]:
        raise OutcomeUnknown(
            f"Proxmox answered {upid[:80]!r} where a task id was expected; whether the request was carried out is not "
            "known, run again"
        )
    return parts[1]


def read_kind(upid: str) -> str:
    """Return the type of a task, such as ``qmdestroy``."""
    return upid.split(":")[5]


def read_start_time(upid: str) -> int:
    """Return the start time of a task by the node's clock, in seconds since the epoch; 0 if the id has none."""
    try:
        return int(upid.split(":")[4], 16)
    except (IndexError, ValueError):
        return 0


class TaskWaiter:
    """Wait for tasks, from any number of threads. Use one waiter for a whole run.

    One thread polls a node, at most every ``interval`` seconds, and hands the results to the other threads that wait
    for tasks of that node. So ``waiting.wait_for_result`` cannot be used here.
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
        # Kind of task -> shortest duration seen, in seconds.
        self._shortest: dict[str, float] = {}

    def wait(self, upid: Any, label: str, timeout: float) -> list[str]:
        """Wait at most ``timeout`` seconds for a task to end well, and return its warnings ([] for none).

        ``label`` names the operation in messages. Raises TaskFailed with Proxmox's text and the end of the task's log,
        TaskTimeout when the task still runs, and TaskUnknown when its result cannot be read.
        """
        try:
            upid = str(upid)
            node = read_node(upid)
            return self._judge_status(upid, label, node, self._await_task(upid, label, node, timeout))
        except ProxmoxError as error:
            self._client.statistics.count_failure(error)
            raise

    def _await_task(self, upid: str, label: str, node: str, timeout: float) -> str:
        """Wait for the end of a task, and return its exit status. Raises TaskTimeout or TaskUnknown."""
        begun = self._clock.monotonic()
        deadline = begun + timeout
        with self._lock:
            self._waiting.setdefault(node, {})[upid] = begun
        try:
            # pvesh has already waited for the task, so read its status before any pause.
            if self._client.awaits_tasks:
                if self._client.ended_well(upid):
                    return "OK"
                status = self._look_once(upid, node)
                if status is not None:
                    return status
            while True:
                with self._lock:
                    if upid in self._ended:
                        return self._ended.pop(upid)
                    if upid in self._errors:
                        raise self._errors.pop(upid)
                    remaining = deadline - self._clock.monotonic()
                    if remaining <= 0:
                        raise TaskTimeout(
                            f"{label}: task {upid} on node {node} did not end within {timeout:g} s (wait_timeout); the "
                            "task goes on there. Run again to continue with it, or stop the task there if it "
                            f"hangs{self._last_problem.get(node, '')}",
                            upid=upid,
                            node=node,
                            timeout=timeout,
                        )
                    if node in self._polling:
                        self._changed.wait(min(remaining, 0.5))
                        continue
                    self._polling.add(node)
                    pause = min(remaining, self._compute_pause(node))
                try:
                    self._clock.sleep(pause)
                    with self._lock:
                        awaited = dict(self._waiting[node])
                    ended, errors = self._poll_node(node, awaited)
                finally:
                    with self._lock:
                        self._polling.discard(node)
                        self._changed.notify_all()
                with self._lock:
                    self._learn_durations(awaited, ended)
                    # Drop results of waiters that timed out, or this dict grows forever.
                    self._ended.update(
                        (ended_upid, how) for ended_upid, how in ended.items() if ended_upid in self._waiting[node]
                    )
                    self._errors.update(
                        (ended_upid, error) for ended_upid, error in errors.items() if ended_upid in self._waiting[node]
                    )
                    self._changed.notify_all()
        finally:
            with self._lock:
                self._waiting[node].pop(upid, None)

    def _compute_pause(self, node: str) -> float:
        """Return the seconds until the next poll of a node.

        The next poll is due when the first task can have ended, by the shortest duration of its kind. An overdue task
        is polled again after a quarter of its delay, so that long tasks cost few polls.
        """
        now = self._clock.monotonic()
        late = [now - since - self._shortest.get(read_kind(upid), 0.0) for upid, since in self._waiting[node].items()]
        return max(
            self._interval, min(LONGEST_POLL, *(seconds * 0.25 if seconds > 0 else -seconds for seconds in late))
        )

    def _learn_durations(self, awaited: dict[str, float], ended: dict[str, str]) -> None:
        """Update the shortest duration of each kind of task from the tasks that ended."""
        now = self._clock.monotonic()
        for upid in ended:
            took, kind = now - awaited[upid], read_kind(upid)
            # Raise the shortest duration slowly. Otherwise a single fast task would cause early, useless polls forever.
            self._shortest[kind] = min(took, self._shortest.get(kind, took) * 1.1)

    def _poll_node(self, node: str, awaited: dict[str, float]) -> tuple[dict[str, str], dict[str, ProxmoxError]]:
        """Return (exit statuses of ended tasks, errors by task).

        A failed poll is no error: the waiter polls again until its timeout.
        """
        ended: dict[str, str] = {}
        errors: dict[str, ProxmoxError] = {}
        single = list(awaited) if len(awaited) == 1 else []
        try:
            if not single:
                since = min(map(read_start_time, awaited)) - 1
                rows = self._client.get_list(
                    f"nodes/{node}/tasks", source="all", since=max(since, 0), limit=_LIST_LIMIT
                )
                listed = {str(row.get("upid")): row for row in rows}
                now = self._clock.monotonic()
                for upid, since_ in awaited.items():
                    row = listed.get(upid)
                    if row is None:
                        # Proxmox may list a new task a moment late. Read the status of an old task that is missing.
                        if now - since_ > _LOST_AFTER:
                            single.append(upid)
                    elif row.get("endtime") or row.get("status") not in (None, "", "RUNNING", "running"):
                        ended[upid] = str(row.get("status") or "unexpected status")
        except ApiError as error:
            if error.status == 403:
                single = list(awaited)
        except ProxmoxError as error:
            self._last_problem[node] = f" (the last poll failed: {error.message})"
            return ended, errors
        for upid in single:
            try:
                task = self._client.get_dict(f"nodes/{node}/tasks/{upid}/status")
                if task.get("status") == "stopped":
                    ended[upid] = str(task.get("exitstatus") or "unexpected status")
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
                self._last_problem[node] = f" (the last poll failed: {error.message})"
        return ended, errors

    def _look_once(self, upid: str, node: str) -> str | None:
        """Return the exit status of an ended task; None while it runs or cannot be read."""
        try:
            task = self._client.get_dict(f"nodes/{node}/tasks/{upid}/status")
        except (ProxmoxError, InvalidInput):
            # The waiter's loop polls again and reports the problem.
            return None
        return str(task.get("exitstatus") or "unexpected status") if task.get("status") == "stopped" else None

    def _judge_status(self, upid: str, label: str, node: str, status: str) -> list[str]:
        """Return the warnings of a task that ended well. Raises TaskFailed or TaskUnknown for another exit status."""
        if status == "OK":
            return []
        if status.startswith("WARNINGS"):
            return [f"{label}: task {upid} ended with {status}; see its log on node {node}"]
        # If the task did not begin (no lock), the caller retries, and the log only repeats the status.
        log = "" if answers.is_not_begun(status) else self._read_end_of_log(upid, node, status)
        if status == "unexpected status":
            raise TaskUnknown(
                f"{label}: the worker of task {upid} on node {node} died (unexpected status); what it did is not "
                f"known, run again{log}",
                upid=upid,
                node=node,
            )
        raise TaskFailed(
            f"{label}: task {upid} on node {node} failed: "
            f"{answers.clean(status)}{log}{answers.advise_on_room(status + log)}",
            upid=upid,
            node=node,
            exitstatus=status,
        )

    def _read_end_of_log(self, upid: str, node: str, status: str) -> str:
        """Return the last lines of a failed task's log for the message. Often only the log contains the cause."""
        try:
            rows = self._client.get_list(f"nodes/{node}/tasks/{upid}/log", limit=_LOG_READ)
        except (ProxmoxError, InvalidInput) as error:
            problem = (
                f"{error.detail['status']} {error.detail.get('text')}" if error.detail.get("status") else error.message
            )
            return f" (its log cannot be read: {problem})"
        lines = [answers.clean(row.get("t"), self._client.settings) for row in rows if row.get("t")]
        if lines and lines[0].startswith("unable to open file"):
            # Proxmox answers with this text and status 200 when the log file is gone.
            return f" (its log cannot be read: {lines[0][:_LOG_LINE_CHARS]})"
        excerpt = [line[:_LOG_LINE_CHARS] for line in lines if line != f"TASK ERROR: {answers.clean(status)}"]
        return f". Its log ends: {' | '.join(excerpt[-_LOG_LINES:])}" if excerpt else ""
