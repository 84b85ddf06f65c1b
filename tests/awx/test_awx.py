# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every playbook through ansible-runner as AWX runs it, answers as strings and empty ones included."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from support.double import TOKEN_SECRET
from support.runner import PROJECT, Runner

PLAYBOOKS = sorted(path.stem for path in PROJECT.glob("*.yml"))


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
    outcomes: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, variables in story:
        for check in (True, False):
            status, results, output = runner.run(name, check=check, **variables, **who)
            assert status == 0 and "[WARNING]" not in output and "[DEPRECATION" not in output, (
                f"{name} {check}\n{output}"
            )
            outcomes[name, check] = results[-1]["res"]
            if check and name in ("sandbox_create", "job"):
                assert [vm.vmid for vm in server.pve.vms if not vm.template] == []
    assert outcomes["sandbox_create", True]["changed"] is outcomes["sandbox_create", False]["changed"] is True
    created = outcomes["sandbox_create", False]["sandbox"]
    assert created["tags"] == ["a", "b"] and created["ip"] and created["vmid"] == 1000
    assert outcomes["lease_renew", False]["results"][0]["granted_seconds"] == 240 * 60
    assert outcomes["sandbox_destroy", True]["changed"] is True
    assert [item["outcome"] for item in outcomes["sandbox_destroy", False]["results"]] == ["destroyed", "not_found"]
    assert outcomes["prune", False]["count"] == 0
    assert outcomes["job", True]["changed"] is True and outcomes["job", False]["sandbox"]["state"] == "DESTROYED"
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


@pytest.mark.parametrize("inside", [True, False], ids=["in the DSN", "beside it"])
def test_the_dsn_and_its_password_reach_the_modules_and_nobody_else(runner: Runner, inside: bool) -> None:
    """They are injected; neither output, files of the job nor a command line shows the password, as given or
    decoded.
    """
    written, decoded = "made%2Dup%40pass%2Fword-71", "made-up@pass/word-71"
    login = f"agentlab:{written}" if inside else "agentlab"
    runner.env |= {
        "AGENTLAB_RECORDS": f"postgresql://{login}@127.0.0.1:1/agentlab?connect_timeout=1",
        "AGENTLAB_RECORDS_PASSWORD": "" if inside else decoded,
        "ANSIBLE_VERBOSITY": "4",
    }
    del runner.env["AGENTLAB_DATABASE"]
    commands: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    commands.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status, results, output = runner.run("reconcile")
    finally:
        ended.set()
        watcher.join()
    result = results[-1]["res"]
    assert status != 0 and "postgresql://agentlab@127.0.0.1:1/agentlab" in result["msg"], output
    options = result["invocation"]["module_args"]
    if inside:
        assert options["database"].startswith("postgresql://agentlab")
    else:
        assert options["database_password"] == "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
    assert any(b"ansible-playbook" in command for command in commands)
    for secret in (written, decoded):
        assert secret not in output and runner.leaks(secret) == [], "shown"
        assert not [command for command in commands if secret.encode() in command], "in the process list"
