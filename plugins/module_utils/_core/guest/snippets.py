# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name and remove the file with a sandbox's user data. cloud_init.py writes it.

The two are apart, because every way to DESTROYED removes the file and only a creation writes it.
"""

from __future__ import annotations

import os

from ..context import Context
from ..errors import Kept
from ..model import Sandbox
from ..store import holders


def compose_name(sandbox: Sandbox) -> str:
    """Return the file name of the sandbox's snippet."""
    return f"agentlab-{sandbox.uuid}.yaml"


def remove(ctx: Context, sandbox: Sandbox) -> None:
    """Remove the sandbox's snippet, complete or half written.

    Raises Kept when the file exists and cannot be removed, because it may hold secrets.
    """
    if sandbox.snippet is None or os.path.basename(sandbox.snippet) != compose_name(sandbox):
        return
    # A storage that both hosts share shows the file here too.
    if is_elsewhere(ctx, sandbox) and not os.path.lexists(sandbox.snippet):
        host = str(sandbox.snippet_host).partition("/")[0]
        raise Kept(
            "snippet",
            f"sandbox {sandbox.vmid}: its cloud-init snippet {sandbox.snippet} was written on host {host}, and is not "
            f"on this one; the daemon of {host} removes it, or run again on {host}. If {host} is gone for good, make "
            "an empty file of that name here, then run again",
            vmid=sandbox.vmid,
        )
    for path in (sandbox.snippet, make_temporary_path(sandbox.snippet)):
        try:
            os.unlink(path)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(path)):
                raise Kept(
                    "snippet",
                    f"sandbox {sandbox.vmid}: the folder of its cloud-init snippet {path} is not there (a storage "
                    "that is not mounted?), so it may still exist; mount it, or make the folder if it is gone for "
                    "good, then run again",
                    vmid=sandbox.vmid,
                ) from None
        except OSError as error:
            raise Kept(
                "snippet",
                f"sandbox {sandbox.vmid}: its cloud-init snippet {path} cannot be removed: {error.strerror}; remove "
                "it, or run as a user who may, then run again",
                vmid=sandbox.vmid,
            ) from None
    _note_removal(ctx, sandbox)


def _note_removal(ctx: Context, sandbox: Sandbox) -> None:
    """Write to the record that the file is removed, because other hosts cannot see that."""
    if ctx.records.db.controller is not None and sandbox.snippet_host is not None:
        ctx.records.forget_snippet_host(sandbox.uuid)


def is_elsewhere(ctx: Context, sandbox: Sandbox) -> bool:
    """Return whether another host wrote the snippet. Records without heartbeats are those of one host."""
    return ctx.records.db.controller is not None and sandbox.snippet_host not in (None, holders.read_host_name())


def make_temporary_path(path: str) -> str:
    """Return the path to which a snippet is written before it is renamed to its own."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
