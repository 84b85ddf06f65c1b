# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A creation whose VMID is taken says so and cleans up nothing of the other VM."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import CreationFailed

from support.double import TOKEN_ID
from support.lab import Lab
from support.strangers import STRANGERS, strangers

pytestmark = pytest.mark.faults

ALL_PRIVS = (
    "VM.Audit",
    "VM.Allocate",
    "VM.PowerMgmt",
    "VM.Clone",
    "VM.Config.Options",
    "VM.Config.HWType",
    "VM.Config.Network",
    "VM.Config.Disk",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Cloudinit",
    "VM.GuestAgent.Audit",
    "VM.Monitor",
)


def hidden_from_token(lab: Lab, *hidden: int) -> None:
    """The token may do everything, except that it sees nothing of these VMIDs."""
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")
    lab.pve.grant(TOKEN_ID, "/storage", "Datastore.AllocateSpace", "Datastore.Audit")
    lab.pve.grant(TOKEN_ID, "/sdn", "SDN.Use")
    for vmid in {9000, 500, *range(1000, 1010)} - set(hidden):
        lab.pve.grant(TOKEN_ID, f"/vms/{vmid}", *ALL_PRIVS)
    for vmid in hidden:
        lab.pve.grant(TOKEN_ID, f"/vms/{vmid}", "VM.Allocate")


@pytest.mark.parametrize("stranger", strangers(way=6))
def test_creation_at_a_taken_vmid_says_so_and_cleans_up_nothing(lab: Lab, stranger: str) -> None:
    vm = lab.swap(1005, **STRANGERS[stranger])
    with pytest.raises(CreationFailed, match="vmid: 1005 is occupied by a VM that is not ours"):
        lab.create(vmid=1005)
    lab.untouched(vm)
    lab.reconcile()
    lab.untouched(vm)
    assert lab.leftovers() == {"claims": [], "operations": []}


@pytest.mark.way(6)
@pytest.mark.parametrize("node", ["pve1", "pve2"])
@pytest.mark.parametrize("running", [True, False])
def test_creation_at_the_vmid_of_a_vm_the_token_cannot_see(lab: Lab, node: str, running: bool) -> None:
    vm = lab.swap(1005, node=node, running=running)
    hidden_from_token(lab, 1005)
    with pytest.raises(CreationFailed, match="1005") as caught:
        lab.create(vmid=1005)
    assert "occupied by a VM that is not ours" in caught.value.message
    lab.untouched(vm, status="running" if running else "stopped")
    assert all(not one.live or one.state == "FAILED" for one in lab.records())
    for _dummy in range(3):
        lab.reconcile()
    lab.prune()
    for one in lab.records():
        lab.destroy(one.vmid, force=True)
    lab.untouched(vm, status="running" if running else "stopped")


@pytest.mark.parametrize("node", ["pve1", "pve2"])
def test_creation_without_vmid_passes_over_what_the_token_cannot_see(lab: Lab, node: str) -> None:
    vm = lab.swap(1000, node=node, running=True)
    hidden_from_token(lab, 1000)
    made = lab.create()
    assert made.vmid != 1000 and made.state == "RUNNING"
    lab.untouched(vm, status="running")


@pytest.mark.parametrize("node", ["pve1", "pve2"])
def test_vmid_taken_between_the_list_and_the_clone(lab: Lab, node: str) -> None:
    found: list[Any] = []

    def take(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone") and not found:
            found.append(lab.pve.make_foreign(1005, running=True, node=node))

    lab.pve.before = take
    with pytest.raises(CreationFailed, match="occupied"):
        lab.create(vmid=1005)
    lab.pve.before = None
    lab.reconcile()
    lab.untouched(found[0], status="running")
