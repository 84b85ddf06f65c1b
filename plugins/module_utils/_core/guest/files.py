# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy files into a sandbox and out of it: byte for byte, in pieces, checked by length and checksum.

Up: the pieces go in parallel into a hidden file with a private name in the target's folder; their answers are not
awaited. The last request checks that all pieces are there, compares length and SHA-256, sets mode and owner, and
renames the file. So the target is always either the old file or the new one. Down: the guest first reports length and
checksum. A small file comes with that answer; a larger one by file-read under a name of our own, because Proxmox's
access log contains the file names of file-read. Both directions use gzip if a sample shows that it pays.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from .. import escapes, parallel
from ..context import Context
from ..errors import InvalidInput, OutcomeUnknown
from ..model import Sandbox
from . import access, wrapper
from .access import Guest
from .agent import READ_PIECE, GuestFailed
from .command import encode, read_held_file, unpack_gzip

LARGEST_FILE = 2 * 1024**3
_PARALLEL = 4
_TRIES = 4
_SAMPLE = 256 * 1024
# Bytes. The path is sent with each piece.
_LONGEST_PATH = 1000
# Packed data is held in memory while it is unpacked, so a larger file is sent unpacked.
_LARGEST_PACKED = 32 * 1024 * 1024
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class FileInfo:
    """A copied file: its path in the guest, size in bytes, mode in the guest, and SHA-256."""

    path: str
    size: int
    mode: int
    sha256: str


def put_file(
    ctx: Context,
    sandbox: Sandbox,
    source: BinaryIO | bytes,
    path: str,
    *,
    mode: int | None = None,
    owner: str | None = None,
    on_progress: Progress | None = None,
) -> FileInfo:
    """Write a file in a sandbox. The target is replaced as a whole at the end, or not at all.

    ``source`` is read from its position to its end. ``mode`` and ``owner`` (user, or user:group) default to those of
    the replaced file, or else to 0644 and the agent's user. ``on_progress(bytes sent, bytes in all)`` counts
    transferred bytes, after gzip. Raises the errors of ``run_command``. Idempotent.
    """
    name = _check_path(path)
    if owner is not None and not _OWNER.fullmatch(owner):
        raise InvalidInput(f"owner: {owner[:60]!r} is no owner. Valid: user or user:group", option="owner")
    if mode is not None and not 0 <= mode <= 0o7777:
        raise InvalidInput(f"mode: {mode:o} is no mode. Valid: 0 to 7777", option="mode")
    guest = Guest.enter(ctx, sandbox, what="copy a file into")
    guest.what = f"write {path[:200]!r}"
    # The source may be a pipe, and pieces are read in any order. So keep the data: small data in memory, else in a
    # file.
    with tempfile.SpooledTemporaryFile(max_size=8 * 1024 * 1024) as spool:
        upload = _Upload(guest, name, io.BytesIO(source) if isinstance(source, bytes) else source, spool)
        try:
            info = upload.run(path, mode, owner, on_progress)
            guest.judge_again()
        except BaseException:
            upload.abandon()
            raise
    _note_copy(ctx, guest.sandbox, "put_file", info)
    return info


def fetch_file(
    ctx: Context, sandbox: Sandbox, path: str, target: BinaryIO, *, on_progress: Progress | None = None
) -> FileInfo:
    """Read a file of a sandbox into ``target``, which is written in order from its position on.

    Raises GuestFailed when the file changes while it is read. After this or any other error the caller discards what
    was written to ``target``.
    """
    name = _check_path(path)
    guest = Guest.enter(ctx, sandbox, what="copy a file out of")
    guest.what = f"read {path[:200]!r}"
    transfer = access.make_id()
    script = wrapper.compose_request("get", {"id": transfer, "lim": wrapper.INLINE}, {"name": name})
    frame = guest.require_accepted(guest.ask_until_answered(script, transfer))
    size, mode = frame.read_number("so", LARGEST_FILE), _parse_mode(frame.fields.get("mode", ""))
    expected = frame.fields.get("sum", "")
    digest = hashlib.sha256()
    if frame.read_number("lo") == size and len(frame.body) == size:
        digest.update(frame.body)
        target.write(frame.body)
    else:
        _fetch_large(guest, transfer, frame.fields, size, target, digest, on_progress)
        with contextlib.suppress(OutcomeUnknown):
            # Do not wait for the answer. A folder that stays is removed after a day.
            guest.send_script(wrapper.compose_request("drop", {"id": transfer}, {"name": name}))
    if digest.hexdigest() != expected:
        raise GuestFailed(
            f"sandbox {guest.sandbox.vmid}: {path[:200]!r} is not what its checksum says; it changed while it was "
            "read. Try again",
            vmid=guest.sandbox.vmid,
        )
    guest.judge_again()
    info = FileInfo(path, size, mode, expected)
    if on_progress is not None:
        on_progress(size, size)
    _note_copy(ctx, guest.sandbox, "fetch_file", info)
    return info


def _fetch_large(
    guest: Guest,
    transfer: str,
    fields: dict[str, str],
    size: int,
    target: BinaryIO,
    digest: Any,
    on_progress: Progress | None,
) -> None:
    """Write a file of ``size`` bytes from the guest to ``target``: packed if the guest says that this pays."""
    folder = fields.get("dir", "")
    packed = int(fields["gz"]) if fields.get("gz", "").isdecimal() else 0
    if 0 < packed < size * 0.9 and packed <= _LARGEST_PACKED and size <= 8 * _LARGEST_PACKED:
        came = 0

        def count_bytes(number: int) -> None:
            nonlocal came
            came += number
            if on_progress is not None:
                on_progress(came, packed)

        data = unpack_gzip(read_held_file(guest, transfer, folder, "f.gz", packed, count_bytes), size)
        digest.update(data)
        target.write(data)
        return
    # Read a few pieces at a time, so that they bound the memory, not the file.
    step = 4 * READ_PIECE
    for offset in range(0, size, step):
        data = read_held_file(guest, transfer, folder, "f", min(step, size - offset), offset=offset)
        digest.update(data)
        target.write(data)
        if on_progress is not None:
            on_progress(min(offset + step, size), size)


class _Upload:
    """The transfer of one file into the guest."""

    def __init__(self, guest: Guest, name: bytes, source: BinaryIO, spool: Any) -> None:
        self.guest, self.name = guest, name
        self.id = access.make_id()
        self.sent = False
        self.size = 0
        self._lock = threading.Lock()
        digest = hashlib.sha256()
        sample = source.read(_SAMPLE)
        self.packed = len(sample) > 4096 and len(gzip.compress(sample, 6, mtime=0)) < len(sample) * 0.9
        sink: Any = gzip.GzipFile(fileobj=spool, mode="wb", compresslevel=6, mtime=0) if self.packed else spool
        block = sample
        while block:
            self.size += len(block)
            if self.size > LARGEST_FILE:
                raise InvalidInput(
                    f"the file has more than {LARGEST_FILE} bytes, the most that can be brought this way; use the "
                    "network"
                )
            digest.update(block)
            sink.write(block)
            block = source.read(1024 * 1024)
        if self.packed:
            sink.close()
        self.length = spool.tell()
        self.spool = spool
        self.checksum = digest.hexdigest()

    def run(self, path: str, mode: int | None, owner: str | None, on_progress: Progress | None) -> FileInfo:
        """Send all pieces, then the request that installs the file, and return the facts of the file in the guest.

        Pieces that did not arrive are sent again. Raises OutcomeUnknown when pieces keep being lost.
        """
        last = max(0, (self.length - 1) // wrapper.PIECE)
        base = {"id": self.id, "bs": wrapper.PIECE, "gzs": ".gz" if self.packed else ""}
        came = 0

        def send_piece(number: int) -> None:
            nonlocal came
            self.sent = True
            data = self._read_piece(number)
            with contextlib.suppress(OutcomeUnknown):
                # The last request reports whether the piece arrived.
                self.guest.send_script(
                    wrapper.compose_request("piece", {**base, "i": number}, {"name": self.name, "input": data})
                )
            came += len(data)
            if on_progress is not None:
                on_progress(min(came, self.length), self.length)

        missing = list(range(last))
        for _attempt in range(_TRIES):
            parallel.run_each(send_piece, missing, _PARALLEL)
            data = self._read_piece(last)
            values = {
                **base,
                "last": last,
                "nlast": len(data),
                "nraw": self.length,
                "insum": self.checksum,
                "mode": "" if mode is None else f"{mode:o}",
                "owner": owner or "",
            }
            self.sent = True
            script = wrapper.compose_request("finish", values, {"name": self.name, "input": data})
            frame = self.guest.ask_until_answered(script, self.id, refusals=True)
            word = frame.fields.get("why", "") if frame.state == "refused" else ""
            if word.startswith("missing,"):
                missing = [int(text) for text in word.split(",")[1:] if text.isdecimal() and int(text) < last]
                continue
            frame = self.guest.require_accepted(frame)
            if frame.state != "put" or frame.read_number("so") != self.size or frame.fields.get("sum") != self.checksum:
                raise GuestFailed(
                    f"sandbox {self.guest.sandbox.vmid}: the guest's answer is not that of the file sent; look at the "
                    "file"
                )
            self.sent = False
            return FileInfo(path, self.size, _parse_mode(frame.fields.get("mode", "")), self.checksum)
        raise OutcomeUnknown(
            f"sandbox {self.guest.sandbox.vmid}: pieces of {path[:200]!r} keep being lost on their way; the file in "
            "the guest is as it was. Look at the load of the node, then try again",
            vmid=self.guest.sandbox.vmid,
        )

    def abandon(self) -> None:
        """Remove the pieces sent so far. The target file stays unchanged."""
        if self.sent:
            with contextlib.suppress(Exception):
                self.guest.send_script(wrapper.compose_request("drop", {"id": self.id}, {"name": self.name}))

    def _read_piece(self, number: int) -> bytes:
        with self._lock:
            self.spool.seek(number * wrapper.PIECE)
            data: bytes = self.spool.read(wrapper.PIECE)
        return data


def _check_path(path: str) -> bytes:
    """Return the path as bytes. Raises InvalidInput unless it is an absolute path of a file."""
    data = encode(path, "path")
    if not data.startswith(b"/") or data.endswith(b"/") or len(data) > _LONGEST_PATH:
        raise InvalidInput(
            f"path: {path[:200]!r} is no path of a file in the guest. Valid: absolute (begins with /), ends with the "
            f"file's name, up to {_LONGEST_PATH} bytes",
            option="path",
            value=path[:200],
        )
    return data


def _parse_mode(text: str) -> int:
    """Return the mode that the guest reports in octal digits. Raises GuestFailed for anything else."""
    if not re.fullmatch(r"[0-7]{1,5}", text):
        raise GuestFailed("the guest's answer has no file mode, so it is not believed; look at stat in the guest")
    return int(text, 8) & 0o7777


def _note_copy(ctx: Context, sandbox: Sandbox, operation: str, info: FileInfo) -> None:
    """Write the event of a copied file."""
    evidence = {"path": escapes.escape_controls(info.path)[:400], "bytes": info.size, "sha256": info.sha256}
    ctx.records.note(sandbox, operation, outcome="done", evidence=evidence)
