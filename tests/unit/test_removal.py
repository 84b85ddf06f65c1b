# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a removal concludes from the journal of a killed run: may a delete still be carried out, and since when."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import removal
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import journal
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.journal import CreationNote, JournalEntry


def entry(kind: str, phase: str, **detail: Any) -> JournalEntry:
    return JournalEntry("a", kind, phase, detail, "me", 100, 200)


@pytest.mark.parametrize(
    ("interrupted", "since"),
    [
        # The journal has the time of the first delete; retries have written the entry since.
        (entry("destroy", "deleting", since=150), 150),
        (entry("destroy", "waiting", since=0, upid="UPID:pve1:2:"), 0),
        # The run was killed between the entry and the request: it was sent when the entry was written, at the latest.
        (entry("destroy", "deleting"), 200),
        # No delete was sent.
        (entry("destroy", "verifying"), None),
        (entry("destroy", "stopping", since=150), None),
        (entry("destroy", "detaching"), None),
        # A creation that waits for its clone deletes nothing.
        (entry("create", "waiting", since=150), None),
        (entry("stop", "requested"), None),
    ],
)
def test_a_killed_run_may_have_sent_its_delete(interrupted: JournalEntry, since: int | None) -> None:
    expected = None if since is None else removal.PendingDelete(since, interrupted)
    assert removal.find_pending_delete(interrupted) == expected


@pytest.mark.parametrize(
    ("smbios_uuid", "created", "never"),
    [
        (None, CreationNote(phase=journal.RESERVED), True),
        (None, CreationNote(phase=journal.CLONING), False),
        (None, CreationNote(phase=journal.WAITING), False),
        # Nothing is known of the creation.
        (None, CreationNote(), False),
        (None, None, False),
        # The record is bound to a VM.
        ("11111111-2222-3333-4444-555555555555", CreationNote(phase=journal.RESERVED), False),
    ],
)
def test_only_a_reserved_creation_never_sent_its_clone(
    smbios_uuid: str | None, created: CreationNote | None, never: bool
) -> None:
    sandbox = Sandbox(uuid="a", vmid=1000, name="a1", state="FAILED", smbios_uuid=smbios_uuid)
    assert removal.was_never_cloned(sandbox, created) is never
