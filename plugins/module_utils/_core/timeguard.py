# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pause expiry and prune after the wall clock jumped, and after a restore of older records.

Ages and leases are wall time. If the wall clock jumps by more than a minute against the time since boot, no lease ends
and nothing is pruned for clock_jump_pause. So a wrong date never costs a sandbox. A destroy that a user asks for is
not delayed.
"""

from __future__ import annotations

import json
from typing import Any

from . import clock as clock_module
from .context import Context
from .durations import show
from .store import freeze
from .store.holders import describe_process, read_host_name

JUMP_SECONDS = 60
_HELD = (
    "the records are an older copy than those in use before, as after a restore (noticed {at}); no lease ends and "
    "nothing is pruned until somebody has looked. Renew the leases of sandboxes that are still needed, then run "
    "agentlab cleanup release (or agentlab_reconcile with release_leases=true)"
)


def explain_pause(ctx: Context) -> str | None:
    """Return the sentence for why expiry and prune rest on this host now, or None.

    Outside check mode, write the clocks into the records for the next call.
    """
    reason = find_pause(ctx)
    return reason[1] if reason else None


def find_pause(ctx: Context) -> tuple[str, str] | None:
    """Return the reason (a word of reasons.py) and the sentence for why expiry and prune rest, or None.

    Outside check mode, write the clocks into the records for the next call.
    """
    hold = hold_leases(ctx)
    if hold:
        return "restored", hold
    jump = _explain_clock_jump(ctx)
    return ("clock_jumped", jump) if jump else None


def hold_leases(ctx: Context) -> str | None:
    """Return the sentence for why no lease ends until an operator releases the leases, or None.

    The leases are held if the records are an older copy of those that were used before. The newest event tells; on
    PostgreSQL also commits of this process that the server has lost. The hold is written into the records, so that it
    lasts over restarts.
    """
    note = read_freeze(ctx)
    if note and note["leases"]:
        # The operator who releases the leases has checked the lost commits of this process, too.
        ctx.database.forget_lost_commits()
        return _HELD.format(at=note["at"])
    if ctx.database.has_lost_commits():
        if not ctx.dry_run:
            freeze.freeze_for_lost_commits(ctx.records)
        return _HELD.format(at=clock_module.format_utc(ctx.clock.now()))
    noted_event = ctx.database.read_noted_event()
    if noted_event is None:
        return None
    event = ctx.database.read_latest_event()
    at = clock_module.format_utc(ctx.clock.now())
    if event < noted_event:
        if not ctx.dry_run:
            freeze.freeze_for_older_copy(ctx.records, event, noted_event)
        return _HELD.format(at=at)
    if event > noted_event and not ctx.dry_run:
        ctx.database.note_event(event)
    return None


def read_freeze(ctx: Context) -> dict[str, Any] | None:
    """Return why, since when and by whom cleanup is frozen, and whether leases rest too; None if it is not frozen."""
    return freeze.read_freeze(ctx.records)


def _explain_clock_jump(ctx: Context) -> str | None:
    """Return the sentence for a clock that jumped a while ago, or None."""
    now, since_boot = ctx.clock.now(), ctx.clock.since_boot()
    boot = json.loads(describe_process())["boot"]
    damaged, note = _read_note(ctx)
    if damaged:
        # We cannot tell whether the clock jumped. Pause as after a jump.
        _write_note(ctx, boot, now - since_boot, since_boot + ctx.config.clock_jump_pause, now)
        return (
            f"the note of the clocks in the records is damaged (meta.value of key {_make_key()}); expiry and prune "
            f"rest for {show(ctx.config.clock_jump_pause)} (clock_jump_pause), then they go on by a new one"
        )
    if note and note["boot"] == boot:
        offset = now - since_boot
        until = float(note.get("until") or 0)
        if abs(offset - note["offset"]) > JUMP_SECONDS:
            until = since_boot + ctx.config.clock_jump_pause
            _write_note(ctx, boot, offset, until, now)
        elif since_boot - note.get("seen", 0) > JUMP_SECONDS:
            _write_note(ctx, boot, offset, until, now)
        if since_boot < until:
            remaining = show(int(until - since_boot) + 1)
            return (
                f"the wall clock jumped by more than a minute; expiry and prune rest for another {remaining} "
                "(clock_jump_pause)"
            )
        return None
    if note and now < note.get("wall", 0) - JUMP_SECONDS:
        # After a reboot the clock reads earlier than the last run noted. Either it is not set yet, or it was wrong
        # before; we cannot tell. Pause: a slow clock expires nothing, and setting it is detected as a jump.
        _write_note(ctx, boot, now - since_boot, since_boot + ctx.config.clock_jump_pause, now)
        return (
            "the wall clock is behind the time of the last run, before this host was started; expiry and prune rest "
            f"for {show(ctx.config.clock_jump_pause)} (clock_jump_pause)"
        )
    # A pause from before the reboot goes on: the clock jumped then, and the reboot did not correct it.
    pause = float(note["until"]) - float(note["seen"]) - (now - float(note["wall"])) if note else 0.0
    pause = min(pause, ctx.config.clock_jump_pause)
    _write_note(ctx, boot, now - since_boot, since_boot + pause if pause > 0 else 0.0, now)
    if pause > 0:
        return (
            "the wall clock jumped by more than a minute before this host was started; expiry and prune rest for "
            f"another {show(int(pause) + 1)} (clock_jump_pause)"
        )
    return None


def find_pause_end(ctx: Context) -> int | None:
    """Return the wall time until which expiry and prune rest on this host, or None. Write nothing."""
    _damaged, note = _read_note(ctx)
    remaining = (
        float(note.get("until") or 0) - ctx.clock.since_boot()
        if note and note["boot"] == json.loads(describe_process())["boot"]
        else 0.0
    )
    return ctx.clock.now() + int(remaining) + 1 if remaining > 0 else None


def _make_key() -> str:
    """Return the key of this host's note. Each host on the same records has its own clock, so its own note."""
    return f"clock:{read_host_name()}"


def _read_note(ctx: Context) -> tuple[bool, dict[str, Any] | None]:
    """Return whether this host's note is damaged, and the note. Release 1.0.0 had one note for all hosts."""
    text = ctx.records.read_meta(_make_key()) or ctx.records.read_meta("clock")
    if text is None:
        return False, None
    try:
        note = json.loads(text)
        numbers = [float(note[name]) for name in ("offset", "until", "seen", "wall")]
        return not (isinstance(note["boot"], str) and all(abs(number) < 1e18 for number in numbers)), note
    except (ValueError, TypeError, KeyError):
        return True, None


def _write_note(ctx: Context, boot: str, offset: float, until: float, now: int) -> None:
    if not ctx.dry_run:
        ctx.records.set_meta(
            _make_key(),
            json.dumps({"boot": boot, "offset": offset, "until": until, "seen": ctx.clock.since_boot(), "wall": now}),
        )
