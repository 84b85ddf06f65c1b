# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Texts of Proxmox VE that several parts of the double answer."""

from __future__ import annotations

from typing import Any


def tell_no_config(node: str, vmid: Any) -> str:
    """Return the text about a VM that does not exist, from tasks that read its configuration file."""
    return f"Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist"


def tell_no_quorum(node: str, vmid: Any) -> str:
    """Return the text about a configuration that cannot be written because the cluster has no quorum."""
    return f"unable to open file '/etc/pve/nodes/{node}/qemu-server/{vmid}.conf.tmp.4711' - Permission denied"


def tell_no_vm(vmid: Any, node: str) -> str:
    """Return the text about a VM that is not on the node, from requests."""
    return f"unable to find configuration file for VM {vmid} on node '{node}'"
