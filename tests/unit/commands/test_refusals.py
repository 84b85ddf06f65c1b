# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands in sandboxes that are refused before anything is sent: states, agents, Windows, privileges, values."""

from __future__ import annotations

import io
import time
from random import Random
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput, StateConflict
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command, files
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.command import CommandSpec
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import EXEC, run
from support.lab import FakeClock, Lab
from support.programs import require_program
from support.proxmox_guest import Guest


def test_a_stopped_sandbox_or_an_expired_lease_gets_no_command(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
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
    "hibernated": (
        lambda lab, vm: (lab.pve.power(vm.vmid, "stopped"), vm.config.__setitem__("lock", "suspended")),
        "hibernated",
        "is hibernated, so nothing can be run in it. Start the sandbox",
    ),
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


def test_pieces_of_input_wait_for_an_agent_that_comes_up_late(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    data = Random(1).randbytes(150_000)
    silences = [0.4]

    def fall_silent(_method: str, path: str) -> None:
        if "/agent/" in path and silences:
            guest.freeze(silences.pop())

    lab.pve.before = fall_silent
    result = run(lab, sandbox, "cat", stdin=data, wait_for_agent=30, max_output=len(data))
    assert (result.rc, result.stdout) == (0, data) and not silences


def test_a_silence_during_a_long_command_is_waited_out(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends during the silence, so its result comes after it."""
    monkeypatch.setattr(command, "_SHOW_WAIT", 0)
    gate = guest.folder / "run" / "gate"
    shown = []

    def fall_silent(_method: str, path: str) -> None:
        if path.endswith("/agent/exec") and guest.started and not gate.exists():
            gate.touch()
            guest.freeze(0.4)

    lab.pve.before = fall_silent
    spec = CommandSpec(cmd=f"printf x >>{gate}.count; until [ -e {gate} ]; do sleep 0.05; done; echo ran")
    result = command.run_command(lab.context(), sandbox, spec, on_output=lambda out, err: shown.append(out))
    assert (result.rc, result.stdout, b"".join(shown)) == (0, b"ran\n", b"ran\n")
    assert gate.exists() and (guest.folder / "run" / "gate.count").read_text() == "x"


def test_an_agent_that_does_not_answer_is_asked_rarely(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request to a silent agent holds a worker of the node's daemon for three seconds."""
    clock = FakeClock()
    monkeypatch.setattr(lab, "clock", clock)
    guest.freeze(600)
    began = clock.monotonic()
    with pytest.raises(GuestRefused, match="does not answer"):
        run(lab, sandbox, "true", wait_for_agent=120)
    assert 60 < clock.monotonic() - began < 150
    assert 4 <= lab.pve.counted[EXEC] <= 9


def test_a_guest_without_a_program_of_the_wrapper_is_told_which(lab: Lab, sandbox: Sandbox, guest: Guest) -> None:
    programs = guest.folder / "few"
    programs.mkdir()
    for name in ("sh", "cat", "mkdir", "id", "base64", "sleep", "wc", "tail", "head", "rm", "find", "tr"):
        (programs / name).symlink_to(require_program(name))
    before, guest.path = guest.path, str(programs)
    try:
        with pytest.raises(GuestRefused, match="the guest has no program setsid; install coreutils and util-linux"):
            run(lab, sandbox, "true")
    finally:
        guest.path = before
    assert run(lab, sandbox, "true").rc == 0


def test_no_name_of_the_user_is_in_the_address_of_a_request(
    lab: Lab, sandbox: Sandbox, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The access log of the node has the address of each request, and the file name of file-read is a part of it."""
    asked: list[str] = []
    real = guest.read

    def read(name: str, offset: int, count: int, decode: bool) -> dict[str, Any]:
        asked.append(name)
        return real(name, offset, count, decode)

    monkeypatch.setattr(guest, "read", read)
    data = Random(2).randbytes(200_000)
    path = str(guest.folder / "run" / "geheimer-name")
    target = io.BytesIO()
    files.put_file(lab.context(), sandbox, data, path)
    files.fetch_file(lab.context(), sandbox, path, target)
    run(lab, sandbox, "cat", path, stdin=b"geheimes", environment={"T": "geheimes"}, max_output=300_000)
    assert target.getvalue() == data
    assert len(asked) >= 2 and all(name.startswith("/run/agentlab/") for name in asked), asked
    assert "geheim" not in str(asked) + str(lab.pve.requests)
