# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rules destroy what their guard has counted and nothing else, and nothing at all while they are frozen; what could
not be done is not called done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, OutcomeUnknown
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup

from support.lab import FakeClock, Lab

pytestmark = pytest.mark.faults

TIMEOUTS = "{name: timeouts, match: {states: [TIMEOUT]}, after: 0s, action: destroy}"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


def policy(*each: str, guard: str = "{count: 100, percent: 100}", more: str = "") -> rules.Policy:
    lines = "".join(f"    - {one}\n" for one in each)
    return rules.parse(
        f"auto_cleanup:\n  guard: {guard}\n{more}" + (f"  rules:\n{lines}" if each else ""),
        "/etc/agentlab/cleanup.yaml",
    )


def test_what_comes_free_after_the_guard_has_counted_is_left_for_the_next_run(lab: Lab) -> None:
    for number in range(6):
        lab.timed_out(f"a{number}")
    locked = range(1002, 1006)
    for vmid in locked:
        lab.pve.vm(vmid).config["lock"] = "backup"
    reads: list[str] = []

    def backup_ends(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/config"):
            reads.append(path)
            if len(reads) > 6:
                for vmid in locked:
                    if lab.pve.vm(vmid) is not None:
                        lab.pve.vm(vmid).config.pop("lock", None)

    lab.pve.before = backup_ends
    report = cleanup.run(lab.context(), policy(TIMEOUTS, guard="{count: 3, percent: 100}"))
    assert sorted(one.vmid or 0 for one in report.pruned) == [1000, 1001]
    assert sorted((one.vmid, one.reason) for one in report.kept) == [(vmid, "locked") for vmid in locked]
    assert sorted(lab.ours().values()) == list(locked)


@pytest.mark.parametrize("why", ["frozen", "kept by a rule now", "nothing"])
def test_a_destroy_of_a_rule_that_was_cut_off_is_decided_anew_by_the_rules(lab: Lab, why: str) -> None:
    made = lab.timed_out("a1")
    lab.interrupt_destroy(made, "cleanup")
    vmid = made.vmid
    if why == "frozen":
        cleanup.freeze(lab.context(), "storage maintenance")
    found = lab.reconcile()
    assert [(one.kind, one.applied) for one in found] == [
        ("interrupted", True)
    ] and "the next run of the rules decides again" in found[0].action
    assert lab.record(vmid).state == "TIMEOUT" and lab.pve.vm(vmid) is not None
    assert lab.leftovers() == {"claims": [], "operations": []}
    if why != "frozen":
        keep = ["{name: kept, match: {states: [TIMEOUT]}, action: keep}"] if why.startswith("kept") else []
        cleanup.run(lab.context(), policy(*keep, TIMEOUTS))
        assert lab.record(vmid).state == ("TIMEOUT" if keep else "DESTROYED")


def test_a_prune_that_was_cut_off_rests_while_the_clock_is_doubtful(lab: Lab) -> None:
    lab.clock = FakeClock()
    lab.options["clock_jump_pause"] = "10m"
    lab.expire()
    made = lab.timed_out("a1")
    lab.interrupt_destroy(made, "prune")
    vmid = made.vmid
    lab.clock.jump(86400)
    lab.reconcile()
    assert lab.record(vmid).state == "TIMEOUT" and lab.pve.vm(vmid) is not None


@pytest.mark.parametrize("operation", ["destroy", "prune"])
def test_what_a_person_asked_for_is_finished(lab: Lab, operation: str) -> None:
    made = lab.timed_out("a1")
    lab.interrupt_destroy(made, operation)
    vmid = made.vmid
    lab.reconcile()
    assert lab.record(vmid).state == "DESTROYED" and lab.pve.vm(vmid) is None


def test_a_rule_gives_up_no_creation_whose_clone_may_still_come(lab: Lab) -> None:
    """A killed destroy has put its own journal entry in the place of the creation's, which knows of the clone."""
    lab.pve.fault("POST", "/clone", "cut-before")
    with pytest.raises(OutcomeUnknown):
        lab.create("a1")
    ctx = lab.context()
    sandbox = ctx.records.find_all()[0]
    claim = ctx.records.claim(sandbox.uuid, "destroy", wait=0)
    assert claim.interrupted is not None and claim.interrupted.phase == "cloning"
    creation = {**claim.interrupted.detail, "phase": "cloning", "at": ctx.clock.now()}
    ctx.records.write_journal(
        claim, "destroy", "verifying", {"operation": "destroy", "force": True, "create": creation}
    )
    ctx.records.release(claim)
    lab.force_state(sandbox.vmid, "PROVISIONING", age=100)
    stuck = "{name: stuck, match: {states: [PROVISIONING]}, after: 10s, action: fail}"
    report = cleanup.run(lab.context(), policy(stuck))
    assert [(kept.vmid, kept.reason) for kept in report.kept] == [(sandbox.vmid, "unknown")]
    assert lab.record(sandbox).state == "PROVISIONING"
    assert [row["kind"] for row in lab.leftovers()["operations"]] == ["destroy"]


def test_a_dry_run_tells_what_retention_would_remove(lab: Lab) -> None:
    made = lab.create("a1")
    lab.destroy(made.vmid, force=True)
    lab.context().database.write(
        lambda conn: conn.execute("UPDATE sandboxes SET state_changed_at = ?", (int(time.time()) - 9999,)) and None
    )
    old = policy(more="  retention: {destroyed_records: 1h}\n")
    assert cleanup.run(lab.context(dry_run=True), old).forgotten == 1 and len(lab.records()) == 1
    assert cleanup.run(lab.context(), old).forgotten == 1 and lab.records() == []


def test_a_vm_that_could_not_be_stopped_is_not_called_stopped(lab: Lab) -> None:
    made = lab.timed_out("a1", stopped=False)
    lab.pve.vm(made.vmid).config["lock"] = "backup"
    for _time in range(2):
        found = lab.reconcile()
        assert [(one.kind, one.applied) for one in found] == [("still_running", False)] and "backup" in str(
            found[0].error
        )
        assert lab.pve.vm(made.vmid).status == "running"
    del lab.pve.vm(made.vmid).config["lock"]
    assert [(one.kind, one.applied, one.error) for one in lab.reconcile()] == [("still_running", True, None)]
    assert lab.pve.vm(made.vmid).status == "stopped" and lab.reconcile() == []


def keep_on(lab: Lab, passes: int) -> list[tuple[str, str]]:
    """Let the rules and reconcile come by so often; return (operation, outcome) of the events of the first sandbox."""
    failed = "{name: failed, match: {states: [FAILED]}, after: 0s, action: destroy}"
    for _pass in range(passes):
        lab.reconcile()
        cleanup.run(lab.context(actor="agentlabd"), policy(failed, TIMEOUTS))
    return [(event["operation"], event["outcome"]) for event in lab.events(lab.records()[0])]


@pytest.mark.parametrize("what", ["failed clone", "locked", "foreign marks"])
def test_what_waits_for_a_person_adds_no_event_with_each_pass(lab: Lab, what: str) -> None:
    """The first event of a kind stays, with its time; the passes after it learn nothing new."""
    if what == "failed clone":
        lab.pve.task_endings["qmclone"] = "the disk is on fire"
        with pytest.raises(AgentlabError):
            lab.create("a1")
        lab.calm()
        assert lab.pve.vm(1000) is not None
        lab.force_state(1000, "FAILED", age=10)
    else:
        made = lab.timed_out("a1")
        if what == "locked":
            lab.pve.vm(made.vmid).config["lock"] = "backup"
        else:
            lab.pve.vm(made.vmid).config["description"] = "edited"
    first = keep_on(lab, 2)
    times = [event["at"] for event in lab.events(lab.records()[0])]
    assert first == keep_on(lab, 4)
    assert times == [event["at"] for event in lab.events(lab.records()[0])]
    if what == "locked":
        # What changes is told.
        lab.pve.vm(made.vmid).config["lock"] = "migrate"
        changed = keep_on(lab, 1)
        assert len(changed) == len(first) + 1 and changed == keep_on(lab, 3)
        del lab.pve.vm(made.vmid).config["lock"]
        keep_on(lab, 1)
        assert lab.records()[0].state == "DESTROYED"


def test_each_attempt_of_a_person_is_an_event_of_its_own(lab: Lab) -> None:
    """Who tried what, and when, is what the events are for; also when nothing came of it, and between two passes."""
    made = lab.timed_out("a1")
    lab.pve.vm(made.vmid).config["lock"] = "backup"

    def attempts() -> list[tuple[str, str]]:
        return [(one["operation"], one["outcome"]) for one in lab.events(made) if one["outcome"] in ("kept", "failed")]

    for number in range(1, 4):
        assert lab.destroy(made.vmid, force=True)[0].reason == "locked"
        assert attempts().count(("destroy", "kept")) == number
        lab.prune()
        assert attempts().count(("prune", "kept")) == 1


def test_an_event_is_written_again_after_something_happened(lab: Lab) -> None:
    made = lab.timed_out("a1")
    lab.pve.vm(made.vmid).config["lock"] = "backup"
    before = len(keep_on(lab, 2))
    ctx = lab.context()
    ctx.records.amend(lab.record(made), "update", keepalive=True)
    assert len(keep_on(lab, 2)) == before + 2, "the change, and that it is locked still"
