# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows 12, 19 and 21: the real daemon as a process, against the canned Proxmox VE; and the command line on it."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from field import FIRST_VMID, REPO, measure_seconds, open_context, read_resident_kb, time_command
from harness import Bench
from judging import Row, make_row

# Row 12: records, clients at the same time, how long lists are counted, and the targets.
RECORDS = 1000
CLIENTS = 200
LIST_SECONDS = 3.0
MOST_MB = 55
LEAST_A_SECOND = 40
# Row 19: the most seconds of a list beyond curl, and of --version.
LIST_SECONDS_BEYOND, VERSION_SECONDS = 0.25, 0.12
# Row 21: records, nodes and seconds between reconciles; the most seconds of a list, and kB of memory per sandbox.
MANY_RECORDS, MANY_NODES, MANY_INTERVAL = 10_000, 16, 2
MANY_LIST_SECONDS, MANY_KB_EACH = 0.3, 9.0


class Daemon:
    """A process of agentlabd on the records of a bench. ``options``: more of its configuration."""

    def __init__(self, bench: Bench, **options: str) -> None:
        self.socket = f"{bench.folder}/agentlabd.sock"
        options = {
            **options,
            "socket": self.socket,
            "cleanup_file": f"{bench.folder}/none-cleanup.yaml",
            "profiles_dir": f"{bench.folder}/none-profiles",
        }
        file = Path(bench.folder, "agentlabd.yaml")
        file.write_text(json.dumps(options), encoding="utf-8")
        # Take the environment of the role's unit, apart from paths: it decides how much memory the daemon needs.
        unit = (REPO / "roles/agentlabd/templates/agentlabd.service.j2").read_text(encoding="utf-8")
        unit_env = dict(re.findall(r" (\w+)=([\w.]+)(?= |$)", " ".join(re.findall(r"^Environment=(.*)$", unit, re.M))))
        env = {
            **unit_env,
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **bench.env,
            "PYTHONPATH": str(_install_code(bench.folder)),
            "AGENTLAB_CONFIG": str(file),
        }
        self._log = Path(bench.folder, "agentlabd.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentlabd"], env=env, cwd=bench.folder, stdout=log, stderr=log
            )

    def send_request(
        self, method: str, path: str, body: Any = None, connection: http.client.HTTPConnection | None = None
    ) -> tuple[int, bytes]:
        """Send a request with a JSON body, and return HTTP status and body of the answer.

        Without ``connection`` the request opens one of its own. Raises OSError and http.client.HTTPException.
        """
        used_connection = connection or self.open_connection()
        try:
            text = None if body is None else json.dumps(body)
            used_connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = used_connection.getresponse()
            return answer.status, answer.read()
        finally:
            if connection is None:
                used_connection.close()

    def open_connection(self) -> http.client.HTTPConnection:
        """Open a connection to the daemon's socket. Raises OSError when the daemon does not serve."""
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(60)
        connection.sock.connect(self.socket)
        return connection

    def await_ready(self) -> None:
        """Wait until the daemon serves and its first reconcile has ended, for at most 120 s.

        Raises RuntimeError when the daemon ended, the reconcile failed, or the time is over.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"agentlabd ended with {self._process.returncode}: {self._log.read_text(errors='replace')[-1000:]}"
                )
            with contextlib.suppress(OSError):
                status = json.loads(self.send_request("GET", "/v1/status")[1])
                if status["reconcile"]["last_run"]:
                    return
                if status["reconcile"]["last_error"]:
                    raise RuntimeError(f"reconcile: {status['reconcile']['last_error']}")
            time.sleep(0.1)
        raise RuntimeError("agentlabd was not ready within 120 s")

    def await_reconciles(self, count: int) -> None:
        """Wait until so many more reconciles have ended, for at most 300 s.

        Raises RuntimeError when a reconcile failed or the time is over.
        """
        last_run, deadline = None, time.monotonic() + 300
        # The first run that is seen has ended before.
        while count >= 0:
            status = json.loads(self.send_request("GET", "/v1/status")[1])
            if status["reconcile"]["last_error"]:
                raise RuntimeError(f"reconcile: {status['reconcile']['last_error']}")
            if status["reconcile"]["last_run"] != last_run:
                last_run, count = status["reconcile"]["last_run"], count - 1
            if time.monotonic() > deadline:
                raise RuntimeError("the reconciles did not end within 300 s")
            time.sleep(0.2)

    def list_sandboxes(self) -> None:
        """Ask the daemon for the list of all sandboxes, on a connection of its own."""
        status, _body = self.send_request("GET", "/v1/sandboxes")
        assert status == 200

    @property
    def megabytes(self) -> float:
        """Return the resident memory of the daemon, in MB."""
        return read_resident_kb(self._process.pid) / 1024

    @property
    def cpu_seconds(self) -> float:
        """Return the processor time that all threads of the daemon have used, in seconds."""
        import psutil

        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def stop(self) -> None:
        """Terminate the daemon, and kill it after 30 s."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def _install_code(folder: str) -> Path:
    """Copy the code as the role installs it, compiled and without links, and return the path of the copy."""
    target = Path(folder, "lib")
    if not target.exists():
        for source, copy in (
            ("roles/agentlabd/files", target),
            ("plugins/module_utils/_core", target / "agentlab_core"),
        ):
            shutil.copytree(REPO / source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(target)], check=True)
    return target


@contextlib.contextmanager
def run_daemon(
    bench: Bench, count: int, *, nodes: int = 1, addresses: bool = False, **options: str
) -> Iterator[Daemon]:
    """Run a daemon with so many running sandboxes, whose VMs are in a new cluster, and yield it once it is ready.

    ``nodes`` and ``addresses``: as for field.create_database. ``options``: more of the daemon's configuration.
    """
    bench.reset_cluster(count, status="running", nodes=nodes)
    bench.write_records(count, "RUNNING", nodes=nodes, addresses=addresses)
    daemon = Daemon(bench, **options)
    try:
        daemon.await_ready()
        yield daemon
    finally:
        daemon.stop()


# ---- row 12 ----


def measure_daemon(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 12: memory at rest and after work, lists of a thousand, and two hundred clients at once."""
    at_rest, after_load, rates = [], [], []
    errors: Counter[str] = Counter()
    with run_daemon(bench, RECORDS) as daemon:
        first_start = daemon.megabytes
    for _run in range(bench.runs):
        with run_daemon(bench, RECORDS) as daemon:
            at_rest.append(daemon.megabytes)
            errors.update(run_clients(daemon))
            rates.append(measure_list_rate(daemon, LIST_SECONDS))
            after_load.append(daemon.megabytes)
    memory, memory_after, rate = (statistics.median(values) for values in (at_rest, after_load, rates))
    error_count = sum(errors.values())
    return [
        make_row(
            "12",
            f"daemon: resident memory; list of {RECORDS:,}; {CLIENTS} clients at once",
            f"at most {MOST_MB} MB; at least {LEAST_A_SECOND} a second on one core; no error",
            f"{memory:.0f} MB ({memory_after:.0f} after the load); {rate:.0f} a second; "
            f"{f'{error_count} errors: {dict(errors)}' if error_count else 'no error'}",
            99.0 if error_count else max(memory / MOST_MB, LEAST_A_SECOND / rate),
            {
                "resident MB": at_rest,
                "after the load": after_load,
                "lists a second": rates,
                "errors": dict(errors),
                "first start": first_start,
            },
        )
    ]


def measure_list_rate(daemon: Daemon, seconds: float) -> float:
    """Ask for lists on one connection for so many seconds; return the lists per second of the daemon's processor time.

    So what other processes take of the core meanwhile does not count.
    """
    connection = daemon.open_connection()
    began, cpu_before, lists = time.perf_counter(), daemon.cpu_seconds, 0
    while time.perf_counter() - began < seconds:
        status, _body = daemon.send_request("GET", "/v1/sandboxes", connection=connection)
        assert status == 200
        lists += 1
    connection.close()
    return lists / (daemon.cpu_seconds - cpu_before)


def run_clients(daemon: Daemon) -> Counter[str]:
    """Run two hundred clients that begin at the same moment, each with a connection and a sandbox of its own.

    Each lists the sandboxes, shows its own, renews the lease (a durable write), and reads the events. Returns how often
    each kind of error came.
    """
    errors: Counter[str] = Counter()
    gate = threading.Barrier(CLIENTS)

    def run_client(number: int) -> None:
        vmid = FIRST_VMID + number
        try:
            connection = daemon.open_connection()
            gate.wait(60)
            for method, path, body in (
                ("GET", "/v1/sandboxes", None),
                ("GET", f"/v1/sandboxes/{vmid}", None),
                ("POST", f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "2h"}),
                ("GET", f"/v1/sandboxes/{vmid}/events", None),
            ):
                status, text = daemon.send_request(method, path, body, connection)
                if status != 200:
                    errors[f"{method} {path}: {status} {text[:80]!r}"] += 1
            connection.close()
        except Exception as error:
            errors[type(error).__name__] += 1

    threads = [threading.Thread(target=run_client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


# ---- rows 19 and 21 ----


def measure_command_line(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 19: a list of a thousand by the command line, beside curl; and the start of the command alone."""
    with run_daemon(bench, RECORDS) as daemon:
        env = {"PYTHONPATH": str(_install_code(bench.folder)), "AGENTLAB_SOCKET": daemon.socket}
        program = [sys.executable, "-m", "agentlab_cli"]
        curl = [shutil.which("curl") or "curl", "-sf", "--unix-socket", daemon.socket, "http://localhost/v1/sandboxes"]
        lists, curls, starts = bench.measure_by_turns(
            lambda: time_command([*program, "sandbox", "list"], env, bench.folder),
            lambda: time_command(curl, {}, bench.folder),
            lambda: time_command([*program, "--version"], env, bench.folder),
        )
    beyond, version = statistics.median(lists) - statistics.median(curls), statistics.median(starts)
    return [
        make_row(
            "19",
            f"command line: `sandbox list` of {RECORDS:,} beyond a `curl` of the same; `--version`",
            f"at most {LIST_SECONDS_BEYOND} s; at most {VERSION_SECONDS} s",
            f"{beyond:.2f} s; {version:.2f} s",
            max(beyond / LIST_SECONDS_BEYOND, version / VERSION_SECONDS),
            {"sandbox list": lists, "curl": curls, "--version": starts},
        )
    ]


def measure_many_sandboxes(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 21: ten thousand sandboxes on sixteen nodes. A reconcile after the first is judged."""
    with run_daemon(bench, 0, nodes=MANY_NODES) as daemon:
        base_mb = daemon.megabytes
    with run_daemon(
        bench, MANY_RECORDS, nodes=MANY_NODES, addresses=True, reconcile_interval=f"{MANY_INTERVAL}s"
    ) as daemon:
        before = bench.server.read_request_counts()
        first_requests = sum(before.values())
        lists = [measure_seconds(daemon.list_sandboxes) for _run in range(bench.runs)]
        daemon.await_reconciles(3)
        later_requests = bench.server.read_request_counts() - before
        megabytes = daemon.megabytes
    ctx = open_context(bench.server, bench.database)
    read_next_lease = functools.partial(overview.read_next_lease_end, ctx.records)
    ticks = [measure_seconds(read_next_lease) for _run in range(bench.runs)]
    ctx.close()
    # Each reconcile reads the list once.
    requests = sum(later_requests.values()) / later_requests["GET /cluster/resources"]
    seconds, kb_each = statistics.median(lists), (megabytes - base_mb) * 1024 / MANY_RECORDS
    most_requests = 2 * MANY_NODES
    return [
        make_row(
            "21",
            f"daemon with {MANY_RECORDS:,} live sandboxes on {MANY_NODES} nodes: a later reconcile pass, list, "
            "memory a sandbox beyond the base",
            f"at most {most_requests} requests; at most {MANY_LIST_SECONDS} s; at most {MANY_KB_EACH:g} kB",
            f"{requests:.1f} requests (the first pass, with each configuration: {first_requests:,}); {seconds:.2f} s; "
            f"{kb_each:.1f} kB; next lease {statistics.median(ticks) * 1000:.2f} ms",
            max(requests / most_requests, seconds / MANY_LIST_SECONDS, kb_each / MANY_KB_EACH),
            {
                "kinds of the later passes": dict(later_requests),
                "first pass": first_requests,
                "list": lists,
                "next lease": ticks,
                "base MB": base_mb,
                "MB": megabytes,
            },
        )
    ]
