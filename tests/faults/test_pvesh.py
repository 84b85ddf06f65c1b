# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The local backend: the whole life of a sandbox through a program named pvesh that prints as the real one does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    InvalidInput,
    OutcomeUnknown,
    Unreachable,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest.agent import GuestRefused
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import client as client_module
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.views import info
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

from support.double import TOKEN_ID, TOKEN_SECRET
from support.lab import Lab

pytestmark = pytest.mark.faults
CORE = "ansible_collections.agentlab.proxmox.plugins.module_utils._core"
# A process of its own that asks pvesh.
CLIENT = (
    f"from {CORE}.clock import SystemClock; from {CORE}.config import ProxmoxSettings; "
    f"from {CORE}.proxmox.client import ProxmoxClient; client = ProxmoxClient(ProxmoxSettings(), SystemClock())"
)
PROGRAM = Path(__file__).resolve().parents[1] / "support" / "pvesh.py"
UNIT = Path(__file__).resolve().parents[2] / "roles/agentlabd/templates/agentlabd.service.j2"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # Every request starts a program, which a busy machine may take long over.
    made = Lab(tmp_path, api_timeout=60)
    program = tmp_path / "bin" / "pvesh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$1 $2" >> {tmp_path}/calls\nexec {sys.executable} {PROGRAM} "$@"\n')
    program.chmod(0o755)
    for name, value in (
        ("PATH", f"{program.parent}:/usr/bin:/bin"),
        ("PVESH_URL", made.server.url),
        ("PVESH_TOKEN", f"{TOKEN_ID}={TOKEN_SECRET}"),
        ("PVESH_CA", made.server.cafile),
    ):
        monkeypatch.setenv(name, value)
    real = made.server.environment

    def environment(folder: str) -> dict[str, str]:
        return {name: value for name, value in real(folder).items() if name.startswith("AGENTLAB_")}

    monkeypatch.setattr(made.server, "environment", environment)
    # Nothing but pvesh is needed: these cannot be imported.
    for library in ("proxmoxer", "requests"):
        monkeypatch.setitem(sys.modules, library, None)
    try:
        yield made
    finally:
        made.stop()


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def calls(lab: Lab) -> list[str]:
    """Return what pvesh was asked since the last look."""
    log = Path(lab.folder) / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


@pytest.mark.parametrize("node", ["pve1", "pve2"])
def test_a_sandbox_lives_through_pvesh(lab: Lab, node: str) -> None:
    """On this node, and on another one, whose answers are glued to the log of their tasks."""
    lab.pve.add_node("pve2")
    lab.pve.add_template(9001, "on-pve2", node="pve2")
    made = lab.create(
        cores=3,
        memory=1024,
        bridge="vmbr1",
        firewall=True,
        ip_config="ip=dhcp",
        tags=["x"],
        wait_for_ip=True,
        node=node,
        template={"pve1": None, "pve2": "on-pve2"}[node],
    )
    assert made.state == "RUNNING" and made.ip and made.node == node
    assert lab.pve.vm(made.vmid).config["cores"] == "3"
    assert lab.power("stop", made.vmid).state == "STOPPED"
    assert lab.power("start", made.vmid).state == "RUNNING"
    assert lab.power("suspend", made.vmid).state == "SUSPENDED"
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.state == "DESTROYED", outcome.message
    assert lab.pve.vm(made.vmid) is None


def test_how_often_pvesh_is_started(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start takes half a second on a node.

    pvesh tells itself that a task ended well; what was written is not read back; a delete proves quorum.
    """
    counts = {}
    # As on a node, where a file names the authority of its cluster: nothing is asked to recognise the cluster.
    monkeypatch.setattr(client_module, "_NODE_AUTHORITY", lab.server.cafile)
    lab.pve.ca_fingerprint = lab.context().client.read_trusted_authority()
    lab.create("first")
    calls(lab)
    # cores are compared with what the list of all resources has told already.
    made = lab.create("second", cores=2)
    counts["create"] = calls(lab)
    info.show(lab.context(), info.Filter(), verify=True, identities=False)
    counts["list"] = calls(lab)
    lab.power("stop", made.vmid)
    counts["stop"] = calls(lab)
    lab.power("start", made.vmid)
    counts["start"] = calls(lab)
    lab.power("stop", made.vmid)
    calls(lab)
    assert lab.destroy(made.vmid)[0].state == "DESTROYED"
    counts["destroy"] = calls(lab)
    made = lab.create("third")
    lab.power("stop", made.vmid)
    calls(lab)
    # Without a look at the power state: Proxmox VE refuses the delete of a VM that runs.
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    counts["forced destroy"] = calls(lab)
    # Of a creation's calls one reads the template's configuration, before anything is made.
    most = {"create": 7, "list": 1, "stop": 3, "start": 3, "destroy": 5, "forced destroy": 4}
    assert {name: len(asked) for name, asked in counts.items() if len(asked) > most[name]} == {}, counts


@pytest.mark.parametrize("ending", ["warnings", "killed", "fail"])
def test_another_end_of_a_task_than_a_good_one_is_told(lab: Lab, ending: str) -> None:
    """pvesh exits with 0 in each case; then the task's own status is read, and counts."""
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.next_task("qmdestroy", ending, text="the disk is on fire" if ending == "fail" else "", carry_out=False)
    calls(lab)
    outcome = lab.destroy(made.vmid)[0]
    assert any("/tasks/" in line for line in calls(lab))
    if ending == "warnings":
        # Proxmox VE says that it is done: the VMID that is still in use says otherwise.
        assert outcome.state == "STOPPED" and "is in use" in str(outcome.message), outcome
    else:
        assert outcome.state == "STOPPED", outcome
        assert {"killed": "died", "fail": "the disk is on fire"}[ending] in str(outcome.message)
    assert lab.destroy(made.vmid)[0].state == "DESTROYED"


def test_without_quorum_nothing_is_deleted_through_pvesh(lab: Lab) -> None:
    """The mark of a VM that is switched off is the first write, and Proxmox VE refuses it then."""
    made = lab.create()
    lab.power("stop", made.vmid)
    config = dict(lab.pve.vm(made.vmid).config)
    lab.pve.lose_quorum()
    calls(lab)
    for force in (False, True):
        outcome = lab.destroy(made.vmid, force=force)[0]
        assert outcome.state == "STOPPED" and "the cluster has no quorum" in str(outcome.message), outcome
    assert not any(line.startswith("delete") for line in calls(lab))
    assert lab.pve.vm(made.vmid).config == config
    lab.pve.regain_quorum()
    assert lab.destroy(made.vmid)[0].state == "DESTROYED"


def test_a_vm_that_somebody_moved_and_started_is_not_stopped_without_quorum(lab: Lab) -> None:
    """The record says switched off, so the mark is to prove quorum; but the VM runs elsewhere, so the stop is first."""
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.move_vm(made.vmid, "pve2")
    lab.pve.power(made.vmid, "running")
    lab.pve.lose_quorum()
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.state == "STOPPED" and "the cluster has no quorum" in str(outcome.message), outcome
    assert lab.pve.vm(made.vmid).status == "running"
    lab.pve.regain_quorum()
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"


def test_a_task_goes_on_when_the_run_that_began_it_is_killed(lab: Lab, tmp_path: Path) -> None:
    """A worker of Proxmox ends with pvesh; a clone that is cut off would leave a locked VM."""
    (tmp_path / "bin" / "pvesh").write_text(
        f"#!/bin/sh\nsleep 2\necho a line of the log\necho ended > {tmp_path}/ended\n"
    )
    code = f"{CLIENT}; client.post('nodes/pve1/qemu/9000/clone', newid=1000)"
    run = subprocess.Popen([sys.executable, "-c", code], env=child_environment(), start_new_session=True)
    deadline = time.monotonic() + 60
    while not psutil.Process(run.pid).children() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "ended").exists()


def test_a_write_that_takes_too_long_is_unknown_and_goes_on(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "bin" / "pvesh").write_text(f"#!/bin/sh\nsleep 3\necho ended > {tmp_path}/ended\n")
    ctx = lab.context(api_timeout=1, wait_timeout="1s")
    with pytest.raises(
        OutcomeUnknown, match=r"did not end within 1 s \(wait_timeout\); the request goes on.*not known"
    ):
        ctx.client.post("nodes/pve1/qemu/9000/clone", newid=1000)
    assert not (tmp_path / "ended").exists()
    with pytest.raises(OutcomeUnknown, match=r"no answer within 1 s \(api_timeout\); nothing was changed"):
        ctx.client.get("version")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "ended").exists()


def test_a_clone_that_outlasts_the_wait_is_taken_up_by_the_next_run(lab: Lab) -> None:
    """pvesh names the task only when it has ended. A reconcile meanwhile gives nothing up."""
    lab.pve.next_task("qmclone", "slow", seconds=5.0)
    with pytest.raises(OutcomeUnknown) as refused:
        lab.create("a1", options={"api_timeout": 2, "wait_timeout": "2s"})
    assert re.search(r"did not end within 2 s \(wait_timeout\); it goes on, run again", refused.value.message)
    time.sleep(1.1)
    assert lab.reconcile() == [] and lab.records()[0].state == "PROVISIONING"
    for task in lab.pve.tasklog:
        # On a node pvesh works as root; here the program in its place has a token.
        task.update(user="root@pam", tokenid=None)
    made = lab.create("a1", options={"wait_timeout": "60s"})
    assert (made.vmid, made.state) == (1000, "RUNNING") and lab.leftovers() == {"claims": [], "operations": []}


def odd_program(lab: Lab, path: str, command: str) -> None:
    """Have pvesh print what this command prints instead of the answers to requests for that path."""
    program = Path(lab.folder) / "bin" / "pvesh"
    program.rename(program.with_name(real := f"real-{time.monotonic_ns()}"))
    program.write_text(
        f'#!/bin/sh\ncase "$2" in *{path}) {command}; exit 0;; esac\nexec {program.parent}/{real} "$@"\n'
    )
    program.chmod(0o755)


@pytest.mark.parametrize(
    "command",
    [
        """python3 -c 'print("{\\"result\\": " + "[" * 5000 + "]" * 5000 + "}")'""",
        """python3 -c 'print("{\\"result\\": " + "[" * 60 + "]" * 60 + "}")'""",
        """head -c 34000000 /dev/zero | tr "\\0" "1" """,
    ],
    ids=["deeper than the parser goes", "deep", "large"],
)
def test_an_answer_of_a_guest_that_makes_no_sense_is_not_blamed_on_proxmox(lab: Lab, command: str) -> None:
    made = lab.create()
    odd_program(lab, "/agent/network-get-interfaces", command)
    ctx = lab.context()
    with pytest.raises(OutcomeUnknown, match="the answer of the guest is larger or nested deeper") as refused:
        ctx.client.get(f"nodes/pve1/qemu/{made.vmid}/agent/network-get-interfaces")
    assert refused.value.detail["guest"] and "api_host" not in refused.value.message
    statistics = ctx.client.statistics
    assert statistics.reachable is True and statistics.last_error is None and not statistics.errors
    # The same nonsense in an answer of Proxmox VE itself is told as such.
    odd_program(lab, "/version", command)
    with pytest.raises(OutcomeUnknown) as refused:
        ctx.client.get("version")
    assert "guest" not in refused.value.detail and statistics.reachable is False


@pytest.mark.parametrize("value", [f"{TOKEN_SECRET}", "a secret of the guest"])
def test_no_secret_reaches_pvesh(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Neither in its environment nor among its arguments, which every user of the host may read."""
    monkeypatch.setenv("PROXMOX_TOKEN_SECRET", TOKEN_SECRET)
    (tmp_path / "bin" / "pvesh").write_text('#!/bin/sh\nenv | grep -E "LC_ALL|PROXMOX" >&2\nexit 1\n')
    with pytest.raises(AgentlabError) as caught:
        lab.context().client.get("version")
    assert "LC_ALL=C.UTF-8" in caught.value.message and "PROXMOX_TOKEN_SECRET" not in caught.value.message
    with pytest.raises(InvalidInput, match="cipassword: pvesh would show it to every user") as refused:
        lab.context().client.put("nodes/pve1/qemu/1000/config", cipassword=value)
    assert value not in str(refused.value.as_dict())


def test_pmxcfs_admits_root_only_in_its_group(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs as root in another group sees nothing of the cluster; it starts pvesh in the group root."""
    monkeypatch.setenv("PVESH_PMXCFS", "1")
    if os.geteuid() != 0:
        with pytest.raises(Unreachable, match="pmxcfs of this node refuses the connection.*group id"):
            lab.context().client.get("version")
        return
    code = f"{CLIENT}; print(client.get_dict('version')['version'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), group=4711, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


def test_pvesh_inherits_neither_umask_nor_environment_of_the_service(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM, its hook script and the folders of its disks would get them."""
    (tmp_path / "bin" / "pvesh").write_text(f"#!/bin/sh\numask > {tmp_path}/umask\nenv > {tmp_path}/env\necho '{{}}'\n")
    service = re.findall(
        r"([A-Z_]+)=", " ".join(re.findall(r"^Environment=(.*)$", UNIT.read_text(encoding="utf-8"), re.M))
    )
    assert "MALLOC_ARENA_MAX" in service
    for name in (*service, "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.setenv(name, "131072")
    before = os.umask(0o077)
    try:
        lab.context().client.get("version")
    finally:
        os.umask(before)
    assert (tmp_path / "umask").read_text().strip() == "0022"
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "PATH" in names and names & {*service, "NOTIFY_SOCKET", "WATCHDOG_USEC"} == set()


def test_a_workspace_and_a_security_group_through_pvesh(lab: Lab) -> None:
    lab.pve.firewall_config("cluster").setdefault("groups", {}).setdefault("agents", {"comment": "", "rules": []})
    found = workspace.ensure_present(lab.context(), "w1", size="2G", storage="local-lvm").workspace
    assert found is not None
    made = lab.create(workspace="w1", firewall_group="agents")
    rules = lab.pve.firewall_config("vm", "pve1", made.vmid)
    assert [rule["action"] for rule in rules["rules"]] == ["agents"] and rules["options"]["enable"] == 1
    assert workspace.ensure_present(lab.context(), "w1", size="3G").outcome == "grown"
    assert workspace.ensure_detached(lab.context(), "w1").changed
    ctx = lab.context()
    assert workspace.ensure_attached(ctx, "w1", ctx.select_sandbox(made.vmid)).outcome == "attached"
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    assert (
        workspace.ensure_absent(lab.context(), "w1", force=True).outcome == "deleted"
        and lab.pve.volumes_of(found.owner_vmid) == []
    )


def test_several_destroys_through_pvesh_prove_absence(lab: Lab) -> None:
    vmids = [lab.create(name=f"a{number}").vmid for number in range(3)]
    lab.pve.remove_vm(vmids[1])
    vm = lab.pve.make_foreign(vmids[2], running=True)
    lab.pve.requests.clear()
    assert [one.state for one in lab.destroy(*vmids, force=True)] == ["DESTROYED"] * 3
    assert lab.pve.vm(vmids[2]) is vm and vm.status == "running" and lab.pve.touched(vmids[2]) == []


def test_a_mark_that_was_not_written_deletes_nothing(lab: Lab) -> None:
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.fail("PUT", f"/qemu/{made.vmid}/config", 500, "unable to open file - Permission denied")
    outcome = lab.destroy(made.vmid)[0]
    assert outcome.failed and "cannot be marked" in (outcome.message or ""), outcome
    assert lab.pve.vm(made.vmid) is not None
    assert not [one for one in lab.pve.touched(made.vmid) if one.startswith("DELETE")]


def test_a_task_that_failed_is_no_success_although_pvesh_says_so(lab: Lab) -> None:
    made = lab.create()
    lab.power("stop", made.vmid)
    lab.pve.next_task("qmdestroy", "fail", text="volume is busy")
    outcome = lab.destroy(made.vmid)[0]
    assert outcome.failed and "volume is busy" in (outcome.message or ""), outcome
    assert [one.state for one in lab.records()] == ["STOPPED"]
    assert lab.destroy(made.vmid)[0].state == "DESTROYED"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Connection to pve2 closed by remote host.", OutcomeUnknown),
        ("client_loop: send disconnect: Broken pipe", OutcomeUnknown),
        ("ssh: connect to host 192.0.2.2 port 22: No route to host", Unreachable),
    ],
)
def test_an_ssh_that_ends_says_nothing_of_the_request(
    lab: Lab, tmp_path: Path, said: str, kind: type[AgentlabError]
) -> None:
    """pvesh reaches other nodes by ssh: a clone whose connection ended may have been made, so it is not taken for
    refused.
    """
    ctx = lab.context()
    ctx.cluster.list_vms()
    (tmp_path / "bin" / "pvesh").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 255\n")
    with pytest.raises(kind):
        ctx.client.post("nodes/pve2/qemu/9000/clone", newid=1000)


# ---- commands in guests ----


@pytest.fixture
def qm(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named qm on this "node", whose calls stand in the file that is returned."""
    calls = tmp_path / "qm-calls"
    program = tmp_path / "bin" / "qm"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {calls}\nexec {sys.executable} {PROGRAM.with_name("qm.py")} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("socket.gethostname", lambda: "pve1")
    return calls


def test_a_command_on_this_node_shows_nothing_secret(lab: Lab, qm: Path, tmp_path: Path) -> None:
    sandbox = lab.create()
    (tmp_path / "calls").write_text("")
    spec = command.CommandSpec(argv=["cat"], stdin=b"geheim", environment={"T": "geheim"}, secret=True)
    result = command.run_command(lab.context(), sandbox, spec)
    assert (result.rc, result.stdout) == (0, b"geheim")
    called = qm.read_text()
    assert f"guest exec {sandbox.vmid} --pass-stdin 1 --synchronous 0 -- /bin/sh -c" in called
    assert "geheim" not in called and "agent/exec" not in (tmp_path / "calls").read_text().replace("exec-status", "")


def test_a_command_on_another_node_is_refused_with_a_secret_alone(lab: Lab, qm: Path) -> None:
    sandbox = lab.create()
    lab.pve.move_vm(sandbox.vmid, "pve2")
    result = command.run_command(lab.context(), sandbox, command.CommandSpec(argv=["echo", "x"]))
    assert (result.rc, result.stdout) == (0, b"x\n") and not qm.exists()
    started = len(lab.pve.machine(sandbox.vmid).started)
    with pytest.raises(GuestRefused, match="pvesh would show the input to every user of this host"):
        command.run_command(lab.context(), sandbox, command.CommandSpec(argv=["cat"], stdin=b"geheim", secret=True))
    assert len(lab.pve.machine(sandbox.vmid).started) == started


def test_what_qm_refuses_is_told_as_over_https(lab: Lab, qm: Path) -> None:
    sandbox = lab.create()
    lab.pve.machine(sandbox.vmid).blocked.add("guest-exec")
    with pytest.raises(GuestRefused, match="the guest blocks guest-exec"):
        command.run_command(lab.context(), sandbox, command.CommandSpec(argv=["true"]))
