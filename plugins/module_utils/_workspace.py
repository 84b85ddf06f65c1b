# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wiring of agentlab_workspace: which operation a wanted state means."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ._core.context import Context
from ._core.errors import InvalidInput
from ._core.workspaces import workspace

# Options that only some states take.
_ONLY = {
    "size": ("present",),
    "storage": ("present",),
    "node": ("present",),
    "vmid": ("attached",),
    "sandbox": ("attached",),
    "ttl": ("attached",),
    "force": ("absent",),
}


def run(module: AnsibleModule, context: Context) -> dict[str, Any]:
    """Check what is asked for, do it, and answer in one shape for all states."""
    params = module.params
    state = params["state"]
    for option, states in _ONLY.items():
        if params.get(option) not in (None, False) and state not in states:
            raise InvalidInput(
                f"{option}: only with state={' or '.join(states)}, not with state={state}", option=option
            )
    previous = workspace.open_records(context).find(params["name"])
    if state == "present":
        result = workspace.ensure_present(
            context, params["name"], size=params["size"], storage=params["storage"], node=params["node"]
        )
    elif state == "attached":
        if params["vmid"] is None and params["sandbox"] is None:
            raise InvalidInput("vmid: state=attached needs vmid or sandbox", option="vmid")
        ttl = None if params["ttl"] is None else context.config.parse_ttl(params["ttl"])
        result = workspace.ensure_attached(
            context, params["name"], context.select_sandbox(vmid=params["vmid"], name=params["sandbox"]), ttl
        )
    elif state == "detached":
        result = workspace.ensure_detached(context, params["name"])
    else:
        result = workspace.ensure_absent(context, params["name"], force=params["force"])
    disk = result.workspace
    answer: dict[str, Any] = {
        "changed": result.changed,
        "outcome": result.outcome,
        "workspace": disk.public() if disk else None,
    }
    if module._diff:
        answer["diff"] = {
            "before": _describe(previous) if result.changed else {},
            "after": _describe(disk) if result.changed else {},
        }
    return answer


def _describe(disk: Any) -> dict[str, Any]:
    return {
        "state": disk.state if disk else None,
        "size": disk.size if disk else None,
        "vmid": disk.vmid if disk else None,
    }
