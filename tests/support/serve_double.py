#!/usr/bin/env python3
# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve a ProxmoxDouble as a process of its own, for the demo.

Prints nothing. The port file (JSON, mode 0600, written when the server answers) says where it is and how to log in.
GET /api2/json/x-agentlab-count tells the requests so far, DELETE sets them to nought.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from proxmox_double import DoubleServer, ProxmoxDouble

USER, TOKEN_NAME = "agentlab@pve", "demo"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve a Proxmox double.")
    parser.add_argument("--port-file", required=True, type=Path, help="where to write url, port, cafile and token as JSON")
    parser.add_argument("--ca-file", required=True, type=Path, help="where to write the certificate to trust")
    parser.add_argument("--time-scale", type=float, default=0.0, help="real seconds per PVE second; 0: tasks are done at once")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    args = parser.parse_args(argv)
    secret = secrets.token_hex(20)

    def setup(pve: ProxmoxDouble) -> None:
        pve.add_template()
        pve.agent_default = True
        pve.add_token(f"{USER}!{TOKEN_NAME}", secret)

    # Blocked before any thread starts, so that only sigwait below sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with DoubleServer(time_scale=args.time_scale, port=args.port, setup=setup) as server:
        shutil.copyfile(server.cafile, args.ca_file)
        token = {"id": f"{USER}!{TOKEN_NAME}", "user": USER, "name": TOKEN_NAME, "secret": secret}
        _write(args.port_file, {"url": server.url, "host": server.host, "port": server.port, "cafile": str(args.ca_file.resolve()), "token": token,
                                "pid": os.getpid()})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    args.port_file.unlink(missing_ok=True)
    return 0


def _write(path: Path, data: dict[str, object]) -> None:
    """Whole or not at all: whoever waits for the file may read it as soon as it is there."""
    part = path.with_name(path.name + ".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump(data, out)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
