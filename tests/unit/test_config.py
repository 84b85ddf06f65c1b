# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a setting comes from, what is refused, and that secrets show up nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, database_address, patterns
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ConfigError, InvalidInput

SECRET = "s3cr3t-of-the-tests"


def load(
    folder: Path, text: str | None = None, environment: dict[str, str] | None = None, **options: Any
) -> config.Config:
    path = folder / "config.yaml"
    if text is not None or not path.exists():
        path.write_text(text or "", encoding="utf-8")
    return config.load(options, {"AGENTLAB_CONFIG": str(path), **(environment or {})})


def test_an_empty_file_gives_the_documented_defaults(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (found.proxmox.api_port, found.proxmox.validate_certs, found.vmid_range, found.default_ttl, found.node) == (
        8006,
        True,
        (1000, 1999),
        14400,
        None,
    )
    assert found.proxmox.api_host is None and found.proxmox.login == "root@pam"


def test_an_option_wins_over_environment_file_and_default(tmp_path: Path) -> None:
    text, environment = "api_host: file\napi_port: 1111\n", {"PROXMOX_HOST": "environment", "PROXMOX_PORT": "2222"}
    assert load(tmp_path, text).proxmox.api_host == "file"
    assert load(tmp_path, text, environment).proxmox.api_host == "environment"
    found = load(tmp_path, text, environment, api_host="option")
    assert (found.proxmox.api_host, found.proxmox.api_port) == ("option", 2222)
    assert load(tmp_path, "api_port: 1111\n").proxmox.api_port == 1111


def test_empty_values_are_no_values(tmp_path: Path) -> None:
    assert load(tmp_path, "api_host: file\n", {"PROXMOX_HOST": ""}, api_host="").proxmox.api_host == "file"


def test_false_is_a_value(tmp_path: Path) -> None:
    assert (
        load(
            tmp_path, "validate_certs: true\n", {"PROXMOX_VALIDATE_CERTS": "true"}, validate_certs=False
        ).proxmox.validate_certs
        is False
    )
    assert load(tmp_path, "validate_certs: false\n").proxmox.validate_certs is False


@pytest.mark.parametrize("name", sorted(config.ENVIRONMENT))
def test_every_environment_variable_is_read(tmp_path: Path, name: str) -> None:
    if name == "config_file":
        return
    value = {"api_port": "9", "api_timeout": "9", "validate_certs": "false"}.get(name, "x")
    found = load(tmp_path, None, {config.ENVIRONMENT[name]: value})
    assert str(getattr(found.proxmox, name, None) if name != "database" else found.database).lower() == value


def test_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'absent_gard'. Valid: .*absent_guard"):
        load(tmp_path, "absent_gard: 10\n")


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "just text\n",
        "3\n",
        "a: [\n",
        "a: b: c\n",
        "\t: x\n",
        "? [a]\n: b\n",
        "&a [*a]\n",
        "!!python/object:os.system x\n",
        "{",
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(tmp_path) in caught.value.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00api_host: \xe9")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path)


@pytest.mark.parametrize("as_option", [True, False])
def test_a_file_that_the_environment_names_must_exist(tmp_path: Path, as_option: bool) -> None:
    """Plugins of Ansible read the variable themselves, and give its value as an option."""
    path = str(tmp_path / "none.yaml")
    with pytest.raises(ConfigError) as caught:
        config.load({"config_file": path if as_option else None}, {"AGENTLAB_CONFIG": path})
    assert caught.value.message == (
        f"config_file: {path} does not exist. The environment variable AGENTLAB_CONFIG names it; correct the variable, "
        "or unset it for /etc/agentlab/config.yaml"
    )


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load({"config_file": str(tmp_path / "none.yaml")}, {})
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load({"config_file": str(tmp_path)}, {})


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing\n").proxmox.api_port == 8006


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_port", "0"),
        ("api_port", "65536"),
        ("api_port", "x"),
        ("api_port", True),
        ("api_port", "\u0663"),
        ("api_timeout", "0"),
        ("connections", "-1"),
        ("node_connections", "0"),
        ("connections", "1e3"),
        ("validate_certs", "maybe"),
        ("database_group_access", "2"),
        ("vmid_range", "1000"),
        ("vmid_range", "50-200"),
        ("vmid_range", "2000-1000"),
        ("vmid_range", "a-b"),
        ("vmid_range", "100-1000000000"),
        ("default_ttl", "soon"),
        ("max_ttl", "0"),
        ("max_lifetime", "-1"),
        ("wait_timeout", "x"),
        ("claim_timeout", "-1"),
        ("absent_guard", "0"),
        ("absent_guard", "101"),
        ("vmid_range", [1, 2]),
        ("api_port", []),
        ("default_ttl", {}),
        ("pool", "--purge"),
        ("pool", "a/--purge"),
        ("pool", "a;reboot"),
        ("pool", "a/b/c/d"),
        ("node", "../pve1"),
        ("node", ["pve1"]),
        ("node", True),
        ("storage", "local lvm"),
        ("template", "-9000"),
        ("snippets_storage", "local:snippets"),
    ],
)
def test_bad_value_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, **{name: value})
    assert caught.value.message.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool", "agents/ci_1.x/y"),
        ("pool", ".a"),
        ("node", "pve-1.example.org"),
        ("storage", "local-lvm"),
        ("template", 9000),
        ("template", "debian-13"),
    ],
)
def test_names_of_proxmox(tmp_path: Path, name: str, value: object) -> None:
    assert getattr(load(tmp_path, **{name: value}), name) == str(value)


def test_times_of_waiting_are_seconds_and_leases_minutes(tmp_path: Path) -> None:
    found = load(tmp_path, "wait_timeout: 90\nclaim_timeout: '5'\nshutdown_timeout: 2m\ndefault_ttl: 90\n")
    assert (found.wait_timeout, found.claim_timeout, found.shutdown_timeout, found.default_ttl) == (90, 5, 120, 5400)


@pytest.mark.parametrize(
    ("user", "token", "login"),
    [
        ("agentlab@pve", "auto", "agentlab@pve!auto"),
        ("root@pam", "agentlab@pve!auto", "agentlab@pve!auto"),
        ("agentlab@pve", "agentlab@pve!auto", "agentlab@pve!auto"),
    ],
)
def test_a_token_id_may_hold_its_user(tmp_path: Path, user: str, token: str, login: str) -> None:
    found = load(tmp_path, api_host="h", api_user=user, api_token_id=token, api_token_secret=SECRET).proxmox
    assert found.login == login and (found.user, found.token_name) == tuple(login.split("!"))
    found.check_credentials()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"api_token_id": "a@pve!b"}, "api_token_secret"),
        ({"api_token_secret": SECRET}, "api_token_id"),
        ({}, "api_host"),
        ({"api_user": "root", "api_password": SECRET}, "api_user"),
        ({"api_password": SECRET, "ca_path": "/nowhere/ca.pem"}, "ca_path"),
    ],
)
def test_credentials_that_cannot_work(tmp_path: Path, options: dict[str, str], option: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, api_host="h", **options).proxmox.check_credentials()
    assert caught.value.detail["option"] == option
    assert SECRET not in str(caught.value.as_dict())


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    found = load(tmp_path, api_host="h", api_password=SECRET, api_token_id="a@pve!b", api_token_secret=SECRET)
    assert SECRET not in repr(found) and SECRET not in str(found) and SECRET not in f"{found.proxmox!r}"


@pytest.mark.parametrize(
    "text",
    [
        f"api_password: {SECRET}: x\n",
        f"api_token_secret: [{SECRET}\n",
        f"api_token_secret: '{SECRET}\n",
        f"api_password: *{SECRET}\n",
    ],
)
def test_secrets_are_in_no_error_of_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert SECRET not in str(caught.value.as_dict())
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("pve1", ("pve1", 8006, "")),
        (" pve1.example.net\n", ("pve1.example.net", 8006, "")),
        ("pve1:8007", ("pve1", 8007, "")),
        ("https://pve1:8006", ("pve1", 8006, "")),
        ("https://pve1", ("pve1", 8006, "")),
        ("HTTPS://pve1:443/", ("pve1", 443, "")),
        ("https://gate.example.net/proxmox/", ("gate.example.net", 8006, "/proxmox")),
        ("gate:443/a/b", ("gate", 443, "/a/b")),
        ("https://pve1:8006/api2/json", ("pve1", 8006, "")),
        ("gate/pve/api2/json/", ("gate", 8006, "/pve")),
        # From the browser's address bar, and half of the API's path.
        ("https://pve1:8006/#v1:0:18:4:::::::", ("pve1", 8006, "")),
        ("pve1/api2", ("pve1", 8006, "")),
        ("gate/api2/", ("gate", 8006, "")),
        ("192.0.2.1:8006", ("192.0.2.1", 8006, "")),
        ("2001:db8::1", ("2001:db8::1", 8006, "")),
        ("[2001:db8::1]", ("2001:db8::1", 8006, "")),
        ("[2001:db8::1]:8007", ("2001:db8::1", 8007, "")),
        ("https://[2001:db8::1]:8007", ("2001:db8::1", 8007, "")),
        ("fe80::1%eth0", ("fe80::1%eth0", 8006, "")),
    ],
)
def test_how_people_write_a_host(tmp_path: Path, value: str, address: tuple[str, int, str]) -> None:
    settings = load(tmp_path, api_host=value).proxmox
    assert (settings.api_host, settings.api_port, settings.api_path) == address
    assert load(tmp_path, api_host="pve1:8007", api_port=8007).proxmox.api_port == 8007


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://pve1:8006", "does not begin with https://"),
        ("ftp://pve1", "does not begin with https://"),
        ("pve1:port", "no host name"),
        ("pve1:0", "not valid. Valid: a whole number"),
        ("pve1:70000", "not valid. Valid: a whole number"),
        ("pve 1", "no host name"),
        ("https://", "no host name"),
        ("pve1/?x=1", "has a path"),
        ("root:secret-word@pve1", "the value is no host name"),
        ("pve1\n8006", "no host name"),
        ("[::1", "no host name"),
        ("192.0.2.1:", "no host name"),
        ("pve1:", "no host name"),
        ("beef:cafe", "no host name"),
    ],
)
def test_a_host_that_is_none_is_refused_by_name(tmp_path: Path, value: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        load(tmp_path, api_host=value)
    assert caught.value.message.startswith("api_host: ") and "secret-word" not in str(caught.value.as_dict())


def test_two_ports_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match="api_host: 'pve1:8007' names port 8007, but api_port is 443; leave one of them out"
    ):
        load(tmp_path, api_host="pve1:8007", api_port=443)


@pytest.mark.parametrize("text", ["012345", "12:30", "1_000", "yes", "1.5", "2026-01-30", "[a]"])
@pytest.mark.parametrize("name", ["api_password", "api_token_secret", "api_token_id", "api_user"])
def test_a_secret_that_yaml_reads_as_something_else_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: YAML reads .*put it in quotes$") as caught:
        load(tmp_path, f"{name}: {text}\n")
    assert name not in config.SECRETS or text not in caught.value.message.partition("config.yaml")[2]


@pytest.mark.parametrize("value", [5349, 750, 1.5, True, ["a"]])
@pytest.mark.parametrize("name", ["api_password", "api_token_secret", "api_token_id", "api_user"])
def test_a_secret_that_is_no_text_is_refused(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: YAML reads the value as .*put it in quotes$") as caught:
        load(tmp_path, **{name: value})
    assert str(value) not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("api_token_secret", f"{SECRET}\n", SECRET),
        ("api_token_secret", f" {SECRET}\r\n", SECRET),
        ("api_password", " two words \n", " two words "),
        ("api_password", "'12345'", "'12345'"),
        ("api_token_id", "agentlab@pve!ci\n", "agentlab@pve!ci"),
        ("api_user", "agentlab@pve\n", "agentlab@pve"),
    ],
)
def test_a_line_feed_behind_a_secret_is_no_part_of_it(tmp_path: Path, name: str, value: str, kept: str) -> None:
    assert getattr(load(tmp_path, **{name: value}).proxmox, name) == kept
    assert getattr(load(tmp_path, None, {config.ENVIRONMENT[name]: value}).proxmox, name) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_token_secret", "made-\nup"),
        ("api_token_secret", "made up"),
        ("api_token_secret", "agentlab@pve!ci=made-up"),
        ("api_token_secret", "made-\u00fcp"),
        ("api_token_id", "agentlab@pve!ci=made-up"),
        ("api_password", "made\nup"),
        ("api_password", "made\x00up"),
    ],
)
def test_a_secret_that_cannot_be_one_is_refused_and_not_told(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: the value has ") as caught:
        load(tmp_path, **{name: value})
    assert "made" not in str(caught.value.as_dict())


@pytest.mark.parametrize("value", ["root@pam!ci", "PVEAPIToken=root@pam!ci=secret-word"])
def test_a_token_in_api_user_is_refused_by_name_and_not_shown(tmp_path: Path, value: str) -> None:
    settings = load(tmp_path, api_host="pve1", api_user=value, api_token_id="ci", api_token_secret="x").proxmox
    with pytest.raises(InvalidInput, match="api_user: the value has a '!'. Valid: user@realm.*api_token_id") as caught:
        settings.check_credentials()
    assert "secret-word" not in str(caught.value.as_dict())


@pytest.mark.parametrize(
    "content", ["", "pve1\n", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "\u00ff"]
)
def test_a_file_without_a_certificate_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(content)
    settings = load(tmp_path, api_host="pve1", api_password="x", ca_path=str(file)).proxmox
    with pytest.raises(InvalidInput, match="ca_path: .*ca.pem' holds no certificate in PEM form"):
        settings.check_credentials()
    load(
        tmp_path, api_host="pve1", api_password="x", ca_path=str(file), validate_certs=False
    ).proxmox.check_credentials()


def test_an_empty_name_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"node: '' is not valid\. Valid: .*; leave the option out"):
        patterns.check_value("node", "", patterns.WORD)


# ---- where the records are ----


@pytest.mark.parametrize(
    "value",
    [
        "mysql://u:pw-9x@h/db",
        "sqlite:///var/lib/agentlab.db",
        "sqlite:agentlab.db",
        "postgre://u:pw-9x@h/db",
        "postgresql:/h/db",
        "postgresql:u:pw-9x@h/db",
        "postgresql//u:pw-9x@h/db",
        "Postgresql://h/db",
        "jdbc:postgresql://h/db",
        "postgresql+psycopg://u:pw-9x@h/db",
        "'postgresql://u:pw-9x@h/db'",
        "file:agentlab.db?mode=ro",
        "http://h:5432/db",
        "host=db1 password=pw-9x",
        "postgresql://u:pw-9x@x@h/db",
        "postgresql://u:pw/pw-9x@h/db",
    ],
)
def test_what_looks_like_a_uri_is_refused_without_its_password(tmp_path: Path, value: str) -> None:
    with pytest.raises(InvalidInput, match=r"^database: ") as caught:
        load(tmp_path, database=value)
    assert "pw-9x" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["/var/lib/agentlab.db", "agentlab.db", "./mysql://odd", "records/a:b.db", ":memory:", "~/postgres.db"]
)
def test_a_path_stays_a_path(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, database=value).database == value


@pytest.mark.parametrize(
    ("value", "text", "password"),
    [
        ("postgresql://u@h1,h2:5433/db?sslmode=require", "postgresql://u@h1,h2:5433/db?sslmode=require", None),
        ("postgres://u:s%40f%2Fe@h/db", "postgresql://u@h/db", "s@f/e"),
        ("postgresql://h/db?password=sfe&user=u", "postgresql://h/db?user=u", "sfe"),
        ("postgresql:///db?host=%2Frun%2Fpg", "postgresql:///db?host=%2Frun%2Fpg", None),
        ("postgresql://[::1]:5433/db", "postgresql://[::1]:5433/db", None),
    ],
)
def test_the_password_is_taken_out_of_a_uri(tmp_path: Path, value: str, text: str, password: str | None) -> None:
    settings = load(tmp_path, database=value)
    assert (settings.database, settings.database_password) == (text, password)
    assert password is None or password not in repr(settings)
    assert load(tmp_path, database=value, database_password="other").database_password == "other"
    if password:
        assert load(tmp_path, f"database: '{value}'\n").secret_in_file


@pytest.mark.parametrize(("value", "passwords"), [
    ("postgresql://anna:s%40cret@db/agentlab", {"s%40cret", "s@cret"}),
    ("postgresql://anna:se/cr@et@db/agentlab", {"se/cr@et"}),
    ("postgres://db/agentlab?sslmode=require&password=s%2Fcret&x=1", {"s%2Fcret", "s/cret"}),
    ("mysql://anna:secret@db", {"secret"}), ("host=db password = secret", {"secret"}),
    ("postgresql://anna@db/agentlab", set()), ("/var/lib/agentlab/agentlab.db", set()), ("", set())])  # fmt: skip
def test_each_password_in_a_database_is_masked_also_where_the_value_is_refused(value: str, passwords: set[str]) -> None:
    assert database_address.find_passwords(value) == passwords


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("api_token_secret", f'"{SECRET}"', "is in quotes"),
        ("api_token_secret", f"'{SECRET}'", "is in quotes"),
        ("api_token_id", "'agentlab@pve!ci'", "is in quotes"),
        ("api_token_id", "agentlab@pve!ci!other", "more than one '!'"),
    ],
)
def test_a_token_as_it_stands_in_other_files_is_refused_by_name(
    tmp_path: Path, name: str, value: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: the value .*{words}") as caught:
        load(tmp_path, **{name: value})
    assert SECRET not in caught.value.message
