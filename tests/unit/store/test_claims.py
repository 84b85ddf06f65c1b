# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Claims: a lost fence writes nothing, a dead holder is replaced, a live one is named."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Busy, ClaimLost
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders, overview, records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.lab import FakeClock
from support.records import child, new, reserve


def test_a_lost_fence_writes_nothing_more(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    claim, sandbox = reserve(store)
    clock.pass_time(store.claim_seconds)
    second = Records(store.db, clock, "second")
    newer = second.claim(sandbox.uuid, "destroy")
    assert newer.fence > claim.fence and newer.interrupted is not None and newer.interrupted.phase == "reserved"
    for write in (
        lambda: store.write_journal(claim, "create", "cloning", {}),
        lambda: store.change(claim, sandbox, "create", to="PROVISIONING"),
        lambda: store.run_fenced(claim, lambda conn: None),
    ):
        with pytest.raises(ClaimLost, match="lost to another run"):
            write()
    store.release(claim)
    assert store.get(sandbox.uuid).state == "REQUESTED" and store.find_journal_entry(sandbox.uuid).phase == "reserved"
    assert len(store.db.read("SELECT * FROM claims")) == 1, (
        "the release of a lost claim must not release the other run's"
    )


def test_writing_extends_the_claim(address: str) -> None:
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    claim, _dummy = reserve(store)
    clock.pass_time(records.CLAIM_SECONDS - 1)
    store.write_journal(claim, "create", "cloning", {})
    clock.pass_time(records.CLAIM_SECONDS - 1)
    with pytest.raises(Busy):
        Records(store.db, clock, "second").claim(claim.uuid, "stop")


def test_a_sign_of_life_before_the_removal_of_dead_claims_keeps_the_claim(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal may wait for its turn to write, and the holder may go on meanwhile."""
    clock = FakeClock()
    store = Records(open_database(address), clock, "x")
    claim, _dummy = reserve(store)
    store.drop_journal(claim)
    clock.pass_time(store.claim_seconds)
    other = Records(open_database(address), clock, "other")
    write = other.db.write

    def wait_for_turn(work: Any, **options: Any) -> Any:
        store.run_fenced(claim, lambda conn: None)
        return write(work, **options)

    with monkeypatch.context() as patch:
        patch.setattr(other.db, "write", wait_for_turn)
        overview.drop_dead_claims(other)
    store.run_fenced(claim, lambda conn: None)
    clock.pass_time(store.claim_seconds)
    overview.drop_dead_claims(other)
    with pytest.raises(ClaimLost):
        store.run_fenced(claim, lambda conn: None)
    for database in (store.db, other.db):
        database.close()


def test_a_dead_process_claim_is_taken_over_at_once(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "heir")
    killed = child(
        address,
        "1",
        """
import os, signal
one = Sandbox(uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED")
claim = store.reserve(one, vmid=None, vmid_range=(1000, 1999), occupied=set(), journal={"a": 1})
store.write_journal(claim, "create", "cloning", {"a": 2})
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    killed.communicate(timeout=30)
    assert killed.returncode == -9
    assert [one.phase for one in store.list_interrupted()] == ["cloning"]
    claim = store.claim(new(1).uuid, "create", wait=0)
    assert claim.interrupted is not None and claim.interrupted.detail == {"a": 2}


def test_a_live_process_claim_is_busy_and_names_the_holder(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "second")
    living = child(
        address,
        "AWX job 7",
        """
one = Sandbox(uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED")
store.reserve(one, vmid=1044, vmid_range=(1000, 1999), occupied=set(), journal={})
print("ready", flush=True)
sys.stdin.readline()
""",
    )
    try:
        assert living.stdout.readline() == "ready\n"
        with pytest.raises(Busy, match="sandbox 1044 is being worked on: create by child AWX job 7 for") as caught:
            store.claim(new(1).uuid, "stop", wait=0.2)
        assert caught.value.detail["holder"] == "child AWX job 7" and caught.value.detail["operation"] == "create"
        assert store.list_interrupted() == []
    finally:
        living.communicate("\n", timeout=30)
    assert store.claim(new(1).uuid, "stop", wait=5).operation == "stop"


def test_a_claim_that_cannot_be_given_back_keeps_its_own_process_waiting_for_nothing(path: Path) -> None:
    """After a full disk the next module in this process (a loop, a retry) or the daemon's next pass goes on.

    Another process still waits.
    """
    store = Records(Database(str(path)), SystemClock(), "tester")
    claim, sandbox = reserve(store)
    store.db._writer.execute("PRAGMA query_only = ON")
    store.release(claim)
    store.db._writer.execute("PRAGMA query_only = OFF")
    run = child(
        path,
        "b",
        f"from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Busy\n"
        f"try: store.claim({sandbox.uuid!r}, 'stop')\nexcept Busy: print('busy')",
    )
    assert run.communicate() == ("busy\n", "")
    assert [one.kind for one in store.list_interrupted()] == ["create"]
    again = Records(Database(str(path)), SystemClock(), "tester").claim(sandbox.uuid, "create")
    assert again.fence > claim.fence and again.interrupted is not None
    with pytest.raises(Busy):
        store.claim(sandbox.uuid, "create")


def test_a_claim_that_cannot_be_given_back_ends_no_claim_in_another_database(path: Path) -> None:
    """The fence begins with the time, so two databases may give out the same one in the same second."""
    clock = FakeClock()
    first = Records(Database(str(path)), clock, "tester")
    second = Records(Database(str(path.with_name("second.db"))), clock, "tester")
    lost, held = reserve(first)[0], reserve(second)[0]
    assert (lost.uuid, lost.fence) == (held.uuid, held.fence)
    first.db._writer.execute("PRAGMA query_only = ON")
    first.release(lost)
    first.db._writer.execute("PRAGMA query_only = OFF")
    with pytest.raises(Busy):
        second.claim(held.uuid, "stop")


def test_waiting_for_a_claim_is_bounded_and_succeeds_when_it_is_given_back(store: Records) -> None:
    claim, sandbox = reserve(store)
    other = Records(store.db, SystemClock(), "other")
    timer = threading.Timer(0.2, store.release, (claim,))
    timer.start()
    assert other.claim(sandbox.uuid, "stop", wait=5).operation == "stop"
    timer.join()


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"started": "['1']"}, True),
        ({"pid": 2**22 + 5}, True),
        ({"boot": "another"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "boot": "another"}, False),
        ({"ns": "pid:[1]", "pid": 2**22 + 5}, False),
        ({"boot": ""}, False),
    ],
)
def test_only_certain_death_counts(change: dict[str, object], dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "read_machine_id", lambda: "one")
    found = {**json.loads(holders.describe_process()), **change}
    assert holders.is_dead(json.dumps(found)) is dead


@pytest.mark.parametrize(
    "written, machine, dead",
    [("before this boot", "one", True), ("after this boot", "one", False), ("before this boot", "other", False)],
)
def test_another_boot_of_this_name_is_dead_only_if_it_was_this_machine(
    written: str, machine: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second host with the same name, also one made from the same image, keeps its claims while it works."""
    monkeypatch.setattr(holders, "read_machine_id", lambda: "one")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    holder = {
        **json.loads(holders.describe_process()),
        "boot": "another",
        "machine": machine,
        "at": booted + (-5 if written == "before this boot" else 5),
    }
    assert holders.is_dead(json.dumps(holder)) is dead


@pytest.mark.parametrize("number", ["", "uninitialized\n", "0" * 32, "not an id"])
def test_machines_without_an_id_are_not_one_machine(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers of one image on two hosts have the same name and no id. The second started after the claim."""
    read = holders._read_text
    monkeypatch.setattr(holders, "_read_text", lambda path: number if path == "/etc/machine-id" else read(path))
    monkeypatch.setattr(holders, "read_machine_id", holders.read_machine_id.__wrapped__)
    holder = {**json.loads(holders.describe_process()), "boot": "that of the first one", "at": 5.0}
    assert holder["machine"] == "" and holders.is_dead(json.dumps(holder)) is False


@pytest.mark.parametrize("text", ["", "x", "{}", "[]", "null", '{"host": 1}'])
def test_a_holder_that_cannot_be_read_counts_as_alive(text: str) -> None:
    assert holders.is_dead(text) is False
