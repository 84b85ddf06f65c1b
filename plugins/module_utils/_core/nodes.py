# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Data for the placement: nodes, VMs on them, and the operator's rules.

placement.py decides. It is a file of its own, because every module ships this file and only a creation needs that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AUTO = "auto"
STRATEGIES = ("spread", "pack")
AFFINITIES = ("profile", "tag")


@dataclass(frozen=True, slots=True)
class Preference:
    """Nodes for sandboxes with a tag, or of a profile: ``kind`` is one of AFFINITIES."""

    kind: str
    value: str
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rules:
    """The keys of ``placement`` in the configuration. ``settle`` in seconds, ``reserve`` in percent of a storage."""

    strategy: str = "spread"
    nodes: frozenset[str] | None = None
    prefer: tuple[Preference, ...] = ()
    avoid: tuple[Preference, ...] = ()
    anti_affinity: str | None = None
    max_per_node: int | None = None
    settle: int = 600
    reserve: int = 5


@dataclass(frozen=True, slots=True)
class Room:
    """A storage on one node. Sizes are in bytes; None if Proxmox VE does not tell them."""

    active: bool = True
    total: int | None = None
    free: int | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node as read. Memory in bytes; None means that these credentials get no figures, which is not zero."""

    name: str
    online: bool = True
    maintenance: bool = False
    memory: int | None = None
    used: int | None = None
    cpus: int | None = None
    # By name; None where these credentials see no storage at all.
    storages: Mapping[str, Room] | None = None
    # Bridges and vnets; None: not read, or hidden.
    bridges: frozenset[str] | None = None
    # ``template``: whether the template can be cloned to this node. ``storage`` and ``disk``: the storage of the clone
    # and its first size in bytes, if they differ from the wish (a linked clone lies on its template's storage).
    template: bool = True
    storage: str | None = None
    disk: int | None = None
    # A word of REASONS with a sentence, if the caller refuses the node (workspace, snippets, a failed creation).
    refused: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM in the list: its used and its configured memory in bytes, and its uptime in seconds."""

    node: str
    used: int = 0
    memory: int | None = None
    uptime: int = 0
