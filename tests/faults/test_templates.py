# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which template a sandbox is made from, what is refused before the clone, and what a refusal of Proxmox VE is told
as.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    InvalidInput,
    ProxmoxError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import (
    create,
    template,
    vm_config,
    wanted,
)

from support.double import TOKEN_ID
from support.lab import Lab

pytestmark = pytest.mark.faults

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMadeUp me"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


def refused(lab: Lab, options: dict[str, Any] | None = None, **values: Any) -> str:
    """The sentence of a creation that is refused before anything is made."""
    lab.pve.requests.clear()
    with pytest.raises(AgentlabError) as caught:
        lab.present(options=options, **values)
    assert lab.records() == [] and {method for method, _path, _body in lab.pve.requests} <= {"GET"}
    return str(caught.value.message)


def clone_of(lab: Lab) -> dict[str, Any]:
    return [one["params"] for one in lab.pve.history if one["method"] == "POST" and one["path"].endswith("/clone")][-1]


# ---- which template ----


def test_one_name_on_two_nodes_means_the_one_on_the_node_that_is_wanted(lab: Lab) -> None:
    lab.pve.add_node("pve2")
    lab.pve.add_node("pve3")
    lab.pve.add_template(9001, "debian-13", node="pve2")
    first, second = lab.present(node="pve2"), lab.present(name="a2", options={"node": "pve1"})
    assert [one.sandbox.node for one in (first, second) if one.sandbox] == ["pve2", "pve1"]
    # Where no node is named, one of those that have it is chosen, and its own template is cloned.
    third = lab.present(name="a3")
    assert third.sandbox is not None and third.sandbox.node in ("pve1", "pve2")
    assert third.extra["placement"]["node"] == third.sandbox.node
    assert "(9000 on pve1, 9001 on pve2), none of them on node pve3" in refused_name(lab, node="pve3")
    assert refused_name(lab, node="pve9") == "node: 'pve9' is not a node of this cluster. Nodes: pve1, pve2, pve3"
    lab.pve.add_template(9002, "debian-13", node="pve2")
    assert "(9001 on pve2, 9002 on pve2); give the VMID" in refused_name(lab, node="pve2")
    assert "(9000 on pve1, 9001 on pve2, 9002 on pve2); give the VMID, or the node" in refused_name(lab)


def refused_name(lab: Lab, **values: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        lab.present(name="other", **values)
    return str(caught.value.message)


@pytest.mark.parametrize("asked", ["9000", "debian-13", " debian-13 "])
def test_a_template_that_the_list_does_not_show_as_one_yet(lab: Lab, asked: str) -> None:
    lab.pve.listing_lag = 60.0
    lab.pve._born[9000] = time.time()
    assert lab.present(template=asked).state == "RUNNING"


def test_what_is_no_template_is_told_as_what_it_is(lab: Lab) -> None:
    lab.pve.add_guest(700, "golden")
    assert refused(lab, template="700") == "template: VM 700 is not a template; convert it first (qm template 700)"
    assert refused(lab, template="golden") == "template: VM 700 is not a template; convert it first (qm template 700)"
    lab.pve.add_ct(701, "box")
    assert refused(lab, template="701") == "template: 701 is a container; a sandbox is made from the template of a VM"
    assert refused(lab, template="box") == "template: 701 is a container; a sandbox is made from the template of a VM"
    assert refused(lab, template="nowhere") == "template: 'nowhere' does not exist. Templates: 9000 (debian-13)"


def test_a_template_that_may_be_on_an_offline_node_is_not_called_missing(lab: Lab) -> None:
    """Without the cluster's status it is not known whether the list is whole."""
    lab.pve.fault("GET", "/cluster/status", "answer", status=502, body="<html>", times=99)
    with pytest.raises(ProxmoxError, match="502"):
        lab.present(template="debian-99")


def test_a_template_that_cannot_be_read_is_not_called_none(lab: Lab) -> None:
    lab.pve.fault("GET", "/qemu/9000/config", "answer", status=500, body='{"data": null, "message": "boom"}', times=9)
    assert "so whether it is a template is not known" in refused(lab)


def test_a_stale_list_that_calls_a_vm_a_template_is_not_believed(lab: Lab) -> None:
    ctx = lab.context()
    lab.pve.vm(9000).config.pop("template")
    ctx.cluster.list_vms()[9000]["template"] = 1
    with pytest.raises(InvalidInput, match="VM 9000 is not a template"):
        create.run(ctx, wanted.make_spec(ctx, {"name": "a1", "template": "9000"}))


# ---- what is refused before the clone ----


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ip_config", "ip=dhcp"),
        ("nameserver", "192.0.2.1"),
        ("searchdomain", "example.org"),
        ("ssh_public_keys", KEY),
        ("cloud_init_user", "me"),
        ("cloud_init_password", "x"),
        ("cloud_init_upgrade", False),
        ("cloud_init_vendor_data", "local:snippets/v.yaml"),
        ("cloud_init_user_data", "#cloud-config\n"),
    ],
)
@pytest.mark.parametrize("drive", ["none,media=cdrom", "local:iso/debian.iso,media=cdrom", None])
def test_a_cloud_init_option_without_a_cloud_init_drive_is_refused(
    lab: Lab, option: str, value: Any, drive: str | None
) -> None:
    config = lab.pve.vm(9000).config
    config.pop("ide2")
    if drive:
        config["ide2"] = drive
    message = refused(lab, **{option: value})
    assert message.startswith(
        f"{option}: template 9000 (debian-13) has no cloud-init drive, so it would have no effect"
    )
    assert lab.present().state == "RUNNING"


@pytest.mark.parametrize(
    "drive", ["local-lvm:vm-9000-cloudinit,media=cdrom", "local:9000/vm-9000-cloudinit.qcow2,media=cdrom,size=4M"]
)
def test_a_cloud_init_drive_of_any_storage_is_recognized(drive: str) -> None:
    assert vm_config.has_cloud_init_drive({"scsi1": drive}) and not vm_config.has_cloud_init_drive(
        {"efidisk0": drive, "name": drive}
    )


def test_more_cores_than_the_node_has(lab: Lab) -> None:
    assert refused(lab, cores=5) == (
        "cores: 5 is more than the 4 CPUs of node pve1, which would not start the VM. Give fewer cores, or another node"
    )
    lab.pve.vm(9000).config["sockets"] = 2
    assert refused(lab, cores=3).startswith(
        "cores: 3 (times 2 sockets of the template) is more than the 4 CPUs of node pve1"
    )
    assert lab.present(cores=2).state == "RUNNING"


def test_a_storage_that_the_node_does_not_have(lab: Lab) -> None:
    message = refused(lab, storage="nas")
    assert (
        message.startswith("storage: 'nas' is not a storage of node pve1 for disks of VMs. Storages: ")
        and "local-lvm" in message
    )
    assert refused(lab, options={"storage": "nas"}) == message
    lab.pve.counted.clear()
    lab.present()
    assert lab.pve.counted["GET /nodes/{node}/storage"] == 0 and lab.pve.counted["GET /cluster/resources"] <= 3


@pytest.mark.parametrize("option", ["second_ip_config", "second_vlan_tag"])
def test_a_second_interface_that_is_not_there(lab: Lab, option: str) -> None:
    value = {"second_ip_config": "ip=dhcp", "second_vlan_tag": 3}[option]
    assert "has no second interface; give second_bridge, which makes one" in refused(lab, **{option: value})


# ---- linked and full ----


def test_the_storage_of_the_configuration_makes_no_full_clone_where_the_template_lies_on_it(lab: Lab) -> None:
    lab.present(options={"storage": "local-lvm"})
    assert "full" not in clone_of(lab) and "storage" not in clone_of(lab)
    lab.present(name="a2", options={"storage": "local-lvm"}, full_clone=True)
    assert str(clone_of(lab)["full"]) == "1" and clone_of(lab)["storage"] == "local-lvm"
    lab.present(name="a3", options={"storage": "local-lvm"}, full_clone=False)
    assert str(clone_of(lab)["full"]) == "0" and "storage" not in clone_of(lab)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"scsi0": "local-lvm:base-9000-disk-0,size=3G", "ide2": "local:vm-9000-cloudinit,media=cdrom"}, (None, None)),
        (
            {
                "scsi0": "local-lvm:base-9000-disk-0",
                "efidisk0": "local-lvm:base-9000-disk-1",
                "tpmstate0": "local-lvm:base-9000-disk-2",
            },
            (None, None),
        ),
        # Also one disk elsewhere, and what nobody may read.
        ({"scsi0": "local-lvm:base-9000-disk-0", "scsi1": "fast:base-9000-disk-1"}, (True, "local-lvm")),
        ({"scsi0": "local-lvm:base-9000-disk-0", "efidisk0": "fast:base-9000-disk-1"}, (True, "local-lvm")),
        ({}, (True, "local-lvm")),
        (None, (True, "local-lvm")),
    ],
)
def test_where_the_template_lies(lab: Lab, config: dict[str, Any] | None, mode: tuple[Any, Any]) -> None:
    ctx = lab.context(storage="local-lvm")
    assert (
        template.choose_clone_mode(ctx, wanted.make_spec(ctx, {"name": "a1"}), template.Template(9000, "pve1", config))
        == mode
    )


def test_a_storage_without_linked_clones_still_gets_full_ones(lab: Lab) -> None:
    lab.pve.fail(
        "POST",
        "/qemu/9000/clone",
        500,
        "Linked clone feature is not supported for 'local-lvm:base-9000-disk-0' (scsi0)",
        times=1,
    )
    outcome = lab.present(options={"storage": "local-lvm"})
    assert outcome.state == "RUNNING" and str(clone_of(lab)["full"]) == "1" and clone_of(lab)["storage"] == "local-lvm"


# ---- refusals ----


@pytest.mark.parametrize(
    ("status", "text", "values", "words"),
    [
        (
            403,
            "Permission check failed (pool 'lab' does not exist)",
            {"pool": "lab"},
            "pool: 'lab' does not exist. Make it (pveum pool add lab)",
        ),
        (403, "Permission check failed", {"pool": "lab"}, "pool: 'lab' does not exist, or"),
        (403, "Permission check failed", {}, "Grant VM.Allocate on /vms"),
        (
            500,
            "Linked clone feature is not supported for 'x:base-1' (scsi0)",
            {},
            "full_clone: a linked clone of template 9000 is not possible",
        ),
        (
            500,
            "can't clone VM to node 'pve1' (VM uses local storage)",
            {},
            "node: template 9000 lies on local storage of another node",
        ),
        (500, "cluster not ready - no quorum?", {}, "the cluster has no quorum"),
    ],
)
def test_a_refused_clone_names_our_option_and_the_remedy(
    lab: Lab, status: int, text: str, values: dict[str, Any], words: str
) -> None:
    lab.pve.fail("POST", "/qemu/9000/clone", status, text)
    with pytest.raises(CreationFailed) as failed:
        lab.present(**values)
    message = failed.value.message
    assert message.startswith(f"sandbox 1000 could not be created: {words}") or words in message
    assert message.endswith("; nothing was made for it") and text.split(" (")[0] in message


def test_a_pool_on_which_nothing_is_granted(lab: Lab) -> None:
    lab.pve.grant_least(TOKEN_ID, pool="mine")
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit")
    with pytest.raises(CreationFailed, match="pool: 'nopool' does not exist"):
        lab.present(pool="nopool")


@pytest.mark.parametrize(
    ("text", "values", "words"),
    [
        ("bridge 'vmbr9' does not exist", {"bridge": "vmbr9"}, "bridge: node pve1 has no bridge 'vmbr9'"),
        ("bridge 'vmbr9' does not exist", {"second_bridge": "vmbr9"}, "second_bridge: node pve1 has no bridge 'vmbr9'"),
        ("MAX 2 vcpus allowed per VM on this node", {"cores": 4}, "cores: node pve1 has fewer CPUs"),
    ],
)
def test_a_failed_start_names_our_option(lab: Lab, text: str, values: dict[str, Any], words: str) -> None:
    lab.pve.next_task("qmstart", "fail", text=text)
    with pytest.raises(CreationFailed, match="what was made for it has been removed") as failed:
        lab.present(**values)
    assert words in failed.value.message and text in failed.value.message


def test_nothing_is_removed_where_nothing_was_made(lab: Lab) -> None:
    lab.pve.fault("POST", "/qemu/9000/clone", "answer", status=500, body='{"data": null, "message": "boom"}', times=3)
    with pytest.raises(AgentlabError, match="nothing was made for it"):
        lab.present()
    assert lab.destroy(1000, force=True)[0].state == "DESTROYED" and lab.pve.touched(1000) == []


@pytest.mark.parametrize(
    ("size", "fits"),
    [("1G", False), ("0G", False), ("3071M", False), ("3G", True), ("3072M", True), ("0.1T", True), ("+1G", True)],
)
def test_a_disk_size_below_the_templates_is_refused_before_the_clone(lab: Lab, size: str, fits: bool) -> None:
    if fits:
        assert lab.create("a1", disk_size=size).state == "RUNNING"
        return
    told = f"disk_size: {size} is less than the 3G of disk scsi0 of template 9000.*disks only grow. Give 3G or more"
    with pytest.raises(InvalidInput, match=told):
        lab.create("a1", disk_size=size)
    assert lab.records() == []
