# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Renew leases and expire them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field

from .. import clock as clock_module
from .. import durations, states, timeguard
from ..context import Context, make_failure
from ..errors import AgentlabError, Busy, InvalidInput, Kept, RecordChanged, StateConflict
from ..model import Outcome, Sandbox
from ..store import overview
from ..store.journal import REQUESTED

# A renewal that moves the end by less than this is a repetition and writes nothing.
REPEAT_SECONDS = 60
# Reasons why the VM of an expired sandbox was not stopped that are no failure.
NO_VM = "no VM with that VMID is to be seen"
UNDER_WAY = "another run is stopping it"
ANOTHER_VM = "the VMID belongs to another VM now, which was left alone"


def renew(
    ctx: Context, sandbox: Sandbox, ttl: int, *, min_remaining: int | None = None, allow_shorten: bool = False
) -> Outcome:
    """Set the lease to now + ``ttl`` seconds, capped by the maximum lifetime, and return the outcome.

    One conditional UPDATE decides between renewal and expiry. A renewal that loses raises an error and never reports
    success. Raises InvalidInput, StateConflict, Kept or RecordChanged.
    """
    if sandbox.lease_max_seconds is not None and ttl > sandbox.lease_max_seconds:
        raise InvalidInput(
            f"ttl: {durations.show(ttl)} is longer than the maximum of {durations.show(sandbox.lease_max_seconds)} "
            f"that profile {sandbox.profile!r} grants sandbox {sandbox.vmid}",
            option="ttl",
            vmid=sandbox.vmid,
        )
    for _attempt in range(5):
        now = ctx.clock.now()
        states.check_operation("renew_lease", sandbox.state)
        under_way = ctx.records.find_journal_entry(sandbox.uuid)
        if under_way is not None and under_way.kind == "destroy":
            # Refuse even when nothing would be written: "unchanged" would promise a lease to a dying VM.
            raise Kept(
                "busy", f"cannot renew lease of sandbox {sandbox.vmid}: it is being destroyed", vmid=sandbox.vmid
            )
        current = sandbox.lease_expires_at or 0
        # After a restore, leases are held for a while. During that time an expired sandbox may be renewed, because the
        # restored copy may lack its last renewal.
        over = current <= now
        if over and not timeguard.hold_leases(ctx):
            raise StateConflict(
                f"cannot renew lease of sandbox {sandbox.vmid}: it expired at {clock_module.format_utc(current)} and "
                "is about to become TIMEOUT. Create a new sandbox",
                vmid=sandbox.vmid,
            )
        new_end = now + ttl
        capped = False
        if ctx.config.max_lifetime is not None and new_end > sandbox.created_at + ctx.config.max_lifetime:
            new_end = sandbox.created_at + ctx.config.max_lifetime
            capped = True
        if new_end < current and not allow_shorten:
            # A renewal shortens a lease only with allow_shorten.
            new_end = current
        enough = (
            min_remaining is not None and current - now >= min_remaining and not (allow_shorten and new_end < current)
        )
        if (
            enough
            or new_end == current
            or (
                0 <= new_end - current < REPEAT_SECONDS
                and min_remaining is None
                and not _is_far_enough(new_end, current, ttl)
            )
        ):
            return _make_renewal_outcome("unchanged", sandbox, current, now, capped, changed=False)
        if ctx.dry_run:
            return _make_renewal_outcome("would_renew", sandbox, new_end, now, capped, changed=True, was=current)
        try:
            renewed = ctx.records.renew(
                sandbox, new_end, now, over=over, evidence={"ttl": ttl, "capped": capped, "was": current}
            )
            return _make_renewal_outcome("renewed", renewed, new_end, now, capped, changed=True, was=current)
        except RecordChanged:
            sandbox = ctx.records.get(sandbox.uuid)
    raise RecordChanged(f"sandbox {sandbox.vmid} keeps being changed by other runs; run again", vmid=sandbox.vmid)


def _is_far_enough(new_end: int, current: int, ttl: int) -> bool:
    # A lease shorter than the repetition window is renewed once half of it has passed.
    return ttl <= REPEAT_SECONDS and new_end - current >= max(1, ttl // 2)


def _make_renewal_outcome(
    word: str, sandbox: Sandbox, expires_at: int, now: int, capped: bool, *, changed: bool, was: int | None = None
) -> Outcome:
    return Outcome.of(
        word,
        sandbox,
        changed=changed,
        extra={
            "lease_expires_at": clock_module.format_utc(expires_at),
            "granted_seconds": max(0, expires_at - now),
            "capped": capped,
            "was": clock_module.format_utc(was),
        },
    )


@dataclass(slots=True)
class Expiry:
    """The outcomes of one expiry pass; ``suspended`` says why nothing was done."""

    expired: list[Outcome] = field(default_factory=list)
    renewed: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    suspended: str | None = None


def expire(ctx: Context, *, stop_vms: bool = True) -> Expiry:
    """Move expired sandboxes to TIMEOUT and stop their VMs. Renew keepalive sandboxes as far as max_lifetime allows.

    All records are moved before the first VM is stopped, so that a slow stop delays no other expiry.
    """
    ctx.records.in_pass = True
    result = Expiry(suspended=timeguard.explain_pause(ctx))
    if result.suspended:
        return result
    now = ctx.clock.now()
    due = overview.list_expired(ctx.records, now)
    moved: list[Sandbox] = []
    # One commit serves all records. Without due records no transaction is opened, so other writers do not wait.
    with ctx.database.group_writes() if due and not ctx.dry_run else contextlib.nullcontext():
        ended: list[Sandbox] = []
        for sandbox in due:
            if is_kept_alive(ctx, sandbox, now):
                limit = None if ctx.config.max_lifetime is None else sandbox.created_at + ctx.config.max_lifetime
                until = now + (sandbox.ttl_seconds or ctx.config.default_ttl)
                result.renewed.append(_renew_by_itself(ctx, sandbox, min(until, limit) if limit else until))
            else:
                ended.append(sandbox)
        if ctx.dry_run:
            result.expired = [
                Outcome.of("would_expire", sandbox, state=states.TIMEOUT, changed=True, reason="lease_expired")
                for sandbox in ended
            ]
            ended = []
        records = ctx.records.expire_all(ended, now) if ended else []
        for sandbox, expired in zip(ended, records, strict=True):
            if expired is None:
                message = f"sandbox {sandbox.vmid} was renewed or changed before it expired"
                result.failed.append(Outcome.of("unchanged", sandbox, reason="changed", message=message))
                continue
            moved.append(expired)
            result.expired.append(
                Outcome.of("expired", expired, previous_state=sandbox.state, changed=True, reason="lease_expired")
            )
    if stop_vms:
        for outcome, problem in zip(
            result.expired, ctx.run_each(lambda timed_out: stop_expired(ctx, timed_out), moved), strict=False
        ):
            outcome.message = problem
    return result


def is_kept_alive(ctx: Context, sandbox: Sandbox, now: int) -> bool:
    """Return whether the expiry pass itself renews this sandbox's lease."""
    limit = None if ctx.config.max_lifetime is None else sandbox.created_at + ctx.config.max_lifetime
    return (
        sandbox.keepalive
        and sandbox.state in states.OPERATIONS["renew_lease"].allowed
        and (limit is None or limit > now)
    )


def _renew_by_itself(ctx: Context, sandbox: Sandbox, until: int) -> Outcome:
    """Renew the lease of a keepalive sandbox to ``until`` (seconds since the epoch)."""
    if ctx.dry_run:
        return Outcome.of("would_renew", sandbox, changed=True, reason="keepalive")
    now = ctx.clock.now()
    try:
        renewed = ctx.records.renew(sandbox, until, now, keepalive=True, evidence={"was": sandbox.lease_expires_at})
    except RecordChanged as error:
        return make_failure(sandbox, error)
    return _make_renewal_outcome("renewed", renewed, until, now, False, changed=True)


def stop_expired(ctx: Context, sandbox: Sandbox) -> str | None:
    """Stop the VM of a TIMEOUT record; the record stays TIMEOUT.

    Returns None when done, else the reason why the VM was not stopped. The next pass tries again.
    """
    if sandbox.smbios_uuid is None:
        return "its VM was never bound to the record; prune settles what became of it"
    # Imported here because a renewal needs none of them (payload of shipped modules).
    from ..proxmox import identity
    from ..vm import power
    from ..vm.locate import HIBERNATED, locate, refuse_locked

    try:
        with ctx.claim_sandbox(sandbox, "stop", wait=0) as (claim, current):
            if current.state != states.TIMEOUT:
                return None
            located = locate(ctx, current)
            if located.verdict is None:
                return NO_VM
            if located.verdict.identity == identity.FOREIGN:
                return ANOTHER_VM
            if not located.match:
                return f"its VM is {located.verdict.identity}, so it was left alone"
            # A hibernated VM is switched off already.
            refuse_locked(current, located, but=HIBERNATED)
            # Keep the journal of an interrupted destroy, so that the destroy can be finished.
            other = claim.interrupted is not None and claim.interrupted.kind == "destroy"
            if not other:
                ctx.records.write_journal(claim, "stop", REQUESTED, {"node": located.node})
            upids, _warnings = power.stop(ctx, current, located, hard=False)
            ctx.records.change(claim, current, "stop", upids=upids, reason="lease_expired", finish=not other)
            return None
    except Busy as error:
        # Another run, perhaps another thread of this daemon, is stopping that VM now.
        return UNDER_WAY if error.detail.get("operation") in ("stop", "destroy") else error.message
    except AgentlabError as error:
        return error.message


def stop_leftovers(ctx: Context, handled: Collection[str] = ()) -> list[tuple[Sandbox, str | None]]:
    """Stop VMs of TIMEOUT records that still run because an earlier pass failed or was interrupted.

    ``handled`` holds the UUIDs that this pass has already handled; the VM list is older than that. Returns each sandbox
    with None, or with the reason why its VM was not stopped.
    """
    running = find_leftovers(ctx, handled)
    return list(zip(running, ctx.run_each(lambda sandbox: stop_expired(ctx, sandbox), running), strict=True))


def find_leftovers(ctx: Context, handled: Collection[str] = ()) -> list[Sandbox]:
    """Return the sandboxes that stop_leftovers would stop."""
    waiting = [sandbox for sandbox in ctx.records.find_all([states.TIMEOUT]) if sandbox.uuid not in handled]
    if not waiting:
        return []
    rows = ctx.cluster.list_vms()
    return [sandbox for sandbox in waiting if rows.get(sandbox.vmid, {}).get("status") == "running"]


def check_min_remaining(value: object) -> int | None:
    """Return ``min_remaining`` in seconds; None without one. Raises InvalidInput."""
    return None if value is None else durations.parse(value, "min_remaining")
