# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A path at which there can be no records: the error says what is there, and what to set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AccessDenied, StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import Statistics
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("folder", "it is a folder; set database to a file, such as {0}/agentlab.db"),
        ("folder/", "it is a folder; set database to a file, such as {0}agentlab.db"),
        ("text/a/x.db", "text is a file and not a folder; set database to a path in a folder"),
        ("pipe", "it is a device, a pipe or a socket; set database to a file of its own"),
    ],
)
def test_a_path_that_can_hold_no_records(tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    place = f"{tmp_path}/{path}"
    with pytest.raises(StoreError) as refused:
        open_database(place)
    assert sentence.format(place) in refused.value.message


def test_a_missing_privilege_shows_that_the_credentials_are_accepted() -> None:
    statistics = Statistics()
    statistics.failed(AccessDenied("refused", status=401))
    assert statistics.refused == "refused"
    statistics.failed(AccessDenied("may not do that", status=403))
    assert statistics.refused is None and statistics.reachable is True
