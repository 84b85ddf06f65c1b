# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Group commit: writes of many threads share one transaction, on either engine.

The thread that gets the writer's lock first commits every write queued by then. A bulk run so needs few disk syncs at
full durability. A refused write rolls back only itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class QueuedWrite:
    """One write that waits for its commit, and its result or error."""

    __slots__ = ("error", "finished", "turn", "value", "work")

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.finished = False
        # Set when the write is done, or when its thread is the next to commit the queue.
        self.turn = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class GroupCommit:
    """The queue of writes. A subclass defines how an engine runs a batch in one transaction."""

    def __init__(self) -> None:
        self._queue: list[QueuedWrite] = []
        self._led = False
        self._queue_lock = threading.Lock()
        self._writer_lock = threading.Lock()

    def run_batch(self, batch: list[QueuedWrite]) -> None:
        """Run these writes in one transaction and set their values and errors. Raises when nothing was written."""
        raise NotImplementedError

    def make_interruption_error(self) -> Exception:
        """Return the engine's error for a transaction that ended before its commit."""
        raise NotImplementedError

    def enqueue(self, work: Callable[[Any], T]) -> T:
        """Commit ``work`` together with the other queued writes. Returns its value or raises its error."""
        job = QueuedWrite(work)
        with self._queue_lock:
            self._queue.append(job)
            if not self._led:
                self._led = True
                job.turn.set()
        try:
            job.turn.wait()
        except BaseException:
            self._withdraw(job)
            raise
        if not job.finished:
            self._commit_queue()
        if job.error is not None:
            raise job.error
        value: T = job.value
        return value

    def _commit_queue(self) -> None:
        """Commit all queued writes, then let the next waiting thread commit those that arrived meanwhile."""
        batch: list[QueuedWrite] = []
        try:
            with self._writer_lock:
                with self._queue_lock:
                    batch, self._queue = self._queue, []
                self._commit(batch)
        finally:
            with self._queue_lock:
                self._pass_lead_on()
            for job in batch:
                job.turn.set()

    def _pass_lead_on(self) -> None:
        """Wake the first waiting thread, which commits the queue next. The queue's lock is held."""
        self._led = bool(self._queue)
        if self._queue:
            self._queue[0].turn.set()

    def _withdraw(self, job: QueuedWrite) -> None:
        """Take an interrupted write out of the queue, so that no other thread waits for it to commit."""
        with self._queue_lock:
            if job in self._queue:
                self._queue.remove(job)
                if job.turn.is_set():
                    self._pass_lead_on()

    def _commit(self, batch: list[QueuedWrite]) -> None:
        """Run the batch, and mark each of its writes as finished, with an error if the transaction failed."""
        try:
            self.run_batch(batch)
        except BaseException as error:
            # An interrupt of this thread counts as well: other threads must not take a rolled back write for written.
            shared_error = error if isinstance(error, Exception) else self.make_interruption_error()
            for job in batch:
                job.error = job.error or shared_error
            if shared_error is not error:
                raise
        finally:
            for job in batch:
                job.finished = True
