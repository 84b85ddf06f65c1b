# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: power, pause and hibernation."""

from __future__ import annotations

from typing import Any

from support.double_api import clone_template, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble

# ---- power


def test_template_does_not_start(api: Any) -> None:
    assert "template" in exit_status(api, api.nodes("pve1").qemu(9000).status.start.post())


def test_stop_and_shutdown_of_a_stopped_vm_are_fine(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    for action in ("stop", "shutdown"):
        assert exit_status(api, api.nodes("pve1").qemu(101).status(action).post()) == "OK"
    assert refusal_of(api.nodes("pve1").qemu(101).status.reset.post)[0] == 500


def test_stop_of_a_running_locked_vm_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running", lock="backup")
    assert exit_status(api, api.nodes("pve1").qemu(101).status.stop.post()) == "VM is locked (backup)"


def test_started_clone_answers_the_agent_until_it_stops(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    vm = api.nodes("pve1").qemu(101)
    assert refusal_of(vm.agent("network-get-interfaces").get)[0] == 500
    vm.status.start.post()
    found = vm.agent("network-get-interfaces").get()["result"]
    assert [a["ip-address"] for i in found for a in i["ip-addresses"] if a["ip-address"].startswith("192.0.2.")] == [
        pve.address_of(101)
    ]
    vm.status.stop.post()
    assert refusal_of(vm.agent("network-get-interfaces").get)[0] == 500


# ---- power and hibernation


def test_a_hibernated_vm_is_stopped_and_locked(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.status.start.post()
    assert exit_status(api, vm.status.suspend.post(todisk=1)) == "OK"
    assert (
        vm.status.current.get()["status"] == "stopped"
        and vm.config.get()["lock"] == "suspended"
        and pve.volumes_of(101)[-1].endswith(".raw")
    )
    for end in (vm.status.stop.post(), vm.status.shutdown.post()):
        assert exit_status(api, end) == "OK" and vm.config.get()["lock"] == "suspended"
    assert refusal_of(lambda: vm.config.put(description="x")) == (500, "VM is locked (suspended) ")
    assert refusal_of(vm.status.suspend.post)[0] == 500
    pve.vm(101).start_error = "start failed: QEMU exited with code 1"
    for end in (vm.status.start.post(), vm.status.resume.post()):
        assert (
            exit_status(api, end) == "start failed: QEMU exited with code 1" and vm.config.get()["lock"] == "suspended"
        )
    pve.vm(101).start_error = None
    assert exit_status(api, vm.status.resume.post()) == "OK" and vm.status.current.get()["qmpstatus"] == "running"
    assert not {"lock", "vmstate", "runningcpu"} & set(vm.config.get()) and not [
        name for name in pve.volumes_of(101) if "state" in name
    ]


def test_the_state_of_a_hibernated_vm_is_thrown_away(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.hibernate(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(delete="vmstate", description="kept", digest=vm.config.get()["digest"])
    assert not {"lock", "vmstate", "runningcpu"} & set(vm.config.get()) and vm.config.get()["description"] == "kept"
    assert exit_status(api, vm.status.start.post()) == "OK"
    vm.status.stop.post()
    pve.hibernate(101)
    assert exit_status(api, vm.delete(purge=1)) == "OK" and pve.volumes_of(101) == []


def test_a_hibernation_that_fails_leaves_the_vm_running_and_locked(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")
    vm = api.nodes("pve1").qemu(101)
    pve.hibernation_error = "VM 101 qmp command 'savevm-start' failed"
    assert exit_status(api, vm.status.suspend.post(todisk=1)) == pve.hibernation_error
    assert vm.status.current.get()["status"] == "running" and vm.config.get()["lock"] == "suspending"
    for end in (vm.status.start.post(), vm.status.stop.post(), vm.status.shutdown.post()):
        assert exit_status(api, end) == "VM is locked (suspending)"
    assert refusal_of(vm.delete) == (500, "VM 101 is running - destroy failed ")
    assert refusal_of(lambda: vm.config.put(delete="vmstate")) == (500, "VM is locked (suspending) ")
    assert exit_status(api, vm.status.resume.post()) == "OK" and vm.config.get()["lock"] == "suspending"
    pve.unlock(101)
    assert exit_status(api, vm.status.stop.post()) == "OK"


def test_a_paused_vm_counts_as_running_and_refuses_shutdown(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.power(101, "paused")
    vm = api.nodes("pve1").qemu(101)
    assert (vm.status.current.get()["status"], vm.status.current.get()["qmpstatus"]) == ("running", "paused")
    assert refusal_of(vm.status.shutdown.post) == (500, "VM is paused - cannot shutdown ")
    upid = vm.status.suspend.post()
    assert ":qmpause:" in upid and exit_status(api, upid) == "OK" and exit_status(api, vm.status.resume.post()) == "OK"


def test_more_vcpus_than_the_node_has_fail_the_start(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, config={"cores": 3})
    pve.node_figures["pve1"] = {"maxcpu": 2}
    assert (
        exit_status(api, api.nodes("pve1").qemu(101).status.start.post()) == "MAX 2 vcpus allowed per VM on this node"
    )
    assert api.nodes.get()[0]["maxcpu"] == 2
