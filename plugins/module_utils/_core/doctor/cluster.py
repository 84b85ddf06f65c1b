# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check Proxmox VE as a whole: version, cluster, quorum, range of VMIDs, clocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..durations import show
from ..errors import InvalidInput, Kept, ProxmoxError
from ..proxmox import identity
from . import creation
from .examination import LOOK_AT, Examination, parse_properties
from .findings import OK, PROBLEM, UNKNOWN, WARNING, Finding, shorten_list

# Leases and ages are wrong by the difference of the clocks. Up to the first value that is harmless; beyond the second
# value decisions are wrong.
_CLOCK_SECONDS = (5, 60)


def check_proxmox(exam: Examination) -> Iterable[Finding]:
    """Check whether Proxmox VE answers, and its release. The first finding is not ok if nothing else can be checked."""
    try:
        version = exam.context.client.get_dict("version")
    except (ProxmoxError, InvalidInput) as error:
        return [
            Finding(
                "proxmox",
                PROBLEM,
                error.message,
                "follow the message; nothing else about Proxmox was checked",
            )
        ]
    exam.release = str(version.get("version") or "")
    facts = {"version": exam.release}
    major = exam.release.partition(".")[0]
    if not major.isdecimal() or int(major) < 8:
        return [
            Finding("proxmox", OK, f"Proxmox VE {exam.release} answers", None, facts),
            Finding(
                "versions",
                WARNING,
                f"Proxmox VE {exam.release} is older than the releases that this collection is tested with",
                "upgrade to Proxmox VE 8 or 9",
                facts,
            ),
        ]
    return [Finding("proxmox", OK, f"Proxmox VE {exam.release} answers", None, facts)]


def check_cluster(exam: Examination) -> Iterable[Finding]:
    """Check that this is the cluster to which the records belong."""
    known = exam.context.records.read_meta("cluster")
    if known is None:
        yield Finding("cluster", OK, "the records name no cluster yet; the first creation writes it")
        return
    try:
        exam.context.cluster.confirm()
        yield Finding("cluster", OK, "this is the cluster these records belong to")
    except Kept as error:
        yield Finding(
            "cluster", PROBLEM, error.message, "until then no sandbox of these records is destroyed or closed"
        )


def check_quorum(exam: Examination) -> Iterable[Finding]:
    """Read the nodes, and check quorum and that every node is online."""
    exam.nodes = exam.context.cluster.list_nodes()
    offline = sorted(node for node, online in exam.nodes.items() if not online)
    facts = {"nodes": exam.nodes}
    try:
        exam.context.cluster.require_quorum()
    except Kept as error:
        yield Finding(
            "quorum",
            PROBLEM,
            error.message,
            "bring nodes back, or look at the cluster network: pvecm status",
            facts,
        )
        return
    if offline:
        yield Finding(
            "quorum",
            WARNING,
            f"the cluster has quorum, but these nodes are offline: {', '.join(offline)}. Sandboxes there are left"
            " as they are",
            "bring them back",
            facts,
        )
    else:
        yield Finding("quorum", OK, f"quorum, and all nodes are online: {', '.join(sorted(exam.nodes))}", None, facts)


def check_vmid_range(exam: Examination) -> Iterable[Finding]:
    """Check the free VMIDs of vmid_range, and the VMs in it that are not ours."""
    low, high = exam.config.vmid_range
    rows = exam.context.cluster.list_vms()
    ours = {sandbox.vmid for sandbox in exam.context.records.find_all()}
    within = {vmid: row for vmid, row in rows.items() if low <= vmid <= high}
    strangers = sorted(set(within) - ours)
    used = len(set(within) | {vmid for vmid in ours if low <= vmid <= high})
    free = high - low + 1 - used
    facts = {"range": f"{low}-{high}", "free": free, "foreign": strangers[:50]}
    findings = list(_check_next_id(exam, low, high, facts))
    if free <= 0:
        findings.append(
            Finding(
                "vmid_range",
                PROBLEM,
                f"all VMIDs of {low}-{high} are taken: no sandbox can be created without a vmid",
                "destroy or prune sandboxes, or set a larger vmid_range",
                facts,
            )
        )
    marked = [vmid for vmid in strangers[:LOOK_AT] if _carries_marker(exam, vmid, within[vmid])]
    if marked:
        findings.append(
            Finding(
                "vmid_range",
                WARNING,
                f"VMs with our marker but without a record here ({shorten_list(marked)}): another database works in "
                "the same range, or these records were lost",
                "give each database a vmid_range of its own; agentlab_reconcile reports such VMs as unrecorded",
                {**facts, "marked": marked},
            )
        )
    unmarked = [vmid for vmid in strangers if vmid not in marked]
    if unmarked:
        findings.append(
            Finding(
                "vmid_range",
                WARNING,
                f"{len(unmarked)} VMs that are not ours are inside {low}-{high} ({shorten_list(unmarked)}); they are"
                " left alone, but take VMIDs away",
                "move the range (vmid_range), or let other tools use another one",
                facts,
            )
        )
    yield from findings or [
        Finding(
            "vmid_range",
            OK,
            f"{free} of {high - low + 1} VMIDs of {low}-{high} are free, and no other VM is in it"
            # A creation asks Proxmox VE whether its VMID is free, so hidden VMs do no harm.
            + ("" if exam.sees_everything() else ", as far as these credentials see"),
            None,
            facts,
        )
    ]


def _check_next_id(exam: Examination, low: int, high: int, facts: dict[str, Any]) -> Iterable[Finding]:
    """Compare vmid_range with the VMIDs that Proxmox VE gives to new VMs by itself."""
    bounds = _read_next_id(creation.read_cluster_options(exam).get("next-id"))
    if bounds and bounds[0] <= high and low <= bounds[1]:
        facts["next_id"] = f"{bounds[0]}-{bounds[1]}"
        yield Finding(
            "vmid_range",
            WARNING,
            f"Proxmox hands out VMIDs of {bounds[0]}-{bounds[1]} by itself (next-id), which overlaps {low}-{high}",
            f"pvesh set /cluster/options --next-id lower={high + 1},upper=999999999, or move vmid_range",
            dict(facts),
        )


def _carries_marker(exam: Examination, vmid: int, row: Mapping[str, Any]) -> bool:
    if row.get("type") != "qemu":
        return False
    try:
        return bool(identity.read_markers(exam.context.client.get_dict(f"nodes/{row.get('node')}/qemu/{vmid}/config")))
    except ProxmoxError:
        return False


def check_clock(exam: Examination) -> Iterable[Finding]:
    """Compare this host's clock with the clock of each node that is online."""
    offsets: dict[str, int] = {}
    for node in sorted(name for name, online in exam.nodes.items() if online):
        before = exam.context.clock.now()
        clock = exam.context.client.get_dict(f"nodes/{node}/time")
        # The node read its clock at some time between request and answer; we assume the middle.
        offsets[node] = int(clock.get("time") or 0) - (before + exam.context.clock.now()) // 2
    if not offsets:
        why = "no node is online" if exam.nodes else "the cluster's nodes could not be read"
        yield Finding("clock", UNKNOWN, f"{why}, so no clock could be compared", "see the finding quorum")
        return
    node = max(offsets, key=lambda name: abs(offsets[name]))
    apart = abs(offsets[node])
    facts = {"offsets_seconds": offsets}
    if apart <= _CLOCK_SECONDS[0]:
        yield Finding("clock", OK, f"this host and the nodes differ by {apart} s at most", None, facts)
    else:
        yield Finding(
            "clock",
            WARNING if apart <= _CLOCK_SECONDS[1] else PROBLEM,
            f"this host's clock and that of node {node} are {show(apart)} apart: leases are counted by this host's"
            " clock, tasks by the node's",
            "switch on time synchronisation on both (timedatectl; chrony)",
            facts,
        )


def _read_next_id(value: Any) -> tuple[int, int] | None:
    """Return the bounds that the datacenter's option next-id sets (text or object); None if it sets none."""
    bounds = parse_properties(value)
    if not bounds:
        return None
    try:
        return int(bounds.get("lower") or 100), int(bounds.get("upper") or 1000000)
    except (TypeError, ValueError):
        return None
