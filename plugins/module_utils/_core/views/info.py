# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Show sandboxes: from the records alone, or compared with Proxmox VE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import clock as clock_module
from .. import profiles, states
from ..context import Context
from ..errors import ConfigError, NotFound
from ..model import Sandbox
from ..store import history


@dataclass(slots=True)
class Filter:
    """The sandboxes to show. A filter of None passes all sandboxes; an empty list of ids passes none."""

    ids: list[dict[str, Any]] | None = None
    states: Sequence[str] | None = None
    profile: str | None = None
    tags: Sequence[str] = ()
    expired: bool | None = None
    include_destroyed: bool = False


def find(ctx: Context, filters: Filter) -> list[Sandbox]:
    """Return the sandboxes that the filters select, in the order of their VMIDs."""
    destroyed = filters.include_destroyed or states.DESTROYED in (filters.states or ())
    if filters.ids is not None:
        sandboxes = []
        for which in filters.ids:
            try:
                sandbox = ctx.select_sandbox(**which)
            except NotFound:
                continue
            if sandbox.live or destroyed:
                sandboxes.append(sandbox)
    else:
        sandboxes = ctx.records.find_all(filters.states, include_destroyed=destroyed)
    now = ctx.clock.now()
    return [
        sandbox
        for sandbox in sandboxes
        if (filters.states is None or sandbox.state in filters.states)
        and (filters.profile is None or sandbox.profile == filters.profile)
        and (not filters.tags or set(filters.tags) & set(sandbox.tags))
        and (filters.expired is None or sandbox.has_expired(now) == filters.expired)
    ]


def show(
    ctx: Context,
    filters: Filter,
    *,
    events: int = 0,
    verify: bool = False,
    identities: bool = True,
    owner: bool = False,
) -> dict[str, Any]:
    """Return ``sandboxes``, ``count`` and ``by_state``.

    ``events``: add this number of the latest events of each sandbox. ``verify``: compare with Proxmox VE, and with
    ``identities`` read each VM's configuration. ``owner``: add the creator of each live sandbox, and the connection
    plugin that its profile names.
    """
    sandboxes = find(ctx, filters)
    shown = [sandbox.public() for sandbox in sandboxes]
    if owner:
        owners = history.read_owners(ctx.database)
        connections = _read_connections(ctx)
        for answer in shown:
            answer["owner"] = owners.get(answer["uuid"])
            answer["connection"] = connections.get(answer["profile"])
    if events > 0:
        for sandbox, answer in zip(sandboxes, shown, strict=True):
            answer["events"] = [
                format_event(row) for row in history.read_events(ctx.database, uuid=sandbox.uuid, tail=events)
            ]
    if verify and sandboxes:
        from . import comparison

        for answer, extra in zip(shown, comparison.verify_sandboxes(ctx, sandboxes, identities), strict=True):
            answer.update(extra)
    return {"sandboxes": shown, "count": len(shown), "by_state": dict(Counter(sandbox.state for sandbox in sandboxes))}


def _read_connections(ctx: Context) -> dict[str | None, str | None]:
    """Return the connection plugin that each profile names; empty while a profile cannot be used."""
    try:
        return {name: profile.connection for name, profile in profiles.load_all(ctx.config.profiles_dir).items()}
    except ConfigError:
        return {}


def format_event(row: dict[str, Any]) -> dict[str, Any]:
    """Return an event in the shape of answers, with its time in UTC."""
    return {**row, "at": clock_module.format_utc(row["at"])}
