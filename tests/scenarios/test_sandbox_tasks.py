# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tasks inside sandboxes as users write them: odd files, odd ends of commands, reboots, several sandboxes, and
sandboxes that end in the middle of a play.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command

from support.double import Server
from support.play import Run, play

Inside = Callable[..., Run]

NAMES = ["plain", "with space", "ünïcødé €", "line\nfeed", "-dash", "quo'te\"$x", "star*", "empty"]


def test_files_of_any_name_go_in_and_out(inside: Inside, server: Server, box: Any, tmp_path: Path) -> None:
    folder = server.pve.machine(box.vmid).folder
    source = tmp_path / "source"
    source.mkdir()
    contents = {name: b"" if name == "empty" else os.urandom(50) + name.encode() for name in NAMES}
    for name, data in contents.items():
        (source / name).write_bytes(data)
    (source / "plain").chmod(0)
    with tarfile.open(tmp_path / "archive.tgz", "w:gz") as archive:
        archive.add(source / "with space", "from archive")
    tasks: list[dict[str, Any]] = [
        {"name": "folder", "ansible.builtin.file": {"path": "{{ guest }}/here", "state": "directory"}},
        {"name": "tree", "ansible.builtin.copy": {"src": str(source), "dest": "{{ guest }}/tree"}},
        {"name": "into", "ansible.builtin.copy": {"src": f"{source}/-dash", "dest": "{{ guest }}/here"}},
        {
            "name": "no bits",
            "ansible.builtin.copy": {"src": f"{source}/plain", "dest": "{{ guest }}/here/", "mode": "preserve"},
        },
        {
            "name": "unpack",
            "ansible.builtin.unarchive": {"src": f"{tmp_path}/archive.tgz", "dest": "{{ guest }}/here"},
        },
        {
            "name": "fetch folder",
            "ansible.builtin.fetch": {"src": "{{ guest }}/here", "dest": f"{tmp_path}/x", "flat": True},
            "ignore_errors": True,
        },
    ]
    for number, name in enumerate(NAMES):
        back = {"src": "{{ guest }}/tree/source/" + name, "dest": f"{tmp_path}/back/{name}", "flat": True}
        tasks.append({"name": f"fetch {number}", "ansible.builtin.fetch": back})
    run = inside(tasks).ok()
    assert {path.name: path.read_bytes() for path in (folder / "tree/source").iterdir()} == contents
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == contents
    assert sorted(os.listdir(folder / "here")) == ["-dash", "from archive", "plain"]
    assert (folder / "here/plain").stat().st_mode & 0o777 == 0
    assert run.status("fetch folder") == "failed" and "directory" in run["fetch folder"]["msg"]


def test_commands_end_in_a_play_as_they_end_in_the_guest(inside: Inside, tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text('#!/bin/sh\necho "$1" "$V"; exit 6\n')
    on = {"ignore_errors": True}
    run = inside(
        [
            {"name": "env", "ansible.builtin.command": "printenv V", "environment": {"V": "a b'c\"ä\nx"}},
            {
                "name": "script",
                "ansible.builtin.script": f"{tmp_path}/script.sh 'a b'",
                "environment": {"V": "ö"},
                **on,
            },
            {"name": "huge", "ansible.builtin.shell": "head -c 3000000 /dev/zero | tr '\\0' x"},
            {"name": "bytes", "ansible.builtin.raw": "printf '\\000\\001a\\r\\n'"},
            {"name": "signal of raw", "ansible.builtin.raw": "echo before; kill -9 $$", **on},
            {"name": "signal", "ansible.builtin.shell": "echo before; kill -9 $$", **on},
            {"name": "module killed", "ansible.builtin.shell": "kill -9 $PPID", **on},
            {"name": "too long", "ansible.builtin.command": "sleep 60", "async": 1, "poll": 1, **on},
            {"name": "input", "ansible.builtin.command": {"argv": ["cat"], "stdin": "öä\n\nx"}},
            {"name": "loop", "ansible.builtin.command": "echo {{ item }}", "loop": ["a", "b"]},
            {"name": "reset", "ansible.builtin.meta": "reset_connection"},
            {"name": "after", "ansible.builtin.command": "echo fine"},
        ],
        ansible_async_dir="{{ guest }}/async",
    )
    assert run.rc == 0, run.output
    assert run["env"]["stdout"] == "a b'c\"ä\nx"
    assert (run["script"]["rc"], run["script"]["stdout"]) == (6, "a b ö\n")
    assert run["huge"]["stdout"] == "x" * 3_000_000
    assert run["bytes"]["stdout"] == "\0\x01a\r\n"
    assert (run["signal of raw"]["rc"], run["signal of raw"]["stdout"]) == (137, "before\n")
    assert (run["signal"]["rc"], run["signal"]["stdout"]) == (-9, "before")
    assert run.status("module killed") == run.status("too long") == "failed"
    assert run["input"]["stdout"] == "öä\n\nx" and run["after"]["stdout"] == "fine"
    assert [entry["result"]["stdout"] for entry in run.all("loop") if entry.get("item")] == ["a", "b"]


def test_the_keyword_timeout_ends_the_task_and_the_time_out_of_the_connection_ends_the_command(
    inside: Inside, box: Any, context: Any
) -> None:
    def write(name: str) -> str:
        return f"touch '{{{{ guest }}}}/{name}.begun'; sleep 6; touch '{{{{ guest }}}}/{name}.done'"

    on = {"ignore_errors": True}
    limit = {"ansible_agentlab_command_timeout": 2}
    run = inside(
        [
            {"name": "task ends", "ansible.builtin.raw": write("goes on"), "timeout": 2, **on},
            {"name": "command ends", "ansible.builtin.raw": write("ended"), "vars": limit, **on},
            {"name": "later", "ansible.builtin.raw": "sleep 8; cd {{ guest }}; ls *.begun *.done"},
        ]
    )
    assert run.rc == 0, run.output
    assert run.status("task ends") == run.status("command ends") == "failed"
    # The words are those of Ansible: of 2.19 and newer, or older.
    assert re.search("(?i)timed out|in the expected time frame", run["task ends"]["msg"])
    assert "command_timeout" in run["command ends"]["msg"]
    assert run["later"]["stdout_lines"] == ["ended.begun", "goes on.begun", "goes on.done"]
    # The command that nobody waited for is in the list, and its end can be asked for.
    ctx = context()
    left = [entry["run_id"] for entry in command.list_runs(ctx, box) if entry["state"] == "sent"]
    assert [command.read_run(ctx, box, run_id).rc for run_id in left] == [0]


# ---- a guest that goes down while a command runs ----


def test_a_guest_is_rebooted_by_the_module_for_it(inside: Inside, server: Server, box: Any) -> None:
    """The guest goes down before the command that reboots it has ended, and is silent for a while."""
    guest = server.pve.machine(box.vmid)
    (guest.folder / "boot").write_text("first")
    down = guest.folder / "run" / "down"
    (guest.folder / "shutdown").write_text(f"touch {down}; sleep 60\n")

    def strike(_method: str, _path: str) -> None:
        if down.exists():
            (guest.folder / "boot").write_text("second")
            guest.reboot()
            guest.freeze(2)

    server.pve.before = strike
    reboot = {
        "reboot_command": "sh {{ guest }}/shutdown",
        "boot_time_command": "cat {{ guest }}/boot",
        "test_command": "true",
        "reboot_timeout": 60,
    }
    run = inside(
        [
            {"name": "reboot", "ansible.builtin.reboot": reboot},
            {"name": "after", "ansible.builtin.command": "cat {{ guest }}/boot"},
        ]
    ).ok()
    assert run["reboot"]["rebooted"] is True and run["after"]["stdout"] == "second"


@pytest.mark.parametrize("how", ["rebooted", "stopped"])
def test_a_guest_that_goes_down_is_unreachable_and_the_message_says_what_is_unknown(
    inside: Inside, server: Server, box: Any, how: str
) -> None:
    guest = server.pve.machine(box.vmid)
    mark = guest.folder / "run" / "mark"

    def strike(_method: str, path: str) -> None:
        if mark.exists() and "/agent/" in path:
            guest.reboot()
            server.pve.vm(box.vmid).status = "stopped" if how == "stopped" else "running"

    server.pve.before = strike
    run = inside([{"name": "run", "ansible.builtin.raw": f"touch {mark}; sleep 60"}])
    assert run.entry("run")["status"] == "unreachable"
    said = "Whether the command ran is not known" if how == "rebooted" else "The command may have begun"
    assert said in run.entry("run")["result"]["msg"]


# ---- several sandboxes, and sandboxes that end in the middle ----


@pytest.fixture
def play_on_all(env: dict[str, str], tmp_path: Path, server: Server) -> Callable[..., Run]:
    """play_on_all(tasks, vmids): run the tasks in the hosts of the inventory plugin; each has a guest of its own."""

    def run(tasks: list[dict[str, Any]], vmids: list[int]) -> Run:
        folders = {str(vmid): str(server.pve.machine(vmid).folder) for vmid in vmids}
        source = {
            "plugin": "agentlab.proxmox.sandboxes",
            "connection": "sandbox",
            "groups": {"boxes": True},
            "compose": {
                "guest": f"{folders!r}[agentlab_vmid | string]",
                "ansible_remote_tmp": f"{folders!r}[agentlab_vmid | string] ~ '/ansible'",
                "ansible_python_interpreter": "'/usr/bin/python3'",
            },
        }
        inventory = tmp_path / "boxes.agentlab.yml"
        inventory.write_text(yaml.safe_dump(source), encoding="utf-8")
        whole = [{"name": "all", "hosts": "boxes", "gather_facts": False, "tasks": tasks}]
        return play(whole, env, tmp_path, pve=server.pve, args=("-i", str(inventory)))

    return run


def test_tasks_run_in_several_sandboxes_at_once(play_on_all: Callable[..., Run], server: Server, given: Any) -> None:
    server.pve.agent_default = True
    sandboxes = given(3)
    vmids = [sandbox.vmid for sandbox in sandboxes]
    run = play_on_all(
        [
            {"name": "write", "ansible.builtin.copy": {"content": "{{ agentlab_vmid }}", "dest": "{{ guest }}/own"}},
            {"name": "loop", "ansible.builtin.command": "cat {{ guest }}/own {{ item }}", "loop": ["/dev/null"] * 2},
            {
                "name": "first",
                "ansible.builtin.command": "cat {{ guest }}/own",
                "run_once": True,
                "delegate_to": sandboxes[2].name,
            },
        ],
        vmids,
    ).ok()
    for vmid in vmids:
        assert (server.pve.machine(vmid).folder / "own").read_text() == str(vmid)
    items = {entry["host"]: entry["result"]["stdout"] for entry in run.all("loop") if entry.get("item")}
    assert items == {sandbox.name: str(sandbox.vmid) for sandbox in sandboxes}
    assert len([entry for entry in run.all("loop") if entry.get("item")]) == 6


@pytest.mark.parametrize("how", ["destroyed", "the VM is a stranger's", "lease over"])
def test_a_sandbox_that_ends_in_the_middle_gets_no_further_task(
    play_on_all: Callable[..., Run], server: Server, given: Any, context: Any, how: str
) -> None:
    """The inventory was read before, so its host still names the sandbox."""
    server.pve.agent_default = True
    (sandbox,) = given(name="box")
    folder = server.pve.machine(sandbox.vmid).folder
    local = {"delegate_to": "localhost", "vars": {"ansible_connection": "local"}}
    between: list[dict[str, Any]] = []
    if how == "destroyed":
        between.append({"agentlab.proxmox.agentlab_sandbox": {"vmid": sandbox.vmid, "state": "absent", "force": True}})
    if not between:

        def end(_method: str, path: str) -> None:
            if (folder / "now").exists() and path.endswith(f"/{sandbox.vmid}/config"):
                (folder / "now").unlink()
                if how == "lease over":
                    with contextlib.closing(sqlite3.connect(database)) as conn:
                        conn.execute("UPDATE sandboxes SET lease_expires_at = 1")
                        conn.commit()
                else:
                    server.pve.vm(sandbox.vmid).config["smbios1"] = "uuid=" + "1" * 8

        ctx = context()
        database = ctx.config.database
        ctx.close()
        server.pve.before = end
        between.append({"ansible.builtin.raw": f"touch {folder}/now", "ignore_errors": True, "own": True})
    tasks = [{"name": "before", "ansible.builtin.raw": f"touch {folder}/before"}]
    for number, task in enumerate(between):
        tasks.append({"name": f"between {number}", **({} if task.pop("own", False) else local), **task})
    tasks.append({"name": "after", "ansible.builtin.raw": f"touch {folder}/after"})
    run = play_on_all(tasks, [sandbox.vmid])
    assert (folder / "before").exists() and not (folder / "after").exists(), run.output
    after = run.entry("after")
    assert run.rc != 0 and "Traceback" not in run.output
    # A VM that is not ours is no matter of reaching it.
    assert after["status"] == ("failed" if "stranger" in how else "unreachable"), after
