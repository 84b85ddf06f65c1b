# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A fresh clone of this checkout, and a shell in which somebody types the commands of a page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def make_clone(folder: Path) -> Path:
    """Clone this checkout into the folder, with what is not committed yet, and return the clone.

    It shares the .venv of the checkout.
    """
    clone = folder / "agentlab.proxmox"
    _git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone))
    names = _git("ls-files", "-z", "--modified", "--deleted", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, clone / name
        target.unlink(missing_ok=True)
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    # Without a network, and without the minute that making a new one takes; scripts/test-bare.sh makes a new one.
    (clone / ".venv").symlink_to((ROOT / ".venv").resolve(), target_is_directory=True)
    return clone


class Shell:
    """A new user's shell: an empty home folder, the programs of the test's environment, and nothing else set."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True)
        programs = Path(sys.executable).parent
        self.home = home
        kept = ("TMPDIR", "SSL_CERT_FILE")
        self.env = {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "HOME": str(home),
            "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "1000",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(env or {}),
        }

    def type(self, command: str, where: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the line as bash reads it, in that folder. Standard error is part of the output."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=where,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
