# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Addresses as guests name them: the right one, at the right time, and an end at once where none will come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import CreationFailed, TaskTimeout
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.operations import address

from support.lab import Lab

pytestmark = pytest.mark.faults

# Far longer than any of these may take: what fails "at once" fails before it.
PATIENT = {"wait_timeout": "60s"}


@pytest.fixture
def lab(one_lab: Lab) -> Iterator[Lab]:
    one_lab.reset()
    one_lab.pve.agent_default = True
    yield one_lab
    one_lab.check_promises()
    one_lab.pve.agent_default = True


def interfaces(vm: Any, *addresses: str) -> list[dict[str, Any]]:
    mac = str(vm.config["net0"]).partition("=")[2].partition(",")[0].lower()
    return [{"name": "docker0", "hardware-address": "02:42:00:00:00:01", "ip-addresses": [{"ip-address": "172.17.0.1"}]},
            {"name": "eth0", "hardware-address": mac, "ip-addresses": [{"ip-address": text} for text in addresses]}]


def test_the_address_of_the_first_nic_is_recorded(lab: Lab) -> None:
    def answer(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            lab.pve.vm(1000).agent = {"interfaces": interfaces(lab.pve.vm(1000), "192.168.1.50")}

    lab.pve.before = answer
    assert lab.create(wait_for_ip=True).ip == "192.168.1.50"


def test_ipv4_by_dhcp_is_waited_for_a_moment(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def answer(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            looks.append(path)
            known = ("fd00::50",) if len(looks) < 4 else ("fd00::50", "192.0.2.50")
            lab.pve.vm(1000).agent = {"interfaces": interfaces(lab.pve.vm(1000), *known)}

    lab.pve.before = answer
    monkeypatch.setattr(address, "GRACE_SECONDS", 30.0)
    assert lab.create(wait_for_ip=True, options=PATIENT).ip == "192.0.2.50"


def test_where_only_ipv6_comes_it_is_taken_after_the_grace(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            lab.pve.vm(1000).agent = {"interfaces": interfaces(lab.pve.vm(1000), "fd00::50", "2001:db8::50")}

    lab.pve.before = answer
    monkeypatch.setattr(address, "GRACE_SECONDS", 0.2)
    assert lab.create(wait_for_ip=True, options=PATIENT).ip == "2001:db8::50"


def test_the_static_address_that_the_creation_itself_writes(lab: Lab) -> None:
    def answer(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            lab.pve.vm(1000).agent = {"interfaces": interfaces(lab.pve.vm(1000), "192.0.2.9", "192.0.2.61")}

    lab.pve.before = answer
    assert lab.create(wait_for_ip=True, ip_config="ip=192.0.2.61/24,gw=192.0.2.1").ip == "192.0.2.61"


# ---- what will not come ----


@pytest.mark.parametrize("option", ["wait_for_ip", "wait_for_cloud_init"])
@pytest.mark.parametrize("how", ["agent: 0", "no agent", "blocked", "stopped"])
def test_waiting_ends_at_once_where_nothing_will_come(lab: Lab, how: str, option: str) -> None:
    template = lab.pve.vm(9000).config
    if how == "agent: 0":
        template["agent"] = "0"
    elif how == "no agent":
        template.pop("agent")

    def spoil(method: str, path: str) -> None:
        vm = lab.pve.vm(1000)
        if "/qemu/1000/agent/" in path and how == "blocked":
            vm.agent_blocks = ("network-get-interfaces", "file-read")
        elif "/qemu/1000/agent/" in path and how == "stopped":
            lab.pve.power(1000, "stopped")

    lab.pve.before = spoil
    began = time.monotonic()
    with pytest.raises(CreationFailed) as refused:
        lab.create(options=PATIENT, **{option: True})
    assert time.monotonic() - began < 30
    causes = {"agent: 0": "agent: 0", "no agent": "agent: not set", "blocked": "is blocked in the guest", "stopped": "does not run any more"}
    assert f"{option}: " in refused.value.message and causes[how] in refused.value.message
    assert lab.pve.vm(1000) is None


# ---- what a guest says is data ----


@pytest.mark.parametrize("result", [
    "[null]", '["192.0.2.1"]', '[{"ip-addresses": ["192.0.2.1"]}]', '[{"ip-addresses": [{"ip-address": [1]}]}]', '{"a": 1}', '"text"', "7",
    "[" * 50_000 + "]" * 50_000, '[{"name": 1, "hardware-address": {}, "ip-addresses": null}]'], ids=lambda text: text[:30])
def test_an_odd_answer_of_the_agent_is_no_address(lab: Lab, result: str) -> None:
    lab.pve.fault("GET", "/agent/network-get-interfaces", "answer", status=200, body=f'{{"data": {{"result": {result}}}}}', times=9999)
    with pytest.raises(TaskTimeout, match="Run again to go on waiting"):
        lab.create(wait_for_ip=True, options={"wait_timeout": "1s"})
    lab.calm()
    assert lab.create(wait_for_ip=True).state == "RUNNING"


@pytest.mark.parametrize("content", [
    "null", '{"v1": null}', '{"v1": {"errors": null}}', '{"v1": {"errors": "abc"}}', '{"v1": {"errors": {}}}', "[" * 50_000, "7", "x" * 2_000_000],
    ids=lambda text: text[:30])
def test_an_odd_result_of_cloud_init_is_no_result(lab: Lab, content: str) -> None:
    def spoil(method: str, path: str) -> None:
        if path.endswith("/agent/file-read"):
            lab.pve.vm(1000).agent["files"] = {"/run/cloud-init/result.json": content}

    lab.pve.before = spoil
    with pytest.raises(TaskTimeout, match="did not report the end of cloud-init"):
        lab.create(wait_for_cloud_init=True, options={"wait_timeout": "1s"})
    lab.pve.before = None
    lab.pve.vm(1000).agent["files"] = {"/run/cloud-init/result.json": '{"v1": {"errors": []}}'}
    assert lab.create(wait_for_cloud_init=True).state == "RUNNING"
