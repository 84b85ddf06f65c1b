# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the API and the scheduler share: the configuration in force, the database, the connections, the threads."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from agentlab_core import clock as clock_module
from agentlab_core import config as core_config
from agentlab_core import profiles, rules, timeguard
from agentlab_core.config import Config
from agentlab_core.context import Context
from agentlab_core.errors import AgentlabError, Busy, ConfigError
from agentlab_core.maintenance import cleanup, reconcile
from agentlab_core.store import overview, schema
from agentlab_core.store.workspaces import Workspaces

from . import __version__
from .conditions import Conditions
from .metrics import Metrics

T = TypeVar("T")

# Threads for what the records alone answer. SQLite serialises them anyway; a few hide the waiting for the disk.
_READERS = 4
# Commands and files inside sandboxes at once.
GUESTS_AT_ONCE = 8
# SQLite's own pages, for each of two connections: enough for a list of a thousand, and less than the two megabytes it
# would take.
_CACHE_KIB = 512
_DAMAGE_SECONDS = 60.0
_SHORTEST_TOKEN = 16


class Service:
    """One daemon. ``config`` and what hangs on it may be replaced by a reload; the database and the sockets stay."""

    def __init__(
        self, config: Config, path: str | None, environment: Mapping[str, str], asked: str | None = None
    ) -> None:
        self.path = path
        # The file that was named at the start; None for the usual place.
        self._asked = asked
        self.environment = environment
        self.started_at = int(time.time())
        self._began = time.monotonic()
        self.stopping = threading.Event()
        self.policy = check(config)
        self.base = Context(config, actor="agentlabd", stopping=self.stopping)
        self._owner = self.base
        self.base.database.limit_cache(_CACHE_KIB)
        self.loaded_at = self.started_at
        self.config_error: str | None = None
        # The token of the TCP listener, as it was read last; None without one.
        self.token = read_token(config.listen_token_file) if config.listen else None
        self.records_pool = ThreadPoolExecutor(_READERS, "records")
        self.work_pool = ThreadPoolExecutor(config.proxmox.connections, "work")
        # What happens inside sandboxes takes as long as it takes: it must hold up nothing else.
        self.guest_pool = ThreadPoolExecutor(GUESTS_AT_ONCE, "guest")
        # The doctor is asked when the others wait.
        self.doctor_pool = ThreadPoolExecutor(1, "doctor")
        # Work that has not ended, and what it is; belongs to the event loop.
        self.under_way: dict[asyncio.Future[Any], str] = {}
        # What waits for the next lease to be over looks again.
        self.wake_expiry: Callable[[], None] = lambda: None
        # Set by the scheduler: what it does, by name.
        self.jobs: dict[str, Any] = {}
        # Set by the scheduler: whether this daemon reconciles and cleans up, or another controller of these records
        # does.
        self.leads: dict[str, bool] = {}
        # How often it took such a duty over from another controller.
        self.takeovers = {"reconcile": 0, "cleanup": 0}
        self.last_cleanup: dict[str, Any] | None = None
        # VMs with our marker and without a record, of the last reconcile: vmid, name, node.
        self.unrecorded: list[dict[str, Any]] = []
        # What the scheduled reconciles learnt of the VMs.
        self.known_vms = reconcile.KnownVms()
        self._damage: tuple[float, list[str]] = (0.0, [])
        self.conditions = Conditions(self)
        self._cleaning = threading.Lock()
        self.metrics = Metrics()

    @property
    def config(self) -> Config:
        return self.base.config

    def context(self, actor: str, *, dry_run: bool = False) -> Context:
        """A run of its own on the shared database and connections."""
        return self.base.derive(actor=actor, dry_run=dry_run)

    def lease_changed(self) -> None:
        self.wake_expiry()

    def reload(self) -> list[str]:
        """Read the files again and act by them from now on; what is under way goes on by the old ones.

        The keys that need a restart are returned.

        Raises the error of a broken file: then everything stays as it was.
        """
        try:
            config, path = load(self._asked, self.environment)
            policy = check(config)
            token = read_token(config.listen_token_file) if config.listen else None
        except AgentlabError as error:
            self.config_error = error.message
            self.metrics.reload.set(0)
            raise
        stays = {name: getattr(self.config, name) for name in core_config.FIXED}
        waiting = [name for name, value in stays.items() if getattr(config, name) != value]
        self.path, self.policy, self.token = path, policy, token
        # From the first one: a chain of all those before would grow with each reload.
        self.base = self._owner.derive(actor="agentlabd", config=dataclasses.replace(config, **stays))
        # Another cluster may be meant now.
        self.known_vms = reconcile.KnownVms()
        self.loaded_at, self.config_error = int(time.time()), None
        self.metrics.reload.set(1)
        return waiting

    def begin(self, pool: ThreadPoolExecutor, work: Callable[[], T], what: str) -> asyncio.Future[T]:
        """Run something in a thread, and remember that it is under way. To be called in the event loop."""
        done = asyncio.get_running_loop().run_in_executor(pool, work)
        self.under_way[done] = what
        done.add_done_callback(self.under_way.pop)
        return done

    def begin_no_more(self) -> None:
        """What waits for a thread is cancelled; its client is told."""
        self.stopping.set()
        for pool in (self.work_pool, self.guest_pool, self.doctor_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def damage(self) -> list[str]:
        """Return what is damaged in the records, a sentence each; looked for once a minute."""
        at, told = self._damage
        if not at or time.monotonic() - at > _DAMAGE_SECONDS:
            records = self.base.records
            told = [error.message for error in (*records.damage(), *Workspaces(records).damage())]
            self._damage = time.monotonic(), told
        return told

    # ---- cleanup ----

    def frozen(self) -> dict[str, Any] | None:
        return timeguard.frozen(self.base)

    def clean(self, actor: str, *, dry_run: bool = False) -> cleanup.CleanupResult:
        """Run the rules once. Busy while they run already; Frozen, GuardTripped as the core says."""
        policy = self.policy
        shadow = policy.mode == rules.SHADOW
        if not self._cleaning.acquire(blocking=False):
            raise Busy("the cleanup rules are being run already; wait for that to end")
        try:
            report = cleanup.run(self.context(actor, dry_run=dry_run or shadow), policy)
            if not dry_run:
                self.metrics.pruned(
                    "cleanup", report.pruned, report.kept, report.failed, report.candidates, shadow=shadow
                )
                self.last_cleanup = {
                    "result": "shadow" if shadow else "failed" if report.failed else "ok",
                    "count": len(report.pruned),
                    "kept": len(report.kept),
                    "failed": len(report.failed),
                    "forgotten": report.forgotten,
                    "guard": report.guard,
                }
            return report
        except AgentlabError as error:
            if not dry_run:
                self.metrics.prune_stopped(error, by_rules=True)
                self.last_cleanup = {"result": error.code, "message": error.message}
            raise
        finally:
            self._cleaning.release()

    # ---- the state of things ----

    def status(self) -> dict[str, Any]:
        """What GET /v1/status answers; from the records and from memory."""
        records = self.base.records
        under_way, interrupted = records.unfinished()
        conditions = [one.public() for one in self.conditions.now()]
        statistics = self.base.client.statistics
        return {
            "version": __version__,
            "started_at": clock_module.iso(self.started_at),
            "uptime_seconds": int(time.monotonic() - self._began),
            "database": {
                "path": self.config.database,
                "schema": schema.VERSION,
                "by_state": overview.by_state(records),
            },
            "proxmox": {
                "where": self.config.proxmox.where,
                "reachable": statistics.reachable,
                "last_error": statistics.last_error,
                "requests": sum(statistics.requests.values()),
            },
            **{name: job.public() for name, job in self.jobs.items() if name != "cleanup"},
            "cleanup": {
                "enabled": self.policy.enabled,
                "mode": self.policy.mode,
                **(self.jobs["cleanup"].public() if self.jobs else {}),
                "last_result": self.last_cleanup,
                "frozen": self.frozen(),
            },
            "operations": {"in_progress": len(under_way), "interrupted": len(interrupted)},
            "unrecorded": self.unrecorded,
            "conditions": conditions,
            "config": {"path": self.path, "loaded_at": clock_module.iso(self.loaded_at), "error": self.config_error},
        }

    def close(self) -> None:
        """Give up the threads that are idle, and the database."""
        for pool in (self.work_pool, self.guest_pool, self.records_pool, self.doctor_pool):
            pool.shutdown(wait=True)
        self._owner.close()


def check(config: Config) -> rules.Policy:
    """Read the files that the configuration names; ConfigError for what cannot be used.

    The cleanup rules are returned.
    """
    authority = config.proxmox.ca_path
    if authority:
        core_config.refuse_special_file("ca_path", authority)
        try:
            ssl.create_default_context(cafile=authority)
        except OSError as error:
            raise ConfigError(
                f"ca_path: {authority} cannot be used: {error.strerror or error}; give the CA certificate in PEM",
                file=authority,
            ) from None
    if config.listen:
        read_token(config.listen_token_file)
    profiles.load_all(config.profiles_dir)
    return rules.load(config.cleanup_file)


def read_token(path: str | None) -> str:
    """The bearer token of the TCP listener; the file must not be readable for others."""
    if path is None:
        raise ConfigError(
            "listen_token_file: missing, but listen is set; give a file with a token (openssl rand -hex 32)",
            option="listen_token_file",
        )
    try:
        # A FIFO would hold the whole daemon up.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip() if stat.S_ISREG(mode) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"listen_token_file: {path}: {getattr(error, 'strerror', None) or 'not a token'}",
            option="listen_token_file",
        ) from None
    if mode & 0o007:
        raise ConfigError(
            f"listen_token_file: {path} can be read by every user; chmod 0640 it, and make a new token",
            option="listen_token_file",
        )
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"listen_token_file: {path} must hold one token of at least {_SHORTEST_TOKEN} characters",
            option="listen_token_file",
        )
    return token


def load(path: str | None, environment: Mapping[str, str]) -> tuple[Config, str | None]:
    """The configuration, and the file it is from (None without one)."""
    config = core_config.load({"config_file": path}, environment)
    found = path or environment.get("AGENTLAB_CONFIG") or core_config.CONFIG_FILE
    return config, found if os.path.exists(found) else None
