# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What agentlab_exec makes of its options, and what it keeps out of answers and logs. No guest is needed."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils import _exec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandResult
from ansible_collections.agentlab.proxmox.plugins.modules import agentlab_exec


def options(**values: Any) -> dict[str, Any]:
    """Return all options of the module, with their defaults."""
    return {name: values.get(name, spec.get("default")) for name, spec in agentlab_exec.ARGUMENT_SPEC.items()}


@pytest.mark.parametrize(
    ("encoding", "text", "data"),
    [
        ("utf-8", "ä€", "ä€".encode()),
        ("latin-1", "äÿ", b"\xe4\xff"),
        ("base64", base64.b64encode(b"\0\xff\n").decode(), b"\0\xff\n"),
        ("base64", None, b""),
    ],
)
def test_standard_input_is_read_as_encoding_says(encoding: str, text: str | None, data: bytes) -> None:
    assert _exec._spec(options(argv=["cat"], stdin=text, encoding=encoding), 60).stdin == data


@pytest.mark.parametrize(("encoding", "text"), [("base64", "not base64!"), ("base64", "YQ"), ("latin-1", "€")])
def test_standard_input_that_is_something_else_is_refused(encoding: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"stdin: is not {encoding}") as caught:
        _exec._spec(options(argv=["cat"], stdin=text, encoding=encoding), 60)
    assert text not in str(caught.value)


SECRETS = {
    "stdin": {"stdin": "s3cret-in\n"},
    "line": {"stdin": "BEGIN KEY\ns3cret-in\nEND KEY\n"},
    "base64": {"stdin": base64.b64encode(b"s3cret-in\n").decode(), "encoding": "base64"},
    "environment": {"environment": {"A": "s3cret-in", "B": 4711}},
    "environment of two lines": {"environment": {"A": "a\ns3cret-in"}},
    "one letter": {"stdin": "~", "environment": {"A": "s3cret-in", "B": "^"}},
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_no_part_of_the_log_of_a_shipped_module(case: str) -> None:
    """AnsibleModule writes all options to the log of the target while it is made, before the module can say a word."""
    front = agentlab_exec.main.__defaults__[0]
    module = object.__new__(front)
    lines: list[str] = []
    module.params = options(argv=["cat"], secret=True, **SECRETS[case])
    module.argument_spec, module.aliases, module.no_log_values = agentlab_exec.ARGUMENT_SPEC, {}, set()
    module.log = lambda message, log_args=None: lines.append(f"{message} {log_args}")
    module._log_invocation()
    assert "argv=" in lines[0] and not any(word in lines[0] for word in ("s3cret-in", "~", "^"))
    assert module.params["stdin"] == SECRETS[case].get("stdin"), "the module itself works with what it was given"
    if "stdin" in SECRETS[case]:
        assert SECRETS[case]["stdin"].strip() not in lines[0]


def test_without_secret_nothing_is_hidden() -> None:
    assert _exec.find_secrets(options(stdin="x" * 20, environment={"A": "y" * 20})) == set()
    assert "ab" not in _exec.find_secrets(options(stdin="ab\n" + "x" * 20, secret=True))


def test_base64_hides_a_secret_in_the_output() -> None:
    """Ansible replaces a secret in texts, and finds none inside base64."""
    stdin = base64.b64encode(b"s3cret-in\n").decode()
    module: Any = SimpleNamespace(params=options(argv=["cat"], stdin=stdin, encoding="base64", secret=True))
    result = CommandResult("1" * 32, "ended", 0, stdout=b"<s3cret-in>\n", stderr=b"plain")
    answer = _exec._answer(module, SimpleNamespace(vmid=1000), result)  # type: ignore[arg-type]
    assert base64.b64decode(answer["stdout"]) == b"<********>\n"
    assert base64.b64decode(answer["stderr"]) == b"plain"


def test_an_empty_name_is_told_as_empty() -> None:
    module: Any = SimpleNamespace(params=options(argv=["true"], name=" "), no_log_values=set())
    with pytest.raises(InvalidInput, match="name: is empty. Give the name of a sandbox, or vmid"):
        _exec.run(module, None)  # type: ignore[arg-type]
