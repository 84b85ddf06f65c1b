# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The manual's restore, to the letter, with VMs that went on meanwhile: nobody's work ends, nobody's VM is
forgotten.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import agentlab
from support.daemon import Daemon, Make, free_port
from support.engines import require_postgresql, server
from support.lab import Lab
from support.postgres import find_programs

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands(name: str, page: str = "troubleshooting.md") -> list[str]:
    """The commands of a part of the manual."""
    return re.findall(
        r"^[#$] (.+)$", (DOCS / page).read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0], re.M
    )


def follow(agentlabd: Daemon, lab: Lab, tmp_path: Path, steps: list[str]) -> dict[str, str]:
    """Do what the manual says, with this daemon and these records; what each command of agentlab said is returned."""
    told = {}
    for step in steps:
        if step == "systemctl stop agentlabd":
            assert agentlabd.stop() == 0
        elif step == "systemctl start agentlabd":
            agentlabd.start()
        elif step.startswith("agentlab "):
            ran = agentlab(*step.split()[1:], socket=agentlabd.socket)
            assert ran.returncode in (0, 3), ran
            told[step] = ran.stdout
        else:
            lab.close_contexts()
            mine = step.replace("/var/lib/agentlab", os.path.dirname(lab.database)).replace("/root/", f"{tmp_path}/")
            subprocess.run(["bash", "-euc", mine], check=True)
    return told


def wait_for_newer_vm(agentlabd: Daemon) -> dict[str, Any]:
    """Wait until the status names the VM that was created after the copy; return the status."""

    def read() -> Any:
        status = agentlabd.good("GET", "/v1/status")
        return status if status["unrecorded"] else None

    status: dict[str, Any] = agentlabd.wait_for(read, "the newer VM is seen", 30)
    assert [row["vmid"] for row in status["unrecorded"]] == [1010]
    return status


def check_leases_go_on(agentlabd: Daemon, lab: Lab) -> None:
    """After the release nothing ends that is needed, and the next lease that is over ends."""
    agentlabd.wait_for(
        lambda: "restore" not in {row["part"] for row in agentlabd.good("GET", "/v1/status")["conditions"]},
        "leases go on",
        20,
    )
    time.sleep(3)
    assert lab.record(1000).state == "RUNNING" and lab.pve.vm(1000).status == "running"
    assert lab.pve.vm(1010).status == "running" and lab.pve.touched(1010) == []
    assert agentlabd.post("/v1/sandboxes/1001/lease/renew", {"ttl": "2s", "allow_shorten": True}).status == 200
    agentlabd.wait_for(lambda: lab.pve.vm(1001).status == "stopped", "leases end again", 30)


@pytest.mark.parametrize("lost", [False, True], ids=["the folder is there", "the folder was lost"])
def test_the_manuals_restore_ends_nobodys_work_and_forgets_nobodys_vm(
    daemon: Make, lab: Lab, tmp_path: Path, lost: bool
) -> None:
    for name in ("renewed", "steady", "ended"):
        lab.create(name, ttl=3600)
    agentlabd = daemon(metrics_listen=f"127.0.0.1:{free_port()}", expire_interval="1s")
    lab.back_up(tmp_path / "agentlab-backup.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "agentlab-backup.db", isolation_level=None)) as copy:
        # As if the copy had been made hours ago: by it this lease is over.
        copy.execute("UPDATE sandboxes SET lease_expires_at = ? WHERE vmid = 1000", (int(time.time()) - 5,))
    # The life goes on.
    assert agentlabd.post("/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 240}).status == 200
    assert agentlabd.post("/v1/sandboxes/1002/destroy", {"force": True}).status == 200
    assert agentlabd.post("/v1/sandboxes", {"name": "newer", "vmid": 1010}).status == 201
    assert lab.pve.vm(1000).status == "running"
    if lost:
        for name in os.listdir(os.path.dirname(lab.database)):
            if name.startswith("."):
                os.unlink(os.path.join(os.path.dirname(lab.database), name))
    lab.pve.requests.clear()
    told = follow(agentlabd, lab, tmp_path, commands("restore"))

    said = told["agentlab status"]
    assert "older copy" in said and "agentlab cleanup release" in said, said
    status = wait_for_newer_vm(agentlabd)
    parts = {row["part"]: row for row in status["conditions"]}
    assert parts["restore"]["condition"] == "rests" and "1010 (newer" in parts["unrecorded"]["why"], parts
    assert (
        agentlabd.metric("agentlab_unrecorded_vms") == 1 and agentlabd.metric('agentlab_condition{part="restore"}') == 1
    )
    agentlabd.wait_for(
        lambda: "unrecorded fails" in agentlabd.log() and "restore rests" in agentlabd.log(), "the log says both", 20
    )
    # Passes of every kind, by the daemon and by people, end nothing.
    assert agentlabd.good("POST", "/v1/sandboxes/reconcile", {"apply": True})
    assert agentlabd.good("POST", "/v1/sandboxes/prune")["count"] == 0
    time.sleep(3)
    assert lab.record(1000).state == "RUNNING" and lab.pve.vm(1000).status == "running"
    assert lab.pve.vm(1001).status == "running" and lab.pve.vm(1010).status == "running"
    # Also over a restart.
    assert agentlabd.stop() == 0
    agentlabd.start()
    time.sleep(2)
    assert lab.record(1000).state == "RUNNING" and lab.pve.vm(1000).status == "running"

    follow(agentlabd, lab, tmp_path, commands("release"))
    check_leases_go_on(agentlabd, lab)


def test_an_older_copy_holds_plays_without_a_daemon_too(lab: Lab, tmp_path: Path) -> None:
    lab.create("a1", ttl=2)
    lab.back_up(tmp_path / "copy.db")
    lab.renew(1000, 7200)
    lab.close_contexts()
    for path in Path(lab.database).parent.glob("agentlab.db*"):
        path.unlink()
    os.rename(tmp_path / "copy.db", lab.database)
    time.sleep(3)
    found = lab.expire()
    assert found.suspended and "older copy" in found.suspended and not found.expired
    lab.reconcile()
    assert lab.record(1000).state == "RUNNING" and lab.pve.vm(1000).status == "running"
    assert lab.renew(1000, 7200).outcome == "renewed"
    assert not lab.expire(dry_run=True).expired
    lab.timed_out("a2")
    assert [agentlabd.reason for agentlabd in lab.prune().kept] == ["restored"]


def test_a_vmid_that_was_reused_since_the_copy_names_the_newer_vm_at_once(
    daemon: Make, lab: Lab, tmp_path: Path
) -> None:
    older = lab.create("older")
    lab.back_up(tmp_path / "copy.db")
    lab.destroy(1000, force=True)
    assert lab.create("newer", vmid=1000).uuid != older.uuid
    lab.close_contexts()
    for path in Path(lab.database).parent.glob("agentlab.db*"):
        path.unlink()
    os.rename(tmp_path / "copy.db", lab.database)
    lab.pve.requests.clear()
    agentlabd = daemon(metrics_listen=f"127.0.0.1:{free_port()}", reconcile_interval="1h")
    agentlabd.wait_for(
        lambda: agentlabd.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30
    )
    status = agentlabd.good("GET", "/v1/status")
    assert [(row["vmid"], row["name"]) for row in status["unrecorded"]] == [(1000, "newer")]
    assert agentlabd.metric("agentlab_unrecorded_vms") == 1
    assert "1000 (newer on pve1)" in agentlab("status", socket=agentlabd.socket).stdout
    assert lab.record(older).reason == "vmid_reused" and lab.pve.touched(1000) == []
    assert lab.pve.vm(1000).status == "running"


@pytest.mark.parametrize("first", ["create", "stop and start", "destroy"])
def test_an_older_copy_is_noticed_before_the_first_run_adds_events(lab: Lab, tmp_path: Path, first: str) -> None:
    """A play that only creates looks at no lease. Its events would make the copy look as new as what it replaced."""
    lab.create("a1")
    lab.create("b1")
    lab.back_up(tmp_path / "copy.db")
    lab.renew(1000, 7200)
    lab.close_contexts()
    for path in Path(lab.database).parent.glob("agentlab.db*"):
        path.unlink()
    os.rename(tmp_path / "copy.db", lab.database)
    # As if the copy had been made hours ago: by it this lease is over.
    with contextlib.closing(sqlite3.connect(lab.database, isolation_level=None)) as copy:
        copy.execute("UPDATE sandboxes SET lease_expires_at = ? WHERE vmid = 1000", (int(time.time()) - 5,))
    if first == "create":
        lab.create("c1")
    elif first == "destroy":
        lab.destroy(1001, force=True)
    else:
        lab.power("stop", 1001)
        lab.power("start", 1001)
    lab.close_contexts()
    found = lab.expire()
    assert found.suspended and "older copy" in found.suspended and not found.expired
    assert lab.record(1000).state == "RUNNING" and lab.pve.vm(1000).status == "running"
    note = json.loads(lab.context().records.read_meta("cleanup_frozen") or "{}")
    assert note["leases"] and "older copy" in note["reason"]


def test_records_that_only_went_on_are_no_older_copy(lab: Lab) -> None:
    for number in range(3):
        lab.create(f"a{number}")
        lab.close_contexts()
        assert lab.expire().suspended is None
    lab.force_state(1002, "RUNNING", lease_expires_at=1)
    assert [agentlabd.vmid for agentlabd in lab.expire().expired] == [1002]


def test_nothing_is_noted_by_who_only_looks(lab: Lab) -> None:
    lab.create("a1")
    lab.close_contexts()
    folder = Path(lab.database).parent
    before: Any = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(".")}
    assert before
    lab.expire(dry_run=True)
    lab.prune(dry_run=True)
    lab.close_contexts()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(".")} == before


def test_the_manuals_restore_on_postgresql_ends_nobodys_work(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    require_postgresql()
    postgres = server()
    lab.database = postgres.uri()
    name = lab.database.rpartition("/")[2]
    programs = {
        "PATH": f"{find_programs()}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": postgres.user,
    }

    def follow_page(agentlabd: Daemon | None, part: str) -> dict[str, str]:
        told = {}
        for step in commands(part, "controllers.md"):
            if agentlabd is not None and step.startswith(("systemctl", "agentlab ")):
                told |= follow(agentlabd, lab, tmp_path, [step])
            else:
                mine = re.sub(r"(?<![\w/])agentlab(?![\w.])", name, step).replace("/root/", f"{tmp_path}/")
                subprocess.run(["bash", "-euc", mine], check=True, env={**os.environ, **programs})
        return told

    for sandbox in ("renewed", "steady"):
        lab.create(sandbox, ttl=3600)
    # By the copy the first lease is over when it is restored.
    over = int(time.time()) + 6
    postgres.execute(f"UPDATE sandboxes SET lease_expires_at = {over} WHERE vmid = 1000", name)
    follow_page(None, "backup")
    lab.renew(1000, 4 * 3600)
    agentlabd = daemon(database=lab.database, expire_interval="1s")
    assert agentlabd.post("/v1/sandboxes", {"name": "newer", "vmid": 1010}).status == 201
    lab.close_contexts()
    lab.pve.requests.clear()
    time.sleep(max(0.0, over + 1 - time.time()))
    told = follow_page(agentlabd, "restore")
    assert "older copy" in told["agentlab status"] and "agentlab cleanup release" in told["agentlab status"]
    wait_for_newer_vm(agentlabd)
    assert agentlabd.good("POST", "/v1/sandboxes/reconcile", {"apply": True})
    assert agentlabd.good("POST", "/v1/sandboxes/prune")["count"] == 0
    time.sleep(3)
    assert {vmid: lab.pve.vm(vmid).status for vmid in (1000, 1001, 1010)} == dict.fromkeys(
        (1000, 1001, 1010), "running"
    )
    assert lab.record(1000).state == "RUNNING" and lab.pve.touched(1010) == []
    follow_page(agentlabd, "release")
    check_leases_go_on(agentlabd, lab)
