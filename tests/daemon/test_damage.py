# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One damaged value in the records: it is named, its row is left alone, everything else goes on, and what the doctor
says mends it.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from typing import Any

import pytest

from support.daemon import Make
from support.lab import Lab


def execute(lab: Lab, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(lab.database, isolation_level=None)) as connection:
        connection.execute(sql)


def rows(lab: Lab, table: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(lab.database)) as connection:
        return connection.execute(
            f"SELECT * FROM {table} WHERE rowid IS NOT NULL" if table == "operations" else f"SELECT * FROM {table}"
        ).fetchall()


# Table and column, and the value that somebody writes there.
DAMAGE = [
    ("tags", "'x'"),
    ("tags", "'[1]'"),
    ("tags", "'{}'"),
    ("lease_expires_at", "'soon'"),
    ("created_at", "10000000000000"),
    ("state", "'LOST'"),
    ("name", "x'00ff'"),
    ("generation", "1.5"),
    ("state_changed_at", "-5"),
]


@pytest.mark.parametrize("column, value", DAMAGE, ids=[f"{column}={value}" for column, value in DAMAGE])
def test_a_damaged_record_is_named_and_left_alone_and_the_rest_goes_on(
    daemon: Make, lab: Lab, column: str, value: str
) -> None:
    for number in range(3):
        lab.create(f"a{number}")
    execute(lab, f"UPDATE sandboxes SET {column} = {value} WHERE vmid = 1001")
    execute(lab, "UPDATE sandboxes SET lease_expires_at = strftime('%s') + 4 WHERE vmid = 1000")
    before = [row for row in rows(lab, "sandboxes") if row[1] == 1001]
    one = daemon()
    assert [sandbox["vmid"] for sandbox in one.good("GET", "/v1/sandboxes")["sandboxes"]] == [1000, 1002]
    refused = one.get("/v1/sandboxes/1001")
    assert refused.status == 500 and refused.body["error"].startswith(
        f"the records are damaged: sandboxes.{column} of sandbox 1001 (uuid "
    ), refused
    assert one.get("/v1/status").status == 200
    one.wait_for(lambda: lab.record(1000).state == "TIMEOUT", "another sandbox's lease ends", 20)
    assert one.post("/v1/sandboxes/1002/stop").status == 200
    assert one.post("/v1/sandboxes", {"name": "a4"}).status == 201
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "reconcile passes", 20)
    found = [finding for finding in one.good("GET", "/v1/doctor")["findings"] if finding["check"] == "records"]
    assert [(finding["status"], finding["facts"]["column"]) for finding in found] == [("problem", column)]
    assert [row for row in rows(lab, "sandboxes") if row[1] == 1001] == before
    assert "Traceback" not in one.log()
    assert one.stop() == 0
    command = re.search(r'sqlite3 (\S+) "(UPDATE .+)"', found[0]["advice"])
    if column == "tags":
        assert command and command[1] == lab.database
        execute(lab, command[2])
        assert one.start().get("/v1/sandboxes/1001").status == 200
    # What it is called is mended for the laboratory's own look at the end.
    execute(lab, "DELETE FROM sandboxes WHERE vmid = 1001")


@pytest.mark.parametrize(
    "key, value",
    [
        ("clock", "garbage"),
        ("clock", '{"boot": 5}'),
        ("cleanup_frozen", "garbage"),
        ("cleanup_last_run", "garbage"),
        ("last_vmid", "garbage"),
        ("cluster", "garbage"),
        ("fence", "garbage"),
    ],
)
def test_a_damaged_note_stops_nothing_but_what_it_is_about(daemon: Make, lab: Lab, key: str, value: str) -> None:
    lab.create("a1")
    execute(lab, f"INSERT INTO meta VALUES ('{key}', '{value}') ON CONFLICT (key) DO UPDATE SET value = excluded.value")
    execute(lab, f"UPDATE meta SET value = '{value}' WHERE key LIKE '{key}:%'")
    one = daemon(clock_jump_pause="3s")
    assert one.get("/v1/sandboxes/1000").status == 200 and one.get("/v1/status").status == 200
    assert one.post("/v1/sandboxes/1000/stop").status == 200
    assert one.good("GET", "/v1/doctor")["findings"]
    if key == "clock":
        # Whether the clock jumped is not known, so expiry rests for a while, and goes on.
        execute(lab, "UPDATE sandboxes SET state = 'RUNNING', lease_expires_at = 1, generation = generation + 1")
        one.wait_for(lambda: lab.record(1000).state == "TIMEOUT", "the lease ends", 60)
    if key == "cleanup_frozen":
        assert (
            "cannot be read (meta.value of key cleanup_frozen is damaged)"
            in one.good("GET", "/v1/status")["cleanup"]["frozen"]["reason"]
        )
        assert one.post("/v1/cleanup/release").status == 200
        assert one.good("GET", "/v1/status")["cleanup"]["frozen"] is None
    if key == "last_vmid":
        assert one.post("/v1/sandboxes", {"name": "a2"}).status == 201
    assert "Traceback" not in one.log() and one.stop() == 0
    execute(lab, "DELETE FROM meta WHERE key = 'cluster'")


@pytest.mark.parametrize("value", ["x", "[]", "5"])
def test_a_damaged_journal_entry_bars_its_sandbox_alone(daemon: Make, lab: Lab, value: str) -> None:
    lab.create("a1")
    made = lab.create("a2")
    execute(
        lab,
        "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
        f"VALUES ('{made.uuid}', 'destroy', 'stopping', '{value}', 'x', 1, 1)",
    )
    one = daemon()
    assert one.post("/v1/sandboxes/1000/stop").status == 200
    refused = one.post("/v1/sandboxes/1001/stop")
    assert refused.status == 500 and "operations.detail of sandbox_uuid" in refused.body["error"], refused
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "reconcile passes", 20)
    found = [finding for finding in one.good("GET", "/v1/doctor")["findings"] if finding["check"] == "records"]
    assert len(found) == 1 and found[0]["facts"]["column"] == "detail"
    command = re.search(r'sqlite3 (\S+) "(UPDATE .+?)"', found[0]["advice"])
    assert one.stop() == 0 and command
    execute(lab, command[2])
    assert one.start().get("/v1/sandboxes/1001").status == 200
    one.wait_for(lambda: not lab.leftovers()["operations"], "what was interrupted is settled", 30)


def interrupt(lab: Lab, uuid: str) -> None:
    execute(
        lab,
        "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at) "
        f"VALUES ('{uuid}', 'stop', 'requested', '{{}}', 'x', 1, 1)",
    )


def test_interrupted_work_on_a_damaged_record_holds_up_no_other(daemon: Make, lab: Lab) -> None:
    """Also an entry of the journal whose sandbox is in no record."""
    damaged, sound = lab.create("a1"), lab.create("a2")
    for uuid in (damaged.uuid, sound.uuid, "00000000-0000-4000-8000-000000000000"):
        interrupt(lab, uuid)
    execute(lab, "UPDATE sandboxes SET node = x'ff' WHERE vmid = 1000")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "reconcile passes", 30)
    assert one.good("GET", "/v1/status")["reconcile"]["last_error"] is None, one.log()
    assert sound.uuid not in str(lab.leftovers()["operations"]), "what is sound is finished"
    findings = one.good("GET", "/v1/doctor")["findings"]
    damage = {finding["facts"]["column"]: finding for finding in findings if finding["check"] == "records"}
    assert set(damage) == {"node", "sandbox_uuid"}, damage
    assert not [finding for finding in findings if "None (" in finding["meaning"]], findings
    command = re.search(r'sqlite3 (\S+) "(DELETE .+?)"', damage["sandbox_uuid"]["advice"])
    assert one.stop() == 0 and command
    execute(lab, command[2])
    execute(lab, "UPDATE sandboxes SET node = 'pve1' WHERE vmid = 1000")
    one.start()
    one.wait_for(lambda: not lab.leftovers()["operations"], "what was interrupted is settled", 30)


def test_damaged_events_hide_no_others(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    execute(lab, "UPDATE events SET evidence = 'x', at = 'then' WHERE id = 2")
    execute(lab, "UPDATE events SET upids = '7' WHERE id = 3")
    one = daemon()
    told = one.good("GET", "/v1/sandboxes/1000/events")["events"]
    assert (
        len(told) > 3
        and told[1]["evidence"] == {"damaged": "events.evidence of id 2 is not JSON"}
        and told[2]["upids"] == []
    )
