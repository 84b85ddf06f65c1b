# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The Ansible commands and plays of the pages: modules are run as they stand there, playbooks too, or their syntax
and variables are checked.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import pages
from support.play import Run, run_command, run_play

DOCS = pages.ROOT / "docs"
INVENTORY = """\
[pve]
pve1.example.net ansible_connection=local ansible_python_interpreter="{{ ansible_playbook_python }}"
"""


@pytest.fixture
def typed(env: dict[str, str], tmp_path: Path, server: Any) -> Any:
    """typed(command): run it as a page has it, with ``inventory.ini`` and the files beside it in the test's folder;
    there are the role's profiles.
    """
    server.pve.agent_default = True
    (tmp_path / "inventory.ini").write_text(INVENTORY, encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as file:
        file.write(f"profiles_dir: {pages.ROOT}/roles/agentlabd/files/profiles\nstorage: local-lvm\n")

    def run(command: str, *more: str) -> Run:
        words = [word.replace("$PWD", str(tmp_path)).replace("/root/", f"{tmp_path}/") for word in pages.words(command)]
        words = [str(tmp_path / word) if (tmp_path / word).is_file() else word for word in words]
        return run_command([*words, *more], env, tmp_path)

    return run


def ansible(page: Path, program: str) -> list[str]:
    return [
        command
        for command in pages.commands(page)
        if command.split()[0] == program and "localhost," not in command and "…" not in command
    ]


def known_variables(playbook: str) -> set[str]:
    """Those that a playbook of the collection looks at, and those of the role that it runs."""
    name = playbook.rsplit(".", 1)[1]
    text = (pages.ROOT / "playbooks" / f"{name}.yml").read_text(encoding="utf-8")
    # The answers that it takes, where it has a file for them.
    answers = pages.ROOT / "playbooks" / "vars" / f"{name}.yml"
    text += answers.read_text(encoding="utf-8") if answers.is_file() else ""
    if "agentlab.proxmox.agentlabd" in text:
        text += (pages.ROOT / "roles/agentlabd/meta/argument_specs.yml").read_text(encoding="utf-8")
    # A name that ends with "_" is the beginning of others, in a pattern.
    return set(re.findall(r"\b(?:sandbox|prune|lease|job|doctor|reconcile|awx|agentlabd?)_\w*[^\W_]\b", text))


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if ansible(page, "ansible-playbook")], ids=lambda page: page.stem
)
def test_playbooks_are_there_and_know_the_variables_they_are_given(page: Path, typed: Any, tmp_path: Path) -> None:
    for name in ("sandbox.yml", "job.yml"):
        (tmp_path / name).write_text("- hosts: pve\n  tasks: []\n", encoding="utf-8")
    for command in ansible(page, "ansible-playbook"):
        done = typed(command, "--syntax-check")
        assert done.rc == 0 and not done.warnings, (command, done.output)
        words = pages.words(command)
        given = {name for word in words for name in re.findall(r"^(\w+)=", word)} | {
            name for word in words if word.startswith("{") for name in yaml.safe_load(word)
        }
        for playbook in [word for word in words if word.startswith("agentlab.proxmox.")]:
            assert given <= known_variables(playbook), command


def test_the_readme_from_the_first_sandbox_to_the_prune(typed: Any, tmp_path: Path, server: Any) -> None:
    play = next(block for block in pages.blocks(pages.ROOT / "README.md", "yaml") if "# sandbox.yml" in block)
    (tmp_path / "sandbox.yml").write_text(play, encoding="utf-8")
    changed = {}
    for program in ("ansible-playbook", "ansible"):
        for command in ansible(pages.ROOT / "README.md", program):
            done = typed(command)
            assert done.rc == 0 and not done.warnings, (command, done.output)
            changed[command] = done.results
    # The play's own, and the one that the playbook creates under the same name: there already, so left as it is.
    assert [vm.name for vm in server.pve.vms if not vm.template] == ["agent-1"]
    assert len(changed) > 5


def test_creation_from_the_first_sandbox_to_the_workspace(typed: Any, server: Any, env: dict[str, str]) -> None:
    for command in ansible(DOCS / "creation.md", "ansible"):
        done = typed(command)
        assert done.rc == 0 and not done.warnings and done.results[-1]["status"] == "changed", (command, done.output)
    conn = sqlite3.connect(env["AGENTLAB_DATABASE"])
    assert conn.execute("SELECT name, state FROM sandboxes").fetchall() == [("first", "DESTROYED")]
    assert conn.execute("SELECT name, size FROM workspaces").fetchall() == [("project-x", 50 * 1024**3)]
    conn.close()
    assert [vm.vmid for vm in server.pve.vms if not vm.template] == []


def test_the_tasks_of_the_jobs_page_are_tasks(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "build.yml").write_text(pages.blocks(DOCS / "jobs.md", "yaml")[0], encoding="utf-8")
    tasks = [{"name": "Job", "ansible.builtin.import_tasks": f"{tmp_path}/build.yml"}]
    assert run_play(tasks, env, tmp_path, args=("--syntax-check",)).ok().rc == 0
    documented = {
        name
        for row in re.findall(r"^\| (`job_.+?) \|", (DOCS / "jobs.md").read_text(), re.M)
        for name in re.findall(r"job_\w+", row)
    }
    known = {name for name in known_variables("agentlab.proxmox.job") if name.startswith("job_")}
    files = [
        yaml.safe_load((pages.ROOT / "playbooks" / name).read_text()) for name in ("job.yml", "tasks/work_inside.yml")
    ]
    answers = set(yaml.safe_load((pages.ROOT / "playbooks/vars/job.yml").read_text()))
    asked_for = known - set_inside(files) - answers
    assert asked_for <= documented <= known, (asked_for - documented, documented - known)


def set_inside(part: Any) -> set[str]:
    """The variables that a playbook sets itself: by vars, set_fact, add_host, register or as the variable of a loop."""
    if isinstance(part, list):
        return set().union(*map(set_inside, part))
    if not isinstance(part, dict):
        return set()
    names = set().union(*map(set_inside, part.values()))
    for key in ("vars", "ansible.builtin.set_fact", "ansible.builtin.add_host"):
        names |= set(part.get(key) or {})
    return names | {part[key] for key in ("register", "loop_var", "index_var") if key in part}


def test_the_commands_of_troubleshooting_work_in_their_order(typed: Any, tmp_path: Path) -> None:
    for command in pages.commands(DOCS / "troubleshooting.md"):
        if command.startswith("ansible"):
            done = typed(command)
            assert done.rc == 0 and not done.warnings, (command, done.output)
    assert (tmp_path / "agentlab-bundle.json").stat().st_mode & 0o777 == 0o600


def test_the_backup_of_troubleshooting_is_a_backup(given: Any, env: dict[str, str], tmp_path: Path) -> None:
    given(2)
    for command in pages.commands(DOCS / "troubleshooting.md"):
        words = pages.words(command)
        if words[0] == "sqlite3":
            done = subprocess.run(
                [*words[:1], env["AGENTLAB_DATABASE"], words[2].replace("/root", str(tmp_path))],
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout in ("", "ok\n") and not done.stderr
    conn = sqlite3.connect(tmp_path / "agentlab-backup.db")
    assert conn.execute("SELECT count(*) FROM sandboxes").fetchone() == (2,)
    conn.close()
    assert os.path.getsize(tmp_path / "agentlab-backup.db") > 0


def test_the_play_of_the_inventory_page(given: Any, typed: Any, tmp_path: Path) -> None:
    given(2, tags=["ci"])
    given(1, "STOPPED")
    text = (
        (DOCS / "inventory.md").read_text(encoding="utf-8").split("<!-- records -->")[1].split("<!-- /records -->")[0]
    )
    (tmp_path / "hosts.yml").write_text(text.strip().removeprefix("```yaml\n").removesuffix("```"), encoding="utf-8")
    done = typed("ansible-playbook -i inventory.ini hosts.yml")
    assert done.rc == 0 and not done.warnings, done.output
    said = [entry["result"]["msg"] for entry in done.all("Say whose it is, and how long it lives")]
    assert len(said) == 2 and all(re.fullmatch(r"tester's, until \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one) for one in said)
