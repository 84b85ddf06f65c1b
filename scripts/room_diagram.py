# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Draw docs/rooms.svg from the import tables of tests/repository/test_imports.py; with --check, say whether it is
current.

A room stands one row above the highest room that it may import. An arrow that follows from others is left out.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "rooms.svg"
TABLES = ROOT / "tests" / "repository" / "test_imports.py"
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW, GAP, TOP = 1100, 200, 46, 92, 20, 60

Rooms = dict[str, tuple[str, str]]


def load_tables() -> tuple[Rooms, Rooms]:
    """Return the rooms of the core and those of the daemon."""
    spec = importlib.util.spec_from_file_location("import_tables", TABLES)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CORE_ROOMS, module.DAEMON_ROOMS


def rank_rooms(rooms: Rooms) -> dict[str, int]:
    """Return the row of each room, counted from the bottom."""
    ranks: dict[str, int] = {}
    for room, (_files, allowed) in sorted(rooms.items(), key=lambda item: len(item[1][1].split())):
        ranks[room] = 1 + max((ranks.get(other, 0) for other in allowed.split()), default=-1)
    # A second pass: a room may stand in the table before one that it imports.
    for room, (_files, allowed) in rooms.items():
        ranks[room] = 1 + max((ranks[other] for other in allowed.split()), default=-1)
    return ranks


def direct_imports(rooms: Rooms) -> list[tuple[str, str]]:
    """Return (room, imported room) without the pairs that follow from others."""
    allowed = {room: set(names.split()) for room, (_files, names) in rooms.items()}

    def reach(room: str) -> set[str]:
        return allowed[room].union(*(reach(other) for other in allowed[room]))

    return [
        (room, other)
        for room in rooms
        for other in sorted(allowed[room])
        if not any(other in reach(between) for between in allowed[room] - {other})
    ]


def draw_rooms(rooms: Rooms, left: int, width: int, bottom: int) -> list[str]:
    """Return the boxes and arrows of one table, within ``width`` from ``left``, its lowest row at ``bottom``."""
    ranks = rank_rooms(rooms)
    places: dict[str, tuple[int, int]] = {}
    for rank in sorted(set(ranks.values())):
        row = [room for room in rooms if ranks[room] == rank]
        step = width // len(row)
        for number, room in enumerate(row):
            places[room] = (left + number * step + step // 2, bottom - rank * ROW)
    parts = []
    for room, other in direct_imports(rooms):
        (x, y), (to_x, to_y) = places[room], places[other]
        start, end = y + BOX_HEIGHT, to_y - 3
        middle = (start + end) // 2
        parts.append(
            f'<path d="M {x} {start} C {x} {middle} {to_x} {middle} {to_x} {end}" fill="none" stroke="#64748b" '
            'stroke-width="1.3" marker-end="url(#tip)"/>'
        )
    for room, (x, y) in places.items():
        files = rooms[room][0]
        shown = files if len(files) <= 30 else files[:28].rpartition(" ")[0] + " ..."
        parts.append(
            f'<rect x="{x - BOX_WIDTH // 2}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="#f1f5f9" '
            'stroke="#334155" stroke-width="1.3"/>'
        )
        parts.append(f'<text x="{x}" y="{y + 19}" font-size="14" font-weight="600" text-anchor="middle">{room}</text>')
        parts.append(f'<text x="{x}" y="{y + 36}" font-size="11" fill="#475569" text-anchor="middle">{shown}</text>')
    return parts


def draw() -> str:
    """Return the picture: the core at the left, the daemon at the right."""
    core, daemon = load_tables()
    rows = 1 + max(rank_rooms(core).values())
    height = TOP + rows * ROW + GAP
    bottom = TOP + (rows - 1) * ROW + GAP
    core_width = 640
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img">',
        "<title>Rooms of the core and of the daemon: an arrow leads to a room that may be imported</title>",
        "<!-- Made by scripts/room_diagram.py from tests/repository/test_imports.py. Do not edit. -->",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#64748b"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{core_width // 2}" y="32" font-size="16" text-anchor="middle">core '
        "(plugins/module_utils/_core)</text>",
        f'<text x="{(core_width + WIDTH) // 2}" y="32" font-size="16" text-anchor="middle">daemon (imports the '
        "core)</text>",
        f'<path d="M {core_width} 20 V {height - 20}" stroke="#cbd5e1" stroke-width="1"/>',
        *draw_rooms(core, 0, core_width, bottom),
        *draw_rooms(daemon, core_width, WIDTH - core_width, bottom),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        current = FILE.exists() and FILE.read_text(encoding="utf-8") == draw()
        sys.exit(
            0 if current else f"Error: {FILE.relative_to(ROOT)} is not current; run python scripts/room_diagram.py"
        )
    FILE.write_text(draw(), encoding="utf-8")
