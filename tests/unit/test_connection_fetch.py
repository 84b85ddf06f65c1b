# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the connection plugin puts a fetched file in its place on the controller."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.connection import sandbox

from support.programs import require_unnamed_files


def test_a_fetched_file_gets_its_name_without_a_copy(tmp_path: Path, monkeypatch: Any) -> None:
    require_unnamed_files(tmp_path)

    def refuse(source: IO[bytes], target: IO[bytes]) -> None:
        raise AssertionError("the file was copied")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    target = tmp_path / "result"
    with sandbox._open_unnamed(str(target)) as file:
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


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that lets the plugin fetch a file with the content ``data``."""

    def send(_context: Any, _sandbox: Any, _path: str, file: IO[bytes]) -> None:
        file.write(b"data")

    monkeypatch.setattr(sandbox.Connection, "_host", "box")
    monkeypatch.setattr(sandbox.Connection, "_require_connection", lambda _self: (None, None))
    monkeypatch.setattr(sandbox.files, "fetch_file", send)
    connection = object.__new__(sandbox.Connection)
    connection._connected = True
    return lambda target: connection.fetch_file("/etc/hostname", str(target))


def test_a_pipe_in_a_folder_that_this_user_may_not_write_is_written_to(fetch: Callable[[Path], None]) -> None:
    """Such as /dev/null: only root may make a file in /dev, and it would be in memory."""
    with tempfile.TemporaryDirectory() as name:
        pipe = Path(name) / "pipe"
        os.mkfifo(pipe)
        pipe.chmod(0o666)
        reader = os.open(pipe, os.O_RDWR)
        Path(name).chmod(0o555)
        try:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 0)
            fetch(pipe)
        finally:
            if os.getresuid()[2] == 0:
                os.setresuid(0, 0, 0)
            Path(name).chmod(0o755)
        assert os.read(reader, 100) == b"data"
        os.close(reader)


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(fetch: Callable[[Path], None], tmp_path: Path) -> None:
    """As root, a fetch to /dev/stdout would put a file in the place of that link, for everybody."""
    target, link = tmp_path / "folder" / "result", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"before, and longer")
    link.symlink_to(target)
    fetch(link)
    assert link.is_symlink() and target.read_bytes() == b"data" and os.listdir(target.parent) == ["result"]


def test_a_fetched_file_that_has_to_be_copied_is_its_owners_alone_until_it_is_complete(
    fetch: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    copy = shutil.copyfileobj

    def note(source: IO[bytes], target: IO[bytes]) -> None:
        modes.append(os.fstat(target.fileno()).st_mode & 0o777)
        copy(source, target)

    def refuse(*_values: Any, **_named: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(shutil, "copyfileobj", note)
    # As where /proc is not mounted.
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "result").touch(mode=0o600)
    fetch(tmp_path / "result")
    assert modes == [0o600] and (tmp_path / "result").read_bytes() == b"data"
