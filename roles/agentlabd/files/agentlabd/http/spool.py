# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files on their way between a client and a guest, kept on the disk: the daemon's memory is too small for them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from typing import BinaryIO, cast

from aiohttp import StreamReader, web

from agentlab_core.errors import ConfigError

# Files on their way at once, and bytes of one.
FILES_AT_ONCE = 4
FILE_BYTES = 1024**3
# Seconds for the next bytes of a file, in both directions.
STALL_SECONDS = 60.0
PART_BYTES = 256 * 1024
# /tmp may be memory, and the unit has little of that.
_FOLDER = "/var/tmp"


def make() -> BinaryIO:
    """Return a new file without a name, which goes with the process at the latest."""
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(prefix="agentlabd-", dir=_FOLDER))
    except OSError as error:
        raise ConfigError(
            f"{_FOLDER}: {error.strerror or error}; the daemon keeps files on their way there, so make it writable"
        ) from None


class TooLarge(Exception):
    """A client sends more than FILE_BYTES."""


class Places:
    """How many more files may be on their way."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self) -> bool:
        """Take a place; False when there is none."""
        if self._taken >= FILES_AT_ONCE:
            return False
        self._taken += 1
        return True

    def give_back(self) -> None:
        """Give a place back."""
        self._taken -= 1


async def receive(content: StreamReader, goes_on: Callable[[float], None]) -> BinaryIO:
    """Return a body as a file at its beginning.

    TimeoutError when the client sends nothing more, TooLarge beyond FILE_BYTES.

    ``goes_on(seconds)`` gives the connection that much more time.
    """
    file = make()
    parts: list[bytes] = []
    size = held = 0
    try:
        while True:
            goes_on(STALL_SECONDS * 2)
            async with asyncio.timeout(STALL_SECONDS):
                part = await content.readany()
            size += len(part)
            if size > FILE_BYTES:
                raise TooLarge
            parts.append(part)
            held += len(part)
            if held >= PART_BYTES or not part:
                await asyncio.to_thread(file.write, b"".join(parts))
                parts, held = [], 0
            if not part:
                await asyncio.to_thread(file.seek, 0)
                return file
    except BaseException:
        file.close()
        raise


async def send(request: web.Request, file: BinaryIO, headers: dict[str, str]) -> web.StreamResponse:
    """Send a file as the answer's body; a client that takes nothing for a minute loses the connection."""
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
