# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure what Ansible sends to a host for each module: the size of the payload, and of each file in it.

python benchmarks/payload.py [MODULE]     # a table; with a module, its pieces
"""

from __future__ import annotations

import base64
import functools
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


def list_modules() -> list[str]:
    """Return the names of the collection's modules, without the namespace."""
    return sorted(path.stem for path in (REPO / "plugins" / "modules").glob("*.py"))


@functools.cache
def _init_ansible() -> None:
    """Prepare Ansible's plugin loader to load our modules from the checkout."""
    os.environ.setdefault("ANSIBLE_LOCAL_TEMP", tempfile.mkdtemp(prefix="payload-"))
    os.environ["ANSIBLE_COLLECTIONS_PATH"] = str(REPO / ".collections")
    from ansible.plugins.loader import init_plugin_loader

    init_plugin_loader()


def build_payload(name: str) -> bytes:
    """Return the script that Ansible would copy to a host for a module, with no arguments. ``name``: its full name."""
    _init_ansible()
    from ansible.executor.module_common import modify_module
    from ansible.parsing.dataloader import DataLoader
    from ansible.plugins.loader import module_loader
    from ansible.template import Templar

    plugin = module_loader.find_plugin_with_context(name)
    variables = {"ansible_python_interpreter": sys.executable}
    built_module = modify_module(
        module_name=plugin.resolved_fqcn,
        module_path=plugin.plugin_resolved_path,
        module_args={},
        templar=Templar(DataLoader(), variables),
        module_compression="ZIP_DEFLATED",
        task_vars=variables,
    )
    # Up to ansible-core 2.18 the answer is a tuple.
    return built_module[0] if isinstance(built_module, tuple) else built_module.b_module_data


def measure_modules() -> dict[str, int]:
    """Return the bytes that each of our modules ships beyond the payload of ansible.builtin.ping.

    ansible-core's own part, which every module ships, stands under "ansible.builtin.ping".
    """
    ping_size = len(build_payload("ansible.builtin.ping"))
    return {
        "ansible.builtin.ping": ping_size,
        **{name: len(build_payload(f"agentlab.proxmox.{name}")) - ping_size for name in list_modules()},
    }


def count_files() -> dict[str, int]:
    """Return how many files each module ships, those of ansible-core with them."""
    return {name: len(measure_files(build_payload(f"agentlab.proxmox.{name}"))) for name in list_modules()}


def measure_files(script: bytes) -> dict[str, int]:
    """Return the bytes that each file takes of a payload, compressed and in base 64."""
    blob = max(re.findall(rb"[\"']([A-Za-z0-9+/=]{1000,})[\"']", script), key=len)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(blob))) as archive:
        return {file.filename: file.compress_size * 4 // 3 for file in archive.infolist()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file_sizes = measure_files(build_payload(f"agentlab.proxmox.{sys.argv[1]}"))
        for path, size in sorted(file_sizes.items(), key=lambda item: -item[1]):
            print(f"{size:8} {path}")
    else:
        for module in ("ansible.builtin.ping", *(f"agentlab.proxmox.{name}" for name in list_modules())):
            print(f"{len(build_payload(module)):8} {module}")
