# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What surveys, files and people write becomes lists: textareas, carriage returns, blanks, commas, comments, options
of keys.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import patterns
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create, wanted

K = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMadeUp me@example.org"
L = 'from="10.0.0.0/8,192.0.2.0/24",command="/bin/run a, b \\"c\\"",no-pty ssh-rsa AAAAB3NzaC1yc2E you'
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        (f"{K}\n{L}\n", [K, L]),
        (f"{K}\r\n\r\n# mine\r\n  {L}  \r\n", [K, L]),
        ([K, ""], [K]),
        ([f"{K}\n{L}", "# x", None], [K, L]),
        ([], []),
        ("", []),
        (None, []),
        (" \n\t\n", []),
        ((K,), [K]),
        (f"{K}\r{L}", [K, L]),
        ([[K], [[L]]], [K, L]),
    ],
)
def test_keys_are_lines(value: Any, keys: list[str]) -> None:
    assert patterns.split_keys("ssh_public_keys", value) == keys
    create.Spec(ssh_public_keys=keys).check()


@pytest.mark.parametrize(
    "value",
    [
        PRIVATE,
        [K, PRIVATE],
        PRIVATE.replace("\n", "\r\n"),
        [PRIVATE.splitlines()[0]],
        "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n",
    ],
)
def test_a_private_key_is_refused_and_not_quoted(value: Any) -> None:
    with pytest.raises(InvalidInput, match="ssh_public_keys: holds a private key") as caught:
        patterns.split_keys("ssh_public_keys", value)
    assert "b3BlbnNzaC1" not in str(caught.value.as_dict()) and "BEGIN" not in str(caught.value.as_dict())


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        ("ci, nightly", ["ci", "nightly"]),
        ("ci\r\nnightly\r\n", ["ci", "nightly"]),
        ("CI;Night ly", ["ci", "night", "ly"]),
        (["ci", ""], ["ci"]),
        (["ci,night", "CI"], ["ci", "night"]),
        ("# all of them\nci\n", ["ci"]),
        ([1, "a"], ["1", "a"]),
        (7, ["7"]),
        (",", []),
        ("", []),
        (None, []),
    ],
)
def test_tags_are_words(value: Any, tags: list[str]) -> None:
    assert patterns.split_tags(value) == tags


@pytest.mark.parametrize(
    "key",
    [
        K,
        L,
        "ssh-rsa AAAA",
        "restrict ssh-ed25519 AAAA",
        "sk-ssh-ed25519@openssh.com AAAA x",
        "ecdsa-sha2-nistp256 AAAA x",
        'environment="A=b c",cert-authority ssh-rsa AAAA',
    ],
)
def test_public_keys_of_every_kind_are_accepted(key: str) -> None:
    assert patterns.fits(key, patterns.PUBLIC_KEY)


@pytest.mark.parametrize(
    "key", ["AAAA", "ssh-ed25519", 'from="x ssh-ed25519 AAAA', "a b c", 'from="x",  ssh-rsa AAAA', f"{K}\n{K}"]
)
def test_what_is_no_public_key(key: str) -> None:
    assert not patterns.fits(key, patterns.PUBLIC_KEY)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("name", " agent-1 ", "agent-1"),
        ("template", "debian-13\n", "debian-13"),
        ("ttl", " 4 h ", 14400),
        ("node", "\tpve1", "pve1"),
        ("nameserver", "192.0.2.1, 192.0.2.2", "192.0.2.1 192.0.2.2"),
        ("nameserver", ["192.0.2.1", "2001:db8::1"], "192.0.2.1 2001:db8::1"),
        ("searchdomain", "lab_1.example.org,example.org", "lab_1.example.org example.org"),
        ("cloud_init_user", " first.last ", "first.last"),
        ("cloud_init_user", "Admin", "Admin"),
        ("cloud_init_user", "svc-build$", "svc-build$"),
        ("tags", "CI, Night", ["ci", "night"]),
        ("ssh_public_keys", f"{K}\n{L}", [K, L]),
        ("name", "a" * 63 + "." + "b" * 63 + ".example.org", "a" * 63 + "." + "b" * 63 + ".example.org"),
    ],
)
def test_options_as_people_write_them(context: Any, option: str, value: Any, expected: Any) -> None:
    assert getattr(wanted.make_spec(context(), {option: value}), option) == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "a" * 64),
        ("name", ".".join(["a" * 60] * 5)),
        ("cloud_init_user", ".first"),
        ("cloud_init_user", "a b"),
        ("cloud_init_user", "a$b"),
        ("cloud_init_user", "a" * 32 + "$"),
        ("tags", "-x"),
        ("vlan_tag", 4095),
        ("vlan_tag", 0),
        ("second_vlan_tag", 5000),
        ("cpu_type", "host,args=-x y"),
        ("cloud_init_vendor_data", "/etc/passwd"),
        ("cloud_init_password", 12345),
        ("cloud_init_password", True),
        ("cloud_init_password", ""),
        ("cloud_init_password", "a\nb"),
        ("second_ip_config", "ip=dhcp\nx"),
        ("second_bridge", "a,b"),
    ],
)
def test_options_that_are_refused_by_name(context: Any, option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"^{option}: ") as caught:
        wanted.make_spec(context(), {option: value})
    assert option != "cloud_init_password" or "12345" not in caught.value.message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("~/.ssh/id_ed25519.pub", "looks like the path of a file"),
        ("/root/keys", "looks like the path of a file"),
        ([K, "https://example.org/me.keys"], "number 2 looks like the path of a file or a URL"),
        (f"{K} {K}", "line number 1 holds several keys"),
        (f"{K}, {L}", "line number 1 holds several keys"),
        ({"key": K}, "that mapping is not valid"),
    ],
)
def test_what_is_no_list_of_keys_is_told_what_it_looks_like(value: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match="ssh_public_keys: .*" + text):
        patterns.split_keys("ssh_public_keys", value)


def test_a_byte_order_mark_before_a_key_is_dropped_and_a_wrapped_key_is_no_path() -> None:
    assert patterns.split_keys("ssh_public_keys", f"\ufeff{K}\r\n") == [K]
    assert patterns.split_keys("ssh_public_keys", "ssh-rsa\nAAAAB3/x") == ["ssh-rsa", "AAAAB3/x"]


def test_tags_are_no_mapping() -> None:
    with pytest.raises(InvalidInput, match="tags: that mapping is not valid"):
        patterns.split_tags({"ci": True})


@pytest.mark.parametrize(
    "value",
    [
        "ip=dhcp",
        "ip=dhcp,ip6=auto",
        "ip6=dhcp",
        "ip=192.0.2.4/24",
        "gw=192.0.2.1,ip=192.0.2.4/32",
        "ip=192.0.2.4/24,gw=192.0.2.1,ip6=2001:db8::4/64,gw6=fe80::1",
        None,
    ],
)
def test_an_ip_config_that_proxmox_takes(value: str | None) -> None:
    create.Spec(ip_config=value, second_bridge="vmbr1", second_ip_config=value).check()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("dhcp", "'dhcp' is not one of ip=, gw=, ip6=, gw6="),
        ("192.0.2.4/24", "is not one of"),
        ("IP=dhcp", "'IP=dhcp' is not one of"),
        ("ip=dhcp,ip=dhcp", "is not one of"),
        ("ip=192.0.2.300/24", "'ip=192.0.2.300/24' is no address with its prefix length"),
        ("ip=192.0.2.4", "'ip=192.0.2.4' is no address with its prefix length"),
        ("ip=192.0.2.4/33", "no address with its prefix length"),
        ("ip=192.0.2.4/255.255.255.0", "no address with its prefix length"),
        ("ip=2001:db8::4/64", "no address with its prefix length"),
        ("ip=auto", "no address with its prefix length"),
        ("ip=192.0.2.4/24,gw=192.0.2.1/24", "'gw=192.0.2.1/24' is no address"),
        ("ip6=192.0.2.4/24", "no address with its prefix length"),
        ("gw=192.0.2.1", "'gw' needs a fixed address in 'ip'"),
        ("ip=dhcp,gw=192.0.2.1", "'gw' needs a fixed address in 'ip'"),
        ("ip6=auto,gw6=fe80::1", "'gw6' needs a fixed address in 'ip6'"),
    ],
)
def test_an_ip_config_that_proxmox_would_refuse_after_the_clone(value: str, text: str) -> None:
    for option in ("ip_config", "second_ip_config"):
        with pytest.raises(InvalidInput) as caught:
            create.Spec(second_bridge="vmbr1", **{option: value}).check()
        assert caught.value.message.startswith(f"{option}: '{value}' is not valid: ") and text in caught.value.message
        assert "Valid: such as ip=dhcp" in caught.value.message


def test_blanks_after_the_commas_of_an_ip_config_are_dropped() -> None:
    value = "ip=192.0.2.4/24, gw=192.0.2.1"
    assert wanted.normalise({"ip_config": value})["ip_config"] == "ip=192.0.2.4/24,gw=192.0.2.1"


@pytest.mark.parametrize("value", ["dead", "1.2.3", "192.0.2.300", "192.0.2.53 2001:db8"])
def test_a_name_server_is_an_address(value: str) -> None:
    with pytest.raises(InvalidInput, match=r"nameserver: '.*' is no IP address\. Valid: IP addresses"):
        create.Spec(nameserver=value).check()
    create.Spec(nameserver="192.0.2.53 2001:db8::53").check()


@pytest.mark.parametrize(
    "value",
    [
        '["ci", "night"]',
        ' [ "ci" ,"night" ]\r\n',
        "[ci, night]",
        "['ci', 'night']",
        "- ci\n- night\n",
        "# mine\r\n- 'ci'\r\n- \"night\"\r\n",
        "* ci\n\u2022 night",
        "ci,\u00a0night",
        "ci\tnight",
        "'ci', \"night\"",
        "ci  # the first\nnight # ci too",
        "\ufeffci\u200b\nnight\nCI,ci\n",
        ["ci", "night", "ci"],
        # As Ansible hands over the text of a list: split at its commas, or as Python writes a list within a list.
        ['["ci"', ' "night"]'],
        ["['ci', 'night']"],
    ],
)
def test_a_list_in_whatever_form_it_was_pasted(value: Any) -> None:
    assert patterns.split_tags(value) == ["ci", "night"]


@pytest.mark.parametrize("value", ["[]", " [ ] ", [], "", "# nothing", "\u00a0\r\n"])
def test_nothing_in_whatever_form_it_was_pasted(value: Any) -> None:
    assert patterns.split_words(value) == patterns.split_keys("ssh_public_keys", value) == []


def test_what_is_no_list_of_texts_is_refused_and_not_guessed() -> None:
    for value in ('[["ci"]]', '[{"ci": 1}]', "[" * 5000 + "]" * 5000):
        with pytest.raises(InvalidInput):
            for tag in patterns.split_tags(value):
                patterns.check_value("tags", tag, patterns.TAG)


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([K, L]),
        f"- {K}\n- {L}\n",
        f"'{K}'\n'{L}'",
        f"\ufeff{K}\r\n\r\n{L}\r\n{K}",
        K.replace(" ", "\u00a0") + "\n" + L,
        [K, L, K],
    ],
)
def test_keys_in_whatever_form_they_were_pasted(value: Any) -> None:
    assert patterns.split_keys("ssh_public_keys", value) == [K, L]


def test_a_key_in_the_format_of_putty_is_told_how_to_become_one_line() -> None:
    with pytest.raises(InvalidInput, match="ssh-keygen -i -f FILE"):
        patterns.split_keys("ssh_public_keys", "---- BEGIN SSH2 PUBLIC KEY ----\nAAAA\n---- END SSH2 PUBLIC KEY ----\n")
