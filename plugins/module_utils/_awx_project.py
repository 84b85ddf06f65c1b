# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the project of AWX, and wait for its sync."""

from __future__ import annotations

import re
import time
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import AwxError, format_answer
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_plan import (
    ACTIVE,
    OUTPUT_READS,
    POLL_SECONDS,
    PROJECT_TEXT,
    Id,
    hide_login,
    make_description,
    resolve_id,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_planner import Planner


class ProjectPlanner(Planner):
    """Plan the project that brings the playbooks."""

    def _plan_project(self) -> Id | None:
        """Plan the project and its sync; return its id, or None after noting a problem."""
        desired = self.desired
        if not desired.project_scm_url:
            row = self.find_only(
                "projects", desired.project, "awx_project (or give awx_project_scm_url)", organization=self.organization
            )
            if row is None:
                return None
            self._plan_sync(int(row["id"]), row, changed=False)
            return int(row["id"])
        row = self.find("projects", desired.project, organization=self.organization)
        text = PROJECT_TEXT
        body = {
            "name": desired.project,
            "description": make_description(text),
            "organization": self.organization,
            "scm_type": "git",
            "scm_url": desired.project_scm_url,
            "scm_branch": desired.project_scm_branch,
            "scm_update_on_launch": desired.project_update_on_launch,
            "scm_update_cache_timeout": desired.project_cache_timeout,
        }
        before = len(self.plan.steps)
        number = self.ensure("projects", body, text, row, shown={"scm_url": hide_login(desired.project_scm_url)})
        # AWX starts a sync by itself whenever a project is created or changed.
        self._plan_sync(number, row, changed=len(self.plan.steps) > before)
        return number

    def _plan_sync(self, number: Id, row: dict[str, Any] | None, changed: bool) -> None:
        """Plan that the project is synced and has our playbooks: AWX refuses templates before that."""
        name = self.desired.project
        if row is None or changed:
            self.add_step("synced", "project", name, lambda: self.wait_for_project(number), changes=False)
            return
        if row.get("status") in ACTIVE:
            self.add_step("synced", "project", name, lambda: self.wait_for_project(number), changes=False)
            return
        missing = self._list_missing_playbooks(int(row["id"]))
        if row.get("status") in ("successful", "ok") and not missing:
            return
        if not row.get("scm_type"):
            if missing:
                self.plan.problems.append(self._explain_missing_playbooks(missing))
            return

        def sync() -> None:
            self.send_change("POST", f"projects/{resolve_id(number)}/update/", "project", name, {})
            self.wait_for_project(number)

        self.add_step("synced", "project", name, sync)

    def _list_missing_playbooks(self, number: int) -> list[str]:
        answer = self.client.get(f"projects/{number}/playbooks/")
        return [name for name in self.desired.playbooks if name not in (answer if isinstance(answer, list) else [])]

    def _explain_missing_playbooks(self, missing: list[str]) -> str:
        return (
            f"project {self.desired.project}: the sync was successful, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not at the top of the repository. Put the contents of the "
            "collection's folder awx/ (not the folder itself) there, and check awx_project_scm_branch"
        )

    def wait_for_project(self, number: Id) -> None:
        """Wait until the sync has ended. Raises AwxError with the reason if it failed, or lacks our playbooks."""
        name, number = self.desired.project, int(resolve_id(number))
        end = time.monotonic() + self.desired.project_timeout
        while True:
            row = self.client.get(f"projects/{number}/")
            # While an update is under way the status of the project may still be that of the last one.
            busy = (row.get("summary_fields") or {}).get("current_update") or row.get("status") in ACTIVE
            if not busy:
                break
            if time.monotonic() > end:
                raise AwxError(
                    f"project {name}: its sync did not end within {self.desired.project_timeout} s "
                    f"(awx_project_timeout; status {row.get('status')}). Look at it in AWX, and run the set-up again"
                )
            time.sleep(POLL_SECONDS)
        if row.get("status") not in ("successful", "ok"):
            raise AwxError(
                f"project {name}: its sync ended as {row.get('status')}: {self._read_sync_failure(row)}. Check "
                "awx_project_scm_url and awx_project_scm_branch, and whether AWX reaches that server"
            )
        missing = self._list_missing_playbooks(number)
        if missing:
            raise AwxError(self._explain_missing_playbooks(missing))

    def _read_sync_failure(self, row: dict[str, Any]) -> str:
        """Return why the last sync failed, from its output; the login in an address is left out."""
        summary = row.get("summary_fields") or {}
        update = (summary.get("last_update") or summary.get("last_job") or {}).get("id")
        if not update:
            return "AWX says no reason"
        if row.get("status") == "canceled":
            return "somebody canceled it, so run the set-up again"
        reason = ""
        for _attempt in range(OUTPUT_READS):
            try:
                job = self.client.get(f"project_updates/{update}/")
                status, output = self.client.send("GET", f"project_updates/{update}/stdout/", query={"format": "txt"})
            except AwxError as error:
                return f"the reason cannot be read ({error})"
            text = re.sub(r"\x1b\[[0-9;]*m", "", output) if status == 200 and isinstance(output, str) else ""
            fatal = [line for line in text.splitlines() if line.startswith(("fatal:", "ERROR"))]
            reason = fatal[-1] if fatal else job.get("job_explanation") or job.get("result_traceback") or text[-500:]
            # AWX sets the status before it has stored the output, and calls the events finished while it has counted
            # none.
            if fatal or (reason and job.get("event_processing_finished")):
                break
            time.sleep(POLL_SECONDS)
        return hide_login(format_answer(reason or "AWX says no reason"))
