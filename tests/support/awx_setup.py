# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of the set-up of AWX share: what a user makes by hand before it, and how its result is read."""

from __future__ import annotations

from typing import Any

from support.awx import Awx
from support.play import Run

PROJECT_URL = "https://git.example.net/agentlab-awx.git"
# A token of Proxmox VE that is kept in AWX.
PROXMOX = {"awx_proxmox_api_host": "pve.example.net", "awx_proxmox_api_token_id": "agentlab@pve!awx"}


def furnish(awx: Awx, organization: int, credential: str = "nodes", inventory: str = "proxmox") -> None:
    """Add what a user makes by hand in an organization: inventory, SSH credential, Galaxy credential."""
    awx.inventory(inventory, organization)
    kind = awx.named("credential_types", "Machine")["id"]
    awx.add("credentials", name=credential, credential_type=kind, organization=organization)
    galaxy = awx.named("credentials", "Ansible Galaxy")["id"]
    awx.related["organizations", organization, "galaxy_credentials"] = [galaxy]


def result(run: Run) -> dict[str, Any]:
    """Return what the task that sets up returned."""
    return run.result("Make AWX what is wanted")


def lines(run: Run) -> str:
    return "\n".join(result(run)["lines"])
