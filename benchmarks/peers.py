# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The collections that we are measured against: ``community.proxmox`` as PyPI's package ``ansible`` ships it,
unpacked into .cache/peers: the release that rows 1 to 14 have always been measured against, and the newest one.

They run with the same Python, ansible-core and proxmoxer as ours does, so that nothing but the collections differs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FIRST, NEWEST = "ansible==12.3.0", "ansible==14.5.0"
# The Python that a package asks for. Its collection needs only ansible-core 2.17, so it runs with ours all the same.
PYTHONS = {FIRST: "3.11", NEWEST: "3.12"}
WHERE = Path(__file__).resolve().parents[1] / ".cache" / "peers"
_PART = "ansible_collections/community/proxmox/"


def folder(package: str) -> Path:
    """Return the folder of a package, to set as ANSIBLE_COLLECTIONS_PATH."""
    return WHERE / package.replace("==", "-")


def version(package: str) -> str | None:
    """Return the release of community.proxmox that is unpacked from a package, if any."""
    manifest = folder(package) / _PART / "MANIFEST.json"
    return (
        str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
        if manifest.exists()
        else None
    )


def versions() -> str:
    """Return all releases in words, with the packages that carry them."""
    return " and ".join(f"{version(package)} (of {package.replace('==', ' ')})" for package in PYTHONS)


def fetch() -> dict[str, str]:
    """Return the folder of each package; download it (50 MB) the first time."""
    for package, python in PYTHONS.items():
        if not version(package):
            _unpack(package, python)
    return {package: str(folder(package)) for package in PYTHONS}


def _unpack(package: str, python: str) -> None:
    print(f"==> community.proxmox from PyPI's {package}", flush=True)
    shutil.rmtree(folder(package), ignore_errors=True)
    folder(package).mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=WHERE) as download:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", *options),
                *("--python-version", python, "--dest", download, package),
            ],
            check=True,
        )
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as archive:
            archive.extractall(folder(package), [name for name in archive.namelist() if name.startswith(_PART)])
