# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The core names a remedy; each interface says it in its own words. No option of an interface stands in the core."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import REMEDIES, InvalidInput, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Outcome

from support.daemon import in_daemon

CORE = Path(__file__).resolve().parents[2] / "plugins/module_utils/_core"
# How a module is told to do something all the same, and how the command line is.
_OPTION = re.compile(
    r"\b(force|update|allow_restart|protected)=(true|false)|state=absent|--(force|update|allow-restart)\b"
)
# What the doctor advises are commands to be typed; what the modules of the core say to each other is no option.
_EXEMPT = ("doctor/",)


def texts(folder: Path) -> list[tuple[str, str]]:
    """Return the place and the text of each string of the core that is no docstring."""
    result = []
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                result.append((f"{name}:{node.lineno}", node.value))
    return result


def test_every_interface_has_words_for_each_remedy() -> None:
    code = "import json; from agentlabd.http.answers import REMEDIES; print(json.dumps(REMEDIES))"
    api = in_daemon(code)
    assert set(api) == set(_adapter.REMEDIES) == set(REMEDIES)
    assert not any(re.search("=(true|false)", sentence) or "agentlab_" in sentence for sentence in api.values())
    assert not any("--" in sentence or "agentlab " in sentence for sentence in _adapter.REMEDIES.values())


def test_the_core_names_only_remedies_that_there_are() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in CORE.rglob("*.py"))
    named = set(re.findall(r"""remedy["']?\s*[=:]\s*["'](\w+)["']""", code))
    assert {"remove", "discard_memory", "delete_workspace"} <= named <= set(REMEDIES)


def test_no_option_of_an_interface_stands_in_the_core() -> None:
    assert [
        (place, text) for place, text in texts(CORE) if _OPTION.search(text) and not place.startswith(_EXEMPT)
    ] == []


def test_the_guard_sees_an_option(tmp_path: Path) -> None:
    (tmp_path / "power.py").write_text('"""Use --force."""\nMESSAGE = f"stop it with --force, {1}"\n')
    assert [text for _place, text in texts(tmp_path) if _OPTION.search(text)] == ["stop it with --force, "]


@pytest.mark.parametrize("remedy", [None, *REMEDIES])
def test_an_error_is_told_with_its_remedy(remedy: str | None) -> None:
    error = InvalidInput("cores: 3 is too few", option="cores", remedy=remedy)
    words = _adapter.REMEDIES
    sentence = f"cores: 3 is too few. {words[remedy]}" if remedy else "cores: 3 is too few"
    assert error.explain(words) == sentence == error.as_dict(words)["message"]
    assert error.as_dict().get("remedy") == remedy and error.as_dict()["message"] == "cores: 3 is too few"
    outcome = Outcome("failed", message=error.message, remedy=error.remedy, failed=True)
    assert outcome.public(words)["message"] == sentence and outcome.public()["message"] == error.message


def test_a_remedy_is_data_of_every_kind_of_error() -> None:
    assert Kept("busy", "sandbox 1 is in use", remedy="force").as_dict()["remedy"] == "force"
