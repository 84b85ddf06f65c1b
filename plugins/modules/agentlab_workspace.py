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
  - A workspace is a disk that outlives sandboxes. At most one sandbox has the workspace attached. It is detached before
    the VM of the sandbox is deleted.
  - The owner of its volume is a VMID in the configuration's C(workspace_owner_range). No VM may ever get such a VMID,
    so no deletion of a VM deletes the volume.
  - In the guest, the disk is at the C(device) of RV(workspace). A new disk is empty, so the first job must create a
    file system on it.
options:
  name:
    description: Name or id of the workspace.
    type: str
    required: true
  state:
    description:
      - V(present) creates the workspace if it does not exist, and grows it to O(size).
      - V(attached) attaches the workspace to a sandbox. The task fails while another sandbox has the workspace, unless
        the lease of that sandbox on the workspace is over and its VM does not run.
      - V(detached) detaches the workspace. Unmount the disk in a running guest first. The task fails while a snapshot
        of the VM contains the workspace.
      - V(absent) deletes the workspace with its data, and requires O(force=true). An attached workspace is never
        deleted.
    type: str
    choices: [present, attached, detached, absent]
    default: present
  size:
    description:
      - Size, such as V(20G). Required for a new workspace.
      - An existing workspace only grows, and only while it is attached, because Proxmox VE resizes only disks of VMs.
    type: str
  storage:
    description: Storage for a new workspace. Without this option, the configuration's C(storage).
    type: str
  node:
    description:
      - Node for a new workspace on local storage. Such a workspace can be attached only to sandboxes on that node.
      - Without this option, the configuration's C(node), or else the first node.
    type: str
  vmid:
    description: With O(state=attached), VMID of the sandbox.
    type: int
  sandbox:
    description: With O(state=attached), name of the sandbox.
    type: str
  ttl:
    description:
      - With O(state=attached), the lease of the sandbox on the workspace, as minutes or a duration. Without this
        option, that lease ends with the lease of the sandbox.
      - When the lease is over and the VM does not run, another sandbox can take over the workspace.
    type: str
  force:
    description: With O(state=absent), whether to delete the data. The proof that no VM has the volume attached is
      required in any case.
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
- name: Create a disk for the results of many jobs
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    size: 50G
    storage: local-lvm

- name: Attach the workspace to a sandbox
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: attached
    vmid: 1000

- name: Grow the workspace
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    size: 80G

- name: Detach the workspace
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: detached

- name: Delete the workspace with its data
  agentlab.proxmox.agentlab_workspace:
    name: project-x
    state: absent
    force: true
"""

RETURN = r"""
workspace:
  description: The workspace after the task; null if it does not exist. Times are in UTC, sizes in bytes. Missing values
    are null.
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
  description: The outcome in one word, such as V(created), V(attached), V(unchanged) or V(not_found).
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
