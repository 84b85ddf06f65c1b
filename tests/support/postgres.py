# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""PostgreSQL servers for tests: on a loopback port, in a folder of their own, as an ordinary user."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .daemon import free_port

WHY_SKIPPED = (
    "PostgreSQL or psycopg is not installed: apt-get install postgresql, and make setup. Nothing of PostgreSQL was "
    "tested"
)


def find_programs() -> Path | None:
    """Return the folder with initdb and pg_ctl of the newest PostgreSQL on this machine, or None."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parents[1].name))
    if debian:
        return debian[-1].parent
    program = shutil.which("pg_ctl")
    return Path(program).resolve().parent if program else None


def is_installed() -> bool:
    """Return whether tests on PostgreSQL can run here."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return False
    return find_programs() is not None


class PostgresServer:
    """One server. ``uri()`` makes a fresh database and returns its URI."""

    def __init__(self, port: int | None = None) -> None:
        programs = find_programs()
        assert programs is not None, WHY_SKIPPED
        self._programs = programs
        self._temporary = tempfile.TemporaryDirectory(prefix="agentlab-postgres-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.data = self.folder / "data"
        self.port = port or free_port()
        self.user = "tester"
        self._numbers = itertools.count(1)
        # initdb refuses root.
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            name = next(name for name in ("postgres", "nobody") if _exists(name))
            account = pwd.getpwnam(name)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._account = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs as the server's user; return what it prints."""
        process = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            check=False,
            **self._account,
        )
        assert process.returncode == 0, f"{program} {' '.join(arguments)}: {process.stdout}{process.stderr}"
        return process.stdout

    def create(self, **settings: str) -> PostgresServer:
        """Make the folder of a new server and start it."""
        self.run("initdb", "-D", str(self.data), "-A", "trust", "-U", self.user, "--no-sync", "-E", "UTF8")
        self.configure(fsync="off", max_connections="200", wal_level="replica", **settings)
        self.start()
        return self

    def configure(self, **settings: str) -> None:
        """Append settings; they count from the next start."""
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self.run(
            "pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", str(self.folder / "log"), "-o", options, "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; ``mode`` is pg_ctl's: immediate, fast or smart."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-m", mode, "stop")

    def command(self, program: str, *arguments: str) -> dict[str, Any]:
        """Return a call of one of PostgreSQL's programs for another process: the command, and the user to run it."""
        return {"run": [str(self._programs / program), *arguments], "user": self._account.get("user", os.geteuid())}

    def restart_command(self) -> dict[str, Any]:
        """Return the call that kills the server as a crash would, and starts it again."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        arguments = ("-D", str(self.data), "-w", "-t", "60", "-m", "immediate", "-l", str(self.folder / "log"))
        return self.command("pg_ctl", *arguments, "-o", options, "restart")

    def pid(self) -> int:
        """Return the id of the server's first process."""
        return int((self.data / "postmaster.pid").read_text().split("\n")[0])

    def pause(self) -> None:
        """Stop the main process: nobody gets a new connection, and those that are there go on."""
        os.kill(self.pid(), signal.SIGSTOP)

    def standby(self, port: int | None = None) -> PostgresServer:
        """Start a streaming standby of this server, on that port or on a free one."""
        other = PostgresServer(port)
        self_uri = f"host=127.0.0.1 port={self.port} user={self.user}"
        other.run("pg_basebackup", "-D", str(other.data), "-d", self_uri, "-R", "-X", "stream", "-c", "fast")
        other.user = self.user
        other.start()
        return other

    def promote(self) -> None:
        """Make a standby the primary."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def execute(self, sql: str, database: str = "postgres") -> list[Any]:
        """Run statements as superuser; return the rows of the last one."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=self.user, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def uri(self, database: str | None = None) -> str:
        """Return the URI of a database; without a name of a new, empty one."""
        if database is None:
            database = f"test_{os.getpid()}_{next(self._numbers)}"
            self.execute(f"CREATE DATABASE {database}")
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{database}"

    def destroy(self) -> None:
        """End the server and remove its folder."""
        if (self.data / "postmaster.pid").exists():
            self.stop()
        self._temporary.cleanup()


class Pair:
    """A PostgreSQL server and its synchronous standby, on two ports that stay: one takes the other's place."""

    def __init__(self) -> None:
        self.primary = PostgresServer().create()
        ports = self.primary.port, free_port()
        database = self.primary.uri().rpartition("/")[2]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.address = f"postgresql://{self.primary.user}@{hosts}/{database}?target_session_attrs=read-write"
        self._follow(ports[1])

    def _follow(self, port: int) -> None:
        """Start a standby on that port, and have commits wait for it from then on."""
        self.standby = self.primary.standby(port)
        self.primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.primary.execute("SELECT pg_reload_conf()")

    def disturb(self, what: str, back: Callable[[], None] = lambda: None) -> None:
        """Cut all connections (cut), kill the server and start it (database), or kill it for good (failover).

        ``back`` is called as soon as a server takes connections again. After a failover commits still wait for the new
        standby then.
        """
        if what == "cut":
            self.primary.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            back()
        elif what == "database":
            self.primary.stop()
            self.primary.start()
            back()
        else:
            port = self.primary.port
            self.primary.destroy()
            self.standby.promote()
            self.primary = self.standby
            back()
            self._follow(port)

    def destroy(self) -> None:
        """End both servers and remove their folders."""
        self.standby.destroy()
        self.primary.destroy()


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
