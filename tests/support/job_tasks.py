# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tasks of a job that cannot run or that end the play, each with the part of the message that names it."""

from __future__ import annotations

UNUSABLE = {
    "no module": ("- name: Work\n  no_such_module:\n    path: /tmp\n", "no_such_module"),
    "no module in a block": (
        "- name: Work\n  block:\n    - name: Inner\n      a.b.no_such_module:\n",
        "no_such_module",
    ),
    "a playbook": ("- name: Play\n  hosts: all\n  tasks: []\n", "is a playbook"),
    "a tab": ("- name: Work\n\tansible.builtin.ping:\n", "line 2, column 1"),
    "not yaml": ("- name: {Work\n", "is not valid YAML"),
    "a mapping": ("name: Work\n", "is not a list of tasks"),
    "empty": ("---\n", "holds no tasks"),
    "words": ("- run the thing\n", "entry 1 is 'run the thing'"),
    "no role": ("- name: Work\n  ansible.builtin.include_role:\n    name: no_such_role\n", "no_such_role"),
    "no role in a block": (
        "- name: Work\n  block:\n    - ansible.builtin.import_role:\n        name: no_such_role\n",
        "no_such_role",
    ),
    "no file": ("- name: Work\n  ansible.builtin.include_tasks: not-there.yml\n", "not-there.yml"),
    "no imported file": (
        "- name: Work\n  ansible.builtin.import_tasks: not-there.yml\n",
        "includes not-there.yml, which is not there",
    ),
    "no imported file in a block": (
        "- block:\n    - import_tasks: {file: sub/gone.yml}\n",
        "includes sub/gone.yml, which is not there",
    ),
    "one word": ("run\n", "is not a list of tasks but 'run'; begin each task"),
    "two actions": ("- name: Work\n  ansible.builtin.ping:\n  ansible.builtin.debug:\n", "conflicting action"),
    "an end": ("- name: Work\n  ansible.builtin.meta: end_play\n", "has 'meta: end_play', which would end the play"),
    "lost hosts": ("- meta: clear_host_errors\n", "has 'meta: clear_host_errors', which would bring back hosts"),
    "a missing file": (None, "does not exist. In {folder} there are: back.yml, more.yml"),
    "an end in the old form": ("- name: Work\n  action: meta end_host\n", "meta: end_host"),
    "an end in a role": (
        "- include_role: {name: ends}\n",
        "runs the role ends, which has 'meta: end_play' in tasks/main.yml, which would end the play",
    ),
    "an end in a file of a role": (
        "- import_role: {name: ends, tasks_from: deep}\n",
        "includes more.yml, which has 'meta",
    ),
    "an end in a role of a role": (
        "- include_role: name=calls\n",
        "role calls, which runs the role ends, which has 'meta",
    ),
    "an end in a dependency": (
        "- include_role: {name: depends}\n",
        "depends, which runs the role ends, which has 'meta",
    ),
    "an end in a handler": (
        "- include_role: {name: ends, tasks_from: fine, handlers_from: end.yaml}\n",
        "'meta: end_batch'",
    ),
    "no file of a role": (
        "- include_role: {name: mine, tasks_from: gone}\n",
        "mine, which has no file for tasks_from: gone. In {folder}/roles/mine/tasks there are: main.yml, no_file.yml",
    ),
    "no variables of a role": (
        "- include_role: {name: mine, vars_from: gone}\n",
        "role mine, which has no file for vars_from: gone. There is no folder {folder}/roles/mine/vars either",
    ),
    "no file of a role in free form": (
        "- import_role: name=mine tasks_from=gone.yml\n",
        "has no file for tasks_from: gone.yml",
    ),
    "no role in a role": ("- include_role: {name: mine, tasks_from: no_role}\n", "no_such_role"),
    "no file in a role": (
        "- include_role: {name: mine, tasks_from: no_file}\n",
        "includes gone.yml, which is not there. In {folder}/roles/mine/tasks there are: main.yml, no_file.yml",
    ),
    "itself": ("- import_tasks: job-tasks.yml\n", "includes job-tasks.yml, which is imported by itself"),
    "each other": (
        "- import_tasks: back.yml\n",
        "includes back.yml, which includes job-tasks.yml, which is imported by",
    ),
    "roles that call each other": (
        "- import_role: {name: ping}\n",
        "role pong, which runs the role ping, which is imported",
    ),
}
