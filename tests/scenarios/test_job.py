# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life of a job in one play, with this machine standing in for the guest: completed, failed, and a creation that fails."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from support.play import run_play

JOB = """\
---
- name: Work
  ansible.builtin.copy:
    content: "worked in {{ job_host }}"
    dest: "{{ job_file }}"
    mode: "0600"

- name: Break
  ansible.builtin.command: /bin/false
  when: job_breaks | bool
  changed_when: false
"""


@pytest.mark.parametrize("how", ["completed", "failed", "not created"])
def test_the_life_of_a_job(env: Any, server: Any, tmp_path: Any, how: str) -> None:
    server.pve.agent_default = True
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "jobs.yaml").write_text("workspace: required\nlease: {default: 1h, maximum: 2h}\ntags: [job]\n", encoding="utf-8")
    (tmp_path / "job-tasks.yml").write_text(JOB, encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {tmp_path}/profiles\n")
    if how == "not created":
        server.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
    run = run_play("playbooks/job.yml", env, tmp_path, extra_vars={
        "agentlab_hosts": "localhost", "job_name": "job-1", "job_tasks": f"{tmp_path}/job-tasks.yml", "job_profile": "jobs", "job_workspace": "data",
        "job_workspace_size": "2G", "job_workspace_storage": "local-lvm", "job_connection": "local", "job_python": "{{ ansible_playbook_python }}",
        "job_fetch": [f"{tmp_path}/made-inside"], "job_results": f"{tmp_path}/results", "job_file": f"{tmp_path}/made-inside",
        "job_breaks": how == "failed"})
    conn = sqlite3.connect(env["AGENTLAB_DATABASE"])
    events = conn.execute("SELECT operation, to_state, outcome FROM events ORDER BY id").fetchall()
    state, tags, profile = conn.execute("SELECT state, tags, profile FROM sandboxes").fetchone()
    workspace = conn.execute("SELECT state, volume, owner_vmid FROM workspaces").fetchone()
    conn.close()
    assert (state, json.loads(tags), profile) == ("DESTROYED", ["job"], "jobs")
    assert workspace[0] == "DETACHED" and server.pve.volumes_of(workspace[2]) == [workspace[1]]
    assert [vm.vmid for vm in server.pve.vms if not vm.template] == []
    fetched = tmp_path / "results" / "job-1" / "made-inside"
    if how == "completed":
        assert run.rc == 0 and not run.warnings, run.output
        assert fetched.read_text() == "worked in job-1"
        assert ("complete", "COMPLETED", "done") in events
    else:
        assert run.rc != 0 and not fetched.exists()
        assert ("complete", "COMPLETED", "done") not in events
        said = run["Fail if the job failed"]["msg"]
        if how == "failed":
            assert ("fail", "FAILED", "done") in events and said.startswith("the job in sandbox job-1 failed: Break:")
        else:
            assert said.startswith("the job in sandbox job-1 failed: Create the sandbox: sandbox 1000 could not be created") and "start failed" in said
