# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role's entry point ``database``: its script on a real server, which asks both roles for their passwords."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import StoreError
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store import schema
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.store.open import open_database

from support.daemon import PYTHONPATH
from support.engines import require_postgresql
from support.play import run_play
from support.postgres import PostgresServer, find_programs

FILES = Path(__file__).resolve().parents[2] / "roles/agentlabd/files/postgresql"
ENCODING = yaml.safe_load((FILES.parents[1] / "vars/main.yml").read_text())["agentlabd__encoding"]
PASSWORDS = {"agentlab": 'run time\'s "secret"', "agentlab_owner": "owner's $ecret"}


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server where the two roles log in with a password only, and that writes every statement to its log."""
    require_postgresql()
    running = PostgresServer().create(log_statement="all")
    assert running.execute("SELECT datcollate FROM pg_database WHERE datname = 'template1'") == [("C.UTF-8",)]
    rules = running.data / "pg_hba.conf"
    rules.write_text(f"host all agentlab,agentlab_owner 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    running.stop("fast")
    running.start()
    yield running
    running.destroy()


def prepare(postgres: PostgresServer, **values: Any) -> subprocess.CompletedProcess[str]:
    """Run the script as the role does, as an administrator on the server's socket."""
    wanted = {
        "database": "records",
        "port": postgres.port,
        "encoding": ENCODING,
        "sql": (FILES / "roles.sql").read_text(),
        "passwords": PASSWORDS,
        "dry_run": False,
        **values,
    }
    programs = find_programs()
    environment = {
        "PATH": f"{os.environ['PATH']}:{programs}",
        "PGHOST": str(postgres.folder),
        "PGUSER": postgres.user,
    }
    return subprocess.run(
        [sys.executable, "-I", "-c", (FILES / "prepare.py").read_text()],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def changes(postgres: PostgresServer, **values: Any) -> list[str]:
    """Return what the script says it changed."""
    run = prepare(postgres, **values)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["changed"] is bool(answer["changes"])
    return list(answer["changes"])


def open_as(postgres: PostgresServer, role: str, password: str) -> None:
    """Open and close the records as one of the roles."""
    uri = f"postgresql://{role}@127.0.0.1:{postgres.port}/records"
    open_database(uri, password=password).close()


def test_the_script_makes_what_is_missing_once_and_both_roles_work_with_their_passwords(
    postgres: PostgresServer,
) -> None:
    everything = [
        "role agentlab_owner is created",
        "role agentlab is created",
        "database records is created",
        "rights in database records are set",
        "password of agentlab is set",
        "password of agentlab_owner is set",
    ]
    assert changes(postgres, dry_run=True) == everything
    assert postgres.execute("SELECT 1 FROM pg_database WHERE datname = 'records'") == []
    assert changes(postgres) == everything
    assert changes(postgres) == []
    stored = "SELECT pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database WHERE datname = 'records'"
    assert postgres.execute(stored) == [("UTF8", "C", "C")], "the server's own locale is another one"
    with pytest.raises(StoreError, match="Run agentlabd --migrate-records"):
        open_as(postgres, "agentlab", PASSWORDS["agentlab"])
    open_as(postgres, "agentlab_owner", PASSWORDS["agentlab_owner"])
    open_as(postgres, "agentlab", PASSWORDS["agentlab"])
    # A password that is left out stays; another one takes its place.
    assert changes(postgres, passwords={"agentlab": "another"}) == ["password of agentlab is set"]
    open_as(postgres, "agentlab", "another")
    open_as(postgres, "agentlab_owner", PASSWORDS["agentlab_owner"])
    with pytest.raises(StoreError, match="check the user, database_password"):
        open_as(postgres, "agentlab", PASSWORDS["agentlab"])
    log = (postgres.folder / "log").read_text()
    assert "ALTER ROLE agentlab PASSWORD" in log
    assert not any(password in log for password in (*PASSWORDS.values(), "another"))


@pytest.mark.parametrize(
    "statement",
    [
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        "REVOKE USAGE ON SCHEMA public FROM agentlab",
        "GRANT CONNECT ON DATABASE records TO PUBLIC",
        "ALTER DEFAULT PRIVILEGES FOR ROLE agentlab_owner IN SCHEMA public REVOKE INSERT ON TABLES FROM agentlab",
    ],
)
def test_check_mode_compares_the_rights_and_changes_none(postgres: PostgresServer, statement: str) -> None:
    changes(postgres)
    assert changes(postgres, dry_run=True) == []
    postgres.execute(statement, "records")
    for _again in range(2):
        assert changes(postgres, dry_run=True) == ["rights in database records are set"]
    assert changes(postgres) == ["rights in database records are set"]
    assert changes(postgres, dry_run=True) == []


def agentlabd(postgres: PostgresServer, role: str, password: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command agentlabd once, with the password on standard input."""
    uri = f"postgresql://{role}@127.0.0.1:{postgres.port}/records"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "agentlabd",
            "--password-stdin",
            *(argument.replace("URI", uri) for argument in arguments),
        ],
        input=f"{password}\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "AGENTLAB_DATABASE": uri},
        check=False,
    )


def test_tables_and_copies_are_made_with_a_password_from_standard_input(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    postgres.execute("DROP DATABASE IF EXISTS records")
    changes(postgres)
    owner = ("agentlab_owner", PASSWORDS["agentlab_owner"])
    refused = agentlabd(postgres, "agentlab_owner", "wrong", "--migrate-records")
    assert refused.returncode == 1 and "check the user, database_password" in refused.stderr
    assert "systemd" not in refused.stderr and "Traceback" not in refused.stderr
    made = agentlabd(postgres, *owner, "--migrate-records")
    again = agentlabd(postgres, *owner, "--migrate-records")
    assert (made.returncode, again.returncode) == (0, 0), made.stderr + again.stderr
    assert made.stdout.endswith(f"schema {schema.VERSION}\n")
    assert again.stdout.endswith(f"schema {schema.VERSION}, as before\n")
    file = tmp_path / "agentlab.db"
    open_database(str(file)).close()
    copied = agentlabd(postgres, *owner, "--copy-records", str(file), "URI")
    assert copied.returncode == 0, copied.stderr
    assert "checksum of the copy:" in copied.stdout and PASSWORDS["agentlab_owner"] not in copied.stdout
    assert copied.stdout.startswith(f"copied {file} to postgresql://agentlab_owner@127.0.0.1:{postgres.port}/records\n")


@pytest.mark.parametrize(
    ("arguments", "password", "message"),
    [
        ([], "x", "--password-stdin is for --migrate-records and --copy-records"),
        (["--migrate-records"], "", "--password-stdin: standard input is empty. Write the password"),
        (
            ["--check", "--migrate-records"],
            "x",
            "--check, --migrate-records and --copy-records exclude each other; give one of them",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_done(
    postgres: PostgresServer, arguments: list[str], password: str, message: str
) -> None:
    run = agentlabd(postgres, "agentlab_owner", password, *arguments)
    assert run.returncode == 2 and message in " ".join(run.stderr.split())


@pytest.mark.parametrize("password", ["grün", "line\nbreak"])
def test_a_password_that_cannot_be_written_is_refused_before_anything_is_made(
    postgres: PostgresServer, password: str
) -> None:
    run = prepare(postgres, database="other", passwords={"agentlab": password})
    assert run.returncode == 1
    assert run.stderr == (
        "the password of agentlab has characters outside of printable ASCII. Choose another, or leave it out and run: "
        "psql -c '\\password agentlab'\n"
    )
    assert postgres.execute("SELECT 1 FROM pg_database WHERE datname = 'other'") == []


def test_a_server_that_does_not_answer_is_told_with_the_words_of_psql(postgres: PostgresServer) -> None:
    run = prepare(postgres, port=1)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("psql: error: connection to server on socket") or "No such file" in run.stderr


def test_a_standby_is_refused(postgres: PostgresServer) -> None:
    standby = postgres.standby()
    try:
        run = prepare(standby)
    finally:
        standby.destroy()
    assert (run.returncode, run.stderr) == (1, "the server is a standby. Run this on the host of the primary\n")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"agentlabd_database": "/var/lib/agentlab/agentlab.db"},
            "agentlabd_database_owner_password: is for PostgreSQL, but agentlabd_database is a file; unset one of them",
        ),
        (
            {"agentlabd_database": "postgresql://db1/agentlab?user=agentlab"},
            "agentlabd_database: user, password, passfile and service after the question mark cannot be used together "
            "with agentlabd_database_owner_password. Write the user before the @",
        ),
    ],
)
def test_an_owners_password_that_cannot_be_used_is_refused_and_not_shown(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    role = {"name": "agentlab.proxmox.agentlabd", "tasks_from": "settings"}
    secret = {"agentlabd_database_owner_password": PASSWORDS["agentlab_owner"], "agentlabd_backend": "local"}
    task = {"name": "Settings", "ansible.builtin.include_role": role, "vars": {**secret, **variables}}
    run = run_play([task], {}, tmp_path)
    assert [entry["result"]["msg"] for entry in run.failed] == [message]
    assert PASSWORDS["agentlab_owner"] not in run.output
