# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures for every test: a Proxmox double over HTTPS, the environment that points the product at it, and the core
on the path.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from support.double import Server  # noqa: E402
from support.play import collections_path  # noqa: E402
from support.proxmox_double import DoubleServer, ProxmoxDouble  # noqa: E402

TOKEN_USER, TOKEN_NAME = "agentlab@pve", "test"
# Long, so that masking it in output hides nothing else.
TOKEN_SECRET = "5b1f0c7e-made-up-for-tests-93d4e2a8b6f1"


def _find_core() -> None:
    """Let tests import ansible_collections.agentlab.proxmox, unless something (ansible-test) lets them already."""
    try:
        if importlib.util.find_spec("ansible_collections.agentlab.proxmox") is not None:
            return
    except ModuleNotFoundError:
        pass
    made = tempfile.TemporaryDirectory(prefix="agentlab-collections-")
    # A link that leads back into the checkout: only the link goes, not what is behind it.
    atexit.register(made.cleanup)
    sys.path.insert(0, str(collections_path(Path(made.name))))


_find_core()


# A shell without job control starts what it puts into the background with Control-C ignored, and so would everything
# that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """Environment variables that point modules, daemon and command line at the double and at a database of the
    test's own.
    """
    (tmp_path / "config.yaml").touch()
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A fake Proxmox for one test, with the template debian-13. Tasks are done at once (time_scale 0)."""
    folder = tmp_path / "proxmox"
    folder.mkdir()
    running = Server(str(folder))
    running.pve.add_template()
    yield running
    running.stop()


CONFIG = """\
template: debian-13
shutdown_timeout: 2s
claim_timeout: 2s
doubt_window: 1s
wait_timeout: 10s
api_timeout: 10
"""


@pytest.fixture
def env(server: Server, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose configuration leads to the fake Proxmox."""
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ANSIBLE_", "PROXMOX_", "AGENTLAB_", "PYTEST_"))
    }
    return {**own, **server.environment(str(tmp_path))}


@pytest.fixture
def context(env: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """A factory of core contexts on the same records and the same Proxmox: context(actor=..., dry_run=...,
    option=...).
    """
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context

    made: list[Any] = []
    fields = ("dry_run", "wait_timeout", "clock")

    def make(actor: str = "tester", **options: Any) -> Any:
        values = {name: options.pop(name) for name in fields if name in options}
        made.append(Context(config.load(options, env), actor=actor, **values))
        return made[-1]

    yield make
    for opened_context in made:
        opened_context.close()
