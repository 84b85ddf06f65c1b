# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Proxmox VE for every test host: the double of the tests on port 8006 of that host's loopback address, known
there as pve1.example.net.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.proxmox_double import DoubleServer, ProxmoxDouble

PORT = 8006
NAME = "pve1.example.net"
# As README.md has it, so that what it says can be followed to the letter.
TOKEN_ID = "agentlab@pve!ansible"
TOKEN_SECRET = "00000000-0000-0000-0000-000000000000"


def furnish(pve: ProxmoxDouble) -> None:
    pve.add_token(TOKEN_ID, TOKEN_SECRET)
    pve.add_template()
    pve.pools["agentlab"] = set()
    pve.agent_default = True
    pve.add_vm(500, "bystander", status="running")


def serve(folder: Path, addresses: list[str]) -> int:
    """Run until SIGTERM; each certificate stands in the folder once its double answers."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_dummy: ended.set())
    with contextlib.ExitStack() as servers:
        for address in addresses:
            server = servers.enter_context(DoubleServer(0.05, PORT, furnish, host=address, names=(NAME,)))
            shutil.copyfile(server.cafile, folder / f"ca-{address}.part")
            (folder / f"ca-{address}.part").rename(folder / f"ca-{address}.pem")
        ended.wait()
    return 0


def start(folder: Path, addresses: list[str]) -> int:
    stop(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(folder), *addresses],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(server.pid))
    deadline = time.monotonic() + 30
    while not all((folder / f"ca-{address}.pem").exists() for address in addresses):
        if server.poll() is not None or time.monotonic() > deadline:
            print((folder / "log").read_text(), file=sys.stderr)
            stop(folder)
            return 1
        time.sleep(0.1)
    return 0


def stop(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int((folder / "pid").read_text())
        # The number may have been handed out again.
        if str(folder) in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            # An ended one has no command line any more.
            while Path(f"/proc/{pid}/cmdline").read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    target = Path(where).resolve()
    sys.exit(stop(target) if command == "stop" else {"serve": serve, "start": start}[command](target, rest))
