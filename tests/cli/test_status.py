# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The commands for the whole daemon: status, doctor, cleanup, profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.cli import StandIn, agentlab

STATUS = {
    "version": "1.0.0",
    "started_at": "2026-01-30T00:00:00Z",
    "uptime_seconds": 93784,
    "database": {
        "path": "/var/lib/agentlab/agentlab.db",
        "schema": 2,
        "by_state": {"RUNNING": 3, "TIMEOUT": 1, "STOPPED": 0},
    },
    "proxmox": {"where": "https://pve1:8006", "reachable": True, "last_error": None, "requests": 10},
    "expiry": {"last_run": "2026-01-31T02:03:00Z", "next_run": "2026-01-31T02:04:00Z", "last_error": None},
    "reconcile": {"last_run": None, "next_run": "2026-01-31T02:15:00Z", "last_error": None},
    "cleanup": {
        "enabled": True,
        "mode": "enforce",
        "last_run": "2026-01-31T02:00:00Z",
        "next_run": "2026-01-31T02:15:00Z",
        "last_result": {"result": "shadow", "count": 3, "kept": 2, "failed": 0},
        "frozen": None,
    },
    "operations": {"in_progress": 1, "interrupted": 0},
    "config": {"path": "/etc/agentlab/config.yaml", "loaded_at": "2026-01-30T00:00:00Z", "error": None},
}


def test_status_shows_daemon_proxmox_jobs_and_configuration(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/status"] = (200, STATUS)
    found = agentlab("status", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "agentlabd 1.0.0, up 1d2h (since 2026-01-30T00:00:00Z)" in found.stdout
    assert "RUNNING=3, TIMEOUT=1\n" in found.stdout
    assert "https://pve1:8006: reachable" in found.stdout
    assert "last never, next 2026-01-31T02:15:00Z" in found.stdout
    assert "next 2026-01-31T02:15:00Z; would have cleaned up 3 sandbox(es), kept 2\n" in found.stdout
    assert "FROZEN" not in found.stdout
    daemon.replies["GET", "/v1/status"] = (
        200,
        {
            **STATUS,
            "proxmox": {**STATUS["proxmox"], "reachable": False, "last_error": "Connection refused"},  # type: ignore[dict-item]
            "cleanup": {
                **STATUS["cleanup"],
                "frozen": {"reason": "guard: 60 of 80", "at": "2026-01-31T02:00:00Z", "actor": "daemon"},
            },  # type: ignore[dict-item]
            "config": {**STATUS["config"], "error": "line 3: unknown key"},
        },
    )  # type: ignore[dict-item]
    found = agentlab("status", socket=daemon.path)
    assert "NOT reachable: Connection refused" in found.stdout
    assert (
        "FROZEN since 2026-01-31T02:00:00Z by daemon: guard: 60 of 80" in found.stdout
        and "agentlab cleanup run --dry-run" in found.stdout
    )
    assert "agentlab cleanup release" in found.stdout
    assert "line 3: unknown key" in found.stdout


def test_doctor_prints_findings_and_advice_and_writes_the_bundle(daemon: StandIn, tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "status": "warning",
        "problems": 0,
        "pveum": ["pveum role add AgentlabRun"],
        "bundle": None,
        "findings": [
            {"check": "database", "status": "ok", "meaning": "it is whole", "advice": "nothing", "facts": {}},
            {
                "check": "privileges",
                "status": "warning",
                "meaning": "more\x1b[31m than needed",
                "advice": "make another token",
                "facts": {},
            },
        ],
    }
    daemon.replies["GET", "/v1/doctor"] = (200, report)
    found = agentlab("doctor", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == (
        "ok       database    it is whole\nwarning  privileges  more\\x1b[31m than needed\n                     -> "
        "make another token\n\nA token with the least privileges, made as root on a node:\n  pveum role add "
        "AgentlabRun\n"
    )
    daemon.replies["GET", "/v1/doctor?template=9000&bundle=true&bundle_hosts=true"] = (
        200,
        {**report, "problems": 2, "bundle": {"a": 1}},
    )
    file = tmp_path / "bundle.json"
    found = agentlab("doctor", "--template", "9000", "--bundle", file, "--bundle-hosts", socket=daemon.path)
    assert found.returncode == 1 and json.loads(file.read_text()) == {"a": 1}, found
    daemon.replies["GET", "/v1/doctor?bundle=true"] = (200, {**report, "bundle": {"a": 1}})
    found = agentlab("doctor", "--bundle", tmp_path / "none" / "x", socket=daemon.path)
    assert (
        found.returncode == 1
        and "No such file or directory; give a file in a folder that you may write to" in found.stderr
    )
    assert agentlab("doctor", "--bundle-hosts", socket=daemon.path).returncode == 2


def test_cleanup_can_be_frozen_and_released(daemon: StandIn) -> None:
    daemon.replies["POST", "/v1/cleanup/freeze"] = (200, {"frozen": {"reason": "maintenance"}})
    daemon.replies["POST", "/v1/cleanup/release"] = (200, {"frozen": None, "released": {"reason": "maintenance"}})
    assert (
        agentlab("cleanup", "freeze", "--reason", "maintenance", socket=daemon.path).stdout
        == "cleanup frozen: maintenance\n"
    )
    assert agentlab("cleanup", "release", socket=daemon.path).stdout == "cleanup released\n"
    assert daemon.posted() == [("/v1/cleanup/freeze", {"reason": "maintenance"}), ("/v1/cleanup/release", None)]
    daemon.replies["POST", "/v1/cleanup/release"] = (200, {"frozen": None, "released": None})
    assert agentlab("cleanup", "release", socket=daemon.path).stdout == "cleanup was not frozen\n"


def test_profiles_are_listed_with_their_values(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/profiles"] = (
        200,
        {
            "profiles": [
                {
                    "name": "yolo-ephemeral",
                    "template": "debian-13",
                    "cores": 4,
                    "lease_default": "2h",
                    "description": None,
                }
            ]
        },
    )
    head, row = agentlab("profile", "list", socket=daemon.path).stdout.splitlines()
    assert head.split() == ["NAME", "TEMPLATE", "CORES", "LEASE", "DEFAULT"]
    assert row.split() == ["yolo-ephemeral", "debian-13", "4", "2h"]
