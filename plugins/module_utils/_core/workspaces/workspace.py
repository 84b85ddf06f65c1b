# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Create, grow, attach, detach and delete workspaces, and finish the operations of killed runs.

``workspace_disk`` attaches the disk to a VM and detaches it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .. import patterns
from .. import states as sandbox_states
from ..context import Context
from ..errors import AgentlabError, ApiError, InvalidInput, Kept, OutcomeUnknown, ProxmoxError
from ..model import Sandbox
from ..nodes import AUTO
from ..store import workspaces as store
from ..store.records import Claim
from ..store.workspaces import Workspace
from ..vm import power
from ..vm.locate import refuse_locked, require_match, write_with_digest
from .workspace_disk import (
    UNITS,
    WorkspaceRefused,
    assign,
    attach,
    check_node,
    detach_volume,
    find_attached_vms,
    find_keys,
    find_node,
    find_slot,
    find_volume,
    free_workspace,
    is_missing,
    make_held_error,
    open_records,
    read_drives,
    refuse_snapshots,
    select,
    show_size,
)

STATES = store.STATES
_SIZE = re.compile(r"(\d{1,6})([MGT])", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
# File-based storages, with the suffix (and format) of a new volume. On all other storages volumes have no suffix.
_FILES = {"dir": ".qcow2", "nfs": ".qcow2", "cifs": ".qcow2", "glusterfs": ".qcow2", "btrfs": ".raw"}
# Contents that belong to no VMID. A directory storage lists them for every VMID (Proxmox VE 9.2).
_OWNED_BY_NOBODY = ("snippets", "import", "iso", "vztmpl")
# States of a sandbox in which a workspace may be attached to its VM.
_USABLE = ("BOOTING", "READY", "RUNNING", "STOPPED")


@dataclass(slots=True)
class WorkspaceResult:
    """The outcome for a workspace: one word, the record, and whether an action changed something."""

    outcome: str
    workspace: Workspace | None
    changed: bool = False
    message: str | None = None


# ---- options ----


def parse_size(value: object, option: str = "size") -> int:
    """Return a size such as ``20G`` in bytes. Raises InvalidInput, which names ``option``, for any other value."""
    match = _SIZE.fullmatch(patterns.shorten_size(str(value).strip()))
    if not match or not int(match[1]):
        raise InvalidInput(
            f"{option}: {str(value)[:40]!r} is not valid. Valid: a number with M, G or T, such as 20G",
            option=option,
            value=str(value)[:40],
        )
    return int(match[1]) * UNITS[match[2]]


def check_name(name: str) -> None:
    """Raise InvalidInput for a name that is not valid for a workspace."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"name: {name[:80]!r} is not valid. Valid: letters, digits, dot, hyphen and underscore, 63 characters at "
            "most",
            option="name",
        )


# ---- creating and growing ----


def ensure_present(
    ctx: Context, name: str, *, size: object = None, storage: str | None = None, node: str | None = None
) -> WorkspaceResult:
    """Make sure that the workspace exists, and return the outcome. An existing workspace can only grow.

    ``size`` is a text such as ``20G``. Without ``storage`` and ``node`` the configuration decides. Raises InvalidInput
    for an option that does not fit the workspace, and WorkspaceRefused if it cannot grow now.
    """
    check_name(name)
    size_bytes = None if size is None else parse_size(size)
    disk = open_records(ctx).find(name)
    if disk is None:
        return _create(ctx, name, size_bytes, storage, node)
    if storage is not None and storage != disk.storage:
        raise InvalidInput(
            f"storage: {disk.title} is on {disk.storage!r}, and a workspace is never moved; give that storage, or "
            "leave the option out",
            option="storage",
            value=storage,
        )
    if node is not None and disk.node is not None and node != disk.node:
        raise InvalidInput(
            f"node: {disk.title} is on {disk.node!r} (local storage), and a workspace is never moved; give that node, "
            "or leave the option out",
            option="node",
            value=node,
        )
    if disk.state == store.CREATING:
        return (
            WorkspaceResult("would_create", disk, True)
            if ctx.dry_run
            else WorkspaceResult("created", _allocate(ctx, disk), True)
        )
    if size_bytes is None or size_bytes == disk.size:
        return WorkspaceResult("unchanged", disk)
    if size_bytes < disk.size:
        raise InvalidInput(
            f"size: {disk.title} has {show_size(disk.size)}, and workspaces only grow; give that size or more",
            option="size",
            value=str(size),
        )
    return _grow(ctx, disk, size_bytes)


def _create(ctx: Context, name: str, size: int | None, storage: str | None, node: str | None) -> WorkspaceResult:
    """Reserve a record with an owner VMID, and create the volume. ``size`` is in bytes. Raises InvalidInput."""
    if size is None:
        raise InvalidInput(f"size: missing; a new workspace ({name!r}) needs a size, such as 20G", option="size")
    storage = storage or ctx.config.storage
    if storage is None:
        raise InvalidInput(
            "storage: missing; give the storage for the workspace (or set it in the configuration)", option="storage"
        )
    nodes = ctx.cluster.list_nodes()
    # ``node: auto`` chooses a node for each sandbox. A workspace on local storage never leaves its node.
    configured = None if ctx.config.node == AUTO else ctx.config.node
    node = node or configured or next(iter(sorted(name for name, up in nodes.items() if up)), None)
    if node not in nodes or not nodes[node]:
        raise InvalidInput(
            f"node: {node!r} is not a node of this cluster that is online. Nodes: {', '.join(sorted(nodes))}",
            option="node",
            value=node,
        )
    rows = ctx.client.get_list(f"nodes/{node}/storage")
    usable = sorted(str(row.get("storage")) for row in rows if "images" in str(row.get("content") or "").split(","))
    row = next((row for row in rows if row.get("storage") == storage and storage in usable), None)
    if row is None:
        raise InvalidInput(
            f"storage: {storage!r} is not a storage of node {node} for disks of VMs. Storages: "
            f"{', '.join(usable) or 'none that these credentials may see (grant Datastore.Audit on /storage)'}",
            option="storage",
            value=storage,
        )
    if str(row.get("active", 1)) != "1":
        others = ", ".join(name for name in usable if name != storage) or "none"
        raise InvalidInput(
            f"storage: {storage!r} is not active on node {node}. Look at pvesm status there, or give another storage: "
            f"{others}",
            option="storage",
            value=storage,
        )
    shared = str(row.get("shared", 0)) == "1"
    suffix = _FILES.get(str(row.get("type")), "")
    ctx.cluster.confirm(creating=True)
    disk = open_records(ctx).reserve(
        name,
        size=size,
        storage=storage,
        node=None if shared else node,
        owners=ctx.config.workspace_owner_range,
        occupied=set(ctx.cluster.list_vms()),
        suffix=suffix,
        folder=bool(suffix),
    )
    if ctx.dry_run:
        return WorkspaceResult("would_create", disk, True)
    return WorkspaceResult("created", _allocate(ctx, disk, node, first=True), True)


def _allocate(ctx: Context, disk: Workspace, node: str | None = None, *, first: bool = False) -> Workspace:
    """Create the volume, and return the record. The request can be repeated: the volume's name has the workspace's id.

    ``first``: no other run has sent the request. A refusal then proves that there is no volume, and closes the record.
    """
    node = node or find_node(ctx, disk)
    row = find_volume(ctx, disk, node)
    if row is None:
        try:
            _require_free_owner(ctx, disk, node)
            if not first:
                # We send a new request: doubt_window starts again now, so that no other run gives the record up
                # meanwhile.
                disk = open_records(ctx).change(disk, "create", outcome="decided", reason="allocating")
            # Proxmox takes the size here with M or G, not with T. So give the size in MiB.
            answer = ctx.client.post(
                f"nodes/{node}/storage/{disk.storage}/content",
                vmid=disk.owner_vmid,
                size=f"{disk.size // UNITS['M']}M",
                filename=disk.volume.rpartition("/")[2].rpartition(":")[2],
            )
        except ApiError as error:
            if "already exists" not in error.text:
                if first:
                    _give_creation_up(ctx, disk, error)
                raise
            answer = disk.volume
        except WorkspaceRefused as error:
            if not first:
                # Proxmox may still carry out an earlier request.
                raise WorkspaceRefused(
                    f"{error.message}; agentlab_reconcile gives this creation up once Proxmox VE can no longer make "
                    "its volume (doubt_window), and a run after that takes another VMID"
                ) from None
            _give_creation_up(ctx, disk, error)
            raise WorkspaceRefused(f"{error.message}; run again for another VMID") from None
        if answer != disk.volume:
            raise OutcomeUnknown(
                f"{disk.title}: Proxmox answered {str(answer)[:80]!r} where {disk.volume!r} was expected; run again"
            )
        row = find_volume(ctx, disk, node)
        if row is None:
            raise OutcomeUnknown(
                f"{disk.title}: {disk.volume} was allocated, but the storage does not list it: grant "
                "Datastore.Allocate, Datastore.AllocateSpace and Datastore.Audit together on "
                f"/storage/{disk.storage}, then run again"
            )
    return open_records(ctx).change(
        disk,
        "create",
        to=store.DETACHED,
        reason="created",
        evidence={"volume": disk.volume, "node": node},
        size=int(row.get("size") or disk.size),
    )


def _require_free_owner(ctx: Context, disk: Workspace, node: str) -> None:
    """Raise WorkspaceRefused if a VM (visible or hidden) has the owner VMID, or if another volume belongs to it."""
    proof = ctx.cluster.prove_absent([disk.owner_vmid])[disk.owner_vmid]
    if not proof.absent:
        raise WorkspaceRefused(
            f"{disk.title}: VMID {disk.owner_vmid} of workspace_owner_range is not proven to be free ({proof.why}); "
            "VMs must never get a VMID of that range"
        )
    # Ignore our own volume: another run, or a request whose answer was lost, may have created it just now.
    volumes = [
        row
        for row in ctx.client.get_list(f"nodes/{node}/storage/{disk.storage}/content", vmid=disk.owner_vmid)
        if row.get("volid") != disk.volume and row.get("content") not in _OWNED_BY_NOBODY
    ]
    if volumes:
        raise WorkspaceRefused(
            f"{disk.title}: storage {disk.storage!r} has a volume of VMID {disk.owner_vmid} already "
            f"({volumes[0].get('volid')}); find out whose volume that is"
        )


def _give_creation_up(ctx: Context, disk: Workspace, error: AgentlabError) -> None:
    """Close the record of a workspace that has no volume, with the error in its event."""
    open_records(ctx).change(
        disk,
        "create",
        to=store.DELETED,
        outcome="failed",
        reason="creation_failed",
        evidence={"message": error.message},
    )


def _grow(ctx: Context, disk: Workspace, size_bytes: int) -> WorkspaceResult:
    """Resize an attached workspace to ``size_bytes``. Raises WorkspaceRefused for a workspace that is not attached."""
    if disk.state != store.ATTACHED or disk.sandbox_uuid is None:
        raise WorkspaceRefused(
            f"size: {disk.title} is {disk.state}; Proxmox VE resizes disks of VMs only. Attach the workspace to a "
            "sandbox, then run again"
        )
    if ctx.dry_run:
        return WorkspaceResult("would_grow", disk, True)
    with ctx.claim_sandbox(ctx.records.get(disk.sandbox_uuid), "grow_workspace") as (claim, sandbox):
        located = require_match(ctx, sandbox)
        refuse_locked(sandbox, located)
        slot = find_slot(ctx, sandbox, located, disk)
        disk = open_records(ctx).change(
            disk, "grow", claim=claim, outcome="decided", reason="grow", evidence={"from": disk.size, "to": size_bytes}
        )
        # An absolute size is idempotent, so the request can be repeated.
        write_with_digest(
            ctx,
            sandbox,
            located,
            lambda now: power.resize(
                ctx,
                now,
                slot if now is located else find_slot(ctx, sandbox, now, disk),
                show_size(size_bytes),
                f"grow {disk.title}",
            ),
        )
        row = find_volume(ctx, disk, str(located.node))
        size = int((row or {}).get("size") or size_bytes)
        grown = open_records(ctx).change(disk, "grow", claim=claim, reason="grown", size=size, evidence={"size": size})
    return WorkspaceResult("grown", grown, True)


# ---- attaching and detaching ----


def ensure_attached(ctx: Context, which: str, sandbox: Sandbox, ttl: int | None = None) -> WorkspaceResult:
    """Make sure that the sandbox has the workspace, and return the outcome. ``which``: name or id of the workspace.

    ``ttl``: the lease on the workspace in seconds; None: the lease of the sandbox. If another sandbox has the
    workspace, it is taken over only if the lease on it is over and the VM of that sandbox is stopped. Raises
    WorkspaceRefused otherwise.
    """
    disk = select(ctx, which)
    if disk.state == store.ATTACHED and disk.sandbox_uuid == sandbox.uuid:
        find_slot(ctx, sandbox, require_match(ctx, sandbox), disk)
        return _renew_lease(ctx, disk, ttl)
    if sandbox.state not in _USABLE:
        raise WorkspaceRefused(
            f"cannot attach {disk.title} to sandbox {sandbox.vmid} in {sandbox.state} state. Valid states: "
            f"{', '.join(_USABLE)}"
        )
    if disk.sandbox_uuid is not None and disk.sandbox_uuid != sandbox.uuid:
        _require_lease_over(ctx, disk)
        if not ctx.dry_run:
            disk = ensure_detached(ctx, disk.id, only_stopped=True).workspace or disk
    if ctx.dry_run:
        check_node(disk, sandbox.node)
        return WorkspaceResult("would_attach", disk, True)
    with ctx.claim_sandbox(sandbox, "attach_workspace") as (claim, current):
        if current.state not in _USABLE:
            raise WorkspaceRefused(
                f"cannot attach {disk.title} to sandbox {current.vmid} in {current.state} state. Valid states: "
                f"{', '.join(_USABLE)}"
            )
        located = require_match(ctx, current)
        refuse_locked(current, located)
        check_node(disk, located.node)
        assigned = assign(ctx, claim, current, disk, ttl)
        try:
            attached_disk = attach(ctx, claim, current, located, assigned)
        except (WorkspaceRefused, Kept) as error:
            # Undo the attachment only if no request was sent, or its answer is known. The next run settles other cases.
            if isinstance(error, WorkspaceRefused) or open_records(ctx).get(assigned.id).slot is None:
                try:
                    _free_refused(ctx, claim, current, assigned, error)
                except Kept as still:
                    raise WorkspaceRefused(
                        f"{error.message}. Until that is certain, no other sandbox gets the workspace: {still.message}",
                        vmid=current.vmid,
                    ) from None
            raise
    return WorkspaceResult("attached", attached_disk, True)


def _free_refused(ctx: Context, claim: Claim, sandbox: Sandbox, assigned: Workspace, error: AgentlabError) -> None:
    """Free the workspace after an attachment that was refused, or that must be undone."""
    disk = open_records(ctx).get(assigned.id)
    if disk.state == store.ATTACHING and disk.slot is None:
        open_records(ctx).change(
            disk,
            "attach",
            to=store.DETACHED,
            claim=claim,
            outcome="failed",
            reason="refused",
            sandbox_uuid=None,
            lease_expires_at=None,
            evidence={"message": error.message},
        )
        return
    # A stored slot means that a run has sent the request. If ``assigned`` had it, an earlier run did, and Proxmox may
    # still carry out that request.
    detach_volume(ctx, claim, sandbox, require_match(ctx, sandbox), disk, sure=assigned.slot is None)


def _renew_lease(ctx: Context, disk: Workspace, ttl: int | None) -> WorkspaceResult:
    """Set the lease of an attached workspace to now plus ``ttl`` seconds, if that adds a minute or more."""
    until = None if ttl is None else ctx.clock.now() + ttl
    if until is None or until - (disk.lease_expires_at or 0) < 60:
        return WorkspaceResult("unchanged", disk)
    if ctx.dry_run:
        return WorkspaceResult("would_renew", disk, True)
    return WorkspaceResult(
        "renewed", open_records(ctx).change(disk, "renew_lease", reason="renewed", lease_expires_at=until), True
    )


def _require_lease_over(ctx: Context, disk: Workspace) -> None:
    """Raise WorkspaceRefused unless the lease on the workspace is over."""
    if disk.lease_expires_at is None or disk.lease_expires_at > ctx.clock.now():
        raise make_held_error(ctx, disk)


def ensure_detached(ctx: Context, which: str, *, only_stopped: bool = False) -> WorkspaceResult:
    """Make sure that no sandbox has the workspace, and return the outcome.

    A running guest must unmount the disk before: data that the guest has not written yet is lost. ``only_stopped``:
    raise WorkspaceRefused unless the lease on the workspace is over and the VM is stopped.
    """
    disk = select(ctx, which)
    if disk.state == store.DETACHED:
        return WorkspaceResult("unchanged", disk)
    if disk.sandbox_uuid is None:
        raise make_held_error(ctx, disk)
    sandbox = ctx.records.get(disk.sandbox_uuid)
    if ctx.dry_run:
        if sandbox.live and sandbox.smbios_uuid is not None:
            refuse_snapshots(ctx, sandbox, require_match(ctx, sandbox), disk)
        return WorkspaceResult("would_detach", disk, True)
    with ctx.claim_sandbox(sandbox, "detach_workspace") as (claim, current):
        disk = open_records(ctx).get(disk.id)
        if disk.sandbox_uuid != current.uuid:
            return WorkspaceResult("unchanged", disk)
        if not current.live:
            return WorkspaceResult("detached", free_workspace(ctx, claim, current) or disk, True)
        if only_stopped:
            # The lease may have been renewed since the caller looked at it.
            _require_lease_over(ctx, disk)
        if current.smbios_uuid is None:
            raise WorkspaceRefused(
                f"{disk.title}: the creation of sandbox {current.vmid} is not finished; finish or destroy it first"
            )
        located = require_match(ctx, current)
        refuse_locked(current, located)
        if only_stopped and power.read_status(ctx, located).get("status") != "stopped":
            raise WorkspaceRefused(
                f"{disk.title}: the lease of sandbox {current.vmid} on it is over, but its VM still runs; stop "
                "the sandbox first"
            )
        return WorkspaceResult("detached", detach_volume(ctx, claim, current, located, disk), True)


# ---- deleting ----


def ensure_absent(ctx: Context, which: str, *, force: bool) -> WorkspaceResult:
    """Delete a workspace and its data, and return the outcome.

    Raises WorkspaceRefused without ``force``, if a sandbox or a VM has the workspace, and if its owner VMID is not
    proven to be free. Raises Kept while a creation of the volume may still be carried out.
    """
    disk = open_records(ctx).find(which)
    if disk is None:
        return WorkspaceResult("not_found", None)
    if disk.state not in (store.DETACHED, store.CREATING, store.DELETING):
        raise make_held_error(ctx, disk)
    if disk.state == store.DETACHED and not force:
        raise WorkspaceRefused(
            f"{disk.title} holds {show_size(disk.size)} of data on {disk.volume}, which would be lost",
            remedy="delete_workspace",
        )
    age = ctx.clock.now() - disk.updated_at
    if disk.state == store.CREATING and 0 <= age < ctx.config.doubt_window:
        raise Kept(
            "unknown",
            f"{disk.title}: its creation was begun {age} s ago and may still be carried out; run again in "
            f"{ctx.config.doubt_window - age} s (doubt_window)",
        )
    having = find_attached_vms(ctx, disk)
    if having:
        raise WorkspaceRefused(
            f"{disk.title}: VM {having[0]} has its volume {disk.volume} attached; the workspace was not deleted. "
            "Take the disk off that VM first",
            vmid=having[0],
        )
    proof = ctx.cluster.prove_absent([disk.owner_vmid])[disk.owner_vmid]
    if not proof.absent:
        raise WorkspaceRefused(
            f"{disk.title}: VMID {disk.owner_vmid}, which owns its volume, is not proven to be free ({proof.why}); "
            "the workspace was not deleted"
        )
    if disk.state != store.DELETING:
        # Raise Kept now if the storage cannot show the volume: the state DELETING has no way back.
        is_missing(ctx, disk, find_node(ctx, disk))
    if ctx.dry_run:
        return WorkspaceResult("would_delete", disk, True)
    if disk.state != store.DELETING:
        disk = open_records(ctx).change(
            disk, "delete", to=store.DELETING, outcome="decided", reason="delete", evidence={"volume": disk.volume}
        )
    return WorkspaceResult("deleted", _delete(ctx, disk), True)


def _delete(ctx: Context, disk: Workspace) -> Workspace:
    """Delete the volume, prove that the storage has it no more, and return the closed record."""
    node = find_node(ctx, disk)
    upids: tuple[str, ...] = ()
    present = not is_missing(ctx, disk, node)
    # The volume's name contains the workspace's id, so the listed volume is ours.
    if present:
        answer = ctx.client.delete(f"nodes/{node}/storage/{disk.storage}/content/{disk.volume}")
        if isinstance(answer, str) and answer.startswith("UPID:"):
            upids = (answer,)
            ctx.tasks.wait(answer, f"delete {disk.volume}", ctx.wait_timeout)
        if not is_missing(ctx, disk, node):
            raise OutcomeUnknown(
                f"{disk.title}: its volume {disk.volume} is still there after it was deleted; run again"
            )
    return open_records(ctx).change(
        disk,
        "delete",
        to=store.DELETED,
        reason="deleted" if present else "volume_missing",
        upids=upids,
        evidence={"volume": disk.volume},
    )


# ---- showing ----


def show(
    ctx: Context,
    *,
    name: str | None = None,
    states: list[str] | None = None,
    include_deleted: bool = False,
    events: int = 0,
    verify: bool = False,
) -> dict[str, Any]:
    """Return {workspaces, count} from the records; with ``verify``, add the state of each volume in Proxmox.

    ``name`` is a name or an id. ``events``: how many of the newest events to add to each workspace.
    """
    disks = [
        disk
        for disk in open_records(ctx).find_all(
            include_deleted=include_deleted or bool(states and store.DELETED in states)
        )
        if name in (None, disk.name, disk.id) and (not states or disk.state in states)
    ]

    def describe_disk(disk: Workspace) -> dict[str, Any]:
        shown = disk.public()
        if events > 0:
            shown["events"] = open_records(ctx).read_events(disk.id, events)
        if verify and disk.live:
            shown.update(_read_actual_state(ctx, disk))
        return shown

    return {"workspaces": [describe_disk(disk) for disk in disks], "count": len(disks)}


def _read_actual_state(ctx: Context, disk: Workspace) -> dict[str, Any]:
    """Return {volume_present, attached_to, unknown} from Proxmox.

    A value that cannot be read is None, and ``unknown`` lists the reasons.
    """
    answer: dict[str, Any] = {"volume_present": None, "attached_to": None, "unknown": []}
    for name, look in (
        ("volume_present", lambda: not is_missing(ctx, disk, find_node(ctx, disk))),
        ("attached_to", lambda: find_attached_vms(ctx, disk)),
    ):
        try:
            answer[name] = look()
        except (Kept, WorkspaceRefused, ProxmoxError) as error:
            answer["unknown"].append(error.message)
    return answer


# ---- after killed runs ----


def finish(ctx: Context, disk: Workspace) -> Workspace:
    """Finish or undo the operation of a killed run on a workspace, and return the record.

    Raises Busy while a run works on its sandbox, and Kept if a detachment would take the disk from a running VM.
    """
    if disk.state == store.CREATING:
        if not is_missing(ctx, disk, find_node(ctx, disk)):
            return _allocate(ctx, disk)
        return open_records(ctx).change(
            disk, "create", to=store.DELETED, outcome="failed", reason="creation_interrupted"
        )
    if disk.state == store.DELETING:
        return ensure_absent(ctx, disk.id, force=True).workspace or disk
    if disk.sandbox_uuid is None:
        return disk
    sandbox = ctx.records.get(disk.sandbox_uuid)
    with ctx.claim_sandbox(sandbox, "reconcile", wait=0) as (claim, current):
        disk = open_records(ctx).get(disk.id)
        if disk.sandbox_uuid != current.uuid or disk.state not in (*store.UNFINISHED, store.ATTACHED):
            return disk
        if not current.live:
            return free_workspace(ctx, claim, current) or disk
        unfinished = claim.interrupted
        if current.smbios_uuid is None and unfinished is None and current.state not in sandbox_states.CREATING:
            # The creation was given up before its VM was bound. Only a bound VM gets the disk of a workspace, so no VM
            # has the volume.
            return free_workspace(ctx, claim, current) or disk
        if current.smbios_uuid is None or (unfinished is not None and unfinished.kind in ("create", "destroy")):
            # The next run of the unfinished creation or destroy settles its workspace.
            return disk
        located = require_match(ctx, current)
        if disk.state == store.ATTACHING and find_keys(read_drives(ctx, str(located.node), current.vmid), disk.volume):
            return attach(ctx, claim, current, located, disk)
        if disk.state == store.DETACHING and power.read_status(ctx, located).get("status") != "stopped":
            # A destroy may have been given up, and its sandbox be in use again. Never take a disk from a running VM.
            raise Kept(
                "workspace",
                f"{disk.title}: a run that detached it from sandbox {current.vmid} was cut off, and the sandbox runs; "
                "detach the workspace again, or stop the sandbox",
                vmid=current.vmid,
            )
        return detach_volume(ctx, claim, current, located, disk) if disk.state != store.ATTACHED else disk
