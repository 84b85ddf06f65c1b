# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A wrong URI of a PostgreSQL database is refused before libpq sees it: what is wrong, what is valid, and no secret."""

from __future__ import annotations

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import database_address
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput

HERE = "postgresql://agentlab@db1/agentlab"


def refuse(value: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        database_address.parse(value)
    assert caught.value.detail["option"] == "database"
    return caught.value.message


@pytest.mark.parametrize(
    "value",
    [
        f"{HERE}?PASSWORD=pw-9x",
        f"{HERE}?pass=pw-9x",
        f"{HERE}?passwd=pw-9x",
        f"{HERE}?sslpassword=pw-9x",
        f"{HERE}?%73slpassword=pw-9x",
        f"{HERE}?scram_client_key=pw-9x",
        f"{HERE}?password=a&pw-9x",
        f"{HERE}?password=a&pw-9x=b",
        f"{HERE}?password=a&sslmode=verify-full&pw_nine=x",
        "postgresql://agentlab:pw-9x/agentlab",
        "postgresql://agentlab:pw:9x/agentlab",
        "postgresql://agentlab:712345/agentlab",
    ],
)
def test_a_secret_in_a_wrong_place_is_refused_and_not_shown(value: str) -> None:
    message = refuse(value)
    for text in ("pw-9x", "9x", "pw_nine", "712345"):
        assert text not in message


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        (f"{HERE}?PASSWORD=pw-9x", "pw-9x"),
        (f"{HERE}?pass=pw-9x", "pw-9x"),
        (f"{HERE}?%70assword=p%2Fw", "p/w"),
        (f"{HERE}?sslpassword=pw-9x&sslmode=require", "pw-9x"),
        ("postgresql://agentlab:pw-9x/agentlab", "pw-9x"),
        ("postgresql://agentlab:pw:9x/agentlab", "pw:9x"),
    ],
)
def test_a_secret_in_a_wrong_place_is_masked_in_what_ansible_shows(value: str, secret: str) -> None:
    assert secret in database_address.find_passwords(value)


@pytest.mark.parametrize("value", [f"{HERE}?passfile=/etc/agentlab/pgpass", "postgresql://[::1]:5432/agentlab"])
def test_what_is_no_secret_is_not_masked(value: str) -> None:
    assert database_address.find_passwords(value) == set()


def test_a_password_whose_parameter_is_written_with_percent_signs_is_taken_out() -> None:
    address = database_address.parse(f"{HERE}?p%61ssword=pw-9x&sslmode=require")
    assert (address.text, address.password) == (f"{HERE}?sslmode=require", "pw-9x")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            "sslmode=verify",
            "database: sslmode in the URI is 'verify'. Valid: disable, allow, prefer, require, verify-ca, verify-full. "
            "Correct or remove it",
        ),
        ("sslmode=", "sslmode in the URI is ''. Valid: disable"),
        (
            "target_session_attrs=readwrite",
            "target_session_attrs in the URI is 'readwrite'. Valid: any, read-write, read-only, primary, standby, ",
        ),
        ("connect_timeout=5s", "connect_timeout in the URI is '5s'. Valid: a whole number. Correct"),
        ("tcp_user_timeout=5s", "tcp_user_timeout in the URI is '5s'. Valid: a whole number of milliseconds."),
        ("channel_binding=on", "channel_binding in the URI is 'on'. Valid: disable, prefer, require."),
        ("port=5432,x", "port in the URI is '5432,x'. Valid: 1 to 65535, one for all hosts or one for each"),
        ("client_encoding=LATIN1", "client_encoding in the URI is 'LATIN1'. Valid: UTF8, which is always used."),
        ("ssl_mode=require", "the URI has the parameter 'ssl_mode', which is not valid here. Valid parameters are"),
        ("replication=database", "the URI has the parameter 'replication', which is not valid here."),
        ("sslmode", "the URI has a part without '=' after its '?'."),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_valid(parameter: str, message: str) -> None:
    assert message in refuse(f"{HERE}?{parameter}")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("db1:99999", "the URI has a port '99999'. Valid: 1 to 65535"),
        ("db1:0", "the URI has a port '0'."),
        ("db1,db2:x", "the URI has a port 'x'."),
        ("[::1]:x", "the URI has a port 'x'."),
        ("::1", "Valid: HOST, HOST:PORT, or an IPv6 address in brackets, as in postgresql://agentlab@[2001:db8::1]"),
        ("[::1", "or an IPv6 address in brackets"),
        ("[::1]5432", "or an IPv6 address in brackets"),
    ],
)
def test_a_wrong_host_or_port_is_named_with_what_is_valid(place: str, message: str) -> None:
    assert message in refuse(f"postgresql://agentlab@{place}/agentlab")


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://agentlab@[::1]:5433,[2001:db8::2],db3:5434/agentlab?target_session_attrs=primary",
        "postgresql://agentlab@%2Frun%2Fpostgresql/agentlab",
        "postgresql://agentlab@/agentlab?host=/run/postgresql&port=5433",
        "postgresql:///agentlab?host=db1,db2&port=5432,5433",
        "postgresql://agentlab@db1:/agentlab?options=-c%20search_path%3Dlab",
        f"{HERE}?sslmode=verify-full&sslrootcert=system&sslcert=/a&sslkey=/b&passfile=/c&service=d&connect_timeout=3",
        f"{HERE}?client_encoding=utf-8&application_name=laptop&keepalives_idle=3&load_balance_hosts=random",
        "postgresql://",
    ],
)
def test_what_libpq_takes_is_taken_as_it_is(value: str) -> None:
    address = database_address.parse(value)
    assert (address.text, address.password) == (value, None)


@pytest.mark.parametrize(
    "value", ["host=db1 dbname=agentlab", "options=-csearch_path=lab host=db1", "connect_timeout = 3", "SSLKEY=/k"]
)
def test_a_connection_string_of_keywords_is_no_path(value: str) -> None:
    """SQLite would create a file of that name."""
    assert "a connection string of keywords" in refuse(value)
