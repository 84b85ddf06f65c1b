# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Enter a sandbox's guest: prove whose VM it is before and after, and send one request of the wrapper.

A command or a file goes only into a VM that is proven to be ours, in state READY or RUNNING, with a running lease. The
VM is judged again afterwards, so that only an answer of our own VM counts.
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

# Seconds from the answer to exec until the first poll. A poll after 0.05 s still meets the agent's present wake-up. A
# guest that is not ready by then costs one more request, so a slow guest is polled later from then on.
_SOON = 0.05
_LATER = 0.22
_MISSES = 3
# Longest pause in seconds between polls of a running program. The pause is a fifth of the running time so far.
_LONGEST_PAUSE = 2.0
# Longest time in seconds before the first poll, however long the same module took the last time.
_LONGEST_EXPECTED = 5.0
# Seconds between requests to a silent agent, because each request occupies a worker of the node's daemon for three.
_SILENT_PAUSES = (2.0, 4.0, 8.0, 15.0, 30.0)
_HEADER = re.compile(rb"agentlab1 ([0-9a-f]{32}) ([ -~]*)\n")
_FIELD = re.compile(r"([a-z]+)=(\S*)")
_FOLDER = re.compile(r"/(?:run|var/run|tmp)/agentlab(?:-\d{1,10})?/[0-9a-f]{32}")
_LONGEST_HEADER = 2000
# The next step after an answer that the wrapper never sends: a broken program or a person in the guest made it.
LOOK_AT_GUEST = (
    "Look at sh and qemu-guest-agent in the guest; if somebody may have changed them, destroy the sandbox and create a "
    "new one"
)
_REFUSALS = {
    "folder": "its folder /run/agentlab cannot be made, or belongs to somebody else; look at /run in the guest",
    "full": "its /run or the target's file system is full; make room in the guest",
    "cut": "the data did not arrive as a whole; try again",
    "sum": "the data did not arrive as it was sent (checksum); try again",
    "base64": "base64 failed in the guest; look at coreutils or busybox there",
    "unkept": "it does not hold the files of modules that it was to keep; try again",
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
# State of the record -> what to do before a command or a file.
_NEXT_STEPS = dict.fromkeys(
    (states.STOPPED, states.SUSPENDED), "Start the sandbox first (state: started, or agentlab sandbox start {vmid})"
) | dict.fromkeys((states.REQUESTED, states.PROVISIONING, states.BOOTING), "Wait until its creation has ended")
# Sandbox UUID -> first polls that came too early, minus those that did not. _learn_delay bounds the number of entries.
_misses: dict[str, int] = {}
_misses_lock = threading.Lock()


@dataclass(slots=True)
class Frame:
    """The answer to one request of the wrapper: its fields (all of them words), and the bytes that follow."""

    fields: dict[str, str]
    body: bytes = b""

    @property
    def state(self) -> str:
        return self.fields.get("state", "")

    def read_number(self, name: str, most: int = 2**53) -> int:
        """Return a field as a number from 0 to ``most``. Raises GuestFailed for anything else."""
        text = self.fields.get(name, "")
        if not text.isdecimal() or len(text) > 16 or int(text) > most:
            raise GuestFailed(f"the guest's answer has no number {name}, so it is not believed; look at the guest")
        return int(text)


@dataclass(slots=True)
class Guest:
    """One use of a sandbox's guest. ``agent`` belongs to the VM with the last verdict."""

    ctx: Context
    sandbox: Sandbox
    agent: Agent
    # The action, as a verb with its object for messages.
    what: str = "run a command"
    secret: bool = False
    # Called while a program runs, with its running time in seconds. May raise to stop waiting.
    on_wait: Callable[[float], None] | None = None
    statuses: list[int] = field(default_factory=list)
    # Whether the guest has answered during this use. Silence before the first answer is an error at once; silence
    # after it is retried.
    has_answered: bool = False

    # ---- identity of the VM ----

    @classmethod
    def enter(cls, ctx: Context, sandbox: Sandbox, *, what: str = "run a command in", secret: bool = False) -> Guest:
        """Return the guest of a sandbox whose state and lease allow its use, and whose VM is proven to be ours.

        ``what``: the action for messages, before the word sandbox. ``secret``: the input must not appear in a process
        list of the node. Sends one request. Raises StateConflict, Kept (also while a destroy runs), GuestRefused for a
        Windows guest, or the error of reading the VM's configuration.
        """
        sandbox = ctx.records.get(sandbox.uuid)
        try:
            states.check_operation("exec", sandbox.state)
        except StateConflict as error:
            next_step = _NEXT_STEPS.get(sandbox.state, "Create a new sandbox").format(vmid=sandbox.vmid)
            error.message = f"{error.message.replace('run a command in', what, 1)}. {next_step}"
            raise
        if sandbox.has_expired(ctx.clock.now()):
            raise StateConflict(
                f"cannot {what} sandbox {sandbox.vmid}: its lease expired at "
                f"{clock_module.format_utc(sandbox.lease_expires_at)} and it is about to become TIMEOUT. Create a "
                "new sandbox",
                vmid=sandbox.vmid,
            )
        under_way = ctx.records.find_journal_entry(sandbox.uuid)
        if under_way is not None and under_way.kind == "destroy":
            raise Kept(
                "busy",
                f"cannot {what} sandbox {sandbox.vmid}: it is being destroyed. Create a new sandbox",
                vmid=sandbox.vmid,
            )
        agent = Agent(ctx, sandbox, _judge_vm(ctx, sandbox))
        if agent.is_windows:
            raise GuestRefused(
                f"cannot {what} sandbox {sandbox.vmid}: Windows runs in it (ostype: {agent.ostype}), which has no "
                "POSIX shell for our wrapper, so nothing was sent. Valid: guests with a POSIX shell. Use WinRM or SSH "
                f"by its address, or correct the template where it is no Windows (qm set {sandbox.vmid} --ostype l26)",
                reason="windows",
                vmid=sandbox.vmid,
            )
        return cls(ctx, sandbox, agent, secret=secret)

    def judge_again(self) -> None:
        """Prove that the VM is still ours, so that its answers count. Sends one request. Raises Kept."""
        self.agent = Agent(self.ctx, self.sandbox, _judge_vm(self.ctx, self.sandbox))

    # ---- one request ----

    def send_script(self, script: str) -> int:
        """Start the wrapper with a script in the guest, and return its process id there.

        A VM that was migrated meanwhile is judged again, and gets the request on its new node, once. Raises the errors
        of ``Agent.exec``.
        """
        argv = ["/bin/sh", "-c", wrapper.BOOT, "agentlab", str(len(script))]
        try:
            return self.agent.exec(argv, script, secret=self.secret)
        except GuestRefused as error:
            if error.reason != "moved":
                raise
        self.judge_again()
        return self.agent.exec(argv, script, secret=self.secret)

    def collect_answer(self, pid: int, run_id: str, expected: float = 0) -> Frame | None:
        """Wait for the end of a started wrapper, and return its answer; None when the answer is lost.

        ``expected``: seconds after which the answer is expected; the first poll is not sent earlier.
        ``waiting.wait_for_result`` does not fit here: the pauses follow the running time and the time of a request, and
        the wrapper ends by itself.
        Raises GuestFailed for an answer in another form.
        """
        began = self.ctx.clock.monotonic()
        self.ctx.clock.sleep(max(_choose_first_delay(self.sandbox.uuid), min(expected, _LONGEST_EXPECTED)))
        polls = 0
        while True:
            before = self.ctx.clock.monotonic()
            try:
                status = self.agent.read_exec_status(pid)
            except OutcomeUnknown:
                return None
            except GuestRefused as error:
                if error.reason not in ("silent", "stopped", "hibernated", "refused", "moved"):
                    raise
                return None
            polls += 1
            if status is None:
                return None
            if status.exited:
                if not expected:
                    _learn_delay(self.sandbox.uuid, polls)
                self.statuses.append(polls)
                return self._parse_frame(status, run_id)
            waited, took = self.ctx.clock.monotonic() - began, self.ctx.clock.monotonic() - before
            if self.on_wait is not None:
                self.on_wait(waited)
            self.ctx.clock.sleep(max(0.0 if took > _SOON else _SOON, min(waited / 5, _LONGEST_PAUSE)))

    def ask_until_answered(self, script: str, run_id: str, *, patience: float = 60.0, refusals: bool = False) -> Frame:
        """Send an idempotent script, and return its answer. A lost answer is a reason to send the script again.

        ``patience``: seconds for which a lost answer, or an agent that has become silent, is retried. ``refusals``:
        return a refusal of the wrapper as well.
        """
        deadline = self.ctx.clock.monotonic() + patience
        for pause in (*_SILENT_PAUSES, None):
            try:
                frame = self.collect_answer(self.send_script(script), run_id)
            except OutcomeUnknown as error:
                frame, problem, refusal = None, error.message, None
            except GuestRefused as error:
                if error.reason != "silent" or not self.has_answered:
                    raise
                frame, problem, refusal = None, error.message, error
            else:
                problem, refusal = f"sandbox {self.sandbox.vmid}: the answer of its guest agent was lost.", None
            if frame is not None:
                return frame if refusals else self.require_accepted(frame)
            if pause is None or self.ctx.clock.monotonic() + pause > deadline:
                if refusal is not None:
                    raise refusal
                raise OutcomeUnknown(f"{problem} Look whether the guest runs, then try again", vmid=self.sandbox.vmid)
            self.ctx.clock.sleep(pause)
        raise AssertionError("unreachable")

    def require_accepted(self, frame: Frame) -> Frame:
        """Return the frame. Raises GuestRefused, with the sentence for the wrapper's word, if it is a refusal."""
        if frame.state != "refused":
            return frame
        word = frame.fields.get("why", "")
        if word.startswith("no_"):
            program = escapes.escape_controls(word[3:20])
            text = f"the guest has no program {program}; install coreutils and util-linux (or busybox)"
        elif word.startswith("missing,"):
            text = "parts of the input keep being lost on their way; look at the load of the node, then try again"
        else:
            text = _REFUSALS.get(word.partition(",")[0], f"the guest refuses ({escapes.escape_controls(word[:40])})")
        raise GuestRefused(
            f"sandbox {self.sandbox.vmid}: cannot {self.what}: {text}",
            reason="guest",
            word=word[:40],
            vmid=self.sandbox.vmid,
        )

    def _parse_frame(self, status: Status, run_id: str) -> Frame:
        """Return the wrapper's answer from its output. Raises GuestFailed unless the answer belongs to this request."""
        header = _HEADER.match(status.out[:_LONGEST_HEADER])
        if header is None:
            if status.out.startswith(b"agentlab1 cut"):
                return Frame({"state": "refused", "why": "cut"})
            excerpt = (status.err or status.out)[:200].decode("utf-8", "replace")
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: sh in the guest did not run the wrapper (exit status {status.exitcode}, "
                f"{escapes.escape_controls(' '.join(excerpt.split())) or 'no output'}). It needs a POSIX shell, "
                "coreutils and util-linux, or busybox; a Windows guest has none of them",
                vmid=self.sandbox.vmid,
            )
        if header[1].decode() != run_id:
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the guest answered for another command, so the answer is not believed. "
                f"{LOOK_AT_GUEST}",
                vmid=self.sandbox.vmid,
            )
        self.has_answered = True
        frame = Frame(dict(_FIELD.findall(header[2].decode())), status.out[header.end() :])
        folder = frame.fields.get("dir")
        if folder is not None and (not _FOLDER.fullmatch(folder) or not folder.endswith(run_id)):
            raise GuestFailed(
                f"sandbox {self.sandbox.vmid}: the guest's answer names a folder that is not the wrapper's, so it is "
                f"not believed. {LOOK_AT_GUEST}",
                vmid=self.sandbox.vmid,
            )
        return frame


def make_id() -> str:
    """Return a random id for a run or a transfer (32 hexadecimal digits)."""
    return secrets.token_hex(16)


def compute_checksum(data: bytes) -> str:
    """Return the SHA-256 of the data in the guest's notation."""
    return hashlib.sha256(data).hexdigest()


def choose_silent_pause(attempt: int) -> float:
    """Return the seconds to wait before the next request to an agent that has not answered ``attempt`` times."""
    return _SILENT_PAUSES[min(attempt, len(_SILENT_PAUSES) - 1)]


def _judge_vm(ctx: Context, sandbox: Sandbox) -> locate.Located:
    """Return the VM, proven to be ours. Sends one request if the VM is on the recorded node."""
    node = sandbox.node
    if node:
        try:
            config = ctx.client.get_dict(f"nodes/{node}/qemu/{sandbox.vmid}/config")
        except Unreachable as error:
            if error.detail.get("status") is None:
                # api_host did not answer at all, which says nothing about the VM's node.
                raise
        except ApiError:
            # The VM may have been migrated. The VM list shows its node.
            pass
        except ProxmoxError as error:
            raise Kept("unknown", f"sandbox {sandbox.vmid}: its VM cannot be read: {error.message}") from None
        else:
            return locate.require_our_config(ctx, sandbox, node, config)
    return locate.require_match(ctx, sandbox)


def _choose_first_delay(uuid: str) -> float:
    """Return the seconds until the first poll of a program in this sandbox."""
    return _LATER if _misses.get(uuid, 0) >= _MISSES else _SOON


def _learn_delay(uuid: str, polls: int) -> None:
    """Count whether the first poll came too early, which ``polls`` above 1 shows."""
    with _misses_lock:
        if len(_misses) > 10_000:
            _misses.clear()
        count = _misses.get(uuid, 0) + (1 if polls > 1 else -1)
        _misses[uuid] = max(-_MISSES, min(2 * _MISSES, count))
