# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the pages say that can be held to the code: commands, blocks of YAML, quoted messages."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "awx/README.md",
    ROOT / "roles/agentlabd/README.md",
]
# Longer texts than this are never put into a message at one place.
_LONGEST = 80


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    """Return every command of the console blocks, continued lines joined, without prompt and comment.

    Output is left out: it has no prompt.
    """
    lines: list[str] = []
    for block in blocks(page, "console"):
        going_on = False
        for line in block.splitlines():
            prompt = re.match(r"[$#] (?=\S)", line)
            if going_on:
                lines[-1] += " " + line.strip().removesuffix("\\").strip()
            elif prompt:
                lines.append(line[2:].removesuffix("\\").strip())
            else:
                continue
            going_on = line.endswith("\\")
    return [re.sub(r"\s+# .*", "", entry) for entry in lines if entry]


def inline(page: Path, program: str) -> list[str]:
    """Return the commands of that program that stand in the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(command.split()) for command in re.findall(rf"`({program} [a-z-]{{2}}[^`]*)`", text)]


def words(command: str) -> list[str]:
    """Split a command as a shell would; of several commands of a pipe, the first alone."""
    return shlex.split(re.split(r" (?:\||&&|>) ", command)[0])


# ---- messages ----

Template = tuple[str, ...]


def sources() -> Iterator[Path]:
    """Yield all Python code that says something to users."""
    yield from sorted((ROOT / "plugins").rglob("*.py"))
    for part in ("agentlabd", "agentlab_cli"):
        yield from sorted((ROOT / "roles/agentlabd/files" / part).rglob("*.py"))
    yield ROOT / "roles/agentlabd/files/agentlab_install.py"


@cache
def templates() -> tuple[Template, ...]:
    """Return every text of the code (no comments, no docstrings) and of the playbooks as its constant pieces.

    Between two pieces is what is filled in.
    """
    texts: set[Template] = set()
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                # The pieces around the holes; adjacent pieces were written in several lines.
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.add(tuple(text.split("\0")))
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in told
                and len(node.value) > 11
            ):
                texts.add(tuple(re.split(r"%[sd]", node.value)))
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        for text in re.findall(r'^\s+(?:fail_)?msg: "(.+)"$', path.read_text(encoding="utf-8"), re.M):
            texts.add(tuple(re.split(r"\{\{.*?\}\}", text)))
    return tuple(sorted(texts))


def said(message: str) -> bool:
    """Return whether the code has a text that this quotation is (a part of).

    ``...`` in it stands for what was filled in.
    """
    parts = [part.strip() for part in message.split("...")]
    parts = [part for part in parts if re.search(r"[A-Za-z]{2}", part)]
    return bool(parts) and any(all(_within(part, template) for part in parts) for template in templates())


def _within(part: str, template: Template) -> bool:
    """Return whether the text is a part of the filled template, at least a third being the template's own words."""
    pieces = list(template)
    for number, piece in enumerate(pieces):
        for offset in range(len(piece) + 1) if number or piece else (0,):
            literal = _matched(part, [piece[offset:], *pieces[number + 1 :]])
            if literal is not None and literal * 3 >= len(part):
                return True
        if number + 1 < len(pieces):
            literal = _filled(part, pieces[number + 1 :])
            if literal is not None and literal * 3 >= len(part):
                return True
    return False


def _matched(text: str, pieces: list[str]) -> int | None:
    """Return how many characters are literal when the text begins with the first piece; None when it does not."""
    head = pieces[0]
    if head.startswith(text):
        return len(text)
    if not text.startswith(head) or len(pieces) == 1:
        return None
    rest = _filled(text[len(head) :], pieces[1:])
    return None if rest is None else rest + len(head)


def _filled(text: str, pieces: list[str]) -> int | None:
    """Return how many characters are literal when the text begins with something filled in; None when it cannot."""
    best = 0 if len(text) <= _LONGEST else None
    for length in range(1, min(len(text), _LONGEST) + 1):
        values = _matched(text[length:], pieces) if pieces[0] and pieces[0][:1] == text[length : length + 1] else None
        if values is not None and (best is None or values > best):
            best = values
    return best
