# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor through the daemon: the same findings as the module's, for whoever may use the socket, and no secret in
any of it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from support.cli import agentlab
from support.daemon import Make
from support.double import TOKEN_ID, TOKEN_SECRET
from support.lab import Lab

CHECKS = [
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
]


def finding(report: Any, check: str) -> Any:
    return next(one for one in report["findings"] if one["check"] == check)


def test_it_looks_at_everything_and_changes_nothing(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    lab.pve.requests.clear()
    events = lab.events(made)
    report = one.good("GET", "/v1/doctor")
    assert set(report) == {"status", "problems", "findings", "pveum", "bundle"} and report["bundle"] is None
    assert {found["check"] for found in report["findings"]} == set(CHECKS)
    assert finding(report, "daemon")["status"] == "ok", "it answers itself while it examines"
    assert finding(report, "template")["status"] == "ok" and report["problems"] == 0
    assert [request for request in lab.pve.requests if request[0] != "GET"] == [] and lab.events(made) == events
    other = one.good("GET", "/v1/doctor?template=none")
    assert finding(other, "template")["status"] == "problem" and other["status"] == "problem"


def test_no_secret_is_in_report_or_bundle(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    # Proxmox quotes it, as an error of the cluster might.
    quoted = json.dumps({"data": None, "errors": {"token": f"{TOKEN_ID}={TOKEN_SECRET} is odd"}})
    lab.pve.fault("GET", r"/cluster/resources", "answer", status=400, body=quoted, times=50)
    one = daemon()
    for query in ("", "?bundle=true", "?bundle=true&bundle_hosts=true"):
        report = one.good("GET", f"/v1/doctor{query}")
        assert "=(secret) is odd" in str(report["findings"]), "the error is told"
        assert TOKEN_SECRET not in json.dumps(report), query
    assert TOKEN_SECRET not in one.log()
    lab.pve.faults.clear()
    report = one.good("GET", "/v1/doctor?bundle=true")
    bundle = report["bundle"]
    assert not {"api_password", "api_token_secret"} & set(bundle["configuration"])
    assert bundle["sandboxes"][0]["name"] == "(sandbox 1000)" and "pve1" not in json.dumps(bundle)
    assert "pve1" in json.dumps(one.good("GET", "/v1/doctor?bundle=true&bundle_hosts=true")["bundle"])


def test_a_proxmox_that_cannot_be_reached_is_a_finding(daemon: Make, lab: Lab) -> None:
    one = daemon(environment={"PROXMOX_PORT": "1"})
    report = one.good("GET", "/v1/doctor")
    assert finding(report, "proxmox")["status"] == "problem" and finding(report, "clock")["status"] == "unknown"


def test_the_command_tells_it_and_writes_the_bundle(daemon: Make, lab: Lab, tmp_path: Path) -> None:
    lab.create("a1")
    one = daemon()
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    found = agentlab("doctor", socket=one.socket)
    assert found.returncode == 0 and found.stderr == "", found
    told = [line.split()[1] for line in found.stdout.splitlines() if line.startswith(("ok ", "warning ", "unknown "))]
    assert list(dict.fromkeys(told)) == CHECKS
    # A link that somebody laid in the way is not followed.
    bundle, victim = tmp_path / "bundle.json", tmp_path / "victim"
    victim.write_text("precious")
    bundle.symlink_to(victim)
    found = agentlab("doctor", "--bundle", bundle, socket=one.socket)
    assert found.returncode == 0 and f"bundle written to {bundle}" in found.stderr
    assert victim.read_text() == "precious" and not bundle.is_symlink()
    assert stat.S_IMODE(os.stat(bundle).st_mode) == 0o600
    content = json.loads(bundle.read_text())
    assert content["sandboxes"][0]["vmid"] == 1000 and TOKEN_SECRET not in bundle.read_text()
    assert sorted(tmp_path.glob("bundle*")) == [bundle]
    bad = agentlab("doctor", "--template", "none", socket=one.socket)
    assert bad.returncode == 1 and "problem  template" in bad.stdout and "  -> " in bad.stdout, bad
    data = json.loads(agentlab("doctor", "--json", socket=one.socket).stdout)
    assert data["problems"] == 0 and data["bundle"] is None
