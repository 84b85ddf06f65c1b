# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Identify the holder of a claim, and tell whether its process still lives.

This lets the next run take over from a killed process at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import time


def _read_text(path: str) -> str:
    """Return the text of a file; "" when it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _read_start_time(pid: int) -> str:
    """Return the start time of a process in a form that is only compared."""
    # Field 22 of /proc/PID/stat is the start time. The command in field 2 may contain blanks and brackets.
    return _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20].__str__()


@functools.lru_cache(1)
def read_machine_id() -> str:
    """Return an id of this machine that survives reboots, or "" without one.

    systemd advises to keep /etc/machine-id secret, so the id is derived from it. In an image that was not booted yet
    the file is empty or says "uninitialized", as in every other container of that image.
    """
    number = _read_text("/etc/machine-id").strip()
    known = re.fullmatch("[0-9a-f]{32}", number) and number.strip("0")
    return hashlib.sha256(f"agentlab {number}".encode()).hexdigest()[:16] if known else ""


def read_host_name() -> str:
    """Return the name by which this host marks its own claims.

    The name combines host name and machine id: two hosts may share a name, and two machines from one image may share an
    id.
    """
    return f"{socket.gethostname()}/{read_machine_id()}"


def describe_process() -> str:
    """Return the identity of this process as JSON.

    The identity is unique: no other process on any host has it at any time.
    """
    boot = _read_text("/proc/sys/kernel/random/boot_id").strip()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    pid = os.getpid()
    return json.dumps(
        {
            "host": socket.gethostname(),
            "machine": read_machine_id(),
            "boot": boot,
            "ns": namespace,
            "pid": pid,
            "started": _read_start_time(pid),
        }
    )


def is_over(process: str, expires_at: int, now: int, since_boot: float) -> bool:
    """Return whether a claim has expired. ``expires_at`` and ``now`` are seconds since the epoch.

    A claim of this boot is compared by the time since boot, so that a jump of the wall clock neither ends nor extends
    it.
    """
    try:
        holder = json.loads(process)
        if holder["boot"] and holder["boot"] == json.loads(describe_process())["boot"]:
            return float(holder["until"]) <= since_boot
    except (ValueError, KeyError, TypeError):
        pass
    # The column may hold text that a person wrote there. Such a claim ends only with its holder.
    return isinstance(expires_at, int) and expires_at <= now


def _is_of_an_earlier_boot(holder: dict[str, object], own_process: dict[str, object]) -> bool:
    """Return whether a holder is from an earlier boot of this machine, and not from another machine of the same name.

    The machine id must be the same, and the claim must have been written before this boot. Both are needed, because
    machines made from one image may share name and id. Without an id nothing tells them apart.
    """
    if "machine" not in holder:
        # Release 1.0.0 stored no machine id and compared the name alone.
        return True
    booted = time.time() - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    if not holder["machine"] or holder["machine"] != own_process["machine"]:
        return False
    return float(str(holder.get("at", 0))) < booted


def is_dead(process: str) -> bool:
    """Return whether the process is dead for certain.

    A process of another host, or of another container on this host, cannot be checked and counts as alive.
    """
    try:
        holder = json.loads(process)
        own_process = json.loads(describe_process())
        if not holder["boot"] or holder["host"] != own_process["host"]:
            return False
        if holder["boot"] != own_process["boot"]:
            return _is_of_an_earlier_boot(holder, own_process)
        if holder["ns"] != own_process["ns"]:
            return False
        pid = int(holder["pid"])
        if not _read_text(f"/proc/{pid}/stat"):
            # An unreadable file proves nothing: /proc may hide other users' processes.
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            except OSError:
                return False
            return False
        return bool(_read_start_time(pid) != holder["started"])
    except (ValueError, KeyError, TypeError):
        return False
