# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX against the double: first run, second run, each change, other organizations, and its removal."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from support.awx import ORGANIZATION_TOKEN, PASSWORD, TOKEN, Awx
from support.awx_setup import PROJECT_URL, furnish, lines, result, run_module, told
from support.double import TOKEN_SECRET
from support.play import REPO, Run

SetUp = Callable[..., Run]
NAMES = ("create", "renew", "destroy", "prune check", "prune", "reconcile", "job", "doctor")


def written(awx: Awx) -> list[str]:
    return sorted(re.sub(r"/\d+", "/N", line) for line in awx.writes)


def failure(run: Run) -> str:
    assert run.rc != 0 and not run.warnings, run.output
    assert TOKEN not in run.output and TOKEN_SECRET not in run.output
    assert "no_log" not in run.output and "Traceback" not in run.output
    return str(run.failed[-1]["result"]["msg"])


def refusal(answer: dict[str, Any]) -> str:
    """Return the message of a run in this process that was refused."""
    assert answer["failed"] is True, answer
    return str(answer["msg"])


def snapshot(awx: Awx) -> Any:
    """Return all that lasts in AWX."""
    return copy.deepcopy((awx.objects, awx.surveys, awx.attached, awx.related))


def test_a_first_run_makes_all_and_the_second_nothing(awx: Awx, set_up: SetUp) -> None:
    """W1: the templates are made after the project's sync.

    W10: check mode names what the run then does. W20: all seven.
    """
    would = set_up(check=True).ok()
    assert awx.writes == [] and "changed=0" not in would.stdout
    run = set_up(args=("-vvv",)).ok()
    steps = [(step["kind"], step["name"], step["action"]) for step in result(run)["steps"]]
    assert steps == [(step["kind"], step["name"], step["action"]) for step in result(would)["steps"]]
    assert all(step["done"] for step in result(run)["steps"]) and not any(
        step["done"] for step in result(would)["steps"]
    )
    assert len(awx.writes) == len([step for step in steps if step[2] != "synced"])
    project = awx.named("projects", "agentlab")
    assert project["scm_url"] == PROJECT_URL and project["organization"] == 1
    assert project["scm_update_on_launch"] is True and project["scm_update_cache_timeout"] == 3600
    templates = {row["name"]: row for row in awx.objects["job_templates"]}
    assert set(templates) == {f"agentlab - {name}" for name in NAMES}
    assert {name for name, row in templates.items() if row["job_type"] == "check"} == {"agentlab - prune check"}
    assert {name for name, row in templates.items() if not row["allow_simultaneous"]} == {
        "agentlab - prune", "agentlab - reconcile"
    }  # fmt: skip
    mine = [awx.named("credentials", name)["id"] for name in ("nodes", "agentlab - Proxmox VE API")]
    for name, row in templates.items():
        assert (REPO / "awx" / row["playbook"]).is_file() and row["inventory"] == awx.named("inventories", "proxmox")[
            "id"
        ]
        assert row["project"] == project["id"] and json.loads(row["extra_vars"])["agentlab_hosts"] == "pve"
        assert awx.attached[row["id"]] == mine, name
        labels = awx.related["job_templates", row["id"], "labels"]
        assert [awx.row("labels", label)["name"] for label in labels] == ["agentlab.proxmox"]
    made = [*templates.values(), *awx.objects["schedules"], *awx.objects["projects"],
            awx.named("credentials", "agentlab - Proxmox VE API"), awx.named("credential_types", "agentlab Proxmox VE API")]  # fmt: skip
    assert all(
        "Made by agentlab.proxmox.awx_setup: run that playbook again to change it" in row["description"] for row in made
    )
    assert {survey["variable"] for survey in awx.surveys[templates["agentlab - job"]["id"]]["spec"]} >= {
        "job_tasks",
        "job_ttl",
    }
    nightly = awx.named("schedules", "agentlab - nightly prune")
    assert nightly["unified_job_template"] == templates["agentlab - prune"]["id"] and nightly["enabled"] is True
    assert "FREQ=DAILY" in nightly["rrule"]
    assert TOKEN not in run.output and TOKEN_SECRET not in run.output
    # Survey answers are variables of the playbook that the template runs.
    for number, survey in awx.surveys.items():
        playbook = REPO / "playbooks" / awx.row("job_templates", number)["playbook"]
        text = playbook.read_text(encoding="utf-8")
        for name in {name for play in yaml.safe_load(text) for name in play.get("vars_files", [])}:
            text += (playbook.parent / name).read_text(encoding="utf-8")
        for question in survey["spec"]:
            assert re.search(rf"\b{question['variable']}\b", text), question["variable"]
    awx.writes.clear()
    for again in (set_up().ok(), set_up(check=True).ok()):
        assert awx.writes == [] and "changed=0" in again.stdout


def test_the_credential_holds_all_fields_from_the_start(awx: Awx, set_up: SetUp) -> None:
    """W5: AWX changes no field of a type that is in use."""
    set_up(awx_proxmox_api_port=443, awx_proxmox_validate_certs=False).ok()
    kind = awx.named("credential_types", "agentlab Proxmox VE API")
    fields = {field["id"]: field for field in kind["inputs"]["fields"]}
    assert set(fields) == {"api_host", "api_port", "api_user", "api_password", "api_token_id", "api_token_secret", "validate_certs",
                           "ca_path", "database", "database_password"}  # fmt: skip
    secret = {name for name, field in fields.items() if field.get("secret")}
    assert secret == {"api_password", "api_token_secret", "database", "database_password"}
    assert kind["injectors"]["env"]["AGENTLAB_API_PORT"] == "{{ api_port | default('') }}"
    variables = (REPO / "playbooks" / "vars" / "agentlab.yml").read_text(encoding="utf-8")
    injected = set(kind["injectors"]["env"])
    assert {name for name in injected if f"'{name}'" not in variables} == set()
    assert awx.named("credentials", "agentlab - Proxmox VE API")["inputs"] == {
        "api_host": "pve.example.net", "api_port": "443", "api_token_id": "agentlab@pve!awx", "api_token_secret": TOKEN_SECRET,
        "validate_certs": "false", "ca_path": "/etc/pve/pve-root-ca.pem"}  # fmt: skip


def test_a_type_in_use_with_other_fields_is_told_and_a_new_one_can_stand_beside_it(awx: Awx, set_up: SetUp) -> None:
    """W5: the type of an earlier release, used by a credential. Nothing is written before that is known."""
    set_up().ok()
    kind = awx.named("credential_types", "agentlab Proxmox VE API")
    kind["inputs"] = {"fields": [field for field in kind["inputs"]["fields"] if field["id"] != "api_port"]}
    awx.writes.clear()
    told = failure(set_up())
    assert "its fields differ (missing: api_port)" in told and "in use, here by agentlab - Proxmox VE API" in told
    assert "awx_credential_type_name" in told and awx.writes == []
    set_up(awx_credential_type_name="agentlab Proxmox VE API 2").ok()
    old, new = (
        row["id"]
        for row in sorted(awx.objects["credentials"], key=lambda row: row["id"])
        if row["name"].startswith("agentlab")
    )
    for row in awx.objects["job_templates"]:
        assert new in awx.attached[row["id"]] and old not in awx.attached[row["id"]]
    awx.writes.clear()
    assert "changed=0" in set_up(awx_credential_type_name="agentlab Proxmox VE API 2").ok().stdout
    # Unused, the fields of the old type may be changed.
    awx.objects["credentials"] = [row for row in awx.objects["credentials"] if row["id"] != old]
    set_up().ok()
    assert any(field["id"] == "api_port" for field in kind["inputs"]["fields"])


def test_one_changed_option_writes_only_that(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    would = set_up(check=True, diff=True, awx_prune_older_than="48h").ok()
    # W9: the fields are a list of names.
    assert "job template agentlab - prune: would be changed (extra_vars)" in lines(would)
    assert result(would)["diff"]["before"]["job template agentlab - prune"] == {
        "extra_vars": json.dumps({"agentlab_hosts": "pve", "prune_older_than": "24h", "prune_max_count": 50})
    }
    set_up(awx_prune_older_than="48h").ok()
    assert written(awx) == ["PATCH /api/v2/job_templates/N/", "POST /api/v2/job_templates/N/survey_spec/",
                            "POST /api/v2/job_templates/N/survey_spec/"]  # fmt: skip
    # A template that somebody deleted is made again.
    row = awx.named("job_templates", "agentlab - renew")
    awx.objects["job_templates"].remove(row)
    set_up(awx_prune_older_than="48h").ok()
    assert awx.named("job_templates", "agentlab - renew")["id"] != row["id"]


# ---- other organizations, and what others made ----


def second_organization(awx: Awx) -> int:
    number = awx.add("organizations", name="Second")
    furnish(awx, number)
    return number


def test_nothing_of_another_organization_is_found_or_changed(awx: Awx, set_up: SetUp) -> None:
    """W2: the same prefix, project, inventory and credential names in two organizations.

    W18: inventories by organization.
    """
    second = second_organization(awx)
    set_up().ok()
    # The system administrator sees both.
    first = {kind: [copy.deepcopy(row) for row in awx.objects[kind]] for kind in awx.objects}
    attached, related = copy.deepcopy(awx.attached), copy.deepcopy(awx.related)
    run = set_up(awx_organization="Second").ok()
    for kind, rows in first.items():
        for row in rows:
            now = awx.row(kind, row["id"])
            assert {**now, "status": ""} == {**row, "status": ""} if kind == "projects" else now == row, (
                kind,
                row["name"],
            )
    assert {number: awx.attached[number] for number in attached} == attached
    assert {key: awx.related[key] for key in related} == related
    assert len(awx.objects["job_templates"]) == 2 * len(NAMES) and len(awx.objects["projects"]) == 2
    for row in awx.objects["job_templates"][len(NAMES) :]:
        assert awx.row("projects", row["project"])["organization"] == second
        assert awx.row("inventories", row["inventory"])["organization"] == second
        assert all(awx.row("credentials", number)["organization"] == second for number in awx.attached[row["id"]])
    assert "changed=0" in set_up(awx_organization="Second").ok().stdout and "changed=0" in set_up().ok().stdout
    assert [step["action"] for step in result(run)["steps"]].count("created") > len(NAMES)


@pytest.mark.parametrize("missing", ["inventories", "credentials", "projects", "notification_templates"])
def test_what_only_another_organization_has_is_missing(awx: Awx, set_up: SetUp, missing: str) -> None:
    second_organization(awx)
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
    if missing != "projects":
        awx.add("projects", name="agentlab", organization=awx.named("organizations", "Second")["id"], scm_type="git",
                scm_url=PROJECT_URL, status="successful", synced=True)  # fmt: skip
    awx.add("notification_templates", name="mail", organization=1)
    second = awx.named("organizations", "Second")["id"]
    awx.objects[missing] = [
        row for row in awx.objects[missing] if not (row["name"] == name and row["organization"] == second)
    ]
    options = {"awx_notification": "mail"} if missing == "notification_templates" else {}
    told = failure(set_up(awx_organization="Second", awx_project_scm_url=None, **options))
    assert (
        f"{missing} of AWX has none named {name} in the organization Second that this user may see (one of that name "
        "belongs to Default; " in told
    )
    assert awx.writes == []


@pytest.mark.parametrize("kind", ["job template", "project", "schedule", "credential"])
def test_what_the_set_up_did_not_make_is_shown_and_refused_unless_adopted(awx: Awx, set_up: SetUp, kind: str) -> None:
    """W2: an object of our name, in our organization, that somebody else made."""
    if kind == "project":
        awx.add("projects", name="agentlab", organization=1, scm_type="git", scm_url="https://git.example.net/theirs.git",
                status="successful", synced=True, description="theirs")  # fmt: skip
        row, fields = awx.named("projects", "agentlab"), "description, scm_url"
    else:
        set_up().ok()
        endpoint, name = {
            "job template": ("job_templates", "agentlab - create"),
            "schedule": ("schedules", "agentlab - reconcile"),
            "credential": ("credentials", "agentlab - Proxmox VE API"),
        }[kind]
        row, fields = awx.named(endpoint, name), "description"
        row["description"] = "theirs"
    before = snapshot(awx)
    awx.writes.clear()
    would = set_up(check=True).ok()
    expected = f"{kind} {row['name']} (id {row['id']}; {fields}"
    assert any(text.startswith(expected) for text in result(would)["foreign"]), result(would)["foreign"]
    assert "changed only with awx_adopt=true" in lines(would)
    told = failure(set_up())
    assert expected in told and "nothing was changed" in told and "awx_adopt" in told
    assert awx.writes == [] and snapshot(awx) == before
    run = set_up(awx_adopt=True).ok()
    assert f"{kind} {row['name']}: adopted" in lines(run) and "Made by agentlab.proxmox.awx_setup" in row["description"]
    assert "changed=0" in set_up().ok().stdout


def test_a_template_on_another_project_is_somebody_elses(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    told = failure(set_up(awx_project="other"))
    assert "job template agentlab - create" in told and "project would be changed" in told and awx.writes == []
    set_up(awx_project="other", awx_adopt=True).ok()
    other = awx.named("projects", "other")["id"]
    assert {row["project"] for row in awx.objects["job_templates"]} == {other}


def test_the_templates_of_a_deleted_project_are_still_ours(awx: Awx) -> None:
    """AWX keeps the templates of a project that is deleted, in their organization."""
    told(run_module(awx))
    ids = sorted(row["id"] for row in awx.objects["job_templates"])
    awx.handle("DELETE", f"/api/v2/projects/{awx.named('projects', 'agentlab')['id']}/", {}, "admin")
    text = told(run_module(awx))
    assert "project agentlab: created" in text and "job template agentlab - prune: changed (project)" in text
    assert sorted(row["id"] for row in awx.objects["job_templates"]) == ids
    project = awx.named("projects", "agentlab")["id"]
    assert {row["project"] for row in awx.objects["job_templates"]} == {project}
    awx.handle("DELETE", f"/api/v2/projects/{project}/", {}, "admin")
    told(run_module(awx, awx_state="absent"))
    assert awx.objects["job_templates"] == []


def test_blanks_around_a_name_make_no_other_object(awx: Awx) -> None:
    """AWX drops blanks around a name that it stores, and searches for a name with them."""
    given = {
        "awx_organization": " Default ", "awx_project": " agentlab\n", "awx_inventory": "proxmox ",
        "awx_machine_credential": " nodes", "awx_prefix": "  lab - ", "awx_hosts": " pve ",
        "awx_credential_type_name": "our type ", "awx_project_scm_url": f" {PROJECT_URL} ",
        "awx_project_scm_branch": "main\n",
    }  # fmt: skip
    told(run_module(awx, **given))
    assert awx.named("job_templates", "lab - prune") and awx.named("credentials", "lab - Proxmox VE API")
    awx.writes.clear()
    for check in (True, False):
        assert run_module(awx, check=check, **given)["changed"] is False
    assert awx.writes == []
    told(run_module(awx, **given, awx_state="absent"))
    assert awx.objects["job_templates"] == [] and awx.objects["projects"] == []


@pytest.mark.parametrize(
    ("given", "told"),
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
    awx: Awx, given: dict[str, Any], told: str
) -> None:
    message = refusal(run_module(awx, **given))
    assert told in message and awx.writes == [] and "hush" not in message
    assert "AWX takes at most" in message or "outside of" in message


def test_the_longest_prefix_that_fits(awx: Awx) -> None:
    given = {"awx_prefix": "p" * (512 - len("Proxmox VE API"))}
    told(run_module(awx, **given))
    assert run_module(awx, **given)["changed"] is False


def test_what_release_1_0_made_is_still_ours(awx: Awx, set_up: SetUp) -> None:
    """Its descriptions had no mark."""
    set_up().ok()
    for kind in ("projects", "job_templates", "schedules", "credentials", "credential_types"):
        for row in awx.objects[kind]:
            row["description"] = row["description"].split(". Made by ")[0]
    set_up().ok()
    assert "Made by" in awx.named("job_templates", "agentlab - prune")["description"]


# ---- the project's sync ----


def test_a_sync_that_fails_is_told_with_its_reason(awx: Awx, set_up: SetUp) -> None:
    """W1: no template is tried before, and the login in the address is not shown."""
    url = "https://me:hunter2@git.example.net/nowhere.git"
    awx.syncs[url] = f"fatal: repository '{url}' not found"
    run = set_up(awx_project_scm_url=url)
    told = failure(run)
    assert "project agentlab: its sync ended as failed: fatal: [localhost]" in told and "not found" in told
    assert "awx_project_scm_url" in told and "hunter2" not in run.output
    assert awx.objects["job_templates"] == []
    # Mended, the next run goes on.
    del awx.syncs[url]
    set_up(awx_project_scm_url=url).ok()
    assert len(awx.objects["job_templates"]) == len(NAMES)


def test_a_repository_without_our_playbooks_at_its_top_is_told(awx: Awx, set_up: SetUp) -> None:
    awx.repositories[PROJECT_URL] = ["awx/job.yml", "awx/prune.yml"]
    told = failure(set_up())
    assert (
        "sandbox_create.yml" in told
        and "not at the top of the repository" in told
        and awx.objects["job_templates"] == []
    )
    # A project that was there: the set-up syncs it once more before it says so.
    del awx.repositories[PROJECT_URL]
    awx.writes.clear()
    set_up().ok()
    assert "POST /api/v2/projects/N/update/" not in written(awx)


def test_a_sync_that_does_not_end_is_given_up(awx: Awx, set_up: SetUp) -> None:
    awx.sync_reads = 10**6
    told = failure(set_up(awx_project_timeout=1))
    assert "its sync did not end within 1 s (awx_project_timeout; status running)" in told


@pytest.mark.parametrize("status", ["never updated", "failed", "running"])
def test_a_project_of_the_user_is_synced_first(awx: Awx, set_up: SetUp, status: str) -> None:
    number = awx.add("projects", name="mine", organization=1, scm_type="git", scm_url=PROJECT_URL, status=status)
    if status == "running":
        awx._start_sync(awx.row("projects", number))
    set_up(awx_project="mine", awx_project_scm_url=None).ok()
    assert awx.row("projects", number)["status"] == "successful" and awx.row("projects", number)["description"] == ""
    assert ("POST /api/v2/projects/N/update/" in written(awx)) == (status != "running")


def test_the_cache_of_the_project_is_an_option(awx: Awx, set_up: SetUp) -> None:
    """W11"""
    set_up().ok()
    awx.writes.clear()
    set_up(awx_project_update_on_launch=False, awx_project_cache_timeout=86400).ok()
    project = awx.named("projects", "agentlab")
    assert (project["scm_update_on_launch"], project["scm_update_cache_timeout"]) == (False, 86400)
    assert written(awx) == ["PATCH /api/v2/projects/N/"]


# ---- credentials and secrets ----


@pytest.mark.parametrize("option, value, field", [
    ("awx_proxmox_api_host", "other.example.net", "api_host"), ("awx_proxmox_ca_path", "/etc/ssl/other.pem", "ca_path"),
    ("awx_proxmox_api_port", "443", "api_port")])  # fmt: skip
def test_another_value_of_the_credential_is_written_and_the_secret_kept(
    awx: Awx, set_up: SetUp, option: str, value: str, field: str
) -> None:
    """W6: PATCH replaces all inputs; AWX keeps the secret for "$encrypted$"."""
    set_up().ok()
    awx.writes.clear()
    run = set_up(secret="", **{option: value}).ok()
    inputs = awx.named("credentials", "agentlab - Proxmox VE API")["inputs"]
    assert inputs[field] == value and inputs["api_token_secret"] == TOKEN_SECRET
    assert written(awx) == [
        "PATCH /api/v2/credentials/N/"
    ] and "credential agentlab - Proxmox VE API: changed (inputs)" in lines(run)
    assert "changed=0" in set_up(secret="", **{option: value}).ok().stdout
    # Given anew with another host, the secret is written.
    set_up(secret="another-secret-5a5a", **{option: f"{value}x"}).ok()
    assert awx.named("credentials", "agentlab - Proxmox VE API")["inputs"]["api_token_secret"] == "another-secret-5a5a"


def test_another_secret_alone_is_told_and_written_when_asked(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    run = set_up(secret="another-secret-5a5a\n").ok()
    assert "awx_update_secrets" in lines(run) and awx.writes == [] and "another-secret" not in run.output
    changed = set_up(secret="another-secret-5a5a\n", awx_update_secrets=True, diff=True, args=("-vvv",)).ok()
    assert awx.named("credentials", "agentlab - Proxmox VE API")["inputs"]["api_token_secret"] == "another-secret-5a5a"
    assert "another-secret" not in changed.output and written(awx) == ["PATCH /api/v2/credentials/N/"]


@pytest.mark.parametrize("variables, secret, told", [
    ({}, "", "awx_proxmox_api_token_secret: missing; awx_proxmox_api_token_id needs it. Set PROXMOX_TOKEN_SECRET"),
    ({"awx_proxmox_api_host": None}, TOKEN_SECRET, "awx_proxmox_api_host: missing"),
    ({"awx_proxmox_api_token_id": None}, TOKEN_SECRET, "awx_proxmox_api_token_id: missing"),
    ({"awx_proxmox_api_token_id": None, "awx_proxmox_api_user": "root@pam"}, "", "awx_proxmox_api_password: "
                                                                                 "missing")])  # fmt: skip
def test_half_a_login_is_refused_before_anything_is_written(
    awx: Awx, set_up: SetUp, variables: dict[str, Any], secret: str, told: str
) -> None:
    """W13"""
    for check in (True, False):
        assert told in failure(set_up(secret=secret, check=check, **variables))
    assert awx.writes == []


def test_another_token_needs_its_secret(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.writes.clear()
    told = failure(set_up(secret="", awx_proxmox_api_token_id="agentlab@pve!other"))
    assert "differs from the one in AWX, and another api_token_id has another secret" in told and awx.writes == []


def test_another_machine_credential_takes_the_place_of_the_first(awx: Awx, set_up: SetUp) -> None:
    """W7: AWX refuses a second one of a type."""
    set_up().ok()
    machine = awx.named("credential_types", "Machine")["id"]
    other = awx.add("credentials", name="others", credential_type=machine, organization=1)
    would = set_up(check=True, awx_machine_credential="others").ok()
    assert "credential nodes: would be detached from agentlab - create" in lines(would)
    set_up(awx_machine_credential="others").ok()
    for row in awx.objects["job_templates"]:
        assert (
            other in awx.attached[row["id"]] and awx.named("credentials", "nodes")["id"] not in awx.attached[row["id"]]
        )
    assert "changed=0" in set_up(awx_machine_credential="others").ok().stdout


def test_an_organization_administrator_can_set_up_without_a_token_in_awx(awx: Awx, set_up: SetUp) -> None:
    """W14: the type is made only when it is needed; who may not make it is told who may."""
    told = failure(set_up(token=ORGANIZATION_TOKEN))
    assert "credential type agentlab Proxmox VE API: it is not there yet, and only a system administrator" in told
    assert awx.writes == []
    set_up(token=ORGANIZATION_TOKEN, awx_proxmox_api_host=None, awx_proxmox_api_token_id=None).ok()
    assert not [row for row in awx.objects["credential_types"] if row["kind"] == "cloud"]
    assert len(awx.objects["job_templates"]) == len(NAMES)
    # Made once by a system administrator, it serves everybody.
    set_up().ok()
    awx.writes.clear()
    assert "changed=0" in set_up(token=ORGANIZATION_TOKEN).ok().stdout


# ---- schedules, notification ----


def test_a_schedule_that_was_switched_off_stays_off(awx: Awx, set_up: SetUp) -> None:
    """W8"""
    set_up().ok()
    awx.named("schedules", "agentlab - nightly prune")["enabled"] = False
    awx.writes.clear()
    assert "changed=0" in set_up().ok().stdout
    # Another time is written, and it stays off.
    set_up(awx_prune_rrule="DTSTART:20260101T040000Z\nRRULE:FREQ=DAILY;INTERVAL=1").ok()
    nightly = awx.named("schedules", "agentlab - nightly prune")
    assert nightly["enabled"] is False and nightly["rrule"] == "DTSTART:20260101T040000Z RRULE:FREQ=DAILY;INTERVAL=1"
    assert written(awx) == ["PATCH /api/v2/schedules/N/"]


def test_a_schedule_can_be_left_out(awx: Awx, set_up: SetUp) -> None:
    set_up(awx_prune_rrule="").ok()
    assert [row["name"] for row in awx.objects["schedules"]] == ["agentlab - reconcile"]
    assert "changed=0" in set_up(awx_prune_rrule="").ok().stdout
    run = set_up(awx_prune_rrule="", awx_reconcile_rrule="").ok()
    assert awx.objects["schedules"] == [] and "schedule agentlab - reconcile: deleted" in lines(run)
    # One that somebody else made under that name is left alone.
    template = awx.named("job_templates", "agentlab - prune")["id"]
    awx.add(
        "schedules", name="agentlab - nightly prune", unified_job_template=template, rrule="x", description="theirs"
    )
    assert "changed=0" in set_up(awx_prune_rrule="", awx_reconcile_rrule="").ok().stdout


def test_a_wrong_schedule_is_told_in_the_words_of_awx(awx: Awx, set_up: SetUp) -> None:
    told = failure(set_up(awx_prune_rrule="DTSTART:20260101T040000Z RRULE:FREQ=DAILY"))
    assert "refuses job_templates agentlab - nightly prune (400): {'rrule': ['INTERVAL required in rrule.']}" in told
    assert "they stay, and the next run goes on" in told


def test_failures_are_told_to_a_notification(awx: Awx, set_up: SetUp) -> None:
    number = awx.add("notification_templates", name="mail", organization=1)
    set_up(awx_notification="mail").ok()
    for row in awx.objects["job_templates"]:
        assert awx.related["job_templates", row["id"], "notification_templates_error"] == [number]
    assert "changed=0" in set_up(awx_notification="mail").ok().stdout


# ---- inventory, Galaxy, how AWX is reached ----


@pytest.mark.parametrize("hosts, told", [
    ("nosuch", "the inventory proxmox has no group or host nosuch"), ("empty", "has no group or host empty with a "
                                                                               "host in it")])  # fmt: skip
def test_hosts_that_the_inventory_lacks_are_refused(awx: Awx, set_up: SetUp, hosts: str, told: str) -> None:
    """W12: such a job would be successful in AWX without doing anything."""
    awx.add("groups", name="empty", inventory=awx.named("inventories", "proxmox")["id"])
    assert told in failure(set_up(awx_hosts=hosts)) and awx.writes == []
    set_up(awx_hosts="pve1").ok()


def test_a_group_of_several_hosts_is_remarked(awx: Awx, set_up: SetUp) -> None:
    """W3: the playbooks refuse such a group."""
    awx.inventory("three", 1, hosts=("pve11", "pve12", "pve13"))
    run = set_up(awx_inventory="three").ok()
    assert "the group pve has 3 hosts; create, renew, destroy and job refuse" in lines(run)
    run = set_up(awx_inventory="three", awx_allow_many_hosts=True).ok()
    assert "refuse" not in lines(run)
    extra = json.loads(awx.named("job_templates", "agentlab - create")["extra_vars"])
    assert extra == {"agentlab_hosts": "pve", "agentlab_allow_many_hosts": True}


def test_an_inventory_that_is_filled_by_a_source_may_be_empty_yet(awx: Awx, set_up: SetUp) -> None:
    awx.add("inventories", name="dynamic", organization=1, has_inventory_sources=True)
    assert "has no host for pve yet" in lines(set_up(awx_inventory="dynamic").ok())


def test_an_organization_without_a_galaxy_credential_is_refused(awx: Awx, set_up: SetUp) -> None:
    """W15: AWX would install no collection, and every job would fail."""
    awx.related["organizations", 1, "galaxy_credentials"] = []
    told = failure(set_up())
    assert (
        "the organization Default has no Galaxy credential" in told and "awx_galaxy_check" in told and awx.writes == []
    )
    set_up(awx_galaxy_check=False).ok()


def test_an_execution_environment_of_another_organization_is_not_used(awx: Awx, set_up: SetUp) -> None:
    second = second_organization(awx)
    awx.add("execution_environments", name="theirs", image="x", organization=second)
    everybodys = awx.add("execution_environments", name="everybody's", image="x")
    assert "one of that name belongs to Second" in failure(set_up(awx_execution_environment="theirs"))
    assert "has none named nosuch" in failure(set_up(awx_execution_environment="nosuch"))
    set_up(awx_execution_environment="everybody's").ok()
    assert {row["execution_environment"] for row in awx.objects["job_templates"]} == {everybodys}


def test_lists_of_many_pages_are_read_to_the_end(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    awx.page_size = 1
    awx.writes.clear()
    assert "changed=0" in set_up().ok().stdout and awx.writes == []


def test_the_path_of_automation_platform(awx: Awx, set_up: SetUp) -> None:
    awx.prefix = "/api/controller/v2"
    told = failure(set_up())
    assert "answers 404 for organizations: a web page instead of JSON. The API is looked for under /api/v2" in told
    set_up(awx_api_path="/api/controller/v2/", awx_host=f"{awx.url}/").ok()
    assert "changed=0" in set_up(awx_api_path="/api/controller/v2").ok().stdout


def test_a_user_with_a_password(awx: Awx, set_up: SetUp) -> None:
    run = set_up(token="", awx_username="admin", awx_password=PASSWORD).ok()
    assert PASSWORD not in run.output
    told = failure(set_up(token="", awx_username="admin", awx_password="wrong-password-1"))
    assert "answers 401 for organizations" in told and "CONTROLLER_PASSWORD" in told


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
        assert expected in failure(run), (expected, failure(run))


# ---- taking it away ----


def test_absent_removes_what_the_set_up_made_and_only_that(awx: Awx, set_up: SetUp) -> None:
    before = snapshot(awx)
    second_organization(awx)
    set_up(awx_organization="Second").ok()
    others = {row["id"] for rows in awx.objects.values() for row in rows}
    set_up().ok()
    number = awx.add(
        "job_templates", name="mine", organization=1, project=awx.named("projects", "agentlab", organization=1)["id"]
    )
    awx.writes.clear()
    would = set_up(check=True, awx_state="absent").ok()
    assert awx.writes == [] and "job template agentlab - create: would be deleted" in lines(would)
    run = set_up(awx_state="absent").ok()
    assert lines(run) == lines(would).replace("would be ", "")
    assert "project agentlab" in lines(run) and "is kept: job template mine use it" in lines(run)
    assert "credential type agentlab Proxmox VE API" in lines(run) and "1 other credentials are of it" in lines(run)
    kept = {row["id"] for rows in awx.objects.values() for row in rows}
    assert others | {number} <= kept
    rest = [
        row for kind in ("job_templates", "schedules", "labels") for row in awx.objects[kind] if row["id"] not in others
    ]
    assert [row["name"] for row in rest] == ["mine"]
    assert "changed=0" in set_up(awx_state="absent").ok().stdout
    awx.objects["job_templates"].remove(awx.row("job_templates", number))
    set_up(awx_state="absent").ok()
    set_up(awx_state="absent", awx_organization="Second").ok()
    for kind in ("job_templates", "schedules", "labels", "projects", "credential_types"):
        assert awx.objects[kind] == before[0][kind], kind


def test_absent_names_running_jobs_and_removes_nothing(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    template = awx.named("job_templates", "agentlab - prune")
    first = awx.launch(template, {})["job"]
    second = awx.launch(template, {})["job"]
    awx.row("jobs", second)["status"] = "running"
    awx.writes.clear()
    for check in (True, False):
        told = failure(set_up(awx_state="absent", check=check))
        assert f"job template agentlab - prune: jobs {first} (pending), {second} (running) are under way" in told
    assert awx.writes == []
    for job in (first, second):
        awx.row("jobs", job)["status"] = "successful"
    set_up(awx_state="absent").ok()
    assert awx.objects["job_templates"] == []


def test_absent_keeps_what_others_built_on(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    prune, create = (awx.named("job_templates", f"agentlab - {name}")["id"] for name in ("prune", "create"))
    awx.add("schedules", name="weekly", unified_job_template=prune, rrule="x", description="theirs")
    awx.add("workflow_job_template_nodes", unified_job_template=create)
    awx.named("job_templates", "agentlab - renew")["description"] = "theirs"
    run = set_up(awx_state="absent").ok()
    assert {row["name"] for row in awx.objects["job_templates"]} == {
        "agentlab - prune",
        "agentlab - create",
        "agentlab - renew",
    }
    assert "schedule weekly would go with it" in lines(run) and "of a workflow would go with it" in lines(run)
    assert "job template agentlab - renew" in lines(run) and "the set-up did not make it" in lines(run)
    assert awx.named("projects", "agentlab") and awx.named("credentials", "agentlab - Proxmox VE API")
    set_up(awx_state="absent", awx_adopt=True).ok()
    assert {row["name"] for row in awx.objects["job_templates"]} == {"agentlab - renew"}


def test_a_run_that_breaks_off_at_any_request_is_finished_by_the_next(awx: Awx) -> None:
    """The connection breaks off at each write in turn, by turns before AWX acts and after it: the next run goes on."""
    awx.add("notification_templates", name="mail", organization=1)
    given: dict[str, Any] = {"awx_notification": "mail"}
    before = snapshot(awx)

    def broken_at(number: int, **more: Any) -> bool:
        """Run until the connection breaks off at that write; return whether it did, and the next run finished."""
        awx.writes.clear()
        awx.cut = (number, ("before", "after")[number % 2])
        broken = run_module(awx, **given, **more)
        awx.cut = None
        would = run_module(awx, check=True, **given, **more)
        assert told(run_module(awx, **given, **more)) == told(would).replace("would be ", "")
        assert not run_module(awx, **given, **more)["changed"]
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
        told(run_module(awx, awx_state="absent", **given))
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
        told(run_module(awx, **given))
        if not broken_at(number, awx_state="absent"):
            break
        for kind in ("job_templates", "projects", "credential_types", "schedules", "labels", "credentials"):
            assert awx.objects[kind] == before[0][kind], kind
    assert number > 5


@pytest.mark.parametrize("description", ["", "theirs"])
@pytest.mark.parametrize("name", ["weekly", "agentlab - nightly prune"])
def test_absent_takes_no_schedule_that_a_person_made(awx: Awx, name: str, description: str) -> None:
    """People leave descriptions empty; and a person may have put another schedule in the place of ours."""
    told(run_module(awx))
    prune = awx.named("job_templates", "agentlab - prune")["id"]
    awx.objects["schedules"].remove(awx.named("schedules", "agentlab - nightly prune"))
    awx.add("schedules", name=name, unified_job_template=prune, rrule="x", description=description)
    for check in (True, False):
        text = told(run_module(awx, awx_state="absent", check=check))
        assert f"job template agentlab - prune (id {prune}) is kept: schedule {name} would go with it" in text
    assert [row["name"] for row in awx.objects["schedules"]] == [name]
    assert [row["name"] for row in awx.objects["job_templates"]] == ["agentlab - prune"]
    text = told(run_module(awx, awx_prune_rrule="", awx_reconcile_rrule=""))
    assert ("the set-up did not make it, so leaving the schedule out" in text) is (name != "weekly")
    assert name in [row["name"] for row in awx.objects["schedules"]]


def test_absent_keeps_the_templates_of_another_project(awx: Awx) -> None:
    """The set-up calls them somebody else's, and so does the removal."""
    told(run_module(awx, awx_project="other"))
    templates = [row["id"] for row in awx.objects["job_templates"]]
    text = told(run_module(awx, awx_state="absent"))
    assert "it belongs to the project other; name that project with awx_project" in text
    assert [row["id"] for row in awx.objects["job_templates"]] == templates and awx.named("projects", "other")
    told(run_module(awx, awx_state="absent", awx_project="other"))
    assert awx.objects["job_templates"] == awx.objects["projects"] == []


@pytest.mark.parametrize("user", ["inventory source", "schedule", "node of a workflow"])
def test_absent_keeps_a_project_that_others_use(awx: Awx, user: str) -> None:
    """AWX deletes inventory sources and schedules together with their project, without a question."""
    told(run_module(awx))
    project = awx.named("projects", "agentlab")["id"]
    if user == "inventory source":
        number = awx.add("inventory_sources", name="theirs", source="scm", source_project=project)
    elif user == "schedule":
        number = awx.add("schedules", name="theirs", unified_job_template=project, rrule="x")
    else:
        number = awx.add("workflow_job_template_nodes", unified_job_template=project)
    text = told(run_module(awx, awx_state="absent"))
    name = number if user.startswith("node") else "theirs"
    assert f"project agentlab (id {project}) is kept: {user} {name} use it" in text
    assert awx.named("projects", "agentlab") and awx.objects["job_templates"] == []
    assert number in [row["id"] for rows in awx.objects.values() for row in rows]


@pytest.mark.parametrize("user", ["inventory_sources", "schedules", "workflow_job_template_nodes"])
def test_absent_keeps_a_credential_that_others_use(awx: Awx, user: str) -> None:
    told(run_module(awx))
    credential = awx.named("credentials", "agentlab - Proxmox VE API")["id"]
    mine = awx.add("job_templates", name="mine", organization=1)
    more = {} if user == "inventory_sources" else {"unified_job_template": mine}
    number = awx.add(user, **({} if user.startswith("workflow") else {"name": "theirs"}), **more)
    awx.attached[number] = [credential]
    text = told(run_module(awx, awx_state="absent"))
    assert f"credential agentlab - Proxmox VE API (id {credential}) is kept: " in text and " use it" in text
    assert awx.named("credentials", "agentlab - Proxmox VE API")
    assert "credential type agentlab Proxmox VE API" in text and "1 other credentials are of it" in text


def test_absent_takes_the_credential_of_an_earlier_type_as_well(awx: Awx) -> None:
    told(run_module(awx))
    told(run_module(awx, awx_credential_type_name="agentlab type 2"))
    machine = awx.named("credential_types", "Machine")["id"]
    number = awx.add(
        "credentials", name="agentlab - Proxmox VE API", organization=1, credential_type=machine, description="x"
    )
    told(run_module(awx, awx_state="absent", awx_credential_type_name="agentlab type 2"))
    assert [row["name"] for row in awx.objects["credential_types"] if row["kind"] == "cloud"] == []
    assert [row["id"] for row in awx.objects["credentials"] if row["name"].startswith("agentlab")] == [number]


def test_absent_names_jobs_that_still_use_the_project(awx: Awx) -> None:
    """A job goes on when its template is deleted, and AWX deletes no project that a job uses."""
    told(run_module(awx))
    project = awx.named("projects", "agentlab")["id"]
    job = awx.add("jobs", name="x", project=project, status="running")
    awx.writes.clear()
    text = refusal(run_module(awx, awx_state="absent"))
    assert f"project agentlab: jobs {job} (running) are under way" in text and awx.writes == []


def test_absent_after_a_job_whose_events_are_not_stored_yet(awx: Awx) -> None:
    """AWX answers 403 then, though no right is missing."""
    told(run_module(awx))
    job = awx.launch(awx.named("job_templates", "agentlab - prune"), {})["job"]
    awx.row("jobs", job).update(status="successful", unprocessed=True)
    text = refusal(run_module(awx, awx_state="absent"))
    assert "is still processing events" in text and "run this again in a minute" in text
    assert "administrator" not in text
    awx.row("jobs", job)["unprocessed"] = False
    told(run_module(awx, awx_state="absent"))
    assert awx.objects["job_templates"] == [] and not run_module(awx, awx_state="absent")["changed"]


def test_absent_by_an_organization_administrator_leaves_the_type(awx: Awx, set_up: SetUp) -> None:
    set_up().ok()
    run = set_up(token=ORGANIZATION_TOKEN, awx_state="absent").ok()
    assert "only a system administrator of AWX can delete it" in lines(run) and awx.objects["job_templates"] == []
