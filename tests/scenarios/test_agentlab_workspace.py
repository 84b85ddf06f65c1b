# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_workspace in real playbooks: a disk's life beside that of sandboxes, on local and shared storage, on two
nodes.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.story import task, writes, written

WORKSPACE = "agentlab_workspace"
SANDBOX = "agentlab_sandbox"


@pytest.mark.everyday
def test_a_workspace_lives_from_creation_to_absence(story: Any, env: Any, server: Any) -> None:
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda: seen.update({name: written(env["AGENTLAB_DATABASE"])})

    run = story(
        [
            task(
                "would create",
                WORKSPACE,
                name="data",
                size="8G",
                storage="local-lvm",
                check=True,
                diff=True,
                before=note("start"),
            ),
            task("create", WORKSPACE, name="data", size="8G", storage="local-lvm", diff=True, before=note("checked")),
            task("create again", WORKSPACE, name="data", size="8G", storage="local-lvm", diff=True),
            task("smaller", WORKSPACE, name="data", size="4G", fails=True),
            task("sandbox", SANDBOX, name="s1"),
            task(
                "would attach",
                WORKSPACE,
                name="data",
                state="attached",
                sandbox="s1",
                check=True,
                before=note("before attach"),
            ),
            task(
                "attach",
                WORKSPACE,
                name="data",
                state="attached",
                sandbox="s1",
                diff=True,
                before=note("after would attach"),
            ),
            task("attach again", WORKSPACE, name="data", state="attached", vmid=1000),
            task("would grow", WORKSPACE, name="data", size="10G", check=True),
            task("grow", WORKSPACE, name="data", size="10G", diff=True),
            task("a second one", SANDBOX, name="s2"),
            task("attach to the second", WORKSPACE, name="data", state="attached", sandbox="s2", fails=True),
            task("absent while attached", WORKSPACE, name="data", state="absent", force=True, fails=True),
            task("would detach", WORKSPACE, name="data", state="detached", check=True),
            task("detach", WORKSPACE, name="data", state="detached"),
            task("detach again", WORKSPACE, name="data", state="detached"),
            task("attach to the second now", WORKSPACE, name="data", state="attached", sandbox="s2"),
            task("destroy the second", SANDBOX, name="s2", state="absent", force=True),
            task("absent without force", WORKSPACE, name="data", state="absent", fails=True),
            task("would delete", WORKSPACE, name="data", state="absent", force=True, check=True),
            task("delete", WORKSPACE, name="data", state="absent", force=True, diff=True),
            task("delete again", WORKSPACE, name="data", state="absent", force=True),
            task("attach nothing", WORKSPACE, name="data", state="attached", sandbox="s1", fails=True),
            task("no sandbox given", WORKSPACE, name="data", state="attached", fails=True),
            task("options of another state", WORKSPACE, name="data", state="detached", size="8G", fails=True),
        ]
    )
    assert seen["start"] == seen["checked"] == ("missing",) and seen["before attach"] == seen["after would attach"]
    for name in ("would create", "would attach", "would grow", "would detach", "would delete"):
        assert writes(run.requests[name]) == [] and run.status(name) == "changed", name
    for name in ("create again", "attach again", "detach again", "delete again"):
        assert run.status(name) == "ok" and writes(run.requests[name]) == [], name
    made = run["create"]["workspace"]
    assert (made["state"], made["size"], made["node"], made["vmid"]) == ("DETACHED", 8 * 1024**3, "pve1", None)
    assert run["create"]["diff"]["before"]["state"] is None and run["create"]["diff"]["after"]["state"] == "DETACHED"
    there = run["attach"]["workspace"]
    assert (there["state"], there["vmid"], there["sandbox"]) == ("ATTACHED", 1000, "s1") and there["device"].endswith(
        f"agentlab-{made['id'][:8]}"
    )
    assert run["grow"]["workspace"]["size"] == 10 * 1024**3
    assert run["smaller"]["msg"] == "size: workspace 'data' has 8G, and workspaces only grow; give that size or more"
    assert run["attach to the second"]["msg"].startswith(
        "workspace 'data' is ATTACHED to sandbox 1000 (s1), whose lease on it lasts until"
    )
    assert run["absent while attached"]["msg"].startswith("workspace 'data' is ATTACHED to sandbox 1000")
    assert "would be lost. Use force=true to delete it" in run["absent without force"]["msg"]
    assert run["destroy the second"]["results"][0]["outcome"] == "destroyed"
    assert run["delete"]["outcome"] == "deleted" and run["delete again"]["outcome"] == "not_found"
    assert run["attach nothing"]["msg"] == "workspace not found ('data'). Workspaces: none"
    assert run["no sandbox given"]["msg"] == "vmid: state=attached needs vmid or sandbox"
    assert run["options of another state"]["msg"] == "size: only with state=present, not with state=detached"
    assert server.pve.volumes_of(made["owner_vmid"]) == []


def test_a_workspace_on_shared_storage_serves_sandboxes_on_two_nodes(
    story: Any, env: Any, server: Any, tmp_path: Any
) -> None:
    server.pve.add_node("pve2")
    server.pve.add_template(9001, "debian-pve2", node="pve2")
    server.pve.storages["nfs"] = {
        "type": "nfs",
        "active": 1,
        "content": "images",
        "shared": 1,
        "files": set(),
        "volumes": {},
    }
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "needs.yaml").write_text("workspace: required\n", encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {tmp_path}/profiles\n")
    run = story(
        [
            task("local", WORKSPACE, name="local", size="8G", storage="local-lvm", node="pve2"),
            task("shared", WORKSPACE, name="shared", size="8G", storage="nfs"),
            task("required", SANDBOX, name="s0", profile="needs", fails=True),
            task("unknown", SANDBOX, name="s0", profile="needs", workspace="nobody", fails=True),
            task("wrong node", SANDBOX, name="s0", workspace="local", node="pve1", fails=True),
            task("its node", SANDBOX, name="s1", workspace="local", template="debian-pve2"),
            task("its node again", SANDBOX, name="s1", workspace="local", template="debian-pve2"),
            task(
                "shared here",
                SANDBOX,
                name="s2",
                workspace="shared",
                profile="needs",
                template="debian-pve2",
                node="pve2",
            ),
            task("taken", SANDBOX, name="s3", workspace="shared", fails=True),
            task("destroy", SANDBOX, name="s2", state="absent", force=True),
            task("shared there", SANDBOX, name="s4", workspace="shared"),
            task("look", "agentlab_workspace_info", verify=True, events=3),
            task("all gone", SANDBOX, vmids=[1000, 1001, 1002], state="absent", force=True),
            task("look again", "agentlab_workspace_info", verify=True),
        ]
    )
    assert run["required"]["msg"] == "workspace: missing; profile 'needs' requires one"
    assert run["unknown"]["msg"] == "workspace not found ('nobody'). Workspaces: local, shared"
    assert "is on node pve2 (storage 'local-lvm' is local)" in run["wrong node"]["msg"]
    assert (
        run["its node"]["sandbox"]["node"] == "pve2"
        and run["its node"]["sandbox"]["workspace_id"] == run["local"]["workspace"]["id"]
    )
    assert run.status("its node again") == "ok"
    assert (run["shared here"]["sandbox"]["node"], run["shared there"]["sandbox"]["node"]) == ("pve2", "pve1")
    assert run["taken"]["msg"].startswith("workspace 'shared' is ATTACHED to sandbox 1001 (s2)")
    local, shared = run["look"]["workspaces"]
    assert (
        (local["attached_to"], shared["attached_to"]) == ([1000], [1002])
        and local["volume_present"]
        and len(shared["events"]) == 3
    )
    assert [(one["state"], one["attached_to"], one["volume_present"]) for one in run["look again"]["workspaces"]] == [
        ("DETACHED", [], True)
    ] * 2
