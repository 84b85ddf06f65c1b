# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The check of a job's tasks before anything is made: it names the task that cannot run, or that ends the play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.job_tasks import UNUSABLE
from support.play import REPO, collections_path

# What the entries above name: roles and files beside the job's tasks.
BESIDE = {
    "back.yml": "- name: Back\n  block:\n    - import_tasks: job-tasks.yml\n",
    "more.yml": "- ansible.builtin.ping:\n",
    "roles/ends/tasks/main.yml": "- block:\n    - block:\n        - meta: end_play\n          when: false\n",
    "roles/ends/tasks/deep.yaml": "- include_tasks: {file: more.yml}\n",
    "roles/ends/tasks/more.yml": "- ansible.builtin.meta: end_batch\n",
    "roles/ends/tasks/fine.yml": "- ping:\n",
    "roles/ends/handlers/end.yaml": "- name: End\n  meta: end_batch\n",
    "roles/calls/tasks/main.yml": "- include_role: {name: ends}\n  when: false\n",
    "roles/depends/tasks/main.yml": "---\n",
    "roles/depends/meta/main.yml": "dependencies: [{role: ends}]\n",
    "roles/mine/tasks/main.yml": "- ansible.builtin.ping:\n",
    "roles/mine/tasks/no_role.yml": "- include_role: {name: no_such_role}\n",
    "roles/mine/tasks/no_file.yml": "- include_tasks: gone.yml\n",
    "roles/ping/tasks/main.yml": "- import_role: {name: pong}\n",
    "roles/pong/tasks/main.yml": "- import_role: {name: ping}\n",
    # A role of somebody else: what its conditions leave out is not missed.
    "roles/sound/tasks/main.yml": (
        "- include_tasks: linux.yml\n- include_tasks: other.yml\n  when: false\n"
        "- include_role: {name: no_such_role}\n  when: false\n- include_tasks: main.yml\n  when: false\n"
        "- meta: flush_handlers\n"
    ),
    "roles/sound/tasks/linux.yml": "- import_role: {name: mine}\n",
    "roles/sound/meta/main.yml": "dependencies: [mine]\n",
}


def check_tasks(folder: Path, tasks: str | None) -> str:
    """Return the problem of tasks that stand in a folder with all of BESIDE."""
    for name, content in BESIDE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    path = folder / "job-tasks.yml"
    if tasks is not None:
        path.write_text(tasks, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, REPO / "playbooks" / "files" / "check_job_tasks.py", path, folder],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "ANSIBLE_ROLES_PATH": str(folder / "roles"),
            "ANSIBLE_COLLECTIONS_PATH": str(collections_path(folder)),
        },
    )
    return str(json.loads(run.stdout)["problem"])


@pytest.mark.parametrize("what", UNUSABLE)
def test_the_check_of_the_tasks_names_what_is_wrong(tmp_path: Path, what: str) -> None:
    tasks, words = UNUSABLE[what]
    said = check_tasks(tmp_path, tasks)
    words = words.replace("{folder}", str(tmp_path))
    assert words in said and "agentlab-job-" not in said and "\n" not in said, said


def test_the_check_of_the_tasks_passes_what_can_be_run(tmp_path: Path) -> None:
    tasks = """\ufeff---
- name: Work
  block:
    - ansible.builtin.include_role: {name: mine}
    - ansible.builtin.include_role: {name: ends, tasks_from: fine}
    - ansible.builtin.import_role: {name: sound}
    - ansible.builtin.include_role: {name: agentlab.proxmox.agentlabd}
    - ansible.builtin.include_tasks: more.yml
    - ansible.builtin.import_tasks: more.yml
    - ansible.builtin.include_tasks: job-tasks.yml
      when: false
    - ansible.builtin.include_tasks: "{{ which }}.yml"
    - ansible.builtin.debug: {msg: !unsafe "{{ text }}"}
  rescue:
    - ansible.builtin.meta: flush_handlers
"""
    assert check_tasks(tmp_path, tasks) == ""
