# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve workspaces, the disks that outlive sandboxes."""

from __future__ import annotations

from typing import Any

from agentlab_core import states
from agentlab_core.errors import InvalidInput
from agentlab_core.sandboxes import create, destroy, wanted
from agentlab_core.vm import power
from agentlab_core.workspaces import workspace, workspace_disk

from . import upstream
from .answers import REMEDIES, Answer, answer_item
from .creation import read_creation_options
from .route import Call


def _answer_workspace(result: workspace.WorkspaceResult) -> Answer:
    shown = upstream.describe_workspace(result.workspace.public()) if result.workspace else {}
    return Answer(
        {**shown, "outcome": result.outcome, "changed": result.changed}, 201 if result.outcome == "created" else 200
    )


def list_workspaces(call: Call) -> Answer:
    answer = workspace.show(
        call.make_context(), states=call.query.get("state"), include_deleted=call.query.get("include_deleted", False)
    )
    return Answer({"workspaces": [upstream.describe_workspace(row) for row in answer["workspaces"]]})


def show_workspace(call: Call) -> Answer:
    return Answer(upstream.describe_workspace(workspace_disk.select(call.make_context(), call.ident).public()))


def create_workspace(call: Call) -> Answer:
    options = call.body
    size = options.get("size")
    if options.get("size_gb") is not None:
        if size is not None:
            raise InvalidInput("size_gb: give size or size_gb, not both", option="size_gb")
        size = f"{options['size_gb']}G"
    return _answer_workspace(
        workspace.ensure_present(
            call.make_context(), options["name"], size=size, storage=options.get("storage"), node=options.get("node")
        )
    )


def rebind_workspace(call: Call) -> Answer:
    """Move a workspace into a new sandbox. Stop the old sandbox first, so that it writes nothing during the move."""
    ctx = call.make_context()
    disk = workspace_disk.select(ctx, call.ident)
    options: dict[str, Any] = {name: call.body[name] for name in ("profile", "ttl_minutes") if name in call.body}
    # Check the new sandbox's options before the old one loses its disk.
    spec = wanted.make_spec(ctx, read_creation_options({**options, "workspace_id": disk.id}))
    old = ctx.records.get(disk.sandbox_uuid) if disk.sandbox_uuid else None
    if old is not None and old.live:
        if not call.body.get("keep_old", False):
            destroy.check(ctx, old, force=True)
        if old.state in (*states.POWERED, states.SUSPENDED):
            power.run(ctx, old, "stop")
    workspace.ensure_detached(ctx, disk.id)
    created = create.run(ctx, spec)
    call.service.note_lease_change()
    answer = answer_item(created)
    if created.failed or created.sandbox is None:
        return answer
    outcomes = [created]
    if old is not None and old.live and not call.body.get("keep_old", False):
        outcomes += destroy.destroy_several(ctx, [ctx.records.get(old.uuid)], force=True)
    moved = workspace_disk.select(ctx, disk.id)
    body = {
        "workspace": upstream.describe_workspace(moved.public()),
        "sandbox": created.sandbox.public(),
        "old_vmid": old.vmid if old is not None else None,
    }
    if any(outcome.failed for outcome in outcomes):
        return Answer(
            {
                **body,
                "warnings": [
                    str(outcome.explain(REMEDIES) or outcome.reason) for outcome in outcomes if outcome.failed
                ],
            },
            207,
            outcomes,
        )
    return Answer({**body, "warnings": []}, 200, outcomes)


def attach_workspace(call: Call) -> Answer:
    ctx = call.make_context()
    ttl = call.body.get("ttl")
    return _answer_workspace(
        workspace.ensure_attached(
            ctx, call.ident, ctx.select_sandbox(call.body["vmid"]), None if ttl is None else ctx.config.parse_ttl(ttl)
        )
    )


def detach_workspace(call: Call) -> Answer:
    return _answer_workspace(workspace.ensure_detached(call.make_context(), call.ident))


def destroy_workspace(call: Call) -> Answer:
    ctx = call.make_context()
    # The module accepts a workspace that is absent already. Here a client names a workspace that must exist.
    return _answer_workspace(
        workspace.ensure_absent(ctx, workspace_disk.select(ctx, call.ident).id, force=call.body.get("force", False))
    )
