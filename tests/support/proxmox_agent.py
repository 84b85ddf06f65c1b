# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Requests to guest agents of the Proxmox double: what the API answers for them, and what reaches a guest.

How a test uses it (``pve`` is the double):

- **An agent that is up**: ``pve.agent_default = True``; its address is ``pve.address_of(vmid)``.
- **A guest that runs commands**: ``pve.machine(vmid)`` is the guest of a running VM whose agent is up
  (proxmox_guest.py).
- ``pve.agent_nap``: seconds the agent sleeps at each connection (real: up to 0.1; a request makes two).
- ``pve.agent_hurry``: the real time-outs (3 s for the ping, 5 s for a command) are divided by it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from typing import Any

from fakepve import FakePve, PveError

from support.proxmox_guest import BrokenPipe, Guest

SILENT = "QEMU guest agent is not running"
LARGEST_INPUT = 65536
LARGEST_CONTENT = 61440
LARGEST_READ = 16777216
# A transfer with four requests at a time took 0.57 of the time of one with one at a time, on the real agent.
CROWDED = 0.57
_RPC = {"file-read": "guest-file-open", "file-write": "guest-file-open"}
# Requests that a guest of ours answers (proxmox_guest.py); all others are fakepve's.
GUEST_COMMANDS = ("ping", "info", "exec", "exec-status", "file-read", "file-write")


class AgentRules(FakePve):
    """How the double answers requests to guest agents. The module's docstring says how tests use it."""

    def _reset_agent(self) -> None:
        """Set everything that tests switch in this part."""
        self.machines: dict[int, Guest] = {}
        self.agent_nap = 0.0
        self.agent_hurry = 20.0
        # False: Proxmox VE 8, where file-read knows neither offset nor count nor decode.
        self.reads_pieces = True
        # What a started guest's cloud-init will have reported (texts of errors), after cloud_init_delay real seconds;
        # None: it never ends.
        self.cloud_init_errors: list[str] | None = []
        self.cloud_init_delay = 0.0
        # True: a started VM whose config has agent=1 answers the guest agent with an address in 192.0.2.0/24,
        # after agent_delay real seconds.
        self.agent_default = False
        self.agent_delay = 0.0
        self._addresses: dict[int, str] = {}

    def machine(self, vmid: int) -> Guest:
        """Return the guest of a VM, made at its first use."""
        if vmid not in self.machines:
            self.machines[vmid] = Guest(vmid)
        return self.machines[vmid]

    def close_machines(self) -> None:
        """End all processes of all guests, and remove their folders."""
        for guest in self.machines.values():
            guest.close()
        self.machines.clear()

    # ------------------------------------------------------------------ an agent that comes up

    def start_agent(self, vm: Any) -> None:
        """Let the agent of a running VM answer after agent_delay, and cloud-init end after cloud_init_delay."""
        enabled = re.match(r"(enabled=)?(1|yes|on|true)\b", str(vm.config.get("agent", "0")))
        if not (self.agent_default and enabled and vm.agent is None):
            return
        mac = re.search(r"([0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5})", str(vm.config.get("net0", "")))
        answer = {
            "interfaces": [
                {
                    "name": "lo",
                    "hardware-address": "00:00:00:00:00:00",
                    "ip-addresses": [
                        {"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8},
                        {"ip-address": "::1", "ip-address-type": "ipv6", "prefix": 128},
                    ],
                },
                {
                    "name": "eth0",
                    "hardware-address": mac[1].lower() if mac else "bc:24:11:00:00:01",
                    "ip-addresses": [
                        {"ip-address": "fe80::1", "ip-address-type": "ipv6", "prefix": 64},
                        {"ip-address": self.address_of(vm.vmid), "ip-address-type": "ipv4", "prefix": 24},
                    ],
                },
            ]
        }

        def up() -> None:
            if vm.status == "running" and vm.agent is None:
                vm.agent, vm.agent_by_default = answer, True
                asyncio.get_running_loop().call_later(
                    self.cloud_init_delay, ended
                ) if self.cloud_init_delay else ended()

        def ended() -> None:
            if vm.agent is answer and self.cloud_init_errors is not None:
                told = {"v1": {"datasource": "DataSourceNoCloud", "errors": list(self.cloud_init_errors)}}
                answer["files"] = {"/run/cloud-init/result.json": json.dumps(told)}

        if self.agent_delay:
            asyncio.get_running_loop().call_later(self.agent_delay, up)
        else:
            up()

    def address_of(self, vmid: int) -> str:
        """Return the address that a started VM's agent answers.

        It is that of ipconfig0, or one of 192.0.2.0/24 that stays with the VMID.
        """
        vm = self.vm(vmid)
        static = re.search(r"ip=(\d+\.\d+\.\d+\.\d+)", str(vm.config.get("ipconfig0", ""))) if vm else None
        return static[1] if static else self._addresses.setdefault(vmid, f"192.0.2.{10 + len(self._addresses) % 240}")

    # ------------------------------------------------------------------ requests

    async def _agent_call(self, match: Any, values: dict[str, Any]) -> Any:
        """Answer one request to an agent: by the guest of the VM, or by what the test put into vm.agent."""
        vm = self.find(values["node"], values["vmid"])
        command = match.template.rsplit("/", 1)[1]
        if vm.status != "running":
            raise PveError(500, f"VM {vm.vmid} is not running")
        if "agent" not in vm.config:
            raise PveError(500, "No QEMU guest agent configured")
        if vm.agent is not None and command in getattr(vm, "agent_blocks", ()):
            name = {"file-read": "guest-file-open"}.get(command, f"guest-{command}")
            text = f"Agent error: Command {name} has been disabled: the command is not allowed"
            raise PveError(500, text)
        if vm.qmpstatus == "paused":
            raise PveError(500, "QEMU guest agent is not running")
        known = (vm.agent or {}).get("files") or {}
        if (
            vm.agent is not None
            and not vm.agent_hangs
            and command in GUEST_COMMANDS
            and values.get("file") not in known
        ):
            return await self._agent_request(vm, command, values)
        answer = await super()._agent_call(match, values)
        if command == "file-read":
            return self._read_named_file(vm, values["file"])
        return answer

    @staticmethod
    def _read_named_file(vm: Any, path: str) -> dict[str, Any]:
        """Return the content of a file that the test put into vm.agent."""
        files = (vm.agent or {}).get("files") or {}
        if path not in files:
            raise PveError(500, f"Agent error: failed to open file '{path}' (mode: 'r'): No such file or directory")
        content = str(files[path])
        return {"content": content, "bytes-read": len(content)}

    async def _agent_request(self, vm: Any, command: str, values: dict[str, Any]) -> Any:
        """Answer one request as the bridge and the agent do: checks, a ping, then the command."""
        guest = self.machine(vm.vmid)
        self._check_bounds(command, values)
        guest.waiting += 1
        async with guest.busy:
            guest.waiting -= 1
            # The agent sleeps while nobody is connected: less where the next request waits already.
            nap = self.agent_nap * (CROWDED if guest.waiting else 1)
            # It sleeps again and again from the end of the last request on, and the next wake-up counts.
            asleep = time.monotonic() - guest.served
            await asyncio.sleep(nap - asleep % nap if nap else 0)
            if guest.silent:
                await asyncio.sleep(3 / self.agent_hurry)
                raise PveError(500, SILENT)
            # A file is opened, read or written, and closed, each with a ping before it.
            await asyncio.sleep(nap * (5 if command.startswith("file-") else 1))
            rpc = _RPC.get(command, f"guest-{command}")
            if rpc in guest.blocked and command != "info":
                raise PveError(500, f"Agent error: Command {rpc} has been disabled: the command is not allowed")
            try:
                return await self._serve_agent(guest, vm, command, values, rpc)
            except TimeoutError:
                await asyncio.sleep(5 / self.agent_hurry)
                raise PveError(500, f"VM {vm.vmid} qga command '{rpc}' failed - got timeout") from None
            except BrokenPipe:
                await asyncio.sleep(5 / self.agent_hurry)
                raise
            finally:
                guest.served = time.monotonic()

    def _check_bounds(self, command: str, values: dict[str, Any]) -> None:
        """Refuse values that the API refuses: too long, not ASCII, or unknown to Proxmox VE 8."""
        data = str(values.get("input-data") or "")
        content = str(values.get("content") or "")
        for name, text, most in (("input-data", data, LARGEST_INPUT), ("content", content, LARGEST_CONTENT)):
            if len(text) > most:
                raise PveError(
                    400, "Parameter verification failed.", {name: f"value may only be {most} characters long"}
                )
        if not data.isascii():
            text = "Wide character in subroutine entry at /usr/share/perl5/PVE/QemuServer/Agent.pm line 135."
            raise PveError(500, text)
        if not content.isascii():
            text = "Wide character in subroutine entry at /usr/share/perl5/PVE/API2/Qemu/Agent.pm line 624."
            raise PveError(500, text)
        if not self.reads_pieces and command == "file-read":
            unknown = [name for name in ("offset", "count", "decode") if name in values]
            if unknown:
                text = "property is not defined in schema and the schema does not allow additional properties"
                raise PveError(400, "Parameter verification failed.", dict.fromkeys(unknown, text))

    async def _serve_agent(self, guest: Guest, vm: Any, command: str, values: dict[str, Any], rpc: str) -> Any:
        """Carry out one command in the guest and return its answer. Raises TimeoutError where the agent is too late."""
        frozen = guest.take_freeze()
        if frozen:
            guest.freeze(frozen / self.agent_hurry)
        if command == "exec":
            argv = values["command"] if isinstance(values["command"], list) else [values["command"]]
            argv, data = [str(word) for word in argv], str(values.get("input-data") or "")
            if not argv or not argv[0]:
                raise PveError(400, "Parameter verification failed.", {"command": "type check ('array') failed"})
            extra = sum(len(word.encode("utf-8", "surrogateescape")) - len(word) for word in argv)
            if extra > 1:
                # The end of the request is cut off, and the agent waits for it.
                guest.deaf = True
                raise TimeoutError
            if frozen:
                # The bytes are on their way, and the agent reads them when it goes on.
                asyncio.get_running_loop().call_later(frozen / self.agent_hurry, guest.exec, argv, data)
                raise TimeoutError
            return {"pid": guest.exec(argv, data)}
        if frozen:
            raise TimeoutError
        if command == "exec-status":
            return guest.status(int(values["pid"]))
        if command == "file-read":
            count = int(values.get("count") or LARGEST_READ)
            if not 1 <= count <= LARGEST_READ:
                raise PveError(400, "Parameter verification failed.", {"count": f"value must be 1 to {LARGEST_READ}"})
            decode = str(values.get("decode", 1)) not in ("0", "False")
            return await asyncio.to_thread(guest.read, values["file"], int(values.get("offset") or 0), count, decode)
        if command == "file-write":
            content = str(values["content"])
            if str(values.get("encode", 1)) in ("0", "False"):
                try:
                    data_bytes = base64.b64decode(content, validate=True)
                except ValueError:
                    guest.write(values["file"], b"")
                    raise PveError(500, "Agent error: Base64 data contains invalid characters") from None
            else:
                data_bytes = content.encode()
            return guest.write(values["file"], data_bytes)
        if command == "ping":
            return {"result": {}}
        names = ("ping", "info", "exec", "exec-status", "file-open", "file-read", "file-write", "file-close")
        commands = [
            {"name": f"guest-{name}", "enabled": f"guest-{name}" not in guest.blocked, "success-response": True}
            for name in (*names, "network-get-interfaces", "get-osinfo", "shutdown")
        ]
        return {"result": {"version": "10.0.13", "supported_commands": commands}}
