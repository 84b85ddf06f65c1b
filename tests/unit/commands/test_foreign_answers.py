# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands in sandboxes: a stranger's VM gets none, and what a guest says is not trusted."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Kept, OutcomeUnknown
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestFailed
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import events, run
from support.lab import Lab
from support.proxmox_guest import Guest

# ---- whose VM ----


def test_no_command_reaches_a_strangers_vm(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    lab.pve.make_foreign(sandbox.vmid, running=True)
    lab.pve.requests.clear()
    with pytest.raises(Kept, match="now belongs to another VM"):
        run(lab, sandbox, "true")
    assert guest.started == [] and lab.pve.touched(sandbox.vmid) == []


def test_an_answer_of_another_vm_is_no_result(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    def swap(method: str, path: str) -> None:
        if path.endswith("/agent/exec-status"):
            lab.pve.after = None
            vm = lab.pve.vm(sandbox.vmid)
            vm.config["smbios1"] = f"uuid={uuid.uuid4()}"
            vm.config["description"] = "not ours"

    lab.pve.after = swap
    with pytest.raises(Kept, match="now belongs to another VM"):
        run(lab, sandbox, "sleep", "0.3")
    assert events(lab.context(), sandbox) == []


# ---- a guest that lies ----


def lies(answer: dict[str, Any], text: bytes) -> dict[str, Any]:
    return {**answer, "out-data": text.decode("latin-1")}


LIES = {
    "no frame": lambda a: lies(a, b"hello"),
    "another run": lambda a: lies(a, b"agentlab1 " + b"0" * 32 + b" state=ended rc=0 sig=0 ms=1 so=0 se=0 lo=0 le=0\n"),
    "more than it says": lambda a: lies(a, a["out-data"].encode("latin-1") + b"more"),
    "other bytes": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"told", b"lied")),
    "no number": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"rc=0", b"rc=x")),
    "a huge number": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"so=5", b"so=5000000000")),
    "another folder": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"dir=/run", b"dir=/etc")),
    "no text": lambda a: {**a, "out-data": 5},
    "beyond bytes": lambda a: {**a, "out-data": "\u20ac"},
    "a strange end": lambda a: {**a, "exited": "perhaps"},
}


@pytest.mark.parametrize("how", LIES)
def test_what_the_guest_says_is_not_trusted(lab: Lab, sandbox: Sandbox, guest: Guest, how: str) -> None:
    guest.lie = LIES[how]
    with pytest.raises((GuestFailed, OutcomeUnknown)):
        run(lab, sandbox, "echo", "told")
    assert all(event["outcome"] != "done" for event in events(lab.context(), sandbox))
