# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The file with user data lies on the host that wrote it, and another controller does not take it for removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.cloud_init import CloudInitFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders

from support.engines import ENGINES, new_address
from support.lab import Lab

DATA = "#cloud-config\npackages: [git]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "snippets"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def lab(tmp_path: Path, folder: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A cluster, and records on the engine that the test names."""
    made = Lab(tmp_path, snippets_dir=str(folder))
    made.pve.hold_snippets(str(folder))
    made.database = new_address(request.param, made.database)
    yield made
    made.stop()


@pytest.mark.parametrize("lab", ["postgresql"], indirect=True)
def test_another_host_keeps_the_record_until_the_file_is_removed_where_it_is(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lab.create(cloud_init_user_data=DATA)
    (file,) = folder.iterdir()
    here = holders.read_host_name()
    assert lab.record(made).snippet_host == here
    # The other host has a folder of the same name, and the file is not in it.
    hidden = folder.rename(folder.with_name("of-the-first-host"))
    folder.mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(holders, "read_host_name", lambda: "second/0123456789abcdef")
        (kept,) = lab.destroy(made.vmid, force=True)
        assert (kept.reason, lab.record(made).state != "DESTROYED") == ("snippet", True)
        name = here.partition("/")[0]
        assert kept.message.endswith(
            f"its cloud-init snippet {file} was written on host {name}, and is not on this one; the daemon of {name} "
            f"removes it, or run again on {name}. If {name} is gone for good, make an empty file of that name here, "
            "then run again"
        )
        lab.reconcile()
        assert lab.record(made).state != "DESTROYED"
    assert [path.name for path in hidden.iterdir()] == [file.name]
    folder.rmdir()
    hidden.rename(folder)
    lab.destroy(made.vmid, force=True)
    assert lab.record(made).state == "DESTROYED" and list(folder.iterdir()) == []


@pytest.mark.parametrize("lab", ["postgresql"], indirect=True)
@pytest.mark.parametrize("what", ["destroyed", "removed by hand", "replaced", "interrupted"])
def test_the_host_of_the_file_closes_the_record_without_reconciling(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    made, other = lab.create("made", cloud_init_user_data=DATA), lab.create("other", cloud_init_user_data=DATA)
    hidden = folder.rename(folder.with_name("of-the-first-host"))
    folder.mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(holders, "read_host_name", lambda: "second/0123456789abcdef")
        if what == "destroyed":
            lab.destroy(made.vmid, force=True)
        elif what == "interrupted":
            claim = lab.context().records.claim(made.uuid, "destroy")
            lab.context().records.write_journal(claim, "destroy", "deleting", {"operation": "destroy", "force": True})
            lab.context().records.release(claim)
            lab.reconcile()
        else:
            lab.pve.remove_vm(made.vmid)
            if what == "replaced":
                lab.pve.add_vm(made.vmid, "somebody-elses", config={"description": "not ours"})
            for _pass in range(3):
                lab.reconcile()
        assert lab.record(made).state != "DESTROYED"
        # The files are on another host.
        assert reconcile.finish_own_files(lab.context()) == []
    folder.rmdir()
    hidden.rename(folder)
    lab.pve.requests.clear()
    assert [drift.error for drift in reconcile.finish_own_files(lab.context())] == [None]
    assert lab.record(made).state == "DESTROYED" and lab.record(other).state == "RUNNING"
    assert [path.name for path in folder.iterdir()] == [f"agentlab-{other.uuid}.yaml"]
    assert (lab.pve.vm(made.vmid) is not None) == (what == "replaced")
    lab.pve.requests.clear()
    assert reconcile.finish_own_files(lab.context()) == [] and lab.pve.requests == []


@pytest.mark.parametrize("lab", ["postgresql"], indirect=True)
def test_a_file_that_cannot_be_removed_is_told_once_however_often_its_host_looks(lab: Lab, folder: Path) -> None:
    made = lab.create("made", cloud_init_user_data=DATA)
    folder.rename(folder.with_name("not-mounted"))
    assert lab.destroy(made.vmid, force=True)[0].reason == "snippet"
    counts = []
    for _look in range(7):
        drifts = reconcile.finish_own_files(lab.context())
        assert "mount it" in str(drifts[0].error)
        counts.append(len(lab.events(made)))
    assert counts[-1] - counts[0] < 4, "the first looks tell it, and later ones repeat nothing"


@pytest.mark.parametrize("lab", ["postgresql"], indirect=True)
def test_a_storage_that_both_hosts_share_and_a_host_that_is_gone(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, lost = lab.create("shared", cloud_init_user_data=DATA), lab.create("lost", cloud_init_user_data=DATA)
    monkeypatch.setattr(holders, "read_host_name", lambda: "second/0123456789abcdef")
    lab.destroy(shared.vmid, force=True)
    assert lab.record(shared).state == "DESTROYED"
    (file,) = folder.iterdir()
    file.unlink()
    assert lab.destroy(lost.vmid, force=True)[0].reason == "snippet"
    file.touch()
    lab.destroy(lost.vmid, force=True)
    assert lab.record(lost).state == "DESTROYED" and list(folder.iterdir()) == []


@pytest.mark.parametrize("lab", ["postgresql"], indirect=True)
def test_a_file_that_its_host_removed_holds_no_other_host_up(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.pve.cloud_init_errors = ["('cc_runcmd', RuntimeError('no'))"]
    with pytest.raises(CloudInitFailed):
        lab.create(cloud_init_user_data=DATA, wait_for_cloud_init=True)
    (made,) = lab.records()
    assert (made.state, list(folder.iterdir())) == ("FAILED", [])
    monkeypatch.setattr(holders, "read_host_name", lambda: "second/0123456789abcdef")
    lab.destroy(made.vmid, force=True)
    assert lab.record(made).state == "DESTROYED"


@pytest.mark.parametrize("lab", ENGINES[:1], indirect=True)
def test_records_of_one_host_survive_its_new_name(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a person removed holds nothing up, also after the host was renamed."""
    made = lab.create(cloud_init_user_data=DATA)
    (file,) = folder.iterdir()
    file.unlink()
    monkeypatch.setattr(holders, "read_host_name", lambda: "renamed/0123456789abcdef")
    lab.destroy(made.vmid, force=True)
    assert lab.record(made).state == "DESTROYED"
