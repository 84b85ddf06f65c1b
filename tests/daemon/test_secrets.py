# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Nothing that a request brought by mistake comes back in an error, goes into the log, or stays in the records."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, free_port
from support.lab import Lab

SECRET = "correct-horse-made-up-77"
USER_DATA = f"#cloud-config\npassword: {SECRET}\n"
PRIVATE_KEY = f"-----BEGIN KEY-----\n{SECRET}\n-----END KEY-----\n"
NEW = "/v1/sandboxes"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # In the right place, but wrong.
        (NEW, {"cloud_init_user_data": SECRET}),
        (NEW, {"cloud_init_user_data": [SECRET]}),
        (NEW, {"cloud_init_user_data": {"password": SECRET}}),
        (NEW, {"cloud_init_user_data": SECRET * 30000}),
        (NEW, {"cloud_init_user_data": f"#cloud-config\n{SECRET}: ["}),
        (NEW, {"cloud_init_user_data": USER_DATA, "ssh_public_keys": ["ssh-ed25519 AAAA"]}),
        # Somewhere else.
        (NEW, {"cloud_init_userdata": USER_DATA}),
        (NEW, {"password": SECRET}),
        (NEW, {USER_DATA: True}),
        (NEW, {f"password {SECRET}": 1}),
        (NEW, {"cloud_init": {"user_data": USER_DATA}}),
        (NEW, {"profile": {"cloud_init_user_data": USER_DATA}}),
        (NEW, {"name": [USER_DATA]}),
        (NEW, {"name": f"a\n{SECRET}"}),
        (NEW, {"template": f"x\n{SECRET}"}),
        (NEW, {"profile": f"x\n{SECRET}"}),
        (NEW, {"tags": [f"a\n{SECRET}!"]}),
        (NEW, {"cores": USER_DATA}),
        (NEW, {"keepalive": USER_DATA}),
        (NEW, {"ttl": USER_DATA}),
        (NEW, {"ttl_minutes": USER_DATA}),
        (NEW, {"tags": USER_DATA}),
        (NEW, {"ip_config": f"x\r{SECRET}"}),
        (NEW, {"node": f"x\n{SECRET}"}),
        (NEW, {"workspace": f"x\n{SECRET}"}),
        (NEW, {"network_model": f"x\n{SECRET}"}),
        (NEW, {"ssh_public_keys": [PRIVATE_KEY]}),
        (NEW, {"ssh_public_keys": [SECRET]}),
        (NEW, {"ssh_public_keys": PRIVATE_KEY}),
        (NEW, [USER_DATA]),
        (NEW, USER_DATA),
        (NEW, f'{{"password": "{SECRET}"'.encode()),
        (NEW, USER_DATA.encode()),
        ("/v1/sandboxes/destroy", {"vmids": [USER_DATA]}),
        ("/v1/sandboxes/destroy", {"vmids": USER_DATA}),
        ("/v1/sandboxes/destroy", {"vmids": {"a": SECRET}}),
        ("/v1/sandboxes/prune", {"older_than": f"1h\n{SECRET}"}),
        ("/v1/sandboxes/prune", {"states": [f"TIMEOUT\n{SECRET}"]}),
        ("/v1/sandboxes/1000/stop", {"password": SECRET}),
        ("/v1/sandboxes/1000/lease/renew", {"ttl": [SECRET]}),
        ("/v1/workspaces", {"name": f"w\n{SECRET}", "size": "1G"}),
        ("/v1/workspaces", {"name": "w1", "size": "1G", "storage": f"x\n{SECRET}"}),
        ("/v1/workspaces/w1/attach", {"vmid": 1000, "ttl": f"1h\n{SECRET}"}),
        ("/v1/cleanup/freeze", {"reason": {"a": SECRET}}),
    ],
)
def test_a_refused_body_is_never_quoted(one_daemon: Daemon, path: str, body: Any) -> None:
    answer = one_daemon.post(path, body)
    assert answer.status == 400, answer.body
    assert SECRET not in str(answer.body) and "BEGIN" not in str(answer.body), answer.body
    assert SECRET not in one_daemon.log()


@pytest.mark.parametrize(
    "query",
    [
        f"state=RUNNING%0A{SECRET}",
        f"{SECRET}%0A=1",
        f"profile=a%0A{SECRET}",
        f"tag=a%0A{SECRET}%21",
        f"include_destroyed=%0A{SECRET}",
    ],
)
def test_a_refused_query_of_several_lines_is_never_quoted(one_daemon: Daemon, query: str) -> None:
    answer = one_daemon.get(f"/v1/sandboxes?{query}")
    assert answer.status == 400 and SECRET not in str(answer.body) + one_daemon.log(), answer.body


@pytest.mark.parametrize(
    "raw",
    [
        f"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\x00\r\n\r\n",
        f"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n",
        f"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {SECRET}\r\n\r\n",
        f"Authorization: Bearer {SECRET}\r\n\r\n",
        f"GET /v1/sandboxes?{'x' * 70000}{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: {SECRET}\r\n\r\n",
    ],
)
def test_a_request_that_is_no_http_is_not_quoted_in_the_log(
    daemon: Callable[..., Daemon], tmp_path: Path, raw: str
) -> None:
    token = tmp_path / "token"
    token.write_text("a-long-token-of-the-tests-77aa\n")
    token.chmod(0o600)
    port = free_port()
    one = daemon(listen=f"127.0.0.1:{port}", listen_token_file=str(token))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(raw.encode())
        answer = connection.recv(65536).decode()
    assert answer.split()[1] in ("400", "401", "431"), answer
    assert SECRET not in one.log() and "Traceback" not in one.log()
    if answer.split()[1] == "401":
        assert SECRET not in answer


def test_user_data_is_in_its_snippet_and_nowhere_else(daemon: Callable[..., Daemon], lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "snippets"
    folder.mkdir()
    lab.pve.hold_snippets(str(folder))
    one = daemon(snippets_dir=str(folder))
    made = one.good("POST", NEW, {"name": "a1", "cloud_init_user_data": USER_DATA}, 201)
    told = [str(one.get(path).body) for path in ("/v1/sandboxes/1000", "/v1/sandboxes/1000/events", "/v1/status")]
    records = b"".join(path.read_bytes() for path in Path(lab.database).parent.iterdir() if path.is_file())
    assert SECRET not in str(made) + "".join(told) + one.log()
    assert SECRET.encode() not in records and b"a1" in records
    assert [SECRET in path.read_text() for path in folder.iterdir()] == [True]
