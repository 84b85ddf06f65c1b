# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what to do next when a PostgreSQL server refuses: one table of its texts.

libpq names no SQLSTATE for a connection that fails, so these are told apart by their text. A text in another language
(lc_messages of the server) is told as it is, with the general next step.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import is_out_of_descriptors


class NextStep(NamedTuple):
    """What a refusal means: ``passing`` if the same request may succeed later, without a change here."""

    advice: str
    passing: bool = False


_TABLES = (
    "its tables are not as this release made them: somebody changed them, or two releases use the database. Use one "
    "release for all, run agentlab_doctor (agentlab doctor), or restore a backup (docs/troubleshooting.md, Backups)"
)
_GRANT = "grant the run-time role what docs/controllers.md says"
_PASSWORD = "check the user, database_password (or PGPASSWORD, or the passfile) and pg_hba.conf"
_CONNECTIONS = (
    "end sessions that nobody needs (SELECT * FROM pg_stat_activity), or raise max_connections of the server, or the "
    "CONNECTION LIMIT of the role or database"
)
_READ_ONLY = (
    "no server of the URI takes writes: name the primary, promote the standby, or end default_transaction_read_only "
    "of the server, database or role"
)
_TLS_VERSION = "let server and client share a TLS version (ssl_min_protocol_version on both sides)"
_HOST = "correct the host in the URI, or its entry in DNS or /etc/hosts"
_CERTIFICATE = (
    "set sslrootcert in the URI to the CA of the server's certificate, and name the server as the certificate does; "
    "openssl s_client -starttls postgres -connect HOST:PORT shows the certificate with its dates"
)
_CLIENT_CERTIFICATE = (
    "set sslcert and sslkey in the URI to a client certificate that is there, whose CN is the role, and that a CA in "
    "the server's ssl_ca_file signed; openssl x509 -noout -subject -issuer -dates -in FILE shows it"
)
_OPTIONS = (
    "correct the options in the URI (or PGOPTIONS); a pooler in between must pass them on and use session pooling, so "
    "name the server itself where it does not"
)
_FILES = (
    "the disk or files of the server failed; look at its log and its disk, then run again, or restore a backup "
    "(docs/troubleshooting.md, Backups)"
)

# SQLSTATE, or the beginning of several -> next step. The longest that fits counts.
_BY_STATE: dict[str, NextStep] = {
    "28": NextStep(_PASSWORD),
    "3D000": NextStep("create it as docs/controllers.md says, or correct the name"),
    "3F000": NextStep("make the schema of search_path, or correct search_path in the URI's options"),
    "42501": NextStep(_GRANT),
    "42P01": NextStep(_TABLES),
    "42P07": NextStep(_TABLES),
    "42703": NextStep(_TABLES),
    "42804": NextStep(_TABLES),
    "25006": NextStep(_READ_ONLY, True),
    "53": NextStep("the server has no memory or no room left; look at its log (free -m, df)", True),
    "53100": NextStep("the disk of the server is full; free some space there (df of its data folder)", True),
    "53300": NextStep(_CONNECTIONS, True),
    "57014": NextStep(
        "the server ended the statement: raise statement_timeout and transaction_timeout of the role or database, or "
        "see in its log who cancelled it",
        True,
    ),
    "58": NextStep(_FILES, True),
    "XX001": NextStep(_FILES),
    "XX002": NextStep(_FILES),
}
# Part of a text -> next step; the first that fits counts.
_BY_TEXT: tuple[tuple[str, NextStep], ...] = (
    ("certificate authentication failed", NextStep(_CLIENT_CERTIFICATE)),
    ("valid client certificate", NextStep(_CLIENT_CERTIFICATE)),
    ("could not read certificate file", NextStep(_CLIENT_CERTIFICATE)),
    # By an alert the server refuses what the client sent: its certificate, in these cases.
    ("alert unknown ca", NextStep(_CLIENT_CERTIFICATE)),
    ("alert bad certificate", NextStep(_CLIENT_CERTIFICATE)),
    ("alert certificate", NextStep(_CLIENT_CERTIFICATE)),
    ("authentication failed", NextStep(_PASSWORD)),
    ("no password supplied", NextStep(_PASSWORD)),
    (
        "pg_hba.conf",
        NextStep(
            "let this host, user and database in by a line of the server's pg_hba.conf, then pg_ctl reload; a line "
            "with hostssl needs sslmode=verify-full in the URI"
        ),
    ),
    (
        "is not permitted to log in",
        NextStep("as an administrator: ALTER ROLE ... LOGIN, or set the run-time role of docs/controllers.md"),
    ),
    (
        "server does not support SSL",
        NextStep("turn TLS on in the server (ssl = on), or set sslmode=disable in the URI on a network that is safe"),
    ),
    ("private key", NextStep("mend sslcert and sslkey of the URI: the key needs mode 0600 and this user as owner")),
    ("certificate", NextStep(_CERTIFICATE)),
    ("protocols available", NextStep(_TLS_VERSION)),
    ("protocol version", NextStep(_TLS_VERSION)),
    ("invalid response", NextStep("another program listens there: correct host and port in the URI")),
    ("too many connections", NextStep(_CONNECTIONS, True)),
    ("too many clients", NextStep(_CONNECTIONS, True)),
    ("connection slots", NextStep(_CONNECTIONS, True)),
    (
        "not in hot standby mode",
        NextStep("leave target_session_attrs out of the URI: the records need a server that takes writes"),
    ),
    ("is not read-only", NextStep("leave target_session_attrs out of the URI: the records need a server for writes")),
    ("is read-only", NextStep(_READ_ONLY, True)),
    ("read-only transaction", NextStep(_READ_ONLY, True)),
    ("in hot standby mode", NextStep(_READ_ONLY, True)),
    ("unrecognized configuration parameter", NextStep(_OPTIONS)),
    ("unsupported startup parameter", NextStep(_OPTIONS)),
    (
        "is not currently accepting connections",
        NextStep("as an administrator: ALTER DATABASE ... ALLOW_CONNECTIONS true, or correct the name"),
    ),
    ("permission denied for database", NextStep(_GRANT)),
    (
        "definition of service",
        NextStep("name a service of ~/.pg_service.conf of this user, or of the file that PGSERVICEFILE names"),
    ),
    ("could not match", NextStep("give one port and one hostaddr for each host of the URI, or one port for all")),
    ("does not exist", NextStep("create it as docs/controllers.md says, or correct the name")),
    ("No space left", NextStep("the disk of the server is full; free some space there (df of its data folder)", True)),
    ("could not write init file", NextStep(_FILES, True)),
    ("invalid ", NextStep("correct the URI")),
    ("bad value for", NextStep("correct the URI")),
    (
        "the database system is",
        NextStep("wait until the server has started or stopped, and look at its log where that takes long", True),
    ),
    ("resolve host", NextStep(_HOST, True)),
    ("translate host", NextStep(_HOST, True)),
    # psycopg 3.1 on Debian 12.
    ("Name or service not known", NextStep(_HOST, True)),
    (
        "No such file or directory",
        NextStep("start the server, or correct host (the folder of its socket) and port in the URI", True),
    ),
    (
        "Connection refused",
        NextStep("start the server, or correct host and port in the URI, or listen_addresses of the server", True),
    ),
    ("timeout expired", NextStep("look at the server, the network and its firewalls", True)),
)
_NO_DESCRIPTOR = NextStep(
    "this process has no file descriptor left. Raise its limit (ulimit -n; LimitNOFILE= of the unit)", True
)


def describe(error: Exception) -> list[str]:
    """Return the failures that an error of psycopg tells, a line each: one for each server of the URI."""
    lines = [line.strip() for line in str(error).split("\n")]
    if "attempts failed" in str(error):
        # psycopg 3.2 tells the last failure first, then all of them.
        lines = [line.partition(": connection failed: ")[2] for line in lines if line.startswith("- host:")]
    else:
        # The further lines of a single failure are libpq's own guesses.
        lines = lines[:1] + [line for line in lines[1:] if line.startswith("connection to server")]
    lines = [line.removeprefix("connection failed: ").removeprefix("connection is bad: ") for line in lines if line]
    # psycopg 3.1 leaves out the server of the first failure, and may tell that failure again with its server.
    lines = [line for line in lines if not any(other != line and other.endswith(line) for other in lines)]
    return list(dict.fromkeys(lines)) or [type(error).__name__]


def judge_passfile(text: str, parameters: Mapping[str, Any]) -> NextStep | None:
    """Return why libpq found no password in the passfile; None for any other text, or where nobody has a passfile.

    libpq itself only warns on standard error.
    """
    if "no password supplied" not in text:
        return None
    named = parameters.get("passfile") or os.environ.get("PGPASSFILE")
    path = os.path.expanduser(str(named or "~/.pgpass"))
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        advice = f"the passfile {path} does not exist: make it with mode 0600, or correct its path"
        return NextStep(advice) if named else None
    except OSError as error:
        return NextStep(f"the passfile {path} cannot be read ({error.strerror}): correct its owner, mode or path")
    if mode & 0o077:
        return NextStep(f"the passfile {path} has mode {mode:04o}, so libpq does not use it: chmod 0600 {path}")
    advice = (
        f"the passfile {path} has no line for this host, port, database and user: add one, or set database_password"
    )
    return NextStep(advice)


def next_step(state: str | None, failures: list[str]) -> NextStep | None:
    """Return the next step for an error with this SQLSTATE (None: of libpq itself) and texts; None: not known.

    With several servers the texts are told apart in the order of the table. One that may come back makes it passing.
    """
    if state is not None:
        lengths = range(5, 1, -1)
        return next((_BY_STATE[state[:length]] for length in lengths if state[:length] in _BY_STATE), None)
    if is_out_of_descriptors():
        return _NO_DESCRIPTOR
    steps = [next((step for part, step in _BY_TEXT if part in failure), None) for failure in failures]
    ranked = [step for _part, step in _BY_TEXT if step in steps]
    if not ranked:
        return None
    return ranked[0]._replace(passing=any(step is None or step.passing for step in steps))
