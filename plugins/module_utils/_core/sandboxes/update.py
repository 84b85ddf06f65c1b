# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""A sandbox that is there is asked for with other options: tell which of them differ, and apply the few that can be
applied.

What a sandbox was created with stands in the event of its clone, so that telling asks Proxmox VE nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from .. import durations, states
from ..context import Context, refuse_cut_off
from ..errors import Advice, AgentlabError, InvalidInput, Kept, StateConflict
from ..model import Outcome, Sandbox
from ..nodes import AUTO
from ..proxmox import identity
from ..store import history
from ..vm import power
from ..vm.locate import Located, is_hibernated, is_paused, refuse_locked, require_match, write_with_digest
from ..workspaces import workspace_disk
from . import template as templates
from . import vm_config
from .spec import Spec

# What can be applied to a sandbox that is there, and what of it Proxmox VE applies for certain only to a VM that is
# stopped.
APPLICABLE = ("cores", "memory", "tags", "description")
_STOPPED_ONLY = ("cores", "memory")
# Of options that an update does not apply: the remedy for what was asked.
_INSTEAD = {"ttl": "renew_lease", "workspace": "attach_workspace"}
# The event that remembers options: the decision to clone, and each update.
_REASONS = ("clone", "options")
# Nothing of these is kept, so nothing can be compared.
_SECRET = ("cloud_init_user_data", "cloud_init_password")
# What is said elsewhere, or concerns this run alone.
_NOT_COMPARED = (
    "vmid",
    "name",
    "given",
    "lease_maximum",
    "keepalive",
    "protected",
    "wait_for_ip",
    "wait_for_cloud_init",
    "update",
    "allow_restart",
)
_STATES = (states.READY, states.RUNNING, states.SUSPENDED, states.STOPPED, states.COMPLETED)


def remembered(spec: Spec) -> dict[str, Any]:
    """Return the options that the clone's event keeps.

    What was asked for, without secrets; public keys as a hash, for they are long.
    """
    values = {name: getattr(spec, name) for name in Spec.__dataclass_fields__ if name not in (*_NOT_COMPARED, *_SECRET)}
    return {name: _comparable(name, value) for name, value in values.items() if value not in (None, [])}


def _comparable(name: str, value: Any) -> Any:
    if name == "ssh_public_keys":
        return hashlib.sha256("\n".join(sorted(value)).encode()).hexdigest()[:16]
    return sorted(set(value)) if isinstance(value, list) else value


def different(ctx: Context, sandbox: Sandbox, spec: Spec) -> dict[str, tuple[Any, Any]]:
    """Return the options that were given and differ from what the sandbox was created with.

    Name -> (what it has, what is asked for).
    """
    asked = {name: _comparable(name, getattr(spec, name)) for name in sorted(spec.given - {*_NOT_COMPARED, *_SECRET})}
    if not asked:
        return {}
    had: dict[str, Any] = {}
    for evidence in history.evidence(ctx.database, sandbox.uuid, _REASONS):
        had.update(evidence.get("options") or {})
    # A sandbox of an earlier release remembers nothing: then only what the record itself has is compared.
    known = bool(had)
    had.update(tags=sorted(set(sandbox.tags)), profile=sandbox.profile)
    found = {}
    for name, value in asked.items():
        if name not in had and not known:
            continue
        was = had.get(name)
        if value != was and not _means_the_same(ctx, sandbox, name, was, value):
            found[name] = (was, value)
    return found


def _means_the_same(ctx: Context, sandbox: Sandbox, name: str, was: Any, value: Any) -> bool:
    if name in ("full_clone", "firewall"):
        return bool(was) == bool(value)
    if name == "node":
        return bool(value in (sandbox.node, AUTO))
    if name == "template":
        # By its VMID or by its name; the clone's event has the VMID.
        last = next(iter(history.evidence(ctx.database, sandbox.uuid, ("clone",))), {})
        return str(value) == str(last.get("template")) or str(value) == str(last.get("template_name"))
    if name == "workspace" and sandbox.workspace_id is not None:
        try:
            return bool(workspace_disk.select(ctx, str(value)).id == sandbox.workspace_id)
        except AgentlabError:
            return False
    return False


def advise(sandbox: Sandbox, differences: dict[str, tuple[Any, Any]]) -> list[Advice]:
    """Return one warning for each option that was given and not applied, with what to do."""
    warnings = []
    for name, (was, asked) in differences.items():
        text = f"{name}: {_shown(name, asked)} was not applied to sandbox {sandbox.vmid}, which has {_shown(name, was)}"
        remedy = "update" if name in APPLICABLE else _INSTEAD.get(name)
        if remedy is None:
            text += (
                ". It counts when a sandbox is created: destroy this one and create it again, or leave the option out"
            )
        warnings.append(Advice(text, remedy))
    return warnings


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "what its template or the configuration said" if name != "profile" else "no profile"
    if name == "ssh_public_keys":
        return "another list of keys"
    if name == "ttl":
        return f"a lease of {durations.show(int(value))}"
    if name == "description":
        return "another text"
    return repr(", ".join(map(str, value)) if isinstance(value, list) else str(value))


# ---- applying ----


def apply(ctx: Context, sandbox: Sandbox, spec: Spec) -> Outcome:
    """Make the VM what the Spec's applicable options say.

    Their values count where they were given, or where the given profile sets them.
    """
    asked = {
        name: getattr(spec, name)
        for name in APPLICABLE
        if getattr(spec, name) is not None and (name != "tags" or name in spec.given or spec.tags)
    }
    if not asked:
        return Outcome.of("unchanged", sandbox)
    if sandbox.state not in _STATES:
        raise StateConflict(
            f"cannot update sandbox in {sandbox.state} state. Valid states: {', '.join(_STATES)}",
            operation="update",
            state=sandbox.state,
            valid=_STATES,
        )
    if ctx.dry_run:
        plan = _Plan(sandbox, asked, require_match(ctx, sandbox))
        plan.check(ctx)
        if plan.needs_stop:
            _check_restart(ctx, sandbox, spec, plan, power.status(ctx, plan.located))
        return plan.outcome("would_update", sandbox) if plan.new else Outcome.of("unchanged", sandbox)
    with ctx.claimed(sandbox, "update") as (claim, current):
        refuse_cut_off(claim, current)
        located = require_match(ctx, current)
        plan = _Plan(current, asked, located)
        if not plan.new:
            return Outcome.of("unchanged", current)
        refuse_locked(current, located)
        plan.check(ctx)
        upids: list[str] = []
        told: list[str] = []
        restart = False
        if plan.needs_stop:
            restart = _check_restart(ctx, current, spec, plan, power.status(ctx, located))
            if restart:
                _require_writes(ctx, current)
            located = require_match(ctx, current)
        if restart:
            done, warned = power.stop(ctx, current, located, hard=False)
            upids += done
            told += warned
            located = require_match(ctx, current)
        refused: set[str] = set()
        try:
            write_with_digest(
                ctx,
                current,
                located,
                lambda now: vm_config.write_config(ctx, now, _Plan(current, asked, now).changes, refused),
            )
        finally:
            # Also when the write failed: whoever allowed a restart did not ask for a VM that is off.
            if restart:
                done, warned = power.start(ctx, current, require_match(ctx, current))
                upids += done
                told += warned
        values = {"tags": plan.new["tags"]} if "tags" in plan.new else {}
        current = ctx.records.change(
            claim,
            current,
            "update",
            reason="options",
            upids=upids,
            evidence={
                "options": {name: _comparable(name, value) for name, value in asked.items()},
                "before": plan.before,
            },
            finish=True,
            **values,
        )
        told += vm_config.tag_warnings(current, refused, set())
        outcome = plan.outcome("updated", current)
        outcome.upids, outcome.warnings = upids, told
        return outcome


class _Plan:
    """What has to be written into one configuration, and what that means in our options."""

    def __init__(self, sandbox: Sandbox, asked: dict[str, Any], located: Located) -> None:
        self.located = located
        self.new: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        config = located.config
        makers: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
            "cores": lambda value: (_number(config.get("cores"), 1), {"cores": value}),
            "memory": lambda value: (_number(config.get("memory"), 512), vm_config.memory_values(value, config)),
            "description": lambda value: (
                identity.own_text(config),
                {"description": identity.described(config, value)},
            ),
        }
        for name, value in asked.items():
            if name == "tags":
                self._tags(sandbox, sorted(set(value)), config)
                continue
            was, changes = makers[name](value)
            if was != value:
                self.new[name], self.before[name] = value, was
                self.changes.update(changes)

    def _tags(self, sandbox: Sandbox, tags: list[str], config: dict[str, Any]) -> None:
        there = vm_config.split_tags(config.get("tags"))
        # Tags that somebody else put on the VM stay.
        wanted = (there - set(sandbox.tags)) | set(tags) | {identity.OUR_TAG}
        if tags != sorted(sandbox.tags):
            self.new["tags"], self.before["tags"] = tags, sorted(sandbox.tags)
        if wanted != there and "tags" in self.new:
            self.changes["tags"] = ";".join(sorted(wanted))

    def check(self, ctx: Context) -> None:
        """Refuse, before the VM is stopped for it, what Proxmox VE would take and then not start."""
        if "cores" in self.new:
            templates.check_cores(ctx, self.new["cores"], self.located.config, str(self.located.node), "VM")

    @property
    def needs_stop(self) -> bool:
        return any(name in self.new for name in _STOPPED_ONLY)

    def outcome(self, word: str, sandbox: Sandbox) -> Outcome:
        return Outcome.of(word, sandbox, changed=True, extra={"after": dict(self.new), "before": dict(self.before)})


def _number(value: Any, default: int) -> int:
    """Return a number of the configuration; memory may be written ``current=2048``."""
    text = str(value if value is not None else default).partition(",")[0].removeprefix("current=")
    return int(text) if text.isascii() and text.isdecimal() else default


def _require_writes(ctx: Context, sandbox: Sandbox) -> None:
    """Raise Kept without quorum: a VM can be stopped then, and neither be changed nor started again."""
    try:
        ctx.cluster.require_quorum()
    except Kept as error:
        raise Kept(
            error.reason,
            f"sandbox {sandbox.vmid} was neither stopped nor changed, for the cluster takes no changes without "
            "quorum, and would not start it again; bring the other nodes back (pvecm status), then run again",
        ) from None


def _check_restart(ctx: Context, sandbox: Sandbox, spec: Spec, plan: _Plan, status: dict[str, Any]) -> bool:
    """Return whether the VM has to be stopped and started again; refuse where nobody allowed that."""
    option = next(name for name in _STOPPED_ONLY if name in plan.new)
    if is_hibernated(plan.located.config) or is_paused(status):
        raise StateConflict(
            f"{option}: sandbox {sandbox.vmid} is suspended, and would lose its memory; start it first. Nothing was "
            "changed",
            operation="update",
            state=sandbox.state,
            valid=_STATES,
        )
    if status.get("status") != "running":
        return False
    if sandbox.state not in states.POWERED:
        raise InvalidInput(
            f"{option}: the VM of sandbox {sandbox.vmid} runs, although the sandbox is {sandbox.state}; stop it "
            "first. Nothing was changed",
            option=option,
        )
    if not spec.allow_restart:
        raise InvalidInput(
            f"{option}: sandbox {sandbox.vmid} runs, and Proxmox VE applies that for certain only to a VM that is "
            "stopped. Nothing was changed",
            option=option,
            remedy="allow_restart",
        )
    return True
