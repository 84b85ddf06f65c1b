# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which of the addresses that a guest names is the sandbox's: the rule of docs/inventory.md, case by case."""

from __future__ import annotations

import random
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm.address import (
    Choice,
    choose_address,
    is_agent_on,
)

MAC = "BC:24:11:00:00:01"
CONFIG = {"net0": f"virtio={MAC},bridge=vmbr0", "ipconfig0": "ip=dhcp"}


def nic(name: str, *addresses: str, mac: str = "02:42:00:00:00:09") -> dict[str, Any]:
    kinds = [{"ip-address": text, "ip-address-type": "ipv6" if ":" in text else "ipv4"} for text in addresses]
    return {"name": name, "hardware-address": mac, "ip-addresses": kinds}


def own(*addresses: str, name: str = "eth0") -> dict[str, Any]:
    return nic(name, *addresses, mac=MAC.lower())


LO = nic("lo", "127.0.0.1", "::1", mac="00:00:00:00:00:00")


@pytest.mark.parametrize(
    ("interfaces", "config", "address", "final"),
    [
        # The container bridge sorts before the NIC as text; so does the cluster network; so does a second NIC.
        ([LO, nic("docker0", "172.17.0.1"), own("192.168.1.50")], CONFIG, "192.168.1.50", True),
        ([nic("cni0", "10.42.0.1"), own("192.0.2.9", name="ens18")], CONFIG, "192.0.2.9", True),
        ([nic("eth1", "10.0.0.5"), own("192.0.2.61")], {**CONFIG, "ipconfig0": "ip=192.0.2.61/24"}, "192.0.2.61", True),
        # The static address wins over one that DHCP gave the same interface; it may still have to come.
        (
            [own("192.0.2.9", "192.0.2.61")],
            {**CONFIG, "ipconfig0": "ip=192.0.2.61/24,gw=192.0.2.1"},
            "192.0.2.61",
            True,
        ),
        ([own("192.0.2.9")], {**CONFIG, "ipconfig0": "ip=192.0.2.61/24"}, "192.0.2.9", False),
        ([own("2001:db8::9", "2001:db8::5")], {**CONFIG, "ipconfig0": "ip6=2001:db8::5/64"}, "2001:db8::5", True),
        # IPv6 comes first, IPv4 by DHCP a moment later.
        ([own("fd00::50")], CONFIG, "fd00::50", False),
        ([own("2001:db8::50")], CONFIG, "2001:db8::50", False),
        ([own("fd00::50", "192.0.2.50")], CONFIG, "192.0.2.50", True),
        ([own("fd00::50", "2001:db8::50")], {**CONFIG, "ipconfig0": "ip6=auto"}, "2001:db8::50", True),
        ([own("fd00::50")], {**CONFIG, "ipconfig0": "ip6=auto"}, "fd00::50", False),
        # The order of the guest, not that of the text.
        ([own("192.0.2.50", "10.0.0.1")], CONFIG, "192.0.2.50", True),
        # Windows writes MAC addresses with hyphens.
        (
            [nic("vEthernet (WSL)", "172.20.0.1"), nic("Ethernet", "192.0.2.7", mac=MAC.replace(":", "-"))],
            CONFIG,
            "192.0.2.7",
            True,
        ),
        # A bond, or a bridge over the NIC, has the NIC's address as well.
        ([own(name="eth0"), own("192.0.2.7", name="br0"), nic("docker0", "172.17.0.1")], CONFIG, "192.0.2.7", True),
        # So has a VLAN on it, which is another network.
        ([own("10.0.0.2", name="eth0.100"), own("192.0.2.8")], CONFIG, "192.0.2.8", True),
        ([own("10.0.0.2", name="eth0.100"), own(name="eth0")], CONFIG, "10.0.0.2", True),
        # Without an address yet: no other interface takes its place.
        ([own("fe80::1"), nic("docker0", "172.17.0.1")], CONFIG, None, None),
        # None has the MAC address (it was changed in the guest): other NICs of the configuration, then what nobody
        # made.
        ([nic("docker0", "172.17.0.1"), nic("eth0", "192.0.2.5")], CONFIG, "192.0.2.5", False),
        (
            [nic("eth0", "192.0.2.5"), nic("eth1", "192.0.2.6", mac="bc:24:11:00:00:02")],
            {**CONFIG, "net1": "virtio=BC:24:11:00:00:02,bridge=vmbr1"},
            "192.0.2.6",
            False,
        ),
        ([nic("weave", "10.32.0.1"), nic("ens18", "192.0.2.5")], CONFIG, "192.0.2.5", False),
        ([nic("docker0", "172.17.0.1")], CONFIG, "172.17.0.1", False),
        ([nic("eth0", "192.0.2.5")], {}, "192.0.2.5", True),
        (
            [own("127.0.0.1", "169.254.7.7", "fe80::2%eth0", "224.0.0.1", "0.0.0.0", "::ffff:192.0.2.1")],
            CONFIG,
            None,
            None,
        ),
    ],
)
def test_the_address_is_that_of_the_vms_own_interface(
    interfaces: list[Any], config: dict[str, Any], address: str | None, final: bool | None
) -> None:
    assert choose_address(interfaces, config) == (None if address is None else Choice(address, bool(final)))


ODD: list[Any] = [
    None,
    "eth0",
    7,
    {},
    [],
    [None],
    ["192.0.2.1"],
    [[]],
    [{}],
    [{"ip-addresses": "192.0.2.1"}],
    [{"ip-addresses": ["192.0.2.1"]}],
    [{"ip-addresses": [None, 7, [], {}]}],
    [{"ip-addresses": [{"ip-address": 7}]}],
    [{"ip-addresses": [{"ip-address": 3221225985}]}],
    [{"ip-addresses": [{"ip-address": "192.0.2.1/24"}]}],
    [{"ip-addresses": [{"ip-address": "1" * 100000}]}],
    [{"name": None, "hardware-address": ["x"], "ip-addresses": {}}],
]


@pytest.mark.parametrize("answer", ODD, ids=lambda answer: repr(answer)[:40])
def test_what_a_guest_says_is_data(answer: Any) -> None:
    assert choose_address(answer, CONFIG) is None
    good = own("192.0.2.50")
    if isinstance(answer, list):
        assert choose_address([*answer, good], CONFIG) == Choice("192.0.2.50", True)


def test_answers_of_any_shape_never_crash() -> None:
    chance = random.Random(11)

    def anything(depth: int = 0) -> Any:
        kinds: list[Any] = [None, True, -1, 1.5, "192.0.2.1", "fe80::1%2", "x" * 70, MAC]
        kind = chance.randrange(3 if depth < 4 else 1)
        if kind == 0:
            return chance.choice(kinds)
        if kind == 1:
            return [anything(depth + 1) for _number in range(chance.randrange(4))]
        names = ["name", "hardware-address", "ip-addresses", "ip-address"]
        return {chance.choice(names): anything(depth + 1) for _number in range(chance.randrange(4))}

    for _number in range(3000):
        found = choose_address(anything(), {"net0": anything(), "ipconfig0": anything(), "net1": anything()})
        assert found is None or isinstance(found, Choice)


def test_an_answer_of_any_length_is_looked_at_for_a_moment_only() -> None:
    many = [nic("eth0", *["fe80::1"] * 2000)] * 5000
    assert choose_address(many, CONFIG) is None


@pytest.mark.parametrize(
    ("value", "is_on"),
    [
        ("1", True),
        ("enabled=1", True),
        ("1,fstrim_cloned_disks=1", True),
        ("fstrim_cloned_disks=1,enabled=1", True),
        ("type=virtio,1", True),
        ("Yes", True),
        ("0", False),
        ("enabled=0,fstrim_cloned_disks=1", False),
        ("fstrim_cloned_disks=1", False),
    ],
)
def test_the_guest_agent_is_on_in_whatever_order_the_keys_stand(value: str, is_on: bool) -> None:
    assert is_agent_on({"agent": value}) is is_on
