# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at everything that a sandbox depends on, and say what to do about it.

Only reads are made: of the configuration, the records, Proxmox VE and the daemon.

Nothing that is broken ends the examination: what cannot be read becomes a finding with the status ``unknown``.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import socket
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import clock, profiles, states, timeguard
from ..config import DEFAULTS, SECRETS, Config
from ..context import Context
from ..durations import show
from ..errors import AccessDenied, AgentlabError, ApiError, InvalidInput, Kept, ProxmoxError, StoreError
from ..guest import cloud_init
from ..proxmox import identity
from ..proxmox.identity import OUR_TAG
from ..sandboxes import template as templates
from ..sandboxes import vm_config
from ..store import history, latest, schema, workspaces
from ..version import __version__
from ..views import info
from ..vm import address, binding
from . import privileges
from .privileges import needs, pveum_commands

__all__ = [
    "Diagnosis",
    "Doctor",
    "Finding",
    "Scope",
    "ask",
    "bundle",
    "needs",
    "pveum_commands",
    "shown",
    "write_bundle",
]

OK, WARNING, PROBLEM, UNKNOWN = "ok", "warning", "problem", "unknown"
# A condition of the daemon's status: that part does not do its work.
FAILS = "fails"
# Worst first: what the examination as a whole comes to.
STATUSES = (PROBLEM, UNKNOWN, WARNING, OK)

# Clocks this far apart make leases and ages wrong by as much; past the second value decisions are.
_CLOCK_SECONDS = (5, 60)
_FREE_BYTES = 100 * 1024 * 1024
_FULL = 0.9
# So many configurations of unknown VMs are read to see whether they carry our marker.
_LOOK_AT = 20
_DAEMON_SECONDS = 5.0
# Storage types that cannot make linked clones at all; directories can with qcow2 only.
_NO_LINKED_CLONES = ("lvm", "iscsi", "iscsidirect")
_DIRECTORIES = ("dir", "nfs", "cifs", "cephfs", "glusterfs")


@dataclass(slots=True)
class Finding:
    """One thing that was looked at.

    ``check`` is a stable word, ``meaning`` says what is the case and what follows from that, ``advice`` what to do.
    """

    check: str
    status: str
    meaning: str
    advice: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "status": self.status,
            "meaning": self.meaning,
            "advice": self.advice,
            "facts": self.facts,
        }


@dataclass(slots=True)
class Scope:
    """What to look at besides what the configuration names."""

    template: str | None = None


@dataclass(slots=True)
class Diagnosis:
    """All findings, in the order of the checks, and the commands for a token with the least privileges."""

    findings: list[Finding]
    pveum: list[str]

    @property
    def status(self) -> str:
        found = {one.status for one in self.findings}
        return next(status for status in STATUSES if status in found or status == OK)

    def worse_than(self, limit: str) -> list[Finding]:
        """The findings that are a ``problem``, or with ``warning`` those, too; none with ``never``."""
        wanted = {"problem": (PROBLEM,), "warning": (PROBLEM, UNKNOWN, WARNING)}.get(limit, ())
        return sorted(
            (one for one in self.findings if one.status in wanted), key=lambda one: STATUSES.index(one.status)
        )

    def public(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "problems": sum(one.status == PROBLEM for one in self.findings),
            "findings": [one.public() for one in self.findings],
            "pveum": self.pveum,
        }


class Doctor:
    """One examination of one host's configuration. Writes nothing: the records are read from a copy in memory."""

    def __init__(self, config: Config, *, now: clock.Clock | None = None) -> None:
        self.config = config
        self.store_error: StoreError | None = None
        try:
            self.context = Context(config, actor="doctor", dry_run=True, clock=now)
        except StoreError as error:
            # Proxmox is looked at all the same, with records that are empty.
            self.store_error = error
            self.context = Context(replace(config, database=":memory:"), actor="doctor", dry_run=True, clock=now)
        # What the daemon's status says, once it was asked
        self._status: dict[str, Any] | None = None
        self._release = ""
        self._nodes: dict[str, bool] = {}
        self._local: str | None = None
        self._template: tuple[int, str, dict[str, Any]] | None = None
        self._storage: str | None = config.storage
        self._standing = privileges.Standing()
        # The commands for root; None: not decided yet
        self._pveum: list[str] | None = None

    def close(self) -> None:
        self.context.close()

    def examine(self, wanted: Scope | None = None) -> Diagnosis:
        """Every check, in an order in which each can stand on those before it."""
        asked = wanted or Scope()
        findings = [
            *self._run_check("configuration", self._configuration),
            *self._run_check("database", self._database),
            *self._run_check("work", self._work),
        ]
        reached = self._run_check("proxmox", self._proxmox)
        findings += reached
        checks: dict[str, Callable[[], Iterable[Finding]]] = {
            "cluster": self._cluster,
            "quorum": self._quorum,
            "template": lambda: self._template_fitness(asked.template),
            "storage": self._storage_space,
            "creation": self._creation,
            "privileges": self._privileges,
            "vmid_range": self._vmid_range,
            "clock": self._clock,
        }
        for name, check in checks.items():
            if reached[0].status != OK:
                findings.append(
                    Finding(
                        name, UNKNOWN, "not looked at, because Proxmox could not be asked", "see the finding proxmox"
                    )
                )
            else:
                findings += self._run_check(name, check)
        findings += self._run_check("daemon", self._daemon)
        return Diagnosis(findings, self._new_token() if self._pveum is None else self._pveum)

    def _run_check(self, name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
        findings: list[Finding] = []
        try:
            # One by one: what was said before an error stays said.
            findings.extend(check())
        except (AgentlabError, OSError) as error:
            why = error.message if isinstance(error, AgentlabError) else f"{error.filename}: {error.strerror}"
            advice = "see the message; run again when that is mended"
            findings.append(Finding(name, UNKNOWN, f"could not be looked at: {why}", advice))
        return findings

    # ---- this host ----

    def _configuration(self) -> Iterable[Finding]:
        found = self.config.proxmox
        facts = {
            "api_host": found.api_host,
            "login": found.login,
            "validate_certs": found.validate_certs,
            "database": self.config.database,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "collection": __version__,
            **_libraries(),
        }
        yield Finding(
            "versions",
            OK,
            f"agentlab.proxmox {__version__}, Python {facts['python']}, proxmoxer {facts['proxmoxer'] or 'missing'}, "
            f"requests {facts['requests'] or 'missing'}, SQLite {facts['sqlite']}",
            None,
            facts,
        )
        if found.api_host and not found.validate_certs:
            yield Finding(
                "configuration",
                WARNING,
                f"the certificate of {found.where} is not verified: whoever can answer in its place gets the token",
                "set validate_certs: true, and ca_path to a copy of the node's /etc/pve/pve-root-ca.pem",
            )
        elif found.api_host and not found.token_name:
            yield Finding(
                "configuration",
                WARNING,
                f"{found.user} logs in with a password, with all rights of that user",
                "create a token with fewer rights: see the pveum commands",
            )
        else:
            yield Finding("configuration", OK, f"Proxmox is reached through {found.where} as {found.login}")
        path = self.config.config_file
        if path and self.config.secret_in_file:
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if mode & 0o007:
                yield Finding(
                    "configuration",
                    PROBLEM,
                    f"{path} holds a secret and everybody on this host may read it (mode {mode:04o})",
                    f"chmod 0600 {path}; then replace the secret, it may have been read",
                    {"path": path, "mode": f"{mode:04o}"},
                )

    def _database(self) -> Iterable[Finding]:
        path = self.config.database
        if self.store_error is not None:
            yield Finding(
                "database",
                PROBLEM,
                self.store_error.message,
                "nothing was changed; the message says what helps",
                {"path": path},
            )
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
                f"only {free // 1048576} MiB are free in {folder}: without room no record is written and nothing is"
                " done",
                "free some space",
                facts,
            )
        daemon = self._daemon_of_these_records()
        if daemon is not None:
            for condition in _conditions(daemon):
                if condition["part"] == "records" and condition["condition"] == FAILS:
                    # Every write of the daemon is refused, whatever the file at the path looks like.
                    yield Finding("database", PROBLEM, f"agentlabd: {condition['why']}", condition["todo"], facts)
                    return
        if not os.path.exists(path):
            lost = self._lost_records(daemon is not None)
            if lost:
                yield Finding("database", PROBLEM, *lost, facts)
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
        allowed = 0o660 if self.config.database_group_access else 0o600
        facts.update(mode=f"{mode:04o}", bytes=status.st_size)
        integrity = self.context.database.integrity()
        if integrity != "ok":
            yield Finding(
                "database",
                PROBLEM,
                f"{path} is damaged: {integrity[:300]}",
                "stop agentlabd, keep a copy of the file and restore a backup; see docs/troubleshooting.md",
                facts,
            )
            return
        healthy = True
        if mode & ~allowed:
            healthy = False
            yield Finding(
                "database",
                WARNING,
                f"{path} has mode {mode:04o}: more users than needed may read who runs what, or write states into it",
                f"chmod {allowed:04o} {path}",
                facts,
            )
        # A database in WAL mode needs files beside it, so the folder counts as much as the file.
        closed = [name for name in (path, os.path.dirname(os.path.abspath(path))) if not os.access(name, os.W_OK)]
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
        for error in (*self.context.records.damage(), *workspaces.Workspaces(self.context.records).damage()):
            yield Finding(
                "records",
                PROBLEM,
                error.message.partition("; run agentlab_doctor")[0],
                _mend(path, error.detail),
                dict(error.detail),
            )

    def _lost_records(self, in_use: bool) -> tuple[str, str] | None:
        """Return what is wrong and what to do when the file of the records is missing but was there before, else None.

        ``in_use``: a daemon that answers works with the records at this path.
        """
        path = self.config.database
        back = (
            f"put the file back to {path}, or a backup of it (docs/troubleshooting.md, Backups), before anything that "
            "uses the records is started again"
        )
        remains = [name for name in (f"{path}-wal", latest.path_of(path)) if os.path.exists(name)]
        if in_use:
            return (
                f"{path} does not exist, but agentlabd runs with it: it was deleted or moved, and agentlabd writes "
                "nothing any more",
                f"systemctl stop agentlabd; {back}",
            )
        if remains:
            return (
                f"{path} does not exist, but was there before ({' and '.join(remains)} is still there): without it no "
                "lease ends, and VMs that it knows are nobody's",
                f"{back}; where the records are meant to begin anew: rm {' '.join(remains)}",
            )
        return None

    def _daemon_of_these_records(self) -> dict[str, Any] | None:
        """Return the status of the daemon that works with the configured records; None without an answer."""
        try:
            status = self._ask_daemon()
        except (OSError, ValueError, http.client.HTTPException):
            return None
        path = _as_dict(_as_dict(status).get("database")).get("path")
        same = isinstance(path, str) and os.path.abspath(path) == os.path.abspath(self.config.database)
        return status if same else None

    def _ask_daemon(self) -> dict[str, Any]:
        """Return what the daemon's status says; it is asked once in an examination. Raises what ``ask`` raises."""
        if self._status is None:
            if not os.path.exists(self.config.socket):
                raise FileNotFoundError(self.config.socket)
            self._status = ask(self.config.socket, "/v1/status")
        return self._status

    def _work(self) -> Iterable[Finding]:
        """What the records say of work left over."""
        now = self.context.clock.now()
        live = self.context.records.find_all()
        overdue = [one.vmid for one in live if one.state in states.OPERATIONS["expire"].allowed and one.expired(now)]
        vmids = {one.uuid: one.vmid for one in live}
        state_of = {one.uuid: one.state for one in live}
        interrupted = self.context.records.interrupted()
        waiting = [
            str(vmids.get(one.sandbox_uuid))
            for one in interrupted
            if binding.waits_for_next_run(one, state_of.get(one.sandbox_uuid, ""))
        ]
        cut_off = [
            f"{vmids.get(one.sandbox_uuid)} ({one.kind}, {one.phase})"
            for one in interrupted
            if not binding.waits_for_next_run(one, state_of.get(one.sandbox_uuid, ""))
        ]
        facts = {"sandboxes": len(live), "overdue": overdue[:50], "cut_off": cut_off[:50]}
        rest = timeguard.suspended(self.context)
        if rest:
            yield Finding(
                "work",
                WARNING,
                rest,
                "set the clock right (timedatectl); prune and expiry go on by themselves after that",
                facts,
            )
        elif overdue:
            yield Finding(
                "work",
                WARNING,
                f"{len(overdue)} sandboxes are past their lease and still live ({_some(overdue)}): nobody lets leases"
                " expire",
                "run agentlab_reconcile on a schedule, or the daemon",
                facts,
            )
        elif cut_off:
            yield Finding(
                "work",
                WARNING,
                f"{len(cut_off)} operations were cut off: {_some(cut_off)}",
                "run agentlab_reconcile, which finishes them; what it does not finish, destroy with force",
                facts,
            )
        elif waiting:
            yield Finding(
                "work",
                WARNING,
                f"{len(waiting)} creations wait for their task to be run again: {_some(waiting)}",
                "run the same task again, or destroy them with force; otherwise their leases end them",
                facts,
            )
        else:
            yield Finding("work", OK, f"{len(live)} sandboxes, none past its lease, no operation cut off", None, facts)

    # ---- Proxmox ----

    def _proxmox(self) -> Iterable[Finding]:
        try:
            found = self.context.client.get_dict("version")
        except (ProxmoxError, InvalidInput) as error:
            return [
                Finding(
                    "proxmox",
                    PROBLEM,
                    error.message,
                    "the message says what to look at; nothing else about Proxmox could be looked at",
                )
            ]
        self._release = str(found.get("version") or "")
        facts = {"version": self._release}
        major = self._release.partition(".")[0]
        if not major.isdecimal() or int(major) < 8:
            return [
                Finding("proxmox", OK, f"Proxmox VE {self._release} answers", None, facts),
                Finding(
                    "versions",
                    WARNING,
                    f"Proxmox VE {self._release} is older than what this is tested with",
                    "upgrade to Proxmox VE 8 or 9",
                    facts,
                ),
            ]
        return [Finding("proxmox", OK, f"Proxmox VE {self._release} answers", None, facts)]

    def _cluster(self) -> Iterable[Finding]:
        known = self.context.records.meta("cluster")
        if known is None:
            yield Finding("cluster", OK, "these records do not know a cluster yet; the first creation notes it")
            return
        try:
            self.context.cluster.confirm()
            yield Finding("cluster", OK, "this is the cluster these records belong to")
        except Kept as error:
            yield Finding(
                "cluster", PROBLEM, error.message, "until then nothing of these records is destroyed or closed"
            )

    def _quorum(self) -> Iterable[Finding]:
        self._nodes = self.context.cluster.nodes()
        offline = sorted(node for node, online in self._nodes.items() if not online)
        facts = {"nodes": self._nodes}
        try:
            self.context.cluster.require_quorum()
        except Kept as error:
            yield Finding(
                "quorum",
                PROBLEM,
                error.message,
                "bring nodes back, or look at the cluster network: pvecm status",
                facts,
            )
            return
        if offline:
            yield Finding(
                "quorum",
                WARNING,
                f"the cluster has quorum, but these nodes are offline: {', '.join(offline)}. Sandboxes there are left"
                " as they are",
                "bring them back",
                facts,
            )
        else:
            yield Finding(
                "quorum", OK, f"quorum, and all nodes are online: {', '.join(sorted(self._nodes))}", None, facts
            )

    def _template_fitness(self, wanted: str | None) -> Iterable[Finding]:
        asked = wanted or self.config.template
        if not asked:
            yield Finding(
                "template",
                UNKNOWN,
                "no template is configured, so none was looked at",
                "set template in the configuration, or give the option template",
            )
            return
        try:
            found_template = templates.find(self.context, asked, self.config.node)
            vmid, node = found_template.vmid, found_template.node
            config = found_template.config
            if config is None:
                config = self.context.client.get_dict(f"nodes/{node}/qemu/{vmid}/config")
        except (InvalidInput, AccessDenied) as error:
            yield Finding(
                "template",
                PROBLEM,
                error.message,
                "without a template that these credentials see, no sandbox is created",
            )
            return
        self._template = (vmid, node, config)
        name = f"template {vmid} ({config.get('name')})"
        facts = {"vmid": vmid, "node": node}
        found = list(self._unfit(vmid, node, config, name, facts))
        yield from found or [
            Finding("template", OK, f"{name} is fit: guest agent, cloud-init drive, linked clones", None, facts)
        ]

    def _unfit(
        self, vmid: int, node: str, config: Mapping[str, Any], name: str, facts: dict[str, Any]
    ) -> Iterable[Finding]:
        if not address.agent_is_on(dict(config)):
            yield Finding(
                "template",
                WARNING,
                f"{name} has the guest agent switched off: no address is known, and shutting down takes until the"
                " time-out",
                f"install qemu-guest-agent in it, and: qm set {vmid} --agent 1",
                facts,
            )
        drives = {key: str(value) for key, value in config.items() if re.fullmatch(r"(ide|sata|scsi|virtio)\d+", key)}
        if not vm_config.has_cloud_init_drive(dict(config)):
            yield Finding(
                "template",
                WARNING,
                f"{name} has no cloud-init drive: ip_config, nameserver and ssh_public_keys have no effect",
                f"qm set {vmid} --ide2 {self.config.storage or _storage_of(drives.values()) or 'local-lvm'}:cloudinit",
                facts,
            )
        if str(config.get("onboot", "0")) == "1":
            yield Finding(
                "template",
                WARNING,
                f"{name} has onboot, which every clone copies: stopped sandboxes start with the node, past their lease",
                f"qm set {vmid} --onboot 0",
                facts,
            )
        yield from self._missing_snippets(vmid, node, str(config.get("cicustom") or ""), name, facts)
        disks = [value for value in drives.values() if "media=cdrom" not in value and "cloudinit" not in value]
        if not disks:
            yield Finding("template", PROBLEM, f"{name} has no disk", "give it one, or choose another template", facts)
            return
        kinds = {str(row.get("storage")): str(row.get("type")) for row in self._storages(node)}
        for disk in disks:
            storage = disk.partition(":")[0]
            self._storage = self._storage or storage
            kind = kinds.get(storage)
            facts.setdefault("storages", {})[storage] = kind
            if kind is None:
                yield Finding(
                    "template",
                    UNKNOWN,
                    f"{name}: storage {storage} of its disk cannot be seen, so whether it makes linked clones is not"
                    " known",
                    f"grant Datastore.AllocateSpace on /storage/{storage}",
                    facts,
                )
            elif kind in _NO_LINKED_CLONES or (kind in _DIRECTORIES and ".raw" in disk):
                yield Finding(
                    "template",
                    WARNING,
                    f"{name}: storage {storage} ({kind}) makes no linked clones of its disk: creating copies the whole"
                    " disk",
                    "set full_clone: true, or move the template to lvmthin, zfspool, rbd or a directory with qcow2",
                    facts,
                )

    def _missing_snippets(
        self, vmid: int, node: str, cicustom: str, name: str, facts: dict[str, Any]
    ) -> Iterable[Finding]:
        """Find files that the template's cicustom names and that are not there.

        Proxmox VE clones such a template, and refuses every start of the clone.
        """
        volumes = [value for value in (part.partition("=")[2] for part in cicustom.split(",")) if ":" in value]
        kinds = (
            {str(row.get("storage")): str(row.get("content") or "").split(",") for row in self._storages(node)}
            if volumes
            else {}
        )
        for volume in volumes:
            storage = volume.partition(":")[0]
            mend = f"put the file there on node {node}, or take it out of the template: qm set {vmid} --delete cicustom"
            if storage in kinds and "snippets" not in kinds[storage]:
                yield Finding(
                    "template",
                    PROBLEM,
                    f"{name} names the snippet {volume} (cicustom), but storage {storage} holds no snippets: no sandbox"
                    " starts",
                    f"pvesm set {storage} --content {','.join([*kinds[storage], 'snippets'])}; or {mend}",
                    facts,
                )
                continue
            path = f"/storage/{storage}"
            rows = (
                self.context.client.get_list(f"nodes/{node}/storage/{storage}/content", content="snippets")
                if storage in kinds
                else []
            )
            if any(row.get("volid") == volume for row in rows):
                continue
            if storage in kinds and self.context.cluster.holds(path, "Datastore.Allocate"):
                yield Finding(
                    "template",
                    PROBLEM,
                    f"{name} names the snippet {volume} (cicustom), which is not there: no sandbox starts",
                    mend,
                    facts,
                )
            else:
                yield Finding(
                    "template",
                    UNKNOWN,
                    f"{name} names the snippet {volume} (cicustom), and these credentials may not see whether it is"
                    " there",
                    f"look for it on node {node} (pvesm path {volume}), or grant {', '.join(privileges.KEEP)} on"
                    f" {path}",
                    facts,
                )

    def _storages(self, node: str) -> list[dict[str, Any]]:
        return self.context.client.get_list(f"nodes/{node}/storage")

    def _storage_space(self) -> Iterable[Finding]:
        node = self._home()
        wanted = self._storage
        if node is None:
            yield Finding(
                "storage", UNKNOWN, "not looked at: no node is known to ask", "see the findings quorum and template"
            )
            return
        rows = {str(row.get("storage")): row for row in self._storages(node)}
        if wanted is None:
            yield Finding(
                "storage",
                UNKNOWN,
                "which storage sandboxes go to is not known (no template, no storage configured)",
                "see the finding template",
            )
            return
        row = rows.get(wanted)
        if row is None:
            yield Finding(
                "storage",
                PROBLEM,
                f"storage {wanted} cannot be seen on node {node}: it is not there, or Datastore.AllocateSpace is"
                " missing",
                f"grant Datastore.AllocateSpace on /storage/{wanted}, or correct storage",
            )
            return
        total, used = int(row.get("total") or 0), int(row.get("used") or 0)
        facts = {"storage": wanted, "total": total, "used": used, "active": row.get("active")}
        if str(row.get("active")) != "1" or str(row.get("enabled", 1)) != "1":
            yield Finding(
                "storage",
                PROBLEM,
                f"storage {wanted} is not active on node {node}: nothing can be created there",
                f"pvesm status --storage {wanted}",
                facts,
            )
        elif row.get("content") is not None and "images" not in str(row["content"]).split(","):
            yield Finding(
                "storage",
                PROBLEM,
                f"storage {wanted} holds no disk images (content {row['content']}): nothing can be created there",
                f"pvesm set {wanted} --content {row['content']},images, or set storage to another one",
                facts,
            )
        elif total and used / total > _FULL:
            yield Finding(
                "storage",
                WARNING,
                f"storage {wanted} is {used * 100 // total} % full: thin volumes that outgrow it stop every VM on it",
                "prune sandboxes, or enlarge it",
                facts,
            )
        else:
            yield Finding(
                "storage",
                OK,
                f"storage {wanted} is active" + (f", {used * 100 // total} % used" if total else ""),
                None,
                facts,
            )

    def _home(self) -> str | None:
        """Return the node that sandboxes are cloned on: the template's, or else one that is online."""
        return (
            self._template[1]
            if self._template
            else next((name for name, online in sorted(self._nodes.items()) if online), None)
        )

    # ---- what makes every creation fail ----

    def _creation(self) -> Iterable[Finding]:
        """Look at what makes every creation fail: a wrong node, pool or storage for snippets; and at refused tags."""
        count = 0
        for check in (self._wrong_nodes, self._wrong_pools, self._wrong_snippets, self._refused_tags):
            for finding in check():
                count += 1
                yield finding
        if not count:
            yield Finding("creation", OK, "node, pool, tags and snippets can be used as configured")

    def _named(self, option: str) -> dict[str, str]:
        """Return the values that configuration and profiles give an option, each with the place where it is given."""
        named = {
            str(profile.values[option]): f"{option} of profile {profile.name}"
            for profile in self._profiles()
            if profile.values.get(option)
        }
        if getattr(self.config, option) is not None:
            named[getattr(self.config, option)] = option
        return named

    def _wrong_nodes(self) -> Iterable[Finding]:
        for node, place in self._named("node").items() if self._nodes else ():
            if node not in self._nodes:
                yield Finding(
                    "creation",
                    PROBLEM,
                    f"{place}: {node!r} is not a node of this cluster, so no sandbox can be created with it."
                    f" Nodes: {', '.join(sorted(self._nodes))}",
                    f"correct {place}, or leave it out (names of nodes are case-sensitive)",
                )
            elif not self._nodes[node]:
                yield Finding(
                    "creation",
                    PROBLEM,
                    f"{place}: {node!r} is offline, so no sandbox can be created there",
                    "bring the node back, or name another one",
                )

    def _wrong_pools(self) -> Iterable[Finding]:
        for pool, place in self._named("pool").items():
            exists = self._pool_exists(pool)
            if pool == self.config.pool:
                self._standing.pool = exists
            if exists is False:
                yield Finding(
                    "creation",
                    PROBLEM,
                    f"{place}: {pool!r} does not exist, so no sandbox can be created with it",
                    f"pveum pool add {pool}, or correct {place}",
                )

    def _pool_exists(self, pool: str) -> bool | None:
        """Return whether the pool exists, or None: without Pool.Audit on its path nobody can tell."""
        if any(row.get("poolid") == pool for row in self.context.client.get_list("pools")):
            return True
        # An ACL entry on the path proves nothing: Proxmox VE takes one for a pool that is not there.
        return False if self.context.cluster.holds(f"/pool/{pool}", "Pool.Audit") else None

    def _entries(self) -> list[dict[str, Any]]:
        """Return the ACL entries that these credentials may see; all of them with Sys.Audit on /access."""
        if self._standing.entries is None:
            try:
                entries = self.context.client.get_list("access/acl")
            except ApiError:
                return []
            if self.config.proxmox.is_root or entries:
                self._standing.entries = entries
            return entries
        return self._standing.entries

    def _wrong_snippets(self) -> Iterable[Finding]:
        """Look at the storage for user data, which Proxmox VE does not prepare for snippets by itself."""
        node = self.config.node if self._nodes.get(str(self.config.node)) else self._home()
        if node is None:
            return
        storage = self.config.snippets_storage
        try:
            cloud_init.check_storage(self.context, node)
        except InvalidInput as error:
            # The default is a problem only where user data is used.
            needed = storage != DEFAULTS["snippets_storage"] or self._user_data_is_used()
            yield Finding(
                "creation",
                PROBLEM if needed else OK,
                f"{error.message}. Until then cloud_init_user_data is refused",
                f"see the message; pvesm status --storage {storage} shows what the node has",
                {"snippets_storage": storage},
            )

    def _user_data_is_used(self) -> bool:
        return any(profile.values.get("cloud_init_user_data") for profile in self._profiles()) or any(
            sandbox.snippet for sandbox in self.context.records.find_all()
        )

    def _profiles(self) -> list[profiles.Profile]:
        try:
            return list(profiles.load_all(self.config.profiles_dir).values())
        except (AgentlabError, OSError):
            # A broken file is reported where the profile is used, and by the daemon.
            return []

    def _refused_tags(self) -> Iterable[Finding]:
        """Compare our tags with the cluster's policy: GET /cluster/options lists the tags allowed to who asks."""
        options = self._options()
        if self.config.proxmox.is_root or "allowed-tags" not in options:
            return
        allowed = _as_list(options["allowed-tags"])
        registered = _as_list(options.get("registered-tags"))
        # Without Sys.Audit on / the policy is left out; then the doctor believes that it is the default.
        policy = str(_as_dict(options.get("user-tag-access")).get("user-allow", "free"))
        tags = sorted(
            {OUR_TAG, *(str(tag).lower() for profile in self._profiles() for tag in profile.values.get("tags") or [])}
        )
        refused = [tag for tag in tags if tag not in allowed and (policy != "free" or tag in registered)]
        if not refused:
            return
        mend = []
        if policy != "free":
            listed = ";".join(dict.fromkeys((*allowed, *refused)))
            mend.append(f"--user-tag-access 'user-allow=list,user-allow-list={listed}'")
        if set(refused) & set(registered):
            mend.append(f"--registered-tags '{';'.join(tag for tag in registered if tag not in refused)}'")
        yield Finding(
            "creation",
            WARNING,
            f"this cluster refuses the tags {_some(refused)} to whoever has no Sys.Modify on / (user-allow is {policy}"
            f"{', registered-tags is ' + ';'.join(registered) if registered else ''})",
            f"pvesh set /cluster/options {' '.join(mend)}, as root on a node",
            {
                "refused": refused,
                "user_allow": policy,
                "allowed_tags": allowed[:50],
                "registered_tags": registered[:50],
            },
        )

    def _options(self) -> dict[str, Any]:
        try:
            return self.context.client.get_dict("cluster/options")
        except ApiError:
            return {}

    # ---- privileges ----

    def _new_token(self) -> list[str]:
        return pveum_commands(
            self.config,
            template=self._template[0] if self._template else None,
            storage=self._storage,
            release=self._release,
            standing=self._standing,
        )

    def _workspace_storages(self) -> list[str]:
        """Return the storages on which the records have workspaces."""
        return sorted({row.storage for row in workspaces.Workspaces(self.context.records).find_all()})

    def _read_standing(self) -> None:
        """Read which roles and users there are, so that the commands make nothing twice."""
        client = self.context.client
        try:
            self._standing.roles = {
                str(row.get("roleid")): {name for name in str(row.get("privs") or "").split(",") if name}
                for row in client.get_list("access/roles")
            }
            self._standing.users = {str(row.get("userid")) for row in client.get_list("access/users")}
        except ApiError:
            # Who may not read them is told commands that make them.
            return

    def _privileges(self) -> Iterable[Finding]:
        self._read_standing()
        login = self.config.proxmox.login
        if self.config.proxmox.is_root:
            if self.config.proxmox.api_host is None:
                yield Finding("privileges", OK, "pvesh on the node acts as root@pam: no privilege is missing")
            else:
                yield Finding(
                    "privileges",
                    WARNING,
                    "root@pam may do everything on the whole cluster, and so may whoever gets its secret",
                    "use a token with the least privileges: see the pveum commands",
                    {"login": "root@pam"},
                )
            return
        needed = dict(
            needs(
                self.config,
                template=self._template[0] if self._template else None,
                storage=self._storage,
                release=self._release,
                workspaces=self._workspace_storages(),
                snippets=self.config.snippets_storage if self._user_data_is_used() else None,
            )
        )
        # A role on /vms replaces what / hands down, and then VMs outside the pool are hidden.
        needed.setdefault("/vms", ("VM.Audit",))
        missing: dict[str, list[str]] = {}
        held = self._standing.held
        for path, names in needed.items():
            # A right on the one bridge that is used serves as well as one on the whole zone.
            held[path] = self._held(f"{path}/{self._bridge()}" if path == privileges.ZONE else path)
            lacking = [name for name in names if not privileges.satisfies(held[path], name)]
            if lacking and not (path == "/vms" and set(lacking) <= set(missing.get("/", ()))):
                missing[path] = lacking
        self._entries()
        facts: dict[str, Any] = {"login": login, "missing": missing}
        too_many = sorted(held.get("/", set()) & set(privileges.ADMINISTRATOR))
        # An administrator needs no repair, but a token of its own; None makes the commands for one.
        self._pveum = (
            None if too_many else privileges.pool_commands(self.config) if self._standing.pool is False else []
        )
        if missing:
            self._pveum = privileges.repair_commands(self.config, missing, self._standing, needed)
            told = "; ".join(f"{', '.join(names)} on {path}" for path, names in missing.items())
            yield Finding("privileges", PROBLEM, f"{login} lacks {told}", self._repair_advice(), facts)
        elif not too_many and not self.context.cluster.sees_everything():
            yield Finding(
                "privileges",
                WARNING,
                f"{login} is not proven to see every VM of the cluster: a role on /vms/N or NoAccess on a pool hides"
                " VMs, so workspaces are not attached, and each VMID is asked for by itself",
                "grant VM.Audit wherever another role stands below /vms, and Sys.Audit on / (paths:"
                f" {_some(self._hidden()) or 'not known'})",
                facts,
            )
        else:
            yield Finding("privileges", OK, f"{login} has every privilege that is needed", None, facts)
        if too_many:
            yield Finding(
                "privileges",
                WARNING,
                f"{login} may administer the whole cluster ({', '.join(too_many)} on /)",
                "use a token with the least privileges: see the pveum commands",
                {"login": login},
            )

    def _repair_advice(self) -> str:
        advice = (
            "run the pveum commands as root on a node, then the doctor again: they add what is missing and take nothing"
            " away"
        )
        if self.config.proxmox.token_name and not any(self._standing.held.values()):
            advice += (
                ". This token has no privilege at all: it was probably made without --privsep 0, and then has none of"
                " its user's"
            )
        return advice

    def _hidden(self) -> list[str]:
        """Return the paths below /vms that have a role without VM.Audit for this login."""
        paths = {str(entry.get("path")) for entry in self._entries() if str(entry.get("path")).startswith("/vms/")}
        return sorted(path for path in sorted(paths)[:_LOOK_AT] if "VM.Audit" not in self._held(path))

    def _bridge(self) -> str:
        found = re.search(r"bridge=([\w.-]+)", str(self._template[2].get("net0")) if self._template else "")
        return found[1] if found else "vmbr0"

    def _held(self, path: str) -> set[str]:
        found = self.context.client.get_dict("access/permissions", path=path)
        return {str(name) for rights in found.values() if isinstance(rights, dict) for name in rights}

    def _vmid_range(self) -> Iterable[Finding]:
        low, high = self.config.vmid_range
        rows = self.context.cluster.vms()
        ours = {one.vmid for one in self.context.records.find_all()}
        within = {vmid: row for vmid, row in rows.items() if low <= vmid <= high}
        strangers = sorted(set(within) - ours)
        taken = len(set(within) | {vmid for vmid in ours if low <= vmid <= high})
        free = high - low + 1 - taken
        facts = {"range": f"{low}-{high}", "free": free, "foreign": strangers[:50]}
        found = list(self._overlaps(low, high, facts))
        if free <= 0:
            found.append(
                Finding(
                    "vmid_range",
                    PROBLEM,
                    f"all VMIDs of {low}-{high} are taken: no sandbox can be created without a vmid",
                    "destroy or prune sandboxes, or set a larger vmid_range",
                    facts,
                )
            )
        marked = [vmid for vmid in strangers[:_LOOK_AT] if self._carries_marker(vmid, within[vmid])]
        if marked:
            found.append(
                Finding(
                    "vmid_range",
                    WARNING,
                    f"VMs with our marker but without a record here ({_some(marked)}): another database works in the "
                    "same range, or these records were lost",
                    "give each database a vmid_range of its own; agentlab_reconcile reports such VMs as unrecorded",
                    {**facts, "marked": marked},
                )
            )
        others = [vmid for vmid in strangers if vmid not in marked]
        if others:
            found.append(
                Finding(
                    "vmid_range",
                    WARNING,
                    f"{len(others)} VMs that are not ours are inside {low}-{high} ({_some(others)}); they are left"
                    " alone, but take VMIDs away",
                    "move the range (vmid_range), or let other tools use another one",
                    facts,
                )
            )
        yield from found or [
            Finding(
                "vmid_range",
                OK,
                f"{free} of {high - low + 1} VMIDs of {low}-{high} are free, and only sandboxes are in it",
                None,
                facts,
            )
        ]

    def _overlaps(self, low: int, high: int, facts: dict[str, Any]) -> Iterable[Finding]:
        bounds = _next_id(self._options().get("next-id"))
        if bounds and bounds[0] <= high and low <= bounds[1]:
            facts["next_id"] = f"{bounds[0]}-{bounds[1]}"
            yield Finding(
                "vmid_range",
                WARNING,
                f"Proxmox hands out VMIDs of {bounds[0]}-{bounds[1]} by itself (next-id), which overlaps {low}-{high}",
                f"pvesh set /cluster/options --next-id lower={high + 1},upper=999999999, or move vmid_range",
                dict(facts),
            )

    def _carries_marker(self, vmid: int, row: Mapping[str, Any]) -> bool:
        if row.get("type") != "qemu":
            return False
        try:
            return bool(identity.markers(self.context.client.get_dict(f"nodes/{row.get('node')}/qemu/{vmid}/config")))
        except ProxmoxError:
            return False

    def _clock(self) -> Iterable[Finding]:
        offsets: dict[str, int] = {}
        for node in sorted(name for name, online in self._nodes.items() if online):
            before = self.context.clock.now()
            found = self.context.client.get_dict(f"nodes/{node}/time")
            # The answer's moment lies somewhere within the request: the middle is the fairest guess.
            offsets[node] = int(found.get("time") or 0) - (before + self.context.clock.now()) // 2
        if not offsets:
            why = "no node is online" if self._nodes else "the cluster's nodes could not be read"
            yield Finding("clock", UNKNOWN, f"{why}, so no clock could be compared", "see the finding quorum")
            return
        node = max(offsets, key=lambda name: abs(offsets[name]))
        apart = abs(offsets[node])
        facts = {"offsets_seconds": offsets}
        if apart <= _CLOCK_SECONDS[0]:
            yield Finding("clock", OK, f"this host and the nodes differ by {apart} s at most", None, facts)
        else:
            yield Finding(
                "clock",
                WARNING if apart <= _CLOCK_SECONDS[1] else PROBLEM,
                f"this host's clock and that of node {node} are {show(apart)} apart: leases are counted by this host's"
                " clock, tasks by the node's",
                "switch on time synchronisation on both (timedatectl; chrony)",
                facts,
            )

    # ---- the daemon ----

    def _daemon(self) -> Iterable[Finding]:
        path = self.config.socket
        if not os.path.exists(path):
            yield Finding(
                "daemon",
                OK,
                f"no daemon here (no socket {path}); modules need none, but somebody has to run agentlab_reconcile and"
                " agentlab_prune",
                "a cron job, an AWX schedule, or the role agentlabd",
                {"socket": path},
            )
            return
        try:
            found = self._ask_daemon()
        except PermissionError:
            yield Finding(
                "daemon",
                UNKNOWN,
                f"{path} is there, but this user may not ask it",
                "run as root, or as a member of the group agentlab",
                {"socket": path},
            )
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            yield Finding(
                "daemon",
                PROBLEM,
                f"{path} is there, but the daemon does not answer ({type(error).__name__})",
                "systemctl status agentlabd; journalctl -u agentlabd",
                {"socket": path},
            )
            return
        facts = {"socket": path, "status": found}
        conditions = _conditions(found)
        for condition in conditions:
            yield Finding(
                "daemon",
                # Work that rests or waits goes on by itself or by a person's word; work that fails does not.
                PROBLEM if condition["condition"] == FAILS else WARNING,
                f"agentlabd: {condition['part']} {condition['condition']} since {condition['since']}: {condition['why']}",
                condition["todo"],
                facts,
            )
        # Release 1.0.0 tells no conditions.
        told = "conditions" in found
        complaints = (
            []
            if told
            else [
                f"{part}: {text}"
                for part, key in (
                    ("config", "error"),
                    ("proxmox", "last_error"),
                    ("expiry", "last_error"),
                    ("reconcile", "last_error"),
                )
                if (text := (found.get(part) or {}).get(key))
            ]
        )
        frozen = (found.get("cleanup") or {}).get("frozen")
        if frozen and not told:
            complaints.append(
                f"cleanup is frozen since {frozen.get('at')}: {frozen.get('reason')} (agentlab cleanup release)"
            )
        if found.get("version") not in (None, __version__):
            complaints.append(f"it is version {found.get('version')}, the modules here are {__version__}")
        if complaints:
            yield Finding(
                "daemon",
                WARNING,
                "the daemon answers, but says: " + "; ".join(complaints),
                "journalctl -u agentlabd tells more",
                facts,
            )
        elif not conditions:
            yield Finding("daemon", OK, f"the daemon answers (version {found.get('version')})", None, facts)


# ---- the bundle ----

_ADDRESS = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"
)
_KEEP = ("127.0.0.1", "::1")


def bundle(doctor: Doctor, report: Diagnosis, *, hosts: bool = False, events: int = 100) -> dict[str, Any]:
    """What helps with a bug report: findings, configuration, states, the last events. Secrets are never in it; names of hosts and VMs and
    their addresses only with ``hosts``."""
    context = doctor.context
    config = {
        name: getattr(doctor.config.proxmox, name) for name in doctor.config.proxmox.__slots__ if name not in SECRETS
    }
    config.update({name: getattr(doctor.config, name) for name in doctor.config.__slots__ if name != "proxmox"})
    live = context.records.find_all()
    found = {
        "made_at": clock.iso(context.clock.now()),
        "system": {
            "kernel": platform.release(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "collection": __version__,
        },
        "configuration": config,
        **report.public(),
        "sandboxes": [one.public() for one in live],
        "events": [info.event(row) for row in history.events(context.database, tail=events)],
    }
    return dict(_redacted(json.loads(json.dumps(found, default=str)), _replacements(doctor, hosts), hosts))


def shown(doctor: Doctor, report: Diagnosis) -> dict[str, Any]:
    """Return the report for others' eyes: no secret of the configuration is in it, whoever quoted it."""
    return dict(_redacted(report.public(), _replacements(doctor, True), True))


def write_bundle(path: str, content: Mapping[str, Any]) -> None:
    """A file of its own with mode 0600, whole or not at all; whatever was there is replaced, never followed."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, fresh = tempfile.mkstemp(prefix=".agentlab-", dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.write("\n")
            os.replace(fresh, path)
        except OSError:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise InvalidInput(
            f"bundle: {path}: {error.strerror}; give a file in a folder that this user may write to",
            option="bundle",
            value=path,
        ) from None


def _replacements(doctor: Doctor, hosts: bool) -> dict[str, str]:
    found = doctor.config.proxmox
    # A value this short would be found in half of all words; such a secret is not one.
    replaced = {value: "(secret)" for value in (found.api_password, found.api_token_secret) if value and len(value) > 3}
    if hosts:
        return replaced
    for name in (found.api_host, socket.gethostname(), socket.getfqdn()):
        if name and name not in ("localhost", *_KEEP):
            replaced[name] = "(host)"
    nodes, vms = doctor.context.cluster.known()
    for number, node in enumerate(sorted(nodes), 1):
        replaced[node] = f"(node {number})"
    for one in doctor.context.records.find_all(include_destroyed=True):
        replaced[one.name] = f"(sandbox {one.vmid})"
    for vmid, name in vms.items():
        replaced.setdefault(name, f"(VM {vmid})")
    return replaced


def _redacted(value: Any, replaced: Mapping[str, str], hosts: bool) -> Any:
    """The same with every such text replaced, longest first, as whole words (secrets: anywhere)."""
    secrets = {text: word for text, word in replaced.items() if word == "(secret)"}
    names = sorted((text for text in replaced if text not in secrets), key=len, reverse=True)
    words = re.compile("|".join(rf"(?<![\w-]){re.escape(text)}(?![\w-])" for text in names)) if names else None

    def text_of(text: str) -> str:
        for secret, word in secrets.items():
            text = text.replace(secret, word)
        if hosts:
            return text
        if words:
            text = words.sub(lambda found: replaced[found[0]], text)
        return _ADDRESS.sub(lambda found: found[0] if found[0] in _KEEP else "(address)", text)

    def walk(part: Any) -> Any:
        if isinstance(part, str):
            return text_of(part)
        if isinstance(part, list):
            return [walk(one) for one in part]
        if isinstance(part, dict):
            return {text_of(str(name)): walk(one) for name, one in part.items()}
        return part

    return walk(value)


# ---- small things ----


class _Local(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_DAEMON_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_DAEMON_SECONDS)
        self.sock.connect(self._path)


def ask(path: str, resource: str) -> dict[str, Any]:
    """An object that the daemon behind the socket answers with; OSError or ValueError when it does not."""
    connection = _Local(path)
    try:
        connection.request("GET", resource)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200 or not isinstance(found, dict):
        raise ValueError(f"status {answer.status}")
    return found


def _conditions(status: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what rests, waits or fails by the daemon's status; each has part, condition, since, why and todo."""
    rows = status.get("conditions")
    names = ("part", "condition", "since", "why", "todo")
    return [
        {name: str(row.get(name) or "unknown") for name in names}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]


def _libraries() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("proxmoxer", "requests", "yaml"):
        try:
            found[name] = str(getattr(__import__(name), "__version__", "unknown"))
        except (ImportError, SystemExit):
            # proxmoxer ends the process when requests is missing
            found[name] = None
    return found


# What may stand in a damaged column instead, as SQL; other columns have no value that is right by itself.
_HARMLESS = {("sandboxes", "tags"): "'[]'", ("operations", "detail"): "'{}'"}


def _mend(path: str, detail: Mapping[str, Any]) -> str:
    """Return how to mend one damaged value, as commands."""
    table, column, row = (str(detail.get(name)) for name in ("table", "column", "row"))
    keys = {"sandboxes": "uuid", "operations": "sandbox_uuid", "workspaces": "id", "meta": "key"}
    # The row is named with its key last, and in brackets for a sandbox.
    key = row.removesuffix(")").rpartition(" ")[2].replace("'", "''")
    where = f"WHERE {keys.get(table, 'rowid')} = '{key}'"
    begin = "stop agentlabd and wait for plays to end; copy the file; then "
    if table == "meta":
        return f"""{begin}sqlite3 {path} "DELETE FROM meta {where}" (it is written anew)"""
    new = _HARMLESS.get((table, column))
    if new is None:
        return (
            f"""{begin}look at the row with sqlite3 {path} "SELECT * FROM {table} {where}", set {column} to what it was (agentlab sandbox events, """
            "a backup), or restore a backup"
        )
    return (
        begin
        + f'sqlite3 {path} "UPDATE {table} SET {column} = {new} {where}"'
        + ("; what the interrupted operation had noted is lost, so look at its VM" if table == "operations" else "")
    )


def _next_id(value: Any) -> tuple[int, int] | None:
    """Return the bounds that a datacenter's next-id sets (text or object); None when it sets none."""
    bounds = _as_dict(value)
    if not bounds:
        return None
    try:
        return int(bounds.get("lower") or 100), int(bounds.get("upper") or 1000000)
    except (TypeError, ValueError):
        return None


def _as_dict(value: Any) -> dict[str, Any]:
    """Return a property string (a=1,b=2) or an object as a dict."""
    if isinstance(value, str):
        return dict(part.partition("=")[::2] for part in value.split(","))
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[str]:
    """Return a list that Proxmox VE gives as such, or as text with semicolons."""
    return [
        str(one).lower() for one in (value if isinstance(value, list) else re.split(r"[;, ]+", str(value or ""))) if one
    ]


def _storage_of(drives: Iterable[str]) -> str | None:
    """Return the storage of the first disk."""
    return next((value.partition(":")[0] for value in drives if ":" in value and "media=cdrom" not in value), None)


def _some(values: Iterable[Any]) -> str:
    found = list(dict.fromkeys(values))
    return ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
