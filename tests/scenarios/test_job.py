# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life of a job in one playbook, with this machine standing in for the guest: what is refused before anything is
made, and that results, workspace and sandbox end where they should, however the job ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.job_tasks import UNUSABLE
from support.play import REPO, Run, run_play

JOB = """\
---
- name: Work
  ansible.builtin.copy:
    content: "worked in {{ job_host }}"
    dest: "{{ job_file }}"
    mode: "0600"

- name: Break
  ansible.builtin.command: /bin/false
  when: job_breaks | default(false) | bool
  changed_when: false
"""


@dataclass
class Job:
    """A run of the playbook, and what is left of its sandbox and its workspace."""

    run: Run
    folder: Path
    pve: Any
    database: str

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        if not Path(self.database).exists():
            return []
        with sqlite3.connect(self.database) as conn:
            return conn.execute(query).fetchall()

    @property
    def vms(self) -> list[int]:
        return [vm.vmid for vm in self.pve.vms if not vm.template]

    @property
    def states(self) -> list[str]:
        return [state for (state,) in self.rows("SELECT state FROM sandboxes ORDER BY created_at")]

    @property
    def workspace(self) -> str:
        return str(self.rows("SELECT state FROM workspaces")[0][0])

    @property
    def events(self) -> list[tuple[Any, ...]]:
        return self.rows("SELECT operation, to_state, outcome FROM events ORDER BY id")

    def result(self, name: str) -> Path:
        return self.folder / "results" / "job-1" / name

    @property
    def said(self) -> str:
        """The sentence that the playbook ends with."""
        ends = [
            entry
            for entry in self.run.results
            if entry["task"]
            in ("Fail if the job failed", "Fail if the sandbox could not be cleared up", "Say where the results are")
            and entry["status"] != "skipped"
        ]
        assert ends, self.run.output
        return str(ends[-1]["result"]["msg"])

    def cleared_up(self) -> bool:
        return (
            self.vms == []
            and self.states in ([], ["DESTROYED"])
            and (not self.rows("SELECT 1 FROM workspaces") or self.workspace == "DETACHED")
        )


@pytest.fixture
def job(env: Any, server: Any, tmp_path: Path) -> Callable[..., Job]:
    """job(tasks, variables...): run the playbook with those tasks in a file, a workspace and a result to collect."""
    server.pve.agent_default = True
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "jobs.yaml").write_text(
        "workspace: required\nlease: {default: 1h, maximum: 2h}\ntags: [job]\n", encoding="utf-8"
    )
    with open(env["AGENTLAB_CONFIG"], "a", encoding="utf-8") as config:
        config.write(f"profiles_dir: {tmp_path}/profiles\n")

    def run(tasks: str | None = JOB, more_args: tuple[str, ...] = (), check: bool = False, **variables: Any) -> Job:
        if tasks is not None:
            (tmp_path / "job-tasks.yml").write_text(tasks, encoding="utf-8")
        given = {
            "agentlab_hosts": "localhost",
            "job_name": "job-1",
            "job_tasks": f"{tmp_path}/job-tasks.yml",
            "job_profile": "jobs",
            "job_workspace": "data",
            "job_workspace_size": "2G",
            "job_workspace_storage": "local-lvm",
            "job_connection": "local",
            "job_python": "{{ ansible_playbook_python }}",
            "job_fetch": [f"{tmp_path}/made-inside"],
            "job_results": f"{tmp_path}/results",
            "job_file": f"{tmp_path}/made-inside",
            **variables,
        }
        done = run_play(
            "playbooks/job.yml",
            env,
            tmp_path,
            check=check,
            args=more_args,
            extra_vars={name: value for name, value in given.items() if value is not None},
        )
        return Job(done, tmp_path, server.pve, env["AGENTLAB_DATABASE"])

    return run


@pytest.mark.parametrize("how", ["completed", "failed", "not created"])
def test_a_job_is_cleared_up_however_it_ends(job: Callable[..., Job], server: Any, how: str) -> None:
    if how == "not created":
        server.pve.task_endings["qmstart"] = "start failed: QEMU exited with code 1"
    ended = job(job_breaks=how == "failed")
    assert ended.cleared_up(), ended.run.output
    tags, profile = ended.rows("SELECT tags, profile FROM sandboxes")[0]
    assert (json.loads(tags), profile) == (["job"], "jobs")
    volume, owner = ended.rows("SELECT volume, owner_vmid FROM workspaces")[0]
    assert server.pve.volumes_of(owner) == [volume]
    if how == "completed":
        # Older releases of Ansible warn that this machine as the guest has no connection to reset.
        assert ended.run.rc == 0 and not [w for w in ended.run.warnings if "Reset is not" not in w], ended.run.output
        assert ended.result("made-inside").read_text() == "worked in job-1"
        assert ("complete", "COMPLETED", "done") in ended.events
        assert (
            f"Collected 1 file(s) in {ended.folder}/results/job-1" in ended.said
            and "Workspace data is free" in ended.said
        )
    elif how == "failed":
        # What a failed job wrote is a result too: it says why.
        assert ended.run.rc != 0 and ended.result("made-inside").exists()
        assert ("fail", "FAILED", "done") in ended.events and ended.said.startswith(
            "the job in sandbox job-1 failed: Break:"
        )
        assert "Collected 1 file(s)" in ended.said
    else:
        assert ended.run.rc != 0 and not ended.result("made-inside").exists()
        assert ended.said.startswith(
            "the job in sandbox job-1 failed: Create the sandbox: sandbox 1000 could not be created"
        )
        assert "start failed" in ended.said and "Workspace data is free" in ended.said
    assert ("complete", "COMPLETED", "done") not in ended.events or how == "completed"


AGENT_JOB = """\
---
- name: Work
  ansible.builtin.shell: printf 'worked in {{ job_host }}' > {{ job_file }}
  changed_when: true
"""


def test_a_job_through_the_guest_agent_needs_no_address(job: Callable[..., Job], server: Any, tmp_path: Path) -> None:
    guest = server.pve.machine(1000)
    # The profile says how: job_connection is not given.
    with open(tmp_path / "profiles/jobs.yaml", "a", encoding="utf-8") as profile:
        profile.write("connection: agentlab.proxmox.sandbox\n")
    ended = job(
        AGENT_JOB,
        job_connection=None,
        job_python="/usr/bin/python3",
        job_file=f"{guest.folder}/made-inside",
        job_fetch=[f"{guest.folder}/made-inside"],
    )
    assert ended.run.rc == 0 and not ended.run.warnings, ended.run.output
    assert ended.cleared_up() and ended.result("made-inside").read_text() == "worked in job-1"
    assert guest.started
    # Nobody asked the guest for an address.
    assert not any("network-get-interfaces" in request for request in server.pve.counted), server.pve.counted


@pytest.mark.parametrize("what", ["no module", "a tab", "a missing file"])
def test_tasks_that_cannot_be_run_are_refused_before_anything_is_made(job: Callable[..., Job], what: str) -> None:
    tasks, words = UNUSABLE[what]
    # The files beside it are others here.
    words = words.partition(" In ")[0]
    ended = job(tasks)
    said = ended.run["Check that the tasks can be run"]["msg"]
    assert ended.run.rc == 2 and said.startswith(f"job_tasks: {ended.folder}/job-tasks.yml ") and words in said, said
    assert ended.pve.counted["POST"] == 0 and ended.states == [] and ended.rows("SELECT 1 FROM workspaces") == []


REFUSED = {
    "no tasks": ({"job_tasks": None}, "job_tasks: missing"),
    "fetch a mapping": ({"job_fetch": {"a": 1}}, "job_fetch: {'a': 1} is neither a path nor a list of paths"),
    "fetch a number": ({"job_fetch": 5}, "job_fetch: 5 is neither"),
    "fetch numbers": ({"job_fetch": ["/tmp/a", 5]}, "holds something that is not a path"),
    "fetch up": ({"job_fetch": "/tmp/../.."}, "holds a path with '..'"),
    "a lease": ({"job_ttl": "soon"}, "job_ttl: 'soon' is not a duration. Valid: minutes as a number (120) or"),
    "no lease": ({"job_ttl": 0}, "job_ttl: '0' is zero"),
    "a size": (
        {"job_workspace": "project-x", "job_workspace_size": "much"},
        "job_workspace_size: 'much' is not valid. Valid: a number with M, G or T, such as 20G. Nothing was made",
    ),
    "cloud-init": ({"job_wait_for_cloud_init": "perhaps"}, "job_wait_for_cloud_init: perhaps is not valid"),
    "a time": ({"job_connect_timeout": "soon"}, "job_connect_timeout: soon is not a number of seconds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_variables_are_checked_before_anything_is_made(job: Callable[..., Job], what: str) -> None:
    variables, words = REFUSED[what]
    ended = job(**variables)
    assert ended.run.rc == 2 and words in json.dumps([entry["result"] for entry in ended.run.failed]), ended.run.output
    assert ended.pve.counted["POST"] == 0 and not Path(ended.database).exists()


NAMED = {
    "node": ({"job_node": "nowhere"}, "job_node: "),
    "storage of the workspace": (
        {"job_workspace": "project-x", "job_workspace_size": "2G", "job_workspace_storage": "nowhere"},
        "job_workspace_storage: 'nowhere' is not a storage of node",
    ),
}


@pytest.mark.parametrize("what", NAMED)
def test_an_error_of_the_creation_names_the_variable_of_the_job(job: Callable[..., Job], what: str) -> None:
    variables, words = NAMED[what]
    ended = job(**variables)
    assert ended.run.rc == 2 and ended.states == [], ended.run.output
    assert f": {words}" in ended.said, ended.said


@pytest.mark.parametrize("form", ["text", "lines", "json text", "folder", "pasted", "commas"])
def test_what_is_collected_may_be_named_in_each_way(job: Callable[..., Job], tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    tasks = f"""\
- name: Work
  ansible.builtin.shell: mkdir -p {out}/deep/.hidden && echo one > {out}/a.txt && echo two > {out}/deep/.hidden/b.txt
  changed_when: true
"""
    a, b = f"{out}/a.txt", f"{out}/deep/.hidden/b.txt"
    commas = f"{a}, '{b}',"
    fetch = {
        "text": a,
        "commas": commas,
        "lines": f"{a}\r\n\n  {b}\n",
        "json text": json.dumps([a, b]),
        "folder": f"{out}/",
    }.get(form, f"# the report\r\n- {a}\r\n- '{b}'\r\n")
    ended = job(tasks, job_fetch=fetch)
    assert ended.run.rc == 0 and ended.cleared_up(), ended.run.output
    names = {
        "text": ["a.txt"],
        "lines": ["a.txt", "b.txt"],
        "json text": ["a.txt", "b.txt"],
        "folder": ["out/a.txt", "out/deep/.hidden/b.txt"],
        "pasted": ["a.txt", "b.txt"],
        "commas": ["a.txt", "b.txt"],
    }[form]
    files = sorted(str(path.relative_to(ended.result(""))) for path in ended.result("").rglob("*") if path.is_file())
    assert files == names and f"Collected {len(names)} file(s)" in ended.said
    assert "Not there" not in ended.said


def test_blanks_around_an_answer_do_not_count(job: Callable[..., Job]) -> None:
    blanks = {
        "job_name": " job-1 ",
        "job_workspace": "data ",
        "job_profile": "\tjobs",
        "job_template": " ",
        "job_ttl": " ",
    }
    more = {
        "job_user": " ",
        "job_keep": " no ",
        "job_connect_timeout": " 60",
        "job_connection": "local ",
        "job_node": " ",
    }
    ended = job(**blanks, **more)
    assert ended.run.rc == 0 and ended.cleared_up() and ended.result("made-inside").exists(), ended.run.output
    assert "Workspace data is free" in ended.said and ended.rows("SELECT name FROM sandboxes") == [("job-1",)]


def test_a_file_that_is_not_there_is_told_and_two_of_one_name_are_both_kept(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    tasks = f"""\
- name: Work
  ansible.builtin.shell: mkdir -p {tmp_path}/x {tmp_path}/y && echo 1 > {tmp_path}/x/log && echo 2 > {tmp_path}/y/log
  changed_when: true
"""
    ended = job(tasks, job_fetch=[f"{tmp_path}/x/log", f"{tmp_path}/missing", f"{tmp_path}/y/log"])
    assert ended.run.rc == 0 and ended.cleared_up(), ended.run.output
    assert (
        ended.result(f".{tmp_path}/x/log").read_text() == "1\n"
        and ended.result(f".{tmp_path}/y/log").read_text() == "2\n"
    )
    assert f"Not there: {tmp_path}/missing." in ended.said and ("complete", "COMPLETED", "done") in ended.events


def test_a_sandbox_whose_results_cannot_be_collected_stays_and_its_workspace_is_free(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "results").write_text("a file where the folder should be", encoding="utf-8")
    ended = job()
    assert ended.run.rc == 2 and ended.states == ["STOPPED"] and len(ended.vms) == 1, ended.run.output
    assert ended.workspace == "DETACHED"
    assert (
        "Collect the files: " in ended.said
        and "Results that were not collected are in sandbox job-1 (VMID 1000)" in ended.said
    )
    assert "its lease ends at 20" in ended.said and "Workspace data is free" in ended.said


@pytest.mark.parametrize("how", ["not made", "half attached"])
def test_the_answer_says_of_the_workspace_what_is_so(job: Callable[..., Job], server: Any, how: str) -> None:
    if how == "not made":
        body = '{"data": null, "message": "out of space"}'
        server.pve.fault("POST", "/content", "answer", status=500, body=body, times=9)
        ended = job()
        assert "out of space" in ended.said and "is free" not in ended.said, ended.said
        return
    # The clone ends badly and leaves a VM that nobody can prove to be ours: the record stays.
    server.pve.task_endings["qmclone"] = "clone failed: it broke off"
    ended = job()
    assert ended.run.rc == 2 and ended.states == ["FAILED"] and len(ended.vms) == 1, ended.run.output
    free = ended.workspace == "DETACHED"
    assert ("Workspace data is free" in ended.said) is free, (ended.workspace, ended.said)
    assert free or "It still has its workspace; free that with agentlab_workspace" in ended.said, ended.said


def test_a_guest_that_cannot_be_reached_any_more_is_cleared_up(job: Callable[..., Job]) -> None:
    tasks = """\
- name: Lose the guest
  ansible.builtin.ping:
  vars: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1, ansible_ssh_retries: 0}

- name: Not reached
  ansible.builtin.ping:
"""
    ended = job(tasks, job_fetch=None)
    assert ended.run.rc != 0 and ended.cleared_up(), ended.run.output
    assert "could not be reached any more" in ended.said and "Workspace data is free" in ended.said
    assert ("fail", "FAILED", "done") in ended.events and ("complete", "COMPLETED", "done") not in ended.events
    # With results to collect nothing is destroyed before they are.
    ended = job(tasks)
    assert len(ended.vms) == 1 and ended.workspace == "DETACHED", ended.run.output
    assert "Results that were not collected are in sandbox job-1" in ended.said


# What reaches beyond the sandbox's own host: the task after "Work" in a file that the check cannot look into.
BEYOND = {
    "an end of the play": "- ansible.builtin.meta: end_play\n",
    "an end of the batch": "- ansible.builtin.meta: end_batch\n",
    "an end of the host": "- ansible.builtin.meta: end_host\n",
    "a failure for all": "- ansible.builtin.command: /bin/false\n  any_errors_fatal: true\n",
    "a failure that runs once": "- ansible.builtin.command: /bin/false\n  run_once: true\n",
}


@pytest.mark.parametrize("what", BEYOND)
def test_a_task_that_ends_the_play_does_not_keep_the_sandbox(
    job: Callable[..., Job], tmp_path: Path, what: str
) -> None:
    (tmp_path / "more.yml").write_text(BEYOND[what], encoding="utf-8")
    tasks = JOB + '- ansible.builtin.include_tasks: "{{ job_more }}.yml"\n'
    ended = job(tasks, job_more=f"{tmp_path}/more")
    assert ended.run.rc == 2 and ended.cleared_up() and ended.result("made-inside").exists(), ended.run.output
    assert ended.said.startswith("the job in sandbox job-1 failed: ") and "Collected 1 file(s)" in ended.said
    ending = "an end" in what
    assert ("or a task ended the play before the last one" in ended.said) is ending, ended.said


@pytest.mark.parametrize("signal_name", ["INT", "TERM"])
def test_what_a_job_that_is_interrupted_leaves_is_named_and_goes_with_its_lease(
    job: Callable[..., Job], env: Any, tmp_path: Path, signal_name: str
) -> None:
    # The worker that runs a lookup is a child of ansible-playbook.
    parent = "sed -n s/^PPid:[[:space:]]*//p /proc/$PPID/status"
    tasks = (
        JOB
        + f"""\
- name: Interrupt
  ansible.builtin.shell: kill -{signal_name} {{{{ lookup('ansible.builtin.pipe', {parent!r}) }}}}; sleep 20
"""
    )
    ended = job(tasks)
    assert ended.run.rc != 0 and ended.states == ["RUNNING"] and ended.workspace == "ATTACHED", ended.run.output
    # The next job on that workspace makes nothing, takes nothing, and says who has it, until when, and the way out.
    ended = job(job_name="job-2")
    assert ended.run.rc == 2 and ended.states[0] == "RUNNING" and ended.workspace == "ATTACHED", ended.run.output
    assert "ATTACHED to sandbox 1000 (job-1)" in ended.said and "detach it first" in ended.said, ended.said
    assert "is free" not in ended.said and ended.vms == [1000]
    with sqlite3.connect(env["AGENTLAB_DATABASE"]) as conn:
        conn.execute("UPDATE sandboxes SET lease_expires_at = 1")
    conn.close()
    # Without a daemon, reconcile ends the lease.
    for playbook in ("reconcile", "prune"):
        run_play(f"playbooks/{playbook}.yml", env, tmp_path, extra_vars={"agentlab_hosts": "localhost"}).ok()
    assert ended.cleared_up(), ended.states


def interrupt(signal_name: str) -> None:
    """Interrupt the playbook that this process runs: Control-C reaches all of its processes, TERM only the first."""

    def command(process: psutil.Process) -> str:
        with contextlib.suppress(psutil.Error):
            return " ".join(process.cmdline())
        return ""

    (playbook,) = (child for child in psutil.Process().children() if "ansible-playbook" in command(child))
    processes = [playbook, *playbook.children(recursive=True)] if signal_name == "INT" else [playbook]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(getattr(signal, f"SIG{signal_name}"))


@pytest.mark.parametrize(("request_", "signal_name"), [("the clone", "TERM"), ("the start", "INT")])
def test_a_job_that_is_interrupted_while_it_creates_leaves_nothing_that_reconcile_does_not_end(
    job: Callable[..., Job], env: Any, tmp_path: Path, server: Any, request_: str, signal_name: str
) -> None:
    ending = "/clone" if request_ == "the clone" else "/status/start"

    def strike(method: str, path: str) -> None:
        if method == "POST" and path.endswith(ending):
            server.pve.after = None
            interrupt(signal_name)

    server.pve.after = strike
    ended = job()
    assert ended.run.rc != 0 and "Traceback" not in ended.run.output, ended.run.output
    assert server.pve.after is None and len(ended.vms) == 1, ended.run.output
    assert ended.states[0] not in ("FAILED", "DESTROYED"), ended.states
    with sqlite3.connect(env["AGENTLAB_DATABASE"]) as conn:
        conn.execute("UPDATE sandboxes SET lease_expires_at = 1")
    conn.close()
    run_play("playbooks/reconcile.yml", env, tmp_path, extra_vars={"agentlab_hosts": "localhost"}).ok()
    assert ended.states == ["FAILED"]
    states = {"agentlab_hosts": "localhost", "prune_states": "TIMEOUT,FAILED"}
    run_play("playbooks/prune.yml", env, tmp_path, extra_vars=states).ok()
    assert ended.cleared_up(), (ended.states, ended.vms, ended.workspace)


@pytest.mark.parametrize("signal_name", ["INT", "TERM"])
def test_a_job_that_is_interrupted_while_it_collects_keeps_the_files_in_its_sandbox(
    job: Callable[..., Job], server: Any, tmp_path: Path, signal_name: str
) -> None:
    guest = server.pve.machine(1000)

    def strike(_method: str, path: str) -> None:
        if path.endswith("/agent/exec") and guest.started[-1][1].endswith("\nget"):
            server.pve.after = None
            interrupt(signal_name)
            time.sleep(1)

    server.pve.after = strike
    made = f"{guest.folder}/made-inside"
    ended = job(
        AGENT_JOB,
        job_connection="agentlab.proxmox.sandbox",
        job_python="/usr/bin/python3",
        job_file=made,
        job_fetch=[made],
    )
    assert ended.run.rc != 0 and "Traceback" not in ended.run.output, ended.run.output
    assert server.pve.after is None and ended.states == ["RUNNING"] and Path(made).exists()
    results = tmp_path / "results"
    assert [path for path in results.rglob("*") if path.name.startswith(".agentlab-")] == []
    # The sandbox is there for whoever wants the files, and goes with its lease, as any other.
    assert ended.workspace == "ATTACHED"


def test_a_job_that_deals_with_its_failure_is_completed(job: Callable[..., Job]) -> None:
    tasks = (
        JOB
        + """\
- block:
    - ansible.builtin.command: /bin/false
      run_once: true
  rescue:
    - ansible.builtin.ping:
"""
    )
    ended = job(tasks)
    assert ended.run.rc == 0 and ended.cleared_up() and ended.result("made-inside").exists(), ended.run.output
    assert ended.said.startswith("the job in sandbox job-1 is completed. Collected 1 file(s)"), ended.said


def test_a_name_that_is_used_is_refused_and_the_other_sandbox_left_alone(
    job: Callable[..., Job], given: Callable[..., Any]
) -> None:
    given(1, name="job-1")
    ended = job()
    assert ended.run.rc == 2 and ended.run["Check that the name is free"]["msg"].startswith(
        "job_name: job-1 is the name of sandbox 1000 (RUNNING)"
    )
    assert ended.states == ["RUNNING"] and len(ended.vms) == 1


def test_a_task_without_a_name_or_with_secrets_is_told_without_them(job: Callable[..., Job]) -> None:
    ended = job("- ansible.builtin.fail: {msg: the cause}\n")
    assert (
        ended.said.startswith("the job in sandbox job-1 failed: ") and "the cause" in ended.said and ended.cleared_up()
    )
    ended = job("- name: Secret\n  ansible.builtin.fail: {msg: hunter2}\n  no_log: true\n", job_name="job-2")
    assert "Secret: failed; its output is hidden (no_log)" in ended.said and "hunter2" not in ended.said


def test_a_relative_path_starts_where_ansible_was_started(job: Callable[..., Job]) -> None:
    ended = job(job_tasks="tests/no-such-job.yml")
    there = f"In {REPO}/tests there are: config.yml"
    assert (
        ended.run["Check that the tasks can be run"]["msg"]
        == f"job_tasks: {REPO}/tests/no-such-job.yml does not exist. {there}. Nothing was made"
    )


def test_one_host_is_meant_unless_told_otherwise(job: Callable[..., Job], tmp_path: Path) -> None:
    three = tmp_path / "three.ini"
    three.write_text(
        "".join(
            f"pve{n} ansible_connection=local ansible_python_interpreter='{{{{ ansible_playbook_python }}}}'\n"
            for n in (1, 2, 3)
        )
        + "[pve]\npve1\npve2\npve3\n",
        encoding="utf-8",
    )
    ended = job(agentlab_hosts="pve", more_args=("-i", str(three)))
    assert ended.run.rc == 2 and ended.pve.counted["POST"] == 0
    assert "agentlab_hosts: the play would run on 3 hosts (pve1, pve2, pve3)" in ended.run.failed[0]["result"]["msg"]
    assert "agentlab_allow_many_hosts" in ended.run.failed[0]["result"]["msg"]
    # A limit that leaves the sandbox out is no reason not to work in it.
    ended = job(agentlab_hosts="pve", more_args=("-i", str(three), "--limit", "pve2"))
    assert ended.run.rc == 0 and ended.cleared_up() and ended.result("made-inside").exists(), ended.run.output


def test_check_mode_says_what_would_be_made_and_ends(job: Callable[..., Job]) -> None:
    ended = job(check=True, job_workspace=None, job_profile=None)
    assert ended.run.rc == 0 and ended.run.status("Create the sandbox") == "changed" and ended.vms == [], (
        ended.run.output
    )


def test_a_failed_job_is_kept_on_request(job: Callable[..., Job]) -> None:
    ended = job(job_breaks=True, job_keep="yes")
    assert ended.run.rc == 2 and ended.states == ["FAILED"] and ended.workspace == "ATTACHED", ended.run.output
    assert "is still there: it is FAILED" in ended.said and "state: detached" in ended.said
