# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A failover to an asynchronous standby that had not received the last commits: what docs/controllers.md promises."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.cli import agentlab
from support.daemon import Daemon, Make, free_port
from support.engines import require_postgresql
from support.lab import Lab
from support.postgres import PostgresServer


class AsynchronousPair:
    """A primary and an asynchronous standby that can be cut off, so that it lacks what is committed later."""

    def __init__(self) -> None:
        self.primary = PostgresServer().create()
        self.standby = self.primary.standby()
        address = f"127.0.0.1:{self.primary.port}"
        self.uri = self.primary.uri().replace(address, f"{address},127.0.0.1:{self.standby.port}")
        self.database = self.uri.rpartition("/")[2]

    def wait(self, query: str) -> None:
        """Wait until the query on the primary counts what it is to count."""
        deadline = time.monotonic() + 60
        while not self.primary.execute(query)[0][0]:
            assert time.monotonic() < deadline, query
            time.sleep(0.05)

    def cut_off(self) -> None:
        """Let the standby replay all commits until now, and receive none from now on."""
        self.wait("SELECT count(*) > 0 FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()")
        self.standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        self.standby.execute("SELECT pg_reload_conf()")
        self.wait("SELECT count(*) = 0 FROM pg_stat_replication")

    def fail_over(self) -> None:
        self.primary.stop()
        self.standby.promote()

    def destroy(self) -> None:
        self.standby.destroy()
        self.primary.destroy()


@pytest.fixture
def pair() -> Iterator[AsynchronousPair]:
    require_postgresql()
    made = AsynchronousPair()
    yield made
    made.destroy()


@pytest.fixture
def agentlabd(pair: AsynchronousPair, daemon: Make, lab: Lab) -> Daemon:
    """A daemon that lives through the failover. Its leases end within a second."""
    lab.database = pair.uri
    return daemon(metrics_listen=f"127.0.0.1:{free_port()}", expire_interval="1s")


def check_that_only_absent_vms_lose_their_record(records: dict[str, Sandbox], lab: Lab) -> None:
    states = {name: (lab.record(record).state, lab.record(record).reason) for name, record in records.items()}
    assert states == {
        "renewed": ("RUNNING", "ready"),
        "gone": ("DESTROYED", "external"),
        "reused": ("DESTROYED", "vmid_reused"),
        "replaced": ("DESTROYED", "vmid_reused"),
    }


def test_a_failover_that_lost_commits_touches_no_stranger_forgets_no_vm_and_ends_no_lease(
    agentlabd: Daemon, lab: Lab, pair: AsynchronousPair
) -> None:
    records = {name: lab.create(name) for name in ("renewed", "gone", "reused", "replaced")}
    vmid = {name: record.vmid for name, record in records.items()}
    lab.close_contexts()
    agentlabd.good("POST", "/v1/sandboxes/reconcile", {"apply": True})
    pair.cut_off()
    agentlabd.good("POST", f"/v1/sandboxes/{vmid['renewed']}/lease/renew", {"ttl": "4h"})
    for name in ("gone", "reused", "replaced"):
        agentlabd.good("POST", f"/v1/sandboxes/{vmid[name]}/destroy", {"force": True})
    ours = {"newer": agentlabd.good("POST", "/v1/sandboxes", {"name": "newer", "ttl": "1h"}, 201)["vmid"]}
    ours["newest"] = vmid["replaced"]
    agentlabd.good("POST", "/v1/sandboxes", {"name": "newest", "ttl": "1h", "vmid": ours["newest"]}, 201)
    stranger = lab.pve.make_foreign(vmid["reused"], name="reused", same_tags=True, running=True)
    pair.fail_over()
    # As if the failover had come hours later: without the lost renewal this lease is over.
    pair.standby.execute("UPDATE sandboxes SET lease_expires_at = 1 WHERE name = 'renewed'", pair.database)
    lab.pve.requests.clear()
    agentlabd.wait_for(lambda: agentlabd.get("/v1/sandboxes").status == 200, "the records answer again", 60)
    shown = {row["name"]: row["state"] for row in agentlabd.good("GET", "/v1/sandboxes")["sandboxes"]}
    assert shown == dict.fromkeys(vmid, "RUNNING"), "the commits of three destroys and two creations are lost"

    # Everything that may change a VM: reconcile twice, with the doubt window between, prune, and destroys by force.
    for _pass in range(2):
        agentlabd.good("POST", "/v1/sandboxes/reconcile", {"apply": True})
        time.sleep(1.2)
    agentlabd.good("POST", "/v1/sandboxes/prune")
    for name in ("reused", "replaced"):
        agentlabd.post(f"/v1/sandboxes/{vmid[name]}/destroy", {"force": True})
    lab.untouched(stranger, status="running")
    for number in ours.values():
        assert lab.pve.touched(number) == [] and lab.pve.vm(number).status == "running"
    check_that_only_absent_vms_lose_their_record(records, lab)

    # Status, command line, log and metric name the VMs of ours that lost their record.
    status = agentlabd.good("GET", "/v1/status")
    assert {row["name"]: row["vmid"] for row in status["unrecorded"]} == ours
    assert agentlabd.metric("agentlab_unrecorded_vms") == 2
    told = agentlab("status", socket=agentlabd.socket).stdout
    for name, number in ours.items():
        assert f"{number} ({name} on pve1)" in told
        agentlabd.wait_for(lambda text=f"{number} ({name} on pve1)": text in agentlabd.log(), "the log names it", 30)

    # No lease ends before somebody has looked.
    why = {row["part"]: row["why"] for row in status["conditions"]}["restore"]
    assert "the server lost commits that it had confirmed" in why and "agentlab cleanup release" in told
    assert lab.record(vmid["renewed"]).state == "RUNNING" and lab.pve.vm(vmid["renewed"]).status == "running"
    agentlabd.good("POST", f"/v1/sandboxes/{vmid['renewed']}/lease/renew", {"ttl": "2h"})
    released = agentlab("cleanup", "release", socket=agentlabd.socket)
    assert released.returncode == 0, released
    # The release lasts. The next lease that is over ends.
    path = f"/v1/sandboxes/{vmid['renewed']}/lease/renew"
    agentlabd.good("POST", path, {"ttl": "1s", "allow_shorten": True})
    agentlabd.wait_for(lambda: lab.record(records["renewed"]).state == "TIMEOUT", "leases end again", 60)
    lab.untouched(stranger, status="running")
    assert "Traceback" not in agentlabd.log()
