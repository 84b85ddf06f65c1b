# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who holds a claim, and whether that process still lives. Lets the next run take over from a killed one at once."""

from __future__ import annotations

import json
import os
import socket


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _started(pid: int) -> str:
    # Field 22 of /proc/PID/stat; the command in field 2 may hold blanks and brackets.
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20].__str__()


def identity() -> str:
    """This process, told apart from any other before or after it, on this host or another (JSON)."""
    boot = _read("/proc/sys/kernel/random/boot_id").strip()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    pid = os.getpid()
    return json.dumps({"host": socket.gethostname(), "boot": boot, "ns": namespace, "pid": pid, "started": _started(pid)})


def is_over(process: str, expires_at: int, now: int, since_boot: float) -> bool:
    """Whether a claim has run out: by the time since boot where it was written in this boot, so that no jump of the clock ends or lengthens it."""
    try:
        found = json.loads(process)
        if found["boot"] and found["boot"] == json.loads(identity())["boot"]:
            return float(found["until"]) <= since_boot
    except (ValueError, KeyError, TypeError):
        pass
    return expires_at <= now


def is_dead(process: str) -> bool:
    """True only when it is certain; a process of another host, or of another container on this one, cannot be judged and counts as alive."""
    try:
        found = json.loads(process)
        here = json.loads(identity())
        if not found["boot"] or found["host"] != here["host"]:
            return False
        if found["boot"] != here["boot"]:
            return True
        if found["ns"] != here["ns"]:
            return False
        pid = int(found["pid"])
        if not _read(f"/proc/{pid}/stat"):
            # Unreadable is not dead: /proc may hide other users' processes.
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            except OSError:
                return False
            return False
        return bool(_started(pid) != found["started"])
    except (ValueError, KeyError, TypeError):
        return False
