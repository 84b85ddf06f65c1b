# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX is taken away, and nothing of others with it."""

from __future__ import annotations

import pytest

from support.awx import ORGANIZATION_TOKEN, Awx
from support.awx_setup import (
    SetUp,
    add_second_organization,
    copy_state,
    read_failure,
    read_lines,
    read_refusal,
    read_task_lines,
    run_module,
)


def test_absent_removes_what_the_set_up_made_and_only_that(awx: Awx, set_up: SetUp) -> None:
    before = copy_state(awx)
    add_second_organization(awx)
    set_up(awx_organization="Second").ok()
    others = {row["id"] for rows in awx.objects.values() for row in rows}
    set_up().ok()
    number = awx.add(
        "job_templates",
        name="mine",
        organization=1,
        project=awx.find_named("projects", "agentlab", organization=1)["id"],
    )
    awx.writes.clear()
    would = set_up(check=True, awx_state="absent").ok()
    assert awx.writes == [] and "job template agentlab - create: would be deleted" in read_task_lines(would)
    run = set_up(awx_state="absent").ok()
    assert read_task_lines(run) == read_task_lines(would).replace("would be ", "")
    assert "project agentlab" in read_task_lines(run) and "is kept: job template mine use it" in read_task_lines(run)
    assert "credential type agentlab Proxmox VE API" in read_task_lines(
        run
    ) and "1 other credentials are of it" in read_task_lines(run)
    kept = {row["id"] for rows in awx.objects.values() for row in rows}
    assert others | {number} <= kept
    rest = [
        row for kind in ("job_templates", "schedules", "labels") for row in awx.objects[kind] if row["id"] not in others
    ]
    assert [row["name"] for row in rest] == ["mine"]
    assert "changed=0" in set_up(awx_state="absent").ok().stdout
    awx.objects["job_templates"].remove(awx.find_row("job_templates", number))
    set_up(awx_state="absent").ok()
    set_up(awx_state="absent", awx_organization="Second").ok()
    for kind in ("job_templates", "schedules", "labels", "projects", "credential_types"):
        assert awx.objects[kind] == before[0][kind], kind


def test_absent_names_running_jobs_and_removes_nothing(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    template = awx.find_named("job_templates", "agentlab - prune")
    first = awx.launch(template, {})["job"]
    second = awx.launch(template, {})["job"]
    awx.find_row("jobs", second)["status"] = "running"
    awx.writes.clear()
    for check in (True, False):
        message = read_failure(set_up(awx_state="absent", check=check))
        assert f"job template agentlab - prune: jobs {first} (pending), {second} (running) are under way" in message
    assert awx.writes == []
    for job in (first, second):
        awx.find_row("jobs", job)["status"] = "successful"
    set_up(awx_state="absent").ok()
    assert awx.objects["job_templates"] == []


def test_absent_keeps_what_others_built_on(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    prune, create = (awx.find_named("job_templates", f"agentlab - {name}")["id"] for name in ("prune", "create"))
    awx.add("schedules", name="weekly", unified_job_template=prune, rrule="x", description="theirs")
    awx.add("workflow_job_template_nodes", unified_job_template=create)
    awx.find_named("job_templates", "agentlab - renew")["description"] = "theirs"
    run = set_up(awx_state="absent").ok()
    assert {row["name"] for row in awx.objects["job_templates"]} == {
        "agentlab - prune",
        "agentlab - create",
        "agentlab - renew",
    }
    assert "schedule weekly would go with it" in read_task_lines(
        run
    ) and "of a workflow would go with it" in read_task_lines(run)
    assert "job template agentlab - renew" in read_task_lines(run) and "the set-up did not make it" in read_task_lines(
        run
    )
    assert awx.find_named("projects", "agentlab") and awx.find_named("credentials", "agentlab - Proxmox VE API")
    set_up(awx_state="absent", awx_adopt=True).ok()
    assert {row["name"] for row in awx.objects["job_templates"]} == {"agentlab - renew"}


@pytest.mark.parametrize("description", ["", "theirs"])
@pytest.mark.parametrize("name", ["weekly", "agentlab - nightly prune"])
def test_absent_takes_no_schedule_that_a_person_made(awx: Awx, name: str, description: str) -> None:
    """People leave descriptions empty; and a person may have put another schedule in the place of ours."""
    read_lines(run_module(awx))
    prune = awx.find_named("job_templates", "agentlab - prune")["id"]
    awx.objects["schedules"].remove(awx.find_named("schedules", "agentlab - nightly prune"))
    awx.add("schedules", name=name, unified_job_template=prune, rrule="x", description=description)
    for check in (True, False):
        text = read_lines(run_module(awx, awx_state="absent", check=check))
        assert f"job template agentlab - prune (id {prune}) is kept: schedule {name} would go with it" in text
    assert [row["name"] for row in awx.objects["schedules"]] == [name]
    assert [row["name"] for row in awx.objects["job_templates"]] == ["agentlab - prune"]
    text = read_lines(run_module(awx, awx_prune_rrule="", awx_reconcile_rrule=""))
    assert ("the set-up did not make it, so leaving the schedule out" in text) is (name != "weekly")
    assert name in [row["name"] for row in awx.objects["schedules"]]


def test_absent_keeps_the_templates_of_another_project(awx: Awx) -> None:
    """The set-up calls them somebody else's, and so does the removal."""
    read_lines(run_module(awx, awx_project="other"))
    templates = [row["id"] for row in awx.objects["job_templates"]]
    text = read_lines(run_module(awx, awx_state="absent"))
    assert "it belongs to the project other; name that project with awx_project" in text
    assert [row["id"] for row in awx.objects["job_templates"]] == templates and awx.find_named("projects", "other")
    read_lines(run_module(awx, awx_state="absent", awx_project="other"))
    assert awx.objects["job_templates"] == awx.objects["projects"] == []


@pytest.mark.parametrize("user", ["inventory source", "schedule", "node of a workflow"])
def test_absent_keeps_a_project_that_others_use(awx: Awx, user: str) -> None:
    """AWX deletes inventory sources and schedules together with their project, without a question."""
    read_lines(run_module(awx))
    project = awx.find_named("projects", "agentlab")["id"]
    if user == "inventory source":
        number = awx.add("inventory_sources", name="theirs", source="scm", source_project=project)
    elif user == "schedule":
        number = awx.add("schedules", name="theirs", unified_job_template=project, rrule="x")
    else:
        number = awx.add("workflow_job_template_nodes", unified_job_template=project)
    text = read_lines(run_module(awx, awx_state="absent"))
    name = number if user.startswith("node") else "theirs"
    assert f"project agentlab (id {project}) is kept: {user} {name} use it" in text
    assert awx.find_named("projects", "agentlab") and awx.objects["job_templates"] == []
    assert number in [row["id"] for rows in awx.objects.values() for row in rows]


@pytest.mark.parametrize("user", ["inventory_sources", "schedules", "workflow_job_template_nodes"])
def test_absent_keeps_a_credential_that_others_use(awx: Awx, user: str) -> None:
    read_lines(run_module(awx))
    credential = awx.find_named("credentials", "agentlab - Proxmox VE API")["id"]
    mine = awx.add("job_templates", name="mine", organization=1)
    more = {} if user == "inventory_sources" else {"unified_job_template": mine}
    number = awx.add(user, **({} if user.startswith("workflow") else {"name": "theirs"}), **more)
    awx.attached[number] = [credential]
    text = read_lines(run_module(awx, awx_state="absent"))
    assert f"credential agentlab - Proxmox VE API (id {credential}) is kept: " in text and " use it" in text
    assert awx.find_named("credentials", "agentlab - Proxmox VE API")
    assert "credential type agentlab Proxmox VE API" in text and "1 other credentials are of it" in text


def test_absent_takes_the_credential_of_an_earlier_type_as_well(awx: Awx) -> None:
    read_lines(run_module(awx))
    read_lines(run_module(awx, awx_credential_type_name="agentlab type 2"))
    machine = awx.find_named("credential_types", "Machine")["id"]
    number = awx.add(
        "credentials", name="agentlab - Proxmox VE API", organization=1, credential_type=machine, description="x"
    )
    read_lines(run_module(awx, awx_state="absent", awx_credential_type_name="agentlab type 2"))
    assert [row["name"] for row in awx.objects["credential_types"] if row["kind"] == "cloud"] == []
    assert [row["id"] for row in awx.objects["credentials"] if row["name"].startswith("agentlab")] == [number]


def test_absent_names_jobs_that_still_use_the_project(awx: Awx) -> None:
    """A job goes on when its template is deleted, and AWX deletes no project that a job uses."""
    read_lines(run_module(awx))
    project = awx.find_named("projects", "agentlab")["id"]
    job = awx.add("jobs", name="x", project=project, status="running")
    awx.writes.clear()
    text = read_refusal(run_module(awx, awx_state="absent"))
    assert f"project agentlab: jobs {job} (running) are under way" in text and awx.writes == []


def test_absent_after_a_job_whose_events_are_not_stored_yet(awx: Awx) -> None:
    """AWX answers 403 then, though no right is missing."""
    read_lines(run_module(awx))
    job = awx.launch(awx.find_named("job_templates", "agentlab - prune"), {})["job"]
    awx.find_row("jobs", job).update(status="successful", unprocessed=True)
    text = read_refusal(run_module(awx, awx_state="absent"))
    assert "is still processing events" in text and "run this again in a minute" in text
    assert "administrator" not in text
    awx.find_row("jobs", job)["unprocessed"] = False
    read_lines(run_module(awx, awx_state="absent"))
    assert awx.objects["job_templates"] == [] and not run_module(awx, awx_state="absent")["changed"]


def test_absent_by_an_organization_administrator_leaves_the_type(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    run = set_up(token=ORGANIZATION_TOKEN, awx_state="absent").ok()
    assert (
        "only a system administrator of AWX can delete it" in read_task_lines(run)
        and awx.objects["job_templates"] == []
    )
