# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX against the double: first run, second run, one change, a run that breaks off, ways to reach AWX."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from support.awx import PASSWORD, TOKEN, Awx
from support.awx_setup import (
    NAMES,
    PROJECT_URL,
    SetUp,
    copy_state,
    list_writes,
    read_failure,
    read_lines,
    read_refusal,
    read_task_lines,
    read_task_result,
    run_module,
)
from support.double import TOKEN_SECRET
from support.play import REPO


def test_a_first_run_makes_all_and_the_second_nothing(awx: Awx, set_up: SetUp) -> None:
    """W1: the templates are made after the project's sync.

    W10: check mode names what the run then does. W20: all seven.
    """
    would = set_up(check=True).ok()
    assert awx.writes == [] and "changed=0" not in would.stdout
    run = set_up(args=("-vvv",)).ok()
    steps = [(step["kind"], step["name"], step["action"]) for step in read_task_result(run)["steps"]]
    assert steps == [(step["kind"], step["name"], step["action"]) for step in read_task_result(would)["steps"]]
    assert all(step["done"] for step in read_task_result(run)["steps"]) and not any(
        step["done"] for step in read_task_result(would)["steps"]
    )
    assert len(awx.writes) == len([step for step in steps if step[2] != "synced"])
    project = awx.find_named("projects", "agentlab")
    assert project["scm_url"] == PROJECT_URL and project["organization"] == 1
    assert project["scm_update_on_launch"] is True and project["scm_update_cache_timeout"] == 3600
    templates = {row["name"]: row for row in awx.objects["job_templates"]}
    assert set(templates) == {f"agentlab - {name}" for name in NAMES}
    assert {name for name, row in templates.items() if row["job_type"] == "check"} == {"agentlab - prune check"}
    assert {name for name, row in templates.items() if not row["allow_simultaneous"]} == {
        "agentlab - prune", "agentlab - reconcile"
    }  # fmt: skip
    mine = [awx.find_named("credentials", name)["id"] for name in ("nodes", "agentlab - Proxmox VE API")]
    for name, row in templates.items():
        assert (REPO / "awx" / row["playbook"]).is_file() and row["inventory"] == awx.find_named(
            "inventories", "proxmox"
        )["id"]
        assert row["project"] == project["id"] and json.loads(row["extra_vars"])["agentlab_hosts"] == "pve"
        assert awx.attached[row["id"]] == mine, name
        labels = awx.related["job_templates", row["id"], "labels"]
        assert [awx.find_row("labels", label)["name"] for label in labels] == ["agentlab.proxmox"]
    rows = [
        *templates.values(),
        *awx.objects["schedules"],
        *awx.objects["projects"],
        awx.find_named("credentials", "agentlab - Proxmox VE API"),
        awx.find_named("credential_types", "agentlab Proxmox VE API"),
    ]
    assert all(
        "Made by agentlab.proxmox.awx_setup: run that playbook again to change it" in row["description"] for row in rows
    )
    assert {survey["variable"] for survey in awx.surveys[templates["agentlab - job"]["id"]]["spec"]} >= {
        "job_tasks",
        "job_ttl",
        "job_connection",
        "job_fetch",
        "job_results",
        "job_workspace_size",
    }
    nightly = awx.find_named("schedules", "agentlab - nightly prune")
    assert nightly["unified_job_template"] == templates["agentlab - prune"]["id"] and nightly["enabled"] is True
    assert "FREQ=DAILY" in nightly["rrule"]
    assert TOKEN not in run.output and TOKEN_SECRET not in run.output
    # Survey answers are variables of the playbook that the template runs.
    for number, survey in awx.surveys.items():
        playbook = REPO / "playbooks" / awx.find_row("job_templates", number)["playbook"]
        text = playbook.read_text(encoding="utf-8")
        for name in {name for play in yaml.safe_load(text) for name in play.get("vars_files", [])}:
            text += (playbook.parent / name).read_text(encoding="utf-8")
        for question in survey["spec"]:
            assert re.search(rf"\b{question['variable']}\b", text), question["variable"]
    awx.writes.clear()
    for again in (set_up().ok(), set_up(check=True).ok()):
        assert awx.writes == [] and "changed=0" in again.stdout


def test_one_changed_option_writes_only_that(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    would = set_up(check=True, diff=True, awx_prune_older_than="48h").ok()
    # W9: the fields are a list of names.
    assert "job template agentlab - prune: would be changed (extra_vars)" in read_task_lines(would)
    assert read_task_result(would)["diff"]["before"]["job template agentlab - prune"] == {
        "extra_vars": json.dumps({"agentlab_hosts": "pve", "prune_older_than": "24h", "prune_max_count": 50})
    }
    set_up(awx_prune_older_than="48h").ok()
    assert list_writes(awx) == [
        "PATCH /api/v2/job_templates/N/",
        "POST /api/v2/job_templates/N/survey_spec/",
        "POST /api/v2/job_templates/N/survey_spec/",
    ]
    # A template that somebody deleted is made again.
    row = awx.find_named("job_templates", "agentlab - renew")
    awx.objects["job_templates"].remove(row)
    set_up(awx_prune_older_than="48h").ok()
    assert awx.find_named("job_templates", "agentlab - renew")["id"] != row["id"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"awx_prefix": "p" * 499}, "awx_prefix: "),
        ({"awx_project": "p" * 513}, "awx_project: "),
        ({"awx_credential_type_name": "p" * 513}, "awx_credential_type_name: "),
        ({"awx_project_scm_url": "https://anna:hush@git.example.net/" + "p" * 1024}, "awx_project_scm_url: "),
        ({"awx_project_scm_branch": "p" * 257}, "awx_project_scm_branch: "),
        ({"awx_project_cache_timeout": -1}, "awx_project_cache_timeout: -1 is outside of 0 to 2147483647"),
    ],
)
def test_what_is_too_long_for_awx_is_refused_before_anything_is_written(
    awx: Awx, options: dict[str, Any], sentence: str
) -> None:
    message = read_refusal(run_module(awx, **options))
    assert sentence in message and awx.writes == [] and "hush" not in message
    assert "AWX takes at most" in message or "outside of" in message


def test_the_longest_prefix_is_accepted(awx: Awx) -> None:
    options = {"awx_prefix": "p" * (512 - len("Proxmox VE API"))}
    read_lines(run_module(awx, **options))
    assert run_module(awx, **options)["changed"] is False


def test_lists_of_many_pages_are_read_to_the_end(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.page_size = 1
    awx.writes.clear()
    assert "changed=0" in set_up().ok().stdout and awx.writes == []


def test_awx_api_path_leads_to_automation_platform(awx: Awx, set_up: SetUp) -> None:
    awx.prefix = "/api/controller/v2"
    message = read_failure(set_up())
    assert "answers 404 for organizations: a web page instead of JSON. The API is looked for under /api/v2" in message
    set_up(awx_api_path="/api/controller/v2/", awx_host=f"{awx.url}/").ok()
    assert "changed=0" in set_up(awx_api_path="/api/controller/v2").ok().stdout


def test_a_user_with_a_password_can_set_up(awx: Awx, set_up: SetUp) -> None:
    run = set_up(token="", awx_username="admin", awx_password=PASSWORD).ok()
    assert PASSWORD not in run.output
    message = read_failure(set_up(token="", awx_username="admin", awx_password="wrong-password-1"))
    assert "answers 401 for organizations" in message and "CONTROLLER_PASSWORD" in message


def test_what_awx_refuses_is_told_in_its_words(awx: Awx, set_up: SetUp) -> None:
    for expected, run in (
        (
            "answers 401 for organizations: {'detail': 'Authentication credentials were not provided",
            set_up(token="wrong-1234567"),
        ),
        (
            "inventories of AWX has none named nowhere in the organization Default that this user may see; create it "
            "first, log in as an administrator of the organization, or name another with awx_inventory",
            set_up(awx_inventory="nowhere"),
        ),
        (
            "organizations of AWX has none named Nobody that this user may see; create it first",
            set_up(awx_organization="Nobody"),
        ),
        ("refuses projects agentlab (400): {'scm_url': ['Unsupported git URL: x']}", set_up(awx_project_scm_url="x")),
        (
            "awx_host: 'awx.example.net' is not an address with its scheme. Write it as https://awx.example.net",
            set_up(awx_host="awx.example.net"),
        ),
        (
            "cannot be reached: [Errno 111] Connection refused. Check awx_host and its port",
            set_up(awx_host="http://127.0.0.1:9"),
        ),
        ("It does not speak TLS there: write http://", set_up(awx_host=awx.url.replace("http", "https"))),
        ("Set awx_host (or CONTROLLER_HOST)", set_up(awx_host="")),
    ):
        assert expected in read_failure(run), (expected, read_failure(run))


def test_a_run_that_breaks_off_at_any_request_is_finished_by_the_next(awx: Awx) -> None:
    """The connection breaks off at each write in turn, by turns before AWX acts and after it: the next run goes on."""
    awx.add("notification_templates", name="mail", organization=1)
    options: dict[str, Any] = {"awx_notification": "mail"}
    before = copy_state(awx)

    def broken_at(number: int, **more: Any) -> bool:
        """Run until the connection breaks off at that write; return whether it did, and the next run finished."""
        awx.writes.clear()
        awx.cut = (number, ("before", "after")[number % 2])
        broken = run_module(awx, **options, **more)
        awx.cut = None
        would = run_module(awx, check=True, **options, **more)
        assert read_lines(run_module(awx, **options, **more)) == read_lines(would).replace("would be ", "")
        assert not run_module(awx, **options, **more)["changed"]
        if broken["failed"]:
            assert "cannot be reached" in broken["msg"], broken["msg"]
        return bool(broken["failed"])

    def complete(objects: Any) -> list[tuple[str, str]]:
        return sorted((kind, row.get("name", "")) for kind, rows in objects.items() for row in rows)

    assert not broken_at(1000)
    whole = complete({kind: awx.objects[kind] for kind in awx.objects if kind != "project_updates"})
    surveys, attached = sorted(map(str, awx.surveys.values())), sorted(map(len, awx.attached.values()))
    number = 0
    while True:
        read_lines(run_module(awx, awx_state="absent", **options))
        awx.surveys.clear()
        awx.attached.clear()
        for kind in ("job_templates", "projects", "credential_types", "schedules", "labels", "credentials"):
            assert awx.objects[kind] == before[0][kind], kind
        if not broken_at(number):
            break
        assert complete({kind: awx.objects[kind] for kind in awx.objects if kind != "project_updates"}) == whole
        assert sorted(map(str, awx.surveys.values())) == surveys
        assert sorted(map(len, awx.attached.values())) == attached
        number += 1
    assert number > 9
    for number in range(100):
        read_lines(run_module(awx, **options))
        if not broken_at(number, awx_state="absent"):
            break
        for kind in ("job_templates", "projects", "credential_types", "schedules", "labels", "credentials"):
            assert awx.objects[kind] == before[0][kind], kind
    assert number > 5
