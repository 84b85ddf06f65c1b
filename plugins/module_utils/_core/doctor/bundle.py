# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the bundle for a bug report: findings, configuration, sandboxes and events, without secrets."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from .. import clock
from ..config import SECRETS
from ..errors import InvalidInput
from ..store import history
from ..version import __version__
from ..views import info
from .examination import Examination
from .findings import Diagnosis

_ADDRESS = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"
)
_KEEP = ("127.0.0.1", "::1")


def make_bundle(exam: Examination, report: Diagnosis, *, hosts: bool = False, events: int = 100) -> dict[str, Any]:
    """Return the content of a bundle for a bug report: findings, configuration, states, the last events.

    The bundle never has secrets. It has the names of hosts and VMs, and their addresses, only with ``hosts``.
    ``events`` is the number of events.
    """
    context = exam.context
    config = {name: getattr(exam.config.proxmox, name) for name in exam.config.proxmox.__slots__ if name not in SECRETS}
    config.update({name: getattr(exam.config, name) for name in exam.config.__slots__ if name != "proxmox"})
    live = context.records.find_all()
    content = {
        "made_at": clock.format_utc(context.clock.now()),
        "system": {
            "kernel": platform.release(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "collection": __version__,
        },
        "configuration": config,
        **report.public(),
        "sandboxes": [sandbox.public() for sandbox in live],
        "events": [info.format_event(row) for row in history.read_events(context.database, tail=events)],
    }
    return dict(_redact(json.loads(json.dumps(content, default=str)), _list_replacements(exam, hosts), hosts))


def redact_report(exam: Examination, report: Diagnosis) -> dict[str, Any]:
    """Return the report without the secrets of the configuration. A message of Proxmox VE may quote one."""
    return dict(_redact(report.public(), _list_replacements(exam, True), True))


def write_bundle(path: str, content: Mapping[str, Any]) -> None:
    """Write the bundle to a file with mode 0600, completely or not at all.

    A link at ``path`` is replaced, not followed. Raises InvalidInput if the file cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, fresh = tempfile.mkstemp(prefix=".agentlab-", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.write("\n")
            os.replace(fresh, path)
        except OSError:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise InvalidInput(
            f"bundle: {path}: {error.strerror}; give a file in a folder that this user may write to",
            option="bundle",
            value=path,
        ) from None


def _list_replacements(exam: Examination, hosts: bool) -> dict[str, str]:
    """Return the texts that the bundle must not have, each with the text that replaces it."""
    proxmox = exam.config.proxmox
    # A value of up to three characters is part of many words, and protects nothing.
    replaced = {
        value: "(secret)" for value in (proxmox.api_password, proxmox.api_token_secret) if value and len(value) > 3
    }
    if hosts:
        return replaced
    for name in (proxmox.api_host, socket.gethostname(), socket.getfqdn()):
        if name and name not in ("localhost", *_KEEP):
            replaced[name] = "(host)"
    nodes, vms = exam.context.cluster.list_known()
    for number, node in enumerate(sorted(nodes), 1):
        replaced[node] = f"(node {number})"
    for sandbox in exam.context.records.find_all(include_destroyed=True):
        replaced[sandbox.name] = f"(sandbox {sandbox.vmid})"
    for vmid, name in vms.items():
        replaced.setdefault(name, f"(VM {vmid})")
    return replaced


def _redact(value: Any, replaced: Mapping[str, str], hosts: bool) -> Any:
    """Return the value with the texts of ``replaced`` exchanged, the longest first.

    Names are replaced as whole words, secrets anywhere. Addresses are replaced unless ``hosts`` is set.
    """
    secrets = {text: word for text, word in replaced.items() if word == "(secret)"}
    names = sorted((text for text in replaced if text not in secrets), key=len, reverse=True)
    words = re.compile("|".join(rf"(?<![\w-]){re.escape(text)}(?![\w-])" for text in names)) if names else None

    def redact_text(text: str) -> str:
        for secret, word in secrets.items():
            text = text.replace(secret, word)
        if hosts:
            return text
        if words:
            text = words.sub(lambda match: replaced[match[0]], text)
        return _ADDRESS.sub(lambda match: match[0] if match[0] in _KEEP else "(address)", text)

    def walk(part: Any) -> Any:
        if isinstance(part, str):
            return redact_text(part)
        if isinstance(part, list):
            return [walk(item) for item in part]
        if isinstance(part, dict):
            return {redact_text(str(name)): walk(item) for name, item in part.items()}
        return part

    return walk(value)
