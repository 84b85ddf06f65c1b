# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The parts that all commands share: global options anywhere on the line, help with examples, completion of VMIDs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import click

from .client import DEFAULT_SOCKET, Answer, Client
from .errors import PARTLY, REFUSED, USAGE, Problem
from .text import format_cell, join_lines, parse_duration

# These classes are generic only in newer releases of click.
if TYPE_CHECKING:
    _IntType = click.ParamType[int]
    _FloatType = click.ParamType[float]
    _StrType = click.ParamType[str]
else:
    _IntType = _FloatType = _StrType = click.ParamType

MIN_VMID, MAX_VMID = 100, 999999999


@dataclass
class Settings:
    """The global options. An option wins over the environment, and the environment over the default."""

    socket: str | None = None
    json: bool = False
    # Seconds for one request; 0 for no limit, None for the default of each request.
    timeout: float | None = None

    # True once data was printed for a program. Shared by all objects, because a run has a single standard output.
    answered: ClassVar[bool] = False

    @property
    def client(self) -> Client:
        return Client(self.socket or os.environ.get("AGENTLAB_SOCKET") or DEFAULT_SOCKET, self.timeout)

    def show_answer(self, answer: Answer, text: Callable[[Any], str]) -> None:
        """Show an answer: the API's own bytes for programs, ``text`` of its data for people.

        Raises Problem for a refusal.
        """
        if self.json:
            Settings.answered = True
            # On a terminal escape the text, because a guest could otherwise control the terminal. Programs get the raw
            # bytes.
            click.echo(json.dumps(answer.data, indent=2) if sys.stdout.isatty() else answer.body.strip())
        if not answer.ok:
            raise Problem(join_lines(answer.data["error"]) + self._explain(answer))
        if not self.json:
            try:
                shown = text(answer.data)
            except (KeyError, TypeError, AttributeError) as error:
                raise _explain_mismatch(answer, error) from error
            if shown:
                click.echo(shown)

    def _explain(self, answer: Answer) -> str:
        """Return further lines about a missing sandbox or workspace: the VMID or name, and which exist."""
        vmid, workspace = answer.data.get("vmid"), answer.data.get("workspace")
        if answer.data.get("code") == "not_found" and isinstance(workspace, str):
            return self._explain_workspace(workspace)
        if answer.data.get("code") != "not_found" or not isinstance(vmid, int):
            return ""
        try:
            sandboxes = self.client.get("sandboxes").data["sandboxes"]
            vmids = sorted(
                {int(sandbox["vmid"]) for sandbox in sandboxes},
                key=lambda known_vmid: (abs(known_vmid - vmid), known_vmid),
            )
        except (Problem, KeyError, TypeError, ValueError):
            vmids = []
        near = f" Nearest: {', '.join(map(str, sorted(vmids[:3])))}." if vmids else " There is none."
        return f"\nThere is no sandbox {vmid}.{near} See 'agentlab sandbox list --all'"

    def _explain_workspace(self, name: str) -> str:
        try:
            existing = [str(workspace["name"]) for workspace in self.client.get("workspaces").data["workspaces"]]
        except (Problem, KeyError, TypeError):
            return ""
        more = f" and {len(existing) - 10} more" if len(existing) > 10 else ""
        names = f"{', '.join(map(join_lines, existing[:10]))}{more}" if existing else "none"
        return f"\nThere is no workspace {join_lines(name)!r}. Workspaces: {names}. See 'agentlab workspace list --all'"


def _explain_mismatch(answer: Answer, error: Exception) -> Problem:
    """Return the error for an answer in the form of another version."""
    from .errors import Unreachable

    return Unreachable(
        f"the daemon's answer lacks what this command line expects ({type(error).__name__}: {error}); they are of "
        "different versions. Upgrade both, 'systemctl restart agentlabd', or use --json"
    )


def list_failures(items: list[dict[str, Any]] | None) -> list[tuple[object, str]]:
    """Return the items of an answer that failed, each with its reason."""
    return [(item.get("vmid"), str(item.get("message") or item.get("reason"))) for item in items or []]


def end_command(succeeded: int, failed: list[tuple[object, str]]) -> None:
    """Print a line for each failure, and end the process if there is one.

    ``failed`` holds VMID and reason of each item. The exit status is 1 when no item succeeded, and 4 when some did.
    """
    for vmid, reason in failed:
        named = re.search(rf"\b(sandbox|VM|VMID) {re.escape(str(vmid))}\b", reason) is not None
        click.echo(f"Error: {'' if named else f'sandbox {vmid}: '}{join_lines(reason)}", err=True)
    if failed:
        sys.stdout.flush()
        sys.exit(PARTLY if succeeded else REFUSED)


class Duration(_FloatType):
    """A waiting time in seconds, as a number or a duration; 0 for no limit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return value
        try:
            return 0 if value.strip() in ("0", "0s") else parse_duration(value.strip())
        except ValueError:
            self.fail(
                f"{value!r} is not a time to wait. Valid: seconds as a number (30), or a duration such as 90s, 30m, "
                "2h, 1500ms; 0 for no limit",
                param,
                ctx,
            )


class Vmid(_IntType):
    """A VMID. The shell completes the VMIDs that the daemon knows."""

    name = "vmid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) <= 9 and MIN_VMID <= int(text) <= MAX_VMID:
            return int(text)
        self.fail(f"{text!r} is not a VMID. Valid: a number from {MIN_VMID} to {MAX_VMID}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        # Options earlier on the line are already in force. A shell does not wait long, so use a short timeout.
        client = Client(ctx.ensure_object(Settings).client.path, 2)
        try:
            sandboxes = client.get("sandboxes").data["sandboxes"]
            typed = {str(vmid) for vmid in ctx.params.get(param.name or "") or ()} if param.nargs == -1 else set()
            return [
                CompletionItem(
                    str(sandbox["vmid"]), help=f"{format_cell(sandbox.get('name'))} {format_cell(sandbox.get('state'))}"
                )
                for sandbox in sandboxes
                if str(sandbox["vmid"]).startswith(incomplete)
                and str(sandbox["vmid"]) not in typed
                and sandbox.get("state") != "DESTROYED"
            ]
        except (Problem, KeyError, TypeError):
            # Completion stays silent about errors.
            return []


class State(_StrType):
    """The name of a state, in upper or lower case."""

    name = "state"
    valid = (
        "REQUESTED",
        "PROVISIONING",
        "BOOTING",
        "READY",
        "RUNNING",
        "SUSPENDED",
        "COMPLETED",
        "FAILED",
        "TIMEOUT",
        "STOPPED",
        "DESTROYED",
    )

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        state = str(value).upper()
        if state not in self.valid:
            self.fail(f"{value!r} is not a state. Valid: {', '.join(self.valid)}", param, ctx)
        return state

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(state) for state in self.valid if state.startswith(incomplete.upper())]


class Known(_StrType):
    """A name that the shell completes from one of the daemon's lists."""

    name = "name"

    def __init__(self, resource: str) -> None:
        self.resource = resource

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        try:
            names = [
                str(item["name"])
                for item in Client(ctx.ensure_object(Settings).client.path, 2).get(self.resource).data[self.resource]
            ]
        except (Problem, KeyError, TypeError):
            return []
        return [CompletionItem(format_cell(name)) for name in names if name.startswith(incomplete)]


PROFILE = Known("profiles")
WORKSPACE = Known("workspaces")
VMID = Vmid()
STATE = State()
DURATION = Duration()


def _make_saver(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return the callback of a global option, which keeps the value in the Settings under this name."""

    def keep_value(ctx: click.Context, _param: click.Parameter, value: Any) -> Any:
        if value not in (None, False):
            setattr(ctx.ensure_object(Settings), name, value)
        return value

    return keep_value


class _Global(click.Option):
    """An option that is accepted before and after the command."""


def _make_global_options() -> list[click.Parameter]:
    return [
        _Global(
            ["--socket"],
            metavar="PATH",
            expose_value=False,
            callback=_make_saver("socket"),
            help=f"Socket of the daemon. Environment: AGENTLAB_SOCKET. Default: {DEFAULT_SOCKET}",
        ),
        _Global(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_make_saver("json"),
            help="Print the daemon's answer as JSON, for programs. On a terminal the JSON is indented.",
        ),
        _Global(
            ["--timeout"],
            metavar="DURATION",
            type=DURATION,
            expose_value=False,
            callback=_make_saver("timeout"),
            help="Longest time to wait for the daemon's whole answer: seconds, or 1500ms, 90s, 30m, 2h; 0 for no "
            "limit. Default: 30s for a short read, 1h for all other requests.",
        ),
    ]


_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


class _Page(click.Command):
    """A command with help that shows notes and examples unchanged. Flags may be written as ``--flag=true``."""

    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def make_parser(self, ctx: click.Context) -> Any:
        parser = super().make_parser(ctx)
        parse = parser.parse_args
        parser.parse_args = lambda args: parse(self._simplify_flags(ctx, args))  # type: ignore[method-assign]
        return parser

    def _simplify_flags(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the words, with ``--flag=true`` as ``--flag``, and ``--flag=false`` as its opposite or left out."""
        flags = {
            name: param
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and param.is_flag
            for name in param.opts
        }
        plain: list[str] = []
        for number, word in enumerate(args):
            if word == "--":
                return plain + args[number:]
            name, equals, value = word.partition("=")
            flag = flags.get(name) if equals else None
            if flag is not None and value.lower() in _TRUE:
                plain.append(name)
            elif flag is not None and value.lower() in _FALSE:
                plain += flag.secondary_opts[:1]
            else:
                plain.append(word)
        return plain

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            # Newer releases of click list arguments as well, but the usage line already shows them.
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
    """A command with the global options. ``usage`` follows the command's name in its usage line."""

    def __init__(
        self,
        *args: Any,
        usage: str = "[OPTIONS]",
        examples: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.usage, self.examples, self.notes = usage, examples, notes
        self.params.extend(_make_global_options())

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.usage]


class Group(_Page, click.Group):
    """A group that keeps its commands in the order of definition, and suggests the nearest command for a wrong word."""

    command_class = Command
    group_class = type
    # A mistyped word must never lead to a command that destroys.
    never_suggested = ("destroy", "prune", "unprotect")

    def __init__(
        self,
        *args: Any,
        examples: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        words: Mapping[str, str] | None = None,
        meant: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Define a group.

        ``words`` maps further names to commands; these names work but are not listed. ``meant`` maps words that are no
        command to the line to type instead.
        """
        super().__init__(*args, **{"subcommand_metavar": "<command>", **options})
        self.examples, self.notes = examples, notes
        self.words, self.meant = words or {}, meant or {}
        self.params.extend(_make_global_options())

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

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.words.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (
            args
            and not ctx.resilient_parsing
            and not args[0].startswith("-")
            and self.get_command(ctx, args[0]) is None
        ):
            ctx.fail(f"there is no command {args[0]!r}. {self._suggest_command(ctx, args[0])}")
        return super().resolve_command(ctx, args)

    def _suggest_command(self, ctx: click.Context, word: str) -> str:
        if word in self.meant:
            return f"Use: {self.meant[word]}"
        import difflib

        names = self.list_commands(ctx)
        near = difflib.get_close_matches(word, [name for name in names if name not in self.never_suggested], 1)
        return f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(names)}"


settings = click.make_pass_decorator(Settings, ensure=True)
