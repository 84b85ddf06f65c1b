# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lists that know the options of a creation agree. CONTRIBUTING.md ("To add an option") names the same places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import patterns, profiles
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import spec, wanted
from ansible_collections.agentlab.proxmox.plugins.modules import agentlab_sandbox

from support.daemon import in_daemon

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = set(wanted.OPTIONS)
# What a creation has besides them.
IDENTITY = {"vmid", "name"}
# Options of the module that are no option of a creation.
OF_THE_MODULE = {"vmids", "items", "state", "force", "wait_timeout"}
# What the API calls by another name too.
ALIASES = {"ttl_minutes", "workspace_id"}
# Why a profile does not set them: it is one; a workspace, a text and protection belong to one sandbox; secrets belong
# into no file that many read; the rest says what one run does.
NOT_IN_PROFILES = {
    "profile",
    "workspace",
    "description",
    "protected",
    "cloud_init_user_data",
    "cloud_init_password",
    "ttl",
    "wait_for_ip",
    "wait_for_cloud_init",
    "update",
    "allow_restart",
}
# Values that are a text in one line have a pattern; these are looked at in another way, or looked up.
WITHOUT_PATTERN = {
    "profile",
    "template",
    "workspace",
    "description",
    "cloud_init_user_data",
    "cloud_init_password",
    "network_model",
    "ttl",
}


def profile_options(keys: dict[str, Any] | None = None) -> set[str]:
    """The options that the keys of a profile fill in."""
    found: set[str] = set()
    for known in (keys or profiles._KEYS).values():
        found |= profile_options(known) if isinstance(known, dict) else {known[1]} if known[1] else set()
    return found


def test_the_spec_has_a_field_for_each() -> None:
    fields = set(spec.Spec.__dataclass_fields__)
    assert fields - {"given_options", "lease_maximum"} == OPTIONS | IDENTITY


def test_the_module_takes_and_describes_each() -> None:
    ours = {name for name in agentlab_sandbox.ARGUMENT_SPEC if name not in OF_THE_MODULE}
    assert ours == OPTIONS | IDENTITY
    described = yaml.safe_load(agentlab_sandbox.DOCUMENTATION)["options"]
    assert set(described) | {"vmid", "vmids", "name", "wait_timeout"} == set(agentlab_sandbox.ARGUMENT_SPEC)
    for name, options in described.items():
        takes = agentlab_sandbox.ARGUMENT_SPEC[name]
        assert options["type"] == takes["type"] and options.get("choices") == takes.get("choices"), name
        assert options.get("default") == takes.get("default") and options.get("elements") == takes.get("elements"), name
        assert options["description"], name


def test_an_item_takes_and_describes_each() -> None:
    items = agentlab_sandbox.ARGUMENT_SPEC["items"]["options"]
    assert set(items) == OPTIONS | IDENTITY
    described = yaml.safe_load(agentlab_sandbox.DOCUMENTATION)["options"]["items"]["suboptions"]
    assert set(described) == set(items)
    for name, takes in items.items():
        assert described[name]["type"] == takes["type"], name
        assert described[name].get("choices") == takes.get("choices"), name
        assert "default" not in takes, name


def test_the_module_refuses_each_with_another_state() -> None:
    without = {"wait_for_ip", "wait_for_cloud_init", "update", "allow_restart"}
    assert set(agentlab_sandbox.CREATION) == OPTIONS - without


def test_each_text_has_a_pattern_and_each_number_a_range() -> None:
    annotations = spec.Spec.__annotations__
    texts = {name for name in OPTIONS if annotations[name].startswith("str")}
    numbers = {name for name in OPTIONS if annotations[name].startswith("int")} - {"ttl"}
    assert set(spec._WORDS) - {"name"} == texts - WITHOUT_PATTERN
    assert set(patterns.RANGES) == numbers


def test_a_profile_fills_in_each_that_belongs_to_a_kind() -> None:
    assert profile_options() - {"lease_default", "lease_maximum"} == OPTIONS - NOT_IN_PROFILES
    assert profiles._TEXTS <= OPTIONS


def test_the_page_of_profiles_shows_each_key() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(name: yolo-ephemeral.*?)```", page, re.DOTALL)
    assert example

    def names(keys: dict[str, Any]) -> set[str]:
        return set(keys) | {name for value in keys.values() if isinstance(value, dict) for name in names(value)}

    assert names(yaml.safe_load(example[1])) == names(profiles._KEYS)


def test_the_api_takes_each() -> None:
    fields = in_daemon("import json; from agentlabd.http.creation import CREATION; print(json.dumps(sorted(CREATION)))")
    assert set(fields) == OPTIONS | IDENTITY | ALIASES


def test_the_command_line_sends_each() -> None:
    code = "import json; from agentlab_cli.sandbox import new; print(json.dumps(sorted(p.name for p in new.params)))"
    assert set(in_daemon(code)) >= OPTIONS | IDENTITY


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_page_of_the_command_line_shows_each(name: str) -> None:
    shown = {"tags": "--tag", "full_clone": "--full-clone"}.get(name, "--" + name.replace("_", "-"))
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    section = page[page.index("sandbox new [") :].partition("\n### ")[0]
    assert re.search(rf"(^|[\s/`]){re.escape(shown)}\b", section), shown


def test_contributing_names_the_places() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = (
        page[page.index("## To add an option") :].partition("\n## ")[2] and page[page.index("## To add an option") :]
    )
    for place in (
        "agentlab_sandbox.py",
        "wanted.py",
        "spec.py",
        "vm_config.py",
        "profiles.py",
        "http/creation.py",
        "agentlab_cli/sandbox.py",
        "cli_page.py",
        "docs/configuration.md",
        "test_options.py",
    ):
        assert place in section, place


def test_the_playbook_passes_each_option_on() -> None:
    play = yaml.safe_load((ROOT / "playbooks/sandbox_create.yml").read_text())[-1]
    task = play["tasks"][0]["agentlab.proxmox.agentlab_sandbox"]
    assert set(task) == OPTIONS | IDENTITY
    for name, text in task.items():
        assert f"sandbox_{name} |" in text, name
