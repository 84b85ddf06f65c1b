# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A journal entry whose detail holds a value of the wrong type is damage.

It is named, and ends no pass over the others.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import DamagedRecord

from support.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("kind", "phase", "detail", "words"),
    [
        ("create", "waiting", {"upid": 5}, "whose upid is a text"),
        ("create", "waiting", {"upid": ["x"]}, "whose upid is a text"),
        ("create", "configuring", {"disk_size": 5}, "whose disk_size is a text"),
        ("destroy", "waiting", {"since": "x"}, "whose since is a whole number"),
        ("destroy", "deleting", {"since": None}, "whose since is a whole number"),
        ("destroy", "verifying", {"create": 5}, "whose create is an object"),
        ("destroy", "verifying", {"create": {"phase": [], "at": 5}}, "whose phase is a text"),
    ],
)
def test_a_journal_value_of_the_wrong_type_is_named(lab: Lab, kind: str, phase: str, detail: Any, words: str) -> None:
    damaged, other = lab.create("a1"), lab.create("a2")
    lab.force_state(other.vmid, "RUNNING", lease_expires_at=1)
    lab.close_contexts()
    with contextlib.closing(sqlite3.connect(lab.database, isolation_level=None)) as connection:
        connection.execute(
            "INSERT INTO operations (sandbox_uuid, kind, phase, detail, actor, started_at, updated_at)"
            " VALUES (?, ?, ?, ?, 'x', 1, 1)",
            (damaged.uuid, kind, phase, json.dumps(detail)),
        )
    # The pass goes on with the others, and that sandbox is left alone.
    lab.reconcile()
    assert lab.record(other).state == "TIMEOUT" and lab.record(damaged).state == "RUNNING"
    outcome = lab.destroy(damaged.vmid, force=True)[0]
    assert outcome.failed and f"operations.detail of sandbox_uuid {damaged.uuid} is not a JSON object {words}" in str(
        outcome.message
    )
    assert isinstance(lab.context().records.list_damage()[0], DamagedRecord)
    assert lab.pve.vm(damaged.vmid) is not None


def test_a_damaged_fence_or_name_of_the_records_stops_no_work(lab: Lab) -> None:
    """A fence beyond what SQLite counts to, and a name of the records that is no text."""
    lab.create("a1")
    with contextlib.closing(sqlite3.connect(lab.database)) as connection:
        connection.execute("UPDATE meta SET value = '9223372036854775807' WHERE key = 'fence'")
        connection.execute("UPDATE meta SET value = x'ff00' WHERE key = 'database_id'")
        connection.commit()
    assert not lab.power("stop", 1000).failed
    lab.reconcile()
    assert not lab.destroy(1000, force=True)[0].failed
