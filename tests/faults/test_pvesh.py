# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The local backend: the whole life of a sandbox through a program named pvesh that prints as the real one does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, OutcomeUnknown, Unreachable
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.operations import workspace

from support.double import TOKEN_ID, TOKEN_SECRET
from support.lab import Lab

pytestmark = pytest.mark.faults
PROGRAM = Path(__file__).resolve().parents[1] / "support" / "pvesh.py"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # Every request starts a program, which a busy machine may take long over.
    made = Lab(tmp_path, api_timeout=60)
    program = tmp_path / "bin" / "pvesh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"\n')
    program.chmod(0o755)
    for name, value in (("PATH", f"{program.parent}:/usr/bin:/bin"), ("PVESH_URL", made.server.url), ("PVESH_TOKEN", f"{TOKEN_ID}={TOKEN_SECRET}"),
                        ("PVESH_CA", made.server.cafile)):
        monkeypatch.setenv(name, value)
    real = made.server.environment

    def environment(folder: str) -> dict[str, str]:
        return {name: value for name, value in real(folder).items() if name.startswith("AGENTLAB_")}

    monkeypatch.setattr(made.server, "environment", environment)
    try:
        yield made
    finally:
        made.stop()


def test_the_whole_life_through_pvesh(lab: Lab) -> None:
    made = lab.create(cores=3, memory=1024, bridge="vmbr1", firewall=True, ip_config="ip=dhcp", tags=["x"], wait_for_ip=True)
    assert made.state == "RUNNING" and made.ip
    assert lab.pve.vm(made.vmid).config["cores"] == "3"
    assert lab.power("stop", made.vmid).state == "STOPPED"
    assert lab.power("start", made.vmid).state == "RUNNING"
    assert lab.power("suspend", made.vmid).state == "SUSPENDED"
    outcome = lab.destroy(made.vmid, force=True)[0]
    assert outcome.state == "DESTROYED", outcome.message
    assert lab.pve.vm(made.vmid) is None


def test_a_workspace_and_a_security_group_through_pvesh(lab: Lab) -> None:
    lab.pve.firewall_config("cluster").setdefault("groups", {}).setdefault("agents", {"comment": "", "rules": []})
    found = workspace.present(lab.context(), "w1", size="2G", storage="local-lvm").workspace
    assert found is not None
    made = lab.create(workspace="w1", firewall_group="agents")
    rules = lab.pve.firewall_config("vm", "pve1", made.vmid)
    assert [rule["action"] for rule in rules["rules"]] == ["agents"] and rules["options"]["enable"] == 1
    assert workspace.present(lab.context(), "w1", size="3G").outcome == "grown"
    assert workspace.detached(lab.context(), "w1").changed
    ctx = lab.context()
    assert workspace.attached(ctx, "w1", ctx.select(made.vmid)).outcome == "attached"
    assert lab.destroy(made.vmid, force=True)[0].state == "DESTROYED"
    assert lab.pve.volumes_of(found.owner_vmid) == [found.volume]
    assert workspace.absent(lab.context(), "w1", force=True).outcome == "deleted" and lab.pve.volumes_of(found.owner_vmid) == []


def test_several_at_once_and_absence(lab: Lab) -> None:
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


@pytest.mark.parametrize(("said", "kind"), [
    ("Connection to pve2 closed by remote host.", OutcomeUnknown), ("client_loop: send disconnect: Broken pipe", OutcomeUnknown),
    ("ssh: connect to host 192.0.2.2 port 22: No route to host", Unreachable)])
def test_an_ssh_that_ends_says_nothing_of_the_request(lab: Lab, tmp_path: Path, said: str, kind: type[AgentlabError]) -> None:
    """pvesh reaches other nodes by ssh: a clone whose connection ended may have been made, so it is not taken for refused."""
    ctx = lab.context()
    ctx.cluster.vms()
    (tmp_path / "bin" / "pvesh").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 255\n")
    with pytest.raises(kind):
        ctx.client.post("nodes/pve2/qemu/9000/clone", newid=1000)
