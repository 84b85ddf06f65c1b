# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measure us and the peers side by side, and write benchmarks/results.json. What is compared runs interleaved, the medians are taken, and only
ratios within one run are judged.

    python benchmarks/run.py [--runs 5] [--rows 1,2,3] [--note TEXT]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / ".collections")]

import payload
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.operations import destroy, prune
from field import FIRST, REPO, TOKEN_SECRET, Canned, context, field, play, playbook, seed, timed

RESULTS = REPO / "benchmarks" / "results.json"
PEERS = REPO / ".cache" / "peers" / "bin"
OURS = Path(sys.executable).parent
TASK = 0.2
MANY = 50
IN_FLIGHT = 16
TICK = 0.1

Row = dict[str, Any]


class Bench:
    """One run of everything: the server, the playbooks, and what was found."""

    def __init__(self, server: Canned, runs: int) -> None:
        self.server, self.runs, self.folder = server, runs, server.folder
        self.database = f"{server.folder}/agentlab.db"
        self.env = server.environment(self.database, ANSIBLE_COLLECTIONS_PATH=str(REPO / ".collections"))
        self.peer_env = server.environment(self.database, ANSIBLE_COLLECTIONS_PATH=f"{self.folder}/no-collections", REQUESTS_CA_BUNDLE=server.ca)
        self.vmids = list(range(FIRST, FIRST + MANY))
        self.ping = playbook(self.folder, "ping", play({"ansible.builtin.ping": {}}))

    # ---- the parts ----

    def ours(self, name: str) -> float:
        return timed([str(OURS / "ansible-playbook"), "-i", "localhost,", name], self.env, self.folder)

    def peer(self, name: str, *more: str) -> float:
        return timed([str(PEERS / "ansible-playbook"), *(more or ("-i", "localhost,")), name], self.peer_env, self.folder)

    def floor(self) -> float:
        return self.ours(self.ping)

    def vms(self, count: int = MANY, status: str = "stopped", **settings: Any) -> None:
        self.server.reset(vms=count, status=status, tasks={"": TASK}, **settings)

    def records(self, count: int = MANY, state: str = "STOPPED", **more: Any) -> None:
        seed(self.server, self.database, count, state, **more)

    def destroy_play(self, name: str = "destroy") -> str:
        return playbook(self.folder, name, play({"agentlab.proxmox.agentlab_sandbox": {"vmids": self.vmids, "state": "absent", "force": True}}))

    def info_play(self, name: str, **options: Any) -> str:
        return playbook(self.folder, name, play({"agentlab.proxmox.agentlab_sandbox_info": options or {"vmid": FIRST}}))

    def _kvm(self, **options: Any) -> dict[str, Any]:
        return {"api_host": self.env["PROXMOX_HOST"], "api_port": self.server.port, "api_user": "bench@pve", "api_token_id": "bench",
                "api_token_secret": TOKEN_SECRET, "validate_certs": True, **options}

    def loop_play(self) -> str:
        task = {"community.proxmox.proxmox_kvm": self._kvm(vmid="{{ item }}", node="pve1", state="absent"), "loop": self.vmids}
        return playbook(self.folder, "loop", play(task))

    def forks(self) -> tuple[str, ...]:
        inventory = Path(self.folder, "fifty.ini")
        inventory.write_text("[sandboxes]\n" + "".join(f"vm{vmid} vmid={vmid}\n" for vmid in self.vmids), encoding="utf-8")
        return ("-i", str(inventory), "--forks", "10")

    def forks_play(self) -> str:
        task = {"community.proxmox.proxmox_kvm": self._kvm(vmid="{{ vmid }}", node="pve1", state="absent")}
        return playbook(self.folder, "forks", [dict(play(task)[0], hosts="sandboxes")])

    def interleaved(self, *parts: Callable[[], float]) -> list[list[float]]:
        """Each part measured ``runs`` times, one after the other in turn."""
        found: list[list[float]] = [[] for _part in parts]
        for _number in range(self.runs):
            for times, part in zip(found, parts, strict=True):
                times.append(part())
        return found

    # ---- the rows ----

    def destroying(self) -> list[Row]:
        """Rows 1, 2 and 3: fifty stopped VMs, by us, by a loop, by fifty hosts, by the limit, and a ping."""
        mine, loop, forks, inventory = self.destroy_play(), self.loop_play(), self.forks_play(), self.forks()

        def us() -> float:
            self.vms()
            self.records()
            took = self.ours(mine)
            assert self.server.state()["vms"] == 1
            return took

        def them(which: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                self.vms()
                took = which()
                assert self.server.state()["vms"] == 1
                return took

            return run

        def limit() -> float:
            return timed([sys.executable, str(REPO / "benchmarks" / "limit.py"), str(FIRST), str(MANY), str(IN_FLIGHT)], self.env, self.folder)

        ours, ping, bare, looped, forked = self.interleaved(us, self.floor, them(limit), them(lambda: self.peer(loop)),
                                                            them(lambda: self.peer(forks, *inventory)))
        beyond = [one - floor for one, floor in zip(ours, ping, strict=True)]
        values = {"ours": ours, "ping": ping, "limit": bare, "loop": looped, "forks": forked}
        return [_at_least("1", f"destroy {MANY} stopped VMs, {TASK} s tasks, against a proxmox_kvm loop", 45, ratio(looped, ours), "x faster", values),
                _at_least("2", f"the same against {MANY} hosts with forks=10", 8, ratio(forked, ours), "x faster", values),
                _at_most("3", "its time beyond a ping play, against the asyncio limit as a process", 2.0, ratio(beyond, bare), "x", values)]

    def counting(self) -> list[Row]:
        """Rows 4 and 5: requests, counted by the server."""
        self.vms(0)
        self.records(1000, "TIMEOUT")
        self.ours(playbook(self.folder, "prune", play({"agentlab.proxmox.agentlab_prune": {}})))
        pruned = self.server.counts()
        found = [_at_most("4", "requests: prune 1,000 records whose VMs are gone", 5, sum(pruned.values()), "", {"kinds": dict(pruned)})]
        mine = self.destroy_play()
        each: dict[str, list[float]] = {"stopped": [], "running": []}
        kinds: dict[str, Any] = {}
        for _number in range(self.runs):
            for status, values in each.items():
                self.vms(status=status)
                self.records(state="STOPPED" if status == "stopped" else "RUNNING")
                self.ours(mine)
                kinds[status] = dict(self.server.counts())
                values.append(sum(kinds[status].values()) / MANY)
        stopped, running = (statistics.median(values) for values in each.values())
        return [*found, _row("5", "requests per destroyed VM, identity proven and marked: stopped / running", "at most 3.4 / 5.0",
                             f"{stopped:.2f} / {running:.2f}", stopped <= 3.4 and running <= 5.0, {**each, "kinds": kinds})]

    def repeating(self) -> list[Row]:
        """Row 6: what is absent already, asked for again."""
        mine, loop = self.destroy_play(), self.loop_play()
        self.vms(0)
        self.records(state="DESTROYED")
        ours, looped = self.interleaved(lambda: self.ours(mine), lambda: self.peer(loop))
        self.vms(0)
        self.ours(mine)
        asked = sum(self.server.counts().values())
        times = ratio(looped, ours)
        return [_row("6", f"second run over {MANY} absent ones, against the peer's", "at least 15x faster, at most 2 requests",
                     f"{times:.1f}x faster, {asked} requests", times >= 15 and asked <= 2, {"ours": ours, "loop": looped})]

    def single(self) -> list[Row]:
        """Rows 7 and 8: the least a run costs."""
        self.vms(1)
        self.records(1)
        alone, once = self.info_play("records"), self.info_play("once", vmid=FIRST, verify=True, verify_identity=False)
        shown, read, ping = self.interleaved(lambda: self.ours(alone), lambda: self.ours(once), self.floor)
        self.vms(1)
        self.ours(alone)
        assert not self.server.counts()
        self.ours(once)
        asked = sum(self.server.counts().values())
        return [_at_most("7", "a run that the database alone answers, against ping", 1.10, ratio(shown, ping), "x", {"ours": shown, "ping": ping}),
                _at_most("8", "a run with one Proxmox read, against ping", 1.45, ratio(read, ping), "x", {"ours": read, "ping": ping, "requests": asked})]

    def listing(self) -> list[Row]:
        """Row 9: five thousand records compared with the list of VMs."""
        count = 5000
        self.vms(count)
        self.records(count)
        mine = self.info_play("verify", verify=True, verify_identity=False)
        theirs = playbook(self.folder, "vm-info", play({"community.proxmox.proxmox_vm_info": self._kvm(type="qemu")}))
        ours, peer = self.interleaved(lambda: self.ours(mine), lambda: self.peer(theirs))
        self.vms(count)
        self.ours(mine)
        asked = self.server.counts()
        times = ratio(ours, peer)
        lists = asked["GET /cluster/resources"]
        return [_row("9", f"list {count:,} VMs' records verified against Proxmox, against proxmox_vm_info", "at most 1.0x, 1 request for the list",
                     f"{times:.2f}x, {lists} request for the list ({sum(asked.values())} in all)", times <= 1.0 and lists == 1,
                     {"ours": ours, "peer": peer, "kinds": dict(asked)})]

    def history(self) -> list[Row]:
        """Row 10: few live records among very many."""
        count = 1_000_000
        self.server.reset(vms=0)
        self.records(200, "TIMEOUT", history=count)
        ctx = context(self.server, self.database)
        now = ctx.clock.now()
        columns = "uuid, vmid, name, state, lease_expires_at, state_changed_at"

        def spent(work: Callable[[], Any]) -> Callable[[], float]:
            def run() -> float:
                began = time.perf_counter()
                work()
                return time.perf_counter() - began

            return run

        def scan() -> None:
            rows = ctx.database.read(f"SELECT {columns} FROM sandboxes NOT INDEXED WHERE state || '' <> 'DESTROYED'")
            assert len(rows) == 200

        def listed() -> None:
            assert len(ctx.records.find_all()) == 200

        def planned() -> None:
            assert len(prune.select(ctx, prune.Wanted())[0]) == 200

        def ticked() -> None:
            assert ctx.records.over(now - 86400) == []

        def opened() -> None:
            one = context(self.server, self.database, dry_run=True)
            assert len(prune.select(one, prune.Wanted())[0]) == 200
            one.close()

        whole, lists, plans, ticks, checks = self.interleaved(*map(spent, (scan, listed, planned, ticked, opened)))
        ctx.close()
        slower = max(ratio(lists, whole), ratio(plans, whole))
        tick = statistics.median(ticks)
        return [_row("10", "200 live among 1,000,000 historical records: list and prune planning, against a full scan", "at most 1/50; tick under 5 ms",
                     f"1/{1 / slower:.0f}; tick {tick * 1000:.2f} ms", slower <= 1 / 50 and tick < 0.005,
                     {"scan": whole, "list": lists, "plan": plans, "tick": ticks, "check mode, opened and planned": checks})]

    def committing(self) -> list[Row]:
        """Row 11: transitions one by one and in bulk, on the disk each; and a bulk run that is killed."""
        import commits

        count = 1000
        bulk, single = self.interleaved(lambda: commits.bulk(f"{self.folder}/bulk.db", count), lambda: commits.one_by_one(f"{self.folder}/single.db", count))
        lost, told = commits.killed(f"{self.folder}/killed.db")
        share = ratio(bulk, single)
        return [_row("11", f"{count:,} transitions in bulk, against one by one, at full durability", "at most 1/10 of the time, nothing lost on kill -9",
                     f"1/{1 / share:.1f}; {lost} of {told} lost", share <= 0.1 and lost == 0, {"bulk": bulk, "one by one": single})]

    def growing(self) -> list[Row]:
        """Row 13: time and memory as the number grows."""
        worst, sizes, values = 0.0, {}, {}
        for count in (50, 200, 1000, 5000):
            times = []
            for _number in range(self.runs if count < 1000 else 1):
                self.vms(count)
                self.records(count)
                script = ("import sys, time, json; sys.path.insert(0, sys.argv[1]); import run; "
                          "print(json.dumps(run.grow(*sys.argv[2:4])))")
                done = subprocess.run([sys.executable, "-c", script, str(REPO / "benchmarks"), self.database, str(count)], env={**os.environ, **self.env},
                                      capture_output=True, text=True, check=True)
                took, sizes[count] = json.loads(done.stdout)
                times.append(took / (-(-count // IN_FLIGHT) * (TASK + TICK)))
            values[count] = times
            worst = max(worst, statistics.median(times))
        grown = (sizes[5000] - sizes[50]) / 1024
        return [_row("13", f"growth: 50, 200, 1,000, 5,000 destroys with {IN_FLIGHT} in flight", "within 1.3x of ceil(N/W) x (task + tick); memory flat",
                     f"{worst:.2f}x; memory {sizes[50] / 1024:.0f} to {sizes[5000] / 1024:.0f} MB", worst <= 1.3 and grown < 60,
                     {"share": values, "resident kB": sizes})]

    def loading(self) -> list[Row]:
        """Row 14: what a module weighs."""
        sizes = {name: len(payload.shipped(f"agentlab.proxmox.{name}")) for name in payload.modules()}
        floor = len(payload.shipped("ansible.builtin.ping"))
        whole, mine = max(sizes.values()) / 1000, (max(sizes.values()) - floor) / 1000
        doc, ping = self.interleaved(
            lambda: timed([str(OURS / "ansible-doc"), "agentlab.proxmox.agentlab_sandbox"], self.env, self.folder),
            lambda: timed([str(OURS / "ansible-doc"), "ansible.builtin.ping"], self.env, self.folder))
        return [_row("14", "collection loading: size of the shipped module payload", "at most 150 kB; nothing imported that a run does not need",
                     f"{mine:.0f} kB of ours ({whole:.0f} kB with ansible-core's own, of which a ping is {floor / 1000:.0f})", whole <= 150,
                     {"bytes": sizes, "ping": floor, "ansible-doc of ours": doc, "ansible-doc of ping": ping})]


def grow(database: str, count: str) -> tuple[float, int]:
    """In a process of its own: destroy them all; seconds, and the most memory that was resident (kB)."""
    import resource

    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.operations.context import Context

    ctx = Context(config.load({"database": database}, os.environ), actor="benchmark", clock=clock.SystemClock())
    items = [(one, destroy.Request(force=True)) for one in ctx.records.find_all()]
    assert len(items) == int(count)
    began = time.perf_counter()
    outcomes = destroy.run(ctx, items)
    took = time.perf_counter() - began
    assert all(one.state == "DESTROYED" for one in outcomes), next(one.message for one in outcomes if one.state != "DESTROYED")
    ctx.close()
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- judging ----


def ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(first) / statistics.median(second)


def _row(number: str, what: str, target: str, found: str, met: bool, values: dict[str, Any]) -> Row:
    return {"row": number, "what": what, "target": target, "measured": found, "met": met, "values": values}


def _at_least(number: str, what: str, target: float, found: float, unit: str, values: dict[str, Any]) -> Row:
    return {**_row(number, what, f"at least {target:g}{unit}", f"{found:.1f}{unit}", found >= target, values), "goal": target, "found": found, "more": True}


def _at_most(number: str, what: str, target: float, found: float, unit: str, values: dict[str, Any]) -> Row:
    shown = f"{found:.2f}{unit}" if isinstance(found, float) else f"{found}{unit}"
    return {**_row(number, what, f"at most {target:g}{unit}", shown, found <= target, values), "goal": target, "found": found, "more": False}


GROUPS: dict[str, tuple[str, ...]] = {"destroying": ("1", "2", "3"), "counting": ("4", "5"), "repeating": ("6",), "single": ("7", "8"), "listing": ("9",),
                                      "history": ("10",), "committing": ("11",), "growing": ("13",), "loading": ("14",)}


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--runs", type=int, default=5)
    asked.add_argument("--rows", default="")
    asked.add_argument("--note", default="")
    given = asked.parse_args()
    wanted = set(given.rows.split(",")) if given.rows else {number for numbers in GROUPS.values() for number in numbers}
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}}
    with field() as server:
        bench = Bench(server, given.runs)
        for name, numbers in GROUPS.items():
            if not wanted & set(numbers):
                continue
            load = os.getloadavg()[0]
            for row in getattr(bench, name)():
                known["rows"][row["row"]] = {**row, "runs": given.runs, "load": round(load, 1), "on": datetime.date.today().isoformat(), "note": given.note}
                print(f"{row['row']:>3} {'met' if row['met'] else 'NOT MET':8} {row['what']}: {row['measured']} ({row['target']})", flush=True)
            RESULTS.write_text(json.dumps({**known, "machine": machine()}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, Any]:
    """What kind of machine it was, and nothing that tells which."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), "")
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if line.startswith("MemTotal"))
    import ansible

    return {"cores": os.cpu_count(), "cpu": model, "memory_gb": round(memory / 2**20), "python": platform.python_version(), "ansible-core": ansible.__version__,
            "kernel": platform.release().split("-")[0], "architecture": platform.machine()}


if __name__ == "__main__":
    sys.exit(main())
