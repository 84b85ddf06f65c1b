#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_reconcile
short_description: Compare the records of sandboxes with Proxmox VE and repair the drift
version_added: 1.0.0
description:
  - Finishes what interrupted runs left, lets leases that are over expire, and compares every record with its VM.
    Check mode only reports.
  - A VM that is absent in two passes in a row becomes C(DESTROYED). A VM without a record is reported and never
    adopted. An unreachable node changes nothing.
  - When a repair fails, the task fails after all others were tried, with all differences in the answer.
options:
  adopt_cluster:
    description:
      - Note the cluster that O(api_host) leads to as the one the records belong to, before comparing.
      - Only for the same cluster after it got a new certificate authority, or for a node that joined a cluster.
        Records never change clusters.
    type: bool
    default: false
  release_leases:
    description:
      - Let leases end, and prune and cleanup go on, after an older copy of the records was put in place, or cleanup
        was frozen.
      - Look at the sandboxes first, and renew what is still needed. Leases that are over by the copy end in the
        same run.
    type: bool
    default: false
    version_added: 1.1.0
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.wait
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
- name: Report the drift
  agentlab.proxmox.agentlab_reconcile:
  check_mode: true

- name: Repair it
  agentlab.proxmox.agentlab_reconcile:
"""

RETURN = r"""
drift:
  description: The differences found.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description:
        - One of V(interrupted), V(lease_expired), V(still_running), V(absent), V(back), V(vmid_reused), V(stopped),
          V(moved), V(running), V(stale),
          V(address), V(unrecorded), V(node_offline), V(ambiguous), V(locked) and V(unknown).
      type: str
      returned: always
    action: {description: What is done about it; V(none) where nothing may be., type: str, returned: always}
    evidence: {description: What shows it., type: dict, returned: always}
    vmid: {description: The VMID., type: int, returned: always}
    uuid: {description: The sandbox's own UUID., type: str, returned: always}
    state: {description: The state the record was in., type: str, returned: always}
    applied: {description: Whether the action was carried out., type: bool, returned: always}
    error: {description: 'Why it could not be, if so.', type: str, returned: always}
count:
  description: How many.
  returned: always
  type: int
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    "wait_timeout": {"type": "int"},
    "adopt_cluster": {"type": "bool", "default": False},
    "release_leases": {"type": "bool", "default": False},
}


def _release_hold(module, context):
    """Release the hold on leases and cleanup. Return whether there was one."""
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import timeguard
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import cleanup

    # hold_leases also detects an older copy of the records, if no run has looked at them since the restore.
    hold = timeguard.hold_leases(context) or timeguard.read_freeze(context)
    if hold and not module.check_mode:
        cleanup.release(context)
    return bool(hold)


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile

    released = module.params["release_leases"] and _release_hold(module, context)
    drifts = reconcile.run(context, apply=not module.check_mode, adopt_cluster=module.params["adopt_cluster"])
    drift = [entry.public() for entry in drifts]
    changes = [entry for entry in drifts if (entry.applied if not module.check_mode else entry.would_change)]
    result = {"changed": bool(changes or released), "drift": drift, "count": len(drift)}
    wrong = [entry for entry in drifts if entry.error]
    if wrong:
        result["failed"] = True
        result["msg"] = (
            f"{len(wrong)} of {len(drift)} differences could not be repaired; the first, sandbox "
            f"{wrong[0].public()['vmid']}: {wrong[0].error}"
        )
    if module._diff:
        result["diff"] = {
            "before": {f"sandbox {entry.public()['vmid']}": entry.kind for entry in changes},
            "after": {f"sandbox {entry.public()['vmid']}": entry.action for entry in changes},
        }
    return result


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class)


if __name__ == "__main__":
    main()
