# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The context of an operation: configuration, records, Proxmox VE, clock and actor, and the claim on a sandbox."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import parallel, reasons
from .clock import Clock, SystemClock
from .config import Config
from .errors import AgentlabError, InvalidInput, Kept, NotFound
from .model import Outcome, Sandbox
from .store import freeze
from .store.open import open_database
from .store.port import Engine
from .store.records import Claim, Records
from .store.rehearsal import Rehearsal

if TYPE_CHECKING:
    from .proxmox.client import ProxmoxClient
    from .proxmox.cluster import Cluster
    from .proxmox.tasks import TaskWaiter

A = TypeVar("A")
B = TypeVar("B")


class Context:
    """One run.

    The connection to Proxmox VE is made at the first request. A run that the database alone answers makes none.
    """

    def __init__(
        self,
        config: Config,
        *,
        actor: str,
        dry_run: bool = False,
        wait_timeout: int | None = None,
        clock: Clock | None = None,
        parent: Context | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        self.config = config
        self.actor = actor
        self.dry_run = dry_run
        self.clock: Clock = clock or SystemClock()
        self.wait_timeout = config.wait_timeout if wait_timeout is None else wait_timeout
        self.stopping = stopping
        # VMIDs that sandboxes of this run ask for by number. No other sandbox of the run gets one of them.
        self.named_vmids: frozenset[int] = frozenset()
        self._owner = parent is None
        if parent is None:
            self.database: Engine = open_database(
                config.database,
                password=config.database_password,
                group_mode=config.database_group_access,
                dry_run=dry_run,
            )
        else:
            self.database = Rehearsal(parent.database) if dry_run else parent.database
        if clock is None:
            # Leases and ages are compared by the clock of the records: on PostgreSQL the server's.
            self.clock = self.database.choose_clock(self.clock)
        self.records = Records(self.database, self.clock, actor, self.wait_timeout, stopping)
        self._parent = parent
        self._lock = threading.RLock()
        self._reach: tuple[ProxmoxClient, TaskWaiter] | None = None
        self._cluster: Cluster | None = None
        self._once_answers: dict[Any, Any] = {}
        self._once_lock = threading.RLock()
        if parent is None and not dry_run:
            freeze.detect_older_copy(self.records)

    # ---- Proxmox, from the first use on ----

    def _reach_proxmox(self) -> tuple[ProxmoxClient, TaskWaiter]:
        parent = self._parent
        if parent is not None and (parent.config.proxmox, parent.config.poll_interval) == (
            self.config.proxmox,
            self.config.poll_interval,
        ):
            return parent._reach_proxmox()
        with self._lock:
            if self._reach is None:
                # Import here: the client is most of the code of a module, and many runs do not need it.
                from .proxmox.client import ProxmoxClient
                from .proxmox.tasks import TaskWaiter

                client = ProxmoxClient(self.config.proxmox, self.clock, parent.client.statistics if parent else None)
                if self.database.controller is not None:
                    client.before_change = self.records.confirm_claims
                self._reach = client, TaskWaiter(client, self.clock, self.config.poll_interval)
            return self._reach

    @property
    def client(self) -> ProxmoxClient:
        """Return the client for requests to Proxmox VE."""
        return self._reach_proxmox()[0]

    @property
    def tasks(self) -> TaskWaiter:
        """Return the waiter for Proxmox VE's tasks."""
        return self._reach_proxmox()[1]

    @property
    def cluster(self) -> Cluster:
        """Return the data of the cluster, which is read once in this run."""
        with self._lock:
            if self._cluster is None:
                from .proxmox.cluster import Cluster

                self._cluster = Cluster(self.client, self.clock, self.records)
            return self._cluster

    def read_once(self, key: Any, read: Callable[[], B]) -> B:
        """Return the result of ``read``, which is called once in this run for each ``key``.

        For data that the items of a run share and that does not change meanwhile: a template, the storages of a node.
        """
        with self._once_lock:
            if key not in self._once_answers:
                self._once_answers[key] = read()
            answer: B = self._once_answers[key]
            return answer

    def derive(self, *, actor: str, dry_run: bool = False, config: Config | None = None) -> Context:
        """Return a context for one run inside a process that lives longer, such as the daemon.

        The new context shares the database and the connections, and remembers nothing read from Proxmox.
        """
        return Context(
            config or self.config,
            actor=actor,
            dry_run=dry_run,
            clock=self.clock,
            parent=self,
            stopping=self.stopping,
        )

    def refresh(self) -> None:
        """Forget the data that was read from Proxmox VE."""
        self._cluster = None
        self._once_answers.clear()

    def close(self) -> None:
        if self._owner:
            self.database.close()

    # ---- choosing sandboxes ----

    def select_sandbox(self, vmid: int | None = None, name: str | None = None) -> Sandbox:
        """Return the sandbox with a VMID or name: the live one, else the last destroyed one.

        With both, the sandbox of the VMID must have the name. Raises NotFound when there never was such a sandbox.
        """
        if vmid is not None:
            sandbox, word = self.records.find_last_by_vmid(vmid), f"vmid: {vmid}"
        elif name is not None:
            sandbox, word = self.records.find_last_by_name(name), f"name: {name!r}"
        else:
            raise InvalidInput("give vmid, vmids or name")
        if sandbox is None:
            raise NotFound(f"sandbox not found ({word}). A VM without a record is never touched", vmid=vmid, name=name)
        if vmid is not None and name not in (None, sandbox.name):
            raise InvalidInput(
                f"name: sandbox {vmid} is named {sandbox.name!r}, not {name!r} (VMIDs are handed out again); nothing "
                "was done. Give the name or the VMID alone, or the pair of one sandbox",
                option="name",
                value=name,
            )
        return sandbox

    # ---- claiming ----

    @contextlib.contextmanager
    def claim_sandbox(
        self, sandbox: Sandbox, operation: str, *, wait: float | None = None
    ) -> Iterator[tuple[Claim, Sandbox]]:
        """Hold the claim on a sandbox, and yield the claim and the current record.

        ``wait``: seconds to wait for the claim (claim_timeout if None). Raises Busy after that, and Kept if a destroy
        was interrupted after its delete was decided: then only a destroy may go on.
        """
        claim = self.records.claim(sandbox.uuid, operation, wait=self.config.claim_timeout if wait is None else wait)
        try:
            if claim.interrupted and claim.interrupted.is_sent_delete and operation != "destroy":
                refuse_cut_off(claim, sandbox)
            yield claim, self.records.get(sandbox.uuid)
        finally:
            self.records.release(claim)

    def run_alone(self, job: str) -> contextlib.AbstractContextManager[None]:
        """Lock a pass (reconcile, cleanup) against other controllers. A dry run takes no lock.

        Raises Busy after claim_timeout.
        """
        if self.dry_run:
            return contextlib.nullcontext()
        return self.database.run_alone(job, self.config.claim_timeout)

    # ---- bulk ----

    def run_each(self, work: Callable[[A], B], items: list[A]) -> list[B]:
        """Return the results of ``work`` in the order of the items, with as many threads as there are connections."""
        return parallel.run_each(work, items, self.config.workers)


def refuse_cut_off(claim: Claim, sandbox: Sandbox) -> None:
    """Raise Kept if an interrupted destroy is unfinished: another operation would replace its journal entry."""
    if claim.interrupted is not None and claim.interrupted.kind == "destroy":
        raise Kept(
            "busy",
            f"a destroy of sandbox {sandbox.vmid} was cut off; destroy it again or run agentlab_reconcile to finish it",
            vmid=sandbox.vmid,
        )


def make_failure(sandbox: Sandbox, error: AgentlabError, **values: Any) -> Outcome:
    """Return the outcome of an item whose work raised the error: reason, message, and the state of the sandbox.

    The outcome is ``kept`` for a reason in the table of reasons.py, else ``failed``.
    """
    reason = error.reason if isinstance(error, Kept) else error.code
    upid = error.detail.get("upid")
    return Outcome.of(
        "kept" if reason in reasons.KEPT else "failed",
        sandbox,
        reason=reason,
        message=error.message,
        remedy=error.remedy,
        failed=True,
        upids=[upid] if upid else [],
        **values,
    )
