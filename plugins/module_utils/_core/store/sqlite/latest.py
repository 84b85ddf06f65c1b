# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Note the newest event in a file beside the records, to detect an older copy restored in their place.

An older copy brings old leases back, which would end a sandbox that was renewed since. The note is a hidden file in the
records' folder. A restore replaces the records (with ``-wal`` and ``-shm``), but not the note.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile


def make_note_path(database: str) -> str:
    """Return the path of the note for a database file."""
    folder, name = os.path.split(os.path.abspath(database))
    return os.path.join(folder, f".{name}.latest")


def read_note(database: str) -> int | None:
    """Return the id of the newest event ever noted, or None without a readable note."""
    try:
        # O_NONBLOCK, because opening a FIFO would wait for a writer.
        descriptor = os.open(make_note_path(database), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, encoding="ascii") as file:
            text = file.read(32).strip() if stat.S_ISREG(os.fstat(descriptor).st_mode) else ""
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def write_note(database: str, event: int) -> None:
    """Write the id of the newest event. Without permission only the detection of older copies is lost."""
    path = make_note_path(database)
    with contextlib.suppress(OSError):
        like = os.stat(database)
        handle, fresh = tempfile.mkstemp(prefix=".agentlab-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(f"{event}\n")
                # Give the note the readers of the records: root's plays and the daemon share both files.
                os.fchmod(file.fileno(), like.st_mode & 0o660)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.replace(fresh, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
