# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""From the options of a creation to its Spec: an option that is given wins over the profile, the profile over the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import durations, profiles
from ..errors import InvalidInput
from . import create
from .context import Context

# The options of a creation, by the names that modules and the HTTP API give them. Besides them: vmid and name.
OPTIONS = ("profile", "template", "node", "full_clone", "storage", "pool", "cores", "memory", "disk_size", "bridge", "network_model", "firewall",
           "firewall_group", "cloud_init_user", "ip_config", "nameserver", "searchdomain", "ssh_public_keys", "cloud_init_user_data", "workspace",
           "tags", "ttl",
           "keepalive", "protected", "wait_for_ip", "wait_for_cloud_init")


def spec(ctx: Context, options: Mapping[str, Any]) -> create.Spec:
    """The Spec of ``vmid``, ``name`` and OPTIONS (absent or None: not given); refuses by name what cannot be used. ``ttl`` as a duration."""
    given = {name: options[name] for name in ("vmid", "name", *OPTIONS) if options.get(name) is not None}
    profile = profiles.load(ctx.config.profiles_dir, str(given["profile"])) if "profile" in given else None
    if profile and profile.workspace == "required" and "workspace" not in given:
        raise InvalidInput(f"workspace: missing; profile {profile.name!r} requires one", option="workspace")
    if profile and profile.workspace == "none" and "workspace" in given:
        raise InvalidInput(f"workspace: profile {profile.name!r} allows none", option="workspace")
    values = {**_of_profile(profile, given), **given}
    values["ttl"], values["lease_maximum"] = _ttl(ctx, given.get("ttl"), profile)
    found = create.Spec(**values)
    found.check()
    return found


def _of_profile(profile: profiles.Profile | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the profile fills in, without what would contradict an option that is given."""
    if profile is None:
        return {}
    values = dict(profile.values)
    if given.get("firewall") is False:
        values.pop("firewall_group", None)
    if "firewall_group" in given:
        values.pop("firewall", None)
    if given.get("full_clone") is False:
        values.pop("storage", None)
    if "storage" in given:
        values.pop("full_clone", None)
    if "cloud_init_user_data" in given:
        # It replaces what Proxmox would say of users.
        values.pop("ssh_public_keys", None)
        values.pop("cloud_init_user", None)
    return values


def _ttl(ctx: Context, given: object, profile: profiles.Profile | None) -> tuple[int, int | None]:
    """Seconds of the first lease, and the longest that the profile grants."""
    maximum, lifetime = profile.lease_maximum if profile else None, ctx.config.max_lifetime
    if given is not None:
        ttl = ctx.config.parse_ttl(given)
        if lifetime is not None and ttl > lifetime:
            raise InvalidInput(f"ttl: {durations.show(ttl)} is longer than max_lifetime ({durations.show(lifetime)}), the longest life of a sandbox",
                               option="ttl", value=str(given))
        if maximum is not None and ttl > maximum:
            raise InvalidInput(f"ttl: {durations.show(ttl)} is longer than the maximum of {durations.show(maximum)} that profile "
                               f"{profile.name if profile else ''!r} grants", option="ttl", value=str(given))
        return ttl, maximum
    wanted = ctx.config.default_ttl
    if profile and profile.lease_default is not None:
        wanted = ctx.config.parse_ttl(durations.show(profile.lease_default), f"{profile.path}: lease.default")
    return min(limit for limit in (wanted, maximum, lifetime) if limit is not None), maximum
