# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The double of Proxmox VE: tags, and those that a cluster restricts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.double_api import TOKEN, refusal_of
from support.proxmox_double import ProxmoxDouble


def test_tags_are_lowered_and_sorted_or_refused(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101)
    api.nodes("pve1").qemu(101).config.put(tags="zeta,Alpha")
    assert api.nodes("pve1").qemu(101).config.get()["tags"] == "alpha;zeta"
    pve.tag_access, pve.tag_allow_list = "list", {"x"}
    refused = refusal_of(lambda: api.nodes("pve1").qemu(101).config.put(tags="alpha;zeta;y"))
    assert refused[0] == 403 and "(/, Sys.Modify for modifying tag 'y')" in refused[1]
    # Only what changes counts: alpha and zeta stay.
    api.nodes("pve1").qemu(101).config.put(tags="alpha;x;zeta")
    assert refusal_of(lambda: api.nodes("pve1").qemu(101).config.put(delete="tags"))[0] == 403


@pytest.mark.parametrize(
    ("policy", "registered", "refused", "taken"),
    [
        (("none", set()), set(), ["agentlab", ""], []),
        (("list", {"agentlab"}), set(), ["free1", "AgentLab;old"], ["agentlab;old"]),
        (("existing", set()), set(), ["new;old"], ["seen;old"]),
        (("free", set()), {"reserved1"}, ["reserved1;old"], ["free1;old"]),
        (("list", {"reserved1"}), {"reserved1"}, ["reserved1;old"], ["old"]),
    ],
)
def test_tags_that_the_cluster_restricts_are_refused(
    api: Any,
    pve: ProxmoxDouble,
    policy: tuple[str, set[str]],
    registered: set[str],
    refused: list[str],
    taken: list[str],
) -> None:
    (pve.tag_access, pve.tag_allow_list), pve.registered_tags = policy, registered
    pve.add_guest(101, config={"tags": "old"})
    pve.add_guest(102, config={"tags": "seen"})
    config = api.nodes("pve1").qemu(101).config
    for tags in refused:
        status, text = refusal_of(
            lambda wanted=tags: config.put(
                **({"tags": wanted} if wanted else {"delete": "tags"}), description="beside it"
            )
        )
        assert status == 403 and re.search(r"Permission check failed \(/, Sys.Modify for modifying tag '\w+'\)", text)
    assert config.get().get("description") is None
    config.put(tags="old", description="beside it")
    for tags in taken:
        config.put(tags=tags)
    pve.grant(TOKEN, "/", "Sys.Modify", "VM.Config.Options", "VM.Audit")
    config.put(tags="free1;reserved1")


def test_allowed_tags_are_told_beforehand(api: Any, pve: ProxmoxDouble) -> None:
    pve.add_guest(101, config={"tags": "seen"})
    assert api.cluster.options.get()["allowed-tags"] == ["seen"]
    pve.tag_access, pve.tag_allow_list, pve.registered_tags = "list", {"a", "b"}, {"b"}
    told = api.cluster.options.get()
    assert (
        told["allowed-tags"] == ["a"]
        and told["user-tag-access"]["user-allow"] == "list"
        and told["registered-tags"] == ["b"]
    )
    pve.tag_access = "none"
    pve.grant(TOKEN, "/vms", "VM.Audit")
    assert api.cluster.options.get() == {"allowed-tags": []}
