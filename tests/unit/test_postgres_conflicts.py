# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Controllers that meet in PostgreSQL: the claim that a dead one left, real deadlocks and serialization failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.engines import move_to_host, require_postgresql, server


@pytest.fixture
def uri() -> str:
    require_postgresql()
    return server().uri()


@pytest.fixture
def connect() -> Iterator[Any]:
    """Open the records as one of several controllers, each on a host of its own."""
    opened: list[Any] = []

    def make(uri: str) -> Records:
        database = open_database(uri)
        opened.append(database)
        records = Records(database, database.clock(SystemClock()), f"controller {len(opened)}")
        return move_to_host(records, f"host {len(opened)}", "boot")

    yield make
    for database in opened:
        database.close()


def test_a_claim_with_a_journal_entry_is_left_to_whoever_finishes_the_operation(uri: str, connect: Any) -> None:
    """The takeover of a claim is counted. A claim that was removed before cannot be taken over."""
    first, second = connect(uri), connect(uri)
    sandbox = Sandbox(
        uuid="00000000-0000-4000-8000-000000000001", vmid=0, name="s1", state="REQUESTED", lease_expires_at=10**10
    )
    first.reserve(sandbox, vmid=None, vmid_range=(1000, 1099), occupied=set(), journal={})
    first.db.close()
    overview.drop_dead_claims(second)
    assert [entry.sandbox_uuid for entry in second.interrupted()] == [sandbox.uuid]
    assert second.claim(sandbox.uuid, "destroy").taken_over and second.db.takeovers == 1
