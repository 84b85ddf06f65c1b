# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every module has its scenarios, and argument spec, documentation and action group say the same."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (REPO / "plugins" / "modules").glob("*.py") if path.stem != "__init__")
# It speaks to AWX, not to Proxmox VE: it has none of the options that the group sets.
OUTSIDE_THE_GROUP = {"agentlab_awx_setup"}


def module_of(name: str) -> Any:
    return importlib.import_module(f"ansible_collections.agentlab.proxmox.plugins.modules.{name}")


def documented(name: str) -> dict[str, Any]:
    """The options as the documentation says, with those of the fragments."""
    fragments = importlib.import_module(
        "ansible_collections.agentlab.proxmox.plugins.doc_fragments.common"
    ).ModuleDocFragment
    documentation = yaml.safe_load(module_of(name).DOCUMENTATION)
    options = dict(documentation.get("options") or {})
    for fragment in documentation.get("extends_documentation_fragment") or ():
        part = fragment.removeprefix("agentlab.proxmox.common").strip(".").upper() or "DOCUMENTATION"
        for option, value in (yaml.safe_load(getattr(fragments, part)).get("options") or {}).items():
            options.setdefault(option, value)
    return options


def test_there_are_modules() -> None:
    assert len(MODULES) >= 5


@pytest.mark.parametrize("name", MODULES)
def test_it_has_a_scenario(name: str) -> None:
    path = REPO / "tests" / "scenarios" / f"test_{name}.py"
    assert path.is_file(), f"write tests/scenarios/test_{name}.py"
    text = path.read_text(encoding="utf-8")
    assert f'"{name}"' in text and "def test_" in text and "check=True" in text, (
        f"{path.name} does not run {name}, or not in check mode"
    )
    # What agentlab_workspace_info shows is looked at in the life of a workspace.
    assert "@pytest.mark.everyday\n" in text or name == "agentlab_workspace_info", (
        f"mark one scenario of {path.name} as everyday"
    )


@pytest.mark.parametrize("name", MODULES)
def test_documentation_and_argument_spec_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Stopped(Exception):
        pass

    def module(*, argument_spec: dict[str, Any], **kwargs: Any) -> Any:
        given.update(argument_spec=argument_spec, **kwargs)
        raise Stopped

    # Given as an argument where main() takes one: its default is bound when another test imports the module first.
    if name in OUTSIDE_THE_GROUP:
        monkeypatch.setattr(module_of(name), "AnsibleModule", module)
    with pytest.raises(Stopped):
        module_of(name).main(**({} if name in OUTSIDE_THE_GROUP else {"module_class": module}))
    assert given["supports_check_mode"] is True
    spec, options = given["argument_spec"], documented(name)
    assert sorted(spec) == sorted(options)
    for option, value in spec.items():
        told = options[option]
        for key, default in (
            ("type", "str"),
            ("elements", None),
            ("required", False),
            ("default", None),
            ("choices", None),
        ):
            assert value.get(key, default) == told.get(key, default), (option, key)
        assert told.get("description"), option
        if any(word in option for word in ("password", "secret")) and value["type"] != "bool":
            assert value.get("no_log") is True, option


@pytest.mark.parametrize("name", MODULES)
def test_it_is_documented_in_full(name: str) -> None:
    module = module_of(name)
    documentation = yaml.safe_load(module.DOCUMENTATION)
    assert documentation["module"] == name and documentation["version_added"]
    examples, returned = yaml.safe_load(module.EXAMPLES), yaml.safe_load(module.RETURN)
    assert examples and returned
    options = set(documented(name))
    for example in examples:
        used = example.get(f"agentlab.proxmox.{name}", {}) or {}
        assert f"agentlab.proxmox.{name}" in example and set(used) <= options, example


def test_the_action_group_names_every_module() -> None:
    runtime = yaml.safe_load((REPO / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    assert sorted(runtime["action_groups"]["agentlab"]) == sorted(set(MODULES) - OUTSIDE_THE_GROUP)
