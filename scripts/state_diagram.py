# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Draws docs/states.svg from the rule tables; with --check: says whether it is current.

Where the boxes stand is decided here by hand; which arrows there are, the tables say. Drawing fails when a transition
of the table has no arrow, an arrow no transition, or an arrow is labelled with an operation that the state it starts
from does not allow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "states.svg"
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states

WIDTH, HEIGHT, BOX = 1080, 560, 40


class Box(NamedTuple):
    """A state: upper left corner, width, and a kind that gives its colour."""

    x: int
    y: int
    width: int
    kind: str


class Arrow(NamedTuple):
    """From the states of ``sources`` (several: their common frame) to ``target`` along the points; ``back`` when it
    goes both ways.
    """

    sources: tuple[str, ...]
    target: str
    points: tuple[tuple[int, int], ...]
    back: bool = False
    # Operation, where its name stands (nowhere: the arrow beside has the same), and the words when they are others than
    # the name
    operation: str | None = None
    at: tuple[int, int] = (0, 0)
    words: str | None = None


BOXES = {
    states.REQUESTED: Box(60, 92, 130, "creating"),
    states.PROVISIONING: Box(230, 92, 130, "creating"),
    states.BOOTING: Box(400, 92, 130, "creating"),
    states.READY: Box(570, 92, 130, "live"),
    states.RUNNING: Box(740, 92, 130, "live"),
    states.SUSPENDED: Box(655, 200, 130, "live"),
    states.COMPLETED: Box(918, 200, 122, "over"),
    states.FAILED: Box(60, 330, 130, "bad"),
    states.TIMEOUT: Box(230, 330, 130, "bad"),
    states.STOPPED: Box(480, 330, 390, "over"),
    states.DESTROYED: Box(480, 486, 390, "gone"),
}
# x, y, width, height, title: what is true of all states inside
FRAMES = (
    (24, 24, 1032, 410, "a VM may exist"),
    (40, 54, 846, 206, "the lease runs"),
    (50, 82, 830, 62, ""),
)
_ROW = (states.REQUESTED, states.PROVISIONING, states.BOOTING, states.READY, states.RUNNING)
_LEASED = (*_ROW, states.SUSPENDED)
ARROWS = (
    Arrow((states.REQUESTED,), states.PROVISIONING, ((190, 112), (230, 112))),
    Arrow((states.PROVISIONING,), states.BOOTING, ((360, 112), (400, 112))),
    Arrow((states.BOOTING,), states.READY, ((530, 112), (570, 112))),
    Arrow((states.READY,), states.RUNNING, ((700, 112), (740, 112))),
    Arrow((states.READY,), states.SUSPENDED, ((680, 132), (680, 200)), back=True, operation="suspend", at=(720, 170)),
    Arrow((states.RUNNING,), states.SUSPENDED, ((760, 132), (760, 200)), back=True, operation="suspend"),
    Arrow((states.SUSPENDED,), states.STOPPED, ((720, 240), (720, 330)), operation="stop", at=(704, 302)),
    Arrow(
        (states.READY,),
        states.STOPPED,
        ((600, 132), (600, 330)),
        back=True,
        operation="stop",
        at=(562, 302),
        words="stop / start",
    ),
    Arrow(
        (states.RUNNING,),
        states.STOPPED,
        ((840, 132), (840, 330)),
        back=True,
        operation="stop",
        at=(802, 302),
        words="stop / start",
    ),
    Arrow((states.STOPPED,), states.BOOTING, ((505, 330), (505, 132)), operation="start", at=(487, 302)),
    Arrow(
        (states.RUNNING,), states.COMPLETED, ((870, 112), (979, 112), (979, 200)), operation="complete", at=(930, 104)
    ),
    Arrow((states.COMPLETED,), states.STOPPED, ((979, 240), (979, 350), (870, 350)), operation="stop", at=(930, 342)),
    Arrow((states.TIMEOUT,), states.STOPPED, ((360, 350), (480, 350)), operation="stop", at=(420, 342)),
    Arrow(
        (states.FAILED,),
        states.STOPPED,
        ((125, 370), (125, 400), (520, 400), (520, 370)),
        operation="stop",
        at=(420, 392),
    ),
    Arrow(_ROW, states.FAILED, ((125, 144), (125, 330)), operation="fail", at=(92, 302), words="failed"),
    Arrow(_LEASED, states.TIMEOUT, ((295, 260), (295, 330)), operation="expire", at=(258, 302), words="lease over"),
    Arrow(
        tuple(name for name in states.STATES if name != states.DESTROYED),
        states.DESTROYED,
        ((675, 434), (675, 486)),
        operation="force_destroy",
        at=(855, 464),
        words="destroy, prune: only when the VM is proven to be gone",
    ),
)
COLOURS = {
    "creating": ("#dbeafe", "#1d4ed8"),
    "live": ("#dcfce7", "#15803d"),
    "over": ("#f1f5f9", "#475569"),
    "bad": ("#fee2e2", "#b91c1c"),
    "gone": ("#334155", "#0f172a"),
}


def check() -> None:
    """Every transition has one arrow, every arrow its transitions, and every label an operation that its sources
    allow.
    """
    drawn: list[tuple[str, str]] = []
    for arrow in ARROWS:
        pairs = [(source, arrow.target) for source in arrow.sources]
        drawn += pairs + ([(arrow.target, source) for source in arrow.sources] if arrow.back else [])
        allowed = states.OPERATIONS[arrow.operation].allowed if arrow.operation else None
        # A creation fails by itself; whoever reports a failure does it in RUNNING.
        if allowed is not None and arrow.operation != "fail" and not set(arrow.sources) <= set(allowed):
            raise SystemExit(f"Error: {arrow.operation} is not allowed in all of {arrow.sources}")
    table = [(state, follow) for state, follows in states.TRANSITIONS.items() for follow in follows]
    if sorted(drawn) != sorted(table):
        raise SystemExit(
            f"Error: not drawn: {sorted(set(table) - set(drawn))}; drawn, but not in the table: "
            f"{sorted(set(drawn) - set(table))}"
        )
    if set(BOXES) != set(states.STATES):
        raise SystemExit("Error: the boxes are not the states")


def draw() -> str:
    """The picture; SVG that needs nothing from elsewhere."""
    check()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>States of a sandbox, and what follows what</title>",
        "<!-- Made by scripts/state_diagram.py from the rule tables. Do not edit. -->",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="#334155"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
    ]
    for x, y, width, height, title in FRAMES:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" fill="none" stroke="#94a3b8" '
            'stroke-dasharray="5 4"/>'
        )
        if title:
            parts.append(f'<text x="{x + 14}" y="{y + 19}" font-size="13" fill="#64748b">{title}</text>')
    for arrow in ARROWS:
        path = " ".join(f"{'M' if number == 0 else 'L'}{x} {y}" for number, (x, y) in enumerate(arrow.points))
        start = ' marker-start="url(#tip)"' if arrow.back else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="#334155" stroke-width="1.6" stroke-linejoin="round" '
            f'marker-end="url(#tip)"{start}/>'
        )
    for arrow in ARROWS:
        if arrow.operation and any(arrow.at):
            x, y = arrow.at
            parts.append(
                f'<text x="{x}" y="{y}" font-size="12" fill="#475569" '
                f'text-anchor="middle">{arrow.words or arrow.operation}</text>'
            )
    for name, box in BOXES.items():
        fill, line = COLOURS[box.kind]
        ink = "#ffffff" if box.kind == "gone" else line
        parts.append(
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{BOX}" rx="8" fill="{fill}" stroke="{line}" '
            'stroke-width="1.5"/>'
        )
        parts.append(
            f'<text x="{box.x + box.width // 2}" y="{box.y + 25}" font-size="14" font-weight="600" fill="{ink}" '
            f'text-anchor="middle">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(
            0
            if FILE.read_text(encoding="utf-8") == draw()
            else f"Error: {FILE.relative_to(ROOT)} is not current; run python scripts/state_diagram.py"
        )
    FILE.write_text(draw(), encoding="utf-8")
