# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the same work on several items at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def run_each(work: Callable[[A], B], items: list[A], workers: int) -> list[B]:
    """Return the results of ``work`` in the order of the items, with ``workers`` threads. One item needs no thread.

    After an error no further item is begun. When the running ones have ended, the first error in the order of the
    items is raised.
    """
    if len(items) <= 1:
        return [work(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    # A free worker takes the next item. A future for each item would need a megabyte of memory for a thousand items.
    waiting = deque(range(len(items)))
    answers: dict[int, B] = {}
    errors: dict[int, BaseException] = {}

    def work_on_items(_worker: int) -> None:
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
            list(pool.map(work_on_items, range(count)))
        finally:
            # The wait may be interrupted (Ctrl-C, a stopping daemon). Then begin no further item.
            waiting.clear()
    if errors:
        raise errors[min(errors)]
    return [answers[index] for index in range(len(items))]
