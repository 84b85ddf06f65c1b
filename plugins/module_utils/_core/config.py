# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Configuration: an option wins over the environment, the environment over the file, the file over the default.

The file is flat YAML with the names of the options. Unknown keys are refused: a misspelt guard must not be a missing
guard.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import database_address, durations, patterns, safe_yaml
from .errors import ConfigError, InvalidInput
from .nodes import AFFINITIES, STRATEGIES, Preference
from .nodes import Rules as PlacementRules

CONFIG_FILE = "/etc/agentlab/config.yaml"
DATABASE = "/var/lib/agentlab/agentlab.db"
PROFILES = "/etc/agentlab/profiles"

ENVIRONMENT = {
    "config_file": "AGENTLAB_CONFIG",
    "database": "AGENTLAB_DATABASE",
    "api_host": "PROXMOX_HOST",
    "api_port": "PROXMOX_PORT",
    "api_user": "PROXMOX_USER",
    "api_password": "PROXMOX_PASSWORD",
    "api_token_id": "PROXMOX_TOKEN_ID",
    "api_token_secret": "PROXMOX_TOKEN_SECRET",
    "validate_certs": "PROXMOX_VALIDATE_CERTS",
    "ca_path": "PROXMOX_CA_PATH",
    "api_timeout": "PROXMOX_API_TIMEOUT",
}

# Every key the file may have, with its default.
DEFAULTS: dict[str, Any] = {
    "api_host": None,
    "api_port": 8006,
    "api_user": "root@pam",
    "api_password": None,
    "api_token_id": None,
    "api_token_secret": None,
    "validate_certs": True,
    "ca_path": None,
    "api_timeout": 30,
    "database": DATABASE,
    "database_password": None,
    "database_group_access": False,
    "connections": 16,
    "node_connections": None,
    "poll_interval": 0.1,
    "vmid_range": "1000-1999",
    "node": None,
    "template": None,
    "pool": None,
    "storage": None,
    "placement": None,
    "default_ttl": "4h",
    "max_lifetime": None,
    "max_ttl": "30d",
    "claim_timeout": "30s",
    "wait_timeout": "10m",
    "shutdown_timeout": "30s",
    "doubt_window": "60s",
    "clock_jump_pause": "10m",
    "absent_guard": "50",
    "profiles_dir": PROFILES,
    "workspace_owner_range": "990000-990999",
    "snippets_storage": "local",
    "snippets_dir": "/var/lib/vz/snippets",
    "socket": "/run/agentlab/agentlabd.sock",
    "listen": None,
    "listen_token_file": None,
    "metrics_listen": None,
    "api_vmid_range_only": False,
    "api_templates": None,
    "api_pools": None,
    "cleanup_file": "/etc/agentlab/cleanup.yaml",
    "expire_interval": "30s",
    "reconcile_interval": "15m",
    "stop_timeout": "60s",
}
# The daemon reads these keys only at its start; a reload does not change them.
FIXED = ("database", "database_password", "database_group_access", "socket", "listen", "metrics_listen")
SECRETS = ("api_password", "api_token_secret", "database_password")
# Keys whose value is a text. If YAML reads another type (012345 is a number, yes is a boolean), the file is refused.
TEXTS = (
    "api_host",
    "api_user",
    *SECRETS,
    "api_token_id",
    "ca_path",
    "database",
    "node",
    "template",
    "pool",
    "storage",
    "profiles_dir",
    "snippets_storage",
    "snippets_dir",
    "socket",
    "listen_token_file",
    "cleanup_file",
)


@dataclass(slots=True)
class ProxmoxSettings:
    """The address of Proxmox VE, the credentials and the limits. repr() shows no secret."""

    api_host: str | None = None
    api_port: int = 8006
    # Path before /api2/json, for an API behind a proxy; empty, or with a leading slash.
    api_path: str = ""
    api_user: str = "root@pam"
    api_password: str | None = field(default=None, repr=False)
    api_token_id: str | None = None
    api_token_secret: str | None = field(default=None, repr=False)
    validate_certs: bool = True
    ca_path: str | None = None
    api_timeout: int = 30
    connections: int = 16
    # The limit of these connections for one node; None: no limit of its own.
    node_connections: int | None = None
    # Seconds that a task may take: pvesh answers only when the task that it started has ended.
    task_timeout: int = 600

    @property
    def where(self) -> str:
        return f"{self.api_host}:{self.api_port}{self.api_path}" if self.api_host else "this node (pvesh)"

    @property
    def user(self) -> str:
        # A token id given as user@realm!name carries the user along.
        if self.api_token_id and "!" in self.api_token_id:
            return self.api_token_id.partition("!")[0]
        return self.api_user

    @property
    def token_name(self) -> str | None:
        return self.api_token_id.rpartition("!")[2] if self.api_token_id else None

    @property
    def login(self) -> str:
        if self.api_host is None:
            return "root@pam"
        return f"{self.user}!{self.token_name}" if self.token_name else self.user

    @property
    def credential_options(self) -> str:
        """Return the options to check when the credentials are refused."""
        return (
            "api_user, api_token_id and api_token_secret (and whether the token has expired)"
            if self.api_token_id
            else "api_user and api_password"
        )

    @property
    def is_root(self) -> bool:
        """Return whether the login is root@pam itself, which has no ACL. Its tokens may have one."""
        return self.login == "root@pam"

    def check_credentials(self) -> None:
        """Raise InvalidInput with the name of a credential option that is missing or contradicts another."""
        if self.api_token_id and not self.api_token_secret:
            raise InvalidInput(
                "api_token_secret: missing, but api_token_id is set; give both, or api_password",
                option="api_token_secret",
            )
        if self.api_token_secret and not self.api_token_id:
            raise InvalidInput(
                "api_token_id: missing, but api_token_secret is set; give both, or api_password", option="api_token_id"
            )
        if not self.api_token_id and not self.api_password:
            raise InvalidInput(
                f"api_host: {self.api_host!r} is set without credentials; give api_token_id and api_token_secret (or "
                "api_password)",
                option="api_host",
            )
        if "!" in self.api_user:
            # The text after the '!' may be the secret, so the message shows no part of the value.
            raise InvalidInput(
                "api_user: the value has a '!'. Valid: user@realm, such as root@pam; the token belongs into "
                "api_token_id (user@realm!name) and api_token_secret",
                option="api_user",
            )
        if "@" not in self.user:
            raise InvalidInput(
                f"api_user: {self.user!r} has no realm. Valid: user@realm, such as root@pam",
                option="api_user",
                value=self.user,
            )
        if self.ca_path and not os.path.exists(self.ca_path):
            raise InvalidInput(
                f"ca_path: {self.ca_path!r} does not exist; give the CA certificate's file",
                option="ca_path",
                value=self.ca_path,
            )
        if self.ca_path:
            refuse_special_file("ca_path", self.ca_path)
        if self.ca_path and self.validate_certs and os.path.isfile(self.ca_path):
            _check_certificates(self.ca_path)


def refuse_special_file(option: str, path: str) -> None:
    """Raise InvalidInput for a FIFO, a socket or a device: opening or reading it may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InvalidInput(f"{option}: {path!r} is not a regular file; give a file", option=option, value=path)


def is_missing(option: str, path: str) -> bool:
    """Return whether an optional file is missing.

    Raises ConfigError for a link to a missing file: somebody meant the link to lead to a file.
    """
    if os.path.exists(path):
        return False
    if os.path.islink(path):
        raise ConfigError(
            f"{option}: {path} is a link to {os.readlink(path)}, which cannot be followed; mount or create its "
            "target, or remove the link",
            file=path,
        )
    return True


def _check_certificates(path: str) -> None:
    """Raise InvalidInput for a file without a certificate. The TLS library would only report a failed connection."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise InvalidInput(
            f"ca_path: {path!r} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----); give a copy of "
            "/etc/pve/pve-root-ca.pem of the node",
            option="ca_path",
            value=path,
        ) from None
    except OSError as error:
        raise InvalidInput(
            f"ca_path: {path!r} cannot be read: {error.strerror}; correct the path or its permissions",
            option="ca_path",
            value=path,
        ) from None


@dataclass(slots=True)
class Config:
    """The configuration of a run. Durations are in seconds."""

    proxmox: ProxmoxSettings
    # A path, or a PostgreSQL URI without its password. Messages may show it.
    database: str
    database_group_access: bool
    vmid_range: tuple[int, int]
    node: str | None
    template: str | None
    pool: str | None
    storage: str | None
    # The rules by which node "auto" is chosen.
    placement: PlacementRules
    default_ttl: int
    max_ttl: int
    max_lifetime: int | None
    claim_timeout: int
    wait_timeout: int
    shutdown_timeout: int
    doubt_window: int
    clock_jump_pause: int
    absent_guard: int
    workers: int
    # The shortest time between two requests for the running tasks of a node, in seconds.
    poll_interval: float
    profiles_dir: str
    workspace_owner_range: tuple[int, int]
    snippets_storage: str
    snippets_dir: str
    socket: str
    listen: tuple[str, int] | None
    listen_token_file: str | None
    metrics_listen: tuple[str, int] | None
    # The values that a client of the daemon may choose; None: every value that the credentials may use.
    api_vmid_range_only: bool
    api_templates: tuple[str, ...] | None
    api_pools: tuple[str, ...] | None
    cleanup_file: str
    expire_interval: int
    reconcile_interval: int
    stop_timeout: int
    # The file that was read, if any, and whether it contains a secret: then its mode matters (the doctor checks that).
    config_file: str | None = None
    secret_in_file: bool = False
    # The password for PostgreSQL, from the option or from the URI.
    database_password: str | None = field(default=None, repr=False)

    def parse_ttl(self, value: object, option: str = "ttl") -> int:
        """Return the seconds of a lease. Raises InvalidInput for a value over the configured maximum."""
        limit = self.max_ttl if self.max_lifetime is None else max(self.max_ttl, self.max_lifetime)
        return durations.parse(value, option, maximum=limit)


def load(options: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Merge options, environment and file. Raises InvalidInput with the name of the option that cannot be used."""
    from_environment = environment.get(ENVIRONMENT["config_file"])
    named_file = options.get("config_file") or from_environment
    path = named_file or CONFIG_FILE
    if named_file and named_file == from_environment and is_missing("config_file", str(path)):
        # Ansible's plugins set the option from this variable, so the option and the variable may be equal.
        raise ConfigError(
            f"config_file: {path} does not exist. The environment variable {ENVIRONMENT['config_file']} names it; "
            f"correct the variable, or unset it for {CONFIG_FILE}",
            file=path,
        )
    from_file = read_file(str(path)) if named_file or not is_missing("config_file", str(path)) else {}

    def read_value(name: str) -> Any:
        for source_value in (
            options.get(name),
            environment.get(ENVIRONMENT.get(name, ""), None) or None,
            from_file.get(name),
        ):
            if source_value is not None and source_value != "":
                return source_value
        return DEFAULTS[name]

    connections = _read_integer("connections", read_value("connections"), 1, 256)
    to_node = read_value("node_connections")
    api_host, api_port, api_path = parse_api_address(
        read_value("api_host"), _read_integer("api_port", read_value("api_port"), 1, 65535)
    )
    proxmox = ProxmoxSettings(
        api_host=api_host,
        api_port=api_port,
        api_path=api_path,
        api_user=str(_read_credential("api_user", read_value("api_user"))),
        api_password=_read_credential("api_password", read_value("api_password")),
        api_token_id=_read_credential("api_token_id", read_value("api_token_id")),
        api_token_secret=_read_credential("api_token_secret", read_value("api_token_secret")),
        validate_certs=_read_boolean("validate_certs", read_value("validate_certs")),
        ca_path=_read_text("ca_path", read_value("ca_path")),
        api_timeout=_read_integer("api_timeout", read_value("api_timeout"), 1, 3600),
        connections=connections,
        node_connections=None if to_node is None else _read_integer("node_connections", to_node, 1, 256),
        task_timeout=_read_seconds("wait_timeout", read_value("wait_timeout")),
    )
    address = database_address.parse(str(read_value("database")))
    lifetime = read_value("max_lifetime")
    vmids, owners = (
        parse_vmid_range(read_value("vmid_range")),
        parse_vmid_range(read_value("workspace_owner_range"), "workspace_owner_range"),
    )
    if vmids[0] <= owners[1] and owners[0] <= vmids[1]:
        raise InvalidInput(
            f"workspace_owner_range: {owners[0]}-{owners[1]} overlaps vmid_range ({vmids[0]}-{vmids[1]}). Proxmox VE "
            "deletes with a VM what its VMID owns, so the owners of workspaces need VMIDs that no VM ever has",
            option="workspace_owner_range",
        )
    return Config(
        proxmox=proxmox,
        database=address.text,
        database_password=_read_credential("database_password", read_value("database_password")) or address.password,
        database_group_access=_read_boolean("database_group_access", read_value("database_group_access")),
        vmid_range=vmids,
        workspace_owner_range=owners,
        node=_read_word("node", read_value("node"), patterns.WORD),
        template=_read_word("template", read_value("template"), patterns.WORD),
        pool=_read_word("pool", read_value("pool"), patterns.POOL),
        storage=_read_word("storage", read_value("storage"), patterns.WORD),
        placement=_read_placement_rules(read_value("placement")),
        default_ttl=durations.parse(read_value("default_ttl"), "default_ttl"),
        max_ttl=durations.parse(read_value("max_ttl"), "max_ttl"),
        max_lifetime=None if lifetime is None else durations.parse(lifetime, "max_lifetime"),
        claim_timeout=_read_seconds("claim_timeout", read_value("claim_timeout")),
        wait_timeout=_read_seconds("wait_timeout", read_value("wait_timeout")),
        shutdown_timeout=_read_seconds("shutdown_timeout", read_value("shutdown_timeout")),
        doubt_window=_read_seconds("doubt_window", read_value("doubt_window")),
        clock_jump_pause=_read_seconds("clock_jump_pause", read_value("clock_jump_pause")),
        absent_guard=_read_integer("absent_guard", read_value("absent_guard"), 1, 100),
        workers=connections,
        poll_interval=_read_fraction("poll_interval", read_value("poll_interval"), 0.01, 60.0),
        profiles_dir=str(read_value("profiles_dir")),
        snippets_storage=str(_read_word("snippets_storage", read_value("snippets_storage"), patterns.WORD)),
        snippets_dir=str(read_value("snippets_dir")),
        socket=str(read_value("socket")),
        listen=parse_loopback("listen", read_value("listen")),
        listen_token_file=_read_text("listen_token_file", read_value("listen_token_file")),
        metrics_listen=parse_loopback("metrics_listen", read_value("metrics_listen")),
        api_vmid_range_only=_read_boolean("api_vmid_range_only", read_value("api_vmid_range_only")),
        api_templates=_read_names("api_templates", read_value("api_templates"), patterns.WORD),
        api_pools=_read_names("api_pools", read_value("api_pools"), patterns.POOL),
        cleanup_file=str(read_value("cleanup_file")),
        expire_interval=_read_seconds("expire_interval", read_value("expire_interval"), zero=False),
        reconcile_interval=_read_seconds("reconcile_interval", read_value("reconcile_interval"), zero=False),
        stop_timeout=_read_seconds("stop_timeout", read_value("stop_timeout")),
        config_file=str(path) if from_file else None,
        secret_in_file=any(from_file.get(name) for name in SECRETS)
        or bool(from_file.get("database") and database_address.parse(str(from_file["database"])).password),
    )


def read_yaml(path: str, where: str) -> Any:
    """Return the content of a YAML file.

    Raises ConfigError, whose message begins with ``where``, for a file that cannot be read or parsed.
    """
    try:
        import yaml  # noqa: F401 - safe_yaml needs it
    except ImportError:
        raise ConfigError(
            f"{where} cannot be read without the Python library yaml; install python3-yaml", file=path
        ) from None
    try:
        return safe_yaml.load(safe_yaml.read_text(path))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; correct the path or its permissions", file=path) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not valid YAML (not UTF-8); nothing of it was used", file=path) from None
    except safe_yaml.Refused as error:
        # The message has the place in the file and never the line, which may contain a secret.
        raise ConfigError(f"{where} {error.reason}{error.place}; nothing of it was used", file=path) from None


def read_file(path: str) -> dict[str, Any]:
    """Return the keys of the configuration file.

    Raises ConfigError for the whole file when it cannot be parsed or has an unknown key.
    """
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        # Saves the import of the YAML library.
        return {}
    keys = read_yaml(path, f"config_file: {path}")
    if keys is None:
        return {}
    if not isinstance(keys, safe_yaml.Mapping):
        raise ConfigError(f"config_file: {path} must be a mapping of options, such as 'api_host: 192.0.2.1'", file=path)
    unknown = [key for key in keys if key not in DEFAULTS]
    if unknown:
        raise ConfigError(
            f"config_file: {path} has the unknown key {safe_yaml.show_key(unknown[0])}. Valid: {', '.join(DEFAULTS)} "
            f"(line {keys.lines[unknown[0]]})",
            file=path,
        )
    for key in TEXTS:
        if safe_yaml.is_misread(keys.get(key), keys.written.get(key)):
            # A password 012345 would be sent as 5349.
            shown = "that value" if key in SECRETS else patterns.quote_value(keys.written[key])
            raise ConfigError(
                f"config_file: {path}: {key}: YAML reads {shown} as something else than a text (line "
                f"{keys.lines[key]}); put it in quotes",
                file=path,
            )
    return dict(keys)


def _read_placement_rules(value: Any) -> PlacementRules:
    """Return the mapping ``placement`` as rules. Raises InvalidInput with the key, its value and the valid values."""
    if value is None:
        return PlacementRules()
    valid = ", ".join(PlacementRules.__dataclass_fields__)
    if not isinstance(value, Mapping):
        raise InvalidInput(
            f"placement: {patterns.quote_value(value)} is not valid. Valid: a mapping of {valid}", option="placement"
        )
    for key in value:
        if key not in PlacementRules.__dataclass_fields__:
            raise InvalidInput(
                f"placement: {patterns.quote_value(key)} is no key of it. Valid: {valid}", option="placement"
            )
    rules = {key: item for key, item in value.items() if item is not None}
    for key, choices in (("strategy", STRATEGIES), ("anti_affinity", AFFINITIES)):
        if key in rules and rules[key] not in choices:
            raise InvalidInput(
                f"placement.{key}: {patterns.quote_value(rules[key])} is not valid. Valid: {', '.join(choices)}",
                option=f"placement.{key}",
            )
    if "nodes" in rules:
        rules["nodes"] = frozenset(_read_names("placement.nodes", rules["nodes"], patterns.WORD) or ())
    for key in ("prefer", "avoid"):
        if key in rules:
            rules[key] = _read_preferences(f"placement.{key}", rules[key])
    if "max_per_node" in rules:
        rules["max_per_node"] = _read_integer("placement.max_per_node", rules["max_per_node"], 1, 100000)
    if "settle" in rules:
        rules["settle"] = _read_seconds("placement.settle", rules["settle"])
    if "reserve" in rules:
        rules["reserve"] = _read_integer("placement.reserve", rules["reserve"], 0, 99)
    return PlacementRules(**rules)


def _read_preferences(name: str, value: Any) -> tuple[Preference, ...]:
    """Return a list of ``{tag: T, nodes: [N]}`` and ``{profile: P, nodes: [N]}``."""
    preferences = []
    for item in value if isinstance(value, list) else [value]:
        keys = set(item) if isinstance(item, Mapping) else set()
        if keys not in ({"tag", "nodes"}, {"profile", "nodes"}):
            raise InvalidInput(
                f"{name}: {patterns.quote_value(item)} is not valid. Valid: a list of mappings, each with nodes and "
                "either tag or profile, such as {tag: gpu, nodes: [pve3]}",
                option=name,
            )
        kind = "tag" if "tag" in keys else "profile"
        written = item[kind].lower() if kind == "tag" and isinstance(item[kind], str) else item[kind]
        word = _read_word(f"{name}.{kind}", written, patterns.TAG if kind == "tag" else patterns.WORD)
        nodes = _read_names(f"{name}.nodes", item["nodes"], patterns.WORD)
        if not word or not nodes:
            raise InvalidInput(
                f"{name}: {patterns.quote_value(dict(item))} names no {kind if not word else 'node'}. Valid: a {kind} "
                "and at least one node",
                option=name,
            )
        preferences.append(Preference(kind, word, frozenset(nodes)))
    return tuple(preferences)


def parse_vmid_range(value: object, name: str = "vmid_range") -> tuple[int, int]:
    """Return the first and last VMID of a range such as ``1000-1999``. Raises InvalidInput by the name ``name``."""
    low, high = patterns.MIN_VMID, patterns.MAX_VMID
    first, last = (patterns.read_whole(part) for part in (str(value).partition("-")[::2]))
    if first is None or last is None or not low <= first <= last <= high:
        raise InvalidInput(
            f"{name}: {str(value)[:80]!r} is not a range. Valid: FIRST-LAST within {low}-{high}, such as "
            f"{DEFAULTS[name]}",
            option=name,
            value=str(value)[:80],
        )
    return first, last


def parse_api_address(value: object, port: int) -> tuple[str | None, int, str]:
    """Return host, port and path of ``pve1``, ``pve1:8006`` or ``https://pve1:8006/prefix``.

    ``port`` is api_port. Raises InvalidInput for a value that is no address, and for two ports that contradict.
    """
    if value is None:
        return None, port, ""
    text = str(value).strip()

    def make_error(why: str) -> InvalidInput:
        # The text before an @ may be a password.
        shown = repr(text[:100]) if "@" not in text else "the value"
        return InvalidInput(
            f"api_host: {shown} {why}. Valid: a host name or address such as pve1.example.net or 192.0.2.1, or "
            "https://HOST:PORT",
            option="api_host",
        )

    scheme, separator, after_scheme = text.partition("://")
    if separator and scheme.lower() != "https":
        raise make_error("does not begin with https://, and Proxmox VE answers to nothing else")
    # A URL copied from the browser names a view of the web interface after a #.
    host, _slash, path = (after_scheme if separator else text).partition("#")[0].partition("/")
    path = re.sub(r"(^|/)api2(/json)?$", "", path.strip("/"))
    if not re.fullmatch(r"[\w.~/-]*", path, re.ASCII):
        raise make_error("has a path with characters that an API's path cannot have")
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(\d+))?", host, re.ASCII)
    plain = re.fullmatch(r"([\w.-]+)(?::(\d+))?", host)
    if bracketed or plain:
        host, own_port = (bracketed or plain).groups()  # type: ignore[union-attr]
    elif _is_ipv6(host):
        own_port = None
    else:
        raise make_error("is no host name or address")
    if own_port is not None:
        own = _read_integer("api_host", own_port, 1, 65535)
        if port not in (own, DEFAULTS["api_port"]):
            raise make_error(f"names port {own}, but api_port is {port}; leave one of them out")
        port = own
    return host, port, f"/{path}" if path else ""


def _is_ipv6(text: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(text), ipaddress.IPv6Address)
    except ValueError:
        return False


def _read_credential(name: str, value: Any) -> str | None:
    """Return a user, token or password as text. No message quotes the value."""
    if value is None:
        return None
    if not isinstance(value, str):
        kind = (
            "a boolean"
            if isinstance(value, bool)
            else "a number"
            if isinstance(value, (int, float))
            else "something else"
        )
        raise InvalidInput(
            f"{name}: YAML reads the value as {kind}, not as text, which would change it; put it in quotes", option=name
        )
    # Files and clipboards add a line feed. A password may begin or end with spaces.
    text = value.strip("\r\n") if name in ("api_password", "database_password") else value.strip()
    if not text.isprintable() or (name.startswith("api_token") and not (text.isascii() and " " not in text)):
        raise InvalidInput(
            f"{name}: the value has a line feed, a space or another character that it cannot have; give it in one "
            "piece",
            option=name,
        )
    if name.startswith("api_token") and text[:1] in ("'", '"'):
        raise InvalidInput(
            f"{name}: the value is in quotes, which are no part of it (a shell or YAML takes them away, an environment "
            "file does not); give it without",
            option=name,
        )
    if name == "api_token_id" and text.count("!") > 1:
        raise InvalidInput(
            "api_token_id: the value has more than one '!'. Valid: name, or user@realm!name", option=name
        )
    if name == "api_token_id" and "=" in text:
        raise InvalidInput(
            "api_token_id: the value has a '='. Valid: user@realm!name; what follows the '=' belongs into "
            "api_token_secret",
            option=name,
        )
    if name == "api_token_secret" and ("!" in text or "=" in text):
        raise InvalidInput(
            "api_token_secret: the value has a '!' or a '='. Valid: only the secret, such as "
            "12345678-1234-1234-1234-123456789abc; user@realm!name belongs into api_token_id",
            option=name,
        )
    return text


def _read_text(name: str, value: Any) -> str | None:
    return None if value is None else str(value)


def _read_word(name: str, value: Any, word: patterns.Word) -> str | None:
    value = value.strip() if isinstance(value, str) else value
    patterns.check_value(name, value, word)
    return _read_text(name, value)


def _read_names(name: str, value: Any, word: patterns.Word) -> tuple[str, ...] | None:
    """Return a list, or a text with commas, as names; None when nothing was set. An empty list allows none."""
    if value is None:
        return None
    if isinstance(value, (dict, bool)):
        raise InvalidInput(f"{name}: {patterns.quote_value(value)} is not valid. Valid: a list of names", option=name)
    names = patterns.split_words(value)
    for text in names:
        patterns.check_value(name, text, word)
    return tuple(names)


def _read_integer(name: str, value: Any, low: int, high: int) -> int:
    number = patterns.read_whole(value)
    if number is None or not low <= number <= high:
        text = str(value).strip()[:80]
        shown = "that value" if name in SECRETS else repr(text)
        raise InvalidInput(
            f"{name}: {shown} is not valid. Valid: a whole number from {low} to {high}", option=name, value=text
        )
    return number


def _read_fraction(name: str, value: Any, low: float, high: float) -> float:
    text = str(value).strip()
    try:
        number = -1.0 if isinstance(value, bool) else float(text)
    except ValueError:
        number = -1.0
    if not low <= number <= high:
        raise InvalidInput(
            f"{name}: {text!r} is not valid. Valid: a number from {low:g} to {high:g}", option=name, value=text
        )
    return number


def _read_boolean(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise InvalidInput(f"{name}: {text!r} is not valid. Valid: true or false", option=name, value=text)


def parse_loopback(name: str, value: Any) -> tuple[str, int] | None:
    """Return address and port of ``127.0.0.1:8080`` or ``[::1]:8080``. Raises InvalidInput for other addresses."""
    if value is None:
        return None
    import ipaddress

    text = str(value).strip()
    host, _colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        local = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        local = None
    if local is None or not local.is_loopback or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise InvalidInput(
            f"{name}: {text!r} is not valid. Valid: a loopback address and a port, such as 127.0.0.1:9820 or "
            "[::1]:9820",
            option=name,
            value=text,
        )
    return str(local), int(port)


def _read_seconds(name: str, value: Any, *, zero: bool = True) -> int:
    # A bare number of a timeout is seconds, as everywhere in Ansible. Only leases and ages are minutes.
    text = str(value).strip()
    if not isinstance(value, bool) and text.isascii() and text.isdecimal():
        value = f"{text}s"
    return durations.parse(value, name, zero=zero, valid=durations.VALID_SECONDS)
