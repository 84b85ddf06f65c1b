# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the value of ``database``: the path of a SQLite file, or the URI of a PostgreSQL database.

No part of a password is ever shown: libpq quotes what it cannot parse, so a URI is checked here before libpq sees it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from .errors import InvalidInput

SQLITE = "sqlite"
POSTGRESQL = "postgresql"
VALID = (
    "Valid: the path of a SQLite file, such as /var/lib/agentlab/agentlab.db, or a PostgreSQL database, such as "
    "postgresql://agentlab@db1.example.com,db2.example.com/agentlab?sslmode=verify-full"
)
# A scheme is a word and a colon before a slash. Absolute and explicitly relative paths are never taken for one.
_PATH = re.compile(r"(/|\./|\.\./|~)")
_SCHEME = re.compile(r"[\"'<]?([A-Za-z][A-Za-z0-9+.-]*):(?=/|\\)")
_KNOWN_SCHEME = re.compile(
    r"((?:postg|pg|psql|mysql|maria|sqlite|file|jdbc|mongo|redis|oracle|mssql)[a-z0-9+]*):", re.I
)
_WITHOUT_COLON = re.compile(r"(postg[a-z]*|pgsql)/{2}", re.I)
_KEYWORDS = re.compile(r"(host|hostaddr|port|dbname|user|password|service|sslmode)\s*=", re.I)
_OURS = re.compile(r"(postgresql|postgres)://")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the records are. ``text`` is the path, or the URI without its password; it may be shown."""

    engine: str
    text: str
    password: str | None = field(default=None, repr=False)


def parse(value: str) -> Address:
    """Return the address for a value of ``database``; InvalidInput for a URI that is not PostgreSQL's."""
    text = value.strip()
    ours = _OURS.match(text)
    if ours:
        return _parse_postgresql(text, ours.end())
    if not _PATH.match(text):
        match = _SCHEME.match(text) or _KNOWN_SCHEME.match(text) or _WITHOUT_COLON.match(text)
        if match or "://" in text:
            # Only the scheme is quoted: the rest may hold a password.
            scheme = match[1] if match else text.partition("://")[0][-20:]
            raise InvalidInput(
                f"database: a value that begins with '{scheme}' is neither a path nor postgresql://…. {VALID}",
                option="database",
            )
        if _KEYWORDS.match(text):
            raise InvalidInput(
                f"database: a connection string of keywords ('{text.partition('=')[0].strip()}=…') is not read here; "
                f"write it as a URI. {VALID}",
                option="database",
            )
    return Address(SQLITE, value)


def find_passwords(value: str) -> set[str]:
    """Return what may be a password in a value of ``database``, as written and decoded, also where ``parse`` refuses
    it.

    Ansible shows the options of a module with high verbosity, so the caller masks these texts before anything else.
    """
    written = re.findall(r"://[^:/?@]*:(.+)@", value) + re.findall(r"password\s*=\s*([^&\s]+)", value, re.I)
    return {text for password in written for text in (password, unquote(password))}


def _parse_postgresql(text: str, begin: int) -> Address:
    """Return the address for a URI; its password, in the authority or as a parameter, is taken out of the text."""
    after_scheme = text[begin:]
    login, at, place = after_scheme.partition("@")
    if not at or "/" in login:
        # libpq looks for the login before the first slash only.
        login, place = "", after_scheme
    place, _question, query = place.partition("?")
    if "@" in place:
        raise InvalidInput(
            "database: the URI has an '@' after its login. In a user, a password or a name of a database, write '@' as "
            "%40, '/' as %2F, ':' as %3A and '%' as %25; or give the password as database_password",
            option="database",
        )
    user, colon, password = login.partition(":")
    kept = []
    for parameter in query.split("&") if query else []:
        name, _equals, parameter_value = parameter.partition("=")
        if name == "password":
            colon, password = ":", parameter_value
        else:
            kept.append(parameter)
    uri = f"postgresql://{user}{'@' if user else ''}{place}{'?' if kept else ''}{'&'.join(kept)}"
    if any(ord(character) < 32 for character in uri):
        raise InvalidInput(f"database: the URI has a line break or a control character. {VALID}", option="database")
    return Address(POSTGRESQL, uri, unquote(password) if colon and password else None)
