# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What operations note in the journal comes back as it was written, from this release and from earlier ones."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.journal import (
    CreationNote,
    DestroyNote,
    JournalEntry,
)

NOTES = [
    CreationNote(),
    CreationNote(template=9000, template_name="debian", template_node="pve1", node="pve2"),
    CreationNote(template=9000, template_node="pve1", node="pve2", knows_mode=True),
    CreationNote(template=9000, node="pve1", knows_mode=True, full=False, chosen=True),
    CreationNote(template=9000, node="pve1", knows_mode=True, full=True, storage="fast", upid="UPID:pve1:1:"),
    CreationNote(template=9000, node="pve1", knows_mode=True, upid="UPID:pve1:1:", awaited=True, disk_size="13G"),
]


def entry(kind: str, phase: str, detail: dict[str, Any]) -> JournalEntry:
    """Return the entry as it is read from a database that holds this detail."""
    row = {"sandbox_uuid": "a", "kind": kind, "phase": phase, "actor": "me", "started_at": 100, "updated_at": 200}
    return JournalEntry.from_row({**row, "detail": json.dumps(detail)})  # type: ignore[arg-type]


@pytest.mark.parametrize("note", NOTES)
def test_a_creation_reads_what_it_noted(note: CreationNote) -> None:
    read = entry("create", journal.CLONING, note.format_detail()).creation
    note.phase, note.at = journal.CLONING, 200
    assert read == note


@pytest.mark.parametrize("creation", [None, *NOTES])
@pytest.mark.parametrize("sent", [{}, {"since": 150}, {"upid": "UPID:pve1:2:", "since": 0}])
def test_a_destroy_reads_what_it_noted_and_what_the_creation_had(
    creation: CreationNote | None, sent: dict[str, Any]
) -> None:
    if creation is not None:
        creation.phase, creation.at = journal.WAITING, 120
    note = DestroyNote("clean-up", True, creation, **sent)
    read = entry("destroy", journal.DELETING, note.format_detail())
    assert read.destroy == note and read.creation == creation


@pytest.mark.parametrize("note", NOTES)
def test_a_creation_that_a_destroy_puts_back_keeps_its_time(note: CreationNote) -> None:
    """By it the clone's task is looked for, and by it the doubt about the clone ends."""
    note = replace(note, phase=journal.CLONING, at=120)
    assert entry("create", journal.CLONING, note.format_detail_put_back()).creation == note


def test_an_entry_of_an_earlier_release_lacks_the_clone_mode() -> None:
    """The mode is asked for anew then; "None" would mean whichever Proxmox makes of that template."""
    note = entry("create", "cloning", {"template": 9000, "template_node": "pve1", "node": "pve1"}).creation
    assert note is not None and not note.knows_mode and note.template == 9000
    assert "full" not in note.format_detail() and "storage" not in note.format_detail()


def test_an_entry_that_notes_no_creation_never_says_that_none_was_sent() -> None:
    """A phase that is missing must not read as "reserved", which rules out that a VM of ours was made."""
    assert entry("destroy", "verifying", {}).creation is None
    assert entry("start", "requested", {"node": "pve1"}).creation is None
    created = entry("destroy", "verifying", {"create": {"template": 9000}}).creation
    assert created is not None and created.phase != journal.RESERVED


@pytest.mark.parametrize(
    ("kind", "phase", "sent"),
    [
        ("destroy", "deleting", True),
        ("destroy", "waiting", True),
        ("destroy", "detaching", False),
        # A creation waits, too; but for its clone.
        ("create", "waiting", False),
    ],
)
def test_only_a_destroy_may_have_deleted_the_vm(kind: str, phase: str, sent: bool) -> None:
    assert entry(kind, phase, {}).is_sent_delete is sent


def test_the_words_in_existing_databases_stay() -> None:
    """A database outlives a release: a phase that is renamed here would not be recognised there."""
    words = {name: word for name, word in vars(journal).items() if name.isupper() and isinstance(word, str)}
    assert words == {
        "RESERVED": "reserved",
        "CLONING": "cloning",
        "CONFIGURING": "configuring",
        "STARTED": "ready",
        "AWAITED": "awaited",
        "VERIFYING": "verifying",
        "STOPPING": "stopping",
        "DETACHING": "detaching",
        "DELETING": "deleting",
        "WAITING": "waiting",
        "REQUESTED": "requested",
    }
