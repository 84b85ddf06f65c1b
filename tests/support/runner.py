# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""ansible-runner as AWX starts it: a private data folder for each job, with the variables that AWX writes."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.play import REPO, collections_path

PROJECT = REPO / "awx"


class Runner:
    """A private data folder as AWX makes one for each job, and ansible-runner itself.

    It holds project, inventory, injected environment and extra variables.
    """

    def __init__(self, folder: Path, server: Any, core: Path | None = None) -> None:
        """Make the folder. ``core`` is the bin folder of another ansible-core."""
        self.folder, self.server, self.number = folder, server, 0
        self.bin = core or Path(sys.executable).parent
        shutil.copytree(PROJECT, folder / "project")
        (folder / "inventory").mkdir()
        (folder / "inventory" / "hosts").write_text(
            f"[pve]\nnode ansible_connection=local ansible_python_interpreter={self.bin}/python\n"
        )
        (folder / "config.yaml").write_text("template: debian-13\nvmid_range: 1000-1999\n")
        (folder / "env").mkdir()
        environment = server.environment(str(folder))
        # What the credential type injects, and what is the host's own. In the environment only: never on a command
        # line.
        self.env = {
            "AGENTLAB_API_HOST": environment["PROXMOX_HOST"],
            "AGENTLAB_API_PORT": environment["PROXMOX_PORT"],
            "AGENTLAB_API_TOKEN_ID": environment["PROXMOX_TOKEN_ID"],
            "AGENTLAB_API_TOKEN_SECRET": environment["PROXMOX_TOKEN_SECRET"],
            "AGENTLAB_API_CA_PATH": environment["PROXMOX_CA_PATH"],
            "AGENTLAB_DATABASE": environment["AGENTLAB_DATABASE"],
            "AGENTLAB_CONFIG": environment["AGENTLAB_CONFIG"],
            "ANSIBLE_COLLECTIONS_PATH": str(collections_path(folder)),
            "ANSIBLE_HOME": str(folder / "home"),
            "ANSIBLE_FORCE_COLOR": "false",
            "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
            "ANSIBLE_DEPRECATION_WARNINGS": "true",
            "ANSIBLE_PIPELINING": "1",
        }
        (folder / "ansible.cfg").write_text("")
        # AWX reads this setting of the project itself, and puts it before its own.
        settings = configparser.ConfigParser()
        settings.read(folder / "project" / "ansible.cfg")
        own_roles = settings.get("defaults", "roles_path", fallback="")
        paths = (f"{folder}/requirements_roles", own_roles, "~/.ansible/roles", "/usr/share/ansible/roles")
        self.env["ANSIBLE_ROLES_PATH"] = os.pathsep.join(path for path in paths if path)

    def run(
        self, playbook: str, *, check: bool = False, text: str = "", **variables: Any
    ) -> tuple[int, list[dict[str, Any]], str]:
        """Return status, the events of the modules, and all output.

        ``text`` is a file of variables as AWX writes it.
        """
        self.number += 1
        (self.folder / "env" / "envvars").write_text(json.dumps(self.env))
        (self.folder / "env" / "extravars").write_text(text or json.dumps(variables))
        # Written each time: ansible-runner keeps what --cmdline said for the runs that follow.
        (self.folder / "env" / "cmdline").write_text("--check --diff" if check else "")
        (self.folder / "env" / "settings").write_text(json.dumps({"suppress_env_files": False}))
        command = [
            str(Path(sys.executable).with_name("ansible-runner")),
            "run",
            str(self.folder),
            "-p",
            f"{playbook}.yml",
            "-i",
            f"job{self.number}",
        ]
        clean = {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
        }
        process = subprocess.run(
            command, env=clean, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
        )
        artifacts = self.folder / "artifacts" / f"job{self.number}"
        written = sorted((artifacts / "job_events").glob("[0-9]*.json"), key=lambda path: int(path.name.split("-")[0]))
        events = [json.loads(path.read_text()).get("event_data", {}) for path in written]
        results = [
            event
            for event in events
            if str(event.get("task_action", "")).startswith("agentlab.proxmox.") and "res" in event
        ]
        return process.returncode, results, process.stdout + process.stderr + (artifacts / "stdout").read_text()

    def leaks(self, secret: str) -> list[str]:
        """Return the files of the job folders that hold the secret.

        The files in which ansible-runner itself writes the injected environment are left out.
        """
        own = {"env/envvars"} | {f"artifacts/job{number}/command" for number in range(1, self.number + 1)}
        return [
            name
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and not path.is_relative_to(self.folder / "proxmox")
            and secret.encode() in path.read_bytes()
            and (name := str(path.relative_to(self.folder))) not in own
        ]
