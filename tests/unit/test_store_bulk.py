# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Changes of many records at once, on both engines: what they write, what they refuse, and how often they ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Ending, Records

from support.engines import ENGINES, new_address, require_postgresql, server

RANGE = (1000, 1999)
NOW = 10**9


@pytest.fixture(params=ENGINES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Records]:
    database = open_database(new_address(request.param, str(tmp_path / "agentlab.db")))
    yield Records(database, database.choose_clock(SystemClock()), "tester")
    database.close()


def reserve(store: Records, number: int) -> tuple[Claim, Sandbox]:
    uuid = f"00000000-0000-4000-8000-{number:012d}"
    sandbox = Sandbox(uuid=uuid, vmid=0, name=f"s{number}", state="REQUESTED", lease_expires_at=NOW)
    claim = store.reserve(sandbox, vmid=None, vmid_range=RANGE, occupied=set(), journal={})
    return claim, store.get(uuid)


def events(store: Records, sandbox: Sandbox) -> list[tuple[Any, ...]]:
    """Return the events of a sandbox after the first: operation, states, reason, evidence, task ids, outcome."""
    names = "operation, from_state, to_state, reason, evidence, upids, duration_ms, outcome, actor, vmid"
    return [tuple(row) for row in store.db.read(f"SELECT {names} FROM events WHERE sandbox_uuid = ?", sandbox.uuid)][1:]


def rows(store: Records) -> list[list[tuple[Any, ...]]]:
    return [
        [tuple(row) for row in store.db.read(f"SELECT * FROM {table} ORDER BY 1")]
        for table in ("sandboxes", "events", "claims", "operations")
    ]


def test_many_leases_end_and_one_that_was_renewed_does_not(store: Records) -> None:
    sandboxes = [reserve(store, number)[1] for number in range(4)]
    renewed = store.amend(sandboxes[1], "renew_lease", lease_expires_at=NOW + 900)
    changed = store.amend(sandboxes[2], "update", keepalive=1)
    moved = store.expire_all(sandboxes, NOW)
    assert [after and after.state for after in moved] == ["TIMEOUT", None, None, "TIMEOUT"]
    for before, after in zip(sandboxes, moved, strict=True):
        now = store.get(before.uuid)
        if after is None:
            assert now in (renewed, changed)
        else:
            assert after == now and (now.reason, now.state_changed_at) == ("lease_expired", NOW)
            assert events(store, now) == [
                ("expire", "REQUESTED", "TIMEOUT", "lease_expired", "{}", "[]", None, "done", "tester", now.vmid)
            ]
    assert store.expire_all([changed], NOW - 1) == [None], "its lease is not over"
    assert store.expire_all([], NOW) == []


def test_many_operations_end_and_a_lost_claim_writes_nothing(store: Records) -> None:
    (first, one), (lost, two), (closed, three), (last, four) = (reserve(store, number) for number in range(4))
    lost.fence -= 1
    store.change(closed, three, "destroy", to="DESTROYED", finish=True)
    closed = store.claim(three.uuid, "destroy")
    before = events(store, two), events(store, three)
    # Whatever happened to the record meanwhile: the claim counts.
    store.amend(four, "update", keepalive=1)
    endings = [Ending(claim, f"reason {n}", {"n": n}, ["UPID:1"], n) for n, claim in enumerate((first, lost, closed))]
    moved = store.finish_all([*endings, Ending(last, "gone", {})], "destroy", "DESTROYED")
    assert [after and after.vmid for after in moved] == [one.vmid, None, None, four.vmid]
    assert moved[0] == store.get(one.uuid) and moved[3] == store.get(four.uuid)
    event = ("destroy", "REQUESTED", "DESTROYED", "reason 0", json.dumps({"n": 0}), '["UPID:1"]', 0, "done", "tester")
    assert events(store, one) == [(*event, one.vmid)]
    assert (store.get(two.uuid), events(store, two), events(store, three)) == (two, *before)
    left = [row["sandbox_uuid"] for row in store.db.read("SELECT * FROM claims ORDER BY 1")]
    assert left == [two.uuid, three.uuid]
    assert [entry.sandbox_uuid for entry in store.list_unfinished()[0]] == [two.uuid]


@pytest.fixture
def on_server() -> Iterator[Records]:
    require_postgresql()
    database = open_database(server().uri())
    yield Records(database, database.choose_clock(SystemClock()), "tester")
    database.close()


@pytest.mark.parametrize("what", ["leases", "operations"])
def test_the_server_answers_as_seldom_for_many_as_for_few(
    on_server: Records, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import psycopg

    asked: list[str] = []
    for owner in (psycopg.Connection, psycopg.Cursor):
        for name in ("execute", "executemany"):
            real = getattr(owner, name, None)
            if real is None:
                continue

            def ask(self: Any, query: Any, *values: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
                asked.append(str(query))
                return real(self, query, *values, **options)

            monkeypatch.setattr(owner, name, ask)
    counts = []
    for begin, number in ((0, 3), (10, 40)):
        reserved = [reserve(on_server, begin + n) for n in range(number)]
        asked.clear()
        with on_server.db.group_writes():
            if what == "leases":
                moved = on_server.expire_all([sandbox for _claim, sandbox in reserved], NOW)
            else:
                endings = [Ending(claim, "gone", {}) for claim, _sandbox in reserved]
                moved = on_server.finish_all(endings, "destroy", "DESTROYED")
        assert None not in moved
        counts.append(len(asked))
    assert counts[0] == counts[1] <= 18, asked


def test_a_writer_without_the_lock_rolls_everything_back(on_server: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, _one), (second, two) = (reserve(on_server, number) for number in range(2))
    real = on_server._read_claimed
    database = on_server.db.path.rpartition("/")[2]

    def read(conn: Any, claims: Any) -> Any:
        sandboxes = real(conn, claims)
        server().execute(f"UPDATE sandboxes SET generation = generation + 1 WHERE uuid = '{two.uuid}'", database)
        return sandboxes

    monkeypatch.setattr(on_server, "_read_claimed", read)
    endings = [Ending(first, "gone", {}), Ending(second, "gone", {})]
    before = rows(on_server)[1:]
    with (
        pytest.raises(StoreError, match="did not wait for its turn .* nothing was written"),
        on_server.db.group_writes(),
    ):
        on_server.set_meta("beside", "1")
        on_server.finish_all(endings, "destroy", "DESTROYED")
    assert rows(on_server)[1:] == before and on_server.read_meta("beside") is None
    assert {sandbox.state for sandbox in on_server.find_all()} == {"REQUESTED"}
