# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""How far the records had come, noted beside their file: an older copy that is put in its place is known by it.

An older copy brings old leases back, so that a sandbox renewed since would be ended. The note is a hidden file in the
folder of the records; a restore moves the records (and ``-wal``, ``-shm``), not the note.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile


def path_of(database: str) -> str:
    """Return the path of the note for a file of records."""
    folder, name = os.path.split(os.path.abspath(database))
    return os.path.join(folder, f".{name}.latest")


def read(database: str) -> int | None:
    """Return the id of the newest event that was ever noted, or None when nothing is known."""
    try:
        # Opening a FIFO would wait for a writer.
        descriptor = os.open(path_of(database), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, encoding="ascii") as file:
            text = file.read(32).strip() if stat.S_ISREG(os.fstat(descriptor).st_mode) else ""
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def write(database: str, event: int) -> None:
    """Note the newest event; where that is not allowed, an older copy is not recognised, and nothing else is lost."""
    path = path_of(database)
    with contextlib.suppress(OSError):
        like = os.stat(database)
        handle, fresh = tempfile.mkstemp(prefix=".agentlab-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(f"{event}\n")
                # Whoever may read the records may read it: root's plays and the daemon share both.
                os.fchmod(file.fileno(), like.st_mode & 0o660)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.replace(fresh, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
