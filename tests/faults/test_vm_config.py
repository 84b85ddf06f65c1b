# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a creation writes into its VM.

Tags under a cluster's policy, the boot disk, interfaces, and the rest of the options.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import vm_config

from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


# ---- tags ----


@pytest.mark.parametrize(
    ("access", "allowed", "registered", "set_", "named"),
    [
        ("free", set(), set(), {"agentlab", "ci", "night"}, ()),
        ("none", set(), set(), set(), ("agentlab", "ci", "night")),
        ("list", {"agentlab", "ci"}, set(), {"agentlab", "ci"}, ("night",)),
        ("existing", set(), set(), {"agentlab"}, ("ci", "night")),
        ("free", set(), {"agentlab"}, {"ci", "night"}, ("agentlab",)),
        ("list", {"agentlab", "ci", "night"}, {"night"}, {"agentlab", "ci"}, ("night",)),
    ],
)
def test_a_tag_that_the_cluster_forbids_is_a_warning(
    lab: Lab, access: str, allowed: set[str], registered: set[str], set_: set[str], named: tuple[str, ...]
) -> None:
    lab.pve.tag_access, lab.pve.tag_allow_list, lab.pve.registered_tags = access, allowed, registered
    outcome = lab.present(tags=["ci", "night"], cores=3)
    assert outcome.state == "RUNNING" and outcome.sandbox is not None and outcome.sandbox.tags == ["ci", "night"]
    config = lab.pve.vm(1000).config
    assert vm_config.split_tags(config.get("tags")) == set_ and int(config["cores"]) == 3
    if named:
        assert (
            len(outcome.warnings) == 1
            and f"does not allow the tag {', '.join(named)}; VM 1000 is without" in outcome.warnings[0]
        )
    else:
        assert outcome.warnings == []
    assert lab.destroy(1000, force=True)[0].state == "DESTROYED"


def test_the_tags_of_the_template_stay_only_where_they_may_not_be_taken_away(lab: Lab) -> None:
    lab.pve.vm(9000).config["tags"] = "golden;ci"
    assert lab.present(tags=["ci"]).warnings == []
    assert lab.pve.vm(1000).config["tags"] == "agentlab;ci"
    lab.pve.tag_access, lab.pve.tag_allow_list = "list", {"agentlab"}
    outcome = lab.present(name="a2", tags=["ci"])
    assert lab.pve.vm(1001).config["tags"] == "agentlab;ci;golden"
    assert len(outcome.warnings) == 1 and "VM 1001 keeps the tag golden of its template" in outcome.warnings[0]


def test_tags_that_are_there_already_are_not_written(lab: Lab) -> None:
    lab.pve.vm(9000).config["tags"] = "ci;agentlab"
    lab.pve.tag_access = "none"
    assert lab.present(tags=["CI"]).warnings == []
    assert all(
        "tags" not in one["params"]
        for one in lab.pve.history
        if one["method"] == "PUT" and one["path"].endswith("/config")
    )


def test_a_refusal_of_something_else_is_none_of_a_tag(lab: Lab) -> None:
    lab.pve.fail("PUT", "/qemu/1000/config", 403, "Permission check failed (/vms/1000, VM.Config.Options)")
    with pytest.raises(AgentlabError, match=r"VM\.Config\.Options"):
        lab.present(tags=["ci"])


# ---- the boot disk ----


@pytest.mark.parametrize(
    ("config", "disk"),
    [
        ({"boot": "order=virtio0;scsi0", "scsi0": "a:b", "virtio0": "a:c"}, "virtio0"),
        ({"boot": "order=net0;scsi1", "scsi0": "a:b", "scsi1": "a:c", "net0": "virtio"}, "scsi1"),
        ({"boot": "c", "bootdisk": "virtio0", "scsi0": "a:b", "virtio0": "a:c"}, "virtio0"),
        ({"bootdisk": "virtio0", "scsi0": "a:b", "virtio0": "a:c"}, "virtio0"),
        ({"boot": "dcn", "bootdisk": "sata1", "scsi0": "a:b", "sata1": "a:c"}, "sata1"),
        # The old key is not looked at beside an order.
        ({"boot": "order=scsi0", "bootdisk": "virtio0", "scsi0": "a:b", "virtio0": "a:c"}, "scsi0"),
        # Without any word of it: ide, scsi, virtio, sata, each by its number.
        ({"sata0": "a:b", "virtio0": "a:c", "scsi10": "a:d", "scsi2": "a:e"}, "scsi2"),
        ({"boot": "order=net0", "virtio1": "a:b", "sata0": "a:c"}, "virtio1"),
        ({"boot": "c", "bootdisk": "ide9", "ide2": "a:vm-1-cloudinit,media=cdrom", "scsi0": "a:b"}, "scsi0"),
        # A storage may be called cloudinit; its volumes are disks like any other.
        ({"scsi0": "cloudinit-ssd:vm-9-disk-0,size=3G", "scsi1": "a:b"}, "scsi0"),
        (
            {"scsi0": "cloudinit:9/vm-9-disk-0.qcow2,size=3G", "ide2": "cloudinit:9/vm-9-cloudinit.qcow2,media=cdrom"},
            "scsi0",
        ),
        ({"ide2": "local:iso/x.iso,media=cdrom", "efidisk0": "a:b", "tpmstate0": "a:c", "unused0": "a:d"}, None),
    ],
)
def test_the_boot_disk_is_the_disk_that_proxmox_boots_from(config: dict[str, Any], disk: str | None) -> None:
    assert vm_config.find_boot_disk(config) == disk


@pytest.mark.parametrize(
    ("drive", "is_it"),
    [
        ("local-lvm:vm-9-cloudinit,media=cdrom", True),
        ("local:9/vm-9-cloudinit.qcow2,media=cdrom,size=4M", True),
        ("a:cloudinit", True),
        ("cloudinit:vm-9-disk-0,size=3G", False),
        ("my-cloudinit:9/vm-9-disk-0.raw", False),
        ("none,media=cdrom", False),
    ],
)
def test_a_cloud_init_drive_is_told_by_its_volume_and_not_by_its_storage(drive: str, is_it: bool) -> None:
    assert vm_config.has_cloud_init_drive({"ide2": drive}) is is_it


def test_the_boot_disk_grows_and_not_the_data_disk(lab: Lab) -> None:
    template = lab.pve.vm(9000).config
    template.update(
        {
            "virtio0": lab.pve.add_disk("local-lvm", "base-9000-disk-1", 9000, 3 * 1024**3) + ",size=3G",
            "boot": "c",
            "bootdisk": "virtio0",
        }
    )
    lab.present(disk_size="20G")
    config = lab.pve.vm(1000).config
    assert "size=20G" in config["virtio0"] and "size=3G" in config["scsi0"]


# ---- hardware and network ----


def test_a_second_interface_a_vlan_and_the_rest(lab: Lab) -> None:
    lab.pve.vm(9000).config["balloon"] = "1024"
    lab.present(
        vlan_tag=42,
        second_bridge="vmbr1",
        second_vlan_tag=7,
        second_ip_config="ip=10.0.0.5/24",
        cpu_type="x86-64-v2-AES",
        cloud_init_upgrade=False,
        cloud_init_password="geheim",
        memory=512,
    )
    config = lab.pve.vm(1000).config
    assert config["net0"].startswith("virtio=") and ",tag=42" in config["net0"] and "bridge=vmbr0" in config["net0"]
    assert config["net1"].startswith("virtio=") and "bridge=vmbr1" in config["net1"] and "tag=7" in config["net1"]
    assert (
        config["ipconfig1"] == "ip=10.0.0.5/24" and config["cpu"] == "x86-64-v2-AES" and str(config["ciupgrade"]) == "0"
    )
    assert config["cipassword"] == "geheim" and str(config["memory"]) == "512" and str(config["balloon"]) == "512"
    told = str([lab.events(one) for one in lab.records()])
    assert "geheim" not in told


@pytest.mark.parametrize(
    ("current", "values", "expected"),
    [
        (
            "virtio=BC:24:11:00:00:01,bridge=vmbr0,tag=3,firewall=1",
            {"vlan_tag": 9},
            "virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,tag=9",
        ),
        (
            "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            {"model": "e1000", "bridge": "b"},
            "e1000=BC:24:11:00:00:01,bridge=b",
        ),
        ("virtio", {"bridge": "vmbr1", "vlan_tag": 5}, "virtio,bridge=vmbr1,tag=5"),
    ],
)
def test_an_interface_keeps_what_is_not_asked_for(current: str, values: dict[str, Any], expected: str) -> None:
    values = {"bridge": None, "firewall": None, **values}
    assert vm_config.compose_network(current, **values) == expected
