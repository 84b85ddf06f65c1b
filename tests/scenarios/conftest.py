# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the scenarios: a story told in one playbook, and sandboxes that are there before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.double import Server
from support.play import Run, play
from support.shards import keep_part
from support.story import tell


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_part(config, items)


@pytest.fixture
def story(env: dict[str, str], tmp_path: Path, server: Server) -> Callable[..., Run]:
    """story(tasks, check=..., diff=..., args=...): run them in one playbook, and insist that it went as the tasks
    say.
    """

    def run(tasks: list[dict[str, Any]], **options: Any) -> Run:
        return tell(tasks, {**env, **options.pop("more", {})}, tmp_path, server.pve, **options)

    return run


@pytest.fixture
def given(context: Callable[..., Any], server: Server) -> Callable[..., list[Any]]:
    """given(3, state="TIMEOUT", tags=["x"]): so many running (or what else) sandboxes, made by the core itself;
    their records.
    """
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

    def make(count: int = 1, state: str = "RUNNING", **values: Any) -> list[Any]:
        ctx = context()
        sandboxes = []
        for _dummy in range(count):
            ctx.refresh()
            values.setdefault("ttl", 3600)
            sandbox = create.run(ctx, create.Spec(**values)).sandbox
            if state in ("STOPPED", "SUSPENDED", "COMPLETED", "FAILED"):
                operation = {"STOPPED": "stop", "SUSPENDED": "suspend", "COMPLETED": "complete", "FAILED": "fail"}[
                    state
                ]
                sandbox = power.run(ctx, sandbox, operation).sandbox
            elif state == "TIMEOUT":
                ctx.database.write(
                    lambda conn, uuid=sandbox.uuid: conn.execute(
                        "UPDATE sandboxes SET lease_expires_at = 1 WHERE uuid = ?", (uuid,)
                    )
                )
                sandbox = ctx.records.expire(ctx.records.get(sandbox.uuid), ctx.clock.now())
            sandboxes.append(ctx.records.get(sandbox.uuid))
        ctx.close()
        server.pve.counted.clear()
        return sandboxes

    return make


@pytest.fixture
def box(server: Server, given: Any) -> Any:
    """The record of the running sandbox ``box``, whose guest runs commands."""
    server.pve.agent_default = True
    (sandbox,) = given(name="box")
    return sandbox


@pytest.fixture
def inside(env: dict[str, str], tmp_path: Path, server: Server, box: Any) -> Callable[..., Run]:
    """inside(tasks, variable=...): run the tasks in the sandbox; requests to Proxmox are counted by task."""

    def run(tasks: list[dict[str, Any]], host: str = "box", **variables: Any) -> Run:
        folder = server.pve.machine(box.vmid).folder
        values = {
            "ansible_connection": "agentlab.proxmox.sandbox",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_remote_tmp": f"{folder}/ansible",
            "guest": str(folder),
            **variables,
        }
        inventory = tmp_path / "boxes.yml"
        inventory.write_text(yaml.safe_dump({"all": {"hosts": {host: values}}}), encoding="utf-8")
        whole = [{"name": "inside", "hosts": host, "gather_facts": False, "tasks": tasks}]
        return play(whole, env, tmp_path, pve=server.pve, args=("-i", str(inventory)))

    return run
