# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The HTTP status of each type of error. A type that is not in the table has no status, and a test fails."""

from __future__ import annotations

from agentlab_core import errors
from agentlab_core.guest.agent import GuestFailed, GuestRefused
from agentlab_core.guest.cloud_init import CloudInitFailed
from agentlab_core.vm.address import AgentUnusable
from agentlab_core.workspaces.workspace_disk import WorkspaceRefused

STATUSES: dict[type[errors.AgentlabError], int] = {
    # The request makes no sense, or names nothing that there is.
    errors.InvalidInput: 400,
    errors.NotFound: 404,
    # The request is sound, and the state of things forbids it.
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
    # The daemon itself: its files, its records, its code.
    errors.AgentlabError: 500,
    errors.ConfigError: 500,
    errors.StoreError: 500,
    errors.DamagedRecord: 500,
    # Proxmox VE refuses, or its task failed.
    errors.ProxmoxError: 502,
    errors.ApiError: 502,
    errors.AccessDenied: 502,
    GuestFailed: 502,
    errors.TaskFailed: 502,
    errors.TaskUnknown: 502,
    # Ask again later.
    errors.Unreachable: 503,
    errors.Stopping: 503,
    errors.HostError: 503,
    errors.StoreUnavailable: 503,
    # The time is up; Proxmox VE may still do it.
    errors.OutcomeUnknown: 504,
    errors.TaskTimeout: 504,
}
# Outcomes carry an error's code as their reason. Subclasses share a code only with the same status.
_BY_CODE = {kind.code: status for kind, status in STATUSES.items()} | {"internal": 500}
# Every other reason of an outcome ("protected", "unknown", ...) says why a sandbox was left alone.
_LEFT_ALONE = 409


def status_of(code: str) -> int:
    """Return the HTTP status of an error's code or of a failed outcome's reason."""
    return _BY_CODE.get(code, _LEFT_ALONE)
