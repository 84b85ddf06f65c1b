# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Row 11: transitions written one by one and in bulk, and what a bulk run loses that is killed.

    python benchmarks/commits.py DATABASE COUNT

It writes COUNT transitions to a new database, and prints the VMID of each sandbox once its transition is written. Row
11 kills this run.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, parallel, states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database
from field import create_database
from harness import Bench
from judging import Row, divide_medians, make_row

# The run that is killed writes so many transitions in one transaction before it prints their VMIDs.
CHUNK = 50


def measure_commits(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 11: a thousand transitions in bulk and one by one, durable each, and what a killed run loses."""
    count = 1000
    bulk, one_by_one = bench.measure_by_turns(
        lambda: measure_bulk(f"{bench.folder}/bulk.db", count),
        lambda: measure_one_by_one(f"{bench.folder}/single.db", count),
    )
    lost, reported = count_lost_by_kill(f"{bench.folder}/killed.db")
    share = divide_medians(bulk, one_by_one)
    return [
        make_row(
            "11",
            f"{count:,} transitions in bulk, against one by one, at full durability",
            "at most 1/10 of the time, nothing lost on kill -9",
            f"1/{1 / share:.1f}; {lost} of {reported} lost",
            99.0 if lost else share * 10,
            {"bulk": bulk, "one by one": one_by_one},
        )
    ]


def measure_bulk(path: str, count: int) -> float:
    """Write so many transitions to a new database in one transaction, each a step of its own; return the seconds."""
    records, claimed = _create_claimed_sandboxes(path, count)
    began = time.perf_counter()
    with records.db.group_writes():
        for sandbox, claim in claimed:
            _write_transition(records, sandbox, claim)
    seconds = time.perf_counter() - began
    assert len(records.find_all([states.STOPPED])) == count
    records.db.close()
    return seconds


def measure_one_by_one(path: str, count: int) -> float:
    """Write so many transitions to a new database, each in a transaction of its own, and return the seconds."""
    records, claimed = _create_claimed_sandboxes(path, count)
    began = time.perf_counter()
    for sandbox, claim in claimed:
        _write_transition(records, sandbox, claim)
    seconds = time.perf_counter() - began
    records.db.close()
    return seconds


def count_lost_by_kill(path: str, count: int = 3000) -> tuple[int, int]:
    """Kill (-9) a bulk run of so many transitions after a third of them.

    Returns how many transitions that run reported as written and the database does not have, and how many it reported.
    """
    child = subprocess.Popen([sys.executable, __file__, path, str(count)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    reported = [int(child.stdout.readline()) for _number in range(count // 3)]
    child.send_signal(signal.SIGKILL)
    # The last line may be cut.
    reported += [int(line) for line in child.stdout if line.endswith("\n")]
    child.wait(10)
    records = Records(Database(path), clock.SystemClock(), "benchmark")
    written = {sandbox.vmid for sandbox in records.find_all([states.STOPPED])}
    records.db.close()
    return len(set(reported) - written), len(reported)


def write_chunks(path: str, count: int) -> None:
    """Write so many transitions to a new database, CHUNK in a transaction, and print the VMIDs after each one."""
    records, claimed = _create_claimed_sandboxes(path, count)
    for begin in range(0, len(claimed), CHUNK):
        with records.db.group_writes():
            vmids = [_write_transition(records, *pair) for pair in claimed[begin : begin + CHUNK]]
        sys.stdout.write("".join(f"{vmid}\n" for vmid in vmids))
        sys.stdout.flush()


def _create_claimed_sandboxes(path: str, count: int) -> tuple[Records, list[tuple[Sandbox, Claim]]]:
    """Create a database with so many running sandboxes, and claim them.

    Returns the records, and each sandbox with its claim.
    """
    create_database("00", path, count, "RUNNING")
    records = Records(Database(path), clock.SystemClock(), "benchmark")
    sandboxes = records.find_all()
    claims = parallel.run_each(lambda sandbox: records.claim(sandbox.uuid, "stop"), sandboxes, 64)
    return records, list(zip(sandboxes, claims, strict=True))


def _write_transition(records: Records, sandbox: Sandbox, claim: Claim) -> int:
    """Write that a running sandbox is stopped, and return its VMID."""
    return records.change(claim, sandbox, "stop", to=states.STOPPED, outcome="done", finish=True).vmid


if __name__ == "__main__":
    write_chunks(sys.argv[1], int(sys.argv[2]))
