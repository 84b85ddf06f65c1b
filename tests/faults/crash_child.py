# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The processes that are killed: a warm parent that has the core imported forks one child a job, so a case costs
milliseconds.

A job names an operation, and the point at which its process kills itself, or loses its disk or its descriptors
(``fail``). Points are not listed anywhere: every Proxmox
request (before it is sent, and after it was carried out but before anything is made of its answer) and every database
commit (before and after) is one.

Reads one line of JSON a request: a list of jobs that run at the same time. Answers one line: for each its signal,
result and points.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

CORE = "ansible_collections.agentlab.proxmox.plugins.module_utils._core"


def fail_writes(_folder: str) -> None:
    """Let every write to a file fail from now on: SQLite calls that a disk I/O error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(folder: str) -> None:
    """Leave the file system of the records no room. Who began the job removes the file ``filler``."""
    try:
        with open(os.path.join(folder, "filler"), "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    assert os.statvfs(folder).f_bavail == 0, "the disk is not full"


def use_up_descriptors(_folder: str) -> None:
    """Leave this process no descriptor beyond those that are open."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


FAILURES: dict[str, Callable[[str], None]] = {
    "io": fail_writes,
    "full": fill_disk,
    "descriptors": use_up_descriptors,
}


class Points:
    """Counts the points a run passes. At one of them this process is killed, or what ``how`` says happens.

    ``how`` is "kill"; or "lose", which loses the answer to a COMMIT that was carried out; or {"run": command, "user":
    id}, which runs a command (one that ends the connections, or the server) and then goes on. ``fail`` takes the
    process's disk or descriptors away at a point: {"at": number, "kind": one of FAILURES, "folder": path}.
    """

    def __init__(self, kill_at: int | None, how: Any = "kill", fail: dict[str, Any] | None = None) -> None:
        self.kill_at = kill_at
        self.how = how
        self.fail = fail or {}
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def passed(self, label: str) -> bool:
        """Count a point; return whether the answer that came is to be lost."""
        with self._lock:
            self.seen.append(label)
            if len(self.seen) != self.kill_at:
                return False
            if self.how == "lose":
                return True
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            subprocess.run(
                self.how["run"], user=self.how["user"], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )
            return False

    def end_failure(self) -> None:
        """Give back what the failure took, so that the result can be written."""
        if self.fail:
            for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
                hard = resource.getrlimit(limit)[1]
                resource.setrlimit(limit, (hard, hard))

    def install(self, engine: str) -> None:
        from ansible_collections.agentlab.proxmox.plugins.module_utils._core.proxmox.client import ProxmoxClient

        request = ProxmoxClient._request

        def asked(client: Any, method: str, path: str, params: dict[str, Any]) -> Any:
            self.passed(f"before {method} {path}")
            try:
                return request(client, method, path, params)
            finally:
                self.passed(f"after {method} {path}")

        ProxmoxClient._request = asked  # type: ignore[method-assign]
        if engine == "sqlite":
            self._install_sqlite()
        else:
            self._install_postgresql()

    def _install_sqlite(self) -> None:
        from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.sqlite.engine import Database

        write = Database.write

        def written(database: Any, work: Callable[..., Any], **how: Any) -> Any:
            self.passed("before commit")
            try:
                return write(database, work, **how)
            finally:
                self.passed("after commit")

        Database.write = written  # type: ignore[method-assign,assignment]

    def _install_postgresql(self) -> None:
        """Points around each COMMIT: all of its transaction was written, and it was carried out."""
        import psycopg

        execute = psycopg.Connection.execute

        def executed(connection: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            if "INSERT INTO controllers" not in str(query):
                return execute(connection, query, *arguments, **options)
            self.passed("before commit")
            cursor = execute(connection, query, *arguments, **options)
            if self.passed("after commit"):
                connection.close()
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return cursor

        psycopg.Connection.execute = executed  # type: ignore[method-assign]


# ---- the operations, as the modules call them ----


def _told(outcomes: list[Any]) -> dict[str, Any]:
    return {"ok": not any(one.failed for one in outcomes), "outcomes": [one.public() for one in outcomes]}


def do_create(ctx: Any, **values: Any) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create

    return _told([create.run(ctx, create.Spec(**values))])


def do_power(ctx: Any, vmid: int, operation: str) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

    return _told([power.run(ctx, ctx.select_sandbox(vmid), operation)])


def do_destroy(ctx: Any, vmids: list[int], force: bool = False) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import destroy

    chosen = [ctx.select_sandbox(vmid) for vmid in vmids]
    for one in chosen:
        destroy.check(ctx, one, force)
    return _told(destroy.run(ctx, [(one, destroy.Request(force=force)) for one in chosen]))


def do_renew(ctx: Any, vmid: int, ttl: int) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease

    return _told([lease.renew(ctx, ctx.select_sandbox(vmid), ttl)])


def do_expire(ctx: Any) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import lease

    done = lease.expire(ctx)
    return {**_told(done.expired + done.renewed + done.failed), "suspended": done.suspended}


def do_prune(ctx: Any, states: list[str] | None = None) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import prune

    done = prune.run(ctx, prune.Selection(states=tuple(states or ("TIMEOUT",))))
    return {**_told(done.pruned + done.failed), "kept": [one.public() for one in done.kept]}


def do_reconcile(ctx: Any) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.maintenance import reconcile

    return {"ok": True, "drift": [one.public() for one in reconcile.run(ctx, apply=True)]}


def do_workspace(ctx: Any, word: str, name: str, vmid: int | None = None, **values: Any) -> dict[str, Any]:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.workspaces import workspace

    if word == "attached":
        done = workspace.ensure_attached(ctx, name, ctx.select_sandbox(vmid))
    else:
        done = {
            "present": workspace.ensure_present,
            "detached": workspace.ensure_detached,
            "absent": workspace.ensure_absent,
        }[word](ctx, name, **values)
    return {"ok": True, "outcome": done.outcome}


def do_look(ctx: Any) -> dict[str, Any]:
    return {"ok": True, "count": len(ctx.records.find_all())}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "create": do_create,
    "power": do_power,
    "destroy": do_destroy,
    "renew": do_renew,
    "expire": do_expire,
    "prune": do_prune,
    "reconcile": do_reconcile,
    "workspace": do_workspace,
    "look": do_look,
}


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """One operation in a context of its own, as a module run has it; errors are told, and only a bug leaves a trace."""
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import AgentlabError, make_host_error

    ctx = None
    try:
        ctx = Context(config.load(job.get("options", {}), job["env"]), actor=f"{job['op']}-{os.getpid()}")
        return OPERATIONS[job["op"]](ctx, **job.get("args", {}))
    except AgentlabError as error:
        return {"ok": False, "code": error.code, "message": error.message}
    except Exception as error:
        # As the edges of modules and of the daemon do.
        if known := make_host_error(error):
            return {"ok": False, "code": known.code, "message": known.message}
        return {"ok": False, "code": "trace", "message": traceback.format_exc()}
    finally:
        if ctx is not None:
            ctx.close()


# ---- a user (or a scheduler) that does this and that ----


def wander(job: dict[str, Any]) -> dict[str, Any]:
    """So many random operations, chosen by the seed; what each answered."""
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.context import Context
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreUnavailable

    dice = random.Random(job["seed"])
    told = []
    number = 0
    end = time.monotonic() + job["seconds"]
    while time.monotonic() < end:
        try:
            ctx = Context(config.load(job.get("options", {}), job["env"]), actor="looking")
            live = ctx.records.find_all()
            ctx.close()
        except StoreUnavailable as error:
            # Somebody took the database away: a person would try again in a moment.
            told.append({"op": "look", "code": error.code, "message": error.message})
            time.sleep(0.2)
            continue
        word = dice.choices(job["words"], job["weights"])[0]
        args: dict[str, Any] = {}
        if word == "create":
            if len(live) >= job.get("most", 12):
                word = "prune"
            else:
                number += 1
                args = {
                    "name": f"s{job['seed']}-{number}",
                    "ttl": dice.choice((1, 3, 6, 600)),
                    "keepalive": dice.random() < 0.1,
                }
        if word in ("stop", "start", "suspend", "complete", "fail", "renew", "destroy", "force"):
            if not live:
                continue
            running = [one for one in live if one.state == "RUNNING"]
            vmid = dice.choice(running if running and word != "start" and dice.random() < 0.8 else live).vmid
            args = {"vmid": vmid}
            if word == "renew":
                args["ttl"] = dice.choice((1, 3, 900))
            elif word in ("destroy", "force"):
                more = [one.vmid for one in dice.sample(live, min(len(live), dice.choice((1, 1, 2))))]
                args = {"vmids": more, "force": word == "force"}
                word = "destroy"
            else:
                args["operation"] = word
                word = "power"
        began = time.monotonic()
        done = perform({**job, "op": word, "args": args})
        told.append({"op": word, "args": args, "took": round(time.monotonic() - began, 2), **done})
    return {"ok": True, "told": told}


# ---- forking ----


def child(job: dict[str, Any], path: str) -> None:
    points = Points(job.get("kill"), job.get("how", "kill"), job.get("fail"))
    points.install("postgresql" if job["env"]["AGENTLAB_DATABASE"].startswith("postgresql:") else "sqlite")
    try:
        if "start" in job:
            # A race: all of them begin at the same moment.
            time.sleep(max(0.0, job["start"] - time.time()))
        found = wander(job) if job["op"] == "wander" else perform(job)
        points.end_failure()
        found["points"] = points.seen if job["op"] != "wander" else []
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, default=str)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def run(jobs: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    begun = []
    for number, job in enumerate(jobs):
        path = os.path.join(folder, f"{number}.json")
        if os.path.exists(path):
            os.unlink(path)
        pid = os.fork()
        if pid == 0:
            child(job, path)
        begun.append((pid, path, time.monotonic() + job.get("bound", 60)))
    answers = []
    for pid, path, bound in begun:
        late = False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > bound:
                late = True
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
                break
            time.sleep(0.003)
        answer: dict[str, Any] = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "late": late,
            "result": None,
        }
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                answer["result"] = json.load(file)
        answers.append(answer)
    return answers


def main() -> None:
    for name in (
        "sandboxes.create",
        "sandboxes.destroy",
        "sandboxes.lease",
        "vm.power",
        "maintenance.prune",
        "maintenance.reconcile",
        "workspaces.workspace",
        "context",
        "config",
    ):
        __import__(f"{CORE}.{name}")
    import proxmoxer.backends.https  # noqa: F401
    import requests  # noqa: F401
    import yaml  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="agentlab-crash-") as folder:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line), folder)), flush=True)


if __name__ == "__main__":
    main()
