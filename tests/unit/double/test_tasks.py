# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: tasks, their list and their ends."""

from __future__ import annotations

import time
from typing import Any

from support.double_api import clone_template, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_the_task_list_is_filtered_by_source_type_and_vmid(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    done = [api.nodes("pve1").qemu(101).status(action).post() for action in ("start", "stop", "start")]
    pve.next_task("qmstop", "hang")
    running = api.nodes("pve1").qemu(101).status.stop.post()

    def listed(**kw: Any) -> list[tuple[str, str]]:
        return [(task["upid"], task["status"]) for task in api.nodes("pve1").tasks.get(**kw)]

    assert listed(source="active") == [(running, "RUNNING")]
    assert listed(source="archive") == listed() == [(upid, "OK") for upid in reversed(done)]
    assert listed(source="all") == [(running, "RUNNING")] + [(upid, "OK") for upid in reversed(done)]
    assert listed(typefilter="qmstart") == [(done[2], "OK"), (done[0], "OK")]
    assert listed(limit=1) == [(done[2], "OK")] and listed(limit=1, start=2) == [(done[0], "OK")]
    assert listed(source="all", since=int(time.time()) + 60) == [] and len(listed(since=int(time.time()) - 60)) == 3
    assert [task["upid"] for task in api.cluster.tasks.get()] == [running, *reversed(done)]
    pve.release_task(running)
    assert exit_status(api, running) == "OK" and pve.vm(101).status == "stopped"


def test_an_unknown_task_or_a_wrong_node_is_400(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101)
    upid = api.nodes("pve1").qemu(101).status.start.post()
    for node, asked in (("pve2", upid), ("pve1", upid.replace(upid.split(":")[2], "0000FFFF"))):
        status, text = refusal_of(api.nodes(node).tasks(asked).status.get)
        assert status == 400 and "no such task" in text
    pve.forget_task(upid)
    assert refusal_of(api.nodes("pve1").tasks(upid).status.get)[0] == 400 and api.nodes("pve1").tasks.get() == []


def test_tasks_end_as_the_test_says(api: Any, pve: ProxmoxDouble) -> None:
    vm = api.nodes("pve1").qemu(101)
    pve.next_task("qmclone", "killed", vmid=101)
    assert exit_status(api, clone_template(api)) == "unexpected status" and pve.vm(101).lock == "clone"
    pve.remove_vm(101)
    pve.next_task("qmclone", "fail", text="clone failed: no space")
    assert exit_status(api, clone_template(api)) == "clone failed: no space" and pve.vm(101) is None
    clone_template(api)
    pve.next_task("qmstart", "vanish")
    assert (
        refusal_of(api.nodes("pve1").tasks(vm.status.start.post()).status.get)[0] == 400
        and pve.vm(101).status == "running"
    )
    vm.status.stop.post()
    pve.vm(101).task_warnings = {"qmdestroy": 2}
    upid = vm.delete()
    assert exit_status(api, upid) == "WARNINGS: 2" and pve.vm(101) is None
    assert api.nodes("pve1").tasks(upid).log.get()[-1]["t"] == "TASK WARNINGS: 2"
    clone_template(api)
    pve.next_task("qmdestroy", "killed", carry_out=True)
    assert exit_status(api, vm.delete()) == "unexpected status" and pve.vm(101) is None
