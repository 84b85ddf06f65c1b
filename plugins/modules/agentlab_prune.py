#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_prune
short_description: Destroy sandboxes whose lease is over
version_added: 1.0.0
description:
  - Destroys the sandboxes in state C(TIMEOUT), or in the states of O(states). Closes the records of sandboxes whose VM
    is proven to be gone.
  - All other sandboxes are kept, and returned with the reason. Check mode is the dry run, with all reads and the same
    result.
options:
  older_than:
    description:
      - Prune only sandboxes that entered their state longer ago than this, as minutes or a duration such as V(24h).
    type: str
  states:
    description: The states to prune, of V(TIMEOUT), V(COMPLETED), V(FAILED) and V(STOPPED).
    type: list
    elements: str
    default: [TIMEOUT]
  tags:
    description: Prune only sandboxes with at least one of these tags.
    type: list
    elements: str
  max_count:
    description: A guard, not a batch size. If more sandboxes would be pruned, the task prunes none and fails.
    type: int
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.wait
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
- name: Show which sandboxes would be pruned, and why the others are kept
  agentlab.proxmox.agentlab_prune:
  check_mode: true
  diff: true

- name: Prune sandboxes a day after their lease ended, but never more than twenty at once
  agentlab.proxmox.agentlab_prune:
    older_than: 24h
    max_count: 20
"""

RETURN = r"""
count:
  description: Number of sandboxes that were pruned (in check mode, would be pruned).
  returned: always
  type: int
  sample: 5
pruned:
  description: The pruned sandboxes, each as in RV(agentlab.proxmox.agentlab_sandbox#module:results).
  returned: always
  type: list
  elements: dict
kept:
  description:
    - The kept sandboxes, each with a C(message) and a C(reason).
    - Reasons are V(too_young), V(protected), V(locked), V(node_offline), V(ambiguous), V(foreign), V(unknown),
      V(workspace), V(workspace_in_snapshot), V(snippet), V(busy), V(changed), V(denied), V(rule), V(clock_jumped),
      V(restored).
  returned: always
  type: list
  elements: dict
failed:
  description:
    - An empty list if no sandbox failed. A failed sandbox fails the task. Ansible then sets this value to V(true), and
      RV(failed_items) contains the sandboxes.
    - With ansible-core 2.21 and newer, V(false) if no sandbox failed, because Ansible accepts only a boolean here.
  returned: always
  type: raw
failed_items:
  description: The failed sandboxes, each as in RV(agentlab.proxmox.agentlab_sandbox#module:results).
  returned: always
  type: list
  elements: dict
"""

from ansible.module_utils.ansible_release import __version__ as ansible_version
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    "older_than": {"type": "str"},
    "states": {"type": "list", "elements": "str", "default": ["TIMEOUT"]},
    "tags": {"type": "list", "elements": "str"},
    "max_count": {"type": "int"},
    "wait_timeout": {"type": "int"},
}

# ansible-core 2.21 and newer accept only a boolean in ``failed``. They replace a list, with a warning.
_MAY_BE_A_LIST = [int(part) for part in ansible_version.split(".")[:2]] < [2, 21]


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import durations, states
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune

    params = module.params
    older_than = (
        None if params["older_than"] is None else durations.parse(params["older_than"], "older_than", zero=True)
    )
    report = prune.run(
        context,
        prune.Selection(
            states=_adapter.states_of(module, states.PRUNABLE),
            older_than=older_than,
            tags=_adapter.tags(module),
            max_count=params["max_count"],
        ),
    )
    result = {
        "changed": bool(report.pruned),
        "count": report.count,
        "pruned": [outcome.public(_adapter.REMEDIES) for outcome in report.pruned],
        "kept": [outcome.public(_adapter.REMEDIES) for outcome in report.kept],
        "failed_items": [outcome.public(_adapter.REMEDIES) for outcome in report.failed],
        "warnings": [warning for outcome in report.pruned for warning in outcome.explain_warnings(_adapter.REMEDIES)],
    }
    if module._diff:
        result["diff"] = _adapter.difference(report.pruned)
    if _MAY_BE_A_LIST:
        result["failed"] = []
    if report.failed:
        result.update(
            failed=True,
            msg=f"{len(report.failed)} sandboxes could not be pruned ({report.count} were); the first: "
            f"{report.failed[0].explain(_adapter.REMEDIES)}",
        )
    return result


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class)


if __name__ == "__main__":
    main()
