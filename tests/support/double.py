# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double as the tests and the demo use it: endings for every task of a type, and a user's environment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from support.proxmox_double import DoubleServer, ProxmoxDouble

TOKEN_ID = "agentlab@pve!tests"
TOKEN_SECRET = "7d0c1a52-made-up-for-tests-9f3b"
TEMPLATE = 9000
# A configuration that says nothing: named so that the one of this machine is not read.
EMPTY_CONFIG = str(Path(__file__).parent / "empty.yaml")


class Double(ProxmoxDouble):
    """ProxmoxDouble whose guests answer the agent, and with endings for every task of a type."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.agent_default = True
        # Task type -> exit status with which every such task ends although its work was done, or "hang": it never ends.
        # For the next task alone, or for one whose work is not done, there is next_task().
        self.task_endings: dict[str, str] = {}
        # Tasks that ended (or went on) otherwise than they would have by themselves.
        self.spoiled: set[str] = set()

    # ---- looking ----

    @property
    def disks_lost(self) -> set[int]:
        """Return the VMIDs whose disks went although their configuration stayed."""
        return {vm.vmid for vm in self.vms if getattr(vm, "disks_lost", False)}

    def make_foreign(self, vmid: int, *, tags: str | None = None, **values: Any) -> Any:
        """Put a VM of somebody else in the place of whatever has the VMID, with tags of its own if they are named."""
        made = super().make_foreign(vmid, **values)
        if tags:
            made.config["tags"] = tags
        return made

    # ---- tasks that end otherwise ----

    async def task(
        self, node: str, ttype: str, tid: Any, user: str, body: Any, vm: Any = None, lock: bool = True, log: Any = ()
    ) -> Any:
        """Start a task, and end it as task_endings says; return its id."""
        upid = await super().task(node, ttype, tid, user, body, vm=vm, lock=lock, log=log)
        ending = self.task_endings.get(ttype)
        record = self.tasks[upid]
        if ending is not None or self.task_warnings.get(ttype):
            self.spoiled.add(upid)
        if ending == "hang":
            record["status"] = "running"
            record.pop("exitstatus", None)
            record.pop("endtime", None)
        elif ending is not None:

            async def spoil() -> None:
                while record["status"] == "running":
                    await asyncio.sleep(0.01)
                record["exitstatus"] = ending

            await spoil() if not self.time_scale else asyncio.ensure_future(spoil())
        return upid


class Server(DoubleServer):
    """A Double that listens on loopback as soon as it is made."""

    pve: Double

    def __init__(self, folder: str, *, time_scale: float = 0, port: int = 0) -> None:
        super().__init__(time_scale, port, double=Double)
        self.pve.apitokens[TOKEN_ID] = TOKEN_SECRET
        self.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that the double runs on."""
        return self._loop

    def environment(self, folder: str) -> dict[str, str]:
        """Return what a user would set to reach it.

        The records are in ``folder``, and so is an empty configuration unless there is one.
        """
        configuration = Path(folder, "config.yaml")
        if not configuration.exists():
            configuration.touch()
        return {
            "PROXMOX_HOST": "127.0.0.1",
            "PROXMOX_PORT": str(self.port),
            "PROXMOX_TOKEN_ID": TOKEN_ID,
            "PROXMOX_TOKEN_SECRET": TOKEN_SECRET,
            "PROXMOX_CA_PATH": self.cafile,
            "PROXMOX_VALIDATE_CERTS": "true",
            "AGENTLAB_DATABASE": f"{folder}/agentlab.db",
            "AGENTLAB_CONFIG": f"{folder}/config.yaml",
        }
