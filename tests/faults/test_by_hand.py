# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a message tells the operator to do leads to the end: the commands are read out of the message, carried out,
and the next run succeeds.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import rules, timeguard
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.double import TOKEN_ID
from support.lab import BYSTANDER, FakeClock, Lab

pytestmark = pytest.mark.faults

NOTHING_LEFT = {"claims": [], "operations": []}
USER_DATA = "#cloud-config\n"


@pytest.fixture
def lab(snippet_lab: Lab) -> Iterator[Lab]:
    yield snippet_lab
    snippet_lab.check_promises()
    assert snippet_lab.leftovers() == NOTHING_LEFT


class Operator:
    """Does what a message says, and nothing else."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.commands: dict[str, Callable[..., Any]] = {
            r"qm set (\d+) --protection 0": lambda vmid: self.config(vmid).pop("protection"),
            r"qm set (\d+) --delete (\w+)": lambda vmid, key: self.config(vmid).pop(key),
            r"qm unlock (\d+)": self.unlock,
            r"qm delsnapshot (\d+) (\w+)": lambda vmid, name: lab.pve.vm(int(vmid)).snapshots.pop(name),
            r"qm template (\d+)": self.template,
            r"pvesm set (\S+) --content ([\w,]+)": lambda storage, content: lab.pve.storages[storage].update(
                content=content
            ),
            r"(/\S+) can be written by everybody .*\(chmod o-w\)": lambda path: os.chmod(
                path, os.stat(path).st_mode & ~0o002
            ),
            r"VM (\d+)\b.*remove it by hand": lambda vmid: lab.pve.remove_vm(int(vmid)),
            r"snippet (\S+) cannot be removed.*remove it": os.rmdir,
            r"run again in (\d+) s": lambda seconds: time.sleep(int(seconds) + 0.1),
            r"VM (\d+) has its volume (\S+) attached.*Take the disk off that VM": self.take_off,
        }

    def config(self, vmid: str) -> dict[str, Any]:
        found: dict[str, Any] = self.lab.pve.vm(int(vmid)).config
        return found

    def unlock(self, vmid: str) -> None:
        self.lab.pve.vm(int(vmid)).lock = None
        self.config(vmid).pop("lock", None)

    def template(self, vmid: str) -> None:
        self.lab.pve.vm(int(vmid)).template = True
        self.config(vmid)["template"] = 1

    def take_off(self, vmid: str, volume: str) -> None:
        config = self.config(vmid)
        del config[next(key for key, value in config.items() if str(value).startswith(volume))]

    def follow(self, message: str | None) -> None:
        done = 0
        for words, carry_out in self.commands.items():
            for found in re.finditer(words, message or "", re.S):
                carry_out(*found.groups())
                done += 1
        assert done, f"nothing to do by hand in: {message}"


@pytest.fixture
def operator(lab: Lab) -> Operator:
    return Operator(lab)


def refused(work: Callable[[], Any]) -> str:
    """The message of what is refused."""
    try:
        found = work()
    except AgentlabError as error:
        return error.explain(_adapter.REMEDIES)
    found = found[0] if isinstance(found, list) else found
    assert found.failed, found
    return str(found.explain(_adapter.REMEDIES))


# ---- VMs that are kept ----


def protect(lab: Lab, vmid: int) -> None:
    lab.pve.vm(vmid).config["protection"] = 1


def lock(lab: Lab, vmid: int) -> None:
    # What a backup that was killed leaves.
    lab.pve.vm(vmid).lock = lab.pve.vm(vmid).config["lock"] = "backup"


def copy(lab: Lab, vmid: int) -> None:
    lab.swap(vmid, running=True, description=lab.pve.vm(vmid).config["description"])


def edit(lab: Lab, vmid: int) -> None:
    lab.pve.vm(vmid).config["description"] = "mine"


def disk_by_hand(lab: Lab, vmid: int) -> None:
    found = workspace.ensure_present(lab.context(), "w1", size="1G", storage="local-lvm").workspace
    lab.pve.vm(vmid).config["scsi7"] = f"{found.volume if found else ''},size=1G"


def disk_in_snapshot(lab: Lab, vmid: int) -> None:
    disk_by_hand(lab, vmid)
    vm = lab.pve.vm(vmid)
    vm.snapshots["before"] = {**vm.config, "snaptime": 1}
    del vm.config["scsi7"]


def own_disk_in_snapshot(lab: Lab, vmid: int) -> None:
    workspace.ensure_present(lab.context(), "w1", size="1G", storage="local-lvm")
    ctx = lab.context()
    workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(vmid))
    vm = lab.pve.vm(vmid)
    vm.snapshots["before"] = {**vm.config, "snaptime": 1}


@pytest.mark.parametrize("state", ["RUNNING", "TIMEOUT"])
@pytest.mark.parametrize("spoil", [protect, lock, copy, edit, disk_by_hand, disk_in_snapshot, own_disk_in_snapshot])
def test_a_vm_that_is_kept(lab: Lab, operator: Operator, spoil: Callable[[Lab, int], None], state: str) -> None:
    made = lab.create()
    spoil(lab, made.vmid)
    lab.force_state(made.vmid, state)
    if state == "TIMEOUT":
        report = lab.prune()
        message = str((report.kept + report.failed)[0].message)
    else:
        message = refused(lambda: lab.destroy(made.vmid, force=True))
    assert lab.record(made).live
    operator.follow(message)
    outcome = lab.prune().pruned[0] if state == "TIMEOUT" else lab.destroy(made.vmid, force=True)[0]
    assert outcome.state == "DESTROYED" and not outcome.failed and lab.pve.vm(made.vmid) is None


def test_a_sandbox_that_is_protected(lab: Lab) -> None:
    made = lab.create(protected=True)
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.failed and "is protected" in str(outcome.message) and outcome.remedy == "unprotect"
    create.amend(lab.context(), lab.record(made), protected=False)
    assert lab.destroy(made.vmid, force=True)[0].outcome == "destroyed"


def test_a_snippet_that_cannot_be_removed(lab: Lab, operator: Operator, folder: Path) -> None:
    made = lab.create(cloud_init_user_data=USER_DATA)
    path = folder / os.listdir(folder)[0]
    # Root can write to every folder: a folder where the file was cannot be unlinked.
    path.unlink()
    path.mkdir()
    operator.follow(refused(lambda: lab.destroy(made.vmid, force=True)))
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


# ---- VMIDs that are somebody else's, and VMs that are gone ----


@pytest.mark.parametrize("way", ["destroy", "prune", "reconcile"])
@pytest.mark.parametrize("what", ["foreign", "gone"])
def test_a_vm_that_is_not_ours_or_not_there(lab: Lab, way: str, what: str) -> None:
    made = lab.create()
    if what == "foreign":
        vm = lab.swap(made.vmid, running=True)
        advised = ("Destroy or prune the record", "run agentlab_reconcile")
    else:
        lab.pve.remove_vm(made.vmid)
        advised = ("run agentlab_reconcile",)
    message = refused(lambda: lab.power("stop", made.vmid))
    assert all(one in message for one in advised)
    if way == "destroy":
        lab.destroy(made.vmid, force=True)
    elif way == "prune":
        lab.force_state(made.vmid, "TIMEOUT")
        lab.prune()
    else:
        lab.reconcile(), lab.reconcile()
    assert lab.record(made).state == "DESTROYED"
    if what == "foreign":
        lab.untouched(vm, status="running")


def test_many_vms_that_are_gone_at_once(lab: Lab) -> None:
    made = [lab.create(f"b{number}") for number in range(6)]
    for one in made:
        lab.pve.remove_vm(one.vmid)
    assert "then prune or destroy the sandboxes whose VMs are really gone" in refused(lab.reconcile)
    lab.destroy(*(one.vmid for one in made), force=True)
    assert {one.state for one in lab.records()} == {"DESTROYED"} and lab.reconcile() == []


def test_a_vm_without_a_record_is_removed_as_told(lab: Lab) -> None:
    made = lab.create()
    config = dict(lab.pve.vm(made.vmid).config)
    lab.destroy(made.vmid, force=True)
    lab.pve.add_vm(
        777, "restored", status="stopped", config={**config, "smbios1": "uuid=33333333-1111-4111-8111-111111111111"}
    )
    drift = lab.reconcile()[0]
    assert drift.kind == "unrecorded" and "remove it by hand if nobody needs it" in drift.action
    lab.pve.remove_vm(777)
    assert lab.reconcile() == []


# ---- creations ----


def test_a_creation_that_failed_and_could_not_be_cleaned_up(lab: Lab) -> None:
    lab.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
    lab.pve.fault(
        "DELETE", "/qemu/1000", "answer", status=403, body='{"data":null,"message":"Permission check failed"}', times=9
    )
    assert "remove it with state=absent and force=true" in refused(lab.create)
    lab.calm()
    assert "FAILED state. To give the sandbox up, remove it with state=absent and force=true" in refused(lab.create)
    assert lab.destroy(1000, force=True)[0].outcome == "destroyed"
    assert lab.create().state == "RUNNING"


@pytest.mark.parametrize("kind", ["cut-before", "cut-after"])
@pytest.mark.parametrize("then", ["destroy", "create"])
def test_a_clone_in_doubt_is_settled_as_told(lab: Lab, operator: Operator, kind: str, then: str) -> None:
    lab.pve.fault("POST", "/clone", kind)
    if kind == "cut-after":
        # Carried out: looked for, and gone on with.
        assert lab.create().state == "RUNNING"
        assert sum("/clone" in path for method, path, _body in lab.pve.requests if method == "POST") == 1
        assert lab.destroy(1000, force=True)[0].outcome == "destroyed"
        return
    # Longer than the look for the clone and the destroy take together: ages are whole seconds.
    lab.options["doubt_window"] = "4s"
    refused(lab.create)
    if then == "create":
        # Waits for it by itself.
        assert lab.create().state == "RUNNING"
        return
    operator.follow(refused(lambda: lab.destroy(1000, force=True)))
    assert lab.destroy(1000, force=True)[0].outcome == "destroyed" and lab.pve.vm(1000) is None


def test_a_clone_whose_answer_is_cut_is_awaited_while_its_vm_is_locked(lab: Lab) -> None:
    """The look for the clone takes a second here, and cloning takes longer: the lock of the new VM extends the look."""
    lab.options["doubt_window"] = "4s"
    lab.pve.next_task("qmclone", "slow", seconds=2.5)
    lab.pve.fault("POST", "/clone", "cut-after")
    assert lab.create().state == "RUNNING"
    assert sum("/clone" in path for method, path, _body in lab.pve.requests if method == "POST") == 1


@pytest.mark.parametrize("ending", ["the disk is on fire", "unexpected status", "hang"])
def test_a_clone_that_was_made_although_its_task_says_otherwise(lab: Lab, operator: Operator, ending: str) -> None:
    """Left alone (it may be anybody's), FAILED with the reason; the operator looks and removes it, and the name can
    be used again.
    """
    lab.pve.task_endings["qmclone"] = ending
    refused(lambda: lab.create(options={"wait_timeout": "1s"}))
    lab.calm()
    if ending == "hang":
        upid = re.search(
            r"its clone task (UPID:\S+) is still running; .*\(or stop it, if it hangs\)",
            refused(lambda: lab.destroy(1000, force=True)),
        )
        assert upid is not None
        lab.pve.tasks[upid[1]].update(status="stopped", exitstatus="interrupted by signal")
    vm = lab.pve.vm(1000)
    assert vm is not None
    message = refused(lambda: lab.destroy(1000, force=True))
    assert "remove it by hand if it is to go" in message and vm in lab.pve.vms and lab.record(1000).live
    operator.follow(message)
    assert lab.destroy(1000, force=True)[0].outcome == "destroyed"
    assert lab.create().state == "RUNNING"


def test_a_clone_whose_worker_was_killed(lab: Lab, operator: Operator) -> None:
    lab.pve.next_task("qmclone", "killed")
    refused(lab.create)
    assert lab.pve.vm(1000).lock == "clone"
    message = refused(lambda: lab.destroy(1000, force=True))
    assert "qm unlock 1000" in message
    operator.follow(message)
    assert lab.pve.vm(1000) is None and lab.destroy(1000, force=True)[0].outcome == "destroyed"


def test_a_clone_that_was_removed_before_it_was_bound(lab: Lab) -> None:
    def remove(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/status") and "/tasks/" in path:
            lab.pve.vms[:] = [vm for vm in lab.pve.vms if vm.vmid != 1000]

    lab.pve.after = remove
    message = refused(lab.create)
    lab.pve.after = None
    assert "no VM with that VMID is to be seen" in message and "remove it with state=absent and force=true" in message
    assert lab.destroy(1000, force=True)[0].outcome == "destroyed"
    assert lab.create().state == "RUNNING"


@pytest.mark.parametrize("spoil", ["content", "folder"])
def test_user_data_that_has_no_place(lab: Lab, operator: Operator, folder: Path, spoil: str) -> None:
    if spoil == "content":
        lab.pve.storages["local"]["content"] = "iso"
    else:
        folder.chmod(0o777)
    operator.follow(refused(lambda: lab.create(cloud_init_user_data=USER_DATA)))
    assert lab.create(cloud_init_user_data=USER_DATA).state == "RUNNING"


def test_a_template_that_is_none_yet(lab: Lab, operator: Operator) -> None:
    lab.pve.add_guest(700, "golden")
    operator.follow(refused(lambda: lab.create(template="700", full_clone=True)))
    assert lab.create(template="700", full_clone=True).state == "RUNNING"


# ---- destroys that were cut off ----


@pytest.mark.parametrize("way", ["destroy", "reconcile"])
@pytest.mark.parametrize("kind", ["cut-before", "cut-after"])
def test_a_destroy_that_was_cut_off(lab: Lab, kind: str, way: str) -> None:
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.fault("DELETE", f"/qemu/{made.vmid}", kind)
    refused(lambda: lab.destroy(made.vmid))
    message = refused(lambda: lab.power("start", made.vmid))
    assert "destroy it again or run agentlab_reconcile to finish it" in message
    assert lab.destroy(made.vmid)[0].outcome == "destroyed" if way == "destroy" else lab.reconcile()
    assert lab.record(made).state == "DESTROYED" and lab.pve.vm(made.vmid) is None


# ---- workspaces ----


def test_a_volume_that_somebody_attached_is_freed_as_told(lab: Lab, operator: Operator) -> None:
    disk_by_hand(lab, BYSTANDER)
    made = lab.create()

    def attach() -> Any:
        ctx = lab.context()
        return workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(made.vmid))

    operator.follow(refused(attach))
    assert attach().outcome == "attached"


@pytest.mark.parametrize("what", ["attach", "detach"])
def test_a_guest_without_hotplug_is_stopped_first_as_told(lab: Lab, what: str) -> None:
    workspace.ensure_present(lab.context(), "w1", size="1G", storage="local-lvm")
    made = lab.create(workspace="w1" if what == "detach" else None)

    def work() -> Any:
        ctx = lab.context(wait_timeout="1s")
        return (
            workspace.ensure_detached(ctx, "w1")
            if what == "detach"
            else workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(made.vmid))
        )

    lab.pve.hotplug = False
    assert re.search(r"[Ss]top the sandbox, then (at|de)tach the workspace", refused(work))
    lab.power("stop", made.vmid)
    assert work().outcome == f"{what}ed"


# ---- guards ----


def test_guards_that_tripped(lab: Lab) -> None:
    for number in range(6):
        lab.timed_out(f"b{number}")
    assert "then raise max_count" in refused(lambda: lab.prune(max_count=3))
    policy = rules.Policy(
        enabled=True,
        guard_count=3,
        guard_percent=100,
        rules=(rules.CleanupRule("over", rules.DESTROY, states=("TIMEOUT",)),),
    )
    assert "cleanup is frozen until it is released" in refused(lambda: cleanup.run(lab.context(), policy))
    message = refused(lambda: cleanup.run(lab.context(), policy))
    assert "look at what the rules would do (dry run), then release cleanup" in message
    assert cleanup.run(lab.context(dry_run=True), policy).candidates == 6
    assert lab.prune(max_count=6).count == 6
    cleanup.release(lab.context())
    assert cleanup.run(lab.context(), policy).candidates == 0


def test_a_freeze_stops_the_rules_that_are_at_work(lab: Lab) -> None:
    for number in range(3):
        lab.force_state(lab.create(f"c{number}", tags=[f"t{number}"]).vmid, "TIMEOUT", age=100)
    lab.force_state(lab.create("stuck").vmid, "BOOTING", age=100)
    # Two of them under one rule, and one that destroys nothing.
    policy = rules.Policy(
        enabled=True,
        guard_count=9,
        guard_percent=100,
        rules=(
            rules.CleanupRule("r0", rules.DESTROY, states=("TIMEOUT",), tags=("t0", "t1")),
            rules.CleanupRule("r1", rules.DESTROY, states=("TIMEOUT",)),
            rules.CleanupRule("r2", rules.FAIL, states=("BOOTING",)),
        ),
    )

    def freeze(method: str, _path: str) -> None:
        if method == "DELETE" and not timeguard.read_freeze(lab.context()):
            cleanup.freeze(lab.context(), "the operator saw it")

    lab.pve.before = freeze
    report = cleanup.run(lab.context(connections=1), policy)
    lab.pve.before = None
    assert [one.name for one in report.pruned] == ["c0"] and not report.marked
    assert {(one.name, one.reason) for one in report.kept} == {
        ("c1", "changed"),
        ("c2", "changed"),
        ("stuck", "changed"),
    }
    assert all("was frozen during this run; release cleanup" in str(one.message) for one in report.kept)
    assert {one.name: one.state for one in lab.records() if one.live} == {
        "c1": "TIMEOUT",
        "c2": "TIMEOUT",
        "stuck": "BOOTING",
    }
    cleanup.release(lab.context())
    after = cleanup.run(lab.context(), policy)
    assert (len(after.pruned), len(after.marked)) == (2, 1)


# ---- what another run did meanwhile ----


def test_a_creation_that_another_run_gave_up_is_not_taken_for_a_success(lab: Lab) -> None:
    """This run waits for the other one's claim; what the sandbox is then decides, not what it was."""
    first = lab.create("web")
    lab.force_state(first.vmid, "PROVISIONING")
    ctx = lab.context(claim_timeout="20s")
    claim = ctx.records.claim(first.uuid, "create", wait=0)
    ended: list[Any] = []
    waiting = threading.Thread(target=lambda: ended.append(lab.create("web")))
    waiting.start()
    time.sleep(0.5)
    # What the other run does when its clone fails: cleans up, and is done.
    lab.pve.remove_vm(first.vmid)
    ctx.records.change(
        claim, ctx.records.get(first.uuid), "create", to="DESTROYED", reason="creation_failed", finish=True
    )
    waiting.join(30)
    assert len(ended) == 1 and ended[0].live and ended[0].uuid != first.uuid and lab.pve.vm(ended[0].vmid) is not None


def test_a_destroy_that_was_cut_off_and_is_refused_now_bars_nothing(lab: Lab) -> None:
    made = lab.create()
    lab.pve.fault("DELETE", f"/qemu/{made.vmid}", "cut-before")
    assert lab.destroy(made.vmid, force=True)[0].failed
    lab.pve.vm(made.vmid).config["protection"] = 1
    time.sleep(2.2)
    assert "protection" in str(lab.destroy(made.vmid, force=True)[0].message)
    assert lab.leftovers() == {"claims": [], "operations": []}
    # The administrator wanted to keep it, so it can be used.
    lab.power("start", made.vmid)
    assert lab.record(made).state == "RUNNING"


@pytest.mark.parametrize("refused", ["before the mark", "by the mark"])
def test_the_doubt_of_a_cut_off_destroy_ends_however_often_it_is_asked_for_again(lab: Lab, refused: str) -> None:
    lab.clock = FakeClock()
    lab.options["doubt_window"] = "60s"
    made = lab.create()
    lab.pve.fault("DELETE", f"/qemu/{made.vmid}", "cut-before")
    assert lab.destroy(made.vmid, force=True)[0].failed
    if refused == "before the mark":
        lab.pve.vm(made.vmid).config["protection"] = 1
    else:
        lab.pve.fault(
            "PUT",
            f"/qemu/{made.vmid}/config",
            "answer",
            status=403,
            body='{"data": null, "message": "Permission check failed"}',
            times=99,
        )
    for _time in range(5):
        lab.clock.pass_time(14)
        assert lab.destroy(made.vmid, force=True)[0].failed
    assert lab.leftovers() == {"claims": [], "operations": []}
    assert lab.record(made).live and lab.pve.vm(made.vmid) is not None


def cut_off(lab: Lab, vmid: int, ago: int = 0) -> int:
    """The journal of a run that was killed when its delete may have been sent, so many seconds ago; when that was."""
    lab.options["doubt_window"] = "60s"
    ctx = lab.context()
    claim = ctx.records.claim(lab.record(vmid).uuid, "destroy", wait=0)
    since = ctx.clock.now() - ago
    ctx.records.write_journal(claim, "destroy", "deleting", {"since": since})
    ctx.records.release(claim)
    return since


@pytest.mark.parametrize("why", ["hidden", "the delete is refused", "the mark is cut off"])
def test_what_comes_after_a_cut_off_destroy_neither_ends_nor_prolongs_its_doubt(lab: Lab, why: str) -> None:
    made = lab.create()
    since = cut_off(lab, made.vmid, 20)
    if why == "hidden":
        lab.pve.acl = {TOKEN_ID: [("/", {"Sys.Audit"})]}
    elif why == "the delete is refused":
        lab.pve.fault(
            "DELETE",
            f"/qemu/{made.vmid}",
            "answer",
            status=403,
            body='{"data": null, "message": "Permission check failed"}',
        )
    else:
        lab.pve.fault("PUT", f"/qemu/{made.vmid}/config", "cut-before")
    assert lab.destroy(made.vmid, force=True)[0].failed
    lab.pve.acl = None
    left = lab.context().records.find_journal_entry(made.uuid)
    assert left is not None and (left.kind, left.phase, left.detail["since"]) == ("destroy", "deleting", since)
    with pytest.raises(AgentlabError, match="was cut off"):
        lab.power("start" if lab.record(made).state == "STOPPED" else "stop", made.vmid)
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


@pytest.mark.parametrize("state", ["moved", "moved, and its node is down", "gone", "somebody started it"])
def test_a_stopped_sandbox_is_looked_for_on_its_node_first(lab: Lab, state: str) -> None:
    """The record's node is a hint: where it does not help, the list of VMs tells."""
    lab.pve.add_node("pve2")
    made = lab.create()
    lab.power("stop", made.vmid)
    vm = lab.pve.vm(made.vmid)
    if state.startswith("moved"):
        vm.node = "pve2"
    if "down" in state:
        lab.pve.fault("GET", f"/nodes/pve1/qemu/{made.vmid}/config", "answer", status=595, times=9)
    if state == "gone":
        lab.pve.vms.remove(vm)
    if state == "somebody started it":
        lab.pve.power(made.vmid, "running")
    done = lab.destroy(made.vmid, force=True)[0]
    assert done.state == "DESTROYED" and done.reason == ("vm_absent" if state == "gone" else "destroyed")
    assert lab.pve.vm(made.vmid) is None
