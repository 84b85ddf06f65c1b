# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The runner of playbooks: results of each task, warnings, no settings from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import play


def test_play_tells_what_every_task_did(tmp_path: Path) -> None:
    done = play.run_play(
        """
        - name: Say
          ansible.builtin.debug:
            msg: "{{ greeting }} {{ lookup('env', 'AGENTLAB_CONFIG') }}"
        - name: Skip
          ansible.builtin.debug:
          when: false
        - name: Loop
          ansible.builtin.command: echo {{ item }}
          loop: [a, b]
        - name: Fail
          ansible.builtin.fail:
            msg: "on purpose"
        """,
        {"AGENTLAB_CONFIG": "there"},
        tmp_path,
        extra_vars={"greeting": "hello"},
    )
    assert done.rc == 2 and done.result("Say")["msg"] == "hello there" and done.last["msg"] == "on purpose"
    assert [(entry["task"], entry["status"]) for entry in done.results] == [
        ("Say", "ok"),
        ("Skip", "skipped"),
        ("Loop", "changed"),
        ("Loop", "changed"),
        ("Loop", "changed"),
        ("Fail", "failed"),
    ]
    assert [entry["result"]["stdout"] for entry in done.all("Loop") if entry.get("item")] == ["a", "b"]
    assert done.warnings == [] and [entry["task"] for entry in done.failed] == ["Fail"]


def test_play_sees_warnings_and_no_outer_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXMOX_HOST", "proxmox.example.org")
    monkeypatch.setenv("ANSIBLE_STDOUT_CALLBACK", "no_such_callback")
    done = play.run_play("- ansible.builtin.debug: {msg: \"{{ lookup('env', 'PROXMOX_HOST') }}\"}", {}, tmp_path).ok()
    assert done.last["msg"] == "" and os.environ["PROXMOX_HOST"]
    bad = play.run_play([{"hosts": "nobody", "tasks": []}], {}, tmp_path)
    assert bad.rc == 0 and any("[WARNING]" in line for line in bad.warnings)
    with pytest.raises(AssertionError):
        bad.ok()


def test_one_module_and_one_command_can_be_run(tmp_path: Path) -> None:
    made = play.run_module(
        "ansible.builtin.file",
        {"path": str(tmp_path / "new"), "state": "directory", "mode": "0700"},
        {},
        tmp_path,
        check=True,
    ).ok()
    assert made.status("ansible.builtin.file") == "changed" and not (tmp_path / "new").exists()
    assert play.run_adhoc("ansible.builtin.command", {"cmd": "echo hi"}, {}, tmp_path).ok().last["stdout"] == "hi"
    assert play.run_adhoc("ansible.builtin.command", "echo 'a b'", {}, tmp_path).ok().last["stdout"] == "a b"


def test_core_can_be_imported() -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states

    assert Path(states.__file__).resolve() == play.REPO / "plugins" / "module_utils" / "_core" / "states.py"
