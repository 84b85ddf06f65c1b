# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line against a daemon that answers as the test says: the seed's texts, tables, --json, exit statuses,
the terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states

from support import cli_page
from support.cli import PYTHON, ROOT, StandIn, agentlab, environment, on_terminal, outcome, sandbox, start

REFUSED = "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use --force to bypass"


# ---- the seed, to the letter ----


def test_destroy_refused_and_forced(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/destroy"] = lambda it: (
        (200, {**sandbox(1009, "DESTROYED"), "previous_state": "TIMEOUT"})
        if it.asked[-1][2]["force"]
        else (409, {"error": REFUSED, "code": "state_conflict", "state": "TIMEOUT"})
    )
    refused = agentlab("sandbox", "destroy", 1009, socket=daemon.path)
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", f"Error: {REFUSED}\n")
    forced = agentlab("sandbox", "destroy", "--force", 1009, socket=daemon.path)
    assert (forced.returncode, forced.stdout, forced.stderr) == (0, "sandbox 1009 destroyed (state=TIMEOUT)\n", "")
    behind = agentlab("sandbox", "destroy", 1009, "--force", socket=daemon.path)
    assert (behind.returncode, behind.stdout, behind.stderr) == (0, "sandbox 1009 destroyed (state=TIMEOUT)\n", "")


def test_prune(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/prune"] = (200, {"count": 5})
    found = agentlab("sandbox", "prune", socket=daemon.path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "pruned 5 sandbox(es)\n", "")
    assert daemon.posted() == [("/v1/sandboxes/prune", None)], "no body, as in the seed"


def test_renewal_without_a_ttl_says_how(daemon: StandIn) -> None:
    for args in ([1009], [], ["--json", 1009]):
        found = agentlab("sandbox", "lease", "renew", *args, socket=daemon.path)
        assert found.returncode == 2
        assert (found.stdout == "") is ("--json" not in args)
        assert found.stderr == (
            "Usage: agentlab sandbox lease renew --ttl <ttl> <vmid>\n"
            "Note: Flags must come before vmid argument (e.g., --ttl 120 1009)\n"
            "ttl is required. Flags must come before vmid (e.g., --ttl 120 1009)\n"
        )
    assert daemon.asked == []


def test_renewal(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/lease/renew"] = (
        200,
        {"vmid": 1009, "lease_expires_at": "2026-01-30T03:45:00Z"},
    )
    for args in (["--ttl", "240", "1009"], ["1009", "--ttl", "240"], ["1009", "--ttl=240"]):
        found = agentlab("sandbox", "lease", "renew", *args, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (
            0,
            "sandbox 1009 lease renewed until 2026-01-30T03:45:00Z\n",
            "",
        )
    assert {json.dumps(body) for _target, body in daemon.posted()} == {'{"ttl_minutes": 240}'}
    agentlab("sandbox", "lease", "renew", "--ttl", "1d12h", "1009", socket=daemon.path)
    assert daemon.posted()[-1][1] == {"ttl": "1d12h"}


def test_renewal_refused(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/lease/renew"] = (
        409,
        {"error": "cannot renew lease in TIMEOUT state. Valid states: RUNNING"},
    )
    found = agentlab("sandbox", "lease", "renew", "--ttl", "120", "1009", socket=daemon.path)
    assert (found.returncode, found.stdout, found.stderr) == (
        1,
        "",
        "Error: cannot renew lease in TIMEOUT state. Valid states: RUNNING\n",
    )


def test_a_capped_renewal_says_so(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/lease/renew"] = (
        200,
        {"vmid": 1009, "lease_expires_at": "2026-01-30T03:45:00Z", "capped": True},
    )
    found = agentlab("sandbox", "lease", "renew", "--ttl", "9d", "1009", socket=daemon.path)
    assert found.stdout == "sandbox 1009 lease renewed until 2026-01-30T03:45:00Z\n"
    assert "maximum lifetime" in found.stderr
    assert found.returncode == 0


def test_a_renewal_that_changes_nothing_says_so(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/1009/lease/renew"] = (
        200,
        {"vmid": 1009, "lease_expires_at": "2026-01-30T03:45:00Z", "changed": False},
    )
    found = agentlab("sandbox", "lease", "renew", "--ttl", "1m", "1009", socket=daemon.path)
    assert (found.returncode, found.stdout) == (0, "sandbox 1009 lease lasts until 2026-01-30T03:45:00Z\n")
    assert found.stderr == "Note: unchanged, because it lasts that long already; --allow-shorten lets it end sooner\n"


def test_not_found(daemon: StandIn) -> None:
    for name in ("show", "start", "stop", "suspend", "events", "destroy"):
        method, target = (
            ("GET", "") if name == "show" else ("GET", "/events") if name == "events" else ("POST", f"/{name}")
        )
        daemon.replies[method, f"/v1/sandboxes/4711{target}"] = (
            404,
            {"error": "sandbox not found", "code": "not_found"},
        )
        found = agentlab("sandbox", name, 4711, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (1, "", "Error: sandbox not found\n"), name


# ---- several at once ----


def bulk(daemon: StandIn, status: int, *results: dict[str, Any]) -> None:
    daemon.replies["POST", "/v1/sandboxes/destroy"] = (
        status,
        {"results": list(results), "failed_count": sum(1 for one in results if one["failed"])},
    )


def test_bulk_destroy_prints_one_line_an_item(daemon: StandIn) -> None:
    bulk(
        daemon,
        200,
        outcome(1009, "destroyed"),
        outcome(1010, "destroyed", previous="RUNNING"),
        outcome(1011, "destroyed", previous="STOPPED"),
    )
    found = agentlab("sandbox", "destroy", "--force", 1009, 1010, 1011, 1010, socket=daemon.path)
    assert found.stdout == (
        "sandbox 1009 destroyed (state=TIMEOUT)\nsandbox 1010 destroyed (state=RUNNING)\nsandbox 1011 destroyed "
        "(state=STOPPED)\n"
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert daemon.asked == [("POST", "/v1/sandboxes/destroy", {"vmids": [1009, 1010, 1011], "force": True})]


def test_bulk_destroy_that_is_mixed(daemon: StandIn) -> None:
    bulk(
        daemon,
        207,
        outcome(1009, "destroyed"),
        outcome(1010, "failed", state="RUNNING", message=REFUSED.replace("TIMEOUT", "RUNNING")),
        outcome(1011, "failed", state="TIMEOUT", message="sandbox 1011 is protected"),
    )
    found = agentlab("sandbox", "destroy", 1009, 1010, 1011, socket=daemon.path)
    assert found.stdout == "sandbox 1009 destroyed (state=TIMEOUT)\n"
    assert found.stderr == (
        f"Error: sandbox 1010: {REFUSED.replace('TIMEOUT', 'RUNNING')}\nError: sandbox 1011 is protected\n"
    )
    assert found.returncode == 4
    told = agentlab("sandbox", "destroy", 1009, 1010, 1011, "--json", socket=daemon.path)
    assert [one["vmid"] for one in json.loads(told.stdout)["results"]] == [1009, 1010, 1011]
    assert told.returncode == 4


def test_bulk_destroy_of_which_nothing_succeeds(daemon: StandIn) -> None:
    bulk(daemon, 207, *(outcome(vmid, "failed", state="RUNNING", message=REFUSED) for vmid in (1009, 1010)))
    found = agentlab("sandbox", "destroy", 1009, 1010, socket=daemon.path)
    assert (found.returncode, found.stdout) == (1, "")
    assert len(found.stderr.splitlines()) == 2


def test_a_failure_names_its_sandbox_also_where_its_number_is_part_of_a_path(daemon: StandIn) -> None:
    bulk(
        daemon,
        207,
        *(
            outcome(
                vmid, "failed", state="RUNNING", message=f"POST /nodes/pve1/qemu/{vmid}/status/stop: 500 got timeout"
            )
            for vmid in (5, 1005)
        ),
    )
    found = agentlab("sandbox", "destroy", "--force", 1005, 1006, socket=daemon.path)
    assert found.stderr.splitlines() == [
        f"Error: sandbox {vmid}: POST /nodes/pve1/qemu/{vmid}/status/stop: 500 got timeout" for vmid in (5, 1005)
    ]


def test_prune_tells_what_is_kept_beside_the_answer(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/prune"] = (
        200,
        {
            "count": 1,
            "pruned": [outcome(1001, "destroyed")],
            "kept": [
                outcome(
                    1002, "kept", state="TIMEOUT", reason="too_young", message="in TIMEOUT for 2h, not longer than 1d"
                )
            ],
            "failed": [],
        },
    )
    found = agentlab("sandbox", "prune", "--older-than", "24h", socket=daemon.path)
    assert (found.returncode, found.stdout) == (0, "pruned 1 sandbox(es)\n")
    assert found.stderr == "kept 1002: too_young - in TIMEOUT for 2h, not longer than 1d\n"
    assert daemon.posted() == [("/v1/sandboxes/prune", {"older_than": "24h"})]


def test_prune_with_failures(daemon: StandIn) -> None:
    failed = [outcome(1003, "failed", state="TIMEOUT", message="the storage is full")]
    for pruned, status in (([outcome(1001, "destroyed")], 4), ([], 1)):
        daemon.replies["POST", "/v1/sandboxes/prune"] = (
            207,
            {"count": len(pruned), "pruned": pruned, "kept": [], "failed": failed},
        )
        found = agentlab("sandbox", "prune", socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (
            status,
            f"pruned {len(pruned)} sandbox(es)\n",
            "Error: sandbox 1003: the storage is full\n",
        )


def test_dry_run_shows_what_would_go_and_why_the_rest_stays(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/prune"] = (
        200,
        {
            "count": 1,
            "pruned": [outcome(1001, "would_prune", reason="vm_absent", message="the list has no VM 1001")],
            "kept": [outcome(1002, "kept", state="TIMEOUT", reason="protected", message="sandbox 1002 is protected")],
            "failed": [],
        },
    )
    found = agentlab("sandbox", "prune", "--dry-run", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines()[0] == "would prune 1 sandbox(es)"
    assert re.search(r"prune +1001 +agent-1001 +TIMEOUT +vm_absent - the list has no VM 1001", found.stdout)
    assert re.search(r"keep +1002 +agent-1002 +TIMEOUT +protected - ", found.stdout)
    assert daemon.posted() == [("/v1/sandboxes/prune", {"dry_run": True})]


def test_a_guard_of_zero_is_a_guard(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes/prune"] = (
        409,
        {"error": "max_count: 3 sandbox(es) would be pruned, more than max_count=0; nothing was pruned"},
    )
    found = agentlab("sandbox", "prune", "--max-count", "0", "--state", "failed", "--tag", "ci", socket=daemon.path)
    assert daemon.posted() == [("/v1/sandboxes/prune", {"max_count": 0, "states": ["FAILED"], "tags": ["ci"]})]
    assert (found.returncode, found.stdout) == (1, "")


# ---- tables for people, answers for programs ----


def test_list(daemon: StandIn) -> None:
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


def test_list_by_state(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes?state=TIMEOUT&state=STOPPED"] = (200, {"sandboxes": []})
    found = agentlab("sandbox", "list", "--state", "timeout", "--state", "STOPPED", socket=daemon.path)
    assert (found.returncode, found.stdout) == (0, "no sandboxes\n")
    wrong = agentlab("sandbox", "list", "--state", "DEAD", socket=daemon.path)
    assert wrong.returncode == 2
    for state in states.STATES:
        assert state in wrong.stderr, "the states offered are those of the rules"


def test_show(daemon: StandIn) -> None:
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


def test_reconcile(daemon: StandIn) -> None:
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


def test_new_sends_every_option(daemon: StandIn, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ssh-ed25519 AAAA a@b\n\n# mine\nssh-rsa BBBB c@d\n")
    (tmp_path / "data").write_text("#cloud-config\n")
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    found = agentlab(
        "sandbox",
        "new",
        "--name",
        "agent-1",
        "--profile",
        "p",
        "--template",
        "9000",
        "--vmid",
        1000,
        "--ttl",
        "2h",
        "--keepalive",
        "--workspace",
        "w-1",
        "--node",
        "pve1",
        "--pool",
        "a",
        "--storage",
        "s",
        "--full-clone",
        "--cores",
        4,
        "--memory",
        8192,
        "--disk-size",
        "+10G",
        "--bridge",
        "vmbr1",
        "--no-firewall",
        "--ip-config",
        "ip=dhcp",
        "--nameserver",
        "192.0.2.1",
        "--ssh-public-keys",
        tmp_path / "keys",
        "--ssh-public-keys",
        "-",
        "--cloud-init-user-data",
        tmp_path / "data",
        "--tag",
        "a",
        "--tag",
        "b",
        "--protected",
        "--wait-for-ip",
        "--wait-for-cloud-init",
        socket=daemon.path,
        stdin="ssh-rsa CCCC\n",
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert (
        found.stdout
        == "sandbox 1000 created (name=agent-1000, state=RUNNING, ip=192.0.2.10, lease until 2126-01-30T02:45:00Z)\n"
    )
    assert daemon.posted() == [
        (
            "/v1/sandboxes",
            {
                "name": "agent-1",
                "profile": "p",
                "template": "9000",
                "vmid": 1000,
                "ttl": "2h",
                "keepalive": True,
                "workspace_id": "w-1",
                "node": "pve1",
                "pool": "a",
                "storage": "s",
                "full_clone": True,
                "cores": 4,
                "memory": 8192,
                "disk_size": "+10G",
                "bridge": "vmbr1",
                "firewall": False,
                "ip_config": "ip=dhcp",
                "nameserver": "192.0.2.1",
                "ssh_public_keys": ["ssh-ed25519 AAAA a@b", "ssh-rsa BBBB c@d", "ssh-rsa CCCC"],
                "cloud_init_user_data": "#cloud-config\n",
                "tags": ["a", "b"],
                "protected": True,
                "wait_for_ip": True,
                "wait_for_cloud_init": True,
            },
        )
    ]
    agentlab("sandbox", "new", "--ttl", "120", socket=daemon.path)
    assert daemon.posted()[-1][1] == {"ttl_minutes": 120}, "what is not given is not sent"


@pytest.mark.parametrize("text", ["", "\n \n", "# none yet\n"])
def test_a_key_file_without_a_key_is_refused(daemon: StandIn, tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    refused = agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path)
    assert refused.returncode == 2 and "holds no key" in refused.stderr and daemon.posted() == []


def test_a_key_file_with_many_keys_is_sent_key_by_key(daemon: StandIn, tmp_path: Path) -> None:
    """One text of the list may have 10,000 characters; a file of keys has more than that soon."""
    (tmp_path / "keys").write_text("".join(f"ssh-rsa {'A' * 370} key-{number}\n" for number in range(60)))
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    assert agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path).returncode == 0
    assert len(daemon.posted()[-1][1]["ssh_public_keys"]) == 60


def test_power(daemon: StandIn) -> None:
    for name, state in (("start", "RUNNING"), ("stop", "STOPPED"), ("suspend", "SUSPENDED")):
        daemon.replies["POST", f"/v1/sandboxes/1000/{name}"] = (200, sandbox(1000, state))
        found = agentlab("sandbox", name, 1000, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (0, f"sandbox 1000 is {state}\n", "")
    for name in ("start", "resume"):
        daemon.replies["POST", f"/v1/sandboxes/1000/{name}"] = (200, sandbox(1000, "RUNNING"))
        waited = agentlab("sandbox", name, "--wait-for-ip", 1000, socket=daemon.path)
        assert (waited.returncode, waited.stdout) == (0, f"sandbox 1000 is RUNNING at {sandbox(1000)['ip']}\n")
        assert daemon.posted()[-1] == (f"/v1/sandboxes/1000/{name}", {"wait_for_ip": True})


# ---- events ----


def event(number: int, operation: str, before: str | None, after: str | None) -> dict[str, Any]:
    return {
        "id": number,
        "at": "2026-01-30T00:45:07Z",
        "sandbox_uuid": "u",
        "vmid": 1000,
        "from_state": before,
        "to_state": after,
        "operation": operation,
        "actor": "alice",
        "reason": None,
        "evidence": {},
        "upids": [],
        "duration_ms": 5,
        "outcome": "ok",
    }


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


# ---- no usable answer ----


def check_unreachable(found: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr.startswith("Error: ")
    assert "Traceback" not in found.stderr
    for part in parts:
        assert part in found.stderr


def test_daemon_not_running(short_path: Path) -> None:
    what_to_do = ("systemctl status agentlabd", "systemctl start agentlabd", "journalctl -u agentlabd")
    check_unreachable(
        agentlab("sandbox", "list", socket=short_path / "none.sock"),
        "the daemon is not running: there is no socket",
        *what_to_do,
    )
    stand_in = StandIn(short_path / "d.sock").__enter__()
    (short_path / "d.sock").rename(short_path / "left.sock")
    stand_in.__exit__()
    check_unreachable(
        agentlab("sandbox", "list", socket=short_path / "left.sock"),
        "the daemon is not running: nothing listens",
        *what_to_do,
    )


def test_the_option_wins_over_the_environment(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": []})
    for args in (["--socket", daemon.path, "sandbox", "list"], ["sandbox", "list", "--socket", daemon.path]):
        assert agentlab(*args, socket="/nonexistent").returncode == 0
    check_unreachable(agentlab("status", env={"AGENTLAB_SOCKET": ""}), "/run/agentlab/agentlabd.sock")


def test_socket_not_permitted(daemon: StandIn, short_path: Path) -> None:
    """Asked by another user, as the mode of the socket is meant to refuse."""
    if os.geteuid() != 0:
        daemon.path.chmod(0o000)
        found = agentlab("sandbox", "list", socket=daemon.path)
    else:
        # The checkout may lie where that user may not look: the code is copied.
        short_path.chmod(0o755)
        daemon.path.chmod(0o660)
        shutil.copytree(ROOT / "roles/agentlabd/files/agentlab_cli", short_path / "agentlab_cli")
        code = (
            "import os, sys, agentlab_cli.app as app, http.client; import agentlab_cli.text, agentlab_cli.client, "
            "encodings.idna; os.setgroups([]); os.setgid(65534); os.setuid(65534); app.main()"
        )
        found = subprocess.run(
            [PYTHON, "-c", code, "sandbox", "list"],
            capture_output=True,
            text=True,
            check=False,
            env={**environment(daemon.path), "PYTHONPATH": str(short_path)},
        )
    check_unreachable(found, "may not use the socket", "sudo usermod -aG agentlab", "log in again")
    assert daemon.asked == []


def test_path_that_cannot_be_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_unreachable(agentlab("status", socket=tmp_path / "file"), "is not a socket", "--socket")
    check_unreachable(agentlab("status", socket=tmp_path / "file" / "d.sock"), "there is no socket")
    check_unreachable(agentlab("status", socket=f"/{'x' * 200}"), "cannot be the path of a socket")


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((200, b"<html>hello</html>"), "makes no sense"),
        ((200, b""), "makes no sense"),
        ((200, b"[]"), "makes no sense"),
        ((502, b"Bad Gateway"), "makes no sense"),
        ((500, {"detail": "x"}), "makes no sense"),
        ((0, b""), "ended the connection"),
        ((0, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"), "ended the connection"),
        ((0, b"SSH-2.0-OpenSSH_9.2\r\n"), "does not speak HTTP"),
        ((404, b"404: Not Found"), "does not know GET /v1/sandboxes"),
        ((200, {"sandboxes": [{"vmid": 1}]}), "different versions"),
        (
            (503, {"error": "agentlabd is stopping; ask again when it runs", "code": "stopping"}),
            "Error: agentlabd is stopping; ask again when it runs\n",
        ),
    ],
)
def test_answers_of_no_use(daemon: StandIn, reply: Any, part: str) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = reply
    check_unreachable(agentlab("sandbox", "list", socket=daemon.path), part)


def test_daemon_of_another_release(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/status"] = (200, {"version": "0.9.0"})
    check_unreachable(
        agentlab("profile", "list", socket=daemon.path),
        "the daemon (version 0.9.0) does not know GET /v1/profiles",
        "Upgrade the older",
    )


def test_time_out(daemon: StandIn) -> None:
    over = threading.Event()

    def slow(_it: StandIn) -> tuple[int, Any]:
        over.wait(60)
        return 200, {}

    daemon.replies["POST", "/v1/sandboxes/1000/stop"] = slow
    # It ends while the daemon is still at it: here it is waited for no longer than half of that.
    found = agentlab("--timeout", "1", "sandbox", "stop", 1000, socket=daemon.path)
    over.set()
    check_unreachable(found, "did not answer within 1s (--timeout)", "goes on")
    for wrong in ("-1", "1x", "", "1.5.5", "1h1d", "ms"):
        found = agentlab("--timeout", wrong, "status", socket=daemon.path)
        assert found.returncode == 2
        assert (
            "is not a time to wait. Valid: seconds as a number (30), or a duration such as 90s, 30m, 2h" in found.stderr
        )
    for right in ("90s", "1h30m", "2d", "0", "1.5", "1500ms", "1.5h"):
        assert "is not a time" not in agentlab("--timeout", right, "status", socket=daemon.path).stderr


# ---- usage ----


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["sandbox", "show", "abc"], "'abc' is not a VMID. Valid: a number from 100 to 999999999"),
        (["sandbox", "show", "99"], "'99' is not a VMID"),
        (["sandbox", "show", "１０００"], "is not a VMID"),
        (["sandbox", "show"], "Missing argument '<vmid>'"),
        (["sandbox", "destroy"], "Missing argument"),
        (["sandbox", "destroy", "--forse", "1009"], "No such option"),
        (["sandbox", "lease", "renew", "--ttl", "120"], "<vmid> is missing"),
        (["sandbox", "lst"], "there is no command 'lst'. Did you mean list?"),
        (["sandboxes"], "there is no command 'sandboxes'. Did you mean sandbox?"),
        (["xyzzy"], "there is no command 'xyzzy'. Commands: sandbox, "),
        # What belongs behind sandbox is told as the whole line.
        (["ls"], "there is no command 'ls'. Use: agentlab sandbox list"),
        (["stop", "1009"], "there is no command 'stop'. Use: agentlab sandbox stop"),
        (["pause", "1009"], "Use: agentlab sandbox suspend"),
        (["rm", "1009"], "there is no command 'rm'. Use: agentlab sandbox destroy <vmid>"),
        (["sandbox", "restart", "1009"], "Use: agentlab sandbox stop <vmid>, then agentlab sandbox start <vmid>"),
        (["sandbox", "shutdown", "1009"], "Use: agentlab sandbox stop <vmid>"),
        (["sandbox", "renew", "1009"], "Use: agentlab sandbox lease renew --ttl <ttl> <vmid>"),
        (["sandbox", "console", "1009"], "Use: agentlab sandbox exec <vmid> -- <command>, or agentlab sandbox ssh"),
        (["exec", "1009"], "there is no command 'exec'. Use: agentlab sandbox exec"),
        (["profile", "show", "x"], "Use: agentlab profile list"),
        # Nor to what takes the protection away.
        (["sandbox", "inprotect", "1009"], "there is no command 'inprotect'. Did you mean protect?"),
        # No likeness leads to what destroys.
        (["sandbox", "prun"], "there is no command 'prun'. Commands: list, "),
        (["sandbox", "destry"], "there is no command 'destry'. Commands: list, "),
        (["sandbox", "rm", "1009"], "there is no command 'rm'. Use: agentlab sandbox destroy <vmid>"),
        (["workspace", "rm", "w1"], "Use: agentlab workspace destroy --force <workspace>"),
        (["sandbox", "stop"], "which sandbox? Give <vmid>, or --all"),
        (["sandbox", "stop", "--all", "1009"], "which sandbox? Give <vmid>, or --all"),
        (["workspace", "attach", "w1"], "which sandbox? Give <vmid> once"),
        (["workspace", "attach", "--vmid", "1000", "w1", "1001"], "which sandbox? Give <vmid> once"),
        (["workspace", "new", "--size", "1G"], "which workspace? Give its name once"),
        (["help", "nothing"], "there is no command 'nothing'"),
        (["cleanup", "freeze"], "--reason"),
        (["completion", "csh"], "csh"),
    ],
)
def test_wrong_usage(daemon: StandIn, args: list[str], part: str) -> None:
    found = agentlab(*args, socket=daemon.path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert part in found.stderr
    assert "Error: " in found.stderr
    assert "Usage: agentlab" in found.stderr
    assert daemon.asked == []


def test_a_group_without_a_command_shows_its_help() -> None:
    for args in ([], ["sandbox"], ["sandbox", "lease"], ["cleanup"]):
        found = agentlab(*args)
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr.startswith("Usage: agentlab ")
        assert "Commands:" in found.stderr


def test_version() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "galaxy.yml").read_text(), re.M)
    assert version is not None
    assert agentlab("--version").stdout == f"agentlab {version[1]}\n"


def test_it_imports_neither_core_nor_daemon_and_little_to_start() -> None:
    code = "import sys; sys.argv = ['agentlab', '--version']; import agentlab_cli.app as app; app.root.main(standalone_mode=False); print(*sorted(sys.modules))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    loaded = set(found.stdout.split())
    assert not {
        name
        for name in loaded
        if name.partition(".")[0] in ("agentlab_core", "agentlabd", "ansible", "ansible_collections")
    }
    assert not loaded & {"http.client", "ssl", "tabulate", "email", "asyncio"}
    for path in (ROOT / "roles/agentlabd/files/agentlab_cli").glob("*.py"):
        assert not re.search(r"^\s*(from|import) +(agentlab_core|agentlabd|ansible)", path.read_text(), re.M), path


def test_no_usage_line_names_its_options_twice() -> None:
    assert "[OPTIONS] [OPTIONS]" not in cli_page.written()


def test_the_manual_says_what_help_says() -> None:
    assert cli_page.written() == cli_page.reference(), "run: .venv/bin/python tests/support/cli_page.py"


def test_the_manual_lists_the_statuses() -> None:
    table = cli_page.PAGE.read_text().split("<!-- statuses -->")[1].split("<!-- /statuses -->")[0]
    told = {int(number) for number in re.findall(r"^\| (\d+) \|", table, re.M)}
    source = (ROOT / "roles/agentlabd/files/agentlab_cli/errors.py").read_text()
    assert told == {0, *(int(number) for number in re.findall(r"^[A-Z]+ = (\d+)$", source, re.M))}


@pytest.mark.skipif("AGENTLAB_TEST_CLI_LIBRARIES" not in os.environ, reason="runs with the libraries of .venv")
def test_it_really_runs_with_the_libraries_given() -> None:
    libraries = os.environ["AGENTLAB_TEST_CLI_LIBRARIES"]
    code = "import click; print(click.__file__)"
    printed = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    assert printed.stdout.startswith(libraries)


# ---- status, cleanup, profiles ----


STATUS = {
    "version": "1.0.0",
    "started_at": "2026-01-30T00:00:00Z",
    "uptime_seconds": 93784,
    "database": {
        "path": "/var/lib/agentlab/agentlab.db",
        "schema": 2,
        "by_state": {"RUNNING": 3, "TIMEOUT": 1, "STOPPED": 0},
    },
    "proxmox": {"where": "https://pve1:8006", "reachable": True, "last_error": None, "requests": 10},
    "expiry": {"last_run": "2026-01-31T02:03:00Z", "next_run": "2026-01-31T02:04:00Z", "last_error": None},
    "reconcile": {"last_run": None, "next_run": "2026-01-31T02:15:00Z", "last_error": None},
    "cleanup": {
        "enabled": True,
        "mode": "enforce",
        "last_run": "2026-01-31T02:00:00Z",
        "next_run": "2026-01-31T02:15:00Z",
        "last_result": {"result": "shadow", "count": 3, "kept": 2, "failed": 0},
        "frozen": None,
    },
    "operations": {"in_progress": 1, "interrupted": 0},
    "config": {"path": "/etc/agentlab/config.yaml", "loaded_at": "2026-01-30T00:00:00Z", "error": None},
}


def test_status(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/status"] = (200, STATUS)
    found = agentlab("status", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "agentlabd 1.0.0, up 1d2h (since 2026-01-30T00:00:00Z)" in found.stdout
    assert "RUNNING=3, TIMEOUT=1\n" in found.stdout
    assert "https://pve1:8006: reachable" in found.stdout
    assert "last never, next 2026-01-31T02:15:00Z" in found.stdout
    assert "next 2026-01-31T02:15:00Z; would have cleaned up 3 sandbox(es), kept 2\n" in found.stdout
    assert "FROZEN" not in found.stdout
    daemon.replies["GET", "/v1/status"] = (
        200,
        {
            **STATUS,
            "proxmox": {**STATUS["proxmox"], "reachable": False, "last_error": "Connection refused"},  # type: ignore[dict-item]
            "cleanup": {
                **STATUS["cleanup"],
                "frozen": {"reason": "guard: 60 of 80", "at": "2026-01-31T02:00:00Z", "actor": "daemon"},
            },  # type: ignore[dict-item]
            "config": {**STATUS["config"], "error": "line 3: unknown key"},
        },
    )  # type: ignore[dict-item]
    found = agentlab("status", socket=daemon.path)
    assert "NOT reachable: Connection refused" in found.stdout
    assert (
        "FROZEN since 2026-01-31T02:00:00Z by daemon: guard: 60 of 80" in found.stdout
        and "agentlab cleanup run --dry-run" in found.stdout
    )
    assert "agentlab cleanup release" in found.stdout
    assert "line 3: unknown key" in found.stdout


def test_doctor(daemon: StandIn, tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "status": "warning",
        "problems": 0,
        "pveum": ["pveum role add AgentlabRun"],
        "bundle": None,
        "findings": [
            {"check": "database", "status": "ok", "meaning": "it is whole", "advice": "nothing", "facts": {}},
            {
                "check": "privileges",
                "status": "warning",
                "meaning": "more\x1b[31m than needed",
                "advice": "make another token",
                "facts": {},
            },
        ],
    }
    daemon.replies["GET", "/v1/doctor"] = (200, report)
    found = agentlab("doctor", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == (
        "ok       database    it is whole\nwarning  privileges  more\\x1b[31m than needed\n                     -> "
        "make another token\n\nA token with the least privileges, made as root on a node:\n  pveum role add "
        "AgentlabRun\n"
    )
    daemon.replies["GET", "/v1/doctor?template=9000&bundle=true&bundle_hosts=true"] = (
        200,
        {**report, "problems": 2, "bundle": {"a": 1}},
    )
    file = tmp_path / "bundle.json"
    found = agentlab("doctor", "--template", "9000", "--bundle", file, "--bundle-hosts", socket=daemon.path)
    assert found.returncode == 1 and json.loads(file.read_text()) == {"a": 1}, found
    daemon.replies["GET", "/v1/doctor?bundle=true"] = (200, {**report, "bundle": {"a": 1}})
    found = agentlab("doctor", "--bundle", tmp_path / "none" / "x", socket=daemon.path)
    assert (
        found.returncode == 1
        and "No such file or directory; give a file in a folder that you may write to" in found.stderr
    )
    assert agentlab("doctor", "--bundle-hosts", socket=daemon.path).returncode == 2


def test_freeze_and_release(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/cleanup/freeze"] = (200, {"frozen": {"reason": "maintenance"}})
    daemon.replies["POST", "/v1/cleanup/release"] = (200, {"frozen": None, "released": {"reason": "maintenance"}})
    assert (
        agentlab("cleanup", "freeze", "--reason", "maintenance", socket=daemon.path).stdout
        == "cleanup frozen: maintenance\n"
    )
    assert agentlab("cleanup", "release", socket=daemon.path).stdout == "cleanup released\n"
    assert daemon.posted() == [("/v1/cleanup/freeze", {"reason": "maintenance"}), ("/v1/cleanup/release", None)]
    daemon.replies["POST", "/v1/cleanup/release"] = (200, {"frozen": None, "released": None})
    assert agentlab("cleanup", "release", socket=daemon.path).stdout == "cleanup was not frozen\n"


def test_profiles(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/profiles"] = (
        200,
        {
            "profiles": [
                {
                    "name": "yolo-ephemeral",
                    "template": "debian-13",
                    "cores": 4,
                    "lease_default": "2h",
                    "description": None,
                }
            ]
        },
    )
    head, row = agentlab("profile", "list", socket=daemon.path).stdout.splitlines()
    assert head.split() == ["NAME", "TEMPLATE", "CORES", "LEASE", "DEFAULT"]
    assert row.split() == ["yolo-ephemeral", "debian-13", "4", "2h"]


# ---- on a terminal ----


def slow_bulk(daemon: StandIn) -> None:
    """A destroy of three, one after the other, within two seconds and a half."""
    left = [1009, 1010, 1011]

    def work(_it: StandIn) -> tuple[int, Any]:
        for _step in range(3):
            time.sleep(0.6)
            left.pop()
        return 200, {"results": [outcome(vmid, "destroyed") for vmid in (1009, 1010, 1011)]}

    daemon.replies["POST", "/v1/sandboxes/destroy"] = work
    daemon.replies["GET", "/v1/sandboxes"] = lambda _it: (
        200,
        {"sandboxes": [sandbox(vmid, "TIMEOUT") for vmid in left]},
    )


def test_progress_on_a_terminal_and_none_in_a_pipe(daemon: StandIn) -> None:
    answer = "".join(f"sandbox {vmid} destroyed (state=TIMEOUT)\n" for vmid in (1009, 1010, 1011))
    args = ("sandbox", "destroy", "--force", 1009, 1010, 1011)
    slow_bulk(daemon)
    status, shown = on_terminal(*args, socket=daemon.path)
    assert status == 0
    assert re.search(r"\rdestroying: [012] of 3 done \(\d+s\)\x1b\[K", shown)
    assert shown.endswith("\r\x1b[K" + answer.replace("\n", "\r\n")), "the progress is gone when the answer comes"
    daemon.asked.clear()
    slow_bulk(daemon)
    found = agentlab(*args, socket=daemon.path)
    assert (found.stdout, found.stderr) == (answer, "")
    assert [one[0] for one in daemon.asked] == ["POST"], "nothing is asked for in between either"
    slow_bulk(daemon)
    status, shown = on_terminal(*args, "--json", socket=daemon.path)
    assert "destroying" not in shown
    slow_bulk(daemon)
    status, shown = on_terminal(*args, socket=daemon.path, env={"TERM": "dumb"})
    assert shown == answer.replace("\n", "\r\n")


def test_progress_that_cannot_be_looked_up_is_none(daemon: StandIn) -> None:
    slow_bulk(daemon)
    daemon.replies["GET", "/v1/sandboxes"] = (500, {"error": "database: disk I/O error", "code": "store"})
    status, shown = on_terminal("sandbox", "destroy", "--force", 1009, 1010, 1011, socket=daemon.path)
    assert status == 0 and "Traceback" not in shown and "Exception" not in shown
    assert ("GET", "/v1/sandboxes") in [one[:2] for one in daemon.asked], "it was looked up"


NASTY = "x\x1b]0;owned\x07\x9b2J\r\nError: sandbox 1 destroyed\u202e\xad\u2066\U000e0041\udcff"


@pytest.mark.parametrize(
    "words",
    [
        [f"--{NASTY}"],
        [NASTY],
        ["sandbox", NASTY],
        ["sandbox", "list", NASTY],
        ["sandbox", "list", f"--{NASTY}"],
        ["sandbox", "list", f"--json={NASTY}"],
        ["sandbox", "list", "--state", NASTY],
        ["sandbox", "destroy", NASTY],
        ["sandbox", "new", "--memory", NASTY],
        ["sandbox", "new", "--user-data", f"/{NASTY}"],
        ["--timeout", NASTY, "status"],
        ["--socket", f"/{NASTY}", "status"],
        ["completion", NASTY],
        ["help", NASTY],
    ],
    ids=lambda words: " ".join(words).replace(NASTY, "NASTY"),
)
@pytest.mark.parametrize("json_too", [False, True])
def test_an_argument_cannot_control_the_terminal(words: list[str], json_too: bool) -> None:
    told = subprocess.run(
        [os.fsencode(word) for word in (PYTHON, "-m", "agentlab_cli", *(["--json"] if json_too else []), *words)],
        capture_output=True,
        timeout=60,
        env=environment("/nowhere/d.sock", {"PYTHONUTF8": "1"}),
        check=False,
    )
    shown = (told.stdout + told.stderr).decode()
    assert told.returncode in (2, 3) or words[2:3] == ["--user-data"], told
    assert not [char for char in shown if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert "Traceback" not in shown and "\nError: sandbox 1" not in shown, shown


def test_control_c(daemon: StandIn) -> None:
    slow_bulk(daemon)
    status, shown = on_terminal(
        "sandbox", "destroy", "--force", 1009, 1010, 1011, socket=daemon.path, press=("destroying", b"\x03")
    )
    assert status == 130
    assert shown.replace("\r\n", "\n").endswith(
        "\x1b[K\nError: interrupted. What the daemon had begun it goes on with; see 'agentlab sandbox list'\n"
    )
    assert "Traceback" not in shown


def test_a_reader_that_leaves_is_no_error(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(vmid) for vmid in range(1000, 4000)]})
    found = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{PYTHON} -m agentlab_cli sandbox list | head -n 1"],
        capture_output=True,
        text=True,
        env=environment(daemon.path),
        check=False,
    )
    assert found.stdout.startswith("VMID")
    assert found.stderr == ""


def test_a_full_disk_behind_standard_output(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000)]})
    with open("/dev/full", "w", encoding="utf-8") as full:
        found = subprocess.run(
            [PYTHON, "-m", "agentlab_cli", "sandbox", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(daemon.path),
            check=False,
        )
    assert (found.returncode, found.stderr) == (
        1,
        "Error: standard output: No space left on device; the daemon has answered\n",
    )


def test_half_a_character_from_elsewhere_is_shown_harmless(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [{**sandbox(1000), "name": "a\ud800"}]})
    found = agentlab("sandbox", "list", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "") and "a\\ud800" in found.stdout


# ---- completion ----


def complete(daemon: StandIn, words: str) -> list[str]:
    found = agentlab(
        socket=daemon.path,
        env={"_AGENTLAB_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )
    assert found.stderr == ""
    return [line.partition(",")[2] for line in found.stdout.splitlines() if line]


def test_completion(daemon: StandIn) -> None:
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
def test_completion_scripts(shell: str, part: str) -> None:
    found = agentlab("completion", shell)
    assert (found.returncode, found.stderr) == (0, "")
    assert part in found.stdout
    assert "_AGENTLAB_COMPLETE" in found.stdout


def test_completion_in_a_real_bash(daemon: StandIn, short_path: Path) -> None:
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


# ---- the words and forms that people type ----


def test_words_of_other_programs_are_understood(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": []})
    daemon.replies["GET", "/v1/sandboxes/1000/events?tail=3"] = (
        200,
        {"events": [event(7, "start", None, "RUNNING")], "last_id": 7},
    )
    daemon.replies["GET", "/v1/workspaces"] = (200, {"workspaces": []})
    for action, state in (("suspend", "SUSPENDED"), ("resume", "RUNNING")):
        daemon.replies["POST", f"/v1/sandboxes/1000/{action}"] = (200, sandbox(1000, state))
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))

    def run(*args: object) -> str:
        found = agentlab(*args, socket=daemon.path)
        assert (found.returncode, found.stderr) == (0, ""), args
        return found.stdout

    assert run("sandbox", "ls") == "no sandboxes\n" and run("workspace", "ls") == "no workspaces\n"
    assert run("sandbox", "pause", 1000) == "sandbox 1000 is SUSPENDED\n"
    assert run("sandbox", "resume", 1000) == "sandbox 1000 is RUNNING\n"
    assert run("sandbox", "create", "--name", "a1").startswith("sandbox 1000 created")
    assert (
        run("logs", 1000, "--tail", 3)
        == run("sandbox", "logs", "--tail", 3, 1000)
        == run("sandbox", "events", "--tail", 3, 1000)
    )
    assert run("version") == run("--version") == run("--version", "--json") and run("version").startswith("agentlab ")
    assert run("help") == run("--help") and run("help", "sandbox", "lease", "renew").startswith(
        "Usage: agentlab sandbox lease renew"
    )


def test_flags_may_have_a_value(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/sandboxes"] = (201, sandbox(1000))
    sent = {
        "--keepalive=true": {"keepalive": True},
        "--keepalive=false": {},
        "--firewall=false": {"firewall": False},
        "--firewall=TRUE": {"firewall": True},
        "--json=true": {},
        # The daemon judges it, with the sentence that modules have.
        "--ttl=1.5h": {"ttl": "1.5h"},
        "--ttl=1.5": {"ttl": "1.5"},
        "--ttl=2x.5": {"ttl": "2x.5"},
    }
    for word, body in sent.items():
        found = agentlab("sandbox", "new", word, socket=daemon.path)
        assert (found.returncode, found.stderr) == (0, ""), word
        assert (daemon.posted()[-1][1] or {}) == body, word
        assert found.stdout.startswith("{") == (word == "--json=true")
    wrong = agentlab("sandbox", "new", "--keepalive=perhaps", socket=daemon.path)
    assert wrong.returncode == 2 and "--keepalive" in wrong.stderr


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("10", "10G"),
        ("10G", "10G"),
        ("10g", "10G"),
        ("10GB", "10G"),
        ("10GiB", "10G"),
        ("512m", "512M"),
        ("1tb", "1T"),
        ("much", "much"),
        ("10.5", "10.5"),
    ],
)
def test_sizes_and_names_of_workspaces(daemon: StandIn, typed: str, sent: str) -> None:
    made = {**workspace("w1"), "outcome": "created"}
    daemon.replies["POST", "/v1/workspaces"] = (201, made)
    for args in (["new", "w1"], ["create", "--name", "w1"], ["create", "--name=w1"]):
        assert agentlab("workspace", *args, "--size", typed, socket=daemon.path).returncode == 0
        assert daemon.posted()[-1][1] == {"name": "w1", "size": sent}


def workspace(name: str) -> dict[str, Any]:
    return {
        "id": "7b1f",
        "name": name,
        "state": "DETACHED",
        "size": 10 * 1024**3,
        "storage": "local-lvm",
        "node": "pve1",
        "volume": "local-lvm:x",
        "owner_vmid": 990000,
        "vmid": None,
        "sandbox": None,
        "sandbox_uuid": None,
        "device": "scsi1",
        "lease_expires_at": None,
        "created_at": "2026-01-30T00:45:00Z",
        "updated_at": "2026-01-30T00:45:00Z",
        "state_changed_at": "2026-01-30T00:45:00Z",
        "reason": None,
        "size_gb": 10,
        "volid": "local-lvm:x",
        "attached_vmid": None,
    }


def test_workspaces_are_attached_and_shown(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/workspaces/w1/attach"] = (200, {**workspace("w1"), "vmid": 1000})
    for args in (["w1", 1000], ["--vmid", 1000, "w1"], ["w1", "--vmid", 1000]):
        found = agentlab("workspace", "attach", *args, socket=daemon.path)
        assert (found.returncode, found.stdout) == (0, "workspace w1 attached to sandbox 1000 as scsi1\n")
        assert daemon.posted()[-1] == ("/v1/workspaces/w1/attach", {"vmid": 1000})
    daemon.replies["GET", "/v1/workspaces/w1"] = daemon.replies["GET", "/v1/workspaces/7b1f"] = (200, workspace("w1"))
    shown = agentlab("workspace", "show", "w1", socket=daemon.path).stdout
    assert re.search(r"^size +10G$", shown, re.M) and "volid" not in shown
    daemon.replies["GET", "/v1/sandboxes/1000"] = (200, sandbox(1000, workspace_id="7b1f"))
    shown = agentlab("sandbox", "show", 1000, socket=daemon.path).stdout
    assert re.search(r"^workspace +w1$", shown, re.M) and re.search(r"^time left +\d+d", shown, re.M)


def test_protection_and_keepalive(daemon: StandIn) -> None:
    for action in ("protect", "unprotect", "keepalive"):
        daemon.replies["POST", f"/v1/sandboxes/1000/{action}"] = (200, {**sandbox(1000), "changed": True})
    for args, said in (
        (["protect"], "is protected"),
        (["unprotect"], "is not protected"),
        (["keepalive", "on"], "has keepalive on"),
        (["keepalive", "off"], "has keepalive off"),
    ):
        found = agentlab("sandbox", *args, 1000, socket=daemon.path)
        assert (found.returncode, found.stdout, found.stderr) == (0, f"sandbox 1000 {said}\n", "")
    assert [body for _target, body in daemon.posted()] == [None, None, {"keepalive": True}, {"keepalive": False}]


def test_stop_all(daemon: StandIn) -> None:
    results = [
        {"vmid": 1000, "name": "a", "profile": None, "state": "STOPPED", "result": "stopped", "error": None},
        {"vmid": 1001, "name": "b", "profile": None, "state": "RUNNING", "result": "failed", "error": "it is locked"},
    ]
    daemon.replies["POST", "/v1/sandboxes/stop_all"] = (
        207,
        {"total": 3, "stopped": 1, "skipped": 1, "failed": 1, "results": results},
    )
    found = agentlab("sandbox", "stop", "--all", socket=daemon.path)
    assert (found.returncode, found.stdout, found.stderr) == (
        4,
        "stopped 1 sandbox(es), 1 did not run\n",
        "Error: sandbox 1001: it is locked\n",
    )


# ---- errors that can be acted upon ----


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


def test_json_is_indented_on_a_terminal_only(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, name="a\u202eb")]})
    status, shown = on_terminal("sandbox", "list", "--json", socket=daemon.path)
    assert status == 0 and '\r\n  "sandboxes": [\r\n' in shown and "\u202e" not in shown and "\\u202e" in shown
    assert len(agentlab("sandbox", "list", "--json", socket=daemon.path).stdout.splitlines()) == 1


def test_a_socket_without_permission_is_the_sentence_about_the_group(daemon: StandIn, short_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may use every socket; tests/daemon/test_cli.py does it as another user")
    os.chmod(daemon.path, 0)
    found = agentlab("--socket", daemon.path, "status")
    assert found.returncode == 3 and "group agentlab" in found.stderr


@pytest.mark.parametrize("option", ["--cloud-init-user-data", "--ssh-public-keys", "--cloud-init-password"])
def test_a_file_without_end_or_of_the_wrong_kind_is_named_with_its_option(
    daemon: StandIn, tmp_path: Path, option: str
) -> None:
    (tmp_path / "large").write_text("x" * 2_000_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        ("/dev/zero", "is larger than"),
        (tmp_path / "large", "is larger than"),
        (tmp_path / "binary", "cannot be read as text"),
    ):
        found = agentlab("sandbox", "new", option, path, socket=daemon.path)
        assert (
            found.returncode in (1, 2)
            and f"{option}: {path} {words}" in found.stderr
            and "Traceback" not in found.stderr
        )
    assert daemon.posted() == []


def test_an_empty_key_file_is_refused(daemon: StandIn, tmp_path: Path) -> None:
    for text in ("", "\n \n", "# only a comment\n"):
        (tmp_path / "keys").write_text(text)
        found = agentlab("sandbox", "new", "--ssh-public-keys", tmp_path / "keys", socket=daemon.path)
        assert found.returncode == 2 and f"--ssh-public-keys: {tmp_path}/keys holds no key" in found.stderr
    assert daemon.posted() == []


def test_the_time_out_is_of_the_whole_answer(daemon: StandIn) -> None:
    """A daemon that sends a byte now and then is not waited for any longer."""
    path = daemon.path.with_name("slow.sock")
    over = threading.Event()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()

        def drip() -> None:
            caller, _address = listening.accept()
            with caller, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
                    if over.wait(0.2):
                        return
                    caller.sendall(bytes([byte]))

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        begun = time.monotonic()
        found = agentlab("--timeout", "1500ms", "sandbox", "list", socket=path)
        took = time.monotonic() - begun
        over.set()
        thread.join(10)
    assert took < 20 and found.returncode == 3 and "did not answer within 1.5s (--timeout)" in found.stderr, (
        found.stderr
    )


def test_names_with_line_feeds_make_no_lines_of_their_own(daemon: StandIn) -> None:
    nasty = "a\nsandbox 1 destroyed\r\u2028b\u202ec\u200fd\x1b[31m"
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, name=nasty)]})
    daemon.replies["POST", "/v1/sandboxes/1000/stop"] = (409, {"error": f"VM 1000 is named {nasty}"})
    bulk(daemon, 207, outcome(1000, "failed", message=nasty), outcome(1001, "failed", message=nasty))
    listed = agentlab("sandbox", "list", socket=daemon.path)
    assert len(listed.stdout.splitlines()) == 2 and not re.search("[\u2028\u202e\u200f\x1b]", listed.stdout)
    refused = agentlab("sandbox", "stop", 1000, socket=daemon.path)
    assert len(refused.stderr.splitlines()) == 1 and not re.search("[\u2028\u202e\u200f\x1b]", refused.stderr)
    assert len(agentlab("sandbox", "destroy", 1000, 1001, socket=daemon.path).stderr.splitlines()) == 2


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


def test_narrow_terminals_lose_columns_before_rows_wrap(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, tags=["nightly"], name="a" * 20)]})
    for columns, missing in ((200, set()), (86, {"TAGS"}), (78, {"TAGS", "NODE"})):
        _status, shown = on_terminal("sandbox", "list", socket=daemon.path, env={"COLUMNS": str(columns)})
        head = shown.splitlines()[0].split()
        assert {"VMID", "NAME", "STATE", "NODE", "IP", "PROFILE", "LEASE", "AGE", "TAGS"} - set(head) == missing, (
            columns,
            shown,
        )
        assert max(map(len, shown.splitlines())) <= columns
    assert "TAGS" in agentlab("sandbox", "list", socket=daemon.path, env={"COLUMNS": "40"}).stdout, (
        "a pipe has no width"
    )


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


def test_names_complete(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/profiles"] = (200, {"profiles": [{"name": "yolo"}, {"name": "dev"}]})
    daemon.replies["GET", "/v1/workspaces"] = (200, {"workspaces": [workspace("project-x")]})
    assert complete(daemon, "agentlab sandbox new --profile y") == ["yolo"]
    assert complete(daemon, "agentlab sandbox new --workspace ") == ["project-x"]
    assert complete(daemon, "agentlab workspace detach p") == ["project-x"]


def test_the_version_loads_no_library() -> None:
    code = "import sys; sys.argv = ['agentlab', '--version']; from agentlab_cli.app import main; main(); print(*sorted(sys.modules))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    assert not set(found.stdout.split()) & {"click", "json", "socket", "agentlab_cli.framework"}


@pytest.mark.parametrize(
    ("args", "unneeded"),
    [
        (["status"], {"agentlab_cli.sandbox", "agentlab_cli.workspace", "agentlab_cli.doctor"}),
        (["sandbox", "list"], {"agentlab_cli.workspace", "agentlab_cli.status", "agentlab_cli.doctor"}),
    ],
)
def test_a_command_loads_what_it_needs(args: list[str], unneeded: set[str]) -> None:
    code = (
        f"import sys; sys.argv = ['agentlab', '--socket', '/nonexistent', *{args!r}]; from agentlab_cli.app import "
        "main\ntry: main()\nexcept SystemExit: pass\nprint(*sorted(sys.modules))"
    )
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=environment(None), check=True)
    loaded = set(found.stdout.split())
    assert not loaded & {*unneeded, "tabulate", "difflib"} and "click" in loaded
