# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records on PostgreSQL beside records in SQLite, on one machine, interleaved; medians are printed as a table.

The server runs on loopback with its durable defaults (fsync and synchronous commit on).

    python benchmarks/engines.py [--history 1000000] [--runs 5]      # or: make bench-engines
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Ending
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.transfer import copy_records

from support.postgres import PostgresServer
from support.scale import LIVE, fill_records

TRANSITIONS = 1000
COPIED = 100_000
QUERIES: dict[str, Callable[[Context], object]] = {
    "list of 1,000 live": lambda ctx: ctx.records.find_all(),
    "plan of a prune": lambda ctx: prune.select(ctx, prune.Selection(older_than=86400)),
    "next lease": lambda ctx: overview.read_next_lease_end(ctx.records),
}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_queries(contexts: dict[str, Context], runs: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each query on each engine."""
    times: dict[str, dict[str, list[float]]] = {what: {engine: [] for engine in contexts} for what in QUERIES}
    for _run in range(runs + 1):
        for what, query in QUERIES.items():
            for engine, ctx in contexts.items():
                times[what][engine].append(timed(functools.partial(query, ctx)))
    # The first run prepares statements and fills caches.
    return {
        what: {engine: statistics.median(seconds[1:]) for engine, seconds in by_engine.items()}
        for what, by_engine in times.items()
    }


def measure_transitions(contexts: dict[str, Context], runs: int) -> dict[str, float]:
    """Return the median seconds of 1,000 transitions in bulk on each engine, written as a destroy of many ends."""
    times: dict[str, list[float]] = {engine: [] for engine in contexts}
    for run in range(runs):
        for engine, ctx in contexts.items():
            records = ctx.records
            before, after = (states.RUNNING, states.STOPPED) if run % 2 == 0 else (states.STOPPED, states.RUNNING)
            chosen = records.find_all([before])[:TRANSITIONS]
            assert len(chosen) >= LIVE // 2, len(chosen)
            items = [Ending(records.claim(sandbox.uuid, "stop"), "measured", {}) for sandbox in chosen]

            def write(records: Any = records, items: Any = items, after: str = after) -> None:
                with records.db.group_writes():
                    moved = records.finish_all(items, "stop", after)
                assert None not in moved

            times[engine].append(timed(write) / len(items) * TRANSITIONS)
    return {engine: statistics.median(seconds) for engine, seconds in times.items()}


def measure_plays(databases: dict[str, str], folder: Path, runs: int) -> dict[str, float]:
    """Return the median seconds of a ping play, and of a play that asks the records for a sandbox on each engine.

    The module is shipped, as ping is.
    """
    plays: dict[str, dict[str, Any]] = {"ping": {"ansible.builtin.ping": {}}}
    for engine, database in databases.items():
        plays[engine] = {
            "agentlab.proxmox.agentlab_sandbox_info": {"database": database, "vmid": 1500, "api_host": "127.0.0.1"}
        }
    for name, task in plays.items():
        play = [
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {"agentlab_in_place": False},
                "tasks": [task],
            }
        ]
        (folder / f"{name}.yml").write_text(json.dumps(play), encoding="utf-8")
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
    }
    times: dict[str, list[float]] = {name: [] for name in plays}
    for _run in range(runs):
        for name in plays:
            command = [str(ROOT / ".venv/bin/ansible-playbook"), str(folder / f"{name}.yml")]
            run = functools.partial(subprocess.run, command, env=environment, check=True, capture_output=True)
            times[name].append(timed(run))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_copies(server: PostgresServer, folder: Path) -> tuple[float, float]:
    """Return the seconds that 100,000 records take into PostgreSQL and back; both sides must have one checksum."""
    source, back, uri = str(folder / "moved.db"), str(folder / "back.db"), server.uri()
    fill_records(source, COPIED - LIVE, folder).close()
    results: list[Any] = []
    there = timed(lambda: results.append(copy_records(source, uri)))
    again = timed(lambda: results.append(copy_records(uri, back)))
    print(f"copied: {results[0]}; {results[1]}", flush=True)
    return there, again


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--history", type=int, default=1_000_000, help="destroyed records beside the live ones")
    asked.add_argument("--runs", type=int, default=5, help="how often each thing is measured")
    wanted = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentlab-engines-") as name:
        folder = Path(name)
        server = PostgresServer().create()
        try:
            server.configure(fsync="on")
            server.stop("fast")
            server.start()
            databases = {"sqlite": str(folder / "agentlab.db"), "postgresql": server.uri()}
            contexts = {engine: fill_records(address, wanted.history, folder) for engine, address in databases.items()}
            contexts["postgresql"].database.write(lambda conn: conn.execute("ANALYZE") and None)
            queries = measure_queries(contexts, wanted.runs)
            plays = measure_plays(databases, folder, wanted.runs)
            transitions = measure_transitions(contexts, wanted.runs)
            for ctx in contexts.values():
                ctx.close()
            copies = measure_copies(server, folder)
        finally:
            server.destroy()
    print(f"| with {wanted.history:,} destroyed records | SQLite | PostgreSQL | ratio |\n|---|---|---|---|")
    for what, seconds in {**queries, "1,000 transitions in bulk": transitions}.items():
        small, large = seconds["sqlite"] * 1000, seconds["postgresql"] * 1000
        print(f"| {what} | {small:.1f} ms | {large:.1f} ms | {large / small:.1f} |")
    small, large = (plays[engine] - plays["ping"] for engine in databases)
    print(
        f"| a play that the records answer, beyond a ping play of {plays['ping']:.2f} s | {small * 1000:.0f} ms | "
        f"{large * 1000:.0f} ms | {large / small:.2f} |"
    )
    print(f"| {COPIED:,} records moved in, and back out | {copies[1]:.1f} s | {copies[0]:.1f} s | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
