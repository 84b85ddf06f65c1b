# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Interpret Proxmox's refusals, whether they came over https (``https.py``) or through pvesh (``pvesh.py``)."""

from __future__ import annotations

import re
from typing import Any

from ..config import ProxmoxSettings
from ..errors import AccessDenied, ApiError, OutcomeUnknown, ProxmoxError, Unreachable

# Texts of a request that Proxmox did not begin: no worker started, or no lock acquired. A retry is safe.
_NOT_BEGUN = ("start worker failed", "got no worker upid", "can't lock file", "unable to acquire lock")
# Seconds before a request that did not begin is sent again.
LOCK_PAUSE = 1.0
# pveproxy answers 595 when it cannot connect to the node: the request was not delivered.
_NOT_DELIVERED = (595,)
# pveproxy answers 596-599 when its connection to the node breaks later. A proxy in front of Proxmox answers 408 and
# 502-504. In both cases Proxmox may still carry out the request.
_FOREIGN_PROXY = (408, 502, 503, 504)
_UNKNOWN = (*_FOREIGN_PROXY, 596, 597, 598, 599)
_AGENT = re.compile(r"nodes/[^/]+/qemu/\d+/agent/")
# Limits of one unpacked answer: bytes (a list of 10,000 VMs has 5 MB) and nesting depth (Proxmox uses six levels).
LARGEST_ANSWER = 32 * 1024 * 1024
DEEPEST_ANSWER = 32
_LONGEST_TEXT = 1000
# Texts of a full storage from the kernel, qemu-img, LVM (thick and thin), ZFS, Ceph and quotas. In the texts to search,
# " | " separates the lines of a task's log.
_FULL = re.compile(
    r"no space left|out of (data )?space|insufficient (free|suitable|allocatable) ?(space|extents)?|quota exceeded|"
    r"not enough (free )?space|greater than available space|free space in thin pool|"
    r"thin pool [^|]{0,80}(\bfull\b|exceeds|out of)|\bosd\b[^|]{0,40}\bfull\b|pool[^|]{0,40} is full",
    re.IGNORECASE,
)
# LVM writes these warnings into the log of each clone on a thin pool, even into a pool with enough room.
_WARNED_ALWAYS = re.compile(
    r"protection against thin pools running out of space|thin pools before they get full|exceeds the size of thin pool",
    re.IGNORECASE,
)
# The privilege for each kind of request, because Proxmox does not always name the missing privilege. In Proxmox a role
# on a deeper path replaces the inherited roles.
_NEEDS = {
    "GET cluster/status": "Sys.Audit on /",
    "GET cluster/ha/status/current": "Sys.Audit on /",
    "GET nodes/{node}/qemu/{vmid}/config": "VM.Audit on /vms or the VM's pool",
    "GET nodes/{node}/qemu/{vmid}/status/current": "VM.Audit on /vms or the VM's pool",
    "GET nodes/{node}/qemu/{vmid}/agent/file-read": "VM.GuestAgent.FileRead or VM.GuestAgent.Unrestricted (Proxmox VE "
    "9), VM.Monitor (8) on the VM or its pool",
    "POST nodes/{node}/qemu/{vmid}/clone": "VM.Clone on the template, VM.Allocate on the pool (or /vms), "
    "Datastore.AllocateSpace on the storage",
    "PUT nodes/{node}/qemu/{vmid}/config": "VM.Config.Options, .CPU, .Memory, .Network and .Cloudinit on the pool (or "
    "/vms)",
    "PUT nodes/{node}/qemu/{vmid}/resize": "VM.Config.Disk on the pool (or /vms)",
    "DELETE nodes/{node}/qemu/{vmid}": "VM.Allocate on the pool (or /vms)",
}


def is_config_changed(text: str) -> bool:
    """Return whether Proxmox refused a write because the configuration changed after its digest was read.

    Some releases of Proxmox VE spell the text "checksum missmatch".
    """
    return re.search("checksum miss?match", text) is not None


def is_not_begun(text: str) -> bool:
    """Return whether the text says that Proxmox did not begin the request: no worker started, or no lock acquired."""
    return any(part in text for part in _NOT_BEGUN)


def is_storage_full(text: str) -> bool:
    """Return whether a text of Proxmox or of a task's log says that a storage is full."""
    return _FULL.search(_WARNED_ALWAYS.sub("", text)) is not None


def advise_on_room(text: str) -> str:
    """Return the remedy if a text of Proxmox or of a task's log reports a full storage; "" otherwise."""
    return "; the storage is full: free space there, then run again" if is_storage_full(text) else ""


def name_kind(path: str) -> str:
    """Return the path of a request with placeholders for node, VMID and task id, to count requests by kind."""
    path = re.sub(r"/tasks/[^/]+", "/tasks/{upid}", path)
    path = re.sub(r"^nodes/[^/]+", "nodes/{node}", path)
    return re.sub(r"/qemu/\d+", "/qemu/{vmid}", path)


def clean(text: object, settings: ProxmoxSettings | None = None) -> str:
    """Return a text from outside for use in a message.

    The result is one line of at most 1000 characters, without control characters and without the secrets in
    ``settings``.
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    for secret in (settings.api_password, settings.api_token_secret) if settings else ():
        # The text may quote the request with its header. Replacing a shorter secret would damage unrelated words.
        if secret and len(secret) > 3:
            line = line.replace(secret, "(secret)")
    return line[:_LONGEST_TEXT]


def make_descriptor_error(path: str) -> Unreachable:
    """Return the error for a request that was not sent because no file descriptor is left."""
    return Unreachable(
        "this process has no file descriptor left; Proxmox was not asked. Raise its limit (ulimit -n; "
        "LimitNOFILE= of the unit), or lower connections",
        path=path,
    )


def make_timeout_error(method: str, path: str, settings: ProxmoxSettings) -> OutcomeUnknown:
    """Return the error for a request without an answer within api_timeout."""
    return OutcomeUnknown(
        f"{method} /{path} on {settings.where}: no answer within {settings.api_timeout} s (api_timeout); "
        f"{describe_outcome(method)}. Look at pveproxy and at the load of the node, or raise api_timeout; then run "
        "again",
        method=method,
        path=path,
        timed_out=True,
    )


def is_from_guest(path: str) -> bool:
    """Return whether Proxmox only passes on the answer for this path, from the guest agent of a VM."""
    return _AGENT.match(path) is not None


def make_guest_error(method: str, path: str, settings: ProxmoxSettings) -> OutcomeUnknown:
    """Return the error for an answer of a guest agent that is too large or nested too deep."""
    return OutcomeUnknown(
        f"{method} /{path} on {settings.where}: the answer of the guest is larger or nested deeper than any that a "
        f"guest agent sends, so it was not read; {describe_outcome(method)}. Look at qemu-guest-agent in the guest",
        method=method,
        path=path,
        guest=True,
    )


def describe_outcome(method: str) -> str:
    """Return the clause on the outcome of a request without an answer. A read changes nothing."""
    return "nothing was changed" if method == "GET" else "whether it was carried out is not known"


def is_too_deep(data: Any) -> bool:
    """Return whether objects and lists are nested deeper than DEEPEST_ANSWER."""
    level = [data]
    for _depth in range(DEEPEST_ANSWER):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def make_error(
    method: str, path: str, settings: ProxmoxSettings, status: int, text: str, params: dict[str, Any]
) -> ProxmoxError:
    """Return the error for an answer with an error status.

    ``status`` is the HTTP status, ``text`` Proxmox's own error text, ``params`` the parameters of the request. The
    message names the request, quotes the text, and gives the remedy.
    """
    where = f"{method} /{path} on {settings.where}"
    text = clean(text, settings)
    refusal = f"{status} {text}".strip()
    facts = {"status": status, "text": text, "method": method, "path": path}
    if status == 401:
        return AccessDenied(
            f"Proxmox on {settings.where} refuses the credentials of {settings.login} ({refusal}); check "
            f"{settings.credential_options}",
            **facts,
        )
    pool = re.search(r"pool '([^']+)' does not exist", text)
    if pool and status in (403, 500):
        return AccessDenied(
            f"{where}: {refusal}; create it (pveum pool add {pool[1]}), or correct pool", **{**facts, "status": 403}
        )
    if status == 403:
        return AccessDenied(
            f"{where}: {settings.login} may not do that ({refusal}); {_advise_on_grant(method, path, text, params)}",
            **facts,
        )
    node = path.split("/", 2)[1] if path.startswith("nodes/") else ""
    if status in _NOT_DELIVERED:
        return Unreachable(f"{where}: the node does not answer ({status} {text or 'no route to the node'})", **facts)
    if status in _FOREIGN_PROXY:
        return OutcomeUnknown(
            f"{where}: a proxy between here and Proxmox answers {refusal}; {describe_outcome(method)}. Look at "
            "pveproxy, then run again",
            **facts,
        )
    if status in _UNKNOWN:
        if method == "GET":
            return OutcomeUnknown(
                f"{where}: {f'node {node}' if node else 'the node'} does not answer ({refusal}); nothing was changed. "
                "Look at pveproxy and the load there, then run again",
                **facts,
            )
        return OutcomeUnknown(f"{where}: {describe_outcome(method)} ({refusal})", **facts)
    if method != "GET" and "/etc/pve/" in text and "Permission denied" in text:
        # Without quorum pmxcfs makes /etc/pve read-only, so even root gets this error.
        refusal += (
            "; the cluster takes no changes, most likely because it has no quorum. Look at pvecm status, then run again"
        )
    return ApiError(f"{where}: {refusal}{advise_on_room(text)}", **facts)


def _advise_on_grant(method: str, path: str, text: str, params: dict[str, Any]) -> str:
    """Return the remedy for a refusal with 403: which privilege to grant, and on which path."""
    kind = f"{method} {name_kind(path)}"
    # Proxmox does not always name the missing privilege. For reads of a VM it names the path /vms/N only, and _NEEDS
    # names better paths.
    if re.search(r"\b(VM|SDN|Sys|Datastore|Pool)\.\w+", text) and kind not in (
        "GET nodes/{node}/qemu/{vmid}/config",
        "GET nodes/{node}/qemu/{vmid}/status/current",
    ):
        advice = "grant the privilege named there"
    else:
        advice = f"grant {_NEEDS.get(kind, 'the missing privilege')}"
    if "(" not in text and kind == "POST nodes/{node}/qemu/{vmid}/clone" and params.get("pool"):
        # If the pool does not exist, Proxmox answers every user but root as if a privilege were missing.
        advice += (
            f"; or pool {params['pool']!r} does not exist: create it (pveum pool add {params['pool']}), or correct pool"
        )
    return advice
