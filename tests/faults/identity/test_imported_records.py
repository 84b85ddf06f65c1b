# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records that were brought in from elsewhere adopt no VM."""

from __future__ import annotations

import time

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import CreationFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from support.lab import Lab
from support.strangers import STRANGERS, strangers, try_everything

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("state", ["READY", "RUNNING", "TIMEOUT", "STOPPED", "FAILED"])
@pytest.mark.parametrize("stranger", strangers(way=13))
def test_an_imported_record_without_a_uuid_adopts_nobody(lab: Lab, state: str, stranger: str) -> None:
    """As a list of VMIDs from another tool would be written into the database: name and VMID fit, and that proves
    nothing.
    """
    ours = lab.create()
    vm = lab.swap(ours.vmid, **STRANGERS[stranger])
    lab.force_state(ours.vmid, state, smbios_uuid=None, lease_expires_at=int(time.time()) - 5)
    before = dict(vm.config)
    words = try_everything(lab, ours)
    assert not [word for word in words if word.startswith(("start: started", "stop: stopped", "suspend: suspended"))], (
        words
    )
    lab.untouched(vm, status="running" if STRANGERS[stranger].get("running") else "stopped")
    assert vm.config == before
    now = lab.record(ours)
    assert now.smbios_uuid is None and (now.state, now.reason) == ("DESTROYED", "vmid_reused")


@pytest.mark.way(13)
@pytest.mark.parametrize("state", ["RUNNING", "TIMEOUT", "STOPPED"])
def test_an_imported_record_without_a_uuid_is_not_bound_by_a_copied_marker(lab: Lab, state: str) -> None:
    ours = lab.create()
    lab.force_state(ours.vmid, state, smbios_uuid=None)
    vm = lab.swap(ours.vmid, running=True, name="a1", tags="agentlab", description=identity.make_marker(ours.uuid))
    before = dict(vm.config)
    words = try_everything(lab, ours)
    assert "force: kept ambiguous" in words
    lab.untouched(vm, status="running")
    assert vm.config == before and lab.record(ours).smbios_uuid is None and lab.record(ours).state == state


@pytest.mark.way(13)
def test_asking_for_a_sandbox_by_the_vmid_or_name_of_a_stranger_adopts_nobody(lab: Lab) -> None:
    vm = lab.swap(1005, name="wanted", tags="agentlab", running=True)
    with pytest.raises(CreationFailed, match="occupied by a VM that is not ours"):
        lab.create("wanted", vmid=1005)
    made = lab.create("wanted")
    assert made.vmid != 1005
    lab.destroy(made.vmid, force=True)
    lab.untouched(vm, status="running")
