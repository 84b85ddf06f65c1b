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
  - Shows disks that outlive sandboxes, and who has them. The records answer; Proxmox VE is asked only with O(verify).
options:
  name:
    description: Name (or id) of one workspace.
    type: str
  states:
    description:
      - Only workspaces in these states, of V(CREATING), V(DETACHED), V(ATTACHING), V(ATTACHED), V(DETACHING),
        V(DELETING)
        and V(DELETED).
    type: list
    elements: str
  include_deleted:
    description: Whether deleted ones are shown too.
    type: bool
    default: false
  events:
    description: How many of the newest events of each are shown.
    type: int
    default: 0
  verify:
    description: Whether Proxmox VE is asked as well, for C(volume_present) and C(attached_to), the VMIDs of all VMs
      that name the volume.
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.attributes
seealso:
  - module: agentlab.proxmox.agentlab_workspace
"""

EXAMPLES = r"""
- name: All of them
  agentlab.proxmox.agentlab_workspace_info:
  register: found

- name: One of them, as Proxmox VE has it, and what became of it lately
  agentlab.proxmox.agentlab_workspace_info:
    name: project-x
    events: 10
    verify: true
"""

RETURN = r"""
workspaces:
  description: The workspaces in the order of their names, as in M(agentlab.proxmox.agentlab_workspace); with
    C(events); and with C(volume_present),
    C(attached_to), either null where it cannot be told, and C(unknown), a list of why.
  returned: always
  type: list
  elements: dict
count:
  description: How many there are.
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
