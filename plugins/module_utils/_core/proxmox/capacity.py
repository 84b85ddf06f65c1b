# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the resources and the load of all nodes from the list of resources, and the bridges of one node.

Proxmox VE shows a node's figures only with Sys.Audit on the node. A missing figure is None, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProxmoxError
from ..nodes import Node, Room, Vm
from .client import ProxmoxClient


@dataclass(slots=True)
class Capacity:
    """The cluster in the list of resources: nodes by name, running VMs by VMID, and sizes of templates by VMID."""

    nodes: dict[str, Node] = field(default_factory=dict)
    running: dict[int, Vm] = field(default_factory=dict)
    # Template VMID -> (memory in bytes, virtual CPUs, disk in bytes). A value that the list omits is 0.
    templates: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    # Names of all shared storages, whatever their content.
    shared: set[str] = field(default_factory=set)

    def sees_figures(self) -> bool:
        """Return whether the list shows the memory of at least one online node."""
        return any(node.memory is not None for node in self.nodes.values() if node.online)


def _read_number(row: dict[str, Any], key: str) -> int | None:
    """Return a whole number from a row; None if it is missing or of another type."""
    try:
        return int(row[key])
    except (KeyError, TypeError, ValueError):
        return None


def parse(rows: Iterable[dict[str, Any]]) -> Capacity:
    """Return the nodes, storages and VMs in the answer to ``GET /cluster/resources``."""
    capacity = Capacity()
    storages: dict[str, dict[str, Room]] = {}
    all_rows = list(rows)
    for row in all_rows:
        node, kind = str(row.get("node")), row.get("type")
        if kind == "storage":
            if str(row.get("shared")) == "1":
                capacity.shared.add(str(row.get("storage")))
            if "images" not in str(row.get("content") or "images").split(","):
                continue
            total, used = _read_number(row, "maxdisk"), _read_number(row, "disk")
            free = total - used if total is not None and used is not None else None
            active = row.get("status") == "available"
            shared = str(row.get("shared")) == "1"
            storages.setdefault(node, {})[str(row.get("storage"))] = Room(active, total, free, shared)
        elif kind == "qemu":
            vmid = _read_number(row, "vmid")
            if vmid is None:
                continue
            if str(row.get("template")) == "1":
                capacity.templates[vmid] = (
                    _read_number(row, "maxmem") or 0,
                    _read_number(row, "maxcpu") or 0,
                    _read_number(row, "maxdisk") or 0,
                )
            elif row.get("status") == "running":
                # memhost is the memory of the VM's process on the node. Proxmox VE 9 reports it.
                used_memory = max(_read_number(row, "memhost") or 0, _read_number(row, "mem") or 0)
                capacity.running[vmid] = Vm(
                    node, used_memory, _read_number(row, "maxmem"), _read_number(row, "uptime") or 0
                )
    for row in all_rows:
        if row.get("type") == "node":
            name = str(row.get("node"))
            capacity.nodes[name] = Node(
                name,
                online=row.get("status") == "online",
                maintenance=row.get("hastate") == "maintenance",
                memory=_read_number(row, "maxmem"),
                used=_read_number(row, "mem"),
                cpus=_read_number(row, "maxcpu"),
                # Proxmox omits storages that the credentials may not see. So a list without any storage proves nothing.
                storages=storages.get(name, {}) if storages else None,
            )
    return capacity


def read_bridges(client: ProxmoxClient, node: str) -> frozenset[str] | None:
    """Return the bridges and vnets of a node; None when these credentials may see none of them."""
    try:
        rows = client.get_list(f"nodes/{node}/network", type="any_bridge")
    except ProxmoxError:
        return None
    return frozenset(str(row.get("iface")) for row in rows) or None
