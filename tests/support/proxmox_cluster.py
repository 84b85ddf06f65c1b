# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cluster and the nodes of the Proxmox double: lists, quorum, high availability, figures, certificates, clocks.

How a test switches each of them on (``pve`` is the double):

- **Quorum**: ``pve.lose_quorum()`` and ``pve.regain_quorum()`` are the truth. ``pve.cached_quorate = 0`` (or 1) is
  what GET /cluster/status says whatever the truth is; the row `quorum` of GET /cluster/ha/status/current tells the
  truth. ``pve.stale_quorum = True``: both go on saying quorate, as for seven seconds of a cut.
- **Lists that lag**: ``pve.status_lag = 10.0``: status, name and template flag in /cluster/resources are as they were
  up to that many real seconds ago, as the real broadcast every ten seconds. Tags, lock and node are told at once.
  ``pve.listing_lag`` concerns new VMs alone.
- **Nodes**: ``pve.node_figures["pve1"] = {"maxcpu": 2, "mem": ..., "maxmem": ...}``; a VM with more vcpus than
  `maxcpu` does not start (`MAX 2 vcpus allowed per VM on this node`). ``pve.maintenance.add("pve2")`` is HA
  maintenance. Who lacks Sys.Audit on /nodes/NAME gets no figures.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any

from aiohttp import web
from fakepve import FakePve
from fakepve.server import USER


class ClusterRules(FakePve):
    """What the double tells of cluster and nodes. The module's docstring says how tests use it."""

    def _reset_cluster(self) -> None:
        """Set everything that tests switch in this part."""
        self.ca_fingerprint = _make_fingerprint()
        # Answered as one node that was never part of a cluster: /cluster/status has no entry for a cluster.
        self.standalone = False
        self.cached_quorate: int | None = None
        self.stale_quorum = False
        self.status_lag = 0.0
        self._broadcast: tuple[float, dict[int, dict[str, Any]]] = (0.0, {})
        # Real seconds for which a new VM is listed as `unknown` and without a name.
        self.listing_lag = 0.0
        self._born: dict[int, float] = {}
        self.node_figures: dict[str, dict[str, Any]] = {}
        self.maintenance: set[str] = set()
        # Node -> its bridges and vnets; vmbr0 and vmbr1 where nothing is said.
        self.bridges: dict[str, list[str]] = {}
        # (node, storage) -> maxdisk and disk as the list of resources tells them.
        self.storage_figures: dict[tuple[str, str], dict[str, int]] = {}
        # Seconds by which the nodes' clocks are ahead of this host's.
        self.clock_offset = 0.0

    # ------------------------------------------------------------------ lists

    async def _resources(self, request: web.Request) -> web.Response:
        """Return the list of all VMs, nodes and storages as the caller may see them."""
        response = await super()._resources(request)
        data = json.loads(response.text)["data"]
        now = time.time()
        data = [
            item for item in data if item["type"] != "storage" or self._sees_storage(request[USER], item["storage"])
        ]
        for item in data:
            if item["type"] == "storage":
                item.update(self.storage_figures.get((item["node"], item["storage"]), {}))
            if item["type"] == "node":
                row = self._node_row(item, request[USER])
                item.clear()
                item.update(row, hastate="maintenance" if row["node"] in self.maintenance else "online")
                item["cgroup-mode"] = 2
            if item["type"] != "qemu":
                continue
            self._set_back_to_broadcast(item)
            if now - self._born.get(item["vmid"], 0) < self.listing_lag:
                item["status"] = "unknown"
                item.pop("template", None)
            if item["status"] == "unknown":
                item.pop("name", None)
        return web.json_response({"data": data})

    def _sees_storage(self, user: str, sid: str) -> bool:
        return any(
            self.allowed(user, f"/storage/{sid}", priv) for priv in ("Datastore.Audit", "Datastore.AllocateSpace")
        )

    async def _cluster_status(self, request: web.Request) -> web.Response:
        """Return the cluster's status, whose quorum may be older than the truth."""
        if self.acl is not None:
            self.require(request[USER], "/", "Sys.Audit")
        response = await super()._cluster_status(request)
        data = json.loads(response.text)["data"]
        if self.standalone:
            data = [item for item in data if item["type"] != "cluster"]
        for item in data:
            if item["type"] == "cluster":
                item.pop("online", None)
                live = int(self.quorate or self.stale_quorum)
                item["quorate"] = live if self.cached_quorate is None else self.cached_quorate
        return web.json_response({"data": data})

    async def _nodes(self, request: web.Request) -> web.Response:
        """Return the list of nodes, with figures where the caller may see them."""
        response = await super()._nodes(request)  # type: ignore[misc]
        return web.json_response(
            {"data": [self._node_row(row, request[USER]) for row in json.loads(response.text)["data"]]}
        )

    def _node_row(self, row: dict[str, Any], user: str) -> dict[str, Any]:
        """Return a node as a list tells it: without figures where the user has no Sys.Audit or the node is offline."""
        figures = super()._node_stats(True)  # type: ignore[misc]
        bare = {key: value for key, value in row.items() if key not in figures}
        if row["status"] != "online" or not self.allowed(user, "/nodes/" + row["node"], "Sys.Audit"):
            return bare
        return {**bare, **self._read_figures(row["node"])}

    def _renew_broadcast(self) -> None:
        """Renew what lists tell of every VM, unless the last broadcast is younger than status_lag."""
        now = time.monotonic()
        if self.status_lag and now - self._broadcast[0] >= self.status_lag:
            self._broadcast = (
                now,
                {vm.vmid: {"status": vm.status, "name": vm.name, "template": int(vm.template)} for vm in self.vms},
            )

    def _set_back_to_broadcast(self, item: dict[str, Any]) -> None:
        """Set back a row of /cluster/resources to the last broadcast."""
        if not self.status_lag:
            return
        told = self._broadcast[1].get(item["vmid"])
        if told is None:
            item["status"] = "unknown"
            item.pop("template", None)
        elif item["status"] != "unknown":
            item.update(told)

    # ------------------------------------------------------------------ high availability

    def _routes_ha(self) -> list[Any]:
        return [("GET", "/cluster/ha/status/current", self._ha_status)]

    async def _ha_status(self, values: dict[str, Any], user: str) -> list[dict[str, Any]]:
        """Return the status of high availability. Its row `quorum` tells the truth unless stale_quorum is set."""
        self.require(user, "/", "Sys.Audit")
        asked = sorted(self.nodes)[0]
        quorate = int(self.quorate or self.stale_quorum)
        now = int(time.time())
        rows: list[dict[str, Any]] = [
            {
                "id": "quorum",
                "type": "quorum",
                "node": asked,
                "quorate": quorate,
                "status": "OK" if quorate else f"No quorum on node '{asked}'!",
            }
        ]
        if not self.standalone:
            rows += [
                {"id": "master", "type": "master", "node": asked, "timestamp": now, "status": f"{asked} (idle)"},
                {
                    "id": "fencing",
                    "type": "fencing",
                    "node": asked,
                    "armed-state": "standby",
                    "status": "standby (CRM watchdog standby)",
                },
            ]
        for node in sorted(self.nodes):
            state = "maintenance mode" if node in self.maintenance else "idle"
            rows.append(
                {
                    "id": f"lrm:{node}",
                    "type": "lrm",
                    "node": node,
                    "timestamp": now,
                    "status": f"{node} ({state}, watchdog standby)",
                }
            )
        rows += [
            {
                "id": f"service:vm:{vm.vmid}",
                "sid": f"vm:{vm.vmid}",
                "type": "service",
                "node": vm.node,
                "state": vm.ha_state,
                "request_state": vm.ha_state,
                "crm_state": vm.ha_state,
                "status": f"vm:{vm.vmid} ({vm.node}, {vm.ha_state})",
            }
            for vm in self.vms
            if vm.ha_managed
        ]
        return rows

    def _read_figures(self, node: str) -> dict[str, Any]:
        """Return what a node has and uses."""
        # Room for as many sandboxes as a test likes; whoever tests a full node sets node_figures.
        stats = {**super()._node_stats(True), "maxmem": 512 * 1024**3}  # type: ignore[misc]
        return {**stats, **self.node_figures.get(node, {})}

    # ------------------------------------------------------------------ one node

    def _routes_nodes(self) -> list[tuple[str, str, Any]]:
        return [
            ("GET", "/nodes/{node}/certificates/info", self._certificates),
            ("GET", "/nodes/{node}/network", self._network),
            ("GET", "/nodes/{node}/time", self._node_time),
        ]

    async def _network(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        return [
            {"iface": name, "type": "bridge", "active": 1, "method": "manual", "priority": number}
            for number, name in enumerate(self.bridges.get(v["node"], ["vmbr0", "vmbr1"]), 3)
        ]

    async def _node_time(self, v: dict[str, Any], user: str) -> dict[str, Any]:
        now = int(time.time() + self.clock_offset)
        return {"time": now, "localtime": now, "timezone": "UTC"}

    async def _certificates(self, v: dict[str, Any], user: str) -> list[dict[str, Any]]:
        def entry(name: str, fingerprint: str, subject: str) -> dict[str, Any]:
            return {
                "filename": name,
                "fingerprint": fingerprint,
                "subject": subject,
                "issuer": "/CN=Proxmox Virtual Environment",
                "san": [],
                "notbefore": 1700000000,
                "notafter": 2015360000,
                "public-key-type": "rsaEncryption",
                "public-key-bits": 4096,
                "pem": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
            }

        # The node's own certificate differs from node to node, the root's does not.
        node = ":".join(f"{b:02X}" for b in uuid.uuid5(uuid.NAMESPACE_DNS, self.ca_fingerprint + v["node"]).bytes * 2)
        return [
            entry("pve-root-ca.pem", self.ca_fingerprint, "/CN=Proxmox Virtual Environment"),
            entry("pve-ssl.pem", node, f"/CN={v['node']}.example.org"),
        ]


def _make_fingerprint() -> str:
    return ":".join(f"{b:02X}" for b in os.urandom(32))
