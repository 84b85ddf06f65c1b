# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the connection plugin puts a fetched file in its place on the controller."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.connection import sandbox


def supports_linking(folder: Path) -> bool:
    """Return whether the file system of a folder gives a name to a file that had none."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.link(f"/proc/self/fd/{descriptor}", folder / "linked", src_dir_fd=descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    (folder / "linked").unlink()
    return True


def test_a_fetched_file_gets_its_name_without_a_copy(tmp_path: Path, monkeypatch: Any) -> None:
    if not supports_linking(tmp_path):
        pytest.skip("the file system of this folder gives no name to a file without one")

    def refuse(source: IO[bytes], target: IO[bytes]) -> None:
        raise AssertionError("the file was copied")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    target = tmp_path / "result"
    with sandbox._open_unnamed(str(tmp_path)) as file:
        file.write(b"data")
        file.flush()
        assert list(tmp_path.iterdir()) == []
        sandbox._replace(str(target), file)
    assert target.read_bytes() == b"data" and list(tmp_path.iterdir()) == [target]


def test_where_no_name_can_be_given_a_fetched_file_is_copied(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_bytes(b"before")
    target.chmod(0o640)
    # Python opens this file in a way that forbids a name.
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"data")
        file.flush()
        sandbox._replace(str(target), file)
    assert target.read_bytes() == b"data" and target.stat().st_mode & 0o7777 == 0o640
    assert list(tmp_path.iterdir()) == [target]
