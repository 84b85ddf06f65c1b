# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The fake Proxmox as a program: serve.py FOLDER [SECONDS].

Writes FOLDER/environment.json (what leads a user to it), and serves on loopback until the folder is removed, or the
seconds (600) are over.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.double import Server


def main() -> int:
    """Serve a double in a folder (first argument) for some seconds (second argument, 600 if it is missing)."""
    folder = Path(sys.argv[1])
    deadline = time.monotonic() + float(sys.argv[2] if len(sys.argv) > 2 else 600)
    server = Server(str(folder), time_scale=0.02)
    server.pve.add_template()
    fresh = folder / "environment.json.new"
    fresh.write_text(json.dumps(server.environment(str(folder))), encoding="utf-8")
    fresh.rename(folder / "environment.json")
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
