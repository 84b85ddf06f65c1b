# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files of another kind than meant (FIFOs, devices, links that lead nowhere) hold nothing up, and are not silently
left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, profiles, rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.config import ProxmoxSettings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite import latest


@pytest.fixture(params=["fifo", "device"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path that is no regular file."""
    if request.param == "device":
        return "/dev/zero"
    os.mkfifo(tmp_path / "fifo", 0o600)
    return str(tmp_path / "fifo")


def test_an_odd_ca_path_is_refused_at_once(odd: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="ca_path: .* is not a regular file"):
        ProxmoxSettings(api_host="a", api_token_id="u@pve!t", api_token_secret="x" * 8, ca_path=odd).check_credentials()
    assert time.monotonic() - began < 5


def test_an_odd_note_beside_the_records_holds_nothing_up(odd: str, tmp_path: Path) -> None:
    database = str(tmp_path / "agentlab.db")
    Path(latest.make_note_path(database)).symlink_to(odd)
    assert latest.read_note(database) is None
    Path(database).touch()
    latest.write_note(database, 5)
    assert latest.read_note(database) == 5


def load_default_file(path: str) -> object:
    """Load the configuration where the path stands for /etc/agentlab/config.yaml."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CONFIG_FILE", path)
        return config.load({}, {})


@pytest.mark.parametrize("target", ["nowhere", "itself"])
@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("cleanup_file", rules.load),
        ("config_file", load_default_file),
        ("profiles_dir", profiles.load_all),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(
    tmp_path: Path, option: str, read: Callable[[str], object], target: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(link if target == "itself" else tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=f"^{option}: {link}"):
        read(str(link))
    # What is not there at all is allowed.
    read(str(tmp_path / "missing"))
