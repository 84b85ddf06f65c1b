# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor on what makes every creation fail: templates, nodes, pools, snippets, storages, tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.double import TOKEN_ID
from support.examine import examine, list_bad_findings
from support.lab import Lab


@pytest.mark.parametrize(
    ("setting", "status", "words"),
    [
        ({"agent": "0"}, "warning", "guest agent switched off"),
        ({"ide2": "none,media=cdrom"}, "warning", "no cloud-init drive"),
        ({"onboot": 1}, "warning", "start with the node"),
        ({"scsi0": "local:9000/base-9000-disk-0.raw,size=3G"}, "warning", "no linked clones"),
        ({"scsi0": "elsewhere:base-9000-disk-0,size=3G"}, "unknown", "cannot be seen"),
    ],
)
def test_a_template_that_does_not_fit_is_told_with_its_reason(
    lab: Lab, setting: dict[str, Any], status: str, words: str
) -> None:
    assert examine(lab)["template"].status == "ok"
    lab.pve.vm(9000).config.update(setting)
    found = examine(lab)["template"]
    assert found.status == status and words in found.meaning, found


def test_a_vm_that_is_no_template_is_a_problem(lab: Lab) -> None:
    assert examine(lab, template="nowhere")["template"].status == "problem"
    assert "is not a template" in examine(lab, template="500")["template"].meaning
    lab.options.pop("template")
    assert examine(lab)["template"].status == "unknown"


def test_a_template_with_protection_is_no_finding(lab: Lab) -> None:
    """The creation takes the copied protection off, and such a sandbox is destroyed."""
    lab.pve.vm(9000).config["protection"] = 1
    assert examine(lab)["template"].status == "ok"
    made = lab.create()
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


def test_a_node_that_cannot_be_used_is_a_problem(lab: Lab) -> None:
    lab.pve.add_node("pve2", online=False)
    ((status, meaning),) = list_bad_findings(lab, "creation", node="PVE1")
    assert status == "problem" and "'PVE1' is not a node of this cluster" in meaning and "pve1, pve2" in meaning
    ((status, meaning),) = list_bad_findings(lab, "creation", node="pve2")
    assert status == "problem" and "offline" in meaning
    assert list_bad_findings(lab, "creation", node="pve1") == []


def test_a_pool_that_does_not_exist_is_a_problem(lab: Lab) -> None:
    ((status, meaning),) = list_bad_findings(lab, "creation", pool="nowhere")
    assert status == "problem" and "'nowhere' does not exist" in meaning
    assert "pveum pool add nowhere" in examine(lab, pool="nowhere")["report"].pveum
    lab.pve.pools["nowhere"] = set()
    lab.pve.pool_info["nowhere"] = {"comment": None, "storage": set()}
    assert list_bad_findings(lab, "creation", pool="nowhere") == []


def test_a_template_whose_snippet_is_missing_is_a_problem(lab: Lab, tmp_path: Path) -> None:
    lab.pve.vm(9000).config["cicustom"] = "user=local:snippets/nope.yaml,network=local:snippets/there.yaml"
    assert [meaning for _status, meaning in list_bad_findings(lab, "template")] == [
        f"template 9000 (debian-13) names the snippet local:snippets/{name}.yaml (cicustom), but storage local holds no"
        " snippets: no sandbox starts"
        for name in ("nope", "there")
    ]
    (tmp_path / "there.yaml").write_text("#cloud-config")
    lab.pve.hold_snippets(str(tmp_path))
    ((status, meaning),) = list_bad_findings(lab, "template")
    assert status == "problem" and "local:snippets/nope.yaml" in meaning and "does not exist" in meaning
    (tmp_path / "nope.yaml").write_text("#cloud-config")
    assert list_bad_findings(lab, "template") == []


def test_a_snippet_that_these_credentials_cannot_see_is_not_called_missing(lab: Lab) -> None:
    lab.pve.vm(9000).config["cicustom"] = "user=local:snippets/nope.yaml"
    lab.pve.storages["local"]["content"] = "iso,vztmpl,backup,snippets"
    lab.pve.grant_least(TOKEN_ID)
    lab.pve.grant(TOKEN_ID, "/storage/local", "Datastore.Audit")
    ((status, meaning),) = list_bad_findings(lab, "template")
    assert status == "unknown" and "may not see" in meaning


@pytest.mark.parametrize("storage", ["elsewhere", "local-lvm"])
def test_a_storage_that_takes_no_snippets_is_a_problem(lab: Lab, storage: str) -> None:
    ((status, meaning),) = list_bad_findings(lab, "creation", snippets_storage=storage)
    assert status == "problem" and f"'{storage}'" in meaning and "cloud_init_user_data is refused" in meaning


def test_the_default_storage_without_snippets_is_a_problem_where_user_data_is_used(lab: Lab) -> None:
    assert examine(lab)["creation"].status == "ok" and "holds no snippets" in examine(lab)["creation"].meaning
    made = lab.create()
    lab.force_state(made.vmid, "RUNNING", snippet="/nonexistent/agentlab.yaml")
    ((status, meaning),) = list_bad_findings(lab, "creation")
    assert status == "problem" and "pvesm set local --content" in meaning


@pytest.mark.parametrize("line", ["node: PVE1", "pool: nowhere"])
def test_names_that_only_a_profile_gives_are_looked_at(lab: Lab, tmp_path: Path, line: str) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "agent.yaml").write_text(f"name: agent\n{line}\n")
    ((status, meaning),) = list_bad_findings(lab, "creation", profiles_dir=str(tmp_path / "profiles"))
    assert status == "problem" and f"{line.partition(':')[0]} of profile agent: " in meaning


def test_a_storage_that_holds_no_disk_images_is_a_problem(lab: Lab) -> None:
    ((status, meaning),) = list_bad_findings(lab, "storage", storage="local")
    assert status == "problem" and "holds no disk images" in meaning


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"allowed-tags": [], "user-tag-access": {"user-allow": "none"}}, ["agentlab", "web"]),
        ({"allowed-tags": ["agentlab"], "user-tag-access": {"user-allow": "list"}}, ["web"]),
        ({"allowed-tags": ["agentlab", "web"], "user-tag-access": "user-allow=list"}, []),
        ({"allowed-tags": [], "user-tag-access": {"user-allow": "existing"}}, ["agentlab", "web"]),
        ({"allowed-tags": [], "registered-tags": ["agentlab"]}, ["agentlab"]),
        ({"allowed-tags": ["other"], "registered-tags": "other;reserved"}, []),
        ({"allowed-tags": []}, []),
    ],
)
def test_tags_that_the_cluster_refuses_are_named(
    lab: Lab, tmp_path: Path, options: dict[str, Any], refused: list[str]
) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "p.yaml").write_text("name: p\ntags: [web]\n")
    access = lab.pve.use_access()
    access.roles["All"] = {*access.roles["Administrator"]} - {"Sys.Modify", "Permissions.Modify"}
    access.pveum(lab.pve, "pveum acl modify / --users agentlab@pve --tokens agentlab@pve!tests --roles All")
    lab.pve.fault("GET", "/cluster/options", "answer", status=200, body=json.dumps({"data": options}), times=9)
    findings = list_bad_findings(lab, "creation", profiles_dir=str(tmp_path / "profiles"))
    assert [status for status, _meaning in findings] == (["warning"] if refused else [])
    assert not refused or f"refuses the tags {', '.join(refused)} to a login" in findings[0][1]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        # Proxmox VE takes no empty list of registered tags.
        ({"allowed-tags": [], "registered-tags": ["agentlab"]}, "--delete registered-tags"),
        ({"allowed-tags": ["other"], "registered-tags": "agentlab;other"}, "--registered-tags 'other'"),
        (
            {"allowed-tags": [], "registered-tags": ["agentlab"], "user-tag-access": {"user-allow": "none"}},
            "--user-tag-access 'user-allow=list,user-allow-list=agentlab' --delete registered-tags",
        ),
    ],
)
def test_refused_tags_are_told_with_the_command_that_allows_them(
    lab: Lab, options: dict[str, Any], command: str
) -> None:
    lab.pve.fault("GET", "/cluster/options", "answer", status=200, body=json.dumps({"data": options}), times=9)
    assert examine(lab)["creation"].advice == f"pvesh set /cluster/options {command}, as root on a node"


def test_a_storage_with_several_faults_is_told_all_of_them(lab: Lab) -> None:
    row = {"storage": "local-lvm", "active": 0, "enabled": 1, "content": "iso", "total": 100, "used": 95}
    lab.pve.fault("GET", "/nodes/pve1/storage", "answer", status=200, body=json.dumps({"data": [row]}), times=9)
    found = list_bad_findings(lab, "storage")
    assert [status for status, _meaning in found] == ["problem", "problem", "warning"]
    assert "not active" in found[0][1] and "no disk images" in found[1][1] and "95 % full" in found[2][1]
