# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libpq takes from a URI and around it: passfile, service, encoding, hosts. Each fault has its next step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import database_address
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.clock import SystemClock
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError, StoreUnavailable
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import workspaces
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.postgres import engine, refusals
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.records import Records

from support.daemon import free_port
from support.engines import require_postgresql
from support.postgres import PostgresServer

SECRET = "wrong-7y"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server that asks one role for a password, with databases of several encodings."""
    require_postgresql()
    running = PostgresServer().create()
    running.execute("CREATE ROLE guarded LOGIN PASSWORD 'right-7y'")
    running.execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    running.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    running.execute("CREATE DATABASE utf8")
    # The tables of utf8 may belong to another role: the tests run in any order.
    running.execute("CREATE DATABASE guarded OWNER guarded")
    rules = running.data / "pg_hba.conf"
    rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    running.stop("fast")
    running.start()
    yield running
    running.destroy()


def fail(value: str, password: str | None = None) -> StoreError:
    """Return the error of opening the records. Neither it nor what it was raised from shows the password."""
    address = database_address.parse(value)
    with pytest.raises(StoreError) as caught:
        open_database(address.text, password=password or address.password)
    assert SECRET not in f"{caught.value}{caught.value.detail}{caught.value.__cause__}"
    return caught.value


@pytest.mark.parametrize(
    ("parameters", "words", "todo"),
    [
        ("service=none", 'service "none" not found', "name a service of ~/.pg_service.conf"),
        ("port=1,2,3", "could not match 3 port numbers", "give one port and one hostaddr for each host of the URI"),
        ("target_session_attrs=standby", "is not in hot standby mode", "leave target_session_attrs out"),
        ("target_session_attrs=read-only", "is not read-only", "leave target_session_attrs out"),
        ("options=-c%20search_path%3Dnone", "no schema has been selected", "make the schema of search_path"),
    ],
)
def test_what_is_set_wrong_is_told_with_what_to_do(
    postgres: PostgresServer, parameters: str, words: str, todo: str
) -> None:
    error = fail(f"postgresql://tester@127.0.0.1:{postgres.port}/utf8?{parameters}")
    assert words in error.message and todo in error.message, error.message
    assert not isinstance(error, StoreUnavailable), "nothing that comes back by itself"
    assert "connection is bad" not in error.message


def test_a_wrong_password_of_the_uri_is_not_shown(postgres: PostgresServer) -> None:
    error = fail(f"postgresql://guarded:{SECRET}@127.0.0.1:{postgres.port}/utf8")
    assert "password authentication failed" in error.message


@pytest.mark.parametrize(
    ("mode", "todo"),
    [
        (0o640, "has mode 0640, so libpq does not use it: chmod 0600 "),
        (0o600, "has no line for this"),
        (None, "does not exist: make it"),
    ],
)
@pytest.mark.parametrize("by", ["URI", "environment"])
def test_a_passfile_that_libpq_does_not_use_is_told(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, todo: str, by: str
) -> None:
    file = tmp_path / "pgpass"
    if mode is not None:
        file.write_text(f"elsewhere:*:*:*:{SECRET}\n")
        file.chmod(mode)
    uri = f"postgresql://guarded@127.0.0.1:{postgres.port}/utf8"
    if by == "URI":
        uri += f"?passfile={file}"
    else:
        monkeypatch.setenv("PGPASSFILE", str(file))
    error = fail(uri)
    assert f"no password supplied: the passfile {file} {todo}" in error.message


def test_each_of_several_hosts_is_named_with_what_is_wrong_there(postgres: PostgresServer) -> None:
    standby = postgres.standby()
    closed = free_port()
    try:
        uri = f"postgresql://tester@127.0.0.1:{closed},127.0.0.1:{standby.port}/utf8"
        error = fail(uri)
    finally:
        standby.destroy()
    assert isinstance(error, StoreUnavailable), "a standby may be promoted at any time"
    assert "Connection refused" in error.message and "session is read-only" in error.message
    assert error.message.count("session is read-only") == 1
    assert "promote the standby" in error.message
    error = fail(f"postgresql://tester@127.0.0.1:{closed},127.0.0.1:{free_port()}/utf8")
    assert error.message.count("Connection refused") == 2


@pytest.mark.parametrize("name", ["utf8", "ascii"])
@pytest.mark.parametrize("client", ["LATIN1", "SQL_ASCII"])
def test_every_text_is_stored_whatever_encoding_the_client_is_told_to_use(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, name: str, client: str
) -> None:
    """A server that was made where no locale is set has the encoding SQL_ASCII."""
    monkeypatch.setenv("PGCLIENTENCODING", client)
    database = open_database(f"postgresql://tester@127.0.0.1:{postgres.port}/{name}")
    records = Records(database, SystemClock(), "tester")
    records.set_meta("text", "ä → 漢")
    assert records.read_meta("text") == "ä → 漢" and len(records.read_database_id()) == 32
    database.close()


def test_a_database_that_cannot_store_every_text_is_refused_before_tables_are_made(postgres: PostgresServer) -> None:
    error = fail(f"postgresql://tester@127.0.0.1:{postgres.port}/latin")
    assert error.message.endswith(
        "/latin: its encoding is LATIN1, which cannot store every text. Valid: UTF8. Make the database again: createdb "
        "--encoding=UTF8 --locale=C --template=template0 NAME"
    )
    assert postgres.execute("SELECT to_regclass('meta')", "latin") == [(None,)]


@pytest.mark.parametrize(
    ("text", "failures"),
    [
        # As psycopg 3.1.7 of Debian 12 tells it.
        (
            "connection failed: Connection refused\n\tIs the server running on that host and accepting TCP/IP "
            'connections?\nconnection to server at "db2", port 5432 failed: session is read-only',
            ["Connection refused", 'connection to server at "db2", port 5432 failed: session is read-only'],
        ),
        (
            'connection failed: FATAL:  password authentication failed for user "a"\nconnection to server at "db1", '
            'port 5432 failed: FATAL:  password authentication failed for user "a"',
            ['connection to server at "db1", port 5432 failed: FATAL:  password authentication failed for user "a"'],
        ),
    ],
)
def test_the_failures_of_several_hosts_are_told_apart_with_an_older_psycopg(text: str, failures: list[str]) -> None:
    assert refusals.describe(Exception(text)) == failures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("connection failed: connection timeout expired", True),
        ("connection failed: Connection refused", True),
        ("consuming input failed: terminating connection due to idle-in-transaction timeout", False),
        ("consuming input failed: server closed the connection unexpectedly", False),
    ],
)
def test_only_a_connection_that_was_never_made_is_not_tried_again(text: str, expected: bool) -> None:
    """psycopg 3.1 gives the end of a paused transaction no SQLSTATE, so its text decides."""
    require_postgresql()
    import psycopg

    assert engine._is_refused(psycopg.OperationalError(text)) is expected


def test_workspaces_are_listed_in_one_order_whatever_the_locale_of_the_database(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    """A locale of a language ignores hyphens where it can; SQLite compares code points."""
    postgres.execute("CREATE DATABASE english LOCALE_PROVIDER icu ICU_LOCALE 'en-US' TEMPLATE template0")
    names = ["ab", "a-c", "a-a", "b1", "a_b"]
    orders = []
    for address in (str(tmp_path / "records.db"), f"postgresql://tester@127.0.0.1:{postgres.port}/english"):
        database = open_database(address)
        insert = (
            "INSERT INTO workspaces (id, name, state, storage, owner_vmid, volume, size, created_at, updated_at, "
            "state_changed_at) VALUES (?, ?, 'DETACHED', 'local', ?, 'v', 1, 1, 1, 1)"
        )
        rows = [(f"id-{number}", name, 900 + number) for number, name in enumerate(names)]
        database.write(lambda conn, insert=insert, rows=rows: conn.executemany(insert, rows) and None)
        records = Records(database, SystemClock(), "tester")
        orders.append([workspace.name for workspace in workspaces.Workspaces(records).find_all()])
        database.close()
    assert orders == [sorted(names)] * 2


@pytest.mark.parametrize("source", ["option", "URI", "PGPASSWORD", "passfile", "PGPASSFILE", "service"])
def test_the_password_comes_from_where_libpq_takes_it(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    place = f"127.0.0.1:{postgres.port}/guarded"
    uri, password = f"postgresql://guarded@{place}", None
    if source == "option":
        password = "right-7y"
    elif source == "URI":
        uri = f"postgresql://guarded:right-7y@{place}"
    elif source == "PGPASSWORD":
        monkeypatch.setenv("PGPASSWORD", "right-7y")
    elif source in ("passfile", "PGPASSFILE"):
        file = tmp_path / "pgpass"
        file.write_text("*:*:*:guarded:right-7y\n")
        file.chmod(0o600)
        if source == "passfile":
            uri += f"?passfile={file}"
        else:
            monkeypatch.setenv("PGPASSFILE", str(file))
    else:
        file = tmp_path / "services"
        file.write_text("[lab]\nuser=guarded\npassword=right-7y\n")
        monkeypatch.setenv("PGSERVICEFILE", str(file))
        uri = f"postgresql://{place}?service=lab"
    address = database_address.parse(uri)
    database = open_database(address.text, password=password or address.password)
    assert database.read("SELECT current_user")[0][0] == "guarded" and "right-7y" not in database.path
    database.close()


@pytest.mark.parametrize(
    "form", ["postgresql://tester@{folder}:{port}/utf8", "postgresql:///utf8?host={path}&port={port}&user=tester"]
)
def test_records_are_opened_through_the_socket_of_a_server_on_this_host(postgres: PostgresServer, form: str) -> None:
    path = str(postgres.folder)
    uri = form.format(folder=path.replace("/", "%2F"), path=path, port=postgres.port)
    database = open_database(database_address.parse(uri).text)
    assert database.read("SELECT inet_client_addr() IS NULL")[0][0] is True
    database.close()
