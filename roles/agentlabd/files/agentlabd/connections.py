# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bounds on clients: how many connections, how long each may take, how many bytes they may have on the way.

docs/bounds.md lists them.

A gate stands between asyncio and aiohttp's protocol of each connection. aiohttp bounds none of this before a request's
head is complete, and what it can bound differs between the releases that Debian 12 and 13 have.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from typing import Any, cast

from .logs import log, seldom

# Seconds from the first byte of a request (or from the connection) until its head is complete.
HEAD_SECONDS = 10.0
# Seconds for a request's body.
BODY_SECONDS = 30.0
# Seconds a connection may be idle between two requests, and a client may take to read an answer.
IDLE_SECONDS = 60.0
# Bytes of a request's head, and of what a client sends ahead while its request is being answered.
HEAD_BYTES = 128 * 1024
# Bytes of one body.
BODY_BYTES = 1024 * 1024
# Bytes of all bodies that are on their way or being worked on; the first SMALL_BODY bytes of each are not counted, so a
# small one always passes.
BODIES_BYTES = 8 * 1024 * 1024
SMALL_BODY = 16 * 1024
# Bytes of all answers that their clients have not read yet, beyond what the kernel holds of each; and the seconds that
# an answer may wait while there are more.
ANSWERS_BYTES = 32 * 1024 * 1024
ANSWER_SECONDS = 1.0
# aiohttp stops reading a body when this much (twice) waits to be taken.
READ_BYTES = 16 * 1024
# Connections of each listener at once, where the process may have enough descriptors.
CONNECTIONS = {"socket": 256, "listen": 64, "metrics_listen": 16}
# Connections of each listener that asyncio accepts at one go, and that may wait in the kernel for it.
ACCEPTED_AT_ONCE = 32
QUEUE = 1024
# Refused connections that are still told why; more of them are cut off without a word.
_TOLD = 16
_TOLD_SECONDS = 1.0
# Descriptors kept for the records, the log, the sockets and what a library opens for a moment.
_OWN_DESCRIPTORS = 64

_HEAD, _BODY, _WORK, _LINGER, _IDLE, _REFUSED = "head", "body", "work", "linger", "idle", "refused"
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def raise_descriptors() -> int:
    """Raise the soft limit of descriptors to the hard one where that is allowed; returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError):
            # The unit's system call filter refuses it; LimitNOFILE says there what the limit is.
            return soft
    return soft


def shares(descriptors: int, proxmox: int) -> dict[str, int]:
    """How many connections each listener may have, so that descriptors are left for ``proxmox`` connections to
    Proxmox VE (twice: requests, stops).
    """
    reserved = _OWN_DESCRIPTORS + 2 * proxmox + len(CONNECTIONS) * (ACCEPTED_AT_ONCE + _TOLD)
    room, wanted = descriptors - reserved, sum(CONNECTIONS.values())
    return {name: max(4, count if room >= wanted else count * room // wanted) for name, count in CONNECTIONS.items()}


class Bodies:
    """The bytes of all bodies that are on their way."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, before: int, after: int) -> bool:
        """Count a body that grew from ``before`` to ``after`` bytes; False when there is no room for it."""
        more = max(0, after - SMALL_BODY) - max(0, before - SMALL_BODY)
        if self.bytes + more > BODIES_BYTES:
            return False
        self.bytes += more
        return True

    def give_back(self, size: int) -> None:
        self.bytes -= max(0, size - SMALL_BODY)


class UnreadAnswers:
    """The answers that wait for their clients to read them, on all listeners together."""

    def __init__(self) -> None:
        # A dict keeps the order: the connection whose client has read nothing for longest is the first.
        self._gates: dict[Gate, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, gate: Gate) -> None:
        """Count the answer of a connection whose client does not read as fast as the daemon writes."""
        self._gates[gate] = None
        self._end_slowest()

    def remove(self, gate: Gate) -> None:
        """Forget a connection whose client has read its answer, or that has ended."""
        self._gates.pop(gate, None)

    def _end_slowest(self) -> None:
        """End the connections that wait longest until the rest is within ANSWERS_BYTES.

        A client that reads as fast as it can is given ANSWER_SECONDS, however many ask at the same moment.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        total = sum(gate.unread_bytes for gate in self._gates)
        for gate in list(self._gates):
            if total <= ANSWERS_BYTES:
                return
            age = loop.time() - gate.sending_since
            if age < ANSWER_SECONDS:
                self._timer = loop.call_later(ANSWER_SECONDS - age, self._end_slowest)
                return
            total -= gate.unread_bytes
            self.remove(gate)
            gate.cut("its client does not read, and too many answers wait")


class Listener:
    """The connections of one listening socket; called for each new one. ``option`` names it in the log."""

    def __init__(self, option: str, server: Callable[[], Any], most: int, unread: UnreadAnswers) -> None:
        self.option = option
        self.most = most
        self.server = server
        self.unread = unread
        self.refused = 0
        # By the protocol of aiohttp, which a request knows; those that came first are first.
        self.gates: dict[Any, Gate] = {}
        self.told = 0

    def __call__(self) -> Gate:
        return Gate(self)

    def make_room(self) -> bool:
        """Whether one more connection may be served; with all places taken, the one that has been idle longest loses
        its own.
        """
        if len(self.gates) < self.most:
            return True
        idle = [one for one in self.gates.values() if one.replaceable]
        if not idle:
            return False
        min(idle, key=lambda one: one.since).cut("its place was needed")
        return True

    def head_is_complete(self, protocol: Any) -> Gate | None:
        """A request's head was read: its body is expected now."""
        gate = self.gates.get(protocol)
        if gate is not None:
            # The body has a deadline of its own, where it is read.
            gate.expect(_BODY, BODY_SECONDS * 2)
        return gate


class Gate(asyncio.Protocol):
    """One connection, seen from outside of aiohttp."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._inner: Any = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._state = _HEAD
        # Bytes of the head so far, or sent ahead; and the last of them, in which the head's end may begin.
        self._bytes = 0
        self._tail = b""
        self._sending = False
        self.since = 0.0
        self.sending_since = 0.0

    @property
    def unread_bytes(self) -> int:
        """Return how many bytes of answers wait in this process until the client reads."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def replaceable(self) -> bool:
        """Nothing is asked over it, or what is asked has not been sent; no answer is on its way."""
        return self._state in (_HEAD, _IDLE) and not self._sending

    # ---- what asyncio says ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        listener = self._listener
        if not listener.make_room():
            listener.refused += 1
            seldom(
                30,
                f"refused {listener.option}",
                "%s: more than %d connections at once; further ones are refused until some end",
                listener.option,
                listener.most,
            )
            self._refuse(
                503,
                f"there are {listener.most} connections already, all at work; ask again in some seconds",
                "too_many_connections",
            )
            return
        self._inner = listener.server()
        listener.gates[self._inner] = self
        self._inner.connection_made(transport)
        self.expect(_HEAD, HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._state == _REFUSED:
            return
        complete = False
        if self._state == _IDLE:
            self.expect(_HEAD, HEAD_SECONDS)
        if self._state == _HEAD:
            complete = self._ends_head(data)
        elif self._state == _WORK:
            self._bytes += len(data)
        if self._state in (_HEAD, _WORK) and self._bytes > HEAD_BYTES:
            self._refuse(431, f"the head of the request is larger than {HEAD_BYTES} bytes", "head_too_large")
            return
        if complete:
            # Its body has a deadline of its own, where it is read.
            self.expect(_BODY, BODY_SECONDS * 2)
        self._inner.data_received(data)

    def _ends_head(self, data: bytes) -> bool:
        """Count the bytes of a head; whether these are its last (an empty line ends it, also one without a carriage
        return).
        """
        known = len(self._tail)
        window = self._tail + data
        ends = [at + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if (at := window.find(mark)) >= 0]
        if ends:
            self._bytes += min(ends) - known
            self._tail = b""
            return True
        self._bytes += len(data)
        self._tail = window[-3:]
        return False

    def eof_received(self) -> bool | None:
        if self._inner is None or self._state == _REFUSED:
            return None
        answer: bool | None = self._inner.eof_received()
        return answer

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._listener.unread.remove(self)
        if self._state == _REFUSED:
            self._listener.told -= 1
        if self._inner is not None:
            self._listener.gates.pop(self._inner, None)
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._sending = True
        self.sending_since = asyncio.get_running_loop().time()
        if self._inner is not None:
            self._inner.pause_writing()
        self._listener.unread.add(self)

    def resume_writing(self) -> None:
        self._sending = False
        self._listener.unread.remove(self)
        if self._inner is not None:
            self._inner.resume_writing()

    # ---- deadlines ----

    def expect(self, state: str, seconds: float | None) -> None:
        """Wait for the end of this state for so many seconds; None: for ever."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._state, self.since = state, loop.time()
        self._timer = None if seconds is None else loop.call_later(seconds, self._late)

    def body_goes_on(self, seconds: float) -> None:
        """A body that is a file has this long until more of it is there."""
        if self._state == _BODY:
            self.expect(_BODY, seconds)

    def body_is_read(self) -> None:
        """The request is complete: what happens now takes as long as it takes."""
        self._bytes = 0
        self._tail = b""
        self.expect(_WORK, None)

    def answered(self, complete: bool) -> None:
        """The answer is handed over.

        ``complete``: so was the request; aiohttp reads the rest of one that was not, for some seconds, and ends.
        """
        if self._state == _REFUSED:
            return
        if not complete:
            self.expect(_LINGER, IDLE_SECONDS)
        elif self._bytes and self._state == _WORK:
            # The next request came meanwhile, or a part of it.
            self.expect(_HEAD, HEAD_SECONDS)
        else:
            self.expect(_IDLE, IDLE_SECONDS)
        self._bytes = 0

    def _late(self) -> None:
        if self._state == _HEAD and self._bytes:
            self._refuse(408, f"the head of the request was not complete within {HEAD_SECONDS:.0f} s", "too_slow")
        elif self._state == _REFUSED:
            self.cut("it was told why")
        else:
            self.cut({_HEAD: "nothing was asked", _IDLE: "it was idle"}.get(self._state, "its client was too slow"))

    def cut(self, why: str) -> None:
        """End the connection now."""
        if self._transport is not None:
            log.debug("%s: a connection was ended: %s", self._listener.option, why)
            if self._inner is not None:
                self._listener.gates.pop(self._inner, None)
            self._transport.abort()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Say why, as far as that costs nothing, and end the connection."""
        assert self._transport is not None
        if self._listener.told >= _TOLD or self._transport.is_closing():
            self.cut(message)
            return
        self._listener.told += 1
        body = json.dumps({"error": message, "code": code}).encode() + b"\n"
        self._transport.write(
            (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json; "
                f"charset=utf-8\r\nConnection: close\r\nRetry-After: 10\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            + body
        )
        # Closed at once, with its request unread, the client would get a reset instead of the answer.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self.expect(_REFUSED, _TOLD_SECONDS)
