# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all commands share: global options that work anywhere on the line, help with examples, VMIDs that complete themselves."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .client import DEFAULT_SOCKET, Answer, Client
from .errors import PARTLY, REFUSED, USAGE, Problem
from .text import cell, clean, seconds

# Generic only in newer releases of click.
if TYPE_CHECKING:
    _IntType = click.ParamType[int]
    _StrType = click.ParamType[str]
else:
    _IntType = _StrType = click.ParamType

MIN_VMID, MAX_VMID = 100, 999999999


@dataclass
class Settings:
    """The global options. An option wins over the environment, the environment over the default."""

    socket: str | None = None
    json: bool = False
    timeout: int | None = None

    @property
    def client(self) -> Client:
        return Client(self.socket or os.environ.get("AGENTLAB_SOCKET") or DEFAULT_SOCKET, self.timeout)

    def tell(self, answer: Answer, text: Callable[[Any], str]) -> None:
        """Show an answer: the very bytes of the API for programs, ``text`` of it for people. A refusal ends the command."""
        if self.json:
            click.echo(answer.body.strip())
        if not answer.ok:
            raise Problem(str(answer.data["error"]))
        if not self.json:
            try:
                shown = text(answer.data)
            except (KeyError, TypeError, AttributeError) as error:
                raise _odd(answer, error) from error
            if shown:
                click.echo(shown)


def _odd(answer: Answer, error: Exception) -> Problem:
    from .errors import Unreachable

    return Unreachable(f"the daemon's answer lacks what this command line expects ({type(error).__name__}: {error}); they are of different versions. "
                       "Upgrade both, 'systemctl restart agentlabd', or use --json")


def failures(items: list[dict[str, Any]] | None) -> list[tuple[object, str]]:
    """What could not be done, of an answer's items."""
    return [(one.get("vmid"), str(one.get("message") or one.get("reason"))) for one in items or []]


def finish(done: int, failed: list[tuple[object, str]]) -> None:
    """End a command on several items: each failure as one line, exit status 1 when none was done and 4 when only some were."""
    for what, why in failed:
        said = re.search(rf"\b(sandbox|VM|VMID) {re.escape(str(what))}\b", why) is not None
        click.echo(f"Error: {'' if said else f'sandbox {what}: '}{clean(why)}", err=True)
    if failed:
        sys.stdout.flush()
        sys.exit(PARTLY if done else REFUSED)


class Duration(_IntType):
    """A time to wait: seconds as a number, or a duration."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return seconds(value.strip())
        except ValueError:
            self.fail(f"{value!r} is not a time to wait. Valid: seconds as a number (30), or a duration such as 90s, 30m, 2h", param, ctx)


class Vmid(_IntType):
    """A VMID; the shell completes those that the daemon knows."""

    name = "vmid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) <= 9 and MIN_VMID <= int(text) <= MAX_VMID:
            return int(text)
        self.fail(f"{text!r} is not a VMID. Valid: a number from {MIN_VMID} to {MAX_VMID}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        # Options that stand on the line before are in force already. A shell does not wait long.
        client = Client(ctx.ensure_object(Settings).client.path, 2)
        try:
            found = client.get("sandboxes").data["sandboxes"]
            taken = {str(one) for one in ctx.params.get(param.name or "") or ()} if param.nargs == -1 else set()
            return [CompletionItem(str(one["vmid"]), help=f"{cell(one.get('name'))} {cell(one.get('state'))}") for one in found
                    if str(one["vmid"]).startswith(incomplete) and str(one["vmid"]) not in taken and one.get("state") != "DESTROYED"]
        except (Problem, KeyError, TypeError):
            # A completion that does not work is silent.
            return []


class State(_StrType):
    """The name of a state, in any case."""

    name = "state"
    valid = ("REQUESTED", "PROVISIONING", "BOOTING", "READY", "RUNNING", "SUSPENDED", "COMPLETED", "FAILED", "TIMEOUT", "STOPPED", "DESTROYED")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found = str(value).upper()
        if found not in self.valid:
            self.fail(f"{value!r} is not a state. Valid: {', '.join(self.valid)}", param, ctx)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(state) for state in self.valid if state.startswith(incomplete.upper())]


VMID = Vmid()
STATE = State()
DURATION = Duration()


def _keep(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def keep(ctx: click.Context, _param: click.Parameter, value: Any) -> Any:
        if value not in (None, False):
            setattr(ctx.ensure_object(Settings), name, value)
        return value

    return keep


class _Global(click.Option):
    """An option that is understood before and after the command."""


def _globals() -> list[click.Parameter]:
    return [
        _Global(["--socket"], metavar="PATH", type=click.Path(), expose_value=False, callback=_keep("socket"),
                help=f"Socket of the daemon. Environment: AGENTLAB_SOCKET. Default: {DEFAULT_SOCKET}"),
        _Global(["--json"], is_flag=True, expose_value=False, callback=_keep("json"), help="Print the daemon's answer as it is, for programs."),
        _Global(["--timeout"], metavar="DURATION", type=DURATION, expose_value=False, callback=_keep("timeout"),
                help="How long to wait for the daemon's answer: seconds, or 90s, 30m, 2h. Default: 30s to look, 1h to work."),
    ]


class _Page(click.Command):
    """Help that shows notes and examples as they are written."""

    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            # Newer releases of click list arguments too; the usage line has them.
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                (shared if isinstance(param, _Global) else own).append(record)
        for title, records in (("Options", own), ("Global options, before or after the command", shared)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, lines in (("Notes", self.notes), ("Examples", self.examples)):
            if lines:
                with formatter.section(title):
                    for line in lines:
                        formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(_Page):
    """A command with the global options; ``usage`` is what its usage line says after its name."""

    def __init__(self, *args: Any, usage: str = "[OPTIONS]", examples: tuple[str, ...] = (), notes: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.usage, self.examples, self.notes = usage, examples, notes
        self.params.extend(_globals())

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.usage]


class Group(_Page, click.Group):
    """Commands in the order in which they were written; a wrong word is answered with the nearest right one."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), notes: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **{"subcommand_metavar": "<command>", **options})
        self.examples, self.notes = examples, notes
        self.params.extend(_globals())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _Page.format_options(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _Page.format_epilog(self, ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(USAGE)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not ctx.resilient_parsing and args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, 1)
            meant = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(self.commands)}"
            ctx.fail(f"there is no command {args[0]!r}. {meant}")
        return super().resolve_command(ctx, args)
