# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send requests to the daemon (HTTP over its unix socket), and explain failures to the user."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import Problem, TimedOut, Unreachable
from .text import format_time_limit, join_lines

if TYPE_CHECKING:
    import http.client

DEFAULT_SOCKET = "/run/agentlab/agentlabd.sock"
# Seconds. Reads are answered at once. Work waits for tasks of Proxmox, possibly for many in turn.
READ_TIMEOUT = 30
WORK_TIMEOUT = 3600
GROUP = "agentlab"
_HEADERS = {"Accept": "application/json", "User-Agent": f"agentlab/{__version__}"}
# The daemon's codes for a request that its release does not know.
_UNKNOWN_REQUEST = ("no_such_path", "method_not_allowed")


@dataclass(frozen=True)
class Answer:
    """The daemon's answer: status, raw bytes, and parsed data."""

    status: int
    body: bytes
    data: Any

    @property
    def ok(self) -> bool:
        return self.status < 400


@dataclass
class Client:
    """The daemon's address, and the timeout in seconds (None: the default of each request)."""

    path: str
    timeout: float | None = None

    def get(self, *parts: object, **query: object) -> Answer:
        return self.send_request("GET", _build_target(parts, query), None, READ_TIMEOUT)

    def get_patiently(self, *parts: object, **query: object) -> Answer:
        """Send a GET with the timeout for work, because the daemon first reads the data from Proxmox VE or a guest."""
        return self.send_request("GET", _build_target(parts, query), None, WORK_TIMEOUT)

    def post(self, *parts: object, body: dict[str, Any] | None = None) -> Answer:
        return self.send_request("POST", _build_path(parts), body, WORK_TIMEOUT)

    def send_request(self, method: str, target: str, body: dict[str, Any] | None, timeout: int) -> Answer:
        """Send a request and return the daemon's answer, whatever its status. ``timeout`` is in seconds.

        Raises Unreachable, with the remedy, when there is no answer or no valid one, and TimedOut.
        """
        return self._check_answer(method, target, self._exchange(method, target, body, timeout))

    def send_file(self, parts: Iterable[bytes], length: int | None, *path: object, **query: object) -> Answer:
        """Send a file as the body of a PUT. Without a length it is sent in chunks."""
        headers = {"Content-Type": "application/octet-stream"}
        if length is not None:
            headers["Content-Length"] = str(length)
        target = _build_target(path, query)
        with self._open_connection(WORK_TIMEOUT) as connection:
            # A daemon that refuses a file answers early and reads no further.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("PUT", target, parts, {**_HEADERS, **headers}, encode_chunked=length is None)
            response = connection.getresponse()
            raw = response.read()
        return self._check_answer("PUT", target, Answer(response.status, raw, _parse(raw)))

    def receive_file(
        self, write: Callable[[bytes], None], *path: object, **query: object
    ) -> tuple[Answer | None, dict[str, str]]:
        """Pass the parts of a file to ``write``. Return the answer if it is an error (else None), and the headers.

        Raises Unreachable when the file ends too early, or when its checksum differs from the guest's.
        """
        import hashlib

        target = _build_target(path, query)
        digest = hashlib.sha256()
        with self._open_connection(WORK_TIMEOUT) as connection:
            connection.request("GET", target, None, _HEADERS)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            if response.status != 200 or "x-agentlab-sha256" not in headers:
                raw = response.read()
                return self._check_answer("GET", target, Answer(response.status, raw, _parse(raw))), headers
            while part := response.read(65536):
                digest.update(part)
                write(part)
        if digest.hexdigest() != headers["x-agentlab-sha256"]:
            raise Unreachable("the file did not come whole: its checksum is another one than in the guest. Try again")
        return None, headers

    def _exchange(self, method: str, target: str, body: dict[str, Any] | None, timeout: int) -> Answer:
        headers = dict(_HEADERS)
        text = None
        if body is not None:
            text = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with self._open_connection(timeout) as connection:
            connection.request(method, target, text, headers)
            response = connection.getresponse()
            raw = response.read()
        return Answer(response.status, raw, _parse(raw))

    @contextlib.contextmanager
    def _open_connection(self, timeout: int) -> Iterator[http.client.HTTPConnection]:
        """Yield a connection for one request and its answer. Errors in the block become Unreachable or TimedOut."""
        import http.client

        # --timeout 0 means no limit.
        limit = timeout if self.timeout is None else self.timeout or None
        connection = http.client.HTTPConnection("localhost", timeout=limit)
        connection.sock = sock = self._connect(limit)
        # A socket's own timeout starts again with each byte. This timer ends the whole exchange.
        over = threading.Event()
        watch = threading.Timer(limit, _shut_down_when_over, (sock, over)) if limit else None
        if watch:
            watch.daemon = True
            watch.start()
        try:
            yield connection
        except (http.client.HTTPException, OSError) as error:
            if limit and (over.is_set() or isinstance(error, TimeoutError)):
                raise _make_timeout_error(limit) from error
            if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
                raise Unreachable(
                    f"what listens on {join_lines(self.path)} does not speak HTTP: it is not agentlabd. Check "
                    "--socket and AGENTLAB_SOCKET"
                ) from error
            raise Unreachable(
                f"the daemon ended the connection before it answered ({error or type(error).__name__}); it was "
                "probably stopped. What it had begun it finishes when it runs again. See 'systemctl status agentlabd' "
                "and 'agentlab sandbox list'"
            ) from error
        finally:
            if watch:
                watch.cancel()
            connection.close()
        if over.is_set():
            # The timer ended a body without a length, which looks complete.
            raise _make_timeout_error(limit or 0)

    def _connect(self, limit: float | None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(limit)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            raise Unreachable(_explain_connection_error(self.path, error, limit)) from error
        return sock

    def _check_answer(self, method: str, target: str, answer: Answer) -> Answer:
        """Return the answer if it is from agentlabd and its release knows the request. Raises Unreachable otherwise."""
        has_error_text = isinstance(answer.data, dict) and (answer.ok or isinstance(answer.data.get("error"), str))
        if has_error_text and answer.data.get("code") == "stopping":
            # A stopping daemon counts as not running, so that a caller that waits for a restart keeps waiting.
            raise Unreachable(str(answer.data["error"]))
        if has_error_text and (answer.status not in (404, 405) or answer.data.get("code") not in _UNKNOWN_REQUEST):
            return answer
        if answer.status in (404, 405):
            daemon_version = self._read_daemon_version()
            if daemon_version is not None and daemon_version != __version__:
                raise Unreachable(
                    f"the daemon (version {daemon_version}) does not know {method} {target.partition('?')[0]}, which "
                    f"this command line (version {__version__}) asks for. Upgrade the older of the two; after an "
                    "upgrade 'systemctl restart agentlabd'"
                )
            raise Unreachable(
                f"the daemon does not know {method} {target.partition('?')[0]}. "
                f"If it was upgraded, 'systemctl restart agentlabd'; this command line is version {__version__}"
            )
        raise Unreachable(
            f"the answer of {join_lines(self.path)} to {method} {target.partition('?')[0]} makes no sense "
            f"(status {answer.status}, {answer.body[:60]!r}): it is not agentlabd, or of a very different version. "
            "Check --socket and AGENTLAB_SOCKET, and 'journalctl -u agentlabd'"
        )

    def _read_daemon_version(self) -> str | None:
        """Return the daemon's version, or None if it does not answer within two seconds."""
        try:
            status = Client(self.path, 2)._exchange("GET", "/v1/status", None, 2).data
        except Problem:
            return None
        return str(status["version"]) if isinstance(status, dict) and status.get("version") else None


def _make_timeout_error(limit: float) -> TimedOut:
    return TimedOut(
        f"the daemon did not answer within {format_time_limit(limit)} (--timeout). It goes on with what it was asked "
        "to do; see 'agentlab sandbox list'"
    )


def _build_path(parts: tuple[object, ...]) -> str:
    from urllib.parse import quote

    return "/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def _build_target(parts: tuple[object, ...], query: dict[str, object]) -> str:
    from urllib.parse import urlencode

    encoded = urlencode({name: value for name, value in query.items() if value not in (None, ())}, doseq=True)
    return _build_path(parts) + (f"?{encoded}" if encoded else "")


def _parse(raw: bytes) -> Any:
    """Return the data of a JSON answer; None for any other bytes."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _shut_down_when_over(sock: socket.socket, over: threading.Event) -> None:
    """Shut a connection down because its time is over. That ends a read in another thread as well."""
    over.set()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _explain_connection_error(path: str, error: OSError, limit: float | None) -> str:
    """Return why there is no connection, and what to do."""
    shown = join_lines(path)
    if isinstance(error, PermissionError):
        user = _read_current_user()
        return (
            f"{user} may not use the socket {shown}. Add the user to the group {GROUP} and log in again:\n"
            f"  sudo usermod -aG {GROUP} {user}"
        )
    if isinstance(error, TimeoutError):
        return (
            f"the daemon accepted no connection on {shown} within {format_time_limit(limit or 0)} (--timeout): it "
            f"hangs or is overloaded.\n{_LOOK}"
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return (
            f"the daemon is not running: there is no socket {shown}. If systemctl says that it is active, restart it."
            f"\n{_START}"
        )
    if isinstance(error, ConnectionRefusedError):
        if not _is_socket(path):
            return (
                f"{shown} is not a socket. Check --socket and AGENTLAB_SOCKET; the daemon's is {DEFAULT_SOCKET} unless "
                "configured otherwise"
            )
        return f"the daemon is not running: nothing listens on the socket {shown}.\n{_START}"
    if error.errno is None or error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
        return f"{path!r} cannot be the path of a socket: {error}"
    return f"the socket {shown} cannot be used: {error.strerror or error}.\n{_LOOK}"


_LOOK = "  systemctl status agentlabd\n  journalctl -u agentlabd"
_START = (
    "  systemctl status agentlabd    # why not\n"
    "  systemctl start agentlabd     # start it\n"
    "  journalctl -u agentlabd       # what it says"
)


def _is_socket(path: str) -> bool:
    """Return whether a path is a socket; True if that cannot be read."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


def _read_current_user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
