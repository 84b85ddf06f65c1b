# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE, about a VMID that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from support.double_api import TOKEN, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble


@pytest.mark.parametrize("action", ["start", "stop", "shutdown"])
def test_power_of_missing_vm_is_accepted_and_its_task_fails(api: Any, action: str) -> None:
    upid = api.nodes("pve1").qemu(999).status(action).post()
    missing = "unable to find configuration file for VM 999 on node 'pve1'"
    if action == "start":
        missing = "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist"
    assert exit_status(api, upid) == missing


def test_power_of_a_vm_on_another_node_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101, node="pve2")
    assert "does not exist" in exit_status(api, api.nodes("pve1").qemu(101).status.start.post())


def test_a_request_about_a_missing_vm_is_500_with_its_file(api: Any) -> None:
    one = api.nodes("pve1").qemu(999)
    for call in (one.config.get, one.status.current.get, one.delete):
        assert refusal_of(call) == (500, "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist ")
    for call in (one.status.reboot.post, lambda: one.clone.post(newid=101)):
        status, text = refusal_of(call)
        assert status == 500 and "unable to find configuration file for VM 999 on node 'pve1'" in text


def test_a_missing_vm_without_rights_is_403(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    one = api.nodes("pve1").qemu(999)
    for call in (
        one.config.get,
        one.status.current.get,
        one.status.start.post,
        one.delete,
        lambda: one.config.put(description="x"),
    ):
        assert refusal_of(call)[0] == 403
