# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Doing the same to several things at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def each(work: Callable[[A], B], items: list[A], workers: int) -> list[B]:
    """Return the results of ``work`` in the order of the items, with ``workers`` threads. One item needs no thread.

    Raises the first error (in that order) when the work under way has ended; then nothing more is begun.
    """
    if len(items) <= 1:
        return [work(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    # Each worker takes the next one when it is free: a future for each item, all made at the start, is a megabyte for a
    # thousand.
    waiting = deque(range(len(items)))
    answers: dict[int, B] = {}
    errors: dict[int, BaseException] = {}

    def some(_worker: int) -> None:
        while True:
            try:
                index = waiting.popleft()
            except IndexError:
                return
            try:
                answers[index] = work(items[index])
            except BaseException as error:
                errors[index] = error
                waiting.clear()

    count = min(workers, len(items))
    with ThreadPoolExecutor(max_workers=count) as pool:
        try:
            list(pool.map(some, range(count)))
        finally:
            # Whoever waits here may be interrupted.
            waiting.clear()
    if errors:
        raise errors[min(errors)]
    return [answers[index] for index in range(len(items))]
