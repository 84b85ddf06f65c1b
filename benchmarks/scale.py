# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the levers cost, and what one node, a cluster and a fleet need.

The server is the canned one, so these are the client's costs: that of a real cluster, whose nodes have disks and locks
to wait for, comes on top. Nothing here has a target.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import daemon
from field import play, playbook
from rows import BIN, IN_FLIGHT, TASK, TICK, Bench, Row, timed

LEVER_VMS = 200
HOSTS = 100


def levers(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Destroy 200 VMs with other settings of connections and poll_interval."""
    table = []
    for connections, interval in [
        *((number, TICK) for number in (1, 4, IN_FLIGHT, 64)),
        *((IN_FLIGHT, seconds) for seconds in (0.02, 0.5, 2.0)),
    ]:
        count = LEVER_VMS if connections > 1 else LEVER_VMS // 5
        times: list[float] = []
        for _number in range(1 if connections == 1 else min(bench.runs, 3)):
            bench.vms(count)
            bench.records(count)
            took, memory = bench.process("rows.grow", bench.database, count, connections, interval)
            times.append(took / count)
        asked = bench.server.counts()
        looks = sum(number for kind, number in asked.items() if "/tasks" in kind)
        table.append(
            {
                "connections": connections,
                "poll_interval": interval,
                "ms a VM": round(statistics.median(times) * 1000, 1),
                "requests a VM": round(sum(asked.values()) / count, 2),
                "looks at tasks": looks,
                "memory MB": memory // 1024,
                "vms": count,
            }
        )
    return [{"row": "levers", "table": table, "fewer": "at most 3 each", "task": TASK}]


def sizes(bench: Bench, _wanted: set[str]) -> list[Row]:
    """One node with 200 sandboxes, a cluster of 16 nodes with 10,000, and 100 hosts with 50 each."""
    return [
        {
            "row": "scale",
            "runs": 1,
            "node": _cluster(bench, 1, 200, 200),
            "cluster": _cluster(bench, 16, 10000, 1000),
            "fleet": _fleet(bench),
        }
    ]


def _cluster(bench: Bench, nodes: int, count: int, gone: int) -> dict[str, Any]:
    found: dict[str, Any] = {"nodes": nodes, "sandboxes": count}

    def measured(name: str, took: float) -> None:
        found[name] = {"seconds": round(took, 2), "requests": sum(bench.server.counts().values())}

    bench.vms(count, status="running", nodes=nodes)
    bench.records(count, "RUNNING", nodes=nodes)
    measured("list from the records", bench.ours(bench.info_play("all")))
    bench.vms(count, status="running", nodes=nodes)
    measured("list compared with Proxmox", bench.ours(bench.info_play("verify", verify=True, verify_identity=False)))
    bench.vms(count, status="running", nodes=nodes)
    measured(
        "reconcile, plan only",
        bench.ours(playbook(bench.folder, "reconcile", play({"agentlab.proxmox.agentlab_reconcile": {}}))),
    )
    began = time.perf_counter()
    with daemon.running(bench, count, nodes=nodes) as one:
        measured("daemon: start and first reconcile", time.perf_counter() - began)
        found["daemon MB"] = round(one.megabytes)
        rate = daemon.lists_a_second(one, daemon.SECONDS)
        found["daemon: core seconds a list"], found["daemon MB after lists"] = round(1 / rate, 3), round(one.megabytes)
    found["records MB"] = round(os.path.getsize(bench.database) / 2**20, 1)
    for connections in (IN_FLIGHT, 64):
        bench.vms(gone, nodes=nodes)
        bench.records(gone, nodes=nodes)
        took, memory = bench.process("rows.grow", bench.database, gone, connections)
        measured(f"destroy {gone:,}, connections {connections}", took)
        found[f"destroy {gone:,}, connections {connections}"]["MB"] = memory // 1024
    return found


def _fleet(bench: Bench) -> dict[str, Any]:
    """A hundred single hosts, each with records and an API of its own; here all of them are one canned server and a
    folder of databases. The records
    alone are asked, then Proxmox too: what one control node needs for a play over all of them.
    """
    bench.vms(50, status="running")
    inventory = Path(bench.folder, "fleet.ini")
    lines = []
    for number in range(HOSTS):
        database = f"{bench.folder}/fleet-{number}.db"
        if number == 0:
            bench.records(50, "RUNNING")
        Path(database).write_bytes(Path(bench.database).read_bytes())
        lines.append(f"pve{number:03} agentlab_database={database}")
    inventory.write_text("[fleet]\n" + "\n".join(lines) + "\n", encoding="utf-8")

    def over_all(name: str, task: dict[str, Any]) -> float:
        file = playbook(bench.folder, f"fleet-{name}", [dict(play(task)[0], hosts="fleet")])
        return timed(
            [str(BIN / "ansible-playbook"), "-i", str(inventory), "--forks", "20", file], bench.env, bench.folder
        )

    where = {"database": "{{ agentlab_database }}"}
    found: dict[str, Any] = {"hosts": HOSTS, "forks": 20}
    for name, task in {
        "ping": {"ansible.builtin.ping": {}},
        "records": {"agentlab.proxmox.agentlab_sandbox_info": where},
        "compared": {"agentlab.proxmox.agentlab_sandbox_info": {**where, "verify": True, "verify_identity": False}},
    }.items():
        found[name] = round(over_all(name, task), 1)
    return json.loads(json.dumps(found))
