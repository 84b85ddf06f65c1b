# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep files in transit between client and guest on the disk, because the daemon's memory is too small for them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from typing import BinaryIO, cast

from aiohttp import StreamReader, web

from agentlab_core.errors import ConfigError

# Files in transit at one time, and bytes of one file.
FILES_AT_ONCE = 4
FILE_BYTES = 1024**3
# Seconds to wait for the next bytes of a file, in both directions.
STALL_SECONDS = 60.0
PART_BYTES = 256 * 1024
# Not /tmp, which may be memory, and the unit has little of that.
_FOLDER = "/var/tmp"


def make() -> BinaryIO:
    """Return a new file without a name. The kernel removes it at the latest when the process ends."""
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(prefix="agentlabd-", dir=_FOLDER))
    except OSError as error:
        raise ConfigError(
            f"{_FOLDER}: {error.strerror or error}; the daemon keeps files on their way there, so make it writable"
        ) from None


class TooLarge(Exception):
    """A client sends more than FILE_BYTES."""


class Places:
    """The number of files that may be in transit."""

    def __init__(self) -> None:
        self._places_in_use = 0

    def take(self) -> bool:
        """Take a place. Returns False when all are taken."""
        if self._places_in_use >= FILES_AT_ONCE:
            return False
        self._places_in_use += 1
        return True

    def give_back(self) -> None:
        """Return a place."""
        self._places_in_use -= 1


async def receive(content: StreamReader, goes_on: Callable[[float], None]) -> BinaryIO:
    """Return a body as a file, positioned at its beginning.

    ``goes_on(seconds)`` extends the connection's deadline. Raises TimeoutError when the client stops sending, and
    TooLarge beyond FILE_BYTES.
    """
    file = make()
    parts: list[bytes] = []
    size = buffered = 0
    try:
        while True:
            goes_on(STALL_SECONDS * 2)
            async with asyncio.timeout(STALL_SECONDS):
                part = await content.readany()
            size += len(part)
            if size > FILE_BYTES:
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


async def send(request: web.Request, file: BinaryIO, headers: dict[str, str]) -> web.StreamResponse:
    """Send a file as the body of the answer. Closes the connection of a client that reads nothing for a minute."""
    response = web.StreamResponse(headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = await asyncio.to_thread(file.seek, 0, 2)
    await asyncio.to_thread(file.seek, 0)
    await response.prepare(request)
    while part := await asyncio.to_thread(file.read, PART_BYTES):
        async with asyncio.timeout(STALL_SECONDS):
            await response.write(part)
    await response.write_eof()
    return response
