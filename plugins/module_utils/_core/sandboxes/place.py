# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Choose the node of a new sandbox within the transaction that writes the record.

This file reads the facts; placement.decide makes the decision. Some facts cost a request for each node (the template's
configuration, the bridges). They are read only for the node that would be chosen; if they change the decision, the next
node is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from .. import placement
from ..context import Context
from ..errors import CreationFailed, InvalidInput
from ..guest import cloud_init
from ..model import Sandbox
from ..nodes import AUTO, Node
from ..placement import Decision, Load, Reservation, Wish
from ..proxmox import capacity
from ..store import placements
from ..store.workspaces import Workspace
from ..workspaces import workspace_disk
from . import template as templates
from . import vm_config
from .spec import Spec

# The option to name in the error when every node is refused for the same reason.
_OPTION_OF = {
    "storage": "storage",
    "bridge": "bridge",
    "cpus": "cores",
    "template": "template",
    "workspace": "workspace",
    "snippets": "cloud_init_user_data",
}
_KIB = 1024


class _NotLookedAt(Exception):
    """The chosen node has not been read yet. The transaction is rolled back and repeated afterwards."""

    def __init__(self, node: str) -> None:
        super().__init__(f"node {node} is to be looked at first")
        self.node = node


def is_open(ctx: Context, spec: Spec, workspace: Workspace | None, nodes: Mapping[str, Any]) -> bool:
    """Return whether we choose the node: ``node`` is auto, or nothing names a node and the cluster has several."""
    if spec.node is not None:
        return spec.node == AUTO
    if workspace is not None and workspace.node is not None:
        return False
    return ctx.config.node == AUTO or (ctx.config.node is None and len(nodes) > 1)


class NodeChoice:
    """The choice of a node for one sandbox: ``decision`` is the latest, ``template`` belongs to the chosen node."""

    def __init__(
        self,
        ctx: Context,
        spec: Spec,
        workspace: Workspace | None = None,
        failed: Mapping[str, str] | None = None,
    ) -> None:
        self._ctx = ctx
        self._spec = spec
        self._workspace = workspace
        self._rules = ctx.config.placement
        self.decision: Decision | None = None
        self.template: templates.Template | None = None
        read = ctx.cluster.read_capacity()
        self._sources = self._find_sources(read)
        self._nodes = {name: self._prepare_node(node, read, failed or {}) for name, node in read.nodes.items()}
        self._looked_at: dict[str, templates.Template] = {}
        self._wish = self._make_wish(read)
        young = {vmid: vm for vmid, vm in read.running.items() if vm.uptime < self._rules.settle}
        ours = placements.find_own_vmids(ctx.records, young)
        self._young = {vmid: vm for vmid, vm in young.items() if vmid in ours}

    # ---- facts about each node that need no request of their own ----

    def _find_sources(self, read: capacity.Capacity) -> dict[str, tuple[int, str]]:
        """Return the template to clone for each node, as (VMID, node that holds the template)."""
        ctx, template = self._ctx, self._spec.template or self._ctx.config.template
        named = templates.find_by_name(ctx, template) if template else {}
        if len(named) <= 1 or len(set(named.values())) < len(named):
            first = templates.find(ctx, template)
            own = {}
        else:
            own = {node: (vmid, node) for vmid, node in named.items()}
            online = ctx.cluster.list_nodes()
            if all(node in own for node, up in online.items() if up):
                return own
            vmid, node = next(((vmid, node) for vmid, node in sorted(named.items()) if online.get(node)), (0, ""))
            if not vmid:
                return own
            first = templates.read(ctx, vmid, node)
        sources = {first.node: (first.vmid, first.node)}
        # Proxmox VE clones to another node only from shared storage.
        if first.config is not None and first.storages and first.storages <= read.shared:
            sources = dict.fromkeys(read.nodes, (first.vmid, first.node))
        return {**sources, **own}

    def _prepare_node(self, node: Node, read: capacity.Capacity, failed: Mapping[str, str]) -> Node:
        """Return the node with the reason, if there is one, why it cannot take the sandbox."""
        ctx, spec, workspace = self._ctx, self._spec, self._workspace
        online = ctx.cluster.list_nodes()
        refused = None
        if node.name in failed:
            refused = "failed", failed[node.name]
        elif workspace is not None and workspace.node is not None and workspace.node != node.name:
            refused = "workspace", f"{workspace.title} lies on local storage of node {workspace.node}"
        elif workspace is not None and node.storages is not None and workspace.storage not in node.storages:
            refused = "workspace", f"it has no storage {workspace.storage}, where {workspace.title} lies"
        elif spec.cloud_init_user_data is not None:
            hidden = cloud_init.explain_hidden(ctx, node.name, online, ctx.config.snippets_storage in read.shared)
            refused = ("snippets", hidden) if hidden else None
        source = self._sources.get(node.name)
        return dataclasses.replace(
            node,
            online=node.online and online.get(node.name, False),
            template=source is not None and online.get(source[1], False),
            refused=refused,
        )

    def _make_wish(self, read: capacity.Capacity) -> Wish:
        """Return the resources that the sandbox needs, from the spec, else from the templates in the VM list."""
        spec = self._spec
        figures = [read.templates.get(vmid, (0, 0, 0)) for vmid, _node in set(self._sources.values())]
        memory = spec.memory * placement.MIB if spec.memory is not None else max((row[0] for row in figures), default=0)
        # The number of sockets stands in the template's configuration, which read_node reads later.
        cpus = spec.cores if spec.cores is not None else max((row[1] for row in figures), default=0)
        return Wish(
            memory=memory,
            cpus=cpus,
            storage=spec.storage,
            disk=_compute_disk_bytes(spec, max((row[2] for row in figures), default=0)),
            template=spec.template or self._ctx.config.template or "",
            profile=spec.profile,
            tags=frozenset(spec.tags),
        )

    # ---- facts about the node that would be chosen ----

    def read_node(self, name: str) -> None:
        """Read the template's configuration and the node's bridges.

        Raises InvalidInput for an option that cannot work.
        """
        ctx, spec = self._ctx, self._spec
        vmid, owner = self._sources[name]
        template = templates.read(ctx, vmid, owner)
        templates.check(ctx, spec, template, name, placed=True)
        node = self._nodes[name]
        config = template.config
        if config is not None:
            self._refine_wish(config)
            full, storage = templates.choose_clone_mode(ctx, spec, template)
            disk = vm_config.find_boot_disk(config)
            own = str(config[disk]).partition(":")[0] if disk else None
            node = dataclasses.replace(node, storage=storage or own, disk=self._wish.disk if full or storage else 0)
        bridges = _list_bridges(spec, config or {})
        if bridges and (spec.bridge or spec.second_bridge or name != owner):
            node_bridges = ctx.read_once(("bridges", name), lambda: capacity.read_bridges(ctx.client, name))
            if node_bridges is not None and not bridges <= node_bridges:
                missing = ", ".join(sorted(bridges - node_bridges))
                node = dataclasses.replace(node, refused=("bridge", f"it has no bridge or vnet {missing}"))
        if spec.cloud_init_user_data is not None:
            try:
                cloud_init.check_place(ctx, name)
            except InvalidInput as error:
                if error.detail.get("option") == "snippets_dir":
                    raise
                node = dataclasses.replace(node, refused=("snippets", error.message))
        if self._workspace is not None:
            workspace_disk.check_usable(ctx, self._workspace, name)
        self._nodes[name] = node
        self._looked_at[name] = template

    def _refine_wish(self, config: Mapping[str, Any]) -> None:
        """Complete the wish from the template's configuration.

        The VM list lags behind changes, and never contains the number of sockets.
        """
        memory = self._wish.memory or _read_memory_bytes(config)
        sockets = re.fullmatch(r"\d{1,3}", str(config.get("sockets") or "1"))
        cpus = self._spec.cores * int(sockets[0]) if self._spec.cores is not None and sockets else 0
        self._wish = dataclasses.replace(self._wish, memory=memory, cpus=max(self._wish.cpus, cpus))

    # ---- the decision ----

    def _decide(self, load: Load) -> Decision:
        self.decision = placement.decide(self._nodes.values(), self._young, load, self._wish, self._rules)
        return self.decision

    def preview_decision(self) -> Decision:
        """Return the decision by the current records, after reading the node that it chooses. Reserves nothing."""
        load = placements.read_load(
            self._ctx.records, self._rules.settle, self._rules.anti_affinity, self._spec.profile, self._spec.tags
        )
        while True:
            decision = self._decide(load)
            if decision.node is None or decision.node in self._looked_at:
                return decision
            self.read_node(decision.node)

    def reserve_node(
        self, sandbox: Sandbox, write: Callable[[Callable[..., Any]], Any], chosen: Callable[[], None]
    ) -> Any:
        """Reserve a node: call ``write`` with the ``place`` argument for Records.reserve, and return its result.

        Repeats until the chosen node has been read. Sets the sandbox's node, then calls ``chosen`` within the
        transaction. Raises CreationFailed when no node fits.
        """
        if self.preview_decision().node is None:
            raise self.make_no_node_error()

        def decide(load: Load) -> Reservation:
            name = self._decide(load).node
            if name is None:
                raise self.make_no_node_error()
            if name not in self._looked_at:
                raise _NotLookedAt(name)
            node = self._nodes[name]
            sandbox.node = name
            self.template = self._looked_at[name]
            chosen()
            disk = self._wish.disk if node.disk is None else node.disk
            return Reservation(0, name, self._wish.memory, node.storage or self._wish.storage, disk)

        place = placements.prepare_reservation(
            self._ctx.records,
            self._rules.settle,
            self._rules.anti_affinity,
            self._spec.profile,
            self._spec.tags,
            decide,
        )
        while True:
            try:
                return write(place)
            except _NotLookedAt as error:
                # Another run has meanwhile taken the room on the node that preview_decision() chose.
                self.read_node(error.node)

    def make_no_node_error(self) -> CreationFailed:
        """Return the error that says for each node why it cannot take the sandbox."""
        verdicts = self.decision.verdicts if self.decision else ()
        listed = {verdict.node for verdict in verdicts}
        allowed = self._ctx.config.placement.nodes
        if allowed and listed and listed.isdisjoint(allowed):
            return CreationFailed(
                f"placement.nodes: {', '.join(sorted(allowed))}: no node of this cluster has such a name. Nodes: "
                f"{', '.join(sorted(listed))}. Correct placement.nodes in the configuration",
                option="placement.nodes",
                placement=self.decision.public() if self.decision else None,
            )
        reasons = {verdict.reason for verdict in verdicts}
        option = _OPTION_OF.get(next(iter(reasons)), "node") if len(reasons) == 1 else "node"
        why = self.decision.explain_none() if self.decision else "no node is listed"
        return CreationFailed(
            f"{option}: no node can take the sandbox, and nothing is left behind. {why}. Free room there, ask for "
            "less, or see agentlab_doctor",
            option=option,
            placement=self.decision.public() if self.decision else None,
        )


def show_load(ctx: Context) -> list[dict[str, Any]]:
    """Return for each node its load, and whether (and why) a sandbox of the configured template would go there."""
    decision = NodeChoice(ctx, Spec(template=ctx.config.template)).preview_decision()
    rows: list[dict[str, Any]] = decision.public()["nodes"]
    return sorted(rows, key=lambda row: str(row["node"]))


def make_fixed_place(
    ctx: Context, spec: Spec, template: templates.Template, node: str
) -> Callable[[Any], Callable[[Any, str], None]]:
    """Return the ``place`` argument of Records.reserve for a given node, so that other runs count this sandbox too."""
    config = template.config or {}
    memory = spec.memory * placement.MIB if spec.memory is not None else _read_memory_bytes(config)
    full, storage = templates.choose_clone_mode(ctx, spec, template)
    disk = vm_config.find_boot_disk(config)
    size = vm_config.read_size(str(config[disk])) if disk else None
    own = str(config[disk]).partition(":")[0] if disk else None
    needed = (
        _compute_disk_bytes(spec, int(vm_config.convert_to_kib(size) * _KIB) if size else 0) if full or storage else 0
    )
    reservation = Reservation(0, node, memory, storage or own, needed)
    return placements.prepare_reservation(
        ctx.records, ctx.config.placement.settle, None, None, (), lambda _load: reservation
    )


def _list_bridges(spec: Spec, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the bridges of the VM's two interfaces: the requested bridges, else the template's."""
    names = set()
    for bridge, key in ((spec.bridge, "net0"), (spec.second_bridge, "net1")):
        match = re.search(r"(?:^|,)bridge=([^,]+)", str(config.get(key) or ""))
        name = bridge or (match[1] if match else None)
        if name:
            names.add(name)
    return frozenset(names)


def _read_memory_bytes(config: Mapping[str, Any]) -> int:
    match = re.search(r"(?:^|current=)(\d+)", str(config.get("memory") or "512"))
    return int(match[1]) * placement.MIB if match else 0


def _compute_disk_bytes(spec: Spec, template: int) -> int:
    """Return the size of the boot disk in bytes; ``template`` is the size of the template's disk in bytes."""
    if spec.disk_size is None:
        return template
    size = int(vm_config.convert_to_kib(spec.disk_size.removeprefix("+")) * _KIB)
    return template + size if spec.disk_size.startswith("+") else size
