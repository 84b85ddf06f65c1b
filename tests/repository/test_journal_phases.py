# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Phases of the journal are named once, in store/journal.py: no other file of the core spells one."""

from __future__ import annotations

import ast
from pathlib import Path

CORE = Path(__file__).resolve().parents[2] / "plugins/module_utils/_core"


def spelled_phases(tree: ast.AST) -> list[int]:
    """Return the lines that write a phase as a text: a third argument of journal(), or the first of journal=(...)."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        phases: list[ast.expr] = []
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("journal", "_journal"):
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
    code = 'records.journal(claim, "create", "cloning", note)\nrecords.change(claim, journal=("cloning", note))'
    assert spelled_phases(ast.parse(code)) == [1, 2]
