# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check whether commands can run in sandboxes: the privilege, and the commands that a guest agent allows."""

from __future__ import annotations

from collections.abc import Iterable

from .. import states
from ..errors import AgentlabError
from ..guest.agent import Agent
from ..store import runs
from ..vm.locate import require_match
from . import privileges
from .examination import Examination
from .findings import OK, PROBLEM, WARNING, Finding

_NEEDED = ("guest-exec", "guest-exec-status", "guest-file-open", "guest-file-read", "guest-file-close")


def check_commands(exam: Examination) -> Iterable[Finding]:
    """Check whether commands can run in sandboxes and files can be copied. Ask the guest agent of one that runs."""
    path, name = (
        privileges.choose_run_path(exam.config),
        privileges.spell_privilege("VM.GuestAgent.Unrestricted", exam.release),
    )
    running = [
        sandbox
        for sandbox in exam.context.records.find_all(states.OPERATIONS["exec"].allowed)
        if not sandbox.has_expired(exam.context.clock.now())
    ]
    used = any(runs.list_runs(exam.context.records, sandbox, 1) for sandbox in running)
    if not exam.config.proxmox.is_root and name not in exam.standing.held.get(path, set()):
        yield Finding(
            "commands",
            PROBLEM if used else OK,
            f"{exam.config.proxmox.login} lacks {name} on {path}: no command and no file can go into a sandbox "
            "(agentlab_exec, the connection plugin, agentlab sandbox exec and cp)",
            f"to allow commands, run as root on a node: pveum role modify AgentlabRun --append 1 --privs {name}",
            {"missing": {path: [name]}},
        )
        return
    if not running:
        yield Finding("commands", OK, "no sandbox runs, so no guest agent was asked what it allows")
        return
    sandbox = max(running, key=lambda candidate: candidate.created_at)
    try:
        abilities = Agent(exam.context, sandbox, require_match(exam.context, sandbox)).read_abilities()
    except AgentlabError as error:
        yield Finding(
            "commands", WARNING, f"no command can be run: {error.message}", "see the message", {"vmid": sandbox.vmid}
        )
        return
    blocked = [command for command in _NEEDED if not abilities.get(command)]
    if blocked:
        yield Finding(
            "commands",
            WARNING,
            f"the guest of sandbox {sandbox.vmid} blocks {', '.join(blocked)}",
            "allow them in the template (/etc/qemu-ga/qemu-ga.conf, or FILTER_RPC_ARGS in /etc/sysconfig/qemu-ga on "
            "RHEL and its kin), then restart qemu-guest-agent in the guest",
            {"vmid": sandbox.vmid, "blocked": blocked},
        )
        return
    yield Finding("commands", OK, f"the guest agent of sandbox {sandbox.vmid} answers, and allows what is needed")
