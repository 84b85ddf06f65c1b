# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The connection plugin agentlab.proxmox.sandbox: real tasks of real playbooks in the double's guest, which runs
them.
"""

from __future__ import annotations

import getpass
import json
import os
import random
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.double import Server
from support.play import Run, run_command, run_play
from support.programs import require, require_program

Inside = Callable[..., Run]
Task = dict[str, Any]


def test_every_option_of_the_core_is_one_of_the_connection() -> None:
    from ansible_collections.agentlab.proxmox.plugins.connection import sandbox
    from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter

    options = yaml.safe_load(sandbox.DOCUMENTATION)["options"]
    assert set(_adapter.COMMON_ARGS) <= set(options)
    for name, option in options.items():
        secret = _adapter.COMMON_ARGS.get(name, {}).get("no_log")
        # A secret in ansible.cfg would be in a file that everybody reads.
        assert not secret or not option.get("ini"), name


def agent_requests(requests: Counter[str]) -> int:
    """How many of these requests went to the guest agent."""
    return sum(count for request, count in requests.items() if "/agent/" in request)


@pytest.mark.everyday
def test_tasks_run_inside_with_few_requests(inside: Inside, server: Server, box: Any, tmp_path: Path) -> None:
    # As long as the real agent takes.
    server.pve.agent_nap = 0.1
    data = random.Random(20).randbytes(200_000)
    source = tmp_path / "source.bin"
    source.write_bytes(data)
    (tmp_path / "page.j2").write_text("sandbox {{ inventory_hostname }} ä\n", encoding="utf-8")
    run = inside(
        [
            {"name": "first", "ansible.builtin.ping": {}},
            {"name": "ping", "ansible.builtin.ping": {}},
            {"name": "command", "ansible.builtin.command": {"argv": ["printf", "%s", "ä €\n'\""]}},
            {"name": "setup", "ansible.builtin.setup": {"gather_subset": ["min"]}},
            {"name": "setup again", "ansible.builtin.setup": {"gather_subset": ["min"]}},
            {"name": "copy", "ansible.builtin.copy": {"src": str(source), "dest": "{{ guest }}/b ä", "mode": "0640"}},
            {"name": "again", "ansible.builtin.copy": {"src": str(source), "dest": "{{ guest }}/b ä", "mode": "0640"}},
            {
                "name": "template",
                "ansible.builtin.template": {"src": f"{tmp_path}/page.j2", "dest": "{{ guest }}/page"},
            },
            {
                "name": "fetch",
                "ansible.builtin.fetch": {"src": "{{ guest }}/b ä", "dest": f"{tmp_path}/back.bin", "flat": True},
            },
            {"name": "raw", "ansible.builtin.raw": "id -u; exit 3", "failed_when": "raw.rc != 3", "register": "raw"},
        ]
    ).ok()
    assert run["ping"]["ping"] == "pong" and run["command"]["stdout"] == "ä €\n'\""
    assert run["setup"]["ansible_facts"]["ansible_system"] == "Linux"
    assert run.status("copy") == "changed" and run.status("again") == "ok"
    folder = server.pve.machine(box.vmid).folder
    assert (folder / "b ä").read_bytes() == data == (tmp_path / "back.bin").read_bytes()
    assert (folder / "page").read_text(encoding="utf-8") == "sandbox box ä\n"
    # Requests that begin something: they do not depend on the speed of the guest.
    begun = {task: requests["POST /nodes/{node}/qemu/{vmid}/agent/exec"] for task, requests in run.requests.items()}
    # The first task brings Ansible's library into the guest, which keeps it: later tasks send their own part only.
    assert begun["first"] <= 4 and begun["setup"] <= 6 and begun["raw"] == 1, run.requests
    assert begun["ping"] == begun["command"] == begun["setup again"] == 1, run.requests
    # The rest asks for the answer: once or twice where the guest is as fast as the agent, and never all the time.
    for task in ("ping", "setup", "raw"):
        assert run.requests[task]["GET /nodes/{node}/qemu/{vmid}/config"] == 2
        assert agent_requests(run.requests[task]) - begun[task] <= 10, run.requests


def test_the_examples_of_the_documentation_run(env: dict[str, str], tmp_path: Path, server: Server, given: Any) -> None:
    """The play as it stands, then the inventory of its comment with the command below it."""
    from ansible_collections.agentlab.proxmox.plugins.connection import sandbox

    server.pve.agent_default = True
    folder = server.pve.machine(1000).folder
    text = sandbox.EXAMPLES.replace("/srv/", f"{folder}/")
    # A shipped module of the controller would make the folder as root's alone, before the guest has it.
    remote_tmp = f"{{{{ '{tmp_path}/own' if inventory_hostname == 'localhost' else '{folder}/ansible' }}}}"
    run = run_play(text, env, tmp_path, extra_vars={"ansible_remote_tmp": remote_tmp}).ok()
    assert run["Run a command"]["stdout"] == "Read this first."
    given(name="build")
    lines = [line.removeprefix("#").removeprefix(" ") for line in text[text.index("# boxes.yml") :].splitlines()[1:]]
    (tmp_path / "boxes.yml").write_text("\n".join(lines[: lines.index("")]), encoding="utf-8")
    words = lines[-1].replace("boxes.yml", str(tmp_path / "boxes.yml")).split()
    server.pve.machine(1001)
    said = run_command([*words, "-e", f"ansible_remote_tmp={server.pve.machine(1001).folder}"], env, tmp_path)
    assert said.rc == 0 and said.stdout.count("pong") == 2, said.output


def test_pipelining_off_and_async_work_too(inside: Inside) -> None:
    run = inside(
        [
            {"name": "ping", "ansible.builtin.ping": {}},
            {"name": "long", "ansible.builtin.command": "sleep 1", "async": 60, "poll": 1},
        ],
        ansible_pipelining=False,
        ansible_async_dir="{{ guest }}/async",
    ).ok()
    assert run["ping"]["ping"] == "pong" and run["long"]["rc"] == 0


def test_a_task_that_is_left_alone_is_looked_after_later(inside: Inside) -> None:
    run = inside(
        [
            {
                "name": "start",
                "ansible.builtin.command": {"argv": ["sh", "-c", "sleep 1; echo {{ guest }} >&2; exit 3"]},
                "async": 60,
                "poll": 0,
                "register": "job",
            },
            {
                "name": "end",
                "ansible.builtin.async_status": {"jid": "{{ job.ansible_job_id }}"},
                "register": "status",
                "until": "status.finished",
                "retries": 60,
                "delay": 1,
                "failed_when": "status.rc != 3",
            },
            {
                "name": "clear",
                "ansible.builtin.async_status": {"jid": "{{ job.ansible_job_id }}", "mode": "cleanup"},
            },
        ],
        ansible_async_dir="{{ guest }}/async",
    ).ok()
    assert run["end"]["rc"] == 3 and "/guest-" in run["end"]["stderr"]


def test_a_large_file_goes_in_and_out(inside: Inside, server: Server, box: Any, tmp_path: Path) -> None:
    """AGENTLAB_LARGE_FILE_MIB sets the size; 100 MiB take minutes."""
    data = random.Random(23).randbytes(int(os.environ.get("AGENTLAB_LARGE_FILE_MIB", "4")) * 1024 * 1024)
    (tmp_path / "large").write_bytes(data)
    back = str(tmp_path / "back")
    inside(
        [
            {"name": "copy", "ansible.builtin.copy": {"src": f"{tmp_path}/large", "dest": "{{ guest }}/large"}},
            {"name": "fetch", "ansible.builtin.fetch": {"src": "{{ guest }}/large", "dest": back, "flat": True}},
        ]
    ).ok()
    assert (server.pve.machine(box.vmid).folder / "large").read_bytes() == data == Path(back).read_bytes()


def test_the_sandbox_is_chosen_by_name_vmid_or_uuid(inside: Inside, box: Any) -> None:
    def pong(host: str, **variables: Any) -> Run:
        return inside([{"name": "ping", "ansible.builtin.raw": "echo pong"}], host, **variables)

    assert pong("box").ok()["ping"]["stdout"] == "pong\n"
    assert pong("other", ansible_host=str(box.vmid)).ok()["ping"]["stdout"] == "pong\n"
    assert pong("third", agentlab_vmid=box.vmid, agentlab_uuid=box.uuid, ansible_host="192.0.2.1").ok().rc == 0
    # Another sandbox got the VMID since the inventory was read.
    wrong = pong("fourth", agentlab_vmid=box.vmid + 1, agentlab_uuid=box.uuid)
    assert wrong.rc != 0 and "is not the VMID of the sandbox" in wrong.output
    unknown = pong("nobody")
    assert unknown.rc != 0 and unknown.entry("ping")["status"] == "unreachable"
    assert "sandbox not found" in unknown.output and "ansible_host" in unknown.output


@pytest.mark.parametrize("what", ["stopped", "lease over", "foreign"])
def test_nothing_runs_where_nothing_may(
    inside: Inside, box: Any, server: Server, env: dict[str, str], what: str
) -> None:
    guest = server.pve.machine(box.vmid)
    if what == "lease over":
        with sqlite3.connect(env["AGENTLAB_DATABASE"]) as conn:
            conn.execute("UPDATE sandboxes SET lease_expires_at = 1")
        conn.close()
    elif what == "stopped":
        server.pve.vm(box.vmid).status = "stopped"
    else:
        server.pve.vm(box.vmid).config.update(description="somebody else's", smbios1="uuid=" + "1" * 8)
    run = inside([{"name": "mark", "ansible.builtin.raw": f"touch {guest.folder}/mark"}])
    assert run.rc != 0 and "Traceback" not in run.output
    assert not (guest.folder / "mark").exists() and not guest.started


def test_time_outs_and_bounds_say_what_to_raise(inside: Inside) -> None:
    slow = inside(
        [{"name": "slow", "ansible.builtin.raw": "echo so far; sleep 60"}], ansible_agentlab_command_timeout=2
    )
    assert slow.rc != 0 and "ansible_agentlab_command_timeout" in slow.output and "so far" in slow.output
    large = inside(
        [{"name": "large", "ansible.builtin.raw": "head -c 100000 /dev/zero"}], ansible_agentlab_max_output=5000
    )
    assert large.rc != 0 and "ansible_agentlab_max_output" in large.output


def test_a_missing_file_is_no_broken_one(inside: Inside, tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("kept")
    run = inside(
        [
            {
                "name": "fetch",
                "ansible.builtin.fetch": {"src": "/nonexistent/file", "dest": str(target), "flat": True},
                "ignore_errors": True,
            }
        ]
    )
    assert run.status("fetch") == "failed" and target.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".agentlab-")] == []


def test_the_events_say_who_ran_what(inside: Inside, env: dict[str, str]) -> None:
    secret = "zxcv-very-secret-1"
    inside([{"name": "run", "ansible.builtin.command": {"argv": ["sh", "-c", "cat >/dev/null"], "stdin": secret}}]).ok()
    with sqlite3.connect(env["AGENTLAB_DATABASE"]) as conn:
        rows = conn.execute("SELECT operation, actor, evidence FROM events ORDER BY id").fetchall()
    conn.close()
    assert any("connection agentlab.proxmox.sandbox" in actor for _operation, actor, _evidence in rows), rows
    assert secret not in json.dumps(rows)


# As sudo does: -n refuses where a password is needed, -S reads one line of standard input and leaves the rest.
SUDO = """\
#!/bin/sh
quiet= user=root
while :; do
    case $1 in
        -n) quiet=1; shift ;;
        -H | -S) shift ;;
        -p) shift 2 ;;
        -u) user=$2; shift 2 ;;
        *) break ;;
    esac
done
if [ ! -e "$0.free" ]; then
    [ -z "$quiet" ] || { echo 'sudo: a password is required' >&2; exit 1; }
    read -r word
    [ "$word" = 'right one' ] || { echo 'Sorry, try again.' >&2; exit 1; }
fi
exec env SUDO_TO="$user" "$@"
"""


@pytest.mark.parametrize("asks", [True, False])
def test_become_gives_the_password_only_where_sudo_asks(inside: Inside, server: Server, box: Any, asks: bool) -> None:
    guest = server.pve.machine(box.vmid)
    programs = guest.folder / "programs"
    programs.mkdir()
    (programs / "sudo").write_text(SUDO)
    (programs / "sudo").chmod(0o755)
    if not asks:
        (programs / "sudo.free").touch()
    guest.path = f"{programs}:{guest.path}"
    task = {"name": "run", "ansible.builtin.command": "printenv SUDO_TO", "become": True, "changed_when": False}
    show = {"name": "input", "ansible.builtin.raw": "cat; env", "become": True}
    values = {"ansible_user": getpass.getuser() if os.geteuid() else "nobody", "ansible_become_user": "build"}
    good = inside([task, show], ansible_become_password="right one", **values).ok()
    assert good["run"]["stdout"] == "build"
    # Neither the command's input nor its environment has the password.
    assert "right one" not in good["input"]["stdout"] and "AGENTLAB_BECOME" not in good["input"]["stdout"]
    assert not any("right one" in " ".join(argv) for argv, _input in guest.started)
    if asks:
        bad = inside([task], ansible_become_password="wrong one", **values)
        assert bad.rc != 0 and "become_password" in bad.output and "wrong one" not in bad.output


# The password "right one" of user nobody, for the real sudo.
SHADOW = """\
root:*:19000:0:99999:7:::
nobody:$6$agentlabtests$Fa5n2b47bUUKh0FqWRVzGR4MGcUcROUjIqJtfa.bMcy\
7SH5AZDV8Dc3Gz/uIE0orpFlNQ94kbV1WO837MRC4c/:19000:0:99999:7:::
"""
SUDOERS = """\
Defaults env_reset
Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Defaults %suse_pty
root ALL=(ALL:ALL) ALL
nobody ALL=(ALL:ALL) %s ALL
"""


@pytest.fixture
def real_sudo() -> None:
    """What the test with the real sudo needs."""
    require(os.geteuid() == 0, "the guest's sudoers and shadow are mounted, which needs root")
    require_program("sudo")
    unshare = [require_program("unshare", "util-linux"), "--mount", "true"]
    mounts = subprocess.run(unshare, capture_output=True, check=False).returncode == 0
    require(mounts, "this place allows no mounts of its own")


@pytest.mark.usefixtures("real_sudo")
@pytest.mark.parametrize("terminal", ["", "!"], ids=["use_pty", "no pty"])
@pytest.mark.parametrize("asks", [True, False])
def test_become_with_the_real_sudo(
    inside: Inside, server: Server, box: Any, tmp_path: Path, asks: bool, terminal: str
) -> None:
    guest = server.pve.machine(box.vmid)
    guest.replace_files({"/etc/shadow": SHADOW, "/etc/sudoers": SUDOERS % (terminal, "" if asks else "NOPASSWD:")})
    data = random.Random(24).randbytes(100_000)
    (tmp_path / "source").write_bytes(data)
    tasks: list[Task] = [
        {"name": "root", "ansible.builtin.command": "id -un", "become": True},
        {"name": "daemon", "ansible.builtin.command": "id -un", "become": True, "become_user": "daemon"},
        {"name": "input", "ansible.builtin.raw": "cat; env", "become": True},
        {
            "name": "copy",
            "ansible.builtin.copy": {"src": f"{tmp_path}/source", "dest": "{{ guest }}/of-root", "mode": "0644"},
            "become": True,
        },
    ]
    good = inside(tasks, ansible_become_password="right one", ansible_user="nobody").ok()
    assert good["root"]["stdout"] == "root" and good["daemon"]["stdout"] == "daemon"
    assert "right one" not in good["input"]["stdout"] and "AGENTLAB_BECOME" not in good["input"]["stdout"]
    file = guest.folder / "of-root"
    assert file.read_bytes() == data and file.stat().st_uid == 0
    if asks:
        bad = inside(tasks[:1], ansible_become_password="wrong one", ansible_user="nobody")
        assert bad.rc != 0 and "become_password" in bad.output and "wrong one" not in bad.output


def test_a_user_that_the_guest_lacks_is_named_and_makes_it_unreachable(inside: Inside) -> None:
    """As over SSH. cloud-init makes users, so wait_for_connection may try again; its message names the cause."""
    said = "sandbox 1000 has no user nosuch; name one that it has (ansible_user, job_user), or none for root"
    refused = inside([{"name": "ping", "ansible.builtin.ping": {}}], ansible_user="nosuch")
    assert refused.rc != 0 and refused.entry("ping")["status"] == "unreachable"
    assert said in refused.entry("ping")["result"]["msg"]
    wait = {"name": "wait", "ansible.builtin.wait_for_connection": {"timeout": 1, "sleep": 1, "delay": 0}}
    waited = inside([wait], ansible_user="nosuch")
    assert waited.rc != 0 and said in waited.entry("wait")["result"]["msg"]


@pytest.mark.parametrize("named", [False, True])
def test_what_a_command_of_the_guest_says_itself_makes_nothing_unreachable(inside: Inside, named: bool) -> None:
    user = getpass.getuser() if os.geteuid() else "nobody"
    forged = f"echo 'agentlab: no user {user} in this guest' >&2; exit 125"
    tasks = [{"name": "forge", "ansible.builtin.raw": forged}]
    refused = inside(tasks, **({"ansible_user": user} if named else {}))
    assert refused.entry("forge")["status"] == "failed" and refused.entry("forge")["result"]["rc"] == 125


def test_what_a_module_says_itself_is_no_refusal_of_the_become_password(
    inside: Inside, server: Server, box: Any
) -> None:
    guest = server.pve.machine(box.vmid)
    programs = guest.folder / "programs"
    programs.mkdir()
    (programs / "sudo").write_text(SUDO)
    (programs / "sudo").chmod(0o755)
    guest.path = f"{programs}:{guest.path}"
    text = "echo 'Sorry, try again.'; echo '1 incorrect password attempt' >&2; exit 4"
    run = inside(
        [{"name": "run", "ansible.builtin.command": {"argv": ["sh", "-c", text]}, "become": True}],
        ansible_user=getpass.getuser() if os.geteuid() else "nobody",
        ansible_become_password="right one",
    )
    assert run.entry("run")["status"] == "failed" and run.entry("run")["result"].get("rc") == 4, run.output
