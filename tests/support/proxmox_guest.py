# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The guest agents of the Proxmox double: they really run commands, as an ordinary user, each in a folder of its own.

``pve.machine(vmid)`` is the guest of a running VM whose agent is up. It stands in for a machine of its own in this way:
the wrapper's /run is a folder of the guest, its uptime is the guest's, and programs run as "nobody" where the tests are
root. All else is this machine, so tests write into ``guest.folder`` only.

How the agent answers is what the real one (qemu-ga 10 through Proxmox VE 9.2) was seen to do; the switches:

- ``guest.shell``: the shell behind /bin/sh. ``guest.use_busybox()``: that shell and all programs are busybox.
- ``guest.freeze(seconds)``: nothing is answered for that long. ``guest.freeze_after_ping(seconds)``: the next command
  is taken, not answered in time, and carried out afterwards.
- ``guest.lose_status(times)``: the next exec-status times out, and its output is lost.
- ``guest.restart(kill=False)``: a new agent, which knows no process; ``kill`` as systemd does, with all processes.
- ``guest.reboot()``: all processes end, /run is empty, the uptime begins anew.
- ``guest.blocked``: names of RPCs that the guest blocks. ``guest.deaf``: True after a request that was not ASCII.
- ``guest.lie``: called with the answer of an exec-status before it is sent; returns what is sent instead.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakepve import PveError

NOBODY = 65534
# Bytes of output that still arrive within the five seconds of an exec-status.
LARGEST_STATUS = 3 * 1024 * 1024
LARGEST_ARGUMENT = 131071


class BrokenPipe(Exception):
    """The daemon breaks off: 596 without a body."""


class Program:
    """One program that the agent started, with its output as the agent collects it: until the end of file."""

    def __init__(self, argv: list[str], data: bytes, guest: Guest) -> None:
        root = os.geteuid() == 0
        with tempfile.TemporaryFile() as source:
            source.write(data)
            source.seek(0)
            self.process = subprocess.Popen(
                [os.fsencode(word) for word in [*guest.entrance, *argv]],
                stdin=source if data else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=guest.environment,
                start_new_session=True,
                **({"user": NOBODY, "group": NOBODY, "extra_groups": []} if root and not guest.entrance else {}),
            )
        self.out = bytearray()
        self.err = bytearray()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, target), daemon=True)
            for pipe, target in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: Any, target: bytearray) -> None:
        with pipe:
            while block := pipe.read1(65536):
                target += block

    def ended(self) -> bool:
        """Return whether the program has ended and all its output was read."""
        return self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers)


class Guest:
    """One guest: a folder, a shell, and the processes that its agent started."""

    def __init__(self, vmid: int) -> None:
        self.vmid = vmid
        self.folder = Path(tempfile.mkdtemp(prefix=f"guest-{vmid}-", dir="/tmp"))
        self.mark = f"AGENTLAB_GUEST={self.folder.name}"
        (self.folder / "run").mkdir()
        if os.geteuid() == 0:
            for path in (self.folder, self.folder / "run"):
                os.chown(path, NOBODY, NOBODY)
        self.shell = shutil.which("dash") or "/bin/sh"
        self.path = os.defpath if not os.environ.get("PATH") else os.environ["PATH"]
        self.booted = time.monotonic() - 7 * 86400
        self.programs: dict[int, Program] = {}
        # Words before each program: they enter the guest's mounts and become its user.
        self.entrance: list[str] = []
        self._mounts: subprocess.Popen[str] | None = None
        # Every command that began, in order: the arguments and the input as the agent got them.
        self.started: list[tuple[list[str], str]] = []
        self.blocked: set[str] = set()
        self.deaf = False
        # qemu-ga 7.2 says: Invalid parameter 'pid'
        self.unknown_pid = "PID ld does not exist"
        self.lie: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.busy = asyncio.Lock()
        self.waiting = 0
        self.served = 0.0
        self.peak = 0
        self._pid = 160
        self._silent_until = 0.0
        self._after_ping = 0.0
        self._lose = 0

    # ---- what tests switch ----

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of programs in this guest."""
        name, _sign, value = self.mark.partition("=")
        return {"PATH": self.path, name: value}

    def use_busybox(self) -> None:
        """Make busybox the shell and all programs of this guest."""
        program = shutil.which("busybox")
        assert program, "busybox is not installed (apt-get install busybox-static)"
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        subprocess.run([program, "--install", "-s", str(folder)], check=True)
        self.shell, self.path = str(folder / "sh"), str(folder)

    def replace_files(self, files: dict[str, str]) -> None:
        """Give this guest files of its own in the place of the machine's, owned by root and mode 0440. Needs root."""
        lines = []
        for number, (path, text) in enumerate(files.items()):
            own = self.folder / f"own-{number}"
            own.write_text(text, encoding="utf-8")
            own.chmod(0o440)
            lines.append(f"mount --bind {own} {path}")
        self._mount(lines)

    def limit_run(self, kibibytes: int) -> None:
        """Give this guest a /run of that size. Needs root."""
        self._mount([f"mount -t tmpfs -o size={kibibytes}k,mode=0777 tmpfs {self.folder}/run"])

    def _mount(self, lines: list[str]) -> None:
        """Let this guest's programs run where these commands were run before, and nothing else sees their mounts."""
        script = " && ".join([*lines, "echo mounted", "exec sleep 3600"])
        self._mounts = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._mounts.stdout is not None and self._mounts.stdout.readline() == "mounted\n"
        self.entrance = [
            *("nsenter", f"--mount=/proc/{self._mounts.pid}/ns/mnt", "--"),
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"),
        ]

    def freeze(self, seconds: float) -> None:
        """Let the agent answer nothing for ``seconds``."""
        self._silent_until = time.monotonic() + seconds

    def freeze_after_ping(self, seconds: float) -> None:
        """Let the agent answer nothing for ``seconds`` after the next ping."""
        self._after_ping = seconds

    def lose_status(self, times: int = 1) -> None:
        """Lose the next ``times`` answers about a program's status."""
        self._lose = times

    def restart(self, *, kill: bool = False) -> None:
        """Restart the agent, which forgets its programs; ``kill`` ends the programs, too."""
        self.programs.clear()
        self.deaf, self._silent_until = False, 0.0
        if kill:
            self.kill_all()

    def reboot(self) -> None:
        """Reboot the guest: all programs end, and the folder /run is emptied."""
        self.restart(kill=True)
        shutil.rmtree(self.folder / "run")
        (self.folder / "run").mkdir()
        if os.geteuid() == 0:
            os.chown(self.folder / "run", NOBODY, NOBODY)
        self.booted = time.monotonic()

    def processes(self) -> list[int]:
        """Return the process ids of all that runs in this guest."""
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    state = (entry / "stat").read_text().rpartition(") ")[2][:1]
                    if state != "Z" and self.mark.encode() in (entry / "environ").read_bytes():
                        alive.append(int(entry.name))
                except OSError:
                    continue
        return alive

    def kill_all(self) -> None:
        """End all processes of this guest."""
        for _round in range(20):
            alive = self.processes()
            if not alive:
                return
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)

    def close(self) -> None:
        """End all processes and remove the guest's folder."""
        self.kill_all()
        if self._mounts is not None:
            self._mounts.kill()
            self._mounts.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what the agent does ----

    @property
    def silent(self) -> bool:
        """Return whether the agent answers nothing now."""
        return self.deaf or time.monotonic() < self._silent_until

    def take_freeze(self) -> float:
        """Return the seconds of silence that were ordered for after a ping, and forget them."""
        seconds, self._after_ping = self._after_ping, 0.0
        return seconds

    def exec(self, argv: list[str], data: str) -> int:
        """Start a program; raises BrokenPipe where the real daemon breaks off over the agent's refusal."""
        words = [self.shell if word == "/bin/sh" and not number else word for number, word in enumerate(argv)]
        if any(len(os.fsencode(word)) > LARGEST_ARGUMENT for word in words) or not shutil.which(
            words[0], path=self.path
        ):
            raise BrokenPipe
        self.started.append((list(argv), data))
        self._pid += 1
        here = self._here(data)
        if here != data and words[-1] == str(len(data)):
            # The wrapper's script says how long it is.
            words[-1] = str(len(here))
        self.programs[self._pid] = Program([word.replace("\0", "\ufffd") for word in words], here.encode(), self)
        self.peak = max(self.peak, len(self.programs))
        return self._pid

    def _here(self, text: str) -> str:
        """Return the wrapper's script with this guest's /run and uptime in the place of the machine's."""
        offset = int(float(Path("/proc/uptime").read_text().split()[0]) - (time.monotonic() - self.booted))
        uptime = f"</proc/uptime; u=$((${{u%.*}}-({offset}))).${{u#*.}}; }}"
        return text.replace("for b in /run /var/run /tmp;", f"for b in {self.folder}/run;").replace(
            "</proc/uptime; }", uptime
        )

    def status(self, pid: int) -> dict[str, Any]:
        """Return the agent's answer about a program."""
        program = self.programs.get(pid)
        if program is None:
            raise PveError(500, f"Agent error: {self.unknown_pid}")
        if not program.ended():
            return {"exited": 0}
        del self.programs[pid]
        if self._lose or len(program.out) + len(program.err) > LARGEST_STATUS:
            self._lose = max(0, self._lose - 1)
            raise TimeoutError
        answer: dict[str, Any] = {"exited": 1}
        code = program.process.returncode
        answer.update({"signal": -code} if code < 0 else {"exitcode": code})
        out = bytes(program.out)
        head, line, rest = out.partition(b"\n")
        if head.startswith(b"agentlab1 "):
            out = head.replace(str(self.folder / "run").encode(), b"/run") + line + rest
        for name, data in (("out", out), ("err", bytes(program.err))):
            if data:
                answer[f"{name}-data"], answer[f"{name}-truncated"] = data.decode("latin-1"), 0
        return self.lie(answer) if self.lie else answer

    def real_path(self, path: str) -> str:
        """Return where a path of the guest lies on this machine."""
        root = f"/proc/{self._mounts.pid}/root" if self._mounts is not None else ""
        return root + (str(self.folder) + path if path.startswith("/run/") else path)

    def read(self, path: str, offset: int, count: int, decode: bool) -> dict[str, Any]:
        """Return the agent's answer about ``count`` bytes of a file from ``offset``."""
        try:
            with open(self.real_path(path), "rb") as file:
                file.seek(offset)
                data = file.read(count)
                more = bool(file.read(1))
        except FileNotFoundError:
            text = f"Agent error: failed to open file '{path}' (mode: 'r'): No such file or directory"
            raise PveError(500, text) from None
        except IsADirectoryError:
            raise PveError(500, "Agent error: failed to read file: Is a directory") from None
        if decode:
            answer: dict[str, Any] = {"content": data.decode("latin-1")}
        else:
            pieces = [data[at : at + 1048576] for at in range(0, len(data), 1048576)]
            answer = {"content": "".join(base64.b64encode(piece).decode() for piece in pieces)}
        answer["bytes-read"] = len(data)
        return {**answer, "truncated": 1} if more else answer

    def write(self, path: str, data: bytes) -> None:
        """Write a file of the guest."""
        try:
            with open(self.real_path(path), "wb") as file:
                file.write(data)
            os.chmod(self.real_path(path), 0o666)
        except FileNotFoundError:
            text = f"Agent error: failed to open file '{path}' (mode: 'wb'): No such file or directory"
            raise PveError(500, text) from None
