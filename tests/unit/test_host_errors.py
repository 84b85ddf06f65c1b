# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the host refuses (descriptors, threads, memory, room on the disk) has a sentence, and is no internal error."""

from __future__ import annotations

import errno
import os

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import make_host_error


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.EMFILE, "Too many open files", "/a.py"), "/a.py: this process has no file descriptor left"),
        (OSError(errno.ENFILE, "Too many open files in system"), "this host has no file descriptor left"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a"), "/a: the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: the file system can only be read"),
        (OSError(errno.EIO, "Input/output error"), "the disk or its file system failed"),
        (MemoryError(), "no memory is left"),
        (RuntimeError("can't start new thread"), "this process may start no further thread"),
    ],
)
def test_what_the_host_refuses_has_a_sentence(error: Exception, sentence: str) -> None:
    known = make_host_error(error)
    assert known and known.message.startswith(sentence) and known.message.endswith("; nothing more was done"), known
    assert "run again" in known.message and known.code == "host"


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, os.strerror(errno.ENOENT)), ValueError("x"), OSError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert make_host_error(error) is None
