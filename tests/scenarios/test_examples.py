# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The examples of every module and of the inventory plugin, as ansible-doc shows them, run in real playbooks.

Only what lies outside of a test is replaced: the address of AWX, folders of the root user and programs in a guest.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.awx import TOKEN, Awx
from support.awx_setup import add_prerequisites
from support.play import REPO, Run, play, run_command

MODULES = sorted(path.stem for path in (REPO / "plugins" / "modules").glob("agentlab_*.py"))
PLUGINS = "ansible_collections.agentlab.proxmox.plugins"
# The program of each example in a guest.
PROGRAMS = {
    "git": 'mkdir -p "$3/.git"',
    "make": "echo tested",
    "login": "cat >/dev/null",
    "agent": 'echo "$2"',
}


@pytest.fixture
def run_examples(env: dict[str, str], tmp_path: Path, server: Any) -> Callable[..., Run]:
    """run_examples(module, old=new, ...): run its examples with these texts replaced; the run."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "yolo-ephemeral.yaml").write_text("lease: {default: 2h}\n", encoding="utf-8")
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {tmp_path}/profiles\n")

    def run(module: str, replaced: dict[str, str], **more: str) -> Run:
        text = importlib.import_module(f"{PLUGINS}.modules.{module}").EXAMPLES
        for old, new in replaced.items():
            assert old in text, f"the examples of {module} do not hold {old!r} any more"
            text = text.replace(old, new)
        variables = {"password": "made up", "task": "write a page"}
        return play([{**t, "vars": variables} for t in yaml.safe_load(text)], {**env, **more}, tmp_path, pve=server.pve)

    return run


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(
    run_examples: Callable[..., Run], given: Any, tmp_path: Path, server: Any, module: str
) -> None:
    replaced: dict[str, str] = {}
    more: dict[str, str] = {}
    awx = None
    if module == "agentlab_awx_setup":
        awx = Awx()
        add_prerequisites(awx, 1)
        replaced, more = {"https://awx.example.net": awx.url}, {"CONTROLLER_OAUTH_TOKEN": TOKEN}
    elif module != "agentlab_sandbox":
        given(1, name="agent-1")
        if module == "agentlab_workspace_info":
            run_examples("agentlab_workspace", {"state: absent": "state: present", "    force: true\n": ""}).ok()
    if module == "agentlab_doctor":
        replaced = {"/root/": f"{tmp_path}/"}
    elif module == "agentlab_exec":
        guest = server.pve.machine(1000)
        programs = guest.folder / "run" / "bin"
        programs.mkdir()
        programs.chmod(0o755)
        for name, body in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
            (programs / name).chmod(0o755)
        guest.path = f"{programs}:{guest.path}"
        project = f"{guest.folder}/run/project"
        # Commands in these guests run as one ordinary user, who cannot become another.
        replaced = {
            "/srv/project": project,
            "./login": "login",
            "/usr/local/bin/agent": f"{programs}/agent",
            "    user: agent\n": "",
        }
    try:
        run = run_examples(module, replaced, **more)
        assert run.rc == 0 and not run.warnings, run.output
        assert {entry["status"] for entry in run.results} <= {"ok", "changed"}, run.output
    finally:
        if awx is not None:
            awx.stop()
    if module == "agentlab_exec":
        assert run["Start a command that runs for hours"]["run_id"] == run["Wait for the end of the command"]["run_id"]
        assert run["Wait for the end of the command"]["stdout"] == "write a page\n"
    elif module == "agentlab_doctor":
        assert (tmp_path / "agentlab-bundle.json").is_file()


def test_the_examples_of_the_inventory_run(env: dict[str, str], given: Any, tmp_path: Path) -> None:
    given(1, name="agent-1", tags=["ci"])
    text = importlib.import_module(f"{PLUGINS}.inventory.sandboxes").EXAMPLES
    first, second = text.split("# Another file: ", 1)
    (tmp_path / "lab.agentlab.yml").write_text(first, encoding="utf-8")
    run = run_command(["ansible-inventory", "-i", f"{tmp_path}/lab.agentlab.yml", "--list"], env, tmp_path).ok()
    answer = json.loads(run.stdout)
    assert answer["tag_ci"]["hosts"] == answer["running"]["hosts"] == ["agent-1"]
    assert answer["_meta"]["hostvars"]["agent-1"]["ansible_user"] in ("debian", {"__ansible_unsafe": "debian"})
    # The second one asks a daemon: that its options are those of the plugin is all that can be seen here.
    options = yaml.safe_load("\n".join(line.removeprefix("# ") for line in second.splitlines()[1:]))
    plugin = importlib.import_module(f"{PLUGINS}.inventory.sandboxes")
    assert {"socket", "states", "connection", "cache"} <= set(options)
    documented = set(yaml.safe_load(plugin.DOCUMENTATION)["options"])
    cache = {"cache", "cache_plugin", "cache_connection", "cache_timeout"}
    assert set(options) <= documented | cache, set(options) - documented
