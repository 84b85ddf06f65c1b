# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workspaces: disks that outlive sandboxes. Created under an owner VMID that no VM ever has, attached to one sandbox at a time.

Proxmox deletes with a VM what the VMID in a volume's name owns, and stops nobody from attaching a volume twice. So a workspace's volume is owned by
a VMID of a range of its own, the database decides who has it, the VMs' configurations are read to see that nobody else has, and a VM is deleted
only when its configuration, read directly before, names no workspace. Volumes are never moved (that would give them to the VM).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ..errors import AgentlabError, ApiError, InvalidInput, Kept, NotFound, OutcomeUnknown, ProxmoxError
from ..model import Sandbox
from ..store import workspaces as store
from ..store.records import Claim
from ..store.workspaces import Workspace
from . import power
from .context import Context
from .verify import Located, refuse_locked, require_match

STATES = store.STATES
_DRIVE = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+")
_OWNER = re.compile(r"(?:^|[:/])(?:vm|base)-(\d+)-[^/]*$")
_SIZE = re.compile(r"(\d{1,6})([MGT])", re.ASCII)
_UNITS = {"M": 1024**2, "G": 1024**3, "T": 1024**4}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
# Storages that keep disks as files, with the suffix (and format) of a new one; all others have volumes without.
_FILES = {"dir": ".qcow2", "nfs": ".qcow2", "cifs": ".qcow2", "glusterfs": ".qcow2", "btrfs": ".raw"}
# The last ones first, so that a template's own disks are in nobody's way.
_SLOTS = tuple(f"scsi{number}" for number in range(30, 0, -1))
# States in which a sandbox's VM may get or lose a disk.
_USABLE = ("BOOTING", "READY", "RUNNING", "STOPPED")
_UNPLUG_SECONDS = 10
# Times a VM is looked for where the list says that it is.
_LOOKS = 3


class WorkspaceRefused(AgentlabError):
    """What is asked of a workspace cannot be done now: somebody else has it, or it is not where it would have to be."""

    code = "workspace"


@dataclass(slots=True)
class Done:
    """What became of a workspace; ``changed`` follows from what was done."""

    outcome: str
    workspace: Workspace | None
    changed: bool = False
    message: str | None = None


# ---- options ----


def parse_size(value: object) -> int:
    """Bytes of ``20G``; refused by name."""
    found = _SIZE.fullmatch(str(value).strip())
    if not found or not int(found[1]):
        raise InvalidInput(f"size: {str(value)[:40]!r} is not valid. Valid: a number with M, G or T, such as 20G", option="size", value=str(value)[:40])
    return int(found[1]) * _UNITS[found[2]]


def show_size(size: int) -> str:
    """As Proxmox writes it: the largest unit that divides it."""
    for unit in ("T", "G", "M"):
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return f"{size // 1024}K"


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"name: {name[:80]!r} is not valid. Valid: letters, digits, dot, hyphen and underscore, 63 characters at most", option="name")


def records(ctx: Context) -> store.Workspaces:
    """Their records. Not a part of the context: a module that knows no workspaces need not ship what keeps them."""
    return store.Workspaces(ctx.records)


def select(ctx: Context, which: str) -> Workspace:
    """The live workspace of a name or id."""
    found = records(ctx).find(which)
    if found is None:
        there = ", ".join(one.name for one in records(ctx).find_all()) or "none"
        raise NotFound(f"workspace not found ({which[:80]!r}). Workspaces: {there}", workspace=which[:80])
    return found


# ---- looking ----


def volumes_in(config: dict[str, Any]) -> dict[str, str]:
    """Volume ids of a VM's configuration by the key that names them, unused ones included."""
    return {key: str(value).partition(",")[0] for key, value in config.items() if _DRIVE.fullmatch(key)}


def _rows(ctx: Context, node: str, vmid: int) -> dict[str, dict[str, Any]]:
    """What the VM's configuration says of its drives, by key: {"value": as it is now, "pending": as it will be}."""
    return {str(row.get("key")): row for row in ctx.client.get_list(f"nodes/{node}/qemu/{vmid}/pending") if _DRIVE.fullmatch(str(row.get("key")))}


def _naming(rows: dict[str, dict[str, Any]], volume: str) -> list[str]:
    """The keys that name the volume now or will name it: only what is in neither is off."""
    return [key for key, row in rows.items() if volume in (str(row.get(name) or "").partition(",")[0] for name in ("value", "pending"))]


def _in_use(rows: dict[str, dict[str, Any]], volume: str) -> str | None:
    """The slot in which the VM has the volume now: not noted for its next start only, and not put aside as unused."""
    return next((key for key, row in rows.items() if not key.startswith("unused") and str(row.get("value") or "").partition(",")[0] == volume), None)


def exists(ctx: Context, found: Workspace, node: str) -> dict[str, Any] | None:
    """The storage's own entry of the volume, or None when its list does not have it."""
    rows = ctx.client.get_list(f"nodes/{node}/storage/{found.storage}/content", vmid=found.owner_vmid)
    return next((row for row in rows if row.get("volid") == found.volume), None)


def missing(ctx: Context, found: Workspace, node: str) -> bool:
    """Whether the volume is proven not to be there. Kept when the storage's list leaves it out for another reason, which it does with the status of a
    success."""
    if exists(ctx, found, node) is not None:
        return False
    _require_sight(ctx, found, node)
    # Once more: what was set right meanwhile shows it now.
    return exists(ctx, found, node) is None


def _require_sight(ctx: Context, found: Workspace, node: str) -> None:
    """Kept unless the volume would be listed if it were there: as PVE::Storage decides that (volume_list, check_volume_access)."""
    unseen = f"{found.title}: storage {found.storage!r} does not list its volume {found.volume}, but it would not if it were there"
    row = next((row for row in ctx.client.get_list(f"nodes/{node}/storage") if row.get("storage") == found.storage), None)
    if row is None or "images" not in str(row.get("content") or "").split(",") or str(row.get("active", 1)) != "1":
        raise Kept("unknown", f"{unseen}: on node {node} the storage is missing, not active, or has no content type 'images'. Mend that (pvesm status; pvesm "
                   "set), then run again")
    storage, owner = f"/storage/{found.storage}", f"/vms/{found.owner_vmid}"
    if not ctx.cluster.holds(storage, "Datastore.Allocate") and not (ctx.cluster.holds(storage, "Datastore.Audit")
                                                                     and ctx.cluster.holds(owner, "VM.Config.Disk")):
        raise Kept("unknown", f"{unseen}: these credentials may not see it. Grant Datastore.Audit on {storage} and VM.Config.Disk on {owner} (or on /vms), "
                   "then run again")


def _node_for(ctx: Context, found: Workspace) -> str:
    """A node that sees the storage: its own, or any that is online."""
    if found.node is not None:
        return found.node
    online = sorted(node for node, up in ctx.cluster.nodes().items() if up)
    for node in online:
        if any(row.get("storage") == found.storage for row in ctx.client.get_list(f"nodes/{node}/storage")):
            return node
    raise WorkspaceRefused(f"{found.title}: no node that is online has its storage {found.storage!r}")


def holders(ctx: Context, found: Workspace) -> list[int]:
    """VMIDs of all VMs whose configuration names the volume. Kept when one that might cannot be read."""
    rows = [(vmid, row) for vmid, row in ctx.cluster.vms(fresh=True).items()
            if row.get("type") == "qemu" and (found.node is None or row.get("node") == found.node)]

    def look(item: tuple[int, dict[str, Any]]) -> int | None:
        vmid, row = item
        for _attempt in range(_LOOKS):
            try:
                listed = _rows(ctx, str(row.get("node")), vmid)
            except ProxmoxError as error:
                if not isinstance(error, ApiError) or "does not exist" not in error.text:
                    raise Kept("unknown", f"{found.title}: whether VM {vmid} has it attached cannot be read: {error.message}") from None
                # That proves only that it is not on that node: gone, or moved to another.
                again = ctx.cluster.vms(fresh=True).get(vmid)
                if again is None or (found.node is not None and again.get("node") != found.node):
                    return None
                row = again
                continue
            return vmid if _naming(listed, found.volume) else None
        raise Kept("unknown", f"{found.title}: whether VM {vmid} has it attached cannot be read: it is not on the node that lists it (is it being "
                   "migrated?); run again")

    return sorted(vmid for vmid in ctx.each(look, rows) if vmid is not None)


def in_snapshots(ctx: Context, located: Located, found: Workspace) -> list[str]:
    """Names of the VM's snapshots that contain the volume: rolling back to one would roll the workspace back."""
    return [name for name, config in _snapshots(ctx, located).items() if found.volume in volumes_in(config).values()]


def _snapshots(ctx: Context, located: Located) -> dict[str, dict[str, Any]]:
    # Always asked for: the configuration names the snapshot that it stands on, and may stand on none although there are some.
    names = [str(row.get("name")) for row in ctx.client.get_list(f"{located.path}/snapshot") if row.get("name") != "current"]
    return {name: ctx.client.get_dict(f"{located.path}/snapshot/{name}/config") for name in names}


# ---- creating and growing ----


def present(ctx: Context, name: str, *, size: object = None, storage: str | None = None, node: str | None = None) -> Done:
    """Make sure that the workspace exists; one that is there may only grow."""
    check_name(name)
    wanted = None if size is None else parse_size(size)
    found = records(ctx).find(name)
    if found is None:
        return _create(ctx, name, wanted, storage, node)
    if storage is not None and storage != found.storage:
        raise InvalidInput(f"storage: {found.title} is on {found.storage!r} and is never moved", option="storage", value=storage)
    if node is not None and found.node is not None and node != found.node:
        raise InvalidInput(f"node: {found.title} is on {found.node!r} (local storage) and is never moved", option="node", value=node)
    if found.state == store.CREATING:
        return Done("would_create", found, True) if ctx.dry_run else Done("created", _allocate(ctx, found), True)
    if wanted is None or wanted == found.size:
        return Done("unchanged", found)
    if wanted < found.size:
        raise InvalidInput(f"size: {found.title} has {show_size(found.size)}, and workspaces only grow", option="size", value=str(size))
    return _grow(ctx, found, wanted)


def _create(ctx: Context, name: str, size: int | None, storage: str | None, node: str | None) -> Done:
    if size is None:
        raise InvalidInput(f"size: missing; a new workspace ({name!r}) needs one, such as 20G", option="size")
    storage = storage or ctx.config.storage
    if storage is None:
        raise InvalidInput("storage: missing; give the storage for the workspace (or set it in the configuration)", option="storage")
    nodes = ctx.cluster.nodes()
    node = node or ctx.config.node or next(iter(sorted(name for name, up in nodes.items() if up)), None)
    if node not in nodes or not nodes[node]:
        raise InvalidInput(f"node: {node!r} is not a node of this cluster that is online. Nodes: {', '.join(sorted(nodes))}", option="node", value=node)
    row = next((row for row in ctx.client.get_list(f"nodes/{node}/storage") if row.get("storage") == storage), None)
    if row is None:
        raise InvalidInput(f"storage: {storage!r} is not a storage of node {node} that these credentials may see", option="storage", value=storage)
    if "images" not in str(row.get("content") or "").split(","):
        raise InvalidInput(f"storage: {storage!r} holds no disk images", option="storage", value=storage)
    if str(row.get("active", 1)) != "1":
        raise InvalidInput(f"storage: {storage!r} is not active on node {node}", option="storage", value=storage)
    shared = str(row.get("shared", 0)) == "1"
    suffix = _FILES.get(str(row.get("type")), "")
    ctx.cluster.confirm(creating=True)
    found = records(ctx).reserve(name, size=size, storage=storage, node=None if shared else node, owners=ctx.config.workspace_owner_range,
                                 occupied=set(ctx.cluster.vms()), suffix=suffix, folder=bool(suffix))
    if ctx.dry_run:
        return Done("would_create", found, True)
    return Done("created", _allocate(ctx, found, node, first=True), True)


def _allocate(ctx: Context, found: Workspace, node: str | None = None, *, first: bool = False) -> Workspace:
    """Make the volume. Its name carries the workspace's id, so asking again after a kill can make no second one.

    ``first``: no other run has asked for it, so a refusal means that there is none, and the record ends.
    """
    node = node or _node_for(ctx, found)
    row = exists(ctx, found, node)
    if row is None:
        try:
            _require_free_owner(ctx, found, node)
            if not first:
                # From now on this request is the one in doubt: doubt_window counts from here, and nobody gives the record up beside it.
                found = records(ctx).change(found, "create", outcome="decided", reason="allocating")
            # This request knows no T.
            answer = ctx.client.post(f"nodes/{node}/storage/{found.storage}/content", vmid=found.owner_vmid, size=f"{found.size // _UNITS['M']}M",
                                     filename=found.volume.rpartition("/")[2].rpartition(":")[2])
        except ApiError as error:
            if "already exists" not in error.text:
                if first:
                    _give_up(ctx, found, error)
                raise
            answer = found.volume
        except WorkspaceRefused as error:
            if not first:
                # An earlier request may still be carried out.
                raise WorkspaceRefused(f"{error.message}; agentlab_reconcile gives this one up once its volume can come no more (doubt_window), and a run "
                                       "after that takes another VMID") from None
            _give_up(ctx, found, error)
            raise WorkspaceRefused(f"{error.message}; run again for another VMID") from None
        if answer != found.volume:
            raise OutcomeUnknown(f"{found.title}: Proxmox answered {str(answer)[:80]!r} where {found.volume!r} was expected; run again")
        row = exists(ctx, found, node)
        if row is None:
            raise OutcomeUnknown(f"{found.title}: {found.volume} was allocated, but the storage does not list it (Datastore.Audit on the storage and "
                                 "VM.Config.Disk on /vms are needed); run again")
    return records(ctx).change(found, "create", to=store.DETACHED, reason="created", evidence={"volume": found.volume, "node": node},
                               size=int(row.get("size") or found.size))


def _require_free_owner(ctx: Context, found: Workspace, node: str) -> None:
    """No VM has the owner's VMID, and no volume is owned by it: whatever the list of VMs may have hidden."""
    proof = ctx.cluster.prove_absent([found.owner_vmid])[found.owner_vmid]
    if not proof.absent:
        raise WorkspaceRefused(f"{found.title}: VMID {found.owner_vmid} of workspace_owner_range is not proven to be free ({proof.why}); VMs must never "
                               "get a VMID of that range")
    # Its own may have come into being just now: by another run, or by a request whose answer was lost.
    others = [row for row in ctx.client.get_list(f"nodes/{node}/storage/{found.storage}/content", vmid=found.owner_vmid) if row.get("volid") != found.volume]
    if others:
        raise WorkspaceRefused(f"{found.title}: storage {found.storage!r} has a volume of VMID {found.owner_vmid} already "
                               f"({others[0].get('volid')}); look at whose it is")


def _give_up(ctx: Context, found: Workspace, error: AgentlabError) -> None:
    records(ctx).change(found, "create", to=store.DELETED, outcome="failed", reason="creation_failed", evidence={"message": error.message})


def _grow(ctx: Context, found: Workspace, wanted: int) -> Done:
    if found.state != store.ATTACHED or found.sandbox_uuid is None:
        raise WorkspaceRefused(f"size: {found.title} is {found.state}; Proxmox VE resizes disks of VMs only, so attach it to a sandbox, then let it grow")
    if ctx.dry_run:
        return Done("would_grow", found, True)
    with ctx.claimed(ctx.records.get(found.sandbox_uuid), "grow_workspace") as (claim, sandbox):
        located = require_match(ctx, sandbox)
        refuse_locked(sandbox, located)
        slot = _slot_of(ctx, sandbox, located, found)
        found = records(ctx).change(found, "grow", claim=claim, outcome="decided", reason="grow", evidence={"from": found.size, "to": wanted})
        # An absolute size: asking twice is asking once.
        answer = ctx.client.put(f"{located.path}/resize", disk=slot, size=show_size(wanted), digest=located.verdict.digest if located.verdict else None)
        if isinstance(answer, str) and answer.startswith("UPID:"):
            ctx.tasks.wait(answer, f"grow {found.title}", ctx.wait_timeout)
        row = exists(ctx, found, str(located.node))
        size = int((row or {}).get("size") or wanted)
        done = records(ctx).change(found, "grow", claim=claim, reason="grown", size=size, evidence={"size": size})
    return Done("grown", done, True)


def _slot_of(ctx: Context, sandbox: Sandbox, located: Located, found: Workspace) -> str:
    """The slot of a workspace that the records call ATTACHED; refused when the VM does not have it."""
    slot = _in_use(_rows(ctx, str(located.node), sandbox.vmid), found.volume)
    if slot is None:
        raise WorkspaceRefused(f"{found.title}: sandbox {sandbox.vmid} does not have it attached any more (was it taken off by hand?); detach it, then attach "
                               "it again", vmid=sandbox.vmid)
    return slot


# ---- attaching ----


def hold(ctx: Context, claim: Claim, sandbox: Sandbox, found: Workspace, ttl: int | None = None) -> Workspace:
    """Take the workspace for the sandbox, in the records: from here on nobody else gets it. The caller holds the sandbox's claim."""
    if found.sandbox_uuid == sandbox.uuid and found.state in (store.ATTACHING, store.ATTACHED):
        return found
    if found.state != store.DETACHED:
        raise _held(ctx, found)
    other = records(ctx).of_sandbox(sandbox.uuid)
    if other is not None:
        raise WorkspaceRefused(f"sandbox {sandbox.vmid} has {other.title} already; a sandbox has one workspace at most")
    until = sandbox.lease_expires_at if ttl is None else ctx.clock.now() + ttl
    return records(ctx).change(found, "attach", to=store.ATTACHING, claim=claim, outcome="decided", reason="attach", sandbox_uuid=sandbox.uuid,
                               lease_expires_at=until, evidence={"vmid": sandbox.vmid})


def _held(ctx: Context, found: Workspace) -> WorkspaceRefused:
    from .. import clock as clock_module

    if found.sandbox_uuid is not None:
        until = clock_module.iso(found.lease_expires_at)
        return WorkspaceRefused(f"{found.title} is {found.state} to sandbox {found.vmid} ({found.sandbox}), whose lease on it lasts until {until}; detach it "
                                "first. A workspace is attached to one sandbox at a time", vmid=found.vmid, lease_expires_at=until)
    return WorkspaceRefused(f"{found.title} is {found.state}; run its task again to finish that first")


def of_creation(ctx: Context, claim: Claim, sandbox: Sandbox, which: str | None) -> Workspace | None:
    """The workspace of a sandbox that is being created, held from here on; also the one that an earlier, killed run took for it."""
    found = records(ctx).of_sandbox(sandbox.uuid)
    if found is None and which is not None:
        found = hold(ctx, claim, sandbox, select(ctx, which))
    return found


def check_usable(ctx: Context, found: Workspace, node: str) -> None:
    """Before anything is made: whether a new sandbox on that node could have it."""
    if found.state != store.DETACHED:
        raise _held(ctx, found)
    _check_node(found, node)


def _check_node(found: Workspace, node: str | None) -> None:
    if found.node is not None and node != found.node:
        raise WorkspaceRefused(f"{found.title} is on node {found.node} (storage {found.storage!r} is local), and the sandbox is on {node}; create the sandbox "
                               f"with node={found.node}")


def attach(ctx: Context, claim: Claim, sandbox: Sandbox, located: Located, found: Workspace) -> Workspace:
    """Put the volume into the VM, for a workspace that ``hold`` took; proven by reading the configuration back."""
    if found.state == store.ATTACHED:
        return found
    _check_node(found, located.node)
    node = str(located.node)
    if exists(ctx, found, node) is None:
        raise WorkspaceRefused(f"{found.title}: its volume {found.volume} is not to be seen on node {node}; it was removed, moved or renamed (move_disk?), or "
                               "Datastore.Audit is missing")
    others = [vmid for vmid in holders(ctx, found) if vmid != sandbox.vmid]
    if others:
        raise WorkspaceRefused(f"{found.title}: VM {others[0]} has its volume {found.volume} attached, though by no record of ours; it was not attached a "
                               "second time. Take it off there first", vmid=others[0])
    listed = _rows(ctx, node, sandbox.vmid)
    slot = next(iter(_naming(listed, found.volume)), None)
    if slot is None:
        config = (located.verdict.config if located.verdict else None) or {}
        slot = next((key for key in _SLOTS if key not in listed and key not in config), None)
        if slot is None:
            raise WorkspaceRefused(f"sandbox {sandbox.vmid} has no free slot for a disk")
        found = records(ctx).change(found, "attach", claim=claim, outcome="decided", reason="attaching", slot=slot)
        # Neither backups nor replication of a throw-away VM are to take it along.
        drive = f"{found.volume},backup=0,replicate=0,serial={found.serial},size={show_size(found.size)}"
        ctx.client.put(f"{located.path}/config", digest=located.verdict.digest if located.verdict else None, **{slot: drive})
        listed = _rows(ctx, node, sandbox.vmid)
    used = _in_use(listed, found.volume)
    if used is None:
        if slot.startswith("unused"):
            raise WorkspaceRefused(f"{found.title}: VM {sandbox.vmid} has it put aside as {slot}; take it off there (qm set {sandbox.vmid} --delete {slot}; "
                                   "Proxmox VE removes only what the VM's own VMID owns), then attach it", vmid=sandbox.vmid)
        # Noted for the next start only, by this run or one before: a disk that is half there is none. Whose VM it is now is looked at before that
        # is written, too.
        located = require_match(ctx, sandbox)
        ctx.client.put(f"{located.path}/config", revert=slot, digest=located.verdict.digest if located.verdict else None)
        raise WorkspaceRefused(f"{found.title}: the running VM {sandbox.vmid} did not take the disk (is hotplug for disks on?); stop the sandbox, then "
                               "attach it")
    slot = used
    done = records(ctx).change(found, "attach", to=store.ATTACHED, claim=claim, reason="attached", slot=slot,
                               evidence={"vmid": sandbox.vmid, "slot": slot, "node": node})
    ctx.records.note(sandbox, "attach_workspace", outcome="done", reason=found.name, evidence={"workspace_id": found.id, "slot": slot})
    return done


def attached(ctx: Context, which: str, sandbox: Sandbox, ttl: int | None = None) -> Done:
    """Make sure that the sandbox has it. One whose lease is over and whose holder's VM does not run is taken over."""
    found = select(ctx, which)
    if found.state == store.ATTACHED and found.sandbox_uuid == sandbox.uuid:
        _slot_of(ctx, sandbox, require_match(ctx, sandbox), found)
        return _renew(ctx, found, ttl)
    if sandbox.state not in _USABLE:
        raise WorkspaceRefused(f"cannot attach {found.title} to sandbox {sandbox.vmid} in {sandbox.state} state. Valid states: {', '.join(_USABLE)}")
    if found.sandbox_uuid is not None and found.sandbox_uuid != sandbox.uuid:
        _check_over(ctx, found)
        if not ctx.dry_run:
            found = detached(ctx, found.id, only_stopped=True).workspace or found
    if ctx.dry_run:
        _check_node(found, sandbox.node)
        return Done("would_attach", found, True)
    with ctx.claimed(sandbox, "attach_workspace") as (claim, current):
        if current.state not in _USABLE:
            raise WorkspaceRefused(f"cannot attach {found.title} to sandbox {current.vmid} in {current.state} state. Valid states: {', '.join(_USABLE)}")
        located = require_match(ctx, current)
        refuse_locked(current, located)
        _check_node(found, located.node)
        held = hold(ctx, claim, current, found, ttl)
        try:
            done = attach(ctx, claim, current, located, held)
        except (WorkspaceRefused, Kept) as error:
            # Nothing was asked for, or it was asked for and answered; anything else is left to the next run.
            if isinstance(error, WorkspaceRefused) or records(ctx).get(held.id).slot is None:
                try:
                    _let_go(ctx, claim, current, held, error)
                except Kept as still:
                    raise WorkspaceRefused(f"{error.message}. Until that is certain nobody else gets it: {still.message}", vmid=current.vmid) from None
            raise
    return Done("attached", done, True)


def _let_go(ctx: Context, claim: Claim, sandbox: Sandbox, held: Workspace, error: AgentlabError) -> None:
    """An attachment that was refused before or undone after it was asked for: the workspace is free again, if that is so."""
    found = records(ctx).get(held.id)
    if found.state == store.ATTACHING and found.slot is None:
        records(ctx).change(found, "attach", to=store.DETACHED, claim=claim, outcome="failed", reason="refused", sandbox_uuid=None, lease_expires_at=None,
                            evidence={"message": error.message})
        return
    # Held with a slot: an earlier run had asked for it, and Proxmox may still carry that out.
    off(ctx, claim, sandbox, require_match(ctx, sandbox), found, sure=held.slot is None)


def _renew(ctx: Context, found: Workspace, ttl: int | None) -> Done:
    until = None if ttl is None else ctx.clock.now() + ttl
    if until is None or until - (found.lease_expires_at or 0) < 60:
        return Done("unchanged", found)
    if ctx.dry_run:
        return Done("would_renew", found, True)
    return Done("renewed", records(ctx).change(found, "renew_lease", reason="renewed", lease_expires_at=until), True)


def _check_over(ctx: Context, found: Workspace) -> None:
    if found.lease_expires_at is None or found.lease_expires_at > ctx.clock.now():
        raise _held(ctx, found)


# ---- detaching ----


def detached(ctx: Context, which: str, *, only_stopped: bool = False) -> Done:
    """Make sure that nobody has it. What is written in the guest but not yet on the disk is the guest's to care for: unmount it there first."""
    found = select(ctx, which)
    if found.state == store.DETACHED:
        return Done("unchanged", found)
    if found.sandbox_uuid is None:
        raise _held(ctx, found)
    sandbox = ctx.records.get(found.sandbox_uuid)
    if ctx.dry_run:
        if sandbox.live and sandbox.smbios_uuid is not None:
            refuse_snapshots(ctx, sandbox, require_match(ctx, sandbox), found)
        return Done("would_detach", found, True)
    with ctx.claimed(sandbox, "detach_workspace") as (claim, current):
        found = records(ctx).get(found.id)
        if found.sandbox_uuid != current.uuid:
            return Done("unchanged", found)
        if not current.live:
            return Done("detached", released(ctx, claim, current) or found, True)
        if current.smbios_uuid is None:
            raise WorkspaceRefused(f"{found.title}: the creation of sandbox {current.vmid} is not finished; finish or destroy it first")
        located = require_match(ctx, current)
        refuse_locked(current, located)
        if only_stopped and power.status(ctx, located).get("status") != "stopped":
            raise WorkspaceRefused(f"{found.title}: the lease of sandbox {current.vmid} on it is over, but its VM still runs; stop it first")
        return Done("detached", off(ctx, claim, current, located, found), True)


def refuse_snapshots(ctx: Context, sandbox: Sandbox, located: Located, found: Workspace) -> None:
    """Kept when a snapshot of the VM contains the workspace."""
    names = in_snapshots(ctx, located, found)
    if names:
        raise Kept("workspace_in_snapshot", f"{found.title}: snapshot {names[0]!r} of VM {sandbox.vmid} contains it (rolling back would roll it back too); "
                   f"delete the snapshot first (qm delsnapshot {sandbox.vmid} {names[0]})", vmid=sandbox.vmid)


def off(ctx: Context, claim: Claim, sandbox: Sandbox, located: Located, found: Workspace, *, sure: bool = False) -> Workspace:
    """Take the volume off a VM that was judged to be ours, proven by reading the configuration back, and that the volume is still what it was.

    ``sure``: no attachment of a killed run can come after this (the caller writes the configuration next, guarded by its digest).
    """
    refuse_snapshots(ctx, sandbox, located, found)
    node = str(located.node)
    listed = _naming(_rows(ctx, node, sandbox.vmid), found.volume)
    age = ctx.clock.now() - found.updated_at
    if not listed and not sure and found.state == store.ATTACHING and 0 <= age < ctx.config.doubt_window:
        raise Kept("unknown", f"{found.title}: its attachment to sandbox {sandbox.vmid} was begun {age} s ago and may still be carried out; run again in "
                   f"{ctx.config.doubt_window - age} s (doubt_window)")
    if found.state != store.DETACHING:
        found = records(ctx).change(found, "detach", to=store.DETACHING, claim=claim, outcome="decided", reason="detach",
                                    evidence={"vmid": sandbox.vmid, "slots": listed})
    if listed:
        if found.owner_vmid == sandbox.vmid:
            raise Kept("workspace", f"{found.title}: its volume {found.volume} is owned by the VMID of sandbox {sandbox.vmid} itself, so Proxmox VE may delete "
                       "it when it is taken off; it was left where it is. Move its data to another workspace", vmid=sandbox.vmid)
        ctx.client.put(f"{located.path}/config", digest=located.verdict.digest if located.verdict else None, delete=",".join(listed))
        _await_off(ctx, node, sandbox, found)
    _refuse_lost(ctx, sandbox, found, node)
    done = records(ctx).change(found, "detach", to=store.DETACHED, claim=claim, reason="detached", sandbox_uuid=None, slot=None, lease_expires_at=None,
                               evidence={"vmid": sandbox.vmid, "slots": listed})
    ctx.records.note(sandbox, "detach_workspace", outcome="done", reason=found.name, evidence={"workspace_id": found.id, "slots": listed})
    return done


def _refuse_lost(ctx: Context, sandbox: Sandbox, found: Workspace, node: str) -> None:
    """Kept when the volume of a workspace that the sandbox has is not there any more, or not to be seen."""
    if missing(ctx, found, node):
        vmid = sandbox.vmid
        raise Kept("workspace", f"{found.title}: the storage does not have its volume {found.volume} any more: it may have been given to a VM (move_disk), so "
                   f"VM {vmid} is left alone. Look at its disks; if none is the workspace, remove the VM by hand (qm destroy {vmid}), then destroy the sandbox",
                   vmid=vmid)


def _await_off(ctx: Context, node: str, sandbox: Sandbox, found: Workspace) -> None:
    """A running guest may take a moment to let a disk go."""
    deadline = ctx.clock.monotonic() + min(_UNPLUG_SECONDS, ctx.wait_timeout)
    while _naming(_rows(ctx, node, sandbox.vmid), found.volume):
        if ctx.clock.monotonic() > deadline:
            raise Kept("workspace", f"{found.title}: VM {sandbox.vmid} still has it after it was taken off; the running guest does not let it go. Stop the "
                       "sandbox, then detach it", vmid=sandbox.vmid)
        ctx.clock.sleep(0.5)


# ---- before a VM is deleted, and after ----


def refuse_listed(ctx: Context, sandbox: Sandbox, located: Located) -> bool:
    """Kept when the deletion of the VM, as its configuration is now, could take a workspace along (or might, because one is missing).

    Returns whether Proxmox was asked anything.
    """
    live = records(ctx).find_all()
    config = (located.verdict.config if located.verdict else None) or {}
    configs = {"": config, **_snapshots(ctx, located)} if live else {"": config}
    first, last = ctx.config.workspace_owner_range
    known = {one.volume: one for one in live}
    serials = {one.serial: one for one in live}
    for where, content in configs.items():
        place = f"snapshot {where!r}" if where else "its configuration"
        for key, volume in volumes_in(content).items():
            owner = _OWNER.search(volume)
            serial = re.search(r"(?:^|,)serial=([^,]+)", str(content[key]))
            found = known.get(volume) or (serials.get(serial[1]) if serial else None)
            if found is not None or (owner and first <= int(owner[1]) <= last):
                what = found.title if found else "a workspace"
                # No record of ours says that this VM has it, so none of our commands would take it off.
                advice = f"delete the snapshot: qm delsnapshot {sandbox.vmid} {where}" if where else f"qm set {sandbox.vmid} --delete {key}"
                raise Kept("workspace", f"sandbox {sandbox.vmid}: {place} names {volume} as {key}, which is (or was) {what}; the VM was not deleted. Take the "
                           f"disk off it first ({advice})", volume=volume, vmid=sandbox.vmid)
    _refuse_if_missing(ctx, sandbox, config, [one for one in live if one.sandbox_uuid is not None])
    return bool(live)


def refuse_planned(ctx: Context, sandbox: Sandbox, located: Located) -> bool:
    """As the destroy would do it in the end: its own workspace would be taken off first. Asked before anything is stopped or taken off, too.

    False when the records alone said it: there are no workspaces.
    """
    own = records(ctx).of_sandbox(sandbox.uuid)
    if own is not None:
        refuse_snapshots(ctx, sandbox, located, own)
        _refuse_lost(ctx, sandbox, own, str(located.node))
    config = dict((located.verdict.config if located.verdict else None) or {})
    kept = {key: value for key, value in config.items() if own is None or str(value).partition(",")[0] != own.volume}
    verdict = dataclasses.replace(located.verdict, config=kept) if located.verdict else None
    return refuse_listed(ctx, sandbox, Located(located.node, located.row, verdict))


def _refuse_if_missing(ctx: Context, sandbox: Sandbox, config: dict[str, Any], held: list[Workspace]) -> None:
    """A volume that a VM was given (move_disk) bears that VM's name: if a workspace is missing, a VM with a further disk of its own is left alone."""
    own = [volume for key, volume in volumes_in(config).items() if (owner := _OWNER.search(volume)) and int(owner[1]) == sandbox.vmid
           and re.fullmatch(r"(ide|sata|scsi|virtio|unused)\d+", key) and "cloudinit" not in volume and "media=cdrom" not in str(config[key])]
    if len(own) < 2:
        return
    for found in held:
        if missing(ctx, found, _node_for(ctx, found)):
            raise Kept("workspace", f"sandbox {sandbox.vmid}: its VM has {len(own)} disks of its own, and the volume of {found.title} "
                       f"({found.volume}) is missing from its storage; one of those disks may be it (move_disk), so the VM was not deleted", vmid=sandbox.vmid)


def released(ctx: Context, claim: Claim | None, sandbox: Sandbox) -> Workspace | None:
    """The VM is proven to be gone: what it had is free. The next attachment looks whether anybody else has the volume."""
    found = records(ctx).of_sandbox(sandbox.uuid)
    if found is None:
        return None
    return records(ctx).change(found, "detach", to=store.DETACHED, claim=claim, reason="vm_gone", sandbox_uuid=None, slot=None, lease_expires_at=None,
                               evidence={"vmid": sandbox.vmid})


# ---- deleting ----


def absent(ctx: Context, which: str, *, force: bool) -> Done:
    """Delete a workspace and what is on it: only a detached one that nobody has attached, and only with force."""
    found = records(ctx).find(which)
    if found is None:
        return Done("not_found", None)
    if found.state not in (store.DETACHED, store.CREATING, store.DELETING):
        raise _held(ctx, found)
    if found.state == store.DETACHED and not force:
        raise WorkspaceRefused(f"{found.title} holds {show_size(found.size)} of data on {found.volume}, which would be lost; use force=true to delete it")
    age = ctx.clock.now() - found.updated_at
    if found.state == store.CREATING and 0 <= age < ctx.config.doubt_window:
        raise Kept("unknown", f"{found.title}: its creation was begun {age} s ago and may still be carried out; run again in {ctx.config.doubt_window - age} s "
                   "(doubt_window)")
    having = holders(ctx, found)
    if having:
        raise WorkspaceRefused(f"{found.title}: VM {having[0]} has its volume {found.volume} attached; it was not deleted", vmid=having[0])
    proof = ctx.cluster.prove_absent([found.owner_vmid])[found.owner_vmid]
    if not proof.absent:
        raise WorkspaceRefused(f"{found.title}: VMID {found.owner_vmid}, which owns its volume, is not proven to be free ({proof.why}); it was not deleted")
    # Before it is called DELETING, which it would have to stay: can it be told whether the volume is there?
    missing(ctx, found, _node_for(ctx, found))
    if ctx.dry_run:
        return Done("would_delete", found, True)
    if found.state != store.DELETING:
        found = records(ctx).change(found, "delete", to=store.DELETING, outcome="decided", reason="delete", evidence={"volume": found.volume})
    return Done("deleted", _delete(ctx, found), True)


def _delete(ctx: Context, found: Workspace) -> Workspace:
    node = _node_for(ctx, found)
    upids: tuple[str, ...] = ()
    there = not missing(ctx, found, node)
    # The name carries the workspace's id: what is listed under it is the volume that we made.
    if there:
        answer = ctx.client.delete(f"nodes/{node}/storage/{found.storage}/content/{found.volume}")
        if isinstance(answer, str) and answer.startswith("UPID:"):
            upids = (answer,)
            ctx.tasks.wait(answer, f"delete {found.volume}", ctx.wait_timeout)
        if not missing(ctx, found, node):
            raise OutcomeUnknown(f"{found.title}: its volume {found.volume} is still there after it was deleted; run again")
    return records(ctx).change(found, "delete", to=store.DELETED, reason="deleted" if there else "volume_missing", upids=upids,
                               evidence={"volume": found.volume})


# ---- showing ----


def show(ctx: Context, *, name: str | None = None, states: list[str] | None = None, include_deleted: bool = False, events: int = 0,
         verify: bool = False) -> dict[str, Any]:
    """{workspaces, count}: the records, and with ``verify`` what Proxmox says of each."""
    found = [one for one in records(ctx).find_all(include_deleted=include_deleted or bool(states and store.DELETED in states))
             if name in (None, one.name, one.id) and (not states or one.state in states)]

    def one_of(one: Workspace) -> dict[str, Any]:
        shown = one.public()
        if events > 0:
            shown["events"] = records(ctx).events(one.id, events)
        if verify and one.live:
            shown.update(_look(ctx, one))
        return shown

    return {"workspaces": [one_of(one) for one in found], "count": len(found)}


def _look(ctx: Context, found: Workspace) -> dict[str, Any]:
    """{volume_present, attached_to, unknown}: None for what cannot be told, and why."""
    told: dict[str, Any] = {"volume_present": None, "attached_to": None, "unknown": []}
    for name, look in (("volume_present", lambda: not missing(ctx, found, _node_for(ctx, found))), ("attached_to", lambda: holders(ctx, found))):
        try:
            told[name] = look()
        except (Kept, WorkspaceRefused, ProxmoxError) as error:
            told["unknown"].append(error.message)
    return told


# ---- what killed runs left ----


def unfinished(ctx: Context) -> list[Workspace]:
    """Workspaces on which something was begun that nobody is at work on, and those whose sandbox is gone."""
    now = ctx.clock.now()
    found = []
    for one in records(ctx).find_all():
        gone = one.sandbox_uuid is not None and not ctx.records.get(one.sandbox_uuid).live
        if gone or (one.state in store.UNFINISHED and not 0 <= now - one.updated_at < ctx.config.doubt_window):
            found.append(one)
    return found


def finish(ctx: Context, found: Workspace) -> Workspace:
    """Finish (or undo) what a killed run began on a workspace."""
    if found.state == store.CREATING:
        if not missing(ctx, found, _node_for(ctx, found)):
            return _allocate(ctx, found)
        return records(ctx).change(found, "create", to=store.DELETED, outcome="failed", reason="creation_interrupted")
    if found.state == store.DELETING:
        return absent(ctx, found.id, force=True).workspace or found
    if found.sandbox_uuid is None:
        return found
    sandbox = ctx.records.get(found.sandbox_uuid)
    with ctx.claimed(sandbox, "reconcile", wait=0) as (claim, current):
        found = records(ctx).get(found.id)
        if found.sandbox_uuid != current.uuid or found.state not in (*store.UNFINISHED, store.ATTACHED):
            return found
        if not current.live:
            return released(ctx, claim, current) or found
        left = claim.interrupted
        if current.smbios_uuid is None or (left is not None and left.kind in ("create", "destroy")):
            # The creation, or the destroy, brings it to an end with its own.
            return found
        located = require_match(ctx, current)
        if found.state == store.ATTACHING and _naming(_rows(ctx, str(located.node), current.vmid), found.volume):
            return attach(ctx, claim, current, located, found)
        return off(ctx, claim, current, located, found) if found.state != store.ATTACHED else found
