# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make test-chaos CONTROLLERS=3 OPERATIONS=100000`: many operations on the records by several controllers.

operations.py [--controllers N] [--seed SEED] OPERATIONS starts controllers as processes of their own, each as on a host
of its own, on PostgreSQL with a synchronous standby. Their threads reserve, journal, clone, start, renew, stop, destroy
and clean up, with the records of the product and a model of Proxmox VE in this process, which judges every request.
Meanwhile controllers are killed, connections are cut, the server is killed and started, the standby takes its place,
and strangers' VMs appear, also in the place of ours. The seed draws all choices, not how processes meet.

An operation is one write that the records confirmed to its controller: a reservation, a journal entry, a transition, a
renewal, an expired lease, a claim, a forgotten record. The run ends after OPERATIONS of them. Then the leader has two
minutes to finish what is left, and the table at the end says:

- double: two controllers changed one sandbox's VM at once (a request with an older fence than an earlier one), a
  sandbox has two VMs, or two live records have one VMID or one name;
- lost: a confirmed write is not in the records, a VM of ours has no live record, a record is DESTROYED while its VM is
  there, the events of a sandbox do not lead to its state, or a reader of the events missed one;
- strangers: a VM of somebody else was changed;
- takeovers of claims: from the kill of their holder, or from the moment at which the server was back, whichever came
  later, to the next claim; 40 seconds are the most. Of jobs, in the same way: 10 seconds are the most.

The exit status is 1 when one of them is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (  # noqa: E402
    StoreError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database  # noqa: E402

from support.operations_cluster import Cluster  # noqa: E402
from support.operations_controller import RANGE  # noqa: E402
from support.postgres import Pair  # noqa: E402

CLAIM_SECONDS, JOB_SECONDS = 40.0, 10.0
SETTLE_SECONDS = 120.0


@dataclass
class Child:
    """One controller: its process, its name on the command line, and the id that the database gave it."""

    process: subprocess.Popen[str]
    name: str
    id: str = ""


@dataclass
class Figures:
    """What a run counted, measured, and saw broken."""

    seconds: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    claims: list[float] = field(default_factory=list)
    jobs: list[float] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    events: int = 0
    retries: int = 0

    def problems(self) -> list[str]:
        """Return a sentence for each promise that was broken."""
        late = [f"a claim was taken over after {seconds:.1f} s" for seconds in self.claims if seconds > CLAIM_SECONDS]
        late += [f"a job was taken over after {seconds:.1f} s" for seconds in self.jobs if seconds > JOB_SECONDS]
        return [*self.double, *self.lost, *self.strangers, *late, *self.other]

    def table(self) -> str:
        """Return the figures as a table of Markdown."""

        def longest(values: list[float]) -> str:
            return f"{len(values)}, the longest {max(values):.1f} s" if values else "0"

        def counted(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {what}" for what, count in counts.most_common())

        rows = {
            "operations": f"{self.operations.total()} ({counted(self.operations)})",
            "seconds": f"{self.seconds:.0f}",
            "refused and done again or left": counted(self.refused) or "0",
            "disturbances": counted(self.disturbances) or "0",
            "events read in order": str(self.events),
            "transactions repeated": str(self.retries),
            "takeovers of claims": longest(self.claims),
            "takeovers of jobs": longest(self.jobs),
            "double": str(len(self.double)),
            "lost": str(len(self.lost)),
            "strangers touched": str(len(self.strangers)),
            "other violations": str(len(self.other)),
        }
        return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])


class Run:
    """Controllers, what they told, and whoever disturbs them."""

    def __init__(self, folder: Path, seed: int, controllers: int, dead_seconds: float | None = None) -> None:
        self.random = random.Random(seed)
        self.dead_seconds = dead_seconds
        self.postgres = Pair()
        open_database(self.postgres.address).close()
        self.cluster = Cluster(str(folder / "cluster"))
        self.figures = Figures()
        self.generations: dict[str, int] = {}
        self.children: list[Child] = []
        self.dead: dict[str, float] = {}
        # When the last leader was killed, or the server came back after that; None while there is a leader.
        self.without_leader: float | None = None
        self.leader: Child | None = None
        # When the server took connections again, and commits.
        self.server_back = self.commits_back = 0.0
        self.stopped = 0
        self.confirmed = 0
        self._lock = threading.Lock()
        self.folder = folder
        for number in range(controllers):
            self.start(str(number))

    def start(self, name: str) -> None:
        """Start a controller of that name, and a thread that listens to it."""
        job = {
            "name": name,
            "seed": self.random.randrange(10**9),
            "address": self.postgres.address,
            "cluster": str(self.folder / "cluster"),
            "dead_seconds": self.dead_seconds,
        }
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("operations_controller.py")), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        child = Child(process, name)
        self.children.append(child)
        threading.Thread(target=self.listen, args=(child,), daemon=True).start()

    def listen(self, child: Child) -> None:
        """Hand each line that a controller prints to the method of its first word, until the process ends."""
        assert child.process.stdout is not None
        for line in child.process.stdout:
            try:
                word, *values = json.loads(line)
            except ValueError:
                # The last line of a killed process may be cut. It confirms nothing.
                continue
            with self._lock:
                getattr(self, f"hear_{word.replace(' ', '_')}")(child, *values)

    def hear_ready(self, child: Child, controller: str) -> None:
        """Note the id of a controller that is connected."""
        child.id = controller

    def hear_wrote(self, child: Child, what: str, sandbox: str | None = None, generation: int = 0) -> None:
        """Count a write that the records confirmed, and keep the newest generation of its sandbox."""
        self.figures.operations[what] += 1
        self.confirmed += 1
        if sandbox is not None:
            self.generations[sandbox] = max(generation, self.generations.get(sandbox, 0))

    def hear_refused(self, child: Child, why: str) -> None:
        """Count a refusal."""
        self.figures.refused[why] += 1

    def hear_trace(self, child: Child, text: str) -> None:
        """Keep a traceback, which is a defect."""
        self.figures.other.append(f"controller {child.name}: {text}")

    def hear_leads(self, child: Child, at: float) -> None:
        """Note the new leader, and how long there was none."""
        if self.without_leader is not None:
            self.figures.jobs.append(max(0.0, at - max(self.without_leader, self.server_back)))
        self.leader, self.without_leader = child, None

    def hear_took_over(self, child: Child, controller: str, at: float) -> None:
        """Note how long the claim of a dead controller stood."""
        if controller in self.dead:
            self.figures.claims.append(max(0.0, at - max(self.dead[controller], self.commits_back)))

    def hear_stopped(self, child: Child, retries: int, reconnects: int, takeovers: int) -> None:
        """Count a controller that has stopped its work."""
        self.figures.retries += retries
        self.stopped += 1

    # ---- disturbing ----

    def kill(self) -> None:
        """Kill a controller, and start another of its name some seconds later."""
        child = self.random.choice(self.children)
        child.process.kill()
        child.process.wait()
        with self._lock:
            self.children.remove(child)
            self.dead[child.id] = time.monotonic()
            if child is self.leader:
                self.leader, self.without_leader = None, time.monotonic()
        time.sleep(self.random.uniform(0.0, 3.0))
        self.start(child.name)

    def disturb_server(self, what: str) -> None:
        """Cut the connections, restart the server or let the standby take its place."""
        if what == "failovers":
            # An unsynchronised standby would lose commits: a failover tool does not promote it.
            state = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            wait_for(lambda: bool(self.postgres.primary.execute(state)), "the standby follows", 120)
        with self._lock:
            if self.without_leader is None:
                self.without_leader = time.monotonic()
        self.postgres.disturb({"cuts": "cut", "restarts": "database", "failovers": "failover"}[what], self.note_back)
        self.commits_back = time.monotonic() if what != "cuts" else self.commits_back

    def note_back(self) -> None:
        """Note that the server takes connections again."""
        self.server_back = time.monotonic()

    def add_stranger(self) -> str:
        """Put a stranger's VM at some VMID; return what it was, for the table."""
        taken = self.cluster.add_stranger(self.random.randint(*RANGE))
        return "strangers' VMs in the place of ours" if taken else "strangers' VMs"

    def plan(self, operations: int) -> list[tuple[int, str]]:
        """Return the disturbances of a run: after how many operations, and what."""
        counts = {"kills": operations // 2000, "strangers": operations // 500, "cuts": operations // 10000}
        counts |= {"restarts": operations // 12500, "failovers": operations // 20000}
        return sorted(
            (self.random.randrange(operations // 20, operations), what)
            for what, count in counts.items()
            for _number in range(max(1, count))
        )

    def run(self, operations: int) -> Figures:
        """Let the controllers do so many operations, disturb them meanwhile, and return the judged figures."""
        began = time.monotonic()
        reader = Reader(self.postgres.address)
        for after, what in self.plan(operations):
            while self.confirmed < after:
                assert all(child.process.poll() is None for child in self.children), "a controller ended by itself"
                time.sleep(0.02)
            if what == "kills":
                self.kill()
            elif what == "strangers":
                what = self.add_stranger()
            else:
                self.disturb_server(what)
            self.figures.disturbances[what] += 1
            print(f"{time.monotonic() - began:6.0f} s, {self.confirmed:6} operations: {what}", flush=True)
        wait_for(lambda: self.confirmed >= operations, "all operations were done", 3600)
        for child in self.children:
            assert child.process.stdin is not None
            child.process.stdin.write("stop\n")
            child.process.stdin.flush()
        wait_for(lambda: self.stopped >= len(self.children), "all controllers stopped their work", 120)
        self.settle()
        self.figures.seconds = time.monotonic() - began
        self.figures.lost += reader.finish()
        self.figures.events = len(reader.seen)
        self.judge(reader.destroyed)
        return self.figures

    def settle(self) -> None:
        """Wait until no claim and no journal entry is there, for two minutes at most."""
        unfinished = "SELECT (SELECT count(*) FROM claims) + (SELECT count(*) FROM operations)"
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.read_rows(unfinished)[0][0] == 0, "everything is finished", SETTLE_SECONDS)

    def read_rows(self, text: str) -> list[Any]:
        """Run a query on the records and return its rows."""
        return self.postgres.primary.execute(text, self.postgres.address.partition("?")[0].rpartition("/")[2])

    # ---- judging ----

    def judge(self, destroyed: set[str]) -> None:
        """Compare the records with all that was confirmed, and with the VMs."""
        figures = self.figures
        figures.double += self.cluster.double
        figures.strangers += self.cluster.strangers
        for column in ("vmid", "name"):
            rows = self.read_rows(
                f"SELECT {column}, count(*) FROM sandboxes WHERE state <> 'DESTROYED' GROUP BY {column} "
                "HAVING count(*) > 1"
            )
            figures.double += [f"{count} live records have the {column} {value}" for value, count in rows]
        for table in ("claims", "operations"):
            figures.other += [f"{table}: {row} was left behind" for row in self.read_rows(f"SELECT * FROM {table}")]
        records = {row[0]: row[1:] for row in self.read_rows("SELECT uuid, vmid, state, generation FROM sandboxes")}
        for sandbox, generation in self.generations.items():
            if sandbox not in records and sandbox not in destroyed:
                figures.lost.append(f"{sandbox} has no record, and was never destroyed")
            if sandbox in records and records[sandbox][2] < generation:
                figures.lost.append(f"{sandbox} has generation {records[sandbox][2]}; {generation} was confirmed")
        self.judge_vms(records)
        self.judge_events(records)

    def judge_vms(self, records: dict[str, Any]) -> None:
        """Look whether each VM of ours has a live record."""
        for vmid, vm in self.cluster.vms.items():
            if vm.owner is None:
                continue
            state = records[vm.owner][1] if vm.owner in records else "no record"
            if state in ("no record", states.DESTROYED):
                self.figures.lost.append(f"VM {vmid} of {vm.owner} is there, and its record says: {state}")

    def judge_events(self, records: dict[str, Any]) -> None:
        """Look whether the events of each sandbox lead from state to state, and to that of its record."""
        last: dict[str, str | None] = {}
        query = "SELECT id, sandbox_uuid, from_state, to_state FROM events ORDER BY id"
        for number, sandbox, before, after in self.read_rows(query):
            if before != last.get(sandbox):
                self.figures.lost.append(f"event {number} of {sandbox} begins in {before}, not in {last.get(sandbox)}")
            if before not in (None, after) and after not in states.TRANSITIONS[before]:
                self.figures.other.append(f"event {number} of {sandbox}: {before} to {after}")
            last[sandbox] = after
        for sandbox, (_vmid, state, _generation) in records.items():
            if last.get(sandbox) != state:
                self.figures.lost.append(f"{sandbox} is {state}, and its events end in {last.get(sandbox)}")

    def close(self) -> None:
        """End all controllers, the cluster and the servers."""
        for child in self.children:
            child.process.kill()
            child.process.wait()
        self.cluster.close()
        self.postgres.destroy()


class Reader:
    """A reader of the events that goes on after the last id it has seen, as a follower of the log does."""

    def __init__(self, address: str) -> None:
        self.seen: set[int] = set()
        # The sandboxes of which an event said DESTROYED.
        self.destroyed: set[str] = set()
        self._database = open_database(address)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        last = 0
        query = "SELECT id, sandbox_uuid, to_state FROM events WHERE id > ? ORDER BY id LIMIT 1000"
        while True:
            ending = self._end.is_set()
            try:
                rows = self._database.read(query, last)
            except StoreError:
                time.sleep(0.2)
                continue
            self.seen.update(row["id"] for row in rows)
            self.destroyed.update(row["sandbox_uuid"] for row in rows if row["to_state"] == states.DESTROYED)
            last = rows[-1]["id"] if rows else last
            if not rows:
                if ending:
                    return
                time.sleep(0.05)

    def finish(self) -> list[str]:
        """End reading, and return a sentence for each event that was missed."""
        self._end.set()
        self._thread.join(60)
        present = {row["id"] for row in self._database.read("SELECT id FROM events")}
        self._database.close()
        return [f"event {number} was not read in order" for number in sorted(present - self.seen)]


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until the condition is true; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def main() -> int:
    """Run as the command line says; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="operations.py")
    parser.add_argument("--controllers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randint(0, 999999))
    parser.add_argument("operations", type=int, nargs="?", default=100_000)
    asked = parser.parse_args()
    print(f"{asked.operations} operations by {asked.controllers} controllers, seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="agentlab-operations-") as folder:
        run = Run(Path(folder), asked.seed, asked.controllers)
        try:
            figures = run.run(asked.operations)
        finally:
            run.close()
    print(figures.table())
    problems = figures.problems()
    for problem in problems[:50]:
        print(f"BROKEN: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
