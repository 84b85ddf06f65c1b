# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double is put together from parts: each corrects another subject of fakepve."""

from __future__ import annotations

from support.proxmox_double import ProxmoxDouble


def test_no_two_parts_define_the_same_method() -> None:
    """Otherwise the order of the parts would decide which of them answers."""
    parts = [part for part in ProxmoxDouble.__bases__ if part.__module__.startswith("support.")]
    assert len(parts) > 5
    owners: dict[str, list[str]] = {}
    for part in parts:
        for name in vars(part):
            if not name.startswith("__"):
                owners.setdefault(name, []).append(part.__name__)
    assert {name: several for name, several in owners.items() if len(several) > 1} == {}
