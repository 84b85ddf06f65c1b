# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A double of AWX's API for tests: it answers as AWX 24.6.1 was seen to answer (tests/awx/test_contract.py).

It knows what the set-up and a launch meet: uniqueness by organization, fields that are ignored, the states of a
project's sync, the rules for credentials and surveys, and the variables that AWX hands to a job.
"""

from __future__ import annotations

import base64
import copy
import http.server
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from support.awx_tables import (
    ACTIVE,
    FIELDS,
    MODELS,
    OTHER_FILTERS,
    PLAYBOOKS,
    REFERENCES,
    REQUIRED,
    UNIQUE,
    Refused,
    build_job_variables,
    check_survey,
    dump_variables,
    list_answer_errors,
    select_kept_fields,
)

TOKEN = "made-up-awx-token-0f6c21d4a9"
# An administrator of the organization Default, who is no system administrator.
ORGANIZATION_TOKEN = "made-up-awx-token-of-an-org-admin-77"
PASSWORD = "made-up-awx-password-3d1b"


class Awx:
    """The API on loopback.

    ``objects[endpoint]`` are its rows; ``writes`` every request that changed (or tried to change) something.
    ``sync_failures`` says by URL why a project's sync fails; ``repositories`` which playbooks a repository has. A sync
    ends after ``sync_reads`` reads of the project.
    """

    def __init__(self, prefix: str = "/api/v2") -> None:
        self.prefix = prefix
        self.objects: dict[str, list[dict[str, Any]]] = {name: [] for name in FIELDS}
        self.surveys: dict[int, dict[str, Any]] = {}
        self.attached: dict[int, list[int]] = {}
        self.related: dict[tuple[str, int, str], list[int]] = {}
        self.variables: dict[int, str] = {}
        self.writes: list[str] = []
        self.sync_reads = 2
        self.sync_failures: dict[str, str] = {}
        self.repositories: dict[str, list[str]] = {}
        self.page_size = 25
        # The number of writes that are answered, until the connection breaks off: "before" AWX acts, or "after" that.
        self.cut: tuple[int, str] | None = None
        self.before_request: Callable[[str, str], None] | None = None
        self._syncing: dict[int, int] = {}
        self._next = 1
        organization = self.add("organizations", name="Default")
        for name, kind in (("Machine", "ssh"), ("Ansible Galaxy/Automation Hub API Token", "galaxy")):
            self.add("credential_types", name=name, kind=kind)
        galaxy = self.add(
            "credentials", name="Ansible Galaxy", organization=organization,
            credential_type=self.find_named("credential_types", "Ansible Galaxy/Automation Hub API Token")["id"],
        )  # fmt: skip
        self.related["organizations", organization, "galaxy_credentials"] = [galaxy]
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                last = self.command != "GET" and owner.cut is not None and len(owner.writes) >= owner.cut[0]
                if last and owner.cut and owner.cut[1] == "before":
                    return self._break_off()
                try:
                    user = owner.find_user(self.headers.get("Authorization") or "")
                    status, answer = owner.handle(self.command, self.path, json.loads(body) if body else {}, user)
                except Refused as refused:
                    status, answer = refused.status, refused.answer
                if last:
                    return self._break_off()
                text = isinstance(answer, str)
                data = b"" if answer is None else answer.encode() if text else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if text else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _break_off(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_POST = do_PATCH = do_DELETE = _answer

            def log_message(self, *_dummy: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, endpoint: str, **values: Any) -> int:
        """Put an object there, without any check."""
        defaults = json.loads(json.dumps(FIELDS[endpoint]))
        row = {"id": self._next, **defaults, **values}
        self._next += 1
        self.objects[endpoint].append(row)
        return int(row["id"])

    def find_named(self, endpoint: str, name: str, **more: Any) -> dict[str, Any]:
        """Return the object of that name (and those further fields). Raises StopIteration if there is none."""
        return next(
            row
            for row in self.objects[endpoint]
            if row["name"] == name and all(row[key] == value for key, value in more.items())
        )

    def find_row(self, endpoint: str, number: Any) -> dict[str, Any]:
        """Return the object with that id. Raises StopIteration if there is none."""
        return next(row for row in self.objects[endpoint] if row["id"] == number)

    def add_inventory(
        self, name: str, organization: int, group: str = "pve", hosts: tuple[str, ...] = ("pve1",)
    ) -> int:
        """Add an inventory with one group and its hosts."""
        number = self.add("inventories", name=name, organization=organization)
        group_id = self.add("groups", name=group, inventory=number)
        self.related["groups", group_id, "all_hosts"] = [
            self.add("hosts", name=host, inventory=number) for host in hosts
        ]
        return number

    def find_user(self, header: str) -> str:
        """Return the user whom an Authorization header names; raises Refused with status 401."""
        basic = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        users = {f"Bearer {TOKEN}": "admin", basic: "admin", f"Bearer {ORGANIZATION_TOKEN}": "org-admin"}
        if header not in users:
            detail = "Authentication credentials were not provided. To establish a login session, visit /api/login/."
            raise Refused(401, {"detail": detail})
        return users[header]

    # ---- requests ----

    def handle(self, method: str, target: str, body: dict[str, Any], user: str) -> tuple[int, Any]:
        """Answer one request: return status and body. Raises Refused for what AWX refuses."""
        parts = urlsplit(target)
        match = re.fullmatch(rf"{re.escape(self.prefix)}/(\w+)/(?:(\d+)/(?:(\w+)/)?)?", parts.path)
        if method != "GET":
            self.writes.append(f"{method} {parts.path}")
        if self.before_request:
            self.before_request(method, parts.path)
        query = dict(parse_qsl(parts.query))
        if match and match[1] == "me":
            return 200, self._build_page([{"id": 1, "username": user, "is_superuser": user == "admin"}], parts, {})
        if not match or match[1] not in FIELDS:
            raise Refused(404, "<!doctype html><html><body><h1>Not Found</h1></body></html>")
        endpoint, number, part = match[1], match[2], match[3]
        if method != "GET" and endpoint == "credential_types" and user != "admin":
            raise Refused(403, {"detail": "You do not have permission to perform this action."})
        if number is None:
            if method == "POST":
                return 201, self._format_row(endpoint, self._create(endpoint, body))
            return 200, self._build_page(self._filter_rows(endpoint, query), parts, query)
        row = next((row for row in self.objects[endpoint] if row["id"] == int(number)), None)
        if row is None:
            raise Refused(404, {"detail": f"No {MODELS[endpoint]} matches the given query."})
        if part is not None:
            return self._answer_part(method, endpoint, row, part, body, parts, query)
        if method == "PATCH":
            self._change(endpoint, row, body)
        elif method == "DELETE":
            self._delete(endpoint, row)
            return (202 if endpoint == "inventories" else 204), None
        elif endpoint == "projects":
            self._advance_sync(row)
        return 200, self._format_row(endpoint, row)

    def _build_page(self, rows: list[dict[str, Any]], parts: Any, query: dict[str, str]) -> dict[str, Any]:
        page = int(query.get("page", "1"))
        size = int(query.get("page_size", self.page_size))
        following = None
        if page * size < len(rows):
            rest = "".join(f"&{key}={value}" for key, value in query.items() if key != "page")
            following = f"{parts.path}?page={page + 1}{rest}"
        return {
            "count": len(rows),
            "next": following,
            "previous": None,
            "results": rows[(page - 1) * size : page * size],
        }

    def _filter_rows(self, endpoint: str, query: dict[str, str], rows: list[dict[str, Any]] | None = None) -> list[Any]:
        result = []
        filters = {key: value for key, value in query.items() if key not in ("page", "page_size")}
        for key in filters:
            name = key.partition("__")[0]
            if name not in {*FIELDS[endpoint], "id"} and (endpoint, name) not in OTHER_FILTERS:
                raise Refused(400, {"detail": f"{MODELS[endpoint]} has no field named '{name}'"})
        for row in self.objects[endpoint] if rows is None else rows:
            for key, value in filters.items():
                if key == "credentials":
                    if int(value) not in self.attached.get(row["id"], []):
                        break
                    continue
                name, _separator, inner = key.partition("__")
                actual: Any = self._find_organization(row) if name == "organization" else row.get(name)
                if inner:
                    actual = self.find_row(REFERENCES[name], actual)[inner] if actual else None
                if str(actual) != value:
                    break
            else:
                result.append(self._format_row(endpoint, row))
        return result

    def _find_organization(self, row: dict[str, Any]) -> Any:
        """Return the organization; a template follows its project, and keeps it when the project is deleted."""
        if "playbook" in row and row["project"]:
            return self.find_row("projects", row["project"])["organization"]
        return row.get("organization")

    def _answer_part(
        self,
        method: str,
        endpoint: str,
        row: dict[str, Any],
        part: str,
        body: dict[str, Any],
        parts: Any,
        query: dict[str, str],
    ) -> tuple[int, Any]:
        number = row["id"]
        if (endpoint, part) == ("projects", "playbooks"):
            return 200, self._list_playbooks(row)
        if (endpoint, part) == ("projects", "update") and method == "POST":
            self._start_sync(row)
            return 202, {"project_update": self._read_update_id(row)}
        if (endpoint, part) == ("project_updates", "stdout"):
            # The output is stored a while after the status is set.
            row["output_reads"] = row.get("output_reads", 0) + 1
            return 200, row["output"] if row["output_reads"] > 1 else ""
        if (endpoint, part) == ("inventories", "groups"):
            rows = [group for group in self.objects["groups"] if group["inventory"] == number]
            return 200, self._build_page(self._filter_rows("groups", query, rows), parts, query)
        if (endpoint, part) == ("inventories", "hosts"):
            rows = [host for host in self.objects["hosts"] if host["inventory"] == number]
            return 200, self._build_page(self._filter_rows("hosts", query, rows), parts, query)
        if (endpoint, part) == ("job_templates", "schedules"):
            if method == "POST":
                return 201, self._create("schedules", {**body, "unified_job_template": number})
            rows = [item for item in self.objects["schedules"] if item["unified_job_template"] == number]
            return 200, self._build_page(self._filter_rows("schedules", query, rows), parts, query)
        if (endpoint, part) == ("job_templates", "survey_spec"):
            if method == "POST":
                check_survey(body)
                self.surveys[number] = body
                return 200, None
            return 200, self._format_survey(number)
        if (endpoint, part) == ("job_templates", "credentials"):
            if method == "POST":
                return self._attach(number, body)
            rows = [item for item in self.objects["credentials"] if item["id"] in self.attached.get(number, [])]
            return 200, self._build_page(self._filter_rows("credentials", query, rows), parts, query)
        if (endpoint, part) == ("job_templates", "launch") and method == "POST":
            return 201, self.launch(row, body.get("extra_vars") or {})
        lists = {"labels": "labels", "notification_templates_error": "notification_templates",
                 "galaxy_credentials": "credentials", "all_hosts": "hosts"}  # fmt: skip
        if part in lists:
            other = lists[part]
            ids = self.related.setdefault((endpoint, number, part), [])
            if method == "POST":
                return self._relate(other, ids, body)
            return 200, self._build_page(
                self._filter_rows(other, query, [self.find_row(other, item) for item in ids]), parts, query
            )
        raise Refused(404, "<!doctype html><html><body><h1>Not Found</h1></body></html>")

    def _relate(self, endpoint: str, ids: list[int], body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("disassociate"):
            ids.remove(body["id"])
            # AWX deletes a label with its last use.
            if endpoint == "labels" and not any(
                body["id"] in other for key, other in self.related.items() if key[2] == "labels"
            ):
                self.objects["labels"].remove(self.find_row("labels", body["id"]))
            return 204, None
        if "id" in body:
            ids.append(body["id"])
            return 204, None
        present = [row for row in self.objects[endpoint] if all(row[key] == body.get(key) for key in UNIQUE[endpoint])]
        row = present[0] if present else self._create(endpoint, body)
        ids.append(row["id"])
        return (204, None) if present else (201, row)

    def _attach(self, number: int, body: dict[str, Any]) -> tuple[int, Any]:
        ids = self.attached.setdefault(number, [])
        if not isinstance(body.get("id"), int):
            raise Refused(400, {"msg": '"id" field must be an integer.'})
        credential = next((row for row in self.objects["credentials"] if row["id"] == body["id"]), None)
        if body.get("disassociate"):
            if body["id"] in ids:
                ids.remove(body["id"])
            return 204, None
        if credential is None:
            raise Refused(400, {"detail": "Credential matching query does not exist."})
        kinds = [self.find_row("credentials", other)["credential_type"] for other in ids]
        if credential["credential_type"] in kinds:
            name = self.find_row("credential_types", credential["credential_type"])["name"]
            raise Refused(400, {"error": f"Cannot assign multiple {name} credentials."})
        ids.append(body["id"])
        return 204, None

    # ---- objects ----

    def _create(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in REQUIRED.get(endpoint, []) if name not in body]
        if missing:
            raise Refused(400, {name: ["This field is required."] for name in missing})
        body = select_kept_fields(endpoint, body)
        row = {**json.loads(json.dumps(FIELDS[endpoint])), **body}
        self._check(endpoint, row, body)
        self._check_unique(endpoint, row, None)
        number = self.add(endpoint, **row)
        row = self.find_row(endpoint, number)
        if endpoint == "projects" and row["scm_type"]:
            self._start_sync(row)
        elif endpoint == "projects":
            row["status"] = "ok"
        return row

    def _check_unique(self, endpoint: str, row: dict[str, Any], own: int | None) -> None:
        keys = UNIQUE.get(endpoint, [])

        def key_of(candidate: dict[str, Any]) -> list[Any]:
            return [self._find_organization(candidate) if key == "organization" else candidate[key] for key in keys]

        if keys and any(other["id"] != own and key_of(other) == key_of(row) for other in self.objects[endpoint]):
            model = MODELS[endpoint]
            words = {
                "credential_types": "Credential type with this Name and Kind already exists.",
                "credentials": "Credential with this Organization, Name and Credential type already exists.",
                "schedules": "Schedule with this Unified job template and Name already exists.",
            }
            if endpoint in words:
                raise Refused(400, {"__all__": [words[endpoint]]})
            if len(keys) == 1:
                raise Refused(400, {keys[0]: [f"{model} with this {keys[0]} already exists."]})
            raise Refused(400, {"__all__": [f"{model} with this ({', '.join(keys)}) combination already exists."]})

    def _change(self, endpoint: str, row: dict[str, Any], body: dict[str, Any]) -> None:
        body = select_kept_fields(endpoint, body)
        of_type = [item for item in self.objects["credentials"] if item["credential_type"] == row["id"]]
        if endpoint == "credential_types" and body.get("inputs", row["inputs"]) != row["inputs"] and of_type:
            detail = "Modifications to inputs are not allowed for credential types that are in use"
            raise Refused(403, {"detail": detail})
        moved = endpoint == "projects" and body.get("organization", row["organization"]) != row["organization"]
        if moved and any(item["project"] == row["id"] for item in self.objects["job_templates"]):
            raise Refused(400, {"organization": ["Organization cannot be changed when in use by job templates."]})
        if endpoint == "credentials" and "inputs" in body:
            # "$encrypted$" keeps the secret; what is not sent is gone.
            body["inputs"] = {
                key: row["inputs"].get(key) if value == "$encrypted$" else value
                for key, value in body["inputs"].items()
            }
        changed = {**row, **body}
        self._check(endpoint, changed, body)
        self._check_unique(endpoint, changed, row["id"])
        row.update(body)
        if endpoint == "credentials":
            row["inputs"] = self._drop_empty_secrets(row)
        if (
            endpoint == "projects"
            and row["scm_type"]
            and set(body) & {"description", "scm_url", "scm_branch", "scm_type"}
        ):
            self._start_sync(row)

    def _delete(self, endpoint: str, row: dict[str, Any]) -> None:
        number = row["id"]
        jobs = [
            {"id": job["id"], "type": "job"}
            for job in self.objects["jobs"]
            if endpoint in ("job_templates", "projects")
            and number in (job["unified_job_template"], job["project"])
            and job["status"] in ACTIVE
        ]
        if endpoint == "projects" and number in self._syncing:
            jobs = [{"id": number, "type": "project_update"}]
        if jobs:
            raise Refused(409, {"error": "Resource is being used by running jobs.", "active_jobs": jobs})
        unprocessed = [
            job
            for job in self.objects["jobs"]
            if number in (job["unified_job_template"], job["project"]) and job.get("unprocessed")
        ]
        if unprocessed and endpoint in ("job_templates", "projects"):
            sentence = f"Related job {unprocessed[0]['id']} is still processing events."
            raise Refused(403, {"detail": sentence})
        if endpoint == "credential_types" and any(
            item["credential_type"] == number for item in self.objects["credentials"]
        ):
            raise Refused(403, {"detail": "Credential types that are in use cannot be deleted"})
        self.objects[endpoint].remove(row)
        if endpoint == "job_templates":
            self.objects["schedules"] = [
                item for item in self.objects["schedules"] if item["unified_job_template"] != number
            ]
            self.related.pop(("job_templates", number, "labels"), None)
        if endpoint == "projects":
            for template in self.objects["job_templates"]:
                if template["project"] == number:
                    template |= {"project": None, "organization": row["organization"]}
            for kind, key in (("inventory_sources", "source_project"), ("schedules", "unified_job_template")):
                self.objects[kind] = [other for other in self.objects[kind] if other[key] != number]
        if endpoint == "credentials":
            for ids in self.attached.values():
                if number in ids:
                    ids.remove(number)

    def _check(self, endpoint: str, row: dict[str, Any], body: dict[str, Any]) -> None:
        for name, other in REFERENCES.items():
            if body.get(name) is not None and body[name] not in [item["id"] for item in self.objects[other]]:
                raise Refused(400, {name: [f'Invalid pk "{body[name]}" - object does not exist.']})
        check = getattr(self, f"_check_{endpoint}", None)
        if check:
            check(row, body)

    def _check_projects(self, row: dict[str, Any], _body: dict[str, Any]) -> None:
        if row["scm_type"] and not row["scm_url"]:
            raise Refused(400, {"scm_url": ["SCM URL is required."]})
        if row["scm_type"] == "git" and not re.match(r"(https?|git|ssh|file)://|[\w.-]+@[\w.-]+:", row["scm_url"]):
            raise Refused(400, {"scm_url": [f"Unsupported git URL: {row['scm_url']}"]})

    def _check_credential_types(self, row: dict[str, Any], body: dict[str, Any]) -> None:
        if "kind" in body and row["kind"] not in ("cloud", "net"):
            raise Refused(400, {"kind": [f"Must be 'cloud' or 'net', not {row['kind']}"]})
        fields = {field["id"] for field in row["inputs"].get("fields", [])}
        for key, text in row["injectors"].get("env", {}).items():
            for name in re.findall(r"{{\s*(\w+)", text):
                if name not in fields:
                    raise Refused(400, {"injectors": [f"env.{key} uses an undefined field ({name})"]})

    def _check_credentials(self, row: dict[str, Any], body: dict[str, Any]) -> None:
        if not row["organization"]:
            raise Refused(400, {"non_field_errors": ["Missing 'user', 'team', or 'organization'."]})
        fields = {
            field["id"]
            for field in self.find_row("credential_types", row["credential_type"])["inputs"].get("fields", [])
        }
        unknown = sorted(set(body.get("inputs") or {}) - fields)
        if unknown and self.find_row("credential_types", row["credential_type"])["kind"] == "cloud":
            sentence = f"Additional properties are not allowed ({', '.join(map(repr, unknown))} were unexpected)"
            raise Refused(400, {"inputs": [sentence]})
        row["inputs"] = self._drop_empty_secrets(row)

    def _drop_empty_secrets(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs without empty secrets, which AWX drops."""
        secret = self._list_secrets(row)
        return {key: value for key, value in (row["inputs"] or {}).items() if value or key not in secret}

    def _check_job_templates(self, row: dict[str, Any], body: dict[str, Any]) -> None:
        if row["project"] is None:
            raise Refused(400, {"project": ["This field is required."]})
        if not row["playbook"]:
            raise Refused(400, {"playbook": ["Must select playbook for project."]})
        if row["inventory"] is None and not row["ask_inventory_on_launch"]:
            raise Refused(400, {"inventory": ["You must either set a default value or ask to prompt on launch."]})
        project = self.find_row("projects", row["project"])
        if {"playbook", "project"} & set(body) and row["playbook"] not in self._list_playbooks(project):
            raise Refused(400, {"playbook": ["Playbook not found for project."]})
        if not isinstance(row["extra_vars"], str):
            raise Refused(400, {"extra_vars": ["Not a valid string."]})

    def _check_schedules(self, row: dict[str, Any], body: dict[str, Any]) -> None:
        if "rrule" not in body:
            return
        row["rrule"] = body["rrule"] = " ".join(str(row["rrule"]).split())
        if not row["rrule"]:
            raise Refused(400, {"rrule": ["This field may not be blank."]})
        if re.match(r"DTSTART:\d{8}T\d{6}(?!Z)", row["rrule"]):
            sentence = "DTSTART cannot be a naive datetime.  Require ;TZINFO= or YYYYMMDDTHHMMSSZZ."
            raise Refused(400, {"rrule": [sentence]})
        if "FREQ=SECONDLY" in row["rrule"]:
            raise Refused(400, {"rrule": ["SECONDLY is not supported."]})
        if "INTERVAL=" not in row["rrule"]:
            raise Refused(400, {"rrule": ["INTERVAL required in rrule."]})
        if not re.fullmatch(r"DTSTART(;TZID=[\w/]+)?:\d{8}T\d{6}Z? RRULE:FREQ=\w+;INTERVAL=\d+(;.*)?", row["rrule"]):
            raise Refused(400, {"rrule": ["rrule parsing failed validation"]})

    def _format_survey(self, number: int) -> dict[str, Any]:
        """Return a survey without the defaults of its passwords. AWX encrypts a default unless it is empty."""
        survey = copy.deepcopy(self.surveys.get(number, {}))
        for question in survey.get("spec", []):
            if question["type"] == "password" and question.get("default"):
                question["default"] = "$encrypted$"
        return survey

    # ---- syncs and launches ----

    def _list_playbooks(self, project: dict[str, Any]) -> list[str]:
        """Return the playbooks. A project that has been synced once keeps them while it is synced again."""
        if project["status"] in ("successful", "ok") or project.get("synced"):
            return self.repositories.get(project["scm_url"], PLAYBOOKS)
        return []

    def _start_sync(self, row: dict[str, Any]) -> None:
        row["status"] = "pending"
        reason = self.sync_failures.get(row["scm_url"], "")
        update = self.add(
            "project_updates", name=row["name"], status="failed" if reason else "successful",
            output=f"\x1b[0;31mfatal: [localhost]: FAILED! => {reason}\x1b[0m" if reason else "ok",
        )  # fmt: skip
        row["update"] = update
        self._syncing[row["id"]] = self.sync_reads

    def _read_update_id(self, row: dict[str, Any]) -> int:
        return int(row["update"])

    def _advance_sync(self, row: dict[str, Any]) -> None:
        if row["id"] not in self._syncing:
            return
        self._syncing[row["id"]] -= 1
        if self._syncing[row["id"]] > 0:
            row["status"] = "running"
            return
        del self._syncing[row["id"]]
        row["status"] = self.find_row("project_updates", row["update"])["status"]
        row["synced"] = row.get("synced") or row["status"] == "successful"

    def launch(self, template: dict[str, Any], answers: dict[str, Any], user: str = "admin") -> dict[str, Any]:
        """Launch as the API does; ``variables[job]`` is the file of variables that AWX hands to ansible-runner."""
        of_template = json.loads(template["extra_vars"] or "{}")
        spec = self.surveys.get(template["id"], {}).get("spec", []) if template["survey_enabled"] else []
        errors = [error for question in spec for error in list_answer_errors(question, answers)]
        if errors:
            raise Refused(400, {"variables_needed_to_start": errors})
        named = {question["variable"] for question in spec}
        variables = dict(of_template)
        for question in spec:
            # A default that its own limits refuse is left out: a required question with the default "".
            default = question.get("default")
            if default is not None and not list_answer_errors(question, {question["variable"]: default}):
                variables[question["variable"]] = default
        variables.update({key: value for key, value in answers.items() if key in named})
        ignored = {key: value for key, value in answers.items() if key not in named and of_template.get(key) != value}
        job = self.add("jobs", name=template["name"], unified_job_template=template["id"], project=template["project"])
        secret = {question["variable"] for question in spec if question["type"] == "password"}
        self.find_row("jobs", job)["extra_vars"] = json.dumps(
            {key: "$encrypted$" if key in secret else value for key, value in variables.items()}
        )
        self.variables[job] = dump_variables({**variables, **build_job_variables(job, template, user)}, of_template)
        return {"job": job, "ignored_fields": {"extra_vars": ignored} if ignored else {}, "id": job, "type": "job"}

    # ---- what is shown ----

    def _list_secrets(self, row: dict[str, Any]) -> set[str]:
        kind = next((item for item in self.objects["credential_types"] if item["id"] == row["credential_type"]), {})
        return {field["id"] for field in kind.get("inputs", {}).get("fields", []) if field.get("secret")}

    def _format_row(self, endpoint: str, row: dict[str, Any]) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        shown = {key: value for key, value in row.items() if key not in ("synced", "update", "output")}
        if endpoint == "job_templates":
            shown["organization"] = self._find_organization(row)
            if row["project"]:
                summary["project"] = {"id": row["project"], "name": self.find_row("projects", row["project"])["name"]}
        organization = shown.get("organization")
        if organization:
            summary["organization"] = {"id": organization, "name": self.find_row("organizations", organization)["name"]}
        if endpoint == "credentials":
            secret = self._list_secrets(row)
            inputs = row["inputs"] or {}
            shown["inputs"] = {key: "$encrypted$" if key in secret else value for key, value in inputs.items()}
            kind = self.find_row("credential_types", row["credential_type"])
            summary["credential_type"] = {"id": kind["id"], "name": kind["name"]}
        if endpoint == "projects" and row.get("update"):
            key = "current_update" if row["id"] in self._syncing else "last_update"
            summary[key] = {"id": row["update"], "status": row["status"]}
        return {**shown, "summary_fields": summary}
