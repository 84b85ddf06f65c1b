# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double's API for its tests: log in, clone, expect a refusal, wait for a task."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from proxmoxer import ProxmoxAPI, ResourceException

TOKEN = "agentlab@pve!test"


def login(env: dict[str, str], timeout: float = 5) -> Any:
    """Return proxmoxer's API of the double; ``timeout`` in seconds."""
    return ProxmoxAPI(
        env["PROXMOX_HOST"],
        port=int(env["PROXMOX_PORT"]),
        user=env["PROXMOX_USER"],
        token_name=env["PROXMOX_TOKEN_ID"],
        token_value=env["PROXMOX_TOKEN_SECRET"],
        verify_ssl=env["PROXMOX_CA_PATH"],
        timeout=timeout,
    )


def refusal_of(call: Callable[[], Any]) -> tuple[int, str]:
    """Return status and text of a call that has to be refused."""
    with pytest.raises(ResourceException) as caught:
        call()
    error = caught.value
    return error.status_code, f"{error.content} {error.errors or ''}"


def exit_status(api: Any, upid: str, seconds: float = 5) -> str:
    """Wait for the end of a task, at most so many seconds, and return its exit status."""
    node = upid.split(":")[1]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = api.nodes(node).tasks(upid).status.get()
        if status["status"] == "stopped":
            return str(status["exitstatus"])
        time.sleep(0.01)
    raise AssertionError(f"{upid} still runs")


def clone_template(api: Any, newid: int = 101, **kw: Any) -> str:
    """Clone template 9000 and return the task's UPID. ``kw`` are further parameters."""
    return str(
        api.nodes("pve1").qemu(9000).clone.post(newid=newid, **{"name": f"vm{newid}", "description": "marker", **kw})
    )
