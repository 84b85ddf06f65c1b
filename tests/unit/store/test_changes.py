# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Changes of a record: unique VMIDs and names, compare-and-set, events, retention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput, NotFound, RecordChanged
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.lab import FakeClock
from support.records import RANGE, new, reserve


def test_vmid_and_name_are_unique_among_live_records_only(store: Records) -> None:
    claim, sandbox = reserve(store, 1, vmid=1005)
    with pytest.raises(InvalidInput, match="vmid: 1005 already belongs to a live sandbox"):
        reserve(store, 2, vmid=1005)
    twin = new(3)
    twin.name = "s1"
    with pytest.raises(InvalidInput, match="name: 's1' is the name of the live sandbox 1005"):
        store.reserve(twin, vmid=None, vmid_range=RANGE, occupied=set(), journal={})
    store.change(claim, sandbox, "destroy", to="DESTROYED", finish=True)
    reserve(store, 2, vmid=1005)
    store.reserve(twin, vmid=1006, vmid_range=RANGE, occupied=set(), journal={})
    assert [(one.vmid, one.state) for one in store.find_all(include_destroyed=True)] == [
        (1005, "DESTROYED"),
        (1005, "REQUESTED"),
        (1006, "REQUESTED"),
    ]
    assert store.find_last_by_vmid(1005).name == "s2"


def test_a_freed_vmid_is_not_the_next_one_taken_and_the_range_wraps(store: Records) -> None:
    given = []
    for number in range(3):
        sandbox = new(number)
        claim = store.reserve(
            sandbox, vmid=None, vmid_range=(1000, 1002), occupied={1001} if number == 1 else set(), journal={}
        )
        given.append(sandbox.vmid)
        store.change(claim, store.get(sandbox.uuid), "destroy", to="DESTROYED", finish=True)
    assert given == [1000, 1002, 1000]


def test_full_range_is_refused(store: Records) -> None:
    with pytest.raises(InvalidInput, match="vmid_range: all VMIDs of 1000-1000 are taken"):
        store.reserve(new(1), vmid=None, vmid_range=(1000, 1000), occupied={1000}, journal={})
    assert store.find_all() == []


def test_change_is_a_compare_and_set(store: Records) -> None:
    claim, old = reserve(store)
    now = store.change(claim, old, "create", to="PROVISIONING", reason="clone")
    assert (now.state, now.generation) == ("PROVISIONING", old.generation + 1)
    with pytest.raises(RecordChanged, match="was changed by another run meanwhile"):
        store.change(claim, old, "create", to="FAILED")
    with pytest.raises(RecordChanged, match="no transition from PROVISIONING to STOPPED"):
        store.change(claim, now, "create", to="STOPPED")
    assert store.get(old.uuid).state == "PROVISIONING"
    assert [
        (row["from_state"], row["to_state"], row["outcome"]) for row in history.read_events(store.db, uuid=old.uuid)
    ] == [(None, "REQUESTED", "decided"), ("REQUESTED", "PROVISIONING", "done")]


def test_a_refused_change_leaves_no_event(store: Records) -> None:
    claim, old = reserve(store)
    store.change(claim, old, "create", protected=1)
    count = len(history.read_events(store.db, uuid=old.uuid))
    for _dummy in range(2):
        with pytest.raises(RecordChanged):
            store.amend(old, "update", protected=0)
    assert len(history.read_events(store.db, uuid=old.uuid)) == count and store.get(old.uuid).protected


def test_what_a_change_answers_is_what_is_stored(store: Records) -> None:
    claim, old = reserve(store)
    now = store.amend(old, "update", protected=1, keepalive=1, absent_seen_at=7)
    assert now == store.get(old.uuid) and now.protected is True and now.keepalive is True
    for values in (
        {"to": "PROVISIONING", "reason": "clone"},
        {"tags": ["a", "b"]},
        {"node": "pve1", "ip": "192.0.2.7", "protected": 0},
        {"outcome": "kept", "journal": ("cloning", {})},
        {"to": "BOOTING", "smbios_uuid": new(1).uuid, "snippet": "/x"},
    ):
        now = store.change(claim, now, "create", **values)
        assert now == store.get(old.uuid), values
    assert now.protected is False and now.tags == ["a", "b"] and now.absent_seen_at is None
    over = store.expire(now, now.lease_expires_at)
    assert over == store.get(old.uuid) and (over.state, over.reason, over.generation) == (
        "TIMEOUT",
        "lease_expired",
        now.generation + 1,
    )


def test_each_write_to_a_record_raises_its_generation() -> None:
    """A change answers the columns that it does not write as they were read, at that generation."""
    sources = [path.read_text(encoding="utf-8") for path in Path(records.__file__).parent.glob("*.py")]
    found = [statement for source in sources for statement in source.split("UPDATE sandboxes")[1:]]
    assert len(found) >= 3
    # These concern no other run, so they must not make another run's write fail: that a file is gone from its host, and
    # when an address was seen again.
    quiet = [
        statement.split("WHERE")[0].strip()
        for statement in found
        if "generation = generation + 1" not in statement.split("WHERE")[0]
    ]
    assert quiet == ["SET snippet_host = NULL", "SET ip_seen_at = ?"]


def test_destroyed_is_final(store: Records) -> None:
    claim, old = reserve(store)
    gone = store.change(claim, old, "destroy", to="DESTROYED", finish=True)
    claim = store.claim(gone.uuid, "create")
    for state in ("REQUESTED", "RUNNING", "STOPPED", "FAILED", "TIMEOUT"):
        with pytest.raises(RecordChanged):
            store.change(claim, gone, "create", to=state)


def test_finish_removes_journal_and_claim_with_the_change(store: Records) -> None:
    claim, old = reserve(store)
    assert store.find_journal_entry(old.uuid).phase == "reserved"
    store.change(claim, old, "create", to="FAILED", finish=True)
    assert store.find_journal_entry(old.uuid) is None and store.db.read("SELECT * FROM claims") == []


def test_retention_removes_old_destroyed_records_with_their_events_and_no_others(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    for number in (1, 2, 3):
        claim, one = reserve(store, number)
        if number < 3:
            store.change(claim, one, "destroy", to="DESTROYED", finish=True)
        clock.pass_time(100)
    assert history.forget(store, 250) == 1
    assert [one.name for one in store.find_all(include_destroyed=True)] == ["s2", "s3"]
    assert store.db.read("SELECT count(*) FROM events WHERE sandbox_uuid LIKE '%1'")[0][0] == 0
    with pytest.raises(NotFound):
        store.get(new(1).uuid)


def test_an_event_of_a_pass_that_repeats_the_last_one_is_not_written(store: Records) -> None:
    store.in_pass = True
    _claim, sandbox = reserve(store)
    before = len(history.read_events(store.db, uuid=sandbox.uuid))

    def count(**changes: Any) -> int:
        values = {"outcome": "kept", "reason": "locked", "evidence": {"lock": "backup"}, **changes}
        store.note(sandbox, str(values.pop("operation", "cleanup")), **values)
        return len(history.read_events(store.db, uuid=sandbox.uuid)) - before

    assert [count(), count(), count(evidence={"lock": "migrate"}), count(outcome="failed")] == [1, 1, 2, 3]
    # Another operation in between changes nothing; something that was done does.
    assert [count(operation="destroy"), count(outcome="failed"), count(operation="destroy")] == [4, 4, 4]
    assert [count(outcome="done"), count(outcome="done"), count(outcome="failed")] == [5, 6, 7]
    store.actor = "somebody else"
    assert [count(outcome="failed"), count(outcome="failed")] == [8, 8]


def test_each_closed_journal_of_a_killed_run_has_its_event(store: Records) -> None:
    claim, sandbox = reserve(store)
    sandbox = store.change(claim, sandbox, "create", finish=True)
    for _run in range(4):
        claim = store.claim(sandbox.uuid, "stop")
        store.write_journal(claim, "stop", "requested", {})
        sandbox = store.change(claim, sandbox, "stop", outcome="interrupted", reason="requested", finish=True)
    outcomes = [row["outcome"] for row in history.read_events(store.db, uuid=sandbox.uuid)]
    assert outcomes.count("interrupted") == 4
