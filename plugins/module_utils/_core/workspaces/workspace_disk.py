# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Attach the volumes of workspaces to VMs, and detach them. A workspace is a disk that outlives sandboxes.

Proxmox deletes a VM together with the volumes whose names contain its VMID, and lets several VMs attach one volume.
Five rules protect the data:

- A volume is created under an owner VMID from a range of its own, which no VM ever gets.
- The database decides which sandbox has a workspace: one sandbox at a time.
- Before an attachment, the configurations of all VMs are read: no other VM may have the volume.
- A VM is deleted only if its configuration, read directly before, names no workspace.
- A volume is never moved, because move_disk makes the VM its owner.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NoReturn

from .. import waiting
from ..context import Context
from ..errors import AgentlabError, ApiError, Kept, NotFound, ProxmoxError
from ..model import Sandbox
from ..store import workspaces as store
from ..store.records import Claim
from ..store.workspaces import Workspace
from ..vm.locate import Located, require_match, write_with_digest

UNITS = {"M": 1024**2, "G": 1024**3, "T": 1024**4}
_DRIVE = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+")
_OWNER = re.compile(r"(?:^|[:/])(?:vm|base)-(\d+)-[^/]*$")
# The highest slots first, because templates use the low ones for their own disks.
_SLOTS = tuple(f"scsi{number}" for number in range(30, 0, -1))
# Seconds to wait for a running guest that releases a disk late.
_UNPLUG_SECONDS = 10
# Proxmox's errors for a guest that does not release a disk. Proxmox sends them after some 18 seconds.
_UNPLUG_REFUSED = re.compile(r"hotplug problem|error on hot-unplugging|still busy in guest")
# Attempts to read a VM that migrates while the VM list is read.
_LOOKS = 3


class WorkspaceRefused(AgentlabError):
    """The workspace cannot be used like that now: another sandbox has it, or it is on another node."""

    code = "workspace"


def show_size(size: int) -> str:
    """Return a size in bytes as Proxmox writes it: in the largest unit that divides it."""
    for unit in ("T", "G", "M"):
        if size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return f"{size // 1024}K"


def open_records(ctx: Context) -> store.Workspaces:
    """Return the records of workspaces.

    Context has no attribute for them, so that an Ansible module without workspaces does not ship this code.
    """
    return store.Workspaces(ctx.records)


def list_unfinished(ctx: Context) -> list[Workspace]:
    """Return the workspaces with an unfinished operation that no run works on, and those of destroyed sandboxes."""
    now = ctx.clock.now()

    def is_left(workspace: Workspace) -> bool:
        if workspace.sandbox_uuid is not None and not ctx.records.get(workspace.sandbox_uuid).live:
            return True
        return workspace.state in store.UNFINISHED and not 0 <= now - workspace.updated_at < ctx.config.doubt_window

    return [workspace for workspace in open_records(ctx).find_all() if is_left(workspace)]


def select(ctx: Context, which: str) -> Workspace:
    """Return the live workspace with the name or id ``which``. Raises NotFound, which lists all names."""
    disk = open_records(ctx).find(which)
    if disk is None:
        names = ", ".join(known.name for known in open_records(ctx).find_all()) or "none"
        raise NotFound(f"workspace not found ({which[:80]!r}). Workspaces: {names}", workspace=which[:80])
    return disk


# ---- reading the present state ----


def list_volumes(config: dict[str, Any]) -> dict[str, str]:
    """Return {key: volume id} for the drives in a VM's configuration, including unused volumes."""
    return {key: str(value).partition(",")[0] for key, value in config.items() if _DRIVE.fullmatch(key)}


def read_drives(ctx: Context, node: str, vmid: int) -> dict[str, dict[str, Any]]:
    """Return the VM's drives by key as {"value": present value, "pending": value after the next start}."""
    return {
        str(row.get("key")): row
        for row in ctx.client.get_list(f"nodes/{node}/qemu/{vmid}/pending")
        if _DRIVE.fullmatch(str(row.get("key")))
    }


def find_keys(rows: dict[str, dict[str, Any]], volume: str) -> list[str]:
    """Return the keys that name the volume now or after the next start. [] means that the volume is detached."""
    return [
        key
        for key, row in rows.items()
        if volume in (str(row.get(name) or "").partition(",")[0] for name in ("value", "pending"))
    ]


def _find_slot_in_use(rows: dict[str, dict[str, Any]], volume: str) -> str | None:
    """Return the slot in which the VM uses the volume now, or None. Pending and unused entries do not count."""
    return next(
        (
            key
            for key, row in rows.items()
            if not key.startswith("unused") and str(row.get("value") or "").partition(",")[0] == volume
        ),
        None,
    )


def find_volume(ctx: Context, disk: Workspace, node: str) -> dict[str, Any] | None:
    """Return the storage's row for the volume, or None if the storage does not list it."""
    rows = ctx.client.get_list(f"nodes/{node}/storage/{disk.storage}/content", vmid=disk.owner_vmid)
    return next((row for row in rows if row.get("volid") == disk.volume), None)


def is_missing(ctx: Context, disk: Workspace, node: str) -> bool:
    """Return whether the volume is proven to be missing.

    Raises Kept if the storage may omit the volume for another reason. Proxmox reports an incomplete list as a success.
    """
    if find_volume(ctx, disk, node) is not None:
        return False
    _require_sight(ctx, disk, node)
    # List again: a problem that hid the volume may have been solved just before _require_sight looked.
    return find_volume(ctx, disk, node) is None


def _require_sight(ctx: Context, disk: Workspace, node: str) -> None:
    """Raise Kept unless the storage would list the volume if it existed.

    PVE::Storage (volume_list, check_volume_access) sets the conditions.
    """
    unseen = (
        f"{disk.title}: storage {disk.storage!r} does not list its volume {disk.volume}, which does not prove that the "
        "volume is gone"
    )
    row = next(
        (row for row in ctx.client.get_list(f"nodes/{node}/storage") if row.get("storage") == disk.storage), None
    )
    if row is None or "images" not in str(row.get("content") or "").split(",") or str(row.get("active", 1)) != "1":
        raise Kept(
            "unknown",
            f"{unseen}: on node {node} the storage is missing, not active, or has no content type 'images'. Mend that "
            "(pvesm status; pvesm set), then run again",
        )
    storage, owner = f"/storage/{disk.storage}", f"/vms/{disk.owner_vmid}"
    if not ctx.cluster.has_privilege(storage, "Datastore.Allocate") and not (
        ctx.cluster.has_privilege(storage, "Datastore.Audit") and ctx.cluster.has_privilege(owner, "VM.Config.Disk")
    ):
        raise Kept(
            "unknown",
            f"{unseen}: these credentials may not see it. Grant Datastore.Allocate, Datastore.AllocateSpace and "
            f"Datastore.Audit together on {storage} (a role there replaces what is inherited), then run again",
        )


def find_node(ctx: Context, disk: Workspace) -> str:
    """Return a node that has the storage: the workspace's own node, or an online node. Raises WorkspaceRefused."""
    if disk.node is not None:
        return disk.node
    online = sorted(node for node, up in ctx.cluster.list_nodes().items() if up)
    for node in online:
        if any(row.get("storage") == disk.storage for row in ctx.client.get_list(f"nodes/{node}/storage")):
            return node
    raise WorkspaceRefused(f"{disk.title}: no online node has its storage {disk.storage!r}; bring such a node back")


def find_attached_vms(ctx: Context, disk: Workspace) -> list[int]:
    """Return the VMIDs of all VMs whose configuration names the volume.

    Raises Kept if a VM cannot be read, or if a VM may be hidden from these credentials.
    """
    rows = [
        (vmid, row)
        for vmid, row in ctx.cluster.list_vms(fresh=True).items()
        if row.get("type") == "qemu" and (disk.node is None or row.get("node") == disk.node)
    ]

    def look(item: tuple[int, dict[str, Any]]) -> int | None:
        vmid, row = item
        for _attempt in range(_LOOKS):
            try:
                listed = read_drives(ctx, str(row.get("node")), vmid)
            except ProxmoxError as error:
                if not isinstance(error, ApiError) or "does not exist" not in error.text:
                    raise Kept(
                        "unknown",
                        f"{disk.title}: whether VM {vmid} has its volume attached cannot be read: {error.message}",
                    ) from None
                # "does not exist" proves only that the VM is not on that node. The VM may be gone, or migrated.
                again = ctx.cluster.list_vms(fresh=True).get(vmid)
                if again is None or (disk.node is not None and again.get("node") != disk.node):
                    return None
                row = again
                continue
            return vmid if find_keys(listed, disk.volume) else None
        raise Kept(
            "unknown",
            f"{disk.title}: whether VM {vmid} has its volume attached cannot be read: the VM is not on the node that "
            "the cluster's list names (it may be migrating); run again",
        )

    having = sorted(vmid for vmid in ctx.run_each(look, rows) if vmid is not None)
    if not having:
        require_full_sight(ctx, disk)
    return having


def require_full_sight(ctx: Context, disk: Workspace) -> None:
    """Raise Kept unless these credentials see every VM, because Proxmox VE silently attaches one volume to two VMs.

    A role without VM.Audit on /vms, on /vms/N or on a pool hides VMs, because it replaces the roles of the paths above.
    """
    if not ctx.cluster.sees_everything():
        raise Kept(
            "unknown",
            f"{disk.title}: these credentials are not proven to see every VM of the cluster, so another VM may have "
            "its volume attached. Grant VM.Audit on /vms (a role there replaces what / hands down, so it must hold "
            "VM.Audit too) and Sys.Audit on /; agentlab_doctor names what is missing. Then run again",
        )


def find_in_snapshots(ctx: Context, located: Located, disk: Workspace) -> list[str]:
    """Return the names of the VM's snapshots that contain the volume.

    A rollback to such a snapshot would roll back the workspace as well.
    """
    return [
        name for name, config in _read_snapshots(ctx, located).items() if disk.volume in list_volumes(config).values()
    ]


def _read_snapshots(ctx: Context, located: Located) -> dict[str, dict[str, Any]]:
    """Return the configuration of each snapshot of the VM, by the snapshot's name."""
    # Always read the list of snapshots. The VM's configuration names only the parent snapshot, and may name none
    # although snapshots exist.
    names = [
        str(row.get("name")) for row in ctx.client.get_list(f"{located.path}/snapshot") if row.get("name") != "current"
    ]
    return {name: ctx.client.get_dict(f"{located.path}/snapshot/{name}/config") for name in names}


def find_slot(ctx: Context, sandbox: Sandbox, located: Located, disk: Workspace) -> str:
    """Return the slot of an ATTACHED workspace. Raises WorkspaceRefused when the VM does not have it."""
    slot = _find_slot_in_use(read_drives(ctx, str(located.node), sandbox.vmid), disk.volume)
    if slot is None:
        raise WorkspaceRefused(
            f"{disk.title}: VM {sandbox.vmid} does not have its volume attached any more (somebody may have removed "
            "the disk); detach the workspace, then attach it again",
            vmid=sandbox.vmid,
        )
    return slot


# ---- attaching ----


def assign(ctx: Context, claim: Claim, sandbox: Sandbox, disk: Workspace, ttl: int | None = None) -> Workspace:
    """Assign the workspace to the sandbox in the records, and return its record. From now on no other sandbox gets it.

    ``claim`` is the claim on the sandbox. ``ttl``: the lease on the workspace in seconds; None: the sandbox's lease.
    Raises WorkspaceRefused if the workspace is not free, or if the sandbox has another workspace.
    """
    if disk.sandbox_uuid == sandbox.uuid and disk.state in (store.ATTACHING, store.ATTACHED):
        return disk
    if disk.state != store.DETACHED:
        raise make_held_error(ctx, disk)
    other = open_records(ctx).find_of_sandbox(sandbox.uuid)
    if other is not None:
        raise WorkspaceRefused(
            f"sandbox {sandbox.vmid} has {other.title} already; a sandbox has one workspace at most. Detach that "
            "one first"
        )
    until = sandbox.lease_expires_at if ttl is None else ctx.clock.now() + ttl
    return open_records(ctx).change(
        disk,
        "attach",
        to=store.ATTACHING,
        claim=claim,
        outcome="decided",
        reason="attach",
        sandbox_uuid=sandbox.uuid,
        lease_expires_at=until,
        evidence={"vmid": sandbox.vmid},
    )


def make_held_error(ctx: Context, disk: Workspace) -> WorkspaceRefused:
    """Return the error for a workspace that another sandbox or a running operation has."""
    from .. import clock as clock_module

    if disk.sandbox_uuid is not None:
        until = clock_module.format_utc(disk.lease_expires_at)
        if disk.state in (store.ATTACHING, store.DETACHING):
            doing = "attached to" if disk.state == store.ATTACHING else "taken off"
            return WorkspaceRefused(
                f"{disk.title} is just being {doing} sandbox {disk.vmid} ({disk.sandbox}). Wait for that to end. "
                "If that run was cut off, repeat it, or run agentlab_reconcile, which finishes it",
                vmid=disk.vmid,
                lease_expires_at=until,
            )
        return WorkspaceRefused(
            f"{disk.title} is {disk.state} to sandbox {disk.vmid} ({disk.sandbox}), whose lease on it lasts until "
            f"{until}; detach it first. A workspace is attached to one sandbox at a time",
            vmid=disk.vmid,
            lease_expires_at=until,
        )
    return WorkspaceRefused(f"{disk.title} is {disk.state}; repeat the task that began this, to finish it first")


def assign_to_creation(ctx: Context, claim: Claim, sandbox: Sandbox, which: str | None) -> Workspace | None:
    """Assign the workspace ``which`` to a sandbox that is being created, and return it; None without a workspace.

    If an earlier, killed run has assigned a workspace, that workspace is returned.
    """
    disk = open_records(ctx).find_of_sandbox(sandbox.uuid)
    if disk is None and which is not None:
        disk = assign(ctx, claim, sandbox, select(ctx, which))
    return disk


def check_usable(ctx: Context, disk: Workspace, node: str) -> None:
    """Raise WorkspaceRefused or Kept if a new sandbox on ``node`` could not have the workspace.

    Called before anything is created.
    """
    if disk.state != store.DETACHED:
        raise make_held_error(ctx, disk)
    check_node(disk, node)
    require_full_sight(ctx, disk)


def check_node(disk: Workspace, node: str | None) -> None:
    """Raise WorkspaceRefused if the workspace is on the local storage of another node."""
    if disk.node is not None and node != disk.node:
        raise WorkspaceRefused(
            f"{disk.title} is on node {disk.node} (storage {disk.storage!r} is local), and the sandbox is on "
            f"{node}; create the sandbox with node={disk.node}"
        )


def attach(ctx: Context, claim: Claim, sandbox: Sandbox, located: Located, disk: Workspace) -> Workspace:
    """Attach the volume of an assigned workspace to the VM, and return the record.

    Reading the configuration back proves the attachment. Raises WorkspaceRefused if the volume is missing, if another
    VM has it, or if the VM did not take the disk; Kept if the VM changed meanwhile.
    """
    if disk.state == store.ATTACHED:
        return disk
    check_node(disk, located.node)
    node = str(located.node)
    if find_volume(ctx, disk, node) is None:
        raise WorkspaceRefused(
            f"{disk.title}: its volume {disk.volume} is not to be seen on node {node}; it was removed, moved or "
            "renamed (move_disk?), or Datastore.Allocate (with Datastore.AllocateSpace and Datastore.Audit) is "
            f"missing on /storage/{disk.storage}"
        )
    other_vmids = [vmid for vmid in find_attached_vms(ctx, disk) if vmid != sandbox.vmid]
    if other_vmids:
        raise WorkspaceRefused(
            f"{disk.title}: VM {other_vmids[0]} has its volume {disk.volume} attached, without a record of ours; the "
            "volume was not attached a second time. Take the disk off that VM first",
            vmid=other_vmids[0],
        )
    listed = read_drives(ctx, node, sandbox.vmid)
    slot = next(iter(find_keys(listed, disk.volume)), None)
    if slot is None:
        free = next((key for key in _SLOTS if key not in listed and key not in located.config), None)
        if free is None:
            raise WorkspaceRefused(
                f"sandbox {sandbox.vmid} has no free slot for a disk (scsi1 to scsi30); remove a disk from its VM first"
            )
        disk = open_records(ctx).change(disk, "attach", claim=claim, outcome="decided", reason="attaching", slot=free)
        # Backups and replication of a throw-away VM must not include the workspace.
        drive = f"{disk.volume},backup=0,replicate=0,serial={disk.serial},size={show_size(disk.size)}"

        def put_in(now: Located) -> None:
            if free in now.config:
                raise Kept(
                    "changed",
                    f"{disk.title}: another disk was put into sandbox {sandbox.vmid} as {free} meanwhile; run again",
                    vmid=sandbox.vmid,
                )
            ctx.client.put(f"{now.path}/config", digest=now.digest, **{free: drive})

        write_with_digest(ctx, sandbox, located, put_in)
        slot = free
        listed = read_drives(ctx, node, sandbox.vmid)
    used = _find_slot_in_use(listed, disk.volume)
    if used is None:
        if slot.startswith("unused"):
            raise WorkspaceRefused(
                f"{disk.title}: VM {sandbox.vmid} has its volume as the unused disk {slot}; remove that entry (qm set "
                f"{sandbox.vmid} --delete {slot}; Proxmox VE deletes only volumes that the VM's own VMID owns), then "
                "attach the workspace",
                vmid=sandbox.vmid,
            )
        # This run or an earlier one has left the disk pending for the next start. Revert that, so that no disk is half
        # attached. Time has passed, so judge the VM again before this write.
        located = require_match(ctx, sandbox)
        write_with_digest(
            ctx, sandbox, located, lambda now: ctx.client.put(f"{now.path}/config", revert=slot, digest=now.digest)
        )
        raise WorkspaceRefused(
            f"{disk.title}: the running VM {sandbox.vmid} did not take the disk (hotplug for disks may be off); stop "
            "the sandbox, then attach the workspace"
        )
    slot = used
    attached = open_records(ctx).change(
        disk,
        "attach",
        to=store.ATTACHED,
        claim=claim,
        reason="attached",
        slot=slot,
        evidence={"vmid": sandbox.vmid, "slot": slot, "node": node},
    )
    ctx.records.note(
        sandbox,
        "attach_workspace",
        outcome="done",
        reason=disk.name,
        evidence={"workspace_id": disk.id, "slot": slot},
    )
    return attached


# ---- detaching ----


def refuse_snapshots(ctx: Context, sandbox: Sandbox, located: Located, disk: Workspace) -> None:
    """Raise Kept when a snapshot of the VM contains the workspace."""
    names = find_in_snapshots(ctx, located, disk)
    if names:
        raise Kept(
            "workspace_in_snapshot",
            f"{disk.title}: snapshot {names[0]!r} of VM {sandbox.vmid} contains the workspace (a rollback would roll "
            f"it back, too); delete the snapshot first (qm delsnapshot {sandbox.vmid} {names[0]})",
            vmid=sandbox.vmid,
        )


def detach_volume(
    ctx: Context, claim: Claim, sandbox: Sandbox, located: Located, disk: Workspace, *, sure: bool = False
) -> Workspace:
    """Detach the volume from a VM that was judged to be ours, and return the record.

    Reading the configuration back proves the detachment, and reading the storage proves that the volume still exists.
    ``sure``: no attachment by a killed run can come later, because the caller writes the configuration next, guarded by
    its digest. Raises Kept if a snapshot contains the workspace, or if the volume cannot be detached safely.
    """
    refuse_snapshots(ctx, sandbox, located, disk)
    node = str(located.node)
    listed = find_keys(read_drives(ctx, node, sandbox.vmid), disk.volume)
    age = ctx.clock.now() - disk.updated_at
    if not listed and not sure and disk.state == store.ATTACHING and 0 <= age < ctx.config.doubt_window:
        raise Kept(
            "unknown",
            f"{disk.title}: its attachment to sandbox {sandbox.vmid} was begun {age} s ago and may still be carried "
            f"out; run again in {ctx.config.doubt_window - age} s (doubt_window)",
        )
    if disk.state != store.DETACHING:
        disk = open_records(ctx).change(
            disk,
            "detach",
            to=store.DETACHING,
            claim=claim,
            outcome="decided",
            reason="detach",
            evidence={"vmid": sandbox.vmid, "slots": listed},
        )
    if listed:
        if disk.owner_vmid == sandbox.vmid:
            raise Kept(
                "workspace",
                f"{disk.title}: its volume {disk.volume} is owned by the VMID of sandbox {sandbox.vmid} itself, so "
                "Proxmox VE may delete the volume when it is detached; the volume was left attached. Move its data to "
                "another workspace",
                vmid=sandbox.vmid,
            )

        def take_off(now: Located) -> None:
            slots = listed
            if now is not located:
                refuse_snapshots(ctx, sandbox, now, disk)
                slots = find_keys(read_drives(ctx, str(now.node), sandbox.vmid), disk.volume)
            if slots:
                ctx.client.put(f"{now.path}/config", digest=now.digest, delete=",".join(slots))

        try:
            write_with_digest(ctx, sandbox, located, take_off)
        except ApiError as error:
            if not _UNPLUG_REFUSED.search(error.text):
                raise
            _undo_unplug(ctx, claim, sandbox, disk, listed)
        _await_release(ctx, node, sandbox, disk)
    _refuse_lost(ctx, sandbox, disk, node)
    detached = open_records(ctx).change(
        disk,
        "detach",
        to=store.DETACHED,
        claim=claim,
        reason="detached",
        sandbox_uuid=None,
        slot=None,
        lease_expires_at=None,
        evidence={"vmid": sandbox.vmid, "slots": listed},
    )
    ctx.records.note(
        sandbox,
        "detach_workspace",
        outcome="done",
        reason=disk.name,
        evidence={"workspace_id": disk.id, "slots": listed},
    )
    return detached


def _undo_unplug(ctx: Context, claim: Claim, sandbox: Sandbox, disk: Workspace, slots: list[str]) -> NoReturn:
    """Revert a detachment that the running guest refused, and raise Kept.

    Proxmox keeps the removal pending, and would carry it out at the next start. So remove the pending entry. The VM
    still has the workspace, so the workspace becomes ATTACHED again.
    """
    located = require_match(ctx, sandbox)
    write_with_digest(
        ctx,
        sandbox,
        located,
        lambda now: ctx.client.put(f"{now.path}/config", revert=",".join(slots), digest=now.digest),
    )
    rows = read_drives(ctx, str(located.node), sandbox.vmid)
    slot = _find_slot_in_use(rows, disk.volume)
    if slot is not None and not rows[slot].get("delete"):
        open_records(ctx).change(
            disk,
            "detach",
            to=store.ATTACHED,
            claim=claim,
            outcome="failed",
            reason="busy",
            slot=slot,
            evidence={"vmid": sandbox.vmid, "slot": slot},
        )
    raise Kept(
        "workspace",
        f"{disk.title}: VM {sandbox.vmid} still has the disk after a detachment; the running guest does not release "
        "it. Stop the sandbox, then detach the workspace",
        vmid=sandbox.vmid,
    )


def _refuse_lost(ctx: Context, sandbox: Sandbox, disk: Workspace, node: str) -> None:
    """Raise Kept if the volume of the sandbox's workspace is missing or hidden."""
    if is_missing(ctx, disk, node):
        vmid = sandbox.vmid
        raise Kept(
            "workspace",
            f"{disk.title}: the storage does not have its volume {disk.volume} any more: it may have been given to "
            f"a VM (move_disk), so VM {vmid} is left alone. Look at its disks; if none is the workspace, remove the "
            f"VM by hand (qm destroy {vmid}), then destroy the sandbox",
            vmid=vmid,
        )


def _await_release(ctx: Context, node: str, sandbox: Sandbox, disk: Workspace) -> None:
    """Wait up to _UNPLUG_SECONDS until a running guest has released the disk. Raises Kept if the guest keeps it."""

    def look() -> bool | None:
        return None if find_keys(read_drives(ctx, node, sandbox.vmid), disk.volume) else True

    patience = min(_UNPLUG_SECONDS, ctx.wait_timeout)
    if waiting.wait_for_result(ctx.clock, patience, look, pause=0.5, longest=0.5) is None:
        raise Kept(
            "workspace",
            f"{disk.title}: VM {sandbox.vmid} still has the disk after a detachment; the running guest does not "
            "release it. Stop the sandbox, then detach the workspace",
            vmid=sandbox.vmid,
        )


# ---- around the deletion of a VM ----


def refuse_listed(ctx: Context, sandbox: Sandbox, located: Located) -> bool:
    """Raise Kept if deleting the VM with its present configuration could delete the volume of a workspace.

    The volume of a missing workspace may be among the VM's own disks, which raises Kept as well. Returns whether a
    request was sent to Proxmox.
    """
    live = open_records(ctx).find_all()
    config = located.config
    configs = {"": config, **_read_snapshots(ctx, located)} if live else {"": config}
    first, last = ctx.config.workspace_owner_range
    known = {listed.volume: listed for listed in live}
    serials = {listed.serial: listed for listed in live}
    for where, content in configs.items():
        place = f"snapshot {where!r}" if where else "its configuration"
        for key, volume in list_volumes(content).items():
            owner = _OWNER.search(volume)
            serial = re.search(r"(?:^|,)serial=([^,]+)", str(content[key]))
            disk = known.get(volume) or (serials.get(serial[1]) if serial else None)
            if disk is not None or (owner and first <= int(owner[1]) <= last):
                title = disk.title if disk else "a workspace"
                # No record says that this VM has the workspace. So our commands would not detach it: name Proxmox's.
                advice = (
                    f"delete the snapshot: qm delsnapshot {sandbox.vmid} {where}"
                    if where
                    else f"qm set {sandbox.vmid} --delete {key}"
                )
                raise Kept(
                    "workspace",
                    f"sandbox {sandbox.vmid}: {place} names {volume} as {key}, which is (or was) {title}; the VM was "
                    f"not deleted. Take the disk off it first ({advice})",
                    volume=volume,
                    vmid=sandbox.vmid,
                )
    _refuse_if_missing(ctx, sandbox, config, [listed for listed in live if listed.sandbox_uuid is not None])
    return bool(live)


def refuse_planned(ctx: Context, sandbox: Sandbox, located: Located) -> bool:
    """Raise Kept if refuse_listed would raise it after the sandbox's own workspace has been detached.

    Called before the VM is stopped or a disk is detached. Returns False if the records alone decided (no workspaces).
    """
    own = open_records(ctx).find_of_sandbox(sandbox.uuid)
    if own is not None:
        refuse_snapshots(ctx, sandbox, located, own)
        _refuse_lost(ctx, sandbox, own, str(located.node))
    config = dict(located.config)
    remaining_config = {
        key: value for key, value in config.items() if own is None or str(value).partition(",")[0] != own.volume
    }
    verdict = dataclasses.replace(located.verdict, config=remaining_config) if located.verdict else None
    return refuse_listed(ctx, sandbox, Located(located.node, located.row, verdict))


def _refuse_if_missing(ctx: Context, sandbox: Sandbox, config: dict[str, Any], disks: list[Workspace]) -> None:
    """Raise Kept if a workspace is missing and the VM has more than one disk of its own.

    move_disk to a VM renames the volume after that VM, so one of those disks may be the workspace.
    """
    own = [
        volume
        for key, volume in list_volumes(config).items()
        if (owner := _OWNER.search(volume))
        and int(owner[1]) == sandbox.vmid
        and re.fullmatch(r"(ide|sata|scsi|virtio|unused)\d+", key)
        and "cloudinit" not in volume
        and "media=cdrom" not in str(config[key])
    ]
    if len(own) < 2:
        return
    for disk in disks:
        if is_missing(ctx, disk, find_node(ctx, disk)):
            raise Kept(
                "workspace",
                f"sandbox {sandbox.vmid}: its VM has {len(own)} disks of its own, and the volume of {disk.title} "
                f"({disk.volume}) is missing from its storage; one of those disks may be it (move_disk), so the VM "
                "was not deleted",
                vmid=sandbox.vmid,
            )


def free_workspace(ctx: Context, claim: Claim | None, sandbox: Sandbox) -> Workspace | None:
    """Free the workspace of a sandbox whose VM is proven to be gone. Returns its record; None without a workspace.

    The next attachment checks whether another VM has the volume.
    """
    disk = open_records(ctx).find_of_sandbox(sandbox.uuid)
    if disk is None:
        return None
    return open_records(ctx).change(
        disk,
        "detach",
        to=store.DETACHED,
        claim=claim,
        reason="vm_gone",
        sandbox_uuid=None,
        slot=None,
        lease_expires_at=None,
        evidence={"vmid": sandbox.vmid},
    )
