# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The reference part of docs/cli.md, made from --help of every command.

Run as a program it writes it anew: python tests/support/cli_page.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

from support.cli import PYTHON, agentlab, environment  # noqa: E402

PAGE = ROOT / "docs/cli.md"
BEGIN, END = "<!-- reference -->\n", "<!-- /reference -->\n"
_WALK = """
import json, click
from agentlab_cli.tree import root
def walk(command, path):
    yield path
    here = click.Context(command)
    for name in command.list_commands(here) if isinstance(command, click.Group) else ():
        inner = command.get_command(here, name)
        if not inner.hidden:
            yield from walk(inner, [*path, name])
print(json.dumps(list(walk(root, []))))
"""


def commands() -> list[list[str]]:
    """Return every command and group, as words after ``agentlab``."""
    listing = subprocess.run([PYTHON, "-c", _WALK], env=environment(None), capture_output=True, text=True, check=True)
    return list(json.loads(listing.stdout))


def reference() -> str:
    """Return a section for each command: its help. The global options stand in the first section only."""
    parts = []
    for words in commands():
        text = agentlab(*words, "--help").stdout.rstrip()
        if words:
            text = _without(text, "Global options, before or after the command:")
        parts.append(f"### {' '.join(['agentlab', *words])}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _without(text: str, title: str) -> str:
    """Return the help without the section of that title."""
    before, _title, after = text.partition(f"\n{title}\n")
    _options, blank, rest = after.partition("\n\n")
    return before.rstrip() + (f"\n\n{rest}" if blank else "")


def written() -> str:
    """Return the reference as it stands on the page."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip("\n") + "\n"


if __name__ == "__main__":
    head, tail = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{reference()}\n{END}{tail}")
