# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Errors that can be acted upon: the name that was meant, what became of the VM, an object for programs."""

from __future__ import annotations

import json

import pytest

from support.cli import StandIn, agentlab, outcome, sandbox
from support.cli_answers import bulk


def test_a_sandbox_that_is_not_there_is_named_with_those_nearest(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(vmid) for vmid in (1000, 1008, 1010, 1500)]})
    daemon.replies["POST", "/v1/sandboxes/1009/stop"] = (
        404,
        {"error": "sandbox not found", "code": "not_found", "vmid": 1009},
    )
    found = agentlab("sandbox", "stop", 1009, socket=daemon.path)
    assert (found.returncode, found.stdout) == (1, "")
    assert (
        found.stderr
        == "Error: sandbox not found\nThere is no sandbox 1009. Nearest: 1000, 1008, 1010. See 'agentlab sandbox list "
        "--all'\n"
    )


def test_a_workspace_that_is_not_there_is_named_with_those_that_are(daemon: StandIn) -> None:
    refusal = (404, {"error": "workspace not found", "code": "not_found", "workspace": "w1"})
    daemon.replies["GET", "/v1/workspaces/w1"] = refusal
    for there, said in (
        ([{"name": "a"}, {"name": "b"}], "a, b"),
        ([], "none"),
        ([{"name": f"w{n}"} for n in range(12)], "w8, w9 and 2 more"),
    ):
        daemon.replies["GET", "/v1/workspaces"] = (200, {"workspaces": there})
        found = agentlab("workspace", "show", "w1", socket=daemon.path)
        assert (found.returncode, found.stdout) == (1, "")
        assert found.stderr.startswith("Error: workspace not found\nThere is no workspace 'w1'. Workspaces: ")
        assert f"{said}. See 'agentlab workspace list --all'\n" in found.stderr


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("vm_absent", "Note: sandbox 1009: its VM was already gone\n"),
        (
            "vmid_reused",
            "Note: sandbox 1009: its VM was already gone; VMID 1009 is somebody else's VM now, and was left alone\n",
        ),
        ("requested", ""),
    ],
)
def test_what_became_of_the_vm_stands_beside_the_words_of_the_seed(daemon: StandIn, reason: str, said: str) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/destroy"] = (
        200,
        {**sandbox(1009, "DESTROYED"), "previous_state": "RUNNING", "reason": reason, "changed": True},
    )
    found = agentlab("sandbox", "destroy", "--force", 1009, socket=daemon.path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "sandbox 1009 destroyed (state=RUNNING)\n", said)
    bulk(daemon, 200, outcome(1009, "destroyed", reason=reason), outcome(1010, "destroyed"))
    assert agentlab("sandbox", "destroy", "--force", 1009, 1010, socket=daemon.path).stderr == said


def test_an_error_is_an_object_for_programs(daemon: StandIn) -> None:
    for args, code, status in (
        (["sandbox", "show", "x"], "usage", 2),
        (["sandbox", "lease", "renew", "1009"], "usage", 2),
        (["nothing"], "usage", 2),
        (["--socket", "/nonexistent", "status"], "unreachable", 3),
    ):
        found = agentlab(*args, "--json", socket=daemon.path)
        told = json.loads(found.stdout)
        assert (found.returncode, told["code"]) == (status, code) and told["error"] and found.stderr, args
        assert agentlab(*args, socket=daemon.path).stdout == ""


def test_an_absence_that_is_only_noted_is_not_repaired(daemon: StandIn) -> None:
    drift = {"vmid": 1000, "uuid": None, "state": "RUNNING", "evidence": {}, "applied": True, "error": None}
    daemon.replies["POST", "/v1/sandboxes/reconcile"] = (
        200,
        {
            "count": 2,
            "drift": [
                {**drift, "kind": "stopped", "action": "FAILED"},
                {**drift, "kind": "absent", "action": "noted; DESTROYED if it is absent in the next pass too"},
            ],
        },
    )
    found = agentlab("sandbox", "reconcile", "--apply", socket=daemon.path)
    assert found.stdout.splitlines()[0] == "2 difference(s), 1 repaired, 1 noted"
