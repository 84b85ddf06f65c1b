# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A PostgreSQL server that refuses, for real: each sentence names the cause and a next step that fits it."""

from __future__ import annotations

import functools
import os
import pwd
import re
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError, StoreUnavailable
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import refusals

from support.engines import require_postgresql
from support.postgres import PostgresServer

_RULES = """\
host all pw 127.0.0.1/32 scram-sha-256
host all rejected 127.0.0.1/32 reject
hostssl all tlsonly 127.0.0.1/32 trust
host all tlsonly 127.0.0.1/32 reject
host all ident 127.0.0.1/32 ident
hostssl all bycert 127.0.0.1/32 cert
"""
_ROLES = """
CREATE ROLE pw LOGIN PASSWORD 'right'; CREATE ROLE rejected LOGIN; CREATE ROLE tlsonly LOGIN; CREATE ROLE ident LOGIN;
CREATE ROLE bycert LOGIN; CREATE ROLE nologin NOLOGIN; CREATE ROLE norights LOGIN
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server with TLS that knows roles of all kinds, and the tables of the records in the database ``records``."""
    require_postgresql()
    running = PostgresServer().create()
    running.execute("CREATE DATABASE records")
    open_database(running.uri("records")).close()
    running.execute(_ROLES)
    rules = running.data / "pg_hba.conf"
    rules.write_text(_RULES + rules.read_text())
    make_certificate(running)
    running.stop("fast")
    running.configure(ssl="on", ssl_ca_file="server.crt")
    running.start()
    yield running
    running.destroy()


def make_certificate(server: PostgresServer) -> None:
    """Make the key of a server that calls itself db1, and its certificate."""
    key, certificate = server.data / "server.key", server.data / "server.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=db1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    owner = server.data.stat()
    for path in (key, certificate):
        os.chown(path, owner.st_uid, owner.st_gid)
        path.chmod(0o600)


def refusal_of(work: Callable[[], Any]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        work()
    return caught.value


# What stands in place of tester@127.0.0.1:PORT/records -> what is told of the cause, and of the next step; whether the
# same request may succeed later without a change.
CASES: dict[str, tuple[str, str, str, bool]] = {
    "wrong password": (
        "pw:wrong@{server}/records",
        "authentication failed",
        "check the user, database_password",
        False,
    ),
    "no password": ("pw@{server}/records", "no password supplied", "check the user, database_password", False),
    "ident": ("ident@{server}/records", "Ident authentication failed", "pg_hba.conf", False),
    "no role": ("nobody@{server}/records", 'role "nobody" does not exist', "create it as docs/controllers.md", False),
    "no login": ("nologin@{server}/records", "not permitted to log in", "ALTER ROLE ... LOGIN", False),
    "no database": ("tester@{server}/nodb", '"nodb" does not exist', "create it as docs/controllers.md", False),
    "rejected": ("rejected@{server}/records", "pg_hba.conf rejects", "by a line of the server's pg_hba.conf", False),
    "TLS asked for": (
        "tlsonly@{server}/records?sslmode=disable",
        "pg_hba.conf rejects",
        "needs sslmode=verify-full in the URI",
        False,
    ),
    "no CA": (
        "tester@{server}/records?sslmode=verify-full&sslrootcert=/no",
        '"/no" does not',
        "set sslrootcert",
        False,
    ),
    "another CA": (
        "tester@{server}/records?sslmode=verify-full&sslrootcert={other}",
        "certificate verify failed",
        "set sslrootcert",
        False,
    ),
    "another name": (
        "tester@{server}/records?sslmode=verify-full&sslrootcert={ca}",
        "does not match host name",
        "name the server as the certificate does",
        False,
    ),
    "no key": (
        "tester@{server}/records?sslmode=require&sslcert={ca}&sslkey=/no",
        "private key file",
        "the key needs mode 0600",
        False,
    ),
    "no client certificate": (
        "bycert@{server}/records?sslmode=require&sslcert=/no",
        "requires a valid client certificate",
        "set sslcert and sslkey",
        False,
    ),
    "a client certificate of another role": (
        "bycert@{server}/records?sslmode=require&sslcert={client}&sslkey={key}",
        "certificate authentication failed",
        "set sslcert and sslkey",
        False,
    ),
    "a client certificate of another CA": (
        "bycert@{server}/records?sslmode=require&sslcert={other}&sslkey={key}",
        "alert unknown ca",
        "set sslcert and sslkey",
        False,
    ),
    "no certificate in the file": (
        "bycert@{server}/records?sslmode=require&sslcert={key}&sslkey={key}",
        "could not read certificate file",
        "set sslcert and sslkey",
        False,
    ),
    "TLS version": (
        "tester@{server}/records?sslmode=require&ssl_min_protocol_version=TLSv1&ssl_max_protocol_version=TLSv1.1",
        "SSL error",
        "share a TLS version",
        False,
    ),
    "bad option": ("tester@{server}/records?options=-cno%3D1", '"no"', "correct the options in the URI", False),
    "no rights": ("norights@{server}/records", "permission denied for table", "grant the run-time role", False),
    "no server": ("tester@127.0.0.1:1/records", "Connection refused", "start the server, or correct host", True),
    "no name": (
        "tester@no.invalid/records",
        "resolve host|translate host|Name or service",
        "or its entry in DNS",
        True,
    ),
    "no socket": ("tester@/records?host=/nowhere", "No such file", "the folder of its socket", True),
    "two servers": (
        "tester@127.0.0.1:1,{server}/nodb",
        'Connection refused.*"nodb" does not exist',
        "create it as docs/controllers.md says",
        True,
    ),
    "two servers, the last away": (
        "nobody@{server},127.0.0.1:1/records",
        '"nobody" does not exist.*Connection refused',
        "create it as docs/controllers.md says",
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_connection_that_is_refused_is_told_with_its_next_step(
    server: PostgresServer, tmp_path: Path, case: str
) -> None:
    where, cause, advice, passing = CASES[case]
    ca, other = tmp_path / "ca.crt", tmp_path / "other.crt"
    shutil.copy(server.data / "server.crt", ca)
    client, key = tmp_path / "client.crt", tmp_path / "key"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(other)], check=True, capture_output=True)
    sign = ["openssl", "x509", "-days", "1", "-CA", str(ca), "-CAkey", str(server.data / "server.key")]
    request = ["openssl", "x509", "-x509toreq", "-in", str(other), "-signkey", str(key), "-out", f"{key}.csr"]
    subprocess.run(request, check=True, capture_output=True)
    sign += ["-CAcreateserial", "-req", "-in", f"{key}.csr", "-out", str(client)]
    subprocess.run(sign, check=True, capture_output=True)
    user, _colon, password = where.partition("@")[0].partition(":")
    place = where.partition("@")[2].format(
        server=f"127.0.0.1:{server.port}", ca=ca, other=other, client=client, key=key
    )

    def use() -> None:
        with closing(open_database(f"postgresql://{user}@{place}", password=password or None)) as database:
            database.read("SELECT * FROM sandboxes")

    error = refusal_of(use)
    check(error, cause, advice, passing)


def check(error: StoreError, cause: str, advice: str, passing: bool) -> None:
    assert re.search(cause, error.message) and advice in error.message, error.message
    assert isinstance(error, StoreUnavailable) == passing, error.message
    assert "look at the server and the network" not in error.message
    # Whoever reads it must learn what became of the request.
    assert ("Nothing is changed in Proxmox VE meanwhile" if passing else "othing was written") in error.message


def test_a_program_that_is_no_postgresql_is_told() -> None:
    require_postgresql()
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _peer = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        error = refusal_of(lambda: open_database(f"postgresql://a@127.0.0.1:{listener.getsockname()[1]}/x"))
        thread.join()
    check(error, "invalid response", "another program listens there", False)


def write(database: Any) -> None:
    database.write(lambda conn: conn.execute("UPDATE meta SET value = value"))


def test_a_running_process_that_the_server_refuses_tells_it_at_reads_and_writes(server: PostgresServer) -> None:
    uri = server.uri("records")
    setting = "ALTER DATABASE records SET {}"
    with closing(open_database(uri)) as before:
        server.execute(setting.format("default_transaction_read_only = on"))
        try:
            check(refusal_of(lambda: open_database(uri)), "read-only", "promote the standby", True)
            with closing(open_database(f"{uri}?target_session_attrs=any")) as database:
                check(refusal_of(lambda: write(database)), "refuses: cannot execute", "promote the standby", True)
            server.execute(setting.format("statement_timeout = '200ms'"))
            with closing(open_database(f"{uri}?target_session_attrs=any")) as database:
                slow = refusal_of(lambda: database.read("SELECT pg_sleep(9)"))
                check(slow, "refuses: canceling statement", "raise statement_timeout", True)
        finally:
            server.execute("ALTER DATABASE records RESET ALL")
        for broken, whole in (
            ("sandboxes RENAME TO elsewhere", "elsewhere RENAME TO sandboxes"),
            ("meta RENAME TO elsewhere", "elsewhere RENAME TO meta"),
            ("sandboxes RENAME vmid TO elsewhere", "sandboxes RENAME elsewhere TO vmid"),
        ):
            server.execute(f"ALTER TABLE {broken}", "records")
            query = "SELECT vmid FROM sandboxes" if "sandboxes" in broken else "SELECT value FROM meta"
            refusal = refusal_of(functools.partial(before.read, query))
            check(refusal, "does not exist", "its tables are not as this release", False)
            server.execute(f"ALTER TABLE {whole}", "records")
        write(before)


def test_a_role_and_a_server_without_connections_are_told(server: PostgresServer) -> None:
    with ExitStack() as stack:
        server.execute("CREATE ROLE limited LOGIN CONNECTION LIMIT 1")
        server.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO limited", "records")
        place = server.uri("records").partition("@")[2]
        database = stack.enter_context(closing(open_database(f"postgresql://limited@{place}")))
        check(refusal_of(lambda: write(database)), "refuses: .*too many connections", "CONNECTION LIMIT", True)
    server.execute("ALTER DATABASE records CONNECTION LIMIT 0")
    try:
        error = refusal_of(lambda: open_database(f"postgresql://norights@{place}"))
        check(error, "refuses: .*too many connections", "CONNECTION LIMIT", True)
    finally:
        server.execute("ALTER DATABASE records CONNECTION LIMIT -1")


def test_a_process_without_descriptors_says_so(server: PostgresServer) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    with closing(open_database(server.uri("records"))) as database:
        database.read("SELECT 1")
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            error = refusal_of(lambda: write(database))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert used > 2
    check(error, "database postgresql", "no file descriptor left", True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the small disk")
def test_a_full_disk_of_the_server_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    """The tables are on a tmpfs of a few MB that only the server's mount namespace has."""
    require_postgresql()
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        pytest.skip("this place allows no mounts")
    server = PostgresServer().create()
    disk = server.folder / "disk"
    disk.mkdir()
    account = pwd.getpwuid(server.data.stat().st_uid)
    server.stop("fast")
    try:
        # The server starts in the namespace, and so sees the small disk; nobody else does.
        options = f"-p {server.port} -k {server.folder} -c listen_addresses=127.0.0.1"
        start = f"pg_ctl -D {server.data} -w -t 60 -l {server.folder}/log -o '{options}' start"
        programs = server._programs
        subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-ec"),
                f"mount -t tmpfs -o size=24m,mode=0700,uid={account.pw_uid},gid={account.pw_gid} tmpfs {disk}; "
                f"exec setpriv --reuid={account.pw_uid} --regid={account.pw_gid} --clear-groups {programs}/{start}",
            ],
            check=True,
            capture_output=True,
            cwd=server.folder,
        )
        server.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
        server.execute("CREATE DATABASE records TABLESPACE small")
        with closing(open_database(server.uri("records"))) as database:
            error = None
            for number in range(2000):
                try:
                    database.write(
                        lambda conn: conn.execute(
                            "INSERT INTO meta (key, value) VALUES (?, ?)",
                            (f"fill {number}", os.urandom(50000).hex()),  # noqa: B023
                        )
                    )
                except StoreError as refused:
                    error = refused
                    break
            assert error is not None
            check(error, "refuses: .*No space left", "the disk of the server is full; free some space there", True)
            rows = database.read("SELECT count(*) FROM meta WHERE key LIKE 'fill %'")[0][0]
            assert rows == number
    finally:
        server.destroy()


def test_the_newest_state_that_fits_counts_and_every_step_is_reached() -> None:
    assert refusals.next_step("53300", ["x"]) != refusals.next_step("53200", ["x"])
    assert refusals.next_step("99999", ["certificate"]) is None
    assert refusals.next_step(None, ["something new"]) is None
    for part, step in refusals._BY_TEXT:
        reached = refusals.next_step(None, [f"it says: {part} and more"])
        assert reached is not None and reached.advice == step.advice, part


def test_several_servers_are_told_by_old_and_new_libraries() -> None:
    """psycopg 3.1 (Debian 12) hands on libpq's own list; 3.2 makes one."""
    first, second = (
        f'connection to server at "db{number}", port 5432 failed: {why}'
        for number, why in ((1, "FATAL:  sorry, too many clients already"), (2, "session is read-only"))
    )
    old = f"connection failed: {first}\n{second}"
    new = (
        f"connection failed: {second}\nMultiple connection attempts failed. All failures were:\n"
        f"- host: 'db1', port: '5432', hostaddr: None: connection failed: {first}\n"
        f"- host: 'db2', port: '5432', hostaddr: None: connection failed: {second}"
    )
    for text in (old, new):
        assert refusals.describe(Exception(text)) == [first, second]
        step = refusals.next_step(None, [first, second])
        assert step is not None and "max_connections" in step.advice and step.passing
    guess = f"connection failed: {first}\n\tIs the server running on that host?"
    assert refusals.describe(Exception(guess)) == [first]
