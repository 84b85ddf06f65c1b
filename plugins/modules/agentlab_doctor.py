#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_doctor
short_description: Check everything sandboxes depend on, and advise what to do
version_added: 1.0.0
description:
  - Checks the configuration, the database, the privileges of the token, quorum, the range of VMIDs, clocks, the
    template, its storage, the daemon, and the versions of the software in use.
  - Each finding says what it means and what to do about it.
  - The module only reads. The exception is O(bundle), which writes a file for bug reports.
options:
  template:
    description: VMID or name of the template to check. Without this option, the configured template.
    type: str
  bundle:
    description:
      - File to write on the host where the module runs. It contains the findings, the configuration, the live
        sandboxes and the last events, as JSON.
      - The file has mode 0600, and replaces an existing file. It never contains passwords or token secrets. Check mode
        does not write it.
    type: path
  bundle_hosts:
    description:
      - Whether the O(bundle) contains the names and addresses of hosts, nodes and VMs. Without this option, a
        placeholder such as V((node 1\)) replaces each.
    type: bool
    default: false
  fail_on:
    description: Fail the task if a finding has this status or a worse one.
    type: str
    choices: [never, problem, warning]
    default: never
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.attributes
"""

EXAMPLES = r"""
# Then show checked.findings | rejectattr('status', 'equalto', 'ok'). Commands for missing privileges: checked.pveum.
- name: Check everything
  agentlab.proxmox.agentlab_doctor:
  register: checked

- name: Stop the play if sandboxes would not work
  agentlab.proxmox.agentlab_doctor:
    template: debian-13
    fail_on: problem

- name: Write a file for a bug report, without names of hosts
  agentlab.proxmox.agentlab_doctor:
    bundle: /root/agentlab-bundle.json
"""

RETURN = r"""
status:
  description: The worst status of all findings, as in RV(findings[].status).
  returned: always
  type: str
  sample: warning
problems:
  description: Number of findings with the status V(problem).
  returned: always
  type: int
findings:
  description: The findings, one or more for each check.
  returned: always
  type: list
  elements: dict
  contains:
    check:
      description:
        - One of V(versions), V(configuration), V(database), V(work), V(proxmox), V(cluster), V(quorum), V(template),
          V(storage), V(creation), V(placement) (if the node is chosen automatically), V(privileges), V(vmid_range),
          V(clock) and V(daemon).
      type: str
      returned: always
    status:
      description: V(ok), V(warning) (works, but needs attention), V(problem) (something does not work), or V(unknown)
        (could not be checked).
      type: str
      returned: always
    meaning: {description: The finding and its meaning., type: str, returned: always}
    advice: {description: What to do about the finding., type: str, returned: always}
    facts: {description: Numbers and names behind the finding., type: dict, returned: always}
pveum:
  description:
    - Commands for root on a node, with the names of this configuration.
    - The commands grant the login its missing privileges, and revoke none. For root and for an administrator, they
      create a token with the least privileges. The list is empty if nothing is missing.
  returned: always
  type: list
  elements: str
bundle:
  description: The file that was written (in check mode, would be written).
  returned: when O(bundle) is set
  type: str
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    "template": {"type": "str"},
    "bundle": {"type": "path"},
    "bundle_hosts": {"type": "bool", "default": False},
    "fail_on": {"type": "str", "choices": ["never", "problem", "warning"], "default": "never"},
}


def build_context(module, config):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor

    return doctor.Doctor(config)


def run_module(module, examiner):
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor

    params = module.params
    report = examiner.examine(doctor.Scope(template=params["template"]))
    result = {"changed": bool(params["bundle"]), **report.public()}
    if params["bundle"]:
        result["bundle"] = params["bundle"]
        if not module.check_mode:
            doctor.write_bundle(params["bundle"], doctor.make_bundle(examiner, report, hosts=params["bundle_hosts"]))
        if module._diff:
            result["diff"] = {"before": {}, "after": {"bundle": params["bundle"]}}
    bad = report.list_failing(params["fail_on"])
    if bad:
        result.update(
            failed=True, msg=f"{len(bad)} findings; the first: {bad[0].check}: {bad[0].meaning}; {bad[0].advice}"
        )
    return result


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class, build_context=build_context)


if __name__ == "__main__":
    main()
