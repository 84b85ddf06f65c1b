# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``agentlab sandbox``: everything about sandboxes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click

from .client import Client
from .errors import INTERRUPTED, Problem, Unreachable, Usage
from .framework import PROFILE, STATE, VMID, WORKSPACE, Group, Settings, end_command, list_failures, settings
from .inside import cp, exec_, ssh
from .progress import Progress
from .text import format_age, format_cell, format_pairs, format_table, format_time_left, read_terminal_width

# Seconds between requests of --follow, and seconds to wait for a daemon that restarts.
_FOLLOW_EVERY = 1.0
_FOLLOW_PATIENCE = 60
# Maximum number of events in one answer.
_PAGE = 1000

# Maximum number of characters in a file to send. The daemon accepts slightly less.
_LONGEST_USER_DATA = 512 * 1024
_LONGEST_KEYS = 256 * 1024
_LONGEST_PASSWORD = 4096


def vmid_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("vmid", type=VMID, metavar="<vmid>")(function)


@click.group(
    cls=Group,
    examples=(
        "agentlab sandbox new --profile yolo-ephemeral --name agent-1 --ttl 2h",
        "agentlab sandbox list --state RUNNING",
        "agentlab sandbox lease renew --ttl 120 1009",
        "agentlab sandbox destroy --force 1009 1010 1011",
        "agentlab sandbox prune --older-than 24h --dry-run",
    ),
    words={
        **dict.fromkeys(("ls", "ps"), "list"),
        **dict.fromkeys(("get", "info", "inspect", "describe"), "show"),
        **dict.fromkeys(("logs", "log"), "events"),
        "create": "new",
        "unpause": "resume",
        "pause": "suspend",
    },
    meant={
        **dict.fromkeys(("rm", "delete", "del", "remove", "kill", "terminate"), "agentlab sandbox destroy <vmid>"),
        **dict.fromkeys(("shutdown", "halt", "poweroff"), "agentlab sandbox stop <vmid>"),
        **dict.fromkeys(("restart", "reboot"), "agentlab sandbox stop <vmid>, then agentlab sandbox start <vmid>"),
        **dict.fromkeys(("renew", "extend"), "agentlab sandbox lease renew --ttl <ttl> <vmid>"),
        **dict.fromkeys(
            ("console", "shell"), "agentlab sandbox exec <vmid> -- <command>, or agentlab sandbox ssh <vmid>"
        ),
    },
)
def sandbox() -> None:
    """Create, show, use and destroy sandboxes."""


# ---- looking ----


@sandbox.command(
    "list",
    usage="[--state <state>] [--profile <profile>] [--tag <tag>] [--all]",
    examples=(
        "agentlab sandbox list",
        "agentlab sandbox list --state TIMEOUT --state STOPPED",
        "agentlab --json sandbox list | jq -r '.sandboxes[].ip'",
    ),
)
@click.option(
    "--state",
    "states",
    type=STATE,
    metavar="<state>",
    multiple=True,
    help=f"List only sandboxes in this state: {', '.join(STATE.valid)}. May be repeated.",
)
@click.option("--profile", type=PROFILE, metavar="<profile>", help="List only sandboxes of this profile.")
@click.option(
    "--tag",
    "tags",
    metavar="<tag>",
    multiple=True,
    help="List only sandboxes with this tag. May be repeated; one of the tags is enough.",
)
@click.option("--all", "every", is_flag=True, help="Include destroyed sandboxes.")
@settings
def list_(to: Settings, states: tuple[str, ...], profile: str | None, tags: tuple[str, ...], every: bool) -> None:
    """List sandboxes.

    LEASE is the time until the lease ends. Destroyed sandboxes are listed only with --all or --state DESTROYED.
    """
    answer = to.client.get(
        "sandboxes", state=states, profile=profile, tag=tags, include_destroyed="true" if every else None
    )
    to.show_answer(answer, lambda data: _format_list(data["sandboxes"]))


def _format_list(sandboxes: list[dict[str, Any]]) -> str:
    if not sandboxes:
        return "no sandboxes"
    return format_table(
        ("VMID", "NAME", "STATE", "NODE", "IP", "PROFILE", "LEASE", "AGE", "TAGS"),
        [
            (
                row["vmid"],
                row["name"],
                row["state"],
                row["node"],
                row["ip"],
                row["profile"],
                _format_lease(row),
                format_age(row["created_at"]),
                row["tags"],
            )
            for row in sandboxes
        ],
        width=read_terminal_width(),
        droppable=("TAGS", "NODE", "PROFILE", "AGE"),
    )


def _format_lease(sandbox: dict[str, Any]) -> str:
    if sandbox["state"] == "DESTROYED":
        return "-"
    return format_time_left(sandbox["lease_expires_at"]) + (" (keepalive)" if sandbox["keepalive"] else "")


@sandbox.command(usage="<vmid>", examples=("agentlab sandbox show 1009",))
@vmid_argument
@settings
def show(to: Settings, vmid: int) -> None:
    """Show all details of a sandbox."""
    to.show_answer(to.client.get("sandboxes", vmid), lambda data: format_pairs(_list_fields(to.client, data)))


def _list_fields(client: Client, data: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in data.items():
        rows.append((name.replace("_", " "), value))
        if name == "lease_expires_at":
            rows.append(("time left", _format_lease(data)))
        elif name == "workspace_id" and value:
            rows.append(("workspace", _read_workspace_name(client, str(value))))
    return rows


def _read_workspace_name(client: Client, workspace: str) -> str | None:
    """Return the name of a workspace, or None if it cannot be read."""
    try:
        return str(client.get("workspaces", workspace).data["name"])
    except (Problem, KeyError, TypeError):
        return None


@sandbox.command(
    usage="[--follow] [--tail <n>] <vmid>",
    examples=(
        "agentlab sandbox events 1009",
        "agentlab sandbox events --follow 1009",
        "agentlab sandbox events 1009 --tail 5 --json",
    ),
)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Show new events as they happen, until the sandbox is DESTROYED or Ctrl-C is pressed.",
)
@click.option("--tail", type=click.IntRange(1, _PAGE), metavar="<n>", help="Show only the last n events.")
@vmid_argument
@settings
def events(to: Settings, vmid: int, follow: bool, tail: int | None) -> None:
    """Show the events of a sandbox.

    Each line has the time, the operation, the change of state, the outcome, the user and the reason. With --json and
    --follow, each line is one answer.
    """
    try:
        _show_events(to, vmid, follow, tail)
    except KeyboardInterrupt:
        # Ctrl-C is the normal end of --follow: no error message, and the exit status that a shell expects.
        if not follow:
            raise
        sys.exit(INTERRUPTED)


def _show_events(to: Settings, vmid: int, follow: bool, tail: int | None) -> None:
    """Print the events, and with ``follow`` further events until the sandbox is destroyed."""
    answer = to.client.get("sandboxes", vmid, "events", tail=tail)
    while True:
        shown = answer.data.get("events") or []
        if shown or not follow or not answer.ok:
            to.show_answer(answer, _format_events)
            sys.stdout.flush()
        more = len(shown) >= _PAGE and tail is None
        if not more and (not follow or (shown and shown[-1].get("to_state") == "DESTROYED")):
            return
        after = answer.data.get("last_id") or 0
        if not more:
            time.sleep(_FOLLOW_EVERY)
        answer = _retry_while_away(lambda after=after: to.client.get("sandboxes", vmid, "events", after=after))  # type: ignore[misc]


def _retry_while_away(ask: Callable[[], Any]) -> Any:
    """Repeat a request while the daemon is away, for example during a restart."""
    gives_up, announced = time.monotonic() + _FOLLOW_PATIENCE, False
    while True:
        try:
            return ask()
        except Unreachable:
            if time.monotonic() > gives_up:
                raise
            if not announced:
                click.echo("the daemon is away; waiting for it", err=True)
                announced = True
            time.sleep(_FOLLOW_EVERY)


def _format_events(data: dict[str, Any]) -> str:
    lines = []
    for event in data["events"]:
        before, after = event["from_state"], event["to_state"]
        change = f"{before} -> {after}" if before and after and before != after else format_cell(after or before)
        why = f"  {format_cell(event['reason'])}" if event["reason"] else ""
        lines.append(
            f"{format_cell(event['at'])}  {format_cell(event['operation']):<13}  {change:<28}  "
            f"{format_cell(event['outcome']):<11}  {format_cell(event['actor'])}{why}"
        )
    return "\n".join(lines) or "no events"


# ---- creating ----


@sandbox.command(
    usage="[OPTIONS]",
    examples=(
        "agentlab sandbox new --profile yolo-ephemeral --name agent-1",
        "agentlab sandbox new --template debian-13 --ttl 2h --cores 4 --memory 8192",
        "agentlab sandbox new --template 9000 --ip-config ip=dhcp --wait-for-ip",
        "agentlab sandbox new --ssh-public-keys ~/.ssh/id_ed25519.pub --tag ci",
    ),
    notes=(
        "An option that is not given gets its value from the profile, then from the",
        "daemon's configuration, then from the template. To finish an interrupted",
        "creation, run the command again with the same --vmid or --name.",
    ),
)
@click.option("--name", metavar="<name>", help="Name of the sandbox: letters, digits and hyphens.")
@click.option(
    "--profile", type=PROFILE, metavar="<profile>", help="Profile of the sandbox; see 'agentlab profile list'."
)
@click.option("--template", metavar="<template>", help="VMID or name of the template to clone.")
@click.option(
    "--vmid", type=VMID, metavar="<vmid>", help="VMID of the sandbox. Default: a free VMID of the configured range."
)
@click.option("--ttl", metavar="<ttl>", help="Length of the lease: minutes (120), or 90s, 30m, 2h, 1d12h.")
@click.option("--keepalive", is_flag=True, default=None, help="Renew the lease automatically when it runs out.")
@click.option("--workspace", type=WORKSPACE, metavar="<workspace>", help="Workspace to attach.")
@click.option("--node", metavar="<node>", help="Node of the cluster; auto chooses the most suitable node.")
@click.option("--pool", metavar="<pool>", help="Resource pool of Proxmox VE.")
@click.option("--storage", metavar="<storage>", help="Storage for the disks of a full clone.")
@click.option(
    "--full-clone/--linked-clone",
    default=None,
    help="Copy the template's disks, or share them (the default of Proxmox VE).",
)
@click.option("--cores", type=click.IntRange(1), metavar="<n>", help="Number of cores.")
@click.option("--memory", type=click.IntRange(16), metavar="<MiB>", help="Memory in MiB.")
@click.option("--cpu-type", metavar="<type>", help="CPU type, such as host or x86-64-v2-AES.")
@click.option(
    "--disk-size",
    metavar="<size>",
    help="Size of the boot disk, such as 20G. +10G adds to the size of the template's disk. A disk never shrinks.",
)
@click.option("--bridge", metavar="<bridge>", help="Network bridge of the first interface.")
@click.option("--network-model", metavar="<model>", help="Model of the first interface, such as virtio.")
@click.option("--vlan-tag", type=click.IntRange(1, 4094), metavar="<n>", help="VLAN of the first interface.")
@click.option("--second-bridge", metavar="<bridge>", help="Network bridge of a second interface.")
@click.option("--second-vlan-tag", type=click.IntRange(1, 4094), metavar="<n>", help="VLAN of the second interface.")
@click.option(
    "--second-ip-config", metavar="<config>", help="Cloud-init network configuration of the second interface."
)
@click.option(
    "--firewall/--no-firewall",
    default=None,
    help="Switch the firewall of Proxmox VE on or off for the first interface.",
)
@click.option("--firewall-group", metavar="<group>", help="Security group to add to the rules of the VM's firewall.")
@click.option("--cloud-init-user", metavar="<user>", help="User that cloud-init creates.")
@click.option(
    "--cloud-init-password",
    type=click.File("r"),
    metavar="<file>",
    help="File with the password of that user (- for standard input).",
)
@click.option(
    "--cloud-init-upgrade/--no-cloud-init-upgrade",
    default=None,
    help="Let cloud-init upgrade the packages at the first start, or not.",
)
@click.option(
    "--cloud-init-vendor-data", metavar="<volume>", help="Snippet with vendor data, such as local:snippets/vendor.yaml."
)
@click.option(
    "--ip-config",
    metavar="<config>",
    help="Cloud-init network configuration, such as ip=dhcp or ip=192.0.2.10/24,gw=192.0.2.1.",
)
@click.option("--nameserver", metavar="<addresses>", help="Cloud-init name servers, separated by spaces or commas.")
@click.option("--searchdomain", metavar="<domain>", help="Cloud-init DNS search domain.")
@click.option(
    "--ssh-public-keys",
    type=click.File("r"),
    multiple=True,
    metavar="<file>",
    help="File with SSH public keys, one on each line (- for standard input). May be repeated.",
)
@click.option(
    "--cloud-init-user-data",
    type=click.File("r"),
    metavar="<file>",
    help="File with cloud-init user data (- for standard input).",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="<tag>",
    help="Tag of the sandbox and its VM. May be repeated, or have several tags separated by commas.",
)
@click.option("--description", metavar="<text>", help="Text for the notes of the VM in Proxmox VE.")
@click.option(
    "--update",
    is_flag=True,
    default=None,
    help="If the sandbox exists, change its cores, memory, tags and description where they differ.",
)
@click.option(
    "--allow-restart",
    is_flag=True,
    default=None,
    help="Allow --update to stop and start the VM, which a change of cores or memory requires.",
)
@click.option(
    "--protected", is_flag=True, default=None, help="Protect the sandbox from every destroy, with or without --force."
)
@click.option("--wait-for-ip", is_flag=True, default=None, help="Wait until the guest agent reports an address.")
@click.option(
    "--wait-for-cloud-init",
    is_flag=True,
    default=None,
    help="Wait until cloud-init has ended. If it ends with errors, the sandbox becomes FAILED.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    default=None,
    help="Create nothing. Show what would be created, on which node, and why the other nodes were not chosen.",
)
@settings
def new(to: Settings, /, **options: Any) -> None:
    """Create a sandbox and start it.

    The command waits until the sandbox runs, and prints its VMID. If the sandbox does not start, the command fails.
    """
    body = {name: value for name, value in options.items() if value is not None and value != ()}
    _put_ttl(body, body.pop("ttl", None))
    if "workspace" in body:
        body["workspace_id"] = body.pop("workspace")
    if "tags" in body:
        body["tags"] = list(body["tags"])
    if "ssh_public_keys" in body:
        body["ssh_public_keys"] = [key for file in body["ssh_public_keys"] for key in _read_keys(file)]
    if "cloud_init_password" in body:
        body["cloud_init_password"] = _read_file(
            "--cloud-init-password", body["cloud_init_password"], _LONGEST_PASSWORD
        ).rstrip("\r\n")
    if "cloud_init_user_data" in body:
        body["cloud_init_user_data"] = _read_file(
            "--cloud-init-user-data", body["cloud_init_user_data"], _LONGEST_USER_DATA
        )
    label = f"sandbox {body.get('vmid') or body.get('name') or ''}".strip()
    with Progress(lambda: _read_state(to.client, label, body.get("vmid"), body.get("name")), enabled=not to.json):
        answer = to.client.post("sandboxes", body=body)
    to.show_answer(answer, _format_plan if body.get("dry_run") else _format_creation)
    _show_warnings(to, answer.data)


def _format_plan(data: dict[str, Any]) -> str:
    """Return the result of a dry run: the node, and a line for each node that could have been chosen."""
    if data.get("outcome") != "would_create":
        return _format_creation(data)
    lines = [
        f"sandbox {format_cell(data['vmid'])} would be created (name={format_cell(data['name'])}, "
        f"node={format_cell(data['node'])})",
        *(
            f"  {'*' if node['chosen'] else '-'} {format_cell(node['node'])}: {format_cell(node['message'])}"
            for node in (data.get("placement") or {}).get("nodes", ())
        ),
    ]
    return "\n".join(lines)


def _format_creation(data: dict[str, Any]) -> str:
    verb = {"created": "created", "updated": "was there already, and was updated"}.get(
        data.get("outcome", "created"), "was there already"
    )
    return (
        f"sandbox {format_cell(data['vmid'])} {verb} (name={format_cell(data['name'])}, "
        f"state={format_cell(data['state'])}, ip={format_cell(data['ip'])}, "
        f"lease until {format_cell(data['lease_expires_at'])})"
    )


def _show_warnings(to: Settings, *items: dict[str, Any]) -> None:
    """Print warnings of Proxmox, beside the answer."""
    for item in items:
        for warning in () if to.json else item.get("warnings") or ():
            click.echo(f"Warning: sandbox {format_cell(item.get('vmid'))}: {format_cell(warning)}", err=True)


def _read_file(option: str, file: Any, longest: int) -> str:
    """Return the text of a file with at most ``longest`` characters. Reads no more, because a device has no end."""
    try:
        text = str(file.read(longest + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{option}: {file.name} cannot be read as text: {error}. Give a text file in UTF-8") from error
    if len(text) > longest:
        raise click.UsageError(
            f"{option}: {file.name} is larger than {longest // 1024} KiB. Give a smaller file; let it fetch what is "
            "large"
        )
    return text


def _read_keys(file: Any) -> list[str]:
    """Return the keys in a file, one from each line.

    Raises UsageError for a file without a key: nobody could log in to the sandbox.
    """
    lines = [line.strip() for line in _read_file("--ssh-public-keys", file, _LONGEST_KEYS).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise click.UsageError(
            f"--ssh-public-keys: {file.name} holds no key; give the file with the public key, such as "
            "~/.ssh/id_ed25519.pub, or leave the option out"
        )
    return keys


def _put_ttl(body: dict[str, Any], ttl: str | None) -> None:
    """Put the ttl into the body. A plain number is in minutes, which has a field of its own."""
    if ttl is not None:
        text = ttl.strip()
        whole = text.isascii() and text.isdecimal() and 0 < int(text[:10]) < 10**9
        body.update({"ttl_minutes": int(text)} if whole else {"ttl": text})


def _read_state(client: Client, label: str, vmid: int | None, name: str | None) -> str:
    """Return the state of a sandbox as a line of progress. ``label`` names a sandbox that is not listed yet."""
    for sandbox in client.get("sandboxes").data["sandboxes"]:
        if sandbox["vmid"] == vmid or (vmid is None and name is not None and sandbox["name"] == name):
            return f"sandbox {sandbox['vmid']}: {sandbox['state']}"
    return f"{label}: waiting"


# ---- power ----


def _change_power(to: Settings, vmid: int, action: str, body: dict[str, Any] | None = None) -> None:
    with Progress(lambda: _read_state(to.client, f"sandbox {vmid}", vmid, None), enabled=not to.json):
        answer = to.client.post("sandboxes", vmid, action, body=body)
    to.show_answer(
        answer,
        lambda data: (
            f"sandbox {format_cell(data['vmid'])} is {format_cell(data['state'])}"
            + (f" at {format_cell(data['ip'])}" if (body or {}).get("wait_for_ip") else "")
        ),
    )
    _show_warnings(to, answer.data)


wait_for_ip_option = click.option("--wait-for-ip", is_flag=True, help="Wait until the guest agent reports an address.")


@sandbox.command(
    usage="[--wait-for-ip] <vmid>",
    examples=("agentlab sandbox start 1009", "agentlab sandbox start --wait-for-ip 1009"),
)
@wait_for_ip_option
@vmid_argument
@settings
def start(to: Settings, vmid: int, wait_for_ip: bool) -> None:
    """Start a sandbox that is STOPPED or SUSPENDED."""
    _change_power(to, vmid, "start", {"wait_for_ip": True} if wait_for_ip else None)


@sandbox.command(
    usage="[--force] <vmid> | --all",
    examples=("agentlab sandbox stop 1009", "agentlab sandbox stop --all"),
    notes=(
        "A sandbox in TIMEOUT is refused: the daemon itself stops its VM, and prune",
        "looks for that state. The memory of a hibernated VM is saved on a disk.",
        "Stopping such a VM discards the saved memory, and requires --force.",
    ),
)
@click.option("--force", is_flag=True, help="Discard the saved memory of a hibernated VM.")
@click.option("--all", "every", is_flag=True, help="Stop every running or paused sandbox.")
@click.argument("vmid", type=VMID, required=False, metavar="<vmid>")
@settings
def stop(to: Settings, vmid: int | None, every: bool, force: bool) -> None:
    """Shut down a sandbox.

    A VM that does not shut down in time is switched off.
    """
    if every == (vmid is not None):
        raise click.UsageError("which sandbox? Give <vmid>, or --all for every one that runs")
    if every and force:
        raise click.UsageError("--force throws saved memory away, so it is for one <vmid> at a time, not for --all")
    if vmid is not None:
        _change_power(to, vmid, "stop", {"force": True} if force else None)
        return
    with Progress(lambda: "stopping every sandbox", enabled=not to.json):
        answer = to.client.post("sandboxes", "stop_all", body={})
    to.show_answer(
        answer,
        lambda data: f"stopped {format_cell(data['stopped'])} sandbox(es), {format_cell(data['skipped'])} did not run",
    )
    failed = [result for result in answer.data.get("results") or [] if result.get("result") == "failed"]
    end_command(
        int(answer.data.get("stopped") or 0), [(result.get("vmid"), str(result.get("error"))) for result in failed]
    )


@sandbox.command(usage="<vmid>", examples=("agentlab sandbox suspend 1009",))
@vmid_argument
@settings
def suspend(to: Settings, vmid: int) -> None:
    """Suspend a sandbox that is READY or RUNNING; 'start' resumes it."""
    _change_power(to, vmid, "suspend")


@sandbox.command(usage="[--wait-for-ip] <vmid>", hidden=True, examples=("agentlab sandbox resume 1009",))
@wait_for_ip_option
@vmid_argument
@settings
def resume(to: Settings, vmid: int, wait_for_ip: bool) -> None:
    """Resume a sandbox that is SUSPENDED."""
    _change_power(to, vmid, "resume", {"wait_for_ip": True} if wait_for_ip else None)


# ---- what protects it, and what keeps it alive ----


def _change_record(to: Settings, vmid: int, action: str, text: str, body: dict[str, Any] | None = None) -> None:
    answer = to.client.post("sandboxes", vmid, action, body=body)
    to.show_answer(
        answer,
        lambda data: f"sandbox {format_cell(data['vmid'])} {text}" + ("" if data.get("changed", True) else " already"),
    )


@sandbox.command(
    usage="<vmid>",
    examples=("agentlab sandbox protect 1009",),
    notes=(
        "The lease still ends. The sandbox is then stopped, but not destroyed.",
        "'unprotect' removes the protection.",
    ),
)
@vmid_argument
@settings
def protect(to: Settings, vmid: int) -> None:
    """Protect a sandbox from every destroy, with or without --force."""
    _change_record(to, vmid, "protect", "is protected")


@sandbox.command(usage="<vmid>", examples=("agentlab sandbox unprotect 1009",))
@vmid_argument
@settings
def unprotect(to: Settings, vmid: int) -> None:
    """Remove the protection of a sandbox."""
    _change_record(to, vmid, "unprotect", "is not protected")


@sandbox.command(
    usage="on|off <vmid>", examples=("agentlab sandbox keepalive on 1009", "agentlab sandbox keepalive off 1009")
)
@click.argument("switch", type=click.Choice(["on", "off"]), metavar="on|off")
@vmid_argument
@settings
def keepalive(to: Settings, switch: str, vmid: int) -> None:
    """Switch automatic renewal of a sandbox's lease on or off."""
    _change_record(to, vmid, "keepalive", f"has keepalive {switch}", {"keepalive": switch == "on"})


# ---- destroying ----


@sandbox.command(
    usage="[--force] <vmid> [<vmid> ...]",
    examples=(
        "agentlab sandbox destroy 1009",
        "agentlab sandbox destroy --force 1009",
        "agentlab sandbox destroy --force 1009 1010 1011",
    ),
    notes=(
        "Without --force a sandbox must be STOPPED.",
        "--force bypasses the state and the graceful shutdown. It bypasses neither",
        "the proof that the VM belongs to the sandbox, nor the protection.",
        "If one of several VMIDs does not exist, no sandbox is destroyed. Otherwise a",
        "failure stops no other destroy, and each sandbox gets its own line.",
        "Exit status 4: some sandboxes were destroyed, others were not.",
    ),
)
@click.option("--force", is_flag=True, help="Destroy the sandbox in any state, without a graceful shutdown.")
@click.argument("vmids", type=VMID, nargs=-1, required=True, metavar="<vmid> [<vmid> ...]")
@settings
def destroy(to: Settings, vmids: tuple[int, ...], force: bool) -> None:
    """Destroy sandboxes and their VMs.

    The answer names the previous state of each sandbox.
    """
    ordered_vmids = list(dict.fromkeys(vmids))
    if len(ordered_vmids) == 1:
        with Progress(
            lambda: _read_state(to.client, f"sandbox {ordered_vmids[0]}", ordered_vmids[0], None), enabled=not to.json
        ):
            answer = to.client.post("sandboxes", ordered_vmids[0], "destroy", body={"force": force})
        to.show_answer(answer, _format_destruction)
        _show_fates(to, answer.data)
        _show_warnings(to, answer.data)
        return
    with Progress(lambda: _count_destroyed(to.client, ordered_vmids), enabled=not to.json):
        answer = to.client.post("sandboxes", "destroy", body={"vmids": ordered_vmids, "force": force})
    if answer.data.get("code") == "not_found" and not to.json:
        raise Problem(f"{answer.data['error']} (vmid {answer.data.get('vmid')}); nothing was destroyed")
    failed = [result for result in answer.data.get("results") or [] if result.get("failed")]
    to.show_answer(
        answer,
        lambda data: "\n".join(_format_destruction(result) for result in data["results"] if not result["failed"]),
    )
    _show_fates(to, *answer.data.get("results") or [])
    _show_warnings(to, *answer.data.get("results") or [])
    end_command(len(answer.data.get("results") or []) - len(failed), list_failures(failed))


def _format_destruction(data: dict[str, Any]) -> str:
    return f"sandbox {format_cell(data['vmid'])} destroyed (state={format_cell(data['previous_state'])})"


# Notes about VMs that this command did not delete, by reason.
_FATES = {
    "vm_absent": "Note: sandbox {vmid}: its VM was already gone",
    "vmid_reused": "Note: sandbox {vmid}: its VM was already gone; VMID {vmid} is somebody else's VM now, and was "
    "left alone",
    "never_created": "Note: sandbox {vmid}: its VM was never made",
}


def _show_fates(to: Settings, *items: dict[str, Any]) -> None:
    """Print a note about VMs that this command did not delete. It stands beside the answer, whose text is fixed."""
    for item in () if to.json else items:
        fate = _FATES.get(str(item.get("reason")))
        if fate and not item.get("failed") and item.get("changed", True):
            click.echo(fate.format(vmid=format_cell(item.get("vmid"))), err=True)


def _count_destroyed(client: Client, vmids: list[int]) -> str:
    """Return the progress of a destroy of several sandboxes as a line."""
    remaining = {
        sandbox["vmid"] for sandbox in client.get("sandboxes").data["sandboxes"] if sandbox["state"] != "DESTROYED"
    }
    return f"destroying: {sum(1 for vmid in vmids if vmid not in remaining)} of {len(vmids)} done"


# ---- leases ----


@sandbox.group(examples=("agentlab sandbox lease renew --ttl 120 1009",))
def lease() -> None:
    """Renew the lease of a sandbox."""


@lease.command(
    usage="--ttl <ttl> <vmid>",
    examples=(
        "agentlab sandbox lease renew --ttl 120 1009       # two hours from now",
        "agentlab sandbox lease renew --ttl 1d12h 1009",
    ),
    notes=(
        "The new lease lasts --ttl from now. A lease that ends later stays unchanged,",
        "unless --allow-shorten is given. Only a RUNNING sandbox whose lease has not",
        "ended can be renewed. A configured maximum lifetime limits the lease: check",
        "the time in the answer.",
    ),
)
@click.option(
    "--ttl", metavar="<ttl>", help="Length of the lease from now: minutes (120), or 90s, 30m, 2h, 1d12h. Required."
)
@click.option(
    "--min-remaining",
    metavar="<time>",
    help="Renew only if less than this time is left. The command can then be repeated safely.",
)
@click.option("--allow-shorten", is_flag=True, help="Renew the lease even if it becomes shorter.")
@click.argument("vmid", type=VMID, required=False, metavar="<vmid>")
@click.pass_context
def renew(
    ctx: click.Context, ttl: str | None, min_remaining: str | None, allow_shorten: bool, vmid: int | None
) -> None:
    """Renew the lease of a sandbox."""
    if ttl is None:
        _refuse_missing_ttl(ctx)
    if vmid is None:
        ctx.fail("which sandbox? <vmid> is missing")
    to = ctx.ensure_object(Settings)
    body: dict[str, Any] = {}
    _put_ttl(body, ttl)
    if min_remaining is not None:
        body["min_remaining"] = min_remaining
    if allow_shorten:
        body["allow_shorten"] = True
    answer = to.client.post("sandboxes", vmid, "lease", "renew", body=body)
    same = answer.data.get("changed") is False
    to.show_answer(
        answer,
        lambda data: (
            f"sandbox {format_cell(data['vmid'])} lease {'lasts' if same else 'renewed'} until "
            f"{format_cell(data['lease_expires_at'])}"
        ),
    )
    if same:
        click.echo("Note: unchanged, because it lasts that long already; --allow-shorten lets it end sooner", err=True)
    if answer.data.get("capped"):
        click.echo("Note: shorter than asked for, because the maximum lifetime of this sandbox ends then", err=True)


def _refuse_missing_ttl(ctx: click.Context) -> NoReturn:
    raise Usage(
        f"Usage: {ctx.command_path} --ttl <ttl> <vmid>\n"
        "Note: Flags must come before vmid argument (e.g., --ttl 120 1009)\n"
        "ttl is required. Flags must come before vmid (e.g., --ttl 120 1009)"
    )


# ---- what is over, and what has drifted ----


@sandbox.command(
    usage="[--older-than <age>] [--dry-run] [OPTIONS]",
    examples=(
        "agentlab sandbox prune               # pruned 5 sandbox(es)",
        "agentlab sandbox prune --dry-run     # what would go, and why the rest stays",
        "agentlab sandbox prune --older-than 24h",
    ),
    notes=(
        "A sandbox whose VM is proven to be its own is destroyed with the VM. If the",
        "VM is proven to be gone, only the record becomes DESTROYED. Every other",
        "sandbox is kept, and named on standard error with the reason.",
        "Exit status 4: some sandboxes were pruned, others failed. A sandbox that is",
        "kept is not a failure.",
    ),
)
@click.option(
    "--older-than",
    metavar="<age>",
    help="Prune only sandboxes that are in their state for longer than this: minutes (120), or 30m, 24h, 7d.",
)
@click.option("--dry-run", is_flag=True, help="Prune nothing. Show what would be pruned.")
@click.option(
    "--state",
    "states",
    type=STATE,
    metavar="<state>",
    multiple=True,
    help="State to prune: TIMEOUT (the default), COMPLETED, FAILED or STOPPED. May be repeated.",
)
@click.option(
    "--tag",
    "tags",
    metavar="<tag>",
    multiple=True,
    help="Prune only sandboxes with this tag. May be repeated; one of the tags is enough.",
)
@click.option(
    "--max-count",
    type=click.IntRange(0),
    metavar="<n>",
    help="Prune nothing if more than this number of sandboxes would be pruned.",
)
@settings
def prune(to: Settings, /, **options: Any) -> None:
    """Destroy sandboxes whose lease has ended (state TIMEOUT)."""
    body = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None and value is not False and value != ()
    }
    dry_run = bool(body.get("dry_run"))
    with Progress(_Pruning(to.client), enabled=not to.json and not dry_run):
        answer = to.client.post("sandboxes", "prune", body=body or None)
    _show_warnings(to, *answer.data.get("pruned") or [])
    if dry_run:
        to.show_answer(answer, _format_prune_plan)
    else:
        to.show_answer(answer, lambda data: f"pruned {format_cell(data['count'])} sandbox(es)")
        if not to.json:
            for kept in answer.data.get("kept") or []:
                click.echo(f"kept {format_cell(kept.get('vmid'))}: {_format_reason(kept)}", err=True)
    if not dry_run:
        end_command(len(answer.data.get("pruned") or []), list_failures(answer.data.get("failed")))


def _format_reason(item: dict[str, Any]) -> str:
    return format_cell(item.get("reason")) + (f" - {format_cell(item['message'])}" if item.get("message") else "")


def _format_prune_plan(data: dict[str, Any]) -> str:
    return f"would prune {format_cell(data['count'])} sandbox(es)" + format_plan(
        {"prune": data["pruned"], "keep": data["kept"], "cannot": data["failed"]}
    )


def format_plan(items: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table with the outcome and reason of each sandbox, to print below the count; "" without sandboxes."""
    rows = [
        (action, sandbox["vmid"], sandbox["name"], sandbox["previous_state"], _format_reason(sandbox))
        for action, sandboxes in items.items()
        for sandbox in sandboxes
    ]
    return f"\n\n{format_table(('', 'VMID', 'NAME', 'STATE', 'WHY'), rows)}" if rows else ""


class _Pruning:
    """The progress of a prune: the share of the sandboxes initially in TIMEOUT that have left that state."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.initial: set[str] = set()

    def __call__(self) -> str:
        remaining = {sandbox["uuid"] for sandbox in self.client.get("sandboxes", state="TIMEOUT").data["sandboxes"]}
        self.initial = self.initial or remaining
        return f"pruning: {len(self.initial - remaining)} of {len(self.initial)} done"


@sandbox.command(
    usage="[--apply [--adopt-cluster]]",
    examples=(
        "agentlab sandbox reconcile             # report",
        "agentlab sandbox reconcile --apply     # repair",
    ),
    notes=(
        "The daemon also reconciles at its interval. If a node cannot be reached, the",
        "records of its sandboxes stay unchanged. A VM without a record is reported",
        "and never adopted. If a large share of the sandboxes is absent at once,",
        "nothing is written.",
    ),
)
@click.option("--apply", is_flag=True, help="Repair the differences. Without this option, only report them.")
@click.option("--dry-run", is_flag=True, help="Only report the differences: the default without --apply.")
@click.option(
    "--adopt-cluster",
    is_flag=True,
    help="With --apply: note that the records belong to this cluster. Needed when the cluster has a new certificate "
    "authority, or when a single node joined a cluster.",
)
@settings
def reconcile(to: Settings, apply: bool, dry_run: bool, adopt_cluster: bool) -> None:
    """Find and repair drift between the records and Proxmox VE.

    The report names each difference and its repair.
    """
    if apply and dry_run:
        raise click.UsageError("--dry-run contradicts --apply; give one of the two")
    with Progress(lambda: "reconciling", enabled=not to.json):
        answer = to.client.post(
            "sandboxes", "reconcile", body={"apply": apply, **({"adopt_cluster": True} if adopt_cluster else {})}
        )
    to.show_answer(answer, lambda data: _format_drift(data["drift"], apply))
    failed = [difference for difference in answer.data.get("drift") or [] if difference.get("error")]
    end_command(
        sum(1 for difference in answer.data.get("drift") or [] if difference.get("applied")),
        [(difference.get("vmid"), str(difference["error"])) for difference in failed],
    )


def _format_drift(drift: list[dict[str, Any]], apply: bool) -> str:
    if not drift:
        return "no drift: the records and Proxmox VE agree"
    # Reconcile only notes the first absence of a VM; a second pass repairs the record.
    observed = sum(1 for difference in drift if difference["applied"] and str(difference["action"]).startswith("noted"))
    repaired = sum(1 for difference in drift if difference["applied"]) - observed
    head = f"{len(drift)} difference(s)" + (
        f", {repaired} repaired" + (f", {observed} noted" if observed else "") if apply else "; repair with --apply"
    )
    rows = [
        (
            difference["vmid"],
            difference["state"],
            difference["kind"],
            difference["action"] + (" (done)" if difference["applied"] else ""),
            difference["evidence"],
        )
        for difference in drift
    ]
    return f"{head}\n\n{format_table(('VMID', 'STATE', 'WHAT', 'ACTION', 'EVIDENCE'), rows)}"


# ---- inside ----

for command in (exec_, cp, ssh):
    sandbox.add_command(command)
