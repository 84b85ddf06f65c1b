# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The sentences that the molecule scenarios expect of the role are sentences of the role.

Molecule runs on one day of five, so a sentence that is written anew would fail days later.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Sentences of the operating system and of Ansible.
SAID_BY_OTHERS = frozenset(("Read-only file system", "RUNNING HANDLER [agentlab.proxmox.agentlabd : Reload agentlabd]"))


def read_all(folder: Path, pattern: str) -> str:
    """Return the text of all files of a folder whose name matches, with one space for each run of white space."""
    return re.sub(r"\s+", " ", " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob(pattern))))


def list_expected_sentences() -> set[str]:
    """Return the texts of several words that an assertion looks for in the output of the role's playbook.

    A handler that runs is told by its name alone.
    """
    scenarios = read_all(ROOT / "extensions" / "molecule", "*.yml")
    texts = re.findall(r"\"'([^'\"]+)' (?:not )?in played\.stdout", scenarios)
    return {re.sub(r"^RUNNING HANDLER \[[\w.]+ : (.+)\]$", r"\1", text) for text in texts if " " in text}


def list_word_triples(text: str) -> list[str]:
    """Return each three words in a row of a text."""
    words = text.split()
    return [" ".join(words[start : start + 3]) for start in range(len(words) - 2)] or [text]


def test_sentences_that_molecule_expects_are_in_the_role_or_its_programs() -> None:
    texts = read_all(ROOT / "roles", "*.yml") + read_all(ROOT / "roles", "*.py") + read_all(ROOT / "plugins", "*.py")
    expected = list_expected_sentences()
    assert len(expected) > 5
    # A template fills in names, so no sentence has to be there as a whole.
    unknown = [
        text
        for text in sorted(expected - SAID_BY_OTHERS)
        if not any(words in texts for words in list_word_triples(text))
    ]
    assert unknown == []
