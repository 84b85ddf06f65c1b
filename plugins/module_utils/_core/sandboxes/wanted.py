# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the Spec from the options of a creation. A given option wins over the profile, the profile over the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import durations, patterns, profiles
from ..context import Context
from ..errors import InvalidInput
from .spec import Spec

# The options of a creation, by the names that modules and the HTTP API give them. Besides them: vmid and name.
# To add an option: CONTRIBUTING.md names every place that has to know it, and tests/repository/test_options.py compares
# them.
OPTIONS = (
    "profile",
    "template",
    "node",
    "full_clone",
    "storage",
    "pool",
    "cores",
    "memory",
    "cpu_type",
    "disk_size",
    "bridge",
    "network_model",
    "vlan_tag",
    "firewall",
    "firewall_group",
    "second_bridge",
    "second_vlan_tag",
    "second_ip_config",
    "cloud_init_user",
    "cloud_init_password",
    "cloud_init_upgrade",
    "ip_config",
    "nameserver",
    "searchdomain",
    "ssh_public_keys",
    "cloud_init_user_data",
    "cloud_init_vendor_data",
    "workspace",
    "tags",
    "description",
    "ttl",
    "keepalive",
    "protected",
    "wait_for_ip",
    "wait_for_cloud_init",
    "update",
    "allow_restart",
)
# Blanks around these values come from pasting. Password and user data are left out: their blanks may be intended.
_TRIMMED = (
    "name",
    "profile",
    "template",
    "node",
    "storage",
    "pool",
    "cpu_type",
    "disk_size",
    "bridge",
    "network_model",
    "firewall_group",
    "second_bridge",
    "second_ip_config",
    "cloud_init_user",
    "cloud_init_vendor_data",
    "ip_config",
    "workspace",
    "ttl",
)


def normalise(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in the form that Spec takes, because surveys, files and people write them differently.

    ``patterns.split_lines`` names the forms. Raises InvalidInput for a password that is no text.
    """
    values = {
        name: value.strip() if name in _TRIMMED and isinstance(value, str) else value for name, value in options.items()
    }
    for option in ("nameserver", "searchdomain"):
        if values.get(option):
            values[option] = patterns.join_words(values[option])
    for option in ("ip_config", "second_ip_config"):
        if isinstance(values.get(option), str):
            values[option] = patterns.shorten_ip_config(values[option])
    if "tags" in values:
        values["tags"] = patterns.split_tags(values["tags"])
    if "ssh_public_keys" in values:
        values["ssh_public_keys"] = patterns.split_keys("ssh_public_keys", values["ssh_public_keys"])
    if isinstance(values.get("description"), str):
        # Proxmox VE drops blanks at the end of the notes.
        text = values["description"].replace("\r\n", "\n").replace("\r", "\n")
        values["description"] = text.strip("\n").rstrip()
    password = values.get("cloud_init_password")
    if password is not None and not isinstance(password, str):
        # YAML reads 012345 as the number 5349.
        raise InvalidInput(
            "cloud_init_password: is not a text (YAML reads an unquoted number or a word such as yes as something "
            "else); put it in quotes. Where it is the answer to a survey, begin it with a letter and add to it: "
            "quotes would become part of it",
            option="cloud_init_password",
        )
    return values


def make_spec(ctx: Context, options: Mapping[str, Any]) -> Spec:
    """Return the Spec of ``vmid``, ``name`` and OPTIONS; absent and None both mean "not given".

    ``ttl`` is a duration. Raises InvalidInput with the name of the option whose value cannot be used.
    """
    given_options = normalise(
        {name: options[name] for name in ("vmid", "name", *OPTIONS) if options.get(name) is not None}
    )
    profile = (
        profiles.load(ctx.config.profiles_dir, str(given_options["profile"])) if "profile" in given_options else None
    )
    if profile and profile.workspace == "required" and "workspace" not in given_options:
        raise InvalidInput(f"workspace: missing; profile {profile.name!r} requires one", option="workspace")
    if profile and profile.workspace == "none" and "workspace" in given_options:
        raise InvalidInput(f"workspace: profile {profile.name!r} allows none", option="workspace")
    values = {**_read_profile_values(profile, given_options), **given_options}
    if isinstance(values.get("disk_size"), str):
        values["disk_size"] = patterns.shorten_size(values["disk_size"])
    values["ttl"], values["lease_maximum"] = _limit_ttl(ctx, given_options.get("ttl"), profile)
    values["given_options"] = frozenset(given_options)
    checked = Spec(**values)
    checked.check()
    return checked


def _read_profile_values(profile: profiles.Profile | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the profile supplies, without those that would contradict a given option."""
    if profile is None:
        return {}
    values = dict(profile.values)
    if options.get("firewall") is False:
        values.pop("firewall_group", None)
    if "firewall_group" in options:
        values.pop("firewall", None)
    if options.get("full_clone") is False:
        values.pop("storage", None)
    if "storage" in options:
        values.pop("full_clone", None)
    if "cloud_init_user_data" in options:
        # User data replaces the users that Proxmox VE would configure.
        values.pop("ssh_public_keys", None)
        values.pop("cloud_init_user", None)
        values.pop("cloud_init_upgrade", None)
    return values


def _limit_ttl(ctx: Context, text: object, profile: profiles.Profile | None) -> tuple[int, int | None]:
    """Return the first lease and the profile's maximum lease (None without one), both in seconds."""
    maximum, lifetime = profile.lease_maximum if profile else None, ctx.config.max_lifetime
    if text is not None:
        ttl = ctx.config.parse_ttl(text)
        if lifetime is not None and ttl > lifetime:
            raise InvalidInput(
                f"ttl: {durations.show(ttl)} is longer than max_lifetime ({durations.show(lifetime)}), the longest "
                "life of a sandbox",
                option="ttl",
                value=str(text),
            )
        if maximum is not None and ttl > maximum:
            raise InvalidInput(
                f"ttl: {durations.show(ttl)} is longer than the maximum of {durations.show(maximum)} that profile "
                f"{profile.name if profile else ''!r} grants",
                option="ttl",
                value=str(text),
            )
        return ttl, maximum
    default = ctx.config.default_ttl
    if profile and profile.lease_default is not None:
        default = ctx.config.parse_ttl(durations.show(profile.lease_default), f"{profile.path}: lease.default")
    return min(limit for limit in (default, maximum, lifetime) if limit is not None), maximum
