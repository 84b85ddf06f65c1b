# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What has to fit together in the repository itself."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
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
    assert {name: plays[0]["ansible.builtin.import_playbook"] for name, plays in shims.items()} == {
        name: f"agentlab.proxmox.{name}" for name in ours
    }
    wanted = yaml.safe_load((ROOT / "awx/collections/requirements.yml").read_text())["collections"][0]
    assert wanted["name"] == "agentlab.proxmox" and wanted["version"].startswith(
        f">={yaml.safe_load((ROOT / 'galaxy.yml').read_text())['version']}"
    )


def test_the_issue_forms_are_forms() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "feature", "documentation", "config"}
    assert forms.pop("config")["blank_issues_enabled"] is False
    for form in forms.values():
        assert {"name", "description", "labels", "body"} == set(form)
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        for part in form["body"]:
            assert part["type"] in ("markdown", "dropdown", "textarea", "input") and part["attributes"].get(
                "value" if part["type"] == "markdown" else "label"
            )


def test_what_the_commit_hooks_run_is_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        if hook["language"] == "system":
            program, *words = hook["entry"].replace("bash -c '", "").split()
            assert (ROOT / program).exists(), program
            assert all((ROOT / word).exists() for word in words if word.startswith("scripts/")), hook["entry"]


CORES = ["2.16", "2.17", "2.18", "2.19", "2.20", "2.21"]


def test_every_supported_ansible_core_is_tested_and_the_pages_say_the_same() -> None:
    oldest = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["requires_ansible"]
    assert oldest == f">={CORES[0]}.0"
    assert re.search(r"^CORES \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split() == CORES
    table = (
        (ROOT / "docs/compatibility.md").read_text().split("| ansible-core on the controller |")[1].partition("|")[0]
    )
    assert table.strip().split(", ") == CORES
    assert f"Supported: ansible-core {CORES[0]} to {CORES[-1]}," in (ROOT / "README.md").read_text()


def test_ci_takes_every_release_at_least_every_second_day() -> None:
    def today(script: str, variable: str, day: int) -> set[str]:
        env = {**os.environ, variable: str(day)}
        command = [str(ROOT / "scripts" / script), "--today"]
        return set(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split())

    assert today("core-env.sh", "AGENTLAB_CORES_DAY", 20000) | today("core-env.sh", "AGENTLAB_CORES_DAY", 20001) == set(
        CORES
    )
    ci = (ROOT / ".ci/run").read_text()
    assert "scripts/test-bare.sh --today" in ci and "scripts/core-env.sh --today" in ci
    # Five days in a row take all parts of the faults, two days all scenarios with shipped modules.
    assert "day=$(($(date -u +%s) / 86400))\n" in ci
    assert "part=$((day % 5 + 1))/5" in ci and "SHARD=$part make test-faults" in ci
    assert "SHIPPED=$((day % 2 + 1))/2 make gates" in ci
    assert re.search(r"if \[ \$\(\(day % 3\)\) -eq 0 \]; then\n.*\n    make test-chaos MINUTES=5\nfi\n", ci)


@pytest.mark.parametrize("core", [CORES[0], CORES[-1]])
def test_the_execution_environments_have_a_supported_ansible_core(core: str) -> None:
    built = yaml.safe_load((ROOT / f"meta/ee-core-{core}.yml").read_text())
    found = re.fullmatch(r"ansible-core>=(\d\.\d+),<2\.(\d+)", built["dependencies"]["ansible_core"]["package_pip"])
    assert found and found[1] == core and int(found[2]) == int(core.partition(".")[2]) + 1
    python = built["dependencies"]["python_interpreter"]["package_system"].removeprefix("python")
    assert tuple(map(int, python.split("."))) >= (3, 11)
    own = yaml.safe_load((ROOT / "meta/execution-environment.yml").read_text())["dependencies"]
    assert all((ROOT / path).is_file() for path in own.values())


def test_no_file_is_excused_from_120_columns_without_need() -> None:
    """The list in pyproject.toml only shrinks: whoever shortens a file's last long line takes the file off it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    excused = [name for name, codes in settings["per-file-ignores"].items() if "E501" in codes]
    lines = {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in excused}
    assert [name for name in excused if all(len(line) <= 120 for line in lines[name])] == []


def long_files() -> dict[str, str]:
    """Return the files that docs/architecture.md names as long, each with its one subject."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.split("<!-- long files -->")[1].split("<!-- /long files -->")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.M))


def test_a_file_over_500_lines_has_one_subject() -> None:
    """A file that grows over 500 lines is divided by subject, or docs/architecture.md says its one subject."""
    paths = [path for folder in ("plugins", "roles") for path in (ROOT / folder).rglob("*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
        if path.suffix in (".py", ".yml", ".j2")
    }
    named = long_files()
    assert len(named) > 5 and sorted({name for name, length in lengths.items() if length > 500} - set(named)) == []
    # A file that was divided leaves the list.
    assert [name for name in named if lengths[name] < 450] == []
