# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Map each type of error to its HTTP status. A test fails for a type that is missing here."""

from __future__ import annotations

from agentlab_core import errors
from agentlab_core.guest.agent import GuestFailed, GuestRefused
from agentlab_core.guest.cloud_init import CloudInitFailed
from agentlab_core.vm.address import AgentUnusable
from agentlab_core.workspaces.workspace_disk import WorkspaceRefused

STATUSES: dict[type[errors.AgentlabError], int] = {
    # The request is invalid, or names an object that does not exist.
    errors.InvalidInput: 400,
    errors.NotFound: 404,
    # The request is valid, but the present state forbids it.
    errors.StateConflict: 409,
    errors.Kept: 409,
    errors.Busy: 409,
    errors.ClaimLost: 409,
    errors.RecordChanged: 409,
    errors.GuardTripped: 409,
    errors.Frozen: 409,
    errors.CreationFailed: 409,
    WorkspaceRefused: 409,
    AgentUnusable: 409,
    GuestRefused: 409,
    CloudInitFailed: 409,
    # The fault is in the daemon: its files, its records, its code.
    errors.AgentlabError: 500,
    errors.InternalError: 500,
    errors.ConfigError: 500,
    errors.StoreError: 500,
    errors.DamagedRecord: 500,
    # Proxmox VE refused a request, or its task failed.
    errors.ProxmoxError: 502,
    errors.ApiError: 502,
    errors.AccessDenied: 502,
    GuestFailed: 502,
    errors.TaskFailed: 502,
    errors.TaskUnknown: 502,
    # The client may ask again later.
    errors.Unreachable: 503,
    errors.Stopping: 503,
    errors.HostError: 503,
    errors.StoreUnavailable: 503,
    # The time limit has passed; Proxmox VE may still carry the request out.
    errors.OutcomeUnknown: 504,
    errors.TaskTimeout: 504,
}
# The reason of a failed outcome is an error's code. Subclasses may share a code only if they share the status.
_BY_CODE = {kind.code: status for kind, status in STATUSES.items()}
# Every other reason of an outcome ("protected", "unknown", ...) says why a sandbox was kept.
_LEFT_ALONE = 409


def get_status(code: str) -> int:
    """Return the HTTP status of an error's code or of a failed outcome's reason."""
    return _BY_CODE.get(code, _LEFT_ALONE)
