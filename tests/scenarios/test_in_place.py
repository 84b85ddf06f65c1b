# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules in place (plugins/action): when they run there, that the answer is the one of a module that was shipped,
and what is left when the process
that runs Ansible is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.double import TOKEN_SECRET
from support.play import REPO, run_command, run_play
from support.story import task

SANDBOX = "agentlab_sandbox"
PLACE = re.compile(r"Running (\w+) in place|Using module file \S*/(agentlab_\w+)\.py")
# What no two runs have in common.
_OWN = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}|\d{4}-\d\d-\d\dT[\d:]+Z|UPID:[^\" ]+|(?<=\"duration_ms\": )\d+|(?<= for )\d+s"
)


def places(output: str) -> list[str]:
    """Where each module of ours ran, in order."""
    return ["in place" if found[1] else "shipped" for found in PLACE.finditer(output)]


@pytest.mark.everyday
def test_where_a_module_runs(env: dict[str, str], tmp_path: Path, given: Any) -> None:
    given(1)
    show = {"agentlab.proxmox.agentlab_sandbox_info": {}}
    other = "{{ ansible_playbook_python | dirname }}/python3"
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(
        json.dumps(
            {
                "all": {
                    "hosts": {
                        "beside": {
                            "ansible_connection": "local",
                            "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                        },
                        "another": {"ansible_connection": "local", "ansible_python_interpreter": other},
                    }
                }
            }
        )
    )
    # Whoever is not root is asked for root's password.
    su = {"name": "become", **show, "become": True, "become_method": "ansible.builtin.su"}
    become = [su] if os.geteuid() == 0 else []
    run = run_play(
        [
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {"agentlab_in_place": True},
                "tasks": [
                    {"name": "plain", **show},
                    {"name": "told not to", **show, "vars": {"agentlab_in_place": "no"}},
                    {"name": "another python", **show, "vars": {"ansible_python_interpreter": other}},
                    {"name": "environment", **show, "environment": {"AGENTLAB_CONFIG": env["AGENTLAB_CONFIG"]}},
                    {"name": "timeout", **show, "timeout": 60},
                    {"name": "async", **show, "async": 60, "poll": 1},
                    *become,
                    {"name": "delegated", **show, "delegate_to": "beside"},
                    {"name": "delegated to another python", **show, "delegate_to": "another"},
                ],
            }
        ],
        env,
        tmp_path,
        args=("-vvv", "-i", str(hosts)),
    ).ok()
    assert [entry["result"]["count"] for entry in run.results] == [1] * (8 + len(become))
    assert places(run.output) == ["in place", *["shipped"] * (5 + len(become)), "in place", "shipped"]


@pytest.mark.everyday
def test_both_ways_answer_the_same(env: dict[str, str], tmp_path: Path) -> None:
    """One story, told in place and shipped, each with records of its own: the results are equal but for times,
    identities and task ids.
    """
    password, sealed = tmp_path / "password", tmp_path / "sealed.yml"
    password.write_text("password of the vault")
    vault = [
        str(Path(sys.executable).with_name("ansible-vault")),
        "encrypt_string",
        "--vault-password-file",
        str(password),
        "--stdin-name",
        "sealed",
    ]
    sealed.write_text(
        subprocess.run(
            vault, input=TOKEN_SECRET, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
    )
    plain = {name: value for name, value in env.items() if name != "PROXMOX_TOKEN_SECRET"}
    tasks = [
        task("would create", SANDBOX, name="mine", tags=["a", "b"], ttl="1h", check=True, diff=True),
        task("create", SANDBOX, name="mine", tags=["a", "b"], ttl="1h", diff=True),
        task("again", SANDBOX, name="mine"),
        task("show", "agentlab_sandbox_info", verify=True, events=20),
        task("too long a lease", "agentlab_lease", name="mine", ttl="1000d", fails=True),
        task("stop", SANDBOX, name="mine", state="stopped"),
        task("stop again", SANDBOX, name="mine", state="stopped"),
        task("not allowed", SANDBOX, name="mine", state="suspended", fails=True),
        task("several", SANDBOX, vmids=[100, 101], state="absent"),
        task("no such option", SANDBOX, nam="mine", fails=True),
        task("no such state", SANDBOX, name="mine", state="gone", fails=True),
        task("two that exclude one another", SANDBOX, vmid=1000, vmids=[1000], fails=True),
        task("one that is missing", "agentlab_lease", ttl="1h", fails=True),
        task("not a number", SANDBOX, vmid="ten", fails=True),
        task("a path", "agentlab_sandbox_info", config_file="~/none.yaml", fails=True),
        task("without certificate checks", "agentlab_sandbox_info", verify=True, validate_certs=False),
        task("reconcile", "agentlab_reconcile", diff=True),
        task("prune", "agentlab_prune", states=["STOPPED"], older_than="1d", diff=True),
        task("destroy", SANDBOX, name="mine", state="absent", diff=True),
    ]
    for one in tasks:
        one[next(name for name in one if name.startswith("agentlab."))]["api_token_secret"] = "{{ sealed }}"
    told: dict[str, list[Any]] = {}
    for way in ("yes", "no"):
        run = run_play(
            tasks,
            {**plain, "AGENTLAB_DATABASE": str(tmp_path / f"{way}.db")},
            tmp_path,
            args=("-vvv", "-e", f"agentlab_in_place={way}", "-e", f"@{sealed}", "--vault-password-file", str(password)),
        ).ok()
        assert places(run.output) == ["in place" if way == "yes" else "shipped"] * len(tasks)
        assert TOKEN_SECRET not in run.output
        assert [entry["task"] for entry in run.results if entry["status"] == "failed"] == [
            one["name"] for one in tasks if one.get("ignore_errors")
        ]
        told[way] = [
            json.loads(_OWN.sub("0", json.dumps({name: entry[name] for name in ("task", "status", "result")})))
            for entry in run.results
        ]
    for here, shipped in zip(told["yes"], told["no"], strict=True):
        one, other = here["result"], shipped["result"]
        assert {
            key: (one.get(key), other.get(key)) for key in {*one, *other} if one.get(key) != other.get(key)
        } == {}, here["task"]
        assert here == shipped


def worker_of(env: dict[str, str], server: Any) -> int:
    """The process that waits for the clone of 1000, once that has begun."""
    deadline = time.monotonic() + 30
    while server.pve.vm(1000) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.closing(sqlite3.connect(env["AGENTLAB_DATABASE"])) as conn:
        return int(json.loads(conn.execute("SELECT process FROM claims").fetchone()[0])["pid"])


def test_the_process_that_ran_it_is_killed(env: dict[str, str], tmp_path: Path, server: Any) -> None:
    """The claim of a creation in place names the process that worked for Ansible: once that is dead, the next run
    goes on at once.
    """
    server.pve.fault("POST", "/clone", "hang", seconds=20, carry_out=True)
    create = task("create", SANDBOX, name="mine", keywords={"vars": {"agentlab_in_place": True}})
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_play, [create], env, tmp_path)
        os.kill(worker_of(env, server), signal.SIGKILL)
        killed = first.result()
    assert killed.rc != 0 and "dead state" in killed.output, killed.output
    again = run_play([create, task("show", "agentlab_sandbox_info", verify=True)], env, tmp_path).ok()
    assert again.status("create") == "changed"
    assert [(one["vmid"], one["state"], one["identity"]) for one in again["show"]["sandboxes"]] == [
        (1000, "RUNNING", "MATCH")
    ]


def stop_ansible(worker: int, stop: signal.Signals) -> None:
    """Tell the ansible-playbook over that worker to stop, and wait until the worker has ended."""
    above = [worker]
    while above[-1] != os.getpid():
        above.append(int(Path(f"/proc/{above[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    os.kill(above[-2], stop)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.everyday
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ansible_gives_the_claim_back(
    env: dict[str, str], tmp_path: Path, server: Any, stop: signal.Signals
) -> None:
    """Ctrl-C, or a job that is cancelled: from another container nobody could tell whether the process that held it
    is dead.
    """
    server.pve.fault("POST", "/clone", "hang", seconds=20, carry_out=True)
    create = task("create", SANDBOX, name="mine", keywords={"vars": {"agentlab_in_place": True}})
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_play, [create], env, tmp_path)
        stop_ansible(worker_of(env, server), stop)
        ended = first.result()
    assert ended.rc != 0 and "Traceback" not in ended.output, ended.output
    with contextlib.closing(sqlite3.connect(env["AGENTLAB_DATABASE"])) as conn:
        assert conn.execute("SELECT * FROM claims").fetchall() == []
        assert conn.execute("SELECT kind, phase FROM operations").fetchall() == [("create", "cloning")]
    again = run_play([create], env, tmp_path).ok()
    assert again.status("create") == "changed" and again["create"]["sandbox"]["vmid"] == 1000


@pytest.mark.parametrize("count", [1, 2])
def test_stopping_ansible_while_absence_is_proven_gives_the_claims_back(
    env: dict[str, str], tmp_path: Path, server: Any, given: Any, count: int
) -> None:
    given(count)
    server.pve.fault("GET", "cluster/nextid", "hang", seconds=3)
    vmids = list(range(1000, 1000 + count))
    destroy = task(
        "destroy", SANDBOX, vmids=vmids, state="absent", force=True, keywords={"vars": {"agentlab_in_place": True}}
    )
    with ThreadPoolExecutor() as pool, contextlib.closing(sqlite3.connect(env["AGENTLAB_DATABASE"])) as conn:
        first = pool.submit(run_play, [destroy], env, tmp_path)
        deadline = time.monotonic() + 30
        while "GET /cluster/nextid" not in server.pve.counted and time.monotonic() < deadline:
            time.sleep(0.02)
        held = conn.execute("SELECT process FROM claims").fetchall()
        assert len(held) == count
        stop_ansible(int(json.loads(held[0][0])["pid"]), signal.SIGTERM)
        assert first.result().rc != 0
        assert conn.execute("SELECT * FROM claims").fetchall() == []
        assert conn.execute("SELECT phase FROM operations").fetchall() == [("waiting",)] * count
    assert run_play([destroy], env, tmp_path).ok()["destroy"]["results"][0]["state"] == "DESTROYED"


@pytest.mark.everyday
def test_a_worker_that_is_told_to_stop_shows_no_trace(env: dict[str, str], tmp_path: Path, server: Any) -> None:
    server.pve.fault("POST", "/clone", "hang", seconds=20, carry_out=True)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            run_play,
            [task("create", SANDBOX, name="mine", keywords={"vars": {"agentlab_in_place": True}})],
            env,
            tmp_path,
        )
        os.kill(worker_of(env, server), signal.SIGTERM)
        ended = first.result()
    assert ended.rc != 0 and "Traceback" not in ended.output, ended.output


@pytest.mark.parametrize("way", [True, False])
def test_relative_paths_begin_in_the_folder_of_the_playbook(
    env: dict[str, str], tmp_path: Path, given: Any, way: bool
) -> None:
    given(1)
    (tmp_path / "beside.yaml").write_text(Path(env["AGENTLAB_CONFIG"]).read_text())
    show = task(
        "show", "agentlab_sandbox_info", config_file="beside.yaml", keywords={"vars": {"agentlab_in_place": way}}
    )
    assert run_play([show], env, tmp_path).ok()["show"]["count"] == 1


def test_ansible_may_be_started_where_its_user_may_not_go(env: dict[str, str], tmp_path: Path, given: Any) -> None:
    """As with sudo, out of a folder of one's own; root needs to lose what lets it in everywhere."""
    given(1)
    book = tmp_path / "book.yml"
    book.write_text(
        json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [task("show", "agentlab_sandbox_info")]}])
    )
    (tmp_path / "closed").mkdir()
    dropped = "setpriv --bounding-set=-dac_override,-dac_read_search" if os.geteuid() == 0 else ""
    playbook = Path(sys.executable).with_name("ansible-playbook")
    run = run_command(
        ["sh", "-c", f"cd {tmp_path}/closed && chmod 0 . && exec {dropped} {playbook} -vvv {book}"],
        {**env, "ANSIBLE_CONFIG": f"{REPO}/ansible.cfg"},
        tmp_path,
    ).ok()
    assert run["show"]["count"] == 1 and places(run.output) == ["in place"]


def test_another_collection_may_give_a_module_a_name_of_its_own(
    env: dict[str, str], tmp_path: Path, given: Any
) -> None:
    given(1)
    other = tmp_path / "collections/ansible_collections/some/one"
    (other / "meta").mkdir(parents=True)
    (other / "meta/runtime.yml").write_text(
        json.dumps({"plugin_routing": {"modules": {"leased": {"redirect": "agentlab.proxmox.agentlab_sandbox_info"}}}})
    )
    where = {**env, "ANSIBLE_COLLECTIONS_PATH": f"{tmp_path}/collections:{REPO}/.collections"}
    run = run_play(
        [{"name": "show", "some.one.leased": {}, "vars": {"agentlab_in_place": True}}], where, tmp_path, args=("-vvv",)
    ).ok()
    assert run["show"]["count"] == 1 and places(run.output) == ["in place"]


def test_the_variable_is_checked(env: dict[str, str], tmp_path: Path, given: Any) -> None:
    given(1)
    run = run_play(
        [
            task("wrong", "agentlab_sandbox_info", fails=True, keywords={"vars": {"agentlab_in_place": "perhaps"}}),
            task("unset", "agentlab_sandbox_info", keywords={"vars": {"agentlab_in_place": None}}),
        ],
        env,
        tmp_path,
        args=("-vvv",),
    ).ok()
    assert run["wrong"]["msg"].startswith("agentlab_in_place: The value 'perhaps' is not a valid boolean")
    assert run["unset"]["count"] == 1 and places(run.output) == ["in place"]
