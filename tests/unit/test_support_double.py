# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double keeps to what the real API was seen to do, asked through proxmoxer over HTTPS."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from proxmoxer import ProxmoxAPI, ResourceException

from support import play
from support.proxmox_double import CLONE_DESCRIPTION, DoubleServer, ProxmoxDouble

TOKEN = "agentlab@pve!test"


@pytest.fixture
def api(pve: ProxmoxDouble, agentlab_env: dict[str, str]) -> Any:
    return _login(agentlab_env)


def _login(env: dict[str, str], timeout: float = 5) -> Any:
    return ProxmoxAPI(
        env["PROXMOX_HOST"],
        port=int(env["PROXMOX_PORT"]),
        user=env["PROXMOX_USER"],
        token_name=env["PROXMOX_TOKEN_ID"],
        token_value=env["PROXMOX_TOKEN_SECRET"],
        verify_ssl=env["PROXMOX_CA_PATH"],
        timeout=timeout,
    )


def _refused(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(ResourceException) as caught:
        call()
    error = caught.value
    return error.status_code, f"{error.content} {error.errors or ''}"


def _end(api: Any, upid: str, seconds: float = 5) -> str:
    """Exit status of a task."""
    node = upid.split(":")[1]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = api.nodes(node).tasks(upid).status.get()
        if found["status"] == "stopped":
            return str(found["exitstatus"])
        time.sleep(0.01)
    raise AssertionError(f"{upid} still runs")


def _clone(api: Any, newid: int = 101, **kw: Any) -> str:
    return str(
        api.nodes("pve1").qemu(9000).clone.post(newid=newid, **{"name": f"vm{newid}", "description": "marker", **kw})
    )


# ---- a VMID that is not there


@pytest.mark.parametrize("action", ["start", "stop", "shutdown"])
def test_power_of_missing_vm_is_accepted_and_its_task_fails(api: Any, action: str) -> None:
    upid = api.nodes("pve1").qemu(999).status(action).post()
    missing = "unable to find configuration file for VM 999 on node 'pve1'"
    if action == "start":
        missing = "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist"
    assert _end(api, upid) == missing


def test_power_of_a_vm_on_another_node_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101, node="pve2")
    assert "does not exist" in _end(api, api.nodes("pve1").qemu(101).status.start.post())


def test_missing_vm_elsewhere(api: Any) -> None:
    one = api.nodes("pve1").qemu(999)
    for call in (one.config.get, one.status.current.get, one.delete):
        assert _refused(call) == (500, "Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist ")
    for call in (one.status.reboot.post, lambda: one.clone.post(newid=101)):
        status, text = _refused(call)
        assert status == 500 and "unable to find configuration file for VM 999 on node 'pve1'" in text


def test_missing_vm_without_rights_is_403(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    one = api.nodes("pve1").qemu(999)
    for call in (
        one.config.get,
        one.status.current.get,
        one.status.start.post,
        one.delete,
        lambda: one.config.put(description="x"),
    ):
        assert _refused(call)[0] == 403


def test_unknown_node(api: Any) -> None:
    status, text = _refused(api.nodes("PVE1").qemu(9000).config.get)
    assert status == 500 and "hostname lookup 'PVE1' failed" in text


def test_nextid_tells_free_from_taken_on_offline_nodes_too(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, node="pve2")
    pve.set_node_offline("pve2")
    assert api.cluster.nextid.get(vmid=102) == "102"
    status, text = _refused(lambda: api.cluster.nextid.get(vmid=101))
    assert status == 400 and "VM 101 already exists" in text


def test_offline_node_lists_its_vms_as_unknown_and_answers_595_without_body(
    api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str]
) -> None:
    pve.add_guest(101, node="pve2", status="running")
    pve.set_node_offline("pve2")
    listed = {vm["vmid"]: vm for vm in api.cluster.resources.get(type="vm")}
    assert listed[101]["status"] == "unknown" and "name" not in listed[101] and listed[9000]["name"] == "debian-13"
    assert _refused(api.nodes("pve2").qemu(101).config.get)[0] == 595
    found = requests.get(
        f"{pve.url}/api2/json/nodes/pve2/qemu/101/config",
        verify=agentlab_env["PROXMOX_CA_PATH"],
        timeout=5,
        headers={"Authorization": f"PVEAPIToken={TOKEN}={agentlab_env['PROXMOX_TOKEN_SECRET']}"},
    )
    assert (found.status_code, found.content) == (595, b"")
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    assert _refused(api.nodes("pve2").qemu(101).config.get)[0] == 403


# ---- power


def test_template_does_not_start(api: Any) -> None:
    assert "template" in _end(api, api.nodes("pve1").qemu(9000).status.start.post())


def test_stop_and_shutdown_of_a_stopped_vm_are_fine(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    for action in ("stop", "shutdown"):
        assert _end(api, api.nodes("pve1").qemu(101).status(action).post()) == "OK"
    assert _refused(api.nodes("pve1").qemu(101).status.reset.post)[0] == 500


def test_stop_of_a_running_locked_vm_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running", lock="backup")
    assert _end(api, api.nodes("pve1").qemu(101).status.stop.post()) == "VM is locked (backup)"


def test_started_clone_answers_the_agent_until_it_stops(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    vm = api.nodes("pve1").qemu(101)
    assert _refused(vm.agent("network-get-interfaces").get)[0] == 500
    vm.status.start.post()
    found = vm.agent("network-get-interfaces").get()["result"]
    assert [a["ip-address"] for i in found for a in i["ip-addresses"] if a["ip-address"].startswith("192.0.2.")] == [
        pve.address_of(101)
    ]
    vm.status.stop.post()
    assert _refused(vm.agent("network-get-interfaces").get)[0] == 500


# ---- delete


def test_delete_without_quorum_loses_the_disks_and_keeps_the_configuration(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    assert pve.volumes_of(101) == ["local-lvm:vm-101-cloudinit", "local-lvm:vm-101-disk-0"]
    pve.lose_quorum()
    assert "Permission denied" in _end(api, api.nodes("pve1").qemu(101).delete(purge=1))
    assert pve.volumes_of(101) == [] and pve.vm(101).disks_lost
    assert "scsi0" in api.nodes("pve1").qemu(101).config.get()
    pve.regain_quorum()
    assert _end(api, api.nodes("pve1").qemu(101).status.start.post()) != "OK"


def test_delete_of_locked_protected_and_running(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, lock="clone")
    pve.add_guest(102, config={"protection": 1})
    pve.add_guest(103, status="running")
    assert _end(api, api.nodes("pve1").qemu(101).delete()) == "VM is locked (clone)"
    assert pve.volumes_of(101)
    assert "can't remove VM 102 - protection mode enabled" in _refused(api.nodes("pve1").qemu(102).delete)[1]
    assert "VM 103 is running - destroy failed" in _refused(api.nodes("pve1").qemu(103).delete)[1]


def test_delete_of_a_template_with_linked_clones_fails_in_the_task(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    assert "is still in use by linked clone" in _end(api, api.nodes("pve1").qemu(9000).delete())
    _clone(api, 102, full=1)
    assert _end(api, api.nodes("pve1").qemu(101).delete()) == "OK"
    assert _end(api, api.nodes("pve1").qemu(9000).delete()) == "OK"


def test_volume_of_another_owner_outlives_the_vm(api: Any, pve: ProxmoxDouble) -> None:
    volume = api.nodes("pve1").storage("local-lvm").content.post(vmid=999001, filename="vm-999001-disk-0", size="1G")
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.status.start.post()
    vm.config.put(scsi1=volume)
    assert vm.config.get()["scsi1"] == f"{volume},size=1G"
    vm.config.put(delete="scsi1")
    assert not {"scsi1", "unused0"} & set(vm.config.get())
    vm.config.put(scsi1=volume)
    vm.status.stop.post()
    assert _end(api, vm.delete(**{"purge": 1, "destroy-unreferenced-disks": 1})) == "OK"
    assert pve.volumes_of(999001) == [volume] and pve.volumes_of(101) == []


def test_own_disk_taken_off_stays_as_unused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(delete="scsi0")
    assert vm.config.get()["unused0"] == "local-lvm:vm-101-disk-0"
    vm.config.put(delete="unused0")
    assert pve.volumes_of(101) == []


# ---- configuration


def test_writes_without_quorum(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.lose_quorum()
    status, text = _refused(lambda: api.nodes("pve1").qemu(101).config.put(description="x"))
    assert status == 500 and "Permission denied" in text
    for call in (api.nodes("pve1").qemu(101).status.start.post, lambda: _clone(api, 102)):
        assert "no quorum" in _refused(call)[1]
    assert api.nodes("pve1").qemu(101).config.get()["name"] == "somebody-elses"


def test_quorum_as_told_and_as_it_is(api: Any, pve: ProxmoxDouble) -> None:
    pve.lose_quorum()
    assert api.cluster.status.get()[0]["quorate"] == 0
    pve.stale_quorum = True
    assert api.cluster.status.get()[0]["quorate"] == 1
    pve.standalone = True
    assert [item["type"] for item in api.cluster.status.get()] == ["node"]


def test_digest_guards_a_write(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    digest = vm.config.get()["digest"]
    vm.config.put(description="one\n", digest=digest)
    assert vm.config.get()["description"] == "one"
    assert "checksum mismatch" in _refused(lambda: vm.config.put(description="two", digest=digest))[1]


def test_tags_are_lowered_and_sorted_or_refused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    api.nodes("pve1").qemu(101).config.put(tags="zeta,Alpha")
    assert api.nodes("pve1").qemu(101).config.get()["tags"] == "alpha;zeta"
    pve.tag_access, pve.tag_allow_list = "list", {"x"}
    refused = _refused(lambda: api.nodes("pve1").qemu(101).config.put(tags="alpha;zeta;y"))
    assert refused[0] == 403 and "(/, Sys.Modify for modifying tag 'y')" in refused[1]
    # Only what changes counts: alpha and zeta stay.
    api.nodes("pve1").qemu(101).config.put(tags="alpha;x;zeta")
    assert _refused(lambda: api.nodes("pve1").qemu(101).config.put(delete="tags"))[0] == 403


def test_cicustom_of_a_missing_file_is_saved_all_the_same(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(cicustom="user=local:snippets/a.yaml")
    assert vm.config.get()["cicustom"] == "user=local:snippets/a.yaml"
    assert _end(api, vm.status.start.post()) != "OK"
    pve.snippets.add("local:snippets/a.yaml")
    assert _end(api, vm.status.start.post()) == "OK"


def test_resize_changes_the_drive(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    vm = api.nodes("pve1").qemu(101)
    assert _end(api, vm.resize.put(disk="scsi0", size="+2G")) == "OK"
    assert "size=5G" in vm.config.get()["scsi0"]
    assert _end(api, vm.resize.put(disk="scsi0", size="8G")) == "OK"
    assert "size=8G" in vm.config.get()["scsi0"] and "size=3G" in pve.vm(9000).config["scsi0"]
    assert _end(api, vm.resize.put(disk="scsi0", size="4G")) == "shrinking disks is not supported"
    assert _end(api, api.nodes("pve1").qemu(999).resize.put(disk="scsi0", size="4G")).endswith(
        "999.conf' does not exist"
    )


# ---- clone


def test_clone_of_a_taken_id(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101)
    pve.add_guest(102, node="pve2")
    assert "unable to create VM 101: config file already exists" in _refused(lambda: _clone(api, 101))[1]
    assert _end(api, _clone(api, 102)).endswith("File exists")
    assert api.nodes("pve2").qemu(102).config.get()["name"] == "somebody-elses" and len(pve.vms) == 3


def test_what_a_clone_copies_and_what_is_its_own(api: Any, pve: ProxmoxDouble) -> None:
    source = pve.vm(9000).config
    source.update(tags="gold", protection=1, onboot=1, ciuser="debian", ipconfig0="ip=dhcp", description="the template")
    upid = _clone(api)
    assert upid.split(":")[6] == "9000" and _end(api, upid) == "OK"
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
    upid = _clone(api)
    config = api.nodes("pve1").qemu(101).config.get()
    assert (config["description"], config["lock"], "name" in config) == (CLONE_DESCRIPTION, "clone", False)
    assert _end(api, upid) == "OK"
    config = api.nodes("pve1").qemu(101).config.get()
    assert (config["description"], config["name"], "lock" in config) == ("marker", "vm101", False)


def test_aborted_clone_cleans_up_and_a_killed_one_does_not(api: Any, pve: ProxmoxDouble) -> None:
    pve.real_secs["qmclone"] = 30
    aborted, killed = _clone(api, 101), _clone(api, 102)
    time.sleep(0.05)
    api.nodes("pve1").tasks(aborted).delete()
    pve.kill_task(killed)
    assert _end(api, aborted).endswith("failed: interrupted by signal") and _end(api, killed) == "unexpected status"
    time.sleep(0.05)
    assert pve.vm(101) is None and pve.vm(102).config == {"description": CLONE_DESCRIPTION, "lock": "clone"}
    assert _end(api, api.nodes("pve1").qemu(102).delete()) == "VM is locked (clone)"
    assert "Only root" in _refused(lambda: api.nodes("pve1").qemu(102).delete(skiplock=1))[1]


def test_rollback_makes_a_new_vmgenid_and_keeps_the_description(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    vm = api.nodes("pve1").qemu(101)
    vm.snapshot.post(snapname="clean")
    before = vm.config.get()
    vm.config.put(description="later", tags="later", smbios1="uuid=00000000-0000-4000-8000-000000000000")
    assert _end(api, vm.snapshot("clean").rollback.post()) == "OK"
    after = vm.config.get()
    assert after["smbios1"] == before["smbios1"] and after["description"] == "later" and "tags" not in after
    assert after["vmgenid"] != before["vmgenid"]


# ---- tasks


def test_task_list_filters(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    done = [api.nodes("pve1").qemu(101).status(action).post() for action in ("start", "stop", "start")]
    pve.next_task("qmstop", "hang")
    running = api.nodes("pve1").qemu(101).status.stop.post()

    def listed(**kw: Any) -> list[tuple[str, str]]:
        return [(task["upid"], task["status"]) for task in api.nodes("pve1").tasks.get(**kw)]

    assert listed(source="active") == [(running, "RUNNING")]
    assert listed(source="archive") == listed() == [(upid, "OK") for upid in reversed(done)]
    assert listed(source="all") == [(running, "RUNNING")] + [(upid, "OK") for upid in reversed(done)]
    assert listed(typefilter="qmstart") == [(done[2], "OK"), (done[0], "OK")]
    assert listed(limit=1) == [(done[2], "OK")] and listed(limit=1, start=2) == [(done[0], "OK")]
    assert listed(source="all", since=int(time.time()) + 60) == [] and len(listed(since=int(time.time()) - 60)) == 3
    assert [task["upid"] for task in api.cluster.tasks.get()] == [running, *reversed(done)]
    pve.release_task(running)
    assert _end(api, running) == "OK" and pve.vm(101).status == "stopped"


def test_task_unknown_or_under_a_wrong_node(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.add_guest(101)
    upid = api.nodes("pve1").qemu(101).status.start.post()
    for node, asked in (("pve2", upid), ("pve1", upid.replace(upid.split(":")[2], "0000FFFF"))):
        status, text = _refused(api.nodes(node).tasks(asked).status.get)
        assert status == 400 and "no such task" in text
    pve.forget_task(upid)
    assert _refused(api.nodes("pve1").tasks(upid).status.get)[0] == 400 and api.nodes("pve1").tasks.get() == []


def test_how_tasks_end_on_request(api: Any, pve: ProxmoxDouble) -> None:
    vm = api.nodes("pve1").qemu(101)
    pve.next_task("qmclone", "killed", vmid=101)
    assert _end(api, _clone(api)) == "unexpected status" and pve.vm(101).lock == "clone"
    pve.remove_vm(101)
    pve.next_task("qmclone", "fail", text="clone failed: no space")
    assert _end(api, _clone(api)) == "clone failed: no space" and pve.vm(101) is None
    _clone(api)
    pve.next_task("qmstart", "vanish")
    assert (
        _refused(api.nodes("pve1").tasks(vm.status.start.post()).status.get)[0] == 400
        and pve.vm(101).status == "running"
    )
    vm.status.stop.post()
    pve.vm(101).task_warnings = {"qmdestroy": 2}
    upid = vm.delete()
    assert _end(api, upid) == "WARNINGS: 2" and pve.vm(101) is None
    assert api.nodes("pve1").tasks(upid).log.get()[-1]["t"] == "TASK WARNINGS: 2"
    _clone(api)
    pve.next_task("qmdestroy", "killed", carry_out=True)
    assert _end(api, vm.delete()) == "unexpected status" and pve.vm(101) is None


# ---- certificates, permissions, listing


def test_root_certificate_tells_clusters_apart(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.grant(TOKEN, "/vms/500", "VM.Audit")
    roots = {
        cert["fingerprint"]
        for node in ("pve1", "pve2")
        for cert in api.nodes(node).certificates.info.get()
        if cert["filename"] == "pve-root-ca.pem"
    }
    assert roots == {pve.ca_fingerprint} and re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", pve.ca_fingerprint)
    assert ProxmoxDouble().ca_fingerprint != pve.ca_fingerprint


def test_least_rights_are_enough_and_no_more(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(500)
    pve.grant_least(TOKEN, pool="sandboxes")
    assert _end(api, _clone(api, pool="sandboxes")) == "OK"
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(description="x", ciuser="debian", cores=4, tags="a")
    assert _end(api, vm.status.start.post()) == "OK" and vm.agent("network-get-interfaces").get()
    assert [item["vmid"] for item in api.cluster.resources.get(type="vm")] == [9000, 101]
    assert _refused(api.nodes("pve1").qemu(500).delete)[0] == 403
    assert _refused(lambda: vm.config.put(smbios1="uuid=00000000-0000-4000-8000-000000000000"))[0] == 403
    vm.status.stop.post()
    assert _end(api, vm.delete(purge=1)) == "OK"
    assert _refused(vm.config.get)[0] == 403
    pve.revoke(TOKEN, "/sdn/zones/localnetwork/vmbr0")
    assert "SDN.Use" in _refused(lambda: _clone(api, pool="sandboxes"))[1]


def test_cloud_init_keys_take_either_of_two_privileges(api: Any, pve: ProxmoxDouble) -> None:
    vm = api.nodes("pve1").qemu(101)
    pve.add_guest(101)
    pve.grant(TOKEN, "/vms/101", "VM.Config.Options")
    assert _refused(lambda: vm.config.put(ciuser="debian"))[0] == 403
    for priv in ("VM.Config.Network", "VM.Config.Cloudinit"):
        pve.revoke(TOKEN)
        pve.grant(TOKEN, "/vms/101", priv)
        vm.config.put(ciuser="debian")


def test_new_vms_are_listed_late(api: Any, pve: ProxmoxDouble) -> None:
    pve.listing_lag = 60
    _clone(api)
    found = next(vm for vm in api.cluster.resources.get(type="vm") if vm["vmid"] == 101)
    assert found["status"] == "unknown" and "name" not in found


def test_wrong_token_is_401(api: Any, agentlab_env: dict[str, str]) -> None:
    assert _refused(_login({**agentlab_env, "PROXMOX_TOKEN_SECRET": "wrong"}).version.get)[0] == 401


# ---- what tests need beside


def test_counting(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    pve.reset_count()
    vm = api.nodes("pve1").qemu(101)
    vm.config.get()
    vm.config.get()
    vm.config.put(description="x")
    vm.status.start.post()
    assert pve.count() == {
        ("GET", "/nodes/{node}/qemu/{vmid}/config"): 2,
        ("PUT", "/nodes/{node}/qemu/{vmid}/config"): 1,
        ("POST", "/nodes/{node}/qemu/{vmid}/status/start"): 1,
    }
    assert pve.touched(101) == [
        ("PUT", "/nodes/pve1/qemu/101/config", {"description": "x"}),
        ("POST", "/nodes/pve1/qemu/101/status/start", {}),
    ]
    assert pve.touched(9000) == [] and [entry["status"] for entry in pve.history] == [200] * 4


@pytest.mark.parametrize(("kind", "done"), [("cut-before", False), ("cut-after", True), ("truncate", True)])
def test_connections_cut(api: Any, pve: ProxmoxDouble, kind: str, done: bool) -> None:
    pve.add_guest(101)
    pve.fault("POST", "/qemu/101/status/start", kind)
    with pytest.raises(requests.exceptions.RequestException):
        api.nodes("pve1").qemu(101).status.start.post()
    assert (pve.vm(101).status == "running") is done
    assert api.nodes("pve1").qemu(101).config.get()["name"] == "somebody-elses"


def test_a_fault_that_does_not_exist_is_refused(pve: ProxmoxDouble) -> None:
    with pytest.raises(ValueError, match="cut-off"):
        pve.fault("GET", "/version", "cut-off")
    with pytest.raises(ValueError, match="state"):
        pve.fault("GET", "/version", "answer", state=502)
    assert pve.faults == []


def test_raw_answers(api: Any, pve: ProxmoxDouble) -> None:
    pve.fault("GET", "/version", "answer", status=200, body='{"data": {"vers')
    assert set(api.version.get()) == {"errors"}
    pve.fault("GET", "/version", "answer", status=502, body="<html>bad gateway</html>", type="text/html")
    assert _refused(api.version.get)[0] == 502
    assert "version" in api.version.get()


@pytest.mark.parametrize(
    ("carry_out", "at_once", "later"), [(False, False, False), (True, True, True), ("late", False, True)]
)
def test_hanging_requests(
    api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str], carry_out: bool | str, at_once: bool, later: bool
) -> None:
    pve.add_guest(101)
    pve.fault("POST", "/nodes/{node}/qemu/{vmid}/status/start", "hang", seconds=0.5, carry_out=carry_out)
    with pytest.raises(requests.exceptions.ReadTimeout):
        _login(agentlab_env, timeout=0.2).nodes("pve1").qemu(101).status.start.post()
    assert (pve.vm(101).status == "running") is at_once
    time.sleep(0.5)
    assert (pve.vm(101).status == "running") is later


def test_a_vm_swapped_just_before_its_deletion(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    seen = []

    def swap(method: str, path: str) -> None:
        if method == "DELETE":
            pve.make_foreign(101, same_name=True, copy_description=True, running=True)

    pve.before = swap
    pve.after = lambda method, path: seen.append((method, path, pve.history[-1]["params"]))
    assert "is running" in _refused(lambda: api.nodes("pve1").qemu(101).delete(purge=1))[1]
    assert seen == [("DELETE", "/api2/json/nodes/pve1/qemu/101", {"purge": "1"})]


def test_foreign_vms(api: Any, pve: ProxmoxDouble) -> None:
    _clone(api)
    old = dict(pve.vm(101).config, tags="mine")
    pve.vm(101).config = dict(old)
    new = pve.make_foreign(101, same_name=True, same_tags=True, copy_description=True)
    assert (
        all(new.config[key] == old[key] for key in ("name", "tags", "description"))
        and new.config["smbios1"] != old["smbios1"]
    )
    new = pve.make_foreign(101, smbios=False, template=True)
    assert not {"smbios1", "tags", "description"} & set(new.config) and new.template and new.name == "somebody-elses"
    assert pve.volumes_of(101) == ["local-lvm:base-101-disk-0"]
    assert pve.make_foreign(700, lock="backup", protection=True).config["lock"] == "backup"


def test_call_runs_between_requests(pve_server: DoubleServer, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")

    async def migrate() -> str:
        return str(await pve.migrate(101, "pve2"))

    assert pve_server.call(migrate).startswith("UPID:pve1:") and pve.vm(101).node == "pve2"
    assert pve_server.call(lambda: 7) == 7


def test_many_at_once(api: Any, pve: ProxmoxDouble, agentlab_env: dict[str, str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pve.time_scale = 0.01
    with ThreadPoolExecutor(12) as pool:
        ends = list(
            pool.map(lambda newid: _end(_login(agentlab_env), _clone(_login(agentlab_env), newid)), range(101, 125))
        )
    assert ends == ["OK"] * 24
    assert len({pve.vm(vmid).config["smbios1"] for vmid in range(101, 125)}) == 24


# ---- the double as a process, plays


def test_play_tells_what_every_task_did(tmp_path: Path) -> None:
    done = play.run_play(
        """
        - name: Say
          ansible.builtin.debug:
            msg: "{{ greeting }} {{ lookup('env', 'AGENTLAB_CONFIG') }}"
        - name: Skip
          ansible.builtin.debug:
          when: false
        - name: Loop
          ansible.builtin.command: echo {{ item }}
          loop: [a, b]
        - name: Fail
          ansible.builtin.fail:
            msg: "on purpose"
        """,
        {"AGENTLAB_CONFIG": "there"},
        tmp_path,
        extra_vars={"greeting": "hello"},
    )
    assert done.rc == 2 and done.result("Say")["msg"] == "hello there" and done.last["msg"] == "on purpose"
    assert [(entry["task"], entry["status"]) for entry in done.results] == [
        ("Say", "ok"),
        ("Skip", "skipped"),
        ("Loop", "changed"),
        ("Loop", "changed"),
        ("Loop", "changed"),
        ("Fail", "failed"),
    ]
    assert [entry["result"]["stdout"] for entry in done.all("Loop") if entry.get("item")] == ["a", "b"]
    assert done.warnings == [] and [entry["task"] for entry in done.failed] == ["Fail"]


def test_play_sees_warnings_and_no_outer_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXMOX_HOST", "proxmox.example.org")
    monkeypatch.setenv("ANSIBLE_STDOUT_CALLBACK", "no_such_callback")
    done = play.run_play("- ansible.builtin.debug: {msg: \"{{ lookup('env', 'PROXMOX_HOST') }}\"}", {}, tmp_path).ok()
    assert done.last["msg"] == "" and os.environ["PROXMOX_HOST"]
    bad = play.run_play([{"hosts": "nobody", "tasks": []}], {}, tmp_path)
    assert bad.rc == 0 and any("[WARNING]" in line for line in bad.warnings)
    with pytest.raises(AssertionError):
        bad.ok()


def test_module_and_adhoc(tmp_path: Path) -> None:
    made = play.run_module(
        "ansible.builtin.file",
        {"path": str(tmp_path / "new"), "state": "directory", "mode": "0700"},
        {},
        tmp_path,
        check=True,
    ).ok()
    assert made.status("ansible.builtin.file") == "changed" and not (tmp_path / "new").exists()
    assert play.run_adhoc("ansible.builtin.command", {"cmd": "echo hi"}, {}, tmp_path).ok().last["stdout"] == "hi"
    assert play.run_adhoc("ansible.builtin.command", "echo 'a b'", {}, tmp_path).ok().last["stdout"] == "a b"


def test_core_can_be_imported() -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states

    assert Path(states.__file__).resolve() == play.REPO / "plugins" / "module_utils" / "_core" / "states.py"


# ---- access: what a deeper path, a pool and a separated token give


def _may(api: Any, path: str) -> set[str]:
    return set(api.access.permissions.get(path=path)[path])


def test_a_role_on_a_deeper_path_replaces_what_is_inherited(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.add_guest(102)
    pve.grant(TOKEN, "/", "VM.Audit", "Sys.Audit")
    assert [row["vmid"] for row in api.cluster.resources.get(type="vm")] == [9000, 101, 102]
    pve.grant(TOKEN, "/vms/101", "VM.Config.Disk")
    assert _may(api, "/vms/101") == {"VM.Config.Disk"} and _may(api, "/vms/102") == {"VM.Audit", "Sys.Audit"}
    assert [row["vmid"] for row in api.cluster.resources.get(type="vm")] == [9000, 102]
    assert _refused(api.nodes("pve1").qemu(101).config.get)[0] == 403
    pve.grant(TOKEN, "/vms/101", "VM.Audit")
    assert _may(api, "/vms/101") == {"VM.Config.Disk", "VM.Audit"}


def test_a_pools_roles_add_to_those_of_its_vms(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, pool="sandboxes")
    pve.grant(TOKEN, "/", "VM.Audit", "Sys.Audit")
    pve.grant(TOKEN, "/pool/sandboxes", "VM.PowerMgmt")
    assert _may(api, "/vms/101") == {"VM.Audit", "Sys.Audit", "VM.PowerMgmt"} and _may(api, "/pool/sandboxes") == {
        "VM.PowerMgmt"
    }
    pve.no_access.add("/pool/sandboxes")
    assert _may(api, "/vms/101") == set()


def test_a_role_without_propagation_counts_for_its_path_alone(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN, "/vms", "VM.Audit", propagate=False)
    assert _may(api, "/vms") == {"VM.Audit"} and _may(api, "/vms/101") == set()


def test_a_separated_token_holds_what_both_it_and_its_user_hold(api: Any, pve: ProxmoxDouble) -> None:
    pve.separated.add(TOKEN)
    pve.grant(TOKEN.split("!", maxsplit=1)[0], "/", "VM.Audit", "Sys.Audit")
    assert _may(api, "/vms/9000") == set() and api.access.permissions.get() == {}
    pve.grant(TOKEN, "/vms", "VM.Audit", "VM.Allocate")
    assert _may(api, "/vms/9000") == {"VM.Audit"} and _refused(api.cluster.ha.status.current.get)[0] == 403


def test_a_separated_token_without_any_acl_may_nothing(api: Any, pve: ProxmoxDouble) -> None:
    pve.grant(TOKEN.split("!", maxsplit=1)[0], "/", "VM.Audit", "Sys.Audit")
    assert _may(api, "/vms/9000") == {"VM.Audit", "Sys.Audit"}


# ---- tags


@pytest.mark.parametrize(
    ("policy", "registered", "refused", "taken"),
    [
        (("none", set()), set(), ["agentlab", ""], []),
        (("list", {"agentlab"}), set(), ["free1", "AgentLab;old"], ["agentlab;old"]),
        (("existing", set()), set(), ["new;old"], ["seen;old"]),
        (("free", set()), {"reserved1"}, ["reserved1;old"], ["free1;old"]),
        (("list", {"reserved1"}), {"reserved1"}, ["reserved1;old"], ["old"]),
    ],
)
def test_tags_that_the_cluster_restricts(
    api: Any,
    pve: ProxmoxDouble,
    policy: tuple[str, set[str]],
    registered: set[str],
    refused: list[str],
    taken: list[str],
) -> None:
    (pve.tag_access, pve.tag_allow_list), pve.registered_tags = policy, registered
    pve.add_guest(101, config={"tags": "old"})
    pve.add_guest(102, config={"tags": "seen"})
    config = api.nodes("pve1").qemu(101).config
    for tags in refused:
        status, text = _refused(
            lambda wanted=tags: config.put(
                **({"tags": wanted} if wanted else {"delete": "tags"}), description="beside it"
            )
        )
        assert status == 403 and re.search(r"Permission check failed \(/, Sys.Modify for modifying tag '\w+'\)", text)
    assert config.get().get("description") is None
    config.put(tags="old", description="beside it")
    for tags in taken:
        config.put(tags=tags)
    pve.grant(TOKEN, "/", "Sys.Modify", "VM.Config.Options", "VM.Audit")
    config.put(tags="free1;reserved1")


def test_allowed_tags_are_told_beforehand(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, config={"tags": "seen"})
    assert api.cluster.options.get()["allowed-tags"] == ["seen"]
    pve.tag_access, pve.tag_allow_list, pve.registered_tags = "list", {"a", "b"}, {"b"}
    told = api.cluster.options.get()
    assert (
        told["allowed-tags"] == ["a"]
        and told["user-tag-access"]["user-allow"] == "list"
        and told["registered-tags"] == ["b"]
    )
    pve.tag_access = "none"
    pve.grant(TOKEN, "/vms", "VM.Audit")
    assert api.cluster.options.get() == {"allowed-tags": []}


# ---- power and hibernation


def test_a_hibernated_vm(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    vm = api.nodes("pve1").qemu(101)
    vm.status.start.post()
    assert _end(api, vm.status.suspend.post(todisk=1)) == "OK"
    assert (
        vm.status.current.get()["status"] == "stopped"
        and vm.config.get()["lock"] == "suspended"
        and pve.volumes_of(101)[-1].endswith(".raw")
    )
    for end in (vm.status.stop.post(), vm.status.shutdown.post()):
        assert _end(api, end) == "OK" and vm.config.get()["lock"] == "suspended"
    assert _refused(lambda: vm.config.put(description="x")) == (500, "VM is locked (suspended) ")
    assert _refused(vm.status.suspend.post)[0] == 500
    pve.vm(101).start_error = "start failed: QEMU exited with code 1"
    for end in (vm.status.start.post(), vm.status.resume.post()):
        assert _end(api, end) == "start failed: QEMU exited with code 1" and vm.config.get()["lock"] == "suspended"
    pve.vm(101).start_error = None
    assert _end(api, vm.status.resume.post()) == "OK" and vm.status.current.get()["qmpstatus"] == "running"
    assert not {"lock", "vmstate", "runningcpu"} & set(vm.config.get()) and not [
        name for name in pve.volumes_of(101) if "state" in name
    ]


def test_the_state_of_a_hibernated_vm_is_thrown_away(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.hibernate(101)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(delete="vmstate", description="kept", digest=vm.config.get()["digest"])
    assert not {"lock", "vmstate", "runningcpu"} & set(vm.config.get()) and vm.config.get()["description"] == "kept"
    assert _end(api, vm.status.start.post()) == "OK"
    vm.status.stop.post()
    pve.hibernate(101)
    assert _end(api, vm.delete(purge=1)) == "OK" and pve.volumes_of(101) == []


def test_a_hibernation_that_fails_leaves_the_vm_running_and_locked(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")
    vm = api.nodes("pve1").qemu(101)
    pve.hibernation_error = "VM 101 qmp command 'savevm-start' failed"
    assert _end(api, vm.status.suspend.post(todisk=1)) == pve.hibernation_error
    assert vm.status.current.get()["status"] == "running" and vm.config.get()["lock"] == "suspending"
    for end in (vm.status.start.post(), vm.status.stop.post(), vm.status.shutdown.post()):
        assert _end(api, end) == "VM is locked (suspending)"
    assert _refused(vm.delete) == (500, "VM 101 is running - destroy failed ")
    assert _refused(lambda: vm.config.put(delete="vmstate")) == (500, "VM is locked (suspending) ")
    assert _end(api, vm.status.resume.post()) == "OK" and vm.config.get()["lock"] == "suspending"
    pve.unlock(101)
    assert _end(api, vm.status.stop.post()) == "OK"


def test_a_paused_vm(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.power(101, "paused")
    vm = api.nodes("pve1").qemu(101)
    assert (vm.status.current.get()["status"], vm.status.current.get()["qmpstatus"]) == ("running", "paused")
    assert _refused(vm.status.shutdown.post) == (500, "VM is paused - cannot shutdown ")
    upid = vm.status.suspend.post()
    assert ":qmpause:" in upid and _end(api, upid) == "OK" and _end(api, vm.status.resume.post()) == "OK"


def test_more_vcpus_than_the_node_has(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, config={"cores": 3})
    pve.node_figures["pve1"] = {"maxcpu": 2}
    assert _end(api, api.nodes("pve1").qemu(101).status.start.post()) == "MAX 2 vcpus allowed per VM on this node"
    assert api.nodes.get()[0]["maxcpu"] == 2


def test_a_guest_that_does_not_let_a_disk_go(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, status="running")
    pve._disk("local-lvm", "vm-800-disk-0", 800, 1024**3)
    vm = api.nodes("pve1").qemu(101)
    vm.config.put(scsi5="local-lvm:vm-800-disk-0")
    pve.unplug_refused = {101}
    status, text = _refused(lambda: vm.config.put(delete="scsi5"))
    assert (
        status == 400
        and "hotplug problem - error on hot-unplugging device 'virtioscsi5' - still busy in guest?" in text
    )
    assert "scsi5" not in vm.config.get() and "scsi5" in vm.config.get(current=1)
    assert next(row for row in vm.pending.get() if row["key"] == "scsi5")["delete"] == 1
    vm.config.put(description="the next write succeeds")
    vm.status.stop.post()
    vm.status.start.post()
    assert "scsi5" not in vm.config.get(current=1)


# ---- quorum, nodes, lists


def test_the_quorum_row_is_live_and_cluster_status_a_cache(api: Any, pve: ProxmoxDouble) -> None:
    def quorate() -> tuple[int, int]:
        rows = {row["type"]: row for row in api.cluster.ha.status.current.get()}
        return rows["quorum"]["quorate"], next(
            row["quorate"] for row in api.cluster.status.get() if row["type"] == "cluster"
        )

    assert quorate() == (1, 1)
    pve.cached_quorate = 0
    assert quorate() == (1, 0)
    pve.lose_quorum()
    pve.cached_quorate = 1
    assert quorate() == (0, 1)
    assert api.cluster.ha.status.current.get()[0]["status"] == "No quorum on node 'pve1'!"
    pve.cached_quorate, pve.stale_quorum = None, True
    assert quorate() == (1, 1)
    pve.grant(TOKEN, "/vms", "VM.Audit")
    assert _refused(api.cluster.ha.status.current.get) == (403, "Permission check failed (/, Sys.Audit) ")


def test_the_list_lags_behind_the_power_state(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    pve.status_lag = 60
    assert [row["status"] for row in api.cluster.resources.get(type="vm") if row["vmid"] == 101] == ["stopped"]
    api.nodes("pve1").qemu(101).status.start.post()
    pve.add_guest(102)
    listed = {row["vmid"]: row for row in api.cluster.resources.get(type="vm")}
    assert (
        listed[101]["status"] == "stopped"
        and listed[102]["status"] == "unknown"
        and not {"name", "template"} & set(listed[102])
    )
    assert api.nodes("pve1").qemu(101).status.current.get()["status"] == "running"
    pve.status_lag = 0
    assert [row["status"] for row in api.cluster.resources.get(type="vm") if row["vmid"] == 101] == ["running"]


def test_nodes_without_rights_have_no_figures(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_node("pve2")
    pve.maintenance.add("pve2")
    pve.grant(TOKEN, "/nodes/pve1", "Sys.Audit")
    for rows in (api.nodes.get(), api.cluster.resources.get(type="node")):
        with_figures = {row["node"]: "maxmem" in row for row in rows}
        assert with_figures == {"pve1": True, "pve2": False} and {row["status"] for row in rows} == {"online"}
    assert [row["hastate"] for row in api.cluster.resources.get(type="node")] == ["online", "maintenance"]
