# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of attacks share: the lab with two nodes, and everything that could touch a VM that it should not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import model
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from support.lab import Lab

NOTHING_LEFT: dict[str, list[object]] = {"claims": [], "operations": []}


@contextlib.contextmanager
def two_nodes(lab: Lab) -> Iterator[None]:
    """Reset the lab and give it a second node; at the end hold the run to the promises."""
    lab.reset()
    lab.pve.add_node("pve2")
    clock = lab.clock
    yield
    lab.clock = clock
    lab.check_promises()
    lab.pve.nodes.pop("pve2", None)
    lab.reset()


def try_all(lab: Lab, *vmids: int) -> None:
    """Whatever could stop, delete or write off something; errors are ours and have a sentence."""
    works: list[Callable[[], Any]] = [
        lab.expire,
        lambda: lab.prune(dry_run=True),
        lab.prune,
        lambda: lab.destroy(*vmids, force=True),
        lab.reconcile,
        lab.reconcile,
    ]
    for work in works:
        try:
            work()
        except AgentlabError as error:
            assert error.message


def marked(lab: Lab, sandbox: model.Sandbox) -> list[int]:
    """VMIDs of the VMs that carry this sandbox's marker."""
    return [vm.vmid for vm in lab.pve.vms if sandbox.uuid in identity.read_markers(vm.config)]
