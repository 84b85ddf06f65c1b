# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Input of a command as Ansible sends a module with pipelining."""

from __future__ import annotations

import base64
import io
import random
import zipfile


def module(*, own: int = 1, year: int = 2020, value: str = "x", files: int = 12) -> bytes:
    """Return input as Ansible sends it: a text, an archive with the time of its build, and the values of the task."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for number in range(files):
            data = random.Random(number).randbytes(9000 if number % 3 else 200)
            opened.writestr(zipfile.ZipInfo(f"library/{number}.py", (year, 1, 2, 3, 4, 6)), data)
        info = zipfile.ZipInfo("module ä%\\'.py", (year, 1, 2, 3, 4, 6))
        opened.writestr(info, random.Random(1000 + own).randbytes(3000))
    return b"#!/usr/bin/python\nDATA = '" + base64.b64encode(archive.getvalue()) + f"'\n{value}\n".encode()
