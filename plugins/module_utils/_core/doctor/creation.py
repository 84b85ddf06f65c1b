# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the settings that would make every creation fail: nodes, pools, snippets and tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .. import profiles
from ..config import DEFAULTS
from ..errors import AgentlabError, ApiError, InvalidInput
from ..guest import cloud_init
from ..nodes import AUTO
from ..proxmox.identity import OUR_TAG
from . import template
from .examination import Examination, parse_properties
from .findings import OK, PROBLEM, UNKNOWN, WARNING, Finding, shorten_list


def check_creation(exam: Examination) -> Iterable[Finding]:
    """Check the nodes, pools, snippets and tags that the configuration and the profiles name."""
    count = 0
    for check in (_check_nodes, _check_pools, _check_snippets, _check_tags):
        for finding in check(exam):
            count += 1
            yield finding
    if not count and exam.nodes:
        yield Finding("creation", OK, "node, pool, tags and snippets can be used as configured")
    elif not count:
        yield Finding(
            "creation",
            UNKNOWN,
            "the cluster's nodes could not be read, so node and snippets were not checked",
            "see the finding quorum",
        )


def _list_named_values(exam: Examination, option: str) -> dict[str, str]:
    """Return the values that configuration and profiles give an option, each with the place that gives it."""
    named = {
        str(profile.values[option]): f"{option} of profile {profile.name}"
        for profile in _load_profiles(exam)
        if profile.values.get(option)
    }
    if getattr(exam.config, option) is not None:
        named[getattr(exam.config, option)] = option
    return named


def _check_nodes(exam: Examination) -> Iterable[Finding]:
    for node, place in _list_named_values(exam, "node").items() if exam.nodes else ():
        if node == AUTO:
            continue
        if node not in exam.nodes:
            yield Finding(
                "creation",
                PROBLEM,
                f"{place}: {node!r} is not a node of this cluster, so no sandbox can be created with it."
                f" Nodes: {', '.join(sorted(exam.nodes))}",
                f"correct {place}, or leave it out (names of nodes are case-sensitive)",
            )
        elif not exam.nodes[node]:
            yield Finding(
                "creation",
                PROBLEM,
                f"{place}: {node!r} is offline, so no sandbox can be created there",
                "bring the node back, or name another one",
            )


def _check_pools(exam: Examination) -> Iterable[Finding]:
    for pool, place in _list_named_values(exam, "pool").items():
        exists = _pool_exists(exam, pool)
        if pool == exam.config.pool:
            exam.standing.pool = exists
        if exists is False:
            yield Finding(
                "creation",
                PROBLEM,
                f"{place}: {pool!r} does not exist, so no sandbox can be created with it",
                f"pveum pool add {pool}, or correct {place}",
            )


def _pool_exists(exam: Examination, pool: str) -> bool | None:
    """Return whether the pool exists, or None if these credentials cannot tell: that needs Pool.Audit on its path."""
    if any(row.get("poolid") == pool for row in exam.context.client.get_list("pools")):
        return True
    # An ACL entry on the path proves nothing: Proxmox VE accepts an entry for a pool that does not exist.
    return False if exam.context.cluster.has_privilege(f"/pool/{pool}", "Pool.Audit") else None


def read_acl_entries(exam: Examination) -> list[dict[str, Any]]:
    """Return the ACL entries that these credentials may see; all of them with Sys.Audit on /access."""
    if exam.standing.entries is None:
        try:
            entries = exam.context.client.get_list("access/acl")
        except ApiError:
            return []
        if exam.config.proxmox.is_root or entries:
            exam.standing.entries = entries
        return entries
    return exam.standing.entries


def _check_snippets(exam: Examination) -> Iterable[Finding]:
    """Check the storage for user data. Proxmox VE does not prepare a storage for snippets by itself."""
    node = exam.config.node if exam.nodes.get(str(exam.config.node)) else template.find_home_node(exam)
    if node is None:
        return
    storage = exam.config.snippets_storage
    try:
        cloud_init.check_storage(exam.context, node)
    except InvalidInput as error:
        # If the storage is the default one, its lack is a problem only where user data is used.
        needed = storage != DEFAULTS["snippets_storage"] or is_user_data_used(exam)
        yield Finding(
            "creation",
            PROBLEM if needed else OK,
            f"{error.message}. Until then cloud_init_user_data is refused",
            f"follow the message; pvesm status --storage {storage} shows the storage of a node",
            {"snippets_storage": storage},
        )


def is_user_data_used(exam: Examination) -> bool:
    return any(profile.values.get("cloud_init_user_data") for profile in _load_profiles(exam)) or any(
        sandbox.snippet for sandbox in exam.context.records.find_all()
    )


def _load_profiles(exam: Examination) -> list[profiles.Profile]:
    try:
        return list(profiles.load_all(exam.config.profiles_dir).values())
    except (AgentlabError, OSError):
        # A broken file is reported where the profile is used, and by the daemon.
        return []


def _check_tags(exam: Examination) -> Iterable[Finding]:
    """Compare our tags with the cluster's policy: GET /cluster/options lists the tags that this login may set."""
    options = read_cluster_options(exam)
    if exam.config.proxmox.is_root or "allowed-tags" not in options:
        return
    allowed = _split_list(options["allowed-tags"])
    registered = _split_list(options.get("registered-tags"))
    # Without Sys.Audit on / Proxmox VE leaves the policy out; then assume the default.
    policy = str(parse_properties(options.get("user-tag-access")).get("user-allow", "free"))
    tags = sorted(
        {OUR_TAG, *(str(tag).lower() for profile in _load_profiles(exam) for tag in profile.values.get("tags") or [])}
    )
    refused = [tag for tag in tags if tag not in allowed and (policy != "free" or tag in registered)]
    if not refused:
        return
    mend = []
    if policy != "free":
        listed = ";".join(dict.fromkeys((*allowed, *refused)))
        mend.append(f"--user-tag-access 'user-allow=list,user-allow-list={listed}'")
    if set(refused) & set(registered):
        remaining = ";".join(tag for tag in registered if tag not in refused)
        # Proxmox VE refuses an empty list (400, "value does not match the regex pattern").
        mend.append(f"--registered-tags '{remaining}'" if remaining else "--delete registered-tags")
    yield Finding(
        "creation",
        WARNING,
        f"this cluster refuses the tags {shorten_list(refused)} to a login without Sys.Modify on / "
        f"(user-allow is {policy}{', registered-tags is ' + ';'.join(registered) if registered else ''})",
        f"pvesh set /cluster/options {' '.join(mend)}, as root on a node",
        {
            "refused": refused,
            "user_allow": policy,
            "allowed_tags": allowed[:50],
            "registered_tags": registered[:50],
        },
    )


def read_cluster_options(exam: Examination) -> dict[str, Any]:
    try:
        return exam.context.client.get_dict("cluster/options")
    except ApiError:
        return {}


def _split_list(value: Any) -> list[str]:
    """Return the items of a list, or of a text with semicolons. Proxmox VE answers either."""
    return [
        str(item).lower()
        for item in (value if isinstance(value, list) else re.split(r"[;, ]+", str(value or "")))
        if item
    ]
