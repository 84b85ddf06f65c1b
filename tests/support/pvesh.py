# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A stand-in for pvesh, run as a program on "node" pve1: it speaks to the double and prints as the real one does.

- It waits for tasks: log lines and then the id in quotes; on another node both glued into one JSON string. A failed
  task exits with 0 and tells its error on standard error.
- A config write prints ``update VM N: ...`` on this node, nothing on another one.
- A refusal exits with some number but 0, which means nothing; another node's begins with "proxy handler failed:".
- Without a UTF-8 locale what is not ASCII breaks, and a locale that is not installed costs nine lines of warnings.
- pmxcfs admits only group 0 (PVESH_PMXCFS=1 asks for that).

tests/unit/test_pvesh_recorded.py holds it to answers of the real program.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import sys
import time
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

METHODS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}
THIS_NODE = "pve1"
LOCALE = """perl: warning: Setting locale failed.
perl: warning: Please check that your locale settings:
\tLANGUAGE = (unset),
\tLC_ALL = (unset),
\tLANG = "{0}"
    are supported and installed on your system.
perl: warning: Falling back to the standard locale ("C").
"""


class Double:
    """The double's API.

    By http.client: this program is started for every request, and requests takes longer to import than to answer.
    """

    def __init__(self) -> None:
        where = urlsplit(os.environ["PVESH_URL"])
        self._headers = {"Authorization": "PVEAPIToken=" + os.environ["PVESH_TOKEN"]}
        self._connection = http.client.HTTPSConnection(
            where.netloc, timeout=30, context=ssl.create_default_context(cafile=os.environ["PVESH_CA"])
        )

    def ask(self, method: str, path: str, values: dict[str, Any]) -> tuple[int, str, dict[str, Any]]:
        """Return status, reason, and the body (empty if there is none)."""
        sent = urlencode(values, doseq=True)
        url = f"/api2/json/{quote(path.lstrip('/'), safe='/:!@-._~')}"
        if method in ("GET", "DELETE"):
            self._connection.request(method, f"{url}?{sent}" if sent else url, headers=self._headers)
        else:
            self._connection.request(
                method, url, sent, {**self._headers, "Content-Type": "application/x-www-form-urlencoded"}
            )
        answer = self._connection.getresponse()
        text = answer.read()
        return answer.status, answer.reason, json.loads(text) if text.startswith(b"{") else {}


def parse(words: list[str]) -> dict[str, Any]:
    """Return options and values; an option that is repeated has a list."""
    values: dict[str, Any] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        name = name.lstrip("-")
        values[name] = (
            value
            if name not in values
            else [*([values[name]] if isinstance(values[name], str) else values[name]), value]
        )
    values.pop("output-format", None)
    return values


def refuse(command: str, reason: str, errors: dict[str, Any], remote: bool) -> int:
    """Print a refusal and return the exit status."""
    lines = [reason]
    unknown = next((name for name, text in errors.items() if "not defined in schema" in text), None)
    if unknown and not remote:
        lines = [
            f"Unknown option: {unknown}",
            "400 unable to parse option",
            f"pvesh {command} <api_path> [OPTIONS] [FORMAT_OPTIONS]",
        ]
    elif errors:
        lines = [
            f"400 {reason}",
            *(f"{name}: {text}" for name, text in errors.items()),
            f"pvesh {command} <api_path> [OPTIONS] [FORMAT_OPTIONS]",
        ]
    elif remote and not reason.startswith("hostname lookup"):
        lines = [f"proxy handler failed: {reason}"]
    print("\n".join(lines), file=sys.stderr)
    return 2 if "does not exist" in reason else 255


def main() -> int:
    """Answer one call of pvesh, and return its exit status."""
    command, path, *rest = sys.argv[1:]
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or "C"
    if os.environ.get("PVESH_PMXCFS") and os.getegid() != 0:
        print(
            "ipcc_send_rec[1] failed: Unknown error -1\n" * 3 + "Unable to load access control list: Unknown error -1",
            file=sys.stderr,
        )
        return 255
    if locale not in ("C", "C.UTF-8", "POSIX"):
        print(LOCALE.format(locale), end="", file=sys.stderr)
    if not locale.lower().replace("-", "").endswith("utf8"):
        rest = [
            re.sub(r"[^\x00-\x7f]", lambda char: "\N{REPLACEMENT CHARACTER}" * len(char[0].encode()), word)
            for word in rest
        ]
    method = METHODS[command]
    values = parse(rest)
    node = re.match(r"/nodes/([^/]+)", path)
    remote = node is not None and node[1] != THIS_NODE
    double = Double()
    status, reason, body = double.ask(method, path, values)
    reason = str(body.get("message") or reason).strip()
    if status == 595:
        print("proxy handler failed: ssh: connect to host 192.0.2.2 port 22: No route to host", file=sys.stderr)
        return 255
    if status == 501:
        print(f"No '{command}' handler defined for '{path}'", file=sys.stderr)
        return 1
    config = method == "PUT" and re.search(r"/qemu/(\d+)/config$", path)
    # Nothing is printed of a write that was refused for its digest, its lock or its values.
    written = status < 400 or "Permission denied" in reason
    if config and written and not remote:
        print(
            f"update VM {config[1]}: "
            + " ".join(f"-{name} {value}" for name, value in values.items() if name != "digest")
        )
        if not all(str(value).isascii() for value in values.values()):
            print("Wide character in print at /usr/share/perl5/PVE/API2/Qemu.pm line 2345.", file=sys.stderr)
    if status >= 400:
        return refuse(command, reason, body.get("errors") or {}, remote)
    data = body["data"]
    lines: list[str] = []
    if isinstance(data, str) and data.startswith("UPID:"):
        where = f"nodes/{data.split(':')[1]}/tasks/{data}"
        while True:
            task = double.ask("GET", f"{where}/status", {})[2]["data"]
            if task["status"] != "running":
                break
            time.sleep(0.02)
        log = double.ask("GET", f"{where}/log", {"limit": 500})[2].get("data") or []
        lines = [
            row["t"]
            for row in log
            if row["t"] and row["t"] != task["exitstatus"] and not row["t"].startswith(("TASK ", "unable to open file"))
        ]
        first = {"qmclone": f"creating a clone of VM {data.split(':')[6]}"}
        if task["exitstatus"] == "OK":
            # The start of a VM with a cloud-init drive.
            first |= {"qmstart": "generating cloud-init ISO", "resize": "Image resized."}
        elif task["exitstatus"].startswith("WARNINGS"):
            first |= {"qmdestroy": "WARN: failed to get path and owner of volume 'nostore:0/vm-0-disk-0.qcow2'"}
        elif task["exitstatus"] == "unexpected status":
            lines, first = [], {}
        lines = lines or [line for kind, line in first.items() if kind == data.split(":")[5]]
        if task["exitstatus"].startswith("WARNINGS"):
            print(f"Task finished with {task['exitstatus'].split()[-1]} warning(s)!", file=sys.stderr)
        elif task["exitstatus"] == "unexpected status":
            print("got unexpected control message: ", file=sys.stderr)
        elif task["exitstatus"] != "OK":
            print(task["exitstatus"], file=sys.stderr)
    elif method == "POST" and path.endswith("/content"):
        lines = [f"Formatting '/var/lib/vz/images/{data}', fmt=qcow2"]
    if remote and lines:
        print(json.dumps("".join(lines) + json.dumps(data)))
        return 0
    for line in lines:
        print(line)
    if data is not None:
        print(json.dumps(data, ensure_ascii=False, separators=(",", ":"), sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
