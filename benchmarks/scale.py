# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure what the settings cost, and what one node, a cluster and many hosts need. Nothing here has a target.

The server is the canned one, so these are the client's costs. A real cluster, whose nodes wait for disks and locks,
costs more.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from daemon import LIST_SECONDS, measure_list_rate, run_daemon
from field import make_play, time_command, write_playbook
from harness import BIN, IN_FLIGHT, TASK_SECONDS, TICK_SECONDS, Bench
from judging import Row

LEVER_VMS = 200
HOSTS = 100


def measure_levers(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Destroy 200 VMs with other settings of ``connections`` and ``poll_interval``; return the row "levers"."""
    table = []
    for connections, interval in [
        *((number, TICK_SECONDS) for number in (1, 4, IN_FLIGHT, 64)),
        *((IN_FLIGHT, seconds) for seconds in (0.02, 0.5, 2.0)),
    ]:
        count = LEVER_VMS if connections > 1 else LEVER_VMS // 5
        seconds_each: list[float] = []
        for _run in range(1 if connections == 1 else min(bench.runs, 3)):
            bench.reset_cluster(count)
            bench.write_records(count)
            seconds, memory_kb = bench.call_in_process(
                "destroying.destroy_all", bench.database, count, connections, interval
            )
            seconds_each.append(seconds / count)
        requests = bench.server.read_request_counts()
        looks = sum(number for kind, number in requests.items() if "/tasks" in kind)
        table.append(
            {
                "connections": connections,
                "poll_interval": interval,
                "ms a VM": round(statistics.median(seconds_each) * 1000, 1),
                "requests a VM": round(sum(requests.values()) / count, 2),
                "looks at tasks": looks,
                "memory MB": memory_kb // 1024,
                "vms": count,
            }
        )
    return [{"row": "levers", "table": table, "fewer": "at most 3 each", "task": TASK_SECONDS}]


def measure_sizes(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure one node with 200 sandboxes, a cluster of 16 nodes with 10,000, and 100 hosts with 50 each.

    Returns the row "scale".
    """
    return [
        {
            "row": "scale",
            "runs": 1,
            "node": _measure_cluster(bench, 1, 200, 200),
            "cluster": _measure_cluster(bench, 16, 10000, 1000),
            "fleet": _measure_fleet(bench),
        }
    ]


def _measure_cluster(bench: Bench, nodes: int, count: int, destroyed: int) -> dict[str, Any]:
    """Measure lists, a reconcile, the daemon and destroys on so many nodes with ``count`` running sandboxes.

    ``destroyed``: how many VMs are destroyed. Returns seconds, requests and memory (MB) by what was measured.
    """
    measurements: dict[str, Any] = {"nodes": nodes, "sandboxes": count}

    def note(name: str, seconds: float) -> None:
        requests = sum(bench.server.read_request_counts().values())
        measurements[name] = {"seconds": round(seconds, 2), "requests": requests}

    bench.reset_cluster(count, status="running", nodes=nodes)
    bench.write_records(count, "RUNNING", nodes=nodes)
    note("list from the records", bench.run_ours(bench.write_info_playbook("all")))
    bench.reset_cluster(count, status="running", nodes=nodes)
    compare = bench.write_info_playbook("verify", verify=True, verify_identity=False)
    note("list compared with Proxmox", bench.run_ours(compare))
    bench.reset_cluster(count, status="running", nodes=nodes)
    reconcile = write_playbook(bench.folder, "reconcile", make_play({"agentlab.proxmox.agentlab_reconcile": {}}))
    note("reconcile, plan only", bench.run_ours(reconcile))
    began = time.perf_counter()
    with run_daemon(bench, count, nodes=nodes) as daemon:
        note("daemon: start and first reconcile", time.perf_counter() - began)
        measurements["daemon MB"] = round(daemon.megabytes)
        rate = measure_list_rate(daemon, LIST_SECONDS)
        measurements["daemon: core seconds a list"] = round(1 / rate, 3)
        measurements["daemon MB after lists"] = round(daemon.megabytes)
    measurements["records MB"] = round(os.path.getsize(bench.database) / 2**20, 1)
    for connections in (IN_FLIGHT, 64):
        bench.reset_cluster(destroyed, nodes=nodes)
        bench.write_records(destroyed, nodes=nodes)
        seconds, memory_kb = bench.call_in_process("destroying.destroy_all", bench.database, destroyed, connections)
        name = f"destroy {destroyed:,}, connections {connections}"
        note(name, seconds)
        measurements[name]["MB"] = memory_kb // 1024
    return measurements


def _measure_fleet(bench: Bench) -> dict[str, Any]:
    """Measure what a control node needs for a play over a hundred single hosts with fifty sandboxes each.

    Each host has records of its own; here the API of all of them is the one canned server. A play reads the records,
    another compares them with Proxmox VE. Returns the seconds of each play.
    """
    bench.reset_cluster(50, status="running")
    inventory = Path(bench.folder, "fleet.ini")
    lines = []
    for number in range(HOSTS):
        database = f"{bench.folder}/fleet-{number}.db"
        if number == 0:
            bench.write_records(50, "RUNNING")
        Path(database).write_bytes(Path(bench.database).read_bytes())
        lines.append(f"pve{number:03} agentlab_database={database}")
    inventory.write_text("[fleet]\n" + "\n".join(lines) + "\n", encoding="utf-8")

    def run_on_all(name: str, task: dict[str, Any]) -> float:
        file = write_playbook(bench.folder, f"fleet-{name}", [dict(make_play(task)[0], hosts="fleet")])
        command = [str(BIN / "ansible-playbook"), "-i", str(inventory), "--forks", "20", file]
        return time_command(command, bench.env, bench.folder)

    records = {"database": "{{ agentlab_database }}"}
    measurements: dict[str, Any] = {"hosts": HOSTS, "forks": 20}
    for name, task in {
        "ping": {"ansible.builtin.ping": {}},
        "records": {"agentlab.proxmox.agentlab_sandbox_info": records},
        "compared": {"agentlab.proxmox.agentlab_sandbox_info": {**records, "verify": True, "verify_identity": False}},
    }.items():
        measurements[name] = round(run_on_all(name, task), 1)
    return json.loads(json.dumps(measurements))
