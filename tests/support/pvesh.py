# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stand-in for pvesh, run as a program: it speaks to the double and prints as the real one does.

Tasks run in the foreground: their log, then their id, and exit 0 even when they failed. A config write prints ``update VM N: ...`` and returns
nothing. Errors go to standard error; a missing VM exits with 2.
"""

from __future__ import annotations

import json
import os
import sys
import time

import requests

METHODS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}


def main() -> int:
    command, path, *rest = sys.argv[1:]
    values = {rest[i].lstrip("-"): rest[i + 1] for i in range(0, len(rest) - 1, 2)}
    values.pop("output-format", None)
    base = os.environ["PVESH_URL"] + "/api2/json"
    session = requests.Session()
    session.headers["Authorization"] = "PVEAPIToken=" + os.environ["PVESH_TOKEN"]
    # Given with each request: REQUESTS_CA_BUNDLE, where it is set, wins over the session's.
    ca = os.environ["PVESH_CA"]
    method = METHODS[command]
    url = base + "/" + path.lstrip("/")
    sent = {"params": values} if method in ("GET", "DELETE") else {"data": values}
    answer = session.request(method, url, timeout=30, verify=ca, **sent)  # type: ignore[arg-type]
    if answer.status_code >= 400:
        body = answer.json() if answer.text else {}
        if method == "PUT":
            print(f"update VM: {values}")
        lines = [f"{answer.status_code} {answer.reason}" if answer.status_code == 400 else answer.reason]
        lines += [f"{name}: {text}" for name, text in (body.get("errors") or {}).items()]
        print("\n".join(lines), file=sys.stderr)
        return 2
    data = answer.json()["data"]
    if isinstance(data, str) and data.startswith("UPID:"):
        node = data.split(":")[1]
        print("a line of the task's log")
        while session.get(f"{base}/nodes/{node}/tasks/{data}/status", timeout=30, verify=ca).json()["data"]["status"] == "running":
            time.sleep(0.02)
        print(json.dumps(data))
    elif method == "PUT":
        print(f"update VM {path.split('/')[-2]}: " + " ".join(f"-{name} {value}" for name, value in values.items()))
    else:
        print(json.dumps(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
