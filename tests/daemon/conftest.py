# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A factory of daemons against the test's double, and the laboratory that prepares records for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon
from support.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A double with the template and a bystander, and records that the test may prepare before (or while) the daemon
    runs.
    """
    folder = tmp_path / "lab"
    folder.mkdir()
    made = Lab(folder)
    yield made
    try:
        made.check_promises()
    finally:
        made.stop()


@pytest.fixture
def daemon(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """daemon(start=True, cleanup=None, environment=None, **configuration keys): a daemon on the laboratory's
    records.
    """
    made: list[Daemon] = []

    def make(*, start: bool = True, environment: dict[str, str] | None = None, **options: Any) -> Daemon:
        environment = {**lab.server.environment(lab.folder), "AGENTLAB_DATABASE": lab.database, **(environment or {})}
        agentlabd = Daemon(tmp_path / f"daemon-{len(made)}", environment, **options)
        made.append(agentlabd)
        return agentlabd.start() if start else agentlabd

    yield make
    for running in made:
        running.close()


@pytest.fixture(scope="module")
def one_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all cases of a file that change nothing; there is one sandbox, 1000."""
    folder = tmp_path_factory.mktemp("one")
    made = Lab(folder)
    made.create("a1")
    agentlabd = Daemon(folder / "daemon", {**made.server.environment(made.folder), "AGENTLAB_DATABASE": made.database})
    yield agentlabd.start()
    agentlabd.close()
    made.stop()
