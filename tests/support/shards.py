# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Divide a long suite into parts: ``SHARD=2/5`` runs the second fifth of it."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest


def part_of(items: list[Any], shard: str) -> list[Any]:
    """Return one part of the items: ``2/5`` is every fifth item, beginning with the second."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"SHARD={shard!r} is not valid. Valid: i/n, such as 2/5")
    return items[int(match[1]) - 1 :: int(match[2])]


def keep_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that are not in the part named by the environment variable SHARD."""
    shard = os.environ.get("SHARD")
    if shard:
        chosen = part_of(items, shard)
        kept = set(map(id, chosen))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = chosen
