# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox in real playbooks: its life, many at once, protection, addresses."""

from __future__ import annotations

from typing import Any

import pytest

from support.story import edit, state_of, task, writes, written

SANDBOX = "agentlab_sandbox"

DESTROY_REFUSED = "cannot destroy sandbox in RUNNING state. Valid states: STOPPED, DESTROYED. Use force=true to bypass"


@pytest.mark.everyday
def test_a_sandbox_lives_from_creation_to_absence(story: Any, env: Any, server: Any) -> None:
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda: seen.update({name: written(env["AGENTLAB_DATABASE"])})

    run = story(
        [
            task("would create", SANDBOX, name="life", check=True, diff=True, before=note("start")),
            task(
                "create",
                SANDBOX,
                name="life",
                ttl="2h",
                cores=4,
                memory=4096,
                tags=["ci"],
                wait_for_ip=True,
                diff=True,
                before=note("after check"),
            ),
            task(
                "create again",
                SANDBOX,
                name="life",
                ttl="2h",
                cores=4,
                memory=4096,
                tags=["ci"],
                wait_for_ip=True,
                diff=True,
            ),
            task("started again", SANDBOX, name="life", state="started"),
            task("would stop", SANDBOX, vmid=1000, state="stopped", check=True, before=note("running")),
            task("would suspend", SANDBOX, vmid=1000, state="suspended", check=True),
            task("would destroy", SANDBOX, vmid=1000, state="absent", force=True, check=True, diff=True),
            task(
                "destroy refused",
                SANDBOX,
                vmid=1000,
                state="absent",
                fails=True,
                before=lambda: seen.update(checked=written(env["AGENTLAB_DATABASE"])),
            ),
            task("destroy refused in check mode", SANDBOX, vmid=1000, state="absent", check=True, fails=True),
            task("suspend", SANDBOX, vmid=1000, state="suspended"),
            task("suspend again", SANDBOX, vmid=1000, state="suspended"),
            task("present leaves it suspended", SANDBOX, vmid=1000),
            task("start", SANDBOX, vmid=1000, state="started"),
            task("stop", SANDBOX, vmid=1000, state="stopped", diff=True),
            task("stop again", SANDBOX, vmid=1000, state="stopped"),
            task("absent", SANDBOX, vmid=1000, state="absent", diff=True),
            task("absent again", SANDBOX, vmid=1000, state="absent"),
            task("absent and never there", SANDBOX, vmid=1999, state="absent"),
        ]
    )
    assert seen["start"] == seen["after check"] == ("missing",)
    assert seen["running"] == seen["checked"]
    for name in ("would create", "would stop", "would suspend", "would destroy", "destroy refused in check mode"):
        assert writes(run.requests[name]) == [], name
    would, created = run["would create"], run["create"]
    assert would["changed"] and created["changed"] and set(would) == set(created)
    assert created["sandbox"]["state"] == "RUNNING" and created["sandbox"]["vmid"] == 1000 and created["sandbox"]["ip"]
    assert (
        created["sandbox"]["tags"] == ["ci"]
        and created["results"][0]["outcome"] == "created"
        and created["results"][0]["upids"]
    )
    assert created["diff"] == {
        "before": {"sandbox 1000": {"state": None}},
        "after": {"sandbox 1000": {"state": "RUNNING"}},
    }
    assert run["create again"]["diff"] == {"before": {}, "after": {}}
    unchanged = (
        "create again",
        "started again",
        "suspend again",
        "present leaves it suspended",
        "stop again",
        "absent again",
        "absent and never there",
    )
    vm = "GET /nodes/{node}/qemu/{vmid}"
    for name in unchanged:
        assert run.status(name) == "ok", name
        # Whoever asks for a power state is told what the VM says, by two reads; the rest is answered by the records.
        looks = (
            {f"{vm}/status/current": 1, f"{vm}/config": 1} if name.split()[0] in ("started", "suspend", "stop") else {}
        )
        assert run.requests[name] == looks, (name, run.requests[name])
    for name in ("would stop", "would suspend", "would destroy", "suspend", "start", "stop", "absent"):
        assert run.status(name) == "changed", name
    assert run["would destroy"]["diff"] == {
        "before": {"sandbox 1000": {"state": "RUNNING"}},
        "after": {"sandbox 1000": {"state": "DESTROYED"}},
    }
    for name in ("destroy refused", "destroy refused in check mode"):
        assert run[name]["msg"] == DESTROY_REFUSED
        assert run[name]["changed"] is False
    assert run["present leaves it suspended"]["sandbox"]["state"] == "SUSPENDED"
    gone = run["absent"]["results"][0]
    assert (gone["outcome"], gone["previous_state"], gone["state"]) == ("destroyed", "STOPPED", "DESTROYED")
    assert run["absent and never there"]["results"][0]["outcome"] == "not_found"
    assert run["absent and never there"]["sandbox"] is None
    assert server.pve.vm(1000) is None and state_of(env, 1000) == "DESTROYED"


def test_many_at_once_have_the_shape_of_one(story: Any, server: Any) -> None:
    run = story(
        [
            task("none", SANDBOX, vmids=[]),
            task("none absent", SANDBOX, vmids=[], state="absent"),
            task("one", SANDBOX, vmids=[1001]),
            task("three", SANDBOX, vmids=[1002, 1003, 1001]),
            task("three again", SANDBOX, vmids=[1001, 1002, 1003, 1002]),
            task("stop two", SANDBOX, vmids=[1001, 1002], state="stopped"),
            task("mixed", SANDBOX, vmids=[1001, 1003, 1777], state="absent", fails=True),
            task("an unknown one stops all of it", SANDBOX, vmids=[1002, 1777], state="started", fails=True),
            task("force the rest", SANDBOX, vmids=[1001, 1002, 1003], state="absent", force=True, diff=True),
            task("single", SANDBOX, vmid=1004),
        ]
    )
    shape = {"changed", "sandboxes", "results", "failed_count"}
    for name in ("none", "none absent", "one", "three", "three again", "stop two", "mixed", "force the rest", "single"):
        assert shape <= set(run[name]), name
        assert ("sandbox" in run[name]) == (name == "single"), name
    assert run["none"]["results"] == run["none"]["sandboxes"] == [] and run.status("none") == "ok"
    assert [one["outcome"] for one in run["three"]["results"]] == ["created", "created", "unchanged"]
    assert [one["vmid"] for one in run["three again"]["sandboxes"]] == [1001, 1002, 1003] and run.status(
        "three again"
    ) == "ok"
    mixed = run["mixed"]
    assert [(one["vmid"], one["outcome"]) for one in mixed["results"]] == [
        (1001, "destroyed"),
        (1003, "failed"),
        (1777, "not_found"),
    ]
    assert mixed["changed"] and mixed["failed_count"] == 1
    assert mixed["msg"] == f"1 of 3 sandboxes failed; the first: {DESTROY_REFUSED}"
    assert run["an unknown one stops all of it"]["msg"].startswith("sandbox not found (vmid: 1777)")
    assert writes(run.requests["an unknown one stops all of it"]) == []
    assert [one["outcome"] for one in run["force the rest"]["results"]] == ["unchanged", "destroyed", "destroyed"]
    assert set(run["force the rest"]["diff"]["before"]) == {"sandbox 1002", "sandbox 1003"}
    assert [vm.vmid for vm in server.pve.vms] == [9000, 1004]


def test_states_are_checked_and_not_found_fails_but_for_absent(story: Any, given: Any) -> None:
    given(1, "TIMEOUT", name="over")
    given(1, "COMPLETED", name="done")
    states = ("started", "stopped", "suspended", "completed", "failed")
    run = story(
        [
            *(task(f"unknown {state}", SANDBOX, vmid=1500, state=state, fails=True) for state in states),
            task("unknown name", SANDBOX, name="nobody", state="stopped", fails=True),
            task("unknown name absent", SANDBOX, name="nobody", state="absent"),
            task("start over", SANDBOX, name="over", state="started", fails=True),
            task("suspend over", SANDBOX, name="over", state="suspended", fails=True),
            task("complete over", SANDBOX, name="over", state="completed", fails=True),
            task("fail done", SANDBOX, name="done", state="failed", fails=True),
            task("completed again", SANDBOX, name="done", state="completed"),
            task("absent over", SANDBOX, name="over", state="absent", fails=True),
            task("stop over", SANDBOX, name="over", state="stopped"),
            task("absent over again", SANDBOX, name="over", state="absent"),
        ]
    )
    for state in states:
        assert (
            run[f"unknown {state}"]["msg"] == "sandbox not found (vmid: 1500). A VM without a record is never touched"
        )
    assert run["unknown name"]["msg"].startswith("sandbox not found (name: 'nobody')")
    assert (
        run["unknown name absent"]["results"][0]["outcome"] == "not_found" and run.status("unknown name absent") == "ok"
    )
    assert (
        run["start over"]["msg"]
        == "cannot start sandbox in TIMEOUT state. Valid states: STOPPED, SUSPENDED, READY, RUNNING"
    )
    assert (
        run["suspend over"]["msg"] == "cannot suspend sandbox in TIMEOUT state. Valid states: READY, RUNNING, SUSPENDED"
    )
    assert run["complete over"]["msg"] == "cannot report completed in TIMEOUT state. Valid states: RUNNING, COMPLETED"
    assert run["fail done"]["msg"] == "cannot report failed in COMPLETED state. Valid states: RUNNING, FAILED"
    assert (
        run["absent over"]["msg"]
        == "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use force=true to bypass"
    )
    assert (
        run.status("completed again") == "ok"
        and run.status("stop over") == run.status("absent over again") == "changed"
    )


def test_a_protected_sandbox_and_proxmox_protection_survive_force(story: Any, server: Any, given: Any) -> None:
    given(1, name="kept")
    given(1, name="guarded")
    given(1, name="template-now")
    server.pve.vm(1001).config["protection"] = 1
    server.pve.vm(1002).config["template"] = 1
    run = story(
        [
            task("protect", SANDBOX, name="kept", protected=True, diff=True),
            task("protect again", SANDBOX, name="kept", protected=True),
            task("left out", SANDBOX, name="kept"),
            *(
                task(f"force {name}", SANDBOX, name=name, state="absent", force=True, fails=True)
                for name in ("kept", "guarded", "template-now")
            ),
            task("unprotect", SANDBOX, name="kept", protected=False),
            task("force at last", SANDBOX, name="kept", state="absent", force=True),
        ]
    )
    assert run.status("protect") == "changed" and run.status("protect again") == run.status("left out") == "ok"
    assert run["protect"]["diff"]["after"]["sandbox 1000"]["protected"] is True
    assert run["force kept"]["msg"] == "sandbox 1000 is protected. Set protected=false first (force does not skip this)"
    assert (
        "Proxmox's protection" in run["force guarded"]["msg"]
        and "templates are never destroyed" in run["force template-now"]["msg"]
    )
    assert [run[f"force {name}"]["results"][0]["reason"] for name in ("kept", "guarded", "template-now")] == [
        "protected"
    ] * 3
    assert server.pve.vm(1001).status == "running" and server.pve.vm(1002).status == "running"
    assert run.status("force at last") == "changed"


def test_a_failed_creation_that_is_protected_can_be_removed(story: Any, given: Any, env: Any) -> None:
    given(1, name="kept", protected=True)
    edit(env, [1000], state="FAILED", reason="creation_interrupted")
    run = story(
        [
            task("force", SANDBOX, name="kept", state="absent", force=True, fails=True),
            task("unprotect in check mode", SANDBOX, name="kept", protected=False, check=True),
            task("unprotect", SANDBOX, name="kept", protected=False),
            task("present", SANDBOX, name="kept", fails=True),
            task("force at last", SANDBOX, name="kept", state="absent", force=True),
        ]
    )
    assert run["force"]["msg"] == "sandbox 1000 is protected. Set protected=false first (force does not skip this)"
    assert run.status("unprotect in check mode") == run.status("unprotect") == run.status("force at last") == "changed"
    assert "could not be created earlier (creation_interrupted)" in run["present"]["msg"]


def test_a_task_with_warnings_is_a_success_with_a_warning(env: Any, tmp_path: Any, server: Any, given: Any) -> None:
    from support.play import play

    given(1)
    server.pve.task_warnings["qmdestroy"] = 1
    run = play([task("destroy", SANDBOX, vmid=1000, state="absent", force=True)], env, tmp_path)
    assert run.rc == 0 and run.status("destroy") == "changed" and run["destroy"]["results"][0]["outcome"] == "destroyed"
    assert run["destroy"]["warnings"] and all("ended with WARNINGS: 1" in line for line in run["destroy"]["warnings"])


def test_an_address_is_waited_for_later_and_looked_up_anew_at_a_start(story: Any, server: Any) -> None:
    def another() -> None:
        agent = server.pve.vm(1000).agent["interfaces"]
        agent[-1]["ip-addresses"] = [{"ip-address": "192.0.2.77", "ip-address-type": "ipv4", "prefix": 24}]

    run = story(
        [
            task("create", SANDBOX, name="later"),
            task("wait", SANDBOX, name="later", wait_for_ip=True),
            task("wait again", SANDBOX, name="later", wait_for_ip=True),
            task("another lease", SANDBOX, name="later", state="started", wait_for_ip=True, before=another),
            task("the same", SANDBOX, name="later", state="started", wait_for_ip=True),
        ]
    )
    assert run["create"]["sandbox"]["ip"] is None
    assert run["wait"]["sandbox"]["ip"] and run.status("wait") == "changed" and run.status("wait again") == "ok"
    assert run["another lease"]["sandbox"]["ip"] == "192.0.2.77" and run.status("another lease") == "changed"
    assert run.status("the same") == "ok"
