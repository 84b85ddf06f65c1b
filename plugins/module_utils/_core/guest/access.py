# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The way into a sandbox: whose VM it is, before and after, and one request of the wrapper with its answer.

A command or a file goes only into a VM that is proven to be ours, in state READY or RUNNING, with a lease that runs.
The VM is judged again after it: an answer counts only if it was our VM that gave it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import clock as clock_module
from .. import escapes, states
from ..context import Context
from ..errors import ApiError, Kept, OutcomeUnknown, ProxmoxError, StateConflict, Unreachable
from ..model import Sandbox
from ..vm import locate
from . import wrapper
from .agent import Agent, GuestFailed, GuestRefused, Status

# Seconds from the answer to exec to the first look. A first look later than 0.05 s misses the agent's next wake-up; a
# guest that is not ready by then costs a request more, so a slow one is asked later from then on.
_SOON = 0.05
_LATER = 0.22
_MISSES = 3
# Seconds between looks at a program that goes on running: a fifth of its time so far, at most this.
_LONGEST_PAUSE = 2.0
# Seconds between requests to an agent that does not answer: each one holds a worker of the node's daemon for three.
_SILENT_PAUSES = (2.0, 4.0, 8.0, 15.0, 30.0)
_HEADER = re.compile(rb"agentlab1 ([0-9a-f]{32}) ([ -~]*)\n")
_FIELD = re.compile(r"([a-z]+)=(\S*)")
_FOLDER = re.compile(r"/(?:run|var/run|tmp)/agentlab(?:-\d{1,10})?/[0-9a-f]{32}")
_LONGEST_HEADER = 2000
_REFUSALS = {
    "folder": "its folder /run/agentlab cannot be made, or belongs to somebody else; look at /run in the guest",
    "full": "its /run or the target's file system is full; make room in the guest",
    "cut": "the data did not arrive as a whole; try again",
    "sum": "the data did not arrive as it was sent (checksum); try again",
    "base64": "base64 failed in the guest; look at coreutils or busybox there",
    "gzip": "gzip failed in the guest; look at gzip or busybox there",
    "relative": "path: not absolute. Valid: a path that begins with /",
    "isdir": "path: that is a folder. Give the path of a file",
    "nofolder": "path: its folder is not there. Make the folder first",
    "nowrite": "path: its folder takes no file (read-only, or not allowed). Look at the folder in the guest",
    "missing": "path: no such file. Look for it in the guest",
    "special": "path: not a regular file (device, socket or pipe). Give the path of a file",
    "noread": "path: the agent's user may not read it. Look at its mode in the guest",
    "owner": "owner: cannot be set; look whether user and group are there, and whether the agent runs as root",
    "mode": "mode: cannot be set; look at the file system in the guest",
    "stat": "stat failed in the guest; look at coreutils or busybox there",
}
# Sandbox UUID -> how often the first look came too early, less how often it did not. Bounded by _forget_misses.
_misses: dict[str, int] = {}
_misses_lock = threading.Lock()


@dataclass(slots=True)
class Frame:
    """The answer of one request of the wrapper: its fields (all of them words), and the bytes that follow."""

    fields: dict[str, str]
    body: bytes = b""

    @property
    def state(self) -> str:
        return self.fields.get("state", "")

    def number(self, name: str, most: int = 2**53) -> int:
        """Return a field that must be a number from 0 to ``most``; GuestFailed otherwise."""
        text = self.fields.get(name, "")
        if not text.isdecimal() or len(text) > 16 or int(text) > most:
            raise GuestFailed(f"the guest's answer has no number {name}, so it is not believed; look at the guest")
        return int(text)


@dataclass(slots=True)
class Guest:
    """One use of a sandbox's guest. ``agent`` belongs to the VM as it was judged last."""

    ctx: Context
    sandbox: Sandbox
    agent: Agent
    # Words that tell what is done, for messages.
    what: str = "run a command"
    secret: bool = False
    # Called while a program runs, with the seconds it has run; may raise to stop waiting.
    on_wait: Callable[[float], None] | None = None
    statuses: list[int] = field(default_factory=list)

    # ---- whose VM ----

    @classmethod
    def enter(cls, ctx: Context, sandbox: Sandbox, *, secret: bool = False) -> Guest:
        """Return the guest of a sandbox that may be used now: state, lease, no destroy under way, and the VM is ours.

        Raises StateConflict, Kept, or what reading the VM's configuration raises. One request.
        """
        sandbox = ctx.records.get(sandbox.uuid)
        states.check("exec", sandbox.state)
        if sandbox.expired(ctx.clock.now()):
            raise StateConflict(
                f"cannot run a command in sandbox {sandbox.vmid}: its lease expired at "
                f"{clock_module.iso(sandbox.lease_expires_at)} and it is about to become TIMEOUT. Create a new sandbox",
                vmid=sandbox.vmid,
            )
        under_way = ctx.records.under_way(sandbox.uuid)
        if under_way is not None and under_way.kind == "destroy":
            raise Kept(
                "busy", f"cannot run a command in sandbox {sandbox.vmid}: it is being destroyed", vmid=sandbox.vmid
            )
        return cls(ctx, sandbox, Agent(ctx, sandbox, _judge(ctx, sandbox)), secret=secret)

    def judge_again(self) -> None:
        """Prove that the VM is still ours, so that what it answered counts. Raises Kept otherwise. One request."""
        self.agent = Agent(self.ctx, self.sandbox, _judge(self.ctx, self.sandbox))

    # ---- one request ----

    def send(self, script: str) -> int:
        """Start the wrapper with a script in the guest; return the process id there. Errors as of ``Agent.exec``.

        A VM that was migrated meanwhile is judged and asked on its new node, once.
        """
        argv = ["/bin/sh", "-c", wrapper.BOOT, "agentlab", str(len(script))]
        try:
            return self.agent.exec(argv, script, secret=self.secret)
        except GuestRefused as error:
            if error.reason != "moved":
                raise
        self.judge_again()
        return self.agent.exec(argv, script, secret=self.secret)

    def collect(self, pid: int, run_id: str) -> Frame | None:
        """Wait for the end of a wrapper that was started, and return its answer; None when the answer is lost.

        GuestFailed when the program answered something else.
        """
        began = self.ctx.clock.monotonic()
        self.ctx.clock.sleep(_first_delay(self.sandbox.uuid))
        asked = 0
        while True:
            before = self.ctx.clock.monotonic()
            try:
                status = self.agent.exec_status(pid)
            except OutcomeUnknown:
                return None
            except GuestRefused as error:
                if error.reason not in ("silent", "stopped", "hibernated", "refused", "moved"):
                    raise
                return None
            asked += 1
            if status is None:
                return None
            if status.exited:
                _learn_delay(self.sandbox.uuid, asked)
                self.statuses.append(asked)
                return self._frame(status, run_id)
            waited, took = self.ctx.clock.monotonic() - began, self.ctx.clock.monotonic() - before
            if self.on_wait is not None:
                self.on_wait(waited)
            self.ctx.clock.sleep(max(0.0 if took > _SOON else _SOON, min(waited / 5, _LONGEST_PAUSE)))

    def ask(self, script: str, run_id: str, *, patience: float = 60.0, refusals: bool = False) -> Frame:
        """Send a script that may be repeated without harm, and return its answer.

        ``patience``: seconds for which it is repeated while the answer is lost. ``refusals``: return a refusal of the
        wrapper as an answer, too.
        """
        deadline = self.ctx.clock.monotonic() + patience
        for pause in (*_SILENT_PAUSES, None):
            try:
                frame = self.collect(self.send(script), run_id)
            except OutcomeUnknown as error:
                frame, problem = None, error.message
            else:
                problem = f"sandbox {self.sandbox.vmid}: the answer of its guest agent was lost."
            if frame is not None:
                return frame if refusals else self.accept(frame)
            if pause is None or self.ctx.clock.monotonic() + pause > deadline:
                raise OutcomeUnknown(f"{problem} Look whether the guest runs, then try again", vmid=self.sandbox.vmid)
            self.ctx.clock.sleep(pause)
        raise AssertionError("unreachable")

    def accept(self, frame: Frame) -> Frame:
        """Return a frame that is no refusal; GuestRefused with the sentence for the word that the wrapper said."""
        if frame.state != "refused":
            return frame
        word = frame.fields.get("why", "")
        if word.startswith("no_"):
            program = escapes.escape_controls(word[3:20])
            text = f"the guest has no program {program}; install coreutils and util-linux (or busybox)"
        else:
            text = _REFUSALS.get(word.partition(",")[0], f"the guest refuses ({escapes.escape_controls(word[:40])})")
        raise GuestRefused(
            f"sandbox {self.sandbox.vmid}: cannot {self.what}: {text}",
            reason="guest",
            word=word[:40],
            vmid=self.sandbox.vmid,
        )

    def _frame(self, status: Status, run_id: str) -> Frame:
        header = _HEADER.match(status.out[:_LONGEST_HEADER])
        if header is None:
            if status.out.startswith(b"agentlab1 cut"):
                return Frame({"state": "refused", "why": "cut"})
            said = (status.err or status.out)[:200].decode("utf-8", "replace")
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: sh in the guest did not run the wrapper (exit status {status.exitcode}, "
                f"{escapes.escape_controls(' '.join(said.split())) or 'no output'}). It needs a POSIX shell, "
                "coreutils and util-linux, or busybox; a Windows guest has none of them",
                vmid=self.sandbox.vmid,
            )
        if header[1].decode() != run_id:
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the guest answered for another command, so the answer is not believed"
            )
        frame = Frame(dict(_FIELD.findall(header[2].decode())), status.out[header.end() :])
        folder = frame.fields.get("dir")
        if folder is not None and (not _FOLDER.fullmatch(folder) or not folder.endswith(run_id)):
            raise GuestFailed(f"sandbox {self.sandbox.vmid}: the guest names a folder that is not the wrapper's")
        return frame


def new_id() -> str:
    """Return a random id of a run or a transfer (32 hexadecimal digits)."""
    return secrets.token_hex(16)


def checksum(data: bytes) -> str:
    """Return the SHA-256 of the data as the guest writes it."""
    return hashlib.sha256(data).hexdigest()


def silent_pause(attempt: int) -> float:
    """Return the seconds to wait before the next request to an agent that did not answer ``attempt`` times."""
    return _SILENT_PAUSES[min(attempt, len(_SILENT_PAUSES) - 1)]


def _judge(ctx: Context, sandbox: Sandbox) -> locate.Located:
    """Return the VM, proven to be ours: one request where it is on the node that the record names."""
    node = sandbox.node
    if node:
        try:
            config = ctx.client.get_dict(f"nodes/{node}/qemu/{sandbox.vmid}/config")
        except Unreachable as error:
            if error.detail.get("status") is None:
                # Nobody answered at api_host: that says nothing of the VM's node.
                raise
        except ApiError:
            # Perhaps it was migrated: the list tells where to look.
            pass
        except ProxmoxError as error:
            raise Kept("unknown", f"sandbox {sandbox.vmid}: its VM cannot be read: {error.message}") from None
        else:
            return locate.judged_config(ctx, sandbox, node, config)
    return locate.require_match(ctx, sandbox)


def _first_delay(uuid: str) -> float:
    return _LATER if _misses.get(uuid, 0) >= _MISSES else _SOON


def _learn_delay(uuid: str, asked: int) -> None:
    with _misses_lock:
        if len(_misses) > 10_000:
            _misses.clear()
        count = _misses.get(uuid, 0) + (1 if asked > 1 else -1)
        _misses[uuid] = max(-_MISSES, min(2 * _MISSES, count))
