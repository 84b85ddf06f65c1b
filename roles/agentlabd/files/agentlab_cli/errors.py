# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The errors that end a command. Each type has an exit status, and prints itself as ``Error: ...`` on standard error.

Exit statuses: 0 done; 1 refused or failed; 2 wrong usage; 3 no usable answer from the daemon; 4 some items done, others
not; 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import IO, Any

import click

from .text import clean_text

REFUSED = 1
USAGE = 2
UNREACHABLE = 3
PARTLY = 4
INTERRUPTED = 130


class Problem(click.ClickException):
    """A refusal or failure in one sentence. Control characters in foreign text are removed for the terminal."""

    exit_code = REFUSED

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {clean_text(self.message)}", file=file or sys.stderr)


class Usage(Problem):
    """Wrong usage with a fixed text, which is printed unchanged."""

    exit_code = USAGE

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file or sys.stderr)


class Unreachable(Problem):
    """The daemon could not be reached, or its answer is unusable."""

    exit_code = UNREACHABLE


class TimedOut(Unreachable):
    """The daemon did not answer in time. The request may still be carried out."""
