# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Least privileges, and where secrets must not be: with each privilege missing the error names it, and no secret is
left anywhere.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import doctor
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError

from support.double import EMPTY_CONFIG, TOKEN_ID, TOKEN_SECRET
from support.lab import Lab

pytestmark = pytest.mark.faults

# What the documentation and agentlab_doctor tell; the double asks for them as Proxmox does.
GRANTS = doctor.list_needed_privileges(
    config.load({"pool": "agentlab"}, {"AGENTLAB_CONFIG": EMPTY_CONFIG}), template=9000, storage="local-lvm"
)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, pool="agentlab")
    made.pve.pools["agentlab"] = set()
    made.pve.pool_info["agentlab"] = {"comment": None, "storage": set()}
    try:
        yield made
    finally:
        made.stop()


def grant(lab: Lab, *, but: tuple[str, str] | None = None) -> None:
    """The privileges of the documentation, with one of them left out."""
    lab.pve.acl = {}
    for path, privileges in GRANTS.items():
        kept = [name for name in privileges if (path, name) != but]
        lab.pve.grant(TOKEN_ID, path, *kept)


def test_the_documented_privileges_are_enough(lab: Lab) -> None:
    grant(lab)
    lab.pass_whole_life()


@pytest.mark.parametrize(
    ("path", "privilege"),
    [
        ("/pool/agentlab", "VM.Allocate"),
        ("/pool/agentlab", "VM.PowerMgmt"),
        ("/pool/agentlab", "VM.Config.Options"),
        ("/pool/agentlab", "VM.Config.CPU"),
        ("/pool/agentlab", "VM.Config.Memory"),
        ("/pool/agentlab", "VM.Config.Network"),
        ("/vms/9000", "VM.Clone"),
        ("/storage/local-lvm", "Datastore.AllocateSpace"),
        ("/sdn/zones/localnetwork", "SDN.Use"),
        ("/", "Sys.Audit"),
    ],
)
def test_a_missing_privilege_is_named(lab: Lab, path: str, privilege: str) -> None:
    grant(lab, but=(path, privilege))
    if privilege == "Sys.Audit":
        # The double does not ask for it there; Proxmox does, in these words.
        lab.pve.fail("GET", "/cluster/ha/status/current", 403, "Permission check failed (/, Sys.Audit)")
        lab.pve.fail("GET", "/cluster/status", 403, "Permission check failed (/, Sys.Audit)")
    with pytest.raises(AgentlabError) as caught:
        lab.pass_whole_life()
    assert privilege in caught.value.message and "403" in caught.value.message, caught.value.message
    assert TOKEN_SECRET not in str(caught.value.as_dict())
    lab.calm()
    for one in lab.records():
        if one.live:
            assert lab.destroy(one.vmid, force=True)[0].state == "DESTROYED"
    assert {vm.vmid for vm in lab.pve.vms} == {500, 9000}


def test_no_secret_is_in_the_database(lab: Lab) -> None:
    lab.pass_whole_life()
    lab.pve.fail("POST", "/qemu/9000/clone", 403, f"refused {TOKEN_ID}")
    with pytest.raises(AgentlabError):
        lab.create(name="a2")
    lab.close_contexts()
    with sqlite3.connect(lab.database) as conn:
        everything = "\n".join(conn.iterdump())
    assert "a1" in everything and TOKEN_SECRET not in everything
    for file in Path(lab.database).parent.iterdir():
        assert TOKEN_SECRET.encode() not in file.read_bytes()


def test_the_database_and_its_companions_are_private(lab: Lab) -> None:
    before = os.umask(0)
    try:
        lab.create()
    finally:
        os.umask(before)
    for file in Path(lab.database).parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(Path(lab.database).parent.stat().st_mode) == 0o700


def test_no_secret_is_in_the_process_list(lab: Lab, tmp_path: Path) -> None:
    """While a module waits for Proxmox, every command line on this host is read."""
    lab.pve.fault("GET", "/cluster/resources", "hang", seconds=2, carry_out=True)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PROXMOX_", "AGENTLAB_"))},
        "ANSIBLE_CONFIG": "ansible.cfg",
    }
    found = lab.server.environment(str(tmp_path))
    secret = Path(tmp_path, "vars.yml")
    secret.write_text(f"api_token_secret: {TOKEN_SECRET}\n")
    args = (
        f"verify=true api_host=127.0.0.1 api_port={found['PROXMOX_PORT']} api_token_id={TOKEN_ID} "
        f"api_token_secret={{{{ api_token_secret }}}} ca_path={found['PROXMOX_CA_PATH']} database={lab.database}"
    )
    lab.create()
    lab.pve.fault("GET", "/cluster/resources", "hang", seconds=2, carry_out=True)
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ansible")),
            "localhost",
            "-m",
            "agentlab_sandbox_info",
            "-a",
            args,
            "-e",
            f"@{secret}",
            "-e",
            f"ansible_python_interpreter={sys.executable}",
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    seen = 0
    while process.poll() is None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path("/proc", pid, "cmdline").read_bytes()
            except OSError:
                continue
            assert TOKEN_SECRET.encode() not in line, line
            seen += b"AnsiballZ" in line
        time.sleep(0.05)
    output = process.communicate()[0]
    assert process.returncode == 0 and seen > 0, output
    assert TOKEN_SECRET not in output
