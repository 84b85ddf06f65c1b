# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Behaviour on a terminal and in a pipe: progress, control characters, Control-C, a full disk, narrow windows."""

from __future__ import annotations

import os
import re
import subprocess
import time
import unicodedata
from typing import Any

import pytest

from support.cli import PYTHON, StandIn, agentlab, environment, on_terminal, outcome, sandbox
from support.cli_answers import bulk


def slow_bulk(daemon: StandIn) -> None:
    """A destroy of three, one after the other, within two seconds and a half."""
    left = [1009, 1010, 1011]

    def work(_it: StandIn) -> tuple[int, Any]:
        for _step in range(3):
            time.sleep(0.6)
            left.pop()
        return 200, {"results": [outcome(vmid, "destroyed") for vmid in (1009, 1010, 1011)]}

    daemon.replies["POST", "/v1/sandboxes/destroy"] = work
    daemon.replies["GET", "/v1/sandboxes"] = lambda _it: (
        200,
        {"sandboxes": [sandbox(vmid, "TIMEOUT") for vmid in left]},
    )


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(daemon: StandIn) -> None:
    answer = "".join(f"sandbox {vmid} destroyed (state=TIMEOUT)\n" for vmid in (1009, 1010, 1011))
    args = ("sandbox", "destroy", "--force", 1009, 1010, 1011)
    slow_bulk(daemon)
    status, shown = on_terminal(*args, socket=daemon.path)
    assert status == 0
    assert re.search(r"\rdestroying: [012] of 3 done \(\d+s\)\x1b\[K", shown)
    assert shown.endswith("\r\x1b[K" + answer.replace("\n", "\r\n")), "the progress is gone when the answer comes"
    daemon.asked.clear()
    slow_bulk(daemon)
    found = agentlab(*args, socket=daemon.path)
    assert (found.stdout, found.stderr) == (answer, "")
    assert [one[0] for one in daemon.asked] == ["POST"], "nothing is asked for in between either"
    slow_bulk(daemon)
    status, shown = on_terminal(*args, "--json", socket=daemon.path)
    assert "destroying" not in shown
    slow_bulk(daemon)
    status, shown = on_terminal(*args, socket=daemon.path, env={"TERM": "dumb"})
    assert shown == answer.replace("\n", "\r\n")


def test_progress_that_cannot_be_looked_up_is_not_shown(daemon: StandIn) -> None:
    slow_bulk(daemon)
    daemon.replies["GET", "/v1/sandboxes"] = (500, {"error": "database: disk I/O error", "code": "store"})
    status, shown = on_terminal("sandbox", "destroy", "--force", 1009, 1010, 1011, socket=daemon.path)
    assert status == 0 and "Traceback" not in shown and "Exception" not in shown
    assert ("GET", "/v1/sandboxes") in [one[:2] for one in daemon.asked], "it was looked up"


NASTY = "x\x1b]0;owned\x07\x9b2J\r\nError: sandbox 1 destroyed\u202e\xad\u2066\U000e0041\udcff"


@pytest.mark.parametrize(
    "words",
    [
        [f"--{NASTY}"],
        [NASTY],
        ["sandbox", NASTY],
        ["sandbox", "list", NASTY],
        ["sandbox", "list", f"--{NASTY}"],
        ["sandbox", "list", f"--json={NASTY}"],
        ["sandbox", "list", "--state", NASTY],
        ["sandbox", "destroy", NASTY],
        ["sandbox", "new", "--memory", NASTY],
        ["sandbox", "new", "--user-data", f"/{NASTY}"],
        ["--timeout", NASTY, "status"],
        ["--socket", f"/{NASTY}", "status"],
        ["completion", NASTY],
        ["help", NASTY],
    ],
    ids=lambda words: " ".join(words).replace(NASTY, "NASTY"),
)
@pytest.mark.parametrize("json_too", [False, True])
def test_an_argument_cannot_control_the_terminal(words: list[str], json_too: bool) -> None:
    told = subprocess.run(
        [os.fsencode(word) for word in (PYTHON, "-m", "agentlab_cli", *(["--json"] if json_too else []), *words)],
        capture_output=True,
        timeout=60,
        env=environment("/nowhere/d.sock", {"PYTHONUTF8": "1"}),
        check=False,
    )
    shown = (told.stdout + told.stderr).decode()
    assert told.returncode in (2, 3) or words[2:3] == ["--user-data"], told
    assert not [char for char in shown if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert "Traceback" not in shown and "\nError: sandbox 1" not in shown, shown


def test_control_c_says_that_the_daemon_goes_on(daemon: StandIn) -> None:
    slow_bulk(daemon)
    status, shown = on_terminal(
        "sandbox", "destroy", "--force", 1009, 1010, 1011, socket=daemon.path, press=("destroying", b"\x03")
    )
    assert status == 130
    assert shown.replace("\r\n", "\n").endswith(
        "\x1b[K\nError: interrupted. The daemon finishes what it has begun; see 'agentlab sandbox list'\n"
    )
    assert "Traceback" not in shown


def test_a_reader_that_leaves_is_no_error(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(vmid) for vmid in range(1000, 4000)]})
    found = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{PYTHON} -m agentlab_cli sandbox list | head -n 1"],
        capture_output=True,
        text=True,
        env=environment(daemon.path),
        check=False,
    )
    assert found.stdout.startswith("VMID")
    assert found.stderr == ""


def test_a_full_disk_behind_standard_output_is_an_error(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000)]})
    with open("/dev/full", "w", encoding="utf-8") as full:
        found = subprocess.run(
            [PYTHON, "-m", "agentlab_cli", "sandbox", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(daemon.path),
            check=False,
        )
    assert (found.returncode, found.stderr) == (
        1,
        "Error: standard output: No space left on device; the daemon has answered\n",
    )


def test_half_a_character_from_elsewhere_is_shown_harmless(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [{**sandbox(1000), "name": "a\ud800"}]})
    found = agentlab("sandbox", "list", socket=daemon.path)
    assert (found.returncode, found.stderr) == (0, "") and "a\\ud800" in found.stdout


def test_names_with_line_feeds_make_no_lines_of_their_own(daemon: StandIn) -> None:
    nasty = "a\nsandbox 1 destroyed\r\u2028b\u202ec\u200fd\x1b[31m"
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, name=nasty)]})
    daemon.replies["POST", "/v1/sandboxes/1000/stop"] = (409, {"error": f"VM 1000 is named {nasty}"})
    bulk(daemon, 207, outcome(1000, "failed", message=nasty), outcome(1001, "failed", message=nasty))
    listed = agentlab("sandbox", "list", socket=daemon.path)
    assert len(listed.stdout.splitlines()) == 2 and not re.search("[\u2028\u202e\u200f\x1b]", listed.stdout)
    refused = agentlab("sandbox", "stop", 1000, socket=daemon.path)
    assert len(refused.stderr.splitlines()) == 1 and not re.search("[\u2028\u202e\u200f\x1b]", refused.stderr)
    assert len(agentlab("sandbox", "destroy", 1000, 1001, socket=daemon.path).stderr.splitlines()) == 2


def test_narrow_terminals_lose_columns_before_rows_wrap(daemon: StandIn) -> None:
    daemon.replies["GET", "/v1/sandboxes"] = (200, {"sandboxes": [sandbox(1000, tags=["nightly"], name="a" * 20)]})
    for columns, missing in ((200, set()), (86, {"TAGS"}), (78, {"TAGS", "NODE"})):
        _status, shown = on_terminal("sandbox", "list", socket=daemon.path, env={"COLUMNS": str(columns)})
        head = shown.splitlines()[0].split()
        assert {"VMID", "NAME", "STATE", "NODE", "IP", "PROFILE", "LEASE", "AGE", "TAGS"} - set(head) == missing, (
            columns,
            shown,
        )
        assert max(map(len, shown.splitlines())) <= columns
    assert "TAGS" in agentlab("sandbox", "list", socket=daemon.path, env={"COLUMNS": "40"}).stdout, (
        "a pipe has no width"
    )
