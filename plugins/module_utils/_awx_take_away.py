# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the removal of what the set-up of AWX made, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    ACTIVE,
    CREDENTIAL_TEXT,
    KINDS,
    LABEL,
    PROJECT_TEXT,
    Plan,
    has_our_mark,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_planner import Planner


class TakeAway(Planner):
    """Plan the removal."""

    def take_away(self) -> Plan:
        """Plan the removal of what the set-up made, in the order in which AWX allows it."""
        desired = self.desired
        organization = self.find_only("organizations", desired.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        project = self.find("projects", desired.project, organization=self.organization)
        removed_templates: set[int] = set()
        for template in desired.templates:
            row = self.find("job_templates", desired.name_template(template), organization=self.organization)
            if row is None:
                continue
            if not has_our_mark(row, template["description"]):
                self.note_kept("job template", row, "the set-up did not make it")
                continue
            # A template without a project has lost it: AWX keeps the templates of a project that is deleted.
            if row.get("project") not in (None, project and project["id"]) and not desired.adopt:
                name = ((row.get("summary_fields") or {}).get("project") or {}).get("name") or row["project"]
                self.note_kept(
                    "job template",
                    row,
                    f"it belongs to the project {name}; name that project with awx_project, or set awx_adopt to true",
                )
                continue
            if self._plan_template_removal(template, row):
                removed_templates.add(int(row["id"]))
        self._plan_credential_removal(removed_templates)
        if project:
            self._plan_project_removal(project, removed_templates)
        return self.plan

    def _plan_template_removal(self, template: dict[str, Any], row: dict[str, Any]) -> bool:
        number, name = int(row["id"]), row["name"]
        own_text = (template.get("schedule") or {}).get("description", "")
        schedules = self.client.list_rows(f"job_templates/{number}/schedules/")
        foreign = [item["name"] for item in schedules if not has_our_mark(item, own_text)]
        nodes = self.client.list_rows("workflow_job_template_nodes/", unified_job_template=number)
        if (foreign or nodes) and not self.desired.adopt:
            dependents = [f"schedule {item}" for item in foreign] + [
                f"node {node['id']} of a workflow" for node in nodes
            ]
            self.note_kept(
                "job template",
                row,
                f"{', '.join(dependents)} would go with it; remove that first, or set awx_adopt to true",
            )
            return False
        self._refuse_running_jobs(f"job template {name}", unified_job_template=number)
        for item in schedules:
            self.add_step(
                "deleted",
                "schedule",
                item["name"],
                lambda path=f"schedules/{item['id']}/", title=item["name"]: self.send_change(
                    "DELETE", path, "schedule", title
                ),
            )
        labels = self.client.list_rows(f"job_templates/{number}/labels/", name=LABEL)
        for label in labels:
            # AWX deletes a label with its last use, but only when it is taken off: it has no DELETE for labels.
            self.add_step(
                f"taken off {name}",
                "label",
                LABEL,
                lambda other=int(label["id"]): self.send_change(
                    "POST", f"job_templates/{number}/labels/", "label", name, {"id": other, "disassociate": True}
                ),
            )
        self.add_step(
            "deleted",
            "job template",
            name,
            lambda: self.send_change("DELETE", f"job_templates/{number}/", "job template", name),
        )
        return True

    def _refuse_running_jobs(self, title: str, removed_templates: Iterable[int] = (), **query: Any) -> None:
        """Note a problem when jobs are under way. Jobs of ``removed_templates`` (ids) have been noted already."""
        running = [
            job
            for status in ACTIVE
            for job in self.client.list_rows("jobs/", status=status, **query)
            if job.get("unified_job_template") not in removed_templates
        ]
        if running:
            jobs = ", ".join(
                f"{job['id']} ({job['status']})" for job in sorted(running, key=lambda job: int(job["id"]))
            )
            self.plan.problems.append(
                f"{title}: jobs {jobs} are under way; wait for them or cancel them, then run this again"
            )

    def _list_users(self, removed_templates: set[int], **paths: str) -> list[str]:
        """Return the names of what uses an object: each path is a list of AWX with its filter.

        Users that belong to ``removed_templates`` (ids) do not count.
        """
        users: list[str] = []
        for path, query in paths.items():
            key, _separator, value = query.partition("=")
            for row in self.client.list_rows(f"{path}/", **{key: value}):
                owner = row["id"] if path == "job_templates" else row.get("unified_job_template")
                if owner is not None and int(owner) in removed_templates:
                    continue
                kind = KINDS[path]
                users.append(f"{kind} {row['id'] if path == 'workflow_job_template_nodes' else row['name']}")
        return sorted(users)

    def _plan_credential_removal(self, removed_templates: set[int]) -> None:
        name = self.desired.credential_name
        wanted_type = self._find_credential_type()
        types = {int(wanted_type["id"]): wanted_type} if wanted_type else {}
        removed_credentials: set[int] = set()
        # A run with another awx_credential_type_name has left a credential of the same name, of the earlier type.
        for row in self.client.list_rows("credentials/", name=name, organization=self.organization):
            if not has_our_mark(row, CREDENTIAL_TEXT):
                if row["credential_type"] in types:
                    self.note_kept("credential", row, "the set-up did not make it")
                continue
            number = int(row["id"])
            type_id = int(row["credential_type"])
            if type_id not in types:
                types[type_id] = self.client.get(f"credential_types/{type_id}/")
            query = f"credentials={number}"
            users = self._list_users(
                removed_templates,
                job_templates=query,
                inventory_sources=query,
                schedules=query,
                workflow_job_template_nodes=query,
            )
            if users:
                self.note_kept("credential", row, f"{', '.join(users)} use it")
                continue
            removed_credentials.add(number)
            self.add_step(
                "deleted",
                "credential",
                name,
                lambda path=f"credentials/{number}/": self.send_change("DELETE", path, "credential", name),
            )
        for kind in types.values():
            self._plan_credential_type_removal(kind, removed_credentials)

    def _plan_credential_type_removal(self, kind: dict[str, Any], removed_credentials: set[int]) -> None:
        if not has_our_mark(kind, self.desired.credential_type["description"]):
            self.note_kept("credential type", kind, "the set-up did not make it")
            return
        users = [
            user
            for user in self.client.list_rows("credentials/", credential_type=kind["id"])
            if user["id"] not in removed_credentials
        ]
        if users:
            self.note_kept("credential type", kind, f"{len(users)} other credentials are of it")
        elif self._lacks_system_rights():
            self.note_kept("credential type", kind, "only a system administrator of AWX can delete it")
        else:
            self.add_step(
                "deleted",
                "credential type",
                kind["name"],
                lambda: self.send_change("DELETE", f"credential_types/{kind['id']}/", "credential type", kind["name"]),
            )

    def _plan_project_removal(self, row: dict[str, Any], removed_templates: set[int]) -> None:
        if not has_our_mark(row, PROJECT_TEXT):
            self.note_kept("project", row, "the set-up did not make it")
            return
        # AWX deletes the inventory sources and schedules of a project together with it.
        users = self._list_users(
            removed_templates,
            job_templates=f"project={row['id']}",
            inventory_sources=f"source_project={row['id']}",
            schedules=f"unified_job_template={row['id']}",
            workflow_job_template_nodes=f"unified_job_template={row['id']}",
        )
        if users:
            self.note_kept("project", row, f"{', '.join(users)} use it")
            return
        self._refuse_running_jobs(f"project {row['name']}", removed_templates, project=row["id"])
        number, name = int(row["id"]), row["name"]
        if row.get("status") in ACTIVE:
            self.plan.problems.append(f"project {name}: its sync is {row['status']}; wait for it, then run this again")
        self.add_step(
            "deleted", "project", name, lambda: self.send_change("DELETE", f"projects/{number}/", "project", name)
        )
