# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor finds what is broken on purpose, says what to do, writes nothing, and its bundle holds no secret."""

from __future__ import annotations

import http.server
import json
import os
import re
import socketserver
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, version
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import cluster, doctor, findings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput

from support import pages
from support.double import TOKEN_ID, TOKEN_SECRET
from support.lab import Lab
from support.story import written

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


def examine(lab: Lab, *, bundle: bool | None = None, template: str | None = None, **options: Any) -> Any:
    """The findings by check (those that are not ok first), or the bundle: with hosts (True) or without."""
    found = config.load({**lab.options, "database": lab.database, **options}, lab.server.environment(lab.folder))
    one = doctor.Doctor(found, now=lab.clock)
    try:
        report = one.examine(doctor.Scope(template=template))
        if bundle is not None:
            return doctor.bundle(one, report, hosts=bundle)
    finally:
        one.close()
    assert all(finding.advice for finding in report.findings if finding.status != "ok"), "a finding without advice"
    by_check: dict[str, Any] = {}
    for finding in sorted(report.findings, key=lambda each: findings.STATUSES.index(each.status)):
        by_check.setdefault(finding.check, finding)
    by_check["report"] = report
    return by_check


def test_what_cannot_be_read_is_unknown_and_no_problem(lab: Lab, tmp_path: Path) -> None:
    lab.pve.fault("GET", "/qemu/9000/config", "answer", status=595, body="", times=9)
    file = tmp_path / "config.yaml"
    file.write_text(f"api_token_secret: {TOKEN_SECRET}\n", encoding="utf-8")
    file.chmod(0o600)
    found = config.load(
        {**lab.options, "config_file": str(file), "database": lab.database}, lab.server.environment(lab.folder)
    )
    file.unlink()
    one = doctor.Doctor(found, now=lab.clock)
    try:
        findings = one.examine().findings
    finally:
        one.close()
    unread = [(each.check, each.status) for each in findings if "could not be looked at" in each.meaning]
    assert unread == [("configuration", "unknown"), ("template", "unknown")]


def test_all_is_well(lab: Lab) -> None:
    lab.create()
    access = lab.pve.use_access()
    access.users, access.tokens = {"root@pam"}, {}
    for command in pages.commands(ROOT / "README.md"):
        if command.startswith("pveum"):
            access.pveum(
                lab.pve,
                command.replace("agentlab@pve ansible", "agentlab@pve tests") if "token" in command else command,
            )
    before = written(lab.database)
    lab.pve.requests.clear()
    found = examine(lab, pool="agentlab")
    assert found["report"].status == "ok", [one for one in found["report"].findings if one.status != "ok"]
    assert set(found) - {"report"} == {
        "versions",
        "configuration",
        "database",
        "work",
        "proxmox",
        "cluster",
        "quorum",
        "template",
        "storage",
        "creation",
        "privileges",
        "commands",
        "vmid_range",
        "clock",
        "daemon",
    }
    assert written(lab.database) == before and all(method == "GET" for method, _path, _body in lab.pve.requests)
    assert len(lab.pve.requests) < 25


@pytest.mark.parametrize(
    ("setting", "status", "words"),
    [
        ({"agent": "0"}, "warning", "guest agent switched off"),
        ({"ide2": "none,media=cdrom"}, "warning", "no cloud-init drive"),
        ({"onboot": 1}, "warning", "start with the node"),
        ({"scsi0": "local:9000/base-9000-disk-0.raw,size=3G"}, "warning", "no linked clones"),
        ({"scsi0": "elsewhere:base-9000-disk-0,size=3G"}, "unknown", "cannot be seen"),
    ],
)
def test_a_template_that_is_not_fit(lab: Lab, setting: dict[str, Any], status: str, words: str) -> None:
    assert examine(lab)["template"].status == "ok"
    lab.pve.vm(9000).config.update(setting)
    found = examine(lab)["template"]
    assert found.status == status and words in found.meaning, found


def test_templates_that_are_none(lab: Lab) -> None:
    assert examine(lab, template="nowhere")["template"].status == "problem"
    assert "is not a template" in examine(lab, template="500")["template"].meaning
    lab.options.pop("template")
    assert examine(lab)["template"].status == "unknown"


def test_missing_privileges_are_told_by_path_with_the_commands(lab: Lab) -> None:
    lab.pve.grant_least(TOKEN_ID)
    lab.pve.revoke(TOKEN_ID, "/storage/local-lvm")
    found = examine(lab)
    assert found["privileges"].status == "problem"
    assert found["privileges"].facts["missing"] == {
        "/": ["VM.Audit", "Sys.Audit"],
        "/storage/local-lvm": ["Datastore.AllocateSpace"],
    }
    assert "pveum acl modify /storage/local-lvm --users agentlab@pve --roles AgentlabDisk" in found["report"].pveum
    lab.calm()
    too_many = examine(lab)["privileges"]
    assert too_many.status == "warning" and "Permissions.Modify" in too_many.meaning


def test_the_commands_fit_the_release_and_the_readme() -> None:
    found = config.load({"pool": "agentlab"}, {"AGENTLAB_CONFIG": "/nonexistent"})
    commands = doctor.pveum_commands(found, template=9000, storage="local-lvm")
    assert [f"# {line}" for line in commands] == [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("# pveum")
    ]
    assert "VM.Monitor" in doctor.pveum_commands(found, template=9000, storage="x", release="8.4.1")[2]
    for name in {name for names in doctor.needs(found, template=1, storage="x").values() for name in names}:
        assert name.removeprefix("VM.Config") in (ROOT / "docs/safety.md").read_text(), name


def test_ranges_that_overlap(lab: Lab) -> None:
    lab.create()
    assert examine(lab)["vmid_range"].status == "ok"
    lab.pve.add_guest(1500, "theirs")
    found = examine(lab)["vmid_range"]
    assert found.status == "warning" and found.facts["foreign"] == [1500] and "1500" in found.meaning
    # Another database that works in our range: its VM carries the marker.
    lab.pve.vm(1500).config["description"] = lab.pve.vm(1000).config["description"]
    found = examine(lab)["vmid_range"]
    assert found.facts["marked"] == [1500] and "another database" in found.meaning
    assert examine(lab, vmid_range="500-500")["vmid_range"].status == "problem"
    assert lab.pve.touched(1500) == []


def test_next_id_of_the_datacenter() -> None:
    assert (
        cluster._next_id("lower=1500,upper=5000") == cluster._next_id({"lower": "1500", "upper": 5000}) == (1500, 5000)
    )
    assert cluster._next_id("lower=5") == (5, 1000000)
    assert cluster._next_id(None) is None and cluster._next_id("lower=x") is None and cluster._next_id(3) is None


@pytest.mark.parametrize(("offset", "status"), [(0, "ok"), (20, "warning"), (-20, "warning"), (4000, "problem")])
def test_clocks_that_differ(lab: Lab, offset: int, status: str) -> None:
    lab.pve.clock_offset = offset
    assert examine(lab)["clock"].status == status


def test_quorum_and_nodes(lab: Lab) -> None:
    lab.pve.add_node("pve2", online=False)
    assert examine(lab)["quorum"].status == "warning" and "pve2" in examine(lab)["quorum"].meaning
    lab.pve.lose_quorum()
    assert examine(lab)["quorum"].status == "problem" and "no quorum" in examine(lab)["quorum"].meaning


def test_proxmox_that_cannot_be_asked(lab: Lab) -> None:
    found = examine(lab, api_port=1)
    assert found["proxmox"].status == "problem" and "Connection refused" in found["proxmox"].meaning
    assert found["privileges"].status == found["clock"].status == "unknown" and found["database"].status == "ok"
    lab.pve.fail("GET", "/version", 401, "expired")
    assert "refuses the credentials" in examine(lab)["proxmox"].meaning


def test_another_cluster(lab: Lab) -> None:
    lab.create()
    lab.pve.ca_fingerprint = "AA:BB"
    assert examine(lab)["cluster"].status == "problem" and "not the cluster" in examine(lab)["cluster"].meaning


def test_a_database_that_is_not_well(lab: Lab) -> None:
    lab.create()
    lab.close_contexts()
    os.chmod(lab.database, 0o640)
    assert examine(lab)["database"].status == "warning" and "0640" in examine(lab)["database"].meaning
    assert examine(lab, database_group_access=True)["database"].status == "ok"
    os.chmod(lab.database, 0o600)
    with sqlite3.connect(lab.database) as conn:
        conn.execute("PRAGMA user_version = 99")
    conn.close()
    found = examine(lab)
    assert (
        found["database"].status == "problem"
        and "newer" in found["database"].meaning
        and found["quorum"].status == "ok"
    )
    damaged = Path(lab.folder, "damaged.db")
    damaged.write_bytes(b"no database at all" * 500)
    assert examine(lab, database=str(damaged))["database"].status == "problem"
    assert damaged.read_bytes() == b"no database at all" * 500
    missing = Path(lab.folder, "no", "such.db")
    assert examine(lab, database=str(missing))["database"].status == "ok" and not missing.parent.exists()


def test_a_page_that_was_overwritten_is_found(lab: Lab) -> None:
    made = lab.create()
    ctx = lab.context()
    for _number in range(300):
        ctx.database.write(
            lambda conn: (
                conn.execute(
                    "INSERT INTO events (at, sandbox_uuid, vmid, operation, actor, outcome) VALUES (1, ?, 1000, 'x', ?,"
                    " 'ok')",
                    (made.uuid, "y" * 200),
                )
                and None
            )
        )
    ctx.database.write(lambda conn: conn.execute("DELETE FROM claims") and None)
    lab.close_contexts()
    with sqlite3.connect(lab.database) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events_vmid'").fetchone()[0]
        size = conn.execute("PRAGMA page_size").fetchone()[0]
    conn.close()
    with open(lab.database, "r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    found = examine(lab)["database"]
    assert found.status == "problem" and ("damaged" in found.meaning or "malformed" in found.meaning), found


def test_work_left_over(lab: Lab) -> None:
    made = lab.create()
    lab.force_state(made.vmid, "RUNNING", lease_expires_at=1)
    found = examine(lab)["work"]
    assert found.status == "warning" and found.facts["overdue"] == [1000] and "agentlab_reconcile" in found.advice


def test_secrets_that_everybody_may_read(lab: Lab) -> None:
    path = Path(lab.folder, "config.yaml")
    path.write_text(f"api_token_secret: {TOKEN_SECRET}\n")
    path.chmod(0o644)
    found = examine(lab)["configuration"]
    assert found.status == "problem" and "0644" in found.meaning and TOKEN_SECRET not in str(found)
    path.chmod(0o600)
    assert examine(lab)["configuration"].status == "ok"
    assert examine(lab, validate_certs=False)["configuration"].status == "warning"


# ---- the daemon ----


class _Daemon(socketserver.ThreadingUnixStreamServer):
    """Answers /v1/status as the daemon does."""

    daemon_threads = True

    def __init__(self, path: str, answer: Any, status: int = 200) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_dummy: Any) -> None:
                pass

        super().__init__(path, Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"version": version.__version__}, "ok", "answers"),
        ({"version": "0.9"}, "warning", "it is version 0.9"),
        (
            {
                "version": version.__version__,
                "cleanup": {"frozen": {"reason": "60 at once", "at": "2026-01-30T02:45:00Z"}},
            },
            "warning",
            "60 at once",
        ),
        ({"version": version.__version__, "expiry": {"last_error": "no quorum"}}, "warning", "expiry: no quorum"),
        (["nonsense"], "problem", "does not answer"),
    ],
)
def test_the_daemon(lab: Lab, tmp_path: Path, answer: Any, status: str, words: str) -> None:
    # Short on purpose: a socket's path may not be long.
    path = f"/tmp/agentlab-{os.getpid()}.sock"
    Path(path).unlink(missing_ok=True)
    server = _Daemon(path, answer)
    try:
        found = examine(lab, api_port=1, socket=path)["daemon"]
        assert found.status == status and words in found.meaning, found
    finally:
        server.shutdown()
        server.server_close()
    assert examine(lab, api_port=1, socket=path)["daemon"].status == "problem"
    Path(path).unlink()
    assert examine(lab, api_port=1, socket=path)["daemon"].status == "ok"


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Any]:
    """A function that lets a daemon answer /v1/status; it returns the socket's path."""
    servers: list[_Daemon] = []

    def start(answer: Any) -> str:
        path = f"/tmp/agentlab-{os.getpid()}-{len(servers)}.sock"
        Path(path).unlink(missing_ok=True)
        servers.append(_Daemon(path, {"version": version.__version__, **answer}))
        return path

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
        Path(str(server.server_address)).unlink(missing_ok=True)


def _condition(part: str, kind: str) -> dict[str, Any]:
    return {
        "part": part,
        "condition": kind,
        "since": "2026-01-30T02:45:00Z",
        "why": f"this is why the {part} does so",
        "todo": f"do something about the {part}",
    }


@pytest.mark.parametrize(
    ("part", "kind", "status"),
    [
        ("clock", "rests", "warning"),
        ("records", "waits", "warning"),
        ("token", "fails", "problem"),
        ("unrecorded", "fails", "problem"),
    ],
)
def test_a_condition_of_the_daemon_is_a_finding(lab: Lab, answering: Any, part: str, kind: str, status: str) -> None:
    path = answering({"conditions": [_condition("expiry", "rests"), _condition(part, kind)]})
    findings = [each for each in examine(lab, api_port=1, socket=path)["report"].findings if each.check == "daemon"]
    assert [(each.status, each.advice) for each in findings] == [
        ("warning", "do something about the expiry"),
        (status, f"do something about the {part}"),
    ]
    assert f"{part} {kind} since 2026-01-30T02:45:00Z: this is why the {part} does so" in findings[1].meaning


def test_a_daemon_whose_conditions_are_odd_is_read_all_the_same(lab: Lab, answering: Any) -> None:
    path = answering({"conditions": ["x", {"part": ["y"]}, 5], "database": "none"})
    found = examine(lab, api_port=1, socket=path)["daemon"]
    assert found.status == "warning" and found.advice == "unknown"
    assert examine(lab, api_port=1, socket=answering({"conditions": "none"}))["daemon"].status == "ok"


def test_records_that_the_daemon_has_lost_are_a_problem(lab: Lab, answering: Any) -> None:
    path = answering({"database": {"path": lab.database}, "conditions": []})
    assert not os.path.exists(lab.database)
    found = examine(lab, api_port=1, socket=path)["database"]
    assert found.status == "problem" and "agentlabd runs with it: it was deleted or moved" in found.meaning, found
    assert "systemctl stop agentlabd" in found.advice and not os.path.exists(lab.database)
    elsewhere = answering({"database": {"path": "/var/lib/other.db"}, "conditions": []})
    assert examine(lab, api_port=1, socket=elsewhere)["database"].status == "ok"


def test_records_that_were_replaced_under_the_daemon_are_a_problem(lab: Lab, answering: Any) -> None:
    lab.create()
    assert examine(lab, api_port=1)["database"].status == "ok"
    path = answering({"database": {"path": lab.database}, "conditions": [_condition("records", "fails")]})
    found = examine(lab, api_port=1, socket=path)["database"]
    assert found.status == "problem" and "why the records does so" in found.meaning
    waiting = answering({"database": {"path": lab.database}, "conditions": [_condition("records", "waits")]})
    assert examine(lab, api_port=1, socket=waiting)["database"].status == "ok"


def test_records_that_were_there_before_are_missed(lab: Lab) -> None:
    lab.create()
    lab.close_contexts()
    note = Path(lab.database).with_name(f".{Path(lab.database).name}.latest")
    assert note.exists()
    Path(lab.database).unlink()
    found = examine(lab, api_port=1)["database"]
    assert found.status == "problem" and "was there before" in found.meaning and f"rm {note}" in found.advice, found
    note.unlink()
    assert examine(lab, api_port=1)["database"].status == "ok"


def test_records_behind_a_dangling_link(lab: Lab, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "nowhere" / "agentlab.db")
    found = examine(lab, api_port=1, database=str(link))["database"]
    assert found.status == "problem" and "which does not exist; mount or create" in found.meaning, found


# ---- the bundle ----


def test_the_bundle_holds_no_secret_and_no_host(lab: Lab) -> None:
    made = lab.create(name="customer-host")
    lab.pve.add_guest(1700, "payroll-db")
    # A secret in places where none belongs: an actor and a reason.
    ctx = lab.context(actor=f"mallory {TOKEN_SECRET} at 192.0.2.77 and fe80::1:2")
    ctx.records.amend(made, "update", protected=True)
    found = examine(lab, bundle=False, api_password="a-made-up-password-12345")
    text = json.dumps(found)
    for hidden in (
        TOKEN_SECRET,
        "a-made-up-password-12345",
        "customer-host",
        "payroll-db",
        "pve1",
        "192.0.2.77",
        "fe80::1:2",
    ):
        assert hidden not in text, hidden
    assert (
        "(secret)" in text
        and "(sandbox 1000)" in text
        and "(address)" in text
        and "(node 1)" in text
        and "127.0.0.1" in text
    )
    assert found["events"] and found["findings"] and found["configuration"]["vmid_range"] == [1000, 1999]
    with_hosts = json.dumps(examine(lab, bundle=True, api_password="a-made-up-password-12345"))
    assert "customer-host" in with_hosts and "pve1" in with_hosts
    assert TOKEN_SECRET not in with_hosts and "a-made-up-password-12345" not in with_hosts


def test_the_bundle_is_private_and_follows_no_link(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        victim, link = tmp_path / "victim", tmp_path / "bundle.json"
        victim.write_text("mine")
        link.symlink_to(victim)
        doctor.write_bundle(str(link), {"a": 1})
    finally:
        os.umask(before)
    assert victim.read_text() == "mine" and not link.is_symlink() and json.loads(link.read_text()) == {"a": 1}
    assert stat.S_IMODE(link.stat().st_mode) == 0o600 and sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle.json",
        "victim",
    ]
    with pytest.raises(InvalidInput, match="bundle: /nonexistent/x: No such file"):
        doctor.write_bundle("/nonexistent/x", {})


def test_the_version_is_that_of_the_collection() -> None:
    assert yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"] == version.__version__
    for path in (ROOT / "roles/agentlabd/files").glob("*/__init__.py"):
        for found in re.findall(r'^__version__ = "(.+)"', path.read_text(), re.M):
            assert found == version.__version__, path


# ---- what makes every creation fail ----


def not_well(lab: Lab, check: str, **options: Any) -> list[tuple[str, str]]:
    """Status and meaning of the findings of one check that are not ok."""
    report = examine(lab, **options)["report"]
    return [(one.status, one.meaning) for one in report.findings if one.check == check and one.status != "ok"]


def test_a_template_with_protection_is_no_finding(lab: Lab) -> None:
    """The creation takes the copied protection off, and such a sandbox is destroyed."""
    lab.pve.vm(9000).config["protection"] = 1
    assert examine(lab)["template"].status == "ok"
    made = lab.create()
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


def test_a_node_that_cannot_be_used(lab: Lab) -> None:
    lab.pve.add_node("pve2", online=False)
    ((status, meaning),) = not_well(lab, "creation", node="PVE1")
    assert status == "problem" and "'PVE1' is not a node of this cluster" in meaning and "pve1, pve2" in meaning
    ((status, meaning),) = not_well(lab, "creation", node="pve2")
    assert status == "problem" and "offline" in meaning
    assert not_well(lab, "creation", node="pve1") == []


def test_a_pool_that_does_not_exist(lab: Lab) -> None:
    ((status, meaning),) = not_well(lab, "creation", pool="nowhere")
    assert status == "problem" and "'nowhere' does not exist" in meaning
    assert "pveum pool add nowhere" in examine(lab, pool="nowhere")["report"].pveum
    lab.pve.pools["nowhere"] = set()
    lab.pve.pool_info["nowhere"] = {"comment": None, "storage": set()}
    assert not_well(lab, "creation", pool="nowhere") == []


def test_a_template_whose_snippet_is_missing(lab: Lab, tmp_path: Path) -> None:
    lab.pve.vm(9000).config["cicustom"] = "user=local:snippets/nope.yaml,network=local:snippets/there.yaml"
    assert [meaning for _status, meaning in not_well(lab, "template")] == [
        f"template 9000 (debian-13) names the snippet local:snippets/{name}.yaml (cicustom), but storage local holds no"
        " snippets: no sandbox starts"
        for name in ("nope", "there")
    ]
    (tmp_path / "there.yaml").write_text("#cloud-config")
    lab.pve.hold_snippets(str(tmp_path))
    ((status, meaning),) = not_well(lab, "template")
    assert status == "problem" and "local:snippets/nope.yaml" in meaning and "not there" in meaning
    (tmp_path / "nope.yaml").write_text("#cloud-config")
    assert not_well(lab, "template") == []


def test_a_snippet_that_these_credentials_cannot_see_is_not_called_missing(lab: Lab) -> None:
    lab.pve.vm(9000).config["cicustom"] = "user=local:snippets/nope.yaml"
    lab.pve.storages["local"]["content"] = "iso,vztmpl,backup,snippets"
    lab.pve.grant_least(TOKEN_ID)
    lab.pve.grant(TOKEN_ID, "/storage/local", "Datastore.Audit")
    ((status, meaning),) = not_well(lab, "template")
    assert status == "unknown" and "may not see" in meaning


@pytest.mark.parametrize("storage", ["elsewhere", "local-lvm"])
def test_a_storage_for_snippets_that_takes_none(lab: Lab, storage: str) -> None:
    ((status, meaning),) = not_well(lab, "creation", snippets_storage=storage)
    assert status == "problem" and f"'{storage}'" in meaning and "cloud_init_user_data is refused" in meaning


def test_the_default_storage_without_snippets_is_a_problem_where_user_data_is_used(lab: Lab) -> None:
    assert examine(lab)["creation"].status == "ok" and "holds no snippets" in examine(lab)["creation"].meaning
    made = lab.create()
    lab.force_state(made.vmid, "RUNNING", snippet="/nonexistent/agentlab.yaml")
    ((status, meaning),) = not_well(lab, "creation")
    assert status == "problem" and "pvesm set local --content" in meaning


@pytest.mark.parametrize("line", ["node: PVE1", "pool: nowhere"])
def test_names_that_only_a_profile_gives_are_looked_at(lab: Lab, tmp_path: Path, line: str) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "agent.yaml").write_text(f"name: agent\n{line}\n")
    ((status, meaning),) = not_well(lab, "creation", profiles_dir=str(tmp_path / "profiles"))
    assert status == "problem" and f"{line.partition(':')[0]} of profile agent: " in meaning


def test_a_storage_that_holds_no_disk_images(lab: Lab) -> None:
    ((status, meaning),) = not_well(lab, "storage", storage="local")
    assert status == "problem" and "holds no disk images" in meaning


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"allowed-tags": [], "user-tag-access": {"user-allow": "none"}}, ["agentlab", "web"]),
        ({"allowed-tags": ["agentlab"], "user-tag-access": {"user-allow": "list"}}, ["web"]),
        ({"allowed-tags": ["agentlab", "web"], "user-tag-access": "user-allow=list"}, []),
        ({"allowed-tags": [], "user-tag-access": {"user-allow": "existing"}}, ["agentlab", "web"]),
        ({"allowed-tags": [], "registered-tags": ["agentlab"]}, ["agentlab"]),
        ({"allowed-tags": ["other"], "registered-tags": "other;reserved"}, []),
        ({"allowed-tags": []}, []),
    ],
)
def test_tags_that_the_cluster_refuses(lab: Lab, tmp_path: Path, options: dict[str, Any], refused: list[str]) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "p.yaml").write_text("name: p\ntags: [web]\n")
    access = lab.pve.use_access()
    access.roles["All"] = {*access.roles["Administrator"]} - {"Sys.Modify", "Permissions.Modify"}
    access.pveum(lab.pve, "pveum acl modify / --users agentlab@pve --tokens agentlab@pve!tests --roles All")
    lab.pve.fault("GET", "/cluster/options", "answer", status=200, body=json.dumps({"data": options}), times=9)
    findings = not_well(lab, "creation", profiles_dir=str(tmp_path / "profiles"))
    assert [status for status, _meaning in findings] == (["warning"] if refused else [])
    assert not refused or f"refuses the tags {', '.join(refused)} to whoever" in findings[0][1]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        # Proxmox VE takes no empty list of registered tags.
        ({"allowed-tags": [], "registered-tags": ["agentlab"]}, "--delete registered-tags"),
        ({"allowed-tags": ["other"], "registered-tags": "agentlab;other"}, "--registered-tags 'other'"),
        (
            {"allowed-tags": [], "registered-tags": ["agentlab"], "user-tag-access": {"user-allow": "none"}},
            "--user-tag-access 'user-allow=list,user-allow-list=agentlab' --delete registered-tags",
        ),
    ],
)
def test_the_command_that_allows_refused_tags(lab: Lab, options: dict[str, Any], command: str) -> None:
    lab.pve.fault("GET", "/cluster/options", "answer", status=200, body=json.dumps({"data": options}), times=9)
    assert examine(lab)["creation"].advice == f"pvesh set /cluster/options {command}, as root on a node"


def test_what_these_credentials_cannot_see_is_not_called_fit(lab: Lab) -> None:
    """A token without any privilege sees no node and no VM."""
    assert examine(lab)["vmid_range"].meaning.endswith("are free, and no other VM is in it")
    lab.pve.grant(TOKEN_ID, "/nowhere", "Pool.Audit")
    found = examine(lab)
    assert found["creation"].status == "unknown" and "nodes could not be read" in found["creation"].meaning
    assert "as far as these credentials see" in found["vmid_range"].meaning
    assert found["template"].meaning == (
        "template: 'debian-13' does not exist. Templates: none that these credentials may see"
    )


def test_nodes_that_may_not_be_read_are_not_called_offline(lab: Lab) -> None:
    lab.pve.fail("GET", "/cluster/status", 403, "Permission check failed (/, Sys.Audit)", times=9)
    found = examine(lab)
    assert found["clock"].status == "unknown" and "could not be read" in found["clock"].meaning
    lab.options.pop("template")
    lab.pve.fail("GET", "/cluster/status", 403, "Permission check failed (/, Sys.Audit)", times=9)
    assert examine(lab)["storage"].status == "unknown"


def test_a_mode_that_is_too_wide_does_not_hide_a_folder_that_cannot_be_written(lab: Lab, monkeypatch: Any) -> None:
    lab.create()
    lab.close_contexts()
    os.chmod(lab.database, 0o640)
    folder = str(Path(lab.database).parent)
    # Root may write everywhere, so the kernel's answer for this folder is changed.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if path == folder else real(path, mode))
    found = not_well(lab, "database")
    assert [status for status, _meaning in found] == ["warning", "problem"]
    assert "0640" in found[0][1] and f"{folder} cannot be written" in found[1][1]


def test_commands_need_a_privilege_and_an_agent_that_allows_them(lab: Lab) -> None:
    sandbox = lab.create()
    assert examine(lab)["commands"].status == "ok" and "allows what is needed" in examine(lab)["commands"].meaning
    lab.pve.machine(sandbox.vmid).blocked.add("guest-exec")
    blocked = examine(lab)["commands"]
    assert blocked.status == "warning" and "blocks guest-exec" in blocked.meaning
    lab.pve.machine(sandbox.vmid).blocked.clear()
    lab.pve.machine(sandbox.vmid).freeze(30)
    assert examine(lab)["commands"].status == "warning"
    lab.pve.close_machines()
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit", "VM.Audit", "VM.GuestAgent.Audit")
    unused = examine(lab)["commands"]
    assert unused.status == "ok" and "lacks VM.GuestAgent.Unrestricted on /vms" in unused.meaning
    lab.pve.acl = None
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command

    command.run_command(lab.context(), sandbox, command.CommandSpec(argv=["true"]))
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit", "VM.Audit", "VM.GuestAgent.Audit")
    assert examine(lab)["commands"].status == "problem"


def test_the_load_of_each_node_and_why_nothing_fits(lab: Lab) -> None:
    assert "placement" not in examine(lab)
    lab.pve.nodes["pve2"] = {"online": True}
    lab.pve.add_template(9002, lab.pve.vm(9000).name, node="pve2")
    gib = 1024**3
    lab.pve.node_figures = {name: {"maxmem": 64 * gib, "mem": 32 * gib, "maxcpu": 16} for name in ("pve1", "pve2")}
    found = examine(lab, node="auto")
    assert found["placement"].status == "ok" and "pve2: 0 sandboxes, 32768 MiB free" in found["placement"].meaning
    assert found["creation"].status != "problem" and found["template"].status != "problem"
    lab.pve.node_figures = {name: {"maxmem": 64 * gib, "mem": 63 * gib, "maxcpu": 16} for name in ("pve1", "pve2")}
    full = examine(lab)["placement"]
    assert full.status == "problem" and "pve1: 1024 MiB of its memory are free" in full.meaning
    figures = ("maxmem", "mem", "maxcpu", "cpu", "maxdisk", "disk", "uptime")
    lab.pve._node_row = lambda row, _user: {key: value for key, value in row.items() if key not in figures}
    bare = examine(lab)["placement"]
    assert bare.status == "warning" and "Sys.Audit on /nodes" in str(bare.advice)
