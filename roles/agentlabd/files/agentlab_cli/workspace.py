# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``agentlab workspace``: disks that outlive sandboxes."""

from __future__ import annotations

import re
from typing import Any

import click

from .framework import VMID, WORKSPACE, Group, Settings, settings
from .progress import Progress
from .text import format_age, format_cell, format_pairs, format_table

_UNITS = (("T", 1024**4), ("G", 1024**3), ("M", 1024**2))


def _format_size(length: Any) -> str:
    """Return a number of bytes in the largest unit that leaves a whole number, such as 20G."""
    return next((f"{length // unit}{name}" for name, unit in _UNITS if length % unit == 0), f"{length // 1024}K")


# Fields that the API has only for the original command line.
_SAID_TWICE = ("size_gb", "volid", "attached_vmid")


def _normalise_size(text: str) -> str:
    """Return a size in the daemon's form: 10, 10g, 10GB and 10GiB become 10G.

    Any other text is returned unchanged, for the daemon to judge.
    """
    match = re.fullmatch(r"([0-9]+)([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE | re.ASCII)
    return f"{match[1]}{match[2].upper() or 'G'}" if match else text


def _format_name(data: dict[str, Any]) -> str:
    return f"workspace {format_cell(data['name'])}"


def _format_holder(data: dict[str, Any]) -> str:
    return "-" if data["vmid"] is None else f"{format_cell(data['vmid'])} ({format_cell(data['sandbox'])})"


@click.group(
    cls=Group,
    examples=(
        "agentlab workspace new --size 50G --storage local-lvm project-x",
        "agentlab workspace attach --vmid 1009 project-x",
        "agentlab workspace detach project-x",
        "agentlab workspace list",
    ),
    words={"ls": "list", "create": "new", "get": "show"},
    meant=dict.fromkeys(("rm", "delete", "remove"), "agentlab workspace destroy --force <workspace>"),
)
def workspace() -> None:
    """Manage workspaces: disks that outlive sandboxes."""


@workspace.command(
    "list",
    usage="[--all]",
    examples=("agentlab workspace list", "agentlab workspace list --json | jq '.workspaces[].volume'"),
)
@click.option("--all", "every", is_flag=True, help="Include deleted workspaces.")
@settings
def list_(to: Settings, every: bool) -> None:
    """List workspaces and the sandboxes that have them."""
    to.show_answer(
        to.client.get("workspaces", include_deleted="true" if every else None),
        lambda data: _format_list(data["workspaces"]),
    )


def _format_list(workspaces: list[dict[str, Any]]) -> str:
    if not workspaces:
        return "no workspaces"
    return format_table(
        ("NAME", "STATE", "SIZE", "STORAGE", "NODE", "SANDBOX", "AGE"),
        [
            (
                workspace["name"],
                workspace["state"],
                _format_size(workspace["size"]),
                workspace["storage"],
                workspace["node"],
                _format_holder(workspace),
                format_age(workspace["created_at"]),
            )
            for workspace in workspaces
        ],
    )


@workspace.command(usage="<workspace>", examples=("agentlab workspace show project-x",))
@click.argument("name", type=WORKSPACE, metavar="<workspace>")
@settings
def show(to: Settings, name: str) -> None:
    """Show all details of a workspace, by its name or id."""
    to.show_answer(
        to.client.get("workspaces", name),
        lambda data: format_pairs(
            (field.replace("_", " "), _format_size(value) if field == "size" else value)
            for field, value in data.items()
            if field not in _SAID_TWICE
        ),
    )


@workspace.command(
    usage="--size <size> [--storage <storage>] [--node <node>] <workspace>",
    examples=(
        "agentlab workspace new --size 50G --storage local-lvm project-x",
        "agentlab workspace new --size 80G project-x     # enlarge an attached one",
    ),
    notes=(
        "A new workspace is empty: create a file system on it in the first sandbox",
        "that has it. An existing workspace never shrinks, and grows only while it is",
        "attached.",
    ),
)
@click.option("--size", metavar="<size>", help="Size, such as 20G. A number without a unit is in GiB.")
@click.option(
    "--storage", metavar="<storage>", help="Storage of a new workspace. Default: from the daemon's configuration."
)
@click.option("--node", metavar="<node>", help="Node of a new workspace on local storage.")
@click.option("--name", "named", metavar="<workspace>", help="Name of the workspace; the same as the argument.")
@click.argument("name", type=WORKSPACE, metavar="<workspace>", required=False)
@settings
def new(to: Settings, /, **options: Any) -> None:
    """Create a workspace, or enlarge an existing one."""
    named = options.pop("named")
    if (named is None) == (options["name"] is None):
        raise click.UsageError("which workspace? Give its name once: <workspace>, or --name <workspace>")
    options["name"] = options["name"] or named
    if options["size"] is not None:
        options["size"] = _normalise_size(options["size"])
    answer = to.client.post("workspaces", body={name: value for name, value in options.items() if value is not None})
    to.show_answer(
        answer,
        lambda data: (
            f"{_format_name(data)} {'was there already' if data['outcome'] == 'unchanged' else data['outcome']} "
            f"({_format_size(data['size'])} on {format_cell(data['storage'])}, {data['state']})"
        ),
    )


@workspace.command(
    usage="[--ttl <ttl>] <workspace> <vmid>",
    examples=(
        "agentlab workspace attach project-x 1009",
        "agentlab workspace attach --vmid 1009 project-x",
    ),
    notes=(
        "A workspace is attached to one sandbox at a time. When the time is over and",
        "the VM of that sandbox does not run, another sandbox may take the workspace",
        "over.",
    ),
)
@click.option(
    "--vmid",
    "named",
    type=VMID,
    metavar="<vmid>",
    help="VMID of the sandbox; the same as the argument.",
)
@click.option(
    "--ttl",
    metavar="<ttl>",
    help="Time for which the sandbox has the workspace: minutes (120), or 90s, 30m, 2h, 1d12h. Default: the lease of "
    "the sandbox.",
)
@click.argument("name", type=WORKSPACE, metavar="<workspace>")
@click.argument("vmid", type=VMID, metavar="<vmid>", required=False)
@settings
def attach(to: Settings, name: str, vmid: int | None, named: int | None, ttl: str | None) -> None:
    """Attach a workspace to a sandbox."""
    if (vmid is None) == (named is None):
        raise click.UsageError("which sandbox? Give <vmid> once, behind the workspace or as --vmid <vmid>")
    vmid = vmid if vmid is not None else named
    body: dict[str, Any] = (
        {"vmid": vmid} if ttl is None else {"vmid": vmid, "ttl": int(ttl) if ttl.isascii() and ttl.isdecimal() else ttl}
    )
    with Progress(lambda: f"attaching workspace {name}", enabled=not to.json):
        answer = to.client.post("workspaces", name, "attach", body=body)
    to.show_answer(
        answer,
        lambda data: (
            f"{_format_name(data)} attached to sandbox {format_cell(data['vmid'])} as {format_cell(data['device'])}"
        ),
    )


@workspace.command(
    usage="<workspace>",
    examples=("agentlab workspace detach project-x",),
    notes=("Unmount the workspace first if the guest runs.",),
)
@click.argument("name", type=WORKSPACE, metavar="<workspace>")
@settings
def detach(to: Settings, name: str) -> None:
    """Detach a workspace from its sandbox."""
    with Progress(lambda: f"detaching workspace {name}", enabled=not to.json):
        answer = to.client.post("workspaces", name, "detach")
    to.show_answer(answer, lambda data: f"{_format_name(data)} detached")


@workspace.command(
    usage="--force <workspace>",
    examples=("agentlab workspace destroy --force project-x",),
    notes=(
        "The data on the workspace is lost, so --force is required. An attached",
        "workspace is never deleted, even with --force.",
    ),
)
@click.option("--force", is_flag=True, help="Confirm that the data is deleted.")
@click.argument("name", type=WORKSPACE, metavar="<workspace>")
@settings
def destroy(to: Settings, name: str, force: bool) -> None:
    """Delete a workspace and the data on it."""
    with Progress(lambda: f"deleting workspace {name}", enabled=not to.json):
        answer = to.client.post("workspaces", name, "destroy", body={"force": force})
    to.show_answer(answer, lambda data: f"{_format_name(data)} destroyed")
