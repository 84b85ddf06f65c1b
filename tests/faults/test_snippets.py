# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Custom user data: where it is refused, that nobody else can read it, and that no way out of a sandbox's life
leaves it behind.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    InvalidInput,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import cloud_init
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.lab import Lab

pytestmark = pytest.mark.faults

SECRET = "hunter2-made-up-for-tests-4711"
DATA = f"#cloud-config\npassword: {SECRET}\n"


@pytest.fixture
def lab(snippet_lab: Lab) -> Lab:
    return snippet_lab


def snippets(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def make(lab: Lab, name: str = "a1", **values: Any) -> Sandbox:
    return lab.create(name, cloud_init_user_data=DATA, **values)


def nothing_tells(lab: Lab) -> None:
    """The secret is in no byte of the database (its log and events included), and in no VM's configuration."""
    lab.close_contexts()
    for path in Path(lab.database).parent.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
    assert not any(SECRET in str(vm.config) for vm in lab.pve.vms)
    assert not any(SECRET in str(entry) for entry in lab.pve.history)


def test_it_is_written_for_root_alone_and_the_vm_names_it(lab: Lab, folder: Path) -> None:
    made = make(lab)
    path = folder / f"agentlab-{made.uuid}.yaml"
    assert snippets(folder) == [path.name] and path.read_text() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert lab.pve.vm(made.vmid).config["cicustom"] == f"user=local:snippets/{path.name}"
    nothing_tells(lab)


def test_a_umask_that_is_wide_open_changes_nothing(lab: Lab, folder: Path) -> None:
    before = os.umask(0)
    try:
        make(lab)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / snippets(folder)[0]).stat().st_mode) == 0o600


def test_a_folder_that_is_not_mounted_is_not_taken_for_removed_snippets(lab: Lab, folder: Path) -> None:
    made = lab.create("a1", cloud_init_user_data=DATA)
    away = folder.with_name("unmounted")
    folder.rename(away)
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (
        outcome.failed
        and outcome.reason == "snippet"
        and "is not there (a storage that is not mounted?)" in str(outcome.message)
    )
    away.rename(folder)
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED" and snippets(folder) == []


@pytest.mark.parametrize(
    "way",
    [
        "destroy",
        "force",
        "prune",
        "vm_absent",
        "vmid_reused",
        "reconcile external",
        "failed start",
        "failed clone",
        "cicustom refused",
        "cloud-init failed",
    ],
)
def test_it_is_gone_after_every_way_out(lab: Lab, folder: Path, way: str) -> None:
    if way in ("failed start", "failed clone", "cicustom refused", "cloud-init failed"):
        if way == "failed start":
            lab.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
        elif way == "failed clone":
            lab.pve.next_task("qmclone", "fail", text="no space left")
        elif way == "cicustom refused":
            # Proxmox saves the change all the same.
            lab.pve.after = lambda method, path: (
                [os.unlink(folder / name) for name in snippets(folder)] if path.endswith("/clone") else None
            )
        else:
            lab.pve.cloud_init_errors = [f"('scripts_user', RuntimeError('{SECRET}'))"]
        with pytest.raises(AgentlabError) as caught:
            make(lab, wait_for_cloud_init=True)
        assert SECRET not in caught.value.message and SECRET not in str(caught.value.detail)
        record = lab.records()[0]
        assert record.state == ("FAILED" if way == "cloud-init failed" else "DESTROYED")
        assert (lab.pve.vm(record.vmid) is not None) == (way == "cloud-init failed")
        if way == "cloud-init failed":
            assert record.reason == "cloud_init_failed" and "scripts_user: RuntimeError" in caught.value.message
            with pytest.raises(CreationFailed, match="could not be created earlier"):
                make(lab, wait_for_cloud_init=True)
            assert lab.destroy(record.vmid, force=True)[0].state == "DESTROYED"
    else:
        made = make(lab)
        assert snippets(folder)
        vm = lab.pve.vm(made.vmid)
        if way == "destroy":
            lab.power("stop", made.vmid)
            lab.destroy(made.vmid)
        elif way == "force":
            lab.destroy(made.vmid, force=True)
        elif way == "prune":
            lab.force_state(made.vmid, "TIMEOUT", age=10, lease_expires_at=int(time.time()) - 10)
            assert lab.prune().pruned
        elif way == "vm_absent":
            lab.pve.vms.remove(vm)
            lab.destroy(made.vmid, force=True)
        elif way == "vmid_reused":
            lab.pve.make_foreign(made.vmid)
            lab.destroy(made.vmid, force=True)
        else:
            lab.pve.vms.remove(vm)
            lab.reconcile()
            assert snippets(folder), "one absence is not believed"
            lab.reconcile()
        assert lab.record(made).state == "DESTROYED"
    assert snippets(folder) == []
    nothing_tells(lab)


def test_what_cannot_be_removed_keeps_the_record_and_is_removed_by_the_next_run(lab: Lab, folder: Path) -> None:
    made = make(lab)
    # As root every folder can be written: a folder where the file was cannot be unlinked.
    path = folder / snippets(folder)[0]
    path.unlink()
    path.mkdir()
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert (outcome.outcome, outcome.reason) == ("kept", "snippet") and str(path) in str(outcome.message)
    assert lab.record(made).state != "DESTROYED"
    path.rmdir()
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


def test_a_record_that_was_tampered_with_removes_nothing_else(lab: Lab, folder: Path, tmp_path: Path) -> None:
    made = make(lab)
    bystander = tmp_path / "precious"
    bystander.write_text("x")
    lab.force_state(made.vmid, "STOPPED", snippet=str(bystander))
    lab.destroy(made.vmid, force=True)
    assert bystander.exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no content", "storage 'local' holds no snippets; allow them (pvesm set local --content"),
        ("no storage", "snippets_storage: 'local' is not a storage of node pve1"),
        ("no folder", "No such file or directory on this host"),
        ("open folder", "can be written by everybody"),
        ("other node", "node pve2 does not see"),
        ("this node is another", "but this runs on"),
    ],
)
def test_it_is_refused_where_the_node_would_not_find_it(
    lab: Lab, folder: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {}
    if what == "no content":
        lab.pve.storages["local"]["content"] = "iso"
    elif what == "no storage":
        del lab.pve.storages["local"]
    elif what == "no folder":
        values["options"] = {"snippets_dir": "/nowhere"}
    elif what == "open folder":
        folder.chmod(0o777)
    elif what == "other node":
        lab.pve.add_node("pve2")
        lab.pve.add_template(9001, "debian-pve2", node="pve2")
        values.update(node="pve2", template="debian-pve2")
    else:
        import socket

        lab.pve.add_node("pve2")
        monkeypatch.setattr(socket, "gethostname", lambda: "pve2.example.org")
    with pytest.raises(AgentlabError) as caught:
        make(lab, **values)
    assert message in caught.value.message, caught.value.message
    assert snippets(folder) == [] and not any(vm.vmid < 2000 and vm.vmid >= 1000 for vm in lab.pve.vms)
    assert [one.state for one in lab.records()] == (["DESTROYED"] if what == "other node" else [])
    assert not any(method == "POST" for method, _path, _body in lab.pve.requests)


def test_shared_storage_serves_every_node(lab: Lab, folder: Path) -> None:
    lab.pve.hold_snippets(str(folder), node=None)
    lab.pve.add_node("pve2")
    lab.pve.add_template(9001, "debian-pve2", node="pve2")
    made = make(lab, node="pve2", template="debian-pve2")
    assert made.node == "pve2" and len(snippets(folder)) == 1


@pytest.mark.parametrize("data", ["", "password: x", "#cloud-config\n- a", "#cloud-config\na: [", "x" * (600 * 1024)])
def test_data_that_cloud_init_would_not_understand_is_refused_without_showing_it(data: str) -> None:
    with pytest.raises(InvalidInput, match="cloud_init_user_data") as caught:
        cloud_init.check_data(data)
    assert "password" not in caught.value.message


def test_a_creation_waits_for_the_end_of_cloud_init(lab: Lab) -> None:
    lab.pve.cloud_init_delay = 0.3
    assert make(lab, wait_for_cloud_init=True, wait_for_ip=True).state == "RUNNING"
    lab.pve.cloud_init_errors = None
    with pytest.raises(AgentlabError, match="did not report the end of cloud-init within 1 s"):
        make(lab, "a2", wait_for_cloud_init=True, options={"wait_timeout": "1s"})
    lab.pve.cloud_init_errors = []
    vm = lab.pve.vm(lab.record(1001).vmid)
    lab.pve.power(vm.vmid, "stopped")
    # The next run goes on where that one stopped.
    assert make(lab, "a2", wait_for_cloud_init=True).state == "RUNNING"
