# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the scenarios are written with: tasks, sandboxes that are there already, and what was written."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from support.play import Run, play

COLLECTION = "agentlab.proxmox"


def task(
    title: str,
    module: str,
    /,
    *,
    before: Callable[[], Any] | None = None,
    fails: bool = False,
    check: bool | None = None,
    diff: bool | None = None,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return a task of a story: the module by its full name.

    ``fails`` says that it is to fail, ``before`` what happens before it.
    """
    entry: dict[str, Any] = {
        "name": title,
        f"{COLLECTION}.{module}" if module.startswith("agentlab_") else module: options,
        **(keywords or {}),
    }
    if before:
        entry["before"] = before
    if fails:
        entry["ignore_errors"] = True
    if check is not None:
        entry["check_mode"] = check
    if diff is not None:
        entry["diff"] = diff
    return entry


def tell(tasks: list[dict[str, Any]], env: dict[str, str], tmp_path: Path, pve: Any, **options: Any) -> Run:
    """Run the story in one playbook.

    Those tasks fail that are to fail, and there is no warning and no traceback anywhere.
    """
    run = play(tasks, env, tmp_path, pve=pve, **options)
    expected = [row["name"] for row in tasks if row.get("ignore_errors")]
    failed = [
        entry["task"] for entry in run.results if entry["status"] in ("failed", "unreachable") and not entry.get("item")
    ]
    told = {entry["task"]: entry["result"].get("msg") for entry in run.results}
    unforeseen = {name: told[name] for name in failed if name not in expected}
    assert failed == expected, f"failed: {unforeseen}; did not: {set(expected) - set(failed)}"
    assert run.rc == 0 and not run.warnings, f"rc={run.rc} {run.warnings}\n{run.output}"
    return run


def writes(requests: dict[str, int]) -> list[str]:
    """Return the requests that may change something."""
    return sorted(name for name in requests if not name.startswith("GET "))


def written(database: str) -> tuple[Any, ...]:
    """Return all that is in the records, and the bytes of the file: equal means that nothing was written."""
    path = Path(database)
    if not path.exists():
        return ("missing",)
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as conn:
        dump = list(conn.iterdump())
    conn.close()
    return (path.read_bytes(), path.stat().st_mtime_ns, dump)


def records(database: str) -> list[str]:
    """Return the rows of sandboxes and their events, without what a run notes of the clocks and the cluster."""
    return [line for line in written(database)[2] if 'INTO "sandboxes"' in line or 'INTO "events"' in line]


def edit(env: dict[str, str], vmids: Iterable[int], **values: Any) -> None:
    """Change live records behind the product's back: to let time pass."""
    conn = sqlite3.connect(env["AGENTLAB_DATABASE"])
    with conn:
        for vmid in vmids:
            names = ", ".join(f"{name} = ?" for name in values)
            assert (
                conn.execute(
                    f"UPDATE sandboxes SET {names} WHERE vmid = ? AND state != 'DESTROYED'", (*values.values(), vmid)
                ).rowcount
                == 1
            )
    conn.close()


def state_of(env: dict[str, str], vmid: int) -> str:
    """Return the state of the newest record of a VMID."""
    conn = sqlite3.connect(env["AGENTLAB_DATABASE"])
    row = conn.execute(
        "SELECT state FROM sandboxes WHERE vmid = ? ORDER BY state = 'DESTROYED', state_changed_at DESC LIMIT 1",
        (vmid,),
    ).fetchone()
    conn.close()
    return str(row[0])
