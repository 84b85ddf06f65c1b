# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The operations of three controllers on PostgreSQL, some seconds of them, and what the run would find.

A failing run is replayed with AGENTLAB_TEST_SEED (the choices are the same; how processes meet is up to the machine).
`make test-chaos CONTROLLERS=3 OPERATIONS=100000` is the long run.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from support.engines import require_postgresql
from support.operations import Figures, Run
from support.operations_cluster import Cluster

pytestmark = pytest.mark.faults
SEED = int(os.environ.get("AGENTLAB_TEST_SEED") or 0) or random.SystemRandom().randrange(1, 10**6)
# Heartbeats end after six seconds instead of thirty, so that the run takes seconds.
DEAD_SECONDS = 6.0


def test_three_controllers_lose_nothing_and_do_nothing_twice(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_postgresql()
    print(f"\nAGENTLAB_TEST_SEED={SEED}")
    # The path of a socket may have 107 characters.
    run = Run(tmp_path_factory.mktemp("o"), SEED, 3, DEAD_SECONDS)
    try:
        figures = run.run(1500)
    finally:
        run.close()
    print(figures.table())
    assert figures.problems() == []
    assert {"kills", "cuts", "restarts", "failovers"} <= set(figures.disturbances)
    assert figures.operations.total() >= 1500 and figures.events > 500 and figures.jobs


# ---- what such a run would find ----


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(str(tmp_path_factory.mktemp("c") / "cluster"))
    yield made
    made.close()


def test_two_controllers_on_one_sandbox_would_be_found(cluster: Cluster) -> None:
    owner = str(uuid.uuid4())
    assert cluster.clone(1000, owner, "0" * 32, 5) is not None
    digest = str((cluster.config(1000) or {})["digest"])
    assert cluster.change(1000, owner, digest, 6, False) and cluster.double == []
    assert not cluster.change(1000, owner, digest, 5, True)
    assert cluster.double == [f"change of 1000 of {owner} with fence 5, after 6"]
    assert cluster.clone(1001, owner, "0" * 32, 7) is not None
    assert cluster.double[1:] == [f"{owner} has a second VM, 1001"]


def test_a_strangers_vm_that_is_changed_would_be_found(cluster: Cluster) -> None:
    ours = str(uuid.uuid4())
    smbios = cluster.clone(1000, ours, "0" * 32, 1)
    assert cluster.add_stranger(1000) and not cluster.add_stranger(1001)
    config = cluster.config(1000) or {}
    assert identity.judge(ours, smbios, config).identity == identity.FOREIGN
    assert cluster.change(1000, ours, config["digest"], 1, True)
    assert cluster.strangers == [f"VM 1000 of a stranger was changed for {ours}"]


def test_late_takeovers_and_lost_writes_are_problems() -> None:
    figures = Figures(claims=[39.0, 41.0], jobs=[9.0, 10.5], lost=["a"], double=["b"], strangers=["c"], other=["d"])
    assert figures.problems() == [
        "b",
        "a",
        "c",
        "a claim was taken over after 41.0 s",
        "a job was taken over after 10.5 s",
        "d",
    ]
    assert "| takeovers of claims | 2, the longest 41.0 s |" in figures.table()
