# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Clocks that jump, hosts that sleep: nothing is destroyed early, and expiry resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import timeguard
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, RecordChanged
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders, overview

from support.engines import require_postgresql, server
from support.lab import FakeClock, Lab

pytestmark = pytest.mark.faults

PAUSE = 600


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, clock_jump_pause=PAUSE)
    made.clock = FakeClock()
    yield made
    made.check_promises()
    made.stop()


def running(lab: Lab, vmid: int) -> bool:
    vm = lab.pve.vm(vmid)
    return vm is not None and vm.status == "running"


@pytest.mark.parametrize("jump", [120, 3600, 86400, 20 * 365 * 86400])
def test_jump_forward_expires_and_prunes_nothing_for_a_while(lab: Lab, jump: int) -> None:
    made = lab.create(ttl=60 * 60)
    old = lab.timed_out("old")
    lab.expire()
    lab.clock.jump(jump)
    found = lab.expire()
    assert found.suspended and "clock jumped" in found.suspended and not found.expired
    assert [one.reason for one in lab.prune(older_than=10**9 if jump < 10**8 else 60).kept] in (
        ["clock_jumped"],
        ["too_young"],
    )
    assert [one.reason for one in lab.prune().kept] == ["clock_jumped"]
    lab.reconcile()
    assert lab.record(made).state == "RUNNING" and running(lab, made.vmid) and lab.pve.vm(old.vmid) is not None


def test_the_look_of_another_host_takes_nothing_from_this_hosts_pause(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts share the records; the clock of one jumps, the other's never did."""
    made = lab.create(ttl=3600)
    lab.expire()
    lab.clock.jump(86400)
    assert lab.expire().suspended
    here = holders.describe_process()
    with monkeypatch.context() as other:
        other.setattr(timeguard, "read_host_name", lambda: "other/1")
        other.setattr(timeguard, "describe_process", lambda: here.replace('"boot": "', '"boot": "other'))
        lab.clock.jump(-86400)
        assert not lab.expire().expired
        lab.clock.jump(86400)
    found = lab.expire()
    assert found.suspended and not found.expired and lab.record(made).state == "RUNNING"


def test_jump_forward_and_back_again_destroys_nothing(lab: Lab) -> None:
    made = lab.create(ttl=3600)
    lab.expire()
    lab.clock.jump(86400)
    lab.expire(), lab.reconcile(), lab.prune()
    lab.clock.pass_time(30)
    lab.clock.jump(-86400)
    lab.expire(), lab.reconcile(), lab.prune()
    lab.clock.pass_time(PAUSE + 10)
    assert lab.expire().suspended is None
    lab.reconcile()
    assert lab.record(made).state == "RUNNING" and running(lab, made.vmid)


def test_expiry_resumes_when_the_new_time_stays(lab: Lab) -> None:
    made = lab.create(ttl=3600)
    lab.expire()
    lab.clock.jump(86400)
    assert lab.expire().suspended
    lab.clock.pass_time(PAUSE - 30)
    assert lab.expire().suspended, "resting ends only after the whole pause"
    lab.clock.pass_time(60)
    found = lab.expire()
    assert found.suspended is None and [one.vmid for one in found.expired] == [made.vmid]
    assert lab.record(made).state == "TIMEOUT" and not running(lab, made.vmid)
    assert [one.reason for one in lab.prune().pruned] == ["destroyed"]


@pytest.mark.parametrize("jump", [-120, -3600, -86400])
def test_jump_back_destroys_nothing_early_and_leases_end_later(lab: Lab, jump: int) -> None:
    made = lab.create(ttl=3600)
    old = lab.timed_out("old")
    lab.expire()
    lab.clock.jump(jump)
    assert lab.expire().suspended
    assert not lab.prune(older_than=60).pruned
    lab.clock.pass_time(PAUSE + 10)
    assert lab.expire().suspended is None
    assert lab.record(made).state == "RUNNING" and lab.pve.vm(old.vmid) is not None
    lab.clock.pass_time(3600 - jump)
    assert [one.vmid for one in lab.expire().expired] == [made.vmid]


def test_age_after_a_jump_back_is_never_counted_as_old(lab: Lab) -> None:
    lab.timed_out("old")
    lab.expire()
    lab.clock.jump(-7200)
    lab.clock.pass_time(1)
    lab.expire()
    lab.clock.pass_time(PAUSE + 10)
    lab.expire()
    assert [one.reason for one in lab.prune(older_than=60).kept] == ["too_young"]


def test_small_corrections_are_no_jump(lab: Lab) -> None:
    made = lab.create(ttl=600)
    lab.expire()
    for correction in (30, -30, 45, -45):
        lab.clock.jump(correction)
        lab.clock.pass_time(120)
        assert lab.expire().suspended is None
    lab.clock.pass_time(600)
    assert [one.vmid for one in lab.expire().expired] == [made.vmid]


def test_slow_drift_is_no_jump(lab: Lab) -> None:
    lab.create(ttl=86400)
    lab.expire()
    for _dummy in range(30):
        lab.clock.pass_time(300)
        lab.clock.jump(10)
        assert lab.expire().suspended is None


@pytest.mark.parametrize("hours", [1, 9, 72])
def test_host_asleep_over_an_expiry_expires_on_waking(lab: Lab, hours: int) -> None:
    made = lab.create(ttl=1800)
    lab.expire()
    lab.clock.asleep(hours * 3600)
    found = lab.expire()
    assert found.suspended is None and [one.vmid for one in found.expired] == [made.vmid]


@pytest.mark.way(11)
@pytest.mark.parametrize("late", [0, 1, 30])
def test_a_lease_that_is_renewed_in_its_last_second_holds(lab: Lab, late: int) -> None:
    """Whoever looked before the renewal acts after it: an expiry pass, a prune and a destroy that was planned."""
    made = lab.create(ttl=600)
    lab.clock.pass_time(599)
    # A pass that has read the old end of the lease and is slow to act on it.
    slow = lab.context()
    seen = overview.list_expired(slow.records, int(lab.clock.now()) + 2)
    assert [one.uuid for one in seen] == [made.uuid]
    assert lab.renew(made.vmid, 3600).changed
    lab.clock.pass_time(late)
    with pytest.raises(RecordChanged):
        slow.records.expire(seen[0], lab.clock.now() + 2)
    lab.pve.requests.clear()
    lab.expire(), lab.reconcile(), lab.prune(older_than=0), lab.expire()
    assert lab.record(made).state == "RUNNING" and running(lab, made.vmid) and lab.pve.touched(made.vmid) == []


@pytest.mark.way(11)
def test_a_renewal_that_comes_while_the_expiry_is_at_work_is_an_error(lab: Lab) -> None:
    """Never a success on a VM that is about to be stopped: at every request of the pass, from the first to the last."""
    made = lab.create(ttl=600)
    lab.clock.pass_time(601)
    said: list[str] = []

    def renew(_method: str, _path: str) -> None:
        ctx = lab.context()
        try:
            said.append(lease.renew(ctx, ctx.records.get(made.uuid), 3600).outcome)
        except AgentlabError as error:
            said.append(error.code)

    lab.pve.before = renew
    found = lab.expire()
    lab.prune()
    lab.pve.before = None
    assert (
        [one.state for one in found.expired] == ["TIMEOUT"]
        and len(said) > 5
        and set(said) <= {"state_conflict", "kept"}
    ), said
    assert lab.record(made).state == "DESTROYED" and lab.pve.vm(made.vmid) is None


def test_renewal_after_sleep_over_the_expiry_is_refused(lab: Lab) -> None:
    made = lab.create(ttl=1800)
    lab.clock.asleep(1800)
    with pytest.raises(Exception, match="cannot renew lease"):
        lab.renew(made.vmid, 3600)
    lab.expire()
    assert lab.record(made).state == "TIMEOUT"


def test_rebooted_host_whose_clock_is_behind_rests_for_a_while(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two was wrong, the clock before or the one now, cannot be told: neither bars everything for good,
    nor destroys anything early.
    """
    made = lab.create(ttl=3600)
    lab.timed_out("old")
    lab.expire()
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import timeguard

    monkeypatch.setattr(timeguard, "describe_process", lambda: '{"boot": "another"}')
    lab.clock.boot = 10.0
    lab.clock.jump(-86400)
    assert "behind the time of the last run" in (lab.expire().suspended or "")
    assert [one.reason for one in lab.prune().kept] == ["clock_jumped"]
    lab.clock.pass_time(PAUSE + 10)
    assert lab.expire().suspended is None
    # It was the clock of now that was behind: its correction is a jump, after which all goes on.
    lab.clock.jump(86400)
    assert "jumped" in (lab.expire().suspended or "")
    assert [one.reason for one in lab.prune().kept] == ["clock_jumped"]
    lab.clock.pass_time(PAUSE + 10)
    assert lab.expire().suspended is None and lab.prune().count == 1
    assert lab.record(made).state == "RUNNING"


def test_a_reboot_does_not_end_the_pause_after_a_jump(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is as wrong as before, so every lease would seem to be over."""
    made = lab.create(ttl=3600)
    lab.expire()
    lab.clock.jump(86400)
    assert lab.expire().suspended
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import timeguard

    monkeypatch.setattr(timeguard, "describe_process", lambda: '{"boot": "another"}')
    lab.clock.pass_time(30)
    lab.clock.boot = 10.0
    for _look in range(2):
        assert "the wall clock jumped" in (lab.expire().suspended or "")
        assert lab.record(made).state == "RUNNING"
    # It ends when it would have ended without the reboot.
    lab.clock.pass_time(PAUSE - 35)
    assert lab.expire().suspended
    lab.clock.pass_time(10)
    assert [one.vmid for one in lab.expire().expired] == [made.vmid]


def test_check_mode_after_a_jump_says_so_and_notes_nothing(lab: Lab) -> None:
    lab.timed_out("old")
    lab.expire()
    before = lab.context().records.read_meta(f"clock:{holders.read_host_name()}")
    lab.clock.jump(86400)
    assert [one.reason for one in lab.prune(dry_run=True).kept] == ["clock_jumped"]
    assert lab.context().records.read_meta(f"clock:{holders.read_host_name()}") == before


def test_force_by_a_person_is_not_held_up_by_a_jump(lab: Lab) -> None:
    made = lab.create(ttl=3600)
    lab.expire()
    lab.clock.jump(86400)
    lab.expire()
    assert lab.destroy(made.vmid, force=True)[0].outcome == "destroyed"


def test_claim_of_a_live_run_survives_a_jump_within_its_hour(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    ctx.records.claim(made.uuid, "stop")
    lab.clock.jump(1800)
    outcome = lab.destroy(made.vmid, force=True, claim_timeout=0)[0]
    assert outcome.failed and outcome.reason == "busy"


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu", "Pacific/Kiritimati"])
def test_time_zones_change_no_lease(lab: Lab, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab.create(ttl=3600)
    monkeypatch.setitem(os.environ, "TZ", zone)
    time.tzset()
    try:
        assert not lab.expire().expired
        assert lab.record(made).public()["lease_expires_at"].endswith("Z")
        lab.clock.pass_time(3601)
        assert [one.vmid for one in lab.expire().expired] == [made.vmid]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("wrong_by", [3600, -3600])
def test_a_controller_whose_own_clock_is_wrong_ends_no_lease_early_on_postgresql(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_by: int
) -> None:
    """The server's clock counts for every comparison. The controller is told of the difference by status and doctor."""
    require_postgresql()
    made = Lab(tmp_path)
    made.database = server().uri()
    # The clock of the records, as in a controller.
    made.clock = None
    try:
        kept, ended = made.create("kept", ttl=1800), made.create("ended", ttl=1800)
        made.force_state(ended.vmid, "RUNNING", lease_expires_at=int(time.time()) - 5)
        made.close_contexts()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + wrong_by)
        found = made.expire()
        assert found.suspended is None and [sandbox.vmid for sandbox in found.expired] == [ended.vmid]
        assert made.record(kept).state == "RUNNING" and running(made, kept.vmid)
        assert [(row.vmid, row.reason) for row in made.prune(older_than=1800).kept] == [(ended.vmid, "too_young")]
        assert abs(made.context().database.read_clock_difference() - wrong_by) < 60
        made.check_promises()
    finally:
        monkeypatch.undo()
        made.stop()
