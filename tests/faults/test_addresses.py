# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Addresses as guests name them: the right one, at the right time, and an end at once where none will come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import CreationFailed, TaskTimeout
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import address

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
    return [
        {"name": "docker0", "hardware-address": "02:42:00:00:00:01", "ip-addresses": [{"ip-address": "172.17.0.1"}]},
        {"name": "eth0", "hardware-address": mac, "ip-addresses": [{"ip-address": text} for text in addresses]},
    ]


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
@pytest.mark.parametrize("how", ["agent: 0", "no agent", "blocked", "too old", "unsupported", "stopped"])
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

    words = {
        "too old": "The command {} has not been found",
        "unsupported": "this feature or command is not currently supported",
    }
    for command, name in (("network-get-interfaces", "guest-network-get-interfaces"), ("file-read", "guest-file-open")):
        if how in words:
            body = json.dumps({"data": None, "message": f"Agent error: {words[how].format(name)}"})
            lab.pve.fault("GET", f"/agent/{command}", "answer", status=500, body=body, times=99)

    lab.pve.before = spoil
    began = time.monotonic()
    with pytest.raises(CreationFailed) as refused:
        lab.create(options=PATIENT, **{option: True})
    assert time.monotonic() - began < 30
    causes = {
        "agent: 0": "agent: 0",
        "no agent": "agent: not set",
        "blocked": "is blocked in the guest",
        "too old": "(it is too old",
        "unsupported": "(it is too old",
        "stopped": "does not run any more",
    }
    assert f"{option}: " in refused.value.message and causes[how] in refused.value.message
    assert lab.pve.vm(1000) is None


# ---- what a guest says is data ----


@pytest.mark.parametrize(
    "result",
    [
        "[null]",
        '["192.0.2.1"]',
        '[{"ip-addresses": ["192.0.2.1"]}]',
        '[{"ip-addresses": [{"ip-address": [1]}]}]',
        '{"a": 1}',
        '"text"',
        "7",
        "[" * 50_000 + "]" * 50_000,
        '[{"name": 1, "hardware-address": {}, "ip-addresses": null}]',
    ],
    ids=lambda text: text[:30],
)
def test_an_odd_answer_of_the_agent_is_no_address(lab: Lab, result: str) -> None:
    lab.pve.fault(
        "GET",
        "/agent/network-get-interfaces",
        "answer",
        status=200,
        body=f'{{"data": {{"result": {result}}}}}',
        times=9999,
    )
    with pytest.raises(TaskTimeout, match="Run again to go on waiting"):
        lab.create(wait_for_ip=True, options={"wait_timeout": "1s"})
    lab.calm()
    assert lab.create(wait_for_ip=True).state == "RUNNING"


@pytest.mark.parametrize(
    "content",
    [
        "null",
        '{"v1": null}',
        '{"v1": {"errors": null}}',
        '{"v1": {"errors": "abc"}}',
        '{"v1": {"errors": {}}}',
        "[" * 50_000,
        "7",
        "x" * 2_000_000,
    ],
    ids=lambda text: text[:30],
)
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


LOOK = "GET /nodes/{node}/qemu/{vmid}/agent/network-get-interfaces"


def name_address(lab: Lab, vmid: int, text: str) -> None:
    """Let the guest have this address from now on, as after another DHCP lease."""
    lab.pve.vm(vmid).agent = {"interfaces": interfaces(lab.pve.vm(vmid), text)}


def make_old(lab: Lab, vmid: int, seconds: int = 3600) -> int:
    """Let the recorded address have been named so many seconds ago; return that time."""
    at = lab.clock.now() - seconds
    query = "UPDATE sandboxes SET ip_seen_at = ? WHERE vmid = ?"
    lab.context().database.write(lambda conn: conn.execute(query, (at, vmid)) and None)
    return at


def test_an_address_says_when_it_was_named(lab: Lab) -> None:
    before = lab.clock.now()
    made = lab.create(wait_for_ip=True)
    assert made.ip and made.ip_seen_at is not None and before <= made.ip_seen_at <= lab.clock.now()
    assert lab.create("a2").ip_seen_at is None


def test_a_start_looks_once_for_another_address(lab: Lab) -> None:
    made = lab.create(wait_for_ip=True)
    lab.power("stop", made.vmid)

    def lease(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            name_address(lab, made.vmid, "192.0.2.200")

    lab.pve.before = lease
    lab.pve.counted.clear()
    assert lab.power("start", made.vmid).sandbox.ip == "192.0.2.200"
    assert lab.pve.counted[LOOK] == 1 and lab.record(made).ip_seen_at


def test_an_address_from_before_a_start_is_told_as_old(lab: Lab) -> None:
    """The guest still boots: the start does not wait, and the address on record is not taken for a new one."""
    made = lab.create(wait_for_ip=True)
    lab.power("stop", made.vmid)
    lab.pve.fail("GET", "/agent/network-get-interfaces", 500, "QEMU guest agent is not running", times=1)
    lab.pve.counted.clear()
    started = lab.power("start", made.vmid).sandbox
    assert (started.state, started.ip, started.public()["ip_seen_at"]) == ("RUNNING", made.ip, None)
    assert lab.pve.counted[LOOK] == 1


@pytest.mark.parametrize("why", ["no address on record", "agent off"])
def test_a_start_asks_no_guest_for_nothing(lab: Lab, why: str) -> None:
    made = lab.create(wait_for_ip=why == "agent off")
    lab.power("stop", made.vmid)
    if why == "agent off":
        lab.pve.vm(made.vmid).config["agent"] = "0"
    lab.pve.counted.clear()
    assert lab.power("start", made.vmid).changed and lab.pve.counted[LOOK] == 0


def test_a_reconcile_corrects_an_old_address(lab: Lab) -> None:
    made, other = lab.create(wait_for_ip=True), lab.create("a2", wait_for_ip=True)
    # Named just now: it is not asked for.
    name_address(lab, made.vmid, "192.0.2.201")
    lab.pve.counted.clear()
    assert lab.reconcile() == [] and lab.pve.counted[LOOK] == 0
    make_old(lab, made.vmid)
    seen = make_old(lab, other.vmid)
    generation = lab.record(other).generation
    [drift] = lab.reconcile(apply=False)
    assert (drift.kind, drift.vmid or drift.sandbox.vmid, drift.evidence) == (
        "address",
        made.vmid,
        {"ip": "192.0.2.201", "was": made.ip},
    )
    assert lab.record(made).ip == made.ip and lab.record(other).ip_seen_at == seen
    [drift] = lab.reconcile()
    assert drift.applied and lab.record(made).ip == "192.0.2.201" and lab.record(made).ip_seen_at
    # The same address is seen again, which is no change.
    now = lab.record(other)
    assert now.ip == other.ip and now.ip_seen_at > seen and now.generation == generation
    assert lab.reconcile() == []


def test_a_reconcile_finds_an_address_that_nobody_waited_for(lab: Lab) -> None:
    made, off = lab.create("a1"), lab.create("a2")
    lab.pve.vm(off.vmid).config["agent"] = "0"
    lab.pve.counted.clear()
    # A record that had no address is completed: that is no difference to report.
    assert lab.reconcile(apply=False) == [] and lab.record(made).ip is None
    lab.pve.counted.clear()
    assert lab.reconcile() == [] and lab.pve.counted[LOOK] == 1
    assert lab.record(made).ip and lab.record(made).ip_seen_at and lab.record(off).ip is None
    assert [event["evidence"]["ip"] for event in lab.events(made) if event["operation"] == "address"] == [
        lab.record(made).ip
    ]


def test_silent_guests_hold_a_reconcile_up_for_a_bounded_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        lab.create(f"a{number}")
    lab.pve.fail("GET", "/agent/network-get-interfaces", 500, "QEMU guest agent is not running", times=999)
    monkeypatch.setattr(address, "MOST_LOOKS", 4)
    lab.pve.counted.clear()
    assert lab.reconcile() == [] and lab.pve.counted[LOOK] == 4
    monkeypatch.setattr(address, "LOOK_SECONDS", -1.0)
    lab.pve.counted.clear()
    assert lab.reconcile() == [] and lab.pve.counted[LOOK] == 0


def test_a_verify_shows_the_address_of_now_and_writes_nothing(lab: Lab) -> None:
    made = lab.create(wait_for_ip=True)
    lab.pve.counted.clear()
    assert lab.info()["sandboxes"][0]["ip"] == made.ip and lab.pve.counted[LOOK] == 0
    name_address(lab, made.vmid, "192.0.2.202")
    seen = make_old(lab, made.vmid)
    before = lab.record(made)
    [shown] = lab.info()["sandboxes"]
    assert shown["ip"] == "192.0.2.202" and shown["ip_seen_at"] > clock.format_utc(seen)
    assert (
        shown["drift"]
        == f"the record has the address {made.ip}, the guest has 192.0.2.202; reconcile corrects the record"
    )
    assert lab.record(made) == before
    assert lab.info(verify=False)["sandboxes"][0]["ip"] == made.ip


def test_the_address_of_a_vm_that_came_in_the_place_of_ours_is_not_recorded(lab: Lab) -> None:
    made = lab.create()

    def swap(method: str, path: str) -> None:
        if path.endswith("/agent/network-get-interfaces"):
            lab.pve.before = None
            # A copy made by hand has the MAC address, too.
            lab.swap(made.vmid, running=True).config.update(net0=mac, agent="1")
            name_address(lab, made.vmid, "192.0.2.203")

    mac = lab.pve.vm(made.vmid).config["net0"]
    lab.pve.before = swap
    lab.reconcile()
    assert "192.0.2.203" not in [sandbox.ip for sandbox in lab.records()]
