# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor on its own host: records, files, secrets, work that was left over."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor, host
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite import engine

from support.double import TOKEN_SECRET
from support.examine import examine, list_bad_findings
from support.lab import Lab


def test_what_cannot_be_read_is_unknown_and_no_problem(lab: Lab, tmp_path: Path) -> None:
    lab.pve.fault("GET", "/qemu/9000/config", "answer", status=595, body="", times=9)
    file = tmp_path / "config.yaml"
    file.write_text(f"api_token_secret: {TOKEN_SECRET}\n", encoding="utf-8")
    file.chmod(0o600)
    found = config.load(
        {**lab.options, "config_file": str(file), "database": lab.database}, lab.server.environment(lab.folder)
    )
    file.unlink()
    one = doctor.Doctor(found, now=lab.clock)
    try:
        findings = one.examine().findings
    finally:
        one.close()
    unread = [(each.check, each.status) for each in findings if "could not be looked at" in each.meaning]
    assert unread == [("configuration", "unknown"), ("template", "unknown")]


def test_a_wide_newer_or_damaged_database_is_told(lab: Lab) -> None:
    lab.create()
    lab.close_contexts()
    os.chmod(lab.database, 0o640)
    assert examine(lab)["database"].status == "warning" and "0640" in examine(lab)["database"].meaning
    assert examine(lab, database_group_access=True)["database"].status == "ok"
    os.chmod(lab.database, 0o600)
    with sqlite3.connect(lab.database) as conn:
        conn.execute("PRAGMA user_version = 99")
    conn.close()
    found = examine(lab)
    assert (
        found["database"].status == "problem"
        and "newer" in found["database"].meaning
        and found["quorum"].status == "ok"
    )
    damaged = Path(lab.folder, "damaged.db")
    damaged.write_bytes(b"no database at all" * 500)
    assert examine(lab, database=str(damaged))["database"].status == "problem"
    assert damaged.read_bytes() == b"no database at all" * 500
    missing = Path(lab.folder, "no", "such.db")
    assert examine(lab, database=str(missing))["database"].status == "ok" and not missing.parent.exists()


def test_a_page_that_was_overwritten_is_found(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    for _number in range(300):
        ctx.database.write(
            lambda conn: (
                conn.execute(
                    "INSERT INTO events (at, sandbox_uuid, vmid, operation, actor, outcome) VALUES (1, ?, 1000, 'x', ?,"
                    " 'ok')",
                    (made.uuid, "y" * 200),
                )
                and None
            )
        )
    ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    lab.close_contexts()
    with sqlite3.connect(lab.database) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events_vmid'").fetchone()[0]
        size = conn.execute("PRAGMA page_size").fetchone()[0]
    conn.close()
    with open(lab.database, "r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    found = examine(lab)["database"]
    assert found.status == "problem" and ("damaged" in found.meaning or "malformed" in found.meaning), found


def test_an_overdue_lease_is_a_warning(lab: Lab) -> None:
    made = lab.create()
    lab.force_state(made.vmid, "RUNNING", lease_expires_at=1)
    found = examine(lab)["work"]
    assert found.status == "warning" and found.facts["overdue"] == [1000] and "agentlab_reconcile" in found.advice


def test_secrets_that_everybody_may_read_are_a_problem(lab: Lab) -> None:
    path = Path(lab.folder, "config.yaml")
    path.write_text(f"api_token_secret: {TOKEN_SECRET}\n")
    path.chmod(0o644)
    found = examine(lab)["configuration"]
    assert found.status == "problem" and "0644" in found.meaning and TOKEN_SECRET not in str(found)
    path.chmod(0o600)
    assert examine(lab)["configuration"].status == "ok"
    assert examine(lab, validate_certs=False)["configuration"].status == "warning"


def test_records_that_were_there_before_are_missed(lab: Lab) -> None:
    lab.create()
    lab.close_contexts()
    note = Path(lab.database).with_name(f".{Path(lab.database).name}.latest")
    assert note.exists()
    Path(lab.database).unlink()
    found = examine(lab, api_port=1)["database"]
    assert found.status == "problem" and "was there before" in found.meaning and f"rm {note}" in found.advice, found
    note.unlink()
    assert examine(lab, api_port=1)["database"].status == "ok"


def test_records_behind_a_dangling_link_are_a_problem(lab: Lab, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "nowhere" / "agentlab.db")
    found = examine(lab, api_port=1, database=str(link))["database"]
    assert found.status == "problem" and "which does not exist; mount or create" in found.meaning, found


def test_a_mode_that_is_too_wide_does_not_hide_a_folder_that_cannot_be_written(lab: Lab, monkeypatch: Any) -> None:
    lab.create()
    lab.close_contexts()
    os.chmod(lab.database, 0o640)
    folder = str(Path(lab.database).parent)
    # Root may write everywhere, so the kernel's answer for this folder is changed.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and not (path == folder and mode & os.W_OK))
    found = list_bad_findings(lab, "database")
    assert [status for status, _meaning in found] == ["warning", "problem"]
    assert "0640" in found[0][1] and f"{folder} cannot be written" in found[1][1]


def close_to_this_user(monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    """Have these paths count as not writable: root may write everywhere, so the kernel's answer is changed."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and not (path in paths and mode & os.W_OK))


def test_records_that_do_not_exist_and_cannot_be_created_are_a_problem(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_to_this_user(monkeypatch, str(tmp_path))
    for database in (tmp_path / "new.db", tmp_path / "no" / "folder" / "new.db"):
        found = examine(lab, database=str(database))["database"]
        assert found.status == "problem" and f"{tmp_path} cannot be written" in found.meaning, found


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_file_beside_the_records_that_cannot_be_written_is_a_problem(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    lab.create()
    assert os.path.exists(lab.database + suffix)
    close_to_this_user(monkeypatch, lab.database + suffix)
    ((status, meaning),) = list_bad_findings(lab, "database")
    assert status == "problem" and f"{lab.database}{suffix} cannot be written" in meaning


def test_damage_hides_neither_a_wide_mode_nor_a_folder_that_cannot_be_written(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.create()
    lab.close_contexts()
    os.chmod(lab.database, 0o644)
    folder = os.path.dirname(lab.database)
    close_to_this_user(monkeypatch, folder)
    monkeypatch.setattr(engine.Database, "check_integrity", lambda _self: "page 3 is odd")
    found = list_bad_findings(lab, "database")
    assert [status for status, _meaning in found] == ["problem", "warning", "problem"]
    assert "page 3 is odd" in found[0][1] and "0644" in found[1][1] and f"{folder} cannot be" in found[2][1]


def test_a_certificate_that_is_not_verified_does_not_hide_a_login_with_a_password(lab: Lab) -> None:
    settings = config.load(lab.options, lab.server.environment(lab.folder))
    proxmox = replace(settings.proxmox, validate_certs=False, api_token_id=None)
    examination: Any = SimpleNamespace(config=replace(settings, proxmox=proxmox))
    found = [each for each in host.check_configuration(examination) if each.check == "configuration"]
    assert [each.status for each in found] == ["warning", "warning"]
    assert "is not verified" in found[0].meaning and "logs in with a password" in found[1].meaning
