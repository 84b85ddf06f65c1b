# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure commands, files and tasks inside a sandbox beside community.proxmox's guest-agent connection.

Both plugins work through the same double of Proxmox VE, by turns. Its guest really runs the commands, and its agent
takes as long as the real one. With 0.09 s at each connection, exec and exec-status take 0.36 s, and file-write 0.54 s;
on Proxmox VE 9.2 they take 0.36 s and 0.57 s. Of several requests at the same time each takes 0.57 of that, as there.

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

OURS, PEER = "agentlab.proxmox.sandbox", "community.proxmox.proxmox_qemu_api"
# Seconds that the agent takes at each connection.
AGENT_SECONDS = 0.09
# A line of the text file that is copied.
TEXT = b"A line of text as a log has it, number %d, with some words that come again and again.\n"


# ---- one plugin, in a process of its own ----


def use_plugin(name: str, folder: Path, commands: int) -> None:
    """Run commands and copy files through a connection plugin, and print the seconds of each kind of work as JSON.

    ``folder`` has the files that DoubleWithSandbox.measure_plugin wrote. Before each piece of work a line names its
    kind, and the work begins when a line comes on standard input. Raises AssertionError when a file comes back changed.
    """
    from ansible.playbook.play_context import PlayContext
    from ansible.plugins.loader import connection_loader, init_plugin_loader

    init_plugin_loader()
    connection = connection_loader.get(name, PlayContext(), os.devnull)
    connection.set_options(var_options=json.loads((folder / "variables.json").read_text(encoding="utf-8")))
    connection.exec_command("true", sudoable=False)
    times: dict[str, list[float]] = {"command": [], "up": [], "down": [], "text": []}

    def measure_work(kind: str, work: Callable[[], Any]) -> Any:
        print(json.dumps({"begins": kind}), flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        answer = work()
        times[kind].append(time.perf_counter() - began)
        return answer

    for _number in range(commands):
        status, _out, _err = measure_work("command", lambda: connection.exec_command("true", sudoable=False))
        assert status == 0
    guest = json.loads((folder / "guest.json").read_text(encoding="utf-8"))
    for kind, file in (("up", "random"), ("text", "text")):
        measure_work(kind, lambda file=file: connection.put_file(str(folder / file), f"{guest}/{file}"))
    measure_work("down", lambda: connection.fetch_file(f"{guest}/random", str(folder / "random.back")))
    measure_work("text", lambda: connection.fetch_file(f"{guest}/text", str(folder / "text.back")))
    for file in ("random", "text"):
        assert (folder / f"{file}.back").read_bytes() == (folder / file).read_bytes(), f"{file} came back changed"
    print(json.dumps({"times": times}), flush=True)


# ---- both, through one double ----


class DoubleWithSandbox:
    """The double of Proxmox VE with one running sandbox, and a user's environment. ``folder`` gets all files."""

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
        self.pve.agent_nap = AGENT_SECONDS

    def make_variables(self, name: str) -> dict[str, Any]:
        """Return the variables of the sandbox as a host that Ansible reaches by that connection plugin."""
        common = {"ansible_python_interpreter": "/usr/bin/python3", "ansible_remote_tmp": f"{self.guest.folder}/tmp"}
        if name == OURS:
            return {"inventory_hostname": "box", "ansible_host": "box", "ansible_connection": OURS, **common}
        environment = self.server.environment(str(self.folder))
        return {
            "ansible_connection": PEER,
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

    def count_agent_requests(self) -> int:
        """Return how many requests went to the guest agent since the double's counter was cleared."""
        return sum(count for request, count in self.pve.counted.items() if "/agent/" in request)

    def measure_plugin(self, name: str, commands: int, megabytes: int) -> dict[str, dict[str, Any]]:
        """Return seconds and requests of so many commands, and of files of so many MiB, through a plugin.

        Those of commands are per command. The plugin runs in a process of its own. Raises RuntimeError when it fails.
        """
        (self.folder / "variables.json").write_text(json.dumps(self.make_variables(name)), encoding="utf-8")
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
            message = json.loads(line)
            requests[kind] += self.count_agent_requests()
            self.pve.counted.clear()
            kind = message.get("begins", "")
            times = message.get("times", times)
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

    def measure_tasks(self, name: str) -> dict[str, dict[str, Any]]:
        """Return seconds and requests of the tasks ping and setup through a plugin, each twice, by the task's name."""
        import yaml

        starts: dict[str, float] = {}
        tasks: list[dict[str, Any]] = []
        for label, module in (("ping", "ping"), ("setup", "setup")):
            for turn in ("first", "again"):
                tasks.append({"name": f"{label}, {turn}", f"ansible.builtin.{module}": {}})
        tasks.append({"name": "end", "ansible.builtin.debug": {"msg": ""}})
        for task in tasks:
            task["before"] = lambda name=task["name"]: starts.__setitem__(name, time.perf_counter())
        inventory = self.folder / "boxes.yml"
        inventory.write_text(yaml.safe_dump({"all": {"hosts": {"box": self.make_variables(name)}}}), encoding="utf-8")
        plays = [{"name": "inside", "hosts": "box", "gather_facts": False, "tasks": tasks}]
        env = {key: value for key, value in self.env.items() if key != "ANSIBLE_PIPELINING"}
        run = run_play_with_hooks(plays, env, self.folder, self.pve, str(inventory))
        run.ok(warnings=True)
        names = [task["name"] for task in plays[0]["tasks"]]
        return {
            task: {
                "seconds": starts[after] - starts[task],
                "requests": sum(count for key, count in run.requests[task].items() if "/agent/" in key),
            }
            for task, after in itertools.pairwise(names)
        }

    def measure_exec(self, commands: int) -> float:
        """Return the median seconds of exec and exec-status of ``true``, so many times, through our client alone."""
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
        """Stop the guest and the server."""
        self.pve.close_machines()
        self.server.stop()


def run_play_with_hooks(
    plays: list[dict[str, Any]], env: dict[str, str], folder: Path, pve: Any, inventory: str
) -> Any:
    """Run plays, the first of which has tasks with ``before`` hooks, and return the run with its requests by task.

    play() of tests/support takes hooks only from a flat list of tasks of its own play on localhost.
    """
    from support.play import _Hooks, run_play

    hooks = {task["name"]: task.pop("before") for task in plays[0]["tasks"]}
    with _Hooks(hooks, pve) as listening:
        run = run_play(plays, {**env, "AGENTLAB_TEST_HOOK": listening.path}, folder, args=("-i", inventory))
    run.requests = listening.requests
    return run


def format_row(label: str, ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """Return a row of the table: seconds and requests of our plugin and of the peer's, and how much faster ours is."""
    ratio = peer["seconds"] / ours["seconds"]
    return (
        f"| {label} | {ours['seconds']:.2f} s | {ours['requests']:.1f} | {peer['seconds']:.2f} s | "
        f"{peer['requests']:.1f} | {ratio:.1f} times |"
    )


def main() -> int:
    """Measure both plugins, and print the table; or, in a process of its own, one plugin. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=20, help="how many commands are measured")
    parser.add_argument("--megabytes", type=int, default=10, help="size of the files")
    parser.add_argument("--plugin", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plugin:
        use_plugin(options.plugin, options.folder, options.commands)
        return 0
    peer_folder = peers.fetch_packages()[peers.NEWEST]
    with tempfile.TemporaryDirectory(prefix="inside-") as folder:
        double = DoubleWithSandbox(Path(folder))
        double.env["ANSIBLE_COLLECTIONS_PATH"] = f"{REPO / '.collections'}:{peer_folder}"
        try:
            exec_seconds = double.measure_exec(options.commands)
            tasks = {name: double.measure_tasks(name) for name in (OURS, PEER)}
            plugins = {name: double.measure_plugin(name, options.commands, options.megabytes) for name in (OURS, PEER)}
        finally:
            double.close()
    beyond = plugins[OURS]["command"]["seconds"] - exec_seconds
    print(f"exec and exec-status of true: {exec_seconds:.3f} s; beyond it ours {beyond:.3f} s")
    print(f"community.proxmox {peers.read_version(peers.NEWEST)}; {options.commands} commands, {options.megabytes} MiB")
    print("| what | ours | requests | theirs | requests | ours is faster |\n|---|---|---|---|---|---|")
    for kind, label in (
        ("command", "a command that does nothing"),
        ("up", f"{options.megabytes} MiB of random bytes, up"),
        ("down", f"{options.megabytes} MiB of random bytes, down"),
        ("text", f"{options.megabytes} MiB of text, up and down"),
    ):
        print(format_row(label, plugins[OURS][kind], plugins[PEER][kind]))
    for task in tasks[OURS]:
        print(format_row(f"`{task.partition(',')[0]}`,{task.partition(',')[2]}", tasks[OURS][task], tasks[PEER][task]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
