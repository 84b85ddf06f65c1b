# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every endpoint, answered by a real agentlabd on its real socket."""

from __future__ import annotations

import contextlib
import getpass
import os
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, Make, UnixConnection, ask, free_port
from support.lab import Lab

ACTOR = f"{getpass.getuser()} (uid {os.getuid()}) via API"


def test_health_and_status_are_answered(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    assert one.good("GET", "/v1/healthz") == {"status": "ok"}
    status = one.good("GET", "/v1/status")
    assert status["database"]["by_state"]["RUNNING"] == 1 and status["database"]["by_state"]["DESTROYED"] == 0
    assert status["database"]["path"] == lab.database
    assert status["config"]["error"] is None and status["config"]["path"] == str(one.config_file)
    assert status["proxmox"]["where"] == f"127.0.0.1:{lab.server.port}"
    assert status["operations"] == {"in_progress": 0, "interrupted": 0}


def test_a_sandbox_lives_from_creation_to_absence_through_the_api(daemon: Make, lab: Lab) -> None:
    one = daemon()
    made = one.good("POST", "/v1/sandboxes", {"name": "a1", "ttl_minutes": 120, "tags": ["web"]}, 201)
    assert (made["state"], made["vmid"], made["outcome"], made["changed"]) == ("RUNNING", 1000, "created", True)
    # Asked for again it is there, and stays as it is.
    assert one.good("POST", "/v1/sandboxes", {"name": "a1"}, 200)["changed"] is False
    path = "/v1/sandboxes/1000"
    shown = one.good("GET", path)
    assert set(shown) == {
        "uuid",
        "vmid",
        "name",
        "profile",
        "state",
        "node",
        "ip",
        "ip_seen_at",
        "workspace_id",
        "tags",
        "protected",
        "keepalive",
        "lease_expires_at",
        "created_at",
        "updated_at",
        "state_changed_at",
    }
    renewed = one.good("POST", f"{path}/lease/renew", {"ttl_minutes": 240})
    assert (
        renewed["vmid"] == 1000
        and renewed["lease_expires_at"] == one.good("GET", path)["lease_expires_at"] > made["lease_expires_at"]
    )
    assert one.good("POST", f"{path}/suspend")["state"] == "SUSPENDED"
    assert one.good("POST", f"{path}/start")["state"] == "RUNNING"
    stopped = one.good("POST", f"{path}/stop", {})
    assert (stopped["state"], stopped["previous_state"], lab.pve.vm(1000).status) == ("STOPPED", "RUNNING", "stopped")
    destroyed = one.good("POST", f"{path}/destroy")
    assert (destroyed["state"], destroyed["previous_state"], destroyed["outcome"]) == (
        "DESTROYED",
        "STOPPED",
        "destroyed",
    )
    assert lab.pve.vm(1000) is None
    # Once more: nothing to do.
    again = one.good("POST", f"{path}/destroy", {"force": True})
    assert (again["previous_state"], again["changed"]) == ("DESTROYED", False)
    assert one.good("GET", path)["state"] == "DESTROYED"
    assert one.good("GET", "/v1/sandboxes") == {"sandboxes": []}
    events = one.good("GET", f"{path}/events")["events"]
    assert {event["actor"] for event in events} == {ACTOR}
    assert [event["operation"] for event in events if event["from_state"] != event["to_state"]] == ["create"] * 5 + [
        "suspend",
        "start",
        "stop",
        "destroy",
    ]


def test_the_list_is_filtered_by_state_and_tag(daemon: Make, lab: Lab) -> None:
    lab.create("a1", tags=["web"])
    lab.create("a2", tags=["db"])
    lab.timed_out("a3")
    lab.destroy(lab.create("a4").vmid, force=True)
    one = daemon()

    def names(query: str = "") -> list[str]:
        return [found["name"] for found in one.good("GET", f"/v1/sandboxes{query}")["sandboxes"]]

    assert names() == ["a1", "a2", "a3"]
    assert names("?state=TIMEOUT") == ["a3"]
    assert names("?state=TIMEOUT&state=DESTROYED") == names("?state=TIMEOUT,DESTROYED") == ["a3", "a4"]
    assert names("?tag=web") == ["a1"] and names("?profile=none") == []
    assert names("?include_destroyed=true") == ["a1", "a2", "a3", "a4"]


def test_events_are_paged(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    every = one.good("GET", "/v1/sandboxes/1000/events")
    ids = [event["id"] for event in every["events"]]
    assert every["last_id"] == ids[-1] and len(ids) > 3
    tail = one.good("GET", "/v1/sandboxes/1000/events?tail=2")
    assert [event["id"] for event in tail["events"]] == ids[-2:]
    first = one.good("GET", "/v1/sandboxes/1000/events?limit=2")
    assert [event["id"] for event in first["events"]] == ids[:2] and first["last_id"] == ids[1]
    assert [event["id"] for event in one.good("GET", f"/v1/sandboxes/1000/events?after={ids[1]}")["events"]] == ids[2:]
    assert one.good("GET", f"/v1/sandboxes/1000/events?after={ids[-1]}") == {"events": [], "last_id": ids[-1]}


def test_bulk_destroy_checks_all_ids_first_and_gives_each_its_outcome(daemon: Make, lab: Lab) -> None:
    for name in ("a1", "a2", "a3"):
        lab.create(name)
    lab.power("stop", 1000)
    one = daemon()
    answer = one.post("/v1/sandboxes/destroy", {"vmids": [1000, 1777], "force": True})
    assert (answer.status, answer.body["error"]) == (404, "sandbox not found")
    assert len(lab.ours()) == 3, "an unknown id stops all before anything is done"
    none = one.good("POST", "/v1/sandboxes/destroy", {"vmids": []})
    assert (none["results"], none["failed_count"]) == ([], 0)
    mixed = one.good("POST", "/v1/sandboxes/destroy", {"vmids": [1000, 1001, 1000]}, 207)
    assert mixed.keys() == none.keys()
    assert [(item["vmid"], item["outcome"], item["previous_state"], item["failed"]) for item in mixed["results"]] == [
        (1000, "destroyed", "STOPPED", False),
        (1001, "failed", "RUNNING", True),
    ]
    assert mixed["failed_count"] == 1
    assert (
        mixed["results"][1]["message"]
        == "cannot destroy sandbox in RUNNING state. Valid states: STOPPED, DESTROYED. Use --force to bypass"
    )
    done = one.good("POST", "/v1/sandboxes/destroy", {"vmids": [1001, 1002], "force": True})
    assert [item["outcome"] for item in done["results"]] == ["destroyed", "destroyed"] and done["failed_count"] == 0
    assert lab.ours() == {}


def test_prune_and_its_dry_run(daemon: Make, lab: Lab) -> None:
    for name in ("a1", "a2"):
        lab.timed_out(name)
    lab.timed_out("a3", protected=True)
    lab.pve.remove_vm(1001)
    one = daemon()
    before = lab.events(lab.record(1000))
    dry = one.good("POST", "/v1/sandboxes/prune", {"dry_run": True})
    assert (dry["count"], dry["dry_run"], [item["outcome"] for item in dry["pruned"]]) == (
        2,
        True,
        ["would_prune", "would_prune"],
    )
    assert lab.events(lab.record(1000)) == before and len(lab.ours()) == 2, "a dry run writes nothing"
    answer = one.post("/v1/sandboxes/prune", {"max_count": 1})
    assert (answer.status, answer.body["code"], answer.body["count"]) == (409, "guard", 2)
    assert one.good("POST", "/v1/sandboxes/prune", {"older_than": "24h"})["count"] == 0
    done = one.good("POST", "/v1/sandboxes/prune")
    assert (done["count"], [item["reason"] for item in done["kept"]], done["failed"]) == (2, ["protected"], [])
    assert one.good("POST", "/v1/sandboxes/prune")["count"] == 0


def test_reconcile_reports_and_applies(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    # Else it would be the daemon's own first pass that finds it.
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    lab.pve.power(1000, "stopped")
    report = one.good("POST", "/v1/sandboxes/reconcile")
    assert (report["count"], report["applied"], report["drift"][0]["kind"], report["drift"][0]["applied"]) == (
        1,
        False,
        "stopped",
        False,
    )
    assert lab.record(1000).state == "RUNNING"
    assert one.good("POST", "/v1/sandboxes/reconcile", {"apply": True})["drift"][0]["applied"] is True
    assert lab.record(1000).state == "FAILED"


def test_fixed_sentences_are_answered_to_the_letter(daemon: Make, lab: Lab) -> None:
    lab.timed_out("a1")
    one = daemon()
    refused = one.post("/v1/sandboxes/1000/destroy", {"force": False})
    assert refused.status == 409
    assert (
        refused.body["error"]
        == "cannot destroy sandbox in TIMEOUT state. Valid states: STOPPED, DESTROYED. Use --force to bypass"
    )
    assert (refused.body["state"], refused.body["valid"]) == ("TIMEOUT", ["STOPPED", "DESTROYED"])
    renewal = one.post("/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 240})
    assert (renewal.status, renewal.body["error"]) == (
        409,
        "cannot renew lease in TIMEOUT state. Valid states: RUNNING",
    )
    assert one.good("POST", "/v1/sandboxes/1000/destroy", {"force": True})["previous_state"] == "TIMEOUT"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/v1/sandboxes/1999", None, 404, "sandbox not found"),
        ("POST", "/v1/sandboxes/1999/destroy", None, 404, "sandbox not found"),
        ("POST", "/v1/sandboxes/1999/lease/renew", {"ttl_minutes": 10}, 404, "sandbox not found"),
        ("GET", "/v1/sandboxes/1999/events", None, 404, "sandbox not found"),
        ("GET", "/v1/nothing", None, 404, "no such path: /v1/nothing"),
        # A word in the place of a VMID is a path that there is not, whatever the method.
        *[
            (
                method,
                f"/v1/sandboxes/{word}",
                None,
                404,
                f"no such path: /v1/sandboxes/{word}; GET /v1/openapi.json lists what there is",
            )
            for method, word in (
                ("GET", "abc"),
                ("POST", "abc"),
                ("DELETE", "nothing"),
                ("POST", "stop-everything"),
                ("GET", "1000x"),
                ("GET", "-1000"),
            )
        ],
        ("POST", "/v1/sandboxes/abc/stop", None, 404, "no such path: /v1/sandboxes/abc/stop"),
        ("POST", "/v1/sandboxes/1000/nothing", None, 404, "no such path: /v1/sandboxes/1000/nothing"),
        ("POST", "/v1/sandboxes/99/stop", None, 400, "vmid: '99' is not a VMID"),
        ("GET", f"/v1/sandboxes/{'0' * 9}101{'9' * 20}", None, 400, "vmid: '000000000101999"),
        ("GET", "/v1/sandboxes?state=RUNING", None, 400, "state: 'RUNING' is not valid. Valid: REQUESTED"),
        ("GET", "/v1/sandboxes?stat=RUNNING", None, 400, "stat: unknown query parameter. Valid: state"),
        ("POST", "/v1/sandboxes/1000/destroy", b"{", 400, "the body is not valid JSON"),
        ("POST", "/v1/sandboxes/1000/destroy", [1], 400, "the body must be a JSON object"),
        (
            "POST",
            "/v1/sandboxes/prune",
            b'{"dry_run": true, "dry_run": false}',
            400,
            "dry_run: is given twice. Give each key once",
        ),
        ("POST", "/v1/sandboxes/1000/destroy", b'{"force": {"a": 1, "a": 2}}', 400, "a: is given twice"),
        ("POST", "/v1/sandboxes/reconcile", {"apply": True, "dry_run": True}, 400, "dry_run: contradicts apply"),
        (
            "POST",
            "/v1/workspaces",
            {"name": "w1", "size": "1G", "size_gb": 1},
            400,
            "size_gb: give size or size_gb, not both",
        ),
        ("POST", "/v1/sandboxes/1000/destroy", {"forse": True}, 400, "forse: unknown key. Valid: force"),
        (
            "POST",
            "/v1/sandboxes/1000/destroy",
            {"force": "yes"},
            400,
            "force: 'yes' is not valid. Valid: true or false",
        ),
        ("POST", "/v1/sandboxes/1000/lease/renew", None, 400, "ttl_minutes is required"),
        ("POST", "/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 0}, 400, "ttl_minutes: '0' is not valid"),
        ("POST", "/v1/sandboxes/1000/lease/renew", {"ttl": "2x"}, 400, "ttl: '2x' is not a duration"),
        (
            "POST",
            "/v1/sandboxes/1000/lease/renew",
            {"ttl": "400d"},
            400,
            "ttl: '400d' is longer than the maximum of 30d",
        ),
        ("POST", "/v1/sandboxes/destroy", {"vmids": "1000"}, 400, "vmids: '1000' is not valid"),
        ("POST", "/v1/sandboxes/destroy", {}, 400, "vmids is required"),
        ("POST", "/v1/sandboxes", {"name": "-x"}, 400, "name: '-x' is not valid"),
        ("POST", "/v1/sandboxes", {"template": "none"}, 400, "template: 'none' does not exist"),
        ("POST", "/v1/sandboxes", {"template": 8999}, 400, "template: '8999' does not exist"),
        *[
            (
                "POST",
                "/v1/sandboxes",
                {"template": value},
                400,
                f"template: {shown} is not valid. Valid: a whole number, or a text in quotes",
            )
            for value, shown in ((True, "'True'"), (-1, "'-1'"), (9000.5, "'9000.5'"), ([9000], "that list"))
        ],
        ("POST", "/v1/sandboxes", {"node": 5}, 400, "node: '5' is not valid. Valid: a text in quotes, of 100"),
        *[
            ("POST", path, {name: value}, 400, f"{name}: that value is not valid. Valid: ")
            for path, name, value in (
                ("/v1/sandboxes", "node", "auto\n"),
                ("/v1/sandboxes", "name", "a1\n"),
                ("/v1/workspaces", "size", "5G\n"),
                ("/v1/sandboxes/1000/lease/renew", "ttl", "2h\n"),
            )
        ],
        ("POST", "/v1/sandboxes/prune", {"states": ["RUNNING"]}, 400, "states: 'RUNNING' is not valid. Valid: TIMEOUT"),
        *[
            (
                "POST",
                "/v1/sandboxes",
                {name: value},
                400,
                f"{name}: that value is not valid. Valid: a text that UTF-8 can hold",
            )
            for name, value in (
                ("ssh_public_keys", ["ssh-ed25519 AAAA \ud800"]),
                ("workspace", "\ud800"),
                ("cloud_init_user_data", "#cloud-config\n# \udfff\n"),
                ("name", "a\ud800"),
            )
        ],
        (
            "POST",
            "/v1/cleanup/freeze",
            {"reason": "\ud800"},
            400,
            "reason: that value is not valid. Valid: a text that UTF-8 can hold",
        ),
        ("DELETE", "/v1/sandboxes/1000", None, 405, "DELETE is not allowed for /v1/sandboxes/1000. Valid: GET"),
        ("GET", "/v1/sandboxes/prune", None, 405, "GET is not allowed for /v1/sandboxes/prune. Valid: POST"),
        ("POST", "/v1/sandboxes/1000/destroy", b" " * 2_000_000, 413, "the body is larger than 1048576 bytes"),
    ],
)
def test_what_is_refused(one_daemon: Daemon, method: str, path: str, body: Any, status: int, words: str) -> None:
    answer = one_daemon.request(method, path, body)
    assert answer.status == status and answer.body["error"].startswith(words), answer.body
    assert answer.body["code"]
    if status == 405:
        assert answer.headers["Allow"] in words


def test_a_body_that_is_not_what_its_encoding_says(one_daemon: Daemon) -> None:
    with contextlib.closing(UnixConnection(one_daemon.socket)) as connection:
        answer = ask(
            connection, "POST", "/v1/sandboxes/1000/stop", b"this is not compressed", {"Content-Encoding": "gzip"}
        )
    assert (answer.status, answer.body["code"]) == (400, "invalid_input") and answer.body["error"].startswith(
        "the body cannot be read"
    ), answer
    assert "Traceback" not in one_daemon.log()


def test_what_counts_as_a_failure(daemon: Make, lab: Lab) -> None:
    """A VMID that is taken is a refusal; what Proxmox could not do is a failure."""
    lab.pve.make_foreign(1234)
    lab.timed_out("over")
    lab.timed_out("over2")
    one = daemon(metrics_listen=f"127.0.0.1:{free_port()}")
    assert one.post("/v1/sandboxes", {"vmid": 1234}).status == 409
    lab.pve.fail("POST", "/clone", 500, "storage is full")
    assert one.post("/v1/sandboxes", {"name": "a1"}).status == 502
    found = {
        result: one.metric(f'agentlab_operations_total{{operation="create",result="{result}"}}')
        for result in ("ok", "kept", "failed")
    }
    assert found == {"ok": 0, "kept": 1, "failed": 1}
    # Nor is a limit that somebody gives an alarm.
    assert one.post("/v1/sandboxes/prune", {"max_count": 1}).status == 409
    assert (
        one.metric("agentlab_prune_guard_trips_total") == 0
        and one.metric('agentlab_prune_runs_total{result="guard"}') == 1
    )


def test_the_last_error_is_over_when_proxmox_answers_again(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")
    # A refusal is an answer.
    assert one.post("/v1/sandboxes", {"template": "none"}).status == 400
    lab.pve.fail("POST", "/clone", 400, "Parameter verification failed.")
    assert one.post("/v1/sandboxes", {"name": "a2"}).status >= 400
    assert one.good("GET", "/v1/status")["proxmox"]["last_error"] is None
    lab.pve.fail("GET", "/status/current", 595, "No route to host", times=9)
    assert one.post("/v1/sandboxes/1000/stop").status == 409
    assert "No route to host" in one.good("GET", "/v1/status")["proxmox"]["last_error"]
    lab.pve.clear_faults()
    one.good("POST", "/v1/sandboxes/1000/stop")
    found = one.good("GET", "/v1/status")["proxmox"]
    assert found["reachable"] and found["last_error"] is None


def test_proxmox_that_cannot_be_reached_is_503(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon(environment={"PROXMOX_PORT": "1"})
    answer = one.post("/v1/sandboxes/1000/stop")
    assert (answer.status, answer.body["code"]) == (503, "proxmox_unreachable") and int(
        answer.headers["Retry-After"]
    ) > 0
    assert "cannot be reached" in answer.body["error"]
    status = one.good("GET", "/v1/status")["proxmox"]
    assert status["reachable"] is False and "cannot be reached" in status["last_error"]
    # What the records alone answer is answered all the same.
    assert one.good("GET", "/v1/sandboxes/1000")["state"] == "RUNNING"


def test_a_workspace_lives_from_creation_to_absence_through_the_api(daemon: Make, lab: Lab) -> None:
    one = daemon()
    made = one.post("/v1/workspaces", {"name": "w1", "size": "2G", "storage": "local-lvm"})
    assert (made.status, made.body["state"], made.body["size"], made.body["outcome"]) == (
        201,
        "DETACHED",
        2 * 1024**3,
        "created",
    )
    again = one.post("/v1/workspaces", {"name": "w1", "size": "2G"})
    assert (again.status, again.body["outcome"], again.body["changed"]) == (200, "unchanged", False)
    first = one.post("/v1/sandboxes", {"name": "a1", "workspace_id": made.body["id"]}).body
    second = one.post("/v1/sandboxes", {"name": "a2"}).body
    assert first["workspace_id"] == made.body["id"]
    held = one.post("/v1/workspaces/w1/attach", {"vmid": second["vmid"]})
    assert (
        held.status == 409
        and held.body["code"] == "workspace"
        and f"is ATTACHED to sandbox {first['vmid']} (a1)" in held.body["error"]
    )
    assert one.post("/v1/sandboxes", {"name": "a3", "workspace": "w1"}).status == 409
    assert one.post(f"/v1/workspaces/{made.body['id']}/detach").body["outcome"] == "detached"
    there = one.post("/v1/workspaces/w1/attach", {"vmid": second["vmid"], "ttl": "30m"})
    assert there.status == 200 and (there.body["vmid"], there.body["sandbox"], there.body["state"]) == (
        second["vmid"],
        "a2",
        "ATTACHED",
    )
    assert one.post("/v1/workspaces", {"name": "w1", "size": "3G"}).body["outcome"] == "grown"
    assert one.post("/v1/workspaces/w1/destroy", {"force": True}).status == 409
    assert one.post(f"/v1/sandboxes/{second['vmid']}/destroy", {"force": True}).status == 200
    assert one.get("/v1/workspaces/w1").body["state"] == "DETACHED"
    refused = one.post("/v1/workspaces/w1/destroy")
    assert refused.status == 409 and refused.body["error"].endswith("would be lost. Use --force to delete it")
    assert refused.body["remedy"] == "delete_workspace"
    assert one.post("/v1/workspaces/w1/destroy", {"force": True}).body["outcome"] == "deleted"
    for path in ("/v1/workspaces/w1", "/v1/workspaces/nobody"):
        assert (one.get(path).status, one.get(path).body["error"]) == (404, "workspace not found")
    assert one.get("/v1/workspaces").body == {"workspaces": []}
    assert [found["state"] for found in one.get("/v1/workspaces?include_deleted=true").body["workspaces"]] == [
        "DELETED"
    ]
    assert one.post("/v1/workspaces", {"name": "w2", "size": "a lot"}).status == 400


def test_user_data_is_quoted_nowhere(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    secret = "correct-horse-made-up-for-tests-77"
    folder = tmp_path / "snippets"
    folder.mkdir()
    lab.pve.hold_snippets(str(folder))
    one = daemon(snippets_dir=str(folder))
    made = one.post(
        "/v1/sandboxes",
        {"name": "a1", "cloud_init_user_data": f"#cloud-config\npassword: {secret}\n", "wait_for_cloud_init": True},
    )
    assert made.status == 201 and len(list(folder.iterdir())) == 1
    for data in ([secret], secret * 20000, f"{secret}", f"#cloud-config\n- {secret}\n- ["):
        refused = one.post("/v1/sandboxes", {"name": "a2", "cloud_init_user_data": data})
        assert (
            refused.status == 400
            and secret not in str(refused.body)
            and "cloud_init_user_data" in refused.body["error"]
        )
    assert one.post(f"/v1/sandboxes/{made.body['vmid']}/destroy", {"force": True}).status == 200
    assert list(folder.iterdir()) == [] and secret not in one.log()


def test_what_clients_may_name_is_limited_by_the_configuration(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "own.yaml").write_text("template: 9000\npool: agents\n", encoding="utf-8")
    limits = {
        "api_vmid_range_only": True,
        "api_templates": ["other"],
        "api_pools": "spare, tests",
        "profiles_dir": str(tmp_path / "profiles"),
    }
    one = daemon(**limits)

    def refusal(body: dict[str, Any]) -> str:
        answer = one.post("/v1/sandboxes", body)
        assert answer.status == 400, answer.body
        plan = one.good("POST", "/v1/sandboxes/validate-plan", body)
        assert [issue["message"] for issue in plan["errors"]] == [answer.body["error"]]
        return str(answer.body["error"])

    assert (
        refusal({"vmid": 5000})
        == "vmid: 5000 is outside the range that clients may use (api_vmid_range_only). Valid: 1000 to 1999, or leave "
        "it out"
    )
    assert refusal({"pool": "agents"}) == "pool: 'agents' is not for clients (api_pools). Valid: spare, tests"
    for template in ("debian-13", "9000"):
        assert (
            refusal({"template": template})
            == f"template: '{template}' is not for clients (api_templates). Valid: other"
        )
    assert lab.ours() == {}
    # What the operator has set is the operator's.
    assert one.good("POST", "/v1/sandboxes", {"name": "a1", "vmid": 1500}, 201)["vmid"] == 1500
    # A template may be listed by its VMID and asked for by its name.
    named = daemon(api_templates=[9000])
    assert named.post("/v1/sandboxes", {"name": "a2", "template": "debian-13"}).status == 201
    assert named.post("/v1/sandboxes", {"name": "a4", "template": 9000}).status == 201
    # Without limits nothing is limited.
    assert daemon().post("/v1/sandboxes", {"name": "a3", "vmid": 5000, "template": "9000"}).status == 201
