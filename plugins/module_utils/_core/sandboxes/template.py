# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Find the template of a creation, and check before the clone that the requested sandbox can be made from it.

The list of all VMs is only a hint: for up to ten seconds it shows a new template without its name and not marked as a
template. The VM's own configuration decides.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

from ..context import Context
from ..errors import AccessDenied, ApiError, InvalidInput, ProxmoxError, Unreachable
from . import vm_config
from .spec import Spec

# Options that reach the guest only through the cloud-init drive.
_CLOUD_INIT = (
    "ip_config",
    "second_ip_config",
    "nameserver",
    "searchdomain",
    "cloud_init_user",
    "cloud_init_password",
    "cloud_init_upgrade",
    "ssh_public_keys",
    "cloud_init_user_data",
    "cloud_init_vendor_data",
)
# Maximum number of VMs to read that the list shows without a name. There are more only while a node starts.
_MOST_READ = 8


@dataclass(frozen=True, slots=True)
class Template:
    """A template and its node. ``config`` is None when these credentials may not read it."""

    vmid: int
    node: str
    config: dict[str, Any] | None

    @property
    def title(self) -> str:
        return f"template {self.vmid} ({self.name})" if self.name else f"template {self.vmid}"

    @property
    def name(self) -> str | None:
        return (self.config or {}).get("name")

    @property
    def storages(self) -> set[str]:
        """Return the storages that hold the template's disks."""
        config = self.config or {}
        keys = [*vm_config.list_disks(config), *(key for key in ("efidisk0", "tpmstate0") if key in config)]
        return {str(config[key]).partition(":")[0] for key in keys}


def find(ctx: Context, identifier: str | None, node: str | None = None) -> Template:
    """Return the template with this VMID or name; among several of that name, the template on ``node``.

    Raises InvalidInput, which lists the templates that exist.
    """
    if not identifier:
        raise InvalidInput(
            "template: missing; give the VMID or name of a template (or set it in the configuration)", option="template"
        )
    rows = ctx.cluster.list_vms()
    number = _parse_vmid(identifier)
    if number is not None and number in rows:
        return _read_template(ctx, number)
    named = find_by_name(ctx, identifier)
    if len(named) > 1 and node is not None:
        named = {vmid: where for vmid, where in named.items() if where == node} or named
    if len(named) == 1:
        return read(ctx, *next(iter(named.items())))
    if named:
        places = ", ".join(f"{vmid} on {where}" for vmid, where in sorted(named.items()))
        on_node = f", none of them on node {node}" if node is not None and node not in named.values() else ""
        raise InvalidInput(
            f"template: {identifier!r} is the name of several templates ({places}){on_node}; give the VMID, or the "
            "node",
            option="template",
            value=identifier,
        )
    silent = _list_offline_nodes(ctx)
    visible = _list_visible_templates(ctx, silent)
    if silent:
        # For VMs on an offline node Proxmox tells neither the name nor whether the VM is a template.
        raise InvalidInput(
            f"template: {identifier!r} is not to be seen, but {', '.join(silent)} is offline, and what is there is not "
            "known; wait until the "
            f"node is back, or give another template. Templates on the other nodes: {visible}",
            option="template",
            value=identifier,
        )
    plain = sorted(vmid for vmid, row in rows.items() if row.get("name") == identifier)
    if plain:
        raise _make_no_template_error(plain[0], str(rows[plain[0]].get("type")), identifier)
    if number is not None and ctx.cluster.is_in_use(number):
        raise InvalidInput(
            f"template: VM {number} exists, but these credentials may not see it. Grant VM.Audit and VM.Clone on "
            f"/vms/{number}, or give another template. Templates that they see: {visible}",
            option="template",
            value=identifier,
        )
    raise InvalidInput(
        f"template: {identifier!r} does not exist. Templates: {visible}", option="template", value=identifier
    )


def _list_offline_nodes(ctx: Context) -> list[str]:
    try:
        return sorted(name for name, online in ctx.cluster.list_nodes().items() if not online)
    except AccessDenied:
        # Only Sys.Audit on / shows which nodes are offline.
        return []


def _explain_unreachable(ctx: Context, vmid: int, node: str, error: Unreachable) -> str:
    """Return the sentence for a template whose node does not answer."""
    # The refusal itself counts. A cluster status that cannot be read only makes the sentence less exact.
    with contextlib.suppress(ProxmoxError):
        offline = _list_offline_nodes(ctx)
        if node in offline:
            return (
                f"template: {vmid} is on node {node}, which is offline, so it cannot be cloned. Wait until the node is "
                "back, or give a template of another node. Templates on the other nodes: "
                f"{_list_visible_templates(ctx, offline)}"
            )
    return (
        f"template: {vmid} on node {node} cannot be read: {error.message}. Try again when the node answers, or give a "
        "template of another node"
    )


def _list_visible_templates(ctx: Context, offline: list[str]) -> str:
    """Return the templates that are not on ``offline`` nodes, for messages."""
    names = [
        f"{vmid} ({row['name']})" if row.get("name") else str(vmid)
        for vmid, row in sorted(ctx.cluster.list_vms().items())
        if _is_template(row) and row.get("node") not in offline
    ]
    return ", ".join(names) or "none that these credentials may see"


def _parse_vmid(identifier: str) -> int | None:
    """Return the VMID that the text is; None for a name."""
    return int(identifier) if identifier.isascii() and identifier.isdecimal() else None


def find_by_name(ctx: Context, identifier: str) -> dict[int, str]:
    """Return the templates of that name as {VMID: node}; empty when ``identifier`` is a VMID."""
    rows = ctx.cluster.list_vms()
    number = _parse_vmid(identifier)
    if number is not None and number in rows:
        return {}
    named = {
        vmid: str(row.get("node")) for vmid, row in rows.items() if _is_template(row) and row.get("name") == identifier
    }
    return named or _search_unclear_rows(ctx, identifier)


def _is_template(row: dict[str, Any]) -> bool:
    return str(row.get("template")) == "1" and row.get("type") == "qemu"


def _make_no_template_error(vmid: int, kind: str, identifier: str) -> InvalidInput:
    if kind != "qemu":
        return InvalidInput(
            f"template: {vmid} is a container; a sandbox is made from the template of a VM",
            option="template",
            value=identifier,
        )
    return InvalidInput(
        f"template: VM {vmid} is not a template; convert it first (qm template {vmid})",
        option="template",
        value=identifier,
    )


def _read_template(ctx: Context, vmid: int) -> Template:
    """Return the template with this VMID of the VM list. Raises InvalidInput for a VM that is no template."""
    row = ctx.cluster.list_vms()[vmid]
    if row.get("type") != "qemu":
        raise _make_no_template_error(vmid, str(row.get("type")), str(vmid))
    template = read(ctx, vmid, str(row.get("node")), listed=_is_template(row))
    if template.config is not None and str(template.config.get("template", "0")) != "1":
        raise _make_no_template_error(vmid, "qemu", str(vmid))
    return template


def _search_unclear_rows(ctx: Context, identifier: str) -> dict[int, str]:
    """Return the templates of that name as {VMID: node}, among the VMs that the list describes incompletely."""
    unclear = [
        vmid
        for vmid, row in sorted(ctx.cluster.list_vms().items())
        if row.get("type") == "qemu"
        and (not row.get("name") or row.get("name") == identifier)
        and not _is_template(row)
    ]
    nodes = {}
    for vmid in unclear[:_MOST_READ]:
        try:
            template = read(ctx, vmid, str(ctx.cluster.list_vms()[vmid].get("node")), listed=False)
        except (InvalidInput, ProxmoxError):
            # A node that does not answer is reported below.
            continue
        if (
            template.config is not None
            and template.config.get("name") == identifier
            and str(template.config.get("template", "0")) == "1"
        ):
            nodes[vmid] = template.node
    return nodes


def read(ctx: Context, vmid: int, node: str, *, listed: bool = True) -> Template:
    """Read the configuration and return the template.

    ``listed``: the VM list marks the VM as a template. Then an unreadable configuration is no error.
    """
    try:
        config = ctx.read_once(("config", node, vmid), lambda: ctx.client.get_dict(f"nodes/{node}/qemu/{vmid}/config"))
        return Template(vmid, node, config)
    except AccessDenied as error:
        if listed:
            return Template(vmid, node, None)
        raise InvalidInput(
            f"template: whether VM {vmid} is a template is not known: {error.message}",
            option="template",
            value=str(vmid),
        ) from None
    except Unreachable as error:
        error.message = _explain_unreachable(ctx, vmid, node, error)
        error.detail.setdefault("option", "template")
        raise
    except ApiError as error:
        moved = ctx.cluster.list_vms(fresh=True).get(vmid, {}).get("node")
        if "does not exist" in error.text and moved is not None and str(moved) != node:
            return read(ctx, vmid, str(moved), listed=listed)
        unknown = f"template: VM {vmid} on node {node} cannot be read, so whether it is a template is not known"
        error.message = f"{unknown}: {error.message}"
        raise


# ---- suitability for the requested sandbox ----


def choose_clone_mode(ctx: Context, spec: Spec, template: Template) -> tuple[bool | None, str | None]:
    """Return ``full`` and ``storage`` for the clone call.

    Proxmox VE puts a linked clone on the template's storage. So the configured ``storage`` causes a full clone only
    where the template lies on another storage, or where its storage is unknown. ``storage`` and ``full_clone`` of a
    creation or profile apply as given.
    """
    if spec.storage:
        return (True if spec.full_clone is None else spec.full_clone), spec.storage
    configured = ctx.config.storage
    if not configured or spec.full_clone is False:
        return spec.full_clone, None
    if spec.full_clone is None and template.config is not None and template.storages == {configured}:
        return None, None
    return True, configured


def check(ctx: Context, spec: Spec, template: Template, node: str, *, placed: bool = False) -> None:
    """Raise InvalidInput, by option, for a request that Proxmox VE would refuse after the clone or would ignore.

    ``placed``: the choice of the node has already checked storage and CPUs.
    """
    if not placed:
        _check_storage(ctx, choose_clone_mode(ctx, spec, template)[1], node)
    config = template.config
    if config is None:
        return
    if not vm_config.has_cloud_init_drive(config):
        for option in _CLOUD_INIT:
            if getattr(spec, option) not in (None, []):
                raise InvalidInput(
                    f"{option}: {template.title} has no cloud-init drive, so it would have no effect. Give the "
                    "template one (qm set "
                    f"{template.vmid} --ide2 STORAGE:cloudinit), or leave {option} out",
                    option=option,
                )
    if spec.disk_size:
        _check_disk_size(spec.disk_size, template, config)
    if not spec.second_bridge and "net1" not in config:
        for option in ("second_vlan_tag", "second_ip_config"):
            if getattr(spec, option) is not None:
                raise InvalidInput(
                    f"{option}: {template.title} has no second interface; give second_bridge, which makes one",
                    option=option,
                )
    if spec.cores is not None and not placed:
        check_cores(ctx, spec.cores, config, node, "template")


def _check_storage(ctx: Context, storage: str | None, node: str) -> None:
    """Raise InvalidInput for a storage that the node does not have for disks of VMs."""
    if storage is None:
        return
    rows = ctx.read_once(("storages", node), lambda: ctx.client.get_list(f"nodes/{node}/storage", content="images"))
    # Without the right to see storages the list is empty, which proves nothing.
    if rows and not any(row.get("storage") == storage for row in rows):
        names = ", ".join(sorted(str(row.get("storage")) for row in rows))
        raise InvalidInput(
            f"storage: {storage!r} is not a storage of node {node} for disks of VMs. Storages: {names}",
            option="storage",
            value=storage,
        )


def _check_disk_size(size: str, template: Template, config: dict[str, Any]) -> None:
    """Raise InvalidInput for a size below the template's. Proxmox VE shrinks no disk, and says so after the clone."""
    disk = vm_config.find_boot_disk(config)
    if disk is None:
        raise InvalidInput(
            f"disk_size: {template.title} has no disk to resize; leave disk_size out", option="disk_size"
        )
    has = vm_config.read_size(str(config[disk]))
    if has is not None and not size.startswith("+") and vm_config.convert_to_kib(size) < vm_config.convert_to_kib(has):
        raise InvalidInput(
            f"disk_size: {size} is less than the {has} of disk {disk} of {template.title}, and disks only grow. Give "
            f"{has} or more, or leave disk_size out",
            option="disk_size",
            value=size,
        )


def check_cores(ctx: Context, cores: int, config: dict[str, Any], node: str, owner: str) -> None:
    """Raise InvalidInput for more virtual CPUs than the node has, because Proxmox VE would not start the VM.

    ``owner`` names the owner of the configuration in the message: ``template`` or ``VM``.
    """
    try:
        known = ctx.cluster.count_cpus(node)
    except AccessDenied:
        return
    sockets = re.fullmatch(r"\d{1,3}", str(config.get("sockets") or "1"))
    count = cores * (int(sockets[0]) if sockets else 1)
    if known is not None and count > known:
        times = f" (times {sockets[0]} sockets of the {owner})" if sockets and sockets[0] != "1" else ""
        raise InvalidInput(
            f"cores: {cores}{times} is more than the {known} CPUs of node {node}, which would not start the VM. Give "
            "fewer cores, or "
            "another node",
            option="cores",
            value=cores,
        )
