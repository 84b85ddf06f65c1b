# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pack everything that is to be installed into one archive, instead of a hundred copied files.

The role runs this on the controller. ``info`` prints JSON: the version, a manifest in the form of sha256sum, and the
example profiles. ``archive`` prints a gzipped tar in base64.
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
# The modules' core in the same collection. The daemon runs on a copy of it.
CORE = FILES.parents[2] / "plugins" / "module_utils" / "_core"
PACKAGES = ("agentlab_core", "agentlabd", "agentlab_cli")


def contents() -> dict[str, bytes]:
    """Return {name on the host: content} for the core (as agentlab_core) and all files beside this one."""
    files: dict[str, bytes] = {}
    for folder, prefix in ((CORE, "agentlab_core/"), (FILES, "")):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path != Path(__file__).resolve() and "__pycache__" not in path.parts:
                files[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()
    for package in PACKAGES:
        if f"{package}/__init__.py" not in files:
            folder = CORE if package == "agentlab_core" else FILES / package
            sys.exit(f"{folder} is missing; install the collection again with ansible-galaxy")
    return files


def main() -> int:
    files = contents()
    if sys.argv[1:] == ["info"]:
        version = re.search(r'^__version__ = "([^"]+)"', files["agentlabd/__init__.py"].decode(), re.M)
        if version is None:
            sys.exit("agentlabd/__init__.py has no __version__")
        print(
            json.dumps(
                {
                    "version": version[1],
                    "manifest": "".join(
                        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()
                    ),
                    "examples": {
                        Path(name).stem: content.decode()
                        for name, content in files.items()
                        if name.startswith("profiles/")
                    },
                }
            )
        )
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
