# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""A name says what it holds: no variable, parameter or function is called found, one, left, noted, done or given.

Such a word says how a value came about. The reader has to look for what it is: a sandbox, a drift, a task. The first
line of a docstring in tests/support and benchmarks says what the function does, in the imperative.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
EMPTY_WORDS = frozenset(("found", "one", "left", "noted", "done", "given"))
# Folders whose names are held to the rule, and those whose docstrings are as well.
NAMED = ("plugins", "roles", "tests/benchmarks")
DOCUMENTED = ("benchmarks", "tests/support")


def list_files(folders: tuple[str, ...]) -> list[Path]:
    """Return the Python files in folders of the repository."""
    return [path for folder in folders for path in sorted((TOP / folder).rglob("*.py"))]


# A docstring that begins so says what something is, not what the function does.
NOUN_BEGINNINGS = {
    *("a", "all", "an", "any", "as", "each", "entries", "every", "how", "it", "one", "somebody", "that", "the"),
    *("these", "this", "those", "volume", "what", "whatever", "when", "where", "whether", "while", "who"),
}


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
    files = list_files(NAMED + DOCUMENTED)
    assert len(files) > 100 and all(list_files((folder,)) for folder in NAMED + DOCUMENTED)
    empty = {
        f"{path.relative_to(TOP)}:{line}": name
        for path in files
        for line, name in list_empty_names(path.read_text(encoding="utf-8"))
    }
    assert not empty, f"call these what they hold (the sandbox, the drift, the task): {empty}"


def list_nominal_docstrings(text: str) -> list[tuple[int, str]]:
    """Return the functions of a source text that have no docstring though they are public, or one that names a thing.

    Each stands with its line. Functions within functions are not looked at; special methods need no docstring.
    """
    scopes: list[ast.Module | ast.ClassDef] = [ast.parse(text)]
    functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(node)
    nominal = []
    for function in functions:
        words = (ast.get_docstring(function) or "").split()
        public = not function.name.startswith("_")
        if (public and not words) or (words and words[0].strip(".,:;").lower() in NOUN_BEGINNINGS):
            nominal.append((function.lineno, function.name))
    return sorted(nominal)


@pytest.mark.parametrize(
    "text",
    [
        "def read(): pass",
        "async def read(): pass",
        "class Store:\n    def read(self): pass",
        "def read():\n    'The rows.'",
        "def _read():\n    'What is there: the rows.'",
    ],
)
def test_a_docstring_that_says_not_what_the_function_does_is_seen(text: str) -> None:
    assert list_nominal_docstrings(text)


def test_functions_of_benchmarks_and_of_what_tests_share_say_what_they_do() -> None:
    files = list_files(DOCUMENTED)
    assert len(files) > 60 and not list_nominal_docstrings("def read():\n    'Return the rows.'\ndef _look(): pass")
    nominal = {
        f"{path.relative_to(TOP)}:{line}": name
        for path in files
        for line, name in list_nominal_docstrings(path.read_text(encoding="utf-8"))
    }
    assert not nominal, f"begin their docstrings with a verb (Return, Write, Wait): {nominal}"
