# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""YAML that somebody else wrote.

Bounded in time and size, no key twice, no line quoted; and user data as cloud-init takes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import config, profiles, rules, safe_yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.errors import ConfigError, InvalidInput
from ansible_collections.agentlab.proxmox.plugins.module_utils._core.guest import cloud_init

# Bounded: seconds on a loaded machine, where each of these took minutes, or all of the memory.
BOUND = 20.0


def merge_bomb(levels: int = 9, width: int = 9) -> str:
    """Each level merges the one before it so many times."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{level}: &a{level}\n  <<: [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


def alias_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    return "\n".join(lines) + "\n"


HOSTILE = {
    "merge keys": merge_bomb(),
    "aliases": alias_bomb(),
    "a flat list": "a: [" + "x," * 250000 + "]\n",
    "a long list": "a:\n" + "- b\n" * 120000,
    "deep brackets": "a: " + "[" * 100000,
    "deep dashes": "a:\n  " + "- " * 100000,
    "a number of base 60": "a: " + ":".join(["59"] * 100000) + "\n",
    "a long number": "a: " + "9" * 400000 + "\n",
    "itself": "a: &a [*a]\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_user_data_is_refused_soon(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="^cloud_init_user_data: ") as caught:
        cloud_init.check_data("#cloud-config\n" + HOSTILE[name])
    assert time.monotonic() - began < BOUND and "x, x" not in caught.value.message


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: config.read_file(str(path)),
        lambda path: profiles.read(str(path)),
        lambda path: rules.load(str(path)),
    ],
    ids=["configuration", "profile", "rules"],
)
def test_a_hostile_file_is_refused_soon(tmp_path: Path, read: Callable[[Path], Any], name: str) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(HOSTILE[name])
    began = time.monotonic()
    with pytest.raises(ConfigError, match=str(path)):
        read(path)
    assert time.monotonic() - began < BOUND


READERS: dict[str, Callable[[Path], Any]] = {
    "configuration": lambda path: config.read_file(str(path)),
    "profile": lambda path: profiles.read(str(path)),
    "rules": lambda path: rules.load(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_a_device_and_a_large_file_are_refused_at_once(tmp_path: Path, reader: str) -> None:
    fifo, large = tmp_path / "fifo.yaml", tmp_path / "large.yaml"
    os.mkfifo(fifo)
    large.write_text("# x\n" * 5_000_000)
    began = time.monotonic()
    for path, why in (
        (fifo, "is not a regular file"),
        (large, "is larger than 256 KiB"),
        (Path("/dev/zero"), "is not a regular file"),
    ):
        with pytest.raises(ConfigError, match=why):
            READERS[reader](path)
    assert time.monotonic() - began < BOUND


@pytest.mark.parametrize(
    ("reader", "text", "line"),
    [
        ("configuration", "node: a\ntemplate: b\nnode: c\n", 3),
        ("profile", "tags: [a]\ntags: [b]\n", 2),
        ("profile", "resources: {cores: 1, cores: 2}\n", 1),
        ("rules", "auto_cleanup: {enabled: true}\nauto_cleanup: {enabled: false}\n", 2),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, reader: str, text: str, line: int) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="twice") as caught:
        READERS[reader](path)
    assert f"line {line}" in caught.value.message


SECRET = "hunter2-in-the-wrong-file"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text",
    [
        f"root:{SECRET}:19000:0:99999\nbin:*:1::\n",
        f"{SECRET}\n",
        f"{SECRET}$x: 1\n",
        f"a: [\n{SECRET}\n",
        f"- {SECRET}\n",
        f"[section]\npassword = {SECRET}\n",
        f"? [{SECRET}]\n: 1\n",
        f"'{SECRET} {SECRET}': 2\n",
        f"a: !{SECRET} x\n",
    ],
)
def test_what_is_in_a_wrong_file_is_never_quoted(tmp_path: Path, reader: str, text: str) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        READERS[reader](path)
    assert SECRET not in str(caught.value.as_dict())


def test_anchors_and_merge_keys_of_an_ordinary_file_work() -> None:
    found = safe_yaml.load(
        "base: &base {cores: 2, memory: 1024}\nbig:\n  <<: *base\n  memory: 4096\nboth: {<<: [*base, {disk: 1}], "
        "cores: 8}\n"
    )
    assert found["big"] == {"cores": 2, "memory": 4096} and found["both"] == {"cores": 8, "memory": 1024, "disk": 1}
    assert found.lines == {"base": 1, "big": 2, "both": 5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_password", "012345"),
        ("api_token_secret", "12:30"),
        ("api_password", "1_000"),
        ("api_password", "yes"),
        ("node", "0x10"),
        ("template", "010"),
        ("storage", "on"),
        ("api_password", "2024-01-01"),
    ],
)
def test_a_value_that_yaml_reads_as_something_else_is_asked_for_in_quotes(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{key}: {value}\n")
    if value == "2024-01-01":
        # A date prints as it was written.
        assert str(config.read_file(str(path))[key]) == value
        return
    with pytest.raises(ConfigError, match=f"{key}: YAML reads .* put it in quotes") as caught:
        config.read_file(str(path))
    assert key == "node" or key in ("template", "storage") or value not in caught.value.message
    path.write_text(f"{key}: '{value}'\n")
    assert config.read_file(str(path))[key] == value


@pytest.mark.parametrize(
    "text", ["template: 010", "tags: [1_000]", "tags: [yes]", "cloud_init: {user: 0x1f}", "tags: [a, 1.10]"]
)
def test_a_profile_that_yaml_reads_as_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="in quotes"):
        profiles.read(str(path))
    path.write_text("template: 9000\ntags: [1234, a]\n")
    assert profiles.read(str(path)).values == {"template": "9000", "tags": ["1234", "a"]}


# ---- user data ----


@pytest.mark.parametrize(
    "data",
    [
        "#cloud-config\npackages: [git]\n",
        "\n\n#cloud-config\npackages: [git]\n",
        "  \n#Cloud-Config\nusers: []\n",
        "#CLOUD-CONFIG\n",
        "#!/bin/sh\n",
        "\r\n#!/bin/sh\r\n",
        "#include\nhttps://192.0.2.1/x\n",
        "#Include-once\nhttps://192.0.2.1/x\n",
        "## Template: jinja\n#cloud-config\n{% raw %}\n",
        "mime-version: 1.0\ncontent-type: multipart/mixed; boundary=x\n\n--x--\n",
        "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n--x--\n",
        "From nobody Mon Sep 17 00:00:00 2001\nContent-Type: text/plain\nmime-version: 1.0\n\nx\n",
        "#cloud-config-archive\n- {type: text/x-shellscript, content: x}\n",
        '#cloud-config-jsonp\n[{"op": "add", "path": "/a", "value": 1}]\n',
        "#cloud-config\nwrite_files:\n- path: /a\n  encoding: b64\n  content: " + "QUJD" * 100000 + "\n",
        "#cloud-config\nbase: &b {a: 1}\nx: {<<: *b}\n",
        "#part-handler\n",
        "#cloud-boothook\n#!/bin/sh\n",
    ],
)
def test_user_data_that_cloud_init_takes(data: str) -> None:
    cloud_init.check_data(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("\ufeff#cloud-config\n", "byte order mark"),
        ("packages: [git]\n", "first line"),
        ("", "first line"),
        ("# cloud-config\n", "first line"),
        ("#cloud-config\n- a\n", "must be followed by a mapping"),
        ("\n#Cloud-Config\nx\n", "must be followed by a mapping"),
        ("#cloud-config\na: [\n", "not valid YAML in line"),
        ("#cloud-config\na: 1\n---\nb: 2\n", "more than one document"),
        ("#cloud-config\n? [a]\n: 1\n", "as a key"),
        ("#cloud-config\na: !foo x\n", "cannot be read"),
        ("#cloud-config\na: *nowhere\n", "alias"),
    ],
)
def test_user_data_that_cloud_init_would_not_understand_is_refused(data: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=f"^cloud_init_user_data: .*{why}"):
        cloud_init.check_data(data)


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\ufffe"])
@pytest.mark.parametrize("data", ["#cloud-config\na: {}\n", "#cloud-config\n" + "# x\n" * 9000 + "{}a: 1\n"])
def test_user_data_with_a_character_that_yaml_does_not_have(data: str, character: str) -> None:
    with pytest.raises(InvalidInput, match="cloud_init_user_data: not valid YAML"):
        cloud_init.check_data(data.format(character))
