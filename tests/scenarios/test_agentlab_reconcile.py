# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlab_reconcile in real playbooks: expiry, drift of every kind, and what changes nothing."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from support.story import edit, records, state_of, task, writes, written

RECONCILE = "agentlab_reconcile"


def kinds(answer: dict[str, Any]) -> dict[int, str]:
    return {one["vmid"]: one["kind"] for one in answer["drift"]}


def test_a_short_lease_runs_out_and_prune_removes_it(story: Any, server: Any, env: Any) -> None:
    seen: dict[str, Any] = {}
    run = story(
        [
            task("create", "agentlab_sandbox", name="short", ttl="3s"),
            task("and one that stays", "agentlab_sandbox", name="long", ttl="2h"),
            task("and one that lives on", "agentlab_sandbox", name="kept-alive", ttl="3s", keepalive=True),
            task(
                "would expire",
                RECONCILE,
                check=True,
                diff=True,
                before=lambda: (time.sleep(3.1), seen.update(a=written(env["AGENTLAB_DATABASE"]))),
            ),
            task("expire", RECONCILE, diff=True, before=lambda: seen.update(b=written(env["AGENTLAB_DATABASE"]))),
            task("expired", "agentlab_sandbox_info", states=["TIMEOUT"], events=20),
            task("cannot renew", "agentlab_lease", name="short", ttl="2h", fails=True),
            task("cannot destroy", "agentlab_sandbox", name="short", state="absent", fails=True),
            task("too young", "agentlab_prune", older_than="1h"),
            task("prune", "agentlab_prune"),
        ]
    )
    assert seen["a"] == seen["b"] and writes(run.requests["would expire"]) == []
    assert (
        kinds(run["would expire"]) == {1000: "lease_expired", 1002: "lease_expired"}
        and run.status("would expire") == "changed"
    )
    assert kinds(run["expire"]) == {1000: "lease_expired", 1002: "lease_expired"}
    assert set(run["would expire"]["diff"]["before"]) == {"sandbox 1000", "sandbox 1002"}
    assert [one["name"] for one in run["expired"]["sandboxes"]] == ["short"]
    assert run["cannot renew"]["msg"] == "cannot renew lease in TIMEOUT state. Valid states: RUNNING"
    assert (
        run["cannot destroy"]["msg"]
        == "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use force=true to bypass"
    )
    assert run["too young"]["kept"][0]["reason"] == "too_young" and run["too young"]["count"] == 0
    assert (
        run["prune"]["count"] == 1
        and server.pve.vm(1000) is None
        and server.pve.vm(1001).status == server.pve.vm(1002).status == "running"
    )


@pytest.mark.everyday
def test_each_kind_of_drift_is_reported_and_then_corrected(story: Any, given: Any, env: Any, server: Any) -> None:
    given(9)
    pve = server.pve
    # No guest names an address, so there is none to complete a record with.
    pve.fail("GET", "/agent/network-get-interfaces", 500, "QEMU guest agent is not running", times=999)
    start = records(env["AGENTLAB_DATABASE"])
    marks: dict[int, int] = {}
    seen: dict[str, Any] = {}

    def drift() -> None:
        pve.add_node("pve2")
        pve.add_node("pve3", online=False)
        pve.vm(1000).node = "pve2"
        pve.vm(1001).status = "stopped"
        pve.vms.remove(pve.vm(1002))
        pve.make_foreign(1003, running=True)
        pve.vm(1004).node = "pve3"
        ours = dict(pve.vm(1005).config)
        pve.make_foreign(1005, running=True, description=ours["description"])
        pve.make_foreign(1050, running=True, description=ours["description"], tags="agentlab")
        marks.update({vmid: len(pve.touched(vmid)) for vmid in (1003, 1004, 1005, 1050)})

    run = story(
        [
            task("nothing", RECONCILE, diff=True),
            task("report", RECONCILE, check=True, diff=True, before=drift),
            task("repair", RECONCILE, diff=True, before=lambda: seen.update(report=records(env["AGENTLAB_DATABASE"]))),
            task("second pass", RECONCILE),
            task("third pass", RECONCILE),
        ]
    )
    assert (
        run["nothing"]["count"] == 0
        and run.status("nothing") == "ok"
        and run["nothing"]["diff"] == {"before": {}, "after": {}}
    )
    assert start == seen["report"]
    wanted = {
        1000: "moved",
        1001: "stopped",
        1002: "absent",
        1003: "vmid_reused",
        1004: "node_offline",
        1005: "ambiguous",
        1050: "unrecorded",
    }
    assert kinds(run["report"]) == kinds(run["repair"]) == wanted
    assert writes(run.requests["report"]) == [] and all(not one["applied"] for one in run["report"]["drift"])
    assert set(run["repair"]["diff"]["after"]) == {f"sandbox {vmid}" for vmid in (1000, 1001, 1002, 1003)}
    assert [state_of(env, vmid) for vmid in range(1000, 1009)] == [
        "RUNNING",
        "FAILED",
        "DESTROYED",
        "DESTROYED",
        "RUNNING",
        "RUNNING",
        "RUNNING",
        "RUNNING",
        "RUNNING",
    ]
    assert kinds(run["second pass"])[1002] == "absent" and run.status("second pass") == "changed"
    assert (
        kinds(run["third pass"]) == {1004: "node_offline", 1005: "ambiguous", 1050: "unrecorded"}
        and run.status("third pass") == "ok"
    )
    for vmid, mark in marks.items():
        assert pve.touched(vmid)[mark:] == [] and pve.vm(vmid).status == "running"


def test_all_absent_at_once_writes_nothing(story: Any, given: Any, env: Any, server: Any) -> None:
    given(6)
    edit(env, [1000], updated_at=1)
    start = records(env["AGENTLAB_DATABASE"])
    server.pve.vms[:] = [vm for vm in server.pve.vms if vm.vmid == 9000]
    run = story(
        [
            task("guard", RECONCILE, fails=True),
            task("bad wait", RECONCILE, wait_timeout=-1, fails=True),
            task("no such option", RECONCILE, apply=True, fails=True),
        ]
    )
    assert run["guard"]["msg"].startswith(
        "6 of 6 sandboxes are absent at once (absent_guard is 50 %); nothing was written."
    )
    assert run["guard"]["count"] == 6 and len(run["guard"]["drift"]) == 6
    assert (
        "wait_timeout: '-1' is not a duration" in run["bad wait"]["msg"]
        and "Unsupported parameters" in run["no such option"]["msg"]
    )
    assert records(env["AGENTLAB_DATABASE"]) == start


def test_an_older_copy_of_the_records_is_released_without_a_daemon(
    story: Any, given: Any, env: Any, tmp_path: Any
) -> None:
    """A restore without a daemon: nothing ends before release_leases, and afterwards leases end as usual."""
    given(1)
    database = Path(env["AGENTLAB_DATABASE"])

    def back_up() -> None:
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
        ):
            source.backup(copy)

    def restore() -> None:
        for name in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
            name.unlink(missing_ok=True)
        shutil.copy(tmp_path / "copy.db", database)
        edit(env, [1000], lease_expires_at=int(time.time()) - 60)

    run = story(
        [
            task("later", "agentlab_sandbox", name="later", ttl="2h", before=back_up),
            task("held", RECONCILE, before=restore),
            task("prune is held", "agentlab_prune", check=True),
            task("would release", RECONCILE, release_leases=True, check=True),
            task("release", RECONCILE, release_leases=True),
            task("release again", RECONCILE, release_leases=True),
        ]
    )
    assert "lease_expired" not in kinds(run["held"]).values()
    assert run["would release"]["changed"] and "lease_expired" not in kinds(run["would release"]).values()
    assert run["release"]["changed"] and kinds(run["release"])[1000] == "lease_expired"
    assert not run["release again"]["changed"]
