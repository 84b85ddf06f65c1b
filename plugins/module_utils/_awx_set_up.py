# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the set-up of AWX: which objects are made, and which are changed."""

from __future__ import annotations

import json
import re
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import Refused
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    BRANCH_LIMIT,
    CREDENTIAL_TEXT,
    ENCRYPTED,
    LABEL,
    NAME_LIMIT,
    NUMBER_LIMIT,
    URL_LIMIT,
    Id,
    Later,
    Plan,
    has_our_mark,
    hide_login,
    is_same_value,
    make_description,
    resolve_id,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_project import ProjectPlanner


class SetUp(ProjectPlanner):
    """Plan what the set-up makes and changes."""

    def set_up(self) -> Plan:
        """Plan all objects of the set-up, in the order in which AWX needs them."""
        desired = self.desired
        self._check_options()
        organization = self.find_only("organizations", desired.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        inventory = self.find_only("inventories", desired.inventory, "awx_inventory", organization=self.organization)
        if inventory:
            self._check_hosts(inventory)
        environment = self._find_execution_environment()
        machine = None
        if desired.machine_credential:
            machine = self.find_only(
                "credentials",
                desired.machine_credential,
                "awx_machine_credential",
                organization=self.organization,
                credential_type__kind="ssh",
            )
        notification = None
        if desired.notification:
            notification = self.find_only(
                "notification_templates", desired.notification, "awx_notification", organization=self.organization
            )
        self._check_galaxy()
        if self.plan.problems:
            return self.plan
        credential = self._plan_credential() if desired.credential_inputs else None
        project = self._plan_project()
        if self.plan.problems or project is None or inventory is None:
            return self.plan
        for template in desired.templates:
            self._plan_template(template, project, inventory, environment, machine, credential, notification)
        return self.plan

    def _check_options(self) -> None:
        """Note what AWX would refuse in the middle of a run, before anything is written."""
        desired = self.desired
        names = [("awx_project", desired.project)]
        if desired.credential_inputs:
            names.append(("awx_credential_type_name", desired.credential_type["name"]))
        prefixed = [desired.credential_name]
        for template in desired.templates:
            prefixed.append(desired.name_template(template))
            if template.get("schedule"):
                prefixed.append(desired.add_prefix(template["schedule"]["name"]))
        names.append(("awx_prefix", max(prefixed, key=len)))
        limited = [(option, text, NAME_LIMIT) for option, text in names]
        limited += [
            ("awx_project_scm_url", desired.project_scm_url, URL_LIMIT),
            ("awx_project_scm_branch", desired.project_scm_branch, BRANCH_LIMIT),
        ]
        for option, text, limit in limited:
            if len(text) > limit:
                self.plan.problems.append(
                    f"{option}: {hide_login(text)[:40]}... would be {len(text)} characters long; AWX takes at most "
                    f"{limit}. Shorten it by {len(text) - limit}"
                )
        if not 0 <= desired.project_cache_timeout <= NUMBER_LIMIT:
            self.plan.problems.append(
                f"awx_project_cache_timeout: {desired.project_cache_timeout} is outside of 0 to {NUMBER_LIMIT} "
                "seconds; 0 syncs the project with each launch"
            )
        inputs = desired.credential_inputs
        if not inputs:
            return
        if not inputs.get("api_host") and (inputs.get("api_token_id") or inputs.get("api_user")):
            self.plan.problems.append(
                "awx_proxmox_api_host: missing; a token or user kept in AWX needs the host of the Proxmox VE API"
            )
        if inputs.get("api_host") and not (inputs.get("api_token_id") or inputs.get("api_user")):
            self.plan.problems.append(
                "awx_proxmox_api_token_id: missing; awx_proxmox_api_host needs a token (or awx_proxmox_api_user with "
                "its password)"
            )

    def _find_execution_environment(self) -> int | None:
        name = self.desired.execution_environment
        if not name:
            return None
        # The name is unique in all of AWX; an environment without an organization is for everybody.
        row = self.find("execution_environments", name)
        if row and row.get("organization") in (None, self.organization):
            return int(row["id"])
        if row:
            self.plan.problems.append(
                f"execution environment {name}: {self._describe_owners([row])}; name one of "
                f"{self.desired.organization} with awx_execution_environment"
            )
        else:
            self.plan.problems.append(
                f"execution_environments of AWX has none named {name}; create it first, or name another with "
                "awx_execution_environment"
            )
        return None

    def _check_hosts(self, inventory: dict[str, Any]) -> None:
        hosts, number = self.desired.hosts, inventory["id"]
        if hosts in ("all", "localhost") or not re.fullmatch(r"[\w.-]+", hosts):
            return
        dynamic = bool(inventory.get("has_inventory_sources")) or bool(inventory.get("kind"))
        groups = self.client.list_rows(f"inventories/{number}/groups/", name=hosts)
        if groups:
            count = len(self.client.list_rows(f"groups/{groups[0]['id']}/all_hosts/"))
        else:
            count = len(self.client.list_rows(f"inventories/{number}/hosts/", name=hosts))
        if count == 0 and dynamic:
            self.plan.notes.append(
                f"the inventory {inventory['name']} has no host for {hosts} yet; jobs fail until its source has "
                "brought one"
            )
        elif count == 0:
            self.plan.problems.append(
                f"awx_hosts: the inventory {inventory['name']} has no group or host {hosts} with a host in it; add "
                "one host of each cluster to it, or name another group or host with awx_hosts"
            )
        elif count > 1 and not self.desired.allow_many_hosts:
            self.plan.notes.append(
                f"the group {hosts} has {count} hosts; create, renew, destroy and job refuse to run on more than one. "
                "Keep one host of the cluster in it, name one with awx_hosts, or set awx_allow_many_hosts if each "
                "host keeps records of its own"
            )

    def _check_galaxy(self) -> None:
        if not self.desired.galaxy_check:
            return
        try:
            rows = self.client.list_rows(f"organizations/{self.organization}/galaxy_credentials/")
        except Refused as refused:
            # Not every user may read them.
            if refused.status in (403, 404):
                return
            raise
        if not rows:
            self.plan.problems.append(
                f"the organization {self.desired.organization} has no Galaxy credential, so AWX installs no collection "
                "and every job fails. Add one to the organization (such as Ansible Galaxy), or set awx_galaxy_check "
                "to false if the collection is in the execution environment or in the project"
            )

    def _plan_credential(self) -> Id | None:
        kind_row = self._find_credential_type()
        kind_id = self._plan_credential_type(kind_row)
        inputs = {key: value for key, value in self.desired.credential_inputs.items() if value not in (None, "")}
        secrets = {item["id"] for item in self.desired.credential_type["inputs"]["fields"] if item.get("secret")}
        name = self.desired.credential_name
        row = None
        if kind_row is not None:
            row = self.find("credentials", name, organization=self.organization, credential_type=kind_row["id"])
        text = CREDENTIAL_TEXT
        self._check_secrets(row, inputs)
        body = {
            "name": name,
            "description": make_description(text),
            "organization": self.organization,
            "credential_type": kind_id,
            "inputs": inputs,
        }
        shown = {"inputs": {key: ENCRYPTED if key in secrets else value for key, value in inputs.items()}}
        if row is None:
            return self.ensure("credentials", body, text, None, shown=shown)
        present = dict(row.get("inputs") or {})
        # PATCH replaces all inputs. AWX keeps a secret for which it is sent "$encrypted$".
        merged = {**{key: value for key, value in present.items() if key in secrets}, **inputs}
        plain = {key for key in {*present, *merged} if key not in secrets}
        differs = any(present.get(key) != merged.get(key) for key in plain) or any(
            key not in present for key in merged if key in secrets
        )
        kept_secrets = [key for key in inputs if key in secrets and key in present]
        if differs or (self.desired.update_secrets and kept_secrets):
            body["inputs"] = merged
            shown = {"inputs": {key: ENCRYPTED if key in secrets else value for key, value in merged.items()}}
        else:
            body["inputs"] = present
            if kept_secrets:
                self.plan.notes.append(
                    f"credential {name}: AWX does not show its secret, so it cannot be compared and stays as it is; "
                    "to write the one that you gave, set awx_update_secrets to true"
                )
        number = int(row["id"])
        if self.desired.update_secrets and kept_secrets and not differs:
            # The fields that can be seen are alike; the secret is written all the same.
            self.add_step(
                "changed",
                "credential",
                name,
                lambda: self.send_change("PATCH", f"credentials/{number}/", "credential", name, {"inputs": merged}),
                ["inputs"],
            )
            body["inputs"] = present
        return self.ensure("credentials", body, text, row, shown=shown, keep=("credential_type",))

    def _check_secrets(self, row: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Refuse a token or user without its secret, before anything is written."""
        present = (row or {}).get("inputs") or {}
        for login, secret, where in (
            ("api_token_id", "api_token_secret", "PROXMOX_TOKEN_SECRET (or awx_proxmox_api_token_secret)"),
            ("api_user", "api_password", "PROXMOX_PASSWORD (or awx_proxmox_api_password)"),
        ):
            if login == "api_user" and inputs.get("api_token_id"):
                continue
            if not inputs.get(login) or inputs.get(secret):
                continue
            if not present.get(secret):
                self.plan.problems.append(f"awx_proxmox_{secret}: missing; awx_proxmox_{login} needs it. Set {where}")
            elif present.get(login) != inputs[login]:
                self.plan.problems.append(
                    f"awx_proxmox_{secret}: missing; awx_proxmox_{login} differs from the one in AWX, and another "
                    f"{login} has another secret. Set {where}"
                )

    def _plan_credential_type(self, row: dict[str, Any] | None) -> Id:
        body = dict(self.desired.credential_type)
        text, name = body["description"], body["name"]
        body["description"] = make_description(text)
        if row is None:
            if self._lacks_system_rights():
                self.plan.problems.append(
                    f"credential type {name}: it is not there yet, and only a system administrator of AWX can create "
                    "it. Let one run this set-up once, or leave out awx_proxmox_* and keep the token on the hosts"
                )
            return self.ensure("credential_types", body, text, None)
        if row.get("inputs") != body["inputs"]:
            users = self.client.list_rows("credentials/", credential_type=row["id"])
            if users:
                present_fields = {item["id"] for item in (row.get("inputs") or {}).get("fields", [])}
                missing = [item["id"] for item in body["inputs"]["fields"] if item["id"] not in present_fields]
                self.plan.problems.append(
                    f"credential type {name}: its fields differ (missing: {', '.join(missing) or 'none'}), and AWX "
                    "changes no fields of a type that is in use, here by "
                    f"{', '.join(sorted(user['name'] for user in users)[:5])}. Name another with "
                    f"awx_credential_type_name, such as '{name} 2': that type is made beside it, the templates get a "
                    "credential of it, and the old one can be deleted"
                )
                return int(row["id"])
        differing = [key for key, value in body.items() if not is_same_value(key, row.get(key), value)]
        if differing and self._lacks_system_rights():
            self.plan.notes.append(
                f"credential type {name}: {', '.join(differing)} would be changed, which only a system administrator "
                "of AWX can do. It is used as it is"
            )
            return int(row["id"])
        return self.ensure("credential_types", body, text, row)

    def _plan_template(
        self,
        template: dict[str, Any],
        project: Id,
        inventory: dict[str, Any],
        environment: int | None,
        machine: dict[str, Any] | None,
        credential: Id | None,
        notification: dict[str, Any] | None,
    ) -> None:
        name = self.desired.name_template(template)
        survey = template.get("survey") or []
        extra_vars = {"agentlab_hosts": self.desired.hosts, **(template.get("extra_vars") or {})}
        if self.desired.allow_many_hosts:
            extra_vars["agentlab_allow_many_hosts"] = True
        body = {
            "name": name,
            "description": make_description(template["description"]),
            "job_type": template.get("job_type") or "run",
            "project": project,
            "inventory": int(inventory["id"]),
            "playbook": template["playbook"],
            "extra_vars": json.dumps(extra_vars),
            "survey_enabled": bool(survey),
            "allow_simultaneous": bool(template.get("allow_simultaneous", True)),
        }
        if environment:
            body["execution_environment"] = environment
        row = self.find("job_templates", name, organization=self.organization)
        # A template on another project is somebody else's, whatever its description says. One without a project has
        # lost it: AWX keeps the templates of a project that is deleted.
        ours = row is None or (
            has_our_mark(row, template["description"]) and row.get("project") in (None, resolve_id(project))
        )
        number = self.ensure("job_templates", body, template["description"], row, ours=ours)
        self._plan_survey(number, name, survey)
        wanted_credentials: list[tuple[str, Id, Any]] = []
        if machine:
            wanted_credentials.append((machine["name"], int(machine["id"]), machine["credential_type"]))
        if credential is not None:
            wanted_credentials.append((self.desired.credential_name, credential, None))
        self._plan_attached_credentials(number, name, wanted_credentials)
        self._plan_label(number, name)
        if notification:
            self._plan_notification(number, name, notification)
        if "schedule" in template:
            self._plan_schedule(number, name, template["schedule"])

    def _plan_survey(self, number: Id, name: str, spec: list[dict[str, Any]]) -> None:
        if not spec:
            return
        present: Any = {}
        if not isinstance(number, Later):
            present = self.client.get(f"job_templates/{number}/survey_spec/") or {}
        if present.get("spec") == spec:
            return
        body = {"name": "", "description": "", "spec": spec}

        def post() -> None:
            self.send_change("POST", f"job_templates/{resolve_id(number)}/survey_spec/", "survey", name, body)

        before = {"spec": present["spec"]} if present.get("spec") else {}
        self.add_step("changed" if before else "created", "survey of", name, post, before=before, after={"spec": spec})

    def _plan_attached_credentials(self, number: Id, name: str, attachments: list[tuple[str, Id, Any]]) -> None:
        attached = [] if isinstance(number, Later) else self.client.list_rows(f"job_templates/{number}/credentials/")

        def post(body: dict[str, Any]) -> None:
            body = {key: resolve_id(value) for key, value in body.items()}
            self.send_change("POST", f"job_templates/{resolve_id(number)}/credentials/", "credential", name, body)

        for credential_name, credential, kind in attachments:
            if resolve_id(credential) in [row["id"] for row in attached]:
                continue
            for row in attached:
                # AWX allows one credential of a type. One of our name is of an earlier type, for the same variables.
                if kind is None:
                    conflicts = row["name"] == credential_name or self._is_our_type(row)
                else:
                    conflicts = row["credential_type"] == kind
                if conflicts:
                    self.add_step(
                        f"detached from {name}",
                        "credential",
                        row["name"],
                        lambda other=int(row["id"]): post({"id": other, "disassociate": True}),
                    )
            self.add_step(
                f"attached to {name}", "credential", credential_name, lambda new=credential: post({"id": new})
            )

    def _is_our_type(self, row: dict[str, Any]) -> bool:
        kind = (row.get("summary_fields") or {}).get("credential_type") or {}
        return bool(kind.get("name") == self.desired.credential_type["name"])

    def _plan_label(self, number: Id, name: str) -> None:
        if not isinstance(number, Later):
            rows = self.client.list_rows(f"job_templates/{number}/labels/", name=LABEL)
            if rows:
                return
        self.add_step(
            f"attached to {name}",
            "label",
            LABEL,
            lambda: self.send_change(
                "POST",
                f"job_templates/{resolve_id(number)}/labels/",
                "label",
                name,
                {"name": LABEL, "organization": self.organization},
            ),
        )

    def _plan_notification(self, number: Id, name: str, notification: dict[str, Any]) -> None:
        notification_id = int(notification["id"])
        path = "notification_templates_error"
        if not isinstance(number, Later):
            attached = self.client.list_rows(f"job_templates/{number}/{path}/")
            if notification_id in [row["id"] for row in attached]:
                return
        self.add_step(
            f"attached to {name}",
            "notification",
            notification["name"],
            lambda: self.send_change(
                "POST", f"job_templates/{resolve_id(number)}/{path}/", "notification", name, {"id": notification_id}
            ),
        )

    def _plan_schedule(self, number: Id, template: str, schedule: dict[str, Any]) -> None:
        name = self.desired.add_prefix(schedule["name"])
        row = None if isinstance(number, Later) else self.find("schedules", name, unified_job_template=number)
        if not schedule.get("rrule"):
            if row and not has_our_mark(row, schedule["description"]):
                self.note_kept(
                    "schedule", row, "the set-up did not make it, so leaving the schedule out does not remove it"
                )
            elif row:
                schedule_id = int(row["id"])
                self.add_step(
                    "deleted",
                    "schedule",
                    name,
                    lambda: self.send_change("DELETE", f"schedules/{schedule_id}/", "schedule", name),
                )
            return
        body = {
            "name": name,
            "description": make_description(schedule["description"]),
            "rrule": " ".join(schedule["rrule"].split()),
            "enabled": True,
        }
        # Whoever switches a schedule off in AWX means it: only a new one is switched on.
        self.ensure(
            "schedules",
            body,
            schedule["description"],
            row,
            create_path=lambda: f"job_templates/{resolve_id(number)}/schedules/",
            keep=("enabled",),
        )
