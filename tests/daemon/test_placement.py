# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The choice of a node through the daemon: a dry run by API and command line, and what the metrics count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.cli import agentlab
from support.daemon import free_port


def test_a_dry_run_shows_the_choice_and_the_metrics_count_it(lab: Any, daemon: Callable[..., Any]) -> None:
    lab.pve.nodes["pve2"] = {"online": True}
    lab.pve.maintenance.add("pve2")
    one = daemon(metrics_listen=f"127.0.0.1:{free_port()}")
    before = len(lab.pve.vms)
    planned = one.post("/v1/sandboxes", {"name": "a1", "dry_run": True})
    assert planned.status == 200 and planned.body["outcome"] == "would_create"
    assert {row["node"]: row["reason"] for row in planned.body["placement"]["nodes"]} == {
        "pve1": "chosen",
        "pve2": "maintenance",
    }
    shown = agentlab("sandbox", "new", "--dry-run", "--name", "a1", socket=one.socket)
    assert shown.returncode == 0, shown.stderr
    assert "would be created (name=a1, node=pve1)" in shown.stdout
    assert (
        "  * pve1: it has the most free memory" in shown.stdout and "  - pve2: it is in HA maintenance" in shown.stdout
    )
    assert len(lab.pve.vms) == before and one.metric('agentlab_placement_passed_over_total{reason="maintenance"}') == 0
    assert one.post("/v1/sandboxes", {"name": "a1"}).status == 201
    assert one.metric('agentlab_creations_total{node="pve1"}') == 1
    assert one.metric('agentlab_placement_passed_over_total{reason="maintenance"}') == 1
