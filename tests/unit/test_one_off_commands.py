# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``agentlabd --copy-records`` and ``--migrate-records`` that fail: their own words, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import transfer
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.daemon import FILES, ROOT
from support.engines import require_postgresql
from support.records import reserve


@pytest.fixture
def away() -> Iterator[str]:
    """Return the URI of a PostgreSQL server that does not answer: nothing listens on its port."""
    require_postgresql()
    with socket.socket() as held:
        # Bound and not listening: no other process gets the port meanwhile.
        held.bind(("127.0.0.1", 0))
        yield f"postgresql://agentlab@127.0.0.1:{held.getsockname()[1]}/records"


def agentlabd(database: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command agentlabd once."""
    with tempfile.TemporaryDirectory() as folder:
        # ansible-test works on a copy that lacks the checkout's link to the core.
        os.symlink(ROOT / "plugins" / "module_utils" / "_core", os.path.join(folder, "agentlab_core"))
        return subprocess.run(
            [sys.executable, "-m", "agentlabd", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(FILES), folder)), "AGENTLAB_DATABASE": database},
            check=False,
            timeout=120,
        )


def make_records(path: Path) -> str:
    """Make an empty SQLite file of records, and return its path."""
    open_database(str(path)).close()
    return str(path)


def test_a_server_that_does_not_answer_is_told_in_the_words_of_each_command(tmp_path: Path, away: str) -> None:
    file = make_records(tmp_path / "agentlab.db")
    other = tmp_path / "new" / "folder" / "copy.db"
    commands = {
        "the tables are changed as a whole or not at all": ("--migrate-records",),
        "TO; nothing was copied": ("--copy-records", file, away),
        "FROM; nothing was copied": ("--copy-records", away, str(other)),
    }
    for words, arguments in commands.items():
        ended = agentlabd(away, *arguments)
        sentence = f"database {away}: cannot be reached: "
        assert ended.returncode == 1 and sentence in ended.stderr, ended
        side, _semicolon, fate = words.partition("; ")
        expected = f"{arguments[0]}: {side}: {sentence}" if fate else f"--migrate-records: {sentence}"
        assert expected in ended.stderr, ended.stderr
        assert f"{fate or words}. Start the server, or correct host and port in the URI" in ended.stderr, ended.stderr
        # Those are the words of a daemon that goes on.
        assert "Proxmox" not in ended.stderr and "finished later" not in ended.stderr, ended.stderr
        assert "systemd" not in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "new").exists()


def test_a_copy_that_fails_leaves_no_folder_and_no_file(tmp_path: Path) -> None:
    source = tmp_path / "from.db"
    database = open_database(str(source))
    reserve(Records(database, SystemClock(), "somebody"))
    target = tmp_path / "new" / "folder" / "to.db"
    with pytest.raises(StoreError, match="under way"):
        transfer.copy_records(str(source), str(target))
    database.close()
    assert not (tmp_path / "new").exists()


def test_a_copy_that_fails_leaves_folder_and_file_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's folder with somebody's file, and an empty database that was made beforehand."""
    source = make_records(tmp_path / "from.db")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    made = make_records(tmp_path / "there" / "made.db")
    sums = iter(range(99))
    monkeypatch.setattr(transfer, "_compute_checksum", lambda _read: str(next(sums)))
    for target in (tmp_path / "there" / "to.db", Path(made), tmp_path / "there" / "deeper" / "to.db"):
        with pytest.raises(StoreError, match="differs from"):
            transfer.copy_records(source, str(target))
    there = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert "made.db" in there and "notes" in there
    assert not any("to.db" in name or name == "deeper" for name in there), there


def test_a_file_that_somebody_wrote_to_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_records(tmp_path / "from.db"), tmp_path / "to.db"

    def fail(_source: object, engine: object) -> None:
        other = open_database(str(target))
        other.write(
            lambda conn: (
                conn.execute(
                    "INSERT INTO sandboxes (uuid, vmid, name, state, created_at, updated_at) "
                    "VALUES ('a', 1000, 'a', 'RUNNING', 1, 1)"
                )
                and None
            )
        )
        other.close()
        raise StoreError("it failed")

    monkeypatch.setattr(transfer, "_copy_rows", fail)
    with pytest.raises(StoreError, match="it failed"):
        transfer.copy_records(source, str(target))
    assert target.exists()


@pytest.mark.parametrize("side", ["FROM", "TO"])
def test_a_password_in_an_argument_is_refused_because_the_list_of_processes_shows_it(tmp_path: Path, side: str) -> None:
    file = make_records(tmp_path / "agentlab.db")
    uri = "postgresql://agentlab_owner:pw-9x@127.0.0.1:1/records"
    ended = agentlabd(file, "--copy-records", *((uri, file) if side == "FROM" else (file, uri)))
    assert ended.returncode == 1 and "pw-9x" not in ended.stderr + ended.stdout
    assert f"--copy-records: {side} has a password, which every user of this host sees" in ended.stderr
    assert "--password-stdin, in PGPASSWORD or in a passfile, and replace it" in ended.stderr
