# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a sandbox leaves outside its VM. Every way to DESTROYED comes through here once the VM is proven to be gone."""

from __future__ import annotations

from ..context import Context
from ..guest import snippets
from ..model import Sandbox
from ..store.records import Claim
from ..workspaces import workspace_disk


def clear(ctx: Context, claim: Claim, sandbox: Sandbox) -> None:
    """Remove what is left, and free its workspace; Kept when that cannot be done, and the record stays as it is.

    Doing it again does no harm.
    """
    snippets.remove(ctx, sandbox)
    workspace_disk.released(ctx, claim, sandbox)
