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

import canned
import peers as packages
from field import REPO, play, playbook, timed
from rows import Bench, Part, Row, at_most, ratio, row

COUNT = 20
# What is set on each VM, by us and by the peers alike.
HARDWARE = {"cores": 2, "memory": 1024}
# Every plain option of a creation, without and with those of cloud-init.
PLAIN = {**HARDWARE, "cpu_type": "host", "disk_size": "16G", "bridge": "vmbr0", "tags": ["bench"], "description": "one"}
CLOUD_INIT = {
    "cloud_init_user": "agent",
    "ip_config": "ip=192.0.2.5/24,gw=192.0.2.1",
    "nameserver": "192.0.2.1",
    "ssh_public_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl bench",
}


def _new_cluster(bench: Bench) -> None:
    """Make a cluster with nothing but a template, and forget the records."""
    bench.vms(0, template=True)
    for suffix in ("", "-wal", "-shm"):
        Path(bench.database + suffix).unlink(missing_ok=True)


def _on_new_cluster(bench: Bench, create: Part, count: int) -> Part:
    """Return a part that creates ``count`` VMs in a new cluster, and fails where one of them is missing."""

    def run() -> float:
        _new_cluster(bench)
        seconds = create()
        # The template and the VM of somebody else are there as well.
        made = bench.server.state()["vms"] - 2
        if made != count:
            raise RuntimeError(f"{made} VMs were created, not {count}")
        return seconds

    return run


def _items_play(bench: Bench, name: str, count: int, **options: Any) -> str:
    items = [{"name": f"bench-{number}"} for number in range(count)]
    task = {"items": items, "template": str(canned.TEMPLATE), "ttl": "1h", **options}
    return playbook(bench.folder, name, play({"agentlab.proxmox.agentlab_sandbox": task}))


def _peer_play(bench: Bench) -> str:
    """Clone, set the hardware, start: three loops, as the peer's documentation does it."""
    module, vmids = "community.proxmox.proxmox_kvm", list(range(1000, 1000 + COUNT))
    named = {"name": "bench-{{ item }}", "node": "pve1"}
    clone = bench.kvm(**named, clone="base", vmid=canned.TEMPLATE, newid="{{ item }}", full=False, timeout=60)
    update = bench.kvm(**named, vmid="{{ item }}", update=True, **HARDWARE)
    start = bench.kvm(vmid="{{ item }}", node="pve1", state="started", timeout=60)
    return playbook(
        bench.folder, "create-loop", play(*({module: options, "loop": vmids} for options in (clone, update, start)))
    )


def requests_each(bench: Bench, **options: Any) -> tuple[float, dict[str, int]]:
    """Return the requests per creation of COUNT in one play, and all of them by kind."""
    _on_new_cluster(bench, lambda: bench.ours(_items_play(bench, "create-counted", COUNT, **options)), COUNT)()
    counted = bench.server.counts()
    return sum(counted.values()) / COUNT, dict(counted)


def many(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 17: twenty sandboxes in one play, against the peers' loop; and the requests that each creation takes."""
    mine, loop = _items_play(bench, "create-items", COUNT, **HARDWARE), _peer_play(bench)
    peers = {
        package: _on_new_cluster(bench, lambda package=package: bench.peer(loop, package=package), COUNT)
        for package in (packages.NEWEST, packages.FIRST)
    }
    ours, shipped, newest, first = bench.interleaved(
        _on_new_cluster(bench, lambda: bench.ours(mine), COUNT),
        _on_new_cluster(bench, lambda: bench.shipped(mine), COUNT),
        slow=tuple(peers.values()),
    )
    plain, plain_kinds = requests_each(bench, **PLAIN)
    whole, whole_kinds = requests_each(bench, **PLAIN, **CLOUD_INIT)
    times = ratio(newest, ours)
    return [
        {
            **row(
                "17",
                f"create {COUNT} sandboxes in one play (`items`), against `proxmox_kvm` loops: clone, update, start",
                "at least 15x faster; at most 9 requests each with everything set, 7 without cloud-init",
                f"{times:.1f}x faster ({ratio(newest, shipped):.1f}x shipped; against 1.4.0 {ratio(first, ours):.1f}x, "
                f"{ratio(first, shipped):.1f}x); {whole:.2f} / {plain:.2f} requests each",
                max(15 / times, whole / 9, plain / 7),
                {
                    "ours": ours,
                    "shipped": shipped,
                    "loop of the newest": newest,
                    "loop of 1.4.0": first,
                    "kinds, everything": whole_kinds,
                    "kinds, without cloud-init": plain_kinds,
                },
            ),
            "fewer": f"the loops {len(newest)} times",
        }
    ]


def one(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 18: a single creation, beside a script with as few requests as a safe creation can have."""
    options = {"name": "bench-1", "template": str(canned.TEMPLATE), "ttl": "1h", **HARDWARE}
    mine = playbook(bench.folder, "create-one", play({"agentlab.proxmox.agentlab_sandbox": options}))
    script = [sys.executable, str(REPO / "benchmarks" / "least_creation.py"), str(canned.TEMPLATE)]
    ours, shipped, least, ping = bench.interleaved(
        _on_new_cluster(bench, lambda: bench.ours(mine), 1),
        _on_new_cluster(bench, lambda: bench.shipped(mine), 1),
        _on_new_cluster(bench, lambda: timed(script, bench.env, bench.folder), 1),
        bench.floor,
    )
    counts = []
    for create in (lambda: bench.ours(mine), lambda: timed(script, bench.env, bench.folder)):
        _on_new_cluster(bench, create, 1)()
        counts.append(bench.server.counts())
    own, other = (sum(counted.values()) for counted in counts)
    beyond, further = ([each - floor for each, floor in zip(times, ping, strict=True)] for times in (ours, shipped))
    judged = at_most(
        "18",
        "create one sandbox: its time beyond a ping play, against the least possible script as a process",
        1.15,
        ratio(beyond, least),
        "x",
        {
            "ours": ours,
            "shipped": shipped,
            "least script": least,
            "ping": ping,
            "kinds": dict(counts[0]),
            "kinds of the script": dict(counts[1]),
        },
        ratio(further, least),
    )
    seconds = f"{statistics.median(beyond):.2f} s against {statistics.median(least):.2f}"
    return [{**judged, "measured": f"{judged['measured']}; {seconds}; {own} requests against {other}"}]


STARTS_FILE = REPO / "tests" / "faults" / "test_pvesh.py"


def local_backend(_bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 20: the bounds that the test of the local backend holds, if it holds them."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(STARTS_FILE), "-k", "how_often_pvesh_is_started"]
    test = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=300)
    bounds = re.search(r"^    most = \{(.*)\}$", STARTS_FILE.read_text(encoding="utf-8"), re.M)
    if test.returncode or bounds is None:
        raise RuntimeError(test.stdout[-500:] or "the test has no bounds")
    starts = {name: int(number) for name, number in re.findall(r'"([\w ]+)": (\d+)', bounds[1])}
    targets = {"create": 9, "destroy": 5, "list": 1}
    return [
        {
            **row(
                "20",
                "local backend: starts of pvesh per operation",
                ", ".join(f"{name} at most {number}" for name, number in targets.items()),
                ", ".join(f"{name} {number}" for name, number in starts.items()),
                max(starts[name] / number for name, number in targets.items()),
                {"starts": starts},
            ),
            "runs": 1,
        }
    ]
