# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Answers of Proxmox VE that are lost: the next run settles them, and nothing is freed in between."""

from __future__ import annotations

import time

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces.workspace import WorkspaceRefused

from support.lab import BYSTANDER, Lab
from support.workspaces import assert_kept_whole, attach, detach, list_mentions, make, now

pytestmark = pytest.mark.faults


def test_a_disk_that_is_only_pending_after_a_lost_answer_is_not_called_attached(lab: Lab) -> None:
    found = make(lab)
    made = lab.create("a1")
    lab.pve.hotplug = False
    lab.pve.fault("PUT", f"/qemu/{made.vmid}/config", "cut-after")
    with pytest.raises(AgentlabError):
        attach(lab, "w1", made.vmid)
    assert now(lab).state == "ATTACHING" and lab.pve.vm(made.vmid).pending
    with pytest.raises(AgentlabError, match="did not take the disk"):
        attach(lab, "w1", made.vmid)
    assert now(lab).state != "ATTACHED" and not lab.pve.vm(made.vmid).pending
    lab.pve.hotplug = True
    assert attach(lab, "w1", made.vmid).outcome == "attached"
    assert len(list_mentions(lab, found)) == 1


@pytest.mark.parametrize("kind", ["cut-before", "cut-after"])
@pytest.mark.parametrize(("method", "suffix"), [("POST", "/content"), ("PUT", "/config"), ("DELETE", r"/content/.*")])
def test_a_lost_answer_is_settled_by_the_next_run(lab: Lab, kind: str, method: str, suffix: str) -> None:
    if method == "POST":
        lab.pve.fault(method, suffix, kind)
        with pytest.raises(AgentlabError):
            make(lab)
        found = make(lab)
        assert_kept_whole(lab, found)
        return
    found = make(lab)
    made = lab.create("a1")
    if method == "PUT":
        # A write that was carried out is recognised in the configuration; one that was not is left to the next run.
        lab.pve.fault(method, suffix, kind)
        if kind == "cut-before":
            with pytest.raises(AgentlabError):
                attach(lab, "w1", made.vmid)
            assert now(lab).state == "ATTACHING"
        assert attach(lab, "w1", made.vmid).outcome == "attached"
        assert len(list_mentions(lab, found)) == 1
        lab.pve.fault(method, suffix, kind)
        if kind == "cut-before":
            with pytest.raises(AgentlabError):
                detach(lab, "w1")
        assert detach(lab, "w1").changed
        assert_kept_whole(lab, found)
    else:
        lab.pve.fault(method, suffix, kind)
        with pytest.raises(AgentlabError):
            workspace.ensure_absent(lab.context(), "w1", force=True)
        assert now(lab).state == "DELETING"
        with pytest.raises(WorkspaceRefused, match="is DELETING"):
            attach(lab, "w1", made.vmid)
        assert workspace.ensure_absent(lab.context(), "w1", force=True).outcome == "deleted"
        assert lab.pve.volumes_of(found.owner_vmid) == []


def test_a_refusal_after_a_lost_answer_does_not_free_what_may_still_be_attached(lab: Lab) -> None:
    """The request of the first try is carried out late; meanwhile the second is refused.

    Nobody else may get the workspace before that is over.
    """
    found = make(lab)
    one, two = lab.create("a1"), lab.create("a2")
    lab.options["doubt_window"] = "30s"
    lab.pve.fault("PUT", f"/qemu/{one.vmid}/config", "hang", seconds=3, carry_out="late")
    with pytest.raises(AgentlabError):
        attach(lab, "w1", one.vmid, api_timeout=1)
    # The second try is refused before it asks for anything: somebody's VM has the volume for a moment.
    bystander = lab.pve.vm(BYSTANDER)
    bystander.config["scsi7"] = f"{found.volume},size=8G"
    with pytest.raises(AgentlabError):
        attach(lab, "w1", one.vmid)
    del bystander.config["scsi7"]
    with pytest.raises(AgentlabError):
        attach(lab, "w1", two.vmid)
    time.sleep(3.5)
    assert [where.partition(":")[0] for where in list_mentions(lab, found)] in ([], [str(one.vmid)])
    assert now(lab).sandbox_uuid == one.uuid
