# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rows 12, 19 and 21: the real daemon as a process, against the canned Proxmox; and the command line on it."""

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

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from field import FIRST, REPO, context, resident_kb, timed
from rows import Bench, Row, row

RECORDS = 1000
CLIENTS = 200
SECONDS = 3.0
MOST_MB = 55
LEAST_A_SECOND = 40


def _compiled(folder: str) -> Path:
    """The code as the role installs it: files, no links, compiled."""
    made = Path(folder, "lib")
    if not made.exists():
        for source, target in (("roles/agentlabd/files", made), ("plugins/module_utils/_core", made / "agentlab_core")):
            shutil.copytree(REPO / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(made)], check=True)
    return made


class Daemon:
    """One agentlabd on the benchmark's records."""

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
def running(bench: Bench, count: int, *, nodes: int = 1, addresses: bool = False, **options: str) -> Iterator[Daemon]:
    """A daemon with so many running sandboxes, their VMs in the canned cluster; ``options`` of its configuration."""
    bench.vms(count, status="running", nodes=nodes)
    bench.records(count, "RUNNING", nodes=nodes, addresses=addresses)
    one = Daemon(bench, **options)
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


# ---- rows 19 and 21 ----

LIST_SECONDS_BEYOND, VERSION_SECONDS = 0.25, 0.12
MANY_RECORDS, MANY_NODES, MANY_INTERVAL = 10_000, 16, 2
MANY_LIST_SECONDS, MANY_KB_EACH = 0.3, 9.0


def command_line(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 19: a list of a thousand as a person asks for it, beside curl; and the start alone."""
    with running(bench, RECORDS) as one:
        env = {"PYTHONPATH": str(_compiled(bench.folder)), "AGENTLAB_SOCKET": one.socket}
        program = [sys.executable, "-m", "agentlab_cli"]
        curl = [shutil.which("curl") or "curl", "-sf", "--unix-socket", one.socket, "http://localhost/v1/sandboxes"]
        listed, plain, start = bench.interleaved(
            lambda: timed([*program, "sandbox", "list"], env, bench.folder),
            lambda: timed(curl, {}, bench.folder),
            lambda: timed([*program, "--version"], env, bench.folder),
        )
    beyond, version = statistics.median(listed) - statistics.median(plain), statistics.median(start)
    return [
        row(
            "19",
            f"command line: `sandbox list` of {RECORDS:,} beyond a `curl` of the same; `--version`",
            f"at most {LIST_SECONDS_BEYOND} s; at most {VERSION_SECONDS} s",
            f"{beyond:.2f} s; {version:.2f} s",
            max(beyond / LIST_SECONDS_BEYOND, version / VERSION_SECONDS),
            {"sandbox list": listed, "curl": plain, "--version": start},
        )
    ]


def _await_passes(one: Daemon, count: int) -> None:
    """Wait until so many more reconciles have ended."""
    last, deadline = None, time.monotonic() + 300
    while count >= 0:
        status = json.loads(one.ask("GET", "/v1/status")[1])
        if status["reconcile"]["last_error"]:
            raise RuntimeError(f"reconcile: {status['reconcile']['last_error']}")
        if status["reconcile"]["last_run"] != last:
            last, count = status["reconcile"]["last_run"], count - 1
        if time.monotonic() > deadline:
            raise RuntimeError("the reconciles did not end within 300 s")
        time.sleep(0.2)


def ten_thousand(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 21: ten thousand sandboxes on sixteen nodes; the pass that is judged is one after the first."""
    with running(bench, 0, nodes=MANY_NODES) as one:
        base = one.megabytes
    with running(bench, MANY_RECORDS, nodes=MANY_NODES, addresses=True, reconcile_interval=f"{MANY_INTERVAL}s") as one:
        before = bench.server.counts()
        first = sum(before.values())
        lists = []
        for _number in range(bench.runs):
            began = time.perf_counter()
            status, _body = one.ask("GET", "/v1/sandboxes")
            lists.append(time.perf_counter() - began)
            assert status == 200
        _await_passes(one, 3)
        counts = bench.server.counts() - before
        memory = one.megabytes
    ctx = context(bench.server, bench.database)
    ticks = []
    for _number in range(bench.runs):
        began = time.perf_counter()
        overview.read_next_lease_end(ctx.records)
        ticks.append(time.perf_counter() - began)
    ctx.close()
    # Each pass reads the list once.
    requests = sum(counts.values()) / counts["GET /cluster/resources"]
    seconds, each = statistics.median(lists), (memory - base) * 1024 / MANY_RECORDS
    allowed = 2 * MANY_NODES
    return [
        row(
            "21",
            f"daemon with {MANY_RECORDS:,} live sandboxes on {MANY_NODES} nodes: a later reconcile pass, list, "
            "memory a sandbox beyond the base",
            f"at most {allowed} requests; at most {MANY_LIST_SECONDS} s; at most {MANY_KB_EACH:g} kB",
            f"{requests:.1f} requests (the first pass, with each configuration: {first:,}); {seconds:.2f} s; "
            f"{each:.1f} kB; next lease {statistics.median(ticks) * 1000:.2f} ms",
            max(requests / allowed, seconds / MANY_LIST_SECONDS, each / MANY_KB_EACH),
            {
                "kinds of the later passes": dict(counts),
                "first pass": first,
                "list": lists,
                "next lease": ticks,
                "base MB": base,
                "MB": memory,
            },
        )
    ]
