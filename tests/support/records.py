# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of the store share: a reservation, and a process with records of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Claim, Records

RANGE = (1000, 1099)
CHILD = """
import sys
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records
path, me = sys.argv[1], sys.argv[2]
store = Records(open_database(path), SystemClock(), "child " + me)
"""


def child(path: Path | str, me: str, code: str) -> subprocess.Popen[str]:
    """Start a process with records of its own: ``code`` runs with ``store`` and ``me`` at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(path), me],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def new(number: int, state: str = "REQUESTED") -> Sandbox:
    """Return a sandbox that is not stored yet, with a UUID and a name made from ``number``."""
    return Sandbox(
        uuid=f"00000000-0000-4000-8000-{number:012d}", vmid=0, name=f"s{number}", state=state, lease_expires_at=10**10
    )


def reserve(store: Records, number: int = 1, vmid: int | None = None) -> tuple[Claim, Sandbox]:
    """Reserve a VMID for a new sandbox, and return its claim and its record."""
    sandbox = new(number)
    claim = store.reserve(sandbox, vmid=vmid, vmid_range=RANGE, occupied=set(), journal={"a": 1})
    return claim, store.get(sandbox.uuid)


def read_all_rows(store: Records, *tables: str) -> list[list[tuple[object, ...]]]:
    """Return all rows of these tables, or of all tables that a step of an operation writes to."""
    return [
        [tuple(row) for row in store.db.read(f"SELECT * FROM {table} ORDER BY 1")]
        for table in tables or ("sandboxes", "events", "claims", "operations")
    ]
