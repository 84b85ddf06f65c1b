# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write the results as tables and plots: into docs/performance.md between its markers, and to docs/performance.png.

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
# The content of results.json: "rows" by number, and the "machine" that they were measured on.
Results = dict[str, Any]
# Cores that other work may use before the page says so.
QUIET_CORES = 0.25
ROWS = 22
_WIDTH = 50


# ---- results.json ----


def make_sort_key(number: str) -> tuple[int, str]:
    """Return a key that sorts numbers of rows by value, and the rows that have a name after them."""
    return (int(number), "") if number.isdecimal() else (99, number)


def load_results() -> Results:
    """Return the content of results.json; no rows when the file does not exist."""
    results: Results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {"rows": {}, "machine": {}, **results}


def save_results(results: Results) -> None:
    """Write the results to results.json."""
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def list_judged_rows(results: Results) -> list[dict[str, Any]]:
    """Return the rows that have a target or failed, sorted by number."""
    rows = (results["rows"][number] for number in sorted(results["rows"], key=make_sort_key) if number.isdecimal())
    return [row for row in rows if "failed" in row or "used" in row]


def _read_destroy_times(results: Results) -> dict[str, float]:
    """Return the median seconds of rows 1 and 2 to destroy fifty VMs, by the title of the bar in the plot."""
    values = {**results["rows"].get("2", {}).get("values", {}), **results["rows"].get("1", {}).get("values", {})}
    titles = {
        "ping": "a ping play",
        "limit": "asyncio, the limit",
        "ours": "agentlab_sandbox",
        "forks": "proxmox_kvm, 50 hosts",
        "loop": "proxmox_kvm, loop",
    }
    return {title: statistics.median(values[name]) for name, title in titles.items() if name in values}


# ---- texts ----


def format_row(row: dict[str, Any]) -> str:
    """Return a row as a line for the terminal."""
    if "failed" in row:
        return f"{row['row']:>6} FAILED   {row['failed']}"
    if "met" not in row:
        return f"{row['row']:>6} measured"
    return f"{row['row']:>6} {'met' if row['met'] else 'NOT MET':8} {row['what']}: {row['measured']} ({row['target']})"


def format_table(results: Results) -> str:
    """Return the judged rows as a table in Markdown."""
    lines = ["| # | what | to reach | measured | met | runs |", "|---|---|---|---|---|---|"]
    for row in list_judged_rows(results):
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


def format_conditions(results: Results) -> str:
    """Return a paragraph with the dates, the machine, other work that it had, and the rows that were not measured."""
    machine, rows = results["machine"], results["rows"].values()
    days = sorted({row["on"] for row in rows})
    other_cores = [float(row.get("others", 0)) for row in rows]
    busy = max(other_cores, default=0.0)
    other_work = (
        "nothing else ran"
        if busy <= QUIET_CORES
        else f"**other work was running**, up to {busy:.1f} of the {machine['cores']} cores were busy with it (each "
        "row's share is in `benchmarks/results.json`); ratios suffer less from that than times, and requests not at all"
    )
    missing = [str(number) for number in range(1, ROWS + 1) if str(number) not in results["rows"]]
    gaps = f" Not measured: row{'s' if len(missing) > 1 else ''} {', '.join(missing)}." if missing else ""
    return (
        f"Measured on {' to '.join(dict.fromkeys((days[0], days[-1])))}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, Linux {machine['kernel']}, Python {machine['python']}, ansible-core "
        f"{machine['ansible-core']}, community.proxmox {machine.get('community.proxmox')}; {other_work}.{gaps}"
    )


def format_lever_table(results: Results) -> str:
    """Return a table in Markdown of what the settings ``connections`` and ``poll_interval`` cost."""
    measurements = results["rows"].get("levers", {}).get("table")
    if not measurements:
        return "Not measured."
    lines = [
        "| `connections` | `poll_interval` | ms a VM | requests a VM | looks at tasks | memory |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {values['connections']} | {values['poll_interval']:g} s | {values['ms a VM']:.0f} | "
        f"{values['requests a VM']:.2f} | {values['looks at tasks']} | {values['memory MB']} MB |"
        for values in measurements
    ]
    return "\n".join(lines)


def format_scale_table(results: Results) -> str:
    """Return a table in Markdown of one node and a cluster side by side, and one of a play over many hosts."""
    scale = results["rows"].get("scale", {})
    if "node" not in scale:
        return "Not measured."
    node, cluster, fleet = scale["node"], scale["cluster"], scale["fleet"]
    lines = [
        f"| | one node, {node['sandboxes']} sandboxes | {cluster['nodes']} nodes, {cluster['sandboxes']:,} sandboxes |",
        "|---|---|---|",
    ]

    def format_value(value: Any) -> str:
        if isinstance(value, dict):
            requests = f", {value['requests']:,} requests" if value["requests"] != 1 else ", 1 request"
            return f"{value['seconds']:.1f} s{requests}{', {} MB'.format(value['MB']) if 'MB' in value else ''}"
        return f"{value}"

    for name in (name for name in node if name not in ("nodes", "sandboxes") and not name.startswith("destroy")):
        lines.append(f"| {name} | {format_value(node[name])} | {format_value(cluster[name])} |")
    # Node and cluster destroy different numbers of VMs, which are part of the names.
    destroys = ([name for name in part if name.startswith("destroy")] for part in (node, cluster))
    lines += [
        f"| destroy {node['sandboxes']:,} / 1,000 with {node_name.rpartition(', ')[2]} | "
        f"{format_value(node[node_name])} | {format_value(cluster[cluster_name])} |"
        for node_name, cluster_name in zip(*destroys, strict=True)
    ]
    lines += [
        "",
        f"| a play over {fleet['hosts']} hosts, forks={fleet['forks']} | seconds | against ping |",
        "|---|---|---|",
    ]
    titles = {
        "ping": "`ansible.builtin.ping`",
        "records": "`agentlab_sandbox_info`",
        "compared": "the same, compared with Proxmox VE",
    }
    lines += [f"| {title} | {fleet[name]:.0f} | {fleet[name] / fleet['ping']:.2f}x |" for name, title in titles.items()]
    return "\n".join(lines)


# ---- plots ----


def draw_text_plot(results: Results) -> str:
    """Return a plot of the share of each target that is used, and of the seconds to destroy fifty VMs, as text.

    A row is met when its bar ends before the vertical line.
    """
    half = _WIDTH // 2
    lines = [f"{'':>4} {'share of what the target allows; met left of the line':<{_WIDTH + 2}}"]
    for row in list_judged_rows(results):
        if "failed" in row:
            lines.append(f"{row['row']:>4} failed")
            continue
        length = min(_WIDTH, max(1, round(row["used"] * half)))
        drawn_row = "".join("|" if place == half else "#" if place < length else " " for place in range(_WIDTH))
        drawn_row = drawn_row.rstrip() if length > half else drawn_row[: half + 1]
        lines.append(f"{row['row']:>4} {drawn_row:<{_WIDTH}} {row['used'] * 100:4.0f} %")
    destroy_times = _read_destroy_times(results)
    if destroy_times:
        slowest = max(destroy_times.values())
        lines += ["", "     seconds to destroy 50 stopped VMs"]
        lines += [
            f"     {title:<28} {'#' * max(1, round(seconds / slowest * (_WIDTH - 12))):<{_WIDTH - 12}} {seconds:7.1f}"
            for title, seconds in destroy_times.items()
        ]
    return "\n".join(lines)


def draw_png(results: Results) -> None:
    """Draw docs/performance.png: what the text plot shows, and the growth with the number of VMs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in list_judged_rows(results) if "used" in row]
    destroy_times = _read_destroy_times(results)
    shares = {
        int(count): statistics.median(values)
        for count, values in results["rows"].get("13", {}).get("values", {}).get("share", {}).items()
    }
    figure, (targets, times, growth) = pyplot.subplots(
        1, 3, figsize=(15, 4.8), gridspec_kw={"width_ratios": [2, 1.6, 1.2]}, layout="constrained"
    )
    targets.barh(
        [row["row"] for row in rows],
        [min(row["used"], 2) for row in rows],
        color=["#2a7" if row["met"] else "#c43" for row in rows],
    )
    targets.axvline(1, color="black")
    targets.invert_yaxis()
    targets.set(title="share of what the target allows (met left of the line)", ylabel="row of the table", xlim=(0, 2))
    if destroy_times:
        titles, seconds = list(destroy_times), list(destroy_times.values())
        times.barh(titles, seconds, color=["#2a7" if title.startswith("agentlab") else "#89a" for title in titles])
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


# ---- the page ----


def write_page(results: Results) -> None:
    """Write the results into docs/performance.md, between the markers, and draw docs/performance.png.

    Raises ValueError when the page lacks a marker.
    """
    text = PAGE.read_text(encoding="utf-8")
    for name, section in {
        "when": format_conditions(results),
        "table": format_table(results),
        "plot": f"```text\n{draw_text_plot(results)}\n```",
        "levers": format_lever_table(results),
        "scale": format_scale_table(results),
    }.items():
        head, opening, rest = text.partition(f"<!-- {name} -->")
        _old_section, closing, tail = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise ValueError(f"{PAGE.name} has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"{head}{opening}\n{section}\n{closing}{tail}"
    PAGE.write_text(text, encoding="utf-8")
    draw_png(results)


if __name__ == "__main__":
    write_page(load_results())
    sys.exit(0)
