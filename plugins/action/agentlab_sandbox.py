# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The action plugin of every module in the collection (meta/runtime.yml). It saves starting a second Python.

If the task would run on this host, as this user and with the Python that runs Ansible, the module runs inside this
process: nothing is packed, copied or started. Otherwise the module is shipped to the host like any other module. Both
ways run the same ``main`` and give the same answer.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from ansible import constants as C
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator
from ansible.module_utils.common.parameters import remove_values
from ansible.module_utils.errors import UnsupportedError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.parsing.ajson import AnsibleJSONEncoder
from ansible.plugins.action import ActionBase
from ansible.plugins.action.normal import ActionModule as ShippedModule
from ansible.utils.display import Display

_MODULES = "ansible_collections.agentlab.proxmox.plugins.modules"
_STOPS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_STOP = 5

display = Display()

# Options whose value is a word. Ansible would turn a boolean into the text True or False.
_WORDS = ("name", "profile", "template", "node", "storage", "pool", "bridge", "workspace", "cloud_init_user", "tags")


class _Ended(BaseException):
    """Carry a module's result out of ``main()``.

    It derives from BaseException, like SystemExit, so that no ``except Exception`` swallows it.
    """

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__()
        self.answer = answer


class _Here:
    """Replace AnsibleModule for a module that runs in this process.

    It has the attributes that our modules use. It checks options with the same validator, and removes secrets from
    answers.
    """

    def __init__(
        self,
        action: ActionBase,
        task_vars: dict[str, Any],
        argument_spec: dict[str, Any],
        *,
        supports_check_mode: bool,
        **rules: Any,
    ) -> None:
        # All our modules support check mode.
        del supports_check_mode
        self._name = action._task.action
        self.check_mode = action._task.check_mode
        self._diff = action._task.diff
        self._warnings: list[str] = []
        # From ansible-core 2.21 on, results contain the invocation only on request.
        self._tells_options = (
            "INJECT_INVOCATION" not in C.config.get_configuration_definitions()
            or C.config.get_config_value("INJECT_INVOCATION", variables=task_vars)
        )
        # Convert the options to the plain values that a shipped module would receive, with vault data as text.
        self.params = json.loads(json.dumps(action._task.args, cls=AnsibleJSONEncoder, vault_to_text=True))
        checked = ModuleArgumentSpecValidator(argument_spec, **rules).validate(self.params)
        self.params.update(checked.validated_parameters)
        self.no_log_values: set[str] = set(checked._no_log_values)
        if checked.error_messages:
            unsupported = isinstance(checked.errors[0], UnsupportedError)
            self.fail_json(
                msg=f"Unsupported parameters for ({self._name}) module: {checked.errors.msg}"
                if unsupported
                else checked.errors.msg
            )

    def warn(self, warning: str) -> None:
        if warning not in self._warnings:
            self._warnings.append(warning)

    def fail_json(self, msg: str, **more: Any) -> NoReturn:
        self.exit_json(**{**more, "failed": True, "msg": msg})

    def exit_json(self, **answer: Any) -> NoReturn:
        if self._tells_options:
            answer["invocation"] = {"module_args": self.params}
        if self._warnings:
            answer["warnings"] = self._warnings
        # Convert the answer through JSON, so that registered results are the same as those of a shipped module.
        raise _Ended(json.loads(json.dumps(remove_values(answer, self.no_log_values))))


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    """Raise KeyboardInterrupt when Ansible is told to stop, and start an alarm.

    Ansible passes the signal on more than once, so further signals are ignored. The exception lets the module release
    its claims. If that takes too long, the alarm ends this process, and the next run finishes by the journal.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(_SECONDS_TO_STOP)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _separate_process(folder: str) -> Iterator[None]:
    """Imitate a separate process.

    Set the working directory, turn SIGINT and SIGTERM into an exception, and silence warnings of libraries, which
    Ansible would report as stray output.
    """
    handlers = {number: signal.signal(number, _interrupt) for number in _STOPS}
    previous_folder = os.getcwd()
    try:
        os.chdir(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # This user may not be allowed to enter the folder in which Ansible was started. The answer counts all the same.
        with contextlib.suppress(OSError):
            os.chdir(previous_folder)
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _import_adapter() -> Any:
    """Return the adapter, which most runs in this process have imported already."""
    return importlib.import_module(f"{_MODULES.rpartition('.')[0]}.module_utils._adapter")


class ActionModule(ShippedModule):
    """Run a module in this process, or ship it."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = task_vars or {}
        for name in ("api_password", "api_token_id", "api_token_secret", "database_password"):
            # Check here: later the option's type has turned the value into text, and 012345 has become 5349.
            if isinstance(self._task.args.get(name), (bool, int, float, datetime.date)):
                raise AnsibleActionFail(
                    f"{name}: YAML reads the value as a number, a date or a boolean, not as text, which would change "
                    "it; put it in quotes"
                )
        args = self._check_items()
        for number, options in enumerate([args, *(args.get("items") or ())]):
            for name in _WORDS if isinstance(options, dict) else ():
                value = options.get(name)
                if any(isinstance(word, bool) for word in (value if isinstance(value, list) else [value])):
                    place = f"{_import_adapter().place_item(number - 1, options)}: " if number else ""
                    raise AnsibleActionFail(
                        f"{place}{name}: YAML reads a word such as yes, no, on or off as true or false, not as text; "
                        "put it in quotes"
                    )
        result = self._run_module(tmp, variables)
        message = result.get("msg")
        is_refusal = isinstance(message, str) and ("unable to convert" in message or args.get("items") is not None)
        if result.get("failed") and is_refusal:
            result["msg"] = _import_adapter().explain_refusal(str(message), args)
        return result

    def _check_items(self) -> dict[str, Any]:
        """Return the options of the task, with ``items`` as mappings. Refuse items that are none."""
        args: dict[str, Any] = self._task.args
        if "items" not in args:
            return args
        if args["items"] is None:
            if any(args.get(name) is not None for name in ("vmid", "vmids", "name")):
                return args
            # Ansible reads a null as an option that is left out, and that creates one sandbox without a name.
            raise AnsibleActionFail(
                "items: is null. Valid: a list of mappings of options, or [] for no sandbox. Leave items out to create "
                "one sandbox (in a playbook: | default(omit, true))"
            )
        adapter = _import_adapter()
        try:
            return {**args, "items": adapter.read_items(args["items"])}
        except adapter.AgentlabError as error:
            raise AnsibleActionFail(error.message) from None

    def _run_module(self, tmp: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        """Run the module in this process where that is possible, and return its result."""
        if not self._is_here(variables):
            answer: dict[str, Any] = super().run(tmp, variables)
            return answer
        result: dict[str, Any] = ActionBase.run(self, tmp, variables)
        # Another collection may redirect its own name to our module.
        resolved = self._shared_loader_obj.module_loader.find_plugin_with_context(
            self._task.action, collection_list=self._task.collections
        )
        name = resolved.resolved_fqcn.rpartition(".")[2]
        display.vvv(f"Running {name} in place, see agentlab_in_place")
        try:
            with _separate_process(self._loader.get_basedir()):
                importlib.import_module(f"{_MODULES}.{name}").main(lambda **options: _Here(self, variables, **options))
        except _Ended as ended:
            result.update(ended.answer)
        except KeyboardInterrupt:
            # End as a worker of Ansible does. From ansible-core 2.21 on, any other end shows a traceback.
            signal.raise_signal(signal.SIGTERM)
            raise
        return result

    def _is_here(self, task_vars: dict[str, Any]) -> bool:
        """Return whether the module can run in this process: docs/performance.md names the conditions."""
        task = self._task
        if (
            self._connection.transport != "local"
            or self._connection.become
            or task.async_val
            or task.timeout
            or any(task.environment)
        ):
            return False
        if task.delegate_to:
            task_vars = task_vars.get("ansible_delegated_vars", {}).get(task.delegate_to, {})
        setting = self._templar.template(task_vars.get("agentlab_in_place"))
        try:
            if setting is not None and not boolean(setting):
                return False
        except TypeError as error:
            raise AnsibleActionFail(f"agentlab_in_place: {error}") from None
        python = C.config.get_config_value("INTERPRETER_PYTHON", variables=task_vars)
        return bool(self._templar.template(python) == sys.executable)
