# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many requests the work costs: counts, never times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_prune_of_records_whose_vms_are_gone_costs_a_handful_of_requests_together(lab: Lab) -> None:
    vmids = [lab.create(name=f"a{number}").vmid for number in range(12)]
    lab.context().database.write(lambda conn: conn.execute("UPDATE sandboxes SET state = 'TIMEOUT'") and None)
    for vmid in vmids:
        lab.pve.remove_vm(vmid)
    lab.pve.counted.clear()
    assert len(lab.prune().pruned) == 12
    assert lab.pve.count() <= 5, lab.pve.counted


def test_a_bulk_destroy_reads_the_list_once_and_each_vm_once(lab: Lab) -> None:
    vmids = [lab.create(name=f"a{number}").vmid for number in range(8)]
    for vmid in vmids:
        lab.power("stop", vmid)
    lab.pve.counted.clear()
    assert {one.state for one in lab.destroy(*vmids)} == {"DESTROYED"}
    counted = lab.pve.counted
    one = "/nodes/{node}/qemu/{vmid}"
    assert counted[f"GET {one}/config"] == counted[f"PUT {one}/config"] == counted[f"DELETE {one}"] == 8
    # Once to find them, once to prove all of them gone.
    assert counted["GET /cluster/resources"] == 2
    assert counted["GET /cluster/status"] == 1
