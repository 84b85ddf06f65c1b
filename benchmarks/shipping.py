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

from field import FIRST_VMID, TOKEN_ID, TOKEN_SECRET, make_play, write_playbook
from harness import Bench
from judging import Row, divide_medians, make_at_most_row

SSHD_PATH = "/usr/sbin:/usr/local/sbin:/usr/bin"


@contextlib.contextmanager
def run_ssh_server(bench: Bench) -> Iterator[str]:
    """Run an SSH server of our own on the loopback, and yield the path of an inventory that has it as its only host.

    Raises RuntimeError when the machine has no sshd, or sshd does not answer.
    """
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
    """Wait until something listens on a port of the loopback. After 10 s raise RuntimeError with the end of the log."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"sshd did not answer: {log.read_text(errors='replace')[-300:] if log.exists() else ''}")


def measure_over_ssh(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Measure row 15: a run that the records answer, shipped over SSH, against a ping play to the same host.

    Both run over one kept SSH connection (ControlPersist, Ansible's default), with pipelining.
    """
    bench.reset_cluster(1)
    bench.write_records(1)
    options = {
        "vmid": FIRST_VMID,
        "database": bench.database,
        "api_host": bench.env["PROXMOX_HOST"],
        "api_token_id": TOKEN_ID,
        "api_token_secret": TOKEN_SECRET,
    }
    remote = {"hosts": "near", "connection": "ssh", "vars": {}}
    info_play = make_play({"agentlab.proxmox.agentlab_sandbox_info": options}, **remote)
    info = write_playbook(bench.folder, "ssh-info", info_play)
    ping = write_playbook(bench.folder, "ssh-ping", make_play({"ansible.builtin.ping": {}}, **remote))
    with run_ssh_server(bench) as inventory:
        # The first run opens the connection that the others share.
        bench.run_ours(ping, "-i", inventory)
        ours, pings = bench.measure_by_turns(
            lambda: bench.run_ours(info, "-i", inventory), lambda: bench.run_ours(ping, "-i", inventory)
        )
    return [
        make_at_most_row(
            "15",
            "shipped over SSH (multiplexed): a run that the records answer, against a ping to the same host",
            1.12,
            divide_medians(ours, pings),
            "x",
            {"ours": ours, "ping": pings},
        )
    ]
