# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure commands, files and tasks inside a sandbox beside community.proxmox's guest-agent connection.

Both plugins work through the same double of Proxmox VE, by turns. Its guest really runs the commands, and its agent
takes as long as the real one: with 0.09 s at each connection exec and exec-status take 0.36 s and file-write 0.54 s,
as measured on Proxmox VE 9.2 (0.36 s and 0.57 s). With several requests at a time each takes 0.57 of that, as there.

    python benchmarks/inside.py [--commands 20] [--megabytes 10]      # prints a table for docs/performance.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests"), str(REPO / ".collections"), str(Path(__file__).resolve().parent)]

import peers

OURS, THEIRS = "agentlab.proxmox.sandbox", "community.proxmox.proxmox_qemu_api"
NAP = 0.09
TEXT = b"A line of text as a log has it, number %d, with some words that come again and again.\n"


# ---- one plugin, in a process of its own ----


def use_plugin(name: str, folder: Path, commands: int) -> None:
    """Run commands and copy files through a connection plugin, and print the seconds of each as JSON."""
    from ansible.playbook.play_context import PlayContext
    from ansible.plugins.loader import connection_loader, init_plugin_loader

    init_plugin_loader()
    connection = connection_loader.get(name, PlayContext(), os.devnull)
    connection.set_options(var_options=json.loads((folder / "variables.json").read_text(encoding="utf-8")))
    connection.exec_command("true", sudoable=False)
    times: dict[str, list[float]] = {"command": [], "up": [], "down": [], "text": []}

    def measure(kind: str, work: Callable[[], Any]) -> Any:
        print(json.dumps({"begins": kind}), flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        answer = work()
        times[kind].append(time.perf_counter() - began)
        return answer

    for _number in range(commands):
        status, _out, _err = measure("command", lambda: connection.exec_command("true", sudoable=False))
        assert status == 0
    guest = json.loads((folder / "guest.json").read_text(encoding="utf-8"))
    for kind, file in (("up", "random"), ("text", "text")):
        measure(kind, lambda file=file: connection.put_file(str(folder / file), f"{guest}/{file}"))
    measure("down", lambda: connection.fetch_file(f"{guest}/random", str(folder / "random.back")))
    measure("text", lambda: connection.fetch_file(f"{guest}/text", str(folder / "text.back")))
    for file in ("random", "text"):
        assert (folder / f"{file}.back").read_bytes() == (folder / file).read_bytes(), f"{file} came back changed"
    print(json.dumps({"times": times}), flush=True)


# ---- both, through one double ----


class Field:
    """The double with one running sandbox, and a user's environment."""

    def __init__(self, folder: Path) -> None:
        from agentlab_core import config
        from agentlab_core.context import Context
        from agentlab_core.sandboxes import create
        from support.double import TEMPLATE, Server

        self.folder = folder
        self.server = Server(str(folder))
        self.pve = self.server.pve
        self.pve.agent_default = True
        self.pve.add_template()
        environment = self.server.environment(str(folder))
        self.env = {**os.environ, **environment}
        (folder / "config.yaml").write_text(f"template: {TEMPLATE}\n", encoding="utf-8")
        ctx = Context(config.load({"wait_timeout": "60s"}, self.env), actor="benchmark")
        self.box = create.run(ctx, create.Spec(name="box", ttl=14400, template=str(TEMPLATE))).sandbox
        ctx.close()
        self.guest = self.pve.machine(self.box.vmid)
        self.pve.agent_nap = NAP

    def variables(self, name: str) -> dict[str, Any]:
        common = {"ansible_python_interpreter": "/usr/bin/python3", "ansible_remote_tmp": f"{self.guest.folder}/tmp"}
        if name == OURS:
            return {"inventory_hostname": "box", "ansible_host": "box", "ansible_connection": OURS, **common}
        environment = self.server.environment(str(self.folder))
        return {
            "ansible_connection": THEIRS,
            "proxmox_api_host": environment["PROXMOX_HOST"],
            "proxmox_api_port": int(environment["PROXMOX_PORT"]),
            "proxmox_api_token_id": environment["PROXMOX_TOKEN_ID"],
            "proxmox_api_token_secret": environment["PROXMOX_TOKEN_SECRET"],
            "proxmox_node": self.box.node,
            "proxmox_vmid": self.box.vmid,
            "proxmox_validate_certs": False,
            "proxmox_remote_tmp": str(self.guest.folder),
            **common,
        }

    def agent_requests(self) -> int:
        return sum(count for request, count in self.pve.counted.items() if "/agent/" in request)

    def plugin(self, name: str, commands: int, megabytes: int) -> dict[str, dict[str, Any]]:
        """Return seconds and requests of commands and files through a plugin."""
        (self.folder / "variables.json").write_text(json.dumps(self.variables(name)), encoding="utf-8")
        (self.folder / "guest.json").write_text(json.dumps(str(self.guest.folder)), encoding="utf-8")
        size = megabytes * 1024 * 1024
        (self.folder / "random").write_bytes(random.Random(20).randbytes(size))
        (self.folder / "text").write_bytes(b"".join(TEXT % number for number in range(size // len(TEXT))))
        process = subprocess.Popen(
            [sys.executable, __file__, "--plugin", name, "--folder", str(self.folder), "--commands", str(commands)],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        requests: Counter[str] = Counter()
        kind, times = "", {}
        for line in process.stdout:
            said = json.loads(line)
            requests[kind] += self.agent_requests()
            self.pve.counted.clear()
            kind = said.get("begins", "")
            times = said.get("times", times)
            if kind:
                process.stdin.write("\n")
                process.stdin.flush()
        if process.wait() or not times:
            raise RuntimeError(f"{name} failed; its output is above")
        return {
            kind: {
                "seconds": statistics.median(values) if kind == "command" else sum(values),
                "requests": requests[kind] / (len(values) if kind == "command" else 1),
            }
            for kind, values in times.items()
        }

    def tasks(self, name: str) -> dict[str, dict[str, Any]]:
        """Return seconds and requests of Ansible's tasks through a plugin, each twice."""
        import yaml

        from support.play import play

        starts: dict[str, float] = {}
        tasks: list[dict[str, Any]] = []
        for label, module in (("ping", "ping"), ("setup", "setup")):
            for turn in ("first", "again"):
                tasks.append({"name": f"{label}, {turn}", f"ansible.builtin.{module}": {}})
        tasks.append({"name": "end", "ansible.builtin.debug": {"msg": ""}})
        for task in tasks:
            task["before"] = lambda name=task["name"]: starts.__setitem__(name, time.perf_counter())
        inventory = self.folder / "boxes.yml"
        inventory.write_text(yaml.safe_dump({"all": {"hosts": {"box": self.variables(name)}}}), encoding="utf-8")
        whole = [{"name": "inside", "hosts": "box", "gather_facts": False, "tasks": tasks}]
        env = {key: value for key, value in self.env.items() if key != "ANSIBLE_PIPELINING"}
        # play() takes the hooks from a flat list of tasks, so the play is of the benchmark's own making here.
        run = play_with_hooks(play, whole, env, self.folder, self.pve, str(inventory))
        run.ok(warnings=True)
        names = [task["name"] for task in whole[0]["tasks"]]
        return {
            task: {
                "seconds": starts[after] - starts[task],
                "requests": sum(count for key, count in run.requests[task].items() if "/agent/" in key),
            }
            for task, after in itertools.pairwise(names)
        }

    def bare(self, commands: int) -> float:
        """Return the median seconds of exec and exec-status of ``true`` and nothing else, through our client."""
        from agentlab_core import config
        from agentlab_core.context import Context

        ctx = Context(config.load({}, self.env), actor="benchmark")
        path = f"nodes/{self.box.node}/qemu/{self.box.vmid}/agent"
        times = []
        for _number in range(commands):
            began = time.perf_counter()
            pid = ctx.client.post(f"{path}/exec", command=["true"])["pid"]
            while not ctx.client.get_dict(f"{path}/exec-status", pid=pid)["exited"]:
                pass
            times.append(time.perf_counter() - began)
        ctx.close()
        return statistics.median(times)

    def close(self) -> None:
        self.pve.close_machines()
        self.server.stop()


def play_with_hooks(play: Any, whole: Any, env: Any, folder: Path, pve: Any, inventory: str) -> Any:
    """Run a play whose tasks have ``before`` hooks."""
    from support.play import _Hooks, run_play

    hooks = {task["name"]: task.pop("before") for task in whole[0]["tasks"]}
    with _Hooks(hooks, pve) as listening:
        run = run_play(whole, {**env, "AGENTLAB_TEST_HOOK": listening.path}, folder, args=("-i", inventory))
    run.requests = listening.requests
    return run


def row(label: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    ratio = theirs["seconds"] / ours["seconds"]
    return (
        f"| {label} | {ours['seconds']:.2f} s | {ours['requests']:.1f} | {theirs['seconds']:.2f} s | "
        f"{theirs['requests']:.1f} | {ratio:.1f} times |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=20, help="how many commands are measured")
    parser.add_argument("--megabytes", type=int, default=10, help="size of the files")
    parser.add_argument("--plugin", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plugin:
        use_plugin(options.plugin, options.folder, options.commands)
        return 0
    peer = peers.fetch()[peers.NEWEST]
    with tempfile.TemporaryDirectory(prefix="inside-") as folder:
        field = Field(Path(folder))
        field.env["ANSIBLE_COLLECTIONS_PATH"] = f"{REPO / '.collections'}:{peer}"
        try:
            bare = field.bare(options.commands)
            tasks = {name: field.tasks(name) for name in (OURS, THEIRS)}
            plugins = {name: field.plugin(name, options.commands, options.megabytes) for name in (OURS, THEIRS)}
        finally:
            field.close()
    beyond = plugins[OURS]["command"]["seconds"] - bare
    print(f"exec and exec-status of true: {bare:.3f} s; beyond it ours {beyond:.3f} s")
    print(f"community.proxmox {peers.version(peers.NEWEST)}; {options.commands} commands, {options.megabytes} MiB")
    print("| what | ours | requests | theirs | requests | ours is faster |\n|---|---|---|---|---|---|")
    for kind, label in (
        ("command", "a command that does nothing"),
        ("up", f"{options.megabytes} MiB of random bytes, up"),
        ("down", f"{options.megabytes} MiB of random bytes, down"),
        ("text", f"{options.megabytes} MiB of text, up and down"),
    ):
        print(row(label, plugins[OURS][kind], plugins[THEIRS][kind]))
    for task in tasks[OURS]:
        print(row(f"`{task.partition(',')[0]}`,{task.partition(',')[2]}", tasks[OURS][task], tasks[THEIRS][task]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
