# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the process that keeps other writers of a SQLite file waiting."""

from __future__ import annotations

import os


def name_locker(database: str) -> str:
    """Return which process holds the lock of the records (the path of a SQLite file), as far as this host shows it."""
    # SQLite's writer locks byte 120 of the -shm file. A process that uses the file alone locks bytes of that file.
    for path, byte in ((f"{database}-shm", 120), (database, 0x40000000)):
        try:
            status = os.stat(path)
            inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
            with open("/proc/locks", encoding="ascii", errors="replace") as file:
                for line in file:
                    fields = line.split()
                    if (
                        len(fields) >= 8
                        and fields[3] == "WRITE"
                        and fields[5] == inode
                        and int(fields[6]) <= byte <= int(fields[7].replace("EOF", "9" * 10))
                    ):
                        pid = int(fields[4])
                        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
                            return f"process {pid}, {name.read().strip()}"
        except (OSError, ValueError, IndexError):
            continue
    return "which process it is cannot be seen from here: fuser -v names it"
