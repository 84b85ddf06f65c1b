# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the benchmarks count and weigh, without their times (`make bench-short`): requests exactly, the payload of
every module. No peers are needed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import creating
import payload
import placement_simulation
import report
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import cluster
from field import FIRST_VMID, make_play, run_canned_proxmox, write_playbook
from harness import IN_FLIGHT, VM_COUNT, Bench

# Looks at running tasks come once a poll_interval while something runs, so a slow machine sees more of them: they are
# bounded by the time, the rest is exact.
INTERVAL = 1.0
LOOKS = ("GET /nodes/{node}/tasks", "GET /nodes/{node}/tasks/{upid}/status")
# What a bulk run asks once: the list before, quorum; and for the proof the list after, the rights that make it one, and
# one VMID in another way.
ONCE = {
    "GET /cluster/resources": 2,
    "GET /cluster/ha/status/current": 1,
    "GET /access/acl": 1,
    "GET /access/permissions": 1,
    "GET /cluster/nextid": 1,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with run_canned_proxmox() as server:
        new_bench = Bench(server, 1)
        Path(server.folder, "config.yaml").write_text(f"poll_interval: {INTERVAL}\n", encoding="utf-8")
        new_bench.env["AGENTLAB_CONFIG"] = f"{server.folder}/config.yaml"
        yield new_bench


def count_requests(bench: Bench, module: str, **options: Any) -> Counter[str]:
    """Run a playbook with this one task, and return its requests by kind."""
    before = bench.server.read_request_counts()
    bench.run_ours(write_playbook(bench.folder, module, make_play({f"agentlab.proxmox.{module}": options})))
    return bench.server.read_request_counts() - before


def test_row_4_prune_of_a_thousand_vanished_vms_asks_five_things(bench: Bench) -> None:
    bench.reset_cluster(0)
    bench.write_records(1000, "TIMEOUT")
    assert count_requests(bench, "agentlab_prune") == {**ONCE, "GET /cluster/resources": 1}


@pytest.mark.parametrize(
    ("state", "status", "most", "extra"),
    [
        ("STOPPED", "stopped", 3.4, {}),
        ("RUNNING", "running", 5.0, {"POST /nodes/{node}/qemu/{vmid}/status/stop": VM_COUNT}),
    ],
)
def test_row_5_requests_of_each_destroyed_vm(
    bench: Bench, state: str, status: str, most: float, extra: dict[str, int]
) -> None:
    """Its configuration is read, then written with what was judged, then it is deleted: never less, and nothing else
    but the shared looks at tasks.
    """
    bench.reset_cluster(status=status)
    bench.write_records(state=state)
    seconds = bench.run_ours(bench.write_destroy_playbook())
    counts = bench.server.read_request_counts()
    # Quorum counts as known for some seconds.
    quorum = counts.pop("GET /cluster/ha/status/current")
    assert 1 <= quorum <= seconds / cluster._STATUS_SECONDS + 1
    looks = sum(counts.pop(kind, 0) for kind in LOOKS)
    each = dict.fromkeys(
        (
            f"{method} /nodes/{{node}}/qemu/{{vmid}}{rest}"
            for method, rest in (("GET", "/config"), ("PUT", "/config"), ("DELETE", ""))
        ),
        VM_COUNT,
    )
    assert {**counts, "GET /cluster/ha/status/current": 1} == {**ONCE, **each, **extra}
    assert bench.server.read_state()["vms"] == 1 and bench.server.read_state()["most_tasks"] <= IN_FLIGHT
    assert 1 <= looks <= seconds / INTERVAL + 1
    # Four turns of sixteen, each waited for (twice when it is stopped first): room enough for what the row allows.
    assert (sum(counts.values()) + (8 if extra else 4) * 2) / VM_COUNT <= most


def test_row_6_what_is_absent_already_costs_no_request(bench: Bench) -> None:
    bench.reset_cluster(0)
    bench.write_records(state="DESTROYED")
    assert count_requests(bench, "agentlab_sandbox", vmids=bench.vmids, state="absent", force=True) == {}


def test_rows_7_8_and_9_reading(bench: Bench) -> None:
    bench.reset_cluster(5000)
    bench.write_records(5000, "RUNNING")
    without_requests = [
        {"agentlab.proxmox.agentlab_sandbox_info": {"vmid": FIRST_VMID}},
        {"agentlab.proxmox.agentlab_lease": {"vmid": FIRST_VMID, "ttl": "2h"}},
    ]
    options = {"vmid": FIRST_VMID, "verify": True, "verify_identity": False}
    with_one_request = {"agentlab.proxmox.agentlab_sandbox_info": options}
    bench.run_ours(write_playbook(bench.folder, "reading", make_play(*without_requests, with_one_request)))
    assert bench.server.read_request_counts() == {"GET /cluster/resources": 1}
    # Quorum first, so that the list may count as a proof of what it lacks.
    assert count_requests(bench, "agentlab_sandbox_info", verify=True, verify_identity=False) == {
        "GET /cluster/resources": 1,
        "GET /cluster/ha/status/current": 1,
    }


def test_row_14_payload_of_every_module(bench: Bench) -> None:
    sizes = dict(bench.call_in_process("payload.measure_modules"))
    ping_size = sizes.pop("ansible.builtin.ping")
    assert set(sizes) == {path.stem for path in (ROOT / "plugins/modules").glob("*.py")} and ping_size > 100_000
    assert {name: size for name, size in sizes.items() if size > payload.LIMIT} == {}


@pytest.mark.parametrize("cloud_init", [False, True])
def test_row_17_requests_of_each_creation(bench: Bench, cloud_init: bool) -> None:
    """Each VM is judged before every write, and cloud-init costs nothing; the rest is asked once for all of them."""
    more = creating.CLOUD_INIT if cloud_init else {}
    _each, counts = creating.count_requests_each(bench, **creating.PLAIN, **more)
    looks = sum(counts.pop(kind, 0) for kind in LOOKS)
    vm = "/nodes/{node}/qemu/{vmid}"
    writes = (f"POST {vm}/clone", f"PUT {vm}/config", f"PUT {vm}/resize", f"POST {vm}/status/start")
    assert {kind: counts.pop(kind) for kind in writes} == dict.fromkeys(writes, creating.COUNT)
    # One more is the template's.
    assert counts.pop(f"GET {vm}/config") == 3 * creating.COUNT + 1
    assert set(counts) == {"GET /cluster/resources", "GET /cluster/status", "GET /nodes/{node}/certificates/info"}
    assert sum(counts.values()) <= 4
    assert looks >= 1


def test_the_page_is_made_of_the_results() -> None:
    """docs/performance.md has every row of the last measurement, as benchmarks/results.json has it."""
    results = report.load_results()
    text = (ROOT / "docs/performance.md").read_text()
    for section in (
        report.format_conditions(results),
        report.format_table(results),
        report.draw_text_plot(results),
        report.format_lever_table(results),
        report.format_scale_table(results),
    ):
        assert section in text, "run benchmarks/report.py"


def test_three_controller_processes_spread_sandboxes_over_sixteen_nodes() -> None:
    """The benchmark does it with 1,000 creations."""
    result = placement_simulation.run_processes(creations=32)
    assert result["creations"] == 32 and result["most"] - result["least"] <= 1, result


def test_a_thousand_simulated_creations_of_three_controllers_differ_by_one() -> None:
    result = placement_simulation.simulate_creations(seed=7)
    assert result["most"] - result["least"] <= 1
    # Without the reservations of the others it would not: the figures are up to ten seconds old.
    alone = placement_simulation.simulate_creations(seed=7, shared=False)
    assert alone["most"] - alone["least"] > 1
