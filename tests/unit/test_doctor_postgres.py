# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the doctor says of a real PostgreSQL server: nothing when all is well, and one finding for each thing that is
not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor import host
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.doctor.examination import Examination
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database

from support.canned import certificate
from support.engines import require_postgresql
from support.postgres import PostgresServer

ROLES = Path(__file__).resolve().parents[2] / "roles/agentlabd/files/postgresql/roles.sql"
# The network is pretended: a connection of a test is always on loopback.
FAR_AWAY = "CREATE FUNCTION pretended.inet_client_addr() RETURNS inet LANGUAGE sql AS $$ SELECT inet '192.0.2.7' $$"
OLD = """CREATE FUNCTION pretended.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT CASE $1
    WHEN 'server_version_num' THEN '140009' WHEN 'server_version' THEN '14.9' ELSE pg_catalog.current_setting($1) END
    $$"""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server as docs/controllers.md wants it, with TLS and with fsync."""
    require_postgresql()
    running = PostgresServer().create()
    cert, key, _authority = certificate(tmp_path_factory.mktemp("tls"))
    owner = running.data.stat()
    for name, source in (("server.crt", cert), ("server.key", key)):
        file = running.data / name
        file.write_bytes(Path(source).read_bytes())
        file.chmod(0o600)
        os.chown(file, owner.st_uid, owner.st_gid)
    running.cafile = cert  # type: ignore[attr-defined]
    running.configure(fsync="on", ssl="on")
    running.stop("fast")
    running.start()
    yield running
    running.destroy()


@pytest.fixture
def uri(postgres: PostgresServer) -> str:
    """A database with tables and rights as documented; the URI of the run-time role."""
    uri = postgres.uri()
    name = uri.rpartition("/")[2]
    postgres.execute(ROLES.read_text().replace(":DATABASE", name), name)
    open_database(uri.replace("tester@", "agentlab_owner@")).close()
    return uri.replace("tester@", "agentlab@")


def look(uri: str, **options: Any) -> list[tuple[str, str]]:
    """Return the status and the meaning of each finding, less the URI; each that is not ok has an advice."""
    exam = Examination(config.load({"database": uri, "api_host": "127.0.0.1", "api_user": "root@pam", **options}, {}))
    try:
        findings = list(host.check_database(exam))
    finally:
        exam.close()
    assert all(finding.advice for finding in findings if finding.status != "ok")
    return [(finding.status, finding.meaning.removeprefix(f"{exam.config.database}: ")) for finding in findings]


def pretend(postgres: PostgresServer, uri: str, *statements: str) -> None:
    """Let the server's own functions of these names be hidden by ours, for the role agentlab in this database."""
    name = uri.rpartition("/")[2].partition("?")[0]
    postgres.execute(
        f"CREATE SCHEMA pretended; GRANT USAGE ON SCHEMA pretended TO agentlab; {'; '.join(statements)}; "
        f"ALTER ROLE agentlab IN DATABASE {name} SET search_path = pretended, pg_catalog, public",
        name,
    )


def test_a_server_as_documented_is_well(postgres: PostgresServer, uri: str) -> None:
    ((status, meaning),) = look(uri)
    assert status == "ok" and meaning.startswith("PostgreSQL 1") and ", schema " in meaning


def test_tls_is_asked_for_where_the_network_is_between(
    postgres: PostgresServer, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(postgres, uri, FAR_AWAY)
    cafile = postgres.cafile  # type: ignore[attr-defined]
    assert look(f"{uri}?sslmode=disable") == [("warning", "the connection is not encrypted")]
    assert look(f"{uri}?sslmode=require") == [("warning", "the server's certificate is not verified")]
    assert look(f"{uri}?sslmode=verify-ca&sslrootcert={cafile}") == [
        ("warning", "the server's certificate is not verified")
    ]
    assert look(f"{uri}?sslmode=verify-full&sslrootcert={cafile}")[0][0] == "ok"
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", cafile)
    assert look(uri)[0][0] == "ok", "libpq reads it from the environment too"


def test_a_server_older_than_15_is_told(postgres: PostgresServer, uri: str) -> None:
    pretend(postgres, uri, OLD)
    assert look(uri) == [("warning", "PostgreSQL 14.9 is older than 15")]


@pytest.mark.parametrize("value", ["off", "local", "on"])
def test_commits_that_a_crash_may_lose_are_told(postgres: PostgresServer, uri: str, value: str) -> None:
    name = uri.rpartition("/")[2]
    postgres.execute(f"ALTER ROLE agentlab IN DATABASE {name} SET synchronous_commit = {value}")
    lossy = ("warning", "a commit may be lost when the server crashes")
    assert (lossy in look(uri)) == (value == "off")


def test_fsync_that_is_off_is_told(postgres: PostgresServer, uri: str) -> None:
    postgres.execute("ALTER SYSTEM SET fsync = off")
    try:
        reload(postgres, uri, "fsync", "off")
        assert look(uri) == [("warning", "a commit may be lost when the server crashes")]
    finally:
        postgres.execute("ALTER SYSTEM RESET fsync")
        reload(postgres, uri, "fsync", "on")


def reload(postgres: PostgresServer, uri: str, setting: str, value: str) -> None:
    """Have the server read its configuration, and wait until new connections have it."""
    postgres.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + 20
    while postgres.execute(f"SELECT current_setting('{setting}')") != [(value,)]:
        assert time.monotonic() < deadline, f"{setting} did not become {value}"
        time.sleep(0.05)


def test_standbys_and_whether_commits_wait_for_them(postgres: PostgresServer, uri: str) -> None:
    name = uri.rpartition("/")[2]
    asynchronous = ("warning", "every standby is asynchronous: a failover may lose the last commits")
    local = (
        "warning",
        "commits wait for no standby (synchronous_commit is local): a failover may lose the last ones",
    )
    other = postgres.standby()
    try:
        deadline = time.monotonic() + 20
        while postgres.execute("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") != [(1,)]:
            assert time.monotonic() < deadline, "the standby did not follow"
            time.sleep(0.05)
        assert look(uri) == [asynchronous]
        postgres.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        reload(postgres, uri, "synchronous_standby_names", "*")
        assert look(uri)[0][0] == "ok"
        postgres.execute(f"ALTER ROLE agentlab IN DATABASE {name} SET synchronous_commit = local")
        assert look(uri) == [local]
        postgres.execute(f"ALTER ROLE agentlab IN DATABASE {name} RESET synchronous_commit")
        there = uri.replace(f":{postgres.port}/", f":{other.port}/")
        found = look(f"{there}?target_session_attrs=any")
        assert ("problem", "this server is a standby, which takes no writes") in found
    finally:
        postgres.execute("ALTER SYSTEM RESET synchronous_standby_names")
        reload(postgres, uri, "synchronous_standby_names", "")
        other.destroy()


def test_roles_with_too_many_rights_are_told(postgres: PostgresServer, uri: str) -> None:
    may_drop = [("warning", "this role may drop the tables")]
    assert look(uri.replace("agentlab@", "tester@")) == [("warning", "this role is a superuser")]
    assert look(uri.replace("agentlab@", "agentlab_owner@")) == may_drop
    postgres.execute("GRANT agentlab_owner TO agentlab")
    try:
        assert look(uri) == may_drop, "a member of the owner's role may do what the owner may"
    finally:
        postgres.execute("REVOKE agentlab_owner FROM agentlab")


def test_missing_rights_are_a_problem_before_they_are_needed(postgres: PostgresServer, uri: str) -> None:
    postgres.execute(
        "REVOKE DELETE ON claims FROM agentlab; REVOKE INSERT ON runs FROM agentlab", uri.rpartition("/")[2]
    )
    assert look(uri) == [("problem", "this role may not read and write all rows of public.claims, public.runs")]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3600, "s ahead of the server's, which counts"), (-3600, "s behind the server's, which counts"), (20, None)],
)
def test_a_clock_that_differs_is_told(
    uri: str, monkeypatch: pytest.MonkeyPatch, seconds: int, words: str | None
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    ((status, meaning),) = look(uri)
    if words is None:
        assert status == "ok"
    else:
        assert status == "warning" and meaning.startswith("this host's clock is 3") and meaning.endswith(words)


def test_a_damaged_value_is_named_with_a_command_that_mends_it(postgres: PostgresServer, uri: str) -> None:
    name = uri.rpartition("/")[2]
    postgres.execute(
        "INSERT INTO sandboxes (uuid, vmid, name, state, tags, created_at, updated_at, state_changed_at) "
        "VALUES ('u-1', 1000, 'a1', 'RUNNING', 'odd', 1, 1, 1)",
        name,
    )
    exam = Examination(config.load({"database": uri, "api_host": "127.0.0.1", "api_user": "root@pam"}, {}))
    try:
        database, damage = host.check_database(exam)
    finally:
        exam.close()
    assert database.status == "ok" and damage.check == "records" and damage.status == "problem"
    statement = damage.advice.rpartition(" -c ")[2].partition('"')[2].partition('"')[0]
    assert f"psql '{uri}' -c" in damage.advice
    postgres.execute(statement, name)
    assert [status for status, _meaning in look(uri)] == ["ok"]


def test_a_server_that_does_not_answer_is_a_problem() -> None:
    require_postgresql()
    ((status, meaning),) = look("postgresql://agentlab@127.0.0.1:1/agentlab")
    assert status == "problem" and "cannot be reached" in meaning
