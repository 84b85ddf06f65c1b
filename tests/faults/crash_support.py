# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the crash and concurrency tests share: the warm parent, a Proxmox that can be put back to where it was, and
the promises to check.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox import identity
from fakepve.model import FakeVm, TaskError

from support.double import Server
from support.engines import new_address

BYSTANDER = 1000

# What may be broken: a request's method, the end of its path, and how.
REQUEST_FAULTS = [
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
# How a task may end badly: its type and its exit status.
TASK_FAULTS = [
    ("qmclone", "clone failed: no space left"),
    ("qmstart", "start failed: QEMU exited with code 1"),
    ("qmdestroy", "storage is not online"),
    ("qmstop", "VM quit/powerdown failed - got timeout"),
    ("qmdestroy", "unexpected status"),
    ("qmstart", "unexpected status"),
]

CONFIG = """\
template: debian-13
shutdown_timeout: 5s
claim_timeout: 10s
doubt_window: 1s
wait_timeout: 20s
api_timeout: 5
"""


class Zygote:
    """The warm parent of crash_child.py; ``run`` gives jobs to children of it and waits for their answers."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if path]
        # In a process of its own: this one has the server's threads, and a fork would copy their locks.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def run(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run jobs at once, each in a child of its own, and return their answers in the order of ``jobs``."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the parent of the children died"
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def stop(self) -> None:
        """End the parent process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Rig:
    """A server, a database on one of the engines, and children that work on both. ``address``: of the database."""

    def __init__(
        self, folder: Path, *, time_scale: float = 0.02, engine: str = "sqlite", address: str | None = None
    ) -> None:
        (folder / "pve").mkdir()
        self.folder = folder
        self.server = Server(str(folder / "pve"), time_scale=time_scale)
        self.pve = self.server.pve
        self.pve.add_template()
        self._zygote: Zygote | None = None
        self.snippets = folder / "snippets"
        self.snippets.mkdir()
        self.pve.hold_snippets(str(self.snippets))
        (folder / "config.yaml").write_text(f"{CONFIG}snippets_dir: {self.snippets}\n", encoding="utf-8")
        self.env = self.server.environment(str(folder))
        self.engine = engine
        if engine != "sqlite":
            self.env["AGENTLAB_DATABASE"] = address or new_address(engine, "")
        self.database = Path(self.env["AGENTLAB_DATABASE"])
        self.bystanders: dict[int, dict[str, Any]] = {}
        self._kept: Any = None
        self._slow_tasks()

    @property
    def zygote(self) -> Zygote:
        """Start the warm parent at its first use, and return it."""
        if self._zygote is None:
            self._zygote = Zygote()
        return self._zygote

    def stop(self) -> None:
        """End the warm parent and the double."""
        if self._zygote:
            self._zygote.stop()
        self.server.stop()

    def _slow_tasks(self) -> None:
        # Tasks take a moment, so that a kill also meets them half done.
        whole = self.pve.task

        async def task(node: str, ttype: str, tid: Any, user: str, body: Any, **values: Any) -> Any:
            async def slow() -> Any:
                await self.pve.pause(self.task_seconds.get(ttype, 2))
                if ttype in self.task_fails:
                    if ttype == "qmclone":
                        # Proxmox removes what a failed clone had made.
                        self.pve.vms.remove(values["vm"])
                    raise TaskError(self.task_fails[ttype])
                return await body()

            return await whole(node, ttype, tid, user, slow, **values)

        self.task_seconds: dict[str, float] = {}
        # Tasks of these kinds fail with that text, and have done nothing.
        self.task_fails: dict[str, str] = {}
        self.pve.task = task

    # ---- doing ----

    def job(
        self,
        op: str,
        *,
        kill: int | None = None,
        how: Any = "kill",
        fail: dict[str, Any] | None = None,
        bound: float = 60,
        **args: Any,
    ) -> dict[str, Any]:
        """Return a job. ``kill``: the number of the point at which ``how`` happens (see crash_child.Points)."""
        return {
            "op": op,
            "args": args,
            "env": self.env,
            "options": {},
            "kill": kill,
            "how": how,
            "fail": {**fail, "folder": str(self.database.parent)} if fail else None,
            "bound": bound,
        }

    def do(
        self, op: str, *, kill: int | None = None, how: Any = "kill", fail: dict[str, Any] | None = None, **args: Any
    ) -> dict[str, Any]:
        """Run one operation in a child and return its answer. ``kill`` is the number of the step to kill it at."""
        return self.zygote.run([self.job(op, kill=kill, how=how, fail=fail, **args)])[0]

    def must(self, op: str, **args: Any) -> dict[str, Any]:
        """Run one operation that has to succeed, and return its result."""
        answer = self.do(op, **args)
        assert answer["result"] and answer["result"]["ok"], answer
        result: dict[str, Any] = answer["result"]
        return result

    def in_loop(self, work: Callable[[], Any]) -> Any:
        """Change the server's state in its own thread."""

        async def inside() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(inside(), self.server.loop).result(30)

    def idle(self) -> None:
        """Wait until no task is running."""
        end = time.monotonic() + 20
        while self.in_loop(lambda: any(task["status"] == "running" for task in self.pve.tasks.values())):
            assert time.monotonic() < end, "a task never ended"
            time.sleep(0.005)

    def well(self) -> None:
        """No more faults."""

        def work() -> None:
            self.pve.faults.clear()
            self.pve.task_endings.clear()
            self.task_fails.clear()

        self.in_loop(work)

    def spoil(self, kind: str, text: str) -> None:
        """Tasks of that kind fail with that text; "unexpected status" is a worker that died after its work."""
        self.in_loop(
            lambda: (self.pve.task_endings if text == "unexpected status" else self.task_fails).update({kind: text})
        )

    def foreign(self, vmid: int, **values: Any) -> None:
        """Somebody else's VM, that nobody may touch."""

        def work() -> None:
            vm = self.pve.make_foreign(vmid, **values)
            self.bystanders[vmid] = copy.deepcopy({"config": vm.config, "status": vm.status, "node": vm.node})

        self.in_loop(work)

    def sql(self, text: str, *values: Any) -> list[dict[str, Any]]:
        """Run one SQL statement on the records, and return its rows."""
        if self.engine != "sqlite":
            with self._server() as server:
                cursor = server.execute(text.replace("%", "%%").replace("?", "%s"), values)
                return cursor.fetchall() if cursor.description else []
        with closing(sqlite3.connect(self.database, timeout=30)) as conn:
            conn.row_factory = sqlite3.Row
            with conn:
                return [dict(row) for row in conn.execute(text, values).fetchall()]

    def _server(self) -> Any:
        """Return a connection with rows that are dicts."""
        import psycopg
        from psycopg.rows import dict_row

        return psycopg.connect(self.env["AGENTLAB_DATABASE"], row_factory=dict_row)

    def is_made(self) -> bool:
        """Return whether the tables are there."""
        return self.database.exists() if self.engine == "sqlite" else bool(self._tables())

    def _tables(self) -> list[str]:
        rows = self.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
        return [row["tablename"] for row in rows]

    # ---- there and back ----

    def keep(self) -> None:
        """Remember everything as it is now, for restore()."""
        self.idle()
        if self.engine != "sqlite":
            self._rows = {table: self.sql(f"SELECT * FROM {table}") for table in self._tables()}
        elif self.database.exists():
            self.sql("PRAGMA wal_checkpoint(TRUNCATE)")
            shutil.copy(self.database, self.folder / "kept.db")
        self._kept = self.in_loop(
            lambda: (
                [copy.deepcopy(vm.__dict__) for vm in self.pve.vms],
                copy.deepcopy(self.pve.storages),
                list(self.pve.tasklog),
            )
        )
        self._bystanders = copy.deepcopy(self.bystanders)
        self._files = {path.name: path.read_bytes() for path in self.snippets.iterdir()}

    def _restore_rows(self) -> None:
        # Waits for the transaction of a process that was killed just now, until the server has rolled it back.
        with self._server() as server:
            server.execute(f"TRUNCATE {', '.join(self._rows)}")
            # Rows are written back in any order.
            server.execute("SET LOCAL session_replication_role = replica")
            for table, rows in self._rows.items():
                for row in rows:
                    marks = ", ".join(["%s"] * len(row))
                    server.execute(
                        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})",
                        list(row.values()),
                    )

    def _restore_file(self) -> None:
        # With the note by which an older copy is recognised: here everything goes back, Proxmox VE included.
        note = self.database.with_name(f".{self.database.name}.latest")
        for name in (self.database, Path(f"{self.database}-wal"), Path(f"{self.database}-shm"), note):
            name.unlink(missing_ok=True)
        if (self.folder / "kept.db").exists():
            shutil.copy(self.folder / "kept.db", self.database)

    def restore(self) -> None:
        """Put cluster and records back to where ``keep`` found them."""
        self.idle()
        if self.engine == "sqlite":
            self._restore_file()
        else:
            self._restore_rows()
        self.bystanders = copy.deepcopy(self._bystanders)
        for path in self.snippets.iterdir():
            path.unlink()
        for name, data in self._files.items():
            (self.snippets / name).write_bytes(data)

        def work() -> None:
            vms, storages, tasklog = self._kept
            self.pve.vms[:] = []
            for values in vms:
                vm = FakeVm(values["vmid"], values["name"])
                vm.__dict__.update(copy.deepcopy(values))
                self.pve.vms.append(vm)
            self.pve.storages = copy.deepcopy(storages)
            self.pve.tasklog[:] = tasklog
            self.pve.tasks = {task["upid"]: task for task in tasklog}
            self.pve.requests.clear()
            self.pve.faults.clear()
            self.pve.task_endings.clear()
            self.pve.before = self.pve.after = None

        self.in_loop(work)

    # ---- the promises ----

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of all sandboxes, by VMID."""
        return self.sql("SELECT * FROM sandboxes ORDER BY vmid, created_at")

    def broken(self, *, settled: bool = True) -> list[str]:
        """Every promise that does not hold, as a sentence. ``settled``: nothing is under way any more."""
        self.idle()
        wrong = []
        rows = {row["uuid"]: row for row in self.records()}
        for vm in list(self.pve.vms):
            if vm.vmid in self.bystanders:
                continue
            for uuid in identity.read_markers(vm.config):
                if uuid not in rows or rows[uuid]["state"] == states.DESTROYED:
                    wrong.append(
                        f"VM {vm.vmid} is ours but has no live record ({rows.get(uuid, {}).get('state')}, "
                        f"{rows.get(uuid, {}).get('reason')})"
                    )
            smbios = identity.read_smbios_uuid(vm.config)
            wrong += [
                f"the record of {row['vmid']} is DESTROYED ({row['reason']}), and its VM is there"
                for row in rows.values()
                if row["state"] == states.DESTROYED and smbios and row["smbios_uuid"] == smbios
            ]
        for vmid, was in self.bystanders.items():
            vm = self.pve.vm(vmid)
            now = {"config": vm.config, "status": vm.status, "node": vm.node} if vm else None
            if now != was or self.pve.touched(vmid):
                wrong.append(f"somebody else's VM {vmid} was touched: {self.pve.touched(vmid)}, {was} became {now}")
        if settled:
            wrong += [f"claim left behind: {row}" for row in self.sql("SELECT * FROM claims")]
            wrong += [f"operation left behind: {row}" for row in self.sql("SELECT * FROM operations")]
        wrong += self._workspaces(settled)
        for path in self.snippets.iterdir():
            owner = next((row for uuid, row in rows.items() if uuid in path.name), None)
            # A creation that was given up keeps no secrets either, whether or not its VM is gone.
            if owner is None or owner["state"] in (states.DESTROYED, states.FAILED):
                wrong.append(f"snippet {path.name} left behind by {owner}")
        for uuid, row in rows.items():
            wrong += [f"{row['vmid']}: {text}" for text in self._chain(uuid, row)]
        return wrong

    def _workspaces(self, settled: bool) -> list[str]:
        """No workspace is lost, none is at two VMs, and records, VMs and storage say the same of it."""
        wrong = []
        rows = {
            row["id"]: row
            for row in self.sql(
                "SELECT w.*, s.vmid, s.workspace_id FROM workspaces w LEFT JOIN sandboxes s ON s.uuid = w.sandbox_uuid"
            )
        }
        for row in rows.values():
            where = f"workspace {row['name']} ({row['state']}, {row['reason']})"
            there = row["volume"] in self.pve.volumes_of(row["owner_vmid"])
            at = [vm.vmid for vm in self.pve.vms if any(row["volume"] in str(value) for value in vm.config.values())]
            if row["state"] in ("DETACHED", "ATTACHING", "ATTACHED", "DETACHING") and not there:
                wrong.append(f"{where} is lost")
            if (
                len(at) > 1
                or (at and row["state"] in ("DETACHED", "DELETED"))
                or (row["state"] == "ATTACHED" and at != [row["vmid"]])
            ):
                wrong.append(f"{where} is attached to {at}, by the records to {row['vmid']}")
            if row["state"] == "ATTACHED" and row["workspace_id"] != row["id"]:
                wrong.append(f"{where}: its sandbox does not say so")
            if row["state"] == "DELETED" and there:
                wrong.append(f"{where} left its volume behind")
            if settled and row["state"] in ("CREATING", "ATTACHING", "DETACHING", "DELETING"):
                wrong.append(f"{where} is not finished")
        owned = {
            volume
            for sid, store in self.pve.storages.items()
            for name in store.get("volumes", {})
            if "-ws-" in (volume := f"{sid}:{name}")
        }
        wrong += [f"volume {volume} has no record" for volume in owned - {row["volume"] for row in rows.values()}]
        shown = {row["workspace_id"] for row in self.records() if row["workspace_id"]}
        return wrong + [
            f"a sandbox names the workspace {ident}, which is not attached to it"
            for ident in shown
            if rows.get(ident, {}).get("state") not in ("ATTACHED", "DETACHING")
        ]

    def _chain(self, uuid: str, row: dict[str, Any]) -> list[str]:
        wrong = []
        state = None
        told = []
        for event in self.sql("SELECT * FROM events WHERE sandbox_uuid = ? ORDER BY id", uuid):
            told.append(
                f"{event['operation']} {event['from_state']}>{event['to_state']} {event['outcome']} {event['reason']}"
            )
            if event["from_state"] != state:
                wrong.append(
                    f"event {event['id']} begins in {event['from_state']}, but the record was in {state}: {told}"
                )
            moved = event["from_state"] is not None and event["to_state"] != event["from_state"]
            if moved and event["to_state"] not in states.TRANSITIONS[event["from_state"]]:
                wrong.append(f"no way from {event['from_state']} to {event['to_state']}: {told}")
            state = event["to_state"]
        if state != row["state"]:
            wrong.append(f"the record is in {row['state']}, but the events end in {state}: {told}")
        return wrong
