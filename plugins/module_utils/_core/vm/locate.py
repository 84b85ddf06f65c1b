# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find a sandbox's VM and judge whether it is ours. Every operation that touches a VM goes through here first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import states
from ..context import Context
from ..errors import ApiError, Kept, ProxmoxError, TaskFailed, Unreachable
from ..model import Sandbox
from ..proxmox import identity
from ..proxmox.answers import LOCK_PAUSE, is_config_changed, is_not_begun

# A task of a killed run, or a person, may change the configuration between verdict and write. After this number of
# attempts that each met a change, waiting longer is useless.
_WRITE_TRIES = 3
# Seconds for which a verdict counts as fresh (as long as some commits on a loaded disk), and seconds for which its
# request may have waited for a place.
_JUST_NOW = 2.0
_SHORT_WAIT = 0.25
# Proxmox VE's lock of a hibernated VM, and of a VM whose memory is being saved.
HIBERNATED = "suspended"
_HIBERNATING = "suspending"
# QEMU's run states in which the guest stands still and a resume ("cont", or a wake-up) lets it go on. Proxmox VE's
# status is "running" in each. prelaunch: started with -S. io-error: QEMU paused the guest because a storage is full or
# failed.
_PAUSED = ("paused", "suspended", "prelaunch", "io-error")


@dataclass(slots=True)
class Located:
    """The place of a VM, and the verdict about it.

    ``node`` is None when no VM is visible at the VMID. That alone does not prove its absence.
    """

    node: str | None
    row: dict[str, Any]
    verdict: identity.Verdict | None
    # When the configuration was read: number of requests sent by this thread until then, and monotonic seconds.
    read: tuple[int, float] | None = None

    @property
    def match(self) -> bool:
        return self.verdict is not None and self.verdict.identity == identity.MATCH

    @property
    def path(self) -> str:
        return f"nodes/{self.node}/qemu/{self.row.get('vmid')}"

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration that was judged; empty without a VM, and for a container."""
        return (self.verdict.config if self.verdict else None) or {}

    @property
    def digest(self) -> str | None:
        """Return the digest of the judged configuration. Proxmox refuses a write with it after any change."""
        return self.verdict.digest if self.verdict else None


def locate(ctx: Context, sandbox: Sandbox) -> Located:
    """Read the configuration of the VM or container at the sandbox's VMID, and judge it.

    Raises Kept when the configuration cannot be read.
    """
    for fresh in (False, True):
        row = ctx.cluster.find(sandbox.vmid, fresh=fresh)
        if row is None:
            if fresh or not _may_be_new(ctx, sandbox):
                return Located(None, {}, None)
            continue
        node = str(row.get("node"))
        kind = row.get("type")
        if kind not in ("qemu", "lxc"):
            raise Kept(
                "unknown",
                f"sandbox {sandbox.vmid}: the cluster's list calls it {kind!r}, which is neither VM nor container; "
                "nothing is concluded",
            )
        if kind == "lxc" and not fresh:
            # The list lags, and is only a hint where to look.
            continue
        try:
            config = ctx.client.get_dict(f"nodes/{node}/{kind}/{sandbox.vmid}/config")
        except Unreachable as error:
            if row.get("expected"):
                # The node comes from the record. The VM may have been moved; the fresh list shows its node.
                continue
            raise _make_silent_node_error(sandbox, node, error) from None
        except ApiError as error:
            # The answer proves only that the VM is not on that node. It may have moved since the list was read.
            if "does not exist" in error.text and not fresh:
                continue
            raise _make_unreadable_error(ctx, sandbox, node, error) from None
        except ProxmoxError as error:
            raise Kept("unknown", f"sandbox {sandbox.vmid}: its VM cannot be read: {error.message}") from None
        if not config.get("digest"):
            raise _make_no_config_error(sandbox, node)
        if kind == "lxc":
            # A container has that VMID now, and we make only VMs.
            return Located(
                node,
                row,
                identity.Verdict(identity.FOREIGN, {"type": kind, "name": config.get("hostname") or row.get("name")}),
            )
        return _judge_config(ctx, sandbox, node, row, config)
    return Located(None, {}, None)


def _judge_config(ctx: Context, sandbox: Sandbox, node: str, row: dict[str, Any], config: dict[str, Any]) -> Located:
    verdict = identity.judge(sandbox.uuid, sandbox.smbios_uuid, config)
    if verdict.identity == identity.MATCH:
        ctx.cluster.note_own_vm(sandbox.vmid)
    return Located(node, row, verdict, (ctx.client.requests_sent, ctx.clock.monotonic()))


def _make_silent_node_error(sandbox: Sandbox, node: str, error: Unreachable) -> Kept:
    return Kept(
        "node_offline",
        f"sandbox {sandbox.vmid}: node {node} does not answer; left as it is until the node is back ({error.message})",
    )


def _make_unreadable_error(ctx: Context, sandbox: Sandbox, node: str, error: ApiError) -> Kept:
    if not ctx.cluster.is_node_online(node):
        return Kept(
            "node_offline", f"sandbox {sandbox.vmid}: node {node} is offline; left as it is until the node is back"
        )
    told = f"its VM cannot be read: {error.message}"
    if error.status == 403:
        told = (
            f"these credentials may not see VM {sandbox.vmid}: grant VM.Audit on /vms or on its pool, then run again "
            f"({error.status} {error.text})"
        )
    return Kept("unknown", f"sandbox {sandbox.vmid}: {told}", status=error.status)


def _make_no_config_error(sandbox: Sandbox, node: str) -> Kept:
    # Every configuration has a digest. An answer without one is no configuration, so it proves nothing about the VM.
    return Kept(
        "unknown",
        f"sandbox {sandbox.vmid}: node {node} answered with something that is no VM configuration (no digest); "
        "nothing is concluded",
    )


def read_vm_and_state(ctx: Context, sandbox: Sandbox) -> tuple[Located, str]:
    """Return the sandbox's VM, proven to be ours, and its state (see ``read_power_state``).

    Reads the power state first: it counts because the VM is ours afterwards. Sends two requests if the VM is on the
    recorded node. Otherwise it reads the cluster's VM list too, which lags by ten seconds. Raises Kept for a VM that is
    not ours, or cannot be read.
    """
    node = sandbox.node
    if node:
        path = f"nodes/{node}/qemu/{sandbox.vmid}"
        try:
            now = ctx.client.get_dict(f"{path}/status/current")
            config = ctx.client.get_dict(f"{path}/config")
        except Unreachable as error:
            if error.detail.get("status") is None:
                # api_host did not answer at all, which says nothing about the VM's node.
                raise
            raise _make_silent_node_error(sandbox, node, error) from None
        except ApiError as error:
            if "does not exist" not in error.text:
                raise _make_unreadable_error(ctx, sandbox, node, error) from None
        except ProxmoxError as error:
            raise Kept("unknown", f"sandbox {sandbox.vmid}: its VM cannot be read: {error.message}") from None
        else:
            if not config.get("digest"):
                raise _make_no_config_error(sandbox, node)
            located = _judge_config(ctx, sandbox, node, _make_row(sandbox, node, now), config)
            refuse_not_ours(sandbox, located)
            return located, read_power_state(sandbox, now, config)
    located = require_match(ctx, sandbox)
    now = ctx.client.get_dict(f"{located.path}/status/current")
    return located, read_power_state(sandbox, now, located.config)


def require_our_config(ctx: Context, sandbox: Sandbox, node: str, config: dict[str, Any]) -> Located:
    """Return the VM of a configuration that was just read, proven to be ours. Sends no request. Raises Kept."""
    if not config.get("digest"):
        raise _make_no_config_error(sandbox, node)
    located = _judge_config(ctx, sandbox, node, {"vmid": sandbox.vmid, "node": node, "type": "qemu"}, config)
    refuse_not_ours(sandbox, located)
    return located


def _make_row(sandbox: Sandbox, node: str, now: dict[str, Any]) -> dict[str, Any]:
    """Return the VM's row in the form of the cluster's list, made from the VM's own status."""
    row = {"vmid": sandbox.vmid, "node": node, "type": "qemu", "status": now.get("status")}
    managed = now.get("ha")
    if isinstance(managed, dict) and str(managed.get("managed")) == "1":
        row["hastate"] = managed.get("state") or "managed"
    return row


def read_power_state(sandbox: Sandbox, now: dict[str, Any], config: dict[str, Any]) -> str:
    """Return RUNNING, SUSPENDED (paused or hibernated) or STOPPED. ``now`` is the VM's ``status/current``.

    Raises Kept for any other power state.
    """
    status = now.get("status")
    if status == "stopped":
        return states.SUSPENDED if is_hibernated(config) else states.STOPPED
    if status == "running":
        return states.SUSPENDED if is_paused(now) else states.RUNNING
    raise Kept(
        "unknown",
        f"sandbox {sandbox.vmid}: its node says {str(status)[:40]!r} of the VM's power state, so nothing is "
        "concluded; run again",
    )


def is_paused(now: dict[str, Any]) -> bool:
    """Return whether the VM's CPUs are stopped and a resume continues them. ``now`` is the VM's ``status/current``."""
    return now.get("qmpstatus") in _PAUSED


def is_hibernated(config: dict[str, Any]) -> bool:
    """Return whether the VM is switched off with its memory saved on a disk. The next start loads that memory."""
    return config.get("lock") == HIBERNATED


def _may_be_new(ctx: Context, sandbox: Sandbox) -> bool:
    """Return whether the VM may have been created since this run read the VM list."""
    return sandbox.state in states.CREATING


def require_match(ctx: Context, sandbox: Sandbox) -> Located:
    """Return the VM, proven to be ours. Raises Kept with the reason otherwise, so that no other VM is acted upon."""
    located = locate(ctx, sandbox)
    if located.node is None:
        raise Kept(
            "unknown",
            f"sandbox {sandbox.vmid}: no VM with that VMID is to be seen; run agentlab_reconcile to find out what "
            "became of it",
        )
    refuse_not_ours(sandbox, located)
    return located


def require_fresh_match(ctx: Context, sandbox: Sandbox, located: Located, waited: float) -> Located:
    """Return a fresh verdict for a request that takes no digest (start, stop, suspend).

    Reuses the given verdict only if this thread has sent no request since and it is under _JUST_NOW seconds old.
    Otherwise it judges the VM again. ``waited``: seconds that the request has waited for its place.
    """
    same = (
        located.read is not None
        and located.read[0] == ctx.client.requests_sent
        and waited < _SHORT_WAIT
        and ctx.clock.monotonic() - located.read[1] < _JUST_NOW
    )
    return located if same else require_match(ctx, sandbox)


def match_if_readable(ctx: Context, sandbox: Sandbox) -> Located | None:
    """Return the VM as require_match does, for callers that will retry; None while the VM cannot be read."""
    try:
        return require_match(ctx, sandbox)
    except Kept as error:
        if error.reason in ("unknown", "node_offline"):
            return None
        raise


def write_with_digest(ctx: Context, sandbox: Sandbox, located: Located, write: Callable[[Located], Any]) -> Any:
    """Call ``write`` with the VM until its request is accepted, and return its answer.

    ``write`` sends one request with the digest of the VM that it gets, and waits for the task. A changed configuration
    or a lock causes a further attempt, and the VM is judged again before each. Raises Kept when every attempt meets a
    change.
    """
    for _time in range(_WRITE_TRIES):
        try:
            return write(located)
        except (ApiError, TaskFailed) as error:
            # A resize reports a changed configuration in its task, not in its answer.
            text = error.text if isinstance(error, ApiError) else error.exitstatus
            if isinstance(error, TaskFailed) and is_not_begun(text):
                # The task of a killed run has the lock.
                ctx.clock.sleep(LOCK_PAUSE)
            elif not is_config_changed(text):
                raise
        located = require_match(ctx, sandbox)
    raise Kept(
        "changed", f"sandbox {sandbox.vmid}: its VM's configuration keeps changing; it was left as it is, run again"
    )


def refuse_not_ours(sandbox: Sandbox, located: Located) -> None:
    """Raise Kept for a VM with another verdict than MATCH."""
    verdict = located.verdict
    if verdict is None or verdict.identity == identity.MATCH:
        return
    name = verdict.evidence.get("name")
    if verdict.identity == identity.FOREIGN:
        raise Kept(
            "foreign",
            f"VMID {sandbox.vmid} now belongs to another VM ({name}); it was not touched. "
            "Destroy or prune the record, or run agentlab_reconcile",
            evidence=verdict.evidence,
        )
    if verdict.identity == identity.UNKNOWN:
        raise Kept(
            "locked",
            f"sandbox {sandbox.vmid}: a VM is just being made at that VMID (cloned or restored); run again when that "
            f"has ended. If its task was killed, have an administrator run qm unlock {sandbox.vmid}, look at VM "
            f"{sandbox.vmid}, and remove it by hand if it is to go",
            evidence=verdict.evidence,
        )
    raise Kept(
        "ambiguous",
        f"sandbox {sandbox.vmid}: it is not certain that VM {sandbox.vmid} ({name}) is ours (marker: "
        f"{verdict.evidence['marker']}, SMBIOS UUID {verdict.evidence['smbios_uuid']}, expected "
        f"{verdict.evidence['expected_smbios_uuid']}); it was not touched. Look at it, and remove it by hand if it is "
        "to go",
        evidence=verdict.evidence,
    )


def refuse_guarded(sandbox: Sandbox, located: Located) -> None:
    """Raise Kept for a VM that must not be destroyed: a template, a VM with Proxmox's protection, a locked VM."""
    config = located.config
    if _is_on(config.get("template")) or _is_on(located.row.get("template")):
        raise Kept("protected", f"sandbox {sandbox.vmid}: its VM is a template now, and templates are never destroyed")
    if _is_on(config.get("protection")):
        raise Kept(
            "protected",
            f"sandbox {sandbox.vmid}: its VM has Proxmox's protection; switch that off first (qm set {sandbox.vmid} "
            "--protection 0)",
        )
    # A hibernated VM is deleted like one that is switched off.
    refuse_locked(sandbox, located, but=HIBERNATED)


def _is_on(value: Any) -> bool:
    """Return whether a flag is on. An unfamiliar value counts as on: Proxmox VE writes 1, but accepts other words."""
    return value is not None and str(value).strip().lower() not in ("", "0", "no", "off", "false")


def refuse_locked(sandbox: Sandbox, located: Located, *, but: str | None = None) -> None:
    """Raise Kept for a locked VM: Proxmox would refuse the request, or its task would fail.

    ``but``: a lock that does not prevent the operation.
    """
    lock = located.config.get("lock")
    if not lock or lock == but:
        return
    vmid = sandbox.vmid
    if lock == HIBERNATED:
        text = (
            f"its VM is hibernated (lock: {lock}), and Proxmox VE changes nothing of it until it runs: start it first"
        )
    elif lock == _HIBERNATING:
        text = (
            f"its VM is being hibernated (lock: {lock}); wait for that to end. If it stays so, saving has failed and "
            f"the VM still runs: then only root can take the lock away (qm unlock {vmid} on the node)"
        )
    else:
        text = f"its VM is locked ({lock}); wait for that to end, or have an administrator run qm unlock {vmid}"
    raise Kept("locked", f"sandbox {vmid}: {text}")
