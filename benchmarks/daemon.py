# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Row 12: the real daemon as a process, against the canned Proxmox."""

from __future__ import annotations

import contextlib
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

from field import FIRST, REPO, resident_kb
from rows import Bench, Row, row

RECORDS = 1000
CLIENTS = 200
SECONDS = 3.0
MOST_MB = 45
LEAST_A_SECOND = 40


def _compiled(folder: str) -> Path:
    """The code as the role installs it: files, no links, compiled."""
    made = Path(folder, "lib")
    if not made.exists():
        shutil.copytree(REPO / "roles" / "agentlabd" / "files", made, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(made)], check=True)
    return made


class Daemon:
    """One agentlabd on the benchmark's records."""

    def __init__(self, bench: Bench) -> None:
        self.socket = f"{bench.folder}/agentlabd.sock"
        options = {
            "socket": self.socket,
            "cleanup_file": f"{bench.folder}/none-cleanup.yaml",
            "profiles_dir": f"{bench.folder}/none-profiles",
        }
        file = Path(bench.folder, "agentlabd.yaml")
        file.write_text(json.dumps(options), encoding="utf-8")
        # What the unit of the role sets, apart from paths.
        unit = (REPO / "roles/agentlabd/templates/agentlabd.service.j2").read_text(encoding="utf-8")
        of_unit = dict(re.findall(r" (\w+)=([\w.]+)(?= |$)", " ".join(re.findall(r"^Environment=(.*)$", unit, re.M))))
        env = {
            **of_unit,
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **bench.env,
            "PYTHONPATH": str(_compiled(bench.folder)),
            "AGENTLAB_CONFIG": str(file),
        }
        self._log = Path(bench.folder, "agentlabd.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentlabd"], env=env, cwd=bench.folder, stdout=log, stderr=log
            )

    def ask(
        self, method: str, path: str, body: Any = None, connection: http.client.HTTPConnection | None = None
    ) -> tuple[int, bytes]:
        one = connection or self.connection()
        try:
            one.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
            answer = one.getresponse()
            return answer.status, answer.read()
        finally:
            if connection is None:
                one.close()

    def connection(self) -> http.client.HTTPConnection:
        one = http.client.HTTPConnection("localhost", timeout=60)
        one.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.sock.settimeout(60)
        one.sock.connect(self.socket)
        return one

    def await_ready(self) -> None:
        """Until it serves and its first reconcile has ended."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"agentlabd ended with {self._process.returncode}: {self._log.read_text(errors='replace')[-1000:]}"
                )
            with contextlib.suppress(OSError):
                status = json.loads(self.ask("GET", "/v1/status")[1])
                if status["reconcile"]["last_run"]:
                    return
                if status["reconcile"]["last_error"]:
                    raise RuntimeError(f"reconcile: {status['reconcile']['last_error']}")
            time.sleep(0.1)
        raise RuntimeError("agentlabd was not ready within 120 s")

    @property
    def megabytes(self) -> float:
        return resident_kb(self._process.pid) / 1024

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads."""
        import psutil

        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.contextmanager
def running(bench: Bench, count: int, **settings: Any) -> Iterator[Daemon]:
    """A daemon with so many running sandboxes, their VMs in the canned cluster."""
    bench.vms(count, status="running", **settings)
    bench.records(count, "RUNNING", nodes=settings.get("nodes", 1))
    one = Daemon(bench)
    try:
        one.await_ready()
        yield one
    finally:
        one.stop()


def serving(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Memory at rest and after work, lists of a thousand a second of one core, and two hundred clients at once."""
    rest, after, rates = [], [], []
    wrong: Counter[str] = Counter()
    with running(bench, RECORDS) as one:
        first = one.megabytes
    for _number in range(bench.runs):
        with running(bench, RECORDS) as one:
            rest.append(one.megabytes)
            wrong.update(crowd(one))
            rates.append(lists_a_second(one, SECONDS))
            after.append(one.megabytes)
    memory, worked, rate = statistics.median(rest), statistics.median(after), statistics.median(rates)
    errors = sum(wrong.values())
    return [
        row(
            "12",
            f"daemon: resident memory; list of {RECORDS:,}; {CLIENTS} clients at once",
            f"at most {MOST_MB} MB; at least {LEAST_A_SECOND} a second on one core; no error",
            f"{memory:.0f} MB ({worked:.0f} after the load); {rate:.0f} a second; "
            f"{f'{errors} errors: {dict(wrong)}' if errors else 'no error'}",
            99.0 if errors else max(memory / MOST_MB, LEAST_A_SECOND / rate),
            {
                "resident MB": rest,
                "after the load": after,
                "lists a second": rates,
                "errors": dict(wrong),
                "first start": first,
            },
        )
    ]


def lists_a_second(one: Daemon, seconds: float) -> float:
    """How many lists the daemon answers in a second of one core's time: what something else takes of the core
    meanwhile does not count.
    """
    connection = one.connection()
    began, before, done = time.perf_counter(), one.cpu_seconds, 0
    while time.perf_counter() - began < seconds:
        status, _body = one.ask("GET", "/v1/sandboxes", connection=connection)
        assert status == 200
        done += 1
    connection.close()
    return done / (one.cpu_seconds - before)


def crowd(one: Daemon) -> Counter[str]:
    """Two hundred clients, each with a connection of its own, begin at the same moment: list, show, renew (a durable
    write), events. What went wrong.
    """
    wrong: Counter[str] = Counter()
    gate = threading.Barrier(CLIENTS)

    def client(number: int) -> None:
        vmid = FIRST + number
        try:
            connection = one.connection()
            gate.wait(60)
            for method, path, body in (
                ("GET", "/v1/sandboxes", None),
                ("GET", f"/v1/sandboxes/{vmid}", None),
                ("POST", f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "2h"}),
                ("GET", f"/v1/sandboxes/{vmid}/events", None),
            ):
                status, text = one.ask(method, path, body, connection)
                if status != 200:
                    wrong[f"{method} {path}: {status} {text[:80]!r}"] += 1
            connection.close()
        except Exception as error:
            wrong[type(error).__name__] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
