# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check a file of tasks before a sandbox is made for it: ``check_job_tasks.py FILE FOLDER``.

FILE is the absolute path of the tasks, FOLDER the one that Ansible was started in. Prints a JSON object:
``{"problem": "..."}`` with one sentence, or ``{"problem": ""}``. The playbook runs it on the controller with the
Python of Ansible.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import yaml

# Seconds that Ansible gets to load the tasks.
LOAD_TIMEOUT = 120
LARGEST = 4 * 1024 * 1024
VAULT = b"$ANSIBLE_VAULT"
TASKS_IN_A_BLOCK = ("block", "rescue", "always")
# Directives of ``meta`` that end the play of the sandbox; the wish to end early has another form.
ENDING = ("end_play", "end_host", "end_batch", "clear_host_errors")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Settings of a surrounding run that would make the check report into that run.
DROPPED = re.compile(r"ANSIBLE_(CALLBACK|STDOUT_CALLBACK|LOG_PATH|LOAD_CALLBACK|DISPLAY|CHECK|DIFF|ASK_|VERBOSITY)")


class Problem(Exception):
    """What is wrong with the file, in one sentence."""


class Loader(yaml.SafeLoader):
    """YAML as Ansible's files have it: tags such as !vault and !unsafe are values like any other."""


def _read_tag(loader: yaml.Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        # A marked value decides nothing here.
        return "{{ tagged }}"
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else None


Loader.add_multi_constructor("!", _read_tag)


def load_tasks(path: str) -> list[dict[str, Any]] | None:
    """Return the tasks of a file; None when it is encrypted and cannot be looked into. Raises Problem."""
    try:
        if not os.path.isfile(path):
            raise Problem(
                "is a folder; give the file with the tasks"
                if os.path.isdir(path)
                else "is not a file"
                if os.path.exists(path)
                else "does not exist"
            )
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise Problem(f"cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise Problem(f"is larger than {LARGEST} bytes, which is no file of tasks")
    if raw.startswith(VAULT):
        return None
    try:
        content = yaml.load(raw.decode("utf-8-sig"), Loader)
    except UnicodeDecodeError:
        raise Problem("is not text in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        tab = "; YAML takes no tabs for indentation, use blanks" if "\\t" in str(error.problem) else ""
        raise Problem(f"is not valid YAML: {where}{error.problem or error.context}{tab}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Problem(
            f"is not valid YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if content is None:
        raise Problem("holds no tasks")
    if isinstance(content, dict):
        raise Problem("is not a list of tasks: begin each task with '- name:'")
    if not isinstance(content, list):
        raise Problem(f"is not a list of tasks but {str(content)[:60]!r}; begin each task with '- name:'")
    if not content:
        raise Problem("holds no tasks")
    for number, task in enumerate(content, 1):
        if not isinstance(task, dict):
            raise Problem(f"is not a list of tasks: entry {number} is {str(task)[:60]!r}")
        if "hosts" in task or any(key.rpartition(".")[2] == "import_playbook" for key in map(str, task)):
            raise Problem("is a playbook (it names hosts); give a file with only the list of its tasks")
    return content


def every_task(tasks: Any) -> Iterator[dict[str, Any]]:
    """Yield the tasks of a list and of the blocks in it."""
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, dict):
            yield task
            for part in TASKS_IN_A_BLOCK:
                yield from every_task(task.get(part))


def argument(task: dict[str, Any], action: str, option: str) -> str | None:
    """Return what a task gives an action of ansible.builtin, if it is that action and the text needs no templating."""
    for name in (action, f"ansible.builtin.{action}", f"ansible.legacy.{action}"):
        value = task.get(name)
        if isinstance(value, str):
            # Free form: "file.yml", or "name=role".
            words = re.search(rf"(?:^|\s){option}=(\S+)", value)
            value = words[1] if words else value.strip() if option == "file" or "=" not in value else None
        elif isinstance(value, dict):
            value = value.get(option) or value.get("_raw_params")
        if isinstance(value, str) and value and "{{" not in value and "{%" not in value:
            return value
    return None


def collect(path: str, folder: str, roles: list[str], seen: set[str]) -> None:
    """Look through a file of tasks and what it includes by name. Adds the roles it names; raises Problem."""
    seen.add(path)
    for task in every_task(load_tasks(path)):
        ending = argument(task, "meta", "_raw_params")
        if ending in ENDING:
            raise Problem(
                f"'meta: {ending}' would end the play before the sandbox is cleared up; "
                "put the rest into a block with 'when', or fail"
            )
        for action in ("include_role", "import_role"):
            role = argument(task, action, "name")
            if role:
                roles.append(role)
        # Of a missing file that is imported Ansible says only that it cannot be retrieved.
        included = argument(task, "include_tasks", "file") or argument(task, "import_tasks", "file")
        if included:
            candidates = [
                os.path.join(base, included)
                for base in (os.path.dirname(path), f"{os.path.dirname(path)}/tasks", folder)
            ]
            inner = next((each for each in candidates if os.path.isfile(each)), None)
            if inner is None:
                raise Problem(f"includes {included}, which is not there")
            if inner not in seen:
                try:
                    collect(inner, folder, roles, seen)
                except Problem as problem:
                    raise Problem(f"includes {included}, which {problem}") from None


def ansible_problem(path: str, folder: str, roles: list[str]) -> str:
    """Return what Ansible itself says when it loads the tasks and the roles, "" when it has nothing to say."""
    tasks = [{"name": "Tasks", "ansible.builtin.import_tasks": path}]
    tasks += [{"name": "Role", "ansible.builtin.import_role": {"name": role}} for role in dict.fromkeys(roles)]
    play = [
        {
            "name": "Check",
            "hosts": "localhost",
            "gather_facts": False,
            "collections": ["agentlab.proxmox"],
            "tasks": tasks,
        }
    ]
    with tempfile.TemporaryDirectory(prefix="agentlab-job-") as scratch:
        playbook = os.path.join(scratch, "check.yml")
        with open(playbook, "w", encoding="utf-8") as file:
            json.dump(play, file)
        environment = {name: value for name, value in os.environ.items() if not DROPPED.match(name)}
        environment.update(ANSIBLE_NOCOLOR="1", ANSIBLE_FORCE_COLOR="0", ANSIBLE_DEPRECATION_WARNINGS="false")
        command = [sys.executable, "-m", "ansible", "playbook", "--syntax-check", "-i", "localhost,", playbook]
        try:
            run = subprocess.run(
                command,
                cwd=folder if os.path.isdir(folder) else scratch,
                env=environment,
                text=True,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=LOAD_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"could not be checked: {error}"
        own_folder = rf":?{re.escape(os.path.realpath(scratch))}(/roles)?|:?{re.escape(scratch)}(/roles)?"
    return "" if run.returncode == 0 else re.sub(own_folder, "", sentence(run.stderr or run.stdout))


def sentence(output: str) -> str:
    """Return the error in the output of ansible-playbook, and where it is, on one line."""
    lines = [line.strip() for line in COLOUR.sub("", output).splitlines()]
    starts = [number for number, line in enumerate(lines) if re.match(r"ERROR!|\[ERROR\]:?", line)]
    lines = lines[starts[0] :] if starts else [line for line in lines if line and not line.startswith("[WARNING]")]
    text = re.sub(r"^(ERROR!|\[ERROR\]:?)\s*", "", lines[0]) if lines else "Ansible refuses it"
    place = re.search(
        r"appears to be in '(?P<file>[^']+)': line (?P<line>\d+)|Origin: (?P<file2>\S+?):(?P<line2>\d+)",
        "\n".join(lines),
    )
    if place:
        text += f" ({place['file'] or place['file2']}, line {place['line'] or place['line2']})"
    return text[:1000]


def check(path: str, folder: str) -> str:
    """Return what is wrong with the tasks in the file, "" when nothing is."""
    roles: list[str] = []
    try:
        collect(path, folder, roles, set())
    except Problem as problem:
        return str(problem)
    with open(path, "rb") as file:
        if file.read(len(VAULT)) == VAULT:
            return ""
    problem_of_ansible = ansible_problem(path, folder, roles)
    return f"cannot be loaded: {problem_of_ansible}" if problem_of_ansible else ""


if __name__ == "__main__":
    print(json.dumps({"problem": check(sys.argv[1], sys.argv[2])}))
