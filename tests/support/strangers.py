# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Strangers at our VMIDs, and every operation that could hurt them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.lab import Lab


def try_everything(lab: Lab, sandbox: Sandbox) -> list[str]:
    """Try every operation that could hurt, one after another, and return what each answered."""
    words: list[str] = []

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            answer = work()
            answer = answer[0] if isinstance(answer, list) and answer else answer
            words.append(f"{name}: {getattr(answer, 'outcome', 'done')} {getattr(answer, 'reason', None)}")
        except AgentlabError as error:
            assert error.message
            words.append(f"{name}: {error.code}")

    for operation in ("stop", "suspend", "start"):
        attempt(operation, lambda operation=operation: lab.power(operation, sandbox.vmid))
    attempt("expire", lab.expire)
    attempt("check mode", lambda: lab.prune(dry_run=True))
    attempt("destroy", lambda: lab.destroy(sandbox.vmid))
    attempt("prune", lab.prune)
    attempt("force", lambda: lab.destroy(sandbox.vmid, force=True))
    attempt("reconcile", lab.reconcile)
    attempt("reconcile", lab.reconcile)
    attempt("force", lambda: lab.destroy(sandbox.vmid, force=True))
    return words


STRANGERS: dict[str, dict[str, Any]] = {
    "stopped": {},
    "running": {"running": True},
    "same_name": {"name": "a1"},
    "same_tags": {"tags": "agentlab"},
    "same_name_and_tags_running": {"name": "a1", "tags": "agentlab", "running": True},
    "template": {"template": True},
    "no_smbios": {"smbios": False},
    "other_node": {"node": "pve2"},
    "marker_of_another_sandbox": {"description": f"agentlab-sandbox: {uuid.uuid4()}", "running": True},
}


# The everyday run takes the one that is most like ours.
EVERYDAY = "same_name_and_tags_running"


def strangers(way: int) -> list[Any]:
    """Return all of STRANGERS, for the test of one of the thirteen ways (docs/safety.md); one is run every day."""
    return [pytest.param(name, marks=pytest.mark.way(way)) if name == EVERYDAY else name for name in STRANGERS]
