#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_workspace_info
short_description: Show workspaces
version_added: 1.0.0
description:
  - Shows workspaces, which are disks that outlive sandboxes, and the sandboxes that have them. Without O(verify) the
    module only reads the records, and sends no request to Proxmox VE.
options:
  name:
    description: Name or id of a workspace. Without this option, all workspaces.
    type: str
  states:
    description:
      - Show only workspaces in these states, of V(CREATING), V(DETACHED), V(ATTACHING), V(ATTACHED), V(DETACHING),
        V(DELETING) and V(DELETED).
    type: list
    elements: str
  include_deleted:
    description: Whether to show deleted workspaces too.
    type: bool
    default: false
  events:
    description: Number of the newest events to show of each workspace.
    type: int
    default: 0
  verify:
    description: Whether to read from Proxmox VE whether the volume exists (C(volume_present)), and the VMIDs of all VMs
      that have it attached (C(attached_to)).
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.attributes
seealso:
  - module: agentlab.proxmox.agentlab_workspace
"""

EXAMPLES = r"""
- name: Show all workspaces
  agentlab.proxmox.agentlab_workspace_info:
  register: shown

- name: Show a workspace with its last ten events, and its state in Proxmox VE
  agentlab.proxmox.agentlab_workspace_info:
    name: project-x
    events: 10
    verify: true
"""

RETURN = r"""
workspaces:
  description: The workspaces, sorted by name, as in M(agentlab.proxmox.agentlab_workspace). With O(events) each has
    C(events). With O(verify) each has C(volume_present) and C(attached_to), null if they cannot be read, and
    C(unknown), the list of reasons.
  returned: always
  type: list
  elements: dict
count:
  description: Number of workspaces.
  returned: always
  type: int
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    "name": {"type": "str"},
    "states": {"type": "list", "elements": "str"},
    "include_deleted": {"type": "bool", "default": False},
    "events": {"type": "int", "default": 0},
    "verify": {"type": "bool", "default": False},
}


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

    params = module.params
    return workspace.show(
        context,
        name=params["name"],
        states=_adapter.states_of(module, workspace.STATES),
        include_deleted=params["include_deleted"],
        events=params["events"],
        verify=params["verify"],
    )


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class)


if __name__ == "__main__":
    main()
