# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A guest whose /run is full: what still works there, and what is said of the rest. Each guest has a small /run."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command, files
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandResult, CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.ansible_input import module
from support.lab import Lab
from support.programs import require, require_program
from support.proxmox_guest import Guest

Small = Callable[[int], Guest]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require(os.geteuid() == 0, "a small /run is mounted, which needs root")
    unshare = [require_program("unshare", "util-linux"), "--mount", "true"]
    require(subprocess.run(unshare, capture_output=True, check=False).returncode == 0, "this place allows no mounts")
    made = Lab(tmp_path_factory.mktemp("full"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def sandbox(lab: Lab) -> Sandbox:
    return lab.create()


@pytest.fixture
def small(lab: Lab, sandbox: Sandbox) -> Iterator[Small]:
    """small(kibibytes): the guest with a /run of that size."""
    lab.context().database.write(lambda conn: conn.execute("DELETE FROM runs") and None)

    def make(kibibytes: int) -> Guest:
        guest = lab.pve.machine(sandbox.vmid)
        guest.limit_run(kibibytes)
        return guest

    yield make
    lab.pve.close_machines()


def run(lab: Lab, sandbox: Sandbox, *argv: str, stdin: bytes = b"", max_output: int = 1_000_000) -> CommandResult:
    return command.run_command(lab.context(), sandbox, CommandSpec(argv=argv, stdin=stdin, max_output=max_output))


def test_without_room_for_the_files_of_modules_the_input_is_sent_as_it_is(
    lab: Lab, sandbox: Sandbox, small: Small
) -> None:
    """The first command finds out. The next one knows."""
    guest = small(300)
    data = module()
    counts = []
    for _time in range(2):
        guest.started.clear()
        result = run(lab, sandbox, "sh", "-c", "wc -c; echo x >&2", stdin=data)
        assert (result.rc, result.stdout.strip(), result.stderr) == (0, str(len(data)).encode(), b"x\n")
        counts.append(sum("\nbegin" in text[-10:] for _argv, text in guest.started))
    assert counts == [2, 1]
    assert b"keep" not in run(lab, sandbox, "ls", f"{guest.folder}/run/agentlab").stdout


def test_a_command_that_fills_run_ends_with_its_own_status(lab: Lab, sandbox: Sandbox, small: Small) -> None:
    small(400)
    result = run(lab, sandbox, "sh", "-c", "head -c 1000000 /dev/zero && exit 7", max_output=5_000_000)
    assert (result.rc, result.truncated) == (7, True)
    assert "/run of the guest is full" in str(result.message)
    assert 200_000 < len(result.stdout) < 400_000 and not result.stdout.strip(b"\0")
    assert run(lab, sandbox, "echo", "next").stdout == b"next\n"


def test_input_for_which_there_is_no_room_is_refused_as_that(lab: Lab, sandbox: Sandbox, small: Small) -> None:
    guest = small(200)
    marker = guest.folder / "marker"
    with pytest.raises(GuestRefused, match=r"its /run or the target's file system is full; make room"):
        run(lab, sandbox, "touch", str(marker), stdin=random.Random(1).randbytes(300_000))
    assert not marker.exists()
    assert run(lab, sandbox, "echo", "next").stdout == b"next\n"


def test_a_file_for_which_there_is_no_room_leaves_nothing(lab: Lab, sandbox: Sandbox, small: Small) -> None:
    guest = small(200)
    files.put_file(lab.context(), sandbox, b"old", f"{guest.folder}/run/file")
    with pytest.raises(GuestRefused, match=r"its /run or the target's file system is full; make room"):
        files.put_file(lab.context(), sandbox, random.Random(2).randbytes(300_000), f"{guest.folder}/run/file")
    assert run(lab, sandbox, "ls", "-A", f"{guest.folder}/run").stdout.split() == [b"agentlab", b"file"]
    assert run(lab, sandbox, "cat", f"{guest.folder}/run/file").stdout == b"old"
