# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Profiles: every error names the file, the key and what is valid; given options win over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import profiles
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ConfigError, InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import wanted

SHIPPED = Path(__file__).resolve().parents[2] / "roles" / "agentlabd" / "files" / "profiles"
WHOLE = """\
name: whole
description: everything
template: debian-13
node: pve1
pool: agents
resources: {cores: 4, memory: 8192, disk_size: 20G}
network: {bridge: vmbr1, model: e1000, firewall: true, firewall_group: agents}
cloud_init: {user: agent, ssh_public_keys: [ssh-ed25519 AAAA me], ip_config: ip=dhcp, nameserver: 192.0.2.53, searchdomain: example.org}
lease: {default: 2h, maximum: 8h}
keepalive: true
tags: [a, b]
workspace: required
"""


def write(folder: Path, text: str, name: str = "one.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_shipped_ones_are_valid_and_differ() -> None:
    found = profiles.load_all(str(SHIPPED))
    assert set(found) == {"yolo-ephemeral", "yolo-workspace", "interactive-dev"}
    assert {one.workspace for one in found.values()} == set(profiles.WORKSPACE)
    assert all(one.lease_default and one.lease_maximum and one.description for one in found.values())


def test_every_key_becomes_an_option(tmp_path: Path) -> None:
    write(tmp_path, WHOLE)
    found = profiles.load(str(tmp_path), "whole")
    assert found.values == {
        "template": "debian-13",
        "node": "pve1",
        "pool": "agents",
        "cores": 4,
        "memory": 8192,
        "disk_size": "20G",
        "bridge": "vmbr1",
        "network_model": "e1000",
        "firewall": True,
        "firewall_group": "agents",
        "cloud_init_user": "agent",
        "ssh_public_keys": ["ssh-ed25519 AAAA me"],
        "ip_config": "ip=dhcp",
        "nameserver": "192.0.2.53",
        "searchdomain": "example.org",
        "keepalive": True,
        "tags": ["a", "b"],
    }
    assert (found.lease_default, found.lease_maximum, found.workspace) == (7200, 28800, "required")
    assert set(found.values) <= set(wanted.OPTIONS)
    assert found.public()["lease_maximum"] == "8h"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corse: 4", "corse: no such key. Valid: name, description, template"),
        (
            "resources: {corse: 4}",
            "resources.corse: no such key. Valid: resources.cores, resources.memory, resources.disk_size",
        ),
        ("7: 4", "7: no such key. Valid: name"),
        ("vlan_tag: 7", "vlan_tag: no such key; write it as vlan_tag under network. Valid: name"),
        ("cloud_init_user: a", "cloud_init_user: no such key; write it as user under cloud_init. Valid: name"),
        ("network: {cores: 2}", "network.cores: no such key; write it as cores under resources. Valid: network.bridge"),
        ("resources: 4", "resources: 4 is not valid. Valid: a mapping of cores, memory, disk_size"),
        ("resources: {cores: 0}", "resources.cores: 0 is not valid. Valid: a whole number from 1 to 512"),
        ("resources: {cores: true}", "resources.cores: True is not valid. Valid: a whole number from 1 to 512"),
        (
            "resources: {memory: 4G}",
            "resources.memory: '4G' is not valid. Valid: a whole number from 16 to 16777216, in",
        ),
        ("resources: {disk_size: big}", "resources.disk_size: 'big' is not valid. Valid: a size such as 20G"),
        ("network: {model: ne2k}", "network.model: 'ne2k' is not valid. Valid: virtio, e1000"),
        ("network: {bridge: 'a,b=c'}", "network.bridge: 'a,b=c' is not valid. Valid: letters, digits"),
        ("network: {firewall: 'on and off'}", "network.firewall: 'on and off' is not valid. Valid: true or false"),
        (
            "network: {firewall: false, firewall_group: x1}",
            "network.firewall_group: has no effect with firewall: false",
        ),
        (
            "lease: {default: soon}",
            "lease.default: 'soon' is not valid. Valid: minutes as a number (120) or a duration",
        ),
        ("lease: {default: 0}", "lease.default: 0 is not valid. Valid: minutes"),
        ("lease: {default: 9h, maximum: 8h}", "lease.default: 9h is longer than lease.maximum (8h)"),
        ("keepalive: 'yes please'", "keepalive: 'yes please' is not valid. Valid: true or false"),
        ("tags: {a: b}", "tags: {'a': 'b'} is not valid. Valid: a list"),
        ("tags: [-x]", "tags: ['-x'] is not valid. Valid: lower-case letters"),
        ("workspace: maybe", "workspace: 'maybe' is not valid. Valid: none, optional, required"),
        ("storage: nfs\nfull_clone: false", "storage: a linked clone stays on its template's storage"),
        ("name: ../x", "name: '../x' is not valid. Valid: lower-case letters, digits"),
        (
            "cloud_init: {ssh_public_keys: [nonsense]}",
            "cloud_init.ssh_public_keys: ['nonsense'] is not valid. Valid: a public key in one line",
        ),
        ("- a", "must be a mapping of keys. Valid: name"),
        ("", "must be a mapping of keys"),
        ("a: [", " is not valid YAML in line"),
    ],
)
def test_what_is_wrong_is_named_with_file_key_and_what_is_valid(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    for load in (lambda: profiles.load(str(tmp_path), "one"), lambda: profiles.load_all(str(tmp_path))):
        with pytest.raises(ConfigError) as caught:
            load()
        assert str(path) in caught.value.message and message in caught.value.message


def test_names(tmp_path: Path) -> None:
    write(tmp_path, "tags: [x]", "plain.yml")
    write(tmp_path, "corse: 1", "broken.yaml")
    assert profiles.load(str(tmp_path), "plain").values == {"tags": ["x"]}
    with pytest.raises(ConfigError, match=r"broken\.yaml: corse"):
        profiles.load(str(tmp_path), "broken")
    with pytest.raises(
        InvalidInput, match=r"'absent' does not exist in .* Profiles: plain; not usable: .*broken\.yaml: corse"
    ):
        profiles.load(str(tmp_path), "absent")
    (tmp_path / "broken.yaml").unlink()
    with pytest.raises(InvalidInput, match=r"profile: 'absent' does not exist in .* Profiles: plain"):
        profiles.load(str(tmp_path), "absent")
    write(tmp_path, "name: plain", "other.yaml")
    with pytest.raises(ConfigError, match="is also the name of"):
        profiles.load_all(str(tmp_path))
    write(tmp_path, "tags: [x]", "Not A Name.yaml")
    with pytest.raises(ConfigError, match="file's own name is not one"):
        profiles.read(str(tmp_path / "Not A Name.yaml"))
    assert profiles.load_all(str(tmp_path / "nowhere")) == {}


@pytest.fixture
def make(tmp_path: Path, context: Any) -> Any:
    (tmp_path / "profiles").mkdir()
    write(tmp_path / "profiles", WHOLE, "whole.yaml")
    write(tmp_path / "profiles", "storage: local-lvm\nlease: {maximum: 1h}", "short.yaml")
    write(tmp_path / "profiles", "lease: {default: 40d}", "long.yaml")
    write(tmp_path / "profiles", "workspace: none", "none.yaml")
    return lambda **options: wanted.make_spec(context(profiles_dir=str(tmp_path / "profiles")), options)


def test_given_options_win_over_the_profile_and_the_profile_over_the_configuration(make: Any) -> None:
    plain = make(profile="whole", workspace="w")
    assert (plain.cores, plain.memory, plain.tags, plain.keepalive, plain.ttl, plain.lease_maximum) == (
        4,
        8192,
        ["a", "b"],
        True,
        7200,
        28800,
    )
    mine = make(
        profile="whole", workspace="w", cores=1, tags=[], keepalive=False, ttl="30m", firewall=False, bridge="vmbr9"
    )
    assert (mine.cores, mine.tags, mine.keepalive, mine.ttl, mine.firewall, mine.firewall_group, mine.bridge) == (
        1,
        [],
        False,
        1800,
        False,
        None,
        "vmbr9",
    )
    assert make().ttl == 4 * 3600 and make(profile="short").ttl == 3600
    assert make(profile="short", full_clone=False).storage is None
    with pytest.raises(InvalidInput, match="ttl: 9h is longer than the maximum of 8h that profile 'whole' grants"):
        make(profile="whole", workspace="w", ttl="9h")
    with pytest.raises(InvalidInput, match="workspace: missing; profile 'whole' requires one"):
        make(profile="whole")
    with pytest.raises(InvalidInput, match="workspace: profile 'none' allows none"):
        make(profile="none", workspace="w")
    with pytest.raises(InvalidInput, match=r"long\.yaml: lease\.default: '40d' is longer than the maximum of 30d"):
        make(profile="long")
    with pytest.raises(InvalidInput, match=r"profile: 'nope' does not exist in .* Profiles: long, none, short, whole"):
        make(profile="nope")
