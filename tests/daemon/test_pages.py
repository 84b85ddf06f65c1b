# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The commands of a page, one after the other as they stand, against a real daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support import pages
from support.cli import agentlab
from support.daemon import Daemon
from support.lab import Lab


def test_the_commands_of_troubleshooting_work_in_their_order(daemon: Callable[..., Daemon], lab: Lab, tmp_path: Path) -> None:
    for number in range(4):
        lab.create(f"a{number}", vmid=1000 + number)
    lab.timed_out("old", vmid=1004)
    lab.force_state(1004, "TIMEOUT", age=2 * 86400)
    one = daemon(cleanup="auto_cleanup: {enabled: true, interval: 1d, rules: [{name: old, match: {states: [TIMEOUT]}, after: 1d, action: destroy}]}\n")
    said = []
    for command in pages.commands(pages.ROOT / "docs/troubleshooting.md"):
        words = [word.replace("/root/", f"{tmp_path}/") for word in pages.words(command)]
        if words[0] == "agentlab":
            done = agentlab(*words[1:], socket=one.socket)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said.append(done.stdout)
    assert len(said) > 15
    for wanted in ("sandbox 1000 destroyed (state=STOPPED)\n", "sandbox 1001 destroyed (state=RUNNING)\nsandbox 1002 destroyed (state=RUNNING)\n",
                   "pruned 1 sandbox(es)\n", "no drift: the records and Proxmox VE agree\n"):
        assert wanted in said, wanted
    assert [(one.vmid, one.state) for one in lab.records() if one.live] == [(1003, "RUNNING")]
