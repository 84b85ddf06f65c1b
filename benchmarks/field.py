# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Set up what is measured: the canned Proxmox VE as a process, databases of any size, playbooks, and timed commands."""

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
from collections.abc import Callable, Iterator
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
from canned_cluster import make_sandbox_uuid, make_smbios_uuid

FIRST_VMID = 1000
TOKEN_ID = "bench@pve!bench"
TOKEN_SECRET = "00000000-0000-0000-0000-000000000000"
# No measured command takes longer.
_LONGEST_SECONDS = 900.0


class CannedProxmox:
    """A canned Proxmox VE (canned.py) in a process of its own, with its files in ``folder``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, canned.__file__, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        server = json.loads(self._process.stdout.readline())
        self.port, self.ca, self.fingerprint = int(server["port"]), str(server["ca"]), str(server["fingerprint"])
        self._tls = ssl.create_default_context(cafile=self.ca)

    def _send(self, method: str, path: str, body: str | None = None) -> Any:
        """Send a request beside the API of Proxmox VE, and return its JSON."""
        connection = http.client.HTTPSConnection(canned.HOST, self.port, context=self._tls, timeout=60)
        try:
            connection.request(method, path, body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def reset(self, **settings: Any) -> None:
        """Start a new cluster (see canned_cluster.Settings), and count requests from zero."""
        self._send("POST", "/control", json.dumps(settings))

    def read_request_counts(self) -> Counter[str]:
        """Return how many requests came since the last reset, by kind."""
        return Counter(self.read_state()["counts"])

    def read_state(self) -> dict[str, Any]:
        """Return the request counts, the number of VMs, and the most tasks that ran at the same time."""
        return dict(self._send("GET", "/counts"))

    def read_cpu_seconds(self) -> float:
        """Return the processor time that the server has used so far, in seconds."""
        import psutil

        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def make_environment(self, database: str, **variables: str) -> dict[str, str]:
        """Return the environment that a user would set, with ``variables`` added.

        It has a token that may see everything, the cluster's own CA, and an empty configuration. ``database``: path of
        the records.
        """
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
            **variables,
        }

    def stop(self) -> None:
        """End the process, which takes the end of its standard input as the sign to stop."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@contextmanager
def run_canned_proxmox() -> Iterator[CannedProxmox]:
    """Run a canned Proxmox VE in a temporary folder, and yield it. Both are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="agentlab-bench-") as folder:
        server = CannedProxmox(folder)
        try:
            yield server
        finally:
            server.stop()


# ---- records ----


def create_database(
    fingerprint: str,
    path: str,
    count: int,
    state: str = "STOPPED",
    *,
    nodes: int = 1,
    history: int = 0,
    addresses: bool = False,
) -> None:
    """Create a new SQLite database with ``count`` sandboxes of the canned cluster, and replace one at that path.

    ``fingerprint``: that of the cluster's CA, which the records know the cluster by. ``state`` is that of each sandbox;
    the lease of a TIMEOUT one ended an hour ago. ``nodes``: how many nodes the sandboxes are spread over. ``history``:
    how many DESTROYED sandboxes are written before them. With ``addresses`` each guest has just named its address.
    """
    for suffix in ("", "-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    database = Database(path)
    now = int(time.time())
    columns = (
        "uuid, vmid, name, state, node, ttl_seconds, lease_expires_at, created_at, updated_at, state_changed_at, "
        "smbios_uuid, ip, ip_seen_at"
    )
    insert = f"INSERT INTO sandboxes ({columns}) VALUES ({', '.join('?' * 13)})"
    lease_end = now - 3600 if state == "TIMEOUT" else now + 3600

    def make_rows() -> Iterator[tuple[Any, ...]]:
        for number in range(history):
            destroyed_at = now - 10 * (history - number)
            yield (
                f"{number:032x}",
                100000 + number % 5000,
                f"gone-{number}",
                "DESTROYED",
                "pve1",
                3600,
                destroyed_at,
                destroyed_at,
                destroyed_at,
                destroyed_at,
                f"{number:032x}",
                None,
                None,
            )
        for vmid in range(FIRST_VMID, FIRST_VMID + count):
            yield (
                make_sandbox_uuid(vmid),
                vmid,
                f"bench-{vmid}",
                state,
                f"pve{vmid % nodes + 1}",
                3600,
                lease_end,
                now - 7200,
                now - 3600,
                now - 3600,
                make_smbios_uuid(vmid),
                f"10.{vmid >> 16}.{vmid >> 8 & 255}.{vmid & 255}" if addresses else None,
                now if addresses else None,
            )

    def insert_rows(conn: Any) -> None:
        conn.executemany(insert, make_rows())
        cluster = {
            "name": "bench",
            "nodes": sorted(f"pve{number + 1}" for number in range(nodes)),
            "authority": fingerprint,
        }
        conn.execute("INSERT OR REPLACE INTO meta VALUES ('cluster', ?)", (json.dumps(cluster),))

    database.write(insert_rows)
    database.close()


def open_context(server: CannedProxmox, database: str, *, dry_run: bool = False, **options: Any) -> Context:
    """Open a run of the core in this process, on a database and the canned Proxmox VE.

    ``dry_run``: check mode. ``options``: the module's options. The caller closes the context.
    """
    settings = config.load(options, server.make_environment(database))
    return Context(settings, actor="benchmark", dry_run=dry_run, clock=clock.SystemClock())


# ---- playbooks ----


def write_playbook(folder: str, name: str, plays: list[dict[str, Any]]) -> str:
    """Write plays to ``name``.yml in a folder, and return the path."""
    path = os.path.join(folder, f"{name}.yml")
    Path(path).write_text(yaml.safe_dump(plays, sort_keys=False), encoding="utf-8")
    return path


def make_play(*tasks: dict[str, Any], **keywords: Any) -> list[dict[str, Any]]:
    """Return the list with one play on localhost that has these tasks. ``keywords`` of the play replace ours."""
    return [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "connection": "local",
            "vars": {"ansible_python_interpreter": "{{ ansible_playbook_python }}"},
            "tasks": list(tasks),
            **keywords,
        }
    ]


# ---- measuring ----


class CommandFailed(Exception):
    """A measured command ended with an error, so its time says nothing."""


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call of the work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_command(command: list[str], env: dict[str, str], folder: str) -> float:
    """Run a command in a folder, and return its wall time in seconds.

    ``env`` is added to an environment without settings of Ansible that a user may have. Raises CommandFailed when the
    command fails, with the end of its output.
    """
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR") if name in os.environ}
    # The caller's environment may hold a token's secret, and the caller's Ansible configuration must not decide a
    # measurement. So only these reach the command.
    environment = {
        **inherited,
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
    process = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=_LONGEST_SECONDS,
    )
    seconds = time.perf_counter() - began
    if process.returncode:
        raise CommandFailed(
            f"{' '.join(command)} ended with {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
        )
    return seconds


def read_resident_kb(pid: int | str, *, peak: bool = False) -> int:
    """Return the resident memory of a process in kB: now, or with ``peak`` the most since its program began.

    ``ru_maxrss`` would count the parent that the process was forked from as well.
    """
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:" if peak else "VmRSS:"))
