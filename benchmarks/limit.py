# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Destroy VMs with asyncio and the fewest requests that keep our promises. Row 3 compares our destroy with it.

As many VMs as ours are in flight. The identity is read, the VM is marked, and the task's end is read. There is nothing
else: no records, no journal, no proof of absence.

    python benchmarks/limit.py FIRST COUNT IN_FLIGHT      # reaches Proxmox by the environment that the collection uses
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from typing import Any

import aiohttp


async def destroy_vms(first: int, count: int, in_flight: int) -> None:
    """Destroy ``count`` VMs with VMIDs from ``first`` on, at most ``in_flight`` at the same time.

    Raises AssertionError when a VM is missing before, fails to be deleted, or is there afterwards.
    """
    env = os.environ
    base = f"https://{env['PROXMOX_HOST']}:{env['PROXMOX_PORT']}/api2/json"
    headers = {"Authorization": f"PVEAPIToken={env['PROXMOX_TOKEN_ID']}={env['PROXMOX_TOKEN_SECRET']}"}
    tls = ssl.create_default_context(cafile=env["PROXMOX_CA_PATH"])
    # Task id -> the future that gets the task's exit status.
    waiting: dict[str, asyncio.Future[str]] = {}
    slots = asyncio.Semaphore(in_flight)
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=in_flight, ssl=tls)
    ) as session:

        async def send_request(method: str, path: str, **data: object) -> Any:
            async with session.request(method, f"{base}/{path}", data=data or None) as answer:
                answer.raise_for_status()
                return (await answer.json())["data"]

        async def watch_tasks(node: str) -> None:
            while True:
                await asyncio.sleep(0.05)
                if waiting:
                    tasks = await send_request("GET", f"nodes/{node}/tasks?source=all&limit=500")
                    for task in tasks:
                        future = waiting.pop(task["upid"], None) if task.get("endtime") else None
                        if future:
                            future.set_result(task["status"])

        async def destroy_vm(vm: dict[str, Any]) -> None:
            async with slots:
                path = f"nodes/{vm['node']}/qemu/{vm['vmid']}"
                config = await send_request("GET", f"{path}/config")
                mark = f"{config['description']}gone"
                await send_request("PUT", f"{path}/config", description=mark, digest=config["digest"])
                upid = str(await send_request("DELETE", f"{path}?purge=1"))
                waiting[upid] = asyncio.get_running_loop().create_future()
                assert await waiting[upid] == "OK"

        listed = await send_request("GET", "cluster/resources?type=vm")
        vms = [vm for vm in listed if first <= vm["vmid"] < first + count]
        watchers = [asyncio.create_task(watch_tasks(node)) for node in {vm["node"] for vm in vms}]
        await asyncio.gather(*map(destroy_vm, vms))
        for watcher in watchers:
            watcher.cancel()
        remaining = {vm["vmid"] for vm in await send_request("GET", "cluster/resources?type=vm")}
        assert len(vms) == count and not remaining & {vm["vmid"] for vm in vms}


if __name__ == "__main__":
    asyncio.run(destroy_vms(*map(int, sys.argv[1:4])))
