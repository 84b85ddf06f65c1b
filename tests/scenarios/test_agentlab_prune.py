# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_prune in real playbooks: what goes, what is kept and why, and what is never touched."""

from __future__ import annotations

import time
from typing import Any

import pytest

from support.story import edit, records, state_of, task, writes, written

PRUNE = "agentlab_prune"
SHAPE = {"changed", "count", "pruned", "kept", "failed_items"}


def reasons(answer: dict[str, Any]) -> dict[int, str]:
    return {one["vmid"]: one["reason"] for one in answer["kept"]}


@pytest.mark.everyday
def test_prune_selects_plans_and_prunes(story: Any, given: Any, env: Any, server: Any) -> None:
    given(4, "TIMEOUT")
    given(1, "TIMEOUT", tags=["debug"])
    given(1)
    given(1, "COMPLETED")
    given(1, "TIMEOUT", protected=True)
    edit(env, [1000, 1001], state_changed_at=int(time.time()) - 25 * 3600)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda: seen.update({name: (records(env["AGENTLAB_DATABASE"]), written(env["AGENTLAB_DATABASE"]))})

    def lose() -> None:
        server.pve.vms.remove(server.pve.vm(1001))

    run = story(
        [
            task("guard", PRUNE, max_count=2, fails=True, before=note("start")),
            task("guard in check mode", PRUNE, max_count=2, check=True, fails=True, before=note("guarded")),
            task("would prune", PRUNE, check=True, diff=True),
            task("old ones would", PRUNE, older_than="24h", check=True),
            task(
                "old ones", PRUNE, older_than="24h", max_count=2, diff=True, before=lambda: (note("planned")(), lose())
            ),
            task("old ones again", PRUNE, older_than=1440),
            task("by tag", PRUNE, tags=["debug", "other"]),
            task("by state", PRUNE, states=["COMPLETED"]),
            task("all", PRUNE),
            task("all again", PRUNE, diff=True),
        ]
    )
    guard = (
        "max_count: 5 sandbox(es) would be pruned, more than max_count=2; nothing was pruned. Look at them (a dry "
        "run, check mode), then raise max_count"
    )
    assert run["guard"]["msg"] == run["guard in check mode"]["msg"] == guard
    assert seen["start"][0] == seen["guarded"][0] and len(seen["start"][0]) > 40 and seen["guarded"] == seen["planned"]
    for name in ("guard", "guard in check mode", "would prune", "old ones would"):
        assert writes(run.requests[name]) == [], name
    would = run["would prune"]
    assert would["count"] == 5 and reasons(would) == {1007: "protected"} and run.status("would prune") == "changed"
    assert set(would["diff"]["before"]) == {f"sandbox {vmid}" for vmid in range(1000, 1005)}
    planned, done = run["old ones would"], run["old ones"]
    assert [one["vmid"] for one in planned["pruned"]] == [one["vmid"] for one in done["pruned"]] == [1000, 1001]
    assert {**dict.fromkeys((1002, 1003, 1004), "too_young"), 1007: "protected"} == reasons(planned) == reasons(done)
    assert [one["reason"] for one in done["pruned"]] == ["destroyed", "vm_absent"]
    assert all(
        set(run[name]) >= SHAPE
        for name in ("would prune", "old ones would", "old ones", "old ones again", "by tag", "all", "all again")
    )
    assert (
        run["old ones again"]["count"] == 0
        and run.status("old ones again") == "ok"
        and run.requests["old ones again"] == {}
    )
    assert [one["vmid"] for one in run["by tag"]["pruned"]] == [1004] and [
        one["vmid"] for one in run["by state"]["pruned"]
    ] == [1006]
    assert [one["vmid"] for one in run["all"]["pruned"]] == [1002, 1003] and run["all"]["count"] == 2
    assert (
        run.status("all again") == "ok"
        and run.requests["all again"] == {}
        and run["all again"]["diff"] == {"before": {}, "after": {}}
    )
    assert sorted(vm.vmid for vm in server.pve.vms) == [1005, 1007, 9000] and state_of(env, 1005) == "RUNNING"


def test_prune_keeps_what_it_must(story: Any, given: Any, env: Any, server: Any) -> None:
    given(8, "TIMEOUT")
    pve = server.pve
    ours = dict(pve.vm(1001).config)
    marks: dict[int, int] = {}

    def others() -> None:
        pve.make_foreign(1000, running=True)
        pve.make_foreign(1001, running=True, description=ours["description"], tags=ours["tags"])
        pve.vm(1002).config["protection"] = 1
        pve.snapshot_lock(1003, "backup")
        pve.add_node("pve2", online=False)
        pve.vm(1004).node = "pve2"
        marks.update({vmid: len(pve.touched(vmid)) for vmid in range(1000, 1005)})

    def mend() -> None:
        pve.task_endings.clear()
        pve.quorate = True

    run = story(
        [
            task("without quorum", PRUNE, tags=[], before=lambda: (others(), setattr(pve, "quorate", False))),
            task("would", PRUNE, check=True, before=mend),
            task(
                "a failing one", PRUNE, fails=True, before=lambda: pve.task_endings.update(qmdestroy="volume is busy")
            ),
            task("the rest", PRUNE, before=mend),
            task("again", PRUNE),
        ]
    )
    quorumless = run["without quorum"]
    assert quorumless["count"] == 0 and set(reasons(quorumless)) == set(range(1000, 1008)) and not pve.disks_lost
    kept = {1001: "ambiguous", 1002: "protected", 1003: "locked", 1004: "node_offline"}
    assert run["would"]["count"] == 4 and reasons(run["would"]) == kept and writes(run.requests["would"]) == []
    failing = run["a failing one"]
    assert (
        failing["msg"].startswith("3 sandboxes could not be pruned (1 were); the first:")
        and "volume is busy" in failing["msg"]
    )
    assert (
        failing["count"] == 1
        and failing["pruned"][0]["reason"] == "vmid_reused"
        and failing["changed"]
        and reasons(failing) == kept
    )
    assert [one["vmid"] for one in failing["failed_items"]] == [1005, 1006, 1007]
    assert (
        reasons(run["the rest"]) == reasons(run["again"]) == kept
        and run.status("again") == "ok"
        and run["again"]["count"] == 0
    )
    for vmid in marks:
        assert pve.touched(vmid)[marks[vmid] :] == [], vmid
    assert pve.vm(1000).status == pve.vm(1001).status == "running"
    assert [state_of(env, vmid) for vmid in range(1000, 1008)] == ["DESTROYED", *["TIMEOUT"] * 4, *["DESTROYED"] * 3]


def test_many_absent_ones_cost_a_handful_of_requests_where_nothing_can_be_hidden(
    story: Any, given: Any, server: Any
) -> None:
    """root@pam sees everything, so the list is proof.

    From a token VMs can be hidden: each of its absences is asked for, one request a VM.
    """
    given(12, "TIMEOUT")
    server.pve.vms[:] = [vm for vm in server.pve.vms if vm.vmid == 9000]
    # An ordinary token may not read who holds which role, so it cannot show that no VM is hidden from it.
    server.pve.fail("GET", "/access/acl", 403, "Permission check failed (/access, Sys.Audit)")
    run = story([task("token", PRUNE, check=True)])
    asked = run.requests["token"]
    assert run["token"]["count"] == 12
    assert asked.pop("GET /cluster/nextid") == 12 and sum(asked.values()) <= 5 and writes(asked) == [], asked
    root = {
        "PROXMOX_USER": "root@pam",
        "PROXMOX_PASSWORD": "secret",
        "PROXMOX_TOKEN_ID": "",
        "PROXMOX_TOKEN_SECRET": "",
    }
    run = story([task("would", PRUNE, check=True), task("prune", PRUNE)], more=root)
    assert run["would"]["count"] == run["prune"]["count"] == 12
    for name in ("would", "prune"):
        # One of them is the login.
        assert sum(run.requests[name].values()) <= 7 and writes(run.requests[name]) in ([], ["POST /access/ticket"]), (
            run.requests[name]
        )


def test_bad_input_is_one_sentence_that_names_option_and_value(story: Any, given: Any) -> None:
    given(1, "TIMEOUT")
    cases = {
        "older_than": (
            {"older_than": "yesterday"},
            "older_than: 'yesterday' is not a duration. Valid: minutes as a number",
        ),
        "states": (
            {"states": ["RUNNING"]},
            "states: 'RUNNING' is not valid. Valid: TIMEOUT, COMPLETED, FAILED, STOPPED",
        ),
        "max_count": ({"max_count": -1}, "max_count: -1 is negative. Valid: 0 or more"),
        "max_count zero": ({"max_count": 0}, "max_count: 1 sandbox(es) would be pruned, more than max_count=0"),
        "wait_timeout": ({"wait_timeout": -3}, "wait_timeout: '-3' is not a duration"),
        "force": ({"force": True}, "Unsupported parameters"),
    }
    run = story([task(name, PRUNE, fails=True, **options) for name, (options, _dummy) in cases.items()])
    wrong = {
        name: run[name]["msg"]
        for name, (_dummy, wanted) in cases.items()
        if wanted not in run[name]["msg"] or "\n" in run[name]["msg"].strip()
    }
    assert not wrong, wrong
    assert all(not writes(found) for found in run.requests.values())
