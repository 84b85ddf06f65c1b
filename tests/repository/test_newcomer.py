# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a newcomer types first works as it stands: README's installation in a fresh clone, and elsewhere; short names
in the clone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support import pages
from support.clone import Shell, make_clone
from support.double import EMPTY_CONFIG

README = pages.ROOT / "README.md"
INSTALLED = ".ansible/collections/ansible_collections/agentlab/proxmox"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(
        tmp_path / "home",
        {"AGENTLAB_DATABASE": str(tmp_path / "agentlab.db"), "AGENTLAB_CONFIG": EMPTY_CONFIG},
    )


def install_commands() -> list[str]:
    """The commands of README that build and install the collection, in their order."""
    section = README.read_text(encoding="utf-8").split("## With your own Proxmox VE")[1].split("Modules run on")[0]
    return [line[2:] for line in section.splitlines() if line.startswith("$ ")]


def test_the_first_screen_says_what_for_whom_and_what_to_type() -> None:
    screen = README.read_text(encoding="utf-8").splitlines()[:40]
    text = "\n".join(screen)
    assert "**For whom:**" in text and "**What it does:**" in text
    typed = [line[2:].split("  ")[0] for line in screen if line.startswith("$ ")]
    assert typed[:3] == [
        "git clone https://github.com/agentlab/agentlab.proxmox && cd agentlab.proxmox",
        "make demo",
        "make test",
    ]
    assert typed[3:] == install_commands()


def test_the_collection_is_installed_by_the_readme_in_a_fresh_clone(clone: Path, shell: Shell, tmp_path: Path) -> None:
    commands = install_commands()
    assert any("ansible-galaxy collection install" in command for command in commands)
    for command in commands:
        answer = shell.type(command, clone)
        assert answer.returncode == 0, (command, answer.stdout)
        assert "Nothing to do" not in answer.stdout and "WARNING" not in answer.stdout, answer.stdout
    manifest = json.loads((shell.home / INSTALLED / "MANIFEST.json").read_text())
    assert manifest["collection_info"]["name"] == "proxmox" and not (shell.home / INSTALLED).is_symlink()
    # From anywhere: neither the clone nor its configuration is needed any more.
    answer = shell.type("ansible localhost -m agentlab.proxmox.agentlab_sandbox_info", tmp_path)
    assert answer.returncode == 0 and '"count": 0' in answer.stdout, answer.stdout
    # The checkout itself is as it was.
    assert (clone / ".collections/ansible_collections/agentlab/proxmox").resolve() == clone


def test_the_archive_is_installed_by_the_same_command_elsewhere(clone: Path, shell: Shell, tmp_path: Path) -> None:
    build, install = install_commands()
    assert shell.type(build, clone).returncode == 0
    shutil.copytree(clone / "build", tmp_path / "elsewhere" / "build", symlinks=True)
    for _again in range(2):
        answer = shell.type(install, tmp_path / "elsewhere")
        assert answer.returncode == 0 and "Nothing to do" not in answer.stdout, answer.stdout
    assert (shell.home / INSTALLED / "MANIFEST.json").is_file()


def test_short_and_full_names_work_in_a_clone_where_nothing_is_installed(clone: Path, shell: Shell) -> None:
    for name in ("agentlab_sandbox_info", "agentlab.proxmox.agentlab_sandbox_info"):
        answer = shell.type(f"ansible localhost -m {name}", clone)
        assert answer.returncode == 0 and '"count": 0' in answer.stdout, answer.stdout


def test_the_clone_runs_its_own_code_though_another_release_is_installed(clone: Path, shell: Shell) -> None:
    other = shell.home / INSTALLED
    shutil.copytree(clone / "plugins", other / "plugins")
    (other / "plugins/modules/agentlab_sandbox_info.py").write_text("raise SystemExit('the installed one')\n")
    answer = shell.type("ansible localhost -m agentlab.proxmox.agentlab_sandbox_info", clone)
    assert answer.returncode == 0 and '"count": 0' in answer.stdout, answer.stdout
