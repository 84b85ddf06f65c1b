# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make soak`: agentlabd under churn for minutes or hours, and whether it stays as small as it was.

soak.py [MINUTES [SANDBOXES [RATE]]] starts the daemon (compiled, as the role installs it) against the fake Proxmox.
SANDBOXES are made first and run all the time, and the daemon is started anew on them. Clients create, renew, stop and
destroy further sandboxes, or leave them to expire and to the cleanup rules; others read, ask for metrics, reload, and
send what is refused. All clients together send RATE requests a second (0: as many as are answered). What each client
does is drawn from a generator whose seed is the client's number. Records that are destroyed are forgotten after a
minute, so the database has a size to stay at.

The rules: the first third of the run is warm-up (threads, connections and SQLite's page cache fill). Of what follows,
the median of the last third must be no more above the median of the first third than LIMITS says. In a run of an hour
or more, the median of the last quarter of memory and of descriptors must besides be no more than QUARTERS_PERCENT
above that of the first quarter, with the warm-up. The exit status is 1 when a rule is broken, or when requests failed.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.daemon import FILES, ROOT, Daemon, free_port
from support.double import Server

CLIENTS = 6
# Clients of the sandboxes that run all the time, and what they do.
USERS = 4
USES = ("show", "events", "renew", "status", "list")
RULES = """auto_cleanup:
  interval: 5s
  jitter: 1s
  guard: {count: 1000, percent: 100}
  rules:
    - {name: over, match: {states: [TIMEOUT, COMPLETED, FAILED, STOPPED]}, after: 1s, action: destroy}
  retention: {destroyed_records: 60s}
"""


@dataclass
class Sample:
    """What the daemon is at one moment: KiB, but for seconds and counts."""

    seconds: int
    resident: int
    anonymous: int
    threads: int
    files: int
    database: int
    live: int
    answered: int
    requests: int


# By how much each may be higher in the end than after the warm-up.
LIMITS = {"resident": 2048, "anonymous": 2048, "threads": 4, "files": 12, "database": 2048}
# An hour's last quarter against its first.
QUARTERS_PERCENT = 2.0
FULL_LENGTH_MINUTES = 60


class Soak:
    """One run: the daemon, its clients, and what was measured."""

    def __init__(self, folder: Path, minutes: float, sandboxes: int = 0, rate: float = 0) -> None:
        self.seconds = minutes * 60
        self.sandboxes = sandboxes
        self._interval = 1 / rate if rate else 0.0
        self._turn = threading.Lock()
        self._next_request = 0.0
        self.server = Server(str(folder), time_scale=0.02)
        self.server.pve.add_template()
        code = folder / "code"
        shutil.copytree(FILES, code, ignore=shutil.ignore_patterns("__pycache__"))
        core = ROOT / "plugins" / "module_utils" / "_core"
        shutil.copytree(core, code / "agentlab_core", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(str(code), quiet=1)
        self.database = folder / "records" / "agentlab.db"
        environment = {**self.server.environment(str(folder)), "AGENTLAB_DATABASE": str(self.database)}
        self.daemon = Daemon(
            folder / "daemon",
            environment,
            cleanup=RULES,
            metrics_listen=f"127.0.0.1:{free_port()}",
            expire_interval="5s",
            reconcile_interval="60s" if sandboxes else "20s",
            vmid_range=f"1000-{1999 + sandboxes}",
            connections=16,
        )
        self.daemon.environment.update(
            PYTHONPATH=str(code), MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="131072", PYTHONNODEBUGRANGES="1"
        )
        for name in (
            "PYTHONDONTWRITEBYTECODE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
        ):
            self.daemon.environment.pop(name, None)
        self.answered: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._requests = 0
        self._end = threading.Event()
        self._began = time.monotonic()

    # ---- churn ----

    def expect(self, what: str, answer: Any, *good: int) -> Any:
        """Return the answer's body. A status that is not expected is kept for the report."""
        self.answered[what] += 1
        if answer.status not in good:
            self.wrong.append(f"{what}: {answer.status} {str(answer.body)[:200]}")
        self._await_turn()
        return answer.body

    def _await_turn(self) -> None:
        """Wait until this client may send its next request, so that all of them keep to the rate."""
        if self._interval:
            with self._turn:
                self._next_request = max(self._next_request + self._interval, time.monotonic() - 1)
                pause = self._next_request - time.monotonic()
            if pause > 0:
                self._end.wait(pause)

    def populate(self) -> None:
        """Make the sandboxes that run all the time, and start the daemon anew."""
        numbers = iter(range(self.sandboxes))
        guard = threading.Lock()

        def create() -> None:
            while True:
                with guard:
                    number = next(numbers, None)
                if number is None:
                    return
                answer = self.daemon.post("/v1/sandboxes", {"name": f"steady-{number}", "ttl": "1d"})
                if answer.status != 201:
                    self.wrong.append(f"populate: {answer.status} {str(answer.body)[:200]}")

        threads = [threading.Thread(target=create) for _number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.daemon.stop(60)
        self.daemon.start()
        self._began = time.monotonic()

    def churn(self, number: int) -> None:
        """Make one sandbox after another, use it, and give it up in one of four ways."""
        dice = random.Random(number)
        agentlabd = self.daemon
        while not self._end.is_set():
            way = dice.choice(("expire", "destroy", "stop", "bulk"))
            made = self.expect("create", agentlabd.post("/v1/sandboxes", {"ttl": "10m", "tags": [way]}), 201)
            vmid = made.get("vmid")
            if vmid is None:
                self._end.wait(1)
                continue
            lease = {"ttl": "1s", "allow_shorten": True} if way == "expire" else {"ttl_minutes": dice.randint(20, 60)}
            self.expect("renew", agentlabd.post(f"/v1/sandboxes/{vmid}/lease/renew", lease), 200)
            if way == "stop":
                self.expect("stop", agentlabd.post(f"/v1/sandboxes/{vmid}/stop"), 200)
            elif way == "destroy":
                self.expect("destroy", agentlabd.post(f"/v1/sandboxes/{vmid}/destroy", {"force": True}), 200)
            elif way == "bulk":
                self.expect("bulk", agentlabd.post("/v1/sandboxes/destroy", {"vmids": [vmid], "force": True}), 200)
            self.expect("refused", agentlabd.post(f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "soon"}), 400)

    def read_and_reload(self) -> None:
        """Read lists, events and metrics, ask for dry runs, and reload the daemon now and then."""
        agentlabd, turn = self.daemon, 0
        while not self._end.wait(0.5):
            turn += 1
            live = self.expect("list", agentlabd.get("/v1/sandboxes"), 200)["sandboxes"]
            self.expect("status", agentlabd.get("/v1/status"), 200)
            self.expect("dry run", agentlabd.post("/v1/sandboxes/prune", {"dry_run": True}), 200)
            if live:
                self.expect("events", agentlabd.get(f"/v1/sandboxes/{live[turn % len(live)]['vmid']}/events"), 200)
            if turn % 10 == 0:
                agentlabd.metric("agentlab_prune_frozen")
                self.expect("document", agentlabd.get("/v1/openapi.json"), 200)
                self.expect("prune", agentlabd.post("/v1/sandboxes/prune", {"older_than": "2s"}), 200)
            if turn % 60 == 0:
                agentlabd.reload()

    def use_sandboxes(self, number: int) -> None:
        """Show, read and renew the sandboxes that run all the time."""
        dice = random.Random(number)
        agentlabd = self.daemon
        vmids = [sandbox["vmid"] for sandbox in agentlabd.get("/v1/sandboxes").body["sandboxes"]]
        while not self._end.is_set():
            vmid, what = dice.choice(vmids[: self.sandboxes]), dice.choices(USES, (4, 3, 2, 2, 1))[0]
            if what == "show":
                self.expect(what, agentlabd.get(f"/v1/sandboxes/{vmid}"), 200)
            elif what == "events":
                self.expect(what, agentlabd.get(f"/v1/sandboxes/{vmid}/events"), 200)
            elif what == "renew":
                self.expect(what, agentlabd.post(f"/v1/sandboxes/{vmid}/lease/renew", {"ttl": "1d"}), 200)
            else:
                self.expect(what, agentlabd.get("/v1/status" if what == "status" else "/v1/sandboxes"), 200)

    # ---- measuring ----

    def take_sample(self) -> Sample:
        """Return what the daemon is now, and forget the history of the double."""
        agentlabd = self.daemon
        assert agentlabd.process is not None
        proc = Path(f"/proc/{agentlabd.process.pid}")
        figures = dict(re.findall(r"^(VmRSS|RssAnon|Threads):\s+(\d+)", (proc / "status").read_text(), re.M))
        size = sum(os.stat(path).st_size for path in self.database.parent.iterdir()) // 1024
        live = len(agentlabd.get("/v1/sandboxes").body["sandboxes"])
        # The fake's own history is not what is measured, and would slow it down.
        pve = self.server.pve
        self._requests += pve.count()
        pve.counted.clear()
        pve.requests.clear()
        self.server.call(self._forget_tasks)
        return Sample(
            int(time.monotonic() - self._began),
            int(figures["VmRSS"]),
            int(figures["RssAnon"]),
            int(figures["Threads"]),
            len(list((proc / "fd").iterdir())),
            size,
            live,
            sum(self.answered.values()),
            self._requests,
        )

    def _forget_tasks(self) -> None:
        pve = self.server.pve
        ended = [upid for upid, task in pve.tasks.items() if task["status"] != "running"][:-500]
        for upid in ended:
            del pve.tasks[upid]
        pve.tasklog[:] = [task for task in pve.tasklog if task.get("upid") in pve.tasks]

    def run(self) -> list[Sample]:
        """Run for the whole time, print each sample, and return the samples."""
        self.daemon.start()
        if self.sandboxes:
            self.populate()
        self.daemon.wait_for(
            lambda: self.daemon.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 120
        )
        time.sleep(2)
        names = [field.name for field in fields(Sample)]
        print("  ".join(f"{name:>9}" for name in names), flush=True)
        samples = [self.take_sample()]
        print_sample(samples[-1])
        threads = [threading.Thread(target=self.churn, args=(number,)) for number in range(CLIENTS)]
        threads.append(threading.Thread(target=self.read_and_reload))
        if self.sandboxes:
            threads += [threading.Thread(target=self.use_sandboxes, args=(100 + number,)) for number in range(USERS)]
        for thread in threads:
            thread.start()
        pause = max(2.0, self.seconds / 60)
        while (
            time.monotonic() - self._began < self.seconds
            and self.daemon.process is not None
            and self.daemon.process.poll() is None
        ):
            time.sleep(pause)
            samples.append(self.take_sample())
            print_sample(samples[-1])
        self._end.set()
        for thread in threads:
            thread.join(60)
        return samples

    def close(self) -> None:
        """End the clients, the daemon and the double."""
        self._end.set()
        self.daemon.close()
        self.server.stop()


def print_sample(sample: Sample) -> None:
    """Print a sample as a row of the table."""
    print("  ".join(f"{getattr(sample, field.name):>9}" for field in fields(Sample)), flush=True)


def judge(samples: list[Sample]) -> list[str]:
    """Return a sentence for each figure that grew beyond its limit."""
    after = samples[len(samples) // 3 :]
    third = max(1, len(after) // 3)
    grown = []
    for name, limit in LIMITS.items():
        first, last = (
            statistics.median(getattr(sample, name) for sample in part) for part in (after[:third], after[-third:])
        )
        print(f"{name}: {first:.0f} after the warm-up, {last:.0f} in the end ({last - first:+.0f}, limit +{limit})")
        if last - first > limit:
            grown.append(f"{name} grew by {last - first:.0f}, more than {limit}")
    return grown


def judge_quarters(samples: list[Sample], full_length: bool) -> list[str]:
    """Compare the last quarter with the first one, and return a sentence for each figure that grew, in a long run."""
    quarter = max(1, len(samples[1:]) // 4)
    grown = []
    for name in ("resident", "anonymous", "files", "threads"):
        first, last = (
            statistics.median(getattr(sample, name) for sample in part)
            for part in (samples[1:][:quarter], samples[1:][-quarter:])
        )
        percent = 100 * (last - first) / first
        print(f"{name}: first quarter {first:.0f}, last quarter {last:.0f} ({percent:+.1f} %)")
        if full_length and name in ("resident", "files") and percent > QUARTERS_PERCENT:
            grown.append(f"{name} grew by {percent:.1f} % from the first quarter to the last")
    return grown


def main() -> int:
    """Run as the command line says; return 1 if a figure grew or a request failed."""
    numbers = [float(argument) for argument in sys.argv[1:]]
    minutes, sandboxes, rate = (*numbers, *(10.0, 0.0, 0.0)[len(numbers) :])
    with tempfile.TemporaryDirectory(prefix="agentlab-soak-") as folder:
        soak = Soak(Path(folder), minutes, int(sandboxes), rate)
        try:
            samples = soak.run()
            load = os.getloadavg()[1]
            print(
                f"\n{sum(soak.answered.values())} requests of clients "
                f"({', '.join(f'{count} {what}' for what, count in sorted(soak.answered.items()))}), "
                f"{samples[-1].requests} to Proxmox; load {load:.1f}; idle {samples[0].resident} KiB, at most "
                f"{max(sample.resident for sample in samples)} KiB"
            )
            problems = judge(samples) + judge_quarters(samples, minutes >= FULL_LENGTH_MINUTES) + soak.wrong[:20]
            if not samples[1:] or samples[-1].answered == samples[len(samples) // 2].answered:
                problems.append("the churn stood still")
            ended = (
                "" if soak.daemon.process is None or soak.daemon.process.poll() is None else "agentlabd ended by itself"
            )
            problems += [ended] if ended else []
            if problems:
                with contextlib.suppress(OSError):
                    print(soak.daemon.log()[-3000:], file=sys.stderr)
        finally:
            soak.close()
    print(
        "\n".join(["", *(f"FAILED: {problem}" for problem in problems)])
        if problems
        else "\nIt stayed as small as it was."
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
