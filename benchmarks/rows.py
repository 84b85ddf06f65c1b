# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The rows of the table: what is run for each, and how it is judged. Row 12, the daemon, is in daemon.py."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / ".collections")]

import payload
import peers as packages
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import overview
from field import FIRST, REPO, TOKEN_SECRET, Canned, context, play, playbook, resident_kb, seed, timed

BIN = Path(sys.executable).parent
TASK = 0.2
MANY = 50
IN_FLIGHT = 16
TICK = 0.1

Row = dict[str, Any]
Part = Callable[[], float]


class Bench:
    """What every row stands on: the server, the records, and playbooks of ours and of the peers."""

    def __init__(self, server: Canned, runs: int, peers: dict[str, str] | None = None, most: int = 5000) -> None:
        self.server, self.runs, self.most, self.folder = server, runs, most, server.folder
        self.database = f"{server.folder}/agentlab.db"
        self.env = server.environment(self.database, ANSIBLE_COLLECTIONS_PATH=str(REPO / ".collections"))
        self.peers = peers or {}
        self.vmids = list(range(FIRST, FIRST + MANY))
        self.ping = playbook(self.folder, "ping", play({"ansible.builtin.ping": {}}))

    def ours(self, name: str, *more: str, **env: str) -> float:
        return timed(
            [str(BIN / "ansible-playbook"), *(more or ("-i", "localhost,")), name], {**self.env, **env}, self.folder
        )

    def peer(self, name: str, *more: str, package: str = packages.FIRST) -> float:
        path = self.peers[package]
        env = self.server.environment(self.database, ANSIBLE_COLLECTIONS_PATH=path, REQUESTS_CA_BUNDLE=self.server.ca)
        return timed([str(BIN / "ansible-playbook"), *(more or ("-i", "localhost,")), name], env, self.folder)

    def shipped(self, name: str) -> float:
        """Ours as on a host that is not this one: packed, started and compiled anew (agentlab_in_place)."""
        return self.ours(name, "-i", "localhost,", "-e", "agentlab_in_place=false")

    def floor(self) -> float:
        """A task that does nothing."""
        return self.ours(self.ping)

    def vms(self, count: int = MANY, status: str = "stopped", **settings: Any) -> None:
        self.server.reset(**{"vms": count, "status": status, "tasks": {"": TASK}, **settings})

    def records(self, count: int = MANY, state: str = "STOPPED", **more: Any) -> None:
        seed(self.server, self.database, count, state, **more)

    def destroy_play(self) -> str:
        return playbook(
            self.folder,
            "destroy",
            play({"agentlab.proxmox.agentlab_sandbox": {"vmids": self.vmids, "state": "absent", "force": True}}),
        )

    def prune_play(self) -> str:
        return playbook(self.folder, "prune", play({"agentlab.proxmox.agentlab_prune": {}}))

    def info_play(self, name: str, **options: Any) -> str:
        return playbook(self.folder, name, play({"agentlab.proxmox.agentlab_sandbox_info": options}))

    def kvm(self, **options: Any) -> dict[str, Any]:
        return {
            "api_host": self.env["PROXMOX_HOST"],
            "api_port": self.server.port,
            "api_user": "bench@pve",
            "api_token_id": "bench",
            "api_token_secret": TOKEN_SECRET,
            "validate_certs": True,
            **options,
        }

    def loop_play(self) -> str:
        task = {
            "community.proxmox.proxmox_kvm": self.kvm(vmid="{{ item }}", node="pve1", state="absent"),
            "loop": self.vmids,
        }
        return playbook(self.folder, "loop", play(task))

    def forks(self) -> tuple[str, ...]:
        inventory = Path(self.folder, "fifty.ini")
        inventory.write_text(
            "[sandboxes]\n" + "".join(f"vm{vmid} vmid={vmid}\n" for vmid in self.vmids), encoding="utf-8"
        )
        return ("-i", str(inventory), "--forks", "10")

    def forks_play(self) -> str:
        task = {"community.proxmox.proxmox_kvm": self.kvm(vmid="{{ vmid }}", node="pve1", state="absent")}
        return playbook(self.folder, "forks", [dict(play(task)[0], hosts="sandboxes")])

    def peer_info_play(self) -> str:
        return playbook(self.folder, "vm-info", play({"community.proxmox.proxmox_vm_info": self.kvm(type="qemu")}))

    def interleaved(self, *parts: Part, slow: tuple[Part, ...] = ()) -> list[list[float]]:
        """Each part measured ``runs`` times, one after the other in turn; the slow ones in every third round only,
        their times come last.
        """
        found: list[list[float]] = [[] for _part in (*parts, *slow)]
        for number in range(self.runs):
            turn = parts if number % 3 else (*parts, *slow)
            for times, part in zip(found, turn, strict=False):
                times.append(part())
        return found

    def process(self, function: str, *arguments: object, **env: str) -> Any:
        """The value of one of our functions ("module.name"), called with texts in a Python process of its own."""
        script = (
            "import importlib, json, sys; sys.path.insert(0, sys.argv[1]); module, name = sys.argv[2].split('.'); "
            "print(json.dumps(getattr(importlib.import_module(module), name)(*sys.argv[3:])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(REPO / "benchmarks"), function, *map(str, arguments)],
            env={**os.environ, **self.env, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        if done.returncode:
            raise RuntimeError(f"{function}: {done.stderr[-1500:]}")
        return json.loads(done.stdout.splitlines()[-1])


def destroying(bench: Bench, wanted: set[str]) -> list[Row]:
    """Rows 1, 2 and 3: fifty stopped VMs, by us, by the limit, by fifty hosts, by a loop, and a ping."""
    mine, loop, forks, inventory = bench.destroy_play(), bench.loop_play(), bench.forks_play(), bench.forks()

    def on_new_vms(which: Part) -> Part:
        def run() -> float:
            bench.vms()
            bench.records()
            took = which()
            left = bench.server.state()["vms"] - 1
            if left:
                raise RuntimeError(f"{left} VMs of {MANY} were left")
            return took

        return run

    def limit() -> float:
        return timed(
            [sys.executable, str(REPO / "benchmarks" / "limit.py"), str(FIRST), str(MANY), str(IN_FLIGHT)],
            bench.env,
            bench.folder,
        )

    newest = packages.NEWEST
    peers: dict[str, Part] = {"2": lambda: bench.peer(forks, *inventory), "1": lambda: bench.peer(loop)}
    if "16" in wanted:
        peers["forks of the newest"] = lambda: bench.peer(forks, *inventory, package=newest)
        peers["loop of the newest"] = lambda: bench.peer(loop, package=newest)
    them = {name: on_new_vms(part) for name, part in peers.items() if name in wanted or "16" in wanted}
    ours, shipped, ping, bare, *others = bench.interleaved(
        on_new_vms(lambda: bench.ours(mine)),
        on_new_vms(lambda: bench.shipped(mine)),
        bench.floor,
        on_new_vms(limit),
        slow=tuple(them.values()),
    )
    slow = dict(zip(them, others, strict=True))
    beyond, further = ([one - floor for one, floor in zip(times, ping, strict=True)] for times in (ours, shipped))
    values = {"ours": ours, "shipped": shipped, "ping": ping, "limit": bare}
    found = [
        at_most(
            "3",
            "its time beyond a ping play, against the asyncio limit as a process",
            2.0,
            ratio(beyond, bare),
            "x",
            values,
            ratio(further, bare),
        )
    ]
    if "16" in wanted:
        found.append(_shipped_destroy(values, slow))
    if "1" in slow:
        found.append(
            {
                **at_least(
                    "1",
                    f"destroy {MANY} stopped VMs, {TASK} s tasks, whole playbook, against a `proxmox_kvm` loop",
                    45,
                    ratio(slow["1"], ours),
                    "x faster",
                    {**values, "loop": slow["1"]},
                    ratio(slow["1"], shipped),
                ),
                "fewer": f"the loop {len(slow['1'])} times",
            }
        )
    if "2" in slow:
        found.append(
            {
                **at_least(
                    "2",
                    f"the same against {MANY} hosts with forks=10",
                    8,
                    ratio(slow["2"], ours),
                    "x faster",
                    {**values, "forks": slow["2"]},
                    ratio(slow["2"], shipped),
                ),
                "fewer": f"the peer {len(slow['2'])} times",
            }
        )
    return found


def _shipped_destroy(values: dict[str, list[float]], slow: dict[str, list[float]]) -> Row:
    """Row 16: the shipped module against both ways of the newest peer; 1.4.0 stands beside it."""
    shipped = values["shipped"]
    loop, forks = (ratio(slow[f"{way} of the newest"], shipped) for way in ("loop", "forks"))
    return {
        **row(
            "16",
            f"shipped: destroy {MANY} stopped VMs, against the newest peer's loop / {MANY} hosts with forks=10",
            "at least 45x / 8x faster",
            f"{loop:.1f}x / {forks:.1f}x faster ({ratio(slow['1'], shipped):.1f}x / {ratio(slow['2'], shipped):.1f}x "
            "against 1.4.0)",
            max(45 / loop, 8 / forks),
            {**values, **slow},
        ),
        "fewer": f"the peers {len(slow['1'])} times",
    }


def counting(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Rows 4 and 5: requests, counted by the server."""
    bench.vms(0)
    bench.records(1000, "TIMEOUT")
    bench.ours(bench.prune_play())
    pruned = bench.server.counts()
    found = [
        {
            **at_most(
                "4",
                "requests: prune 1,000 records whose VMs are gone",
                5,
                sum(pruned.values()),
                " in all",
                {"kinds": dict(pruned)},
            ),
            "runs": 1,
        }
    ]
    mine = bench.destroy_play()
    each: dict[str, list[float]] = {"stopped": [], "running": []}
    kinds: dict[str, Any] = {}
    for _number in range(bench.runs):
        for status, values in each.items():
            bench.vms(status=status)
            bench.records(state="STOPPED" if status == "stopped" else "RUNNING")
            bench.ours(mine)
            kinds[status] = dict(bench.server.counts())
            values.append(sum(kinds[status].values()) / MANY)
    stopped, running = (statistics.median(values) for values in each.values())
    return [
        *found,
        row(
            "5",
            "requests per destroyed VM, identity proven and marked: stopped / running",
            "at most 3.4 / 5.0",
            f"{stopped:.2f} / {running:.2f}",
            max(stopped / 3.4, running / 5.0),
            {**each, "kinds": kinds},
        ),
    ]


def repeating(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 6: what is absent already, asked for again."""
    mine, loop = bench.destroy_play(), bench.loop_play()
    bench.vms(0)
    bench.records(state="DESTROYED")
    ours, shipped, looped = bench.interleaved(
        lambda: bench.ours(mine), lambda: bench.shipped(mine), slow=(lambda: bench.peer(loop),)
    )
    bench.vms(0)
    bench.ours(mine)
    asked = sum(bench.server.counts().values())
    times = ratio(looped, ours)
    return [
        {
            **row(
                "6",
                f"second run over {MANY} absent ones, against the peer's",
                "at least 15x faster, at most 2 requests",
                f"{times:.1f}x faster ({ratio(looped, shipped):.1f}x shipped), {asked} requests",
                max(15 / times, asked / 2),
                {"ours": ours, "shipped": shipped, "loop": looped},
            ),
            "fewer": f"the loop {len(looped)} times",
        }
    ]


def single(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Rows 7 and 8: the least a run costs."""
    bench.vms(1)
    bench.records(1)
    alone, once = (
        bench.info_play("records", vmid=FIRST),
        bench.info_play("once", vmid=FIRST, verify=True, verify_identity=False),
    )
    bench.ours(alone)
    unasked = sum(bench.server.counts().values())
    bench.ours(once)
    asked = sum(bench.server.counts().values()) - unasked
    runs: list[Part] = [
        lambda: bench.ours(alone),
        lambda: bench.shipped(alone),
        lambda: bench.ours(once),
        lambda: bench.shipped(once),
    ]
    shown, shown_shipped, read, read_shipped, ping = bench.interleaved(*runs, bench.floor)
    return [
        at_most(
            "7",
            "a run that the database alone answers, against ping",
            1.10,
            ratio(shown, ping),
            "x",
            {"ours": shown, "shipped": shown_shipped, "ping": ping, "requests": unasked},
            ratio(shown_shipped, ping),
        ),
        at_most(
            "8",
            "a run with one Proxmox read, against ping",
            1.45,
            ratio(read, ping),
            "x",
            {"ours": read, "shipped": read_shipped, "ping": ping, "requests": asked},
            ratio(read_shipped, ping),
        ),
    ]


def listing(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 9: five thousand records compared with the list of VMs."""
    count = 5000
    bench.vms(count)
    bench.records(count)
    mine, theirs = bench.info_play("verify", verify=True, verify_identity=False), bench.peer_info_play()
    ours, shipped, peer = bench.interleaved(
        lambda: bench.ours(mine), lambda: bench.shipped(mine), lambda: bench.peer(theirs)
    )
    bench.vms(count)
    bench.ours(mine)
    asked = bench.server.counts()
    times, lists = ratio(ours, peer), asked["GET /cluster/resources"]
    return [
        row(
            "9",
            f"list {count:,} VMs' records verified against Proxmox, against `proxmox_vm_info`",
            "at most 1.0x, 1 request for the list",
            f"{times:.2f}x ({ratio(shipped, peer):.2f}x shipped), {lists} request for the list ({sum(asked.values())} "
            "in all)",
            max(times, float(lists)) if lists > 1 else times,
            {"ours": ours, "shipped": shipped, "peer": peer, "kinds": dict(asked)},
        )
    ]


def history(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 10: few live records among very many."""
    count = 1_000_000
    bench.vms(0)
    bench.records(200, "TIMEOUT", history=count)
    ctx = context(bench.server, bench.database)
    now = ctx.clock.now()
    columns = "uuid, vmid, name, state, lease_expires_at, state_changed_at"

    def spent(work: Callable[[], Any]) -> Part:
        def run() -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return run

    def scan() -> None:
        # What a listing costs without the partial indexes.
        rows = ctx.database.read(f"SELECT {columns} FROM sandboxes NOT INDEXED WHERE state || '' <> 'DESTROYED'")
        assert len(rows) == 200

    def listed() -> None:
        assert len(ctx.records.find_all()) == 200

    def planned() -> None:
        assert len(prune.select(ctx, prune.Selection())[0]) == 200

    def ticked() -> None:
        overview.read_next_lease_end(ctx.records)
        assert overview.list_expired(ctx.records, now - 86400) == []

    def opened() -> None:
        one = context(bench.server, bench.database, dry_run=True)
        assert len(prune.select(one, prune.Selection())[0]) == 200
        one.close()

    whole, lists, plans, ticks, checks = bench.interleaved(*map(spent, (scan, listed, planned, ticked, opened)))
    ctx.close()
    slower, tick = max(ratio(lists, whole), ratio(plans, whole)), statistics.median(ticks)
    return [
        row(
            "10",
            "200 live among 1,000,000 historical records: list and prune planning, against a full scan",
            "at most 1/50; tick under 5 ms",
            f"1/{1 / slower:.0f}; tick {tick * 1000:.2f} ms",
            max(slower * 50, tick / 0.005),
            {"scan": whole, "list": lists, "plan": plans, "tick": ticks, "check mode, opened and planned": checks},
        )
    ]


def committing(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 11: transitions one by one and in bulk, on the disk each; and a bulk run that is killed."""
    import commits

    count = 1000
    bulk, one = bench.interleaved(
        lambda: commits.bulk(f"{bench.folder}/bulk.db", count),
        lambda: commits.one_by_one(f"{bench.folder}/single.db", count),
    )
    lost, told = commits.killed(f"{bench.folder}/killed.db")
    share = ratio(bulk, one)
    return [
        row(
            "11",
            f"{count:,} transitions in bulk, against one by one, at full durability",
            "at most 1/10 of the time, nothing lost on kill -9",
            f"1/{1 / share:.1f}; {lost} of {told} lost",
            99.0 if lost else share * 10,
            {"bulk": bulk, "one by one": one},
        )
    ]


# Memory counts as flat when a hundred times as many VMs take no more than this beyond what fifty take: what is told of
# each at the end, nothing more.
FLAT_KB_EACH = 8


def growing(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 13: time and memory as the number grows."""
    sizes: dict[int, int] = {}
    shares: dict[int, list[float]] = {}
    counts = [count for count in (50, 200, 1000, 5000) if count <= bench.most]
    for count in counts:
        shares[count] = []
        for _number in range(bench.runs if count < 1000 else 1):
            bench.vms(count)
            bench.records(count)
            took, sizes[count] = bench.process("rows.grow", bench.database, count)
            shares[count].append(took / (-(-count // IN_FLIGHT) * (TASK + TICK)))
    worst = max(map(statistics.median, shares.values()))
    last = counts[-1]
    grown = (sizes[last] - sizes[50]) / last
    return [
        {
            **row(
                "13",
                f"growth: N = {', '.join(f'{count:,}' for count in counts)} destroys with {IN_FLIGHT} in flight",
                f"wall within 1.3x of ceil(N/W) x (task + tick); memory flat (at most {FLAT_KB_EACH} kB a VM, its "
                "outcome)",
                f"{worst:.2f}x; memory {sizes[50] / 1024:.0f} MB at 50, {sizes[last] / 1024:.0f} MB at {last:,} "
                f"({grown:.1f} kB a VM)",
                max(worst / 1.3, grown / FLAT_KB_EACH),
                {"share": shares, "resident kB": sizes},
            ),
            "fewer": "from 1,000 on once each",
        }
    ]


def grow(database: str, count: str, connections: str = str(IN_FLIGHT), interval: str = str(TICK)) -> tuple[float, int]:
    """In a process of its own: destroy them all; seconds, and the most memory that was resident (kB)."""
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import clock, config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

    options = {"database": database}
    found = config.load(options, os.environ)
    found.workers = found.proxmox.connections = int(connections)
    found.poll_interval = float(interval)
    ctx = Context(found, actor="benchmark", clock=clock.SystemClock())
    items = [(one, destroy.Request(force=True)) for one in ctx.records.find_all()]
    assert len(items) == int(count)
    began = time.perf_counter()
    outcomes = destroy.run(ctx, items)
    took = time.perf_counter() - began
    assert all(one.state == "DESTROYED" for one in outcomes), next(
        one.message for one in outcomes if one.state != "DESTROYED"
    )
    ctx.close()
    return took, resident_kb("self", most=True)


def loading(bench: Bench, _wanted: set[str]) -> list[Row]:
    """Row 14: what a module weighs."""
    # Ansible's own loader of collections must be the first in a process.
    sizes = dict(bench.process("payload.sizes"))
    floor = sizes.pop("ansible.builtin.ping")
    files = dict(bench.process("payload.files"))
    most = max(sizes, key=lambda name: sizes[name])
    doc, ping = bench.interleaved(
        lambda: timed([str(BIN / "ansible-doc"), "agentlab.proxmox.agentlab_sandbox"], bench.env, bench.folder),
        lambda: timed([str(BIN / "ansible-doc"), "ansible.builtin.ping"], bench.env, bench.folder),
    )
    return [
        row(
            "14",
            "collection loading: what a module adds to the payload that ansible-core ships for a ping",
            f"at most {payload.AIM / 1000:.0f} kB, {payload.AIM_FILES} files in all",
            f"{sizes[most] / 1000:.0f} kB and {max(files.values())} files at most (`{most}`), "
            f"{min(sizes.values()) / 1000:.0f} kB and {min(files.values())} at least; a ping is {floor / 1000:.0f} kB; "
            f"`ansible-doc` {ratio(doc, ping):.2f}x that of ping",
            max(sizes[most] / payload.AIM, max(files.values()) / payload.AIM_FILES),
            {"bytes": sizes, "files": files, "ping": floor, "ansible-doc of ours": doc, "ansible-doc of ping": ping},
        )
    ]


# ---- judging ----


def ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(first) / statistics.median(second)


def row(number: str, what: str, target: str, measured: str, used: float, values: dict[str, Any]) -> Row:
    """``used``: how much of what the target allows was used; met up to 1."""
    return {
        "row": number,
        "what": what,
        "target": target,
        "measured": measured,
        "used": round(used, 4),
        "met": used <= 1,
        "values": values,
    }


def at_least(
    number: str, what: str, target: float, found: float, unit: str, values: dict[str, Any], shipped: float
) -> Row:
    return row(
        number,
        what,
        f"at least {target:g}{unit}",
        f"{found:.1f}{unit} ({shipped:.1f}x shipped)",
        target / found,
        values,
    )


def at_most(
    number: str, what: str, target: float, found: float, unit: str, values: dict[str, Any], shipped: float | None = None
) -> Row:
    shown = f"{found:.2f}" if isinstance(found, float) else str(found)
    beside = "" if shipped is None else f" ({shipped:.2f}x shipped)"
    return row(
        number,
        what,
        f"at most {f'{target:.2f}' if isinstance(target, float) else target}{unit}",
        f"{shown}{unit}{beside}",
        found / target,
        values,
    )
