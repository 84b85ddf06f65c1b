# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compare records with the VMs in Proxmox VE, for answers. Nothing is changed."""

from __future__ import annotations

from typing import Any

from .. import clock, states
from ..context import Context
from ..errors import AgentlabError
from ..model import Sandbox
from ..proxmox import identity
from ..vm.address import Looks
from ..vm.locate import is_hibernated, locate


def verify_sandboxes(ctx: Context, sandboxes: list[Sandbox], identities: bool = True) -> list[dict[str, Any]]:
    """Return vm_status, identity and drift of each sandbox, in order. Reads the VM list once.

    ``identities``: read the configuration of each VM, too, and ask the guest for an address that is missing or old (see
    ``Looks``); ip and ip_seen_at then hold the present address. Without it, identity is None for a VM.
    """
    rows = ctx.cluster.survey([sandbox.vmid for sandbox in sandboxes if sandbox.live])
    absent = [sandbox.vmid for sandbox in sandboxes if sandbox.live and sandbox.vmid not in rows]
    proofs = ctx.cluster.prove_absent(absent, anew=False) if absent else {}
    looks = Looks(ctx, sandboxes if identities else [])

    def compare(sandbox: Sandbox) -> dict[str, Any]:
        row = rows.get(sandbox.vmid)
        if not sandbox.live:
            return {"vm_status": None, "identity": None, "drift": None}
        if row is None:
            proof = proofs[sandbox.vmid]
            if proof.absent:
                return {
                    "vm_status": "absent",
                    "identity": None,
                    "drift": "its VM is gone; prune or reconcile closes the record",
                }
            return {"vm_status": None, "identity": identity.UNKNOWN, "drift": f"not known: {proof.why}"}
        if not identities:
            verdict = None if row.get("type") == "qemu" else identity.FOREIGN
            drift = _describe_drift(sandbox, row, verdict or identity.MATCH)
            if drift is None and row.get("name", sandbox.name) != sandbox.name:
                drift = f"the VM is called {row['name']} there; whether it is ours tells only its configuration"
            return {"vm_status": _show_status(row), "identity": verdict, "drift": drift}
        try:
            located = locate(ctx, sandbox)
        except AgentlabError as error:
            return {
                "vm_status": _show_status(row),
                "identity": identity.UNKNOWN,
                "drift": f"not known: {error.message}",
            }
        verdict = located.verdict.identity if located.verdict else identity.UNKNOWN
        answer = {"vm_status": _show_status(row), "identity": verdict, "drift": _describe_drift(sandbox, row, verdict)}
        ip = looks.look_up(sandbox, located) if located.match else None
        if ip is not None:
            answer.update(ip=ip, ip_seen_at=clock.format_utc(ctx.clock.now()))
            if sandbox.ip not in (None, ip) and answer["drift"] is None:
                answer["drift"] = (
                    f"the record has the address {sandbox.ip}, the guest has {ip}; reconcile corrects the record"
                )
        return answer

    return ctx.run_each(compare, sandboxes) if identities else [compare(sandbox) for sandbox in sandboxes]


def _show_status(row: dict[str, Any]) -> Any:
    """Return the VM's power state by its list row; ``hibernated`` for a stopped VM with its memory saved."""
    return "hibernated" if _is_hibernated_row(row) else row.get("status")


def _is_hibernated_row(row: dict[str, Any]) -> bool:
    return is_hibernated(row) and row.get("status") == "stopped"


def _describe_drift(sandbox: Sandbox, row: dict[str, Any], judged: str) -> str | None:
    """Return how the VM differs from the record, and what corrects that; None without a difference."""
    if judged == identity.FOREIGN:
        return "the VMID belongs to another VM now; prune or reconcile closes the record and leaves that VM alone"
    if judged != identity.MATCH:
        return f"it is not certain that the VM is ours ({judged}); it is left alone"
    if sandbox.state in (*states.POWERED, states.STOPPED) and _is_hibernated_row(row):
        return f"the record says {sandbox.state}, the VM is hibernated; reconcile corrects the record"
    if sandbox.state == states.SUSPENDED and row.get("status") == "stopped" and not _is_hibernated_row(row):
        return "the record says SUSPENDED, the VM is stopped; reconcile corrects the record"
    if sandbox.state in states.POWERED and row.get("status") == "stopped":
        return f"the record says {sandbox.state}, the VM is stopped; reconcile corrects the record"
    if sandbox.state == states.TIMEOUT and row.get("status") == "running":
        return "the record says TIMEOUT, the VM is running; reconcile stops it"
    if sandbox.state == states.STOPPED and row.get("status") == "running":
        return (
            "the record says STOPPED, the VM is running; start the sandbox, which corrects the record, then stop it "
            "if need be"
        )
    if row.get("node") != sandbox.node:
        return f"the VM moved from {sandbox.node} to {row.get('node')}; reconcile corrects the record"
    return None
