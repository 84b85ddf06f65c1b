# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of workspaces share: one call for each operation, and what must be so afterwards."""

from __future__ import annotations

from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.workspaces import Workspace
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.lab import Lab

STORAGES = ("local-lvm", "local", "shared")


def make(lab: Lab, name: str = "w1", storage: str = "local-lvm", **values: Any) -> Workspace:
    """Create a workspace and return its record."""
    made = workspace.ensure_present(
        lab.context(), name, size=values.pop("size", "8G"), storage=storage, **values
    ).workspace
    assert made is not None
    return made


def attach(lab: Lab, name: str, vmid: int, ttl: int | None = None, **options: Any) -> workspace.WorkspaceResult:
    """Attach a workspace to the sandbox with that VMID, for ``ttl`` seconds if given."""
    ctx = lab.context(**options)
    return workspace.ensure_attached(ctx, name, ctx.select_sandbox(vmid), ttl)


def detach(lab: Lab, name: str, **options: Any) -> workspace.WorkspaceResult:
    """Detach a workspace. ``options`` are configuration keys of the run."""
    return workspace.ensure_detached(lab.context(**options), name)


def now(lab: Lab, name: str = "w1") -> Workspace:
    """Return the record of a workspace as it is now."""
    record = workspace.open_records(lab.context()).find(name)
    assert record is not None
    return record


def assert_kept_whole(lab: Lab, workspace_before: Workspace) -> None:
    """Assert that the volume is there, under its name, and that no VM has it."""
    assert lab.pve.volumes_of(workspace_before.owner_vmid) == [workspace_before.volume]
    assert not any(workspace_before.volume in str(value) for vm in lab.pve.vms for value in vm.config.values())
    again = now(lab, workspace_before.name)
    assert (again.state, again.sandbox_uuid, again.slot, again.vmid) == ("DETACHED", None, None, None)


def list_mentions(lab: Lab, record: Workspace) -> list[str]:
    """Return VMID:key of each configuration line that names the workspace's volume."""
    return [f"{vm.vmid}:{key}" for vm in lab.pve.vms for key, value in vm.config.items() if record.volume in str(value)]
