# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The commands that are not about one sandbox: status, the cleanup rules, profiles, completion."""

from __future__ import annotations

from typing import Any

import click

from . import COMPLETE_VARIABLE, NAME, __version__
from .framework import Command, Group, Settings, end_command, list_failures, settings
from .progress import Progress
from .text import format_cell, format_duration, format_pairs, format_table, read_terminal_width


@click.command(cls=Command, usage="", examples=("agentlab status", "agentlab status --json | jq .cleanup.frozen"))
@settings
def status(to: Settings) -> None:
    """Show the state of the daemon and its next scheduled runs."""
    to.show_answer(to.client.get("status"), _format_status)


def _format_status(data: dict[str, Any]) -> str:
    database, proxmox, cleanup = data["database"], data["proxmox"], data["cleanup"]
    operations, config = data["operations"], data["config"]
    by_state = {state: count for state, count in database["by_state"].items() if count}
    text = format_pairs(
        [
            (
                "daemon",
                f"agentlabd {data['version']}, up {format_duration(data['uptime_seconds'])} "
                f"(since {data['started_at']})",
            ),
            ("sandboxes", by_state or "none"),
            ("database", f"{database['path']} (schema {database['schema']})"),
            ("Proxmox VE", f"{proxmox['where']}: {_format_reachability(proxmox)}"),
            ("expiry", _format_turn(data["expiry"])),
            ("reconcile", _format_turn(data["reconcile"])),
            (
                "cleanup",
                f"{cleanup['mode']}, {_format_turn(cleanup)}{_format_outcome(cleanup['last_result'])}"
                if cleanup["enabled"]
                else "off",
            ),
            ("operations", f"{operations['in_progress']} in progress, {operations['interrupted']} interrupted"),
            ("configuration", f"{config['path'] or 'no file'} (read {config['loaded_at']})"),
        ]
    )
    if cleanup["frozen"]:
        frozen = cleanup["frozen"]
        text += (
            f"\n\nThe scheduled cleanup is FROZEN since {format_cell(frozen['at'] or 'an unknown time')} by "
            f"{format_cell(frozen['actor'] or 'somebody')}: {format_cell(frozen['reason'])}\n"
            "  agentlab cleanup run --dry-run    # what would go; where a guard would stop "
            "it again, raise the guard first\n  agentlab cleanup release          # go on"
        )
    for condition in data.get("conditions") or []:
        text += (
            f"\n\n{format_cell(condition['part'])} {format_cell(condition['condition']).upper()} since "
            f"{format_cell(condition['since'])}: {format_cell(condition['why'])}\n"
            f"  {format_cell(condition['todo'])}"
        )
    if config["error"]:
        text += (
            "\n\nThe configuration could not be reloaded, the one before it is in force: "
            f"{format_cell(config['error'])}"
        )
    return text


def _format_reachability(proxmox: dict[str, Any]) -> str:
    if proxmox["reachable"] is None:
        return "not asked yet"
    return "reachable" if proxmox["reachable"] else f"NOT reachable: {proxmox['last_error']}"


def _format_turn(job: dict[str, Any]) -> str:
    text = f"last {job['last_run'] or 'never'}, next {job['next_run'] or 'not planned'}"
    return text + (f"; failed: {job['last_error']}" if job.get("last_error") else "")


def _format_outcome(result: dict[str, Any] | None) -> str:
    """Return the result of the last run of the rules; in shadow mode, what that run would have done."""
    if not result:
        return ""
    if "message" in result:
        return f"; {result['message']}"
    failed = f", {result['failed']} failed" if result["failed"] else ""
    verb = "would have cleaned up" if result["result"] == "shadow" else "cleaned up"
    return f"; {verb} {result['count']} sandbox(es), kept {result['kept']}{failed}"


@click.group(
    cls=Group,
    examples=(
        "agentlab cleanup run --dry-run",
        'agentlab cleanup freeze --reason "storage maintenance until Monday"',
        "agentlab cleanup release",
    ),
)
def cleanup() -> None:
    """Run, freeze and release the cleanup rules."""


@cleanup.command(
    usage="[--dry-run]",
    examples=("agentlab cleanup run --dry-run", "agentlab cleanup run"),
    notes=(
        "The rules are in the daemon's cleanup file, and the daemon also runs them at",
        "their interval. The guard of the rules applies here, too. In shadow mode,",
        "every run is a dry run.",
    ),
)
@click.option("--dry-run", is_flag=True, help="Destroy nothing. Show what would be done.")
@settings
def run(to: Settings, dry_run: bool) -> None:
    """Run the cleanup rules now."""
    with Progress(lambda: "running the cleanup rules", enabled=not to.json):
        answer = to.client.post("cleanup", "run", body={"dry_run": dry_run})
    to.show_answer(answer, _format_run)
    if not answer.data.get("dry_run"):
        end_command(
            len(answer.data.get("pruned") or []) + len(answer.data.get("marked") or []),
            list_failures(answer.data.get("failed")),
        )


def _format_run(data: dict[str, Any]) -> str:
    marked = f", {len(data['marked'])} FAILED" if data["marked"] else ""
    forgotten = f", {data['forgotten']} old record(s) removed" if data["forgotten"] else ""
    if not data["dry_run"]:
        return f"cleaned up {data['count']} sandbox(es){marked}, kept {len(data['kept'])}{forgotten}"
    from .sandbox import format_plan

    guard = f"\nThe guard would stop it: {format_cell(data['guard'])}" if data["guard"] else ""
    return f"would clean up {data['count']} sandbox(es){marked}{forgotten}{guard}" + format_plan(
        {"destroy": data["pruned"], "FAILED": data["marked"], "keep": data["kept"], "cannot": data["failed"]}
    )


@cleanup.command(
    usage="--reason <text>",
    examples=('agentlab cleanup freeze --reason "storage maintenance until Monday"',),
    notes=(
        "Leases still end, and their VMs are stopped. Nothing is destroyed on",
        "schedule until 'agentlab cleanup release'.",
    ),
)
@click.option("--reason", required=True, metavar="<text>", help="Reason, which 'agentlab status' shows.")
@settings
def freeze(to: Settings, reason: str) -> None:
    """Pause the scheduled cleanup until it is released."""
    to.show_answer(
        to.client.post("cleanup", "freeze", body={"reason": reason}),
        lambda data: f"cleanup frozen: {format_cell(data['frozen']['reason'])}",
    )


@cleanup.command(
    usage="",
    examples=("agentlab cleanup release",),
    notes=(
        "The guard freezes the cleanup if it would destroy unusually many sandboxes.",
        "Check 'agentlab cleanup run --dry-run' before you release it.",
    ),
)
@settings
def release(to: Settings) -> None:
    """Resume the scheduled cleanup."""
    to.show_answer(
        to.client.post("cleanup", "release"),
        lambda data: "cleanup released" if data.get("released") else "cleanup was not frozen",
    )


@click.group(
    cls=Group,
    examples=("agentlab profile list",),
    words={"ls": "list"},
    meant=dict.fromkeys(("show", "get"), "agentlab profile list"),
)
def profile() -> None:
    """Show the profiles for new sandboxes."""


@profile.command("list", usage="", examples=("agentlab profile list",))
@settings
def profiles(to: Settings) -> None:
    """List the profiles that the daemon has read."""
    to.show_answer(to.client.get("profiles"), lambda data: _format_profiles(data["profiles"]))


def _format_profiles(profiles: list[dict[str, Any]]) -> str:
    if not profiles:
        return "no profiles"
    names = [
        name
        for name in (
            "name",
            "template",
            "cores",
            "memory",
            "disk_size",
            "lease_default",
            "lease_maximum",
            "keepalive",
            "description",
        )
        if any(profile.get(name) is not None for profile in profiles)
    ]
    return format_table(
        [name.replace("_", " ").upper() for name in names],
        [[profile.get(name) for name in names] for profile in profiles],
        width=read_terminal_width(),
        droppable=("DESCRIPTION",),
    )


@click.command(
    cls=Command,
    usage="bash|zsh|fish",
    examples=(
        "agentlab completion bash > /etc/bash_completion.d/agentlab",
        "agentlab completion zsh > ~/.zfunc/_agentlab      # a folder of fpath",
        "agentlab completion fish > ~/.config/fish/completions/agentlab.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    The script completes commands, options and states, and the daemon's VMIDs, profiles and workspaces.
    """
    from click.shell_completion import get_completion_class

    shell_class = get_completion_class(shell)
    if shell_class is None:
        ctx.fail(f"click knows no completion for {shell}")
    generator = shell_class(ctx.find_root().command, {}, NAME, COMPLETE_VARIABLE)
    # Not source(): it looks for the shell, which need not be installed on the host that makes the script.
    click.echo(generator.source_template % generator.source_vars())


@click.command(cls=Command, usage="", hidden=True)
def version() -> None:
    """Show the version."""
    click.echo(f"{NAME} {__version__}")


@click.command("help", cls=Command, usage="[<command> ...]", hidden=True)
@click.argument("words", nargs=-1, metavar="<command>")
@click.pass_context
def help_(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command."""
    where = ctx.find_root()
    for word in words:
        command = where.command.get_command(where, word) if isinstance(where.command, click.Group) else None
        if command is None:
            raise click.UsageError(f"there is no command {' '.join(words)!r}; see 'agentlab --help'")
        where = click.Context(command, info_name=word, parent=where)
    click.echo(where.get_help())
