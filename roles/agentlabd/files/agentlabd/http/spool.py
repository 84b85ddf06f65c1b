# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep files in transit between client and guest on the disk, because the daemon's memory is too small for them."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, cast

from aiohttp import StreamReader, web

from agentlab_core.errors import ConfigError

from ..logs import log, log_seldom

# Files in transit at one time, and bytes of one file.
FILES_AT_ONCE = 4
FILE_BYTES = 1024**3
# Seconds to wait for the next bytes of a file, in both directions.
STALL_SECONDS = 60.0
# Bytes a second that a client must reach on average beyond STALL_SECONDS. Otherwise few clients that send or take a
# byte now and then would keep all places for ever.
SLOWEST_BYTES = 16 * 1024
PART_BYTES = 256 * 1024
# Not /tmp: that may be in memory (tmpfs), and MemoryMax of the unit is small.
_FOLDER = "/var/tmp"


def make_file() -> BinaryIO:
    """Return a new file without a name. The kernel removes it at the latest when the process ends."""
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(prefix="agentlabd-", dir=_FOLDER))
    except OSError as error:
        raise ConfigError(
            f"{_FOLDER}: {error.strerror or error}; the daemon keeps files on their way there, so make it writable"
        ) from None


class TooLarge(Exception):
    """A client sends more than FILE_BYTES."""


class TooSlow(Exception):
    """A client sends or takes a file too slowly; the text says how slowly."""


class Pace:
    """The time that a client takes for a file. The daemon's own reads and writes of the disk do not count."""

    def __init__(self) -> None:
        self.bytes = 0
        self._waited = 0.0

    @contextlib.asynccontextmanager
    async def wait_for_client(self) -> AsyncIterator[None]:
        """Limit the time of the block, which waits for the client. Raises TooSlow."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        remaining = STALL_SECONDS + self.bytes / SLOWEST_BYTES - self._waited
        try:
            async with asyncio.timeout(min(STALL_SECONDS, remaining)):
                yield
        except TimeoutError:
            raise TooSlow(
                f"nothing of the file came for {STALL_SECONDS:.0f} s"
                if remaining >= STALL_SECONDS
                else f"the file came more slowly than {SLOWEST_BYTES} bytes a second"
            ) from None
        self._waited += loop.time() - began


class Places:
    """The number of files that may be in transit."""

    def __init__(self) -> None:
        self._places_in_use = 0

    def take_place(self) -> bool:
        """Take a place. Returns False when all are taken."""
        if self._places_in_use >= FILES_AT_ONCE:
            return False
        self._places_in_use += 1
        return True

    def give_place_back(self) -> None:
        """Return a place."""
        self._places_in_use -= 1


async def receive_file(content: StreamReader, goes_on: Callable[[float], None]) -> BinaryIO:
    """Return a body as a file, positioned at its beginning.

    ``goes_on(seconds)`` extends the connection's deadline. Raises TooSlow when the client stops sending or sends too
    slowly, and TooLarge beyond FILE_BYTES.
    """
    file = make_file()
    parts: list[bytes] = []
    pace = Pace()
    buffered = 0
    try:
        while True:
            goes_on(STALL_SECONDS * 2)
            async with pace.wait_for_client():
                part = await content.readany()
            pace.bytes += len(part)
            if pace.bytes > FILE_BYTES:
                raise TooLarge
            parts.append(part)
            buffered += len(part)
            if buffered >= PART_BYTES or not part:
                await asyncio.to_thread(file.write, b"".join(parts))
                parts, buffered = [], 0
            if not part:
                await asyncio.to_thread(file.seek, 0)
                return file
    except BaseException:
        file.close()
        raise


async def send_file(request: web.Request, file: BinaryIO, headers: dict[str, str]) -> web.StreamResponse:
    """Send a file as the body of the answer.

    Closes the connection of a client that reads nothing for a minute, or too slowly.
    """
    response = web.StreamResponse(headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = await asyncio.to_thread(file.seek, 0, 2)
    await asyncio.to_thread(file.seek, 0)
    pace = Pace()
    try:
        await response.prepare(request)
        while part := await asyncio.to_thread(file.read, PART_BYTES):
            async with pace.wait_for_client():
                await response.write(part)
            pace.bytes += len(part)
        await response.write_eof()
    except (ConnectionError, TooSlow, OSError) as error:
        # The head of the answer is sent, so a further answer would become a part of the file.
        if request.transport is not None:
            request.transport.abort()
        if isinstance(error, (ConnectionError, TooSlow)):
            log.debug("%s: the client did not take the whole file: %s", request.path[:200], error)
        else:
            log_seldom(60, "spool", "%s: a file on its way cannot be read: %s", _FOLDER, error.strerror or error)
    return response
