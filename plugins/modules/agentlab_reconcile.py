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
  - Finishes the operations of interrupted runs, expires leases that are over, and compares every record with its VM.
    Check mode only reports.
  - A sandbox whose VM is absent in two passes in a row becomes C(DESTROYED). A VM without a record is reported and
    never adopted. If a node is unreachable, the records of its sandboxes stay as they are.
  - If a repair fails, the module tries all other repairs, then fails with all differences in the result.
options:
  adopt_cluster:
    description:
      - Whether to store the cluster of O(api_host) as the cluster of the records, before comparing.
      - Use this option only if the same cluster has a new certificate authority, or if the node has joined a cluster.
        Records never move to another cluster.
    type: bool
    default: false
  release_leases:
    description:
      - Whether to release leases, prune and cleanup. They are held after an older copy of the records was restored, or
        after cleanup was frozen.
      - Look at the sandboxes first, and renew the leases that are still needed. Leases that are over according to the
        restored copy end in the same run.
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

- name: Repair the drift
  agentlab.proxmox.agentlab_reconcile:
"""

RETURN = r"""
drift:
  description: The differences between the records and Proxmox VE.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description:
        - One of V(interrupted), V(lease_expired), V(still_running), V(absent), V(back), V(vmid_reused), V(stopped),
          V(moved), V(running), V(suspended), V(stale), V(address), V(workspace), V(unrecorded), V(node_offline),
          V(ambiguous), V(locked) and V(unknown).
      type: str
      returned: always
    action: {description: The action on the difference. V(none) if no action is allowed., type: str, returned: always}
    evidence: {description: The facts that show the difference., type: dict, returned: always}
    vmid: {description: The VMID of the sandbox or VM., type: int, returned: always}
    uuid: {description: The sandbox's own UUID., type: str, returned: always}
    state: {description: The state of the sandbox in its record., type: str, returned: always}
    applied: {description: Whether the action was carried out., type: bool, returned: always}
    error: {description: 'Why the action failed, or null.', type: str, returned: always}
count:
  description: Number of differences.
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
    """Release the hold on leases and cleanup; in check mode, do not. Return whether there was a hold."""
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
