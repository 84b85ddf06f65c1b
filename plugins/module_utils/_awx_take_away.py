# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the removal of what the set-up of AWX made, and of nothing else."""

from __future__ import annotations

from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    ACTIVE,
    CREDENTIAL_TEXT,
    LABEL,
    PROJECT_TEXT,
    Plan,
    made_here,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_planner import Planner


class TakeAway(Planner):
    """Plan the removal."""

    def take_away(self) -> Plan:
        """Plan the removal of what the set-up made, in the order in which AWX allows it."""
        wanted = self.wanted
        organization = self.only("organizations", wanted.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        gone: set[int] = set()
        for template in wanted.templates:
            row = self.find("job_templates", wanted.template_name(template), organization=self.organization)
            if row is None:
                continue
            if not made_here(row, template["description"]):
                self._keep("job template", row, "the set-up did not make it")
                continue
            if self._take_template(template, row):
                gone.add(int(row["id"]))
        self._take_credential(gone)
        self._take_project(gone)
        return self.plan

    def _keep(self, kind: str, row: dict[str, Any], why: str) -> None:
        self.plan.notes.append(f"{kind} {row['name']} (id {row['id']}) is kept: {why}")

    def _take_template(self, template: dict[str, Any], row: dict[str, Any]) -> bool:
        number, name = int(row["id"]), row["name"]
        running = [
            job for status in ACTIVE for job in self.client.rows("jobs/", unified_job_template=number, status=status)
        ]
        if running:
            jobs = ", ".join(
                f"{job['id']} ({job['status']})" for job in sorted(running, key=lambda job: int(job["id"]))
            )
            self.plan.problems.append(
                f"job template {name}: jobs {jobs} are under way; wait for them or cancel them, then run this again"
            )
        own = f"{self.wanted.prefix}{template['schedule']['name']}" if template.get("schedule") else ""
        schedules = self.client.rows(f"job_templates/{number}/schedules/")
        foreign = [item["name"] for item in schedules if item["name"] != own and not made_here(item, "")]
        nodes = self.client.rows("workflow_job_template_nodes/", unified_job_template=number)
        if (foreign or nodes) and not self.wanted.adopt:
            what = [f"schedule {item}" for item in foreign] + [f"node {node['id']} of a workflow" for node in nodes]
            self._keep(
                "job template", row, f"{', '.join(what)} would go with it; remove that first, or set awx_adopt to true"
            )
            return False
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

    def _others(self, gone: set[int], **query: Any) -> list[str]:
        return sorted(row["name"] for row in self.client.rows("job_templates/", **query) if int(row["id"]) not in gone)

    def _take_credential(self, gone: set[int]) -> None:
        kind = self._credential_type_row()
        if kind is None:
            return
        name = self.wanted.credential_name
        row = self.find("credentials", name, organization=self.organization, credential_type=kind["id"])
        removed: set[int] = set()
        if row and not made_here(row, CREDENTIAL_TEXT):
            self._keep("credential", row, "the set-up did not make it")
        elif row:
            others = self._others(gone, credentials=row["id"])
            if others:
                self._keep("credential", row, f"{', '.join(others)} use it")
            else:
                number = int(row["id"])
                removed.add(number)
                self.add(
                    "deleted",
                    "credential",
                    name,
                    lambda: self.write("DELETE", f"credentials/{number}/", "credential", name),
                )
        if not made_here(kind, self.wanted.credential_type["description"]):
            self._keep("credential type", kind, "the set-up did not make it")
            return
        users = [
            user for user in self.client.rows("credentials/", credential_type=kind["id"]) if user["id"] not in removed
        ]
        if users:
            self._keep("credential type", kind, f"{len(users)} other credentials are of it")
        elif self._lacks_system_rights():
            self._keep("credential type", kind, "only a system administrator of AWX can delete it")
        else:
            kind_id = int(kind["id"])
            self.add(
                "deleted",
                "credential type",
                kind["name"],
                lambda: self.write("DELETE", f"credential_types/{kind_id}/", "credential type", kind["name"]),
            )

    def _take_project(self, gone: set[int]) -> None:
        row = self.find("projects", self.wanted.project, organization=self.organization)
        if row is None:
            return
        if not made_here(row, PROJECT_TEXT):
            self._keep("project", row, "the set-up did not make it")
            return
        others = self._others(gone, project=row["id"])
        if others:
            self._keep("project", row, f"{', '.join(others)} use it")
            return
        number, name = int(row["id"]), row["name"]
        if row.get("status") in ACTIVE:
            self.plan.problems.append(f"project {name}: its sync is {row['status']}; wait for it, then run this again")
        self.add("deleted", "project", name, lambda: self.write("DELETE", f"projects/{number}/", "project", name))
