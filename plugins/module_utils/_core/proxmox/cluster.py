# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cluster as a whole: its quorum, its nodes, the list of its VMs, and the proof that a VM is not there.

Absence is proven, never inferred (semantics 5): the right cluster, with quorum, and either a list that shows every VM, or nextid.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import parallel
from ..clock import Clock
from ..errors import ApiError, Kept, OutcomeUnknown, ProxmoxError
from ..store.records import Records
from .client import ProxmoxClient

# Quorum changes rarely and is asked before every delete of a bulk run: an answer is good for this long. The config write directly
# before the delete is what really tells whether the cluster takes writes.
_STATUS_SECONDS = 5.0
# So few are asked for one by one; more are looked up in the list.
_FEW = 2


@dataclass(slots=True)
class Presence:
    """Whether a VMID is in use: ``absent`` is True (proven), False (something is there) or None (not known, ``why`` says it)."""

    absent: bool | None
    why: str
    evidence: dict[str, Any]


class Cluster:
    """Reads of the cluster, each made once and shared by all items of a run."""

    def __init__(self, client: ProxmoxClient, clock: Clock, records: Records) -> None:
        self._client = client
        self._clock = clock
        self._records = records
        self._lock = threading.RLock()
        self._status: tuple[float, list[dict[str, Any]]] | None = None
        self._vms: dict[int, dict[str, Any]] | None = None
        self._confirmed = False

    # ---- nodes and quorum ----

    def _status_rows(self) -> list[dict[str, Any]]:
        with self._lock:
            if self._status is None or self._clock.monotonic() - self._status[0] > _STATUS_SECONDS:
                rows = self._client.get_list("cluster/status")
                self._status = (self._clock.monotonic(), rows)
            return self._status[1]

    def require_quorum(self) -> dict[str, Any]:
        """Evidence of quorum (or of a single node); Kept(unknown) without it: Proxmox would delete the disks and then fail."""
        rows = self._status_rows()
        cluster = next((row for row in rows if row.get("type") == "cluster"), None)
        nodes = [str(row.get("name")) for row in rows if row.get("type") == "node"]
        if not nodes:
            raise OutcomeUnknown("GET /cluster/status names no node, so nothing is known; is api_host a Proxmox node?")
        if cluster is None and len(nodes) == 1:
            return {"quorum": "single node", "nodes": nodes}
        if cluster is None or str(cluster.get("quorate")) not in ("1", "True", "true"):
            raise Kept("unknown", "the cluster has no quorum; nothing is deleted and nothing is known to be gone until it has (pvecm status)")
        return {"quorum": "quorate", "cluster": cluster.get("name"), "nodes": nodes}

    def node_online(self, node: str) -> bool:
        """False only when the cluster says so."""
        row = next((row for row in self._status_rows() if row.get("type") == "node" and row.get("name") == node), None)
        return row is None or str(row.get("online", 1)) in ("1", "True", "true")

    def nodes(self) -> dict[str, bool]:
        """Node names with whether each is online."""
        return {str(row.get("name")): str(row.get("online", 1)) in ("1", "True", "true") for row in self._status_rows() if row.get("type") == "node"}

    # ---- which cluster ----

    def _identity(self) -> dict[str, Any]:
        rows = self._status_rows()
        cluster = next((row.get("name") for row in rows if row.get("type") == "cluster"), None)
        nodes = sorted(str(row.get("name")) for row in rows if row.get("type") == "node")
        local = next((str(row.get("name")) for row in rows if row.get("type") == "node" and str(row.get("local")) in ("1", "True", "true")), None)
        authority = None
        if local:
            try:
                # Every cluster has a certificate authority of its own: two single nodes named "pve" differ in it.
                for row in self._client.get_list(f"nodes/{local}/certificates/info"):
                    if row.get("filename") == "pve-root-ca.pem":
                        authority = row.get("fingerprint")
            except ApiError:
                authority = None
        return {"name": cluster, "nodes": nodes, "authority": authority}

    def confirm(self, *, creating: bool = False) -> None:
        """Refuse to draw conclusions from a cluster other than the one the records belong to; the first creation decides which that is."""
        with self._lock:
            if self._confirmed:
                return
            found = self._identity()
            text = self._records.meta("cluster")
            if text is None:
                if not creating:
                    raise Kept("unknown", "these records do not know yet which cluster they belong to (the first creation notes it), so nothing is "
                               "concluded from this one")
                self._records.set_meta("cluster", json.dumps(found))
            else:
                known = json.loads(text)
                if known["authority"] and found["authority"]:
                    same = known["authority"] == found["authority"]
                elif known["authority"]:
                    raise Kept("unknown", "the cluster's certificate authority cannot be read, so it is not certain that these records belong to it")
                else:
                    # A single node that has become a cluster keeps its name among the nodes.
                    same = (known["name"] == found["name"] or known["name"] is None) and bool(set(known["nodes"]) & set(found["nodes"]))
                if not same:
                    raise Kept("unknown", f"this is not the cluster these records belong to (they know {_title(known)}, api_host leads to {_title(found)}); "
                               "correct api_host or database; if it is the same cluster with a new certificate authority, or a node that joined one, "
                               "run agentlab_reconcile with adopt_cluster=true once")
                if known != found and found["authority"]:
                    self._records.set_meta("cluster", json.dumps(found))
            self._confirmed = True

    def adopt(self) -> None:
        """Note this cluster as the one the records belong to, because the operator says so."""
        self._records.set_meta("cluster", json.dumps(self._identity()))
        self._confirmed = True

    def seen_ours(self) -> None:
        """A VM proven to be ours was found here: whatever its name, this is the right cluster."""
        self._confirmed = True

    # ---- the list ----

    def vms(self, *, fresh: bool = False) -> dict[int, dict[str, Any]]:
        """All VMs and containers the credentials may see, by VMID. A hint only: where to look, never whether to act."""
        with self._lock:
            if self._vms is None or fresh:
                rows = self._client.get_list("cluster/resources", type="vm")
                try:
                    self._vms = {int(row["vmid"]): row for row in rows}
                except (KeyError, TypeError, ValueError):
                    raise OutcomeUnknown("GET /cluster/resources: entries without a vmid; is api_host a Proxmox node?") from None
            return self._vms

    def find(self, vmid: int, *, fresh: bool = False) -> dict[str, Any] | None:
        return self.vms(fresh=fresh).get(vmid)

    def known(self) -> tuple[list[str], dict[int, str]]:
        """Names of the nodes, and of the VMs by VMID, as far as this run has read them: asks nothing."""
        nodes = [str(row.get("name")) for row in (self._status[1] if self._status else []) if row.get("type") == "node"]
        return nodes, {vmid: str(row["name"]) for vmid, row in (self._vms or {}).items() if row.get("name")}

    def sees_everything(self) -> bool:
        """True when nothing can be hidden from these credentials.

        Only root@pam itself has no ACL. For anybody else GET /access/permissions leaves out the paths on which there is no right at all, so it
        cannot show that nothing is hidden.
        """
        return self._client.settings.login == "root@pam"

    # ---- absence ----

    def prove_absent(self, vmids: Iterable[int]) -> dict[int, Presence]:
        """For each VMID whether it is proven free. Never raises for Proxmox's errors: those are ``absent=None``."""
        wanted = sorted(set(vmids))
        try:
            quorum = self.require_quorum()
            self.confirm()
        except (ProxmoxError, Kept) as error:
            return {vmid: Presence(None, error.message, {}) for vmid in wanted}
        if len(wanted) <= _FEW or not self.sees_everything():
            return self._ask_for_each(wanted, quorum)
        try:
            listed = self.vms(fresh=True)
            trusted = bool(listed)
        except ProxmoxError as error:
            return {vmid: Presence(None, error.message, {}) for vmid in wanted}
        free = [vmid for vmid in wanted if vmid not in listed]
        if trusted and free:
            # A list that was cut short by something in between would make VMs vanish: one of them is asked for in another way.
            trusted = self._nextid(free[0], quorum).absent is True
        if not trusted:
            return self._ask_for_each(wanted, quorum)
        proof = {**quorum, "proof": "not in the list of all VMs", "listed": len(listed)}
        return {vmid: Presence(True, "not in the cluster's list of all VMs", proof) if vmid not in listed
                else Presence(False, "a VM with that VMID is in the cluster's list", {"node": listed[vmid].get("node")}) for vmid in wanted}

    def _ask_for_each(self, vmids: list[int], quorum: dict[str, Any]) -> dict[int, Presence]:
        found = parallel.each(lambda vmid: self._nextid(vmid, quorum), vmids, self._client.settings.connections)
        return dict(zip(vmids, found, strict=True))

    def _nextid(self, vmid: int, quorum: dict[str, Any]) -> Presence:
        try:
            found = self._client.get("cluster/nextid", vmid=vmid)
        except ApiError as error:
            if error.status in (400, 500) and "already exists" in error.text:
                return Presence(False, f"VMID {vmid} is in use", {"nextid": error.text})
            return Presence(None, error.message, {})
        except ProxmoxError as error:
            return Presence(None, error.message, {})
        if str(found) != str(vmid):
            return Presence(None, f"GET /cluster/nextid answered {str(found)[:40]!r} for {vmid}, so nothing is known", {})
        return Presence(True, f"Proxmox says that VMID {vmid} is free", {**quorum, "proof": "nextid"})


def _title(identity: dict[str, Any]) -> str:
    kind = f"cluster {identity['name']!r}" if identity["name"] else "a single node"
    return f"{kind} with {', '.join(identity['nodes'])}"
