# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What was measured, as a table, as a plot (PNG and text), and in docs/performance.md between its markers.

python benchmarks/report.py      # again from benchmarks/results.json, without measuring
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results.json"
PAGE = REPO / "docs" / "performance.md"
PLOT = REPO / "docs" / "performance.png"
Known = dict[str, Any]
# Cores that something else may use before the table says so.
QUIET_CORES = 0.25
ROWS = 22
_WIDTH = 50


def order(number: str) -> tuple[int, str]:
    return (int(number), "") if number.isdecimal() else (99, number)


def load() -> Known:
    found: Known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {"rows": {}, "machine": {}, **found}


def save(known: Known) -> None:
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def judged(known: Known) -> list[dict[str, Any]]:
    """The rows that have a target, in their order."""
    rows = (known["rows"][number] for number in sorted(known["rows"], key=order) if number.isdecimal())
    return [row for row in rows if "failed" in row or "used" in row]


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['row']:>6} FAILED   {row['failed']}"
    if "met" not in row:
        return f"{row['row']:>6} measured"
    return f"{row['row']:>6} {'met' if row['met'] else 'NOT MET':8} {row['what']}: {row['measured']} ({row['target']})"


def table(known: Known) -> str:
    """The rows as a table in Markdown."""
    lines = ["| # | what | to reach | measured | met | runs |", "|---|---|---|---|---|---|"]
    for row in judged(known):
        if "failed" in row:
            lines.append(
                f"| {row['row']} | not measured: {' '.join(row['failed'].split())[:200].replace('|', '/')} | | | "
                "**failed** | |"
            )
            continue
        runs = f"{row['runs']}; {row['fewer']}" if row.get("fewer") and row["runs"] > 1 else str(row["runs"])
        lines.append(
            f"| {row['row']} | {row['what']} | {row['target']} | {row['measured']} | "
            f"{'yes' if row['met'] else '**no**'} | {runs} |"
        )
    return "\n".join(lines)


def when(known: Known) -> str:
    """Date, machine, and whether it was left alone."""
    machine, rows = known["machine"], known["rows"].values()
    days = sorted({row["on"] for row in rows})
    others = [float(row.get("others", 0)) for row in rows]
    busy = max(others, default=0.0)
    alone = (
        "nothing else ran"
        if busy <= QUIET_CORES
        else f"**other work was running**, up to {busy:.1f} of the {machine['cores']} cores were busy with it (each "
        "row's share is in `benchmarks/results.json`); ratios suffer less from that than times, and requests not at all"
    )
    missing = [str(number) for number in range(1, ROWS + 1) if str(number) not in known["rows"]]
    gaps = f" Not measured: row{'s' if len(missing) > 1 else ''} {', '.join(missing)}." if missing else ""
    return (
        f"Measured on {' to '.join(dict.fromkeys((days[0], days[-1])))}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, Linux {machine['kernel']}, Python {machine['python']}, ansible-core "
        f"{machine['ansible-core']}, community.proxmox {machine.get('community.proxmox')}; {alone}.{gaps}"
    )


def text_plot(known: Known) -> str:
    """How much of what each target allows is used: met where the bar ends before the line."""
    half = _WIDTH // 2
    lines = [f"{'':>4} {'share of what the target allows; met left of the line':<{_WIDTH + 2}}"]
    for row in judged(known):
        if "failed" in row:
            lines.append(f"{row['row']:>4} failed")
            continue
        length = min(_WIDTH, max(1, round(row["used"] * half)))
        drawn = "".join("|" if place == half else "#" if place < length else " " for place in range(_WIDTH))
        lines.append(
            f"{row['row']:>4} {drawn.rstrip() if length > half else drawn[: half + 1]:<{_WIDTH}} "
            f"{row['used'] * 100:4.0f} %"
        )
    destroyed = _destroyed(known)
    if destroyed:
        slowest = max(destroyed.values())
        lines += ["", "     seconds to destroy 50 stopped VMs"]
        lines += [
            f"     {name:<28} {'#' * max(1, round(seconds / slowest * (_WIDTH - 12))):<{_WIDTH - 12}} {seconds:7.1f}"
            for name, seconds in destroyed.items()
        ]
    return "\n".join(lines)


def _destroyed(known: Known) -> dict[str, float]:
    values = {**known["rows"].get("2", {}).get("values", {}), **known["rows"].get("1", {}).get("values", {})}
    names = {
        "ping": "a ping play",
        "limit": "asyncio, the limit",
        "ours": "agentlab_sandbox",
        "forks": "proxmox_kvm, 50 hosts",
        "loop": "proxmox_kvm, loop",
    }
    return {title: statistics.median(values[name]) for name, title in names.items() if name in values}


def png(known: Known) -> None:
    """The same as text_plot, and the growth with N."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = [row for row in judged(known) if "used" in row]
    destroyed = _destroyed(known)
    shares = {
        int(count): statistics.median(values)
        for count, values in known["rows"].get("13", {}).get("values", {}).get("share", {}).items()
    }
    figure, (targets, times, growth) = pyplot.subplots(
        1, 3, figsize=(15, 4.8), gridspec_kw={"width_ratios": [2, 1.6, 1.2]}, layout="constrained"
    )
    targets.barh(
        [row["row"] for row in found],
        [min(row["used"], 2) for row in found],
        color=["#2a7" if row["met"] else "#c43" for row in found],
    )
    targets.axvline(1, color="black")
    targets.invert_yaxis()
    targets.set(title="share of what the target allows (met left of the line)", ylabel="row of the table", xlim=(0, 2))
    if destroyed:
        names, seconds = list(destroyed), list(destroyed.values())
        times.barh(names, seconds, color=["#2a7" if name.startswith("agentlab") else "#89a" for name in names])
        times.bar_label(times.containers[0], fmt=" %.1f s")
        times.invert_yaxis()
        times.set(
            title="destroy 50 stopped VMs, tasks of 0.2 s",
            xscale="log",
            xlim=(0.3, max(seconds) * 4),
            xlabel="seconds (logarithmic)",
        )
    if shares:
        growth.plot(list(shares), list(shares.values()), marker="o", color="#2a7")
        growth.axhline(1.3, color="black")
        growth.set(
            title="growth: wall / (ceil(N/16) x 0.3 s)", xscale="log", ylim=(0, 2), xlabel="VMs destroyed (logarithmic)"
        )
    figure.savefig(PLOT, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def lever_table(known: Known) -> str:
    """What the settings cost."""
    found = known["rows"].get("levers", {}).get("table")
    if not found:
        return "Not measured."
    lines = [
        "| `connections` | `poll_interval` | ms a VM | requests a VM | looks at tasks | memory |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['connections']} | {one['poll_interval']:g} s | {one['ms a VM']:.0f} | {one['requests a VM']:.2f} | "
        f"{one['looks at tasks']} | {one['memory MB']} MB |"
        for one in found
    ]
    return "\n".join(lines)


def scale_table(known: Known) -> str:
    """One node and a cluster side by side, then the fleet."""
    found = known["rows"].get("scale", {})
    if "node" not in found:
        return "Not measured."
    node, cluster, fleet = found["node"], found["cluster"], found["fleet"]
    lines = [
        f"| | one node, {node['sandboxes']} sandboxes | {cluster['nodes']} nodes, {cluster['sandboxes']:,} sandboxes |",
        "|---|---|---|",
    ]

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            requests = f", {value['requests']:,} requests" if value["requests"] != 1 else ", 1 request"
            return f"{value['seconds']:.1f} s{requests}{', {} MB'.format(value['MB']) if 'MB' in value else ''}"
        return f"{value}"

    for name in (name for name in node if name not in ("nodes", "sandboxes") and not name.startswith("destroy")):
        lines.append(f"| {name} | {shown(node[name])} | {shown(cluster[name])} |")
    ends = ([name for name in part if name.startswith("destroy")] for part in (node, cluster))
    lines += [
        f"| destroy {node['sandboxes']:,} / 1,000 with {ours.rpartition(', ')[2]} | {shown(node[ours])} | "
        f"{shown(cluster[theirs])} |"
        for ours, theirs in zip(*ends, strict=True)
    ]
    lines += [
        "",
        f"| a play over {fleet['hosts']} hosts, forks={fleet['forks']} | seconds | against ping |",
        "|---|---|---|",
    ]
    names = {
        "ping": "`ansible.builtin.ping`",
        "records": "`agentlab_sandbox_info`",
        "compared": "the same, compared with Proxmox VE",
    }
    lines += [f"| {title} | {fleet[name]:.0f} | {fleet[name] / fleet['ping']:.2f}x |" for name, title in names.items()]
    return "\n".join(lines)


def write(known: Known) -> None:
    """Put it all into docs/performance.md, between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in {
        "when": when(known),
        "table": table(known),
        "plot": f"```text\n{text_plot(known)}\n```",
        "levers": lever_table(known),
        "scale": scale_table(known),
    }.items():
        head, opening, rest = text.partition(f"<!-- {name} -->")
        _old, closing, tail = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise ValueError(f"{PAGE.name} has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"{head}{opening}\n{made}\n{closing}{tail}"
    PAGE.write_text(text, encoding="utf-8")
    png(known)


if __name__ == "__main__":
    write(load())
    sys.exit(0)
