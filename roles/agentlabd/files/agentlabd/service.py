# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The state that API and scheduler share: the configuration in force, the database, connections, threads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from agentlab_core import clock as clock_module
from agentlab_core import config as core_config
from agentlab_core import database_address, profiles, rules, timeguard
from agentlab_core.config import Config
from agentlab_core.context import Context
from agentlab_core.errors import AgentlabError, Busy, ConfigError
from agentlab_core.maintenance import cleanup, reconcile
from agentlab_core.store import overview, schema
from agentlab_core.store.sqlite.locker import name_locker
from agentlab_core.store.workspaces import Workspaces

from . import __version__, problems
from .conditions import WAIT_SECONDS, Conditions
from .logs import log
from .metrics import Metrics

T = TypeVar("T")

# Threads for requests answered by the records alone. SQLite serialises them, but a few hide the waiting for the disk.
_READERS = 4
# Commands and file transfers inside sandboxes at one time.
GUESTS_AT_ONCE = 8
# SQLite's page cache in KiB for each of two connections. Enough for a list of a thousand sandboxes; SQLite's default is
# 2 MiB.
_CACHE_KIB = 512
_DAMAGE_SECONDS = 60.0
# When the last whole pass of reconcile began, by the clock of the records (key of the table meta).
_LAST_PASS = "reconcile_last_pass"
_SHORTEST_TOKEN = 16
_LONGEST_TOKEN = 4096


class Service:
    """One daemon. A reload may replace ``config`` and what depends on it; database and sockets stay."""

    def __init__(
        self, config: Config, path: str | None, environment: Mapping[str, str], config_option: str | None = None
    ) -> None:
        self.path = path
        # The configuration file named at the start; None for the default path.
        self._config_option = config_option
        self.environment = environment
        self.started_at = int(time.time())
        self._began = time.monotonic()
        self.stopping = threading.Event()
        self.policy = check_files(config)
        with tell_wait(config.database):
            self.base = Context(config, actor="agentlabd", stopping=self.stopping)
        self._owner = self.base
        self.base.database.limit_cache(_CACHE_KIB)
        self.loaded_at = self.started_at
        self.config_error: str | None = None
        # The token of the TCP listener as last read; None without a listener.
        self.token = read_token(config.listen_token_file) if config.listen else None
        self.records_pool = ThreadPoolExecutor(_READERS, "records")
        self.work_pool = ThreadPoolExecutor(config.proxmox.connections, "work")
        # Work inside sandboxes may take arbitrarily long, so it has threads of its own.
        self.guest_pool = ThreadPoolExecutor(GUESTS_AT_ONCE, "guest")
        # The doctor is needed just when the other threads are stuck, so it has a thread of its own.
        self.doctor_pool = ThreadPoolExecutor(1, "doctor")
        # Unfinished work -> its name. Used only in the event loop.
        self.under_way: dict[asyncio.Future[Any], str] = {}
        # Called after a change of a lease: wakes the loop that sleeps until the next expiry. Set by the scheduler.
        self.wake_expiry: Callable[[], None] = lambda: None
        # Job name -> Job. Set by the scheduler.
        self.jobs: dict[str, Any] = {}
        # Whether this daemon (and not another controller of these records) reconciles and cleans up. Set by the
        # scheduler.
        self.leads: dict[str, bool] = {}
        # How often this daemon took the job over from another controller.
        self.takeovers = {"reconcile": 0, "cleanup": 0}
        self.last_cleanup: dict[str, Any] | None = None
        # VMs with our marker but no record, from the last reconcile: vmid, name, node.
        self.unrecorded: list[dict[str, Any]] = []
        # Results of the scheduled reconciles that later ones reuse.
        self.known_vms = reconcile.KnownVms()
        self.problems = problems.Problems()
        self._damage: tuple[float, list[str]] = (0.0, [])
        self.conditions = Conditions(self)
        self._cleaning = threading.Lock()
        self.metrics = Metrics()

    @property
    def config(self) -> Config:
        return self.base.config

    def make_context(self, actor: str, *, dry_run: bool = False) -> Context:
        """Return a context for one run, on the shared database and connections."""
        return self.base.derive(actor=actor, dry_run=dry_run)

    def note_lease_change(self) -> None:
        """Wake the loop that sleeps until the next expiry."""
        self.wake_expiry()

    def reload(self) -> list[str]:
        """Read the files again and use them from now on. Work under way keeps the old values.

        Returns the changed keys that need a restart. Raises the error of a broken file, and then keeps everything as it
        was.
        """
        try:
            config, path = load_config(self._config_option, self.environment)
            policy = check_files(config)
            token = read_token(config.listen_token_file) if config.listen else None
        except AgentlabError as error:
            self.config_error = error.message
            self.metrics.reload.set(0)
            raise
        stays = {name: getattr(self.config, name) for name in core_config.FIXED}
        needing_restart = [name for name, value in stays.items() if getattr(config, name) != value]
        self.path, self.policy, self.token = path, policy, token
        # Derive from the first context: a chain of contexts would grow with each reload.
        self.base = self._owner.derive(actor="agentlabd", config=dataclasses.replace(config, **stays))
        # The configuration may now name another cluster.
        self.known_vms = reconcile.KnownVms()
        self.loaded_at, self.config_error = int(time.time()), None
        self.metrics.reload.set(1)
        return needing_restart

    def begin_work(self, pool: ThreadPoolExecutor, work: Callable[[], T], name: str) -> asyncio.Future[T]:
        """Run work in a thread, and remember its name until it ends. Call this in the event loop."""
        future = asyncio.get_running_loop().run_in_executor(pool, work)
        self.under_way[future] = name
        future.add_done_callback(self.under_way.pop)
        return future

    def refuse_new_work(self) -> None:
        """Cancel work that waits for a thread, and accept no more. The clients get an answer that says so."""
        self.stopping.set()
        for pool in (self.work_pool, self.guest_pool, self.doctor_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def find_damage(self) -> list[str]:
        """Return a sentence for each damage in the records. Reads the records at most once a minute."""
        at, messages = self._damage
        if not at or time.monotonic() - at > _DAMAGE_SECONDS:
            records = self.base.records
            messages = [error.message for error in (*records.list_damage(), *Workspaces(records).list_damage())]
            self._damage = time.monotonic(), messages
        return messages

    # ---- cleanup ----

    def read_freeze(self) -> dict[str, Any] | None:
        """Return who froze the cleanup, when and why; None while it is not frozen."""
        return timeguard.read_freeze(self.base)

    def note_reconciled(self, drifts: list[reconcile.Drift], began: float) -> None:
        """Count the drift of a pass that has repaired what it could, and remember what it could not.

        ``began``: when the pass began, by the clock of the records.
        """
        self.metrics.count_reconcile(drifts)
        self.problems.replace("reconcile", problems.extract_from_drift(drifts))
        # The pass has stopped VMs that expiry could not stop, or has shown why it cannot either.
        stopped = {
            drift.sandbox.uuid for drift in drifts if drift.kind == "still_running" and drift.applied and drift.sandbox
        }
        self.problems.forget_met_before("expiry", lambda: began, stopped)
        self.unrecorded = [
            {"vmid": drift.vmid, "name": drift.evidence.get("name"), "node": drift.evidence.get("node")}
            for drift in drifts
            if drift.kind == "unrecorded"
        ]
        with contextlib.suppress(AgentlabError):
            # Every other daemon on these records drops the problems of its expiry that this pass has settled.
            self.base.records.set_meta(_LAST_PASS, str(began))

    def read_last_pass(self) -> float | None:
        """Return when the last whole pass of reconcile of any daemon on these records began; None if not known."""
        try:
            return float(self.base.records.read_meta(_LAST_PASS) or "")
        except (AgentlabError, ValueError):
            return None

    def clean_up(self, actor: str, *, dry_run: bool = False) -> cleanup.CleanupResult:
        """Run the rules once. Raises Busy while they are running, and Frozen and GuardTripped as the core does."""
        policy = self.policy
        shadow = policy.mode == rules.SHADOW
        if not self._cleaning.acquire(blocking=False):
            raise Busy("the cleanup rules are being run already; wait for that to end")
        try:
            report = cleanup.run(self.make_context(actor, dry_run=dry_run or shadow), policy)
            if not dry_run:
                self.problems.replace("cleanup", problems.extract_from_outcomes((*report.failed, *report.kept)))
                self.metrics.count_prune(
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
        except Busy:
            # Another controller runs the rules.
            raise
        except AgentlabError as error:
            if not dry_run:
                self.metrics.count_stopped_prune(error, by_rules=True)
                self.last_cleanup = {"result": error.code, "message": error.message}
            raise
        finally:
            self._cleaning.release()

    # ---- status ----

    def compose_status(self) -> dict[str, Any]:
        """Return the answer to GET /v1/status, from the records and from memory."""
        records = self.base.records
        under_way, interrupted = records.list_unfinished()
        conditions = [condition.public() for condition in self.conditions.list_present()]
        statistics = self.base.client.statistics
        return {
            "version": __version__,
            "started_at": clock_module.format_utc(self.started_at),
            "uptime_seconds": int(time.monotonic() - self._began),
            "database": {
                "path": self.config.database,
                "schema": schema.VERSION,
                "by_state": overview.count_by_state(records),
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
                "frozen": self.read_freeze(),
            },
            "operations": {"in_progress": len(under_way), "interrupted": len(interrupted)},
            "unrecorded": self.unrecorded,
            "conditions": conditions,
            "config": {
                "path": self.path,
                "loaded_at": clock_module.format_utc(self.loaded_at),
                "error": self.config_error,
            },
        }

    def close(self) -> None:
        """Close idle threads and the database."""
        for pool in (self.work_pool, self.guest_pool, self.records_pool, self.doctor_pool):
            pool.shutdown(wait=True)
        self._owner.close()


@contextlib.contextmanager
def tell_wait(database: str) -> Iterator[None]:
    """Log one line when the block, which opens these records, takes longer than some seconds."""

    def log_wait() -> None:
        address = database_address.parse(database)
        why = (
            "their server has not answered yet, or another session keeps the tables locked (pg_stat_activity)"
            if address.engine == database_address.POSTGRESQL
            else f"another process has locked them ({name_locker(database)})"
        )
        log.warning("the start waits for the records (%s): %s", address.text, why)

    timer = threading.Timer(WAIT_SECONDS, log_wait)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_files(config: Config) -> rules.Policy:
    """Read the files that the configuration names, and return the cleanup rules. Raises ConfigError for a bad file."""
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
    """Return the bearer token of the TCP listener. Raises ConfigError if other users may read the file."""
    if path is None:
        raise ConfigError(
            "listen_token_file: missing, but listen is set; give a file with a token (openssl rand -hex 32)",
            option="listen_token_file",
        )
    try:
        # O_NONBLOCK, because opening a FIFO would block the daemon.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            # With room for a line end, and one character more than is valid: a longer token is refused, not cut.
            token = file.read(_LONGEST_TOKEN + 3).strip() if stat.S_ISREG(mode) else ""
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
    if not _SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"listen_token_file: {path} must hold one token of at least {_SHORTEST_TOKEN} characters, "
            f"and at most {_LONGEST_TOKEN}",
            option="listen_token_file",
        )
    return token


def load_config(path: str | None, environment: Mapping[str, str]) -> tuple[Config, str | None]:
    """Return the configuration, and the path of its file (None without a file). Raises ConfigError."""
    config = core_config.load({"config_file": path}, environment)
    config_file = path or environment.get("AGENTLAB_CONFIG") or core_config.CONFIG_FILE
    return config, config_file if os.path.exists(config_file) else None
