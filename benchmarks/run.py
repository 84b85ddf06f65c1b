# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure us and the peers side by side; print the table, write it, its plot and the single values.

Runs that are compared alternate, the medians are taken, and only ratios within one run are judged. A row that fails
says why, and the others go on.

    python benchmarks/run.py [--runs 5] [--rows "1 2 scale"]      # or: make bench ROWS="1 2"
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / ".collections")]

import commits
import creating
import daemon
import destroying
import peers
import reading
import report
import scale
import shipping
from field import CannedProxmox, run_canned_proxmox
from harness import Bench
from judging import Row

# Name of a group -> the numbers of its rows, and the function that measures them.
GROUPS: dict[str, tuple[tuple[str, ...], Callable[[Bench, set[str]], list[Row]]]] = {
    "counting": (("4", "5"), destroying.count_requests),
    "loading": (("14",), reading.measure_payload),
    "single": (("7", "8"), reading.measure_single_reads),
    "listing": (("9",), reading.measure_list),
    "history": (("10",), reading.measure_history),
    "committing": (("11",), commits.measure_commits),
    "daemon": (("12",), daemon.measure_daemon),
    "growing": (("13",), destroying.measure_growth),
    "repeating": (("6",), destroying.measure_second_destroy),
    "destroying": (("1", "2", "3", "16"), destroying.measure_destroys),
    "remote": (("15",), shipping.measure_over_ssh),
    "creating": (("17",), creating.measure_many_creations),
    "creating one": (("18",), creating.measure_single_creation),
    "local backend": (("20",), creating.measure_local_backend),
    "command line": (("19",), daemon.measure_command_line),
    "ten thousand": (("21",), daemon.measure_many_sandboxes),
    "levers": (("levers",), scale.measure_levers),
    "scale": (("scale",), scale.measure_sizes),
}
ALL_ROWS = {number for numbers, _measure in GROUPS.values() for number in numbers}


class OtherWork:
    """The processor time that other programs on this machine use, from the moment that this object is made."""

    def __init__(self, server: CannedProxmox) -> None:
        self._server = server
        self._began = time.monotonic()
        self._busy, self._ours = self._read_times()

    def _read_times(self) -> tuple[float, float]:
        """Return the processor time of the whole machine, and of this run with its programs, in seconds."""
        import psutil

        machine = psutil.cpu_times()
        ours = sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        return busy, ours + self._server.read_cpu_seconds()

    @property
    def cores(self) -> float:
        """Return how many cores were busy with other work since, on average."""
        busy, ours = self._read_times()
        return max(0.0, (busy - self._busy - (ours - self._ours)) / (time.monotonic() - self._began))


def main() -> int:
    """Measure the rows of the command line, and write the results and the page. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how often each thing is measured")
    parser.add_argument(
        "--rows", default="", help="rows to measure, such as '4 5 12'; 'levers' and 'scale' are two more; default: all"
    )
    parser.add_argument("--most", type=int, default=5000, help="the most VMs of row 13")
    options = parser.parse_args()
    wanted = set(options.rows.replace(",", " ").split()) or ALL_ROWS
    if options.runs < 1 or wanted - ALL_ROWS:
        parser.error(f"rows: {', '.join(sorted(ALL_ROWS, key=report.make_sort_key))}; runs: 1 or more")
    began = time.monotonic()
    results = report.load_results()
    failed = False
    with run_canned_proxmox() as server:
        bench = Bench(server, options.runs, peers.fetch_packages(), max(200, options.most))
        for numbers, measure in GROUPS.values():
            if not wanted & set(numbers):
                continue
            other_work = OtherWork(server)
            try:
                rows = measure(bench, wanted)
            except Exception as error:
                failed = True
                traceback.print_exc()
                why = str(error).strip() or type(error).__name__
                rows = [{"row": number, "failed": why[-400:]} for number in numbers if number in wanted]
            for row in rows:
                if row["row"] not in wanted:
                    continue
                results["rows"][row["row"]] = {
                    "runs": options.runs,
                    **row,
                    "others": round(other_work.cores, 2),
                    "on": datetime.date.today().isoformat(),
                }
                print(report.format_row(row), flush=True)
            results["machine"] = {**describe_machine(), "community.proxmox": peers.format_versions()}
            report.save_results(results)
    # Read what was saved, so that report.py makes the same page of it later.
    results = report.load_results()
    report.write_page(results)
    print(
        f"\n{report.format_table(results)}\n\n{report.draw_text_plot(results)}\n\n"
        f"Measured within {time.monotonic() - began:.0f} s; "
        "written to docs/performance.md, docs/performance.png and benchmarks/results.json"
    )
    return 1 if failed else 0


def describe_machine() -> dict[str, Any]:
    """Return what kind of machine this is, and nothing that identifies the machine: cores, memory in GB, versions."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), platform.machine())
    memory_kb = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemTotal")
    )
    import ansible

    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "memory_gb": round(memory_kb / 2**20),
        "python": platform.python_version(),
        "ansible-core": ansible.__version__,
        "kernel": platform.release().split("-")[0],
        "architecture": platform.machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
