# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What lists and single sandboxes look like: tables for people, the API's answer with --json."""

from __future__ import annotations

import re

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states

from support.cli import StandIn, agentlab, on_terminal, sandbox


def test_the_list_is_a_table_with_one_line_a_sandbox(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (
        200,
        {
            "sandboxes": [
                sandbox(1000, tags=["ci", "nightly"], keepalive=True),
                sandbox(1001, "TIMEOUT", name=None, ip=None, lease_expires_at="2026-01-30T01:00:00Z"),
            ]
        },
    )
    found = agentlab("sandbox", "list", socket=daemon.path)
    head, first, second = found.stdout.splitlines()
    assert head.split() == ["VMID", "NAME", "STATE", "NODE", "IP", "PROFILE", "LEASE", "AGE", "TAGS"]
    assert re.fullmatch(
        r"1000 +agent-1000 +RUNNING +pve1 +192\.0\.2\.10 +- +\d+d\S* \(keepalive\) +\d+d\S* +ci, nightly", first
    )
    assert re.fullmatch(r"1001 +- +TIMEOUT +pve1 +- +- +over +\d+d\S* +-", second)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_list_takes_states_and_names_the_valid_ones(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes?state=TIMEOUT&state=STOPPED"] = (200, {"sandboxes": []})
    found = agentlab("sandbox", "list", "--state", "timeout", "--state", "STOPPED", socket=daemon.path)
    assert (found.returncode, found.stdout) == (0, "no sandboxes\n")
    wrong = agentlab("sandbox", "list", "--state", "DEAD", socket=daemon.path)
    assert wrong.returncode == 2
    for state in states.STATES:
        assert state in wrong.stderr, "the states offered are those of the rules"


def test_show_prints_one_field_a_line(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes/1000"] = (200, sandbox(1000))
    found = agentlab("sandbox", "show", 1000, socket=daemon.path)
    assert re.search(r"^lease expires at +2126-01-30T02:45:00Z$", found.stdout, re.M)
    assert re.search(r"^protected +no$", found.stdout, re.M)


def test_json_is_the_answer_of_the_api_to_the_byte(daemon: StandIn) -> None:
    body = b'{"sandboxes":  [],"later":{"a":1.50}}'
    daemon.replies["GET", "/v1/sandboxes"] = (200, body)
    for args in (["--json", "sandbox", "list"], ["sandbox", "list", "--json"], ["sandbox", "--json", "list"]):
        assert agentlab(*args, socket=daemon.path).stdout.encode() == body + b"\n"
    refusal = b'{"error": "sandbox not found", "code": "not_found"}'
    daemon.replies["GET", "/v1/sandboxes/1000"] = (404, refusal)
    found = agentlab("sandbox", "show", 1000, "--json", socket=daemon.path)
    assert (found.returncode, found.stdout.encode(), found.stderr) == (1, refusal + b"\n", "Error: sandbox not found\n")


def test_what_a_guest_says_does_not_steer_the_terminal(daemon: StandIn) -> None:
    nasty = "x\x1b]0;owned\x07\x9b2J\r\nTIMEOUT\u202e"
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, ip=nasty)]})
    daemon.replies["POST", "/v1/sandboxes/1000/stop"] = (409, {"error": nasty})
    for found in (
        agentlab("sandbox", "list", socket=daemon.path),
        agentlab("sandbox", "stop", 1000, socket=daemon.path),
    ):
        assert "owned" in found.stdout + found.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", found.stdout + found.stderr)
    assert len(agentlab("sandbox", "list", socket=daemon.path).stdout.splitlines()) == 2


def test_reconcile_prints_each_difference_with_its_action(daemon: StandIn) -> None:
    drift = {
        "kind": "stopped",
        "action": "FAILED",
        "vmid": 1000,
        "uuid": None,
        "state": "RUNNING",
        "evidence": {"status": "stopped"},
        "applied": False,
        "error": None,
    }
    daemon.replies["POST", "/v1/sandboxes/reconcile"] = lambda it: (
        200,
        {"drift": [{**drift, "applied": it.asked[-1][2]["apply"]}], "count": 1},
    )
    found = agentlab("sandbox", "reconcile", socket=daemon.path)
    assert found.stdout.splitlines()[0] == "1 difference(s); repair with --apply"
    assert re.search(r"1000 +RUNNING +stopped +FAILED +status=stopped", found.stdout)
    found = agentlab("sandbox", "reconcile", "--apply", socket=daemon.path)
    assert found.stdout.splitlines()[0] == "1 difference(s), 1 repaired"
    daemon.replies["POST", "/v1/sandboxes/reconcile"] = (200, {"drift": [], "count": 0})
    assert agentlab("sandbox", "reconcile", socket=daemon.path).stdout == "no drift: the records and Proxmox VE agree\n"
    daemon.replies["POST", "/v1/sandboxes/reconcile"] = (
        200,
        {"drift": [{**drift, "error": "it is locked"}], "count": 1},
    )
    found = agentlab("sandbox", "reconcile", "--apply", socket=daemon.path)
    assert (found.returncode, found.stderr) == (1, "Error: sandbox 1000: it is locked\n")


def test_json_is_indented_on_a_terminal_only(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, name="a\u202eb")]})
    status, shown = on_terminal("sandbox", "list", "--json", socket=daemon.path)
    assert status == 0 and '\r\n  "sandboxes": [\r\n' in shown and "\u202e" not in shown and "\\u202e" in shown
    assert len(agentlab("sandbox", "list", "--json", socket=daemon.path).stdout.splitlines()) == 1
