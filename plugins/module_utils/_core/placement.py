# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Choose the node of a new sandbox. This file is pure: the same input gives the same answer, without any I/O.

``decide`` takes Proxmox VE's data (nodes, young VMs), the records' data (sandboxes on each node, creations under way),
the wish, and the operator's rules. It returns the node, and for each node the reason. docs/placement.md describes the
rules for users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .nodes import Node, Preference, Rules, Vm

MIB = 1024 * 1024

# Reasons for refusing a node. Metrics count by these words; docs/placement.md explains them.
REASONS: dict[str, str] = {
    "offline": "the node is offline",
    "maintenance": "the node is in HA maintenance",
    "not_allowed": "placement.nodes does not name the node",
    "failed": "the node failed this creation",
    "template": "the template cannot be reached from the node",
    "storage": "the storage is not there, not active, or has not enough room",
    "bridge": "the node has no such bridge or vnet",
    "workspace": "the workspace lies on another node",
    "snippets": "user data written here is not seen on the node",
    "cpus": "the node has fewer CPUs than the sandbox would get",
    "memory": "the node has not enough free memory",
    "max_per_node": "the node has as many sandboxes as placement.max_per_node allows",
    "less_suitable": "another node suits better",
}
CHOSEN = "chosen"


@dataclass(frozen=True, slots=True)
class Reservation:
    """The memory and disk, in bytes, that the records reserve for a sandbox on a node.

    ``creating``: the creation has not ended, so the storage's figures may not include the disk yet.
    """

    vmid: int
    node: str
    memory: int = 0
    storage: str | None = None
    disk: int = 0
    creating: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """The records' data: live sandboxes on each node, those of the same kind (anti-affinity), and reservations."""

    sandboxes: Mapping[str, int] = field(default_factory=dict)
    same: Mapping[str, int] = field(default_factory=dict)
    reservations: tuple[Reservation, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """The needs of the sandbox. Memory and disk are in bytes; 0 means unknown."""

    memory: int = 0
    # Virtual CPUs. Proxmox VE does not start a VM with more of them than the node has CPUs.
    cpus: int = 0
    storage: str | None = None
    disk: int = 0
    bridges: frozenset[str] = frozenset()
    template: str = ""
    profile: str | None = None
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """The reason for choosing or refusing a node. ``free`` is its free memory in bytes, without the new sandbox."""

    node: str
    reason: str
    message: str
    free: int | None
    sandboxes: int

    def public(self) -> dict[str, Any]:
        """Return the verdict for answers. Memory is in MiB, null where unknown."""
        return {
            "node": self.node,
            "chosen": self.reason == CHOSEN,
            "reason": self.reason,
            "message": self.message,
            "free_memory": None if self.free is None else self.free // MIB,
            "sandboxes": self.sandboxes,
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen node (None: no node fits), a verdict for each node, and the compared value: memory or sandboxes."""

    node: str | None
    verdicts: tuple[NodeVerdict, ...]
    by: str
    strategy: str

    def public(self) -> dict[str, Any]:
        """Return the decision for answers."""
        return {
            "node": self.node,
            "strategy": self.strategy,
            "by": self.by,
            "nodes": [verdict.public() for verdict in self.verdicts],
        }

    def explain_none(self) -> str:
        """Return one text with the reason of each node, for the case that no node fits."""
        return "; ".join(f"{verdict.node}: {verdict.message}" for verdict in self.verdicts)


def show_memory(size: int) -> str:
    """Return a size in bytes in the form in which people write memory."""
    return f"{size / 1024**3:.1f} GiB" if abs(size) >= 10 * 1024**3 else f"{size // MIB} MiB"


def sum_promises(nodes: Iterable[Node], vms: Mapping[int, Vm], load: Load, settle: int) -> dict[str, int]:
    """Return for each node the memory in bytes that is reserved for sandboxes and not yet in use.

    A VM that has just booted uses a fraction of its memory. So all of its configured memory counts until it has been up
    for ``settle`` seconds. ``vms`` are our own VMs only.
    """
    sums = {node.name: 0 for node in nodes}
    reserved: set[int] = set()
    for reservation in load.reservations:
        vm = vms.get(reservation.vmid)
        reserved.add(reservation.vmid)
        if vm is not None and vm.uptime >= settle:
            if not reservation.creating:
                continue
            # The list is older than the reservation, so the row is an earlier VM with this VMID.
            vm = None
        # Proxmox VE may have migrated the VM since the record was written.
        node = vm.node if vm is not None and not reservation.creating else reservation.node
        if node in sums:
            sums[node] += max(0, reservation.memory - (vm.used if vm is not None else 0))
    for vmid, vm in vms.items():
        if vmid not in reserved and vm.uptime < settle and vm.memory is not None and vm.node in sums:
            sums[vm.node] += max(0, vm.memory - vm.used)
    return sums


def decide(nodes: Iterable[Node], vms: Mapping[int, Vm], load: Load, wish: Wish, rules: Rules) -> Decision:
    """Return the node for the wish, and for each node the reason for choosing or refusing the node.

    ``vms`` are our own running VMs in the list. If a node that fits has no memory figures, the number of sandboxes is
    compared instead of memory.
    """
    known = sorted(nodes, key=lambda node: node.name)
    promises = sum_promises(known, vms, load, rules.settle)
    free = {
        node.name: None if node.memory is None or node.used is None else node.memory - node.used - promises[node.name]
        for node in known
    }
    counts = {node.name: load.sandboxes.get(node.name, 0) for node in known}
    refusals: dict[str, tuple[str, str]] = {}
    for node in known:
        refusal = _find_refusal(node, free[node.name], counts[node.name], load.reservations, wish, rules)
        if refusal is not None:
            refusals[node.name] = refusal
    candidates = [node.name for node in known if node.name not in refusals]
    by = "sandboxes" if any(free[name] is None for name in candidates) else "memory"
    sign = 1 if rules.strategy == "spread" else -1

    def rank(name: str) -> tuple[Any, ...]:
        amount = free[name]
        return (
            _concerns(rules.avoid, name, wish),
            not _concerns(rules.prefer, name, wish),
            load.same.get(name, 0) if rules.anti_affinity else 0,
            sign * (counts[name] if by == "sandboxes" or amount is None else -amount),
            sign * counts[name],
            name,
        )

    ranked = sorted(candidates, key=rank)
    chosen = ranked[0] if ranked else None
    verdicts = []
    for node in known:
        name = node.name
        if name == chosen:
            reason, message = CHOSEN, _explain_choice(free[name], counts[name], by, rules)
        elif name in refusals:
            reason, message = refusals[name]
        else:
            reason, message = (
                "less_suitable",
                _explain_lower_rank(name, str(chosen), free, counts, load, wish, rules, by),
            )
        verdicts.append(NodeVerdict(name, reason, message, free[name], counts[name]))
    return Decision(chosen, tuple(verdicts), by, rules.strategy)


def _find_refusal(
    node: Node,
    free: int | None,
    count: int,
    reservations: Iterable[Reservation],
    wish: Wish,
    rules: Rules,
) -> tuple[str, str] | None:
    """Return (reason, sentence) if the node cannot take the sandbox, else None."""
    if not node.online:
        return "offline", "it is offline"
    if node.maintenance:
        return "maintenance", "it is in HA maintenance"
    if rules.nodes is not None and node.name not in rules.nodes:
        return "not_allowed", f"placement.nodes allows {', '.join(sorted(rules.nodes)) or 'no node'}"
    if node.refused is not None:
        return node.refused
    if not node.template:
        return (
            "template",
            f"template {wish.template} lies on local storage of another node, and none of that name is here",
        )
    storage = node.storage or wish.storage
    if storage is not None and node.storages is not None:
        disk = wish.disk if node.disk is None else node.disk
        refusal = _find_storage_refusal(node, storage, disk, reservations, rules)
        if refusal is not None:
            return refusal
    if node.bridges is not None and not wish.bridges <= node.bridges:
        return "bridge", f"it has no bridge or vnet {', '.join(sorted(wish.bridges - node.bridges))}"
    if node.cpus is not None and wish.cpus > node.cpus:
        return "cpus", f"it has {node.cpus} CPUs, and the sandbox would get {wish.cpus}"
    if rules.max_per_node is not None and count >= rules.max_per_node:
        return "max_per_node", f"it has {count} sandboxes, and placement.max_per_node is {rules.max_per_node}"
    if free is not None and wish.memory > free:
        return (
            "memory",
            f"{show_memory(max(free, 0))} of its memory are free beyond what is used and promised, and the sandbox "
            f"needs {show_memory(wish.memory)}",
        )
    return None


def _find_storage_refusal(
    node: Node, name: str, disk: int, reservations: Iterable[Reservation], rules: Rules
) -> tuple[str, str] | None:
    room = (node.storages or {}).get(name)
    if room is None:
        return "storage", f"it has no storage {name} for disks of VMs"
    if not room.active:
        return "storage", f"its storage {name} is not active"
    if room.free is None:
        return None
    reserved = sum(
        reservation.disk
        for reservation in reservations
        if reservation.creating and reservation.storage == name and (room.shared or reservation.node == node.name)
    )
    free = room.free - reserved - (room.total or 0) * rules.reserve // 100
    if free < max(disk, 1):
        return (
            "storage",
            f"its storage {name} has {show_memory(max(free, 0))} of room beyond placement.reserve ({rules.reserve}%) "
            f"and what is being created, and the sandbox needs {show_memory(disk)}",
        )
    return None


def _concerns(preferences: Iterable[Preference], node: str, wish: Wish) -> bool:
    """Return whether a preference for the wish's profile or tags names the node."""
    return any(
        node in preference.nodes
        and (preference.value == wish.profile if preference.kind == "profile" else preference.value in wish.tags)
        for preference in preferences
    )


def _explain_choice(free: int | None, count: int, by: str, rules: Rules) -> str:
    if by == "sandboxes":
        most = "fewest" if rules.strategy == "spread" else "most"
        return (
            f"it has the {most} sandboxes ({count}) of the nodes that suit best; memory was not compared, because a "
            "node shows no figures (Sys.Audit on /nodes)"
        )
    most = "most" if rules.strategy == "spread" else "least"
    return f"it has the {most} free memory ({show_memory(free or 0)}) of the nodes that suit best"


def _explain_lower_rank(
    name: str,
    chosen: str,
    free: Mapping[str, int | None],
    counts: Mapping[str, int],
    load: Load,
    wish: Wish,
    rules: Rules,
    by: str,
) -> str:
    """Return the rule by which the chosen node ranks before this node, which fits as well."""
    if _concerns(rules.avoid, name, wish) and not _concerns(rules.avoid, chosen, wish):
        return "placement.avoid names it"
    if _concerns(rules.prefer, chosen, wish) and not _concerns(rules.prefer, name, wish):
        return f"placement.prefer names {chosen}"
    same = load.same.get(name, 0)
    if rules.anti_affinity and same > load.same.get(chosen, 0):
        return f"{same} sandboxes of the same {rules.anti_affinity} are on it (placement.anti_affinity)"
    amount, other = free[name], free[chosen]
    if by == "memory" and amount is not None and other is not None and amount != other:
        return f"{show_memory(amount)} of its memory are free, and {show_memory(other)} on {chosen}"
    if counts[name] != counts[chosen]:
        return f"it has {counts[name]} sandboxes, and {chosen} has {counts[chosen]}"
    return f"it suits as well as {chosen}, which comes first by its name"
