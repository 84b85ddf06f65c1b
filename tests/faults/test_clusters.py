# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What clusters do besides failing: HA-managed VMs, tickets that end, rights that are taken away halfway, a clone
whose worker was killed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

from support.double import TOKEN_ID
from support.lab import Lab

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, time_scale=0.02)
    try:
        yield made
    finally:
        made.stop()


def test_an_ha_managed_vm_is_stopped_started_and_destroyed(lab: Lab) -> None:
    made = lab.create()
    lab.pve.vm(made.vmid).ha_state = "started"
    assert lab.power("stop", made.vmid).state == "STOPPED"
    # The HA manager's task ends at once; what counts is the VM.
    assert lab.pve.vm(made.vmid).status == "stopped"
    assert lab.power("start", made.vmid).state == "RUNNING"
    assert lab.pve.vm(made.vmid).status == "running"
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.state == "DESTROYED" and lab.pve.vm(made.vmid) is None, outcome.message


def test_a_ticket_that_ended_is_renewed_without_a_word(lab: Lab) -> None:
    lab.pve.users["ops@pve"] = "a-long-made-up-password"
    login = {
        "api_user": "ops@pve",
        "api_password": "a-long-made-up-password",
        "api_token_id": "",
        "api_token_secret": "",
    }
    ctx = lab.context(**login)
    ctx.config.proxmox.api_token_id = ctx.config.proxmox.api_token_secret = None
    made = create.run(ctx, create.Spec(name="a1", ttl=3600)).sandbox
    assert made is not None
    for operation, state in (("stop", "STOPPED"), ("start", "RUNNING")):
        lab.pve.revoke_tickets()
        ctx.refresh()
        assert power.run(ctx, ctx.select_sandbox(made.vmid), operation).state == state
    lab.pve.revoke_tickets()
    ctx.refresh()
    assert destroy.run(ctx, [(ctx.select_sandbox(made.vmid), destroy.Request(force=True))])[0].state == "DESTROYED"
    # A password that is wrong by now is said, after one try.
    lab.pve.revoke_tickets()
    lab.pve.users["ops@pve"] = "another-long-made-up-password"
    ctx.refresh()
    with pytest.raises(AgentlabError, match="refuses the login of 'ops@pve'"):
        ctx.cluster.list_vms()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_rights_taken_away_halfway_leave_a_record_that_is_true(lab: Lab, method: str) -> None:
    made = lab.create()
    suffix = {"POST": "/status/stop", "PUT": f"/qemu/{made.vmid}/config", "DELETE": f"/qemu/{made.vmid}"}[method]

    def revoke(asked: str, path: str) -> None:
        if asked == method and path.endswith(suffix):
            lab.pve.acl = {TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit"})]}

    lab.pve.before = revoke
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.failed and "403" in (outcome.message or ""), outcome
    stopped = method != "POST"
    assert lab.pve.vm(made.vmid).status == ("stopped" if stopped else "running")
    assert [one.state for one in lab.records()] == ["STOPPED" if stopped else "RUNNING"]
    lab.calm()
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


def test_a_clone_whose_worker_was_killed_is_left_and_told(lab: Lab) -> None:
    """The leftover is locked (clone): no token can delete it, so its record stays and says so."""
    lab.pve.next_task("qmclone", "killed")
    with pytest.raises(AgentlabError, match="unexpected status"):
        lab.create()
    assert lab.pve.vm(1000).lock == "clone"
    for _attempt in range(2):
        outcome = lab.destroy(1000, force=True)[0]
        assert outcome.failed and "lock" in (outcome.message or "") + (outcome.reason or ""), outcome
        assert lab.pve.vm(1000) is not None and [one.live for one in lab.records()] == [True]


def test_the_absence_guard_is_judged_before_anything_is_written(lab: Lab) -> None:
    made = [lab.create(name=f"a{number}") for number in range(6)]
    for one in made[1:]:
        lab.pve.remove_vm(one.vmid)
    # One lease is over, and a forced destroy was cut off: neither is touched by a pass that is not to be trusted.
    ctx = lab.context()
    ctx.database.write(
        lambda conn: conn.execute("UPDATE sandboxes SET lease_expires_at = 1 WHERE uuid = ?", (made[0].uuid,)) and None
    )
    claim = ctx.records.claim(made[1].uuid, "destroy")
    ctx.records.write_journal(claim, "destroy", "verifying", {"operation": "destroy", "force": True})
    ctx.records.release(claim)
    lab.pve.requests.clear()
    with pytest.raises(AgentlabError, match="nothing was written"):
        lab.reconcile()
    assert [one.state for one in lab.records()] == ["RUNNING"] * 6
    assert not [method for method, _path, _body in lab.pve.requests if method != "GET"]


def test_a_cut_off_destroy_that_is_refused_now_bars_no_renewal(lab: Lab) -> None:
    made = lab.create(ttl=600)
    ctx = lab.context()
    claim = ctx.records.claim(made.uuid, "destroy")
    ctx.records.write_journal(claim, "destroy", "verifying", {"operation": "destroy", "force": True})
    ctx.records.release(claim)
    with pytest.raises(AgentlabError, match="being destroyed"):
        lab.renew(made.vmid, 7200)
    create.amend(lab.context(), made, protected=True)
    lab.reconcile()
    assert lab.renew(made.vmid, 7200).outcome == "renewed"
    assert lab.pve.vm(made.vmid).status == "running"


def test_a_list_from_before_a_wait_says_nothing_of_a_sandbox_made_meanwhile(lab: Lab) -> None:
    """A bulk destroy waits for the claim of a creation; the VM that came into being meanwhile is not taken for gone."""
    gone = [lab.create(name=f"a{number}") for number in range(3)]
    ctx = lab.context()
    planned = [ctx.select_sandbox(one.vmid) for one in gone]
    last = lab.pve.vm(gone[2].vmid)
    lab.pve.vms.remove(last)
    ctx.cluster.list_vms()
    lab.pve.vms.append(last)
    for one in gone[:2]:
        lab.pve.remove_vm(one.vmid)
    # Another run changes the third while this one waits for its claim.
    lab.renew(gone[2].vmid, 9000)
    outcomes = destroy.run(ctx, [(one, destroy.Request(force=True)) for one in planned])
    assert [one.state for one in outcomes] == ["DESTROYED"] * 3
    assert lab.pve.vm(gone[2].vmid) is None


def test_check_mode_refuses_a_locked_vm_as_the_real_run_does(lab: Lab) -> None:
    made = lab.create()
    lab.pve.snapshot_lock(made.vmid, "backup")
    # Protection bars a delete, not a stop: what is said is the lock.
    lab.pve.vm(made.vmid).config["protection"] = 1
    for dry_run in (True, False):
        ctx = lab.context(dry_run=dry_run)
        with pytest.raises(AgentlabError, match=r"its VM is locked \(backup\)"):
            power.run(ctx, ctx.select_sandbox(made.vmid), "stop")


def test_a_new_certificate_authority_is_adopted_when_the_operator_says_so(lab: Lab) -> None:
    made = lab.create()
    lab.pve.ca_fingerprint = "AA:BB"
    with pytest.raises(AgentlabError, match="adopt_cluster=true"):
        lab.create(name="a2")
    assert reconcile.run(lab.context(), apply=True, adopt_cluster=True) == []
    assert lab.create(name="a2").state == "RUNNING" and lab.records()[0].uuid == made.uuid


def test_a_process_that_cannot_be_looked_at_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may hide the processes of other users."""
    mine = holders.describe_process()
    monkeypatch.setattr(holders, "_read_text", lambda path: "" if path.endswith("/stat") else Path(path).read_text())
    assert not holders.is_dead(mine)
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    assert holders.is_dead(json.dumps({**json.loads(mine), "pid": ended.pid}))
