# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: writes to a configuration."""

from __future__ import annotations

from typing import Any

from support.double_api import clone_template, exit_status, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_digest_guards_a_write(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    digest = vm.config.get()["digest"]
    vm.config.put(description="one\n", digest=digest)
    assert vm.config.get()["description"] == "one"
    assert "checksum mismatch" in refusal_of(lambda: vm.config.put(description="two", digest=digest))[1]


def test_cicustom_of_a_missing_file_is_saved_all_the_same(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(cicustom="user=local:snippets/a.yaml")
    assert vm.config.get()["cicustom"] == "user=local:snippets/a.yaml"
    assert exit_status(api, vm.status.start.post()) != "OK"
    pve.snippets.add("local:snippets/a.yaml")
    assert exit_status(api, vm.status.start.post()) == "OK"


def test_a_resize_changes_the_drive_and_never_shrinks_it(api: Any, pve: ProxmoxDouble) -> None:
    clone_template(api)
    vm = api.nodes("pve1").qemu(101)
    assert exit_status(api, vm.resize.put(disk="scsi0", size="+2G")) == "OK"
    assert "size=5G" in vm.config.get()["scsi0"]
    assert exit_status(api, vm.resize.put(disk="scsi0", size="8G")) == "OK"
    assert "size=8G" in vm.config.get()["scsi0"] and "size=3G" in pve.vm(9000).config["scsi0"]
    assert exit_status(api, vm.resize.put(disk="scsi0", size="4G")) == "shrinking disks is not supported"
    assert exit_status(api, api.nodes("pve1").qemu(999).resize.put(disk="scsi0", size="4G")).endswith(
        "999.conf' does not exist"
    )
