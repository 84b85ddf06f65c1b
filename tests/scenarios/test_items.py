# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox with items: several sandboxes in one task, each with options of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.double import Server
from support.play import play
from support.story import task, writes

SANDBOX = "agentlab_sandbox"
ITEMS = [{"name": "a1"}, {"name": "a2", "memory": "4096", "tags": ["big"]}, {"name": "a3", "vmid": 1500}]
SECRET = "correct-horse-battery-staple"


@pytest.mark.parametrize("keywords", [{}, {"vars": {"agentlab_in_place": False}}], ids=["in place", "shipped"])
def test_one_task_creates_several_sandboxes_and_leaves_them_unchanged_after_that(
    story: Callable[..., Any], server: Server, keywords: dict[str, Any]
) -> None:
    more = [*ITEMS, {"name": "a4"}]
    run = story(
        [
            task("check", SANDBOX, items=ITEMS, memory=2048, check=True, diff=True, keywords=keywords),
            task("create", SANDBOX, items=ITEMS, memory=2048, diff=True, keywords=keywords),
            task("again", SANDBOX, items=ITEMS, diff=True, keywords=keywords),
            task("one more", SANDBOX, items=more, keywords=keywords),
            task("none", SANDBOX, items=[], keywords=keywords),
        ]
    )
    assert [row["outcome"] for row in run["check"]["results"]] == ["would_create"] * 3
    assert writes(run.requests["check"]) == []
    assert [row["name"] for row in run["create"]["results"]] == ["a1", "a2", "a3"]
    assert [row["outcome"] for row in run["create"]["results"]] == ["created"] * 3
    assert len(run["create"]["diff"]["after"]) == 3 and "sandbox" not in run["create"]
    memory = {vm.name: int(vm.config["memory"]) for vm in server.pve.vms if not vm.template}
    assert memory == {"a1": 2048, "a2": 4096, "a3": 2048, "a4": 2048} and server.pve.vm(1500).name == "a3"
    assert run.status("again") == "ok" and [row["outcome"] for row in run["again"]["results"]] == ["unchanged"] * 3
    assert sum(run.requests["again"].values()) == 0
    assert [row["outcome"] for row in run["one more"]["results"]] == [*["unchanged"] * 3, "created"]
    assert run["none"]["results"] == [] and run.status("none") == "ok"


def test_items_are_checked_as_a_whole_and_fail_by_themselves(story: Callable[..., Any], server: Server) -> None:
    server.pve.make_foreign(1700)
    run = story(
        [
            task("no name", SANDBOX, items=[{"name": "a1"}, {"cores": 2}], fails=True),
            task("twice", SANDBOX, items=[{"name": "a1"}, {"name": "a1"}], fails=True),
            task("wrong", SANDBOX, items=[{"name": "a1"}, {"name": "a2", "cores": 0}], fails=True),
            task("unknown", SANDBOX, items=[{"name": "a1", "cpus": 2}], fails=True),
            task("with vmid", SANDBOX, vmid=1000, items=[{"name": "a1"}], fails=True),
            task("absent", SANDBOX, items=[{"name": "a1"}], state="absent", fails=True),
            task("secret", SANDBOX, items=[{"name": "a1", "cloud_init_password": SECRET, "cores": 0}], fails=True),
            task("one fails", SANDBOX, items=[{"name": "a1"}, {"name": "a2", "vmid": 1700}], fails=True),
        ]
    )
    assert run["no name"]["msg"].startswith("items[1]: has neither name nor vmid")
    assert run["twice"]["msg"].startswith("items[1] (a1): name 'a1' is also that of items[0]")
    assert run["wrong"]["msg"].startswith("items[1] (a2): cores: 0 is not valid")
    assert "mutually exclusive" in run["with vmid"]["msg"]
    assert run["absent"]["msg"] == "items: only with state=present, not with state=absent"
    assert SECRET not in run.output
    assert all(writes(run.requests[name]) == [] for name in ("no name", "twice", "wrong", "unknown", "with vmid"))
    assert [row["outcome"] for row in run["one fails"]["results"]] == ["created", "failed"]
    assert run["one fails"]["msg"].startswith("1 of 2 sandboxes failed; the first: items[1] (a2): ")
    assert run["one fails"]["failed_count"] == 1 and server.pve.vm(1700).status is not None


@pytest.mark.parametrize("keywords", [{}, {"vars": {"agentlab_in_place": False}}], ids=["in place", "shipped"])
def test_what_ansible_refuses_names_the_item(story: Callable[..., Any], keywords: dict[str, Any]) -> None:
    wrong = {
        "number": {"name": "a2", "cores": "many"},
        "boolean": {"vmid": 1500, "firewall": "perhaps"},
        "unknown": {"name": "a2", "cpus": 2},
        "choice": {"name": "a2", "network_model": "ne2000"},
        "word": {"name": "a2", "profile": True},
    }
    tasks = [
        task(
            name, SANDBOX, items=[{"name": "a1", "cores": "2", "firewall": "yes"}, item], fails=True, keywords=keywords
        )
        for name, item in wrong.items()
    ]
    run = story([*tasks, task("text", SANDBOX, items=[{"name": "a1"}, "a2"], fails=True, keywords=keywords)])
    told = {name: run[name]["msg"] for name in (*wrong, "text")}
    assert told["number"].startswith("items[1] (a2): cores: 'many' is not valid. Valid: "), told
    assert told["boolean"].startswith("items[1] (vmid 1500): firewall: 'perhaps' is not valid. Valid: true or false"), (
        told
    )
    assert told["unknown"].startswith("items[1] (a2): cpus: there is no such option. Valid: allow_restart, "), told
    assert told["choice"] == (
        "items[1] (a2): network_model: 'ne2000' is not valid. Valid: virtio, e1000, e1000e, rtl8139, vmxnet3"
    ), told
    assert told["word"].startswith("items[1] (a2): profile: YAML reads a word such as yes"), told
    assert told["text"].startswith("items[1]: is not a mapping. Valid: "), told


def test_each_of_twenty_sandboxes_costs_at_most_nine_requests(story: Callable[..., Any], server: Server) -> None:
    items = [{"name": f"w{number}"} for number in range(20)]
    run = story([task("plain", SANDBOX, items=items)])
    assert run["plain"]["failed_count"] == 0 and len(run["plain"]["results"]) == 20
    assert sum(run.requests["plain"].values()) / 20 <= 9


@pytest.mark.parametrize("keywords", [{}, {"vars": {"agentlab_in_place": False}}], ids=["in place", "shipped"])
def test_items_that_are_no_mappings_are_refused_without_the_secrets_of_the_task(
    story: Callable[..., Any], server: Server, keywords: dict[str, Any]
) -> None:
    refused = {
        "null entry": [{"name": "a1", "cloud_init_password": "{{ secret }}"}, None],
        "number": [{"name": "a1"}, 5],
        "list": [{"name": "a1"}, ["a2"]],
        "text": "a1",
        "mapping": {"name": "a1"},
        "null": None,
    }
    run = story(
        [
            *(
                task(name, SANDBOX, items=items, api_password="{{ secret }}", fails=True, keywords=keywords)
                for name, items in refused.items()
            ),
            task("unknown", SANDBOX, items=["name=a2 cpus=2"], fails=True, keywords=keywords),
        ],
        args=("-vvv", "-e", f"secret={SECRET}"),
    )
    valid = "Valid: a mapping of options, such as {name: agent-1}"
    assert {name: run[name]["msg"] for name in ("null entry", "number", "list", "text")} == {
        "null entry": f"items[1]: is not a mapping. {valid}",
        "number": f"items[1]: is not a mapping. {valid}",
        "list": f"items[1]: is not a mapping. {valid}",
        "text": f"items[0]: is not a mapping. {valid}",
    }
    assert run["mapping"]["msg"].startswith("items: is not a list. Valid: a list of mappings of options")
    assert run["null"]["msg"].startswith("items: is null. Valid: a list of mappings of options, or [] for no sandbox")
    assert run["unknown"]["msg"].startswith("items[0] (a2): cpus: there is no such option. Valid: ")
    assert SECRET not in run.output and SECRET not in str(run.results)
    assert [vm.name for vm in server.pve.vms] == ["debian-13"]


def test_no_item_gets_the_vmid_that_another_item_asks_for(story: Callable[..., Any], server: Server) -> None:
    items = [{"name": "a1"}, {"vmid": 1000}, {"name": "a2"}, {"name": "a3", "vmid": 1001}]
    run = story(
        [
            task("check", SANDBOX, items=items, check=True),
            task("create", SANDBOX, items=items),
            task("again", SANDBOX, items=items),
        ]
    )
    for title, outcome in (("check", "would_create"), ("create", "created"), ("again", "unchanged")):
        rows = run[title]["results"]
        assert [row["outcome"] for row in rows] == [outcome] * 4
        assert len({row["vmid"] for row in rows}) == 4 and [rows[1]["vmid"], rows[3]["vmid"]] == [1000, 1001]
    assert len(server.pve.vms) == 1 + 4


def test_two_items_for_one_sandbox_are_refused(story: Callable[..., Any]) -> None:
    items = [{"name": "a1", "protected": True}, {"vmid": 1500, "protected": False}]
    run = story(
        [
            task("create", SANDBOX, name="a1", vmid=1500),
            task("twice", SANDBOX, items=items, fails=True),
        ]
    )
    assert run["twice"]["msg"] == (
        "items[1] (vmid 1500): is the sandbox of items[0] too, VMID 1500 with the name 'a1'. Give each sandbox one item"
    )


def test_a_workspace_for_several_sandboxes_is_refused(story: Callable[..., Any]) -> None:
    items = [{"name": "a1", "workspace": "w1"}, {"name": "a2", "workspace": "w1"}]
    run = story(
        [
            task("workspace", "agentlab_workspace", name="w1", size="4G", storage="local-lvm"),
            task("check", SANDBOX, items=items, check=True, fails=True),
            task("create", SANDBOX, items=items, fails=True),
            task("of the task", SANDBOX, items=[{"name": "a1"}, {"name": "a2"}], workspace="w1", fails=True),
            task("vmids", SANDBOX, vmids=[1000, 1001], workspace="w1", fails=True),
            task("first", SANDBOX, name="a1", workspace="w1"),
            task("second", SANDBOX, items=items[1:], fails=True),
        ]
    )
    message = "items[1] (a2): workspace 'w1' is also that of items[0]. Give each item one of its own"
    assert [run[title]["msg"] for title in ("check", "create", "of the task")] == [message] * 3
    assert run["vmids"]["msg"].startswith("workspace: is attached to one sandbox at a time. Give one VMID")
    # The error names the sandbox that has the workspace. The VMID of the failed item is not that of this sandbox.
    assert "ATTACHED to sandbox 1000 (a1)" in run["second"]["msg"] and run["second"]["results"][0]["vmid"] is None


def test_a_failed_item_shows_the_record_that_is_left_and_so_does_a_single_creation(
    story: Callable[..., Any], server: Server
) -> None:
    def hang(vmid: int) -> Callable[[], None]:
        return lambda: server.pve.next_task("qmclone", "hang", vmid=vmid)

    items = [{"name": "a1"}, {"name": "a2", "vmid": 1500}]
    run = story(
        [
            task("items", SANDBOX, items=items, wait_timeout=1, fails=True, before=hang(1500)),
            task("single", SANDBOX, name="a3", vmid=1501, wait_timeout=1, fails=True, before=hang(1501)),
            task("items again", SANDBOX, items=items, wait_timeout=1, fails=True),
        ]
    )
    for title, row in (("items", run["items"]["results"][1]), ("single", run["single"]["results"][0])):
        assert row["outcome"] == "failed" and row["reason"] == "proxmox_task_timeout"
        assert row["state"] == "PROVISIONING" and row["previous_state"] is None and row["uuid"]
        assert row["changed"] and run.result(title)["changed"] and run.status(title) == "failed"
        assert len(row["upids"]) == 1 and "qmclone" in row["upids"][0]
        assert run[title]["sandboxes"][-1]["vmid"] == row["vmid"] and run[title]["failed_count"] == 1
    assert run["single"]["sandbox"]["name"] == "a3" and run["single"]["error"]["code"] == "proxmox_task_timeout"
    again = run["items again"]["results"][1]
    assert again["previous_state"] == again["state"] == "PROVISIONING" and not again["changed"]


def test_an_update_that_is_refused_changes_no_setting_of_the_record(story: Callable[..., Any]) -> None:
    run = story(
        [
            task("create", SANDBOX, items=[{"name": "a1"}]),
            task("update", SANDBOX, items=[{"name": "a1", "memory": 4096, "protected": True}], update=True, fails=True),
            task("info", "agentlab_sandbox_info"),
            task(
                "allowed",
                SANDBOX,
                items=[{"name": "a1", "memory": 4096, "protected": True}],
                allow_restart=True,
                update=True,
                diff=True,
            ),
        ]
    )
    assert "Nothing was changed" in run["update"]["msg"] and run["info"]["sandboxes"][0]["protected"] is False
    assert run["allowed"]["diff"]["after"]["sandbox 1000"] == {"state": "RUNNING", "memory": 4096, "protected": True}


def test_runs_at_the_same_time_that_name_the_same_sandboxes_create_each_once(
    env: dict[str, str], tmp_path: Path, server: Server
) -> None:
    items = [{"name": f"a{number}"} for number in range(6)]

    def create(folder: Path) -> Any:
        folder.mkdir()
        return play([task("create", SANDBOX, items=items)], env, folder)["create"]

    with ThreadPoolExecutor(max_workers=3) as pool:
        answers = list(pool.map(create, [tmp_path / name for name in ("first", "second", "third")]))
    for rows in zip(*(answer["results"] for answer in answers), strict=True):
        assert sorted(row["outcome"] for row in rows) == ["created", "unchanged", "unchanged"], rows
    assert sorted(vm.name for vm in server.pve.vms if not vm.template) == [f"a{number}" for number in range(6)]


def test_an_unforeseen_error_of_one_item_does_not_hide_the_outcomes_of_the_others(
    context: Callable[..., Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _sandbox
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create

    run = create.run

    def fail_for_the_second(ctx: Any, spec: Any) -> Any:
        if spec.name == "a2":
            raise ZeroDivisionError("division by zero")
        return run(ctx, spec)

    monkeypatch.setattr(create, "run", fail_for_the_second)
    ctx = context()
    outcomes = ctx.run_each(
        lambda name: _sandbox._create_item(
            ctx,
            {"protected": None, "keepalive": None, "wait_for_ip": False},
            create.Spec(name=name, ttl=3600, template="debian-13"),
        ),
        ["a1", "a2", "a3"],
    )
    assert [outcome.outcome for outcome in outcomes] == ["created", "failed", "created"]
    assert outcomes[1].reason == "internal" and "ZeroDivisionError: division by zero" in str(outcomes[1].message)
