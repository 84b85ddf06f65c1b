# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wiring of agentlab_sandbox: which operation a wanted state means, for one sandbox or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

from . import _adapter
from ._core.context import Context, make_failure
from ._core.errors import AgentlabError, Busy, InvalidInput, Kept, NotFound
from ._core.model import Outcome, Sandbox

if TYPE_CHECKING:
    from ._core.sandboxes.spec import Spec


def run(module: AnsibleModule, context: Context, creation: Sequence[str]) -> dict[str, Any]:
    """Check what is asked for as a whole, then do it item by item."""
    params = module.params
    state = params["state"]
    if params["force"] and state not in ("absent", "stopped"):
        raise InvalidInput(f"force: only with state=absent or state=stopped, not with state={state}", option="force")
    creation_options = [name for name in creation if params.get(name) is not None]
    creation_options += [name for name in ("update", "allow_restart") if params.get(name)]
    if state != "present" and creation_options:
        raise InvalidInput(
            f"{creation_options[0]}: only with state=present, not with state={state}", option=creation_options[0]
        )
    if state != "present" and params.get("items") is not None:
        raise InvalidInput(f"items: only with state=present, not with state={state}", option="items")
    ids = _adapter.ids(module)
    if not ids and state != "present" and params.get("vmids") is None:
        raise InvalidInput(f"vmid: state={state} needs vmid, vmids or name", option="vmid")
    if state == "present":
        outcomes = _create(module, context, ids)
    elif state == "absent":
        outcomes = _destroy(context, ids, params["force"])
    else:
        outcomes = _change_power(context, ids, state, params["force"], params["wait_for_ip"])
    return _adapter.answer(
        outcomes,
        single=params.get("vmids") is None and params.get("items") is None,
        diff=module._diff,
        items=params.get("items"),
    )


def _catch_failure(work: Callable[[Sandbox], Outcome], sandbox: Sandbox) -> Outcome:
    try:
        return work(sandbox)
    except AgentlabError as error:
        return make_failure(sandbox, error)


def _create(module: AnsibleModule, context: Context, ids: list[dict[str, Any]]) -> list[Outcome]:
    """Create, or bring to what is asked for, each of the sandboxes, several at once."""
    import dataclasses

    from ._core.sandboxes import wanted

    params = module.params
    if params.get("items") is not None:
        creations = _check_items(context, params, params["items"])
    else:
        several = params.get("vmids") is not None
        if len(ids) > 1 and params.get("workspace") is not None:
            raise InvalidInput(
                "workspace: is attached to one sandbox at a time. Give one VMID, or items with a workspace each",
                option="workspace",
            )
        spec = wanted.make_spec(context, {**params, "vmid": None, "name": None if several else params.get("name")})
        creations = [
            (params, dataclasses.replace(spec, vmid=ident.get("vmid"))) for ident in (ids if several else ids or [{}])
        ]
    context.named_vmids = frozenset(spec.vmid for _options, spec in creations if spec.vmid is not None)
    return context.run_each(lambda creation: _create_item(context, *creation), creations)


def _check_items(
    context: Context, params: dict[str, Any], items: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], Spec]]:
    """Return the options and the Spec of each item; InvalidInput, by the item's number, before anything is done."""
    from ._core.sandboxes import wanted

    common = {name: value for name, value in params.items() if name not in ("items", "vmid", "vmids", "name")}
    checked: list[tuple[dict[str, Any], Spec]] = []
    first_use: dict[tuple[str, object], int] = {}
    sandboxes: dict[str, int] = {}
    for number, item in enumerate(items):
        options = {**common, **{name: value for name, value in item.items() if value is not None}}
        where = _adapter.place_item(number, item)
        try:
            spec = wanted.make_spec(context, options)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error.message}", option="items", index=number) from None
        if spec.name is None and spec.vmid is None:
            raise InvalidInput(
                f"{where}: has neither name nor vmid, so a second run would create it again. Give one of the two",
                option="items",
                index=number,
            )
        for key in (("name", spec.name), ("vmid", spec.vmid), ("workspace", spec.workspace)):
            if key[1] is not None and key in first_use:
                raise InvalidInput(
                    f"{where}: {key[0]} {key[1]!r} is also that of items[{first_use[key]}]. Give each item one of its "
                    "own",
                    option="items",
                    index=number,
                )
            first_use[key] = number
        sandbox = _find_sandbox(context, spec)
        if sandbox is not None and sandboxes.setdefault(sandbox.uuid, number) != number:
            raise InvalidInput(
                f"{where}: is the sandbox of items[{sandboxes[sandbox.uuid]}] too, VMID {sandbox.vmid} with the name "
                f"{sandbox.name!r}. Give each sandbox one item",
                option="items",
                index=number,
            )
        checked.append((options, spec))
    return checked


def _find_sandbox(context: Context, spec: Spec) -> Sandbox | None:
    """Return the live sandbox of the spec; None also if VMID and name belong to different sandboxes.

    An unreadable record gives None too. The creation itself then fails with the cause.
    """
    from ._core.sandboxes import create

    try:
        return create.find_existing(context, spec)
    except AgentlabError:
        return None


def _create_item(context: Context, params: dict[str, Any], spec: Spec) -> Outcome:
    """Return the outcome of one creation. A failure stops no other creation."""
    before = _find_sandbox(context, spec)
    try:
        return _ensure(context, params, spec)
    except AgentlabError as error:
        return _make_failure(context, spec, before, error)
    except Exception as error:  # the outcomes of the others must not be lost with this one
        return _make_failure(context, spec, before, _adapter.explain_unforeseen(error))


def _make_failure(context: Context, spec: Spec, before: Sandbox | None, error: AgentlabError) -> Outcome:
    """Return the outcome of a failed creation. ``before``: the sandbox before the task.

    An interrupted or failed creation leaves a record. The outcome shows that record, because its VM may exist.
    """
    sandbox = _find_sandbox(context, spec)
    upid = error.detail.get("upid") or (error.detail.get("cause") or {}).get("upid")
    placement = error.detail.get("placement")
    return Outcome(
        "failed",
        vmid=sandbox.vmid if sandbox else spec.vmid,
        uuid=sandbox.uuid if sandbox else None,
        name=sandbox.name if sandbox else spec.name,
        previous_state=before.state if before else None,
        state=sandbox.state if sandbox else None,
        reason=error.reason if isinstance(error, Kept) else error.code,
        message=error.message,
        remedy=error.remedy,
        # Busy: the record is the work of another run.
        changed=sandbox is not None
        and not isinstance(error, Busy)
        and (before is None or before.state != sandbox.state),
        failed=True,
        upids=[upid] if upid else [],
        sandbox=sandbox,
        error=error,
        extra={"placement": placement} if placement else {},
    )


def _ensure(context: Context, params: dict[str, Any], spec: Spec) -> Outcome:
    """Create one sandbox, or bring what is there to what is asked for."""
    from ._core import states
    from ._core.sandboxes import create
    from ._core.vm import address

    spec.check()
    sandbox = create.find_existing(context, spec)
    if sandbox is not None and sandbox.state == states.FAILED and params["protected"] is False:
        # Its creation failed, so it can only be removed; its protection, which bars that, has to be taken off first.
        amended = create.amend(context, sandbox, protected=False)
        if amended.changed:
            return amended
    outcome = create.run(context, spec)
    if sandbox is not None and outcome.outcome in ("unchanged", "updated") and outcome.sandbox is not None:
        # Given as false they are to be switched off; left out they stay as they are.
        second = create.amend(context, outcome.sandbox, protected=params["protected"], keepalive=params["keepalive"])
        if second.changed:
            outcome = create.add_outcome(outcome, second)
        return address.add_address(context, outcome, started=False) if params["wait_for_ip"] else outcome
    return outcome


def _destroy(context: Context, ids: list[dict[str, Any]], force: bool) -> list[Outcome]:
    from ._core.sandboxes import destroy

    selected: list[Sandbox | Outcome] = []
    for ident in ids:
        try:
            selected.append(context.select_sandbox(**ident))
        except NotFound:
            selected.append(
                Outcome(
                    "not_found",
                    vmid=ident.get("vmid"),
                    name=ident.get("name"),
                    reason="no record; a VM without one is never touched",
                )
            )
    destroyed = iter(
        destroy.destroy_several(context, [entry for entry in selected if isinstance(entry, Sandbox)], force)
    )
    return [entry if isinstance(entry, Outcome) else next(destroyed) for entry in selected]


def _change_power(
    context: Context, ids: list[dict[str, Any]], state: str, force: bool, wait_for_ip: bool
) -> list[Outcome]:
    from ._core.vm import address, power

    operation = power.get_operation(state)
    # All ids are looked up before anything is done.
    sandboxes = [context.select_sandbox(**ident) for ident in ids]

    def work(sandbox: Sandbox) -> Outcome:
        outcome = power.run(context, sandbox, operation, force=force)
        # A guest that was started may have got another address.
        return address.add_address(context, outcome, started=True) if wait_for_ip and state == "started" else outcome

    return context.run_each(lambda sandbox: _catch_failure(work, sandbox), sandboxes)
