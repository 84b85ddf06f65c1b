# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The fixed sentences of the command line, word for word: destroy, prune, renewal, a sandbox that is not found."""

from __future__ import annotations

import json

from support.cli import StandIn, agentlab, sandbox
from support.cli_answers import REFUSED


def test_destroy_is_refused_by_the_state_and_goes_on_with_force(daemon: StandIn) -> None:
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


def test_prune_says_how_many_it_pruned(daemon: StandIn) -> None:
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


def test_a_renewal_says_the_new_end_of_the_lease(daemon: StandIn) -> None:
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


def test_a_refused_renewal_says_why(daemon: StandIn) -> None:
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


def test_a_vmid_without_a_sandbox_is_not_found(daemon: StandIn) -> None:
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
