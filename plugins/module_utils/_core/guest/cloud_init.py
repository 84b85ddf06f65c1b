# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write custom user data for cloud-init, and wait until the guest reports the end of cloud-init.

Proxmox VE does not accept snippets by upload: a snippet is a file in a folder of the node, or of a storage shared by
nodes. So user data needs a run on a host with that folder. The file name contains the sandbox's UUID. The record holds
the path before the file is written, and every way to DESTROYED removes the file first. The data is written to that file
only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
from collections.abc import Collection
from typing import Any

from .. import patterns, safe_yaml, waiting
from ..context import Context
from ..errors import AgentlabError, ApiError, InvalidInput, ProxmoxError, TaskTimeout
from ..model import Sandbox
from ..store import holders
from ..store.records import Claim
from ..vm import address
from ..vm.locate import Located, match_if_readable
from . import snippets

_LONGEST = 512 * 1024
# The beginnings, in small letters and after white space, by which cloud-init recognises user data. It ignores all other
# data, with a warning only in the guest's log.
_KINDS = ("#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "#upstart-job", "## template:")
# cloud-init looks for the header of a MIME message in this many bytes, in upper or lower case.
_MIME, _MIME_WITHIN = "mime-version:", 4096
_RESULT = "/run/cloud-init/result.json"
# The guest writes this file, so do not read a longer one.
_LONGEST_RESULT = 1024 * 1024
_LONGEST_ERROR = 10_000
_MOST_ERRORS = 20
_ERROR_NAMES = re.compile(r"\(\s*['\"]([\w.-]{1,60})['\"]\s*,\s*(\w{1,60})")
_ELSEWHERE = (
    "Proxmox VE takes no uploads of snippets, so user data needs a run on the node that will hold the VM, or "
    "snippets_storage on a storage that this host and that node share"
)


class CloudInitFailed(AgentlabError):
    """The guest reports that cloud-init ended with errors."""

    code = "cloud_init_failed"


def check_data(data: str) -> None:
    """Raise InvalidInput for user data that cloud-init would ignore. No message quotes the data."""
    if not patterns.is_encodable(data):
        raise InvalidInput(
            "cloud_init_user_data: holds characters that UTF-8 cannot hold (half of a surrogate pair)",
            option="cloud_init_user_data",
        )
    if len(data.encode()) > _LONGEST:
        raise InvalidInput(f"cloud_init_user_data: longer than {_LONGEST // 1024} KiB", option="cloud_init_user_data")
    if data.startswith("\ufeff"):
        raise InvalidInput(
            "cloud_init_user_data: begins with a byte order mark (BOM), and cloud-init would not know what it is; "
            "save it as UTF-8 without BOM",
            option="cloud_init_user_data",
        )
    head = data.lstrip()[:200].lower()
    if not head.startswith(_KINDS) and _MIME not in data[:_MIME_WITHIN].lower():
        raise InvalidInput(
            "cloud_init_user_data: the first line does not say what it is. Valid: #cloud-config, #! (a script), or "
            "another header of cloud-init's",
            option="cloud_init_user_data",
        )
    # An archive and a JSON patch are lists, all other cloud-configs are mappings.
    if head.startswith("#cloud-config") and not head.startswith(("#cloud-config-archive", "#cloud-config-jsonp")):
        try:
            import yaml  # noqa: F401 - safe_yaml needs it
        except ImportError:
            return
        try:
            kind = safe_yaml.recognise(data)
        except safe_yaml.Refused as error:
            raise InvalidInput(
                f"cloud_init_user_data: {error.reason.replace('is not valid', 'not valid')}{error.place}",
                option="cloud_init_user_data",
            ) from None
        if kind not in (None, "mapping"):
            raise InvalidInput(
                "cloud_init_user_data: #cloud-config must be followed by a mapping", option="cloud_init_user_data"
            )


# ---- the snippet ----


def check_storage(ctx: Context, node: str) -> dict[str, Any]:
    """Return the node's entry for the snippets storage.

    Raises InvalidInput if it is missing, inactive or without snippets.
    """
    storage = ctx.config.snippets_storage
    row = next((row for row in ctx.client.get_list(f"nodes/{node}/storage") if row.get("storage") == storage), None)
    if row is None:
        raise InvalidInput(
            f"snippets_storage: {storage!r} is not a storage of node {node} that these credentials may see "
            "(Datastore.Audit)",
            option="snippets_storage",
            value=storage,
        )
    content = str(row.get("content") or "")
    if "snippets" not in content.split(","):
        raise InvalidInput(
            f"snippets_storage: storage {storage!r} holds no snippets; allow them (pvesm set {storage} --content "
            f"{content},snippets) or choose another storage",
            option="snippets_storage",
            value=storage,
        )
    if str(row.get("active", 1)) != "1":
        raise InvalidInput(
            f"snippets_storage: storage {storage!r} is not active on node {node}",
            option="snippets_storage",
            value=storage,
        )
    return row


def explain_hidden(ctx: Context, node: str, nodes: Collection[str], shared: bool) -> str | None:
    """Return why a node would not see a snippet written here, or None. ``shared``: the snippets storage is shared."""
    own_node = _get_own_node()
    return None if own_node == node or shared or own_node not in nodes else _explain_elsewhere(ctx, node, own_node)


def _explain_elsewhere(ctx: Context, node: str, own_node: str) -> str:
    return (
        f"the VM will be on node {node}, but this runs on {own_node} and storage {ctx.config.snippets_storage!r} is "
        f"local. {_ELSEWHERE}"
    )


def check_place(ctx: Context, node: str) -> None:
    """Require, before anything is created, that ``node`` will see a snippet written on this host.

    Raises InvalidInput, which names what is missing.
    """
    folder = ctx.config.snippets_dir
    row = check_storage(ctx, node)
    own_node = _get_own_node()
    if own_node != node and own_node in ctx.cluster.list_nodes() and not _is_shared(row):
        raise InvalidInput(
            f"cloud_init_user_data: {_explain_elsewhere(ctx, node, own_node)}",
            option="cloud_init_user_data",
        )
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise InvalidInput(
            f"snippets_dir: {folder}: {error.strerror} on this host ({own_node}). {_ELSEWHERE}",
            option="snippets_dir",
            value=folder,
        ) from None
    if not stat.S_ISDIR(mode):
        raise InvalidInput(f"snippets_dir: {folder} is not a folder", option="snippets_dir", value=folder)
    if mode & 0o002 and not mode & stat.S_ISVTX:
        raise InvalidInput(
            f"snippets_dir: {folder} can be written by everybody on this host; user data is not put there (chmod o-w)",
            option="snippets_dir",
            value=folder,
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"snippets_dir: {folder} cannot be written by the user this runs as; run as root, or give that user's "
            "group the folder",
            option="snippets_dir",
            value=folder,
        )


def provide_snippet(ctx: Context, claim: Claim, sandbox: Sandbox, data: str | None) -> Sandbox:
    """Write the snippet and its path, check that the node sees the snippet, and return the record.

    The path is in the record before the file is written. ``data`` None: keep the snippet of an earlier run. Raises
    InvalidInput when that snippet is gone, the file cannot be written, or the node does not see it.
    """
    if data is None:
        if sandbox.snippet is not None and not os.path.exists(sandbox.snippet):
            raise InvalidInput(
                f"cloud_init_user_data: the creation of sandbox {sandbox.vmid} was begun with user data, which is "
                "gone; give it again",
                option="cloud_init_user_data",
            )
        return sandbox
    path = os.path.join(ctx.config.snippets_dir, snippets.compose_name(sandbox))
    host = holders.read_host_name()
    if (sandbox.snippet, sandbox.snippet_host) != (path, host):
        if sandbox.snippet is not None:
            snippets.remove(ctx, sandbox)
        sandbox = ctx.records.change(
            claim,
            sandbox,
            "create",
            snippet=path,
            snippet_host=host,
            outcome="decided",
            reason="snippet",
            evidence={"snippet": path, "host": host},
        )
    try:
        _write_snippet(path, data)
    except OSError as error:
        raise InvalidInput(
            f"snippets_dir: {path}: {error.strerror}; nothing of it is left", option="snippets_dir"
        ) from None
    _require_seen(ctx, sandbox, path)
    return sandbox


def compose_volume(ctx: Context, sandbox: Sandbox) -> str:
    """Return the name by which Proxmox VE knows the sandbox's snippet."""
    return f"{ctx.config.snippets_storage}:snippets/{snippets.compose_name(sandbox)}"


def _write_snippet(path: str, data: str) -> None:
    """Write the file completely or not at all, readable for this user only. Raises OSError."""
    new = snippets.make_temporary_path(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    # Proxmox reads the file as root. No other user needs it, so set the mode at creation.
    fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def _require_seen(ctx: Context, sandbox: Sandbox, path: str) -> None:
    """Raise InvalidInput unless the node sees the snippet.

    The node's own list of snippets decides. A token without Datastore.Allocate gets an empty list; then the name of
    this host decides.
    """
    storage, node = ctx.config.snippets_storage, str(sandbox.node)
    volume = compose_volume(ctx, sandbox)
    if any(
        row.get("volid") == volume
        for row in ctx.client.get_list(f"nodes/{node}/storage/{storage}/content", content="snippets")
    ):
        return
    own_node = _get_own_node()
    shared = any(
        _is_shared(row) for row in ctx.client.get_list(f"nodes/{node}/storage") if row.get("storage") == storage
    )
    if own_node == node or (shared and own_node in ctx.cluster.list_nodes()):
        # If the node does not see the snippet after all, Proxmox refuses cicustom and the creation is cleaned up.
        return
    raise InvalidInput(
        f"cloud_init_user_data: node {node} does not see {path} of this host ({own_node}) as {volume}. {_ELSEWHERE}. "
        f"(A token sees snippets only with Datastore.Allocate on /storage/{storage}.)",
        option="cloud_init_user_data",
    )


def _is_shared(row: dict[str, Any]) -> bool:
    return str(row.get("shared", 0)) == "1"


def _get_own_node() -> str:
    """Return the name that this host would have as a Proxmox node."""
    return socket.gethostname().partition(".")[0]


# ---- waiting for the end of cloud-init ----


def wait_for_end(ctx: Context, sandbox: Sandbox) -> None:
    """Wait until the guest agent shows cloud-init's result. Raises CloudInitFailed with the names of the failed parts.

    Reads the file that cloud-init writes at its end, so that no program runs in the guest.
    """

    def look() -> list[str] | None:
        # Judge the VM before reading: another VM may have got the VMID meanwhile.
        located = match_if_readable(ctx, sandbox)
        errors = _read_failed_parts(ctx, sandbox, located) if located else None
        # Judge it again after reading: the result counts only if the VM was ours.
        return errors if errors is not None and match_if_readable(ctx, sandbox) else None

    errors = waiting.wait_for_result(ctx.clock, ctx.wait_timeout, look)
    if errors is None:
        raise TaskTimeout(
            f"sandbox {sandbox.vmid} runs, but its guest agent did not report the end of cloud-init within "
            f"{ctx.wait_timeout} s (wait_timeout); are cloud-init and qemu-guest-agent in the template, and "
            "agent=1 set? Run again to go on waiting",
            vmid=sandbox.vmid,
        )
    if errors:
        raise CloudInitFailed(
            f"cloud-init ended with errors in sandbox {sandbox.vmid}: {'; '.join(errors)}; see "
            "/var/log/cloud-init.log in the VM, which is left as it is",
            vmid=sandbox.vmid,
        )


def _read_failed_parts(ctx: Context, sandbox: Sandbox, located: Located) -> list[str] | None:
    """Return the names of the failed parts ([]: none), or None while cloud-init or the guest agent is not ready.

    Raises AgentUnusable when the guest agent will never answer.
    """
    try:
        answer = ctx.client.get_dict(f"{located.path}/agent/file-read", file=_RESULT)
    except ApiError as error:
        # Status 500 means: no agent yet, or no such file yet.
        if error.status != 500:
            raise
        address.refuse_hopeless(sandbox, located, error, "wait_for_cloud_init")
        return None
    except ProxmoxError:
        return None
    content = answer.get("content")
    if not isinstance(content, str) or len(content) > _LONGEST_RESULT:
        return None
    try:
        errors = json.loads(content)["v1"]["errors"]
    except (ValueError, KeyError, TypeError, RecursionError):
        # The file is half written, or not from cloud-init: the guest may write anything into it.
        return None
    if not isinstance(errors, list):
        return None
    # The error texts may quote user data, so use only the names of the failed parts.
    texts = [text[:_LONGEST_ERROR] for text in errors[:_MOST_ERRORS] if isinstance(text, str)]
    names = [": ".join(part) for text in texts for part in _ERROR_NAMES.findall(text)][:_MOST_ERRORS]
    return names or ["an error without a name"] if errors else []
