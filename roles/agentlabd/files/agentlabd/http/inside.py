# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve commands and file transfers inside sandboxes."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from agentlab_core.errors import InvalidInput
from agentlab_core.guest import command, files
from agentlab_core.model import Outcome, Sandbox

from . import spool
from .answers import Answer
from .fields import Field
from .route import Call, Route

UTF8, BASE64 = "utf-8", "base64"
# Seconds for which one request may wait for the end of a command. Clients start longer commands with detach.
LONGEST_WAIT = 300
# Bytes of each stream in one answer.
LARGEST_PART = 1024 * 1024
# A path or text without NUL bytes.
_NO_NUL = r"^[^\x00]*$"
_RUN_ID = "^[0-9a-f]{32}$"

_ENCODING = Field(
    "string",
    "how stdin, stdout and stderr are written: utf-8 (what is none is replaced) or base64",
    valid=(UTF8, BASE64),
)
COMMAND: dict[str, Field] = {
    "argv": Field(
        "strings", "program and arguments; no shell looks at them", longest=30000, most=1000, pattern=_NO_NUL
    ),
    "cmd": Field("string", "a command for the guest's /bin/sh", longest=30000, pattern=_NO_NUL),
    "stdin": Field("string", "standard input, by encoding", longest=1048576, lines=True, secret=True),
    "encoding": _ENCODING,
    "chdir": Field("string", "folder to run it in", longest=4096, pattern=_NO_NUL),
    "environment": Field(
        "texts", "variables of its environment", longest=30000, most=200, pattern=_NO_NUL, secret=True
    ),
    "user": Field(
        "string",
        "user of the guest, by name or id, of letters, digits, _ . and -; root when left out",
        longest=32,
        pattern=r"^[A-Za-z0-9_.-]+$",
    ),
    "creates": Field("string", "do nothing if this path is there", longest=4096, pattern=_NO_NUL),
    "removes": Field("string", "do nothing unless this path is there", longest=4096, pattern=_NO_NUL),
    "timeout": Field(
        "integer", "seconds after which it is ended; 0 for no limit, with detach only", low=0, high=2592000
    ),
    "max_output": Field("integer", "bytes of standard output, and of standard error", low=1, high=LARGEST_PART),
    "detach": Field("boolean", "answer as soon as it runs; it goes on by itself"),
    "run_id": Field("string", "32 hexadecimal digits; the same id again runs nothing twice", pattern=_RUN_ID),
}


def run_command(call: Call) -> Answer:
    """Run a command, or start one that runs on by itself."""
    body = dict(call.body)
    detach, encoding = body.pop("detach", False), body.pop("encoding", UTF8)
    command.require_one_command("argv" in body, "cmd" in body)
    body["stdin"] = _decode_stdin(body.get("stdin", ""), encoding)
    timeout = body.setdefault("timeout", 0 if detach else 60)
    if not detach and not 0 < timeout <= LONGEST_WAIT:
        raise InvalidInput(
            f"timeout: {timeout} s is no time that one request waits. Valid: 1 to {LONGEST_WAIT}, or detach=true and "
            "GET .../exec/{id} for longer ones",
            option="timeout",
        )
    spec = command.CommandSpec(**body, secret=bool(body["stdin"] or body.get("environment")))
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    result = (command.start_command if detach else command.run_command)(ctx, sandbox, spec)
    return _answer_run(sandbox, result, encoding)


def list_runs(call: Call) -> Answer:
    """List the sandbox's commands in the records."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    return Answer({"vmid": sandbox.vmid, "runs": command.list_runs(ctx, sandbox)})


def show_run(call: Call) -> Answer:
    """Show the state of a command, and its output from an offset on."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    query = call.query
    result = command.read_run(
        ctx,
        sandbox,
        command.normalise_id(call.ident),
        stdout_offset=query.get("stdout_offset", 0),
        stderr_offset=query.get("stderr_offset", 0),
        wait=query.get("wait", 0),
        limit=query.get("limit", LARGEST_PART),
    )
    return _answer_run(sandbox, result, query.get("encoding", UTF8), 200)


def kill_run(call: Call) -> Answer:
    """End a command in the guest."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    return _answer_run(sandbox, command.kill_command(ctx, sandbox, command.normalise_id(call.ident)), UTF8, 200)


def _answer_run(sandbox: Sandbox, result: command.CommandResult, encoding: str, begun: int = 202) -> Answer:
    """Return the answer for a run. ``begun``: the status while the command runs."""
    body = {
        "vmid": sandbox.vmid,
        "run_id": result.run_id,
        "state": result.state,
        "rc": result.rc,
        "signal": result.signal,
        "stdout": _encode_output(result.stdout, encoding),
        "stderr": _encode_output(result.stderr, encoding),
        "encoding": encoding,
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "truncated": result.truncated,
        "timed_out": result.timed_out,
        "killed": result.killed,
        "duration_ms": result.duration_ms,
        "message": result.message,
        "changed": result.changed,
    }
    return Answer(body, begun if result.state == "running" else 200, [Outcome.of(result.state, sandbox)])


def _decode_stdin(text: str, encoding: str) -> bytes:
    """Return standard input as bytes. Raises InvalidInput for broken base64."""
    if encoding == UTF8:
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("stdin: is not base64, which encoding says it is", option="stdin") from None


def _encode_output(data: bytes, encoding: str) -> str:
    return data.decode("utf-8", "replace") if encoding == UTF8 else base64.b64encode(data).decode()


# ---- files ----


def fetch_file(call: Call) -> Answer:
    """Send a file of the guest byte for byte. Length and checksum were compared with the guest's."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    target = spool.make_file()
    try:
        info = files.fetch_file(ctx, sandbox, call.query["path"], target)
    except BaseException:
        target.close()
        raise
    target.seek(0)
    answer = Answer(_describe_file(sandbox, info), 200, [Outcome.of("fetched", sandbox)])
    answer.headers = {"X-Agentlab-Sha256": info.sha256, "X-Agentlab-Mode": f"{info.mode & 0o7777:04o}"}
    answer.file = target
    return answer


def put_file(call: Call) -> Answer:
    """Write a file in the guest, completely or not at all."""
    ctx = call.make_context()
    sandbox = ctx.select_sandbox(call.vmid)
    assert call.upload is not None
    mode = call.query.get("mode")
    info = files.put_file(
        ctx,
        sandbox,
        call.upload,
        call.query["path"],
        mode=None if mode is None else int(mode, 8),
        owner=call.query.get("owner"),
    )
    return Answer(_describe_file(sandbox, info), 200, [Outcome.of("written", sandbox)])


def _describe_file(sandbox: Sandbox, info: files.FileInfo) -> dict[str, Any]:
    return {
        "vmid": sandbox.vmid,
        "path": info.path,
        "size": info.size,
        "mode": f"{info.mode & 0o7777:04o}",
        "sha256": info.sha256,
    }


# ---- the table ----

_PATH = Field("string", "absolute path of the file in the guest", required=True, longest=4096, pattern=r"^/[^\x00]*$")
_FARTHEST = 2**40
_EXEC = "/v1/sandboxes/{vmid}/exec"
_FILES = "/v1/sandboxes/{vmid}/files"
_ONE_OF = {"oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("argv", "cmd")]}

ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        _EXEC,
        "run_command",
        "Run a command in a sandbox, once; answered when it has ended, or with detach when it runs",
        run_command,
        {200: "Run", 202: "Run"},
        inside=True,
        operation="exec",
        body=COMMAND,
        together=_ONE_OF,
    ),
    Route(
        "GET", _EXEC, "list_runs", "Commands of a sandbox that the records know", list_runs, {200: "Runs"}, quick=True
    ),
    Route(
        "GET",
        f"{_EXEC}/{{id}}",
        "show_run",
        "How far a command is, and what it has written",
        show_run,
        {200: "Run"},
        inside=True,
        query={
            "stdout_offset": Field("integer", "standard output from this byte on", low=0, high=_FARTHEST),
            "stderr_offset": Field("integer", "standard error from this byte on", low=0, high=_FARTHEST),
            "limit": Field("integer", "bytes of each at most", low=1, high=LARGEST_PART),
            "wait": Field("integer", "seconds to wait for its end first", low=0, high=LONGEST_WAIT),
            "encoding": _ENCODING,
        },
    ),
    Route(
        "POST",
        f"{_EXEC}/{{id}}/kill",
        "kill_run",
        "End a command in the guest: TERM, then KILL, for it and its children",
        kill_run,
        {200: "Run"},
        inside=True,
        operation="exec_kill",
        body={},
    ),
    Route(
        "GET",
        _FILES,
        "fetch_file",
        "A file of the sandbox, byte for byte",
        fetch_file,
        {200: ""},
        inside=True,
        sends_file=True,
        operation="fetch",
        query={"path": _PATH},
    ),
    Route(
        "PUT",
        _FILES,
        "put_file",
        "Write a file in the sandbox; it is complete or not there at all",
        put_file,
        {200: "File"},
        inside=True,
        receives_file=True,
        operation="put",
        query={
            "path": _PATH,
            "mode": Field("string", "mode as octal digits, such as 0644", longest=4, pattern="^[0-7]{3,4}$"),
            "owner": Field(
                "string",
                "owner, as user or user:group, each a name or id of letters, digits, _ . and -",
                longest=80,
                pattern=r"^[A-Za-z0-9_.:-]+$",
            ),
        },
    ),
)
