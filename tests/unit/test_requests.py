# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many requests the work costs: counts, never times; and what must not be saved on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import Kept

from support.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_each_absence_is_asked_for_when_something_may_be_hidden_from_the_token(lab: Lab) -> None:
    made = [lab.create(name=f"a{number}") for number in range(4)]
    lab.context().database.write(lambda conn: conn.execute("UPDATE sandboxes SET state = 'TIMEOUT'") and None)
    for one in made[:3]:
        lab.pve.remove_vm(one.vmid)
    # The last one is there, but hidden: /access/permissions says nothing of the path on which there is no right.
    real, hidden = lab.pve.allowed, f"/vms/{made[3].vmid}"
    lab.pve.allowed = lambda user, path, priv: path != hidden and real(user, path, priv)
    report = lab.prune()
    assert [one.vmid for one in report.pruned] == [one.vmid for one in made[:3]]
    assert [one.state for one in lab.records() if one.vmid == made[3].vmid] == ["TIMEOUT"]
    assert lab.pve.vm(made[3].vmid) is not None


def test_a_bulk_destroy_reads_the_list_once_and_each_vm_once(lab: Lab) -> None:
    vmids = [lab.create(name=f"a{number}").vmid for number in range(8)]
    for vmid in vmids:
        lab.power("stop", vmid)
    lab.pve.counted.clear()
    assert {one.state for one in lab.destroy(*vmids)} == {"DESTROYED"}
    counted = lab.pve.counted
    one = "/nodes/{node}/qemu/{vmid}"
    assert counted[f"GET {one}/config"] == counted[f"PUT {one}/config"] == counted[f"DELETE {one}"] == 8
    # Once to find them; that each is gone is asked for by itself, since a token may not see everything.
    assert counted["GET /cluster/resources"] == 1
    assert counted["GET /cluster/nextid"] == 8
    assert counted["GET /cluster/status"] == 1


def test_a_repeated_renewal_is_no_success_while_the_sandbox_is_being_destroyed(lab: Lab) -> None:
    made = lab.create(ttl=7200)
    ctx = lab.context()
    claim = ctx.records.claim(made.uuid, "destroy")
    ctx.records.journal(claim, "destroy", "verifying", {})
    with pytest.raises(Kept, match="it is being destroyed"):
        lab.renew(made.vmid, 3600, min_remaining=60)


def test_absences_are_asked_for_side_by_side(lab: Lab) -> None:
    """As many at once as there are connections: a thousand of them are not a thousand round trips one after the other."""
    lab.create()
    under_way: list[int] = []
    most = 0
    lock = threading.Lock()

    def before(method: str, path: str) -> None:
        nonlocal most
        if path.endswith("/cluster/nextid"):
            with lock:
                under_way.append(1)
                most = max(most, len(under_way))

    def after(method: str, path: str) -> None:
        if path.endswith("/cluster/nextid"):
            with lock:
                under_way.pop()

    lab.pve.slow_network(1.0)
    lab.pve.time_scale = 0.05
    lab.pve.before, lab.pve.after = before, after
    found = lab.context(connections=4).cluster.prove_absent(range(1500, 1512))
    assert len(found) == 12 and all(one.absent for one in found.values())
    assert most > 1
