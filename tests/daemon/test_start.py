# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The start of the daemon: agentlabd --check, files that cannot be used, one daemon a socket."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.daemon import CLEANUP_RULES, PYTHON, Make
from support.lab import Lab


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"listen": "0.0.0.0:9820"}, "listen: '0.0.0.0:9820' is not valid. Valid: a loopback address and a port"),
        ({"metrics_listen": "192.0.2.1:9820"}, "metrics_listen: '192.0.2.1:9820' is not valid"),
        ({"listen": "127.0.0.1:9820"}, "listen_token_file: missing, but listen is set"),
        ({"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/open"}, "can be read by every user"),
        (
            {"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/short"},
            "must hold one token of at least 16 characters",
        ),
        ({"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/long"}, "and at most 4096"),
        (
            {"listen": "127.0.0.1:9820", "listen_token_file": "{tmp}/none"},
            "listen_token_file: {tmp}/none: No such file or directory",
        ),
        ({"sokcet": "/run/x"}, "has the unknown key 'sokcet'"),
        ({"expire_interval": "0s"}, "expire_interval: '0s' is zero"),
    ],
)
def test_check_refuses_what_the_start_would_refuse(
    daemon: Make, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    for name, mode, text in (("open", 0o644, "x" * 40), ("short", 0o600, "x"), ("long", 0o600, "x" * 4097)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    one = daemon(start=False, **{name: value.replace("{tmp}", str(tmp_path)) for name, value in options.items()})
    for more in (["--check"], []):
        done = subprocess.run(
            one.command(*more), env=one.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 1 and words.replace("{tmp}", str(tmp_path)) in done.stderr, done
        assert "Traceback" not in done.stderr


def test_check_of_good_files_and_of_rules_that_are_not_in_place_yet(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    one = daemon(start=False, cleanup=CLEANUP_RULES)
    done = subprocess.run(
        one.command("--check"), env=one.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "agentlabd: the configuration can be used\n")
    assert not os.path.exists(lab.database), "a check opens no database"
    other = tmp_path / "new.yaml"
    other.write_text(CLEANUP_RULES.replace("action", "aktion"))
    done = subprocess.run(
        one.command("--check", "--cleanup-file", str(other)),
        env=one.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1 and "line 4: unknown key 'aktion'" in done.stderr
    version = subprocess.run(
        [PYTHON, "-m", "agentlabd", "--version"],
        env=one.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert version.stdout.startswith("agentlabd 1.")


def test_one_socket_has_one_daemon_and_a_killed_one_leaves_no_obstacle(daemon: Make) -> None:
    first = daemon()
    second = subprocess.run(
        first.command(), env=first.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode == 1 and "is served by another agentlabd" in second.stderr
    assert first.good("GET", "/v1/healthz") == {"status": "ok"}
    first.kill()
    assert os.path.exists(first.socket)
    assert first.start().good("GET", "/v1/healthz") == {"status": "ok"}


def test_two_clients_destroy_the_same_sandbox(daemon: Make, lab: Lab) -> None:
    lab.create("a1")
    one = daemon()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: one.post("/v1/sandboxes/1000/destroy", {"force": True}), range(2)))
    assert [answer.status for answer in both] == [200, 200]
    assert sorted(answer.body["changed"] for answer in both) == [False, True]
    assert len([request for request in lab.pve.requests if request[0] == "DELETE"]) == 1


def test_the_log_says_what_was_asked(daemon: Make, lab: Lab) -> None:
    one = daemon()
    one.post("/v1/sandboxes", {"name": "a1"})
    one.post("/v1/workspaces", {"name": "w1", "size": "1G", "storage": "local-lvm"})
    one.post("/v1/workspaces/w1/attach", {"vmid": 1000})
    one.post("/v1/sandboxes/destroy", {"vmids": [1000, 1999], "force": True})
    one.post("/v1/cleanup/freeze", {"reason": "the storage is being moved"})
    one.post("/v1/sandboxes/reconcile", {"apply": True})
    for line in (
        'create_sandbox name="a1" by ',
        'create_workspace name="w1" by ',
        "attach_workspace w1 vmid=1000 by ",
        "destroy_sandboxes 1000 1999 force=true by ",
        'freeze_cleanup reason="the storage is being moved" by ',
        "reconcile_sandboxes apply=true by ",
    ):
        assert line in one.log(), line
