# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox in real playbooks: VMIDs of others, what Proxmox VE refuses, bad input."""

from __future__ import annotations

import time
from typing import Any

from support.story import state_of, task, writes

SANDBOX = "agentlab_sandbox"


def test_a_vm_that_is_somebody_elses_now_is_never_touched(story: Any, server: Any, given: Any, env: Any) -> None:
    made = given(3)
    mark: dict[int, int] = {}

    def reuse() -> None:
        for vmid in (1000, 1001):
            server.pve.make_foreign(vmid, running=True)
        # A copy made by hand: description and tags are ours, the SMBIOS UUID is not.
        ours = dict(server.pve.vm(1002).config)
        server.pve.make_foreign(1002, running=True, description=ours["description"], tags=ours["tags"])
        mark.update({vmid: len(server.pve.touched(vmid)) for vmid in (1000, 1001, 1002)})

    run = story(
        [
            task("stop", SANDBOX, vmid=1000, state="stopped", fails=True, before=reuse),
            task("suspend", SANDBOX, vmid=1000, state="suspended", fails=True),
            task("would destroy", SANDBOX, vmids=[1000, 1001], state="absent", force=True, check=True),
            task("destroy", SANDBOX, vmids=[1000, 1001], state="absent", force=True),
            task("destroy again", SANDBOX, vmids=[1000, 1001], state="absent", force=True),
            task("destroy a copy", SANDBOX, vmid=1002, state="absent", force=True, fails=True),
            task("create there", SANDBOX, vmid=1000, fails=True),
        ]
    )
    assert "now belongs to another VM (somebody-elses); it was not touched" in run["stop"]["msg"]
    assert [one["reason"] for one in run["destroy"]["results"]] == ["vmid_reused"] * 2 and run.status(
        "destroy again"
    ) == "ok"
    assert (
        "it is not certain that VM 1002" in run["destroy a copy"]["msg"]
        and run["destroy a copy"]["results"][0]["reason"] == "ambiguous"
    )
    assert run["create there"]["msg"].startswith(
        "vmid: 1000 is occupied by a VM that is not ours (somebody-elses); it was not touched"
    )
    for one in made:
        assert server.pve.touched(one.vmid)[mark[one.vmid] :] == [] and server.pve.vm(one.vmid).status == "running"
    assert [state_of(env, vmid) for vmid in (1000, 1001, 1002)] == ["DESTROYED", "DESTROYED", "RUNNING"]


def test_a_vmid_of_a_stranger_is_refused_or_passed_over(story: Any, server: Any) -> None:
    server.pve.make_foreign(1000, running=True)
    server.pve.make_foreign(1002, running=True)
    run = story(
        [
            task("own vmid", SANDBOX, vmid=1002, fails=True),
            task("own vmid in check mode", SANDBOX, vmid=1002, check=True, fails=True),
            task("next of the range", SANDBOX, name="next"),
            task("and the next", SANDBOX, name="next-2"),
            task("template's", SANDBOX, vmid=9000, fails=True),
            task("absent is not ours", SANDBOX, vmid=1000, state="absent", force=True),
        ]
    )
    assert run["own vmid"]["msg"] == run["own vmid in check mode"]["msg"]
    assert run["own vmid"]["msg"].startswith("vmid: 1002 is occupied by a VM that is not ours")
    assert run["next of the range"]["sandbox"]["vmid"] == 1001 and run["and the next"]["sandbox"]["vmid"] == 1003
    assert (
        run["absent is not ours"]["results"][0]["outcome"] == "not_found" and run.status("absent is not ours") == "ok"
    )
    assert server.pve.touched(1000) == server.pve.touched(1002) == [] and len(server.pve.touched(9000)) == 2


def test_a_vm_hidden_from_the_token_is_never_taken_for_a_free_vmid(story: Any, server: Any) -> None:
    server.pve.make_foreign(1000, running=True)
    server.pve.make_foreign(1001, running=True)
    everything = (
        "VM.Audit",
        "VM.Allocate",
        "VM.Clone",
        "VM.PowerMgmt",
        "VM.Config.Options",
        "VM.Config.CPU",
        "VM.Config.Memory",
        "VM.Config.Disk",
        "VM.Config.Network",
        "VM.Config.Cloudinit",
        "VM.GuestAgent.Audit",
        "SDN.Use",
        "Sys.Audit",
        "Datastore.Audit",
        "Datastore.AllocateSpace",
    )
    for path in ("/vms/9000", "/vms/1002", "/vms/1003", "/nodes", "/storage", "/sdn", "/pool"):
        server.pve.grant("agentlab@pve", path, *everything)
    server.pve.grant("agentlab@pve", "/", "Sys.Audit")
    # Its own VMIDs it may make, the strangers' it may not even see.
    for vmid in (1000, 1001):
        server.pve.grant("agentlab@pve", f"/vms/{vmid}", "VM.Allocate")
    run = story(
        [
            task("own vmid", SANDBOX, vmid=1001, fails=True),
            task("next", SANDBOX, name="next"),
        ]
    )
    assert "vmid: 1001 is occupied by a VM that is not ours" in run["own vmid"]["msg"]
    assert run["next"]["sandbox"]["vmid"] == 1002
    assert server.pve.touched(1000) == server.pve.touched(1001) == []


def test_a_refusal_or_failure_of_proxmox_is_told_with_its_reason(story: Any, server: Any, given: Any, env: Any) -> None:
    given(5)
    pve = server.pve

    def ending(**values: str) -> Any:
        def set_() -> None:
            pve.task_endings.clear()
            pve.task_endings.update(values)

        return set_

    def deny() -> None:
        ending()()
        # The stop that failed had carried out its work.
        pve.power(1001, "running")
        pve.grant("somebody@pve", "/", "VM.Audit")
        pve.grant("agentlab@pve", "/", "VM.Audit", "Sys.Audit")

    def allow() -> None:
        pve.acl = None
        pve.add_node("pve2", online=False)
        pve.vm(1002).node = "pve2"

    def lock() -> None:
        pve.snapshot_lock(1003, "backup")

    def warn() -> None:
        ending()()
        pve.task_warnings["qmdestroy"] = 1

    began = time.monotonic()
    run = story(
        [
            task(
                "start fails",
                SANDBOX,
                name="broken",
                fails=True,
                before=ending(qmstart="start failed: QEMU exited with code 1"),
            ),
            task(
                "clone fails",
                SANDBOX,
                name="unborn",
                fails=True,
                before=ending(qmclone="clone failed: no space left on device"),
            ),
            task(
                "delete fails",
                SANDBOX,
                vmid=1000,
                state="absent",
                force=True,
                fails=True,
                before=ending(qmdestroy="volume is busy"),
            ),
            task(
                "stop fails", SANDBOX, vmid=1001, state="stopped", fails=True, before=ending(qmshutdown="got timeout")
            ),
            task(
                "stop hangs",
                SANDBOX,
                vmid=1004,
                state="stopped",
                wait_timeout=1,
                fails=True,
                before=ending(qmshutdown="hang"),
            ),
            task("denied", SANDBOX, vmid=1001, state="suspended", fails=True, before=deny),
            task("node offline", SANDBOX, vmid=1002, state="absent", force=True, fails=True, before=allow),
            task("create on an offline node", SANDBOX, name="there", node="pve2", fails=True),
            task("locked", SANDBOX, vmid=1003, state="absent", force=True, fails=True, before=lock),
            task("one fails and one does not", SANDBOX, vmids=[1003, 1000], state="absent", force=True, fails=True),
        ]
    )
    assert time.monotonic() - began < 60
    assert (
        "start failed: QEMU exited with code 1" in run["start fails"]["msg"]
        and "what was made for it has been removed" in run["start fails"]["msg"]
    )
    assert "clone failed: no space left on device" in run["clone fails"]["msg"]
    assert "volume is busy" in run["delete fails"]["msg"] and run["delete fails"]["results"][0]["upids"]
    assert "got timeout" in run["stop fails"]["msg"]
    assert "did not end within 1 s (wait_timeout)" in run["stop hangs"]["msg"]
    assert "may not do that (403" in run["denied"]["msg"] and "VM.PowerMgmt" in run["denied"]["msg"]
    assert run["node offline"]["results"][0]["reason"] == "node_offline" and "pve2" in run["node offline"]["msg"]
    assert (
        run["locked"]["results"][0]["reason"] == "locked"
        and "(backup)" in run["locked"]["msg"]
        and "qm unlock 1003" in run["locked"]["msg"]
    )
    assert [one["outcome"] for one in run["one fails and one does not"]["results"]] == ["kept", "destroyed"]
    assert run["one fails and one does not"]["changed"] and run["one fails and one does not"]["failed_count"] == 1
    assert [state_of(env, vmid) for vmid in (1000, 1001, 1002, 1003)] == ["DESTROYED", "RUNNING", "RUNNING", "RUNNING"]
    assert (
        run["create on an offline node"]["msg"] == "node: 'pve2' is offline; choose another, or wait until it is back"
    )
    # The clone task failed, yet there is a VM: whose it is is not certain, so it is left alone, and the message says
    # so.
    assert (
        "its record is in FAILED state: sandbox 1006: it is not certain that VM 1006 (unborn) is ours"
        in run["clone fails"]["msg"]
    )
    assert (
        run["clone fails"]["msg"].endswith(". To give the sandbox up, remove it with state=absent and force=true")
        and pve.touched(1006) == []
    )
    assert not [vm for vm in pve.vms if vm.name == "broken"]


def test_bad_input_is_one_sentence_that_names_option_and_value(story: Any, server: Any, given: Any, env: Any) -> None:
    given(1)
    cases = {
        "ttl": (
            {"name": "a", "ttl": "2 hours ago"},
            "ttl: '2 hours ago' is not a duration. Valid: minutes as a number (120)",
        ),
        "ttl zero": ({"name": "a", "ttl": "0"}, "ttl: '0' is zero"),
        "ttl too long": ({"name": "a", "ttl": "400d"}, "ttl: '400d' is longer than the maximum of 30d"),
        "template": (
            {"name": "a", "template": "windows-95"},
            "template: 'windows-95' does not exist. Templates: 9000 (debian-13)",
        ),
        "template vm": ({"name": "a", "template": "1000"}, "template: VM 1000 is not a template"),
        "node": ({"name": "a", "node": "pve9"}, "node: 'pve9' is not a node of this cluster. Nodes: pve1"),
        "force": (
            {"vmid": 1000, "force": True},
            "force: only with state=absent or state=stopped, not with state=present",
        ),
        "creation option": (
            {"vmid": 1000, "state": "stopped", "cores": 2},
            "cores: only with state=present, not with state=stopped",
        ),
        "no id": ({"state": "absent"}, "vmid: state=absent needs vmid, vmids or name"),
        "vmid": ({"vmid": 12}, "vmid: 12 is not a VMID. Valid: 100 to 999999999"),
        "vmids": ({"vmids": [1000, 7], "state": "absent"}, "vmids: 7 is not a VMID"),
        "state": ({"vmid": 1000, "state": "gone"}, "value of state must be one of: present, started"),
        "name": ({"name": "no spaces please"}, "name: 'no spaces please' is not valid"),
        "name of another": ({"name": "other", "vmid": 1000}, "name: sandbox 1000 is named"),
        "destroy another": (
            {"name": "other", "vmid": 1000, "state": "absent", "force": True},
            "name: sandbox 1000 is named",
        ),
        "stop another": ({"name": "other", "vmid": 1000, "state": "stopped"}, "name: sandbox 1000 is named"),
        "tags": ({"name": "a", "tags": ["-upper"]}, "tags: '-upper' is not valid"),
        "cores": ({"name": "a", "cores": 0}, "cores: 0 is not valid. Valid: a whole number from 1 to 512"),
        "cores as a word": ({"name": "a", "cores": "two"}, "cores: 'two' is not valid. Valid: a whole number from 1"),
        "memory with a unit": (
            {"name": "a", "memory": "4G"},
            "memory: '4G' is not valid. Valid: a whole number from 16 to 16777216, in MiB and without a unit",
        ),
        "vlan as a list": ({"name": "a", "vlan_tag": [7]}, "vlan_tag: that list is not valid. Valid: a whole number"),
        "a flag": ({"name": "a", "keepalive": "maybe"}, "keepalive: 'maybe' is not valid. Valid: true or false"),
        "vmid as a word": ({"vmid": "abc"}, "vmid: 'abc' is not a VMID. Valid: 100 to 999999999"),
        "memory in items": (
            {"items": [{"name": "a"}, {"name": "b", "memory": "half"}]},
            "items[1] (b): memory: 'half' is not valid. Valid: a whole number from 16",
        ),
        "tags as a boolean": ({"name": "a", "tags": [True]}, "tags: YAML reads a word such as yes"),
        "name as a boolean": ({"items": [{"name": False}]}, "name: YAML reads a word such as yes"),
        "storage": (
            {"name": "a", "storage": "x", "full_clone": False},
            "storage: a linked clone stays on its template's storage",
        ),
        "wait": (
            {"vmid": 1000, "state": "stopped", "wait_timeout": -1},
            "wait_timeout: '-1' is not a duration. Valid: seconds as a number",
        ),
        "unknown option": ({"vmid": 1000, "vimd": 1}, "Unsupported parameters"),
    }
    run = story([task(name, SANDBOX, fails=True, **options) for name, (options, _dummy) in cases.items()])
    wrong = {
        name: run[name]["msg"]
        for name, (_dummy, wanted) in cases.items()
        if wanted not in run[name]["msg"] or "\n" in run[name]["msg"].strip()
    }
    assert not wrong, wrong
    assert [name for name in cases if writes(run.requests[name])] == []
    assert [vm.vmid for vm in server.pve.vms] == [9000, 1000] and state_of(env, 1000) == "RUNNING"
