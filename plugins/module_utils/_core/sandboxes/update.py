# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compare an existing sandbox with the options now asked for, and apply those that can be applied.

The event of the clone holds the options of the creation, so comparing needs no request to Proxmox VE.
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

# Options that can be applied to an existing sandbox. Proxmox VE reliably applies _STOPPED_ONLY only to a stopped VM.
APPLICABLE = ("cores", "memory", "tags", "description")
_STOPPED_ONLY = ("cores", "memory")
# The remedy for options that an update does not apply.
_INSTEAD = {"ttl": "renew_lease", "workspace": "attach_workspace"}
# Reasons of the events that hold options: the decision to clone, and each update.
_REASONS = ("clone", "options")
# Secrets are stored nowhere, so they cannot be compared.
_SECRET = ("cloud_init_user_data", "cloud_init_password")
# Options that other checks compare, or that concern only this run.
_NOT_COMPARED = (
    "vmid",
    "name",
    "given_options",
    "lease_maximum",
    "keepalive",
    "protected",
    "wait_for_ip",
    "wait_for_cloud_init",
    "update",
    "allow_restart",
)
_STATES = (states.READY, states.RUNNING, states.SUSPENDED, states.STOPPED, states.COMPLETED)


def select_remembered(spec: Spec) -> dict[str, Any]:
    """Return the options to store in the clone's event.

    These are the requested options without secrets. Public keys are long, so they are stored as a hash.
    """
    values = {name: getattr(spec, name) for name in Spec.__dataclass_fields__ if name not in (*_NOT_COMPARED, *_SECRET)}
    return {name: _make_comparable(name, value) for name, value in values.items() if value not in (None, [])}


def _make_comparable(name: str, value: Any) -> Any:
    """Return the value in the form in which it is stored and compared."""
    if name == "ssh_public_keys":
        return hashlib.sha256("\n".join(sorted(value)).encode()).hexdigest()[:16]
    return sorted(set(value)) if isinstance(value, list) else value


def find_differences(ctx: Context, sandbox: Sandbox, spec: Spec) -> dict[str, tuple[Any, Any]]:
    """Return the given options that differ from those of the creation, as {name: (current value, requested value)}."""
    requested = {
        name: _make_comparable(name, getattr(spec, name))
        for name in sorted(spec.given_options - {*_NOT_COMPARED, *_SECRET})
    }
    if not requested:
        return {}
    had: dict[str, Any] = {}
    for evidence in history.read_evidence(ctx.database, sandbox.uuid, _REASONS):
        had.update(evidence.get("options") or {})
    # Sandboxes of earlier releases stored no options. Then only the columns of the record can be compared.
    known = bool(had)
    had.update(tags=sorted(set(sandbox.tags)), profile=sandbox.profile)
    differences = {}
    for name, value in requested.items():
        if name not in had and not known:
            continue
        was = had.get(name)
        if value != was and not _means_the_same(ctx, sandbox, name, was, value):
            differences[name] = (was, value)
    return differences


def _means_the_same(ctx: Context, sandbox: Sandbox, name: str, was: Any, value: Any) -> bool:
    """Return whether a value that is written differently has the same effect on this sandbox."""
    if name in ("full_clone", "firewall"):
        return bool(was) == bool(value)
    if name == "node":
        return bool(value in (sandbox.node, AUTO))
    if name == "template":
        # The template may be given by VMID or by name.
        last = next(iter(history.read_evidence(ctx.database, sandbox.uuid, ("clone",))), {})
        return str(value) == str(last.get("template")) or str(value) == str(last.get("template_name"))
    if name == "workspace" and sandbox.workspace_id is not None:
        try:
            return bool(workspace_disk.select(ctx, str(value)).id == sandbox.workspace_id)
        except AgentlabError:
            return False
    return False


def advise(sandbox: Sandbox, differences: dict[str, tuple[Any, Any]]) -> list[Advice]:
    """Return one warning, with a remedy, for each given option that was not applied."""
    warnings = []
    for name, (current, requested) in differences.items():
        text = (
            f"{name}: {_format_value(name, requested)} was not applied to sandbox {sandbox.vmid}, which has "
            f"{_format_value(name, current)}"
        )
        remedy = "update" if name in APPLICABLE else _INSTEAD.get(name)
        if remedy is None:
            text += (
                ". It counts when a sandbox is created: destroy this one and create it again, or leave the option out"
            )
        warnings.append(Advice(text, remedy))
    return warnings


def _format_value(name: str, value: Any) -> str:
    """Return the value of an option for a warning."""
    if value is None:
        return "what its template or the configuration said" if name != "profile" else "no profile"
    if name == "ssh_public_keys":
        return "another list of keys"
    if name == "ttl":
        return f"a lease of {durations.show(int(value))}"
    if name == "description":
        return "another text"
    return repr(", ".join(map(str, value)) if isinstance(value, list) else str(value))


# ---- applying options ----


def apply(ctx: Context, sandbox: Sandbox, spec: Spec) -> Outcome:
    """Change the VM to the applicable options of the spec, and return the outcome.

    An option counts if it was given, or if the given profile sets it.
    """
    requested = {
        name: getattr(spec, name)
        for name in APPLICABLE
        if getattr(spec, name) is not None and (name != "tags" or name in spec.given_options or spec.tags)
    }
    if not requested:
        return Outcome.of("unchanged", sandbox)
    if sandbox.state not in _STATES:
        raise StateConflict(
            f"cannot update sandbox in {sandbox.state} state. Valid states: {', '.join(_STATES)}",
            operation="update",
            state=sandbox.state,
            valid=_STATES,
        )
    if ctx.dry_run:
        plan = _Plan(sandbox, requested, require_match(ctx, sandbox))
        plan.check(ctx)
        if plan.needs_stop:
            _check_restart(ctx, sandbox, spec, plan, power.read_status(ctx, plan.located))
        return plan.make_outcome("would_update", sandbox) if plan.new else Outcome.of("unchanged", sandbox)
    with ctx.claim_sandbox(sandbox, "update") as (claim, current):
        refuse_cut_off(claim, current)
        located = require_match(ctx, current)
        plan = _Plan(current, requested, located)
        if not plan.new:
            return Outcome.of("unchanged", current)
        refuse_locked(current, located)
        plan.check(ctx)
        upids: list[str] = []
        warnings: list[str] = []
        restart = False
        if plan.needs_stop:
            restart = _check_restart(ctx, current, spec, plan, power.read_status(ctx, located))
            if restart:
                _require_writes(ctx, current)
            located = require_match(ctx, current)
        if restart:
            tasks, warned = power.stop(ctx, current, located, hard=False)
            upids += tasks
            warnings += warned
            located = require_match(ctx, current)
        refused: set[str] = set()
        try:
            write_with_digest(
                ctx,
                current,
                located,
                lambda now: vm_config.write_config(ctx, now, _Plan(current, requested, now).changes, refused),
            )
        finally:
            # Start the VM even after a failed write: permission to restart is no permission to leave the VM off.
            if restart:
                tasks, warned = power.start(ctx, current, require_match(ctx, current))
                upids += tasks
                warnings += warned
        values = {"tags": plan.new["tags"]} if "tags" in plan.new else {}
        current = ctx.records.change(
            claim,
            current,
            "update",
            reason="options",
            upids=upids,
            evidence={
                "options": {name: _make_comparable(name, value) for name, value in requested.items()},
                "before": plan.before,
            },
            finish=True,
            **values,
        )
        warnings += vm_config.compose_tag_warnings(current, refused, set())
        outcome = plan.make_outcome("updated", current)
        outcome.upids, outcome.warnings = upids, warnings
        return outcome


class _Plan:
    """The changes to write into one configuration, and their values as options of ours."""

    def __init__(self, sandbox: Sandbox, requested: dict[str, Any], located: Located) -> None:
        self.located = located
        self.new: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        config = located.config
        makers: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
            "cores": lambda value: (_read_number(config.get("cores"), 1), {"cores": value}),
            "memory": lambda value: (_read_number(config.get("memory"), 512), vm_config.compute_memory(value, config)),
            "description": lambda value: (
                identity.read_own_text(config),
                {"description": identity.replace_text(config, value)},
            ),
        }
        for name, value in requested.items():
            if name == "tags":
                self._compare_tags(sandbox, sorted(set(value)), config)
                continue
            was, changes = makers[name](value)
            if was != value:
                self.new[name], self.before[name] = value, was
                self.changes.update(changes)

    def _compare_tags(self, sandbox: Sandbox, tags: list[str], config: dict[str, Any]) -> None:
        present = vm_config.split_tags(config.get("tags"))
        # Keep tags that other people put on the VM.
        target_tags = (present - set(sandbox.tags)) | set(tags) | {identity.OUR_TAG}
        if tags != sorted(sandbox.tags):
            self.new["tags"], self.before["tags"] = tags, sorted(sandbox.tags)
        if target_tags != present and "tags" in self.new:
            self.changes["tags"] = ";".join(sorted(target_tags))

    def check(self, ctx: Context) -> None:
        """Raise InvalidInput, before the VM is stopped, for values with which Proxmox VE would not start the VM."""
        if "cores" in self.new:
            templates.check_cores(ctx, self.new["cores"], self.located.config, str(self.located.node), "VM")

    @property
    def needs_stop(self) -> bool:
        return any(name in self.new for name in _STOPPED_ONLY)

    def make_outcome(self, word: str, sandbox: Sandbox) -> Outcome:
        return Outcome.of(word, sandbox, changed=True, extra={"after": dict(self.new), "before": dict(self.before)})


def _read_number(value: Any, default: int) -> int:
    """Return a number of the configuration. Memory may be written ``current=2048``."""
    text = str(value if value is not None else default).partition(",")[0].removeprefix("current=")
    return int(text) if text.isascii() and text.isdecimal() else default


def _require_writes(ctx: Context, sandbox: Sandbox) -> None:
    """Raise Kept without quorum. A VM could then be stopped, but neither changed nor started again."""
    try:
        ctx.cluster.require_quorum()
    except Kept as error:
        raise Kept(
            error.reason,
            f"sandbox {sandbox.vmid} was neither stopped nor changed, for the cluster takes no changes without "
            "quorum, and would not start it again; bring the other nodes back (pvecm status), then run again",
        ) from None


def _check_restart(ctx: Context, sandbox: Sandbox, spec: Spec, plan: _Plan, status: dict[str, Any]) -> bool:
    """Return whether the VM needs a restart. Raises StateConflict or InvalidInput when it is not allowed."""
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
