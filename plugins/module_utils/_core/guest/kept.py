# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Split Ansible's input for a module into files that the guest keeps, and the rest.

With pipelining Ansible sends each module as a Python text with a base64-encoded ZIP archive inside. The archive holds
the module and Ansible's library: 120 to 250 kB that hardly differ between two tasks. The guest keeps the compressed
files of the archive by their checksums, so a later task sends only the files that the guest does not have. The
archive's headers carry the time of the build, so they are sent each time. Values of the task stand outside the archive
and are never kept.

The guest puts the input together again (``assemble`` in ``wrapper.py``) and compares the checksum of the whole.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Set
from dataclasses import dataclass

# Characters of base64 in a row that are worth splitting. A smaller archive fits into one request anyway.
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16000,}={0,2}")
# Bytes. A smaller file costs the guest more time (one process) than its transfer costs.
_SMALLEST = 600
_LOCAL_HEADER = 30
# Seconds that a guest's Python needs for a byte of modules, roughly. Used until the module has run once.
_SECONDS_PER_BYTE = 1e-6
_PLAIN = re.compile(rb"[A-Za-z0-9 ./_,:;=+-]")


@dataclass(frozen=True, slots=True)
class Layout:
    """Input of a command: ``head``, then ``parts`` as base64, then ``tail``.

    A part is bytes, or the name of a file in ``files``. ``kind`` is the same for the same files, ``seconds`` is the
    estimated running time.
    """

    head: bytes
    parts: tuple[bytes | str, ...]
    tail: bytes
    files: dict[str, bytes]
    kind: str
    seconds: float

    def pack(self, known: Set[str]) -> tuple[bytes, dict[str, object], list[str]]:
        """Return the data to send, the shell variables that describe it, and the names of the files in it.

        ``known`` are the names of files that the guest keeps already.
        """
        recipe = self._compose_recipe()
        fresh = [name for name in self.files if name not in known]
        values: dict[str, object] = {
            "nrec": len(recipe),
            "nhead": len(self.head),
            "ntail": len(self.tail),
            "fresh": " ".join(f"{name}:{len(self.files[name])}" for name in fresh),
            "need": " ".join(name for name in self.files if name in known),
        }
        return b"".join([recipe, self.head, self.tail, *(self.files[name] for name in fresh)]), values, fresh

    def _compose_recipe(self) -> bytes:
        """Return shell text that writes the archive. ``$k`` is the folder of the kept files."""
        lines = [
            f'cat "$k/{part}"'.encode() if isinstance(part, str) else b"printf '" + _escape_bytes(part) + b"'"
            for part in self.parts
        ]
        return b"\n".join(lines) + b"\n"


def split_module(data: bytes) -> Layout | None:
    """Return the layout of a module with its archive; None for any other input."""
    match = max(_BASE64.finditer(data), key=lambda match: len(match[0]), default=None)
    if match is None:
        return None
    try:
        archive = base64.b64decode(match[0], validate=True)
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            infos = sorted(opened.infolist(), key=lambda info: info.header_offset)
    except (binascii.Error, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None
    if base64.b64encode(archive) != match[0]:
        return None
    parts: list[bytes | str] = []
    files: dict[str, bytes] = {}
    at = 0
    for info in infos:
        if info.compress_size < _SMALLEST:
            continue
        name_length, extra_length = struct.unpack_from("<HH", archive, info.header_offset + 26)
        begin = info.header_offset + _LOCAL_HEADER + name_length + extra_length
        content = archive[begin : begin + info.compress_size]
        if begin < at or len(content) != info.compress_size:
            return None
        name = hashlib.sha256(content).hexdigest()[:20]
        files[name] = content
        parts += [archive[at:begin], name]
        at = begin + info.compress_size
    if not files:
        return None
    parts.append(archive[at:])
    kind = hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]
    seconds = sum(info.file_size for info in infos) * _SECONDS_PER_BYTE
    return Layout(data[: match.start()], tuple(parts), data[match.end() :], files, kind, seconds)


def _escape_bytes(data: bytes) -> bytes:
    """Return bytes as a format of printf in single quotes."""
    return b"".join(
        byte if _PLAIN.fullmatch(byte) else b"\\%03o" % byte[0] for byte in (data[n : n + 1] for n in range(len(data)))
    )
