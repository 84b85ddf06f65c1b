# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Limit the clients: number of connections, time for each, and bytes in transit. docs/bounds.md lists the limits.

A gate stands between asyncio and aiohttp's protocol of each connection. aiohttp limits none of this before the head of
a request is complete. Its own limits differ between the releases in Debian 12 and 13.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from typing import Any, cast

from .logs import log, log_seldom

# Seconds from the first byte of a request (or from the connection) until its head is complete.
HEAD_SECONDS = 10.0
# Seconds for the body of a request.
BODY_SECONDS = 30.0
# Seconds that a connection may be idle between two requests, and that a client may take to read an answer.
IDLE_SECONDS = 60.0
# Bytes of the head of a request, and of data that a client sends ahead of its answer.
HEAD_BYTES = 128 * 1024
# Bytes of one body.
BODY_BYTES = 1024 * 1024
# Bytes of all bodies in transit or in work. The first SMALL_BODY bytes of each do not count, so small bodies always
# pass.
BODIES_BYTES = 8 * 1024 * 1024
SMALL_BODY = 16 * 1024
# Bytes of all answers that clients have not read yet, without the kernel's own buffers. Above that, an answer may wait
# ANSWER_SECONDS.
ANSWERS_BYTES = 32 * 1024 * 1024
ANSWER_SECONDS = 1.0
# Bytes that one read takes from a connection. asyncio's own 256 KiB for each of many connections are too many: aiohttp
# quotes what it cannot parse in its error, several times over, and stops a body only between two reads.
ONE_READ_BYTES = 32 * 1024
# aiohttp stops reading a body when twice this number of bytes waits to be taken.
READ_BYTES = 16 * 1024
# Maximum number of connections for each listener, if the process may open enough descriptors.
CONNECTIONS = {"socket": 256, "listen": 64, "metrics_listen": 16}
# Connections that asyncio accepts at one time, and connections that may wait in the kernel, for each listener.
ACCEPTED_AT_ONCE = 32
QUEUE = 1024
# Refused connections at one time that get an answer. Further ones are closed without an answer.
_MOST_EXPLAINED = 16
_REFUSAL_SECONDS = 1.0
# Descriptors reserved for the records, the log, the sockets and short-lived files of libraries.
_OWN_DESCRIPTORS = 64

_HEAD, _BODY, _WORK, _LINGER, _IDLE, _REFUSED = "head", "body", "work", "linger", "idle", "refused"
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def raise_descriptors() -> int:
    """Raise the soft limit of descriptors to the hard limit where allowed, and return the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if soft < limit:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
        except (OSError, ValueError):
            # The system call filter of the unit forbids the change. LimitNOFILE in the unit sets the limit.
            return soft
    return soft


def divide_connections(descriptors: int, proxmox: int) -> dict[str, int]:
    """Return the number of connections for each listener.

    Leaves descriptors for ``proxmox`` connections to Proxmox VE twice, for requests and for stops.
    """
    reserved = _OWN_DESCRIPTORS + 2 * proxmox + len(CONNECTIONS) * (ACCEPTED_AT_ONCE + _MOST_EXPLAINED)
    room, total = descriptors - reserved, sum(CONNECTIONS.values())
    return {name: max(4, count if room >= total else count * room // total) for name, count in CONNECTIONS.items()}


class Bodies:
    """The bytes of all bodies in transit."""

    def __init__(self) -> None:
        self.bytes = 0

    def reserve_bytes(self, before: int, after: int) -> bool:
        """Count the growth of a body from ``before`` to ``after`` bytes. Returns False when there is no room for it."""
        more = max(0, after - SMALL_BODY) - max(0, before - SMALL_BODY)
        if self.bytes + more > BODIES_BYTES:
            return False
        self.bytes += more
        return True

    def release_bytes(self, size: int) -> None:
        self.bytes -= max(0, size - SMALL_BODY)


class UnreadAnswers:
    """The answers on all listeners that their clients have not read yet."""

    def __init__(self) -> None:
        # A dict keeps the order: the first connection is the one whose client has read nothing for longest.
        self._gates: dict[Gate, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, gate: Gate) -> None:
        """Add a connection whose client reads more slowly than the daemon writes."""
        self._gates[gate] = None
        self._end_slowest()

    def remove(self, gate: Gate) -> None:
        """Remove a connection whose client has read its answer, or that has ended."""
        self._gates.pop(gate, None)

    def _end_slowest(self) -> None:
        """End the longest waiting connections until the others are within ANSWERS_BYTES.

        Each client gets ANSWER_SECONDS to read, however many clients ask at the same moment.
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
            gate.cut_connection("its client does not read, and too many answers wait")


class Listener:
    """The connections of one listening socket. asyncio calls the object for each new connection.

    ``option`` is the listener's name in the log, ``most`` the maximum number of connections.
    """

    def __init__(self, option: str, server: Callable[[], Any], most: int, unread: UnreadAnswers) -> None:
        self.option = option
        self.most = most
        self.server = server
        self.unread = unread
        self.refused = 0
        # aiohttp's protocol (a request knows its own) -> gate, in the order of arrival.
        self.gates: dict[Any, Gate] = {}
        # Refused connections whose clients are being told why.
        self.explained_refusals = 0

    def __call__(self) -> Gate:
        return Gate(self)

    def make_room(self) -> bool:
        """Return whether one more connection can be served.

        If all places are taken, close the longest idle connection.
        """
        if len(self.gates) < self.most:
            return True
        idle = [gate for gate in self.gates.values() if gate.replaceable]
        if not idle:
            return False
        min(idle, key=lambda gate: gate.since).cut_connection("its place was needed")
        return True

    def note_complete_head(self, protocol: Any) -> Gate | None:
        """Start the deadline for the body of a request whose head is complete. Return the gate of its connection."""
        gate = self.gates.get(protocol)
        if gate is not None:
            # Reading the body has its own deadline; this one is only a fallback.
            gate.set_state(_BODY, BODY_SECONDS * 2)
        return gate


class Gate(asyncio.Protocol):
    """One connection, as seen from outside aiohttp."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._inner: Any = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._state = _HEAD
        # Number of bytes of the head so far or sent ahead, and the last bytes, in which the end of the head may begin.
        self._bytes = 0
        self._tail = b""
        self._sending = False
        self.since = 0.0
        self.sending_since = 0.0

    @property
    def unread_bytes(self) -> int:
        """Return how many bytes of answers wait in this process for the client to read."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def replaceable(self) -> bool:
        """Return whether the connection may be closed: no complete request that waits for its answer, no answer in
        transit.
        """
        return self._state in (_HEAD, _IDLE, _LINGER) and not self._sending

    # ---- callbacks of asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # The transport reads as many bytes at once as this attribute says.
        self._transport.max_size = ONE_READ_BYTES  # type: ignore[attr-defined]
        listener = self._listener
        if not listener.make_room():
            listener.refused += 1
            log_seldom(
                30,
                f"refused {listener.option}",
                "%s: more than %d connections at once; further ones are refused until some end",
                listener.option,
                listener.most,
            )
            self._refuse_request(
                503,
                f"there are {listener.most} connections already, all at work; ask again in some seconds",
                "too_many_connections",
            )
            return
        self._inner = listener.server()
        listener.gates[self._inner] = self
        self._inner.connection_made(transport)
        self.set_state(_HEAD, HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._state == _REFUSED:
            return
        complete = False
        if self._state == _IDLE:
            self.set_state(_HEAD, HEAD_SECONDS)
        if self._state == _HEAD:
            complete = self._count_head(data)
        elif self._state == _WORK:
            self._bytes += len(data)
        if self._state in (_HEAD, _WORK) and self._bytes > HEAD_BYTES:
            self._refuse_request(431, f"the head of the request is larger than {HEAD_BYTES} bytes", "head_too_large")
            return
        if complete:
            # Reading the body has its own deadline; this one is only a fallback.
            self.set_state(_BODY, BODY_SECONDS * 2)
        self._inner.data_received(data)

    def _count_head(self, data: bytes) -> bool:
        """Count the bytes of a head, and return whether the head is complete.

        An empty line ends a head, with or without carriage return.
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
            self._listener.explained_refusals -= 1
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

    def set_state(self, state: str, seconds: float | None) -> None:
        """Set the state, and the seconds until it must have ended; None: no limit."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._state, self.since = state, loop.time()
        self._timer = None if seconds is None else loop.call_later(seconds, self._end_late)

    def extend_body_deadline(self, seconds: float) -> None:
        """Give a body that is a file this many seconds until its next bytes."""
        if self._state == _BODY:
            self.set_state(_BODY, seconds)

    def note_body_read(self) -> None:
        """Stop the clock: the request is complete, and the work on it has no deadline here."""
        self._bytes = 0
        self._tail = b""
        self.set_state(_WORK, None)

    def note_answer(self, complete: bool) -> None:
        """Start the deadline for the client's next request.

        ``complete``: the answered request was complete too. Otherwise aiohttp reads the rest of the request for some
        seconds and closes the connection.
        """
        if self._state == _REFUSED:
            return
        if not complete:
            self.set_state(_LINGER, IDLE_SECONDS)
        elif self._bytes and self._state == _WORK:
            # The next request, or a part of it, has arrived meanwhile.
            self.set_state(_HEAD, HEAD_SECONDS)
        else:
            self.set_state(_IDLE, IDLE_SECONDS)
        self._bytes = 0

    def _end_late(self) -> None:
        """End the connection whose deadline is over; tell the reason only to a client that is sending a request."""
        if self._state == _HEAD and self._bytes:
            self._refuse_request(
                408, f"the head of the request was not complete within {HEAD_SECONDS:.0f} s", "too_slow"
            )
        elif self._state == _REFUSED:
            self.cut_connection("it was told why")
        else:
            self.cut_connection(
                {_HEAD: "nothing was asked", _IDLE: "it was idle"}.get(self._state, "its client was too slow")
            )

    def cut_connection(self, why: str) -> None:
        """End the connection now."""
        if self._transport is not None:
            log.debug("%s: a connection was ended: %s", self._listener.option, why)
            if self._inner is not None:
                self._listener.gates.pop(self._inner, None)
            self._transport.abort()

    def _refuse_request(self, status: int, message: str, code: str) -> None:
        """Send the reason unless too many refusals are being sent already, and end the connection."""
        assert self._transport is not None
        if self._listener.explained_refusals >= _MOST_EXPLAINED or self._transport.is_closing():
            self.cut_connection(message)
            return
        self._listener.explained_refusals += 1
        body = json.dumps({"error": message, "code": code}).encode() + b"\n"
        self._transport.write(
            (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json; "
                f"charset=utf-8\r\nConnection: close\r\nRetry-After: 10\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            + body
        )
        # Closing at once, with the request unread, would give the client a reset instead of the answer.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self.set_state(_REFUSED, _REFUSAL_SECONDS)
