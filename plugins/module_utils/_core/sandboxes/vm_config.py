# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Translate a Spec into the configuration of its VM: hardware, network, cloud-init, tags, and the disk to resize.

A tag is a hint for people. A cluster may forbid tags; then the VM keeps the tags that the cluster lets it have, and
the caller is warned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ..context import Context
from ..errors import AccessDenied, InvalidInput, OutcomeUnknown
from ..guest import cloud_init
from ..model import Sandbox
from ..proxmox.identity import OUR_TAG
from ..vm.locate import Located, require_match
from .spec import Spec

# Proxmox VE names one of the tags that change: "Permission check failed (/, Sys.Modify for modifying tag 'x')".
_REFUSED_TAG = re.compile(r"Sys\.Modify for modifying tag '([^']*)'")
# The order in which Proxmox VE looks for a disk when the configuration names no boot disk (qemu-server,
# valid_drive_names).
_BUSES = ("ide", "scsi", "virtio", "sata")


def compute_changes(ctx: Context, spec: Spec, sandbox: Sandbox, config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of ``config`` that differ from the spec, with the values that the spec asks for."""
    values: dict[str, Any] = {
        "cores": spec.cores,
        "cpu": spec.cpu_type,
        "nameserver": spec.nameserver,
        "searchdomain": spec.searchdomain,
        "ipconfig0": spec.ip_config,
        "ipconfig1": spec.second_ip_config,
        "ciuser": spec.cloud_init_user,
        "cipassword": spec.cloud_init_password,
        "ciupgrade": None if spec.cloud_init_upgrade is None else int(spec.cloud_init_upgrade),
        **compute_memory(spec.memory, config),
    }
    tags = {OUR_TAG, *sandbox.tags}
    if tags != split_tags(config.get("tags")):
        values["tags"] = ";".join(sorted(tags))
    if str(config.get("protection", "0")) == "1":
        # The clone copied the flag from the template, and a VM with it cannot be deleted. A sandbox's own protection is
        # kept in the record.
        values["protection"] = 0
    custom = _compose_cicustom(ctx, spec, sandbox, str(config.get("cicustom") or ""))
    if custom is not None:
        values["cicustom"] = custom
    if spec.ssh_public_keys:
        values["sshkeys"] = quote("\n".join(key.strip() for key in spec.ssh_public_keys), safe="")
    # A security group has no effect on an interface whose firewall flag is off.
    firewall = True if spec.firewall_group else spec.firewall
    first = str(config.get("net0") or "virtio")
    if spec.bridge or spec.network_model or spec.vlan_tag or firewall is not None:
        values["net0"] = compose_network(first, spec.bridge, firewall, spec.network_model, spec.vlan_tag)
    if spec.second_bridge or spec.second_vlan_tag:
        model = spec.network_model or re.split(r"[=,]", first)[0]
        values["net1"] = compose_network(
            str(config.get("net1") or model), spec.second_bridge, None, None, spec.second_vlan_tag
        )
    return {
        name: value for name, value in values.items() if value is not None and str(config.get(name, "")) != str(value)
    }


def compute_memory(memory: int | None, config: dict[str, Any]) -> dict[str, Any]:
    """Return ``memory`` in MiB, and a lower ``balloon`` where the configured one exceeds it.

    Proxmox VE refuses less memory than balloon.
    """
    if memory is None:
        return {}
    balloon = str(config.get("balloon") or "0")
    return {"memory": memory, **({"balloon": memory} if balloon.isdecimal() and int(balloon) > memory else {})}


def _compose_cicustom(ctx: Context, spec: Spec, sandbox: Sandbox, current: str) -> str | None:
    """Return the value of ``cicustom`` with our user data and the spec's vendor data; None when neither is given."""
    volumes: dict[str, str] = {}
    if sandbox.snippet is not None:
        volumes["user"] = cloud_init.compose_volume(ctx, sandbox)
    if spec.cloud_init_vendor_data:
        volumes["vendor"] = spec.cloud_init_vendor_data
    if not volumes:
        return None
    other_parts = [part for part in current.split(",") if part and part.partition("=")[0] not in volumes]
    return ",".join([*(f"{name}={volume}" for name, volume in volumes.items()), *other_parts])


# ---- tags ----


def split_tags(value: object) -> set[str]:
    """Return the tags in the value of ``tags``.

    Proxmox VE stores tags in small letters, and accepts ``;``, ``,`` and blanks as separators.
    """
    return {tag.lower() for tag in re.split(r"[;,\s]+", str(value or "")) if tag}


def write_config(ctx: Context, located: Located, changes: dict[str, Any], refused: set[str]) -> None:
    """Write ``changes``, guarded by the digest of the judged configuration. Leave a refused tag as it is on the VM.

    Proxmox VE refuses the whole write when the user may not add or remove one of the tags, and names that tag. Such
    tags are added to ``refused``, and the write is repeated without them.
    """
    before = split_tags(located.config.get("tags"))
    requested = split_tags(changes.pop("tags")) if "tags" in changes else before
    while True:
        # A refused tag keeps its present state on the VM, whether set or missing.
        tags = (requested - (refused - before)) | (before & refused)
        values = dict(changes)
        if tags != before:
            # Proxmox VE would store an empty value as one blank.
            values.update({"tags": ";".join(sorted(tags))} if tags else {"delete": "tags"})
        if not values:
            return
        try:
            ctx.client.put(f"{located.path}/config", digest=located.digest, **values)
            return
        except AccessDenied as error:
            named = _REFUSED_TAG.search(error.text or error.message)
            changing = tags ^ before
            if named is None or not changing:
                raise
            tag = named[1].lower()
            # The named tag may not be among ours. Then leave all tags unchanged, so that the loop ends.
            refused |= {tag} if tag in changing else changing


def compose_tag_warnings(sandbox: Sandbox, refused: set[str], template_tags: set[str]) -> list[str]:
    """Return a warning for the tags that could not be set, and another for template tags that could not be removed."""
    own_tags = {OUR_TAG, *sandbox.tags}
    remedy = (
        "Proxmox VE asks for Sys.Modify on / to change them; have an administrator allow them (Datacenter, Options, "
        "User Tag Access and "
        "Registered Tags), or leave them out"
    )
    warnings = []
    missing, template_leftovers = sorted(refused & own_tags), sorted((refused - own_tags) & template_tags)
    if missing:
        warnings.append(
            f"tags: the cluster does not allow the tag {', '.join(missing)}; VM {sandbox.vmid} is without, the "
            "record has what was asked "
            f"for. {remedy}"
        )
    if template_leftovers:
        warnings.append(
            f"tags: VM {sandbox.vmid} keeps the tag {', '.join(template_leftovers)} of its template, which the cluster "
            "does not allow to be taken away. "
            "Take it off the template"
        )
    return warnings


# ---- network ----


def compose_network(
    current: str, bridge: str | None, firewall: bool | None, model: str | None = None, vlan_tag: int | None = None
) -> str:
    """Return the interface with a new bridge, firewall flag, model or VLAN tag. The MAC address stays."""
    parts = [part for part in current.split(",") if part]
    if model and parts:
        # The first field is the model with the MAC address: virtio=BC:24:11:00:00:01.
        parts[0] = "=".join([model, *parts[0].split("=")[1:]])
    values = {"bridge": bridge, "firewall": None if firewall is None else int(firewall), "tag": vlan_tag}
    new = {name: value for name, value in values.items() if value is not None and value != ""}
    return ",".join(
        [
            *(part for part in parts if part.partition("=")[0] not in new),
            *(f"{name}={value}" for name, value in new.items()),
        ]
    )


def join_firewall_group(ctx: Context, sandbox: Sandbox, located: Located, group: str) -> None:
    """Switch the VM's firewall on and add the security group to its rules, where that is not already so.

    Proxmox VE clones the template's firewall rules along.
    """
    base = f"{located.path}/firewall"

    def has_group() -> bool:
        return any(
            rule.get("type") == "group" and rule.get("action") == group and str(rule.get("enable", 1)) == "1"
            for rule in ctx.client.get_list(f"{base}/rules")
        )

    def is_firewall_on() -> bool:
        return str(ctx.client.get_dict(f"{base}/options").get("enable", 0)) == "1"

    writes: tuple[tuple[Callable[[], bool], Callable[[], Any]], ...] = (
        (has_group, lambda: ctx.client.post(f"{base}/rules", type="group", action=group, enable=1)),
        (is_firewall_on, lambda: ctx.client.put(f"{base}/options", enable=1)),
    )
    for is_so, write in writes:
        if is_so():
            continue
        # These writes take no digest. So prove directly before each of them that the VM is ours.
        require_match(ctx, sandbox)
        try:
            write()
        except OutcomeUnknown:
            # pvesh reports this also for a write without an answer. The present rules show whether the write was done.
            if not is_so():
                raise


# ---- disks ----


def compute_grown_size(drive: str, more: str) -> str:
    """Return the size of a configured drive plus ``more`` (such as ``+10G``), in KiB as Proxmox takes it."""
    now = read_size(drive)
    if now is None:
        raise InvalidInput(
            "disk_size: Proxmox VE does not tell the size of the template's disk; give an absolute one, such as 20G",
            option="disk_size",
        )
    return f"{int(convert_to_kib(now) + convert_to_kib(more[1:]))}K"


def read_size(drive: str) -> str | None:
    """Return the size in the value of a drive, such as 8G; None without a size."""
    match = re.search(r"(?:^|,)size=(\d+(?:\.\d+)?[KMGT]?)(?:,|$)", drive)
    return match[1] if match else None


def convert_to_kib(size: str) -> float:
    """Return a size of Proxmox VE (8G, 512M, 4096) in KiB. A number without a unit is in bytes."""
    units = {"K": 1.0, "M": 1024.0, "G": 1024.0**2, "T": 1024.0**3}
    return float(size[:-1]) * units[size[-1]] if size[-1] in units else float(size) / 1024


def list_disks(config: dict[str, Any]) -> list[str]:
    """Return the keys of the disks in Proxmox VE's boot order, without CD-ROMs and cloud-init drives."""
    numbered = [
        (_BUSES.index(match[1]), int(match[2]), match[0])
        for match in map(re.compile(rf"({'|'.join(_BUSES)})(\d+)").fullmatch, config)
        if match
    ]
    return [
        key
        for _bus, _number, key in sorted(numbered)
        if "media=cdrom" not in str(config[key]) and not _is_cloud_init(config[key])
    ]


def find_boot_disk(config: dict[str, Any]) -> str | None:
    """Return the key of the disk that Proxmox VE boots the VM from; None without a disk.

    This is the first disk of ``boot: order=``. In the older form (``boot`` is letters, ``c`` for the disk, or missing)
    it is the disk named by ``bootdisk``. Otherwise it is the first disk in Proxmox VE's own order.
    """
    present = list_disks(config)
    boot = str(config.get("boot") or "")
    if "order=" in boot:
        named = re.findall(r"[a-z]+\d+", boot.partition("order=")[2])
    else:
        named = [str(config.get("bootdisk") or "")]
    return next((key for key in named if key in present), present[0] if present else None)


def has_cloud_init_drive(config: dict[str, Any]) -> bool:
    """Return whether the VM has the drive that gives cloud-init its data."""
    return any(
        re.fullmatch(r"(ide|scsi|sata|virtio)\d+", key) and _is_cloud_init(value) for key, value in config.items()
    )


def _is_cloud_init(drive: object) -> bool:
    """Return whether the drive is a cloud-init drive, judged by the name of its volume.

    A storage may be called "cloudinit" too, so the name of the storage does not count.
    """
    volume = str(drive).partition(",")[0].partition(":")[2]
    return re.search(r"(^|[/-])cloudinit(\.[a-z0-9]+)?$", volume) is not None
