# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: tokens, roles, paths, pools."""

from __future__ import annotations

from typing import Any

from support.double_api import TOKEN, clone_template, exit_status, login, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_least_rights_are_enough_and_no_more(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(500)
    pve.grant_least(TOKEN, pool="sandboxes")
    assert exit_status(api, clone_template(api, pool="sandboxes")) == "OK"
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(description="x", ciuser="debian", cores=4, tags="a")
    assert exit_status(api, vm.status.start.post()) == "OK" and vm.agent("network-get-interfaces").get()
    assert [item["vmid"] for item in api.cluster.resources.get(type="vm")] == [9000, 101]
    assert refusal_of(api.nodes("pve1").qemu(500).delete)[0] == 403
    assert refusal_of(lambda: vm.config.put(smbios1="uuid=00000000-0000-4000-8000-000000000000"))[0] == 403
    vm.status.stop.post()
    assert exit_status(api, vm.delete(purge=1)) == "OK"
    assert refusal_of(vm.config.get)[0] == 403
    pve.revoke(TOKEN, "/sdn/zones/localnetwork/vmbr0")
    assert "SDN.Use" in refusal_of(lambda: clone_template(api, pool="sandboxes"))[1]


def test_cloud_init_keys_take_either_of_two_privileges(api: Any, pve: ProxmoxDouble) -> None:
    vm = api.nodes("pve1").qemu(101)
    pve.add_guest(101)
    pve.grant(TOKEN, "/vms/101", "VM.Config.Options")
    assert refusal_of(lambda: vm.config.put(ciuser="debian"))[0] == 403
    for priv in ("VM.Config.Network", "VM.Config.Cloudinit"):
        pve.revoke(TOKEN)
        pve.grant(TOKEN, "/vms/101", priv)
        vm.config.put(ciuser="debian")


def test_wrong_token_is_401(api: Any, agentlab_env: dict[str, str]) -> None:
    assert refusal_of(login({**agentlab_env, "PROXMOX_TOKEN_SECRET": "wrong"}).version.get)[0] == 401


def privileges_at(api: Any, path: str) -> set[str]:
    return set(api.access.permissions.get(path=path)[path])


def test_a_role_on_a_deeper_path_replaces_what_is_inherited(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.add_guest(102)
    pve.grant(TOKEN, "/", "VM.Audit", "Sys.Audit")
    assert [row["vmid"] for row in api.cluster.resources.get(type="vm")] == [9000, 101, 102]
    pve.grant(TOKEN, "/vms/101", "VM.Config.Disk")
    assert privileges_at(api, "/vms/101") == {"VM.Config.Disk"} and privileges_at(api, "/vms/102") == {
        "VM.Audit",
        "Sys.Audit",
    }
    assert [row["vmid"] for row in api.cluster.resources.get(type="vm")] == [9000, 102]
    assert refusal_of(api.nodes("pve1").qemu(101).config.get)[0] == 403
    pve.grant(TOKEN, "/vms/101", "VM.Audit")
    assert privileges_at(api, "/vms/101") == {"VM.Config.Disk", "VM.Audit"}


def test_a_pools_roles_add_to_those_of_its_vms(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, pool="sandboxes")
    pve.grant(TOKEN, "/", "VM.Audit", "Sys.Audit")
    pve.grant(TOKEN, "/pool/sandboxes", "VM.PowerMgmt")
    assert privileges_at(api, "/vms/101") == {"VM.Audit", "Sys.Audit", "VM.PowerMgmt"} and privileges_at(
        api, "/pool/sandboxes"
    ) == {"VM.PowerMgmt"}
    pve.no_access.add("/pool/sandboxes")
    assert privileges_at(api, "/vms/101") == set()


def test_a_role_without_propagation_counts_for_its_path_alone(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN, "/vms", "VM.Audit", propagate=False)
    assert privileges_at(api, "/vms") == {"VM.Audit"} and privileges_at(api, "/vms/101") == set()


def test_a_separated_token_holds_what_both_it_and_its_user_hold(api: Any, pve: ProxmoxDouble) -> None:
    pve.separated.add(TOKEN)
    pve.grant(TOKEN.split("!", maxsplit=1)[0], "/", "VM.Audit", "Sys.Audit")
    assert privileges_at(api, "/vms/9000") == set() and api.access.permissions.get() == {}
    pve.grant(TOKEN, "/vms", "VM.Audit", "VM.Allocate")
    assert privileges_at(api, "/vms/9000") == {"VM.Audit"} and refusal_of(api.cluster.ha.status.current.get)[0] == 403


def test_a_separated_token_without_any_acl_may_nothing(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN.split("!", maxsplit=1)[0], "/", "VM.Audit", "Sys.Audit")
    assert privileges_at(api, "/vms/9000") == {"VM.Audit", "Sys.Audit"}
