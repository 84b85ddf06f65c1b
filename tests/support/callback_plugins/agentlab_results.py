# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes every task result as one JSON line to the file named by AGENTLAB_TEST_RESULTS.

So a test knows what a play did without reading its output.

Before each task it tells the test (on the socket AGENTLAB_TEST_HOOK, if there is one) and waits until the test has done
its part.
"""

from __future__ import annotations

import json
import os
import socket
import typing as t

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: agentlab_results
type: notification
short_description: Writes task results as JSON lines
description:
  - For tests only. Writes one JSON object a task, or a loop item, and host to the file named by
    E(AGENTLAB_TEST_RESULTS).
"""


def _of(result: t.Any, name: str) -> t.Any:
    """Return a part of a task's result: ansible-core 2.19 made public what older releases keep under private names."""
    return getattr(result, name) if hasattr(result, name) else getattr(result, f"_{name}")


class CallbackModule(CallbackBase):
    """Writes each result of a task to a file, and tells the test of each task before it starts."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "agentlab_results"
    CALLBACK_NEEDS_ENABLED = True

    def _dump(self, result: t.Any, status: str, **more: t.Any) -> None:
        data, task = _of(result, "result"), _of(result, "task")
        if status == "ok" and data.get("changed"):
            status = "changed"
        entry = {
            "task": task.name or task.action,
            "action": task.action,
            "host": _of(result, "host").name,
            "status": status,
            "result": data,
            **more,
        }
        with open(os.environ["AGENTLAB_TEST_RESULTS"], "a", encoding="utf-8") as out:
            out.write(json.dumps(entry, default=str) + "\n")

    def v2_playbook_on_task_start(self, task: t.Any, is_conditional: bool) -> None:
        """Tell the test that a task is about to start, and wait until the test lets it go on."""
        path = os.environ.get("AGENTLAB_TEST_HOOK")
        if not path:
            return
        with socket.socket(socket.AF_UNIX) as hook:
            hook.settimeout(60)
            hook.connect(path)
            hook.sendall(json.dumps(task.name or task.action).encode() + b"\n")
            hook.recv(1)

    def v2_runner_on_ok(self, result: t.Any) -> None:
        """Write the result of a task that succeeded."""
        self._dump(result, "ok")

    def v2_runner_on_failed(self, result: t.Any, ignore_errors: bool = False) -> None:
        """Write the result of a task that failed."""
        self._dump(result, "failed", ignored=ignore_errors)

    def v2_runner_on_skipped(self, result: t.Any) -> None:
        """Write that a task was skipped."""
        self._dump(result, "skipped")

    def v2_runner_on_unreachable(self, result: t.Any) -> None:
        """Write that a task did not reach its host."""
        self._dump(result, "unreachable")

    def v2_runner_item_on_ok(self, result: t.Any) -> None:
        """Write the result of an item of a loop that succeeded."""
        self._dump(result, "ok", item=True)

    def v2_runner_item_on_failed(self, result: t.Any) -> None:
        """Write the result of an item of a loop that failed."""
        self._dump(result, "failed", item=True)

    def v2_runner_item_on_skipped(self, result: t.Any) -> None:
        """Write that an item of a loop was skipped."""
        self._dump(result, "skipped", item=True)
