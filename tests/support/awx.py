# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A small AWX API for tests: the objects that awx_setup makes, with AWX's manners where it matters (unknown fields are refused here, though)."""

from __future__ import annotations

import http.server
import json
import re
import threading
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "made-up-awx-token-0f6c21d4a9"

# Fields by endpoint: what may be set, what must be.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "organizations": ({"name", "description"}, {"name"}),
    "inventories": ({"name", "organization"}, {"name", "organization"}),
    "execution_environments": ({"name", "image"}, {"name", "image"}),
    "projects": ({"name", "description", "organization", "scm_type", "scm_url", "scm_branch", "scm_update_on_launch"}, {"name"}),
    "credential_types": ({"name", "description", "kind", "inputs", "injectors"}, {"name", "kind"}),
    "credentials": ({"name", "description", "organization", "credential_type", "inputs"}, {"name", "credential_type"}),
    "job_templates": ({"name", "description", "job_type", "inventory", "project", "playbook", "extra_vars", "execution_environment", "survey_enabled",
                       "allow_simultaneous"}, {"name"}),
    "schedules": ({"name", "description", "rrule", "enabled", "unified_job_template", "extra_data"}, {"name", "rrule", "unified_job_template"}),
}
REFERENCES = {"organization": "organizations", "inventory": "inventories", "project": "projects", "execution_environment": "execution_environments",
              "credential_type": "credential_types", "unified_job_template": "job_templates"}
QUESTION = {"type", "question_name", "variable", "required"}
TYPES = {"text", "textarea", "password", "integer", "float", "multiplechoice", "multiselect"}


class Refused(Exception):
    def __init__(self, status: int, answer: Any) -> None:
        super().__init__(status)
        self.status, self.answer = status, answer


class Awx:
    """The API on loopback. ``objects[endpoint]`` are its rows; ``writes`` every request that changed (or tried to change) something."""

    def __init__(self) -> None:
        self.objects: dict[str, list[dict[str, Any]]] = {name: [] for name in FIELDS}
        self.surveys: dict[int, dict[str, Any]] = {}
        self.attached: dict[int, list[int]] = {}
        self.writes: list[str] = []
        self._next = 1
        self.add("organizations", name="Default")
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        raise Refused(401, {"detail": "Authentication credentials were not provided. To establish a login session, visit /api/login/."})
                    status, answer = owner.handle(self.command, self.path, json.loads(body) if body else {})
                except Refused as refused:
                    status, answer = refused.status, refused.answer
                data = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = _answer

            def log_message(self, *_dummy: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, endpoint: str, **values: Any) -> int:
        row = {"id": self._next, "description": "", **values}
        self._next += 1
        self.objects[endpoint].append(row)
        return int(row["id"])

    def named(self, endpoint: str, name: str) -> dict[str, Any]:
        return next(row for row in self.objects[endpoint] if row["name"] == name)

    # ---- requests ----

    def handle(self, method: str, target: str, body: dict[str, Any]) -> tuple[int, Any]:
        parts = urlsplit(target)
        found = re.fullmatch(r"/api/v2/(\w+)/(?:(\d+)/(?:(\w+)/)?)?", parts.path)
        if not found or found[1] not in FIELDS:
            raise Refused(404, {"detail": "The requested resource could not be found."})
        endpoint, number, part = found[1], found[2], found[3]
        if method != "GET":
            self.writes.append(f"{method} {parts.path}")
        if number is None:
            if method == "POST":
                return 201, self._shown(endpoint, self._create(endpoint, body))
            wanted = dict(parse_qsl(parts.query))
            rows = [self._shown(endpoint, row) for row in self.objects[endpoint] if all(str(row.get(key)) == value for key, value in wanted.items())]
            return 200, {"count": len(rows), "results": rows}
        row = next((row for row in self.objects[endpoint] if row["id"] == int(number)), None)
        if row is None:
            raise Refused(404, {"detail": "Not found."})
        if part is None:
            if method == "PATCH":
                self._check(endpoint, body)
                row.update(body)
            return 200, self._shown(endpoint, row)
        return self._part(method, endpoint, row["id"], part, body)

    def _part(self, method: str, endpoint: str, number: int, part: str, body: dict[str, Any]) -> tuple[int, Any]:
        if endpoint == "job_templates" and part == "schedules" and method == "POST":
            return 201, self._create("schedules", {**body, "unified_job_template": number})
        if endpoint == "job_templates" and part == "survey_spec":
            if method == "POST":
                self._check_survey(body)
                self.surveys[number] = body
                return 200, None
            return 200, self.surveys.get(number, {})
        if endpoint == "job_templates" and part == "credentials":
            if method == "POST":
                if body.get("id") not in [row["id"] for row in self.objects["credentials"]]:
                    raise Refused(400, {"msg": "no such credential"})
                self.attached.setdefault(number, []).append(body["id"])
                return 204, None
            rows = [row for row in self.objects["credentials"] if row["id"] in self.attached.get(number, [])]
            return 200, {"count": len(rows), "results": [self._shown("credentials", row) for row in rows]}
        raise Refused(404, {"detail": "The requested resource could not be found."})

    def _create(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        self._check(endpoint, body)
        missing = FIELDS[endpoint][1] - set(body)
        if missing:
            raise Refused(400, {name: ["This field is required."] for name in missing})
        if any(row["name"] == body["name"] for row in self.objects[endpoint]):
            raise Refused(400, {"__all__": ["an object with this name already exists."]})
        number = self.add(endpoint, **body)
        return next(row for row in self.objects[endpoint] if row["id"] == number)

    def _check(self, endpoint: str, body: dict[str, Any]) -> None:
        unknown = set(body) - FIELDS[endpoint][0]
        if unknown:
            raise Refused(400, {name: ["no such field"] for name in unknown})
        for name, other in REFERENCES.items():
            if name in body and body[name] not in [row["id"] for row in self.objects[other]]:
                raise Refused(400, {name: [f'Invalid pk "{body[name]}" - object does not exist.']})
        if "rrule" in body and not re.fullmatch(r"DTSTART(;TZID=[\w/]+)?:\d{8}T\d{6}Z? RRULE:FREQ=\w+;INTERVAL=\d+(;.*)?", body["rrule"]):
            raise Refused(400, {"rrule": ["rrule parsing failed validation"]})
        if "extra_vars" in body and not isinstance(body["extra_vars"], str):
            raise Refused(400, {"extra_vars": ["Not a valid string."]})

    def _check_survey(self, body: dict[str, Any]) -> None:
        if set(body) != {"name", "description", "spec"} or not body["spec"]:
            raise Refused(400, {"error": "'spec' doesn't contain any items."})
        for number, question in enumerate(body["spec"]):
            if not set(question) >= QUESTION or question["type"] not in TYPES:
                raise Refused(400, {"error": f"survey question {number} is incomplete, or of no type that there is"})
            if question["type"] == "multiplechoice" and question["default"] not in question["choices"]:
                raise Refused(400, {"error": f"Default choice must be answered from the choices listed in question {number}."})
            if question["type"] in ("text", "textarea") and question["default"] and not question["min"] <= len(question["default"]) <= question["max"]:
                raise Refused(400, {"error": f"default of question {number} is too short or too long"})

    def _shown(self, endpoint: str, row: dict[str, Any]) -> dict[str, Any]:
        if endpoint != "credentials":
            return row
        kind = next((one for one in self.objects["credential_types"] if one["id"] == row["credential_type"]), {})
        secret = {field["id"] for field in kind.get("inputs", {}).get("fields", []) if field.get("secret")}
        return {**row, "inputs": {name: "$encrypted$" if name in secret else value for name, value in row.get("inputs", {}).items()}}
