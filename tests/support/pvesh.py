# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stand-in for pvesh, run as a program: it speaks to the double and prints as the real one does.

Tasks run in the foreground: their log, then their id, and exit 0 even when they failed. A config write prints ``update VM N: ...`` and returns
nothing. Errors go to standard error; a missing VM exits with 2.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
from urllib.parse import urlencode, urlsplit

METHODS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}


class Double:
    """The double's API. By http.client: this program is started for every request, and requests takes longer to import than to answer."""

    def __init__(self) -> None:
        where = urlsplit(os.environ["PVESH_URL"])
        self._headers = {"Authorization": "PVEAPIToken=" + os.environ["PVESH_TOKEN"]}
        self._connection = http.client.HTTPSConnection(where.netloc, timeout=30, context=ssl.create_default_context(cafile=os.environ["PVESH_CA"]))

    def ask(self, method: str, path: str, values: dict[str, str]) -> tuple[int, str, dict[str, object]]:
        """Status, reason, and the body (empty if there is none)."""
        sent = urlencode(values)
        url = f"/api2/json/{path.lstrip('/')}"
        if method in ("GET", "DELETE"):
            self._connection.request(method, f"{url}?{sent}" if sent else url, headers=self._headers)
        else:
            self._connection.request(method, url, sent, {**self._headers, "Content-Type": "application/x-www-form-urlencoded"})
        answer = self._connection.getresponse()
        text = answer.read()
        return answer.status, answer.reason, json.loads(text) if text else {}


def main() -> int:
    command, path, *rest = sys.argv[1:]
    values = {rest[i].lstrip("-"): rest[i + 1] for i in range(0, len(rest) - 1, 2)}
    values.pop("output-format", None)
    double = Double()
    method = METHODS[command]
    status, reason, body = double.ask(method, path, values)
    if status >= 400:
        if method == "PUT":
            print(f"update VM: {values}")
        errors = body.get("errors") or {}
        assert isinstance(errors, dict)
        lines = [f"{status} {reason}" if status == 400 else reason]
        lines += [f"{name}: {text}" for name, text in errors.items()]
        print("\n".join(lines), file=sys.stderr)
        return 2
    data = body["data"]
    if isinstance(data, str) and data.startswith("UPID:"):
        node = data.split(":")[1]
        print("a line of the task's log")
        while double.ask("GET", f"nodes/{node}/tasks/{data}/status", {})[2]["data"]["status"] == "running":  # type: ignore[index]
            time.sleep(0.02)
        print(json.dumps(data))
    elif method == "PUT":
        print(f"update VM {path.split('/')[-2]}: " + " ".join(f"-{name} {value}" for name, value in values.items()))
    else:
        print(json.dumps(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
