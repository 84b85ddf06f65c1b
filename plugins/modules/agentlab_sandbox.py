#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_sandbox
short_description: Create, start, stop, suspend and destroy sandboxes on Proxmox VE
version_added: 1.0.0
description:
  - A sandbox is a throw-away VM with a lease, cloned from a template, together with its record.
  - The module stops, changes or deletes a VM only after it has proven that the VM belongs to the sandbox. Proxmox VE
    reuses VMIDs, so a VMID proves nothing.
  - A sandbox becomes C(DESTROYED) only after its VM is proven to be absent.
  - With both O(vmid) and O(name), the sandbox with that VMID must have that name. Otherwise the task fails and changes
    nothing.
options:
  state:
    description:
      - V(present) creates and starts a sandbox that does not exist, finishes an interrupted creation, and does not
        change the power state of an existing sandbox.
      - V(started), V(stopped) and V(suspended) change the power state of an existing sandbox. They read the state of
        the VM. If somebody else has started, stopped, suspended or hibernated the VM, the VM and the record are
        brought to the state of the task.
      - A hibernated VM counts as suspended. V(started) resumes it with its saved memory. V(stopped) discards the saved
        memory, and only with O(force=true).
      - V(completed) and V(failed) report the end of the sandbox's job.
      - V(absent) destroys the sandbox. If its VM runs, whatever the record says, the task fails unless O(force=true).
      - With V(absent), the outcome of a sandbox without a record is V(not_found), and nothing changes. With every
        other state but V(present), the task fails.
    type: str
    choices: [present, started, stopped, suspended, completed, failed, absent]
    default: present
  force:
    description:
      - With O(state=absent), destroy the sandbox in any state, without a graceful shutdown.
      - With O(state=stopped), discard the saved memory of a hibernated VM.
      - The proofs of identity and absence, and O(protected), hold in any case.
    type: bool
    default: false
  protected:
    description: Whether every destroy of the sandbox is refused, also with O(force=true). With O(state=present), the
      module changes this value of an existing sandbox too.
    type: bool
  keepalive:
    description: Whether the lease is renewed automatically when it ends, up to the configured maximum lifetime.
    type: bool
  profile:
    description:
      - Name of a profile, which sets the options that the task does not set. An option of the task wins over the
        profile, and the profile wins over the configuration.
      - Profiles are files in the folder C(profiles_dir) (V(/etc/agentlab/profiles)) on the host where the module runs.
    type: str
  template:
    description:
      - VMID or name of the template to clone. Without this option, the configuration's C(template).
      - If several templates have that name, the module clones the template on the node of the sandbox.
    type: str
  node:
    description:
      - Node for the sandbox. V(auto) chooses the best node by free memory, storages, bridges, templates and the
        configuration's C(placement).
      - Without this option, the configuration's C(node). Without that, V(auto) on a cluster of several nodes, and the
        template's node on a single node.
    type: str
  full_clone:
    description:
      - Whether to make a full clone. Without this option, the clone is linked.
      - O(storage) also makes the clone full. So does a template on another storage than the configuration's
        C(storage), and a storage that has no linked clones.
    type: bool
  storage:
    description: Storage for a full clone.
    type: str
  pool:
    description: Resource pool for the VM.
    type: str
  cores:
    description: Number of cores. Without this option, the template's number.
    type: int
  memory:
    description: Memory in MiB. Without this option, the template's memory.
    type: int
  cpu_type:
    description: CPU type, such as V(host) or V(x86-64-v2-AES). Without this option, the template's type.
    type: str
  disk_size:
    description: Size of the boot disk, such as V(20G), or V(+10G) to add to the size in the template. A disk never
      shrinks.
    type: str
  bridge:
    description: Network bridge of the first interface. Without this option, the template's bridge.
    type: str
  network_model:
    description: Model of the first interface. Without this option, the template's model.
    type: str
    choices: [virtio, e1000, e1000e, rtl8139, vmxnet3]
  vlan_tag:
    description: VLAN of the first interface, from V(1) to V(4094). Without this option, the template's VLAN.
    type: int
  second_bridge:
    description: Network bridge of a second interface. If the template has no second interface, the module adds it.
    type: str
  second_vlan_tag:
    description: VLAN of the second interface, from V(1) to V(4094).
    type: int
  second_ip_config:
    description: Cloud-init network configuration of the second interface, in the form of O(ip_config).
    type: str
  firewall:
    description: Whether to enable the firewall of Proxmox VE on the first interface.
    type: bool
  firewall_group:
    description: Security group of Proxmox VE to add to the VM's firewall rules. This enables the VM's firewall. The
      group must exist.
    type: str
  cloud_init_user:
    description: User that cloud-init creates instead of the image's own.
    type: str
  cloud_init_password:
    description:
      - Password of the user that cloud-init creates. Proxmox VE stores its hash. This collection stores nothing of it.
      - The password must be a text. YAML reads V(012345) as a number, so put the password in quotes.
    type: raw
  cloud_init_upgrade:
    description: Whether cloud-init upgrades the packages at the first start. Without this option, Proxmox VE lets
      cloud-init upgrade them.
    type: bool
  cloud_init_vendor_data:
    description:
      - Vendor data for cloud-init, as the volume id of an existing snippet, such as V(local:snippets/vendor.yaml).
      - Cloud-init uses the vendor data in addition to the user data of Proxmox VE or of O(cloud_init_user_data).
    type: str
  ip_config:
    description: Cloud-init network configuration, such as V(ip=dhcp) or V(ip=192.0.2.10/24,gw=192.0.2.1).
    type: str
  nameserver:
    description: Cloud-init name servers, separated by blanks or commas.
    type: str
  searchdomain:
    description: Cloud-init search domains, separated by blanks.
    type: str
  ssh_public_keys:
    description:
      - Public keys that cloud-init puts into the VM - a list of keys, or a text with one key a line, such as a file
        or the text area of a survey.
      - The module ignores empty lines and lines that begin with C(#). It keeps options of a key, such as
        C(from="192.0.2.0/24").
      - The module refuses a private key.
    type: raw
  cloud_init_user_data:
    description:
      - User data for cloud-init, such as a C(#cloud-config) document. It replaces the users and keys of Proxmox VE's
        own user data.
      - The module writes the user data as a snippet that only root can read, and stores it nowhere else. The snippet is
        removed together with the sandbox, or if the creation fails.
      - Proxmox VE accepts no uploads of snippets. So the module must run on the node of the VM, or on a host that has
        the storage C(snippets_storage) of that node mounted at C(snippets_dir).
    type: str
  workspace:
    description:
      - Name or id of a workspace to attach before the sandbox starts. The workspace must exist and be detached, see
        M(agentlab.proxmox.agentlab_workspace).
      - A destroy detaches the workspace before, and keeps it.
    type: str
  tags:
    description:
      - Tags of the record and the VM, in lower case. The VM also gets the tag V(agentlab).
      - A list, or a text with commas, blanks or line feeds between the tags.
      - A cluster may forbid tags. The VM is then created without them, with a warning. The record has the tags.
    type: list
    elements: str
  description:
    description:
      - Text for the notes of the VM in Proxmox VE. The notes begin with the lines that identify the VM, and the text
        follows below.
      - The C(description) of a profile describes the profile, and does not go into the notes.
    type: str
  update:
    description:
      - With O(state=present), whether to apply O(cores), O(memory), O(tags) and O(description) to an existing sandbox
        if they differ.
      - Without O(update), and for all other options, a warning names each option of the task that differs from the
        options at the creation. O(cloud_init_user_data) and O(cloud_init_password) are not stored, so the module cannot
        compare them.
    type: bool
    default: false
  allow_restart:
    description:
      - Whether O(update) may stop and start the VM. Proxmox VE needs a restart to change O(cores) and O(memory) of a
        running VM.
      - Without this option, the module refuses such an update and changes nothing. Tags and description need no
        restart.
    type: bool
    default: false
  ttl:
    description:
      - Length of the lease, as minutes (V(120)) or a duration (V(90s), V(30m), V(2h), V(1.5h), V(1d12h)).
      - Without this option, the profile's default, or else the configuration's C(default_ttl) (4 hours).
      - The module uses this option only to create a sandbox. M(agentlab.proxmox.agentlab_lease) renews a lease.
    type: str
  wait_for_ip:
    description:
      - Whether to wait until the guest agent reports an address.
      - With O(state=present), the module also waits for an existing sandbox that runs, if no address is known since its
        last start. It reads an address that is more than five minutes old once again, without waiting.
      - With O(state=started), the module reads the address again, because a started guest may get another address.
    type: bool
    default: false
  wait_for_cloud_init:
    description:
      - Whether to wait until cloud-init has ended. If cloud-init ended with errors, the sandbox becomes C(FAILED), and
        its VM stays.
      - The module reads C(/run/cloud-init/result.json) through the guest agent. Proxmox VE 9 requires the privilege
        C(VM.GuestAgent.FileRead) or C(VM.GuestAgent.Unrestricted) for this, Proxmox VE 8 requires C(VM.Monitor).
    type: bool
    default: false
  items:
    description:
      - Sandboxes to create in parallel, with O(state=present). Each item has a O(items[].name) or a O(items[].vmid),
        and any options of a creation. Options that the item does not set are taken from the task, also if the item has
        a O(items[].profile), because an option of the task wins over a profile.
      - The module checks all items before it changes anything. It refuses two items for the same sandbox or with
        the same workspace. Then each sandbox has its own outcome, and a failed creation stops no other. The next run
        of the task creates the missing sandboxes.
      - No sandbox gets a VMID that another item asks for.
    type: list
    elements: dict
    suboptions:
      profile:
        description: As O(profile), for this sandbox.
        type: str
      template:
        description: As O(template), for this sandbox.
        type: str
      node:
        description: As O(node), for this sandbox.
        type: str
      full_clone:
        description: As O(full_clone), for this sandbox.
        type: bool
      storage:
        description: As O(storage), for this sandbox.
        type: str
      pool:
        description: As O(pool), for this sandbox.
        type: str
      cores:
        description: As O(cores), for this sandbox.
        type: int
      memory:
        description: As O(memory), for this sandbox.
        type: int
      cpu_type:
        description: As O(cpu_type), for this sandbox.
        type: str
      disk_size:
        description: As O(disk_size), for this sandbox.
        type: str
      bridge:
        description: As O(bridge), for this sandbox.
        type: str
      network_model:
        description: As O(network_model), for this sandbox.
        type: str
        choices: [virtio, e1000, e1000e, rtl8139, vmxnet3]
      vlan_tag:
        description: As O(vlan_tag), for this sandbox.
        type: int
      firewall:
        description: As O(firewall), for this sandbox.
        type: bool
      firewall_group:
        description: As O(firewall_group), for this sandbox.
        type: str
      second_bridge:
        description: As O(second_bridge), for this sandbox.
        type: str
      second_vlan_tag:
        description: As O(second_vlan_tag), for this sandbox.
        type: int
      second_ip_config:
        description: As O(second_ip_config), for this sandbox.
        type: str
      cloud_init_user:
        description: As O(cloud_init_user), for this sandbox.
        type: str
      cloud_init_password:
        description: As O(cloud_init_password), for this sandbox.
        type: raw
      cloud_init_upgrade:
        description: As O(cloud_init_upgrade), for this sandbox.
        type: bool
      ip_config:
        description: As O(ip_config), for this sandbox.
        type: str
      nameserver:
        description: As O(nameserver), for this sandbox.
        type: str
      searchdomain:
        description: As O(searchdomain), for this sandbox.
        type: str
      ssh_public_keys:
        description: As O(ssh_public_keys), for this sandbox.
        type: raw
      cloud_init_user_data:
        description: As O(cloud_init_user_data), for this sandbox.
        type: str
      cloud_init_vendor_data:
        description: As O(cloud_init_vendor_data), for this sandbox.
        type: str
      workspace:
        description: As O(workspace), for this sandbox.
        type: str
      tags:
        description: As O(tags), for this sandbox.
        type: list
        elements: str
      description:
        description: As O(description), for this sandbox.
        type: str
      ttl:
        description: As O(ttl), for this sandbox.
        type: str
      keepalive:
        description: As O(keepalive), for this sandbox.
        type: bool
      protected:
        description: As O(protected), for this sandbox.
        type: bool
      vmid:
        description: VMID of the sandbox.
        type: int
      name:
        description: Name of the sandbox.
        type: str
      update:
        description: As O(update), for this sandbox.
        type: bool
      allow_restart:
        description: As O(allow_restart), for this sandbox.
        type: bool
      wait_for_ip:
        description: As O(wait_for_ip), for this sandbox.
        type: bool
      wait_for_cloud_init:
        description: As O(wait_for_cloud_init), for this sandbox.
        type: bool
extends_documentation_fragment:
  - agentlab.proxmox.common
  - agentlab.proxmox.common.select
  - agentlab.proxmox.common.wait
  - agentlab.proxmox.common.attributes
seealso:
  - module: agentlab.proxmox.agentlab_lease
  - module: agentlab.proxmox.agentlab_prune
"""

EXAMPLES = r"""
- name: Create a sandbox for two hours
  agentlab.proxmox.agentlab_sandbox:
    name: agent-1
    template: debian-13
    ttl: 2h
    cores: 4
    memory: 8192
    ip_config: ip=dhcp
    wait_for_ip: true
  register: created

- name: Create a sandbox from a profile, with a shorter lease
  agentlab.proxmox.agentlab_sandbox:
    name: agent-2
    profile: yolo-ephemeral
    ttl: 30m

- name: Create a sandbox on the best node
  agentlab.proxmox.agentlab_sandbox:
    name: agent-4
    node: auto

- name: Create three sandboxes in parallel, the third with more memory
  agentlab.proxmox.agentlab_sandbox:
    template: debian-13
    memory: 2048
    ttl: 2h
    items:
      - name: worker-1
      - name: worker-2
      - name: worker-3
        memory: 4096

- name: Create a sandbox in a VLAN, with a second interface
  agentlab.proxmox.agentlab_sandbox:
    name: agent-3
    template: debian-13
    ip_config: ip=dhcp
    vlan_tag: 42
    second_bridge: vmbr1
    second_ip_config: ip=198.51.100.10/24
    cloud_init_upgrade: false
    description: Nightly build

- name: Give the sandbox more memory, which requires a restart
  agentlab.proxmox.agentlab_sandbox:
    name: agent-3
    memory: 4096
    tags: [nightly]
    update: true
    allow_restart: true

- name: Stop the sandbox
  agentlab.proxmox.agentlab_sandbox:
    vmid: "{{ created.sandbox.vmid }}"
    state: stopped

- name: Destroy the sandbox in any state
  agentlab.proxmox.agentlab_sandbox:
    vmid: "{{ created.sandbox.vmid }}"
    state: absent
    force: true

- name: Destroy several sandboxes in parallel
  agentlab.proxmox.agentlab_sandbox:
    vmids: [1009, 1010, 1011]
    state: absent
    force: true
"""

RETURN = r"""
sandboxes:
  description:
    - The sandboxes after the task, in the order of the options. Times are in UTC. Missing values are null.
    - C(ip_seen_at) is the time at which the guest agent last reported the address. If it is null beside an address, the
      sandbox was started later, so the address may be out of date.
  returned: always
  type: list
  elements: dict
  sample:
    - uuid: 0b0f7f2e-4c0a-4c39-8a55-2f5f0d7d5b11
      vmid: 1000
      name: agent-1
      profile: null
      state: RUNNING
      node: pve1
      ip: 192.0.2.10
      ip_seen_at: "2026-01-30T00:45:06Z"
      workspace_id: null
      tags: []
      protected: false
      keepalive: false
      lease_expires_at: "2026-01-30T02:45:00Z"
      created_at: "2026-01-30T00:45:00Z"
      updated_at: "2026-01-30T00:45:07Z"
      state_changed_at: "2026-01-30T00:45:07Z"
sandbox:
  description: The sandbox after the task; null if it does not exist.
  returned: when O(vmids) and O(items) are not used
  type: dict
results:
  description: The outcome for each sandbox, in the order of the options.
  returned: always
  type: list
  elements: dict
  contains:
    vmid:
      description: The VMID; null if a creation without a VMID left no sandbox.
      type: int
      returned: always
    uuid: {description: The sandbox's own UUID; null if there is no sandbox., type: str, returned: always}
    name: {description: The name., type: str, returned: always}
    outcome:
      description:
        - One word, such as V(created), V(destroyed), V(unchanged), V(not_found), V(kept) or V(failed).
        - In check mode V(would_create), V(would_update), V(would_destroy), or V(would_mark_destroyed). The last means
          that the VM is gone or the VMID belongs to another VM, so that only the record would be closed.
      type: str
      returned: always
    previous_state: {description: The state of the sandbox before the task., type: str, returned: always}
    state:
      description: The state of the sandbox after the task; null if there is no sandbox.
      type: str
      returned: always
    reason: {description: 'The reason for the outcome, in one word.', type: str, returned: always}
    message: {description: 'The reason and what to do, as a sentence.', type: str, returned: always}
    after: {description: New values of an existing sandbox., type: dict, returned: when values were changed}
    before: {description: Their values before the task., type: dict, returned: when values were changed}
    upids: {description: Task ids of Proxmox VE., type: list, elements: str, returned: always}
    changed: {description: Whether the task changed this sandbox., type: bool, returned: always}
    failed: {description: Whether the task failed for this sandbox., type: bool, returned: always}
    remedy: {description: 'The next step, in one word.', type: str, returned: when the message names one}
    warnings: {description: Warnings about this sandbox., type: list, elements: str, returned: when there are any}
    placement:
      description:
        - The choice of the node - C(node), C(strategy), C(by) (the compared value, C(memory) or C(sandboxes)), and the
          list C(nodes).
        - Each entry of C(nodes) has C(node), C(chosen), C(reason) (a word), C(message), C(free_memory) in MiB (null if
          the node shows no figures) and C(sandboxes), the number of sandboxes on the node.
      type: dict
      returned: when the node was chosen (O(node=auto))
failed_count:
  description: Number of sandboxes that failed.
  returned: always
  type: int
error:
  description:
    - The facts of a failure - C(code) (a word for programs), C(message), and others such as C(vmid), C(upid) or
      C(cause).
    - If options are refused before the work begins, the task returns C(msg), C(changed) and this value only.
  returned: when options are refused, or when O(vmids) and O(items) are not used and the creation failed
  type: dict
"""

from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

CREATION = (
    "profile",
    "template",
    "node",
    "full_clone",
    "storage",
    "pool",
    "cores",
    "memory",
    "cpu_type",
    "disk_size",
    "bridge",
    "network_model",
    "vlan_tag",
    "firewall",
    "firewall_group",
    "second_bridge",
    "second_vlan_tag",
    "second_ip_config",
    "cloud_init_user",
    "cloud_init_password",
    "cloud_init_upgrade",
    "ip_config",
    "nameserver",
    "searchdomain",
    "ssh_public_keys",
    "cloud_init_user_data",
    "cloud_init_vendor_data",
    "workspace",
    "tags",
    "description",
    "ttl",
    "keepalive",
    "protected",
)

# The options for a task about one sandbox.
TASK_SPEC = {
    **_adapter.SELECT_ARGS,
    "state": {
        "type": "str",
        "default": "present",
        "choices": ["present", "started", "stopped", "suspended", "completed", "failed", "absent"],
    },
    "force": {"type": "bool", "default": False},
    "protected": {"type": "bool"},
    "keepalive": {"type": "bool"},
    "wait_timeout": {"type": "int"},
    "profile": {"type": "str"},
    "template": {"type": "str"},
    "node": {"type": "str"},
    "full_clone": {"type": "bool"},
    "storage": {"type": "str"},
    "pool": {"type": "str"},
    "cores": {"type": "int"},
    "memory": {"type": "int"},
    "cpu_type": {"type": "str"},
    "disk_size": {"type": "str"},
    "bridge": {"type": "str"},
    "network_model": {"type": "str", "choices": ["virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"]},
    "vlan_tag": {"type": "int"},
    "second_bridge": {"type": "str"},
    "second_vlan_tag": {"type": "int"},
    "second_ip_config": {"type": "str"},
    "firewall": {"type": "bool"},
    "firewall_group": {"type": "str"},
    "cloud_init_user": {"type": "str"},
    # raw, because the type str would turn a number into text, and a YAML number may have lost leading zeros.
    "cloud_init_password": {"type": "raw", "no_log": True},
    "cloud_init_upgrade": {"type": "bool"},
    "cloud_init_vendor_data": {"type": "str"},
    "ip_config": {"type": "str"},
    "nameserver": {"type": "str"},
    "searchdomain": {"type": "str"},
    # raw, because the type list would split a text at commas, and the options of a key may contain commas.
    "ssh_public_keys": {"type": "raw", "no_log": False},
    "cloud_init_user_data": {"type": "str", "no_log": True},
    "workspace": {"type": "str"},
    "tags": {"type": "list", "elements": "str"},
    "description": {"type": "str"},
    "update": {"type": "bool", "default": False},
    "allow_restart": {"type": "bool", "default": False},
    "ttl": {"type": "str"},
    "wait_for_ip": {"type": "bool", "default": False},
    "wait_for_cloud_init": {"type": "bool", "default": False},
}

# The options in one item of ``items``. A missing option is taken from the task.
ITEM_SPEC = {
    **{name: {key: part for key, part in TASK_SPEC[name].items() if key != "default"} for name in CREATION},
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "update": {"type": "bool"},
    "allow_restart": {"type": "bool"},
    "wait_for_ip": {"type": "bool"},
    "wait_for_cloud_init": {"type": "bool"},
}
ARGUMENT_SPEC = {**TASK_SPEC, "items": {"type": "list", "elements": "dict", "options": ITEM_SPEC}}


def run_module(module, context):
    # Import late: the code for the other states is then not loaded.
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _sandbox

    return _sandbox.run(module, context, CREATION)


EXCLUSIVE = [("vmid", "vmids"), ("name", "vmids"), ("items", "vmid"), ("items", "vmids"), ("items", "name")]


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class, mutually_exclusive=EXCLUSIVE)


if __name__ == "__main__":
    main()
