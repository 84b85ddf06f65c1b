# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Transitions written one by one and in bulk, and what is left of a bulk run that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / ".collections")]

import field
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, parallel, states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

# So many are written together before the child that is killed says so.
CHUNK = 50


class _Nobody:
    fingerprint = "00"


def _records(path: str, count: int) -> tuple[Records, list[tuple[Any, Claim]]]:
    """A database with so many claimed sandboxes."""
    field.seed(_Nobody(), path, count, "RUNNING")  # type: ignore[arg-type]
    records = Records(Database(path), clock.SystemClock(), "benchmark")
    found = records.find_all()
    claims = parallel.run_each(lambda one: records.claim(one.uuid, "stop"), found, 64)
    return records, list(zip(found, claims, strict=True))


def _transition(records: Records, item: tuple[Any, Claim]) -> int:
    sandbox, claim = item
    return records.change(claim, sandbox, "stop", to=states.STOPPED, outcome="done", finish=True).vmid


def bulk(path: str, count: int) -> float:
    """Seconds for all of them, each a step of its own in one transaction."""
    records, items = _records(path, count)
    began = time.perf_counter()
    with records.db.group_writes():
        for item in items:
            _transition(records, item)
    took = time.perf_counter() - began
    assert len(records.find_all([states.STOPPED])) == count
    records.db.close()
    return took


def one_by_one(path: str, count: int) -> float:
    """Seconds for all of them, one after the other."""
    records, items = _records(path, count)
    began = time.perf_counter()
    for item in items:
        _transition(records, item)
    took = time.perf_counter() - began
    records.db.close()
    return took


def killed(path: str, count: int = 3000) -> tuple[int, int]:
    """Kill -9 in the middle of a bulk run: of those that were said to be written, how many are not (first number)."""
    child = subprocess.Popen([sys.executable, __file__, path, str(count)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _number in range(count // 3)]
    child.send_signal(signal.SIGKILL)
    told += [int(line) for line in child.stdout if line.endswith("\n")]
    child.wait(10)
    records = Records(Database(path), clock.SystemClock(), "benchmark")
    written = {one.vmid for one in records.find_all([states.STOPPED])}
    records.db.close()
    return len(set(told) - written), len(told)


if __name__ == "__main__":
    _found, _items = _records(sys.argv[1], int(sys.argv[2]))
    for _begin in range(0, len(_items), CHUNK):
        with _found.db.group_writes():
            _written = [_transition(_found, _item) for _item in _items[_begin : _begin + CHUNK]]
        sys.stdout.write("".join(f"{_vmid}\n" for _vmid in _written))
        sys.stdout.flush()
