# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The entry point. It prints the version before it loads the libraries of the command tree."""

from __future__ import annotations

import os
import sys
from typing import Any

from . import COMPLETE_VARIABLE, NAME, __version__


def __getattr__(name: str) -> Any:
    """Load the command tree (``root``) on its first use."""
    if name == "root":
        from .tree import root

        return root
    raise AttributeError(name)


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.argv[1:] in (["--version"], ["version"]) and COMPLETE_VARIABLE not in os.environ:
        try:
            print(f"{NAME} {__version__}", flush=True)
        except OSError as error:
            print(f"Error: standard output: {error.strerror or error}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        return
    from .tree import run

    run()
