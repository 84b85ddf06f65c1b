# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Create sandboxes for clients: the options, the operator's limits, and the list of profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentlab_core import patterns, profiles
from agentlab_core.context import Context
from agentlab_core.errors import AgentlabError, InvalidInput, ProxmoxError
from agentlab_core.sandboxes import create, wanted
from agentlab_core.vm import address

from . import upstream
from .answers import REMEDIES, Answer, answer_item
from .fields import Field
from .route import Call


def split_tags(_name: str, value: Any) -> list[str]:
    return patterns.split_tags(value)


def _make_number_field(option: str, text: str) -> Field:
    """Return the field of a whole-number option, with the bounds that all interfaces share."""
    low, high = patterns.RANGES[option]
    return Field("integer", text, low=low, high=high)


LIFETIME = {
    "ttl_minutes": Field("integer", "lease in minutes", low=1, high=5256000),
    "ttl": Field("duration", "lease as minutes or a duration such as 2h"),
}


CREATION: dict[str, Field] = {
    "name": Field("string", "name, unique among live sandboxes; made up when left out", longest=253),
    "vmid": Field(
        "integer", "VMID; from the configured range when left out", low=patterns.MIN_VMID, high=patterns.MAX_VMID
    ),
    "profile": Field("string", "profile it is made from", longest=100),
    **LIFETIME,
    "keepalive": Field("boolean", "renew its lease by itself when it is over, up to max_lifetime"),
    "protected": Field("boolean", "refuse to destroy it"),
    "template": Field("string", "template to clone, by VMID or name", longest=100, number=True),
    "node": Field("string", "node it shall run on, or auto to have the one chosen that suits best", longest=100),
    "full_clone": Field("boolean", "full instead of linked clone"),
    "storage": Field("string", "storage of a full clone", longest=100),
    "pool": Field("string", "pool it belongs to", longest=100),
    "cores": _make_number_field("cores", "CPU cores"),
    "cpu_type": Field("string", "CPU type, such as host or x86-64-v2-AES", longest=200),
    "memory": _make_number_field("memory", "memory in MiB"),
    "disk_size": Field("string", "size of the boot disk, 20G or +10G", longest=20),
    "bridge": Field("string", "bridge of the first network card", longest=100),
    "network_model": Field("string", "model of the first network card", valid=patterns.MODELS),
    "vlan_tag": _make_number_field("vlan_tag", "VLAN of the first network card"),
    "second_bridge": Field(
        "string", "bridge of the second network card, which is made where the template has none", longest=100
    ),
    "second_vlan_tag": _make_number_field("second_vlan_tag", "VLAN of the second network card"),
    "second_ip_config": Field("string", "address of the second network card, as ip_config", longest=200),
    "firewall": Field("boolean", "firewall of the first network card"),
    "firewall_group": Field("string", "security group of its firewall", longest=100),
    "cloud_init_user": Field("string", "user that cloud-init makes", longest=100),
    "cloud_init_password": Field(
        "string", "password of that user; Proxmox VE keeps its hash", longest=1000, secret=True
    ),
    "cloud_init_upgrade": Field("boolean", "whether cloud-init upgrades the packages at the first start"),
    "cloud_init_vendor_data": Field(
        "string", "snippet with vendor data that is there, such as local:snippets/vendor.yaml", longest=300
    ),
    "ip_config": Field("string", "address, ip=dhcp or ip=192.0.2.10/24,gw=192.0.2.1", longest=200),
    "nameserver": Field("string", "DNS servers, separated by blanks or commas", longest=200),
    "searchdomain": Field("string", "DNS search domain", longest=255),
    "ssh_public_keys": Field(
        "strings",
        "public keys of its user, as a list, or as a text with one a line",
        longest=10000,
        split=patterns.split_keys,
    ),
    "cloud_init_user_data": Field(
        "string",
        "user data for cloud-init; it needs a daemon that can write the node's snippets",
        longest=524288,
        lines=True,
        secret=True,
    ),
    "workspace": Field("string", "workspace it gets before it starts, by name or id", longest=100),
    "workspace_id": Field("string", "the same", longest=100),
    "tags": Field(
        "strings", "tags, as a list, or as a text with commas or blanks between them", longest=100, split=split_tags
    ),
    "description": Field("string", "text for the notes of the VM", longest=4000, lines=True),
    "update": Field(
        "boolean", "of a sandbox that is there: apply cores, memory, tags and description where they differ"
    ),
    "allow_restart": Field(
        "boolean", "whether update may stop and start the VM, which cores and memory of a VM that runs need"
    ),
    "wait_for_cloud_init": Field("boolean", "wait until cloud-init has ended; FAILED when it ended with errors"),
    "wait_for_ip": Field("boolean", "wait until the guest agent names an address"),
}


def create_sandbox(call: Call) -> Answer:
    dry_run = bool(call.body.get("dry_run"))
    ctx = call.make_context(dry_run=True) if dry_run else call.make_context()
    _check_limits(ctx, call.body)
    outcome = create.run(ctx, wanted.make_spec(ctx, read_creation_options(call.body)))
    if dry_run:
        answer = answer_item(outcome)
        answer.body["state"] = outcome.state
        # Nothing was created, so there is nothing to count.
        answer.outcomes = []
        return answer
    if call.body.get("wait_for_ip") and outcome.outcome in ("unchanged", "updated"):
        outcome = address.add_address(ctx, outcome, started=False)
    call.service.note_lease_change()
    return answer_item(outcome, 201 if outcome.outcome == "created" else 200)


def _check_limits(ctx: Context, body: Mapping[str, Any]) -> None:
    """Raise InvalidInput for options that the configuration forbids to clients of the API.

    Checks only what the request itself names. Profiles and configuration belong to the operator.
    """
    config = ctx.config
    low, high = config.vmid_range
    vmid, template, pool = body.get("vmid"), body.get("template"), body.get("pool")
    if config.api_vmid_range_only and vmid is not None and not low <= vmid <= high:
        raise InvalidInput(
            f"vmid: {vmid} is outside the range that clients may use (api_vmid_range_only). Valid: {low} to {high}, "
            "or leave it out",
            option="vmid",
        )
    if config.api_pools is not None and pool is not None and pool not in config.api_pools:
        raise InvalidInput(
            f"pool: {patterns.quote_value(pool)} is not for clients (api_pools). Valid: "
            f"{', '.join(config.api_pools) or 'none, leave it out'}",
            option="pool",
        )
    if config.api_templates is not None and template is not None and template not in config.api_templates:
        # The list may have the template's name and the request its VMID, or the reverse.
        names = {
            str(ident): str(row.get("name") or "")
            for ident, row in ctx.cluster.list_vms().items()
            if row.get("template")
        }
        allowed = {
            ident for ident, name in names.items() if ident in config.api_templates or name in config.api_templates
        }
        requested = {ident for ident, name in names.items() if template in (ident, name)}
        if not requested or not requested <= allowed:
            raise InvalidInput(
                f"template: {patterns.quote_value(template)} is not for clients (api_templates). "
                f"Valid: {', '.join(config.api_templates) or 'none, leave it out'}",
                option="template",
            )


def read_creation_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a creation by the core's names. Raises InvalidInput for an option given under two names."""
    options = {name: value for name, value in body.items() if name != "dry_run"}
    minutes = options.pop("ttl_minutes", None)
    if minutes is not None:
        if "ttl" in options:
            raise InvalidInput("ttl_minutes: give ttl or ttl_minutes, not both", option="ttl_minutes")
        options["ttl"] = minutes
    by_id = options.pop("workspace_id", None)
    if by_id is not None:
        if "workspace" in options:
            raise InvalidInput("workspace_id: give workspace or workspace_id, not both", option="workspace_id")
        options["workspace"] = by_id
    return options


def validate_plan(call: Call) -> Answer:
    """Answer with what a creation would do and what is wrong with it. Creates nothing."""
    ctx = call.make_context(dry_run=True)
    plan = {name: call.body.get(name) for name in ("name", "profile", "ttl_minutes", "workspace_id", "vmid", "tags")}
    plan["keepalive"] = call.body.get("keepalive", False)
    errors: list[dict[str, str]] = []
    warnings: list[str] = []
    try:
        _check_limits(ctx, call.body)
        outcome = create.run(ctx, wanted.make_spec(ctx, read_creation_options(call.body)))
        warnings = outcome.explain_warnings(REMEDIES)
        if outcome.outcome == "unchanged":
            warnings = [*warnings, f"sandbox {outcome.vmid} ({outcome.name}) is there already and stays as it is"]
    except ProxmoxError:
        # Proxmox VE cannot be asked, so the plan is neither valid nor invalid.
        raise
    except AgentlabError as error:
        option = error.detail.get("option") or ("workspace" if "workspace" in error.detail else "")
        errors = [{"code": error.code, "field": str(option), "message": error.explain(REMEDIES)}]
    return Answer(
        {
            "ok": not errors,
            "errors": errors,
            "plan": plan,
            "warnings": [{"code": "warning", "field": "", "message": text} for text in warnings],
        }
    )


def list_profiles(call: Call) -> Answer:
    by_name = profiles.load_all(call.service.config.profiles_dir)
    return Answer(
        {
            "profiles": [
                upstream.describe_profile(profile.public(), profile.path) for _name, profile in sorted(by_name.items())
            ]
        }
    )
