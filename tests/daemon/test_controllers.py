# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Several daemons on one PostgreSQL database: who reconciles, who takes over, and what happens without the database."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders

from support import engines
from support.cli import agentlab
from support.daemon import Daemon, Make, free_port
from support.double import Server
from support.engines import require_postgresql
from support.lab import Lab
from support.postgres import PostgresServer
from support.story import writes


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """A server that the test may stop."""
    require_postgresql()
    running = PostgresServer().create()
    yield running
    running.destroy()


@pytest.fixture
def start(server: Server, postgres: PostgresServer, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons on one database and one Proxmox VE."""
    environment = {**server.environment(str(tmp_path)), "AGENTLAB_DATABASE": postgres.uri()}
    daemons: list[Daemon] = []

    def make(host: str | None = None, **options: Any) -> Daemon:
        daemon = Daemon(
            tmp_path / f"daemon-{len(daemons)}", environment, metrics_listen=f"127.0.0.1:{free_port()}", **options
        )
        daemons.append(daemon)
        if host is not None:
            # Python runs this file at its start.
            renamed = f"import socket\nsocket.gethostname = lambda: {host!r}\n"
            (daemon.folder / "sitecustomize.py").write_text(renamed, encoding="utf-8")
            daemon.environment["PYTHONPATH"] += f"{os.pathsep}{daemon.folder}"
        return daemon.start()

    yield make
    for daemon in daemons:
        daemon.close()


def test_two_daemons_serve_and_one_takes_over_from_the_other(start: Callable[..., Daemon]) -> None:
    first = start()
    first.wait_for(lambda: first.metric('agentlab_leader{duty="reconcile"}') == 1, "the first one leads", 60)
    second = start()
    sandbox = first.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "1h"}, 201)
    assert second.good("GET", f"/v1/sandboxes/{sandbox['vmid']}")["name"] == "a1"
    second.wait_for(lambda: "reconcile: done by another controller" in second.log(), "the second one stands by", 60)
    assert second.metric('agentlab_leader{duty="reconcile"}') == 0
    first.kill()
    began = time.monotonic()
    second.wait_for(lambda: "reconcile: done by this daemon from now on" in second.log(), "it takes over", 60)
    assert time.monotonic() - began < 10, "docs/controllers.md promises 10 seconds"
    assert second.metric('agentlab_leader{duty="reconcile"}') == 1
    assert second.metric('agentlab_takeovers_total{what="reconcile"}') == 1
    second.good("POST", f"/v1/sandboxes/{sandbox['vmid']}/destroy", {"force": True})


def test_the_claim_of_a_dead_host_is_counted_when_reconcile_finishes_its_operation(daemon: Make, lab: Lab) -> None:
    require_postgresql()
    lab.database = engines.server().uri()
    made = lab.create("a1")
    records = engines.move_to_host(lab.context().records, "elsewhere", "another boot")
    claim = records.claim(made.uuid, "destroy")
    records.write_journal(claim, "destroy", "stopping", {"operation": "destroy", "force": True})
    lab.close_contexts()
    agentlabd = daemon(metrics_listen=f"127.0.0.1:{free_port()}")
    agentlabd.wait_for(lambda: lab.record(made).state == "DESTROYED", "reconcile finishes the destroy", 60)
    assert agentlabd.metric('agentlab_takeovers_total{what="claim"}') == 1


def test_the_lease_of_a_sandbox_ends_once_on_two_daemons(start: Callable[..., Daemon]) -> None:
    first, second = start(expire_interval="1s"), start(expire_interval="1s")
    vmid = first.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "2s"}, 201)["vmid"]
    state = f"/v1/sandboxes/{vmid}"
    second.wait_for(lambda: second.get(state).body["state"] == "TIMEOUT", "the lease ends", 60)
    events = second.good("GET", f"/v1/sandboxes/{vmid}/events")["events"]
    assert [event["operation"] for event in events].count("expire") == 1
    assert "Traceback" not in first.log() + second.log()


def test_without_the_database_nothing_is_changed_and_it_comes_back_by_itself(
    start: Callable[..., Daemon], postgres: PostgresServer, server: Server
) -> None:
    daemon = start()
    vmid = daemon.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "1h"}, 201)["vmid"]
    postgres.stop()
    server.pve.counted.clear()
    for path, body in (("/v1/sandboxes", {"name": "a2", "ttl": "1h"}), (f"/v1/sandboxes/{vmid}/stop", {})):
        answer = daemon.post(path, body)
        assert answer.status == 503 and "cannot be reached" in str(answer.body), answer
    assert writes(server.pve.counted) == []
    postgres.start()
    daemon.wait_for(lambda: daemon.get(f"/v1/sandboxes/{vmid}").status == 200, "it answers again", 60)
    daemon.good("POST", f"/v1/sandboxes/{vmid}/destroy", {"force": True})
    assert "Traceback" not in daemon.log()


def test_the_database_goes_away_in_the_middle_of_a_destroy(
    start: Callable[..., Daemon], postgres: PostgresServer, server: Server
) -> None:
    """The step that was announced may be done; the next one is not, and a reconcile finishes the work later."""
    daemon = start(reconcile_interval="2s")
    vmid = daemon.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "1h"}, 201)["vmid"]
    stopped: list[int] = []
    real = server.pve._note_request

    def note(entry: dict[str, Any]) -> None:
        real(entry)
        if entry["method"] == "POST" and entry["template"].endswith("/status/stop") and not stopped:
            stopped.append(1)
            postgres.stop()
            server.pve.counted.clear()

    server.pve._note_request = note  # type: ignore[method-assign]
    answer = daemon.post(f"/v1/sandboxes/{vmid}/destroy", {"force": True})
    assert stopped, "the VM was never stopped"
    assert answer.status in (503, 409), answer
    assert writes(server.pve.counted) == [] and vmid in [vm.vmid for vm in server.pve.vms]
    postgres.start()
    daemon.wait_for(lambda: daemon.get(f"/v1/sandboxes/{vmid}").status == 200, "it answers again", 60)
    daemon.wait_for(lambda: vmid not in [vm.vmid for vm in server.pve.vms], "what was begun is finished", 90)
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("lock", ["UPDATE sandboxes SET name = name", "LOCK TABLE controllers IN EXCLUSIVE MODE"])
def test_a_session_that_keeps_the_records_locked_is_named_by_the_status(
    start: Callable[..., Daemon], postgres: PostgresServer, lock: str
) -> None:
    import psycopg

    daemon = start()
    vmid = daemon.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "1h"}, 201)["vmid"]
    with psycopg.connect(daemon.environment["AGENTLAB_DATABASE"], application_name="psql") as session:
        session.execute(lock)
        asked = daemon.connection()
        renewal = json.dumps({"ttl": "3h"})
        asked.request("POST", f"/v1/sandboxes/{vmid}/lease/renew", renewal, {"Content-Type": "application/json"})
        told = daemon.wait_for(
            lambda: [one for one in daemon.get("/v1/status").body["conditions"] if one["part"] == "records"],
            "the status says what it waits for",
            40,
        )[0]
        assert (
            told["condition"] == "waits" and f"session {session.info.backend_pid} of role tester, psql" in told["why"]
        )
        assert "pg_terminate_backend" in told["todo"] and "fuser" not in str(told)
        session.rollback()
    assert asked.getresponse().status == 200
    asked.close()
    parts = [one["part"] for one in daemon.get("/v1/status").body["conditions"]]
    assert "records" not in parts


def test_a_table_that_nobody_may_read_is_told_by_status_and_command_line(
    start: Callable[..., Daemon], postgres: PostgresServer
) -> None:
    import psycopg

    daemon = start()
    with psycopg.connect(daemon.environment["AGENTLAB_DATABASE"], application_name="psql") as session:
        session.execute("LOCK TABLE sandboxes, operations IN ACCESS EXCLUSIVE MODE")
        for words in (("status",), ("sandbox", "list")):
            told = agentlab(*words, socket=daemon.socket)
            assert told.returncode == 1 and f"session {session.info.backend_pid} of role tester" in told.stderr, told
            assert "nothing was written" in told.stderr
    assert agentlab("status", socket=daemon.socket).returncode == 0
    assert "Traceback" not in daemon.log()


def test_a_clock_that_jumped_on_one_host_holds_up_that_host_alone(
    start: Callable[..., Daemon], postgres: PostgresServer
) -> None:
    first = start("host-a", expire_interval="1s")
    second = start("host-b", expire_interval="1s")
    uri = first.environment["AGENTLAB_DATABASE"]
    database = uri.rpartition("/")[2]
    second.wait_for(
        lambda: len(postgres.execute("SELECT key FROM meta WHERE key LIKE 'clock:host-%'", database)) == 2,
        "each host has a note of its own",
        60,
    )
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    # The note of host-a says another time than its clock, as after a jump.
    jumped = {
        "boot": json.loads(holders.describe_process())["boot"],
        "offset": time.time() - boot - 600,
        "until": 0,
        "seen": boot,
        "wall": int(time.time()),
    }
    postgres.execute(f"UPDATE meta SET value = '{json.dumps(jumped)}' WHERE key LIKE 'clock:host-a/%'", database)
    vmid = second.good("POST", "/v1/sandboxes", {"name": "a1", "ttl": "2s"}, 201)["vmid"]
    # A prune looks at the clock before it looks at sandboxes.
    agentlab("sandbox", "prune", socket=first.socket)
    state = f"/v1/sandboxes/{vmid}"
    second.wait_for(lambda: second.get(state).body["state"] == "TIMEOUT", "the other one lets the lease end", 60)
    told = [
        [one["condition"] for one in each.get("/v1/status").body["conditions"] if one["part"] == "clock"]
        for each in (first, second)
    ]
    assert told == [["rests"], []]
    assert "rest" not in second.log()


def test_the_daemon_of_a_snippets_host_closes_a_record_that_the_leader_keeps(
    start: Callable[..., Daemon], server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "snippets"
    folder.mkdir(mode=0o755)
    server.pve.hold_snippets(str(folder))
    first = start(snippets_dir=str(folder))
    first.wait_for(lambda: first.metric('agentlab_leader{duty="reconcile"}') == 1, "the first one leads", 60)
    second = start(host="second", snippets_dir=str(folder))
    second.wait_for(lambda: "reconcile: done by another controller" in second.log(), "the second one stands by", 60)
    body = {"name": "a1", "ttl": "1h", "cloud_init_user_data": "#cloud-config\npackages: [git]\n"}
    vmid = second.good("POST", "/v1/sandboxes", body, 201)["vmid"]
    (file,) = folder.iterdir()
    # On the first host there is no such file. The second one must not look into this folder meanwhile.
    second.signal(signal.SIGSTOP)
    hidden = file.rename(tmp_path / "hidden")
    answer = first.post(f"/v1/sandboxes/{vmid}/destroy", {"force": True})
    assert answer.status == 409 and "was written on host second" in str(answer.body), answer
    assert first.good("GET", f"/v1/sandboxes/{vmid}")["state"] != "DESTROYED"
    hidden.rename(file)
    second.signal(signal.SIGCONT)
    state = f"/v1/sandboxes/{vmid}"
    second.wait_for(lambda: second.get(state).body["state"] == "DESTROYED", "its own file is removed", 90)
    assert list(folder.iterdir()) == [] and second.metric('agentlab_leader{duty="reconcile"}') == 0
    assert "Traceback" not in first.log() + second.log()
