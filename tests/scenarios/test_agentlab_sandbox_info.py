# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox_info in real playbooks: filters, events, verification."""

from __future__ import annotations

from typing import Any

import pytest

from support.story import edit, task, writes, written

INFO = "agentlab_sandbox_info"
KEYS = {
    "uuid",
    "vmid",
    "name",
    "profile",
    "state",
    "node",
    "ip",
    "ip_seen_at",
    "workspace_id",
    "tags",
    "protected",
    "keepalive",
    "lease_expires_at",
    "created_at",
    "updated_at",
    "state_changed_at",
}


def vmids(answer: dict[str, Any]) -> list[int]:
    return [one["vmid"] for one in answer["sandboxes"]]


@pytest.mark.everyday
def test_each_option_selects_the_sandboxes_that_are_shown(story: Any, given: Any, env: Any, server: Any) -> None:
    empty = story([task("nothing", INFO), task("nothing in check mode", INFO, check=True)])
    assert empty["nothing"]["sandboxes"] == [] and empty["nothing"]["count"] == 0 and empty["nothing"]["by_state"] == {}
    assert {name: empty["nothing in check mode"][name] for name in ("sandboxes", "count", "by_state", "changed")} == {
        "sandboxes": [],
        "count": 0,
        "by_state": {},
        "changed": False,
    }
    given(1, name="first", tags=["a", "b"])
    given(1, "STOPPED", name="second", tags=["b"])
    given(1, "TIMEOUT", name="third")
    given(3)
    edit(env, [1003], lease_expires_at=1)
    edit(env, [1005], profile="big")
    server.pve.vms.remove(server.pve.vm(1004))
    server.pve.make_foreign(1003, running=True)
    start = written(env["AGENTLAB_DATABASE"])
    run = story(
        [
            task("all", INFO),
            task("in check mode", INFO, check=True),
            task("one", INFO, vmid=1000),
            task("named", INFO, name="second"),
            task("several", INFO, vmids=[1002, 1000, 1777]),
            task("none", INFO, vmids=[]),
            task("unknown", INFO, vmid=1777),
            task("states", INFO, states=["STOPPED", "TIMEOUT"]),
            task("tags", INFO, tags=["b", "z"]),
            task("expired", INFO, expired=True),
            task("profile", INFO, profile="big"),
            task("events", INFO, vmid=1000, events=3),
            task("verify", INFO, verify=True),
            task("compare", INFO, verify=True, verify_identity=False, vmids=[1000, 1002, 1003]),
            task("verify nothing", INFO, states=["SUSPENDED"], verify=True),
        ]
    )
    assert written(env["AGENTLAB_DATABASE"]) == start
    assert all(run.status(entry["task"]) == "ok" for entry in run.results)
    assert (
        vmids(run["all"]) == vmids(run["in check mode"]) == list(range(1000, 1006))
        and set(run["all"]["sandboxes"][0]) == KEYS
    )
    assert run["all"]["count"] == 6 and run["all"]["by_state"] == {"RUNNING": 4, "STOPPED": 1, "TIMEOUT": 1}
    assert vmids(run["one"]) == [1000] and vmids(run["named"]) == [1001] and set(vmids(run["several"])) == {1000, 1002}
    assert vmids(run["none"]) == vmids(run["unknown"]) == vmids(run["verify nothing"]) == []
    assert (
        vmids(run["states"]) == [1001, 1002] and vmids(run["tags"]) == [1000, 1001] and vmids(run["expired"]) == [1003]
    )
    assert vmids(run["profile"]) == [1005]
    events = run["events"]["sandboxes"][0]["events"]
    assert (
        len(events) == 3
        and events[-1]["to_state"] == "RUNNING"
        and events[-1]["at"].endswith("Z")
        and events[-1]["actor"] == "tester"
    )
    shown = {one["vmid"]: one for one in run["verify"]["sandboxes"]}
    assert shown[1000]["identity"] == "MATCH" and shown[1000]["vm_status"] == "running" and shown[1000]["drift"] is None
    assert (
        shown[1003]["identity"] == "FOREIGN"
        and shown[1004]["vm_status"] == "absent"
        and shown[1004]["drift"].startswith("its VM is gone")
    )
    assert shown[1002]["drift"] == "the record says TIMEOUT, the VM is running; reconcile stops it"
    compared = {one["vmid"]: one for one in run["compare"]["sandboxes"]}
    assert (
        {one["identity"] for one in compared.values()} == {None}
        and compared[1000]["vm_status"] == "running"
        and compared[1000]["drift"] is None
    )
    assert compared[1002]["drift"] == "the record says TIMEOUT, the VM is running; reconcile stops it"
    assert compared[1003]["drift"].startswith("the VM is called ")
    assert dict(run.requests["compare"]) == {"GET /cluster/resources": 1}
    for name, requests in run.requests.items():
        assert writes(requests) == [] and (name in ("verify", "compare") or not requests), (name, requests)


def test_bad_input_is_one_sentence_that_names_option_and_value(story: Any, given: Any) -> None:
    given(1)
    cases = {
        "states": ({"states": ["GONE"]}, "states: 'GONE' is not valid. Valid: REQUESTED"),
        "vmid": ({"vmid": 1}, "vmid: 1 is not a VMID. Valid: 100 to 999999999"),
        "two": ({"vmid": 1000, "name": "x"}, "parameters are mutually exclusive: vmid|vmids|name"),
        "events": ({"events": -1}, "events: -1 is negative. Valid: 0 or more"),
    }
    run = story([task(name, INFO, fails=True, **options) for name, (options, _dummy) in cases.items()])
    wrong = {name: run[name]["msg"] for name, (_dummy, wanted) in cases.items() if wanted not in run[name]["msg"]}
    assert not wrong, wrong
