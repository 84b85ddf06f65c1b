# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the API and the scheduler stand on: the configuration in force, the shared database and connections, and the threads for blocking work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agentlab_core import clock as clock_module
from agentlab_core import config as core_config
from agentlab_core.config import Config
from agentlab_core.errors import AgentlabError
from agentlab_core.operations.context import Context
from agentlab_core.store import schema

from . import __version__, answers
from .answers import Answer
from .logs import log
from .routes import Call, Route

# Threads for what the records alone answer. SQLite serialises them anyway; a few hide the waiting for the disk.
_READERS = 4


class Service:
    """One daemon. ``config`` and what hangs on it may be replaced by a reload; the database and the sockets stay."""

    def __init__(self, config: Config, path: str | None, environment: Mapping[str, str]) -> None:
        self.path = path
        self.environment = environment
        self.started_at = int(time.time())
        self._began = time.monotonic()
        self.stopping = threading.Event()
        self.base = Context(config, actor="agentlabd", stopping=self.stopping)
        self.loaded_at = self.started_at
        self.config_error: str | None = None
        self.records_pool = ThreadPoolExecutor(_READERS, "records")
        self.work_pool = ThreadPoolExecutor(config.proxmox.connections, "work")
        # What waits for the next lease to be over looks again.
        self.wake_expiry: Callable[[], None] = lambda: None

    @property
    def config(self) -> Config:
        return self.base.config

    def context(self, actor: str, *, dry_run: bool = False) -> Context:
        """A run of its own on the shared database and connections."""
        return self.base.derive(actor=actor, dry_run=dry_run)

    def lease_changed(self) -> None:
        self.wake_expiry()

    # ---- one request ----

    def perform(self, route: Route, call: Call) -> tuple[int, bytes, dict[str, str]]:
        """Answer one request, in a worker thread. Nothing that happens in here goes unanswered."""
        began = time.monotonic()
        try:
            answer = route.handler(call)
        except AgentlabError as error:
            answer = answers.of_error(error)
        except Exception as error:  # the outermost edge: what we did not foresee is told without a trace, and logged with it
            log.exception("%s: internal error", route.name)
            answer = answers.failed(500, f"internal error: {type(error).__name__}; the daemon's log says more. Please report this", "internal")
        if route.changes:
            self._tell(route, call, answer, time.monotonic() - began)
        return answer.status, answer.encoded(), answer.headers

    def _tell(self, route: Route, call: Call, answer: Answer, seconds: float) -> None:
        what = f"{route.name} {call.vmid}" if call.vmid is not None else route.name
        done = answer.body.get("error") or ", ".join(f"{one.vmid} {one.outcome}" for one in answer.outcomes[:20]) or "done"
        more = f" and {len(answer.outcomes) - 20} more" if len(answer.outcomes) > 20 and "error" not in answer.body else ""
        log.log(30 if answer.status >= 500 else 20, "%s by %s: %s%s (%s, %.1f s)", what, call.actor, done, more, answer.status, seconds)

    # ---- the state of things ----

    def status(self) -> dict[str, Any]:
        """What GET /v1/status answers; from the records and from memory."""
        records = self.base.records
        under_way, interrupted = records.unfinished()
        statistics = self.base.client.statistics
        return {
            "version": __version__,
            "started_at": clock_module.iso(self.started_at),
            "uptime_seconds": int(time.monotonic() - self._began),
            "database": {"path": self.config.database, "schema": schema.VERSION, "by_state": records.by_state()},
            "proxmox": {"where": self.config.proxmox.where, "reachable": statistics.reachable, "last_error": statistics.last_error,
                        "requests": sum(statistics.requests.values())},
            "operations": {"in_progress": len(under_way), "interrupted": len(interrupted)},
            "config": {"path": self.path, "loaded_at": clock_module.iso(self.loaded_at), "error": self.config_error},
        }

    def close(self) -> None:
        """Give up the threads that are idle, and the database."""
        for pool in (self.work_pool, self.records_pool):
            pool.shutdown(wait=True)
        self.base.close()


def load(path: str | None, environment: Mapping[str, str]) -> tuple[Config, str | None]:
    """The configuration, and the file it is from (None without one)."""
    config = core_config.load({"config_file": path}, environment)
    found = path or environment.get("AGENTLAB_CONFIG") or core_config.CONFIG_FILE
    return config, found if os.path.exists(found) else None
