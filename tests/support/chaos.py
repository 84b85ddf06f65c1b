# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make test-chaos`: disturb a daemon at random, and look whether the promises hold.

It is killed and restarted, so are other processes that work on its records, Proxmox VE fails, the disk with its records
is full, its socket is deleted, and clients are rude.

chaos.py [--controllers N] [MINUTES [SEED [KIND …]]] prints its seed; the same seed makes the same choices (not the same
timing). KINDS leave out all other disturbances: "kill process fault" is a run of kill -9. At the end the faults stop,
and the daemon has two minutes to bring everything to its end: no claim and no journal entry is left, no stranger's VM
was touched, no record says DESTROYED while its VM is there, and every VM of ours has a record. The exit status is 1
otherwise.

With several controllers (daemons, and the processes beside them) the records lie on PostgreSQL with a synchronous
standby. Then a daemon is also paused until others take its claims over, connections are cut, the server is killed, and
the standby takes its place. How long each takeover of reconcile took is printed, and ten seconds are the most.

The small disk is a tmpfs in a mount namespace of this process, which only root can make. Without it that fault is left
out, and the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox  # noqa: E402

from faults.crash_support import Zygote  # noqa: E402
from support.daemon import Daemon, free_port  # noqa: E402
from support.lab import Lab  # noqa: E402
from support.postgres import Pair  # noqa: E402

CLIENTS = 4
RULES = """auto_cleanup:
  interval: 5s
  jitter: 1s
  guard: {count: 1000, percent: 100}
  rules:
    - {name: over, match: {states: [TIMEOUT, COMPLETED, FAILED, STOPPED]}, after: 2s, action: destroy}
"""
FAULTS = ("cut-before", "cut-after", "truncate", "answer")
SETTLE_SECONDS = 120
DISTURBANCES = (
    *("kill", "restart", "fault", "fault", "fault", "task", "rude", "socket", "stranger", "full disk"),
    "process",
)
# With several controllers; "pause" is a daemon that is stopped until its claims are dead, and comes back.
OF_CONTROLLERS = (
    *("kill", "kill", "restart", "fault", "fault", "fault", "task", "stranger"),
    *("pause", "cut", "database", "failover", "process"),
)
PAUSE_SECONDS = 35
TAKEOVER_SECONDS = 10
# What a process beside the daemon does, one after the other, until it kills itself at one of its points.
WORDS = {"create": 4, "renew": 3, "stop": 2, "start": 2, "force": 3, "prune": 1, "expire": 1, "reconcile": 1}
# The records of an hour of chaos have two megabytes.
DISK = "size=16m"
# Set in the process that has a mount namespace of its own.
NAMESPACE = "AGENTLAB_CHAOS_NAMESPACE"


class Chaos:
    """One run: the daemons, their clients, and whoever disturbs them."""

    def __init__(self, folder: Path, seed: int, kinds: tuple[str, ...], controllers: int = 1) -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
        self.zygote = Zygote()
        self.lab = Lab(folder)
        self.disk: Path | None = None
        self.postgres: Pair | None = None
        if controllers == 1:
            self.disk = mount_small_disk(Path(self.lab.database).parent)
        else:
            self.postgres = Pair()
            self.lab.database = self.postgres.address
        environment = {**self.lab.server.environment(self.lab.folder), "AGENTLAB_DATABASE": self.lab.database}
        self.daemons = [
            Daemon(
                folder / f"daemon-{number}",
                environment,
                cleanup=RULES,
                metrics_listen=f"127.0.0.1:{free_port()}",
                reconcile_interval="3s",
                expire_interval="1s",
                wait_timeout="10s",
                api_timeout=3,
            )
            for number in range(controllers)
        ]
        # Daemons that a thread has paused: nobody else disturbs them.
        self.paused: set[int] = set()
        self.pauses: list[threading.Thread] = []
        self.takeovers: list[float] = []
        self.internal: list[str] = []
        self.counts: Counter[str] = Counter()
        self.traces: list[str] = []
        self.end = threading.Event()

    def run_client(self, seed: int) -> None:
        """Create sandboxes; renew, stop or destroy each of them, whatever the answers are."""
        choice = random.Random(seed)
        number = 0
        while not self.end.is_set():
            number += 1
            with contextlib.suppress(OSError, ValueError, Exception):
                daemon = choice.choice(self.daemons)
                answer = daemon.post("/v1/sandboxes", {"name": f"c{seed}-{number}", "ttl": f"{choice.randint(2, 20)}s"})
                self.counts[f"create {answer.status}"] += 1
                vmid = answer.body.get("vmid")
                if vmid:
                    what: tuple[str, Any] = choice.choice(
                        [("lease/renew", {"ttl": "20s"}), ("stop", None), ("destroy", {"force": True})]
                    )
                    # Perhaps another controller than the one that made it.
                    answer = choice.choice(self.daemons).post(f"/v1/sandboxes/{vmid}/{what[0]}", what[1])
                    self.counts[f"{what[0]} {answer.status}"] += 1
                    if answer.status == 500:
                        self.internal.append(f"{what[0]} of {vmid} answered 500: {answer.body}")
            time.sleep(choice.random())

    def disturb(self) -> None:
        """Do one thing that should hurt nobody."""
        what = self.random.choice([kind for kind in self.kinds if kind != "process"] or ["none"])
        if what == "none" or (what == "full disk" and self.disk is None):
            return
        self.counts[what] += 1
        pve = self.lab.pve
        number = self.random.choice([number for number in range(len(self.daemons)) if number not in self.paused])
        daemon = self.daemons[number]
        if what == "kill":
            leads = self.postgres is not None and self.leads(daemon)
            daemon.kill()
            if leads:
                self.await_takeover(daemon)
            daemon.start()
        elif what == "restart":
            daemon.stop(60)
            daemon.start()
        elif what == "pause":
            # The last one that is not paused stays.
            if len(self.paused) < len(self.daemons) - 1:
                self.paused.add(number)
                self.pauses.append(threading.Thread(target=self.pause, args=(number,), daemon=True))
                self.pauses[-1].start()
        elif what in ("cut", "database", "failover"):
            assert self.postgres is not None
            self.postgres.disturb(what)
        elif what == "fault":
            values = {"status": self.random.choice([500, 502, 596])}
            kind = self.random.choice(FAULTS)
            method, suffix = self.random.choice(
                [
                    ("GET", "/config"),
                    ("PUT", "/config"),
                    ("POST", "/clone"),
                    ("POST", "/start"),
                    ("POST", "/stop"),
                    ("DELETE", r"/qemu/\d+"),
                    ("GET", "/resources"),
                    ("GET", r"/status"),
                ]
            )
            pve.fault(method, suffix, kind, times=self.random.randint(1, 3), **(values if kind == "answer" else {}))
        elif what == "task":
            kind = self.random.choice(["qmclone", "qmstart", "qmstop", "qmdestroy"])
            pve.task_endings[kind] = "it did not work"
            time.sleep(self.random.random())
            pve.task_endings.pop(kind, None)
        elif what == "rude":
            with contextlib.ExitStack() as held:
                for _number in range(150):
                    with contextlib.suppress(OSError):
                        connection = held.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                        connection.connect(daemon.socket)
                        connection.sendall(b"POST /v1/sandboxes HTTP/1.1\r\nX")
                time.sleep(self.random.random())
        elif what == "full disk":
            self.fill_disk()
        elif what == "socket":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(daemon.socket)
            daemon.wait_for(daemon.serving, "the socket is there again", 60)
        else:
            vmid = self.random.choice([vmid for vmid in range(1000, 2000) if pve.vm(vmid) is None])
            pve.add_vm(vmid, f"stranger-{vmid}", status="running", config={"description": "not ours"})
            self.lab.strangers = [*getattr(self.lab, "strangers", []), pve.vm(vmid)]  # type: ignore[attr-defined]

    @staticmethod
    def leads(daemon: Daemon) -> bool:
        """Return whether the daemon says that it is the one that reconciles."""
        with contextlib.suppress(OSError, AssertionError, ValueError, IndexError):
            return daemon.metric('agentlab_leader{duty="reconcile"}') == 1
        return False

    def await_takeover(self, dead: Daemon) -> None:
        """Measure how long it takes until another daemon reconciles. One that is paused cannot."""
        others = [other for n, other in enumerate(self.daemons) if other is not dead and n not in self.paused]
        began = time.monotonic()
        while others and time.monotonic() - began < 3 * TAKEOVER_SECONDS:
            if any(self.leads(other) for other in others):
                self.takeovers.append(time.monotonic() - began)
                return
            time.sleep(0.1)
        if others:
            self.takeovers.append(time.monotonic() - began)

    def pause(self, number: int) -> None:
        """Stop a daemon until others have taken over its claims, and let it go on."""
        daemon = self.daemons[number]
        daemon.signal(signal.SIGSTOP)
        self.end.wait(PAUSE_SECONDS)
        daemon.signal(signal.SIGCONT)
        daemon.wait_for(daemon.serving, "it serves after its pause", 60)
        self.paused.discard(number)

    def kill_processes(self, seed: int) -> None:
        """Let two processes at a time work on the same records, as modules do, until they kill themselves."""
        choice = random.Random(seed)
        while not self.end.is_set():
            jobs = [
                {
                    "op": "wander",
                    "seed": choice.randrange(10**6),
                    "kill": choice.randint(1, 60),
                    "seconds": 3,
                    "bound": 60,
                    "most": 20,
                    "words": list(WORDS),
                    "weights": list(WORDS.values()),
                    "env": self.daemons[0].environment,
                    "options": {},
                }
                for _number in range(2)
            ]
            for answer in self.zygote.run(jobs):
                self.counts["process"] += 1
                self.counts["process was killed"] += answer["signal"] is not None
                steps = (answer["result"] or {}).get("told") or ()
                self.traces += [step["message"] for step in steps if step.get("code") == "trace"]
            self.end.wait(choice.random())

    def fill_disk(self) -> None:
        """Leave the records no room for some seconds, and now and then kill the daemon meanwhile."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        self.counts["disk was full"] += shutil.disk_usage(self.disk).free == 0
        time.sleep(self.random.uniform(0.5, 4.0))
        killed = self.random.random() < 0.3
        if killed:
            self.daemons[0].kill()
        filler.unlink()
        if killed:
            self.daemons[0].start()

    def run(self, seconds: float) -> list[str]:
        """Disturb for so many seconds, and return a sentence for each promise that does not hold afterwards."""
        for daemon in self.daemons:
            daemon.start()
        clients = [threading.Thread(target=self.run_client, args=(number,), daemon=True) for number in range(CLIENTS)]
        if "process" in self.kinds:
            clients.append(
                threading.Thread(target=self.kill_processes, args=(self.random.randrange(10**6),), daemon=True)
            )
        for thread in clients:
            thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.random.uniform(0.2, 2.0))
            self.disturb()
        self.end.set()
        for thread in clients + self.pauses:
            thread.join(60)
        self.lab.calm()
        for daemon in self.daemons:
            daemon.kill()
            daemon.start()
        return self.judge()

    def judge(self) -> list[str]:
        """Wait until everything is at its end, and return a sentence for each promise that does not hold then."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (problems := self.list_problems()) and time.monotonic() < deadline:
            self.remove_by_hand()
            time.sleep(2)
        if "Traceback" in self.read_logs():
            problems.append("a daemon's log has a traceback")
        late = [seconds for seconds in self.takeovers if seconds > TAKEOVER_SECONDS]
        problems += [f"reconcile was taken over after {seconds:.1f} s" for seconds in late]
        return problems + self.traces + self.internal

    def remove_by_hand(self) -> None:
        """Do what the daemon asks a person for: remove a VM whose clone failed and left it there."""
        for record in self.lab.records():
            events = self.lab.events(record)[-3:] if record.live and record.smbios_uuid is None else []
            if any(event["reason"] == "ambiguous" for event in events) and self.lab.pve.vm(record.vmid):
                self.lab.pve.remove_vm(record.vmid)
                self.counts["removed by hand"] += 1

    def read_logs(self) -> str:
        """Return the logs of all daemons."""
        return "".join(daemon.log() for daemon in self.daemons)

    def _describe(self, record: Sandbox | None, uuid: str) -> str:
        """Return what is known of a sandbox whose operation is not finished."""
        if record is None:
            return f"no record is {uuid}, whose operation is not finished"
        vm = self.lab.pve.vm(record.vmid)
        there = f"{vm.status} {vm.config}" if vm else "not there"
        return f"the operation of {record} is not finished; VM {there}; events {self.lab.events(record)[-3:]}"

    def list_problems(self) -> list[str]:
        """Return a sentence for each promise that does not hold now."""
        leftovers = self.lab.leftovers()
        records = {record.uuid: record for record in self.lab.records()}
        problems = [f"{len(rows)} row(s) stay in {table}: {rows[:2]}" for table, rows in leftovers.items() if rows]
        for row in leftovers["operations"]:
            problems.append(self._describe(records.get(row["sandbox_uuid"]), row["sandbox_uuid"]))
        try:
            self.lab.check_promises()
        except AssertionError as error:
            problems.append(str(error))
        for vm in getattr(self.lab, "strangers", []):
            if vm not in list(self.lab.pve.vms) or vm.status != "running":
                problems.append(f"the stranger's VM {vm.vmid} was touched")
        # A clone whose task failed is kept for a person on purpose; what no record has ever named is lost.
        problems += [
            f"VM {vmid} of ours has no record" for uuid, vmid in self.lab.ours().items() if uuid not in records
        ]
        return problems


def mount_small_disk(folder: Path) -> Path | None:
    """Mount a small file system for the records, and return its folder; None without a mount namespace of our own."""
    if not os.environ.get(NAMESPACE):
        return None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{DISK},mode=0700", "tmpfs", str(folder)], check=True)
    return folder


def enter_namespace() -> None:
    """Begin this program anew in a mount namespace of its own, where that is allowed."""
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with contextlib.suppress(OSError):
        if not os.environ.get(NAMESPACE) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            os.environ[NAMESPACE] = "1"
            os.execvp("unshare", [*probe[:4], sys.executable, *sys.argv])


def main() -> int:
    """Run as the command line says; return 1 if a promise was broken."""
    enter_namespace()
    parser = argparse.ArgumentParser(prog="chaos.py")
    parser.add_argument("--controllers", type=int, default=1)
    parser.add_argument("minutes", type=float, nargs="?", default=15)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().randint(0, 999999))
    parser.add_argument("kinds", nargs="*")
    wanted = parser.parse_args()
    possible = DISTURBANCES if wanted.controllers == 1 else OF_CONTROLLERS
    kinds = tuple(wanted.kinds) or possible
    unknown = set(kinds) - set(possible)
    if unknown:
        print(f"no such kind of disturbance: {', '.join(unknown)}. Valid: {', '.join(sorted(set(possible)))}")
        return 2
    # The double's own requests break off when a daemon is killed.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    left_out = "" if os.environ.get(NAMESPACE) else "; without a full disk, which only root can make"
    several = f"{wanted.controllers} controllers on PostgreSQL" if wanted.controllers > 1 else "one daemon"
    print(
        f"chaos for {wanted.minutes:g} minutes, seed {wanted.seed}, {several}"
        f"{left_out if wanted.controllers == 1 else ''}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="agentlab-chaos-") as folder:
        chaos = Chaos(Path(folder), wanted.seed, kinds, wanted.controllers)
        try:
            problems = chaos.run(wanted.minutes * 60)
            print(", ".join(f"{what}: {count}" for what, count in sorted(chaos.counts.items())))
            if chaos.takeovers:
                print(f"{len(chaos.takeovers)} takeovers of reconcile, the longest {max(chaos.takeovers):.1f} s")
            print(f"{len(chaos.lab.records())} sandboxes, {len(problems)} violations")
            if chaos.disk and chaos.counts["full disk"] and not chaos.counts["disk was full"]:
                problems.append("the disk was to be full, and never was")
            for problem in problems:
                print(f"BROKEN: {problem}")
            if problems:
                print(chaos.read_logs()[-4000:])
            return 1 if problems else 0
        finally:
            for daemon in chaos.daemons:
                daemon.close()
            chaos.zygote.stop()
            chaos.lab.stop()
            if chaos.postgres:
                chaos.postgres.destroy()
            if chaos.disk:
                subprocess.run(["umount", "--lazy", str(chaos.disk)], check=False)


if __name__ == "__main__":
    sys.exit(main())
