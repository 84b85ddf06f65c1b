# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which of the fault tests run: the parts that ``SHARD`` names."""

from __future__ import annotations

import pytest

from support.shards import part_of


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 200])
def test_parts_divide_everything_and_leave_nothing_out(parts: int) -> None:
    whole = list(range(100))
    found = [part_of(whole, f"{number}/{parts}") for number in range(1, parts + 1)]
    assert sorted(one for part in found for one in part) == whole
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "1", "1/0", "1/3/5", "-1/3"])
def test_a_part_that_makes_no_sense_is_refused(shard: str) -> None:
    with pytest.raises(pytest.UsageError, match="SHARD='.*' is not valid. Valid: i/n, such as 2/5"):
        part_of([], shard)
