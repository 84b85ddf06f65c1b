# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who may ask the daemon: its socket and its group, TCP with a token, the actor that the kernel names."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, Make, ask, free_port
from support.lab import Lab

NOBODY = 65534


def as_nobody(one: Daemon, group: int, method: str, path: str, body: Any = None) -> str:
    """What another user with that group gets: the status, or the name of the error."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        # Only what cannot fail in a strange way: this is a copy of the test's process.
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(NOBODY)
            told = str(one.request(method, path, body).status)
        except BaseException as error:
            told = type(error).__name__
        os.write(write_end, told.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_socket_is_for_its_group_alone(daemon: Make) -> None:
    one = daemon()
    assert stat.S_IMODE(os.stat(one.socket).st_mode) == 0o660
    assert as_nobody(one, NOBODY, "GET", "/v1/healthz") == "PermissionError"
    assert as_nobody(one, os.getgid(), "GET", "/v1/healthz") == "200"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_actor_of_every_event_is_who_the_kernel_says_it_is(daemon: Make, lab: Lab) -> None:
    made = lab.create("a1")
    one = daemon()
    assert as_nobody(one, os.getgid(), "POST", "/v1/sandboxes/1000/lease/renew", {"ttl_minutes": 300}) == "200"
    assert lab.events(made)[-1]["actor"] == f"nobody (uid {NOBODY}) via API"
    assert f"renew_lease 1000 by nobody (uid {NOBODY}) via API: 1000 renewed" in one.log()


def test_tcp_needs_the_token_and_metrics_need_none(daemon: Make, tmp_path: Path, lab: Lab) -> None:
    lab.create("a1")
    token = tmp_path / "token"
    token.write_text("a-long-token-of-the-tests-77aa\n")
    token.chmod(0o640)
    port, metrics = free_port(), free_port()
    one = daemon(listen=f"127.0.0.1:{port}", listen_token_file=str(token), metrics_listen=f"127.0.0.1:{metrics}")

    def get(path: str, **headers: str) -> Any:
        import http.client

        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            return ask(connection, "GET", path, None, headers)

    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "a-long-token-of-the-tests-77aa"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff\xfe"},
    ):
        answer = get("/v1/sandboxes", **headers)
        assert (answer.status, answer.body["error"]) == (401, "a valid bearer token is required")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert (
        get("/v1/sandboxes", Authorization="Bearer a-long-token-of-the-tests-77aa").body["sandboxes"][0]["vmid"] == 1000
    )
    text = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20).read().decode()
    assert 'agentlab_sandboxes{state="RUNNING"} 1.0' in text
    assert "a-long-token" not in one.log() + text


def test_the_last_line_of_a_daemon_that_cannot_start_says_what_to_do(daemon: Make, tmp_path: Path) -> None:
    """systemd gives up after some of these: the end of the journal is all that an operator has."""
    one = daemon(start=False, listen="127.0.0.1:9820", listen_token_file=str(tmp_path / "none"))
    ended = subprocess.run(one.command(), env=one.environment, capture_output=True, text=True, timeout=30, check=False)
    cause, last = ended.stderr.splitlines()[-2:]
    assert (
        ended.returncode == 1
        and "Error: listen_token_file: " in cause
        and "agentlabd ends; the lines before say why" in last
    )
    assert "systemctl reset-failed agentlabd" in last
