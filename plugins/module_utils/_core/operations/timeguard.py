# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Wall clocks that jump. Ages and leases are wall time; when it jumps by more than a minute against the time since boot, nothing is
destroyed or expired for a while (clock_jump_pause), so that a wrong date never costs a sandbox."""

from __future__ import annotations

import json

from ..durations import show
from ..store.process import identity as process_identity
from .context import Context

JUMP_SECONDS = 60


def suspended(ctx: Context) -> str | None:
    """Why destructive work rests at the moment, or None. Notes the clocks for the next look (not in check mode)."""
    now, since_boot = ctx.clock.now(), ctx.clock.since_boot()
    boot = json.loads(process_identity())["boot"]
    text = ctx.records.meta("clock")
    known = json.loads(text) if text else None
    if known and known["boot"] == boot:
        offset = now - since_boot
        until = float(known.get("until") or 0)
        if abs(offset - known["offset"]) > JUMP_SECONDS:
            until = since_boot + ctx.config.clock_jump_pause
            _note(ctx, boot, offset, until, now)
        elif since_boot - known.get("seen", 0) > JUMP_SECONDS:
            _note(ctx, boot, offset, until, now)
        if since_boot < until:
            return f"the wall clock jumped by more than a minute; expiry and prune rest for another {show(int(until - since_boot) + 1)} (clock_jump_pause)"
        return None
    if known and now < known.get("wall", 0) - JUMP_SECONDS:
        # Another boot, and it is earlier than it has been: the clock is not set (yet).
        # Or it is right, and was wrong then: the clock alone does not tell. Behind, it makes nothing old; when it is corrected that is a jump again.
        _note(ctx, boot, now - since_boot, since_boot + ctx.config.clock_jump_pause, now)
        return ("the wall clock is behind the time of the last run, before this host was started; expiry and prune rest for "
                f"{show(ctx.config.clock_jump_pause)} (clock_jump_pause)")
    _note(ctx, boot, now - since_boot, 0.0, now)
    return None


def _note(ctx: Context, boot: str, offset: float, until: float, now: int) -> None:
    if not ctx.dry_run:
        ctx.records.set_meta("clock", json.dumps({"boot": boot, "offset": offset, "until": until, "seen": ctx.clock.since_boot(), "wall": now}))
