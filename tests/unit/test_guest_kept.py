# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files of modules that the guest keeps: what is sent again, what is not, and that the input is always the same."""

from __future__ import annotations

import base64
import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command, kept, wrapper
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.ansible_input import module
from support.lab import Lab
from support.programs import require_program
from support.proxmox_agent import LARGEST_INPUT
from support.proxmox_guest import Guest

SHELLS = ["dash", "bash", "busybox"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("kept"))
    yield made
    made.pve.close_machines()
    made.stop()


@pytest.fixture(scope="module")
def sandbox(lab: Lab) -> Sandbox:
    return lab.create()


@pytest.fixture
def guest(lab: Lab, sandbox: Sandbox) -> Iterator[Guest]:
    """Yield the guest as it is after a start: it keeps nothing, though the journal of the test before says so."""
    machine = lab.pve.machine(sandbox.vmid)
    machine.reboot()
    database = lab.context().database
    database.write(lambda conn: conn.execute("DELETE FROM runs") and None)
    machine.started.clear()
    yield machine
    assert not machine.deaf


def run(lab: Lab, sandbox: Sandbox, data: bytes) -> command.CommandResult:
    return command.run_command(lab.context(), sandbox, CommandSpec(argv=["cat"], stdin=data))


def sent(guest: Guest) -> tuple[int, int]:
    """Return how many requests began or prepared a command since the last call, and their characters."""
    sizes = [len(data) for _argv, data in guest.started]
    assert all(size <= LARGEST_INPUT for size in sizes)
    guest.started.clear()
    return len(sizes), sum(sizes)


@pytest.mark.parametrize("shell", SHELLS)
def test_only_what_the_guest_does_not_keep_is_sent(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
    before = guest.shell, guest.path
    if shell == "busybox":
        require_program("busybox", "busybox-static")
        guest.use_busybox()
    else:
        guest.shell = require_program(shell)
    try:
        first = module(value="password-of-the-first")
        assert run(lab, sandbox, first).stdout == first
        requests, characters = sent(guest)
        assert requests > 1 and characters > 80_000
        # The same module with other values, and built at another time.
        again = module(year=2024, value="ä € \0 other")
        assert run(lab, sandbox, again).stdout == again
        assert sent(guest)[0] == 1
        # Another module on the same library.
        other = module(own=2)
        assert run(lab, sandbox, other).stdout == other
        requests, characters = sent(guest)
        assert requests == 1 and characters < 25_000
    finally:
        guest.shell, guest.path = before
    folder = guest.folder / "run" / "agentlab" / "keep"
    assert folder.stat().st_mode & 0o777 == 0o700
    # 8 files of the library, and two modules. Nothing of a task's values is kept.
    contents = [path.read_bytes() for path in folder.iterdir()]
    assert len(contents) == 10 and not any(b"password-of-the-first" in content for content in contents)


@pytest.mark.parametrize("loss", ["reboot", "a file is missing", "a file is another", "the folder is a file"])
def test_what_the_guest_has_lost_is_sent_again_and_the_command_runs_once(
    lab: Lab, sandbox: Sandbox, guest: Guest, loss: str
) -> None:
    data = module()
    run(lab, sandbox, data)
    folder = guest.folder / "run" / "agentlab" / "keep"
    if loss == "reboot":
        guest.reboot()
    elif loss == "the folder is a file":
        shutil.rmtree(folder)
        folder.write_bytes(b"x")
    else:
        file = next(folder.iterdir())
        size = file.stat().st_size
        file.unlink()
        if loss == "a file is another":
            file.write_bytes(b"x" * size)
    count = guest.folder / "run" / "count"
    spec = CommandSpec(argv=["sh", "-c", f"printf x >>{count}; cat"], stdin=data)
    result = command.run_command(lab.context(), sandbox, spec)
    assert (result.rc, result.stdout, count.read_text()) == (0, data, "x")
    sent(guest)
    assert run(lab, sandbox, data).stdout == data
    assert sent(guest)[0] == 1


def test_a_guest_whose_folder_takes_nothing_gets_the_input_as_it_is(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    """The first command finds out. The next one knows."""
    run(lab, sandbox, b"")
    folder = guest.folder / "run" / "agentlab" / "keep"
    folder.mkdir(mode=0o500)
    os.chown(folder, folder.parent.stat().st_uid, folder.parent.stat().st_gid)
    guest.started.clear()
    counts = []
    for _time in range(2):
        assert run(lab, sandbox, module()).stdout == module()
        counts.append(sum("\nbegin" in text[-10:] for _argv, text in guest.started))
    folder.chmod(0o700)
    assert counts == [3, 4]


def test_the_answer_is_asked_for_when_the_same_module_ended_the_last_time(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CommandSpec(argv=["sh", "-c", "cat >/dev/null; sleep 0.8"], stdin=module())
    first_delays = []
    for _time in range(2):
        ctx = lab.context()
        pauses: list[float] = []
        sleep = ctx.clock.sleep
        monkeypatch.setattr(ctx.clock, "sleep", lambda seconds, to=pauses, sleep=sleep: (to.append(seconds), sleep(0)))
        command.run_command(ctx, sandbox, spec)
        monkeypatch.undo()
        first_delays.append(pauses[0])
    assert first_delays[0] < 0.5 and 0.8 <= first_delays[1] < 5, first_delays


@pytest.mark.parametrize(
    "data",
    [
        b"A" * 40_000,
        base64.b64encode(b"PK\x03\x04" + bytes(20_000)),
        b"text " * 10_000,
        module()[:-20_000],
        base64.b64encode(base64.b64decode(module().split(b"'")[1])[:-22]),
    ],
)
def test_other_input_is_sent_as_it_is(lab: Lab, sandbox: Sandbox, guest: Guest, data: bytes) -> None:
    result = run(lab, sandbox, data)
    assert result.stdout == data
    assert not (guest.folder / "run" / "agentlab" / "keep").exists()


def test_the_largest_request_fits() -> None:
    """64 MiB of input come in 1,500 pieces, and 40 results may be deleted along with it."""
    prepared = command.prepare_command(CommandSpec(argv=["cat"], environment={"A": "x" * 20_000}, stdin=bytes(1)))
    prepared.stdin = random.Random(1).randbytes(command.LARGEST_STDIN)
    packed = command._pack_input(prepared, None, frozenset())
    frame: dict[str, Any] = {"id": "a" * 32, "lim": wrapper.INLINE, "part": 0, "oo": 0, "eo": 0, "w": 20, "age": 259200}
    values = {**prepared.values, **packed.values, **frame, "acks": " ".join(["a" * 32] * 40)}
    script = wrapper.compose_request("begin", values, {"work": prepared.work, "input": packed.last})
    assert len(script) <= LARGEST_INPUT and b"".join([*packed.pieces, packed.last]) == prepared.stdin


def test_a_layout_gives_back_the_input() -> None:
    data = module(files=40)
    layout = kept.split_module(data)
    assert layout is not None
    parts = b"".join(layout.files[part] if isinstance(part, str) else part for part in layout.parts)
    assert layout.head + base64.b64encode(parts) + layout.tail == data
    other = kept.split_module(module(files=40, year=2025, value="y"))
    assert other is not None and other.kind == layout.kind and set(other.files) == set(layout.files)
