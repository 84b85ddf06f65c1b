# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""AnsibleModule on one side, the core on the other: options in, outcomes out, errors to answers.

Only this file knows both.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common import validation

from ._core import config as core_config
from ._core import database_address, patterns
from ._core.context import Context
from ._core.errors import AgentlabError, InternalError, InvalidInput, make_host_error
from ._core.escapes import escape_controls
from ._core.model import Outcome, Sandbox

COMMON_ARGS: dict[str, Any] = {
    "config_file": {"type": "path"},
    "database": {"type": "path"},
    "database_password": {"type": "str", "no_log": True},
    "api_host": {"type": "str"},
    "api_port": {"type": "int"},
    "api_user": {"type": "str"},
    "api_password": {"type": "str", "no_log": True},
    "api_token_id": {"type": "str"},
    "api_token_secret": {"type": "str", "no_log": True},
    "validate_certs": {"type": "bool"},
    "ca_path": {"type": "path"},
    "api_timeout": {"type": "int"},
    "actor": {"type": "str"},
}
SELECT_ARGS: dict[str, Any] = {
    "vmid": {"type": "int"},
    # As text: a textarea gives several in one value, and AnsibleModule would refuse that before it can be split.
    "vmids": {"type": "list", "elements": "str"},
    "name": {"type": "str"},
}
SELECT_EXCLUSIVE = [("vmid", "vmids", "name")]
# How the modules say what can be done about an error.
REMEDIES: dict[str, str] = {
    "force": "Use force=true to bypass",
    "remove": "To give the sandbox up, remove it with state=absent and force=true",
    "unprotect": "Set protected=false first (force does not skip this)",
    "discard_memory": "Use state=stopped and force=true to throw the saved memory away",
    "delete_workspace": "Use force=true to delete it",
    "allow_restart": "Set allow_restart=true, which stops and starts it, or stop it first",
    "update": "Set update=true to apply it",
    "renew_lease": "Renew its lease with agentlab_lease",
    "attach_workspace": "Attach it with agentlab_workspace",
}
# Characters. A shorter secret would be found in half of all words and numbers, and hide them.
SHORTEST_SECRET = 4
# What Ansible shows in the place of a secret option.
HIDDEN = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"


def _context(module: AnsibleModule, config: core_config.Config) -> Context:
    return Context(
        config,
        actor=_actor(module),
        dry_run=module.check_mode,
        wait_timeout=module.params.get("wait_timeout"),
    )


def run(
    argument_spec: dict[str, Any],
    work: Callable[[AnsibleModule, Any], dict[str, Any]],
    *,
    build_context: Callable[[AnsibleModule, core_config.Config], Any] = _context,
    module_class: Any = AnsibleModule,
    **kwargs: Any,
) -> None:
    """Run a module: build its Context from options, environment and file, call ``work``, and answer.

    A known error is answered without a stack trace. ``build_context`` makes the object that ``work`` gets; the doctor
    needs another one than a Context. ``module_class`` is AnsibleModule in a shipped module, and a class with the same
    interface in a module that runs in place (plugins/action).
    """
    module = module_class(argument_spec={**COMMON_ARGS, **argument_spec}, supports_check_mode=True, **kwargs)
    context: Any = None
    failure: dict[str, Any] = {}
    result: dict[str, Any] = {}
    module.no_log_values.update(database_address.find_passwords(str(module.params.get("database") or "")))
    try:
        config = core_config.load(module.params, os.environ)
        # Secrets that came from the file or the environment are as secret as those given as options.
        module.no_log_values.update(
            value
            for value in (config.proxmox.api_password, config.proxmox.api_token_secret, config.database_password)
            if value
        )
        context = build_context(module, config)
        result = work(module, context)
    except AgentlabError as error:
        failure = {"msg": error.explain(REMEDIES), "error": error.as_dict(REMEDIES), "changed": False, **_extra(error)}
    except Exception as error:  # the outermost edge: what we did not foresee is told without a trace
        known = explain_unforeseen(error)
        failure = {"msg": known.message, "error": known.as_dict(), "changed": False}
    finally:
        if context is not None:
            context.close()
    _hide_short_secrets(module, {**COMMON_ARGS, **argument_spec})
    if failure:
        # Outside of the handlers: up to ansible-core 2.18 fail_json adds the trace of an exception that is being
        # handled.
        module.fail_json(**failure)
    for warning in result.pop("warnings", []):
        module.warn(warning)
    if result.get("failed"):
        module.fail_json(**result)
    module.exit_json(**result)


def explain_unforeseen(error: Exception) -> AgentlabError:
    """Return the error to report for an exception that no code expects: a lack of this host's resources, or a bug."""
    kind = type(error).__name__
    return make_host_error(error) or InternalError(
        f"internal error: {kind}: {error}; nothing more was done. Please report this with the steps that led to it",
        type=kind,
    )


def _hide_short_secrets(module: AnsibleModule, spec: Mapping[str, Any]) -> None:
    """Hide short secrets in the options that the answer quotes, and nowhere else.

    Ansible replaces a secret wherever it is part of a value. One of one or two characters would turn every answer into
    asterisks, VMIDs and exit statuses included.
    """
    module.params = hide_options(module.params, spec)
    if any(len(text) < SHORTEST_SECRET for text in database_address.find_passwords(str(module.params.get("database")))):
        module.params["database"] = HIDDEN
    module.no_log_values = {value for value in module.no_log_values if len(str(value)) >= SHORTEST_SECRET}


def hide_options(options: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the options without the values of those that the spec calls secret (``no_log``)."""
    shown = dict(options)
    for name, rule in spec.items():
        value = shown.get(name)
        if value is not None and rule.get("no_log"):
            shown[name] = HIDDEN
        elif isinstance(value, list) and "options" in rule:
            shown[name] = [hide_options(item, rule["options"]) if isinstance(item, dict) else item for item in value]
    return shown


# Ansible's refusal of a value that it cannot convert; in older releases with the Python type of the value.
_WRONG_TYPE = re.compile(
    r"argument '(?P<option>\w+)' is of type .*? and we were unable to convert to (?P<kind>int|bool|dict|list|float)\b",
    re.S,
)
_KINDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list, or a text with one item a line",
    "float": "a number",
}


# Ansible's other refusals of what stands in items; none of them says which item it is.
_UNSUPPORTED = re.compile(
    r"module: items\.(?P<option>[^.,]+)[.,].*?Supported parameters include: (?P<valid>.+?)\.?$", re.S
)
_NO_CHOICE = re.compile(
    r"value of (?P<option>\w+) must be one of: (?P<valid>.*?), got: (?P<value>.*?) found in items", re.S
)
_CONVERTERS = {
    "int": validation.check_type_int,
    "bool": validation.check_type_bool,
    "dict": validation.check_type_dict,
    "list": validation.check_type_list,
    "float": validation.check_type_float,
}


def place_item(number: int, item: object) -> str:
    """Return where an item stands in ``items``, and its name or VMID: ``items[1] (agent-2)``."""
    values = item if isinstance(item, Mapping) else {}
    words = {key: str(value).strip() for key, value in values.items() if isinstance(value, (str, int)) and value}
    known = {key: escape_controls(words[key])[:80] for key in ("name", "vmid") if words.get(key)}
    of = known.get("name") or (f"vmid {known['vmid']}" if known else "")
    return f"items[{number}]{f' ({of})' if of else ''}"


def read_items(value: object) -> list[dict[str, Any]]:
    """Return ``items`` as mappings. Raises InvalidInput for a value that is no list of mappings.

    Ansible would refuse such a value too, but before it knows the secrets of the task, and so would show them.
    """
    try:
        entries = validation.check_type_list(value)
    except TypeError:
        raise InvalidInput(
            "items: is not a list. Valid: a list of mappings of options, such as [{name: agent-1}]", option="items"
        ) from None
    items: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        try:
            items.append(validation.check_type_dict(entry))
        except TypeError:
            raise InvalidInput(
                f"items[{number}]: is not a mapping. Valid: a mapping of options, such as {{name: agent-1}}",
                option="items",
                index=number,
            ) from None
    return items


def _find_item(options: Mapping[str, Any], is_it: Callable[[Any], bool]) -> str:
    """Return the place of the first of ``items`` of which ``is_it`` is true; the option's name if there is none."""
    listed = options.get("items")
    items = listed if isinstance(listed, list) else []
    return next((place_item(number, item) for number, item in enumerate(items) if is_it(item)), "items")


def _converts(value: object, kind: str) -> bool:
    try:
        _CONVERTERS[kind](value)
    except (TypeError, ValueError):
        return False
    return True


def explain_refusal(message: str, options: Mapping[str, Any]) -> str:
    """Return Ansible's refusal of options in the words that we use; other messages as they are.

    ``options`` are the task's. Of a value of a wrong type Ansible names the type, not the value and not what is valid;
    of what stands in ``items`` it does not name the item.
    """
    refusal = _UNSUPPORTED.search(message)
    if refusal is not None:
        option = refusal["option"]
        place = _find_item(options, lambda item: isinstance(item, dict) and option in item)
        return f"{place}: {option}: there is no such option. Valid: {refusal['valid']}"
    refusal = _NO_CHOICE.search(message)
    if refusal is not None:
        option, text = refusal["option"], refusal["value"]
        place = _find_item(options, lambda item: isinstance(item, dict) and str(item.get(option)) == text)
        return f"{place}: {option}: {patterns.show_value(text)} is not valid. Valid: {refusal['valid']}"
    refusal = _WRONG_TYPE.search(message)
    if refusal is None:
        return message
    option, kind = refusal["option"], refusal["kind"]
    valid = patterns.describe_number(option) if kind == "int" else _KINDS[kind]
    if "found in 'items'" in refusal[0]:
        listed = options.get("items")
        items = [item for item in (listed if isinstance(listed, list) else ()) if isinstance(item, dict)]
        wrong = [item for item in items if item.get(option) is not None and not _converts(item[option], kind)]
        values = [item[option] for item in wrong]
        option = f"{_find_item(options, lambda item: item in wrong)}: {option}"
    else:
        values = [options[option]] if option in options else []
    value = f"{patterns.show_value(values[0])}" if values else "the value"
    problem = "is not a VMID" if refusal["option"] in ("vmid", "vmids") else "is not valid"
    return f"{option}: {value} {problem}. Valid: {valid}"


def _extra(error: AgentlabError) -> dict[str, Any]:
    return {name: error.detail[name] for name in ("count", "drift", "would_prune") if name in error.detail}


def _actor(module: AnsibleModule) -> str:
    return name_actor(module.params.get("actor"), module._name)


def name_actor(option: str | None, through: str) -> str:
    """Return who acts, for the events: the option, or else the user who ran Ansible (before sudo) and through what."""
    if option:
        return str(option)[:200]
    job = os.environ.get("AWX_JOB_ID") or os.environ.get("JOB_ID")
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user} ({through}{f', AWX job {job}' if job else ''})"


def ids(module: AnsibleModule) -> list[dict[str, Any]]:
    """Return what vmid, vmids or name ask for, each once and in order.

    Raises InvalidInput for a number that is no VMID.
    """
    params = module.params
    name = params["name"].strip() if isinstance(params.get("name"), str) else None
    if name is not None and params.get("vmid") is None:
        return [{"name": name}]
    option = "vmids" if params.get("vmids") is not None else "vmid"
    values: list[Any] = [params.get("vmid")]
    if option == "vmids":
        # A number is shown without quotes, as it was written in the list.
        words = patterns.split_words(params["vmids"])
        values = [word if (number := patterns.read_whole(word)) is None else number for word in words]
    vmids = [patterns.read_vmid(option, value) for value in values if value is not None]
    # Both for one sandbox: it is to be that one.
    named = {"name": name} if name is not None and params.get("state") != "present" else {}
    return [{"vmid": vmid, **named} for vmid in dict.fromkeys(vmids)]


def tags(module: AnsibleModule) -> list[str]:
    """Return the tags of the option ``tags``, in small letters."""
    return patterns.split_tags(module.params.get("tags"))


def states_of(module: AnsibleModule, valid: Sequence[str]) -> list[str] | None:
    """Return the states that the option ``states`` names, each once, or None where the option is not set.

    The names come in any case and as people paste them: one a line, or separated by commas. AnsibleModule would refuse
    a text of several lines before it can be split, so the option has no ``choices``. Raise InvalidInput for other
    words.
    """
    value = module.params.get("states")
    if value is None:
        return None
    names = list(dict.fromkeys(word.upper() for word in patterns.split_words(value)))
    for name in names:
        if name not in valid:
            raise InvalidInput(
                f"states: {patterns.quote_value(name)} is not valid. Valid: {', '.join(valid)}",
                option="states",
                value=name,
            )
    return names


def answer(
    outcomes: Sequence[Outcome], *, single: bool, diff: bool, items: Sequence[object] | None = None
) -> dict[str, Any]:
    """Return the answer of a module, in the same shape for 0, 1 and n items.

    A failed item fails the call, with all outcomes in the answer. ``items``: what was asked for by ``items``, in the
    order of the outcomes.
    """
    sandboxes = [outcome.sandbox for outcome in outcomes if outcome.sandbox is not None]
    failed = [outcome for outcome in outcomes if outcome.failed]
    result: dict[str, Any] = {
        "changed": any(outcome.changed for outcome in outcomes),
        "sandboxes": [_show_outcome(outcome) for outcome in outcomes if outcome.sandbox is not None],
        "results": [outcome.public(REMEDIES) for outcome in outcomes],
        "failed_count": len(failed),
        "warnings": [warning for outcome in outcomes for warning in outcome.explain_warnings(REMEDIES)],
    }
    if single:
        result["sandbox"] = result["sandboxes"][0] if sandboxes else None
        if failed and failed[0].error is not None:
            result["error"] = failed[0].error.as_dict(REMEDIES)
    if diff:
        result["diff"] = difference(outcomes)
    if failed:
        result["failed"] = True
        first = failed[0].explain(REMEDIES) or failed[0].reason or "failed"
        if items is not None:
            number = next(number for number, outcome in enumerate(outcomes) if outcome.failed)
            first = f"{place_item(number, items[number])}: {first}"
        result["msg"] = (
            first if len(outcomes) == 1 else f"{len(failed)} of {len(outcomes)} sandboxes failed; the first: {first}"
        )
    return result


def _show_outcome(outcome: Outcome) -> dict[str, Any]:
    shown = outcome.sandbox.public() if outcome.sandbox else {}
    if outcome.changed and outcome.state:
        # In check mode the record is as it was; the answer tells what it would be.
        shown["state"] = outcome.state
        shown.update({name: value for name, value in (outcome.extra.get("after") or {}).items() if name in shown})
    return shown


def difference(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the changed sandboxes before and after, by VMID, for diff mode."""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for outcome in outcomes:
        if not outcome.changed:
            continue
        key = f"sandbox {outcome.vmid}"
        old: dict[str, Any] = {"state": outcome.previous_state}
        new: dict[str, Any] = {"state": outcome.state}
        for name, value in (outcome.extra.get("after") or {}).items():
            old[name], new[name] = (outcome.extra.get("before") or {}).get(name), value
        if "lease_expires_at" in outcome.extra:
            new["lease_expires_at"] = outcome.extra["lease_expires_at"]
            old["lease_expires_at"] = outcome.extra.get("was")
        before[key], after[key] = old, new
    return {"before": before, "after": after}


def public(sandboxes: Sequence[Sandbox]) -> list[dict[str, Any]]:
    """Return sandboxes in the shape of every answer."""
    return [sandbox.public() for sandbox in sandboxes]
