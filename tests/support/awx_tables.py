# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the double of AWX knows of each kind of object: its fields, what is required and unique, and who refers to it.

The values are those of AWX 24.6.1.
"""

from __future__ import annotations

from typing import Any

import yaml

# Endpoint -> the fields that AWX keeps (others are ignored), with their defaults; REQUIRED names those without which
# AWX refuses to create one.
FIELDS: dict[str, dict[str, Any]] = {
    "organizations": {"name": "", "description": ""},
    "inventories": {"name": "", "description": "", "organization": None, "kind": "", "has_inventory_sources": False},
    "groups": {"name": "", "description": "", "inventory": None},
    "hosts": {"name": "", "description": "", "inventory": None, "variables": ""},
    "execution_environments": {"name": "", "description": "", "image": "", "organization": None},
    "labels": {"name": "", "organization": None},
    "notification_templates": {"name": "", "description": "", "organization": None, "notification_type": "email"},
    "projects": {
        "name": "",
        "description": "",
        "organization": None,
        "scm_type": "",
        "scm_url": "",
        "scm_branch": "",
        "scm_update_on_launch": False,
        "scm_update_cache_timeout": 0,
        "allow_override": False,
        "status": "never updated",
    },
    "credential_types": {"name": "", "description": "", "kind": "", "inputs": {}, "injectors": {}},
    "credentials": {"name": "", "description": "", "organization": None, "credential_type": None, "inputs": {}},
    "job_templates": {
        "name": "",
        "description": "",
        "job_type": "run",
        "inventory": None,
        "project": None,
        "playbook": "",
        "extra_vars": "",
        "execution_environment": None,
        "survey_enabled": False,
        "allow_simultaneous": False,
        "forks": 0,
        "verbosity": 0,
        "limit": "",
        "ask_variables_on_launch": False,
        "ask_inventory_on_launch": False,
    },
    "schedules": {
        "name": "",
        "description": "",
        "rrule": "",
        "enabled": True,
        "unified_job_template": None,
        "extra_data": {},
    },
    "jobs": {
        "name": "",
        "unified_job_template": None,
        "project": None,
        "status": "pending",
        "extra_vars": "",
        "created_by": None,
    },
    # AWX says that all events are stored when it has counted none yet, so that is no proof of an empty output.
    "project_updates": {
        "name": "",
        "status": "",
        "job_explanation": "",
        "result_traceback": "",
        "output": "",
        "event_processing_finished": True,
    },
    "workflow_job_template_nodes": {"unified_job_template": None},
    "inventory_sources": {"name": "", "description": "", "inventory": None, "source": "", "source_project": None},
}
READ_ONLY = {"status", "has_inventory_sources"}
REQUIRED = {
    "organizations": ["name"],
    "inventories": ["name", "organization"],
    "groups": ["name", "inventory"],
    "hosts": ["name", "inventory"],
    "execution_environments": ["name", "image"],
    "labels": ["name", "organization"],
    "notification_templates": ["name", "organization"],
    "projects": ["name"],
    "credential_types": ["name", "kind"],
    "credentials": ["name", "credential_type"],
    "job_templates": ["name"],
    "schedules": ["rrule", "name", "unified_job_template"],
}
UNIQUE = {
    "organizations": ["name"],
    "inventories": ["organization", "name"],
    "groups": ["name", "inventory"],
    "hosts": ["name", "inventory"],
    "execution_environments": ["name"],
    "labels": ["name", "organization"],
    "notification_templates": ["organization", "name"],
    "projects": ["name", "organization"],
    "credential_types": ["name", "kind"],
    "credentials": ["organization", "name", "credential_type"],
    "job_templates": ["organization", "name"],
    "schedules": ["unified_job_template", "name"],
}
MODELS = {
    "organizations": "Organization",
    "inventories": "Inventory",
    "groups": "Group",
    "hosts": "Host",
    "execution_environments": "ExecutionEnvironment",
    "labels": "Label",
    "notification_templates": "NotificationTemplate",
    "projects": "Project",
    "credential_types": "CredentialType",
    "credentials": "Credential",
    "job_templates": "JobTemplate",
    "schedules": "Schedule",
    "jobs": "Job",
    "project_updates": "ProjectUpdate",
    "workflow_job_template_nodes": "WorkflowJobTemplateNode",
    "inventory_sources": "InventorySource",
}
REFERENCES = {
    "organization": "organizations",
    "inventory": "inventories",
    "project": "projects",
    "execution_environment": "execution_environments",
    "credential_type": "credential_types",
    "unified_job_template": "job_templates",
    "source_project": "projects",
}
SURVEY_TYPES: dict[str, Any] = {
    "text": str,
    "textarea": str,
    "password": str,
    "multiplechoice": str,
    "multiselect": (str, list),
    "integer": int,
    "float": (int, float),
}
WITH_CREDENTIALS = ("job_templates", "inventory_sources", "schedules", "workflow_job_template_nodes")
OTHER_FILTERS = {("job_templates", "organization"), *((endpoint, "credentials") for endpoint in WITH_CREDENTIALS)}
LIMITS = {"name": 512, "scm_url": 1024, "scm_branch": 256}
ACTIVE = ("pending", "waiting", "running")
PLAYBOOKS = [
    "doctor.yml",
    "job.yml",
    "lease_renew.yml",
    "prune.yml",
    "reconcile.yml",
    "sandbox_create.yml",
    "sandbox_destroy.yml",
]


class Refused(Exception):
    """AWX refuses a request: the HTTP status, and the body of the answer."""

    def __init__(self, status: int, answer: Any) -> None:
        super().__init__(status)
        self.status, self.answer = status, answer


class _SafeStringDumper(yaml.SafeDumper):
    def represent_data(self, data: Any) -> Any:
        """Represent a text as `!unsafe`, and all else as usual."""
        return self.represent_scalar("!unsafe", data) if isinstance(data, str) else super().represent_data(data)


def dump_variables(variables: dict[str, Any], of_template: dict[str, Any]) -> str:
    """Return the file of extra variables as AWX writes it: a text is !unsafe unless it is the template's own."""
    return "".join(
        yaml.dump_all(
            [{key: value}],
            Dumper=yaml.SafeDumper if key in of_template and of_template[key] == value else _SafeStringDumper,
            default_flow_style=False,
        )
        for key, value in variables.items()
    )


def build_job_variables(job: int, template: dict[str, Any], user: str) -> dict[str, Any]:
    """Return the variables that AWX adds to those of a job: who launched it, from which template."""
    variables: dict[str, Any] = {}
    for prefix in ("awx", "tower"):
        variables |= {
            f"{prefix}_job_id": job,
            f"{prefix}_job_launch_type": "manual",
            f"{prefix}_user_id": 1,
            f"{prefix}_user_name": user,
            f"{prefix}_user_email": "",
            f"{prefix}_inventory_id": template["inventory"],
            f"{prefix}_job_template_name": template["name"],
        }
    return variables


def select_kept_fields(endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that AWX keeps, without blanks around short texts. Refuse what is too long."""
    fields = {
        key: value.strip() if isinstance(value, str) and key in (*LIMITS, "description") else value
        for key, value in body.items()
        if key in FIELDS[endpoint] and key not in READ_ONLY
    }
    for key, limit in LIMITS.items():
        if len(fields.get(key) or "") > limit:
            raise Refused(400, {key: [f"Ensure this field has no more than {limit} characters."]})
    timeout = fields.get("scm_update_cache_timeout", 0)
    if timeout < 0:
        raise Refused(400, {"scm_update_cache_timeout": ["Ensure this value is greater than or equal to 0."]})
    return fields


def list_answer_errors(question: dict[str, Any], answers: dict[str, Any]) -> list[str]:
    """Return what AWX refuses of the answer to one question of a survey, in its words."""
    name, kind = question["variable"], question["type"]
    if name not in answers:
        return [f"'{name}' value missing"] if question["required"] else []
    value, low, high = answers[name], question.get("min"), question.get("max")
    if kind in ("text", "textarea", "password"):
        if not isinstance(value, str):
            return [f"Value {value} for '{name}' expected to be a string."]
        sentences = []
        if low is not None and len(value) < low:
            sentences.append(f"'{name}' value {value} is too small (length is {len(value)} must be at least {low}).")
        if high is not None and len(value) > high:
            sentences.append(f"'{name}' value {value} is too large (must be no more than {high}).")
        return sentences
    if kind == "integer":
        return (
            []
            if isinstance(value, int) and not isinstance(value, bool)
            else [f"Value {value} for '{name}' expected to be an integer."]
        )
    choices = question.get("choices") or []
    values = value if isinstance(value, list) else [value]
    return [
        f"Value {choice} for '{name}' expected to be one of {choices}." for choice in values if choice not in choices
    ]


def check_survey(body: dict[str, Any]) -> None:
    """Refuse the body of a survey as AWX refuses it: Refused with status 400 and AWX's sentence."""
    for name in ("name", "description", "spec"):
        if name not in body:
            raise Refused(400, {"error": f"Field '{name}' is missing from survey spec."})
    if not body["spec"]:
        raise Refused(400, {"error": "'spec' doesn't contain any items."})
    seen: set[str] = set()
    for number, question in enumerate(body["spec"]):
        for name in ("type", "question_name", "variable", "required"):
            if name not in question:
                raise Refused(400, {"error": f"'{name}' missing from survey question {number}"})
        if question["variable"] in seen:
            sentence = f"'variable' '{question['variable']}' duplicated in survey question {number}."
            raise Refused(400, {"error": sentence})
        seen.add(question["variable"])
        kind, default = question["type"], question.get("default", "")
        if kind not in SURVEY_TYPES:
            raise Refused(400, {"error": f"'{kind}' in survey question {number} is not one of the question types."})
        if default != "" and not isinstance(default, SURVEY_TYPES[kind]):
            label = kind if kind in ("integer", "float") else "string"
            sentence = f"Default value {default} in survey question {number} expected to be {label}."
            raise Refused(400, {"error": sentence})
        if kind in ("multiplechoice", "multiselect"):
            defaults = default.splitlines() if isinstance(default, str) else default
            if any(item not in question["choices"] for item in defaults):
                raise Refused(400, {"error": "Default choice must be answered from the choices listed."})
