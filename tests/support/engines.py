# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Both engines of the records, for tests that hold on either.

There is one PostgreSQL server for each test process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import holders
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from .postgres import WHY_SKIPPED, PostgresServer, is_installed

ENGINES = ("sqlite", "postgresql")


@functools.cache
def server() -> PostgresServer:
    """Return the PostgreSQL server of this test process; started at the first call, ended with the process."""
    running = PostgresServer().create()
    atexit.register(running.destroy)
    return running


def require_postgresql() -> None:
    """Skip the test where PostgreSQL is not installed; fail there when AGENTLAB_REQUIRE_POSTGRESQL is set (CI)."""
    if not is_installed():
        if os.environ.get("AGENTLAB_REQUIRE_POSTGRESQL"):
            pytest.fail(WHY_SKIPPED)
        pytest.skip(WHY_SKIPPED)


def new_address(engine: str, path: str) -> str:
    """Return a value of ``database`` for empty records: the path, or the URI of a new database."""
    if engine == "sqlite":
        return path
    require_postgresql()
    return server().uri()


@contextlib.contextmanager
def open_controllers() -> Iterator[Callable[[str], Records]]:
    """Yield a function that opens the records at a URI as one more controller, each on a host of its own."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count(1)

        def open_controller(uri: str) -> Records:
            database = open_database(uri)
            stack.callback(database.close)
            number = next(numbers)
            records = Records(database, database.choose_clock(SystemClock()), f"controller {number}")
            return move_to_host(records, f"host {number}", "boot")

        yield open_controller


def move_to_host(records: Records, host: str, boot: str) -> Records:
    """Return the records as a process on another host holds them: nobody here can look at that process."""
    here = holders.describe_process()[:-1]
    records._process = records._process.replace(here, f'{{"host": "{host}", "boot": "{boot}"', 1)
    return records
