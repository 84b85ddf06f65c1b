# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A path at which there can be no records: the error says what is there, and what to set."""

from __future__ import annotations

import os
import stat
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_refused_and_keeps_its_mode(tmp_path: Path) -> None:
    """As root, a database at /dev/null took /dev/null from every other user of the host."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container may make no devices")
    device.chmod(0o666)
    with pytest.raises(StoreError, match="it is a device, a pipe or a socket"):
        open_database(str(device))
    assert stat.S_IMODE(device.stat().st_mode) == 0o666
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["null"]


def test_a_missing_privilege_shows_that_the_credentials_are_accepted() -> None:
    statistics = Statistics()
    statistics.count_failure(AccessDenied("refused", status=401))
    assert statistics.refused == "refused"
    statistics.count_failure(AccessDenied("may not do that", status=403))
    assert statistics.refused is None and statistics.reachable is True
