# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Test hosts for molecule: Debian booted under systemd-nspawn, each with its sshd on a loopback address of its own.

A host is an overlay in memory over a tree that mmdebstrap made. Trees are kept outside the repository and made again
when the list of packages changes. Needs root, systemd-container and mmdebstrap; no KVM, no systemd on the machine
itself.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

RUN = Path("/run/agentlab-test-hosts")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentlab-test-hosts"
# Where the packages come from; without it, where mmdebstrap takes them from by itself.
MIRROR = os.environ.get("AGENTLAB_DEBIAN_MIRROR", "")
# A bare server with what Ansible needs to get in. Nothing of what the role installs.
PACKAGES = (
    "systemd-sysv",
    "dbus",
    "python3",
    "python3-apt",
    "openssh-server",
    "iproute2",
    "ca-certificates",
    "sudo",
    "procps",
)
# Part of the key of a tree: raise it when the way a tree is made changes.
RECIPE = 1
# Not 22: the machine's own sshd may listen there on every address.
SSH_PORT = 22022
# How nspawn says that the host asked for a reboot.
REBOOT = 133
# A mirror may stutter while it takes in what is new: apt asks again, and so do we.
TRIES = 3
APT_RETRIES = 'Acquire::Retries "5";'
STOP_SECONDS = 20
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class Failed(Exception):
    """What went wrong, for people."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="boot a host and wait for its sshd")
    start.add_argument("name")
    start.add_argument("--release", required=True, help="bookworm or trixie")
    start.add_argument("--address", required=True, help="loopback address, such as 127.0.1.12")
    start.add_argument("--key", required=True, type=Path, help="public key that may log in as root")
    supervise = commands.add_parser("supervise", help="what start leaves running")
    supervise.add_argument("name")
    commands.add_parser("stop", help="stop a host and remove every trace of it").add_argument("name")
    commands.add_parser("stop-all", help="stop every host that there is")
    given = parser.parse_args()
    if os.geteuid() != 0:
        raise Failed("test hosts need root (systemd-nspawn, mounts and cgroups); run as root or with sudo")
    if given.command == "start":
        for tool, package in (
            ("systemd-nspawn", "systemd-container"),
            ("mmdebstrap", "mmdebstrap"),
            ("mount", "mount"),
        ):
            if shutil.which(tool) is None:
                raise Failed(f"{tool} is missing; apt-get install {package}")
        Host(given.name).start(given.release, given.address, given.key)
    elif given.command == "supervise":
        Host(given.name).supervise()
    elif given.command == "stop":
        Host(given.name).stop()
    else:
        for found in sorted(RUN.iterdir()) if RUN.is_dir() else []:
            if found.is_dir():
                Host(found.name).stop()
    return 0


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def _cgroup_root() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, where, kind = line.split()[:3]
        if kind == "cgroup2":
            return Path(where)
    raise Failed("no cgroup2 is mounted on this machine; hosts cannot be booted")


# ---- trees ----


def tree(release: str) -> Path:
    """The base tree of a release, made when it is not there yet."""
    options = _apt_options()
    key = hashlib.sha256("\n".join((str(RECIPE), MIRROR, *PACKAGES, *options)).encode()).hexdigest()[:12]
    made = CACHE / f"{release}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            for old in CACHE.glob(f"{release}-*"):
                shutil.rmtree(old)
            # Not in the cache folder itself: a run that is killed must not leave half a tree that looks like a whole
            # one.
            draft = CACHE / f".{release}.draft"
            for attempt in range(TRIES):
                shutil.rmtree(draft, ignore_errors=True)
                try:
                    # The package lists stay: a bare host knows what there is to install.
                    _call(
                        "mmdebstrap",
                        "--quiet",
                        "--mode=root",
                        "--variant=apt",
                        "--skip=cleanup/apt/lists",
                        f"--include={','.join(PACKAGES)}",
                        *(f"--aptopt={option}" for option in options),
                        release,
                        str(draft),
                        *filter(None, [MIRROR]),
                    )
                    break
                except Failed:
                    if attempt == TRIES - 1:
                        raise
                    time.sleep(10 * (attempt + 1))
            draft.rename(made)
    return made


def _apt_options() -> list[str]:
    """What the machine's apt needs to reach its servers (proxies, dates): the hosts' apt needs it too."""
    done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    found = (
        line
        for line in done.stdout.splitlines()
        if re.match(r'Acquire::(https?::.*|Check-Date|Check-Valid-Until) ".+";', line)
    )
    return [*sorted(found), APT_RETRIES]


# ---- hosts ----


class Host:
    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", name):
            raise Failed(f"{name!r} is no name for a host")
        self.name = name
        self.folder = RUN / name
        self.root = self.folder / "root"
        self.layers = self.folder / "layers"
        self.pid_file = self.folder / "pid"
        self.log = self.folder / "log"
        self.cgroup = _cgroup_root() / f"agentlab-test-host-{name}"

    def start(self, release: str, address: str, key: Path) -> None:
        base = tree(release)
        self.stop()
        self.root.mkdir(parents=True)
        self.layers.mkdir()
        _call("mount", "-t", "tmpfs", "-o", "mode=0755", "agentlab-test-host", str(self.layers))
        (self.layers / "upper").mkdir()
        (self.layers / "work").mkdir()
        options = f"lowerdir={base},upperdir={self.layers}/upper,workdir={self.layers}/work"
        _call("mount", "-t", "overlay", "-o", options, "agentlab-test-host", str(self.root))
        self._furnish(address, key)
        with self.log.open("w") as log:
            supervisor = subprocess.Popen(
                [sys.executable, __file__, "supervise", self.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        self.pid_file.write_text(str(supervisor.pid))
        deadline = time.monotonic() + 60
        while not _answers(address):
            if supervisor.poll() is not None or time.monotonic() > deadline:
                text = self.log.read_text(errors="replace")[-3000:]
                self.stop()
                raise Failed(f"{self.name} did not come up:\n{text}")
            time.sleep(0.1)

    def _furnish(self, address: str, key: Path) -> None:
        """What tells this host from the base tree."""

        def put(path: str, text: str, mode: int = 0o644) -> None:
            target = self.root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_text(text)
            target.chmod(mode)

        put("/etc/hostname", f"{self.name}\n")
        put("/etc/hosts", f"127.0.0.1 localhost\n{address} {self.name} pve1.example.net\n")
        put(
            "/etc/ssh/sshd_config.d/test.conf",
            f"ListenAddress {address}\nPort {SSH_PORT}\nPermitRootLogin prohibit-password\nUseDNS no\n",
        )
        (self.root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        put("/root/.ssh/authorized_keys", key.read_text(), 0o600)
        for unit in (
            "apt-daily.timer",
            "apt-daily-upgrade.timer",
            "ssh.socket",
            "systemd-resolved.service",
            "systemd-networkd.service",
        ):
            link = self.root / "etc/systemd/system" / unit
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
        # The certificates that the machine trusts, and its proxies.
        bundle = self.root / str(CA_BUNDLE).lstrip("/")
        if CA_BUNDLE.is_file():
            bundle.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CA_BUNDLE, bundle)
        put("/etc/environment", "".join(f"{name}={os.environ[name]}\n" for name in PROXIES if os.environ.get(name)))

    def supervise(self) -> None:
        """Run the host, again after each reboot it asks for, until SIGTERM."""
        stopping = False
        nspawn: subprocess.Popen[bytes] | None = None

        def stop(*_dummy: object) -> None:
            nonlocal stopping
            stopping = True
            if nspawn is not None and nspawn.poll() is None:
                # nspawn hands it on as the request to power off.
                nspawn.send_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        self.cgroup.mkdir(exist_ok=True)
        command = [
            "systemd-nspawn",
            "--boot",
            "--quiet",
            f"--directory={self.root}",
            f"--machine={self.name}",
            "--register=no",
            "--keep-unit",
            "--resolv-conf=copy-host",
            "--timezone=off",
            "--console=pipe",
        ]
        # A child enters the cgroup, not this process: nspawn divides the cgroup that it finds itself in.
        enter = ["/bin/sh", "-c", f'echo $$ > "{self.cgroup}/cgroup.procs" && exec "$@"', "sh"]
        while not stopping:
            nspawn = subprocess.Popen(
                [*enter, *command],
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL,
            )
            if stopping:
                stop()
            code = nspawn.wait()
            print(f"supervisor: {self.name} ended with {code}", flush=True)
            if code != REBOOT:
                break
            self._empty_cgroup()

    def stop(self) -> None:
        """Stop the host if it runs, and remove its processes, cgroups and mounts, whatever state they are in."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(self.pid_file.read_text())
            # The number may have been handed out again.
            if "supervise" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                os.kill(pid, signal.SIGTERM)
                for _dummy in _until(STOP_SECONDS):
                    if not _alive(pid):
                        break
        self._empty_cgroup()
        for folder in sorted(self.cgroup.rglob("*/"), reverse=True) if self.cgroup.is_dir() else []:
            _remove_cgroup(folder)
        if self.cgroup.is_dir():
            _remove_cgroup(self.cgroup)
        for where in (self.root, self.layers):
            while os.path.ismount(where):
                subprocess.run(["umount", "--lazy", str(where)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _empty_cgroup(self) -> None:
        """Killing nspawn alone would leave the host's processes, its sshd among them."""
        if not self.cgroup.is_dir():
            return
        for _dummy in _until(10):
            if "populated 0" in (self.cgroup / "cgroup.events").read_text():
                return
            (self.cgroup / "cgroup.kill").write_text("1")


def _remove_cgroup(folder: Path) -> None:
    for _dummy in _until(5):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            continue


def _until(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, SSH_PORT), timeout=2) as found:
            found.settimeout(2)
            return found.recv(4) == b"SSH-"
    except OSError:
        return False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
