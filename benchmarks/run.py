# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure us and the peers side by side; print the table, write it, its plot and the single values.

What is compared runs interleaved, the medians are taken, and only ratios within one run are judged. A row that fails
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

import creating
import daemon
import peers
import report
import rows
import scale
import shipping
from field import Canned, field

GROUPS: dict[str, tuple[tuple[str, ...], Callable[[rows.Bench, set[str]], list[rows.Row]]]] = {
    "counting": (("4", "5"), rows.counting),
    "loading": (("14",), rows.loading),
    "single": (("7", "8"), rows.single),
    "listing": (("9",), rows.listing),
    "history": (("10",), rows.history),
    "committing": (("11",), rows.committing),
    "daemon": (("12",), daemon.serving),
    "growing": (("13",), rows.growing),
    "repeating": (("6",), rows.repeating),
    "destroying": (("1", "2", "3", "16"), rows.destroying),
    "remote": (("15",), shipping.over_ssh),
    "creating": (("17",), creating.many),
    "creating one": (("18",), creating.one),
    "local backend": (("20",), creating.local_backend),
    "command line": (("19",), daemon.command_line),
    "ten thousand": (("21",), daemon.ten_thousand),
    "levers": (("levers",), scale.levers),
    "scale": (("scale",), scale.sizes),
}
ALL = {number for numbers, _measure in GROUPS.values() for number in numbers}


class Others:
    """How much of the machine was busy with something else meanwhile, in cores."""

    def __init__(self, server: Canned) -> None:
        self._server = server
        self._began = time.monotonic()
        self._busy, self._ours = self._times()

    def _times(self) -> tuple[float, float]:
        import psutil

        found = psutil.cpu_times()
        ours = sum(
            one.ru_utime + one.ru_stime
            for one in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        return found.user + found.nice + found.system + found.irq + found.softirq, ours + self._server.cpu_seconds()

    @property
    def cores(self) -> float:
        busy, ours = self._times()
        return max(0.0, (busy - self._busy - (ours - self._ours)) / (time.monotonic() - self._began))


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=int, default=5, help="how often each thing is measured")
    asked.add_argument(
        "--rows", default="", help="rows to measure, such as '4 5 12'; 'levers' and 'scale' are two more; default: all"
    )
    asked.add_argument("--most", type=int, default=5000, help="the most VMs of row 13")
    given = asked.parse_args()
    wanted = set(given.rows.replace(",", " ").split()) or ALL
    if given.runs < 1 or wanted - ALL:
        asked.error(f"rows: {', '.join(sorted(ALL, key=report.order))}; runs: 1 or more")
    began = time.monotonic()
    known = report.load()
    failed = False
    with field() as server:
        bench = rows.Bench(server, given.runs, peers.fetch(), max(200, given.most))
        for numbers, measure in GROUPS.values():
            if not wanted & set(numbers):
                continue
            others = Others(server)
            try:
                found = measure(bench, wanted)
            except Exception as error:
                failed = True
                traceback.print_exc()
                why = str(error).strip() or type(error).__name__
                found = [{"row": number, "failed": why[-400:]} for number in numbers if number in wanted]
            for row in found:
                if row["row"] not in wanted:
                    continue
                known["rows"][row["row"]] = {
                    "runs": given.runs,
                    **row,
                    "others": round(others.cores, 2),
                    "on": datetime.date.today().isoformat(),
                }
                print(report.line(row), flush=True)
            known["machine"] = {**machine(), "community.proxmox": peers.versions()}
            report.save(known)
    # As it was saved: the page can be made of that again.
    known = report.load()
    report.write(known)
    print(
        f"\n{report.table(known)}\n\n{report.text_plot(known)}\n\nMeasured within {time.monotonic() - began:.0f} s; "
        "written to docs/performance.md, docs/performance.png and benchmarks/results.json"
    )
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """What kind of machine it was, and nothing that tells which."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), platform.machine())
    memory = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemTotal")
    )
    import ansible

    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "memory_gb": round(memory / 2**20),
        "python": platform.python_version(),
        "ansible-core": ansible.__version__,
        "kernel": platform.release().split("-")[0],
        "architecture": platform.machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
