# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look up the address of a running sandbox without a recent one, beside the request that shows the sandbox.

A program that wants to log in polls the sandbox until it has an address. The answer itself never waits for the guest.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor

from agentlab_core import states
from agentlab_core.context import Context
from agentlab_core.errors import AgentlabError, make_host_error
from agentlab_core.model import Sandbox
from agentlab_core.vm import address
from agentlab_core.vm.locate import match_if_readable

from ..logs import log

# Seconds between two requests to one guest.
EVERY = 3.0
# Requests at one time. A silent guest must not block the threads for other work.
AT_ONCE = 2

_lock = threading.Lock()
_last_lookups: dict[str, float] = {}
_under_way = 0


def look_up_address(ctx: Context, sandbox: Sandbox, threads: Executor) -> None:
    """Start a thread that asks the guest agent, unless that was done just now. Returns at once."""
    global _under_way
    now = time.monotonic()
    with _lock:
        for uuid in [uuid for uuid, at in _last_lookups.items() if now - at >= EVERY]:
            del _last_lookups[uuid]
        if sandbox.uuid in _last_lookups or _under_way >= AT_ONCE:
            return
        _last_lookups[sandbox.uuid] = now
        _under_way += 1
    try:
        threads.submit(_ask_guest, ctx, sandbox.uuid)
    except RuntimeError:
        # The daemon has begun to stop meanwhile.
        _count_ended()


def _count_ended() -> None:
    global _under_way
    with _lock:
        _under_way -= 1


def _ask_guest(ctx: Context, uuid: str) -> None:
    """Ask the guest agent for the address, and write it into the record. Log an error, because nobody else sees it."""
    try:
        sandbox = ctx.records.get(uuid)
        located = match_if_readable(ctx, sandbox)
        ip = address.look_up(ctx, sandbox, located) if located else None
        if ip is None:
            return
        if ip == sandbox.ip:
            ctx.records.confirm_address(sandbox)
            return
        with ctx.claim_sandbox(sandbox, "address", wait=0) as (claim, current):
            # Another operation's journal entry stays for that operation to finish.
            if claim.interrupted is None and current.ip == sandbox.ip and current.state in states.POWERED:
                ctx.records.change(
                    claim,
                    current,
                    "address",
                    ip=ip,
                    ip_seen_at=ctx.clock.now(),
                    reason="address",
                    evidence={"ip": ip},
                    finish=True,
                )
    except AgentlabError as error:
        log.debug("the address of sandbox %s cannot be looked up: %s", uuid, error.message)
    except Exception as error:  # a thread of the pool would lose it silently
        if known := make_host_error(error):
            log.debug("the address of sandbox %s cannot be looked up: %s", uuid, known.message)
            return
        log.exception("internal error while the address of sandbox %s was looked up", uuid)
    finally:
        _count_ended()
