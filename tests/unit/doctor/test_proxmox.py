# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The doctor on Proxmox VE: privileges, ranges of VMIDs, clocks, quorum, nodes, another cluster."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import cluster, doctor

from support import pages
from support.double import EMPTY_CONFIG, TOKEN_ID
from support.examine import examine
from support.lab import Lab
from support.pages import ROOT
from support.story import written


def test_a_healthy_set_up_has_no_finding_but_ok(lab: Lab) -> None:
    lab.create()
    access = lab.pve.use_access()
    access.users, access.tokens = {"root@pam"}, {}
    for command in pages.commands(ROOT / "README.md"):
        if command.startswith("pveum"):
            access.pveum(
                lab.pve,
                command.replace("agentlab@pve ansible", "agentlab@pve tests") if "token" in command else command,
            )
    before = written(lab.database)
    lab.pve.requests.clear()
    found = examine(lab, pool="agentlab")
    assert found["report"].status == "ok", [one for one in found["report"].findings if one.status != "ok"]
    assert set(found) - {"report"} == {
        "versions",
        "configuration",
        "database",
        "work",
        "proxmox",
        "cluster",
        "quorum",
        "template",
        "storage",
        "creation",
        "privileges",
        "commands",
        "vmid_range",
        "clock",
        "daemon",
    }
    assert written(lab.database) == before and all(method == "GET" for method, _path, _body in lab.pve.requests)
    assert len(lab.pve.requests) < 25


def test_missing_privileges_are_told_by_path_with_the_commands(lab: Lab) -> None:
    lab.pve.grant_least(TOKEN_ID)
    lab.pve.revoke(TOKEN_ID, "/storage/local-lvm")
    found = examine(lab)
    assert found["privileges"].status == "problem"
    assert found["privileges"].facts["missing"] == {
        "/": ["VM.Audit", "Sys.Audit"],
        "/storage/local-lvm": ["Datastore.AllocateSpace"],
    }
    assert "pveum acl modify /storage/local-lvm --users agentlab@pve --roles AgentlabDisk" in found["report"].pveum
    lab.calm()
    too_many = examine(lab)["privileges"]
    assert too_many.status == "warning" and "Permissions.Modify" in too_many.meaning


def test_the_commands_fit_the_release_and_the_readme() -> None:
    found = config.load({"pool": "agentlab"}, {"AGENTLAB_CONFIG": EMPTY_CONFIG})
    commands = doctor.make_pveum_commands(found, template=9000, storage="local-lvm")
    assert [f"# {line}" for line in commands] == [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("# pveum")
    ]
    assert "VM.Monitor" in doctor.make_pveum_commands(found, template=9000, storage="x", release="8.4.1")[2]
    for name in {
        name for names in doctor.list_needed_privileges(found, template=1, storage="x").values() for name in names
    }:
        assert name.removeprefix("VM.Config") in (ROOT / "docs/safety.md").read_text(), name


def test_a_foreign_vm_in_the_range_of_vmids_is_a_warning(lab: Lab) -> None:
    lab.create()
    assert examine(lab)["vmid_range"].status == "ok"
    lab.pve.add_guest(1500, "theirs")
    found = examine(lab)["vmid_range"]
    assert found.status == "warning" and found.facts["foreign"] == [1500] and "1500" in found.meaning
    # Another database that works in our range: its VM carries the marker.
    lab.pve.vm(1500).config["description"] = lab.pve.vm(1000).config["description"]
    found = examine(lab)["vmid_range"]
    assert found.facts["marked"] == [1500] and "another database" in found.meaning
    assert examine(lab, vmid_range="500-500")["vmid_range"].status == "problem"
    assert lab.pve.touched(1500) == []


def test_the_datacenters_range_of_vmids_is_read_in_each_form() -> None:
    assert (
        cluster._read_next_id("lower=1500,upper=5000")
        == cluster._read_next_id({"lower": "1500", "upper": 5000})
        == (1500, 5000)
    )
    assert cluster._read_next_id("lower=5") == (5, 1000000)
    assert (
        cluster._read_next_id(None) is None
        and cluster._read_next_id("lower=x") is None
        and cluster._read_next_id(3) is None
    )


@pytest.mark.parametrize(("offset", "status"), [(0, "ok"), (20, "warning"), (-20, "warning"), (4000, "problem")])
def test_the_difference_of_clocks_decides_between_ok_warning_and_problem(lab: Lab, offset: int, status: str) -> None:
    lab.pve.clock_offset = offset
    assert examine(lab)["clock"].status == status


def test_an_offline_node_is_a_warning_and_lost_quorum_a_problem(lab: Lab) -> None:
    lab.pve.add_node("pve2", online=False)
    assert examine(lab)["quorum"].status == "warning" and "pve2" in examine(lab)["quorum"].meaning
    lab.pve.lose_quorum()
    assert examine(lab)["quorum"].status == "problem" and "no quorum" in examine(lab)["quorum"].meaning


def test_proxmox_that_cannot_be_asked_is_a_problem(lab: Lab) -> None:
    found = examine(lab, api_port=1)
    assert found["proxmox"].status == "problem" and "Connection refused" in found["proxmox"].meaning
    assert found["privileges"].status == found["clock"].status == "unknown" and found["database"].status == "ok"
    lab.pve.fail("GET", "/version", 401, "expired")
    assert "refuses the credentials" in examine(lab)["proxmox"].meaning


def test_records_of_another_cluster_are_a_problem(lab: Lab) -> None:
    lab.create()
    lab.pve.ca_fingerprint = "AA:BB"
    assert (
        examine(lab)["cluster"].status == "problem"
        and "another cluster than that of these records" in examine(lab)["cluster"].meaning
    )


def test_what_these_credentials_cannot_see_is_not_called_fit(lab: Lab) -> None:
    """A token without any privilege sees no node and no VM."""
    assert examine(lab)["vmid_range"].meaning.endswith("are free, and no other VM is in it")
    lab.pve.grant(TOKEN_ID, "/nowhere", "Pool.Audit")
    found = examine(lab)
    assert found["creation"].status == "unknown" and "nodes could not be read" in found["creation"].meaning
    assert "as far as these credentials see" in found["vmid_range"].meaning
    assert found["template"].meaning == (
        "template: 'debian-13' does not exist. Templates: none that these credentials may see"
    )


def test_nodes_that_may_not_be_read_are_not_called_offline(lab: Lab) -> None:
    lab.pve.fail("GET", "/cluster/status", 403, "Permission check failed (/, Sys.Audit)", times=9)
    found = examine(lab)
    assert found["clock"].status == "unknown" and "could not be read" in found["clock"].meaning
    lab.options.pop("template")
    lab.pve.fail("GET", "/cluster/status", 403, "Permission check failed (/, Sys.Audit)", times=9)
    assert examine(lab)["storage"].status == "unknown"


def test_commands_need_a_privilege_and_an_agent_that_allows_them(lab: Lab) -> None:
    sandbox = lab.create()
    assert examine(lab)["commands"].status == "ok" and "allows what is needed" in examine(lab)["commands"].meaning
    lab.pve.machine(sandbox.vmid).blocked.add("guest-exec")
    blocked = examine(lab)["commands"]
    assert blocked.status == "warning" and "blocks guest-exec" in blocked.meaning
    lab.pve.machine(sandbox.vmid).blocked.clear()
    lab.pve.machine(sandbox.vmid).freeze(30)
    assert examine(lab)["commands"].status == "warning"
    lab.pve.close_machines()
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit", "VM.Audit", "VM.GuestAgent.Audit")
    unused = examine(lab)["commands"]
    assert unused.status == "ok" and "lacks VM.GuestAgent.Unrestricted on /vms" in unused.meaning
    lab.pve.acl = None
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import command

    command.run_command(lab.context(), sandbox, command.CommandSpec(argv=["true"]))
    lab.pve.grant(TOKEN_ID, "/", "Sys.Audit", "VM.Audit", "VM.GuestAgent.Audit")
    assert examine(lab)["commands"].status == "problem"


def test_the_load_of_each_node_and_why_nothing_fits(lab: Lab) -> None:
    assert "placement" not in examine(lab)
    lab.pve.nodes["pve2"] = {"online": True}
    lab.pve.add_template(9002, lab.pve.vm(9000).name, node="pve2")
    gib = 1024**3
    lab.pve.node_figures = {name: {"maxmem": 64 * gib, "mem": 32 * gib, "maxcpu": 16} for name in ("pve1", "pve2")}
    found = examine(lab, node="auto")
    assert found["placement"].status == "ok" and "pve2: 0 sandboxes, 32768 MiB free" in found["placement"].meaning
    assert found["creation"].status != "problem" and found["template"].status != "problem"
    lab.pve.node_figures = {name: {"maxmem": 64 * gib, "mem": 63 * gib, "maxcpu": 16} for name in ("pve1", "pve2")}
    full = examine(lab)["placement"]
    assert full.status == "problem" and "pve1: 1024 MiB of its memory are free" in full.meaning
    figures = ("maxmem", "mem", "maxcpu", "cpu", "maxdisk", "disk", "uptime")
    lab.pve._node_row = lambda row, _user: {key: value for key, value in row.items() if key not in figures}
    bare = examine(lab)["placement"]
    assert bare.status == "warning" and "Sys.Audit on /nodes" in str(bare.advice)
