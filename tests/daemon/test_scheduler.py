# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the daemon does by itself, seen from outside: records, VMs, status, metrics, log.

Nobody asks it for anything but how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, Make, free_port
from support.lab import Lab

DESTROY_TIMEOUTS = "{name: timeouts, match: {states: [TIMEOUT]}, after: 0s, action: destroy}"
LAST_CLEANUP = "cleanup_last_run"


def rules(*lines: str, interval: str = "1s", jitter: str = "0s", **more: str) -> str:
    """A rule file that acts at once and often, unless a test says otherwise."""
    top = "".join(f"  {name}: {value}\n" for name, value in {"interval": interval, "jitter": jitter, **more}.items())
    return f"auto_cleanup:\n{top}  rules: [{', '.join(lines)}]\n"


def status(one: Daemon) -> Any:
    return one.good("GET", "/v1/status")


def first_pass(one: Daemon) -> None:
    one.wait_for(lambda: status(one)["reconcile"]["last_run"], "the first reconcile is over", 20)


def state_of(lab: Lab, vmid: int, state: str) -> Callable[[], bool]:
    return lambda: lab.record(vmid).state == state


def measured(daemon: Make, **options: Any) -> Daemon:
    return daemon(metrics_listen=f"127.0.0.1:{free_port()}", **options)


# ---- leases ----


def test_a_lease_ends_when_it_is_over_and_not_at_the_next_interval(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    one = measured(daemon, expire_interval="1h")
    first_pass(one)
    # The daemon sleeps by the old end; the renewal through its API wakes it.
    one.good("POST", "/v1/sandboxes/1000/lease/renew", {"ttl": "2s", "allow_shorten": True})
    ends = lab.record(1000).lease_expires_at
    one.wait_for(state_of(lab, 1000, "TIMEOUT"), "the lease ends", 20)
    expired = lab.events(made)[-1] if lab.events(made)[-1]["operation"] == "expire" else lab.events(made)[-2]
    assert (expired["operation"], expired["actor"], expired["reason"]) == ("expire", "agentlabd", "lease_expired")
    assert ends is not None and ends <= expired["at"] <= ends + 5
    one.wait_for(lambda: lab.pve.vm(1000).status == "stopped", "its VM is stopped")
    assert one.metric('agentlab_leases_total{result="expired"}') == 1
    assert "lease of sandbox 1000 is over: RUNNING -> TIMEOUT" in one.log()
    assert state_of(lab, 1000, "TIMEOUT")(), "destroying is for the rules"


def test_a_lease_that_somebody_else_renewed_meanwhile_goes_on(daemon: Make, lab: Lab) -> None:
    for name in ("a1", "a2"):
        lab.create(name)
    one = daemon(expire_interval="1h")
    for vmid in (1000, 1001):
        one.good("POST", f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "4s", "allow_shorten": True})
    # Not through the API: the daemon learns of it when it looks.
    lab.renew(1000, 3600)
    one.wait_for(state_of(lab, 1001, "TIMEOUT"), "the other lease ends", 20)
    assert lab.record(1000).state == "RUNNING"


def test_keepalive_is_renewed_until_its_lifetime_is_over(daemon: Make, lab: Lab) -> None:
    lab.create("a1", ttl=1, keepalive=True)
    one = measured(daemon, expire_interval="1h")
    one.wait_for(lambda: one.metric('agentlab_leases_total{result="kept_alive"}') >= 2, "it is renewed twice", 20)
    assert lab.record(1000).state == "RUNNING"
    one.write_config(max_lifetime="1s")
    one.reload()
    one.wait_for(state_of(lab, 1000, "TIMEOUT"), "its lifetime is over", 20)


def test_a_vm_that_could_not_be_stopped_is_stopped_by_a_later_pass(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon(reconcile_interval="2s")
    first_pass(one)
    for word in ("shutdown", "stop"):
        lab.pve.fault("POST", rf"/qemu/1000/status/{word}", "answer", status=500, body='{"data":null,"message":"no"}')
    one.good("POST", "/v1/sandboxes/1000/lease/renew", {"ttl": "2s", "allow_shorten": True})
    # Expiry ends the lease, or a pass of reconcile that comes by in that second.
    told = r"sandbox 1000 is TIMEOUT, but its VM was not stopped: .*500 no|reconcile: 1000 lease_expired: .*500 no"
    one.wait_for(lambda: re.search(told, one.log()), "the refused stop is told", 20)
    assert lab.record(1000).state == "TIMEOUT"
    lab.pve.faults.clear()
    one.wait_for(lambda: lab.pve.vm(1000).status == "stopped", "a pass of reconcile stops it", 20)


def test_a_vm_that_the_daemon_is_stopping_is_no_failure_of_a_pass(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon(reconcile_interval="1s")
    first_pass(one)
    release = threading.Event()

    async def hold(method: str, path: str) -> None:
        while path.endswith("/1000/status/shutdown") and not release.is_set():
            await asyncio.sleep(0.01)

    lab.pve.before = hold
    one.good("POST", "/v1/sandboxes/1000/lease/renew", {"ttl": "2s", "allow_shorten": True})
    one.wait_for(state_of(lab, 1000, "TIMEOUT"), "the lease ends", 20)
    passed = one.get("/v1/status").body["reconcile"]["last_run"]
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"] > passed, "a pass meets the stop", 20)
    drift = one.good("POST", "/v1/sandboxes/reconcile", {"apply": True})["drift"]
    assert [(row["kind"], row["applied"], row["error"]) for row in drift] == [("still_running", False, None)]
    assert drift[0]["evidence"] == {"note": "another run is stopping it"}
    assert "still_running" not in one.log() and "being worked on" not in one.log(), one.log()
    release.set()
    one.wait_for(lambda: lab.pve.vm(1000).status == "stopped", "the VM is switched off", 20)


def test_a_proxmox_that_hangs_delays_no_lease_and_no_answer(daemon: Make, lab: Lab) -> None:
    """Every thread that asks Proxmox is stuck: two connections, a reconcile, two destroys and a VM that is to be
    stopped.
    """
    for number in range(5):
        lab.create(f"a{number}", ttl=3600)
    one = daemon(connections=2, reconcile_interval="1s", expire_interval="1h")
    first_pass(one)
    release, stuck = threading.Event(), threading.Event()

    async def hold(method: str, path: str) -> None:
        stuck.set()
        while not release.is_set():
            await asyncio.sleep(0.01)

    lab.pve.before = hold
    clients = [
        threading.Thread(target=one.post, args=(f"/v1/sandboxes/{vmid}/destroy", {"force": True}))
        for vmid in (1003, 1004, 1002)
    ]
    try:
        for client in clients:
            client.start()
        assert stuck.wait(10)
        for vmid in (1000, 1001):
            one.good("POST", f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "2s", "allow_shorten": True})
        ends = lab.record(1001).lease_expires_at
        took = []
        for _dummy in range(20):
            began = time.monotonic()
            assert len(one.good("GET", "/v1/sandboxes")["sandboxes"]) == 5
            took.append(time.monotonic() - began)
        for vmid in (1000, 1001):
            one.wait_for(state_of(lab, vmid, "TIMEOUT"), "the lease ends although Proxmox hangs", 20)
        changed = lab.record(1001).state_changed_at
        assert ends is not None and changed is not None and changed <= ends + 5
        assert status(one)["expiry"]["last_error"] is None
    finally:
        release.set()
        lab.pve.before = None
    for client in clients:
        client.join(30)
    # Generous for a loaded machine: waiting for Proxmox would have taken for ever.
    assert sorted(took)[10] < 0.5, took


# ---- reconcile ----


def test_reconcile_finds_drift_and_orphans_and_repairs_what_can_be(daemon: Make, lab: Lab) -> None:
    for number in range(4):
        lab.create(f"a{number}")
    lab.pve.power(1000, "stopped")
    lab.pve.remove_vm(1001)
    lab.pve.move_vm(1002, "pve2")
    # A VM of ours whose record is gone: reported, left alone.
    stray = lab.create("stray")
    vm = lab.pve.vm(stray.vmid)
    lab.force_state(stray.vmid, "DESTROYED")
    lab.context().database.write(
        lambda conn: conn.execute("DELETE FROM sandboxes WHERE uuid = ?", (stray.uuid,)) and None
    )
    lab.pve.requests.clear()
    one = measured(daemon, reconcile_interval="1s")
    one.wait_for(state_of(lab, 1001, "DESTROYED"), "what is absent twice is closed", 20)
    assert (lab.record(1001).reason, lab.record(1000).state, lab.record(1002).node, lab.record(1003).state) == (
        "external",
        "FAILED",
        "pve2",
        "RUNNING",
    )
    assert {event["actor"] for event in lab.events(lab.record(1001)) if event["operation"] == "reconcile"} == {
        "agentlabd"
    }
    # Found by every pass, counted once.
    one.wait_for(
        lambda: one.metric('agentlab_operations_total{operation="reconcile",result="ok"}') >= 3,
        "three passes ended",
        20,
    )
    assert one.metric('agentlab_orphans_found_total{kind="unrecorded"}') == 1
    assert one.metric('agentlab_orphans_found_total{kind="vm_absent"}') == 1
    assert one.metric("agentlab_reconcile_last_success_timestamp_seconds") > time.time() - 30
    assert lab.pve.vm(stray.vmid) is vm and lab.pve.touched(stray.vmid) == []
    for words in (
        "reconcile: 1000 stopped: FAILED",
        "reconcile: 1001 absent: DESTROYED",
        "reconcile: 1002 moved: node updated to pve2",
    ):
        assert one.log().count(words) == 1, one.log()
    lab.pve.remove_vm(stray.vmid)


def test_reconcile_tells_a_failure_once_and_comes_back_by_itself(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon(start=False, reconcile_interval="1s")
    lab.pve.fault("GET", r"/.*", "answer", status=500, body="", times=1000)
    one.start()
    error = one.wait_for(lambda: status(one)["reconcile"]["last_error"], "the failure is told")
    time.sleep(2.5)
    assert one.log().count(f"reconcile: {error}") == 1
    lab.pve.faults.clear()
    one.wait_for(lambda: status(one)["reconcile"]["last_error"] is None, "it works again", 20)
    assert "reconcile works again" in one.log() and status(one)["reconcile"]["last_run"]


# ---- what a killed daemon left ----


def test_a_creation_that_a_kill_cut_off_is_settled_by_the_next_start(daemon: Make, lab: Lab) -> None:
    lab.pve.real_secs["qmclone"] = 1.5
    one = daemon()
    first_pass(one)

    def ask_and_be_left() -> None:
        with contextlib.suppress(Exception):
            one.post("/v1/sandboxes", {"name": "a1"})

    client = threading.Thread(target=ask_and_be_left)
    client.start()
    one.wait_for(lambda: lab.pve.running_tasks("qmclone"), "the clone is under way")
    one.kill()
    client.join(10)
    assert [entry["kind"] for entry in lab.leftovers()["operations"]] == ["create"]
    one.wait_for(lambda: not lab.pve.running_tasks("qmclone"), "the clone ended by itself")
    one.cleanup_file.write_text(rules("{name: failed, match: {states: [FAILED]}, after: 0s, action: destroy}"))
    one.start()
    one.wait_for(state_of(lab, 1000, "DESTROYED"), "the creation is given up, and its VM destroyed by a rule", 30)
    assert lab.ours() == {} and lab.leftovers() == {"claims": [], "operations": []}
    told = [
        (event["to_state"], event["actor"])
        for event in lab.events(lab.record(1000))
        if event["to_state"] in ("FAILED", "DESTROYED")
    ]
    assert ("FAILED", "agentlabd") in told and told[-1] == ("DESTROYED", "agentlabd (cleanup rule failed)")


def test_a_cleanup_that_a_kill_cut_off_is_finished_by_the_next_start(daemon: Make, lab: Lab) -> None:
    for number in range(4):
        lab.timed_out(f"a{number}")
    lab.pve.real_secs["qmdestroy"] = 1.0
    one = daemon(cleanup=rules(DESTROY_TIMEOUTS, guard="{percent: 100}"), connections=2)
    one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"], "the first delete was sent", 20)
    one.kill()
    assert {entry["kind"] for entry in lab.leftovers()["operations"]} == {"destroy"}
    one.start()
    one.wait_for(lambda: not lab.ours(), "everything is destroyed", 30)
    one.wait_for(lambda: {record.state for record in lab.records()} == {"DESTROYED"}, "and says so", 20)
    assert lab.leftovers() == {"claims": [], "operations": []}


def test_a_vm_that_cannot_be_stopped_is_one_orphan_however_often_it_is_met(daemon: Make, lab: Lab) -> None:
    made = lab.timed_out("a1", stopped=False)
    lab.pve.vm(made.vmid).config["lock"] = "backup"
    one = measured(daemon, reconcile_interval="1s")
    passes = 'agentlab_operations_total{operation="reconcile",result="ok"}'
    one.wait_for(lambda: one.metric(passes) >= 3, "it was met in three passes", 30)
    assert one.metric('agentlab_orphans_found_total{kind="lease_over"}') == 1
    del lab.pve.vm(made.vmid).config["lock"]
    one.wait_for(lambda: lab.pve.vm(made.vmid).status == "stopped", "it is stopped", 20)
    assert one.metric('agentlab_orphans_found_total{kind="lease_over"}') == 1


# ---- the rules ----


def test_every_rule_acts_on_what_it_names_and_on_nothing_else(daemon: Make, lab: Lab) -> None:
    for name, state, age in (
        ("old", "TIMEOUT", 100),
        ("young", "TIMEOUT", 0),
        ("debug", "TIMEOUT", 100),
        ("done", "COMPLETED", 100),
        ("stuck", "PROVISIONING", 100),
        ("stopped", "STOPPED", 100),
        ("well", "RUNNING", 100),
    ):
        lab.force_state(lab.create(name, tags=[name]).vmid, state, age=age)
    lab.force_state(lab.create("kept", protected=True).vmid, "TIMEOUT", age=100)
    one = measured(
        daemon,
        cleanup=rules(
            "{name: debug, match: {tags: [debug]}, action: keep}",
            "{name: timeouts, match: {states: [TIMEOUT]}, after: 60s, action: destroy}",
            "{name: done, match: {states: [COMPLETED]}, after: 60s, action: destroy}",
            "{name: stuck, match: {states: [REQUESTED, PROVISIONING, BOOTING]}, after: 60s, action: fail}",
        ),
        reconcile_interval="1h",
    )
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="ok"}') >= 2, "the rules ran twice", 30)
    found = {record.name: record.state for record in lab.records()}
    # The stale creation is settled by reconcile or by the rule, whichever comes first.
    assert found == {
        "old": "DESTROYED",
        "young": "TIMEOUT",
        "debug": "TIMEOUT",
        "done": "DESTROYED",
        "stuck": "FAILED",
        "well": "RUNNING",
        "stopped": "STOPPED",
        "kept": "TIMEOUT",
    }
    assert len(lab.ours()) == 6
    last = lab.events(next(record for record in lab.records() if record.name == "old"))[-1]
    assert (last["actor"], last["to_state"]) == ("agentlabd (cleanup rule timeouts)", "DESTROYED")
    assert one.metric('agentlab_prune_items_total{result="pruned"}') == 2
    assert (
        one.metric('agentlab_prune_kept_total{reason="rule"}') >= 2
        and one.metric('agentlab_prune_kept_total{reason="protected"}') >= 2
    )
    assert status(one)["cleanup"]["last_result"]["kept"] == 3
    # Not necessarily in one pass: reconcile may have one of them in hand while the first pass looks.
    assert sum(map(int, re.findall(r"cleanup: (\d+) destroyed", one.log()))) == 2


def test_shadow_mode_only_says_what_it_would_do(daemon: Make, lab: Lab) -> None:
    made = lab.timed_out("a1")
    lab.force_state(lab.create("a2").vmid, "BOOTING", age=100)
    lab.pve.requests.clear()
    stuck = "{name: stuck, match: {states: [BOOTING]}, after: 60s, action: fail}"
    one = measured(
        daemon,
        cleanup=rules(DESTROY_TIMEOUTS, stuck, mode="shadow", retention="{destroyed_records: 1s}"),
        reconcile_interval="1h",
    )
    first_pass(one)
    before = [lab.record(vmid) for vmid in (1000, 1001)]
    events = lab.events(made)
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="shadow"}') >= 2, "it ran twice", 30)
    assert [lab.record(vmid) for vmid in (1000, 1001)] == before and lab.events(made) == events
    assert [request for request in lab.pve.requests if request[0] != "GET"] == []
    found = status(one)["cleanup"]
    assert (found["mode"], found["last_result"]["result"], found["last_result"]["count"]) == ("shadow", "shadow", 1)
    assert (
        one.metric('agentlab_prune_items_total{result="would_prune"}') >= 2
        and one.metric('agentlab_prune_items_total{result="pruned"}') == 0
    )
    assert "cleanup: 1 would be destroyed" in one.log()


def test_the_rules_run_by_interval_and_jitter_and_a_restart_forgets_neither(daemon: Make, lab: Lab) -> None:
    last = int(time.time()) - 1000
    lab.context().records.set_meta(LAST_CLEANUP, str(last))
    one = daemon(cleanup=rules(DESTROY_TIMEOUTS, interval="1h", jitter="10m"))

    def planned() -> int:
        text = one.wait_for(lambda: status(one)["cleanup"]["next_run"], "the next run is planned")
        return calendar(text)

    def calendar(text: str) -> int:
        import datetime

        return int(datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp())

    found = set()
    for _dummy in range(6):
        found.add(planned())
        one.stop()
        one.start()
    assert all(last + 3600 <= one_of_them <= last + 3600 + 600 for one_of_them in found)
    assert len(found) > 1, "jitter is drawn anew"
    # Overdue (or the clock was set back): soon, but not in the first moment.
    for other in (int(time.time()) - 7200, int(time.time()) + 7200):
        one.stop()
        lab.context().records.set_meta(LAST_CLEANUP, str(other))
        one.start()
        assert 5 <= planned() - time.time() <= 10 + 600
    assert status(one)["cleanup"]["last_run"] is None


def test_runs_follow_each_other_by_the_interval(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = measured(daemon, cleanup=rules(DESTROY_TIMEOUTS, interval="2s"))
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="ok"}') >= 3, "three runs ended", 30)
    ran = one.metric('agentlab_prune_runs_total{result="ok"}')
    assert ran <= one.good("GET", "/v1/status")["uptime_seconds"] / 2 + 1


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ("{count: 3}", "6 sandboxes would be destroyed at once, more than guard count=3"),
        ("{percent: 60}", "6 of 7 sandboxes would be destroyed at once, more than guard percent=60"),
    ],
)
def test_the_guard_trips_and_nothing_is_destroyed_until_it_is_released(
    daemon: Make, lab: Lab, guard: str, words: str
) -> None:
    for number in range(6):
        lab.timed_out(f"a{number}")
    lab.create("well")
    one = measured(daemon, cleanup=rules(DESTROY_TIMEOUTS, guard=guard))
    frozen = one.wait_for(lambda: status(one)["cleanup"]["frozen"], "it freezes", 20)
    assert frozen["reason"].startswith(words) and frozen["actor"] == "agentlabd"
    assert (
        one.metric("agentlab_prune_frozen"),
        one.metric("agentlab_prune_guard_trips_total"),
        one.metric("agentlab_prune_candidates"),
    ) == (1, 1, 6)
    assert one.metric('agentlab_prune_runs_total{result="guard"}') == 1
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="frozen"}') >= 1, "later runs do nothing", 20)
    assert f"cleanup: {words}; nothing was destroyed, and cleanup is frozen until it is released" in one.log()
    assert status(one)["cleanup"]["last_result"]["result"] == "frozen"
    # Also after a restart, and with a more generous guard: only a person releases it.
    one.stop()
    one.cleanup_file.write_text(rules(DESTROY_TIMEOUTS, guard="{count: 50, percent: 100}"))
    one.start()
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="frozen"}') >= 1, "it is frozen still", 20)
    refused = one.post("/v1/cleanup/run")
    assert (refused.status, refused.body["code"]) == (409, "frozen")
    assert len(lab.ours()) == 7 and [request for request in lab.pve.requests if request[0] == "DELETE"] == []
    assert one.good("POST", "/v1/cleanup/run", {"dry_run": True})["count"] == 6, "what it would do can be seen"
    assert one.good("POST", "/v1/cleanup/release")["released"]["reason"].startswith(words)
    one.wait_for(lambda: len(lab.ours()) == 1, "released it goes on by itself", 30)
    one.wait_for(lambda: status(one)["cleanup"]["last_result"]["result"] == "ok", "and says so")
    assert one.metric("agentlab_prune_frozen") == 0 and lab.record(1006).state == "RUNNING"


def test_a_freeze_by_hand_holds_the_rules_and_not_what_people_ask_for(daemon: Make, lab: Lab) -> None:
    lab.timed_out("a1")
    lab.timed_out("a2")
    one = measured(daemon, cleanup=rules(DESTROY_TIMEOUTS, interval="3s"))
    assert (
        one.good("POST", "/v1/cleanup/freeze", {"reason": "storage is being moved"})["frozen"]["reason"]
        == "storage is being moved"
    )
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="frozen"}') >= 1, "the rules rest", 20)
    assert len(lab.ours()) == 2
    assert one.good("POST", "/v1/sandboxes/1000/destroy", {"force": True})["state"] == "DESTROYED"
    one.good("POST", "/v1/cleanup/release")
    one.wait_for(state_of(lab, 1001, "DESTROYED"), "released they act again", 20)


def test_retention_removes_old_records_and_their_events_alone(daemon: Make, lab: Lab) -> None:
    for name, age in (("old", 5000), ("young", 10)):
        made = lab.create(name)
        lab.destroy(made.vmid, force=True)
        lab.context().database.write(
            lambda conn, uuid=made.uuid, age=age: (
                conn.execute(  # type: ignore[misc]
                    "UPDATE sandboxes SET state_changed_at = ? WHERE uuid = ?", (int(time.time()) - age, uuid)
                )
                and None
            )
        )
    lab.force_state(lab.create("live").vmid, "RUNNING", age=5000)
    one = daemon(cleanup=rules(retention="{destroyed_records: 1h}"))
    one.wait_for(
        lambda: (status(one)["cleanup"]["last_result"] or {}).get("forgotten") == 1, "one record is forgotten", 20
    )
    assert {record.name for record in lab.records()} == {"young", "live"}
    known = {record.uuid for record in lab.records()}
    assert {row["sandbox_uuid"] for row in lab.context().database.read("SELECT sandbox_uuid FROM events")} == known
    assert "1 old records removed" in one.log()


# ---- configuration ----


@pytest.mark.parametrize("broken", ["config", "not yaml", "rules", "profile"])
def test_with_a_broken_file_it_goes_on_by_the_old_ones(daemon: Make, lab: Lab, tmp_path: Path, broken: str) -> None:
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    lab.timed_out("a1")
    one = daemon(
        cleanup=rules("{name: timeouts, match: {states: [TIMEOUT]}, after: 30m, action: destroy}"),
        profiles_dir=str(profiles),
        expire_interval="1h",
    )
    one.wait_for(lambda: status(one)["cleanup"]["last_result"], "the rules ran", 20)
    # What would act at once, if it were taken.
    one.cleanup_file.write_text(
        rules(DESTROY_TIMEOUTS)
        if broken != "rules"
        else rules(DESTROY_TIMEOUTS, "{name: more, match: {}, action: keep}")
    )
    if broken == "config":
        one.write_config(expire_intervall="1s")
    elif broken == "not yaml":
        one.config_file.write_text("socket: [\n")
    elif broken == "profile":
        (profiles / "p.yaml").write_text("name: p\nnonsense: 1\n")
    one.reload()
    error = one.wait_for(lambda: status(one)["config"]["error"], "the broken file is told")
    assert f"not reloaded, the old configuration stays in force: {error}" in one.log()
    lab.create("a2", ttl=2)
    one.good("POST", "/v1/sandboxes/1001/lease/renew", {"ttl": "2s", "allow_shorten": True})
    one.wait_for(state_of(lab, 1001, "TIMEOUT"), "leases end all the same", 20)
    assert lab.record(1000).state == "TIMEOUT", "the old rule's time has not come"
    # Mended, it is taken.
    if broken == "rules":
        one.cleanup_file.write_text(rules(DESTROY_TIMEOUTS))
    (profiles / "p.yaml").unlink(missing_ok=True)
    one.write_config(expire_intervall=None)
    one.reload()
    one.wait_for(state_of(lab, 1000, "DESTROYED"), "the new rule acts", 20)
    assert status(one)["config"]["error"] is None


# ---- at rest ----


def test_at_rest_it_asks_proxmox_nothing_and_hardly_runs(daemon: Make, lab: Lab) -> None:
    for number in range(3):
        lab.create(f"a{number}")
    lab.force_state(1002, "TIMEOUT")
    one = measured(
        daemon,
        expire_interval="1s",
        cleanup=rules("{name: timeouts, match: {states: [TIMEOUT]}, after: 1h, action: destroy}"),
    )
    first_pass(one)
    one.wait_for(lambda: one.metric('agentlab_prune_runs_total{result="ok"}') >= 1, "the rules ran", 20)
    lab.pve.counted.clear()
    used = one.cpu()
    time.sleep(5)
    # Five looks at the leases, five runs of the rules: all from the records.
    assert lab.pve.count() == 0, dict(lab.pve.counted)
    assert one.cpu() - used < 0.5
    before = one.metric('agentlab_prune_runs_total{result="ok"}')
    assert before >= 4


def test_a_pass_of_reconcile_asks_little_and_only_when_it_is_due(daemon: Make, lab: Lab) -> None:
    for number in range(3):
        lab.create(f"a{number}")
    one = measured(daemon, reconcile_interval="1h")
    passes = 'agentlab_operations_total{operation="reconcile",result="ok"}'
    one.wait_for(lambda: one.metric(passes) == 1, "the first pass ended", 20)
    # Another interval is in force at once: nobody waits for the end of the old one.
    lab.pve.counted.clear()
    one.write_config(reconcile_interval="2s")
    one.reload()
    one.wait_for(lambda: one.metric(passes) >= 4, "three more passes ended", 30)
    one.stop()
    configs = lab.pve.counted["GET /nodes/{node}/qemu/{vmid}/config"]
    # Each sandbox is read once, and the bystander, which is tagged as if it were ours; all else is asked once for all.
    assert 3 <= configs / 4 <= 5, dict(lab.pve.counted)
    assert lab.pve.count() - configs <= 5 * 5, dict(lab.pve.counted)
