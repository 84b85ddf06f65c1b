# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A creation whose caller was told to run again: that is true at each phase, while a daemon reconciles every second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import agentlab
from support.daemon import Daemon
from support.lab import Lab
from support.play import play

Make = Callable[..., Daemon]


def hang(kind: str) -> Callable[[Lab], Callable[[], Any]]:
    """Have the next task of that type outlast every wait; the answer lets it go on."""

    def begin(lab: Lab) -> Callable[[], Any]:
        lab.pve.next_task(kind, "hang")
        return lambda: lab.pve.release_task(lab.pve.running_tasks(kind)[0])

    return begin


def lose(method: str, path: str) -> Callable[[Lab], Callable[[], Any]]:
    """Have the answers to these requests be lost, until the answer is called."""

    def begin(lab: Lab) -> Callable[[], Any]:
        lab.pve.fault(method, path, "cut-before", times=999)
        return lab.pve.clear_faults

    return begin


def silence_guest(lab: Lab) -> Callable[[], Any]:
    lab.pve.agent_default = False

    def wake() -> None:
        lab.pve.agent_default = True
        lab.pve.start_agent(lab.pve.vm(1000))

    return wake


PHASES = {
    "clone": hang("qmclone"),
    "configure": lose("PUT", "/qemu/1000/config"),
    "resize": hang("resize"),
    "address": silence_guest,
}


def let_it_reconcile(agentlabd: Daemon) -> None:
    """Wait for the end of a pass. What it failed at is told in the status; its time has seconds."""
    last = agentlabd.get("/v1/status").body["reconcile"]["last_run"]
    agentlabd.wait_for(
        lambda: agentlabd.get("/v1/status").body["reconcile"]["last_run"] not in (None, last), "it reconciles", 30
    )


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_api_says_is_true(daemon: Make, lab: Lab, phase: str) -> None:
    # Long enough for a busy machine, once nothing hangs any more.
    agentlabd = daemon(wait_timeout="3s", reconcile_interval="1s")
    mend = PHASES[phase](lab)
    wanted = {"name": "a1", "disk_size": "+10G", "wait_for_ip": True}
    first = agentlabd.post("/v1/sandboxes", wanted)
    assert first.status >= 400 and "run again" in first.body["error"].lower(), first
    let_it_reconcile(agentlabd)
    mend()
    let_it_reconcile(agentlabd)
    again = agentlabd.good("POST", "/v1/sandboxes", wanted, 201)
    assert (again["vmid"], again["state"]) == (1000, "RUNNING")
    assert len(lab.ours()) == 1 and lab.leftovers() == {"claims": [], "operations": []}


def test_what_the_command_line_says_is_true_also_without_a_name(daemon: Make, lab: Lab) -> None:
    agentlabd = daemon(wait_timeout="1s", reconcile_interval="1s")
    mend = hang("qmclone")(lab)
    first = agentlab("sandbox", "new", socket=agentlabd.socket)
    name = lab.records()[0].name
    # Without a name a second run would make a second sandbox.
    assert first.returncode != 0 and f"Give its name then ({name})" in first.stderr, first
    let_it_reconcile(agentlabd)
    mend()
    let_it_reconcile(agentlabd)
    again = agentlab("sandbox", "new", "--name", name, socket=agentlabd.socket)
    assert again.returncode == 0 and f"sandbox 1000 created (name={name}" in again.stdout, again
    assert [one.state for one in lab.records()] == ["RUNNING"]


def test_what_a_module_says_of_items_is_true(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    agentlabd = daemon(reconcile_interval="1s")
    lab.pve.next_task("qmclone", "hang")

    def run(patience: int) -> Any:
        options = {"database": lab.database, "template": "debian-13", "wait_timeout": patience}
        task = {"agentlab.proxmox.agentlab_sandbox": {**options, "items": [{"name": "a1"}, {"vmid": 1005}]}}
        name = f"wait {patience}"
        result = play([{"name": name, **task}], lab.server.environment(lab.folder), tmp_path)[name]
        assert "results" in result, result
        return result

    told = [row["message"] for row in run(1)["results"] if row["outcome"] == "failed"]
    assert len(told) == 1 and "Run again" in told[0], told
    let_it_reconcile(agentlabd)
    lab.pve.release_task(lab.pve.running_tasks("qmclone")[0])
    let_it_reconcile(agentlabd)
    assert run(20)["failed_count"] == 0
    assert sorted((one.vmid, one.state) for one in lab.records()) == [(1000, "RUNNING"), (1005, "RUNNING")]
