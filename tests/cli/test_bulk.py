# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands for several sandboxes: one line for each, what is kept beside the answer, the exit status."""

from __future__ import annotations

import json
import re

from support.cli import StandIn, agentlab, outcome
from support.cli_answers import REFUSED, bulk


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


def test_bulk_destroy_that_partly_fails_ends_with_4(daemon: StandIn) -> None:
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


def test_bulk_destroy_that_fails_wholly_ends_with_1(daemon: StandIn) -> None:
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


def test_prune_names_each_failure_on_standard_error(daemon: StandIn) -> None:
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
