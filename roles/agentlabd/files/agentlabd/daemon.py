# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The process: starts the parts, waits for signals, ends in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

from agentlab_core.config import Config
from agentlab_core.errors import AgentlabError

from . import __version__, systemd
from .api import Api
from .logs import log
from .service import Service


class Daemon:
    """One run of the daemon."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.api = Api(service)
        self.manager = systemd.Manager()

    async def run(self) -> bool:
        """Until SIGTERM or SIGINT; True when nothing had to be abandoned."""
        loop = asyncio.get_running_loop()
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        await self.api.listen()
        watchdog = asyncio.ensure_future(self._watchdog())
        where = self.service.config.socket
        log.info("agentlabd %s serves %s; Proxmox: %s; records: %s", __version__, where, self.service.config.proxmox.where, self.service.config.database)
        self.manager.ready(f"serving {where}")
        await end.wait()
        clean = await self._stop()
        watchdog.cancel()
        return clean

    async def _watchdog(self) -> None:
        period = systemd.watchdog_seconds()
        while period:
            self.manager.alive()
            await asyncio.sleep(period / 2)

    async def _stop(self) -> bool:
        """Begin nothing new, let what is under way end; after stop_timeout it is abandoned: the journal tells the next start."""
        self.service.stopping.set()
        self.manager.stopping("finishing what is under way")
        left = set(self.api.under_way)
        if left:
            log.info("stopping: %d requests are under way; waiting for them up to %d s (stop_timeout)", len(left), self.service.config.stop_timeout)
            _done, left = await asyncio.wait(left, timeout=self.service.config.stop_timeout)
        if left:
            log.warning("stopping: %d requests did not end within stop_timeout; they are journaled, the next start takes them up", len(left))
            return False
        await self.api.close()
        return True


def run(config: Config, path: str | None, environment: Mapping[str, str]) -> int:
    """Serve until told to end; the exit status."""
    service = Service(config, path, environment)
    try:
        clean = asyncio.run(_serve(service))
    except AgentlabError:
        service.close()
        raise
    if not clean:
        # Threads that wait for Proxmox cannot be ended; the journal holds what they were about.
        sys.stderr.flush()
        os._exit(0)
    service.close()
    log.info("agentlabd stopped")
    return 0


async def _serve(service: Service) -> bool:
    return await Daemon(service).run()
