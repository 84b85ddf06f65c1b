#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_sandbox_info
short_description: Show sandboxes, their events, and whether Proxmox VE agrees
version_added: 1.0.0
description:
  - Shows sandboxes from the records. Without O(verify) and O(nodes) the module sends no request to Proxmox VE.
options:
  states:
    description:
      - Show only sandboxes in these states, of V(REQUESTED), V(PROVISIONING), V(BOOTING), V(READY), V(RUNNING),
        V(SUSPENDED), V(COMPLETED), V(FAILED), V(TIMEOUT), V(STOPPED) and V(DESTROYED).
    type: list
    elements: str
  profile:
    description: Show only sandboxes of this profile.
    type: str
  tags:
    description: Show only sandboxes with at least one of these tags.
    type: list
    elements: str
  expired:
    description: Show only sandboxes whose lease is over (V(true)) or not over (V(false)).
    type: bool
  include_destroyed:
    description: Whether to show destroyed sandboxes too.
    type: bool
    default: false
  events:
    description: Number of the newest events to show of each sandbox.
    type: int
    default: 0
  verify:
    description:
      - Whether to read the status and identity of each VM from Proxmox VE, and to report the drift.
      - If a VM runs with its guest agent enabled, and its address is missing or more than five minutes old, the module
        also asks the guest for its address. C(ip) and C(ip_seen_at) then have the new values. The record is not
        changed. A task asks at most 64 guests, for at most ten seconds.
    type: bool
    default: false
  verify_identity:
    description:
      - Whether O(verify) also reads the configuration of each VM and judges whether the VM belongs to the sandbox.
      - With V(false), the module only compares the records with the cluster's list of VMs. That takes one request for
        any number of sandboxes.
    type: bool
    default: true
  profiles:
    description: Whether to return the profiles.
    type: bool
    default: false
  nodes:
    description:
      - Whether to return the load of each node, and the node that a new sandbox of the configured template would get.
      - The module sends the same requests to Proxmox VE as for the placement of a new sandbox.
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.select
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
- name: Show the running sandboxes
  agentlab.proxmox.agentlab_sandbox_info:
    states: [RUNNING]

- name: Show a sandbox with its last ten events, and whether its VM exists and belongs to it
  agentlab.proxmox.agentlab_sandbox_info:
    vmid: 1000
    events: 10
    verify: true

- name: Compare thousands of records with the list of VMs, in one request
  agentlab.proxmox.agentlab_sandbox_info:
    verify: true
    verify_identity: false
"""

RETURN = r"""
sandboxes:
  description: The sandboxes, sorted by VMID. Each has the values of M(agentlab.proxmox.agentlab_sandbox), and the
    following values if the option is set.
  returned: always
  type: list
  elements: dict
  contains:
    events: {description: The newest events., type: list, elements: dict, returned: with O(events)}
    vm_status:
      description: 'The status of the VM in Proxmox VE: running, stopped, hibernated, absent or unknown.'
      type: str
      returned: with O(verify)
    identity:
      description: One of V(MATCH), V(FOREIGN), V(AMBIGUOUS), V(UNBOUND) and V(UNKNOWN); null without
        O(verify_identity).
      type: str
      returned: with O(verify)
    drift: {description: 'The difference between record and VM, or null.', type: str, returned: with O(verify)}
count:
  description: Number of sandboxes.
  returned: always
  type: int
profiles:
  description: The profiles. Each has the options that it sets, and C(connection), the connection for tasks inside the
    sandbox, or null.
  returned: with O(profiles)
  type: list
  elements: dict
nodes:
  description: The nodes, sorted by name.
  returned: with O(nodes)
  type: list
  elements: dict
  contains:
    node: {description: Name of the node., type: str}
    chosen: {description: Whether a new sandbox would go to this node., type: bool}
    reason: {description: 'Why or why not, in a word of docs/placement.md.', type: str}
    message: {description: 'Why or why not, as a sentence.', type: str}
    free_memory:
      description: Memory in MiB that is neither used nor promised to sandboxes; null without Sys.Audit on the node.
      type: int
    sandboxes: {description: Number of sandboxes in these records that are or will be on the node., type: int}
by_state:
  description: Number of sandboxes in each state.
  returned: always
  type: dict
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput

ARGUMENT_SPEC = {
    **_adapter.SELECT_ARGS,
    "states": {"type": "list", "elements": "str"},
    "profile": {"type": "str"},
    "tags": {"type": "list", "elements": "str"},
    "expired": {"type": "bool"},
    "include_destroyed": {"type": "bool", "default": False},
    "events": {"type": "int", "default": 0},
    "verify": {"type": "bool", "default": False},
    "verify_identity": {"type": "bool", "default": True},
    "profiles": {"type": "bool", "default": False},
    "nodes": {"type": "bool", "default": False},
}


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.views import info

    params = module.params
    if params["events"] < 0:
        raise InvalidInput(
            f"events: {params['events']} is negative. Valid: 0 or more", option="events", value=params["events"]
        )
    # An empty list selects no sandbox. The module shows all sandboxes only without any of the three options.
    chosen = any(params[name] is not None for name in _adapter.SELECT_ARGS)
    selection = info.Filter(
        ids=_adapter.ids(module) if chosen else None,
        states=_adapter.states_of(module, states.STATES),
        profile=params["profile"],
        tags=_adapter.tags(module),
        expired=params["expired"],
        include_destroyed=params["include_destroyed"],
    )
    result = dict(
        info.show(
            context, selection, events=params["events"], verify=params["verify"], identities=params["verify_identity"]
        ),
        changed=False,
    )
    if params["profiles"]:
        from ansible_collections.agentlab.proxmox.plugins.module_utils._core import profiles

        result["profiles"] = [profile.public() for profile in profiles.load_all(context.config.profiles_dir).values()]
    if params["nodes"]:
        from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import place

        result["nodes"] = place.show_load(context)
    return result


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(
        ARGUMENT_SPEC, run_module, module_class=module_class, mutually_exclusive=[_adapter.SELECT_EXCLUSIVE[0]]
    )


if __name__ == "__main__":
    main()
