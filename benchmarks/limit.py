# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The limit to compare with: destroy VMs with asyncio, as many at once as we do, with the fewest requests that keep
our promises (the identity is
read, the VM is marked, the task's end is read), and nothing else: no records, no journal, no proof of absence.

    python benchmarks/limit.py FIRST COUNT IN_FLIGHT      # reaches Proxmox by the environment that the collection uses
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys

import aiohttp


async def main(first: int, count: int, in_flight: int) -> None:
    env = os.environ
    base = f"https://{env['PROXMOX_HOST']}:{env['PROXMOX_PORT']}/api2/json"
    headers = {"Authorization": f"PVEAPIToken={env['PROXMOX_TOKEN_ID']}={env['PROXMOX_TOKEN_SECRET']}"}
    tls = ssl.create_default_context(cafile=env["PROXMOX_CA_PATH"])
    waiting: dict[str, asyncio.Future[str]] = {}
    slots = asyncio.Semaphore(in_flight)
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=in_flight, ssl=tls)
    ) as session:

        async def ask(method: str, path: str, **data: object) -> object:
            async with session.request(method, f"{base}/{path}", data=data or None) as answer:
                answer.raise_for_status()
                return (await answer.json())["data"]

        async def watch(node: str) -> None:
            while True:
                await asyncio.sleep(0.05)
                if waiting:
                    rows = await ask("GET", f"nodes/{node}/tasks?source=all&limit=500")
                    for row in rows:  # type: ignore[attr-defined]
                        future = waiting.pop(row["upid"], None) if row.get("endtime") else None
                        if future:
                            future.set_result(row["status"])

        async def destroy(row: dict[str, object]) -> None:
            async with slots:
                path = f"nodes/{row['node']}/qemu/{row['vmid']}"
                config = await ask("GET", f"{path}/config")
                await ask("PUT", f"{path}/config", description=f"{config['description']}gone", digest=config["digest"])  # type: ignore[index]
                upid = str(await ask("DELETE", f"{path}?purge=1"))
                waiting[upid] = asyncio.get_running_loop().create_future()
                assert await waiting[upid] == "OK"

        rows = [row for row in await ask("GET", "cluster/resources?type=vm") if first <= row["vmid"] < first + count]  # type: ignore[attr-defined]
        watchers = [asyncio.create_task(watch(node)) for node in {row["node"] for row in rows}]
        await asyncio.gather(*map(destroy, rows))
        for watcher in watchers:
            watcher.cancel()
        left = {row["vmid"] for row in await ask("GET", "cluster/resources?type=vm")}  # type: ignore[attr-defined]
        assert len(rows) == count and not left & {row["vmid"] for row in rows}


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:4])))
