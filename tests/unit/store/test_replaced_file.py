# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Nothing is written after the file of the records was deleted, moved or replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

from support.records import read_all_rows, reserve


def moved(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def replaced_by_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def all_deleted(path: Path) -> None:
    for one in path.parent.glob("agentlab.db*"):
        one.unlink()


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, moved, replaced_by_a_copy, all_deleted, lambda path: Path(f"{path}-wal").unlink()],
    ids=["deleted", "moved", "replaced", "deleted with its -wal", "only -wal deleted"],
)
def test_nothing_is_written_once_another_file_stands_at_the_path(path: Path, damage: Callable[[Path], None]) -> None:
    store = Records(Database(str(path)), SystemClock(), "test")
    claim, sandbox = reserve(store)
    assert store.db.explain_replacement() is None
    damage(path)
    sentence = store.db.explain_replacement()
    assert (
        sentence
        and sentence.startswith(f"database {path}: {path}")
        and "was deleted, moved or replaced while this process had it open" in sentence
    )
    before = read_all_rows(store)
    writes: list[Callable[[], object]] = [
        lambda: store.set_meta("a", "1"),
        lambda: store.claim(sandbox.uuid, "stop"),
        lambda: store.write_journal(claim, "create", "x", {}),
        lambda: store.change(claim, sandbox, "create", to="PROVISIONING"),
        lambda: store.expire(sandbox, 10**10),
        lambda: reserve(store, 2),
    ]
    for write in writes:
        with pytest.raises(StoreError) as refused:
            write()
        assert refused.value.message == sentence
    with pytest.raises(StoreError) as refused, store.db.group_writes():
        raise AssertionError("the bulk run was begun")
    assert refused.value.message == sentence
    assert read_all_rows(store) == before


def test_a_file_that_is_replaced_in_the_middle_of_a_transaction_takes_its_commit_along(path: Path) -> None:
    store = Records(Database(str(path)), SystemClock(), "test")
    with pytest.raises(StoreError, match="was deleted, moved or replaced"), store.db.group_writes():
        store.set_meta("a", "1")
        moved(path)
    assert store.read_meta("a") is None


def test_a_link_to_the_records_that_leads_elsewhere_is_noticed(path: Path, tmp_path: Path) -> None:
    Database(str(path)).close()
    link = tmp_path / "link.db"
    link.symlink_to(path)
    database = Database(str(link))
    database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('a', '1')") and None)
    other = tmp_path / "other.db"
    Database(str(other)).close()
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(StoreError, match="was deleted, moved or replaced"):
        database.write(lambda conn: conn.execute("INSERT INTO meta VALUES ('b', '1')") and None)
