# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sandboxes as hosts, by the real inventory plugin of community.proxmox, with the file of docs/inventory.md as it
stands there.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import pages
from support.play import REPO, run_command

PAGE = (pages.ROOT / "docs/inventory.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def peers() -> str:
    """The folder that has community.proxmox in it."""
    return subprocess.run([str(REPO / "scripts/peer.sh")], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def inventory(env: dict[str, str], peers: str, tmp_path: Path, server: Any) -> Any:
    """inventory(words...): what ansible-inventory says with the page's file; only address and token are those of the
    fake Proxmox.
    """
    text = (
        PAGE.split("<!-- plugin -->")[1]
        .split("<!-- /plugin -->")[0]
        .strip()
        .removeprefix("```yaml\n")
        .removesuffix("```")
    )
    host, port = env["PROXMOX_HOST"], env["PROXMOX_PORT"]
    user, _sign, token = env["PROXMOX_TOKEN_ID"].partition("!")
    for shown, real in (
        ("https://pve1.example.net:8006", f"https://{host}:{port}"),
        ("agentlab@pve", user),
        ("token_id: ansible", f"token_id: {token}"),
    ):
        assert shown in text
        text = text.replace(shown, real)
    file = tmp_path / "agentlab.proxmox.yml"
    file.write_text(text, encoding="utf-8")
    env = {
        **env,
        "ANSIBLE_COLLECTIONS_PATH": peers,
        "REQUESTS_CA_BUNDLE": env["PROXMOX_CA_PATH"],
        "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "true",
    }

    def ask(*words: str) -> Any:
        done = run_command(["ansible-inventory", "-i", str(file), *words], env, tmp_path)
        assert done.rc == 0 and not done.warnings, done.output
        return done.stdout

    return ask


def plain(variables: dict[str, Any]) -> dict[str, Any]:
    """Without the mark of text that comes from elsewhere, and is never a template."""
    return {
        name: value["__ansible_unsafe"] if isinstance(value, dict) and "__ansible_unsafe" in value else value
        for name, value in variables.items()
    }


def test_sandboxes_are_hosts_and_nothing_else_is(inventory: Any, context: Any, server: Any) -> None:
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.sandboxes import create
    from ansible_collections.agentlab.proxmox.plugins.module_utils._core.vm import power

    server.pve.agent_default = True
    ctx = context()
    first = create.run(ctx, create.Spec(name="one", ttl=3600, tags=["ci"], wait_for_ip=True)).sandbox
    second = create.run(ctx, create.Spec(name="two", ttl=3600)).sandbox
    power.run(ctx, ctx.records.get(second.uuid), "stop")
    server.pve.make_foreign(700)
    # A container bridge that sorts and comes before the NIC, and an IPv6 address before IPv4.
    agent = server.pve.vm(first.vmid).agent["interfaces"]
    agent.insert(
        0,
        {
            "name": "docker0",
            "hardware-address": "02:42:00:00:00:01",
            "ip-addresses": [{"ip-address": "172.17.0.1", "ip-address-type": "ipv4", "prefix": 16}],
        },
    )
    agent[-1]["ip-addresses"].insert(0, {"ip-address": "2001:db8::1", "ip-address-type": "ipv6", "prefix": 64})
    found = json.loads(inventory("--list"))
    assert set(found["sandboxes"]["hosts"]) == {"one", "two"} == set(found["_meta"]["hostvars"])
    assert found["tag_ci"]["hosts"] == ["one"] and set(found["tag_agentlab"]["hosts"]) == {"one", "two"}
    assert found["proxmox_all_running"]["hosts"] == ["one"] and found["proxmox_all_stopped"]["hosts"] == ["two"]
    one, two = plain(found["_meta"]["hostvars"]["one"]), plain(found["_meta"]["hostvars"]["two"])
    assert (
        one["ansible_host"] == ctx.records.get(first.uuid).ip
        and one["proxmox_vmid"] == first.vmid
        and one["ansible_user"] == "debian"
    )
    # A VM that does not run has no guest agent to ask.
    assert two["ansible_host"] == "two"


def test_the_file_holds_no_secret() -> None:
    text = PAGE.split("<!-- plugin -->")[1].split("<!-- /plugin -->")[0]
    options = yaml.safe_load(text.strip().removeprefix("```yaml\n").removesuffix("```"))
    assert not {"password", "token_secret"} & set(options)
