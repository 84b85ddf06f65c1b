# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""History costs nothing on PostgreSQL either: no tick and no list walks through the destroyed records.

The server's own statistics say how many rows of a table a session has read, and whether it walked through the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview

from support.engines import require_postgresql, server
from support.scale import HISTORY, LIVE, WORK, fill_records


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """Live records among many destroyed ones, on a server that knows how many there are."""
    require_postgresql()
    made = fill_records(server().uri(), HISTORY, tmp_path_factory.mktemp("old"))
    made.database.write(lambda conn: conn.execute("ANALYZE") and None)
    yield made
    made.close()


def rows_read(ctx: Context) -> tuple[int, int]:
    """Return how many rows of sandboxes and events were read by walking through a table, and by an index."""
    # Sessions report what they did once a second; these two do so now.
    ctx.database.read("SELECT pg_stat_force_next_flush()")
    ctx.database.write(lambda conn: conn.execute("SELECT pg_stat_force_next_flush()") and None)
    row = ctx.database.read(
        "SELECT sum(seq_tup_read) AS walked, sum(idx_tup_fetch) AS searched FROM pg_stat_user_tables "
        "WHERE relname IN ('sandboxes', 'events')"
    )[0]
    return int(row["walked"]), int(row["searched"])


def cost(ctx: Context, work: Callable[[Context], object]) -> tuple[int, int]:
    """Return the rows that the work reads, when it is done for the second time."""
    work(ctx)
    walked, searched = rows_read(ctx)
    work(ctx)
    after_walked, after_searched = rows_read(ctx)
    return after_walked - walked, after_searched - searched


@pytest.mark.parametrize("what", WORK)
def test_no_work_walks_through_history(ctx: Context, what: str) -> None:
    walked, searched = cost(ctx, WORK[what])
    assert walked == 0, f"{walked} rows were read by walking through sandboxes or events"
    # Each live record a few times at most; not the 20 destroyed ones of its VMID.
    assert searched <= 4 * LIVE, searched


def test_a_walk_through_history_would_be_seen(ctx: Context) -> None:
    walked, searched = cost(ctx, lambda one: one.database.read("SELECT uuid FROM sandboxes WHERE reason = 'x'"))
    assert walked >= HISTORY, (walked, searched)
    walked, searched = cost(ctx, lambda one: overview.count_by_state(one.records))
    assert walked + searched >= HISTORY, "a count of all that were destroyed is for status and metrics, not for a tick"
