# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make demo`: the real ansible-playbook against the fake Proxmox on loopback, with the requests that each step made.

demo.py --installed FOLDER [ARGUMENTS] runs it from the collection that is installed there instead of the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.double import Server  # noqa: E402


def main() -> int:
    """Run the demo's playbook against a fake Proxmox VE, and return its exit status."""
    arguments = sys.argv[1:]
    # What the play is, where it runs, and where Ansible finds the collection.
    playbook, place, where = str(ROOT / "playbooks" / "demo.yml"), ROOT, {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    if arguments[:1] == ["--installed"]:
        place = Path(arguments[1]).resolve()
        # No configuration but the environment; Ansible wants a file with the right ending all the same.
        (place / "empty.cfg").touch()
        where = {"ANSIBLE_CONFIG": str(place / "empty.cfg"), "ANSIBLE_COLLECTIONS_PATH": str(place)}
        playbook, arguments = "agentlab.proxmox.demo", arguments[2:]
    with tempfile.TemporaryDirectory(prefix="agentlab-demo-") as folder:
        print("==> starting the fake Proxmox on loopback, with the template debian-13")
        # Tasks take a twentieth of their time, so that waiting is real but short.
        server = Server(folder, time_scale=0.05)
        server.pve.add_template()
        env = {
            **os.environ,
            **server.environment(folder),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "ANSIBLE_LOCALHOST_WARNING": "False",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "False",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml",
            **where,
        }
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", playbook, *arguments]
        print(
            f"==> ansible-playbook {os.path.relpath(playbook, ROOT) if place == ROOT else playbook} (records in "
            f"{folder})\n"
        )
        run = subprocess.Popen(command, env=env, cwd=place, stdout=subprocess.PIPE, text=True)
        requests: list[tuple[str, int]] = []
        step, before = "", 0
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if line.startswith(("TASK [", "PLAY RECAP")):
                now = server.pve.count()
                if step and now > before:
                    requests.append((step, now - before))
                step, before = line[6:].rpartition("]")[0], now
        code = run.wait()
        print("requests to Proxmox, by step:")
        for name, count in requests:
            print(f"  {count:4}  {name}")
        print(f"  {server.pve.count():4}  in all")
        server.stop()
    print("\nThe demo went as told." if code == 0 else "\nThe demo FAILED; see above.")
    return code


if __name__ == "__main__":
    sys.exit(main())
