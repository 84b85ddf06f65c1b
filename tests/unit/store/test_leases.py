# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Renewal and expiry of a lease exclude each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import RecordChanged
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.port import Connection
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.lab import FakeClock
from support.records import reserve


def test_a_renewal_that_waited_over_the_end_of_the_lease_is_refused(address: str) -> None:
    """The second in which it began and the wait, each rounded down, are less than the time that has passed."""
    clock = FakeClock()
    clock.wall = 1000000000.9
    store = Records(open_database(address), clock, "x")
    _claim, sandbox = reserve(store)
    store.db.write(
        lambda conn: conn.execute("UPDATE sandboxes SET state = 'RUNNING', lease_expires_at = 1000000001") and None
    )
    sandbox = store.get(sandbox.uuid)
    write = store.db.write

    def late(work: Callable[[Connection], object], *, checked: bool = False) -> object:
        clock.pass_time(0.5)
        return write(work, checked=checked)

    store.db.write = late  # type: ignore[method-assign, assignment]
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 1000003600, clock.now())


def running(store: Records, lease: int) -> Sandbox:
    _dummy, sandbox = reserve(store)
    store.db.write(
        lambda conn: conn.execute("UPDATE sandboxes SET state = 'RUNNING', lease_expires_at = ?", (lease,)) and None
    )
    return store.get(sandbox.uuid)


def test_renewal_and_expiry_exclude_each_other(store: Records) -> None:
    sandbox = running(store, 1000)
    with pytest.raises(RecordChanged):
        store.expire(sandbox, 999)
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 5000, 1000)
    renewed = store.renew(sandbox, 5000, 999)
    assert renewed.lease_expires_at == 5000
    with pytest.raises(RecordChanged):
        store.expire(sandbox, 1000)
    over = store.expire(renewed, 5000)
    assert over.state == "TIMEOUT"
    with pytest.raises(RecordChanged):
        store.renew(over, 9000, 4000)


def test_a_destroy_under_way_beats_a_renewal(store: Records) -> None:
    sandbox = running(store, 10**10)
    store.db.write(lambda conn: conn.execute("UPDATE operations SET kind = 'destroy'") and None)
    with pytest.raises(RecordChanged):
        store.renew(sandbox, 2 * 10**10, 5)


def test_keepalive_renews_what_is_over_but_never_what_is_being_destroyed(address: str) -> None:
    store = Records(open_database(address), SystemClock(), "x")
    sandbox = running(store, 10)
    store.db.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    renewed = store.renew(sandbox, 5000, 1000, keepalive=True)
    assert renewed.lease_expires_at == 5000
    claim = store.claim(sandbox.uuid, "destroy")
    store.write_journal(claim, "destroy", "verifying", {})
    with pytest.raises(RecordChanged):
        store.renew(renewed, 9000, 6000, keepalive=True)
    assert store.get(sandbox.uuid).lease_expires_at == 5000
