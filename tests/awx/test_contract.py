# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How AWX 24.6.1 answers, one by one: the double of AWX is held to it.

The same tests run against a real AWX: AGENTLAB_TEST_AWX names its address, AGENTLAB_TEST_AWX_LOGIN is user:password of
a system administrator, AGENTLAB_TEST_AWX_REPOSITORY the URL of a Git repository with the contents of awx/. They make an
organization of their own with a new name, and leave it there.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import pytest

from support.awx import PASSWORD, TOKEN, Awx
from support.awx_setup import PROJECT_URL
from support.awx_tables import dump_variables

REAL = os.environ.get("AGENTLAB_TEST_AWX", "")
DESCRIPTION = {"description": "changed"}


class Api:
    """Requests as one user. ``ask`` returns status and answer; ``make`` the id of a new object."""

    def __init__(self, url: str, authorization: str, repository: str) -> None:
        self.url, self.repository = f"{url}/api/v2/", repository
        self.headers = {"Content-Type": "application/json", "Authorization": authorization}
        self.suffix = uuid.uuid4().hex[:8]
        self.organization = self.make("organizations", name=f"contract {self.suffix}")

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            path if path.startswith("http") else self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={**self.headers, **(headers or {})},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text) if text else None
        except ValueError:
            return status, text

    def make(self, endpoint: str, **body: Any) -> int:
        status, answer = self.ask("POST", f"{endpoint}/", body)
        assert status == 201, (status, answer)
        return int(answer["id"])

    def refused(self, method: str, path: str, body: Any, status: int = 400) -> Any:
        got, answer = self.ask(method, path, body)
        assert got == status, (got, answer)
        return answer

    def project(self, name: str = "project", wait: bool = True) -> int:
        number = self.make(
            "projects", name=name, organization=self.organization, scm_type="git", scm_url=self.repository
        )
        while wait and self.ask("GET", f"projects/{number}/")[1]["status"] != "successful":
            time.sleep(0.5 if REAL else 0)
        return number

    def template(self, **body: Any) -> int:
        inventory = self.make("inventories", name=f"inventory {uuid.uuid4().hex}", organization=self.organization)
        project = body.pop("project", None) or self.project(name=f"project {uuid.uuid4().hex}")
        values = {"name": "template", "project": project, "inventory": inventory, "playbook": "reconcile.yml", **body}
        return self.make("job_templates", **values)

    def survey(self, *questions: dict[str, Any]) -> dict[str, Any]:
        filled = [{"question_name": question["variable"], "required": False, **question} for question in questions]
        return {"name": "", "description": "", "spec": filled}

    def kind(self, name: str, secret: str = "s") -> int:
        fields = [
            {"id": "f", "label": "F", "type": "string"},
            {"id": secret, "label": "S", "type": "string", "secret": True},
        ]
        return self.make("credential_types", name=name, kind="cloud", inputs={"fields": fields}, injectors={})


def duplicate(answer: dict[str, list[str]]) -> tuple[str, set[str]]:
    """Return model and fields of the refusal of a duplicate.

    AWX names the fields in an order that changes from start to start.
    """
    match = re.fullmatch(r"(\w+) with this \((.+)\) combination already exists\.", answer["__all__"][0])
    assert match, answer
    return match[1], set(match[2].split(", "))


@pytest.fixture
def api() -> Iterator[Api]:
    if REAL:
        login = base64.b64encode(os.environ["AGENTLAB_TEST_AWX_LOGIN"].encode()).decode()
        yield Api(REAL, f"Basic {login}", os.environ["AGENTLAB_TEST_AWX_REPOSITORY"])
        return
    double = Awx()
    yield Api(double.url, f"Bearer {TOKEN}", PROJECT_URL)
    double.stop()


def test_lists_have_pages_and_errors_have_bodies(api: Api) -> None:
    api.make("inventories", name="one", organization=api.organization)
    api.make("inventories", name="two", organization=api.organization)
    status, answer = api.ask("GET", f"inventories/?organization={api.organization}&page_size=1")
    assert status == 200 and set(answer) == {"count", "next", "previous", "results"} and answer["count"] == 2
    assert answer["next"].startswith("/api/v2/inventories/?") and "page=2" in answer["next"]
    assert api.ask("GET", f"inventories/?name=on&organization={api.organization}")[1]["count"] == 0
    assert api.ask("GET", f"inventories/?name=one&organization={api.organization}")[1]["count"] == 1
    assert api.ask("GET", "projects/?nosuch=1") == (400, {"detail": "Project has no field named 'nosuch'"})
    assert api.ask("GET", "job_templates/999999/") == (404, {"detail": "No JobTemplate matches the given query."})
    for authorization in ("Bearer nosuch", ""):
        assert api.ask("GET", "projects/", headers={"Authorization": authorization})[0] == 401
    assert "Not Found" in api.ask("GET", "nosuch/")[1]


def test_a_password_logs_in_as_well(api: Api) -> None:
    if not REAL:
        basic = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        assert (
            api.ask("GET", "me/", headers={"Authorization": f"Basic {basic}"})[1]["results"][0]["is_superuser"] is True
        )


def test_what_is_unique_by_what(api: Api) -> None:
    other = api.make("organizations", name=f"other {api.suffix}")
    mine = api.project()
    again = {"name": "project", "organization": api.organization, "scm_type": "git", "scm_url": api.repository}
    assert duplicate(api.refused("POST", "projects/", again)) == ("Project", {"name", "organization"})
    assert api.ask("POST", "projects/", {**again, "organization": other})[0] == 201
    template = api.template(project=mine)
    row = api.ask("GET", f"job_templates/{template}/")[1]
    body = {key: row[key] for key in ("name", "project", "inventory", "playbook")}
    assert duplicate(api.refused("POST", "job_templates/", body)) == ("JobTemplate", {"organization", "name"})
    kind = api.kind(f"kind {api.suffix}")
    refusal = api.refused("POST", "credential_types/", {"name": f"kind {api.suffix}", "kind": "cloud"})
    assert refusal == {"__all__": ["Credential type with this Name and Kind already exists."]}
    credential = {"name": "c", "organization": api.organization, "credential_type": kind, "inputs": {}}
    assert api.ask("POST", "credentials/", credential)[0] == 201
    refusal = api.refused("POST", "credentials/", credential)
    assert refusal == {"__all__": ["Credential with this Organization, Name and Credential type already exists."]}
    assert api.ask("POST", "credentials/", {**credential, "organization": other})[0] == 201
    schedule = {"name": "s", "rrule": "DTSTART:20260101T000000Z RRULE:FREQ=DAILY;INTERVAL=1"}
    assert api.ask("POST", f"job_templates/{template}/schedules/", schedule)[0] == 201
    refusal = api.refused("POST", f"job_templates/{template}/schedules/", schedule)
    assert refusal == {"__all__": ["Schedule with this Unified job template and Name already exists."]}
    inventory = {"name": "i", "organization": api.organization}
    assert api.ask("POST", "inventories/", inventory)[0] == 201
    assert "already exists" in str(api.refused("POST", "inventories/", inventory))


def test_fields_that_are_ignored(api: Api) -> None:
    template = api.template(nosuch="ignored", organization=1)
    row = api.ask("GET", f"job_templates/{template}/")[1]
    assert "nosuch" not in row and row["organization"] == api.organization
    other = api.make("organizations", name=f"other {api.suffix}")
    status, row = api.ask("PATCH", f"job_templates/{template}/", {"organization": other})
    assert status == 200 and row["organization"] == api.organization
    refusal = api.refused("PATCH", f"projects/{row['project']}/", {"organization": other})
    assert refusal == {"organization": ["Organization cannot be changed when in use by job templates."]}


def test_a_project_is_synced_when_it_is_made_or_changed(api: Api) -> None:
    body = {"name": "project", "organization": api.organization, "scm_type": "git"}
    assert api.refused("POST", "projects/", body) == {"scm_url": ["SCM URL is required."]}
    assert "Unsupported git URL" in str(api.refused("POST", "projects/", {**body, "scm_url": "nosuch://x/y"}))
    status, row = api.ask("POST", "projects/", {**body, "scm_url": api.repository})
    number = row["id"]
    assert status == 201 and row["status"] == "pending" and row["summary_fields"]["current_update"]["id"]
    assert (row["allow_override"], row["scm_update_cache_timeout"]) == (False, 0)
    inventory = api.make("inventories", name="i", organization=api.organization)
    template = {"name": "t", "project": number, "inventory": inventory, "playbook": "reconcile.yml"}
    assert api.refused("POST", "job_templates/", template) == {"playbook": ["Playbook not found for project."]}
    assert api.ask("GET", f"projects/{number}/playbooks/") == (200, [])
    while api.ask("GET", f"projects/{number}/")[1]["status"] != "successful":
        time.sleep(0.5 if REAL else 0)
    assert "reconcile.yml" in api.ask("GET", f"projects/{number}/playbooks/")[1]
    status, row = api.ask("PATCH", f"projects/{number}/", {"scm_branch": "HEAD"})
    assert status == 200 and row["summary_fields"]["current_update"]["id"]
    assert api.ask("POST", "job_templates/", template)[0] == 201, "templates can be made during that"


def test_what_a_template_needs(api: Api) -> None:
    template = api.template()
    row = api.ask("GET", f"job_templates/{template}/")[1]
    assert (row["extra_vars"], row["forks"], row["verbosity"]) == ("", 0, 0)
    assert not any(value for key, value in row.items() if key.startswith("ask_"))
    body = {"name": "other", "project": row["project"], "inventory": row["inventory"], "playbook": "prune.yml"}
    refusal = api.refused("POST", "job_templates/", {**body, "playbook": ""})
    assert refusal == {"playbook": ["Must select playbook for project."]}
    without = {key: value for key, value in body.items() if key != "inventory"}
    refusal = api.refused("POST", "job_templates/", without)
    assert "You must either set a default value or ask to prompt on launch." in str(refusal)
    refusal = api.refused("POST", "job_templates/", {**body, "inventory": 999999})
    assert refusal == {"inventory": ['Invalid pk "999999" - object does not exist.']}


def test_a_template_takes_one_credential_of_a_type(api: Api) -> None:
    template = api.template()
    kind = api.kind(f"kind {api.suffix}")
    first, second = (
        api.make("credentials", name=name, organization=api.organization, credential_type=kind, inputs={})
        for name in "ab"
    )
    path = f"job_templates/{template}/credentials/"
    assert api.ask("POST", path, {"id": first}) == (204, None)
    expected = {"error": f"Cannot assign multiple kind {api.suffix} credentials."}
    assert (
        api.refused("POST", path, {"id": first}) == expected and api.refused("POST", path, {"id": second}) == expected
    )
    assert api.refused("POST", path, {"id": 999999}) == {"detail": "Credential matching query does not exist."}
    assert api.refused("POST", path, {"id": str(second)}) == {"msg": '"id" field must be an integer.'}
    assert api.ask("POST", path, {"id": first, "disassociate": True}) == (204, None)
    assert api.ask("POST", path, {"id": second})[0] == 204
    assert [row["id"] for row in api.ask("GET", path)[1]["results"]] == [second]


def test_secret_inputs_of_a_credential_are_shown_encrypted(api: Api) -> None:
    kind = api.kind(f"kind {api.suffix}")
    body = {"name": "c", "organization": api.organization, "credential_type": kind, "inputs": {"f": "x", "s": "secret"}}
    number = api.make("credentials", **body)
    assert api.ask("GET", f"credentials/{number}/")[1]["inputs"] == {"f": "x", "s": "$encrypted$"}
    status, row = api.ask("PATCH", f"credentials/{number}/", {"inputs": {"f": "y", "s": "$encrypted$"}})
    assert status == 200 and row["inputs"] == {"f": "y", "s": "$encrypted$"}
    assert api.ask("PATCH", f"credentials/{number}/", {"inputs": {"f": "z"}})[1]["inputs"] == {"f": "z"}
    assert api.make("credentials", **{**body, "name": "missing inputs", "inputs": {}})
    status, row = api.ask("POST", "credentials/", {**body, "name": "empty secret", "inputs": {"f": "x", "s": ""}})
    assert status == 201 and row["inputs"] == {"f": "x"}
    refusal = api.refused("POST", "credentials/", {**body, "name": "unknown", "inputs": {"nosuch": "x"}})
    assert "Additional properties are not allowed" in str(refusal)
    refusal = api.refused("POST", "credentials/", {"name": "nobody's", "credential_type": kind, "inputs": {}})
    assert "Missing 'user', 'team', or 'organization'." in str(refusal)


def test_a_credential_type_is_checked_against_its_use(api: Api) -> None:
    assert "Must be 'cloud' or 'net', not ssh" in str(
        api.refused("POST", "credential_types/", {"name": "x", "kind": "ssh"})
    )
    kind = api.kind(f"kind {api.suffix}")
    wrong = {"injectors": {"env": {"X": "{{ nosuch }}"}}}
    assert "undefined field" in str(api.refused("PATCH", f"credential_types/{kind}/", wrong))
    more = {
        "inputs": {"fields": [{"id": "f", "label": "F", "type": "string"}, {"id": "g", "label": "G", "type": "string"}]}
    }
    assert api.ask("PATCH", f"credential_types/{kind}/", more)[0] == 200
    credential = api.make("credentials", name="c", organization=api.organization, credential_type=kind, inputs={})
    less = {"inputs": {"fields": more["inputs"]["fields"][:1]}}
    refusal = api.refused("PATCH", f"credential_types/{kind}/", less, 403)
    assert refusal == {"detail": "Modifications to inputs are not allowed for credential types that are in use"}
    assert api.ask("PATCH", f"credential_types/{kind}/", {"injectors": {"env": {"X": "{{ f }}"}}})[0] == 200
    refusal = api.refused("DELETE", f"credential_types/{kind}/", None, 403)
    assert refusal == {"detail": "Credential types that are in use cannot be deleted"}
    assert api.ask("DELETE", f"credentials/{credential}/") == (204, None)
    assert api.ask("DELETE", f"credential_types/{kind}/") == (204, None)


def test_a_survey_is_checked_when_it_is_stored(api: Api) -> None:
    path = f"job_templates/{api.template()}/survey_spec/"
    assert api.ask("GET", path) == (200, {})
    text = {"type": "text", "variable": "v", "default": "too long", "min": 0, "max": 1}
    spec = api.survey(text)
    # The default is not held against min and max.
    assert api.ask("POST", path, spec)[0] == 200 and api.ask("GET", path) == (200, spec)
    for question, refusal in (
        (
            {"type": "multiplechoice", "variable": "v", "choices": ["a"], "default": "b"},
            "Default choice must be answered from the choices listed.",
        ),
        (
            {"type": "integer", "variable": "v", "default": "50"},
            "Default value 50 in survey question 0 expected to be integer.",
        ),
    ):
        assert api.refused("POST", path, api.survey(question)) == {"error": refusal}
    refusal = api.refused("POST", path, api.survey(text, text))
    assert refusal == {"error": "'variable' 'v' duplicated in survey question 1."}
    assert api.refused("POST", path, {"name": "", "description": "", "spec": []}) == {
        "error": "'spec' doesn't contain any items."
    }


def test_a_launch_checks_the_answers_against_the_survey(api: Api) -> None:
    template = api.template(survey_enabled=True, extra_vars=json.dumps({"own": "x"}))
    questions = [
        {"type": "text", "variable": "name", "required": True, "min": 1, "max": 5, "default": ""},
        {"type": "text", "variable": "ttl", "min": 0, "max": 5, "default": "4h"},
        {"type": "text", "variable": "blank", "min": 0, "max": 5, "default": ""},
        {"type": "multiplechoice", "variable": "wait", "choices": ["true", "false"], "default": "true"},
    ]
    assert api.ask("POST", f"job_templates/{template}/survey_spec/", api.survey(*questions))[0] == 200
    path = f"job_templates/{template}/launch/"
    for answers, refusal in (
        ({}, "'name' value missing"),
        ({"name": 5}, "Value 5 for 'name' expected to be a string."),
        ({"name": ""}, "'name' value  is too small (length is 0 must be at least 1)."),
        ({"name": "123456"}, "'name' value 123456 is too large (must be no more than 5)."),
        ({"name": "x", "wait": "maybe"}, "Value maybe for 'wait' expected to be one of ['true', 'false']."),
        ({"name": "x", "wait": True}, "Value True for 'wait' expected to be one of ['true', 'false']."),
    ):
        refused = api.refused("POST", path, {"extra_vars": answers})
        assert refused["variables_needed_to_start"] == [refusal]
    status, answer = api.ask("POST", path, {"extra_vars": {"name": "x", "nosuch": "y", "own": "z"}})
    assert status == 201 and answer["job"] and set(answer["ignored_fields"]["extra_vars"]) == {"nosuch", "own"}
    job = api.ask("GET", f"jobs/{answer['job']}/")[1]
    assert json.loads(job["extra_vars"]) == {"own": "x", "name": "x", "ttl": "4h", "blank": "", "wait": "true"}
    # While it is under way, its template stays. The double's jobs never end.
    if not REAL:
        refusal = api.refused("DELETE", f"job_templates/{template}/", None, 409)
        assert refusal["error"] == "Resource is being used by running jobs."
        assert refusal["active_jobs"] == [{"id": answer["job"], "type": "job"}]


def test_passwords_and_choices_without_an_answer(api: Api) -> None:
    template = api.template(survey_enabled=True)
    path = f"job_templates/{template}/survey_spec/"
    password = {"type": "password", "variable": "p", "min": 0, "max": 20}
    for default, shown in (("", ""), ("x", "$encrypted$")):
        assert api.ask("POST", path, api.survey({**password, "default": default}))[0] == 200
        assert api.ask("GET", path)[1]["spec"][0]["default"] == shown
    choice = {"type": "multiplechoice", "variable": "c", "choices": ["true", "false"], "default": ""}
    spec = api.survey(password, choice)
    assert api.ask("POST", path, spec)[0] == 200 and api.ask("GET", path) == (200, spec)
    for answers, variables in (({}, {}), ({"p": "made-up"}, {"p": "$encrypted$"})):
        status, answer = api.ask("POST", f"job_templates/{template}/launch/", {"extra_vars": answers})
        assert status == 201
        assert json.loads(api.ask("GET", f"jobs/{answer['job']}/")[1]["extra_vars"]) == variables


def test_a_required_question_does_not_take_its_default(api: Api) -> None:
    template = api.template(survey_enabled=True)
    question = {"type": "multiplechoice", "variable": "v", "required": True, "choices": ["a", "b"], "default": "a"}
    api.ask("POST", f"job_templates/{template}/survey_spec/", api.survey(question))
    refusal = api.refused("POST", f"job_templates/{template}/launch/", {})
    assert refusal["variables_needed_to_start"] == ["'v' value missing"]


def test_a_schedule_needs_a_complete_rule(api: Api) -> None:
    path = f"job_templates/{api.template()}/schedules/"
    good = "DTSTART:20260101T000000Z\nRRULE:FREQ=DAILY;INTERVAL=1"
    status, row = api.ask("POST", path, {"name": "s", "rrule": good})
    assert status == 201 and row["rrule"] == good.replace("\n", " ") and row["enabled"] is True
    for rrule, refusal in (
        ("DTSTART:20260101T000000Z RRULE:FREQ=DAILY", "INTERVAL required in rrule"),
        ("DTSTART:20260101T000000Z RRULE:FREQ=SECONDLY;INTERVAL=1", "SECONDLY is not supported"),
        ("DTSTART:20260101T000000 RRULE:FREQ=DAILY;INTERVAL=1", "DTSTART cannot be a naive datetime"),
        ("", "may not be blank"),
    ):
        assert refusal in str(api.refused("POST", path, {"name": "other", "rrule": rrule})["rrule"])


def test_labels_go_with_their_last_use(api: Api) -> None:
    template = api.template()
    path = f"job_templates/{template}/labels/"
    status, label = api.ask("POST", path, {"name": "agentlab", "organization": api.organization})
    assert status == 201 and [row["name"] for row in api.ask("GET", path)[1]["results"]] == ["agentlab"]
    assert api.ask("POST", path, {"id": label["id"], "disassociate": True}) == (204, None)
    assert api.ask("GET", f"labels/?name=agentlab&organization={api.organization}")[1]["count"] == 0


def test_what_is_deleted(api: Api) -> None:
    template = api.template()
    row = api.ask("GET", f"job_templates/{template}/")[1]
    assert api.ask("DELETE", f"job_templates/{template}/") == (204, None)
    assert api.ask("GET", f"job_templates/{template}/")[0] == 404
    assert api.ask("DELETE", f"inventories/{row['inventory']}/")[0] == 202


def test_blanks_around_names_and_texts_that_are_too_long(api: Api) -> None:
    """AWX drops blanks around a name, but searches for a name with them."""
    project = {"name": " blanks ", "organization": api.organization, "scm_type": "git",
               "scm_url": f" {api.repository} ", "scm_branch": " main "}  # fmt: skip
    row = api.ask("POST", "projects/", project)[1]
    assert (row["name"], row["scm_url"], row["scm_branch"]) == ("blanks", api.repository, "main")
    query = f"projects/?organization={api.organization}&name="
    assert api.ask("GET", f"{query}%20blanks%20")[1]["count"] == 0
    assert api.ask("GET", f"{query}blanks")[1]["count"] == 1
    for field, limit in (("name", 512), ("scm_url", 1024), ("scm_branch", 256)):
        answer = api.refused("POST", "projects/", {**project, field: "x" * (limit + 1)})
        assert answer == {field: [f"Ensure this field has no more than {limit} characters."]}
    assert api.refused("POST", "projects/", {**project, "scm_update_cache_timeout": -1}) == {
        "scm_update_cache_timeout": ["Ensure this value is greater than or equal to 0."]
    }
    assert api.ask("POST", "job_templates/", {"name": "x" * 513})[0] == 400


def test_what_goes_with_a_project(api: Api) -> None:
    """Inventory sources and schedules go; templates stay in their organization, and nodes stay without it."""
    project = api.project()
    template = api.template(project=project)
    row = api.ask("GET", f"job_templates/{template}/")[1]
    source = api.make(
        "inventory_sources", name="theirs", inventory=row["inventory"], source="scm", source_project=project
    )
    assert api.ask("GET", f"inventory_sources/?source_project={project}")[1]["count"] == 1
    for path in ("schedules", "workflow_job_template_nodes"):
        assert api.ask("GET", f"{path}/?unified_job_template={project}")[1]["count"] == 0
    for path in ("inventory_sources", "schedules", "workflow_job_template_nodes", "job_templates"):
        assert api.ask("GET", f"{path}/?credentials=999999")[1]["count"] == 0
    assert api.ask("GET", f"jobs/?project={project}&status=running")[1]["count"] == 0
    for _attempt in range(60):
        status, _answer = api.ask("DELETE", f"projects/{project}/")
        if status == 204:
            break
        # The source starts a sync of its own.
        time.sleep(1 if REAL else 0)
    assert status == 204
    assert api.ask("GET", f"inventory_sources/{source}/")[0] == 404
    row = api.ask("GET", f"job_templates/{template}/")[1]
    assert (row["project"], row["organization"]) == (None, api.organization)
    assert api.ask("GET", f"job_templates/?organization={api.organization}")[1]["count"] == 1


def test_the_variables_of_a_job_as_awx_writes_them() -> None:
    """Texts are !unsafe, but for the template's own; the numbers of AWX are numbers."""
    own = {"agentlab_hosts": "pve", "prune_max_count": 50}
    text = dump_variables({**own, "sandbox_cores": "50", "keys": "a\r\nb", "awx_job_id": 7}, own)
    assert text.splitlines()[:3] == [
        "agentlab_hosts: pve",
        "prune_max_count: 50",
        "!unsafe 'sandbox_cores': !unsafe '50'",
    ]
    assert "!unsafe 'keys': !unsafe \"a\\r\\nb\"" in text and "!unsafe 'awx_job_id': 7" in text
