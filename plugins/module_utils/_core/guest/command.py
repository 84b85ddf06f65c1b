# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run commands in a sandbox, each exactly once, and report the result.

The interface: ``run_command`` waits for the end. ``start_command`` does not wait; ``read_run``, ``wait_command``,
``kill_command`` and ``list_runs`` work on the run that it started. Each of them checks the sandbox's state, lease and
identity before, and its identity afterwards (``access.Guest``).

Each run has an id, which the journal (``store/runs.py``) holds before the first request. The guest creates a folder of
that name, and creating it succeeds only once. So a request whose answer was lost can be repeated. A caller that was
killed passes the same ``run_id`` again and gets the result, not a second run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from .. import clock as clock_module
from .. import escapes, parallel, patterns, states
from ..context import Context
from ..errors import AgentlabError, InvalidInput, OutcomeUnknown
from ..model import Sandbox
from ..store import runs
from . import access, kept, wrapper
from .access import Frame, Guest
from .agent import READ_PIECE, GuestFailed, GuestRefused

LARGEST_STDIN = 64 * 1024 * 1024
LARGEST_OUTPUT = 256 * 1024 * 1024
LONGEST_TIMEOUT = 30 * 86400
# Bytes of a command as shell text: argv, environment, folder. Larger data must use stdin or a file.
_LARGEST_WORK = 30_000
# Seconds for which one request waits in the guest for the end; while output is shown, seconds between two polls.
_WAIT = 20
_SHOW_WAIT = 1
# Seconds beyond the command's own timeout for which a lost answer is retried.
_PATIENCE = 90.0
# Seconds after the first request within which a run may still begin. The guest removes the folder of a told result
# after an hour, and every folder after a day. Later a missing folder does not prove that the run never began.
_LATEST_BEGIN = 3000
_PARALLEL = 4
_READERS = 3
# Output may exceed its limit by one block of the dd that bounds it, and by no more.
_OVERSHOOT = 65536
# Bytes of standard input that are sent as they are. Larger input may be a module of Ansible (kept.py).
_LARGEST_UNSPLIT = 16 * 1024
# Seconds between the request and the command's start, and between its end and the answer.
_OVERHEAD = 0.05
_ID = re.compile(r"[0-9a-f]{32}")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}|\d{1,10}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_LOGGED = 1000
# Characters. A shorter value would mask parts of words, such as the 1 of a variable that is on.
_SHORTEST_SECRET = 4
# Exit status of a command whose user or folder does not exist.
_NOT_BEGUN = 125

Output = Callable[[bytes, bytes], None]


@dataclass(slots=True)
class CommandSpec:
    """One command. Texts are sent as UTF-8 (surrogate escapes become the bytes that they stand for); NUL is refused.

    ``argv`` runs a program with these arguments; ``cmd`` is one text for the guest's /bin/sh. ``timeout`` and
    ``kill_after`` are seconds (0: no timeout), ``max_output`` is bytes of each stream. ``creates`` and ``removes`` are
    paths with the wildcards of ansible.builtin.command. ``secret``: stdin or environment must not appear in a process
    list of the Proxmox node. ``wait_for_agent``: seconds for which an agent that does not answer yet is retried.
    """

    argv: Sequence[str | bytes] | None = None
    cmd: str | bytes | None = None
    stdin: bytes = b""
    chdir: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    creates: str | None = None
    removes: str | None = None
    timeout: float = 60
    kill_after: float = 5
    max_output: int = 1024 * 1024
    secret: bool = False
    log_command: bool = False
    run_id: str | None = None
    wait_for_agent: float = 0


@dataclass(slots=True)
class CommandResult:
    """The result of a run, as far as it is known.

    ``state``: ``ended``, ``running``, or ``skipped`` (by creates or removes; ``message`` gives the reason). ``rc`` is
    the exit status in the shell's form: 128 + n for signal n, which ``signal`` names if the guest's shell reported it.
    ``timed_out``: the timeout ended the command; ``killed``: a request ended it. ``truncated``: the output exceeded
    ``max_output``. ``stdout_bytes`` and ``stderr_bytes``: number of bytes that the guest holds. ``refusal``: why the
    wrapper did not start the command (``no_user``, ``not_root``), which no output of a command can imitate.
    """

    run_id: str
    state: str
    rc: int | None = None
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    timed_out: bool = False
    killed: bool = False
    duration_ms: int = 0
    message: str | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    refusal: str | None = None

    @property
    def changed(self) -> bool:
        return self.state != "skipped"


# ---- the interface ----


def run_command(
    ctx: Context,
    sandbox: Sandbox,
    spec: CommandSpec,
    *,
    on_output: Output | None = None,
    cancel: Callable[[], bool] | None = None,
) -> CommandResult:
    """Run a command in a sandbox, wait for its end, and return the result.

    ``on_output`` is called about every second with the new bytes of standard output and standard error. ``cancel`` is
    called repeatedly; once it returns True, the command is ended in the guest and the result says ``killed``. Raises
    GuestRefused (certainly not started), OutcomeUnknown (may have started; its id is in the detail), GuestFailed, Kept,
    StateConflict, InvalidInput.
    """
    return _Command(ctx, sandbox, spec, False, on_output, cancel).run()


def start_command(ctx: Context, sandbox: Sandbox, spec: CommandSpec) -> CommandResult:
    """Start a command that runs on by itself, and return its id and state.

    It ends by itself, at its timeout, or with the sandbox.
    """
    return _Command(ctx, sandbox, spec, True, None, None).run()


def read_run(
    ctx: Context,
    sandbox: Sandbox,
    run_id: str,
    *,
    stdout_offset: int = 0,
    stderr_offset: int = 0,
    wait: float = 0,
    limit: int = 1024 * 1024,
) -> CommandResult:
    """Return the state of a run, and its output from these offsets on (at most ``limit`` bytes of each stream).

    ``wait``: seconds to wait in the guest for the end first. Raises NotFound when the journal has no such run.
    """
    return _Run(ctx, sandbox, run_id).read(stdout_offset, stderr_offset, wait, limit)


def wait_command(
    ctx: Context,
    sandbox: Sandbox,
    run_id: str,
    *,
    timeout: float | None = None,
    on_output: Output | None = None,
    cancel: Callable[[], bool] | None = None,
) -> CommandResult:
    """Wait at most ``timeout`` seconds for the end of a run; return the result with the output that the guest holds.

    After the timeout, or once ``cancel`` returns True, the state of the result is ``running`` and the command goes on.
    """
    return _Run(ctx, sandbox, run_id).wait(timeout, on_output, cancel)


def kill_command(ctx: Context, sandbox: Sandbox, run_id: str, *, kill_after: float = 5) -> CommandResult:
    """End a run and return its result. Its process group gets TERM, and KILL after ``kill_after`` seconds."""
    return _Run(ctx, sandbox, run_id).end(kill_after)


def list_runs(ctx: Context, sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return the sandbox's runs in the journal, oldest first. Sends no request to Proxmox or the guest."""
    return [
        {
            "run_id": run.id,
            "state": run.state,
            "program": run.program,
            "actor": run.actor,
            "detached": run.detached,
            "started_at": clock_module.format_utc(run.started_at),
            "updated_at": clock_module.format_utc(run.updated_at),
            "rc": run.detail.get("rc"),
            "signal": run.detail.get("signal"),
            "duration_ms": run.detail.get("duration_ms"),
        }
        for run in runs.list_runs(ctx.records, sandbox)
    ]


# ---- preparing a command ----


def encode(value: str | bytes, option: str) -> bytes:
    """Return a value as bytes. Raises InvalidInput for a NUL byte, or for text that cannot be encoded."""
    try:
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidInput(f"{option}: has a character that is no Unicode text; remove it", option=option) from None
    if b"\0" in data:
        raise InvalidInput(f"{option}: has a NUL byte, which no program can be given; remove it", option=option)
    return data


def encode_text(value: str) -> bytes:
    """Return text for standard input as bytes. NUL is allowed there."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidInput("stdin: has a character that is no Unicode text; remove it", option="stdin") from None


def normalise_id(run_id: str) -> str:
    """Return a run id in small letters and without dashes (a UUID fits). Raises InvalidInput for anything else."""
    text = str(run_id).replace("-", "").lower()
    if not _ID.fullmatch(text):
        raise InvalidInput(
            f"run_id: {patterns.quote_value(run_id)} is no id of a run. Valid: 32 hexadecimal digits, with "
            "dashes (a UUID) or without",
            option="run_id",
            value=str(run_id)[:80],
        )
    return text


def require_one_command(has_argv: bool, has_cmd: bool) -> None:
    """Raise InvalidInput unless exactly one of argv and cmd is given."""
    if has_argv and has_cmd:
        raise InvalidInput(
            "argv: argv and cmd are both given. Give argv (a list) or cmd (a text for the guest's shell), and not both",
            option="argv",
        )
    if not has_argv and not has_cmd:
        raise InvalidInput(
            "argv: no command is given. Give argv (a list, program first) or cmd (a text for the guest's shell)",
            option="argv",
        )


def _compose_argv(spec: CommandSpec) -> list[bytes]:
    """Return the program and its arguments: ``argv``, or the guest's shell with ``cmd``. Raises InvalidInput."""
    require_one_command(spec.argv is not None, spec.cmd is not None)
    if spec.cmd is not None:
        text = encode(spec.cmd, "cmd")
        if not text.strip():
            raise InvalidInput("cmd: is empty. Valid: a command for the guest's shell", option="cmd")
        return [b"/bin/sh", b"-c", text]
    if isinstance(spec.argv, (str, bytes)):
        raise InvalidInput("argv: is a text. Valid: a list, program first; or use cmd", option="argv")
    words = [encode(word, "argv") for word in spec.argv or ()]
    if not words or not words[0]:
        raise InvalidInput("argv: names no program. Valid: a list, program first", option="argv")
    return words


def _check_number(value: float, option: str, most: float) -> int:
    """Return a number from 0 to ``most``, rounded up to a whole one. Raises InvalidInput with the option's name."""
    if isinstance(value, bool) or not 0 <= value <= most:
        raise InvalidInput(f"{option}: {value} is out of range. Valid: 0 to {most:.0f}", option=option, value=value)
    # sleep in the guest may accept whole seconds only.
    return int(value) if value == int(value) else int(value) + 1


@dataclass(slots=True)
class _Prepared:
    """A command in the form in which it is sent."""

    work: bytes
    stdin: bytes
    values: dict[str, object]
    program: str
    fingerprint: str
    command: str


@dataclass(slots=True)
class _Packed:
    """Standard input as it is sent: ``pieces`` in requests of their own, ``last`` in the request that starts it.

    ``files``: names of files in it that the guest keeps from then on.
    """

    pieces: list[bytes]
    last: bytes
    values: dict[str, object]
    files: list[str] = field(default_factory=list)


def _list_numbers(count: int) -> str:
    return " ".join(map(str, range(count)))


def _pack_input(prepared: _Prepared, layout: kept.Layout | None, known: Set[str]) -> _Packed:
    """Return standard input as it is sent to a guest that keeps the files ``known``, packed if that pays."""
    raw, gz = prepared.stdin, False
    values: dict[str, object] = {"nrec": 0}
    files: list[str] = []
    if layout is not None:
        raw, values, files = layout.pack(known)
    if len(raw) > 4096:
        packed = gzip.compress(raw, 6, mtime=0)
        if len(packed) < len(raw) * 0.9:
            raw, gz = packed, True
    lists = [str(values.get("need", "")), str(values.get("fresh", "")), _list_numbers(len(raw) // wrapper.PIECE + 1)]
    room = wrapper.compute_room(sum(map(len, lists))) - len(prepared.work)
    head = b"" if len(raw) <= room else raw[: len(raw) - room]
    pieces = [head[at : at + wrapper.PIECE] for at in range(0, len(head), wrapper.PIECE)]
    values |= {
        "pieces": _list_numbers(len(pieces)),
        "nraw": len(raw),
        "nlast": len(raw) - len(head),
        "gz": int(gz),
    }
    return _Packed(pieces, raw[len(head) :], values, files)


def _mask_secrets(text: str, secrets: list[str]) -> str:
    """Return a command for the event without the values, and the lines of values, that are secret."""
    lines = {line.strip() for value in secrets for line in (value, *value.splitlines())}
    for line in sorted(lines, key=len, reverse=True):
        if len(line) >= _SHORTEST_SECRET:
            text = text.replace(line, "********")
    return text


def prepare_command(spec: CommandSpec) -> _Prepared:
    """Check a command and return it in the form in which it is sent. Raises InvalidInput with the option's name."""
    words = _compose_argv(spec)
    for name in spec.environment:
        if not _VARIABLE.fullmatch(str(name)):
            raise InvalidInput(
                f"environment: {str(name)[:40]!r} is no name of a variable. Valid: letters, digits and _, no digit "
                "first",
                option="environment",
            )
    if spec.user is not None and not _USER.fullmatch(spec.user):
        raise InvalidInput(
            f"user: {spec.user[:40]!r} is no user name. Valid: up to 32 letters, digits, _ . - or a user id",
            option="user",
        )
    work = wrapper.compose_shell_text(
        words,
        chdir=None if spec.chdir is None else encode(spec.chdir, "chdir"),
        environment={encode(str(k), "environment"): encode(str(v), "environment") for k, v in spec.environment.items()},
        creates=None if spec.creates is None else encode(spec.creates, "creates"),
        removes=None if spec.removes is None else encode(spec.removes, "removes"),
    )
    if len(work) > _LARGEST_WORK:
        raise InvalidInput(
            f"argv: command, arguments and environment have {len(work)} bytes. Valid: up to {_LARGEST_WORK}; give "
            "long data by stdin, or put a file into the sandbox first",
            option="argv",
        )
    stdin = bytes(spec.stdin)
    if len(stdin) > LARGEST_STDIN:
        raise InvalidInput(
            f"stdin: has {len(stdin)} bytes. Valid: up to {LARGEST_STDIN}; put a file into the sandbox instead",
            option="stdin",
        )
    limit = _check_number(spec.timeout, "timeout", LONGEST_TIMEOUT)
    _check_number(spec.wait_for_agent, "wait_for_agent", LONGEST_TIMEOUT)
    values: dict[str, object] = {
        "limit": limit,
        "grace": _check_number(spec.kill_after, "kill_after", 3600),
        "max": _check_number(spec.max_output, "max_output", LARGEST_OUTPUT),
        "user": spec.user or "",
        "nwork": len(work),
        "insum": access.compute_checksum(stdin) if stdin else "",
    }
    facts = [
        [word.hex() for word in words],
        spec.chdir,
        spec.user,
        sorted(map(str, spec.environment)),
        len(stdin),
        spec.creates,
        spec.removes,
    ]
    program = "sh" if spec.cmd is not None else words[0].rpartition(b"/")[2].decode("utf-8", "replace")
    command = " ".join(word.decode("utf-8", "replace") for word in (words[2:] if spec.cmd is not None else words))
    if spec.secret:
        command = _mask_secrets(command, [*spec.environment.values(), stdin.decode("utf-8", "replace")])
    return _Prepared(
        work,
        stdin,
        values,
        escapes.escape_controls(program)[:80],
        hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest(),
        escapes.escape_controls(command)[:_LONGEST_LOGGED],
    )


# ---- a run ----


class _Run:
    """A run in the journal: read it, wait for it, end it."""

    def __init__(self, ctx: Context, sandbox: Sandbox, run_id: str) -> None:
        self.ctx = ctx
        self.guest = Guest.enter(ctx, sandbox, what="look at a command in")
        self.sandbox = self.guest.sandbox
        self.journal = runs.get(ctx.records, self.sandbox, normalise_id(run_id))

    @property
    def id(self) -> str:
        return self.journal.id

    def read(self, stdout_offset: int, stderr_offset: int, wait: float, limit: int) -> CommandResult:
        oo = _check_number(stdout_offset, "stdout_offset", 2**40)
        eo = _check_number(stderr_offset, "stderr_offset", 2**40)
        frame = self._ask_progress(oo, eo, _check_number(wait, "wait", 3600))
        result = self._parse_result(frame)
        limit = _check_number(limit, "limit", LARGEST_OUTPUT)
        out, err = self._split_output(frame)
        while frame.state != "acked" and (len(out) < limit or len(err) < limit):
            # Do not wait again. Return only the output that existed at the first look.
            more_out = min(result.stdout_bytes - oo, limit) - len(out)
            more_err = min(result.stderr_bytes - eo, limit) - len(err)
            if more_out <= 0 and more_err <= 0:
                break
            frame = self._ask_progress(oo + len(out), eo + len(err), 0)
            new_out, new_err = self._split_output(frame)
            if not new_out and not new_err:
                break
            out, err = out + new_out, err + new_err
        result.stdout, result.stderr = out[:limit], err[:limit]
        self._close_run(result)
        return result

    def wait(self, timeout: float | None, on_output: Output | None, cancel: Callable[[], bool] | None) -> CommandResult:
        """Return the result of a command once it has ended, or its output so far after ``timeout`` seconds.

        The guest does the waiting: each request stays there until the command ends or writes. So there is no pause
        between two requests.
        """
        clock = self.ctx.clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        out = err = b""
        while True:
            remaining = _WAIT if deadline is None else deadline - clock.monotonic()
            pause = max(0, min(_SHOW_WAIT if on_output or cancel else _WAIT, int(remaining)))
            frame = self._ask_progress(len(out), len(err), pause)
            result = self._parse_result(frame)
            new_out, new_err = self._split_output(frame)
            out, err = out + new_out, err + new_err
            if on_output is not None and (new_out or new_err):
                on_output(new_out, new_err)
            behind = len(out) < result.stdout_bytes or len(err) < result.stderr_bytes
            ended = result.state != "running"
            if (ended and not (behind and (new_out or new_err))) or frame.state == "acked":
                break
            if not ended and (remaining <= 0 or (cancel is not None and cancel())):
                break
        result.stdout, result.stderr = out, err
        self._close_run(result)
        return result

    def end(self, kill_after: float) -> CommandResult:
        values = {"id": self.id, "w": 0, "lim": wrapper.INLINE, "part": 1, "oo": 0, "eo": 0}
        values["grace"] = grace = _check_number(kill_after, "kill_after", 3600)
        script = wrapper.compose_request("end", values)
        frame = self._require_result(self.guest.ask_until_answered(script, self.id, patience=_PATIENCE + grace))
        result = self._parse_result(frame)
        result.stdout, result.stderr = self._split_output(frame)
        self._close_run(result)
        return result

    # ---- parts ----

    def _ask_progress(self, stdout_offset: int, stderr_offset: int, wait: int) -> Frame:
        """Return the run's state and output from these offsets, after ``wait`` seconds or the run's next change."""
        script = wrapper.compose_request(
            "look",
            {"id": self.id, "w": wait, "lim": wrapper.INLINE, "part": 1, "oo": stdout_offset, "eo": stderr_offset},
        )
        return self._require_result(self.guest.ask_until_answered(script, self.id))

    def _require_result(self, frame: Frame) -> Frame:
        """Return a frame with the run's result: the guest's, or that of the journal where the guest has none.

        Raises OutcomeUnknown when neither knows the result.
        """
        vmid = self.sandbox.vmid
        if frame.state in ("none", "gone", "lost"):
            journal = runs.get(self.ctx.records, self.sandbox, self.id)
            if journal.state == runs.ENDED:
                self.journal = journal
                names = {"rc": "rc", "sig": "signal", "ms": "duration_ms"}
                return Frame({"state": "acked"} | {key: str(journal.detail.get(names[key]) or 0) for key in names})
        if frame.state in ("none", "gone"):
            self.guest.judge_again()
            raise OutcomeUnknown(
                f"sandbox {vmid}: the guest knows nothing of run {self.id} (any more): it was started anew since, or "
                f"the run was first asked for more than {_LATEST_BEGIN // 60} minutes ago. Whether the command ran is "
                "not known; look in the guest, then run it again (without run_id) if it is to run again",
                vmid=vmid,
                run_id=self.id,
                guest_ended=True,
            )
        if frame.state == "lost":
            self.guest.judge_again()
            raise OutcomeUnknown(
                f"sandbox {vmid}: the watcher of run {self.id} in the guest was killed, so its exit status is "
                "not known (most likely the guest agent was restarted); look in the guest, then run it again "
                "(without run_id) if need be",
                vmid=vmid,
                run_id=self.id,
                lost=True,
                guest_ended=True,
            )
        if frame.state not in ("ended", "running", "acked"):
            raise GuestFailed(
                f"sandbox {vmid}: the guest's answer names no state of a command, so it is not believed. "
                f"{access.LOOK_AT_GUEST}",
                vmid=vmid,
            )
        return frame

    def _split_output(self, frame: Frame) -> tuple[bytes, bytes]:
        """Return the output in a frame as (stdout, stderr), after checking length and checksum."""
        if frame.state == "acked":
            return b"", b""
        lo, le = frame.read_number("lo"), frame.read_number("le")
        if len(frame.body) != lo + le or lo + le > wrapper.INLINE:
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the guest's answer is cut off, so it is not believed. "
                f"{access.LOOK_AT_GUEST}",
                vmid=self.sandbox.vmid,
            )
        if frame.body and access.compute_checksum(frame.body) != frame.fields.get("sum"):
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the guest's answer fails its checksum, so it is not believed. "
                f"{access.LOOK_AT_GUEST}",
                vmid=self.sandbox.vmid,
            )
        return frame.body[:lo], frame.body[lo:]

    def _parse_result(self, frame: Frame) -> CommandResult:
        if frame.state == "running":
            result = CommandResult(self.id, "running")
        else:
            signal = frame.read_number("sig", 128)
            result = CommandResult(
                self.id, "ended", frame.read_number("rc", 255), signal or None, duration_ms=frame.read_number("ms")
            )
        if frame.state == "acked":
            result.message = "the output was told before, and the guest has forgotten it"
            detail = self.journal.detail
            if detail.get("state") == "skipped":
                result.state, result.message = "skipped", detail.get("message") or "skipped before"
            result.truncated, result.timed_out = detail.get("truncated") is True, detail.get("timed_out") is True
            return result
        flags = frame.fields.get("flags", "").split(",")
        result.stdout_bytes, result.stderr_bytes = frame.read_number("so"), frame.read_number("se")
        result.truncated = "out.cut" in flags or "err.cut" in flags
        if "full" in flags:
            result.message = (
                "/run of the guest is full, so the rest of the output is lost; make room there, or let the command "
                "write to a file"
            )
        result.timed_out, result.killed = "late" in flags, "killed" in flags
        skipped = frame.fields.get("skip")
        if skipped in ("creates", "removes") and result.state == "ended":
            result.state = "skipped"
            result.message = skipped
        if skipped in ("no_user", "not_root") and result.rc == _NOT_BEGUN:
            result.refusal = skipped
        return result

    def _compose_memory(self) -> dict[str, Any]:
        """Return the facts about the guest that the journal keeps for later commands."""
        return {}

    def _close_run(self, result: CommandResult, acks: list[str] | None = None, command: str | None = None) -> None:
        """Prove that the VM is still ours, then write the result into the journal.

        ``acks``: ids of older runs whose results the guest has deleted with this request. ``command``: the command for
        the event. Raises Kept for a VM that is not ours; then the answer counts for nothing.
        """
        self.guest.judge_again()
        records, journal = self.ctx.records, self.journal
        if result.state == "running":
            if journal.state == runs.SENT:
                runs.set_state(records, journal, runs.RUNNING)
            return
        if journal.state == runs.ENDED:
            return
        known = {
            "rc": result.rc,
            "signal": result.signal,
            "duration_ms": result.duration_ms,
            "state": result.state,
            "truncated": result.truncated,
            "timed_out": result.timed_out,
            **({"message": result.message} if result.state == "skipped" else {}),
            **self._compose_memory(),
        }
        evidence: dict[str, Any] = {
            "run_id": self.id,
            "program": journal.program,
            "rc": result.rc,
            "signal": result.signal,
            "stdout_bytes": result.stdout_bytes,
            "stderr_bytes": result.stderr_bytes,
        }
        evidence |= {name: True for name in ("truncated", "timed_out", "killed") if getattr(result, name)}
        if journal.actor != records.actor:
            evidence["started_by"] = journal.actor
        if command is not None:
            evidence["command"] = command
        runs.finish(
            records,
            self.sandbox,
            journal,
            runs.ENDED,
            detail=known,
            evidence=evidence,
            outcome="done" if result.rc == 0 else "failed",
            reason="skipped" if result.state == "skipped" else "timed_out" if result.timed_out else None,
            duration_ms=result.duration_ms,
            acks=acks,
        )


class _Command(_Run):
    """A command to start, unless the journal says that its id was already started."""

    def __init__(
        self,
        ctx: Context,
        sandbox: Sandbox,
        spec: CommandSpec,
        detached: bool,
        on_output: Output | None,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self.ctx = ctx
        self.spec = spec
        self.prepared = prepare_command(spec)
        self.on_output, self.cancel = on_output, cancel
        self.guest = Guest.enter(ctx, sandbox, secret=spec.secret)
        self.sandbox = self.guest.sandbox
        self.journal, self.acks = runs.begin(
            ctx.records,
            self.sandbox,
            normalise_id(spec.run_id) if spec.run_id is not None else access.make_id(),
            fingerprint=self.prepared.fingerprint,
            program=self.prepared.program,
            detached=detached,
        )
        self.detached = detached
        # The command has begun, or may have begun.
        self.begun = not self.journal.is_new
        # Whether the guest had no room for the files that it was to keep, and whether they were sent again.
        self.is_full = self.is_repacked = False
        # Only Ansible sends archives, and only their files are kept.
        self.layout = kept.split_module(self.prepared.stdin) if len(self.prepared.stdin) > _LARGEST_UNSPLIT else None
        known: set[str] = set()
        self.expected = 0.0
        if self.layout is not None:
            known, seconds, has_room = runs.read_guest_memory(ctx.records, self.sandbox, self.layout.kind)
            if not detached and on_output is None and cancel is None:
                self.expected = (self.layout.seconds if seconds is None else seconds) + _OVERHEAD
            if not has_room:
                self.layout = None
        self.packed = _pack_input(self.prepared, self.layout, known)

    def run(self) -> CommandResult:
        try:
            return self._run_command()
        except GuestRefused as error:
            if self.begun:
                # A refusal of a later request says nothing about the command.
                raise self._make_unknown_error(error) from None
            if error.detail.get("begun") is None and self.journal.state == runs.SENT and self.journal.is_new:
                self._end_without_result(runs.REFUSED, error)
            raise
        except OutcomeUnknown as error:
            error.detail.setdefault("run_id", self.id)
            if error.detail.get("lost"):
                self._end_without_result(runs.LOST, error)
            raise

    def _end_without_result(self, state: str, error: AgentlabError) -> None:
        """Close the run in the journal as refused or lost, with the error's reason."""
        runs.finish(
            self.ctx.records,
            self.sandbox,
            self.journal,
            state,
            detail={"reason": error.detail.get("reason")},
            evidence={"run_id": self.id, "program": self.journal.program},
            outcome="refused" if state == runs.REFUSED else "unknown",
            reason=str(error.detail.get("reason") or error.code),
        )

    def _run_command(self) -> CommandResult:
        frame = self._begin_run()
        result = self._parse_result(frame)
        out = err = b""
        if result.state != "running" and frame.fields.get("gz"):
            out, err = self._fetch_output(frame, result)
        else:
            out, err = self._split_output(frame)
            if self.on_output is not None and (out or err):
                self.on_output(out, err)
        if not self.detached and frame.state != "acked":
            result, out, err = self._follow_run(result, out, err)
        if max(result.stdout_bytes, result.stderr_bytes, len(out), len(err)) > self.spec.max_output + _OVERSHOOT:
            raise self._make_excess_error()
        limit = self.spec.max_output
        result.truncated = result.truncated or len(out) > limit or len(err) > limit
        result.stdout, result.stderr = out[:limit], err[:limit]
        self._close_run(result, self.acks, self.prepared.command if self.spec.log_command else None)
        if result.state == "skipped":
            # The journal of an older release does not say by which.
            guess = "removes" if self.spec.creates is None else "creates"
            option = result.message if result.message in ("creates", "removes") else guess
            path = self.spec.creates if option == "creates" else self.spec.removes
            result.message = f"skipped, since {path} {'exists' if option == 'creates' else 'does not exist'} ({option})"
        return result

    def _compose_memory(self) -> dict[str, Any]:
        if self.is_full:
            return {"full": True}
        if self.layout is None:
            return {}
        memory: dict[str, Any] = {"kind": self.layout.kind}
        return memory | ({"kept": self.packed.files} if self.packed.files else {})

    def _follow_run(self, result: CommandResult, out: bytes, err: bytes) -> tuple[CommandResult, bytes, bytes]:
        """Wait for the end with further requests; return the result and the whole output."""
        shown = self.on_output is not None
        cancelled = False
        while result.state == "running" or len(out) < result.stdout_bytes or len(err) < result.stderr_bytes:
            was_running = result.state == "running"
            if was_running and not cancelled and self.cancel is not None and self.cancel():
                cancelled = True
                self._end_in_guest()
            if shown:
                frame = self._ask_progress(len(out), len(err), _SHOW_WAIT if was_running else 0)
            else:
                wait = _SHOW_WAIT if self.cancel is not None else _WAIT
                script = wrapper.compose_request("look", {**self._make_frame_values(0), "w": wait})
                frame = self._require_result(self.guest.ask_until_answered(script, self.id))
            result = self._parse_result(frame)
            if frame.state == "acked":
                break
            if frame.fields.get("gz"):
                out, err = self._fetch_output(frame, result)
                break
            new_out, new_err = self._split_output(frame)
            if not was_running and (not shown or not (new_out or new_err)):
                raise GuestFailed(
                    f"sandbox {self.sandbox.vmid}: the guest does not send the output that it says it has, so its "
                    f"answer is not believed. {access.LOOK_AT_GUEST}",
                    vmid=self.sandbox.vmid,
                )
            # Without on_output each request reads the output from its beginning.
            out, err = (out + new_out, err + new_err) if shown else (new_out, new_err)
            if self.on_output is not None and (new_out or new_err):
                self.on_output(new_out, new_err)
            if max(len(out), len(err)) > self.spec.max_output + _OVERSHOOT:
                raise self._make_excess_error()
        return result, out, err

    def _end_in_guest(self) -> None:
        """End the command in the guest, as the caller's ``cancel`` asks."""
        script = wrapper.compose_request(
            "end", {**self._make_frame_values(1), "w": 0, "grace": self.prepared.values["grace"]}
        )
        self._require_result(self.guest.ask_until_answered(script, self.id, patience=_PATIENCE))

    def _make_frame_values(self, part: int) -> dict[str, object]:
        """Return the values of a request for output from its beginning. ``part`` 1: send a part where it is long."""
        return {"id": self.id, "lim": wrapper.INLINE, "part": part, "oo": 0, "eo": 0}

    # ---- starting ----

    def _begin_run(self) -> Frame:
        """Send the command until its start is confirmed, and return that answer.

        Each attempt carries the age of the run, and sends the pieces that the guest lacks. A run that the journal knows
        to have begun, or whose folder the guest may have removed since, is looked at only. Raises OutcomeUnknown when
        the command may have begun and no answer arrives in time, or the error of the agent when nothing was started.
        """
        clock, guest, prepared = self.ctx.clock, self.guest, self.prepared
        guest.what = "run a command"
        began = clock.monotonic()
        # Seconds for which a lost answer is retried, and for which an agent that is not up yet is retried.
        patience = _PATIENCE + (self.spec.timeout or _PATIENCE)
        # An attempt without an answer may have begun the command. No refusal of a later attempt disproves that.
        unanswered = not self.journal.is_new
        measure_age = self._make_age_meter()
        wait = 0 if self.detached else _SHOW_WAIT if self.on_output or self.cancel else _WAIT
        missing = list(range(len(self.packed.pieces)))
        attempt = 0
        resent = 0
        problem: AgentlabError
        while True:
            try:
                values: dict[str, object] = {**self._make_frame_values(int(self.on_output is not None)), "w": wait}
                age = measure_age()
                if self.journal.state != runs.SENT or (unanswered and not 0 <= age <= _LATEST_BEGIN):
                    self.acks, self.packed.files = [], []
                    script = wrapper.compose_request("look", values)
                else:
                    self._send_pieces(missing)
                    # From here on a repeat sends only the pieces that the guest misses.
                    missing = []
                    values = {**prepared.values, **self.packed.values, **values, "acks": " ".join(self.acks)}
                    values["age"] = measure_age() + 3 if unanswered else -1
                    data = {"work": prepared.work, "input": self.packed.last}
                    script = wrapper.compose_request("begin", values, data)
                pid = guest.send_script(script)
            except OutcomeUnknown as error:
                unanswered = self.begun = True
                problem = error
            except GuestRefused as error:
                if error.reason != "silent":
                    raise
                if not unanswered and clock.monotonic() - began >= self.spec.wait_for_agent:
                    raise
                problem = error
            else:
                self.begun = True
                frame = guest.collect_answer(pid, self.id, self.expected)
                if frame is not None:
                    # By a refusal this attempt has started nothing.
                    self.begun = unanswered or frame.state != "refused"
                    word = frame.fields.get("why", "") if frame.state == "refused" else ""
                    if word.startswith("missing,") and resent < 3:
                        # Pieces without an answer may not have arrived, so send the missing ones again.
                        missing = [
                            int(n) for n in word.split(",")[1:] if n.isdecimal() and int(n) < len(self.packed.pieces)
                        ]
                        resent += 1
                        continue
                    if resent < 3 and self._can_repeat(word):
                        resent += 1
                        missing = list(range(len(self.packed.pieces)))
                        continue
                    return self._require_result(guest.require_accepted(frame))
                unanswered = True
                problem = OutcomeUnknown(f"sandbox {self.sandbox.vmid}: the answer of its guest agent was lost.")
            pause = access.choose_silent_pause(attempt)
            attempt += 1
            if problem.detail.get("odd") and attempt > 2:
                raise self._make_unknown_error(problem) from None
            if clock.monotonic() - began + pause > (patience if unanswered else self.spec.wait_for_agent + 1):
                if unanswered:
                    raise self._make_unknown_error(problem) from None
                raise problem
            clock.sleep(pause)

    def _make_age_meter(self) -> Callable[[], int]:
        """Return a function that returns the seconds since the run was first sent; -1 when nobody can know.

        Time goes on while this host sleeps. A wall clock that was set back since leaves the age of a run of the
        journal unknown.
        """
        clock = self.ctx.clock
        now, since_boot = clock.now(), clock.since_boot()
        before = 0 if self.journal.is_new else now - self.journal.started_at

        def measure() -> int:
            if before < 0:
                return -1
            return before + int(max(clock.since_boot() - since_boot, clock.now() - now))

        return measure

    def _can_repeat(self, word: str) -> bool:
        """Return whether a refusal of the guest, by which nothing was started, is worth a repeat; prepare the repeat.

        ``cut``: the request was damaged on the way. ``unkept`` and ``sum``: the guest may have lost files that it was
        to keep. The first repeat sends all files again, the second sends the input as it is. ``full``: the guest has
        just removed the files that it kept. The only repeat, and later commands for a while, keep no files.
        """
        if word == "full" and not self.is_full:
            self.is_full, self.layout = True, None
        elif word in ("unkept", "sum") and self.layout is not None:
            if self.is_repacked:
                self.is_full, self.layout = True, None
            self.is_repacked = True
        elif word != "cut":
            return False
        if word != "cut":
            self.packed = _pack_input(self.prepared, self.layout, frozenset())
        return True

    def _make_unknown_error(self, error: AgentlabError) -> OutcomeUnknown:
        """Return the error for a command that may have begun and whose result did not arrive because of ``error``.

        ``guest_ended`` in its detail: the guest, or its agent, went down meanwhile.
        """
        try:
            sandbox = self.ctx.records.get(self.sandbox.uuid)
        except AgentlabError:
            # The caller needs the run's id more than the reason.
            sandbox = self.sandbox
        if sandbox.state == states.TIMEOUT:
            # Expiry stops the VM. Until then the command goes on, although the lease is over.
            ended = clock_module.format_utc(sandbox.lease_expires_at)
            text = (
                f"sandbox {self.sandbox.vmid}: its lease ended at {ended}, and the command ended with it, so its exit "
                f"status is not known (run_id={self.id}). Renew the lease while long work goes on (agentlab_lease), or "
                "create the sandbox with keepalive"
            )
        else:
            text = (
                f"{error.message.rstrip('.')}. The command may have begun, and its result is not known. Ask again with "
                f"run_id={self.id}: the same run is never begun twice"
            )
        has_ended = isinstance(error, GuestRefused) and error.reason in ("silent", "stopped", "hibernated")
        detail = {"guest_ended": True} if has_ended else {}
        return OutcomeUnknown(text, vmid=self.sandbox.vmid, run_id=self.id, **detail)

    def _send_pieces(self, numbers: list[int]) -> None:
        """Send these pieces of standard input in parallel."""

        def send_piece(number: int) -> None:
            data = self.packed.pieces[number]
            values = {"id": self.id, "i": number, "nraw": len(data)}
            try:
                self.guest.send_script(wrapper.compose_request("stage", values, {"input": data}))
            except OutcomeUnknown:
                # The start request reports whether the piece arrived.
                pass

        parallel.run_each(send_piece, numbers, _PARALLEL)

    def _make_excess_error(self) -> GuestFailed:
        """Return the error for more output than the wrapper can hold by ``max_output``."""
        return GuestFailed(
            f"sandbox {self.sandbox.vmid}: the guest has more output than max_output ({self.spec.max_output} bytes) "
            f"allows, so its answer is not believed. {access.LOOK_AT_GUEST}",
            vmid=self.sandbox.vmid,
        )

    # ---- large output ----

    def _fetch_output(self, frame: Frame, result: CommandResult) -> tuple[bytes, bytes]:
        """Return output that is too long for an answer, read from the files of the run. Raises GuestFailed."""
        folder = frame.fields.get("dir", "")
        packed = [int(text) if text.isdecimal() else 0 for text in (*frame.fields.get("gz", "").split(","), "0", "0")]
        parts = []
        for name, size, gz in (("out", result.stdout_bytes, packed[0]), ("err", result.stderr_bytes, packed[1])):
            if size > self.spec.max_output + _OVERSHOOT:
                raise self._make_excess_error()
            if 0 < gz < size * 0.9:
                parts.append(unpack_gzip(read_held_file(self.guest, self.id, folder, f"{name}.gz", gz), size))
            else:
                parts.append(read_held_file(self.guest, self.id, folder, name, size))
        if access.compute_checksum(parts[0] + parts[1]) != frame.fields.get("sum"):
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the output fails its checksum, so it is not believed. "
                f"{access.LOOK_AT_GUEST}",
                vmid=self.sandbox.vmid,
            )
        if self.on_output is not None:
            self.on_output(parts[0], parts[1])
        return parts[0], parts[1]


def read_held_file(
    guest: Guest,
    run_id: str,
    folder: str,
    name: str,
    size: int,
    on_piece: Callable[[int], None] | None = None,
    *,
    offset: int = 0,
) -> bytes:
    """Return ``size`` bytes, from ``offset`` on, of a file in one of our folders in the guest.

    Reads pieces in parallel. ``on_piece`` is called with the number of bytes of each piece that has arrived. Raises
    GuestFailed for a file that ends earlier.
    """
    if size == 0:
        return b""

    end = offset + size

    def read_part(start: int) -> bytes:
        count = min(READ_PIECE, end - start)
        data = b""
        while len(data) < count:
            part = _read_piece(guest, run_id, folder, name, start + len(data), count - len(data))
            if not part:
                raise GuestFailed(
                    f"sandbox {guest.sandbox.vmid}: {name} ended after {start + len(data)} of {end} bytes; it changed "
                    "while it was read. Try again"
                )
            data += part
        if on_piece is not None:
            on_piece(len(data))
        return data

    return b"".join(parallel.run_each(read_part, list(range(offset, end, READ_PIECE)), _READERS))


def _read_piece(guest: Guest, run_id: str, folder: str, name: str, offset: int, count: int) -> bytes:
    """Return up to ``count`` bytes by file-read, or through the wrapper where file-read is refused."""
    for attempt in range(4):
        try:
            return guest.agent.read_file(f"{folder}/{name}", offset, count)
        except OutcomeUnknown:
            # A read can be repeated.
            if attempt == 3:
                raise
            guest.ctx.clock.sleep(access.choose_silent_pause(attempt))
        except GuestRefused as error:
            if error.reason == "silent" and attempt < 3:
                guest.ctx.clock.sleep(access.choose_silent_pause(attempt))
                continue
            if error.reason not in ("old", "blocked", "denied"):
                raise
            # Proxmox VE 8 reads only whole files, and a guest may block file-read alone. Then read through the wrapper.
            values = {"id": run_id, "file": name, "oo": offset, "lim": min(count, wrapper.INLINE)}
            frame = guest.ask_until_answered(wrapper.compose_request("chunk", values), run_id)
            if frame.state != "chunk" or len(frame.body) > count:
                raise GuestFailed(
                    f"sandbox {guest.sandbox.vmid}: the guest has no {name} any more; try again"
                ) from None
            return frame.body
    raise AssertionError("unreachable")


def unpack_gzip(data: bytes, size: int) -> bytes:
    """Return the unpacked gzip data. Raises GuestFailed unless it is exactly ``size`` bytes; never unpacks more."""
    unpacker = zlib.decompressobj(31)
    try:
        plain = unpacker.decompress(data, size + 1)
    except zlib.error:
        raise GuestFailed("the guest's data is not gzip, so it is not believed; try again") from None
    if len(plain) != size:
        raise GuestFailed("the guest's data has another length than it said, so it is not believed; try again")
    return plain
