# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""95 calls of the real pvesh (Proxmox VE 9.2, two nodes), played to our reader and compared with the stand-in of the
tests.

``tests/recorded/pvesh.json`` has each call's arguments, environment, exit status and output, in the order they were
made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import errors
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.config import ProxmoxSettings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient

from support import pvesh
from support.double import TOKEN_ID, TOKEN_SECRET, Server

RECORDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "recorded/pvesh.json").read_text(encoding="utf-8")
)
FAILED = "Parameter verification failed."

# ---- the reader ----

# Refusals: the status that the https API has for the same case, and the sentence.
REFUSALS = {
    "cluster/nextid taken": (400, f"{FAILED} vmid: VM 9050 already exists"),
    "clone, VMID taken": (500, "unable to create VM 5030: config file already exists"),
    "config, missing VM": (500, "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist"),
    "config, missing VM, other node": (500, "Configuration file 'nodes/pve2/qemu-server/5098.conf' does not exist"),
    "config, missing VM, LANG=de_DE.UTF-8": (
        500,
        "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist",
    ),
    "config, missing VM, LANG unset": (500, "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist"),
    "config, missing VM, LC_ALL=C": (500, "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist"),
    "config, missing VM, LC_ALL=de_DE.UTF-8": (
        500,
        "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist",
    ),
    "config without --output-format": (500, "Configuration file 'nodes/pve1/qemu-server/5098.conf' does not exist"),
    "config set, old digest": (500, "checksum mismatch (file change by other user?)"),
    "config set, other node, old digest": (500, "checksum mismatch (file change by other user?)"),
    "config set, parameter error": (
        400,
        f"{FAILED} cores: value must have a minimum value of 1 memory: invalid format - format error "
        "memory.current: type check ('integer') failed - got 'x'",
    ),
    "config set, parameter error, other node": (
        400,
        f"{FAILED} memory: invalid format - format error memory.current: type check ('integer') failed - got 'x'",
    ),
    "config set, unknown parameter": (400, "Unknown option: colour 400 unable to parse option"),
    "bad option": (400, "Unknown option: nonsense 400 unable to parse option"),
    "config set, locked": (500, "VM is locked (backup)"),
    "agent exec-status, second time": (500, "Agent error: PID ld does not exist"),
    "agent exec, non-ASCII argument": (500, "VM 5030 qga command 'guest-exec' failed - got timeout"),
    "agent ping, other node, no agent in the guest": (500, "No QEMU guest agent configured"),
    "delete, running": (500, "VM 5030 is running - destroy failed"),
    "delete, running, other node": (500, "VM 5031 is running - destroy failed"),
    "delete, missing VM": (500, "Configuration file 'nodes/pve1/qemu-server/5030.conf' does not exist"),
    "delete, missing VM, other node": (500, "Configuration file 'nodes/pve2/qemu-server/5031.conf' does not exist"),
    "task status, other node's task asked at this node": (400, f"{FAILED} upid: no such task"),
    "task status, unknown task": (400, f"{FAILED} upid: no such task"),
    "unknown path": (501, "No 'get' handler defined for '/nodes/pve1/nonsense'"),
    "unknown path below qemu": (501, "No 'get' handler defined for '/nodes/pve1/qemu/5030/nonsense'"),
    "method that the path has not": (501, "No 'create' handler defined for '/version'"),
    "unknown node": (
        500,
        "hostname lookup 'pve9' failed - failed to get address info for: pve9: Temporary failure in name resolution",
    ),
    "missing parameter": (400, f"{FAILED} newid: property is missing and it is not optional"),
    "clone, --noproxy on the other node": (
        400,
        f"{FAILED} noproxy: property is not defined in schema and the schema does not allow additional properties",
    ),
    "no quorum: clone": (500, "cluster not ready - no quorum?"),
    "no quorum: start": (500, "cluster not ready - no quorum?"),
    "no quorum: config set": (
        500,
        "unable to open file '/etc/pve/nodes/pve1/qemu-server/5005.conf.tmp.35739' - Permission denied",
    ),
}
# Answers of writes that are neither a task id nor nothing.
ANSWERS: dict[str, Any] = {
    "agent ping": {"result": {}},
    "agent exec": {"pid": 164},
    "storage alloc": "local:5034/vm-5034-disk-0.qcow2",
    "storage alloc, other node": "local:5034/vm-5034-disk-0.qcow2",
}
PLAYER = """#!/bin/sh
cat "$0.out"
cat "$0.err" >&2
for word; do printf '%s\\0' "$word"; done > "$0.argv"
exit $(cat "$0.exit")
"""


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named pvesh that prints what a file says."""
    program = tmp_path / "pvesh"
    program.write_text(PLAYER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def asked(call: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Return method, path and parameters of a recorded call."""
    _program, command, path, *rest = call["argv"]
    return {"get": "get", "create": "post", "set": "put", "delete": "delete"}[command], path[1:], pvesh.parse(rest)


def play(player: Path, call: dict[str, Any], client: ProxmoxClient | None = None) -> Any:
    for suffix in ("out", "err"):
        Path(f"{player}.{suffix}").write_text(call[{"out": "stdout", "err": "stderr"}[suffix]], encoding="utf-8")
    Path(f"{player}.exit").write_text(str(call["exit"]))
    method, path, params = asked(call)
    return getattr(client or ProxmoxClient(ProxmoxSettings(), SystemClock()), method)(path, **params)


@pytest.mark.parametrize("call", RECORDED, ids=[call["case"] for call in RECORDED])
def test_the_reader_takes_what_the_real_pvesh_prints(player: Path, call: dict[str, Any]) -> None:
    case = call["case"]
    if call["exit"]:
        with pytest.raises(errors.ProxmoxError) as caught:
            play(player, call)
        if case == "other node offline: config":
            assert isinstance(caught.value, errors.Unreachable) and "No route to host" in caught.value.message
        else:
            assert isinstance(caught.value, errors.ApiError), caught.value
            assert (caught.value.status, caught.value.text) == REFUSALS[case]
    else:
        answer = play(player, call)
        if call["argv"][1] == "get":
            assert answer == json.loads(call["stdout"])
        elif case in ANSWERS:
            assert answer == ANSWERS[case]
        elif case.startswith("config set"):
            assert answer is None
        else:
            # The last task id of all that was printed; between quotes nothing else is.
            assert answer == re.findall(r"UPID:[^\"\\]+:", call["stdout"])[-1]
    # Also asked for as the real program was: each value one argument.
    words = Path(f"{player}.argv").read_bytes().decode().split("\0")[:-1]
    expected = call["argv"][1:]
    assert words == (expected if "--output-format" in expected else [*expected, "--output-format", "json"])


WRITES = [call for call in RECORDED if call["argv"][1] != "get" and "UPID:" in call["stdout"]]


@pytest.mark.parametrize("call", WRITES, ids=[call["case"] for call in WRITES])
def test_only_a_silent_standard_error_tells_that_a_task_ended_well(player: Path, call: dict[str, Any]) -> None:
    """Exit status 0 tells nothing.

    Proxmox names an error, warnings and a dead worker on standard error: then, and also beside a warning of something
    else, the task's own status is read.
    """
    program = ProxmoxClient(ProxmoxSettings(), SystemClock())
    upid = play(player, call, program)
    named = any(word in call["case"] for word in ("task fails", "task dies", "task with warnings", "resize, unknown"))
    assert bool(call["stderr"]) is (named or "perl: warning" in call["stderr"])
    assert program.ended_well(upid) is (not call["stderr"])
    assert not program.ended_well(upid), "told twice"


@pytest.mark.parametrize("case", ["version", "start, this node", "config set, right digest"])
def test_warnings_on_standard_error_are_no_error(player: Path, case: str) -> None:
    call = next(call for call in RECORDED if call["case"] == case)
    warnings = next(call for call in RECORDED if call["case"] == "config, LANG=de_DE.UTF-8")["stderr"]
    assert warnings.startswith("perl: warning")
    assert play(player, call) == play(player, {**call, "stderr": warnings + "cannot read /etc/something: ignored\n"})


def test_a_user_s_text_is_never_taken_for_a_task_id(player: Path) -> None:
    """A config write prints the description."""
    call = next(call for call in RECORDED if call["case"] == "config set, right digest")
    upid = "UPID:pve1:00007A0E:000E26AE:6B0A6484:qmclone:9050:root@pam:"
    assert play(player, {**call, "stdout": f'update VM 5030: -description "{upid}"\n'}) is None


@pytest.mark.parametrize(
    ("stdout", "words"),
    [
        ("", "not an object"),
        ("not JSON", "not JSON"),
        ("[" * 5000, "not JSON"),
        ('{"a":' * 40 + "1" + "}" * 40, "not JSON"),
        ("null", "not an object"),
    ],
)
def test_a_read_that_is_no_answer_is_unknown(player: Path, stdout: str, words: str) -> None:
    call = {**RECORDED[0], "stdout": stdout}
    with pytest.raises(errors.OutcomeUnknown, match=words):
        Path(f"{player}.out").write_text(stdout)
        Path(f"{player}.err").write_text("")
        Path(f"{player}.exit").write_text("0")
        ProxmoxClient(ProxmoxSettings(), SystemClock()).get_dict(asked(call)[1])


# ---- the stand-in ----

# Case -> why the stand-in (and the double behind it) prints something of another shape.
DIFFERENCES = {
    "agent exec-status, second time": "the double keeps the result of a command, the guest agent forgets it",
    "agent exec, non-ASCII argument": "the double's agent takes any text",
    "resize, unknown disk": "the double refuses at once, where Proxmox starts a task that fails",
    "bad option": "the double takes any parameter of a read",
    "clone, --noproxy on the other node": "the double takes any parameter of a read",
}


def shape(code: int, stdout: str, stderr: str) -> tuple[str, str, str]:
    """Return what kind of output it is: success or refusal, what stands on standard output, what on standard error."""
    text = stdout.strip()
    if not text:
        out = "nothing"
    elif text.startswith("update VM "):
        out = "config line"
    else:
        last = text.splitlines()[-1]
        try:
            value = json.loads(last)
        except ValueError:
            return "success" if code == 0 else "refusal", "no JSON", stdout
        if isinstance(value, str):
            kind = "task" if "UPID:" in value else "text"
            out = f"{'glued ' if value.endswith(chr(34)) else ''}{kind}{' after log lines' if last != text else ''}"
        else:
            out = type(value).__name__
    lines = [line for line in stderr.splitlines() if not re.match(r"perl: warning|\t|    are supported", line)]
    err = "nothing"
    if lines:
        err = "proxied error" if lines[0].startswith("proxy handler failed: ") else "error"
        if "ssh: connect to host" in lines[0]:
            err = "ssh"
        if lines[0].startswith("400 Parameter verification failed."):
            err = "parameters and usage" if lines[-1].startswith("pvesh ") else "parameters"
    return "success" if code == 0 else "refusal", out, err + (" with warnings" if "perl: warning" in stderr else "")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(str(tmp_path_factory.mktemp("double")))
    yield server
    server.stop()


def prepare(server: Server) -> None:
    """Set up what was there when the calls were recorded."""
    server.pve.add_node("pve2")
    server.pve.storages["local"]["content"] = "iso,vztmpl,snippets,import,images,rootdir"
    server.pve.add_template(9050, "rec", storage="local")
    server.pve.add_template(9003, "other", storage="local", node="pve2")
    server.pve.add_template(9000, "debian-13", storage="local")
    for vmid in (5000, 5001, 5003, 5005, 5033, 5102):
        server.pve.add_guest(vmid, f"rec-{vmid}", storage="local")


def replay(
    server: Server,
    call: dict[str, Any],
    seen: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, str, str]:
    """Ask the stand-in what was asked of the real program; digests and task ids are those of the double."""
    for name in ("LANG", "LC_ALL"):
        monkeypatch.delenv(name, raising=False)
    values = {
        "PVESH_URL": server.url,
        "PVESH_TOKEN": f"{TOKEN_ID}={TOKEN_SECRET}",
        "PVESH_CA": server.cafile,
        **call["env"],
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    words = [
        re.sub(
            r"UPID:(\w+):(?!00000001)[^/]+:(\w+):(\d+)[^/]*:",
            lambda found: seen.get(f"{found[1]} {found[2]}") or seen[found[1]],
            word,
        )
        for word in call["argv"][1:]
    ]
    if "--pid" in words:
        words[words.index("--pid") + 1] = seen["pid"]
    if "--digest" in words and "old" not in call["case"]:
        node, vmid = words[1].split("/")[2], words[1].split("/")[4]
        config = pvesh.Double().ask("GET", f"nodes/{node}/qemu/{vmid}/config", {})[2]["data"]
        words[words.index("--digest") + 1] = config["digest"]
    monkeypatch.setattr(sys, "argv", ["pvesh", *words])
    code = pvesh.main()
    printed = capsys.readouterr()
    started = re.search(r'"pid": ?(\d+)', printed.out)
    if started:
        seen["pid"] = started[1]
    task = re.findall(r"UPID:[^\"\\\n]+:", printed.out) if call["argv"][1] != "get" else []
    if task:
        _upid, node, *_numbers, kind, _id, _user, _end = task[-1].split(":")
        seen[f"{node} {kind}"] = seen[node] = task[-1]
    return shape(code, printed.out, printed.err)


def test_the_stand_in_prints_what_the_real_pvesh_prints(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the recording: each call finds what the ones before it left."""
    prepare(server)
    seen: dict[str, str] = {}
    different = {}
    for call in RECORDED:
        case = call["case"]
        if case.startswith("no quorum"):
            server.pve.lose_quorum()
        if case.startswith("other node offline"):
            server.pve.nodes["pve2"]["online"] = False
        if "locked" in case:
            server.pve.vm(5033).lock = "backup"
        elif server.pve.vm(5033):
            server.pve.vm(5033).lock = None
        if "task dies" in case:
            server.pve.next_task("qmclone", "killed")
        if "task with warnings" in case:
            server.pve.next_task("qmdestroy", "warnings")
        expected = shape(call["exit"], call["stdout"], call["stderr"])
        actual = replay(server, call, seen, monkeypatch, capsys)
        if case in ("clone, other node", "start, other node"):
            # Its guest has no agent and does not answer a shutdown.
            server.pve.vm(5031).shutdown_secs = 60
            server.pve.vm(5031).config.pop("agent", None)
        if actual != expected:
            different[case] = f"real: {expected}, stand-in: {actual}"
    assert {case: text for case, text in different.items() if case not in DIFFERENCES} == {}
