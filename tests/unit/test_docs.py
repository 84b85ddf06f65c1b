# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The documentation says what the code does: tables are made from the rules, quoted messages and named tests exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, states

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CODE = "".join(path.read_text() for path in sorted((ROOT / "plugins").rglob("*.py")))


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def test_tables_are_made_from_the_rules() -> None:
    assert between((ROOT / "docs/architecture.md").read_text(), "transitions") == states.transition_table()
    assert between(README, "states") == states.state_table()
    assert between(README, "operations") == states.operation_table()


def test_the_diagram_of_the_states_is_current() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/state_diagram.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_diagram_draws_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("state_diagram", ROOT / "scripts/state_diagram.py")
    assert spec and spec.loader
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    with monkeypatch.context() as other:
        other.setitem(diagram.states.TRANSITIONS, "FAILED", ("DESTROYED",))
        with pytest.raises(SystemExit, match="not in the table: .*'FAILED', 'STOPPED'"):
            diagram.draw()
    with monkeypatch.context() as other:
        other.setitem(diagram.states.TRANSITIONS, "DESTROYED", ("REQUESTED",))
        with pytest.raises(SystemExit, match="not drawn: .*'DESTROYED', 'REQUESTED'"):
            diagram.draw()


def test_every_configuration_key_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", between((ROOT / "docs/configuration.md").read_text(), "configuration"), re.M))
    assert set(rows) == set(config.DEFAULTS)
    for key, default in config.DEFAULTS.items():
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[key].strip() == shown, key


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


SAFETY = (ROOT / "docs/safety.md").read_text()


def test_every_test_that_safety_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", SAFETY)
    assert len(named) > 30
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.M), f"{path}::{function}"


# Run in a process of its own, as `make faults-everyday` is: prints the way and the test of everything that the marker selects.
_COLLECT = """
import sys, pytest
class Show:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("selected", *{mark.args[0] for mark in item.iter_markers("way")}, item.nodeid.partition("[")[0])
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "way", "tests/faults"], plugins=[Show()]))
"""


def test_the_everyday_run_shows_each_of_the_thirteen_ways() -> None:
    """Every test of the table is selected by its marker under the number of its row, and every test that is selected stands in the table."""
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", SAFETY, re.M)
    table = {(int(number), name) for number, tests in rows for name in re.findall(r"`([^`]+)`", tests)}
    assert [int(number) for number, _tests in rows] == list(range(1, 14)) == sorted({number for number, _name in table})
    done = subprocess.run([sys.executable, "-c", _COLLECT], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    selected = {(int(number), name) for number, name in re.findall(r"^selected (\d+) (\S+)$", done.stdout, re.M)}
    assert selected == table
    recipe = re.search(r"^faults-everyday:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None and "tests/faults -m way" in recipe[1]
    assert "faults-everyday" in re.findall(r"^test:(.*?)##", (ROOT / "Makefile").read_text(), re.M)[0].split()


# Parts that the code puts in: numbers, names, states.
_FILLED = re.compile(r"\.\.\.|\d+|"
                     r"RUNNING|TIMEOUT|STOPPED|DESTROYED|Connection refused|force=true|Permission check failed.*|'|\(|\)|destroy sandbox|renew lease|,")


@pytest.mark.parametrize("message", re.findall(r"^\*\*`(.+?)`\*\*", (ROOT / "docs/troubleshooting.md").read_text(), re.M))
def test_every_message_quoted_in_troubleshooting_is_in_the_code(message: str) -> None:
    joined = re.sub(r'"\s*f?"', "", CODE)
    parts = [part.strip(" .:;") for part in _FILLED.split(message)]
    for part in parts:
        if len(part) > 3:
            assert part in joined, f"{part!r} of {message!r}"
