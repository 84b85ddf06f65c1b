# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the daemon: whether it answers, and the conditions in its status."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from ..version import __version__
from .examination import Examination, parse_properties
from .findings import FAILS, OK, PROBLEM, UNKNOWN, WARNING, Finding

_DAEMON_SECONDS = 5.0


def read_daemon_status(exam: Examination) -> dict[str, Any] | None:
    """Return the status of the daemon. None without an answer, and if the daemon works with other records."""
    try:
        status = ask_daemon(exam)
    except (OSError, ValueError, http.client.HTTPException):
        return None
    path = parse_properties(parse_properties(status).get("database")).get("path")
    same = isinstance(path, str) and os.path.abspath(path) == os.path.abspath(exam.config.database)
    return status if same else None


def ask_daemon(exam: Examination) -> dict[str, Any]:
    """Return the daemon's status, which is read once in an examination.

    Raises the errors of ``fetch_resource``, and FileNotFoundError without a socket.
    """
    if exam.status is None:
        if not os.path.exists(exam.config.socket):
            raise FileNotFoundError(exam.config.socket)
        exam.status = fetch_resource(exam.config.socket, "/v1/status")
    return exam.status


def check_daemon(exam: Examination) -> Iterable[Finding]:
    """Check whether the daemon answers, its version, and the conditions in its status."""
    path = exam.config.socket
    if not os.path.exists(path):
        yield Finding(
            "daemon",
            OK,
            f"no daemon runs here (no socket {path}). Modules need no daemon, but without it agentlab_reconcile and"
            " agentlab_prune have to run regularly",
            "a cron job, an AWX schedule, or the role agentlabd",
            {"socket": path},
        )
        return
    try:
        answer = ask_daemon(exam)
    except PermissionError:
        yield Finding(
            "daemon",
            UNKNOWN,
            f"the socket {path} exists, but this user may not use it",
            "run as root, or as a member of the group agentlab",
            {"socket": path},
        )
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        yield Finding(
            "daemon",
            PROBLEM,
            f"the socket {path} exists, but the daemon does not answer ({type(error).__name__})",
            "systemctl status agentlabd; journalctl -u agentlabd",
            {"socket": path},
        )
        return
    facts = {"socket": path, "status": answer}
    conditions = read_conditions(answer)
    for condition in conditions:
        yield Finding(
            "daemon",
            # Work that rests or waits goes on by itself, or when a person releases it. Work that fails does not.
            PROBLEM if condition["condition"] == FAILS else WARNING,
            f"agentlabd: {condition['part']} {condition['condition']} since {condition['since']}: {condition['why']}",
            condition["todo"],
            facts,
        )
    # Release 1.0.0 tells no conditions.
    lists_conditions = "conditions" in answer
    complaints = (
        []
        if lists_conditions
        else [
            f"{part}: {text}"
            for part, key in (
                ("config", "error"),
                ("proxmox", "last_error"),
                ("expiry", "last_error"),
                ("reconcile", "last_error"),
            )
            if (text := (answer.get(part) or {}).get(key))
        ]
    )
    frozen = (answer.get("cleanup") or {}).get("frozen")
    if frozen and not lists_conditions:
        complaints.append(
            f"cleanup is frozen since {frozen.get('at')}: {frozen.get('reason')} (agentlab cleanup release)"
        )
    if answer.get("version") not in (None, __version__):
        complaints.append(f"it is version {answer.get('version')}, the modules here are {__version__}")
    if complaints:
        yield Finding(
            "daemon",
            WARNING,
            "the daemon answers, but says: " + "; ".join(complaints),
            "journalctl -u agentlabd tells more",
            facts,
        )
    elif not conditions:
        yield Finding("daemon", OK, f"the daemon answers (version {answer.get('version')})", None, facts)


class _Local(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_DAEMON_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_DAEMON_SECONDS)
        self.sock.connect(self._path)


def fetch_resource(path: str, resource: str) -> dict[str, Any]:
    """Return the object that the daemon answers over its socket.

    Raises OSError without a connection, and ValueError for another answer.
    """
    connection = _Local(path)
    try:
        connection.request("GET", resource)
        answer = connection.getresponse()
        body = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200 or not isinstance(body, dict):
        raise ValueError(f"status {answer.status}")
    return body


def read_conditions(status: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the parts that rest, wait or fail by the daemon's status, each with part, condition, since, why, todo."""
    rows = status.get("conditions")
    names = ("part", "condition", "since", "why", "todo")
    return [
        {name: str(row.get(name) or "unknown") for name in names}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
