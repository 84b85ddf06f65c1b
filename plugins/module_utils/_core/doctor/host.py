# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check this host: configuration, records, and unfinished work."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from .. import states, timeguard
from ..store import schema, workspaces
from ..store.open import read_sqlite_version
from ..store.sqlite import latest
from ..version import __version__
from ..vm import binding
from ..workspaces import workspace_disk
from . import daemon
from .daemon import read_conditions
from .examination import Examination
from .findings import FAILS, OK, PROBLEM, WARNING, Finding, shorten_list

_FREE_BYTES = 100 * 1024 * 1024
# What to do when leases and prune rest, by the reason.
_REST_ADVICE = {
    "clock_jumped": "set the clock right (timedatectl); prune and expiry go on by themselves after that",
    "restored": "look at agentlab sandbox reconcile and list, renew what is still needed, then run agentlab "
    "cleanup release (or agentlab_reconcile with release_leases=true)",
}
# A harmless value for a damaged column, as SQL. The other columns have none.
_HARMLESS = {("sandboxes", "tags"): "'[]'", ("operations", "detail"): "'{}'"}


def check_configuration(exam: Examination) -> Iterable[Finding]:
    """Check the versions, the login to Proxmox VE, and the mode of the configuration file."""
    proxmox = exam.config.proxmox
    facts = {
        "api_host": proxmox.api_host,
        "login": proxmox.login,
        "validate_certs": proxmox.validate_certs,
        "database": exam.config.database,
        "python": platform.python_version(),
        "sqlite": read_sqlite_version(),
        "collection": __version__,
        **_read_library_versions(),
    }
    yield Finding(
        "versions",
        OK,
        f"agentlab.proxmox {__version__}, Python {facts['python']}, proxmoxer {facts['proxmoxer'] or 'missing'}, "
        f"requests {facts['requests'] or 'missing'}, SQLite {facts['sqlite']}",
        None,
        facts,
    )
    healthy = True
    if proxmox.api_host and not proxmox.validate_certs:
        healthy = False
        yield Finding(
            "configuration",
            WARNING,
            f"the certificate of {proxmox.where} is not verified: a host that answers in its place gets the token",
            "set validate_certs: true, and ca_path to a copy of the node's /etc/pve/pve-root-ca.pem",
        )
    if proxmox.api_host and not proxmox.token_name:
        healthy = False
        yield Finding(
            "configuration",
            WARNING,
            f"{proxmox.user} logs in with a password, with all rights of that user",
            "create a token with fewer rights: see the pveum commands",
        )
    if healthy:
        yield Finding("configuration", OK, f"Proxmox is reached through {proxmox.where} as {proxmox.login}")
    path = exam.config.config_file
    if path and exam.config.secret_in_file:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o007:
            yield Finding(
                "configuration",
                PROBLEM,
                f"{path} holds a secret and everybody on this host may read it (mode {mode:04o})",
                f"chmod 0600 {path}; then replace the secret, it may have been read",
                {"path": path, "mode": f"{mode:04o}"},
            )


def _check_server(exam: Examination, path: str) -> Iterable[Finding]:
    """Check records on PostgreSQL: version, TLS, durability, standby, rights, and the two clocks."""
    from ..store.postgres.examine import examine

    facts = {"path": path, "schema": schema.VERSION, **examine(exam.context.database)}
    remarks = []
    if facts["standby"]:
        remarks.append(
            (
                "this server is a standby, which takes no writes",
                "name the primary in the URI, and leave out target_session_attrs (read-write is the default)",
            )
        )
    if facts["not_writable"]:
        tables = facts["not_writable"]
        remarks.append(
            (
                f"this role may not read and write all rows of {tables}",
                f"as the owner of the tables: GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO the run-time role",
            )
        )
    problems = len(remarks)
    if not facts["tls"] and not facts["local"]:
        remarks.append(("the connection is not encrypted", "add sslmode=verify-full and sslrootcert to the URI"))
    elif not facts["verified"] and not facts["local"]:
        remarks.append(("the server's certificate is not verified", "set sslmode=verify-full in the URI"))
    if facts["version"] < 150000:
        remarks.append((f"PostgreSQL {facts['server']} is older than 15", "upgrade the server"))
    if facts["synchronous_commit"] == "off" or facts["fsync"] == "off":
        remarks.append(("a commit may be lost when the server crashes", "set synchronous_commit and fsync to on"))
    if facts["standbys"] and not facts["synchronous_standbys"]:
        remarks.append(
            (
                "every standby is asynchronous: a failover may lose the last commits",
                "set synchronous_standby_names, or read docs/controllers.md, Failover",
            )
        )
    elif facts["synchronous_standbys"] and facts["synchronous_commit"] == "local":
        remarks.append(
            (
                "commits wait for no standby (synchronous_commit is local): a failover may lose the last ones",
                "set synchronous_commit to on",
            )
        )
    if facts["superuser"]:
        remarks.append(("this role is a superuser", "use the run-time role of docs/controllers.md"))
    elif facts["owner"]:
        remarks.append(("this role may drop the tables", "use the run-time role of docs/controllers.md"))
    difference = facts["clock_difference"]
    if abs(difference) > timeguard.JUMP_SECONDS:
        direction = "ahead of" if difference > 0 else "behind"
        remarks.append(
            (
                f"this host's clock is {abs(difference)} s {direction} the server's, which counts",
                "set this host's clock (timedatectl)",
            )
        )
    for number, (why, advice) in enumerate(remarks):
        yield Finding("database", PROBLEM if number < problems else WARNING, f"{path}: {why}", advice, facts)
    if not remarks:
        yield Finding("database", OK, f"{path}: PostgreSQL {facts['server']}, schema {schema.VERSION}", None, facts)
    yield from _check_damage(exam, f"psql '{path}' -c")


def _check_damage(exam: Examination, client: str) -> Iterable[Finding]:
    """Yield each damaged value of the records. ``client`` is the command that takes a statement as its argument."""
    for error in (*exam.context.records.list_damage(), *workspaces.Workspaces(exam.context.records).list_damage()):
        yield Finding(
            "records",
            PROBLEM,
            error.message.partition("; run agentlab_doctor")[0],
            _explain_repair(client, error.detail),
            dict(error.detail),
        )


def check_database(exam: Examination) -> Iterable[Finding]:
    """Check the database: free room, existence, integrity, modes, and damaged values."""
    path = exam.config.database
    if exam.store_error is not None:
        yield Finding(
            "database",
            PROBLEM,
            exam.store_error.message,
            "follow the message; nothing was changed",
            {"path": path},
        )
        return
    if exam.context.database.kind != "sqlite":
        yield from _check_server(exam, path)
        return
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    facts = {"path": path, "schema": schema.VERSION, "free_bytes": free}
    if free < _FREE_BYTES:
        yield Finding(
            "database",
            PROBLEM,
            f"only {free // 1048576} MiB are free in {folder}: without room no record is written and nothing is done",
            "free some space",
            facts,
        )
    daemon_status = daemon.read_daemon_status(exam)
    if daemon_status is not None:
        for condition in read_conditions(daemon_status):
            if condition["part"] == "records" and condition["condition"] == FAILS:
                # The daemon's writes fail, even if the file at the path is sound.
                yield Finding("database", PROBLEM, f"agentlabd: {condition['why']}", condition["todo"], facts)
                return
    if not os.path.exists(path):
        lost = _explain_lost_records(exam, daemon_status is not None)
        if lost:
            yield Finding("database", PROBLEM, *lost, facts)
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(
                "database",
                PROBLEM,
                f"{path} does not exist yet, and this user cannot create it: {folder} cannot be written",
                f"run as the owner of {folder}, or mend its owner and mode (ls -ld {folder})",
                facts,
            )
            return
        yield Finding(
            "database",
            OK,
            f"{path} does not exist yet; the first run that writes creates it with mode 0600",
            None,
            facts,
        )
        return
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    allowed = 0o660 if exam.config.database_group_access else 0o600
    facts.update(mode=f"{mode:04o}", bytes=status.st_size)
    healthy = True
    integrity = exam.context.database.check_integrity()
    if integrity != "ok":
        healthy = False
        yield Finding(
            "database",
            PROBLEM,
            f"{path} is damaged: {integrity[:300]}",
            "stop agentlabd, keep a copy of the file and restore a backup; see docs/troubleshooting.md",
            facts,
        )
    if mode & ~allowed:
        healthy = False
        yield Finding(
            "database",
            WARNING,
            f"{path} has mode {mode:04o}: more users than needed may read who runs what, or write states into it",
            f"chmod {allowed:04o} {path}",
            facts,
        )
    # A database in WAL mode needs files beside it, so the folder and these files count as much as the file.
    beside = (f"{path}-wal", f"{path}-shm", os.path.dirname(os.path.abspath(path)))
    closed = [name for name in (path, *beside) if os.path.exists(name) and not os.access(name, os.W_OK)]
    if closed:
        healthy = False
        yield Finding(
            "database",
            PROBLEM,
            f"{' and '.join(closed)} cannot be written by this user: nothing can be done to sandboxes",
            f"run as the owner of {closed[0]}, or mend its owner and mode (ls -ld {' '.join(closed)})",
            facts,
        )
    if healthy:
        yield Finding(
            "database",
            OK,
            f"{path}: SQLite's check finds nothing, schema {schema.VERSION}, mode {mode:04o}",
            None,
            facts,
        )
    if integrity == "ok":
        yield from _check_damage(exam, f"sqlite3 {path}")


def _explain_lost_records(exam: Examination, in_use: bool) -> tuple[str, str] | None:
    """Return problem and advice if the file of the records is missing and was there before, else None.

    ``in_use``: the daemon answers, and works with the records at this path.
    """
    path = exam.config.database
    back = (
        f"put the file back to {path}, or a backup of it (docs/troubleshooting.md, Backups), before anything that "
        "uses the records is started again"
    )
    companions = [name for name in (f"{path}-wal", latest.make_note_path(path)) if os.path.exists(name)]
    if in_use:
        return (
            f"{path} does not exist, but agentlabd runs with it: it was deleted or moved, and agentlabd writes "
            "nothing any more",
            f"systemctl stop agentlabd; {back}",
        )
    if companions:
        return (
            f"{path} does not exist, but was there before ({' and '.join(companions)} is still there): without it no "
            "lease ends, and its VMs have no record",
            f"{back}; where the records are meant to begin anew: rm {' '.join(companions)}",
        )
    return None


def check_work(exam: Examination) -> Iterable[Finding]:
    """Yield the kinds of unfinished work in the records, each with the command that ends it."""
    context = exam.context
    now = context.clock.now()
    live = context.records.find_all()
    may_expire = states.OPERATIONS["expire"].allowed
    overdue = [sandbox.vmid for sandbox in live if sandbox.state in may_expire and sandbox.has_expired(now)]
    waiting: list[str] = []
    doubtful: list[str] = []
    cut_off: list[str] = []
    for entry, sandbox in context.records.list_interrupted_sandboxes():
        if binding.waits_for_next_run(entry, sandbox.state):
            waiting.append(str(sandbox.vmid))
        elif binding.stays_unfinished(context, sandbox, entry):
            doubtful.append(str(sandbox.vmid))
        else:
            cut_off.append(f"{sandbox.vmid} ({entry.kind}, {entry.phase})")
    disks = workspace_disk.list_unfinished(context)
    facts = {"sandboxes": len(live), "overdue": overdue[:50], "cut_off": cut_off[:50]}
    unfinished: list[tuple[str, str]] = []
    pause = timeguard.find_pause(context)
    if pause:
        unfinished.append((pause[1], _REST_ADVICE[pause[0]]))
    if overdue:
        unfinished.append(
            (
                f"{len(overdue)} sandboxes are past their lease and still live ({shorten_list(overdue)}): no run lets"
                " leases expire",
                "run agentlab_reconcile on a schedule, or the daemon",
            )
        )
    if cut_off:
        unfinished.append(
            (
                f"{len(cut_off)} operations were cut off: {shorten_list(cut_off)}",
                "run agentlab_reconcile (agentlab sandbox reconcile --apply), which finishes them; while it says that "
                f"something may still be carried out, again after doubt_window ({context.config.doubt_window} s)",
            )
        )
    if disks:
        unfinished.append(
            (
                f"{len(disks)} operations on workspaces were cut off: "
                f"{shorten_list(f'{disk.name} ({disk.state})' for disk in disks)}",
                "run agentlab_reconcile (agentlab sandbox reconcile --apply), which finishes or undoes them; it takes "
                "no workspace off a sandbox that runs: agentlab workspace detach does, once for each that stays",
            )
        )
    if doubtful:
        unfinished.append(
            (
                f"{len(doubtful)} creations failed, and what is at their VMIDs is not certain to be theirs: "
                f"{shorten_list(doubtful)}",
                f"destroy them with force (agentlab sandbox destroy --force {' '.join(doubtful[:20])}); where that "
                "leaves a VM alone, its message says what to do by hand, and reconcile closes the rest",
            )
        )
    if waiting:
        unfinished.append(
            (
                f"{len(waiting)} creations wait for their task to be run again: {shorten_list(waiting)}",
                "run the same task again, or destroy them with force (agentlab sandbox destroy --force "
                f"{' '.join(waiting[:20])}); otherwise their leases end them",
            )
        )
    for meaning, advice in unfinished:
        yield Finding("work", WARNING, meaning, advice, facts)
    if not unfinished:
        yield Finding("work", OK, f"{len(live)} sandboxes, none past its lease, no operation cut off", None, facts)


def _read_library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in ("proxmoxer", "requests", "yaml"):
        try:
            versions[name] = str(getattr(__import__(name), "__version__", "unknown"))
        except (ImportError, SystemExit):
            # proxmoxer ends the process when requests is missing
            versions[name] = None
    return versions


def _explain_repair(client: str, detail: Mapping[str, Any]) -> str:
    """Return the commands that mend one damaged value. ``client`` as for ``_check_damage``."""
    table, column, row = (str(detail.get(name)) for name in ("table", "column", "row"))
    keys = {"sandboxes": "uuid", "operations": "sandbox_uuid", "workspaces": "id", "meta": "key"}
    # ``row`` ends with the key of the row; the row of a sandbox has it in brackets.
    key = row.removesuffix(")").rpartition(" ")[2].replace("'", "''")
    where = f"WHERE {keys.get(table, 'rowid')} = '{key}'"
    begin = "stop agentlabd and wait for plays to end; copy the records; then "
    if table == "meta":
        return f"""{begin}{client} "DELETE FROM meta {where}" (it is written anew)"""
    if (table, column) == ("operations", "sandbox_uuid"):
        return f"""{begin}{client} "DELETE FROM operations WHERE id = {key}" (its sandbox is in no record)"""
    new = _HARMLESS.get((table, column))
    if new is None:
        return (
            f'{begin}look at the row with {client} "SELECT * FROM {table} {where}", set {column} to what it was '
            "(agentlab sandbox events, a backup), or restore a backup"
        )
    return (
        begin
        + f'{client} "UPDATE {table} SET {column} = {new} {where}"'
        + ("; what the interrupted operation had noted is lost, so look at its VM" if table == "operations" else "")
    )
