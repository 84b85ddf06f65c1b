# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judge a refusal by Proxmox VE: the next step of the creation, and the option of ours that causes the refusal.

Proxmox VE's message names its own objects, not our options, or names nothing.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from ..context import Context
from ..errors import AccessDenied, AgentlabError, ApiError, CreationFailed, ProxmoxError, TaskFailed, Unreachable
from ..proxmox import answers
from .spec import Spec

# Refusals that would come from every node, because they concern the request or the whole cluster.
_EVERYWHERE = re.compile(
    r"no quorum|pool '[^']*' does not exist|shrinking disks|Linked clone feature|Parameter verification failed"
)

# Attempts at a clone whose template is locked, one second apart.
_CLONE_TRIES = 3
# In a task "exists" may also mean a volume, and then the task has already begun to make the VM. These texts mean a VM.
_VM_EXISTS = re.compile(r"config file|\.conf\b|\b(VM|CT) \d+ already exists")


class Step(enum.Enum):
    """The next step of a creation whose clone was refused, or whose clone task failed."""

    # Find out whether the VMID is free, then judge again.
    PROVE_ABSENCE = "prove absence"
    # Look whether the VM is the clone of an earlier run whose answer was lost, then judge again.
    LOOK_AGAIN = "look again"
    # Send the same request again after a second: the template is locked for a moment (another clone, a backup).
    WAIT = "wait"
    # Send the request for another VMID.
    TAKE_ANOTHER_VMID = "take another VMID"
    # The caller gave the VMID, and another VM has it.
    REFUSE_VMID = "refuse the VMID"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Attempt:
    """The known facts about one attempt at a clone when Proxmox VE refuses it."""

    # Attempts so far, this one included.
    tries: int
    # The caller gave the VMID, so no other may be taken.
    vmid_given: bool
    # An earlier run lost the answer to its clone request, and nobody has looked since the VMID was refused.
    doubtful: bool
    # Proxmox VE accepted the request: the journal has its task.
    has_task: bool
    # Whether the VMID is proven to be free; None while nobody has asked.
    vmid_is_free: bool | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """The next step. ``nothing_made``: no clone of ours can appear at this VMID later, so the request is forgotten."""

    step: Step
    nothing_made: bool = False


def judge_refusal(error: ApiError | TaskFailed, attempt: Attempt) -> Judgement:
    """Return what follows from a refused clone request or a failed clone task. Sends no request, changes nothing."""
    text = error.text if isinstance(error, ApiError) else error.exitstatus
    # A VM, or a leftover volume of that name, is in the way. Another VMID avoids both.
    exists = "already exists" in text or "File exists" in text
    # Another VM has the VMID, so nothing of ours is there.
    vmid_taken = exists and (isinstance(error, ApiError) or _VM_EXISTS.search(text) is not None)
    refused_at_once = isinstance(error, ApiError) and not attempt.has_task
    locked = isinstance(error, TaskFailed) and answers.is_not_begun(text)
    if locked and attempt.tries < _CLONE_TRIES and attempt.vmid_is_free is not False:
        return Judgement(Step.WAIT, nothing_made=True) if attempt.vmid_is_free else Judgement(Step.PROVE_ABSENCE)
    if vmid_taken and attempt.doubtful:
        return Judgement(Step.LOOK_AGAIN)
    if vmid_taken:
        return Judgement(Step.REFUSE_VMID if attempt.vmid_given else Step.TAKE_ANOTHER_VMID, nothing_made=True)
    if not exists or attempt.vmid_given or attempt.vmid_is_free is False:
        return Judgement(Step.GIVE_UP, nothing_made=refused_at_once)
    if attempt.vmid_is_free is None:
        return Judgement(Step.PROVE_ABSENCE)
    return Judgement(Step.TAKE_ANOTHER_VMID, nothing_made=True)


def make_occupied_error(vmid: int, by: str) -> CreationFailed:
    """Return the error for a given VMID that another VM has. ``by`` names that VM."""
    return CreationFailed(
        f"vmid: {vmid} is occupied by a VM that is not ours ({by}); it was not touched. Choose another vmid, or leave "
        "vmid out",
        vmid=vmid,
        option="vmid",
    )


def blames_node(error: AgentlabError) -> bool:
    """Return whether another node may succeed where a request or task failed with this error."""
    if isinstance(error, AccessDenied) or (isinstance(error, ApiError) and error.status == 400):
        return False
    if isinstance(error, ApiError):
        return _EVERYWHERE.search(error.text) is None
    if isinstance(error, TaskFailed):
        return _EVERYWHERE.search(error.exitstatus) is None
    return isinstance(error, Unreachable)


def explain(ctx: Context, spec: Spec, node: str | None, template: object, error: AgentlabError) -> str | None:
    """Return one sentence with option, remedy and Proxmox VE's own words for an error of a creation.

    None when there is nothing to add to the error's own message.
    """
    if isinstance(error, ApiError):
        text, path = error.text, str(error.detail.get("path") or "")
    elif isinstance(error, TaskFailed):
        text, path = error.exitstatus, ""
    else:
        return None
    if answers.is_storage_full(error.message):
        # The storage's own error stands only in the task log, which is part of this message.
        return f"{error.message}, or give another storage{'' if spec.full_clone else ' with full_clone=true'}"
    status = f"{error.status} " if isinstance(error, ApiError) else ""
    quote = f" (Proxmox VE: {status}{text.strip()[:300]})"
    pool = spec.pool or ctx.config.pool
    if re.search(r"pool '[^']*' does not exist", text):
        return f"pool: {pool!r} does not exist. Make it (pveum pool add {pool}), or correct pool{quote}"
    if (
        isinstance(error, AccessDenied)
        and path.endswith("/clone")
        and not re.search(r"\b(VM|SDN|Sys|Datastore|Pool)\.\w+", text)
    ):
        # Proxmox VE gives the same bare 403 for a missing pool and for a missing right to create a VM.
        return _explain_denied_clone(ctx, pool) + quote
    if "Linked clone feature is not supported" in text:
        return (
            f"full_clone: a linked clone of template {template} is not possible on its storage; set "
            f"full_clone=true{quote}"
        )
    if "VM uses local storage" in text:
        return (
            f"node: template {template} lies on local storage of another node than {node}, and cannot be cloned to "
            "there. Leave node out, put the "
            f"template on shared storage, or make one on {node}{quote}"
        )
    if "can't clone to non-shared storage" in text:
        return (
            f"storage: {spec.storage or ctx.config.storage!r} is local, and template {template} is on another node "
            f"than {node}. Give a shared storage, "
            f"or leave node out{quote}"
        )
    storage = re.search(
        r"storage '([^']*)' (does not exist|does not support vm images|is not available on node)",
        str(error.detail.get("errors") or text),
    )
    if storage:
        return f"storage: {storage[1]!r} {storage[2]}. Give a storage of node {node} that holds disks of VMs{quote}"
    if "shrinking disks is not supported" in text:
        return (
            f"disk_size: {spec.disk_size} is less than the template's disk has, and disks only grow. Give more{quote}"
        )
    if "no quorum" in text:
        return f"the cluster has no quorum, and takes no new VMs until it has (pvecm status); run again then{quote}"
    if re.search(r"MAX \d+ vcpus allowed", text):
        return f"cores: node {node} has fewer CPUs than the VM would get. Give fewer cores, or another node{quote}"
    bridge = re.search(r"bridge '([^']*)' does not exist", text)
    if bridge:
        option = "second_bridge" if bridge[1] == spec.second_bridge and bridge[1] != spec.bridge else "bridge"
        return f"{option}: node {node} has no bridge {bridge[1]!r}. Give one that it has, or another node{quote}"
    return None


def _explain_denied_clone(ctx: Context, pool: str | None) -> str:
    """Return the sentence for a 403 that names no privilege."""
    if pool is None:
        return (
            f"{ctx.config.proxmox.login} may not make that VM. Grant VM.Allocate on /vms (or give a pool on which it "
            "is granted), and VM.Clone on the "
            "template"
        )
    try:
        pool_exists = any(row.get("poolid") == pool for row in ctx.client.get_list("pools"))
    except ProxmoxError:
        pool_exists = False
    if pool_exists:
        return f"pool: {ctx.config.proxmox.login} may not make VMs in pool {pool!r}. Grant VM.Allocate on /pool/{pool}"
    return (
        f"pool: {pool!r} does not exist, or {ctx.config.proxmox.login} may not see it. Make it (pveum pool add "
        f"{pool}), correct pool, or grant "
        f"VM.Allocate and Pool.Audit on /pool/{pool}"
    )
