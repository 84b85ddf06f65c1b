# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is known of the nodes and of the VMs on them, and the operator's rules for choosing one: data, no decisions.

Apart from placement.py, which decides, because every module ships this and only a creation needs that.
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
    """A storage as one node sees it. Sizes in bytes; None where Proxmox VE does not say."""

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
    # Whether the template can be cloned to here; where the clone would lie and how much it takes at once, in bytes,
    # where that differs from the wish (a linked clone lies with its template).
    template: bool = True
    storage: str | None = None
    disk: int | None = None
    # Words of REASONS with a sentence, for what was found out elsewhere (workspace, snippets, a creation that failed).
    refused: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM as listed: the memory that it uses on its node and that it is configured with, in bytes, and seconds up."""

    node: str
    used: int = 0
    memory: int | None = None
    uptime: int = 0
