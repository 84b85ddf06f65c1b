# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Simulate 1,000 creations on 16 nodes by three controllers, and measure what a decision costs.

The controllers share the reservations in the records. They see Proxmox VE's figures only as often as it broadcasts
them: every ten seconds. Run: ``python benchmarks/placement_simulation.py``.

With ``--processes`` the three controllers are real processes with one database. They create 1,000 sandboxes through
the whole core on a double of Proxmox VE with 16 nodes, over HTTPS (``--creations 100`` for fewer).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / ".collections"), str(REPO / "tests")]

from agentlab_core.nodes import Node, Rules, Vm
from agentlab_core.placement import Load, Reservation, Wish, decide

GIB = 1024**3
NODES, CREATIONS, CONTROLLERS = 16, 1000, 3
# Memory of a sandbox and of a node, in bytes.
MEMORY, NODE_MEMORY = 2 * GIB, 256 * GIB
# Seconds between two broadcasts of Proxmox VE, and on average between two creations.
BROADCAST_SECONDS, CREATION_SECONDS = 10.0, 0.05
# Seconds until Proxmox VE lists a new VM.
LISTED_AFTER_SECONDS = 5


@dataclass(frozen=True)
class Placement:
    """A sandbox that a controller has placed, ``at`` so many seconds after the start."""

    at: float
    controller: int
    vmid: int
    node: str


def simulate_creations(seed: int = 1, *, shared: bool = True) -> dict[str, Any]:
    """Simulate CREATIONS creations, and return the seconds and the fewest and most sandboxes on a node.

    ``seed``: that of the random numbers. ``shared=False``: no controller counts the reservations of the others.
    """
    generator = random.Random(seed)
    names = [f"pve{number:02}" for number in range(1, NODES + 1)]
    placements: list[Placement] = []
    # Controller -> when it read the figures, and the figures.
    views: dict[int, tuple[float, list[Node], dict[int, Vm]]] = {}
    now = 0.0
    for number in range(CREATIONS):
        controller = generator.randrange(CONTROLLERS)
        now += generator.expovariate(1 / CREATION_SECONDS)
        if controller not in views or now - views[controller][0] >= BROADCAST_SECONDS:
            views[controller] = (now, *read_figures(names, placements, now))
        _read_at, nodes, vms = views[controller]
        visible = [placement for placement in placements if shared or placement.controller == controller]
        counts = {name: sum(1 for placement in visible if placement.node == name) for name in names}
        reservations = tuple(
            Reservation(placement.vmid, placement.node, MEMORY, creating=now - placement.at < LISTED_AFTER_SECONDS)
            for placement in visible
        )
        decision = decide(nodes, vms, Load(counts, reservations=reservations), Wish(MEMORY), Rules())
        assert decision.node is not None
        placements.append(Placement(now, controller, 1000 + number, decision.node))
    on_each = [sum(1 for placement in placements if placement.node == name) for name in names]
    return {"seconds": round(now, 1), "least": min(on_each), "most": max(on_each)}


def read_figures(names: list[str], placements: list[Placement], now: float) -> tuple[list[Node], dict[int, Vm]]:
    """Return nodes and VMs as Proxmox VE lists them ``now`` seconds after the start.

    A VM is listed after LISTED_AFTER_SECONDS, and uses a quarter of its memory.
    """
    listed = [placement for placement in placements if now - placement.at >= LISTED_AFTER_SECONDS]
    used = dict.fromkeys(names, 4 * GIB)
    for placement in listed:
        used[placement.node] += MEMORY // 4
    vms = {placement.vmid: Vm(placement.node, MEMORY // 4, MEMORY, int(now - placement.at)) for placement in listed}
    return [Node(name, memory=NODE_MEMORY, used=used[name], cpus=64) for name in names], vms


def measure_decision(vm_count: int = 10000, rounds: int = 50) -> float:
    """Return the median milliseconds of a decision on 16 nodes with that many VMs of ours, made ``rounds`` times.

    Every twentieth of the VMs is young.
    """
    names = [f"pve{number:02}" for number in range(1, NODES + 1)]
    nodes = [Node(name, memory=4096 * GIB, used=64 * GIB, cpus=64) for name in names]
    vms = {vmid: Vm(names[vmid % NODES], GIB, MEMORY, 60 if vmid % 20 == 0 else 6000) for vmid in range(vm_count)}
    # The caller leaves out VMs that have settled, because the node's own figures include their memory.
    young = {vmid: vm for vmid, vm in vms.items() if vm.uptime < Rules().settle}
    load = Load(dict.fromkeys(names, vm_count // NODES))
    times = []
    for _round in range(rounds):
        began = time.perf_counter()
        decide(nodes, young, load, Wish(MEMORY, cpus=2), Rules())
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


# ---- real processes ----


def create_sandboxes(creations: int) -> None:
    """Create so many sandboxes, one after the other, with the configuration of the environment.

    The first begins when a line comes on standard input.
    """
    from agentlab_core import config
    from agentlab_core.context import Context
    from agentlab_core.sandboxes import create

    ctx = Context(config.load({"wait_timeout": "120s"}, os.environ), actor=f"controller {os.getpid()}")
    sys.stdin.readline()
    for _number in range(creations):
        ctx.refresh()
        create.run(ctx, create.Spec(ttl=14400))
    ctx.close()


def broadcast_figures(pve: Any, names: list[str], ended: threading.Event) -> None:
    """Set the figures of the double's nodes every ten seconds, as Proxmox VE does, until the event is set.

    A young VM uses a quarter of its memory.
    """
    while True:
        counts = Counter(vm.node for vm in list(pve.vms) if not vm.template)
        for name in names:
            used = 4 * GIB + counts[name] * MEMORY // 4
            pve.node_figures[name] = {"maxmem": NODE_MEMORY, "mem": used, "maxcpu": 64}
        if ended.wait(BROADCAST_SECONDS):
            return


def run_processes(creations: int = CREATIONS) -> dict[str, Any]:
    """Create so many sandboxes on a double with 16 nodes, by three controller processes.

    Returns the seconds, the requests per creation, and the fewest and most sandboxes on a node. Raises RuntimeError
    when a controller fails.
    """
    from support.double import Server

    names = [f"pve{number}" for number in range(1, NODES + 1)]
    with tempfile.TemporaryDirectory(prefix="placement-") as folder:
        server = Server(folder)
        pve = server.pve
        for name in names:
            pve.nodes.setdefault(name, {"online": True})
        pve.storages["nfs"] = {"type": "nfs", "active": 1, "content": "images", "files": set(), "shared": 1}
        template = pve.add_template(9000, "simulated", "nfs", "pve1")
        template.config["memory"] = str(MEMORY // 1024**2)
        (Path(folder) / "config.yaml").write_text("template: '9000'\n", encoding="utf-8")
        ended = threading.Event()
        figures = threading.Thread(target=broadcast_figures, args=(pve, names, ended))
        figures.start()
        env = {**os.environ, **server.environment(folder)}
        shares = [creations // CONTROLLERS + (number < creations % CONTROLLERS) for number in range(CONTROLLERS)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--controller", str(share)], env=env, stdin=subprocess.PIPE, text=True
            )
            for share in shares
        ]
        time.sleep(3)
        pve.counted.clear()
        began = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        statuses = [process.wait() for process in processes]
        seconds = time.monotonic() - began
        ended.set()
        figures.join()
        counts = Counter(vm.node for vm in pve.vms if not vm.template)
        requests = pve.count()
        server.stop()
    if any(statuses):
        raise RuntimeError(f"a controller failed: {statuses}")
    on_each = [counts[name] for name in names]
    return {
        "controllers": CONTROLLERS,
        "nodes": NODES,
        "creations": sum(on_each),
        "seconds": round(seconds, 1),
        "requests_per_creation": round(requests / creations, 1),
        "least": min(on_each),
        "most": max(on_each),
    }


def main() -> None:
    """Simulate, or run the processes of the command line, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="run three controllers as processes")
    parser.add_argument("--creations", type=int, default=CREATIONS, help="how many creations with --processes")
    parser.add_argument("--controller", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.controller is not None:
        create_sandboxes(options.controller)
        return
    if options.processes:
        print(json.dumps(run_processes(options.creations), indent=2))
        return
    print(
        json.dumps(
            {
                "nodes": NODES,
                "creations": CREATIONS,
                "controllers": CONTROLLERS,
                "shared": simulate_creations(),
                "not_shared": simulate_creations(shared=False),
                "decision_ms": round(measure_decision(), 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
