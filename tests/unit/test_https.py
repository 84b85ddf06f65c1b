# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The https API behind odd servers and proxies, byte for byte: a small TLS server answers as the test says."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import errors
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.config import ProxmoxSettings
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import answers
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient

from support.canned import Answer, Canned, Hurried, Shape
from support.double import TOKEN_ID, TOKEN_SECRET

PATH = "nodes/pve1/qemu/1000/config"


Make = Callable[..., Canned]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Make]:
    servers: list[Canned] = []

    def make(answer: Answer, **options: Any) -> Canned:
        servers.append(Canned(tmp_path, answer, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def say(status: str, body: bytes | str = b"", *headers: str) -> Answer:
    """Return an answer that says this and closes the connection."""
    content = body.encode() if isinstance(body, str) else body
    head = "\r\n".join(
        [
            f"HTTP/1.1 {status}",
            f"Content-Length: {len(content)}",
            "Content-Type: application/json",
            "Connection: close",
            *headers,
            "",
            "",
        ]
    )

    def answer(sock: ssl.SSLSocket, _head: bytes) -> None:
        sock.sendall(head.encode() + content)

    return answer


# ---- what an error says ----


@pytest.mark.parametrize("reason", ["500 Internal Server Error", "500 ", "500"])
def test_the_sentence_of_an_error_is_read_from_the_body(serve: Make, reason: str) -> None:
    """A proxy in front of Proxmox drops the reason phrase."""
    text = "can't lock file '/var/lock/qemu-server/lock-1000.conf' - got timeout"
    server = serve(say(reason, json.dumps({"data": None, "message": f"{text}\n"})))
    with pytest.raises(errors.ApiError) as caught:
        server.client().put(PATH, description="x")
    assert caught.value.text == text
    # So what is to be tried again is tried again.
    assert len(server.requests) == 4


def test_errors_of_parameters_are_told_by_name(serve: Make) -> None:
    body = {"data": None, "message": "Parameter verification failed.\n", "errors": {"vmid": "VM 100 already exists"}}
    with pytest.raises(errors.ApiError) as caught:
        serve(say("400 Bad Request", json.dumps(body))).client().get("cluster/nextid", vmid=100)
    assert caught.value.text == "Parameter verification failed. vmid: VM 100 already exists"


@pytest.mark.parametrize(
    "body", ["", "[]", "null", '{"message": 7}', "<html>", "[" * 5000, '{"message": "a\\u0007b\\u202ec"}']
)
def test_any_body_of_an_error_gives_one_clean_line(serve: Make, body: str) -> None:
    with pytest.raises(errors.ApiError) as caught:
        serve(say("500 it went wrong", body)).client().post("nodes/pve1/qemu/1000/clone")
    assert caught.value.message.isprintable() and caught.value.text in ("it went wrong", "a b c")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_answers_in_the_place_of_proxmox_is_told(serve: Make, status: int) -> None:
    server = serve(say(f"{status} Bad Gateway", "<html>"))
    with pytest.raises(
        errors.OutcomeUnknown,
        match=f"a proxy between here and Proxmox answers {status} Bad Gateway; nothing was changed. Look at pveproxy",
    ):
        server.client().get(PATH)
    with pytest.raises(
        errors.OutcomeUnknown, match=f"answers {status} Bad Gateway; whether it was carried out is not known"
    ):
        server.client().put(PATH, description="x")


def test_a_node_that_hangs_is_not_called_an_unknown_outcome_of_a_read(serve: Make) -> None:
    server = serve(say("596 Connection timed out"))
    with pytest.raises(
        errors.OutcomeUnknown, match=r"node pve1 does not answer \(596 Connection timed out\); nothing was changed"
    ):
        server.client().get(PATH)


def test_a_read_is_repeated_only_within_api_timeout(serve: Make) -> None:
    """Proxmox says 596 after half a minute: four of them were two minutes."""

    def slow(sock: ssl.SSLSocket, head: bytes) -> None:
        time.sleep(1.2)
        say("596 Connection timed out")(sock, head)

    server = serve(slow)
    with pytest.raises(errors.OutcomeUnknown, match="node pve1 does not answer"):
        server.client(api_timeout=2).get(PATH)
    assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Permission check failed (/vms/1000, VM.Audit)", "grant VM.Audit on /vms or the VM's pool"),
        ("Permission check failed", "grant VM.Audit on /vms or the VM's pool"),
    ],
)
def test_a_missing_privilege_is_told_with_where_to_grant_it(serve: Make, text: str, words: str) -> None:
    with pytest.raises(errors.AccessDenied, match=words):
        serve(say(f"403 {text}")).client().get(PATH)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "pool 'agents' does not exist",
            r"pool 'agents' does not exist; create it \(pveum pool add agents\), or correct pool",
        ),
        (
            "Permission check failed",
            r"or pool 'agents' does not exist: create it \(pveum pool add agents\), or correct pool",
        ),
    ],
)
def test_a_missing_pool_is_told_with_the_command_that_creates_it(serve: Make, text: str, words: str) -> None:
    with pytest.raises(errors.AccessDenied, match=words):
        serve(say(f"403 {text}")).client().post("nodes/pve1/qemu/9000/clone", newid=1000, pool="agents")


# ---- bounds ----


def drip(data: bytes, pause: float = 0.2) -> Answer:
    def answer(sock: ssl.SSLSocket, _head: bytes) -> None:
        with contextlib.suppress(OSError):
            for number in range(len(data)):
                sock.sendall(data[number : number + 1])
                time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X-Slow: y\r\n" * 900,
        b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n" + b" " * 90000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 90000,
    ],
)
@pytest.mark.parametrize("method", ["get", "put"])
def test_a_server_that_sends_a_byte_at_a_time_ends_at_the_deadline(serve: Make, data: bytes, method: str) -> None:
    """Each byte would begin the socket's time-out anew."""
    server = serve(drip(data, 0.05))
    began = time.monotonic()
    with pytest.raises(
        errors.OutcomeUnknown,
        match=r"no answer within 1 s \(api_timeout\); (nothing was changed|whether it was carried out is not known)",
    ):
        getattr(server.client(api_timeout=1), method)(PATH)
    assert time.monotonic() - began < 20
    assert len(server.requests) == 1


def test_an_answer_that_comes_in_pieces_is_an_answer(serve: Make) -> None:
    body = b'{"data": {"digest": "x"}}'
    server = serve(drip(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body), 0.005))
    assert server.client(api_timeout=30).get_dict(PATH) == {"digest": "x"}


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_has_a_largest_size(serve: Make, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setattr(answers, "LARGEST_ANSWER", 1_000_000)
    body = b'{"data": "' + b"x" * 2_000_000 + b'"}'
    server = serve(
        say("200 OK", gzip.compress(body) if packed else body, *(["Content-Encoding: gzip"] if packed else []))
    )
    with pytest.raises(errors.OutcomeUnknown, match="the answer is larger than any answer of Proxmox"):
        server.client(api_timeout=30).put(PATH)


@pytest.mark.parametrize("depth", [40, 100_000])
def test_an_answer_has_a_largest_depth(serve: Make, depth: int) -> None:
    with pytest.raises(errors.OutcomeUnknown, match="not what Proxmox sends"):
        serve(say("200 OK", '{"data": ' + '{"a": [' * depth + "]}" * depth + "}")).client(api_timeout=30).put(PATH)


@pytest.mark.parametrize("nonsense", ["deep", "deeper", "large"])
@pytest.mark.parametrize("request_name", ["network-get-interfaces", "exec-status", "exec"])
def test_what_a_guest_answers_is_no_failure_of_proxmox(
    serve: Make, monkeypatch: pytest.MonkeyPatch, nonsense: str, request_name: str
) -> None:
    """Proxmox passes on what a guest agent says; what is wrong then is the guest."""
    monkeypatch.setattr(answers, "LARGEST_ANSWER", 1_000_000)
    depth = {"deep": 40, "deeper": 5000, "large": 1}[nonsense]
    body = '{"data": {"result": ' + "[" * depth + '"%s"' % ("x" * (2_000_000 if depth == 1 else 1)) + "]" * depth + "}}"
    server = serve(say("200 OK", body))
    client = server.client(api_timeout=30)
    with pytest.raises(errors.OutcomeUnknown, match="Look at qemu-guest-agent in the guest") as raised:
        (client.post if request_name == "exec" else client.get_dict)(f"nodes/pve1/qemu/1000/agent/{request_name}")
    assert "api_host" not in raised.value.message
    assert client.statistics.reachable is True and not client.statistics.errors, client.statistics.last_error
    assert len(server.requests) == 1, "the guest would answer the same again"


def test_a_guest_agent_that_does_not_run_is_no_failure_of_proxmox(serve: Make) -> None:
    client = serve(say("500 QEMU guest agent is not running", '{"data": null}')).client(api_timeout=30)
    with pytest.raises(errors.ApiError):
        client.get_dict("nodes/pve1/qemu/1000/agent/network-get-interfaces")
    with pytest.raises(errors.ApiError):
        client.get_dict(PATH)
    assert client.statistics.reachable is True and client.statistics.errors == {"api": 1}


# ---- connecting ----


def test_a_connection_that_breaks_in_the_handshake_is_made_again(serve: Make) -> None:
    server = serve(say("200 OK", '{"data": null}'), broken=2)
    assert server.client(api_timeout=30).put(PATH, description="x") is None
    assert (server.connections, len(server.requests)) == (3, 1)


def test_a_handshake_that_always_breaks_changed_nothing(serve: Make) -> None:
    server = serve(say("200 OK"), broken=99)
    with pytest.raises(errors.Unreachable, match="cannot be reached: TLS handshake broken"):
        server.client(api_timeout=30).put(PATH, description="x")
    assert server.connections == 3


CERTIFICATES = {
    "it expired": (
        Shape(end=-2),
        "expired on {end}: renew it on the node (pvecm updatecerts -f), or check the date of this host",
    ),
    "it is not valid yet": (
        Shape(begin=3),
        "is not valid before {begin}: check the date of this host (timedatectl); where that is right, set the date of "
        "the node, then renew the certificate there (pvecm updatecerts -f)",
    ),
    "its authority expired": (
        Shape(authority_days=-2),
        "cannot be verified: the CA certificate in {ca} expired on {authority_end}. Copy the present "
        "/etc/pve/pve-root-ca.pem of the node there, or check the date of this host",
    ),
    "it is for another address": (
        Shape(address="192.0.2.7"),
        "is not for 127.0.0.1, but for 192.0.2.7: set api_host to a name that is in it, or renew it on the node (pvecm "
        "updatecerts -f)",
    ),
}


@pytest.mark.parametrize("kind", CERTIFICATES)
def test_a_certificate_that_cannot_be_used_is_told_with_its_cause(serve: Make, kind: str) -> None:
    shape, sentence = CERTIFICATES[kind]
    server = serve(say("200 OK"), shape=shape)
    sentence = f"the certificate of 127.0.0.1:{server.port} {sentence}".format(ca=server.cafile, **server.dates())
    for method in ("get", "post"):
        with pytest.raises(errors.Unreachable) as caught:
            getattr(server.client(), method)(PATH)
        assert caught.value.message == sentence
    assert server.requests == []


def test_a_certificate_that_is_its_own_authority(serve: Make) -> None:
    server = serve(say("200 OK"))
    with pytest.raises(
        errors.Unreachable, match=r"is not trusted: self[- ]signed certificate.*; set ca_path to its CA"
    ):
        server.client(ca_path=None).get(PATH)
    with pytest.raises(errors.Unreachable, match=r"is not trusted: .*; set ca_path to its CA"):
        server.client(ca_path=serve(say("200 OK"), shape=Shape(end=60)).cafile).get(PATH)


def test_a_port_that_does_not_speak_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _address = listener.accept()
                    with sock:
                        sock.recv(65536)
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        settings = ProxmoxSettings(
            api_host="127.0.0.1", api_port=port, api_token_id=TOKEN_ID, api_token_secret=TOKEN_SECRET, api_timeout=10
        )
        with pytest.raises(errors.Unreachable) as caught:
            ProxmoxClient(settings, Hurried()).get(PATH)
        assert caught.value.message == (
            f"127.0.0.1:{port} does not speak TLS, so no request was sent; check api_host and api_port (Proxmox VE "
            "listens on 8006)"
        )
        listener.shutdown(socket.SHUT_RDWR)


def test_no_free_descriptor_is_told_as_not_asked(serve: Make) -> None:
    client = serve(say("200 OK", '{"data": {}}')).client()
    client.get(PATH)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[socket.socket] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(socket.socket())
        with pytest.raises(errors.Unreachable, match="no file descriptor left; Proxmox was not asked"):
            client.put(PATH, description="x")
    finally:
        for one in held:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_api_path_leads_to_an_api_below_a_path(serve: Make) -> None:
    server = serve(say("200 OK", '{"data": {"digest": "x"}}'))
    assert server.client(api_path="/proxmox").get_dict(PATH)
    assert server.requests[0].startswith(f"GET /proxmox/api2/json/{PATH} ".encode())


# ---- logging in ----

PASSWORD = "made-up-password"
TICKET = {"ticket": "PVE:root@pam:1", "CSRFPreventionToken": "2:3", "username": "root@pam"}


def test_a_second_factor_ends_the_login_after_one_attempt(serve: Make) -> None:
    """Eight wrong ones lock it, so none is sent; and each thread of a run would send another login."""
    server = serve(say("200 OK", json.dumps({"data": {**TICKET, "NeedTFA": 1}})))
    client = server.client(api_token_id=None, api_token_secret=None, api_password=PASSWORD)
    for _time in range(3):
        with pytest.raises(
            errors.AccessDenied,
            match="asks 'root@pam' for a second factor, which no program can give; use an API token",
        ) as caught:
            client.get(PATH)
    assert len(server.requests) == 1 and b"tfa" not in server.requests[0]
    assert PASSWORD not in str(caught.value.as_dict())


def test_a_refused_login_is_not_repeated_by_the_next_request(serve: Make) -> None:
    server = serve(say("401 authentication failure", '{"data": null}'))
    client = server.client(api_token_id=None, api_token_secret=None, api_password=PASSWORD)
    for _time in range(3):
        with pytest.raises(
            errors.AccessDenied, match="refuses the login of 'root@pam' .*check api_user and api_password"
        ):
            client.get(PATH)
    assert len(server.requests) == 1


def test_a_ticket_is_sent_with_its_token_and_renewed_once(serve: Make) -> None:
    tickets = 0

    def answer(sock: ssl.SSLSocket, head: bytes) -> None:
        nonlocal tickets
        if b"/access/ticket" in head:
            tickets += 1
            say("200 OK", json.dumps({"data": {**TICKET, "ticket": f"T{tickets}"}}))(sock, head)
        elif b"PVEAuthCookie=T1" in head:
            say("401 permission denied - invalid PVE ticket")(sock, head)
        else:
            say("200 OK", '{"data": null}')(sock, head)

    server = serve(answer)
    server.client(api_token_id=None, api_token_secret=None, api_password=PASSWORD).put(PATH, description="x")
    assert (
        tickets == 2
        and b"CSRFPreventionToken: 2:3" in server.requests[-1]
        and b"PVEAuthCookie=T2" in server.requests[-1]
    )


# ---- proxies of the environment ----


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_reached_is_named(serve: Make, clean_environment: pytest.MonkeyPatch, name: str) -> None:
    clean_environment.setenv(name, "http://somebody:made-up@127.0.0.1:9")
    server = serve(say("200 OK", '{"data": {}}'))
    with pytest.raises(
        errors.Unreachable, match=f"the proxy http://127.0.0.1:9 of {name} cannot be reached .*into NO_PROXY"
    ) as caught:
        server.client().get(PATH)
    assert "made-up" not in str(caught.value.as_dict()) and server.connections == 0
    clean_environment.setenv("NO_PROXY", "127.0.0.1")
    assert server.client().get(PATH) == {}


def test_a_proxy_that_answers_nonsense_is_named(serve: Make, clean_environment: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _address = listener.accept()
                    with conn:
                        conn.recv(65536)
                        conn.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")

        threading.Thread(target=answer, daemon=True).start()
        clean_environment.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(errors.ProxmoxError, match=r"the proxy http://127.0.0.1:\d+ of HTTPS_PROXY.*NO_PROXY"):
            serve(say("200 OK")).client().put(PATH, description="x")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required", "502 Bad Gateway"])
def test_a_proxy_that_refuses_is_named(serve: Make, clean_environment: pytest.MonkeyPatch, status: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _address = listener.accept()
                    with conn:
                        conn.recv(65536)
                        conn.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

        threading.Thread(target=refuse, daemon=True).start()
        clean_environment.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(
            errors.Unreachable,
            match=rf"the proxy http://127.0.0.1:\d+ of HTTPS_PROXY refuses \({status}\).*into NO_PROXY",
        ):
            serve(say("200 OK")).client().put(PATH, description="x")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:9", "needs the Python library PySocks"),
        ("gopher://127.0.0.1:9", "cannot be used. Valid: http://HOST:PORT"),
    ],
)
def test_a_proxy_of_another_kind_is_refused_by_name(
    serve: Make, clean_environment: pytest.MonkeyPatch, proxy: str, words: str
) -> None:
    clean_environment.setenv("ALL_PROXY", proxy)
    with pytest.raises(errors.Unreachable, match=f"the proxy {proxy} of ALL_PROXY .*{words}.*NO_PROXY"):
        serve(say("200 OK")).client().get(PATH)
