# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows 1 to 6, 13 and 16: many VMs destroyed, the requests of a destroyed VM, and growth with the number of VMs."""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import peers as packages
from field import FIRST_VMID, REPO, read_resident_kb, time_command
from harness import IN_FLIGHT, TASK_SECONDS, TICK_SECONDS, VM_COUNT, Bench, TimedRun
from judging import Row, divide_medians, make_at_least_row, make_at_most_row, make_row, subtract_each

# Memory counts as flat when thousands of VMs take at most so much more per VM than fifty: the outcome of each VM, which
# the run reports at its end.
FLAT_KB_EACH = 8


def measure_destroys(bench: Bench, wanted: set[str]) -> list[Row]:
    """Measure rows 1, 2, 3 and 16: destroy fifty stopped VMs by our module, by limit.py and by the peers.

    A loop of a peer takes two minutes, so each peer runs only for rows that need it.
    """
    destroy, loop = bench.write_destroy_playbook(), bench.write_peer_loop_playbook()
    forks, hosts = bench.write_peer_forks_playbook(), bench.write_hosts()
    newest = packages.NEWEST
    peer_runs: dict[str, TimedRun] = {
        "2": lambda: bench.run_peer(forks, *hosts),
        "1": lambda: bench.run_peer(loop),
    }
    if "16" in wanted:
        peer_runs["forks of the newest"] = lambda: bench.run_peer(forks, *hosts, package=newest)
        peer_runs["loop of the newest"] = lambda: bench.run_peer(loop, package=newest)
    peer_runs = {name: timed_run for name, timed_run in peer_runs.items() if name in wanted or "16" in wanted}
    ours, shipped, ping, limit, *peer_values = bench.measure_by_turns(
        _destroy_new_vms(bench, lambda: bench.run_ours(destroy)),
        _destroy_new_vms(bench, lambda: bench.run_shipped(destroy)),
        bench.run_ping,
        _destroy_new_vms(bench, lambda: _run_limit(bench)),
        *(_destroy_new_vms(bench, timed_run) for timed_run in peer_runs.values()),
    )
    peers = dict(zip(peer_runs, peer_values, strict=True))
    values = {"ours": ours, "shipped": shipped, "ping": ping, "limit": limit}
    rows = [
        make_at_most_row(
            "3",
            "its time beyond a ping play, against the asyncio limit as a process",
            2.0,
            divide_medians(subtract_each(ours, ping), limit),
            "x",
            values,
            divide_medians(subtract_each(shipped, ping), limit),
        )
    ]
    if "16" in wanted:
        rows.append(_make_shipped_row(values, peers))
    if "1" in peers:
        rows.append(
            make_at_least_row(
                "1",
                f"destroy {VM_COUNT} stopped VMs, {TASK_SECONDS} s tasks, whole playbook, against a `proxmox_kvm` loop",
                45,
                divide_medians(peers["1"], ours),
                "x faster",
                {**values, "loop": peers["1"]},
                divide_medians(peers["1"], shipped),
            )
        )
    if "2" in peers:
        rows.append(
            make_at_least_row(
                "2",
                f"the same against {VM_COUNT} hosts with forks=10",
                8,
                divide_medians(peers["2"], ours),
                "x faster",
                {**values, "forks": peers["2"]},
                divide_medians(peers["2"], shipped),
            )
        )
    return rows


def _destroy_new_vms(bench: Bench, timed_run: TimedRun) -> TimedRun:
    """Return the timed run, preceded by a new cluster and new records, and followed by a look that all VMs are gone.

    The returned run raises RuntimeError when VMs remain.
    """

    def run() -> float:
        bench.reset_cluster()
        bench.write_records()
        seconds = timed_run()
        # The VM of somebody else stays.
        remaining = bench.server.read_state()["vms"] - 1
        if remaining:
            raise RuntimeError(f"{remaining} VMs of {VM_COUNT} were left")
        return seconds

    return run


def _run_limit(bench: Bench) -> float:
    """Run limit.py, the asyncio script with the fewest requests, on the VMs of the bench, and return its seconds."""
    script = str(REPO / "benchmarks" / "limit.py")
    command = [sys.executable, script, str(FIRST_VMID), str(VM_COUNT), str(IN_FLIGHT)]
    return time_command(command, bench.env, bench.folder)


def _make_shipped_row(values: dict[str, list[float]], peers: dict[str, list[float]]) -> Row:
    """Return row 16: the shipped module against loop and forks of the newest peer.

    ``values`` are the seconds of ours, ``peers`` those of the peers. The row shows the ratios to the peer 1.4.0 too.
    """
    shipped = values["shipped"]
    loop, forks = (divide_medians(peers[f"{way} of the newest"], shipped) for way in ("loop", "forks"))
    older_loop, older_forks = divide_medians(peers["1"], shipped), divide_medians(peers["2"], shipped)
    return make_row(
        "16",
        f"shipped: destroy {VM_COUNT} stopped VMs, against the newest peer's loop / {VM_COUNT} hosts with forks=10",
        "at least 45x / 8x faster",
        f"{loop:.1f}x / {forks:.1f}x faster ({older_loop:.1f}x / {older_forks:.1f}x against 1.4.0)",
        max(45 / loop, 8 / forks),
        {**values, **peers},
    )


def count_requests(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure rows 4 and 5: the requests of a prune, and of each destroyed VM, as the server counts them."""
    return [_count_prune_requests(bench), _count_destroy_requests(bench)]


def _count_prune_requests(bench: Bench) -> Row:
    """Return row 4: the requests of a prune of 1,000 records whose VMs are gone."""
    bench.reset_cluster(0)
    bench.write_records(1000, "TIMEOUT")
    bench.run_ours(bench.write_prune_playbook())
    requests = bench.server.read_request_counts()
    row = make_at_most_row(
        "4",
        "requests: prune 1,000 records whose VMs are gone",
        5,
        sum(requests.values()),
        " in all",
        {"kinds": dict(requests)},
    )
    return {**row, "runs": 1}


def _count_destroy_requests(bench: Bench) -> Row:
    """Return row 5: the requests per VM of a destroy of fifty VMs, stopped and running ones."""
    destroy = bench.write_destroy_playbook()
    requests_each: dict[str, list[float]] = {"stopped": [], "running": []}
    kinds: dict[str, Any] = {}
    for _run in range(bench.runs):
        for status, values in requests_each.items():
            bench.reset_cluster(status=status)
            bench.write_records(state="STOPPED" if status == "stopped" else "RUNNING")
            bench.run_ours(destroy)
            kinds[status] = dict(bench.server.read_request_counts())
            values.append(sum(kinds[status].values()) / VM_COUNT)
    stopped, running = (statistics.median(values) for values in requests_each.values())
    return make_row(
        "5",
        "requests per destroyed VM, identity proven and marked: stopped / running",
        "at most 3.4 / 5.0",
        f"{stopped:.2f} / {running:.2f}",
        max(stopped / 3.4, running / 5.0),
        {**requests_each, "kinds": kinds},
    )


def measure_second_destroy(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 6: destroy fifty sandboxes that are destroyed already, by us and by the peer's loop."""
    destroy, loop = bench.write_destroy_playbook(), bench.write_peer_loop_playbook()
    bench.reset_cluster(0)
    bench.write_records(state="DESTROYED")
    ours, shipped, looped = bench.measure_by_turns(
        lambda: bench.run_ours(destroy),
        lambda: bench.run_shipped(destroy),
        lambda: bench.run_peer(loop),
    )
    bench.reset_cluster(0)
    bench.run_ours(destroy)
    requests = sum(bench.server.read_request_counts().values())
    times_faster = divide_medians(looped, ours)
    return [
        make_row(
            "6",
            f"second run over {VM_COUNT} absent ones, against the peer's",
            "at least 15x faster, at most 2 requests",
            f"{times_faster:.1f}x faster ({divide_medians(looped, shipped):.1f}x shipped), {requests} requests",
            max(15 / times_faster, requests / 2),
            {"ours": ours, "shipped": shipped, "loop": looped},
        )
    ]


def measure_growth(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 13: seconds and memory of a destroy as the number of VMs grows from 50 to ``bench.most_vms``."""
    resident_kb: dict[int, int] = {}
    shares: dict[int, list[float]] = {}
    counts = [count for count in (50, 200, 1000, 5000) if count <= bench.most_vms]
    for count in counts:
        least_seconds = -(-count // IN_FLIGHT) * (TASK_SECONDS + TICK_SECONDS)
        shares[count] = []
        for _run in range(bench.runs if count < 1000 else 1):
            bench.reset_cluster(count)
            bench.write_records(count)
            seconds, resident_kb[count] = bench.call_in_process("destroying.destroy_all", bench.database, count)
            shares[count].append(seconds / least_seconds)
    worst = max(map(statistics.median, shares.values()))
    last = counts[-1]
    kb_each = (resident_kb[last] - resident_kb[50]) / last
    row = make_row(
        "13",
        f"growth: N = {', '.join(f'{count:,}' for count in counts)} destroys with {IN_FLIGHT} in flight",
        f"wall within 1.3x of ceil(N/W) x (task + tick); memory flat (at most {FLAT_KB_EACH} kB a VM, its outcome)",
        f"{worst:.2f}x; memory {resident_kb[50] / 1024:.0f} MB at 50, {resident_kb[last] / 1024:.0f} MB at {last:,} "
        f"({kb_each:.1f} kB a VM)",
        max(worst / 1.3, kb_each / FLAT_KB_EACH),
        {"share": shares, "resident kB": resident_kb},
    )
    return [{**row, "fewer": "from 1,000 on once each"}]


def destroy_all(
    database: str, count: str, connections: str = str(IN_FLIGHT), interval: str = str(TICK_SECONDS)
) -> tuple[float, int]:
    """Destroy all sandboxes of a database through the core, and return the seconds and the peak of memory, in kB.

    It runs in a process of its own, so the arguments are texts: the database's path, the number of its sandboxes, the
    connections to Proxmox VE, and the poll_interval in seconds. Raises AssertionError when a sandbox remains.
    """
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

    options = {"database": database}
    settings = config.load(options, os.environ)
    settings.workers = settings.proxmox.connections = int(connections)
    settings.poll_interval = float(interval)
    ctx = Context(settings, actor="benchmark", clock=clock.SystemClock())
    items = [(sandbox, destroy.Request(force=True)) for sandbox in ctx.records.find_all()]
    assert len(items) == int(count)
    began = time.perf_counter()
    outcomes = destroy.run(ctx, items)
    seconds = time.perf_counter() - began
    assert all(outcome.state == "DESTROYED" for outcome in outcomes), next(
        outcome.message for outcome in outcomes if outcome.state != "DESTROYED"
    )
    ctx.close()
    return seconds, read_resident_kb("self", peak=True)
