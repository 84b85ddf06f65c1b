# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the process: start the parts, wait for signals, stop the parts in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from agentlab_core.config import Config
from agentlab_core.errors import AgentlabError

from . import LAST_WORD, __version__, systemd
from .http.server import Api
from .logs import log
from .scheduler import Scheduler
from .scrape import Scrape
from .service import Service

# Seconds between two checks of the files of the socket and the records.
_LOOK_SECONDS = 2.0


class Daemon:
    """One run of the daemon."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.api = Api(service)
        self.manager = systemd.Manager()
        self.scheduler = Scheduler(service)
        service.metrics.registry.register(Scrape(service))
        self._end = asyncio.Event()
        # Set by SIGHUP. So many SIGHUPs cause one reload, and SIGTERM never waits behind thousands of them.
        self._hangup = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(self) -> bool:
        """Run until SIGTERM or SIGINT. Returns False when work had to be abandoned."""
        handle_signals({signal.SIGTERM: self._end.set, signal.SIGINT: self._end.set, signal.SIGHUP: self._hangup.set})
        try:
            await self.api.open_sockets()
        except AgentlabError:
            await self.api.close()
            raise
        self.scheduler.start()
        watchdog = asyncio.create_task(self._feed_watchdog())
        reloads = asyncio.create_task(self._reload_when_asked())
        look = asyncio.create_task(self._watch_files())
        for task in (*self.scheduler.tasks, watchdog, reloads, look):
            task.add_done_callback(self._end_with_loop)
        config = self.service.config
        log.info(
            "agentlabd %s serves %s; Proxmox: %s; records: %s; %s",
            __version__,
            config.socket,
            config.proxmox.where,
            config.database,
            self._describe_rules(),
        )
        self.manager.notify_ready(f"serving {config.socket}")
        await self._end.wait()
        clean = await self._stop_work()
        watchdog.cancel()
        reloads.cancel()
        look.cancel()
        # A second SIGTERM must not kill a daemon that is about to end.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self._failure:
            raise self._failure
        return clean

    def _describe_rules(self) -> str:
        policy = self.service.policy
        return f"cleanup: {len(policy.rules)} rules, mode {policy.mode}" if policy.enabled else "cleanup: off"

    def _end_with_loop(self, task: asyncio.Task[None]) -> None:
        """End the daemon when one of its loops has ended: a restart is better than a daemon that only seems to work."""
        if not task.cancelled() and task.exception():
            log.critical("internal error: a loop of the daemon ended", exc_info=task.exception())
            self._failure = task.exception()
            self._end.set()

    async def _feed_watchdog(self) -> None:
        """Tell systemd twice in each period of WatchdogSec that the event loop runs."""
        period = systemd.read_watchdog_seconds()
        while period:
            self.manager.notify_alive()
            await asyncio.sleep(period / 2)

    async def _reload_when_asked(self) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self._reload_config()

    async def _watch_files(self) -> None:
        """Check every few seconds that the files of socket and records still exist, and log what began or ended."""
        service = self.service
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._end.is_set():
                return
            service.conditions.socket_problem = await self.api.restore_socket()
            # In a thread, because it reads the records.
            await asyncio.get_running_loop().run_in_executor(service.records_pool, service.conditions.log_changes)

    def _reload_config(self) -> None:
        """Reload the configuration after SIGHUP, in the event loop: reading a few small files delays nothing."""
        if self._end.is_set():
            return
        self.manager.notify_reloading()
        try:
            waiting = self.service.reload()
        except AgentlabError as error:
            log.error("not reloaded, the old configuration stays in force: %s", error.message)
            self.manager.notify_ready(f"serving, but not reloaded: {error.message}")
            return
        if waiting:
            log.warning("reloaded, but a change of %s needs a restart", ", ".join(waiting))
        self.scheduler.apply_reload()
        log.info("reloaded; %s", self._describe_rules())
        self.manager.notify_ready(f"serving {self.service.config.socket}")

    async def _stop_work(self) -> bool:
        """Start nothing new, and wait up to stop_timeout for work under way. Returns False when work was abandoned.

        The journal holds abandoned work for the next start.
        """
        self.scheduler.stop()
        self.service.refuse_new_work()
        self.manager.notify_stopping("finishing what is under way")
        # Work that waited for a thread is cancelled by now. Let its clients get their answer.
        await asyncio.sleep(0)
        unfinished = set(self.service.under_way)
        if unfinished:
            log.info(
                "stopping: waiting up to %d s (stop_timeout) for %s",
                self.service.config.stop_timeout,
                self._list_names(unfinished),
            )
            _finished, unfinished = await asyncio.wait(unfinished, timeout=self.service.config.stop_timeout)
        if unfinished:
            log.warning(
                "stopping: %s did not end within stop_timeout; what was begun is journaled, the next start takes it up",
                self._list_names(unfinished),
            )
            return False
        # Let finished answers go out before the sockets close.
        await asyncio.sleep(0)
        await self.api.close()
        return True

    def _list_names(self, work: set[asyncio.Future[Any]]) -> str:
        """Return the names of up to ten pieces of work."""
        names = sorted(self.service.under_way.get(future, "what has just ended") for future in work)
        return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def handle_signals(actions: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Run an action in the running event loop for each signal. Call this in the main thread.

    ``loop.add_signal_handler`` is not used: it passes signals on as bytes in a pipe, and while the pipe is full (a
    storm of SIGHUP) the byte of a SIGTERM is dropped.
    """
    loop = asyncio.get_running_loop()

    def call_soon(number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(actions[signal.Signals(number)])

    for number in actions:
        signal.signal(number, call_soon)


def run(config: Config, path: str | None, environment: Mapping[str, str], config_option: str | None = None) -> int:
    """Serve until told to end, and return the exit status."""
    service = Service(config, path, environment, config_option)
    try:
        clean = asyncio.run(_serve(service))
    except AgentlabError:
        service.close()
        raise
    except Exception:
        # The error was logged where it happened. Other threads may still be waiting.
        log.error("%s", LAST_WORD)
        sys.stderr.flush()
        os._exit(1)
    if not clean:
        # Threads that wait for Proxmox cannot be ended. The journal holds their work.
        sys.stderr.flush()
        os._exit(0)
    service.close()
    log.info("agentlabd stopped")
    return 0


async def _serve(service: Service) -> bool:
    return await Daemon(service).run()
