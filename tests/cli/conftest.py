# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures for the command line's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import StandIn


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short name: the path of a socket holds 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="al-") as folder:
        yield Path(folder)


@pytest.fixture
def daemon(short_path: Path) -> Iterator[StandIn]:
    """A stand-in daemon; the test sets its replies."""
    with StandIn(short_path / "d.sock") as running:
        yield running
