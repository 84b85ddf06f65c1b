# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many at once: real processes on one database and one Proxmox VE, with random faults; two operations at the same
moment; renewal against expiry.

A failing run is replayed with AGENTLAB_TEST_SEED=<the seed it printed> (the choices are the same; how processes meet is
up to the machine).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease

from faults.conftest import SEED as FAULTS_SEED
from faults.crash_support import BYSTANDER, REQUEST_FAULTS, TASK_FAULTS, Rig
from support.engines import ENGINES

pytestmark = pytest.mark.faults

SEED = int(os.environ.get("AGENTLAB_TEST_SEED") or 0)
PROCESSES = 7
SECONDS = 10

# Nobody may wait longer: claim_timeout, doubt_window and wait_timeout of the test's configuration, and some requests.
BOUND = 60


# For tests that hold on either engine of the records; the others are about SQLite's files, or about no engine.
on_both_engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture
def engine() -> str:
    return "sqlite"


@pytest.fixture
def rig(tmp_path: Path, engine: str) -> Iterator[Rig]:
    made = Rig(tmp_path, time_scale=0.02, engine=engine)
    made.foreign(BYSTANDER, name="bystander", running=True, tags="agentlab")
    yield made
    made.stop()


def _break(rig: Rig, dice: random.Random) -> None:
    """One random fault for whoever comes next."""
    if dice.random() < 0.15:
        kind, text = dice.choice(TASK_FAULTS)
        rig.spoil(kind, text)
        time.sleep(0.1)
        rig.in_loop(lambda: (rig.pve.task_endings.clear(), rig.task_fails.clear()))
        return
    method, suffix, how = dice.choice(REQUEST_FAULTS)
    if isinstance(how, int):
        rig.in_loop(
            lambda: rig.pve.fault(
                method, suffix, "answer", status=how, body='{"data": null, "message": "made up by the test"}'
            )
        )
    else:
        rig.in_loop(lambda: rig.pve.fault(method, suffix, how))


def _settle(rig: Rig) -> None:
    """No more faults; then what a scheduler does, until nothing is under way."""
    rig.well()
    rig.idle()
    time.sleep(1.5)
    for _dummy in range(3):
        rig.must("reconcile")


def _remove_all(rig: Rig) -> list[str]:
    """Whatever is left can be removed by its owner."""
    left = [row["vmid"] for row in rig.records() if row["state"] != "DESTROYED"]
    if left:
        found = rig.do("destroy", vmids=left, force=True)
        if not found["result"]["ok"]:
            return [f"not removed: {found['result']}"]
    return []


@pytest.mark.parametrize(
    ("engine", "number"), [*(("sqlite", number) for number in range(1 if SEED else 3)), ("postgresql", 0)]
)
def test_many_processes_at_once_keep_the_promises(rig: Rig, number: int) -> None:
    seed = SEED or random.SystemRandom().randrange(1, 10**6)
    print(f"\nAGENTLAB_TEST_SEED={seed}")
    dice = random.Random(seed)
    words = [
        "create",
        "renew",
        "expire",
        "force",
        "destroy",
        "prune",
        "reconcile",
        "stop",
        "start",
        "suspend",
        "complete",
    ]
    weights = [6, 6, 2, 3, 2, 2, 2, 3, 3, 1, 1]
    jobs = [
        {
            **rig.job("wander", bound=SECONDS + BOUND),
            "seed": seed * 100 + number,
            "seconds": SECONDS,
            "words": words,
            "weights": weights,
        }
        for number in range(PROCESSES)
    ]
    answers: list[dict[str, Any]] = []
    runner = threading.Thread(target=lambda: answers.extend(rig.zygote.run(jobs)))
    began = time.monotonic()
    runner.start()
    broken = 0
    while runner.is_alive() and time.monotonic() - began < SECONDS:
        _break(rig, dice)
        broken += 1
        time.sleep(dice.uniform(0.02, 0.4))
    rig.well()
    runner.join(SECONDS + BOUND + 30)
    took = time.monotonic() - began
    assert not runner.is_alive() and all(not one["late"] and one["result"] for one in answers), (
        f"a process did not end: {answers}"
    )
    told = [step for one in answers for step in one["result"]["told"]]
    problems = []
    for step in told:
        text = str(step.get("message")) + str(step.get("outcomes"))
        if (
            step.get("code") == "trace"
            or "database is locked" in text
            or "Traceback" in text
            or step.get("code") == "store"
        ):
            problems.append(step)
    slowest = max(step["took"] for step in told)
    ended = Counter(f"{step['op']}:{'ok' if step['ok'] else step.get('code') or 'item failed'}" for step in told)
    print(
        f"{len(told)} operations, {broken} faults, {took:.0f} s, slowest {slowest:.1f} s, {len(rig.records())} "
        f"sandboxes, {dict(ended)}"
    )
    assert not problems, problems
    assert slowest < BOUND
    wrong = rig.broken(settled=False)
    assert not wrong, wrong
    _settle(rig)
    wrong = [text for text in rig.broken() if not _waits_for_its_owner(rig, text)]
    wrong += _remove_all(rig)
    assert not wrong, wrong
    wrong = rig.broken()
    assert not wrong, wrong
    assert [vm.vmid for vm in rig.pve.vms if not vm.template] == [BYSTANDER]


def _waits_for_its_owner(rig: Rig, text: str) -> bool:
    # A creation given up before it was bound keeps its journal: a later destroy tells its VM by it.
    return text.startswith("operation left behind") and "'kind': 'create'" in text


def test_many_open_a_database_that_is_not_there_yet(rig: Rig) -> None:
    """Whoever comes second must not take the half of the first one's work that it sees for another program's file."""
    for number in range(30):
        rig.env = {**rig.env, "AGENTLAB_DATABASE": str(rig.folder / f"new{number}.db")}
        soon = time.time() + 0.05
        answers = rig.zygote.run([{**rig.job("look"), "start": soon + 0.002 * place} for place in range(PROCESSES)])
        assert all(one["result"] and one["result"]["ok"] for one in answers), answers


# ---- two at the same moment ----


RACERS: dict[str, tuple[str, dict[str, Any]]] = {
    "create": ("create", {"name": "a", "ttl": 3600, "vmid": 1001}),
    "stop": ("power", {"vmid": 1001, "operation": "stop"}),
    "start": ("power", {"vmid": 1001, "operation": "start"}),
    "suspend": ("power", {"vmid": 1001, "operation": "suspend"}),
    "renew": ("renew", {"vmid": 1001, "ttl": 7200}),
    "destroy": ("destroy", {"vmids": [1001], "force": True}),
    "expire": ("expire", {}),
    "prune": ("prune", {"states": ["TIMEOUT", "STOPPED"]}),
    "reconcile": ("reconcile", {}),
}
PAIRS = [(first, second) for first in RACERS for second in RACERS]


def chosen_pairs() -> list[tuple[str, str]]:
    """Return all 81 pairs where all are asked for, else the nine of the day."""
    return PAIRS if os.environ.get("AGENTLAB_FAULTS") == "all" else random.Random(FAULTS_SEED).sample(PAIRS, 9)


@on_both_engines
def test_two_operations_at_the_same_moment_keep_the_promises(rig: Rig) -> None:
    """Each of nine operations races each of them on a sandbox whose lease ends in that second."""
    rig.must("create", name="a", ttl=3600, vmid=1001)
    rig.keep()
    choice = random.Random(FAULTS_SEED)
    problems: dict[str, Any] = {}
    ended: Counter[str] = Counter()
    for names in chosen_pairs():
        rig.restore()
        if "expire" in names:
            rig.sql("UPDATE sandboxes SET lease_expires_at = ?", int(time.time()) + 1)
        start = time.time() + (1.2 if "expire" in names else 0.1)
        gap = choice.choice((0.0, 0.0, 0.01, 0.05))
        jobs = [
            {**rig.job(RACERS[name][0], **RACERS[name][1]), "start": start + gap * place}
            for place, name in enumerate(names)
        ]
        answers = rig.zygote.run(jobs)
        wrong = [
            str(answer)
            for answer in answers
            if answer["late"] or not answer["result"] or answer["result"].get("code") in ("trace", "store")
        ]
        ended.update(
            f"{name}: {'ok' if (answer['result'] or {}).get('ok') else (answer['result'] or {}).get('code')}"
            for name, answer in zip(names, answers, strict=True)
        )
        wrong += rig.broken(settled=False)
        if rig.sql("SELECT 1 FROM operations"):
            time.sleep(1.2)
        rig.must("reconcile")
        wrong += [text for text in rig.broken() if not _waits_for_its_owner(rig, text)]
        wrong += _remove_all(rig)
        wrong += rig.broken()
        if [vm.vmid for vm in rig.pve.vms if not vm.template] != [BYSTANDER]:
            wrong.append(f"VMs are left: {[vm.vmid for vm in rig.pve.vms]}")
        if wrong:
            problems[" and ".join(names) + f", {gap} s apart"] = wrong
    print(f"\nAGENTLAB_FAULTS_SEED={FAULTS_SEED}: {len(chosen_pairs())} races, {dict(sorted(ended.items()))}")
    assert not problems, problems


# ---- renewal against expiry ----


def _race(rig: Rig, rounds: int, others: int = 0) -> Counter[str]:
    won: Counter[str] = Counter()
    for number in range(rounds):
        rig.sql(
            "UPDATE sandboxes SET lease_expires_at = ?, state = 'RUNNING', state_changed_at = 0 WHERE name LIKE "
            "'race%'",
            int(time.time()) + 1,
        )
        rig.sql("DELETE FROM events")
        rig.sql("DELETE FROM operations")
        rig.sql("DELETE FROM claims")
        rows = [row for row in rig.records() if row["name"].startswith("race")]
        end = rows[0]["lease_expires_at"]
        # Both sides at the very second in which the lease ends, a little apart in some rounds.
        renewals = [
            {**rig.job("renew", vmid=row["vmid"], ttl=600), "start": end - 0.12 + 0.04 * (number % 4)} for row in rows
        ]
        answers = rig.zygote.run([*renewals, *[{**rig.job("expire"), "start": end - 0.005} for _dummy in range(2)]])
        for row, answer in zip(rows, answers, strict=False):
            now = next(one for one in rig.records() if one["uuid"] == row["uuid"])
            renewed = bool(answer["result"]["ok"])
            events = [
                one["operation"]
                for one in rig.sql(
                    "SELECT operation FROM events WHERE sandbox_uuid = ? AND operation IN ('renew_lease', 'expire')",
                    row["uuid"],
                )
            ]
            if renewed:
                won["renewal"] += 1
                assert now["state"] == "RUNNING" and now["lease_expires_at"] > end, (answer, now)
                assert events == ["renew_lease"], events
            else:
                won["expiry"] += 1
                assert answer["result"]["code"] in ("state_conflict", "changed", "kept"), answer
                assert now["state"] in ("TIMEOUT", "RUNNING") and now["lease_expires_at"] == end, (answer, now)
                assert events in (["expire"], []), events
    return won


@pytest.mark.parametrize(("engine", "rounds"), [("sqlite", 12), ("postgresql", 6)])
def test_renewal_against_expiry_has_one_winner(rig: Rig, rounds: int) -> None:
    for number in range(4):
        rig.must("create", name=f"race{number}", ttl=600)
    won = _race(rig, rounds)
    print(f"\nwon by: {dict(won)}")
    assert sum(won.values()) == 4 * rounds


def test_renewal_while_the_expiry_pass_is_busy(rig: Rig) -> None:
    """The pass stops many slow VMs: a lease that ends meanwhile can be renewed to its last second, and not after."""
    for number in range(4):
        rig.must("create", name=f"slow{number}", ttl=600)
    for number in range(3):
        rig.must("create", name=f"race{number}", ttl=600)
    rig.task_seconds["qmshutdown"] = 200
    rows = {row["name"]: row for row in rig.records()}
    now = int(time.time())
    rig.sql("UPDATE sandboxes SET lease_expires_at = ? WHERE name LIKE 'slow%'", now - 1)
    rig.sql("UPDATE sandboxes SET lease_expires_at = ? WHERE name = 'race0'", now + 2)
    rig.sql("UPDATE sandboxes SET lease_expires_at = ? WHERE name = 'race1'", now + 2)
    busy: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: busy.extend(
            rig.zygote.run(
                [
                    rig.job("expire"),
                    rig.job("expire"),
                    {**rig.job("renew", vmid=rows["race0"]["vmid"], ttl=600), "start": now + 1.0},
                    {**rig.job("renew", vmid=rows["race1"]["vmid"], ttl=600), "start": now + 3.2},
                    {**rig.job("expire"), "start": now + 3.4},
                ]
            )
        )
    )
    thread.start()
    time.sleep(max(0.0, now + 3.9 - time.time()))
    running = rig.in_loop(
        lambda: [
            one["id"] for one in rig.pve.tasks.values() if one["type"] == "qmshutdown" and one["status"] == "running"
        ]
    )
    found = {row["name"]: row for row in rig.records()}
    thread.join(60)
    assert running, "the pass was not busy, so nothing was shown"
    assert (
        found["race0"]["state"] == "RUNNING"
        and found["race0"]["lease_expires_at"] > now + 500
        and busy[2]["result"]["ok"]
    )
    assert found["race1"]["state"] == "TIMEOUT" and not busy[3]["result"]["ok"], (found["race1"], busy[3])
    assert all(found[f"slow{number}"]["state"] == "TIMEOUT" for number in range(4))
    assert all(one["result"] and not one["late"] for one in busy)
    wrong = rig.broken()
    assert not wrong, wrong


class _Ahead(SystemClock):
    """The system's clock, and some seconds more."""

    ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


@on_both_engines
def test_a_renewal_that_waited_past_the_end_of_the_lease_has_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.must("create", name="race", ttl=600)
    clock = _Ahead()
    ctx = Context(config.load({}, rig.env), actor="waiting", clock=clock)
    sandbox = ctx.select_sandbox(name="race")
    write = ctx.database.write

    def wait(work: Any, **how: Any) -> Any:
        clock.ahead = 601
        return write(work, **how)

    monkeypatch.setattr(ctx.database, "write", wait)
    with pytest.raises(AgentlabError, match="expired"):
        lease.renew(ctx, sandbox, 1200)
    ctx.close()


@on_both_engines
def test_an_event_without_a_change_tells_the_state_of_now(rig: Rig) -> None:
    """A lease runs out without the claim, also between a look at the record and a word about it."""
    rig.must("create", name="race", ttl=600)
    ctx = Context(config.load({}, rig.env), actor="late")
    sandbox = ctx.select_sandbox(name="race")
    claim = ctx.records.claim(sandbox.uuid, "destroy")
    ctx.records.expire(sandbox, sandbox.lease_expires_at)
    ctx.records.note(sandbox, "destroy", outcome="kept")
    ctx.records.change(claim, sandbox, "destroy", outcome="failed", finish=True)
    ctx.close()
    wrong = rig.broken()
    assert not wrong, wrong
