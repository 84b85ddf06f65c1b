# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands in sandboxes, against guests that really run them: results, once, time-outs, refusals, large data."""

from __future__ import annotations

import io
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    InvalidInput,
    Kept,
    NotFound,
    OutcomeUnknown,
    StateConflict,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import access, command, files
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestFailed, GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandResult, CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import history

from support.lab import Lab
from support.proxmox_guest import Guest

EXEC = "POST /nodes/{node}/qemu/{vmid}/agent/exec"
STATUS = "GET /nodes/{node}/qemu/{vmid}/agent/exec-status"
CONFIG = "GET /nodes/{node}/qemu/{vmid}/config"


@pytest.fixture(scope="module")
def one_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("guest"))
    yield made
    made.stop()


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.calm()
    yield one_lab
    one_lab.calm()
    one_lab.pve.close_machines()
    assert one_lab.pve.hook_errors == []


def condition(lab: Lab, sandbox: Sandbox) -> Any:
    """Return what a test may have changed of a sandbox and its VM."""
    vm = lab.pve.vm(sandbox.vmid)
    record = lab.context().records.get(sandbox.uuid)
    return vm and (dict(vm.config), vm.status, vm.qmpstatus, vm.agent is not None, record.generation)


_made: list[Any] = []


@pytest.fixture
def sandbox(lab: Lab) -> Sandbox:
    """A running sandbox: that of the test before, unless the test changed it (creating one takes a second)."""
    if not _made or condition(lab, _made[0]) != _made[1]:
        lab.reset()
        made = lab.create()
        _made[:] = [made, condition(lab, made)]
    lab.pve.requests.clear()
    lab.pve.counted.clear()
    database = lab.context().database
    database.write(lambda conn: conn.execute("DELETE FROM events WHERE operation = 'exec'") and None)
    database.write(lambda conn: conn.execute("DELETE FROM runs") and None)
    return _made[0]


@pytest.fixture
def guest(lab: Lab, sandbox: Sandbox) -> Guest:
    return lab.pve.machine(sandbox.vmid)


def run(lab: Lab, sandbox: Sandbox, *argv: str | bytes, **values: Any) -> CommandResult:
    """Run a command in a run of its own."""
    callbacks = {name: values.pop(name) for name in ("on_output", "cancel") if name in values}
    options = values.pop("options", {})
    spec = CommandSpec(argv=argv or None, **values)
    return command.run_command(lab.context(**options), sandbox, spec, **callbacks)


def began(guest: Guest) -> int:
    """Return how many commands were sent to the guest (not looks and pieces)."""
    return sum("\nbegin" in data[-10:] for _argv, data in guest.started)


def events(ctx: Context, sandbox: Sandbox) -> list[dict[str, Any]]:
    return [event for event in history.events(ctx.database, uuid=sandbox.uuid) if event["operation"] == "exec"]


# ---- results ----


def test_a_command_gives_status_output_and_an_event(lab: Lab, sandbox: Sandbox) -> None:
    result = run(lab, sandbox, "sh", "-c", "echo out; cat >&2; exit 3", stdin=b"in\0put")
    assert (result.state, result.rc, result.signal) == ("ended", 3, None)
    assert (result.stdout, result.stderr) == (b"out\n", b"in\0put")
    assert result.changed and not result.truncated and not result.timed_out
    event = events(lab.context(), sandbox)[-1]
    assert event["outcome"] == "failed" and event["evidence"]["rc"] == 3
    assert event["evidence"]["program"] == "sh" and "command" not in event["evidence"]
    assert (event["evidence"]["stdout_bytes"], event["evidence"]["stderr_bytes"]) == (4, 6)


def test_a_short_command_costs_two_requests_and_two_looks_at_its_vm(lab: Lab, sandbox: Sandbox) -> None:
    lab.pve.agent_nap = 0.1
    try:
        run(lab, sandbox, "true")
        lab.pve.counted.clear()
        run(lab, sandbox, "true")
    finally:
        lab.pve.agent_nap = 0.0
    assert lab.pve.counted[EXEC] == 1 and lab.pve.counted[STATUS] <= 2 and lab.pve.counted[CONFIG] == 2
    assert lab.pve.count() == sum(lab.pve.counted[name] for name in (EXEC, STATUS, CONFIG))


def test_no_value_of_the_user_is_in_an_argument(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    """The guest's process list and the agent's journal show the arguments of what the agent starts."""
    secret = "s3cret-value"
    run(lab, sandbox, "cat", stdin=secret.encode(), environment={"TOKEN": secret}, chdir="/tmp", user=None)
    for argv, data in guest.started:
        assert argv[:2] == ["/bin/sh", "-c"] and len(" ".join(argv)) < 150
        assert secret not in " ".join(argv) and secret not in data and data.isascii()


def test_events_name_the_program_only_unless_asked(lab: Lab, sandbox: Sandbox) -> None:
    run(lab, sandbox, "/bin/echo", "geheim")
    run(lab, sandbox, "/bin/echo", "offen", log_command=True)
    first, second = events(lab.context(), sandbox)[-2:]
    assert first["evidence"]["program"] == "echo" and "geheim" not in str(first)
    assert second["evidence"]["command"] == "/bin/echo offen"


def test_a_logged_command_has_no_secret(lab: Lab, sandbox: Sandbox) -> None:
    values = {"environment": {"TOKEN": "t0ken-of-env", "ON": "1"}, "stdin": b"first\npassw0rd-of-stdin\n"}
    run(lab, sandbox, "echo", "-1", "a=t0ken-of-env", "passw0rd-of-stdin", secret=True, log_command=True, **values)
    event = events(lab.context(), sandbox)[-1]
    assert event["evidence"]["command"] == "echo -1 a=******** ********"
    database = lab.context().database
    rows = [tuple(row) for table in ("events", "runs") for row in database.read(f"SELECT * FROM {table}")]
    assert "t0ken-of-env" not in str(rows) and "passw0rd-of-stdin" not in str(rows)


SHELLS = ["dash", "bash", "busybox"]


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_of_any_byte(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
    use_shell(guest, shell)
    every = bytes(range(1, 256))
    odd = [
        every,
        b"",
        b"-n",
        b"--",
        b"a b",
        b"$(id)",
        b"`id`",
        b"*",
        b"'",
        b'"',
        b"\\",
        b"\n",
        b"x\n\n",
        "ä€𝄞".encode(),
    ]
    result = run(lab, sandbox, "printf", "%s|", *odd)
    assert (result.rc, result.stdout) == (0, b"".join(word + b"|" for word in odd))
    text = 'printf \'%s\' "$A" | od -An -c | wc -l; echo "$B" >&2'
    result = run(lab, sandbox, cmd=text, environment={"A": "x" * 16, "B": "ö'\"$\n"})
    assert (result.stdout.strip(), result.stderr) == (b"1", "ö'\"$\n\n".encode())
    assert not guest.deaf


def use_shell(guest: Guest, shell: str) -> None:
    if shell == "busybox":
        if not shutil.which("busybox"):
            pytest.skip("busybox is not installed: apt-get install busybox-static")
        guest.use_busybox()
    else:
        found = shutil.which(shell)
        if not found:
            pytest.skip(f"{shell} is not installed")
        guest.shell = found


@pytest.mark.parametrize("shell", SHELLS)
def test_signals_are_told_apart_from_exit_statuses(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
    use_shell(guest, shell)
    killed = run(lab, sandbox, "sh", "-c", "echo before; kill -9 $$")
    assert (killed.rc, killed.signal, killed.stdout, killed.stderr) == (137, 9, b"before\n", b"")
    left = run(lab, sandbox, "sh", "-c", "exit 137")
    assert (left.rc, left.signal) == (137, None)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_time_out_ends_the_process_group(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
    use_shell(guest, shell)
    text = "trap '' TERM; echo begun; (sleep 60; echo never) & sleep 60"
    result = run(lab, sandbox, "sh", "-c", text, timeout=1, kill_after=1)
    assert result.timed_out and result.rc == 137 and result.stdout == b"begun\n"
    assert not any("sleep\x0060" in line for line in command_lines(guest))


def command_lines(guest: Guest) -> list[str]:
    lines = []
    for pid in guest.processes():
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text())
        except OSError:
            continue
    return lines


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


@pytest.mark.parametrize(
    "text, rc, said",
    [
        (["/nonsense"], 127, b"not found"),
        (["/etc/passwd"], 126, b"denied"),
    ],
)
def test_what_cannot_be_run_is_told_by_the_shell(
    lab: Lab, sandbox: Sandbox, text: list[str], rc: int, said: bytes
) -> None:
    result = run(lab, sandbox, *text)
    assert result.rc == rc and said in result.stderr.lower()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_program_that_is_nowhere_is_127_with_a_closed_folder_in_path(
    lab: Lab, sandbox: Sandbox, guest: Guest, shell: str
) -> None:
    """exec of dash and busybox answers 126 then, unlike the same word typed in that shell."""
    use_shell(guest, shell)
    result = run(lab, sandbox, "nonsense", environment={"PATH": "/usr/bin:/bin:/root"})
    assert result.rc == 127 and b"nonsense" in result.stderr


def test_a_folder_that_is_not_there_is_125(lab: Lab, sandbox: Sandbox) -> None:
    result = run(lab, sandbox, "true", chdir="/nonsense")
    assert result.rc == 125 and b"/nonsense" in result.stderr


def test_creates_and_removes_as_the_command_module_has_them(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    (guest.folder / "made [1]").touch()
    result = run(lab, sandbox, "touch", "/nonsense/x", creates=f"{guest.folder}/mad* [[]1]")
    assert result.state == "skipped" and not result.changed and "exists" in str(result.message)
    assert run(lab, sandbox, "true", removes=f"{guest.folder}/other*").state == "skipped"
    assert run(lab, sandbox, "true", removes=f"{guest.folder}/ma?e*").state == "ended"


# ---- much output ----


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


# ---- once ----


@pytest.fixture
def count_file(guest: Guest) -> Path:
    """A file that every run of the command makes longer by one byte."""
    return guest.folder / "run" / "count"


def counting(path: Path) -> list[str]:
    return ["sh", "-c", f"printf x >>{path}; echo ran"]


LOST = {
    "frozen after its ping": lambda lab, guest: guest.freeze_after_ping(7),
    "answer of exec cut": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "cut-after"),
    "596 for exec": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "answer", status=596),
    "answer of exec half": lambda lab, guest: lab.pve.fault("POST", "/agent/exec", "truncate"),
    "status timed out": lambda lab, guest: guest.lose_status(),
    "answer of status cut": lambda lab, guest: lab.pve.fault("GET", "/agent/exec-status", "cut-after"),
    "another 500": lambda lab, guest: lab.pve.fault(
        "POST", "/agent/exec", "answer", status=500, body='{"message":"odd"}'
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_answer_never_runs_the_command_twice(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path, how: str
) -> None:
    LOST[how](lab, guest)
    result = run(lab, sandbox, *counting(count_file))
    assert (result.rc, result.stdout) == (0, b"ran\n")
    assert count_file.read_text() == "x"


@pytest.mark.parametrize("text", ["PID ld does not exist", "Invalid parameter 'pid'"])
def test_an_agent_that_is_restarted_loses_no_result(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path, text: str
) -> None:
    guest.unknown_pid = text
    lab.pve.after = lambda method, path: guest.restart() if path.endswith("/agent/exec") and began(guest) == 1 else None
    assert run(lab, sandbox, *counting(count_file)).stdout == b"ran\n"
    assert count_file.read_text() == "x"


def test_a_run_id_given_again_gets_the_result_and_begins_nothing(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path
) -> None:
    run_id = str(uuid.uuid4())
    first = run(lab, sandbox, *counting(count_file), run_id=run_id)
    again = run(lab, sandbox, *counting(count_file), run_id=run_id)
    assert first.stdout == again.stdout == b"ran\n" and count_file.read_text() == "x"
    # Another command tells the guest that the result is safe; the exit status stays in the journal.
    run(lab, sandbox, "true")
    later = run(lab, sandbox, *counting(count_file), run_id=run_id)
    assert (later.rc, later.stdout) == (0, b"") and "forgotten" in str(later.message)
    assert count_file.read_text() == "x"
    with pytest.raises(InvalidInput, match="another command"):
        run(lab, sandbox, "true", run_id=run_id)


def test_after_a_reboot_nobody_can_know(lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path) -> None:
    """/run is empty then: without the age of the request mkdir alone would run the command again."""
    count = guest.folder / "count"
    count.touch()
    count.chmod(0o666)
    run_id = str(uuid.uuid4())

    def reboot(method: str, path: str) -> None:
        if path.endswith("/agent/exec") and began(guest) == 1:
            deadline = time.monotonic() + 10
            while not count.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            guest.reboot()

    lab.pve.after = reboot
    with pytest.raises(OutcomeUnknown, match="started anew"):
        run(lab, sandbox, *counting(count), run_id=run_id)
    with pytest.raises(OutcomeUnknown, match="started anew"):
        run(lab, sandbox, *counting(count), run_id=run_id)
    assert count.read_text() == "x"


def test_a_supervisor_that_was_killed_is_lost_and_not_run_again(
    lab: Lab, sandbox: Sandbox, guest: Guest, count_file: Path
) -> None:
    started = command.start_command(
        lab.context(), sandbox, CommandSpec(argv=[*counting(count_file)[:2], f"printf x >>{count_file}; sleep 60"])
    )
    guest.kill_all()
    with pytest.raises(OutcomeUnknown, match="was killed"):
        command.wait_command(lab.context(), sandbox, started.run_id)
    assert count_file.read_text() == "x"


# ---- detached ----


def test_a_detached_run_is_followed_and_ended(lab: Lab, sandbox: Sandbox) -> None:
    started = command.start_command(
        lab.context(), sandbox, CommandSpec(cmd="echo 1; sleep 2; echo 2; exit 4", timeout=0)
    )
    assert started.state == "running"
    ended = command.wait_command(lab.context(), sandbox, started.run_id)
    assert (ended.state, ended.rc, ended.stdout) == ("ended", 4, b"1\n2\n")
    assert command.read_run(lab.context(), sandbox, started.run_id, stdout_offset=2).stdout == b"2\n"
    other = command.start_command(lab.context(), sandbox, CommandSpec(argv=["sleep", "80"], timeout=0))
    assert command.wait_command(lab.context(), sandbox, other.run_id, timeout=0).state == "running"
    killed = command.kill_command(lab.context(), sandbox, other.run_id)
    assert (killed.state, killed.rc, killed.killed) == ("ended", 143, True)
    listed = {run["run_id"]: run for run in command.list_runs(lab.context(), sandbox)}
    assert listed[started.run_id]["rc"] == 4 and listed[other.run_id]["state"] == "ended"
    with pytest.raises(NotFound, match="run not found"):
        command.read_run(lab.context(), sandbox, uuid.uuid4().hex)


# ---- refusals ----


def test_states_and_leases(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    lab.power("stop", sandbox.vmid, force=True)
    with pytest.raises(
        StateConflict, match="cannot run a command in sandbox in STOPPED state. Valid states: READY, RUNNING"
    ):
        run(lab, sandbox, "true")
    assert guest.started == []
    short = lab.create("short", ttl=1)
    time.sleep(1.1)
    with pytest.raises(StateConflict, match="its lease expired"):
        run(lab, short, "true")


REFUSALS = {
    "stopped": (lambda lab, vm: lab.pve.power(vm.vmid, "stopped"), "stopped", "does not run"),
    "paused": (lambda lab, vm: lab.pve.power(vm.vmid, "paused"), "silent", "does not answer"),
    "not configured": (lambda lab, vm: vm.config.pop("agent"), "not_configured", "has no guest agent"),
    "switched off": (
        lambda lab, vm: (vm.config.__setitem__("agent", "0"), setattr(vm, "agent", None)),
        "switched_off",
        "agent: 0",
    ),
    "no agent": (lambda lab, vm: setattr(vm, "agent", None), "silent", "install it in the template"),
    "blocked": (
        lambda lab, vm: lab.pve.machine(vm.vmid).blocked.add("guest-exec"),
        "blocked",
        "/etc/sysconfig/qemu-ga",
    ),
    "windows": (lambda lab, vm: vm.config.__setitem__("ostype", "win11"), "windows", "no POSIX shell"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_each_missing_agent_has_its_own_sentence(lab: Lab, sandbox: Sandbox, guest: Guest, case: str) -> None:
    change, reason, text = REFUSALS[case]
    lab.server.call(change, lab, lab.pve.vm(sandbox.vmid))
    with pytest.raises(GuestRefused, match=text) as caught:
        run(lab, sandbox, "true")
    assert caught.value.reason == reason and guest.started == []


@pytest.mark.parametrize("ostype", ["win11", "win10", "win7", "w2k8", "w2k", "wxp", "wvista"])
@pytest.mark.parametrize("what", ["run a command in", "copy a file into", "copy a file out of"])
def test_windows_is_refused_before_anything_is_sent(
    lab: Lab, sandbox: Sandbox, guest: Guest, ostype: str, what: str
) -> None:
    lab.pve.vm(sandbox.vmid).config["ostype"] = ostype
    ctx = lab.context()
    with pytest.raises(GuestRefused) as caught:
        if what == "run a command in":
            command.run_command(ctx, sandbox, CommandSpec(argv=["true"]))
        elif what == "copy a file into":
            files.put_file(ctx, sandbox, b"x", "/tmp/x")
        else:
            files.fetch_file(ctx, sandbox, "/etc/passwd", io.BytesIO())
    assert caught.value.message.startswith(
        f"cannot {what} sandbox {sandbox.vmid}: Windows runs in it (ostype: {ostype})"
    )
    assert "Valid: guests with a POSIX shell. Use WinRM or SSH" in caught.value.message
    assert guest.started == [] and not lab.pve.counted[EXEC]


def test_a_missing_privilege_is_named(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    lab.pve.fault(
        "POST",
        "/agent/exec",
        "answer",
        status=403,
        body='{"message":"Permission check failed (/vms/1000, VM.GuestAgent.Unrestricted)"}',
    )
    with pytest.raises(GuestRefused, match=r"Grant VM.GuestAgent.Unrestricted \(Proxmox VE 9\) or VM.Monitor \(8\)"):
        run(lab, sandbox, "true")
    # It was certainly not begun, so the same id may be used once more.
    states = [entry["state"] for entry in command.list_runs(lab.context(), sandbox)]
    assert states == ["refused"]


@pytest.mark.parametrize(
    "values, text",
    [
        ({"argv": []}, "argv: names no program"),
        ({"argv": ["true"], "cmd": "true"}, "argv: argv and cmd are both given"),
        ({"argv": None}, "argv: no command is given"),
        ({"argv": ["true"], "run_id": "4711-x"}, "run_id: '4711-x' is no id of a run"),
        ({"argv": ["a\0b"]}, "argv: has a NUL byte"),
        ({"argv": ["true"], "environment": {"A=B": "x"}}, "environment: 'A=B' is no name"),
        ({"argv": ["true"], "user": "root; id"}, "user: 'root; id' is no user name"),
        ({"argv": ["true"], "timeout": -1}, "timeout: -1 is out of range"),
        ({"argv": ["true"], "wait_for_agent": -1}, "wait_for_agent: -1 is out of range"),
        ({"argv": ["x" * 40000]}, "argv: command, arguments and environment have"),
    ],
)
def test_bad_values_are_refused_by_name(
    lab: Lab, sandbox: Sandbox, guest: Guest, values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInput, match=text):
        command.run_command(lab.context(), sandbox, CommandSpec(**values))
    assert guest.started == []


def test_an_agent_that_comes_up_late_is_waited_for(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    guest.freeze(0.6)
    with pytest.raises(GuestRefused, match="does not answer"):
        run(lab, sandbox, "true")
    assert run(lab, sandbox, "true", wait_for_agent=30).rc == 0


# ---- whose VM ----


def test_no_command_reaches_a_strangers_vm(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    lab.pve.make_foreign(sandbox.vmid, running=True)
    lab.pve.requests.clear()
    with pytest.raises(Kept, match="now belongs to another VM"):
        run(lab, sandbox, "true")
    assert guest.started == [] and lab.pve.touched(sandbox.vmid) == []


def test_an_answer_of_another_vm_is_no_result(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    def swap(method: str, path: str) -> None:
        if path.endswith("/agent/exec-status"):
            lab.pve.after = None
            vm = lab.pve.vm(sandbox.vmid)
            vm.config["smbios1"] = f"uuid={uuid.uuid4()}"
            vm.config["description"] = "not ours"

    lab.pve.after = swap
    with pytest.raises(Kept, match="now belongs to another VM"):
        run(lab, sandbox, "sleep", "0.3")
    assert events(lab.context(), sandbox) == []


# ---- a guest that lies ----


def lies(answer: dict[str, Any], text: bytes) -> dict[str, Any]:
    return {**answer, "out-data": text.decode("latin-1")}


LIES = {
    "no frame": lambda a: lies(a, b"hello"),
    "another run": lambda a: lies(a, b"agentlab1 " + b"0" * 32 + b" state=ended rc=0 sig=0 ms=1 so=0 se=0 lo=0 le=0\n"),
    "more than it says": lambda a: lies(a, a["out-data"].encode("latin-1") + b"more"),
    "other bytes": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"told", b"lied")),
    "no number": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"rc=0", b"rc=x")),
    "a huge number": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"so=5", b"so=5000000000")),
    "another folder": lambda a: lies(a, a["out-data"].encode("latin-1").replace(b"dir=/run", b"dir=/etc")),
    "no text": lambda a: {**a, "out-data": 5},
    "beyond bytes": lambda a: {**a, "out-data": "\u20ac"},
    "a strange end": lambda a: {**a, "exited": "perhaps"},
}


@pytest.mark.parametrize("how", LIES)
def test_what_the_guest_says_is_not_trusted(lab: Lab, sandbox: Sandbox, guest: Guest, how: str) -> None:
    guest.lie = LIES[how]
    with pytest.raises((GuestFailed, OutcomeUnknown)):
        run(lab, sandbox, "echo", "told")
    assert all(event["outcome"] != "done" for event in events(lab.context(), sandbox))


def test_the_first_look_is_learned_for_each_vm(lab: Lab) -> None:
    access._misses.clear()
    for _time in range(4):
        access._learn_delay("slow", 2)
        access._learn_delay("fast", 1)
    assert access._first_delay("slow") > access._first_delay("fast")
    for _time in range(12):
        access._learn_delay("slow", 1)
    assert access._first_delay("slow") == access._first_delay("fast")
