# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The events of a sandbox: followed to their end, also over a restart of the daemon."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from support.cli import StandIn, agentlab, start
from support.cli_answers import event


def test_events_are_followed_until_the_sandbox_is_destroyed(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes/1000/events?tail=1"] = (
        200,
        {"events": [event(7, "start", "STOPPED", "RUNNING")], "last_id": 7},
    )
    daemon.replies["GET", "/v1/sandboxes/1000/events?after=7"] = lambda it: (
        (200, {"events": [], "last_id": 7})
        if len(it.asked) < 3
        else (200, {"events": [event(8, "destroy", "RUNNING", "DESTROYED")], "last_id": 8})
    )
    running = start("sandbox", "events", "--follow", "--tail", 1, 1000, socket=daemon.path)
    assert running.stdout is not None
    first = running.stdout.readline()
    assert re.fullmatch(r"2026-01-30T00:45:07Z  start +STOPPED -> RUNNING +ok +alice\n", first)
    out, err = running.communicate(timeout=20)
    assert re.fullmatch(r"2026-01-30T00:45:07Z  destroy +RUNNING -> DESTROYED +ok +alice\n", out)
    assert (running.returncode, err) == (0, "")


def test_following_survives_a_restart_of_the_daemon(short_path: Path) -> None:
    path = short_path / "d.sock"
    with StandIn(
        path,
        {
            ("GET", "/v1/sandboxes/1000/events"): (200, {"events": [event(7, "start", None, "RUNNING")], "last_id": 7}),
            ("GET", "/v1/sandboxes/1000/events?after=7"): (200, {"events": [], "last_id": 7}),
        },
    ):
        running = start("sandbox", "events", "-f", 1000, socket=path)
        assert running.stdout is not None and running.stderr is not None
        running.stdout.readline()
    assert running.stderr.readline() == "the daemon is away; waiting for it\n"
    with StandIn(
        path,
        {
            ("GET", "/v1/sandboxes/1000/events?after=7"): (
                200,
                {"events": [event(8, "stop", "RUNNING", "STOPPED")], "last_id": 8},
            ),
            ("GET", "/v1/sandboxes/1000/events?after=8"): (200, {"events": [], "last_id": 8}),
        },
    ):
        assert "RUNNING -> STOPPED" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _out, err = running.communicate(timeout=20)
    # That is how following ends: it is no error.
    assert (running.returncode, err) == (130, "")


def test_columns_of_events_hold_the_longest_states(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes/1000/events"] = (
        200,
        {
            "last_id": 8,
            "events": [event(7, "create", "PROVISIONING", "DESTROYED"), event(8, "stop", "RUNNING", "STOPPED")],
        },
    )
    first, second = agentlab("sandbox", "events", 1000, socket=daemon.path).stdout.splitlines()
    assert first.index(" ok ") == second.index(" ok ")
