# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What ends a command early, as types: each knows its exit status, and prints itself as ``Error: ...`` on standard
error.

Exit statuses: 0 done; 1 refused or failed; 2 wrong usage; 3 no usable answer from the daemon; 4 some items done, others
not; 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import IO, Any

import click

from .text import clean

REFUSED = 1
USAGE = 2
UNREACHABLE = 3
PARTLY = 4
INTERRUPTED = 130


class Problem(click.ClickException):
    """A refusal or failure, told in one sentence. Text that comes from elsewhere is made harmless for the terminal."""

    exit_code = REFUSED

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {clean(self.message)}", file=file or sys.stderr)


class Usage(Problem):
    """Wrong usage whose words are fixed: they are printed as they are."""

    exit_code = USAGE

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file or sys.stderr)


class Unreachable(Problem):
    """The daemon could not be asked, or its answer is of no use."""

    exit_code = UNREACHABLE


class TimedOut(Unreachable):
    """The daemon did not answer in time; what was asked may still be carried out."""
