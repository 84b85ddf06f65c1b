# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read profiles: kinds of sandboxes that an operator describes once, each in a YAML file.

A profile gives values for the options that a creation leaves out. A file is checked as a whole; an error names the
file, the key and the valid values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import durations, patterns, safe_yaml
from .errors import ConfigError, InvalidInput

NAME: patterns.Word = (
    re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}", re.ASCII),
    "lower-case letters, digits, dot, hyphen and underscore",
)
CONNECTION: patterns.Word = (
    re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*){0,5}", re.ASCII),
    "the name of a connection plugin, such as agentlab.proxmox.sandbox or ssh",
)
_SUFFIXES = (".yaml", ".yml")
WORKSPACE = ("none", "optional", "required")


@dataclass(slots=True)
class Profile:
    """One kind of sandbox.

    ``values`` are creation options by their names (only those that the file sets); leases in seconds.
    """

    name: str
    path: str
    description: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    lease_default: int | None = None
    lease_maximum: int | None = None
    workspace: str = "optional"
    # Connection plugin for Ansible tasks inside.
    connection: str | None = None

    def public(self) -> dict[str, Any]:
        """Return the profile in the shape of answers: the options that it sets, and its leases as durations."""
        return {
            "name": self.name,
            "path": self.path,
            "description": self.description,
            "workspace": self.workspace,
            "connection": self.connection,
            "lease_default": None if self.lease_default is None else durations.show(self.lease_default),
            "lease_maximum": None if self.lease_maximum is None else durations.show(self.lease_maximum),
            **self.values,
        }


class _Refused(Exception):
    """The valid values for a value that is refused. The caller adds file and key."""


class _Secret(_Refused):
    """Like _Refused, for a value that no message may quote."""


Check = Callable[[Any], Any]


def _make_text_check(word: patterns.Word, spread: bool = False) -> Check:
    """Return a check of a text in one line. ``spread``: words that may be given as a list, or with commas."""

    def check(value: Any) -> str:
        if spread:
            value = patterns.join_words(value)
        elif isinstance(value, str):
            value = value.strip()
        if not patterns.fits(value, word):
            raise _Refused(word[1])
        return str(value)

    return check


def _make_whole_check(option: str) -> Check:
    low, high = patterns.RANGES[option]

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Refused(patterns.describe_number(option))
        return value

    return check


def _check_ip_config(value: Any) -> str:
    text = patterns.shorten_ip_config(value) if isinstance(value, str) else value
    try:
        patterns.check_value("ip_config", text, patterns.IPCONFIG)
        patterns.check_ip_config("ip_config", text)
    except InvalidInput:
        raise _Refused(patterns.IPCONFIG[1]) from None
    return str(text)


def _check_nameserver(value: Any) -> str:
    text = _make_text_check(patterns.NAMESERVER, spread=True)(value)
    try:
        patterns.check_nameserver("nameserver", text)
    except InvalidInput:
        raise _Refused(patterns.NAMESERVER[1]) from None
    return str(text)


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Refused("true or false")
    return value


def _make_choice_check(choices: tuple[str, ...]) -> Check:
    def check(value: Any) -> str:
        if value not in choices:
            raise _Refused(", ".join(choices))
        return str(value)

    return check


def _make_list_check(split: Callable[[Any], list[str]], check_item: Check) -> Check:
    """Return a check of a list of texts, or of a text that contains several."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, (list, str)) or (
            isinstance(value, list) and any(isinstance(item, (list, dict, bool)) for item in value)
        ):
            raise _Refused("a list of texts (in quotes where YAML reads a word such as yes or on)")
        return [check_item(item) for item in split(value)]

    return check


def _check_duration(value: Any) -> int:
    try:
        return durations.parse(value, "")
    except InvalidInput:
        raise _Refused(
            f"{durations.VALID}, more than zero and less than {durations.show(durations.MAX_SECONDS)}"
        ) from None


def _split_public_keys(value: Any) -> list[str]:
    try:
        return patterns.split_keys("ssh_public_keys", value)
    except InvalidInput:
        raise _Secret("a public key; that is a private one, which belongs into no profile") from None


# Every key of a file: its check, and the creation option that it sets. A section is a dictionary of such keys.
_KEYS: dict[str, Any] = {
    "name": (_make_text_check(NAME), None),
    "description": (_make_text_check((re.compile(r"[^\x00-\x08]{0,500}"), "a text of 500 characters at most")), None),
    "template": (_make_text_check(patterns.WORD), "template"),
    "full_clone": (_check_flag, "full_clone"),
    "node": (_make_text_check(patterns.WORD), "node"),
    "pool": (_make_text_check(patterns.POOL), "pool"),
    "storage": (_make_text_check(patterns.WORD), "storage"),
    "resources": {
        "cores": (_make_whole_check("cores"), "cores"),
        "memory": (_make_whole_check("memory"), "memory"),
        "disk_size": (_make_text_check(patterns.SIZE), "disk_size"),
        "cpu_type": (_make_text_check(patterns.CPU), "cpu_type"),
    },
    "network": {
        "bridge": (_make_text_check(patterns.WORD), "bridge"),
        "model": (_make_choice_check(patterns.MODELS), "network_model"),
        "firewall": (_check_flag, "firewall"),
        "firewall_group": (_make_text_check(patterns.FIREWALL_GROUP), "firewall_group"),
        "vlan_tag": (_make_whole_check("vlan_tag"), "vlan_tag"),
        "second": {
            "bridge": (_make_text_check(patterns.WORD), "second_bridge"),
            "vlan_tag": (_make_whole_check("second_vlan_tag"), "second_vlan_tag"),
            "ip_config": (_check_ip_config, "second_ip_config"),
        },
    },
    "cloud_init": {
        "user": (_make_text_check(patterns.USER), "cloud_init_user"),
        "upgrade": (_check_flag, "cloud_init_upgrade"),
        "vendor_data": (_make_text_check(patterns.VOLUME), "cloud_init_vendor_data"),
        "ssh_public_keys": (
            _make_list_check(_split_public_keys, _make_text_check(patterns.PUBLIC_KEY)),
            "ssh_public_keys",
        ),
        "ip_config": (_check_ip_config, "ip_config"),
        "nameserver": (_check_nameserver, "nameserver"),
        "searchdomain": (_make_text_check(patterns.SEARCHDOMAIN, spread=True), "searchdomain"),
    },
    "lease": {
        "default": (_check_duration, "lease_default"),
        "maximum": (_check_duration, "lease_maximum"),
    },
    "keepalive": (_check_flag, "keepalive"),
    "tags": (_make_list_check(patterns.split_tags, _make_text_check(patterns.TAG)), "tags"),
    "workspace": (_make_choice_check(WORKSPACE), None),
    "connection": (_make_text_check(CONNECTION), None),
}


# Options whose value is a text. If YAML reads another type (1.10 is a number, on is a boolean), the value is refused.
_TEXTS = frozenset(
    {
        "template",
        "node",
        "pool",
        "storage",
        "cpu_type",
        "disk_size",
        "bridge",
        "firewall_group",
        "second_bridge",
        "second_ip_config",
        "cloud_init_user",
        "cloud_init_vendor_data",
        "ip_config",
        "nameserver",
        "searchdomain",
        "ssh_public_keys",
        "tags",
    }
)


def load_all(folder: str) -> dict[str, Profile]:
    """Return every profile of the folder by its name. Raises ConfigError for the first invalid file.

    A folder that does not exist has none.
    """
    profiles: dict[str, Profile] = {}
    for path in _list_files(folder):
        _add_profile(profiles, read(path))
    return profiles


def load(folder: str, name: str) -> Profile:
    """Return the profile of a name. An invalid file matters only if no other file has the name.

    Raises ConfigError for the invalid file with that name, and InvalidInput if the name does not exist.
    """
    profiles: dict[str, Profile] = {}
    wrong: list[ConfigError] = []
    for path in _list_files(folder):
        try:
            _add_profile(profiles, read(path))
        except ConfigError as error:
            wrong.append(error)
    of_that_name = [
        error for error in wrong if os.path.splitext(os.path.basename(str(error.detail.get("file"))))[0] == name
    ]
    if of_that_name:
        raise of_that_name[0]
    if name in profiles:
        return profiles[name]
    unusable = f"; not usable: {wrong[0].message}" if wrong else ""
    raise InvalidInput(
        f"profile: {name!r} does not exist in {folder}. Profiles: {', '.join(sorted(profiles)) or 'none'}{unusable}",
        option="profile",
        value=name,
    )


def _add_profile(profiles: dict[str, Profile], profile: Profile) -> None:
    if profile.name in profiles:
        raise ConfigError(
            f"{profile.path}: name: {profile.name!r} is also the name of {profiles[profile.name].path}; give each "
            "profile a name of its own",
            file=profile.path,
            key="name",
        )
    profiles[profile.name] = profile


def _list_files(folder: str) -> list[str]:
    try:
        return [
            os.path.join(folder, name)
            for name in sorted(os.listdir(folder))
            if name.endswith(_SUFFIXES) and not name.startswith(".")
        ]
    except FileNotFoundError:
        if os.path.islink(folder):
            raise ConfigError(
                f"profiles_dir: {folder} is a link to {os.readlink(folder)}, which does not exist; mount or create "
                "its target, or remove the link",
                file=folder,
            ) from None
        return []
    except OSError as error:
        raise ConfigError(
            f"profiles_dir: {folder}: {error.strerror}; correct profiles_dir or its permissions", file=folder
        ) from None


def read(path: str) -> Profile:
    """Return the profile in a file, checked as a whole.

    Raises ConfigError with the file, the key and the valid values.
    """
    from .config import read_yaml

    content = read_yaml(path, path)
    if not isinstance(content, safe_yaml.Mapping):
        raise ConfigError(f"{path}: must be a mapping of keys. Valid: {', '.join(_KEYS)}", file=path)
    values = _read_section(path, "", content, _KEYS)
    plain = {
        name: values.pop(name, None)
        for name in ("name", "description", "workspace", "connection", "lease_default", "lease_maximum")
    }
    default, maximum = plain["lease_default"], plain["lease_maximum"]
    if default is not None and maximum is not None and default > maximum:
        raise ConfigError(
            f"{path}: lease.default: {durations.show(default)} is longer than lease.maximum "
            f"({durations.show(maximum)})",
            file=path,
            key="lease.default",
        )
    if values.get("storage") and values.get("full_clone") is False:
        raise ConfigError(
            f"{path}: storage: a linked clone stays on its template's storage; leave storage out, or set full_clone "
            "to true",
            file=path,
            key="storage",
        )
    if values.get("firewall_group") and values.get("firewall") is False:
        raise ConfigError(
            f"{path}: network.firewall_group: has no effect with firewall: false; leave one of the two out",
            file=path,
            key="network.firewall_group",
        )
    name = plain["name"] or os.path.splitext(os.path.basename(path))[0]
    if not NAME[0].fullmatch(name):
        raise ConfigError(
            f"{path}: name: missing, and the file's own name is not one. Valid: {NAME[1]}", file=path, key="name"
        )
    workspace = plain["workspace"] or "optional"
    return Profile(name, path, plain["description"], values, default, maximum, workspace, plain["connection"])


def _find_place(name: object, keys: Mapping[str, Any], section: str = "") -> str:
    """Return the place of a key of another section, or of a key for an option's name; "" if there is none."""
    for key, known in keys.items():
        if isinstance(known, dict):
            place = _find_place(name, known, f"{section}.{key}" if section else key)
            if place:
                return place
        elif section and name in (key, known[1], f"{section}.{key}"):
            return f"{key} under {section}"
    return ""


def _read_section(path: str, prefix: str, content: safe_yaml.Mapping, keys: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in content.items():
        known = keys.get(key) if isinstance(key, str) else None
        if known is None:
            # The file may be a link to a file with secrets, so the message quotes nothing but a plain word.
            name = safe_yaml.show_key(key).strip("'")
            place = _find_place(key, _KEYS)
            raise ConfigError(
                f"{path}: {prefix}{name}: no such key{f'; write it as {place}' if place else ''}. "
                f"Valid: {', '.join(prefix + valid for valid in keys)} (line {content.lines[key]})",
                file=path,
                key=f"{prefix}{name}",
            )
        where = f"{prefix}{key}"
        if value is None:
            continue
        if isinstance(known, dict):
            if not isinstance(value, safe_yaml.Mapping):
                raise ConfigError(
                    f"{path}: {where}: {_quote_value(value)} is not valid. Valid: a mapping of {', '.join(known)}",
                    file=path,
                    key=where,
                )
            values.update(_read_section(path, f"{where}.", value, known))
            continue
        check, option = known
        for item, written in _list_scalars(content, key, value):
            if option in _TEXTS and safe_yaml.is_misread(item, written):
                raise ConfigError(
                    f"{path}: {where}: YAML reads {patterns.quote_value(written)} as {patterns.quote_value(item)}; "
                    "put it in quotes",
                    file=path,
                    key=where,
                )
        try:
            values[option or key] = check(value)
        except _Refused as refused:
            shown = "that value" if isinstance(refused, _Secret) else _quote_value(value)
            raise ConfigError(
                f"{path}: {where}: {shown} is not valid. Valid: {refused}", file=path, key=where
            ) from None
    return values


def _list_scalars(content: safe_yaml.Mapping, key: Any, value: Any) -> list[tuple[Any, str | None]]:
    """Return the value, or each item of a list, with its written text."""
    if isinstance(value, safe_yaml.Sequence):
        return [(item, value.written.get(number)) for number, item in enumerate(value)]
    return [(value, content.written.get(key))]


def _quote_value(value: Any) -> str:
    text = repr(value)
    # Several lines may be a private key.
    return "that value" if "\\n" in text or "PRIVATE KEY" in text else text[:80]
