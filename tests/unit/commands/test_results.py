# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Commands in sandboxes, against guests that really run them: exit statuses, arguments, shells, requests, events."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import access
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.model import Sandbox

from support.commands import EXEC, SHELLS, command_lines, events, run, use_shell
from support.lab import Lab
from support.proxmox_guest import Guest

STATUS = "GET /nodes/{node}/qemu/{vmid}/agent/exec-status"
CONFIG = "GET /nodes/{node}/qemu/{vmid}/config"


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


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_of_any_byte_arrive_unchanged(lab: Lab, sandbox: Sandbox, guest: Guest, shell: str) -> None:
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


def test_the_first_look_is_learned_for_each_vm(lab: Lab) -> None:
    access._misses.clear()
    for _time in range(4):
        access._learn_delay("slow", 2)
        access._learn_delay("fast", 1)
    assert access._choose_first_delay("slow") > access._choose_first_delay("fast")
    for _time in range(12):
        access._learn_delay("slow", 1)
    assert access._choose_first_delay("slow") == access._choose_first_delay("fast")
