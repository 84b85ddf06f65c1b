# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the faults share: a laboratory a file, and the table at the end: what was injected, how often it was met, how
many cases ended as promised.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.double import Server
from support.lab import Lab
from support.shards import keep_part

COLUMNS = ("known", "cases", "met", "passed", "by hand")
# Another choice of cases each day; set before the workers begin, so that all of them (also at midnight) make the same.
SEED = int(os.environ.setdefault("AGENTLAB_FAULTS_SEED", str(int(time.time()) // 86400)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_part(config, items)


@pytest.fixture(scope="module")
def one_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where snippets are kept, on a storage of the double's."""
    made = tmp_path / "snippets"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def snippet_lab(tmp_path: Path, folder: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, snippets_dir=str(folder))
    made.pve.hold_snippets(str(folder))
    yield made
    made.stop()


@pytest.fixture
def other_cluster(tmp_path: Path) -> Iterator[Server]:
    """Yield a second cluster, which has another certificate authority and the template."""
    server = Server(str(tmp_path))
    server.pve.add_template()
    yield server
    server.stop()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for key, value in report.user_properties:
                    if key == "faults":
                        rows.setdefault(value[0], Counter()).update(value[1])
    if not rows:
        return
    width = max(map(len, rows))
    terminalreporter.section(
        f"injected faults, AGENTLAB_FAULTS_SEED={SEED}"
        + (f", SHARD={os.environ['SHARD']}" if os.environ.get("SHARD") else "")
    )
    terminalreporter.write_line(f"{'request':{width}}" + "".join(f"{name:>8}" for name in COLUMNS))
    total: Counter[str] = Counter()
    for name, row in sorted(rows.items()):
        total.update(row)
        terminalreporter.write_line(f"{name:{width}}" + "".join(f"{row[column]:8}" for column in COLUMNS))
    terminalreporter.write_line(f"{'all':{width}}" + "".join(f"{total[column]:8}" for column in COLUMNS))
