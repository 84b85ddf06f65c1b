# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Define the command tree and the end of a command. A command's module is loaded when the command is used."""

from __future__ import annotations

import io
import json
import os
import sys
from importlib import import_module
from typing import Any

import click

from . import COMPLETE_VARIABLE, NAME, __version__, framework
from .errors import INTERRUPTED, REFUSED, UNREACHABLE, USAGE
from .framework import Group
from .text import clean_text, join_lines

# Command -> its module. WORDS holds further words that people type: word -> module and command. They are not listed.
COMMANDS = {
    "sandbox": "sandbox",
    "workspace": "workspace",
    "status": "status",
    "doctor": "doctor",
    "cleanup": "status",
    "profile": "status",
    "completion": "status",
}
WORDS = {"logs": ("sandbox", "events"), "version": ("status", "version"), "help": ("status", "help_")}
# The code of an exit status, for programs.
CODES = {USAGE: "usage", UNREACHABLE: "unreachable", REFUSED: "failed"}


class Root(Group):
    """The root of the command tree."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module, name = (COMMANDS[cmd_name], cmd_name) if cmd_name in COMMANDS else WORDS.get(cmd_name, (None, ""))
        return getattr(import_module(f".{module}", __package__), name) if module else None

    def _suggest_command(self, ctx: click.Context, word: str) -> str:
        """Return the full line for a word that belongs behind ``sandbox``, such as ``agentlab stop 1009``."""
        from .sandbox import sandbox

        if word in sandbox.meant:
            return f"Use: {sandbox.meant[word]}"
        name = sandbox.words.get(word, word)
        return f"Use: agentlab sandbox {name}" if name in sandbox.commands else super()._suggest_command(ctx, word)


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    examples=(
        "agentlab sandbox list",
        "agentlab sandbox destroy --force 1009",
        "agentlab sandbox prune",
        "agentlab status",
    ),
    notes=(
        "Exit status: 0 success; 1 refused or failed; 2 wrong usage; 3 no usable",
        "answer from the daemon; 4 some items succeeded, others failed; 130",
        "interrupted.",
        "Answers go to standard output, all other messages to standard error. With",
        "--json, an error is also an object on standard output, in the form",
        '{"error": ..., "code": ...}.',
    ),
)
@click.version_option(__version__, prog_name=NAME, message="%(prog)s %(version)s", help="Show the version and exit.")
def root() -> None:
    """Manage throw-away VMs (sandboxes) with leases on Proxmox VE.

    Each command sends a request to the daemon agentlabd over its socket. The daemon does the work.
    """


def _print_error_object(message: str, status: int) -> None:
    """Print an error as a JSON object, if --json was given and nothing has been printed yet."""
    if framework.Settings.answered or not any(word in ("--json", "--json=true") for word in sys.argv[1:]):
        return
    shown: dict[str, Any] = {"error": clean_text(message), "code": CODES.get(status, "error")}
    click.echo(json.dumps(shown, indent=2 if sys.stdout.isatty() else None))


def run() -> None:
    """Run the command line and exit with its status."""
    try:
        status = root.main(prog_name=NAME, complete_var=COMPLETE_VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            # click quotes an argument as it is: its line feeds could forge a line of their own.
            error = click.UsageError(join_lines(error.format_message()), error.ctx)
        _print_error_object(error.format_message(), error.exit_code)
        shown = io.StringIO()
        error.show(shown)
        click.echo(clean_text(shown.getvalue()), nl=False, err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Error: interrupted. The daemon finishes what it has begun; see 'agentlab sandbox list'", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        # Standard output cannot be written, for example to a full disk. The daemon has carried out the request already.
        click.echo(f"Error: standard output: {error.strerror or error}; the daemon has answered", err=True)
        # Otherwise Python would flush standard output once more at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(REFUSED)
    # Commands return nothing. A number is the status of an early exit (--help, a group without a command).
    sys.exit(status if isinstance(status, int) else 0)
