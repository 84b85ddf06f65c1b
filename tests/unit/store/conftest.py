# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Empty records for a test, on each engine in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.engines import ENGINES, new_address


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "agentlab.db"


@pytest.fixture(params=ENGINES)
def address(request: pytest.FixtureRequest, path: Path) -> str:
    """Where empty records are, on each engine in turn."""
    return new_address(request.param, str(path))


@pytest.fixture
def store(address: str) -> Iterator[Records]:
    database = open_database(address)
    yield Records(database, SystemClock(), "tester")
    database.close()
