# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of commands share: a run, the shells of guests, and what a guest was sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandResult, CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history

from support.lab import Lab
from support.programs import require_program
from support.proxmox_guest import Guest

EXEC = "POST /nodes/{node}/qemu/{vmid}/agent/exec"


def run(lab: Lab, sandbox: Sandbox, *argv: str | bytes, **values: Any) -> CommandResult:
    """Run a command in a run of its own."""
    callbacks = {name: values.pop(name) for name in ("on_output", "cancel") if name in values}
    options = values.pop("options", {})
    spec = CommandSpec(argv=argv or None, **values)
    return command.run_command(lab.context(**options), sandbox, spec, **callbacks)


def events(ctx: Context, sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return the events of commands in a sandbox, oldest first."""
    return [event for event in history.read_events(ctx.database, uuid=sandbox.uuid) if event["operation"] == "exec"]


SHELLS = ["dash", "bash", "busybox"]


def use_shell(guest: Guest, shell: str) -> None:
    """Give the guest that shell, or skip the test if it is not installed."""
    if shell == "busybox":
        require_program("busybox", "busybox-static")
        guest.use_busybox()
    else:
        guest.shell = require_program(shell)


def command_lines(guest: Guest) -> list[str]:
    """Return the command lines of all processes of the guest, words divided by NUL."""
    lines = []
    for pid in guest.processes():
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text())
        except OSError:
            continue
    return lines
