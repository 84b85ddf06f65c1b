# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A record that is DESTROYED is never revived."""

from __future__ import annotations

import uuid

import pytest

from support.lab import Lab
from support.strangers import STRANGERS, strangers, try_everything

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("stranger", strangers(way=5))
def test_destroyed_record_is_never_revived(lab: Lab, stranger: str) -> None:
    ours = lab.create()
    lab.destroy(ours.vmid, force=True)
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    try_everything(lab, ours)
    lab.info()
    assert lab.record(ours).state == "DESTROYED" and len(lab.records()) == 1
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")


def test_destroyed_record_is_not_revived_by_its_own_vm_coming_back(lab: Lab) -> None:
    # Somebody restores a backup of a sandbox that is gone: reported, never adopted, never deleted.
    ours = lab.create()
    config = dict(lab.pve.vm(ours.vmid).config)
    lab.destroy(ours.vmid, force=True)
    vm = lab.pve.add_vm(ours.vmid, "a1", status="running", config={**config, "smbios1": f"uuid={uuid.uuid4()}"})
    lab.pve.requests.clear()
    drifts = lab.reconcile()
    assert [one.kind for one in drifts] == ["unrecorded"]
    assert lab.record(ours).state == "DESTROYED"
    lab.untouched(vm, status="running")
    lab.pve.vms.remove(vm)
