# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A controller of operations.py: a process whose threads work on sandboxes, and which tells the run what it wrote."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / ".collections")]

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (  # noqa: E402
    AgentlabError,
    Busy,
    StoreError,
    StoreUnavailable,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history, overview  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine  # noqa: E402
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Ending, Records  # noqa: E402

from support.engines import move_to_host  # noqa: E402

# The VMIDs of a run.
RANGE = (1000, 1999)
# Live sandboxes above which controllers destroy more than they create.
LIVE = 250
THREADS = 4
# Destroyed records are forgotten after so many seconds.
KEPT_SECONDS = 60


class Controller:
    """One process: threads that work on sandboxes, and one that leads jobs. Tells the parent by lines of JSON."""

    def __init__(self, job: dict[str, Any]) -> None:
        if job["dead_seconds"]:
            engine.DEAD_SECONDS = float(job["dead_seconds"])
            engine.HEARTBEAT_SECONDS = engine.DEAD_SECONDS / 3
        self.job = job
        self.random = random.Random(job["seed"])
        self.cluster_path = job["cluster"]
        self.end = threading.Event()
        self._local = threading.local()
        self._print = threading.Lock()
        self._listed: tuple[float, list[Sandbox]] = (0.0, [])
        self.number = 0
        while True:
            try:
                self.database = open_database(job["address"])
                break
            except StoreUnavailable:
                time.sleep(0.2)
        records = Records(self.database, self.database.choose_clock(SystemClock()), f"controller {job['name']}", 30)
        self.records = move_to_host(records, f"host-{job['name']}", job["name"])
        self.id = str(self.database.controller)

    def tell(self, what: str, *values: Any) -> None:
        """Print one line for the parent."""
        with self._print:
            print(json.dumps([what, *values]), flush=True)

    def ask(self, *request: Any) -> Any:
        """Send the cluster one request and return its answer."""
        if not hasattr(self._local, "connection"):
            self._local.connection = Client(self.cluster_path, "AF_UNIX")
        self._local.connection.send(request)
        return self._local.connection.recv()

    def wrote(self, what: str, record: Sandbox | None = None) -> None:
        """Tell the parent of a write that the records confirmed."""
        self.tell("wrote", what, *((record.uuid, record.generation) if record else ()))

    def run(self) -> None:
        """Work until the parent says stop, and lead jobs until it closes the input."""
        self.tell("ready", self.id)
        threads = [threading.Thread(target=self.work, args=(number,), daemon=True) for number in range(THREADS)]
        threads.append(threading.Thread(target=self.lead, daemon=True))
        for thread in threads:
            thread.start()
        # "stop" ends the work and keeps the jobs; the end of the input ends the process.
        for _line in sys.stdin:
            self.end.set()
            for thread in threads[:-1]:
                thread.join(90)
            self.tell("stopped", self.database.retries, self.database.reconnects, self.database.takeovers)
        self.database.close()

    def attempt(self, work: Callable[[], None]) -> None:
        """Do some work. What it may be refused is counted; anything else is a defect."""
        try:
            work()
        except (StoreUnavailable, EOFError, OSError):
            self.tell("refused", "the server is away")
            time.sleep(0.2)
        except Busy:
            self.tell("refused", "busy")
        except AgentlabError as error:
            self.tell("refused", error.code)
        except Exception:
            self.tell("trace", traceback.format_exc())

    def work(self, number: int) -> None:
        """Take one random step after another."""
        choice = random.Random(f"{self.job['seed']}-{number}")
        while not self.end.is_set():
            live = self.read_live()
            weights = {self.create: 4 if len(live) < LIVE else 1, self.renew: 4, self.power: 3, self.destroy: 2}
            step = choice.choices(list(weights), list(weights.values()))[0]
            self.attempt(lambda step=step, live=live: step(choice, live))  # type: ignore[misc]

    def read_live(self) -> list[Sandbox]:
        """Return the live sandboxes, at most half a second old."""
        at, sandboxes = self._listed
        if time.monotonic() - at > 0.5:
            with contextlib.suppress(AgentlabError):
                sandboxes = self.records.find_all()
            self._listed = time.monotonic(), sandboxes
        return sandboxes

    @contextlib.contextmanager
    def hold_claim(self, sandbox: Sandbox, operation: str) -> Iterator[tuple[Claim, Sandbox]]:
        """Yield the claim of a sandbox and its record as it is then."""
        claim = self.records.claim(sandbox.uuid, operation)
        self.wrote("claim")
        try:
            yield claim, self.records.get(sandbox.uuid)
        finally:
            self.records.release(claim)

    def change(self, claim: Claim, sandbox: Sandbox, operation: str, **values: Any) -> Sandbox:
        """Move a sandbox to another state, and tell of it."""
        after = self.records.change(claim, sandbox, operation, **values)
        self.wrote("transition", after)
        return after

    def journal(self, claim: Claim, kind: str, phase: str) -> None:
        """Write a journal entry, and tell of it."""
        self.records.write_journal(claim, kind, phase, {})
        self.wrote("journal")

    def judge(self, sandbox: Sandbox) -> identity.Verdict | None:
        """Return whose VM has the sandbox's VMID; None if there is none."""
        config = self.ask("config", sandbox.vmid)
        return None if config is None else identity.judge(sandbox.uuid, sandbox.smbios_uuid, config)

    # ---- what a controller does ----

    def create(self, choice: random.Random, live: list[Sandbox]) -> None:
        """Reserve a sandbox, clone its VM and bring it to RUNNING. A VMID that is taken is changed."""
        self.number += 1
        ttl = choice.randint(5, 60)
        sandbox = Sandbox(
            uuid=str(uuid.uuid4()),
            vmid=0,
            name=f"s{self.job['name']}-{self.number}-{choice.randrange(10**6)}",
            state=states.REQUESTED,
            ttl_seconds=ttl,
            lease_expires_at=self.records.clock.now() + ttl,
        )
        claim = self.records.reserve(sandbox, vmid=None, vmid_range=RANGE, occupied=set(), journal={})
        self.wrote("reservation", sandbox)
        try:
            sandbox = self.change(
                claim, sandbox, "create", to=states.PROVISIONING, journal=("cloning", {}), reason="cloning"
            )
            for _attempt in range(20):
                self.records.confirm_claims()
                smbios = self.ask(
                    "clone", sandbox.vmid, sandbox.uuid, str(self.records.read_database_id()), claim.fence
                )
                if smbios is not None:
                    break
                occupied = {sandbox.vmid, *(choice.randint(*RANGE) for _number in range(50))}
                sandbox = self.records.renumber(claim, sandbox, vmid_range=RANGE, occupied=occupied)
                self.wrote("transition", sandbox)
            else:
                self.change(claim, sandbox, "create", to=states.FAILED, reason="taken", finish=True)
                return
            sandbox = self.change(claim, sandbox, "create", to=states.BOOTING, reason="cloned", smbios_uuid=smbios)
            sandbox = self.change(claim, sandbox, "create", to=states.READY, reason="ready")
            self.change(claim, sandbox, "create", to=states.RUNNING, reason="ready", finish=True)
        finally:
            self.records.release(claim)

    def renew(self, choice: random.Random, live: list[Sandbox]) -> None:
        """Renew the lease of a running sandbox."""
        running = [sandbox for sandbox in live if sandbox.state == states.RUNNING]
        if running:
            now = self.records.clock.now()
            renewed = self.records.renew(choice.choice(running), now + choice.randint(5, 60), now)
            self.wrote("renewal", renewed)

    def power(self, choice: random.Random, live: list[Sandbox]) -> None:
        """Stop or start a sandbox whose VM is proven to be ours."""
        settled = [sandbox for sandbox in live if sandbox.state in (states.RUNNING, states.STOPPED, states.TIMEOUT)]
        if not settled:
            return
        with self.hold_claim(choice.choice(settled), "stop") as (claim, sandbox):
            operation, to = "stop", states.STOPPED
            if sandbox.state == states.STOPPED:
                operation, to = "start", states.RUNNING
            if claim.interrupted is not None or not states.can_follow(sandbox.state, to):
                return
            verdict = self.judge(sandbox)
            if verdict is None or verdict.identity != identity.MATCH:
                return
            self.journal(claim, operation, "requested")
            self.records.confirm_claims()
            if self.ask("change", sandbox.vmid, sandbox.uuid, verdict.digest, claim.fence, False):
                self.change(claim, sandbox, operation, to=to, reason=operation, finish=True)

    def destroy(self, choice: random.Random, live: list[Sandbox]) -> None:
        """Destroy some sandboxes and close their records together."""
        chosen = choice.sample(live, min(len(live), choice.randint(1, 4 if len(live) < LIVE else 12)))
        claims: list[Claim] = []
        endings: list[Ending] = []
        try:
            for sandbox in chosen:
                try:
                    claims.append(self.records.claim(sandbox.uuid, "destroy"))
                except Busy:
                    continue
                self.wrote("claim")
                reason = self.remove(claims[-1], self.records.get(sandbox.uuid))
                if reason:
                    endings.append(Ending(claims[-1], reason, {}))
            if endings:
                with self.database.group_writes():
                    closed = self.records.finish_all(endings, "destroy", states.DESTROYED)
                for record in closed:
                    if record is not None:
                        self.wrote("transition", record)
        finally:
            for claim in claims:
                self.records.release(claim)

    def remove(self, claim: Claim, sandbox: Sandbox) -> str | None:
        """Delete the VM of a sandbox and return the reason to close its record; None when it cannot be closed yet."""
        if not sandbox.live:
            return None
        self.journal(claim, "destroy", "verifying")
        verdict = self.judge(sandbox)
        if verdict is None or verdict.identity == identity.FOREIGN:
            return "vm_absent" if verdict is None else "vmid_reused"
        if verdict.identity not in (identity.MATCH, identity.UNBOUND):
            return None
        self.journal(claim, "destroy", "deleting")
        self.records.confirm_claims()
        deleted = self.ask("change", sandbox.vmid, sandbox.uuid, verdict.digest, claim.fence, True)
        return "destroyed" if deleted else None

    # ---- jobs: leases end on every controller, the rest is the leader's ----

    def lead(self) -> None:
        """Expire leases, and lead reconcile and cleanup whenever no other controller does."""
        led = False
        while True:
            time.sleep(0.2)
            try:
                leads = self.database.lead("reconcile")
                if leads and not led:
                    self.tell("leads", time.monotonic())
                led = leads
            except StoreError:
                led = False
                continue
            self.attempt(self.expire)
            if led:
                self.attempt(self.finish_interrupted)
                self.attempt(self.clean_up)

    def expire(self) -> None:
        """Expire all leases that are over."""
        now = self.records.clock.now()
        over = overview.list_expired(self.records, now)
        if not over:
            return
        with self.database.group_writes():
            ended = self.records.expire_all(over, now)
        for record in ended:
            if record is not None:
                self.wrote("expired lease", record)

    def finish_interrupted(self) -> None:
        """Take over what dead controllers left: the VM is deleted, if there is one, and the record closed."""
        overview.drop_dead_claims(self.records)
        for _entry, sandbox in self.records.list_interrupted_sandboxes():
            rows = self.database.read("SELECT process FROM claims WHERE sandbox_uuid = ?", sandbox.uuid)
            try:
                claim = self.records.claim(sandbox.uuid, "destroy")
            except Busy:
                continue
            try:
                if claim.taken_over and rows:
                    self.tell("took over", json.loads(rows[0]["process"])["controller"], time.monotonic())
                reason = self.remove(claim, self.records.get(sandbox.uuid))
                if reason:
                    sandbox = self.records.get(sandbox.uuid)
                    self.change(claim, sandbox, "destroy", to=states.DESTROYED, reason=reason, finish=True)
            finally:
                self.records.release(claim)

    def clean_up(self) -> None:
        """Forget records that were destroyed some time ago."""
        for _record in range(history.forget(self.records, KEPT_SECONDS, 200)):
            self.wrote("forgotten record")


if __name__ == "__main__":
    Controller(json.loads(sys.argv[1])).run()
