# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every operation of test_crash.py loses its disk or its descriptors at a point drawn by the seed, and is run again.

The disk is full, or answers writes with an error, or no file descriptor is left for anything. The run then ends by
itself, with a success or with a sentence. Afterwards the same promises hold as after a kill.

A full disk is a small tmpfs. `make test-disk` makes a mount namespace for it, which only root can. AGENTLAB_FAULTS_SEED
replays the choice of a day.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import SEED
from faults.crash_support import BYSTANDER, Rig
from faults.test_crash import CASES, try_case

pytestmark = pytest.mark.faults

ALL = os.environ.get("AGENTLAB_FAULTS") == "all"
# Set by `make test-disk` in the mount namespace that it makes.
SMALL_DISKS = bool(os.environ.get("AGENTLAB_TEST_SMALL_DISKS"))
DISK_SIZE = "2m"
COUNTS = {"full": 29, "io": 31, "descriptors": 20} if ALL else {"full": 4, "io": 4, "descriptors": 4}
if not SMALL_DISKS:
    del COUNTS["full"]


def draw_cases(kind: str, count: int, seed: int) -> list[tuple[str, float]]:
    """Return names of operations, each with the part of its points after which the failure begins."""
    choice = random.Random(f"{kind} {seed}")
    # A creation that fails by itself is cleaned up at once: there is nothing for a reconcile alone to take up.
    names = [name for name in CASES if name != "bulk" and not name.endswith("_reconciled")]
    choice.shuffle(names)
    return [(names[number % len(names)], choice.random()) for number in range(count)]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    records = tmp_path / "records"
    records.mkdir(mode=0o700)
    made.env["AGENTLAB_DATABASE"] = str(records / "agentlab.db")
    made.database = records / "agentlab.db"
    made.foreign(BYSTANDER, name="bystander", running=True)
    yield made
    made.stop()


@pytest.fixture
def small_disk(rig: Rig) -> Iterator[Path]:
    """Mount a small file system where the records are."""
    folder = rig.database.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=0700", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_disk(rig: Rig, kind: str) -> None:
    """Remove what filled the disk; the child made sure that nothing was left when it had filled it."""
    if kind == "full":
        rig.database.with_name("filler").unlink()


def lose(rig: Rig, kind: str, number: int, record_property: Any) -> None:
    """Run the chosen case with its failure, and judge what it says and leaves."""
    name, part = draw_cases(kind, COUNTS[kind], SEED)[number]
    case = CASES[name]
    case.prepare(rig)
    rig.keep()
    dry, wrong = try_case(rig, case, None)
    assert not wrong, wrong
    points = dry["result"]["points"]
    at = 1 + int(part * len(points))
    first, wrong = try_case(rig, case, None, fail={"kind": kind, "at": at}, mend=lambda: free_disk(rig, kind))
    where = f"{kind} in {name} at {at}/{len(points)} {points[at - 1]}"
    result = first["result"]
    print(f"\n{where}: {result and (result.get('message') or result.get('outcomes') or result)}")
    record_property("faults", (f"disk: {kind}", {"known": len(points), "cases": 1, "met": 1, "passed": not wrong}))
    assert result and not first["late"], f"{where}: the run did not end by itself: {first}"
    assert len(result["points"]) >= at, f"{where}: the run did not reach its failure"
    assert result.get("code") != "trace", f"{where}: {result['message']}"
    assert not wrong, f"{where}: {wrong}"


@pytest.mark.parametrize("number", range(COUNTS["io"]))
def test_a_disk_that_answers_writes_with_errors(rig: Rig, number: int, record_property: Any) -> None:
    lose(rig, "io", number, record_property)


@pytest.mark.parametrize("number", range(COUNTS["descriptors"]))
def test_no_descriptor_left(rig: Rig, number: int, record_property: Any) -> None:
    lose(rig, "descriptors", number, record_property)


if SMALL_DISKS:

    @pytest.mark.parametrize("number", range(COUNTS["full"]))
    def test_a_full_disk(rig: Rig, small_disk: Path, number: int, record_property: Any) -> None:
        lose(rig, "full", number, record_property)
