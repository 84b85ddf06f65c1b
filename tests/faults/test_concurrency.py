# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many at once: real processes on one database and one Proxmox, with random faults; renewal against expiry; and a
model of it all.

A failing run is replayed with AGENTLAB_TEST_SEED=<the seed it printed> (the choices are the same; how processes meet is
up to the machine).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states as rules
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, Kept
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune, reconcile
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, destroy, lease
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from faults.conftest import SEED as FAULTS_SEED
from faults.crash_support import BYSTANDER, Rig

pytestmark = pytest.mark.faults

SEED = int(os.environ.get("AGENTLAB_TEST_SEED") or 0)
PROCESSES = 7
SECONDS = 10
# Nobody may wait longer: claim_timeout, doubt_window and wait_timeout of the test's configuration, and some requests.
BOUND = 60

# What may be broken: a request's method, the end of its path, and how.
FAULTS = [
    ("GET", "/config", "cut-before"),
    ("GET", "/config", "truncate"),
    ("GET", "/cluster/resources", "cut-before"),
    ("GET", "/ha/status/current", "truncate"),
    ("GET", "/cluster/nextid", "cut-before"),
    ("GET", "/status", "cut-after"),
    ("GET", "/tasks", "truncate"),
    ("POST", "/clone", "cut-before"),
    ("POST", "/clone", "cut-after"),
    ("POST", "/clone", "truncate"),
    ("POST", "/status/start", "cut-after"),
    ("POST", "/status/stop", "cut-before"),
    ("POST", "/status/stop", "cut-after"),
    ("POST", "/status/shutdown", "cut-after"),
    ("PUT", "/config", "cut-before"),
    ("PUT", "/config", "cut-after"),
    ("DELETE", r"/qemu/\d+", "cut-before"),
    ("DELETE", r"/qemu/\d+", "cut-after"),
    ("DELETE", r"/qemu/\d+", "truncate"),
    ("GET", "/config", 500),
    ("GET", "/config", 403),
    ("GET", "/cluster/resources", 500),
    ("GET", "/cluster/nextid", 500),
    ("GET", "/status", 596),
    ("POST", "/clone", 500),
    ("POST", "/clone", 596),
    ("POST", "/clone", 595),
    ("PUT", "/config", 500),
    ("DELETE", r"/qemu/\d+", 596),
    ("POST", "/status/start", 500),
    ("POST", "/status/stop", 596),
]
TASKS = [
    ("qmclone", "clone failed: no space left"),
    ("qmstart", "start failed: QEMU exited with code 1"),
    ("qmdestroy", "storage is not online"),
    ("qmstop", "VM quit/powerdown failed - got timeout"),
    ("qmdestroy", "unexpected status"),
    ("qmstart", "unexpected status"),
]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, time_scale=0.02)
    made.foreign(BYSTANDER, name="bystander", running=True, tags="agentlab")
    yield made
    made.stop()


def _break(rig: Rig, dice: random.Random) -> None:
    """One random fault for whoever comes next."""
    if dice.random() < 0.15:
        kind, text = dice.choice(TASKS)
        rig.spoil(kind, text)
        time.sleep(0.1)
        rig.in_loop(lambda: (rig.pve.task_endings.clear(), rig.task_fails.clear()))
        return
    method, suffix, how = dice.choice(FAULTS)
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


@pytest.mark.parametrize("number", range(1 if SEED else 3))
def test_many_processes_at_once(rig: Rig, number: int) -> None:
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


def test_two_operations_at_the_same_moment(rig: Rig) -> None:
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


def test_renewal_against_expiry_has_one_winner(rig: Rig) -> None:
    for number in range(4):
        rig.must("create", name=f"race{number}", ttl=600)
    won = _race(rig, 12)
    print(f"\nwon by: {dict(won)}")
    assert sum(won.values()) == 48


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


def test_a_renewal_that_waited_past_the_end_of_the_lease_has_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.must("create", name="race", ttl=600)
    clock = _Ahead()
    ctx = Context(config.load({}, rig.env), actor="waiting", clock=clock)
    sandbox = ctx.select(name="race")
    write = ctx.database.write

    def wait(work: Any, **how: Any) -> Any:
        clock.ahead = 601
        return write(work, **how)

    monkeypatch.setattr(ctx.database, "write", wait)
    with pytest.raises(AgentlabError, match="expired"):
        lease.renew(ctx, sandbox, 1200)
    ctx.close()


def test_an_event_without_a_change_tells_the_state_of_now(rig: Rig) -> None:
    """A lease runs out without the claim, also between a look at the record and a word about it."""
    rig.must("create", name="race", ttl=600)
    ctx = Context(config.load({}, rig.env), actor="late")
    sandbox = ctx.select(name="race")
    claim = ctx.records.claim(sandbox.uuid, "destroy")
    ctx.records.expire(sandbox, sandbox.lease_expires_at)
    ctx.records.note(sandbox, "destroy", outcome="kept")
    ctx.records.change(claim, sandbox, "destroy", outcome="failed", finish=True)
    ctx.close()
    wrong = rig.broken()
    assert not wrong, wrong


# ---- a model ----


class Life(RuleBasedStateMachine):
    """Two names; what a user may do with them, faults in between.

    The model knows what must be so, whatever Proxmox answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="agentlab-model-"))
        self.rig = Rig(self.folder, time_scale=0)
        self.rig.foreign(BYSTANDER, name="bystander", running=True, tags="agentlab")
        (self.folder / "config.yaml").write_text(
            "template: debian-13\nclaim_timeout: 1s\ndoubt_window: 0s\nwait_timeout: 2s\napi_timeout: 2\n"
            "shutdown_timeout: 1s\n",
            encoding="utf-8",
        )
        # What was there before each step: a state never moves against the table, DESTROYED never ends.
        self.before: dict[str, str] = {}

    def teardown(self) -> None:
        try:
            self.rig.well()
            for _dummy in range(3):
                self._context(lambda ctx: reconcile.run(ctx, apply=True))
            live = [row["vmid"] for row in self.rig.records() if row["state"] != "DESTROYED"]
            done = self._context(
                lambda ctx: destroy.run(ctx, [(ctx.select(vmid), destroy.Request(force=True)) for vmid in live])
            )
            assert not isinstance(done, AgentlabError), done
            assert not [one.message for one in done if one.failed], [one.message for one in done]
            wrong = self.rig.broken()
            assert not wrong, wrong
            assert sorted(vm.vmid for vm in self.rig.pve.vms if not vm.template) == [*sorted(self.rig.bystanders)]
        finally:
            self.rig.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _context(self, work: Any) -> Any:
        ctx = Context(config.load({}, self.rig.env), actor="model")
        try:
            return work(ctx)
        except AgentlabError as error:
            return error
        finally:
            ctx.close()

    def _live(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.rig.records() if row["name"] == name and row["state"] != "DESTROYED"), None)

    @initialize()
    def begin(self) -> None:
        self._context(lambda ctx: create.run(ctx, create.Spec(name="one", ttl=600)))

    names = st.sampled_from(["one", "two"])

    @rule(name=names)
    def create(self, name: str) -> None:
        done = self._context(lambda ctx: create.run(ctx, create.Spec(name=name, ttl=600)))
        if not isinstance(done, AgentlabError):
            assert self._live(name) is not None

    @rule(name=names, operation=st.sampled_from(["stop", "start", "suspend", "complete", "fail"]))
    def power(self, name: str, operation: str) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(lambda ctx: power.run(ctx, ctx.select(name=name), operation))
        if was["state"] not in rules.OPERATIONS[operation].allowed + rules.OPERATIONS[operation].satisfied:
            # A VM that is not ours (any more) is told before the state is.
            assert isinstance(done, Kept) or (isinstance(done, AgentlabError) and done.message.startswith("cannot ")), (
                done
            )
        if not isinstance(done, AgentlabError) and done.changed:
            assert self._live(name)["state"] == power.TARGETS[operation]  # type: ignore[index]

    @rule(name=names, force=st.booleans())
    def destroy(self, name: str, force: bool) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(lambda ctx: destroy.run(ctx, [(ctx.select(name=name), destroy.Request(force=force))])[0])
        assert not isinstance(done, AgentlabError), done
        now = self.rig.sql("SELECT * FROM sandboxes WHERE uuid = ?", was["uuid"])[0]
        assert (now["state"] == "DESTROYED") == (not done.failed), done
        left = was["state"] not in rules.OPERATIONS["destroy"].allowed
        if left and not force and not done.failed:
            # Only a destroy that was begun rightly may be finished without force.
            events = self.rig.sql("SELECT * FROM events WHERE sandbox_uuid = ? AND operation = 'destroy'", was["uuid"])
            assert len(events) > 1, f"destroyed in {was['state']} without force"

    @rule(name=names, ttl=st.sampled_from([300, 1200, 7200]))
    def renew(self, name: str, ttl: int) -> None:
        was = self._live(name)
        if was is None:
            return
        done = self._context(lambda ctx: lease.renew(ctx, ctx.select(name=name), ttl))
        now = self._live(name)
        assert now is not None and now["lease_expires_at"] >= was["lease_expires_at"]
        if was["state"] != "RUNNING":
            assert isinstance(done, AgentlabError)

    @rule(name=names)
    def lease_ends(self, name: str) -> None:
        self.rig.sql(
            "UPDATE sandboxes SET lease_expires_at = ? WHERE name = ? AND state <> 'DESTROYED'",
            int(time.time()) - 1,
            name,
        )
        done = self._context(lease.expire)
        assert not isinstance(done, AgentlabError), done
        now = self._live(name)
        assert now is None or now["state"] not in rules.OPERATIONS["expire"].allowed

    @rule()
    def prune(self) -> None:
        timed_out = [row["uuid"] for row in self.rig.records() if row["state"] == "TIMEOUT"]
        others = {row["uuid"]: row["state"] for row in self.rig.records() if row["state"] != "TIMEOUT"}
        done = self._context(lambda ctx: prune.run(ctx, prune.Selection()))
        assert {row["uuid"]: row["state"] for row in self.rig.records() if row["uuid"] in others} == others
        if not isinstance(done, AgentlabError):
            assert len(done.pruned) + len(done.kept) + len(done.failed) == len(timed_out)

    @rule()
    def reconcile(self) -> None:
        self._context(lambda ctx: reconcile.run(ctx, apply=True))

    @rule(which=st.sampled_from(FAULTS))
    def fault(self, which: Any) -> None:
        method, suffix, how = which
        if isinstance(how, int):
            self.rig.in_loop(
                lambda: self.rig.pve.fault(
                    method, suffix, "answer", status=how, body='{"data": null, "message": "made up"}'
                )
            )
        else:
            self.rig.in_loop(lambda: self.rig.pve.fault(method, suffix, how))

    @rule(which=st.sampled_from(TASKS))
    def task_fails(self, which: Any) -> None:
        self.rig.spoil(*which)

    @rule()
    def all_is_well_again(self) -> None:
        self.rig.well()

    @rule(name=names)
    @precondition(lambda self: len(self.rig.bystanders) < 3)
    def replaced_by_somebody_elses(self, name: str) -> None:
        was = self._live(name)
        if was is not None and was["smbios_uuid"] and was["vmid"] not in self.rig.bystanders:
            self.rig.foreign(was["vmid"], name=name, running=True, tags="agentlab")
            self.rig.in_loop(self.rig.pve.requests.clear)

    @rule(name=names)
    def removed_by_hand(self, name: str) -> None:
        was = self._live(name)
        vm = self.rig.pve.vm(was["vmid"]) if was else None
        if was and vm and was["smbios_uuid"] and was["vmid"] not in self.rig.bystanders:
            self.rig.in_loop(lambda: self.rig.pve.vms.remove(vm))

    @invariant()
    def promises_hold(self) -> None:
        wrong = self.rig.broken(settled=False)
        assert not wrong, wrong
        now = {row["uuid"]: row["state"] for row in self.rig.records()} if self.rig.database.exists() else {}
        for uuid, state in self.before.items():
            assert state != "DESTROYED" or now.get(uuid) == "DESTROYED", f"{uuid} was DESTROYED and is {now.get(uuid)}"
        self.before = now


def test_the_model() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=30,
            stateful_step_count=15,
            deadline=None,
            print_blob=True,
            derandomize=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
