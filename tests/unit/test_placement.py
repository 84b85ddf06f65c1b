# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The choice of a node: a table of cases, and properties that hold for every cluster."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.nodes import Node, Preference, Room, Rules, Vm
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.placement import (
    CHOSEN,
    REASONS,
    Decision,
    Load,
    Reservation,
    Wish,
    decide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1024**3
ROOT = Path(__file__).resolve().parents[2]


def node(name: str, free: int | None = 32, total: int = 64, **values: Any) -> Node:
    """Return an online node with so many GiB of free memory; None: a node without figures."""
    if free is None:
        return Node(name, **values)
    return Node(name, memory=total * GIB, used=(total - free) * GIB, cpus=values.pop("cpus", 16), **values)


def prefer(kind: str, value: str, *nodes: str) -> tuple[Preference, ...]:
    return (Preference(kind, value, frozenset(nodes)),)


WISH = Wish(memory=4 * GIB, cpus=2, template="debian-13")
A, B, C = node("a", 10), node("b", 30), node("c", 20)
ALL = {"local": Room(True, 100 * GIB, 50 * GIB)}

# name, nodes, VMs, load, wish, rules -> the node that is chosen, and words for some of the others
TABLE: list[tuple[str, list[Node], dict[int, Vm], Load, Wish, Rules, str | None, dict[str, str]]] = [
    ("most free memory", [A, B, C], {}, Load(), WISH, Rules(), "b", {"a": "less_suitable", "c": "less_suitable"}),
    ("fullest that fits", [A, B, C], {}, Load(), WISH, Rules("pack"), "a", {"b": "less_suitable"}),
    (
        "fullest that still fits",
        [node("a", 3), B, C],
        {},
        Load(),
        WISH,
        Rules("pack"),
        "c",
        {"a": "memory", "b": "less_suitable"},
    ),
    ("the name decides a tie", [node("b"), node("a")], {}, Load(), WISH, Rules(), "a", {"b": "less_suitable"}),
    (
        "fewer sandboxes decide a tie",
        [node("b"), node("a")],
        {},
        Load({"a": 1}),
        WISH,
        Rules(),
        "b",
        {"a": "less_suitable"},
    ),
    ("offline", [replace(B, online=False), A], {}, Load(), WISH, Rules(), "a", {"b": "offline"}),
    ("HA maintenance", [replace(B, maintenance=True), A], {}, Load(), WISH, Rules(), "a", {"b": "maintenance"}),
    ("allow list", [A, B, C], {}, Load(), WISH, Rules(nodes=frozenset({"a"})), "a", {"b": "not_allowed"}),
    ("template elsewhere", [replace(B, template=False), A], {}, Load(), WISH, Rules(), "a", {"b": "template"}),
    (
        "a node that failed is left",
        [replace(B, refused=("failed", "clone: disk full")), A],
        {},
        Load(),
        WISH,
        Rules(),
        "a",
        {"b": "failed"},
    ),
    (
        "storage missing, inactive, full",
        [
            node("a", 10, storages=ALL),
            node("b", storages={}),
            node("c", storages={"local": Room(False)}),
            node("d", storages={"local": Room(True, 100 * GIB, 24 * GIB)}),
        ],
        {},
        Load(),
        replace(WISH, storage="local", disk=20 * GIB),
        Rules(),
        "a",
        {"b": "storage", "c": "storage", "d": "storage"},
    ),
    (
        "room that is being taken counts",
        [node("a", 10, storages=ALL), node("b", 30, storages=ALL)],
        {},
        Load(reservations=(Reservation(1, "b", 0, "local", 30 * GIB),)),
        replace(WISH, storage="local", disk=20 * GIB),
        Rules(),
        "a",
        {"b": "storage"},
    ),
    (
        "room of a shared storage that is being taken from another node",
        [node("b", 30, storages={"nfs": Room(True, 100 * GIB, 50 * GIB, True)})],
        {},
        Load(reservations=(Reservation(1, "a", 0, "nfs", 30 * GIB),)),
        replace(WISH, storage="nfs", disk=20 * GIB),
        Rules(),
        None,
        {"b": "storage"},
    ),
    (
        "a linked clone lies with its template",
        [node("a", 10, storages=ALL, storage="local", disk=0), node("b", storages=ALL, storage="fast", disk=0)],
        {},
        Load(),
        WISH,
        Rules(),
        "a",
        {"b": "storage"},
    ),
    (
        "storages that are hidden say nothing",
        [node("a", 10), node("b", 30)],
        {},
        Load(),
        replace(WISH, storage="local"),
        Rules(),
        "b",
        {"a": "less_suitable"},
    ),
    (
        "bridge",
        [node("a", 10, bridges=frozenset({"vmbr0"})), node("b", bridges=frozenset())],
        {},
        Load(),
        replace(WISH, bridges=frozenset({"vmbr0"})),
        Rules(),
        "a",
        {"b": "bridge"},
    ),
    ("CPUs", [A, node("b", cpus=1)], {}, Load(), WISH, Rules(), "a", {"b": "cpus"}),
    ("memory", [node("a", 3), node("b", 2)], {}, Load(), WISH, Rules(), None, {"a": "memory", "b": "memory"}),
    (
        "what is being created counts",
        [A, B],
        {},
        Load(reservations=tuple(Reservation(n, "b", 8 * GIB) for n in range(3))),
        WISH,
        Rules(),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "a young sandbox counts in full, and what it uses only once",
        [node("a", 20), node("b", 26)],
        {7: Vm("b", GIB, 8 * GIB, 60)},
        Load(),
        WISH,
        Rules(),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "a settled sandbox counts with what it uses",
        [node("a", 20), node("b", 26)],
        {7: Vm("b", GIB, 8 * GIB, 601)},
        Load(reservations=(Reservation(7, "b", 8 * GIB, creating=False),)),
        WISH,
        Rules(),
        "b",
        {"a": "less_suitable"},
    ),
    (
        "placement.settle",
        [node("a", 20), node("b", 26)],
        {7: Vm("b", GIB, 8 * GIB, 601)},
        Load(),
        WISH,
        Rules(settle=700),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "a sandbox that moved counts where it is",
        [node("a", 20), node("b", 26)],
        {7: Vm("b", 0, 8 * GIB, 60)},
        Load(reservations=(Reservation(7, "a", 8 * GIB, creating=False),)),
        WISH,
        Rules(),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "max_per_node",
        [A, B],
        {},
        Load({"b": 2}),
        WISH,
        Rules(max_per_node=2),
        "a",
        {"b": "max_per_node"},
    ),
    (
        "no figures: fewest sandboxes",
        [node("a", None), node("b", 30), node("c", None)],
        {},
        Load({"a": 2, "b": 3, "c": 1}),
        WISH,
        Rules(),
        "c",
        {"a": "less_suitable", "b": "less_suitable"},
    ),
    (
        "no figures, packed: most sandboxes",
        [node("a", None), node("c", None)],
        {},
        Load({"a": 2, "c": 1}),
        WISH,
        Rules("pack"),
        "a",
        {"c": "less_suitable"},
    ),
    (
        "prefer by tag",
        [A, B],
        {},
        Load(),
        replace(WISH, tags=frozenset({"gpu"})),
        Rules(prefer=prefer("tag", "gpu", "a")),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "a preference of others means nothing",
        [A, B],
        {},
        Load(),
        WISH,
        Rules(prefer=prefer("tag", "gpu", "a")),
        "b",
        {},
    ),
    (
        "a preferred node that is full",
        [node("a", 1), B],
        {},
        Load(),
        replace(WISH, profile="ci"),
        Rules(prefer=prefer("profile", "ci", "a")),
        "b",
        {"a": "memory"},
    ),
    (
        "avoid by profile",
        [A, B],
        {},
        Load(),
        replace(WISH, profile="ci"),
        Rules(avoid=prefer("profile", "ci", "b")),
        "a",
        {"b": "less_suitable"},
    ),
    (
        "avoided, but the last one",
        [B],
        {},
        Load(),
        replace(WISH, profile="ci"),
        Rules(avoid=prefer("profile", "ci", "b")),
        "b",
        {},
    ),
    (
        "anti-affinity",
        [A, B],
        {},
        Load(same={"b": 1}),
        replace(WISH, profile="ci"),
        Rules(anti_affinity="profile"),
        "a",
        {"b": "less_suitable"},
    ),
    ("no nodes", [], {}, Load(), WISH, Rules(), None, {}),
]


@pytest.mark.parametrize("case", TABLE, ids=[row[0] for row in TABLE])
def test_the_table_of_wishes_decides_the_node(case: Any) -> None:
    _name, nodes, vms, load, wish, rules, chosen, words = case
    decision = decide(nodes, vms, load, wish, rules)
    assert decision.node == chosen
    verdicts = {verdict.node: verdict for verdict in decision.verdicts}
    assert set(verdicts) == {one.name for one in nodes}
    assert {name: verdicts[name].reason for name in words} == words
    assert all(verdict.reason in (*REASONS, CHOSEN) and verdict.message for verdict in decision.verdicts)
    assert decide(list(reversed(nodes)), vms, load, wish, rules) == decision


def test_missing_figures_are_told() -> None:
    decision = decide([node("a", None)], {}, Load(), WISH, Rules())
    assert decision.by == "sandboxes" and "Sys.Audit on /nodes" in decision.verdicts[0].message
    assert decision.public()["nodes"][0]["free_memory"] is None


def test_no_node_fits_names_each() -> None:
    decision = decide([node("a", 3), replace(B, online=False)], {}, Load(), WISH, Rules())
    assert decision.explain_none() == (
        "a: 3072 MiB of its memory are free beyond what is used and promised, and the sandbox needs 4096 MiB; "
        "b: it is offline"
    )


def test_a_node_that_promised_more_than_it_has_shows_no_negative_room() -> None:
    load = Load(reservations=tuple(Reservation(number, "a", 8 * GIB) for number in range(3)))
    assert decide([A], {}, load, WISH, Rules()).explain_none().startswith("a: 0 MiB of its memory are free")


def test_the_page_explains_each_reason() -> None:
    page = (ROOT / "docs/placement.md").read_text(encoding="utf-8")
    assert [word for word in REASONS if f"`{word}`" not in page] == []


# ---- properties ----

NAMES = ("a", "b", "c", "d")
SIZES = st.integers(0, 64).map(lambda size: size * GIB)
rooms = st.builds(Room, st.booleans(), st.none() | SIZES, st.none() | SIZES, st.booleans())
wishes = st.builds(
    Wish,
    memory=st.integers(0, 16).map(lambda size: size * GIB),
    cpus=st.integers(0, 8),
    storage=st.sampled_from([None, "fast", "slow"]),
    disk=st.integers(0, 16).map(lambda size: size * GIB),
    bridges=st.frozensets(st.sampled_from(["vmbr0", "vmbr1"])),
    profile=st.sampled_from([None, "ci"]),
    tags=st.frozensets(st.sampled_from(["gpu"])),
)
preferences = st.lists(
    st.builds(Preference, st.just("tag"), st.just("gpu"), st.frozensets(st.sampled_from(NAMES))), max_size=2
).map(tuple)
all_rules = st.builds(
    Rules,
    strategy=st.sampled_from(["spread", "pack"]),
    nodes=st.none() | st.frozensets(st.sampled_from(NAMES)),
    prefer=preferences,
    avoid=preferences,
    anti_affinity=st.sampled_from([None, "tag"]),
    max_per_node=st.none() | st.integers(1, 3),
    reserve=st.integers(0, 20),
)


@st.composite
def clusters(draw: Any) -> list[Node]:
    return [
        Node(
            name,
            online=draw(st.booleans()),
            maintenance=draw(st.sampled_from([False, False, True])),
            memory=draw(st.none() | SIZES),
            used=draw(SIZES),
            cpus=draw(st.none() | st.integers(1, 8)),
            storages=draw(st.none() | st.dictionaries(st.sampled_from(["fast", "slow"]), rooms)),
            bridges=draw(st.none() | st.frozensets(st.sampled_from(["vmbr0", "vmbr1"]))),
            template=draw(st.sampled_from([True, True, False])),
            refused=draw(st.sampled_from([None, None, ("failed", "it failed")])),
        )
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    ]


reservations = st.lists(
    st.builds(
        Reservation,
        st.integers(100, 110),
        st.sampled_from(NAMES),
        SIZES,
        st.sampled_from([None, "fast"]),
        SIZES,
        st.booleans(),
    ),
    unique_by=lambda one: one.vmid,
    max_size=4,
).map(tuple)
vms = st.dictionaries(
    st.integers(100, 110), st.builds(Vm, st.sampled_from(NAMES), SIZES, st.none() | SIZES, st.integers(0, 1200))
)
loads = st.builds(
    Load, st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4)), st.just({}), reservations=reservations
)


@settings(max_examples=150, deadline=None)
@given(clusters(), vms, loads, wishes, all_rules)
def test_a_chosen_node_has_what_is_needed(
    nodes: list[Node], listed: dict[int, Vm], load: Load, wish: Wish, rules: Rules
) -> None:
    decision = decide(nodes, listed, load, wish, rules)
    assert decision == decide(nodes[::-1], dict(reversed(listed.items())), load, wish, rules)
    assert {verdict.node for verdict in decision.verdicts} == {one.name for one in nodes}
    fitting = [one.name for one in nodes if has_all(one, listed, load, wish, rules)]
    assert (decision.node in fitting) if fitting else decision.node is None
    passed_over = {verdict.node for verdict in decision.verdicts if verdict.reason not in (CHOSEN, "less_suitable")}
    assert passed_over == {one.name for one in nodes} - set(fitting)


def has_all(one: Node, listed: dict[int, Vm], load: Load, wish: Wish, rules: Rules) -> bool:
    """Say anew, in the plainest way, whether a node has everything that the wish needs."""
    if not one.online or one.maintenance or not one.template or one.refused:
        return False
    if rules.nodes is not None and one.name not in rules.nodes:
        return False
    if rules.max_per_node is not None and load.sandboxes.get(one.name, 0) >= rules.max_per_node:
        return False
    if one.cpus is not None and wish.cpus > one.cpus:
        return False
    if one.bridges is not None and wish.bridges - one.bridges:
        return False
    if wish.storage and one.storages is not None:
        room = one.storages.get(wish.storage)
        if room is None or not room.active:
            return False
        if room.free is not None:
            taken = sum(
                reservation.disk
                for reservation in load.reservations
                if reservation.creating
                and reservation.storage == wish.storage
                and (room.shared or reservation.node == one.name)
            )
            if room.free - taken - (room.total or 0) * rules.reserve // 100 < max(wish.disk, 1):
                return False
    if one.memory is None or one.used is None:
        return True
    by_vmid = {reservation.vmid: reservation for reservation in load.reservations}
    taken = one.used
    for vmid in by_vmid.keys() | listed.keys():
        reservation, vm = by_vmid.get(vmid), listed.get(vmid)
        if reservation is not None and reservation.creating and vm is not None and vm.uptime >= rules.settle:
            vm = None
        if vm is not None and vm.uptime >= rules.settle:
            continue
        place = reservation.node if reservation and (reservation.creating or vm is None) else vm.node if vm else ""
        size = reservation.memory if reservation else (vm.memory if vm else None) or 0
        if place == one.name:
            taken += max(0, size - (vm.used if vm else 0))
    return wish.memory <= one.memory - taken


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 60), st.sampled_from(["spread", "pack"]))
def test_a_burst_never_promises_more_than_there_is_and_spreads(count: int, burst: int, strategy: str) -> None:
    """Nobody sees a VM yet: all that counts is what the others have reserved."""
    nodes = [node(f"n{number:02}", 32, 32) for number in range(count)]
    load = Load()
    for number in range(burst):
        decision = decide(nodes, {}, load, WISH, Rules(strategy))
        if decision.node is None:
            assert number == count * 8
            break
        load = Load(
            {**load.sandboxes, decision.node: load.sandboxes.get(decision.node, 0) + 1},
            reservations=(*load.reservations, Reservation(1000 + number, decision.node, WISH.memory)),
        )
    on_each = [load.sandboxes.get(one.name, 0) for one in nodes]
    assert max(on_each) <= 8 and (strategy == "pack" or max(on_each) - min(on_each) <= 1)


def test_sixteen_nodes_and_ten_thousand_vms_take_milliseconds() -> None:
    nodes = [node(f"n{number:02}", 512, 1024) for number in range(16)]
    pick = random.Random(1)
    listed = {vmid: Vm(f"n{pick.randrange(16):02}", GIB, 2 * GIB, pick.randrange(3000)) for vmid in range(1000, 11000)}
    load = Load({one.name: 600 for one in nodes})
    times = []
    for _number in range(5):
        began = time.thread_time()
        chosen: Decision = decide(nodes, listed, load, WISH, Rules())
        times.append(time.thread_time() - began)
    # Two milliseconds on a quiet machine (docs/performance.md); this machine may be a busy one.
    assert chosen.node is not None and min(times) < 0.02


# ---- the configuration ----


def loaded(tmp_path: Path, text: str) -> Rules:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load({"config_file": str(path)}, {}).placement


def test_the_configuration_sets_the_rules(tmp_path: Path) -> None:
    text = (
        "placement:\n  strategy: pack\n  nodes: pve1, pve2\n  prefer:\n    - {tag: GPU, nodes: [pve3]}\n"
        "  avoid: {profile: ci, nodes: pve1}\n  anti_affinity: tag\n  max_per_node: 20\n  settle: 5m\n  reserve: 10\n"
    )
    assert loaded(tmp_path, text) == Rules(
        "pack",
        frozenset({"pve1", "pve2"}),
        prefer("tag", "gpu", "pve3"),
        prefer("profile", "ci", "pve1"),
        "tag",
        20,
        300,
        10,
    )
    assert loaded(tmp_path, "placement:\n") == loaded(tmp_path, "placement: {}\n") == Rules()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("placement: pack", "placement: 'pack' is not valid. Valid: a mapping of strategy, nodes"),
        ("placement: {stratgy: pack}", "placement: 'stratgy' is no key of it. Valid: strategy, nodes"),
        ("placement: {strategy: best}", "placement.strategy: 'best' is not valid. Valid: spread, pack"),
        ("placement: {anti_affinity: true}", "placement.anti_affinity: 'True' is not valid. Valid: profile, tag"),
        ("placement: {nodes: [pve1, 'a b/c']}", "placement.nodes: "),
        ("placement: {prefer: [gpu]}", "placement.prefer: 'gpu' is not valid. Valid: a list of mappings"),
        ("placement: {avoid: [{tag: x, profile: y, nodes: [a]}]}", "placement.avoid: that mapping is not valid"),
        ("placement: {avoid: [{tag: x, nodes: []}]}", "placement.avoid: that mapping names no node"),
        ("placement: {max_per_node: 0}", "placement.max_per_node: '0' is not valid"),
        ("placement: {settle: soon}", "placement.settle: 'soon' is not"),
        ("placement: {reserve: 100}", "placement.reserve: '100' is not valid. Valid: a whole number from 0 to 99"),
    ],
)
def test_a_wrong_rule_is_refused_by_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        loaded(tmp_path, text)
    assert caught.value.message.startswith(message), caught.value.message
