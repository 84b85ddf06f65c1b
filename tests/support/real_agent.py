# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Debian's real qemu-guest-agent on a unix socket, without a VM: by itself, and as the agent of the double's guest."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from fakepve import PveError

from support.proxmox_guest import NOBODY, Guest

PROGRAM = shutil.which("qemu-ga", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class RealAgent:
    """One qemu-ga as an ordinary user. As Proxmox does, every request opens the socket anew."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="qemu-ga-", dir="/tmp"))
        self.path = folder / "ga.sock"
        root = os.geteuid() == 0
        if root:
            os.chown(folder, NOBODY, NOBODY)
        self.process = subprocess.Popen(
            [
                str(PROGRAM),
                "--method=unix-listen",
                f"--path={self.path}",
                f"--statedir={folder}",
                f"--pidfile={folder}/pid",
            ],
            cwd="/",
            env=environment,
            stderr=subprocess.DEVNULL,
            **({"user": NOBODY, "group": NOBODY, "extra_groups": []} if root else {}),
        )
        deadline = time.monotonic() + 20
        while not self.path.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, "qemu-ga does not listen"
            time.sleep(0.05)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request on a connection of its own, and return the whole answer."""
        deadline = time.monotonic() + 20
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                try:
                    sock.connect(str(self.path))
                    sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                    data = b""
                    while not data.endswith(b"\n"):
                        block = sock.recv(65536)
                        if not block:
                            break
                        data += block
                except OSError:
                    data = b""
            if data:
                answer: dict[str, Any] = json.loads(data)
                return answer
            assert time.monotonic() < deadline, "qemu-ga does not answer"
            time.sleep(0.1)

    def end_of(self, pid: int) -> dict[str, Any]:
        """Ask until a program has ended, and return that answer."""
        deadline = time.monotonic() + 30
        while True:
            status: dict[str, Any] = self.ask("guest-exec-status", pid=pid)["return"]
            if status["exited"]:
                return status
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def run(self, *argv: str, data: bytes = b"") -> dict[str, Any]:
        """Run a program through the agent and return its status as the agent tells it."""
        values = {"input-data": base64.b64encode(data).decode()} if data else {}
        answer = self.ask("guest-exec", path=argv[0], arg=list(argv[1:]), **values, **{"capture-output": True})
        return self.end_of(answer["return"]["pid"])

    def close(self) -> None:
        """End the agent."""
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


class RealGuest(Guest):
    """A guest of the double whose agent is the real one: commands and files go to its socket."""

    def __init__(self, vmid: int) -> None:
        super().__init__(vmid)
        self.agent = RealAgent(self.environment)

    def exec(self, argv: list[str], data: str) -> int:
        """Begin a program through the agent and return its process id."""
        self.started.append((list(argv), data))
        words, here = [self.shell, *argv[1:]], self._here(data)
        if here != data and words[-1] == str(len(data)):
            words[-1] = str(len(here))
        values = {"input-data": base64.b64encode(here.encode()).decode(), "capture-output": True}
        answer = self.agent.ask("guest-exec", path=words[0], arg=words[1:], **values)
        return int(answer["return"]["pid"])

    def status(self, pid: int) -> dict[str, Any]:
        """Return the agent's answer about a program."""
        answer = self.agent.ask("guest-exec-status", pid=pid)
        if "error" in answer:
            raise PveError(500, f"Agent error: {answer['error']['desc']}")
        status = answer["return"]
        shown: dict[str, Any] = {"exited": int(status["exited"])}
        shown |= {name: status[name] for name in ("exitcode", "signal") if name in status}
        for name in ("out", "err"):
            if f"{name}-data" in status:
                text = base64.b64decode(status[f"{name}-data"])
                shown[f"{name}-data"] = text.replace(str(self.folder / "run").encode(), b"/run").decode("latin-1")
                shown[f"{name}-truncated"] = int(status.get(f"{name}-truncated", False))
        return shown

    def read(self, path: str, offset: int, count: int, decode: bool) -> dict[str, Any]:
        """Return the agent's answer about ``count`` bytes of a file from ``offset``."""
        opened = self.agent.ask("guest-file-open", path=self.real_path(path), mode="r")
        if "error" in opened:
            raise PveError(500, f"Agent error: {opened['error']['desc']}")
        handle = opened["return"]
        if offset:
            self.agent.ask("guest-file-seek", handle=handle, offset=offset, whence="set")
        part = self.agent.ask("guest-file-read", handle=handle, count=count)["return"]
        self.agent.ask("guest-file-close", handle=handle)
        content = base64.b64decode(part["buf-b64"]).decode("latin-1") if decode else part["buf-b64"]
        return {"content": content, "bytes-read": part["count"], **({} if part["eof"] else {"truncated": 1})}

    def close(self) -> None:
        """End the agent."""
        self.agent.close()
        super().close()
