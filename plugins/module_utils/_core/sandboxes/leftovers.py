# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Clear what a sandbox leaves outside its VM. Every way to DESTROYED calls this once the VM's absence is proven."""

from __future__ import annotations

from ..context import Context
from ..guest import snippets
from ..model import Sandbox
from ..store.records import Claim
from ..workspaces import workspace_disk


def clear(ctx: Context, claim: Claim, sandbox: Sandbox) -> None:
    """Remove the snippet and free the workspace. Idempotent.

    Raises Kept when that is not possible; the record then stays as it is.
    """
    snippets.remove(ctx, sandbox)
    workspace_disk.free_workspace(ctx, claim, sandbox)
