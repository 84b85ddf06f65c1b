# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find out whether the clone of an interrupted creation was made, and bind the record to it.

A VM whose SMBIOS UUID was never stored is UNBOUND. It may be bound only if our own clone task ended well, and both
marker and VMID match the record.
"""

from __future__ import annotations

from typing import Any

from .. import states
from ..context import Context
from ..errors import ApiError, Kept, ProxmoxError
from ..model import Sandbox
from ..proxmox import identity
from ..proxmox.tasks import read_start_time
from ..store.journal import AWAITED, CreationNote, JournalEntry
from ..store.records import Claim
from .locate import Located, locate

# Seconds by which a node's clock may differ from ours.
_CLOCK_SLACK = 300


def waits_for_next_run(entry: JournalEntry, state: str) -> bool:
    """Return whether this is a creation whose caller was told to run the task again.

    No other run finishes such a creation. If the caller does not either, the lease ends the sandbox.
    """
    return (
        entry.kind == "create"
        and state in states.CREATING
        and (entry.phase == AWAITED or bool(entry.creation and entry.creation.awaited))
    )


def locate_unbound(ctx: Context, sandbox: Sandbox, claim: Claim | None, created: CreationNote | None) -> Located:
    """Locate the VM of a record without an SMBIOS UUID, and bind the record to a VM that is proven to be our clone.

    ``claim`` None: judge only, write nothing. ``created``: the note of the creation in the journal. Raises Kept while
    Proxmox VE may still make the clone.
    """
    located = locate(ctx, sandbox)
    request = created if created is not None and created.clone_sent else None
    if located.node is None:
        if request is not None:
            refuse_in_doubt(ctx, sandbox, request)
        return located
    verdict = located.verdict
    if verdict is None or verdict.identity != identity.UNBOUND:
        if verdict is not None and verdict.identity in (identity.FOREIGN, identity.UNKNOWN) and request is not None:
            refuse_in_doubt(ctx, sandbox, request)
        return located
    if request is not None:
        _refuse_running(ctx, sandbox, request)
    if request is None or not _has_our_clone_ended_well(ctx, request):
        verdict.identity = identity.AMBIGUOUS
        return located
    smbios = identity.read_smbios_uuid(verdict.config or {})
    if smbios is None:
        verdict.identity = identity.AMBIGUOUS
        return located
    if claim is not None:
        bind(ctx, claim, sandbox, smbios, located)
    verdict.identity = identity.MATCH
    ctx.cluster.note_own_vm(sandbox.vmid)
    return located


def bind(ctx: Context, claim: Claim, sandbox: Sandbox, smbios: str, located: Located) -> Sandbox:
    """Store the VM's SMBIOS UUID in the record: from here on the VM is known to be ours."""
    bound = ctx.records.change(
        claim,
        sandbox,
        "create",
        smbios_uuid=smbios,
        node=located.node,
        reason="bound",
        evidence={"smbios_uuid": smbios, "node": located.node},
    )
    for name in ("smbios_uuid", "node", "generation", "updated_at"):
        setattr(sandbox, name, getattr(bound, name))
    return bound


def refuse_in_doubt(ctx: Context, sandbox: Sandbox, created: CreationNote) -> None:
    """Raise Kept while Proxmox may still carry out a clone request whose answer was lost."""
    age = ctx.clock.now() - created.at
    if created.upid and _refuse_running(ctx, sandbox, created) is not None:
        return
    if 0 <= age < ctx.config.doubt_window:
        raise Kept(
            "unknown",
            f"sandbox {sandbox.vmid}: its creation was cut off {age} s ago and may still be carried out; "
            f"run again in {ctx.config.doubt_window - age} s (doubt_window)",
        )
    running = _list_running_clones(ctx, sandbox, created)
    if running:
        raise Kept(
            "locked",
            f"sandbox {sandbox.vmid}: a clone of template {created.template} that may be its own is still "
            f"running ({', '.join(running)}); run again when it has ended (or stop it, if it hangs)",
        )


def _refuse_running(ctx: Context, sandbox: Sandbox, created: CreationNote) -> str | None:
    """Return the exit status of the clone task; None if it cannot be read.

    Raises Kept while the task runs, because until its end nothing is known about the VM that it makes.
    """
    upid = created.upid
    status = _read_task_status(ctx, upid) if upid else None
    if status == "running":
        raise Kept(
            "locked",
            f"sandbox {sandbox.vmid}: its clone task {upid} is still running; run again when it has ended (or stop "
            "it, if it hangs)",
        )
    return status


def _read_task_status(ctx: Context, upid: str) -> str | None:
    """Return ``running``, the exit status, or None when the task cannot be read."""
    try:
        status = ctx.client.get_dict(f"nodes/{upid.split(':')[1]}/tasks/{upid}/status")
    except (ProxmoxError, IndexError):
        return None
    return "running" if status.get("status") == "running" else str(status.get("exitstatus") or "unexpected status")


def _list_clones(ctx: Context, created: CreationNote) -> list[dict[str, Any]]:
    """Return the clone tasks of the template that our login started since the creation's note."""
    since = created.at - _CLOCK_SLACK
    rows = ctx.client.get_list(
        f"nodes/{created.template_node}/tasks",
        source="all",
        typefilter="qmclone",
        vmid=created.template,
        since=max(since, 0),
        limit=1000,
    )
    login = ctx.config.proxmox.login
    return [
        row
        for row in rows
        if row.get("type") == "qmclone"
        and str(row.get("id")) == str(created.template)
        and read_start_time(str(row.get("upid"))) >= since
        and login in (str(row.get("user")), f"{row.get('user')}!{row.get('tokenid')}")
    ]


def _list_running_clones(ctx: Context, sandbox: Sandbox, created: CreationNote) -> list[str]:
    """Return the running clone tasks that may belong to a request whose answer was lost.

    These began while the request could begin, and belong to no other creation.
    """
    until = created.at + ctx.config.doubt_window + _CLOCK_SLACK
    other_tasks = {
        entry.detail.get("upid")
        for entries in ctx.records.list_unfinished()
        for entry in entries
        if entry.sandbox_uuid != sandbox.uuid
    }
    return [
        str(row.get("upid"))
        for row in _list_clones(ctx, created)
        if row.get("status") in (None, "", "RUNNING", "running")
        and not row.get("endtime")
        and read_start_time(str(row.get("upid"))) <= until
        and row.get("upid") not in other_tasks
    ]


def _has_our_clone_ended_well(ctx: Context, created: CreationNote) -> bool:
    """Return whether the creation's clone task succeeded; False also when that cannot be read."""
    try:
        if created.upid:
            status = _read_task_status(ctx, created.upid) or ""
            return status == "OK" or status.startswith("WARNINGS")
        # The run was killed between the request and its answer. The task id is not known, but the node lists the task.
        return any(str(row.get("status") or "").startswith(("OK", "WARNINGS")) for row in _list_clones(ctx, created))
    except ApiError:
        return False


def stays_unfinished(ctx: Context, sandbox: Sandbox, entry: JournalEntry) -> bool:
    """Return whether reconcile leaves this operation open: the caller finishes it, or a destroy needs its journal.

    Sends only reads to Proxmox VE.
    """
    if waits_for_next_run(entry, sandbox.state):
        # The caller was told to run again. If nobody does, the lease ends the sandbox.
        return True
    if (
        entry.kind != "create"
        or sandbox.state in states.CREATING
        or sandbox.smbios_uuid is not None
        or not sandbox.live
    ):
        return False
    # FAILED or TIMEOUT, and never bound: a later destroy recognises the VM only by this journal.
    return not has_left_nothing(ctx, sandbox, entry)


def has_left_nothing(ctx: Context, sandbox: Sandbox, entry: JournalEntry) -> bool:
    """Return whether a creation's clone is certainly over and no VM is at its VMID. Then nobody needs its journal.

    An administrator may have removed the VM that a killed clone had left.
    """
    try:
        located = locate_unbound(ctx, sandbox, None, entry.creation)
    except (Kept, ProxmoxError):
        return False
    return located.node is None and ctx.cluster.prove_absent([sandbox.vmid])[sandbox.vmid].absent is True
