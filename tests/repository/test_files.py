# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What has to fit together in the repository itself."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins/module_utils/_core"


def test_one_link_lets_a_checkout_run_the_daemon_on_the_core() -> None:
    assert (ROOT / ".collections/agentlab_core").resolve() == CORE


def test_no_gate_is_switched_off() -> None:
    assert not list((ROOT / "tests").glob("sanity/ignore*")) and not (ROOT / ".ansible-lint-ignore").exists()
    lint = yaml.safe_load((ROOT / ".ansible-lint").read_text())
    assert lint["profile"] == "production" and not {"skip_list", "warn_list", "mock_modules", "mock_roles"} & set(lint)


def test_the_awx_project_runs_every_playbook_of_the_collection() -> None:
    ours = {path.stem for path in (ROOT / "playbooks").glob("*.yml")} - {"demo", "awx_setup", "install", "check_hosts"}
    shims = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "awx").glob("*.yml")}
    assert set(shims) == ours
    assert {name: plays[0]["ansible.builtin.import_playbook"] for name, plays in shims.items()} == {name: f"agentlab.proxmox.{name}" for name in ours}
    wanted = yaml.safe_load((ROOT / "awx/collections/requirements.yml").read_text())["collections"][0]
    assert wanted["name"] == "agentlab.proxmox" and wanted["version"].startswith(f">={yaml.safe_load((ROOT / 'galaxy.yml').read_text())['version']}")


def test_the_issue_forms_are_forms() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "feature", "documentation", "config"}
    assert forms.pop("config")["blank_issues_enabled"] is False
    for form in forms.values():
        assert {"name", "description", "labels", "body"} == set(form)
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        for part in form["body"]:
            assert part["type"] in ("markdown", "dropdown", "textarea", "input") and part["attributes"].get("value" if part["type"] == "markdown" else "label")


def test_what_the_commit_hooks_run_is_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        if hook["language"] == "system":
            program, *words = hook["entry"].replace("bash -c '", "").split()
            assert (ROOT / program).exists(), program
            assert all((ROOT / word).exists() for word in words if word.startswith("scripts/")), hook["entry"]
