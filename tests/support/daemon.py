# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""agentlabd as a real process against the Proxmox double, and a plain HTTP client for its socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles" / "agentlabd" / "files"
# Where a checkout has the daemon and the command line, and the link to the core that they run on.
CODE = (FILES, ROOT / ".collections")
PYTHONPATH = os.pathsep.join(map(str, CODE))
# How long a start may take on a machine that does much else.
START_SECONDS = 180
# Another interpreter (one with Debian's versions of the libraries, say) can be tested with the same tests.
PYTHON = os.environ.get("AGENTLABD_PYTHON", sys.executable)
CONFIG = {
    "template": "debian-13",
    "shutdown_timeout": "2s",
    "claim_timeout": "5s",
    "doubt_window": "1s",
    "wait_timeout": "20s",
    "api_timeout": 10,
    "stop_timeout": "10s",
}


# Rules of a cleanup file: TIMEOUT for an hour, then destroyed.
CLEANUP_RULES = (
    "auto_cleanup:\n  interval: 1h\n  rules:\n"
    "    - {name: timeouts, match: {states: [TIMEOUT]}, after: 1h, action: destroy}\n"
)


def in_daemon(code: str) -> Any:
    """Return what a piece of Python prints as JSON where daemon, command line and core can be imported."""
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(process.stdout)


class Answer(NamedTuple):
    """Status, parsed body (text when it is no JSON) and headers."""

    status: int
    body: Any
    headers: dict[str, str]


class UnixConnection(http.client.HTTPConnection):
    """http.client over a unix socket."""

    def __init__(self, path: str, timeout: float = 60) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """Send one request and return the answer; ``body`` is sent as JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(
        method, path, raw, {"Content-Type": "application/json", **(headers or {})} if raw is not None else headers or {}
    )
    answer = connection.getresponse()
    text = answer.read().decode()
    received = dict(answer.getheaders())
    return Answer(answer.status, json.loads(text) if "json" in received.get("Content-Type", "") else text, received)


class Daemon:
    """One agentlabd. ``environment`` points it at the double; ``options`` are keys of its configuration file."""

    def __init__(
        self, folder: Path, environment: dict[str, str], *, cleanup: str | None = None, **options: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # A unix socket's path may have 107 characters; pytest's folders are often longer.
        self._sockets = tempfile.TemporaryDirectory(prefix="agentlabd-")
        os.chmod(self._sockets.name, 0o755)
        self.socket = f"{self._sockets.name}/agentlabd.sock"
        self.config_file = folder / "config.yaml"
        self.cleanup_file = folder / "cleanup.yaml"
        self.log_file = folder / "agentlabd.log"
        self.options = {**CONFIG, "socket": self.socket, "cleanup_file": str(self.cleanup_file), **options}
        self.write_config()
        if cleanup is not None:
            self.cleanup_file.write_text(cleanup, encoding="utf-8")
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PROXMOX_", "AGENTLAB_", "JOURNAL_"))
        }
        self.environment = {
            **own,
            **environment,
            "AGENTLAB_CONFIG": str(self.config_file),
            "PYTHONPATH": PYTHONPATH,
            "PYTHONUNBUFFERED": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def write_config(self, **changes: Any) -> None:
        """Write the configuration file, with these keys changed (None: left out)."""
        self.options.update(changes)
        self.config_file.write_text(
            "".join(f"{name}: {json.dumps(value)}\n" for name, value in self.options.items() if value is not None),
            encoding="utf-8",
        )

    # ---- the process ----

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of this daemon."""
        return [PYTHON, "-m", "agentlabd", "--config", str(self.config_file), *arguments]

    def spawn(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start it without waiting until it serves."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env={**self.environment, **environment}, stdout=log, stderr=log, cwd=self.folder
            )
        return self.process

    def start(self, **environment: str) -> Daemon:
        """Start the daemon, wait until it serves, and return it."""
        self.spawn(**environment)
        # Loading the libraries takes half a second of one core; others may want it too.
        self.wait_for(self.serving, "it serves", START_SECONDS)
        return self

    def serving(self) -> bool:
        """Return whether the daemon answers. Fails with its log when it has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"agentlabd ended with {self.process.returncode}:\n{self.log()}")
        try:
            return self.get("/v1/healthz").status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send the signal with that number."""
        assert self.process is not None
        self.process.send_signal(number)

    def reload(self) -> None:
        """Send SIGHUP; the caller waits for its effect."""
        self.signal(signal.SIGHUP)

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM, and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.process.wait(timeout)
        self.process = None
        return code

    def kill(self) -> None:
        """Send SIGKILL: the daemon gets no chance to say or write anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def close(self) -> None:
        """Kill the daemon and remove its socket."""
        self.kill()
        self._sockets.cleanup()

    def rss(self) -> int:
        """Return the resident memory in KiB."""
        assert self.process is not None
        match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert match
        return int(match[1])

    def cpu(self) -> float:
        """Return the seconds of processor time used so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, series: str) -> float:
        """Return the value of a series, such as agentlab_prune_runs_total{result="ok"}; metrics_listen must be set."""
        text = urllib.request.urlopen(f"http://{self.options['metrics_listen']}/metrics", timeout=20).read().decode()
        return float(next(line for line in text.splitlines() if line.startswith(series + " ")).split()[-1])

    def log(self) -> str:
        """Return all that the daemon has logged."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def wait_for(self, condition: Any, what: str, timeout: float = 10) -> Any:
        """Wait until ``condition()`` is true and return its value; the log is shown when it does not come."""
        deadline = time.monotonic() + timeout
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"within {timeout} s it did not happen that {what}; the log:\n{self.log()}")
            time.sleep(0.02)

    # ---- requests ----

    def connection(self, timeout: float = 60) -> UnixConnection:
        """Return a new connection to the socket; ``timeout`` in seconds."""
        return UnixConnection(self.socket, timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own and return the answer."""
        connection = self.connection()
        try:
            return ask(connection, method, path, body, headers)
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        """Send a GET and return the answer."""
        return self.request("GET", path)

    def post(self, path: str, body: Any = None) -> Answer:
        """Send a POST and return the answer."""
        return self.request("POST", path, body)

    def good(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """Return the body of an answer that must have that status."""
        answer = self.request(method, path, body)
        assert answer.status == status, (answer.status, answer.body)
        return answer.body


# The type of the fixture ``daemon``: a call makes one daemon.
Make = Callable[..., Daemon]


@contextlib.contextmanager
def daemon(folder: Path, environment: dict[str, str], *, start: bool = True, **options: Any) -> Iterator[Daemon]:
    """Yield a daemon for a test; it is killed at the end if the test did not stop it."""
    made = Daemon(folder, environment, **options)
    try:
        yield made.start() if start else made
    finally:
        made.close()
