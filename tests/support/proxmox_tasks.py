# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tasks of the Proxmox double: how they end, how long they take, and what lists tell of them.

How a test uses it (``pve`` is the double):

- **The next task of a type**: ``pve.next_task("qmclone", "killed")`` decides how it ends.
- **Every task of a type**: ``pve.task_secs``, ``pve.real_secs`` and ``pve.task_warnings``.
- **A task that runs**: ``pve.running_tasks()``, ``pve.kill_task(upid)``, ``pve.release_task(upid)``,
  ``pve.forget_task(upid)``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from fakepve import FakePve, TaskError
from fakepve.routing import param_error
from fakepve.server import USER
from fakepve.server import params as request_params

from support.proxmox_thread import on_loop

UNEXPECTED = "unexpected status"
FORCED_SCALE = 1e-9


@dataclass
class Outcome:
    """How a task yet to come shall end."""

    ttype: str
    how: str
    vmid: int | None = None
    carry_out: bool = False
    text: str = ""
    seconds: float = 0.0
    times: int = 1


class TaskRules(FakePve):
    """How the double runs tasks. The module's docstring says how tests use it."""

    def _reset_tasks(self) -> None:
        """Set everything that tests switch in this part."""
        # PVE seconds a task of a type takes (times time_scale), and real seconds (whatever time_scale says).
        self.task_secs: dict[str, float] = {"qmclone": 5, "qmdestroy": 2, "resize": 1}
        self.real_secs: dict[str, float] = {}
        # Task type -> n: every such task ends with `WARNINGS: n`. A VM's own dict `task_warnings` does it for one VM.
        self.task_warnings: dict[str, int] = {}
        self._outcomes: list[Outcome] = []
        self._cell: dict[str, str] = {}
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._held: dict[str, asyncio.Future[str]] = {}
        self._killed: dict[str, str] = {}
        self._forgotten: set[str] = set()

    # ------------------------------------------------------------------ what tests decide

    def next_task(
        self,
        ttype: str,
        how: str,
        *,
        vmid: int | None = None,
        carry_out: bool | None = None,
        text: str = "",
        seconds: float = 0.0,
        warnings: int = 1,
        times: int = 1,
    ) -> None:
        """Decide how the next task of a type (`qmclone`, `qmdestroy`, `qmstart`, `qmstop`, ...) goes.

        vmid: only a task of that VM. What shall hold for every task of a type is set in the dicts ``task_secs``,
        ``task_warnings`` and ``task_endings`` (double.py).

        how: `warnings` (done, WARNINGS: n) | `killed` (`unexpected status`) | `hang` (runs for ever; release_task() or
        kill_task()) | `vanish` (done, then an unknown id) | `fail` (text) | `slow` (real seconds). carry_out says
        whether the work gets done; default: for warnings, vanish and slow. A killed clone that is not carried out
        leaves the VM with lock clone.
        """
        if how not in ("warnings", "killed", "hang", "vanish", "fail", "slow"):
            raise ValueError(how)
        if carry_out is None:
            carry_out = how in ("warnings", "vanish", "slow")
        with self._guard:
            self._outcomes.append(Outcome(ttype, how, vmid, carry_out, text or f"WARNINGS: {warnings}", seconds, times))

    @on_loop
    def kill_task(self, upid: str, text: str = UNEXPECTED) -> None:
        """End a running task as a killed worker does: what it was doing stays half done."""
        record = self.tasks[upid]
        if record["status"] != "running":
            raise ValueError(f"{upid} has ended")
        self._killed[upid] = text
        if upid in self._running:
            self._running[upid].cancel()
        record.update(status="stopped", exitstatus=text, endtime=int(time.time()))

    @on_loop
    def release_task(self, upid: str) -> None:
        """Let a hanging task go on (its work is done now unless it was before)."""
        self._held[upid].set_result("go")

    @on_loop
    def forget_task(self, upid: str) -> None:
        """Let Proxmox VE no longer know this task id; the task's work goes on."""
        self._forgotten.add(upid)

    @on_loop
    def running_tasks(self, ttype: str | None = None) -> list[str]:
        """Return the ids of all tasks that run, of one type if it is named."""
        return [t["upid"] for t in self.tasklog if t["status"] == "running" and ttype in (None, t["type"])]

    # ------------------------------------------------------------------ running a task

    def _take_outcome(self, ttype: str, ids: set[str]) -> Outcome | None:
        """Return how a test wants this task to end, and count that wish down."""
        with self._guard:
            for outcome in self._outcomes:
                if outcome.ttype == ttype and (outcome.vmid is None or str(outcome.vmid) in ids):
                    outcome.times -= 1
                    if outcome.times <= 0:
                        self._outcomes.remove(outcome)
                    return outcome
        return None

    def _upid(self, node: str, ttype: str, tid: Any, user: str) -> tuple[str, int, int]:
        made = super()._upid(node, ttype, tid, user)
        # task() cannot see the id of its own task before the task runs; this call is the first thing it makes.
        self._cell["upid"] = made[0]
        return made

    async def task(
        self, node: str, ttype: str, tid: Any, user: str, body: Any, vm: Any = None, lock: bool = True, log: Any = ()
    ) -> str:
        """Start a task and return its id.

        Nothing in here waits before the task is on its way, so the fields it borrows are its own.
        """
        cell: dict[str, str] = {}
        self._cell = cell
        ids = {str(tid)} | ({str(vm.vmid)} if vm is not None else set())
        outcome = self._take_outcome(ttype, ids)
        around = getattr(self, "_around_" + ttype, None)
        undo: list[Callable[[], None]] = []
        inner = around(body, vm, undo) if around and vm is not None else body
        target = vm or self.vm(int(tid)) if str(tid).isdigit() else vm
        detached = (
            bool(self.time_scale)
            or ttype in self.real_secs
            or (outcome is not None and outcome.how in ("hang", "slow"))
        )

        async def run() -> Any:
            upid = cell["upid"]
            if detached:
                self._running[upid] = asyncio.current_task()
            try:
                await self.pause(self.task_secs.get(ttype, 0))
                await self._sleep(self.real_secs.get(ttype, 0))
                return await self._carry_out(upid, ttype, inner, target, outcome, undo)
            except asyncio.CancelledError:
                text = self._killed.pop(upid, None)
                if text is None:
                    raise
                if text != UNEXPECTED:
                    _undo_all(undo)
                raise TaskError(text) from None
            finally:
                self._running.pop(upid, None)
                self._held.pop(upid, None)

        scale = self.time_scale
        self.time_scale = scale or (FORCED_SCALE if detached else scale)
        try:
            if detached:
                started = super().task(node, ttype, tid, user, run, vm=vm, lock=lock, log=log)
                return await started
        finally:
            self.time_scale = scale
        return await super().task(node, ttype, tid, user, run, vm=vm, lock=lock, log=log)

    async def _carry_out(
        self, upid: str, ttype: str, body: Any, vm: Any, outcome: Outcome | None, undo: list[Callable[[], None]]
    ) -> Any:
        """Do the work of a task, and end it as the test wants."""
        number = getattr(vm, "task_warnings", {}).get(ttype) or self.task_warnings.get(ttype)
        if outcome is None:
            note = await body()
            if number:
                raise TaskError(f"WARNINGS: {number}")
            return note
        if outcome.how == "slow":
            await self._sleep(outcome.seconds)
        note = await body() if outcome.carry_out else None
        if outcome.how == "hang":
            self._held[upid] = asyncio.get_running_loop().create_future()
            await self._held[upid]
            return note if outcome.carry_out else await body()
        if outcome.how == "vanish":
            self._forgotten.add(upid)
        elif outcome.how == "killed":
            raise TaskError(UNEXPECTED)
        elif outcome.how in ("fail", "warnings"):
            if not outcome.carry_out:
                _undo_all(undo)
            raise TaskError(outcome.text)
        return note

    async def _start_failing_task(self, node: str, ttype: str, tid: Any, user: str, text: str) -> str:
        """Start a task that fails with this text, and return its id."""

        async def body() -> None:
            raise TaskError(text)

        return await self.task(node, ttype, tid, user, body)

    # ------------------------------------------------------------------ what is told of tasks

    def _routes_tasks(self) -> list[tuple[str, str, Any]]:
        return [
            ("DELETE", "/nodes/{node}/tasks/{upid}", self._task_abort),
            ("GET", "/cluster/tasks", self._cluster_tasks),
        ]

    def _get_task(self, request: web.Request) -> dict[str, Any]:
        return self._find_task(request.match_info["node"], request.match_info["upid"], request[USER])

    def _find_task(self, node: str, upid: str, user: str) -> dict[str, Any]:
        """Return the task with this id, or refuse as the API does."""
        match = re.match(r"UPID:([^:]+):[0-9A-F]{8}:[0-9A-F]{8,9}:[0-9A-F]{8}:[^:\s]+:[^:\s]*:[^:\s]+:$", upid)
        if match is None:
            raise param_error(upid="unable to parse worker upid")
        task = self.tasks.get(upid)
        # Only the node named in the id has the task; asked elsewhere it is as unknown as any.
        if task is None or upid in self._forgotten or match[1] != node:
            raise param_error(upid="no such task")
        if not self._task_owner(user, task):
            self.require(user, "/nodes/" + node, "Sys.Audit")
        return task

    async def _task_list(self, request: web.Request) -> web.Response:
        """Return the tasks of a node that fit the filters of the request."""
        v = self._verify(request, await request_params(request))
        tasks = self._list_tasks(request[USER], request.match_info["node"])
        source = v.get("source", "archive")
        tasks = [t for t in tasks if source == "all" or (t["status"] == "running") == (source == "active")]
        tests = {
            "since": lambda t, x: t["starttime"] >= x,
            "until": lambda t, x: t["starttime"] <= x,
            "typefilter": lambda t, x: t["type"] == x,
            "vmid": lambda t, x: t["id"] == str(x),
            "userfilter": lambda t, x: x.lower() in t["user"].lower(),
            "errors": lambda t, x: not x or (t["status"] != "running" and t["exitstatus"] != "OK"),
        }
        for name, test in tests.items():
            if v.get(name) is not None:
                tasks = [t for t in tasks if test(t, v[name])]
        start = v.get("start", 0)
        return web.json_response(
            {"data": [_show_in_list(self._task_view(t, True)) for t in tasks[start : start + v.get("limit", 50)]]}
        )

    def _list_tasks(self, user: str, node: str | None = None) -> list[dict[str, Any]]:
        """Return the tasks that the user may see, newest first."""
        tasks = [
            t
            for t in self.tasklog
            if node in (None, t["node"])
            and t["upid"] not in self._forgotten
            and (self._task_owner(user, t) or self.allowed(user, "/nodes/" + t["node"], "Sys.Audit"))
        ]
        # Started in the same second: the later one first, so turned round before a sort that keeps their order.
        tasks.reverse()
        return sorted(tasks, key=lambda t: -t["starttime"])

    async def _task_log(self, request: web.Request) -> web.Response:
        """Return the log of a task. A task with warnings ends in TASK WARNINGS there."""
        response = await super()._task_log(request)
        return web.json_response(text=response.text.replace("TASK ERROR: WARNINGS:", "TASK WARNINGS:"))

    async def _task_abort(self, v: dict[str, Any], user: str) -> None:
        """Abort a task that runs."""
        task = self._find_task(v["node"], v["upid"], user)
        if task["status"] == "running":
            clone = "clone failed: copy failed: command '/usr/bin/qemu-img convert' failed: interrupted by signal"
            self.kill_task(task["upid"], clone if task["type"] == "qmclone" else UNEXPECTED)

    async def _cluster_tasks(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        return [_show_in_list(self._task_view(t, True)) for t in self._list_tasks(user)[:25]]


def _show_in_list(view: dict[str, Any]) -> dict[str, Any]:
    """Return a task as lists show it: the exit status stands in `status`, RUNNING where there is none yet."""
    if "status" in view:
        return view
    active = dict(view, status="RUNNING", saved="0")
    token = active.pop("tokenid", None)
    if token:
        active["user"] = f"{active['user']}!{token}"
    return active


def _undo_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
