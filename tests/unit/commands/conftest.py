# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A running sandbox whose guest really runs commands; a test gets the last one again unless it was changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.lab import Lab
from support.proxmox_guest import Guest


@pytest.fixture(scope="module")
def one_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("guest"))
    yield made
    made.stop()


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.calm()
    yield one_lab
    one_lab.calm()
    one_lab.pve.close_machines()
    assert one_lab.pve.hook_errors == []


def condition(lab: Lab, sandbox: Sandbox) -> Any:
    """Return what a test may have changed of a sandbox and its VM."""
    vm = lab.pve.vm(sandbox.vmid)
    record = lab.context().records.get(sandbox.uuid)
    return vm and (dict(vm.config), vm.status, vm.qmpstatus, vm.agent is not None, record.generation)


@pytest.fixture(scope="module")
def last_sandbox(one_lab: Lab) -> list[Any]:
    """The sandbox of the last test of this laboratory and its condition; empty before the first test."""
    return []


@pytest.fixture
def sandbox(lab: Lab, last_sandbox: list[Any]) -> Sandbox:
    """A running sandbox: that of the test before, unless the test changed it (creating one takes a second)."""
    if not last_sandbox or condition(lab, last_sandbox[0]) != last_sandbox[1]:
        lab.reset()
        made = lab.create()
        last_sandbox[:] = [made, condition(lab, made)]
    lab.pve.requests.clear()
    lab.pve.counted.clear()
    database = lab.context().database
    database.write(lambda conn: conn.execute("DELETE FROM events WHERE operation = 'exec'") and None)
    database.write(lambda conn: conn.execute("DELETE FROM runs") and None)
    return last_sandbox[0]


@pytest.fixture
def guest(lab: Lab, sandbox: Sandbox) -> Guest:
    return lab.pve.machine(sandbox.vmid)
