# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What every measurement stands on: the canned Proxmox as a process, databases of any size, and playbooks run as a
user runs them.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / ".collections"), str(Path(__file__).resolve().parent)]

import canned
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

FIRST = 1000
TOKEN_ID = "bench@pve!bench"
TOKEN_SECRET = "00000000-0000-0000-0000-000000000000"


class Canned:
    """The server, in a process of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, canned.__file__, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        told = json.loads(self._process.stdout.readline())
        self.port, self.ca, self.fingerprint = int(told["port"]), str(told["ca"]), str(told["fingerprint"])
        self._tls = ssl.create_default_context(cafile=self.ca)

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPSConnection(canned.HOST, self.port, context=self._tls, timeout=60)
        try:
            connection.request(method, path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def reset(self, **settings: Any) -> None:
        """A new cluster (see canned.Settings), and no requests counted."""
        self._ask("POST", "/control", json.dumps(settings))

    def counts(self) -> Counter[str]:
        """Requests since the last reset, by kind."""
        return Counter(self._ask("GET", "/counts")["counts"])

    def state(self) -> dict[str, Any]:
        return dict(self._ask("GET", "/counts"))

    def cpu_seconds(self) -> float:
        """Processor time it has used so far."""
        import psutil

        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def environment(self, database: str, **more: str) -> dict[str, str]:
        """What a user would set; a token that sees everything, the cluster's own CA, an empty configuration."""
        Path(self.folder, "empty.yaml").touch()
        return {
            "PROXMOX_HOST": canned.HOST,
            "PROXMOX_PORT": str(self.port),
            "PROXMOX_USER": "bench@pve",
            "PROXMOX_TOKEN_ID": TOKEN_ID,
            "PROXMOX_TOKEN_SECRET": TOKEN_SECRET,
            "PROXMOX_CA_PATH": self.ca,
            "AGENTLAB_DATABASE": database,
            "AGENTLAB_CONFIG": f"{self.folder}/empty.yaml",
            **more,
        }

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@contextmanager
def field() -> Iterator[Canned]:
    """A folder with a canned Proxmox in it."""
    with tempfile.TemporaryDirectory(prefix="agentlab-bench-") as folder:
        server = Canned(folder)
        try:
            yield server
        finally:
            server.stop()


def seed(
    server: Canned,
    path: str,
    count: int,
    state: str = "STOPPED",
    *,
    nodes: int = 1,
    history: int = 0,
    first: int = FIRST,
    addresses: bool = False,
) -> str:
    """A new database with ``count`` sandboxes of the canned cluster, and so many DESTROYED ones before them; returns
    its path. With ``addresses`` each guest has just named its address.
    """
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    database = Database(path)
    now = int(time.time())
    columns = (
        "uuid, vmid, name, state, node, ttl_seconds, lease_expires_at, created_at, updated_at, state_changed_at, "
        "smbios_uuid, ip, ip_seen_at"
    )
    into = f"INSERT INTO sandboxes ({columns}) VALUES ({', '.join('?' * 13)})"
    lease = now - 3600 if state == "TIMEOUT" else now + 3600

    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(history):
            gone = now - 10 * (history - number)
            yield (
                f"{number:032x}",
                100000 + number % 5000,
                f"gone-{number}",
                "DESTROYED",
                "pve1",
                3600,
                gone,
                gone,
                gone,
                gone,
                f"{number:032x}",
                None,
                None,
            )
        for vmid in range(first, first + count):
            yield (
                canned.sandbox_uuid(vmid),
                vmid,
                f"bench-{vmid}",
                state,
                f"pve{vmid % nodes + 1}",
                3600,
                lease,
                now - 7200,
                now - 3600,
                now - 3600,
                canned.smbios_uuid(vmid),
                f"10.{vmid >> 16}.{vmid >> 8 & 255}.{vmid & 255}" if addresses else None,
                now if addresses else None,
            )

    def work(conn: Any) -> None:
        conn.executemany(into, rows())
        found = {
            "name": "bench",
            "nodes": sorted(f"pve{number + 1}" for number in range(nodes)),
            "authority": server.fingerprint,
        }
        conn.execute("INSERT OR REPLACE INTO meta VALUES ('cluster', ?)", (json.dumps(found),))

    database.write(work)
    database.close()
    return path


def context(server: Canned, database: str, *, dry_run: bool = False, **options: Any) -> Context:
    """A run of the core in this process."""
    found = config.load(options, server.environment(database))
    return Context(found, actor="benchmark", dry_run=dry_run, clock=clock.SystemClock())


# ---- playbooks ----


def playbook(folder: str, name: str, plays: list[dict[str, Any]]) -> str:
    path = os.path.join(folder, f"{name}.yml")
    Path(path).write_text(yaml.safe_dump(plays, sort_keys=False), encoding="utf-8")
    return path


def play(*tasks: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """One play on localhost with these tasks."""
    return [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "connection": "local",
            "vars": {"ansible_python_interpreter": "{{ ansible_playbook_python }}"},
            "tasks": list(tasks),
            **more,
        }
    ]


class Failed(Exception):
    """A command that was to be measured did not do its work."""


# No measurement takes as long.
_LONGEST_SECONDS = 900.0


def timed(command: list[str], env: dict[str, str], folder: str) -> float:
    """Wall time of a command that must succeed, seconds."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR") if name in os.environ}
    # A token's secret may be on nobody's screen, and nobody's Ansible configuration decides a measurement.
    whole = {
        **kept,
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": f"{folder}/ansible",
        "ANSIBLE_LOCAL_TEMP": f"{folder}/ansible/tmp",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        **env,
    }
    began = time.perf_counter()
    done = subprocess.run(
        command,
        env=whole,
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=_LONGEST_SECONDS,
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return took


def resident_kb(pid: int | str, *, most: bool = False) -> int:
    """Resident memory of a process, kB: now, or the most since its program began (``ru_maxrss`` would count the
    parent that it was forked from too).
    """
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:" if most else "VmRSS:"))
