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
from dataclasses import dataclass, field
from typing import Any

import yaml

# Seconds that Ansible gets to load the tasks.
LOAD_TIMEOUT = 120
LARGEST = 4 * 1024 * 1024
VAULT = b"$ANSIBLE_VAULT"
TASKS_IN_A_BLOCK = ("block", "rescue", "always")
# Directives of ``meta`` that the play of the sandbox does not survive, with what they would do and what to do instead.
ENDING = {
    "end_play": "which would end the play before the sandbox is cleared up; put the rest into a block with 'when', "
    "or fail",
    "clear_host_errors": "which would bring back hosts that are lost; leave it out",
}
ENDING["end_host"] = ENDING["end_batch"] = ENDING["end_play"]
# Options of a role that name a file of it.
ROLE_FILES = ("tasks_from", "vars_from", "defaults_from", "handlers_from")
# Files that a message about a missing one names at most.
MOST_NAMED = 10
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


def load_tasks(path: str, *, of_role: bool = False) -> list[dict[str, Any]] | None:
    """Return the tasks of a file; None when it is encrypted and cannot be looked into, or an empty one of a role.

    Raises Problem.
    """
    try:
        if not os.path.isfile(path):
            raise Problem(
                "is a folder; give the file with the tasks"
                if os.path.isdir(path)
                else "is not a file"
                if os.path.exists(path)
                else f"does not exist. {list_folder(os.path.dirname(path))}"
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
    if of_role and not content:
        return None
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


def list_folder(folder: str) -> str:
    """Return a sentence that says which files of tasks or variables a folder holds, for whoever mistyped a name."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith((".yml", ".yaml", ".json")))
    except FileNotFoundError:
        return f"There is no folder {folder} either"
    except OSError as error:
        return f"The folder {folder} cannot be read: {error.strerror}"
    if not names:
        return f"There is no YAML file in {folder}"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"In {folder} there are: {', '.join(name[:100] for name in names[:MOST_NAMED])}{more}"


def every_task(tasks: Any, conditional: bool = False) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the tasks of a list and of the blocks in it, each with whether a condition or a loop can leave it out."""
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, dict):
            may_be_skipped = conditional or any(key in ("when", "loop") or str(key).startswith("with_") for key in task)
            yield task, may_be_skipped
            for part in TASKS_IN_A_BLOCK:
                yield from every_task(task.get(part), may_be_skipped or part == "rescue")


def arguments(task: dict[str, Any], action: str) -> Any:
    """Return what a task gives an action of ansible.builtin, as text or mapping; None for another action."""
    names = (action, f"ansible.builtin.{action}", f"ansible.legacy.{action}")
    for name in names:
        if name in task:
            return task[name]
    # The old form: "action: meta end_play", or the name as "module" of a mapping.
    for key in ("action", "local_action"):
        value = task.get(key)
        if isinstance(value, str) and value.split(maxsplit=1)[:1] and value.split(maxsplit=1)[0] in names:
            return value.split(maxsplit=1)[1] if len(value.split(maxsplit=1)) > 1 else ""
        if isinstance(value, dict) and value.get("module") in names:
            return {**(task["args"] if isinstance(task.get("args"), dict) else {}), **value}
    return None


def argument(task: dict[str, Any], action: str, *options: str) -> str | None:
    """Return the first of these options that a task gives an action, if it is that action and the text needs no
    templating.
    """
    task_arguments = arguments(task, action)
    more = task["args"] if isinstance(task.get("args"), dict) else {}
    # The option that a text without a name stands for.
    free = {"include_role": "name", "import_role": "name", "meta": "_raw_params"}.get(action, "file")
    for option in options if task_arguments is not None else ():
        value = None
        if isinstance(task_arguments, str):
            named = re.search(rf"(?:^|\s){option}=(?:\"([^\"]*)\"|'([^']*)'|(\S+))", task_arguments)
            if named:
                value = named[1] or named[2] or named[3]
            elif option == free and (option == "file" or "=" not in task_arguments):
                value = task_arguments.strip()
        elif isinstance(task_arguments, dict):
            value = task_arguments.get(option) or (task_arguments.get("_raw_params") if option == free else None)
        value = value or more.get(option)
        if isinstance(value, str) and value and "{{" not in value and "{%" not in value:
            return value
    return None


def find_file(base: str) -> str | None:
    """Return the file that Ansible takes for a name with or without its extension; None if there is none."""
    return next((base + end for end in ("", ".yml", ".yaml", ".json") if os.path.isfile(base + end)), None)


@dataclass
class Tasks:
    """What a job runs: its file of tasks, and what that file includes by name."""

    # The folder that Ansible was started in.
    folder: str
    # Arguments of import_role, as JSON: what Ansible is to load.
    roles: list[str] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set)
    # Files that are being imported: one that is met again would be imported without end.
    _importing: list[str] = field(default_factory=list)

    def collect(self, path: str, role: str = "", imported: bool = True) -> None:
        """Look through a file of tasks and what it includes by name.

        role is the folder of the role that the file belongs to, "" for the job's own files. imported says that Ansible
        loads the file together with the one that names it. Raises Problem.
        """
        path = os.path.realpath(path)
        importing = self._importing
        if imported and path in importing:
            raise Problem("is imported by itself, over and over; use include_tasks with a condition")
        if (path, role) in self._seen:
            return
        self._seen.add((path, role))
        self._importing = [*importing, path] if imported else [path]
        for task, conditional in every_task(load_tasks(path, of_role=bool(role))):
            self._look_at(task, conditional, path, role)
        self._importing = importing

    def _look_at(self, task: dict[str, Any], conditional: bool, path: str, role: str) -> None:
        ending = argument(task, "meta", "_raw_params")
        if ending in ENDING:
            where = f" in {os.path.relpath(path, role)}" if role else ""
            raise Problem(f"has 'meta: {ending}'{where}, {ENDING[ending]}")
        # Of a missing file that is imported Ansible says only that it cannot be retrieved.
        for action in ("include_tasks", "import_tasks"):
            name = argument(task, action, "file")
            if name:
                self._follow_file(name, path, role, imported=action == "import_tasks", conditional=conditional)
        for action in ("include_role", "import_role"):
            name = argument(task, action, "name", "role")
            if name:
                others = {option: argument(task, action, option) for option in ROLE_FILES}
                call = {"name": name, **{option: value for option, value in others.items() if value}}
                self._follow_role(call, role, imported=action == "import_role", conditional=conditional)

    def _follow_file(self, name: str, path: str, role: str, *, imported: bool, conditional: bool) -> None:
        bases = [os.path.dirname(path), f"{os.path.dirname(path)}/tasks"]
        bases += [f"{role}/tasks", role] if role else []
        candidates = (os.path.join(base, name) for base in [*bases, self.folder])
        inner = next((each for each in candidates if os.path.isfile(each)), None)
        if inner is not None:
            try:
                self.collect(inner, role, imported)
            except Problem as problem:
                raise Problem(f"includes {name}, which {problem}") from None
        # A role of somebody else may name a file that is only there where its condition holds.
        elif not (role and conditional):
            raise Problem(f"includes {name}, which is not there. {list_folder(os.path.dirname(path))}")

    def _follow_role(self, call: dict[str, str], inside: str, *, imported: bool, conditional: bool) -> None:
        """Look through a role, and have Ansible load it if it is certain that it will be needed.

        call holds arguments of import_role. inside is the folder of the role that calls, "" for the job's own files.
        """
        name = call["name"]
        folder = find_role(name, self.folder, inside)
        if not (inside and conditional):
            self.roles.append(json.dumps({**call, "name": full_role_name(name, folder, inside)}))
        if folder is None:
            return
        parts = [("tasks", call.get("tasks_from", "main")), ("handlers", call.get("handlers_from", "main"))]
        try:
            for option in ROLE_FILES:
                named = f"{folder}/{option.removesuffix('_from')}/{call.get(option, '')}"
                # Of some of them Ansible says nothing.
                if (
                    option in call
                    and not (inside and conditional)
                    and not find_file(named)
                    and not os.path.isdir(named)
                ):
                    raise Problem(f"has no file for {option}: {call[option]}. {list_folder(os.path.dirname(named))}")
            for kind, file_name in parts:
                file = find_file(f"{folder}/{kind}/{file_name}")
                if file:
                    self.collect(file, folder, imported)
            for dependency in role_dependencies(folder):
                self._follow_role({"name": dependency}, folder, imported=imported, conditional=True)
        except Problem as problem:
            raise Problem(f"runs the role {name}, which {problem}") from None


def find_role(name: str, folder: str, inside: str) -> str | None:
    """Return the folder of a role as Ansible finds it; None where only Ansible can tell.

    folder is the one that Ansible was started in, inside that of the role which names this role.
    """
    from ansible import constants

    words = name.split(".")
    collections = [
        path if os.path.basename(path.rstrip("/")) == "ansible_collections" else f"{path}/ansible_collections"
        for path in [*constants.COLLECTIONS_PATHS, *sys.path]
    ]
    if len(words) == 3:
        candidates = [f"{base}/{words[0]}/{words[1]}/roles/{words[2]}" for base in collections]
    else:
        candidates = [f"{base}/{name}" for base in constants.DEFAULT_ROLES_PATH or ()]
        candidates += [f"{os.path.dirname(inside)}/{name}"] if inside else []
        candidates += [f"{base}/agentlab/proxmox/roles/{name}" for base in collections]
        candidates += [os.path.join(folder, os.path.expanduser(name))] if "/" in name else []
    return next((os.path.realpath(each) for each in candidates if os.path.isdir(each)), None)


def full_role_name(name: str, folder: str | None, inside: str) -> str:
    """Return a name by which Ansible finds the role from a playbook, where it was named inside another role."""
    if not inside or folder is None or folder != os.path.realpath(f"{os.path.dirname(inside)}/{name}"):
        return name
    collection = re.search(r"/ansible_collections/(\w+)/(\w+)/roles/(\w+)$", folder)
    return ".".join(collection.groups()) if collection else folder


def role_dependencies(folder: str) -> list[str]:
    """Return the names of the roles that a role's metadata calls; Ansible says what is wrong with the metadata."""
    file = find_file(f"{folder}/meta/main")
    try:
        with open(file or os.devnull, encoding="utf-8-sig") as text:
            content = yaml.load(text, Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    listed = content.get("dependencies") if isinstance(content, dict) else None
    names = [
        each if isinstance(each, str) else each.get("role") or each.get("name")
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, (str, dict))
    ]
    return [name for name in names if isinstance(name, str) and "{{" not in name]


def ansible_problem(path: str, folder: str, roles: list[str]) -> str:
    """Return what Ansible itself says when it loads the tasks and the roles, "" when it has nothing to say.

    roles holds arguments of import_role, as JSON.
    """
    tasks: list[dict[str, Any]] = [{"name": "Tasks", "ansible.builtin.import_tasks": path}]
    tasks += [{"name": "Role", "ansible.builtin.import_role": json.loads(role)} for role in dict.fromkeys(roles)]
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
    if "maximum recursion depth" in output:
        text = "its files or roles import each other without end; use include_tasks or include_role with a condition"
    place = re.search(
        r"appears to be in '(?P<file>[^']+)': line (?P<line>\d+)|Origin: (?P<file2>\S+?):(?P<line2>\d+)",
        "\n".join(lines),
    )
    if place:
        text += f" ({place['file'] or place['file2']}, line {place['line'] or place['line2']})"
    return text[:1000]


def check(path: str, folder: str) -> str:
    """Return what is wrong with the tasks in the file, "" when nothing is."""
    if os.path.isdir(folder):
        # Ansible reads its configuration, with the paths of roles, from the folder that it is started in.
        os.chdir(folder)
    tasks = Tasks(folder)
    try:
        tasks.collect(path)
    except Problem as problem:
        return str(problem)
    with open(path, "rb") as file:
        if file.read(len(VAULT)) == VAULT:
            return ""
    problem_of_ansible = ansible_problem(path, folder, tasks.roles)
    return f"cannot be loaded: {problem_of_ansible}" if problem_of_ansible else ""


if __name__ == "__main__":
    print(json.dumps({"problem": check(sys.argv[1], sys.argv[2])}))
