# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One kind of value is one thing: modules, profiles, API and command line take and refuse the same values.

Each row goes through the code of each interface, in one process for all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.daemon import in_daemon

# Option -> the key of a profile that fills it in; values that are taken, and what becomes of them; values that are not.
KINDS: dict[str, tuple[str | None, list[tuple[Any, Any]], list[Any]]] = {
    "vmid": (
        None,
        [(100, 100), (1000, 1000), (999999999, 999999999)],
        [99, 1000000000, -1, 0, "abc", "١٠٠٠", "9" * 5000, True, 1000.5],
    ),
    "name": (None, [("a.b-1", "a.b-1"), (" a1 ", "a1")], ["a_b", "-a", "a" * 64, "a b", "a\nb", "ä", ""]),
    "node": ("node", [("pve1", "pve1"), (" pve1 ", "pve1"), ("auto", "auto")], ["pve 1", "-x", "pve1\nx", "n/x", ""]),
    "storage": ("storage", [("local-lvm", "local-lvm")], ["--purge", "a b", "a/b", "x" * 101]),
    "bridge": ("network.bridge", [("vmbr0", "vmbr0")], ["vmbr0,tag=1", "a b"]),
    "disk_size": (
        "resources.disk_size",
        [("20G", "20G"), ("+10G", "+10G"), ("20 GB", "20G"), ("1.5tib", "1.5T")],
        ["20", "20X", "G", "-5G", "20G;", "99999999G"],
    ),
    "tags": (
        "tags",
        [("a,B", ["a", "b"]), (["night", "ci"], ["night", "ci"]), ('["x", "y"]', ["x", "y"])],
        ["ä", "-x", ["a/b"], {"a": 1}],
    ),
    "cores": ("resources.cores", [(1, 1), (512, 512)], [0, 513, -1, "two", True]),
    "memory": ("resources.memory", [(16, 16)], [15, 16777217, "2G"]),
    "vlan_tag": ("network.vlan_tag", [(1, 1), (4094, 4094)], [0, 4095]),
    "ip_config": (
        "cloud_init.ip_config",
        [("ip=dhcp", "ip=dhcp"), ("ip=192.0.2.9/24, gw=192.0.2.1", "ip=192.0.2.9/24,gw=192.0.2.1")],
        ["dhcp", "ip=192.0.2.9", "ip=dhcp,gw=192.0.2.1", "ip=300.0.0.1/24", "ip=dhcp,ip=dhcp"],
    ),
    "nameserver": (
        "cloud_init.nameserver",
        [("192.0.2.1, 192.0.2.2", "192.0.2.1 192.0.2.2"), ("2001:db8::1", "2001:db8::1")],
        ["dns1", "192.0.2.300", "192.0.2"],
    ),
    "searchdomain": ("cloud_init.searchdomain", [("a.example, b.example", "a.example b.example")], ["a;b\\", "!"]),
    "pool": ("pool", [("lab/ci", "lab/ci")], ["--purge", "a/b/c/d", "a b"]),
}
CODE = """
import io, json, sys, types
from pathlib import Path
from agentlab_core import config, profiles
from agentlab_core.errors import AgentlabError
from agentlab_core.sandboxes import wanted
from agentlabd.http.creation import CREATION, read_creation_options
from agentlabd.http.fields import check_body
from agentlab_cli.sandbox import new

kinds, folder = json.loads(Path(FILE).read_text()), Path(FILE).parent
ctx = types.SimpleNamespace(config=config.load({"profiles_dir": str(folder / "profiles")}, {}))
(folder / "profiles").mkdir()


def by_module(option, value):
    return getattr(wanted.make_spec(ctx, {option: value}), option)


def by_profile(option, key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    (folder / "profiles/p.yaml").write_text(json.dumps({"name": "p", **value}))
    return getattr(wanted.make_spec(ctx, {"profile": "p"}), option)


def by_api(option, value):
    return getattr(wanted.make_spec(ctx, read_creation_options(check_body(CREATION, {option: value}))), option)


def by_command_line(option, value):
    flag = {"vlan_tag": "--vlan-tag", "tags": "--tag"}.get(option, "--" + option.replace("_", "-"))
    flag = next(o for p in new.params if p.name == option for o in p.opts if o.startswith("--"))
    given = new.make_context("new", [f"{flag}={value}"], resilient_parsing=False).params[option]
    return by_api(option, list(given) if isinstance(given, tuple) else given)


def outcome(work, *args):
    try:
        return work(*args)
    except AgentlabError as error:
        return "refused: " + error.message
    except Exception as error:
        if type(error).__module__.startswith("click"):
            return "refused: " + str(error.format_message())
        return f"crashed: {type(error).__name__}: {error}"


rows = []
for option, (key, good, bad) in kinds.items():
    for value in [*(value for value, _result in good), *bad]:
        ways = {"module": outcome(by_module, option, value), "api": outcome(by_api, option, value)}
        if key:
            ways["profile"] = outcome(by_profile, option, key, value)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            ways["command line"] = outcome(by_command_line, option, value)
        rows.append([option, value, ways])
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what each interface made of each value, by option and value."""
    file = tmp_path_factory.mktemp("kinds") / "kinds.json"
    file.write_text(json.dumps(KINDS))
    answers = in_daemon(f"FILE = {str(Path(file))!r}\n{CODE}")
    return {f"{option} {json.dumps(value)}": ways for option, value, ways in answers}


@pytest.mark.parametrize("option", KINDS)
def test_every_interface_takes_the_same_values(rows: dict[str, dict[str, Any]], option: str) -> None:
    key, good, _bad = KINDS[option]
    for value, result in good:
        ways = rows[f"{option} {json.dumps(value)}"]
        assert ways == dict.fromkeys(ways, result), value
        assert {"module", "api", *(["profile"] if key else [])} <= set(ways)


@pytest.mark.parametrize("option", KINDS)
def test_every_interface_refuses_the_same_values_by_name(rows: dict[str, dict[str, Any]], option: str) -> None:
    for value in KINDS[option][2]:
        for way, answer in rows[f"{option} {json.dumps(value)}"].items():
            assert str(answer).startswith("refused: "), (way, value, answer)
            name = option.split("_")[-1] if way == "profile" else option.replace("_", "-")
            assert name in str(answer).replace("_", "-"), (way, value, answer)
