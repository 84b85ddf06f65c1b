# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Output of commands in sandboxes: large, bounded, late, shown while the command runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import SHELLS, command_lines, run, use_shell
from support.lab import Lab
from support.proxmox_guest import Guest


def test_a_child_that_keeps_the_output_open_does_not_hold_the_result(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    start = time.monotonic()
    result = run(lab, sandbox, "sh", "-c", "sleep 50 & echo done")
    assert (result.state, result.rc, result.stdout) == ("ended", 0, b"done\n")
    assert time.monotonic() - start < 20
    assert any("sleep\x0050" in line for line in command_lines(guest))


@pytest.mark.parametrize("shell", SHELLS)
def test_output_that_a_busy_guest_reads_late_is_not_lost(
    lab: Lab, sandbox: Sandbox, guest: Guest, tmp_path: Path, shell: str
) -> None:
    """A reader that gets no processor for four seconds is stopped here instead."""
    use_shell(guest, shell)
    stopped: list[int] = []

    def stop_readers() -> None:
        deadline = time.monotonic() + 60
        while not (guest.folder / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        while len(stopped) < 2 and time.monotonic() < deadline:
            readers = [pid for pid in guest.processes() if reads_output(pid)]
            stopped[:] = readers if len(readers) == 2 else []
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        (guest.folder / "go").touch()
        time.sleep(4)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)

    stopper = threading.Thread(target=stop_readers)
    stopper.start()
    wait = f"touch {guest.folder}/begun; until [ -e {guest.folder}/go ]; do sleep 0.1; done"
    result = run(lab, sandbox, "sh", "-c", f"{wait}; echo late; echo error >&2; sleep 60 &")
    stopper.join()
    (guest.folder / "begun").unlink()
    (guest.folder / "go").unlink()
    assert len(stopped) == 2
    assert (result.rc, result.stdout, result.stderr) == (0, b"late\n", b"error\n")


def reads_output(pid: int) -> bool:
    """Return whether a process is the dd that reads the output of a command."""
    try:
        # busybox runs its dd without exec, so only the short name of the process tells.
        return Path(f"/proc/{pid}/comm").read_text() == "dd\n" and any(
            os.readlink(f"/proc/{pid}/fd/{number}").endswith(("/o", "/e")) for number in (0, 3)
        )
    except OSError:
        return False


@pytest.mark.parametrize("shell", SHELLS)
def test_output_is_bounded_and_told_as_truncated(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
    use_shell(guest, shell)
    result = run(lab, sandbox, "sh", "-c", "head -c 3000000 /dev/zero; echo err >&2", max_output=100_000)
    assert (result.rc, len(result.stdout), result.truncated, result.stderr) == (0, 100_000, True, b"err\n")
    held = sum(path.stat().st_size for path in (guest.folder / "run").rglob("out"))
    assert held <= 100_000 + 65536


def test_large_output_comes_byte_for_byte(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    data = os.urandom(2_500_000)
    (guest.folder / "data").write_bytes(data)
    result = run(lab, sandbox, "cat", f"{guest.folder}/data", max_output=4_000_000)
    assert result.stdout == data and not result.truncated
    text = b"line of text\n" * 200_000
    assert run(lab, sandbox, "cat", stdin=text, max_output=4_000_000).stdout == text


def test_large_output_comes_from_an_older_proxmox_too(lab: Lab, sandbox: Sandbox) -> None:
    """Proxmox VE 8: file-read knows no offset."""
    data = os.urandom(300_000)
    lab.pve.reads_pieces = False
    try:
        assert run(lab, sandbox, "cat", stdin=data).stdout == data
    finally:
        lab.pve.reads_pieces = True


def test_output_is_shown_while_the_command_runs(lab: Lab, sandbox: Sandbox) -> None:
    shown: list[bytes] = []
    result = run(lab, sandbox, "sh", "-c", "echo 1; sleep 3; echo 2", on_output=lambda out, _err: shown.append(out))
    assert len([part for part in shown if part]) >= 2 and b"".join(shown) == result.stdout == b"1\n2\n"


def test_cancel_ends_the_command_in_the_guest(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    result = run(lab, sandbox, "sh", "-c", "echo 1; sleep 70", cancel=lambda: True)
    assert result.killed and result.rc == 143 and result.stdout == b"1\n"
    assert not any("sleep\x0070" in line for line in command_lines(guest))
