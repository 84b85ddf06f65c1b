# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM that is replaced or changed between check and delete is not deleted."""

from __future__ import annotations

from typing import Any

import pytest

from support.lab import Lab
from support.strangers import STRANGERS

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("stranger", STRANGERS)
def test_swap_right_before_the_mark_is_caught_by_the_digest(lab: Lab, stranger: str) -> None:
    ours = lab.timed_out()
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config") and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, **STRANGERS[stranger]))

    lab.pve.before = swap
    report = lab.prune()
    vm = swapped[0]
    before = dict(vm.config)
    # The one write that reached the stranger was the guarded one, and it was refused: its configuration is as it was.
    assert [line for line in lab.pve.touched(ours.vmid) if not line.startswith("PUT")] == []
    assert vm in lab.pve.vms and vm.config == before and "agentlab-delete" not in str(vm.config.get("description"))
    assert vm.status == ("running" if STRANGERS[stranger].get("running") else "stopped")
    assert [one.reason for one in report.pruned] == ["vmid_reused"] or [
        one.reason for one in report.kept + report.failed
    ]
    lab.pve.before = None
    lab.pve.requests.clear()
    lab.prune()
    lab.reconcile()
    assert lab.record(ours).state == "DESTROYED" and lab.record(ours).reason == "vmid_reused"
    lab.untouched(vm)


def test_change_of_our_vm_right_before_the_mark_is_judged_again(lab: Lab) -> None:
    ours = lab.timed_out()
    changes: list[int] = []

    def change(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config") and not changes:
            changes.append(1)
            lab.pve.vm(ours.vmid).config["cores"] = 7

    lab.pve.before = change
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


def test_configuration_that_keeps_changing_is_left_alone(lab: Lab) -> None:
    ours = lab.timed_out()

    def change(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config"):
            lab.pve.vm(ours.vmid).config["memory"] = int(lab.pve.vm(ours.vmid).config.get("memory", 1)) + 1

    lab.pve.before = change
    assert [one.reason for one in lab.prune().kept] == ["changed"]
    assert lab.record(ours).state == "TIMEOUT" and lab.pve.vm(ours.vmid) is not None
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_protection_set_right_before_the_mark_is_respected(lab: Lab) -> None:
    ours = lab.timed_out()

    def protect(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(f"/qemu/{ours.vmid}/config"):
            lab.pve.vm(ours.vmid).config["protection"] = 1

    lab.pve.before = protect
    assert [one.reason for one in lab.prune().kept] == ["protected"]
    assert lab.pve.vm(ours.vmid) is not None


def test_swap_while_it_is_being_stopped_is_seen_before_the_delete(lab: Lab) -> None:
    ours = lab.timed_out(stopped=False)
    swapped: list[Any] = []

    def swap(method: str, path: str) -> None:
        if method == "GET" and "/tasks/" in path and not swapped:
            swapped.append(lab.pve.make_foreign(ours.vmid, name="theirs"))

    lab.pve.before = swap
    lab.destroy(ours.vmid, force=True)
    assert swapped
    assert swapped[0] in lab.pve.vms and "agentlab-delete" not in str(swapped[0].config.get("description"))
    assert not [line for line in lab.pve.touched(ours.vmid) if line.startswith("DELETE")]
