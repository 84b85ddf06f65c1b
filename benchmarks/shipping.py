# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Row 15: a module shipped over SSH, as to a node, on this machine's own loopback."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from field import FIRST, TOKEN_ID, TOKEN_SECRET, play, playbook
from rows import Bench, Row, at_most, ratio

SSHD_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin"


@contextlib.contextmanager
def ssh_host(bench: Bench) -> Iterator[str]:
    """Run an SSH server of our own on the loopback; give the path of an inventory with it as the one host."""
    program = shutil.which("sshd") or shutil.which("sshd", path=SSHD_PATH)
    if program is None:
        raise RuntimeError("sshd: not on this machine, which row 15 needs. Install openssh-server")
    folder = Path(bench.folder, "ssh")
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("host", "user"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": str(folder / "host"),
        "AuthorizedKeysFile": str(folder / "user.pub"),
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
    }
    file = folder / "sshd_config"
    file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()), encoding="utf-8")
    log = folder / "sshd.log"
    server = subprocess.Popen([program, "-D", "-f", str(file), "-E", str(log)])
    try:
        _await_port(port, log)
        inventory = folder / "hosts.ini"
        variables = {
            "ansible_host": "127.0.0.1",
            "ansible_port": port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": folder / "user",
            "ansible_python_interpreter": sys.executable,
            "ansible_ssh_common_args": f"'-o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=no'",
        }
        inventory.write_text(
            f"near {' '.join(f'{name}={value}' for name, value in variables.items())}\n", encoding="utf-8"
        )
        yield str(inventory)
    finally:
        server.terminate()
        server.wait(10)


def _await_port(port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"sshd did not answer: {log.read_text(errors='replace')[-300:] if log.exists() else ''}")


def over_ssh(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Both plays run over one kept SSH connection (ControlPersist, Ansible's default), with pipelining."""
    bench.vms(1)
    bench.records(1)
    options = {
        "vmid": FIRST,
        "database": bench.database,
        "api_host": bench.env["PROXMOX_HOST"],
        "api_token_id": TOKEN_ID,
        "api_token_secret": TOKEN_SECRET,
    }
    remote = {"hosts": "near", "connection": "ssh", "vars": {}}
    info = playbook(bench.folder, "ssh-info", play({"agentlab.proxmox.agentlab_sandbox_info": options}, **remote))
    ping = playbook(bench.folder, "ssh-ping", play({"ansible.builtin.ping": {}}, **remote))
    with ssh_host(bench) as inventory:
        # The first run opens the connection that the others share.
        bench.ours(ping, "-i", inventory)
        ours, bare = bench.interleaved(
            lambda: bench.ours(info, "-i", inventory), lambda: bench.ours(ping, "-i", inventory)
        )
    return [
        at_most(
            "15",
            "shipped over SSH (multiplexed): a run that the records answer, against a ping to the same host",
            1.12,
            ratio(ours, bare),
            "x",
            {"ours": ours, "ping": bare},
        )
    ]
