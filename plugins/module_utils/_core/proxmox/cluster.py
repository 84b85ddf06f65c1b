# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cluster as a whole: its quorum, its nodes, the list of its VMs, and the proof that a VM is not there.

Absence is proven, never inferred: the right cluster answers, it has quorum, and either the list shows every VM or
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

# Quorum changes rarely and is asked before every delete of a bulk run: an answer is good for this long. The config
# write directly before the delete is what really tells whether the cluster takes writes.
_STATUS_SECONDS = 5.0
# The list that a run began with proves an absence for so long.
_LIST_SECONDS = 30.0
# So few are asked for one by one; for more the list is cheaper, with the reads that show that nothing is missing from
# it.
_FEW = 4
# Of the twenty-odd values that the list has of each VM; the rest is a kilobyte for each of some thousands.
_LOOKED_AT = ("vmid", "type", "node", "status", "name", "template", "tags", "hastate", "lock", "uptime")


@dataclass(slots=True)
class Presence:
    """Whether a VMID is in use: ``absent`` is True (proven), False (something is there) or None (not known, ``why``
    says it).
    """

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
        self._quorum: tuple[float, dict[str, Any]] | None = None
        self._vms: dict[int, dict[str, Any]] | None = None
        self._capacity: Capacity | None = None
        self._nodes: dict[str, Node] | None = None
        # See expect_stopped().
        self._expected: dict[int, dict[str, Any]] = {}
        # See note_deleted().
        self._deleted: dict[int, tuple[float, dict[str, Any]]] = {}
        self._confirmed = False
        # A list that shows every VM, and the quorum it was read under: see survey().
        self._whole: tuple[dict[int, dict[str, Any]], dict[str, Any], float] | None = None
        # Once it is known that VMs may be hidden, each absence of this run is asked for by itself.
        self._partial = False
        self._ours: set[int] = set()

    # ---- nodes and quorum ----

    def _status_rows(self) -> list[dict[str, Any]]:
        with self._lock:
            if self._status is None or self._clock.monotonic() - self._status[0] > _STATUS_SECONDS:
                rows = self._client.get_list("cluster/status")
                self._status = (self._clock.monotonic(), rows)
            return self._status[1]

    def _quorum_row(self) -> dict[str, Any]:
        """Return the row ``quorum`` of the HA manager's status, which speaks for the node that answers."""
        with self._lock:
            if self._quorum is None or self._clock.monotonic() - self._quorum[0] > _STATUS_SECONDS:
                rows = self._client.get_list("cluster/ha/status/current")
                row = next((row for row in rows if row.get("type") == "quorum"), None)
                if row is None or "quorate" not in row:
                    raise OutcomeUnknown(
                        "GET /cluster/ha/status/current says nothing of quorum, so nothing is known; is api_host a "
                        "Proxmox node?"
                    )
                self._quorum = (self._clock.monotonic(), row)
            return self._quorum[1]

    def require_quorum(self) -> dict[str, Any]:
        """Return the evidence of quorum. Kept(unknown) without it: Proxmox would delete the disks and then fail.

        ``GET /cluster/status`` is no source for this: pvedaemon caches it, and it says 0 (or 1) for minutes after that
        stopped being true. The HA manager's row is right within two seconds, with and without HA resources, and a node
        that was never part of a cluster has it too.
        """
        row = self._quorum_row()
        if str(row.get("quorate")) not in ("1", "True", "true"):
            raise Kept(
                "unknown",
                "the cluster has no quorum; nothing is deleted and nothing is known to be gone until it has (pvecm "
                "status)",
            )
        return {"quorum": "quorate", "node": row.get("node"), "status": str(row.get("status"))[:200]}

    def node_online(self, node: str) -> bool:
        """False only when the cluster says so."""
        row = next((row for row in self._status_rows() if row.get("type") == "node" and row.get("name") == node), None)
        return row is None or str(row.get("online", 1)) in ("1", "True", "true")

    def nodes(self) -> dict[str, bool]:
        """Node names with whether each is online."""
        return {
            str(row.get("name")): str(row.get("online", 1)) in ("1", "True", "true")
            for row in self._status_rows()
            if row.get("type") == "node"
        }

    # ---- which cluster ----

    def _identity(self) -> dict[str, Any]:
        rows = self._status_rows()
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
                # Every cluster has a certificate authority of its own: two single nodes named "pve" differ in it.
                for row in self._client.get_list(f"nodes/{local}/certificates/info"):
                    if row.get("filename") == "pve-root-ca.pem":
                        authority = row.get("fingerprint")
            except ApiError:
                authority = None
        return {"name": cluster, "nodes": nodes, "authority": authority}

    def confirm(self, *, creating: bool = False) -> None:
        """Refuse to draw conclusions from a cluster other than the one the records belong to; the first creation
        decides which that is.
        """
        with self._lock:
            if self._confirmed:
                return
            text = self._records.meta("cluster")
            try:
                known = json.loads(text) if text else None
                sound = known is None or {"authority", "name", "nodes"} <= set(known)
            except (ValueError, TypeError):
                sound = False
            if not sound:
                raise Kept(
                    "unknown",
                    "the records' note of their cluster is damaged (meta.value of key cluster), so nothing is "
                    "concluded from this one; run agentlab_reconcile with adopt_cluster=true once, when this is the "
                    "right cluster",
                )
            if known and known["authority"] and known["authority"] == self._client.trusted_authority():
                # The connection itself proves it: nobody is talked to but whom that cluster's own authority signed for.
                self._confirmed = True
                return
            found = self._identity()
            if known is None:
                if not creating:
                    raise Kept(
                        "unknown",
                        "these records do not know yet which cluster they belong to (the first creation notes it), so "
                        "nothing is concluded from this one",
                    )
                self._records.set_meta("cluster", json.dumps(found))
            else:
                if known["authority"] and found["authority"]:
                    same = known["authority"] == found["authority"]
                elif known["authority"]:
                    raise Kept(
                        "unknown",
                        "the cluster's certificate authority cannot be read, so it is not certain that these records "
                        "belong to it",
                    )
                else:
                    # A single node that has become a cluster keeps its name among the nodes.
                    same = (known["name"] == found["name"] or known["name"] is None) and bool(
                        set(known["nodes"]) & set(found["nodes"])
                    )
                if not same:
                    raise Kept(
                        "unknown",
                        f"this is not the cluster these records belong to (they know {_title(known)}, api_host leads "
                        f"to {_title(found)}); correct api_host or database; if it is the same cluster with a new "
                        "certificate authority, or a node that joined one, run agentlab_reconcile with "
                        "adopt_cluster=true once",
                    )
                if known != found and found["authority"]:
                    self._records.set_meta("cluster", json.dumps(found))
            self._confirmed = True

    def adopt(self) -> None:
        """Note this cluster as the one the records belong to, because the operator says so."""
        self._records.set_meta("cluster", json.dumps(self._identity()))
        self._confirmed = True

    def seen_ours(self, vmid: int) -> None:
        """A VM proven to be ours was found here.

        Its own absence, later in this run, needs no other sign that this is the right cluster; that of others does: a
        single VM may be here because somebody restored its backup.
        """
        self._ours.add(vmid)

    # ---- the list ----

    def vms(self, *, fresh: bool = False) -> dict[int, dict[str, Any]]:
        """All VMs and containers the credentials may see, by VMID. A hint only: where to look, never whether to act."""
        with self._lock:
            if self._vms is None or fresh:
                self._vms = _by_vmid(self._client.get_list("cluster/resources", type="vm"))
            return self._vms

    def capacity(self) -> Capacity:
        """Return what the nodes have and carry, from one request that is the list of all VMs as well."""
        from .capacity import parse

        with self._lock:
            if self._capacity is None:
                rows = self._client.get_list("cluster/resources")
                self._vms = _by_vmid([row for row in rows if row.get("type") in ("qemu", "lxc")])
                self._capacity = parse(rows)
            return self._capacity

    def cpus(self, node: str) -> int | None:
        """Return how many CPUs a node has; None where these credentials are not shown it (Sys.Audit on the node)."""
        from .capacity import parse

        with self._lock:
            # A creation has read the list of everything; nobody else needs more than the nodes.
            if self._capacity is not None:
                nodes = self._capacity.nodes
            elif self._nodes is not None:
                nodes = self._nodes
            else:
                nodes = self._nodes = parse(self._client.get_list("cluster/resources", type="node")).nodes
        return nodes[node].cpus or None if node in nodes else None

    def expect_stopped(self, vmid: int, node: str) -> None:
        """Note where a record says that its VM is, switched off: as long as no list was read, find() answers with
        that.
        """
        self._expected[vmid] = {"vmid": vmid, "type": "qemu", "node": node, "status": "stopped", "expected": True}

    def note_deleted(self, vmid: int, upid: str) -> None:
        """Note that a VM proven to be ours was marked and then deleted by a task that ended well just now.

        Both are writes that the cluster takes only with quorum, so they prove quorum for the absence of this VM.
        """
        evidence = {"quorum": "quorate", "status": f"the cluster took the delete of VM {vmid} (task {upid})"}
        self._deleted[vmid] = self._clock.monotonic(), evidence

    def _quorum_of_delete(self, vmid: int) -> dict[str, Any] | None:
        """Return the evidence of quorum of a VM's own delete while it is fresh."""
        at, evidence = self._deleted.get(vmid, (0.0, None))
        return evidence if self._clock.monotonic() - at <= _STATUS_SECONDS else None

    def add_vm(self, vmid: int, node: str | None) -> None:
        """Add a VM that this run has just made, switched off, to the list as it was read; a row that is there stays."""
        with self._lock:
            if self._vms is not None and vmid not in self._vms:
                # A new dict: other threads may be walking through this one.
                self._vms = {**self._vms, vmid: {"vmid": vmid, "type": "qemu", "node": node, "status": "stopped"}}

    def find(self, vmid: int, *, fresh: bool = False) -> dict[str, Any] | None:
        """Return the row of that VMID; a hint where to look, as the list."""
        if self._vms is None and not fresh and vmid in self._expected:
            return self._expected[vmid]
        return self.vms(fresh=fresh).get(vmid)

    def known(self) -> tuple[list[str], dict[int, str]]:
        """Names of the nodes, and of the VMs by VMID, as far as this run has read them: asks nothing."""
        nodes = [str(row.get("name")) for row in (self._status[1] if self._status else []) if row.get("type") == "node"]
        return nodes, {vmid: str(row["name"]) for vmid, row in (self._vms or {}).items() if row.get("name")}

    def sees_everything(self) -> bool:
        """True when no VM is hidden from these credentials now: root@pam itself has no ACL, for anybody else two
        reads must show it.
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

    def holds(self, path: str, privilege: str) -> bool:
        """Whether these credentials have the privilege on the path now, inherited or not."""
        return self._client.settings.is_root or privilege in _rights(
            self._client.get_dict("access/permissions", path=path), path
        )

    # ---- absence ----

    def survey(self, vmids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The list a bulk run begins with.

        When it lacks many of what is looked for, find out at once whether it shows every VM: then it is the proof of
        those absences (prove_absent), and need not be read again.
        """
        wanted = set(vmids)
        if len(wanted) <= _FEW:
            return self.vms()
        with self._lock:
            try:
                # Before the list: a node that had quorum then shows what existed then.
                quorum = self.require_quorum()
            except (ProxmoxError, Kept):
                return self.vms()
            listed = self.vms(fresh=True)
            if len(wanted - listed.keys()) > _FEW and self.sees_everything():
                self._whole = listed, quorum, self._clock.monotonic()
            return listed

    def prove_absent(self, vmids: Iterable[int], *, anew: bool = True) -> dict[int, Presence]:
        """For each VMID whether it is proven free. Never raises for Proxmox's errors: those are ``absent=None``.

        ``anew=False``: the list of survey() is as good as a new one, because nothing was done about these VMIDs since,
        by us or by another run; if it is not old, for anybody may restore a VM.
        """
        wanted = sorted(set(vmids))
        if len(wanted) == 1 and wanted[0] in self._ours:
            own = self._quorum_of_delete(wanted[0])
            if own is not None:
                return {wanted[0]: self._nextid(wanted[0], own)}
        try:
            quorum = self.require_quorum()
        except (ProxmoxError, Kept) as error:
            return {vmid: Presence(None, error.message, {}) for vmid in wanted}
        if not self._ours.issuperset(wanted):
            try:
                self.confirm()
            except (ProxmoxError, Kept) as error:
                unknown = {vmid: Presence(None, error.message, {}) for vmid in wanted if vmid not in self._ours}
                return {**unknown, **self.prove_absent(self._ours.intersection(wanted))}
        if len(wanted) <= _FEW or self._partial:
            return self._ask_for_each(wanted, quorum)
        if (
            not anew
            and self._whole is not None
            and self._whole[0].keys().isdisjoint(wanted)
            and self._clock.monotonic() - self._whole[2] <= _LIST_SECONDS
        ):
            listed, quorum, _read = self._whole
        else:
            try:
                listed = self.vms(fresh=True)
            except ProxmoxError as error:
                return {vmid: Presence(None, error.message, {}) for vmid in wanted}
            # Rights are read after the list: a VM that is hidden from now on was still listed.
            if not listed or not self.sees_everything():
                return self._ask_for_each(wanted, quorum)
        free = [vmid for vmid in wanted if vmid not in listed]
        # A list that was cut short by something in between would make VMs vanish: one of them is asked for in another
        # way.
        if free and self._nextid(free[0], quorum).absent is not True:
            return self._ask_for_each(wanted, quorum)
        proof = {**quorum, "proof": "not in the list of all VMs", "listed": len(listed)}
        return {
            vmid: Presence(True, "not in the cluster's list of all VMs", proof)
            if vmid not in listed
            else Presence(False, "a VM with that VMID is in the cluster's list", {"node": listed[vmid].get("node")})
            for vmid in wanted
        }

    def _ask_for_each(self, vmids: list[int], quorum: dict[str, Any]) -> dict[int, Presence]:
        found = parallel.each(lambda vmid: self._nextid(vmid, quorum), vmids, self._client.settings.connections)
        return dict(zip(vmids, found, strict=True))

    def is_in_use(self, vmid: int) -> bool:
        """Return whether Proxmox VE says that a VMID is in use, be it by a VM that the credentials may not see."""
        return self._nextid(vmid, {}).absent is False

    def why_in_use(self, vmid: int) -> str:
        """Return the sentence for a VMID that is in use: with what to grant, where the credentials do not see its
        VM.
        """
        if self._vms is None or vmid in self._vms:
            return f"VMID {vmid} is in use"
        return (
            f"VMID {vmid} is in use, and these credentials may not see VM {vmid}: grant VM.Audit on /vms or on its "
            "pool, then run again"
        )

    def _nextid(self, vmid: int, quorum: dict[str, Any]) -> Presence:
        try:
            found = self._client.get("cluster/nextid", vmid=vmid)
        except ApiError as error:
            if error.status in (400, 500) and "already exists" in error.text:
                return Presence(False, self.why_in_use(vmid), {"nextid": error.text})
            return Presence(None, error.message, {})
        except ProxmoxError as error:
            return Presence(None, error.message, {})
        if str(found) != str(vmid):
            return Presence(
                None, f"GET /cluster/nextid answered {str(found)[:40]!r} for {vmid}, so nothing is known", {}
            )
        return Presence(True, f"Proxmox says that VMID {vmid} is free", {**quorum, "proof": "nextid"})


def sees_every_vm(entries: list[dict[str, Any]], held: dict[str, Any]) -> bool:
    """Whether rights as GET /access/acl and GET /access/permissions tell them hide no VM.

    A VM is listed when VM.Audit is effective on /vms/N. It is when /vms hands it down and nothing on the way takes it
    away again: an entry on /vms/N itself (it replaces what was handed down), or NoAccess on the VM's pool. Permissions
    leave out paths without any right, so which paths have entries must be known from the list of all entries - those of
    everybody, which takes Sys.Audit on /access: without it the list is cut. It is never empty for anybody but root: no
    entry, no right.
    """
    if not entries:
        return False
    if "Sys.Audit" not in _rights(held, "/access") or str(_rights(held, "/vms").get("VM.Audit")) not in (
        "1",
        "True",
        "true",
    ):
        return False
    for entry in entries:
        path = str(entry.get("path") or "")
        if not path.startswith("/") or not entry.get("roleid"):
            return False
        if path.startswith("/vms/") and "VM.Audit" not in _rights(held, path):
            return False
        if entry["roleid"] == "NoAccess" and (path == "/" or path.startswith("/pool")):
            return False
    return True


def _by_vmid(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    try:
        return {int(row["vmid"]): {name: row[name] for name in _LOOKED_AT if name in row} for row in rows}
    except (KeyError, TypeError, ValueError):
        raise OutcomeUnknown("GET /cluster/resources: entries without a vmid; is api_host a Proxmox node?") from None


def _rights(held: dict[str, Any], path: str) -> dict[str, Any]:
    found = held.get(path)
    return found if isinstance(found, dict) else {}


def _title(identity: dict[str, Any]) -> str:
    kind = f"cluster {identity['name']!r}" if identity["name"] else "a single node"
    return f"{kind} with {', '.join(identity['nodes'])}"
