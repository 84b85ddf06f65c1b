# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The soak (`make soak`) tells growth of the daemon's memory from warming up."""

from __future__ import annotations

from collections.abc import Callable

from support import soak


def samples(resident: Callable[[int], int], database: int = 4000) -> list[soak.Sample]:
    return [soak.Sample(n, resident(n), 30000, 21, 36, database, 15, n, n) for n in range(60)]


def test_the_soak_tells_growth_from_warming_up() -> None:
    assert soak.judge(samples(lambda n: 50000 + min(n, 15) * 500)) == [], "what the first third takes is warm-up"
    assert soak.judge(samples(lambda n: 50000 + n % 7 * 500)) == [], "up and down is no growth"
    assert soak.judge(samples(lambda n: 50000 + n * 100)) == ["resident grew by 2700, more than 2048"]


def test_an_hours_last_quarter_is_compared_with_its_first() -> None:
    assert soak.judge_quarters(samples(lambda n: 50000 + n * 15), full_length=True) == [], "1.3 %"
    grown = soak.judge_quarters(samples(lambda n: 50000 + n * 30), full_length=True)
    assert grown == ["resident grew by 2.7 % from the first quarter to the last"]
    assert soak.judge_quarters(samples(lambda n: 50000 + n * 30), full_length=False) == [], "a short run is warm-up"
