# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox with items: several sandboxes in one task, each with options of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.double import Server
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
