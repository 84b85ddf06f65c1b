# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No command runs in a stranger's VM, and none runs twice: identity, crashes of the controller, faults of the agent."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    OutcomeUnknown,
    StoreError,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command, files
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from faults.command_support import FAULTS, child
from support.lab import Lab
from support.play import play
from support.programs import require_program

pytestmark = pytest.mark.faults


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    yield one_lab
    one_lab.calm()
    one_lab.pve.close_machines()
    one_lab.reset()


# ---- whose VM ----


def stranger(**values: Any) -> Callable[[Lab, Sandbox], None]:
    return lambda lab, sandbox: lab.pve.make_foreign(sandbox.vmid, running=True, **values)


def swap_record(lab: Lab, sandbox: Sandbox, **values: Any) -> None:
    names = ", ".join(f"{name} = ?" for name in values)
    lab.context().database.write(
        lambda conn: (
            conn.execute(f"UPDATE sandboxes SET {names} WHERE uuid = ?", (*values.values(), sandbox.uuid)) and None
        )
    )


def imported(lab: Lab, sandbox: Sandbox) -> None:
    stranger()(lab, sandbox)
    swap_record(lab, sandbox, smbios_uuid=None)


def expired(lab: Lab, sandbox: Sandbox) -> None:
    stranger()(lab, sandbox)
    swap_record(lab, sandbox, lease_expires_at=1)


def destroyed(lab: Lab, sandbox: Sandbox) -> None:
    lab.destroy(sandbox.vmid, force=True)
    lab.pve.add_guest(sandbox.vmid, "somebody-elses", status="running")


def moved_and_reused(lab: Lab, sandbox: Sandbox) -> None:
    stranger()(lab, sandbox)
    lab.pve.move_vm(sandbox.vmid, "pve2")


# Thirteen ways in which the VM at a sandbox's VMID is somebody else's, or cannot be proven to be ours: docs/safety.md,
# with a command in the place of a destroy.
WAYS: dict[str, Callable[[Lab, Sandbox], None]] = {
    "1 the VMID was handed out again": stranger(),
    "2 the same name": stranger(same_name=True),
    "3 the end of a lease": expired,
    "4 our description was copied": stranger(copy_description=True),
    "5 a DESTROYED record": destroyed,
    "6 a clone made by hand, all but the SMBIOS UUID": stranger(same_name=True, same_tags=True, copy_description=True),
    "7 only the SMBIOS UUID is ours": stranger(copy_smbios=True),
    "8 reused on another node": moved_and_reused,
    "9 its node is offline": lambda lab, _sandbox: lab.pve.nodes["pve1"].__setitem__("online", False),
    "10 a VM is just being made there": stranger(lock="clone"),
    "11 it is a template": stranger(template=True),
    "12 no SMBIOS UUID at all": stranger(smbios=False),
    "13 an imported record without a UUID": imported,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_command_and_no_file_reaches_a_strangers_vm(lab: Lab, way: str) -> None:
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    lab.server.call(WAYS[way], lab, sandbox) if way.startswith("9") else WAYS[way](lab, sandbox)
    vm = lab.pve.vm(sandbox.vmid)
    # The stranger has an agent that would do as it is told.
    vm.config.setdefault("agent", "1")
    vm.agent = vm.agent or {"interfaces": []}
    lab.pve.requests.clear()
    with pytest.raises(AgentlabError):
        command.run_command(lab.context(), sandbox, CommandSpec(argv=["true"]))
    with pytest.raises(AgentlabError):
        files.put_file(lab.context(), sandbox, b"x", "/tmp/agentlab-stranger")
    with pytest.raises(AgentlabError):
        files.fetch_file(lab.context(), sandbox, "/etc/passwd", io.BytesIO())
    assert guest.started == [] and not guest.programs
    assert [request for request in lab.pve.requests if "/agent/" in request[1]] == []


@pytest.mark.parametrize("way", WAYS)
def test_no_task_reaches_a_strangers_vm_through_the_connection(lab: Lab, tmp_path: Path, way: str) -> None:
    """The connection plugin in a real play, on the same thirteen ways: a command, a file there, a file back."""
    sandbox = lab.create("box")
    guest = lab.pve.machine(sandbox.vmid)
    lab.server.call(WAYS[way], lab, sandbox) if way.startswith("9") else WAYS[way](lab, sandbox)
    vm = lab.pve.vm(sandbox.vmid)
    vm.config.setdefault("agent", "1")
    vm.agent = vm.agent or {"interfaces": []}
    lab.pve.requests.clear()
    env = {**lab.server.environment(lab.folder), "AGENTLAB_DATABASE": lab.database, "PATH": os.environ["PATH"]}
    source = tmp_path / "source"
    source.write_text("x")
    inventory = tmp_path / "boxes.yml"
    values = {"ansible_connection": "agentlab.proxmox.sandbox", "ansible_remote_tmp": f"{guest.folder}/ansible"}
    inventory.write_text(json.dumps({"all": {"hosts": {"box": values}}}), encoding="utf-8")
    on = {"ignore_unreachable": True, "ignore_errors": True}
    tasks = [
        {"name": "command", "ansible.builtin.raw": "true", **on},
        {"name": "there", "ansible.builtin.copy": {"src": str(source), "dest": f"{guest.folder}/x"}, **on},
        {"name": "back", "ansible.builtin.fetch": {"src": "/etc/passwd", "dest": f"{tmp_path}/back"}, **on},
    ]
    run = play(
        [{"name": "inside", "hosts": "box", "gather_facts": False, "tasks": tasks}],
        env,
        tmp_path,
        args=("-i", str(inventory)),
    )
    assert all(run.status(str(task["name"])) in ("failed", "unreachable") for task in tasks), run.output
    assert "Traceback" not in run.output and not (tmp_path / "back").exists()
    assert guest.started == [] and not guest.programs
    assert [request for request in lab.pve.requests if "/agent/" in request[1]] == []


@pytest.mark.parametrize("at", ["/agent/exec", "/agent/exec-status"])
def test_a_vm_swapped_meanwhile_makes_the_result_an_error(lab: Lab, at: str) -> None:
    sandbox = lab.create()

    def swap(_method: str, path: str) -> None:
        if path.endswith(at):
            lab.pve.after = None
            vm = lab.pve.vm(sandbox.vmid)
            vm.config.update(smbios1=f"uuid={uuid.uuid4()}", description="not ours")

    lab.pve.after = swap
    with pytest.raises(AgentlabError, match="another VM"):
        command.run_command(lab.context(), sandbox, CommandSpec(argv=["echo", "x"]))


# ---- a controller that is killed ----


@pytest.mark.parametrize("place, points", [("request", 5), ("commit", 2)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_controller_never_runs_a_command_twice(lab: Lab, place: str, points: int, moment: str) -> None:
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    killed = 0
    for point in range(1, points + 1):
        count = guest.folder / "run" / f"count-{point}"
        spec = CommandSpec(
            argv=["sh", "-c", f"printf x >>{count}; sleep 0.2; echo ran {point}"], run_id=uuid.uuid4().hex
        )
        run = functools.partial(command.run_command, sandbox=sandbox, spec=spec)
        killed += child(lab, run, point, moment, place) == 9
        result = command.run_command(lab.context(), sandbox, spec)
        assert (result.rc, result.stdout, count.read_text()) == (0, f"ran {point}\n".encode(), "x"), point
    assert killed == points


@pytest.mark.parametrize("place, points", [("request", 5), ("commit", 1)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_controller_that_is_killed_while_it_copies_leaves_the_old_file_or_the_new_one(
    lab: Lab, place: str, points: int, moment: str
) -> None:
    """A repeat brings the new one. 100,000 bytes take two pieces and the request that installs the file."""
    sandbox = lab.create()
    target = lab.pve.machine(sandbox.vmid).folder / "run" / "file"
    old, new = b"old" * 1000, os.urandom(100_000)
    killed = 0
    for point in range(1, points + 1):
        files.put_file(lab.context(), sandbox, old, str(target), mode=0o640)
        put = functools.partial(files.put_file, sandbox=sandbox, source=new, path=str(target))
        killed += child(lab, put, point, moment, place) == 9
        # What was on its way may still arrive.
        time.sleep(0.3)
        assert target.read_bytes() in (old, new), point
        put(lab.context())
        assert target.read_bytes() == new and target.stat().st_mode & 0o7777 == 0o640, point
        back = io.BytesIO()
        get = functools.partial(files.fetch_file, sandbox=sandbox, path=str(target))
        assert child(lab, lambda ctx, get=get: get(ctx, target=io.BytesIO()), min(point, 3), moment, place) == 9
        get(lab.context(), target=back)
        assert back.getvalue() == new
    assert killed == points


# ---- an agent that fails at each request ----


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_agent_that_fails_at_any_request_runs_nothing_twice(lab: Lab, fault: str, at: int) -> None:
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    count = guest.folder / "run" / "count"
    seen = [0]

    def strike(_method: str, path: str) -> None:
        if "/agent/" in path:
            seen[0] += 1
            if seen[0] == at:
                FAULTS[fault](guest)

    lab.pve.before = strike
    spec = CommandSpec(argv=["sh", "-c", f"printf x >>{count}; sleep 0.3; echo ran"], wait_for_agent=20)
    result = command.run_command(lab.context(), sandbox, spec)
    assert (result.rc, result.stdout, count.read_text()) == (0, b"ran\n", "x")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_guest_that_is_rebooted_runs_nothing_twice(lab: Lab, at: int) -> None:
    """Either the result is the command's, or nobody claims to know."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    count: Path = guest.folder / "count"
    count.touch()
    count.chmod(0o666)
    seen = [0]

    def strike(_method: str, path: str) -> None:
        if "/agent/" in path:
            seen[0] += 1
            if seen[0] == at:
                guest.reboot()

    lab.pve.before = strike
    spec = CommandSpec(argv=["sh", "-c", f"printf x >>{count}; sleep 0.3; echo ran"], run_id=uuid.uuid4().hex)
    for _time in range(2):
        try:
            result = command.run_command(lab.context(), sandbox, spec)
            assert result.stdout == b"ran\n"
        except OutcomeUnknown as error:
            assert error.detail["run_id"] == spec.run_id
    time.sleep(0.5)
    assert len(count.read_text()) <= 1


def test_a_file_is_the_old_one_or_the_new_one_whatever_happens(lab: Lab) -> None:
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    target = guest.folder / "run" / "file"
    old, new = b"old" * 1000, os.urandom(200_000)
    for at in (1, 3, 5):
        files.put_file(lab.context(), sandbox, old, str(target), mode=0o640)
        calls = itertools.count(1)

        def strike(_method: str, path: str, at: int = at, calls: Any = calls) -> None:
            if path.endswith("/agent/exec") and next(calls) == at:
                lab.pve.fault("POST", "/agent/exec", "cut-before")

        lab.pve.before = strike
        try:
            files.put_file(lab.context(), sandbox, new, str(target))
            assert target.read_bytes() == new
        except OutcomeUnknown:
            assert target.read_bytes() in (old, new)
        lab.pve.before = None
        lab.pve.faults.clear()
        assert target.stat().st_mode & 0o7777 == 0o640
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".agentlab-")] == []


def leftovers(*folders: Path) -> list[Path]:
    """Return hidden files and folders of uploads in these folders of the guest."""
    return [path for folder in folders for path in folder.glob(".agentlab-" + "?" * 32 + "*")]


@pytest.fixture
def given_up(lab: Lab) -> tuple[Sandbox, Path, Path, Path]:
    """A sandbox, a file of an upload whose controller was killed, its hidden file, and its folder in /run."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    folder = guest.folder / "files $x [a"
    folder.mkdir()
    os.chown(folder, guest.folder.stat().st_uid, guest.folder.stat().st_gid)
    target = folder / "file"
    put = functools.partial(files.put_file, sandbox=sandbox, source=os.urandom(300_000), path=str(target))
    assert child(lab, put, 4, "after", "request") == 9
    wait_until(lambda: len(list((guest.folder / "run/agentlab").glob("*/p.*"))) >= 2)
    # Pieces that the controller had sent before its end still arrive.
    time.sleep(0.3)
    wait_until(lambda: not guest.waiting and not guest.busy.locked() and not guest.processes())
    (hidden,) = leftovers(folder)
    (transfer,) = (guest.folder / "run/agentlab").iterdir()
    return sandbox, target, hidden, transfer


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_older(minutes: int, *paths: Path) -> None:
    for path in paths:
        os.utime(path, (time.time() - minutes * 60,) * 2)


@pytest.mark.parametrize("action", ["a command", "another file", "the same file"])
def test_the_next_action_removes_what_a_killed_upload_left(
    lab: Lab, given_up: tuple[Sandbox, Path, Path, Path], action: str
) -> None:
    """Not at once: another controller may be sending these pieces."""
    sandbox, target, hidden, transfer = given_up

    def act() -> None:
        if action == "a command":
            command.run_command(lab.context(), sandbox, CommandSpec(argv=["true"]))
        else:
            path = target if action == "the same file" else target.parent / "other"
            files.put_file(lab.context(), sandbox, b"new", str(path))

    act()
    time.sleep(0.5)
    assert hidden.exists() and transfer.exists()
    make_older(11, transfer)
    act()
    wait_until(lambda: not hidden.exists() and not transfer.exists())
    assert leftovers(target.parent) == []


def test_a_file_in_the_same_folder_removes_what_an_upload_left_before_a_reboot(
    lab: Lab, given_up: tuple[Sandbox, Path, Path, Path]
) -> None:
    sandbox, target, hidden, _transfer = given_up
    lab.pve.machine(sandbox.vmid).reboot()
    users = [target.parent / name for name in (".agentlab-notes", ".agentlab-" + "x" * 32, ".agentlab-" + "a" * 31)]
    for path in users:
        path.touch()
    make_older(121, hidden, *users)
    files.put_file(lab.context(), sandbox, b"new", str(target))
    wait_until(lambda: not hidden.exists())
    assert all(path.exists() for path in users) and target.read_bytes() == b"new"


def test_an_upload_whose_pieces_were_removed_meanwhile_arrives(lab: Lab) -> None:
    """A controller that stood still for minutes goes on, and another one has cleared up after it."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    data, calls = os.urandom(300_000), itertools.count(1)

    def strike(_method: str, path: str) -> None:
        if path.endswith("/agent/exec") and next(calls) == 6:
            for transfer in (guest.folder / "run/agentlab").iterdir():
                shutil.rmtree(transfer)
            for hidden in leftovers(guest.folder / "run"):
                hidden.unlink()

    lab.pve.before = strike
    files.put_file(lab.context(), sandbox, data, str(guest.folder / "run/file"))
    assert (guest.folder / "run/file").read_bytes() == data and next(calls) > 8


def odd_bytes(random: Random, most: int) -> bytes:
    """Return up to so many bytes without NUL: any byte, or any Unicode."""
    if random.random() < 0.5:
        return bytes(random.randrange(1, 256) for _byte in range(random.randrange(most)))
    points = (
        random.choice([random.randrange(1, 0xD800), random.randrange(0xE000, 0x110000)]) for _n in range(most // 4)
    )
    return "".join(map(chr, points)).encode()


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_arguments_input_and_file_names_of_any_byte(lab: Lab, shell: str) -> None:
    """AGENTLAB_COMMANDS sets how many commands each shell runs."""
    random = Random(os.environ.get("AGENTLAB_FAULTS_SEED", "4711"))
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    if shell == "busybox":
        require_program("busybox", "busybox-static")
        guest.use_busybox()
    else:
        guest.shell = require_program(shell)
    ctx = lab.context()
    for number in range(int(os.environ.get("AGENTLAB_COMMANDS", "20"))):
        words = [odd_bytes(random, 200) for _word in range(random.randrange(5))]
        data = os.urandom(random.randrange(3000))
        status = random.randrange(100)
        text = "printf '%s\\0' \"$@\"; cat >&2; exit " + str(status)
        result = command.run_command(ctx, sandbox, CommandSpec(argv=["sh", "-c", text, "x", *words], stdin=data))
        expected = b"".join(word + b"\0" for word in words) or b"\0"
        assert (result.rc, result.stdout, result.stderr) == (status, expected, data), (number, words)
        if number % 4 == 0:
            name = odd_bytes(random, 60).replace(b"/", b"-") or b"x"
            folder = os.fsencode(guest.folder / "run")
            path = os.fsdecode(folder + b"/f" + name)
            files.put_file(ctx, sandbox, data, path)
            target = io.BytesIO()
            files.fetch_file(ctx, sandbox, path, target)
            assert target.getvalue() == data == Path(path).read_bytes(), path
            os.unlink(path)
    assert not guest.deaf


# ---- a VM or a lease that ends while the command runs ----


@pytest.mark.parametrize("end", ["the VM is stopped", "the lease ends", "the agent is blocked"])
@pytest.mark.parametrize("at", ["the first answer", "a later look"])
@pytest.mark.parametrize("shown", [True, False])
def test_a_command_that_began_is_never_told_as_refused_and_not_run_again(
    lab: Lab, end: str, at: str, shown: bool
) -> None:
    """A repeat with the same id after the guest was started anew runs nothing."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    vm = lab.pve.vm(sandbox.vmid)
    count: Path = guest.folder / "count"
    count.touch()
    count.chmod(0o666)

    def strike(method: str, path: str) -> None:
        begun = path.endswith("/exec-status") and count.read_text()
        if not begun if at == "the first answer" else not (path.endswith("/exec") and guest.started):
            return
        if end == "the agent is blocked":
            guest.blocked |= {"guest-exec", "guest-exec-status"}
            return
        vm.status = "stopped"
        guest.kill_all()
        if end == "the lease ends":
            swap_record(lab, sandbox, lease_expires_at=1, state="TIMEOUT")

    lab.pve.before = strike
    spec = CommandSpec(argv=["sh", "-c", f"printf x >>{count}; sleep 30"], run_id=uuid.uuid4().hex)
    # Either makes the controller look once a second.
    watch: dict[str, Any] = {"on_output": lambda out, err: None} if shown else {"cancel": lambda: False}
    with pytest.raises(OutcomeUnknown) as caught:
        command.run_command(lab.context(), sandbox, spec, **watch)
    assert caught.value.detail["run_id"] == spec.run_id and spec.run_id in caught.value.message
    if end == "the lease ends":
        assert "its lease ended at" in caught.value.message and "agentlab_lease" in caught.value.message
    lab.pve.before = None
    guest.blocked.clear()
    vm.status = "running"
    swap_record(lab, sandbox, lease_expires_at=lab.context().clock.now() + 3600, state=sandbox.state)
    guest.reboot()
    with pytest.raises(OutcomeUnknown):
        command.run_command(lab.context(), sandbox, spec, **watch)
    time.sleep(0.3)
    assert count.read_text() == "x"


@pytest.mark.parametrize("case", ["expiry rests", "the records cannot be read"])
def test_only_a_sandbox_in_timeout_is_said_to_have_ended_its_command(
    lab: Lab, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command goes on while a lease that is over waits for expiry. The answer names the run in every case."""
    sandbox = lab.create()
    guest = lab.pve.machine(sandbox.vmid)
    ctx = lab.context()

    def refuse(_uuid: str) -> Sandbox:
        raise StoreError("the records cannot be read")

    def strike(_method: str, path: str) -> None:
        if not path.endswith("/exec") or not guest.started:
            return
        guest.blocked |= {"guest-exec", "guest-exec-status"}
        if case == "expiry rests":
            swap_record(lab, sandbox, lease_expires_at=1)
        else:
            monkeypatch.setattr(ctx.records, "get", refuse)

    lab.pve.before = strike
    spec = CommandSpec(argv=["sleep", "30"], run_id=uuid.uuid4().hex)
    with pytest.raises(OutcomeUnknown) as caught:
        command.run_command(ctx, sandbox, spec, cancel=lambda: False)
    assert caught.value.detail["run_id"] == spec.run_id and f"run_id={spec.run_id}" in caught.value.message
    assert "ended with it" not in caught.value.message
