# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options of a creation in real playbooks: the examples of the module, what people paste, warnings, and updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.modules import agentlab_sandbox

from support.play import play, run_play
from support.story import task, writes

PLAYBOOKS = Path(__file__).resolve().parents[2] / "playbooks"
SANDBOX = "agentlab_sandbox"
K = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMadeUp me@example.org"
L = 'from="10.0.0.0/8,192.0.2.0/24" ssh-rsa AAAAB3NzaC1yc2E you'
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
SHIPPED = {"vars": {"agentlab_in_place": False}}


def test_the_examples_of_the_module_run(env: Any, tmp_path: Path, server: Any) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "yolo-ephemeral.yaml").write_text("lease: {default: 2h}\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"template: debian-13\nprofiles_dir: {folder}\n")
    tasks = yaml.safe_load(agentlab_sandbox.EXAMPLES)
    run = play(tasks, {**env, "AGENTLAB_CONFIG": str(config)}, tmp_path, pve=server.pve)
    assert run.rc == 0 and not run.warnings, run.output
    config_of = next(vm for vm in server.pve.vms if vm.name == "agent-3").config
    assert (
        "tag=42" in config_of["net0"]
        and config_of["memory"] in (4096, "4096")
        and "Nightly build" in config_of["description"]
    )


@pytest.mark.parametrize("keywords", [{}, SHIPPED], ids=["in place", "shipped"])
def test_what_people_paste_becomes_lists(story: Any, server: Any, keywords: dict[str, Any]) -> None:
    run = story(
        [
            task(
                "textarea",
                SANDBOX,
                name=" a1 ",
                template="debian-13\n",
                ttl=" 4 h ",
                ssh_public_keys=f"{K}\r\n\r\n# mine\r\n{L}\r\n",
                tags="CI, nightly",
                keywords=keywords,
            ),
            task("list", SANDBOX, name="a2", ssh_public_keys=[K, "", L], tags=["ci\nnight", ""], keywords=keywords),
            task("private", SANDBOX, name="a3", ssh_public_keys=PRIVATE, fails=True, keywords=keywords),
            task("a number", SANDBOX, name="a3", cloud_init_password=5349, fails=True, keywords=keywords),
            task("stop", SANDBOX, vmids="1000\n1001, 1000", state="stopped", keywords=keywords),
            task("info", "agentlab_sandbox_info", tags="NIGHTLY", keywords=keywords),
            task("states", "agentlab_sandbox_info", states="running\r\nSTOPPED\r\n", keywords=keywords),
            task("wrong state", "agentlab_sandbox_info", states="STOPPED\nGONE", fails=True, keywords=keywords),
            task("prune states", "agentlab_prune", states=["FAILED\nCOMPLETED\n", ""], keywords=keywords),
            task("wrong prune", "agentlab_prune", states="TIMEOUT\nRUNNING", fails=True, keywords=keywords),
            task("disks", "agentlab_workspace_info", states="ATTACHED\ndetached", keywords=keywords),
            task("wrong vmids", SANDBOX, vmids="1000,abc", state="absent", fails=True, keywords=keywords),
            task("absent", SANDBOX, vmids=["1000", "1001 ", ""], state="absent", keywords=keywords),
        ]
    )
    assert run["textarea"]["sandbox"]["name"] == "a1" and run["textarea"]["sandbox"]["tags"] == ["ci", "nightly"]
    assert run["list"]["sandbox"]["tags"] == ["ci", "night"]
    keys = [
        unquote(one["params"]["sshkeys"])
        for one in server.pve.history
        if one["method"] == "PUT" and "sshkeys" in one["params"]
    ]
    assert keys == [f"{K}\n{L}", f"{K}\n{L}"]
    assert "holds a private key" in run["private"]["msg"] and "b3BlbnNzaC1" not in str(run["private"]["msg"])
    assert "put it in quotes" in run["a number"]["msg"]
    assert [one["vmid"] for one in run["stop"]["results"]] == [1000, 1001] and run["info"]["count"] == 1
    assert run["states"]["count"] == 2 and run["prune states"]["count"] == 0 and run["disks"]["count"] == 0
    assert run["wrong state"]["msg"].startswith("states: 'GONE' is not valid. Valid: REQUESTED, PROVISIONING, ")
    assert run["wrong prune"]["msg"] == "states: 'RUNNING' is not valid. Valid: TIMEOUT, COMPLETED, FAILED, STOPPED"
    assert run["wrong vmids"]["msg"] == "vmids: 'abc' is not a VMID. Valid: 100 to 999999999"
    assert [one["outcome"] for one in run["absent"]["results"]] == ["destroyed", "destroyed"]


def test_another_option_is_a_warning_and_update_applies_it(env: Any, tmp_path: Path, server: Any) -> None:
    tasks = [
        task("create", SANDBOX, name="a1", cores=2, tags=["ci"]),
        task("again", SANDBOX, name="a1", cores=2, tags=["ci"]),
        task("other", SANDBOX, name="a1", cores=3, memory=4096, ttl="9h"),
        task("refused", SANDBOX, name="a1", cores=3, update=True, fails=True),
        task(
            "would",
            SANDBOX,
            name="a1",
            cores=3,
            tags=["x"],
            protected=True,
            update=True,
            allow_restart=True,
            check=True,
            diff=True,
        ),
        task(
            "update",
            SANDBOX,
            name="a1",
            cores=3,
            tags=["x"],
            protected=True,
            update=True,
            allow_restart=True,
            diff=True,
        ),
        task(
            "update again",
            SANDBOX,
            name="a1",
            cores=3,
            tags=["x"],
            protected=True,
            update=True,
            allow_restart=True,
            diff=True,
        ),
        task("elsewhere", SANDBOX, name="a1", state="stopped", update=True, fails=True),
    ]
    run = play(tasks, env, tmp_path, pve=server.pve)
    assert run.rc == 0, run.output
    assert (
        "warnings" not in run["again"]
        and run.status("again") == run.status("other") == run.status("update again") == "ok"
    )
    told = run["other"]["warnings"]
    assert [one.partition(":")[0] for one in told] == [
        "cores",
        "memory",
        "ttl",
    ] and "Set update=true to apply it" in told[0]
    assert "Renew its lease with agentlab_lease" in told[2] and sum(run.requests["other"].values()) == 0
    assert (
        "Set allow_restart=true" in run["refused"]["msg"]
        and writes(run.requests["refused"]) == writes(run.requests["would"]) == []
    )
    before = {"sandbox 1000": {"state": "RUNNING", "cores": 2, "tags": ["ci"], "protected": False}}
    after = {"sandbox 1000": {"state": "RUNNING", "cores": 3, "tags": ["x"], "protected": True}}
    assert run["would"]["diff"] == run["update"]["diff"] == {"before": before, "after": after}
    assert (
        run["would"]["results"][0]["outcome"] == "would_update" and run["update"]["results"][0]["outcome"] == "updated"
    )
    assert run["update"]["sandbox"]["tags"] == ["x"] and "cores" not in run["update"]["sandbox"]
    assert run["elsewhere"]["msg"] == "update: only with state=present, not with state=stopped"


def test_a_cluster_that_forbids_tags_gives_a_warning(env: Any, tmp_path: Path, server: Any) -> None:
    server.pve.tag_access = "none"
    run = play([task("create", SANDBOX, name="a1", tags=["ci"])], env, tmp_path, pve=server.pve)
    assert run.rc == 0 and run["create"]["sandbox"]["state"] == "RUNNING"
    assert "does not allow the tag agentlab, ci" in run["create"]["warnings"][0]


def test_answers_of_a_survey_become_the_options_of_the_creation(env: Any, tmp_path: Path, server: Any) -> None:
    answers = {
        "agentlab_hosts": "localhost",
        "sandbox_name": " agent-1 ",
        "sandbox_ttl": "4 h",
        "sandbox_cores": "",
        "sandbox_vlan_tag": "42",
        "sandbox_ssh_public_keys": f"{K}\r\n# mine\r\n\r\n{L}\r\n",
        "sandbox_tags": "CI, nightly",
        "sandbox_description": "",
        "sandbox_update": "",
    }
    run = run_play(PLAYBOOKS / "sandbox_create.yml", env, tmp_path, extra_vars=answers)
    assert run.rc == 0, run.output
    config = server.pve.vm(1000).config
    assert (
        unquote(config["sshkeys"]) == f"{K}\n{L}"
        and config["tags"] == "agentlab;ci;nightly"
        and "tag=42" in config["net0"]
    )


def test_sizes_as_people_write_them(story: Any, server: Any) -> None:
    """F23: a unit in small letters, GB and GiB mean what Proxmox VE calls G."""
    sizes = {"20g": "20G", " 20 GB ": "20G", "21GiB": "21G", "+1gb": "4G", "22528m": "22G"}
    tasks = [task(f"size {number}", SANDBOX, name=f"a{number}", disk_size=size) for number, size in enumerate(sizes)]
    tasks += [
        task(f"wrong {size}", SANDBOX, name="x", disk_size=size, fails=True) for size in ("20", "20X", "G", "20GGB")
    ]
    tasks.append(task("workspace", "agentlab_workspace", name="w1", size="2 gb", storage="local-lvm"))
    run = story(tasks)
    for number, size in enumerate(sizes.values()):
        vm = server.pve.vm(run[f"size {number}"]["sandbox"]["vmid"])
        assert vm.config["scsi0"].endswith(f"size={size}"), size
    assert "disk_size: '20X' is not valid. Valid: a size such as 20G" in run["wrong 20X"]["msg"]
    assert run["workspace"]["workspace"]["size"] == 2 * 1024**3
