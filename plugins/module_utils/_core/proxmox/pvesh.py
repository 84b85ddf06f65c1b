# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Send requests through ``pvesh``, the command line of the Proxmox API on a node.

pvesh needs root, but no token and no Python library. It answers (on Proxmox VE 8 and 9) differently from the https API:

- Exit status 0 is success. Any other status is a refusal, and its number means nothing. Standard error contains
  warnings after a success too, so its text is an error only after a refusal.
- A request that starts a task returns when the task has ended, and exits with 0 even if the task failed. Standard
  error is empty only after a good end. Otherwise it contains the error of the task, ``Task finished with 1
  warning(s)!``, or ``got unexpected control message`` after a killed worker (tee_worker in PVE::RESTEnvironment). So
  empty standard error means ``OK``, and in every other case the task's exit status must be read.
- Standard output contains the lines of the task's log before the answer. For a request to another node (which pvesh
  reaches by ssh), log lines and answer are one JSON string without line feeds.
- A config write prints ``update VM 100: ...`` for this node, and nothing for another node.
- If ssh could not connect, nothing was done. If the ssh connection broke later, the outcome is unknown.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from typing import Any

from ..config import ENVIRONMENT, ProxmoxSettings
from ..errors import ApiError, InvalidInput, OutcomeUnknown, ProxmoxError, Unreachable, is_out_of_descriptors
from . import answers

_COMMANDS = {"GET": "get", "POST": "create", "PUT": "set", "DELETE": "delete"}
# A task id as the answer: in quotes (escaped inside a glued string), and at the end.
_TASK_ID = re.compile(
    r'\\?"(UPID:[^:\s"\\]+:[0-9A-F]{8,}:[0-9A-F]{8,}:[0-9A-F]{8,}:[^:\s"\\]+:[^:\s"\\]*:[^:\s"\\]+:)\\?"["\s]*$'
)
# Any other answer at the end of a string with log lines, such as the name of a new volume.
_LAST_STRING = re.compile(r'"([^"\s]+)"\s*$')
_CONFIG = re.compile(r"/(qemu|lxc)/\d+/config$")
_USAGE = re.compile(r"(proxy handler failed: )?(pvesh (get|create|set|delete|ls|usage) <api_path>|USAGE: )")
# Warnings that are no part of an error, such as Perl's nine lines about a missing locale.
_WARNING = re.compile(
    r"perl: warning: |(LANGUAGE|LC_\w+|LANG) = |are supported and installed|Use of uninitialized value|Wide character in |"
    r"Warning: Permanently added |WARN(ING)?: "
)
_NO_SSH = re.compile(
    r"ssh: connect to host|ssh: Could not resolve|Host key verification failed|kex_exchange_identification|"
    r"Permission denied \(publickey"
)
_BROKEN_SSH = re.compile(
    r"[Cc]onnection (to \S+ )?(closed|reset|timed out)|closed by remote host|Broken pipe|client_loop|"
    r"Timeout, server \S+ not responding"
)
# A VM, its hook script and a backup inherit the environment of the pvesh that started them. So remove the variables
# that systemd and the unit set for the daemon's own Python.
_SERVICE_ENVIRONMENT = {
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONNODEBUGRANGES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
}
# Secret parameters, refused because every user of the host can see pvesh's arguments.
_SECRET_OPTIONS = ("cipassword", "password")


class Pvesh:
    """Run one pvesh for each request. Safe to use from several threads."""

    # pvesh returns from a write only after the task has ended, so the task's status is available at once.
    awaits_tasks = True

    def __init__(self, settings: ProxmoxSettings) -> None:
        self._settings = settings
        program = shutil.which("pvesh") or shutil.which("pvesh", path="/usr/bin:/usr/sbin")
        if program is None:
            raise InvalidInput(
                "api_host: not set, and this host has no pvesh; run on a Proxmox node, or set api_host and a token",
                option="api_host",
            )
        self._program = program
        # Tasks that ended well according to pvesh, until a caller asks for them.
        self._ended_well: set[str] = set()
        self._qm = shutil.which("qm") or shutil.which("qm", path="/usr/bin:/usr/sbin")

    def shows_input(self, path: str) -> bool:
        """Return whether the process list would show the input of a command in a guest.

        False on this node, where ``qm`` reads the input from a pipe (see _start_in_guest).
        """
        return self._qm is None or path.split("/")[1:2] != [socket.gethostname().partition(".")[0]]

    def send(self, method: str, path: str, params: dict[str, Any]) -> Any:
        """Send a request and return the answer's data: a task id if a task was started, None for an empty answer.

        Raises AccessDenied, ApiError, Unreachable or OutcomeUnknown as the https API does, and InvalidInput for a value
        that pvesh cannot take.
        """
        if method == "POST" and path.endswith("/agent/exec") and not self.shows_input(path):
            return self._start_in_guest(path, params)
        status, output, complaint = self._run(method, path, self._make_arguments(method, path, params))
        if status == 0:
            data = self._read_data(method, path, output)
            if method != "GET" and not complaint and isinstance(data, str) and data.startswith("UPID:"):
                self._ended_well.add(data)
            return data
        raise self._make_refusal(method, path, params, status, complaint)

    def ended_well(self, upid: str) -> bool:
        """Return True, once, if pvesh has reported the task's end with ``OK``. No request is needed then."""
        try:
            self._ended_well.remove(upid)
        except KeyError:
            return False
        return True

    # ---- running pvesh ----

    def _start_in_guest(self, path: str, params: dict[str, Any]) -> Any:
        """Start a program in a guest on this node, and return Proxmox's answer.

        ``qm guest exec`` reads the program's input from standard input (up to 1 MiB), where no process list shows it.
        """
        words = [str(self._qm), "guest", "exec", path.split("/")[3], "--pass-stdin", "1", "--synchronous", "0", "--"]
        arguments = [word.encode("ascii") for word in (*words, *params["command"])]
        status, output, complaint = self._run(
            "POST", path, arguments, str(params.get("input_data") or "").encode("ascii")
        )
        if status == 0:
            # qm prints JSON on several lines, without log lines.
            data = _parse(output.strip())
            return None if data in (_NO_JSON, _TOO_DEEP) else data
        raise self._make_refusal("POST", path, params, status, complaint)

    def _make_arguments(self, method: str, path: str, params: dict[str, Any]) -> list[bytes]:
        """Return the arguments of pvesh. Raises InvalidInput for a secret, or a character that no argument may have."""
        secret = next((name for name in _SECRET_OPTIONS if params.get(name) is not None), None)
        if secret:
            raise InvalidInput(
                f"{secret}: pvesh would show it to every user of this host; set api_host and a token, or put it into "
                "user_data",
                option=secret,
            )
        words = [self._program, _COMMANDS[method], f"/{path}"]
        for name, value in params.items():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if item is not None:
                    words += [f"--{name.replace('_', '-')}", str(int(item)) if isinstance(item, bool) else str(item)]
        words += ["--output-format", "json"]
        try:
            encoded = [word.encode() for word in words]
        except UnicodeEncodeError:
            encoded = [b"\0"]
        if any(b"\0" in word for word in encoded):
            raise InvalidInput(
                f"{method} /{clean_path(path)}: a value has a NUL or a character that UTF-8 cannot encode; remove it"
            )
        return encoded

    def _run(self, method: str, path: str, arguments: list[bytes], sent: bytes | None = None) -> tuple[int, str, str]:
        """Run pvesh and return (exit status, standard output, standard error). ``sent`` is the standard input, if any.

        The task runs inside pvesh, and an interrupted clone would leave a locked VM. So pvesh gets a session of its own
        and writes to files in memory instead of pipes: the task goes on when this process ends. pvesh also gets the
        umask of a root shell, because the daemon's umask (0077) would apply to files that a task creates.

        Raises OutcomeUnknown after ``api_timeout`` for a read, and after the longer of ``api_timeout`` and
        ``wait_timeout`` for a write. A read is killed then, a write goes on.
        """
        settings = self._settings
        seconds = settings.api_timeout if method == "GET" else max(settings.api_timeout, settings.task_timeout)
        hidden = {*ENVIRONMENT.values(), "LANGUAGE", *_SERVICE_ENVIRONMENT}
        # Without a UTF-8 locale pvesh garbles non-ASCII text. If the locale is not installed, Perl prints warnings.
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"LC_ALL": "C.UTF-8"}
        try:
            with (
                open(os.memfd_create("pvesh"), "w+b") as output,
                open(os.memfd_create("pvesh"), "w+b") as complaint,
                open(os.memfd_create("pvesh"), "w+b") as standard_input,
            ):
                standard_input.write(sent or b"")
                standard_input.flush()
                standard_input.seek(0)
                # pmxcfs accepts uid 0 only together with gid 0 (or group www-data).
                group = 0 if os.geteuid() == 0 and os.getegid() != 0 else None
                # The core also runs in the daemon, without an AnsibleModule and its run_command.
                process = subprocess.Popen(  # pylint: disable=ansible-bad-function
                    arguments,
                    stdin=subprocess.DEVNULL if sent is None else standard_input,
                    stdout=output,
                    stderr=complaint,
                    env=environment,
                    start_new_session=True,
                    cwd="/",
                    group=group,
                    umask=0o022,
                )
                try:
                    status = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    if method == "GET":
                        process.kill()
                        process.wait()
                        raise answers.make_timeout_error(method, path, settings) from None
                    raise OutcomeUnknown(
                        f"{method} /{path} on {settings.where}: pvesh did not end within {seconds} s (wait_timeout); "
                        "the request goes on, and its outcome is not known. Run again to find out",
                        method=method,
                        path=path,
                        timed_out=True,
                    ) from None
                except BaseException:
                    if method == "GET":
                        process.kill()
                    raise
                if os.fstat(output.fileno()).st_size > answers.LARGEST_ANSWER:
                    if answers.is_from_guest(path):
                        raise answers.make_guest_error(method, path, settings)
                    raise OutcomeUnknown(
                        f"{method} /{path} on {settings.where}: the answer has more than {answers.LARGEST_ANSWER} "
                        "bytes, which no answer of Proxmox has; look at what pvesh prints",
                        method=method,
                        path=path,
                    )
                output.seek(0)
                complaint.seek(0)
                return status, output.read().decode(errors="replace"), complaint.read(65536).decode(errors="replace")
        except OSError as error:
            if is_out_of_descriptors(error):
                raise answers.make_descriptor_error(path) from None
            raise Unreachable(
                f"{method} /{path} on {settings.where}: pvesh cannot be started: {error.strerror}; Proxmox was not "
                "asked",
                path=path,
            ) from None

    # ---- reading answers ----

    def _read_data(self, method: str, path: str, output: str) -> Any:
        """Return the answer's data from the standard output of a request that succeeded."""
        # The output of a config write quotes the description. That is a user's text, so do not parse it.
        if method == "PUT" and _CONFIG.search(path):
            return None
        if method != "GET":
            task = _TASK_ID.search(output)
            if task:
                return task[1]
        text = output.strip()
        if not text:
            return None
        data = _parse(text)
        if data is _TOO_DEEP and answers.is_from_guest(path):
            raise answers.make_guest_error(method, path, self._settings)
        if method == "GET":
            if data in (_NO_JSON, _TOO_DEEP):
                raise OutcomeUnknown(
                    f"GET /{path} on {self._settings.where}: the answer of pvesh is not JSON, so nothing is known; "
                    "run again, or look at what pvesh prints",
                    method=method,
                    path=path,
                )
            return data
        if data in (_NO_JSON, _TOO_DEEP):
            # Log lines only, or log lines followed by the answer in the last line.
            data = _parse(text.splitlines()[-1])
            return None if data is _NO_JSON else data
        glued = _LAST_STRING.search(data) if isinstance(data, str) else None
        return glued[1] if glued else data

    def _make_refusal(
        self, method: str, path: str, params: dict[str, Any], status: int, complaint: str
    ) -> ProxmoxError:
        """Return the error for a request with an exit status other than 0. ``complaint`` is the standard error."""
        settings = self._settings
        where = f"{method} /{path} on {settings.where}"
        lines = [line.strip() for line in complaint.splitlines() if line.strip() and not _USAGE.match(line)]
        # Use the warnings only if standard error contains nothing else.
        lines = [line for line in lines if not _WARNING.match(line)] or lines
        text = " ".join(lines).removeprefix("proxy handler failed: ")
        facts = {"method": method, "path": path}
        if status < 0 or not text:
            how = f"was ended by signal {-status}" if status < 0 else f"exited with {status} and said nothing"
            return OutcomeUnknown(f"{where}: pvesh {how}; {answers.describe_outcome(method)}, run again", **facts)
        facts["text"] = answers.clean(text, settings)
        if "please run as root" in text:
            return Unreachable(f"{where}: pvesh works only as root; use become, or set api_host and a token", **facts)
        if "ipcc_send_rec" in text:
            group = os.getegid()
            advice = (
                f"this process has group id {group}, and pmxcfs wants 0 (Group=root in a unit)"
                if group
                else "look at systemctl status pve-cluster"
            )
            return Unreachable(
                f"{where}: pmxcfs of this node refuses the connection ({facts['text']}); {advice}", **facts
            )
        if _NO_SSH.search(text):
            return Unreachable(f"{where}: the node does not answer ({facts['text']})", **facts)
        if _BROKEN_SSH.search(text):
            return OutcomeUnknown(f"{where}: {answers.describe_outcome(method)} ({facts['text']})", **facts, cut=True)
        number = re.match(r"(?:Unknown option: \S+ )?([45]\d\d) ", text)
        if number:
            text = text.removeprefix(f"{number[1]} ")
        error = answers.make_error(
            method, path, settings, int(number[1]) if number else _guess_status(text), text, params
        )
        if isinstance(error, ApiError):
            error.detail.setdefault("exit", status)
        return error


def clean_path(path: str) -> str:
    """Return a path for a message, with printable characters only."""
    return "".join(char for char in path if char.isascii() and char.isprintable())[:200]


def _guess_status(text: str) -> int:
    """Return the status that the https API gives for the same text."""
    if text.startswith("Permission check failed"):
        return 403
    return 501 if re.match(r"No '\w+' handler defined for", text) else 500


class _NoJson:
    """A result of _parse that is no data."""


_NO_JSON = _NoJson()
_TOO_DEEP = _NoJson()


def _parse(text: str) -> Any:
    """Return the data of a JSON text, _NO_JSON for any other text, or _TOO_DEEP for data nested too deep."""
    try:
        data = json.loads(text)
    except ValueError:
        return _NO_JSON
    except RecursionError:
        return _TOO_DEEP
    return _TOO_DEEP if isinstance(data, (dict, list)) and answers.is_too_deep(data) else data
