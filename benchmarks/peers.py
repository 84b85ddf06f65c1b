# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The collection that we are measured against: ``community.proxmox`` as PyPI's package ``ansible`` ships it,
unpacked into .cache/peers.

It runs with the same Python, ansible-core and proxmoxer as ours does, so that nothing but the collections differs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "ansible==12.3.0"
WHERE = Path(__file__).resolve().parents[1] / ".cache" / "peers"
_PART = "ansible_collections/community/proxmox/"


def version() -> str | None:
    """The release that is unpacked, if any."""
    manifest = WHERE / _PART / "MANIFEST.json"
    return (
        str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
        if manifest.exists()
        else None
    )


def fetch() -> Path:
    """The folder to set as ANSIBLE_COLLECTIONS_PATH; downloads the package (50 MB) the first time."""
    stamp = WHERE / "package.txt"
    if version() and stamp.exists() and stamp.read_text(encoding="utf-8") == PACKAGE:
        return WHERE
    print(f"==> community.proxmox from PyPI's {PACKAGE}", flush=True)
    shutil.rmtree(WHERE, ignore_errors=True)
    WHERE.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=WHERE) as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--dest",
                folder,
                PACKAGE,
            ],
            check=True,
        )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            archive.extractall(WHERE, [name for name in archive.namelist() if name.startswith(_PART)])
    stamp.write_text(PACKAGE, encoding="utf-8")
    return WHERE
