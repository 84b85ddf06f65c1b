# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The end of a failed task's log is part of the message and of the event: the cause often stands only there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.lab import Lab

CAUSE = "kvm: -drive file=/dev/pve/vm-1000-disk-0: Could not open: Permission denied"
STATUS = "start failed: QEMU exited with code 1"
TOLD = f"failed: {STATUS}. Its log ends: generating cloud-init ISO | {CAUSE}"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def log(lab: Lab, *lines: str, times: int = 9) -> None:
    """Let the logs of tasks have these lines, and end as those of failed ones do."""
    rows = [{"n": number, "t": line} for number, line in enumerate([*lines, f"TASK ERROR: {STATUS}"], 1)]
    lab.pve.fault("GET", "/log", "answer", status=200, body=json.dumps({"data": rows}), times=times)


def fail(lab: Lab, kinds: str) -> None:
    for kind in kinds.split():
        lab.pve.next_task(kind, "fail", text=STATUS, times=9)
    log(lab, "generating cloud-init ISO", CAUSE)


@pytest.mark.parametrize("kind", ["qmclone", "qmstart", "resize"])
def test_a_failed_creation_tells_the_end_of_the_task_log(lab: Lab, kind: str) -> None:
    fail(lab, kind)
    with pytest.raises(AgentlabError) as caught:
        lab.create(disk_size="64G")
    assert TOLD in caught.value.message
    assert TOLD in json.dumps(lab.events(lab.records()[0]))


@pytest.mark.parametrize(
    ("kind", "operation"), [("qmstart", "start"), ("qmstop", "stop"), ("qmpause qmsuspend", "suspend")]
)
def test_a_failed_power_operation_tells_the_end_of_the_task_log(lab: Lab, kind: str, operation: str) -> None:
    made = lab.create()
    if operation == "start":
        lab.power("stop", made.vmid)
    if kind == "qmstop":
        lab.pve.next_task("qmshutdown", "fail", text=STATUS)
    fail(lab, kind)
    with pytest.raises(AgentlabError) as caught:
        lab.power(operation, made.vmid)
    assert TOLD in caught.value.message
    assert TOLD in json.dumps(lab.events(made))


def test_of_a_destroy(lab: Lab) -> None:
    made = lab.create()
    lab.power("stop", made.vmid)
    fail(lab, "qmdestroy")
    outcome = lab.destroy(made.vmid)[0]
    assert TOLD in str(outcome.message) and TOLD in json.dumps(lab.events(made))


def test_a_failed_workspace_operation_tells_the_end_of_the_task_log(lab: Lab) -> None:
    workspace.ensure_present(lab.context(), "w1", size="2G", storage="local-lvm")
    fail(lab, "imgdel")
    with pytest.raises(AgentlabError) as caught:
        workspace.ensure_absent(lab.context(), "w1", force=True)
    assert TOLD in caught.value.message


def test_only_its_last_lines_are_told_and_nothing_that_moves_a_terminal(lab: Lab) -> None:
    lab.pve.next_task("qmstart", "fail", text=STATUS)
    log(lab, *(f"line {number}" for number in range(2000)), "\x1b[31mred\x07 \u202ebackwards", "x" * 5000)
    with pytest.raises(AgentlabError) as caught:
        lab.create()
    message = caught.value.message
    assert "Its log ends: line 1997 | line 1998 | line 1999 | [31mred backwards | xxx" in message
    assert message.isprintable() and len(message) < 1500


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            403,
            '{"data": null, "message": "Permission check failed (/nodes/pve1, Sys.Audit)"}',
            "Permission check failed (/nodes/pve1, Sys.Audit)",
        ),
        (200, '{"data": [{"n": 1, "t": "unable to open file - No such file or directory"}]}', "unable to open file"),
        (200, '{"data": "nonsense"}', "not a list"),
        (596, "", "596"),
    ],
)
def test_a_log_that_cannot_be_read_is_said_to_be_so(lab: Lab, status: int, body: str, words: str) -> None:
    lab.pve.next_task("qmstart", "fail", text=STATUS)
    lab.pve.fault("GET", "/log", "answer", status=status, body=body, times=9)
    with pytest.raises(AgentlabError) as caught:
        lab.create()
    assert f"failed: {STATUS} (its log cannot be read: " in caught.value.message and words in caught.value.message


@pytest.mark.parametrize("ending", ["OK", "WARNINGS: 1"])
def test_the_log_of_a_task_that_ended_well_is_not_read(lab: Lab, ending: str) -> None:
    if ending != "OK":
        lab.pve.next_task("qmstart", "warnings")
    lab.create()
    assert not [name for name in lab.pve.counted if name.endswith("/log")]


def test_the_log_of_a_lock_that_was_not_got_is_not_read(lab: Lab) -> None:
    """It is tried again, and its log says no more than the status."""
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.next_task(
        "qmstart", "fail", text="can't lock file '/var/lock/qemu-server/lock-1000.conf' - got timeout", times=2
    )
    assert lab.power("start", made.vmid).state == "RUNNING"
    assert not [name for name in lab.pve.counted if name.endswith("/log")]


def test_a_worker_that_died_is_told_with_the_end_of_its_log(lab: Lab) -> None:
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.next_task("qmstart", "killed")
    log(lab, "received interrupt")
    with pytest.raises(AgentlabError, match=r"died \(unexpected status\).*Its log ends: received interrupt"):
        lab.power("start", made.vmid)
