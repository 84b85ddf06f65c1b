# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The thread of the double's server, and how methods that tests call get onto it."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any


def on_loop(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method on the server's thread, whichever thread calls it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.loop is None or not self.loop.is_running() or threading.get_ident() == self.loop_thread:
            return method(self, *args, **kwargs)

        async def run() -> Any:
            return method(self, *args, **kwargs)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    return call
