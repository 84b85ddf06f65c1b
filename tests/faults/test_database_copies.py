# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Claims, clocks that jump, and databases that are copies of one another, or share one cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    ClaimLost,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

from faults.attack_support import NOTHING_LEFT, try_all, two_nodes
from support.double import Server
from support.lab import FakeClock, Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    with two_nodes(one_lab):
        yield one_lab


def test_a_claim_of_a_live_run_survives_any_jump_of_the_clock(lab: Lab) -> None:
    lab.clock = FakeClock()
    made = lab.create()
    lab.context().records.claim(made.uuid, "stop")
    lab.clock.jump(30 * 86400)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].reason == "busy"
    assert lab.context().records.list_interrupted() == []
    lab.clock.jump(-60 * 86400)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].reason == "busy"
    # Real time passes: nobody holds a claim for ever.
    lab.clock.pass_time(lab.context().records.claim_seconds + 1)
    assert lab.destroy(made.vmid, force=True, claim_timeout=0)[0].outcome == "destroyed"


def test_a_claim_is_longer_than_all_waits_between_two_writes(lab: Lab) -> None:
    # Resize, three tries to start, the HA manager and the guest agent, each as long as wait_timeout.
    ctx = lab.context(wait_timeout="12h")
    assert ctx.records.claim_seconds >= 6 * 12 * 3600


def test_a_fence_is_not_handed_out_twice_when_an_old_database_is_restored(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    ctx.records.claim(made.uuid, "look")
    ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    kept = ctx.records.read_meta("fence")
    claim = ctx.records.claim(made.uuid, "stop")

    def restore(conn: Any) -> None:
        conn.execute("DELETE FROM claims")
        conn.execute("UPDATE meta SET value = ? WHERE key = 'fence'", (kept,))

    ctx.database.write(restore)
    time.sleep(1.1)
    second = lab.context().records.claim(made.uuid, "destroy")
    assert second.fence != claim.fence
    with pytest.raises(ClaimLost):
        ctx.records.write_journal(claim, "stop", "requested", {})


def test_a_destroy_whose_claim_was_taken_over_is_no_failure_when_it_is_done(lab: Lab) -> None:
    """Another run finished it meanwhile: the sandbox is DESTROYED, and that is what the answer says."""
    ours = lab.timed_out()
    took: list[Any] = []

    async def take_over(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/cluster/nextid") and not took:
            took.append(None)

            def work() -> None:
                ctx = lab.context(actor="other")
                ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
                took.append(reconcile.run(ctx, apply=True))

            await asyncio.to_thread(work)

    lab.pve.before = take_over
    outcome = lab.destroy(ours.vmid, force=True)[0]
    assert len(took) == 2 and lab.record(ours).state == "DESTROYED"
    assert not outcome.failed and outcome.state == "DESTROYED", outcome


def test_an_old_copy_of_the_database_whose_vmid_is_another_sandboxs_by_now(lab: Lab, tmp_path: Any) -> None:
    old = lab.create("old")
    lab.close_contexts()
    lab.back_up(tmp_path / "copy.db")
    lab.destroy(old.vmid, force=True)
    new = lab.create("new", vmid=old.vmid)
    lab.close_contexts()
    database, lab.database = lab.database, str(tmp_path / "copy.db")
    vm = lab.pve.vm(new.vmid)
    before = dict(vm.config)
    lab.pve.requests.clear()
    lab.force_state(old.vmid, "RUNNING", lease_expires_at=int(time.time()) - 5)
    try_all(lab, old.vmid)
    # The old record ends as what it is; the sandbox that this copy knows nothing of is reported and left alone.
    assert lab.record(old).state == "DESTROYED" and lab.record(old).reason == "vmid_reused"
    assert vm in lab.pve.vms and vm.config == before and vm.status == "running" and lab.pve.touched(new.vmid) == []
    drifts = lab.reconcile()
    assert [(drift.kind, drift.vmid, drift.applied) for drift in drifts] == [("unrecorded", new.vmid, False)]
    lab.close_contexts()
    lab.database = database
    assert lab.record(new).state == "RUNNING"


def test_an_old_copy_of_the_database_with_a_half_done_destroy_of_what_is_gone(lab: Lab, tmp_path: Any) -> None:
    """Its journal says `delete sent`: the VMID is another sandbox's by now, and the old task id says nothing of it."""
    old = lab.timed_out("old")
    lab.pve.fault("GET", "/tasks/.*", "answer", status=596, body="", times=999)
    lab.destroy(old.vmid, force=True, wait_timeout="1s")
    lab.calm()
    lab.close_contexts()
    lab.back_up(tmp_path / "copy.db")
    lab.destroy(old.vmid, force=True)
    new = lab.create("new", vmid=old.vmid)
    lab.close_contexts()
    lab.database = str(tmp_path / "copy.db")
    vm = lab.pve.vm(new.vmid)
    lab.pve.requests.clear()
    try_all(lab, old.vmid)
    assert lab.record(old).state == "DESTROYED"
    assert vm in lab.pve.vms and vm.status == "running" and lab.pve.touched(new.vmid) == []
    lab.pve.vms.remove(vm)


def test_two_databases_on_one_cluster_touch_only_their_own(lab: Lab, tmp_path: Any) -> None:
    first = [lab.timed_out("a1"), lab.timed_out("a2")]
    database = lab.database
    two = str(tmp_path / "second.db")
    lab.database = two
    second = lab.create("a1")
    assert second.vmid not in {made.vmid for made in first}
    lab.pve.requests.clear()
    try_all(lab, second.vmid)
    assert lab.record(second).state == "DESTROYED"
    for made in first:
        assert lab.pve.touched(made.vmid) == [] and lab.pve.vm(made.vmid) is not None
    lab.close_contexts()
    lab.database = database
    third = [made.reason for made in lab.prune().pruned]
    assert third == ["destroyed"] * 2 and lab.leftovers() == NOTHING_LEFT


@pytest.mark.parametrize("first", [True, False])
def test_another_cluster_with_a_restored_copy_of_one_of_ours_says_nothing_of_the_others(
    lab: Lab, other_cluster: Server, first: bool
) -> None:
    """A test cluster into which a sandbox's backup was restored: that VM carries both marks, and is still no proof
    that this is our cluster.
    """
    ours = [lab.timed_out(f"b{number}") for number in range(5)]
    copied = ours[0] if first else ours[-1]
    other_cluster.pve.add_vm(copied.vmid, copied.name, status="stopped", config=dict(lab.pve.vm(copied.vmid).config))
    gone = {sandbox.uuid for sandbox in ours} - {copied.uuid}
    prune.run(lab.context(server=other_cluster), prune.Selection())
    for _dummy in range(2):
        try:
            reconcile.run(lab.context(server=other_cluster), apply=True)
        except AgentlabError as error:
            assert error.message
    others = [sandbox for sandbox in ours if sandbox.uuid in gone]
    destroy.run(lab.context(server=other_cluster), [(sandbox, destroy.Request(force=True)) for sandbox in others])
    assert {lab.record(sandbox).state for sandbox in others} == {"TIMEOUT"}
    assert all(lab.pve.vm(sandbox.vmid) is not None for sandbox in ours)
    # The copy itself may have gone (both its marks are ours); the original has not, so its record is not to be trusted
    # with that.
    lab.pve.vms.remove(lab.pve.vm(copied.vmid))
