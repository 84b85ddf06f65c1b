# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What clusters do besides failing: HA-managed VMs, tickets that end, rights that are taken away halfway, a clone whose worker was killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.operations import create, destroy, power

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
    login = {"api_user": "ops@pve", "api_password": "a-long-made-up-password", "api_token_id": "", "api_token_secret": ""}
    ctx = lab.context(**login)
    ctx.config.proxmox.api_token_id = ctx.config.proxmox.api_token_secret = None
    made = create.run(ctx, create.Spec(name="a1", ttl=3600)).sandbox
    assert made is not None
    for operation, state in (("stop", "STOPPED"), ("start", "RUNNING")):
        lab.pve.revoke_tickets()
        ctx.refresh()
        assert power.run(ctx, ctx.select(made.vmid), operation).state == state
    lab.pve.revoke_tickets()
    ctx.refresh()
    assert destroy.run(ctx, [(ctx.select(made.vmid), destroy.Request(force=True))])[0].state == "DESTROYED"
    # A password that is wrong by now is said, after one try.
    lab.pve.revoke_tickets()
    lab.pve.users["ops@pve"] = "another-long-made-up-password"
    ctx.refresh()
    with pytest.raises(AgentlabError, match="refuses the login of 'ops@pve'"):
        ctx.cluster.vms()


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
