# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The commands of a page, one after the other as they stand, against a real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import pages
from support.cli import agentlab
from support.daemon import Daemon, free_port
from support.lab import Lab

DAEMON_PAGE = pages.ROOT / "docs/daemon.md"
SOCKET, TCP = "/run/agentlab/agentlabd.sock", "127.0.0.1:9820"


def test_the_commands_of_troubleshooting_work_in_their_order(
    daemon: Callable[..., Daemon], lab: Lab, tmp_path: Path
) -> None:
    for number in range(4):
        lab.create(f"a{number}", vmid=1000 + number)
    lab.timed_out("old", vmid=1004)
    lab.force_state(1004, "TIMEOUT", age=2 * 86400)
    one = daemon(
        cleanup="auto_cleanup: {enabled: true, interval: 1d, rules: [{name: old, match: {states: [TIMEOUT]}, after: "
        "1d, action: destroy}]}\n"
    )
    said = []
    for command in pages.commands(pages.ROOT / "docs/troubleshooting.md"):
        words = [word.replace("/root/", f"{tmp_path}/") for word in pages.words(command)]
        if words == ["agentlab", "sandbox", "lease", "renew", "--ttl", "4h", "1000"]:
            # A step of the restore, on records that were put back: tests/daemon/test_restore.py types it there.
            continue
        if words[0] == "agentlab":
            done = agentlab(*words[1:], socket=one.socket)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said.append(done.stdout)
    assert len(said) > 15
    for wanted in (
        "sandbox 1000 destroyed (state=STOPPED)\n",
        "sandbox 1001 destroyed (state=RUNNING)\nsandbox 1002 destroyed (state=RUNNING)\n",
        "pruned 1 sandbox(es)\n",
        "no drift: the records and Proxmox VE agree\n",
    ):
        assert wanted in said, wanted
    assert [(one.vmid, one.state) for one in lab.records() if one.live] == [(1003, "RUNNING")]


def curl(command: str, **replaced: str) -> Any:
    """What the command of a page prints, with these texts replaced; it must end well, and with a status below 400."""
    words = pages.words(command)
    for old, new in replaced.items():
        words = [word.replace({"socket": SOCKET, "tcp": TCP, "token": "$TOKEN"}[old], new) for word in words]
    done = subprocess.run([*words, "--fail-with-body"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_request_of_the_daemons_page_works_as_it_stands(
    daemon: Callable[..., Daemon], lab: Lab, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("a-long-token-of-the-tests-77aa\n")
    token.chmod(0o600)
    tcp = f"127.0.0.1:{free_port()}"
    one = daemon(listen=tcp, listen_token_file=str(token))
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over", 20)
    asked = [command for command in pages.commands(DAEMON_PAGE) if command.startswith("curl ")]
    told = {
        command.split("http://")[1].partition("'")[0].partition("/")[2]: curl(
            command, socket=one.socket, tcp=tcp, token=token.read_text().strip()
        )
        for command in asked
    }
    assert len(asked) == 17 and told["v1/healthz"] == {"status": "ok"}
    # One after the other: the sandbox is made, listed, renewed, stopped, started and destroyed.
    assert [found["vmid"] for found in told["v1/sandboxes?state=RUNNING&tag=web"]["sandboxes"]] == [1000]
    assert (
        told["v1/sandboxes/1000/stop"]["state"] == "STOPPED" and told["v1/sandboxes/1000/start"]["state"] == "RUNNING"
    )
    assert told["v1/sandboxes/destroy"]["results"][0]["outcome"] == "destroyed" and lab.ours() == {}
    assert told["v1/sandboxes/1000/events?tail=5"]["events"][-1]["to_state"] == "DESTROYED"
    assert (
        told["v1/doctor?bundle=true"]["bundle"]["configuration"]
        and told["v1/cleanup/release"]["released"]["reason"] == "maintenance"
    )


def test_the_cleanup_commands_of_the_daemons_page_work(daemon: Callable[..., Daemon], lab: Lab) -> None:
    one = daemon(
        cleanup="auto_cleanup: {mode: shadow, interval: 1d, rules: [{name: old, match: {states: [TIMEOUT]}, after: "
        "1d, action: destroy}]}\n"
    )
    page = DAEMON_PAGE.read_text().split("### Cleanup")[1].split("## Signals")[0]
    said = [
        agentlab(*pages.words(line[2:])[1:], socket=one.socket)
        for line in page.splitlines()
        if line.startswith("$ agentlab ")
    ]
    assert [done.returncode for done in said] == [0, 0, 0], said
    assert said[1].stdout == "cleanup frozen: the storage is being moved\n"
