# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the daemon tells: its log, systemd, metrics that fail, and no secret."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from support.daemon import Make, free_port
from support.lab import Lab


def test_a_scrape_that_fails_says_why_here_and_there(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    lab.create("a1")
    metrics = free_port()
    one = daemon(metrics_listen=f"127.0.0.1:{metrics}")
    with contextlib.closing(sqlite3.connect(lab.database)) as conn:
        conn.execute("ALTER TABLE sandboxes RENAME TO elsewhere")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20)
    with contextlib.closing(sqlite3.connect(lab.database)) as conn:
        conn.execute("ALTER TABLE elsewhere RENAME TO sandboxes")
    said = refused.value.read().decode()
    assert refused.value.code == 503 and "no such table" in said and "Traceback" not in said
    assert f"metrics: {said.strip()}" in one.log() and "Traceback" not in one.log()


def test_a_kill_in_the_middle_of_a_bulk_destroy_converges(daemon: Make, lab: Lab) -> None:
    for number in range(10):
        lab.create(f"a{number}")
    lab.pve.real_secs["qmdestroy"] = 0.5
    foreign = lab.swap(1009)
    one = daemon(connections=4)
    one.wait_for(lambda: one.get("/v1/status").body["reconcile"]["last_run"], "the first reconcile is over")

    def ask_and_be_left() -> None:
        with contextlib.suppress(Exception):
            one.post("/v1/sandboxes/destroy", {"vmids": list(range(1000, 1009)), "force": True})

    client = threading.Thread(target=ask_and_be_left)
    client.start()
    one.wait_for(lambda: lab.pve.counted["DELETE /nodes/{node}/qemu/{vmid}"] >= 2, "deletes were sent")
    one.kill()
    client.join(10)
    left = lab.leftovers()["operations"]
    assert left, "the kill came in the middle of something"
    one.start()
    one.wait_for(lambda: not lab.leftovers()["operations"], "the next start finishes what was begun", 20)
    # What the killed run had begun is gone, what it had not begun is as it was.
    begun = {entry["sandbox_uuid"] for entry in left}
    for record in lab.records():
        if record.uuid in begun:
            assert record.state == "DESTROYED"
    again = one.good("POST", "/v1/sandboxes/destroy", {"vmids": list(range(1000, 1009)), "force": True})
    assert again["failed_count"] == 0
    assert {record.state for record in lab.records() if record.vmid != 1009} == {"DESTROYED"}
    lab.untouched(foreign)


def test_the_log_has_priorities_when_it_goes_to_the_journal(daemon: Make) -> None:
    one = daemon(start=False)
    one.log_file.touch()
    found = one.log_file.stat()
    one.start(JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    one.write_config(nonsense=1)
    one.reload()
    one.wait_for(lambda: "not reloaded" in one.log(), "the broken file is told")
    lines = one.log().splitlines()
    assert lines[0].startswith("<6>agentlabd 1."), lines
    assert lines[-1].startswith("<3>not reloaded")


def test_no_secret_is_told(daemon: Make, lab: Lab) -> None:
    from support.double import TOKEN_SECRET

    lab.create("a1")
    one = daemon(environment={"PROXMOX_TOKEN_SECRET": TOKEN_SECRET + "-wrong"})
    answer = one.post("/v1/sandboxes/1000/stop")
    assert answer.status == 502 and answer.body["code"] == "proxmox_access"
    told = json.dumps([answer.body, one.good("GET", "/v1/status")]) + one.log()
    assert TOKEN_SECRET not in told
    assert "refuses the credentials" in told
    assert one.process is not None
    assert TOKEN_SECRET not in Path(f"/proc/{one.process.pid}/cmdline").read_text()
