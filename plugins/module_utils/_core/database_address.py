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
VALID_URI = "postgresql://agentlab@db1.example.com,db2.example.com/agentlab?sslmode=verify-full"
VALID = (
    "Valid: the path of a SQLite file, such as /var/lib/agentlab/agentlab.db, or a PostgreSQL database, such as "
    f"{VALID_URI}"
)
# A scheme is a word and a colon before a slash. Absolute and explicitly relative paths have no scheme.
_PATH = re.compile(r"(/|\./|\.\./|~)")
_SCHEME = re.compile(r"[\"'<]?([A-Za-z][A-Za-z0-9+.-]*):(?=/|\\)")
_KNOWN_SCHEME = re.compile(
    r"((?:postg|pg|psql|mysql|maria|sqlite|file|jdbc|mongo|redis|oracle|mssql)[a-z0-9+]*):", re.I
)
_WITHOUT_COLON = re.compile(r"(postg[a-z]*|pgsql)/{2}", re.I)
_OURS = re.compile(r"(postgresql|postgres)://")

# Parameters of a URI whose values are checked here. libpq would call a wrong value a failed connection.
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "gssencmode": ("disable", "prefer", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "load_balance_hosts": ("disable", "random"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "ssl": ("true",),
}
_NUMBERS = {
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
}
# The other parameters that libpq 18 and older know, and that make sense here.
_OTHERS = set(
    re.findall(
        r"\w+",
        "host hostaddr port dbname user password passfile service servicefile application_name options require_auth "
        "fallback_application_name requirepeer requiressl sslcompression sslcert sslkey sslrootcert sslcrl sslcrldir "
        "sslsni ssl_min_protocol_version ssl_max_protocol_version min_protocol_version max_protocol_version "
        "krbsrvname gsslib gssdelegation",
    )
)
# Secrets other than the password. The URI is shown, so they stand in a service file.
_SECRETS = {"sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"}
_KNOWN = {*_CHOICES, *_NUMBERS, *_OTHERS, "client_encoding"}
# A connection string of libpq begins with any of its keywords. SQLite would create a file of that name.
_KEYWORDS = re.compile(rf"({'|'.join(sorted(_KNOWN | _SECRETS))})\s*=", re.I)
_EXAMPLES = "sslmode, sslrootcert, target_session_attrs, passfile, service, connect_timeout and application_name"


@dataclass(frozen=True, slots=True)
class Address:
    """The place of the records. ``text`` is the path, or the URI without its password; messages may show it."""

    engine: str
    text: str
    password: str | None = field(default=None, repr=False)


def parse(value: str) -> Address:
    """Return the address for a value of ``database``. Raises InvalidInput for a URI that is not PostgreSQL's."""
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
    """Return the texts that may be passwords in a value of ``database``, as written and decoded.

    The value may be one that ``parse`` refuses. Ansible shows the options of a module with high verbosity, so the
    caller masks these texts before anything else.
    """
    written = re.findall(r"://[^:/?@]*:(.+)@", value) + re.findall(r"password\s*=\s*([^&\s]+)", value, re.I)
    if "@" not in value:
        # The host was forgotten: libpq would take the password for a port.
        written += [
            text for text in re.findall(r"://[^:/?,\[]*:([^/?]+)", value) if not re.fullmatch(r"[0-9,:]+", text)
        ]
    for parameter in value.partition("?")[2].split("&"):
        name, _equals, parameter_value = parameter.partition("=")
        if parameter_value and _is_secret(unquote(name)):
            written.append(parameter_value)
    return {text for password in written for text in (password, unquote(password))}


def _is_secret(name: str) -> bool:
    """Return whether the value of a parameter may be a secret, also where its name is misspelt."""
    return name != "passfile" and re.search(r"pass|pwd|secret|scram_|token", name, re.I) is not None


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
        name, equals, parameter_value = parameter.partition("=")
        name = unquote(name)
        if name == "password" and equals:
            colon, password = ":", parameter_value
            continue
        _check_parameter(name, equals, unquote(parameter_value), hidden="password=" in unquote(query).lower())
        kept.append(parameter)
    uri = f"postgresql://{user}{'@' if user else ''}{place}{'?' if kept else ''}{'&'.join(kept)}"
    if any(ord(character) < 32 for character in uri):
        raise InvalidInput(f"database: the URI has a line break or a control character. {VALID}", option="database")
    _check_hosts(place.partition("/")[0], login=bool(login))
    return Address(POSTGRESQL, uri, unquote(password) if colon and password else None)


def _check_parameter(name: str, equals: str, value: str, *, hidden: bool) -> None:
    """Refuse a parameter that libpq does not know or that makes no sense here, and a value that libpq would refuse.

    ``hidden``: the query has a password, and the name may be the rest of it after an '&'.
    """
    if name in _SECRETS:
        raise InvalidInput(
            f"database: the URI has {name}, a secret that would be shown with the URI. Write it into a service file "
            "and name that with service=NAME",
            option="database",
        )
    if not equals or name not in _KNOWN:
        quoted = f"'{name}'" if re.fullmatch(r"[A-Za-z_]{2,40}", name) and not hidden else "(not shown: a password?)"
        what = f"the parameter {quoted}, which is not valid here" if equals else "a part without '=' after its '?'"
        raise InvalidInput(
            f"database: the URI has {what}. Valid parameters are those of libpq in lower case, such as {_EXAMPLES}; in "
            "a value, write '&' as %26. Correct or remove it",
            option="database",
        )
    valid = ""
    if name in _CHOICES and value not in _CHOICES[name]:
        valid = ", ".join(_CHOICES[name])
    elif name in _NUMBERS and not re.fullmatch(r"-?[0-9]{1,9}", value):
        valid = "a whole number" + (" of milliseconds" if name == "tcp_user_timeout" else "")
    elif name == "port" and not all(map(_is_port, value.split(","))):
        valid = "1 to 65535, one for all hosts or one for each, with commas between them"
    elif name == "client_encoding" and value.lower().replace("-", "") != "utf8":
        valid = "UTF8, which is always used"
    if valid:
        raise InvalidInput(
            f"database: {name} in the URI is '{value}'. Valid: {valid}. Correct or remove it", option="database"
        )


def _check_hosts(authority: str, *, login: bool) -> None:
    """Refuse hosts and ports that libpq would call a failed connection.

    ``login``: the URI has a login. Without one the text after the first ':' may be a password whose '@HOST' is missing.
    """
    for place in authority.split(","):
        bracketed = re.fullmatch(r"\[[^\[\]]+\](?::(.*))?", place)
        if bracketed is None and (place.count(":") > 1 or "[" in place or "]" in place):
            raise InvalidInput(
                "database: the URI has a host with several ':'. Valid: HOST, HOST:PORT, or an IPv6 address in "
                "brackets, as in postgresql://agentlab@[2001:db8::1]:5432/agentlab. Correct the URI",
                option="database",
            )
        port = bracketed[1] if bracketed else place.partition(":")[2]
        if port and not _is_port(unquote(port)):
            shown = f"'{port}'" if login else "that is not valid (not shown: a password whose @HOST is missing?)"
            raise InvalidInput(
                f"database: the URI has a port {shown}. Valid: 1 to 65535, as in {VALID_URI}. Correct the URI",
                option="database",
            )


def _is_port(text: str) -> bool:
    return not text or (re.fullmatch(r"[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535)
