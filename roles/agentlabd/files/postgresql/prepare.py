# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Create the database, its two roles and their passwords through psql. Run by tasks/database.yml as the administrator.

Standard input is a JSON object: ``database`` (name), ``port`` (of the local server, or null), ``encoding`` (the end of
CREATE DATABASE), ``sql`` (the text of roles.sql), ``passwords`` (role name to password; roles without one keep theirs)
and ``dry_run``. Standard output is one too: ``changed`` and ``changes``, a list of texts. Passwords reach the server as
SCRAM verifiers, so neither its log nor a list of processes shows one. Only the standard library is needed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
from typing import Any

ROLES = ("agentlab_owner", "agentlab")
OLDEST = 150000
ITERATIONS = 4096
VERIFIER = re.compile(r"SCRAM-SHA-256\$(\d+):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)")
# Everything that roles.sql sets, in one line: equal before and after means that nothing was changed.
STATE = """
SELECT jsonb_build_object(
    'database', (SELECT datacl::text FROM pg_database WHERE datname = current_database()),
    'schema', (SELECT nspacl::text FROM pg_namespace WHERE nspname = 'public'),
    'defaults', (SELECT jsonb_agg(defaclobjtype::text || defaclacl::text ORDER BY oid) FROM pg_default_acl));
"""


class Refused(Exception):
    """What stands in the way, and what to do."""


def make_verifier(password: str, salt: bytes, iterations: int) -> str:
    """Return the SCRAM-SHA-256 verifier of a password (RFC 5803), as PostgreSQL stores it."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    texts = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${iterations}:{texts[0]}${texts[1]}:{texts[2]}"


def fits(password: str, verifier: str | None) -> bool:
    """Return whether the stored verifier belongs to the password."""
    match = VERIFIER.fullmatch(verifier or "")
    if match is None:
        return False
    return hmac.compare_digest(make_verifier(password, base64.b64decode(match[2]), int(match[1])), match[0])


class Server:
    """The local PostgreSQL server, asked through psql over its socket."""

    def __init__(self, port: int | None) -> None:
        self.options = [f"--port={port}"] if port else []

    def run(self, sql: str, database: str) -> str:
        """Run SQL and return its answer. Raises Refused with the server's message."""
        command = ["psql", "--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--no-align"]
        command += ["--set=ON_ERROR_STOP=1", *self.options, f"--dbname={database}"]
        try:
            answer = subprocess.run(command, input=sql, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Refused("psql is not on this host; run this on the host of the database server") from None
        if answer.returncode:
            raise Refused(f"psql: {answer.stderr.strip().removeprefix('psql: ')}")
        return answer.stdout.strip()


def check(request: dict[str, Any], version: str) -> None:
    """Refuse a server that is too old, a standby, and a password that cannot be written here."""
    number, standby = version.split("|")
    if int(number) < OLDEST:
        raise Refused(f"the server has version {int(number) // 10000}. Valid: PostgreSQL 15 or newer")
    if standby == "t":
        raise Refused("the server is a standby. Run this on the host of the primary")
    for role, password in request["passwords"].items():
        if not (password.isascii() and password.isprintable()):
            raise Refused(
                f"the password of {role} has characters outside of printable ASCII. Choose another, or leave it out "
                f"and run: psql -c '\\password {role}'"
            )


def set_rights(server: Server, name: str, sql: str, dry_run: bool) -> bool:
    """Run roles.sql in the database, and return whether it changed anything. With ``dry_run`` it is rolled back."""
    statements = sql.replace(":DATABASE", f'"{name}"')
    end = "ROLLBACK" if dry_run else "COMMIT"
    before, after = server.run(f"BEGIN;{STATE}{statements}{STATE}{end};", name).splitlines()
    return before != after


def prepare(request: dict[str, Any]) -> list[str]:
    """Create what is missing and return one text for each change. With ``dry_run`` nothing is written."""
    server, name, dry_run = Server(request["port"]), request["database"], request["dry_run"]
    check(request, server.run("SELECT current_setting('server_version_num'), pg_is_in_recovery()", "postgres"))
    changes = []
    databases = json.loads(server.run("SELECT json_agg(datname) FROM pg_database", "postgres"))
    roles_query = "SELECT coalesce(json_object_agg(rolname, rolpassword), '{}') FROM pg_authid WHERE rolname IN " + str(
        ROLES
    )
    before = json.loads(server.run(roles_query, "postgres"))
    changes += [f"role {role} is created" for role in ROLES if role not in before]
    if name not in databases:
        changes.append(f"database {name} is created")
        if not dry_run:
            server.run(f'CREATE DATABASE "{name}" {request["encoding"]}', "postgres")
    if dry_run and name not in databases:
        # The rights in a new database are those of PostgreSQL, which roles.sql narrows.
        changes.append(f"rights in database {name} are set")
    elif set_rights(server, name, request["sql"], dry_run):
        changes.append(f"rights in database {name} are set")
    for role, password in request["passwords"].items():
        if fits(password, before.get(role)):
            continue
        changes.append(f"password of {role} is set")
        if not dry_run:
            verifier = make_verifier(password, os.urandom(16), ITERATIONS)
            server.run(f"ALTER ROLE {role} PASSWORD '{verifier}'", "postgres")
    return changes


def main() -> int:
    try:
        changes = prepare(json.load(sys.stdin))
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"changed": bool(changes), "changes": changes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
