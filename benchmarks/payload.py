# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Ansible sends to a host for each module: the size of the whole, and of each piece in it.

python benchmarks/payload.py [MODULE]     # a table; with a module, its pieces
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# The most that a module of ours should add to what ansible-core ships with every module of its own, in bytes, and the
# most files that it should ship in all. Most modules miss both: agentlab_doctor adds 357 kB, agentlab_sandbox 351 kB,
# agentlab_reconcile 314 kB and agentlab_prune 274 kB.
AIM, AIM_FILES = 190_000, 95
# The tests hold this bound, which only tells when a module grows. It is no reason to leave out a docstring: it was
# 335,000 before the functions of the core had docstrings that say what is read, returned and raised.
LIMIT = 370_000


def modules() -> list[str]:
    """The names of the collection's modules."""
    return sorted(path.stem for path in (REPO / "plugins" / "modules").glob("*.py"))


def shipped(name: str) -> bytes:
    """The script that Ansible would copy to a host for a module (full name), with no arguments."""
    os.environ.setdefault("ANSIBLE_LOCAL_TEMP", tempfile.mkdtemp(prefix="payload-"))
    os.environ["ANSIBLE_COLLECTIONS_PATH"] = str(REPO / ".collections")
    from ansible.executor.module_common import modify_module
    from ansible.parsing.dataloader import DataLoader
    from ansible.plugins.loader import init_plugin_loader, module_loader
    from ansible.template import Templar

    if not getattr(shipped, "ready", False):
        init_plugin_loader()
        shipped.ready = True  # type: ignore[attr-defined]
    found = module_loader.find_plugin_with_context(name)
    variables = {"ansible_python_interpreter": sys.executable}
    made = modify_module(
        module_name=found.resolved_fqcn,
        module_path=found.plugin_resolved_path,
        module_args={},
        templar=Templar(DataLoader(), variables),
        module_compression="ZIP_DEFLATED",
        task_vars=variables,
    )
    script = made[0] if isinstance(made, tuple) else made.b_module_data
    return script


def sizes() -> dict[str, int]:
    """What each module ships beyond the payload of ansible.builtin.ping (which is under that name), bytes:
    ansible-core's own part is always there.
    """
    floor = len(shipped("ansible.builtin.ping"))
    return {
        "ansible.builtin.ping": floor,
        **{name: len(shipped(f"agentlab.proxmox.{name}")) - floor for name in modules()},
    }


def files() -> dict[str, int]:
    """Return how many files each module ships, those of ansible-core with them."""
    return {name: len(pieces(shipped(f"agentlab.proxmox.{name}"))) for name in modules()}


def pieces(script: bytes) -> dict[str, int]:
    """File in the payload -> what it takes of it, compressed and in base 64 (bytes)."""
    blob = max(re.findall(rb"[\"']([A-Za-z0-9+/=]{1000,})[\"']", script), key=len)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(blob))) as archive:
        return {one.filename: one.compress_size * 4 // 3 for one in archive.infolist()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for file, size in sorted(pieces(shipped(f"agentlab.proxmox.{sys.argv[1]}")).items(), key=lambda item: -item[1]):
            print(f"{size:8} {file}")
    else:
        for module in ("ansible.builtin.ping", *(f"agentlab.proxmox.{name}" for name in modules())):
            print(f"{len(shipped(module)):8} {module}")
