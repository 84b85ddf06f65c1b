# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A workspace is called gone only where its volume would be seen."""

from __future__ import annotations

import time

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace, workspace_disk

from support.double import TOKEN_ID
from support.lab import FakeClock, Lab
from support.workspaces import assert_kept_whole, list_mentions, make, now

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("hidden", ["volume", "storage"])
def test_a_volume_that_these_credentials_do_not_see_is_not_called_gone(lab: Lab, hidden: str) -> None:
    """Proxmox's list leaves out what they may not see, with the status of a success."""
    found = make(lab)
    lab.pve.add_vm(2000, "theirs")

    def grant(*volume: str) -> None:
        lab.pve.acl = {TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", *volume})]}

    grant("Datastore.Audit" if hidden == "volume" else "VM.Config.Disk")
    for dry_run in (True, False):
        with pytest.raises(
            Kept,
            match="not prove that the volume is gone: .* Grant Datastore.Allocate, .* together on /storage/local-lvm",
        ):
            workspace.ensure_absent(lab.context(dry_run=dry_run), "w1", force=True)
    told = workspace.show(lab.context(), verify=True)["workspaces"][0]
    assert told["volume_present"] is None and told["attached_to"] == [] and "may not see it" in told["unknown"][0]
    assert now(lab).state == "DETACHED" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    grant("Datastore.Audit", "VM.Config.Disk")
    # Somebody removed it: with rights to see it, that is known.
    lab.pve.storages["local-lvm"]["volumes"].clear()
    told = workspace.show(lab.context(), verify=True)["workspaces"][0]
    assert told["volume_present"] is False and told["unknown"] == []
    assert workspace.ensure_absent(lab.context(), "w1", force=True).outcome == "deleted"


def test_rights_lost_between_deleting_and_looking_leave_it_deleting(lab: Lab) -> None:
    found = make(lab)
    lab.pve.fault("DELETE", r"/content/.*", "cut-before")

    def revoke(method: str, path: str) -> None:
        if method == "DELETE":
            lab.pve.acl = {
                TOKEN_ID: [
                    ("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})
                ]
            }

    lab.pve.before = revoke
    with pytest.raises(AgentlabError):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    lab.pve.before = None
    assert now(lab).state == "DELETING"
    with pytest.raises(Kept, match="may not see it"):
        workspace.finish(lab.context(), now(lab))
    assert now(lab).state == "DELETING" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.acl = None
    workspace.finish(lab.context(), now(lab))
    assert lab.pve.volumes_of(found.owner_vmid) == [] and workspace.open_records(lab.context()).find("w1") is None


def test_a_creation_that_was_cut_off_is_given_up_only_where_its_volume_would_be_seen(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-after")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    lab.pve.acl = {
        TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})]
    }
    with pytest.raises(Kept, match="may not see it"):
        workspace.finish(lab.context(), found)
    lab.pve.acl = None
    assert workspace.finish(lab.context(), found).state == "DETACHED"


def test_a_volume_that_the_storage_does_not_list_for_now_is_not_called_gone(lab: Lab) -> None:
    """Proxmox lists only content types that the storage has now."""
    found = make(lab)
    lab.pve.storages["local-lvm"]["content"] = "rootdir"
    lab.pve.fault("GET", "/content", "answer", status=200, body='{"data": []}', times=9)
    with pytest.raises(Kept, match="has no content type 'images'"):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    assert now(lab).state == "DETACHED" and lab.pve.volumes_of(found.owner_vmid) == [found.volume]


def test_a_right_that_is_granted_between_two_looks_gives_nothing_up(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-after")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    lab.pve.acl = {
        TOKEN_ID: [("/", {"Sys.Audit", "VM.Audit", "VM.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"})]
    }

    def grant(_method: str, path: str) -> None:
        if path.endswith("/access/permissions"):
            lab.pve.acl = None

    lab.pve.before = grant
    assert workspace.finish(lab.context(), found).state == "DETACHED"
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]


def test_a_second_try_to_make_a_volume_is_in_doubt_from_then_on(lab: Lab) -> None:
    lab.pve.fault("POST", "/content", "cut-before")
    with pytest.raises(AgentlabError):
        make(lab)
    found = now(lab)
    lab.options["doubt_window"] = "20s"
    lab.clock = FakeClock()
    lab.clock.pass_time(30)
    assert [one.name for one in workspace_disk.list_unfinished(lab.context())] == ["w1"]
    lab.pve.fault("POST", "/content", "hang", seconds=2, carry_out="late")
    with pytest.raises(AgentlabError):
        workspace.ensure_present(lab.context(api_timeout=1), "w1", size="8G", storage="local-lvm")
    assert workspace_disk.list_unfinished(lab.context()) == []
    with pytest.raises(Kept, match="may still be carried out"):
        workspace.ensure_absent(lab.context(), "w1", force=True)
    time.sleep(2.5)
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    assert workspace.ensure_present(lab.context(), "w1", size="8G").changed
    assert_kept_whole(lab, found)


def test_a_destroy_that_cannot_see_its_workspace_stops_nothing_and_names_the_right(lab: Lab) -> None:
    found = make(lab)
    made, other = lab.create("a1", workspace="w1"), lab.create("a2")
    lab.pve.vm(other.vmid).config["scsi5"] = f"local-lvm:vm-{other.vmid}-disk-7,size=1G"
    lab.pve.acl = {
        TOKEN_ID: [
            (
                "/",
                {
                    "Sys.Audit",
                    "VM.Audit",
                    "VM.Allocate",
                    "VM.PowerMgmt",
                    "VM.Config.Options",
                    "VM.Config.Disk",
                    "Datastore.AllocateSpace",
                },
            )
        ]
    }
    for vmid in (made.vmid, other.vmid, made.vmid):
        outcome = lab.destroy(vmid, force=True)[0]
        assert (outcome.outcome, outcome.reason) == ("kept", "unknown") and "Grant Datastore.Allocate" in str(
            outcome.message
        )
        assert lab.pve.vm(vmid).status == "running"
    assert now(lab).state == "ATTACHED" and len(list_mentions(lab, found)) == 1
    lab.pve.acl = None
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert_kept_whole(lab, found)


def test_one_storage_that_cannot_be_read_leaves_the_others_told(lab: Lab) -> None:
    make(lab)
    make(lab, "w2", storage="shared")
    lab.pve.fault("GET", "/storage/local-lvm/content", "answer", status=595, body="", times=99)
    one, two = workspace.show(lab.context(), verify=True)["workspaces"]
    assert one["volume_present"] is None and one["attached_to"] == [] and "595" in one["unknown"][0]
    assert (two["volume_present"], two["attached_to"], two["unknown"]) == (True, [], [])
