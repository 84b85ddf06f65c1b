#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_lease
short_description: Renew the leases of sandboxes
version_added: 1.0.0
description:
  - Sets the end of a running sandbox's lease to now plus O(ttl), capped at the configured maximum lifetime.
  - A late renewal fails. It never succeeds for a sandbox that is being expired or destroyed.
options:
  ttl:
    description: Length of the lease from now, as minutes (V(120)) or a duration (V(90s), V(30m), V(2h), V(1.5h),
      V(1d12h)).
    type: str
    required: true
  min_remaining:
    description:
      - Renew only if the lease ends sooner than this, as minutes or a duration. A play that renews on every run then
        changes something only when a renewal is due.
      - Without this option, repeating a renewal within a minute changes nothing.
    type: str
  allow_shorten:
    description: Whether the renewal may make the lease end earlier than now set.
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.select
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
- name: Renew a lease for two hours
  agentlab.proxmox.agentlab_lease:
    vmid: 1000
    ttl: 2h

- name: Renew a lease for two hours if it ends within half an hour
  agentlab.proxmox.agentlab_lease:
    name: agent-1
    ttl: 2h
    min_remaining: 30m
"""

RETURN = r"""
sandboxes:
  description: The sandboxes after the renewal, as in M(agentlab.proxmox.agentlab_sandbox).
  returned: always
  type: list
  elements: dict
results:
  description: The outcome for each sandbox, as in M(agentlab.proxmox.agentlab_sandbox), with C(lease_expires_at),
    C(granted_seconds) and C(capped).
  returned: always
  type: list
  elements: dict
failed_count:
  description: Number of sandboxes whose renewal failed.
  returned: always
  type: int
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    **_adapter.SELECT_ARGS,
    "ttl": {"type": "str", "required": True},
    "min_remaining": {"type": "str"},
    "allow_shorten": {"type": "bool", "default": False},
}


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _lease

    return _lease.run(module, context)


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(
        ARGUMENT_SPEC,
        run_module,
        module_class=module_class,
        mutually_exclusive=[_adapter.SELECT_EXCLUSIVE[0]],
        required_one_of=[_adapter.SELECT_EXCLUSIVE[0]],
    )


if __name__ == "__main__":
    main()
