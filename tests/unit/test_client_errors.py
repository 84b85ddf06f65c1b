# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What comes back from Proxmox, or does not, becomes data or one of our errors; secrets are in none of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import errors
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.config import ProxmoxSettings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import https as https_module
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient

from support.double import TOKEN_ID, TOKEN_SECRET, Server

PATH = "cluster/resources"


class Hurried(SystemClock):
    """Does not wait between tries."""

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(str(tmp_path_factory.mktemp("double")))
    made.pve.add_template()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def calm(server: Server) -> Iterator[None]:
    yield
    server.pve.faults.clear()
    server.pve.failures.clear()
    server.pve.counted.clear()


def client(server: Server, **changes: Any) -> ProxmoxClient:
    values = {
        "api_host": "127.0.0.1",
        "api_port": server.pve.port,
        "api_token_id": TOKEN_ID,
        "api_token_secret": TOKEN_SECRET,
        "ca_path": server.cafile,
        "api_timeout": 2,
        **changes,
    }
    return ProxmoxClient(ProxmoxSettings(**values), Hurried())


def ask(which: ProxmoxClient, method: str, path: str = PATH) -> Any:
    return getattr(which, method.lower())(path)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.ApiError),
        (401, errors.AccessDenied),
        (403, errors.AccessDenied),
        (404, errors.ApiError),
        (408, errors.OutcomeUnknown),
        (500, errors.ApiError),
        (501, errors.ApiError),
        (502, errors.OutcomeUnknown),
        (503, errors.OutcomeUnknown),
        (504, errors.OutcomeUnknown),
        (595, errors.Unreachable),
        (596, errors.OutcomeUnknown),
        (597, errors.OutcomeUnknown),
        (598, errors.OutcomeUnknown),
        (599, errors.OutcomeUnknown),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_each_status_has_its_type_of_error(
    server: Server, method: str, status: int, kind: type[errors.AgentlabError]
) -> None:
    server.pve.fault(
        method,
        "/nodes/pve1/qemu/9000/config",
        "answer",
        status=status,
        body='{"data": null, "message": "the text"}',
        times=9,
    )
    with pytest.raises(errors.ProxmoxError) as caught:
        ask(client(server), method, "nodes/pve1/qemu/9000/config")
    assert isinstance(caught.value, kind) and caught.value.code == kind.code
    assert str(status) in caught.value.message and "127.0.0.1" in caught.value.message
    assert TOKEN_SECRET not in str(caught.value.as_dict())


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "7",
        '"text"',
        "{}",
        '{"data"',
        "<html>It works!</html>",
        '{"errors": {}}',
        '{"data": {"errors": "x"}}',
        "\x00\xff",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_200_that_is_no_answer_of_proxmox(server: Server, method: str, body: str) -> None:
    server.pve.fault(method, PATH, "answer", status=200, body=body, times=9)
    with pytest.raises(errors.OutcomeUnknown):
        ask(client(server), method)


@pytest.mark.parametrize(
    "body",
    ['{"data": null}', '{"data": "x"}', '{"data": {"a": 1}}', '{"data": [1]}', '{"data": [null]}', '{"data": [[]]}'],
)
def test_a_list_is_a_list_of_objects_or_unknown(server: Server, body: str) -> None:
    server.pve.fault("GET", PATH, "answer", status=200, body=body, times=9)
    with pytest.raises(errors.OutcomeUnknown, match="not a list"):
        client(server).get_list(PATH)


@pytest.mark.parametrize("body", ['{"data": null}', '{"data": []}', '{"data": 3}', '{"data": ""}'])
def test_an_object_is_an_object_or_unknown(server: Server, body: str) -> None:
    server.pve.fault("GET", PATH, "answer", status=200, body=body, times=9)
    with pytest.raises(errors.OutcomeUnknown, match="not an object"):
        client(server).get_dict(PATH)


@pytest.mark.parametrize("kind", ["cut-before", "cut-after", "truncate"])
def test_broken_connection_reads_are_repeated_and_writes_are_not(server: Server, kind: str) -> None:
    server.pve.fault("GET", PATH, kind, times=1)
    assert client(server).get_list(PATH)
    server.pve.fault("DELETE", "/qemu/9000", kind, times=1)
    server.pve.fail("DELETE", "/qemu/9000", 500, "not for tests", times=9)
    server.pve.counted.clear()
    with pytest.raises(errors.OutcomeUnknown):
        client(server).delete("nodes/pve1/qemu/9000")
    assert server.pve.counted == {"DELETE /nodes/{node}/qemu/{vmid}": 1}


@pytest.mark.parametrize(("kind", "carried_out"), [("cut-before", False), ("cut-after", True), ("truncate", True)])
def test_a_config_write_whose_connection_was_cut_is_looked_up_and_not_repeated(
    server: Server, kind: str, carried_out: bool
) -> None:
    """pveproxy cuts a write with a ticket now and then; the configuration tells whether it was carried out."""
    path = "nodes/pve1/qemu/9000/config"
    which = client(server)
    values = {"description": f"written {kind}", "digest": which.get_dict(path)["digest"]}
    server.pve.fault("PUT", "/config", kind, times=1)
    server.pve.counted.clear()
    if carried_out:
        assert which.put(path, **values) is None
    else:
        with pytest.raises(errors.OutcomeUnknown, match="whether it was carried out is not known"):
            which.put(path, **values)
    assert server.pve.counted == {"PUT /nodes/{node}/qemu/{vmid}/config": 1, "GET /nodes/{node}/qemu/{vmid}/config": 1}


@pytest.mark.parametrize(
    "text",
    ["got no worker upid - start worker failed", "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout"],
)
def test_a_write_that_was_not_begun_is_repeated(server: Server, text: str) -> None:
    server.pve.fail("PUT", "/nodes/pve1/qemu/9000/config", 500, text, times=2)
    client(server).put("nodes/pve1/qemu/9000/config", description="y")
    assert server.pve.counted["PUT /nodes/{node}/qemu/{vmid}/config"] == 3
    server.pve.fail("PUT", "/nodes/pve1/qemu/9000/config", 500, "something else", times=2)
    server.pve.counted.clear()
    with pytest.raises(errors.ApiError, match="something else"):
        client(server).put("nodes/pve1/qemu/9000/config", description="y")
    assert server.pve.counted["PUT /nodes/{node}/qemu/{vmid}/config"] == 1


def test_no_answer_in_time_is_unknown_and_names_the_setting(server: Server) -> None:
    server.pve.fault("GET", PATH, "hang", seconds=1.4)
    with pytest.raises(errors.OutcomeUnknown, match=r"no answer within 1 s \(api_timeout\)"):
        client(server, api_timeout=1).get(PATH)


def test_a_connection_that_the_server_may_be_closing_is_not_used_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxmox VE closes one after five idle seconds; a write that meets that has an unknown outcome."""
    monkeypatch.setattr(https_module, "IDLE_SECONDS", 1.0)

    def connections() -> set[int]:
        return {
            one.laddr.port
            for one in psutil.Process().net_connections("tcp")
            if one.raddr and one.raddr.port == server.port and one.status == psutil.CONN_ESTABLISHED
        } - others

    others: set[int] = set()
    others = connections()
    which = client(server)
    assert which.get_list(PATH)
    first = connections()
    assert len(first) == 1 and which.get_list(PATH) and connections() == first
    time.sleep(1.2)
    assert which.get_list(PATH) and len(connections()) == 1 and connections() != first
    which.put("nodes/pve1/qemu/9000/config", description="z")


def test_a_port_where_nobody_listens_is_unreachable(server: Server) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(errors.Unreachable, match="cannot be reached: Connection refused; check api_host, api_port"):
        client(server, api_port=port).get(PATH)


def test_name_that_does_not_resolve(server: Server) -> None:
    with pytest.raises(errors.Unreachable, match="cannot be reached"):
        client(server, api_host="nowhere.invalid").get(PATH)


def test_a_certificate_of_another_authority_is_refused_with_ca_path(server: Server, tmp_path: Path) -> None:
    other = Server(str(tmp_path))
    try:
        with pytest.raises(errors.Unreachable, match="certificate of 127.0.0.1:.* is not trusted.*set ca_path"):
            client(server, ca_path=other.cafile).get(PATH)
        with pytest.raises(errors.Unreachable, match="not trusted"):
            client(server, ca_path=None).get(PATH)
    finally:
        other.stop()
    with pytest.warns(Warning, match="Unverified HTTPS"):
        assert client(server, ca_path=None, validate_certs=False).get(PATH)


def test_host_name_is_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: real("127.0.0.1" if host == "pve.test" else host, *rest, **more),
    )
    with pytest.raises(
        errors.Unreachable, match=r"is not for pve\.test, but for .*: set api_host to a name that is in it"
    ):
        client(server, api_host="pve.test").get(PATH)


@pytest.mark.parametrize("junk", [b"", b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\n\r\nplain"])
def test_a_port_of_another_service_is_unreachable(server: Server, junk: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                while True:
                    conn, _dummy = listener.accept()
                    conn.sendall(junk)
                    conn.close()
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(errors.ProxmoxError) as caught:
            client(server, api_port=listener.getsockname()[1]).get(PATH)
        assert isinstance(caught.value, (errors.Unreachable, errors.OutcomeUnknown))
        listener.shutdown(socket.SHUT_RDWR)


def test_wrong_token_says_what_to_check(server: Server) -> None:
    told = r"refuses the credentials of agentlab@pve!tests \(401.*check api_user, api_token_id and api_token_secret"
    with pytest.raises(errors.AccessDenied, match=told) as caught:
        client(server, api_token_secret="wrong-secret").get(PATH)
    assert "wrong-secret" not in str(caught.value.as_dict())


def test_wrong_password_says_what_to_check(server: Server) -> None:
    with pytest.raises(
        errors.AccessDenied, match="refuses the login of 'root@pam'.*check api_user and api_password"
    ) as caught:
        client(server, api_token_id=None, api_token_secret=None, api_password="wrong-secret").get(PATH)
    assert "wrong-secret" not in str(caught.value.as_dict())


def test_missing_privilege_is_named(server: Server) -> None:
    server.pve.fail("GET", PATH, 403, "Permission check failed (/vms/120, VM.Audit)", times=1)
    with pytest.raises(
        errors.AccessDenied,
        match=r"agentlab@pve!tests may not do that \(403 Permission check failed \(/vms/120, VM.Audit\)",
    ):
        client(server).get(PATH)


def test_parameter_errors_are_told(server: Server) -> None:
    with pytest.raises(errors.ApiError, match=r"400 .*vmid: "):
        client(server).get("cluster/nextid", vmid="abc")


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 308])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_redirect_is_neither_followed_nor_taken_for_success(server: Server, method: str, status: int) -> None:
    server.pve.fault(method, PATH, "answer", status=status, body="", times=9)
    with pytest.raises(errors.OutcomeUnknown, match="the request was redirected"):
        ask(client(server), method)
    server.pve.faults.clear()
    server.pve.fault(
        method, PATH, "answer", status=status, body="", headers={"Location": "https://127.0.0.1:1/elsewhere"}, times=9
    )
    with pytest.raises(errors.OutcomeUnknown, match="the request was redirected"):
        ask(client(server), method)


def test_secret_is_in_no_repr_of_the_client(server: Server) -> None:
    which = client(server)
    which.get(PATH)
    assert TOKEN_SECRET not in repr(which.settings) and TOKEN_SECRET not in repr(vars(which))
