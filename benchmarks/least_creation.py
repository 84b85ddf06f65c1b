# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Create a VM with the fewest requests that a safe creation can have. Row 18 compares our creation with it.

It chooses a VMID, clones the template with a mark, waits for the task, reads the configuration, writes the hardware
against its digest, starts the VM, and waits for that task. It keeps no records, checks nothing else, and uses one
connection.

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

POLL_SECONDS = 0.1


def create_vm(template: int) -> None:
    """Create and start a VM from the template with that VMID. Raises SystemExit when Proxmox VE refuses a request."""
    env = os.environ
    tls = ssl.create_default_context(cafile=env["PROXMOX_CA_PATH"])
    connection = http.client.HTTPSConnection(env["PROXMOX_HOST"], int(env["PROXMOX_PORT"]), context=tls)
    headers = {
        "Authorization": f"PVEAPIToken={env['PROXMOX_TOKEN_ID']}={env['PROXMOX_TOKEN_SECRET']}",
        "Content-Type": "application/x-www-form-urlencoded",
    }

    def send_request(method: str, path: str, **values: object) -> Any:
        connection.request(method, f"/api2/json/{path}", urlencode(values) if values else None, headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{method} {path}: {answer.status} {body[:200]!r}")
        return json.loads(body)["data"]

    def wait_for_task(upid: str) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            status = send_request("GET", f"nodes/{node}/tasks/{upid}/status")
            if status["status"] == "stopped":
                assert status["exitstatus"] == "OK", status
                return

    rows = {row["vmid"]: row for row in send_request("GET", "cluster/resources?type=vm")}
    node = rows[template]["node"]
    vmid = next(number for number in range(1000, 2000) if number not in rows)
    options = {"newid": vmid, "name": "least", "description": "ours"}
    wait_for_task(send_request("POST", f"nodes/{node}/qemu/{template}/clone", **options))
    config = send_request("GET", f"nodes/{node}/qemu/{vmid}/config")
    send_request("PUT", f"nodes/{node}/qemu/{vmid}/config", cores=2, memory=1024, digest=config["digest"])
    wait_for_task(send_request("POST", f"nodes/{node}/qemu/{vmid}/status/start"))


if __name__ == "__main__":
    create_vm(int(sys.argv[1]))
