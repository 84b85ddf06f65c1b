# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The types of errors. The adapters turn an error into an answer; the core never exits and never prints."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .escapes import escape_controls

# The remedies for errors, by name. The core names a remedy; each interface has its own sentence for it (modules:
# _adapter.REMEDIES, the API and the command line: REMEDIES in agentlabd/http/answers.py).
REMEDIES: dict[str, str] = {
    "force": "bypass the state rule of a destroy",
    "remove": "destroy the sandbox by force, which gives it up",
    "unprotect": "take the protection of the sandbox off before its destroy",
    "discard_memory": "stop a hibernated sandbox, which throws its saved memory away",
    "delete_workspace": "delete a workspace with the data on it",
    "allow_restart": "let an update stop and start the VM",
    "update": "apply an option to a sandbox that exists",
    "renew_lease": "renew the lease instead",
    "attach_workspace": "attach the workspace instead",
}


def add_remedy(message: str, remedy: str | None, words: Mapping[str, str] | None) -> str:
    """Return the message, followed by the interface's sentence for the remedy if there is one."""
    sentence = words.get(remedy) if words and remedy else None
    return f"{message}. {sentence}" if sentence else message


class Advice(NamedTuple):
    """A warning, and the name of a remedy."""

    message: str
    remedy: str | None = None


class AgentlabError(Exception):
    """The base of all errors.

    ``message`` is a sentence for the user, ``code`` a stable word for programs, ``detail`` has JSON-safe facts.
    ``remedy`` names an entry of REMEDIES, and is a part of ``detail``.
    """

    code = "error"

    def __init__(self, message: str, **detail: Any) -> None:
        # A message may quote the name of a VM or a path. On a terminal its control characters must have no effect.
        self.message = escape_controls(message)
        super().__init__(self.message)
        self.detail = detail

    @property
    def remedy(self) -> str | None:
        """Return the name of a remedy for the error, or None."""
        return self.detail.get("remedy")

    def explain(self, words: Mapping[str, str]) -> str:
        """Return the message for one interface. ``words`` are its sentences for the remedies."""
        return add_remedy(self.message, self.remedy, words)

    def as_dict(self, words: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return code, message and facts. ``words`` are the interface's sentences for the remedies."""
        facts = {name: value for name, value in self.detail.items() if value is not None}
        return {"code": self.code, "message": add_remedy(self.message, self.remedy, words), **facts}


class InvalidInput(AgentlabError):
    """An option, a variable or a configuration key has a value that cannot be used."""

    code = "invalid_input"


class ConfigError(InvalidInput):
    """The configuration file cannot be used as it is."""

    code = "invalid_config"


class NotFound(AgentlabError):
    """No live record has that VMID or name."""

    code = "not_found"


class StateConflict(AgentlabError):
    """The sandbox is in a state that does not allow the operation."""

    code = "state_conflict"


class Busy(AgentlabError):
    """Another run holds the claim on the sandbox, or another controller runs the same pass."""

    code = "busy"


class Stopping(AgentlabError):
    """This process is about to end, and begins no further work."""

    code = "stopping"


class ClaimLost(AgentlabError):
    """Our claim expired or another run took it over, so this run must not change the sandbox any more."""

    code = "claim_lost"


class GuardTripped(AgentlabError):
    """A run would destroy more sandboxes than its limit allows; nothing was destroyed."""

    code = "guard"


class Frozen(AgentlabError):
    """Cleanup is frozen until an operator releases it; nothing was done."""

    code = "frozen"


class Kept(AgentlabError):
    """The operation must not act on this sandbox now; ``reason`` is one of the documented words."""

    code = "kept"

    def __init__(self, reason: str, message: str, **detail: Any) -> None:
        super().__init__(message, reason=reason, **detail)
        self.reason = reason


class CreationFailed(AgentlabError):
    """A sandbox could not be created. The message tells whether a part of it is left."""

    code = "creation_failed"


class HostError(AgentlabError):
    """This host has no descriptors, threads, memory or room on its disk left."""

    code = "host"


class InternalError(AgentlabError):
    """An exception that no code expects: a bug."""

    code = "internal"


_HOST_PROBLEMS = {
    errno.EMFILE: "this process has no file descriptor left. Raise its limit (ulimit -n; LimitNOFILE= of the unit)",
    errno.ENFILE: "this host has no file descriptor left. Raise fs.file-max, or end what has so many files open",
    errno.ENOSPC: "the disk is full. Free some space there",
    errno.EDQUOT: "the disk quota is used up. Free some space there",
    errno.EROFS: "the file system can only be read. Look at dmesg, and mount it for writing",
    errno.EIO: "the disk or its file system failed to read or write. Look at dmesg and at the disk (df, smartctl)",
    errno.ENOMEM: "no memory is left for this process. Raise its limit (MemoryMax= of the unit)",
    errno.EAGAIN: "this process may start no further thread. Raise its limit (ulimit -u; TasksMax= of the unit)",
}


def make_host_error(error: BaseException) -> HostError | None:
    """Return a HostError if the error is a lack of this host's resources, else None.

    Each program calls this before it reports an error as an internal one. Python imports some modules late, so an
    import, too, may lack a descriptor.
    """
    number, path = None, None
    if isinstance(error, OSError):
        number, path = error.errno, error.filename
    elif isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN
    problem = _HOST_PROBLEMS.get(number or 0)
    if problem is None:
        return None
    return HostError(f"{f'{path}: ' if path else ''}{problem}, then run again; nothing more was done")


def is_out_of_descriptors(error: BaseException | None = None) -> bool:
    """Return True when this process or system has no file descriptor left.

    A resolver without descriptors reports an unknown host, so the error alone does not tell: try to open one.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError as problem:
        return problem.errno in (errno.EMFILE, errno.ENFILE)
    return False


# ---- the records ----


class StoreError(AgentlabError):
    """The database cannot be used: not readable, not writable, damaged, full, or of a newer version."""

    code = "store"


class StoreUnavailable(StoreError):
    """The server of the records does not answer now. No work is begun, and begun work is finished later."""

    code = "store_unavailable"

    @classmethod
    def of(cls, database: str, cause: str, advice: str | None = None, *, answers: bool = False) -> StoreUnavailable:
        """Return the error of a controller, which goes on by itself once the server accepts it again.

        ``advice``: the next step if the cause is known. ``answers``: the server answers, and refuses.
        """
        advice = advice or "look at the server and the network"
        verb = "refuses" if answers else "cannot be reached"
        return cls(
            f"database {database}: {verb}: {cause}. Nothing is changed in Proxmox VE meanwhile, and what was "
            f"begun is finished later; {advice}, then run again",
            path=database,
            cause=cause,
            advice=advice,
            verb=verb,
        )

    def explain_once(self, fate: str) -> str:
        """Return the message for a command that runs once and is not repeated. ``fate``: the state that it leaves."""
        advice = str(self.detail.get("advice"))
        return (
            f"database {self.detail.get('path')}: {self.detail.get('verb')}: {self.detail.get('cause')}; {fate}. "
            f"{advice[:1].upper()}{advice[1:]}, then run again"
        )


class DamagedRecord(StoreError):
    """One value in the records is not valid. ``detail`` names table, row and column; the row is left alone."""

    def __init__(self, table: str, row: str, column: str, valid: str) -> None:
        super().__init__(
            f"the records are damaged: {table}.{column} of {row} is not {valid}. That row is left alone; run "
            "agentlab_doctor (agentlab doctor), which says how to mend it",
            table=table,
            row=row,
            column=column,
            valid=valid,
        )


class RecordChanged(StoreError):
    """The record has another state or generation than the one that the write was computed from (compare-and-set)."""

    code = "changed"


# ---- Proxmox ----


class ProxmoxError(AgentlabError):
    """Base of the errors of Proxmox VE: an error in its answer, or no answer."""

    code = "proxmox"


class ApiError(ProxmoxError):
    """An answer with an error status. ``detail`` has status, method, path and Proxmox VE's text."""

    code = "proxmox_api"

    @property
    def status(self) -> int:
        return int(self.detail.get("status") or 0)

    @property
    def text(self) -> str:
        return str(self.detail.get("text") or "")


class AccessDenied(ApiError):
    """401 or 403: the credentials are refused, or a privilege is missing."""

    code = "proxmox_access"


class Unreachable(ProxmoxError):
    """Proxmox VE did not carry out the request: name, connection or TLS failed, or a node did not accept it (595)."""

    code = "proxmox_unreachable"


class OutcomeUnknown(ProxmoxError):
    """Proxmox VE may have carried out the request: time-out, cut connection, 596 or an answer that cannot be read."""

    code = "proxmox_outcome_unknown"


class TaskFailed(ProxmoxError):
    """A task ended with an error; ``exitstatus`` is Proxmox's text."""

    code = "proxmox_task_failed"

    @property
    def exitstatus(self) -> str:
        return str(self.detail.get("exitstatus") or "")


class TaskTimeout(ProxmoxError):
    """A task did not end within the time given; it goes on running on the node."""

    code = "proxmox_task_timeout"


class TaskUnknown(ProxmoxError):
    """A task's outcome cannot be read (vanished from the list, or its worker died)."""

    code = "proxmox_task_unknown"
