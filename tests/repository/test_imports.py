# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who may import whom: every file of the core, the daemon and the command line stands in one room of this table.

A file that no room lists fails, so that a new or renamed file is placed on purpose. A room may import itself and the
rooms named after it. Within the room, imports must not form a circle.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins/module_utils/_core"
FILES = ROOT / "roles/agentlabd/files"

# Room -> its files without ".py" (a name that ends in "/" means all files of that folder), and the rooms it may import.
CORE_ROOMS: dict[str, tuple[str, str]] = {
    "tables": ("clock errors escapes reasons states model version", ""),
    "tools": ("database_address parallel durations nodes patterns placement safe_yaml values waiting", "tables"),
    "files": ("config profiles rules", "tables tools"),
    "store": ("store/", "tables tools"),
    "proxmox": ("proxmox/", "tables tools files"),
    "run": ("context timeguard", "tables tools files store proxmox"),
    "vm": ("vm/", "tables tools files store proxmox run"),
    "guest": ("guest/", "tables tools files store proxmox run vm"),
    "workspaces": ("workspaces/", "tables tools files store proxmox run vm"),
    "views": ("views/", "tables tools files store proxmox run vm"),
    "sandboxes": ("sandboxes/", "tables tools files store proxmox run vm guest workspaces"),
    "maintenance": ("maintenance/", "tables tools files store proxmox run vm guest workspaces sandboxes"),
    "doctor": ("doctor/", "tables tools files store proxmox run vm guest workspaces views sandboxes"),
}
DAEMON_ROOMS: dict[str, tuple[str, str]] = {
    "process": ("systemd logs connections", ""),
    "statuses": ("statuses", ""),
    "service": ("service metrics problems conditions", "process statuses"),
    "forms": ("http/fields http/answers", "statuses"),
    "http": ("http/", "process service statuses forms"),
    "scheduler": ("scheduler", "process service"),
    "daemon": ("daemon __main__ scrape", "process http service scheduler"),
}
# The cluster reads the one line of the records that says which cluster they belong to.
ALLOWED_ALONE = {("proxmox/cluster", "store/records")}

# Library -> the only folder of the core that may import it.
ENGINES = {"sqlite3": "store/sqlite/", "psycopg": "store/postgres/"}
_SQL = re.compile(r"\s*(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|CREATE TABLE|ALTER TABLE|PRAGMA)\b")


def place(name: str, rooms: dict[str, tuple[str, str]]) -> str:
    """Return the room that lists the file ``name`` (relative, without suffix)."""
    for room, (files, _allowed) in rooms.items():
        if any(name == listed or (listed.endswith("/") and name.startswith(listed)) for listed in files.split()):
            return room
    pytest.fail(f"{name}.py stands in no room of tests/repository/test_imports.py: say there who may import it")


def names(folder: Path) -> list[str]:
    """Return the Python files below the folder, relative and without suffix; packages' own files are left out."""
    return sorted(
        str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py") if path.name != "__init__.py"
    )


def imports(folder: Path, name: str, package: str = "") -> set[str]:
    """Return the files of the folder that one file imports, relative imports and those by the package's name alike."""
    known = set(names(folder))
    parent = name.split("/")[:-1]
    result = set()
    for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level:
            base = [*parent[: len(parent) - node.level + 1], *module]
        elif package and module and module[0] == package:
            base = module[1:]
        else:
            continue
        result |= {"/".join([*base, alias.name]) for alias in node.names} | {"/".join(base)}
    return result & known


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the files that can reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += graph[name]
        return seen

    return sorted(name for name in graph if name in reach(name))


def violations(folder: Path, rooms: dict[str, tuple[str, str]]) -> list[str]:
    """Return one line for each import that the table does not allow."""
    lines = []
    for name in names(folder):
        room = place(name, rooms)
        for other in imports(folder, name):
            there = place(other, rooms)
            if (name, other) not in ALLOWED_ALONE and there != room and there not in rooms[room][1].split():
                lines.append(f"{name} ({room}) imports {other} ({there})")
    return lines


def test_every_import_of_the_core_goes_down() -> None:
    assert violations(CORE, CORE_ROOMS) == []


def test_the_core_has_no_circle() -> None:
    assert circles({name: imports(CORE, name) for name in names(CORE)}) == []
    order = list(CORE_ROOMS)
    for room, (_files, allowed) in CORE_ROOMS.items():
        assert set(allowed.split()) <= set(order[: order.index(room)]), f"{room} may only import rooms above it"


def strays(folder: Path) -> list[str]:
    """Return each import of an engine's library outside its folder, and each statement of SQL outside the store."""
    lines = []
    for name in names(folder):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                home = ENGINES.get(module.partition(".")[0])
                if home and not name.startswith(home):
                    lines.append(f"{name} imports {module}; only {home} may")
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and not name.startswith("store/")
                and _SQL.match(node.value)
            ):
                lines.append(f"{name}:{node.lineno} holds SQL; only store/ may")
    return lines


def test_engines_and_sql_stay_in_the_store() -> None:
    assert strays(CORE) == []
    assert strays(FILES / "agentlabd") == []


def test_the_guard_sees_an_engine_outside_the_store(tmp_path: Path) -> None:
    (tmp_path / "context.py").write_text("import sqlite3\nQUERY = 'SELECT 1 FROM meta'\n")
    assert strays(tmp_path) == [
        "context imports sqlite3; only store/sqlite/ may",
        "context:2 holds SQL; only store/ may",
    ]


def test_every_import_of_the_daemon_stands_in_the_table() -> None:
    assert violations(FILES / "agentlabd", DAEMON_ROOMS) == []


def test_the_daemon_has_no_circle() -> None:
    folder = FILES / "agentlabd"
    assert circles({name: imports(folder, name) for name in names(folder)}) == []


def test_the_command_line_has_no_circle() -> None:
    folder = FILES / "agentlab_cli"
    assert circles({name: imports(folder, name) for name in names(folder)}) == []


def test_what_the_tests_share_has_no_circle() -> None:
    folder = ROOT / "tests/support"
    graph = {name: imports(folder, name, "support") for name in names(folder)}
    # The parts of the double are reached from proxmox_double.py, so none of them may import it.
    assert graph["proxmox_double"] > {"proxmox_http", "proxmox_tasks"} and "proxmox_texts" in graph["proxmox_config"]
    assert circles(graph) == []


def test_the_guard_sees_a_wrong_import(tmp_path: Path) -> None:
    """The table is worth nothing if an unlisted file or an upward import passes."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "records.py").write_text("from ..proxmox import client\n")
    (tmp_path / "proxmox").mkdir()
    (tmp_path / "proxmox" / "client.py").write_text("from .. import errors\n")
    (tmp_path / "errors.py").write_text("")
    assert violations(tmp_path, CORE_ROOMS) == ["store/records (store) imports proxmox/client (proxmox)"]
    (tmp_path / "newcomer.py").write_text("")
    with pytest.raises(pytest.fail.Exception, match="newcomer.py stands in no room"):
        violations(tmp_path, CORE_ROOMS)


def test_no_two_classes_share_a_name() -> None:
    """One name means one concept: whoever searches for a class finds one."""
    places: dict[str, list[str]] = {}
    for folder in (CORE, FILES / "agentlabd"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
