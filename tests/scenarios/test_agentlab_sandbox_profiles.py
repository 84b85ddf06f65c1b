# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_sandbox in real playbooks: profiles and user data."""

from __future__ import annotations

import json
from typing import Any

from support.story import task, writes

SANDBOX = "agentlab_sandbox"


def test_profiles_fill_in_what_is_not_given(story: Any, env: Any, server: Any, tmp_path: Any) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "agents.yaml").write_text(
        "name: agents\nresources: {cores: 4, memory: 3072}\nnetwork: {bridge: vmbr7, model: e1000, firewall_group: "
        "agents}\ncloud_init: {user: agent, ip_config: ip=dhcp, searchdomain: example.org}\nlease: {default: 2h, "
        "maximum: 3h}\nkeepalive: true\ntags: [yolo]\n",
        encoding="utf-8",
    )
    (folder / "wrong.yaml").write_text("resources: {corse: 4}\n", encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {folder}\n")
    server.pve.firewall_config("cluster").setdefault("groups", {}).setdefault("agents", {"comment": "", "rules": []})
    run = story(
        [
            task("would create", SANDBOX, name="p1", profile="agents", check=True),
            task("create", SANDBOX, name="p1", profile="agents"),
            task("create again", SANDBOX, name="p1", profile="agents"),
            task(
                "options win",
                SANDBOX,
                name="p2",
                profile="agents",
                cores=1,
                tags=["mine"],
                keepalive=False,
                ttl="30m",
                firewall=False,
            ),
            task("too long", SANDBOX, name="p3", profile="agents", ttl="4h", fails=True),
            task("unknown", SANDBOX, name="p3", profile="nobody", fails=True),
            task("wrong", SANDBOX, name="p3", profile="wrong", fails=True),
            task("renew", "agentlab_lease", name="p1", ttl="3h"),
            task("renew too long", "agentlab_lease", name="p1", ttl="181", fails=True),
            task("not with other states", SANDBOX, name="p1", profile="agents", state="stopped", fails=True),
        ]
    )
    assert writes(run.requests["would create"]) == [] and run.status("create again") == "ok"
    made, other = run["create"]["sandbox"], run["options win"]["sandbox"]
    assert (made["profile"], made["tags"], made["keepalive"]) == ("agents", ["yolo"], True)
    assert (other["profile"], other["tags"], other["keepalive"]) == ("agents", ["mine"], False)
    first, second = server.pve.vm(made["vmid"]).config, server.pve.vm(other["vmid"]).config
    assert {name: str(first[name]) for name in ("cores", "memory", "ciuser", "ipconfig0", "searchdomain")} == {
        "cores": "4",
        "memory": "3072",
        "ciuser": "agent",
        "ipconfig0": "ip=dhcp",
        "searchdomain": "example.org",
    }
    assert first["net0"].startswith("e1000=") and "bridge=vmbr7" in first["net0"] and "firewall=1" in first["net0"]
    assert str(second["cores"]) == "1" and "firewall=0" in second["net0"]
    rules = server.pve.firewall_config("vm", "pve1", made["vmid"])
    assert [(rule["type"], rule["action"]) for rule in rules["rules"]] == [("group", "agents")] and rules["options"][
        "enable"
    ] == 1
    assert server.pve.firewall_config("vm", "pve1", other["vmid"])["rules"] == []
    assert run["too long"]["msg"] == "ttl: 4h is longer than the maximum of 3h that profile 'agents' grants"
    assert run["unknown"]["msg"].startswith(
        f"profile: 'nobody' does not exist in {folder}. Profiles: agents; not usable: {folder}/wrong.yaml"
    )
    assert run["wrong"]["msg"].startswith(f"{folder}/wrong.yaml: resources.corse: no such key. Valid: resources.cores")
    assert run["renew too long"]["msg"].startswith(
        "ttl: 3h1m is longer than the maximum of 3h that profile 'agents' grants sandbox"
    )
    assert run["not with other states"]["msg"] == "profile: only with state=present, not with state=stopped"


def test_user_data_is_used_and_shown_nowhere(story: Any, env: Any, server: Any, tmp_path: Any) -> None:
    folder = tmp_path / "snippets"
    folder.mkdir(mode=0o755)
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"snippets_dir: {folder}\n")
    secret = "correct-horse-made-up-for-tests-42"
    data = f"#cloud-config\nchpasswd: {{list: 'root:{secret}'}}\n"
    # In a file, as a user would keep them: Ansible quotes the playbook itself when a task fails.
    (tmp_path / "vars.json").write_text(json.dumps({"data": data, "other": f"password: {secret}"}), encoding="utf-8")
    server.pve.hold_snippets(str(folder))
    refused = {"before": lambda: server.pve.storages["local"].update(content="iso"), "fails": True}

    def mend() -> None:
        server.pve.storages["local"]["content"] = "iso,snippets"

    def broken() -> None:
        server.pve.cloud_init_errors = [f"('cc_runcmd', RuntimeError('{secret}'))"]

    run = story(
        [
            task("would create", SANDBOX, name="u1", cloud_init_user_data="{{ data }}", check=True, diff=True),
            task("create", SANDBOX, name="u1", cloud_init_user_data="{{ data }}", wait_for_cloud_init=True, diff=True),
            task(
                "create again",
                SANDBOX,
                name="u1",
                cloud_init_user_data="{{ data }}",
                wait_for_cloud_init=True,
                diff=True,
            ),
            task(
                "keys as well",
                SANDBOX,
                name="u2",
                cloud_init_user_data="{{ data }}",
                ssh_public_keys=["ssh-ed25519 AAAA me"],
                fails=True,
            ),
            task("no data", SANDBOX, name="u2", cloud_init_user_data="{{ other }}", fails=True),
            task("no snippets there", SANDBOX, name="u2", cloud_init_user_data="{{ data }}", **refused),
            task(
                "fails inside",
                SANDBOX,
                name="u3",
                cloud_init_user_data="{{ data }}",
                wait_for_cloud_init=True,
                fails=True,
                before=lambda: (mend(), broken()),
            ),
            task("look", "agentlab_sandbox_info", name="u3", events=50),
            task("destroy", SANDBOX, vmids=[1000, 1001], state="absent", force=True, diff=True),
        ],
        args=["-vvv", "-e", f"@{tmp_path}/vars.json"],
    )
    assert writes(run.requests["would create"]) == [] and run.status("create again") == "ok"
    assert secret not in run.output and not any(secret in str(entry) for entry in run.results)
    assert run["keys as well"]["msg"].startswith("ssh_public_keys: has no effect with cloud_init_user_data")
    assert "storage 'local' holds no snippets" in run["no snippets there"]["msg"]
    assert run["fails inside"]["msg"].startswith(
        "cloud-init ended with errors in sandbox 1001: cc_runcmd: RuntimeError"
    )
    assert (
        run["look"]["sandboxes"][0]["state"] == "FAILED"
        and run["look"]["sandboxes"][0]["events"][-1]["reason"] == "cloud_init_failed"
    )
    assert [one["state"] for one in run["destroy"]["results"]] == ["DESTROYED", "DESTROYED"]
    assert list(folder.iterdir()) == []
