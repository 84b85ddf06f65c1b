# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows 17, 18 and 20: creations, many in one play and a single one, against the peers and against the least script;
and how often the local backend starts pvesh.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers as packages
from canned_cluster import TEMPLATE
from field import REPO, make_play, time_command, write_playbook
from harness import Bench, TimedRun
from judging import Row, divide_medians, make_at_most_row, make_row, subtract_each

COUNT = 20
# The hardware that each VM gets, from us and from the peers alike.
HARDWARE = {"cores": 2, "memory": 1024}
# Every plain option of a creation, without and with those of cloud-init.
PLAIN = {**HARDWARE, "cpu_type": "host", "disk_size": "16G", "bridge": "vmbr0", "tags": ["bench"], "description": "one"}
CLOUD_INIT = {
    "cloud_init_user": "agent",
    "ip_config": "ip=192.0.2.5/24,gw=192.0.2.1",
    "nameserver": "192.0.2.1",
    "ssh_public_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl bench",
}
PVESH_TEST = REPO / "tests" / "faults" / "test_pvesh.py"


def _create_in_new_cluster(bench: Bench, create: TimedRun, count: int) -> TimedRun:
    """Return a timed run that creates ``count`` VMs in a cluster with nothing but a template, and without records.

    The returned run raises RuntimeError when the cluster then has another number of VMs.
    """

    def run() -> float:
        bench.reset_cluster(0, template=True)
        for suffix in ("", "-wal", "-shm"):
            Path(bench.database + suffix).unlink(missing_ok=True)
        seconds = create()
        # The template and the VM of somebody else are there as well.
        created = bench.server.read_state()["vms"] - 2
        if created != count:
            raise RuntimeError(f"{created} VMs were created, not {count}")
        return seconds

    return run


def _write_items_playbook(bench: Bench, name: str, count: int, **options: Any) -> str:
    """Write a playbook in which one task of ours creates ``count`` sandboxes, and return its path."""
    items = [{"name": f"bench-{number}"} for number in range(count)]
    task = {"items": items, "template": str(TEMPLATE), "ttl": "1h", **options}
    return write_playbook(bench.folder, name, make_play({"agentlab.proxmox.agentlab_sandbox": task}))


def _write_peer_playbook(bench: Bench) -> str:
    """Write a playbook in which the peer creates COUNT VMs, and return its path.

    Three loops clone the VMs, set their hardware and start them, as the peer's documentation does it.
    """
    module, vmids = "community.proxmox.proxmox_kvm", list(range(1000, 1000 + COUNT))
    vm = {"name": "bench-{{ item }}", "node": "pve1"}
    clone = bench.make_peer_options(**vm, clone="base", vmid=TEMPLATE, newid="{{ item }}", full=False, timeout=60)
    update = bench.make_peer_options(**vm, vmid="{{ item }}", update=True, **HARDWARE)
    start = bench.make_peer_options(vmid="{{ item }}", node="pve1", state="started", timeout=60)
    tasks = ({module: options, "loop": vmids} for options in (clone, update, start))
    return write_playbook(bench.folder, "create-loop", make_play(*tasks))


def count_requests_each(bench: Bench, **options: Any) -> tuple[float, dict[str, int]]:
    """Create COUNT sandboxes in one play; return the requests per sandbox, and all requests by kind.

    ``options``: those of agentlab_sandbox for each sandbox.
    """
    playbook = _write_items_playbook(bench, "create-counted", COUNT, **options)
    _create_in_new_cluster(bench, lambda: bench.run_ours(playbook), COUNT)()
    requests = bench.server.read_request_counts()
    return sum(requests.values()) / COUNT, dict(requests)


def measure_many_creations(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 17: twenty sandboxes in one play, against the peers' loops, and the requests of each creation."""
    items, loop = _write_items_playbook(bench, "create-items", COUNT, **HARDWARE), _write_peer_playbook(bench)
    peer_runs = [
        _create_in_new_cluster(bench, lambda package=package: bench.run_peer(loop, package=package), COUNT)
        for package in (packages.NEWEST, packages.FIRST)
    ]
    ours, shipped, newest, first = bench.measure_by_turns(
        _create_in_new_cluster(bench, lambda: bench.run_ours(items), COUNT),
        _create_in_new_cluster(bench, lambda: bench.run_shipped(items), COUNT),
        *peer_runs,
    )
    plain, plain_kinds = count_requests_each(bench, **PLAIN)
    everything, everything_kinds = count_requests_each(bench, **PLAIN, **CLOUD_INIT)
    times_faster = divide_medians(newest, ours)
    return [
        make_row(
            "17",
            f"create {COUNT} sandboxes in one play (`items`), against `proxmox_kvm` loops: clone, update, start",
            "at least 15x faster; at most 9 requests each with everything set, 7 without cloud-init",
            f"{times_faster:.1f}x faster ({divide_medians(newest, shipped):.1f}x shipped; against 1.4.0 "
            f"{divide_medians(first, ours):.1f}x, {divide_medians(first, shipped):.1f}x); "
            f"{everything:.2f} / {plain:.2f} requests each",
            max(15 / times_faster, everything / 9, plain / 7),
            {
                "ours": ours,
                "shipped": shipped,
                "loop of the newest": newest,
                "loop of 1.4.0": first,
                "kinds, everything": everything_kinds,
                "kinds, without cloud-init": plain_kinds,
            },
        )
    ]


def measure_single_creation(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 18: a single creation, beside a script with as few requests as a safe creation can have."""
    options = {"name": "bench-1", "template": str(TEMPLATE), "ttl": "1h", **HARDWARE}
    playbook = write_playbook(bench.folder, "create-one", make_play({"agentlab.proxmox.agentlab_sandbox": options}))
    script = [sys.executable, str(REPO / "benchmarks" / "least_creation.py"), str(TEMPLATE)]

    def run_ours() -> float:
        return bench.run_ours(playbook)

    def run_script() -> float:
        return time_command(script, bench.env, bench.folder)

    ours, shipped, least, ping = bench.measure_by_turns(
        _create_in_new_cluster(bench, run_ours, 1),
        _create_in_new_cluster(bench, lambda: bench.run_shipped(playbook), 1),
        _create_in_new_cluster(bench, run_script, 1),
        bench.run_ping,
    )
    kinds = []
    for create in (run_ours, run_script):
        _create_in_new_cluster(bench, create, 1)()
        kinds.append(bench.server.read_request_counts())
    our_requests, script_requests = (sum(requests.values()) for requests in kinds)
    beyond, beyond_shipped = subtract_each(ours, ping), subtract_each(shipped, ping)
    row = make_at_most_row(
        "18",
        "create one sandbox: its time beyond a ping play, against the least possible script as a process",
        1.15,
        divide_medians(beyond, least),
        "x",
        {
            "ours": ours,
            "shipped": shipped,
            "least script": least,
            "ping": ping,
            "kinds": dict(kinds[0]),
            "kinds of the script": dict(kinds[1]),
        },
        divide_medians(beyond_shipped, least),
    )
    seconds = f"{statistics.median(beyond):.2f} s against {statistics.median(least):.2f}"
    return [{**row, "measured": f"{row['measured']}; {seconds}; {our_requests} requests against {script_requests}"}]


def measure_local_backend(_bench: Bench, _wanted: set[str]) -> list[Row]:
    """Return row 20: the most starts of pvesh per operation that the test of the local backend allows.

    Raises RuntimeError when that test fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(PVESH_TEST), "-k", "how_often_pvesh_is_started"]
    test = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=300)
    bounds = re.search(r"^    most = \{(.*)\}$", PVESH_TEST.read_text(encoding="utf-8"), re.M)
    if test.returncode or bounds is None:
        raise RuntimeError(test.stdout[-500:] or "the test has no bounds")
    starts = {name: int(number) for name, number in re.findall(r'"([\w ]+)": (\d+)', bounds[1])}
    targets = {"create": 9, "destroy": 5, "list": 1}
    row = make_row(
        "20",
        "local backend: starts of pvesh per operation",
        ", ".join(f"{name} at most {number}" for name, number in targets.items()),
        ", ".join(f"{name} {number}" for name, number in starts.items()),
        max(starts[name] / number for name, number in targets.items()),
        {"starts": starts},
    )
    return [{**row, "runs": 1}]
