# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The bundle for a report holds no secret and no host, and is private."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import version
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput

from support.double import TOKEN_SECRET
from support.examine import examine
from support.lab import Lab
from support.pages import ROOT


def test_the_bundle_holds_no_secret_and_no_host(lab: Lab) -> None:
    made = lab.create(name="customer-host")
    lab.pve.add_guest(1700, "payroll-db")
    # A secret in places where none belongs: an actor and a reason.
    ctx = lab.context(actor=f"mallory {TOKEN_SECRET} at 192.0.2.77 and fe80::1:2")
    ctx.records.amend(made, "update", protected=True)
    found = examine(lab, bundle=False, api_password="a-made-up-password-12345")
    text = json.dumps(found)
    for hidden in (
        TOKEN_SECRET,
        "a-made-up-password-12345",
        "customer-host",
        "payroll-db",
        "pve1",
        "192.0.2.77",
        "fe80::1:2",
    ):
        assert hidden not in text, hidden
    assert (
        "(secret)" in text
        and "(sandbox 1000)" in text
        and "(address)" in text
        and "(node 1)" in text
        and "127.0.0.1" in text
    )
    assert found["events"] and found["findings"] and found["configuration"]["vmid_range"] == [1000, 1999]
    with_hosts = json.dumps(examine(lab, bundle=True, api_password="a-made-up-password-12345"))
    assert "customer-host" in with_hosts and "pve1" in with_hosts
    assert TOKEN_SECRET not in with_hosts and "a-made-up-password-12345" not in with_hosts


def test_the_bundle_is_private_and_follows_no_link(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        victim, link = tmp_path / "victim", tmp_path / "bundle.json"
        victim.write_text("mine")
        link.symlink_to(victim)
        doctor.write_bundle(str(link), {"a": 1})
    finally:
        os.umask(before)
    assert victim.read_text() == "mine" and not link.is_symlink() and json.loads(link.read_text()) == {"a": 1}
    assert stat.S_IMODE(link.stat().st_mode) == 0o600 and sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle.json",
        "victim",
    ]
    with pytest.raises(InvalidInput, match="bundle: /nonexistent/x: No such file"):
        doctor.write_bundle("/nonexistent/x", {})


def test_the_version_is_that_of_the_collection() -> None:
    assert yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"] == version.__version__
    for path in (ROOT / "roles/agentlabd/files").glob("*/__init__.py"):
        for found in re.findall(r'^__version__ = "(.+)"', path.read_text(), re.M):
            assert found == version.__version__, path
