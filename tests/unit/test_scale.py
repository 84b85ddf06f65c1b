# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""History costs nothing: what is done at every tick, and what a list asks, takes as many steps of SQLite among many
destroyed records as among none.

Steps are counted and plans are read; how long it takes on this machine is no part of it. What does not grow with 20,000
does not with 100,000.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, overview

from support.scale import HISTORY, WORK, fill_records

EVERY = 50


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Context, Context]]:
    """The same live records without history, and with it."""
    folders = [(tmp_path_factory.mktemp(name), count) for name, count in (("young", 0), ("old", HISTORY))]
    made = [fill_records(str(folder / "agentlab.db"), count, folder) for folder, count in folders]
    yield made[0], made[1]
    for one in made:
        one.close()


def connections(ctx: Context) -> list[sqlite3.Connection]:
    return [ctx.database._reader, ctx.database._writer]


def steps(ctx: Context, work: Callable[[Context], object]) -> int:
    """Steps of SQLite's virtual machine, counted in fifties."""
    count = 0

    def step() -> int:
        nonlocal count
        count += EVERY
        return 0

    # A first time, so that statements are prepared and nothing is to be noted any more.
    work(ctx)
    for conn in connections(ctx):
        conn.set_progress_handler(step, EVERY)
    try:
        work(ctx)
    finally:
        for conn in connections(ctx):
            conn.set_progress_handler(None, 0)
    return count


def statements(ctx: Context, work: Callable[[Context], object]) -> list[str]:
    told: list[str] = []
    for conn in connections(ctx):
        conn.set_trace_callback(told.append)
    try:
        work(ctx)
    finally:
        for conn in connections(ctx):
            conn.set_trace_callback(None)
    return [one for one in told if re.match(r"SELECT|UPDATE|DELETE", one)]


@pytest.mark.parametrize("what", WORK)
def test_history_adds_no_steps(contexts: tuple[Context, Context], what: str) -> None:
    young, old = (steps(ctx, WORK[what]) for ctx in contexts)
    # One search in a deeper tree, and 20 events of a VMID instead of one; not 20,000 records.
    assert old <= young + 1500, (young, old)


@pytest.mark.parametrize("what", WORK)
def test_no_plan_walks_through_history(contexts: tuple[Context, Context], what: str) -> None:
    ctx = contexts[1]
    asked = statements(ctx, WORK[what])
    assert asked
    for statement in asked:
        for row in ctx.database.read(f"EXPLAIN QUERY PLAN {statement}"):
            detail = row["detail"]
            # What is walked through whole must be an index of live records, or a table without history.
            if detail.startswith("SCAN"):
                # sqlite_sequence has one row a table.
                small = r"^SCAN (o|operations|claims|workspaces|w|CONSTANT ROW|c|sqlite_sequence)\b"
                assert re.search(rf"USING (COVERING )?INDEX live_|{small}", detail), (statement, detail)


def test_a_plan_that_walks_through_history_would_be_seen(contexts: tuple[Context, Context]) -> None:
    young, old = (steps(ctx, lambda one: overview.count_by_state(one.records)) for ctx in contexts)
    # One step for each record at least; how many more depends on SQLite's release (two with 3.46).
    assert old > young + HISTORY, (
        "a count of all that were destroyed reads its whole index: for status and metrics, not for a tick"
    )
    plan = contexts[1].database.read("EXPLAIN QUERY PLAN SELECT uuid FROM sandboxes WHERE reason = 'x'")
    assert plan[0]["detail"].startswith("SCAN sandboxes") and "live_" not in plan[0]["detail"]


def test_retention_reads_only_what_it_removes(contexts: tuple[Context, Context]) -> None:
    ctx = contexts[1]
    assert steps(ctx, lambda one: history.forget(one.records, 90 * 86400, 500)) < 500, "nothing is old enough"
    # Fifty steps a record and its event are far from a scan for each.
    assert steps(ctx, lambda one: history.forget(one.records, 60, 500)) < 500 * 400
    assert ctx.database.read("SELECT count(*) FROM sandboxes WHERE state = 'DESTROYED'")[0][0] == HISTORY - 1000
