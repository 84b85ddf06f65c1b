# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send requests to the QEMU guest agent of one VM: check bounds before, types after, and explain refusals.

The code relies on the agent's behaviour through Proxmox VE (tried on 9.2 with qemu-ga 10.0):

- A request with non-ASCII text can silence the agent for every client, for minutes. So such a request is never sent.
- ``exec`` that ends in ``got timeout``, 596 or a cut connection may have been carried out. ``is not running`` and
  ``Configuration file ... does not exist`` prove that nothing was sent to the guest.
- ``exec-status`` returns the output only once. Bytes arrive as the characters 0 to 255 of a JSON string.
- Every request waits up to 0.1 s for the agent's wake-up, and occupies a worker of the node's daemon for that time.
  While the agent is silent that is three seconds or more.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..context import Context
from ..errors import AccessDenied, AgentlabError, ApiError, InvalidInput, OutcomeUnknown
from ..model import Sandbox
from ..vm.address import is_agent_on
from ..vm.locate import Located

# Characters of input-data, and bytes of all arguments, that this module sends. (Linux allows 131,071 for one argument.)
LARGEST_INPUT = 65536
LARGEST_ARGUMENTS = 100_000
# Bytes to request with one file-read. Proxmox allows 16 MiB.
READ_PIECE = 1024 * 1024
_MOST_READ = 16 * 1024 * 1024
_BLOCKED = re.compile(r"(?:Command )?(guest-[a-z-]+) has been disabled")
_MOVED = re.compile(r"Configuration file '[^']*' does not exist")
_SILENT = "QEMU guest agent is not running"
_STOPPED = re.compile(r"VM \d+ (is )?not running")
# Errors for an unknown process id: the first from qemu-ga 10, the second from 7.2 (Debian 12).
_GONE_PID = re.compile(r"PID \S+ does not exist|Invalid parameter '?pid'?")
_WINDOWS = re.compile(r"w(in\d|xp|2k|vista)")


class GuestRefused(AgentlabError):
    """The request was certainly not carried out in the guest.

    ``detail["reason"]`` is one word. The message names the remedy.
    """

    code = "guest_agent"

    @property
    def reason(self) -> str:
        return str(self.detail.get("reason"))


class GuestFailed(AgentlabError):
    """The guest's answer is an error, or has a form that the wrapper never sends."""

    code = "guest"


@dataclass(slots=True)
class Status:
    """The answer to ``exec-status``. ``exitcode`` is None while the program runs, and after a signal."""

    exited: bool
    exitcode: int | None = None
    signal: int | None = None
    out: bytes = b""
    err: bytes = b""


class Agent:
    """The guest agent of one sandbox's VM, on the node where the VM was judged to be ours."""

    def __init__(self, ctx: Context, sandbox: Sandbox, located: Located) -> None:
        self._ctx = ctx
        self._sandbox = sandbox
        self._located = located
        self.path = f"{located.path}/agent"

    @property
    def ostype(self) -> str:
        """Return the kind of system that the VM's configuration names; empty when it names none."""
        return str(self._located.config.get("ostype") or "")[:40]

    @property
    def is_windows(self) -> bool:
        """Return whether the VM's configuration (``ostype``) names Windows as its system."""
        return _WINDOWS.match(self.ostype) is not None

    # ---- requests ----

    def exec(self, argv: Sequence[str], input_data: str = "", *, secret: bool = False) -> int:
        """Start a program in the guest and return its process id there.

        ``argv`` and ``input_data`` must be ASCII. ``secret``: ``input_data`` must not appear in a process list of the
        node. Raises GuestRefused when the program certainly did not start, and OutcomeUnknown when it may have started.
        """
        text = "".join(argv)
        if not text.isascii() or not input_data.isascii():
            raise InvalidInput("argv: a request to the guest agent must be ASCII; it was not sent")
        if len(text) + len(argv) > LARGEST_ARGUMENTS or len(input_data) > LARGEST_INPUT:
            raise InvalidInput(
                f"argv: the arguments have {len(text)} bytes and the input {len(input_data)} characters. Valid: up to "
                f"{LARGEST_ARGUMENTS} and {LARGEST_INPUT}; put the data into a file of the sandbox instead"
            )
        if secret and self._ctx.client.shows_input(self.path):
            raise GuestRefused(
                f"sandbox {self._sandbox.vmid}: its VM is on node {self._located.node}, and pvesh would show the "
                "input to every user of this host. Set api_host and a token, or run this on that node",
                reason="visible",
                vmid=self._sandbox.vmid,
            )
        params: dict[str, Any] = {"command": list(argv)}
        if input_data:
            params["input_data"] = input_data
        try:
            answer = self._ctx.client.post(f"{self.path}/exec", **params)
        except ApiError as error:
            raise self.make_error(error, "guest-exec") from None
        pid = answer.get("pid") if isinstance(answer, dict) else None
        if isinstance(pid, str) and pid.isascii() and pid.isdecimal() and len(pid) < 12:
            pid = int(pid)
        if not isinstance(pid, int) or isinstance(pid, bool) or pid < 0:
            raise OutcomeUnknown(
                f"sandbox {self._sandbox.vmid}: the answer to guest-exec has no process id, so whether the program was "
                "started is not known."
            )
        return pid

    def read_exec_status(self, pid: int) -> Status | None:
        """Return the status of a program; None when the agent does not know its process id (any more).

        The agent returns the output only once. Raises OutcomeUnknown when the answer, and with it the output, is lost.
        """
        try:
            answer = self._ctx.client.get_dict(f"{self.path}/exec-status", pid=pid)
        except ApiError as error:
            if error.status == 500 and _GONE_PID.search(error.text):
                return None
            raise self.make_error(error, "guest-exec-status") from None
        exited = answer.get("exited")
        if exited in (0, False, "0"):
            return Status(False)
        if exited not in (1, True, "1"):
            raise self._make_nonsense_error("guest-exec-status")
        return Status(
            True,
            self._check_number(answer.get("exitcode"), 255),
            self._check_number(answer.get("signal"), 128),
            self._decode_bytes(answer.get("out-data")),
            self._decode_bytes(answer.get("err-data")),
        )

    def read_file(self, path: str, offset: int, count: int) -> bytes:
        """Return up to ``count`` bytes of a file in the guest, starting at ``offset``.

        ``path`` is one of our own names, in ASCII. Raises GuestRefused with reason ``old`` on Proxmox VE 8, which has
        no offset.
        """
        if not path.isascii() or not 0 < count <= _MOST_READ:
            raise InvalidInput("path: a file name for the guest agent must be ASCII; the request was not sent")
        try:
            answer = self._ctx.client.get_dict(
                f"{self.path}/file-read", file=path, offset=offset, count=count, decode=0
            )
        except ApiError as error:
            if error.status == 400:
                raise GuestRefused("this Proxmox VE reads files of a guest only as a whole", reason="old") from None
            raise self.make_error(error, "guest-file-open") from None
        content = answer.get("content")
        if not isinstance(content, str) or len(content) > count * 2 + 4096:
            raise self._make_nonsense_error("guest-file-read")
        try:
            # The answer may consist of several base64 pieces, each with its own padding.
            data = b"".join(
                base64.b64decode(part, validate=True) for part in re.findall(r"[^=]+={0,2}", "".join(content.split()))
            )
        except (binascii.Error, ValueError):
            raise self._make_nonsense_error("guest-file-read") from None
        if len(data) > count:
            raise self._make_nonsense_error("guest-file-read")
        return data

    def read_abilities(self) -> dict[str, bool]:
        """Return each command of the agent (``agent/info``) with whether the guest allows it."""
        try:
            answer = self._ctx.client.get_dict(f"{self.path}/info")
        except ApiError as error:
            raise self.make_error(error, "guest-info") from None
        result = answer.get("result")
        commands = result.get("supported_commands") if isinstance(result, dict) else None
        if not isinstance(commands, list):
            raise self._make_nonsense_error("guest-info")
        return {
            str(command.get("name"))[:80]: command.get("enabled") in (1, True, "1")
            for command in commands[:500]
            if isinstance(command, dict)
        }

    # ---- interpretation of answers ----

    def make_error(self, error: ApiError, command: str) -> AgentlabError:
        """Return the error for a refusal of Proxmox: GuestRefused with its reason, or OutcomeUnknown."""
        vmid, text = self._sandbox.vmid, error.text
        of = f"sandbox {vmid}"
        if isinstance(error, AccessDenied):
            return GuestRefused(
                f"{of}: the API user may not use the guest agent ({text}). Grant VM.GuestAgent.Unrestricted (Proxmox "
                "VE 9) or VM.Monitor (8) on the sandboxes' pool or /vms; agentlab_doctor names the path",
                reason="denied",
                vmid=vmid,
                status=error.status,
            )
        blocked = _BLOCKED.search(text)
        if blocked:
            return GuestRefused(
                f"{of}: the guest blocks {blocked[1]} of its agent. Allow it in the template: block-rpcs or "
                "allow-rpcs in /etc/qemu-ga/qemu-ga.conf or /etc/qemu/qemu-ga.conf, on RHEL and its kin "
                "FILTER_RPC_ARGS (or BLACKLIST_RPC) in /etc/sysconfig/qemu-ga; then restart qemu-guest-agent in the "
                "guest",
                reason="blocked",
                vmid=vmid,
                command=blocked[1],
            )
        if "got timeout" in text:
            return OutcomeUnknown(
                f"{of}: its guest agent did not answer {command} in time; whether it was carried out is not known.",
                vmid=vmid,
                agent_timeout=True,
            )
        if _STOPPED.search(text):
            hibernated = self._located.config.get("lock") == "suspended"
            how = "is hibernated" if hibernated else "does not run"
            return GuestRefused(
                f"{of}: its VM {how}, so nothing can be run in it. Start the sandbox (state: started), then try again",
                reason="hibernated" if hibernated else "stopped",
                vmid=vmid,
            )
        if _MOVED.search(text):
            return GuestRefused(
                f"{of}: its VM is not on node {self._located.node} any more; try again",
                reason="moved",
                vmid=vmid,
            )
        if "No QEMU guest agent configured" in text:
            return GuestRefused(
                f"{of}: the configuration of its VM has no guest agent. Set agent=1 (qm set {vmid} --agent 1; better "
                "on the template), install qemu-guest-agent in the guest, then stop and start the sandbox",
                reason="not_configured",
                vmid=vmid,
            )
        if _SILENT in text:
            if not is_agent_on(self._located.config):
                return GuestRefused(
                    f"{of}: the guest agent is switched off in the configuration of its VM (agent: "
                    f"{str(self._located.config.get('agent', 'not set'))[:40]}). Set agent=1 (qm set {vmid} --agent 1; "
                    "better on the template), then stop and start the sandbox",
                    reason="switched_off",
                    vmid=vmid,
                )
            return GuestRefused(
                f"{of}: its guest agent does not answer. The guest is still booting, is paused, has no "
                "qemu-guest-agent (install it in the template), or was started before agent=1 was set (stop and start "
                "the sandbox)",
                reason="silent",
                vmid=vmid,
            )
        if error.status >= 500 and not text.startswith("Agent error:"):
            # An answer that we do not know does not prove that nothing was run.
            return OutcomeUnknown(
                f"{of}: Proxmox answers {command} with {error.status} {text}; whether it was carried out is not known.",
                vmid=vmid,
                odd=True,
            )
        return GuestRefused(
            f"{of}: Proxmox refuses {command} ({error.status} {text}); nothing was run. Look at the VM's options in "
            "Proxmox VE and at agentlab_doctor",
            reason="refused",
            vmid=vmid,
            status=error.status,
        )

    def _make_nonsense_error(self, command: str) -> GuestFailed:
        return GuestFailed(
            f"sandbox {self._sandbox.vmid}: the answer to {command} is not what the QEMU guest agent sends, so it is "
            "not believed. Look at qemu-guest-agent in the guest",
            vmid=self._sandbox.vmid,
        )

    def _check_number(self, value: Any, most: int) -> int | None:
        """Return a number of ``exec-status``, at most ``most``. Raises GuestFailed for a value of another type."""
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFFFFFF:
            # Exit codes of Windows have 32 bits, so a larger number is valid there.
            return value if value <= most or self.is_windows else most
        raise self._make_nonsense_error("guest-exec-status")

    def _decode_bytes(self, value: Any) -> bytes:
        """Return the output of ``exec-status``, whose characters 0 to 255 are bytes. Raises GuestFailed otherwise."""
        if value is None:
            return b""
        try:
            return str(value).encode("latin-1") if isinstance(value, str) else b"" + value
        except (UnicodeEncodeError, TypeError):
            raise self._make_nonsense_error("guest-exec-status") from None
