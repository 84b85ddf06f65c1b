# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Status, log and metrics say what rests, waits or fails: since when, why, and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders

from support.cli import agentlab
from support.daemon import Daemon, Make, free_port, in_daemon
from support.double import TOKEN_SECRET
from support.lab import Lab


def condition(one: Daemon, part: str, timeout: float = 30) -> Any:
    """The condition of a part once it is told."""

    def look() -> Any:
        return next((row for row in one.good("GET", "/v1/status")["conditions"] if row["part"] == part), None)

    found = one.wait_for(look, f"{part} is told", timeout)
    assert found["since"] and found["why"] and found["todo"], found
    return found


def gone(one: Daemon, part: str) -> bool:
    return part not in {row["part"] for row in one.good("GET", "/v1/status")["conditions"]}


def test_nothing_is_told_when_all_is_as_usual(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    assert one.good("GET", "/v1/status")["conditions"] == []


def test_records_that_were_replaced(daemon: Make, lab: Lab) -> None:
    one = daemon(metrics_listen=f"127.0.0.1:{free_port()}")
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    os.rename(lab.database, f"{lab.database}.old")
    told = condition(one, "records")
    assert (
        told["condition"] == "fails"
        and "was deleted, moved or replaced" in told["why"]
        and "systemctl stop agentlabd" in told["todo"]
    )
    refused = one.post("/v1/sandboxes", {"name": "a1"})
    assert refused.status == 500 and "was deleted, moved or replaced" in refused.body["error"], refused
    assert [vm for vm in lab.ours().values() if vm >= 1000] == []
    assert one.metric('agentlab_condition{part="records"}') == 1
    one.wait_for(lambda: "records fails: database" in one.log(), "the log says so", 20)
    assert "records FAILS since" in agentlab("status", socket=one.socket).stdout
    found = [finding for finding in one.good("GET", "/v1/doctor")["findings"] if finding["check"] == "database"]
    assert [finding["status"] for finding in found] == ["problem"] and "deleted, moved or replaced" in found[0][
        "meaning"
    ]
    assert "systemctl stop agentlabd" in found[0]["advice"] and not os.path.exists(lab.database)
    os.rename(f"{lab.database}.old", lab.database)
    one.wait_for(lambda: gone(one, "records"), "the right file is there again", 20)
    assert one.post("/v1/sandboxes", {"name": "a1"}).status == 201


def test_records_that_another_process_has_locked(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    with contextlib.closing(sqlite3.connect(lab.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        asked = one.connection()
        asked.request("POST", "/v1/cleanup/freeze", json.dumps({"reason": "x"}), {"Content-Type": "application/json"})
        told = condition(one, "records", 40)
        assert told["condition"] == "waits" and f"process {os.getpid()}" in told["why"], told
        other.execute("ROLLBACK")
    assert asked.getresponse().status == 200
    asked.close()
    one.wait_for(lambda: gone(one, "records"), "it goes on", 20)


def test_a_start_that_waits_for_the_records_says_so(daemon: Make, lab: Lab) -> None:
    records = f"{lab.folder}/alone.db"
    agentlabd = daemon(start=False, environment={"AGENTLAB_DATABASE": records})
    with contextlib.closing(sqlite3.connect(records, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        agentlabd.spawn()
        sentence = f"the start waits for the records ({records}): another process has locked them (process"
        agentlabd.wait_for(lambda: sentence in agentlabd.log(), "the log says what it waits for", 60)
        assert f"process {os.getpid()}" in agentlabd.log()
        other.execute("ROLLBACK")
    agentlabd.wait_for(agentlabd.serving, "it serves", 60)
    assert agentlabd.log().count("the start waits") == 1


def test_a_clock_that_jumped_is_a_condition(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    note = {
        "boot": json.loads(holders.describe_process())["boot"],
        "offset": time.time() - boot,
        "until": boot + 300,
        "seen": boot,
        "wall": int(time.time()),
    }
    lab.context().records.set_meta(f"clock:{holders.read_host_name()}", json.dumps(note))
    one = daemon()
    told = condition(one, "clock")
    assert (
        told["condition"] == "rests"
        and "expiry and cleanup rest until 20" in told["why"]
        and "timedatectl" in told["todo"]
    )


def test_credentials_that_are_refused(daemon: Make, lab: Lab) -> None:
    one = daemon(environment={"PROXMOX_TOKEN_SECRET": TOKEN_SECRET + "-wrong"})
    told = condition(one, "token")
    assert told["condition"] == "fails" and "refuses the credentials" in told["why"]
    assert one.good("GET", "/v1/status")["proxmox"]["reachable"] is True, "it was asked, and it answered"
    assert TOKEN_SECRET not in json.dumps(one.good("GET", "/v1/status")) + one.log()


def test_an_answer_of_a_guest_that_makes_no_sense_is_not_proxmox_failing(daemon: Make, lab: Lab) -> None:
    sandbox = lab.create("a1")
    deep = '{"data": {"result": ' + "[" * 5000 + "]" * 5000 + "}}"
    rule = lab.pve.fault("GET", "/agent/network-get-interfaces", "answer", status=200, body=deep, times=99)
    agentlabd = daemon(metrics_listen=f"127.0.0.1:{free_port()}")
    agentlabd.wait_for(
        lambda: agentlabd.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30
    )
    assert agentlabd.get(f"/v1/sandboxes/{sandbox.vmid}").status == 200
    agentlabd.wait_for(lambda: rule["times"] < 99, "the guest is asked", 30)
    assert agentlabd.good("GET", "/v1/status")["conditions"] == []
    assert agentlabd.good("GET", "/v1/status")["proxmox"]["reachable"] is True
    assert agentlabd.metric('agentlab_proxmox_errors_total{kind="unknown"}') == 0


def test_what_could_not_be_done_for_single_sandboxes(daemon: Make, lab: Lab) -> None:
    """Each job as a whole went well, so its own state says nothing of them."""
    locked = lab.create("locked")
    lab.pve.vm(locked.vmid).config["lock"] = "backup"
    doubtful = lab.timed_out("doubtful")
    lab.pve.vm(doubtful.vmid).config["description"] = "edited"
    switched_on = lab.create("on")
    lab.power("stop", switched_on.vmid)
    vm = lab.pve.vm(switched_on.vmid)
    vm.status = vm.qmpstatus = "running"
    agentlabd = daemon(metrics_listen=f"127.0.0.1:{free_port()}", reconcile_interval="1h", expire_interval="1s")
    told = condition(agentlabd, "sandboxes")
    assert told["condition"] == "fails" and f"sandbox {doubtful.vmid} (reconcile): only one of the two" in told["why"]
    assert f"sandbox {switched_on.vmid} (reconcile): somebody started the VM, and no lease ends it" in told["why"], told
    assert f"sandbox {locked.vmid}" not in told["why"], "a backup ends by itself"
    assert agentlabd.metric('agentlab_condition{part="sandboxes"}') == 1
    lab.force_state(locked.vmid, "RUNNING", lease_expires_at=int(time.time()) - 1)
    sentence = f"sandbox {locked.vmid} (expiry): its lease is over, but its VM was not stopped"
    agentlabd.wait_for(lambda: sentence in condition(agentlabd, "sandboxes")["why"], "the VM that goes on is told", 60)
    assert sentence in re.sub(r"\s+", " ", agentlab("status", socket=agentlabd.socket).stdout)
    agentlabd.wait_for(lambda: "sandboxes fails: " in agentlabd.log(), "the log says it", 60)
    # What is mended is told no more: by the next pass, or because the sandbox is gone.
    lab.pve.vm(locked.vmid).config.pop("lock")
    lab.pve.remove_vm(doubtful.vmid)
    lab.power("start", switched_on.vmid)
    for _pass in range(2):
        assert agentlabd.post("/v1/sandboxes/reconcile", {"apply": True}).status == 200
    agentlabd.wait_for(lambda: gone(agentlabd, "sandboxes"), "nothing is left", 30)


def test_what_the_rules_could_not_do(daemon: Make, lab: Lab) -> None:
    made = lab.timed_out("a1")
    lab.pve.fail("DELETE", f"/qemu/{made.vmid}", 500, "storage is not online", times=99)
    rules = (
        "auto_cleanup:\n  enabled: true\n  interval: 1h\n  jitter: 0s\n  rules:\n"
        "    - {name: timeouts, match: {states: [TIMEOUT]}, after: 1s, action: destroy}\n"
    )
    agentlabd = daemon(cleanup=rules)
    assert agentlabd.post("/v1/cleanup/run", {}).status == 207
    told = condition(agentlabd, "sandboxes")
    assert f"sandbox {made.vmid} (cleanup): " in told["why"] and "storage is not online" in told["why"]
    lab.calm()
    lab.pve.clear_faults()
    assert agentlabd.post(f"/v1/sandboxes/{made.vmid}/destroy", {"force": True}).status == 200
    assert gone(agentlabd, "sandboxes"), "a destroyed sandbox needs nothing"


def test_what_passes_by_itself_is_told_when_it_lasts() -> None:
    code = """
import json
from agentlabd.problems import Problem, Problems
now = [1000.0]
problems = Problems(lambda: now[0])
told = []
for at in (1000, 4000, 4700):
    now[0] = at
    problems.replace("cleanup", [Problem("sandbox 1", "locked", "u1", passing=True), Problem("sandbox 2", "x", "u2")])
    told.append([(job, one.what, one.since) for job, one in problems.list_lasting(lambda: ["u1", "u2"])])
problems.replace("cleanup", [])
told.append(problems.list_lasting(lambda: 1 / 0))
print(json.dumps(told))
"""
    second = ["cleanup", "sandbox 2", 1000]
    assert in_daemon(code) == [[second], [second], [["cleanup", "sandbox 1", 1000], second], []]


def test_a_job_that_fails(daemon: Make, lab: Lab) -> None:
    one = daemon(environment={"PROXMOX_PORT": str(free_port())})
    told = condition(one, "reconcile")
    assert told["condition"] == "fails" and condition(one, "proxmox")["condition"] == "fails"


def test_a_failure_of_expiry_that_another_daemon_settled_is_told_no_more(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    lab.pve.vm(made.vmid).config["lock"] = "backup"
    first = daemon(reconcile_interval="1h", expire_interval="1s")
    first.wait_for(lambda: first.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 30)
    lab.force_state(made.vmid, "RUNNING", lease_expires_at=int(time.time()) - 1)
    assert "(expiry): its lease is over, but its VM was not stopped" in condition(first, "sandboxes")["why"]
    second = daemon(reconcile_interval="1h")
    second.wait_for(lambda: second.get("/v1/status").body["reconcile"]["last_run"], "it has looked", 30)
    # Also where the second one failed: it tells that by itself, now and later.
    assert f"sandbox {made.vmid} (reconcile): " in condition(second, "sandboxes")["why"]
    del lab.pve.vm(made.vmid).config["lock"]
    assert second.post("/v1/sandboxes/reconcile", {"apply": True}).status == 200
    second.wait_for(lambda: lab.pve.vm(made.vmid).status == "stopped", "the VM is stopped", 30)
    for one in (first, second):
        one.wait_for(lambda one=one: gone(one, "sandboxes"), "nothing is left", 30)


def test_a_vm_without_a_record_is_told_until_somebody_removes_it(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    context = lab.context()
    context.database.write(lambda conn: conn.execute("DELETE FROM operations") and None)
    lab.force_state(made.vmid, "DESTROYED")
    agentlabd = daemon(reconcile_interval="1h")
    assert f"{made.vmid} (a1 on pve1)" in condition(agentlabd, "unrecorded")["why"]
    lab.pve.remove_vm(made.vmid)
    assert agentlabd.post("/v1/sandboxes/reconcile", {"apply": True}).status == 200
    assert gone(agentlabd, "unrecorded"), "the pass of a person counts like the daemon's own"


def test_a_daemon_that_lost_its_turn_tells_no_problem_of_that_job() -> None:
    code = """
import json
from types import SimpleNamespace
from agentlabd.problems import Problem, Problems
from agentlabd.scheduler import Job, Scheduler
seconds = iter(range(100, 200))
problems = Problems(lambda: next(seconds))
problems.replace("reconcile", [Problem("sandbox 1000", "why", "a")])
problems.replace("reconcile", [Problem("sandbox 1000", "why", "b")])
problems.add_problem("expiry", Problem("sandbox 1000", "why", "b"))
before = [(job, one.since) for job, one in problems.list_lasting(lambda: ["b"])]
scheduler = Scheduler.__new__(Scheduler)
scheduler._done_elsewhere = set()
database = SimpleNamespace(lead=lambda job: False)
failing = Job(last_run=5, next_run=9, last_error="no answer", failing_since=7)
scheduler.service = SimpleNamespace(
    base=SimpleNamespace(database=database), leads={}, problems=problems, jobs={"reconcile": failing},
    unrecorded=[{"vmid": 1005}],
)
scheduler._try_to_lead("reconcile")
after = [failing.public(), failing.failing_since, scheduler.service.unrecorded]
print(json.dumps([before, [job for job, _one in problems.list_lasting(lambda: ["b"])], after]))
"""
    before, told, after = in_daemon(code)
    # The sandbox that has the VMID now has its own beginning: the second reading of the clock, not the first.
    assert before == [["reconcile", 101], ["expiry", 102]] and told == ["expiry"]
    assert after == [{"last_run": "1970-01-01T00:00:05Z", "next_run": None, "last_error": None}, None, []]
