# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A sandbox that is there is asked for with other options.

Each that differs is told, and what can be applied is applied on request.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils import _adapter
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import (
    AgentlabError,
    InvalidInput,
    Kept,
    StateConflict,
)
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity

from support.lab import Lab

pytestmark = pytest.mark.faults

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMadeUp me"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOther you"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.stop()


def writes(lab: Lab) -> list[tuple[str, str]]:
    return [(method, path.rpartition("/qemu/")[2]) for method, path, _body in lab.pve.requests if method != "GET"]


# ---- what is told ----


@pytest.mark.parametrize(
    ("first", "again", "words"),
    [
        (
            {"cores": 2},
            {"cores": 3},
            "cores: '3' was not applied to sandbox 1000, which has '2'. Set update=true to apply it",
        ),
        (
            {},
            {"memory": 4096},
            "memory: '4096' was not applied to sandbox 1000, which has what its template or the configuration said. "
            "Set update=true",
        ),
        (
            {"tags": ["ci"]},
            {"tags": "night, ci"},
            "tags: 'ci, night' was not applied to sandbox 1000, which has 'ci'. Set update=true",
        ),
        (
            {"ttl": "1h"},
            {"ttl": "2h"},
            "ttl: a lease of 2h was not applied to sandbox 1000, which has a lease of 1h. Renew its lease with "
            "agentlab_lease",
        ),
        ({}, {"disk_size": "20G"}, "disk_size: '20G' was not applied to sandbox 1000"),
        (
            {"bridge": "vmbr0"},
            {"bridge": "vmbr1"},
            "bridge: 'vmbr1' was not applied to sandbox 1000, which has 'vmbr0'. It counts when a sandbox is created",
        ),
        (
            {"ssh_public_keys": [KEY]},
            {"ssh_public_keys": [KEY, OTHER_KEY]},
            "ssh_public_keys: another list of keys was not applied",
        ),
        (
            {"template": "debian-13"},
            {"template": "9001"},
            "template: '9001' was not applied to sandbox 1000, which has 'debian-13'",
        ),
        ({"ip_config": "ip=dhcp"}, {"ip_config": "ip=192.0.2.9/24"}, "ip_config: 'ip=192.0.2.9/24' was not applied"),
        ({}, {"description": "x"}, "description: another text was not applied"),
    ],
)
def test_an_option_that_differs_is_told_by_its_name(
    lab: Lab, first: dict[str, Any], again: dict[str, Any], words: str
) -> None:
    lab.present(**first)
    lab.pve.requests.clear()
    for dry_run in (False, True):
        outcome = lab.present(dry_run=dry_run, **again)
        warnings = outcome.explain_warnings(_adapter.REMEDIES)
        assert outcome.outcome == "unchanged" and len(warnings) == 1 and words in warnings[0], warnings
    assert lab.pve.requests == [], "records alone tell it"


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (
            {"cores": 2, "memory": 1024, "ttl": "1h", "tags": ["b", "a"]},
            {"cores": 2, "memory": 1024, "ttl": 60, "tags": "a,B"},
        ),
        ({"template": "debian-13"}, {"template": "9000"}),
        ({"template": "9000"}, {"template": "debian-13"}),
        ({}, {"node": "pve1"}),
        ({}, {"template": "debian-13"}),
        ({"nameserver": "192.0.2.1 192.0.2.2"}, {"nameserver": "192.0.2.1,192.0.2.2"}),
        ({}, {"full_clone": False}),
        ({"ssh_public_keys": [KEY, OTHER_KEY]}, {"ssh_public_keys": f"{OTHER_KEY}\n{KEY}"}),
        ({"cores": 2}, {}),
        ({}, {"wait_for_ip": True}),
        ({"cloud_init_password": "a"}, {"cloud_init_password": "b"}),
    ],
)
def test_what_does_not_differ_is_not_told(lab: Lab, first: dict[str, Any], again: dict[str, Any]) -> None:
    lab.present(**first)
    assert lab.present(**again).explain_warnings(None) == []


def test_nothing_secret_is_kept(lab: Lab) -> None:
    lab.present(cloud_init_password="hunter2-secret", ssh_public_keys=[KEY])
    told = str(lab.events(lab.records()[0]))
    assert "hunter2" not in told and "AAAAC3" not in told


# ---- what is applied ----


def test_tags_and_description_of_a_sandbox_that_runs(lab: Lab) -> None:
    lab.present(tags=["ci"], description="first\n\nwith a paragraph")
    vm = lab.pve.vm(1000)
    assert identity.read_own_text(vm.config) == "first\n\nwith a paragraph" and identity.read_markers(vm.config) == {
        lab.records()[0].uuid
    }
    vm.config["tags"] += ";by-hand"
    lab.pve.requests.clear()
    asked = {"tags": ["night"], "description": "second", "update": True}
    would = lab.present(dry_run=True, **asked)
    assert would.outcome == "would_update" and would.changed and writes(lab) == []
    done = lab.present(**asked)
    assert done.outcome == "updated" and done.extra == would.extra
    assert done.extra == {
        "after": {"tags": ["night"], "description": "second"},
        "before": {"tags": ["ci"], "description": "first\n\nwith a paragraph"},
    }
    assert (
        vm.config["tags"] == "agentlab;by-hand;night"
        and identity.read_own_text(vm.config) == "second"
        and vm.status == "running"
    )
    assert identity.read_markers(vm.config) == {lab.records()[0].uuid} and lab.record(1000).tags == ["night"]
    puts = [one["params"] for one in lab.pve.history if one["method"] == "PUT" and one["path"].endswith("/1000/config")]
    assert puts[-1].get("digest"), "guarded by the digest"
    assert [(one["operation"], one["reason"]) for one in lab.events(lab.records()[0])][-1] == ("update", "options")
    again = lab.present(**asked)
    assert again.outcome == "unchanged" and again.warnings == [] and not again.changed
    assert lab.present(tags=["night"], description="second").warnings == []
    assert lab.destroy(1000, force=True)[0].state == "DESTROYED"


@pytest.mark.parametrize(
    "text", ["ends with blanks  ", "two\r\nlines\t\r\n", "  begins so", "50 % \u00fc\u2028%41 \x85."]
)
def test_a_description_is_the_same_when_it_is_given_again(lab: Lab, text: str) -> None:
    lab.present()
    assert lab.present(description=text, update=True).outcome == "updated"
    assert lab.present(description=text, update=True).outcome == "unchanged"


def test_cores_and_memory_take_a_restart_that_is_allowed(lab: Lab) -> None:
    lab.pve.vm(9000).config["balloon"] = "1024"
    lab.present(cores=2)
    vm = lab.pve.vm(1000)
    for dry_run in (True, False):
        lab.pve.requests.clear()
        with pytest.raises(InvalidInput, match=r"cores: sandbox 1000 runs, .* Nothing was changed") as refused:
            lab.present(dry_run=dry_run, cores=3, tags=["x"], update=True)
        assert refused.value.remedy == "allow_restart"
        assert writes(lab) == [] and vm.config["tags"] == "agentlab"
    done = lab.present(cores=3, memory=512, update=True, allow_restart=True)
    assert done.outcome == "updated" and done.state == "RUNNING" and len(done.upids) == 2
    assert (int(vm.config["cores"]), int(vm.config["memory"]), int(vm.config["balloon"]), vm.status) == (
        3,
        512,
        512,
        "running",
    )
    assert [one for one in writes(lab) if one[1].startswith("1000/")] == [
        ("POST", "1000/status/shutdown"),
        ("PUT", "1000/config"),
        ("POST", "1000/status/start"),
    ]
    assert lab.leftovers() == {"claims": [], "operations": []} and lab.reconcile() == []
    assert lab.present(cores=3, memory=512, update=True).outcome == "unchanged"


def test_a_stopped_sandbox_takes_cores_without_a_start(lab: Lab) -> None:
    lab.present(cores=2)
    lab.power("stop", 1000)
    done = lab.present(cores=3, update=True)
    assert (
        done.outcome == "updated"
        and lab.pve.vm(1000).status == "stopped"
        and int(lab.pve.vm(1000).config["cores"]) == 3
    )


def test_a_write_that_fails_leaves_the_vm_running(lab: Lab) -> None:
    lab.present(cores=2)
    lab.pve.fail("PUT", "/qemu/1000/config", 500, "boom")
    with pytest.raises(AgentlabError, match="boom"):
        lab.present(cores=3, update=True, allow_restart=True)
    assert lab.pve.vm(1000).status == "running" and int(lab.pve.vm(1000).config["cores"]) == 2
    lab.pve.failures.clear()
    assert lab.present(cores=3, update=True, allow_restart=True).outcome == "updated"


def test_no_stranger_is_updated(lab: Lab) -> None:
    lab.present()
    stranger = lab.swap(1000, running=True)
    for dry_run in (True, False):
        with pytest.raises(Kept, match="now belongs to another VM"):
            lab.present(dry_run=dry_run, cores=3, tags=["x"], description="mine", update=True, allow_restart=True)
    lab.untouched(stranger, status="running")


def test_a_change_by_somebody_else_meanwhile_stays(lab: Lab) -> None:
    lab.present()
    edited = lab.edited_before("/config")
    lab.present(description="mine", update=True)
    assert edited == [1000] and "edited 1" in lab.pve.vm(1000).config["description"]
    assert identity.read_markers(lab.pve.vm(1000).config) == {lab.records()[0].uuid}


def test_an_update_is_refused_in_a_state_that_does_not_allow_it(lab: Lab) -> None:
    lab.present()
    lab.power("suspend", 1000)
    with pytest.raises(
        StateConflict, match="is suspended, and would lose its memory; start it first. Nothing was changed"
    ):
        lab.present(cores=3, update=True, allow_restart=True)
    assert lab.present(tags=["x"], update=True).outcome == "updated"
    lab.force_state(1000, "TIMEOUT")
    with pytest.raises(
        StateConflict,
        match="cannot update sandbox in TIMEOUT state. Valid states: READY, RUNNING, SUSPENDED, STOPPED, COMPLETED",
    ):
        lab.present(tags=["y"], update=True)


def test_a_forbidden_tag_is_a_warning_here_too(lab: Lab) -> None:
    lab.present()
    lab.pve.tag_access, lab.pve.tag_allow_list = "list", {"agentlab", "good"}
    done = lab.present(tags=["good", "bad"], description="d", update=True)
    assert done.outcome == "updated" and "does not allow the tag bad" in done.warnings[0]
    assert lab.pve.vm(1000).config["tags"] == "agentlab;good" and lab.record(1000).tags == ["bad", "good"]
    assert identity.read_own_text(lab.pve.vm(1000).config) == "d"


@pytest.mark.parametrize(
    "text",
    ["agentlab-sandbox: 11111111-1111-4111-8111-111111111111", "x\nagentlab-delete: destroy", "a\x00b", "x" * 4001],
)
def test_a_description_cannot_forge_what_is_ours(lab: Lab, text: str) -> None:
    with pytest.raises(InvalidInput, match="^description: that text is not valid"):
        lab.present(description=text)


def test_allow_restart_without_update_is_refused(lab: Lab) -> None:
    with pytest.raises(InvalidInput, match="allow_restart: has an effect together with update only"):
        lab.present(allow_restart=True)


# ---- what would leave the VM switched off ----


@pytest.mark.parametrize("dry_run", [False, True])
def test_more_cores_than_the_node_has_are_refused_before_anything_is_stopped(lab: Lab, dry_run: bool) -> None:
    lab.present(ttl=3600, cores=1)
    lab.pve.vm(1000).config["sockets"] = 2
    lab.pve.requests.clear()
    with pytest.raises(
        InvalidInput, match=r"cores: 3 \(times 2 sockets of the VM\) is more than the 4 CPUs of node pve1"
    ):
        lab.present(dry_run=dry_run, cores=3, update=True, allow_restart=True)
    assert writes(lab) == [] and lab.pve.vm(1000).status == "running"
    lab.power("stop", 1000)
    lab.pve.requests.clear()
    with pytest.raises(InvalidInput, match="cores: 3"):
        lab.present(dry_run=dry_run, cores=3, update=True)
    assert writes(lab) == []


def test_nothing_is_stopped_without_quorum_and_the_write_says_so(lab: Lab) -> None:
    lab.present(ttl=3600, cores=1)
    lab.pve.lose_quorum()
    lab.pve.requests.clear()
    with pytest.raises(Kept, match="sandbox 1000 was neither stopped nor changed, .*without quorum.*pvecm status"):
        lab.present(cores=2, update=True, allow_restart=True)
    assert writes(lab) == [] and lab.pve.vm(1000).status == "running"
    with pytest.raises(AgentlabError, match="the cluster takes no changes, most likely because it has no quorum"):
        lab.present(tags=["ci"], update=True)
    assert "ci" not in str(lab.pve.vm(1000).config["tags"]) and lab.record(1000).tags == []
