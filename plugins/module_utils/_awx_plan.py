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
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from ansible_collections.agentlab.proxmox.plugins.module_utils._awx_client import AwxError, Client, Refused, words_of

# Stands in the description of every object that the set-up makes. An object without it belongs to somebody else.
MARK = "Made by agentlab.proxmox.awx_setup"
LABEL = "agentlab.proxmox"
PROJECT_TEXT = "Playbooks of agentlab.proxmox"
CREDENTIAL_TEXT = "Token of Proxmox VE for agentlab.proxmox"
ENCRYPTED = "$encrypted$"
ACTIVE = ("new", "pending", "waiting", "running")
POLL_SECONDS = 1.0
OUTPUT_READS = 15

NAMES = {
    "projects": "project",
    "credential_types": "credential type",
    "credentials": "credential",
    "job_templates": "job template",
    "schedules": "schedule",
    "inventories": "inventory",
    "execution_environments": "execution environment",
    "notification_templates": "notification template",
    "organizations": "organization",
}


class Later:
    """Stands for the id of an object that a step of the plan creates."""

    def __init__(self) -> None:
        self.id: int | None = None


Id = Union[int, Later]  # noqa: UP007 - ansible-test reads this as older Python


def known(value: Any) -> Any:
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

    def told(self, check: bool = False) -> str:
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

    @property
    def credential_name(self) -> str:
        return f"{self.prefix}Proxmox VE API"

    def template_name(self, template: dict[str, Any]) -> str:
        return f"{self.prefix}{template['name']}"

    @property
    def playbooks(self) -> list[str]:
        return sorted({template["playbook"] for template in self.templates})


def described(text: str) -> str:
    """Return the description of an object: what it is, who made it and how to change it."""
    return f"{text}. {MARK}: run that playbook again to change it; what is changed here is changed back."


def made_here(row: dict[str, Any], text: str) -> bool:
    """Return whether the set-up made the object: by its mark, or by the description that release 1.0 gave it."""
    description = row.get("description") or ""
    return MARK in description or description == text


def hide_login(text: str) -> str:
    """Return the text without a user and password in the addresses that it holds."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def same(key: str, actual: Any, wanted: Any) -> bool:
    """Return whether AWX's value of a field is the wanted one."""
    if isinstance(known(wanted), Later):
        return False
    wanted = known(wanted)
    if key == "extra_vars":
        try:
            return json.loads(actual or "{}") == json.loads(wanted or "{}")
        except ValueError:
            return False
    if key == "rrule":
        # AWX stores a line break between DTSTART and RRULE as a blank.
        return " ".join(str(actual).split()) == " ".join(str(wanted).split())
    return bool(actual == wanted)


class Planner:
    """Read AWX and plan. One object plans once: ``set_up`` or ``take_away``."""

    def __init__(self, client: Client, wanted: DesiredObjects) -> None:
        self.client = client
        self.wanted = wanted
        self.plan = Plan()
        self.organization = 0

    # ---- looking up ----

    def only(self, path: str, name: str, option: str, **query: Any) -> dict[str, Any] | None:
        """Return the object of that name in the organization; note a problem when there is none or more than one."""
        rows = self.client.rows(f"{path}/", name=name, **query)
        if len(rows) == 1:
            return rows[0]
        where = f" in the organization {self.wanted.organization}" if "organization" in query else ""
        if rows:
            self.plan.problems.append(
                f"{path} of AWX has {len(rows)} named {name}{where}; rename one of them, or name another with {option}"
            )
        else:
            others = self.client.rows(f"{path}/", name=name) if "organization" in query else []
            beside = f" ({self._owners(others)}; that is not used)" if others else ""
            self.plan.problems.append(
                f"{path} of AWX has none named {name}{where} that this user may see{beside}; create it first, log in as an "
                f"administrator of the organization, or name another with {option}"
            )
        return None

    @staticmethod
    def _owners(rows: list[dict[str, Any]]) -> str:
        names = sorted(
            {
                str((row.get("summary_fields") or {}).get("organization", {}).get("name") or "no organization")
                for row in rows
            }
        )
        return f"one of that name belongs to {', '.join(names)}"

    def find(self, path: str, name: str, **query: Any) -> dict[str, Any] | None:
        rows = self.client.rows(f"{path}/", name=name, **query)
        return rows[0] if rows else None

    # ---- steps ----

    def add(
        self, action: str, kind: str, name: str, run: Callable[[], Any], fields: list[str] | None = None, **more: Any
    ) -> None:
        self.plan.steps.append(Step(action, kind, name, run, fields or [], **more))

    def write(self, method: str, path: str, kind: str, name: str, body: Any = None) -> Any:
        """Send one change; a refusal becomes a message that names the object, and what to do."""
        try:
            return self.client.write(method, path, body)
        except Refused as refused:
            raise AwxError(
                f"AWX at {self.client.host} refuses {path.split('/')[0]} {name} ({refused.status}): {refused}{advice(kind, refused)}"
            ) from refused

    def ensure(
        self,
        path: str,
        body: dict[str, Any],
        text: str,
        row: dict[str, Any] | None,
        create_path: Callable[[], str] | None = None,
        keep: tuple[str, ...] = (),
        shown: dict[str, Any] | None = None,
        ours: bool | None = None,
    ) -> Id:
        """Plan that the object is as ``body`` says; return its id.

        ``keep`` names fields that are only written when the object is created. ``shown`` replaces values in the diff.
        """
        kind, name = NAMES[path], body["name"]
        shown = {**body, **(shown or {})}
        if row is None:
            later = Later()

            def create() -> None:
                target = create_path() if create_path else f"{path}/"
                answer = self.write("POST", target, kind, name, {key: known(value) for key, value in body.items()})
                later.id = int(answer["id"])

            after = {key: value for key, value in shown.items() if not isinstance(value, Later)}
            self.add("created", kind, name, create, after=after)
            return later
        number = int(row["id"])
        differing = [key for key, value in body.items() if key not in keep and not same(key, row.get(key), value)]
        if not differing:
            return number
        ours = made_here(row, text) if ours is None else ours
        if not ours and not self.wanted.adopt:
            self.plan.foreign.append(f"{kind} {name} (id {number}; {', '.join(differing)} would be changed)")

        def change() -> None:
            self.write("PATCH", f"{path}/{number}/", kind, name, {key: known(body[key]) for key in differing})

        self.add(
            "changed" if ours else "adopted",
            kind,
            name,
            change,
            differing,
            before={key: row.get(key) for key in differing},
            after={key: shown[key] for key in differing if not isinstance(shown[key], Later)},
        )
        return number

    # ---- the whole ----

    def set_up(self) -> Plan:
        wanted = self.wanted
        self._check_options()
        organization = self.only("organizations", wanted.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        inventory = self.only("inventories", wanted.inventory, "awx_inventory", organization=self.organization)
        if inventory:
            self._check_hosts(inventory)
        environment = self._execution_environment()
        machine = None
        if wanted.machine_credential:
            machine = self.only(
                "credentials",
                wanted.machine_credential,
                "awx_machine_credential",
                organization=self.organization,
                credential_type__kind="ssh",
            )
        notification = None
        if wanted.notification:
            notification = self.only(
                "notification_templates", wanted.notification, "awx_notification", organization=self.organization
            )
        self._check_galaxy()
        if self.plan.problems:
            return self.plan
        credential = self._credential() if wanted.credential_inputs else None
        project = self._project()
        if self.plan.problems or project is None or inventory is None:
            return self.plan
        for template in wanted.templates:
            self._template(template, project, inventory, environment, machine, credential, notification)
        return self.plan

    def _check_options(self) -> None:
        inputs = self.wanted.credential_inputs
        if not inputs:
            return
        if not inputs.get("api_host") and (inputs.get("api_token_id") or inputs.get("api_user")):
            self.plan.problems.append(
                "awx_proxmox_api_host: missing; a token or user kept in AWX needs the host of the Proxmox VE API"
            )
        if inputs.get("api_host") and not (inputs.get("api_token_id") or inputs.get("api_user")):
            self.plan.problems.append(
                "awx_proxmox_api_token_id: missing; awx_proxmox_api_host needs a token (or awx_proxmox_api_user with its "
                "password)"
            )

    def _execution_environment(self) -> int | None:
        name = self.wanted.execution_environment
        if not name:
            return None
        # The name is unique in all of AWX; an environment without an organization is for everybody.
        row = self.find("execution_environments", name)
        if row and row.get("organization") in (None, self.organization):
            return int(row["id"])
        if row:
            self.plan.problems.append(
                f"execution environment {name}: {self._owners([row])}; name one of {self.wanted.organization} "
                "with awx_execution_environment"
            )
        else:
            self.plan.problems.append(
                f"execution_environments of AWX has none named {name}; create it first, or name another with "
                "awx_execution_environment"
            )
        return None

    def _check_hosts(self, inventory: dict[str, Any]) -> None:
        hosts, number = self.wanted.hosts, inventory["id"]
        if hosts in ("all", "localhost") or not re.fullmatch(r"[\w.-]+", hosts):
            return
        dynamic = bool(inventory.get("has_inventory_sources")) or bool(inventory.get("kind"))
        groups = self.client.rows(f"inventories/{number}/groups/", name=hosts)
        if groups:
            count = len(self.client.rows(f"groups/{groups[0]['id']}/all_hosts/"))
        else:
            count = len(self.client.rows(f"inventories/{number}/hosts/", name=hosts))
        if count == 0 and dynamic:
            self.plan.notes.append(
                f"the inventory {inventory['name']} has no host for {hosts} yet; jobs fail until its source has brought one"
            )
        elif count == 0:
            self.plan.problems.append(
                f"awx_hosts: the inventory {inventory['name']} has no group or host {hosts} with a host in it; add one host "
                "of each cluster to it, or name another group or host with awx_hosts"
            )
        elif count > 1 and not self.wanted.allow_many_hosts:
            self.plan.notes.append(
                f"the group {hosts} has {count} hosts; create, renew, destroy and job refuse to run on more than one. Keep one "
                "host of the cluster in it, name one with awx_hosts, or set awx_allow_many_hosts if each host keeps records of "
                "its own"
            )

    def _check_galaxy(self) -> None:
        if not self.wanted.galaxy_check:
            return
        try:
            rows = self.client.rows(f"organizations/{self.organization}/galaxy_credentials/")
        except Refused as refused:
            # Not every user may read them.
            if refused.status in (403, 404):
                return
            raise
        if not rows:
            self.plan.problems.append(
                f"the organization {self.wanted.organization} has no Galaxy credential, so AWX installs no collection and every "
                "job fails. Add one to the organization (such as Ansible Galaxy), or set awx_galaxy_check to false if the "
                "collection is in the execution environment or in the project"
            )

    # ---- the token of Proxmox VE ----

    def _credential(self) -> Id | None:
        kind_row = self._credential_type_row()
        kind_id = self._credential_type(kind_row)
        inputs = {key: value for key, value in self.wanted.credential_inputs.items() if value not in (None, "")}
        secrets = {item["id"] for item in self.wanted.credential_type["inputs"]["fields"] if item.get("secret")}
        name = self.wanted.credential_name
        row = None
        if kind_row is not None:
            row = self.find("credentials", name, organization=self.organization, credential_type=kind_row["id"])
        text = CREDENTIAL_TEXT
        self._check_secrets(row, inputs)
        body = {
            "name": name,
            "description": described(text),
            "organization": self.organization,
            "credential_type": kind_id,
            "inputs": inputs,
        }
        shown = {"inputs": {key: ENCRYPTED if key in secrets else value for key, value in inputs.items()}}
        if row is None:
            return self.ensure("credentials", body, text, None, shown=shown)
        present = dict(row.get("inputs") or {})
        # PATCH replaces all inputs. AWX keeps a secret for which it is sent "$encrypted$".
        merged = {**{key: value for key, value in present.items() if key in secrets}, **inputs}
        plain = {key for key in {*present, *merged} if key not in secrets}
        differs = any(present.get(key) != merged.get(key) for key in plain) or any(
            key not in present for key in merged if key in secrets
        )
        given = [key for key in inputs if key in secrets and key in present]
        if differs or (self.wanted.update_secrets and given):
            body["inputs"] = merged
            shown = {"inputs": {key: ENCRYPTED if key in secrets else value for key, value in merged.items()}}
        else:
            body["inputs"] = present
            if given:
                self.plan.notes.append(
                    f"credential {name}: AWX does not show its secret, so it cannot be compared and stays as it is; to write the "
                    "one that you gave, set awx_update_secrets to true"
                )
        number = int(row["id"])
        if self.wanted.update_secrets and given and not differs:
            # The fields that can be seen are alike; the secret is written all the same.
            self.add(
                "changed",
                "credential",
                name,
                lambda: self.write("PATCH", f"credentials/{number}/", "credential", name, {"inputs": merged}),
                ["inputs"],
            )
            body["inputs"] = present
        return self.ensure("credentials", body, text, row, shown=shown, keep=("credential_type",))

    def _check_secrets(self, row: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Refuse a token or user without its secret, before anything is written."""
        present = (row or {}).get("inputs") or {}
        for login, secret, where in (
            ("api_token_id", "api_token_secret", "PROXMOX_TOKEN_SECRET (or awx_proxmox_api_token_secret)"),
            ("api_user", "api_password", "PROXMOX_PASSWORD (or awx_proxmox_api_password)"),
        ):
            if login == "api_user" and inputs.get("api_token_id"):
                continue
            if not inputs.get(login) or inputs.get(secret):
                continue
            if not present.get(secret):
                self.plan.problems.append(f"awx_proxmox_{secret}: missing; awx_proxmox_{login} needs it. Set {where}")
            elif present.get(login) != inputs[login]:
                self.plan.problems.append(
                    f"awx_proxmox_{secret}: missing; awx_proxmox_{login} differs from the one in AWX, and another {login} has "
                    f"another secret. Set {where}"
                )

    def _credential_type_row(self) -> dict[str, Any] | None:
        # Credential types belong to all organizations.
        return self.find("credential_types", self.wanted.credential_type["name"], kind="cloud")

    def _credential_type(self, row: dict[str, Any] | None) -> Id:
        body = dict(self.wanted.credential_type)
        text, name = body["description"], body["name"]
        body["description"] = described(text)
        if row is None:
            if self._lacks_system_rights():
                self.plan.problems.append(
                    f"credential type {name}: it is not there yet, and only a system administrator of AWX can create it. Let one "
                    "run this set-up once, or leave out awx_proxmox_* and keep the token on the hosts"
                )
            return self.ensure("credential_types", body, text, None)
        if row.get("inputs") != body["inputs"]:
            users = self.client.rows("credentials/", credential_type=row["id"])
            if users:
                there = {item["id"] for item in (row.get("inputs") or {}).get("fields", [])}
                missing = [item["id"] for item in body["inputs"]["fields"] if item["id"] not in there]
                self.plan.problems.append(
                    f"credential type {name}: its fields differ (missing: {', '.join(missing) or 'none'}), and AWX changes no "
                    f"fields of a type that is in use, here by {', '.join(sorted(user['name'] for user in users)[:5])}. Name "
                    f"another with awx_credential_type_name, such as '{name} 2': that type is made beside it, the templates get "
                    "a credential of it, and the old one can be deleted"
                )
                return int(row["id"])
        differing = [key for key, value in body.items() if not same(key, row.get(key), value)]
        if differing and self._lacks_system_rights():
            self.plan.notes.append(
                f"credential type {name}: {', '.join(differing)} would be changed, which only a system administrator of AWX can "
                "do. It is used as it is"
            )
            return int(row["id"])
        return self.ensure("credential_types", body, text, row)

    def _lacks_system_rights(self) -> bool:
        try:
            users = self.client.rows("me/")
        except AwxError:
            return False
        return bool(users) and users[0].get("is_superuser") is False

    # ---- the project ----

    def _project(self) -> Id | None:
        wanted = self.wanted
        if not wanted.project_scm_url:
            row = self.only(
                "projects", wanted.project, "awx_project (or give awx_project_scm_url)", organization=self.organization
            )
            if row is None:
                return None
            self._sync(int(row["id"]), row, changed=False)
            return int(row["id"])
        row = self.find("projects", wanted.project, organization=self.organization)
        text = PROJECT_TEXT
        body = {
            "name": wanted.project,
            "description": described(text),
            "organization": self.organization,
            "scm_type": "git",
            "scm_url": wanted.project_scm_url,
            "scm_branch": wanted.project_scm_branch,
            "scm_update_on_launch": wanted.project_update_on_launch,
            "scm_update_cache_timeout": wanted.project_cache_timeout,
        }
        before = len(self.plan.steps)
        number = self.ensure("projects", body, text, row, shown={"scm_url": hide_login(wanted.project_scm_url)})
        # AWX starts a sync by itself whenever a project is created or changed.
        self._sync(number, row, changed=len(self.plan.steps) > before)
        return number

    def _sync(self, number: Id, row: dict[str, Any] | None, changed: bool) -> None:
        """Plan that the project is synced and has our playbooks: templates cannot be made before."""
        name = self.wanted.project
        if row is None or changed:
            self.add("synced", "project", name, lambda: self.wait_for_project(number), changes=False)
            return
        if row.get("status") in ACTIVE:
            self.add("synced", "project", name, lambda: self.wait_for_project(number), changes=False)
            return
        missing = self._missing_playbooks(int(row["id"]))
        if row.get("status") in ("successful", "ok") and not missing:
            return
        if not row.get("scm_type"):
            if missing:
                self.plan.problems.append(self._lacks_playbooks(missing))
            return

        def sync() -> None:
            self.write("POST", f"projects/{known(number)}/update/", "project", name, {})
            self.wait_for_project(number)

        self.add("synced", "project", name, sync)

    def _missing_playbooks(self, number: int) -> list[str]:
        answer = self.client.get(f"projects/{number}/playbooks/")
        return [name for name in self.wanted.playbooks if name not in (answer if isinstance(answer, list) else [])]

    def _lacks_playbooks(self, missing: list[str]) -> str:
        return (
            f"project {self.wanted.project}: the sync was successful, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not at the top of the repository. Put the contents of the collection's "
            "folder awx/ (not the folder itself) there, and check awx_project_scm_branch"
        )

    def wait_for_project(self, number: Id) -> None:
        """Wait until the sync has ended. Raise AwxError with its reason when it failed, or lacks our playbooks."""
        name, number = self.wanted.project, int(known(number))
        end = time.monotonic() + self.wanted.project_timeout
        while True:
            row = self.client.get(f"projects/{number}/")
            # While an update is under way the status of the project may still be that of the last one.
            busy = (row.get("summary_fields") or {}).get("current_update") or row.get("status") in ACTIVE
            if not busy:
                break
            if time.monotonic() > end:
                raise AwxError(
                    f"project {name}: its sync did not end within {self.wanted.project_timeout} s (awx_project_timeout; status "
                    f"{row.get('status')}). Look at it in AWX, and run the set-up again"
                )
            time.sleep(POLL_SECONDS)
        if row.get("status") not in ("successful", "ok"):
            raise AwxError(
                f"project {name}: its sync ended as {row.get('status')}: {self._sync_failure(row)}. Check awx_project_scm_url "
                "and awx_project_scm_branch, and whether AWX reaches that server"
            )
        missing = self._missing_playbooks(number)
        if missing:
            raise AwxError(self._lacks_playbooks(missing))

    def _sync_failure(self, row: dict[str, Any]) -> str:
        """Return why the last sync failed, from its output; the login in an address is left out."""
        summary = row.get("summary_fields") or {}
        update = (summary.get("last_update") or summary.get("last_job") or {}).get("id")
        if not update:
            return "AWX says no reason"
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
            # AWX sets the status before it has stored the output.
            if fatal or job.get("event_processing_finished"):
                break
            time.sleep(POLL_SECONDS)
        return hide_login(words_of(reason or "AWX says no reason"))

    # ---- a template ----

    def _template(
        self,
        template: dict[str, Any],
        project: Id,
        inventory: dict[str, Any],
        environment: int | None,
        machine: dict[str, Any] | None,
        credential: Id | None,
        notification: dict[str, Any] | None,
    ) -> None:
        name = self.wanted.template_name(template)
        survey = template.get("survey") or []
        extra_vars = {"agentlab_hosts": self.wanted.hosts, **(template.get("extra_vars") or {})}
        if self.wanted.allow_many_hosts:
            extra_vars["agentlab_allow_many_hosts"] = True
        body = {
            "name": name,
            "description": described(template["description"]),
            "job_type": template.get("job_type") or "run",
            "project": project,
            "inventory": int(inventory["id"]),
            "playbook": template["playbook"],
            "extra_vars": json.dumps(extra_vars),
            "survey_enabled": bool(survey),
            "allow_simultaneous": bool(template.get("allow_simultaneous", True)),
        }
        if environment:
            body["execution_environment"] = environment
        row = self.find("job_templates", name, organization=self.organization)
        # A template on another project is somebody else's, whatever its description says.
        ours = row is None or (made_here(row, template["description"]) and row.get("project") == known(project))
        number = self.ensure("job_templates", body, template["description"], row, ours=ours)
        self._survey(number, name, survey)
        wanted_credentials: list[tuple[str, Id, Any]] = []
        if machine:
            wanted_credentials.append((machine["name"], int(machine["id"]), machine["credential_type"]))
        if credential is not None:
            wanted_credentials.append((self.wanted.credential_name, credential, None))
        self._credentials(number, name, wanted_credentials)
        self._label(number, name)
        if notification:
            self._notification(number, name, notification)
        if "schedule" in template:
            self._schedule(number, name, template["schedule"])

    def _survey(self, number: Id, name: str, spec: list[dict[str, Any]]) -> None:
        if not spec:
            return
        present: Any = {}
        if not isinstance(number, Later):
            present = self.client.get(f"job_templates/{number}/survey_spec/") or {}
        if present.get("spec") == spec:
            return
        body = {"name": "", "description": "", "spec": spec}

        def post() -> None:
            self.write("POST", f"job_templates/{known(number)}/survey_spec/", "survey", name, body)

        before = {"spec": present["spec"]} if present.get("spec") else {}
        self.add("changed" if before else "created", "survey of", name, post, before=before, after={"spec": spec})

    def _credentials(self, number: Id, name: str, wanted: list[tuple[str, Id, Any]]) -> None:
        attached = [] if isinstance(number, Later) else self.client.rows(f"job_templates/{number}/credentials/")

        def post(body: dict[str, Any]) -> None:
            body = {key: known(value) for key, value in body.items()}
            self.write("POST", f"job_templates/{known(number)}/credentials/", "credential", name, body)

        for credential_name, credential, kind in wanted:
            if known(credential) in [row["id"] for row in attached]:
                continue
            for row in attached:
                # AWX allows one credential of a type. One of our name is of an earlier type, for the same variables.
                if kind is None:
                    in_the_way = row["name"] == credential_name or self._is_our_type(row)
                else:
                    in_the_way = row["credential_type"] == kind
                if in_the_way:
                    self.add(
                        f"detached from {name}",
                        "credential",
                        row["name"],
                        lambda other=int(row["id"]): post({"id": other, "disassociate": True}),
                    )
            self.add(f"attached to {name}", "credential", credential_name, lambda new=credential: post({"id": new}))

    def _is_our_type(self, row: dict[str, Any]) -> bool:
        kind = (row.get("summary_fields") or {}).get("credential_type") or {}
        return bool(kind.get("name") == self.wanted.credential_type["name"])

    def _label(self, number: Id, name: str) -> None:
        if not isinstance(number, Later):
            rows = self.client.rows(f"job_templates/{number}/labels/", name=LABEL)
            if rows:
                return
        self.add(
            f"attached to {name}",
            "label",
            LABEL,
            lambda: self.write(
                "POST",
                f"job_templates/{known(number)}/labels/",
                "label",
                name,
                {"name": LABEL, "organization": self.organization},
            ),
        )

    def _notification(self, number: Id, name: str, notification: dict[str, Any]) -> None:
        wanted = int(notification["id"])
        path = "notification_templates_error"
        if not isinstance(number, Later):
            attached = self.client.rows(f"job_templates/{number}/{path}/")
            if wanted in [row["id"] for row in attached]:
                return
        self.add(
            f"attached to {name}",
            "notification",
            notification["name"],
            lambda: self.write("POST", f"job_templates/{known(number)}/{path}/", "notification", name, {"id": wanted}),
        )

    def _schedule(self, number: Id, template: str, schedule: dict[str, Any]) -> None:
        name = f"{self.wanted.prefix}{schedule['name']}"
        row = None if isinstance(number, Later) else self.find("schedules", name, unified_job_template=number)
        if not schedule.get("rrule"):
            if row and made_here(row, schedule["description"]):
                schedule_id = int(row["id"])
                self.add(
                    "deleted",
                    "schedule",
                    name,
                    lambda: self.write("DELETE", f"schedules/{schedule_id}/", "schedule", name),
                )
            return
        body = {
            "name": name,
            "description": described(schedule["description"]),
            "rrule": " ".join(schedule["rrule"].split()),
            "enabled": True,
        }
        # Whoever switches a schedule off in AWX means it: only a new one is switched on.
        self.ensure(
            "schedules",
            body,
            schedule["description"],
            row,
            create_path=lambda: f"job_templates/{known(number)}/schedules/",
            keep=("enabled",),
        )

    # ---- taking it away ----

    def take_away(self) -> Plan:
        """Plan the removal of what the set-up made, in the order in which AWX allows it."""
        wanted = self.wanted
        organization = self.only("organizations", wanted.organization, "awx_organization")
        if organization is None:
            return self.plan
        self.organization = int(organization["id"])
        gone: set[int] = set()
        for template in wanted.templates:
            row = self.find("job_templates", wanted.template_name(template), organization=self.organization)
            if row is None:
                continue
            if not made_here(row, template["description"]):
                self._keep("job template", row, "the set-up did not make it")
                continue
            if self._take_template(template, row):
                gone.add(int(row["id"]))
        self._take_credential(gone)
        self._take_project(gone)
        return self.plan

    def _keep(self, kind: str, row: dict[str, Any], why: str) -> None:
        self.plan.notes.append(f"{kind} {row['name']} (id {row['id']}) is kept: {why}")

    def _take_template(self, template: dict[str, Any], row: dict[str, Any]) -> bool:
        number, name = int(row["id"]), row["name"]
        running = [
            job for status in ACTIVE for job in self.client.rows("jobs/", unified_job_template=number, status=status)
        ]
        if running:
            jobs = ", ".join(
                f"{job['id']} ({job['status']})" for job in sorted(running, key=lambda job: int(job["id"]))
            )
            self.plan.problems.append(
                f"job template {name}: jobs {jobs} are under way; wait for them or cancel them, then run this again"
            )
        own = f"{self.wanted.prefix}{template['schedule']['name']}" if template.get("schedule") else ""
        schedules = self.client.rows(f"job_templates/{number}/schedules/")
        foreign = [item["name"] for item in schedules if item["name"] != own and not made_here(item, "")]
        nodes = self.client.rows("workflow_job_template_nodes/", unified_job_template=number)
        if (foreign or nodes) and not self.wanted.adopt:
            what = [f"schedule {item}" for item in foreign] + [f"node {node['id']} of a workflow" for node in nodes]
            self._keep(
                "job template", row, f"{', '.join(what)} would go with it; remove that first, or set awx_adopt to true"
            )
            return False
        for item in schedules:
            self.add(
                "deleted",
                "schedule",
                item["name"],
                lambda path=f"schedules/{item['id']}/", title=item["name"]: self.write(
                    "DELETE", path, "schedule", title
                ),
            )
        labels = self.client.rows(f"job_templates/{number}/labels/", name=LABEL)
        for label in labels:
            # AWX deletes a label with its last use, but only when it is taken off: it has no DELETE for labels.
            self.add(
                f"taken off {name}",
                "label",
                LABEL,
                lambda other=int(label["id"]): self.write(
                    "POST", f"job_templates/{number}/labels/", "label", name, {"id": other, "disassociate": True}
                ),
            )
        self.add(
            "deleted",
            "job template",
            name,
            lambda: self.write("DELETE", f"job_templates/{number}/", "job template", name),
        )
        return True

    def _others(self, gone: set[int], **query: Any) -> list[str]:
        return sorted(row["name"] for row in self.client.rows("job_templates/", **query) if int(row["id"]) not in gone)

    def _take_credential(self, gone: set[int]) -> None:
        kind = self._credential_type_row()
        if kind is None:
            return
        name = self.wanted.credential_name
        row = self.find("credentials", name, organization=self.organization, credential_type=kind["id"])
        removed: set[int] = set()
        if row and not made_here(row, CREDENTIAL_TEXT):
            self._keep("credential", row, "the set-up did not make it")
        elif row:
            others = self._others(gone, credentials=row["id"])
            if others:
                self._keep("credential", row, f"{', '.join(others)} use it")
            else:
                number = int(row["id"])
                removed.add(number)
                self.add(
                    "deleted",
                    "credential",
                    name,
                    lambda: self.write("DELETE", f"credentials/{number}/", "credential", name),
                )
        if not made_here(kind, self.wanted.credential_type["description"]):
            self._keep("credential type", kind, "the set-up did not make it")
            return
        users = [
            user for user in self.client.rows("credentials/", credential_type=kind["id"]) if user["id"] not in removed
        ]
        if users:
            self._keep("credential type", kind, f"{len(users)} other credentials are of it")
        elif self._lacks_system_rights():
            self._keep("credential type", kind, "only a system administrator of AWX can delete it")
        else:
            kind_id = int(kind["id"])
            self.add(
                "deleted",
                "credential type",
                kind["name"],
                lambda: self.write("DELETE", f"credential_types/{kind_id}/", "credential type", kind["name"]),
            )

    def _take_project(self, gone: set[int]) -> None:
        row = self.find("projects", self.wanted.project, organization=self.organization)
        if row is None:
            return
        if not made_here(row, PROJECT_TEXT):
            self._keep("project", row, "the set-up did not make it")
            return
        others = self._others(gone, project=row["id"])
        if others:
            self._keep("project", row, f"{', '.join(others)} use it")
            return
        number, name = int(row["id"]), row["name"]
        if row.get("status") in ACTIVE:
            self.plan.problems.append(f"project {name}: its sync is {row['status']}; wait for it, then run this again")
        self.add("deleted", "project", name, lambda: self.write("DELETE", f"projects/{number}/", "project", name))


def advice(kind: str, refused: Refused) -> str:
    """Return what to do about a refusal of AWX, as the end of a message."""
    if refused.status == 409:
        return ". Wait for these jobs or cancel them, then run this again"
    if refused.status == 403 and kind == "credential type":
        return ". Only a system administrator of AWX changes credential types: let one run this set-up once"
    if refused.status == 403:
        return ". Log in to AWX as an administrator of the organization, with a token that may write"
    return ""
