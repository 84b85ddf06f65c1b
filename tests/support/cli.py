# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command line as a real process, in pipes and on a terminal.

A stand-in daemon answers (or misbehaves) as a test says.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
# With a folder of libraries the same tests run against other releases of click.
LIBRARIES = os.environ.get("AGENTLAB_TEST_CLI_LIBRARIES")


def environment(socket: str | Path | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a user's environment, with nothing of the test run in it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AGENTLAB_", "PYTEST_", "_AGENTLAB")) and name != "COLUMNS"
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "roles/agentlabd/files"), LIBRARIES)))
    # Compiled once, as where it is installed, and not into the checkout.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONPYCACHEPREFIX"] = str(ROOT / ".cache/pycache")
    if socket is not None:
        env["AGENTLAB_SOCKET"] = str(socket)
    return {**env, **(extra or {})}


def agentlab(
    *args: object,
    socket: str | Path | None = None,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> subprocess.CompletedProcess[str]:
    """Run ``agentlab ARGS`` in pipes; the answer has returncode, stdout and stderr."""
    return subprocess.run(
        [PYTHON, "-m", "agentlab_cli", *map(str, args)],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=environment(socket, env),
        check=False,
    )


def start(*args: object, socket: str | Path | None = None) -> subprocess.Popen[str]:
    """Start ``agentlab ARGS`` in pipes, for a test that watches it run."""
    return subprocess.Popen(
        [PYTHON, "-m", "agentlab_cli", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(socket, {"PYTHONUNBUFFERED": "1"}),
        # Tests that run under nohup ignore SIGHUP, and a program started by them would too.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def on_terminal(
    *args: object,
    socket: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
    press: tuple[str, bytes] | None = None,
) -> tuple[int, str]:
    """Run ``agentlab ARGS`` on a terminal: exit status, and all that it wrote there.

    ``press``: when the text appears, type these keys.
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [PYTHON, "-m", "agentlab_cli", *map(str, args)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        close_fds=True,
        env=environment(socket, {"TERM": "xterm", **(env or {})}),
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(terminal)
    shown, ends = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < ends:
            if not select.select([controller], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(controller, 65536)
            except OSError:
                # The last process that had the terminal open is gone.
                break
            if not piece:
                break
            shown += piece
            if press and press[0].encode() in shown:
                os.write(controller, press[1])
                press = None
        return process.wait(max(0.1, ends - time.monotonic())), shown.decode()
    finally:
        os.close(controller)
        if process.poll() is None:
            process.kill()
            process.wait()


def _own_terminal() -> None:
    """Make standard input the terminal of the new session, so that Ctrl-C there reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


Reply = tuple[int, Any] | Callable[["StandIn"], tuple[int, Any]]


class StandIn:
    """A daemon that answers what a test says.

    ``replies[method, target]`` is (status, body) or a function; ``asked`` is what came.
    """

    def __init__(self, path: Path, replies: Mapping[tuple[str, str], Reply] | None = None) -> None:
        self.path = path
        self.replies: dict[tuple[str, str], Reply] = dict(replies or {})
        self.asked: list[tuple[str, str, Any]] = []

    def __enter__(self) -> StandIn:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                stand_in.asked.append((self.command, self.path, json.loads(raw) if raw else None))
                reply = stand_in.replies.get(
                    (self.command, self.path), (404, {"error": "no such path", "code": "no_such_path"})
                )
                status, body = reply(stand_in) if callable(reply) else reply
                if status == 0:
                    # The daemon is gone in the middle of it.
                    self.wfile.write(body)
                    self.close_connection = True
                    return
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def address_string(self) -> str:
                return "socket"

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                # A client that went away is what some tests are about.
                if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
                    super().handle_error(request, client_address)

        self._server = Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def posted(self) -> list[tuple[str, Any]]:
        """Return path and body of each POST."""
        return [(target, body) for method, target, body in self.asked if method == "POST"]


def sandbox(vmid: int, state: str = "RUNNING", **values: Any) -> dict[str, Any]:
    """Return a sandbox as the API shows it."""
    return {
        "uuid": f"0b0f7f2e-4c0a-4c39-8a55-{vmid:012d}",
        "vmid": vmid,
        "name": f"agent-{vmid}",
        "profile": None,
        "state": state,
        "node": "pve1",
        "ip": "192.0.2.10",
        "ip_seen_at": "2026-01-30T00:45:06Z",
        "workspace_id": None,
        "tags": [],
        "protected": False,
        "keepalive": False,
        "lease_expires_at": "2126-01-30T02:45:00Z",
        "created_at": "2026-01-30T00:45:00Z",
        "updated_at": "2026-01-30T00:45:07Z",
        "state_changed_at": "2026-01-30T00:45:07Z",
        **values,
    }


def outcome(
    vmid: int, word: str, *, state: str = "DESTROYED", previous: str = "TIMEOUT", **values: Any
) -> dict[str, Any]:
    """Return an item's outcome as the API shows it."""
    return {
        "vmid": vmid,
        "uuid": f"0b0f7f2e-4c0a-4c39-8a55-{vmid:012d}",
        "name": f"agent-{vmid}",
        "outcome": word,
        "previous_state": previous,
        "state": state,
        "reason": None,
        "message": None,
        "upids": [],
        "changed": word not in ("failed", "kept"),
        "failed": word == "failed",
        **values,
    }
