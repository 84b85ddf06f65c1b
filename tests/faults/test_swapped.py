# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM that changes between two steps: another one has the VMID by now, or the same one is in another state."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    Kept,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

from faults.attack_support import NOTHING_LEFT, try_all, two_nodes
from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    with two_nodes(one_lab):
        yield one_lab


def swap_when(
    lab: Lab, vmid: int, matches: Callable[[str, str], bool], *, moment: str = "before", running: bool
) -> list[Any]:
    """Let a stranger's VM take the VMID at the first request that matches (method, path).

    Returns a list that holds the stranger's VM from then on.
    """
    strangers: list[Any] = []

    def swap(method: str, path: str) -> None:
        if matches(method, path) and not strangers:
            strangers.append(lab.pve.make_foreign(vmid, running=running))
            lab.pve.requests.clear()

    setattr(lab.pve, moment, swap)
    return strangers


@pytest.mark.parametrize("operation", ["stop", "force", "suspend"])
def test_a_second_try_to_stop_judges_anew(lab: Lab, operation: str) -> None:
    """The first try failed for a lock and took its time; whoever has the VMID by then is not stopped."""
    ours = lab.create()
    task = {"stop": "qmshutdown", "force": "qmstop", "suspend": "qmpause"}[operation]
    lab.pve.next_task(
        task,
        "fail",
        text=f"can't lock file '/var/lock/qemu-server/lock-{ours.vmid}.conf' - got timeout",
        carry_out=False,
    )
    swapped = swap_when(
        lab, ours.vmid, lambda method, path: method == "GET" and "/tasks" in path, moment="after", running=True
    )
    try:
        lab.destroy(ours.vmid, force=True) if operation == "force" else lab.power(operation, ours.vmid)
    except AgentlabError as error:
        assert error.message
    assert swapped
    lab.pve.after = None
    lab.untouched(swapped[0], status="running")


@pytest.mark.parametrize(
    "said",
    [
        "got no worker upid - start worker failed",
        "can't lock file '/var/lock/qemu-server/lock-1000.conf' - got timeout",
    ],
)
def test_a_second_try_to_delete_judges_and_marks_anew(lab: Lab, said: str) -> None:
    ours = lab.timed_out()
    lab.pve.fail("DELETE", f"/qemu/{ours.vmid}", 500, said, times=1)
    swapped = swap_when(lab, ours.vmid, lambda method, _path: method == "DELETE", moment="after", running=False)
    lab.prune()
    assert swapped
    lab.pve.after = None
    assert swapped[0] in lab.pve.vms, "the second DELETE was sent without looking again"
    assert [line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")] == []
    assert "agentlab-delete" not in str(swapped[0].config.get("description"))


def test_a_mark_that_met_a_change_is_set_anew_however_proxmox_spells_it(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.fail("PUT", "/config", 500, "checksum missmatch (file change by other user?)", times=1)
    assert [outcome.reason for outcome in lab.prune().pruned] == ["destroyed"] and lab.record(ours).state == "DESTROYED"


def test_a_delete_that_was_not_begun_is_tried_again(lab: Lab) -> None:
    ours = lab.timed_out()
    lab.pve.fail("DELETE", f"/qemu/{ours.vmid}", 500, "got no worker upid - start worker failed", times=2)
    assert [outcome.reason for outcome in lab.prune().pruned] == ["destroyed"]


def swapped_at(lab: Lab, method: str, ending: str, moment: str = "after", **options: Any) -> Any:
    """The stranger that takes a creation's VMID at its first request of that kind; the creation has failed."""
    swapped: list[Any] = []

    def swap(asked: str, path: str) -> None:
        if asked == method and path.endswith(ending) and not swapped:
            vmid = int(re.search(r"/qemu/(\d+)", path)[1])  # type: ignore[index]
            swapped.append(lab.pve.make_foreign(vmid))
            lab.pve.requests.clear()

    setattr(lab.pve, moment, swap)
    with pytest.raises(AgentlabError):
        lab.create(**options)
    setattr(lab.pve, moment, None)
    return swapped[0]


@pytest.mark.parametrize("act", ["force", "prune"])
def test_a_vm_swapped_while_the_quorum_is_looked_at_is_not_stopped(lab: Lab, act: str) -> None:
    ours = lab.create() if act == "force" else lab.timed_out(stopped=False)
    swapped = swap_when(lab, ours.vmid, lambda _method, path: path.endswith("/ha/status/current"), running=True)
    if act == "force":
        lab.destroy(ours.vmid, force=True)
    else:
        lab.prune()
    lab.untouched(swapped[0], status="running")


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("operation", ["start", "stop"])
def test_a_vm_swapped_while_its_power_state_is_looked_at_is_left_alone(lab: Lab, operation: str, runs: bool) -> None:
    """And what was said of the stranger's power is not written down as the sandbox's."""
    ours = lab.create()
    if operation == "start":
        lab.power("stop", ours.vmid)
    ctx = lab.context()
    # The list lags.
    ctx.cluster.list_vms()[ours.vmid]["status"] = "stopped"
    swapped = swap_when(lab, ours.vmid, lambda _method, path: path.endswith("/status/current"), running=runs)
    with pytest.raises(Kept, match="now belongs to another VM"):
        power.run(ctx, ctx.select_sandbox(ours.vmid), operation)
    lab.untouched(swapped[0], status="running" if runs else "stopped")
    assert lab.record(ours).state == ("STOPPED" if operation == "start" else "RUNNING")


@pytest.mark.parametrize("limits", [{"node_connections": 1}, {"connections": 1}])
def test_no_queue_of_ours_lies_between_judging_and_acting(tmp_path: Path, limits: dict[str, Any]) -> None:
    """The others' slow reads take the only place; whoever acts waits for it before the VM is judged."""
    lab = Lab(tmp_path, storage=None)
    try:
        made = [lab.create(name) for name in ("a1", "b1", "c1")]
        seen: dict[int, list[tuple[str, float]]] = {sandbox.vmid: [] for sandbox in made}

        def note(method: str, path: str) -> None:
            match = re.search(r"/qemu/(\d+)(.*)", path)
            if match and int(match[1]) in seen and "/tasks/" not in path:
                seen[int(match[1])].append((f"{method} {match[2]}", time.monotonic()))

        lab.pve.before = note
        for sandbox in made:
            lab.pve.fault("GET", f"/qemu/{sandbox.vmid}/config", "hang", seconds=0.7, carry_out=True, times=20)
        base = lab.context(**limits)
        with ThreadPoolExecutor(3) as pool:

            def away(vmid: int) -> Any:
                ctx = base.derive(actor="x")
                return destroy.run(ctx, [(ctx.select_sandbox(vmid), destroy.Request(force=True))])[0].outcome

            assert list(pool.map(away, seen)) == ["destroyed"] * 3
        for requests in seen.values():
            for (before, _at), (what, at) in itertools.pairwise(requests):
                if what in ("POST /status/stop", "DELETE "):
                    last = max(
                        moment for asked, moment in requests if moment < at and asked in ("GET /config", "PUT /config")
                    )
                    # The read itself hangs for 0.7 s.
                    assert before in ("GET /config", "PUT /config") and at - last < 1.2, requests
    finally:
        lab.stop()


def test_a_disk_is_resized_only_while_the_vm_is_what_it_was_judged_to_be(lab: Lab) -> None:
    stranger = swapped_at(lab, "PUT", "/config", disk_size="20G")
    lab.untouched(stranger, status="stopped")
    try_all(lab, stranger.vmid)
    lab.untouched(stranger, status="stopped")


def test_a_vm_swapped_while_its_disk_is_resized_is_not_started(lab: Lab) -> None:
    lab.untouched(swapped_at(lab, "PUT", "/resize", disk_size="20G"), status="stopped")


@pytest.mark.parametrize("moment", ["rules", "options"])
def test_a_vm_swapped_while_its_firewall_is_set_gets_no_rule(lab: Lab, moment: str) -> None:
    lab.untouched(swapped_at(lab, "GET", f"/firewall/{moment}", "before", firewall_group="agents"), status="stopped")


@pytest.mark.parametrize("done", [True, False])
def test_a_delete_task_that_hangs_ends_with_its_vm(lab: Lab, done: bool) -> None:
    """Its work done, the proof that the VM is gone is enough; not done, nothing is deleted beside it until somebody
    has stopped it.
    """
    made = lab.create()
    if done:
        lab.pve.task_endings["qmdestroy"] = "hang"
    else:
        lab.pve.next_task("qmdestroy", "hang")
    assert "stop the task there if it hangs" in str(lab.destroy(made.vmid, force=True, wait_timeout="1s")[0].message)
    lab.pve.task_endings.clear()
    lab.pve.requests.clear()
    outcome = lab.destroy(made.vmid, force=True, wait_timeout="1s")[0]
    if not done:
        assert (
            outcome.failed
            and "stop the task there if it hangs" in str(outcome.message)
            and lab.pve.touched(made.vmid) == []
        )
        lab.pve.kill_task(lab.pve.running_tasks("qmdestroy")[0])
        outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.outcome == "destroyed" and lab.pve.vm(made.vmid) is None and lab.leftovers() == NOTHING_LEFT
