# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures for every test: a Proxmox double over HTTPS, the environment that points the product at it, and the core on the path."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from support.play import collections_path  # noqa: E402
from support.proxmox_double import DoubleServer, ProxmoxDouble  # noqa: E402

TOKEN_USER, TOKEN_NAME = "agentlab@pve", "test"
# Long, so that masking it in output hides nothing else.
TOKEN_SECRET = "5b1f0c7e-made-up-for-tests-93d4e2a8b6f1"

_made: list[tempfile.TemporaryDirectory[str]] = []


def _find_core() -> None:
    """Let tests import ansible_collections.agentlab.proxmox, unless something (ansible-test) lets them already."""
    try:
        if importlib.util.find_spec("ansible_collections.agentlab.proxmox") is not None:
            return
    except ModuleNotFoundError:
        pass
    _made.append(tempfile.TemporaryDirectory(prefix="agentlab-collections-"))
    sys.path.insert(0, str(collections_path(Path(_made[0].name))))


_find_core()


@pytest.fixture
def pve_server() -> Iterator[DoubleServer]:
    """A Proxmox double for one test, with nothing on it but the test's token. Tasks are done at once (time_scale 0)."""

    def setup(pve: ProxmoxDouble) -> None:
        pve.add_token(f"{TOKEN_USER}!{TOKEN_NAME}", TOKEN_SECRET)

    with DoubleServer(setup=setup) as server:
        yield server
    assert not server.pve.hook_errors, server.pve.hook_errors


@pytest.fixture
def pve(pve_server: DoubleServer) -> ProxmoxDouble:
    """The double itself, with the template 9000 and guest agents that answer."""
    pve_server.pve.add_template()
    pve_server.pve.agent_default = True
    return pve_server.pve


@pytest.fixture
def agentlab_env(tmp_path: Path, pve_server: DoubleServer) -> dict[str, str]:
    """Environment variables that point modules, daemon and command line at the double and at a database of the test's own."""
    return {
        "PROXMOX_HOST": pve_server.host,
        "PROXMOX_PORT": str(pve_server.port),
        "PROXMOX_USER": TOKEN_USER,
        "PROXMOX_TOKEN_ID": TOKEN_NAME,
        "PROXMOX_TOKEN_SECRET": TOKEN_SECRET,
        "PROXMOX_CA_PATH": pve_server.cafile,
        "PROXMOX_VALIDATE_CERTS": "true",
        "AGENTLAB_DATABASE": str(tmp_path / "agentlab.db"),
        "AGENTLAB_CONFIG": str(tmp_path / "config.yaml"),
    }
