# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: clones and snapshots."""

from __future__ import annotations

import time
from typing import Any

from support.double_api import clone_template, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble
from support.proxmox_lifecycle import CLONE_DESCRIPTION


def test_a_clone_to_a_taken_vmid_is_refused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101)
    pve.add_guest(102, node="pve2")
    assert "unable to create VM 101: config file already exists" in refusal_of(lambda: clone_template(api, 101))[1]
    assert exit_status(api, clone_template(api, 102)).endswith("File exists")
    assert api.nodes("pve2").qemu(102).config.get()["name"] == "somebody-elses" and len(pve.vms) == 3


def test_what_a_clone_copies_and_what_is_its_own(api: Any, pve: ProxmoxDouble) -> None:
    source = pve.vm(9000).config
    source.update(tags="gold", protection=1, onboot=1, ciuser="debian", ipconfig0="ip=dhcp", description="the template")
    upid = clone_template(api)
    assert upid.split(":")[6] == "9000" and exit_status(api, upid) == "OK"
    new = api.nodes("pve1").qemu(101).config.get()
    assert {
        key: new[key] for key in ("tags", "protection", "onboot", "ciuser", "ipconfig0", "meta", "description", "name")
    } == {
        **{key: source[key] for key in ("tags", "protection", "onboot", "ciuser", "ipconfig0", "meta")},
        "description": "marker",
        "name": "vm101",
    }
    assert not {key for key in ("smbios1", "vmgenid", "net0", "scsi0", "ide2") if new[key] == source[key]}
    assert new["ide2"] == "local-lvm:vm-101-cloudinit,media=cdrom" and "template" not in new and "lock" not in new
    api.nodes("pve1").qemu(9000).clone.post(newid=102)
    assert api.nodes("pve1").qemu(102).config.get()["description"] == "the template"


def test_target_of_a_running_clone_is_proxmoxs_own(api: Any, pve: ProxmoxDouble) -> None:
    pve.real_secs["qmclone"] = 0.3
    upid = clone_template(api)
    config = api.nodes("pve1").qemu(101).config.get()
    assert (config["description"], config["lock"], "name" in config) == (CLONE_DESCRIPTION, "clone", False)
    assert exit_status(api, upid) == "OK"
    config = api.nodes("pve1").qemu(101).config.get()
    assert (config["description"], config["name"], "lock" in config) == ("marker", "vm101", False)


def test_aborted_clone_cleans_up_and_a_killed_one_does_not(api: Any, pve: ProxmoxDouble) -> None:
    pve.real_secs["qmclone"] = 30
    aborted, killed = clone_template(api, 101), clone_template(api, 102)
    time.sleep(0.05)
    api.nodes("pve1").tasks(aborted).delete()
    pve.kill_task(killed)
    assert (
        exit_status(api, aborted).endswith("failed: interrupted by signal")
        and exit_status(api, killed) == "unexpected status"
    )
    time.sleep(0.05)
    assert pve.vm(101) is None and pve.vm(102).config == {"description": CLONE_DESCRIPTION, "lock": "clone"}
    assert exit_status(api, api.nodes("pve1").qemu(102).delete()) == "VM is locked (clone)"
    assert "Only root" in refusal_of(lambda: api.nodes("pve1").qemu(102).delete(skiplock=1))[1]


def test_rollback_makes_a_new_vmgenid_and_keeps_the_description(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    vm = api.nodes("pve1").qemu(101)
    vm.snapshot.post(snapname="clean")
    before = vm.config.get()
    vm.config.put(description="later", tags="later", smbios1="uuid=00000000-0000-4000-8000-000000000000")
    assert exit_status(api, vm.snapshot("clean").rollback.post()) == "OK"
    after = vm.config.get()
    assert after["smbios1"] == before["smbios1"] and after["description"] == "later" and "tags" not in after
    assert after["vmgenid"] != before["vmgenid"]
