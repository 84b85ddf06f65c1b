# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules in place (plugins/action): when they run there, that the answer is the one of a module that was shipped, and what is left when the process
that runs Ansible is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from support.double import TOKEN_SECRET
from support.play import run_command, run_play
from support.story import task

SANDBOX = "agentlab_sandbox"
PLACE = re.compile(r"Running (\w+) in place|Using module file \S*/(agentlab_\w+)\.py")
# What no two runs have in common.
_OWN = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d{4}-\d\d-\d\dT[\d:]+Z|UPID:[^\" ]+|(?<=\"duration_ms\": )\d+")


def places(output: str) -> list[str]:
    """Where each module of ours ran, in order."""
    return ["in place" if found[1] else "shipped" for found in PLACE.finditer(output)]


def test_where_a_module_runs(env: dict[str, str], tmp_path: Path, given: Any) -> None:
    given(1)
    show = {"agentlab.proxmox.agentlab_sandbox_info": {}}
    other = "{{ ansible_playbook_python | dirname }}/python3"
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(json.dumps({"all": {"hosts": {
        "beside": {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"},
        "another": {"ansible_connection": "local", "ansible_python_interpreter": other}}}}))
    run = run_play([{"hosts": "localhost", "gather_facts": False, "vars": {"agentlab_in_place": True}, "tasks": [
        {"name": "plain", **show},
        {"name": "told not to", **show, "vars": {"agentlab_in_place": "no"}},
        {"name": "another python", **show, "vars": {"ansible_python_interpreter": other}},
        {"name": "environment", **show, "environment": {"AGENTLAB_CONFIG": env["AGENTLAB_CONFIG"]}},
        {"name": "timeout", **show, "timeout": 60},
        {"name": "async", **show, "async": 60, "poll": 1},
        {"name": "become", **show, "become": True, "become_method": "ansible.builtin.su"},
        {"name": "delegated", **show, "delegate_to": "beside"},
        {"name": "delegated to another python", **show, "delegate_to": "another"},
    ]}], env, tmp_path, args=("-vvv", "-i", str(hosts))).ok()
    assert [entry["result"]["count"] for entry in run.results] == [1] * 9
    assert places(run.output) == ["in place", *["shipped"] * 6, "in place", "shipped"]


def test_both_ways_answer_the_same(env: dict[str, str], tmp_path: Path) -> None:
    """One story, told in place and shipped, each with records of its own: the results are equal but for times, identities and task ids."""
    password, sealed = tmp_path / "password", tmp_path / "sealed.yml"
    password.write_text("password of the vault")
    sealed.write_text(run_command(["ansible-vault", "encrypt_string", "--vault-password-file", str(password), "--name", "sealed", TOKEN_SECRET],
                                  env, tmp_path).stdout)
    plain = {name: value for name, value in env.items() if name != "PROXMOX_TOKEN_SECRET"}
    tasks = [
        task("would create", SANDBOX, name="mine", tags=["a", "b"], ttl="1h", check=True, diff=True),
        task("create", SANDBOX, name="mine", tags=["a", "b"], ttl="1h", diff=True),
        task("again", SANDBOX, name="mine"),
        task("show", "agentlab_sandbox_info", verify=True, events=20),
        task("too long a lease", "agentlab_lease", name="mine", ttl="1000d", fails=True),
        task("stop", SANDBOX, name="mine", state="stopped"),
        task("stop again", SANDBOX, name="mine", state="stopped"),
        task("not allowed", SANDBOX, name="mine", state="suspended", fails=True),
        task("several", SANDBOX, vmids=[100, 101], state="absent"),
        task("no such option", SANDBOX, nam="mine", fails=True),
        task("no such state", SANDBOX, name="mine", state="gone", fails=True),
        task("two that exclude one another", SANDBOX, vmid=1000, vmids=[1000], fails=True),
        task("one that is missing", "agentlab_lease", ttl="1h", fails=True),
        task("not a number", SANDBOX, vmid="ten", fails=True),
        task("a path", "agentlab_sandbox_info", config_file="~/none.yaml", fails=True),
        task("without certificate checks", "agentlab_sandbox_info", verify=True, validate_certs=False),
        task("reconcile", "agentlab_reconcile", diff=True),
        task("prune", "agentlab_prune", states=["STOPPED"], older_than="0", diff=True),
    ]
    for one in tasks:
        one[next(name for name in one if name.startswith("agentlab."))]["api_token_secret"] = "{{ sealed }}"
    told: dict[str, list[Any]] = {}
    for way in ("yes", "no"):
        run = run_play(tasks, {**plain, "AGENTLAB_DATABASE": str(tmp_path / f"{way}.db")}, tmp_path,
                       args=("-vvv", "-e", f"agentlab_in_place={way}", "-e", f"@{sealed}", "--vault-password-file", str(password))).ok()
        assert places(run.output) == ["in place" if way == "yes" else "shipped"] * len(tasks)
        assert TOKEN_SECRET not in run.output
        assert [entry["task"] for entry in run.results if entry["status"] == "failed"] == [one["name"] for one in tasks if one.get("ignore_errors")]
        told[way] = [json.loads(_OWN.sub("0", json.dumps({name: entry[name] for name in ("task", "status", "result")}))) for entry in run.results]
    for here, shipped in zip(told["yes"], told["no"], strict=True):
        assert here == shipped


def test_the_process_that_ran_it_is_killed(env: dict[str, str], tmp_path: Path, server: Any) -> None:
    """The claim of a creation in place names the process that worked for Ansible: once that is dead, the next run goes on at once."""
    server.pve.fault("POST", "/clone", "hang", seconds=20, carry_out=True)
    create = task("create", SANDBOX, name="mine", keywords={"vars": {"agentlab_in_place": True}})
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_play, [create], env, tmp_path)
        deadline = time.monotonic() + 30
        while server.pve.vm(1000) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.closing(sqlite3.connect(env["AGENTLAB_DATABASE"])) as conn:
            worker = json.loads(conn.execute("SELECT process FROM claims").fetchone()[0])["pid"]
        os.kill(worker, signal.SIGKILL)
        killed = first.result()
    assert killed.rc != 0 and "dead state" in killed.output, killed.output
    again = run_play([create, task("show", "agentlab_sandbox_info", verify=True)], env, tmp_path).ok()
    assert again.status("create") == "changed"
    assert [(one["vmid"], one["state"], one["identity"]) for one in again["show"]["sandboxes"]] == [(1000, "RUNNING", "MATCH")]
