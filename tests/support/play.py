# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run real playbooks, modules and ad-hoc commands, as a user would, and look at what came out."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
INVENTORY = """\
all:
  hosts:
    localhost:
      ansible_connection: local
      ansible_python_interpreter: "{{ ansible_playbook_python }}"
"""
# `make scenarios` runs them both ways: the modules in place, and shipped as to any other host.
SHIPPED = "      agentlab_in_place: false\n" if os.environ.get("AGENTLAB_TEST_SHIPPED") else ""
# Of the caller's environment only this reaches a play: nobody's own configuration or Proxmox decides a test.
_DROPPED = re.compile(r"(ANSIBLE|PROXMOX|AGENTLAB|PYTEST|COVERAGE)_?")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BAD = re.compile(r"\[WARNING\]|\[DEPRECATION WARNING\]|Traceback \(most recent call last\)")


@dataclass
class Run:
    """What one ansible command did.

    results: {task, action, host, status, result, item?, ignored?}, in order; status is ok, changed, failed, skipped or
    unreachable. A loop gives an entry an item (item: True) and then one for the whole task.
    """

    rc: int
    stdout: str
    stderr: str
    results: list[dict[str, Any]] = field(default_factory=list)
    # Requests to Proxmox by task name, where a double was given.
    requests: dict[str, Counter[str]] = field(default_factory=dict)

    def __getitem__(self, task: str) -> dict[str, Any]:
        return self.result(task)

    @property
    def output(self) -> str:
        """Return standard output and standard error."""
        return self.stdout + self.stderr

    @property
    def warnings(self) -> list[str]:
        """Return every warning, deprecation and traceback in the output, and what modules returned of the first two."""
        lines = [line.strip() for line in _COLOUR.sub("", self.output).splitlines() if _BAD.search(line)]
        for entry in self.results:
            lines += [str(text) for key in ("warnings", "deprecations") for text in entry["result"].get(key) or ()]
        return lines

    def all(self, task: str) -> list[dict[str, Any]]:
        """Return the entries of the task with that name, loop items included."""
        return [entry for entry in self.results if entry["task"] == task]

    def entry(self, task: str) -> dict[str, Any]:
        """Return the last entry of the task with that name; raise when it never ran."""
        entries = [entry for entry in self.all(task) if not entry.get("item")]
        if not entries:
            raise AssertionError(
                f"no task {task!r} ran; there were {[entry['task'] for entry in self.results]}\n{self.output}"
            )
        return entries[-1]

    def result(self, task: str) -> dict[str, Any]:
        """Return what that task returned."""
        return self.entry(task)["result"]

    def status(self, task: str) -> str:
        """Return the status of the task: ok, changed, failed, skipped or unreachable."""
        return str(self.entry(task)["status"])

    @property
    def last(self) -> dict[str, Any]:
        """Return what the last task returned."""
        if not self.results:
            raise AssertionError(f"no task ran\n{self.output}")
        return self.results[-1]["result"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Return the entries of tasks that failed and whose failure was not ignored."""
        return [
            entry for entry in self.results if entry["status"] in ("failed", "unreachable") and not entry.get("ignored")
        ]

    def ok(self, warnings: bool = False) -> Run:
        """Insist on success, and on no warnings unless they are allowed; return self."""
        if self.rc != 0 or (self.warnings and not warnings):
            raise AssertionError(f"rc={self.rc} warnings={self.warnings}\n{self.output}")
        return self


def play(
    tasks: list[dict[str, Any]],
    env: Mapping[str, str],
    tmp_path: Path,
    check: bool = False,
    diff: bool = False,
    *,
    pve: Any = None,
    args: tuple[str, ...] = (),
) -> Run:
    """Run tasks (unique names) as one playbook.

    A task may carry ``before``, a function called in the test before the task runs, so that one playbook covers a story
    in which others act too; with the double given, the requests of each task are counted.
    """
    hooks: dict[str, Callable[[], Any]] = {}
    plain = []
    names: set[str] = set()
    for task in tasks:
        task = dict(task)
        assert task["name"] not in names, f"two tasks are named {task['name']!r}"
        names.add(task["name"])
        before = task.pop("before", None)
        if before:
            hooks[task["name"]] = before
        plain.append(task)
    with _Hooks(hooks, pve) as listening:
        run = run_play(
            plain,
            {"ANSIBLE_PIPELINING": "1", **env, "AGENTLAB_TEST_HOOK": listening.path},
            tmp_path,
            check=check,
            diff=diff,
            args=args,
        )
    if listening.error is not None:
        raise listening.error
    run.requests = listening.requests
    return run


class _Hooks:
    """The test's side of a running playbook: called by the callback before each task."""

    def __init__(self, hooks: Mapping[str, Callable[[], Any]], pve: Any) -> None:
        self.error: Exception | None = None
        self.requests: dict[str, Counter[str]] = {}
        self._hooks, self._pve, self._task = hooks, pve, ""
        # Short on purpose: a socket's path may not be long.
        self._folder = tempfile.TemporaryDirectory(prefix="hook-")
        self.path = f"{self._folder.name}/s"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> _Hooks:
        self._note("")
        self._thread.start()
        return self

    def __exit__(self, *_dummy: object) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self.path)
            last.sendall(b'""\n')
            last.recv(1)
        self._thread.join(10)
        self._socket.close()
        self._folder.cleanup()

    def _note(self, task: str) -> None:
        if self._pve is not None:
            if self._task:
                self.requests[self._task] = Counter(self._pve.counted)
            self._pve.counted.clear()
        self._task = task

    def _serve(self) -> None:
        while True:
            caller, _dummy = self._socket.accept()
            with caller:
                task = json.loads(caller.makefile().readline())
                self._note(task)
                try:
                    if task in self._hooks:
                        self._hooks[task]()
                except Exception as error:
                    self.error = self.error or error
                caller.sendall(b".")
            if not task:
                return


def run_play(
    tasks_or_playbook: str | list[dict[str, Any]] | Path,
    env: Mapping[str, str],
    tmp_path: Path,
    check: bool = False,
    diff: bool = False,
    extra_vars: Mapping[str, Any] | None = None,
    forks: int | None = None,
    tags: str | None = None,
    args: tuple[str, ...] = (),
    timeout: float = 300,
) -> Run:
    """Run a playbook or a list of tasks with the real ansible-playbook.

    A playbook is a path, its text, or its plays as data; tasks are text or data.
    """
    if isinstance(tasks_or_playbook, Path) or _is_playbook_name(tasks_or_playbook):
        playbook = str(tasks_or_playbook)
    else:
        path = _fresh(tmp_path, "play", ".yml")
        path.write_text(_as_playbook(tasks_or_playbook), encoding="utf-8")
        playbook = str(path)
    return _run(
        [
            _tool("ansible-playbook"),
            *_common(tmp_path, check, diff, extra_vars, forks),
            *(["--tags", tags] if tags else []),
            *args,
            playbook,
        ],
        env,
        tmp_path,
        timeout,
    )


def run_module(name: str, args: Mapping[str, Any] | None, env: Mapping[str, str], tmp_path: Path, **kw: Any) -> Run:
    """Run one module as the only task of a play, named as the module.

    task={...} adds keywords of the task (register, environment, ...).
    """
    task = {"name": name, name: dict(args or {}), **kw.pop("task", {})}
    return run_play([task], env, tmp_path, **kw)


def run_adhoc(
    name: str,
    args: Mapping[str, Any] | str | None,
    env: Mapping[str, str],
    tmp_path: Path,
    check: bool = False,
    diff: bool = False,
    extra_vars: Mapping[str, Any] | None = None,
    forks: int | None = None,
    timeout: float = 300,
) -> Run:
    """Run `ansible localhost -m name -a args`. args given as data travel as JSON, as text the way a user types them."""
    module_args = [] if not args else ["-a", args if isinstance(args, str) else json.dumps(args)]
    return _run(
        [_tool("ansible"), "localhost", "-m", name, *module_args, *_common(tmp_path, check, diff, extra_vars, forks)],
        env,
        tmp_path,
        timeout,
    )


def run_command(command: list[str], env: Mapping[str, str], tmp_path: Path, timeout: float = 300) -> Run:
    """Run a command as a page has it, with the programs of this environment."""
    return _run([_tool(command[0]), *command[1:]], env, tmp_path, timeout)


def collections_path(tmp_path: Path) -> Path:
    """Return a folder that holds this checkout as ansible_collections/agentlab/proxmox.

    It is the checkout's own folder, or one that is made here.
    """
    own = REPO / ".collections"
    if (own / "ansible_collections" / "agentlab" / "proxmox").is_dir():
        return own
    link = tmp_path / "collections" / "ansible_collections" / "agentlab" / "proxmox"
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(REPO, target_is_directory=True)
    return tmp_path / "collections"


def _is_playbook_name(text: str | list[dict[str, Any]]) -> bool:
    return (
        isinstance(text, str)
        and "\n" not in text
        and (text.endswith((".yml", ".yaml")) or bool(re.fullmatch(r"\w+\.\w+\.\w+", text)))
    )


def _as_playbook(tasks_or_playbook: str | list[dict[str, Any]] | Path) -> str:
    play = {"hosts": "localhost", "gather_facts": False}
    if isinstance(tasks_or_playbook, list):
        whole = (
            tasks_or_playbook
            if tasks_or_playbook and ("hosts" in tasks_or_playbook[0] or "import_playbook" in tasks_or_playbook[0])
            else [{**play, "tasks": tasks_or_playbook}]
        )
        return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    text = textwrap.dedent(str(tasks_or_playbook)).strip("\n")
    if re.search(r"^(- |  )(hosts|(ansible\.builtin\.)?import_playbook):", text, re.M):
        return text + "\n"
    # Wrapped as text, not parsed: tags such as !unsafe and !vault mean something to Ansible only.
    return "- hosts: localhost\n  gather_facts: false\n  tasks:\n" + textwrap.indent(text, "    ") + "\n"


def _common(
    tmp_path: Path, check: bool, diff: bool, extra_vars: Mapping[str, Any] | None, forks: int | None
) -> list[str]:
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(INVENTORY + SHIPPED, encoding="utf-8")
    options = ["-i", str(inventory)]
    options += ["--check"] if check else []
    options += ["--diff"] if diff else []
    options += ["-e", json.dumps(dict(extra_vars))] if extra_vars else []
    return options + (["--forks", str(forks)] if forks else [])


def _run(command: list[str], env: Mapping[str, str], tmp_path: Path, timeout: float) -> Run:
    results = _fresh(tmp_path, "results", ".jsonl")
    home = tmp_path / "ansible-home"
    home.mkdir(exist_ok=True)
    whole = {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}
    bindir = str(Path(sys.executable).parent)
    whole.update(
        {
            "PATH": bindir + os.pathsep + whole.get("PATH", os.defpath),
            "ANSIBLE_HOME": str(home),
            "ANSIBLE_LOCAL_TEMP": str(home / "tmp"),
            "ANSIBLE_REMOTE_TEMP": str(home / "remote"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_RETRY_FILES_ENABLED": "false",
            "ANSIBLE_DEPRECATION_WARNINGS": "true",
            "COLUMNS": "1000",
            "ANSIBLE_CALLBACK_PLUGINS": str(SUPPORT / "callback_plugins"),
            "ANSIBLE_CALLBACKS_ENABLED": "agentlab_results",
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "true",
            "AGENTLAB_TEST_RESULTS": str(results),
        }
    )
    # ansible.cfg is believed about everything but what it does not say.
    config = REPO / "ansible.cfg"
    if not (config.is_file() and "collections_path" in config.read_text(encoding="utf-8")):
        whole["ANSIBLE_COLLECTIONS_PATH"] = str(collections_path(tmp_path))
    whole.update(env)
    process = subprocess.run(
        command,
        cwd=REPO,
        env=whole,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return Run(process.returncode, process.stdout, process.stderr, [json.loads(line) for line in lines])


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def _fresh(folder: Path, stem: str, suffix: str) -> Path:
    """Return a name that nobody has used in the folder. It is claimed, so that plays may run side by side."""
    number = 0
    while True:
        path = folder / f"{stem}-{number}{suffix}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path
