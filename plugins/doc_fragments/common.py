# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    # Options that every module of the collection has.
    DOCUMENTATION = r"""
options:
  config_file:
    description:
      - Configuration file of agentlab on the host where the module runs. A file that is named here or by the
        environment variable must exist.
      - An option wins over the environment, the environment over the file.
      - The environment variable E(AGENTLAB_CONFIG) is used when the option is not set, then
        V(/etc/agentlab/config.yaml), which is read if it is there.
    type: path
  database:
    description:
      - The records - a SQLite file on the host where the module runs, created with mode 0600 if it is missing.
      - C(postgresql://USER@HOST/DATABASE) names a PostgreSQL database instead, which several hosts share.
      - The environment variable E(AGENTLAB_DATABASE) is used when the option is not set, then the configuration
        file, then
        V(/var/lib/agentlab/agentlab.db).
    type: path
  database_password:
    description:
      - Password of a PostgreSQL database. A SQLite file needs none.
    type: str
  api_host:
    description:
      - Host name or address of a Proxmox VE node. C(HOST:PORT), C(https://HOST:PORT) and a path before
        C(/api2/json) are understood too.
      - Without it C(pvesh) of the node itself is used, which needs no token.
      - The environment variable E(PROXMOX_HOST) is used when the option is not set.
    type: str
  api_port:
    description:
      - Port of the Proxmox VE API; V(8006) unless set.
      - The environment variable E(PROXMOX_PORT) is used when the option is not set.
    type: int
  api_user:
    description:
      - User with realm; V(root@pam) unless set.
      - The environment variable E(PROXMOX_USER) is used when the option is not set.
    type: str
  api_password:
    description:
      - Password of O(api_user). A token is better - it can have fewer privileges, and needs no second factor.
      - Put it in quotes. YAML reads C(012345), C(12:30) and C(yes) as something else, which is refused.
      - The environment variable E(PROXMOX_PASSWORD) is used when the option is not set.
    type: str
  api_token_id:
    description:
      - Name of an API token, as V(name) or as V(user@realm!name).
      - The environment variable E(PROXMOX_TOKEN_ID) is used when the option is not set.
    type: str
  api_token_secret:
    description:
      - Secret of O(api_token_id).
      - The environment variable E(PROXMOX_TOKEN_SECRET) is used when the option is not set.
    type: str
  validate_certs:
    description:
      - Whether the certificate of the API is verified; V(true) unless set.
      - The environment variable E(PROXMOX_VALIDATE_CERTS) is used when the option is not set.
    type: bool
  ca_path:
    description:
      - CA certificate to verify the API with, such as a copy of the node's C(/etc/pve/pve-root-ca.pem).
      - The environment variable E(PROXMOX_CA_PATH) is used when the option is not set.
    type: path
  api_timeout:
    description:
      - Seconds one request may take; V(30) unless set. The time for a task is C(wait_timeout), where a module has it.
      - The environment variable E(PROXMOX_API_TIMEOUT) is used when the option is not set.
    type: int
  actor:
    description:
      - Who acts, for the events in the record. The user who runs the module unless set; set it to the AWX job, for
        instance.
    type: str
requirements:
  - python >= 3.11
  - proxmoxer >= 1.2 and requests, with O(api_host); without it nothing but C(pvesh) of the node
  - PyYAML, if there is a configuration file
  - psycopg >= 3.1, with records on PostgreSQL
author:
  - agentlab.proxmox contributors (@agentlab)
"""

    # How sandboxes are chosen.
    SELECT = r"""
options:
  vmid:
    description: VMID of the sandbox.
    type: int
  vmids:
    description: VMIDs of several sandboxes, worked on at once. Also a text with commas, blanks or line feeds
      between them, as surveys give it.
    type: list
    elements: str
  name:
    description: Name of the sandbox.
    type: str
"""

    WAIT = r"""
options:
  wait_timeout:
    description:
      - Seconds to wait for each task of Proxmox; V(600) unless set here or in the configuration.
      - What does not end in time goes on in Proxmox; the next run takes it up.
    type: int
"""

    ATTRIBUTES = r"""
attributes:
  check_mode:
    description: Plans with full reads and writes nothing.
    support: full
  diff_mode:
    description: Tells state and lease before and after, by VMID.
    support: full
  action_group:
    description: Use C(group/agentlab.proxmox.agentlab) in C(module_defaults) to set options for all modules of the
      collection.
    support: full
    membership:
      - agentlab.proxmox.agentlab
  action:
    description:
      - Runs in the process of Ansible itself, instead of being copied and started, where both are the same Python
        on the same host
        (connection C(local)), and no C(become), C(environment), C(async) or C(timeout) is asked for. The answer is
        the same.
      - The variable C(agentlab_in_place=false) switches it off.
    support: full
options: {}
"""
