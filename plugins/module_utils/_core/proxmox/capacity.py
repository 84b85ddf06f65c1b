# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the nodes have and carry, from the one list of all resources, and the bridges of a node.

Figures of a node need Sys.Audit on it: without that Proxmox VE leaves them out, and here they are None, never zero.
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
    """The cluster as the list shows it: nodes by name, VMs that run, and what templates are configured with."""

    nodes: dict[str, Node] = field(default_factory=dict)
    running: dict[int, Vm] = field(default_factory=dict)
    # Memory and disk in bytes, and virtual CPUs, of each template; a value that the list does not tell is 0.
    templates: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    # Names of the storages that are shared by nodes, whatever they hold.
    shared: set[str] = field(default_factory=set)

    def sees_figures(self) -> bool:
        """Return whether some node that is online shows its memory."""
        return any(node.memory is not None for node in self.nodes.values() if node.online)


def _number(row: dict[str, Any], key: str) -> int | None:
    """Return a whole number of a row; None where it is missing or something else."""
    try:
        return int(row[key])
    except (KeyError, TypeError, ValueError):
        return None


def parse(rows: Iterable[dict[str, Any]]) -> Capacity:
    """Return what ``GET /cluster/resources`` tells of nodes, storages and VMs."""
    capacity = Capacity()
    storages: dict[str, dict[str, Room]] = {}
    told = list(rows)
    for row in told:
        node, kind = str(row.get("node")), row.get("type")
        if kind == "storage":
            if str(row.get("shared")) == "1":
                capacity.shared.add(str(row.get("storage")))
            if "images" not in str(row.get("content") or "images").split(","):
                continue
            total, used = _number(row, "maxdisk"), _number(row, "disk")
            free = total - used if total is not None and used is not None else None
            active = row.get("status") == "available"
            shared = str(row.get("shared")) == "1"
            storages.setdefault(node, {})[str(row.get("storage"))] = Room(active, total, free, shared)
        elif kind == "qemu":
            vmid = _number(row, "vmid")
            if vmid is None:
                continue
            if str(row.get("template")) == "1":
                capacity.templates[vmid] = (
                    _number(row, "maxmem") or 0,
                    _number(row, "maxcpu") or 0,
                    _number(row, "maxdisk") or 0,
                )
            elif row.get("status") == "running":
                # memhost: what the process takes on the node, where Proxmox VE 9 tells it.
                used_memory = max(_number(row, "memhost") or 0, _number(row, "mem") or 0)
                capacity.running[vmid] = Vm(node, used_memory, _number(row, "maxmem"), _number(row, "uptime") or 0)
    for row in told:
        if row.get("type") == "node":
            name = str(row.get("node"))
            capacity.nodes[name] = Node(
                name,
                online=row.get("status") == "online",
                maintenance=row.get("hastate") == "maintenance",
                memory=_number(row, "maxmem"),
                used=_number(row, "mem"),
                cpus=_number(row, "maxcpu"),
                # Without rights no storage is listed at all, on any node, and that says nothing.
                storages=storages.get(name, {}) if storages else None,
            )
    return capacity


def bridges(client: ProxmoxClient, node: str) -> frozenset[str] | None:
    """Return the bridges and vnets of a node; None where these credentials are shown none of them."""
    try:
        rows = client.get_list(f"nodes/{node}/network", type="any_bridge")
    except ProxmoxError:
        return None
    return frozenset(str(row.get("iface")) for row in rows) or None
