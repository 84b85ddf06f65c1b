# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The contract with the original command line, a Go program: what it sends is taken, and what it reads is there with
the type that it needs.

Go's JSON decoder ignores what it does not know, takes null for any field, and fails on another type; a field that is
missing is 0 or "" to it. So a field that a command shows must be there: ``read`` refuses an answer without it.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.daemon import Daemon, Make
from support.lab import Lab

SANDBOX = {
    "vmid": int,
    "name": str,
    "profile": (str, None),
    "tags": [str],
    "state": str,
    "ip": (str, None),
    "workspace_id": (str, None),
    "keepalive": bool,
    "lease_expires_at": (str, None),
    "created_at": str,
    "updated_at": str,
}
WORKSPACE = {
    "id": str,
    "name": str,
    "storage": str,
    "volid": str,
    "size_gb": int,
    "attached_vmid": (int, None),
    "created_at": str,
    "updated_at": str,
}
EVENT = {
    "id": int,
    "ts": str,
    "kind": str,
    "sandbox_vmid": (int, None),
    "job_id": (str, None),
    "msg": str,
    "json": object,
}
ENTRY = {
    "vmid": int,
    "name": str,
    "managed": bool,
    "profile": (str, None),
    "agentlab_state": (str, None),
    "proxmox_status": (str, None),
    "agentlab_ip": (str, None),
    "drift": [str],
}
RECONCILE = {"dry_run": bool, "checked": int, "drifted": int, "reconciled": int, "results": [ENTRY]}
STATUS = {
    "api_schema_version": int,
    "event_schema_version": int,
    "sandboxes": {str: int},
    "jobs": {str: int},
    "network_modes": {str: int},
    "artifacts": {str: object},
    "metrics": {"enabled": bool},
    "recent_failures": [EVENT],
}
STOP_ALL = {
    "total": int,
    "stopped": int,
    "skipped": int,
    "failed": int,
    "results": [{"vmid": int, "name": str, "profile": (str, None), "state": str, "result": str, "error": (str, None)}],
}
ISSUE = {"code": str, "field": str, "message": str}
PLAN = {
    "ok": bool,
    "errors": [ISSUE],
    "warnings": [ISSUE],
    "plan": {"name": (str, None), "profile": (str, None), "keepalive": bool},
}


def read(shape: Any, value: Any, where: str = "answer") -> Any:
    """Read a value as the Go program does; AssertionError where it could not, or would silently show nothing."""
    if isinstance(shape, tuple):
        return None if value is None else read(shape[0], value, where)
    if isinstance(shape, list):
        assert isinstance(value, list), f"{where} is no list: {value!r}"
        return [read(shape[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(shape, dict) and str in shape:
        assert isinstance(value, dict), f"{where} is no object: {value!r}"
        return {name: read(shape[str], item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{where} is no object: {value!r}"
        missing = set(shape) - set(value)
        assert not missing, f"{where} lacks {missing}"
        return {name: read(inner, value[name], f"{where}.{name}") for name, inner in shape.items()}
    assert shape is object or (isinstance(value, shape) and isinstance(value, bool) == (shape is bool)), (
        f"{where} is {value!r}, not {shape.__name__}"
    )
    return value


def test_the_six_sandbox_commands_of_the_first_version(daemon: Make, lab: Lab) -> None:
    one = daemon()
    sent = {"name": "a1", "keepalive": False, "ttl_minutes": 60, "workspace_id": None}
    assert read(SANDBOX, one.good("POST", "/v1/sandboxes", sent, 201))["state"] == "RUNNING"
    assert [item["vmid"] for item in read([SANDBOX], one.good("GET", "/v1/sandboxes")["sandboxes"])] == [1000]
    assert read(SANDBOX, one.good("GET", "/v1/sandboxes/1000"))["name"] == "a1"
    renewed = one.good("POST", "/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 240})
    assert read({"vmid": int, "lease_expires_at": str}, renewed)["vmid"] == 1000
    refused = one.post("/v1/sandboxes/1000/destroy", {"force": False})
    assert refused.status == 409 and read({"error": str}, refused.body)["error"].endswith("Use --force to bypass")
    ended = read({**SANDBOX, "previous_state": str}, one.good("POST", "/v1/sandboxes/1000/destroy", {"force": True}))
    assert (ended["previous_state"], ended["state"]) == ("RUNNING", "DESTROYED")
    lab.timed_out("a2")
    assert read({"count": int}, one.good("POST", "/v1/sandboxes/prune"))["count"] == 1


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_what_does_not_exist_here_is_no_such_path(one_daemon: Daemon, method: str) -> None:
    for path in ("jobs", "jobs/7", "sessions", "snapshots", "exposures", "messages",
                 "sandboxes/1000/snapshots", "sandboxes/doctor", "workspaces/w1/fsck", "workspaces/w1/fork"):  # fmt: skip
        answer = one_daemon.request(method, f"/v1/{path}", {} if method == "POST" else None)
        assert (answer.status, answer.body["code"]) == (404, "no_such_path"), path


def test_workspaces_are_created_listed_attached_detached_and_rebound(daemon: Make, lab: Lab, tmp_path: Any) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "yolo.yaml").write_text("template: 9000\ntags: [yolo]\n", encoding="utf-8")
    one = daemon(profiles_dir=str(tmp_path / "profiles"))
    first = one.good("POST", "/v1/sandboxes", {"name": "a1", "profile": "yolo", "ttl_minutes": 60}, 201)
    made = read(
        WORKSPACE, one.good("POST", "/v1/workspaces", {"name": "w1", "size_gb": 2, "storage": "local-lvm"}, 201)
    )
    assert (made["name"], made["size_gb"], made["storage"], made["attached_vmid"]) == ("w1", 2, "local-lvm", None)
    assert made["volid"].startswith("local-lvm:")
    attached = read(WORKSPACE, one.good("POST", "/v1/workspaces/w1/attach", {"vmid": 1000}))
    assert attached["attached_vmid"] == 1000
    assert read({"workspaces": [WORKSPACE]}, one.good("GET", "/v1/workspaces"))["workspaces"] == [attached]
    rebound = one.good("POST", "/v1/workspaces/w1/rebind", {"profile": "yolo", "ttl_minutes": 30})
    shown = read({"workspace": WORKSPACE, "sandbox": SANDBOX, "old_vmid": (int, None)}, rebound)
    assert (shown["old_vmid"], shown["sandbox"]["state"], shown["workspace"]["attached_vmid"]) == (
        1000,
        "RUNNING",
        shown["sandbox"]["vmid"],
    )
    assert shown["sandbox"]["vmid"] != 1000 and shown["sandbox"]["workspace_id"] == made["id"]
    assert lab.record(1000).uuid == first["uuid"] and lab.record(1000).state == "DESTROYED"
    kept = one.good("POST", "/v1/workspaces/w1/rebind", {"profile": "yolo", "keep_old": True})
    assert (
        lab.record(kept["old_vmid"]).state == "STOPPED"
        and kept["workspace"]["attached_vmid"] == kept["sandbox"]["vmid"]
    )
    # What is wrong with the new sandbox is said before the old one is touched.
    refused = one.post("/v1/workspaces/w1/rebind", {"profile": "none"})
    assert refused.status == 400 and "'none'" in refused.body["error"]
    assert one.good("GET", "/v1/workspaces/w1")["attached_vmid"] == kept["sandbox"]["vmid"]
    assert lab.record(kept["sandbox"]["vmid"]).state == "RUNNING"
    detached = read(WORKSPACE, one.good("POST", "/v1/workspaces/w1/detach"))
    assert (
        detached["attached_vmid"] is None
        and len(lab.pve.volumes_of(one.good("GET", "/v1/workspaces/w1")["owner_vmid"])) == 1
    )


def test_a_size_that_is_no_whole_number_of_gib_is_rounded_up(daemon: Make) -> None:
    one = daemon()
    made = one.good("POST", "/v1/workspaces", {"name": "w1", "size": "1500M", "storage": "local-lvm"}, 201)
    assert read(WORKSPACE, made)["size_gb"] == 2


def test_reconcile_counts_what_it_found_and_repaired(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.create("a2")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    clean = read(RECONCILE, one.good("POST", "/v1/sandboxes/reconcile", {}))
    assert (clean["dry_run"], clean["checked"], clean["drifted"], clean["reconciled"], clean["results"]) == (
        True,
        2,
        0,
        0,
        [],
    )
    lab.pve.power(1000, "stopped")
    report = read(RECONCILE, one.good("POST", "/v1/sandboxes/reconcile", {"dry_run": True}))
    assert (report["dry_run"], report["drifted"], report["reconciled"]) == (True, 1, 0)
    assert [
        (entry["vmid"], entry["managed"], entry["agentlab_state"], entry["drift"]) for entry in report["results"]
    ] == [(1000, True, "RUNNING", ["stopped"])]
    assert lab.record(1000).state == "RUNNING"
    applied = read(RECONCILE, one.good("POST", "/v1/sandboxes/reconcile", {"apply": True}))
    assert (applied["dry_run"], applied["drifted"], applied["reconciled"]) == (False, 1, 1)
    assert lab.record(1000).state == "FAILED"


def test_logs_reads_events(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    one.good("POST", "/v1/sandboxes/1000/pause")
    answer = read({"events": [EVENT], "last_id": int}, one.good("GET", "/v1/sandboxes/1000/events?tail=50"))
    last = answer["events"][-1]
    assert (last["sandbox_vmid"], last["kind"], answer["last_id"]) == (1000, "sandbox.pause.completed", last["id"])
    assert last["msg"].startswith("suspend: RUNNING -> SUSPENDED, by ") and last["json"]["to_state"] == "SUSPENDED"
    assert last["ts"].endswith("Z")
    assert (
        read(
            {"events": [EVENT], "last_id": int},
            one.good("GET", f"/v1/sandboxes/1000/events?after={last['id']}&limit=200"),
        )["events"]
        == []
    )


def test_status_has_the_summary(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.timed_out("a2")
    one = daemon()
    status = read(STATUS, one.good("GET", "/v1/status"))
    assert (status["sandboxes"]["RUNNING"], status["sandboxes"]["TIMEOUT"]) == (1, 1) and status["metrics"] == {
        "enabled": False
    }
    lab.pve.fail("POST", "/clone", 500, "storage is full")
    assert one.post("/v1/sandboxes", {"name": "a3"}).status == 502
    failures = read(STATUS, one.good("GET", "/v1/status"))["recent_failures"]
    assert failures and failures[0]["kind"].endswith(".failed") and "storage is full" in str(failures[0])


def test_pause_resume_and_stop(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.timed_out("a2")
    one = daemon()
    assert read(SANDBOX, one.good("POST", "/v1/sandboxes/1000/pause"))["state"] == "SUSPENDED"
    assert read(SANDBOX, one.good("POST", "/v1/sandboxes/1000/resume"))["state"] == "RUNNING"
    assert read(SANDBOX, one.good("POST", "/v1/sandboxes/1000/stop"))["state"] == "STOPPED"
    refused = one.post("/v1/sandboxes/1000/resume")
    assert refused.status == 409 and refused.body["error"].startswith(
        "cannot resume sandbox in STOPPED state. Valid states: SUSPENDED"
    )
    assert one.post("/v1/sandboxes/1000/pause").status == 409
    # Else prune would never see it again.
    over = one.post("/v1/sandboxes/1001/stop")
    assert over.status == 409 and over.body["error"].startswith(
        "cannot stop sandbox in TIMEOUT state. Valid states: READY, RUNNING, SUSPENDED"
    )
    assert lab.record(1001).state == "TIMEOUT"
    assert one.good("POST", "/v1/sandboxes/prune")["count"] == 1


def test_stop_all_stops_what_runs(daemon: Make, lab: Lab) -> None:
    for name in ("a1", "a2", "a3"):
        lab.create(name)
    lab.power("stop", 1002)
    lab.timed_out("a4")
    one = daemon()
    answer = read(STOP_ALL, one.good("POST", "/v1/sandboxes/stop_all", {"force": False}))
    assert (answer["total"], answer["stopped"], answer["skipped"], answer["failed"]) == (4, 2, 2, 0)
    assert [(item["vmid"], item["state"], item["result"]) for item in answer["results"]] == [
        (1000, "STOPPED", "stopped"),
        (1001, "STOPPED", "stopped"),
        (1002, "STOPPED", "skipped"),
        (1003, "TIMEOUT", "skipped"),
    ]
    assert lab.pve.vm(1000).status == lab.pve.vm(1001).status == "stopped"


def test_a_stop_that_fails_is_told_and_stops_no_other(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.create("a2")
    lab.pve.fail("POST", "/qemu/1000/status/shutdown", 500, "no")
    one = daemon()
    answer = read(STOP_ALL, one.good("POST", "/v1/sandboxes/stop_all", status=207))
    assert (answer["stopped"], answer["failed"]) == (1, 1) and "no" in answer["results"][0]["error"]


def test_the_inventory(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.create("a2")
    one = daemon()
    lab.pve.power(1000, "stopped")
    lab.pve.remove_vm(1001)
    lab.pve.make_foreign(1500)
    lab.pve.make_foreign(5000)
    entries = read({"sandboxes": [ENTRY]}, one.good("GET", "/v1/sandboxes/inventory"))["sandboxes"]
    found = [
        (entry["vmid"], entry["managed"], entry["proxmox_status"] is not None, entry["drift"]) for entry in entries
    ]
    # VMs outside vmid_range are nobody's business here.
    assert found == [
        (1000, True, True, ["stopped_while_marked_running"]),
        (1001, True, False, ["missing_in_proxmox"]),
        (1500, False, True, ["unmanaged_proxmox_vm"]),
    ]


@pytest.mark.parametrize(
    ("body", "ok", "field"),
    [
        ({"name": "a1", "profile": "yolo", "ttl_minutes": 60}, True, None),
        ({"profile": "none"}, False, "profile"),
        ({"profile": "yolo", "name": "-x"}, False, "name"),
        ({"profile": "yolo", "workspace_id": "none"}, False, "workspace"),
    ],
)
def test_a_plan_is_judged_and_nothing_is_made(
    daemon: Make, lab: Lab, tmp_path: Any, body: dict[str, Any], ok: bool, field: str | None
) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "yolo.yaml").write_text("template: 9000\n", encoding="utf-8")
    one = daemon(profiles_dir=str(tmp_path / "profiles"))
    answer = read(PLAN, one.good("POST", "/v1/sandboxes/validate-plan", body))
    assert answer["ok"] is ok and answer["plan"]["profile"] == body["profile"]
    assert [issue["field"] for issue in answer["errors"]] == ([] if field is None else [field])
    assert lab.ours() == {} and one.good("GET", "/v1/sandboxes") == {"sandboxes": []}


def test_profiles(daemon: Make, tmp_path: Any) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "by-id.yaml").write_text("template: 9000\n", encoding="utf-8")
    (tmp_path / "profiles" / "by-name.yaml").write_text("template: debian-13\n", encoding="utf-8")
    one = daemon(profiles_dir=str(tmp_path / "profiles"))
    found = read(
        {"profiles": [{"name": str, "template_vmid": int, "updated_at": str}]}, one.good("GET", "/v1/profiles")
    )["profiles"]
    assert [(profile["name"], profile["template_vmid"]) for profile in found] == [("by-id", 9000), ("by-name", 0)]


def test_protection_and_keepalive_have_a_way_back(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    assert one.good("POST", "/v1/sandboxes/1000/protect")["protected"] is True
    assert one.post("/v1/sandboxes/1000/destroy", {"force": True}).status == 409
    assert one.good("POST", "/v1/sandboxes/1000/unprotect")["protected"] is False
    assert one.good("POST", "/v1/sandboxes/1000/unprotect")["changed"] is False
    assert one.good("POST", "/v1/sandboxes/1000/keepalive", {"keepalive": True})["keepalive"] is True
    assert one.good("POST", "/v1/sandboxes/1000/keepalive", {"keepalive": False})["keepalive"] is False
    assert one.post("/v1/sandboxes/1000/keepalive").status == 400
    one.good("POST", "/v1/sandboxes/1000/destroy", {"force": True})
    refused = one.post("/v1/sandboxes/1000/protect")
    assert refused.status == 409 and "DESTROYED" in refused.body["error"]
    assert one.post("/v1/sandboxes/1777/protect").status == 404


def test_ssh_gets_an_address_by_asking_for_the_sandbox(daemon: Make, lab: Lab) -> None:
    """The original's ssh asks until there is an address; nobody has to have waited for one at the creation."""
    lab.pve.agent_default = True
    one = daemon()
    made = one.good("POST", "/v1/sandboxes", {"name": "a1"}, 201)
    assert made["ip"] is None
    found = one.wait_for(lambda: read(SANDBOX, one.good("GET", "/v1/sandboxes/1000"))["ip"], "the address is there", 30)
    assert found == one.good("GET", "/v1/sandboxes")["sandboxes"][0]["ip"]
    events = one.good("GET", "/v1/sandboxes/1000/events")["events"]
    assert [(event["reason"], event["evidence"]) for event in events if event["operation"] == "address"] == [
        ("address", {"ip": found})
    ]
    assert len({event["actor"] for event in events}) == 1, "it was looked up for whoever asked"
    # Nothing is left behind that another operation would stumble over.
    assert one.good("POST", "/v1/sandboxes/1000/stop")["state"] == "STOPPED"


def test_an_address_is_waited_for_at_a_sandbox_that_is_there(daemon: Make, lab: Lab) -> None:
    lab.pve.agent_default = True
    one = daemon()
    assert one.good("POST", "/v1/sandboxes", {"name": "a1"}, 201)["ip"] is None
    again = one.good("POST", "/v1/sandboxes", {"name": "a1", "wait_for_ip": True}, 200)
    assert again["ip"] and again["ip_seen_at"] and (again["changed"], again["reason"]) == (True, "address")


@pytest.mark.parametrize(("away", "back"), [("stop", "start"), ("pause", "resume"), ("pause", "start")])
def test_a_start_waits_for_the_address_that_the_guest_has_then(
    daemon: Make, lab: Lab, monkeypatch: Any, away: str, back: str
) -> None:
    lab.pve.agent_default = True
    one = daemon()
    assert one.good("POST", "/v1/sandboxes", {"name": "a1", "wait_for_ip": True}, 201)["ip"]
    one.good("POST", f"/v1/sandboxes/1000/{away}")
    monkeypatch.setattr(lab.pve, "address_of", lambda _vmid: "192.0.2.99")
    agent = lab.pve.vm(1000).agent
    if away == "pause":
        # The guest's interfaces are still there, with an address that changed during the pause.
        agent["interfaces"][1]["ip-addresses"][1]["ip-address"] = "192.0.2.99"
    started = one.good("POST", f"/v1/sandboxes/1000/{back}", {"wait_for_ip": True})
    assert started["state"] == "RUNNING" and started["ip"] == "192.0.2.99"
    assert one.post(f"/v1/sandboxes/1000/{back}", {"wait_for_ip": "soon"}).status == 400
    assert one.post("/v1/sandboxes/1000/stop", {"wait_for_ip": True}).status == 400


def test_a_guest_that_is_silent_holds_nobody_up(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    lab.pve.fail("GET", "/agent/network-get-interfaces", 500, "QEMU guest agent is not running", times=999)
    one = daemon()
    for _dummy in range(5):
        assert one.good("GET", "/v1/sandboxes/1000")["ip"] is None
    assert one.good("POST", "/v1/sandboxes/1000/stop")["state"] == "STOPPED"
    assert one.good("GET", "/v1/status")["operations"]["in_progress"] == 0 and "Traceback" not in one.log()
