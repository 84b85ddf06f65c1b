# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure records on PostgreSQL beside records in SQLite, by turns on one machine; print the medians as a table.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests"), str(REPO / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Ending
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.transfer import copy_records
from field import measure_seconds

from support.postgres import PostgresServer
from support.scale import LIVE, fill_records

TRANSITIONS = 1000
COPIED_RECORDS = 100_000
# Title in the printed table -> the query.
QUERIES: dict[str, Callable[[Context], object]] = {
    "list of 1,000 live": lambda ctx: ctx.records.find_all(),
    "plan of a prune": lambda ctx: prune.select(ctx, prune.Selection(older_than=86400)),
    "next lease": lambda ctx: overview.read_next_lease_end(ctx.records),
}


def measure_queries(contexts: dict[str, Context], runs: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of ``runs`` runs of each query on each engine, by title and engine."""
    times: dict[str, dict[str, list[float]]] = {title: {engine: [] for engine in contexts} for title in QUERIES}
    for _run in range(runs + 1):
        for title, query in QUERIES.items():
            for engine, ctx in contexts.items():
                times[title][engine].append(measure_seconds(functools.partial(query, ctx)))
    # The first run prepares statements and fills caches.
    return {
        title: {engine: statistics.median(seconds[1:]) for engine, seconds in by_engine.items()}
        for title, by_engine in times.items()
    }


def measure_transitions(contexts: dict[str, Context], runs: int) -> dict[str, float]:
    """Return the median seconds of 1,000 transitions in bulk on each engine.

    They are written as the end of a destroy of many sandboxes is. Every other run writes them back.
    """
    times: dict[str, list[float]] = {engine: [] for engine in contexts}
    for run in range(runs):
        for engine, ctx in contexts.items():
            records = ctx.records
            before, after = (states.RUNNING, states.STOPPED) if run % 2 == 0 else (states.STOPPED, states.RUNNING)
            sandboxes = records.find_all([before])[:TRANSITIONS]
            assert len(sandboxes) >= LIVE // 2, len(sandboxes)
            endings = [Ending(records.claim(sandbox.uuid, "stop"), "measured", {}) for sandbox in sandboxes]

            def write_endings(records: Any = records, endings: Any = endings, after: str = after) -> None:
                with records.db.group_writes():
                    changed = records.finish_all(endings, "stop", after)
                assert None not in changed

            times[engine].append(measure_seconds(write_endings) / len(endings) * TRANSITIONS)
    return {engine: statistics.median(seconds) for engine, seconds in times.items()}


def measure_plays(databases: dict[str, str], folder: Path, runs: int) -> dict[str, float]:
    """Return the median seconds of a play that reads one sandbox from the records of each engine, and of a ping play.

    ``databases``: the path or connection string of each engine. The module is shipped, as ping is.
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
        "ANSIBLE_COLLECTIONS_PATH": str(REPO / ".collections"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
    }
    times: dict[str, list[float]] = {name: [] for name in plays}
    for _run in range(runs):
        for name in plays:
            command = [str(REPO / ".venv/bin/ansible-playbook"), str(folder / f"{name}.yml")]
            run = functools.partial(subprocess.run, command, env=environment, check=True, capture_output=True)
            times[name].append(measure_seconds(run))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_copies(server: PostgresServer, folder: Path) -> tuple[float, float]:
    """Return the seconds that 100,000 records take from SQLite into PostgreSQL, and back into SQLite.

    Both results are printed, so that their checksums can be compared.
    """
    source, back, uri = str(folder / "moved.db"), str(folder / "back.db"), server.uri()
    fill_records(source, COPIED_RECORDS - LIVE, folder).close()
    results: list[Any] = []
    seconds_in = measure_seconds(lambda: results.append(copy_records(source, uri)))
    seconds_out = measure_seconds(lambda: results.append(copy_records(uri, back)))
    print(f"copied: {results[0]}; {results[1]}", flush=True)
    return seconds_in, seconds_out


def main() -> int:
    """Measure everything on a new PostgreSQL server and a new SQLite database, and print the table. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=int, default=1_000_000, help="destroyed records beside the live ones")
    parser.add_argument("--runs", type=int, default=5, help="how often each thing is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentlab-engines-") as name:
        folder = Path(name)
        server = PostgresServer().create()
        try:
            server.configure(fsync="on")
            server.stop("fast")
            server.start()
            databases = {"sqlite": str(folder / "agentlab.db"), "postgresql": server.uri()}
            contexts = {engine: fill_records(address, options.history, folder) for engine, address in databases.items()}
            contexts["postgresql"].database.write(lambda conn: conn.execute("ANALYZE") and None)
            queries = measure_queries(contexts, options.runs)
            plays = measure_plays(databases, folder, options.runs)
            transitions = measure_transitions(contexts, options.runs)
            for ctx in contexts.values():
                ctx.close()
            seconds_in, seconds_out = measure_copies(server, folder)
        finally:
            server.destroy()
    print(f"| with {options.history:,} destroyed records | SQLite | PostgreSQL | ratio |\n|---|---|---|---|")
    for title, seconds in {**queries, "1,000 transitions in bulk": transitions}.items():
        sqlite_ms, postgresql_ms = seconds["sqlite"] * 1000, seconds["postgresql"] * 1000
        print(f"| {title} | {sqlite_ms:.1f} ms | {postgresql_ms:.1f} ms | {postgresql_ms / sqlite_ms:.1f} |")
    sqlite, postgresql = (plays[engine] - plays["ping"] for engine in databases)
    print(
        f"| a play that the records answer, beyond a ping play of {plays['ping']:.2f} s | {sqlite * 1000:.0f} ms | "
        f"{postgresql * 1000:.0f} ms | {postgresql / sqlite:.2f} |"
    )
    print(f"| {COPIED_RECORDS:,} records moved in, and back out | {seconds_out:.1f} s | {seconds_in:.1f} s | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
