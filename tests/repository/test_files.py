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


def test_no_file_that_a_run_left_behind_is_in_the_repository() -> None:
    """A database with the name of a wrong address would go into the collection."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name]
    assert len(names) > 300 and [name for name in names if not re.fullmatch(r"[A-Za-z0-9._/-]+", name)] == []
    files = [ROOT / name for name in names]
    assert [file for file in files if file.is_file() and file.read_bytes()[:15] == b"SQLite format 3"] == []


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


def run_ci(folder: Path, day: int) -> set[str]:
    """Run the folder's `.ci/run` as on that day (since 1970); return what it called: its programs only say that."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "DAY": str(day)}
    # What this run itself was given must not choose for the other.
    for name in ("SHARD", "IN_PLACE", "SHIPPED", "AGENTLAB_CI_LIMITED", "AGENTLAB_CORES_DAY", "AGENTLAB_BARE_DAY"):
        environment.pop(name, None)
    subprocess.run([str(folder / ".ci/run")], env=environment, capture_output=True, text=True, check=True, timeout=60)
    return set(calls.read_text().splitlines())


def test_ci_takes_each_suite_within_six_days_and_each_part_within_thirty(tmp_path: Path) -> None:
    settings = "".join(f"${{{name}:+{name}=${name} }}" for name in ("SHARD", "IN_PLACE", "SHIPPED"))
    say = f'#!/usr/bin/env bash\necho "{settings}${{0##*/}} $*" >>"$CALLS"\n'
    programs = dict.fromkeys(("git", "systemd-nspawn", "mmdebstrap", "ssh-keygen", "promtool"), "#!/bin/sh\n")
    programs |= {"busybox": "#!/bin/sh\n", "apt-get": "#!/bin/sh\n", "id": "#!/bin/sh\necho 0\n", "make": say}
    programs["date"] = "#!/bin/sh\ncase $2 in +%s) echo $((DAY * 86400 + 60));; *) echo 12:00:00Z;; esac\n"
    scripts = {"find-python.sh": "#!/bin/sh\n", "test-bare.sh": say}
    files = {f"bin/{name}": text for name, text in programs.items()}
    files |= {f"scripts/{name}": text for name, text in scripts.items()}
    files |= {name: (ROOT / name).read_text() for name in (".ci/run", "scripts/core-env.sh")}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    days = [run_ci(tmp_path, day) for day in range(20000, 20030)]
    daily = {"make test", "make test-daemon", "make test-cli-oldest", "make test-monitoring"}
    assert all(daily <= calls for calls in days)
    for first in range(25):
        six = set().union(*days[first : first + 6])
        gates = zip(("IN_PLACE=2/2 SHIPPED=1/2", "IN_PLACE=1/2 SHIPPED=2/2") * 3, CORES, strict=True)
        assert {f"{halves} make gates-daily CORES={core}" for halves, core in gates} <= six
        assert {"make test-molecule", "make test-awx", "make test-chaos MINUTES=5"} <= six
        assert "make test-chaos CONTROLLERS=3 MINUTES=2" in six
        assert {f"SHARD={part}/5 make test-faults" for part in range(1, 6)} <= six
    # Which Debian it is, the script itself says.
    bare = [day for day, calls in enumerate(days) if "test-bare.sh --today" in calls]
    assert {day % 2 for day in bare[:4]} == {0, 1}
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^gates: gates-daily test-awx ", makefile, re.M)


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


def test_a_test_file_has_at_most_600_lines() -> None:
    """A test file that grows over 600 lines is divided by subject. No file is excused."""
    folder = ROOT / "tests"
    lengths = {
        str(path.relative_to(folder)): len(path.read_text(encoding="utf-8").splitlines())
        for path in folder.rglob("*.py")
        if "output" not in path.parts
    }
    assert len(lengths) > 200 and {name: length for name, length in lengths.items() if length > 600} == {}


def test_the_page_on_tests_names_every_part_of_the_double() -> None:
    parts = {path.name for path in (ROOT / "tests/support").glob("proxmox_*.py")} - {"proxmox_double.py"}
    table = (ROOT / "tests/README.md").read_text(encoding="utf-8").split("## The parts of the double")[1]
    assert set(re.findall(r"^\| `(proxmox_\w+\.py)` \| .+ \|$", table.split("\n## ")[0], re.M)) == parts
