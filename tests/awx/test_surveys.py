# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Surveys as people answer them: each template is launched through the double of AWX, and the variables that AWX would
hand over are run with ansible-runner through the playbook that the template names.

AGENTLAB_TEST_AWX_CORES names releases of ansible-core to run them on beside the one of the tests ("2.17 2.21").
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.awx import TOKEN, Awx
from support.awx_setup import PROJECT_URL, add_prerequisites
from support.awx_tables import Refused
from support.play import REPO, run_play
from support.runner import Runner

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJrm5Nm1Yk9w0yQHB1Yv2Y6XG0i8lI3eQ1m8m0o0k3aB"
CORES = ["", *os.environ.get("AGENTLAB_TEST_AWX_CORES", "").split()]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Awx]:
    """A double of AWX after the set-up."""
    awx = Awx()
    add_prerequisites(awx, 1)
    env = {"CONTROLLER_HOST": awx.url, "CONTROLLER_OAUTH_TOKEN": TOKEN}
    variables = {"awx_inventory": "proxmox", "awx_project_scm_url": PROJECT_URL}
    run_play("agentlab.proxmox.awx_setup", env, tmp_path_factory.mktemp("setup"), extra_vars=variables).ok()
    yield awx
    awx.stop()


@pytest.fixture(params=CORES, ids=lambda core: core or "own")
def runner(request: pytest.FixtureRequest, tmp_path: Path, server: Any) -> Runner:
    core = None
    if request.param:
        command = [str(REPO / "scripts" / "core-env.sh"), request.param]
        core = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    server.pve.agent_default = True
    (tmp_path / "job").mkdir()
    return Runner(tmp_path / "job", server, core)


@pytest.fixture
def launch(furnished: Awx, runner: Runner) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Launch a template with answers, and run what AWX hands over. Return status, result of the last module, output."""

    def run(
        template: str, answers: dict[str, Any], own: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any], str]:
        row = dict(furnished.find_named("job_templates", f"agentlab - {template}"))
        row["extra_vars"] = json.dumps({**json.loads(row["extra_vars"]), **(own or {})})
        job = furnished.launch(row, answers)["job"]
        text = furnished.variables[job]
        assert "!unsafe" in text
        status, results, output = runner.run(
            row["playbook"].removesuffix(".yml"), check=row["job_type"] == "check", text=text
        )
        # Before ansible-core 2.19 the connection of these tests (local) has no reset, and Ansible says so.
        said = output.replace("[WARNING]: Reset is not implemented for this connection", "")
        assert "[WARNING]" not in said and "[DEPRECATION" not in said and "Traceback" not in said, output
        return status, results[-1]["res"] if results else {}, output

    return run


def create(launch: Any, name: str) -> None:
    status, result, output = launch("create", {"sandbox_name": name, "sandbox_ttl": "1h"})
    assert status == 0 and result["sandbox"]["state"] == "RUNNING", output


def test_create_with_the_defaults_left_alone(launch: Any) -> None:
    status, result, output = launch("create", {"sandbox_name": "agent-1"})
    assert status == 0, output
    sandbox = result["sandbox"]
    assert sandbox["name"] == "agent-1" and sandbox["ip"] and sandbox["tags"] == [] and sandbox["lease_expires_at"]


def test_a_creation_takes_answers_with_blanks_lines_and_lists(launch: Any, server: Any) -> None:
    """F11, W4, W16: what people type and paste."""
    keys = f'{KEY} a@x\r\n# the next one is restricted\r\n\r\n  command="a,b" {KEY} b@x\r\n'
    status, result, output = launch("create", {
        "sandbox_name": " agent-2 ", "sandbox_ttl": "4 h", "sandbox_template": " 9000 ", "sandbox_cores": " 2 ",
        "sandbox_memory": "1024", "sandbox_tags": "ci, nightly, ,", "sandbox_ssh_public_keys": keys,
        "sandbox_wait_for_ip": "false", "sandbox_profile": " "})  # fmt: skip
    assert status == 0, output
    assert result["sandbox"]["name"] == "agent-2" and result["sandbox"]["tags"] == ["ci", "nightly"]
    vm = next(vm for vm in server.pve.vms if not vm.template)
    assert str(vm.config["cores"]) == "2" and str(vm.config["memory"]) == "1024"
    from urllib.parse import unquote

    assert unquote(vm.config["sshkeys"]).split("\n")[:2] == [f"{KEY} a@x", f'command="a,b" {KEY} b@x']


def test_a_creation_takes_a_network_and_cloud_init(launch: Any, server: Any, tmp_path: Path) -> None:
    """F20: the options that people miss are questions too, and blank answers leave the template as it is."""
    (tmp_path / "vendor.yaml").write_text("#cloud-config\n{}\n")
    server.pve.hold_snippets(str(tmp_path))
    status, result, output = launch("create", {
        "sandbox_name": "agent-3", "sandbox_vlan_tag": " 42 ", "sandbox_ip_config": "ip=dhcp ", "sandbox_second_bridge": "vmbr1",
        "sandbox_second_ip_config": "ip=198.51.100.10/24", "sandbox_cloud_init_user": "anna ",
        "sandbox_cloud_init_password": "made up 1", "sandbox_cloud_init_upgrade": "false",
        "sandbox_cloud_init_vendor_data": "local:snippets/vendor.yaml", "sandbox_wait_for_ip": "false"})  # fmt: skip
    assert status == 0, output
    config = server.pve.vm(result["sandbox"]["vmid"]).config
    assert "tag=42" in config["net0"] and "bridge=vmbr1" in config["net1"]
    assert (config["ciuser"], str(config["ciupgrade"]), config["ipconfig1"]) == ("anna", "0", "ip=198.51.100.10/24")
    assert "local:snippets/vendor.yaml" in config["cicustom"] and config["cipassword"] and "made up 1" not in output
    blank = {
        "sandbox_vlan_tag": " ",
        "sandbox_second_bridge": "",
        "sandbox_cloud_init_user": "  ",
        "sandbox_cloud_init_password": "",
    }
    status, result, output = launch("create", {"sandbox_name": "agent-4", "sandbox_wait_for_ip": "false", **blank})
    assert status == 0, output
    config = server.pve.vm(result["sandbox"]["vmid"]).config
    assert "tag=" not in config["net0"] and not {"net1", "cipassword", "ciupgrade", "cicustom"} & set(config)


def test_a_password_that_reads_as_a_number_is_never_another_password(launch: Any, server: Any) -> None:
    """ansible-core 2.19 and newer makes numbers and booleans of AWX's texts; releases before take them as they are."""
    for name, password in (("agent-5", "012345"), ("agent-6", "no"), ("agent-7", "0")):
        answers = {"sandbox_name": name, "sandbox_wait_for_ip": "false", "sandbox_cloud_init_password": password}
        status, _result, output = launch("create", answers)
        if status == 0:
            # By its name: Ansible hides the password 0 wherever that digit stands in the answer.
            vm = next(vm for vm in server.pve.vms if vm.name == name)
            assert vm.config["cipassword"] == password
        else:
            assert "cloud_init_password" in output and "begin it with a letter" in output and "5349" not in output, (
                output
            )


@pytest.mark.parametrize("answers, sentence", [
    ({}, "'sandbox_name' value missing"), ({"sandbox_name": ""}, "too small"),
    ({"sandbox_name": "x", "sandbox_cores": 2}, "Value 2 for 'sandbox_cores' expected to be a string."),
    ({"sandbox_name": "x", "sandbox_wait_for_ip": "maybe"}, "expected to be one of")])  # fmt: skip
def test_what_awx_refuses_starts_no_job(furnished: Awx, answers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        furnished.launch(furnished.find_named("job_templates", "agentlab - create"), answers)
    assert sentence in str(refused.value.answer)


def test_no_question_with_a_default_is_required(furnished: Awx) -> None:
    """W17: AWX does not fill in the default of a required question in a launch by the API."""
    questions = [question for survey in furnished.surveys.values() for question in survey["spec"]]
    assert len(questions) > 20
    assert [question["variable"] for question in questions if question["required"] and question["default"]] == []
    for row in furnished.objects["job_templates"]:
        spec = furnished.surveys.get(row["id"], {}).get("spec", [])
        needed = {question["variable"]: "1000" for question in spec if question["required"]}
        variables = json.loads(furnished.find_row("jobs", furnished.launch(row, needed)["job"])["extra_vars"])
        # A password has no default, and a choice none that is empty: AWX leaves these out, and so do the playbooks.
        unanswered = {"sandbox_cloud_init_password", "sandbox_cloud_init_upgrade"}
        assert {question["variable"] for question in spec} - unanswered <= set(variables), "AWX fills in the rest"


def test_renew_and_destroy(launch: Any) -> None:
    create(launch, "agent-1")
    create(launch, "agent-2")
    status, result, output = launch("renew", {"sandbox_vmids": " 1000 , 1001, "})
    assert status == 0 and [row["granted_seconds"] for row in result["results"]] == [4 * 3600] * 2, output
    status, result, output = launch("renew", {"sandbox_vmids": "1000", "sandbox_ttl": " 6 h "})
    assert status == 0 and result["results"][0]["granted_seconds"] == 6 * 3600, output
    status, result, output = launch("renew", {"sandbox_vmids": "1000", "sandbox_ttl": ""})
    assert status != 0 and "ttl" in output
    # The default of "Also if it runs" is no.
    status, result, output = launch("destroy", {"sandbox_vmids": "1000,"})
    assert status != 0 and "cannot destroy sandbox in RUNNING state" in output
    status, result, output = launch("destroy", {"sandbox_vmids": "1000 1001", "sandbox_force": "true"})
    assert status == 0 and [row["outcome"] for row in result["results"]] == ["destroyed", "destroyed"], output
    status, result, output = launch("destroy", {"sandbox_vmids": "many"})
    assert status != 0 and "many" in output
    status, result, output = launch("create", {"sandbox_name": "agent-3", "sandbox_memory": "4 GB"})
    assert status != 0 and "memory: '4 GB' is not valid. Valid: a whole number from 16 to" in output, output


def test_prune_reconcile_and_doctor_take_blank_answers(launch: Any) -> None:
    for template in ("prune check", "prune"):
        for answers in (
            {},
            {"prune_older_than": "", "prune_max_count": ""},
            {"prune_older_than": " 1 h", "prune_max_count": " 5 "},
        ):
            status, result, output = launch(template, answers)
            assert status == 0 and result["count"] == 0, output
    status, _result, output = launch("prune", {"prune_max_count": "many"})
    assert status != 0 and "max_count: 'many' is not valid. Valid: a whole number" in output, output
    assert launch("reconcile", {})[0] == 0
    status, result, output = launch("doctor", {"sandbox_template": " 9000 "})
    assert status == 0 and result["findings"], output


def test_a_job_takes_a_path_relative_to_the_project(launch: Any, runner: Runner) -> None:
    """A path is relative to the project, where AWX starts the job."""
    (runner.folder / "project" / "jobs").mkdir()
    tasks = f"- name: Work\n  ansible.builtin.copy: {{content: done, dest: {runner.folder}/made, mode: '0600'}}\n"
    (runner.folder / "project" / "jobs" / "work.yml").write_text(tasks)
    own, here = {"job_python": f"{runner.bin}/python"}, {"job_connection": " local "}
    status, _result, output = launch("job", {"job_tasks": "jobs/work.yml", **here}, own)
    assert status == 0 and (runner.folder / "made").read_text() == "done", output
    names = ("job_name", "job_profile", "job_workspace", "job_workspace_size", "job_user", "job_ttl")
    blank = {**dict.fromkeys((*names, "job_fetch", "job_results"), " "), **here}
    (runner.folder / "made").unlink()
    status, _result, output = launch("job", {"job_tasks": " jobs/work.yml ", "job_template": " 9000 ", **blank}, own)
    assert status == 0 and (runner.folder / "made").read_text() == "done", output
    status, _result, output = launch("job", {"job_tasks": "jobs/nosuch.yml", "job_keep": "true"}, own)
    assert status != 0 and "nosuch.yml" in output


def test_the_tasks_of_a_job_use_roles_of_the_project(launch: Any, runner: Runner) -> None:
    """The playbook that they run in stands in the collection, so Ansible does not look beside it."""
    role = runner.folder / "project" / "roles" / "greet" / "tasks"
    role.mkdir(parents=True)
    (role / "main.yml").write_text("- name: Greet\n  ansible.builtin.debug: {msg: greeted}\n")
    (runner.folder / "project" / "work.yml").write_text("- ansible.builtin.include_role: {name: greet}\n")
    answers = {"job_tasks": "work.yml", "job_connection": "local"}
    status, _result, output = launch("job", answers, {"job_python": f"{runner.bin}/python"})
    assert status == 0 and "greeted" in output, output


def test_a_job_through_the_guest_agent(launch: Any, runner: Runner, server: Any, tmp_path: Path) -> None:
    """The answers that are left alone suit this connection too: its tasks are root's, not debian's."""
    guest = server.pve.machine(1000).folder
    tasks = f"- name: Work\n  ansible.builtin.raw: id -un > {guest}/made; echo log > {guest}/log\n"
    (runner.folder / "project" / "work.yml").write_text(tasks)
    own = {"job_python": "/usr/bin/python3", "ansible_remote_tmp": f"{guest}/ansible"}
    answers = {
        "job_tasks": "work.yml",
        "job_connection": "agentlab.proxmox.sandbox",
        "job_name": "job-1",
        "job_fetch": f"{guest}/made\r\n{guest}/log\r\n",
    }
    status, _result, output = launch("job", {**answers, "job_results": f"{tmp_path}/kept"}, own)
    assert status == 0 and "deletes" not in output, output
    # For somebody who cancels the job in AWX: its sandbox stays, and agentlab - destroy asks for a VMID.
    before = output.partition("PLAY [Work]")[0]
    assert "sandbox job-1 has VMID 1000 and a lease until 20" in before, output
    assert (tmp_path / "kept" / "job-1" / "made").exists() and (tmp_path / "kept" / "job-1" / "log").exists()
    # A folder of the project goes with the job, and somebody should know before the files are missed.
    status, _result, output = launch("job", answers, own)
    assert status == 0 and "AWX deletes that folder with the job: name another one in job_results" in output, output


@pytest.mark.parametrize("playbook", [
    "sandbox_create", "sandbox_destroy", "lease_renew", "prune", "reconcile", "doctor", "job"])  # fmt: skip
def test_a_job_without_a_host_fails(runner: Runner, playbook: str) -> None:
    """W12: AWX calls a job successful in which no host matched."""
    for hosts in ("nosuch", "empty"):
        status, results, output = runner.run(playbook, agentlab_hosts=hosts, sandbox_name="x", job_tasks="x")
        assert status != 0 and results == [] and f"no host of the inventory matches {hosts}" in output, output


@pytest.mark.parametrize("playbook", ["sandbox_create", "sandbox_destroy", "lease_renew", "job"])
def test_three_nodes_of_a_cluster_are_not_three_sandboxes(runner: Runner, server: Any, playbook: str) -> None:
    """F2, W3"""
    hosts = runner.folder / "inventory" / "hosts"
    line = hosts.read_text().splitlines()[1]
    hosts.write_text("[pve]\n" + "".join(f"{name}{line.removeprefix('node')}\n" for name in ("pve1", "pve2", "pve3")))
    status, results, output = runner.run(
        playbook, sandbox_name="agent-2", sandbox_vmids="1000", sandbox_ttl="1h", job_tasks="x"
    )
    assert status != 0 and results == [] and "3 hosts" in output and "agentlab_allow_many_hosts" in output, output
    assert [vm for vm in server.pve.vms if not vm.template] == []


def test_many_hosts_when_they_are_meant(runner: Runner, server: Any) -> None:
    """Two hosts that keep records of their own: each playbook acts once on each of them."""
    lines = []
    for name in ("pve1", "pve2"):
        python = runner.folder / f"python-of-{name}"
        database = runner.folder / f"{name}.db"
        python.write_text(f'#!/bin/sh\nAGENTLAB_DATABASE={database} exec {runner.bin}/python "$@"\n')
        python.chmod(0o755)
        lines.append(f"{name} ansible_connection=local agentlab_in_place=false ansible_python_interpreter={python}\n")
    (runner.folder / "inventory" / "hosts").write_text("[pve]\n" + "".join(lines))
    many: dict[str, Any] = {"agentlab_allow_many_hosts": "true"}
    answers = {"sandbox_name": "agent-1", "sandbox_wait_for_ip": "false", "sandbox_ttl": "1h"}
    status, results, output = runner.run("sandbox_create", **answers, **many)
    assert status == 0 and len(results) == 2, output
    assert [vm.name for vm in server.pve.vms if not vm.template] == ["agent-1", "agent-1"]
    # prune and reconcile act on each host by design.
    story: list[tuple[str, dict[str, Any]]] = [
        ("lease_renew", {"sandbox_name": "agent-1", "sandbox_ttl": "8h", **many}),
        ("reconcile", {}),
        ("sandbox_destroy", {"sandbox_name": "agent-1", "sandbox_force": "true", **many}),
    ]
    for playbook, variables in story:
        status, results, output = runner.run(playbook, **variables)
        assert status == 0 and len(results) == 2, output
    assert [vm for vm in server.pve.vms if not vm.template] == []


def test_a_job_on_many_hosts_when_they_are_meant(runner: Runner, server: Any) -> None:
    hosts = runner.folder / "inventory" / "hosts"
    line = hosts.read_text().splitlines()[1]
    hosts.write_text("[pve]\n" + "".join(f"{name}{line.removeprefix('node')}\n" for name in ("pve1", "pve2")))
    tasks = runner.folder / "tasks.yml"
    tasks.write_text("- name: Work\n  ansible.builtin.command: {cmd: 'true'}\n")
    inside = {"job_connection": "local", "job_python": sys.executable}
    status, results, output = runner.run("job", job_tasks=str(tasks), agentlab_allow_many_hosts="true", **inside)
    names = {result["res"]["sandbox"]["name"] for result in results if result["res"].get("sandbox")}
    assert status == 0 and len(names) == 2, output
    assert [vm for vm in server.pve.vms if not vm.template] == []
