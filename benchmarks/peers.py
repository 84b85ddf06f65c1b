# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fetch the collections that we are measured against: ``community.proxmox`` from PyPI's package ``ansible``.

Two releases are unpacked into .cache/peers: the one that rows 1 to 14 have always been measured against (FIRST), and
the newest. They run with the same Python, ansible-core and proxmoxer as ours, so only the collections differ.
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
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "peers"
_PART = "ansible_collections/community/proxmox/"


def locate_folder(package: str) -> Path:
    """Return the folder of a package, to set as ANSIBLE_COLLECTIONS_PATH."""
    return CACHE / package.replace("==", "-")


def read_version(package: str) -> str | None:
    """Return the release of community.proxmox that is unpacked from a package; None when none is unpacked."""
    manifest = locate_folder(package) / _PART / "MANIFEST.json"
    return (
        str(json.loads(manifest.read_text(encoding="utf-8"))["collection_info"]["version"])
        if manifest.exists()
        else None
    )


def format_versions() -> str:
    """Return the releases of all packages as a text, such as "1.4.0 (of ansible 12.3.0) and 2.0.0 (of ...)"."""
    return " and ".join(f"{read_version(package)} (of {package.replace('==', ' ')})" for package in PYTHONS)


def fetch_packages() -> dict[str, str]:
    """Return the folder of each package, as a text. Download a package (50 MB) the first time."""
    for package, python in PYTHONS.items():
        if not read_version(package):
            _unpack_package(package, python)
    return {package: str(locate_folder(package)) for package in PYTHONS}


def _unpack_package(package: str, python: str) -> None:
    """Download a package for that release of Python, and unpack community.proxmox of it. Replaces an older folder."""
    print(f"==> community.proxmox from PyPI's {package}", flush=True)
    shutil.rmtree(locate_folder(package), ignore_errors=True)
    locate_folder(package).mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as download:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", *options),
                *("--python-version", python, "--dest", download, package),
            ],
            check=True,
        )
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as archive:
            archive.extractall(locate_folder(package), [name for name in archive.namelist() if name.startswith(_PART)])
