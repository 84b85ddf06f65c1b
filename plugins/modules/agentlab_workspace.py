#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_workspace
short_description: Create, attach, detach and delete disks that outlive sandboxes
version_added: 1.0.0
description:
  - A workspace is a disk that outlives sandboxes. It is attached to at most one at a time, and detached before the
    VM of a sandbox is deleted.
  - Its volume is owned by a VMID out of the configuration's C(workspace_owner_range), which no VM may ever get. No
    deletion of a VM takes it along.
  - The guest finds it at the C(device) of RV(workspace). It is empty when it is new, so the first job makes a file
    system on it.
options:
  name:
    description: Name (or id) of the workspace.
    type: str
    required: true
  state:
    description:
      - V(present) creates it if it is not there, and lets it grow.
      - V(attached) gives it to a sandbox. It is refused while another sandbox has it, unless its lease on it is
        over and its VM does not run.
      - V(detached) takes it off. Unmount it in a running guest first. It is refused while a snapshot of the VM
        contains the workspace.
      - V(absent) deletes it and the data on it, which needs O(force=true). A workspace that is attached is never
        deleted.
    type: str
    choices: [present, attached, detached, absent]
    default: present
  size:
    description:
      - Size, such as V(20G). Needed for a new one. One that is there only grows, and only while it is attached,
        because Proxmox VE resizes disks of VMs only.
    type: str
  storage:
    description: Storage for a new one. The configuration's C(storage) unless set.
    type: str
  node:
    description:
      - Node for a new one on local storage. It can then be attached to sandboxes of that node only.
      - The configuration's C(node), or else the first node, unless set.
    type: str
  vmid:
    description: With O(state=attached), VMID of the sandbox.
    type: int
  sandbox:
    description: With O(state=attached), name of the sandbox.
    type: str
  ttl:
    description:
      - With O(state=attached), how long the sandbox has it, as minutes or a duration; as long as its lease unless set.
      - When that is over and its VM does not run, another sandbox may take the workspace over.
    type: str
  force:
    description: With O(state=absent), delete the data. It skips no proof that nobody has the volume attached.
    type: bool
    default: false
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.wait
  - agentlab.proxmox.common.attributes
seealso:
  - module: agentlab.proxmox.agentlab_workspace_info
  - module: agentlab.proxmox.agentlab_sandbox
"""

EXAMPLES = r"""
- name: A disk for the results of many jobs
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    size: 50G
    storage: local-lvm

- name: Give it to a sandbox
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: attached
    vmid: 1000

- name: Let it grow
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    size: 80G

- name: Take it off
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: detached

- name: Delete it with all that is on it
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: absent
    force: true
"""

RETURN = r"""
workspace:
  description: The workspace as it is after the task; null when there is none. Times are UTC, absent values null,
    sizes bytes.
  returned: always
  type: dict
  sample:
    id: 0b0f7f2e-4c0a-4c39-8a55-2f5f0d7d5b11
    name: project-x
    state: ATTACHED
    size: 53687091200
    storage: local-lvm
    node: pve1
    volume: local-lvm:vm-990000-ws-0b0f7f2e-4c0a-4c39-8a55-2f5f0d7d5b11
    owner_vmid: 990000
    vmid: 1000
    sandbox: agent-1
    sandbox_uuid: 7c1f8f0e-96b0-4a3c-8f6b-6a7b1f3a2c44
    device: /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_agentlab-0b0f7f2e
    lease_expires_at: "2026-01-30T02:45:00Z"
    created_at: "2026-01-30T00:45:00Z"
    updated_at: "2026-01-30T00:45:07Z"
    state_changed_at: "2026-01-30T00:45:07Z"
    reason: attached
outcome:
  description: What became of it, in one word, such as V(created), V(attached), V(unchanged) or V(not_found).
  returned: always
  type: str
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

ARGUMENT_SPEC = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "default": "present", "choices": ["present", "attached", "detached", "absent"]},
    "size": {"type": "str"},
    "storage": {"type": "str"},
    "node": {"type": "str"},
    "vmid": {"type": "int"},
    "sandbox": {"type": "str"},
    "ttl": {"type": "str"},
    "force": {"type": "bool", "default": False},
    "wait_timeout": {"type": "int"},
}


def run_module(module, context):
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _workspace

    return _workspace.run(module, context)


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class, mutually_exclusive=[("vmid", "sandbox")])


if __name__ == "__main__":
    main()
