# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The commands of README, docs/creation.md and docs/daemon.md, typed into a shell as they stand, in a fresh clone.

A Proxmox double and a daemon stand behind them. What is not typed here is typed elsewhere, or stands in NOT_TYPED with
the reason; a new command that is in none of these lists fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import pages
from support.clone import Shell, make_clone
from support.daemon import Daemon
from support.lab import Lab

README, CREATION, DAEMON = pages.ROOT / "README.md", pages.ROOT / "docs/creation.md", pages.ROOT / "docs/daemon.md"
INSIDE = pages.ROOT / "docs/inside.md"
# First words of a command -> the file that types it.
ELSEWHERE = {
    "apt-get install git make python3-venv": "scripts/test-bare.sh",
    "git clone": "scripts/test-bare.sh",
    "make demo": "scripts/test-bare.sh",
    "make test": "scripts/test-bare.sh",
    "make build": "tests/repository/test_newcomer.py",
    "ansible-galaxy collection install --force": "tests/repository/test_newcomer.py",
    "pveum ": "tests/unit/test_privileges.py",
    "curl ": "tests/daemon/test_pages.py",
    "agentlab cleanup ": "tests/daemon/test_pages.py",
    # The quickstart, on real Debian hosts with systemd
    "apt-get update": "extensions/molecule/quickstart/converge.yml",
    "apt-get install --yes --no-install-recommends ansible-core": "extensions/molecule/quickstart/converge.yml",
    "ansible-galaxy collection install ./": "extensions/molecule/quickstart/converge.yml",
    "ansible-playbook --inventory localhost, --connection local": "extensions/molecule/quickstart/converge.yml",
    "agentlab status": "extensions/molecule/quickstart/converge.yml",
}
NOT_TYPED = {
    "wget ": "fetches an image of some hundred megabytes from Debian",
    "qm ": "a program of Proxmox VE, on a node",
    "pvesm ": "a program of Proxmox VE, on a node",
    "ansible-playbook … ": "the inventory is the reader's; extensions/molecule/default upgrades and rolls back",
    "ansible-playbook -i inventory.ini agentlab.proxmox.job ": "logs into the sandbox by SSH, and the double has no "
    "guest; tests/scenarios/test_job.py runs the playbook, tests/scenarios/test_pages.py checks this line",
}
TYPED = ("ansible ", "ansible-playbook ", "agentlab ")


def other_place(command: str) -> str | None:
    """Return where else the command is typed, or why it is not; None when it is typed here."""
    known = {**ELSEWHERE, **NOT_TYPED}
    return next((known[start] for start in known if command.startswith(start)), None)


def commands(page: Path, begin: str = "", end: str = "") -> list[str]:
    """Return the commands of a page that are typed here, from one heading to another."""
    text = page.read_text(encoding="utf-8")
    section = text[text.index(begin) : text.index(end) if end else len(text)]
    return [one for one in pages.commands(page) if other_place(one) is None and one.partition(" -")[0] in section]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, in which the collection was installed as README says."""
    folder = tmp_path_factory.mktemp("typed")
    made = make_clone(folder)
    section = README.read_text(encoding="utf-8").split("## With your own Proxmox VE")[1].split("Modules run on")[0]
    shell = Shell(folder / "home")
    for line in section.splitlines():
        if line.startswith("$ "):
            answer = shell.type(line[2:], made)
            assert answer.returncode == 0, (line, answer.stdout)
    return made


@pytest.fixture
def type_all(clone: Path, lab: Lab, daemon: Callable[..., Daemon], tmp_path: Path) -> Callable[[list[str]], list[str]]:
    """type_all(commands): type them in the clone, in order. Each ends well; returned is what each printed."""
    lab.pve.agent_default = True
    profiles = clone / "roles/agentlabd/files/profiles"
    one = daemon(profiles_dir=str(profiles), storage="local-lvm")
    # The configuration that the pages put into /etc/agentlab is at another place, as tests leave that folder alone.
    (tmp_path / "config.yaml").write_text(f"template: debian-13\nstorage: local-lvm\nprofiles_dir: {profiles}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    # What the role installs as /usr/bin/agentlab.
    (programs / "agentlab").write_text(
        "#!/bin/sh\n"
        f"PYTHONPATH={clone}/roles/agentlabd/files:{clone}/.collections AGENTLAB_SOCKET={one.socket}"
        f' exec {sys.executable} -m agentlab_cli "$@"\n'
    )
    (programs / "agentlab").chmod(0o755)
    env = {**lab.server.environment(lab.folder), "AGENTLAB_DATABASE": lab.database}
    env = {name: value for name, value in env.items() if name.startswith(("PROXMOX_", "AGENTLAB_", "REQUESTS_"))}
    env["AGENTLAB_CONFIG"] = str(tmp_path / "config.yaml")
    shell = Shell(clone.parent / "home", env)
    shell.env["PATH"] = f"{programs}:{shell.env['PATH']}"
    # The pages' files. Instead of SSH to a node the modules run here: the only word that differs.
    inventory = pages.blocks(README, "ini")[0]
    assert "ansible_user=root" in inventory
    local = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
    (clone / "inventory.ini").write_text(inventory.replace("ansible_user=root", local))
    play = next(block for block in pages.blocks(README, "yaml") if "# sandbox.yml" in block)
    (clone / "sandbox.yml").write_text(play)

    def run(lines: list[str]) -> list[str]:
        told = []
        for line in lines:
            answer = shell.type(line, clone)
            assert answer.returncode == 0, (line, answer.stdout)
            assert "WARNING" not in answer.stdout and "Traceback" not in answer.stdout, (line, answer.stdout)
            told.append(answer.stdout)
        return told

    return run


def test_every_command_is_typed_or_its_exception_has_a_reason() -> None:
    every = [one for page in (README, CREATION, DAEMON) for one in pages.commands(page)]
    assert len(every) > 60
    unknown = [one for one in every if other_place(one) is None and not one.startswith(TYPED)]
    assert not unknown, "type them here, or say where else they are typed, or why they are not"
    for start, place in ELSEWHERE.items():
        assert (pages.ROOT / place).is_file(), place
        assert any(one.startswith(start) for one in every), f"{start!r} is not in the pages any more"
    assert all(any(one.startswith(start) for one in every) for start in NOT_TYPED)


def test_the_readme_from_the_first_sandbox_to_the_doctor(type_all: Callable[[list[str]], list[str]], lab: Lab) -> None:
    lines = commands(README, "## With your own", "### Daemon and command line")
    assert len(lines) == 7
    type_all(lines)
    assert [vm.name for vm in lab.pve.vms if not vm.template and vm.vmid != 500] == ["agent-1"]


def test_the_command_line_of_the_readme(type_all: Callable[[list[str]], list[str]], lab: Lab) -> None:
    lines = commands(README, "### Daemon and command line", "### Profiles")
    told = type_all([line for line in lines if line != "agentlab doctor"])
    assert len(told) == 5 and told[4].startswith("sandbox 1000 destroyed (state=RUNNING)")
    assert "GNU/Linux" in told[2], "the command that README runs inside"
    # The doctor's exit status says what it found; here that the double's token may administer the cluster.
    assert "agentlab doctor" in lines and "ok " in type_all(["agentlab doctor || [ $? -eq 1 ]"])[0]


def test_the_creation_page_from_the_first_sandbox_to_the_workspace(
    type_all: Callable[[list[str]], list[str]], lab: Lab
) -> None:
    lines = commands(CREATION, "## 4.")
    assert len(lines) == 3
    told = type_all(lines)
    assert all(re.search(r"pve1\.example\.net \| CHANGED", one) for one in told)
    assert lab.ours() == {}


def test_the_command_line_of_the_daemons_page(type_all: Callable[[list[str]], list[str]], lab: Lab) -> None:
    lines = commands(DAEMON, "<!-- quickstart -->", "<!-- /quickstart -->")
    assert len(lines) == 4
    assert "sandbox 1000 destroyed (state=RUNNING)" in type_all(lines)[3] and lab.ours() == {}


def test_the_page_on_work_inside(type_all: Callable[[list[str]], list[str]], lab: Lab, clone: Path) -> None:
    """The double's guest has an ordinary user only: its folders, programs and users stand for those of the page."""
    lines = pages.commands(INSIDE)
    assert len(lines) == 17
    folder = lab.pve.machine(1000).folder
    inventory = INSIDE.read_text(encoding="utf-8").split("<!-- connection -->\n```yaml\n")[1].split("```")[0]
    python = "compose: {ansible_python_interpreter: \"'/usr/bin/python3'\"}\n"
    (clone / "boxes.agentlab.yml").write_text(inventory + python)
    instead = {
        " --user debian": "",
        "--chdir /srv": f"--chdir {folder}",
        ":/tmp/": f":{folder}/",
        ":/srv/": f":{folder}/",
        "/etc/motd < motd.txt": f"{folder}/motd < /etc/hostname",
        "tar cz project": "cat README.md",
        "make ": "echo ",
        "./agent ": "echo ",
        "/var/log/dpkg.log": "/etc/hostname",
    }
    run_id = ""
    for line in lines:
        for theirs, ours in instead.items():
            line = line.replace(theirs, ours)
        if run_id:
            line = re.sub(r"1000/[0-9a-f]{32}", run_id, line)
        told = type_all([line])[0]
        if "--detach" in line:
            run_id = told.strip()
            assert re.fullmatch(r"1000/[0-9a-f]{32}", run_id)
    assert (folder / "README.md").read_bytes() == (clone / "README.md").read_bytes()
    assert (folder / "project.tar.gz").read_bytes() == (clone / "README.md").read_bytes()
