# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Completion of commands, VMIDs and names in the shells."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.cli import PYTHON, StandIn, agentlab, environment, sandbox
from support.cli_answers import workspace


def complete(daemon: StandIn, words: str) -> list[str]:
    found = agentlab(
        socket=daemon.path,
        env={"_AGENTLAB_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )
    assert found.stderr == ""
    return [line.partition(",")[2] for line in found.stdout.splitlines() if line]


def test_commands_options_and_live_vmids_are_completed(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (
        200,
        {"sandboxes": [sandbox(1000), sandbox(1001, "TIMEOUT"), sandbox(2000, "DESTROYED")]},
    )
    assert complete(daemon, "agentlab sa") == ["sandbox"]
    assert complete(daemon, "agentlab sandbox re") == ["reconcile"]
    assert complete(daemon, "agentlab sandbox show ") == ["1000", "1001"]
    assert complete(daemon, "agentlab sandbox show 1001") == ["1001"]
    assert complete(daemon, "agentlab sandbox destroy --force 1000 ") == ["1001"]
    assert complete(daemon, "agentlab sandbox lease renew --ttl 2h ") == ["1000", "1001"]
    assert complete(daemon, "agentlab sandbox list --state T") == ["TIMEOUT"]
    assert complete(daemon, "agentlab --socket /nonexistent sandbox show ") == [], (
        "a daemon that is not there is no noise"
    )
    assert agentlab(
        env={
            "_AGENTLAB_COMPLETE": "bash_complete",
            "COMP_WORDS": f"agentlab --socket {daemon.path} sandbox show ",
            "COMP_CWORD": "5",
        },
        socket="/nonexistent",
    ).stdout.split() == ["plain,1000", "plain,1001"]


@pytest.mark.parametrize(
    ("shell", "part"),
    [
        ("bash", "complete -o nosort -F"),
        ("zsh", "#compdef agentlab"),
        ("fish", "complete --no-files --command agentlab"),
    ],
)
def test_each_shell_gets_its_completion_script(shell: str, part: str) -> None:
    found = agentlab("completion", shell)
    assert (found.returncode, found.stderr) == (0, "")
    assert part in found.stdout
    assert "_AGENTLAB_COMPLETE" in found.stdout


def test_a_real_bash_completes_vmids(daemon: StandIn, short_path: Path) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000), sandbox(1001)]})
    (short_path / "agentlab").write_text(f'#!/bin/sh\nexec {PYTHON} -m agentlab_cli "$@"\n')
    (short_path / "agentlab").chmod(0o755)
    script = (
        "source <(agentlab completion bash); COMP_WORDS=(agentlab sandbox show 10); COMP_CWORD=3; "
        '_agentlab_completion agentlab; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = environment(daemon.path)
    found = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**env, "PATH": f"{short_path}:{env['PATH']}"},
        check=True,
    )
    assert found.stdout.split() == ["1000", "1001"]


def test_names_of_profiles_and_workspaces_are_completed(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/profiles"] = (200, {"profiles": [{"name": "yolo"}, {"name": "dev"}]})
    daemon.replies["GET", "/v1/workspaces"] = (200, {"workspaces": [workspace("project-x")]})
    assert complete(daemon, "agentlab sandbox new --profile y") == ["yolo"]
    assert complete(daemon, "agentlab sandbox new --workspace ") == ["project-x"]
    assert complete(daemon, "agentlab workspace detach p") == ["project-x"]
