# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``agentlab sandbox exec``, ``cp`` and ``ssh``: commands and files inside a sandbox."""

from __future__ import annotations

import base64
import codecs
import contextlib
import os
import re
import stat
import sys
from typing import IO, Any

import click

from .client import Client
from .errors import INTERRUPTED, Problem, Usage
from .framework import DURATION, VMID, Command, Group, Settings, settings
from .local_file import Replacement, report_errors
from .progress import Progress
from .text import clean_text, format_size, format_table, join_lines

# Seconds for which the daemon waits for the end of a command before it returns the output so far.
_LOOK_SECONDS = 1
_WAIT_SECONDS = 60
# Bytes of standard input that fit into one request as base64. Larger input must use cp.
_LARGEST_INPUT = 700 * 1024
_RUN = re.compile(r"(\d{3,9})[/:]([0-9a-fA-F-]{32,36})")
_REMOTE = re.compile(r"(\d{3,9}):(.+)", re.DOTALL)


class RunId(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """The id of a command as ``exec --detach`` prints it: ``1009/3f2a...``."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, str]:
        match = _RUN.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{str(value)[:80]!r} is no id of a command. Valid: <vmid>/<id>, as 'exec --detach' and 'exec list' "
                "print it",
                param,
                ctx,
            )
        return int(match[1]), match[2].replace("-", "").lower()


class ExecGroup(Group):
    """A group for both ``exec <vmid> -- <command>`` and ``exec status <id>``: a word that is no command is a VMID."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = iter(args)
        for word in words:
            if word in ("--socket", "--timeout"):
                next(words, None)
            elif word in ("-h", "--help") or word in self.commands:
                break
            elif not word.startswith(("--socket=", "--timeout=", "--json")):
                args = ["run", *args]
                break
        return super().parse_args(ctx, args)


RUN_ID = RunId()


@click.group(
    "exec",
    cls=ExecGroup,
    subcommand_metavar="<vmid> -- <command>... | <command> <id>",
    examples=(
        "agentlab sandbox exec 1009 -- uname -a",
        "agentlab sandbox exec 1009 --user debian --chdir /srv -- make test",
        "agentlab sandbox exec --detach 1009 -- make report",
        "agentlab sandbox exec logs --follow 1009/3f2a9c0b1d7e4e55a1b2c3d4e5f60718",
    ),
    notes=(
        "The command runs through the guest agent, and needs neither an address nor",
        "SSH. agentlab exits with the exit status of the command, or with 128 plus",
        "the number of the signal that ended it. Ctrl-C ends the command in the",
        "guest.",
    ),
)
def exec_() -> None:
    """Run and manage commands inside a sandbox."""


@exec_.command(
    "run",
    usage="[OPTIONS] <vmid> -- <command>...",
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": True},
    examples=(
        "agentlab sandbox exec run 1009 -- sh -c 'echo $HOME'",
        "agentlab sandbox exec --stdin 1009 -- tee /etc/motd < motd.txt",
    ),
)
@click.option("--detach", "-d", is_flag=True, help="Run the command in the background: print its id and exit.")
@click.option("--user", "-u", metavar="<user>", help="User in the guest that runs the command. Default: root.")
@click.option("--chdir", "-w", metavar="<folder>", help="Working directory in the guest.")
@click.option(
    "--env",
    "-e",
    "environment",
    metavar="<name>=<value>",
    multiple=True,
    help="Environment variable of the command. May be repeated. A name alone takes its value from the local "
    "environment.",
)
@click.option(
    "--stdin", "-i", "with_stdin", is_flag=True, help="Read standard input to its end and pass it to the command."
)
@click.option(
    "--limit",
    type=DURATION,
    metavar="<duration>",
    default=0,
    help="End the command after this time: seconds, or 90s, 30m, 2h. Default: no limit; it ends with the sandbox.",
)
@click.option("--raw", is_flag=True, help="Write control characters to the terminal unchanged.")
@click.argument("vmid", type=VMID, metavar="<vmid>")
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="<command>...")
@settings
def run(
    to: Settings,
    vmid: int,
    argv: tuple[str, ...],
    detach: bool,
    user: str | None,
    chdir: str | None,
    environment: tuple[str, ...],
    with_stdin: bool,
    limit: float,
    raw: bool,
) -> None:
    """Run a command inside a sandbox.

    New output is shown about once a second, on standard output and standard error as in the guest. The command runs
    without a shell: for pipes and variables use sh -c '...'.
    """
    body: dict[str, Any] = {
        "argv": [_require_utf8(word) for word in argv],
        "detach": True,
        "encoding": "base64",
        "timeout": int(limit) if limit == int(limit) else int(limit) + 1,
        "user": user,
        "chdir": chdir,
    }
    if environment:
        body["environment"] = _read_environment(environment)
    if with_stdin:
        body["stdin"] = _read_standard_input()
    body = {name: value for name, value in body.items() if value is not None}
    answer = to.client.post("sandboxes", vmid, "exec", body=body)
    if detach or to.json or not answer.ok:
        to.show_answer(answer, lambda data: f"{data['vmid']}/{data['run_id']}")
        return
    _follow_run(to, answer.data, _Output(raw), ends=True)


@exec_.command("list", usage="<vmid>", examples=("agentlab sandbox exec list 1009",))
@click.argument("vmid", type=VMID, metavar="<vmid>")
@settings
def list_(to: Settings, vmid: int) -> None:
    """List the recorded commands of a sandbox."""
    to.show_answer(to.client.get("sandboxes", vmid, "exec"), _format_list)


def _format_list(data: dict[str, Any]) -> str:
    if not data["runs"]:
        return "no commands"
    return format_table(
        ("ID", "STATE", "PROGRAM", "STATUS", "STARTED", "BY"),
        [
            (
                f"{data['vmid']}/{run['run_id']}",
                run["state"],
                run.get("program"),
                run.get("rc"),
                run.get("started_at"),
                run.get("actor"),
            )
            for run in data["runs"]
        ],
    )


@exec_.command("status", usage="<id>", examples=("agentlab sandbox exec status 1009/3f2a9c0b1d7e4e55a1b2c3d4e5f60718",))
@click.argument("run_id", type=RUN_ID, metavar="<id>")
@settings
def status(to: Settings, run_id: tuple[int, str]) -> None:
    """Show whether a command still runs, or how it ended."""
    to.show_answer(_read_run(to.client, run_id, limit=1), _format_state)


@exec_.command(
    "logs",
    usage="[--follow] <id>",
    examples=("agentlab sandbox exec logs --follow 1009/3f2a9c0b1d7e4e55a1b2c3d4e5f60718",),
)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Show new output until the command ends. Ctrl-C ends only the display, not the command in the guest.",
)
@click.option("--raw", is_flag=True, help="Write control characters to the terminal unchanged.")
@click.argument("run_id", type=RUN_ID, metavar="<id>")
@settings
def logs(to: Settings, run_id: tuple[int, str], follow: bool, raw: bool) -> None:
    """Show the output of a command."""
    answer = _read_run(to.client, run_id)
    if to.json or not answer.ok:
        to.show_answer(answer, lambda _data: "")
        return
    _show_all(to, answer.data, _Output(raw), follow)


@exec_.command("wait", usage="<id>", examples=("agentlab sandbox exec wait 1009/3f2a9c0b1d7e4e55a1b2c3d4e5f60718",))
@click.argument("run_id", type=RUN_ID, metavar="<id>")
@settings
def wait(to: Settings, run_id: tuple[int, str]) -> None:
    """Wait for the end of a command.

    agentlab exits with the exit status of the command.
    """
    answer = _read_run(to.client, run_id, wait=_WAIT_SECONDS, limit=1)
    while answer.ok and answer.data["state"] == "running":
        answer = _read_run(to.client, run_id, wait=_WAIT_SECONDS, limit=1)
    to.show_answer(answer, _format_state)
    sys.exit(_compute_exit_status(answer.data))


@exec_.command("kill", usage="<id>", examples=("agentlab sandbox exec kill 1009/3f2a9c0b1d7e4e55a1b2c3d4e5f60718",))
@click.argument("run_id", type=RUN_ID, metavar="<id>")
@settings
def kill(to: Settings, run_id: tuple[int, str]) -> None:
    """End a command and its children in the guest: TERM, then KILL."""
    to.show_answer(to.client.post("sandboxes", run_id[0], "exec", run_id[1], "kill", body={}), _format_state)


def _read_run(client: Client, run_id: tuple[int, str], **query: object) -> Any:
    return client.get_patiently("sandboxes", run_id[0], "exec", run_id[1], encoding="base64", **query)


def _format_state(data: dict[str, Any]) -> str:
    """Return a sentence about the state of a command."""
    name = f"command {data['vmid']}/{data['run_id']}"
    if data["state"] == "running":
        return f"{name} runs ({data['stdout_bytes'] + data['stderr_bytes']} bytes written)"
    if data["state"] == "skipped":
        return f"{name} was not run: {join_lines(data['message'])}"
    why = " (its time was over)" if data["timed_out"] else " (it was killed)" if data["killed"] else ""
    return f"{name} ended with exit status {_compute_exit_status(data)}{why}"


def _compute_exit_status(data: dict[str, Any]) -> int:
    """Return the exit status of a command that has ended."""
    if data.get("rc") is None and data.get("signal") is None:
        return 0 if data.get("state") == "skipped" else 1
    return int(data["rc"]) if data.get("rc") is not None else 128 + int(data["signal"])


class _Output:
    """The output streams of a command: raw into a pipe, without control characters on a terminal."""

    def __init__(self, raw: bool) -> None:
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._raw = raw
        self._decoders = {
            name: codecs.getincrementaldecoder("utf-8")("replace")
            for name, stream in self._streams.items()
            if stream.isatty() and not raw
        }
        self.shown = {"stdout": 0, "stderr": 0}

    def show(self, data: dict[str, Any]) -> None:
        """Write the output in an answer."""
        for name, stream in self._streams.items():
            part = base64.b64decode(data[name])
            self.shown[name] += len(part)
            decoder = self._decoders.get(name)
            if decoder is not None:
                stream.write(clean_text(decoder.decode(part).replace("\r\n", "\n")))
            elif part:
                stream.flush()
                stream.buffer.write(part)
            stream.flush()

    def is_behind(self, data: dict[str, Any]) -> bool:
        """Return whether the guest holds output that has not been shown."""
        return any(data[f"{stream}_bytes"] > self.shown[stream] for stream in self.shown)


def _show_all(to: Settings, data: dict[str, Any], output: _Output, follow: bool) -> dict[str, Any]:
    """Show the output that the guest holds, and with ``follow`` further output until the command ends."""
    run_id = (int(data["vmid"]), str(data["run_id"]))
    while True:
        before = sum(output.shown.values())
        output.show(data)
        running = data["state"] == "running"
        if not (running and follow) and (not output.is_behind(data) or sum(output.shown.values()) == before):
            return data
        answer = _read_run(
            to.client,
            run_id,
            wait=_LOOK_SECONDS if running and not output.is_behind(data) else 0,
            stdout_offset=output.shown["stdout"],
            stderr_offset=output.shown["stderr"],
        )
        if not answer.ok:
            raise Problem(
                f"{join_lines(answer.data['error'])}\nThe command may go on: agentlab sandbox exec status "
                f"{run_id[0]}/{run_id[1]}"
            )
        data = answer.data


def _follow_run(to: Settings, data: dict[str, Any], output: _Output, *, ends: bool) -> None:
    """Show a command until it ends, and exit with its status. Ctrl-C ends the command in the guest."""
    where = f"{data['vmid']}/{data['run_id']}"
    try:
        data = _show_all(to, data, output, True)
    except KeyboardInterrupt:
        click.echo(f"ending command {where} in the sandbox; Ctrl-C again leaves it alone", err=True)
        answer = to.client.post("sandboxes", data["vmid"], "exec", data["run_id"], "kill", body={})
        if not answer.ok:
            raise Problem(f"{join_lines(answer.data['error'])}\nSee agentlab sandbox exec status {where}") from None
        sys.exit(INTERRUPTED)
    if data["state"] == "skipped":
        click.echo(f"not run: {join_lines(data['message'])}", err=True)
    if data["timed_out"]:
        click.echo("Error: its time (--limit) was over, and it was ended", err=True)
    if data["truncated"]:
        click.echo(
            "Error: it wrote more than the guest holds; what came later is lost. Let it write to a file", err=True
        )
    sys.exit(_compute_exit_status(data))


def _require_utf8(word: str) -> str:
    """Return the word. Raises Usage unless it is valid UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise Usage(
            f"Error: {clean_text(word)!r} is not UTF-8; put such text into a file and copy it into the sandbox"
        ) from None
    return word


def _read_environment(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return the variables of ``--env``. A name alone takes its value from this process. Raises Usage."""
    variables: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise Usage(
                f"Error: --env {join_lines(name)}: there is no such variable here. Valid: <name>=<value>, or a name "
                "that is set"
            )
        variables[name] = value if equals else os.environ[name]
    return variables


def _read_standard_input() -> str:
    """Return standard input as base64. Raises Usage for more than ``_LARGEST_INPUT`` bytes."""
    data = sys.stdin.buffer.read(_LARGEST_INPUT + 1)
    if len(data) > _LARGEST_INPUT:
        raise Usage(
            f"Error: --stdin: more than {_LARGEST_INPUT} bytes. Copy them into the sandbox first: agentlab sandbox cp "
            "- <vmid>:<path>"
        )
    return base64.b64encode(data).decode()


# ---- files ----


@click.command(
    "cp",
    cls=Command,
    usage="[OPTIONS] <file> <vmid>:<path>  |  <vmid>:<path> <file>",
    examples=(
        "agentlab sandbox cp build.tar.gz 1009:/tmp/",
        "agentlab sandbox cp 1009:/var/log/syslog .",
        "tar cz project | agentlab sandbox cp - 1009:/srv/project.tar.gz",
        "agentlab sandbox cp 1009:/etc/os-release -",
    ),
    notes=(
        "A copy that fails leaves no partial file. Length and checksum are verified.",
        "- stands for standard input or standard output.",
    ),
)
@click.option(
    "--mode", metavar="<mode>", help="File mode in the guest, such as 0644. Default: the mode of the local file."
)
@click.option("--owner", metavar="<owner>", help="Owner of the file in the guest, as <user> or <user>:<group>.")
@click.argument("source", metavar="<source>")
@click.argument("target", metavar="<target>")
@settings
def cp(to: Settings, source: str, target: str, mode: str | None, owner: str | None) -> None:
    """Copy a file into a sandbox or out of it."""
    remote_source, remote_target = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if (remote_source is None) == (remote_target is None):
        raise Usage("Error: give one file here and one in a sandbox, as <vmid>:<path> (./1009:x is a file here)")
    if remote_target is not None:
        _copy_in(to, source, int(remote_target[1]), remote_target[2], mode, owner)
    else:
        assert remote_source is not None
        if mode or owner:
            raise Usage("Error: --mode and --owner are those of a file in the guest; leave them out")
        _copy_out(to, int(remote_source[1]), remote_source[2], target)


def _copy_in(to: Settings, source: str, vmid: int, path: str, mode: str | None, owner: str | None) -> None:
    """Copy a local file, or standard input, into a sandbox."""
    with contextlib.ExitStack() as stack:
        file: IO[bytes]
        length = None
        if source == "-":
            file = sys.stdin.buffer
            if path.endswith("/"):
                raise Usage("Error: standard input has no name; give the whole path in the guest")
        else:
            try:
                file = stack.enter_context(open(source, "rb"))
                status = os.fstat(file.fileno())
            except OSError as error:
                raise Problem(f"{join_lines(source)}: {error.strerror}") from None
            if stat.S_ISREG(status.st_mode):
                length = status.st_size
                mode = mode or f"{stat.S_IMODE(status.st_mode) & 0o777:04o}"
            if path.endswith("/"):
                path += os.path.basename(source)
        meter = _Meter(length)
        with Progress(lambda: f"{meter} to sandbox {vmid}"):
            answer = to.client.send_file(
                meter.read_from(file), length, "sandboxes", vmid, "files", path=path, mode=mode, owner=owner
            )
    to.show_answer(answer, lambda data: f"{format_size(data['size'])} to {data['vmid']}:{join_lines(data['path'])}")


def _copy_out(to: Settings, vmid: int, path: str, target: str) -> None:
    """Copy a file of a sandbox to a local file, completely or not at all, or to standard output."""
    if os.path.isdir(target):
        target = os.path.join(target, os.path.basename(path.rstrip("/")))
    with contextlib.ExitStack() as stack:
        replacement = None if target == "-" else stack.enter_context(Replacement(target))
        meter = _Meter(None)
        write = meter.make_writer(sys.stdout.buffer if replacement is None else replacement.file)
        with Progress(lambda: f"{meter} from sandbox {vmid}", enabled=target != "-"):
            answer, headers = to.client.receive_file(write, "sandboxes", vmid, "files", path=path)
        if answer is not None:
            to.show_answer(answer, lambda _data: "")
        if replacement is None:
            with report_errors():
                sys.stdout.buffer.flush()
            return
        mode = headers.get("x-agentlab-mode", "")
        replacement.install(int(mode, 8) if re.fullmatch("[0-7]{1,5}", mode) else 0o600)
        if not to.json:
            click.echo(f"{format_size(meter.bytes)} from {vmid}:{join_lines(path)} to {join_lines(target)}")


class _Meter:
    """Count the bytes of a file that have been transferred."""

    def __init__(self, length: int | None) -> None:
        self.bytes = 0
        self._length = length

    def __str__(self) -> str:
        of = f" of {format_size(self._length)}" if self._length else ""
        return f"{format_size(self.bytes)}{of}"

    def read_from(self, file: IO[bytes]) -> Any:
        """Yield the parts of a file."""
        with report_errors():
            while part := file.read(65536):
                self.bytes += len(part)
                yield part

    def make_writer(self, file: IO[bytes]) -> Any:
        """Return a function that writes the parts of a file."""

        def write_part(part: bytes) -> None:
            with report_errors():
                file.write(part)
            self.bytes += len(part)

        return write_part


# ---- ssh ----


@click.command(
    "ssh",
    cls=Command,
    usage="[--user <user>] <vmid> [-- <ssh options and command>...]",
    examples=("agentlab sandbox ssh 1009", "agentlab sandbox ssh --user root 1009 -- -L 8080:localhost:80 -N"),
    notes=("SSH needs an address and a network path. 'agentlab sandbox exec' does not.",),
)
@click.option("--user", "-u", metavar="<user>", default="debian", show_default=True, help="User in the guest.")
@click.argument("vmid", type=VMID, metavar="<vmid>")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="<ssh options and command>...")
@settings
def ssh(to: Settings, vmid: int, user: str, arguments: tuple[str, ...]) -> None:
    """Log in to a sandbox by SSH, at the address in its record.

    Every new sandbox has a new host key. The key is accepted and not stored.
    """
    import ipaddress

    answer = to.client.get_patiently("sandboxes", vmid)
    if not answer.ok:
        to.show_answer(answer, lambda _data: "")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", user):
        raise Usage(f"Error: --user: {user!r} is no user name")
    data = answer.data
    try:
        address = str(ipaddress.ip_address(str(data.get("ip"))))
    except ValueError:
        raise Problem(
            f"sandbox {vmid} has no address in its record ({join_lines(data.get('state'))}). Commands need none: "
            f"agentlab sandbox exec {vmid} -- <command>"
        ) from None
    options = ["-o", "StrictHostKeyChecking=accept-new", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    try:
        os.execvp("ssh", ["ssh", *options, "-l", user, address, *arguments])
    except OSError as error:
        raise Problem(f"ssh: {error.strerror}; install openssh-client") from None
