# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX and what others have there: other organizations, other objects of the same name."""

from __future__ import annotations

import copy

import pytest

from support.awx import Awx
from support.awx_setup import (
    NAMES,
    PROJECT_URL,
    SetUp,
    add_second_organization,
    copy_state,
    read_failure,
    read_lines,
    read_task_lines,
    read_task_result,
    run_module,
)


def test_nothing_of_another_organization_is_found_or_changed(awx: Awx, set_up: SetUp) -> None:
    """W2: the same prefix, project, inventory and credential names in two organizations.

    W18: inventories by organization.
    """
    second = add_second_organization(awx)
    set_up().ok()
    # The system administrator sees both.
    first = {kind: [copy.deepcopy(row) for row in awx.objects[kind]] for kind in awx.objects}
    attached, related = copy.deepcopy(awx.attached), copy.deepcopy(awx.related)
    run = set_up(awx_organization="Second").ok()
    for kind, rows in first.items():
        for row in rows:
            now = awx.find_row(kind, row["id"])
            assert {**now, "status": ""} == {**row, "status": ""} if kind == "projects" else now == row, (
                kind,
                row["name"],
            )
    assert {number: awx.attached[number] for number in attached} == attached
    assert {key: awx.related[key] for key in related} == related
    assert len(awx.objects["job_templates"]) == 2 * len(NAMES) and len(awx.objects["projects"]) == 2
    for row in awx.objects["job_templates"][len(NAMES) :]:
        assert awx.find_row("projects", row["project"])["organization"] == second
        assert awx.find_row("inventories", row["inventory"])["organization"] == second
        assert all(awx.find_row("credentials", number)["organization"] == second for number in awx.attached[row["id"]])
    assert "changed=0" in set_up(awx_organization="Second").ok().stdout and "changed=0" in set_up().ok().stdout
    assert [step["action"] for step in read_task_result(run)["steps"]].count("created") > len(NAMES)


@pytest.mark.parametrize("missing", ["inventories", "credentials", "projects", "notification_templates"])
def test_what_only_another_organization_has_is_missing(awx: Awx, set_up: SetUp, missing: str) -> None:
    add_second_organization(awx)
    name = {"inventories": "proxmox", "credentials": "nodes", "projects": "agentlab", "notification_templates": "mail"}[
        missing
    ]
    awx.add(
        "projects",
        name="agentlab",
        organization=1,
        scm_type="git",
        scm_url=PROJECT_URL,
        status="successful",
        synced=True,
    )
    second = awx.find_named("organizations", "Second")["id"]
    if missing != "projects":
        awx.add("projects", name="agentlab", organization=second, scm_type="git", scm_url=PROJECT_URL,
                status="successful", synced=True)  # fmt: skip
    awx.add("notification_templates", name="mail", organization=1)
    awx.objects[missing] = [
        row for row in awx.objects[missing] if not (row["name"] == name and row["organization"] == second)
    ]
    options = {"awx_notification": "mail"} if missing == "notification_templates" else {}
    message = read_failure(set_up(awx_organization="Second", awx_project_scm_url=None, **options))
    assert (
        f"{missing} of AWX has none named {name} in the organization Second that this user may see (one of that name "
        "belongs to Default; " in message
    )
    assert awx.writes == []


@pytest.mark.parametrize("kind", ["job template", "project", "schedule", "credential"])
def test_what_the_set_up_did_not_make_is_shown_and_refused_unless_adopted(awx: Awx, set_up: SetUp, kind: str) -> None:
    """W2: an object of our name, in our organization, that somebody else made."""
    if kind == "project":
        awx.add("projects", name="agentlab", organization=1, scm_type="git", scm_url="https://git.example.net/theirs.git",
                status="successful", synced=True, description="theirs")  # fmt: skip
        row, fields = awx.find_named("projects", "agentlab"), "description, scm_url"
    else:
        set_up().ok()
        endpoint, name = {
            "job template": ("job_templates", "agentlab - create"),
            "schedule": ("schedules", "agentlab - reconcile"),
            "credential": ("credentials", "agentlab - Proxmox VE API"),
        }[kind]
        row, fields = awx.find_named(endpoint, name), "description"
        row["description"] = "theirs"
    before = copy_state(awx)
    awx.writes.clear()
    would = set_up(check=True).ok()
    expected = f"{kind} {row['name']} (id {row['id']}; {fields}"
    assert any(text.startswith(expected) for text in read_task_result(would)["foreign"]), read_task_result(would)[
        "foreign"
    ]
    assert "changed only with awx_adopt=true" in read_task_lines(would)
    message = read_failure(set_up())
    assert expected in message and "nothing was changed" in message and "awx_adopt" in message
    assert awx.writes == [] and copy_state(awx) == before
    run = set_up(awx_adopt=True).ok()
    assert (
        f"{kind} {row['name']}: adopted" in read_task_lines(run)
        and "Made by agentlab.proxmox.awx_setup" in row["description"]
    )
    assert "changed=0" in set_up().ok().stdout


def test_a_template_on_another_project_is_somebody_elses(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    message = read_failure(set_up(awx_project="other"))
    assert "job template agentlab - create" in message and "project would be changed" in message and awx.writes == []
    set_up(awx_project="other", awx_adopt=True).ok()
    other = awx.find_named("projects", "other")["id"]
    assert {row["project"] for row in awx.objects["job_templates"]} == {other}


def test_the_templates_of_a_deleted_project_are_still_ours(awx: Awx) -> None:
    """AWX keeps the templates of a project that is deleted, in their organization."""
    read_lines(run_module(awx))
    ids = sorted(row["id"] for row in awx.objects["job_templates"])
    awx.handle("DELETE", f"/api/v2/projects/{awx.find_named('projects', 'agentlab')['id']}/", {}, "admin")
    text = read_lines(run_module(awx))
    assert "project agentlab: created" in text and "job template agentlab - prune: changed (project)" in text
    assert sorted(row["id"] for row in awx.objects["job_templates"]) == ids
    project = awx.find_named("projects", "agentlab")["id"]
    assert {row["project"] for row in awx.objects["job_templates"]} == {project}
    awx.handle("DELETE", f"/api/v2/projects/{project}/", {}, "admin")
    read_lines(run_module(awx, awx_state="absent"))
    assert awx.objects["job_templates"] == []


def test_blanks_around_a_name_make_no_other_object(awx: Awx) -> None:
    """AWX drops blanks around a name that it stores, and searches for a name with them."""
    options = {
        "awx_organization": " Default ", "awx_project": " agentlab\n", "awx_inventory": "proxmox ",
        "awx_machine_credential": " nodes", "awx_prefix": "  lab - ", "awx_hosts": " pve ",
        "awx_credential_type_name": "our type ", "awx_project_scm_url": f" {PROJECT_URL} ",
        "awx_project_scm_branch": "main\n",
    }  # fmt: skip
    read_lines(run_module(awx, **options))
    assert awx.find_named("job_templates", "lab - prune") and awx.find_named("credentials", "lab - Proxmox VE API")
    awx.writes.clear()
    for check in (True, False):
        assert run_module(awx, check=check, **options)["changed"] is False
    assert awx.writes == []
    read_lines(run_module(awx, **options, awx_state="absent"))
    assert awx.objects["job_templates"] == [] and awx.objects["projects"] == []


def test_what_release_1_0_made_is_still_ours(awx: Awx, set_up: SetUp) -> None:
    """Its descriptions had no mark."""
    set_up().ok()
    for kind in ("projects", "job_templates", "schedules", "credentials", "credential_types"):
        for row in awx.objects[kind]:
            row["description"] = row["description"].split(". Made by ")[0]
    set_up().ok()
    assert "Made by" in awx.find_named("job_templates", "agentlab - prune")["description"]
