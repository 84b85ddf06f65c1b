# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run playbooks of our collection and of its peers against one canned Proxmox VE, by turns.

Each group of rows is measured by a function ``measure(bench, wanted)``: it gets a Bench and the numbers of the rows to
measure, and returns rows (see judging.py). It raises when something that was to be measured did not do its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from field import (
    FIRST_VMID,
    REPO,
    TOKEN_SECRET,
    CannedProxmox,
    create_database,
    make_play,
    time_command,
    write_playbook,
)

BIN = Path(sys.executable).parent
# What a task of the canned Proxmox VE takes, and how often we look at running tasks (poll_interval), in seconds.
TASK_SECONDS = 0.2
TICK_SECONDS = 0.1
# How many VMs most rows destroy, and how many of them we destroy at the same time.
VM_COUNT = 50
IN_FLIGHT = 16

# Runs something once, and returns its seconds.
TimedRun = Callable[[], float]


class Bench:
    """The canned Proxmox VE, the records, and playbooks of ours and of the peers.

    ``runs``: how often each thing is measured. ``peer_folders``: the collections of each package of peers.py; none
    where no peer is measured. ``most_vms``: the most VMs of row 13.
    """

    def __init__(
        self,
        server: CannedProxmox,
        runs: int,
        peer_folders: dict[str, str] | None = None,
        most_vms: int = 5000,
    ) -> None:
        self.server, self.runs, self.most_vms, self.folder = server, runs, most_vms, server.folder
        self.database = f"{server.folder}/agentlab.db"
        self.env = server.make_environment(self.database, ANSIBLE_COLLECTIONS_PATH=str(REPO / ".collections"))
        self.peer_folders = peer_folders or {}
        self.vmids = list(range(FIRST_VMID, FIRST_VMID + VM_COUNT))
        self.ping_playbook = write_playbook(self.folder, "ping", make_play({"ansible.builtin.ping": {}}))

    # ---- runs ----

    def run_ours(self, playbook: str, *arguments: str) -> float:
        """Run a playbook with our collection, and return its seconds.

        ``arguments`` of ansible-playbook replace the inventory "localhost,". Raises CommandFailed.
        """
        command = [str(BIN / "ansible-playbook"), *(arguments or ("-i", "localhost,")), playbook]
        return time_command(command, self.env, self.folder)

    def run_shipped(self, playbook: str) -> float:
        """Run a playbook with our modules shipped as to another host, and return its seconds.

        Ansible then packs the module, starts a Python and compiles it anew (agentlab_in_place). Raises CommandFailed.
        """
        return self.run_ours(playbook, "-i", "localhost,", "-e", "agentlab_in_place=false")

    def run_peer(self, playbook: str, *arguments: str, package: str = peers.FIRST) -> float:
        """Run a playbook with the collections of a package of peers.py, and return its seconds.

        ``arguments`` of ansible-playbook replace the inventory "localhost,". Raises CommandFailed.
        """
        env = self.server.make_environment(
            self.database,
            ANSIBLE_COLLECTIONS_PATH=self.peer_folders[package],
            REQUESTS_CA_BUNDLE=self.server.ca,
        )
        command = [str(BIN / "ansible-playbook"), *(arguments or ("-i", "localhost,")), playbook]
        return time_command(command, env, self.folder)

    def run_ping(self) -> float:
        """Run a play whose one task is ansible.builtin.ping, and return its seconds."""
        return self.run_ours(self.ping_playbook)

    def measure_by_turns(self, *timed_runs: TimedRun) -> list[list[float]]:
        """Return the seconds of each timed run, measured ``runs`` times by turns, so that load hits all alike."""
        seconds: list[list[float]] = [[] for _timed_run in timed_runs]
        for _number in range(self.runs):
            for values, timed_run in zip(seconds, timed_runs, strict=True):
                values.append(timed_run())
        return seconds

    def call_in_process(self, function: str, *arguments: object) -> Any:
        """Call a function of this folder ("module.name") in a Python process of its own, and return its value.

        The function gets the arguments as texts, and its value must be JSON. Raises RuntimeError when the function
        raises.
        """
        script = (
            "import importlib, json, sys; sys.path.insert(0, sys.argv[1]); module, name = sys.argv[2].split('.'); "
            "print(json.dumps(getattr(importlib.import_module(module), name)(*sys.argv[3:])))"
        )
        process = subprocess.run(
            [sys.executable, "-c", script, str(REPO / "benchmarks"), function, *map(str, arguments)],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        if process.returncode:
            raise RuntimeError(f"{function}: {process.stderr[-1500:]}")
        return json.loads(process.stdout.splitlines()[-1])

    # ---- the cluster and the records ----

    def reset_cluster(self, vm_count: int = VM_COUNT, status: str = "stopped", **settings: Any) -> None:
        """Start a new cluster with so many VMs of that status, and count its requests from zero.

        ``settings``: more of canned_cluster.Settings.
        """
        self.server.reset(**{"vms": vm_count, "status": status, "tasks": {"": TASK_SECONDS}, **settings})

    def write_records(self, count: int = VM_COUNT, state: str = "STOPPED", **options: Any) -> None:
        """Write a new database with so many sandboxes of that state. ``options``: as for field.create_database."""
        create_database(self.server.fingerprint, self.database, count, state, **options)

    # ---- playbooks ----

    def write_destroy_playbook(self) -> str:
        """Write a playbook in which our module destroys ``vmids``, and return its path."""
        options = {"vmids": self.vmids, "state": "absent", "force": True}
        return write_playbook(self.folder, "destroy", make_play({"agentlab.proxmox.agentlab_sandbox": options}))

    def write_prune_playbook(self) -> str:
        """Write a playbook with agentlab_prune, and return its path."""
        return write_playbook(self.folder, "prune", make_play({"agentlab.proxmox.agentlab_prune": {}}))

    def write_info_playbook(self, name: str, **options: Any) -> str:
        """Write a playbook of that name with agentlab_sandbox_info and its options, and return its path."""
        return write_playbook(self.folder, name, make_play({"agentlab.proxmox.agentlab_sandbox_info": options}))

    def write_peer_loop_playbook(self) -> str:
        """Write a playbook in which one task of the peer destroys ``vmids`` in a loop, and return its path."""
        task = {
            "community.proxmox.proxmox_kvm": self.make_peer_options(vmid="{{ item }}", node="pve1", state="absent"),
            "loop": self.vmids,
        }
        return write_playbook(self.folder, "loop", make_play(task))

    def write_peer_forks_playbook(self) -> str:
        """Write a playbook in which the peer destroys the VM of each host of ``write_hosts``, and return its path."""
        options = self.make_peer_options(vmid="{{ vmid }}", node="pve1", state="absent")
        play = make_play({"community.proxmox.proxmox_kvm": options})[0]
        return write_playbook(self.folder, "forks", [dict(play, hosts="sandboxes")])

    def write_peer_info_playbook(self) -> str:
        """Write a playbook in which the peer lists all VMs, and return its path."""
        options = self.make_peer_options(type="qemu")
        return write_playbook(self.folder, "vm-info", make_play({"community.proxmox.proxmox_vm_info": options}))

    def write_hosts(self) -> tuple[str, ...]:
        """Write an inventory with one host for each of ``vmids``.

        Returns the arguments of ansible-playbook to use it with ten forks.
        """
        inventory = Path(self.folder, "fifty.ini")
        inventory.write_text(
            "[sandboxes]\n" + "".join(f"vm{vmid} vmid={vmid}\n" for vmid in self.vmids), encoding="utf-8"
        )
        return ("-i", str(inventory), "--forks", "10")

    def make_peer_options(self, **options: Any) -> dict[str, Any]:
        """Return the options of a module of community.proxmox: address and credentials, and ``options``."""
        return {
            "api_host": self.env["PROXMOX_HOST"],
            "api_port": self.server.port,
            "api_user": "bench@pve",
            "api_token_id": "bench",
            "api_token_secret": TOKEN_SECRET,
            "validate_certs": True,
            **options,
        }
