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
    before = workspace.records(context).find(params["name"])
    if state == "present":
        done = workspace.present(
            context, params["name"], size=params["size"], storage=params["storage"], node=params["node"]
        )
    elif state == "attached":
        if params["vmid"] is None and params["sandbox"] is None:
            raise InvalidInput("vmid: state=attached needs vmid or sandbox", option="vmid")
        ttl = None if params["ttl"] is None else context.config.parse_ttl(params["ttl"])
        done = workspace.attached(
            context, params["name"], context.select(vmid=params["vmid"], name=params["sandbox"]), ttl
        )
    elif state == "detached":
        done = workspace.detached(context, params["name"])
    else:
        done = workspace.absent(context, params["name"], force=params["force"])
    found = done.workspace
    result: dict[str, Any] = {
        "changed": done.changed,
        "outcome": done.outcome,
        "workspace": found.public() if found else None,
    }
    if module._diff:
        result["diff"] = {
            "before": _seen(before) if done.changed else {},
            "after": _seen(found) if done.changed else {},
        }
    return result


def _seen(found: Any) -> dict[str, Any]:
    return {
        "state": found.state if found else None,
        "size": found.size if found else None,
        "vmid": found.vmid if found else None,
    }
