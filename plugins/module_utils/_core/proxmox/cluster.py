# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the state of the whole cluster (quorum, nodes, VM list), and prove that a VM is absent.

The proof has three parts: the right cluster answers, the cluster has quorum, and either the list shows every VM or
``nextid`` offers the VMID. docs/safety.md, "When a list proves an absence", says when the list is enough.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import parallel
from ..clock import Clock
from ..errors import ApiError, Kept, OutcomeUnknown, ProxmoxError
from ..store.records import Records
from .client import ProxmoxClient

if TYPE_CHECKING:
    from ..nodes import Node
    from .capacity import Capacity

# Seconds for which a reading of quorum is cached. Each delete of a bulk run needs a reading, and quorum changes rarely.
# The final proof is the config write directly before the delete: without quorum the write fails.
_STATUS_SECONDS = 5.0
# Seconds for which the list from the beginning of a run can prove an absence.
_LIST_SECONDS = 30.0
# Up to this number, nextid is asked for each VMID. For more VMIDs, one list of all VMs is cheaper.
_FEW = 4
# The columns of the VM list to keep. Proxmox sends over twenty columns, about a kilobyte for each VM.
_LOOKED_AT = ("vmid", "type", "node", "status", "name", "template", "tags", "hastate", "lock", "uptime")


@dataclass(slots=True)
class Presence:
    """Whether a VMID is in use: ``absent`` is True (proven free), False (in use) or None (unknown; see ``why``)."""

    absent: bool | None
    why: str
    evidence: dict[str, Any]


class Cluster:
    """The state of the cluster. Each part is read once, and cached for all items of a run."""

    def __init__(self, client: ProxmoxClient, clock: Clock, records: Records) -> None:
        self._client = client
        self._clock = clock
        self._records = records
        self._lock = threading.RLock()
        self._status: tuple[float, list[dict[str, Any]]] | None = None
        self._quorum: tuple[float, dict[str, Any]] | None = None
        self._vms: dict[int, dict[str, Any]] | None = None
        self._capacity: Capacity | None = None
        self._nodes: dict[str, Node] | None = None
        # Rows from expect_stopped(), by VMID.
        self._expected: dict[int, dict[str, Any]] = {}
        # VMID -> (monotonic time, evidence) from note_deleted().
        self._deleted: dict[int, tuple[float, dict[str, Any]]] = {}
        self._confirmed = False
        # From survey(): a list that shows every VM, the quorum evidence of that moment, and its monotonic time.
        self._whole: tuple[dict[int, dict[str, Any]], dict[str, Any], float] | None = None
        # True once some VMs may be hidden from the credentials. Then nextid is asked for each VMID.
        self._partial = False
        self._ours: set[int] = set()

    # ---- nodes and quorum ----

    def _read_status_rows(self) -> list[dict[str, Any]]:
        """Return the rows of GET /cluster/status, cached for _STATUS_SECONDS."""
        with self._lock:
            if self._status is None or self._clock.monotonic() - self._status[0] > _STATUS_SECONDS:
                rows = self._client.get_list("cluster/status")
                self._status = (self._clock.monotonic(), rows)
            return self._status[1]

    def _read_quorum_row(self) -> dict[str, Any]:
        """Return the row ``quorum`` of the HA manager's status, cached for _STATUS_SECONDS.

        The node that answers reads its present quorum for this row. Raises OutcomeUnknown without the row.
        """
        with self._lock:
            if self._quorum is None or self._clock.monotonic() - self._quorum[0] > _STATUS_SECONDS:
                rows = self._client.get_list("cluster/ha/status/current")
                row = next((row for row in rows if row.get("type") == "quorum"), None)
                if row is None or "quorate" not in row:
                    raise OutcomeUnknown(
                        "GET /cluster/ha/status/current: the answer does not name the quorum, so nothing is known; "
                        "check that api_host is a Proxmox node"
                    )
                self._quorum = (self._clock.monotonic(), row)
            return self._quorum[1]

    def require_quorum(self) -> dict[str, Any]:
        """Return the evidence of quorum. Raises Kept without quorum: Proxmox would delete the disks and then fail.

        ``GET /cluster/status`` cannot be used: pvedaemon caches its answer, which may be wrong for minutes. The row of
        the HA manager is right within two seconds, with and without HA resources, also on a node outside any cluster.
        """
        row = self._read_quorum_row()
        if str(row.get("quorate")) not in ("1", "True", "true"):
            raise Kept(
                "unknown",
                "the cluster has no quorum; until it has, nothing is deleted and no VM counts as gone. Look at pvecm "
                "status, then run again",
            )
        return {"quorum": "quorate", "node": row.get("node"), "status": str(row.get("status"))[:200]}

    def is_node_online(self, node: str) -> bool:
        """Return False only when the cluster reports the node as offline."""
        row = next(
            (row for row in self._read_status_rows() if row.get("type") == "node" and row.get("name") == node), None
        )
        return row is None or str(row.get("online", 1)) in ("1", "True", "true")

    def list_nodes(self) -> dict[str, bool]:
        """Return {node name: whether the node is online}."""
        return {
            str(row.get("name")): str(row.get("online", 1)) in ("1", "True", "true")
            for row in self._read_status_rows()
            if row.get("type") == "node"
        }

    # ---- which cluster ----

    def _read_identity(self) -> dict[str, Any]:
        """Return {name, nodes, authority} of the cluster that answers. The authority is None if it cannot be read."""
        rows = self._read_status_rows()
        cluster = next((row.get("name") for row in rows if row.get("type") == "cluster"), None)
        nodes = sorted(str(row.get("name")) for row in rows if row.get("type") == "node")
        local = next(
            (
                str(row.get("name"))
                for row in rows
                if row.get("type") == "node" and str(row.get("local")) in ("1", "True", "true")
            ),
            None,
        )
        authority = None
        if local:
            try:
                # Each cluster has its own certificate authority. Two single nodes may both be named "pve".
                for row in self._client.get_list(f"nodes/{local}/certificates/info"):
                    if row.get("filename") == "pve-root-ca.pem":
                        authority = row.get("fingerprint")
            except ApiError:
                authority = None
        return {"name": cluster, "nodes": nodes, "authority": authority}

    def confirm(self, *, creating: bool = False) -> None:
        """Raise Kept if this cluster is not proven to be the cluster of the records.

        ``creating``: the caller creates a sandbox or a workspace. The first such call stores this cluster in the
        records. Without ``creating``, records that know no cluster yet raise Kept as well.
        """
        with self._lock:
            if self._confirmed:
                return
            text = self._records.read_meta("cluster")
            try:
                known = json.loads(text) if text else None
                sound = known is None or {"authority", "name", "nodes"} <= set(known)
            except (ValueError, TypeError):
                sound = False
            if not sound:
                raise Kept(
                    "unknown",
                    "the records' note of their cluster is damaged (meta.value of key cluster), so no VM counts as "
                    "gone; if api_host leads to the right cluster, run agentlab_reconcile with adopt_cluster=true once",
                )
            if known and known["authority"] and known["authority"] == self._client.read_trusted_authority():
                # The connection itself is the proof: TLS accepts only nodes signed by that cluster's authority.
                self._confirmed = True
                return
            actual = self._read_identity()
            if known is None:
                if not creating:
                    raise Kept(
                        "unknown",
                        "these records do not know yet which cluster they belong to, so no VM counts as gone; the "
                        "first creation of a sandbox or workspace notes the cluster",
                    )
                self._records.set_meta("cluster", json.dumps(actual))
            else:
                if known["authority"] and actual["authority"]:
                    same = known["authority"] == actual["authority"]
                elif known["authority"]:
                    raise Kept(
                        "unknown",
                        "the cluster's certificate authority cannot be read, so it is not certain that these records "
                        "belong to the cluster; set ca_path to the CA certificate of the cluster, or run again",
                    )
                else:
                    # A single node (without a cluster name) may have joined a cluster. Its node name stays the same.
                    same = (known["name"] == actual["name"] or known["name"] is None) and bool(
                        set(known["nodes"]) & set(actual["nodes"])
                    )
                if not same:
                    raise Kept(
                        "unknown",
                        f"api_host leads to another cluster than that of these records (they know "
                        f"{_format_identity(known)}, api_host leads to {_format_identity(actual)}); correct api_host "
                        "or database. If it is the same cluster with a new certificate authority, or a node that "
                        "joined a cluster, run agentlab_reconcile with adopt_cluster=true once",
                    )
                if known != actual and actual["authority"]:
                    self._records.set_meta("cluster", json.dumps(actual))
            self._confirmed = True

    def adopt(self) -> None:
        """Store this cluster as the cluster of the records. Only the operator can decide that (adopt_cluster)."""
        self._records.set_meta("cluster", json.dumps(self._read_identity()))
        self._confirmed = True

    def note_own_vm(self, vmid: int) -> None:
        """Note that a VM on this cluster was proven to be ours.

        If the same VM is absent later in this run, the right cluster needs no other proof. Absences of other VMs still
        need the proof: a person may have restored the backup of this VM on another cluster.
        """
        self._ours.add(vmid)

    # ---- the list ----

    def list_vms(self, *, fresh: bool = False) -> dict[int, dict[str, Any]]:
        """Return all visible VMs and containers by VMID. ``fresh``: read the list again.

        The list lags. So a row is a hint where to look, never a reason to act.
        """
        with self._lock:
            if self._vms is None or fresh:
                self._vms = _index_by_vmid(self._client.get_list("cluster/resources", type="vm"))
            return self._vms

    def read_capacity(self) -> Capacity:
        """Return resources and load of the nodes. The request also fills the cached list of VMs."""
        from .capacity import parse

        with self._lock:
            if self._capacity is None:
                rows = self._client.get_list("cluster/resources")
                self._vms = _index_by_vmid([row for row in rows if row.get("type") in ("qemu", "lxc")])
                self._capacity = parse(rows)
            return self._capacity

    def count_cpus(self, node: str) -> int | None:
        """Return the number of CPUs of a node; None when these credentials may not see it (Sys.Audit on the node)."""
        from .capacity import parse

        with self._lock:
            # A creation has already read all resources. Other callers need only the nodes.
            if self._capacity is not None:
                nodes = self._capacity.nodes
            elif self._nodes is not None:
                nodes = self._nodes
            else:
                nodes = self._nodes = parse(self._client.get_list("cluster/resources", type="node")).nodes
        return nodes[node].cpus or None if node in nodes else None

    def expect_stopped(self, vmid: int, node: str) -> None:
        """Note the node of a stopped VM from its record. find() returns this row until the list is read."""
        self._expected[vmid] = {"vmid": vmid, "type": "qemu", "node": node, "status": "stopped", "expected": True}

    def note_deleted(self, vmid: int, upid: str) -> None:
        """Note that a VM proven to be ours was just marked and deleted, and that the task ended well.

        Proxmox needs quorum for both writes. So they prove quorum for the absence of this VM.
        """
        evidence = {"quorum": "quorate", "status": f"the cluster took the delete of VM {vmid} (task {upid})"}
        self._deleted[vmid] = self._clock.monotonic(), evidence

    def _find_quorum_of_delete(self, vmid: int) -> dict[str, Any] | None:
        """Return the evidence of quorum from a VM's own recent delete, or None."""
        at, evidence = self._deleted.get(vmid, (0.0, None))
        return evidence if self._clock.monotonic() - at <= _STATUS_SECONDS else None

    def add_vm(self, vmid: int, node: str | None) -> None:
        """Add a stopped VM that this run has just created to the cached list. An existing row stays."""
        with self._lock:
            if self._vms is not None and vmid not in self._vms:
                # A new dict, because other threads may be iterating over this one.
                self._vms = {**self._vms, vmid: {"vmid": vmid, "type": "qemu", "node": node, "status": "stopped"}}

    def find(self, vmid: int, *, fresh: bool = False) -> dict[str, Any] | None:
        """Return the list's row of that VMID, or None. ``fresh``: read the list again. The row is only a hint."""
        if self._vms is None and not fresh and vmid in self._expected:
            return self._expected[vmid]
        return self.list_vms(fresh=fresh).get(vmid)

    def list_known(self) -> tuple[list[str], dict[int, str]]:
        """Return the node names, and the VM names by VMID, that this run has read so far. Sends no request."""
        nodes = [str(row.get("name")) for row in (self._status[1] if self._status else []) if row.get("type") == "node"]
        return nodes, {vmid: str(row["name"]) for vmid, row in (self._vms or {}).items() if row.get("name")}

    def sees_everything(self) -> bool:
        """Return whether no VM is hidden from these credentials now.

        Proxmox checks no ACL for root@pam. For other users, the ACL and their own permissions must prove it.
        """
        if self._client.settings.is_root:
            return True
        if not self._partial:
            try:
                entries = self._client.get_list("access/acl")
                self._partial = not entries or not sees_every_vm(entries, self._client.get_dict("access/permissions"))
            except ProxmoxError:
                self._partial = True
        return not self._partial

    def has_privilege(self, path: str, privilege: str) -> bool:
        """Return whether these credentials have the privilege on the path now, directly or inherited."""
        return self._client.settings.is_root or privilege in _list_rights(
            self._client.get_dict("access/permissions", path=path), path
        )

    # ---- absence ----

    def survey(self, vmids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Return the VM list for the beginning of a bulk run.

        If the list lacks many of the VMIDs, also check whether the list shows every VM. prove_absent() can then use the
        same list as the proof, and need not read it again.
        """
        requested = set(vmids)
        if len(requested) <= _FEW:
            return self.list_vms()
        with self._lock:
            try:
                # Read quorum before the list. A node that had quorum shows every VM that existed at that moment.
                quorum = self.require_quorum()
            except (ProxmoxError, Kept):
                return self.list_vms()
            listed = self.list_vms(fresh=True)
            if len(requested - listed.keys()) > _FEW and self.sees_everything():
                self._whole = listed, quorum, self._clock.monotonic()
            return listed

    def prove_absent(self, vmids: Iterable[int], *, anew: bool = True) -> dict[int, Presence]:
        """Return for each VMID whether it is proven free. An error of Proxmox is not raised, but gives ``absent=None``.

        ``anew=False``: no run has acted on these VMIDs since survey(), so the list of survey() proves an absence for
        _LIST_SECONDS. An older list proves nothing, because a person may restore a VM at any time.
        """
        requested = sorted(set(vmids))
        if len(requested) == 1 and requested[0] in self._ours:
            own = self._find_quorum_of_delete(requested[0])
            if own is not None:
                return {requested[0]: self._ask_nextid(requested[0], own)}
        try:
            quorum = self.require_quorum()
        except (ProxmoxError, Kept) as error:
            return {vmid: Presence(None, error.message, {}) for vmid in requested}
        if not self._ours.issuperset(requested):
            try:
                self.confirm()
            except (ProxmoxError, Kept) as error:
                unknown = {vmid: Presence(None, error.message, {}) for vmid in requested if vmid not in self._ours}
                return {**unknown, **self.prove_absent(self._ours.intersection(requested))}
        if len(requested) <= _FEW or self._partial:
            return self._ask_for_each(requested, quorum)
        if (
            not anew
            and self._whole is not None
            and self._whole[0].keys().isdisjoint(requested)
            and self._clock.monotonic() - self._whole[2] <= _LIST_SECONDS
        ):
            listed, quorum, _read = self._whole
        else:
            try:
                listed = self.list_vms(fresh=True)
            except ProxmoxError as error:
                return {vmid: Presence(None, error.message, {}) for vmid in requested}
            # Read the permissions after the list. A VM that becomes hidden in between was still listed.
            if not listed or not self.sees_everything():
                return self._ask_for_each(requested, quorum)
        free = [vmid for vmid in requested if vmid not in listed]
        # In a truncated list, VMs seem absent. So ask nextid for one of the VMIDs.
        if free and self._ask_nextid(free[0], quorum).absent is not True:
            return self._ask_for_each(requested, quorum)
        proof = {**quorum, "proof": "not in the list of all VMs", "listed": len(listed)}
        return {
            vmid: Presence(True, "not in the cluster's list of all VMs", proof)
            if vmid not in listed
            else Presence(False, "a VM with that VMID is in the cluster's list", {"node": listed[vmid].get("node")})
            for vmid in requested
        }

    def _ask_for_each(self, vmids: list[int], quorum: dict[str, Any]) -> dict[int, Presence]:
        presences = parallel.run_each(
            lambda vmid: self._ask_nextid(vmid, quorum), vmids, self._client.settings.connections
        )
        return dict(zip(vmids, presences, strict=True))

    def is_in_use(self, vmid: int) -> bool:
        """Return whether Proxmox reports the VMID as in use, also by a VM that is hidden from these credentials."""
        return self._ask_nextid(vmid, {}).absent is False

    def explain_in_use(self, vmid: int) -> str:
        """Return the message for a VMID in use. If the VM is hidden, the message names the missing privilege."""
        if self._vms is None or vmid in self._vms:
            return f"VMID {vmid} is in use"
        return (
            f"VMID {vmid} is in use, and these credentials may not see VM {vmid}: grant VM.Audit on /vms or on its "
            "pool, then run again"
        )

    def _ask_nextid(self, vmid: int, quorum: dict[str, Any]) -> Presence:
        """Return whether GET /cluster/nextid offers the VMID. Unlike the list, nextid also knows hidden VMs."""
        try:
            free = self._client.get("cluster/nextid", vmid=vmid)
        except ApiError as error:
            if error.status in (400, 500) and "already exists" in error.text:
                return Presence(False, self.explain_in_use(vmid), {"nextid": error.text})
            return Presence(None, error.message, {})
        except ProxmoxError as error:
            return Presence(None, error.message, {})
        if str(free) != str(vmid):
            return Presence(
                None,
                f"GET /cluster/nextid answered {str(free)[:40]!r} for {vmid}, so nothing is known; check that api_host "
                "is a Proxmox node",
                {},
            )
        return Presence(True, f"Proxmox says that VMID {vmid} is free", {**quorum, "proof": "nextid"})


def sees_every_vm(entries: list[dict[str, Any]], permissions: dict[str, Any]) -> bool:
    """Return whether these permissions hide no VM.

    ``entries`` comes from GET /access/acl, ``permissions`` from GET /access/permissions.

    Proxmox lists VM N if VM.Audit is effective on /vms/N. /vms must pass the privilege down, and nothing may remove it:
    neither an entry on /vms/N (an entry replaces inherited roles), nor NoAccess on / or on the VM's pool.
    GET /access/permissions omits paths without any privilege. So the paths with entries come from GET /access/acl,
    which shows the entries of all users only with Sys.Audit on /access. An empty list proves nothing: every user but
    root needs an entry to have any privilege.
    """
    if not entries:
        return False
    if "Sys.Audit" not in _list_rights(permissions, "/access") or str(
        _list_rights(permissions, "/vms").get("VM.Audit")
    ) not in (
        "1",
        "True",
        "true",
    ):
        return False
    for entry in entries:
        path = str(entry.get("path") or "")
        if not path.startswith("/") or not entry.get("roleid"):
            return False
        if path.startswith("/vms/") and "VM.Audit" not in _list_rights(permissions, path):
            return False
        if entry["roleid"] == "NoAccess" and (path == "/" or path.startswith("/pool")):
            return False
    return True


def _index_by_vmid(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    try:
        return {int(row["vmid"]): {name: row[name] for name in _LOOKED_AT if name in row} for row in rows}
    except (KeyError, TypeError, ValueError):
        raise OutcomeUnknown(
            "GET /cluster/resources: an entry has no vmid, so nothing is known; check that api_host is a Proxmox node"
        ) from None


def _list_rights(permissions: dict[str, Any], path: str) -> dict[str, Any]:
    rights = permissions.get(path)
    return rights if isinstance(rights, dict) else {}


def _format_identity(identity: dict[str, Any]) -> str:
    kind = f"cluster {identity['name']!r}" if identity["name"] else "a single node"
    return f"{kind} with {', '.join(identity['nodes'])}"
