# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who holds a claim, and whether that process still lives. Lets the next run take over from a killed one at once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import time


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _started(pid: int) -> str:
    # Field 22 of /proc/PID/stat; the command in field 2 may hold blanks and brackets.
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20].__str__()


@functools.lru_cache(1)
def machine() -> str:
    """Return a word that stays the same for this machine over boots, or an empty text; /etc/machine-id itself is
    kept secret by systemd's advice.
    """
    number = _read("/etc/machine-id").strip()
    return hashlib.sha256(f"agentlab {number}".encode()).hexdigest()[:16] if number else ""


def host() -> str:
    """Return the name under which this host notes what is its own: two hosts may have the same name, and two
    machines made from one image the same id.
    """
    return f"{socket.gethostname()}/{machine()}"


def identity() -> str:
    """Return this process, told apart from any other before or after it, on this host or another (JSON)."""
    boot = _read("/proc/sys/kernel/random/boot_id").strip()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    pid = os.getpid()
    return json.dumps(
        {
            "host": socket.gethostname(),
            "machine": machine(),
            "boot": boot,
            "ns": namespace,
            "pid": pid,
            "started": _started(pid),
        }
    )


def is_over(process: str, expires_at: int, now: int, since_boot: float) -> bool:
    """Whether a claim has run out: by the time since boot where it was written in this boot, so that no jump of the
    clock ends or lengthens it.
    """
    try:
        found = json.loads(process)
        if found["boot"] and found["boot"] == json.loads(identity())["boot"]:
            return float(found["until"]) <= since_boot
    except (ValueError, KeyError, TypeError):
        pass
    # A text that somebody wrote there ends no claim; its holder's death does.
    return isinstance(expires_at, int) and expires_at <= now


def _of_an_earlier_boot(holder: dict[str, object], here: dict[str, object]) -> bool:
    """Whether a holder with this host's name and another boot id is of this machine before its last boot, and not of
    another machine of that name.

    The machine's id must be the same, and the claim must have been written before this boot: a machine made from the
    same image may have both.
    """
    if "machine" not in holder:
        # Written by release 1.0.0, which compared the name alone.
        return True
    booted = time.time() - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    return holder["machine"] == here["machine"] and float(str(holder.get("at", 0))) < booted


def is_dead(process: str) -> bool:
    """True only when it is certain; a process of another host, or of another container on this one, cannot be judged
    and counts as alive.
    """
    try:
        found = json.loads(process)
        here = json.loads(identity())
        if not found["boot"] or found["host"] != here["host"]:
            return False
        if found["boot"] != here["boot"]:
            return _of_an_earlier_boot(found, here)
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
