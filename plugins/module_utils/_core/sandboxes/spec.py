# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Define every option of a creation, and check the values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .. import patterns
from ..errors import InvalidInput
from ..guest import cloud_init
from ..proxmox import identity

_WORDS = {
    "name": patterns.DNS_NAME,
    "node": patterns.WORD,
    "storage": patterns.WORD,
    "pool": patterns.POOL,
    "bridge": patterns.WORD,
    "disk_size": patterns.SIZE,
    "ip_config": patterns.IPCONFIG,
    "nameserver": patterns.NAMESERVER,
    "searchdomain": patterns.SEARCHDOMAIN,
    "cloud_init_user": patterns.USER,
    "firewall_group": patterns.FIREWALL_GROUP,
    "cpu_type": patterns.CPU,
    "second_bridge": patterns.WORD,
    "second_ip_config": patterns.IPCONFIG,
    "cloud_init_vendor_data": patterns.VOLUME,
}

_LONGEST_DESCRIPTION = 4000


@dataclass(slots=True)
class Spec:
    """The desired sandbox. Sizes are in the form that Proxmox takes; ``ttl`` is in seconds."""

    vmid: int | None = None
    name: str | None = None
    profile: str | None = None
    template: str | None = None
    node: str | None = None
    full_clone: bool | None = None
    storage: str | None = None
    pool: str | None = None
    cores: int | None = None
    memory: int | None = None
    disk_size: str | None = None
    bridge: str | None = None
    network_model: str | None = None
    firewall: bool | None = None
    firewall_group: str | None = None
    # VLAN of the first interface.
    vlan_tag: int | None = None
    cpu_type: str | None = None
    # Bridge of the second interface (net1), which is created where the template has none.
    second_bridge: str | None = None
    second_vlan_tag: int | None = None
    second_ip_config: str | None = None
    cloud_init_user: str | None = None
    # Secret: sent to Proxmox VE, which stores its hash, and nowhere else.
    cloud_init_password: str | None = field(default=None, repr=False)
    cloud_init_upgrade: bool | None = None
    # Volume id of an existing snippet, such as local:snippets/vendor.yaml.
    cloud_init_vendor_data: str | None = None
    ip_config: str | None = None
    nameserver: str | None = None
    searchdomain: str | None = None
    # Secret as a whole: written to the snippet and nowhere else.
    cloud_init_user_data: str | None = field(default=None, repr=False)
    # Name or id of the workspace to attach before the first start.
    workspace: str | None = None
    ssh_public_keys: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ttl: int = 0
    # Longest lease in seconds that the profile grants; None without a limit of the profile.
    lease_maximum: int | None = None
    # Text of the VM's notes after our marker. It is not the description of the profile.
    description: str | None = None
    # For an existing sandbox: apply changed options. allow_restart permits the restart that some of them need.
    update: bool = False
    allow_restart: bool = False
    # Names of the options that the caller gave, without those from the profile or the configuration.
    given_options: frozenset[str] = frozenset()
    keepalive: bool = False
    protected: bool = False
    wait_for_ip: bool = False
    wait_for_cloud_init: bool = False

    def check(self) -> None:
        """Raise InvalidInput with the name of an option that Proxmox would refuse later, or could misread."""
        for option, word in _WORDS.items():
            patterns.check_value(option, getattr(self, option), word)
        patterns.check_nameserver("nameserver", self.nameserver)
        patterns.check_ip_config("ip_config", self.ip_config)
        patterns.check_ip_config("second_ip_config", self.second_ip_config)
        for tag in self.tags:
            patterns.check_value("tags", tag, patterns.TAG)
        if self.vmid is not None:
            patterns.read_vmid("vmid", self.vmid)
        if self.storage and self.full_clone is False:
            raise InvalidInput(
                "storage: a linked clone stays on its template's storage; leave storage out, or set full_clone=true",
                option="storage",
            )
        for option, (low, high) in patterns.RANGES.items():
            value = getattr(self, option)
            number = patterns.read_whole(value)
            if value is not None and (number is None or not low <= number <= high):
                raise InvalidInput(
                    f"{option}: {patterns.show_value(value)} is not valid. Valid: {patterns.describe_number(option)}",
                    option=option,
                    value=value,
                )
        if self.network_model is not None and self.network_model not in patterns.MODELS:
            raise InvalidInput(
                f"network_model: {self.network_model[:80]!r} is not valid. Valid: {', '.join(patterns.MODELS)}",
                option="network_model",
            )
        if self.allow_restart and not self.update:
            raise InvalidInput(
                "allow_restart: has an effect together with update only; set update too, or leave it out",
                option="allow_restart",
            )
        if self.description is not None and (
            len(self.description) > _LONGEST_DESCRIPTION
            or not patterns.is_encodable(self.description)
            or re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", self.description)
            or identity.is_ours(self.description)
        ):
            raise InvalidInput(
                f"description: that text is not valid. Valid: a text of {_LONGEST_DESCRIPTION} characters at most, "
                "without control characters "
                "and without a line of ours (agentlab-sandbox:)",
                option="description",
            )
        if self.firewall_group and self.firewall is False:
            raise InvalidInput(
                "firewall_group: has no effect with firewall=false; leave one of the two out", option="firewall_group"
            )
        if self.cloud_init_user_data is not None:
            cloud_init.check_data(self.cloud_init_user_data)
            for option in ("ssh_public_keys", "cloud_init_user", "cloud_init_password", "cloud_init_upgrade"):
                if getattr(self, option) not in (None, []):
                    raise InvalidInput(
                        f"{option}: has no effect with cloud_init_user_data, which replaces what Proxmox VE would "
                        "say of users; "
                        "put it into the user data",
                        option=option,
                    )
        password = self.cloud_init_password
        if password is not None and not (
            password and password.isprintable() and patterns.is_encodable(password) and len(password) <= 1000
        ):
            raise InvalidInput(
                "cloud_init_password: that value is not valid. Valid: a text in one line of 1000 characters at most",
                option="cloud_init_password",
            )
        for number, key in enumerate(self.ssh_public_keys, 1):
            if not patterns.fits(key.strip(), patterns.PUBLIC_KEY):
                # The text may be a private key, so the message does not quote it.
                raise InvalidInput(
                    f"ssh_public_keys: the key number {number} is not a public key in one line (type, key, comment)",
                    option="ssh_public_keys",
                )
