# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Schema migrations: a new file has the newest schema, an older file is brought up and keeps its records."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import schema
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.records import child, reserve


def test_new_file_has_the_newest_schema(path: Path) -> None:
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert database.read("PRAGMA application_id")[0][0] == schema.APPLICATION_ID
    assert database.check_integrity() == "ok"


def test_an_older_file_is_brought_up_and_keeps_its_records(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(Records(Database(str(path)), SystemClock(), "x"))
    monkeypatch.setattr(
        schema,
        "MIGRATIONS",
        (*schema.MIGRATIONS, ("ALTER TABLE sandboxes ADD COLUMN extra TEXT", "CREATE TABLE more (a)")),
    )
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert database.read("SELECT extra, name FROM sandboxes")[0]["name"] == "s1"


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database(str(path)).close()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE half (a)", "CREATE TABLE broken (")))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(StoreError):
            Database(str(path))
    database = Database(str(path))
    assert database.read("PRAGMA user_version")[0][0] == schema.VERSION
    assert not database.read("SELECT 1 FROM sqlite_master WHERE name = 'half'")


def test_many_processes_may_create_the_records_at_once(address: str) -> None:
    children = [child(address, str(n), "store.set_meta('k' + me, me)") for n in range(4)]
    for one in children:
        assert one.communicate(timeout=60)[1] == "" and one.returncode == 0
    assert len(open_database(address).read("SELECT * FROM meta WHERE key LIKE 'k%'")) == 4


def test_records_of_the_first_schema_are_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as old:
        old.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        old.setattr(schema, "VERSION", 1)
        first = Database(str(path))
        first.write(
            lambda conn: (
                conn.execute(
                    "INSERT INTO sandboxes (uuid, vmid, name, state, created_at, updated_at) "
                    "VALUES ('u', 1000, 'old', 'RUNNING', 1, 2)"
                )
                and None
            )
        )
        first.close()
    now = Database(str(path))
    assert now.read("PRAGMA user_version")[0][0] == schema.VERSION > 1
    kept = Records(now, SystemClock(), "test").get("u")
    assert (kept.vmid, kept.name, kept.state, kept.created_at, kept.lease_max_seconds) == (
        1000,
        "old",
        "RUNNING",
        1,
        None,
    )
    now.close()
