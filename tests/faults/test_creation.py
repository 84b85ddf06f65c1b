# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Creations that are gone on with, and that are waited for: nothing is done twice, nothing is believed of a machine
that is another one by now.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    CreationFailed,
    InvalidInput,
    Kept,
    TaskTimeout,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import cloud_init
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, vm_config, wanted

from support.lab import Lab

pytestmark = pytest.mark.faults

PATIENCE = {"wait_timeout": "1s"}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


def boot_size(lab: Lab, vmid: int) -> str:
    found = re.search(r"size=(\w+)", lab.pve.vm(vmid).config["scsi0"])
    assert found
    return found[1]


# ---- what is gone on with ----


def test_a_disk_grows_once_however_often_its_creation_is_gone_on_with(lab: Lab) -> None:
    lab.pve.agent_default = False
    assert boot_size(lab, 9000) == "3G"
    for _time in range(3):
        with pytest.raises(TaskTimeout, match="Run again to go on waiting"):
            lab.create("a1", disk_size="+10G", wait_for_ip=True, options=PATIENCE)
        assert boot_size(lab, 1000) == "13G"


@pytest.mark.parametrize("when", ["cut-before", "cut-after"])
def test_a_disk_grows_once_when_the_answer_is_lost(lab: Lab, when: str) -> None:
    lab.pve.fault("PUT", "/resize", when)
    with pytest.raises(AgentlabError):
        lab.create("a1", disk_size="+1.5G")
    assert lab.create("a1", disk_size="+1.5G").state == "RUNNING"
    assert boot_size(lab, 1000) == "4608M"


@pytest.mark.parametrize("request_", ["/config", "/resize"])
def test_a_configuration_that_somebody_changes_meanwhile_is_judged_anew_and_the_change_stays(
    lab: Lab, request_: str
) -> None:
    """Also the task of a killed run, still at work, changes it."""
    edited = lab.edited_before(request_)
    made = lab.create("a1", disk_size="+10G", cores=3)
    assert made.state == "RUNNING" and edited == [made.vmid]
    config = lab.pve.vm(made.vmid).config
    assert "edited 1" in config["description"] and int(config["cores"]) == 3 and boot_size(lab, made.vmid) == "13G"


@pytest.mark.parametrize("request_", ["/config", "/resize"])
def test_a_configuration_that_changes_all_the_time_is_left_alone(lab: Lab, request_: str) -> None:
    edited = lab.edited_before(request_, times=99)
    with pytest.raises(Kept, match="its VM's configuration keeps changing; it was left as it is, run again"):
        lab.create("a1", disk_size="20G", cores=3)
    assert len(edited) == 3 and lab.pve.vm(1000).status == "stopped"
    lab.pve.before = None
    # Whoever was told to run again may do so.
    assert lab.reconcile() == []
    made = lab.create("a1", disk_size="20G", cores=3)
    assert made.state == "RUNNING" and boot_size(lab, made.vmid) == "20G"


@pytest.mark.parametrize(
    "ending",
    [
        "checksum missmatch (file change by other user?)",
        "can't lock file '/var/lock/qemu-server/lock-1000.conf' - got timeout",
    ],
)
def test_a_resize_whose_task_met_another_one_is_asked_for_again(lab: Lab, ending: str) -> None:
    lab.pve.next_task("resize", "fail", text=ending)
    made = lab.create("a1", disk_size="+10G")
    assert made.state == "RUNNING" and boot_size(lab, made.vmid) == "13G"


def test_protection_that_somebody_sets_meanwhile_stays(lab: Lab) -> None:
    lab.pve.vm(9000).config["protection"] = 1

    def protect(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/config"):
            lab.pve.before = None
            lab.pve.vm(1000).config.update(
                protection=1, description=lab.pve.vm(1000).config["description"] + "keep me\n"
            )

    lab.pve.before = protect
    lab.create("a1", cores=3)
    config = lab.pve.vm(1000).config
    assert str(config["protection"]) == "1" and int(config["cores"]) == 3


@pytest.mark.parametrize("how", ["cut-before", "595", "596"])
def test_a_look_for_the_address_that_fails_ends_nothing(lab: Lab, how: str) -> None:
    if how.isdecimal():
        lab.pve.fault("GET", "/agent/network-get-interfaces", "answer", status=int(how), times=5)
    else:
        lab.pve.fault("GET", "/agent/network-get-interfaces", how, times=5)
    assert lab.create("a1", wait_for_ip=True).state == "RUNNING"


def test_a_creation_that_was_told_to_run_again_is_not_given_up_meanwhile(lab: Lab) -> None:
    lab.pve.agent_default = False
    with pytest.raises(TaskTimeout, match="Run again to go on waiting"):
        lab.create("a1", wait_for_ip=True, options=PATIENCE)
    assert lab.reconcile() == []
    assert lab.records()[0].state == "BOOTING"
    lab.pve.agent_default = True
    lab.pve.start_agent(lab.pve.vm(1000))
    assert lab.create("a1", wait_for_ip=True).state == "RUNNING"


def test_a_creation_goes_on_where_it_was_after_a_destroy_that_was_refused(lab: Lab) -> None:
    lab.pve.agent_default = False
    with pytest.raises(TaskTimeout):
        lab.create("a1", disk_size="+10G", wait_for_ip=True, options=PATIENCE)
    vm = lab.pve.vm(1000)
    vm.config["lock"] = "backup"
    assert lab.destroy(1000, force=True)[0].reason == "locked"
    del vm.config["lock"]
    assert lab.create("a1", disk_size="+10G").state == "RUNNING" and boot_size(lab, 1000) == "13G"
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_the_protection_of_a_template_does_not_bar_the_rest_of_a_creation(lab: Lab) -> None:
    lab.pve.vm(9000).config["protection"] = 1
    lab.pve.fault("PUT", "/qemu/1000/config", "cut-before")
    with pytest.raises(AgentlabError):
        lab.create("a1")
    assert lab.destroy(1000, force=True)[0].reason == "protected"
    assert lab.create("a1").state == "RUNNING"


@pytest.mark.parametrize(
    ("drive", "more", "size"),
    [
        ("a:b,size=3G", "+10G", "13631488K"),
        ("a:b,size=2252M,ssd=1", "+512K", "2306560K"),
        ("a:b,iothread=1,size=1T", "+1T", "2147483648K"),
        ("a:b,size=1048576", "+1M", "2048K"),
    ],
)
def test_a_disk_grows_to_the_sum_of_the_sizes(drive: str, more: str, size: str) -> None:
    assert vm_config.compute_grown_size(drive, more) == size


def test_a_size_that_is_not_told_is_not_guessed() -> None:
    with pytest.raises(InvalidInput, match="give an absolute one"):
        vm_config.compute_grown_size("a:b,ssd=1", "+1G")


@pytest.mark.parametrize("ending", ["killed", "vanish"])
def test_a_clone_of_which_nobody_can_say_how_it_ended_is_made_anew_once_its_vm_is_gone(lab: Lab, ending: str) -> None:
    lab.pve.next_task("qmclone", ending)
    with pytest.raises(AgentlabError):
        lab.create("a1")
    with pytest.raises(Kept, match=r"not certain.* left alone") as kept:
        lab.create("a1")
    assert (kept.value.reason, kept.value.remedy) == ("ambiguous", "remove") and lab.pve.vm(1000) is not None
    lab.pve.remove_vm(1000)
    time.sleep(2.1)
    made = lab.create("a1")
    assert made.state == "RUNNING" and lab.leftovers() == {"claims": [], "operations": []} and lab.unrecorded() == []


def test_clones_of_others_do_not_bar_one_whose_answer_was_lost(lab: Lab) -> None:
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(AgentlabError):
        lab.create("a1")
    time.sleep(1.2)
    lab.pve.task_endings["qmclone"] = "hang"
    with pytest.raises(TaskTimeout):
        lab.create("b1", options=PATIENCE)
    lab.pve.task_endings.clear()
    assert lab.destroy(1000, force=True)[0].state == "DESTROYED"
    # Its own is waited for, and named.
    refused = lab.destroy(1001, force=True)[0]
    assert refused.failed and lab.pve.running_tasks()[0] in str(refused.message)


def test_a_template_that_is_locked_for_a_moment_is_tried_again(lab: Lab) -> None:
    lab.pve.next_task("qmclone", "fail", text="can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout")
    assert lab.create("a1").state == "RUNNING"
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_a_clone_that_still_runs_is_not_given_up(lab: Lab) -> None:
    lab.pve.next_task("qmclone", "hang")
    with pytest.raises(TaskTimeout, match="Run again to continue with it"):
        lab.create("a1", options=PATIENCE)
    # The caller was told to run again, so a reconcile leaves it to that: while the clone runs, and once it has ended.
    assert lab.reconcile() == []
    assert lab.record(1000).state == "PROVISIONING"
    lab.pve.release_task(lab.pve.running_tasks()[0])
    assert lab.reconcile() == [] and lab.record(1000).state == "PROVISIONING"
    assert lab.create("a1").state == "RUNNING"


def test_a_creation_that_changed_its_vmid_twice_speaks_of_the_last(lab: Lab) -> None:
    for vmid in (1000, 1001):
        lab.pve.add_vm(
            vmid, "hidden", status="running", config={"smbios1": f"uuid=11111111-1111-4111-8111-11111111{vmid}"}
        )
    clones: list[str] = []

    def full(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/clone"):
            clones.append(path)
            if len(clones) == 3:
                lab.pve.fault(
                    "POST", "/clone", "answer", status=500, body='{"data": null, "message": "storage is full"}'
                )

    lab.pve.before = full
    ctx = lab.context()
    real = ctx.cluster.list_vms
    # The list shows neither: as for a token without VM.Audit on them.
    ctx.cluster.list_vms = lambda *, fresh=False: {
        vmid: row for vmid, row in real(fresh=fresh).items() if vmid not in (1000, 1001)
    }  # type: ignore[method-assign]
    with pytest.raises(CreationFailed, match="sandbox 1002 could not be created") as failed:
        create.run(ctx, create.Spec(name="a1", ttl=600))
    assert failed.value.detail["vmid"] == 1002


# ---- what is waited for ----


@pytest.mark.parametrize("asked", ["address", "cloud-init"])
def test_a_stranger_that_takes_the_vmid_while_it_is_waited_for_is_not_taken_for_the_sandbox(
    lab: Lab, asked: str
) -> None:
    lab.pve.agent_default = False
    suffix = "network-get-interfaces" if asked == "address" else "file-read"
    seen: list[str] = []

    def swap(_method: str, path: str) -> None:
        if path.endswith(suffix):
            seen.append(path)
            if len(seen) == 3:
                lab.pve.make_foreign(1000)
                lab.pve.vm(1000).status = "running"
                lab.pve.vm(1000).config["agent"] = "1"
                lab.pve.agent_default = True
                lab.pve.start_agent(lab.pve.vm(1000))

    lab.pve.before = swap
    with pytest.raises(Kept, match="now belongs to another VM"):
        lab.create("a1", wait_for_ip=asked == "address", wait_for_cloud_init=asked == "cloud-init")
    made = lab.record(1000)
    assert made.state == "BOOTING" and made.ip is None
    if asked == "cloud-init":
        assert len(seen) == 3, "nothing more was read in the guest"


@pytest.mark.parametrize("asked", ["address", "cloud-init"])
def test_a_look_that_fails_once_does_not_end_the_wait(lab: Lab, asked: str) -> None:
    suffix = "network-get-interfaces" if asked == "address" else "file-read"
    failed: list[str] = []

    def fail(_method: str, path: str) -> None:
        if path.endswith(suffix) and not failed:
            failed.append(path)
            lab.pve.fault("GET", "/qemu/1000/config", "answer", status=500, body='{"data": null, "message": "boom"}')

    lab.pve.before = fail
    assert (
        lab.create("a1", wait_for_ip=asked == "address", wait_for_cloud_init=asked == "cloud-init").state == "RUNNING"
        and failed
    )


# ---- what was cut off, and the passes of the daemon ----


def test_expiry_leaves_a_destroy_that_was_cut_off_to_be_finished(lab: Lab) -> None:
    made = lab.create("a1")
    lab.interrupt_destroy(made)
    lab.context().database.write(
        lambda conn: conn.execute("UPDATE sandboxes SET lease_expires_at = 1 WHERE uuid = ?", (made.uuid,)) and None
    )
    lab.expire()
    assert lab.record(made).state == "TIMEOUT" and lab.pve.vm(made.vmid).status == "stopped"
    assert [one["kind"] for one in lab.leftovers()["operations"]] == ["destroy"]
    lab.reconcile()
    assert lab.record(made).state == "DESTROYED" and lab.pve.vm(made.vmid) is None


@pytest.mark.parametrize("operation", ["stop", "suspend", "complete"])
def test_a_destroy_that_was_cut_off_is_not_forgotten_for_another_operation(lab: Lab, operation: str) -> None:
    made = lab.create("a1")
    lab.interrupt_destroy(made)
    with pytest.raises(Kept, match="a destroy of sandbox 1000 was cut off; destroy it again or run agentlab_reconcile"):
        lab.power(operation, made.vmid)
    lab.reconcile()
    assert lab.record(made).state == "DESTROYED"


def test_a_task_list_that_cannot_be_read_invents_no_failure(lab: Lab) -> None:
    made = lab.create("a1")
    lab.power("stop", made.vmid)
    lab.force_state(made.vmid, "RUNNING", age=30)
    lab.pve.fault("GET", "/nodes/pve1/tasks", "answer", status=500, body='{"data": null, "message": "boom"}')
    assert [(one.kind, one.action) for one in lab.reconcile()] == [("unknown", "none")] and lab.record(
        made
    ).state == "RUNNING"
    lab.reconcile()
    assert lab.record(made).state == "STOPPED"


def test_a_start_whose_answer_was_lost_leaves_no_vm_without_a_lease(lab: Lab) -> None:
    made = lab.create("a1")
    lab.power("stop", made.vmid)
    lab.pve.fault("POST", "/status/start", "cut-after")
    with pytest.raises(AgentlabError):
        lab.power("start", made.vmid)
    assert [(one.kind, one.action) for one in lab.reconcile()] == [("interrupted", "start finished")]
    assert lab.record(made).state == "RUNNING" and lab.pve.vm(made.vmid).status == "running"
    assert lab.reconcile() == []
    # One that did not come to pass stays what it was.
    lab.power("stop", made.vmid)
    lab.pve.fault("POST", "/status/start", "cut-before")
    with pytest.raises(AgentlabError):
        lab.power("start", made.vmid)
    lab.reconcile()
    assert lab.record(made).state == "STOPPED"


def test_a_vm_that_somebody_started_is_reported_with_the_way_back(lab: Lab) -> None:
    made = lab.create("a1")
    lab.power("stop", made.vmid)
    lab.pve.vm(made.vmid).status = "running"
    for _time in range(2):
        found = lab.reconcile()
        assert [(one.kind, one.applied) for one in found] == [
            ("running", False)
        ] and "start the sandbox, then stop it" in found[0].action
    lab.power("start", made.vmid)
    lab.power("stop", made.vmid)
    assert lab.reconcile() == [] and lab.pve.vm(made.vmid).status == "stopped"


def test_a_sandbox_that_is_created_during_a_pass_is_not_reported_as_unrecorded(lab: Lab) -> None:
    ctx = lab.context()
    real = ctx.cluster.survey

    def survey(vmids: Any) -> Any:
        lab.create("b1")
        return real(vmids)

    ctx.cluster.survey = survey  # type: ignore[method-assign]
    assert reconcile.run(ctx, apply=False) == []


# ---- what is refused before anything is made ----


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("disk_size", "20", False),
        ("disk_size", "20G", True),
        ("disk_size", "+0.5T", True),
        ("pool", "lab/agents", True),
        ("pool", "a/b/c/d", False),
        ("pool", "../x y", False),
    ],
)
def test_values_that_proxmox_would_refuse_are_refused_and_no_others(option: str, value: str, valid: bool) -> None:
    spec = create.Spec(name="a1", **{option: value})
    if valid:
        spec.check()
    else:
        with pytest.raises(InvalidInput, match=f"{option}: "):
            spec.check()


def test_user_data_that_is_no_mapping_by_its_kind(lab: Lab) -> None:
    cloud_init.check_data(
        "#cloud-config-archive\n- type: text/cloud-config\n  content: |\n    #cloud-config\n    packages: [a]\n"
    )
    cloud_init.check_data('#cloud-config-jsonp\n[{"op": "add", "path": "/a", "value": 1}]\n')
    with pytest.raises(InvalidInput, match="must be followed by a mapping"):
        cloud_init.check_data("#cloud-config\n- a\n")


def test_no_lease_is_longer_than_a_life(lab: Lab) -> None:
    ctx = lab.context(max_lifetime="1h")
    with pytest.raises(InvalidInput, match=r"ttl: 1d is longer than max_lifetime \(1h\)"):
        wanted.make_spec(ctx, {"name": "a1", "ttl": "1d"})
    assert (
        wanted.make_spec(ctx, {"name": "a1"}).ttl == 3600
        and wanted.make_spec(ctx, {"name": "a1", "ttl": "30m"}).ttl == 1800
    )


def test_a_template_whose_node_is_offline_is_not_called_missing(lab: Lab) -> None:
    lab.pve.add_node("pve2")
    lab.pve.set_node_offline("pve1")
    with pytest.raises(
        InvalidInput,
        match=r"template: 'debian-13' is not to be seen, but pve1 is offline, and what is there is not known",
    ) as caught:
        lab.create("a1")
    assert "None" not in caught.value.message and lab.records() == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("ssh_public_keys", ["ssh-ed25519 AAAA \ud800"]), ("cloud_init_user_data", "#cloud-config\n# \udfff\n")],
)
def test_half_a_character_is_refused_before_anything_is_made(option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{option}: "):
        create.Spec(name="a1", **{option: value}).check()


def test_a_clone_that_takes_longer_than_was_waited_is_left_to_the_next_run(lab: Lab) -> None:
    lab.pve.next_task("qmclone", "slow", seconds=4.0)
    with pytest.raises(TaskTimeout, match="Run again to continue with it"):
        lab.create("a1", options={"wait_timeout": "1s"})
    # The doctor names the way out that works; a reconcile, which the daemon runs all the time, is none.
    settings = config.load({**lab.options, "database": lab.database}, lab.server.environment(lab.folder))
    report = doctor.Doctor(settings, now=lab.clock).examine(doctor.Scope())
    work = next(finding for finding in report.findings if finding.check == "work")
    assert "wait for their task to be run again: 1000" in work.meaning and "reconcile" not in str(work.advice)
    assert lab.reconcile(apply=False) == []
    assert lab.reconcile() == [] and lab.records()[0].state == "PROVISIONING"
    assert lab.create("a1", options={"wait_timeout": "30s"}).state == "RUNNING"


@pytest.mark.parametrize(
    "text",
    [
        "can't lock file '/var/lock/qemu-server/lock-9000.conf' - got timeout",
        "unable to create VM 1000: config file already exists",
    ],
    ids=["the template was locked", "the VMID was taken"],
)
def test_a_resumed_clone_whose_task_failed_is_sent_again_at_once(lab: Lab, text: str) -> None:
    """The failed task proves that nothing of the earlier request comes any more: there is no doubt to wait for."""
    lab.pve.next_task("qmclone", "hang")
    with pytest.raises(TaskTimeout):
        lab.create("a1", options={"wait_timeout": "1s"})
    lab.pve.kill_task(lab.pve.running_tasks()[0], text)
    if lab.pve.vm(1000):
        lab.pve.remove_vm(1000)
    if "exists" in text:
        lab.pve.add_vm(1000, "stranger", config={"smbios1": "uuid=11111111-1111-4111-8111-111111111000"})
    made = lab.create("a1", options={"doubt_window": "60s", "wait_timeout": "6s"})
    assert (made.state, made.vmid) == ("RUNNING", 1001 if "exists" in text else 1000)
    assert "exists" not in text or lab.pve.touched(1000) == []


def interrupted(lab: Lab, *, apply: bool) -> list[int]:
    """Return the sandboxes of the operations that a reconcile finishes, or would finish."""
    drifts = lab.reconcile(apply=apply)
    return [drift.sandbox.vmid for drift in drifts if drift.kind == "interrupted" and drift.sandbox is not None]


def test_a_creation_whose_vm_an_administrator_removed_has_a_way_out(lab: Lab) -> None:
    lab.pve.next_task("qmclone", "killed")
    with pytest.raises(AgentlabError):
        lab.create("a1")
    made = lab.records()[0]
    lab.reconcile()
    # The VM is there and not certainly ours: neither check mode nor a pass finishes that.
    assert interrupted(lab, apply=False) == [] and interrupted(lab, apply=True) == []
    lab.pve.remove_vm(made.vmid)
    assert interrupted(lab, apply=False) == [made.vmid] and interrupted(lab, apply=True) == [made.vmid]
    assert lab.leftovers() == {"claims": [], "operations": []}
    assert lab.record(made).state == "FAILED"
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
