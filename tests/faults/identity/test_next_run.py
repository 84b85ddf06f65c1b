# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""After a time-out or a lost answer the next run checks the VM again before it acts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    Kept,
    OutcomeUnknown,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from support.lab import Lab
from support.strangers import try_everything

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("fault", ["cut-before", "cut-after"])
def test_clone_whose_answer_was_lost_and_a_stranger_at_its_vmid(lab: Lab, fault: str) -> None:
    strangers_vm = []

    def swap(method: str, path: str) -> None:
        # Before the clone is looked for, which happens at once.
        if method == "GET" and path.endswith("/cluster/resources") and lab.pve.vm(1005) is not None:
            lab.pve.before = None
            strangers_vm.append(lab.swap(1005, running=True))

    lab.pve.fault("POST", "/clone", fault)
    lab.pve.before = swap
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    lab.pve.before = None
    vm = strangers_vm[0] if strangers_vm else lab.swap(1005, running=True)
    assert bool(strangers_vm) is (fault == "cut-after")
    time.sleep(1.1)
    for _dummy in range(3):
        lab.reconcile()
    lab.untouched(vm, status="running")
    try_everything(lab, lab.records()[0])
    lab.untouched(vm, status="running")


@pytest.mark.way(7)
@pytest.mark.parametrize("operation", ["stop", "destroy", "prune", "expire"])
def test_time_out_while_stopping_then_the_vmid_is_somebody_elses(lab: Lab, operation: str) -> None:
    ours = lab.create()
    if operation in ("prune", "expire"):
        lab.force_state(
            ours.vmid, "TIMEOUT" if operation == "prune" else "RUNNING", lease_expires_at=int(time.time()) - 5
        )
    lab.pve.task_endings.update(qmstop="hang", qmshutdown="hang")
    runs: dict[str, Callable[[], Any]] = {
        "stop": lambda: lab.power("stop", ours.vmid, wait_timeout=1),
        "destroy": lambda: lab.destroy(ours.vmid, force=True, wait_timeout=1),
        "prune": lambda: lab.prune(options={"wait_timeout": 1}),
        "expire": lambda: lab.expire(wait_timeout=1),
    }
    try:
        runs[operation]()
    except AgentlabError as error:
        assert error.message
    lab.pve.task_endings.clear()
    vm = lab.swap(ours.vmid, running=True, tags="agentlab", name="a1")
    for _dummy in range(2):
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).state == "DESTROYED"


@pytest.mark.parametrize("fault", ["cut-before", "cut-after"])
def test_delete_whose_answer_was_lost_then_the_vmid_is_somebody_elses(lab: Lab, fault: str) -> None:
    ours = lab.timed_out()
    lab.pve.fault("DELETE", f"/qemu/{ours.vmid}", fault)
    report = lab.prune()
    assert len(report.failed) == 1
    vm = lab.swap(ours.vmid, running=True, tags="agentlab", name="a1")
    for _dummy in range(2):
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).state == "DESTROYED"
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_resumed_create_does_not_take_a_stranger_for_its_clone(lab: Lab) -> None:
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    vm = lab.swap(1005, running=True, name="a1", tags="agentlab")
    time.sleep(1.1)
    with pytest.raises(AgentlabError) as caught:
        lab.create(vmid=1005)
    assert isinstance(caught.value, (CreationFailed, Kept)) and caught.value.message
    lab.untouched(vm, status="running")


def test_copied_marker_is_not_bound_without_our_own_clone_task(lab: Lab) -> None:
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create(vmid=1005)
    ours = lab.records()[0]
    lab.pve.tasklog.clear()
    vm = lab.swap(1005, running=True, description=identity.make_marker(ours.uuid))
    time.sleep(1.1)
    for _dummy in range(2):
        with pytest.raises(AgentlabError):
            lab.create(vmid=1005)
        try_everything(lab, ours)
    lab.untouched(vm, status="running")
    assert lab.record(ours).smbios_uuid is None and lab.record(ours).live
