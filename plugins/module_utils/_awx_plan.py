# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plan the set-up of AWX: compare what is wanted with what is there. The plan serves check mode and the run alike.

Planning only reads. Each step of a plan is one request that changes something. Every object is looked up by its name
**and** its organization (a schedule by its template, a credential also by its type), so nothing of another
organization is ever found. An object that this set-up did not make is changed only when the user says so (adopt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import Refused

# Stands in the description of every object that the set-up makes. An object without it belongs to somebody else.
MARK = "Made by agentlab.proxmox.awx_setup"
LABEL = "agentlab.proxmox"
PROJECT_TEXT = "Playbooks of agentlab.proxmox"
CREDENTIAL_TEXT = "Token of Proxmox VE for agentlab.proxmox"
ENCRYPTED = "$encrypted$"
ACTIVE = ("new", "pending", "waiting", "running")
POLL_SECONDS = 1.0
OUTPUT_READS = 15
# Longer texts are refused by AWX, some of them only after other objects have been made.
NAME_LIMIT = 512
URL_LIMIT = 1024
BRANCH_LIMIT = 256
NUMBER_LIMIT = 2**31 - 1

KINDS = {
    "projects": "project",
    "credential_types": "credential type",
    "credentials": "credential",
    "job_templates": "job template",
    "schedules": "schedule",
    "inventories": "inventory",
    "execution_environments": "execution environment",
    "notification_templates": "notification template",
    "organizations": "organization",
    "inventory_sources": "inventory source",
    "workflow_job_template_nodes": "node of a workflow",
}


class Later:
    """Stands for the id of an object that a step of the plan creates."""

    def __init__(self) -> None:
        self.id: int | None = None


Id = Union[int, Later]  # noqa: UP007 - ansible-test reads this as older Python


def resolve_id(value: Any) -> Any:
    """Return the id behind ``value`` when it is a Later whose object exists by now, else ``value`` itself."""
    return value.id if isinstance(value, Later) and value.id is not None else value


@dataclass
class Step:
    """One change. ``fields`` names what differs; ``before`` and ``after`` are for the diff, without secrets."""

    action: str
    kind: str
    name: str
    run: Callable[[], None]
    fields: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    # A step that only waits changes nothing.
    changes: bool = True

    def describe(self, check: bool = False) -> str:
        """Return the step as a line for the user."""
        verb = f"would be {self.action}" if check else self.action
        fields = f" ({', '.join(self.fields)})" if self.fields else ""
        return f"{self.kind} {self.name}: {verb}{fields}"


@dataclass
class Plan:
    """Steps in the order of their execution, and what speaks against them.

    ``problems`` stop the set-up in check mode as well. ``foreign`` names the objects that the set-up did not make but
    would change: they stop the run, and check mode shows them.
    """

    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class DesiredObjects:
    """What the user asks for; names as the variables of the playbook."""

    organization: str
    project: str
    project_scm_url: str
    project_scm_branch: str
    project_update_on_launch: bool
    project_cache_timeout: int
    project_timeout: int
    inventory: str
    hosts: str
    allow_many_hosts: bool
    execution_environment: str
    machine_credential: str
    notification: str
    galaxy_check: bool
    prefix: str
    adopt: bool
    update_secrets: bool
    credential_type: dict[str, Any]
    credential_inputs: dict[str, Any]
    templates: list[dict[str, Any]]

    def add_prefix(self, name: str) -> str:
        """Return the name of an object with the prefix. AWX drops blanks around a name, but not in a search for it."""
        return f"{self.prefix}{name}".strip()

    @property
    def credential_name(self) -> str:
        return self.add_prefix("Proxmox VE API")

    def name_template(self, template: dict[str, Any]) -> str:
        return self.add_prefix(template["name"])

    @property
    def playbooks(self) -> list[str]:
        return sorted({template["playbook"] for template in self.templates})


def make_description(text: str) -> str:
    """Return the description of an object: what it is, who made it and how to change it."""
    return f"{text}. {MARK}: run that playbook again to change it; what is changed here is changed back."


def has_our_mark(row: dict[str, Any], text: str = "") -> bool:
    """Return whether the set-up made the object: by its mark, or by ``text``, its description in release 1.0.

    People leave descriptions empty, so an empty one proves nothing.
    """
    description = row.get("description") or ""
    return MARK in description or bool(text and description == text)


def hide_login(text: str) -> str:
    """Return the text without a user and password in the addresses that it holds."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def is_same_value(key: str, actual: Any, desired: Any) -> bool:
    """Return whether AWX's value of a field is the wanted one."""
    if isinstance(resolve_id(desired), Later):
        return False
    desired = resolve_id(desired)
    if key == "extra_vars":
        try:
            return json.loads(actual or "{}") == json.loads(desired or "{}")
        except ValueError:
            return False
    if key == "rrule":
        # AWX stores a line break between DTSTART and RRULE as a blank.
        return " ".join(str(actual).split()) == " ".join(str(desired).split())
    return bool(actual == desired)


def advise_on_refusal(kind: str, refused: Refused) -> str:
    """Return what to do about a refusal of AWX, as the end of a message."""
    if "still processing events" in str(refused):
        return ". That job has just ended: run this again in a minute"
    if refused.status == 409:
        return ". Wait for these jobs or cancel them, then run this again"
    if refused.status == 403 and kind == "credential type":
        return ". Only a system administrator of AWX changes credential types: let one run this set-up once"
    if refused.status == 403:
        return ". Log in to AWX as an administrator of the organization, with a token that may write"
    return ""
