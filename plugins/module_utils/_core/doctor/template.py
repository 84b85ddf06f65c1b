# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check the template and the storage that sandboxes are cloned to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import AccessDenied, InvalidInput
from ..nodes import AUTO
from ..sandboxes import template as templates
from ..sandboxes import vm_config
from ..vm import address
from . import privileges
from .examination import Examination
from .findings import OK, PROBLEM, UNKNOWN, WARNING, Finding

_FULL = 0.9
# Storage types that cannot make linked clones at all; directories can with qcow2 only.
_NO_LINKED_CLONES = ("lvm", "iscsi", "iscsidirect")
_DIRECTORIES = ("dir", "nfs", "cifs", "cephfs", "glusterfs")


def _choose_template_node(exam: Examination, identifier: str) -> str | None:
    """Return the configured node. If a creation chooses the node, return the first one with a template of that name."""
    if exam.config.node not in (None, AUTO):
        return exam.config.node
    if len(exam.nodes) <= 1:
        # The nodes may be unknown: the credentials may lack Sys.Audit.
        return None
    online = exam.context.cluster.list_nodes()
    named = sorted(templates.find_by_name(exam.context, identifier).values())
    return next((node for node in named if online.get(node)), None)


def check_template(exam: Examination, option: str | None) -> Iterable[Finding]:
    """Check the template of ``option``, or else the configured one."""
    identifier = option or exam.config.template
    if not identifier:
        yield Finding(
            "template",
            UNKNOWN,
            "no template is configured, so none was checked",
            "set template in the configuration, or give the option template",
        )
        return
    try:
        found_template = templates.find(exam.context, identifier, _choose_template_node(exam, identifier))
        vmid, node = found_template.vmid, found_template.node
        config = found_template.config
        if config is None:
            config = exam.context.client.get_dict(f"nodes/{node}/qemu/{vmid}/config")
    except (InvalidInput, AccessDenied) as error:
        yield Finding(
            "template",
            PROBLEM,
            error.message,
            "without a template that these credentials see, no sandbox is created",
        )
        return
    exam.template = (vmid, node, config)
    name = f"template {vmid} ({config.get('name')})"
    facts = {"vmid": vmid, "node": node}
    misfits = list(_find_misfits(exam, vmid, node, config, name, facts))
    yield from misfits or [
        Finding("template", OK, f"{name} is fit: guest agent, cloud-init drive, linked clones", None, facts)
    ]


def _find_misfits(
    exam: Examination, vmid: int, node: str, config: Mapping[str, Any], name: str, facts: dict[str, Any]
) -> Iterable[Finding]:
    """Yield the settings of the template that do not fit, and note the storage of its first disk."""
    if not address.is_agent_on(dict(config)):
        yield Finding(
            "template",
            WARNING,
            f"{name} has the guest agent switched off: no address is known, and shutting down takes until the time-out",
            f"install qemu-guest-agent in it, and: qm set {vmid} --agent 1",
            facts,
        )
    drives = {key: str(value) for key, value in config.items() if re.fullmatch(r"(ide|sata|scsi|virtio)\d+", key)}
    if not vm_config.has_cloud_init_drive(dict(config)):
        yield Finding(
            "template",
            WARNING,
            f"{name} has no cloud-init drive: ip_config, nameserver and ssh_public_keys have no effect",
            f"qm set {vmid} --ide2 {exam.config.storage or _find_storage(drives.values()) or 'local-lvm'}:cloudinit",
            facts,
        )
    if str(config.get("onboot", "0")) == "1":
        yield Finding(
            "template",
            WARNING,
            f"{name} has onboot, which every clone copies: stopped sandboxes start with the node, past their lease",
            f"qm set {vmid} --onboot 0",
            facts,
        )
    yield from _find_missing_snippets(exam, vmid, node, str(config.get("cicustom") or ""), name, facts)
    disks = [value for value in drives.values() if "media=cdrom" not in value and "cloudinit" not in value]
    if not disks:
        yield Finding("template", PROBLEM, f"{name} has no disk", "give it one, or choose another template", facts)
        return
    kinds = {str(row.get("storage")): str(row.get("type")) for row in _list_storages(exam, node)}
    for disk in disks:
        storage = disk.partition(":")[0]
        exam.storage = exam.storage or storage
        kind = kinds.get(storage)
        facts.setdefault("storages", {})[storage] = kind
        if kind is None:
            yield Finding(
                "template",
                UNKNOWN,
                f"{name}: storage {storage} of its disk cannot be seen, so whether it makes linked clones is not known",
                f"grant Datastore.AllocateSpace on /storage/{storage}",
                facts,
            )
        elif kind in _NO_LINKED_CLONES or (kind in _DIRECTORIES and ".raw" in disk):
            yield Finding(
                "template",
                WARNING,
                f"{name}: storage {storage} ({kind}) makes no linked clones of its disk: creating copies the whole"
                " disk",
                "set full_clone: true, or move the template to lvmthin, zfspool, rbd or a directory with qcow2",
                facts,
            )


def _find_missing_snippets(
    exam: Examination, vmid: int, node: str, cicustom: str, name: str, facts: dict[str, Any]
) -> Iterable[Finding]:
    """Find the snippets that the template's cicustom names and that do not exist.

    Proxmox VE clones such a template, and then refuses every start of the clone.
    """
    volumes = [value for value in (part.partition("=")[2] for part in cicustom.split(",")) if ":" in value]
    kinds = (
        {str(row.get("storage")): str(row.get("content") or "").split(",") for row in _list_storages(exam, node)}
        if volumes
        else {}
    )
    for volume in volumes:
        storage = volume.partition(":")[0]
        mend = f"put the file there on node {node}, or take it out of the template: qm set {vmid} --delete cicustom"
        if storage in kinds and "snippets" not in kinds[storage]:
            yield Finding(
                "template",
                PROBLEM,
                f"{name} names the snippet {volume} (cicustom), but storage {storage} holds no snippets: no sandbox"
                " starts",
                f"pvesm set {storage} --content {','.join([*kinds[storage], 'snippets'])}; or {mend}",
                facts,
            )
            continue
        path = f"/storage/{storage}"
        rows = (
            exam.context.client.get_list(f"nodes/{node}/storage/{storage}/content", content="snippets")
            if storage in kinds
            else []
        )
        if any(row.get("volid") == volume for row in rows):
            continue
        if storage in kinds and exam.context.cluster.has_privilege(path, "Datastore.Allocate"):
            yield Finding(
                "template",
                PROBLEM,
                f"{name} names the snippet {volume} (cicustom), which does not exist: no sandbox starts",
                mend,
                facts,
            )
        else:
            yield Finding(
                "template",
                UNKNOWN,
                f"{name} names the snippet {volume} (cicustom), and these credentials may not see whether it exists",
                f"look for it on node {node} (pvesm path {volume}), or grant {', '.join(privileges.KEEP)} on {path}",
                facts,
            )


def _list_storages(exam: Examination, node: str) -> list[dict[str, Any]]:
    return exam.context.client.get_list(f"nodes/{node}/storage")


def check_storage(exam: Examination) -> Iterable[Finding]:
    """Check that the storage of new sandboxes is active, takes disk images and has room."""
    node = find_home_node(exam)
    storage = exam.storage
    if node is None:
        yield Finding(
            "storage", UNKNOWN, "not checked: no node is known to ask", "see the findings quorum and template"
        )
        return
    rows = {str(row.get("storage")): row for row in _list_storages(exam, node)}
    if storage is None:
        yield Finding(
            "storage",
            UNKNOWN,
            "the storage of new sandboxes is not known (no template, no storage configured)",
            "see the finding template",
        )
        return
    row = rows.get(storage)
    if row is None:
        yield Finding(
            "storage",
            PROBLEM,
            f"storage {storage} cannot be seen on node {node}: it is not there, or Datastore.AllocateSpace is missing",
            f"grant Datastore.AllocateSpace on /storage/{storage}, or correct storage",
        )
        return
    total, used = int(row.get("total") or 0), int(row.get("used") or 0)
    facts = {"storage": storage, "total": total, "used": used, "active": row.get("active")}
    healthy = True
    if str(row.get("active")) != "1" or str(row.get("enabled", 1)) != "1":
        yield Finding(
            "storage",
            PROBLEM,
            f"storage {storage} is not active on node {node}: nothing can be created there",
            f"pvesm status --storage {storage}",
            facts,
        )
        healthy = False
    if row.get("content") is not None and "images" not in str(row["content"]).split(","):
        yield Finding(
            "storage",
            PROBLEM,
            f"storage {storage} holds no disk images (content {row['content']}): nothing can be created there",
            f"pvesm set {storage} --content {row['content']},images, or set storage to another one",
            facts,
        )
        healthy = False
    if total and used / total > _FULL:
        yield Finding(
            "storage",
            WARNING,
            f"storage {storage} is {used * 100 // total} % full: thin volumes that outgrow it stop every VM on it",
            "prune sandboxes, or enlarge it",
            facts,
        )
        healthy = False
    if healthy:
        yield Finding(
            "storage",
            OK,
            f"storage {storage} is active" + (f", {used * 100 // total} % used" if total else ""),
            None,
            facts,
        )


def find_home_node(exam: Examination) -> str | None:
    """Return the node that clones sandboxes: the template's, or else one that is online."""
    return (
        exam.template[1]
        if exam.template
        else next((name for name, online in sorted(exam.nodes.items()) if online), None)
    )


def _find_storage(drives: Iterable[str]) -> str | None:
    """Return the storage of the first disk."""
    return next((value.partition(":")[0] for value in drives if ":" in value and "media=cdrom" not in value), None)
