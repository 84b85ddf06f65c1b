#!/usr/bin/python
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agentlab_awx_setup
short_description: Set up AWX for sandboxes, or remove that set-up
version_added: 1.1.0
description:
  - Creates a credential type, a credential, a project, job templates with surveys, and schedules in one organization
    of AWX or of the controller of Automation Platform.
  - Run the playbook C(agentlab.proxmox.awx_setup) instead of this module. The playbook calls the module with the
    surveys of the collection.
  - The module looks up every object by its name and organization, and never changes objects of another organization.
  - The module changes objects that it did not create only with O(adopt).
options:
  host:
    description: Address of AWX with its scheme, such as V(https://awx.example.net).
    type: str
    required: true
  api_path:
    description: Path of the API below O(host). V(/api/controller/v2) for the gateway of Automation Platform 2.5.
    type: str
    default: /api/v2
  token:
    description: OAuth token of AWX. With a token, O(username) and O(password) are not used.
    type: str
  username:
    description: User of AWX.
    type: str
  password:
    description: Password of O(username).
    type: str
  validate_certs:
    description: Whether the certificate of AWX is verified.
    type: bool
    default: true
  timeout:
    description: Seconds that one request to AWX may take.
    type: int
    default: 30
  state:
    description:
      - V(present) creates missing objects and changes objects that differ.
      - V(absent) removes the objects that this module created, and no others.
    type: str
    choices: [present, absent]
    default: present
  adopt:
    description:
      - Whether the module may change objects that it did not create, if they have the name and organization of an
        object of this set-up. Without this option the module lists these objects, and changes nothing at all.
      - With O(state=absent), whether schedules and workflow nodes of other people that use a template may be removed
        together with the template.
    type: bool
    default: false
  organization:
    description: Name of the organization.
    type: str
    default: Default
  project:
    description: Name of the project.
    type: str
    default: agentlab
  project_scm_url:
    description: URL of the Git repository of the project. Without a URL the project must exist already.
    type: str
    default: ""
  project_scm_branch:
    description: Branch of O(project_scm_url). Without this option, the repository's default branch.
    type: str
    default: ""
  project_update_on_launch:
    description: Whether AWX syncs the project when a job is launched.
    type: bool
    default: true
  project_cache_timeout:
    description: Seconds after a sync during which a launch does not sync the project again.
    type: int
    default: 3600
  project_timeout:
    description: Seconds to wait for the sync of the project.
    type: int
    default: 600
  inventory:
    description: Name of the inventory. Required with O(state=present).
    type: str
    default: ""
  hosts:
    description: Group or host of the inventory on which the playbooks run.
    type: str
    default: pve
  allow_many_hosts:
    description: Whether create, renew, destroy and job may run on more than one host.
    type: bool
    default: false
  execution_environment:
    description: Name of the execution environment of the templates. Without this option, the default of AWX.
    type: str
    default: ""
  machine_credential:
    description: Name of the SSH credential for the hosts.
    type: str
    default: ""
  notification:
    description: Name of a notification template that reports failed jobs.
    type: str
    default: ""
  galaxy_check:
    description: Whether to refuse an organization without a Galaxy credential.
    type: bool
    default: true
  prefix:
    description: Beginning of the names of the templates, the schedules and the credential.
    type: str
    default: "agentlab - "
  update_secrets:
    description:
      - Whether to write secrets of O(credential_inputs) into a credential that exists already.
      - AWX never shows a secret, so the module cannot compare it. Each run with this option reports a change.
    type: bool
    default: false
  credential_type:
    description: The credential type, in the form of the AWX API.
    type: dict
    required: true
  credential_inputs:
    description: Values of the credential. Without values, the module creates neither credential type nor credential.
    type: dict
    default: {}
    suboptions:
      api_host:
        description: Host of the Proxmox VE API.
        type: str
      api_port:
        description: Port of the Proxmox VE API.
        type: str
      api_user:
        description: User with realm.
        type: str
      api_password:
        description: Password of O(credential_inputs.api_user).
        type: str
      api_token_id:
        description: API token, as V(user@realm!name).
        type: str
      api_token_secret:
        description: Secret of O(credential_inputs.api_token_id).
        type: str
      validate_certs:
        description: Whether to verify the certificate of Proxmox VE.
        type: str
      ca_path:
        description: Path of the CA certificate on the hosts.
        type: str
      database:
        description: The records - a path on the hosts, or the DSN of a PostgreSQL database.
        type: str
      database_password:
        description: Password for the DSN.
        type: str
  templates:
    description: Job templates, each with playbook, survey, extra variables and schedule.
    type: list
    elements: dict
    required: true
requirements:
  - python >= 3.11
author:
  - agentlab.proxmox contributors (@agentlab)
attributes:
  check_mode:
    description: Plans with full reads and writes nothing.
    support: full
  diff_mode:
    description: Shows each object before and after, without secrets.
    support: full
"""

EXAMPLES = r"""
- name: Create a job template in the organization Default
  agentlab.proxmox.agentlab_awx_setup:
    host: https://awx.example.net
    token: "{{ lookup('ansible.builtin.env', 'CONTROLLER_OAUTH_TOKEN') }}"
    inventory: proxmox
    project_scm_url: https://git.example.net/agentlab-awx.git
    credential_type:
      name: agentlab Proxmox VE API
      description: A token of Proxmox VE
      kind: cloud
      inputs: {fields: []}
    templates:
      - name: reconcile
        description: Expire leases that are over
        playbook: reconcile.yml
"""

RETURN = r"""
steps:
  description: The steps in their order. In check mode and after a failure, also the steps that were not done.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: Kind of the object, such as C(job template).
      type: str
      returned: always
    name:
      description: Name of the object.
      type: str
      returned: always
    action:
      description: The action on the object, such as C(created).
      type: str
      returned: always
    fields:
      description: Fields of the object that differed.
      type: list
      elements: str
      returned: always
    done:
      description: Whether the step was done.
      type: bool
      returned: always
foreign:
  description: Objects that this module did not create but would change. A run changes them only with O(adopt).
  returned: always
  type: list
  elements: str
notes:
  description: Further information, such as objects that were kept and why.
  returned: always
  type: list
  elements: str
lines:
  description: The steps, RV(foreign) and RV(notes), as lines for people.
  returned: always
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.agentlab.proxmox.plugins.module_utils import (
    _awx_client,
    _awx_plan,
    _awx_set_up,
    _awx_take_away,
)

TEXT = {"type": "str"}
ARGUMENT_SPEC = {
    "host": {"type": "str", "required": True},
    "api_path": {"type": "str", "default": "/api/v2"},
    "token": {"type": "str", "no_log": True},
    "username": TEXT,
    "password": {"type": "str", "no_log": True},
    "validate_certs": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 30},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "adopt": {"type": "bool", "default": False},
    "organization": {"type": "str", "default": "Default"},
    "project": {"type": "str", "default": "agentlab"},
    "project_scm_url": {"type": "str", "default": ""},
    "project_scm_branch": {"type": "str", "default": ""},
    "project_update_on_launch": {"type": "bool", "default": True},
    "project_cache_timeout": {"type": "int", "default": 3600},
    "project_timeout": {"type": "int", "default": 600},
    "inventory": {"type": "str", "default": ""},
    "hosts": {"type": "str", "default": "pve"},
    "allow_many_hosts": {"type": "bool", "default": False},
    "execution_environment": {"type": "str", "default": ""},
    "machine_credential": {"type": "str", "default": ""},
    "notification": {"type": "str", "default": ""},
    "galaxy_check": {"type": "bool", "default": True},
    "prefix": {"type": "str", "default": "agentlab - "},
    # The option is a switch, not a secret.
    "update_secrets": {"type": "bool", "default": False, "no_log": False},
    "credential_type": {"type": "dict", "required": True},
    "credential_inputs": {
        "type": "dict",
        "default": {},
        "options": {
            "api_host": TEXT,
            "api_port": TEXT,
            "api_user": TEXT,
            "api_password": {"type": "str", "no_log": True},
            "api_token_id": TEXT,
            "api_token_secret": {"type": "str", "no_log": True},
            "validate_certs": TEXT,
            "ca_path": TEXT,
            "database": {"type": "str", "no_log": True},
            "database_password": {"type": "str", "no_log": True},
        },
    },
    "templates": {"type": "list", "elements": "dict", "required": True},
}


def read_desired(params):
    """Return the options for the planner. AWX stores texts without surrounding blanks, so the options lose them too."""
    names = _awx_plan.DesiredObjects.__dataclass_fields__
    values = {name: params[name] for name in names}
    # The blank at the end of the prefix separates it from the rest of the name.
    values = {
        name: value.strip() if isinstance(value, str) and name != "prefix" else value for name, value in values.items()
    }
    kind = values["credential_type"]
    values["credential_type"] = {**kind, "name": str(kind.get("name", "")).strip()}
    values["credential_inputs"] = {
        name: value.strip() for name, value in (params["credential_inputs"] or {}).items() if value and value.strip()
    }
    return _awx_plan.DesiredObjects(**values)


def main():
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    plan = _awx_plan.Plan()
    done_steps = 0

    def compose_result():
        steps = [
            {
                "kind": step.kind,
                "name": step.name,
                "action": step.action,
                "fields": step.fields,
                "done": number < done_steps,
            }
            for number, step in enumerate(plan.steps)
        ]
        pending = module.check_mode
        lines = [step.describe(pending) for number, step in enumerate(plan.steps) if pending or number < done_steps]
        lines += [
            f"not made by this set-up, changed only with awx_adopt=true: {text}" for text in plan.foreign if pending
        ]
        before = {f"{step.kind} {step.name}": step.before for step in plan.steps if step.before or step.after}
        after = {f"{step.kind} {step.name}": step.after for step in plan.steps if step.before or step.after}
        answer = {
            "changed": any(step.changes for number, step in enumerate(plan.steps) if pending or number < done_steps),
            "steps": steps,
            "foreign": plan.foreign,
            "notes": plan.notes,
            "lines": lines + [f"note: {text}" for text in plan.notes],
        }
        if module._diff:
            answer["diff"] = {"before": before, "after": after}
        return answer

    try:
        client = _awx_client.Client(
            params["host"],
            params["api_path"],
            token=params["token"] or "",
            username=params["username"] or "",
            password=params["password"] or "",
            validate_certs=params["validate_certs"],
            timeout=params["timeout"],
        )
        if params["state"] == "absent":
            remover = _awx_take_away.TakeAway(client, read_desired(params))
            plan = remover.plan
            remover.take_away()
        else:
            maker = _awx_set_up.SetUp(client, read_desired(params))
            plan = maker.plan
            maker.set_up()
        if plan.problems:
            module.fail_json(msg=". ".join(plan.problems), **compose_result())
        if plan.foreign and not module.check_mode and not params["adopt"]:
            module.fail_json(
                msg=(
                    f"nothing was changed: these objects of the organization {params['organization']} were not made "
                    f"by this set-up: {'; '.join(plan.foreign)}. Choose another awx_prefix or awx_project, or set "
                    "awx_adopt to true to take them over"
                ),
                **compose_result(),
            )
        if not module.check_mode:
            for step in plan.steps:
                step.run()
                done_steps += 1
    except _awx_client.AwxError as error:
        after = (
            f" (done before that: {done_steps} of {len(plan.steps)} steps; they stay, and the next run goes on)"
            if done_steps
            else ""
        )
        module.fail_json(msg=f"{error}{after}", **compose_result())
    module.exit_json(**compose_result())


if __name__ == "__main__":
    main()
