# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The entry point: the command tree, and how a command ends."""

from __future__ import annotations

import os
import sys

import click

from . import __version__
from .doctor import doctor
from .errors import INTERRUPTED, REFUSED
from .framework import Group
from .other import cleanup, completion, profile, status
from .sandbox import sandbox
from .workspace import workspace

NAME = "agentlab"
COMPLETE_VARIABLE = "_AGENTLAB_COMPLETE"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, examples=(
    "agentlab sandbox list",
    "agentlab sandbox destroy --force 1009",
    "agentlab sandbox prune",
    "agentlab status",
), notes=(
    "Exit status: 0 done; 1 refused or failed; 2 wrong usage; 3 no usable answer",
    "from the daemon; 4 some items done, others not; 130 interrupted.",
    "Answers go to standard output, everything else to standard error.",
))
@click.version_option(__version__, prog_name=NAME, message="%(prog)s %(version)s", help="Show the version and exit.")
def root() -> None:
    """Throw-away VMs with leases on Proxmox VE.

    Everything is done by the daemon agentlabd; this talks to it over its socket.
    """


for _command in (sandbox, workspace, status, doctor, cleanup, profile, completion):
    root.add_command(_command)


def main() -> None:
    """Run the command line and leave with its exit status."""
    try:
        status = root.main(prog_name=NAME, complete_var=COMPLETE_VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Error: interrupted. What the daemon had begun it goes on with; see 'agentlab sandbox list'", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        # A full disk behind standard output; what the daemon was asked for is done.
        click.echo(f"Error: standard output: {error.strerror or error}; the daemon has answered", err=True)
        # Or Python tries once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(REFUSED)
    # Commands return nothing; a number is the status of an early exit (--help, a group without a command).
    sys.exit(status if isinstance(status, int) else 0)
