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
  - A sandbox is a throw-away VM with a lease, cloned from a template, and the record of it.
  - Only a VM that is proven to be the sandbox's own is ever stopped, changed or deleted. Proxmox VE hands VMIDs out
    again, so a VMID proves nothing.
  - A record becomes C(DESTROYED) only when the absence of its VM is proven.
  - With O(vmid) and O(name), the sandbox of that VMID has to have that name; otherwise nothing is done.
options:
  state:
    description:
      - V(present) creates and starts a sandbox that is not there, finishes a creation that was cut off, and leaves
        the power state of one that is there.
      - V(started), V(stopped) and V(suspended) change the power state of one that is there. They look at the VM.
        Where somebody else switched it on or
        off, suspended or hibernated it, it is brought to the state that is asked for, and the record with it.
      - A hibernated VM counts as suspended. V(started) takes its saved memory up again, V(stopped) throws that away
        only with O(force=true).
      - V(completed) and V(failed) report the end of its job.
      - V(absent) destroys it. A sandbox whose VM runs is refused unless O(force=true), whatever the record says.
      - With V(absent), a sandbox that no record has is C(not_found) and unchanged; every other state fails for it.
    type: str
    choices: [present, started, stopped, suspended, completed, failed, absent]
    default: present
  force:
    description:
      - With O(state=absent), destroy in any state and without a graceful shutdown.
      - With O(state=stopped), throw the saved memory of a hibernated VM away.
      - It skips no proof of identity or absence, and no protection.
    type: bool
    default: false
  protected:
    description: Whether the sandbox is kept from every destroy, forced or not. With O(state=present), also changed
      on a sandbox that is there.
    type: bool
  keepalive:
    description: Whether the lease is renewed when it runs out, as long as the configured maximum lifetime allows.
    type: bool
  profile:
    description:
      - Name of a profile, which fills in what is not given here. An option that is given wins over the profile, the
        profile over the configuration.
      - Profiles are files of the folder C(profiles_dir) (V(/etc/agentlab/profiles)) on the host where the module runs.
    type: str
  template:
    description:
      - VMID or name of the template to clone. The configuration's C(template) unless set.
      - Of several templates with that name, the one on the node where the sandbox is to be.
    type: str
  node:
    description:
      - Node to create on, or V(auto) to have the node chosen that suits best, by its free memory, storages,
        bridges, templates and the configuration's
        C(placement).
      - The configuration's C(node) unless set; without that V(auto) on a cluster of several nodes, and the
        template's node on a single one.
    type: str
  full_clone:
    description:
      - Whether to make a full clone. A clone is linked unless this or O(storage) asks for a full one, the template
        lies on another storage than the
        configuration's C(storage), or that storage has no linked clones.
    type: bool
  storage:
    description: Storage for a full clone.
    type: str
  pool:
    description: Resource pool to put the VM in.
    type: str
  cores:
    description: Number of cores. The template's unless set.
    type: int
  memory:
    description: Memory in MiB. The template's unless set.
    type: int
  cpu_type:
    description: CPU type, such as V(host) or V(x86-64-v2-AES). The template's unless set.
    type: str
  disk_size:
    description: Size of the boot disk, such as V(20G), or V(+10G) to add to the template's. It never shrinks.
    type: str
  bridge:
    description: Network bridge of the first interface. The template's unless set.
    type: str
  network_model:
    description: Model of the first interface. The template's unless set.
    type: str
    choices: [virtio, e1000, e1000e, rtl8139, vmxnet3]
  vlan_tag:
    description: VLAN of the first interface, from V(1) to V(4094). The template's unless set.
    type: int
  second_bridge:
    description: Network bridge of a second interface, which is made where the template has none.
    type: str
  second_vlan_tag:
    description: VLAN of the second interface, from V(1) to V(4094).
    type: int
  second_ip_config:
    description: Cloud-init network configuration of the second interface, as O(ip_config).
    type: str
  firewall:
    description: Whether the firewall of Proxmox VE is on for the first interface.
    type: bool
  firewall_group:
    description: Security group of Proxmox VE that is put into the VM's firewall rules, with its firewall on. The
      group has to exist.
    type: str
  cloud_init_user:
    description: User that cloud-init creates instead of the image's own.
    type: str
  cloud_init_password:
    description:
      - Password of that user. Proxmox VE keeps its hash; this collection keeps nothing of it.
      - Has to be a text. YAML reads V(012345) as a number, so put it in quotes.
    type: raw
  cloud_init_upgrade:
    description: Whether cloud-init upgrades the packages at the first start. Proxmox VE does so unless told otherwise.
    type: bool
  cloud_init_vendor_data:
    description:
      - Vendor data for cloud-init, as the volume id of a snippet that is there, such as V(local:snippets/vendor.yaml).
      - It is used beside what Proxmox VE or O(cloud_init_user_data) say.
    type: str
  ip_config:
    description: Cloud-init network configuration, such as V(ip=dhcp) or V(ip=192.0.2.10/24,gw=192.0.2.1).
    type: str
  nameserver:
    description: Cloud-init name servers, separated by blanks or commas.
    type: str
  searchdomain:
    description: Cloud-init search domain; several are separated by blanks.
    type: str
  ssh_public_keys:
    description:
      - Public keys that cloud-init puts into the VM - a list of keys, or a text with one key a line, such as a file
        or a survey's textarea.
      - Empty lines and lines that begin with C(#) are left out. Options of a key, such as C(from="192.0.2.0/24"),
        are kept.
      - A private key is refused.
    type: raw
  cloud_init_user_data:
    description:
      - User data for cloud-init, such as a C(#cloud-config) document. It replaces what Proxmox VE would say of
        users and keys.
      - It is written as a snippet, readable for root alone, and removed with the sandbox, or when the creation
        fails. It stands nowhere else.
      - Proxmox VE takes no uploads of snippets, so the module has to run on the node that will hold the VM, or on a
        host that shares the storage
        C(snippets_storage) with it at C(snippets_dir).
    type: str
  workspace:
    description:
      - Name (or id) of a workspace that the sandbox gets before it starts. It has to exist and to be detached; see
        M(agentlab.proxmox.agentlab_workspace).
      - It is detached again before the sandbox is destroyed, and kept.
    type: str
  tags:
    description:
      - Tags of the record and the VM, in small letters. The VM also gets the tag V(agentlab).
      - A list, or a text with commas, blanks or line feeds between them.
      - A cluster may forbid tags. A sandbox is then created without them, with a warning; its record has them.
    type: list
    elements: str
  description:
    description:
      - Text for the notes of the VM in Proxmox VE. It stands below the lines by which the VM is recognised, which stay.
      - A profile's C(description) is the profile's own text.
    type: str
  update:
    description:
      - With O(state=present), apply O(cores), O(memory), O(tags) and O(description) to a sandbox that is there,
        where they differ.
      - Without it, and for all other options, a warning names each option that was given and differs from what the
        sandbox was created with. Of
        O(cloud_init_user_data) and O(cloud_init_password) nothing is kept, so they are not compared.
    type: bool
    default: false
  allow_restart:
    description:
      - Whether O(update) may stop and start the VM where Proxmox VE needs that - for O(cores) and O(memory) of a VM
        that runs.
      - Without it such an update is refused, and nothing is changed. Tags and description need no restart.
    type: bool
    default: false
  ttl:
    description:
      - Time until the lease runs out, as minutes (V(120)) or a duration (V(90s), V(30m), V(2h), V(1.5h), V(1d12h)).
      - The profile's default, or else the configuration's C(default_ttl) (4 hours), unless set.
      - Only used when the sandbox is created; see M(agentlab.proxmox.agentlab_lease).
    type: str
  wait_for_ip:
    description:
      - Whether to wait until the guest agent names an address.
      - With O(state=present), also for a sandbox that is there and runs, if it has no address yet or was started since.
        An address that is more than five minutes old is looked up once, without waiting.
      - With O(state=started), the address is looked up anew, because a guest that was started may have got another one.
    type: bool
    default: false
  wait_for_cloud_init:
    description:
      - Whether to wait until the guest agent shows that cloud-init has ended. When it ended with errors the sandbox
        becomes C(FAILED), and the VM stays.
      - Reads C(/run/cloud-init/result.json) through the guest agent, which needs the privilege
        C(VM.GuestAgent.FileRead) or C(VM.GuestAgent.Unrestricted)
        on Proxmox VE 9, C(VM.Monitor) on 8.
    type: bool
    default: false
  items:
    description:
      - Several sandboxes to create, several at once, with O(state=present). Each has a O(items[].name) or a
        O(items[].vmid), and any option of a creation.
        What it leaves out is taken from the task's own options.
      - All of them are checked before anything is done. Then each has an outcome of its own, and a failed one stops
        no other. Run again, the task goes on
        with those that are not there.
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

- name: Create one of a kind, for less time than its profile says
  agentlab.proxmox.agentlab_sandbox:
    name: agent-2
    profile: yolo-ephemeral
    ttl: 30m

- name: Create one on the node that suits best
  agentlab.proxmox.agentlab_sandbox:
    name: agent-4
    node: auto

- name: Create three at once, of which one is larger
  agentlab.proxmox.agentlab_sandbox:
    template: debian-13
    memory: 2048
    ttl: 2h
    items:
      - name: worker-1
      - name: worker-2
      - name: worker-3
        memory: 4096

- name: Create one in a VLAN, with a second interface
  agentlab.proxmox.agentlab_sandbox:
    name: agent-3
    template: debian-13
    ip_config: ip=dhcp
    vlan_tag: 42
    second_bridge: vmbr1
    second_ip_config: ip=198.51.100.10/24
    cloud_init_upgrade: false
    description: Nightly build

- name: Give it more memory, which takes a restart
  agentlab.proxmox.agentlab_sandbox:
    name: agent-3
    memory: 4096
    tags: [nightly]
    update: true
    allow_restart: true

- name: Stop it
  agentlab.proxmox.agentlab_sandbox:
    vmid: "{{ created.sandbox.vmid }}"
    state: stopped

- name: Destroy it, whatever state it is in
  agentlab.proxmox.agentlab_sandbox:
    vmid: "{{ created.sandbox.vmid }}"
    state: absent
    force: true

- name: Destroy several at once
  agentlab.proxmox.agentlab_sandbox:
    vmids: [1009, 1010, 1011]
    state: absent
    force: true
"""

RETURN = r"""
sandboxes:
  description:
    - The sandboxes as they are after the task, in the order asked for. Times are UTC, absent values null.
    - C(ip_seen_at) says when the guest agent last named the address. With an address, null means that the
      sandbox was started since, so the address may be an old one.
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
  description: The one sandbox, when one was asked for; null when there is none.
  returned: when O(vmids) and O(items) are not used
  type: dict
results:
  description: What became of each, in the order asked for.
  returned: always
  type: list
  elements: dict
  contains:
    vmid: {description: The VMID., type: int, returned: always}
    uuid: {description: The sandbox's own UUID., type: str, returned: always}
    outcome:
      description:
        - One word, such as V(created), V(destroyed), V(unchanged), V(not_found), V(kept) or V(failed).
        - In check mode V(would_create), V(would_update), V(would_destroy), or V(would_mark_destroyed) when the VM
          is gone
          or belongs to somebody else, so that only the record would be closed.
      type: str
      returned: always
    previous_state: {description: The state it was in., type: str, returned: always}
    state: {description: The state it is in now., type: str, returned: always}
    reason: {description: 'Why, in one word.', type: str, returned: always}
    message: {description: 'Why, and what to do, as a sentence.', type: str, returned: always}
    after: {description: What was changed of a sandbox that was there, type: dict, returned: when something was}
    before: {description: What that was before., type: dict, returned: when something was}
    upids: {description: Task ids of Proxmox VE., type: list, elements: str, returned: always}
    placement:
      description:
        - Why the sandbox goes to its node. C(node), C(strategy), C(by) (what was compared, C(memory) or
          C(sandboxes)), and C(nodes), a list.
        - Each entry of C(nodes) has C(node), C(chosen), C(reason) (a word), C(message), C(free_memory) in MiB (null
          where the node shows no figures) and
          C(sandboxes), how many are on it.
      type: dict
      returned: when the node was chosen (O(node=auto))
failed_count:
  description: How many of them failed.
  returned: always
  type: int
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
    # raw, because Ansible would turn a number into text.
    "cloud_init_password": {"type": "raw", "no_log": True},
    "cloud_init_upgrade": {"type": "bool"},
    "cloud_init_vendor_data": {"type": "str"},
    "ip_config": {"type": "str"},
    "nameserver": {"type": "str"},
    "searchdomain": {"type": "str"},
    # raw, because Ansible would split the text at commas, which the options of a key may contain.
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
    # Imported here, because a run needs only the code for its state.
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _sandbox

    return _sandbox.run(module, context, CREATION)


EXCLUSIVE = [("vmid", "vmids"), ("name", "vmids"), ("items", "vmid"), ("items", "vmids"), ("items", "name")]


def main(module_class=_adapter.AnsibleModule):
    _adapter.run(ARGUMENT_SPEC, run_module, module_class=module_class, mutually_exclusive=EXCLUSIVE)


if __name__ == "__main__":
    main()
