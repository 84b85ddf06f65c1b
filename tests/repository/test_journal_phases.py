# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Phases of the journal are named once, in store/journal.py: no other file of the core spells one. Its table of kinds
and phases has each one that a file writes.
"""

from __future__ import annotations

import ast
from pathlib import Path

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

CORE = Path(__file__).resolve().parents[2] / "plugins/module_utils/_core"


def spelled_phases(tree: ast.AST) -> list[int]:
    """Return the lines that write a phase as a text: a third argument of journal(), or the first of journal=(...)."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        phases: list[ast.expr] = []
        if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("journal"):
            phases += node.args
        for keyword in node.keywords:
            if keyword.arg == "journal" and isinstance(keyword.value, ast.Tuple):
                phases.append(keyword.value.elts[0])
        kinds = ("create", "destroy", "start", "stop", "suspend")
        lines += [
            phase.lineno
            for phase in phases
            if isinstance(phase, ast.Constant) and isinstance(phase.value, str) and phase.value not in kinds
        ]
    return lines


def test_no_file_spells_a_phase() -> None:
    spelled = [
        f"{path.relative_to(CORE)}:{line}"
        for path in sorted(CORE.rglob("*.py"))
        for line in spelled_phases(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert spelled == []


def test_a_spelled_phase_is_seen() -> None:
    code = 'records.write_journal(claim, "create", "cloning", note)\nrecords.change(claim, journal=("cloning", note))'
    assert spelled_phases(ast.parse(code)) == [1, 2]


# The kind of operation whose journal a file writes, where the call itself does not say it.
WRITERS = {
    "sandboxes/create.py": "create",
    "sandboxes/clone.py": "create",
    "sandboxes/removal.py": "destroy",
    "sandboxes/lease.py": "stop",
    "vm/power.py": "start",
}


def written_phases(tree: ast.AST, kind: str) -> set[tuple[str, str]]:
    """Return (kind, name of the phase) of each call that writes a phase by its name."""
    written = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        arguments: list[ast.expr] = []
        if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("journal"):
            arguments += node.args
        for keyword in node.keywords:
            if keyword.arg == "journal" and isinstance(keyword.value, ast.Tuple):
                arguments.append(keyword.value.elts[0])
        named = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
        own = next((value for value in named if value in journal.PHASES), kind)
        for argument in arguments:
            name = argument.attr if isinstance(argument, ast.Attribute) else getattr(argument, "id", "")
            if name.isupper():
                written.add((own, name))
    return written


def test_the_table_has_every_phase_that_is_written() -> None:
    written = {
        pair
        for file, kind in WRITERS.items()
        for pair in written_phases(ast.parse((CORE / file).read_text(encoding="utf-8")), kind)
    }
    table = {(kind, phase) for kind, phases in journal.PHASES.items() for phase in phases}
    assert {(kind, getattr(journal, name)) for kind, name in written} | {
        ("stop", journal.REQUESTED),
        ("suspend", journal.REQUESTED),
    } == table
    # Whatever power.py does to a VM; "complete" and "fail" concern the record alone.
    assert set(power.TARGETS) - {"complete", "fail"} == {
        kind for kind, phases in journal.PHASES.items() if phases == (journal.REQUESTED,)
    }
    # No other file writes the journal.
    for path in CORE.rglob("*.py"):
        name = str(path.relative_to(CORE))
        if name not in WRITERS and not name.startswith("store/"):
            assert not written_phases(ast.parse(path.read_text(encoding="utf-8")), "?"), name


def test_the_table_names_every_phase() -> None:
    words = {word for name, word in vars(journal).items() if name.isupper() and isinstance(word, str)}
    assert {phase for phases in journal.PHASES.values() for phase in phases} == words
