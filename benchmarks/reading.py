# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows 7 to 10 and 14: what a run costs that only reads, lists among many records, and the size of the modules."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import payload
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from field import FIRST_VMID, measure_seconds, open_context, time_command
from harness import BIN, Bench
from judging import Row, divide_medians, make_at_most_row, make_row


def measure_single_reads(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure rows 7 and 8: a run that only reads the records, and a run with one request to Proxmox VE."""
    bench.reset_cluster(1)
    bench.write_records(1)
    from_records = bench.write_info_playbook("records", vmid=FIRST_VMID)
    from_proxmox = bench.write_info_playbook("once", vmid=FIRST_VMID, verify=True, verify_identity=False)
    bench.run_ours(from_records)
    records_requests = sum(bench.server.read_request_counts().values())
    bench.run_ours(from_proxmox)
    proxmox_requests = sum(bench.server.read_request_counts().values()) - records_requests
    records, records_shipped, proxmox, proxmox_shipped, ping = bench.measure_by_turns(
        lambda: bench.run_ours(from_records),
        lambda: bench.run_shipped(from_records),
        lambda: bench.run_ours(from_proxmox),
        lambda: bench.run_shipped(from_proxmox),
        bench.run_ping,
    )
    return [
        make_at_most_row(
            "7",
            "a run that the database alone answers, against ping",
            1.10,
            divide_medians(records, ping),
            "x",
            {"ours": records, "shipped": records_shipped, "ping": ping, "requests": records_requests},
            divide_medians(records_shipped, ping),
        ),
        make_at_most_row(
            "8",
            "a run with one Proxmox read, against ping",
            1.45,
            divide_medians(proxmox, ping),
            "x",
            {"ours": proxmox, "shipped": proxmox_shipped, "ping": ping, "requests": proxmox_requests},
            divide_medians(proxmox_shipped, ping),
        ),
    ]


def measure_list(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 9: compare 5,000 records with Proxmox VE's list of VMs, beside the peer that only lists the VMs."""
    count = 5000
    bench.reset_cluster(count)
    bench.write_records(count)
    info = bench.write_info_playbook("verify", verify=True, verify_identity=False)
    peer_info = bench.write_peer_info_playbook()
    ours, shipped, peer = bench.measure_by_turns(
        lambda: bench.run_ours(info), lambda: bench.run_shipped(info), lambda: bench.run_peer(peer_info)
    )
    bench.reset_cluster(count)
    bench.run_ours(info)
    requests = bench.server.read_request_counts()
    ratio, list_requests = divide_medians(ours, peer), requests["GET /cluster/resources"]
    return [
        make_row(
            "9",
            f"list {count:,} VMs' records verified against Proxmox, against `proxmox_vm_info`",
            "at most 1.0x, 1 request for the list",
            f"{ratio:.2f}x ({divide_medians(shipped, peer):.2f}x shipped), {list_requests} request for the list "
            f"({sum(requests.values())} in all)",
            max(ratio, float(list_requests)) if list_requests > 1 else ratio,
            {"ours": ours, "shipped": shipped, "peer": peer, "kinds": dict(requests)},
        )
    ]


def measure_history(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 10: list 200 live sandboxes, and plan their prune, among 1,000,000 destroyed ones."""
    live, history = 200, 1_000_000
    bench.reset_cluster(0)
    bench.write_records(live, "TIMEOUT", history=history)
    ctx = open_context(bench.server, bench.database)
    now = ctx.clock.now()
    columns = "uuid, vmid, name, state, lease_expires_at, state_changed_at"

    def scan_table() -> None:
        # What a list would cost without the partial indexes.
        rows = ctx.database.read(f"SELECT {columns} FROM sandboxes NOT INDEXED WHERE state || '' <> 'DESTROYED'")
        assert len(rows) == live

    def list_live() -> None:
        assert len(ctx.records.find_all()) == live

    def plan_prune() -> None:
        assert len(prune.select(ctx, prune.Selection())[0]) == live

    def read_next_lease() -> None:
        overview.read_next_lease_end(ctx.records)
        assert overview.list_expired(ctx.records, now - 86400) == []

    def open_and_plan() -> None:
        check_mode = open_context(bench.server, bench.database, dry_run=True)
        assert len(prune.select(check_mode, prune.Selection())[0]) == live
        check_mode.close()

    queries: tuple[Callable[[], Any], ...] = (scan_table, list_live, plan_prune, read_next_lease, open_and_plan)
    scans, lists, plans, ticks, check_modes = bench.measure_by_turns(
        *(functools.partial(measure_seconds, query) for query in queries)
    )
    ctx.close()
    share = max(divide_medians(lists, scans), divide_medians(plans, scans))
    tick = statistics.median(ticks)
    return [
        make_row(
            "10",
            "200 live among 1,000,000 historical records: list and prune planning, against a full scan",
            "at most 1/50; tick under 5 ms",
            f"1/{1 / share:.0f}; tick {tick * 1000:.2f} ms",
            max(share * 50, tick / 0.005),
            {
                "scan": scans,
                "list": lists,
                "plan": plans,
                "tick": ticks,
                "check mode, opened and planned": check_modes,
            },
        )
    ]


def measure_payload(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 14: bytes and files that Ansible sends for each module, and the seconds of ansible-doc."""
    # Ansible's own loader of collections must be the first in a process.
    sizes = dict(bench.call_in_process("payload.measure_modules"))
    ping_size = sizes.pop("ansible.builtin.ping")
    files = dict(bench.call_in_process("payload.count_files"))
    largest = max(sizes, key=lambda name: sizes[name])
    doc_ours, doc_ping = bench.measure_by_turns(
        lambda: time_command([str(BIN / "ansible-doc"), "agentlab.proxmox.agentlab_sandbox"], bench.env, bench.folder),
        lambda: time_command([str(BIN / "ansible-doc"), "ansible.builtin.ping"], bench.env, bench.folder),
    )
    return [
        make_row(
            "14",
            "collection loading: what a module adds to the payload that ansible-core ships for a ping",
            f"at most {payload.AIM / 1000:.0f} kB, {payload.AIM_FILES} files in all",
            f"{sizes[largest] / 1000:.0f} kB and {max(files.values())} files at most (`{largest}`), "
            f"{min(sizes.values()) / 1000:.0f} kB and {min(files.values())} at least; a ping is "
            f"{ping_size / 1000:.0f} kB; `ansible-doc` {divide_medians(doc_ours, doc_ping):.2f}x that of ping",
            max(sizes[largest] / payload.AIM, max(files.values()) / payload.AIM_FILES),
            {
                "bytes": sizes,
                "files": files,
                "ping": ping_size,
                "ansible-doc of ours": doc_ours,
                "ansible-doc of ping": doc_ping,
            },
        )
    ]
