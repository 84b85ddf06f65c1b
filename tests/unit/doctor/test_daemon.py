# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor on the daemon: whether it answers, and its conditions."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import version

from support.examine import examine
from support.lab import Lab


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
def test_an_answer_of_the_daemon_becomes_a_finding(
    lab: Lab, tmp_path: Path, answer: Any, status: str, words: str
) -> None:
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
