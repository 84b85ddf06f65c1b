# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Programs and rights that some tests need. A machine without them skips these tests; CI fails there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def require(available: bool, why: str) -> None:
    """Skip the test unless what it needs is available; fail there when AGENTLAB_REQUIRE_PROGRAMS is set (CI).

    ``why`` says what is missing, and how to install it.
    """
    if available:
        return
    if os.environ.get("AGENTLAB_REQUIRE_PROGRAMS"):
        pytest.fail(why)
    pytest.skip(why)


def require_program(name: str, package: str | None = None) -> str:
    """Return the path of a program; skip or fail as ``require`` does. ``package`` is Debian's, by default its name."""
    path = shutil.which(name)
    require(path is not None, f"{name} is not installed: apt-get install {package or name}")
    return str(path)


def require_unnamed_files(folder: Path) -> None:
    """Skip or fail unless the file system of a folder gives a name to a file that had none (O_TMPFILE)."""
    require(_can_name_unnamed_files(folder), f"the file system of {folder} has no files without a name; set TMPDIR")


def _can_name_unnamed_files(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return False
    try:
        os.link(f"/proc/self/fd/{descriptor}", folder / "linked", src_dir_fd=descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    (folder / "linked").unlink()
    return True
