# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run by the role on the controller: what is to be installed, as one piece instead of a hundred copied files.

``info`` prints JSON: the version, a manifest as sha256sum reads it, and the example profiles. ``archive`` prints a gzipped tar in base64.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

FILES = Path(__file__).resolve().parent
PACKAGES = ("agentlab_core", "agentlabd", "agentlab_cli")


def contents() -> dict[str, bytes]:
    """Name on the host -> content, of everything beside this file. agentlab_core holds links to the core of the modules: it exists once."""
    found: dict[str, bytes] = {}
    for top in sorted(FILES.iterdir()):
        if top == Path(__file__).resolve() or top.name == "__pycache__":
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                found[path.relative_to(FILES).as_posix()] = path.read_bytes()
    for package in PACKAGES:
        if f"{package}/__init__.py" not in found:
            sys.exit(f"{FILES / package} is missing or no link that can be followed; install the collection again with ansible-galaxy")
    return found


def main() -> int:
    files = contents()
    if sys.argv[1:] == ["info"]:
        version = re.search(r'^__version__ = "([^"]+)"', files["agentlabd/__init__.py"].decode(), re.M)
        if version is None:
            sys.exit("agentlabd/__init__.py has no __version__")
        print(json.dumps({
            "version": version[1],
            "manifest": "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()),
            "examples": {Path(name).stem: content.decode() for name, content in files.items() if name.startswith("profiles/")}}))
        return 0
    if sys.argv[1:] == ["archive"]:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
        print(base64.encodebytes(packed.getvalue()).decode(), end="")
        return 0
    sys.exit("usage: pack.py info|archive")


if __name__ == "__main__":
    sys.exit(main())
