# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Group commit: writes of many threads share one transaction, whatever the engine.

The thread that gets the writer's lock first commits for all that queued up meanwhile. A bulk run then pays for few disk
syncs at full durability, and one refused write spoils no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class QueuedWrite:
    """One write that waits for its commit, and its result."""

    __slots__ = ("done", "error", "turn", "value", "work")

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.done = False
        # Set when it is done, or when it is for this one to commit what has queued up.
        self.turn = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class GroupCommit:
    """The queue of writes. An engine says how a batch of them becomes one transaction."""

    def __init__(self) -> None:
        self._queue: list[QueuedWrite] = []
        self._led = False
        self._queue_lock = threading.Lock()
        self._writer_lock = threading.Lock()

    def run_batch(self, batch: list[QueuedWrite]) -> None:
        """Run these writes in one transaction and set their values and errors; raise when nothing was written."""
        raise NotImplementedError

    def interrupted(self) -> Exception:
        """Return the engine's error for a transaction that ended before its commit."""
        raise NotImplementedError

    def enqueue(self, work: Callable[[Any], T]) -> T:
        """Have ``work`` committed with what else waits; return its value or raise its error."""
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
        if not job.done:
            self._lead()
        if job.error is not None:
            raise job.error
        value: T = job.value
        return value

    def _lead(self) -> None:
        """Commit for all that have queued up, then let the next one do it for those that came meanwhile."""
        batch: list[QueuedWrite] = []
        try:
            with self._writer_lock:
                with self._queue_lock:
                    batch, self._queue = self._queue, []
                self._commit(batch)
        finally:
            with self._queue_lock:
                self._pass_on()
            for job in batch:
                job.turn.set()

    def _pass_on(self) -> None:
        self._led = bool(self._queue)
        if self._queue:
            self._queue[0].turn.set()

    def _withdraw(self, job: QueuedWrite) -> None:
        """Interrupted while it waited: nobody may wait for it to commit for them."""
        with self._queue_lock:
            if job in self._queue:
                self._queue.remove(job)
                if job.turn.is_set():
                    self._pass_on()

    def _commit(self, batch: list[QueuedWrite]) -> None:
        try:
            self.run_batch(batch)
        except BaseException as error:
            # Also when this thread is interrupted: the others must not take for written what was undone.
            told = error if isinstance(error, Exception) else self.interrupted()
            for job in batch:
                job.error = job.error or told
            if told is not error:
                raise
        finally:
            for job in batch:
                job.done = True
