# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the removal of what the set-up of AWX made, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    ACTIVE,
    CREDENTIAL_TEXT,
    LABEL,
    NAMES,
    PROJECT_TEXT,
    Plan,
    made_here,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_planner import Planner


class TakeAway(Planner):
    """Plan the removal."""

    def take_away(self) -> Plan:
        """Plan the removal of what the set-up made, in the order in which AWX allows it."""
        desired = self.desired
        organization = self.only("organizations", desired.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        project = self.find("projects", desired.project, organization=self.organization)
        gone: set[int] = set()
        for template in desired.templates:
            row = self.find("job_templates", desired.template_name(template), organization=self.organization)
            if row is None:
                continue
            if not made_here(row, template["description"]):
                self.keep("job template", row, "the set-up did not make it")
                continue
            # A template without a project has lost it: AWX keeps the templates of a project that is deleted.
            if row.get("project") not in (None, project and project["id"]) and not desired.adopt:
                name = ((row.get("summary_fields") or {}).get("project") or {}).get("name") or row["project"]
                self.keep(
                    "job template",
                    row,
                    f"it belongs to the project {name}; name that project with awx_project, or set awx_adopt to true",
                )
                continue
            if self._take_template(template, row):
                gone.add(int(row["id"]))
        self._take_credential(gone)
        if project:
            self._take_project(project, gone)
        return self.plan

    def _take_template(self, template: dict[str, Any], row: dict[str, Any]) -> bool:
        number, name = int(row["id"]), row["name"]
        own_text = (template.get("schedule") or {}).get("description", "")
        schedules = self.client.rows(f"job_templates/{number}/schedules/")
        foreign = [item["name"] for item in schedules if not made_here(item, own_text)]
        nodes = self.client.rows("workflow_job_template_nodes/", unified_job_template=number)
        if (foreign or nodes) and not self.desired.adopt:
            dependents = [f"schedule {item}" for item in foreign] + [
                f"node {node['id']} of a workflow" for node in nodes
            ]
            self.keep(
                "job template",
                row,
                f"{', '.join(dependents)} would go with it; remove that first, or set awx_adopt to true",
            )
            return False
        self._refuse_running_jobs(f"job template {name}", unified_job_template=number)
        for item in schedules:
            self.add(
                "deleted",
                "schedule",
                item["name"],
                lambda path=f"schedules/{item['id']}/", title=item["name"]: self.write(
                    "DELETE", path, "schedule", title
                ),
            )
        labels = self.client.rows(f"job_templates/{number}/labels/", name=LABEL)
        for label in labels:
            # AWX deletes a label with its last use, but only when it is taken off: it has no DELETE for labels.
            self.add(
                f"taken off {name}",
                "label",
                LABEL,
                lambda other=int(label["id"]): self.write(
                    "POST", f"job_templates/{number}/labels/", "label", name, {"id": other, "disassociate": True}
                ),
            )
        self.add(
            "deleted",
            "job template",
            name,
            lambda: self.write("DELETE", f"job_templates/{number}/", "job template", name),
        )
        return True

    def _refuse_running_jobs(self, title: str, gone: Iterable[int] = (), **query: Any) -> None:
        """Note a problem when jobs are under way; those of the templates in ``gone`` are named there already."""
        running = [
            job
            for status in ACTIVE
            for job in self.client.rows("jobs/", status=status, **query)
            if job.get("unified_job_template") not in gone
        ]
        if running:
            jobs = ", ".join(
                f"{job['id']} ({job['status']})" for job in sorted(running, key=lambda job: int(job["id"]))
            )
            self.plan.problems.append(
                f"{title}: jobs {jobs} are under way; wait for them or cancel them, then run this again"
            )

    def _users_of(self, gone: set[int], **paths: str) -> list[str]:
        """Return the names of what uses an object: each path is a list of AWX with its filter.

        What belongs to the templates in ``gone`` does not count.
        """
        users: list[str] = []
        for path, query in paths.items():
            key, _separator, value = query.partition("=")
            for row in self.client.rows(f"{path}/", **{key: value}):
                owner = row["id"] if path == "job_templates" else row.get("unified_job_template")
                if owner is not None and int(owner) in gone:
                    continue
                kind = NAMES[path]
                users.append(f"{kind} {row['id'] if path == 'workflow_job_template_nodes' else row['name']}")
        return sorted(users)

    def _take_credential(self, gone: set[int]) -> None:
        name = self.desired.credential_name
        wanted_type = self._credential_type_row()
        types = {int(wanted_type["id"]): wanted_type} if wanted_type else {}
        removed: set[int] = set()
        # A run with another awx_credential_type_name has left a credential of the same name, of the earlier type.
        for row in self.client.rows("credentials/", name=name, organization=self.organization):
            if not made_here(row, CREDENTIAL_TEXT):
                if row["credential_type"] in types:
                    self.keep("credential", row, "the set-up did not make it")
                continue
            number = int(row["id"])
            type_id = int(row["credential_type"])
            if type_id not in types:
                types[type_id] = self.client.get(f"credential_types/{type_id}/")
            query = f"credentials={number}"
            users = self._users_of(
                gone,
                job_templates=query,
                inventory_sources=query,
                schedules=query,
                workflow_job_template_nodes=query,
            )
            if users:
                self.keep("credential", row, f"{', '.join(users)} use it")
                continue
            removed.add(number)
            self.add(
                "deleted",
                "credential",
                name,
                lambda path=f"credentials/{number}/": self.write("DELETE", path, "credential", name),
            )
        for kind in types.values():
            self._take_credential_type(kind, removed)

    def _take_credential_type(self, kind: dict[str, Any], removed: set[int]) -> None:
        if not made_here(kind, self.desired.credential_type["description"]):
            self.keep("credential type", kind, "the set-up did not make it")
            return
        users = [
            user for user in self.client.rows("credentials/", credential_type=kind["id"]) if user["id"] not in removed
        ]
        if users:
            self.keep("credential type", kind, f"{len(users)} other credentials are of it")
        elif self._lacks_system_rights():
            self.keep("credential type", kind, "only a system administrator of AWX can delete it")
        else:
            self.add(
                "deleted",
                "credential type",
                kind["name"],
                lambda: self.write("DELETE", f"credential_types/{kind['id']}/", "credential type", kind["name"]),
            )

    def _take_project(self, row: dict[str, Any], gone: set[int]) -> None:
        if not made_here(row, PROJECT_TEXT):
            self.keep("project", row, "the set-up did not make it")
            return
        # AWX deletes the inventory sources and schedules of a project together with it.
        users = self._users_of(
            gone,
            job_templates=f"project={row['id']}",
            inventory_sources=f"source_project={row['id']}",
            schedules=f"unified_job_template={row['id']}",
            workflow_job_template_nodes=f"unified_job_template={row['id']}",
        )
        if users:
            self.keep("project", row, f"{', '.join(users)} use it")
            return
        self._refuse_running_jobs(f"project {row['name']}", gone, project=row["id"])
        number, name = int(row["id"]), row["name"]
        if row.get("status") in ACTIVE:
            self.plan.problems.append(f"project {name}: its sync is {row['status']}; wait for it, then run this again")
        self.add("deleted", "project", name, lambda: self.write("DELETE", f"projects/{number}/", "project", name))
