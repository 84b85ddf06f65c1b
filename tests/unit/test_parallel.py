# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Several at once: in order, as many as asked for, and an end where something unforeseen happens."""

from __future__ import annotations

import threading
import time

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import parallel


def test_the_answers_are_in_the_order_of_the_items() -> None:
    def work(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * 2

    assert parallel.run_each(work, list(range(100)), 8) == list(range(0, 200, 2))
    assert parallel.run_each(work, [], 8) == []


def test_as_many_run_at_a_time_as_asked_and_a_single_item_needs_no_thread() -> None:
    together = threading.Barrier(4)
    # Each waits for three others: fewer workers would never end.
    assert set(parallel.run_each(lambda _number: together.wait(10), list(range(8)), 4)) == {0, 1, 2, 3}
    assert len(set(parallel.run_each(lambda _number: threading.get_ident(), list(range(50)), 3))) <= 3
    assert parallel.run_each(lambda _number: threading.current_thread(), [1], 4) == [threading.current_thread()]


def test_the_first_error_is_raised_when_what_was_under_way_has_ended_and_nothing_more_is_begun() -> None:
    begun: list[int] = []
    ended: list[int] = []
    both = threading.Barrier(2)

    def work(number: int) -> None:
        begun.append(number)
        both.wait(10)
        if number == 0:
            time.sleep(0.1)
        ended.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        parallel.run_each(work, list(range(100)), 2)
    assert sorted(begun) == [0, 1] == sorted(ended)
