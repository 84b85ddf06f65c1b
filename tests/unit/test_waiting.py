# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The waiter, on a clock that only its own pauses and looks move on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import waiting


class Stopwatch:
    """A clock that stands still between pauses."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.pauses: list[float] = []

    def now(self) -> int:
        return int(self.time)

    def monotonic(self) -> float:
        return self.time

    def since_boot(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds


def after(looks: int, clock: Stopwatch, took: float = 0.0) -> Callable[[], str | None]:
    """Return a look that has a result the time after so many; each takes ``took`` seconds."""
    seen = 0

    def look() -> str | None:
        nonlocal seen
        seen += 1
        clock.time += took
        return "there" if seen > looks else None

    return look


def test_a_result_at_once_costs_no_pause() -> None:
    clock = Stopwatch()
    assert waiting.wait_for_result(clock, 60, after(0, clock)) == "there"
    assert clock.pauses == []


def test_pauses_grow_up_to_the_longest() -> None:
    clock = Stopwatch()
    assert waiting.wait_for_result(clock, 60, after(6, clock), pause=1.0, longest=3.0) == "there"
    assert clock.pauses == [1.0, 1.5, 2.25, 3.0, 3.0, 3.0]


def test_a_false_result_is_a_result() -> None:
    """An empty list of errors is an answer; only None means: not yet."""
    clock = Stopwatch()
    empty: list[str] = []
    assert waiting.wait_for_result(clock, 60, lambda: empty) is empty


def test_the_wait_ends_when_the_time_is_over() -> None:
    clock = Stopwatch()
    assert waiting.wait_for_result(clock, 10, after(999, clock), pause=1.0, longest=1.0) is None
    assert 10 < clock.time - 1000 <= 12


def test_no_time_is_still_a_look() -> None:
    clock = Stopwatch()
    assert waiting.wait_for_result(clock, 0, after(1, clock)) == "there"


def test_a_slow_look_does_not_end_the_wait() -> None:
    clock = Stopwatch()
    assert waiting.wait_for_result(clock, 10, after(1, clock, took=30.0)) == "there"


def test_an_error_ends_the_wait() -> None:
    clock = Stopwatch()

    def look() -> str | None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        waiting.wait_for_result(clock, 60, look)
    assert clock.pauses == []
