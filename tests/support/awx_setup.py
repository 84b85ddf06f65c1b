# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of the set-up of AWX share: what a user makes by hand before it, and how its result is read.

``run_module`` runs the module's own code in this process, with the options that the playbook hands to it: a test of
many runs takes seconds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jinja2
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from support.awx import TOKEN, Awx
from support.double import TOKEN_SECRET
from support.play import REPO, Run

SetUp = Callable[..., Run]
NAMES = ("create", "renew", "destroy", "prune check", "prune", "reconcile", "job", "doctor")
PROJECT_URL = "https://git.example.net/agentlab-awx.git"
# A token of Proxmox VE that is kept in AWX.
PROXMOX = {"awx_proxmox_api_host": "pve.example.net", "awx_proxmox_api_token_id": "agentlab@pve!awx"}


def add_prerequisites(awx: Awx, organization: int, credential: str = "nodes", inventory: str = "proxmox") -> None:
    """Add what a user makes by hand in an organization: inventory, SSH credential, Galaxy credential."""
    awx.add_inventory(inventory, organization)
    kind = awx.find_named("credential_types", "Machine")["id"]
    awx.add("credentials", name=credential, credential_type=kind, organization=organization)
    galaxy = awx.find_named("credentials", "Ansible Galaxy")["id"]
    awx.related["organizations", organization, "galaxy_credentials"] = [galaxy]


def add_second_organization(awx: Awx) -> int:
    """Add an organization with all that the set-up needs there, and return its id."""
    number = awx.add("organizations", name="Second")
    add_prerequisites(awx, number)
    return number


def read_task_result(run: Run) -> dict[str, Any]:
    """Return what the task that sets up returned."""
    return run.result("Create, change or remove the objects in AWX")


def read_task_lines(run: Run) -> str:
    """Return the lines that the set-up's task tells."""
    return "\n".join(read_task_result(run)["lines"])


def list_writes(awx: Awx) -> list[str]:
    """Return the requests that changed AWX, sorted, with N for each id."""
    return sorted(re.sub(r"/\d+", "/N", line) for line in awx.writes)


def read_failure(run: Run) -> str:
    """Return the message of a run that failed as it has to: no warning, no secret, no traceback."""
    assert run.rc != 0 and not run.warnings, run.output
    assert TOKEN not in run.output and TOKEN_SECRET not in run.output
    assert "no_log" not in run.output and "Traceback" not in run.output
    return str(run.failed[-1]["result"]["msg"])


def read_refusal(answer: dict[str, Any]) -> str:
    """Return the message of a run in this process that was refused."""
    assert answer["failed"] is True, answer
    return str(answer["msg"])


def copy_state(awx: Awx) -> Any:
    """Return all that lasts in AWX."""
    return copy.deepcopy((awx.objects, awx.surveys, awx.attached, awx.related))


# ---- the module in this process ----


class _Unsafe(str):
    """A text of the playbook that is not rendered."""


class _Loader(yaml.SafeLoader):
    pass


class _Ended(Exception):
    """The module has ended; ``args[0]`` is its result."""


def _unsafe(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key: _Unsafe(value) for key, value in loader.construct_mapping(node, deep=True).items()}
    return _Unsafe(loader.construct_scalar(node))  # type: ignore[arg-type]


_Loader.add_constructor("!unsafe", _unsafe)
_JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)


def _render(value: Any, variables: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _render(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_render(item, variables) for item in value]
    if isinstance(value, _Unsafe) or not isinstance(value, str) or "{{" not in value:
        return value
    # As in Ansible, one expression keeps its type.
    expression = re.fullmatch(r"\s*\{\{((?:(?!\}\}).)*)\}\}\s*", value, re.S)
    if expression:
        return _JINJA.compile_expression(expression[1])(**variables)
    return _JINJA.from_string(value).render(**variables)


def build_module_options(**variables: Any) -> dict[str, Any]:
    """Return the options of the module as the playbook makes them from the variables of a user."""
    play = yaml.load((REPO / "playbooks" / "awx_setup.yml").read_text(encoding="utf-8"), _Loader)[0]
    task = next(task for task in play["tasks"] if "agentlab.proxmox.agentlab_awx_setup" in task)
    values: dict[str, Any] = {"lookup": lambda *_names: "", "ansible_playbook_python": ""}
    for name, value in play["vars"].items():
        values[name] = variables.get(name, _render(value, values))
    file = yaml.load((REPO / "playbooks" / "vars" / "awx_setup.yml").read_text(encoding="utf-8"), _Loader)
    for name in ("awx_prune_survey", "awx_credential_type", "awx_templates"):
        values[name] = _render(file[name], values)
    values["awx_inputs"] = _render(task["vars"]["awx_inputs"], values)
    options: dict[str, Any] = _render(task["agentlab.proxmox.agentlab_awx_setup"], values)
    return options


def run_module(
    awx: Awx, *, check: bool = False, only: tuple[str, ...] = ("prune",), **variables: Any
) -> dict[str, Any]:
    """Run the set-up as the playbook would; return the result, with ``failed`` when the module failed.

    ``only`` names the templates. One with a survey and a schedule meets every kind of request.
    """
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _awx_project
    from ansible_collections.agentlab.proxmox.plugins.modules import agentlab_awx_setup

    awx_options = {
        "awx_host": awx.url, "awx_token": TOKEN, "awx_inventory": "proxmox", "awx_machine_credential": "nodes",
        "awx_project_scm_url": PROJECT_URL, "awx_proxmox_api_token_secret": TOKEN_SECRET, **PROXMOX, **variables,
    }  # fmt: skip
    options = build_module_options(**awx_options)
    options["templates"] = [template for template in options["templates"] if template["name"] in only]

    class Module:
        """Stands for AnsibleModule: checks the options by the module's own specification."""

        def __init__(self, argument_spec: dict[str, Any], supports_check_mode: bool) -> None:
            validated = ArgumentSpecValidator(argument_spec).validate(options)
            assert not validated.error_messages, validated.error_messages
            self.params, self.check_mode, self._diff = validated.validated_parameters, check, False
            assert supports_check_mode

        def exit_json(self, **result: Any) -> None:
            raise _Ended({"failed": False, **result})

        def fail_json(self, **result: Any) -> None:
            raise _Ended({"failed": True, **result})

    with (
        mock.patch.object(agentlab_awx_setup, "AnsibleModule", Module),
        mock.patch.object(_awx_project, "POLL_SECONDS", 0.0),
    ):
        try:
            agentlab_awx_setup.main()
        except _Ended as ended:
            answer: dict[str, Any] = ended.args[0]
            assert TOKEN_SECRET not in str(answer) and TOKEN not in str(answer)
            return answer
    raise AssertionError("the module has not ended")


def read_lines(answer: dict[str, Any]) -> str:
    """Return the lines of a run that was successful."""
    assert not answer["failed"], answer["msg"]
    return "\n".join(answer["lines"])
