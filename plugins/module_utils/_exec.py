# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The wiring of agentlab_exec."""

from __future__ import annotations

import base64
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from . import _adapter
from ._core import durations
from ._core.context import Context
from ._core.errors import InvalidInput
from ._core.guest import command
from ._core.guest.access import Guest
from ._core.model import Sandbox

# Characters of a line of a secret that is hidden by itself, too. Shorter ones are part of ordinary output.
_SECRET_LINE = 8


def run(module: AnsibleModule, context: Context) -> dict[str, Any]:
    """Run, begin, look at or end a command, as the options say."""
    module.no_log_values.update(find_secrets(module.params))
    try:
        return _run(module, context)
    finally:
        # The answer quotes the options.
        module.params = hide_options(module.params)


def hide_options(params: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the options without the values that are secret, however short they are."""
    if not params["secret"]:
        return params
    hidden = dict(params)
    if hidden["stdin"] is not None:
        hidden["stdin"] = _adapter.HIDDEN
    if isinstance(hidden["environment"], dict):
        hidden["environment"] = dict.fromkeys(hidden["environment"], _adapter.HIDDEN)
    return hidden


def _run(module: AnsibleModule, context: Context) -> dict[str, Any]:
    params = module.params
    timeout = _seconds(params["timeout"])
    if params["name"] is not None and not params["name"].strip():
        raise InvalidInput("name: is empty. Give the name of a sandbox, or vmid", option="name")
    sandbox = context.select_sandbox(**_adapter.ids(module)[0])
    action = params["action"]
    if action in ("run", "start"):
        spec = _spec(params, timeout)
        command.prepare_command(spec)
        if context.dry_run:
            Guest.enter(context, sandbox)
            return _answer(module, sandbox, command.CommandResult("", "would_run"), changed=True)
        work = command.run_command if action == "run" else command.start_command
        return _answer(module, sandbox, work(context, sandbox, spec))
    run_id = command.normalise_id(params["run_id"])
    if action == "kill":
        if context.dry_run:
            Guest.enter(context, sandbox)
            return _answer(module, sandbox, command.CommandResult(run_id, "would_kill"), changed=True)
        return _answer(module, sandbox, command.kill_command(context, sandbox, run_id), failing=False)
    if action == "status":
        result = command.read_run(context, sandbox, run_id, limit=params["max_output"])
        return _answer(module, sandbox, result, changed=False, failing=False)
    return _answer(module, sandbox, command.wait_command(context, sandbox, run_id, timeout=timeout), changed=False)


def find_secrets(params: dict[str, Any]) -> set[str]:
    """Return what Ansible must neither show nor log: the values of stdin and environment, where ``secret`` says so.

    A command often prints a secret without the line feed that ended it, or a line of it alone. So the value without
    blanks around it is secret, and so is each line of eight characters or more. ``stdin`` in base64 is secret in both
    forms. A value of fewer than SHORTEST_SECRET characters is not looked for: it is part of ordinary output.
    """
    if not params["secret"]:
        return set()
    environment = params["environment"]
    values = [params["stdin"], *(environment.values() if isinstance(environment, dict) else ())]
    texts = [str(value) for value in values if value is not None]
    if params["stdin"] and params["encoding"] == "base64":
        try:
            texts.append(base64.b64decode(params["stdin"]).decode("utf-8", "replace"))
        except ValueError:
            # It is refused later.
            pass
    # The log shows environment as Python writes a dict.
    secrets = {form for text in texts for form in (text, text.strip(), repr(text)[1:-1])}
    secrets.update(line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= _SECRET_LINE)
    return {secret for secret in secrets if len(secret) >= _adapter.SHORTEST_SECRET}


def _input(params: dict[str, Any]) -> bytes:
    """Return standard input as bytes, read by ``encoding`` as the output is written; InvalidInput if it cannot be."""
    text, encoding = params["stdin"] or "", params["encoding"]
    if encoding == "utf-8":
        return command.encode_text(text)
    try:
        return base64.b64decode(text, validate=True) if encoding == "base64" else text.encode(encoding)
    except ValueError:
        raise InvalidInput(
            f"stdin: is not {encoding}, which encoding says it is. Give it as {encoding}, or set encoding to utf-8",
            option="stdin",
        ) from None


def _seconds(value: str) -> float:
    text = value.strip()
    if text.isdecimal() and len(text) < 10:
        return int(text)
    return durations.parse(text, "timeout", valid=durations.VALID_SECONDS)


def _spec(params: dict[str, Any], timeout: float) -> command.CommandSpec:
    environment = params["environment"] or {}
    for name, value in environment.items():
        if isinstance(value, (dict, list)) or value is None:
            raise InvalidInput(
                f"environment: {name} is no text. Valid: texts and numbers; put other values in quotes, or leave it "
                "out",
                option="environment",
            )
    return command.CommandSpec(
        argv=params["argv"],
        cmd=params["cmd"],
        stdin=_input(params),
        chdir=params["chdir"],
        environment={str(name): str(value) for name, value in environment.items()},
        user=params["user"],
        creates=params["creates"],
        removes=params["removes"],
        timeout=timeout,
        kill_after=params["kill_after"],
        max_output=params["max_output"],
        secret=params["secret"],
        log_command=params["log_command"],
        run_id=params["run_id"],
        wait_for_agent=params["wait_for_agent"],
    )


def _answer(
    module: AnsibleModule,
    sandbox: Sandbox,
    result: command.CommandResult,
    *,
    changed: bool | None = None,
    failing: bool = True,
) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "changed": result.changed if changed is None else changed,
        "vmid": sandbox.vmid,
        "run_id": result.run_id,
        "state": result.state,
        # Ansible calls a result with another rc failed, unless it says that it is not.
        "failed": False,
        "signal": result.signal,
        "truncated": result.truncated,
        "timed_out": result.timed_out,
        "duration_ms": result.duration_ms,
    }
    if result.rc is not None:
        answer["rc"] = result.rc
    encoding = module.params["encoding"]
    for name, data in (("stdout", result.stdout), ("stderr", result.stderr)):
        if encoding == "base64":
            # Ansible finds no secret inside base64.
            for secret in sorted(find_secrets(module.params), key=len, reverse=True):
                data = data.replace(secret.encode("utf-8", "surrogateescape"), b"********")
            answer[name] = base64.b64encode(data).decode()
        else:
            answer[name] = data.decode(encoding, "replace")
        # Ansible adds lines to what a shipped module answers, so a module in place adds them, too.
        answer[f"{name}_lines"] = answer[name].splitlines()
    if result.message:
        answer["msg"] = result.message
    if failing and result.timed_out:
        answer["failed"] = True
        answer["msg"] = (
            f"the command was ended after {module.params['timeout']} s (timeout); stdout and stderr have what it wrote"
        )
    elif failing and result.rc:
        answer["failed"] = True
        answer["msg"] = f"the command was ended by signal {result.signal}" if result.signal else "non-zero return code"
    return answer
