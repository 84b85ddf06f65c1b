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
  - Shows sandboxes from the records. Without O(verify) it asks Proxmox VE nothing.
options:
  states:
    description:
      - Only sandboxes in these states, of V(REQUESTED), V(PROVISIONING), V(BOOTING), V(READY), V(RUNNING),
        V(SUSPENDED),
        V(COMPLETED), V(FAILED), V(TIMEOUT), V(STOPPED) and V(DESTROYED).
    type: list
    elements: str
  profile:
    description: Only sandboxes of this profile.
    type: str
  tags:
    description: Only sandboxes with at least one of these tags.
    type: list
    elements: str
  expired:
    description: Only sandboxes whose lease is over (V(true)) or not over (V(false)).
    type: bool
  include_destroyed:
    description: Whether to show destroyed ones too.
    type: bool
    default: false
  events:
    description: How many of the newest events to show of each sandbox.
    type: int
    default: 0
  verify:
    description:
      - Whether to ask Proxmox VE for each VM's status and identity, and to name the drift.
      - Where a VM runs, its guest agent is on, and the address is missing or more than five minutes old, the guest is
        asked for its address. C(ip) and C(ip_seen_at) are those of now then; the record is not
        written. One task asks 64 guests at most, for ten seconds.
    type: bool
    default: false
  verify_identity:
    description:
      - Whether O(verify) also reads each VM's configuration and judges whose it is.
      - When V(false), the records are only compared with the cluster's list of VMs; that is one request, however
        many sandboxes there are.
    type: bool
    default: true
  profiles:
    description: Whether to return the profiles too.
    type: bool
    default: false
  nodes:
    description:
      - Whether to return the load of each node, and which node would take a new sandbox of the configured template.
      - Asks Proxmox VE for the list of all resources, and as much as the choice of a node for a new sandbox.
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.select
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
- name: Show the sandboxes that run
  agentlab.proxmox.agentlab_sandbox_info:
    states: [RUNNING]

- name: Show one with its last ten events, and whether its VM is there and ours
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
  description: The sandboxes, in the order of their VMIDs. As in M(agentlab.proxmox.agentlab_sandbox), and with the
    following where asked for.
  returned: always
  type: list
  elements: dict
  contains:
    events: {description: The newest events, type: list, elements: dict, returned: with O(events)}
    vm_status:
      description: 'What Proxmox VE says of the VM: running, stopped, hibernated, absent or unknown'
      type: str
      returned: with O(verify)
    identity:
      description: One of V(MATCH), V(FOREIGN), V(AMBIGUOUS), V(UNBOUND) and V(UNKNOWN); null without
        O(verify_identity).
      type: str
      returned: with O(verify)
    drift: {description: 'How record and VM differ, or null', type: str, returned: with O(verify)}
count:
  description: How many.
  returned: always
  type: int
profiles:
  description: The profiles, with the options that each sets, and the C(connection) that it names for tasks inside,
    or null.
  returned: with O(profiles)
  type: list
  elements: dict
nodes:
  description: The nodes, in the order of their names.
  returned: with O(nodes)
  type: list
  elements: dict
  contains:
    node: {description: Name of the node, type: str}
    chosen: {description: Whether a new sandbox would go there, type: bool}
    reason: {description: 'Why, or why not, as a word of the page on placement', type: str}
    message: {description: The same as a sentence, type: str}
    free_memory:
      description: Free memory in MiB beyond what is used and promised; null without Sys.Audit on the node.
      type: int
    sandboxes: {description: How many sandboxes of these records are on the node or on their way to it, type: int}
by_state:
  description: How many of them in each state.
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
    # An empty list selects no sandbox. All sandboxes are shown only without any of the three options.
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
