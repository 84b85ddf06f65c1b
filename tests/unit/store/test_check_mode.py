# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check mode writes no file: it reads the records and works on a copy."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.records import reserve


def test_check_mode_writes_no_file(path: Path) -> None:
    store = Records(Database(str(path), dry_run=True), SystemClock(), "x")
    _dummy, sandbox = reserve(store)
    assert store.get(sandbox.uuid).name == "s1"
    assert not path.parent.exists()


def test_check_mode_works_on_a_copy(path: Path) -> None:
    first = Records(Database(str(path)), SystemClock(), "x")
    claim, sandbox = reserve(first)
    first.release(claim)
    first.db.close()
    before = {one.name: one.read_bytes() for one in path.parent.iterdir() if not one.name.endswith(("-shm", "-wal"))}
    copy = Records(Database(str(path), dry_run=True), SystemClock(), "x")
    assert copy.get(sandbox.uuid).name == "s1"
    claim = copy.claim(sandbox.uuid, "create")
    copy.change(claim, sandbox, "create", to="PROVISIONING")
    reserve(copy, 2)
    copy.db.close()
    assert {
        one.name: one.read_bytes() for one in path.parent.iterdir() if not one.name.endswith(("-shm", "-wal"))
    } == before
    assert [one.state for one in Records(Database(str(path)), SystemClock(), "x").find_all()] == ["REQUESTED"]


def test_check_mode_reads_the_file_itself_until_something_is_written(path: Path) -> None:
    """A million records are not copied to say what would be pruned; nor can anything of it reach the file."""
    real = Records(Database(str(path)), SystemClock(), "real")
    reserve(real, 1)
    store = Records(Database(str(path), dry_run=True), SystemClock(), "check")
    reserve(real, 2)
    assert [one.name for one in store.find_all()] == ["s1", "s2"]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.db._writer.execute("DELETE FROM sandboxes")
    store.set_meta("tried", "1")
    reserve(real, 3)
    assert [one.name for one in store.find_all()] == ["s1", "s2"] and store.read_meta("tried") == "1"
    with store.db.group_writes():
        store.set_meta("tried", "2")
    assert store.read_meta("tried") == "2" and real.read_meta("tried") is None and len(real.find_all()) == 3


def test_check_mode_sees_what_is_still_in_the_log(path: Path) -> None:
    first = Records(Database(str(path)), SystemClock(), "x")
    reserve(first)
    assert len(Records(Database(str(path), dry_run=True), SystemClock(), "x").find_all()) == 1
