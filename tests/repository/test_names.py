# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""A name says what it holds: no variable, parameter or function is called found, one, left, noted, done or given.

Such a word says how a value came about. The reader has to look for what it is: a sandbox, a drift, a task.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
EMPTY_WORDS = frozenset(("found", "one", "left", "noted", "done", "given"))
FILES = [path for folder in ("plugins", "roles") for path in sorted((TOP / folder).rglob("*.py"))]


def list_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that the code gives a name: variables, parameters, attributes, functions."""
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name


def list_empty_names(text: str) -> list[tuple[int, str]]:
    """Return the names in a source text that say nothing, each with its line."""
    return sorted((line, name) for line, name in list_names(ast.parse(text)) if name.strip("_").lower() in EMPTY_WORDS)


@pytest.mark.parametrize(
    "text",
    [
        "found = 1",
        "found: int = 1",
        "first, left = pair",
        "self._noted = 1",
        "for one in rows: pass",
        "rows = [one for one in rows]",
        "if (found := look()): pass",
        "with lock as given: pass",
        "def done(): pass",
        "async def _one(): pass",
        "def work(*, given): pass",
        "def work(*done, **given): pass",
        "sort(key=lambda one: one)",
        "class Done: pass",
        "try: pass\nexcept OSError as noted: pass",
        "match row:\n    case [*left]: pass",
    ],
)
def test_each_kind_of_name_is_seen(text: str) -> None:
    assert list_empty_names(text)


def test_names_say_what_they_hold() -> None:
    assert len(FILES) > 100
    empty = {
        f"{path.relative_to(TOP)}:{line}": name
        for path in FILES
        for line, name in list_empty_names(path.read_text(encoding="utf-8"))
    }
    assert not empty, f"call these what they hold (the sandbox, the drift, the task): {empty}"
