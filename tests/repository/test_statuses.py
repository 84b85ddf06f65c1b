# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every type of error of the core has an HTTP status of its own in the daemon's table."""

from __future__ import annotations

from typing import Any

import pytest

from support.daemon import in_daemon

CODE = """
import importlib, json, pkgutil
import agentlab_core
from agentlab_core.errors import AgentlabError
from agentlabd.statuses import STATUSES, get_status

for module in pkgutil.walk_packages(agentlab_core.__path__, "agentlab_core."):
    importlib.import_module(module.name)

def descendants(kind):
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)

rows = [[kind.__name__, kind.code, STATUSES.get(kind), get_status(kind.code)] for kind in descendants(AgentlabError)]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[list[Any]]:
    """Return name, code, status in the table and status by code, of each type of error."""
    answer: list[list[Any]] = in_daemon(CODE)
    return answer


def test_every_error_has_a_status(rows: list[list[Any]]) -> None:
    assert len(rows) > 20
    assert [name for name, _code, status, _by_code in rows if status is None] == []


def test_a_code_means_one_status(rows: list[list[Any]]) -> None:
    """An outcome carries the code alone, so two types may share a code only with the same status."""
    assert [name for name, _code, status, by_code in rows if status != by_code] == []
