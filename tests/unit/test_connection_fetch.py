# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the connection plugin puts a fetched file in its place on the controller."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from ansible_collections.agentlab.proxmox.plugins.connection import sandbox

from support.programs import require_unnamed_files


def test_a_fetched_file_gets_its_name_without_a_copy(tmp_path: Path, monkeypatch: Any) -> None:
    require_unnamed_files(tmp_path)

    def refuse(source: IO[bytes], target: IO[bytes]) -> None:
        raise AssertionError("the file was copied")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    target = tmp_path / "result"
    with sandbox._open_unnamed(str(tmp_path)) as file:
        file.write(b"data")
        file.flush()
        assert list(tmp_path.iterdir()) == []
        sandbox._replace_file(str(target), file)
    assert target.read_bytes() == b"data" and list(tmp_path.iterdir()) == [target]


def test_where_no_name_can_be_given_a_fetched_file_is_copied(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_bytes(b"before")
    target.chmod(0o640)
    # Python opens this file in a way that forbids a name.
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"data")
        file.flush()
        sandbox._replace_file(str(target), file)
    assert target.read_bytes() == b"data" and target.stat().st_mode & 0o7777 == 0o640
    assert list(tmp_path.iterdir()) == [target]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root, a fetch to /dev/null would put a file into its place for everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Open for both, so that neither side waits for the other.
    reader = os.open(pipe, os.O_RDWR)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"data")
        file.flush()
        sandbox._replace_file(str(pipe), file)
    assert pipe.is_fifo() and os.read(reader, 100) == b"data"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]
