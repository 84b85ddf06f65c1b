# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every playbook through ansible-runner as AWX runs it, answers as strings and empty ones included."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.double import TOKEN_SECRET
from support.play import REPO, collections_path

PROJECT = REPO / "awx"
PLAYBOOKS = sorted(path.stem for path in PROJECT.glob("*.yml"))


# ---- as AWX runs it ----


class Runner:
    """A private data folder as AWX makes one for each job: project, inventory, injected environment, extra variables; and ansible-runner itself."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.folder, self.server, self.number = folder, server, 0
        shutil.copytree(PROJECT, folder / "project")
        (folder / "inventory").mkdir()
        (folder / "inventory" / "hosts").write_text(
            f"[pve]\nnode ansible_connection=local ansible_python_interpreter={sys.executable}\n"
        )
        (folder / "config.yaml").write_text("template: debian-13\nvmid_range: 1000-1999\n")
        (folder / "env").mkdir()
        found = server.environment(str(folder))
        # What the credential type injects, and what is the host's own. In the environment only: never on a command line.
        self.env = {
            "AGENTLAB_API_HOST": found["PROXMOX_HOST"],
            "AGENTLAB_API_PORT": found["PROXMOX_PORT"],
            "AGENTLAB_API_TOKEN_ID": found["PROXMOX_TOKEN_ID"],
            "AGENTLAB_API_TOKEN_SECRET": found["PROXMOX_TOKEN_SECRET"],
            "AGENTLAB_API_CA_PATH": found["PROXMOX_CA_PATH"],
            "AGENTLAB_DATABASE": found["AGENTLAB_DATABASE"],
            "AGENTLAB_CONFIG": found["AGENTLAB_CONFIG"],
            "ANSIBLE_COLLECTIONS_PATH": str(collections_path(folder)),
            "ANSIBLE_HOME": str(folder / "home"),
            "ANSIBLE_FORCE_COLOR": "false",
            "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
            "ANSIBLE_DEPRECATION_WARNINGS": "true",
            "ANSIBLE_PIPELINING": "1",
        }
        (folder / "ansible.cfg").write_text("")

    def run(self, playbook: str, *, check: bool = False, **variables: Any) -> tuple[int, list[dict[str, Any]], str]:
        """Status, the events of the modules, and all output."""
        self.number += 1
        (self.folder / "env" / "envvars").write_text(json.dumps(self.env))
        (self.folder / "env" / "extravars").write_text(json.dumps(variables))
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
        clean = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command, env=clean, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
        )
        artifacts = self.folder / "artifacts" / f"job{self.number}"
        written = sorted((artifacts / "job_events").glob("[0-9]*.json"), key=lambda path: int(path.name.split("-")[0]))
        events = [json.loads(path.read_text())["event_data"] for path in written]
        results = [
            event
            for event in events
            if str(event.get("task_action", "")).startswith("agentlab.proxmox.") and "res" in event
        ]
        return done.returncode, results, done.stdout + done.stderr + (artifacts / "stdout").read_text()

    def leaks(self, secret: str) -> list[str]:
        """Files of the job folders that hold the secret, beyond those in which ansible-runner itself writes the injected environment."""
        own = {"env/envvars"} | {f"artifacts/job{number}/command" for number in range(1, self.number + 1)}
        return [
            name
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and not path.is_relative_to(self.folder / "proxmox")
            and secret.encode() in path.read_bytes()
            and (name := str(path.relative_to(self.folder))) not in own
        ]


@pytest.fixture
def runner(tmp_path: Path, server: Any) -> Runner:
    return Runner(tmp_path / "job", server) if (tmp_path / "job").mkdir() is None else None  # type: ignore[return-value]


def test_every_playbook_as_awx_runs_it(runner: Runner, server: Any) -> None:
    server.pve.agent_default = True
    tasks = runner.folder / "tasks.yml"
    tasks.write_text(
        f"- name: Work\n  ansible.builtin.copy: {{content: done, dest: {runner.folder}/made-inside, mode: '0600'}}\n"
    )
    who = {"awx_job_id": 4711, "awx_user_name": "alice", "tower_job_id": 4711, "tower_user_name": "alice"}
    create = {
        "sandbox_name": "agent-1",
        "sandbox_ttl": "2h",
        "sandbox_template": "",
        "sandbox_cores": "3",
        "sandbox_memory": "",
        "sandbox_tags": "a,b",
        "sandbox_ssh_public_keys": "",
        "sandbox_wait_for_ip": "true",
    }
    story: list[tuple[str, dict[str, Any]]] = [
        ("sandbox_create", create),
        ("doctor", {"doctor_bundle": "", "sandbox_template": ""}),
        ("lease_renew", {"sandbox_vmids": "1000", "sandbox_ttl": "240", "sandbox_min_remaining": ""}),
        ("reconcile", {}),
        ("prune", {"prune_older_than": "24h", "prune_max_count": "50", "prune_states": "", "prune_tags": ""}),
        ("sandbox_destroy", {"sandbox_vmids": "1000, 1001", "sandbox_force": "true"}),
        (
            "job",
            {
                "job_name": "job-1",
                "job_tasks": str(tasks),
                "job_profile": "",
                "job_ttl": "1h",
                "job_workspace": "",
                "job_keep": "",
                "job_connection": "local",
                "job_python": sys.executable,
                "job_fetch": "",
            },
        ),
    ]
    assert {name for name, _variables in story} == set(PLAYBOOKS)
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, variables in story:
        for check in (True, False):
            status, results, output = runner.run(name, check=check, **variables, **who)
            assert (
                status == 0 and "[WARNING]" not in output and "[DEPRECATION" not in output
            ), f"{name} {check}\n{output}"
            found[name, check] = results[-1]["res"]
            if check and name in ("sandbox_create", "job"):
                assert [vm.vmid for vm in server.pve.vms if not vm.template] == []
    assert found["sandbox_create", True]["changed"] is found["sandbox_create", False]["changed"] is True
    made = found["sandbox_create", False]["sandbox"]
    assert made["tags"] == ["a", "b"] and made["ip"] and made["vmid"] == 1000
    assert found["lease_renew", False]["results"][0]["granted_seconds"] == 240 * 60
    assert found["sandbox_destroy", True]["changed"] is True
    assert [one["outcome"] for one in found["sandbox_destroy", False]["results"]] == ["destroyed", "not_found"]
    assert found["prune", False]["count"] == 0
    assert found["job", True]["changed"] is True and found["job", False]["sandbox"]["state"] == "DESTROYED"
    assert (runner.folder / "made-inside").read_text() == "done"
    assert [vm.vmid for vm in server.pve.vms if not vm.template] == []
    actors = sqlite3.connect(runner.env["AGENTLAB_DATABASE"]).execute("SELECT DISTINCT actor FROM events").fetchall()
    assert actors == [("alice (AWX job 4711)",)]
    assert runner.leaks(TOKEN_SECRET) == []
    assert TOKEN_SECRET in (runner.folder / "env" / "envvars").read_text(), "it was injected after all"


def test_a_schedule_is_an_actor_and_a_failure_is_told(runner: Runner) -> None:
    status, results, output = runner.run("sandbox_create", sandbox_name="x", sandbox_cores="many", awx_job_id=5)
    assert (
        status != 0
        and "sandbox" not in str(results[-1]["res"].get("sandbox"))
        and "many" in output
        and runner.leaks(TOKEN_SECRET) == []
    )
    runner.run("sandbox_create", sandbox_name="x", awx_job_id=6, awx_schedule_name="nightly")
    status, results, _output = runner.run("sandbox_destroy", sandbox_vmids="1000", sandbox_force="", awx_job_id=7)
    assert status != 0 and "cannot destroy sandbox in RUNNING state" in results[-1]["res"]["msg"]
    actors = sqlite3.connect(runner.env["AGENTLAB_DATABASE"]).execute("SELECT DISTINCT actor FROM events").fetchall()
    assert actors == [("schedule nightly (AWX job 6)",)]
