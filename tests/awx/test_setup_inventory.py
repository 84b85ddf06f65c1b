# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The set-up of AWX: inventory, Galaxy credential, execution environment."""

from __future__ import annotations

import json

import pytest

from support.awx import Awx
from support.awx_setup import SetUp, add_second_organization, read_failure, read_task_lines


@pytest.mark.parametrize("hosts, sentence", [
    ("nosuch", "the inventory proxmox has no group or host nosuch"), ("empty", "has no group or host empty with a "
                                                                               "host in it")])  # fmt: skip
def test_hosts_that_the_inventory_lacks_are_refused(awx: Awx, set_up: SetUp, hosts: str, sentence: str) -> None:
    """W12: such a job would be successful in AWX without doing anything."""
    awx.add("groups", name="empty", inventory=awx.find_named("inventories", "proxmox")["id"])
    assert sentence in read_failure(set_up(awx_hosts=hosts)) and awx.writes == []
    set_up(awx_hosts="pve1").ok()


def test_a_group_of_several_hosts_is_remarked(awx: Awx, set_up: SetUp) -> None:
    """W3: the playbooks refuse such a group."""
    awx.add_inventory("three", 1, hosts=("pve11", "pve12", "pve13"))
    run = set_up(awx_inventory="three").ok()
    assert "the group pve has 3 hosts; create, renew, destroy and job refuse" in read_task_lines(run)
    run = set_up(awx_inventory="three", awx_allow_many_hosts=True).ok()
    assert "refuse" not in read_task_lines(run)
    extra = json.loads(awx.find_named("job_templates", "agentlab - create")["extra_vars"])
    assert extra == {"agentlab_hosts": "pve", "agentlab_allow_many_hosts": True}


def test_an_inventory_that_is_filled_by_a_source_may_be_empty_yet(awx: Awx, set_up: SetUp) -> None:
    awx.add("inventories", name="dynamic", organization=1, has_inventory_sources=True)
    assert "has no host for pve yet" in read_task_lines(set_up(awx_inventory="dynamic").ok())


def test_an_organization_without_a_galaxy_credential_is_refused(awx: Awx, set_up: SetUp) -> None:
    """W15: AWX would install no collection, and every job would fail."""
    awx.related["organizations", 1, "galaxy_credentials"] = []
    sentence = read_failure(set_up())
    assert (
        "the organization Default has no Galaxy credential" in sentence
        and "awx_galaxy_check" in sentence
        and awx.writes == []
    )
    set_up(awx_galaxy_check=False).ok()


def test_an_execution_environment_of_another_organization_is_not_used(awx: Awx, set_up: SetUp) -> None:
    second = add_second_organization(awx)
    awx.add("execution_environments", name="theirs", image="x", organization=second)
    everybodys = awx.add("execution_environments", name="everybody's", image="x")
    assert "one of that name belongs to Second" in read_failure(set_up(awx_execution_environment="theirs"))
    assert "has none named nosuch" in read_failure(set_up(awx_execution_environment="nosuch"))
    set_up(awx_execution_environment="everybody's").ok()
    assert {row["execution_environment"] for row in awx.objects["job_templates"]} == {everybodys}
