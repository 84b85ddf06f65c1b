# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The file of the SQLite records: its modes, its settings, and how long a locked file is waited for."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite import engine
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.records import reserve


def test_new_file_is_for_its_owner_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        Database(str(path))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_group_mode_lets_the_group_write(path: Path) -> None:
    old = os.umask(0o077)
    try:
        Database(str(path), group_mode=True)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o660


def test_the_files_beside_it_are_no_wider(path: Path) -> None:
    old = os.umask(0)
    try:
        reserve(Records(Database(str(path)), SystemClock(), "x"))
        for one in path.parent.iterdir():
            assert one.stat().st_mode & 0o007 == 0, one
    finally:
        os.umask(old)


def test_a_widened_file_is_narrowed(path: Path) -> None:
    Database(str(path)).close()
    path.chmod(0o644)
    Database(str(path)).close()
    assert path.stat().st_mode & 0o007 == 0


def test_the_mode_of_a_file_that_is_not_ours_stays(path: Path) -> None:
    path.parent.mkdir()
    text = path.parent / "motd"
    text.write_text("Welcome to this host, where everybody may read this.\n" * 30, encoding="utf-8")
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (a)")
    conn.close()
    for found in (text, path):
        found.chmod(0o644)
        before = found.read_bytes()
        with pytest.raises(StoreError):
            Database(str(found))
        assert found.stat().st_mode & 0o777 == 0o644 and found.read_bytes() == before


def test_settings_that_promises_stand_on(path: Path) -> None:
    database = Database(str(path))
    assert database.read("PRAGMA journal_mode")[0][0] == "wal"
    for conn in (database._writer, database._reader):
        assert conn.execute("PRAGMA foreign_keys").fetchone()[0] == 1
        assert conn.execute("PRAGMA synchronous").fetchone()[0] == 2
    # Reads wait in SQLite. Writes wait in our own loop: see the next test.
    assert database._reader.execute("PRAGMA busy_timeout").fetchone()[0] >= 30000 and engine.BUSY_SECONDS >= 30


@pytest.mark.parametrize("step", ["open", "look only", "migrate", "write"])
def test_the_wait_for_a_locked_file_is_bounded_once(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """No wait within a wait: SQLite's own timeout would be added to that of our loop, for each statement."""
    Database(str(path)).close()
    waits: list[float] = []
    connect = sqlite3.connect

    def spy(*args: Any, **options: Any) -> sqlite3.Connection:
        waits.append(options["timeout"])
        return connect(*args, **options)

    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.3)
    monkeypatch.setattr(engine, "_STEP_SECONDS", 0.05)
    monkeypatch.setattr(sqlite3, "connect", spy)
    database = Database(str(path)) if step == "write" else None
    with contextlib.closing(connect(path, isolation_level=None)) as other:
        if step == "migrate":
            other.execute("PRAGMA user_version = 1")
        if step in ("open", "look only"):
            # With an exclusive locking mode not even a read is let in.
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE meta SET value = value")
        began = time.monotonic()
        with pytest.raises(StoreError, match="kept it locked"):
            if database:
                database.write(lambda conn: None)
            else:
                Database(str(path), dry_run=step == "look only")
        assert time.monotonic() - began > 0.25 and waits and max(waits) <= 0.05
