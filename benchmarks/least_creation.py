# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The least that a safe creation can be: choose a VMID, clone with a mark, see the task end, read what was made,
write the hardware against its digest, start it, see that task end. No records, no checks, one connection.

    python benchmarks/least_creation.py TEMPLATE      # reaches Proxmox by the environment that the collection uses
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlencode

LOOK_SECONDS = 0.1


def main(template: int) -> None:
    env = os.environ
    tls = ssl.create_default_context(cafile=env["PROXMOX_CA_PATH"])
    connection = http.client.HTTPSConnection(env["PROXMOX_HOST"], int(env["PROXMOX_PORT"]), context=tls)
    headers = {
        "Authorization": f"PVEAPIToken={env['PROXMOX_TOKEN_ID']}={env['PROXMOX_TOKEN_SECRET']}",
        "Content-Type": "application/x-www-form-urlencoded",
    }

    def ask(method: str, path: str, **values: object) -> Any:
        connection.request(method, f"/api2/json/{path}", urlencode(values) if values else None, headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{method} {path}: {answer.status} {body[:200]!r}")
        return json.loads(body)["data"]

    def wait(upid: str) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            status = ask("GET", f"nodes/{node}/tasks/{upid}/status")
            if status["status"] == "stopped":
                assert status["exitstatus"] == "OK", status
                return

    rows = {row["vmid"]: row for row in ask("GET", "cluster/resources?type=vm")}
    node = rows[template]["node"]
    vmid = next(number for number in range(1000, 2000) if number not in rows)
    wait(ask("POST", f"nodes/{node}/qemu/{template}/clone", newid=vmid, name="least", description="ours"))
    config = ask("GET", f"nodes/{node}/qemu/{vmid}/config")
    ask("PUT", f"nodes/{node}/qemu/{vmid}/config", cores=2, memory=1024, digest=config["digest"])
    wait(ask("POST", f"nodes/{node}/qemu/{vmid}/status/start"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
