# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_workspace_info in real playbooks: it shows and never writes."""

from __future__ import annotations

from typing import Any

from support.story import task, writes

INFO = "agentlab_workspace_info"


def test_what_is_shown(story: Any, server: Any) -> None:
    run = story(
        [
            task("none", INFO),
            task("first", "agentlab_workspace", name="a", size="1G", storage="local-lvm"),
            task("second", "agentlab_workspace", name="b", size="1G", storage="local-lvm"),
            task("third", "agentlab_workspace", name="c", size="1G", storage="local-lvm"),
            task("third goes", "agentlab_workspace", name="c", state="absent", force=True),
            task("sandbox", "agentlab_sandbox", name="s", workspace="b"),
            task("all", INFO),
            task("all in check mode", INFO, check=True),
            task("one", INFO, name="b", events=2),
            task("by state", INFO, states=["ATTACHED"]),
            task("nobody", INFO, name="nobody"),
            task("deleted too", INFO, include_deleted=True),
            task(
                "somebody removed it",
                INFO,
                name="a",
                verify=True,
                before=lambda: server.pve.storages["local-lvm"]["volumes"].pop(
                    server.pve.volumes_of(990000)[0].partition(":")[2]
                ),
            ),
        ]
    )
    assert run["none"]["workspaces"] == [] and run["none"]["count"] == 0
    assert [one["name"] for one in run["all"]["workspaces"]] == ["a", "b"] and run["all"]["count"] == 2
    assert run["all"]["workspaces"] == run["all in check mode"]["workspaces"]
    one = run["one"]["workspaces"][0]
    assert (one["name"], one["state"], one["vmid"], one["sandbox"]) == ("b", "ATTACHED", 1000, "s") and [
        e["to_state"] for e in one["events"]
    ][-1] == "ATTACHED"
    assert [found["name"] for found in run["by state"]["workspaces"]] == ["b"] and run["nobody"]["count"] == 0
    assert [(found["name"], found["state"]) for found in run["deleted too"]["workspaces"]] == [
        ("a", "DETACHED"),
        ("b", "ATTACHED"),
        ("c", "DELETED"),
    ]
    assert run["somebody removed it"]["workspaces"][0]["volume_present"] is False
    for name in ("none", "all", "one", "by state", "nobody", "deleted too", "somebody removed it"):
        assert run.status(name) == "ok" and writes(run.requests[name]) == [], name
