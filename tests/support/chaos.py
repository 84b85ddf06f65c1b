# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make test-chaos`: disturb a daemon at random, and look whether the promises hold.

It is killed and restarted, so are other processes that work on its records, Proxmox VE fails, the disk with its records
is full, its socket is deleted, and clients are rude.

chaos.py [MINUTES [SEED [KIND …]]] prints its seed; the same seed makes the same choices (not the same timing). KINDS
leave out all other disturbances: "kill process fault" is a run of kill -9. At the end the faults stop, and the daemon
has two minutes to bring everything to its end: no claim and no journal entry is left, no stranger's VM was touched, no
record says DESTROYED while its VM is there, and every VM of ours has a record. The exit status is 1 otherwise.

The small disk is a tmpfs in a mount namespace of this process, which only root can make. Without it that fault is left
out, and the output says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
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

from faults.crash_support import Zygote  # noqa: E402
from support.daemon import Daemon  # noqa: E402
from support.lab import Lab  # noqa: E402

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
# What a process beside the daemon does, one after the other, until it kills itself at one of its points.
WORDS = {"create": 4, "renew": 3, "stop": 2, "start": 2, "force": 3, "prune": 1, "expire": 1, "reconcile": 1}
# The records of an hour of chaos have two megabytes.
DISK = "size=16m"
# Set in the process that has a mount namespace of its own.
NAMESPACE = "AGENTLAB_CHAOS_NAMESPACE"


class Chaos:
    """One run: the daemon, its clients, and whoever disturbs them."""

    def __init__(self, folder: Path, seed: int, kinds: tuple[str, ...] = DISTURBANCES) -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
        self.zygote = Zygote()
        self.lab = Lab(folder)
        self.disk = mount_small_disk(Path(self.lab.database).parent)
        environment = {**self.lab.server.environment(self.lab.folder), "AGENTLAB_DATABASE": self.lab.database}
        self.daemon = Daemon(
            folder / "daemon",
            environment,
            cleanup=RULES,
            reconcile_interval="3s",
            expire_interval="1s",
            wait_timeout="10s",
            api_timeout=3,
        )
        self.counts: Counter[str] = Counter()
        self.traces: list[str] = []
        self.end = threading.Event()

    def client(self, seed: int) -> None:
        """Create, renew, stop, destroy and leave sandboxes, whatever the answers are."""
        choice = random.Random(seed)
        number = 0
        while not self.end.is_set():
            number += 1
            with contextlib.suppress(OSError, ValueError, Exception):
                answer = self.daemon.post(
                    "/v1/sandboxes", {"name": f"c{seed}-{number}", "ttl": f"{choice.randint(2, 20)}s"}
                )
                self.counts[f"create {answer.status}"] += 1
                vmid = answer.body.get("vmid")
                if vmid:
                    what: tuple[str, Any] = choice.choice(
                        [("lease/renew", {"ttl": "20s"}), ("stop", None), ("destroy", {"force": True})]
                    )
                    self.counts[f"{what[0]} {self.daemon.post(f'/v1/sandboxes/{vmid}/{what[0]}', what[1]).status}"] += 1
            time.sleep(choice.random())

    def disturb(self) -> None:
        """Do one thing that should hurt nobody."""
        what = self.random.choice([kind for kind in self.kinds if kind != "process"] or ["none"])
        if what == "none" or (what == "full disk" and self.disk is None):
            return
        self.counts[what] += 1
        pve = self.lab.pve
        if what == "kill":
            self.daemon.kill()
            self.daemon.start()
        elif what == "restart":
            self.daemon.stop(60)
            self.daemon.start()
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
                        one = held.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                        one.connect(self.daemon.socket)
                        one.sendall(b"POST /v1/sandboxes HTTP/1.1\r\nX")
                time.sleep(self.random.random())
        elif what == "full disk":
            self.fill_disk()
        elif what == "socket":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.daemon.socket)
            self.daemon.wait_for(self.daemon.serving, "the socket is there again", 60)
        else:
            vmid = self.random.choice([vmid for vmid in range(1000, 2000) if pve.vm(vmid) is None])
            pve.add_vm(vmid, f"stranger-{vmid}", status="running", config={"description": "not ours"})
            self.lab.strangers = [*getattr(self.lab, "strangers", []), pve.vm(vmid)]  # type: ignore[attr-defined]

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
                    "env": self.daemon.environment,
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
        """Leave the records no room for some seconds; now and then the daemon is killed meanwhile."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        self.counts["disk was full"] += shutil.disk_usage(self.disk).free == 0
        time.sleep(self.random.uniform(0.5, 4.0))
        killed = self.random.random() < 0.3
        if killed:
            self.daemon.kill()
        filler.unlink()
        if killed:
            self.daemon.start()

    def run(self, seconds: float) -> list[str]:
        """Disturb for so many seconds; what does not hold afterwards is returned, a sentence each."""
        self.daemon.start()
        clients = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(CLIENTS)]
        if "process" in self.kinds:
            clients.append(
                threading.Thread(target=self.kill_processes, args=(self.random.randrange(10**6),), daemon=True)
            )
        for one in clients:
            one.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.random.uniform(0.2, 2.0))
            self.disturb()
        self.end.set()
        for one in clients:
            one.join(60)
        self.lab.calm()
        self.daemon.kill()
        self.daemon.start()
        return self.judge()

    def judge(self) -> list[str]:
        deadline = time.monotonic() + SETTLE_SECONDS
        while (problems := self.problems()) and time.monotonic() < deadline:
            time.sleep(2)
        if "Traceback" in self.daemon.log():
            problems.append("the daemon's log has a traceback")
        return problems + self.traces

    def problems(self) -> list[str]:
        found = [
            f"{len(rows)} row(s) are left in {table}: {rows[:2]}"
            for table, rows in self.lab.leftovers().items()
            if rows
        ]
        try:
            self.lab.check_promises()
        except AssertionError as error:
            found.append(str(error))
        for vm in getattr(self.lab, "strangers", []):
            if vm not in list(self.lab.pve.vms) or vm.status != "running":
                found.append(f"the stranger's VM {vm.vmid} was touched")
        # A clone whose task failed is left for a person on purpose; what no record has ever named is lost.
        named = {record.uuid for record in self.lab.records()}
        found += [f"VM {vmid} of ours has no record" for uuid, vmid in self.lab.ours().items() if uuid not in named]
        return found


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
    enter_namespace()
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 15
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randint(0, 999999)
    kinds = tuple(sys.argv[3:]) or DISTURBANCES
    unknown = set(kinds) - set(DISTURBANCES)
    if unknown:
        print(f"no such kind of disturbance: {', '.join(unknown)}. Valid: {', '.join(sorted(set(DISTURBANCES)))}")
        return 2
    # The double's own requests break off when the daemon is killed.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    left_out = "" if os.environ.get(NAMESPACE) else "; without a full disk, which only root can make"
    print(f"chaos for {minutes:g} minutes, seed {seed}{left_out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="agentlab-chaos-") as folder:
        chaos = Chaos(Path(folder), seed, kinds)
        try:
            problems = chaos.run(minutes * 60)
            print(", ".join(f"{what}: {count}" for what, count in sorted(chaos.counts.items())))
            print(f"{len(chaos.lab.records())} sandboxes, {len(problems)} violations")
            if chaos.disk and chaos.counts["full disk"] and not chaos.counts["disk was full"]:
                problems.append("the disk was to be full, and never was")
            for problem in problems:
                print(f"BROKEN: {problem}")
            if problems:
                print(chaos.daemon.log()[-4000:])
            return 1 if problems else 0
        finally:
            chaos.daemon.close()
            chaos.zygote.stop()
            chaos.lab.stop()
            if chaos.disk:
                subprocess.run(["umount", "--lazy", str(chaos.disk)], check=False)


if __name__ == "__main__":
    sys.exit(main())
